# SPDX-License-Identifier: Apache-2.0
"""Generate HLS C++ from a layer spec; simulate it, and synthesise it where Vitis HLS is installed."""

import argparse
from pathlib import Path

from ahcq_plugin.export import load_spec
from ahcq_plugin.hls import HLSOptions, cosim, flow, generate, select, synth
from ahcq_plugin.hls.rtl import ScheduleOptions
from ahcq_plugin.hls.rtl import layers as rtl_layers
from ahcq_plugin.hls.vectors import make_vectors
from ahcq_plugin.support.arguments import at_least_one, writable_folder
from ahcq_plugin.support.tool import run_tool


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path, help="folder that tools/export.py wrote")
    parser.add_argument("-o", "--out", type=writable_folder, required=True, help="folder of the generated C++")
    parser.add_argument("--layers", nargs="+", default=["*"], help="units or unit.matmul, with * and ?; default: all")
    parser.add_argument("--pe", type=int, default=128, help="processing elements (outputs at a time)")
    parser.add_argument("--simd", type=int, default=8, help="inputs of a processing element per cycle")
    parser.add_argument("--out-floats", type=int, default=4, help="float32 outputs a beat")
    parser.add_argument("--part", default=HLSOptions.part)
    parser.add_argument("--clock-mhz", type=int, default=HLSOptions.clock_mhz)
    parser.add_argument("--csim", action="store_true", help="compile and run every test bench with g++")
    parser.add_argument("--cosim", action="store_true", help="run every top behind its AXI ports (cocotb, Verilator)")
    parser.add_argument("--rtl", action="store_true", help="kernels of constant weights to RTL with open tools, run it")
    parser.add_argument(
        "--stage-ps",
        type=at_least_one,
        default=ScheduleOptions.clock_ps,
        help="with --rtl: length of a stage; wide accumulators want more",
    )
    parser.add_argument("--synth", choices=synth.STEPS[1:], nargs="?", const="synth", help="run Vitis HLS that far")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    failed, results = False, {}
    if args.synth:
        synth.find_vitis()
    options = HLSOptions(args.pe, args.simd, args.out_floats, args.part, args.clock_mhz)
    layers = select(load_spec(args.spec), args.layers, options)
    generate(layers, args.out)
    print(f"written: {len(layers)} layers in {args.out}")
    for layer in layers:
        measured = results.setdefault(layer.top, {})
        if args.csim:
            measured["csim"], said = flow.run_testbench(layer, args.out)
            print(f"csim   {layer.top}: {'equal' if measured['csim'] else said}")
        if args.cosim:
            result = cosim.simulate(layer, args.out, [make_vectors(layer.matmul, 2, 2, seed=1)])
            measured["cosim"] = not result.failed
            print(f"cosim  {layer.top}: {result.failed or f'{len(result.passed)} tests passed'}")
        if args.rtl and not layer.is_product:
            measured["rtl"] = rtl_layers.check(layer, args.out, options=ScheduleOptions(args.stage_ps))
            print(f"rtl    {layer.top}: {measured['rtl']}")
        if args.synth:
            report = synth.synthesize(args.out / layer.top, layer.top, args.synth)
            measured["synthesis"] = flow.synthesis_entry(report)
            print(f"synth  {layer.top}: {report.used}, II {report.interval_cycles}, {report.estimated_ns} ns")
        failed = failed or not all(measured.get(step, True) for step in ("csim", "cosim"))
        failed = failed or measured.get("rtl", {}).get("different", 0) > 0
    print(f"report: {flow.write_report(args.out, results)}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_tool(main)
