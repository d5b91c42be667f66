"""Arguments of the model and the backend."""

import argparse

from .common import add_backend, add_bundle, add_embedding, add_static_size


def add_model(to: argparse.ArgumentParser) -> None:
    to.set_defaults(loras={}, control=[], ip_adapter=None, refiner=None, embedding_hashes={})
    model = to.add_argument_group("Model and backend")
    add_bundle(model)
    model.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE|NAME[:WEIGHT]",
        help="add a LoRA for this run, repeatable; NAME is a file in $SDRT_HOME/loras",
    )
    add_embedding(model)
    add_backend(model)
    model.add_argument(
        "--exact", action="store_true", help="use no lower precision than the bundle's"
    )
    model.add_argument("--low-memory", action="store_true", help="load one component at a time")
    model.add_argument(
        "--compile",
        action="store_true",
        help="use torch.compile with --backend torch; takes about a minute",
    )
    model.add_argument(
        "--cuda-graphs", action="store_true", help="replay CUDA graphs with --backend torch"
    )
    add_static_size(model)
