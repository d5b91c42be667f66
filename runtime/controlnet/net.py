"""Nets that steer a UNet: what a control bundle holds, and whether it fits a base model.

Knows manifests; not engines, images or requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import CONTROL, IP_ADAPTER, WEIGHTS, Component, Manifest, TensorSpec
from sdrt.engine.axes import axis_lengths, spec_shape
from sdrt.errors import UsageError

CONTROLNET, T2I_ADAPTER = "controlnet", "t2i_adapter"
KINDS = {CONTROLNET: "ControlNet", T2I_ADAPTER: "T2I-Adapter"}
CONTROL_IMAGE = "control_image"


@dataclass(frozen=True, slots=True)
class ControlNet:
    """A ControlNet (Zhang et al. 2023, arXiv:2302.05543) or a T2I-Adapter (Mou et al. 2023,
    arXiv:2302.08453) of a control bundle.

    Attributes:
        name: Of its bundle.
        kind: `controlnet` or `t2i_adapter`, as its component is called.
        component: Its inputs and outputs.
        cost: Of a call, relative to one of the UNet with as many rows: that of their weights.
    """

    name: str
    kind: str
    component: Component
    cost: float = 0.4

    @property
    def engine_name(self) -> str:
        """Its place among a pipeline's engines."""
        return f"{self.kind}/{self.name}"

    @property
    def pools(self) -> bool:
        """Whether its residuals are means over the image (`global_pool_conditions`)."""
        return self.component.outputs[0].shape[-2:] == (1, 1)


def control_net_from_bundle(bundle: Bundle) -> ControlNet:
    """The net of a control bundle.

    Raises:
        UsageError: The bundle holds none.
    """
    manifest = bundle.manifest
    for kind in KINDS:
        if kind in manifest.components:
            return ControlNet(manifest.name, kind, manifest.components[kind])
    hint = "build one with `sdrt build --controlnet MODEL`"
    if IP_ADAPTER in manifest.components:
        hint = "pass it as an IP-Adapter: `--ip-adapter`, or sdrt.load(..., ip_adapter=NAME)"
    raise UsageError(f"{manifest.name} holds no ControlNet or T2I-Adapter", hint=hint)


def load_control_nets(base: Manifest, bundles: Sequence[Bundle]) -> Mapping[str, ControlNet]:
    """The nets of control bundles by name.

    Raises:
        UsageError: One does not fit the base model, or two have one name.
    """
    nets: dict[str, ControlNet] = {}
    for bundle in bundles:
        net = control_net_from_bundle(bundle)
        if net.name in nets:
            raise UsageError(f"two ControlNets have the name {net.name}", hint="pass one of them")
        check_fits(net, base)
        unet = base.files.get(f"unet/{WEIGHTS}")
        cost = bundle.bytes / unet.size if unet else net.cost
        nets[net.name] = replace(net, cost=cost)
    return nets


def check_fits(net: ControlNet, base: Manifest) -> None:
    """Raise UsageError unless a net's inputs and outputs are those of a base model."""
    if CONTROL not in base.components:
        raise UsageError(
            f"{base.name} was built without control inputs",
            hint=f"run `sdrt build --model {base.source.split(',')[0]} --force`",
        )
    unet = _specs_by_name(base.components[CONTROL].inputs)
    label = f"{KINDS[net.kind]} {net.name}"
    hint = "use one that was trained for this model's family"
    for spec in net.component.inputs:
        if spec.name == CONTROL_IMAGE:
            continue
        if spec.name not in unet:
            raise UsageError(f"{label} reads {spec.name}, which {base.name} lacks", hint=hint)
        expected = base.latent_channels if spec.name == "sample" else unet[spec.name].shape[-1]
        actual = spec.shape[1] if spec.name == "sample" else spec.shape[-1]
        if spec.name != "timestep" and actual != expected:
            raise UsageError(
                f"{label} reads {spec.name} of {actual} channels; {base.name} has {expected}",
                hint=hint,
            )
    _check_outputs(net, base, unet, label, hint)


def _check_outputs(
    net: ControlNet, base: Manifest, unet: Mapping[str, TensorSpec], label: str, hint: str
) -> None:
    """Raise UsageError for the first residual that the UNet does not read."""
    outputs = _specs_by_name(net.component.outputs)
    prefix = "adapter_state" if net.kind == T2I_ADAPTER else ("down_block", "mid_block")
    lengths = axis_lengths(base, base.sizes[0])
    for name in [*outputs, *(name for name in unet if name.startswith(prefix))]:
        produced, expected = (
            spec_shape(specs[name], lengths)[1:] if name in specs else None
            for specs in (outputs, unet)
        )
        if produced and expected and net.pools:
            expected = (expected[0], 1, 1)
        if produced != expected:
            raise UsageError(
                f"{label} gives {name} {_shape_text(produced)}; {base.name} reads "
                f"{_shape_text(expected)}",
                hint=hint,
            )


def _specs_by_name(specs: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return str(list(shape)) if shape else "none"
