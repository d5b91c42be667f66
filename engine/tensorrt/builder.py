"""Building plans with TensorRT and with TensorRT for RTX, one code path for both.

Knows the builder half of their API, handed in as a module; imports neither. Networks are strongly
typed: precision is what the bundle's graph says.
"""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdrt.atomic_files import write_atomic
from sdrt.bundle.graph_weights import read_graph_weights
from sdrt.bundle.store import home
from sdrt.engine.plans import PlanKey
from sdrt.errors import BackendError
from sdrt.process_stats import forget_peak, peak_bytes

from .progress import Progress, create_monitor, interruptible
from .refitting import mark_refittable
from .variants import RTX, get_features, get_logger, load_module

log = logging.getLogger(__name__)


def parse_network(trt: Any, builder: Any, graph: Path) -> tuple[Any, Any]:
    """The graph as TensorRT's network, and the parser, which holds its weights.

    Raises BackendError naming every node that TensorRT does not take.
    """
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, get_logger(trt))
    content = rewrite_graph(trt, graph)
    if not (parser.parse(content, str(graph)) if content else parser.parse_from_file(str(graph))):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        texts = [
            f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors
        ]
        raise BackendError(f"TensorRT does not take {graph}: {'; '.join(texts)}")
    for _, attention in attention_layers(trt, network):
        attention.decomposable = not has_fused_kernel(trt, attention.get_input(0))
    return network, parser


def rewrite_graph(trt: Any, graph: Path) -> bytes | None:
    """The graph in terms that an older TensorRT parses; None where it takes the bundle's own.

    Raises:
        BackendError: onnx is missing, or has an operator that cannot be rewritten.
    """
    if get_features(trt).attention:
        return None
    try:
        from .opset20 import opset20_graph
    except ImportError as error:
        raise BackendError(
            f"TensorRT {trt.__version__} takes graphs rewritten by onnx, which fails to import: "
            f"{error}",
            hint="pip install onnx, or TensorRT 10.14 or later",
        ) from error
    return opset20_graph(graph)


def attention_layers(trt: Any, network: Any) -> Iterator[tuple[str, Any]]:
    """The name of every attention in a network, and its `IAttention`; none before TensorRT 10.14.

    `get_layer` returns the base class, and TensorRT's Python bindings have no cast. Assigning
    `__class__` is how the bindings' own helpers downcast.
    """
    if not get_features(trt).attention:
        return
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.name.removesuffix("_AttentionInput"), layer.attention


def has_fused_kernel(trt: Any, query: Any) -> bool:
    """Whether a fused kernel supports this query [B, heads, N, width]. Other attention must be
    marked as decomposable into matrix products and a softmax.
    """
    width = query.shape[-1]
    return query.dtype in (trt.float16, trt.bfloat16) and 16 <= width <= 256 and width % 8 == 0


def build_plan(key: PlanKey, graph: Path, out: Path) -> tuple[float, int]:
    """Write the plan of a key; returns seconds and the process's peak memory meanwhile, in bytes.

    Raises BackendError if TensorRT refuses, with what it said.
    """
    trt = load_module(key.kind)
    began = time.monotonic()
    forget_peak()
    with contextlib.closing(Progress(key.component, sys.stderr.isatty())) as progress:
        plan = _serialized(trt, key, graph, progress)
    out.write_bytes(plan)
    return time.monotonic() - began, peak_bytes()


def _serialized(trt: Any, key: PlanKey, graph: Path, progress: Progress) -> Any:
    logger = get_logger(trt)
    logger.errors = []
    builder = trt.Builder(logger)
    network, parser = parse_network(trt, builder, graph)
    if key.refittable:
        mark_refittable(network, read_graph_weights(graph).layers)
    config = builder.create_builder_config()
    monitor = create_monitor(trt, progress)
    config.progress_monitor = monitor
    _configure(trt, builder, config, key)
    with _timing_cache(config, key), interruptible(progress):
        plan = builder.build_serialized_network(network, config)
    del parser
    if plan is None:
        raise BackendError(
            f"TensorRT cannot build {key.component} for {', '.join(key.targets)}: "
            f"{' / '.join(logger.errors) or 'it does not say why'}"
        )
    return plan


def _configure(trt: Any, builder: Any, config: Any, key: PlanKey) -> None:
    config.builder_optimization_level = key.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers name their nodes
    config.clear_flag(trt.BuilderFlag.TF32)  # single precision is single precision
    if key.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, key.workspace)
    if key.stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if key.refittable:  # excludes the other two kinds of refitting
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    if key.streamed:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if key.user_allocation:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if key.kind == RTX:
        # A plan for GPUs that need not be here cannot execute what prepares replaceable weights.
        names = ["CURRENT"] if key.refittable else [t.replace("sm_", "SM") for t in key.targets]
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], i)
    for ranges in key.profiles:
        profile = builder.create_optimization_profile()
        for name, (minimum, optimum, maximum) in ranges.items():
            profile.set_shape(name, minimum, optimum, maximum)
        config.add_optimization_profile(profile)


@contextlib.contextmanager
def _timing_cache(config: Any, key: PlanKey) -> Iterator[None]:
    """What was measured on this GPU before is not measured again. TensorRT for RTX measures
    nothing while it builds.
    """
    if key.kind == RTX:
        yield
        return
    path = home() / "timing" / key.path.parent.with_suffix(".cache").name
    known = path.read_bytes() if path.exists() else b""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = config.create_timing_cache(known)
        config.set_timing_cache(cache, False)
        yield
        _keep(path, bytes(cache.serialize()))


def _keep(path: Path, content: bytes) -> None:
    """A cache: where it cannot be written, TensorRT measures again next time."""
    with contextlib.suppress(OSError):
        write_atomic(path, content)
