"""The soak benchmark, short: every kind of caller, pushes in flight, and nothing lost, doubled or left behind."""

import pytest

from benchmarks.soak import soak

pytestmark = [pytest.mark.slow, pytest.mark.study]


def test_nothing_is_lost_doubled_or_left_behind(ray_cluster: None) -> None:
    figures = soak(300, seed=1)
    assert (figures["lost"], figures["doubled"], figures["wrong"]) == (0, 0, 0)
    assert (figures["in_flight"], figures["slots_used"], figures["records_untaken"]) == (0, 0, 0)
    assert figures["requests"] == 300 and figures["pushes"] > 0 and figures["preemptions"] > 0
    assert len(figures["calls"]) == 4 and all(figures["calls"].values())
