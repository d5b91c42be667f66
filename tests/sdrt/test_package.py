"""The package as a whole: imports, layering, packaging."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sdrt

ROOT = Path(__file__).parents[2]
HEAVY = (
    "openvino",
    "torch",
    "transformers",
    "onnx",
    "tensorrt",
    "tensorrt_rtx",
    "onnxruntime",
    "diffusers",
    "fastapi",
    "starlette",
    "pydantic",
    "uvicorn",
    "prometheus_client",
)
SHARED = ("atomic_files", "bundle", "errors", "json_validation", "process_stats")
ALLOWED = {
    "engine": {*SHARED, "engine", "graphs"},
    "runtime": {*SHARED, "engine", "process_exit", "progress", "runtime", "version"},
    "export": {*SHARED, "engine", "export", "runtime"},
    "serve": {
        *(
            "version",
            "atomic_files",
            "bundle",
            "cli",
            "errors",
            "preprocessors",
            "runtime",
            "serve",
        ),
    },
}


@pytest.mark.parametrize("module", ["sdrt", "sdrt.runtime", "sdrt.cli", "sdrt.engine"])
def test_import_loads_nothing_heavy(module):
    code = f"import sys, json, {module}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & set(HEAVY)


def imports(path):
    """Absolute names that a file imports, relative ones left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            if node.module == "sdrt":
                yield from (f"sdrt.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_run_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            first, _, rest = name.partition(".")
            assert first not in ("engine", "export", "runtime", "serve"), (
                f"{path}: import sdrt.{name}"
            )
            if first == "sdrt" and rest:
                assert rest.split(".")[0] in ALLOWED[folder], f"{path} imports {name}"
            if folder == "runtime":
                assert first not in HEAVY, f"{path} imports {name}"


def modules():
    """Every module of the five packages and its file."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, folder in setup["package-dir"].items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def imported(module, path, known):
    """Modules of `known` that a file imports anywhere: at its top, for types, in functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{name}.{alias.name}"
                if full in known and not binds(known.get(name), alias.name):
                    yield full
                elif name in known:
                    yield name


def binds(path, name):
    """Whether a package's own file imports a name, which hides the module that is called so."""
    body = ast.parse(path.read_text()).body if path else []
    froms = [node for node in body if isinstance(node, ast.ImportFrom)]
    return any(name == (alias.asname or alias.name) for node in froms for alias in node.names)


def test_no_modules_import_each_other():
    known = dict(modules())
    graph = {m: set(imported(m, path, known)) - {m} for m, path in known.items()}
    assert len(graph) > 100 and sum(map(len, graph.values())) > 300
    while free := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, f"these import each other, or what does: {sorted(graph)}"


def test_every_folder_is_in_the_wheel():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    actual = set()
    for package, folder in setup["package-dir"].items():
        for path in (ROOT / folder).rglob("__init__.py"):
            inside = path.parent.relative_to(ROOT / folder).parts
            actual.add(".".join([package, *inside]))
    assert actual == set(setup["packages"])


def test_public_names_are_there():
    for name in sdrt.__all__:
        assert getattr(sdrt, name) is not None
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert sdrt.__version__ == version


def test_the_readmes_figures_are_the_committed_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "results.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
