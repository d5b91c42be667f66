"""A1111's fields of a refiner as generation options."""

from typing import Any

from sdrt.runtime.refiner_options import DEFAULT_SWITCH
from sdrt.serve.errors import ApiError
from sdrt.serve.model_manager import LoadedModel
from sdrt.serve.schemas import TextToImageRequest

from .options import match_model_name

NO_REFINER = ("", "none")


def build_refiner_options(model: LoadedModel, body: TextToImageRequest) -> dict[str, Any]:
    """The options of a request's refiner; empty without one.

    Raises:
        ApiError: 400 for a refiner that is not loaded, and for a switch out of bounds.
    """
    name = (body.refiner_checkpoint or "").strip()
    if name.casefold() in NO_REFINER:
        return {}
    refiner = model.pipe.refiner
    known = [refiner.manifest.name] if refiner else []
    if match_model_name(name, known) is None:
        loaded = f"{model.name} has {known[0]}" if known else f"{model.name} has none"
        raise ApiError(
            400,
            f"refiner_checkpoint: unknown refiner {name!r}; {loaded} (`sdrt serve --refiner`)",
            "refiner_checkpoint",
            "unsupported_parameter",
        )
    switch = DEFAULT_SWITCH if body.refiner_switch_at is None else body.refiner_switch_at
    if not 0.0 < switch < 1.0:
        raise ApiError(
            400,
            f"refiner_switch_at {switch:g}; expected above 0 and below 1",
            "refiner_switch_at",
            "invalid_value",
        )
    return {"refiner_switch_at": switch}
