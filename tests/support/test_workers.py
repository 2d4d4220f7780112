# SPDX-License-Identifier: Apache-2.0
"""Two processes on the CPU quantize as one does."""

from functools import cache

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
#: Those that take minutes are in `make test-slow`.
GROUPS = {"quick": ("one item", "no iterations", "three items"), "slow": ("ahcq", "layers", "resumed")}
GIVEN = [
    pytest.param(group, name, marks=pytest.mark.slow if group == "slow" else ())
    for group, names in GROUPS.items()
    for name in names
]


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


def _process(rank, folder, group):
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
    found = {
        name: _resume(workers, folder) if name == "resumed" else _quantize(name, workers) for name in GROUPS[group]
    }
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


@cache
def both(group, folder):
    """What each of two processes got, of a group of recipes."""
    own = folder / group
    own.mkdir()
    multiprocessing.spawn(_process, (own, group), nprocs=2)
    return [torch.load(own / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@cache
def alone(name):
    return _quantize(name, ALONE)


def _differing(one, other):
    assert one["state"].keys() == other["state"].keys()
    return [key for key, value in one["state"].items() if not torch.equal(value, other["state"][key])]


@pytest.mark.parametrize(("group", "name"), GIVEN)
def test_both_processes_hold_the_same_model(folder, group, name):
    first, second = both(group, folder)
    assert _differing(first[name], second[name]) == []


@pytest.mark.parametrize(("group", "name"), [given for given in GIVEN if given.values[1] != "three items"])
def test_two_processes_give_the_bits_of_one(folder, group, name):
    found, wanted = both(group, folder)[0][name], alone("ahcq" if name == "resumed" else name)
    assert _differing(found, wanted) == []
    assert found["errors"] == wanted["errors"] and found["conditions"] == wanted["conditions"]


def test_more_items_than_processes_differ_by_the_order_of_additions_only(folder):
    found, wanted = both("quick", folder)[0]["three items"]["state"], alone("three items")["state"]
    scales = [key for key in wanted if key.endswith(".scale")]
    assert scales
    for key in scales:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-7)


def test_the_first_process_alone_writes(folder):
    both("quick", folder)
    saved = torch.load(folder / "quick" / "own0" / "quantized.pth", weights_only=True)
    assert saved["extra"]["notes"] == {"images": [3, 1]}
    assert not (folder / "quick" / "own1").exists()


def test_one_process_shares_nothing():
    assert Workers.running() == ALONE and list(ALONE.share(3)) == [0, 1, 2]
    assert ALONE.in_order([5, 6], 2) == [5, 6] and ALONE.first("x") == "x"
