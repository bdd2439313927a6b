"""The shared cases with the CPU kernels, and how far from float64 a case may be.

    python -m cpu_cases REPORT            run all cases, with margins that a sanitizer sees; names to a file

`tests/unit/bitsmoe_kernels/backends/test_cpu_sanitizers.py` runs the command with a library that a sanitizer watches.
"""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.format.schema import ProjectionName
from bitsmoe_kernels.layout.cpu_layout import to_cpu_layout
from bitsmoe_kernels.reference import LayerWeights
from bruteforce import Array, array, assert_close, biases, expert_weights, gated, matrices
from bruteforce import moe as brute_moe
from builders import MadeLayer
from cpu_block import spread_out
from moe_cases import CASES, bytes_of, call_of, check_outputs, guarded_memory, poisoned_call, shards

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def packed(made: MadeLayer) -> Tensor:
    """A layer's block of bytes."""
    return to_cpu_layout(LayerWeights(made.layer, made.block_size, made.tensors))


@cache
def blocks(name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Each rank's block of bytes and map of experts."""
    return [(to_cpu_layout(weights), expert_map) for weights, expert_map in shards(name)]


@cache
def blocks_apart(name: str, fill: int) -> list[tuple[Tensor, Tensor | None]]:
    """`blocks` with margins between their pieces."""
    return [(spread_out(block, fill=fill)[0], expert_map) for block, expert_map in blocks(name)]


def run_case(
    name: str, dtype: torch.dtype, isa: str | None = None, threads: int = 1, margins: int | None = None
) -> list[Tensor]:
    """What each rank's kernels say. What no expert is to see is NaN: weights of its slots, inputs of such tokens.

    Args:
        name: of the case.
        dtype: of activations.
        isa: instruction set; None: the best.
        threads: their number.
        margins: put every tensor and every piece of the block between margins full of this int32.
    """
    x, weights, ids = poisoned_call(name, dtype)
    if margins is None:
        return [library.forward(block, x, weights, ids, local, isa, threads) for block, local in blocks(name)]
    with guarded_memory(margins) as memory:
        ranks = [(memory.put(b), m if m is None else memory.put(m)) for b, m in blocks_apart(name, margins)]
        if not CASES[name].strided:
            x, weights, ids = (memory.put(v) for v in (x, weights, ids))
        inputs = [x, weights, ids, *(b for b, _ in ranks)]
        given = [bytes_of(v).clone() for v in inputs]
        ys = [library.forward(block, x, weights, ids, local, isa, threads) for block, local in ranks]
        same = [torch.equal(a, bytes_of(b)) for a, b in zip(given, inputs, strict=True)]
    assert all(same), "an input was written to"
    check_outputs(ys, x)
    return ys


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors hold the same bytes."""
    return len(a) == len(b) and all(torch.equal(bytes_of(x), bytes_of(y)) for x, y in zip(a, b, strict=True))


def to_brain(v: Array) -> Array:
    """Rounded to bfloat16."""
    return array(torch.from_numpy(v).bfloat16())


class RoundedExperts:
    """A layer in float64 whose activations are rounded to bfloat16 wherever a matrix product takes them.

    They are rounded after they were multiplied by the components' scales: only then are weights plain codes.
    """

    def __init__(self, weights: LayerWeights) -> None:
        self.layer, self.block_size, self.tensors = weights.layer, weights.block_size, weights.tensors
        self._dumped = self.layer.model_dump(mode="json")
        self._codes = {n: matrices(self._dumped, n, self.block_size, self.tensors) for n in self.layer.projections}

    def project(self, name: ProjectionName, expert: int, v: Array) -> Array:
        """One projection of an expert: [K] -> [N]."""
        p, t = self.layer.projections[name], self.tensors
        if expert in p.kept_experts:
            return array(t[f"{name}_kept"][p.kept_experts.index(expert)]) @ to_brain(v)
        z = v
        if p.basis:
            z = array(t[f"{name}_basis"]) @ to_brain(v)
            if p.basis.bits == 8:
                z = z * array(t[f"{name}_basis_scale"])
        scale = array(t[f"{name}_component_scale"][expert])
        if p.order != "none":
            order = t[f"{name}_order"] if p.order == "shared" else t[f"{name}_order"][expert]
            scale = scale[np.argsort(order.long().numpy())]
        y = (self._codes[name][expert] / scale[:, None]).T @ to_brain(z * scale)
        if p.lowrank_total:
            ranks = t[f"{name}_lowrank_rank"].tolist()
            rows = slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
            y = y + array(t[f"{name}_lowrank_out"][rows]).T @ (array(t[f"{name}_lowrank_in"][rows]) @ to_brain(v))
        return y

    def forward(self, expert: int, v: Array) -> Array:
        """One expert on one token: [H] -> [H]."""
        if "gate_up" in self.layer.projections:
            gate, up = np.split(self.project("gate_up", expert, v), 2)
        else:
            up = self.project("up", expert, v)
            gate = self.project("gate", expert, v) if self.layer.gated else np.zeros_like(up)
        of_gate, of_up, of_down = (b[expert] for b in biases(self.layer.model_dump(mode="json"), self.tensors))
        return self.project("down", expert, gated(gate + of_gate, up + of_up, self.layer.hidden_act)) + of_down


def rounded_moe(weights: LayerWeights, x: Tensor, topk_weights: Tensor, ids: Tensor, local: Tensor | None) -> Array:
    """`bruteforce.moe` with rounded activations."""
    experts, out = RoundedExperts(weights), np.zeros(tuple(x.shape))
    places = list(range(weights.layer.num_experts)) if local is None else local.tolist()
    for t, row in enumerate(ids.tolist()):
        for slot, e in enumerate(row):
            e = places[e] if 0 <= e < len(places) else -1
            if 0 <= e < weights.layer.num_experts:
                out[t] += float(topk_weights[t, slot]) * experts.forward(e, array(x[t]))
    return out


def rms(v: Array) -> float:
    """Root mean square."""
    return float((v**2).mean() ** 0.5)


@cache
def expectation(name: str, dtype: torch.dtype) -> list[tuple[Array, float]]:
    """For each rank what a case should give in float64, and the largest error, a root mean square.

    For float32 the error is what `assert_close` allows. For 16 bits it is what rounding all activations to bfloat16
    makes, and rounding the result to its dtype.
    """
    out: list[tuple[Array, float]] = []
    x, weights, ids = call_of(name, dtype)
    for shard, local in shards(name):
        layer = shard.layer.model_dump(mode="json")
        exact, bias = expert_weights(layer, shard.block_size, shard.tensors), biases(layer, shard.tensors)
        want, error = brute_moe(exact, x, weights, ids, local, shard.layer.hidden_act, bias), 0.0
        if dtype != torch.float32 and want.size:
            of_output = array(torch.from_numpy(want).to(dtype)) - want
            error = float(np.hypot(rms(rounded_moe(shard, x, weights, ids, local) - want), rms(of_output)))
        out.append((want, error))
    return out


def check(name: str, dtype: torch.dtype, ys: Sequence[Tensor]) -> None:
    """Hold the outputs of a case's ranks to their bounds."""
    for y, (want, error) in zip(ys, expectation(name, dtype), strict=True):
        if not want.size:
            continue
        assert y.isfinite().all()
        if dtype == torch.float32:
            assert_close(y, want)
        else:
            assert rms(array(y) - want) <= error, f"{rms(array(y) - want)} of {rms(want)}, more than {error}"


@contextmanager
def poisoned_margins(block: Tensor) -> Iterator[Tensor]:
    """The same block with its pieces apart; a sanitizer stops whoever reads or writes between them."""
    far, margins = spread_out(block)
    process = ctypes.CDLL(None)
    mark = {on: getattr(process, f"__asan_{on}poison_memory_region") for on in ("", "un")}
    for on in mark.values():
        on.argtypes, on.restype = [ctypes.c_void_p, ctypes.c_size_t], None
    for start, size in margins:
        mark[""](far.data_ptr() + start, size)
    yield far
    mark["un"](far.data_ptr(), far.nbytes)


def run_watched(name: str, isas: Sequence[str]) -> None:
    """Run one case where a sanitizer watches: every tensor is an allocation of its own, without a spare byte."""
    for block, local in blocks(name):
        local = None if local is None else local.clone()
        with poisoned_margins(block) as far:
            for dtype in DTYPES:
                x, weights, ids = poisoned_call(name, dtype)
                if not CASES[name].strided:
                    x, weights, ids = (v.clone() for v in (x, weights, ids))
                for isa in isas:
                    library.forward(far, x, weights, ids, local, isa, 2)


def main() -> None:
    """Run the cases named on the command line, or all, by the instruction sets of this processor."""
    torch.set_num_threads(2)
    isas = library.usable()
    with Path(sys.argv[1]).open("w") as done:
        for name in sys.argv[2:] or list(CASES):
            run_watched(name, isas)
            done.write(f"{name}: {', '.join(isas)}\n")


if __name__ == "__main__":
    main()
