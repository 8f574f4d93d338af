"""Ways from the host's memory to an accelerator: what its backend of torch offers is tried, and no device is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, Protocol

from ...errors import CheckpointError, Diagnostic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Device = torch.device | str

__all__ = ["Link", "as_device", "empty_on", "link_to", "moved_to"]


class Link(Protocol):
    """A way to devices on which copies go on by themselves, while the host does something else."""

    def buffer(self, nbytes: int) -> Tensor:
        """Bytes of the host that the devices can fetch from by themselves."""
        ...

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], object]:
        """Start to copy into the first of each pair what is in the second; what is returned waits until it is done.

        Until then both must be held.
        """
        ...


def as_device(device: Device) -> torch.device:
    """The device that is meant, with its number.

    >>> as_device("cpu")
    device(type='cpu')

    Raises:
        CheckpointError: it is not there, or it holds no values.
    """
    import torch

    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # all of them mean that it is not there
        text = f"torch finds no device {str(device)!r} here: {_first_sentence(error)}"
        listed = str(error).partition("Expected one of ")[2].partition(" device type")[0].split(", ")
        near = get_close_matches(str(device), listed, 1)
        help = f"did you mean {near[0]!r}?" if near else "torch.accelerator.current_accelerator() returns the one here"
        raise CheckpointError(Diagnostic("bad-device", text, help=help)) from error
    if found.type == "meta":
        raise CheckpointError(Diagnostic("bad-device", "the meta device holds no values, so nothing is loaded there"))
    return found


def empty_on(device: torch.device, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Room for a tensor.

    Raises:
        CheckpointError: the device has none left.
    """
    import torch

    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:
        raise _refused(device, error) from error


def moved_to(device: torch.device | None, tensor: Tensor) -> Tensor:
    """The tensor itself where it lies there, or anywhere will do; else a plain copy.

    Raises:
        CheckpointError: the device has no room left, or failed.
    """
    if device is None or tensor.device == device:
        return tensor
    try:
        return tensor.to(device)
    except RuntimeError as error:
        raise _refused(device, error) from error


def link_to(device: torch.device) -> Link | None:
    """The way to a device; None where plain copies must do: it knows no page-locked memory, or no streams."""
    import torch

    if device.type in ("cpu", "meta"):
        return None
    try:
        link = _Streams()
        there, here = torch.empty(1, dtype=torch.uint8, device=device), link.buffer(1)
        link.copy([(there, here)])()
    except (CheckpointError, RuntimeError, AttributeError, TypeError):  # what is not there fails in ways of its own
        return None
    return link


class _Streams:
    """Page-locked buffers, and a stream for copies to each device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.Stream] = {}

    def buffer(self, nbytes: int) -> Tensor:
        import torch

        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            text = f"the host gives no page-locked memory: {_first_sentence(error)}"
            raise CheckpointError(Diagnostic("no-pinned-memory", text)) from error

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], object]:
        import torch

        groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for target, source in pairs:
            targets, sources = groups.setdefault(target.device, ([], []))
            targets.append(target)
            sources.append(source)
        events = []
        for device, (targets, sources) in groups.items():
            stream = self._stream(device)
            try:
                with torch.no_grad(), stream:
                    torch._foreach_copy_(targets, sources, non_blocking=True)
                event = torch.Event(device, blocking=True)  # a core that waits is a core that could read
                event.record(stream)
            except RuntimeError as error:
                with suppress(RuntimeError):
                    stream.synchronize()
                raise _refused(device, error) from error
            events.append((device, event))
        return lambda: _wait(events)

    def _stream(self, device: torch.device) -> torch.Stream:
        import torch

        if device not in self._streams:
            made = self._streams[device] = torch.Stream(device)
            # what the tensors, or the memory under them, are still used for comes first
            made.wait_stream(torch.accelerator.current_stream(device))
        return self._streams[device]


def _wait(events: Iterable[tuple[torch.device, torch.Event]]) -> None:
    for device, event in events:
        try:
            event.synchronize()
        except RuntimeError as error:
            raise _refused(device, error) from error


def _refused(device: torch.device, error: RuntimeError) -> CheckpointError:
    return CheckpointError(Diagnostic("device-failed", f"{device} failed: {_first_sentence(error)}"))


def _first_sentence(error: Exception) -> str:
    # torch goes on for a page where a backend is not there
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
