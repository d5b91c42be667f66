"""ControlNet and T2I-Adapter: nets that steer the UNet by an image."""
