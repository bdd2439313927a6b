"""Pieces of PTX run by the machine, one warp or more of one program."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ptx_machine.control import Code, Launch
from ptx_machine.memory import GlobalMemory
from tensor_core import MatrixUnit

_WIDTH = {"b16": ("%rs", 2), "b32": ("%r", 4), "b64": ("%rd", 8)}


def text_of(body: str, parameters: int, threads: int) -> str:
    """A kernel with 64-bit parameters p0, p1, ... and registers enough."""
    given = ",".join(f".param .u64 p{i}" for i in range(parameters))
    return f"""
.extern .shared .align 16 .b8 memory[];
.visible .entry snippet({given})
.reqntid {threads}
{{
.reg .pred %p<20>;
.reg .b16 %rs<200>;
.reg .b32 %r<400>;
.reg .b64 %rd<200>;
{body}
ret;
}}
"""


def run(body: str, tensors: Sequence[torch.Tensor], threads: int = 32, shared: int = 0, grid: Sequence[int] = (1, 1, 1),
        seed: int = 0, together: int = 4, rounding: MatrixUnit | None = None) -> None:  # fmt: skip
    """Run `body` with the tensors' addresses as parameters. `shared`: bytes of each program."""
    memory = GlobalMemory()
    arguments = [memory.put(f"p{i}", tensor) for i, tensor in enumerate(tensors)]
    code = Code(text_of(body, len(tensors), threads))
    Launch(memory, np.random.default_rng(seed), rounding).run(code, grid, arguments, shared, together)


def load(place: int, parameter: int, kind: str = "b32", count: int = 1) -> str:
    """Registers from `place` on: `count` numbers of a thread, which lie side by side in a parameter's tensor."""
    letter, size = _WIDTH[kind]
    lines = [
        "mov.u32 %r399, %tid.x;",
        f"ld.param.b64 %rd198, [p{parameter}];",
        f"mad.wide.u32 %rd199, %r399, {size * count}, %rd198;",
    ]
    lines += [f"ld.global.{kind} {{ {letter}{place + i} }}, [ %rd199 + {size * i} ];" for i in range(count)]
    return "\n".join(lines)


def store(place: int, parameter: int, kind: str = "b32", count: int = 1) -> str:
    """The reverse of `load`."""
    letter, size = _WIDTH[kind]
    lines = [
        "mov.u32 %r399, %tid.x;",
        f"ld.param.b64 %rd198, [p{parameter}];",
        f"mad.wide.u32 %rd199, %r399, {size * count}, %rd198;",
    ]
    lines += [f"st.global.{kind} [ %rd199 + {size * i} ], {{ {letter}{place + i} }};" for i in range(count)]
    return "\n".join(lines)


_DTYPES: dict[str, Any] = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
_TORCH = {"b16": torch.int16, "b32": torch.int32, "b64": torch.int64}


def results(instruction: str, *inputs: tuple[str, Sequence[int]], out: str = "b32") -> list[int]:
    """What an instruction gives for bits of inputs, each with its class. It reads registers 0, 1, ..., writes 9."""
    n = len(inputs[0][1])
    threads = -(-n // 32) * 32
    tensors = []
    for kind, bits in inputs:
        padded = np.zeros(threads, _DTYPES[kind])
        padded[:n] = np.asarray([b & (1 << 8 * padded.itemsize) - 1 for b in bits], _DTYPES[kind])
        tensors.append(torch.from_numpy(padded.view(f"i{padded.itemsize}")))
    tensors.append(torch.zeros(threads, dtype=_TORCH[out]))
    loads = "\n".join(load(i, i, kind) for i, (kind, _) in enumerate(inputs))
    run(f"{loads}\n{instruction}\n{store(9, len(inputs), out)}", tensors, threads)
    return tensors[-1].numpy().view(_DTYPES[out])[:n].tolist()
