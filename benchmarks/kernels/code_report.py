"""Rows of `machine_code` for all architectures of the tile table, both dtypes, on all cores, and their table."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton

from benchmarks.kernels.machine_code import rows
from bitsmoe_kernels.backends.launch_config import DECODE, PREFILL, TILES

Job = tuple[int, bool, str]
"""Architecture, float16 or not, regime."""


def job_rows(job: Job) -> list[dict[str, Any]]:
    """Rows of one job, as JSON data."""
    capability, fp16, regime = job
    return [row.as_dict() for row in rows(capability, fp16, (regime,))]


def all_rows(jobs: Sequence[Job] | None = None) -> list[dict[str, Any]]:
    """Rows of all jobs, in their order; None: every architecture, dtype and regime of the table."""
    if jobs is None:
        jobs = [(arch, fp16, regime) for arch in TILES for fp16 in (True, False) for regime in (DECODE, PREFILL)]
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [row for part in pool.map(job_rows, jobs) for row in part]


def as_markdown(found: Sequence[dict[str, Any]]) -> str:
    """One line for each kernel, under what compiled them."""
    title = (
        f"Machine code by Triton {triton.__version__} and its assembler; `python -m benchmarks.kernels --machine-code`."
    )
    names = list(found[0])
    head = "| " + " | ".join(n.replace("_", " ") for n in names) + " |"
    return "\n".join(
        [title, "", head, "|" + " --- |" * len(names)]
        + ["| " + " | ".join(str(r[n]) for n in names) + " |" for r in found]
    )
