"""Lets torchvision be imported beside a torch for CPUs; the set-up puts this into .venv.

The torchvision of the Python index is compiled for a CUDA torch, so its compiled part does not load. Its Python part
asks for the schemas of two operators when it is imported, and vLLM imports it for every model that sees. Nothing here
uses the operators themselves.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Defines the schemas when torchvision is looked for, and finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _KEPT.append(_defined())
        return None


_KEPT: list[Any] = []
"""Schemas live as long as the library that defines them."""


def _defined() -> Any:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


sys.meta_path.insert(0, _BeforeTorchvision())
