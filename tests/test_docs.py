"""The documentation keeps its word: code blocks run, and what it names exists.

A block in README or docs/ runs unless the line before it is `<!-- no-run: REASON -->`; with
`<!-- slow -->` it runs in `make test-full`. The blocks of a page run in order in one folder.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdrt.cli.main import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = [ROOT / name for name in ("CONTRIBUTING.md", "STYLE.md", "CHANGELOG.md", "SECURITY.md")]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.S
)
FOLDERS = ("benchmarks", "docs", "engine", "export", "runtime", "sdrt", "serve", "tests", "tools")
NAMED = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
QUICK = ("README.md", "docs/guides/python-api.md")  # in the default suite
# Written when the site is built.
GENERATED = {"cli.md", "changelog.md", "contributing.md", "security.md", "style.md", "shapes.md"}


@dataclass(frozen=True, slots=True)
class Block:
    page: str
    mark: str
    language: str
    code: str


def find_blocks(page):
    text = page.read_text("utf-8")
    name = str(page.relative_to(ROOT))
    return [Block(name, m["mark"] or "", m["language"], m["code"]) for m in BLOCK.finditer(text)]


BLOCKS = [block for page in PAGES for block in find_blocks(page)]


def runnable(name, slow):
    blocks = [block for block in BLOCKS if block.page == name and "no-run" not in block.mark]
    return [block for block in blocks if ("slow" in block.mark) == slow]


def run_blocks(blocks, folder, home):
    """Run them in order, each in a process of its own."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SDRT_HOME": str(home),
    }
    for block in blocks:
        command = [sys.executable, "-"] if block.language == "python" else ["bash", "-e"]
        done = subprocess.run(
            command, input=block.code, cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block.page}:\n{block.code}\n{done.stdout}{done.stderr}"


def pages(slow):
    names = sorted({block.page for block in BLOCKS if runnable(block.page, slow)})
    marks = {name: [] if name in QUICK and not slow else [pytest.mark.slow] for name in names}
    return [pytest.param(name, marks=marks[name], id=name) for name in names]


@pytest.mark.integration
@pytest.mark.parametrize("name", pages(slow=False))
def test_the_code_of_a_page_runs(name, shapes, home, tmp_path):
    run_blocks(runnable(name, slow=False), tmp_path, home)


@pytest.mark.parametrize("name", pages(slow=True))
def test_the_slow_code_of_a_page_runs(name, home, tmp_path):
    run_blocks(runnable(name, slow=True), tmp_path, tmp_path / "home")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.page)
def test_python_and_commands_are_well_formed(block):
    if block.language == "python":
        ast.parse(block.code)
        return
    for line in block.code.replace("\\\n", " ").splitlines():
        command, *_ = re.split(r"\s(?:\d?>|[|&])", line)
        words = shlex.split(command, comments=True)
        if words[:1] == ["sdrt"]:
            assert build_parser().parse_args(words[1:]).command, line


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark], ids=lambda block: block.page)
def test_a_mark_has_a_reason(block):
    assert re.fullmatch(r"no-run: \S.+|slow", block.mark)


@pytest.mark.parametrize("page", [*PAGES, *PROJECT], ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page):
    text = page.read_text("utf-8")
    paths = [path for path in NAMED.findall(text) if not path.startswith("benchmarks/results/")]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *PROJECT], ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text("utf-8"))]
    missing = [link for link in links if not (page.parent / link).exists()]
    linked = GENERATED - {"cli.md"}  # a reader of the repository has no such page
    assert [link for link in missing if Path(link).name not in linked] == []


def model_rows():
    text = (ROOT / "docs" / "reference" / "models.md").read_text("utf-8")
    rows = text.split("<!-- models: begin -->")[1].split("<!-- models: end -->")[0].strip()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows.splitlines()[2:]]
    return [(title, command.strip("`"), test.strip("`")) for title, command, test in cells]


def test_the_table_of_models_is_read():
    assert len(model_rows()) >= 18


@pytest.mark.parametrize("row", model_rows(), ids=lambda row: row[0])
def test_every_model_has_a_command_and_a_test(row):
    _, command, test = row
    program, *arguments = shlex.split(command)
    assert program == "sdrt" and build_parser().parse_args(arguments).command
    file, name = test.split("::")
    functions = ast.walk(ast.parse((ROOT / "tests" / file).read_text("utf-8")))
    assert name in {f.name for f in functions if isinstance(f, ast.FunctionDef)}


def test_every_page_is_in_the_navigation():
    listed = set(
        re.findall(r"[ :-] ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    )
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    generated = {page for page in listed - pages if Path(page).name in GENERATED}
    assert listed - generated == pages


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 180


def test_every_result_is_shown_and_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results

    shown = set()
    for page in results.PAGES:
        assert results.fill(page) == page.read_text("utf-8"), f"{page.name}: run make report"
        for names in re.findall(r"<!-- results: ([\w ]+) -->", page.read_text("utf-8")):
            shown |= set(names.split())
    assert shown - {"end", "summary"} == {path.stem for path in results.FOLDER.glob("*.json")}
