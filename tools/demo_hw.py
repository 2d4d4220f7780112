# SPDX-License-Identifier: Apache-2.0
"""One accelerator for a quantized SAM: spec, program, C++ simulation, RTL, synthesis, cycle model, report."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ahcq_plugin import load_quantized
from ahcq_plugin.export import export_spec
from ahcq_plugin.hls.engine import counts, report, sizes, toggles
from ahcq_plugin.hls.engine.compare_rtl import compare_rtl
from ahcq_plugin.hls.engine.config import PAPER
from ahcq_plugin.hls.engine.rtl import SMALLEST, engine_rtl, simulation
from ahcq_plugin.hls.engine.vitis import write_vitis
from ahcq_plugin.hls.rtl import cache_folder
from ahcq_plugin.support.arguments import at_least_one, writable_folder
from ahcq_plugin.support.files import write_text
from ahcq_plugin.support.tool import announcer, run_tool
from ahcq_plugin.zoo.items import scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward

UNITS = ("image_encoder.blocks.0", "mask_decoder.transformer.layers.0")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="quantized.pth of `make demo`")
    parser.add_argument("-o", "--out", type=writable_folder, required=True, help="folder of spec, RTL and report")
    parser.add_argument("--sizes", action="store_true", help="also count all --cells, other kinds, INT8, FP32")
    parser.add_argument("--cells", type=at_least_one, nargs="+", default=[2, 4, 8, 16], help="of the cycle model")
    return parser.parse_args()


def main() -> int:
    args, say = parse_args(), announcer()
    model = load_quantized(args.checkpoint)
    spec = export_spec(model, args.out / "spec")
    say(f"exported {sum(1 for _ in spec.matmuls())} matmuls to {args.out / 'spec'}")

    rtl = engine_rtl(SMALLEST)
    for name, text in rtl.files.items():
        write_text(text, args.out / "rtl" / name)
    vitis = write_vitis(args.out / "vitis", PAPER)
    say(f"{len(rtl.stages)} processes scheduled at II = 1; SystemVerilog: {args.out / 'rtl'}, for Vitis HLS: {vitis}")
    with ThreadPoolExecutor(1) as beside:  # yosys, while Verilator compiles and runs
        counting = beside.submit(counts.counted, PAPER, cache_folder())
        toggling = beside.submit(toggles.packaged_rows, cache_folder(), counts.LIMIT)
        simulation(SMALLEST)
        say("compiled by Verilator")
        item = next(iter(scene_items(1, seed=7)))
        rows = compare_rtl(model, spec, make_batch(model, item.image, item.boxes[:1]), box_forward, UNITS)
        failed = any(row["different_cpp"] or row["different_rtl"] for row in rows)
        say(f"{len(rows)} matmuls in C++ and as RTL in {sum(row['cycles'] for row in rows):,} cycles: "
            f"{'DIFFERENT' if failed else 'every float is the golden model’s'}")  # fmt: skip
        processes, elements = counting.result()
        changes = toggling.result()
    missing = [f"{row['process']}: {row['reason']}" for row in processes if row["reason"]]
    counted = sum(row["lut"] * row["instances"] for row in processes[:-1] if row["lut"] is not None)
    say(f"yosys, {PAPER.cells} cells: {counted:,} LUT; {'; '.join(missing) or 'all counted'}")
    figures = dict(
        config=SMALLEST.cpp,
        counted=PAPER.cpp,
        matmuls=rows,
        processes=processes,
        elements=elements,
        toggles=changes,
        **sizes.size_figures(processes[:-1], args.cells, args.sizes, cache_folder(), say),
        **report.model_figures(args.cells),
    )
    say("report: " + ", ".join(map(str, report.write_report(args.out, figures))))
    return int(failed)


if __name__ == "__main__":
    run_tool(main)
