"""The UNet with residual inputs and the nets that make them: plans built by TensorRT for RTX, which
needs no GPU.
"""

import diffusers
import pytest
from control_nets import tiny_adapter, tiny_controlnet
from exports import built_control

from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import CONTROL
from sdrt.engine.tensorrt.plans import PlanOptions, get_plan
from sdrt.engine.tensorrt.variants import RTX

pytestmark = pytest.mark.trt
pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
OPTIONS = PlanOptions(("sm_89",))
NETS = {
    "edges": lambda unet: tiny_controlnet(unet),
    "mixed": lambda unet: tiny_controlnet(unet, global_pool_conditions=True),
    "sketch": lambda unet: tiny_adapter((8, 16)),
}


@pytest.mark.parametrize(
    "family", ["tiny_bundle", pytest.param("tiny_xl_bundle", marks=pytest.mark.slow)]
)
def test_the_unet_with_residuals_is_a_plan(family, request):
    bundle = open_bundle(request.getfixturevalue(family))
    plan = get_plan(bundle, CONTROL, RTX, None, OPTIONS)
    names = {spec.name for spec in bundle.manifest.components[CONTROL].inputs}
    assert all(set(profile) == names for profile in plan.key.profiles) and plan.size > 0
    plain = get_plan(bundle, "unet", RTX, None, OPTIONS)
    assert plan.key.weights == plain.key.weights and plan.key.graph != plain.key.graph


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("base", "net"), [*(("tiny", net) for net in NETS), ("tiny_xl", "edges")])
def test_a_net_is_a_plan(base, net, dtype, request, tmp_path):
    folder = request.getfixturevalue(base)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    NETS[net](unet).save_pretrained(tmp_path / "net")
    bundle = open_bundle(
        built_control(str(tmp_path / "net"), tmp_path / "b", sizes=((32, 32),), dtype=dtype)
    )
    plan = get_plan(bundle, bundle.manifest.control_net, RTX, None, OPTIONS)
    assert plan.size > 0 and bundle.precision == {"float32": "fp32", "float16": "fp16"}[dtype]
