# SPDX-License-Identifier: Apache-2.0
"""What backends make of a module's buffers, kept until the buffers change."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import nn


class Forms(nn.Module):
    """A module whose buffers are also kept as backends need them; such forms are no state and are not copied."""

    keep = True

    def __init__(self) -> None:
        super().__init__()
        self._forms: dict[Hashable, Any] = {}

    def form(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made at the first call; at every call where ``keep`` is False."""
        if not self.keep:
            return make()
        if name not in self._forms:
            self._forms[name] = make()
        return self._forms[name]

    def forget(self) -> None:
        """Drop all forms."""
        self._forms.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": {}}
