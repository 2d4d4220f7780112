# SPDX-License-Identifier: Apache-2.0
"""The page of what is quantized, made without computing anything."""

import pytest

from ahcq_plugin.ptq.coverage import INTEGERS, KINDS
from ahcq_plugin.studies.coverage_table import coverage_page, sam_coverage


def test_sam_b_has_its_known_products_and_nothing_is_missing():
    coverage = sam_coverage("vit_b")
    for of in ("weights", "macs"):
        assert sum(coverage.share(kind, of) for kind in KINDS) == pytest.approx(1)
    macs = {part.name: part.macs for part in coverage.parts}
    tokens, width = 64 * 64, 768
    assert macs["image_encoder.patch_embed"] == tokens * 3 * 16 * 16 * width
    # 12 blocks; 8 in 25 windows of 14 x 14, padded to 70 x 70 tokens, 4 over all tokens; q, k, v and the projection
    linear = (8 * 70 * 70 + 4 * tokens) * 4 * width**2 + 12 * tokens * 8 * width**2
    attention = 2 * width * (8 * 25 * 196**2 + 4 * tokens**2)
    neck = tokens * (width * 256 + 256 * 256 * 9)
    in_units = sum(part.macs for part in coverage.parts if part.kind == INTEGERS)
    decoder = in_units - linear - attention - neck
    assert 0 < decoder < 0.05 * in_units
    page = coverage_page([("vit_b", coverage)])
    assert (
        f"| `vit_b` | {coverage.share(INTEGERS):.2%} |" in page and "image_encoder.patch_embed (outside units)" in page
    )
