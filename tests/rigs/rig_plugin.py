"""The rigs under a run of pytest: `pytest -m rig`. The process and its children get the stand-ins
of the driver (`driver_rig`) and of TensorRT for RTX (`runtime_rig`) before anything looks for one,
and the tests of `test_gpu.py` that fit take part: TensorRT for RTX in single precision.

Nothing that runs this way has run on a GPU.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import driver_rig
import pytest

HERE = Path(__file__).parent
# Of test_gpu.py, what a stand-in cannot answer.
EXCLUDED = {
    "test_attention_is_fused_as_the_inspector_tells": "it has no layers",
    "test_the_budget_is_what_is_taken": "its scratch memory is made up",
}


def load() -> None:
    """Put the stand-ins in place; called before anything imports cuda-bindings."""
    paths = [HERE / "modules", HERE, HERE.parent / "helpers"]
    sys.path.insert(0, str(paths[0]))
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = ":".join(filter(None, [*map(str, paths), known]))
    rig = driver_rig.load_rig()
    import kernel_plan

    from sdrt.engine.cuda.kernels import kernel_source

    own = map(kernel_source, ("float32", "float16"))
    for source in (*own, *kernel_plan.sources(), driver_rig.FAULT):
        driver_rig.add_kernels(rig.kernels, source)


def pytest_configure(config: pytest.Config) -> None:
    # Workers of xdist inherit what the process that started them puts in place, and would take the
    # stand-in for a driver of the machine's own.
    starts_workers = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not starts_workers and driver_rig.explain_unavailable() is None:
        load()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = driver_rig.explain_unavailable() if driver_rig.loaded_rig() is None else None
    for item in items:
        if item.path.name == "test_gpu.py" and fits(item):
            item.add_marker("rig")
        if item.path.name == "test_gpu_loop.py":
            item.add_marker("rig")
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"the rig cannot run: {reason}"))


def fits(item: pytest.Item) -> bool:
    """Whether the rig can take a test of `test_gpu.py`."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    kinds = {parameters.get("planned"), parameters.get("backend")} - {None}
    name = getattr(item, "originalname", item.name)
    return (
        parameters.get("bundle") == "float32" and kinds == {"tensorrt-rtx"} and name not in EXCLUDED
    )


@pytest.fixture(autouse=True)
def satisfied_rig() -> Iterator[None]:
    """After every test: nothing was done that a driver or TensorRT does not allow."""
    from runtime_rig import problems

    yield
    rig = driver_rig.loaded_rig()
    assert rig is not None
    violation = rig.violation
    rig.library.rig_forget_violations()
    said = list(problems)
    problems.clear()
    assert violation is None and said == []


@pytest.fixture
def rig() -> driver_rig.Rig:
    loaded = driver_rig.loaded_rig()
    assert loaded is not None
    return loaded
