"""What every benchmark does with its figures: where they come from, and a file that is never half-written."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "BITSMOE_COMMIT"
"""Environment variable that names the commit of sources that are a copy without history."""


def said_by(*command: str) -> str:
    """What a command prints; empty where it does not exist or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The sources' commit; empty where they are a copy without history that is not named."""
    return os.environ.get(COMMIT_VARIABLE) or said_by("git", "describe", "--always", "--dirty")


def write_json(path: Path, data: Any) -> None:
    """Replace a file in one step."""
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def gpu_name(device: str) -> dict[str, str]:
    """`gpu`: what computes where that is a GPU; nothing where it is not."""
    import torch

    return {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}


def gpu_peak() -> dict[str, int]:
    """`peak_device_bytes`: most memory that torch's tensors took on a GPU in this process; nothing without one."""
    import torch

    return {"peak_device_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def child_environment() -> dict[str, str]:
    """The environment of a process that imports these sources."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
