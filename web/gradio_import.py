"""Gradio, imported in half of its time and without what it does beside.

Gradio writes a stub for editors (a `.pyi` file) beside the source of each of its components, and
for that parses all of them again whenever it is imported: 1.5 of the 3.5 seconds that its import
takes on two cores. A server has no use for stubs, so they are left out here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from web.temporary import UPLOADS, own_folder

WRITES_STUBS = "gradio.component_meta"


class _WithoutStubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `WRITES_STUBS` as everybody does, and has it write nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != WRITES_STUBS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        self._loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if not callable(vars(module).get("create_or_modify_pyi")):  # another version of Gradio
            return
        vars(module)["create_or_modify_pyi"] = lambda component, name, events: None


def import_gradio() -> None:
    """Import Gradio once, after setting what it reads at that moment: no look-ups, and a folder of
    its own for what it makes, which goes when the program ends."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["GRADIO_TEMP_DIR"] = str(own_folder() / UPLOADS)
    finder = _WithoutStubs()
    sys.meta_path.insert(0, finder)
    try:
        import gradio  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
