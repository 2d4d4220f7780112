# SPDX-License-Identifier: Apache-2.0
"""What has to be out of the way while a module is traced, and is put back after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.fx import _symbolic_trace


@contextmanager
def unwrapped(kept: Sequence[str]) -> Iterator[None]:
    """Functions that a library declared whole with ``fx.wrap`` are traced into, but those named in ``kept``.

    torchvision hides all of Swin's attention in one such function: that sizes cannot be asked for was the reason.
    """
    table = _symbolic_trace._wrapped_fns_to_patch
    removed = {key: space for key, space in table.items() if key[1] not in (*kept, "math_sqrt")}
    for key in removed:
        del table[key]
    try:
        yield
    finally:
        table.update(removed)


@contextmanager
def emptied_caches(root: nn.Module | Callable[..., Any]) -> Iterator[None]:
    """Dicts of tensors with "cache" in their name, which a model fills from its parameters as it runs: empty inside, so
    that the parameters are traced; as they were after, so that nothing that was traced stays in them."""
    modules = root.modules() if isinstance(root, nn.Module) else ()
    caches = [value for module in modules for name, value in vars(module).items() if _is_cache(name, value)]
    contents = [dict(cache) for cache in caches]
    for cache in caches:
        cache.clear()
    try:
        yield
    finally:
        for cache, content in zip(caches, contents, strict=True):
            cache.clear()
            cache.update(content)


def _is_cache(name: str, value: Any) -> bool:
    return "cache" in name and type(value) is dict and all(isinstance(item, Tensor) for item in value.values())
