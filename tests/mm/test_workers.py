# SPDX-License-Identifier: Apache-2.0
"""A run of tools/ptq.py in two processes, started as users start it, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ahcq_plugin.support.safe_load import safe_load

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["recipe.name=ahcq", "recipe.iterations=3", "recipe.batch_size=2", "recipe.acnr_steps=5"]
LINES = (
    "model = dict(_delete_=True, type='FixedDetector', boxes={boxes}, scores=[0.9, 0.8])\n"
    "custom_imports = dict(imports=['ahcq_plugin.mm', 'tests.mm.conftest'])\n"
)


def _run(config, folder, processes):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(ROOT / "tools" / "ptq.py"), str(config), "--work-dir", str(folder)]
    command += ["--launcher", "pytorch"] if processes > 1 else []
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--cfg-options", *OPTIONS], capture_output=True, text=True, env=env, cwd=folder.parent, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return json.loads((folder / "metrics.json").read_text()), done.stdout


@pytest.mark.slow
def test_two_processes_give_the_figures_and_bits_of_one(ptq_config, tmp_path):
    """Boxes of a detector on three images: the sampler gives one of them to both processes."""
    boxes = [[8.0, 8.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]]
    ptq_config.write_text(
        ptq_config.read_text()
        + LINES.format(boxes=boxes)
        + f"load_from = {str(tmp_path / 'detector.pth')!r}\ntest_cfg['prompts'] = 'detector'\n"
    )
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    (one, _), (two, text) = (_run(ptq_config, tmp_path / str(n), n) for n in (1, 2))
    for part in ("fp", "quantized", "audit"):
        assert one[part] == two[part]
    assert "AP_box" in one["fp"] and one["quantized"]["IoU_fp"] < 1
    assert text.count("audit passed") == 1, "one process prints"
    states = [safe_load(tmp_path / str(n) / "quantized.pth") for n in (1, 2)]
    wanted, found = (content["state_dict"] for content in states)
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []
    ids = states[1]["extra"]["notes"]["calibration_images"]
    assert len(set(ids)) == 2 and ids == states[0]["extra"]["notes"]["calibration_images"]
