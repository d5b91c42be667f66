"""From a bundle to a component on TensorRT: find or build its plan, load or share it, validate it.

Knows plans and loaded plans; not what is run with them. Not yet run on a GPU.
"""

import itertools

from sdrt.bundle import Bundle
from sdrt.engine.cuda.driver import get_device
from sdrt.engine.gpu import Gpu
from sdrt.engine.load_options import LoadOptions
from sdrt.engine.parity import validate_plan

from .engine import TrtEngine, TrtUnet
from .loaded_plan import LoadedPlan, loaded_plans
from .plans import PlanOptions, get_plan
from .sampling_graph import SamplingGraphCache

_numbers = itertools.count(1)


def load_engine(bundle: Bundle, name: str, kind: str, gpu: Gpu, options: LoadOptions) -> TrtEngine:
    """Load a component on a GPU; its plan is built if none fits, and validated once.

    Raises:
        BackendError: The plan cannot be built or loaded.
        DeviceLostError: The GPU failed for good before.
        ParityError: It computes something else than the bundle's graph.
    """
    component, device = bundle.manifest.components[name], get_device(gpu.index)
    device.check_usable()
    plan = get_plan(bundle, name, kind, gpu, PlanOptions(streamed=options.low_memory))

    def load() -> LoadedPlan:
        loaded = LoadedPlan(plan, component, bundle.graph(name), device)
        if name == "unet":
            loaded.sampling_graphs = SamplingGraphCache(loaded, gpu.sm)
        return loaded

    # Pipelines share plans, but not the weights that each replaces.
    number = next(_numbers) if plan.key.refittable else 0
    loaded = loaded_plans.acquire((str(plan.path), plan.sha256, gpu.index, number), load)
    create = TrtUnet if name == "unet" else TrtEngine
    engine = create(name, component, loaded, options.cuda_stream)
    validate_plan(bundle, name, engine, plan)
    return engine
