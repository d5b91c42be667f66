"""Sampler and scheduler, which clients of `/sdapi` send as two fields, as one configuration."""

import logging
from collections.abc import Mapping
from typing import Any

from sdrt.errors import UsageError
from sdrt.runtime import Pipeline
from sdrt.runtime.samplers.registry import (
    AUTOMATIC_SCHEDULES,
    LEVELS,
    SAMPLERS,
    SCHEDULES,
    config_from_name,
    pair_from_name,
    takes_schedule,
    title_of,
    titles,
)
from sdrt.serve.errors import ApiError

log = logging.getLogger("sdrt.serve")

# Samplers that have no use for a schedule there.
TIMED = {"DDIM", "DDPM", "PNDM", "PLMS", "UniPC", "LCM", "TCD"}
FALLBACK = "Euler"  # its default, for a schedule without a sampler
# Names of the original's older releases (with k_ before them) and of other servers.
ALIASES = {
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
ENDINGS = {"_ka": "Karras", "_karras": "Karras", "_exp": "Exponential"}
MORE_LABELS = {"ddim_uniform": "DDIM"}


def configuration(
    pipe: Pipeline, sampler: str | None, scheduler: str | None, eta: float | None
) -> Mapping[str, Any] | None:
    """The scheduler configuration for what a client sent; None for the model's own.

    Raises ApiError 400 for a name that is not known, or a pair that is not supported.
    """
    label, own = schedule_label(scheduler), pipe.scheduler_config
    xl = pipe.tokenizer_2 is not None
    config: Mapping[str, Any] | None = None
    if sampler and sampler.strip() in SAMPLERS and not label:
        config = config_from_name(sampler.strip(), own)
    elif sampler and sampler.strip():
        title, joined = _pair(sampler)
        label = joined or _usable(title, label) or AUTOMATIC_SCHEDULES.get(title, "")
        config = config_from_name(f"{title} {label}".strip(), own, xl=xl)
    elif label:
        title, _ = pair_from_name(title_of(own))
        title = title if takes_schedule(title, label) else FALLBACK
        config = config_from_name(f"{title} {label}", own, xl=xl)
    return _with_eta(own if config is None else config, eta) if eta is not None else config


def schedule_label(scheduler: str | None) -> str:
    """A schedule's label from its label or its internal name; "" for what is left to the sampler.

    Raises ApiError 400 for one that is not known.
    """
    wanted = (scheduler or "automatic").strip().casefold().replace("_", " ")
    if wanted in ("automatic", "", "none"):
        return ""
    known = {label.casefold(): label for label in SCHEDULES}
    known |= {name.replace("_", " "): label for label, name in SCHEDULES.items()}
    known |= {name.replace("_", " "): label for name, label in MORE_LABELS.items()}
    joined = {name.replace(" ", ""): label for name, label in known.items()}
    if found := known.get(wanted) or joined.get(wanted):
        return found
    have = ", ".join(["Automatic", *SCHEDULES])
    raise ApiError(
        400, f"scheduler {scheduler!r} is not supported; expected one of {have}", "scheduler"
    )


def _pair(sampler: str) -> tuple[str, str]:
    """A sampler's title and the schedule that its name may hold."""
    name = sampler.strip()
    if name in SAMPLERS:
        return SAMPLERS[name].title, ""
    alias, label = name.casefold().replace(" ", "_").removeprefix("k_"), ""
    for ending, law in ENDINGS.items():
        if alias.endswith(ending) and alias.removesuffix(ending) in ALIASES:
            alias, label = alias.removesuffix(ending), law
    if alias in ALIASES:
        return ALIASES[alias], label
    try:
        return pair_from_name(name)
    except UsageError:
        have = ", ".join(titles())
        message = f"sampler_name {name!r} is not supported; expected one of {have}"
        raise ApiError(400, message, "sampler_name", "invalid_value") from None


def _usable(title: str, label: str) -> str:
    """The schedule, if the sampler takes it; raises ApiError 400 where it should and cannot."""
    if not label or (takes_schedule(title, label) and title not in TIMED):
        return label
    if title in TIMED:
        log.info("%s goes by timesteps; the scheduler %s is passed over", title, label)
        return ""
    raise ApiError(
        400, f"scheduler {label} is not supported with {title}; choose another", "scheduler"
    )


def _with_eta(config: Mapping[str, Any], eta: float) -> Mapping[str, Any]:
    """With the share of fresh noise, where the sampler takes one; raises ApiError 400."""
    name = str(config["_class_name"])
    if "eta" in SAMPLERS[name].reads and name != "TCDScheduler":
        if not 0.0 <= eta <= 1.0:
            raise ApiError(400, f"eta {eta:g}; expected 0 to 1", "eta")
        return {**config, "eta": eta}
    if str(config.get("algorithm_type")).startswith("sde") and eta != 1.0:
        title = title_of(config)
        raise ApiError(400, f"eta {eta:g} is not supported with {title}; its value is 1", "eta")
    return config


def listed_samplers() -> list[dict[str, Any]]:
    """Every name that `sampler_name` takes, joined ones too, in the original's shape."""
    listed = []
    for title, (kind, _) in titles().items():
        aliases = [f"k_{alias}" for alias, of in ALIASES.items() if of == title] or [kind]
        options = (
            {"scheduler": AUTOMATIC_SCHEDULES[title].lower()}
            if title in AUTOMATIC_SCHEDULES
            else {}
        )
        listed.append({"name": title, "aliases": aliases, "options": options})
        for law in LEVELS:
            if takes_schedule(title, law):
                listed.append({"name": f"{title} {law}", "aliases": [], "options": {}})
    return listed


def listed_schedulers() -> list[dict[str, Any]]:
    """Every schedule that `scheduler` takes, in the original's shape."""
    rest = {"default_rho": -1.0, "need_inner_model": False}
    rows = [("automatic", "Automatic"), *((name, label) for label, name in SCHEDULES.items())]
    aliases = {"sgm_uniform": ["SGMUniform"], "ddim": ["ddim_uniform"]}
    return [{"name": n, "label": label, "aliases": aliases.get(n), **rest} for n, label in rows]
