"""The safety checker of Stable Diffusion 1.x as a component: how near an image is to concepts.

Knows transformers' CLIP vision tower and the published weights' names; what the distances decide is
`runtime.safety_checker`'s.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONCEPTS, SPECIAL = 17, 3


class SafetyChecker(nn.Module):
    """pixels [B, 3, S, S], as CLIP reads them -> special [B, 3] and concepts [B, 17]: the cosine
    between image and concept less the concept's threshold.
    """

    def __init__(self, config: Any) -> None:
        """config: transformers' CLIPConfig"""
        from transformers import CLIPVisionModel

        super().__init__()
        width = config.projection_dim
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.concept_embeds = nn.Parameter(torch.zeros(CONCEPTS, width))
        self.special_care_embeds = nn.Parameter(torch.zeros(SPECIAL, width))
        self.concept_embeds_weights = nn.Parameter(torch.zeros(CONCEPTS))
        self.special_care_embeds_weights = nn.Parameter(torch.zeros(SPECIAL))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embeds = F.normalize(self.visual_projection(self.vision_model(pixels).pooler_output))
        special = embeds @ F.normalize(self.special_care_embeds).T
        concepts = embeds @ F.normalize(self.concept_embeds).T
        return (
            special - self.special_care_embeds_weights,
            concepts - self.concept_embeds_weights,
        )


def renamed(weights: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """The weights under the module's names: transformers has had the tower with and without a
    prefix of its own.
    """
    result = {}
    for name, tensor in weights.items():
        bare = name.replace("vision_model.vision_model.", "vision_model.")
        nested = bare.replace("vision_model.", "vision_model.vision_model.", 1)
        if not name.endswith("position_ids"):
            result[next((n for n in (name, bare, nested) if n in names), name)] = tensor
    return result
