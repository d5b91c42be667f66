"""Sessions of ONNX Runtime and their options.

Imports onnxruntime, so import it only where this backend is used.
"""

import logging
from pathlib import Path

import onnxruntime as ort

from sdrt.engine.protocol import Feeds
from sdrt.errors import BackendError
from sdrt.process_stats import cpu_count

log = logging.getLogger(__name__)
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def explain_missing_provider(provider: str) -> str | None:
    """Why an execution provider cannot be used; None if it can."""
    if provider in ort.get_available_providers():
        return None
    have = ", ".join(ort.get_available_providers())
    return f"this onnxruntime has no {provider} (only {have}); pip install onnxruntime-gpu"


def session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    # What it logs as an error is raised as well; the log's lines are for those who ask for more.
    options.log_severity_level = 2 if log.isEnabledFor(logging.DEBUG) else 4
    options.intra_op_num_threads = cpu_count()
    # Spinning threads burn a core between calls; evaluations are long enough to wake them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def read_mapped_weights(options: ort.SessionOptions) -> None:
    """Set a session's options so that it holds no copy of the weights: they stay in the mapped
    file, and are cast where they are used, in the order of the graph.
    """
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    # Casts of weights depend on nothing: in the default order all of them run first.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False


def options_with(weights: Feeds) -> ort.SessionOptions:
    """Options for a session in which these weights replace those of the file, by name."""
    options = session_options()
    if weights:  # ONNX Runtime reads them before it optimises the graph
        values = [ort.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
        options.add_external_initializers(list(weights), values)
    return options


def create_session(
    name: str,
    graph: Path,
    options: ort.SessionOptions,
    provider: str,
    settings: dict[str, str],
    derived: bytes | None = None,
) -> ort.InferenceSession:
    """Create a session; raises BackendError if it does not use the provider.

    derived: another graph over the weights in the first one's folder
    """
    if derived is not None:
        options.add_session_config_entry(WEIGHTS_FOLDER, str(graph.parent))
    try:
        session = ort.InferenceSession(
            derived or str(graph), options, providers=[(provider, settings)]
        )
    except Exception as error:  # onnxruntime raises its own, undocumented classes
        raise BackendError(f"ONNX Runtime failed to load {graph}: {error}") from error
    if provider not in session.get_providers():
        have = ", ".join(session.get_providers())
        raise BackendError(f"ONNX Runtime fell back from {provider} to {have} for {name}")
    return session
