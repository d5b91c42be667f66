"""`sdrt export-triton`: a bundle as a model repository for NVIDIA's Triton Inference Server.

    OUTPUT/NAME/config.pbtxt     the inputs and outputs of the model
    OUTPUT/NAME/1/model.py       the Python backend model, `model.py` of this package
    OUTPUT/NAME/1/bundle/        a copy of the bundle and its compiled plans

Knows files; Triton is not needed to write them. The Triton server needs sdrt installed in the
Python of its Python backend.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from sdrt.atomic_files import publish_folder
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
class TritonExport:
    """Options of the export.

    Attributes:
        bundle: Name or folder; None: the default bundle.
        output: The model repository.
        name: Name of the model; None: that of the bundle.
        instances: Model instances on each GPU, or on the CPU if there is none.
        slots: Concurrent images of each instance.
        waiting: Queued images of each instance.
        backend: The backend that the model loads.
        force: Replace an existing model.
    """

    bundle: str | None
    output: Path
    name: str | None = None
    instances: int = 1
    slots: int = 16
    waiting: int = 64
    backend: str = "auto"
    force: bool = False


def export_triton(export: TritonExport) -> Path:
    """Write a model repository.

    Returns:
        The folder of the model.

    Raises:
        UsageError: A value is out of range.
        BundleError: The bundle is missing, or the model exists.
        SdrtError: The repository cannot be written.
    """
    for option, value in (("instances", export.instances), ("slots", export.slots)):
        if not 1 <= value <= 10_000:
            raise UsageError(f"--{option} {value}; expected 1 to 10000")
    bundle = open_bundle(export.bundle)
    name = bundle.manifest.name if export.name is None else export.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(
            f"{name!r} is not a valid model name; expected letters, digits, '_', '.' and '-'",
            hint="choose another with --name",
        )
    target = export.output.expanduser() / name
    with publish_folder(target, "config.pbtxt", export.force) as folder:
        (folder / "config.pbtxt").write_text(render_config(export, name))
        (folder / "1").mkdir()
        shutil.copyfile(MODEL, folder / "1" / "model.py")
        shutil.copytree(bundle.folder, folder / "1" / "bundle")
    return target


def render_config(export: TritonExport, name: str) -> str:
    """Triton's `ModelConfig` in protobuf text format."""
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
            ("backend", export.backend),
            ("slots", export.slots),
            ("waiting", export.waiting),
        )
    )
    return f"""\
name: "{name}"
backend: "python"
# One request is one image. The engine batches the running requests itself, so dynamic_batching is
# off; each response is sent as soon as its image is finished.
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
{inputs}
]
output [
{outputs}
]
instance_group [ {{ count: {export.instances} kind: KIND_AUTO }} ]
{parameters}
"""
