"""Keys, GPUs and a builder of plans that are none, for tests of plans."""

from sdrt.engine.gpu import Gpu, GpuInventory
from sdrt.engine.plans import PlanKey

KEY = PlanKey(
    component="unet",
    kind="tensorrt-rtx",
    version="1.7.1",
    targets=("sm_86", "sm_89"),
    gpu="",
    system="linux-x86_64",
    profiles=({"sample": ((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 8, 8))},),
    level=3,
    workspace=0,
    stripped=False,
    graph="a" * 64,
    weights="b" * 64,
)


def build(out):
    out.write_bytes(b"a plan")
    return 1.5, 1000


L4 = Gpu(0, "NVIDIA L4", "sm_89", 24_000_000_000)
H100 = Gpu(1, "NVIDIA H100", "sm_90", 80_000_000_000)
BOTH = GpuInventory((L4, H100), (13, 0), "580.1")
