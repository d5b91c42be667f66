"""What a checkpoint's configurations say of its model, parsed once and passed on.

Knows configurations and whether they fit each other; reads no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdrt.bundle.manifest import REFINER_TIME_IDS
from sdrt.errors import CheckpointError, UsageError

from .checkpoint import Checkpoint
from .pixel_unet import PixelUnetConfig
from .prediction import Prediction
from .single_file.parts import OPTIONS
from .text_encoder import prompt_length, text_config
from .tiny_vae import TinyVaeConfig
from .tokenizer import CheckpointTokenizer
from .unet_config import UnetConfig
from .vae import VaeConfig

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The architecture of a model and its settings.

    vae: None in unconditional models, which work in pixels
    text_encoders, tokenizers: by component, such as `text_encoder_2`; empty where there are none
    max_tokens: ids of every prompt, 0 where there are none
    scheduler: the contents of `scheduler_config.json`
    zero_empty_prompt: whether the conditioning of an empty negative prompt is zeros
    """

    unet: UnetConfig | PixelUnetConfig
    vae: VaeConfig | TinyVaeConfig | None
    text_encoders: Mapping[str, Mapping[str, Any]]
    tokenizers: Mapping[str, CheckpointTokenizer]
    max_tokens: int
    prediction: Prediction
    scheduler: Mapping[str, Any]
    zero_empty_prompt: bool

    @property
    def latent_channels(self) -> int:
        return self.unet.in_channels if self.vae is None else self.vae.latent_channels

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent."""
        return 1 if self.vae is None else self.vae.downscale

    @property
    def native_size(self) -> Size:
        """The size that the model was trained on."""
        if isinstance(self.unet, PixelUnetConfig):
            return self.unet.size
        sides = self.unet.sample_size or 64
        height, width = (sides, sides) if isinstance(sides, int) else sides
        return width * self.downscale, height * self.downscale

    @property
    def size_multiple(self) -> int:
        """Pixels that the sides of every image are multiples of."""
        return self.downscale * int(2 ** (len(self.unet.block_out_channels) - 1))

    @property
    def reads_aesthetic_score(self) -> bool:
        """Whether it is a refiner, which reads a score instead of the target's size."""
        unet = self.unet
        return isinstance(unet, UnetConfig) and unet.num_time_ids == REFINER_TIME_IDS

    @property
    def pooled_width(self) -> int:
        """Channels of the second text encoder's pooled output."""
        return int(list(self.text_encoders.values())[-1].get("projection_dim", 512))

    @property
    def context_width(self) -> int:
        """Channels of the context: the hidden states of all text encoders side by side."""
        return sum(config.get("hidden_size", 512) for config in self.text_encoders.values())


def read_model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """Parse a checkpoint's configurations and check that its components fit each other.

    Raises:
        CheckpointError: a setting that is not supported, or components of different models.
    """
    spec = parse_model_spec(checkpoint)
    _check_fit(spec, checkpoint)
    return spec


def parse_model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """Parse a checkpoint's configurations, each by itself; raises CheckpointError."""
    tokenizers = checkpoint.tokenizers()
    encoders = {part: text_config(checkpoint, part) for part in checkpoint.text_encoders}
    max_tokens = prompt_length(encoders, tokenizers)
    raw = checkpoint.config("unet")
    unconditional = checkpoint.unconditional
    spec = ModelSpec(
        unet=PixelUnetConfig.from_json(raw) if unconditional else UnetConfig.from_json(raw),
        vae=None if unconditional else _vae_config(checkpoint.config("vae")),
        text_encoders=encoders,
        tokenizers=tokenizers,
        max_tokens=max_tokens,
        prediction=checkpoint.prediction,
        scheduler=checkpoint.scheduler_config(),
        zero_empty_prompt=checkpoint.zeroes_empty_prompt(),
    )
    return replace(spec, unet=_with_time_ids(spec))


def _with_time_ids(spec: ModelSpec) -> UnetConfig | PixelUnetConfig:
    """The UNet with the number of its time ids, by the width of the pooled prompt."""
    unet = spec.unet
    if isinstance(unet, PixelUnetConfig) or unet.addition_embed_type is None:
        return unet
    refiner = replace(unet, num_time_ids=REFINER_TIME_IDS)
    return refiner if refiner.pooled_width == spec.pooled_width else unet


def _vae_config(raw: Mapping[str, Any]) -> VaeConfig | TinyVaeConfig:
    tiny = raw.get("_class_name") == "AutoencoderTiny"
    return TinyVaeConfig.from_json(raw) if tiny else VaeConfig.from_json(raw)


def _check_fit(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the components were made for one another."""
    if isinstance(spec.unet, PixelUnetConfig):
        return
    unet, hint = spec.unet, _component_hint(checkpoint)
    if unet.pooled_width and "text_encoder_2" not in spec.text_encoders:
        raise CheckpointError(
            f"the UNet expects a pooled prompt, and {checkpoint.folder} has no text_encoder_2",
            hint="pass --text-encoder-2, or a UNet of the same model family",
        )
    if not unet.pooled_width and "text_encoder_2" in spec.text_encoders:
        raise CheckpointError(
            "the UNet expects no pooled prompt, and the model has a text_encoder_2: the UNet is "
            "of another model family",
            hint=hint,
        )
    pooled = spec.pooled_width if unet.pooled_width else 0
    for what, actual, expected in (
        ("context", spec.context_width, unet.cross_attention_dim),
        ("pooled prompt", pooled, unet.pooled_width),
        ("latent", spec.latent_channels, unet.out_channels),
    ):
        if actual != expected:
            raise CheckpointError(
                f"the UNet expects a {what} of {expected} channels, the other components have "
                f"{actual}: one of them is of another model family",
                hint=hint,
            )
    _check_aesthetic_score(spec, checkpoint)


def _check_aesthetic_score(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless `model_index.json` and the UNet agree on the score."""
    says = checkpoint.requires_aesthetics_score
    if isinstance(spec.unet, UnetConfig) and says not in (None, spec.reads_aesthetic_score):
        raise CheckpointError(
            f"{checkpoint.folder}/model_index.json has requires_aesthetics_score={says}, and the "
            f"UNet reads {spec.unet.num_time_ids} time ids: one of them is another model's",
            hint="take both from one repository",
        )


def _component_hint(checkpoint: Checkpoint) -> str | None:
    """Which options to change where components do not fit; None if none were given."""
    options = [OPTIONS[part] for part in checkpoint.others if part in OPTIONS]
    return f"pass {' and '.join(options)} components of its family" if options else None


def check_feature_reuse(spec: ModelSpec, branch: int | None) -> None:
    """Raise UsageError unless the UNet has this branch at its first resolution, or it is None."""
    if branch is None:
        return
    if isinstance(spec.unet, PixelUnetConfig):
        raise UsageError("--feature-reuse needs a latent model; this one works in pixels")
    last = spec.unet.layers_per_block
    if not 0 <= branch <= last:
        raise UsageError(f"unknown --feature-reuse {branch}; this UNet has branches 0 to {last}")
