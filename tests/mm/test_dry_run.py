# SPDX-License-Identifier: Apache-2.0
"""A dry run of a config that names a SAM of another package tries that one, and says what it lacks."""

import io
import sys
from types import SimpleNamespace

import pytest
from mmengine.runner import Runner
from rich.console import Console

from ahcq_plugin.mm.dry_run import drop_lost, small_sam
from ahcq_plugin.mm.launch import launch, read_config


@pytest.fixture
def dry_run(monkeypatch, tmp_path):
    """The last line of a dry run with another SAM, that ends in an error before it runs."""
    monkeypatch.setattr(Runner, "test", lambda *_: pytest.fail("the expensive part was reached"))

    def run(config, name: str) -> str:
        out, options = io.StringIO(), {"sam.name": name}
        console = Console(file=out, width=80)
        code = launch(str(config), work_dir=str(tmp_path / "out"), console=console, dry_run=True, cfg_options=options)
        *notes, last = out.getvalue().strip().splitlines()
        assert code == 2 and f"dry run: SAM is {name} as it is" in " ".join(notes)
        return last

    return run


def test_blocks_that_only_the_whole_sam_has_are_left_out(ptq_config):
    """They are right, and the small one lacks them; what neither has stays, to be refused."""
    blocks = [f"image_encoder.blocks.{number}" for number in range(13)]
    cfg = read_config(str(ptq_config), {"sam.name": "vit_b"})
    cfg.recipe["without"] = {"lnq": ["*.blocks.1[01]", "no.such"]}
    cfg.recipe["tune_units"] = [blocks[1], blocks[7], "mask_decoder.*", blocks[12]]
    cfg.test_cfg.units = [blocks[11]]
    assert drop_lost(cfg, "vit_b", small_sam("vit_b")) == [blocks[11], blocks[7], "*.blocks.1[01]"]
    assert cfg.recipe["without"] == {"lnq": ["no.such"]} and cfg.test_cfg.units is None
    assert cfg.recipe["tune_units"] == [blocks[1], "mask_decoder.*", blocks[12]]


def test_globs_of_no_module_are_refused_before_the_run(dry_run, ptq_config, tmp_path):
    out, options = io.StringIO(), {"recipe.without": {"lnq": ["no.such"]}}
    assert launch(str(ptq_config), str(tmp_path / "out"), options, console=Console(file=out, width=200)) == 2
    assert "`without.lnq` has 'no.such', which matches none of the" in out.getvalue()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mobile_sam", "error: 'mobile_sam' needs a package"),
        ("hq_vit_b", "pip install segment-anything-hq timm"),
        ("hf:facebook/sam-vit-base", "error: 'hf:facebook/sam-vit-base' needs the package transformers"),
    ],
)
def test_a_dry_run_tries_the_model_that_is_named(dry_run, ptq_config, name, message, monkeypatch):
    for package in ("segment_anything_hq", "mobile_sam", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert message in dry_run(ptq_config, name)


def test_a_dry_run_says_offline_what_to_do(dry_run, ptq_config, monkeypatch):
    def unreachable(source):
        raise OSError("We couldn't connect to the hub to load the files")

    hub = SimpleNamespace(AutoConfig=SimpleNamespace(from_pretrained=unreachable))
    monkeypatch.setitem(sys.modules, "transformers", hub)
    text = dry_run(ptq_config, "hf:facebook/sam-vit-base")
    assert "couldn't connect" in text and "without a network, copy config.json and model.safetensors" in text
