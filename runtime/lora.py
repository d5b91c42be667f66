"""LoRA files: small changes to a model's weights, added at the build or between pictures.

Knows the key layouts of kohya's scripts (`lora_unet_..`, `lora_te_..`), under the original layout's
names too as files for XL have them (`lora_unet_input_blocks_4_1_..`), and of PEFT and the reference
library (`unet.` and `text_encoder.` with `lora_A`, `lora_B`, `lora.down`, `lora.up`), linear layers
and convolutions, LoCon's middle factor included. Hu et al. 2021 (arXiv:2106.09685), eq. 3. Knows
numpy; the weights may be a checkpoint's or a bundle's.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle import NAMES, TRANSPOSED, Bundle, home
from sdrt.engine import Engine
from sdrt.errors import BundleError, CheckpointError, SdrtError, UsageError
from sdrt.manifest import SHALLOW
from sdrt.reading import json_object, mapping, number, shortened, text
from sdrt.tensors import Tensors

MOST_WEIGHT = 10.0
MOST_ALPHA = 1e6
NAMED = 5  # keys that an error names
PARTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "unet": "unet",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
}
KOHYA = [prefix for prefix in PARTS if prefix.startswith("lora_")]
KINDS = {
    "lora_down": "down",
    "lora_A": "down",
    "lora.down": "down",
    "lora_linear_layer.down": "down",
    "lora_up": "up",
    "lora_B": "up",
    "lora.up": "up",
    "lora_linear_layer.up": "up",
    "lora_mid": "mid",
}
TAIL = re.compile(
    r"(?:\.(?P<kind>lora_down|lora_up|lora_mid|lora_A|lora_B"
    r"|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up)"
    r"(?:\.default)?\.weight|_lora\.(?P<old>down|up)\.weight|\.(?P<alpha>alpha))$"
)
ORIGINAL_ENDS = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
ORIGINAL_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
SIDES = {"input": "down_blocks", "output": "up_blocks"}
ALPHA = number(-MOST_ALPHA, MOST_ALPHA)
ALPHAS = mapping(ALPHA, text(r".*", "a name"), 100_000)
Place = tuple[str, str]  # a part, and a module of it with underscores for dots


@dataclass(slots=True)
class Change:
    """What a file does to one weight: `alpha / rank * up @ mid @ down`."""

    key: str
    factors: dict[str, np.ndarray] = field(default_factory=dict)

    def delta(self, shape: tuple[int, ...], weight: float, turned: bool = False) -> np.ndarray:
        """`weight` times the change, float32, in the shape of the model's weight, or of that
        transposed; raises CheckpointError if it misfits.
        """
        if not {"down", "up"} <= set(self.factors):
            raise CheckpointError(f"the LoRA's {self.key} lacks its down or its up factor")
        down, up = (self.factors[name].astype(np.float32) for name in ("down", "up"))
        self._check_factors()
        alpha = float(np.ravel(self.factors.get("alpha", len(down)))[0])
        scale = weight * alpha / len(down)
        a = up.reshape(len(up), -1) * np.float32(scale)
        b = down.reshape(len(down), -1)
        try:
            if (len(up), down.shape[1]) != shape[:2]:
                raise ValueError
            if self.factors.get("mid", down).shape[2:] != shape[2:]:  # or the product is too large
                raise ValueError
            if "mid" in self.factors:
                mid = self.factors["mid"].astype(np.float32)
                return np.einsum("or,rshw,si->oihw", a, mid, b, optimize=True).reshape(shape)
            return b.T @ a.T if turned else (a @ b).reshape(shape)
        except ValueError:
            raise CheckpointError(
                f"the LoRA's {self.key} is {list(up.shape)} by {list(down.shape)}, the weight "
                f"{list(shape)}; it was made for another architecture"
            ) from None

    def _check_factors(self) -> None:
        """Raise CheckpointError for factors that no product can be made of, or an alpha that is
        none.
        """
        down, up = self.factors["down"], self.factors["up"]
        alpha = self.factors.get("alpha", np.float32(1.0))
        flat = min(down.ndim, up.ndim) < 2 or not len(down)
        if flat or (up.shape[1] != len(down) and "mid" not in self.factors):
            raise CheckpointError(
                f"the LoRA's {self.key} is {list(up.shape)} by {list(down.shape)}, which are not "
                "of one rank; fetch it again"
            )
        if np.size(alpha) != 1 or not abs(float(np.ravel(alpha)[0])) <= MOST_ALPHA:
            raise CheckpointError(f"the LoRA's {self.key} has an alpha that is no number")


@dataclass(frozen=True, slots=True)
class Lora:
    """A file's name, its changes by part and module, and how much of them is added."""

    name: str
    changes: Mapping[Place, Change]
    weight: float


def parse_lora(text: str) -> tuple[str, float]:
    """`"NAME"` or `"NAME:0.8"` -> the name and its weight; raises UsageError."""
    name, colon, number = text.rpartition(":")
    try:
        return (name, checked_weight(float(number))) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def checked_weight(weight: float) -> float:
    if not -MOST_WEIGHT <= weight <= MOST_WEIGHT:
        raise UsageError(f"LoRA weight {weight:g}; expected -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}")
    return weight


def find_lora(name: str | os.PathLike[str]) -> Path:
    """A file's path, or that of the file of this name in the folder `loras` of sdrt's home.

    Raises CheckpointError if there is none.
    """
    path = Path(name).expanduser()
    known = home() / "loras"
    if path.suffix.lower() in (".pt", ".ckpt", ".bin", ".pth", ".pkl"):
        raise CheckpointError(f"{path} is a pickle, which is refused; ask for a .safetensors file")
    for found in (path, known / f"{name}.safetensors", known / path):
        if found.is_file():
            return found
    have = ", ".join(sorted(file.stem for file in known.glob("*.safetensors"))) or "none"
    raise CheckpointError(
        f"there is no LoRA file {path}, nor one of that name in {known} (there: {have})"
    )


def read_lora(name: str | os.PathLike[str], weight: float) -> Lora:
    """A LoRA file; raises CheckpointError if it is a pickle, damaged or of no known layout."""
    path = find_lora(name)
    try:
        tensors = Tensors(path)
        changes = changes_from_tensors(tensors, tensors.metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    except SdrtError as error:
        raise CheckpointError(str(error)) from error
    return Lora(path.stem, changes, checked_weight(weight))


def changes_from_tensors(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> dict[Place, Change]:
    """The changes of a file. Raises CheckpointError for keys of no known layout, counting them and
    naming the first, and for numbers that are none.
    """
    changes: dict[Place, Change] = {}
    unknown = []
    for key, tensor in tensors.items():
        tail = TAIL.search(key)
        head = key[: tail.start()] if tail else ""
        prefix, _, module = head.partition(".")
        for start in KOHYA:
            if head.startswith(f"{start}_"):
                prefix, module = start, head[len(start) + 1 :]
                break
        if tail is None or prefix not in PARTS or not module:
            unknown.append(key)
            continue
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{key} holds NaN or infinity")
        kind = tail["alpha"] or tail["old"] or KINDS[tail["kind"]]
        factor = tensor.ndim in (2, 4) and tensor.size > 0
        if tensor.size != 1 if kind == "alpha" else not factor:
            raise CheckpointError(f"{key} is of shape {list(tensor.shape)}, which is no {kind}")
        place = PARTS[prefix], _published(_flat(module.replace(".processor", "")))
        factors = changes.setdefault(place, Change(head)).factors
        if kind in factors:
            raise CheckpointError(f"{shortened(key)} says again what another key said")
        factors[kind] = tensor
    if unknown:
        raise CheckpointError(
            f"{_counted(unknown)} of no known layout; expected kohya's lora_unet_.. and "
            "lora_te_.., or PEFT's unet. and text_encoder."
        )
    try:
        _add_alphas(changes, json_object(metadata.get("lora_adapter_metadata", "{}").encode()))
    except ValueError as error:
        raise CheckpointError(f"its lora_adapter_metadata: {error}") from error
    return changes


def _add_alphas(changes: Mapping[Place, Change], settings: Mapping[str, Any]) -> None:
    """PEFT keeps alphas beside the tensors: one for a part, and those of some modules. Raises
    ValueError for what is no number.
    """
    for (part, module), change in changes.items():
        alpha = settings.get(f"{part}.lora_alpha")
        key = f"{part}.alpha_pattern"
        for name, own in ALPHAS(settings.get(key) or {}, key).items():
            alpha = own if module.endswith(_flat(name)) else alpha
        if alpha is not None:
            known = ALPHA(alpha, f"an alpha of {part}")
            change.factors.setdefault("alpha", np.asarray(known, np.float32))


def _flat(module: str) -> str:
    """A module's name as kohya writes it, without what wrappers put before it."""
    return module.replace(".", "_").removeprefix("model_").removeprefix("text_model_")


def _published(module: str) -> str:
    """The usual name of a module that the original layout of XL names, as its LoRA files do."""
    if module in ORIGINAL_ENDS:
        return ORIGINAL_ENDS[module]
    match = re.fullmatch(r"(input|middle|output)_blocks?_(\d+)_(.+)", module)
    if not match:
        return module + "_0" if module.endswith("_to_out") else module
    side, number, rest = match[1], int(match[2]), match[3]
    if side == "middle":
        place = "attentions_0" if number == 1 else f"resnets_{number // 2}"
        return f"mid_block_{place}_{ORIGINAL_RESNET.get(rest, rest)}"
    slot, _, rest = rest.partition("_")
    block, layer = divmod(number - 1 if side == "input" else number, 3)
    if rest in ("op", "conv"):
        change = "downsamplers" if side == "input" else "upsamplers"
        return f"{SIDES[side]}_{block}_{change}_0_conv"
    part = "resnets" if slot == "0" else "attentions"
    return f"{SIDES[side]}_{block}_{part}_{layer}_{ORIGINAL_RESNET.get(rest, rest)}"


def _counted(keys: Sequence[str]) -> str:
    more = ", .." if len(keys) > NAMED else ""
    return f"{len(keys)} {'keys' if len(keys) > 1 else 'key'} ({', '.join(keys[:NAMED])}{more})"


def check_parts(loras: Sequence[Lora], parts: Collection[str]) -> None:
    """Raise CheckpointError for a file that changes a part which the model does not have."""
    for lora in loras:
        surplus = [change.key for (part, _), change in lora.changes.items() if part not in parts]
        if surplus:
            raise CheckpointError(
                f"{lora.name}: this model has no place for {surplus[0]}: {_counted(surplus)} do "
                "not fit; the LoRA was made for another architecture"
            )


def deltas(
    part: str, shapes: Mapping[str, tuple[int, ...]], loras: Sequence[Lora]
) -> Iterator[tuple[str, np.ndarray]]:
    """What all files together add to each weight of a part, float32, as the weight is stored.

    shapes: of all weights by name. Raises CheckpointError, before the first, for modules that the
    part does not have, counting them and naming the first.
    """
    names = {
        _flat(name.removesuffix(TRANSPOSED).removesuffix(".weight")): name
        for name in shapes
        if name.removesuffix(TRANSPOSED).endswith(".weight")
    }
    touched: dict[str, list[tuple[float, Change]]] = {}
    for lora in loras:
        own = {module: change for (of, module), change in lora.changes.items() if of == part}
        if missing := [change.key for module, change in own.items() if module not in names]:
            raise CheckpointError(
                f"{lora.name}: this model's {part} has no {missing[0]}: {_counted(missing)} of "
                f"{len(own)} do not fit; the LoRA was made for another architecture"
            )
        for module, change in own.items():
            touched.setdefault(names[module], []).append((lora.weight, change))
    for name, changes in touched.items():
        turned = name.endswith(TRANSPOSED)
        shape = shapes[name][::-1] if turned else shapes[name]
        (weight, first), *others = changes
        total = first.delta(shape, weight, turned)
        for weight, change in others:
            total += change.delta(shape, weight, turned)
        yield name, total


class Adapters:
    """The LoRA files that a bundle's engines carry. Every change starts from the bundle's own
    weights, so that taking a file off leaves nothing of it.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]) -> None:
        self.loras: tuple[Lora, ...] = ()
        self._bundle = bundle
        self._engines = {part: engines[part] for part in set(PARTS.values()) & set(engines)}
        self._shallow = engines.get(SHALLOW)

    def set(self, chosen: Mapping[str | os.PathLike[str], float]) -> None:
        """Carry these files and no others. Nothing changes if one of them does not fit."""
        loras = tuple(read_lora(name, weight) for name, weight in chosen.items())
        check_parts(loras, self._engines)
        refits = {part: self._refit(part, loras) for part in self._engines}
        try:
            for part, weights in refits.items():
                self._give(part, weights)
        except SdrtError:
            for part in self._engines:
                self._give(part, {})
            self.loras = ()
            raise
        self.loras = loras

    def _give(self, part: str, weights: Mapping[str, np.ndarray]) -> None:
        self._engines[part].refit(weights)
        if part == "unet" and self._shallow is not None:
            reads = self._bundle.manifest.components[SHALLOW].weights
            self._shallow.refit({name: weights[name] for name in reads if name in weights})

    def _refit(self, part: str, loras: Sequence[Lora]) -> dict[str, np.ndarray]:
        """The weights of a part that the files change, in the stored dtype and orientation."""
        if not any(of == part for lora in loras for of, _ in lora.changes):
            return {}
        stored = Tensors(self._bundle.graph(part).with_name("model.safetensors"))
        if stored.metadata != NAMES:
            model = self._bundle.manifest.source.split(",")[0]
            raise BundleError(
                f"{self._bundle.folder} was built before bundles kept their weights' names, which "
                f"LoRA needs; type: sdrt build --model {model} --force"
            )
        shapes = {name: stored.shape(name) for name in stored}
        refit = {}
        for name, array in deltas(part, shapes, loras):
            array += stored[name]
            refit[name] = array.astype(stored[name].dtype, copy=False)
        return refit

    @property
    def text(self) -> str:
        """As other tools write it into a prompt: `<lora:name:0.8>`, and so on."""
        return "".join(f" <lora:{lora.name}:{lora.weight:g}>" for lora in self.loras)
