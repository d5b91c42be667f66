"""SECURITY.md's table, the list of mutations and the tests, held to each other."""

import ast
import functools
from pathlib import Path

import mutations
import pytest

ROOT = Path(__file__).parents[2]
LISTED = mutations.read_list()


@functools.cache
def functions(file):
    """Names in a file, those in classes as `Class.name`."""
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    names = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
    for result in ast.walk(tree):
        if isinstance(result, ast.ClassDef):
            names |= {
                f"{result.name}.{node.name}" for node in result.body if isinstance(node, kinds)
            }
    return names


def test_the_table_is_the_lists():
    said = "run python tools/mutations.py --table"
    assert mutations.PAGE.read_text("utf-8") == mutations.page_with_table(LISTED), said
    assert len({mutation.attack for mutation in LISTED}) == len(LISTED) >= 20


@pytest.mark.parametrize("mutation", LISTED, ids=lambda mutation: mutation.attack)
def test_every_row_has_its_check_and_its_test(mutation):
    assert mutation.applied(ROOT) != (ROOT / mutation.file).read_text("utf-8")
    _, function = mutation.check.split("::")
    assert function in functions(mutation.file)
    file, name = mutation.test.split("::")
    assert name.partition("[")[0] in functions(file)


def test_text_that_is_not_there_once_is_reported():
    first = LISTED[0]
    for text in ("no such text", "\n"):
        odd = mutations.Mutation("b", "a", first.check, first.test, text, "")
        with pytest.raises(ValueError, match="not once"):
            odd.applied(ROOT)
