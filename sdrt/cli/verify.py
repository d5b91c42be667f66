"""`sdrt verify`: a bundle proven again, by this machine's engines, against what torch answered when
it was built. Needs no torch.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from sdrt.bundle import Bundle, open_bundle
from sdrt.bundle.bundle import list_graphs
from sdrt.bundle.integrity import check_files
from sdrt.bundle.manifest import Manifest
from sdrt.engine import (
    Candidate,
    Feeds,
    LoadOptions,
    log_selection,
    parity,
    select_backend,
)
from sdrt.engine.axes import axis_lengths
from sdrt.errors import BackendError, ParityError, SdrtError
from sdrt.runtime import Pipeline, load_pipeline
from sdrt.runtime.reference_outputs import (
    GUIDED_STEPS,
    PROMPT,
    ReferenceOutputs,
    generate_reference_image,
    read_reference_outputs,
    reference_inputs,
    take_samples,
)

log = logging.getLogger(__name__)
GUIDANCE = 7.5


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was asked, and whether it is as it should be."""

    what: str
    found: str
    wanted: str
    passed: bool


def verify(args: argparse.Namespace) -> None:
    """Print every check; raise ParityError if one is missed, BundleError for other bytes than those
    that were built.
    """
    bundle = open_bundle(args.bundle)
    check_files(bundle.folder, bundle.manifest.files, list_graphs(bundle.manifest), rehash=True)
    candidate = select_backend(args.backend, bundle.bytes, LoadOptions(args.device))
    log_selection(candidate, candidate.precision_label(bundle))
    checks = [Check("files", f"{len(bundle.manifest.files)} of the sha256 built", "all", True)]
    for check in run_checks(bundle, candidate):
        checks.append(check)
        log.debug("%s", _line(check))
    missed = [check for check in checks if not check.passed]
    if args.json:
        described = {"bundle": str(bundle.folder), "backend": candidate.title}
        print(json.dumps({**described, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print("\n".join(_line(check) for check in checks))
    if missed:
        raise ParityError(
            f"{bundle.folder} is not proven on {candidate.title}: {missed[0].what} has "
            f"{missed[0].found}, wanted {missed[0].wanted} ({len(missed)} of {len(checks)} checks "
            "missed); use another --backend, or build it again with --force"
        )


def _line(check: Check) -> str:
    mark = "ok" if check.passed else "MISSED"
    return f"{mark:7} {check.what:32} {check.found}  (wanted: {check.wanted})"


def run_checks(bundle: Bundle, candidate: Candidate) -> Iterator[Check]:
    """Every component in every precision, the whole pipeline, and whether a seed is one picture."""
    answers, size = read_reference_outputs(bundle), bundle.manifest.sizes[0]
    exact = replace(bundle, manifest=replace(bundle.manifest, admitted={}))
    with load_pipeline(exact, candidate) as pipe:
        for name in pipe.engines:
            if name.removesuffix("_float32") in bundle.manifest.components:
                yield _check_component(pipe, name, answers)
        try:
            picture = generate_reference_image(pipe, size)
        except BackendError:
            raise
        except SdrtError as error:  # it holds NaN or infinity
            yield Check("the whole pipeline", str(error), "a picture", False)
            return
        halves = any(part.dtype == "float16" for part in bundle.manifest.components.values())
        kept, dtype = {"picture": answers.picture}, "float16" if halves else "float32"
        yield _compare("the whole pipeline", {"picture": picture}, kept, dtype)
        same = generate_reference_image(pipe, size).tobytes() == picture.tobytes()
        said = "the same bytes" if same else "other bytes"
        yield Check("the same seed again", said, "the same bytes", same)
        if bundle.manifest.batch[2] > 1:  # a call of more rows may round otherwise
            shared, alone = (
                generate_reference_image(pipe, size, seeds=(1, 0))[1:],
                take_samples(picture),
            )
            yield _compare("the seed in company", {"picture": shared}, {"picture": alone}, dtype)
        reduced = candidate.reduced_precision in bundle.manifest.admitted
        wanted = (
            generate_reference_image(pipe, size, GUIDED_STEPS, GUIDANCE) if reduced else picture
        )
    if reduced:
        with load_pipeline(bundle, candidate) as pipe:
            found = generate_reference_image(pipe, size, GUIDED_STEPS, GUIDANCE)
        psnr, floor = parity.measure(found, wanted, is_image=True)["psnr"], parity.MIN_IMAGE_PSNR
        what = f"a picture in {candidate.reduced_precision}"
        yield Check(what, f"psnr {psnr:.1f} dB", f"at least {floor} dB", psnr >= floor)


def _check_component(pipe: Pipeline, name: str, answers: ReferenceOutputs) -> Check:
    part = name.removesuffix("_float32")
    component, size = pipe.manifest.components[part], pipe.manifest.sizes[0]
    tokenizer = pipe.tokenizer_2 if part == "text_encoder_2" else pipe.tokenizer
    ids = tokenizer(["", PROMPT]) if tokenizer else None
    found = pipe.engines[name](reference_inputs(_shapes(pipe.manifest, part), ids, size))
    dtype = component.dtype if name == part else f"{component.dtype} weights in float32"
    kept = answers.components.get(part, {})
    return _compare(f"{part}, {dtype}", found, kept, component.dtype)


def _shapes(manifest: Manifest, part: str) -> dict[str, tuple[int, ...]]:
    """Of a component's inputs, for one picture of the first size."""
    lengths = axis_lengths(manifest, manifest.sizes[0])
    return {
        spec.name: tuple(lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        for spec in manifest.components[part].inputs
    }


def _compare(
    what: str, found: Feeds, kept: Mapping[str, Sequence[float] | np.ndarray], dtype: str
) -> Check:
    """Answers against the samples that are kept of torch's, by the floor of a precision."""
    floor = parity.PARITY_THRESHOLDS[dtype]
    wanted = f"cosine at least {floor.cosine}, error at most {floor.error}"
    samples = {name: take_samples(answer) for name, answer in found.items()}
    if {name: len(each) for name, each in samples.items()} != {n: len(k) for n, k in kept.items()}:
        return Check(what, "other outputs than those that are kept", wanted, False)
    every = [parity.measure(samples[name], np.array(kept[name]), is_image=False) for name in kept]
    values = parity.worst_case(every)
    passed = values["cosine"] >= floor.cosine and values["error"] <= floor.error
    said = f"cosine {values['cosine']:.7g}, error {values['error']:.2g}"
    return Check(what, said, wanted, passed)
