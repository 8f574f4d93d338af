"""Space for what is to be written, where the file system can reserve it: then no write has to look for any."""

from __future__ import annotations

import errno
import fcntl
import struct

__all__ = ["reserve"]

_FS_IOC_RESVSP64 = 0x4030582A  # _IOW('X', 42, struct space_resv): fallocate(2) for any file system of Linux
_SPACE_RESV = struct.Struct("hhqqiI4i")
_WORTH_RESERVING = 1 << 20


def reserve(descriptor: int, nbytes: int) -> None:
    """Reserve space for a file's first bytes; its size stays what it is. Where that cannot be done, nothing happens.

    Raises:
        OSError: there is no space for so many.
    """
    if nbytes < _WORTH_RESERVING:
        return
    try:
        fcntl.ioctl(descriptor, _FS_IOC_RESVSP64, _SPACE_RESV.pack(0, 0, 0, nbytes, 0, 0, 0, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
