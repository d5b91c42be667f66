"""LoRAs over HTTP: images, rejections, and names that stay in the folder."""

import base64
import io
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from lora_files import ATTENTION, lora_file
from lora_graphs import with_lora_graphs
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving import PROMPT, client, get_engine, run_server, wait_for

import sdrt
from sdrt.errors import UsageError
from sdrt.runtime.lora.names import find_lora_by_name, list_loras

pytestmark = pytest.mark.integration

SDAPI = {"steps": 3, "seed": 5, "width": 64, "height": 64, "sampler_name": "Euler", "cfg_scale": 2}
USUAL = {"num_inference_steps": 3, "seed": 5, "guidance_scale": 2.0}
SETS = {
    "": {},
    " <lora:first:0.8>": {"first": 0.8},
    " <lora:sub/third:1>": {"sub/third": 1.0},
    " <lora:first:0.5> <lora:third:-1>": {"first": 0.5, "sub/third": -1.0},
}


@pytest.fixture(scope="module")
def folder(home, embedded):
    folder = home / "loras"
    (folder / "sub").mkdir(parents=True)
    lora_file(folder / "first.safetensors", embedded, "kohya")
    alias = {"ss_output_name": "Third One"}
    lora_file(folder / "sub" / "third.safetensors", embedded, "peft", seed=1, metadata=alias)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def expected(shapes, folder):
    """Every set's image and its text, by the pipeline itself, with Euler."""
    result = {}
    with sdrt.load(shapes, backend="onnxruntime") as pipe:
        for tags, loras in SETS.items():
            pipe.set_lora(loras)
            result[tags] = pipe.with_scheduler("Euler")(PROMPT, **USUAL).images[0].tobytes()
    assert len(set(result.values())) == len(SETS)
    return result


def image_from(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_lora_images_equal_those_of_set_lora(server, expected):
    jobs = [*SETS] * 2

    def a1111(tags):
        with client(server) as http:
            body = {**SDAPI, "prompt": PROMPT + tags}
            return http.post("/sdapi/v1/txt2img", json=body).json()

    def openais(tags):
        with client(server) as http:
            body = {**USUAL, "prompt": PROMPT + tags, "scheduler": "Euler"}
            return http.post("/v1/images/generations", json=body).json()

    with ThreadPoolExecutor(6) as pool:
        theirs, ours = pool.map(a1111, jobs), pool.map(openais, jobs)
        for tags, one, other in zip(jobs, theirs, ours, strict=True):
            info = json.loads(one["info"])
            assert info["prompt"] == PROMPT + tags
            for image in (image_from(one["images"][0]), image_from(other["data"][0]["b64_json"])):
                assert image.tobytes() == expected[tags], tags
                assert image.text["parameters"].startswith(f"{PROMPT + tags}\nSteps: 3")
            assert info["infotexts"][0].startswith(f"{PROMPT + tags}\nSteps: 3")


@pytest.fixture
def row_server(shapes, folder, embedded, tmp_path):
    """A server of a bundle with `--lora-rank`, and files that fit it."""
    files = [folder / f"row-{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(files):
        lora_file(path, embedded, "kohya", seed=seed, strength=0.3, only=ATTENTION)
    with run_server(with_lora_graphs(shapes, tmp_path / "rows", 4).folder) as running:
        yield running
    for path in files:
        path.unlink()


def count_calls(http):
    """Calls of the UNet so far, and their rows."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = {s.name: s.value for family in families for s in family.samples}
    return samples["sdrt_rows_per_call_count"], samples["sdrt_rows_per_call_sum"]


def test_requests_with_different_files_share_calls(row_server):
    engine = get_engine(row_server)
    changes = engine.pipe.leases.changes
    prompts = [PROMPT, *(f"{PROMPT} <lora:row-{i}:0.8>" for i in range(3))]
    began, all_running = threading.Event(), threading.Event()

    def wait_for_others(handle, step):
        began.set()
        assert all_running.wait(60)

    with client(row_server) as http, ThreadPoolExecutor(4) as pool:

        def post(prompt):
            body = {**SDAPI, "prompt": prompt, "cfg_scale": 1}  # a row each
            return image_from(http.post("/sdapi/v1/txt2img", json=body).json()["images"][0])

        alone = [post(prompt).tobytes() for prompt in prompts]
        calls, rows = count_calls(http)
        assert calls == rows
        options = {"num_inference_steps": 1, "guidance_scale": 1.0}
        (first,) = engine.submit(PROMPT, options, scheduler="Euler", on_step=wait_for_others)
        try:
            assert began.wait(60)
            together = pool.map(post, prompts)
            wait_for(lambda: [h.state for h in engine.unfinished()].count("running") == 5)
        finally:
            all_running.set()
        assert [image.tobytes() for image in together] == alone
        first.future.result(60)
        calls, rows = (b - a for a, b in zip((calls, rows), count_calls(http), strict=True))
    assert rows == 1 + SDAPI["steps"] * len(prompts)
    assert calls < rows
    assert engine.pipe.leases.changes == changes
    assert len(set(alone)) == len(prompts)


def test_loras_field_equals_the_tag(server, expected):
    own = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x")
    more = {**USUAL, "scheduler": "Euler", "loras": {"first": 0.8}}
    result = own.images.generate(prompt=PROMPT, size="64x64", extra_body=more)
    image = image_from(result.data[0].b64_json)
    assert image.tobytes() == expected[" <lora:first:0.8>"]
    assert image.text["parameters"].startswith(f"{PROMPT} <lora:first:0.8>\n")


def refusals(server, prompt, **more):
    """The error messages of the endpoints for a rejected prompt."""
    with client(server) as http:
        first = http.post("/sdapi/v1/txt2img", json={**SDAPI, "prompt": prompt, **more})
        other = http.post("/v1/images/generations", json={**USUAL, "prompt": prompt, **more})
    assert first.status_code == other.status_code == 400, (first.text, other.text)
    detail, error = first.json()["detail"], other.json()["error"]
    assert error["type"] == first.json()["error"] == "invalid_request_error"
    assert detail == error["message"]
    return detail


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        (
            "<lora:frist:1>",
            "named 'frist' in $SDRT_HOME/loras; did you mean first?",
        ),
        ("<lora:thrid:1>", "did you mean sub/third?"),
        ("<lora:qqqqqqqq:1>", "there are first, sub/third"),
        ("<lora:first:much>", "is not a number"),
        ("<lora:first:1:dyn=4>", "'dyn'"),
        ("<hypernet:first:1>", "'hypernet'"),
    ],
)
def test_rejected_loras_are_explained(server, folder, tag, message):
    assert message in refusals(server, f"{PROMPT} {tag}")


def test_lora_tag_in_the_negative_prompt_is_rejected(server, folder):
    said = refusals(server, PROMPT, negative_prompt="blurry <lora:first:1>")
    assert "in the negative prompt is not applied" in said


@pytest.fixture
def outside(folder, embedded, tmp_path):
    """A file next to the folder, one elsewhere, and links to both in the folder."""
    outside_file = lora_file(folder.parent / "outside.safetensors", embedded, "kohya")
    secret = lora_file(tmp_path / "secret.safetensors", embedded, "kohya")
    links = {folder / "link.safetensors": secret, folder / "way": tmp_path}
    for link, target in links.items():
        link.symlink_to(target)
    yield outside_file, secret
    for link in links:
        link.unlink()
    outside_file.unlink()


def test_lora_names_stay_in_the_folder(server, folder, outside):
    """Neither paths nor links are accepted: only names of files in the folder."""
    outside_file, secret = outside
    names = ["../outside", "sub/../../outside", "./first", "sub/../first", "sub//third", "/first"]
    names += [
        str(outside_file),
        str(outside_file.with_suffix("")),
        str(secret.with_suffix("")),
        "~/first",
    ]
    names += ["link", "way/secret", "secret", "first\0", "..", ".", "sub", "first.safetensors"]
    names += [str(folder / "first.safetensors"), str(folder / "first"), "%2e%2e/outside"]
    assert list(list_loras()) == ["first", "sub/third"]
    for name in names:
        said = refusals(server, f"{PROMPT} <lora:{name}:1>")
        assert "There is no LoRA named" in said and str(folder.parent) not in said.replace(name, "")
        with client(server) as http:
            body = {**USUAL, "prompt": PROMPT, "loras": {name: 1.0}}
            response = http.post("/v1/images/generations", json=body)
        assert response.status_code == 400 and "There is no LoRA named" in response.text
    carried = get_engine(server).pipe.adapters.chosen
    assert {path for path, _ in carried} <= {
        folder / f"{name}.safetensors" for name in list_loras()
    }


def test_list_of_loras(server, folder):
    with client(server) as http:
        listed = http.get("/sdapi/v1/loras").json()
    assert [(item["name"], item["alias"]) for item in listed] == [
        ("first", "first"),
        ("sub/third", "Third One"),
    ]
    assert not any(str(folder.parent) in item["path"] for item in listed)


def test_lora_name_matching(folder, embedded):
    first, third = folder / "first.safetensors", folder / "sub" / "third.safetensors"
    for name in ("first", "FIRST", "First"):
        assert find_lora_by_name(name) == first
    for name in ("sub/third", "third", "Third One", "THIRD", "third one", "Sub/Third"):
        assert find_lora_by_name(name) == third
    other = folder / "other"
    other.mkdir()
    try:
        shutil.copyfile(third, other / "third.safetensors")
        (other / "old.pt").write_bytes(b"")
        (other / "damaged.safetensors").write_bytes(b"?")
        assert find_lora_by_name("other/third") == other / "third.safetensors"
        for name in ("third", "Third One", "THIRD"):
            with pytest.raises(UsageError, match=r"several .*\nhint: name one: other/third, sub"):
                find_lora_by_name(name)
        with pytest.raises(UsageError, match=r"old\.pt is a pickle"):
            find_lora_by_name("old")
    finally:
        shutil.rmtree(other)


def test_long_name_is_compared_quickly(folder):
    with pytest.raises(UsageError, match="no LoRA named"):
        find_lora_by_name("first" * 100_000)


@pytest.mark.rest
def test_the_command_line(shapes, folder, tmp_path):
    command = [sys.executable, "-m", "sdrt", "run", "--bundle", str(shapes), "--steps", "3"]
    command += ["--seed", "5", "--backend", "onnxruntime", "--guidance-scale", "2"]

    def run(*more):
        return subprocess.run([*command, *more], check=False, capture_output=True, text=True)

    prompts = [PROMPT + tags for tags in SETS]
    several = run(*prompts, "--output", str(tmp_path), "--lora", "third:0.5", "--json")
    assert several.returncode == 0, several.stderr
    with sdrt.load(shapes, backend="onnxruntime") as pipe:
        for i, (path, loras) in enumerate(
            zip(json.loads(several.stdout)["images"], SETS.values(), strict=True)
        ):
            pipe.set_lora({**loras, "sub/third": loras.get("sub/third", 0.0) + 0.5})
            options = {**USUAL, "seed": 5 + i}
            image = Image.open(path)
            assert image.tobytes() == pipe(PROMPT, **options).images[0].tobytes(), prompts[i]
            assert image.text["parameters"].startswith(f"{prompts[i]} <lora:third:0.5>\n")
    again = tmp_path / "again.png"
    typed = Image.open(json.loads(several.stdout)["images"][1]).text["parameters"].split("\n")[0]
    result = run(typed, "--seed", "6", "--output", str(again))
    assert result.returncode == 0, result.stderr
    assert again.read_bytes() == (tmp_path / json.loads(several.stdout)["images"][1]).read_bytes()
    wrong = run(f"{PROMPT} <lora:frist:1>", "--output", str(tmp_path / "wrong.png"))
    assert wrong.returncode == 2 and "did you mean first" in wrong.stderr
    literal = run(f"{PROMPT} <lora:frist:1>", "--literal", "--output", str(tmp_path / "l.png"))
    assert literal.returncode == 0, literal.stderr
