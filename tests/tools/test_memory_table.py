"""The tables of what fits which GPU are what the memory budget computes now."""

import itertools
import json

import memory_table
import pytest
from memory_table import FIGURES, MODELS, SIDES, TextModel, create_manifest

from sdrt.engine.memory_budget import compute_budget

STORED = json.loads(FIGURES.read_text())


def test_the_tables_of_the_documentation_are_current():
    for path, content in memory_table.pages(STORED):
        assert content.count("|\n|---|") >= 1
        assert path.read_text() == content, "run tools/memory_table.py"


@pytest.mark.parametrize("name", MODELS)
def test_less_is_needed_in_turn_and_more_for_larger_images(name):
    manifest = create_manifest(name, STORED)
    modes = [
        [compute_budget(manifest, (side, side), 2, **mode).total for side in SIDES]
        for mode in memory_table.MODES.values()
    ]
    for totals in modes:
        assert totals == sorted(totals)
    for more, less in itertools.pairwise(modes):
        assert all(a >= b for a, b in zip(more, less, strict=True))


def test_a_card_fits_what_leaves_a_tenth_of_it_free():
    assert memory_table.smallest_card(3_600_000_000) == "fits 4 GB"
    assert memory_table.smallest_card(3_600_000_001) == "fits 6 GB"
    assert memory_table.smallest_card(10_800_000_001) == "more than 12 GB"


@pytest.mark.reference
@pytest.mark.rest
@pytest.mark.parametrize(
    ("text", "kind", "options"),
    [
        (TextModel(768, 12), "CLIPTextModel", {"num_attention_heads": 12}),
        (TextModel(1280, 32, projection=True), "CLIPTextModelWithProjection", {}),
    ],
)
def test_text_encoders_have_as_many_weights_as_in_transformers(text, kind, options):
    import torch
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        num_hidden_layers=text.layers,
        projection_dim=text.width,
        **{"num_attention_heads": 20, **options},
    )
    with torch.device("meta"):
        module = getattr(transformers, kind)(config)
    assert sum(weight.numel() for weight in module.parameters()) == text.weights


@pytest.mark.rest
def test_networks_of_full_size_have_as_many_weights_as_are_stored():
    assert memory_table.count_decoder() == STORED["decoder"]["weights"]
    for name, model in MODELS.items():
        assert memory_table.count_unet(model) == STORED[name]["weights"]


@pytest.mark.slow
def test_graphs_have_as_much_alive_as_is_stored():
    assert memory_table.measure() == STORED
