"""What users of diffusers try on a pipeline: every mistake has a hint, and `hasattr` is false."""

import copy
import pickle

import pytest

import sdrt
from sdrt.errors import UsageError

NAMES = {
    "to": "sdrt.load",
    "cuda": "sdrt.load",
    "enable_model_cpu_offload": "low_memory=True",
    "enable_sequential_cpu_offload": "low_memory=True",
    "enable_xformers_memory_efficient_attention": "leave it out",
    "disable_attention_slicing": "leave it out",
    "load_lora_weights": "set_lora",
    "unload_lora_weights": "set_lora",
    "set_adapters": "set_lora",
    "enable_lora": "set_lora",
    "set_ip_adapter_scale": "IP-Adapter",
    "enable_freeu": "unsupported",
    "set_attention_slice": "leave it out",
    "scheduler": "with_scheduler",
    "unet": "pipe.engines",
    "device": "pipe.backend",
    "set_progress_bar_config": "progress=True",
    "save_pretrained": "copy",
    "closee": "did you mean close?",
}


@pytest.mark.parametrize("name", NAMES)
def test_attributes_of_diffusers_get_what_to_use(pipe, name):
    assert not hasattr(pipe, name)
    with pytest.raises(AttributeError) as error:
        getattr(pipe, name)
    assert isinstance(error.value, UsageError) and NAMES[name] in error.value.hint


@pytest.mark.parametrize("name", ["scheduler", "unet", "anything", "manifest"])
def test_a_pipeline_cannot_be_changed(pipe, name):
    with pytest.raises(UsageError, match=f"cannot be changed: {name} = ") as error:
        setattr(pipe, name, 1)
    assert name != "scheduler" or "with_scheduler" in error.value.hint
    with pytest.raises(UsageError, match="cannot be changed"):
        delattr(pipe, name)


def test_from_pretrained_leads_to_build_and_load():
    with pytest.raises(UsageError, match="from_pretrained") as error:
        sdrt.Pipeline.from_pretrained("runwayml/stable-diffusion-v1-5")
    assert "sdrt.build" in error.value.hint
    with pytest.raises(AttributeError, match=r"use sdrt\.load"):
        sdrt.StableDiffusionPipeline  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"torch_dtype": None}, "precision"),
        ({"scheduler": None}, "with_scheduler"),
        ({"safety_checker": None}, "sdrt.build"),
        ({"use_safetensors": True}, "always safetensors"),
        ({"bakend": "torch"}, "did you mean backend?"),
        ({"foo": 1}, "one of bundle, backend"),
    ],
)
def test_arguments_of_load_that_are_not_there(arguments, hint):
    with pytest.raises(UsageError, match="load has no argument") as error:
        sdrt.load("shapes", **arguments)
    assert hint in error.value.hint


def test_arguments_of_build_that_are_not_there():
    with pytest.raises(UsageError, match="build has no argument 'fp16'") as error:
        sdrt.build("shapes", fp16=True)
    assert error.value.hint == 'use precision="fp16"'
    with pytest.raises(UsageError, match="build: missing a required argument"):
        sdrt.build()
    with pytest.raises(UsageError, match="load: too many positional arguments"):
        sdrt.load("shapes", "onnxruntime")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("stpes", "did you mean num_inference_steps?"),
        ("promtp", "did you mean prompt?"),
        ("output_typ", "did you mean output_type?"),
        ("foo", "see help(sdrt.GenerationOptions)"),
    ],
)
def test_unknown_arguments_of_a_call(pipe, name, hint):
    with pytest.raises(UsageError, match="unknown option") as error:
        pipe("a red circle", **{name: 1})
    assert hint in error.value.hint


def test_a_missing_kind_of_device_is_said_in_one_line():
    with pytest.raises(sdrt.BackendError) as error:
        sdrt.load("shapes", device="cuda")
    assert error.value.message.startswith("no backend can run on cuda: ")
    assert "on cpu" not in error.value.message and len(error.value.message) < 300
    with pytest.raises(sdrt.BackendError, match="on cuda: openvino on cpu: computes on cpu"):
        sdrt.load("shapes", backend="openvino", device="cuda")


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_pipeline_is_not_for_another_process(pipe, take):
    with pytest.raises(UsageError) as error:
        take(pipe)
    assert "sdrt.load in every process" in error.value.hint
