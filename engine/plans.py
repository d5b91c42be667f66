"""Plans, as compiled engines are called: where they lie, when one may be used, how one appears.

Knows files, keys and hashes; not TensorRT. A plan is native code tied to what it was built from and
for, so it lies beside a sidecar that names all of that, and its bytes are compared with the
sidecar's sha256 before anything reads them. A sidecar carries the mark of who built here: one
without it came with a bundle from elsewhere, and its plan is left alone.
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sdrt.atomic_files import atomic_file, file_identity, locked, write_atomic
from sdrt.bundle import Bundle
from sdrt.bundle.integrity import hash_file
from sdrt.bundle.manifest import Manifest, TensorSpec
from sdrt.bundle.store import home
from sdrt.errors import BackendError, BundleError
from sdrt.json_validation import json_object, read_bytes, shorten

from .plan_signing import VARIABLE, is_ours, mark_of, named

log = logging.getLogger(__name__)
PICTURE_ROWS = 1  # the runtime decodes and encodes one picture at a time
MAX_SIDECAR = 1_000_000  # bytes
MAX_STRETCHES = 16  # of a prompt, each of the text encoder's length: all that are read
# Files whose sha256 this process has compared, so that gigabytes are not hashed twice in a load.
_unchanged: set[tuple[object, ...]] = set()
Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # for each input: least, usual, most


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything that a plan depends on; another value of any makes another plan.

    targets: the compute capabilities that it runs on, such as sm_89
    gpu: the GPU's name, empty where one plan serves every GPU of its targets
    level: builder optimisation, 0 to 5. workspace: bytes of scratch memory, 0 for any
    stripped: whether the weights are left out, to be filled in from the bundle
    streamed: whether the weights can stay with the host
    graph, weights: sha256 of both files
    """

    component: str
    kind: str
    version: str
    targets: tuple[str, ...]
    gpu: str
    system: str
    profiles: tuple[Profile, ...]
    level: int
    workspace: int
    stripped: bool
    graph: str
    weights: str
    streamed: bool = False

    @property
    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        """Below a plans folder."""
        whom = self.gpu or self.kind
        targets = self.targets if len(self.targets) == 1 else ("portable",)
        made_by = f"{'trt' if self.kind.startswith('tensorrt') else 'ort'}{self.version}"
        folder = re.sub(r"[^a-z0-9_.]+", "-", f"{whom}-{targets[0]}-{made_by}".lower())
        return Path(folder) / f"{self.component}-{self.digest}.plan"


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan's file and its sidecar.

    seconds, peak_bytes: what building it took
    parity: how it compared with the bundle's graph on its GPU; None until it has run
    mark: this user's, on all of that
    """

    path: Path
    key: PlanKey
    sha256: str
    size: int
    seconds: float
    peak_bytes: int
    parity: Mapping[str, float] | None = None
    mark: str = ""

    @property
    def trusted(self) -> bool:
        """Whether it was built here, or the operator vouches for it."""
        return is_ours(self._sealed(), self.mark) or str(self.sha256) in named()

    def marked(self) -> "Plan":
        return replace(self, mark=mark_of(self._sealed()))

    def _sealed(self) -> bytes:
        values = {name: value for name, value in asdict(self).items() if name != "mark"}
        return json.dumps({**values, "path": self.path.name}, sort_keys=True).encode()

    @contextlib.contextmanager
    def verified(self) -> Iterator[mmap.mmap]:
        """The plan's bytes; raises BackendError if they are not those that were written."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                mark = (self.path, self.sha256, file_identity(stat))
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BackendError(f"{self.path} cannot be read: {error}") from error
        with content:
            if reason := self._damage(content, mark):
                raise BackendError(f"{reason}; delete it, it is built again")
            yield content

    def _damage(self, content: mmap.mmap, mark: tuple[object, ...]) -> str | None:
        if len(content) != self.size:
            return f"{self.path} has {len(content)} bytes, {self.size} were written"
        if mark not in _unchanged and hashlib.sha256(content).hexdigest() != self.sha256:
            return f"{self.path} is damaged: its sha256 is not that of the plan that was written"
        _unchanged.add(mark)
        return None

    def damage(self) -> str | None:
        """What is wrong with the file, or None."""
        try:
            with self.verified():
                return None
        except BackendError as error:
            return str(error)

    def with_parity(self, parity: Mapping[str, float]) -> "Plan":
        """The same plan, proven; the sidecar is written anew where that is allowed."""
        proven = replace(self, parity=dict(parity))
        with contextlib.suppress(OSError):
            proven = proven.marked()
            _write_sidecar(proven)
        return proven


def plans_folder(bundle: Bundle) -> Path:
    """The bundle's own, or one in the user's folder where the bundle cannot be written."""
    own = bundle.folder / "plans"
    if os.access(own if own.exists() else bundle.folder, os.W_OK):
        return own
    mark = hashlib.sha256(str(bundle.folder.resolve()).encode()).hexdigest()[:16]
    return home() / "plans" / f"{bundle.manifest.name}-{mark}"


def key_of(
    bundle: Bundle,
    component: str,
    *,
    kind: str,
    version: str,
    targets: tuple[str, ...],
    gpu: str = "",
    level: int = 3,
    workspace: int = 0,
    stripped: bool = False,
    streamed: bool = False,
) -> PlanKey:
    """The key of the plan that a component of a bundle needs."""
    inputs = bundle.manifest.components[component].inputs
    return PlanKey(
        component=component,
        kind=kind,
        version=version,
        targets=targets,
        gpu=gpu,
        system=f"{platform.system()}-{platform.machine()}".lower(),
        profiles=profiles_of(bundle.manifest, component, inputs),
        level=level,
        workspace=workspace,
        stripped=stripped,
        streamed=streamed,
        graph=_sha256(bundle, component, bundle.graph_file),
        weights=_sha256(bundle, component, "model.safetensors"),
    )


def _sha256(bundle: Bundle, component: str, name: str) -> str:
    """From the manifest, or of the file while the bundle is being made."""
    record = bundle.manifest.files.get(f"{component}/{name}")
    return record.sha256 if record else hash_file(bundle.folder / component / name)


def profiles_of(
    manifest: Manifest, component: str, inputs: tuple[TensorSpec, ...]
) -> tuple[Profile, ...]:
    """One profile for each declared size, in which only rows and a prompt's length may vary.

    A guided picture is two rows, so the most rows are twice the batch; decoders and encoders of
    pictures take one. Raises BackendError for a dynamic axis of another name.
    """
    low, usual, high = manifest.batch
    rows = (PICTURE_ROWS,) * 3 if component.startswith("vae") else (low, 2 * usual, 2 * high)
    tokens = manifest.max_tokens
    profiles = []
    for width, height in manifest.sizes:
        down = manifest.downscale
        lengths = {
            "rows": rows,
            "tokens": (tokens, tokens, MAX_STRETCHES * tokens),
            **{"width": (width,) * 3, "height": (height,) * 3},
            **{"latent_width": (width // down,) * 3, "latent_height": (height // down,) * 3},
        }
        profile = {spec.name: _range(component, spec, lengths) for spec in inputs}
        if profile not in profiles:
            profiles.append(profile)
    return tuple(profiles)


def _range(
    component: str, spec: TensorSpec, lengths: Mapping[str, tuple[int, int, int]]
) -> tuple[Shape, Shape, Shape]:
    if unknown := [a for a in spec.shape if isinstance(a, str) and a not in lengths]:
        raise BackendError(
            f"{component}: {spec.name} has a dynamic axis {unknown[0]!r}; profiles are known for "
            f"{', '.join(lengths)}"
        )

    def shape(which: int) -> Shape:
        return tuple(lengths[a][which] if isinstance(a, str) else a for a in spec.shape)

    return shape(0), shape(1), shape(2)


def differences(found: PlanKey, wanted: PlanKey, ignored: Sequence[str] = ()) -> list[str]:
    """What keeps a plan from being used, in words; empty if nothing does."""
    titles = {
        "kind": "it is for {found}, not {wanted}",
        "version": "version {found} built it, here is {wanted}",
        "gpu": "it is for {found}, here is {wanted}",
        "system": "it is for {found}, this is {wanted}",
        "profiles": "its sizes, batch or prompt length are others",
        "level": "its optimisation level is {found}, not {wanted}",
        "workspace": "its scratch memory is limited otherwise",
        "streamed": "weights stay with the host: {found}, wanted {wanted}",
        "graph": "the graph has changed",
        "weights": "the weights have changed",
    }
    texts = []
    for name, title in titles.items():
        values = getattr(found, name), getattr(wanted, name)
        if values[0] != values[1] and name not in ignored:
            texts.append(title.format(found=values[0], wanted=values[1]))
    if missing := sorted(set(wanted.targets) - set(found.targets)):
        texts.append(f"it is for {', '.join(found.targets)}, not {', '.join(missing)}")
    return texts


def find_plan(
    folder: Path, wanted: PlanKey, ignored: Sequence[str] = ()
) -> tuple[Plan | None, str]:
    """A plan that may be used, the one for the fewest other GPUs, or None and the reason: the
    nearest plan and how it differs.

    ignored: parts of the key that may differ
    """
    nearest: tuple[int, str] | None = None
    for plan in sorted(_plans(folder, wanted.component), key=lambda plan: len(plan.key.targets)):
        texts = differences(plan.key, wanted, ignored) if plan.trusted else [_foreign(plan)]
        if not texts and (damage := plan.damage()) is None:
            return plan, ""
        reason = "; ".join(texts) or str(damage)
        if nearest is None or len(texts) < nearest[0]:
            nearest = len(texts), f"the plan {plan.path.name} cannot be used: {reason}"
    return None, nearest[1] if nearest else "there is no plan yet"


def _foreign(plan: Plan) -> str:
    return (
        "it was not built here, and a plan is native code; if you trust who built it, "
        f"set {VARIABLE} to its sha256, which its sidecar says is {shorten(plan.sha256)}"
    )


def _plans(folder: Path, component: str) -> Iterator[Plan]:
    for sidecar in sorted(folder.glob(f"*/{component}-*.json")):
        try:
            yield plan_from_json(sidecar)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is no sidecar of a plan and is left alone: %s", sidecar, error)


def plan_from_json(sidecar: Path) -> Plan:
    """Raises OSError, ValueError, KeyError or TypeError for a file that is no sidecar."""
    raw = json_object(read_bytes(sidecar, MAX_SIDECAR))
    key = dict(raw.pop("key"))
    key["targets"] = tuple(key["targets"])
    key["profiles"] = tuple(
        {name: tuple(tuple(int(n) for n in shape) for shape in of) for name, of in profile.items()}
        for profile in key["profiles"]
    )
    for kind, values in ((PlanKey, key), (Plan, {**raw, "key": 0, "path": 0})):
        known = {field.name for field in fields(kind)}
        if unknown := set(values) - known:
            raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
    return Plan(path=sidecar.with_suffix(".plan"), key=PlanKey(**key), **raw)


def _write_sidecar(plan: Plan) -> None:
    values: dict[str, Any] = asdict(plan)
    del values["path"]
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    write_atomic(plan.path.with_suffix(".json"), text.encode())


def plan_of(
    folder: Path,
    wanted: PlanKey,
    build: Callable[[Path], tuple[float, int]],
    ignored: Sequence[str] = (),
) -> Plan:
    """The plan of a key, built where there is none that may be used.

    ignored: see `find_plan`
    build: writes the plan's file; returns the seconds and the peak memory in bytes that it took
    Two processes that want one plan wait for each other; a killed build leaves nothing in the way.
    Raises BundleError if the folder cannot be written, and whatever `build` raises.
    """
    found, _ = find_plan(folder, wanted, ignored)
    if found:
        return found
    path = folder / wanted.path
    try:
        with locked(path.with_name(wanted.component)):
            found, reason = find_plan(folder, wanted, ignored)
            mark_of(b"")  # what cannot be marked is not built for minutes first
            return found or _built(path, wanted, reason, build)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error}; name another SDRT_HOME") from error


def _built(
    path: Path, key: PlanKey, reason: str, build: Callable[[Path], tuple[float, int]]
) -> Plan:
    log.info("%s: building a plan for %s (%s)", key.component, ", ".join(key.targets), reason)
    with atomic_file(path) as partial:
        seconds, peak = build(partial)
        plan = Plan(path, key, hash_file(partial), partial.stat().st_size, seconds, peak).marked()
    _write_sidecar(plan)
    log.info(
        "%s: %.0f MB in %.1f s, peak memory %.2f GB",
        path.name,
        plan.size / 1e6,
        seconds,
        peak / 1e9,
    )
    _drop_outdated(plan)
    return plan


def _drop_outdated(plan: Plan) -> None:
    """Plans of the same folder with weights that this bundle no longer has."""
    for other in list(_plans(plan.path.parent.parent, plan.key.component)):
        same = other.path.parent == plan.path.parent
        if same and other.key.weights != plan.key.weights:
            other.path.with_suffix(".json").unlink(missing_ok=True)
            other.path.unlink(missing_ok=True)
