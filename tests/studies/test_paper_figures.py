# SPDX-License-Identifier: Apache-2.0
import torch

from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.quantizers import CAGFakeQuantize
from ahcq_plugin.studies.paper_figures import Tensors, _kinds, draw
from ahcq_plugin.zoo.sam import box_forward


def test_pictures_and_storage(tiny_sam, tiny_items, tmp_path):
    numbers = draw(tiny_sam, tiny_items, tmp_path, forward=box_forward)
    for name in ("figure1.png", "channels.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert 0 < numbers["similarity"] <= 1 + 1e-6
    # the paper's 144 bits: four groups of a float scale and a 4-bit zero point
    assert numbers["largest_cag"] == 144
    inputs = [q for q in tiny_sam.modules() if isinstance(q, CAGFakeQuantize)]
    assert numbers["bits_cag"] == 144 * len(inputs) and numbers["bits_per_tensor"] == 36 * len(inputs)
    assert numbers["bits_per_channel"] == sum(36 * len(q.labels) for q in inputs)


def test_attentions_are_told_apart(tiny_sam):
    prepare(tiny_sam, Recipe.from_config("ahcq"))
    kinds = {kind for quantizer, kind in _kinds(tiny_sam) if quantizer.role == "softmax"}
    assert kinds == {
        "attn",
        "self_attn",
        "cross_attn_token_to_image",
        "cross_attn_image_to_token",
        "final_attn_token_to_image",
    }


def test_ranges_of_channels_are_kept_per_item():
    tensors = Tensors(CAGFakeQuantize(quant_max=15), "kind")
    tensors.add(torch.tensor([[[1.0, -5.0], [3.0, 2.0]]]))
    tensors.add(torch.tensor([[[0.0, 0.0]]]))
    assert tensors.ranges[0].tolist() == [[1.0, -5.0], [3.0, 2.0]]
    assert tensors.values.tolist() == [1.0, -5.0, 3.0, 2.0, 0.0, 0.0]
