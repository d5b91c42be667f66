"""A plugin of pytest (`-p blocked_packages`): imports fail of what a machine with a GPU may lack.

`SDRT_BLOCKED` names the packages, separated by commas.
"""

import importlib.abc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class Blocker(importlib.abc.MetaPathFinder):
    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"{fullname} is blocked", name=fullname)
        return None


sys.meta_path.insert(0, Blocker(frozenset(os.environ["SDRT_BLOCKED"].split(","))))
