"""`sdrt export-triton`: a bundle as a model repository for NVIDIA's Triton Inference Server.

    OUTPUT/NAME/config.pbtxt     what the model takes and gives
    OUTPUT/NAME/1/model.py       the Python backend's side, `model.py` of this package
    OUTPUT/NAME/1/bundle/        a copy of the bundle, with the plans it has

Knows files; no Triton is needed to write them. The machine that serves needs sdrt in the Python
that Triton's backend uses.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from sdrt.atomic_files import published
from sdrt.bundle import open_bundle
from sdrt.errors import UsageError

MODEL = Path(__file__).parent / "model.py"
INPUTS = (
    ("prompt", "STRING", False),
    ("negative_prompt", "STRING", True),
    ("steps", "INT32", True),
    ("guidance_scale", "FP32", True),
    ("seed", "UINT64", True),
    ("scheduler", "STRING", True),
    ("size", "STRING", True),
)
OUTPUTS = (
    ("image", "UINT8", "-1, -1, 3"),  # height, width, red green blue
    ("seed", "UINT64", "1"),
    ("parameters", "STRING", "1"),
)


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """
    name: of the model; None takes the bundle's
    instances: engines on each GPU, or on the processor where there is none
    slots, waiting: of each engine
    """

    bundle: str | None
    output: Path
    name: str | None = None
    instances: int = 1
    slots: int = 16
    waiting: int = 64
    backend: str = "auto"
    force: bool = False


def export_triton(plan: TritonPlan) -> Path:
    """Write the repository; returns the model's folder.

    Raises UsageError for a value out of range, BundleError where the bundle is missing or the
    model's folder is taken, SdrtError where it cannot be written.
    """
    for what, value in (("instances", plan.instances), ("slots", plan.slots)):
        if not 1 <= value <= 10_000:
            raise UsageError(f"--{what} {value}; expected 1 to 10000")
    bundle = open_bundle(plan.bundle)
    name = bundle.manifest.name if plan.name is None else plan.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(
            f"{name!r} is no name for a model: letters, digits, '_', '.' and '-'; use --name"
        )
    target = plan.output.expanduser() / name
    with published(target, "config.pbtxt", plan.force) as folder:
        (folder / "config.pbtxt").write_text(config_from_plan(plan, name))
        (folder / "1").mkdir()
        shutil.copyfile(MODEL, folder / "1" / "model.py")
        shutil.copytree(bundle.folder, folder / "1" / "bundle")
    return target


def config_from_plan(plan: TritonPlan, name: str) -> str:
    """The model's configuration, protobuf's text of Triton's `ModelConfig`."""
    inputs = ",\n".join(
        f'  {{ name: "{title}" data_type: TYPE_{kind} dims: [ 1 ]'
        f"{' optional: true' if optional else ''} }}"
        for title, kind, optional in INPUTS
    )
    outputs = ",\n".join(
        f'  {{ name: "{title}" data_type: TYPE_{kind} dims: [ {dims} ] }}'
        for title, kind, dims in OUTPUTS
    )
    parameters = "\n".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in (
            ("backend", plan.backend),
            ("slots", plan.slots),
            ("waiting", plan.waiting),
        )
    )
    return f"""\
name: "{name}"
backend: "python"
# One request is one picture. Those that run share calls of the UNet within the engine, which is
# why there is no dynamic_batching here, and each is answered when it is done.
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
{inputs}
]
output [
{outputs}
]
instance_group [ {{ count: {plan.instances} kind: KIND_AUTO }} ]
{parameters}
"""
