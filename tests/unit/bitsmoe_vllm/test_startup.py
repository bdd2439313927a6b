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
from bitsmoe_vllm import _compat, startup
from bitsmoe_vllm import options as options_module
from builders import build_form, make_config, vllm_config, write_tiny_qwen3_moe
from vllm_layer import route_by_softmax

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


def options(enforce_eager: bool = False, **parallel: Any) -> SimpleNamespace:
    asked = vllm_config(**parallel)
    asked.model_config.enforce_eager = enforce_eager
    return asked


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
        device_type="cuda",
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
    asked.model_config.enforce_eager, asked.model_config.dtype = eager, dtype
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
        ({}, {"enable_eplb": True}, "--enable-eplb: .* drop the option"),
        ({}, {"enable_elastic_ep": True}, "--enable-elastic-ep: .* drop the option"),
        ({}, {"all2all_backend": "deepep_low_latency"}, "--all2all-backend deepep_.* use allgather_reducescatter, the"),
        ({}, {"tensor_parallel_size": 3, "enable_expert_parallel": True}, "sizes that work: 1, 2, 4, 8$"),
        ({}, {"pipeline_parallel_size": 4}, "--pipeline-parallel-size 4: .* 3 layers.* use at most 3"),
        (
            {},
            {"distributed_executor_backend": "ray"},
            "-executor-backend ray: .* on CPUs; drop the option",
        ),
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


def load_format(name: str) -> dict[str, Any]:
    return {"load_config": SimpleNamespace(load_format=name, safetensors_load_strategy=None)}


def offload(gigabytes: float = 0, group: int = 0) -> dict[str, Any]:
    uva, prefetch = SimpleNamespace(cpu_offload_gb=gigabytes), SimpleNamespace(offload_group_size=group)
    return {"offload_config": SimpleNamespace(uva=uva, prefetch=prefetch)}


def lora(*targets: str) -> dict[str, Any]:
    return {"lora_config": SimpleNamespace(target_modules=list(targets) or None)}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lora(), "^--enable-lora: .*--lora-target-modules q_proj k_proj v_proj o_proj$"),
        (lora("q_proj", "experts"), "^--enable-lora --lora-target-modules experts: .* without experts"),
        (lora("experts.0.gate_proj"), "--lora-target-modules experts.0.gate_proj: "),
        (lora("q_proj", "shared_experts.down_proj", "down_proj"), None),
        (load_format("hf"), None),
        (load_format("safetensors"), None),
        (load_format("sharded_state"), "--load-format sharded_state: .* drop the option"),
        (load_format("tensorizer"), "--load-format tensorizer: .* drop the option"),
        (load_format("runai_streamer_sharded"), "--load-format runai_streamer_sharded: .* drop the option"),
        (load_format("pt"), "--load-format pt: it does not read the checkpoint's safetensors; drop"),
        (load_format("fastsafetensors"), "--load-format fastsafetensors: .* CUDA devices only"),
        (load_format("instanttensor"), "--load-format instanttensor: .* CUDA devices only"),
        (load_format("runai_streamer"), "--load-format runai_streamer: .* pip install runai-model-streamer$"),
        (load_format("a_plugin_of_somebody_else"), None),
        (
            {"load_config": SimpleNamespace(load_format="auto", safetensors_load_strategy="torchao")},
            "--safetensors-load-strategy torchao: .* use lazy, eager or prefetch",
        ),
        (offload(gigabytes=1.5), "--cpu-offload-gb 1.5: .* drop the option"),
        (offload(group=4), "--offload-group-size 4: .* drop the option"),
        (
            {"kernel_config": SimpleNamespace(moe_backend="flashinfer_moe_ep_cutedsl")},
            "--moe-backend flashinfer_moe_ep",
        ),
        ({"kernel_config": SimpleNamespace(moe_backend="deep_gemm_mega_moe")}, "--moe-backend deep_gemm_mega_moe: "),
    ],
)
def test_other_options(checkpoint: CheckpointConfig, changed: dict[str, Any], said: str | None) -> None:
    asked = options()
    vars(asked).update(changed)
    if said is None:
        startup.check_options(checkpoint, TEXT, asked)
    else:
        with pytest.raises(BitsmoeError, match=said) as caught:
            startup.check_options(checkpoint, TEXT, asked)
        assert len(str(caught.value).splitlines()) == 1


def test_fast_load_formats_work_on_a_gpu_with_their_package(
    checkpoint: CheckpointConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch, 90)
    asked = options()
    for name, package in options_module.PACKAGES.items():
        vars(asked).update(load_format(name))
        monkeypatch.setitem(options_module.PACKAGES, name, "a_package_that_is_not_there")
        with pytest.raises(BitsmoeError, match=f"--load-format {name}: .* pip install a-package-that-is-not-there"):
            startup.check_options(checkpoint, TEXT, asked)
        monkeypatch.setitem(options_module.PACKAGES, name, "torch")
        startup.check_options(checkpoint, TEXT, asked)
        assert package


def test_a_moe_backend_is_said_to_be_unused(checkpoint: CheckpointConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(_compat, "warn_once", lambda message, *args: said.append(message % args))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    asked = options()
    startup.check_options(checkpoint, TEXT, asked)
    assert said == []
    asked.kernel_config.moe_backend = "marlin"
    startup.check_options(checkpoint, TEXT, asked)
    assert said == ["--moe-backend marlin: the quantized experts have kernels of their own and do not use it"]


def test_batch_invariance_is_not_promised(checkpoint: CheckpointConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(BitsmoeError, match=r"VLLM_BATCH_INVARIANT: .* unset it"):
        startup.check_options(checkpoint, TEXT, options())


@pytest.mark.slow
def test_experts_are_not_quantized_anew(checkpoint: CheckpointConfig) -> None:
    from vllm.config.quantization import QuantizationConfigArgs

    asked = options()
    asked.model_config.quantization_config = QuantizationConfigArgs(linear="fp8_per_tensor")
    startup.check_options(checkpoint, TEXT, asked)
    for more in ({"moe": "fp8_per_tensor"}, {"targets": {"re:.*experts": "fp8_per_tensor"}}):
        asked.model_config.quantization_config = QuantizationConfigArgs(**more)
        with pytest.raises(BitsmoeError, match="--quantization-config: the experts are quantized already"):
            startup.check_options(checkpoint, TEXT, asked)


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


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("NewMoeForCausalLM", "nobody has tested this architecture"),
        ("DeepseekV4ForCausalLM", "takes no expert tensors"),
    ],
)
def test_a_checkpoint_that_vllm_is_not_known_to_serve(architecture: str, said: str, tmp_path: Path) -> None:
    write_tiny_qwen3_moe(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitsmoeError, match=rf"not known to serve \['{architecture}'\]: .*{said}"):
        startup.check_checkpoint(tmp_path, PreTrainedConfig())


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


def test_weights_in_object_storage_are_not_looked_for_beside_the_small_files(tmp_path: Path) -> None:
    """vLLM copies the JSON files of s3://bucket/model into a directory, and goes on with that as the model."""
    write_tiny_qwen3_moe(tmp_path / "whole")
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    assert startup.local_directory(str(small), None, "s3://bucket/model") is None
    assert startup.local_directory(str(small), None, str(tmp_path / "whole")) == tmp_path / "whole"


def test_a_config_of_foreign_code_does_not_change_what_the_file_must_hold(tmp_path: Path) -> None:
    """With --trust-remote-code vLLM reads config.json by a class that transformers' own models do not know."""
    from safetensors.torch import load_file, save_file

    write_tiny_qwen3_moe(tmp_path)

    class RemoteConfig(PreTrainedConfig):
        model_type = "qwen3_moe"

    config = RemoteConfig(
        **json.loads((tmp_path / "config.json").read_text()), auto_map={"AutoConfig": "x.RemoteConfig"}
    )
    startup.check_checkpoint(tmp_path, config)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight is missing"):
        startup.check_checkpoint(tmp_path, config)


def with_draft(directory: Path, *names: str) -> Any:
    """A checkpoint with further tensors, and options that draft with it."""
    from safetensors.torch import load_file, save_file

    write_tiny_qwen3_moe(directory)
    tensors = load_file(directory / "model.safetensors") | {name: torch.zeros(2, 2) for name in names}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    asked = options()
    asked.model_config.model = str(directory)
    asked.speculative_config = SimpleNamespace(method="mtp", draft_model_config=asked.model_config)
    return asked


def test_drafting_needs_a_layer_for_it(tmp_path: Path) -> None:
    asked = with_draft(tmp_path)
    with pytest.raises(BitsmoeError, match=r"method mtp: .* \(no tensor mtp\.\* or model\.layers\.2\.\*\); drop"):
        startup.check_checkpoint(tmp_path, None, asked)
    asked.speculative_config.draft_model_config = SimpleNamespace(model="another")
    startup.check_checkpoint(tmp_path, None, asked)


DRAFTS = ("model.layers.2.mlp.experts", "mtp.layers.0.mlp.experts")


def routed_experts(prefix: str, config: Any) -> Any:
    """The method for a layer of that name, without the layer."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace()
    route_by_softmax(layer)
    return config.get_quant_method(layer, prefix)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["0.gate_proj.weight", "gate_up_proj"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_experts_stored_plainly_are_vllms_own(draft: str, stored: str, tmp_path: Path) -> None:
    from bitsmoe_vllm.config import BitsmoeConfig

    asked = with_draft(tmp_path, f"{draft}.{stored}", f"{draft.removesuffix('experts')}shared_experts.up_proj.weight")
    checkpoint = startup.check_checkpoint(tmp_path, None, asked)
    config = BitsmoeConfig(checkpoint.config.dump())
    config._options_checked = True
    config.plain_experts = startup.plain_experts(checkpoint)
    assert config.plain_experts == {draft}
    assert routed_experts(draft, config) is None
    for described in ("model.layers.1.mlp.experts", "draft_model.model.layers.1.mlp.experts"):
        assert routed_experts(described, config).schema == checkpoint.config.layers["model.layers.1.mlp.experts"]
    (other,) = set(DRAFTS) - {draft}
    with pytest.raises(BitsmoeError, match=f"routed experts at {other}, .* does not hold them at 16 bits either"):
        routed_experts(other, config)


@pytest.mark.parametrize(
    ("prefix", "plain"),
    [*((draft, True) for draft in DRAFTS), ("model.layers.1.mlp.experts", False), ("vision.experts", False)],
)
def test_before_the_checkpoint_is_here_only_draft_layers_are_taken_for_plain(
    prefix: str, plain: bool, checkpoint: CheckpointConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsmoe_vllm.config import BitsmoeConfig

    config = BitsmoeConfig(checkpoint.dump())
    config.maybe_update_config("owner/not-on-this-machine", PreTrainedConfig(**SIZES | {"num_hidden_layers": 2}))
    import vllm.config

    monkeypatch.setattr(vllm.config, "get_current_vllm_config", options)
    if plain:
        assert routed_experts(prefix, config) is None
    else:
        with pytest.raises(BitsmoeError, match="quantize the whole model"):
            routed_experts(prefix, config)


def test_workers_refuse_options_that_the_main_process_was_not_shown(
    checkpoint: CheckpointConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.config

    from bitsmoe_vllm.config import BitsmoeConfig

    monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda: options(enable_eplb=True))
    with pytest.raises(BitsmoeError, match="--enable-eplb"):
        routed_experts(PREFIX, BitsmoeConfig(checkpoint.dump()))


def test_vllm_shows_its_configuration_and_calls_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models import config as models

    called = []

    class Known(models.VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            called.append(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            called.append(model_config)

    entries: dict[str, Any] = {"KnownForCausalLM": Known}
    monkeypatch.setattr(models, "MODELS_CONFIG_MAP", entries)
    for _ in range(2):
        _compat.watch_configs(["KnownForCausalLM", "OtherForCausalLM"])
    assert {"OtherForCausalLM", "Qwen3MoeForCausalLM", "TransformersMoEForCausalLM"} < entries.keys()

    class Shown:
        def __init__(self) -> None:
            self.model_config = SimpleNamespace(hf_config=PreTrainedConfig())

    for architecture in ("KnownForCausalLM", "OtherForCausalLM"):
        shown = Shown()
        entries[architecture].verify_and_update_model_config(shown.model_config)
        entries[architecture].verify_and_update_config(shown)
        assert _compat.config_under_construction(shown.model_config.hf_config) is shown
        # Equal, but of another model: a draft's, for example.
        assert _compat.config_under_construction(PreTrainedConfig()) is None
        assert called == ([shown.model_config, shown] if architecture == "KnownForCausalLM" else [])
        called.clear()
    hf_config = shown.model_config.hf_config
    del shown
    assert _compat.config_under_construction(hf_config) is None


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


@pytest.mark.parametrize(
    ("stored", "served"),
    [
        ("model.language_model.layers.0.mlp.experts", "language_model.model.layers.0.mlp.experts"),
        ("model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"),
    ],
    ids=["a model of several parts", "MiniMax-M2"],
)
def test_experts_that_vllm_calls_otherwise(stored: str, served: str) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    from bitsmoe_vllm.config import BitsmoeConfig

    made = build_form("natural", num_experts=8, hidden_size=64, intermediate_size=96, block_size=32)
    config = BitsmoeConfig(make_config({stored: made}).dump())
    config._options_checked = True
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."}))
    assert routed_experts(served, config).schema == made.layer
    config.plain_experts = frozenset()
    with pytest.raises(BitsmoeError, match="quantize the whole model"):
        routed_experts(served.replace("layers.0", "layers.1"), config)


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
