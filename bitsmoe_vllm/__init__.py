"""vLLM plugin that serves bitsmoe checkpoints: `vllm serve DIR --quantization bitsmoe`.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its processes.
Importing this package loads neither torch nor vllm.
"""

import sys
from types import TracebackType

from bitsmoe_kernels.errors import BitsmoeError

_hooked = False


def register() -> None:
    """Make vLLM know the quantization method `bitsmoe`. May be called any number of times.

    Raises:
        BitsmoeError: another package has registered a method of that name.
    """
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
        register_quantization_config,
    )

    from bitsmoe_kernels.format.schema import QUANT_METHOD
    from bitsmoe_vllm.config import BitsmoeConfig

    if QUANT_METHOD in QUANTIZATION_METHODS:
        owner = get_quantization_config(QUANT_METHOD)
        if owner is not BitsmoeConfig:
            raise BitsmoeError(
                f"quantization method {QUANT_METHOD!r} is already registered by {owner.__module__}: "
                "uninstall that package, or bitsmoe-vllm"
            )
    else:
        register_quantization_config(QUANT_METHOD)(BitsmoeConfig)
    _report_errors_plainly()


def _report_errors_plainly() -> None:
    """End a process on an uncaught BitsmoeError with its message alone and exit status 2, not with a traceback."""
    global _hooked
    if _hooked:
        return
    _hooked = True
    chained = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        # An interactive interpreter also comes here, and must live on.
        if not isinstance(error, BitsmoeError) or hasattr(sys, "ps1"):
            chained(kind, error, traceback)
            return
        print(f"bitsmoe: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2)

    sys.excepthook = hook
