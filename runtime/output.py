"""What a call of the pipeline returns. Knows Pillow images; not how they are generated."""

from dataclasses import dataclass, field

from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Output:
    """The images of a call, in the order of its prompts.

    Attributes:
        images: RGB images.
        seeds: Of each image.
        parameters: Of each image, the text of its file.
        flagged: Of each image, whether the safety checker replaced it with black.
        flat: Of each image, whether the model made it one colour all over.
    """

    images: list[Image]
    seeds: list[int]
    parameters: list[str]
    flagged: list[bool] = field(default_factory=list)
    flat: list[bool] = field(default_factory=list)
