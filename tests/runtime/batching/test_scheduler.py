"""Whose turn it is, and when all will be done: against a simulation of every single evaluation."""

from dataclasses import replace

import numpy as np
import pytest

from sdrt.runtime.batching.scheduler import PATIENCE, Rates, Turn, forecast, sharing

RATES = Rates(
    call=lambda group, rows: (0.01 + 0.004 * rows) * group[0],
    most=lambda group: 8,
    before=lambda group: 0.02,
    after=lambda group: 0.03 * group[0],
)


def turn(left, submitted=0.0, rows=2, group=(1,), **more):
    result = Turn(group, rows, left, submitted, 0.0, **more)
    result.due = RATES.due(result)
    return result


def simulated(turns, slots, arrivals=()):
    """Every evaluation one by one; arrivals: (second, turn). Gives when each is done."""
    coming, waiting, inside, done = sorted(arrivals, key=lambda a: a[0]), list(turns), [], {}
    clock = RATES.before((1,)) if turns else 0.0
    decoder = 0.0
    while coming or waiting or inside:
        if not waiting and not inside:
            clock = max(clock, coming[0][0])
        while coming and coming[0][0] <= clock:
            waiting.append(coming.pop(0)[1])
        waiting.sort(key=lambda t: t.key(clock))
        while waiting and len(inside) < slots:
            inside.append(waiting.pop(0))
        inside.sort(key=lambda t: t.key(clock))
        chosen = sharing(inside, RATES.most)
        clock += RATES.call(chosen[0].group, sum(t.rows for t in chosen))
        for item in chosen:
            item.left -= 1
            if item.left == 0:
                inside.remove(item)
                decoder = max(decoder, clock) + RATES.after(item.group)
                done[id(item)] = decoder
    return done


@pytest.mark.parametrize("seed", range(20))
def test_a_forecast_is_what_evaluation_by_evaluation_comes_to(seed):
    rng = np.random.default_rng(seed)
    turns = [
        turn(
            int(rng.integers(1, 50)), rows=int(rng.integers(1, 3)), group=(int(rng.integers(1, 3)),)
        )
        for _ in range(rng.integers(1, 30))
    ]
    slots = int(rng.integers(1, 9))
    actual = forecast(turns, 0.0, RATES, slots)
    expected = simulated(turns, slots)
    assert actual == pytest.approx([expected[id(t)] for t in turns])


def test_shallow_evaluations_cost_what_they_cost():
    rates = replace(RATES, shallow=lambda group: 0.25)
    deep, reusing = turn(12), turn(12, full=1 / 3)
    (alone,) = forecast([reusing], 0.0, rates, 1)
    assert alone == pytest.approx(rates.alone(reusing))
    assert alone == pytest.approx(0.02 + (4 + 8 * 0.25) * rates.call((1,), 2) + 0.03)
    # Who shares a call of the whole model waits for it.
    shared = forecast([deep, reusing], 0.0, rates, 2)
    assert min(shared) == pytest.approx(0.02 + 12 * rates.call((1,), 4) + 0.03)


def test_the_earliest_due_goes_first_within_a_priority():
    late, soon, urgent = turn(50), turn(4), turn(50, priority=1)
    assert sorted([late, soon, urgent], key=lambda t: t.key(0.0)) == [urgent, soon, late]
    assert sorted([urgent, turn(1)], key=lambda t: t.key(0.0))[0] is urgent


def test_whoever_waits_long_rises():
    old, new = turn(50), turn(1, submitted=PATIENCE + 1.0, priority=1)
    assert sorted([new, old], key=lambda t: t.key(PATIENCE - 1.0))[0] is new
    assert sorted([new, old], key=lambda t: t.key(PATIENCE + 1.5))[0] is old


def test_a_call_is_of_one_group_and_fits():
    first, other, wide, narrow = turn(1), turn(1, group=(2,)), turn(1, rows=9), turn(1, rows=6)
    assert sharing([first, other, wide, narrow], RATES.most) == [first, narrow]
    assert sharing([wide, first], RATES.most) == [wide]  # more than the most goes alone


@pytest.mark.integration
def test_short_ones_do_not_starve_a_long_one():
    long = turn(50, rows=8)
    stream = [(0.02 * i, turn(4, submitted=0.02 * i, rows=8)) for i in range(2000)]  # overload
    done = simulated([long], 4, stream)
    assert done[id(long)] < PATIENCE + RATES.alone(turn(50, rows=8)) + 1.0
    assert done[id(long)] > RATES.alone(turn(50, rows=8)) * 1.5  # they did pass it


def test_two_sizes_wait_alike_for_what_they_cost():
    """At 80 % load, neither the cheaper nor the dearer size is slowed down much more."""
    rng = np.random.default_rng(0)
    item = {1: RATES.alone(turn(20)), 2: RATES.alone(turn(20, group=(2,)))}
    clock, stream = 0.0, []
    for i in range(400):
        clock += rng.exponential(sum(item.values()) / 2 / 1.6)
        stream.append((clock, turn(20, submitted=clock, group=(1 + i % 2,))))
    done = simulated([], 8, stream)
    slowed = [
        np.mean([(done[id(t)] - at) / item[size] for at, t in stream if t.group == (size,)])
        for size in (1, 2)
    ]
    assert max(slowed) < 2.0 * min(slowed) and max(slowed) < 8.0
