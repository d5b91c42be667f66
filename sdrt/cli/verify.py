"""`sdrt verify`: validates a bundle on this machine's engines, against the outputs
of torch that were stored when it was built. Needs no torch.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdrt.bundle import Bundle, open_bundle
from sdrt.bundle.bundle import list_graphs
from sdrt.bundle.integrity import check_files
from sdrt.bundle.manifest import CONTROL, LORA_FACTORS, LORA_PARTS
from sdrt.engine import (
    Candidate,
    Feeds,
    LazyEngine,
    LoadOptions,
    log_selection,
    parity,
    select_backend,
)
from sdrt.errors import BackendError, ParityError, SdrtError
from sdrt.runtime import Pipeline, load_pipeline
from sdrt.runtime.parsing import parse_device
from sdrt.runtime.reference_outputs import (
    GUIDED_STEPS,
    PROMPT,
    ReferenceOutputs,
    component_inputs,
    generate_reference_image,
    read_reference_outputs,
    take_samples,
)

log = logging.getLogger(__name__)
GUIDANCE = 7.5
REDUCED = "image in"  # begins the check of an image in a lower precision than the bundle's
PLAIN_PARTS = {name: part for part, name in LORA_PARTS.items()}


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its result."""

    what: str
    actual: str
    expected: str
    passed: bool


def verify(args: argparse.Namespace) -> None:
    """Print every check; raise ParityError if one fails, BundleError for damaged files."""
    bundle = open_bundle(args.bundle)
    check_files(bundle.folder, bundle.manifest.files, list_graphs(bundle.manifest), rehash=True)
    index, kind = parse_device("device", args.device)
    candidate = select_backend(args.backend, bundle.bytes, LoadOptions(index), kind=kind)
    log_selection(candidate, bundle)
    checks = [
        Check("files", f"{len(bundle.manifest.files)} match their recorded sha256", "all", True)
    ]
    for check in run_checks(bundle, candidate):
        checks.append(check)
        log.debug("%s", _line(check))
    missed = [check for check in checks if not check.passed]
    if args.json:
        described = {"bundle": str(bundle.folder), "backend": candidate.title}
        print(json.dumps({**described, "checks": [_to_json(check) for check in checks]}, indent=2))
    else:
        print("\n".join(_line(check) for check in checks))
    if missed:
        only_reduced = all(check.what.startswith(REDUCED) for check in missed)
        raise ParityError(
            f"{bundle.folder} is not valid on {candidate.title}: {missed[0].what}: "
            f"{missed[0].actual}, expected {missed[0].expected} "
            f"({len(missed)} of {len(checks)} checks failed)",
            hint="run it with --exact, which passed, or build it again with --force"
            if only_reduced
            else "use another --backend, or build the bundle again with --force",
        )


def _to_json(check: Check) -> dict[str, object]:
    return {
        "what": check.what,
        "found": check.actual,
        "wanted": check.expected,
        "passed": check.passed,
    }


def _line(check: Check) -> str:
    mark = "ok" if check.passed else "FAILED"
    return f"{mark:7} {check.what:32} {check.actual}  (expected: {check.expected})"


def run_checks(bundle: Bundle, candidate: Candidate) -> Iterator[Check]:
    """Check every component in every precision, the full pipeline, and reproducibility; of a
    bundle that makes no images (control nets, IP-Adapters, upscalers) its components.
    """
    answers, size = read_reference_outputs(bundle), bundle.manifest.sizes[0]
    if "unet" not in bundle.manifest.components:
        for name in bundle.manifest.components:
            yield _check_alone(bundle, candidate, name, answers)
        return
    exact = replace(bundle, manifest=replace(bundle.manifest, admitted={}))
    with load_pipeline(exact, candidate) as pipe:
        for name in sorted(pipe.engines, key=lambda name: name != CONTROL):
            if name.removesuffix("_float32") in bundle.manifest.components:
                yield _check_component(pipe, name, answers)
            engine = pipe.engines[name]
            if name == CONTROL and isinstance(engine, LazyEngine):
                engine.unload()  # or memory would have to hold two UNets
        try:
            image = generate_reference_image(pipe, size)
        except BackendError:
            raise
        except SdrtError as error:  # it holds NaN or infinity
            yield Check("full pipeline", str(error), "an image", False)
            return
        halves = any(part.dtype == "float16" for part in bundle.manifest.components.values())
        reference, dtype = {"picture": answers.picture}, "float16" if halves else "float32"
        yield _compare("full pipeline", {"picture": image}, reference, dtype)
        same = generate_reference_image(pipe, size).tobytes() == image.tobytes()
        result = "identical" if same else "different"
        yield Check("same seed twice", result, "identical", same)
        if bundle.manifest.batch[2] > 1:  # a call of more rows may round otherwise
            shared, alone = (
                generate_reference_image(pipe, size, seeds=(1, 0))[1:],
                take_samples(image),
            )
            yield _compare("batch invariance", {"picture": shared}, {"picture": alone}, dtype)
        reduced = candidate.reduced_precision in bundle.manifest.admitted
        expected = (
            generate_reference_image(pipe, size, GUIDED_STEPS, GUIDANCE) if reduced else image
        )
    if reduced:
        with load_pipeline(bundle, candidate) as pipe:
            actual = generate_reference_image(pipe, size, GUIDED_STEPS, GUIDANCE)
        psnr, floor = parity.measure(actual, expected, is_image=True)["psnr"], parity.MIN_IMAGE_PSNR
        what = f"{REDUCED} {candidate.reduced_precision}"
        yield Check(what, f"psnr {psnr:.1f} dB", f"at least {floor} dB", psnr >= floor)


def _check_alone(
    bundle: Bundle, candidate: Candidate, name: str, answers: ReferenceOutputs
) -> Check:
    """A component that no pipeline of this bundle loads."""
    exact = replace(bundle, manifest=replace(bundle.manifest, admitted={}))
    assert candidate.load is not None
    engine = candidate.load(exact, name)
    try:
        actual = engine(component_inputs(bundle.manifest, name))
    finally:
        engine.close()
    dtype = bundle.manifest.components[name].dtype
    return _compare(f"{name}, {dtype}", actual, answers.components.get(name, {}), dtype)


def _check_component(pipe: Pipeline, name: str, answers: ReferenceOutputs) -> Check:
    part = name.removesuffix("_float32")
    component = pipe.manifest.components[part]
    plain = PLAIN_PARTS.get(part, part)
    tokenizer = pipe.tokenizer_2 if plain == "text_encoder_2" else pipe.tokenizer
    ids = tokenizer(["", PROMPT]) if tokenizer else None
    inputs = dict(component_inputs(pipe.manifest, plain, ids))
    if plain != part:  # without factors its outputs are the plain graph's
        spec = next(spec for spec in component.inputs if spec.name == LORA_FACTORS)
        rows = len(next(iter(inputs.values())))
        inputs[LORA_FACTORS] = np.zeros((rows, int(spec.shape[1])), spec.dtype)
    actual = pipe.engines[name](inputs)
    dtype = component.dtype if name == part else f"{component.dtype} weights in float32"
    reference = answers.components.get(plain, {})
    return _compare(f"{part}, {dtype}", actual, reference, component.dtype)


def _compare(
    what: str, actual: Feeds, reference: Mapping[str, Sequence[float] | np.ndarray], dtype: str
) -> Check:
    """Compare outputs with the stored samples of torch's, by the threshold of a precision."""
    floor = parity.PARITY_THRESHOLDS[dtype]
    expected = f"cosine at least {floor.cosine}, error at most {floor.error}"
    samples = {name: take_samples(answer) for name, answer in actual.items()}
    lengths = {name: len(array) for name, array in samples.items()}
    if lengths != {name: len(array) for name, array in reference.items()}:
        return Check(what, "outputs of other names or shapes than the reference", expected, False)
    every = [
        parity.measure(samples[name], np.array(array), is_image=False)
        for name, array in reference.items()
    ]
    values = parity.worst_case(every)
    passed = values["cosine"] >= floor.cosine and values["error"] <= floor.error
    result = f"cosine {values['cosine']:.7g}, error {values['error']:.2g}"
    return Check(what, result, expected, passed)
