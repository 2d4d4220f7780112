# SPDX-License-Identifier: Apache-2.0
"""Seconds of one quantizer in a reconstruction step, forward and backward with learned scales and random drops, beside
the same as a chain of tensor operations (studies/reference/compositions.py), family by family.

    python tools/bench_quantizers.py [--shape 4096 3072] [--bits 4] [--device cuda]
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from ahcq_plugin.quantizers import ACTIVATION_FAMILIES, AvgMinMaxObserver
from ahcq_plugin.studies.reference.compositions import composed
from ahcq_plugin.studies.timing import KEEP_PROBABILITY
from ahcq_plugin.support.arguments import at_least_one, bit_width, usable_device
from ahcq_plugin.support.tool import run_tool


def data(family: str, shape: list[int], device: str) -> Tensor:
    """Values as the family meets them: after GELU, after softmax, or with a scale of its own for each channel."""
    x = torch.randn(1, *shape, device=device)
    if family in ("hluq", "power_of_two"):
        return nn.functional.gelu(x)
    if family in ("lnq", "agq"):
        return (3 * x).softmax(-1)
    return x * torch.randn(shape[-1], device=device).exp()


def seconds(quantizer: nn.Module, x: Tensor, upstream: Tensor) -> float:
    """Forward, and backward from the gradient ``upstream``: CPU seconds of this process, on a GPU wall time."""
    x = x.detach().requires_grad_()
    clock = time.perf_counter if x.is_cuda else time.process_time
    start = clock()
    torch.autograd.grad(quantizer(x), [x, *quantizer.learnable_scales()], upstream)
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=at_least_one, nargs=2, default=[4096, 3072], help="rows and channels")
    parser.add_argument("--bits", type=bit_width, default=4)
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument("--repeat", type=at_least_one, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{'family':14}{'ours s':>10}{'composed s':>12}{'composed/ours':>15}")
    for family, make in ACTIVATION_FAMILIES.items():
        x = data(family, options.shape, options.device)
        observer = {"observer": AvgMinMaxObserver} if family == "uniform" else {}
        quantizer = make(**observer, quant_max=2**options.bits - 1).to(options.device)
        quantizer.observe(x)
        quantizer.commit()
        if family == "cag":
            quantizer.finish()  # its groups
        quantizer.enable_fake_quant()
        quantizer.prob = KEEP_PROBABILITY
        chain = composed(quantizer)
        upstream = torch.randn_like(x)
        times = [tuple(seconds(q, x, upstream) for q in (quantizer, chain)) for _ in range(options.repeat + 1)]
        times = times[1:]  # the first warms up
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{family:14}{ours:10.3f}{theirs:12.3f}{theirs / ours:15.1f}", flush=True)


if __name__ == "__main__":
    run_tool(main)
