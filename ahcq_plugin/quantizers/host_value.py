# SPDX-License-Identifier: Apache-2.0
"""A number that lives in a buffer and is asked for in every forward, without waiting for the buffer's device."""

from __future__ import annotations

from torch import Tensor


class HostValue:
    """The value of a one-element tensor as Python knows it; read from the device only when the tensor has changed.

    Reading a tensor on a GPU waits for all work before it. Whoever writes the tensor in place counts up its version,
    moving a module or assigning its state makes another tensor: both are seen here without a look at the value. Only a
    write through ``tensor.data`` goes unseen, as it does for autograd.

    A copy of the module starts without it, since the copied tensor counts its own versions.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor | None, int, float] = (None, -1, 0)

    def read(self, tensor: Tensor) -> float:
        """The number in ``tensor``, of one element."""
        if tensor.is_inference():  # made in inference mode: it counts no versions
            return tensor.item()
        known, version, value = self._known
        if tensor is not known or tensor._version != version:
            value = tensor.item()
            self.note(tensor, value)
        return value

    def note(self, tensor: Tensor, value: float) -> None:
        """``tensor`` holds ``value`` now: whoever has just written it need not read it back."""
        if not tensor.is_inference():
            self._known = (tensor, tensor._version, value)

    def __reduce__(self):
        return HostValue, ()
