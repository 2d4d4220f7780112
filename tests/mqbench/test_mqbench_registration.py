# SPDX-License-Identifier: Apache-2.0
import copy

import pytest

pytest.importorskip("mqbench.prepare_by_platform", reason="needs MQBench, see docs/mqbench.md", exc_type=ImportError)

import mqbench.custom_quantizer  # noqa: F401  fills MQBench's table of model quantizers
from mqbench import prepare_by_platform as host
from mqbench.utils.registry import BACKEND_DEPLOY_FUNCTION, DEFAULT_MODEL_QUANTIZER

from ahcq_plugin.mqbench import AHCQ_BACKEND, register
from ahcq_plugin.mqbench.quantizers import FAKE_QUANTIZERS, FAMILIES, OBSERVERS
from ahcq_plugin.quantizers import ACTIVATION_FAMILIES

TABLES = [
    host.ObserverDict,
    host.FakeQuantizeDict,
    host.ParamsTable,
    DEFAULT_MODEL_QUANTIZER,
    BACKEND_DEPLOY_FUNCTION,
]


def contents():
    return [{key: copy.copy(value) for key, value in table.items()} for table in TABLES]


def test_importing_the_plugin_has_registered_everything():
    assert OBSERVERS.items() <= host.ObserverDict.items()
    assert FAKE_QUANTIZERS.items() <= host.FakeQuantizeDict.items()
    for table in TABLES[2:]:
        assert AHCQ_BACKEND in table
    assert FAMILIES.keys() == ACTIVATION_FAMILIES.keys(), "every family of a recipe has its class for MQBench"
    assert all(issubclass(FAMILIES[name], ACTIVATION_FAMILIES[name]) for name in FAMILIES)


def test_registering_twice_changes_nothing():
    before = contents()
    register()
    assert [{**a} for a in contents()] == before


@pytest.mark.parametrize("table", [0, 1, 3, 4])
def test_a_clash_is_refused_by_name_and_nothing_is_added(table, monkeypatch):
    name = [list(OBSERVERS)[1], list(FAKE_QUANTIZERS)[1], None, AHCQ_BACKEND, AHCQ_BACKEND][table]
    for index, others in enumerate(TABLES):
        for key in {AHCQ_BACKEND, *OBSERVERS, *FAKE_QUANTIZERS} & others.keys():
            monkeypatch.delitem(others, key)
        if index == table:
            monkeypatch.setitem(others, name, [] if table == 4 else dict)
    before = contents()
    with pytest.raises(KeyError, match=f"other entries under our names: '{name}' in "):
        register()
    assert contents() == before


def test_mqbenchs_own_entries_are_as_they_were():
    from mqbench.fake_quantize import AdaRoundFakeQuantize
    from mqbench.observer import MinMaxObserver

    assert host.FakeQuantizeDict["AdaRoundFakeQuantize"] is AdaRoundFakeQuantize
    assert host.ObserverDict["MinMaxObserver"] is MinMaxObserver


def test_extra_arguments_of_one_call_do_not_reach_the_next():
    """MQBench writes them into the scheme of its table; ours hands out copies."""
    extra = {"a_observer_extra_args": {"ema_ratio": 0.9}}
    with pytest.raises(TypeError):
        host.get_qconfig_by_platform(AHCQ_BACKEND, extra).activation()
    assert "ema_ratio" not in host.get_qconfig_by_platform(AHCQ_BACKEND, {}).activation.p.keywords
