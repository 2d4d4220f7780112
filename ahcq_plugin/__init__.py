# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization of Segment Anything models to 4-8 bit.

``quantize`` does everything in one call, ``save_quantized`` writes its result at the size of its bits,
``load_quantized`` reads it; ``ahcq_plugin.ptq`` has the stages, ``ahcq_plugin.mm`` the MMDetection side.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["QuantReport", "__version__", "load_quantized", "quantize", "save_quantized"]


def __getattr__(name: str) -> Any:
    # On first use, so that `ahcq_plugin.functional` alone needs nothing but torch.
    if name in ("QuantReport", "load_quantized", "quantize", "save_quantized"):
        from ahcq_plugin import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
