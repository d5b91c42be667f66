"""ONNX graphs of single components, exported as a build does, once for every shape of module."""

import torch
from exports import exported_once

from sdrt.export.recipes import RECIPES

AXES = {recipe.name: recipe for recipe in RECIPES}


def exported(folder, name, module, inputs, dtype=torch.float16):
    """One component's graph in the dtype, with the recipe's axes; returns its path."""
    recipe, cast = AXES[name], cast_inputs(inputs, dtype)
    axes = {key: recipe.axes.get(key, {0: "rows"}) for key in inputs}
    exported_once(module.eval().to(dtype), cast, recipe.outputs, axes, folder)
    return folder / "model.onnx"


def cast_inputs(inputs, dtype):
    """All but timesteps and integers in the dtype."""
    return {
        k: v.to(dtype) if v.is_floating_point() and v.ndim > 1 else v for k, v in inputs.items()
    }


def unet_inputs(config, tokens=7, side=8):
    extras = {
        "sample": torch.randn(2, config.in_channels, side, side),
        "timestep": torch.tensor([3.0, 700.0]),
        "context": torch.randn(2, tokens, config.cross_attention_dim),
    }
    if config.pooled_width:
        extras |= {"pooled": torch.randn(2, config.pooled_width), "time_ids": torch.rand(2, 6)}
    if config.time_cond_proj_dim:
        extras["timestep_cond"] = torch.randn(2, config.time_cond_proj_dim)
    return extras
