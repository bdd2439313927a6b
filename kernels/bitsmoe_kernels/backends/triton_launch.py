"""The launches of the Triton kernels for one layer: which, in what order, with which buffers.

Sizes, grids and tiles follow from shapes alone, so a call is free of synchronization, and can be captured in a CUDA
graph and replayed under another routing. Launches: routing and the shared basis, scaled activations, gate and up, down;
for a layer whose down has compensators, its scaled activations too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels._triton import gemm, prepare
from bitsmoe_kernels.backends.launch_config import Tile, basis_tile, pick_tile
from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.layout.matrices import Matrices
from bitsmoe_kernels.layout.pack import KernelLayer

SCALE_CHUNK = 512
"""Components of one program of the scaling kernel."""
ROUTE_CHUNK = 512
"""Slots that a program of the routing looks at together."""
SCALE_SLOTS = 8
"""Most slots of one program of the scaling kernel."""
ROUTE_TOKENS = 16
"""Tokens of one program that looks for slots of other ranks."""
TOKENS_AT_ONCE = 2_048
"""Tokens of one pass. Longer inputs are cut, which bounds the buffers."""
ALIGNED = 4
"""int32 in the 16 bytes whose multiples Triton's variants of a kernel tell apart."""

Launch = Callable[..., Any]


@dataclass(frozen=True)
class Device:
    """What runs the kernels.

    Attributes:
        capability: such as 90.
        asm: whether kernels may use machine instructions; not under Triton's interpreter.
    """

    capability: int
    asm: bool

    @classmethod
    def of(cls, x: Tensor) -> "Device":
        """The device that holds `x`; on a CPU the interpreter acts as sm_90."""
        if x.is_cuda:
            major, minor = torch.cuda.get_device_capability(x.device)
            return cls(10 * major + minor, True)
        return cls(90, False)


def _launch(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Every kernel goes through here, under its name: tests and profiles count them."""
    kernel[grid](*args, **options)


def moe_forward(
    layer: KernelLayer,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    device: Device | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """As `reference.moe_forward`, by kernels.

    Args:
        layer: E local experts.
        x: [T, H], float16 or bfloat16 as the layer was made for.
        topk_weights: [T, top_k].
        topk_ids: [T, top_k], global ids where `expert_map` is given; ids of no expert are skipped.
        expert_map: int32 [global experts] -> local index or -1.
        device: what runs them; None: where x lies.
        tile: configuration; None: by the table.

    Returns:
        [T, H] in x's dtype.

    Raises:
        BitsmoeError: the tensors lie on more than one device.
    """
    _check_one_device(layer, x, topk_weights, topk_ids, expert_map)
    device = device or Device.of(x)
    T = len(x)
    if T == 0:
        return torch.empty_like(x)
    # Kernels go to the current device, wherever their arguments lie.
    with torch.cuda.device_of(x):
        if T <= TOKENS_AT_ONCE:
            return _forward(layer, x, topk_weights, topk_ids, expert_map, device, tile)
        parts = [
            _forward(layer, xs, weights, ids, expert_map, device, tile)
            for xs, weights, ids in zip(*(v.split(TOKENS_AT_ONCE) for v in (x, topk_weights, topk_ids)), strict=True)
        ]
        return torch.cat(parts)


def _check_one_device(
    layer: KernelLayer, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None
) -> None:
    here = x.device
    weights = (*vars(layer.inputs).values(), *vars(layer.down).values(), layer.basis, layer.basis_scale)
    # Names of all of them take longer to make than a small kernel to run.
    if all(t is None or t.device == here for t in (topk_weights, topk_ids, expert_map, *weights)):
        return
    given = {"topk_weights": topk_weights, "topk_ids": topk_ids, "expert_map": expert_map, **layer.tensors()}
    faults = [f"{name} is on {t.device}" for name, t in given.items() if t is not None and t.device != here]
    raise BitsmoeError(fault_list(f"activations are on {here}, but not all tensors: move these there", faults))


def _forward(
    layer: KernelLayer,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    device: Device,
    tile: Tile | None,
) -> Tensor:
    """`moe_forward` of at most TOKENS_AT_ONCE tokens, on the current device."""
    x = x.contiguous()
    T, H = x.shape
    top_k = topk_ids.shape[1]
    S, E = T * top_k, len(layer.down.columns)
    widest = layer.inputs.scale.shape[1] * (1 if layer.in_turn else 2)
    tile = tile or pick_tile(device.capability, S, E if expert_map is None else len(expert_map), widest)
    fp16 = x.dtype == torch.float16
    common = {"KWIDTH": layer.kwidth, "FP16": fp16, "num_warps": tile.warps}
    # The order of activations: of lanes, or their own.
    lanes = layer.kwidth if tile.direct and device.asm else 0
    if lanes:
        from bitsmoe_kernels._triton import direct

        gate_up_kernel, down_kernel = direct.gate_up_direct, direct.down_direct
    else:
        gate_up_kernel, down_kernel = gemm.gate_up_kernel, gemm.down_kernel
        common |= {"ASM": device.asm, "UNROLL": tile.unroll, "STAGES": tile.stages}
    down_tiles = -(-H // tile.outputs)
    # What gate and up contract: the token, or its coordinates in the shared basis.
    source, coordinates = x.view(T, H, 1), None
    if layer.basis is not None and layer.basis_scale is not None:
        source = x.new_empty(T, len(layer.basis), basis_tile(T).parts, dtype=torch.float32)
        coordinates = x, layer.basis, layer.basis_scale, source
    out = torch.empty_like(x)
    route = _route(topk_ids, expert_map, E, tile.tokens, down_tiles, out, coordinates, layer, device.asm)
    act, corr = _scaled(layer.inputs, source, route, S, top_k, 2 if layer.split else 1, x.dtype, lanes, device.asm)

    k_down = layer.down.index.shape[1]
    BN = tile.input_outputs(layer.in_turn)
    if layer.fused:
        hidden = x.new_empty(S, k_down)
        hidden_corr = x.new_empty(S, 2 * k_down // BN, dtype=torch.float32)
    else:
        hidden = x.new_empty(S, layer.inputs.scale.shape[1] // (2 if layer.in_turn else 1), dtype=torch.float32)
        hidden_corr = corr
    _launch("gate_up", gate_up_kernel, (-(-widest // BN), route.max_blocks),
            act, corr, *_codes(layer.inputs), route.block_matrix, route.block_slot,
            layer.down.factor, layer.down.offset, hidden, hidden_corr,
            act.shape[-1], layer.inputs.scale.shape[1], k_down, hidden.shape[1],
            NCORR=corr.shape[-1], NCORR_POW2=_pow2(corr.shape[-1]), CORR_CHUNK=SCALE_CHUNK,
            OUT_NCORR=hidden_corr.shape[-1], BN=BN, BT=tile.tokens, SPLIT=layer.split, FUSED=layer.fused,
            DENSE=layer.inputs.dense.numel() > 1, WIDTHS=layer.input_widths, ACT=layer.act,
            BIAS=layer.inputs.bias.numel() > 0, maxnreg=tile.registers[0], **common)  # fmt: skip
    chunk = BN // 2
    if not layer.fused:
        source = hidden.view(*hidden.shape, 1)
        hidden, hidden_corr = _scaled(layer.down, source, route, S, 1, 1, x.dtype, lanes, device.asm)
        chunk = SCALE_CHUNK

    partial = x.new_empty(S, H, dtype=torch.float32)
    _launch("down", down_kernel, (down_tiles, route.max_blocks),
            hidden, hidden_corr, *_codes(layer.down), route.block_matrix, route.block_slot,
            topk_weights.float().contiguous(), route.local, partial, route.arrived, out, k_down, H,
            NCORR=hidden_corr.shape[-1], NCORR_POW2=_pow2(hidden_corr.shape[-1]), CORR_CHUNK=chunk, TOP_K=top_k,
            BN=tile.outputs, BT=tile.tokens, EVEN=H % tile.outputs == 0, DENSE=layer.down.dense.numel() > 1,
            RECORDS=2 + layer.split, WIDTHS=layer.down_widths, BIAS=layer.down.bias.numel() > 0,
            maxnreg=tile.registers[1], **common)  # fmt: skip
    return out


@dataclass(frozen=True)
class _Route:
    """Blocks of slots; see `prepare.begin_kernel`."""

    local: Tensor
    block_expert: Tensor
    block_matrix: Tensor
    block_slot: Tensor
    num_blocks: Tensor
    arrived: Tensor
    max_blocks: int
    tokens: int


def _route(
    topk_ids: Tensor,
    expert_map: Tensor | None,
    E: int,
    tokens: int,
    down_tiles: int,
    out: Tensor | None,
    coordinates: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    layer: KernelLayer | None = None,
    asm: bool = False,
) -> _Route:
    """Blocks of `tokens` slots; clears rows of `out` [T, H] that no expert here writes.

    In the same launch coordinates: x, the basis, its scale and z, which is written. layer: whose matrices the blocks
    will meet; None: nobody asks for them.
    """
    ids = topk_ids.contiguous().flatten()
    S, (T, top_k), H = len(ids), topk_ids.shape, 0 if out is None else out.shape[1]
    most = min(S, S // tokens + E)
    # Each begins at a multiple of ALIGNED: Triton compiles a kernel once more for pointers that do not.
    sizes = [v for n in (S, 1, most, most * tokens, T * down_tiles) for v in (n, -n % ALIGNED)]
    empty = torch.empty(sum(sizes), dtype=torch.int32, device=ids.device)
    local, num_blocks, block_expert, block_slot, arrived = empty.split(sizes)[::2]
    x, basis, basis_scale, z = coordinates or (empty,) * 4
    records, block_matrix, matrices = 0, empty, [empty] * 6
    if layer is not None:
        records = 2 + layer.split
        block_matrix = torch.empty(most * records * 16, dtype=torch.int64, device=ids.device)
        matrices = [t for m in (layer.inputs, layer.down) for t in (m.start, m.tiles, m.columns)]
    R, tile = 0, basis_tile(T)
    programs = max(1, E) + -(-T // ROUTE_TOKENS)
    if coordinates is not None:
        R = len(basis)
        programs += -(-R // tile.coordinates) * -(-T // tile.tokens) * tile.parts
    _launch("begin", prepare.begin_kernel, (programs,),
            ids, local, block_expert, block_slot, num_blocks, block_matrix, arrived, empty if out is None else out,
            S, T, down_tiles, most, tokens, ids if expert_map is None else expert_map, *matrices,
            x, basis, basis_scale, z, H, R, RECORDS=records, E=E, BINS=max(32, _pow2(E)),
            CHUNK=ROUTE_CHUNK, TOP_K=top_k, TOKENS=ROUTE_TOKENS,
            EXPERTS=E if expert_map is None else len(expert_map), EXPERT_MAP=expert_map is not None,
            BASIS=coordinates is not None, BN=tile.coordinates, BT=tile.tokens, BK=tile.inner, PARTS=tile.parts,
            STAGES=3, EVEN=H % tile.inner == 0, ASM=asm, num_warps=tile.warps)  # fmt: skip
    return _Route(local, block_expert, block_matrix, block_slot, num_blocks, arrived, most, tokens)


def _scaled(
    m: Matrices,
    source: Tensor,
    route: _Route,
    S: int,
    rows_per: int,
    per: int,
    dtype: torch.dtype,
    lanes: int,
    asm: bool,
) -> tuple[Tensor, Tensor]:
    """Activations of every slot as the GEMM wants them, and partial corrections.

    source: [rows, columns, parts]. lanes: see `codes.place_in_lanes`.
    """
    K = m.index.shape[1]
    chunks = -(-K // SCALE_CHUNK)
    act = torch.empty(S * per, K, dtype=dtype, device=source.device)
    corr = torch.empty(S * per, chunks, dtype=torch.float32, device=source.device)
    programs = route.max_blocks * -(-route.tokens // SCALE_SLOTS)
    _launch("scale", prepare.scale_kernel, (programs, chunks, per),
            source, route.block_expert, route.block_slot, m.index, m.factor, m.offset, m.tiles,
            act, corr, m.rank, m.lowrank, m.lowrank_start,
            route.tokens, source.shape[1], m.lowrank.shape[1], K, chunks,
            ROWS_PER=rows_per, PER=per, CHUNK=SCALE_CHUNK, SLOTS=SCALE_SLOTS, PARTS=source.shape[2],
            LANES=lanes, FP16=dtype == torch.float16, LOWRANK=len(m.lowrank) > 0, ASM=asm,
            num_warps=1)  # fmt: skip
    return act, corr


def _codes(m: Matrices) -> tuple[Tensor, ...]:
    return m.codes32, m.codes16, m.dense, m.scale, m.bias


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
