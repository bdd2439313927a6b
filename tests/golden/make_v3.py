"""Writes the golden files of format version 3: those of version 1 without a gate, some with biases.

PYTHONPATH=tests:kernels python -m golden.make_v3
"""

from pathlib import Path

from . import make_v1

HERE = Path(__file__).resolve().parent / "v3"


def write(directory: Path) -> None:
    """Write the checkpoints `block16/` and `block32/` with `block{G}.expected.safetensors` into a directory."""
    make_v1.write(directory, 16, version=3, bias=True, gated=False, hidden_act="relu2")
    make_v1.write(directory, 32, version=3, gated=False, hidden_act="relu2")


if __name__ == "__main__":
    write(HERE)
