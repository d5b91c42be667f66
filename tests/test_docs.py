"""What the documentation names is there: files, commands, tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "engine", "export", "runtime", "sdrt", "serve", "tests", "tools")
NAMED = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "STYLE.md"])
def test_the_files_that_a_page_names_are_there(page):
    paths = NAMED.findall((ROOT / page).read_text("utf-8"))
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
