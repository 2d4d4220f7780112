# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of MMEngine's trainings are read without their history, whose objects ``safe_load`` does not make."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.optim import MultiStepLR

from ahcq_plugin.support.safe_load import safe_load


def test_a_training_checkpoint_is_read_without_its_history(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    hub = MessageHub("history")
    for step in range(3):
        hub.update_scalar("train/loss", torch.tensor(float(step)))
        hub.update_scalar("train/lr", np.float64(0.1))
    hub.update_info("epoch", 1)
    content = {
        "meta": {"epoch": 1, "dataset_meta": {"classes": ("cat",), "palette": [(1, 2, 3)]}, "best": np.float32(0.5)},
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [MultiStepLR(optimizer, milestones=[1, 2]).state_dict()],
        "message_hub": hub.state_dict(),
        "cfg": ConfigDict(model={"type": "RetinaNet"}),
    }
    torch.save(content, tmp_path / "epoch_1.pth")
    with caplog.at_level(logging.INFO):
        found = safe_load(tmp_path / "epoch_1.pth")
    assert list(found) == ["meta", "state_dict", "optimizer", "param_schedulers"]
    assert found["meta"] == content["meta"] and found["param_schedulers"] == content["param_schedulers"]
    assert all(torch.equal(found["state_dict"][name], value) for name, value in content["state_dict"].items())
    assert "entry 'message_hub' is left out, it holds mmengine.logging.history_buffer.HistoryBuffer" in caplog.text
