"""A strict stand-in of the CUDA driver: `libcuda.so.1`, compiled from `libcuda.c`, under the real
cuda-bindings and the real NVRTC. Kernels are compiled a second time by g++, from the same source.

It shows that the driver is called in a legal order with arguments that survive the bindings: live
blocks of the right kind and size, a current context, no forbidden call during a capture, nothing
freed while it is in use, errors handled at every call. The bytes that come out are those of the
project's own CUDA source, run thread after thread on the CPU.

It does NOT show that anything is right or fast on a GPU: no kernel runs in parallel, there are no
races between threads, blocks or streams, no warp, no unified addressing, no driver's own bugs or
limits, no real cost of memory. Errors come where a test injects them, not where a GPU has them.
What passes here has not run on a GPU.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from disk_cache import cache_folder, cached

HERE = Path(__file__).parent
TARGET = "sm_89"
FLAGS = ("-O1", "-g", "-fPIC", "-shared")
SHIM = """
#include <cmath>
#include <dlfcn.h>
#define __global__
#define __device__
static struct { unsigned x; } blockIdx, blockDim, threadIdx;
struct Address { void* p; template <class T> operator T*() { return (T*)p; } };
"""
HALF = """
typedef unsigned short REAL;
static float to_float(REAL h) { _Float16 f; __builtin_memcpy(&f, &h, 2); return (float)f; }
static REAL from_float(float f) { _Float16 g = (_Float16)f; REAL h; __builtin_memcpy(&h, &g, 2); return h; }
"""  # noqa: E501
LAUNCH = """
extern "C" const char kinds_{name}[] = "{kinds}";
extern "C" void launch_{name}(unsigned blocks, unsigned threads, void** p) {{
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) {name}({values});
}}
"""
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\((.*?)\)\s*\{', re.DOTALL)
READ = {"p": "Address{{*(void**)p[{i}]}}", "i": "*(int*)p[{i}]", "f": "*(float*)p[{i}]"}
# What a GPU answers with CUDA_ERROR_ILLEGAL_ADDRESS, in the way of the stand-in.
FAULT = 'extern "C" __global__ void bad() { *(int*)8 = 1; }'
HOST_FAULT = """extern "C" __global__ void bad() {
    ((void (*)())dlsym(dlopen("libcuda.so.1", RTLD_NOW), "rig_illegal_access"))();
}"""


def explain_unavailable() -> str | None:
    """Why the rig cannot run here; None if it can."""
    for compiler in ("gcc", "g++"):
        if shutil.which(compiler) is None:
            return f"{compiler} is not installed"
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return "the machine has a CUDA driver of its own"
    return None


def compile_library(compiler: str, source: str | Path, name: str, *options: str) -> Path:
    """A shared library in the tests' cache; source: a file, or C++ text."""
    text = source.read_text() if isinstance(source, Path) else source
    key = hashlib.sha256("\0".join((compiler, text, name, *options, *FLAGS)).encode()).hexdigest()

    def write(folder: Path) -> None:
        (folder / "source.c").write_text(text)
        language = "c++" if compiler == "g++" else "c"
        command = [compiler, *FLAGS, "-x", language, str(folder / "source.c")]
        subprocess.run([*command, "-o", str(folder / name), *options], check=True)

    with cached(cache_folder() / "rigs", key, write) as folder:
        return folder / name


def host_source(source: str) -> str:
    """CUDA source as C++ for the host, with a launcher for every kernel."""
    from sdrt.engine.cuda import kernels

    if source == FAULT:
        source = HOST_FAULT
    text = SHIM + source.replace(kernels.HALF, HALF)
    for name, parameters in KERNEL.findall(source):
        declared = re.sub(r"//[^\n]*", "", parameters)
        kinds = "".join(
            "p" if "*" in p else "f" if "float" in p else "i"
            for p in declared.split(",")
            if p.strip()
        )
        values = ", ".join(READ[kind].format(i=i) for i, kind in enumerate(kinds))
        text += LAUNCH.format(name=name, kinds=kinds, values=values)
    return text


def add_kernels(folder: Path, source: str) -> None:
    """Let the stand-in run the cubin that NVRTC makes of a source."""
    from sdrt.engine.cuda.compiler import compile_cuda

    value = 1469598103934665603
    for byte in compile_cuda(source, TARGET):
        value = (value ^ byte) * 1099511628211 % 2**64
    library = compile_library("g++", host_source(source), "kernels.so", "-std=c++17")
    link, other = folder / f"{value:016x}.so", folder / f"{os.getpid()}.link"
    other.symlink_to(library)
    other.replace(link)


class Rig:
    """The loaded stand-in, as tests see it."""

    def __init__(self) -> None:
        driver = compile_library(
            "gcc", HERE / "libcuda.c", "libcuda.so.1", "-Wl,-soname,libcuda.so.1", "-lpthread"
        )
        nvml = compile_library(
            "gcc", HERE / "nvml.c", "libnvidia-ml.so.1", "-Wl,-soname,libnvidia-ml.so.1"
        )
        self.kernels = cache_folder() / "rigs" / "kernels"
        self.kernels.mkdir(parents=True, exist_ok=True)
        os.environ["SDRT_RIG_KERNELS"] = str(self.kernels)
        libraries = [str(driver.parent), str(nvml.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))  # for child processes
        # Whoever asks for the library by its name gets the one that is loaded.
        self.library = ctypes.CDLL(str(driver), ctypes.RTLD_GLOBAL)
        self._nvml = ctypes.CDLL(str(nvml), ctypes.RTLD_GLOBAL)
        self.library.rig_used.restype = ctypes.c_size_t
        self.library.rig_set_total.argtypes = [ctypes.c_size_t]
        for name in ("rig_last_violation", "rig_failed_in"):
            getattr(self.library, name).restype = ctypes.c_char_p

    @property
    def violation(self) -> str | None:
        """The last thing that a driver does not allow, if there was any."""
        text: bytes = self.library.rig_last_violation()
        return text.decode() if self.library.rig_violations() else None

    @property
    def failed_in(self) -> str:
        """The function in which an injected error came; empty before."""
        text: bytes = self.library.rig_failed_in()
        return text.decode().removeprefix("f_")

    @property
    def used(self) -> int:
        """Bytes of device memory that are allocated."""
        return int(self.library.rig_used())

    @property
    def calls(self) -> int:
        return int(self.library.rig_calls())

    @property
    def launches(self) -> int:
        """Graphs that were launched."""
        return int(self.library.rig_launches())

    @property
    def graphs(self) -> int:
        """Graphs, captured or executable, that nobody has destroyed."""
        return int(self.library.rig_graphs())

    @property
    def modules(self) -> int:
        """Modules that are loaded."""
        return int(self.library.rig_modules())

    def fail_after(self, calls: int, code: int) -> None:
        """Let the driver's call after so many others return an error."""
        self.library.rig_fail_after(calls, code)

    def fail_allocation(self, allocations: int) -> None:
        """Let the allocation after so many others find no memory."""
        self.library.rig_fail_allocation(allocations)

    def set_total(self, size: int) -> None:
        """The device's memory in bytes."""
        self.library.rig_set_total(size)


_rig: list[Rig] = []


def load_rig() -> Rig:
    """The process's rig; skip where `explain_unavailable` says why it cannot be had."""
    if not _rig:
        _rig.append(Rig())
    return _rig[0]


def loaded_rig() -> Rig | None:
    """The rig, if it is what the process has for a driver."""
    return _rig[0] if _rig else None
