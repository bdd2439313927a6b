"""Registers the quantization method `bitsmoe` when transformers imports its list of methods."""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

METHODS = "transformers.quantizers.auto"
"""Module with the list of methods. transformers imports it before it loads a model."""


def register_with_transformers() -> None:
    """Register now if transformers has imported its list, or else when it does."""
    if METHODS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(importlib.abc.MetaPathFinder):
    """Registers after the import of METHODS. The other finders do the import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != METHODS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and (loader := spec.loader) is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == METHODS:  # a zip file has one loader for all its modules
                    _register()

            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from bitsmoe.hf_quantizer import register

    register()
