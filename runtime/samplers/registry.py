"""Every sampler by its diffusers class name, and the names that other tools use for it.

Knows solvers, grids and configurations; not what runs them.
"""

import difflib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sdrt.errors import UsageError
from sdrt.json_validation import shorten

from . import discrete, exponential, karras, spacing
from .noise_schedule import IGNORED, REFUSED, NoiseSchedule
from .protocol import Latent, SolverContext
from .spacing import TimestepGrid

SIGMAS = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
ZERO_SNR = {"rescale_betas_zero_snr"}
CLIP = {"clip_sample"}
FINAL = {"final_sigmas_type"}
SIGMA_SCHEDULE = {"sigma_schedule"}
ANCESTRAL = {"eta": 1.0}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
LINSPACE = {"timestep_spacing": "linspace"}


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """One sampler.

    Attributes:
        solve: The solver.
        build_grid: Its timesteps and sigmas for a number of steps.
        family: The module of the solver, which defines how a run starts.
        title: The name that A1111 and other tools use.
        defaults: Options of the diffusers class that differ from `NoiseSchedule`'s.
        options: The keys of `noise_schedule.SOLVER_OPTIONS` that it reads.
        evaluations_per_step: Model evaluations of a step.
        extra_evaluations: More evaluations than that in a run.
        adds_noise: Whether it adds noise by default.
    """

    solve: Callable[[NoiseSchedule, TimestepGrid, Latent, SolverContext], Latent]
    build_grid: Callable[[NoiseSchedule, int], TimestepGrid]
    family: ModuleType
    title: str
    defaults: Mapping[str, Any]
    options: Set[str]
    evaluations_per_step: int = 1
    extra_evaluations: int = 0
    adds_noise: bool = False

    def max_evaluations(self, steps: int) -> int:
        return self.evaluations_per_step * steps + self.extra_evaluations


SAMPLERS: dict[str, SamplerSpec] = {
    "DDIMScheduler": SamplerSpec(
        discrete.sample_ddim,
        spacing.discrete_grid,
        discrete,
        "DDIM",
        {"set_alpha_to_one": True, "clip_sample": True},
        ZERO_SNR | CLIP | {"eta"},
    ),
    "DDPMScheduler": SamplerSpec(
        discrete.sample_ddpm,
        spacing.discrete_grid,
        discrete,
        "DDPM",
        {"clip_sample": True},
        ZERO_SNR | CLIP,
        adds_noise=True,
    ),
    "PNDMScheduler": SamplerSpec(
        discrete.sample_pndm,
        spacing.discrete_grid,
        discrete,
        "PLMS",
        {},
        set(),
        extra_evaluations=9,
    ),
    "LMSDiscreteScheduler": SamplerSpec(
        karras.sample_lms, spacing.karras_grid, karras, "LMS", LINSPACE, SIGMAS | SIGMA_SCHEDULE
    ),
    "EulerDiscreteScheduler": SamplerSpec(
        karras.sample_euler,
        spacing.karras_grid,
        karras,
        "Euler",
        LINSPACE,
        SIGMAS | SIGMA_SCHEDULE | ZERO_SNR | FINAL | {"interpolation_type", "timestep_type"},
    ),
    "EulerAncestralDiscreteScheduler": SamplerSpec(
        karras.sample_euler_ancestral,
        spacing.karras_grid,
        karras,
        "Euler a",
        LINSPACE | ANCESTRAL,
        SIGMA_SCHEDULE | ZERO_SNR | {"eta"},
        adds_noise=True,
    ),
    "HeunDiscreteScheduler": SamplerSpec(
        karras.sample_heun,
        spacing.karras_grid,
        karras,
        "Heun",
        {**LINSPACE, **SD_BETAS},
        SIGMAS | SIGMA_SCHEDULE,
        evaluations_per_step=2,
    ),
    "KDPM2DiscreteScheduler": SamplerSpec(
        karras.sample_dpm_2,
        spacing.dpm2_grid,
        karras,
        "DPM2",
        {**LINSPACE, **SD_BETAS},
        SIGMAS | SIGMA_SCHEDULE,
        evaluations_per_step=2,
    ),
    "KDPM2AncestralDiscreteScheduler": SamplerSpec(
        karras.sample_dpm_2_ancestral,
        spacing.dpm2_grid,
        karras,
        "DPM2 a",
        {**LINSPACE, **SD_BETAS, **ANCESTRAL},
        SIGMAS | SIGMA_SCHEDULE | {"eta"},
        evaluations_per_step=2,
        adds_noise=True,
    ),
    "DPMSolverSDEScheduler": SamplerSpec(
        karras.sample_dpmpp_sde,
        spacing.karras_grid,
        karras,
        "DPM++ SDE",
        {**LINSPACE, **SD_BETAS, **ANCESTRAL},
        SIGMAS | SIGMA_SCHEDULE | {"eta"},
        evaluations_per_step=2,
        adds_noise=True,
    ),
    "DPMSolverMultistepScheduler": SamplerSpec(
        exponential.sample_dpm_multistep,
        spacing.dpm_multistep_grid,
        exponential,
        "DPM++ 2M",
        LINSPACE,
        SIGMAS
        | SIGMA_SCHEDULE
        | ZERO_SNR
        | FINAL
        | {"use_lu_lambdas", "lambda_min_clipped", "euler_at_final"},
    ),
    "DPMSolverSinglestepScheduler": SamplerSpec(
        exponential.sample_dpm_singlestep,
        spacing.dpm_singlestep_grid,
        exponential,
        "DPM++ 2S",
        {},
        SIGMAS | SIGMA_SCHEDULE | FINAL | {"lambda_min_clipped"},
    ),
    "DEISMultistepScheduler": SamplerSpec(
        exponential.sample_deis, spacing.deis_grid, exponential, "DEIS", LINSPACE, SIGMAS
    ),
    "UniPCMultistepScheduler": SamplerSpec(
        exponential.sample_unipc,
        spacing.exponential_grid,
        exponential,
        "UniPC",
        {**LINSPACE, "solver_type": "bh2"},
        SIGMAS | ZERO_SNR | FINAL,
    ),
    "LCMScheduler": SamplerSpec(
        discrete.sample_lcm,
        spacing.lcm_grid,
        discrete,
        "LCM",
        {**SD_BETAS, "beta_schedule": "scaled_linear", "set_alpha_to_one": True},
        ZERO_SNR | CLIP,
        adds_noise=True,
    ),
    "TCDScheduler": SamplerSpec(
        discrete.sample_tcd,
        spacing.lcm_grid,
        discrete,
        "TCD",
        {**SD_BETAS, "beta_schedule": "scaled_linear", "set_alpha_to_one": True, "eta": 0.3},
        ZERO_SNR | {"eta"},
        adds_noise=True,
    ),
}

# The sigma schedule that A1111 uses for a sampler when set to automatic; the others use none.
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
    """The class name of a configuration. Raises UsageError with the nearest names."""
    name = str(config.get("_class_name"))
    if name in SAMPLERS:
        return name
    near = difflib.get_close_matches(name, SAMPLERS, n=3, cutoff=0.5)
    raise UsageError(f"unknown scheduler {name!r}", hint=_names_hint(near))


# Names that other tools use besides the titles of `SAMPLERS`, with the options that they imply.
SDE = {"algorithm_type": "sde-dpmsolver++"}
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", SDE),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun", **SDE}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM++ 3M SDE": ("DPMSolverMultistepScheduler", {"solver_order": 3, **SDE}),
    "DPM++ 2S a": ("DPMSolverSDEScheduler", {"algorithm_type": "ancestral"}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": False}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
}
SIGMA_OPTIONS = {
    "Karras": "use_karras_sigmas",
    "Exponential": "use_exponential_sigmas",
    "Beta": "use_beta_sigmas",
}
# A1111's labels of its sigma schedules, with their internal names.
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
    """The configuration of a named sampler over the noise schedule of another configuration.

    Args:
        name: A class name, or a name such as `DPM++ 2M Karras`.
        config: The configuration whose noise schedule is used. A sampler that supports clipping
            clips if this one does.
        xl: Whether the model is of the SDXL family, which has its own Align Your Steps sigmas.

    Raises:
        UsageError: An unknown name, with the nearest ones.
    """
    base = {**config, "clip_sample": False, "thresholding": False}
    if name in SAMPLERS:
        return _copy_clipping({**base, "_class_name": name}, config)
    for other in ("algorithm_type", "solver_order", "solver_type", *SIGMA_OPTIONS.values()):
        base.pop(other, None)
    base.pop("sigma_schedule", None)
    base.pop("eta", None)
    title, label = parse_sampler_name(name)
    class_name, options = titles()[title]
    chosen = {
        **base,
        "_class_name": class_name,
        **options,
        **_schedule_options(class_name, label, xl),
    }
    return _copy_clipping(chosen, config)


def parse_sampler_name(name: str) -> tuple[str, str]:
    """`"dpm++ 2m karras"` -> ("DPM++ 2M", "Karras"); without a schedule the label is "". Raises
    UsageError with the nearest names.
    """
    requested, titled = name.strip().casefold(), {title.casefold(): title for title in titles()}
    if requested in titled:
        return titled[requested], ""
    for label in SCHEDULES:
        bare = requested.removesuffix(f" {label.casefold()}").strip()
        if bare != requested and bare in titled and supports_schedule(titled[bare], label):
            return titled[bare], label
    pairs = [(title, label) for title in titles() for label in SCHEDULES]
    combined = [f"{title} {label}" for title, label in pairs if supports_schedule(title, label)]
    near = difflib.get_close_matches(name[:60], [*SAMPLERS, *titles(), *combined], n=3, cutoff=0.4)
    raise UsageError(f"unknown scheduler {shorten(name)}", hint=_names_hint(near))


def _names_hint(near: list[str]) -> str:
    meant = f"did you mean {', '.join(near)}? " if near else ""
    return f"{meant}run `sdrt schedulers` for a list"


def supports_schedule(title: str, label: str) -> bool:
    """Whether a sampler, by its title, supports a sigma schedule, by its label."""
    reads = SAMPLERS[titles()[title][0]].options
    return SIGMA_OPTIONS.get(label) in reads or "sigma_schedule" in reads


def _schedule_options(class_name: str, label: str, xl: bool) -> dict[str, Any]:
    """The configuration keys that select a sigma schedule."""
    sampler = SAMPLERS[class_name]
    if not label:
        return {}
    # diffusers' own keys span the sigmas of the timestep spacing, which are all of the
    # model's only for exponential integrators.
    if sampler.family is exponential and (key := SIGMA_OPTIONS.get(label)) in sampler.options:
        return {str(key): True}
    schedule = SCHEDULES[label]
    return {"sigma_schedule": f"{schedule}_xl" if xl and "align" in schedule else schedule}


def _copy_clipping(chosen: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    default = SAMPLERS[name].defaults if (name := str(other.get("_class_name"))) in SAMPLERS else {}
    clips = other.get("clip_sample", default.get("clip_sample", False))
    if not SAMPLERS[chosen["_class_name"]].options >= CLIP:
        clips = False
    return {**chosen, "clip_sample": bool(clips)}


def titles() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every name that is not a class name, with its class and options."""
    return {sampler.title: (name, {}) for name, sampler in SAMPLERS.items()} | ALIASES


def sampler_title(config: Mapping[str, Any]) -> str:
    """The name that A1111 and other tools use for a configuration."""
    name = sampler_name(config)
    title, matched = SAMPLERS[name].title, 0
    for other, (class_name, options) in ALIASES.items():
        fits = all(config.get(key) == value for key, value in options.items())
        if class_name == name and fits and len(options) >= matched:
            title, matched = other, len(options)
    schedule = str(config.get("sigma_schedule") or "").removesuffix("_xl")
    label = next((label for label, key in SIGMA_OPTIONS.items() if config.get(key)), "")
    label = next((label for label, key in SCHEDULES.items() if key == schedule), label)
    return f"{title} {label}" if label and supports_schedule(title, label) else title


def config_overrides(
    title: str, config: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    """The options in which a configuration differs from `config_from_name(title, other)`; with them
    on top it gives the same run. None is the class's default.
    """
    named = config_from_name(title, other)
    keys = ({*config} | {*named}) - IGNORED
    differ = {key: config.get(key) for key in keys if config.get(key) != named.get(key)}
    return {key: value for key, value in differ.items() if value or key not in REFUSED}
