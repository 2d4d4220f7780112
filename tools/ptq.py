# SPDX-License-Identifier: Apache-2.0
"""Quantize a SAM as a config says and report floating point beside quantized."""

import argparse
import os
import warnings

# Read once, when torch is loaded: threads that wait by spinning make a run several times slower on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ahcq_plugin.support.tool import importing, run_tool

with importing("mm"):
    from ahcq_plugin.mm.cfg_options import CfgOptions
    from ahcq_plugin.mm.launch import launch

# Deprecations in these packages, which users cannot act on.
warnings.filterwarnings("ignore", module=r"mmengine|mmcv|mmdet|torch\.functional")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="for example mm_configs/demo_sam_tiny_w4a4.py")
    parser.add_argument("--work-dir", help="where results go; default: work_dirs/<name of the config>")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=CfgOptions,
        help="override the config: recipe.iterations=500 sam.checkpoint=x.pth",
    )
    parser.add_argument("--recipe", help="instead of the config's: rtn, qdrop, ptq4sam, saqsam, ahcq, ... (README)")
    for bits, of in (("--w-bits", "weights"), ("--a-bits", "activations")):
        parser.add_argument(bits, type=int, help=f"of {of}, instead of the recipe's: 2 to 8")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in the work dir")
    parser.add_argument("--dry-run", action="store_true", help="random weights, two generated images, a few iterations")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--seed", type=int, help="of calibration and reconstruction")
    parser.add_argument("--launcher", default="none", help="who started several processes: pytorch, slurm or mpi")
    parser.add_argument("--trust-checkpoint", action="store_true", help="unpickle load_from: it can run any code")
    parser.add_argument(
        "--toolkit", help="who places the quantizers: native or mqbench (docs/mqbench.md); equal results"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(lambda: launch(**vars(parse_args())))
