"""The model of time: its arithmetic by hand, and what it says of our kernels."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.kernels.estimate import APART, LAUNCH, READ, USABLE, Gpu, Launch
from benchmarks.kernels.machine_code import executed
from builders import REPO

GPU = Gpu("made up", 90, 10, 1.0, 1e6, 100 << 10, 64)
LAUNCHED = Launch("kernel", 10, 4, 1000, 2, 0, 128, 1024)


def test_one_program_on_each_multiprocessor() -> None:
    assert LAUNCHED.microseconds(GPU) == pytest.approx(LAUNCH + 2 * READ + 1000 * APART / 1e3)


def test_programs_share_a_multiprocessor_or_take_turns() -> None:
    # 128 registers of 128 threads: four programs at once, 16 warps, so each of four schedulers has four of them.
    one_round = 2 * READ + 1000 * 4 / 1e3
    assert replace(LAUNCHED, programs=40).microseconds(GPU) == pytest.approx(LAUNCH + one_round)
    assert replace(LAUNCHED, programs=80).microseconds(GPU) == pytest.approx(LAUNCH + 2 * one_round)
    # Twice the shared memory that four of them have.
    crowded = replace(LAUNCHED, programs=40, shared_bytes=50 << 10)
    assert crowded.microseconds(GPU) == pytest.approx(LAUNCH + 2 * (2 * READ + 1000 * APART / 1e3))


def test_memory_is_the_limit_of_large_launches() -> None:
    assert replace(LAUNCHED, bytes=1e8).microseconds(GPU) == pytest.approx(LAUNCH + 100 / USABLE)


def listing(*instructions: str) -> list[str]:
    return [t if t.startswith(".") else f"        /*{i:04x}*/    {t} ;" for i, t in enumerate(instructions)]


def test_instructions_that_a_warp_executes() -> None:
    code = listing(
        "MOV R1, R2", ".L_x_1:", "LDG.E R3, [R4]", "HMMA.16816 R4, R5, R6, R7", "@P0 BRA `(.L_x_1)",
        ".L_x_2:", "CCTL.PF2 [R2]", "@P0 BRA `(.L_x_2)", ".L_x_3:", "FADD R1, R2, R3", "@P1 BRA `(.L_x_3)", "EXIT",
        ".L_x_4:", "BRA `(.L_x_4)", "NOP",
    )  # fmt: skip
    assert executed(code, [5], 8) == 1 + 5 * 3 + 2 + 8 * 2 + 2
    with pytest.raises(ValueError, match="1 loops with matrix instructions, but 2 are expected"):
        executed(code, [5, 1], 8)


@pytest.mark.slow
def test_the_command() -> None:
    """Of the smallest model here; more bits or tokens take no less, and nothing takes less than its bytes."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels", "--estimate", "--json", "--tokens", "1", "64"]
    ended = subprocess.run(
        [*command, "--gpus", "A100"], capture_output=True, text=True, cwd=REPO, env=env, timeout=1200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    rows: list[dict[str, Any]] = json.loads(ended.stdout)
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
