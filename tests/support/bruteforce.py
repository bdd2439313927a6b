"""What a checkpoint means, written from SPEC.md alone: numpy, float64, loops.

It uses nothing of `bitsmoe_kernels`: from a layer it reads only the fields of its JSON object. Slow on purpose.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def array(tensor: Tensor) -> Array:
    """A tensor's values as float64."""
    return tensor.double().numpy()


def codes_and_bits(
    words: list[list[int]], bits: list[list[int]], components: int, block_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Codes [E, C, F] and each row's bit-width [E, C], read bit by bit (SPEC.md, section 5)."""
    E, F = len(bits), len(words[0]) if words else 0
    q = np.zeros((E, components, F), np.int64)
    width = np.zeros((E, components), np.int64)
    # All columns at once; >> on a negative integer is that of two's complement with endless sign bits.
    rows = [np.array(row, np.int64) for row in words]
    row = 0
    for e in range(E):
        for block, b in enumerate(bits[e]):
            for i in range(block_size):
                c = block * block_size + i
                if c >= components:
                    break
                width[e, c] = b
                for j in range(b):
                    q[e, c] += (rows[row + j] >> i & 1) << j
            row += b
    assert row == len(words)
    return q, width


def matrices(layer: dict[str, Any], name: str, block_size: int, tensors: Mapping[str, Tensor]) -> Array:
    """A [E, C, F]: all experts' mixed-bit matrices with their rows in the order of the components."""
    p = layer["projections"][name]
    s, t = array(tensors[f"{name}_component_scale"]), array(tensors[f"{name}_feature_scale"])
    E, C = s.shape
    words, bits = tensors[f"{name}_codes"].tolist(), tensors[f"{name}_bits"].tolist()
    A = np.zeros((E, C, t.shape[1]))
    if not words:
        return A
    q, width = codes_and_bits(words, bits, C, block_size)
    for e in range(E):
        for i in range(C):
            c = i
            if p["order"] == "shared":
                c = int(tensors[f"{name}_order"][i])
            elif p["order"] == "expert":
                c = int(tensors[f"{name}_order"][e, i])
            if width[e, i]:
                A[e, c] = s[e, i] * t[e] * (q[e, i] - (2.0 ** width[e, i] - 1) / 2)
    return A


def weights(layer: dict[str, Any], name: str, block_size: int, tensors: Mapping[str, Tensor]) -> Array:
    """W [E, N, K] of one projection (SPEC.md, section 6)."""
    p = layer["projections"][name]
    A = matrices(layer, name, block_size, tensors)
    E, C, _ = A.shape
    D = np.eye(C)
    if p["basis"]:
        D = array(tensors[f"{name}_basis"])
        if p["basis"]["bits"] == 8:
            D = D * array(tensors[f"{name}_basis_scale"])[:, None]
    W = np.stack([A[e].T @ D if p["component_axis"] == "input" else D.T @ A[e] for e in range(E)])
    if p["lowrank_total"]:
        row = 0
        for e, rank in enumerate(tensors[f"{name}_lowrank_rank"].tolist()):
            for j in range(row, row + rank):
                W[e] += np.outer(array(tensors[f"{name}_lowrank_out"][j]), array(tensors[f"{name}_lowrank_in"][j]))
            row += rank
    for i, e in enumerate(p["kept_experts"]):
        W[e] = array(tensors[f"{name}_kept"][i])
    return W


def expert_weights(layer: dict[str, Any], block_size: int, tensors: Mapping[str, Tensor]) -> tuple[Array, Array, Array]:
    """gate [E, I, H], up [E, I, H], down [E, H, I]. Gate is all zeros where there is none: nothing reads it."""
    down = weights(layer, "down", block_size, tensors)
    if "gate_up" not in layer["projections"] and "gate" not in layer["projections"]:
        up = weights(layer, "up", block_size, tensors)
        return np.zeros_like(up), up, down
    if "gate" in layer["projections"]:
        gate, up = (weights(layer, n, block_size, tensors) for n in ("gate", "up"))
    else:
        both = weights(layer, "gate_up", block_size, tensors)
        gate, up = both[:, : layer["intermediate_size"]], both[:, layer["intermediate_size"] :]
    return gate, up, down


def biases(layer: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Array, Array, Array]:
    """Of gate [E, I], up [E, I] and down [E, H]; zeros where a projection has none."""
    E, I, H = (layer[key] for key in ("num_experts", "intermediate_size", "hidden_size"))  # noqa: E741

    def bias(name: str, outputs: int) -> Array:
        return array(tensors[f"{name}_shift"]) if layer["projections"][name].get("bias") else np.zeros((E, outputs))

    if set(layer["projections"]) == {"up", "down"}:
        return np.zeros((E, I)), bias("up", I), bias("down", H)
    if "gate" in layer["projections"]:
        return bias("gate", I), bias("up", I), bias("down", H)
    both = bias("gate_up", 2 * I)
    return both[:, :I], both[:, I:], bias("down", H)


def gated(g: Array, u: Array, hidden_act: str) -> Array:
    """What enters down, by the layer's `hidden_act`."""
    with np.errstate(over="ignore"):
        return _gated(g, u, hidden_act)


def _gated(g: Array, u: Array, hidden_act: str) -> Array:
    if hidden_act == "relu2":  # without a gate
        return np.maximum(u, 0.0) ** 2
    if hidden_act == "gelu_pytorch_tanh":
        return 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u
    if hidden_act == "swigluoai":
        g, u = np.minimum(g, 7.0), np.clip(u, -7.0, 7.0)
        return g / (1 + np.exp(-1.702 * g)) * (u + 1)
    if hidden_act == "silu_clamp10":
        g, u = np.minimum(g, 10.0), np.clip(u, -10.0, 10.0)
    else:
        assert hidden_act == "silu"
    return g / (1 + np.exp(-g)) * u


def moe(
    experts: tuple[Array, Array, Array],
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    hidden_act: str = "silu",
    bias: tuple[Array, Array, Array] | None = None,
) -> Array:
    """Routed experts of a layer, one token and one of its experts at a time: [T, H]. Ids of no expert add nothing."""
    out = np.zeros(tuple(x.shape))
    gate, up, down = experts
    of_gate, of_up, of_down = bias or (np.zeros(w.shape[:2]) for w in experts)
    local = list(range(len(gate))) if expert_map is None else expert_map.tolist()
    with np.errstate(all="ignore"):  # poisoned tokens
        for token, ids in enumerate(topk_ids.tolist()):
            for slot, expert in enumerate(ids):
                expert = local[expert] if 0 <= expert < len(local) else -1
                if not 0 <= expert < len(gate):
                    continue
                v = array(x[token])
                h = gated(gate[expert] @ v + of_gate[expert], up[expert] @ v + of_up[expert], hidden_act)
                out[token] += float(topk_weights[token, slot]) * (down[expert] @ h + of_down[expert])
    return out


def assert_close(got: Tensor, want: Array, max_error: float = 1e-5, rms_error: float = 3e-6) -> None:
    """Errors relative to the largest and to the root-mean-square wanted value.

    The defaults are for float32 against float64 with sums of some hundred terms: float32 rounds at 6e-8.
    """
    assert tuple(got.shape) == want.shape
    error = array(got) - want
    assert np.isfinite(error).all()
    assert np.abs(error).max(initial=0) <= max_error * np.abs(want).max(initial=0)
    assert (error**2).mean() <= rms_error**2 * (want**2).mean()
