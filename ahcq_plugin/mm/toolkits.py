# SPDX-License-Identifier: Apache-2.0
"""Who puts the quantizers into the units: this package, or MQBench with our backend."""

from __future__ import annotations

from ahcq_plugin.ptq.prepare import UnitPreparer, prepare_unit

#: Names for ``toolkit``.
TOOLKITS = ("native", "mqbench")


def unit_preparer(toolkit: str) -> UnitPreparer:
    """The ``prepare_unit`` of :func:`ahcq_plugin.quantize` for a toolkit.

    Raises:
        ValueError: unknown toolkit, or MQBench is not installed or does not import.
    """
    if toolkit not in TOOLKITS:
        raise ValueError(f"unknown toolkit {toolkit!r}; allowed: {', '.join(TOOLKITS)}")
    if toolkit == "native":
        return prepare_unit
    try:
        from ahcq_plugin import mqbench

        mqbench.register()
    except ImportError as error:
        raise ValueError(f"toolkit='mqbench': {error}; or use toolkit='native', which gives the same") from error
    return mqbench.prepare_unit
