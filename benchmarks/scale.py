"""How long and how much memory quantizing a model of real size takes, layer by layer, on synthetic weights.

    python -m benchmarks.scale --model qwen3-30b-a3b --layers 6 --json

Writes a checkpoint with the model's real tensor shapes and random heavy-tailed values into a temporary folder,
quantizes it in a process of its own and prints what that took beside what was predicted before it began. With
--allocation the program over all layers of the whole model is solved too, on random losses; with --gptq its library
quantizes the same model on the same windows, and --device cuda has both on a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import bitsmoe
from benchmarks.baselines.driver import run_baseline, write_windows
from benchmarks.record import commit, gpu_name, gpu_peak, write_json
from bitsmoe_kernels.format.safetensors_io import ShardWriter
from bitsmoe_kernels.format.schema import num_blocks
from bitsmoe_kernels.models.families import kept_tensors, moe_shape
from offline_quant.allocation.solver import allocate
from offline_quant.config import QuantizeConfig
from offline_quant.model.side_files import copy_side_files
from offline_quant.rounding.gaussian import kappa
from offline_quant.runtime.malloc import peak_bytes
from offline_quant.runtime.progress import track

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "examples" / "tiny_moe"
STAGES = ("calibration", "allocation", "original model", "quantization", "write")
"""Of a run, those that come once a layer."""


@dataclass(frozen=True)
class Model:
    """A public model.

    Attributes:
        config: its config.json, but for the number of layers.
        layers: of the whole model that have routed experts.
    """

    config: dict[str, Any]
    layers: int


_QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
    "num_key_value_heads": 4, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "qwen3-30b-a3b": Model(
        _QWEN3 | {"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144,
                  "num_attention_heads": 32},
        48,
    ),
    "qwen3-235b-a22b": Model(
        _QWEN3 | {"hidden_size": 4096, "moe_intermediate_size": 1536, "intermediate_size": 12288,
                  "num_attention_heads": 64},
        94,
    ),
    "deepseek-v3": Model(
        {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "silu",
            "hidden_size": 7168, "moe_intermediate_size": 2048, "intermediate_size": 18432, "n_routed_experts": 256,
            "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
            "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_attention_heads": 128,
            "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840,
            "tie_word_embeddings": False,
            "first_k_dense_replace": 0,  # 3 in the model; here every layer shall have experts
        },
        58,
    ),
    "mixtral-8x7b": Model(
        {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        },
        32,
    ),
    "rehearsal": Model(
        _QWEN3 | {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "num_attention_heads": 2,
                  "head_dim": 32, "num_key_value_heads": 1, "num_experts": 8, "num_experts_per_tok": 2,
                  "vocab_size": 4096, "max_position_embeddings": 512},
        4,
    ),
}  # fmt: skip
"""Sizes from the config.json of Qwen/Qwen3-30B-A3B, Qwen/Qwen3-235B-A22B, deepseek-ai/DeepSeek-V3 and
mistralai/Mixtral-8x7B-v0.1."""


def heavy_tailed(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Normal values whose columns differ in strength by a log-normal factor, bfloat16."""
    columns = torch.randn(shape[-1], generator=generator).mul_(0.7).exp_()
    return torch.randn(*shape, generator=generator).mul_(columns * shape[-1] ** -0.5).bfloat16()


def write_model(name: str, layers: int, directory: Path, experts: int | None = None, seed: int = 0) -> dict[str, Any]:
    """A checkpoint of the model's shapes with so many layers, and experts; returns its config."""
    config = {**MODELS[name].config, "num_hidden_layers": layers}
    if experts is not None:
        key = next(k for k in ("num_experts", "n_routed_experts", "num_local_experts") if k in config)
        config[key] = experts
        if "n_group" in config:  # routing looks for the two best experts of a group
            config["n_group"] = min(config["n_group"], experts // 2)
            config["topk_group"] = min(config["topk_group"], config["n_group"])
    shape = moe_shape(config, name)
    with torch.device("meta"):
        plain = {k: v for k, v in config.items() if k != "model_type"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **plain))
    generator = torch.Generator().manual_seed(seed)
    writer = ShardWriter(directory, 1 << 30)
    H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
    for layer in track(list(shape.layers), "Writing weights"):
        for e in range(shape.num_experts):
            for tensor, size in zip(shape.expert_names(layer, e), ((I, H), (I, H), (H, I)), strict=True):
                writer.add(tensor, heavy_tailed(*size, generator=generator))
    for module_name, tensor in kept_tensors(model):
        stored = shape.family.stored_name(module_name)
        if shape.is_expert_tensor(stored):
            continue
        value = heavy_tailed(*tensor.shape, generator=generator) if tensor.ndim > 1 else torch.ones(tensor.shape)
        writer.add(stored, value.to(torch.float32 if "e_score" in stored else torch.bfloat16))
    writer.finish()
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    copy_side_files(TOKENIZER, directory)
    return config


def write_text(path: Path, words: int, seed: int = 0) -> None:
    """Words of this repository's README in random order."""
    known = (ROOT / "README.md").read_text(encoding="utf-8").split()
    picked = torch.randint(len(known), (words,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(known[i] for i in picked.tolist()), encoding="utf-8")


def quantize(directory: Path, scratch: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Figures of one run; in this process, whose peak of memory it takes."""
    start = time.monotonic()
    result = bitsmoe.quantize(directory, scratch / "out", **options)
    return {
        "peak_rss": max(result.peak_bytes.values()),
        "predicted_peak": result.memory.peak,
        "calibration_state": result.memory.calibration_state,
        "predicted_disk": result.memory.disk,
        "stages": result.seconds,
        "peaks": result.peak_bytes,
        "seconds": time.monotonic() - start,
        "bpw": result.report.bpw,
        "basis": [layer.basis for layer in result.report.layers],
        "calibration_tokens": result.report.calibration_tokens,
        **gpu_peak(),
    }


def solve(name: str, bits: float) -> dict[str, Any]:
    """The program over all layers of the whole model, blocks of 16 components, on log-normal losses."""
    model, config = MODELS[name], QuantizeConfig(bits=bits)
    shape = moe_shape({**model.config, "num_hidden_layers": model.layers}, name)
    H, I, G = shape.hidden_size, shape.intermediate_size, config.block_size  # noqa: E741
    rows = np.repeat(np.array([2 * I * G, H * G], dtype=np.int64), [num_blocks(H, G), num_blocks(I, G)])
    features = np.tile(rows, shape.num_experts * len(shape.layers))
    widths = np.array(config.widths, dtype=np.int64)
    generator = np.random.default_rng(0)
    loss = np.exp(1.5 * generator.standard_normal(len(features)))[:, None] * np.array([kappa(int(b)) for b in widths])
    cost = features[:, None] * widths
    start = time.monotonic()
    found = allocate(loss, cost, int(bits * shape.num_weights))
    return {
        "units": len(features), "seconds": time.monotonic() - start, "gap": found.gap, "peak_rss": peak_bytes(),
        "budget_used": found.cost / (bits * shape.num_weights),
    }  # fmt: skip


def _apart(*arguments: str) -> dict[str, Any]:
    """What this program prints with other arguments, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", *arguments]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as the `bitsmoe` command has it
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _gptq(directory: Path, scratch: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Figures of GPTQ's library on the same windows, at 2 bits."""
    windows = scratch / "windows.safetensors"
    write_windows(directory, options["calib"], windows, options["calib_samples"], options["calib_length"])
    return run_baseline("gptq", directory, windows, 2, scratch / "gptq", options["device"])


def _figures(
    args: argparse.Namespace, config: dict[str, Any], options: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """What a run took, beside what was predicted and the sizes of a layer."""
    shape = moe_shape(config, args.model)
    layer_bytes = 2 * shape.num_weights // len(shape.layers)
    per_layer = sum(run["stages"].get(stage, 0.0) for stage in STAGES) / args.layers
    return {
        "model": args.model, "layers": args.layers, "experts": shape.num_experts,
        "options": options | {"calib": "words of the README"},
        "peak_rss": run["peak_rss"], "predicted_peak": run["predicted_peak"],
        "peak_over_predicted": run["peak_rss"] / run["predicted_peak"],
        "calibration_state": run["calibration_state"], "layer_bf16_bytes": layer_bytes,
        "peak_over_layer": (run["peak_rss"] - run["calibration_state"]) / layer_bytes,
        "seconds_per_layer": per_layer,
        "projected_hours": None if args.experts else per_layer * MODELS[args.model].layers / 3600,
        "run": run, "threads": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__, "commit": commit(), **gpu_name(args.device),
    }  # fmt: skip


def measure(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Everything that was asked for."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        directory = Path(folder) / args.model
        directory.mkdir()
        config = write_model(args.model, args.layers, directory, args.experts)
        text = Path(folder) / "calib.txt"
        write_text(text, args.calib_samples * args.calib_length)
        options = {
            "device": args.device, **options, "calib": str(text), "calib_samples": args.calib_samples,
            "calib_length": args.calib_length, "bits": args.bits,
        }  # fmt: skip
        result = _figures(args, config, options, _apart("--child", json.dumps([str(directory), folder, options])))
        if args.gptq:
            if args.out:
                write_json(args.out, result)  # the library takes longer, and may fail
            gptq = _gptq(directory, Path(folder), options)
            result["gptq"] = gptq | {"seconds_per_layer": gptq["seconds"] / args.layers}
            result["gptq_over_ours"] = result["gptq"]["seconds_per_layer"] / result["seconds_per_layer"]
    if args.allocation:
        result["allocation"] = _apart("--solve", json.dumps([args.model, args.bits]))
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, help="fewer than the model has; figures then are of a smaller layer")
    parser.add_argument("--bits", type=float, default=2.125)
    parser.add_argument("--calib-samples", type=int, default=32)
    parser.add_argument("--calib-length", type=int, default=2048)
    parser.add_argument("--options", type=json.loads, default={}, help='of the quantizer, as JSON: {"refine": 0}')
    parser.add_argument("--allocation", action="store_true", help="solve the whole model's program as well")
    parser.add_argument("--gptq", action="store_true", help="GPTQ's library on the same model and windows as well")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what quantizes")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes")
    parser.add_argument("--out", type=Path, help="file to write the figures to")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--solve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        directory, folder, options = args.child
        print(json.dumps(quantize(Path(directory), Path(folder), options)))
        return
    if args.solve:
        print(json.dumps(solve(*args.solve)))
        return
    result = measure(args, args.options)
    if args.out:
        write_json(args.out, result)
    if args.json:
        print(json.dumps(result))
        return
    for key in ("peak_rss", "predicted_peak", "calibration_state", "layer_bf16_bytes"):
        print(f"{key:>20}  {result[key] / 1e9:.2f} GB")
    for key in ("peak_over_predicted", "peak_over_layer", "seconds_per_layer", "projected_hours", "gptq_over_ours"):
        if result.get(key) is not None:
            print(f"{key:>20}  {result[key]:.2f}")


if __name__ == "__main__":
    main()
