"""Runs that nobody looks into, handed whole to an engine that can run them so.

Knows runs and the engine protocol; not how a backend does it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdrt.bundle.manifest import Manifest
from sdrt.engine import Engine, SamplingProgram, SamplingResult, TextInput

from .denoising import DenoisingState, Guidance
from .options import GenerationOptions
from .samplers.table import SamplerTable

INPUT_IDS, TOKEN_WEIGHTS = (
    "input_ids",
    "weights",
)  # of what a run is told where the engine reads text itself


def is_linear(table: SamplerTable, guidance: Guidance) -> bool:
    """Whether a run is nothing but rows of numbers: it neither clips nor sets the spread of the
    guided output back, nor reuses features.
    """
    guided = bool((guidance.scales != 1.0).any())
    plain = not table.clip and table.full is None
    return plain and (guidance.in_matrix or not guided)


def can_encode_text(
    manifest: Manifest, engines: Mapping[str, Engine], options: GenerationOptions
) -> bool:
    """Whether the engine can run the text encoder too: there is one, its context is all that the
    UNet is told, and nobody looks in between.
    """
    unet, encoder = (manifest.components.get(name) for name in ("unet", "text_encoder"))
    assert unet is not None
    fed = {spec.name for spec in unet.inputs}
    given = (options.prompt_embeds, options.negative_prompt_embeds, options.mask_image)
    return (
        hasattr(engines["unet"], "run_program")
        and fed == {"sample", "timestep", "context"}
        and encoder is not None
        and encoder.dtype == unet.dtype  # its kernel reads and writes one type
        and "text_encoder_2" not in engines
        and not manifest.zero_empty_prompt
        and all(each is None for each in (*given, options.callback_on_step_end))
    )


def run_sampling_program(
    engines: Mapping[str, Engine], runs: Sequence[DenoisingState], *, decoded: bool, skip: int = 0
) -> SamplingResult | None:
    """What becomes of runs, or None where the engine or the runs cannot be handed over.

    decoded: whether the decoder takes part
    skip: layers that a text encoder leaves out, where the runs are told text
    """
    whole = getattr(engines["unet"], "run_program", None)
    if whole is None or (schedule := build_sampling_program(runs, skip)) is None:
        return None
    decoder = engines.get("vae_decoder") if decoded else None
    made: SamplingResult = whole(schedule, engines.get("text_encoder"), decoder)
    return made


def build_sampling_program(runs: Sequence[DenoisingState], skip: int = 0) -> SamplingProgram | None:
    """What runs at their beginning will do; None if they are not alike, or not linear."""
    first = runs[0]
    plan, guidance, count = first.layout, first.guidance, first.num_evaluations
    used = tuple(2 if scale != 1.0 else 1 for scale in guidance.scales)
    alike = all(
        run.layout is plan and run.guidance is guidance and not run.evaluations_done for run in runs
    )
    if not alike or not is_linear(first.table, guidance):
        return None
    told = {name: np.stack([run.conditioning[name] for run in runs]) for name in first.conditioning}
    schedule = SamplingProgram(
        columns=np.stack([run.history.columns.reshape(-1, *run.history.shape) for run in runs]),
        rows=np.repeat(plan.rows[:, None], len(runs), axis=1),
        timesteps=np.repeat(
            np.asarray(first.table.timesteps, np.float32)[:, None], len(runs), axis=1
        ),
        used=used,
        per=plan.outputs_per_evaluation,
        output_places=tuple(plan.output_place(k) for k in range(count)),
        state_places=(plan.state_place(count - 1), *(plan.state_place(k) for k in range(count))),
        told=told,
        beside=np.stack([run.extra_channels for run in runs]),
    )
    if INPUT_IDS not in told:
        return schedule
    read = TextInput(told.pop(INPUT_IDS), told.pop(TOKEN_WEIGHTS), skip)
    return replace(schedule, read=read)
