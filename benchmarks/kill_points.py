"""Builds that are killed and begun again: do they end with the same bundle, byte for byte?

    python benchmarks/kill_points.py --save                 # some ten minutes
    python benchmarks/kill_points.py --every 20             # every twentieth point

A tiny model is built by children of one process, which has imported torch and run its exporter,
the only part that is not run again: it writes nothing. Each child is ended once:

- by SIGKILL before each thing that it does to the disk (see `tools/killing.py`), and after the
  last, with no bundle there before and with an old one to be replaced;
- in the middle of writing, by the kernel, when a file reaches so many bytes (SIGXFSZ);
- by SIGKILL at moments spread over the whole build.

What is there then must be no bundle, the whole old one or the whole new one; the build, begun
again once on each different state of the disk, must leave the new one, byte for byte, and nothing
else. At last `sdrt build --model shapes`
is killed at random moments, each time on what the kills before it left.
"""

import argparse
import gc
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not live through a fork
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "helpers")]

from killing import in_child, killed_at, points_of  # noqa: E402

WRITES, MOMENTS = 40, 60
# A UNet without stages, so that a build takes seconds.
SMALL = {
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "block_out_channels": [8],
}
Kill = Callable[[Callable[[], object]], None]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> dict[str, str]:
    """What has no bytes of its own."""
    return {str(path): "" for path in sorted(folder.rglob("*")) if not path.is_file()}


def exported_once() -> None:
    """Have torch's exporter run once for each component."""
    from sdrt.export import graph

    exported, known = graph._exported, {}

    def remembered(module, inputs, outputs, axes):
        key = (*outputs, *(str(value.dtype) for value in inputs.values()))
        if key not in known:
            known[key] = exported(module, inputs, outputs, axes)
        return known[key].clone()

    graph._exported = remembered


def torn_at(size: int, work: Callable[[], object]) -> None:
    """Have the kernel end a child when a file of its reaches so many bytes."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    if (ended := in_child(limited)) != -signal.SIGXFSZ:
        raise RuntimeError(f"no file reached {size} bytes: {ended}")


def killed_after(seconds: float, work: Callable[[], object]) -> None:
    """Kill a child so long after it began; one that has ended by then is killed at its end."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


class Trial:
    """A tiny model, the bundle that its build makes, and an older one."""

    def __init__(self, work: Path) -> None:
        from tiny_checkpoints import write_tiny

        from sdrt.export.checkpoint import embedded_checkpoint

        self.target = work / "home" / "bundles" / "b"
        self.model = write_tiny(work / "tiny", embedded_checkpoint("shapes"), **SMALL)
        os.environ["SDRT_HOME"] = str(work / "home")
        exported_once()
        self.old, self.new = work / "old", work / "new"
        self.build(self.old, (1, 1, 2))
        self.build(self.new)
        gc.collect()
        gc.freeze()  # a child need not look through all of torch
        began = time.monotonic()
        in_child(partial(self.build, work / "timed"))
        self.seconds = time.monotonic() - began
        assert digests(work / "timed") == digests(self.new)
        self.states: set[str] = set()
        self.expected = {"old": digests(self.old), "new": digests(self.new)}

    def build(self, target: Path | None = None, batch: tuple[int, int, int] = (1, 1, 4)) -> None:
        from sdrt.export.build import BuildPlan, build_bundle

        target = target or self.target
        plan = BuildPlan(str(self.model), target, "float16", batch=batch, force=True)
        build_bundle(plan)

    def prepare(self, replacing: bool) -> None:
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir(parents=True)
        if replacing:
            shutil.copytree(self.old, self.target)

    def recovers(self, replacing: bool, kill: Kill, distinct: bool) -> str:
        """What was there after the kill: nothing, old or new. Raises AssertionError.

        distinct: build again only on what no kill before this one had left
        """
        from sdrt.bundle import open_bundle
        from sdrt.bundle.store import list_bundles
        from sdrt.errors import BundleError

        self.prepare(replacing)
        kill(self.build)
        state = json.dumps(digests(self.target.parent) | names(self.target.parent))
        known, self.states = state in self.states, self.states | {state}
        listed = [folder for folder in list_bundles() if self.target.parent in folder.parents]
        try:
            actual = digests(open_bundle(self.target).folder)
        except BundleError as error:
            assert not replacing and not listed and "no bundle called" in str(error), error
            actual = {}
        assert not actual or listed == [self.target]
        kind = next((k for k, state in self.expected.items() if state == actual), "nothing")
        assert kind != "nothing" or not actual, "a bundle that opens and is neither"
        if known and distinct:
            return kind
        assert in_child(self.build) == 0
        assert digests(self.target) == self.expected["new"], "another bundle"
        assert [path.name for path in self.target.parent.iterdir()] == ["b"], "something is left"
        return kind


def points(trial: Trial) -> Iterator[tuple[str, bool, Kill]]:
    """Every point: its kind, whether a bundle is replaced, and how its process ends."""
    for replacing in (False, True):
        trial.prepare(replacing)
        kind = "replacing" if replacing else "first build"
        for point in range(len(points_of(trial.build))):
            yield f"disk, {kind}", replacing, partial(killed_at, point)
    largest = max(path.stat().st_size for path in trial.new.rglob("*") if path.is_file())
    for i in range(WRITES):
        yield "mid-write", bool(i % 2), partial(torn_at, round(largest * (i + 0.5) / WRITES))
    for i in range(MOMENTS):
        after = trial.seconds * (i + 0.5) / MOMENTS
        yield "moments", bool(i % 2), partial(killed_after, after)


def command_killed(work: Path, kills: int, longest: float) -> None:
    """`sdrt build --model shapes` killed at random moments, then left alone; raises AssertionError
    for a bundle that opens and is another.
    """
    once, target, chance = work / "shapes-once", work / "shapes", random.Random(0)
    command = [sys.executable, "-m", "sdrt", "build", "--quiet", "--model", "shapes", "--force"]
    subprocess.run([*command, "--output", once], check=True)
    expected = digests(once)
    for _ in range(kills):
        process = subprocess.Popen([*command, "--output", target])
        time.sleep(chance.uniform(0.0, longest))
        process.kill()
        process.wait()
        assert not target.exists() or digests(target) == expected
    subprocess.run([*command, "--output", target], check=True)
    assert digests(target) == expected, "another bundle"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th point")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no point after so many")
    parser.add_argument(
        "--all", action="store_true", help="build again on what another kill had left alike too"
    )
    parser.add_argument("--kills", type=int, default=10, help="of the command itself")
    parser.add_argument("--longest", type=float, default=25.0, help="seconds before one of them")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    began, done = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        print(f"a build without the exporter: {trial.seconds:.2f} s", flush=True)
        every = list(points(trial))[:: args.every]
        random.Random(0).shuffle(every)
        for kind, replacing, kill in every:
            if args.seconds and time.monotonic() - began > args.seconds:
                break
            actual = trial.recovers(replacing, kill, not args.all)
            done.setdefault(kind, {"nothing": 0, "old": 0, "new": 0})[actual] += 1
        count = sum(sum(actual.values()) for actual in done.values())
        for kind, actual in done.items():
            print(f"{kind}: {sum(actual.values())} recovered; left by the kill: {actual}")
        states = len(trial.states)
        print(f"{states} different states left", flush=True)
        print(f"{count} of {count} points recovered, of {len(every)} in all", flush=True)
        if args.kills:
            command_killed(Path(folder), args.kills, args.longest)
            print(f"the command: {args.kills} kills, one on another's leftovers, and a build")
    seconds = round(time.monotonic() - began)
    if args.save:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from results import save

        left = f"{states} different states" + ("" if args.all else ", each restarted")
        kills = f", {args.kills} kills of the command" if args.kills else ""
        said = f"{count} of {count} points ({left}){kills}; {seconds} s"
        save(
            "kill_points",
            {"builds killed and restarted that produce the same bundle, byte for byte": said},
            {"points": done, "states": states, "command": args.kills, "seconds": seconds},
        )


if __name__ == "__main__":
    main()
