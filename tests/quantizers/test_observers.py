# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from ahcq_plugin.quantizers.observers import AvgMinMaxObserver, ChannelObserver, OutputErrorObserver


def _state(observer):
    names = {"sample", "largest", "min_val", "max_val", "count"} & observer._buffers.keys()
    return {name: getattr(observer, name) for name in names} | {"rate": getattr(observer, "per_call", None)}


@pytest.mark.parametrize("kind", [AvgMinMaxObserver, OutputErrorObserver, ChannelObserver])
def test_summaries_made_ahead_and_absorbed_in_order_are_calls(kind):
    """Also where the sample has been halved in between, which whoever makes the summary cannot know."""
    generator = torch.Generator().manual_seed(0)
    calls = [torch.randn(300 + 7 * i, 24, generator=generator) for i in range(40)]
    here, there = kind(), kind()
    for x in calls:
        here(x)
    for summary in [kind().summary(x, ahead=True) for x in calls]:
        there.absorb(summary)
    one, other = _state(here), _state(there)
    assert one.keys() == other.keys() and one.pop("rate") == other.pop("rate")
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert int(here.count) == 40
    assert kind is AvgMinMaxObserver or here.per_call < kind().per_call, "the rate was halved"
    assert kind is not ChannelObserver or len(here.sample) <= here.most
