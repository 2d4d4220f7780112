# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests against the real MQBench."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    """MQBench draws from numpy's and torch's global generators, and prints its log."""
    logger = logging.getLogger("MQBENCH")
    level = logger.level
    logger.setLevel(logging.WARNING)
    np.random.seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    logger.setLevel(level)
