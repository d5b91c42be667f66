"""What a model predicts: noise, velocity or the sample; and whether it starts from pure noise.

Knows the marks that published files carry and the options of `sdrt build`; reads no file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdrt.errors import CheckpointError, UsageError
from sdrt.runtime.samplers.registry import CLIP, SAMPLERS, ZERO_SNR

KINDS = ("epsilon", "v_prediction", "sample")
SPELLINGS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "sample": "sample",
    "x0": "sample",
}
METADATA_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
BASE_STEP = 875_000  # the `global_step` of the 2.1 model for 512 pixels, which predicts noise
ARCHITECTURES = {
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
}
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the UNet's output is, and why that is believed.

    kind: epsilon, v_prediction or sample
    zero_snr: whether the schedule is rescaled so that its last step is pure noise
    reason: one line for a person
    """

    kind: str
    zero_snr: bool
    reason: str

    def __str__(self) -> str:
        ending = " with zero terminal SNR" if self.zero_snr else ""
        return f"{self.kind}{ending} ({self.reason})"

    @property
    def sample_size(self) -> int:
        """Side of the latents that published 2.x models were trained on."""
        return 96 if self.kind == "v_prediction" else 64


def prediction_from_marks(
    keys: Mapping[str, Any] | set[str],
    metadata: Mapping[str, str],
    global_step: float | None,
    open_clip: bool,
) -> Prediction | None:
    """What a single file says that its model predicts; None if nothing says it.

    Args:
        keys: the names of the file's tensors.
        metadata: of the file's header.
        global_step: the training step that the file records, if any.
        open_clip: whether it is a model of the 2.x family, of which the step is a mark.

    Raises:
        CheckpointError: a parameterization that no sampler here has, or an unknown name of one.

    The marks are those of ComfyUI and the A1111 web UI (`v_pred`, `ztsnr`), of ModelSpec, of
    sd-scripts (`ss_*`), and the step by which diffusers knows the 2.1 model for 512 pixels.
    """
    if detected := [key for key in EDM if key in keys]:
        raise CheckpointError(
            f"the file holds {', '.join(detected)}: its model is parameterized as in EDM (such as "
            "Playground 2.5), which is not supported; expected a model that predicts epsilon, "
            "v_prediction or the sample on the schedule of Stable Diffusion"
        )
    says = _said(keys, metadata)
    if open_clip and not says:
        says = _said_of_2x(metadata, global_step)
    if not says:
        return None
    kind, reason = says[0]
    if others := [f"{why} says {other}" for other, why in says[1:] if other != kind]:
        reason = f"{reason}, although {' and '.join(others)}"
    zero = "ztsnr" in keys or _true(metadata, "ss_zero_terminal_snr")
    if zero and kind == "epsilon":
        zero, reason = False, f"{reason}; its mark of zero terminal SNR needs v_prediction"
    return Prediction(kind, zero, reason)


def _said(keys: Mapping[str, Any] | set[str], metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """Every kind that the file names, and by what, the most explicit first."""
    says = [("v_prediction", "the file's key v_pred")] if "v_pred" in keys else []
    for key in METADATA_KEYS:
        if text := metadata.get(key):
            if text.lower() not in SPELLINGS:
                raise CheckpointError(
                    f"the file's metadata has {key}={text[:60]!r}; expected one of "
                    f"{', '.join(SPELLINGS)}"
                )
            says.append((SPELLINGS[text.lower()], f"the file's metadata {key}"))
    if "ss_v_parameterization" in metadata:
        kind = "v_prediction" if _true(metadata, "ss_v_parameterization") else "epsilon"
        says.append((kind, "the file's metadata ss_v_parameterization"))
    return says


def _said_of_2x(metadata: Mapping[str, str], step: float | None) -> list[tuple[str, str]]:
    architecture = metadata.get("modelspec.architecture", "")
    for name, kind in ARCHITECTURES.items():
        if architecture.startswith(name):
            return [(kind, f"the file's metadata modelspec.architecture is {name}")]
    if step == BASE_STEP:
        return [("epsilon", f"global_step is {BASE_STEP}, that of the 2.1 model for 512 pixels")]
    return []


def _true(metadata: Mapping[str, str], key: str) -> bool:
    return metadata.get(key, "").strip().lower() in ("true", "1")


def prediction_of_scheduler(scheduler: Mapping[str, Any]) -> Prediction:
    """What a `scheduler_config.json` says."""
    kind = str(scheduler.get("prediction_type", "epsilon"))
    named = "prediction_type" in scheduler
    reason = "scheduler_config.json" if named else "scheduler_config.json names none: the default"
    return Prediction(kind, bool(scheduler.get("rescale_betas_zero_snr")), reason)


def chosen_prediction(detected: Prediction, kind: str | None, zero_snr: bool) -> Prediction:
    """What the options of a build make of it; raises UsageError for a pair that cannot be."""
    if kind is None and not zero_snr:
        return detected
    options = [f"--prediction-type {kind}"] if kind else []
    options += ["--zero-snr"] if zero_snr else []
    reason, chosen = " ".join(options), kind or detected.kind
    if zero_snr and chosen == "epsilon":
        raise UsageError(
            "--zero-snr starts from pure noise, about which a model that predicts noise says "
            f"nothing, and this one predicts {detected}; add --prediction-type v_prediction or "
            "sample"
        )
    if kind and kind != detected.kind:
        reason += f", instead of {detected}"
    return Prediction(chosen, zero_snr or (detected.zero_snr and chosen != "epsilon"), reason)


def scheduler_of_pipeline(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration as `StableDiffusionPipeline` of diffusers corrects it when it is
    loaded: timesteps are offset by one, and nothing is clipped.
    """
    sampler = SAMPLERS.get(str(scheduler.get("_class_name")))
    corrected = {**scheduler, "steps_offset": 1}
    if "clip_sample" in scheduler or (sampler and sampler.options >= CLIP):
        corrected["clip_sample"] = False
    return corrected


def scheduler_with(scheduler: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """A scheduler's configuration that says what the model predicts.

    With zero terminal SNR the steps are spaced from the last on, as Lin et al. 2023
    (arXiv:2305.08891) have it, and a scheduler that cannot rescale its betas becomes DDIM.
    """
    changed = {**scheduler, "prediction_type": prediction.kind}
    if not prediction.zero_snr:
        changed.pop("rescale_betas_zero_snr", None)
        return changed
    sampler = SAMPLERS.get(str(scheduler.get("_class_name")))
    if sampler is None or not sampler.options >= ZERO_SNR:
        changed["_class_name"] = "DDIMScheduler"
        changed.pop("skip_prk_steps", None)
    return {**changed, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
