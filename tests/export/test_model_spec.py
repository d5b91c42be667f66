"""What is parsed of a checkpoint's configurations, and that each is parsed once."""

import json
import shutil
from collections import Counter

import pytest

from sdrt.errors import CheckpointError, UsageError
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.model_spec import check_feature_reuse, parse_model_spec, read_model_spec
from sdrt.export.unet_config import UnetConfig
from sdrt.export.vae import VaeConfig


def spec_of(folder):
    return read_model_spec(find_checkpoint(str(folder)))


def test_a_latent_models_spec(tiny):
    spec = spec_of(tiny)
    assert (spec.latent_channels, spec.downscale, spec.size_multiple) == (4, 8, 16)
    assert spec.native_size == (32, 32) and spec.max_tokens == 32
    assert list(spec.text_encoders) == list(spec.tokenizers) == ["text_encoder"]
    assert spec.context_width == spec.unet.cross_attention_dim == 16
    assert not spec.zero_empty_prompt and spec.prediction.kind == "epsilon"
    assert spec.scheduler["_class_name"] == "PNDMScheduler"


def test_the_spec_of_a_model_with_two_text_encoders(tiny_xl):
    spec = spec_of(tiny_xl)
    assert list(spec.text_encoders) == ["text_encoder", "text_encoder_2"]
    assert (spec.context_width, spec.pooled_width) == (40, 20)
    assert spec.unet.pooled_width == 20 and spec.zero_empty_prompt


def test_a_build_parses_every_configuration_once(tiny, tmp_path, monkeypatch):
    parsed = Counter()

    class Stop(Exception):
        """Raised where the build begins to export."""

    def stop(*_):
        raise Stop

    for kind in (UnetConfig, VaeConfig):

        def counted(raw, kind=kind, parse=kind.from_json):
            parsed[kind.__name__] += 1
            return parse(raw)

        monkeypatch.setattr(kind, "from_json", counted)
    monkeypatch.setattr("sdrt.export.validation.export_graph", stop)
    with pytest.raises(Stop):
        build_bundle(BuildPlan(str(tiny), tmp_path / "b"))
    assert parsed == {"UnetConfig": 1, "VaeConfig": 1}


def test_components_of_different_models_are_refused(tiny, tiny_xl, tmp_path):
    """The configurations by themselves are sound."""
    for unet, other, message in (
        (tiny_xl, tiny, "expects a pooled prompt"),
        (tiny, tiny_xl, "expects no pooled prompt"),
    ):
        folder = shutil.copytree(other, tmp_path / other.name)
        shutil.rmtree(folder / "unet")
        shutil.copytree(unet / "unet", folder / "unet")
        checkpoint = find_checkpoint(str(folder))
        parse_model_spec(checkpoint)
        with pytest.raises(CheckpointError, match=message):
            read_model_spec(checkpoint)


def test_latents_of_another_width_are_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latent_channels": 16}))
    with pytest.raises(CheckpointError, match=r"latent of 4 channels, .* have 16"):
        spec_of(folder)


def test_only_a_branch_of_the_unet_can_be_reused(tiny):
    spec = spec_of(tiny)
    for branch in (None, 0, 1):
        check_feature_reuse(spec, branch)
    for branch in (-1, 2):
        with pytest.raises(UsageError, match="branches 0 to 1"):
            check_feature_reuse(spec, branch)
