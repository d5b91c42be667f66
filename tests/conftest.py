"""What tests share: a home of their own, a tiny checkpoint made in code, the embedded bundle."""

import gc
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest

# Before any test file imports what reads it: no test reaches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Workers that compute side by side each have a core, not all of them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts what runs in its background deaf to Ctrl-C, which children would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """What the libraries have made by now stays: no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """SDRT_HOME for all tests and their subprocesses; where `exports` keeps components."""
    patch = pytest.MonkeyPatch()
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    patch.setenv("SDRT_TEST_EXPORTS", str(shared / "exports"))
    folder = tmp_path_factory.mktemp("home")
    patch.setenv("SDRT_HOME", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def loras(home):
    """No test file finds the LoRA files of another by name."""
    yield
    shutil.rmtree(home / "loras", ignore_errors=True)


@pytest.fixture(autouse=True)
def handlers():
    """The command line logs to the stream of its test, which ends with it; its handler must too."""
    yield
    root = logging.getLogger()
    for handler in [each for each in root.handlers if type(each) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def shapes(home):
    """The bundle of the embedded model, built once; `$SDRT_TEST_SHAPES` keeps it between runs."""
    from exports import built

    logging.getLogger("sdrt").setLevel(logging.WARNING)
    kept = os.environ.get("SDRT_TEST_SHAPES")
    if kept and Path(kept).is_dir():
        return Path(shutil.copytree(kept, home / "bundles" / "shapes"))
    bundle = built("shapes", feature_reuse=0)
    if kept:
        shutil.copytree(bundle, kept)
    return bundle


@pytest.fixture(scope="session")
def pipe(shapes):
    import sdrt

    with sdrt.load(shapes, backend="onnxruntime") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def embedded():
    from sdrt.export.checkpoint import embedded_checkpoint

    return embedded_checkpoint("shapes")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, embedded):
    """A checkpoint of a few thousand random weights, in the hub's layout."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny", embedded)


@pytest.fixture(scope="session")
def tiny_bundle(tiny, tmp_path_factory):
    """Its bundle in two sizes."""
    from exports import built

    target = tmp_path_factory.mktemp("built") / "tiny"
    return built(str(tiny), target, sizes=((32, 32), (48, 32)), batch=(1, 1, 2))


def write_tiny(folder: Path, embedded: Path, **unet_options) -> Path:
    import torch
    from safetensors.torch import save_file

    from sdrt.export.unet import Unet, UnetConfig
    from sdrt.export.vae import AutoencoderKL, VaeConfig

    torch.manual_seed(0)
    shutil.copytree(embedded / "tokenizer", folder / "tokenizer")
    shutil.copytree(embedded / "scheduler", folder / "scheduler")
    write_text_encoder(folder, "text_encoder", "CLIPTextModel", num_hidden_layers=1)
    unet = {
        "sample_size": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        **unet_options,
    }
    vae = {
        "block_out_channels": [4] * 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    made = {
        # first, so that models of other UNets have the same one
        "vae": (vae, AutoencoderKL(VaeConfig.from_json(vae))),
        "unet": (unet, Unet(UnetConfig.from_json(unet))),
    }
    for part, (config, module) in made.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        save_file(module.state_dict(), folder / part / "diffusion_pytorch_model.safetensors")
    return folder


def write_text_encoder(folder: Path, part: str, kind: str, **options) -> None:
    import transformers

    tokenizer = part.replace("text_encoder", "tokenizer")
    vocabulary = len(json.loads((folder / tokenizer / "vocab.json").read_text()))
    config = transformers.CLIPTextConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "eos_token_id": vocabulary - 1,
            **options,
        }
    )
    getattr(transformers, kind)(config).save_pretrained(folder / part)


def write_tiny_xl(folder: Path, embedded: Path, **unet_options) -> Path:
    """Shaped like XL: two text encoders, 16 and 24 wide, and a pooled prompt of 20."""
    options = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "upcast_attention": None,
        "cross_attention_dim": 40,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 68,
    }
    write_tiny(folder, embedded, **{**options, **unet_options})
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    (folder / "tokenizer_2" / "special_tokens_map.json").unlink()
    shutil.rmtree(folder / "text_encoder")
    write_text_encoder(folder, "text_encoder", "CLIPTextModel", num_hidden_layers=2)
    write_text_encoder(
        folder,
        "text_encoder_2",
        "CLIPTextModelWithProjection",
        num_hidden_layers=3,
        hidden_size=24,
        projection_dim=20,
        hidden_act="gelu",
    )
    return folder


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory, embedded):
    return write_tiny_xl(tmp_path_factory.mktemp("tiny_xl") / "tiny-xl", embedded)


@pytest.fixture(scope="session")
def tiny_xl_bundle(tiny_xl):
    from exports import built

    target = tiny_xl.parent / "tiny-xl-bundle"
    return built(str(tiny_xl), target, sizes=((32, 32), (48, 32)))


@pytest.fixture
def vocabulary(tiny):
    return len(json.loads((tiny / "tokenizer" / "vocab.json").read_text()))


@pytest.fixture
def written(tiny, tmp_path):
    """A function that writes tensors as a file beside a tokenizer, and gives its path."""
    from safetensors.torch import save_file

    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")

    def write(tensors, name="model.safetensors", **options):
        save_file(tensors, tmp_path / name, **options)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def server(shapes):
    """A server of the embedded model, with the settings that it has by default."""
    from serving import served

    with served(shapes) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    from browsing import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def page(browser, server):
    """The server's page, loaded."""
    from browsing import loaded, opened

    with opened(browser, server) as page:
        yield loaded(page)
