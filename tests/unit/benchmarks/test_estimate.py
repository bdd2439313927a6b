"""The model of time: its arithmetic by hand, and what it says of our kernels."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.kernels.estimate import APART, LAUNCH, OLDER, READ, USABLE, Gpu, Launch, Programs, _ending
from builders import REPO

GPU = Gpu("made up", 90, 10, 1.0, 1e6, 1e6, 100 << 10, 64)
LAUNCHED = Launch("kernel", (Programs(10, 1000, 2),), 4, 0, False, 128, 1024)


def with_programs(count: int) -> Launch:
    return replace(LAUNCHED, programs=(Programs(count, 1000, 2),))


def test_one_program_on_each_multiprocessor() -> None:
    assert LAUNCHED.microseconds(GPU) == pytest.approx(LAUNCH + 2 * READ + 1000 * APART / 1e3)


def test_programs_share_a_multiprocessor_or_take_turns() -> None:
    # 128 registers of 128 threads: four programs at once, 16 warps, so each of four schedulers has four of them.
    one_round = 2 * READ + 1000 * 4 / 1e3
    assert with_programs(40).microseconds(GPU) == pytest.approx(LAUNCH + one_round)
    assert with_programs(80).microseconds(GPU) == pytest.approx(LAUNCH + 2 * one_round)
    # Twice the shared memory that four of them have.
    crowded = replace(with_programs(40), shared_bytes=50 << 10)
    assert crowded.microseconds(GPU) == pytest.approx(LAUNCH + 2 * (2 * READ + 1000 * APART / 1e3))


def test_memory_is_the_limit_of_large_launches() -> None:
    assert replace(LAUNCHED, bytes=1e8).microseconds(GPU) == pytest.approx(LAUNCH + 100 / USABLE)


def test_matrix_units_are_the_limit_of_many_products() -> None:
    many = replace(LAUNCHED, programs=(Programs(10, 1000, 2, 1e7),))
    assert many.microseconds(GPU) == pytest.approx(LAUNCH + 100 / USABLE)
    assert replace(many, older=True).microseconds(GPU) == pytest.approx(LAUNCH + 100 / USABLE / OLDER)


def test_two_kinds_of_programs_in_one_launch() -> None:
    """Each multiprocessor has one of either, side by side; no launch is shorter than its longest program."""
    two = replace(LAUNCHED, programs=(Programs(10, 1000, 2), Programs(10, 4000, 2)))
    assert two.microseconds(GPU) == pytest.approx(LAUNCH + 2 * READ + 4000 * APART / 1e3)
    four = replace(two, programs=(*two.programs, *two.programs))
    assert four.microseconds(GPU) == pytest.approx(LAUNCH + 2 * READ + 4000 * 4 / 1e3)
    assert replace(four, registers=256).microseconds(GPU) == pytest.approx(
        LAUNCH + ((2 * READ + 1000 * APART / 1e3) + (2 * READ + 4000 * APART / 1e3))
    )


MOST_EXECUTED = {"gate_up": 1.34, "down": 1.47}
"""Instructions of whole programs per weight, sm_90, blocks of 8 tokens, a layer of Qwen3-30B-A3B at 2 bits, 64 tokens;
what was counted, rounded up."""


@pytest.mark.slow
def test_instructions_of_whole_programs() -> None:
    """Branches taken and not taken, loops at the layer's real numbers of tiles; products checked on the way."""
    code = (
        "import json\n"
        "from benchmarks.kernels.estimate import GPUS, _gemm_executed, bitsmoe\n"
        "from benchmarks.kernels.shapes import SHAPES\n"
        "from benchmarks.kernels.synthetic import WHITENED\n"
        "from bitsmoe_kernels.backends.launch_config import FEW\n"
        "case = 'down', 90, FEW[1], SHAPES[0], WHITENED, 2.0\n"
        "ways = [_gemm_executed(*case, ends)[0] / _gemm_executed(*case, ends)[1] for ends in (False, True)]\n"
        "print(json.dumps([bitsmoe(SHAPES[0], 64, WHITENED, 2.0, GPUS[1])[1], ways]))"
    )
    (together, gate_up, down), (others, ending) = json.loads(printed(["-c", code]))
    # A weight takes more than half an instruction, whatever is done.
    assert 1.0 < gate_up <= MOST_EXECUTED["gate_up"]
    assert 1.0 < others < down < ending
    assert down <= MOST_EXECUTED["down"]
    assert min(gate_up, down) < together <= 1.4  # the bar of the issue


def test_programs_of_down_that_end_a_token() -> None:
    """Against lots: each of 3,000 tokens picks one of its 8 blocks, and a block holds 4 of them."""
    rng = random.Random(0)
    blocks = [slot for slot in range(6000) for _ in range(4)]
    rng.shuffle(blocks)
    last = {rng.choice(blocks[first : first + 8]) for first in range(0, 24_000, 8)}
    assert _ending(4, 8) == pytest.approx(len(last) / 6000, abs=0.02)
    assert _ending(1, 1) == 1.0
    assert _ending(1, 8) == pytest.approx(1 / 8)


def printed(arguments: list[str]) -> str:
    """By a process of its own, with Triton's interpreter off."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=REPO, env=env, timeout=1200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_estimates_beside_measurements() -> None:
    """Of our own rows under realistic routing, on a GPU that the model knows."""
    rows = [
        {"model": "Qwen3-30B-A3B", "method": method, "routing": routing, "tokens": 1, "microseconds": time}
        for method, routing, time in (
            ("bitsmoe, whitened basis", "realistic", 1000.0), ("bitsmoe, whitened basis", "uniform", 1.0),
            ("bitsmoe, no basis", "realistic", None), ("16-bit, plain Triton", "realistic", 1.0),
        )
    ]  # fmt: skip
    code = (
        "from benchmarks.kernels.estimate import beside\n"
        "from benchmarks.kernels.shapes import SHAPES\n"
        f"print(beside({rows!r}, 'NVIDIA H100 80GB HBM3', 2.0, SHAPES))\n"
        f"print('unknown:', repr(beside({rows!r}, 'some GPU', 2.0, SHAPES)))"
    )
    said = printed(["-c", code])
    (line,) = [text for text in said.splitlines() if text.startswith("| Qwen3")]
    model, form, tokens, measured, estimate, ratio = (cell.strip() for cell in line.strip("|").split("|"))
    assert (model, form, tokens, measured) == ("Qwen3-30B-A3B", "bitsmoe, whitened basis", "1", "1000.0")
    assert float(ratio) == pytest.approx(1000 / float(estimate), abs=0.6)
    assert "unknown: ''" in said


@pytest.mark.nightly
@pytest.mark.slow
def test_the_command() -> None:
    """Of the smallest model here; more bits or tokens take no less, and nothing takes less than its bytes."""
    command = ["-m", "benchmarks.kernels", "--estimate", "--json", "--tokens", "1", "64", "--gpus", "A100"]
    rows: list[dict[str, Any]] = json.loads(printed(command))
    assert {row["figure"] for row in rows} == {"estimate"}
    assert {row["gpu"] for row in rows} == {"A100"}
    assert {row["tokens"] for row in rows} == {1, 64}
    ours = {(row["tokens"], row["basis"]): row for row in rows if row["method"].startswith("bitsmoe")}
    for row in rows:
        assert row["microseconds"] >= row["floor"] > 0
    for tokens in (1, 64):
        assert ours[tokens, True]["microseconds"] > ours[tokens, False]["microseconds"]
        assert ours[tokens, True]["launches"] == 4
    assert ours[64, True]["microseconds"] > ours[1, True]["microseconds"]
