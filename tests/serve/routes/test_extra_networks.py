"""LoRA files, embeddings and their thumbnails over HTTP; thumbnails stay in their folder."""

import io
import shutil

import numpy as np
import pytest
from lora_files import lora_file
from PIL import Image
from safetensors.numpy import save_file
from serving import client

from sdrt.bundle import open_bundle
from sdrt.serve import thumbnails

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(home, embedded):
    folder = home / "loras"
    (folder / "people").mkdir(parents=True)
    lora_file(folder / "plain.safetensors", embedded, "kohya")
    alias = {"ss_output_name": "Anna"}
    lora_file(folder / "people" / "anna v1.5.safetensors", embedded, "kohya", metadata=alias)
    Image.new("RGB", (640, 320), "red").save(folder / "people" / "anna v1.5.preview.png")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def http(server, folder):
    with client(server) as http:
        yield http


def get_thumbnail(http, name, kind="loras"):
    return http.get(f"/v1/extra-networks/{kind}/{name}/thumbnail")


def test_networks_are_listed_with_their_thumbnails(http):
    body = http.get("/v1/extra-networks").json()
    assert body["loras"] == [
        {"name": "plain", "alias": "plain", "has_thumbnail": False},
        {"name": "people/anna v1.5", "alias": "Anna", "has_thumbnail": True},
    ]
    assert body["embeddings"] == []
    response = get_thumbnail(http, "people/anna v1.5")
    image = Image.open(io.BytesIO(response.content))
    assert (image.format, image.size) == ("JPEG", (192, 96))
    assert image.getpixel((90, 40))[0] > 240


def test_embeddings_have_thumbnails(http, home, shapes):
    embeddings = home / "embeddings"
    embeddings.mkdir()
    try:
        width = open_bundle(shapes).manifest.components["text_encoder"].outputs[0].shape[-1]
        save_file({"emb_params": np.zeros((1, width), np.float32)}, embeddings / "zzz.safetensors")
        Image.new("L", (8, 8)).save(embeddings / "zzz.png")
        http.post("/sdapi/v1/refresh-embeddings")
        listed = http.get("/v1/extra-networks").json()["embeddings"]
        assert listed == [{"name": "zzz", "has_thumbnail": True}]
        assert get_thumbnail(http, "zzz", "embeddings").status_code == 200
    finally:
        shutil.rmtree(embeddings)
        http.post("/sdapi/v1/refresh-embeddings")


def test_thumbnails_stay_in_the_folder(http, folder, tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    link = folder / "plain.png"
    link.symlink_to(outside)
    names = ["plain", "..%2Floras%2Fpeople%2Fanna v1.5", "%2Fetc%2Fpasswd", "people/../plain", "no"]
    assert [get_thumbnail(http, name).status_code for name in names] == [404] * len(names)
    link.unlink()
    assert get_thumbnail(http, "people/anna v1.5", "others").status_code == 400


def test_a_file_that_is_no_image_is_refused(http, folder, monkeypatch):
    path = folder / "plain.png"
    path.write_bytes(b"<script>alert(1)</script>")
    assert get_thumbnail(http, "plain").status_code == 400
    Image.new("RGB", (8, 8)).save(path)
    assert get_thumbnail(http, "plain").status_code == 200
    monkeypatch.setattr(thumbnails, "MAX_FILE_BYTES", 10)
    assert get_thumbnail(http, "plain").status_code == 400
    path.unlink()
