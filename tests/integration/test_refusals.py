"""`vllm serve` on what cannot be served: one clear message, exit status 2, no traceback, and no engine started."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders import write_tiny_qwen3_moe
from vllm_processes import Forks, forks
from vllm_server import command, environment

EXPERTS = "model.layers.1.mlp.experts"
MAIN = "import sys; from vllm.entrypoints.cli.main import main; sys.exit(main())"
"""What the `vllm` script does."""


@pytest.fixture(scope="module")
def vllm() -> Iterator[Forks]:
    with forks("vllm.entrypoints.cli.serve") as made:
        yield made


def spoil(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def spoil_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def wrong_version(directory: Path) -> None:
    spoil_config(directory, lambda c: c["quantization_config"].update(format_version=4))


def flipped_block_bit(directory: Path) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[f"{EXPERTS}.down_bits"][2, 1] ^= 1

    spoil(directory, flip)


def missing_tensors(directory: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{EXPERTS}.gate_up_feature_scale"], tensors[f"{EXPERTS}.down_bits"]

    spoil(directory, drop)


def missing_tensor_outside_the_experts(directory: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.self_attn.q_proj.weight"]

    spoil(directory, drop)


def wrong_shape(directory: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        name = f"{EXPERTS}.down_component_scale"
        tensors[name] = tensors[name][:, :-1].contiguous()

    spoil(directory, cut)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (wrong_version, ["format_version is 4", "reads 1"]),
        (flipped_block_bit, [f"{EXPERTS}.down_bits", "block bits sum to"]),
        (missing_tensors, [f"{EXPERTS}.gate_up_feature_scale is missing", f"{EXPERTS}.down_bits is missing"]),
        (missing_tensor_outside_the_experts, ["model.layers.1.self_attn.q_proj.weight is missing"]),
        (wrong_shape, [f"{EXPERTS}.down_component_scale is float16[4, 39]", "float16[4, 40]"]),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_a_checkpoint_that_cannot_be_served(
    make: Callable[[Path], None], named: list[str], tmp_path: Path, vllm: Forks
) -> None:
    directory = tmp_path / "checkpoint"
    write_tiny_qwen3_moe(directory)
    make(directory)
    assert_refused(vllm, directory, [], named)


def test_a_tensor_parallel_size_that_cannot_work(tmp_path: Path, vllm: Forks) -> None:
    """One block of channels does not make two ranks, though vLLM itself would split 24 channels."""
    directory = tmp_path / "checkpoint"
    write_tiny_qwen3_moe(directory, intermediate_size=24, block_size=32)
    assert_refused(vllm, directory, ["--tensor-parallel-size", "2"], ["--tensor-parallel-size 2", "sizes that work: 1"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that could be served."""
    directory = tmp_path_factory.mktemp("sound") / "checkpoint"
    write_tiny_qwen3_moe(directory)
    return directory


LORA = ["--enable-lora: ", "--lora-target-modules q_proj k_proj v_proj o_proj"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--enable-lora"], LORA),
        # vLLM's Transformers backend is another architecture, by name.
        (["--enable-lora", "--model-impl", "transformers"], LORA),
        (
            ["--load-format", "tensorizer", "--all2all-backend", "deepep_low_latency", "--enable-expert-parallel",
             "--cpu-offload-gb", "1", "--offload-group-size", "2"],
            ["--load-format tensorizer: ", "--all2all-backend deepep_low_latency: ", "--cpu-offload-gb 1: ",
             "--offload-group-size 2: "],
        ),
    ],
    ids=["lora", "transformers", "many"],
)  # fmt: skip
def test_an_option_that_cannot_work(options: list[str], named: list[str], sound: Path, vllm: Forks) -> None:
    assert_refused(vllm, sound, options, named)


def assert_refused(vllm: Forks, directory: Path, options: list[str], named: list[str]) -> None:
    argv = command(directory, "--quantization", "bitsmoe", "--max-model-len", "128", *options)
    ended = vllm.run(MAIN, argv, environment())
    everything = ended.stdout + ended.stderr
    assert ended.returncode == 2, everything
    assert "Traceback" not in everything
    assert "EngineCore" not in everything  # refused before any worker started
    assert everything.count("bitsmoe: error:") == 1
    _, _, message = ended.stderr.partition("bitsmoe: error: ")
    for words in named:
        assert words in message
