# SPDX-License-Identifier: Apache-2.0
"""Models given as mappings: wrong sizes are named."""

import math

import pytest

from ahcq_plugin.zoo.checkpoints import packaged_config
from ahcq_plugin.zoo.sam import build_sam
from ahcq_plugin.zoo.sam2 import build_sam2
from ahcq_plugin.zoo.sizes import check_sizes

BUILDERS = {"sam_tiny": build_sam, "sam2_tiny": build_sam2}
KEYS = [(name, key) for name in BUILDERS for key in packaged_config(name)]


@pytest.mark.parametrize(("name", "key"), KEYS)
@pytest.mark.parametrize("value", [-1, math.nan, "x"])
def test_a_wrong_size_is_named(name, key, value):
    with pytest.raises(ValueError, match=f"model config: `{key}` cannot be"):
        BUILDERS[name](packaged_config(name) | {key: value}, False)


def test_sizes_that_do_not_go_together():
    with pytest.raises(ValueError, match="model config: these sizes build no SAM"):
        build_sam(packaged_config() | {"transformer_heads": 7}, False)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="`embed_dim` must be a multiple of `num_heads`, got 192 and 5"):
        build_sam(packaged_config() | {"num_heads": 5}, False)


def test_numbers_that_are_allowed():
    config = packaged_config()
    for key, value in (("window_size", 0), ("mlp_ratio", 1.5), ("pixel_mean", [0, 0, 0]), ("global_attn_indexes", [])):
        check_sizes(config | {key: value}, config)
