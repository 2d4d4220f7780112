# SPDX-License-Identifier: Apache-2.0
"""Whoever uses MQBench without our names gets the same tensors and files, plugin registered or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mqbench.convert_deploy", reason="needs MQBench, see docs/mqbench.md", exc_type=ImportError)

from tests.mqbench.flows import BACKENDS, digest

FLOWS = Path(__file__).with_name("flows.py")


def run(mode, folder):
    """Digests of all flows, in a process whose folder is ``folder``: MQBench leaves files where it runs."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, str(FLOWS), mode], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_mqbenchs_flows_give_equal_tensors_with_and_without_the_plugin(tmp_path):
    plain, plugged = run("plain", tmp_path), run("plugin", tmp_path)
    assert not plain.pop("plugin loaded") and plugged.pop("plugin loaded")
    assert plain.keys() >= set(BACKENDS) and len(set(plain.values())) > 5
    assert plain == plugged


def test_the_digest_sees_one_bit():
    import torch

    x = torch.ones(4)
    y = x.clone()
    y[3] = torch.nextafter(y[3], torch.tensor(2.0))
    assert digest({"a": x}) != digest({"a": y}) and digest({"a": x}) != digest({"b": x})
    assert digest({"a": x}) == digest({"a": x.clone()})
