"""A refiner: a model that continues what another has begun, as the one of SDXL does.

Podell et al. 2023 (arXiv:2307.01952), section 2.5. Knows manifests and options; not the loop.
"""

from sdrt.bundle.manifest import Manifest
from sdrt.errors import UsageError

from .options import GenerationOptions


def check_refiner_task(manifest: Manifest, options: GenerationOptions) -> None:
    """Raise UsageError for a run from noise of a refiner, and for scores that no model reads."""
    if manifest.is_refiner and not options.starts_from_image:
        raise UsageError(
            f"{manifest.name} is a refiner without a base: it continues from an image",
            hint="pass image=... (--image FILE); or load a base model with this refiner",
        )
