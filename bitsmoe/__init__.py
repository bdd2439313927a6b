"""bitsmoe for Python programs. After `import bitsmoe`, transformers loads bitsmoe checkpoints.

    import bitsmoe
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("qwen3-bitsmoe-2bit")

Importing this package loads neither torch nor transformers; their order does not matter.
"""

from bitsmoe.registration import register_with_transformers
from offline_quant import VERSION

__all__ = ["__version__"]
__version__ = VERSION

register_with_transformers()
