# SPDX-License-Identifier: Apache-2.0
"""Seconds of one reconstruction step of SAM-B units (random weights, 1024 pixels), forward and backward: the unit in
floating point, quantized by us, and quantized by chains of tensor operations (studies/reference/compositions.py).

    python tools/bench_units.py [--boxes 8] [--recipes qdrop ptq4sam ahcq] [--device cuda]
"""

import argparse

import torch

from ahcq_plugin.ptq import Recipe, calibrate, prepare, set_quantization
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.studies.reference.compositions import composed
from ahcq_plugin.studies.timing import start_learning, step_seconds, unit_inputs
from ahcq_plugin.support.arguments import box_count, usable_device
from ahcq_plugin.support.batches import to_device
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.sam import box_forward, build_sam

UNITS = {
    "windowed block": "image_encoder.blocks.0",
    "global block": "image_encoder.blocks.2",
    "two-way layer": "mask_decoder.transformer.layers.1",
}
COLUMNS = ("FP s", "ours s", "composed s", "ours/FP", "composed/ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=box_count, default=8)
    parser.add_argument("--recipes", nargs="+", choices=Recipe.names(), default=["qdrop", "ptq4sam", "ahcq"])
    parser.add_argument("--device", type=usable_device, default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    corners = torch.rand(options.boxes, 2) * 500
    item = {"image": torch.randn(1, 3, 1024, 1024), "boxes": torch.cat([corners, corners + 300], 1)}
    item = to_device(item, options.device)
    print(f"{'unit':16}{'recipe':9}" + "".join(f"{title:>14}" for title in COLUMNS))
    for recipe in options.recipes:
        sam = build_sam("vit_b", checkpoint=False).to(options.device)
        prepare(sam, Recipe.from_config(recipe), list(UNITS.values()))
        calibrate(sam, [item], box_forward, progress=False)
        inputs = unit_inputs(sam, item, list(UNITS.values()), box_forward)
        for title, name in UNITS.items():
            unit, (args, kwargs) = sam.get_submodule(name), inputs[name]
            weights = [layer.weight for layer in weight_layers(unit).values()]
            times = [step_seconds(unit, args, kwargs, weights)]
            set_quantization(unit, True)
            learned = start_learning(unit)
            times.append(step_seconds(unit, args, kwargs, learned))
            chained = composed(unit)
            times.append(step_seconds(chained, args, kwargs, start_learning(chained)))
            ratios = [times[1] / times[0], times[2] / times[1]]
            print(f"{title:16}{recipe:9}" + "".join(f"{x:14.3f}" for x in times + ratios), flush=True)


if __name__ == "__main__":
    run_tool(main)
