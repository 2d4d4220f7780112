# SPDX-License-Identifier: Apache-2.0
"""Measure a quantized SAM on a config's test data, fake-quantized or on integers."""

import argparse
import os
import warnings

# Read once, when torch is loaded: threads that wait by spinning make a run several times slower on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ahcq_plugin.support.tool import importing, run_tool

with importing("mm"):
    from ahcq_plugin.mm.cfg_options import CfgOptions
    from ahcq_plugin.mm.evaluate_checkpoint import evaluate_checkpoint
    from ahcq_plugin.support.arguments import usable_device, writable_folder

# Deprecations in these packages, which users cannot act on.
warnings.filterwarnings("ignore", module=r"mmengine|mmcv|mmdet|torch\.functional")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="for example mm_configs/demo_sam_tiny_w4a4.py")
    parser.add_argument("checkpoint", help="what tools/ptq.py wrote: work_dirs/<name>/quantized.pth")
    parser.add_argument("--integer", action="store_true", help="compute on integers (docs/integer.md)")
    parser.add_argument(
        "--work-dir", type=writable_folder, help="where the figures go; default: the folder of the checkpoint"
    )
    parser.add_argument("--cfg-options", nargs="+", action=CfgOptions, help="override the config")
    parser.add_argument("--device", type=usable_device, help="cpu, cuda or cuda:N; default: cuda where there is one")
    return parser.parse_args()


def main() -> int:
    metrics = evaluate_checkpoint(**vars(parse_args()))
    for name, value in metrics.items():
        print(f"{name:12} {value:.4f}")
    return 0


if __name__ == "__main__":
    run_tool(main)
