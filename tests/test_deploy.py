"""The files of deploy/ against what they name: options, routes, metrics, exit codes."""

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from sdrt import errors
from sdrt.cli.main import build_parser
from sdrt.serve.metrics import Metrics
from sdrt.serve.routes import health
from sdrt.serve.settings import Settings

DEPLOY = Path(__file__).parents[1] / "deploy"


def read_yaml(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


@pytest.fixture(scope="module")
def deployment():
    (deployment,) = [item for item in read_yaml("kubernetes.yaml") if item["kind"] == "Deployment"]
    return deployment["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def metric_names():
    """Every name that a server exposes, and the process metrics that queries use."""
    metrics = Metrics()
    metrics.track_engines({})
    names = {
        re.sub(r"_(bucket|sum|count)$", "", line.split("{")[0].split(" ")[0])
        for line in metrics.render("")[0].decode().splitlines()
        if not line.startswith("#")
    }
    declared = {family.name for family in metrics.registry.collect()}
    return names | declared | {f"{name}_total" for name in declared} | {"up"}


def check_metrics(query, known):
    used = re.findall(r"\b(?:sdrt|process)_\w+|\bup\b", query)
    assert used
    for name in used:
        assert name in known or re.sub(r"_(bucket|sum|count)$", "", name) in known, name


def test_dashboard_asks_for_metrics_of_the_server(metric_names):
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            check_metrics(target["expr"], metric_names)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    text = json.dumps(dashboard)
    assert set(re.findall(r"\$\{?(?!__)(\w+)", text)) <= variables


def test_panels_of_the_dashboard_do_not_overlap():
    places = set()
    for panel in json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]:
        box = panel["gridPos"]
        columns = range(box["x"], box["x"] + box["w"])
        cells = {(x, y) for x in columns for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & places and max(columns) < 24
        places |= cells


def test_alerts_ask_for_metrics_of_the_server(metric_names):
    (rules,) = read_yaml("prometheus-rules.yaml")
    for rule in rules["groups"][0]["rules"]:
        check_metrics(rule["expr"], metric_names)


def test_commands_are_those_of_the_command_line(deployment):
    unit = (DEPLOY / "sdrt.service").read_text()
    (command,) = re.findall(r"^ExecStart=/opt/sdrt/bin/sdrt (.*)$", unit, re.M)
    (container,) = deployment["containers"]
    for arguments in (shlex.split(command), container["args"]):
        args = build_parser().parse_args(arguments)
        assert args.command.__name__ == "serve" and args.keys and args.host == "0.0.0.0"
    assert args.port == container["ports"][0]["containerPort"]


def test_probes_ask_routes_of_the_server(deployment):
    (container,) = deployment["containers"]
    paths = {route.path for route in health.router.routes}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in paths
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"


def test_supervisors_wait_for_the_drain(deployment):
    unit = (DEPLOY / "sdrt.service").read_text()
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)
    for seconds in (int(stop), deployment["terminationGracePeriodSeconds"]):
        assert seconds > Settings().drain_seconds + 5


def test_units_restart_a_lost_gpu_but_no_mistake_of_the_user():
    unit = (DEPLOY / "sdrt.service").read_text()
    (listed,) = re.findall(r"^RestartPreventExitStatus=([\d ]+)$", unit, re.M)
    codes = {
        error.exit_code
        for _, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.UsageError | errors.BundleError)
    }
    assert codes == set(map(int, listed.split()))
    assert errors.DeviceLostError.exit_code not in codes


def test_options_of_the_ray_service_are_those_of_the_command_line():
    from sdrt.serve.ray.app import _build_parser, _command_line

    (service,) = read_yaml("ray-service.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, name = application["import_path"].split(":")
    assert (module, name) == ("sdrt.serve.ray.app", "app")
    args = _build_parser().parse_args(["--ray", *_command_line(application["args"])])
    assert args.replicas == "1:4" and args.bundle == ["shapes"]
