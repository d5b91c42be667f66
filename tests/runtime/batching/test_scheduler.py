"""The scheduler's order and its estimates, against a simulation of every evaluation."""

from dataclasses import replace

import numpy as np
import pytest

from sdrt.runtime.batching.scheduler import (
    PRIORITY_SECONDS,
    CostEstimates,
    ScheduledPass,
    ScheduledRequest,
    estimate_finish_times,
    select_batch,
)

ESTIMATES = CostEstimates(
    call_seconds=lambda group, rows: (0.01 + 0.004 * rows) * group[0],
    max_rows=lambda group: 8,
    prepare_seconds=lambda group: 0.02,
    decode_seconds=lambda group: 0.03 * group[0],
    full_rows=lambda group: 12,
)


def scheduled(left, submitted=0.0, rows=2, group=(1,), **more):
    result = ScheduledRequest(group, rows, left, submitted, 0.0, **more)
    result.deadline = ESTIMATES.default_deadline(result)
    return result


def simulated(requests, slots, arrivals=()):
    """Every evaluation one by one; arrivals: (second, turn). Gives when each is done."""
    coming, waiting, inside, done = sorted(arrivals, key=lambda a: a[0]), list(requests), [], {}
    clock = ESTIMATES.prepare_seconds((1,)) if requests else 0.0
    decoder = 0.0
    while coming or waiting or inside:
        if not waiting and not inside:
            clock = max(clock, coming[0][0])
        while coming and coming[0][0] <= clock:
            waiting.append(coming.pop(0)[1])
        waiting.sort(key=lambda t: t.sort_key(clock))
        while waiting and len(inside) < slots:
            inside.append(waiting.pop(0))
        inside.sort(key=lambda t: t.sort_key(clock))
        chosen = select_batch(inside, ESTIMATES.row_limit(len(inside), slots))
        clock += ESTIMATES.call_seconds(chosen[0].batch_key, sum(t.num_rows for t in chosen))
        for item in chosen:
            item.evaluations_left -= 1
            if item.evaluations_left == 0:
                inside.remove(item)
                decoder = max(decoder, clock) + ESTIMATES.decode_seconds(item.batch_key)
                done[id(item)] = decoder
    return done


@pytest.mark.parametrize("seed", range(20))
def test_estimated_finish_times_match_a_simulation(seed):
    rng = np.random.default_rng(seed)
    requests = [
        scheduled(
            int(rng.integers(1, 50)), rows=int(rng.integers(1, 3)), group=(int(rng.integers(1, 3)),)
        )
        for _ in range(rng.integers(1, 30))
    ]
    slots = int(rng.integers(1, 9))
    actual = estimate_finish_times(requests, 0.0, ESTIMATES, slots)
    expected = simulated(requests, slots)
    assert actual == pytest.approx([expected[id(t)] for t in requests])


def test_shallow_evaluations_are_estimated_at_their_own_cost():
    estimates = replace(ESTIMATES, shallow_ratio=lambda group: 0.25)
    deep, reusing = scheduled(12), scheduled(12, full_fraction=1 / 3)
    (alone,) = estimate_finish_times([reusing], 0.0, estimates, 1)
    assert alone == pytest.approx(estimates.solo_seconds(reusing))
    assert alone == pytest.approx(0.02 + (4 + 8 * 0.25) * estimates.call_seconds((1,), 2) + 0.03)
    # Who shares a call of the whole model waits for it.
    shared = estimate_finish_times([deep, reusing], 0.0, estimates, 2)
    assert min(shared) == pytest.approx(0.02 + 12 * estimates.call_seconds((1,), 4) + 0.03)


def test_the_earliest_deadline_goes_first_within_a_priority():
    late, soon, urgent = scheduled(50), scheduled(4), scheduled(50, priority=1)
    assert sorted([late, soon, urgent], key=lambda t: t.sort_key(0.0)) == [urgent, soon, late]
    assert sorted([urgent, scheduled(1)], key=lambda t: t.sort_key(0.0))[0] is urgent


def test_a_long_wait_raises_the_priority():
    old, new = scheduled(50), scheduled(1, submitted=PRIORITY_SECONDS + 1.0, priority=1)
    assert sorted([new, old], key=lambda t: t.sort_key(PRIORITY_SECONDS - 1.0))[0] is new
    assert sorted([new, old], key=lambda t: t.sort_key(PRIORITY_SECONDS + 1.5))[0] is old


def test_a_batch_has_one_key_and_fits():
    first, other, wide, narrow = (
        scheduled(1),
        scheduled(1, group=(2,)),
        scheduled(1, rows=9),
        scheduled(1, rows=6),
    )
    assert select_batch([first, other, wide, narrow], ESTIMATES.max_rows) == [first, narrow]
    assert select_batch([wide, first], ESTIMATES.max_rows) == [
        wide
    ]  # more than max_rows runs alone


def test_calls_are_larger_while_many_requests_run():
    assert [ESTIMATES.row_limit(running, 16)((1,)) for running in (1, 5, 6, 16)] == [8, 8, 12, 12]
    assert replace(ESTIMATES, full_rows=None).row_limit(16, 16)((1,)) == 8


def test_image_prompts_share_calls_with_those_of_their_length_and_with_none():
    base, plus = scheduled(1, image_tokens=4), scheduled(1, image_tokens=16)
    plain, other = scheduled(1), scheduled(1, image_tokens=4)
    ordered = [plain, base, plus, other]
    assert select_batch(ordered, ESTIMATES.max_rows) == [plain, base, other]
    assert select_batch([plus, other, plain], ESTIMATES.max_rows) == [plus, plain]


@pytest.mark.integration
def test_short_requests_do_not_starve_a_long_one():
    long = scheduled(50, rows=8)
    stream = [(0.02 * i, scheduled(4, submitted=0.02 * i, rows=8)) for i in range(2000)]  # overload
    done = simulated([long], 4, stream)
    assert done[id(long)] < PRIORITY_SECONDS + ESTIMATES.solo_seconds(scheduled(50, rows=8)) + 1.0
    assert done[id(long)] > ESTIMATES.solo_seconds(scheduled(50, rows=8)) * 1.5  # they did pass it


def test_two_sizes_are_slowed_down_alike():
    """At 80 % load, neither the cheaper nor the dearer size is slowed down much more."""
    rng = np.random.default_rng(0)
    item = {
        1: ESTIMATES.solo_seconds(scheduled(20)),
        2: ESTIMATES.solo_seconds(scheduled(20, group=(2,))),
    }
    clock, stream = 0.0, []
    for i in range(400):
        clock += rng.exponential(sum(item.values()) / 2 / 1.6)
        stream.append((clock, scheduled(20, submitted=clock, group=(1 + i % 2,))))
    done = simulated([], 8, stream)
    slowed = [
        np.mean([(done[id(t)] - at) / item[size] for at, t in stream if t.batch_key == (size,)])
        for size in (1, 2)
    ]
    assert max(slowed) < 2.0 * min(slowed) and max(slowed) < 8.0


def test_a_later_pass_counts_in_the_estimates():
    def finish(requests):
        return estimate_finish_times(requests, 0.0, ESTIMATES, 4)

    later = ScheduledPass((2,), 2, 5)
    both = scheduled(10, later_pass=later)
    alone, second = scheduled(10), scheduled(5, group=(2,))
    assert ESTIMATES.solo_seconds(both) == pytest.approx(
        ESTIMATES.solo_seconds(alone) + ESTIMATES.solo_seconds(second)
    )
    call = ESTIMATES.call_seconds
    expected = 0.02 + 10 * call((1,), 2) + 5 * call((2,), 2) + ESTIMATES.decode_seconds((2,))
    assert finish([both]) == pytest.approx([expected])
    assert both.total_evaluations_left == 15
    started = both.start_later_pass()
    assert (started.deadline, started.evaluations_left) == (both.deadline, 5)
    # A request of the second pass's size shares its calls.
    second.deadline = both.deadline + 1.0
    expected = 0.02 + 10 * call((1,), 2) + 5 * call((2,), 4) + ESTIMATES.decode_seconds((2,))
    assert finish([both, second])[0] == pytest.approx(expected)


def test_requests_of_two_graphs_share_no_call_and_plain_ones_ride_with_either():
    graphs = ["", "unet_lora", "", "unet_control", "unet_lora"]
    requests = [scheduled(4, rows=1, graph=graph) for graph in graphs]
    assert select_batch(requests, ESTIMATES.max_rows) == [requests[i] for i in (0, 1, 2, 4)]
    requests.sort(key=lambda request: request.graph != "unet_control")
    first, *others = select_batch(requests, ESTIMATES.max_rows)
    assert first.graph == "unet_control" and [other.graph for other in others] == ["", ""]
