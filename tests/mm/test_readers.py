# SPDX-License-Identifier: Apache-2.0
"""What a config names is read without running it, also where MMEngine and MMDetection read it."""

import io
import pickle
from pathlib import Path

import mmengine
import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader
from rich.console import Console

from ahcq_plugin.mm.config_file import load_config
from ahcq_plugin.mm.launch import launch
from ahcq_plugin.mm.readers import safe_readers
from tests.robustness.kinds import Payload


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Where a payload that runs leaves its mark."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("payload_ran").exists()


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_a_config_in_yaml_runs_nothing(suffix):
    path = Path(f"leaf.{suffix}")
    path.write_text("recipe: !!python/object/apply:os.system ['touch payload_ran']\n")
    with pytest.raises(ValueError, match=f"cannot read the config leaf.{suffix}: ConstructorError"):
        load_config(path)
    path.write_text("a: 1\nb:\n  - c: x\n")
    assert load_config(path).to_dict() == {"a": 1, "b": [{"c": "x"}]}


@pytest.mark.parametrize(("suffix", "text"), [("yaml", "a: 1\nb: {c: 1, c: 2}\n"), ("json", '{"b": {"c": 1, "c": 2}}')])
def test_a_key_that_stands_twice_is_refused(suffix, text):
    Path(f"leaf.{suffix}").write_text(text)
    with pytest.raises(ValueError, match=f"cannot read the config leaf.{suffix}: .*the key 'c' stands twice"):
        load_config(f"leaf.{suffix}")


def test_proposals_are_not_unpickled(ptq_config):
    Path("proposals.pkl").write_bytes(pickle.dumps(Payload()))
    out, options = io.StringIO(), {"test_dataloader.dataset.proposal_file": str(Path("proposals.pkl").resolve())}
    console = Console(file=out, width=300)
    assert launch(str(ptq_config), work_dir="out", cfg_options=options, console=console) == 2
    assert "the config names a pickle, which can run any code: convert it to JSON" in out.getvalue()


def test_what_a_model_loads_by_itself_is_not_unpickled():
    torch.save(Payload(), "teacher.pth")
    torch.save({"x": torch.ones(2)}, "good.pth")
    with safe_readers():
        with pytest.raises(ValueError, match="teacher.pth"):
            CheckpointLoader.load_checkpoint("teacher.pth")
        with pytest.raises(ValueError, match="is a URL; download it"):
            CheckpointLoader.load_checkpoint("https://nowhere.invalid/teacher.pth")
        assert torch.equal(CheckpointLoader.load_checkpoint("good.pth")["x"], torch.ones(2))


def test_outside_of_a_run_mmengine_reads_as_before():
    Path("x.pkl").write_bytes(pickle.dumps([1, 2]))
    with safe_readers(), pytest.raises(ValueError, match="convert it to JSON"):
        mmengine.load("x.pkl")
    assert mmengine.load("x.pkl") == [1, 2]
    assert CheckpointLoader._get_checkpoint_loader("modelzoo://x").__name__ != "_read_checkpoint"
