"""What the plugin checks in vLLM's main process, without an engine."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from bitsmoe_kernels.errors import BitsmoeError, FormatError
from bitsmoe_kernels.format.schema import CheckpointConfig
from bitsmoe_vllm import startup
from builders import build_form, make_config, write_tiny_qwen3_moe

PREFIX = "model.layers.0.mlp.experts"
SIZES = {
    "hidden_act": "silu", "num_attention_heads": 8, "hidden_size": 64, "moe_intermediate_size": 96,
    "num_hidden_layers": 3,
}  # fmt: skip
TEXT = PreTrainedConfig(**SIZES)


@pytest.fixture(scope="module")
def checkpoint() -> CheckpointConfig:
    """8 experts, 3 blocks of 32 channels."""
    made = build_form("natural", num_experts=8, hidden_size=64, intermediate_size=96, block_size=32)
    return make_config({PREFIX: made})


def options(**parallel: Any) -> SimpleNamespace:
    sizes = {f"{kind}_parallel_size": 1 for kind in ("tensor", "data", "pipeline")}
    defaults = {"enable_eplb": False, "enable_expert_parallel": False, "enforce_eager": False} | sizes
    parallel = defaults | parallel
    return SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=parallel.pop("enforce_eager")),
        parallel_config=SimpleNamespace(**parallel),
    )


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 8, "enable_expert_parallel": True},
        {"tensor_parallel_size": 2, "enforce_eager": True},
        {"pipeline_parallel_size": 3, "tensor_parallel_size": 2},
        {"tensor_parallel_size": 4, "data_parallel_size": 2, "enable_expert_parallel": True},
    ],
)
def test_options_that_work(
    checkpoint: CheckpointConfig, parallel: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(**parallel)
    if "data_parallel_size" in parallel:  # not on a CPU
        on_gpu(monkeypatch, 90)
        asked.model_config.dtype = torch.bfloat16
    startup.check_options(checkpoint, TEXT, asked)


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    import vllm.platforms

    gpu = SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        get_device_capability=lambda: SimpleNamespace(to_int=lambda: capability),
    )
    monkeypatch.setattr(vllm.platforms, "current_platform", gpu)


@pytest.mark.parametrize(
    ("form", "dtype", "capability", "said"),
    [
        ("natural", torch.bfloat16, 90, None),
        ("natural", torch.float16, 80, None),
        ("natural", torch.float32, 90, "activations are float32.* add --enforce-eager"),
        ("natural", torch.bfloat16, 75, "capability 7.5 is below 8.0"),
        ("natural", torch.bfloat16, 100, None),
        ("paper", torch.bfloat16, 90, "components on the output side .--basis paper.*add --enforce-eager"),
    ],
)
@pytest.mark.parametrize("eager", [False, True])
def test_graphs_need_layers_that_the_kernels_can_compute(
    form: str, dtype: torch.dtype, capability: int, said: str | None, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch, capability)
    made = make_config({PREFIX: build_form(form, num_experts=8, hidden_size=64, intermediate_size=96)})
    asked = options()
    asked.model_config = SimpleNamespace(enforce_eager=eager, dtype=dtype)
    if said is None or eager:
        startup.check_options(made, TEXT, asked)
    else:
        with pytest.raises(BitsmoeError, match=said):
            startup.check_options(made, TEXT, asked)


@pytest.mark.parametrize(
    ("text", "parallel", "said"),
    [
        ({}, {"tensor_parallel_size": 4}, "--tensor-parallel-size 4: .* sizes that work: 1, 2 "),
        ({}, {"tensor_parallel_size": 2, "data_parallel_size": 2}, "sizes that work: 1 "),
        ({"num_attention_heads": 5}, {"tensor_parallel_size": 2}, "sizes that work: 1$"),
        ({"moe_intermediate_size": 96}, {"tensor_parallel_size": 8}, r"sizes that work: 1, 2 \(or add --enable-expert"),
        ({}, {"tensor_parallel_size": 16, "enable_expert_parallel": True}, "16 ranks .* 8 experts"),
        ({}, {"enable_eplb": True}, "drop the option"),
        ({}, {"tensor_parallel_size": 3, "enable_expert_parallel": True}, "sizes that work: 1, 2, 4, 8$"),
        ({}, {"pipeline_parallel_size": 4}, "--pipeline-parallel-size 4: .* 3 layers.* use at most 3"),
        ({}, {"pipeline_parallel_size": 2, "enforce_eager": True}, "on a CPU .* drop --enforce-eager"),
        ({}, {"data_parallel_size": 2, "enable_expert_parallel": True}, "--data-parallel-size 2: .* on a CPU; use"),
        ({"hidden_act": "gelu"}, {}, "hidden_act .* 'gelu'"),
    ],
)
def test_options_that_cannot_work(
    checkpoint: CheckpointConfig, text: dict[str, Any], parallel: dict[str, Any], said: str
) -> None:
    with pytest.raises(BitsmoeError, match=said):
        startup.check_options(checkpoint, PreTrainedConfig(**SIZES | text), options(**parallel))


def test_all_option_faults_come_at_once(checkpoint: CheckpointConfig) -> None:
    with pytest.raises(BitsmoeError) as caught:
        startup.check_options(checkpoint, TEXT, options(enable_eplb=True, tensor_parallel_size=4))
    assert len(str(caught.value).splitlines()) == 2


def test_sizes_of_config_json_must_agree(checkpoint: CheckpointConfig) -> None:
    startup.check_model(checkpoint, TEXT)
    other = SimpleNamespace(hidden_size=64, moe_intermediate_size=128, num_experts=16)
    with pytest.raises(FormatError) as caught:
        startup.check_model(checkpoint, other)
    assert caught.value.faults == [
        f"{PREFIX}: num_experts is 8, but config.json says 16",
        f"{PREFIX}: intermediate_size is 96, but config.json says 128",
    ]


def test_a_sound_checkpoint_passes(tmp_path: Path) -> None:
    from transformers import AutoConfig

    write_tiny_qwen3_moe(tmp_path)
    startup.check_checkpoint(tmp_path, AutoConfig.from_pretrained(tmp_path))


def test_a_model_in_the_hub_cache_counts_once_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(model: str, revision: str | None, local_files_only: bool) -> str:
        assert (model, revision, local_files_only) == ("owner/name", "main", True)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    write_tiny_qwen3_moe(tmp_path, max_shard_bytes=200_000)
    assert startup.local_directory("owner/name", "main") == tmp_path
    next(tmp_path.glob("*-of-*.safetensors")).unlink()
    assert startup.local_directory("owner/name", "main") is None
    next(tmp_path.glob("*.index.json")).unlink()
    assert startup.local_directory("owner/name", "main") is None
    assert startup.local_directory(str(tmp_path), None) == tmp_path


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "no quantization_config: make a checkpoint with `bitsmoe quantize"),
        ({"format_version": 1}, "quant_method"),
        ({"linear_quantization": {"quant_method": "fp8"}}, "linear_quantization.quant_method: .*'fp8'"),
    ],
)
def test_a_quantization_config_that_cannot_be_served(
    checkpoint: CheckpointConfig, data: dict[str, Any] | None, said: str
) -> None:
    from bitsmoe_vllm.config import BitsmoeConfig

    if data and "linear_quantization" in data:
        data = json.loads(json.dumps({**checkpoint.dump(), **data}))
    with pytest.raises(BitsmoeError, match=said):
        BitsmoeConfig(data)


def test_the_tensor_names_carried_to_vllms_parameters(checkpoint: CheckpointConfig) -> None:
    from bitsmoe_vllm.config import BitsmoeConfig

    mapper = BitsmoeConfig(checkpoint.dump()).get_cache_scale_mapper()
    specs = list(checkpoint.tensor_specs())
    assert mapper.apply_list(specs) == [n.replace(".experts.", ".experts.routed_experts.") for n in specs]
    others = [f"{PREFIX}.0.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    assert mapper.apply_list(others) == others


def test_the_config_survives_being_sent_to_a_worker(checkpoint: CheckpointConfig) -> None:
    import pickle

    from bitsmoe_vllm.config import BitsmoeConfig

    config = BitsmoeConfig(checkpoint.dump())
    config.loaders.append(object())  # type: ignore[arg-type]
    sent = pickle.loads(pickle.dumps(config))
    assert sent.checkpoint == checkpoint
    assert sent.loaders == []


def test_local_experts_follow_the_map_and_not_a_placement() -> None:
    from bitsmoe_vllm.moe_method import local_experts

    assert local_experts(None) is None
    assert local_experts(torch.tensor([-1, 1, -1, 0, 2], dtype=torch.int32)) == [3, 1, 4]
    assert local_experts(torch.tensor([-1, -1], dtype=torch.int32)) == []
