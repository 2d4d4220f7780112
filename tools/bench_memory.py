# SPDX-License-Identifier: Apache-2.0
"""Memory of a reconstruction step of SAM-B's decoder units at full size (random weights, recipe ahcq) and of an image's
caches, by number of boxes; ~: on the line through two counts. A CPU's peak may miss pages that the system took."""

import argparse
import ctypes
from functools import partial

import torch
from torch.utils import _pytree as pytree

from ahcq_plugin.ptq import Recipe, calibrate, prepare, set_quantization
from ahcq_plugin.ptq.store import Store
from ahcq_plugin.studies.timing import start_learning, unit_inputs
from ahcq_plugin.support.arguments import box_count, usable_device
from ahcq_plugin.support.batches import to_device
from ahcq_plugin.support.stopwatch import Stopwatch
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.sam import build_sam

MIB, EXTRAPOLATED = 2**20, (100, 300)
DECODER = "mask_decoder.transformer"
UNITS = [f"{DECODER}.layers.0", f"{DECODER}.layers.1", f"{DECODER}.final_attn_token_to_image"]


def decode(sam, item):
    sparse, dense = sam.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
    return sam.mask_decoder(item["embedding"], sam.prompt_encoder.get_dense_pe(), sparse, dense, False)


def note(kept: dict, tensor: torch.Tensor) -> torch.Tensor:
    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


def measure(sam, boxes: int, device: str) -> dict[str, tuple[float, float, float]]:
    """Unit -> MiB (kept for the backward pass, peak of a step, an image's inputs and output in the caches)."""
    corners = torch.rand(boxes, 2) * 500
    item = {"embedding": torch.randn(1, 256, 64, 64), "boxes": torch.cat([corners, corners + 300], 1)}
    inputs, measured = unit_inputs(sam, to_device(item, device), UNITS, decode), {}
    for name in UNITS:
        unit, (args, kwargs), stages, store = sam.get_submodule(name), inputs[name], Stopwatch(), Store("cpu")
        store["quantized"], store["floating"] = (args, kwargs), (args, kwargs)
        with torch.no_grad():
            store["target"] = unit(*args, **kwargs)
        set_quantization(unit, True)
        learned, kept = start_learning(unit), {}
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what was freed before does not hide what the step takes
        with stages("before", device):
            pass
        with stages("step", device), torch.autograd.graph.saved_tensors_hooks(partial(note, kept), lambda t: t):
            loss = sum(leaf.square().mean() for leaf in pytree.tree_leaves(unit(*args, **kwargs)))
            torch.autograd.grad(loss, learned, allow_unused=True)
        peak = stages.records["step"]["peak_bytes"] - stages.records["before"]["peak_bytes"]
        measured[name] = sum(kept.values()) / MIB, peak / MIB, store.nbytes() / MIB
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=box_count, nargs=2, default=[8, 16])
    parser.add_argument("--device", type=usable_device, default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    sam = build_sam("vit_b", checkpoint=False).to(options.device)
    prepare(sam, Recipe.from_config("ahcq"), UNITS)
    small = {"embedding": torch.randn(1, 256, 64, 64), "boxes": torch.tensor([[100.0, 100.0, 500.0, 500.0]])}
    calibrate(sam, [to_device(small, options.device)], decode, progress=False)
    low, high = min(options.boxes), max(*options.boxes, min(options.boxes) + 1)  # two points of the line
    one, two = measure(sam, low, options.device), measure(sam, high, options.device)
    print("| unit | boxes | kept for backward, MiB | peak, MiB | cache of an image, MiB |\n|---|---|---|---|---|")
    for name in UNITS:
        for boxes in (low, high, *EXTRAPOLATED):
            line = [b + (b - a) / (high - low) * (boxes - high) for a, b in zip(one[name], two[name], strict=True)]
            mark = "~" if boxes > high else ""
            print(f"| {name.removeprefix(DECODER)[1:]} | {boxes} |", *(f"{mark}{cell:,.0f} |" for cell in line))


if __name__ == "__main__":
    run_tool(main)
