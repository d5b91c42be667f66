"""The simulation of replicas: alone, on shared processors, and the number that a load needs."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sim(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import serve_sim

    yield serve_sim
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def rates(sim):
    return sim.gpu_rates(two=0.1, gain=1.5, decode=0.3)


@pytest.mark.parametrize("shared", [False, True])
def test_a_request_alone_takes_its_solo_seconds(sim, rates, shared):
    for evaluations, rows in sim.MIX:
        request = sim.Request(5.0, evaluations, rows)
        sim.simulated([request], rates, 1, 16, shared)
        expected = rates.solo_seconds(sim.as_scheduled(request))
        assert request.done - request.at == pytest.approx(expected)


def test_a_shared_processor_is_never_idle_and_does_one_seconds_work_a_second(sim, rates):
    work = []

    def counted(group, rows):
        work.append(rates.call_seconds(group, rows))
        return work[-1]

    requests = sim.poisson(60, 1e9, sim.mixed, 1)
    sim.simulated(requests, replace(rates, call_seconds=counted), 1, 8, shared=True)
    deadlines = len(requests)  # one estimate each, which is no call
    others = sum(rates.prepare_seconds(r.group) + rates.decode_seconds(r.group) for r in requests)
    total = sum(work[deadlines:]) + others
    assert max(request.done for request in requests) == pytest.approx(total, rel=1e-6)


def test_decoding_counts_among_the_slots(sim, rates):
    """With one slot each request waits for the image before."""
    requests = [sim.Request(0.0, 2, 1), sim.Request(0.0, 2, 1)]
    sim.simulated(requests, rates, 1, slots=1)
    alone = rates.solo_seconds(sim.as_scheduled(sim.Request(0.0, 2, 1)))
    assert [request.done for request in requests] == pytest.approx([alone, 2 * alone])


def test_the_replicas_of_a_load_are_the_fewest(sim, rates):
    fleet = sim.Fleet(rates, 16, sim.mixed, "")
    rate, within = 3 * fleet.capacity(), 2.0 * fleet.solo_p95()
    replicas, row = fleet.find_replicas(rate, within)
    assert row["p95"] <= within
    assert replicas == 3 or fleet.serve(replicas - 1, rate)["p95"] > within
