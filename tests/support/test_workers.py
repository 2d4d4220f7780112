# SPDX-License-Identifier: Apache-2.0
"""Two processes on the CPU quantize as one does."""

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from ahcq_plugin import quantize
from ahcq_plugin.support.workers import ALONE, Workers
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import make_tiny_items, make_tiny_sam

# A step of two items makes both processes work; with one, the second only waits.
RECIPES = {
    "ahcq": dict(name="ahcq", iterations=5, batch_size=2, acnr_steps=20),
    "one item": dict(name="qdrop", iterations=3),
    "layers": dict(name="adaround", iterations=2, batch_size=2),
    "no iterations": dict(name="rtn"),
    "three items": dict(name="qdrop", iterations=3, batch_size=3),
}


def _quantize(name, workers, folder=None, **options):
    model, report = quantize(
        make_tiny_sam(),
        make_tiny_items(),
        RECIPES[name],
        forward=box_forward,
        progress=False,
        workers=workers,
        work_dir=folder,
        **options,
    )
    errors = [(unit.name, unit.error_before, unit.error_after) for unit in report.units]
    return {"state": model.state_dict(), "errors": errors, "conditions": [c.after for c in report.conditions]}


def _process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    workers = Workers.running()
    assert workers == Workers(rank, 2)
    assert workers.in_order([f"{rank}{i}" for i in workers.share(5)], 5) == ["00", "11", "02", "13", "04"]
    assert workers.first(rank) == 0
    summed, copied = torch.tensor([1.0 + rank, 2.0]), torch.full((2, 2), float(rank))
    workers.add([summed])
    workers.copy([copied.T])
    assert summed.tolist() == [3, 4] and not copied.any()
    found = {name: _quantize(name, workers) for name in RECIPES}
    found["resumed"] = _resume(workers, folder)
    _quantize("no iterations", workers, folder / f"own{rank}", notes={"images": [3, 1]})
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _resume(workers, folder):
    _quantize("ahcq", workers, folder / "run")
    if workers.is_first:
        for name in ("003.pt", "004.pt", "005.pt", "006.pt"):
            (folder / "run" / "units" / name).unlink()
    workers.wait()
    return _quantize("ahcq", workers, folder / "run", resume=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def both(folder):
    """What each of two processes got."""
    multiprocessing.spawn(_process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    return {name: _quantize(name, ALONE) for name in RECIPES}


def _differing(one, other):
    assert one["state"].keys() == other["state"].keys()
    return [key for key, value in one["state"].items() if not torch.equal(value, other["state"][key])]


@pytest.mark.parametrize("name", [*RECIPES, "resumed"])
def test_both_processes_hold_the_same_model(both, name):
    assert _differing(both[0][name], both[1][name]) == []


@pytest.mark.parametrize("name", [*list(RECIPES)[:-1], "resumed"])
def test_two_processes_give_the_bits_of_one(both, alone, name):
    wanted = alone["ahcq" if name == "resumed" else name]
    assert _differing(both[0][name], wanted) == []
    assert both[0][name]["errors"] == wanted["errors"] and both[0][name]["conditions"] == wanted["conditions"]


def test_more_items_than_processes_differ_by_the_order_of_additions_only(both, alone):
    found, wanted = both[0]["three items"]["state"], alone["three items"]["state"]
    scales = [key for key in wanted if key.endswith(".scale")]
    assert scales
    for key in scales:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-7)


def test_the_first_process_alone_writes(both, folder):
    saved = torch.load(folder / "own0" / "quantized.pth", weights_only=True)
    assert saved["extra"]["notes"] == {"images": [3, 1]}
    assert not (folder / "own1").exists()


def test_one_process_shares_nothing():
    assert Workers.running() == ALONE and list(ALONE.share(3)) == [0, 1, 2]
    assert ALONE.in_order([5, 6], 2) == [5, 6] and ALONE.first("x") == "x"
