"""bitsmoe for Python programs: quantize, evaluate, inspect, dequantize and push.

    >>> import bitsmoe
    >>> result = bitsmoe.quantize("tiny_moe", "tiny-3bit", bits=3.0, calib="calib.txt", calib_samples=4)
    >>> print(f"{result.report.bpw:.2f} bits per weight")
    3.00 bits per weight

After `import bitsmoe`, transformers loads bitsmoe checkpoints:

    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("tiny-3bit")

The names in `__all__` are the whole public API. Importing this package loads neither torch nor transformers; the order
of imports does not matter.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from bitsmoe.registration import register_with_transformers
from bitsmoe_kernels.errors import BitsmoeError
from offline_quant import VERSION

if TYPE_CHECKING:
    from bitsmoe.api import QuantizeConfig, dequantize, evaluate, inspect, push, quantize

__all__ = ["BitsmoeError", "QuantizeConfig", "__version__", "dequantize", "evaluate", "inspect", "push", "quantize"]
__version__ = VERSION

if "torch" not in sys.modules:
    # OpenMP reads it once, when torch loads. Otherwise torch's threads spin while they wait, and a run on a busy
    # machine takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
register_with_transformers()


def __getattr__(name: str) -> Any:
    """A name of the API, which loads torch and transformers the first time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from bitsmoe import api
    except ModuleNotFoundError as e:
        e.add_note("run: pip install 'bitsmoe-vllm[quantize]'")
        raise
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
