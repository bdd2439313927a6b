"""The functions of the compiled CPU kernels, by ctypes. The library is loaded at the first use."""

import ctypes
import os
from ctypes import Structure, byref, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bitsmoe_kernels._cpu.build import LIBRARY
from bitsmoe_kernels.errors import BitsmoeError

INSTRUCTION_SETS = {"amx": 3, "avx512": 2, "avx2": 1, "neon": 4}
"""By preference, with the library's numbers for them."""
TITLES = {"amx": "AMX and AVX-512 VNNI", "avx512": "AVX-512 VNNI", "avx2": "AVX2", "neon": "NEON dot products"}
ENVIRONMENT = "BITSMOE_CPU_ISA"
"""Environment variable that names the instruction set to use, for tests and comparisons; unset: the best there is."""
PATH = Path(__file__).resolve().parent / LIBRARY
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TOKENS_AT_ONCE = 512
"""Tokens of one pass. Longer inputs are cut, which bounds the buffers."""
HEAD_BYTES = 128
"""Of `struct Layer` in layout.h."""
WRONG_LAYOUT = "the weights are not in the layout of the compiled CPU kernels: install bitsmoe-vllm again"


class Call(Structure):
    """`struct Call` of layout.h."""

    _fields_ = (
        ("layer", c_void_p), ("x", c_void_p), ("ids", c_void_p), ("weights", c_void_p), ("map", c_void_p),
        ("out", c_void_p), ("tokens", c_int64), ("top_k", c_int64), ("dtype", c_int64), ("id_bytes", c_int64),
        ("map_size", c_int64),
    )  # fmt: skip


FUNCTIONS: dict[str, tuple[type[c_int | c_int64] | None, list[type]]] = {
    "bitsmoe_has": (c_int, [c_int]),
    "bitsmoe_large_pages": (None, [c_void_p, c_int64]),
    "bitsmoe_pack": (
        None,
        [c_void_p, c_int, c_int64, c_void_p, c_void_p, c_int64, c_int, c_int64, c_int64, c_int64, c_int64, c_void_p],
    ),
    "bitsmoe_forward": (c_int, [c_int, c_void_p, c_int64, c_int]),
    "bitsmoe_round": (c_int, [c_int, c_int, c_void_p, c_int]),
    "bitsmoe_rounding_floats": (c_int64, [c_int, c_int64, c_int64, c_int64, c_int]),
    "bitsmoe_pack_codes": (c_int64, [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int, c_void_p]),
}
"""Result and arguments of all functions. One that is not declared would be given the lower half of a pointer."""


@cache
def load() -> ctypes.CDLL:
    """The library.

    Raises:
        OSError: it is not there, or cannot be loaded.
        AttributeError: it lacks a function, so it is of another version.
    """
    library = ctypes.CDLL(os.environ.get("BITSMOE_CPU_LIBRARY") or str(PATH))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def why_not() -> str | None:
    """Why the CPU kernels cannot be used on this machine, as a sentence without a full stop; None where they can."""
    if not PATH.exists() and not os.environ.get("BITSMOE_CPU_LIBRARY"):
        return (
            "they were not compiled when bitsmoe-vllm was installed: install a C++ compiler (Debian: g++), then "
            "bitsmoe-vllm again"
        )
    try:
        load()
    except (OSError, AttributeError) as e:
        return f"their library cannot be loaded ({e}): install bitsmoe-vllm again"
    chosen = os.environ.get(ENVIRONMENT)
    if chosen and chosen not in INSTRUCTION_SETS:
        return f"{ENVIRONMENT} is {chosen!r}, not one of {', '.join(INSTRUCTION_SETS)}"
    if not usable():
        return f"this processor has none of {', '.join(TITLES[name] for name in (chosen and [chosen]) or TITLES)}"
    return None


@cache
def usable() -> tuple[str, ...]:
    """Instruction sets of this processor that the kernels can use, best first; one where the environment names it."""
    chosen = os.environ.get(ENVIRONMENT)
    return tuple(n for n, number in INSTRUCTION_SETS.items() if chosen in (None, "", n) and load().bitsmoe_has(number))


@cache
def best() -> str:
    """The instruction set that is used."""
    return usable()[0]


def large_pages(memory: Tensor) -> None:
    """Ask for large pages behind a tensor: rows that lie far apart are read faster. Call it before filling."""
    load().bitsmoe_large_pages(memory.data_ptr(), memory.nbytes)


def forward(
    layer: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    isa: str | None = None,
    threads: int = 0,
) -> Tensor:
    """The routed experts' output, see `reference.moe_forward`.

    Args:
        layer: uint8, `layout.cpu_layout.to_cpu_layout`.
        x: [T, H], float32, float16 or bfloat16.
        topk_weights: [T, top_k].
        topk_ids: [T, top_k], int32 or int64.
        expert_map: [global experts] or None.
        isa: a key of `INSTRUCTION_SETS`; None: the best.
        threads: 0: as many as torch uses.

    Returns:
        [T, H] in x's dtype.

    Raises:
        BitsmoeError: `isa` cannot be used, there is no memory for the buffers, `layer` is in another layout, or shapes
            do not fit together.
    """
    # The kernels trust in sizes: they are checked here.
    head = (c_int64 * 4).from_address(layer.data_ptr()) if layer.nbytes >= HEAD_BYTES else (0, 0, 0, 0)
    _, size, _, hidden = head  # as `struct Layer` begins
    if size != layer.nbytes:
        raise BitsmoeError(WRONG_LAYOUT)
    if x.shape[1] != hidden or topk_weights.shape != topk_ids.shape or len(topk_ids) != len(x):
        shapes = ", ".join(str(list(t.shape)) for t in (x, topk_weights, topk_ids))
        raise BitsmoeError(f"activations, routing weights and ids of shapes {shapes} do not fit hidden size {hidden}")
    x = x.contiguous()
    out = torch.empty_like(x)
    if not len(x):
        return out
    if topk_ids.dtype not in (torch.int32, torch.int64):
        topk_ids = topk_ids.long()
    ids, weights = topk_ids.contiguous(), topk_weights.float().contiguous()
    local = expert_map
    if local is not None:
        # An entry beyond 32 bits names no expert, and must not become one.
        local = (local if local.dtype == torch.int32 else local.clamp(-1, 2**31 - 1).int()).contiguous()
    call = Call(
        layer.data_ptr(), x.data_ptr(), ids.data_ptr(), weights.data_ptr(), None if local is None else local.data_ptr(),
        out.data_ptr(), len(x), ids.shape[1], DTYPES[x.dtype], ids.itemsize, 0 if local is None else len(local),
    )  # fmt: skip
    chosen = best() if isa is None else isa
    if chosen not in usable():  # asking also makes the system grant AMX to this process
        raise BitsmoeError(f"instruction set {chosen!r} cannot be used here, only {', '.join(usable())}")
    status = load().bitsmoe_forward(INSTRUCTION_SETS[chosen], byref(call), TOKENS_AT_ONCE, threads)
    if status == 1:
        raise BitsmoeError("the CPU kernels found no memory for their buffers")
    if status:
        raise BitsmoeError(WRONG_LAYOUT)
    return out
