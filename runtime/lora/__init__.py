"""LoRA: its files, what they add to the weights, the tags that name them in prompts."""
