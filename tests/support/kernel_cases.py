"""The shared cases with the Triton kernels, and how far from float64 a case may be.

The same cases run under Triton's interpreter (tests/unit) and on a GPU (tests/gpu).
"""

import importlib.util
import inspect
import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bitsmoe_kernels.backends import triton_launch as moe
from bitsmoe_kernels.format.schema import ProjectionName
from bitsmoe_kernels.layout.pack import KernelLayer, to_kernel_layout
from bitsmoe_kernels.sharding import shard_channels
from bruteforce import Array, array, assert_close, biases, gated, matrices
from builders import MadeLayer
from moe_cases import CASES, bytes_of, call_of, check_outputs, exact, guarded_memory, made_layer, poisoned_call, shards

DTYPES = (torch.float16, torch.bfloat16)
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""u, half a unit in the last place: what one rounding costs at most, relative to the number rounded."""

NAMES = [name for name, case in CASES.items() if case.triton]
"""The cases that the Triton kernels can compute."""

WARMED_UP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
"""Numbers of tokens that compile all a layer ever needs: of the sizes vLLM captures, and the longest step there is."""


def parts(name: str, dtype: torch.dtype, device: str = "cpu") -> list[tuple[KernelLayer, Tensor | None]]:
    """Each rank's layer in the kernels' layout with its map of experts."""
    out = []
    for weights, expert_map in shards(name):
        ours = to_kernel_layout(weights, dtype, CASES[name].kwidth)
        ours = KernelLayer.of({k: v.to(device) for k, v in ours.tensors().items()}, ours.static())
        out.append((ours, None if expert_map is None else expert_map.to(device)))
    return out


@contextmanager
def shuffled_grid(seed: int) -> Iterator[list[list[tuple[int, ...]]]]:
    """Triton's interpreter runs programs in a random order, no longer one axis after another.

    Yields:
        The programs of every launch as they ran.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    rng = random.Random(seed)
    seen: list[list[tuple[int, ...]]] = []
    left: list[tuple[int, ...]] = []
    begin, go_to = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx

    def set_grid_dim(self: Any, *sizes: int) -> None:
        assert not left, "programs of the last launch did not run"
        begin(self, *sizes)
        left.extend(itertools.product(*map(range, sizes)))
        rng.shuffle(left)
        seen.append([])

    def set_grid_idx(self: Any, *_: int) -> None:
        seen[-1].append(left.pop())
        go_to(self, *seen[-1][-1])

    with (
        patch.object(InterpreterBuilder, "set_grid_dim", set_grid_dim),
        patch.object(InterpreterBuilder, "set_grid_idx", set_grid_idx),
    ):
        yield seen


def run_case(name: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """What each rank's kernels say. What no expert is to see is NaN: weights of its slots, inputs of such tokens."""
    case = CASES[name]
    x, weights, ids = (v.to(device) for v in poisoned_call(name, dtype))
    with ExitStack() as patches:
        for limit, value in case.limits.items():
            patches.enter_context(patch.object(moe, limit, value))
        ranks = parts(name, dtype, device)
        if device == "cpu":  # on a GPU margins would hide an access from its memory checker
            memory = patches.enter_context(guarded_memory())
            ranks = [(layer, m if m is None else memory.put(m)) for layer, m in ranks]
            if not case.strided:
                x, weights, ids = (memory.put(v) for v in (x, weights, ids))
        given = [bytes_of(v).clone() for v in (x, weights, ids)]
        ys = [moe.moe_forward(layer, x, weights, ids, m, tile=case.tile) for layer, m in ranks]
        same = [torch.equal(a, bytes_of(b)) for a, b in zip(given, (x, weights, ids), strict=True)]
    assert all(same), "an input was written to"
    check_outputs(ys, x)
    return ys


def stored(array: Array, dtype: torch.dtype) -> Array:
    """Weights of 16 bits as the kernels keep them, in the dtype of activations."""
    return torch.from_numpy(array).to(dtype).double().numpy()


def contractions(
    made: MadeLayer, name: ProjectionName, expert: int, dtype: torch.dtype
) -> tuple[Array, Array, Array, Array]:
    """What an expert's projection contracts, W = M S: M [N, C] and S [C, K], without rounding and as stored.

    S x is what the kernels round: coordinates in the basis or the input itself, and a compensator's inner products.
    """
    layer, tensors = made.layer.model_dump(mode="json"), made.tensors
    p = layer["projections"][name]
    K = made.layer.side(name, "input")
    if expert in p["kept_experts"]:
        kept = array(tensors[f"{name}_kept"][p["kept_experts"].index(expert)])
        return kept, np.eye(K), stored(kept, dtype), np.eye(K)
    M = matrices(layer, name, made.block_size, tensors)[expert].T
    S = np.eye(K)
    if p["basis"]:
        S = array(tensors[f"{name}_basis"])
        if p["basis"]["bits"] == 8:
            S = S * array(tensors[f"{name}_basis_scale"])[:, None]
    kept_S = stored(S, dtype) if p["basis"] and p["basis"]["bits"] == 16 else S
    if not p["lowrank_total"]:
        return M, S, M, kept_S
    ranks = tensors[f"{name}_lowrank_rank"].tolist()
    rows = slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
    into, out = array(tensors[f"{name}_lowrank_in"][rows]), array(tensors[f"{name}_lowrank_out"][rows]).T
    S = np.concatenate([S, into])
    return np.concatenate([M, out], 1), S, np.concatenate([M, stored(out, dtype)], 1), S


DRAWS = 256


def bounds(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Largest errors a case may show, max and root mean square, each relative to that of the exact values.

    The layer is computed in float64 with noise wherever the kernels round: the activations that gate, up and down
    contract, and each rank's output; 16-bit weights are rounded to the activations' dtype. The noise is uniform within
    u of the number, which is what a rounding does at worst, just above a power of two (elsewhere within as little as
    u / 2). The kernels, one draw of milder noise, must stay within the worst of all draws.

    Left out, as it is small: float32 sums. A code's constant 1 is up to 2^(m+1) times its smallest step, so they round
    to 2^(m+1) 2^-24 of a term: u / 4 for float16, 1/16 of one more rounding in squares; far less for bfloat16.
    """
    case, made, u = CASES[name], made_layer(name), UNIT[dtype]
    rng = np.random.default_rng(0)
    x, weights, ids = call_of(name, dtype)
    T, inner = len(x), case.intermediate

    def noisy(v: Array) -> Array:
        return v * (1 + u * rng.uniform(-1, 1, (DRAWS, *v.shape[-1:])))

    def hidden(expert: int, v: Array, exact: bool) -> Array:
        out = []
        for p in made.layer.projections:
            if p != "down":
                M, S, stored_M, stored_S = parts_of[p, expert]
                out.append((S @ v)[None] @ M.T if exact else noisy(stored_S @ v) @ stored_M.T)
        gate, up = np.split(np.concatenate(out, 1), 2, 1) if made.layer.gated else (np.zeros_like(out[0]), out[0])
        return gated(gate + of_gate[expert], up + of_up[expert], made.layer.hidden_act)

    used = sorted({e for row in ids.tolist() for e in row if 0 <= e < case.experts})
    of_gate, of_up, of_down = biases(made.layer.model_dump(mode="json"), made.tensors)
    parts_of = {(p, e): contractions(made, p, e, dtype) for p in made.layer.projections for e in used}
    want, got = np.zeros((T, case.hidden)), np.zeros((DRAWS, T, case.hidden))
    for t in range(T):
        per_rank = np.zeros((len(case.ranks), DRAWS, case.hidden))
        for slot, e in enumerate(ids[t].tolist()):
            if e not in used:
                continue
            M, S, stored_M, _ = parts_of["down", e]
            w = float(weights[t, slot])
            want[t] += w * ((hidden(e, array(x[t]), True) @ S.T @ M.T)[0] + of_down[e])
            h = hidden(e, array(x[t]), False)
            for r, (tp_rank, tp_size, experts) in enumerate(case.ranks):
                if experts is None or e in experts:
                    mine = np.zeros(inner)
                    mine[shard_channels(inner, case.block, tp_rank, tp_size)] = 1
                    per_rank[r] += w * (noisy(h * mine @ S.T) @ stored_M.T + of_down[e] * (tp_rank == 0))
        got[:, t] = sum(noisy(part) for part in per_rank)
    error = got - want
    largest, size = np.abs(want).max(initial=0), (want**2).mean() ** 0.5
    if not largest:
        return 0.0, 0.0
    return np.abs(error).max() / largest, ((error**2).mean((1, 2)) ** 0.5).max() / size


def check(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Run one case and hold it to its bounds."""
    got = sum((y.double().cpu() for y in run_case(name, dtype, device)), torch.zeros((), dtype=torch.float64))
    want = exact(name, dtype)
    max_error, rms_error = bounds(name, dtype)
    if want.size:
        assert_close(got, want, max_error, rms_error)


def with_fault(source: ModuleType, right: str, wrong: str, folder: Path, **names: Any) -> Any:
    """A kernels' module with one piece of its text replaced. names: what the new text refers to."""
    text = inspect.getsource(source)
    assert text.count(right) == 1
    name = f"faulty_{source.__name__.rsplit('.', 1)[-1]}"
    path = folder / f"{name}.py"
    path.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    vars(faulty).update(names)
    spec.loader.exec_module(faulty)
    return faulty
