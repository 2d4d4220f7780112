# SPDX-License-Identifier: Apache-2.0
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import ahcq_plugin
from ahcq_plugin.studies.training import loop
from ahcq_plugin.studies.training.decoding import decode_tokens, split_pixels
from ahcq_plugin.studies.training.init import init_sam
from ahcq_plugin.studies.training.job import Job
from ahcq_plugin.studies.training.loop import TrainCfg, train
from ahcq_plugin.studies.training.models import MODELS
from ahcq_plugin.studies.training.optim import Muon, orthogonalise
from ahcq_plugin.studies.training.pool import load_pool, load_pools
from ahcq_plugin.studies.training.samples import SampleCfg, make_sample, soft_box
from ahcq_plugin.zoo.checkpoints import load_weights
from ahcq_plugin.zoo.sam import box_forward
from ahcq_plugin.zoo.scenes import write_coco
from tests.conftest import TINY_SAM

SAMPLE = SampleCfg(size=64, mask_size=32, boxes=3)


def test_token_decoding_is_the_published_decoder(tiny_sam, tiny_items):
    embeddings = torch.cat([tiny_sam.image_encoder(item["image"]) for item in tiny_items]).detach()
    boxes = torch.cat([item["boxes"] for item in tiny_items])
    owner = torch.tensor([0, 1, 1, 2, 2, 2])
    with torch.no_grad():
        everywhere = torch.ones(len(boxes), 64, dtype=torch.bool)
        logits, quality = decode_tokens(tiny_sam, embeddings, owner, boxes, everywhere)
        expected, expected_quality = (
            torch.cat(x) for x in zip(*(box_forward(tiny_sam, i) for i in tiny_items), strict=True)
        )
        torch.testing.assert_close(logits, split_pixels(expected[:, 0], 8).flatten(0, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(quality, expected_quality[:, 0], rtol=1e-4, atol=1e-5)
        some = torch.rand(len(boxes), 64, generator=torch.Generator().manual_seed(0)) < 0.2
        few, _ = decode_tokens(tiny_sam, embeddings, owner, boxes, some)
    torch.testing.assert_close(few, logits[some.flatten()])


def test_pixels_of_a_token_are_its_four_by_four_block():
    maps = torch.arange(16 * 16).view(1, 16, 16)
    block = split_pixels(maps, 4)[0, 4 * 2 + 1]  # token in row 2, column 1
    for a in range(2):
        for b in range(2):
            for c in range(2):
                for d in range(2):
                    assert block[2 * a + b, 2 * c + d] == maps[0, 8 + 2 * a + c, 4 + 2 * b + d]


def test_seed_and_index_decide_a_sample():
    first, again, other = (make_sample(3, i, SAMPLE, []) for i in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["image"], other["image"])


def test_targets_lie_in_their_boxes_and_labels_agree_with_extents():
    for index in range(20):
        sample = make_sample(0, index, SAMPLE, [])
        assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.uint8
        assert sample["boxes"].shape == (3, 4) and sample["targets"].shape == (3, 32, 32)
        for box, target in zip(sample["boxes"], sample["targets"], strict=True):
            rows, columns = torch.nonzero(target > 127, as_tuple=True)
            if len(rows):
                tight = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * 2
                assert (tight - box).abs().max() <= 3 + 0.25 * 64  # jitter is a few percent of the sides
        coarse, extents = sample["labels"][::2, ::2], sample["extents"]
        assert torch.equal((extents >= 0).all(0), coarse > 0)
        for label in coarse[coarse > 0].unique():
            width = (extents[0] + extents[2])[coarse == label]
            assert width.max() <= 64 and (width.max() - width.min()) < 4 + 1e-3  # all its pixels know one box


def test_a_soft_box_counts_border_pixels_by_their_cover():
    cover = np.zeros((8, 8), np.uint8)
    cover[2:5, 3:6] = 255
    cover[2:5, 2] = 51
    assert soft_box(cover) == pytest.approx([2.8, 2, 6, 5])


def test_orthogonalise_brings_singular_values_near_one():
    for shape in ((3, 8, 20), (2, 20, 8)):
        x = orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        values = torch.linalg.svdvals(x)
        assert x.shape == shape and values.min() > 0.5 and values.max() < 1.4


def test_muon_step_ignores_the_scale_of_the_gradient_and_refuses_vectors():
    ends = []
    for scale in (1.0, 1000.0):
        weight = torch.nn.Parameter(torch.zeros(4, 6))
        weight.grad = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        Muon([weight], lr=0.1).step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=0.02, atol=1e-3)
    with pytest.raises(ValueError, match="Muon takes matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_heads_start_by_looking_at_a_neighbour():
    # with zero content the logits are those of bias and position tables; the peak is within 1.5 tokens of the query
    encoder = init_sam({**TINY_SAM, "window_size": 8}, seed=0).image_encoder
    attention = encoder.blocks[0].attn
    heads, size = attention.num_heads, 32 // attention.num_heads
    for head in range(heads):
        query = attention.qkv.bias[head * size : (head + 1) * size]
        for table in (attention.rel_pos_h, attention.rel_pos_w):
            logits = table @ query
            assert abs(int(logits.argmax()) - len(table) // 2) <= 2
            assert logits.max() - logits[0] > 5


def test_learning_rate_rises_stays_and_falls_to_zero():
    cfg = TrainCfg(steps=1000, lr=1.0, warmup=10, decay_share=0.4)
    rates = [cfg.learning_rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == rates[599] == 1.0
    assert all(a >= b for a, b in zip(rates[600:], rates[601:], strict=False)) and rates[-1] < 1e-4
    assert TrainCfg(steps=1).learning_rate(0) > 0


def small_run(**changes):
    return TrainCfg(**{"steps": 6, "batch": 2, "warmup": 2, "detach_steps": 2, "sample": SAMPLE, **changes})


def test_resuming_after_a_kill_changes_nothing(tmp_path, monkeypatch):
    whole = train(TINY_SAM, small_run(), Job(tmp_path / "whole"))
    original = loop.make_sample

    def dies(seed, index, *rest):
        if index >= 8:
            raise KeyboardInterrupt
        return original(seed, index, *rest)

    monkeypatch.setattr(loop, "make_sample", dies)
    with pytest.raises(KeyboardInterrupt):
        train(TINY_SAM, small_run(), Job(tmp_path / "killed", save_seconds=0))
    monkeypatch.undo()
    assert torch.load(tmp_path / "killed" / "state.pth", weights_only=True)["step"] == 4
    resumed = train(TINY_SAM, small_run(), Job(tmp_path / "killed", resume=True))
    first, second = (torch.load(path, weights_only=True) for path in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def mark_rank(folder, rank):
    (folder / f"rank{rank}").touch()


def test_two_processes_share_a_step_without_changing_it(tmp_path):
    # the tokens asked outside a box differ between the runs, so gradients agree only roughly
    cfg = small_run(steps=2, warmup=1)
    one = torch.load(train(TINY_SAM, cfg, Job(tmp_path / "one")), weights_only=True)
    job = Job(tmp_path / "two", processes=2, on_start=partial(mark_rank, tmp_path))
    two = torch.load(train(TINY_SAM, cfg, job), weights_only=True)
    moved = torch.cat([(one[k].float() - v).flatten() for k, v in init_sam(TINY_SAM, cfg.seed).state_dict().items()])
    apart = torch.cat([(one[k].float() - two[k].float()).flatten() for k in one])
    assert apart.norm() < 0.5 * moved.norm()
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"], "each process is set up"


def test_logging_is_left_to_the_tools():
    package = Path(ahcq_plugin.__file__).parent
    calls = (".basicConfig(", ".addHandler(", ".dictConfig(")
    assert [path.name for path in package.rglob("*.py") if any(call in path.read_text() for call in calls)] == []


def test_a_short_run_learns_its_images(tmp_path, caplog, monkeypatch):
    original = loop.make_sample
    monkeypatch.setattr(loop, "make_sample", lambda seed, index, *rest: original(seed, index % 2, *rest))
    with caplog.at_level("INFO", logger="ahcq_plugin.studies.training.job"):
        path = train(TINY_SAM, small_run(steps=150, warmup=10, detach_steps=30, lr=5e-3), Job(tmp_path))
    lines = [m.getMessage().split() for m in caplog.records if m.getMessage().startswith("step")]
    early, *_, late = (dict(zip(line[4::2], map(float, line[5::2]), strict=False)) for line in lines)
    assert late["affinity"] + late["extent"] < 0.8 * (early["affinity"] + early["extent"])
    assert late["mask"] < 0.9 * early["mask"]
    assert late["iou"] > early["iou"] + 0.1
    load_weights(init_sam(TINY_SAM, 0), path)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        TrainCfg(steps=0)
    with pytest.raises(ValueError, match=r"`scene_share` must be in \[0, 1\], got 2"):
        SampleCfg(scene_share=2)
    with pytest.raises(ValueError, match="`mask_size` must be a multiple of 4 and divide `size`, got 30 and 64"):
        SampleCfg(size=64, mask_size=30)
    with pytest.raises(ValueError, match="`batch` must be a multiple of `processes`, got 2 and 3"):
        train(TINY_SAM, small_run(), Job(tmp_path, processes=3))
    with pytest.raises(ValueError, match="`processes` above 1 are for the CPU, got device 'cuda'"):
        Job(tmp_path, processes=2, device="cuda")
    with pytest.raises(ValueError, match="is at step 7, beyond `steps` = 6"):
        loop.SamRun(init_sam(TINY_SAM, 0), loop.DenseHead(16), small_run()).load({"step": 7})


def test_models_stay_within_their_size():
    for name, limit in (("sam_tiny", 8e6), ("sam_small", 22e6)):
        assert sum(p.numel() for p in init_sam(MODELS[name], 0).parameters()) <= limit


def test_images_of_more_folders_are_drawn_by_weight(tmp_path):
    coco_folder = write_coco(tmp_path / "scenes", count=6, seed=3, size=64).parent
    (levels, held), (pool, same) = load_pool(coco_folder, hold_out=1), load_pools(coco_folder, hold_out=1)
    assert held == same and len(pool) == len(levels)
    drawn = [pool.draw(np.random.default_rng(seed)) for seed in range(20)]
    indices = [int(np.random.default_rng(seed).integers(len(levels))) for seed in range(20)]
    assert all(image is pool[index] for image, index in zip(drawn, indices, strict=True)), "as without weights"
    more, _ = load_pools(coco_folder, [(coco_folder, 3.0)], hold_out=1)
    generator, counts = np.random.default_rng(0), dict.fromkeys(range(len(more)), 0)
    place = {id(image): index for index, image in enumerate(more)}
    for _ in range(2000):
        counts[place[id(more.draw(generator))]] += 1
    first = sum(counts[index] for index in range(len(levels)))
    extra = len(more) - len(levels)
    assert first / 2000 == pytest.approx(len(levels) / (len(levels) + 3 * extra), abs=0.04)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        load_pools(coco_folder, [(coco_folder, 0)], hold_out=1)
