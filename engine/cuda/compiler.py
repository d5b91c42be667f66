"""CUDA source compiled at run time by NVRTC. Knows NVRTC; no GPU is needed.

Not yet run on a GPU.
"""

import functools
from collections.abc import Sequence
from typing import Any

from sdrt.errors import BackendError

INSTALL = "pip install 'nvidia-cuda-nvrtc{suffix}'"


@functools.cache
def compile_cuda(source: str, target: str) -> bytes:
    """Compile CUDA source to a cubin for a compute capability such as sm_89, once in a process;
    needs no GPU.

    Raises BackendError with the compiler's log.
    """
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"sdrt.cu", 0, [], []))
    options = [f"--gpu-architecture={target}".encode(), b"--fmad=true"]
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise BackendError(f"a kernel failed to compile for {target}: {log.decode()}")
        code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def explain_unavailable(cuda_version: Sequence[int] | None) -> str | None:
    """Why no kernel can be compiled here; None if one can.

    Args:
        cuda_version: The newest CUDA that the driver serves. A cubin runs on drivers of the
            compiler's major version and later ones.
    """
    version = _version()
    major = cuda_version[0] if cuda_version else None
    suffix = f"-cu{major}" if major and major < 13 else ""
    if version is None:
        return f"NVRTC, CUDA's compiler, is not installed; {INSTALL.format(suffix=suffix)}"
    if major and version[0] > major:
        return (
            f"NVRTC {version[0]}.{version[1]} compiles for drivers of CUDA {version[0]}, this one "
            f"serves {major}; {INSTALL.format(suffix=suffix)}"
        )
    return None


@functools.cache
def _version() -> tuple[int, int] | None:
    """NVRTC's version; None where the bindings do not find it."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError):
        return None
    return None if status != nvrtc.nvrtcResult.NVRTC_SUCCESS else (int(major), int(minor))


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise BackendError(f"NVRTC failed: {status.name}")
    return values[0] if values else None
