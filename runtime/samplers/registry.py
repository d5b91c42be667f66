"""Every sampler under its class name, with the names that other tools use for it."""

import difflib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sdrt.errors import UsageError
from sdrt.json_validation import shorten

from . import discrete, exponential, karras, spacing
from .noise_schedule import IGNORED, REFUSED, NoiseSchedule
from .protocol import Latent, Run
from .spacing import TimestepGrid

KARRAS = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
ZERO_SNR = {"rescale_betas_zero_snr"}
CLIP = {"clip_sample"}
FINAL = {"final_sigmas_type"}
LEVELLED = {"sigma_schedule"}
ANCESTRAL = {"eta": 1.0}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
LINSPACE = {"timestep_spacing": "linspace"}


@dataclass(frozen=True, slots=True)
class Sampler:
    """
    solve: the solver. ladder: its rungs. family: the module that says how its run starts
    title: the name users' tools know
    defaults: its class's own, where they differ from `Schedule`'s
    reads: the keys of `noise_schedule.FOREIGN` that it reads
    per_step: evaluations that a step costs; extra: more than that in a run
    draws: whether it draws fresh noise by default
    """

    solve: Callable[[NoiseSchedule, TimestepGrid, Latent, Run], Latent]
    ladder: Callable[[NoiseSchedule, int], TimestepGrid]
    family: ModuleType
    title: str
    defaults: Mapping[str, Any]
    reads: Set[str]
    per_step: int = 1
    extra: int = 0
    draws: bool = False

    def most_evaluations(self, steps: int) -> int:
        return self.per_step * steps + self.extra


SAMPLERS: dict[str, Sampler] = {
    "DDIMScheduler": Sampler(
        discrete.ddim,
        spacing.whole,
        discrete,
        "DDIM",
        {"set_alpha_to_one": True, "clip_sample": True},
        ZERO_SNR | CLIP | {"eta"},
    ),
    "DDPMScheduler": Sampler(
        discrete.ddpm,
        spacing.whole,
        discrete,
        "DDPM",
        {"clip_sample": True},
        ZERO_SNR | CLIP,
        draws=True,
    ),
    "PNDMScheduler": Sampler(discrete.pndm, spacing.whole, discrete, "PLMS", {}, set(), extra=9),
    "LMSDiscreteScheduler": Sampler(
        karras.lms, spacing.exploding, karras, "LMS", LINSPACE, KARRAS | LEVELLED
    ),
    "EulerDiscreteScheduler": Sampler(
        karras.euler,
        spacing.exploding,
        karras,
        "Euler",
        LINSPACE,
        KARRAS | LEVELLED | ZERO_SNR | FINAL | {"interpolation_type", "timestep_type"},
    ),
    "EulerAncestralDiscreteScheduler": Sampler(
        karras.euler_ancestral,
        spacing.exploding,
        karras,
        "Euler a",
        LINSPACE | ANCESTRAL,
        LEVELLED | ZERO_SNR | {"eta"},
        draws=True,
    ),
    "HeunDiscreteScheduler": Sampler(
        karras.heun,
        spacing.exploding,
        karras,
        "Heun",
        {**LINSPACE, **SD_BETAS},
        KARRAS | LEVELLED,
        per_step=2,
    ),
    "KDPM2DiscreteScheduler": Sampler(
        karras.dpm2,
        spacing.rounded_exploding,
        karras,
        "DPM2",
        {**LINSPACE, **SD_BETAS},
        KARRAS | LEVELLED,
        per_step=2,
    ),
    "KDPM2AncestralDiscreteScheduler": Sampler(
        karras.dpm2_ancestral,
        spacing.rounded_exploding,
        karras,
        "DPM2 a",
        {**LINSPACE, **SD_BETAS, **ANCESTRAL},
        KARRAS | LEVELLED | {"eta"},
        per_step=2,
        draws=True,
    ),
    "DPMSolverSDEScheduler": Sampler(
        karras.dpmpp_sde,
        spacing.exploding,
        karras,
        "DPM++ SDE",
        {**LINSPACE, **SD_BETAS, **ANCESTRAL},
        KARRAS | LEVELLED | {"eta"},
        per_step=2,
        draws=True,
    ),
    "DPMSolverMultistepScheduler": Sampler(
        exponential.dpm_multistep,
        spacing.cosine_before_end,
        exponential,
        "DPM++ 2M",
        LINSPACE,
        KARRAS
        | LEVELLED
        | ZERO_SNR
        | FINAL
        | {"use_lu_lambdas", "lambda_min_clipped", "euler_at_final"},
    ),
    "DPMSolverSinglestepScheduler": Sampler(
        exponential.dpm_singlestep,
        spacing.linspace_before_end,
        exponential,
        "DPM++ 2S",
        {},
        KARRAS | LEVELLED | FINAL | {"lambda_min_clipped"},
    ),
    "DEISMultistepScheduler": Sampler(
        exponential.deis, spacing.to_the_lowest, exponential, "DEIS", LINSPACE, KARRAS
    ),
    "UniPCMultistepScheduler": Sampler(
        exponential.unipc,
        spacing.before_end,
        exponential,
        "UniPC",
        {**LINSPACE, "solver_type": "bh2"},
        KARRAS | ZERO_SNR | FINAL,
    ),
    "LCMScheduler": Sampler(
        discrete.lcm,
        spacing.distilled,
        discrete,
        "LCM",
        {**SD_BETAS, "beta_schedule": "scaled_linear", "set_alpha_to_one": True},
        ZERO_SNR | CLIP,
        draws=True,
    ),
    "TCDScheduler": Sampler(
        discrete.tcd,
        spacing.distilled,
        discrete,
        "TCD",
        {**SD_BETAS, "beta_schedule": "scaled_linear", "set_alpha_to_one": True, "eta": 0.3},
        ZERO_SNR | {"eta"},
        draws=True,
    ),
}

# The schedule that A1111's samplers have where it is left to them; the others take the plain one.
AUTOMATIC_SCHEDULES = {
    "DPM++ 2M": "Karras",
    "DPM++ SDE": "Karras",
    "DPM++ 2M SDE": "Exponential",
    "DPM++ 2M SDE Heun": "Exponential",
    "DPM++ 2S a": "Karras",
    "DPM++ 3M SDE": "Exponential",
    "DPM2": "Karras",
    "DPM2 a": "Karras",
}


def sampler_name(config: Mapping[str, Any]) -> str:
    """The class name a configuration asks for; raises UsageError with the nearest ones."""
    name = str(config.get("_class_name"))
    if name in SAMPLERS:
        return name
    near = difflib.get_close_matches(name, SAMPLERS, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UsageError(f"scheduler {name!r} is not known; {hint}type: sdrt schedulers")


# Names that other tools use, beyond those of `SAMPLERS`, and the options that they stand for.
SDE = {"algorithm_type": "sde-dpmsolver++"}
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", SDE),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun", **SDE}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM++ 3M SDE": ("DPMSolverMultistepScheduler", {"solver_order": 3, **SDE}),
    "DPM++ 2S a": ("DPMSolverSDEScheduler", {"algorithm_type": "ancestral"}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": False}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
}
LEVELS = {
    "Karras": "use_karras_sigmas",
    "Exponential": "use_exponential_sigmas",
    "Beta": "use_beta_sigmas",
}
# A1111's labels of the schedules that a sampler by noise levels takes, with their internal names.
SCHEDULES = {
    "Uniform": "uniform",
    "Karras": "karras",
    "Exponential": "exponential",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm_uniform",
    "KL Optimal": "kl_optimal",
    "Align Your Steps": "align_your_steps",
    "Simple": "simple",
    "Normal": "normal",
    "DDIM": "ddim",
    "Beta": "beta",
}


def config_from_name(name: str, config: Mapping[str, Any], *, xl: bool = False) -> dict[str, Any]:
    """A configuration for a class name or a name such as `DPM++ 2M Karras`, over the noise
    schedule of another. A sampler that can clip does so if the other does.

    xl: whether the model is of the XL family, for the schedules that differ there
    """
    kept = {**config, "clip_sample": False, "thresholding": False}
    if name in SAMPLERS:
        return _clipping_as({**kept, "_class_name": name}, config)
    for other in ("algorithm_type", "solver_order", "solver_type", *LEVELS.values()):
        kept.pop(other, None)
    kept.pop("sigma_schedule", None)
    kept.pop("eta", None)
    title, label = pair_from_name(name)
    class_name, options = titles()[title]
    chosen = {**kept, "_class_name": class_name, **options, **_laid(class_name, label, xl)}
    return _clipping_as(chosen, config)


def pair_from_name(name: str) -> tuple[str, str]:
    """`"dpm++ 2m karras"` -> ("DPM++ 2M", "Karras"), no schedule being ""; raises UsageError with
    the nearest names.
    """
    wanted, titled = name.strip().casefold(), {title.casefold(): title for title in titles()}
    if wanted in titled:
        return titled[wanted], ""
    for label in SCHEDULES:
        bare = wanted.removesuffix(f" {label.casefold()}").strip()
        if bare != wanted and bare in titled and takes_schedule(titled[bare], label):
            return titled[bare], label
    pairs = [(title, label) for title in titles() for label in SCHEDULES]
    levels = [f"{title} {label}" for title, label in pairs if takes_schedule(title, label)]
    near = difflib.get_close_matches(name[:60], [*SAMPLERS, *titles(), *levels], n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UsageError(f"scheduler {shorten(name)} is not known; {hint}type: sdrt schedulers")


def takes_schedule(title: str, label: str) -> bool:
    """Whether a sampler, by its title, takes a schedule of noise levels, by its label."""
    reads = SAMPLERS[titles()[title][0]].reads
    return LEVELS.get(label) in reads or "sigma_schedule" in reads


def _laid(class_name: str, label: str, xl: bool) -> dict[str, Any]:
    """The keys for a schedule."""
    sampler = SAMPLERS[class_name]
    if not label:
        return {}
    # The reference library's own keys lay it between the ends of the timestep spacing, which are
    # the model's only for solvers in log signal-to-noise ratio.
    if sampler.family is exponential and (key := LEVELS.get(label)) in sampler.reads:
        return {str(key): True}
    schedule = SCHEDULES[label]
    return {"sigma_schedule": f"{schedule}_xl" if xl and "align" in schedule else schedule}


def _clipping_as(chosen: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    default = SAMPLERS[name].defaults if (name := str(other.get("_class_name"))) in SAMPLERS else {}
    clips = other.get("clip_sample", default.get("clip_sample", False))
    if not SAMPLERS[chosen["_class_name"]].reads >= CLIP:
        clips = False
    return {**chosen, "clip_sample": bool(clips)}


def titles() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every name that is no class name, with its class and options."""
    return {sampler.title: (name, {}) for name, sampler in SAMPLERS.items()} | NAMED


def title_of(config: Mapping[str, Any]) -> str:
    """The name that users' tools know for a configuration."""
    name = sampler_name(config)
    title, most = SAMPLERS[name].title, 0
    for other, (class_name, options) in NAMED.items():
        fits = all(config.get(key) == value for key, value in options.items())
        if class_name == name and fits and len(options) >= most:
            title, most = other, len(options)
    laid = str(config.get("sigma_schedule") or "").removesuffix("_xl")
    label = next((label for label, key in LEVELS.items() if config.get(key)), "")
    label = next((label for label, key in SCHEDULES.items() if key == laid), label)
    return f"{title} {label}" if label and takes_schedule(title, label) else title


def config_beyond_name(
    title: str, config: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    """What of a configuration is not what its title means over another's noise schedule: with
    these on top `config_from_name(title, other)` gives the same run. None is the class's default.
    """
    named = config_from_name(title, other)
    keys = ({*config} | {*named}) - IGNORED
    differ = {key: config.get(key) for key in keys if config.get(key) != named.get(key)}
    return {key: value for key, value in differ.items() if value or key not in REFUSED}
