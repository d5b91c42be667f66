"""Runs that nobody observes, handed to an engine as one program.

Knows denoising states and the engine protocol; not how a backend runs a program.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdrt.bundle.manifest import Manifest
from sdrt.engine import Engine, ProgramEngine, SamplingProgram, SamplingResult, TextInput

from .denoising import DenoisingState, Guidance
from .options import GenerationOptions
from .samplers.table_data import SamplerTable

# Entries of a conditioning whose text the engine encodes itself.
INPUT_IDS, TOKEN_WEIGHTS = "input_ids", "weights"


def is_linear(table: SamplerTable, guidance: Guidance) -> bool:
    """Whether a run is nothing but rows of numbers: no clipping, no rescaled guidance, no feature
    reuse.
    """
    plain = not table.clip and table.full_evaluations is None
    return plain and (guidance.in_matrix or bool((guidance.num_rows == 1).all()))


def can_encode_text(
    manifest: Manifest, engines: Mapping[str, Engine], options: GenerationOptions
) -> bool:
    """Whether a program can run the text encoder too: its context is the UNet's only conditioning,
    and nothing observes or edits the run.
    """
    unet, encoder = (manifest.components.get(name) for name in ("unet", "text_encoder"))
    assert unet is not None
    input_names = {spec.name for spec in unet.inputs}
    excluded = (
        options.prompt_embeds,
        options.negative_prompt_embeds,
        options.mask_image,
        options.callback_on_step_end,
    )
    return (
        isinstance(engines["unet"], ProgramEngine)
        and input_names == {"sample", "timestep", "context"}
        and encoder is not None
        and encoder.dtype == unet.dtype  # its kernel reads and writes one type
        and "text_encoder_2" not in engines
        and not manifest.zero_empty_prompt
        and all(value is None for value in excluded)
    )


def run_sampling_program(
    engines: Mapping[str, Engine],
    states: Sequence[DenoisingState],
    *,
    decode: bool,
    clip_skip: int = 0,
) -> SamplingResult | None:
    """Run states to their end in one call of the UNet's engine.

    Args:
        engines: By component.
        states: At their beginning.
        decode: Whether the program runs the decoder too.
        clip_skip: Last layers of the text encoder to skip, where the states are conditioned on
            token ids.

    Returns:
        The result, or None where the engine or the states cannot be run as a program.
    """
    unet = engines["unet"]
    if not isinstance(unet, ProgramEngine):
        return None
    if (program := build_sampling_program(states, clip_skip)) is None:
        return None
    decoder = engines.get("vae_decoder") if decode else None
    return unet.run_program(program, engines.get("text_encoder"), decoder)


def build_sampling_program(
    states: Sequence[DenoisingState], clip_skip: int = 0
) -> SamplingProgram | None:
    """The program of states at their beginning; None unless they are alike and linear, and each has
    one prompt that never changes.
    """
    first = states[0]
    layout, guidance, count = first.layout, first.guidance, first.num_evaluations
    alike = all(
        state.layout is layout and state.guidance is guidance and not state.evaluations_done
        for state in states
    )
    # A program has one context, and the columns of one negative and one positive output; nets run
    # between the evaluations, and image prompts and LoRA factors are read by other graphs.
    is_plain = len(guidance.weights) == 1 and all(
        state.conditioning.is_constant
        and state.control is None
        and state.lora is None
        and not state.has_image_prompt
        for state in states
    )
    if not (alike and is_plain and is_linear(first.table, guidance)):
        return None
    batch = len(states)
    timesteps = np.asarray(first.table.timesteps, np.float32)  # [N]
    columns = [s.history.columns.reshape(-1, *s.history.shape) for s in states]
    inputs = [state.conditioning.select_inputs(0) for state in states]
    conditioning = {name: np.stack([rows[name] for rows in inputs]) for name in inputs[0]}
    program = SamplingProgram(
        history=np.stack(columns),  # [B, columns, C, H/8, W/8]
        coefficients=np.repeat(layout.rows[:, None], batch, axis=1),  # [N + 1, B, columns]
        timesteps=np.repeat(timesteps[:, None], batch, axis=1),  # [N, B]
        rows_per_image=tuple(guidance.num_rows.tolist()),
        columns_per_output=layout.outputs_per_evaluation,
        output_columns=tuple(layout.output_place(k) for k in range(count)),
        state_columns=tuple(layout.state_place(k) for k in (count - 1, *range(count))),
        conditioning=conditioning,
        extra_channels=np.stack([state.extra_channels for state in states]),  # [B, E, H/8, W/8]
    )
    if INPUT_IDS not in conditioning:
        return program
    text = TextInput(conditioning.pop(INPUT_IDS), conditioning.pop(TOKEN_WEIGHTS), clip_skip)
    return replace(program, text=text)
