"""Fetching with the hub's own client from a server that speaks its protocol; folders of shards."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, Repository, serving
from safetensors.numpy import load_file, save_file
from untrusted_input import safetensors_bytes

from sdrt.errors import CheckpointError
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.hub import needed_names
from sdrt.export.weights import weight_files

pytestmark = pytest.mark.integration

FETCH = """
import logging, sys
from sdrt.errors import SdrtError
from sdrt.export.hub import fetched
logging.basicConfig(level=logging.INFO, format="%(message)s")
try:
    print(fetched(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None))
except SdrtError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """The tiny checkpoint with what hub repositories hold besides."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("hub") / "model")
    unet, vae = folder / "unet", folder / "vae"
    weights = unet / "diffusion_pytorch_model.safetensors"
    for name in ("fp16.safetensors", "non_ema.safetensors", "bin"):
        shutil.copyfile(weights, unet / f"diffusion_pytorch_model.{name}")
    sharded(vae, ".fp16")
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("# A model")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"large")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"large")
    return folder


def sharded(folder, variant="", spelling="{stem}{variant}-{i:05}-of-00002.safetensors"):
    """The folder's weights as two shards and an index next to them; their names."""
    stem = "diffusion_pytorch_model"
    weights = load_file(folder / f"{stem}.safetensors")
    names = sorted(weights)
    places = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = spelling.format(stem=stem, variant=variant, i=i)
        save_file({name: weights[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index, sorted(set(places.values()))


@pytest.fixture
def hub(model, tmp_path):
    """A hub with one open, one gated and one private repository, and one of pickles only."""
    pickles = tmp_path / "pickles"
    for part in ("unet", "vae", "text_encoder"):
        (pickles / part).mkdir(parents=True)
        (pickles / part / "config.json").write_text("{}")
        (pickles / part / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    single = tmp_path / "single"
    single.mkdir()
    (single / "merged.ckpt").write_bytes(b"pickle")
    old = shutil.copytree(model, tmp_path / "old")
    (old / "model_index.json").write_text('{"old": true}')
    repositories = {
        "org/open": Repository({"main": model, "v1": old}),
        "org/gated": Repository({"main": model}, token="hf_right", gated=True),
        "org/private": Repository({"main": model}, token="hf_right", private=True),
        "org/pickles": Repository({"main": pickles}),
        "org/ckpt": Repository({"main": single}),
    }
    with serving(Hub(repositories)) as served:
        yield served


@pytest.fixture
def fetch(hub, tmp_path):
    """Run `fetched` in a process of its own, which is when the client reads its environment."""

    def run(*arguments, code=FETCH, **environment):
        denoised = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), **environment}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=denoised | own,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.mark.rest
def test_only_what_a_build_reads_is_fetched(hub, fetch, model, tmp_path):
    done = fetch("org/open")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "hf"))
    sent = hub.files_sent()
    assert {name for name in sent if name.startswith("unet/")} == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert {name for name in sent if name.startswith("vae/")} == {
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
    }
    assert not any(name.startswith(("safety", "README", "v1-5")) for name in sent)
    assert f"of {sum(p.is_file() for p in model.rglob('*'))} files of org/open" in done.stderr
    before = len(hub.asked)
    again = fetch("org/open", HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout and len(hub.asked) == before


@pytest.mark.build
def test_the_hub_may_be_away(hub, fetch):
    cached = fetch("org/open").stdout
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    again = fetch("org/open", **away)
    assert again.stdout == cached and "cannot be reached" in again.stderr
    other = fetch("org/gated", **away)
    assert other.returncode == 4 and "sdrt build --model FOLDER" in other.stderr
    other = fetch("org/gated", HF_HUB_OFFLINE="1")
    assert other.returncode == 4 and "HF_HUB_OFFLINE is set" in other.stderr


@pytest.mark.build
def test_revisions(fetch):
    folders = [Path(fetch("org/open", revision).stdout.strip()) for revision in ("v1", "main")]
    texts = [(folder / "model_index.json").read_text() for folder in folders]
    assert texts == ['{"old": true}', "{}"]
    wrong = fetch("org/open", "v2")
    assert wrong.returncode == 4 and "no revision 'v2'" in wrong.stderr


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("org/gated", "", "accept its terms at .*/org/gated with your account, then set HF_TOKEN"),
        ("org/none", "", "has no org/none, or it is private"),
        ("org/pickles", "", "diffusion_pytorch_model.bin, a pickle: .*torch.load"),
        *(
            pytest.param(*case, marks=pytest.mark.build)
            for case in (
                ("org/gated", "hf_wrong", r"is gated \(403\).*see that the token"),
                ("org/private", "", "has no org/private, or it is private"),
                ("org/ckpt", "", "only merged.ckpt, a pickle: .*torch.load"),
            )
        ),
    ],
)
def test_what_cannot_be_had_says_what_to_do(hub, fetch, repository, token, message):
    done = fetch(repository, **({"HF_TOKEN": token} if token else {}))
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not hub.files_sent() or repository == "org/gated"


@pytest.mark.parametrize(
    "repository", ["org/gated", pytest.param("org/private", marks=pytest.mark.build)]
)
def test_a_token_opens_what_its_account_may_read(fetch, repository):
    assert fetch(repository, HF_TOKEN="hf_right").returncode == 0


def test_a_download_that_is_cut_goes_on_where_it_was(hub, fetch, tmp_path):
    name = "diffusion_pytorch_model.safetensors"
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text("{}")
    (large / name).write_bytes(os.urandom(24_000_000))
    hub.repositories["org/large"] = Repository({"main": large}, cut={name: 15_000_000})
    done = fetch("org/large")
    assert done.returncode == 0, done.stderr
    begun = [asked for method, path, asked in hub.asked if method == "GET" and path.endswith(name)]
    # The client writes by ten mebibytes.
    assert begun == ["", f"bytes={10 * 2**20}-"]
    assert (Path(done.stdout.strip()) / name).read_bytes() == (large / name).read_bytes()


@pytest.mark.rest
def test_a_hub_id_is_a_checkpoint(fetch):
    code = "import sys; from sdrt.export.checkpoint import find_checkpoint as find\n"
    code += "found = find(*sys.argv[1:]); print(found.source, len(found.weight_files('vae')))"
    done = fetch("org/open", "v1", code=code)
    assert done.stdout == "org/open@v1 2\n", done.stderr


def test_only_the_hub_has_revisions(tiny):
    with pytest.raises(CheckpointError, match="only models on the hub"):
        find_checkpoint(str(tiny), "v1")


def test_a_part_may_be_the_whole_repository():
    names = ["config.json", "diffusion_pytorch_model.safetensors", "README.md", "old.ckpt"]
    assert needed_names(names, ("vae",)) == sorted(names[:2])
    with pytest.raises(CheckpointError, match=r"but model_full.safetensors: download it"):
        needed_names(["model_full.safetensors"], ("vae",))


SPELLINGS = ("{stem}{variant}-{i:05}-of-00002.safetensors",)
SPELLINGS += ("{stem}-{i:05}-of-00002{variant}.safetensors",)


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny / "unet", tmp_path / "unet")


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_shards_are_the_weights(folder, variant, spelling):
    full = load_file(weight_files(folder)[0])
    _, files = sharded(folder, variant, spelling)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    actual = weight_files(folder)
    assert [path.name for path in actual] == files
    merged = {name: value for path in actual for name, value in load_file(path).items()}
    assert merged.keys() == full.keys()
    assert all((merged[name] == full[name]).all() for name in full)


def moved(index, shards):
    text = json.loads(index.read_text())
    name = next(name for name, file in text["weight_map"].items() if file == shards[0])
    text["weight_map"][name] = shards[1]
    index.write_text(json.dumps(text))


def forgotten(index, shards):
    text = json.loads(index.read_text())
    del text["weight_map"]["conv_in.weight"]
    index.write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i, s: (i.parent / s[1]).unlink(), "lacks 1 of 2 shards: .*-00002-of-00002"),
        (moved, "does not tell the truth: .* is not in .*-00002-of-00002.safetensors"),
        (forgotten, "conv_in.weight in .* is not in it"),
        (lambda i, s: i.write_text('{"weight_map": 3}'), "no weight_map"),
        (lambda i, s: (i.parent / s[0]).write_bytes(b"cut"), "not a complete safetensors file"),
    ],
)
def test_shards_that_do_not_fit_are_refused(folder, damage, message):
    index, shards = sharded(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    damage(index, shards)
    with pytest.raises(CheckpointError, match=message):
        weight_files(folder)


def test_a_file_passes_our_own_reader_first(folder):
    """A field that the library passes over."""
    path = folder / "diffusion_pytorch_model.safetensors"
    record = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "surprise": 1}
    path.write_bytes(safetensors_bytes({"a": record}, b"x"))
    with pytest.raises(CheckpointError, match="unknown fields in TensorRecord: 'surprise'"):
        weight_files(folder)
