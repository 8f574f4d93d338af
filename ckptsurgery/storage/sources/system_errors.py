"""What the operating system refused, as diagnostics."""

from __future__ import annotations

import errno

from ...errors import CheckpointError, Diagnostic

__all__ = ["os_error"]

_HELP = {
    errno.ENOENT: ("missing-file", "no such file", "check the path"),
    errno.EACCES: ("permission-denied", "no permission", "check the permissions of the file and its folder"),
    errno.EPERM: ("permission-denied", "no permission", "check the permissions of the file and its folder"),
    errno.EROFS: ("read-only", "the file system is read-only", "choose another folder"),
    errno.ENOSPC: (
        "disk-full",
        "no space left on the disk",
        "free some space, or choose another folder; nothing was replaced",
    ),
    errno.EDQUOT: (
        "disk-full",
        "the disk quota is used up",
        "free some space, or choose another folder; nothing was replaced",
    ),
    errno.EFBIG: (
        "file-too-large",
        "the file system cannot hold a file of this size",
        "name a folder, and a largest size of its files below that limit",
    ),
    errno.EISDIR: ("is-a-folder", "a folder where a file is expected", "name the file in it"),
    errno.ENOTDIR: ("not-a-folder", "a part of the path is a file, not a folder", "check the path"),
    errno.EMFILE: ("too-many-files", "too many open files", "ulimit -n 4096"),
    errno.EINVAL: ("bad-path", "this is no path", "check the path"),
    errno.ENAMETOOLONG: ("bad-path", "the file name is too long", "choose a shorter name"),
}


_CHECK = "check the path and the disk (its kernel log), then try again"


def os_error(error: OSError, path: str, doing: str = "read") -> CheckpointError:
    """The diagnostic for what the operating system refused."""
    code, text, help = _HELP.get(error.errno or 0, (f"{doing}-failed", error.strerror or str(error), _CHECK))
    return CheckpointError(Diagnostic(code, f"cannot {doing} {path!r}: {text}", path, help=help))
