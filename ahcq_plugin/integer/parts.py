# SPDX-License-Identifier: Apache-2.0
"""The prompts of a call in parts that a CPU's cache holds: a decoder repeats the image's tokens for each of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

#: Bytes of the largest input of a part: two prompts at SAM's size, 4096 tokens of 256 channels in float32 each.
PART_BYTES = 2**23


def run_in_parts(model: nn.Module) -> None:
    """Lets the mask decoders of SAMs take a batch of prompts part by part, in place; hooks and keys stay.

    Prompts do not see each other there, so that masks are those of the whole batch, but for the last bits of what a
    decoder computes in floating point: PyTorch's sums differ with the size of a batch.
    """
    for module in model.modules():
        if hasattr(module, "transformer") and hasattr(module, "output_hypernetworks_mlps"):
            module.forward = partial(_in_parts, module)


def _in_parts(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``decoder``'s own forward, on a CPU part after part of the tensors that are batches; those of one item stay.

    Other devices take the batch at once, and compiled code does, and decoders whose prompts are no batch.
    """
    forward = partial(type(decoder).forward, decoder)
    given, structure = tree_flatten((args, kwargs))
    batches = [value for value in given if isinstance(value, Tensor) and value.ndim and len(value) > 1]
    sizes = {len(value) for value in batches}
    if len(sizes) != 1 or batches[0].device.type != "cpu" or torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    items = sizes.pop()
    count = max(1, PART_BYTES // max(value[0].nbytes for value in batches))
    ids, whole = {id(value) for value in batches}, list[Tensor]()
    for start in range(0, items, count):
        part = [value[start : start + count] if id(value) in ids else value for value in given]
        args, kwargs = tree_unflatten(part, structure)
        results, returned = tree_flatten(forward(*args, **kwargs))
        whole = whole or [result.new_empty(items, *result.shape[1:]) for result in results]
        for out, result in zip(whole, results, strict=True):
            out[start : start + count] = result
    return tree_unflatten(whole, returned)
