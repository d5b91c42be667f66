"""Graphs whose rows have LoRA factors: plans built by TensorRT for RTX, which needs no GPU."""

import pytest
from lora_graphs import with_lora_graphs

from sdrt.bundle.manifest import LORA_FACTORS, LORA_PARTS
from sdrt.engine.tensorrt.plans import PlanOptions, get_plan
from sdrt.engine.tensorrt.variants import RTX

pytestmark = pytest.mark.trt
pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_graph_with_factors_is_a_plan(part, shapes, tmp_path):
    bundle = with_lora_graphs(shapes, tmp_path / "rows", 4)
    plan = get_plan(bundle, LORA_PARTS[part], RTX, None, PlanOptions(("sm_89",)))
    spec = next(
        s for s in bundle.manifest.components[LORA_PARTS[part]].inputs if s.name == LORA_FACTORS
    )
    (profile,) = plan.key.profiles
    low, _, high = profile[LORA_FACTORS]
    assert tuple(low) == (1, spec.shape[1]) and tuple(high) == (8, spec.shape[1])
    assert plan.size > 0
