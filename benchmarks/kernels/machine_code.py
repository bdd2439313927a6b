"""Compile the kernels ahead of time, without a GPU, and read what the main loops became.

Triton brings NVIDIA's assembler and disassembler; `nvdisasm` prints the machine code. A main loop is one that holds
matrix instructions; one kernel is compiled for each bit-width, so that its loops are those of that width. Counted per
weight: instructions of one turn of the unrolled loop, over the weights that a thread turns into numbers in it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitsmoe_kernels._triton import gemm, prepare, rounding
from bitsmoe_kernels.backends.launch_config import BASIS_TILES, DECODE, PREFILL, TILES, Tile, kwidth_of
from bitsmoe_kernels.backends.triton_launch import ROUTE_CHUNK, ROUTE_TOKENS, SCALE_CHUNK, SCALE_SLOTS
from bitsmoe_kernels.layout.fields import CLASSES, TILE

MATRIX = {"HGMMA", "HMMA", "QGMMA", "IMMA"}
NOT_ALU = MATRIX | {
    "LDS", "LDSM", "LDG", "LDGSTS", "LDGDEPBAR", "STS", "STSM", "STG", "LDC", "LDL", "STL", "ATOMG", "RED", "UTMALDG",
    "DEPBAR", "BAR", "WARPGROUP", "WARPSYNC", "SYNCS", "MEMBAR", "FENCE", "ERRBAR", "CCTL",
    "BRA", "BSSY", "BSYNC", "EXIT", "NOP", "NANOSLEEP", "R2UR", "S2UR",
}  # fmt: skip
"""Matrix, memory, barrier, control and (by their U) uniform-datapath instructions are no ALU work."""
WARP = 32


@dataclass(frozen=True)
class LayerSizes:
    """What kernels are compiled for, besides tiles and widths."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


QWEN3 = LayerSizes(2048, 768, 128, 8)
"""Qwen3-30B-A3B."""


@dataclass(frozen=True)
class Row:
    """What one kernel became.

    Attributes:
        arch: such as `sm_90`.
        regime: decode or prefill.
        kernel: `gate_up` or `down`.
        bits: code width.
        dtype: of activations.
        outputs, tokens, warps, unroll, stages: see `tiles.Tile`.
        alu_per_weight: instructions for arithmetic and logic in the main loop, a thread's, over the weights it unpacks.
        instructions_per_weight: all of them.
        i2f: conversions from integers in the main loop.
        spill_bytes: local memory a thread needs in the whole kernel.
        registers: of a thread.
        shared_bytes: of a program.
    """

    arch: str
    regime: str
    kernel: str
    bits: int
    dtype: str
    outputs: int
    tokens: int
    warps: int
    unroll: int
    stages: int
    alu_per_weight: float
    instructions_per_weight: float
    i2f: int
    spill_bytes: int
    registers: int
    shared_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


_POINTERS = {
    "codes32": "*i32", "codes16": "*i32", "scale": "*fp32", "bias": "*fp32", "block_matrix": "*i64",
    "corr": "*fp32", "block_slot": "*i32", "down_factor": "*fp32",
    "down_offset": "*fp32", "out_corr": "*fp32", "weight": "*fp32", "local": "*i32", "partial": "*fp32",
    "arrived": "*i32",
}  # fmt: skip


def compiled(
    kernel: Any,
    capability: int,
    constants: dict[str, Any],
    types: dict[str, str],
    warps: int,
    sizes: Sequence[str] = ("KMAX", "NMAX", "KDOWN", "OUT_STRIDE", "H", "R", "STRIDE"),
    registers: int | None = None,
) -> Any:
    """One kernel for one architecture; arguments that are no constants are pointers (aligned) or numbers.

    `sizes`: numbers that are multiples of 16. `registers`: most of a thread.
    """
    names = kernel.arg_names
    constexprs = {(names.index(k),): v for k, v in constants.items()}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    unknown = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    aligned = [n for n in names if (signature[n].startswith("*") and n not in unknown) or n in sizes]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    kind: Any = ASTSource
    if kernel.is_gluon():
        # Gluon cannot be imported where Triton's interpreter stands for the compiler.
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    source = kind(kernel, signature, constexprs, attrs)
    options = {"num_warps": warps, "maxnreg": registers}
    return triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)


def gemm_sources(tile: Tile) -> tuple[Any, Any]:
    """The functions of gate and up and of down for a tile."""
    if not tile.direct:
        return gemm.gate_up_kernel, gemm.down_kernel
    from bitsmoe_kernels._triton import direct

    return direct.gate_up_direct, direct.down_direct


def gemm_kernels(
    capability: int, tile: Tile, fp16: bool, widths: int, act: int = 0, bias: bool = False, sizes: LayerSizes = QWEN3
) -> Iterator[tuple[str, Any]]:
    """Both GEMM kernels as a layer without extras runs them, compiled, under their names.

    `act`: see `expert_mlp.ACTIVATION_NUMBERS`. `bias`: of both. `sizes`: of the layer.
    """
    kind = "*fp16" if fp16 else "*bf16"
    types = {**_POINTERS, "act": kind, "dense": kind, "out": kind}
    outputs = tile.input_outputs(in_turn=act != gemm.NO_GATE.value)
    common = {
        "BN": outputs, "BT": tile.tokens, "DENSE": False, "BIAS": bias, "WIDTHS": widths,
        "KWIDTH": kwidth_of(capability), "FP16": fp16,
    }  # fmt: skip
    gate_up, second = gemm_sources(tile)
    if not tile.direct:
        common |= {"ASM": True, "UNROLL": tile.unroll, "STAGES": tile.stages}
    read, put = -(-sizes.hidden_size // SCALE_CHUNK), -(-2 * sizes.intermediate_size // outputs)
    inputs = {"NCORR": read, "NCORR_POW2": triton.next_power_of_2(read), "CORR_CHUNK": SCALE_CHUNK, "OUT_NCORR": put,
              "SPLIT": False, "FUSED": True, "ACT": act}  # fmt: skip
    yield "gate_up", compiled(gate_up, capability, common | inputs, types, tile.warps, registers=tile.registers[0])
    down = {"NCORR": put, "NCORR_POW2": triton.next_power_of_2(put), "CORR_CHUNK": outputs // 2, "TOP_K": sizes.top_k,
            "EVEN": sizes.hidden_size % tile.outputs == 0, "BN": tile.outputs, "RECORDS": 2}  # fmt: skip
    yield "down", compiled(second, capability, common | down, types, tile.warps, registers=tile.registers[1])


def other_kernels(capability: int, fp16: bool, sizes: LayerSizes = QWEN3) -> Iterator[tuple[str, Any]]:
    """The kernels around the GEMM, compiled."""
    kind = "*fp16" if fp16 else "*bf16"
    types = {
        "ids": "*i32", "local": "*i32", "block_expert": "*i32", "block_slot": "*i32", "num_blocks": "*i32",
        "arrived": "*i32", "expert_map": "*i32", "x": kind, "out": kind, "basis": "*i8", "start": "*i64",
        "tiles": "*i32", "columns": "*i32", "down_start": "*i64", "down_tiles": "*i32", "down_columns": "*i32",
        "block_matrix": "*i64",
        "basis_scale": "*fp32", "z": "*fp32",
    }  # fmt: skip
    routing = {
        "E": sizes.num_experts,
        "BINS": max(32, triton.next_power_of_2(sizes.num_experts)),
        "EXPERTS": sizes.num_experts,
        "EXPERT_MAP": False,
        "RECORDS": 2,
        "TOP_K": sizes.top_k,
        "TOKENS": ROUTE_TOKENS,
    }
    for basis in (False, True):
        for tile in BASIS_TILES:
            constants = routing | {"BASIS": basis, "BN": tile.coordinates, "BT": tile.tokens, "BK": tile.inner,
                                   "STAGES": 3, "EVEN": sizes.hidden_size % tile.inner == 0,
                                   "PARTS": tile.parts, "CHUNK": ROUTE_CHUNK, "ASM": True}  # fmt: skip
            name = f"begin for {tile.tokens} tokens{', basis' * basis}"
            yield name, compiled(prepare.begin_kernel, capability, constants, types, tile.warps)
    types = {"source": "*fp32", "block_expert": "*i32", "block_slot": "*i32", "index": "*i32",
             "factor": "*fp32", "offset": "*fp32", "tiles": "*i32", "act": kind, "corr": "*fp32", "rank": "*i32",
             "lowrank": "*fp16", "lowrank_start": "*i32"}  # fmt: skip
    for parts, low, lanes in product({tile.parts: None for tile in BASIS_TILES}, (False, True), (False, True)):
        if parts == 1 or not low:
            constants = {"ROWS_PER": 8, "PER": 1, "CHUNK": SCALE_CHUNK, "SLOTS": SCALE_SLOTS, "PARTS": parts,
                         "LANES": kwidth_of(capability) if lanes else 0, "FP16": fp16, "LOWRANK": low,
                         "ASM": True}  # fmt: skip
            name = f"scale of {parts} parts{', in lanes' * lanes}{', compensators' * low}"
            yield name, compiled(prepare.scale_kernel, capability, constants, types, 1)


def rounding_kernels(capability: int) -> Iterator[tuple[str, Any]]:
    """The quantizer's kernels as a row of N values takes them, compiled."""
    floats = ("F", "U", "M", "half", "power", "c", "a", "norms", "errors", "total", "left", "gradient", "change")
    types = dict.fromkeys(floats, "*fp32") | {"codes": "*u8"}
    for N in (2048, 7168):
        for columns in (False, True):
            row = rounding.row_options(N, columns)
            warps, constants = row.pop("num_warps"), row | {"ROUGH": False}
            for kernel in (rounding.feedback_kernel, rounding.alone_kernel):
                name = f"{kernel.__name__}, rows of {N}{', widths of columns' * columns}"
                yield name, compiled(kernel, capability, constants, types, warps)
            tile = rounding.descent_options(N, columns)
            warps = tile.pop("num_warps")
            yield f"descent_kernel, rows of {N}", compiled(rounding.descent_kernel, capability, tile, types, warps)


def _said_of(kernel: Any, tool: str, option: str) -> str:
    """What a tool of the CUDA toolkit prints of a kernel's binary."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def machine_code(kernel: Any) -> list[str]:
    """Disassembly, line by line."""
    return _said_of(kernel, "nvdisasm", "-c").splitlines()


def resources(kernel: Any) -> dict[str, int]:
    """Registers, local (stack) and shared bytes, as the binary declares them."""
    text = _said_of(kernel, "cuobjdump", "--dump-resource-usage")
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": found["REG"],
        "spill_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
    }


_WIDE_RESULTS = {".128": 4, ".M88.4": 4, ".64": 2, ".M88.2": 2, ".WIDE": 2, "CS2R": 2}
"""Parts of opcodes whose results take more than one register."""


def overwritten(lines: list[str]) -> list[str]:
    """Instructions that write to registers from which a product of wgmma may still read its left operand.

    A product ends at the `WARPGROUP.DEPBAR` that waits for its group. The body of a loop is gone through twice: what
    its last turn began is in flight in the next.
    """
    code, labels = instructions(lines)
    found: list[str] = []
    groups: list[set[int]] = [set()]
    """Registers of each group of products in flight; the last one is still open."""

    def go(text: str) -> None:
        opcode, _, operands = re.sub(r"^@!?U?P[T\d]+\s+", "", text).partition(" ")
        if opcode.startswith("HGMMA"):
            if left := re.match(r"\s*R\d+,\s*R(\d+)", operands):
                groups[-1].update(range(int(left[1]), int(left[1]) + 4))
            if "gsb0" in operands:
                groups.append(set())
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            left_over = int(operands.split(",")[1], 16)
            del groups[: max(0, len(groups) - 1 - left_over)]
        elif result := re.match(r"\s*(?:U?P[T\d]+,\s*)?R(\d+)", operands):
            size = max([n for part, n in _WIDE_RESULTS.items() if part in opcode], default=1)
            if set().union(*groups) & set(range(int(result[1]), int(result[1]) + size)):
                found.append(text)

    for end, text in enumerate(code):
        go(text)
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if target and (start := labels.get(target[1], len(code))) <= end:
            for again in code[start : end + 1]:
                go(again)
    return found


def instructions(lines: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """A disassembly's instructions, and where its labels stand among them."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    return code, labels


def loops(lines: list[str]) -> list[list[str]]:
    """Bodies of all innermost loops that hold matrix instructions: opcodes without modifiers."""
    code, labels = instructions(lines)
    spans = []
    for end, text in enumerate(code):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        # A branch to itself fills the space behind the end.
        if target and labels.get(target[1], len(code)) < end:
            spans.append((labels[target[1]], end))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    opcodes = [_opcode(text) for text in code]
    return [body for a, b in sorted(inner) if MATRIX & set(body := opcodes[a : b + 1])]


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P[T\d]+\s+", "", text).split()[0].split(".")[0]


def is_alu(opcode: str) -> bool:
    """Whether an instruction counts against the arithmetic budget."""
    return opcode not in NOT_ALU and not opcode.startswith("U")


def turn_tiles(tile: Tile) -> int:
    """Tiles of one turn of the main loop."""
    return 2 if tile.direct else tile.unroll


def rows(capability: int, fp16: bool, regimes: tuple[str, ...] = (DECODE, PREFILL)) -> Iterator[Row]:
    """All GEMM kernels of one architecture's tile table, one width at a time."""
    for regime in regimes:
        for tile in TILES[capability][regime]:
            yield from tile_rows(capability, fp16, regime, tile)


def tile_rows(capability: int, fp16: bool, regime: str, tile: Tile) -> Iterator[Row]:
    """Both GEMM kernels of one tile, one width at a time."""
    for c, bits in enumerate(CLASSES):
        for name, kernel in gemm_kernels(capability, tile, fp16, 1 << c):
            bodies = loops(machine_code(kernel))
            longest = max(bodies, key=len)
            body = Counter(longest)
            outputs = tile.gate_up if name == "gate_up" else tile.outputs
            weights = outputs * TILE * turn_tiles(tile) / (tile.warps * WARP)
            yield Row(
                arch=f"sm_{capability}", regime=regime, kernel=name, bits=bits,
                dtype="float16" if fp16 else "bfloat16", outputs=outputs, tokens=tile.tokens, warps=tile.warps,
                unroll=tile.unroll, stages=tile.stages,
                alu_per_weight=round(sum(n for k, n in body.items() if is_alu(k)) / weights, 3),
                instructions_per_weight=round(sum(body.values()) / weights, 3),
                i2f=body["I2F"] + body["I2FP"], **resources(kernel),
            )  # fmt: skip
