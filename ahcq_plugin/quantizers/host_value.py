# SPDX-License-Identifier: Apache-2.0
"""A number that lives in a buffer and is asked for in every forward, without waiting for the buffer's device."""

from __future__ import annotations

import torch
from torch import Tensor


class HostValue:
    """The value of a one-element tensor as Python knows it; read from the device only when the tensor has changed.

    Reading a tensor on a GPU waits for all work before it. Whoever writes the tensor in place counts up its version,
    moving a module or assigning its state makes another tensor: both are seen here without a look at the value. Only a
    write through ``tensor.data`` goes unseen, as it does for autograd.

    A copy of the module reads it anew, since the copied tensor counts its own versions. While ``torch.compile`` or
    ``torch.export`` traces, no tensor can be looked at: then it is the value that was known last.
    """

    def __init__(self, value: float | None = 0) -> None:
        self._known: tuple[Tensor | None, int, float | None] = (None, -1, value)

    def read(self, tensor: Tensor) -> float:
        """The number in ``tensor``, of one element."""
        if torch.compiler.is_compiling():
            if self._known[2] is None:
                raise RuntimeError("a state was loaded since: call the model once before it is compiled or exported")
            return self._known[2]
        if tensor.is_inference():  # made in inference mode: it counts no versions
            value = tensor.item()
            self.note(tensor, value)
            return value
        known, version, value = self._known
        if tensor is not known or tensor._version != version:
            value = tensor.item()
            self.note(tensor, value)
        return value

    def forget(self) -> None:
        """The tensor was loaded: the next read looks at it."""
        self._known = (None, -1, None)

    def note(self, tensor: Tensor, value: float) -> None:
        """``tensor`` holds ``value`` now: whoever has just written it need not read it back."""
        self._known = (None, -1, value) if tensor.is_inference() else (tensor, tensor._version, value)

    def __reduce__(self):
        return HostValue, (self._known[2],)
