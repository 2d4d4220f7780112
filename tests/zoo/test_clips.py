# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

pytest.importorskip("sam2", reason="needs the sam2 package")

from ahcq_plugin.studies.training.clip_loop import ClipRun, ClipTrainCfg, init_sam2, normalise, train_clips
from ahcq_plugin.studies.training.clip_samples import ClipSampleCfg, make_clip
from ahcq_plugin.studies.training.job import Job
from ahcq_plugin.studies.training.tracking import Predictions, Prompts, image_levels, track, tracking_loss
from ahcq_plugin.zoo.checkpoints import packaged_config
from ahcq_plugin.zoo.clips import MIN_AREA, Sprite, animate, render_clip
from ahcq_plugin.zoo.sam2 import build_sam2

SMALL = {
    **packaged_config("sam2_tiny"),
    "image_size": 64,
    "embed_dim": 8,
    "stages": [1, 1, 2, 1],
    "global_att_blocks": [3],
    "d_model": 32,
    "memory_dim": 16,
    "memory_layers": 1,
    "memory_mlp_dim": 32,
}
SAMPLE = ClipSampleCfg(size=64, frames=3, objects=2)


def test_equal_seeds_give_equal_clips_and_others_do_not():
    frames, masks = render_clip((5, 1), 4, 64)
    again = render_clip((5, 1), 4, 64)
    assert np.array_equal(frames, again[0]) and np.array_equal(masks, again[1])
    assert not np.array_equal(frames, render_clip((5, 2), 4, 64)[0])


def test_masks_are_apart_and_every_object_is_in_the_first_frame():
    moved = hidden = 0
    for seed in range(40):
        frames, masks = render_clip((11, seed), 6, 64)
        assert frames.shape == (6, 64, 64, 3) and frames.dtype == np.uint8
        assert masks.shape[0] == 6 and masks.dtype == bool and masks.sum(1).max() <= 1
        assert (masks[0].mean((1, 2)) >= MIN_AREA).all()
        moved += sum(not np.array_equal(masks[0, n], masks[5, n]) for n in range(masks.shape[1]))
        hidden += int((masks[1:].sum((2, 3)) < 0.5 * masks[0].sum((1, 2))).sum())
    assert moved > 40 and hidden > 5  # things move, and some get lost behind others or outside


def test_a_sprite_in_front_hides_the_one_behind():
    whole = Sprite(np.full((400, 400, 3), 200, np.float32), np.full((400, 400), 255, np.uint8))
    for seed in range(5):
        _, alone = animate(np.random.default_rng(seed), np.zeros((96, 96, 3), np.float32), [whole], 2, 64)
        _, both = animate(np.random.default_rng(seed), np.zeros((96, 96, 3), np.float32), [whole, whole], 2, 64)
        assert (alone == 1).any() and set(np.unique(both)) <= {0, 1, 2}
        assert (both[alone == 0] != 1).all() and ((both == 1) <= (alone == 1)).all()


def test_an_unlabelled_sprite_hides_and_has_no_mask():
    colour, cover = np.full((400, 400, 3), 200, np.float32), np.full((400, 400), 255, np.uint8)
    pair = [Sprite(colour, cover), Sprite(colour, cover, labelled=False)]
    for seed in range(5):
        _, plain = animate(np.random.default_rng(seed), np.zeros((96, 96, 3), np.float32), [pair[0]] * 2, 2, 64)
        _, labels = animate(np.random.default_rng(seed), np.zeros((96, 96, 3), np.float32), pair, 2, 64)
        assert np.array_equal(labels, np.where(plain == 2, 0, plain))


def test_too_few_frames_are_refused():
    with pytest.raises(ValueError, match="at least 2 frames"):
        render_clip(0, 1)


def test_a_training_clip_follows_from_seed_and_index_and_its_maps_agree():
    clip, again = (make_clip(3, 7, SAMPLE, []) for _ in range(2))
    assert all(torch.equal(clip[name], again[name]) for name in clip)
    assert clip["frames"].shape == (3, 3, 64, 64) and clip["targets"].shape == (2, 3, 64, 64)
    for mask, box in zip(clip["targets"][:, 0], clip["boxes"], strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        tight = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (tight - box).abs().max() <= 1 + 0.3 * 64
    assert torch.equal((clip["extents"] >= 0).all(1), clip["labels"][:, ::2, ::2] > 0)


def test_unknown_and_missing_arguments_are_named():
    with pytest.raises(ValueError, match="missing keys \\['stages'\\], unknown keys \\['stage'\\]"):
        build_sam2({**{k: v for k, v in SMALL.items() if k != "stages"}, "stage": 1}, False)
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        build_sam2({**SMALL, "image_size": 48}, False)
    with pytest.raises(ValueError, match="unknown model 'sam3'"):
        build_sam2("sam3")


def test_tracking_is_that_of_the_video_predictor(tmp_path):
    """The training's loop over frames predicts what ``SAM2VideoPredictor`` does, up to its bfloat16 memory."""
    model = init_sam2(SMALL, 0).eval()
    frames, masks = render_clip(3, 4, 64)
    pixels = normalise(torch.from_numpy(frames).permute(0, 3, 1, 2))
    first = torch.from_numpy(masks[0, :1])
    with torch.no_grad():
        features, _ = image_levels(model, pixels)
        ours = track(model, features, 4, torch.zeros(1, dtype=torch.long), Prompts(masks=first[None]))
    state = predictor_state(model, pixels)
    model.add_new_mask(state, 0, 1, first[0])
    theirs = [logits for _, _, logits in model.propagate_in_video(state)]
    for t in range(1, 4):
        logits = torch.nn.functional.interpolate(ours.logits[t][None], size=(64, 64), mode="bilinear")
        assert (logits - theirs[t]).abs().max() < 0.02 * theirs[t].abs().max()


def predictor_state(model, pixels):
    """What ``init_state`` makes of a folder."""
    import sam2.sam2_video_predictor as module

    loader, module.load_video_frames = module.load_video_frames, lambda **_: (pixels, *pixels.shape[-2:])
    try:
        return model.init_state("memory")
    finally:
        module.load_video_frames = loader


def test_the_loss_falls_with_better_masks_and_ignores_masks_of_hidden_objects():
    targets = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    targets[0, 0, 4:12, 4:12] = True

    def loss(logits, later):
        found = Predictions([logits, later], [torch.ones(1)] * 2, [torch.full((1,), 9.0), torch.full((1,), -9.0)])
        return float(tracking_loss(found, targets, 1.0, 1.0)[0])

    exact = (targets[:, 0, ::2, ::2].float() * 2 - 1) * 8
    anything = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert loss(exact, anything) < 0.1 < loss(-exact, anything)
    assert loss(exact, anything) == loss(exact, -anything)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    cfg = ClipTrainCfg(steps=4, batch=1, sample=SAMPLE, late_frames=4, forced_steps=2)
    whole = torch.load(train_clips(SMALL, cfg, Job(tmp_path / "a", check_every=99)), weights_only=True)

    class Stop(Exception): ...

    advance, done = ClipRun.advance, []

    def stopping(self, batch):
        if len(done) == 2:
            raise Stop
        done.append(0)
        return advance(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ClipRun, "advance", stopping)
        train_clips(SMALL, cfg, Job(tmp_path / "b", save_seconds=-1, check_every=99))
    rest = torch.load(train_clips(SMALL, cfg, Job(tmp_path / "b", resume=True, check_every=99)), weights_only=True)
    assert all(torch.equal(value, rest[name]) for name, value in whole.items())
