"""The bundle format: what lies in the folder that `sdrt build` writes and every engine reads.

`bundle` opens one, `manifest` parses `sdrt.json`, `store` finds the folder, `integrity` compares
files with their hashes, `onnx_check` and `safetensors` read untrusted files.
"""

from .bundle import Bundle, open_bundle, parse_size

__all__ = ["Bundle", "open_bundle", "parse_size"]
