"""All ways to run a layer that are compared, and how one row of the results is measured."""

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import baselines, timing
from benchmarks.kernels.experts import LIMITS, Experts, compulsory_bytes, reference, relative_error
from benchmarks.kernels.routing import route
from benchmarks.kernels.shapes import Shape
from benchmarks.kernels.synthetic import NATURAL, WHITENED, BitsmoeExperts, fewer_experts, format_layer
from bitsmoe_kernels.backends import triton_launch as moe

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels" / "bitsmoe_kernels"
CHECKED_EXPERTS, CHECKED_TOKENS = 4, (1, 37)
CHECKED_ROUTING_SEED = 1
SPLIT = ("begin_kernel", "scale_kernel", "gate_up_kernel", "down_kernel")


@dataclass(frozen=True)
class Setting:
    """What all rows of a run have in common.

    Attributes:
        device: `cuda`, or `cpu` in a rehearsal.
        dtype: of activations.
        bits: average code width of bitsmoe.
        marlin: extension that holds vLLM's MoE operators, or None.
        rehearsal: under Triton's interpreter, nothing is timed.
    """

    device: str
    dtype: torch.dtype
    bits: float
    marlin: Path | None
    rehearsal: bool

    @property
    def capability(self) -> int:
        """Such as 90; a rehearsal stands for it."""
        return moe.Device.of(torch.empty(0, device=self.device)).capability


BITSMOE = {"bitsmoe, whitened basis": WHITENED, "bitsmoe, no basis": NATURAL}
BASELINES: dict[str, baselines.Maker] = {
    "16-bit, vLLM fused_experts": baselines.FusedExperts,
    "16-bit, plain Triton": baselines.PlainExperts,
    "4-bit g128, plain Triton": baselines.Int4Experts,
    "4-bit g128, GPTQ-Marlin": baselines.MarlinExperts,
    "2-bit g128, Humming": baselines.HummingExperts,
}
METHODS = (*BITSMOE, *BASELINES)


def missing(method: str, setting: Setting) -> str | None:
    """Why a method cannot run here at all; None where it may. Nothing is imported."""
    if method in ("16-bit, vLLM fused_experts", "4-bit g128, GPTQ-Marlin", "2-bit g128, Humming") and setting.rehearsal:
        return "needs a CUDA device"
    if method == "16-bit, vLLM fused_experts" and not baselines.importable("vllm"):
        return "vllm is not installed"
    if method == "4-bit g128, GPTQ-Marlin" and setting.marlin is None and not baselines.importable("vllm"):
        return "vllm is not installed and --marlin names no extension"
    if method == "2-bit g128, Humming" and not baselines.importable("humming"):
        return "humming is not installed"
    return None


def source_of(method: str) -> str:
    """A digest of the files that a method's rows depend on, to know which rows of an earlier run still hold."""
    ours = ["experts.py", "routing.py", "shapes.py", "timing.py"]
    if method in BITSMOE:
        files = [HERE / n for n in (*ours, "synthetic.py")] + sorted(KERNELS.rglob("*.py"))
    else:
        files = [HERE / n for n in (*ours, "baselines.py", "grouped.py")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def build(method: str, shape: Shape, setting: Setting, seed: int, keep: bool) -> Experts:
    """Random weights of one layer.

    Args:
        keep: what `Experts.dense` needs too.
    """
    if method in BITSMOE:
        weights = format_layer(shape, BITSMOE[method], setting.bits, seed, setting.device)
        return BitsmoeExperts(weights, setting.dtype, setting.capability, keep)
    return BASELINES[method](shape, setting.dtype, torch.Generator(setting.device).manual_seed(seed))


def tokens_in(count: int, shape: Shape, setting: Setting, seed: int) -> torch.Tensor:
    """Random activations [count, H]."""
    gen = torch.Generator(setting.device).manual_seed(seed)
    x = torch.randn(count, shape.hidden_size, generator=gen, device=setting.device)
    return x.to(setting.dtype)


def check(method: str, shape: Shape, setting: Setting) -> float:
    """Largest relative error against float64 on the layer's own sizes with fewer experts.

    Raises:
        ValueError: it is above `LIMITS`, or not a number.
    """
    small = fewer_experts(shape, CHECKED_EXPERTS)
    experts = build(method, small, setting, seed=7, keep=True)
    worst = 0.0
    for count in CHECKED_TOKENS if not setting.rehearsal else CHECKED_TOKENS[:1]:
        x = tokens_in(count, small, setting, seed=count)
        weights, ids = route("uniform", count, small.num_experts, small.top_k, CHECKED_ROUTING_SEED, setting.device)
        error = relative_error(experts.forward(x, weights, ids), reference(experts, x, weights, ids))
        limit = LIMITS[setting.dtype]
        if not error <= limit:
            raise ValueError(f"wrong result: relative error {error:.2e} at {count} tokens, above {limit:.0e}")
        worst = max(worst, error)
    return worst


@dataclass(frozen=True)
class Row:
    """One method on one layer with one number of tokens; times are of the whole layer, a basis included.

    Attributes:
        bits_per_weight: of the stored layer, all included.
        bytes: a call must move, see `experts.compulsory_bytes`; mean over the graph's calls.
        experts_hit: mean over the graph's calls.
        calls: different ones in the graph.
        copies: of the weights.
        microseconds: median; None in a rehearsal, as all that follows from it.
        low, high: quartiles.
        again: the median of a second graph of the same calls; its distance from the first is the noise.
        share: of the copy bandwidth, bytes / microseconds over it.
        copy_gb_per_s: measured beside it.
        split: microseconds of each kernel.
        error: see `check`.
        source: see `source_of`.
    """

    model: str
    method: str
    dtype: str
    bits: float
    tokens: int
    routing: str
    bits_per_weight: float
    bytes: int
    experts_hit: float
    calls: int
    copies: int
    microseconds: float | None
    low: float | None
    high: float | None
    again: float | None
    replays: int
    share: float | None
    copy_gb_per_s: float | None
    split: dict[str, float]
    error: float
    source: str

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


class Bench:
    """One method on one layer, ready to be timed; rows differ in tokens and routing."""

    def __init__(self, method: str, shape: Shape, setting: Setting):
        self.method, self.shape, self.setting = method, shape, setting
        self.error = check(method, shape, setting)
        self.l2 = 1 if setting.rehearsal else torch.cuda.get_device_properties(0).L2_cache_size
        self.copy_rate = None if setting.rehearsal else timing.copy_bandwidth()
        self.experts = [build(method, shape, setting, seed=0, keep=False)]

    def calls(self, tokens: int, routing: str) -> tuple[list[timing.Call], list[int], list[int]]:
        """Different calls, the bytes each must move, and the experts each hits."""
        s, setting = self.shape, self.setting
        size = torch.finfo(setting.dtype).bits // 8
        calls: list[timing.Call] = []
        moved: list[int] = []
        hit: list[int] = []
        wanted = copies = 1
        while len(calls) < wanted:
            i = len(calls)
            if i < copies and i == len(self.experts):
                self.experts.append(self.experts[0].copy())
            weights, ids = route(routing, tokens, s.num_experts, s.top_k, 1000 * tokens + i, setting.device)
            x = tokens_in(tokens, s, setting, seed=i)
            experts = self.experts[i % copies]
            chosen = ids.unique().tolist()
            calls.append(lambda e=experts, x=x, w=weights, ids=ids: e.forward(x, w, ids))  # type: ignore[misc]
            moved.append(compulsory_bytes(experts, chosen, tokens, s.hidden_size, size))
            hit.append(len(chosen))
            wanted = 2 if setting.rehearsal else timing.calls_needed(moved[0], self.l2)
            copies = timing.copies_needed(wanted, experts.stored_bytes())
        return calls, moved, hit

    def row(self, tokens: int, routing: str) -> Row:
        """Measure."""
        calls, moved, hit = self.calls(tokens, routing)
        mean = sum(moved) / len(moved)
        row = Row(
            model=self.shape.model, method=self.method, dtype=str(self.setting.dtype).removeprefix("torch."),
            bits=self.setting.bits if self.method in BITSMOE else 0.0, tokens=tokens, routing=routing,
            bits_per_weight=round(
                8 * self.experts[0].stored_bytes() / (self.shape.num_experts * self.shape.expert_weights), 4
            ),
            bytes=round(mean), experts_hit=round(sum(hit) / len(hit), 1), calls=len(calls),
            copies=timing.copies_needed(len(calls), self.experts[0].stored_bytes()),
            microseconds=None, low=None, high=None, again=None, replays=0, share=None, copy_gb_per_s=None, split={},
            error=float(f"{self.error:.2e}"), source=source_of(self.method),
        )  # fmt: skip
        if self.copy_rate is None:
            for call in calls:
                call()
            return row
        graph = timing.captured(calls)
        first = timing.replayed(graph, len(calls))
        split = timing.kernel_split(graph, len(calls), SPLIT) if self.method in BITSMOE else {}
        again = timing.replayed(timing.captured(calls), len(calls))
        return replace(
            row, microseconds=round(first.median, 2), low=round(first.low, 2), high=round(first.high, 2),
            again=round(again.median, 2), replays=first.replays,
            share=round(mean / first.median / self.copy_rate, 4), copy_gb_per_s=round(self.copy_rate / 1e3, 1),
            split=split,
        )  # fmt: skip


def free() -> None:
    """Give the memory of what is no longer referred to back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prepare(method: str, shape: Shape, setting: Setting, tokens: Sequence[int]) -> None:
    """Run a method once for each number of tokens, so that its kernels are in Triton's cache."""
    experts = build(method, shape, setting, seed=0, keep=False)
    for count in tokens:
        weights, ids = route("uniform", count, shape.num_experts, shape.top_k, 0, setting.device)
        experts.forward(tokens_in(count, shape, setting, seed=0), weights, ids)
    if setting.device == "cuda":
        torch.cuda.synchronize()
