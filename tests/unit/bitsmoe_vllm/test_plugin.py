"""Registration with vLLM, in fresh interpreters; and the parts of the plugin that need no engine."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_vllm import _compat
from bitsmoe_vllm.config import own_classes
from vllm_processes import Forks, forks

pytestmark = pytest.mark.slow


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
vllm.__version__ = "0.25.1"
import bitsmoe_vllm
bitsmoe_vllm.register()
print("registered")
from bitsmoe_vllm.config import BitsmoeConfig
BitsmoeConfig.from_config({})
"""
    )
    assert ended.stdout.splitlines()[-1] == "registered"
    assert ended.returncode == 2
    assert "bitsmoe: error: vLLM 0.25.1 is installed" in ended.stderr
    assert "tried with 0.26 to 0.33: pip install 'vllm>=0.26,<0.34'" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugin warns of, formatted."""
    said: list[str] = []
    monkeypatch.setattr(_compat, "warn_once", lambda message, *args: said.append(message % args))
    return said


@pytest.mark.parametrize("version", ["0.26.0", "0.29.0+cu129", "0.32.1.dev3+gabc", "0.33.0", "0.33.1", "0.33.0rc1"])
def test_tried_versions_start_silently(version: str, warned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(_compat, "interface_faults", lambda classes: ["looked at"])
    _compat.check_vllm_version(own_classes)
    assert warned == []


@pytest.mark.parametrize("version", ["0.34.0", "0.40.1", "1.0", "dev"])
def test_newer_versions_start_with_a_warning_or_not_at_all(
    version: str, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    monkeypatch.setattr(vllm, "__version__", version)
    _compat.check_vllm_version(own_classes)
    (said,) = warned
    assert f"vLLM {version} is installed, and this bitsmoe-vllm was tried with 0.26 to 0.33." in said
    monkeypatch.delattr(RoutedExperts, "expert_map")
    with pytest.raises(BitsmoeError, match=rf"vLLM {version} is installed.*\n  - .*RoutedExperts has no expert_map$"):
        _compat.check_vllm_version(own_classes)
    assert len(warned) == 1


def test_versions_below_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.25.1")
    with pytest.raises(BitsmoeError, match=r"vLLM 0\.25\.1 is installed"):
        _compat.check_vllm_version(own_classes)


def test_the_installed_vllm_has_the_interfaces() -> None:
    assert _compat.interface_faults(own_classes) == []


def lose_a_module(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "vllm.scalar_type", None)


def lose_a_name(patch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import linear

    patch.delattr(linear, "UnquantizedLinearMethod")


def lose_a_field(patch: pytest.MonkeyPatch) -> None:
    from vllm.config import LoadConfig

    patch.delattr(LoadConfig, "safetensors_load_strategy", raising=False)
    patch.delitem(LoadConfig.__dataclass_fields__, "safetensors_load_strategy")


def lose_what_a_constructor_assigns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_compat, "_assigned", lambda cls: set())


def want_another_method(patch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

    patch.setattr(FusedMoEMethodBase, "__abstractmethods__", frozenset({"apply", "get_shards"}))


def pass_another_argument(patch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

    def apply(self: Any, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, scratch: Any) -> None:
        pass

    patch.setattr(FusedMoEMethodBase, "apply", apply)


def pass_an_argument_less(patch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    patch.setattr(QuantizationConfig, "get_quant_method", lambda self, layer: None)


def lose_a_hook(patch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    patch.delattr(QuantizationConfig, "get_cache_scale_mapper")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lose_a_module, "vllm.scalar_type cannot be imported"),
        (lose_a_name, "vllm.model_executor.layers.linear has no UnquantizedLinearMethod"),
        (lose_a_field, "vllm.config.LoadConfig has no safetensors_load_strategy"),
        (lose_what_a_constructor_assigns, "FusedMoEMethodBase has no moe, moe_kernel"),
        (want_another_method, "FusedMoEMethodBase.get_shards is abstract, and BitsmoeMoEMethod does not have it"),
        (pass_another_argument, "FusedMoEMethodBase.apply is called with scratch, which BitsmoeMoEMethod has not"),
        (pass_an_argument_less, "QuantizationConfig.get_quant_method is not called with prefix, which BitsmoeConfig"),
        (lose_a_hook, "QuantizationConfig has no get_cache_scale_mapper"),
    ],
)
def test_a_changed_interface_is_named(
    change: Callable[[pytest.MonkeyPatch], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    faults = _compat.interface_faults(own_classes)
    assert any(said in fault for fault in faults), faults


def test_other_errors_keep_their_traceback(vllm: Forks) -> None:
    ended = vllm.run("import bitsmoe_vllm; bitsmoe_vllm.register(); 1 / 0")
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr
    assert "Traceback" in ended.stderr
