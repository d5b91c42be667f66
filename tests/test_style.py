"""The words of STYLE.md's glossary, searched for in code, documentation and the server's page.

    python tests/test_style.py FILE...      # list the uses in these files or folders

Python is read by its syntax: strings, comments, and the names that are defined. All other text is
read as it stands.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STYLE = (ROOT / "STYLE.md").read_text("utf-8")
READ = (".py", ".md", ".html", ".js", ".css", ".toml", ".yml", ".yaml", ".cff", "Makefile")
SKIPPED = ("STYLE.md", "THIRD_PARTY.md", "tests/test_style.py", "tests/corpus/*", "*.svg")


def read_table(name: str) -> list[list[str]]:
    """The cells of a table of STYLE.md, without its head."""
    rows = STYLE.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in rows.strip().splitlines()[2:]
    ]


def read_terms(column: int) -> dict[str, str]:
    """Banned term -> our word."""
    return {
        term: row[1]
        for row in read_table("glossary")
        for term in re.findall(r"`([^`]+)`", row[column])
    }


ANYWHERE, AS_A_NAME = read_terms(2), read_terms(3)
ALLOWED = [[cell.strip("`") for cell in row[:2]] for row in read_table("allowed")]
BANNED = re.compile(
    r"(?<![a-z])("
    + "|".join(map(re.escape, sorted(ANYWHERE, key=len, reverse=True)))
    + r")(?![a-z])"
)


def split_words(text: str) -> str:
    """Lower-case words: `PictureOf_two` is `picture of two`."""
    return " ".join(re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text).replace("_", " ").lower().split())


def find_in_text(text: str) -> Iterator[tuple[str, str]]:
    for term in BANNED.findall(split_words(text)):
        yield term, ANYWHERE[term]


def find_in_name(name: str) -> Iterator[tuple[str, str]]:
    yield from find_in_text(name)
    bare = name.strip("_").lower()
    for pattern, better in AS_A_NAME.items():
        if fnmatch(bare, pattern):
            yield name, better


def defined_names(node: ast.AST) -> Iterator[str]:
    """The names that a piece of syntax defines."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield node.name
        case ast.arg():
            yield node.arg
        case ast.Name(ctx=ast.Store()):
            yield node.id
        case ast.Attribute(ctx=ast.Store()):
            yield node.attr
        case ast.alias(asname=str()):
            yield str(node.asname)


def find_in_python(text: str, allowed: Iterable[str] = ()) -> Iterator[tuple[int, str, str]]:
    for node in ast.walk(ast.parse(text)):
        for name in defined_names(node):
            name = remove_allowed(name, allowed)
            for term, better in find_in_name(name):
                yield node.lineno, term, better  # type: ignore[attr-defined]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for number, line in enumerate(remove_allowed(node.value, allowed).splitlines()):
                for term, better in find_in_text(line):
                    yield node.lineno + number, term, better
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            for term, better in find_in_text(token.string):
                yield token.start[0], term, better


def remove_allowed(value: str, allowed: Iterable[str]) -> str:
    """A string without allowed texts; one in quotes is the string's beginning, or all of it."""
    for text in allowed:
        if not text.startswith('"'):
            value = value.replace(text, "")
        elif f'"{value}"' == text or (not text.endswith('"') and value.startswith(text[1:])):
            return ""
    return value


def find_in_file(path: Path) -> list[tuple[int, str, str]]:
    """Line, banned term and our word of each use in a file."""
    name = str(path.relative_to(ROOT))
    allowed = [text for text, where in ALLOWED if fnmatch(name, where)]
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return sorted(set(find_in_python(text, allowed)))
    for words in allowed:
        text = text.replace(words, "")
    lines = enumerate(text.splitlines(), 1)
    return [(number, *hit) for number, line in lines for hit in find_in_text(line)]


def list_files(places: Iterable[str] = ()) -> list[Path]:
    """The tracked and new files that are read, of the whole project or under some places."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *places]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [
        ROOT / name
        for name in listed.splitlines()
        if name.endswith(READ) and not any(fnmatch(name, skipped) for skipped in SKIPPED)
        if (ROOT / name).is_file()
    ]


@pytest.fixture(scope="module")
def counted() -> Counter[str]:
    count: Counter[str] = Counter()
    for path in list_files():
        top, *rest = path.relative_to(ROOT).parts
        count[top if rest else "."] += len(find_in_file(path))
    return count


def test_no_banned_word_is_used(counted):
    assert not +counted, "run python tests/test_style.py FOLDER and use the words of STYLE.md"


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ('def told_of():\n    """One picture."""\n', ["picture", "told", "told_of"]),
        ("whole = 1  # the whole image\n", ["whole"]),
        ("made_of = untoldly(x)\nx.Kept = 2\n", ["Kept"]),
        ('raise E(f"{size} is none of {sizes}")\n', ["is none of"]),
        ("class PictureView:\n    clean: int\n", ["clean", "picture"]),
    ],
)
def test_what_is_found(text, terms):
    assert sorted(term for _, term, _ in find_in_python(text)) == sorted(terms)


def main(places: list[str]) -> int:
    total = 0
    for path in list_files(places):
        for line, term, better in find_in_file(path):
            total += 1
            sys.stdout.write(f"{path.relative_to(ROOT)}:{line}: {term} -> {better}\n")
    sys.stdout.write(f"{total} in all\n")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
