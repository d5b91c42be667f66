"""Configurations of small UNets, one of each published family."""

THREE = {
    "block_out_channels": (16, 24, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "sample_size": 8,
}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "upcast_attention": None,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 30,
}
FAMILIES = {
    "1.x, one layer": {"layers_per_block": 1},
    "1.x": {},
    "2.x": {"use_linear_projection": True, "attention_head_dim": (2, 4, 8)},
    "2.1, upcast": {"use_linear_projection": True, "upcast_attention": True},
    "inpainting": {"in_channels": 9},
    "depth": {"in_channels": 5, "use_linear_projection": True},
    "distilled, no middle": {"layers_per_block": 1, "mid_block_type": None},
    "fed the guidance scale": {"time_cond_proj_dim": 10},
    "deeper transformers": {"transformer_layers_per_block": (1, 2, 3)},
    "XL": XL,
    "SSD-1B": {
        **XL,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 3]],
        "reverse_transformer_layers_per_block": [[4, 4, 5], [2, 1, 1], 1],
    },
}
