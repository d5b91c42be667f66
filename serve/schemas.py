"""What the endpoints are asked, checked field by field; the OpenAPI schema is made of these."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_STEPS = 1000
MAX_PICTURES = 10
LAST_SEED = 2**64 - 1
TEXT = 32_000
MAX_BLUR = 64


class Generation(BaseModel):
    """OpenAI's images request, and what this server takes beyond it. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(max_length=TEXT)
    model: str | None = Field(None, description="one of /v1/models; default: the first")
    n: int | None = Field(1, ge=1, le=MAX_PICTURES)
    size: str | None = Field("auto", max_length=20, description="WIDTHxHEIGHT or auto")
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of jpeg and webp; default: 100"
    )
    quality: Literal["low", "medium", "high", "auto", "standard", "hd"] | None = Field(
        None, description="accepted and without effect; num_inference_steps decides"
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="without effect")
    background: Literal["auto", "opaque"] | None = Field(None, description="always opaque")
    moderation: Literal["auto", "low"] | None = Field(None, description="without effect")
    user: str | None = Field(None, max_length=1000, description="without effect")
    safety_identifier: str | None = Field(None, max_length=1000, description="without effect")
    stream: bool | None = False
    partial_images: int | None = Field(None, ge=0, le=100, description="previews of a stream")
    progress: bool | None = Field(False, description="adds queued and progress events to a stream")
    negative_prompt: str | None = Field(None, max_length=TEXT)
    num_inference_steps: int | None = Field(20, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(7.5, ge=0.0, le=100.0, description="to 1: no guidance")
    seed: int | None = Field(None, ge=0, le=LAST_SEED, description="default: drawn")
    scheduler: str | None = Field(None, max_length=100, description="such as DPM++ 2M Karras")
    loras: dict[str, float] | None = Field(
        None, description="weights by name; <lora:NAME:WEIGHT> in the prompt does the same"
    )
    feature_reuse: int | None = Field(
        1, ge=1, le=100, description="every Nth evaluation is full, for models built for it"
    )
    priority: int | None = Field(0, ge=-100, le=100, description="higher goes first")
    deadline_seconds: float | None = Field(
        None, gt=0.0, le=86_400.0, description="refused at once if it cannot be kept"
    )


class Edit(Generation):
    """The same with a picture to start from; it and the mask are files of the form."""

    strength: float | None = Field(None, ge=0.0, le=1.0, description="default: 0.8, with a mask 1")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="without effect")


class TextToImage(BaseModel):
    """What clients of `/sdapi` send. Numbers may be text and whole numbers floats, as there; what
    they send beyond it is read by `sdapi.fields`.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str | None = Field("", max_length=TEXT)
    negative_prompt: str | None = Field("", max_length=TEXT)
    seed: int | None = Field(-1, ge=-1, le=LAST_SEED, description="-1: drawn")
    steps: int | None = Field(20, ge=1, le=MAX_STEPS)
    cfg_scale: float | None = Field(7.0, ge=0.0, le=100.0, description="to 1: no guidance")
    width: int | None = Field(None, ge=16, le=8192, description="default: the model's own")
    height: int | None = Field(None, ge=16, le=8192, description="default: the model's own")
    sampler_name: str | None = Field(None, max_length=100, description="default: the model's own")
    sampler_index: str | None = Field(None, max_length=100, description="if no sampler_name")
    scheduler: str | None = Field(None, max_length=100, description="such as Karras")
    eta: float | None = Field(None, description="share of fresh noise; default: the sampler's")
    batch_size: int | None = Field(1, ge=1, le=MAX_PICTURES)
    n_iter: int | None = Field(1, ge=1, le=MAX_PICTURES)
    send_images: bool | None = True
    override_settings: dict[str, Any] | None = Field(None, description="options of one request")
    override_settings_restore_afterwards: bool | None = Field(
        True, description="false keeps the options for the requests that follow"
    )


class ImageToImage(TextToImage):
    """The same with an image to start from, in base64."""

    init_images: list[str] = Field(min_length=1, description="one")
    denoising_strength: float | None = Field(0.75, ge=0.0, le=1.0)
    resize_mode: int | None = Field(0, ge=0, le=3, description="0 stretch, 1 crop, 2 fill")
    mask: str | None = Field(None, description="light, or opaque, where the image is made new")
    mask_blur: int | None = Field(None, ge=0, le=MAX_BLUR, description="both of these")
    mask_blur_x: int | None = Field(4, ge=0, le=MAX_BLUR)
    mask_blur_y: int | None = Field(4, ge=0, le=MAX_BLUR)
    inpainting_fill: int | None = Field(0, ge=0, le=3, description="0 fill, 1 original")
    inpaint_full_res: bool | None = Field(True, description="the masked region alone, enlarged")
    inpaint_full_res_padding: int | None = Field(0, ge=0, le=8192)
    inpainting_mask_invert: int | None = Field(0, ge=0, le=1)
    include_init_images: bool | None = Field(False, description="in the answer's parameters")


class PngInfo(BaseModel):
    """An image whose text is asked for."""

    model_config = ConfigDict(extra="ignore")

    image: str


class Upscaling(BaseModel):
    """How images are resized by `/sdapi`'s extras."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    resize_mode: int | None = Field(0, ge=0, le=1, description="0 by a factor, 1 to a size")
    upscaling_resize: float | None = Field(2.0, gt=0.0, le=100.0)
    upscaling_resize_w: int | None = Field(512, ge=1, le=8192)
    upscaling_resize_h: int | None = Field(512, ge=1, le=8192)
    upscaling_crop: bool | None = True
    upscaler_1: str | None = Field("None", max_length=100)
    upscaler_2: str | None = Field("None", max_length=100)
    extras_upscaler_2_visibility: float | None = Field(0.0, ge=0.0, le=1.0)


class UpscaledImage(Upscaling):
    """One image."""

    image: str = ""


class NamedImage(BaseModel):
    """An image of a batch."""

    data: str
    name: str | None = None


class UpscaledImages(Upscaling):
    """Several."""

    imageList: list[NamedImage] = Field(min_length=1, max_length=100)
