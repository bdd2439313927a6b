"""A hash by which a model is known again."""

import hashlib
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def fingerprint(directory: Path) -> str:
    """A hash of a model: its JSON files whole; of every weight file its size, header and evenly spread samples."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix == ".json" and path.is_file():
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                for i in range(_SAMPLES):
                    file.seek(i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
