"""All rivals with one layer after another, and what they took."""

import importlib.util
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import llama
from benchmarks.cpu import rivals as r
from benchmarks.cpu.bandwidth import Reader, last_level_bytes
from benchmarks.cpu.rounds import Measured, Rival, play
from benchmarks.kernels.shapes import SHAPES, Shape
from benchmarks.kernels.synthetic import NATURAL, WHITENED
from benchmarks.record import commit
from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.errors import BitsmoeError

FULL: tuple[tuple[str, float | None], ...] = (
    (NATURAL, None), (NATURAL, 2.0), (NATURAL, 2.125), (NATURAL, 2.5), (NATURAL, 3.1), (WHITENED, 2.125),
    (WHITENED, 3.1),
)  # fmt: skip
FEW: tuple[tuple[str, float | None], ...] = ((NATURAL, 2.125), (NATURAL, 3.1), (WHITENED, 2.125))
"""Layers of ours: form, and bits per weight or None for 2-bit codes."""
REHEARSAL = Shape("rehearsal", 256, 256, 4, 2, "made up")
OURS = {"Qwen3-30B-A3B": FULL, "Mixtral-8x7B": FEW, REHEARSAL.model: ((NATURAL, None), (WHITENED, 4.5))}
"""By the layer's model: which of ours are timed; the large one would not fit otherwise."""
TOKENS = (1, 4, 16, 512)
BEYOND_CACHE = 2
"""The copies of a layer hold at least this many times the last-level cache."""
RATIOS = {"q2_k": llama.title("Q2_K"), "16_bits": r.VllmPlain.name}
"""Rivals that every row is compared with."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        models: names of layers.
        tokens: of a call.
        threads: of every rival.
        isas: instruction sets of our kernels besides the best.
        only: parts of rivals' names; empty: all rivals.
        rounds, seconds: at most, for each layer and number of tokens.
        working_set: bytes that the copies of a layer hold at least; None: see `BEYOND_CACHE`.
    """

    models: tuple[str, ...]
    tokens: tuple[int, ...]
    threads: int
    isas: tuple[str, ...]
    only: tuple[str, ...]
    rounds: int
    seconds: float
    working_set: int | None


def shape_named(model: str) -> Shape:
    """One of the layers."""
    return next(s for s in (*SHAPES, REHEARSAL) if s.model == model)


def available(plan: Plan, shape: Shape, working_set: int) -> tuple[dict[str, Callable[[], Rival]], dict[str, str]]:
    """Rivals of this process that may run here by name, and why others may not."""
    found: dict[str, Callable[[], Rival]] = {}
    missing: dict[str, str] = {}
    if reason := library.why_not():
        missing[r.OURS] = reason
    else:
        for form, bits in OURS[shape.model]:
            once = cache(partial(r.Kernels, shape, form, bits, working_set))
            for isa in (None, *plan.isas):
                name = r.title(form, bits, isa)
                found[name] = partial(_using, once, name, isa)
    found[r.REFERENCE] = partial(r.Reference, shape, *OURS[shape.model][0])
    every: tuple[type[r.Vllm], ...] = (r.VllmPlain, r.VllmInt4, r.VllmMxfp4)
    kinds = [kind for kind in every if wanted(plan, kind.name)]
    if importlib.util.find_spec("vllm") is None:
        missing |= {kind.name: "vLLM is not installed" for kind in kinds}
    elif kinds:
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        for kind in kinds:
            if kind.able():
                found[kind.name] = partial(kind, shape, working_set)
            else:
                missing[kind.name] = "vLLM has no kernels of this kind for this processor"
    return {name: make for name, make in found.items() if wanted(plan, name)}, missing


def _using(once: Callable[[], r.Kernels], name: str, isa: str | None) -> r.Kernels:
    return once().using(name, isa)


def wanted(plan: Plan, name: str) -> bool:
    """Whether a rival is asked for."""
    return not plan.only or any(part in name for part in plan.only)


def row(model: str, tokens: int, rival: Rival, found: Measured, bandwidth: float) -> dict[str, Any]:
    """Figures of one rival; times are microseconds a layer and token."""
    per_token = [1e6 * s / tokens for s in found.seconds]
    return {
        "model": model, "rival": rival.name, "tokens": tokens, "bits_per_weight": rival.bits,
        "microseconds": statistics.median(per_token), "least": min(per_token), "rounds": len(per_token),
        "calls": found.calls, "bytes_per_token": found.bytes / tokens, "read_bytes_per_second": bandwidth,
        "bandwidth_share": found.bytes / tokens / statistics.median(per_token) * 1e6 / bandwidth,
    }  # fmt: skip


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with how many times faster each is than the rivals of `RATIOS` with the same layer and tokens."""
    times = {(x["model"], x["tokens"], x["rival"]): x["microseconds"] for x in rows}
    out = []
    for x in rows:
        others = {key: times.get((x["model"], x["tokens"], name)) for key, name in RATIOS.items()}
        out.append(x | {f"times_{key}": other and other / x["microseconds"] for key, other in others.items()})
    return out


def machine(threads: int) -> dict[str, Any]:
    """What the figures are measured on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    versions = {name: version(name) for name in ("torch", "vllm") if importlib.util.find_spec(name)}
    return {
        "processor": found.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)), "threads": threads,
        "instruction_sets": library.usable() if library.why_not() is None else [],
        "last_level_bytes": last_level_bytes(), "versions": versions, "commit": commit() or "unknown",
    }  # fmt: skip


def measured(plan: Plan) -> Iterator[dict[str, Any]]:
    """The results, again after each layer and number of tokens."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        yield from _measured(plan)
    finally:
        torch.set_num_threads(before)


def _measured(plan: Plan) -> Iterator[dict[str, Any]]:
    working_set = plan.working_set or BEYOND_CACHE * last_level_bytes()
    reader = Reader(plan.threads)
    result: dict[str, Any] = {"machine": machine(plan.threads), "working_set": working_set, "rows": []}
    result |= {"rivals": [], "not_measured": {}}
    for model in plan.models:
        shape = shape_named(model)
        with ExitStack() as stack:
            rivals = _made(plan, shape, working_set, result, stack)
            for tokens in plan.tokens if rivals else ():
                x = r.made_up_tokens(tokens, shape)
                found, bandwidths = play(rivals, shape, x, plan.rounds, plan.seconds, reader.read)
                bandwidth = statistics.median(bandwidths)
                result["rows"] += [row(model, tokens, rival, found[rival.name], bandwidth) for rival in rivals]
                result["rows"] = compared(result["rows"])
                yield result
            del rivals


def _made(plan: Plan, shape: Shape, working_set: int, result: dict[str, Any], stack: ExitStack) -> list[Rival]:
    """The rivals with one layer, each checked; the result says what they are, or why there are none."""
    makers, missing = available(plan, shape, working_set)
    if kinds := [kind for kind in llama.KINDS if wanted(plan, llama.title(kind))]:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log.txt"
        try:
            process = llama.Llama(shape, plan.threads, log)
        except BitsmoeError as e:
            missing |= {llama.title(kind): str(e) for kind in kinds}
        else:
            stack.callback(process.close)
            result["machine"]["versions"]["llama_cpp_python"] = process.about["version"]
            result["machine"]["llama_cpp_features"] = process.about["features"]
            makers |= {
                llama.title(kind): partial(llama.LlamaRival, process, shape, kind, working_set) for kind in kinds
            }
    result["not_measured"] |= missing
    rivals = []
    for name, make in makers.items():
        rival = make()
        error = rival.check()
        result["rivals"].append(
            {"model": shape.model, "rival": name, "relative_error": error, "copies": rival.copies,
             "bytes": rival.copies * (rival.expert_bytes * shape.num_experts + rival.shared_bytes),
             "detail": rival.detail}
        )  # fmt: skip
        print(f"{shape.model}: {name}, relative error {error:.1e}, {rival.copies} copies", file=sys.stderr, flush=True)
        rivals.append(rival)
    return rivals
