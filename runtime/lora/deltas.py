"""What the factors of a LoRA file add to one weight, as a full delta in float32.

Knows the algorithms and their formulas: LoRA (Hu et al. 2021, arXiv:2106.09685), LoCon, LoHa and
LoKr (Yeh et al. 2023, arXiv:2309.14859), DoRA (Liu et al. 2024, arXiv:2402.09353), (IA)^3 (Liu et
al. 2022, arXiv:2205.05638) and whole differences. Knows numpy; not how files name their tensors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sdrt.errors import CheckpointError

MAX_ALPHA = 1e6
SMALLEST_NORM = np.finfo(np.float32).eps
SETTINGS = {"alpha", "magnitude", "dora_scale"}  # what is not itself a factor of the delta
Factors = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


class MisfitError(ValueError):
    """Factors that no delta of the weight can be made of; its text ends a sentence."""


@dataclass(slots=True)
class Change:
    """What a file does to one weight or bias.

    key: the module as the file names it
    factors: tensors by kind: `down`, `up`, `hada_w1_a`, `alpha`, `dora_scale` and so on
    rank_stabilised: whether alpha is divided by the square root of the rank (arXiv:2312.03732)
    rank: the file's setting, for factors that do not show it
    third: which third of the product's rows, where the file has one change for q, k and v
    """

    key: str
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    rank_stabilised: bool = False
    rank: float | None = None
    third: int | None = None

    def delta(self, shape: Shape, weight: float, transposed: bool = False) -> np.ndarray:
        """`weight` times what the factors make, without DoRA's magnitudes.

        Args:
            shape: of the model's weight, [out, in] or [out, in, height, width]; [out] of a bias.
            weight: the LoRA's weight.
            transposed: whether the result is to be [in, out].

        Returns:
            float32, of the shape.

        Raises:
            CheckpointError: the factors are incomplete, of several algorithms, or misfit.
        """
        self._check_alpha()
        full_shape = shape if self.third is None else (3 * shape[0], *shape[1:])
        factors = {
            name: factor.astype(np.float32, copy=False)
            for name, factor in self.factors.items()
            if name not in SETTINGS
        }
        try:
            product, rank = _algorithm(factors)(factors, full_shape)
        except MisfitError as error:
            raise CheckpointError(f"the LoRA's {self.key} {error}") from None
        if self.third is not None:
            product = product[self.third * shape[0] :][: shape[0]]
        product *= np.float32(weight * self.scale(rank))
        return np.ascontiguousarray(product.T) if transposed else product.reshape(shape)

    def low_rank_factors(
        self, out: int, inside: int, weight: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The factors of a linear layer or a convolution of 1x1, whose product is the delta.

        Args:
            out: Outputs of the layer.
            inside: Its inputs.
            weight: The LoRA's weight.

        Returns:
            [in, rank] and [rank, out], float32, with the weight and alpha in the second; None for
            other algorithms and shapes.

        Raises:
            CheckpointError: the alpha is no number.
        """
        if not {"down", "up"} <= set(self.factors) <= {"down", "up", "alpha"}:
            return None
        self._check_alpha()
        down, up = (self.factors[name].astype(np.float32) for name in ("down", "up"))
        first = 0 if self.third is None else self.third * out
        expected = [inside], [out if self.third is None else 3 * out, len(down)]
        if _layer(down.shape[1:]) != expected[0] or [len(up), *_layer(up.shape[1:])] != expected[1]:
            return None
        scaled = _matrix(up)[first : first + out] * np.float32(weight * self.scale(len(down)))
        return _matrix(down).T, scaled.T

    def merge_delta(
        self,
        total: np.ndarray,
        shape: Shape,
        weight: float,
        base: Callable[[], np.ndarray],
        transposed: bool = False,
    ) -> np.ndarray:
        """The total delta of a weight after this change.

        A magnitude of PEFT (`lora_magnitude_vector`) is that of all that lies in the weight, and
        the LoRA's weight scales what is inside the norm. LyCORIS's `dora_scale` says what the
        weight is to become at a LoRA's weight of 1, and less of that difference is added below.

        Args:
            total: what earlier changes add, float32, as the weight is stored.
            shape: of the model's weight.
            weight: the LoRA's weight.
            base: gives the model's weight in float32, as it is stored; called where it matters.
            transposed: whether the weight is stored as [in, out].

        Returns:
            float32, as the weight is stored.

        Raises:
            CheckpointError: as `delta`, or a magnitude or scale of another length.
        """
        own, inside = (1, 0) if transposed else (0, 1)  # the axes of outputs and of inputs
        for name, axis in (("output_scale", own), ("input_scale", inside)):
            if name in self.factors:
                stored = base()
                return total + stored * (self._along(axis, name, stored) * np.float32(weight))
        if "magnitude" in self.factors:
            delta, stored = self.delta(shape, weight, transposed), base()
            ratio = self._along(own, "magnitude", stored) / _norms(stored + delta, own)
            return total if weight == 0 else (stored + total + delta) * ratio - stored
        if "dora_scale" in self.factors:
            stored = base()
            merged = stored + self.delta(shape, 1.0, transposed)
            axis = inside if self.factors["dora_scale"].shape[:1] == (1,) else own
            merged *= self._along(axis, "dora_scale", stored) / _norms(merged, axis)
            return total + (merged - stored) * np.float32(weight)
        delta = self.delta(shape, weight, transposed)
        delta += total
        return delta

    def scale(self, rank: float | None) -> float:
        """`alpha / rank`; 1 without an alpha, or where neither factors nor file have a rank."""
        known = rank or self.rank
        if "alpha" not in self.factors or not known:
            return 1.0
        alpha = float(np.ravel(self.factors["alpha"])[0])
        return alpha / (math.sqrt(known) if self.rank_stabilised else known)

    def _along(self, axis: int, name: str, weight: np.ndarray) -> np.ndarray:
        """A vector of the file, to be multiplied with a weight along one of its axes."""
        vector = self.factors[name].astype(np.float32)
        if weight.ndim < 2 or vector.size != weight.shape[axis]:
            raise CheckpointError(
                f"the LoRA's {self.key} has a {name} of {vector.size} numbers for a weight of "
                f"{list(weight.shape)}; it was made for another architecture"
            )
        return vector.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])

    def _check_alpha(self) -> None:
        alpha = self.factors.get("alpha", np.float32(1.0))
        if np.size(alpha) != 1 or not abs(float(np.ravel(alpha)[0])) <= MAX_ALPHA:
            raise CheckpointError(
                f"the LoRA's {self.key} has an alpha that is no number up to {MAX_ALPHA:g}"
            )


def _norms(weight: np.ndarray, axis: int) -> np.ndarray:
    """The norm of what lies at each index of an axis, to divide the weight by."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    norms: np.ndarray = np.sqrt(np.square(weight).sum(axis=others, keepdims=True))
    return np.maximum(norms, SMALLEST_NORM)


def _check_fit(out: int, inside: Sequence[int], shape: Shape) -> None:
    """Raise MisfitError unless [out, *inside] is the weight's shape, a convolution of 1x1 being as
    a linear layer, and a convolution's inputs and window being one axis or several.
    """
    flat = [math.prod(shape[1:])]
    if out != shape[0] or (_layer(inside) != _layer(shape[1:]) and list(inside) != flat):
        raise MisfitError(
            f"makes {[out, *inside]}, the weight is {list(shape)}; it was made for another "
            "architecture"
        )


def _layer(inside: Sequence[int]) -> list[int]:
    """Inputs and window of a weight, without a window of 1x1."""
    return list(inside[:1] if all(n == 1 for n in inside[1:]) else inside)


def _check_rank(first: int, second: int, name: str) -> int:
    if first != second:
        raise MisfitError(f"has a {name} of ranks {first} and {second}, not of one rank")
    return first


def _matrix(factor: np.ndarray) -> np.ndarray:
    return factor.reshape(len(factor), -1)


def _tucker(core: np.ndarray, out: np.ndarray, inside: np.ndarray, name: str) -> np.ndarray:
    """core [R, r, h, w], out [R, O], inside [r, I] -> [O, I, h, w]"""
    if core.ndim != 4:
        raise MisfitError(f"has a {name} of {core.ndim} axes; expected 4")
    _check_rank(len(core), len(out), name)
    _check_rank(core.shape[1], len(inside), name)
    product: np.ndarray = np.einsum("rshw,ro,si->oihw", core, out, inside, optimize=True)
    return product


def _low_rank(factors: Factors, shape: Shape) -> tuple[np.ndarray, int]:
    """LoRA and LoCon: `up @ down`, with Tucker's core between the two where there is a `mid`."""
    down, up = factors["down"], factors["up"]
    if up.shape[2:] not in ((), (1, 1)):
        raise MisfitError(f"has an up factor of {list(up.shape)}; expected [out, rank]")
    if "mid" in factors:
        mid = factors["mid"]
        _check_fit(len(up), (down.shape[1], *mid.shape[2:]), shape)
        return _tucker(mid, _matrix(up).T, _matrix(down), "mid").reshape(shape), len(down)
    _check_rank(up.shape[1], len(down), "down and an up factor")
    _check_fit(len(up), down.shape[1:], shape)
    # Transposed twice, as most linear layers are stored as [in, out].
    return (_matrix(down).T @ _matrix(up).T).T.reshape(shape), len(down)


def _hadamard(factors: Factors, shape: Shape) -> tuple[np.ndarray, int]:
    """LoHa: the elementwise product of two products."""
    product = np.ones((), np.float32)
    for i in (1, 2):
        a, b = (_matrix(factors[f"hada_w{i}_{side}"]) for side in "ab")
        if (core := factors.get(f"hada_t{i}")) is not None:
            _check_fit(a.shape[1], (b.shape[1], *core.shape[2:]), shape)
            product = product * _tucker(core, a, b, f"hada_t{i}")
        else:
            _check_rank(a.shape[1], len(b), f"hada_w{i}")
            _check_fit(len(a), b.shape[1:], shape)
            product = product * (a @ b).reshape(shape)
    return product.reshape(shape), len(factors["hada_w1_b"])


def _kronecker(factors: Factors, shape: Shape) -> tuple[np.ndarray, int | None]:
    """LoKr: the Kronecker product of two matrices, each of which may be a product. Where both are
    whole the factors have no rank, and LyCORIS does not scale them.
    """
    small, large = _LokrFactor.of(factors, "lokr_w1"), _LokrFactor.of(factors, "lokr_w2")
    inside = (math.prod(small.inside) * large.inside[0], *large.inside[1:])
    _check_fit(small.out * large.out, inside, shape)
    product = np.kron(small.matrix(), large.matrix()).reshape(shape)
    return product, small.rank or large.rank


@dataclass(frozen=True, slots=True)
class _LokrFactor:
    """One of LoKr's two matrices: whole, a product of two factors, or one with a core.

    out, inside: the shape that it is to have, known before it is made
    """

    out: int
    inside: Shape
    factors: tuple[np.ndarray, ...]
    rank: int | None = None

    @classmethod
    def of(cls, factors: Factors, name: str) -> "_LokrFactor":
        if name in factors:
            factor = factors[name]
            return cls(len(factor), factor.shape[1:], (factor,))
        if not {f"{name}_a", f"{name}_b"} <= set(factors):
            raise MisfitError(f"lacks its {name}, or its {name}_a and {name}_b")
        a, b = _matrix(factors[f"{name}_a"]), _matrix(factors[f"{name}_b"])
        if name == "lokr_w2" and "lokr_t2" in factors:
            core = factors["lokr_t2"]
            return cls(a.shape[1], (b.shape[1], *core.shape[2:]), (a, b, core), len(b))
        return cls(len(a), b.shape[1:], (a, b), _check_rank(a.shape[1], len(b), name))

    def matrix(self) -> np.ndarray:
        if len(self.factors) == 1:
            return _matrix(self.factors[0])
        a, b, *core = self.factors
        return _matrix(_tucker(core[0], a, b, "lokr_t2")) if core else a @ b


def _difference(factors: Factors, shape: Shape) -> tuple[np.ndarray, None]:
    diff = factors["diff"]
    _check_fit(len(diff), diff.shape[1:], shape)
    return diff.reshape(shape).copy(), None


ALGORITHMS = (
    (_low_rank, {"down", "up"}, {"mid"}),
    (
        _hadamard,
        {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
        {"hada_t1", "hada_t2"},
    ),
    (
        _kronecker,
        set[str](),
        {f"lokr_w{i}{end}" for i in (1, 2) for end in ("", "_a", "_b")} | {"lokr_t2"},
    ),
    (_difference, {"diff"}, set[str]()),
)


def _algorithm(factors: Factors) -> Callable[[Factors, Shape], tuple[np.ndarray, int | None]]:
    """The algorithm that these are all factors of; raises MisfitError if there is none."""
    names = set(factors)
    for function, required, optional in ALGORITHMS:
        if not names & (required | optional):
            continue
        if surplus := names - required - optional:
            raise MisfitError(f"has {', '.join(sorted(surplus))} of another algorithm")
        if missing := required - names:
            raise MisfitError(f"lacks its {' and its '.join(sorted(missing))}")
        return function
    raise MisfitError("lacks its factors")
