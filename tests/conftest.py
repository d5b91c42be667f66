"""What tests share: a home of their own, a tiny checkpoint made in code, the embedded bundle."""

import gc
import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from disk_cache import cache_folder, prune
from tiny_checkpoints import write_tiny, write_tiny_refiner, write_tiny_xl

# Before any test file imports what reads it: no test reaches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Workers that compute side by side each have a core, not all of them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts what runs in its background deaf to Ctrl-C, which children would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """The rigs replace the CUDA driver of the process, so they have a run of their own."""
    if config.option.markexpr == "rig":
        import rig_plugin

        config.pluginmanager.register(rig_plugin, "rig")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what needs exported graphs, and begin with the files that take longest, so that no
    worker waits for the other at the end, and none for a graph that the other exports.
    """
    for item in items:
        if "build_once" in item.fixturenames:
            item.add_marker("exports")
    leave_samples(items)
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    items[:] = [
        item for file in sorted(files, key=lambda f: rank(files[f])) for item in files[file]
    ]


def leave_samples(items):
    """Mark `grid` all but `sample(count)` of a test's parameter sets, the same in every run."""
    tests = {}
    for item in items:
        if mark := item.get_closest_marker("sample"):
            tests.setdefault((item.path.name, item.originalname, mark.args[0]), []).append(item)
    for (*name, count), every in tests.items():
        left = random.Random("::".join(name)).sample(every, min(count, len(every)))
        for item in every:
            if item not in left:
                item.add_marker("grid")


def rank(items):
    """Of a file among those of a run: own builds, shared builds, what else takes seconds, many
    tests.
    """
    needs = {name for item in items for name in item.fixturenames}
    exports, shared = "build_once" in needs, needs & {"tiny_bundle", "tiny_xl_bundle"}
    long = any(item.get_closest_marker(m) for item in items for m in ("integration", "browser"))
    return (not exports or bool(shared), not exports, not long, -len(items))


def pytest_collection_finish():
    """What the libraries have made by now stays: no collection of garbage need look at it again.

    pytest listens to loggers that do not propagate. torch takes that for a wish to trace what it
    exports, with a stack for each symbol, which takes longer than the export.
    """
    gc.collect()
    gc.freeze()
    logging.getLogger("torch.__trace").propagate = True


def pytest_sessionfinish():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        prune(cache_folder() / "exports")


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """SDRT_HOME for all tests and their subprocesses."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("home")
    patch.setenv("SDRT_HOME", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def leftovers(home):
    """No test file finds the LoRA files of another by name, or fills the disk for the next."""
    yield
    for name in ("loras", "converted"):
        shutil.rmtree(home / name, ignore_errors=True)


@pytest.fixture(autouse=True)
def handlers():
    """The command line logs to the stream of its test; its handler and level go with that."""
    yield
    logging.getLogger("sdrt").setLevel(logging.NOTSET)
    root = logging.getLogger()
    for handler in [entry for entry in root.handlers if type(entry) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def shapes(home, tmp_path_factory):
    """A copy of the embedded model's bundle, as if it had been built."""
    from sdrt.bundle.embedded import materialize

    bundle = materialize("shapes", tmp_path_factory.mktemp("embedded"))
    return Path(shutil.copytree(bundle, home / "bundles" / "shapes"))


@pytest.fixture(scope="session")
def pipe(shapes):
    import sdrt

    with sdrt.load(shapes, backend="onnxruntime") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def embedded():
    from sdrt.export.checkpoint import embedded_checkpoint

    return embedded_checkpoint("shapes")


@pytest.fixture(scope="session")
def build_once(home):
    """`build_bundle` of components that are exported once. What uses it is marked `exports`."""
    from exports import built

    return built


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, embedded):
    """A checkpoint of a few thousand random weights, in the hub's layout."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny", embedded)


@pytest.fixture(scope="session")
def tiny_bundle(tiny, tmp_path_factory, build_once):
    """Its bundle in two sizes."""
    target = tmp_path_factory.mktemp("built") / "tiny"
    return build_once(str(tiny), target, sizes=((32, 32), (48, 32)), batch=(1, 1, 2))


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory, embedded):
    return write_tiny_xl(tmp_path_factory.mktemp("tiny_xl") / "tiny-xl", embedded)


@pytest.fixture(scope="session")
def tiny_xl_bundle(tiny_xl, build_once):
    target = tiny_xl.parent / "tiny-xl-bundle"
    return build_once(str(tiny_xl), target, sizes=((32, 32), (48, 32)))


@pytest.fixture(scope="session")
def tiny_refiner(tmp_path_factory, embedded):
    return write_tiny_refiner(tmp_path_factory.mktemp("tiny_refiner") / "tiny-refiner", embedded)


@pytest.fixture(scope="session")
def tiny_refiner_bundle(tiny_refiner, build_once):
    target = tiny_refiner.parent / "tiny-refiner-bundle"
    return build_once(str(tiny_refiner), target, sizes=((32, 32),))


@pytest.fixture
def vocabulary(tiny):
    return len(json.loads((tiny / "tokenizer" / "vocab.json").read_text()))


@pytest.fixture
def written(tiny, tmp_path):
    """A function that writes tensors as a file next to a tokenizer, and gives its path."""
    from safetensors.torch import save_file

    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")

    def write(tensors, name="model.safetensors", **options):
        save_file(tensors, tmp_path / name, **options)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def server(shapes):
    """A server of the embedded model, with the settings that it has by default."""
    from serving import run_server

    with run_server(shapes) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    from browsing import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def page(browser, server):
    """The server's page, loaded."""
    from browsing import open_page, wait_until_loaded

    with open_page(browser, server) as page:
        yield wait_until_loaded(page)
