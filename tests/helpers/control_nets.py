"""Tiny ControlNets and T2I-Adapters of random weights, as diffusers has them."""

import torch


def tiny_controlnet(unet, seed=0, **config):
    """A ControlNet for diffusers' UNet whose residuals are not zeros, as those of a new one are."""
    import diffusers

    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(4, 4, 8, 8), load_weights_from_unet=False
    )
    net.register_to_config(**config)
    for module in (net.controlnet_down_blocks, net.controlnet_mid_block):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.2)
    return net.eval()


def tiny_adapter(channels, seed=0, kind="full_adapter"):
    """A T2I-Adapter of these channels by stage."""
    import diffusers

    torch.manual_seed(seed)
    return diffusers.T2IAdapter(
        in_channels=3,
        channels=list(channels),
        num_res_blocks=1,
        downscale_factor=8,
        adapter_type=kind,
    ).eval()
