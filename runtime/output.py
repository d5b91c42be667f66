"""What a call of the pipeline returns. Knows Pillow images; not how they are generated."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL.Image import Image

from .denoising import Step
from .images import SUFFIXES, make_grid, metadata_options

OutputType = Literal["pil", "np", "latent"]
OUTPUT_TYPES = ("pil", "np", "latent")
StepCallback = Callable[[Step], None] | None


class AnnotatedImage(Image):
    """A generated image. `save` writes its settings (`info["parameters"]`) into PNG, JPEG and WebP
    files, as `sdrt run` does; images that are derived from it are plain ones.
    """

    def save(
        self,
        fp: "str | bytes | os.PathLike[Any] | IO[bytes]",
        format: str | None = None,
        **params: Any,
    ) -> None:
        """As Pillow's. Passed `pnginfo` and `exif` take the place of the settings."""
        name = os.fsdecode(fp) if isinstance(fp, str | bytes | os.PathLike) else ""
        kind = format or SUFFIXES.get(Path(name).suffix.lower(), "")
        text = self.info.get("parameters", "")
        super().save(fp, format, **{**metadata_options(text, kind.upper()), **params})


def annotate_image(image: Image, parameters: str) -> AnnotatedImage:
    """The image with its settings; the pixels are shared."""
    annotated = AnnotatedImage()
    annotated.__dict__ |= image.__dict__ | {"info": {**image.info, "parameters": parameters}}
    return annotated


class IndexedOutput:
    """Access to an output as to those of diffusers: `output[0]`, `output["images"]`."""

    __slots__ = ()
    __iter__ = None  # neither images nor names, one of which each reader would expect
    images: Any
    flagged: list[bool]

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, list[bool]]:
        """The images, and whether each is flagged."""
        return self.images, self.flagged

    @property
    def nsfw_content_detected(self) -> list[bool]:
        """diffusers' name of `flagged`."""
        return self.flagged


@dataclass(frozen=True, slots=True)
class Output(IndexedOutput):
    """The images of a call, in the order of its prompts. A notebook shows them.

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

    def _repr_png_(self) -> bytes | None:
        """All images in a grid, for notebooks."""
        if not self.images:
            return None
        buffer = BytesIO()
        make_grid(self.images).save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True, slots=True, eq=False)
class ArrayOutput(IndexedOutput):
    """The result of a call with `output_type` "np" or "latent"; as `Output` but for `images`.

    Attributes:
        images: [B, H, W, 3] float32 in [0, 1], or latents [B, C, H/8, W/8] float32.
        seeds: Of each image.
        parameters: Of each image, the text of its file.
        flagged: Of each image, whether the safety checker zeroed it; empty for latents.
        flat: Of each image, whether it is one colour all over; empty for latents.
    """

    images: np.ndarray
    seeds: list[int]
    parameters: list[str]
    flagged: list[bool] = field(default_factory=list)
    flat: list[bool] = field(default_factory=list)


@contextmanager
def show_progress(on_step: StepCallback, progress: bool) -> Iterator[StepCallback]:
    """The caller's callback, with a progress bar of each batch if asked for."""
    if not progress:
        yield on_step
        return
    from tqdm.auto import tqdm

    with tqdm(unit=" evaluations") as bar:

        def update(step: Step) -> None:
            if step.index == 1:
                bar.reset(step.total)
            bar.update(1)
            if on_step:
                on_step(step)

        yield update


def as_tuple(output: Output | ArrayOutput, xl: bool, has_checker: bool) -> tuple[Any, ...]:
    """The tuple that diffusers returns for `return_dict=False`: the images and, but for SDXL,
    whether each is flagged, or None without a safety checker.
    """
    if xl:
        return (output.images,)
    return output.images, output.flagged if has_checker and output.flagged else None
