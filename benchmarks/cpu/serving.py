"""Tokens per second of `vllm serve`: made-up models of real shapes with few layers and a small vocabulary.

Only config.json and a tokenizer are written; vLLM makes the weights up (`--load-format dummy`). One server after
another answers the same requests. Tokens are drawn at a temperature, so that experts vary as they do in use.
"""

import json
import re
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.cpu.layer import machine
from benchmarks.scale import MODELS, TOKENIZER
from benchmarks.serving import BITSMOE, GPTQ, PLAIN, quantization
from bitsmoe_kernels.models.families import moe_shape
from vllm_server import SERVED_NAME, Server, serve

VOCABULARY = 4096
"""That of the tokenizer."""
LAYERS = {"qwen3-30b-a3b": 12, "mixtral-8x7b": 4, "rehearsal": 2}
"""Of each model; as many as fit beside vLLM in 20 GB at 16 bits."""
CHANGES = {"rehearsal": {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 128}}
"""Other sizes than in `scale.MODELS`: 4-bit layers outside the experts take groups of 128."""
BITS = 2.125
"""Per weight of our experts, all included."""
BACKEND = re.compile(r"routed experts are computed by (.*)")


@dataclass(frozen=True)
class Method:
    """A way to store a model.

    Attributes:
        name: of `serving.METHODS`.
        basis: whether gate and up share one, ours only.
        dense_bits: of linear layers outside the experts, ours only.
    """

    name: str
    basis: bool = False
    dense_bits: Literal[4, 8, 16] = 16

    @property
    def title(self) -> str:
        """As the results name it."""
        if self.name != BITSMOE:
            return f"vLLM, {self.name}"
        return f"bitsmoe {'8-bit basis' if self.basis else 'natural'}, dense {self.dense_bits} bits"


METHODS = (
    Method(PLAIN), Method(BITSMOE), Method(BITSMOE, dense_bits=4), Method(BITSMOE, basis=True, dense_bits=4),
    Method(GPTQ),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        models: of `LAYERS`.
        layers: of every model; None: `LAYERS`.
        methods: of METHODS.
        batches: requests at a time.
        prompt, output: tokens of a request.
        repeats: of each batch, after one that is not counted.
        threads: of the server's worker.
        options: more of `vllm serve`.
    """

    models: tuple[str, ...]
    layers: int | None
    methods: tuple[Method, ...]
    batches: tuple[int, ...]
    prompt: int
    output: int
    repeats: int
    threads: int
    options: tuple[str, ...] = ()


def config_of(model: str, layers: int) -> dict[str, Any]:
    """The config.json of a model with few layers and a small vocabulary."""
    return MODELS[model].config | {"num_hidden_layers": layers, "vocab_size": VOCABULARY, **CHANGES.get(model, {})}


def write_model(model: str, layers: int, method: Method, directory: Path) -> float | None:
    """Write what vLLM needs to make a model up; bits per weight of its experts, where they are ours."""
    config = config_of(model, layers)
    bare = quantization(BITSMOE, config, 0, method.basis)
    assert bare is not None
    found = quantization(method.name, config, BITS - bare["bpw"], method.basis, method.dense_bits)
    written = config | {"torch_dtype": "bfloat16"} | ({} if found is None else {"quantization_config": found})
    (directory / "config.json").write_text(json.dumps(written), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / name, directory)
    return found["bpw"] if found is not None and method.name == BITSMOE else None


def expert_bytes(model: str, layers: int, bits: float | None) -> int | None:
    """Bytes of the routed experts in the checkpoint, at so many bits per weight."""
    return None if bits is None else int(moe_shape(config_of(model, layers), model).num_weights * bits / 8)


def requests(batch: int, prompt: int, output: int, number: int) -> list[dict[str, Any]]:
    """Bodies of the requests of a batch: prompts of random tokens, which `number` seeds, answers of a fixed length."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(VOCABULARY, (batch, prompt), generator=generator).tolist()
    length = {"max_tokens": output, "min_tokens": output, "ignore_eos": True}
    return [{"model": SERVED_NAME, "prompt": row, "temperature": 1.0, **length} for row in ids]


def _post(server: Server, body: dict[str, Any]) -> int:
    """Tokens of an answer."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        tokens: int = json.load(answer)["usage"]["completion_tokens"]
    return tokens


def rates(server: Server, plan: Plan) -> dict[str, Any]:
    """Tokens per second by batch: median, most and all repeats; the time of the prompts is part of it."""
    found = {}
    for batch in plan.batches:
        each = []
        with ThreadPoolExecutor(batch) as pool:
            for number in range(1 + plan.repeats):
                bodies = requests(batch, plan.prompt, plan.output, number)
                before = time.monotonic()
                tokens = list(pool.map(lambda body: _post(server, body), bodies))
                each.append(sum(tokens) / (time.monotonic() - before))
                assert tokens == [plan.output] * batch
        found[str(batch)] = {"median": statistics.median(each[1:]), "most": max(each[1:]), "each": each[1:]}
    return found


def measured(plan: Plan) -> Iterator[dict[str, Any]]:
    """The results, again after each server."""
    result: dict[str, Any] = {
        "machine": machine(plan.threads), "prompt": plan.prompt, "output": plan.output, "options": plan.options,
        "layers": {m: plan.layers or LAYERS[m] for m in plan.models}, "vocabulary": VOCABULARY, "rows": [],
    }  # fmt: skip
    for model in plan.models:
        for method in plan.methods:
            print(f"{model}, {method.title}: starts", file=sys.stderr, flush=True)
            result["rows"].append({"model": model, "method": method.title, **_row(model, method, plan)})
            yield result


def _row(model: str, method: Method, plan: Plan) -> dict[str, Any]:
    options = [
        "--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", str(plan.prompt + plan.output),
        "--max-num-seqs", str(max(plan.batches)), "--no-enable-prefix-caching", "--seed", "0", *plan.options,
    ]  # fmt: skip
    layers = plan.layers or LAYERS[model]
    with tempfile.TemporaryDirectory() as folder:
        directory, log = Path(folder) / "model", Path(folder) / "log.txt"
        directory.mkdir()
        bits = write_model(model, layers, method, directory)
        began = time.monotonic()
        try:
            with serve(directory, *options, log=log, timeout_s=600) as server:
                started = time.monotonic() - began
                found = rates(server, plan)
                resident = server.resident_bytes()
        except RuntimeError as e:
            return {"failed": str(e)}
        said = BACKEND.search(log.read_text(encoding="utf-8", errors="replace"))
    return {
        "tokens_per_second": found, "start_seconds": started, "bits_per_weight": bits, "resident_bytes": resident,
        "expert_bytes": expert_bytes(model, layers, 16 if method.name == PLAIN else bits),
        "dense_bits": method.dense_bits, "backend": said[1] if said else None,
    }  # fmt: skip
