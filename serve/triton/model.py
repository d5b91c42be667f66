"""The model of Triton's Python backend. `sdrt export-triton` copies this file and a bundle into the
model repository.

Knows the Python backend; runs in a process of Triton, never in one of sdrt. All requests of an
instance share one in-flight batch, so Triton's own batching is off; each response is sent as soon
as its image is finished.
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
    """A model instance: a process with its own pipeline and engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle; Triton reports an exception as the state of the model."""
        if args["model_instance_kind"] == "GPU":  # before a library detects devices
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        import sdrt
        from sdrt.runtime.batching.engine import InflightBatcher

        config = json.loads(args["model_config"])["parameters"]
        parameters = {name: value["string_value"] for name, value in config.items()}
        folder = Path(__file__).parent / "bundle"
        self.pipe = sdrt.load(folder, backend=parameters["backend"])
        slots, waiting = int(parameters["slots"]), int(parameters["waiting"])
        self.engine = InflightBatcher(
            self.pipe, slots=slots, waiting=waiting, cost_cache=folder / "plans"
        )
        self.engine.start()

    def execute(self, requests: list[Any]) -> None:
        """Submit the requests; each response is sent when its image is finished."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except Exception as error:
                send_response(sender, pb_utils.InferenceResponse(error=to_triton_error(error)))

    def _submit(self, request: Any, sender: Any) -> None:
        options = {
            option: value
            for name, option in OPTIONS.items()
            if (value := read_input(request, name)) is not None
        }

        def on_step(handle: Any, _: object) -> None:
            if sender.is_cancelled():
                handle.cancel()

        [handle] = self.engine.submit(
            read_input(request, "prompt"),
            options,
            scheduler=read_input(request, "scheduler"),
            on_step=on_step,
        )
        handle.future.add_done_callback(
            lambda future: send_response(sender, build_response(future))
        )

    def finalize(self) -> None:
        """Unload the model; Triton has waited for its responses."""
        self.engine.close()
        self.pipe.close()


def read_input(request: Any, name: str) -> Any:
    """The value of a scalar input as a Python object; None if it was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1)
    if values.size != 1:
        raise ValueError(f"{name} has {values.size} values; expected 1")
    value = values[0]
    return value.decode("utf-8") if isinstance(value, bytes) else value.item()


def build_response(future: "Future[Any]") -> Any:
    """image [H, W, 3] uint8, seed [1] uint64, parameters [1] bytes; or an error."""
    if error := future.exception():
        return pb_utils.InferenceResponse(error=to_triton_error(error))
    result = future.result()
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("image", np.asarray(result.image, np.uint8)),
            pb_utils.Tensor("seed", np.array([result.seed], np.uint64)),
            pb_utils.Tensor("parameters", np.array([result.parameters.encode()], np.object_)),
        ]
    )


def to_triton_error(error: BaseException) -> Any:
    """The Triton error, with its code, for an exception."""
    from sdrt.errors import UsageError
    from sdrt.runtime.batching.request import RequestCancelled, RequestRejected

    codes = pb_utils.TritonError
    if isinstance(error, UsageError | ValueError):
        return codes(str(error), codes.INVALID_ARG)
    if isinstance(error, RequestRejected):
        return codes(f"{error} (retry after {error.retry_after:.0f} s)", codes.UNAVAILABLE)
    if isinstance(error, RequestCancelled):
        return codes(str(error), codes.CANCELLED)
    return codes(f"{type(error).__name__}: {error}", codes.INTERNAL)


def send_response(sender: Any, response: Any) -> None:
    """Send the only response of a request."""
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
