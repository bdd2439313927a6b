"""Registration with vLLM, in fresh interpreters; and the parts of the plugin that need no engine."""

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_vllm import _compat
from vllm_processes import Forks, forks


@pytest.fixture(scope="module")
def vllm() -> Iterator[Forks]:
    """Interpreters that have imported vLLM's quantization methods and nothing of this project."""
    with forks("vllm.model_executor.layers.quantization.fp8") as made:
        yield made


def test_import_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, bitsmoe_vllm; print(sorted({'torch', 'vllm', 'numpy', 'pydantic'} & sys.modules.keys()))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_entry_point() -> None:
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "bitsmoe"]
    assert entry.value == "bitsmoe_vllm:register"


def test_register_may_be_called_again(vllm: Forks) -> None:
    ended = vllm.run(
        """
import sys
from bitsmoe_vllm import register
register()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
first, hook = get_quantization_config("bitsmoe"), sys.excepthook
register()
assert get_quantization_config("bitsmoe") is first and sys.excepthook is hook
assert QUANTIZATION_METHODS.count("bitsmoe") == 1
print(first.__module__)
"""
    )
    assert ended.stdout.splitlines()[-1:] == ["bitsmoe_vllm.config"], ended.stderr


def test_a_name_taken_by_another_package_is_refused(vllm: Forks) -> None:
    ended = vllm.run(
        """
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
class Other(Fp8Config): pass
register_quantization_config("bitsmoe")(Other)
import bitsmoe_vllm
from bitsmoe_kernels.errors import BitsmoeError
try: bitsmoe_vllm.register()
except BitsmoeError as e: print(e)
"""
    )
    assert "'bitsmoe' is already registered by __main__" in ended.stdout, ended.stderr


def test_an_unsupported_vllm_is_refused_when_bitsmoe_is_used(vllm: Forks) -> None:
    """And not before: other models are none of our business."""
    ended = vllm.run(
        """
import vllm
vllm.__version__ = "0.33.0"
import bitsmoe_vllm
bitsmoe_vllm.register()
print("registered")
from bitsmoe_vllm.config import BitsmoeConfig
BitsmoeConfig.from_config({})
"""
    )
    assert ended.stdout.splitlines()[-1] == "registered"
    assert ended.returncode == 2
    assert "bitsmoe: error: vLLM 0.33.0 is installed" in ended.stderr
    assert "vLLM >= 0.26, < 0.33: pip install" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.25.1", False),
        ("0.26.0", True),
        ("0.29.0+cu129", True),
        ("0.32.1.dev3+gabc", True),
        ("0.33.0rc1", False),
        ("1.0", False),
        ("dev", False),
    ],
)
def test_supported_versions(version: str, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    if supported:
        _compat.check_vllm_version()
    else:
        with pytest.raises(BitsmoeError, match=rf"vLLM {re.escape(version)} is installed"):
            _compat.check_vllm_version()


def test_other_errors_keep_their_traceback(vllm: Forks) -> None:
    ended = vllm.run("import bitsmoe_vllm; bitsmoe_vllm.register(); 1 / 0")
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr
    assert "Traceback" in ended.stderr
