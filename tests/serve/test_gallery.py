"""The gallery over HTTP: what is stored, listed, searched and deleted, and that it stays in its
folder.
"""

import base64
import io

import pytest
from PIL import Image
from serving import PROMPT, api_keys, client, run_server, wait_for

from sdrt.cli.arguments import settings_from_arguments
from sdrt.cli.main import build_parser
from sdrt.errors import UsageError
from sdrt.runtime.images import image_to_bytes, read_parameters
from sdrt.serve.gallery import Gallery

pytestmark = pytest.mark.integration

KEYS = api_keys("one", "two")
BODY = {"num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gallery")


@pytest.fixture(scope="module")
def server(shapes, folder):
    with run_server(shapes, gallery_folder=folder, keys=KEYS) as running:
        yield running


def connect(server, key):
    return client(server, headers={"X-Api-Key": key})


@pytest.fixture
def http(server):
    with connect(server, "one") as http:
        yield http


def listed(http, **query):
    return http.get("/v1/gallery", params=query).json()


def generate(http, prompt, path="/v1/images/generations", **fields):
    """An image's bytes, once it is in the gallery."""
    before = len(listed(http)["data"])
    body = http.post(path, json={"prompt": prompt, **BODY, **fields}).json()
    wait_for(lambda: len(listed(http)["data"]) == before + 1)
    image = body["data"][0]["b64_json"] if "data" in body else body["images"][0]
    return base64.b64decode(image)


def test_images_are_stored_listed_searched_and_deleted(http, server, folder):
    first = generate(http, "a red circle, né")
    second = generate(http, "a blue square", "/sdapi/v1/txt2img", steps=2, num_inference_steps=None)
    newest, oldest = listed(http)["data"]
    stored = http.get(oldest["url"])
    assert stored.headers["content-type"] == "image/png"
    assert stored.content == first
    expected = Image.open(io.BytesIO(second))
    assert Image.open(io.BytesIO(http.get(newest["url"]).content)).tobytes() == expected.tobytes()
    assert newest["parameters"] == read_parameters(expected)
    assert [item["id"] for item in listed(http, q="NÉ circle")["data"]] == [oldest["id"]]
    assert listed(http, q="circle square")["data"] == []
    page = listed(http, limit=1)
    assert (page["has_more"], page["data"]) == (True, [newest])
    page = listed(http, limit=1, before=newest["id"])
    assert (page["has_more"], page["data"]) == (False, [oldest])
    thumbnail = Image.open(io.BytesIO(http.get(oldest["thumbnail_url"]).content))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (64, 64))
    with connect(server, "two") as other:  # each key has its own
        assert listed(other)["data"] == []
        assert other.get(oldest["url"]).status_code == 404
        assert other.delete(oldest["url"]).status_code == 404
    assert http.delete(oldest["url"]).json()["deleted"]
    assert http.get(oldest["url"]).status_code == 404
    assert [item["id"] for item in listed(http)["data"]] == [newest["id"]]
    assert [path.name for path in folder.rglob("*.png")] == [newest["id"].split("/")[1] + ".png"]


@pytest.mark.parametrize(
    "name",
    [
        "..%2F..%2Fetc/passwd",
        "../outside/1",
        "2026-01-01/..%2F..%2Foutside",
        "2026-01-01/%2e%2e",
        "2026-01-01/000000000000-00000000",
        "2026-01-01/%00",
    ],
)
def test_names_never_leave_the_folder(http, folder, name):
    (folder.parent / "outside.png").write_bytes(b"secret")
    for method in ("GET", "DELETE"):
        response = http.request(method, f"/v1/gallery/{name}")
        assert response.status_code in (404, 405)
        assert b"secret" not in response.content
    assert (folder.parent / "outside.png").exists()


def test_invalid_queries_are_refused(http):
    for query in ({"before": "../x"}, {"limit": 0}, {"q": "x" * 2000}):
        assert http.get("/v1/gallery", params=query).status_code == 400


def test_a_server_without_a_gallery_stores_nothing(shapes, tmp_path):
    with run_server(shapes) as server, client(server) as http:
        http.post("/v1/images/generations", json={"prompt": PROMPT, **BODY})
        assert listed(http) == {"object": "list", "enabled": False, "data": [], "has_more": False}
        assert http.get("/v1/gallery/2026-01-01/000000000000-00000000").status_code == 404


def add(gallery, shade, owner=""):
    gallery.add_later(owner, Image.new("RGB", (64, 64), (shade, 0, 0)), f"shade {shade}\nSteps: 1")


def opened(folder, max_bytes=10**9):
    gallery = Gallery(folder, max_bytes)
    gallery.open()
    return gallery


def test_a_folder_is_read_again_without_what_is_not_its_own(tmp_path):
    gallery = opened(tmp_path / "own")
    for shade in (1, 2):
        add(gallery, shade)
    with pytest.raises(UsageError, match="another server"):
        opened(tmp_path / "own")
    gallery.close()
    day = next((tmp_path / "own").glob("*-*-*"))
    (day / "notes.png").write_bytes(b"")
    (tmp_path / "secret.png").write_bytes(image_to_bytes(Image.new("RGB", (8, 8)), "secret"))
    (day / "000000000000-00000000.png").symlink_to(tmp_path / "secret.png")
    gallery = opened(tmp_path / "own")
    texts = [gallery.read_parameters("", image) for image in gallery.search("")]
    assert texts == ["shade 2\nSteps: 1", "shade 1\nSteps: 1"]
    assert gallery.search("", "secret") == []
    gallery.close()


def test_the_oldest_images_are_removed(tmp_path):
    size = len(image_to_bytes(Image.new("RGB", (64, 64), (1, 0, 0)), "shade 1\nSteps: 1"))
    gallery = opened(tmp_path, max_bytes=round(2.5 * size))
    for shade in (1, 2, 3, 4):
        add(gallery, shade, owner="" if shade % 2 else "ab" * 32)
    large = Image.effect_noise((64, 64), 100).convert("RGB")
    gallery.add_later("", large, "too large")
    gallery.close()
    texts = [i.parameters for owner in ("", "ab" * 32) for i in gallery.search(owner)]
    assert texts == ["shade 3\nSteps: 1", "shade 4\nSteps: 1"]
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_options_of_the_command_line(tmp_path):
    def settings(*arguments):
        return settings_from_arguments(build_parser().parse_args(["serve", *arguments]))

    chosen = settings("--gallery", str(tmp_path), "--gallery-size", "0.5")
    assert (chosen.gallery_folder, chosen.gallery_bytes) == (tmp_path, 2**29)
    assert settings().gallery_folder is None
    for arguments in (["--gallery-size", "0"], ["--gallery", str(tmp_path), "--ray"]):
        with pytest.raises(UsageError):
            settings(*arguments)
