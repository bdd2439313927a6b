"""Makes transformers know the quantization method `bitsmoe`, as soon as its list of methods is imported."""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

METHODS = "transformers.quantizers.auto"
"""The module that holds the list; whatever loads a model imports it."""


def register_with_transformers() -> None:
    """Register now if transformers has its list already, or else when it is imported."""
    if METHODS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(importlib.abc.MetaPathFinder):
    """Registers when the list has been imported; the import itself is left to the other finders."""

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
