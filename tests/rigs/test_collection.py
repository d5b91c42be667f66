"""The tests of GPUs need little besides a GPU: they are collected where development packages are
missing, and those without TensorRT run with cuda-bindings, NVRTC and numpy.
"""

import os
import subprocess
import sys

import driver_rig
import pytest
from disk_cache import REPOSITORY

DEVELOPMENT = (
    "cyclonedx,diffusers,fastapi,httpx,matplotlib,mypy,openai,openvino,peft,playwright,prometheus_client,"
    "schemathesis,scipy,starlette,tensorrt,tensorrt_rtx,torchsde,tritonclient,uvicorn,webuiapi,xdist"
)
ENGINES = "onnx,onnx_ir,onnxruntime,onnxscript,safetensors,tokenizers,torch,transformers"


def run_pytest(blocked, *arguments):
    environment = {
        **os.environ,
        "SDRT_BLOCKED": blocked,
        "PYTHONPATH": str(driver_rig.HERE),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "blocked_packages", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)


@pytest.mark.parametrize(
    ("file", "blocked"),
    [
        ("tests/test_gpu.py", DEVELOPMENT),
        ("tests/test_gpu_loop.py", f"{DEVELOPMENT},{ENGINES}"),
    ],
)
def test_the_tests_of_gpus_are_collected_without_development_packages(file, blocked):
    done = run_pytest(blocked, "-m", "gpu", "--collect-only", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests collected" in done.stdout


@pytest.mark.rest
def test_a_run_without_tensorrt_needs_the_bindings_and_numpy_alone():
    if reason := driver_rig.explain_unavailable():
        pytest.skip(reason)
    select = ("-m", "rig", "-k", "part_of_the_launch", "tests/test_gpu_loop.py")
    done = run_pytest(f"{DEVELOPMENT},{ENGINES}", *select)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
