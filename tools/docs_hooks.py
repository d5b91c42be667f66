"""What `mkdocs build` writes besides the pages of docs/, as hooks of mkdocs.

Knows mkdocs' events. The command line's reference comes from its parser, the layout from module
docstrings, and the project's own Markdown files become pages, so that none of them can go stale.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "build" / "docs"
PROJECT_PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "style.md": "STYLE.md",
    "third-party.md": "THIRD_PARTY.md",
    "shapes.md": "sdrt/models/shapes/README.md",
}
PACKAGES = ("sdrt", "engine", "runtime", "export", "serve")
RESULTS = "benchmarks/results"
LAYOUT = "<!-- layout -->"
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
SHORT_CODE = 24  # characters that are not broken over lines
MATHML: dict[str, str] = {}  # of the page that is being rendered, by placeholder


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Copy the package as it is installed: mkdocstrings follows neither mapping nor links."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "tools" / "link_package.py"), folder]
        subprocess.run(command, check=True)
        only_python = shutil.ignore_patterns("models", "page", "__pycache__")
        shutil.copytree(folder, PACKAGE, ignore=only_python)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference/cli.md", content=command_line_page()))
    for page, source in PROJECT_PAGES.items():
        text = link_to_pages((ROOT / source).read_text("utf-8"))
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / RESULTS).glob("*.[sp][vn]g")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/ lead to the same file's place in the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(f"{up}../{RESULTS}/", f"{up}results/")
    for target, source in PROJECT_PAGES.items():
        markdown = markdown.replace(f"]({up}../{source}", f"]({up}{target}")
    markdown = markdown.replace(LAYOUT, layout_table()) if LAYOUT in markdown else markdown
    if markdown.count("\n## ") < 2:  # the width is for tables
        page.meta["hide"] = [*page.meta.get("hide", []), "toc"]
    MATHML.clear()
    return FORMULA.sub(stash_formula, markdown) if "$$" in markdown else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    for placeholder, formula in MATHML.items():
        html = html.replace(placeholder, formula)
    return CODE.sub(allow_breaks, html)


def allow_breaks(match: re.Match[str]) -> str:
    """Code in a line may break after a sign between words, so that tables fit their page."""
    if len(match[0]) <= SHORT_CODE:
        return f"<span>{match[0]}</span>"
    return re.sub(r"(::|[/_=,.])(?=\w)", r"\1<wbr>", match[0])


def stash_formula(match: re.Match[str]) -> str:
    """A placeholder for a formula, which browsers show as MathML without any script."""
    placeholder = f"FORMULA{len(MATHML)}END"
    display = "block" if match[1] else "inline"
    MATHML[placeholder] = convert((match[1] or match[2]).strip(), display=display)
    return placeholder


def link_to_pages(text: str) -> str:
    """A file of the project's root, with links that work from the site's root."""
    text = re.sub(r"\]\(docs/", "](", text)
    for target, source in PROJECT_PAGES.items():
        text = text.replace(f"]({source})", f"]({target})")
    return text


def layout_table() -> str:
    """A table for each package: file, and the first sentence of its docstring."""
    lines: list[str] = []
    for package in PACKAGES:
        lines += [f"\n## `{package}/`\n", "| file | what it holds |", "|---|---|"]
        for path in sorted((ROOT / package).rglob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            summary = " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")
            if summary:
                lines.append(f"| `{path.relative_to(ROOT)}` | {summary} |")
    return "\n".join(lines)


def command_line_page() -> str:
    """The help of every command, as `sdrt COMMAND --help` prints it."""
    os.environ["COLUMNS"] = "80"
    from sdrt.cli.main import build_parser

    lines = ["# Command line", "", "What `sdrt COMMAND --help` prints, for every command.", ""]
    for name, command in [("sdrt", build_parser()), *find_commands(build_parser())]:
        lines += [f"## {name}", "", "```text", command.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def find_commands(
    parent: argparse.ArgumentParser, name: str = "sdrt"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parent._actions:
        if isinstance(action, argparse._SubParsersAction):
            choices: dict[str, Any] = action.choices
            for command, child in choices.items():
                yield f"{name} {command}", child
                yield from find_commands(child, f"{name} {command}")
