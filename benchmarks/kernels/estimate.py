"""How long one MoE layer takes, by a model of time: estimates for GPUs, none of them measured.

A launch takes the longer of two times: its bytes at the memory's speed, and its programs, round after round, on the
multiprocessor that has most of them. A program takes its reads that wait for each other, and its instructions, at the
rate that the warps beside it leave. Instructions are counted in the machine code, whole programs at a layer's real
numbers of tiles. Programs that end early for lack of a block are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from benchmarks.kernels import machine_code
from benchmarks.kernels.grouped import INNER, _grouped_kernel, tile_of
from benchmarks.kernels.routing import REALISTIC, route
from benchmarks.kernels.shapes import Shape
from benchmarks.kernels.synthetic import NATURAL, WHITENED, BitsmoeExperts, fewer_experts, format_layer
from bitsmoe_kernels.backends.launch_config import TILES, Tile, basis_tile, pick_tile
from bitsmoe_kernels.backends.triton_launch import ROUTE_CHUNK, SCALE_CHUNK
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
        shared_bytes: of a multiprocessor.
        warps: that a multiprocessor holds.
    """

    name: str
    capability: int
    multiprocessors: int
    gigahertz: float
    bandwidth: float
    shared_bytes: int
    warps: int


GPUS = (
    Gpu("A100", 80, 108, 1.41, 2.04e6, 164 << 10, 64),
    Gpu("H100", 90, 132, 1.75, 3.35e6, 228 << 10, 64),
    Gpu("H200", 90, 132, 1.75, 4.8e6, 228 << 10, 64),
    Gpu("RTX 4090", 89, 128, 2.52, 1.01e6, 100 << 10, 48),
    Gpu("RTX 5090", 120, 170, 2.41, 1.79e6, 100 << 10, 48),
    Gpu("B200", 100, 148, 1.85, 8.0e6, 228 << 10, 64),
)
REGISTERS = 65_536


@dataclass(frozen=True)
class Launch:
    """One kernel of a layer.

    Attributes:
        kernel: its name.
        programs: that have work.
        warps: of a program.
        instructions: that a warp executes.
        reads: of memory in a program that wait for each other.
        bytes: read and written in all.
        registers: of a thread.
        shared_bytes: of a program.
    """

    kernel: str
    programs: int
    warps: int
    instructions: float
    reads: float
    bytes: float
    registers: int
    shared_bytes: int

    def microseconds(self, gpu: Gpu) -> float:
        """From its launch to its end."""
        at_once = min(
            REGISTERS // (self.registers * 32 * self.warps),
            gpu.shared_bytes // max(1, self.shared_bytes),
            gpu.warps // self.warps,
        )
        most = -(-self.programs // gpu.multiprocessors)
        together = min(most, max(1, at_once))
        cycles = self.instructions * max(APART, together * self.warps / SCHEDULERS)
        program = self.reads * READ + cycles / gpu.gigahertz / 1e3
        return LAUNCH + max(self.bytes / gpu.bandwidth / USABLE, most / together * program)


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


@cache
def _code(capability: int, tile: Tile, widths: int) -> dict[str, tuple[tuple[str, ...], dict[str, int]]]:
    """Machine code and resources of both GEMM kernels with these widths."""
    made = machine_code.gemm_kernels(capability, tile, False, widths)
    return {k: (tuple(machine_code.machine_code(v)), machine_code.resources(v)) for k, v in made}


@cache
def _other_code(capability: int) -> dict[str, tuple[tuple[str, ...], dict[str, int]]]:
    made = dict(machine_code.other_kernels(capability, False))
    return {k: (tuple(machine_code.machine_code(v)), machine_code.resources(v)) for k, v in made.items()}


@cache
def _layer(shape: Shape, form: str, bits: float, capability: int) -> BitsmoeExperts:
    """A few experts of real size, for their numbers of tiles."""
    few = fewer_experts(shape, SAMPLED)
    return BitsmoeExperts(format_layer(few, form, bits, SEED, "cpu"), torch.bfloat16, capability, keep=False)


def _turns(counts: Sequence[int], tile: Tile, widths: int) -> list[int]:
    """Turns of a GEMM kernel's loops: of whole turns and of the rest, for each width that occurs in the layer."""
    out, tiles = [], machine_code.turn_tiles(tile)
    for c, count in enumerate(counts):
        if widths >> c & 1:
            out += [count // tiles, count % tiles] if tiles > 1 and not tile.direct else [count // tiles]
    return out


def _gemm(
    kernel: str, capability: int, tile: Tile, layer: BitsmoeExperts, programs: int, size: float, top_k: int
) -> tuple[Launch, float]:
    """The launch of gate and up or of down, and its instructions per weight, averaged over the sampled experts."""
    at = ("gate_up", "down").index(kernel)
    widths = (layer.layer.input_widths, layer.layer.down_widths)[at]
    lines, used = _code(capability, tile, widths)[kernel]
    tiles = (layer.layer.inputs, layer.layer.down)[at].tiles[:, :4].tolist()
    every = [_turns(counts, tile, widths) for counts in tiles]
    instructions = sum(machine_code.executed(list(lines), turns, top_k) for turns in every) / len(every)
    # Number of blocks, expert, counts and starts; then first tiles; then what the outputs need.
    starts = 1.0 if tile.direct else sum(sum(t > 0 for t in turns) for turns in every) / len(every)
    reads = 3 + starts + (1 if at == 0 else 3)
    outputs = 2 * TILE if at == 0 else tile.outputs
    weights = sum(map(sum, tiles)) / len(tiles) * TILE * outputs / (tile.warps * 32)
    launch = Launch(kernel, programs, tile.warps, instructions, reads, size, used["registers"], used["shared_bytes"])
    return launch, instructions / weights


@cache
def _hit(shape: Shape, tokens: int) -> tuple[int, dict[int, int]]:
    """Experts that somebody goes to, and blocks for each size of blocks."""
    _, ids = route(REALISTIC, tokens, shape.num_experts, shape.top_k, SEED, "cpu")
    counts = torch.bincount(ids.flatten().long(), minlength=shape.num_experts)
    return int((counts > 0).sum()), {m: int((-(-counts // m)).sum()) for m in (8, 16, 32, 64, 128)}


def bitsmoe(shape: Shape, tokens: int, form: str, bits: float, gpu: Gpu) -> tuple[list[Launch], float]:
    """The launches of our layer and its executed instructions per weight (of gate and up, and down, averaged)."""
    capability = max(c for c in TILES if c <= gpu.capability)
    H, S = shape.hidden_size, tokens * shape.top_k
    tile = pick_tile(capability, S, shape.num_experts)
    layer = _layer(shape, form, bits, capability)
    inputs, down = layer.layer.inputs, layer.layer.down
    hit, blocks = _hit(shape, tokens)
    size = torch.tensor(layer.expert_bytes()).double().mean() * hit
    first, last = (m.codes32.nbytes + m.codes16.nbytes for m in (inputs, down))
    share = first / (first + last)
    k_in, k_down = inputs.index.shape[1], down.index.shape[1]

    code = _other_code(capability)
    wide = basis_tile(tokens)
    kind = f"begin, basis for {wide.tokens} tokens" if form == WHITENED else "begin"
    lines, used = code[kind]
    chunks, programs, coordinates = -(-S // ROUTE_CHUNK), shape.num_experts, 0
    if form == WHITENED:
        coordinates = -(-H // wide.coordinates) * -(-tokens // wide.tokens)
    turns = [-(-H // 128)] * sum(bool(machine_code.MATRIX & set(b)) for b in machine_code.loops(list(lines)))
    # A program does the one or the other; the longer one counts for all.
    routing = machine_code.executed(list(lines), [0] * len(turns), chunks)
    contract = machine_code.executed(list(lines), turns, 0) if coordinates else 0
    warps = wide.warps if coordinates else 4
    begin = Launch("begin", programs + coordinates, warps, max(routing, contract), 3 + (2 if coordinates else 0),
                   layer.shared_bytes() + tokens * H * 2, used["registers"], used["shared_bytes"])  # fmt: skip
    lines, used = code["scale"]
    scale = Launch("scale", S * -(-k_in // SCALE_CHUNK), 4, machine_code.executed(list(lines), [], 1), 4,
                   S * k_in * 2, used["registers"], used["shared_bytes"])  # fmt: skip
    b = blocks[tile.tokens]
    gate_up, per_input = _gemm("gate_up", capability, tile, layer, -(-2 * k_down // (2 * TILE)) * b,
                           float(size * share) + S * (k_in + k_down) * 2, 1)  # fmt: skip
    second, per_down = _gemm("down", capability, tile, layer, -(-H // tile.outputs) * b,
                         float(size * (1 - share)) + S * k_down * 2 + S * H * 8, shape.top_k)  # fmt: skip
    weight = 2 * k_in * k_down, k_down * H
    average = (per_input * weight[0] + per_down * weight[1]) / sum(weight)
    return [begin, scale, gate_up, second], average


@cache
def _grouped(capability: int, block: int, outputs: int, warps: int) -> tuple[tuple[str, ...], dict[str, int]]:
    """Machine code of the plain grouped GEMM at 16 bits, and its resources."""
    constants = {"ROWS_PER": 8, "BITS": 16, "BM": block, "BN": outputs, "BK": INNER, "PER_GROUP": 128,
                 "WEIGHTED": False, "FP16": False, "ASM": True}  # fmt: skip
    types = {"x": "*bf16", "weight": "*bf16", "scale": "*bf16", "block_expert": "*i32", "block_slot": "*i32",
             "num_blocks": "*i32", "slot_weight": "*fp32", "out": "*bf16"}  # fmt: skip
    kernel = machine_code.compiled(_grouped_kernel, capability, constants, types, warps, sizes=("N", "K"))
    return tuple(machine_code.machine_code(kernel)), machine_code.resources(kernel)


def sixteen_bits(shape: Shape, tokens: int, gpu: Gpu) -> list[Launch]:
    """A grouped GEMM at 16 bits as vLLM's: routing, gate and up, activation, down, sum."""
    capability = min(gpu.capability, 90)
    H, inner, S = shape.hidden_size, shape.intermediate_size, tokens * shape.top_k
    hit, blocks = _hit(shape, tokens)
    block, outputs, warps = tile_of(S / shape.num_experts)
    lines, used = _grouped(capability, block, outputs, warps)
    made = []
    for name, N, K in (("gate_up", 2 * inner, H), ("down", H, inner)):
        instructions = machine_code.executed(list(lines), [K // INNER], 1)
        made.append(Launch(name, -(-N // outputs) * blocks[block], warps, instructions, 5,
                           hit * N * K * 2 + S * (N + K) * 2, used["registers"], used["shared_bytes"]))  # fmt: skip
    return _with_helpers(made, S, inner, H)


def marlin(shape: Shape, tokens: int, gpu: Gpu) -> list[Launch]:
    """GPTQ-Marlin with 4-bit codes and groups of 128: persistent programs, one for each multiprocessor (assumed)."""
    H, inner, S = shape.hidden_size, shape.intermediate_size, tokens * shape.top_k
    hit, blocks = _hit(shape, tokens)
    block = next((m for m in (16, 32, 64) if S / shape.num_experts <= m), 64)
    made = []
    for name, N, K in (("gate_up", 2 * inner, H), ("down", H, inner)):
        weights = blocks[block] * N * K / gpu.multiprocessors
        made.append(Launch(name, gpu.multiprocessors, 8, weights / 256 * MARLIN_PER_WEIGHT + 500, 5,
                           hit * N * K * (0.5 + 2 / 128) + S * (N + K) * 2, 255, 96 << 10))  # fmt: skip
    return _with_helpers(made, S, inner, H)


def _with_helpers(gemms: list[Launch], S: int, inner: int, H: int) -> list[Launch]:
    """With routing, activation and sum as launches of their own."""
    small = Launch("routing", 1, 4, 500, 4, S * 4, 32, 0)
    act = replace(small, kernel="act", programs=-(-S * inner // 4096), instructions=200, reads=2, bytes=S * inner * 6)
    add = replace(small, kernel="sum", programs=-(-S * H // 4096), instructions=200, reads=2, bytes=S * H * 2)
    return [small, gemms[0], act, gemms[1], add]


def estimates(shapes: Sequence[Shape], tokens: Sequence[int], bits: float, gpus: Sequence[Gpu] = GPUS) -> Iterator[Row]:
    """Rows of all methods."""
    for gpu in gpus:
        for shape in shapes:
            for count in tokens:
                made: list[tuple[str, bool, list[Launch], float]] = []
                for form in (WHITENED, NATURAL):
                    launches, per_weight = bitsmoe(shape, count, form, bits, gpu)
                    made.append((f"bitsmoe {bits:g} bits", form == WHITENED, launches, per_weight))
                made.append(("16 bits", False, sixteen_bits(shape, count, gpu), 0.0))
                made.append(("Marlin 4 bits (assumed)", False, marlin(shape, count, gpu), 0.0))
                for method, basis, launches, per_weight in made:
                    yield Row(
                        gpu.name, shape.model, method, count, basis,
                        round(sum(launch.microseconds(gpu) for launch in launches), 1),
                        round(sum(launch.bytes for launch in launches) / gpu.bandwidth, 1),
                        len(launches), round(per_weight, 2),
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
            "| tokens | " + " | ".join(titles) + " | instructions per weight |",
        ]
        out += ["|" + " --- |" * (len(names) + 2)]
        for count in dict.fromkeys(r.tokens for r in mine):
            row = {(r.method, r.basis): r for r in mine if r.tokens == count}
            cells = [f"{row[n].microseconds:g} ({row[n].floor:g})" for n in names]
            out.append(f"| {count} | " + " | ".join(cells) + f" | {row[names[0]].per_weight:g} |")
        out.append("")
    return "\n".join(out)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON data, every one of them called an estimate."""
    return [{"figure": "estimate", **vars(row)} for row in rows]
