# SPDX-License-Identifier: Apache-2.0
"""From a quantized small SAM to verified hardware: export, golden model, HLS C++, C simulation, cocotb."""

import argparse
from pathlib import Path

from ahcq_plugin import load_quantized
from ahcq_plugin.export import export_spec
from ahcq_plugin.hls import compile_generated, cosim, flow, generate, select
from ahcq_plugin.hls.check import check_on_model
from ahcq_plugin.hls.vectors import make_vectors
from ahcq_plugin.support.arguments import at_least_one, writable_folder
from ahcq_plugin.support.tool import announcer, run_tool
from ahcq_plugin.zoo.items import scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward

UNITS = ("image_encoder.blocks.0", "mask_decoder.transformer.layers.0")
SIMULATED = ("attn_qkv", "matmul", "matmul_1", "mlp_lin2")  # of the first: CAG, Q.K^T, LNQ, HLUQ


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="quantized.pth of `make demo`")
    parser.add_argument(
        "-o", "--out", type=writable_folder, required=True, help="folder of the spec and of the generated C++"
    )
    parser.add_argument("--images", type=at_least_one, default=2, help="generated scenes whose codes are compared")
    return parser.parse_args()


def main() -> int:
    args, say = parse_args(), announcer()
    model = load_quantized(args.checkpoint)
    spec = export_spec(model, args.out / "spec")
    say(f"exported {sum(1 for _ in spec.matmuls())} matmuls to {args.out / 'spec'}")

    layers = select(spec, UNITS)
    folder = generate(layers, args.out / "cpp")
    say(f"generated HLS C++ of {len(layers)} of them in {folder}; vitis_hls -f run_hls.tcl runs in each folder there")
    compiled = compile_generated(layers, folder)
    items = [item for item, _ in zip(scene_items(args.images, seed=7), range(args.images), strict=False)]
    batches = [make_batch(model, item.image, item.boxes[:4]) for item in items]
    rows = check_on_model(model, compiled, batches, box_forward)
    say(f"C++ beside the golden model, on the codes of {len(batches)} images:")
    for layer in layers:
        row, m = rows[layer.top], layer.matmul
        name = f"{layer.unit}.{m.layer or m.name}"
        print(
            f"  {name:<69} {m.kind:<6} {m.left.family:<8} {m.k:>5} x {m.n:<5}"
            f"{row.outputs:>9} floats, {row.accumulators:>7} accumulators, {row.different} differ"
        )
    failed = any(row.different for row in rows.values())

    for layer in (layer for layer in layers if layer.unit == UNITS[0] and layer.matmul.name in SIMULATED):
        passed, _ = flow.run_testbench(layer, folder)
        result = cosim.simulate(layer, folder, [make_vectors(layer.matmul, 2, 2, seed=1)])
        failed = failed or not passed or bool(result.failed)
        say(
            f"{layer.top}: test bench {'equal' if passed else 'DIFFERS'}; "
            f"cocotb {len(result.passed)} passed, {len(result.failed)} failed"
        )
    say("FAILED" if failed else "everything is equal to the golden model, bit for bit")
    return int(failed)


if __name__ == "__main__":
    run_tool(main)
