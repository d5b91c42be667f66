"""The embedded bundle is what a build of its checkpoint writes today: run by `make wheel`."""

import json
from pathlib import Path

import numpy as np
import pytest

from sdrt.bundle import open_bundle
from sdrt.bundle.embedded import materialize
from sdrt.runtime.reference_outputs import REFERENCE_FILE

pytestmark = pytest.mark.release


def test_every_file_is_that_of_a_fresh_build(tmp_path):
    from sdrt.export.build import BuildPlan, build_bundle

    embedded = open_bundle(materialize("shapes", tmp_path))
    built = open_bundle(build_bundle(BuildPlan("shapes", tmp_path / "built", feature_reuse=0)))
    assert embedded.manifest.files.keys() == built.manifest.files.keys()
    for name, record in built.manifest.files.items():
        if name != REFERENCE_FILE:
            assert embedded.manifest.files[name] == record, name
    assert embedded.manifest.components.keys() == built.manifest.components.keys()
    for name, component in built.manifest.components.items():
        shipped = embedded.manifest.components[name]
        assert (shipped.inputs, shipped.outputs) == (component.inputs, component.outputs)
    # The last digit of a few reference outputs differs between machines.
    expected, actual = (
        numbers(json.loads((b.folder / REFERENCE_FILE).read_text())) for b in (built, embedded)
    )
    assert expected.keys() == actual.keys()
    assert np.allclose([*expected.values()], [*actual.values()], rtol=1e-4, atol=1e-5)


def test_the_controlnet_is_that_of_a_fresh_build(tmp_path):
    from sdrt.export.control_build import ControlBuildPlan, build_control_bundle

    embedded = open_bundle(materialize("outline", tmp_path))
    built = open_bundle(
        build_control_bundle(ControlBuildPlan("outline", tmp_path / "built", sizes=((64, 64),)))
    )
    exported = {name for name in built.manifest.files if name != REFERENCE_FILE}
    assert exported and embedded.manifest.files.keys() == built.manifest.files.keys()
    assert all(embedded.manifest.files[n] == built.manifest.files[n] for n in exported)


def test_the_ip_adapter_is_that_of_a_fresh_build(tmp_path):
    from sdrt.export.ip_adapter_bundle import IpAdapterBuildPlan, build_ip_adapter_bundle

    embedded = open_bundle(materialize("likeness", tmp_path))
    plan = IpAdapterBuildPlan(Path("likeness"), None, tmp_path / "built")
    built = open_bundle(build_ip_adapter_bundle(plan))
    exported = {name for name in built.manifest.files if name != REFERENCE_FILE}
    assert exported and embedded.manifest.files.keys() == built.manifest.files.keys()
    assert all(embedded.manifest.files[n] == built.manifest.files[n] for n in exported)


def numbers(value, place=()):
    """The numbers in parsed JSON by where they are; text is its own place."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {place: value} if isinstance(value, int | float) else {(*place, value): 0}
    return {k: v for key, item in items for k, v in numbers(item, (*place, key)).items()}
