"""The container images against what they are made of: extras, routes, arguments, sources."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from sdrt.cli.main import build_parser
from sdrt.serve.routes import health

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMAGES = [ROOT / "docker" / name for name in ("Dockerfile.cpu", "Dockerfile.cuda")]


@pytest.fixture(params=IMAGES, ids=lambda path: path.suffix[1:])
def image(request):
    """The text of a Dockerfile, its continued lines joined."""
    return request.param.read_text().replace("\\\n", " ")


def test_extras_exist(image):
    (extras,) = re.findall(r'"\.\[(.*?)\]"', image)
    names = extras.replace("${EXTRA}", "gpu,rtx").split(",")
    assert set(names) <= set(PROJECT["project"]["optional-dependencies"])


def test_command_is_one_of_the_command_line(image):
    (line,) = re.findall(r"^CMD (\[.*)$", image, re.M)
    args = build_parser().parse_args(json.loads(line))
    assert json.loads(line)[0] == "serve" and args.host == "0.0.0.0" and args.keys
    assert f"EXPOSE {args.port}\n" in image


def test_health_check_asks_a_route_of_the_server(image):
    port, path = re.findall(r"127\.0\.0\.1:(\d+)(/[a-z/]+)", image)[0]
    assert path in {route.path for route in health.router.routes}
    assert f"EXPOSE {port}\n" in image


def test_container_does_not_run_as_root(image):
    last_stage = image.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d*$", last_stage, re.M)
    assert "SDRT_HOME=/data" in last_stage and "VOLUME /data\n" in last_stage


def test_context_holds_what_the_wheel_needs():
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = {line[1:] for line in ignored if line.startswith("!")}
    project = PROJECT["project"]
    folders = PROJECT["tool"]["setuptools"]["package-dir"].values()
    needed = {*folders, *project["license-files"], project["readme"], "pyproject.toml"}
    assert copied == needed | {"constraints.txt"}
    assert all((ROOT / name).exists() for name in copied)


def test_compose_builds_the_images_and_gives_them_the_keys():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services = compose["services"]
    built = {ROOT / service["build"]["dockerfile"] for service in services.values()}
    assert built == set(IMAGES)
    for service in services.values():
        assert service["secrets"] == list(compose["secrets"]) == ["sdrt_keys"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["volumes"] == ["home:/data"] and "home" in compose["volumes"]
