"""How long one MoE layer takes, by a model of time: estimates for GPUs, none of them measured.

A launch takes the longest of four times: its bytes at the memory's speed, its products at the matrix units' speed, its
longest program, and its programs, round after round, on the multiprocessor that has most of them. A program takes its
reads that wait for each other, and its instructions, at the rate that the warps beside it leave. Instructions are
those that a warp executes at a layer's real numbers of tiles: `walk.py` follows it through the machine code. Programs
that end early for lack of a block are left out.

Down ends with the sum over a token's experts. For blocks of few tokens it stands behind a branch that only a program
takes which ends some token: which stores the last of its slots. Both ways are followed, and weighed by `_ending`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from benchmarks.kernels import machine_code, walk
from benchmarks.kernels.grouped import INNER, _grouped_kernel, tile_of
from benchmarks.kernels.routing import REALISTIC, route
from benchmarks.kernels.shapes import Shape
from benchmarks.kernels.synthetic import NATURAL, WHITENED, BitsmoeExperts, fewer_experts, format_layer
from bitsmoe_kernels._triton import prepare
from bitsmoe_kernels.backends.launch_config import TILES, Tile, basis_tile, pick_tile
from bitsmoe_kernels.backends.triton_launch import ROUTE_TOKENS, SCALE_CHUNK, SCALE_SLOTS
from bitsmoe_kernels.layout.fields import TILE

READ = 0.7
"""Microseconds from a read of memory to its data while others read too (assumed)."""
LAUNCH = 1.0
"""Microseconds from the end of a kernel to the first instruction of the next one in a CUDA graph (assumed)."""
APART = 3.0
"""Cycles from one instruction of a warp to its next, if no other warp is in the way (assumed)."""
SCHEDULERS = 4
"""Warp instructions that a multiprocessor begins in a cycle."""
USABLE = 0.9
"""Of the memory's speed (assumed)."""
OLDER = 0.6
"""Of the matrix units' speed that `mma.sync` reaches where another instruction is the native one: sm_90 (about 62% in
arXiv 2402.13499) and, assumed, sm_100."""
SAMPLED = 4
"""Experts whose tiles stand for all."""
SEED = 0
TOKENS = (1, 8, 64, 256, 2048)
MARLIN_PER_WEIGHT = 1.0
"""Instructions of a thread for each weight that it dequantizes and multiplies in GPTQ-Marlin (assumed)."""


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU; figures of its maker's data sheets and CUDA's table of compute capabilities.

    Attributes:
        name: as results name it.
        capability: such as 90.
        multiprocessors: their number.
        gigahertz: of the multiprocessors under load.
        bandwidth: of the memory, bytes per microsecond.
        matrix: multiplications with additions of the matrix units in a microsecond, 16 bits, sums in float32, dense.
        shared_bytes: of a multiprocessor.
        warps: that a multiprocessor holds.
    """

    name: str
    capability: int
    multiprocessors: int
    gigahertz: float
    bandwidth: float
    matrix: float
    shared_bytes: int
    warps: int


GPUS = (
    Gpu("A100", 80, 108, 1.41, 2.04e6, 156e6, 164 << 10, 64),
    Gpu("H100", 90, 132, 1.75, 3.35e6, 495e6, 228 << 10, 64),
    Gpu("H200", 90, 132, 1.75, 4.8e6, 495e6, 228 << 10, 64),
    Gpu("RTX 4090", 89, 128, 2.52, 1.01e6, 83e6, 100 << 10, 48),
    Gpu("RTX 5090", 120, 170, 2.41, 1.79e6, 105e6, 100 << 10, 48),
    Gpu("B200", 100, 148, 1.85, 8.0e6, 1125e6, 228 << 10, 64),
)
REGISTERS = 65_536


@dataclass(frozen=True)
class Programs:
    """Programs of one launch that do the same.

    Attributes:
        count: of those that have work.
        instructions: that a warp executes.
        reads: of memory that wait for each other.
        products: multiplications with additions of the matrix units.
    """

    count: int
    instructions: float
    reads: float
    products: float = 0.0


@dataclass(frozen=True)
class Launch:
    """One kernel of a layer.

    Attributes:
        kernel: its name.
        programs: by what they do.
        warps: of a program.
        bytes: read and written in all.
        older: whether products are `mma.sync`.
        registers: of a thread.
        shared_bytes: of a program.
    """

    kernel: str
    programs: tuple[Programs, ...]
    warps: int
    bytes: float
    older: bool
    registers: int
    shared_bytes: int

    def microseconds(self, gpu: Gpu) -> float:
        """From its launch to its end."""
        at_once = min(
            REGISTERS // (self.registers * 32 * self.warps),
            gpu.shared_bytes // max(1, self.shared_bytes),
            gpu.warps // self.warps,
        )
        # Programs go to multiprocessors in turn, in the order of the grid.
        firsts = [sum(p.count for p in self.programs[:i]) for i in range(len(self.programs))]
        slowest = 0.0
        for own in range(gpu.multiprocessors):
            has = [
                len(range(first + (own - first) % gpu.multiprocessors, first + p.count, gpu.multiprocessors))
                for first, p in zip(firsts, self.programs, strict=True)
            ]
            together = min(sum(has), max(1, at_once))
            pace = max(APART, together * self.warps / SCHEDULERS) / gpu.gigahertz / 1e3
            each = [p.reads * READ + p.instructions * pace for p in self.programs]
            rounds = sum(n * time for n, time in zip(has, each, strict=True)) / max(1, together)
            slowest = max(slowest, rounds, *(time for n, time in zip(has, each, strict=True) if n), 0.0)
        share = OLDER if self.older and gpu.capability in (90, 100) else 1.0
        products = sum(p.count * p.products for p in self.programs) / gpu.matrix / share / USABLE
        return LAUNCH + max(self.bytes / gpu.bandwidth / USABLE, products, slowest)


@dataclass(frozen=True)
class Row:
    """An estimate. Attributes as the table's columns.

    Attributes:
        gpu: see `GPUS`.
        model: see `SHAPES`.
        method: whose kernels.
        tokens: of the call.
        basis: whether gate and up share one.
        microseconds: of the layer, an estimate.
        floor: microseconds that its bytes take at the memory's full speed.
        launches: of kernels.
        per_weight: instructions that a thread executes for each weight it turns into a number; 0: not counted.
        per_weight_gate_up, per_weight_down: the two kernels that this is the mean of.
    """

    gpu: str
    model: str
    method: str
    tokens: int
    basis: bool
    microseconds: float
    floor: float
    launches: int
    per_weight: float
    per_weight_gate_up: float
    per_weight_down: float


@dataclass(frozen=True)
class _Kernel:
    """One that is compiled, with what its binary says of it, its function, and whether its products are `mma.sync`."""

    compiled: Any
    lines: tuple[str, ...]
    source: Any
    registers: int
    shared_bytes: int
    older: bool

    @classmethod
    def of(cls, compiled: Any, source: Any) -> "_Kernel":
        """Read a binary."""
        used = machine_code.resources(compiled)
        lines = tuple(machine_code.machine_code(compiled))
        older = not any("HGMMA" in line for line in lines)
        return cls(compiled, lines, source, used["registers"], used["shared_bytes"], older)

    def executed(self, capability: int, program: Sequence[int], grid: Sequence[int], **given: Any) -> Counter[str]:
        """Instructions of a warp; see `walk.followed`."""
        return walk.followed(self.compiled, self.lines, self.source, capability, given, program, grid)


@cache
def _gemm_code(capability: int, tile: Tile, widths: int) -> dict[str, _Kernel]:
    """Both GEMM kernels with these widths."""
    sources = dict(zip(("gate_up", "down"), machine_code.gemm_sources(tile), strict=True))
    made = machine_code.gemm_kernels(capability, tile, False, widths)
    return {k: _Kernel.of(v, sources[k]) for k, v in made}


@cache
def _other_code(capability: int) -> dict[str, _Kernel]:
    made = machine_code.other_kernels(capability, False)
    return {k: _Kernel.of(v, prepare.begin_kernel if k.startswith("begin") else prepare.scale_kernel) for k, v in made}


@cache
def _layer(shape: Shape, form: str, bits: float, capability: int) -> BitsmoeExperts:
    """A few experts of real size, for their numbers of tiles."""
    few = fewer_experts(shape, SAMPLED)
    return BitsmoeExperts(format_layer(few, form, bits, SEED, "cpu"), torch.bfloat16, capability, keep=False)


def _ending(tokens: float, top_k: int) -> float:
    """The share of down's programs that end a token, if their blocks have so many tokens on average.

    One of a token's top_k blocks ends it, any of them alike. Blocks of equal size: of unequal ones fewer would.
    """
    return 1 - (1 - 1 / top_k) ** tokens


@cache
def _gemm_executed(
    kernel: str, capability: int, tile: Tile, shape: Shape, form: str, bits: float, ends: bool
) -> tuple[float, float, float]:
    """Of gate and up or of down: instructions of a warp, weights of a thread, a program's products.

    Averaged over the sampled experts. One token of a block is somebody's. ends: whether a program of down ends it.

    Raises:
        ValueError: the followed warp did not make the products of all tiles.
    """
    layer = _layer(shape, form, bits, capability).layer
    at = ("gate_up", "down").index(kernel)
    m, widths = (layer.inputs, layer.down)[at], (layer.input_widths, layer.down_widths)[at]
    code = _gemm_code(capability, tile, widths)[kernel]
    H, k_down = shape.hidden_size, layer.down.index.shape[1]
    outputs = tile.gate_up if at == 0 else tile.outputs
    grid = (-(-(2 * k_down if at == 0 else H) // outputs), SAMPLED)
    slots = np.full((SAMPLED, tile.tokens), -1, np.int32)
    slots[:, 0] = 0
    records = np.zeros((SAMPLED, 2, 16), np.int64)
    for matrix, record in zip((layer.inputs, layer.down), records.transpose(1, 0, 2), strict=True):
        record[:, :6], record[:, 6:11], record[:, 11] = matrix.start, matrix.tiles, matrix.columns
        record[:, 12] = np.arange(SAMPLED)
    given: dict[str, Any] = {"block_matrix": records, "block_slot": slots,
                             "local": np.zeros(shape.top_k, np.int32), "KMAX": m.index.shape[1],
                             "NMAX": m.scale.shape[1], "KDOWN": k_down, "OUT_STRIDE": k_down, "H": H}  # fmt: skip
    total, weights, products = 0, 0.0, 0
    for expert in range(SAMPLED):
        found = walk.followed(code.compiled, code.lines, code.source, capability, given, (1, expert), grid, not ends)
        own, made = int(m.tiles[expert, :4].sum()) * TILE * outputs, walk.products(found) * tile.warps
        if made != own * tile.tokens:
            raise ValueError(f"{kernel}: {made} products were followed, but tiles of {tile} have {own * tile.tokens}")
        total, weights = total + sum(found.values()), weights + own / (tile.warps * machine_code.WARP)
        products += made
    return total / SAMPLED, weights / SAMPLED, products / SAMPLED


def _gemm(
    kernel: str,
    capability: int,
    tile: Tile,
    shape: Shape,
    form: str,
    bits: float,
    tokens: int,
    blocks: int,
    size: float,
) -> tuple[Launch, float]:
    """The launch of gate and up or of down, and its instructions per weight. size: of its bytes."""
    layer = _layer(shape, form, bits, capability).layer
    at = ("gate_up", "down").index(kernel)
    m, widths = (layer.inputs, layer.down)[at], (layer.input_widths, layer.down_widths)[at]
    code = _gemm_code(capability, tile, widths)[kernel]
    # Record of the matrix; first tiles; what the outputs need, if it is not read before.
    starts = 1.0 if tile.direct else float((m.tiles[:, :4] > 0).sum(1).double().mean())
    outputs = tile.gate_up if at == 0 else tile.outputs
    reads = 1 + starts + (0 if tile.direct and outputs == 64 else 1)
    N = 2 * layer.down.index.shape[1] if at == 0 else shape.hidden_size
    programs = -(-N // outputs) * blocks
    share = 1.0 if at == 0 or not tile.direct else _ending(tokens * shape.top_k / blocks, shape.top_k)
    ending, made, total = round(programs * share), [], 0.0
    for ends, part, count in ((False, 1 - share, programs - ending), (True, share, ending)):
        if part > 0:
            instructions, weights, products = _gemm_executed(kernel, capability, tile, shape, form, bits, ends)
            # The count of a token's slots; other slots' outputs.
            more = 0 if at == 0 else 1 + ends
            made.append(Programs(count, instructions, reads + more, products))
            total += part * instructions / weights
    return Launch(kernel, tuple(made), tile.warps, size, code.older, code.registers, code.shared_bytes), total


@cache
def _hit(shape: Shape, tokens: int) -> tuple[int, dict[int, int]]:
    """Experts that somebody goes to, and blocks for each size of blocks."""
    _, ids = route(REALISTIC, tokens, shape.num_experts, shape.top_k, SEED, "cpu")
    counts = torch.bincount(ids.flatten().long(), minlength=shape.num_experts)
    return int((counts > 0).sum()), {m: int((-(-counts // m)).sum()) for m in (8, 16, 32, 64, 128)}


PerWeight = tuple[float, float, float]


def bitsmoe(shape: Shape, tokens: int, form: str, bits: float, gpu: Gpu) -> tuple[list[Launch], PerWeight]:
    """The launches of our layer and its executed instructions per weight: of both GEMMs averaged, and of each."""
    capability = max(c for c in TILES if c <= gpu.capability)
    H, S = shape.hidden_size, tokens * shape.top_k
    tile = pick_tile(capability, S, shape.num_experts, 2 * shape.intermediate_size)
    layer = _layer(shape, form, bits, capability)
    inputs, down = layer.layer.inputs, layer.layer.down
    hit, blocks = _hit(shape, tokens)
    size = torch.tensor(layer.expert_bytes()).double().mean() * hit
    first, last = (m.codes32.nbytes + m.codes16.nbytes for m in (inputs, down))
    share = first / (first + last)
    k_in, k_down = inputs.index.shape[1], down.index.shape[1]

    wide = basis_tile(tokens)
    code = _other_code(capability)
    basis = form == WHITENED
    began = code[f"begin for {wide.tokens} tokens{', basis' * basis}"]
    # Each kind of programs by where it begins: experts, tokens, coordinates.
    counts = [shape.num_experts, -(-tokens // ROUTE_TOKENS)]
    counts += [-(-H // wide.coordinates) * -(-tokens // wide.tokens) * wide.parts] if basis else []
    sizes = {"S": S, "T": tokens, "TILES": -(-H // tile.outputs), "block": tile.tokens, "H": H, "R": H,
             "MOST": S // tile.tokens + shape.num_experts}  # fmt: skip
    parts = []
    # Ids, and once more. Ids. Rows of the basis and tokens.
    for kind, reads in enumerate((2, 1, 1)[: len(counts)]):
        made = began.executed(capability, (sum(counts[:kind]),), (sum(counts),), **sizes)
        parts.append(Programs(counts[kind], sum(made.values()), reads, walk.products(made) * wide.warps))
    begin = Launch("begin", tuple(parts), wide.warps,
                   layer.shared_bytes() + tokens * H * 2 + (tokens * H * 4 * wide.parts if basis else 0),
                   began.older, began.registers, began.shared_bytes)  # fmt: skip
    scaled = code[f"scale of {wide.parts if basis else 1} parts{', in lanes' * tile.direct}"]
    b, chunks = blocks[tile.tokens], -(-k_in // SCALE_CHUNK)
    each = -(-tile.tokens // SCALE_SLOTS)
    # As many slots in every program, on average.
    slots = max(1, round(S / (b * each)))
    block_slot = np.where(np.arange(tile.tokens) < slots, 0, -1).astype(np.int32)
    made = scaled.executed(
        capability, (0, 0), (b * each, chunks, 1), block=tile.tokens, STRIDE=H,
        block_expert=np.zeros(b, np.int32), block_slot=block_slot, KMAX=k_in, NCORR=chunks, WIDTH=1,
    )  # fmt: skip
    # Expert; components and slots; the source of each slot.
    programs = Programs(b * each * chunks, sum(made.values()), 2 + slots)
    scale = Launch("scale", (programs,), 1, S * k_in * 2, False, scaled.registers, scaled.shared_bytes)
    gate_up, per_input = _gemm("gate_up", capability, tile, shape, form, bits, tokens, b,
                               float(size * share) + S * (k_in + k_down) * 2)  # fmt: skip
    second, per_down = _gemm("down", capability, tile, shape, form, bits, tokens, b,
                             float(size * (1 - share)) + S * k_down * 2 + S * H * 8)  # fmt: skip
    weight = 2 * k_in * k_down, k_down * H
    average = (per_input * weight[0] + per_down * weight[1]) / sum(weight)
    return [begin, scale, gate_up, second], (average, per_input, per_down)


@cache
def _grouped(capability: int, block: int, outputs: int, warps: int) -> _Kernel:
    """The plain grouped GEMM at 16 bits."""
    constants = {"ROWS_PER": 8, "BITS": 16, "BM": block, "BN": outputs, "BK": INNER, "PER_GROUP": 128,
                 "WEIGHTED": False, "FP16": False, "ASM": True}  # fmt: skip
    types = {"x": "*bf16", "weight": "*bf16", "scale": "*bf16", "block_expert": "*i32", "block_slot": "*i32",
             "num_blocks": "*i32", "slot_weight": "*fp32", "out": "*bf16"}  # fmt: skip
    kernel = machine_code.compiled(_grouped_kernel, capability, constants, types, warps, sizes=("N", "K"))
    return _Kernel.of(kernel, _grouped_kernel)


def sixteen_bits(shape: Shape, tokens: int, gpu: Gpu) -> list[Launch]:
    """A grouped GEMM at 16 bits as vLLM's: routing, gate and up, activation, down, sum."""
    capability = min(gpu.capability, 90)
    H, inner, S = shape.hidden_size, shape.intermediate_size, tokens * shape.top_k
    hit, blocks = _hit(shape, tokens)
    block, outputs, warps = tile_of(S / shape.num_experts)
    code = _grouped(capability, block, outputs, warps)
    made = []
    for name, N, K in (("gate_up", 2 * inner, H), ("down", H, inner)):
        found = code.executed(
            capability, (0, 0), (-(-N // outputs), 1), num_blocks=np.ones(1, np.int32), N=N, K=K,
            block_expert=np.zeros(1, np.int32), block_slot=np.zeros(block, np.int32),
        )  # fmt: skip
        programs = Programs(-(-N // outputs) * blocks[block], sum(found.values()), 5, walk.products(found) * warps)
        made.append(Launch(name, (programs,), warps, hit * N * K * 2 + S * (N + K) * 2, code.older, code.registers,
                           code.shared_bytes))  # fmt: skip
    return _with_helpers(made, S, inner, H)


def marlin(shape: Shape, tokens: int, gpu: Gpu) -> list[Launch]:
    """GPTQ-Marlin with 4-bit codes and groups of 128: persistent programs, one for each multiprocessor (assumed)."""
    H, inner, S = shape.hidden_size, shape.intermediate_size, tokens * shape.top_k
    hit, blocks = _hit(shape, tokens)
    block = next((m for m in (16, 32, 64) if S / shape.num_experts <= m), 64)
    made = []
    for name, N, K in (("gate_up", 2 * inner, H), ("down", H, inner)):
        weights = blocks[block] * N * K / gpu.multiprocessors
        programs = Programs(gpu.multiprocessors, weights / 256 * MARLIN_PER_WEIGHT + 500, 5, weights * block)
        made.append(Launch(name, (programs,), 8, hit * N * K * (0.5 + 2 / 128) + S * (N + K) * 2, True, 255,
                           96 << 10))  # fmt: skip
    return _with_helpers(made, S, inner, H)


def _with_helpers(gemms: list[Launch], S: int, inner: int, H: int) -> list[Launch]:
    """With routing, activation and sum as launches of their own."""
    small = Launch("routing", (Programs(1, 500, 4),), 4, S * 4, False, 32, 0)
    act = replace(small, kernel="act", programs=(Programs(-(-S * inner // 4096), 200, 2),), bytes=S * inner * 6)
    add = replace(small, kernel="sum", programs=(Programs(-(-S * H // 4096), 200, 2),), bytes=S * H * 2)
    return [small, gemms[0], act, gemms[1], add]


def estimates(shapes: Sequence[Shape], tokens: Sequence[int], bits: float, gpus: Sequence[Gpu] = GPUS) -> Iterator[Row]:
    """Rows of all methods."""
    for gpu in gpus:
        for shape in shapes:
            for count in tokens:
                made: list[tuple[str, bool, list[Launch], PerWeight]] = []
                for form in (WHITENED, NATURAL):
                    launches, per_weight = bitsmoe(shape, count, form, bits, gpu)
                    made.append((f"bitsmoe {bits:g} bits", form == WHITENED, launches, per_weight))
                made.append(("16 bits", False, sixteen_bits(shape, count, gpu), (0.0,) * 3))
                made.append(("Marlin 4 bits (assumed)", False, marlin(shape, count, gpu), (0.0,) * 3))
                for method, basis, launches, per_weight in made:
                    yield Row(
                        gpu.name, shape.model, method, count, basis,
                        round(sum(launch.microseconds(gpu) for launch in launches), 1),
                        round(sum(launch.bytes for launch in launches) / gpu.bandwidth, 1),
                        len(launches), *(round(v, 2) for v in per_weight),
                    )  # fmt: skip


def as_markdown(rows: Sequence[Row], bits: float) -> str:
    """A table for each GPU and model, one line for each number of tokens, microseconds and floors in columns."""
    out = [
        f"Estimates, nothing measured; `python -m benchmarks.kernels --estimate`, {bits:g} bits.", "",
        "Microseconds a layer, in brackets what its bytes take at the memory's full speed.", "",
    ]  # fmt: skip
    for gpu, model in dict.fromkeys((r.gpu, r.model) for r in rows):
        mine = [r for r in rows if (r.gpu, r.model) == (gpu, model)]
        names = list(dict.fromkeys((r.method, r.basis) for r in mine))
        titles = [f"{method}{', basis' * basis}" for method, basis in names]
        out += [
            f"## {gpu}, {model}: estimates",
            "",
            "| tokens | " + " | ".join(titles) + " | instructions per weight: all | gate and up | down |",
        ]
        out += ["|" + " --- |" * (len(names) + 4)]
        for count in dict.fromkeys(r.tokens for r in mine):
            row = {(r.method, r.basis): r for r in mine if r.tokens == count}
            cells = [f"{row[n].microseconds:g} ({row[n].floor:g})" for n in names]
            first = row[names[0]]
            cells += [f"{v:g}" for v in (first.per_weight, first.per_weight_gate_up, first.per_weight_down)]
            out.append(f"| {count} | " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON data, every one of them called an estimate."""
    return [{"figure": "estimate", **vars(row)} for row in rows]


def beside(rows: Sequence[dict[str, Any]], gpu_name: str, bits: float, shapes: Sequence[Shape]) -> str:
    """Measured microseconds beside their estimates, for a GPU that the model knows; empty for others.

    Args:
        rows: of `results.Results`: our own methods under realistic routing are taken.
        gpu_name: as its driver says it.
        bits: average code width.
        shapes: of the layers.
    """
    known = [g for g in GPUS if g.name.removeprefix("RTX ") in gpu_name]
    forms = {"bitsmoe, whitened basis": WHITENED, "bitsmoe, no basis": NATURAL}
    having = [r for r in rows if r["method"] in forms and r["routing"] == REALISTIC and r["microseconds"] is not None]
    if not known or not having:
        return ""
    out = ["## Estimates beside measurements, microseconds", ""]
    out += ["| model | form | tokens | measured | estimate | measured / estimate |", "|" + " --- |" * 6]
    named = {shape.model: shape for shape in shapes}
    for r in having:
        launches, _ = bitsmoe(named[r["model"]], r["tokens"], forms[r["method"]], bits, known[0])
        estimate = sum(launch.microseconds(known[0]) for launch in launches)
        cells = [r["model"], r["method"], r["tokens"], f"{r['microseconds']:.1f}", f"{estimate:.1f}"]
        out.append("| " + " | ".join(str(c) for c in (*cells, f"{r['microseconds'] / estimate:.2f}")) + " |")
    return "\n".join([*out, ""])
