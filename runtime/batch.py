"""Images that are denoised together: their states, and what edits their latents between
evaluations.

Knows conditioning and initial states; not engines.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sdrt.errors import UsageError

from .conditioning_schedule import ConditioningSchedule
from .controlnet.control import Control
from .denoising import DenoisingState, LatentEdit, get_history_layout
from .initial_latents import ImageInputs, InitialState
from .job import GenerationJob
from .parsing import invalid_argument, parse_array
from .prompt_timeline import PromptTimeline
from .requests import Request


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that are generated together.

    Attributes:
        requests: One for each image.
        conditioning: Of each image, what the UNet reads besides latents and timestep.
        initial_states: Of each image.
        image_inputs: The call's, which all of them share.
        timeline: The first one's; the others share its `GenerationJob.get_run_key`.
        control: The same, of its ControlNets and T2I-Adapters.
    """

    requests: Sequence[Request]
    conditioning: Sequence[ConditioningSchedule]
    initial_states: Sequence[InitialState]
    image_inputs: ImageInputs
    timeline: PromptTimeline
    control: Control | None = None


def group_alike(
    conditioning: Mapping[Request, ConditioningSchedule],
    max_size: int,
    get_key: Callable[[Request], Hashable],
) -> Iterator[list[Request]]:
    """Images whose contexts have one length and whose runs have one key, at most `max_size`
    together, the shortest first.
    """
    groups: dict[tuple[int, Hashable], list[Request]] = {}
    for request, schedule in conditioning.items():
        length = next(iter(schedule.inputs.values())).shape[1] if schedule.inputs else 0
        groups.setdefault((length, get_key(request)), []).append(request)
    for _, group in sorted(groups.items(), key=lambda item: item[0][0]):
        for i in range(0, len(group), max_size):
            yield group[i : i + max_size]


def build_states(batch: Batch, job: GenerationJob) -> list[DenoisingState]:
    """The states of a batch, at their beginning."""
    table, guidance = job.get_table(batch.timeline), job.get_guidance(batch.timeline)
    layout = get_history_layout(table, guidance)
    lora = job.lora.unet if job.lora else None
    return [
        DenoisingState(
            *(table, guidance, layout, start.columns, conditioning),
            start.extra_channels,
            batch.control,
            lora,
        )
        for conditioning, start in zip(batch.conditioning, batch.initial_states, strict=True)
    ]


def build_latent_edit(pipe: object, batch: Batch, job: GenerationJob) -> LatentEdit | None:
    """What edits the latents after every evaluation: the mask, then the caller's callback.

    Args:
        pipe: The pipeline, for the callback.
        batch: Whose latents are edited.
        job: Its call.
    """
    if not batch.image_inputs.blends_mask and job.options.callback_on_step_end is None:
        return None
    return partial(_edit_latents, pipe, batch, job)


def _edit_latents(
    pipe: object, batch: Batch, job: GenerationJob, evaluations_done: int, latents: np.ndarray
) -> np.ndarray:
    """[B, C, H/8, W/8] -> the same shape."""
    if batch.image_inputs.blends_mask:
        latents = _blend_mask(batch, job, evaluations_done, latents)
    if job.options.callback_on_step_end is not None:
        latents = _call_back(pipe, job, evaluations_done, latents)
    return latents


def _blend_mask(
    batch: Batch, job: GenerationJob, evaluations_done: int, latents: np.ndarray
) -> np.ndarray:
    """Put the image back where the mask is 0, under as much noise as the latents have."""
    mask = batch.image_inputs.mask  # [1, H/8, W/8]
    assert mask is not None
    alpha, sigma = job.table.alphas_sigmas[evaluations_done].astype(np.float32)
    known = np.stack(
        [alpha * start.image_latents + sigma * start.columns[0] for start in batch.initial_states]
    )
    return mask * latents + (1.0 - mask) * known


def _call_back(
    pipe: object, job: GenerationJob, evaluations_done: int, latents: np.ndarray
) -> np.ndarray:
    """The latents as the caller's callback returns them; it sees them in the solver's scale."""
    callback = job.options.callback_on_step_end
    assert callback is not None
    scale = np.float32(job.table.scales[evaluations_done])
    timestep = float(job.table.timesteps[evaluations_done - 1])
    tensors = {"latents": latents * scale}
    index = job.evaluations_before + evaluations_done - 1
    returned = callback(pipe, index, timestep, tensors)
    if not isinstance(returned, Mapping | None):
        raise invalid_argument(
            "the result of callback_on_step_end", returned, 'None or {"latents": ...}'
        )
    changed = (returned or tensors).get("latents")
    if changed is None:
        return latents
    array = parse_array("latents of callback_on_step_end", changed)
    if array.shape != latents.shape:
        raise UsageError(
            f"callback_on_step_end returned latents {list(array.shape)}; "
            f"expected {list(latents.shape)}"
        )
    return array.astype(np.float32) / scale
