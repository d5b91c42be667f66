"""From a prompt to what the UNet is conditioned on."""
