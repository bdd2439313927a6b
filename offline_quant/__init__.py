"""The offline quantizer and the `bitsmoe` command: decomposition, allocation, quantization, evaluation."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("bitsmoe-vllm")
except PackageNotFoundError:  # sources that are run without being installed
    VERSION = "0+sources"
"""Of this package, as checkpoints name it."""
