"""A bundle as a model of Triton's Python backend. `sdrt export-triton` copies this file to be a
model's `model.py`, with the bundle beside it.

Knows the Python backend; runs in a process of Triton's, never in one of sdrt's. All requests of an
instance share one engine in flight, so Triton's own batching is off, and each is answered as soon
as its picture is there.
"""

import json
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

OPTIONS = {
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "seed": "seed",
    "size": "size",
}


class TritonPythonModel:
    """One instance: a process with a pipeline and an engine of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle; what goes wrong here Triton shows as the model's state."""
        if args["model_instance_kind"] == "GPU":  # before anything looks for devices
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        import sdrt
        from sdrt.runtime.batching.engine import InflightBatcher

        given = json.loads(args["model_config"])["parameters"]
        set_to = {name: value["string_value"] for name, value in given.items()}
        folder = Path(__file__).parent / "bundle"
        self.pipe = sdrt.load(folder, backend=set_to["backend"])
        slots, waiting = int(set_to["slots"]), int(set_to["waiting"])
        self.engine = InflightBatcher(
            self.pipe, slots=slots, waiting=waiting, kept=folder / "plans"
        )
        self.engine.start()

    def execute(self, requests: list[Any]) -> None:
        """Begin all of them; each response goes out when its picture is done."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._begin(request, sender)
            except Exception as error:
                send(sender, pb_utils.InferenceResponse(error=triton_error_from(error)))

    def _begin(self, request: Any, sender: Any) -> None:
        options = {
            option: value
            for name, option in OPTIONS.items()
            if (value := value_of(request, name)) is not None
        }

        def on_step(ticket: Any, _: object) -> None:
            if sender.is_cancelled():
                ticket.cancel()

        [ticket] = self.engine.submit(
            value_of(request, "prompt"),
            options,
            scheduler=value_of(request, "scheduler"),
            on_step=on_step,
        )
        ticket.future.add_done_callback(lambda future: send(sender, response_from(future)))

    def finalize(self) -> None:
        """Triton unloads a model when its requests are answered."""
        self.engine.close()
        self.pipe.close()


def value_of(request: Any, name: str) -> Any:
    """The one value of an input, as Python has it; None if it was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1)
    if values.size != 1:
        raise ValueError(f"{name} has {values.size} values; expected 1")
    value = values[0]
    return value.decode("utf-8") if isinstance(value, bytes) else value.item()


def response_from(future: "Future[Any]") -> Any:
    """image [H, W, 3] uint8, seed [1] uint64, parameters [1]; or the error."""
    if error := future.exception():
        return pb_utils.InferenceResponse(error=triton_error_from(error))
    picture = future.result()
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("image", np.asarray(picture.image, np.uint8)),
            pb_utils.Tensor("seed", np.array([picture.seed], np.uint64)),
            pb_utils.Tensor("parameters", np.array([picture.parameters.encode()], np.object_)),
        ]
    )


def triton_error_from(error: BaseException) -> Any:
    """An error under the code that Triton's clients know."""
    from sdrt.errors import UsageError
    from sdrt.runtime.batching.request import RequestCancelled, RequestRejected

    codes = pb_utils.TritonError
    if isinstance(error, UsageError | ValueError):
        return codes(str(error), codes.INVALID_ARG)
    if isinstance(error, RequestRejected):
        return codes(f"{error} (again in {error.retry_after:.0f} s)", codes.UNAVAILABLE)
    if isinstance(error, RequestCancelled):
        return codes(str(error), codes.CANCELLED)
    return codes(f"{type(error).__name__}: {error}", codes.INTERNAL)


def send(sender: Any, response: Any) -> None:
    """The one response of a request."""
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
