# SPDX-License-Identifier: Apache-2.0
"""Inference on integers: ``to_integer`` turns a quantized model into one whose units multiply codes."""

from ahcq_plugin.integer.backends import BACKENDS, use_backend
from ahcq_plugin.integer.model import MEMORY, integer_unit, to_integer

__all__ = ["BACKENDS", "MEMORY", "integer_unit", "to_integer", "use_backend"]
