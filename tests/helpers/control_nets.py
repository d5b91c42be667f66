"""Tiny ControlNets and T2I-Adapters of random weights, as diffusers has them."""

import torch


def tiny_controlnet(unet, seed=0, **config):
    """A ControlNet of the blocks that diffusers' UNet has."""
    import diffusers

    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(4, 4, 8, 8), load_weights_from_unet=False
    )
    net.register_to_config(**config)
    return _randomize(net)


def _randomize(net):
    """The net with residuals that are not zeros, as those of a new one are."""
    for module in (net.controlnet_down_blocks, net.controlnet_mid_block):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.2)
    return net.eval()


def tiny_adapter(channels, seed=0, kind="full_adapter", factor=8):
    """A T2I-Adapter of these channels by stage."""
    import diffusers

    torch.manual_seed(seed)
    return diffusers.T2IAdapter(
        in_channels=3,
        channels=list(channels),
        num_res_blocks=1,
        downscale_factor=factor,
        adapter_type=kind,
    ).eval()


def tiny_controlnet_like(unet, seed=0, **config):
    """A ControlNet of other blocks than diffusers' UNet has, such as the small ones of XL."""
    import inspect

    import diffusers

    known = set(inspect.signature(diffusers.ControlNetModel.__init__).parameters)
    shared = {name: value for name, value in unet.config.items() if name in known}
    embedding = {"conditioning_embedding_out_channels": (4, 4, 8, 8)}
    torch.manual_seed(seed)
    return _randomize(diffusers.ControlNetModel(**{**shared, **embedding, **config}))
