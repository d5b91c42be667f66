"""diffusers' schedulers as matrices: stepped with basis vectors, in its own float32
schedule or entirely in float64.
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


class BrownianPath:
    """A Brownian path over sigma, from unit noises of the intervals between given sigmas."""

    def __init__(self, sigmas, noises):
        self.sigmas, self.noises = sorted(sigmas), noises

    def __call__(self, sigma, sigma_next):
        low, high = sorted((float(sigma), float(sigma_next)))
        total = 0.0
        for a, b, noise in zip(self.sigmas, self.sigmas[1:], self.noises, strict=False):
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
        return _step_all(scheduler, module, eta)


def reference_from_image(config, steps, skipped):
    """The matrix of its image-to-image run in float64; the last column is the image."""
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
        return _step_all(scheduler, module, None, timesteps, basis, start)[0]


def _step_all(scheduler, module, eta, timesteps=None, basis=None, start=None):
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    count = len(timesteps)
    if basis is None:  # a batch of one: some schedulers need the axis
        basis = torch.eye(2 + 3 * count, dtype=torch.float64)[:, None]
    noises = []

    def randn_tensor(*args, **kwargs):
        noises.append(basis[1 + count + len(noises)])
        return noises[-1]

    if hasattr(scheduler, "noise_sampler_seed"):
        noises = _brownian(scheduler, basis[1 + count :])
    extra = {} if eta is None else {"eta": eta}
    x = basis[0] * scheduler.init_noise_sigma if start is None else start
    rows = []
    with mock.patch.object(module, "randn_tensor", randn_tensor, create=True):
        for k, timestep in enumerate(timesteps):
            rows.append(np.array(scheduler.scale_model_input(x, timestep)))
            x = scheduler.step(basis[1 + k], timestep, x, **extra).prev_sample
    columns = [*range(1 + count + len(noises)), *([] if start is None else [-1])]
    matrix = np.concatenate([*rows, np.array(x)])[:, columns]
    return matrix, np.array(timesteps, np.float64)


def _brownian(scheduler, basis):
    """Give the SDE scheduler a path over its sigmas and the midpoints between them; its noises."""
    sigmas = [float(sigma) for sigma in dict.fromkeys(scheduler.sigmas.tolist()) if sigma > 0]
    midpoints = [float(np.sqrt(a * b)) for a, b in itertools.pairwise(sigmas)]
    sigmas = sorted(sigmas + midpoints)
    # Noises are used from the first sigma down; the path's sigmas ascend.
    noises = list(reversed(list(basis[: len(sigmas) - 1])))
    scheduler.noise_sampler = BrownianPath(sigmas, noises)
    return noises
