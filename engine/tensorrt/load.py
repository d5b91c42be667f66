"""From a bundle to a component on TensorRT: its plan found or built, loaded or shared, and proven.

Knows plans and loaded plans; not what is run with them. Never run on a GPU yet.
"""

from sdrt.bundle import Bundle
from sdrt.engine.cuda.driver import device_of
from sdrt.engine.gpu import Gpu
from sdrt.engine.parity import validate_plan

from .engine import TrtEngine, TrtUnet
from .loaded_plan import Loaded, loaded_plans, loading
from .plans import PlanOptions, trt_plan


def load_engine(
    bundle: Bundle, name: str, kind: str, gpu: Gpu, stream: int = 0, *, streamed: bool = False
) -> TrtEngine:
    """A component on a GPU: its plan found or built, loaded or shared, and proven once.

    stream: the caller's own, by its address; 0 for the device's

    Raises BackendError, and ParityError if it computes something else than the bundle's graph.
    """
    component = bundle.manifest.components[name]
    plan = trt_plan(bundle, name, kind, gpu, PlanOptions(streamed=streamed))
    mark = (str(plan.path), plan.sha256, gpu.index)
    with loading:
        if mark not in loaded_plans:
            loaded_plans[mark] = Loaded(plan, component, bundle.graph(name), device_of(gpu.index))
        if name == "unet":
            engine: TrtEngine = TrtUnet(name, component, loaded_plans[mark], gpu.sm, stream)
        else:
            engine = TrtEngine(name, component, loaded_plans[mark], stream)
    validate_plan(bundle, name, engine, plan)
    return engine
