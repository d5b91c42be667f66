"""Descriptions and example prompts of the models that come with sdrt, for the API and the page."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelCard:
    """`description`: what to write in prompts; `prompt_examples`: prompts that work well."""

    description: str = ""
    prompt_examples: tuple[str, ...] = ()


# By the manifest's `source`.
CARDS = {
    "shapes": ModelCard(
        "This small demo model knows: red, green, blue, yellow, orange, purple, white, black; "
        "circle, square, triangle, cross; small, large; on the left, on the right, at the top, "
        "at the bottom; and, above. Prompts end with “on a … background”.",
        (
            "a red circle on a blue background",
            "a small yellow triangle at the top on a purple background",
            "a white cross and an orange square on a black background",
        ),
    )
}


def get_card(source: str) -> ModelCard:
    return CARDS.get(source, ModelCard())
