"""Converts A1111's sampler and scheduler, two fields, to one scheduler configuration."""

import logging
from collections.abc import Mapping
from typing import Any

from sdrt.errors import UsageError
from sdrt.runtime import Pipeline
from sdrt.runtime.samplers.registry import (
    AUTOMATIC_SCHEDULES,
    SAMPLERS,
    SCHEDULES,
    SIGMA_OPTIONS,
    config_from_name,
    parse_sampler_name,
    sampler_title,
    supports_schedule,
    titles,
)
from sdrt.serve.errors import ApiError

log = logging.getLogger("sdrt.serve")

# Samplers that ignore the schedule in A1111.
TIMESTEP_SAMPLERS = {"DDIM", "DDPM", "PNDM", "PLMS", "UniPC", "LCM", "TCD"}
DEFAULT_SAMPLER = "Euler"  # A1111's default, for a schedule without a sampler
# Names of older A1111 releases (with the prefix k_) and of other servers.
SAMPLER_ALIASES = {
    "euler_a": "Euler a",
    "euler_ancestral": "Euler a",
    "euler": "Euler",
    "lms": "LMS",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "dpm_2_ancestral": "DPM2 a",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "uni_pc": "UniPC",
}
SCHEDULE_SUFFIXES = {"_ka": "Karras", "_karras": "Karras", "_exp": "Exponential"}
SCHEDULE_ALIASES = {"ddim_uniform": "DDIM"}


def resolve_scheduler_config(
    pipe: Pipeline, sampler: str | None, scheduler: str | None, eta: float | None
) -> Mapping[str, Any] | None:
    """The scheduler configuration for a client's fields; None for that of the model.

    Raises:
        ApiError: 400 for an unknown name or an unsupported pair.
    """
    label, own = parse_schedule(scheduler), pipe.scheduler_config
    xl = pipe.tokenizer_2 is not None
    config: Mapping[str, Any] | None = None
    if sampler and sampler.strip() in SAMPLERS and not label:
        config = config_from_name(sampler.strip(), own)
    elif sampler and sampler.strip():
        title, joined = _parse_sampler(sampler)
        label = joined or _check_schedule(title, label) or AUTOMATIC_SCHEDULES.get(title, "")
        config = config_from_name(f"{title} {label}".strip(), own, xl=xl)
    elif label:
        title, _ = parse_sampler_name(sampler_title(own))
        title = title if supports_schedule(title, label) else DEFAULT_SAMPLER
        config = config_from_name(f"{title} {label}", own, xl=xl)
    return _apply_eta(own if config is None else config, eta) if eta is not None else config


def parse_schedule(scheduler: str | None) -> str:
    """The label of a schedule from its label or internal name; "" leaves it to the sampler. Raises
    ApiError 400 for an unknown one.
    """
    name = (scheduler or "automatic").strip().casefold().replace("_", " ")
    if name in ("automatic", "", "none"):
        return ""
    known = {label.casefold(): label for label in SCHEDULES}
    known |= {internal.replace("_", " "): label for label, internal in SCHEDULES.items()}
    known |= {alias.replace("_", " "): label for alias, label in SCHEDULE_ALIASES.items()}
    joined = {title.replace(" ", ""): label for title, label in known.items()}
    if label := known.get(name) or joined.get(name):
        return label
    expected = ", ".join(["Automatic", *SCHEDULES])
    raise ApiError(
        400, f"scheduler {scheduler!r} is not supported; expected one of {expected}", "scheduler"
    )


def _parse_sampler(sampler: str) -> tuple[str, str]:
    """The title of a sampler, and the schedule that its name may include."""
    name = sampler.strip()
    if name in SAMPLERS:
        return SAMPLERS[name].title, ""
    alias, label = name.casefold().replace(" ", "_").removeprefix("k_"), ""
    for suffix, schedule in SCHEDULE_SUFFIXES.items():
        if alias.endswith(suffix) and alias.removesuffix(suffix) in SAMPLER_ALIASES:
            alias, label = alias.removesuffix(suffix), schedule
    if alias in SAMPLER_ALIASES:
        return SAMPLER_ALIASES[alias], label
    try:
        return parse_sampler_name(name)
    except UsageError:
        expected = ", ".join(titles())
        message = f"sampler_name {name!r} is not supported; expected one of {expected}"
        raise ApiError(400, message, "sampler_name", "invalid_value") from None


def _check_schedule(title: str, label: str) -> str:
    """The schedule, "" if A1111 ignores it too; raises ApiError 400 if it is not supported."""
    if not label or (supports_schedule(title, label) and title not in TIMESTEP_SAMPLERS):
        return label
    if title in TIMESTEP_SAMPLERS:
        log.info("%s has its own timesteps; ignoring the scheduler %s", title, label)
        return ""
    raise ApiError(
        400, f"scheduler {label} is not supported with {title}; choose another", "scheduler"
    )


def _apply_eta(config: Mapping[str, Any], eta: float) -> Mapping[str, Any]:
    """Add eta, the amount of fresh noise, if the sampler has one; raises ApiError 400."""
    name = str(config["_class_name"])
    if "eta" in SAMPLERS[name].options and name != "TCDScheduler":
        if not 0.0 <= eta <= 1.0:
            raise ApiError(400, f"eta {eta:g}; expected 0 to 1", "eta")
        return {**config, "eta": eta}
    if str(config.get("algorithm_type")).startswith("sde") and eta != 1.0:
        title = sampler_title(config)
        raise ApiError(400, f"eta {eta:g} is not supported with {title}; expected 1", "eta")
    return config


def list_samplers() -> list[dict[str, Any]]:
    """Every name that `sampler_name` accepts, with and without schedule, in A1111's format."""
    listed = []
    for title, (class_name, _) in titles().items():
        aliases = [f"k_{alias}" for alias, name in SAMPLER_ALIASES.items() if name == title] or [
            class_name
        ]
        options = (
            {"scheduler": AUTOMATIC_SCHEDULES[title].lower()}
            if title in AUTOMATIC_SCHEDULES
            else {}
        )
        listed.append({"name": title, "aliases": aliases, "options": options})
        for schedule in SIGMA_OPTIONS:
            if supports_schedule(title, schedule):
                listed.append({"name": f"{title} {schedule}", "aliases": [], "options": {}})
    return listed


def list_schedulers() -> list[dict[str, Any]]:
    """Every schedule that `scheduler` accepts, in A1111's format."""
    rest = {"default_rho": -1.0, "need_inner_model": False}
    rows = [("automatic", "Automatic"), *((name, label) for label, name in SCHEDULES.items())]
    aliases = {"sgm_uniform": ["SGMUniform"], "ddim": ["ddim_uniform"]}
    return [{"name": n, "label": label, "aliases": aliases.get(n), **rest} for n, label in rows]
