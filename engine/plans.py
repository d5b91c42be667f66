"""Plans, TensorRT's name for compiled engines: where they are stored, which may be used, and how
one is published.

Knows files, keys and hashes; not TensorRT. A plan is native code tied to its sources and its GPU.
Its sidecar, a JSON file of the same name, records both, the plan's sha256, which is checked before
anything reads the plan, and this user's signature. A plan without that signature came with a
bundle from elsewhere and is not loaded.
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
from sdrt.bundle.bundle import graph_name, weights_name
from sdrt.bundle.integrity import hash_file
from sdrt.bundle.manifest import Manifest, TensorSpec
from sdrt.bundle.store import home
from sdrt.errors import BackendError, BundleError
from sdrt.json_validation import json_object, read_bytes, shorten

from .axes import IMAGE_TOKENS, axis_lengths, spec_shape
from .plan_signing import TRUST_VARIABLE, is_signature_valid, sign, trusted_hashes

log = logging.getLogger(__name__)
VAE_ROWS = 1  # the runtime decodes and encodes one image at a time
MAX_SIDECAR = 1_000_000  # bytes
MAX_CHUNKS = 16  # of a prompt, each of the text encoder's length
MAX_IMAGE_TOKENS = 257  # of a full-face IP-Adapter's image; the others have 4 and 16
Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # for each input: minimum, optimum, maximum


class HashedPlans:
    """Plan files whose sha256 this process has checked, so that gigabytes are hashed once."""

    def __init__(self) -> None:
        self._files: set[tuple[object, ...]] = set()

    def is_intact(self, content: mmap.mmap, sha256: str, file: tuple[object, ...]) -> bool:
        """Whether the content has this sha256; hashed once while the file stays the same."""
        if file not in self._files and hashlib.sha256(content).hexdigest() != sha256:
            return False
        self._files.add(file)
        return True


HASHED_PLANS = HashedPlans()


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """What a plan is built with and for, whatever the component; see `PlanKey`."""

    kind: str
    version: str
    targets: tuple[str, ...]
    gpu: str = ""
    level: int = 3
    workspace: int = 0
    stripped: bool = False
    streamed: bool = False
    user_allocation: bool = False
    refittable: str = ""


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything that a plan depends on; a plan with another key is another plan.

    Attributes:
        kind, version: The compiler.
        targets: The compute capabilities that the plan runs on, such as sm_89.
        gpu: The GPU's name; empty where one plan serves every GPU of its targets.
        profiles: The ranges of input shapes.
        level: The builder's optimisation level, 0 to 5.
        workspace: Bytes of scratch memory, 0 for unlimited.
        stripped: Whether the weights are left out, to be refitted from the bundle.
        graph, weights: sha256 of both files.
        streamed: Whether weights can stay in host memory.
        user_allocation: Whether TensorRT for RTX allocates nothing while the plan runs, without
            which it does not support CUDA graphs.
        refittable: A digest of the names of the weights that can be replaced; empty if none can.
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
    user_allocation: bool = False
    refittable: str = ""

    @property
    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        """Below a plans folder."""
        gpu = self.gpu or self.kind
        target = self.targets[0] if len(self.targets) == 1 else "portable"
        compiler = f"{'trt' if self.kind.startswith('tensorrt') else 'ort'}{self.version}"
        folder = re.sub(r"[^a-z0-9_.]+", "-", f"{gpu}-{target}-{compiler}".lower())
        return Path(folder) / f"{self.component}-{self.digest}.plan"


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan's file and the content of its sidecar.

    Attributes:
        seconds, peak_bytes: The time and the memory that building it took.
        parity: How it compared with the bundle's graph on its GPU; None until it has run.
        mark: This user's signature of all of that.
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
    def is_trusted(self) -> bool:
        """Whether this user built it, or the operator trusts it."""
        return (
            is_signature_valid(self._signed_content(), self.mark)
            or str(self.sha256) in trusted_hashes()
        )

    def signed(self) -> "Plan":
        return replace(self, mark=sign(self._signed_content()))

    def _signed_content(self) -> bytes:
        values = {name: value for name, value in asdict(self).items() if name != "mark"}
        return json.dumps({**values, "path": self.path.name}, sort_keys=True).encode()

    @contextlib.contextmanager
    def verified(self) -> Iterator[mmap.mmap]:
        """The plan's bytes; raises BackendError if they are not the bytes that were written."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                file_id = (self.path, self.sha256, file_identity(stat))
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BackendError(f"{self.path} cannot be read: {error}") from error
        with content:
            if reason := self._damage(content, file_id):
                raise BackendError(reason, hint="delete the file; it is built again")
            yield content

    def _damage(self, content: mmap.mmap, file_id: tuple[object, ...]) -> str | None:
        if len(content) != self.size:
            return f"{self.path} has {len(content)} bytes, {self.size} were written"
        if not HASHED_PLANS.is_intact(content, self.sha256, file_id):
            return f"{self.path} is damaged: its sha256 is not that of the plan that was written"
        return None

    def damage(self) -> str | None:
        """What is wrong with the file, or None."""
        try:
            with self.verified():
                return None
        except BackendError as error:
            return error.message

    def with_parity(self, parity: Mapping[str, float]) -> "Plan":
        """The same plan, validated; the sidecar is updated where it can be written."""
        validated = replace(self, parity=dict(parity))
        with contextlib.suppress(OSError):
            validated = validated.signed()
            _write_sidecar(validated)
        return validated


def plans_folder(bundle: Bundle) -> Path:
    """The bundle's own folder, or one in the user's home where the bundle is read-only."""
    own = bundle.folder / "plans"
    if os.access(own if own.exists() else bundle.folder, os.W_OK):
        return own
    mark = hashlib.sha256(str(bundle.folder.resolve()).encode()).hexdigest()[:16]
    return home() / "plans" / f"{bundle.manifest.name}-{mark}"


def plan_key(bundle: Bundle, component: str, settings: BuildSettings) -> PlanKey:
    """The key of the plan that a component of a bundle needs."""
    inputs = bundle.manifest.components[component].inputs
    return PlanKey(
        **asdict(settings),
        component=component,
        system=f"{platform.system()}-{platform.machine()}".lower(),
        profiles=create_profiles(bundle.manifest, component, inputs),
        graph=_sha256(bundle, graph_name(component, bundle.graph_file)),
        weights=_sha256(bundle, weights_name(component)),
    )


def _sha256(bundle: Bundle, name: str) -> str:
    """From the manifest, or of the file while the bundle is being built."""
    record = bundle.manifest.files.get(name)
    return record.sha256 if record else hash_file(bundle.folder / name)


def create_profiles(
    manifest: Manifest, component: str, inputs: tuple[TensorSpec, ...]
) -> tuple[Profile, ...]:
    """One profile per declared size, in which only rows and the prompt's length may vary.

    A guided image is two rows, so the maximum is twice the batch; the VAE runs one image at a time.
    Raises BackendError for an unknown dynamic axis.
    """
    low, usual, high = manifest.batch
    rows = (VAE_ROWS,) * 3 if component.startswith("vae") else (low, 2 * usual, 2 * high)
    tokens = manifest.max_tokens
    profiles = []
    for size in manifest.sizes:
        fixed = {name: (length,) * 3 for name, length in axis_lengths(manifest, size).items()}
        lengths = {
            **fixed,
            "rows": rows,
            "tokens": (tokens, tokens, MAX_CHUNKS * tokens),
            "image_tokens": (1, IMAGE_TOKENS, MAX_IMAGE_TOKENS),
        }
        profile = {spec.name: _range(component, spec, lengths) for spec in inputs}
        if profile not in profiles:
            profiles.append(profile)
    return tuple(profiles)


def _range(
    component: str, spec: TensorSpec, lengths: Mapping[str, tuple[int, int, int]]
) -> tuple[Shape, Shape, Shape]:
    def shape(which: int) -> Shape:
        return spec_shape(spec, {name: length[which] for name, length in lengths.items()})

    try:
        return shape(0), shape(1), shape(2)
    except ValueError as error:
        raise BackendError(
            f"{component}: {spec.name} has a dynamic axis that is not known: {error}; profiles are "
            f"known for {', '.join(lengths)}"
        ) from None


def key_differences(key: PlanKey, required: PlanKey, ignored: Sequence[str] = ()) -> list[str]:
    """Why a plan cannot be used, in words; empty if it can."""
    titles = {
        "kind": "it is for {0}, not {1}",
        "version": "version {0} built it, here is {1}",
        "gpu": "it is for {0}, here is {1}",
        "system": "it is for {0}, this is {1}",
        "profiles": "its sizes, batch or prompt length differ",
        "level": "its optimisation level is {0}, not {1}",
        "workspace": "its workspace limit differs",
        "streamed": "weight streaming is {0}, not {1}",
        "user_allocation": "allocation by the user is {0}, not {1}",
        "refittable": "the weights that can be replaced differ",
        "graph": "the graph has changed",
        "weights": "the weights have changed",
    }
    reasons = []
    for name, title in titles.items():
        values = getattr(key, name), getattr(required, name)
        if values[0] != values[1] and name not in ignored:
            reasons.append(title.format(*values))
    if missing := sorted(set(required.targets) - set(key.targets)):
        reasons.append(f"it is for {', '.join(key.targets)}, not {', '.join(missing)}")
    return reasons


def find_plan(
    folder: Path, required: PlanKey, ignored: Sequence[str] = ()
) -> tuple[Plan | None, str]:
    """A plan that may be used, preferring the one for the fewest targets; or None, and how the
    nearest plan differs.

    ignored: fields of the key that may differ
    """
    nearest: tuple[int, str] | None = None
    plans = sorted(_read_plans(folder, required.component), key=lambda plan: len(plan.key.targets))
    for plan in plans:
        differences = key_differences(plan.key, required, ignored)
        reasons = differences if plan.is_trusted else [_explain_untrusted(plan)]
        if not reasons and (damage := plan.damage()) is None:
            return plan, ""
        reason = "; ".join(reasons) or str(damage)
        if nearest is None or len(reasons) < nearest[0]:
            nearest = len(reasons), f"the plan {plan.path.name} cannot be used: {reason}"
    return None, nearest[1] if nearest else "there is no plan yet"


def _explain_untrusted(plan: Plan) -> str:
    return (
        "it was not built here, and a plan is native code; if you trust its builder, "
        f"set {TRUST_VARIABLE} to its sha256, by its sidecar {shorten(plan.sha256)}"
    )


def _read_plans(folder: Path, component: str) -> Iterator[Plan]:
    for sidecar in sorted(folder.glob(f"*/{component}-*.json")):
        try:
            yield plan_from_json(sidecar)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not a plan's sidecar and is ignored: %s", sidecar, error)


def plan_from_json(sidecar: Path) -> Plan:
    """Read a sidecar; raises OSError, ValueError, KeyError or TypeError if it is invalid."""
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


def get_or_build_plan(
    folder: Path,
    required: PlanKey,
    build: Callable[[Path], tuple[float, int]],
    ignored: Sequence[str] = (),
) -> Plan:
    """The plan of a key, built if there is none that may be used.

    Processes that need the same plan wait for each other, and a killed build leaves nothing in the
    way.

    Args:
        folder: Where plans are stored.
        required: The key.
        build: Writes the plan's file; returns the seconds and the peak memory that it took.
        ignored: See `find_plan`.

    Raises:
        BundleError: The folder cannot be written. What `build` raises is passed on.
    """
    plan, _ = find_plan(folder, required, ignored)
    if plan:
        return plan
    path = folder / required.path
    try:
        with locked(path.with_name(required.component)):
            plan, reason = find_plan(folder, required, ignored)
            sign(b"")  # fails now, not after minutes of building, if the key cannot be stored
            return plan or _build(path, required, reason, build)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error}", hint="set another SDRT_HOME") from error


def _build(
    path: Path, key: PlanKey, reason: str, build: Callable[[Path], tuple[float, int]]
) -> Plan:
    log.info("%s: building a plan for %s (%s)", key.component, ", ".join(key.targets), reason)
    with atomic_file(path) as partial:
        seconds, peak = build(partial)
        plan = Plan(path, key, hash_file(partial), partial.stat().st_size, seconds, peak).signed()
    _write_sidecar(plan)
    log.info(
        "%s: %.0f MB in %.1f s, peak memory %.2f GB",
        path.name,
        plan.size / 1e6,
        seconds,
        peak / 1e9,
    )
    _delete_outdated(plan)
    return plan


def _delete_outdated(plan: Plan) -> None:
    """Delete plans of the same folder whose weights this bundle no longer has."""
    for other in list(_read_plans(plan.path.parent.parent, plan.key.component)):
        same = other.path.parent == plan.path.parent
        if same and other.key.weights != plan.key.weights:
            other.path.with_suffix(".json").unlink(missing_ok=True)
            other.path.unlink(missing_ok=True)
