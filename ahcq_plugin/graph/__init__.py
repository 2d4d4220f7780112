# SPDX-License-Identifier: Apache-2.0
"""Trace blocks, find the roles of their tensors, place fake quantizers."""

from ahcq_plugin.graph.describe import RoleRow, RoleTable, describe
from ahcq_plugin.graph.placement import Placement, place, placements
from ahcq_plugin.graph.roles import ROLES, RoleSite, find_roles, find_weight_layers
from ahcq_plugin.graph.tracer import BlockTracer
from ahcq_plugin.graph.unit import UNIT_KEY, UncoveredError, UnitError, trace_unit
from ahcq_plugin.graph.units import find_units, prepared_units

__all__ = [
    "ROLES",
    "UNIT_KEY",
    "BlockTracer",
    "Placement",
    "RoleRow",
    "RoleSite",
    "RoleTable",
    "UncoveredError",
    "UnitError",
    "describe",
    "find_roles",
    "find_units",
    "find_weight_layers",
    "place",
    "placements",
    "prepared_units",
    "trace_unit",
]
