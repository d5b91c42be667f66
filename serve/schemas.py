"""Request bodies, validated field by field; the OpenAPI schema is generated from them."""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")

MAX_STEPS = 1000
MAX_IMAGES = 10
MAX_SEED = 2**64 - 1
MAX_CHARACTERS = 32_000
MAX_BLUR = 64


def value_or(value: T | None, default: T) -> T:
    """A field's value, or its default if it is null."""
    return default if value is None else value


class ControlFields(BaseModel):
    """What ControlNets, T2I-Adapters and an IP-Adapter read, under diffusers' names."""

    control_image: str | list[str] | None = Field(
        None, description="base64; one for each net, in their order"
    )
    controlnet: str | list[str] | None = Field(
        None, description="names of the nets to use; default: all that are loaded"
    )
    controlnet_conditioning_scale: float | list[float] | None = Field(
        None, description="one, or one for each net; default: 1"
    )
    control_guidance_start: float | list[float] | None = Field(
        None, description="the part of the run at which a net begins; default: 0"
    )
    control_guidance_end: float | list[float] | None = Field(
        None, description="the part of the run at which a net stops; default: 1"
    )
    guess_mode: bool | None = Field(None, description="steers the prompt's row alone")
    ip_adapter_image: str | list[str] | None = Field(
        None, description="base64; the image prompt of an IP-Adapter"
    )
    ip_adapter_scale: float | list[float] | None = Field(
        None, description="of the image prompt; one, or one for each layer; default: 1"
    )


class GenerationRequest(ControlFields):
    """OpenAI's image request and this server's extensions. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(max_length=MAX_CHARACTERS)
    model: str | None = Field(None, description="a model of /v1/models; default: the first")
    n: int | None = Field(1, ge=1, le=MAX_IMAGES)
    size: str | None = Field("auto", max_length=20, description="WIDTHxHEIGHT or auto")
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of jpeg and webp; default: 100"
    )
    quality: Literal["low", "medium", "high", "auto", "standard", "hd"] | None = Field(
        None, description="ignored; use num_inference_steps"
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="ignored")
    background: Literal["auto", "opaque"] | None = Field(None, description="always opaque")
    moderation: Literal["auto", "low"] | None = Field(None, description="ignored")
    user: str | None = Field(None, max_length=1000, description="ignored")
    safety_identifier: str | None = Field(None, max_length=1000, description="ignored")
    stream: bool | None = False
    partial_images: int | None = Field(None, ge=0, le=100, description="previews in a stream")
    progress: bool | None = Field(False, description="adds queued and progress events to a stream")
    negative_prompt: str | None = Field(None, max_length=MAX_CHARACTERS)
    num_inference_steps: int | None = Field(20, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(7.5, ge=0.0, le=100.0, description="0 to 1: no guidance")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="default: random")
    scheduler: str | None = Field(None, max_length=100, description="for example DPM++ 2M Karras")
    loras: dict[str, float] | None = Field(
        None, description="weights by name; <lora:NAME:WEIGHT> in the prompt does the same"
    )
    preset: Literal["exact", "balanced", "fast"] | None = Field(
        None, description="a named set of reuse options; fields that are sent take precedence"
    )
    feature_reuse: int | None = Field(
        None,
        ge=1,
        le=100,
        description="DeepCache: run the full UNet every Nth evaluation, if the model supports it; "
        "default: 1",
    )
    feature_reuse_order: int | None = Field(
        None, ge=0, le=1, description="1 extrapolates what is reused (TaylorSeer); default: 0"
    )
    output_reuse: int | None = Field(
        None,
        ge=1,
        le=100,
        description="compute only one of N evaluations and extrapolate the others; default: 1",
    )
    guidance_rescale: float | None = Field(None, ge=0.0, le=1.0, description="default: 0")
    guidance_interval: list[float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="the part of the run with guidance; default: [0, 1]",
    )
    clip_skip: int | None = Field(
        None, ge=0, le=100, description="layers to leave out at the text encoder's end; default: 0"
    )
    refiner_switch_at: float | None = Field(
        None, gt=0.0, lt=1.0, description="the part of the run before the model's refiner"
    )
    hires_scale: float | None = Field(
        None, ge=1.0, le=8.0, description="a second pass at this multiple of the size (hires fix)"
    )
    hires_size: str | None = Field(
        None, max_length=20, description="instead: WIDTHxHEIGHT; a side of 0 follows from the other"
    )
    hires_steps: int | None = Field(None, ge=0, le=MAX_STEPS, description="0: as the first pass")
    hires_strength: float | None = Field(
        None, ge=0.0, le=1.0, description="denoising strength of the second pass; default: 0.7"
    )
    hires_upscaler: str | None = Field(None, max_length=200, description="default: Latent")
    hires_scheduler: str | None = Field(
        None, max_length=100, description="default: that of the first pass"
    )
    hires_prompt: str | None = Field(
        None, max_length=MAX_CHARACTERS, description="default: that of the first pass"
    )
    hires_negative_prompt: str | None = Field(
        None, max_length=MAX_CHARACTERS, description="default: that of the first pass"
    )
    hires_guidance_scale: float | None = Field(
        None, ge=0.0, le=100.0, description="default: that of the first pass"
    )
    priority: int | None = Field(
        0, ge=-100, le=100, description="higher values are scheduled first"
    )
    deadline_seconds: float | None = Field(
        None, gt=0.0, le=86_400.0, description="rejected at once if it cannot be met"
    )


class JobRequest(GenerationRequest):
    """An image request that is answered with a job."""

    webhook: str | None = Field(
        None, max_length=2000, description="URL that is sent the job once it has ended"
    )


class EditRequest(GenerationRequest):
    """An edit of an image; the image and the mask are files of the form."""

    strength: float | None = Field(
        None, ge=0.0, le=1.0, description="denoising strength; default: 0.8, or 1 with a mask"
    )
    input_fidelity: Literal["high", "low"] | None = Field(None, description="ignored")


class EstimateRequest(GenerationRequest):
    """A request whose cost is asked for."""

    strength: float | None = Field(
        None, gt=0.0, le=1.0, description="of an edit, whose image is not sent"
    )


class TokenCountRequest(BaseModel):
    """A prompt to count."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(max_length=MAX_CHARACTERS)
    model: str | None = Field(None, description="a model of /v1/models; default: the first")
    num_inference_steps: int | None = Field(
        20, ge=1, le=MAX_STEPS, description="for prompts that change during the run"
    )


class TextToImageRequest(BaseModel):
    """A1111's txt2img request. As in A1111, numbers may be strings and integers floats. Other
    fields are checked by `routes.sdapi.fields`.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str | None = Field("", max_length=MAX_CHARACTERS)
    negative_prompt: str | None = Field("", max_length=MAX_CHARACTERS)
    seed: int | None = Field(-1, ge=-1, le=MAX_SEED, description="-1: random")
    steps: int | None = Field(20, ge=1, le=MAX_STEPS)
    cfg_scale: float | None = Field(7.0, ge=0.0, le=100.0, description="0 to 1: no guidance")
    width: int | None = Field(None, ge=16, le=8192, description="default: that of the model")
    height: int | None = Field(None, ge=16, le=8192, description="default: that of the model")
    sampler_name: str | None = Field(None, max_length=100, description="default: that of the model")
    sampler_index: str | None = Field(None, max_length=100, description="used without sampler_name")
    scheduler: str | None = Field(None, max_length=100, description="for example Karras")
    eta: float | None = Field(
        None, description="amount of fresh noise; default: that of the sampler"
    )
    refiner_checkpoint: str | None = Field(
        "", max_length=1000, description="the model's refiner; empty or None: no refiner"
    )
    refiner_switch_at: float | None = Field(
        None,
        description="the part of the run before the refiner, in (0, 1); default: 0.8",
    )
    batch_size: int | None = Field(1, ge=1, le=MAX_IMAGES)
    n_iter: int | None = Field(1, ge=1, le=MAX_IMAGES)
    send_images: bool | None = True
    override_settings: dict[str, Any] | None = Field(None, description="options for this request")
    override_settings_restore_afterwards: bool | None = Field(
        True, description="false also stores them for later requests"
    )


class HiresRequest(TextToImageRequest):
    """A1111's txt2img request with its second pass, which img2img does not have."""

    enable_hr: bool | None = Field(False, description="a second pass at a higher resolution")
    denoising_strength: float | None = Field(None, description="of the second pass; default: 0.75")
    hr_scale: float | None = Field(2.0, description="1 to 8")
    hr_resize_x: int | None = Field(0, description="instead of hr_scale; 0: from the other side")
    hr_resize_y: int | None = Field(0, description="the same")
    hr_upscaler: str | None = Field(
        None,
        max_length=200,
        description="of latent-upscale-modes or upscalers; default: Latent",
    )
    hr_second_pass_steps: int | None = Field(0, description="0: as many as steps")
    hr_sampler_name: str | None = Field(None, max_length=100, description="default: sampler_name")
    hr_scheduler: str | None = Field(None, max_length=100, description="default: scheduler")
    hr_prompt: str | None = Field("", max_length=MAX_CHARACTERS, description="default: prompt")
    hr_negative_prompt: str | None = Field(
        "", max_length=MAX_CHARACTERS, description="default: negative_prompt"
    )
    hr_cfg: float | None = Field(None, description="default: cfg_scale")
    hr_checkpoint_name: str | None = Field(
        None, max_length=1000, description="rejected unless it is the same"
    )
    hr_additional_modules: list[str] | None = Field(None, description="the same")
    firstphase_width: int | None = Field(0, description="rejected unless 0")
    firstphase_height: int | None = Field(0, description="rejected unless 0")


class ImageToImageRequest(TextToImageRequest):
    """A1111's img2img request; images are base64."""

    init_images: list[str] = Field(min_length=1, description="exactly one")
    denoising_strength: float | None = Field(0.75, ge=0.0, le=1.0)
    resize_mode: int | None = Field(0, ge=0, le=3, description="0 stretch, 1 crop, 2 fill")
    mask: str | None = Field(None, description="white, or opaque, in the area to repaint")
    mask_blur: int | None = Field(
        None, ge=0, le=MAX_BLUR, description="sets mask_blur_x and mask_blur_y"
    )
    mask_blur_x: int | None = Field(4, ge=0, le=MAX_BLUR)
    mask_blur_y: int | None = Field(4, ge=0, le=MAX_BLUR)
    inpainting_fill: int | None = Field(0, ge=0, le=3, description="0 fill, 1 original")
    inpaint_full_res: bool | None = Field(
        True, description="generate the masked region only, at full size"
    )
    inpaint_full_res_padding: int | None = Field(0, ge=0, le=8192)
    inpainting_mask_invert: int | None = Field(0, ge=0, le=1)
    include_init_images: bool | None = Field(False, description="echo the input in parameters")


class PngInfoRequest(BaseModel):
    """A1111's request for the text of an image file."""

    model_config = ConfigDict(extra="ignore")

    image: str


class UpscaleRequest(BaseModel):
    """The settings of A1111's extras."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    resize_mode: int | None = Field(0, ge=0, le=1, description="0: by a factor, 1: to a size")
    upscaling_resize: float | None = Field(2.0, gt=0.0, le=100.0)
    upscaling_resize_w: int | None = Field(512, ge=1, le=8192)
    upscaling_resize_h: int | None = Field(512, ge=1, le=8192)
    upscaling_crop: bool | None = True
    upscaler_1: str | None = Field("None", max_length=100)
    upscaler_2: str | None = Field("None", max_length=100)
    extras_upscaler_2_visibility: float | None = Field(0.0, ge=0.0, le=1.0)


class UpscaleImageRequest(UpscaleRequest):
    """A1111's extra-single-image request."""

    image: str = ""


class NamedImage(BaseModel):
    """An image of a batch."""

    data: str
    name: str | None = None


class UpscaleBatchRequest(UpscaleRequest):
    """A1111's extra-batch-images request."""

    imageList: list[NamedImage] = Field(min_length=1, max_length=100)
