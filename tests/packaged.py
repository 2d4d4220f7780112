# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the packaged SAM quantized to 4 bits, its spec, and items to run it on."""

from __future__ import annotations

import fcntl
import os

import pytest

from ahcq_plugin import load_quantized, quantize
from ahcq_plugin.export import make_spec
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward, build_sam

BOXES = 4


def batches(sam, items, count: int):
    """The first ``count`` items as batches of at most ``BOXES`` boxes."""
    made = []
    for item in items:
        made.append(make_batch(sam, item.image, item.boxes[:BOXES]))
        if len(made) == count:
            break
    return made


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    """sam_tiny by the recipe ahcq with 4 bits, two steps a unit; made once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "packaged"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "quantized.pth").exists():
            sam, settings = build_sam("sam_tiny"), {"name": "ahcq", "iterations": 2}
            items = batches(sam, scene_items(8), 1)
            quantize(sam, items, settings, 4, 4, forward=box_forward, progress=False, work_dir=folder)
    return load_quantized(folder / "quantized.pth")


@pytest.fixture(scope="session")
def spec(quantized):
    return make_spec(quantized)


@pytest.fixture(scope="session")
def scenes(quantized):
    """Items of two generated scenes that calibration has not seen."""
    return batches(quantized, scene_items(8, seed=7), 2)


@pytest.fixture(scope="session")
def real_images(quantized, shared_data):
    """Items of eight photographs."""
    return batches(quantized, coco_items(shared_data / "coco_val"), 8)
