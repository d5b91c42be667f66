"""ONNX Runtime's real CUDA provider without a GPU, over libraries that compute nothing.

Shows which nodes the provider takes and that it accepts a graph for CUDA graphs: partitioning,
types and opsets are its own code. Shows nothing about values, memory, speed or cuDNN. Needs the
package `onnxruntime-gpu`, unpacked (`make onnxruntime-gpu`), and a C compiler; runs in processes of
their own, since the package has the name of the CPU's.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from disk_cache import REPOSITORY

SOURCE = Path(__file__).with_name("stub_cudart.c")
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
# The library, and the beginnings of the functions that it has.
LIBRARIES = {
    "libcudart.so.13": r"cuda[A-Z]|__cuda",
    "libcublasLt.so.13": r"cublasLt",
    "libcublas.so.13": r"cublas(?!Lt)",
    "libcurand.so.10": r"curand",
    "libcuda.so.1": r"cu[A-Z]",
}


def package_folder() -> Path:
    """Where `onnxruntime-gpu` is unpacked: `$SDRT_ORT_GPU`, or a folder in `build`."""
    return Path(os.environ.get("SDRT_ORT_GPU", REPOSITORY / "build" / "onnxruntime-gpu"))


def explain_missing() -> str | None:
    """Why the provider cannot be tried here; None if it can."""
    if not (package_folder() / PROVIDER).exists():
        return "onnxruntime-gpu is not unpacked; run make onnxruntime-gpu"
    return None if shutil.which("gcc") and shutil.which("nm") else "no C compiler"


def build_libraries(folder: Path) -> None:
    """Write the libraries that the provider is linked with."""
    command = ["nm", "-D", "--undefined-only", str(package_folder() / PROVIDER)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = sorted({line.split()[-1].split("@")[0] for line in listed.splitlines()})
    own = set(re.findall(r"^[\w *]*?\b(\w+)\(", SOURCE.read_text(), re.MULTILINE))
    for library, pattern in LIBRARIES.items():
        source, script = folder / f"{library}.c", folder / f"{library}.map"
        others = [name for name in names if re.match(pattern, name) and name not in own]
        handles = [name for name in others if name.endswith(("Create", "Create_v2"))]
        code = [f"int {name}(void) {{ return 0; }}" for name in others if name not in handles]
        code += [f"int {n}(void **p) {{ static char h[64]; *p = h; return 0; }}" for n in handles]
        source.write_text("\n".join([*code, "int unused;", ""]))
        script.write_text(f"{library} {{ global: *; }};\n")
        sources = [str(source), *([str(SOURCE)] if library.startswith("libcudart") else [])]
        options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library}"]
        options.append(f"-Wl,--version-script={script}")
        subprocess.run(["gcc", *options, *sources, "-o", str(folder / library)], check=True)


def run_with_provider(libraries: Path, code: str, *arguments: str) -> str:
    """Run Python code in a process in which `onnxruntime` is the package for GPUs; returns what it
    wrote to standard output.
    """
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    environment["PYTHONPATH"] = str(package_folder())
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
