"""The model of time: its arithmetic by hand, and what it says of our kernels."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.kernels.estimate import APART, LAUNCH, OLDER, READ, USABLE, Gpu, Launch, Programs
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
