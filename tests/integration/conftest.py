import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from builders import TINY_MOE
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from vllm_processes import Generator


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, quantized by the command line; coarsely calibrated, for only the equality matters here."""
    out = tmp_path_factory.mktemp("demo") / "quantized"
    bitsmoe = Path(sys.executable).with_name("bitsmoe")
    quick = ["--calib", "self", "--calib-samples", "4", "--calib-length", "256", "--refine", "0"]
    subprocess.run(
        [bitsmoe, "quantize", TINY_MOE, "--bits", "2.5", "--basis", "whitened", *quick, "--out", out],
        check=True,
        timeout=300,
    )
    return out


@pytest.fixture(scope="session")
def dequantized(quantized: Path) -> Path:
    """The same weights as an ordinary checkpoint in float32, with which nothing of this project runs."""
    out = quantized.with_name("dequantized")
    dequantize_checkpoint(quantized, out, torch.float32)
    return out


@pytest.fixture(scope="session")
def vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where vLLM keeps compiled code and what it finds out about models: new, for an old one must not hide a fault."""
    return tmp_path_factory.mktemp("vllm_cache")


@pytest.fixture(scope="session")
def generate(tmp_path_factory: pytest.TempPathFactory, vllm_cache: Path) -> Iterator[Generator]:
    """Greedy completions by vLLM without a server."""
    generator = Generator(tmp_path_factory.mktemp("generate") / "log", vllm_cache)
    yield generator
    generator.close()
