"""Pages of mapped files are given back, and read the same afterwards."""

import mmap
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import sdrt
from sdrt.engine.page_cache import DROP_SECONDS, MappedFileUsers, drop_pages, trim_heap

pytestmark = pytest.mark.integration

SIZE = 32 << 20


def resident(path):
    """Bytes of the file that are in this process's memory."""
    actual = inside = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and fields[0] == "Rss:":
            actual += int(fields[1]) * 1024
    return actual


def test_pages_go_and_come_again(tmp_path):
    path = tmp_path / "weights"
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    path.write_bytes(content.tobytes())
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped.sum() == content.sum() and resident(path) == SIZE
    drop_pages(path)
    assert resident(path) == 0
    assert np.array_equal(mapped, content)


def test_what_was_written_to_a_private_mapping_stays(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[0] = 7
        drop_pages(path)
        assert mapped[0] == 7


def test_of_what_is_not_mapped_or_not_there_nothing_else_goes(tmp_path):
    mapped = tmp_path / "weights"
    mapped.write_bytes(bytes(mmap.PAGESIZE))
    content = np.memmap(mapped, np.uint8, "r")
    assert content.sum() == 0 and resident(mapped) == mmap.PAGESIZE
    alone = tmp_path / "weights.old"
    alone.write_bytes(b"not mapped")
    for other in (alone, tmp_path / "away", tmp_path):
        drop_pages(other)
    assert resident(mapped) == mmap.PAGESIZE


def test_the_heap_gives_back_what_was_freed():
    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    cached = []
    for _ in range(20_000):  # of a size that the heap keeps
        cached.append(bytearray(5_000))
    del cached[:-1]
    before = resident_bytes()
    trim_heap()
    assert resident_bytes() < before - 10_000_000


def test_a_decoder_that_gives_back_draws_the_same(shapes, monkeypatch):
    openvino_cpu = pytest.importorskip("sdrt.engine.openvino.engine")
    with sdrt.load(shapes, backend="openvino") as pipe:
        draw = partial(pipe, "a red circle", num_inference_steps=2, seed=0)
        expected = draw().images[0].tobytes()
        monkeypatch.setattr(openvino_cpu, "LARGE", 1)
        assert [draw().images[0].tobytes() for _ in range(3)] == [expected] * 3


def test_pages_are_dropped_when_the_last_user_of_any_file_leaves(tmp_path, monkeypatch):
    dropped, users = [], MappedFileUsers()
    monkeypatch.setattr("sdrt.engine.page_cache.drop_pages", dropped.append)
    with users:
        with users:
            users.drop_pages(tmp_path)
        with users.dropping_pages(tmp_path / "packed"):
            pass
        assert not dropped
    assert sorted(dropped) == [tmp_path, tmp_path / "packed"]
    users.drop_pages(tmp_path)
    assert len(dropped) == 3


def test_pages_are_dropped_while_their_only_user_reads_them(tmp_path, monkeypatch):
    dropped, users = threading.Event(), MappedFileUsers()
    monkeypatch.setattr("sdrt.engine.page_cache.drop_pages", lambda path: dropped.set())
    with users.dropping_pages(tmp_path):
        assert dropped.wait(10)
    with users, users.dropping_pages(tmp_path):
        dropped.clear()
        assert not dropped.wait(4 * DROP_SECONDS)


ARENAS = """
import ctypes, sys, threading
from sdrt.engine.page_cache import limit_arenas
if len(sys.argv) > 2:
    limit_arenas(int(sys.argv[2]))
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
barrier = threading.Barrier(8)
def allocate():
    barrier.wait()
    libc.malloc(ctypes.c_size_t(1000))
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


def test_threads_share_heaps(tmp_path):
    heaps = []
    for limit in ([], ["2"]):
        path = tmp_path / "heaps.xml"
        subprocess.run([sys.executable, "-c", ARENAS, path, *limit], check=True, cwd=tmp_path)
        heaps.append(path.read_text().count("<heap nr="))
    assert heaps[0] > 2 >= heaps[1]
