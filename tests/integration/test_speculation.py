"""Speculative decoding with a quantized model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitsmoe_kernels.format.safetensors_io import read_json
from families import make_model
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.config import QuantizeConfig
from offline_quant.pipeline.quantize import quantize_model
from vllm_processes import Generator

TOKENS = 48
# Several prompts: greedy answers of so small a model run in circles, and a draft may miss all of one.
PROMPTS = [[(7 * i + 31 * start) % 4000 + 1 for i in range(12 + start)] for start in range(0, 40, 5)]
WORDS = 6
"""Tokens that the model ever generates: so few that a draft of random weights often meets the right one."""
PREDICT = {"method": "mtp", "num_speculative_tokens": 1}


def add_prediction_layer(directory: Path) -> None:
    """Give a GLM-4.5 a layer for multi-token prediction: a copy of its last one, and the projection into it."""
    config = read_json(directory / "config.json")
    layers, H = config["num_hidden_layers"], config["hidden_size"]
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"][WORDS:] = 0
    last, added = (f"model.layers.{i}." for i in (layers - 1, layers))
    tensors |= {name.replace(last, added): tensor for name, tensor in tensors.items() if name.startswith(last)}
    gen = torch.Generator().manual_seed(1)
    dtype = tensors["lm_head.weight"].dtype
    parts: dict[str, Tensor] = {f"{name}.weight": torch.ones(H) for name in ("enorm", "hnorm", "shared_head.norm")}
    parts["eh_proj.weight"] = torch.randn(H, 2 * H, generator=gen) * 0.12
    parts["shared_head.head.weight"] = tensors["lm_head.weight"]
    parts["embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors |= {added + name: tensor.to(dtype) for name, tensor in parts.items()}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, directory / "model.safetensors", metadata={"format": "pt"})


def test_prediction_layers_of_the_checkpoint_draft(tmp_path: Path, generate: Generator) -> None:
    """The tokens are those without drafts, and as many drafts are right as with the dequantized checkpoint.

    The draft's experts are stored at 16 bits, the model's are not. Of the dequantized one vLLM computes all experts.
    """
    model, quantized, plain = (tmp_path / name for name in ("model", "quantized", "plain"))
    add_prediction_layer(make_model("Glm4MoeForCausalLM", model))
    calib = tmp_path / "calib.txt"
    calib.write_text("She opened the door, and there stood her brother with the lamp in his hand. " * 40)
    config = QuantizeConfig(bits=3, calib=str(calib), calib_samples=4, calib_length=64, refine=0)
    quantize_model(str(model), quantized, config)
    dequantize_checkpoint(quantized, plain, torch.float32)

    def run(directory: Path, **options: object) -> tuple[list[list[int]], dict[str, float]]:
        made = generate(directory, PROMPTS, TOKENS, architectures=["Glm4MoeMTPModel"], **options)
        return [[step.token for step in steps] for steps in made], generate.counts

    want, none = run(quantized)
    assert not any(none.values())
    got, counts = run(quantized, speculative_config=PREDICT)
    assert got == want
    assert run(plain, speculative_config=PREDICT) == (want, counts)
    assert counts["vllm:spec_decode_num_draft_tokens"] > counts["vllm:spec_decode_num_accepted_tokens"] > 0
