"""Processes that measure: each method runs in one of its own, so that one that fails takes no other along."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import baselines, methods
from benchmarks.kernels.methods import BITSMOE, Bench, Setting
from benchmarks.kernels.results import Results
from benchmarks.kernels.routing import ROUTINGS
from benchmarks.kernels.shapes import REHEARSAL, REHEARSAL_TOKENS, SHAPES, TOKENS, Shape
from benchmarks.record import ROOT, child_environment

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PREPARED = (1, 256, 512, 2048)
"""Tokens of calls that between them use every tile."""
MOST_PROCESSES = 8


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        models, methods, tokens, routings: names and numbers; every combination is a row.
        dtype: of activations.
        bits: average code width of bitsmoe.
        marlin: see `Setting`.
        rehearsal: see `Setting`.
        deadline: `time.time()` after which no row is begun; None: never.
    """

    models: tuple[str, ...]
    methods: tuple[str, ...]
    tokens: tuple[int, ...]
    routings: tuple[str, ...]
    dtype: str
    bits: float
    marlin: str | None
    rehearsal: bool
    deadline: float | None

    @property
    def setting(self) -> Setting:
        """The setting of all rows."""
        device = "cpu" if self.rehearsal else "cuda"
        return Setting(
            device, DTYPES[self.dtype], self.bits, Path(self.marlin) if self.marlin else None, self.rehearsal
        )

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.time() > self.deadline

    def key(self, model: str, method: str, tokens: int, routing: str) -> tuple[Any, ...]:
        """Of a row, as `results.KEY` says."""
        bits = self.bits if method in BITSMOE else 0.0
        return model, method, self.dtype, bits, tokens, routing, methods.source_of(method)


def shape_named(model: str) -> Shape:
    """One of the shapes."""
    return next(s for s in (*SHAPES, *REHEARSAL) if s.model == model)


def default_tokens(rehearsal: bool) -> tuple[int, ...]:
    """Token counts of a full run."""
    return REHEARSAL_TOKENS if rehearsal else TOKENS


def measured(plan: Plan, method: str, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Rows of one method that are not done yet."""
    if not plan.rehearsal and method in ("4-bit g128, GPTQ-Marlin", "2-bit g128, Humming"):
        baselines.load_marlin(plan.setting.marlin)
    for model in plan.models:
        missing = [
            (t, r) for r in ROUTINGS if r in plan.routings for t in plan.tokens
            if plan.key(model, method, t, r) not in done
        ]  # fmt: skip
        if not missing or plan.late:
            continue
        bench = Bench(method, shape_named(model), plan.setting)
        for tokens, routing in missing:
            if plan.late:
                return
            yield bench.row(tokens, routing).as_dict()
        del bench
        methods.free()


def serve(job: dict[str, Any]) -> None:
    """What a process of its own does: print rows as lines of JSON, or only compile."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in job["plan"].items()}
    plan = Plan(**fields)
    if job["prepare"]:
        for model in plan.models:
            methods.prepare(
                job["method"], shape_named(model), plan.setting, plan.tokens[:1] if plan.rehearsal else PREPARED
            )
        return
    for row in measured(plan, job["method"], {tuple(key) for key in job["done"]}):
        print(json.dumps({"row": row}), flush=True)


def _process(plan: Plan, method: str, done: set[tuple[Any, ...]], prepare: bool, errors: Any) -> subprocess.Popen[str]:
    job = {"plan": plan.__dict__, "method": method, "prepare": prepare, "done": sorted(done, key=str)}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kernels", "--work", json.dumps(job)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=errors, env=child_environment(),
    )  # fmt: skip


def prepare_all(plan: Plan, names: Sequence[str]) -> None:
    """Compile our kernels for all models at once, on as many cores as there are, before anything is timed.

    A failure shows again, with its reason, when the rows are measured.
    """

    def one(method: str, model: str) -> None:
        only = Plan(**{**plan.__dict__, "models": (model,)})
        with _process(only, method, set(), True, subprocess.DEVNULL) as process:
            process.communicate()

    workers = min(MOST_PROCESSES, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for method in names:
            for model in plan.models:
                pool.submit(one, method, model)  # never raises: a process that fails is waited for like any


def run_apart(plan: Plan, method: str, results: Results, limit_s: float) -> str | None:
    """Measure one method in a process of its own and keep its rows.

    Returns:
        None, or why it ended early.
    """
    with tempfile.TemporaryFile("w+") as errors:
        with _process(plan, method, {k for k in results.done() if method in k}, False, errors) as process:
            timer = threading.Timer(limit_s, process.kill)
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"row": '):
                    row = json.loads(line)["row"]
                    results.add(row)
                    shown = f"{row['microseconds']} us" if row["microseconds"] is not None else "ran"
                    print(
                        f"{row['model']}, {method}, {row['tokens']} tokens, {row['routing']}: {shown}",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                else:
                    print(line, end="", file=sys.stderr)
            code = process.wait()
            timer.cancel()
        if code == 0:
            return None
        errors.seek(0)
        said = errors.read().strip().splitlines()
        print("\n".join(said[-25:]), file=sys.stderr, flush=True)
        return f"ended with {code}: {said[-1].strip() if said else 'no message'}"


def run(plan: Plan, results: Results, limit_s: float) -> bool:
    """Everything in the plan: the first model by all methods, then the others.

    Returns:
        Whether no method failed that may run here.
    """
    well = True
    able = []
    for method in plan.methods:
        if (reason := methods.missing(method, plan.setting)) is not None:
            results.miss(method, plan.models, reason)
        else:
            able.append(method)
    wanted = [m for m in able if _left(plan, m, results)]
    prepare_all(plan, [m for m in wanted if m in BITSMOE])
    for models in (plan.models[:1], plan.models[1:]):
        part = Plan(**{**plan.__dict__, "models": models})
        for method in wanted:
            if _left(part, method, results) and not part.late:
                if (reason := run_apart(part, method, results, limit_s)) is not None:
                    results.miss(method, models, reason)
                    well = False
                elif left := _left(part, method, results):
                    results.miss(method, models, f"{len(left)} rows are left: the time was up")
    return well


def _left(plan: Plan, method: str, results: Results) -> list[tuple[Any, ...]]:
    """Keys of rows that are not done."""
    every = [plan.key(m, method, t, r) for m in plan.models for t in plan.tokens for r in plan.routings]
    done = results.done()
    return [key for key in every if key not in done]
