# SPDX-License-Identifier: Apache-2.0
"""Several processes that quantize one model together, each with a copy of it, and what they exchange for that.

All processes call the same functions in the same order with the same arguments. Work on items is shared out, results
are exchanged and taken in by all in the order of the items, so that sums come out the same whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ahcq_plugin.support.batches import to_device


@dataclass(frozen=True)
class Workers:
    """The processes of ``torch.distributed``'s default group; one alone needs no group.

    Args:
        rank: of this process, 0 .. size - 1; 0 writes files and shows progress.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def running() -> Workers:
        """Those that a launcher started, or this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return Workers(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` items are this process's."""
        return range(self.rank, count, self.size)

    def in_order(self, mine: Sequence[Any], count: int) -> list[Any]:
        """Results of all ``count`` items, in their order, from every process's results of its share.

        Tensors, nested or not, arrive on the CPU when there is more than one process.
        """
        if self.size == 1:
            return list(mine)
        shares: list[Any] = [None] * self.size
        dist.all_gather_object(shares, to_device(list(mine), "cpu"))
        return [shares[item % self.size][item // self.size] for item in range(count)]

    def first(self, value: Any) -> Any:
        """The first process's ``value`` (plain, to be pickled)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the processes, in place; floating point of one device."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Make every tensor the first process's, in place: devices may differ in last bits."""
        if self.size == 1:
            return
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0)
            tensor.detach().copy_(whole)

    def wait(self) -> None:
        """Until all are here: what the first wrote is then there for the others."""
        if self.size > 1:
            dist.barrier()


ALONE = Workers()
