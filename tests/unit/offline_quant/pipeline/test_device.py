"""`--device cuda` without one: on a pretended device, every operation must find its operands in one place."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitsmoe_kernels.sharding import shard_layer
from bitsmoe_vllm.weight_loading import LayerLoader
from builders import FORMS, build_form
from families import make_model
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation.evaluate import Reference, evaluate
from offline_quant.layer.context import LayerContext
from offline_quant.pipeline import moe_layer
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.rounding import tuning as tune
from offline_quant.rounding.backends import select
from offline_quant.rounding.backends.torch_reference import TorchRounding
from offline_quant.rounding.error_feedback import RoundingMode, quantize
from offline_quant.runtime.chunks import chunks_of, gpu_share
from offline_quant.runtime.distributed import Workers
from offline_quant.runtime.offload import OffloadCache
from pretended_cuda import pretended_cuda

pytestmark = pytest.mark.slow

TEXT = "She opened the door, and there stood her brother with the lamp in his hand. " * 40
QUICK = {"bits": 4.5, "calib_samples": 3, "calib_length": 48, "refine": 1}
SAME_BYTES: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3MoeForCausalLM", {}),
    ("Qwen3MoeForCausalLM", {"objective": "uniform", "feedback": False, "without": ["correction", "trim"]}),
    ("DeepseekV3ForCausalLM", {}),
]
SAME_BYTES_NIGHTLY: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3MoeForCausalLM", {"basis": "paper"}),
    ("Qwen3MoeForCausalLM", {"objective": "bt-moe", "refine": 0, "widths": (2, 4)}),
    ("Qwen3MoeForCausalLM", {"objective": "alphaq"}),
    ("Qwen3MoeForCausalLM", {"calib": "self"}),
    ("Qwen2MoeForCausalLM", {"dense_bits": 4}),
    ("Qwen3NextForCausalLM", {}),
    ("AfmoeForCausalLM", {}),
]


@pytest.fixture(autouse=True)
def torch_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of the pretended device would run in Triton's interpreter, and those of the CPU add in another order.

    `rounding/test_backends.py` has a device with its kernels.
    """
    monkeypatch.setattr(select, "backend_of", lambda tensor: TorchRounding())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device")
    (path / "calib.txt").write_text(TEXT)
    return path


def model(folder: Path, architecture: str) -> Path:
    path = folder / architecture
    return path if path.exists() else make_model(architecture, path)


def options(folder: Path, device: str, **changed: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"calib": str(folder / "calib.txt"), **QUICK, **changed, "device": device})


def quantized(folder: Path, source: Path, out: Path, device: str, **changed: Any) -> dict[str, bytes]:
    quantize_model(str(source), out, options(folder, device, **changed))
    return {name: (out / name).read_bytes() for name in ("model.safetensors", "config.json")}


@pytest.mark.parametrize(
    ("architecture", "changed"),
    [*SAME_BYTES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in SAME_BYTES_NIGHTLY)],
)
def test_a_checkpoint_is_that_of_a_cpu(
    folder: Path, tmp_path: Path, architecture: str, changed: dict[str, Any]
) -> None:
    source = model(folder, architecture)
    with sdpa_kernel(SDPBackend.MATH):
        expected = quantized(folder, source, tmp_path / "cpu", "cpu", **changed)
    with pretended_cuda():
        assert quantized(folder, source, tmp_path / "cuda", "cuda", **changed) == expected


def test_gradients_too_stay_on_the_device(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of sensitivities and of tuning; they are ones there, so the checkpoint is another."""
    monkeypatch.setattr(tune, "STEPS", 2)
    changed = {"tune": True, "budget": "model", "token_weights": "model"}
    with pretended_cuda():
        assert quantized(folder, model(folder, "Qwen3MoeForCausalLM"), tmp_path / "cuda", "cuda", **changed)


def test_evaluation(folder: Path, tmp_path: Path) -> None:
    source, text = model(folder, "Qwen3MoeForCausalLM"), folder / "calib.txt"
    with sdpa_kernel(SDPBackend.MATH):
        quantized(folder, source, tmp_path / "q", "cpu")
        expected = evaluate(tmp_path / "q", text, source)
    with pretended_cuda():
        assert evaluate(tmp_path / "q", text, source, "cuda") == expected
        assert Reference(source, text, "cuda").evaluate(tmp_path / "q") == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", [{}, {"tp_rank": 1, "tp_size": 2}, {"experts": (3, 0)}])
def test_a_rank_is_loaded_from_tensors_of_the_device(form: str, part: dict[str, Any]) -> None:
    """Some of vLLM's load formats bring them there by themselves."""
    made = build_form(form)
    layer, expected = shard_layer(made.layer, made.tensors, made.block_size, **part)
    with pretended_cuda():
        loader, module = LayerLoader("experts", made.layer, made.block_size, **part), torch.nn.Module()
        with torch.device("cuda"):
            loader.register(module)
        for name, tensor in made.tensors.items():
            loader.receive(name, tensor.cuda())
        assert loader.shard == layer
        got = dict(module.named_parameters())
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].is_cuda
            assert torch.equal(got[name].cpu(), tensor)


def chunks(device: str, experts: int = 128, hidden: int = 2048, intermediate: int = 768) -> list[int]:
    return [len(chunk) for chunk in chunks_of(experts, hidden, intermediate, gpu_share(torch.device(device)))]


def test_a_gpu_takes_many_experts_at_once() -> None:
    """A row costs as many launches for one expert as for many."""
    assert set(chunks("cpu")) == {2, 3}
    with pretended_cuda(memory=80_000_000_000):
        assert chunks("cuda") == [64, 64]
        assert chunks("cuda", experts=72) == [36, 36]
        assert chunks("cuda", experts=256, hidden=7168, intermediate=2048) == [13] * 19 + [9]
    with pretended_cuda(memory=24_000_000_000):
        assert chunks("cuda") == [32] * 4
    with pretended_cuda(memory=1_000_000_000):
        assert chunks("cuda") == [1] * 128


def test_processes_cut_by_the_smallest_of_their_gpus(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Beside(Workers):
        def smallest(self, value: int) -> int:
            return min(value, 1 << 10)

    class SeenError(Exception):
        pass

    def look(ctx: LayerContext) -> None:
        raise SeenError([len(chunk) for chunk in ctx.chunks])

    source = model(folder, "Qwen3MoeForCausalLM")
    monkeypatch.setattr(moe_layer, "measure_layer", look)
    config = QuantizeConfig.model_validate(QUICK | {"calib": str(folder / "calib.txt"), "device": "cuda"})
    for workers, cut in ((Workers(), [8]), (Beside(), [1] * 8)):
        with pretended_cuda(), pytest.raises(SeenError, match=re.escape(str(cut))):
            quantize_model(str(source), tmp_path / "q", config, workers=workers)


@pytest.mark.parametrize("experts", [16, 64])
def test_launches_grow_with_rows_and_not_with_experts(experts: int) -> None:
    """Rounding with feedback, two rounds of refinement; docs/gpu.md draws on it."""
    K, N = 48, 24
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(experts, 4 * K, K, generator=gen)
    width = torch.randint(0, 5, (experts, K), generator=gen, dtype=torch.uint8)
    with pretended_cuda() as launches:
        given = [t.to("cuda") for t in (torch.randn(experts, K, N, generator=gen), x.mT @ x, width)]
        before = launches()
        quantize(*given, "K")
        assert 100 * K < launches() - before < 200 * K


def test_without_feedback_all_rows_are_rounded_at_once() -> None:
    gen = torch.Generator().manual_seed(0)
    F, x = torch.randn(16, 256, 64, generator=gen), torch.randn(16, 512, 256, generator=gen)
    width = torch.randint(0, 5, (16, 256), generator=gen, dtype=torch.uint8)
    expected = quantize(F, x.mT @ x, width, "K", RoundingMode(refine=0, feedback=False))
    with pretended_cuda() as launches:
        given = [t.to("cuda") for t in (F, x.mT @ x, width)]
        before = launches()
        found = quantize(*given, "K", RoundingMode(refine=0, feedback=False))
        assert launches() - before < 500
        assert torch.equal(found.codes.cpu(), expected.codes)


def test_what_is_kept_between_passes_stays_on_a_gpu_while_there_is_room(tmp_path: Path) -> None:
    with pretended_cuda():
        offload = OffloadCache(tmp_path, memory_bytes=40, device_bytes=50)
        values = {name: torch.full((10,), float(i), device="cuda") for i, name in enumerate("abc")}
        for name, value in values.items():
            offload.put(name, value)
        assert [offload.get(name).is_cuda for name in "abc"] == [True, False, False]
        assert [path.name for path in tmp_path.rglob("c")] == ["c"]
        assert all(torch.equal(offload.get(name).cpu(), values[name].cpu()) for name in "abc")
        offload.drop("a")
        offload.put("d", values["b"])
        assert offload.get("d").is_cuda
        offload.put("e", torch.ones(10))  # not on the device
        assert not offload.get("e").is_cuda
        offload.clear()
    assert not any(tmp_path.iterdir())


def test_the_pretended_device_refuses_what_a_real_one_refuses() -> None:
    with pretended_cuda():
        here, there = torch.ones(3, device="cuda"), torch.ones(3)
        assert here.is_cuda
        assert torch.equal((here + here.to("cuda")).cpu(), 2 * there)
        assert (here + torch.tensor(1.0)).is_cuda  # a number
        assert here[torch.tensor([0, 2])].shape == (2,)
        for wrong in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: there.add_(here),
            lambda: there[torch.tensor([0], device="cuda")],
            lambda: here.index_select(0, torch.tensor([0])),
            lambda: torch.stack([here, there]),
        ):
            with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
                wrong()
        with pytest.raises(RuntimeError):
            here.numpy()
