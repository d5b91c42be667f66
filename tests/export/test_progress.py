"""Builds that were killed continue from their complete components, and from no others."""

import os
import shutil
import signal

import pytest
import torch
from exports import exported_once
from killing import in_child
from safetensors.torch import load_file, save_file

from sdrt.bundle import open_bundle
from sdrt.bundle.integrity import PROGRESS
from sdrt.export import build, validation
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.progress import BuildProgress, compute_key

COMPONENTS = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]


def bytes_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Builder:
    """Builds in child processes, which log what they export; they may kill themselves."""

    def __init__(self, model, folder):
        self.model, self.log, self.target = model, folder / "log", folder / "home" / "b"
        self.target.parent.mkdir()

    def run(self, saves=None, target=None, **options):
        """The exported components, by a child that is killed after so many of them are stored."""
        self.log.write_text("")
        assert in_child(lambda: self._work(saves, target, options)) == (-9 if saves else 0)
        return self.log.read_text().split()

    def _work(self, saves, target, options):
        torch.set_num_threads(1)  # a fork has no other threads
        original = BuildProgress.save

        def export(module, inputs, outputs, axes, folder):
            with self.log.open("a") as file:
                file.write(f"{folder.name}\n")
            return exported_once(module, inputs, outputs, axes, folder)

        def save(progress, *arguments):
            original(progress, *arguments)
            if saves and len(progress._recipes) == saves:
                os.kill(os.getpid(), signal.SIGKILL)

        validation.export_graph, BuildProgress.save = export, save
        build_bundle(BuildPlan(str(self.model), target or self.target, name="b", **options))


@pytest.fixture
def builder(tiny, tmp_path, build_once):
    return Builder(shutil.copytree(tiny, tmp_path / "model"), tmp_path)


@pytest.fixture
def partial(builder):
    return builder.target.with_name(".b.partial")


def test_a_build_killed_after_each_component_exports_each_once(builder, partial, tmp_path):
    exported = [builder.run(saves=count) for count in (1, 2, 3, 4)]
    assert (partial / PROGRESS).is_dir()
    assert [*exported, builder.run()] == [[name] for name in COMPONENTS] + [[]]
    assert builder.run(target=tmp_path / "undisturbed") == COMPONENTS
    assert bytes_of(builder.target) == bytes_of(tmp_path / "undisturbed")
    assert [path.name for path in builder.target.parent.iterdir()] == ["b"]
    assert open_bundle(builder.target).manifest.components["unet"].parity["cosine"] > 0.9999


def test_other_weights_options_and_damage_begin_from_the_start(builder, partial):
    assert builder.run(saves=2) == COMPONENTS[:2]
    weights = partial / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert builder.run(saves=1) == COMPONENTS[:1]
    assert builder.run(saves=1, sizes=((48, 32),)) == COMPONENTS[:1]
    (partial / PROGRESS / "state.json").write_text("{")
    assert builder.run(saves=1) == COMPONENTS[:1]
    assert not (partial / "unet").exists()


@pytest.fixture
def key(builder):
    def compute(loras=(), **settings):
        return compute_key(find_checkpoint(str(builder.model)), loras, settings)

    return compute


def test_the_key_changes_with_weights_configuration_and_settings(builder, key):
    keys = [key(), key(dtype="float16")]
    path = builder.model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][0] += 1
    save_file(weights, path)
    keys.append(key())
    config = builder.model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + "\n")
    keys.append(key())
    assert len(set(keys)) == len(keys) and key() == keys[-1]


def test_an_interrupted_build_says_what_it_reuses(builder, caplog):
    builder.run(saves=1)
    stop = RuntimeError("enough")
    with (
        caplog.at_level("INFO", logger="sdrt.build"),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RuntimeError, match="enough"),
    ):
        patch.setattr(build.Validator, "build_component", lambda *_: (_ for _ in ()).throw(stop))
        build_bundle(BuildPlan(str(builder.model), builder.target, name="b"))
    assert "continuing an interrupted build: text_encoder" in caplog.text
    assert "[1/4] text_encoder: reused" in caplog.text
