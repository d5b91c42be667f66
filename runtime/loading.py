"""From a bundle to a pipeline: engines, tokenizers and sampler configuration.

Knows which of a bundle's components are loaded at once, and which when they are first used.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sdrt.bundle import Bundle
from sdrt.bundle.bundle import check_makes_images
from sdrt.bundle.manifest import (
    CONTROL,
    IP_ADAPTER,
    IP_ADAPTER_PARTS,
    LORA_PARTS,
    SHALLOW,
    TEXT_ENCODERS,
    WEIGHTS,
    Manifest,
)
from sdrt.bundle.safetensors import read_header
from sdrt.bundle.token_embeddings import TABLE, read_table, with_token_embeddings
from sdrt.engine import Candidate, Engine, ExclusiveSlot, LazyEngine
from sdrt.engine.memory_estimator import MemoryEstimator
from sdrt.errors import BundleError
from sdrt.json_validation import read_config
from sdrt.process_stats import resident_bytes
from sdrt.progress import log_progress

from .controlnet.net import load_control_nets
from .ip_adapter import load_ip_adapter
from .lora.adapters import Adapters
from .lora.rows import LoraRows
from .opening import open_concurrently
from .pipeline import Pipeline
from .refiner import check_refiner_fit
from .text.tokenizer import Tokenizer
from .textual_inversion.engine import WordEngine, word_engine_name
from .textual_inversion.store import EmbeddingStore
from .upscaling import Upscalers

REFINER_PARTS = ("text_encoder_2", "unet")  # what a refiner runs after a base
EAGER = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "safety_checker")


def load_pipeline(
    bundle: Bundle,
    candidate: Candidate,
    sequential: bool = False,
    control_bundles: Sequence[Bundle] = (),
    refiner: Bundle | None = None,
) -> Pipeline:
    """Load a bundle's engines on a backend.

    Args:
        bundle: The opened bundle.
        candidate: The backend.
        sequential: Whether one component at a time is loaded, when it is used; only the first now.
        control_bundles: Of ControlNets, T2I-Adapters and an IP-Adapter, which load when they are
            first used.
        refiner: Of a refiner, which does the last part of runs; its text encoder and UNet load.

    Raises:
        BackendError: If an engine fails to load.
        UsageError: For a net that does not fit the bundle.
    """
    check_makes_images(bundle)
    slot = ExclusiveSlot() if sequential else None
    if refiner is not None:
        check_refiner_fit(bundle.manifest, refiner.manifest)
        base = _load_bundle(bundle, candidate, slot, control_bundles, EAGER)
        try:
            # Only one component of both is loaded at a time.
            second = _load_bundle(refiner, candidate, slot, (), REFINER_PARTS)
        except BaseException:
            base.close()
            raise
        return replace(base, refiner=replace(second, leases=base.leases))
    return _load_bundle(bundle, candidate, slot, control_bundles, EAGER)


def _load_bundle(
    bundle: Bundle,
    candidate: Candidate,
    slot: ExclusiveSlot | None,
    control_bundles: Sequence[Bundle],
    eager: Sequence[str],
) -> Pipeline:
    """One bundle's engines.

    slot: of which one component at a time is loaded, if any
    eager: the components that are loaded now
    """
    load = candidate.load
    assert load is not None
    manifest = bundle.manifest
    ip_adapter = load_ip_adapter(manifest, control_bundles)
    net_bundles = [of for of in control_bundles if IP_ADAPTER not in of.manifest.components]
    nets = load_control_nets(manifest, net_bundles)
    concurrent = candidate.device == "cpu"

    def lazy(of: Bundle, name: str, turn: ExclusiveSlot | None = slot) -> LazyEngine:
        def open_engine() -> Engine:
            return _load_engines(of, [name], load, concurrent)[name]

        return LazyEngine(open_engine, of.manifest.components.get(name), turn)

    precision = candidate.reduced_precision or ""
    if precision not in manifest.admitted:
        precision = ""
    config = _scheduler_config(bundle)
    names = [name for name in eager if name in manifest.components]
    engines: dict[str, Engine] = {}
    if slot is not None:
        in_order = {name: lazy(bundle, name) for name in names}
        in_order[names[0]].loaded()  # so that a backend that fails to load is noticed now
        engines.update(in_order)
    else:
        engines.update(_load_engines(bundle, names, load, concurrent))
    engines["vae_encoder"] = lazy(bundle, "vae_encoder")
    if CONTROL in manifest.components:
        engines[CONTROL] = lazy(bundle, CONTROL)
    if SHALLOW in manifest.components and not candidate.backend.startswith("tensorrt"):
        # It is small and alternates with the UNet, so both stay loaded.
        engines[SHALLOW] = lazy(bundle, SHALLOW, None)
    for name in LORA_PARTS.values() if slot is None else ():  # they alternate with plain graphs
        if name in manifest.components:
            engines[name] = lazy(bundle, name)
    for net, of in zip(nets.values(), net_bundles, strict=True):
        # They alternate with the UNet too.
        engines[net.engine_name] = lazy(of, net.kind, None)
    for of in control_bundles:
        for name in IP_ADAPTER_PARTS:
            if name in of.manifest.components:
                engines[name] = lazy(of, name)
    if exact := bundle.in_float32("vae_decoder"):
        engines["vae_decoder_float32"] = lazy(exact, "vae_decoder")
    first = _open_tokenizer(bundle, "text_encoder", "tokenizer")
    second = _open_tokenizer(bundle, "text_encoder_2", "tokenizer_2")
    tokenizers = _by_encoder(first, second)
    for name, tokenizer in tokenizers.items():
        open_words = partial(_load_word_engine, bundle, name, tokenizer.end, load)
        engines[word_engine_name(name)] = LazyEngine(open_words, None, slot)
    embeddings = EmbeddingStore(tokenizers, {name: _width(manifest, name) for name in tokenizers})
    adapters = Adapters(bundle, engines, embeddings)
    return Pipeline(
        manifest,
        first,
        engines,
        config,
        candidate.title,
        adapters,
        second,
        bundle_config=config,
        precision=precision,
        memory_estimator=MemoryEstimator(
            bundle, candidate.gpu, candidate.title, resident_bytes(), bool(precision)
        ),
        upscalers=Upscalers(load),
        control_nets=nets,
        ip_adapter=ip_adapter,
        embeddings=embeddings,
        lora_rows=LoraRows(bundle, engines),
    )


def unloaded_pipeline(
    bundle: Bundle, control_bundles: Sequence[Bundle] = (), refiner: Bundle | None = None
) -> Pipeline:
    """A pipeline that validates calls but cannot run them. Only manifests and the scheduler's
    configuration are read.

    Raises:
        UsageError: For a net or a refiner that does not fit the bundle.
    """

    check_makes_images(bundle)
    if refiner is not None:
        check_refiner_fit(bundle.manifest, refiner.manifest)

    def open_engine() -> Engine:
        raise AssertionError("this pipeline has no engines")

    components = bundle.manifest.components
    engines: dict[str, Engine] = {
        name: LazyEngine(open_engine, components[name]) for name in components
    }
    config = _scheduler_config(bundle)
    adapters = Adapters(bundle, engines, EmbeddingStore({}, {}))
    net_bundles = [of for of in control_bundles if IP_ADAPTER not in of.manifest.components]
    nets = load_control_nets(bundle.manifest, net_bundles)
    return Pipeline(
        *(bundle.manifest, None, engines, config, "", adapters),
        bundle_config=config,
        control_nets=nets,
        ip_adapter=load_ip_adapter(bundle.manifest, control_bundles),
        refiner=unloaded_pipeline(refiner) if refiner else None,
    )


def _load_engines(
    bundle: Bundle, names: list[str], load: Callable[[Bundle, str], Engine], concurrent: bool
) -> dict[str, Engine]:
    """All of these engines; after an error none stays open.

    concurrent: in several threads, where one processor thread compiles each; a GPU's context
        belongs to this thread
    """
    if concurrent:
        return open_concurrently({name: partial(load, bundle, name) for name in names})
    engines: dict[str, Engine] = {}
    try:
        for name in names:
            with log_progress(partial("loading {}".format, name)):
                engines[name] = load(bundle, name)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return engines


def _scheduler_config(bundle: Bundle) -> dict[str, Any]:
    """The sampler's configuration, its values bounded as in all files of a bundle."""
    return read_config(bundle.folder / "scheduler" / "scheduler_config.json")


def _open_tokenizer(bundle: Bundle, encoder: str, folder: str) -> Tokenizer | None:
    """A text encoder's tokenizer; None where the bundle has no such encoder."""
    if encoder not in bundle.manifest.components:
        return None
    rows = _count_embeddings(bundle.graph(encoder).with_name(WEIGHTS))
    return Tokenizer.from_folder(bundle.folder / folder, bundle.manifest.max_tokens, rows)


def _by_encoder(first: Tokenizer | None, second: Tokenizer | None) -> dict[str, Tokenizer]:
    both = zip(TEXT_ENCODERS, (first, second), strict=True)
    return {name: tokenizer for name, tokenizer in both if tokenizer is not None}


def _width(manifest: Manifest, encoder: str) -> int:
    """Of a text encoder's embeddings."""
    return int(manifest.components[encoder].outputs[0].shape[-1])


def _load_word_engine(
    bundle: Bundle, name: str, end: int, load: Callable[[Bundle, str], Engine]
) -> WordEngine:
    """The engine for words that the vocabulary does not have; end: the id that ends a prompt."""
    table = read_table(bundle.graph(name).parent)
    return WordEngine(load(with_token_embeddings(bundle, name), name), *table, end)


def _count_embeddings(weights: Path) -> int | None:
    """How many tokens a text encoder has; None if its weights do not show it."""
    records = read_header(weights, BundleError).records
    shapes = [record.shape for name, record in records.items() if name.endswith(TABLE)]
    return shapes[0][0] if len(shapes) == 1 and len(shapes[0]) == 2 else None
