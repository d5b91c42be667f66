"""From a bundle to a pipeline: engines, tokenizers and sampler configuration.

Knows which of a bundle's components are loaded at once and which when they are first needed.
"""

from functools import partial

from sdrt.bundle import Bundle
from sdrt.engine import Candidate, Engine, LazyEngine
from sdrt.manifest import SHALLOW

from .lora import Adapters
from .pipeline import Pipeline
from .tokenizer import Tokenizer

AT_ONCE = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "safety_checker")


def load_pipeline(bundle: Bundle, candidate: Candidate) -> Pipeline:
    """Load a bundle's engines on the chosen backend; raises BackendError if one does not load."""
    assert candidate.load is not None
    manifest = bundle.manifest

    def tokenizer(encoder: str, folder: str) -> Tokenizer | None:
        if encoder not in manifest.components:
            return None
        return Tokenizer.from_folder(bundle.folder / folder, manifest.max_tokens)

    config = bundle.json("scheduler/scheduler_config.json")
    engines: dict[str, Engine] = {}
    try:
        for name in (each for each in AT_ONCE if each in manifest.components):
            engines[name] = candidate.load(bundle, name)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    engines["vae_encoder"] = LazyEngine(partial(candidate.load, bundle, "vae_encoder"))
    if SHALLOW in manifest.components and not candidate.backend.startswith("tensorrt"):
        engines[SHALLOW] = LazyEngine(partial(candidate.load, bundle, SHALLOW))
    if exact := bundle.in_float32("vae_decoder"):
        load = partial(candidate.load, exact, "vae_decoder")
        engines["vae_decoder_float32"] = LazyEngine(load)
    adapters = Adapters(bundle, engines)
    first = tokenizer("text_encoder", "tokenizer")
    second = tokenizer("text_encoder_2", "tokenizer_2")
    return Pipeline(manifest, first, engines, config, candidate.title, adapters, second)
