"""Which components a bundle has, and how each is loaded, exported and compared.

Knows the names of inputs, outputs and dynamic axes; the work is done elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdrt.runtime.embedded_guidance import GUIDANCE

from . import modules
from .checkpoint import Checkpoint
from .model_spec import ModelSpec
from .reference import Case, TorchReference


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one component is built.

    load: its torch module with the checkpoint's weights
    reference: torch's outputs to compare with
    outputs: names, in the order in which the module returns them
    axes: for each input, the names of its dynamic axes
    is_image: whether the output is an image, which is compared by PSNR as well
    """

    name: str
    load: Callable[[Checkpoint, ModelSpec], Any]
    reference: Callable[[TorchReference, Any], list[Case]]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]
    is_image: bool = False

    @property
    def part(self) -> str:
        """The checkpoint's component whose weights it has."""
        return "vae" if self.name.startswith("vae") else self.name


LATENT_AXES = {0: "rows", 2: "latent_height", 3: "latent_width"}
RECIPES = (
    Recipe(
        "text_encoder",
        modules.load_text_encoder,
        TorchReference.text_encoder,
        outputs=("contexts",),
        axes={"input_ids": {0: "rows"}},
    ),
    Recipe(
        "text_encoder_2",
        modules.load_text_encoder_2,
        TorchReference.text_encoder_2,
        outputs=("contexts", "pooled"),
        axes={"input_ids": {0: "rows"}},
    ),
    Recipe(
        "unet",
        modules.load_unet,
        TorchReference.unet,
        outputs=("output",),
        axes={
            "sample": LATENT_AXES,
            "context": {0: "rows", 1: "tokens"},
            **{name: {0: "rows"} for name in ("timestep", "pooled", "time_ids", GUIDANCE)},
        },
    ),
    Recipe(
        "vae_decoder",
        modules.load_vae_decoder,
        TorchReference.vae_decoder,
        outputs=("image",),
        axes={"latents": LATENT_AXES},
        is_image=True,
    ),
    Recipe(
        "safety_checker",
        modules.load_safety_checker,
        TorchReference.safety_checker,
        outputs=("special", "concepts"),
        axes={"pixels": {0: "rows"}},
    ),
    Recipe(
        "vae_encoder",
        modules.load_vae_encoder,
        TorchReference.vae_encoder,
        outputs=("mean", "std"),
        axes={"image": {0: "rows", 2: "height", 3: "width"}},
    ),
)
