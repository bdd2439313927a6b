"""Writes the golden files of format version 2: those of version 1, with other activations, some with biases.

PYTHONPATH=tests:kernels python -m golden.make_v2
"""

from pathlib import Path

from . import make_v1

HERE = Path(__file__).resolve().parent / "v2"


def write(directory: Path) -> None:
    """Write the checkpoints `block16/` and `block32/` with `block{G}.expected.safetensors` into a directory."""
    make_v1.write(directory, 16, version=2, bias=True, hidden_act="swigluoai")
    make_v1.write(directory, 32, version=2, hidden_act="gelu_pytorch_tanh")


if __name__ == "__main__":
    write(HERE)
