# SPDX-License-Identifier: Apache-2.0
"""Terms picked from products with whole tables are those of SAM's own function."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos

from ahcq_plugin.graph.relative_positions import add_relative_positions

SIDE = st.integers(1, 6)


@settings(max_examples=150)
@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE), st.tuples(*[st.integers(1, 14)] * 2), st.booleans())
def test_the_same_as_sam_in_float64(q_size, k_size, lengths, fitting):
    """Fewer or more keys than queries, tables that fit and tables that are interpolated."""
    if fitting:
        lengths = [2 * max(pair) - 1 for pair in zip(q_size, k_size, strict=True)]
    made = torch.Generator().manual_seed(0)
    queries, keys = q_size[0] * q_size[1], k_size[0] * k_size[1]
    shapes = ((2, queries, keys), (2, queries, 3), (lengths[0], 3), (lengths[1], 3))
    scores, q, high, wide = (torch.randn(*shape, generator=made, dtype=torch.float64) for shape in shapes)
    wanted = add_decomposed_rel_pos(scores, q, high, wide, q_size, k_size)
    got = add_relative_positions(scores, q @ high.T, q @ wide.T, q_size, k_size)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
