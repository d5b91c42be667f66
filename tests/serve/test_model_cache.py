"""Which models are loaded under a memory budget, with loading and unloading that only count."""

import random
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from serving import wait_for

from sdrt.errors import UsageError
from sdrt.runtime.batching.request import RequestRejected
from sdrt.serve.model_cache import ModelCache, Residence


class Memory:
    """A cache over models that are names in a set, and what it did with them."""

    def __init__(self, sizes, budget, pinned=(), max_waiting=100, measured=None):
        self.measured = measured or {}
        self.loaded, self.events, self.largest = set(), [], 0
        self.gate = threading.Event()
        self.gate.set()
        self.cache = ModelCache(sizes, budget, pinned, self.load, self.unload, max_waiting)
        self.cache.start()

    def load(self, name):
        self.gate.wait()
        assert name not in self.loaded
        self.loaded.add(name)
        self.events.append(f"load {name}")
        self.largest = max(self.largest, sum(map(self.cache.size_bytes, self.loaded)))
        size = self.measured.get(name, 0)
        if isinstance(size, Exception):
            self.loaded.remove(name)
            raise size
        return size

    def unload(self, name):
        self.loaded.remove(name)
        self.events.append(f"unload {name}")

    def use(self, name):
        self.cache.request(name).result(10)
        assert name in self.loaded

    def touch(self, *names):
        for name in names:
            self.use(name)
            self.cache.release(name)


@pytest.fixture
def memory(request):
    created = []

    def create(*args, **named):
        created.append(Memory(*args, **named))
        return created[-1]

    yield create
    for item in created:
        item.gate.set()
        item.cache.close()


def test_models_are_loaded_once_and_stay(memory):
    m = memory({"a": 1, "b": 1}, 2)
    m.touch("a", "b", "a", "b")
    assert m.events == ["load a", "load b"]


def test_the_least_recently_used_model_is_evicted(memory):
    m = memory({"a": 1, "b": 1, "c": 1}, 2)
    m.touch("a", "b", "a", "c")
    assert m.loaded == {"a", "c"}
    m.touch("a", "b")
    assert m.loaded == {"a", "b"}


def test_an_idle_model_is_evicted_before_one_in_use(memory):
    m = memory({"a": 1, "b": 1, "c": 1}, 2)
    m.use("a")
    m.touch("b", "c")
    assert m.loaded == {"a", "c"}


def test_as_many_are_evicted_as_a_large_model_needs(memory):
    m = memory({"a": 1, "b": 1, "c": 1, "large": 2}, 3)
    m.touch("a", "b", "c", "large")
    assert m.loaded == {"c", "large"}


def test_pinned_models_are_never_evicted(memory):
    m = memory({"a": 1, "b": 1, "c": 1}, 2, pinned=["a"])
    m.touch("a", "b", "c", "b", "c")
    assert "unload a" not in m.events and m.loaded == {"a", "c"}


def test_a_model_in_use_is_evicted_only_after_its_users_are_finished(memory):
    m = memory({"a": 1, "b": 1}, 1)
    m.use("a")
    m.cache.hold("a")
    future = m.cache.request("b")
    wait_for(lambda: m.cache.residence("a") is Residence.EVICTING)
    m.cache.release("a")
    assert not future.done() and m.loaded == {"a"}
    m.cache.release("a")
    future.result(10)
    assert m.events == ["load a", "unload a", "load b"]


def test_users_of_a_model_that_is_evicted_wait_behind_the_next_model(memory):
    m = memory({"a": 1, "b": 1}, 1)
    m.use("a")
    other = m.cache.request("b")
    wait_for(lambda: m.cache.residence("a") is Residence.EVICTING)
    again = m.cache.request("a")
    m.cache.release("a")
    other.result(10)
    assert not again.done()
    m.cache.release("b")
    again.result(10)
    assert m.events == ["load a", "unload a", "load b", "unload b", "load a"]


def test_an_eviction_is_called_off_once_nobody_waits_for_the_room(memory):
    m = memory({"a": 1, "b": 1}, 1)
    m.use("a")
    other = m.cache.request("b")
    wait_for(lambda: m.cache.residence("a") is Residence.EVICTING)
    again = m.cache.request("a")
    m.cache.withdraw("b", other)
    again.result(10)
    assert m.events == ["load a"]
    with pytest.raises(CancelledError):
        other.result()


def test_withdrawing_from_a_loaded_model_releases_it(memory):
    m = memory({"a": 1, "b": 1}, 1)
    future = m.cache.request("a")
    future.result(10)
    m.cache.withdraw("a", future)
    m.touch("b")
    assert m.loaded == {"b"}


def test_what_loading_took_corrects_the_estimate(memory):
    m = memory({"a": 1, "b": 1, "c": 1}, 4, measured={"b": 3})
    m.touch("a", "b", "c")
    assert m.cache.size_bytes("b") == 3
    assert m.events == ["load a", "load b", "unload a", "load c"]


def test_a_model_that_takes_more_than_the_others_leave_evicts_them(memory):
    m = memory({"a": 2, "b": 1}, 3, measured={"b": 3})
    m.touch("a", "b")
    assert m.events == ["load a", "load b", "unload a"]


def test_memory_that_others_took_meanwhile_is_not_counted(memory):
    m = memory({"a": 1, "b": 1}, 9, measured={"b": 8})
    m.use("a")
    m.touch("b")
    assert m.cache.size_bytes("b") == 1


def test_a_model_that_turns_out_too_large_is_refused_in_words(memory):
    m = memory({"a": 1, "b": 10_000_000}, 30_000_000, pinned=["a"], measured={"b": 40_000_000})
    with pytest.raises(RequestRejected, match=r"b needs 40 MB, .* budget is 30 MB") as refused:
        m.cache.request("b").result(10)
    assert refused.value.cause == "memory" and refused.value.retry_after > 1
    with pytest.raises(RequestRejected):
        m.cache.request("b")
    assert m.loaded == set() and m.events == ["load b", "unload b"]
    m.touch("a")


def test_a_model_that_fails_to_load_is_tried_again_for_the_next_request(memory):
    m = memory({"a": 1}, 1, measured={"a": UsageError("broken")})
    with pytest.raises(UsageError, match="broken"):
        m.cache.request("a").result(10)
    m.measured.clear()
    m.touch("a")


def test_the_queue_for_a_model_is_bounded(memory):
    m = memory({"a": 1, "b": 1}, 1, max_waiting=2)
    m.gate.clear()
    futures = [m.cache.request("a") for _ in range(2)]
    with pytest.raises(RequestRejected, match="2 requests wait until model a is loaded") as refused:
        m.cache.request("a")
    assert refused.value.cause == "queue"
    m.gate.set()
    for future in futures:
        future.result(10)


def test_closing_rejects_everybody_who_waits(memory):
    m = memory({"a": 1, "b": 1}, 1)
    m.use("a")
    future = m.cache.request("b")
    m.cache.close()
    with pytest.raises(RequestRejected) as refused:
        future.result(10)
    assert refused.value.cause == "draining"
    with pytest.raises(RequestRejected):
        m.cache.request("a")


def test_idle_models_can_be_unloaded(memory):
    m = memory({"a": 1, "b": 1}, 2)
    m.use("a")
    assert not m.cache.evict_idle("a")
    m.cache.release("a")
    assert m.cache.evict_idle("a") and m.cache.evict_idle("b")
    assert m.loaded == set()
    m.touch("a")


@pytest.mark.parametrize(
    ("sizes", "pinned"),
    [({"a": 5}, []), ({"a": 2, "b": 3}, ["a"]), ({"a": 1}, ["unknown"])],
)
def test_what_can_never_fit_is_refused_at_start(sizes, pinned):
    with pytest.raises(UsageError) as refused:
        ModelCache(sizes, 4, pinned, lambda name: 0, lambda name: None, 1)
    assert refused.value.hint


def test_no_request_is_lost_and_the_budget_holds_among_many_threads(memory):
    sizes = {"a": 1, "b": 2, "c": 3, "d": 1}
    m = memory(sizes, 4, pinned=["d"])

    def work(seed):
        rng = random.Random(seed)
        for _ in range(60):
            name = rng.choice("abcd")
            future = m.cache.request(name)
            if rng.random() < 0.1:
                m.cache.withdraw(name, future)
                continue
            future.result(60)
            assert name in m.loaded
            if rng.random() < 0.3:
                m.cache.hold(name)
                m.cache.release(name)
            m.cache.release(name)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert m.largest <= 4 and "unload d" not in m.events
    assert all(not entry.users and not entry.waiting for entry in m.cache._entries.values())
