"""The reference library's schedulers as matrices: stepped with basis vectors, in its own float32
schedule or wholly in float64.
"""

import contextlib
import importlib
import itertools
from unittest import mock

import numpy as np
import torch


class Doubled:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextlib.contextmanager
def in_float64(module):
    """The scheduler's module, and the helpers it shares, with float64 for float32."""
    utils = importlib.import_module("diffusers.schedulers.scheduling_utils")
    with contextlib.ExitStack() as stack:
        for where in {module, utils}:
            for name, library in (("np", np), ("torch", torch)):
                if hasattr(where, name):
                    stack.enter_context(mock.patch.object(where, name, Doubled(library)))
        torch.set_default_dtype(torch.float64)
        stack.callback(torch.set_default_dtype, torch.float32)
        yield


class Brownian:
    """A Brownian path over the level, written in unit noises of the intervals between its marks."""

    def __init__(self, marks, noises):
        self.marks, self.noises = sorted(marks), noises

    def __call__(self, level, after):
        low, high = sorted((float(level), float(after)))
        total = 0.0
        for a, b, noise in zip(self.marks, self.marks[1:], self.noises, strict=False):
            if low - 1e-9 < a and b < high + 1e-9:
                total = total + np.sqrt(b - a) * noise
        return total / np.sqrt(high - low)


def reference_table(config, steps, double=False, timesteps=None, eta=None):
    """(matrix, timesteps) of the reference scheduler."""
    import diffusers

    kind = getattr(diffusers, config["_class_name"])
    module = importlib.import_module(kind.__module__)
    with in_float64(module) if double else contextlib.nullcontext():
        scheduler = kind.from_config(config)
        if timesteps is None:
            scheduler.set_timesteps(steps)
        else:
            scheduler.set_timesteps(timesteps=list(timesteps))
        return _stepped(scheduler, module, eta)


def reference_from_picture(config, steps, skipped):
    """The matrix of its image-to-image run in float64; the last column is the picture."""
    import diffusers

    kind = getattr(diffusers, config["_class_name"])
    module = importlib.import_module(kind.__module__)
    with in_float64(module):
        scheduler = kind.from_config(config)
        scheduler.set_timesteps(steps)
        first = skipped * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        timesteps = scheduler.timesteps[first:]
        count = len(timesteps)
        basis = torch.eye(2 + 3 * count, dtype=torch.float64)[:, None]
        start = scheduler.add_noise(basis[-1], basis[0], timesteps[:1])
        return _stepped(scheduler, module, None, timesteps, basis, start)[0]


def _stepped(scheduler, module, eta, timesteps=None, basis=None, start=None):
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    count = len(timesteps)
    if basis is None:  # A batch of one: some schedulers ask for the axis.
        basis = torch.eye(2 + 3 * count, dtype=torch.float64)[:, None]
    drawn = []

    def draw(*args, **kwargs):
        drawn.append(basis[1 + count + len(drawn)])
        return drawn[-1]

    if hasattr(scheduler, "noise_sampler_seed"):
        drawn = _brownian(scheduler, basis[1 + count :])
    extra = {} if eta is None else {"eta": eta}
    x = basis[0] * scheduler.init_noise_sigma if start is None else start
    rows = []
    with mock.patch.object(module, "randn_tensor", draw, create=True):
        for k, timestep in enumerate(timesteps):
            rows.append(np.array(scheduler.scale_model_input(x, timestep)))
            x = scheduler.step(basis[1 + k], timestep, x, **extra).prev_sample
    columns = [*range(1 + count + len(drawn)), *([] if start is None else [-1])]
    matrix = np.concatenate([*rows, np.array(x)])[:, columns]
    return matrix, np.array(timesteps, np.float64)


def _brownian(scheduler, basis):
    """Give the SDE scheduler a path over its levels and the middles between them; its noises."""
    levels = [float(level) for level in dict.fromkeys(scheduler.sigmas.tolist()) if level > 0]
    middles = [float(np.sqrt(a * b)) for a, b in itertools.pairwise(levels)]
    marks = sorted(levels + middles)
    # Noises are drawn from the first level down, the path's marks rise.
    noises = list(reversed(list(basis[: len(marks) - 1])))
    scheduler.noise_sampler = Brownian(marks, noises)
    return noises
