"""The README's table of families and tasks: every command is one, every test is there."""

import ast
import shlex
from pathlib import Path

import pytest

from sdrt.cli.main import parser

ROOT = Path(__file__).parents[1]


def rows():
    text = (ROOT / "README.md").read_text("utf-8")
    table = text.split("## Families and tasks")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [tuple(cell.strip().strip("`") for cell in line.split("|")[1:-1]) for line in lines[1:]]


def test_the_table_is_there():
    assert len(rows()) >= 18


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_has_a_command_and_a_test(row):
    _, command, test = row
    program, *arguments = shlex.split(command)
    assert program == "sdrt" and parser().parse_args(arguments).command
    file, name = test.split("::")
    functions = ast.walk(ast.parse((ROOT / "tests" / file).read_text("utf-8")))
    assert name in {f.name for f in functions if isinstance(f, ast.FunctionDef)}
