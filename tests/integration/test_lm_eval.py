"""lm-eval reports for a quantized checkpoint what plain transformers finds for its dequantized weights.

Its backends are `vllm`, and `hf`, which is transformers with `import bitsmoe`.

The three tasks have the three forms of the standard ones. Their data is written here, by the demo model.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from builders import TINY_MOE
from vllm_server import environment

TASKS = Path(__file__).with_name("lm_eval_tasks")
NUM_TEXTS, TEXT_TOKENS = 16, 80
CONTEXT_WORDS, CHOICE_WORDS, NUM_CHOICES = 16, 6, 4
NUM_GENERATIONS, GENERATED_TOKENS = 4, 16  # the latter as in generation.yaml
MAX_ERROR = 1e-4
"""Of the log-likelihood of a choice, nats. Both sides compute in float32, in different orders; 1e-5 is usual."""
TIE = 2 * MAX_ERROR
"""Log-likelihoods this close are a tie: either may come out higher, and both answers are accepted."""


class Reference:
    """The dequantized checkpoint in plain transformers, in float32."""

    def __init__(self, directory: Path):
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(directory))

    def log_likelihood(self, context: str, rest: str) -> float:
        """Of the tokens that begin after `context`; an empty one is the begin-of-text token, as lm-eval has it."""
        encoded = self.tokenizer(context + rest, return_offsets_mapping=True)
        ids = [self.tokenizer.bos_token_id, *encoded["input_ids"]] if not context else encoded["input_ids"]
        count = sum(begin >= len(context) for begin, _ in encoded["offset_mapping"])
        logp = self._log_probabilities(ids)
        return float(logp[-count - 1 : -1].gather(-1, torch.tensor(ids[-count:])[:, None]).double().sum())

    def greedy(self, context: str) -> tuple[str, float]:
        """The most likely text, token by token, and the smallest lead of a token over the second best."""
        ids = self.tokenizer(context)["input_ids"]
        start, lead = len(ids), math.inf
        for _ in range(GENERATED_TOKENS):
            (best, second), (token, _) = (t.tolist() for t in self._log_probabilities(ids)[-1].topk(2))
            lead = min(lead, best - second)
            ids = [*ids, token]
        return self.tokenizer.decode(ids[start:]), lead

    @torch.inference_mode()
    def _log_probabilities(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)


def sampled_texts() -> list[str]:
    """What the unquantized model writes, spaces and line breaks evened out."""
    model = AutoModelForCausalLM.from_pretrained(str(TINY_MOE), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(TINY_MOE))
    torch.manual_seed(0)
    start = torch.full((NUM_TEXTS, 1), tokenizer.bos_token_id)
    length = {"min_new_tokens": TEXT_TOKENS, "max_new_tokens": TEXT_TOKENS}
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, temperature=0.8, top_k=0, top_p=1.0, **length
    )
    return [" ".join(text.split()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def continuation_items(texts: list[str]) -> list[dict[str, Any]]:
    """Each text's beginning, and its own next words among those of three other texts."""
    words = [text.split() for text in texts]
    begin, end = CONTEXT_WORDS, CONTEXT_WORDS + CHOICE_WORDS
    items = []
    for i in range(len(words)):
        others = [words[(i + j) % len(words)] for j in range(NUM_CHOICES)]  # its own first
        label = i % NUM_CHOICES
        others[0], others[label] = others[label], others[0]
        choices = [" ".join(w[begin:end]) for w in others]
        items.append({"context": " ".join(words[i][:begin]), "choices": choices, "label": label})
    return items


def write_items(file: Path, items: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


BACKENDS = {
    "vllm": (
        [str(Path(sys.executable).with_name("lm_eval")), "run", "--model", "vllm", "--batch_size", "auto"],
        "quantization=bitsmoe,enforce_eager=True,max_model_len=256",
    ),
    # As docs/evaluation.md has it.
    "hf": (
        [
            *(sys.executable, "-c", "import bitsmoe; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"),
            *("run", "--model", "hf", "--batch_size", "8", "--device", "cpu"),
        ],
        "max_length=256",
    ),
}
"""Command, and arguments of the model."""


def lm_eval(
    backend: str, model: Path, directory: Path, vllm_cache: Path
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Results by task, and what was recorded of each item, in order."""
    names = ",".join(f"bitsmoe_{task.stem}" for task in sorted(TASKS.glob("*.yaml")))
    program, arguments = BACKENDS[backend]
    command = [
        *program,
        *("--model_args", f"pretrained={model},dtype=float32,{arguments}"),
        *("--include_path", str(TASKS), "--tasks", names, "--output_path", "out", "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    caches = {"HF_HOME": str(directory / "hf"), "VLLM_CACHE_ROOT": str(vllm_cache)}
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ended = subprocess.run(
        command,
        cwd=directory,  # the tasks' data files are relative
        env=environment() | offline | caches | one_process,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout
    (results,) = directory.glob("out/**/results_*.json")
    samples = {
        file.stem.removeprefix("samples_").rpartition("_")[0]: sorted(
            map(json.loads, file.read_text(encoding="utf-8").splitlines()), key=lambda s: s["doc_id"]
        )
        for file in directory.glob("out/**/samples_*.jsonl")
    }
    return json.loads(results.read_text(encoding="utf-8"))["results"], samples


def lead(scores: list[float], label: int) -> float:
    """How far the right choice's score lies above the best of the others."""
    return scores[label] - max(x for i, x in enumerate(scores) if i != label)


def assert_share(reported: float, leads: list[float]) -> None:
    """`reported` is the share of positive leads, of which those within a tie may count or not."""
    sure, possible = (sum(x > bound for x in leads) for bound in (TIE, -TIE))
    assert sure <= round(reported * len(leads), 6) <= possible


def without_a_length_of_its_own(model: Path, copy: Path) -> Path:
    """A copy whose generation_config.json leaves the length of a text to the task: transformers goes by the model's."""
    shutil.copytree(model, copy)
    settings = json.loads((copy / "generation_config.json").read_text())
    del settings["max_new_tokens"]
    (copy / "generation_config.json").write_text(json.dumps(settings))
    return copy


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return sampled_texts()


@pytest.mark.parametrize("backend", [pytest.param("vllm", marks=pytest.mark.nightly), "hf"])
def test_the_results_are_those_of_the_dequantized_checkpoint(
    backend: str, texts: list[str], quantized: Path, dequantized: Path, tmp_path: Path, vllm_cache: Path
) -> None:
    items = continuation_items(texts)
    reference = Reference(dequantized)
    greedy = {item["context"]: reference.greedy(item["context"]) for item in items[:NUM_GENERATIONS]}
    write_items(tmp_path / "continuation.jsonl", items)
    write_items(tmp_path / "text.jsonl", ({"text": text} for text in texts))
    write_items(tmp_path / "generation.jsonl", ({"context": c, "target": t} for c, (t, _) in greedy.items()))

    model = without_a_length_of_its_own(quantized, tmp_path / "model") if backend == "hf" else quantized
    results, samples = lm_eval(backend, model, tmp_path, vllm_cache)

    choices = results["bitsmoe_continuation"]
    leads, leads_per_character = [], []
    for item, sample in zip(items, samples["bitsmoe_continuation"], strict=True):
        want = [reference.log_likelihood(item["context"], " " + choice) for choice in item["choices"]]
        got = [float(response[0][0]) for response in sample["resps"]]
        assert got == pytest.approx(want, rel=0, abs=MAX_ERROR), item
        leads.append(lead(want, item["label"]))
        per_character = [x / len(choice) for x, choice in zip(want, item["choices"], strict=True)]
        leads_per_character.append(lead(per_character, item["label"]))
    assert_share(choices["acc,none"], leads)
    assert_share(choices["acc_norm,none"], leads_per_character)
    assert 0 < choices["acc,none"] < 1  # neither answer to every question would show an error

    nats = -sum(reference.log_likelihood("", text) for text in texts)
    words = sum(len(text.split()) for text in texts)
    assert results["bitsmoe_text"]["word_perplexity,none"] == pytest.approx(math.exp(nats / words), rel=MAX_ERROR)

    assert_share(results["bitsmoe_generation"]["exact_match,none"], [smallest for _, smallest in greedy.values()])
