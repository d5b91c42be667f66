"""Sessions of ONNX Runtime and their options, whatever runs in them.

Knows onnxruntime; imported only when this backend is chosen.
"""

from pathlib import Path

import onnxruntime as ort

from sdrt.engine.protocol import Feeds
from sdrt.errors import BackendError
from sdrt.process_stats import cpu_count

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def available(provider: str) -> str | None:
    """None if the provider can be used, else why not."""
    if provider in ort.get_available_providers():
        return None
    have = ", ".join(ort.get_available_providers())
    return f"this onnxruntime has no {provider} (it has {have}); pip install onnxruntime-gpu"


def session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = cpu_count()
    # Spinning workers burn a core between calls; evaluations are long enough to wake them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def options_with(weights: Feeds) -> ort.SessionOptions:
    """Options for a session with other weights, by name, than those of the file."""
    options = session_options()
    if weights:  # read before the graph is optimised
        values = [ort.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
        options.add_external_initializers(list(weights), values)
    return options


def session(
    name: str,
    graph: Path,
    options: ort.SessionOptions,
    provider: str,
    settings: dict[str, str],
    derived: bytes | None = None,
) -> ort.InferenceSession:
    """A session that really uses the provider; raises BackendError else.

    derived: another graph over the weights beside the first
    """
    if derived is not None:
        options.add_session_config_entry(WEIGHTS_FOLDER, str(graph.parent))
    try:
        made = ort.InferenceSession(
            derived or str(graph), options, providers=[(provider, settings)]
        )
    except Exception as error:  # as above
        raise BackendError(f"ONNX Runtime cannot load {graph}: {error}") from error
    if provider not in made.get_providers():
        have = ", ".join(made.get_providers())
        raise BackendError(f"ONNX Runtime fell back from {provider} to {have} for {name}")
    return made
