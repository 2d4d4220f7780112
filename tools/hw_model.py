# SPDX-License-Identifier: Apache-2.0
"""The accelerator on whole models by its cycle model: frames a second, utilisation, what limits each layer."""

import argparse

from ahcq_plugin.hls.engine.config import NIBBLE, EngineConfig
from ahcq_plugin.hls.engine.cycles import DDR
from ahcq_plugin.hls.engine.performance import by_layer, sam2_launches, sam_launches, softmax_total, total
from ahcq_plugin.support.arguments import at_least_one, bit_width, box_count, positive, writable_file
from ahcq_plugin.support.files import write_json
from ahcq_plugin.support.tool import run_tool

BOXES = (1, 5, 20, 100)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_b", "vit_l", "vit_h", "sam2.1_t"])
    parser.add_argument("--boxes", type=box_count, nargs="+", default=BOXES, help="of SAM's decoder")
    parser.add_argument(
        "--cells", type=at_least_one, nargs="+", default=[2, 4, 8, 16], help="of 64 processing elements x 8"
    )
    parser.add_argument("--bits", type=bit_width, default=4)
    parser.add_argument("--bandwidth", type=positive, default=12, help="of the DDR, GB/s")
    parser.add_argument("--no-shift-lanes", action="store_true", help="of engines whose HLUQ takes more passes")
    parser.add_argument("--layers", action="store_true", help="also every kind of layer, on the first number of cells")
    parser.add_argument("--json", type=writable_file, help="also write the figures to this file")
    return parser.parse_args()


def workloads(args: argparse.Namespace) -> dict[str, list]:
    """What runs -> its launches."""
    found = {}
    for name in args.models:
        sam2 = name.startswith("sam2")
        parts = sam2_launches(name, args.bits) if sam2 else sam_launches(name, args.boxes, args.bits)
        found.update({f"{name} {part}": launches for part, launches in parts.items()})
    return found


def main() -> int:
    args = parse_args()
    ddr, rows = DDR(args.bandwidth * 1e9), []
    print("| what | GMAC | cells | digit | utilisation | without A.V | GMAC/s | a second | MB of DDR | softmax |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for what, launches in workloads(args).items():
        softmax = softmax_total(launches, ddr, positions="encoder" in what and not what.startswith("sam2"))
        for cells in args.cells:
            for digit in (NIBBLE, 17):
                config = EngineConfig(cells, digit, shift_lanes=not args.no_shift_lanes)
                whole = total(launches, config, ddr)
                others = total([launch for launch in launches if launch.shape.kind != "av"], config, ddr)
                rows.append(dict(what=what, cells=cells, digit=digit, macs=whole.macs, cycles=whole.cycles))
                rows[-1].update(utilisation=whole.utilisation, without_av=others.utilisation, limits=whole.limits)
                rows[-1].update(per_second=whole.per_second, ddr_bytes=whole.ddr_bytes, softmax=softmax)
                print(
                    f"| {what} | {whole.macs / 1e9:.2f} | {cells} | {digit} | {whole.utilisation:.3f} "
                    f"| {others.utilisation:.3f} | {whole.gmacs:.1f} | {whole.per_second:.2f} "
                    f"| {whole.ddr_bytes / 1e6:.0f} | {f'+{softmax / whole.cycles:.1%}' if softmax else 'host'} |"
                )
        if args.layers:
            config = EngineConfig(args.cells[0], shift_lanes=not args.no_shift_lanes)
            print("\n| left | M x K x N, products | count | share | utilisation | GMAC/s | roof | limit |")
            print("|---|---|---|---|---|---|---|---|")
            for row in by_layer(launches, config, ddr):
                shape, used = row.launch.shape, row.one.utilisation(config)
                limit = max(row.one.limits, key=row.one.limits.__getitem__)
                size = f"{shape.m} x {shape.k} x {shape.n}, {shape.batch}"
                speed = f"{used * config.lanes * 0.3:.0f} | {row.roof(config, ddr):.0f} | {limit}"
                print(
                    f"| {shape.kind} {shape.family} | {size} | {row.count} | {row.share:.1%} | {used:.3f} | {speed} |"
                )
            print()
    if args.json:
        write_json(rows, args.json)
    return 0


if __name__ == "__main__":
    run_tool(main)
