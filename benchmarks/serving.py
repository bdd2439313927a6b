"""Decoding speed of whole models in vLLM: bitsmoe at 2 bits beside GPTQ at 4 and 16-bit weights, weights made up.

    python -m benchmarks.serving --model qwen3-30b-a3b --batches 1 8 64 --out FILE.json
    python -m benchmarks.serving --model rehearsal --methods bitsmoe 16-bit          # on a CPU

Only config.json is written; vLLM makes the weights up (`--load-format dummy`), of a bitsmoe layer a mixture of 0 to 4
bits. Each method runs in a process of its own, one after another on the same device, prompts and outputs of the same
length. A batch is generated once unmeasured, then --repeats times; what is printed are generated tokens per second of
the median, the time of the prompts included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks.record import ROOT, child_environment, commit, write_json
from benchmarks.scale import MODELS
from bitsmoe_kernels.format.linear_layers import GROUP, DenseBits, DenseConfig, DenseGroup, DenseWeights
from bitsmoe_kernels.format.schema import (
    FORMAT_VERSION,
    QUANT_METHOD,
    Basis,
    CheckpointConfig,
    Layer,
    Projection,
    num_blocks,
)
from bitsmoe_kernels.models.families import moe_shape

BLOCK: Final = 16
FIGURES = "figures.json"
"""What a method's process leaves beside config.json."""
BITSMOE, GPTQ, PLAIN = "bitsmoe", "GPTQ 4-bit g128", "16-bit"
METHODS = (BITSMOE, GPTQ, PLAIN)


def quantization(
    method: str, config: dict[str, Any], bits: float, basis: bool = True, dense_bits: Literal[4, 8, 16] = 16
) -> dict[str, Any] | None:
    """`quantization_config` of a method.

    Args:
        method: of METHODS.
        config: config.json of the model.
        bits: average code width of bitsmoe.
        basis: whether gate and up of bitsmoe share a basis of full rank at 8 bits.
        dense_bits: of bitsmoe's linear layers outside the experts.
    """
    if method == PLAIN:
        return None
    if method == GPTQ:
        # Attention and router stay at 16 bits, as bitsmoe leaves them.
        return {
            "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False,
            "dynamic": {"-:.*self_attn.*": {}, r"-:.*\.gate$": {}},
        }  # fmt: skip
    shape = moe_shape(config, "config.json")
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    layer = Layer(
        num_experts=E, hidden_size=H, intermediate_size=I,
        projections={
            "gate_up": Projection(
                code_rows=round(bits * E * num_blocks(H, BLOCK)), order="expert",
                basis=Basis(rank=H, bits=8) if basis else None,
            ),
            "down": Projection(code_rows=round(bits * E * num_blocks(I, BLOCK))),
        },
    )  # fmt: skip
    draft = CheckpointConfig(
        quant_method=QUANT_METHOD, format_version=FORMAT_VERSION, block_size=BLOCK, bpw=0.0,
        layers={shape.prefix(i): layer for i in shape.layers}, tool_version="benchmark",
        linear_quantization=None if dense_bits == 16 else dense_quantization(config, dense_bits),
    )  # fmt: skip
    return draft.model_copy(update={"bpw": draft.all_in_bpw()}).dump()


def dense_quantization(config: dict[str, Any], bits: DenseBits) -> dict[str, Any]:
    """`linear_quantization` of a model whose attention and output layer have sizes divisible by 128."""
    attention = (f"model.layers.{i}.self_attn.{p}_proj" for i in range(config["num_hidden_layers"]) for p in "qkvo")
    group = DenseGroup(
        targets=("lm_head", *attention), weights=DenseWeights(num_bits=bits, strategy="group", group_size=GROUP)
    )
    dense = DenseConfig(quant_method="compressed-tensors", format="pack-quantized", config_groups={"group": group})
    return dense.dump()


def generate(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of one model; in this process."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    began = time.monotonic()
    # No tokenizer: prompts are numbers, and so is what comes back.
    model = LLM(
        str(directory), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=args.eager,
        max_model_len=args.input + args.output, max_num_seqs=max(args.batches), enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    started = time.monotonic() - began
    vocabulary = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True, detokenize=False)
    rates = {}
    for batch in args.batches:
        seconds = []
        for _ in range(1 + args.repeats):
            ids = torch.randint(vocabulary, (batch, args.input), generator=generator).tolist()
            prompts = [TokensPrompt(prompt_token_ids=row) for row in ids]
            before = time.monotonic()
            found = model.generate(prompts, sampling, use_tqdm=False)
            seconds.append(time.monotonic() - before)
            assert all(len(f.outputs[0].token_ids) == args.output for f in found)
        rates[str(batch)] = batch * args.output / statistics.median(seconds[1:])
    return {"tokens_per_second": rates, "start_seconds": started}


def _apart(method: str, directory: Path, arguments: list[str]) -> dict[str, Any]:
    """The figures of one method, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.serving", *arguments, "--child", str(directory)]
    env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **child_environment()}
    print(f"{method}: starts", file=sys.stderr, flush=True)
    # vLLM logs to standard output.
    status = subprocess.run(command, cwd=ROOT, env=env, stdout=sys.stderr, check=False).returncode
    figures = directory / FIGURES
    return json.loads(figures.read_text(encoding="utf-8")) if status == 0 else {"failed": f"status {status}"}


def measure(args: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """All methods; the file is written after each."""
    import torch
    import vllm

    config = {**MODELS[args.model].config, "num_hidden_layers": args.layers or MODELS[args.model].layers}
    result: dict[str, Any] = {
        "model": args.model, "layers": config["num_hidden_layers"], "input": args.input, "output": args.output,
        "bits": args.bits, "weights": "made up",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "vllm": vllm.__version__, "torch": torch.__version__, "commit": commit(), "methods": {},
    }  # fmt: skip
    for method in args.methods:
        found = quantization(method, config, args.bits)
        with tempfile.TemporaryDirectory() as folder:
            written = config | {"torch_dtype": "bfloat16"} | ({} if found is None else {"quantization_config": found})
            (Path(folder) / "config.json").write_text(json.dumps(written), encoding="utf-8")
            figures = _apart(method, Path(folder), arguments)
        if found is not None and method == BITSMOE:
            figures["bpw"] = found["bpw"]
        result["methods"][method] = figures
        if args.out:
            write_json(args.out, result)
    return result


def as_text(result: dict[str, Any]) -> str:
    """Tokens per second, and bitsmoe's over the others'."""
    ours = result["methods"].get(BITSMOE, {}).get("tokens_per_second", {})
    lines = [
        f"{result['model']}, {result['layers']} layers, {result['device']}, vLLM {result['vllm']}; tokens per second"
    ]
    for method, found in result["methods"].items():
        rates = found.get("tokens_per_second")
        if rates is None:
            lines.append(f"  {method}: {found['failed']}")
            continue
        shown = (
            f"batch {batch}: {rate:.1f}"
            + (f" (bitsmoe {ours[batch] / rate:.2f}x)" if method != BITSMOE and batch in ours else "")
            for batch, rate in rates.items()
        )
        lines.append(f"  {method}: " + ", ".join(shown))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[BITSMOE, GPTQ])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--bits", type=float, default=2.0, help="average code width of bitsmoe")
    parser.add_argument("--input", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens generated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without compilation and graphs")
    parser.add_argument("--out", type=Path, help="file to write the figures to")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        write_json(args.child / FIGURES, generate(args.child, args))
        return
    result = measure(args, sys.argv[1:])
    print(as_text(result))
    if any("failed" in found for found in result["methods"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
