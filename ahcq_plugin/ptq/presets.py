# SPDX-License-Identifier: Apache-2.0
"""The recipes by name: what they set of a :class:`ahcq_plugin.ptq.recipe.Recipe`."""

from __future__ import annotations

from typing import Any

_QDROP = dict(granularity="unit", quantize_activations=True, learn_scales=True, keep_probability=0.5, input_mix=0.5)
# In SAM 2 the paper keeps LNQ to the image encoder; the globs name the rest of SAM 2 that has attention, and nothing of
# SAM.
_AHCQ = dict(cag=True, hluq=True, lnq=True, without={"lnq": ["memory_attention.*", "sam_mask_decoder.*"]})
PRESETS: dict[str, dict[str, Any]] = {
    # Round to nearest on the searched ranges; nothing is learned.
    "rtn": dict(granularity="none"),
    # Nagel et al. 2020: rounding learned layer by layer, activations in floating point meanwhile.
    "adaround": dict(granularity="layer"),
    # Li et al. 2021: rounding learned block by block, activations in floating point meanwhile.
    "brecq": dict(granularity="unit"),
    # Wei et al. 2022: block by block, a random half of the activations quantized; their scales are learned too.
    "qdrop": _QDROP,
    # Lv et al. 2024: QDrop, power-of-two-like attention weights, folded signs of bimodal keys.
    "ptq4sam": dict(**_QDROP, agq=True, big=True),
    # SAQ-SAM: PTQ4SAM's quantizers, ranges of queries and keys by what attention looks at, and units that learn by the
    # decoder's response to prompts; as many steps and as large ones as it publishes.
    "saqsam": dict(**_QDROP, agq=True, big=True, pcc=True, par=True, iterations=2000, scale_lr=2e-3),
    # AHCQ-SAM: QDrop and the paper's four components.
    "ahcq": dict(**_QDROP, **_AHCQ, acnr=True),
    # What helps beyond the paper and costs hardware nothing: weights fitted to quantized inputs instead of ACNR, heads
    # rotated and channels grouped behind them, middles of channels moved to 0 where biases take them up.
    "ahcq_plus": dict(
        **_QDROP, **_AHCQ, rotate=True, center=True, center_norms=True, refit=0.03, families={"attn_out": "cag"}
    ),
}
