"""`make mutations`: does a test notice when a check is taken out? Each check of `SECURITY.md` is
removed in turn from a copy of the tree, and the test that its row names must then fail.

    python tools/mutations.py                    # all of them; exit code 1 if any is not noticed
    python tools/mutations.py onnx manifest      # those whose row has one of these words
    python tools/mutations.py --table            # write SECURITY.md's table from the list

The list is `tools/mutations.toml`, one entry for each row. Where the check stands is given as text
that occurs once in its file; `becomes` is what stands there when it is gone.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tools" / "mutations.toml"
PAGE = ROOT / "SECURITY.md"
START, END = "<!-- checks: begin -->", "<!-- checks: end -->"
LONGEST_TEST = 60.0  # seconds; one that hangs has noticed
FAILED = 1  # pytest's exit code where tests ran and failed, and nothing else went wrong


@dataclass(frozen=True, slots=True)
class Mutation:
    """A row of the table, and the check taken out.

    check: `file::function`. test: `file::test`, which must fail where `text` is `becomes`
    """

    boundary: str
    attack: str
    check: str
    test: str
    text: str
    becomes: str

    @property
    def file(self) -> str:
        return self.check.partition("::")[0]

    def applied(self, root: Path) -> str:
        """The file without its check; raises ValueError where the text is not there just once."""
        source = (root / self.file).read_text("utf-8")
        if (actual := source.count(self.text)) != 1:
            raise ValueError(f"{self.attack}: its text is {actual} times in {self.file}, not once")
        mutated = source.replace(self.text, self.becomes)
        compile(mutated, self.file, "exec")
        return mutated


def read_list() -> list[Mutation]:
    entries = tomllib.loads(LIST.read_text("utf-8"))["check"]
    return [Mutation(**entry) for entry in entries]


def table(mutations: Iterable[Mutation]) -> str:
    lines = ["| boundary | attack | check | test |", "|---|---|---|---|"]
    lines += [f"| {m.boundary} | {m.attack} | `{m.check}` | `{m.test}` |" for m in mutations]
    return "\n".join([START, *lines, END])


def page_with_table(mutations: Iterable[Mutation]) -> str:
    head, _, rest = PAGE.read_text("utf-8").partition(START)
    return head + table(mutations) + rest.partition(END)[2]


def copied(folder: Path) -> Path:
    """The tree as it stands, what git ignores left out, and the package next to it as installed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    root = folder / "tree"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
    link = [sys.executable, root / "tools" / "link_package.py", folder / "installed"]
    subprocess.run(link, check=True)
    return root


def outcome(root: Path, tests: Sequence[str], maximum: float | None) -> tuple[int, str]:
    """pytest's exit code in the copy and what it printed; FAILED where it took too long."""
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root.parent / "installed")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # times of files say nothing here
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=maximum
        )
    except subprocess.TimeoutExpired:
        return FAILED, "it took too long"
    return done.returncode, done.stdout + done.stderr


def tried(root: Path, mutation: Mutation) -> dict[str, object]:
    """The check taken out, its test run, the check put back."""
    path, began = root / mutation.file, time.monotonic()
    mutated, full = mutation.applied(root), path.read_text("utf-8")
    path.write_text(mutated, "utf-8")
    try:
        code, printed = outcome(root, [mutation.test], LONGEST_TEST)
    finally:
        path.write_text(full, "utf-8")
    result = {0: "survived", FAILED: "killed"}.get(code, "broken")
    if result == "broken":
        print(printed, file=sys.stderr)
    seconds = round(time.monotonic() - began, 1)
    return {"attack": mutation.attack, "check": mutation.check, "test": mutation.test} | {
        "result": result,
        "seconds": seconds,
    }


def run(mutations: Sequence[Mutation]) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        root = copied(Path(folder))
        for mutation in mutations:
            mutation.applied(root)
        code, printed = outcome(root, sorted({mutation.test for mutation in mutations}), None)
        if code:
            sys.exit(f"{printed}\nmutations: these tests fail with every check in its place")
        results = []
        for mutation in mutations:
            results.append(tried(root, mutation))
            print(f"{results[-1]['result']:9}{mutation.boundary}: {mutation.attack}", flush=True)
    return results


def keep(results: Sequence[dict[str, object]]) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from results import save

    killed = sum(result["result"] == "killed" for result in results)
    claim = f"{killed} of {len(results)} noticed by their tests"
    save("mutations", {"checks of SECURITY.md taken out one by one": claim}, {"checks": results})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only rows that have one of these")
    parser.add_argument("--table", action="store_true", help="write SECURITY.md's table")
    parser.add_argument("--save", action="store_true", help="keep the results for the README")
    args = parser.parse_args()
    mutations = read_list()
    if args.table:
        PAGE.write_text(page_with_table(mutations), "utf-8")
        return
    chosen = [
        mutation
        for mutation in mutations
        if not args.words or any(word in str(mutation) for word in args.words)
    ]
    results = run(chosen)
    if args.save:
        keep(results)
    missed = [result for result in results if result["result"] != "killed"]
    print(f"{len(results) - len(missed)} of {len(results)} noticed")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
