# SPDX-License-Identifier: Apache-2.0
"""The plugin for MQBench: our observers and fake quantizers by name, and a backend that places them by role.

Imports without MQBench; where it is installed, the import registers everything. See docs/mqbench.md.
"""

from importlib.util import find_spec

from ahcq_plugin.mqbench.backend import ACNR, AHCQ_BACKEND, recipe_of
from ahcq_plugin.mqbench.registration import register
from ahcq_plugin.mqbench.workflow import calibrate, prepare, prepare_unit, reconstruct

if find_spec("mqbench") is not None:
    register()

__all__ = ["ACNR", "AHCQ_BACKEND", "calibrate", "prepare", "prepare_unit", "recipe_of", "reconstruct", "register"]
