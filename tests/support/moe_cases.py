"""Cases of a layer and one call of it, each named for the edge it hits. All kernels run them against float64.

The expectation is `bruteforce`'s: it knows the file's format and nothing of layouts, scales or roundings of kernels.
`kernel_cases` runs the cases with the Triton kernels, `cpu_cases` with the CPU kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bitsmoe_kernels.backends.launch_config import DECODE, PREFILL, TILES, Tile
from bitsmoe_kernels.format.packing import pack_codes
from bitsmoe_kernels.format.schema import Basis, Layer, ProjectionName
from bitsmoe_kernels.reference import LayerWeights
from bitsmoe_kernels.sharding import shard_layer
from bruteforce import Array, biases, expert_weights
from bruteforce import moe as brute_moe
from builders import MadeLayer, Plan, build_layer, with_act

Plans = Mapping[ProjectionName, Plan]
Ids = Sequence[Sequence[int]]
Rank = tuple[int, int, tuple[int, ...] | None]

NATURAL: Plans = {"gate_up": Plan(), "down": Plan()}


def widths(*bits: int) -> Plans:
    """Both projections with blocks of these bit-widths."""
    return {"gate_up": Plan(bits=bits), "down": Plan(bits=bits)}


def together(gate_up: Plan, down: Plan | None = None) -> Plans:
    """A layer of gate and up together."""
    return {"gate_up": gate_up, "down": down or Plan()}


def apart(gate: Plan, up: Plan) -> Plans:
    """A layer of gate and up of their own."""
    return {"gate": gate, "up": up, "down": Plan()}


def ungated(up: Plan, down: Plan | None = None) -> Plans:
    """A layer of experts without a gate; down has the widths of up."""
    return {"up": up, "down": down or Plan(bits=up.bits)}


def repacked(
    made: MadeLayer, bits: Mapping[ProjectionName, Tensor], codes: Mapping[ProjectionName, Tensor]
) -> MadeLayer:
    """The layer with other bit-widths [E, blocks] and codes [E, C, F]."""
    projections, tensors = dict(made.layer.projections), dict(made.tensors)
    for name in projections:
        tensors[f"{name}_bits"] = bits[name]
        pairs = zip(codes[name], bits[name], strict=True)
        tensors[f"{name}_codes"] = torch.cat([pack_codes(q, b, made.block_size) for q, b in pairs])
        projections[name] = projections[name].model_copy(update={"code_rows": int(bits[name].sum())})
    layer = made.layer.model_copy(update={"projections": projections})
    return MadeLayer(Layer.model_validate(layer.model_dump()), made.block_size, tensors, dict(codes))


def _without(made: MadeLayer, where: Mapping[ProjectionName, Sequence[tuple[int, slice]]]) -> MadeLayer:
    bits = {name: made.tensors[f"{name}_bits"].clone() for name in made.layer.projections}
    codes = {name: q.clone() for name, q in made.codes.items()}
    for name, places in where.items():
        for expert, blocks in places:
            bits[name][expert, blocks] = 0
            width = bits[name][expert].repeat_interleave(made.block_size)[: codes[name].shape[1]]
            codes[name][expert, width == 0] = 0
    return repacked(made, bits, codes)


def with_empty_expert(made: MadeLayer) -> MadeLayer:
    """Expert 1 loses all its codes, expert 2 those of its first block."""
    places = [(1, slice(None)), (2, slice(0, 1))]
    return _without(made, dict.fromkeys(made.layer.projections, places))


def with_empty_down(made: MadeLayer) -> MadeLayer:
    """Expert 1 loses the codes of down."""
    return _without(made, {"down": [(1, slice(None))]})


def with_extreme_codes(made: MadeLayer) -> MadeLayer:
    """Expert 0 has the highest code everywhere, expert 1 the lowest, the others one or the other."""
    codes = {}
    for name, q in made.codes.items():
        width = made.tensors[f"{name}_bits"].long().repeat_interleave(made.block_size, 1)[:, : q.shape[1]]
        top = ((1 << width) - 1)[:, :, None]
        high = q > top // 2
        high[0], high[1] = True, False
        codes[name] = torch.where(high, top, 0).to(torch.uint8)
    return repacked(made, {name: made.tensors[f"{name}_bits"] for name in codes}, codes)


def _with_gates(made: MadeLayer, times: float) -> MadeLayer:
    names = [f"{name}_feature_scale" for name in made.layer.projections if name != "down"]
    scaled = {name: (made.tensors[name].float() * times).half() for name in names}
    return replace(made, tensors=made.tensors | scaled)


def with_small_gates(made: MadeLayer) -> MadeLayer:
    """Weights of gate and up a thousandth of the usual."""
    return _with_gates(made, 1 / 1000)


def with_large_gates(made: MadeLayer) -> MadeLayer:
    """Weights of gate and up 16 times the usual."""
    return _with_gates(made, 16)


def with_gelu(made: MadeLayer) -> MadeLayer:
    """With the activation of Gemma."""
    return with_act(made, "gelu_pytorch_tanh")


def with_swigluoai(made: MadeLayer) -> MadeLayer:
    """With the activation of gpt-oss, gates and ups so large that it clamps a part of them."""
    return with_act(_with_gates(made, 4), "swigluoai")


def with_clamps(made: MadeLayer) -> MadeLayer:
    """With the activation of GLM-5.3-Flash, gates and ups so large that it clamps a part of them."""
    return with_act(_with_gates(made, 3), "silu_clamp10")


@dataclass(frozen=True)
class Case:
    """One layer, one call.

    Attributes:
        edge: which edge it hits.
        plans: of the projections; input axis only.
        experts, hidden, intermediate, block: sizes.
        kwidth: of the Triton kernels, see `layout.KernelLayer`.
        ids: expert ids of every token.
        tile: configuration of the Triton kernels; None: by the table.
        change: what is done to the layer after it was built.
        amplitude: standard deviation of the input.
        limits: constants of `triton_launch` set lower.
        ranks: (tensor-parallel rank, their number, experts or None: all) of each part; the parts add up.
        strided: whether input and routing are columns of wider tensors.
        ids_dtype: of the expert ids.
        triton: whether the Triton kernels can compute the layer.
    """

    edge: str
    plans: Plans = field(default_factory=lambda: NATURAL)
    experts: int = 3
    hidden: int = 72
    intermediate: int = 40
    block: int = 16
    kwidth: int = 2
    ids: Ids = ((0, 1), (2, 0), (1, 2))
    tile: Tile | None = None
    change: Callable[[MadeLayer], MadeLayer] | None = None
    amplitude: float = 1.0
    limits: Mapping[str, int] = field(default_factory=dict)
    ranks: tuple[Rank, ...] = ((0, 1, None),)
    strided: bool = False
    ids_dtype: torch.dtype = torch.int32
    triton: bool = True


def spread(tokens: int, top_k: int, experts: int) -> Ids:
    """A fixed routing in which experts get different numbers of tokens and no token has one twice."""
    return [[(t * t // 2 + j) % experts for j in range(top_k)] for t in range(tokens)]


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for b in range(1, 9):
        # Wider codes are made of those up to 4 bits: each with one of the two is enough.
        for kwidth in (2, 4) if b <= 4 else (2 + 2 * (b % 2),):
            cases[f"{b} bits, kwidth {kwidth}"] = Case(
                "one width alone: its words, places and shifts, in a tile that padding fills", widths(b),
                experts=2, ids=((0,), (1,)), kwidth=kwidth,
            )  # fmt: skip
    for block, kwidth in ((16, 2), (32, 4)):
        cases[f"all widths, blocks of {block}"] = Case(
            "what one width has left over moves up into the tiles of the next", hidden=200, intermediate=136,
            block=block, kwidth=kwidth, ids=((0, 1), (2, 0)),
        )  # fmt: skip
    cases |= {
        "no codes": Case("every block has 0 bits: nothing to contract, exact zeros", widths(0)),
        "blocks without codes": Case("components of 0 bits vanish from index and scales", widths(0, 2)),
        "an expert without codes": Case(
            "one expert has no tile at all, another begins with an empty block", change=with_empty_expert
        ),
        "an expert without codes in down": Case(
            "gate and up have codes for no channel at all", change=with_empty_down
        ),
        "extreme codes": Case(
            "the highest and lowest code everywhere: fields full, no carry into neighbours",
            widths(1, 2, 3, 4, 8), change=with_extreme_codes, kwidth=4,
        ),
        "one component": Case(
            "a single block of a single component", hidden=1, intermediate=1, experts=1, ids=((0,),) * 12
        ),
        "five tiles": Case(
            "more tiles of a width than one turn of the loop takes, and a rest", widths(2), hidden=328,
            intermediate=16, experts=2, ids=((1, 0),), tile=Tile(128, 16, 4, 4, 3),
        ),
        "five tiles of 3 bits": Case(
            "wide and narrow words advance together over turns of the loop, in the masked loads of down too",
            widths(3), hidden=40, intermediate=328, experts=1, ids=((0,),) * 3, kwidth=4, tile=Tile(128, 16, 4, 2, 3),
        ),
        "more than a chunk": Case(
            "more components than one program of the scaling kernel takes, twice as many in two planes",
            widths(8), hidden=264, experts=1, ids=((0,), (0,)),
        ),
        "ordered": Case("one order for the layer", together(Plan(order="shared"))),
        "order of each expert": Case("one order for each expert", together(Plan(order="expert")), kwidth=4),
        "8-bit basis": Case(
            "the shared projection from int8, its components in one order",
            together(Plan(basis=Basis(rank=72, bits=8), order="shared")),
        ),
        "16-bit basis of less than full rank": Case(
            "fewer components than the hidden size, each expert with its own order",
            together(Plan(basis=Basis(rank=53, bits=16), order="expert")), kwidth=4,
        ),
        "a basis and many tokens": Case(
            "the projection's tile for more than 64 tokens, with a tail", hidden=136,
            plans=together(Plan(basis=Basis(rank=130, bits=8), bits=(2,)), Plan(bits=(2,))), experts=2, intermediate=16,
            ids=[[0 if t % 3 else 1] for t in range(67)], tile=TILES[90][PREFILL][-1],
        ),
        "gate and up apart": Case(
            "two matrices for each expert, of different widths and orders",
            apart(Plan(bits=(1, 3), order="shared"), Plan(bits=(2, 4, 0), order="expert")), intermediate=72,
        ),
        "gate and up apart with bases": Case(
            "each with its own basis and rank: up's components begin after gate's", kwidth=4,
            plans=apart(Plan(basis=Basis(rank=50, bits=8)), Plan(basis=Basis(rank=31, bits=8), order="expert")),
        ),
        "gate and up apart with 16-bit bases": Case(
            "no scale of the basis", apart(*[Plan(basis=Basis(rank=40, bits=16), order="shared")] * 2),
        ),
        "kept experts": Case(
            "plain numbers beside codes, experts with none of one or of the other",
            {"gate_up": Plan(kept_experts=(2,)), "down": Plan(kept_experts=(0, 2), kept_dtype="float16")}, kwidth=4,
        ),
        "all experts kept": Case(
            "no codes anywhere, only plain numbers",
            {"gate_up": Plan(kept_experts=(0, 1, 2)), "down": Plan(kept_experts=(0, 1, 2))},
        ),
        "compensators of gate and up": Case(
            "of ranks 0, 3 and 65, which is more than a tile", together(Plan(ranks=(0, 3, 65))), ids=((0, 2), (1, 0)),
        ),
        "compensators of down": Case(
            "down is not fused: its activations are scaled by themselves", together(Plan(), Plan(ranks=(2, 0, 1))),
            kwidth=4,
        ),
        "compensators of a long down": Case(
            "three partial corrections for each row, in the chunks of the scaling kernel",
            together(Plan(bits=(2,)), Plan(bits=(8,), ranks=(1,))), experts=1, hidden=16, intermediate=530,
            ids=((0,), (0,)),
        ),
        "compensators and kept experts": Case(
            "all extras on all matrices, gate and up apart",
            {
                "gate": Plan(ranks=(1, 0, 2), kept_experts=(1,)),
                "up": Plan(ranks=(0, 4, 0)),
                "down": Plan(ranks=(3, 0, 2), kept_experts=(2,)),
            },
            ids=((0, 1), (2, 0), (1, 2)),
        ),
        "one token": Case("a single slot in use", ids=((2,),)),
        "one token, all experts": Case("a block for each expert, each with one row", ids=((1, 2, 0),), kwidth=4),
        "all tokens to one expert": Case(
            "blocks of one expert only, the last one ragged; all others empty", experts=5, ids=[[3]] * 19
        ),
        "ragged tails": Case(
            "tokens of each expert are no multiple of a block, some experts have more than a block",
            widths(2), experts=4, ids=spread(23, 2, 4), ids_dtype=torch.int64,
        ),
        "an expert twice for a token": Case("the same expert in two slots", ids=((1, 1, 0), (2, 2, 2))),
        "negative ids": Case(
            "skipped slots, and a token that nobody computes",
            ids=((-1, 2), (-1, -1), (0, -5), (1, -1), (-2, 0)), ids_dtype=torch.int64,
        ),
        "ids of no expert": Case(
            "at and beyond the number of experts, which is no power of two",
            ids=((0, 3), (3, 4), (2**31 - 1, 1), (2, -1)),
        ),
        "ids of no expert, experts a power of two": Case(
            "int64 ids whose lower half is an expert's, and a token of nothing else", experts=4,
            ids=((0, 4), (5, 2**31 - 1), (2**31, 1), (2**32 + 1, 2), (2**62, 2**32), (3, -(2**63))),
            ids_dtype=torch.int64,
        ),
        "ids of no expert among many": Case(
            "blocks of many experts, ids of none in every other token", widths(2), experts=60, hidden=40,
            intermediate=24, ids=[[t * 7 % 60, 60 + t] if t % 2 else [t, t * 11 % 60] for t in range(12)], kwidth=4,
        ),
        "ids of no expert, wide": Case(
            "the same in int64", widths(2), ids_dtype=torch.int64,
            ids=((0, 3), (4, 2**31 - 1), (2**31, 1), (2**32 + 1, 2), (2**62, 2**32), (2, -1)),
        ),
        "nobody is routed": Case("no block at all: zeros", ids=((-1, -1),) * 2),
        "no tokens": Case("an empty batch", ids=()),
        "small sizes": Case("fewer outputs and components than any tile or group", hidden=5, intermediate=3),
        "sizes of no round number": Case(
            "no multiple of 16 or 64, several programs of outputs with a tail", hidden=141, intermediate=131,
            ids=((0, 1),), kwidth=4,
        ),
        "sizes of whole tiles": Case(
            "nothing is masked", widths(2, 4), hidden=128, intermediate=128, block=32, ids=((0, 1), (2, 0))
        ),
        "routed in pieces": Case(
            "more slots than a program of the routing looks at together", widths(2), experts=4,
            ids=[*spread(20, 2, 4), (-1, 0), (-1, -1)], limits={"ROUTE_CHUNK": 16},
        ),
        "cut inputs": Case("a longer input than one call takes, with a rest", ids=spread(7, 2, 3),
                           limits={"TOKENS_AT_ONCE": 3}),
        "strided": Case("input and routing are columns of wider tensors", strided=True, ids_dtype=torch.int64),
        "large activations": Case(
            "inputs of 1e4: with the power of two of a code's place on them float16 would overflow",
            widths(1, 2, 3, 4), change=with_small_gates, amplitude=1e4,
        ),
        "small activations": Case(
            "inputs of 1/16: those with small scales come near float16's smallest normal numbers", widths(1, 2, 3, 4),
            change=with_large_gates, amplitude=1 / 16,
        ),
        "two ranks of experts": Case(
            "expert parallelism: experts elsewhere, in any local order, and tokens with none here", experts=4,
            ids=((0, 1), (2, 3), (3, 0), (-1, 2)), ranks=((0, 1, (3, 1)), (0, 1, (0, 2))),
        ),
        "two ranks of experts, wide ids": Case(
            "the map of experts under int64", experts=4, ids=((0, 1), (2, 3), (3, 0), (-1, 2)),
            ranks=((0, 1, (3, 1)), (0, 1, (0, 2))), ids_dtype=torch.int64,
        ),
        "ids of no expert in a map": Case(
            "beyond the map's end, where more memory lies", experts=4, ids=((0, 4), (2, 2**31 - 1), (5, 6), (-1, 3)),
            ranks=((0, 1, (3, 1)), (0, 1, (0, 2))),
        ),
        "ids of no expert in a map, wide": Case(
            "the same in int64", experts=4, ids=((0, 4), (2, 2**31 - 1), (2**32 + 1, 2**62), (-1, 3)),
            ranks=((0, 1, (3, 1)), (0, 1, (0, 2))), ids_dtype=torch.int64,
        ),
        "three ranks of channels": Case(
            "tensor parallelism: whole blocks, one of them partial", intermediate=56,
            ranks=tuple((r, 3, None) for r in range(3)),
        ),
        "ranks of channels with a basis": Case(
            "tensor parallelism: every rank has the whole basis",
            together(Plan(basis=Basis(rank=72, bits=8), order="expert")), intermediate=56,
            ranks=tuple((r, 2, None) for r in range(2)), kwidth=4,
        ),
        "ranks of both kinds with extras": Case(
            "shards of kept experts and compensators, some ranks without any",
            {"gate_up": Plan(ranks=(0, 2, 1), kept_experts=(2,)), "down": Plan(ranks=(1, 0, 0), kept_experts=(2,))},
            ids=((0, 1), (2, 0), (1, 2)), ranks=tuple((r, 2, e) for r in range(2) for e in ((2, 0), (1,))),
        ),
    }  # fmt: skip
    for arch, table in TILES.items():
        for i, tile in enumerate((*table[DECODE], *table[PREFILL])):
            cases[f"tile {i} of {arch}"] = Case(
                "blocks of this tile's tokens: a full one, a ragged one, one of a single token",
                widths(2, 3), experts=2, ids=[[0]] * (tile.tokens + 1) + [[1]], hidden=40, intermediate=24,
                tile=tile, kwidth=2 if arch == 90 else 4,
            )  # fmt: skip
    extra = Plan(basis=Basis(rank=40, bits=8), order="expert", kept_experts=(1,), ranks=(2, 0, 1))
    cases |= {
        "extras beside a basis": Case(
            "kept experts and compensators contract the input itself, codes its coordinates", together(extra),
            triton=False,
        ),
        "extras apart beside 16-bit bases": Case(
            "one matrix of an expert kept, the other one not",
            apart(
                Plan(basis=Basis(rank=31, bits=16), kept_experts=(0,), kept_dtype="float16"),
                Plan(basis=Basis(rank=70, bits=16), ranks=(0, 3, 1), kept_experts=(2,)),
            ),
            triton=False,
        ),
        "a long input": Case(
            "more components of a width than are unpacked at once for many tokens", widths(1, 2, 4), experts=1,
            hidden=3100, intermediate=24, ids=[[0]] * 17, triton=False,
        ),
        "a long input of a basis": Case(
            "the same for bytes", together(Plan(basis=Basis(rank=20, bits=8))), experts=1, hidden=2075,
            intermediate=24, ids=[[0]] * 17, triton=False,
        ),
    }  # fmt: skip
    cases |= {
        "gelu": Case("another activation, of small and large numbers", widths(2, 3), change=with_gelu, amplitude=3.0),
        "gelu, compensators of down": Case(
            "another activation, written before it is scaled for down", together(Plan(), Plan(ranks=(2, 0, 1))),
            change=with_gelu, kwidth=4,
        ),
        "swigluoai": Case("clamps of gate and up, and up plus one", widths(2, 3), change=with_swigluoai),
        "swigluoai, apart": Case(
            "the same on two matrices, before it is scaled for down", kwidth=4, change=with_swigluoai,
            plans={"gate": Plan(), "up": Plan(order="shared"), "down": Plan(ranks=(2, 0, 1))},
        ),
        "clamped silu": Case("the clamps of GLM-5.3-Flash", widths(2, 3), change=with_clamps, amplitude=3.0),
        "sizes of Kimi-K3 and Qwen4": Case(
            "further sizes that few tiles divide", widths(2), experts=1, hidden=3584, intermediate=640, ids=((0,),),
        ),
        "biases": Case(
            "of gate, up and down, in the order of down's components, with tails", intermediate=72,
            plans=together(Plan(bits=(0, 2, 3), bias=True), Plan(bits=(1, 4, 0), bias=True)), change=with_swigluoai,
        ),
        "biases apart": Case(
            "of two matrices, none of gate", kwidth=4, ids=((0, 1), (2, -1)),
            plans={"gate": Plan(), "up": Plan(bits=(3,), bias=True), "down": Plan(bias=True)},
        ),
        "biases beside extras": Case(
            "experts of plain numbers, of compensators, and one without codes have theirs too",
            {
                "gate_up": Plan(kept_experts=(2,), ranks=(0, 3, 0), bias=True),
                "down": Plan(kept_experts=(0,), ranks=(0, 2, 1), bias=True),
            },
            change=with_empty_expert,
        ),
        "ranks of biases": Case(
            "one rank adds those of down, and each its own channels'", intermediate=56, experts=4,
            plans=together(Plan(bias=True), Plan(bias=True)), ids=((0, 1), (2, 3), (3, 0), (-1, 2)),
            ranks=tuple((r, 2, e) for r in range(2) for e in ((3, 1), (0, 2))), change=with_swigluoai,
        ),
        "sizes of gpt-oss": Case(
            "a hidden and an intermediate size that no tile divides, with biases", experts=1, hidden=2880,
            intermediate=2880, ids=((0,),), plans=together(Plan(bits=(2,), bias=True), Plan(bits=(2,), bias=True)),
            change=with_swigluoai, kwidth=4,
        ),
        "many experts": Case(
            "as many experts and routes as Kimi-K3 and Nemotron 3 have", widths(1, 2), experts=896, hidden=24,
            intermediate=16, ids=spread(3, 22, 896),
        ),
        "sizes of Gemma 4": Case(
            "a hidden size and an intermediate size that few tiles divide", widths(2), experts=1, hidden=2816,
            intermediate=704, ids=((0,),), change=with_gelu, kwidth=4,
        ),
    }  # fmt: skip
    cases |= {
        "no gate": Case(
            "relu2 of up alone, several programs with a tail", ungated(Plan(bits=(2, 3))), intermediate=136,
        ),
        "no gate, basis": Case(
            "coordinates in a basis, each expert in its own order",
            ungated(Plan(basis=Basis(rank=72, bits=8), order="expert")), kwidth=4,
        ),
        "no gate, compensators of down": Case(
            "activations are written before they are scaled for down", ungated(Plan(), Plan(ranks=(2, 0, 1))), kwidth=4,
        ),
        "no gate, biases beside extras": Case(
            "a compensator of up, experts of plain numbers, one without codes",
            ungated(Plan(kept_experts=(2,), ranks=(0, 3, 0), bias=True), Plan(kept_experts=(0,), bias=True)),
            change=with_empty_expert,
        ),
        "no gate, large activations": Case(
            "inputs of 1e3, whose squares float16 does not hold", ungated(Plan(bits=(1, 2, 3, 4))), amplitude=1e3,
            change=with_small_gates,
        ),
        "no gate, ranks of both kinds": Case(
            "shards of channels and of experts", ungated(Plan(bias=True), Plan(bias=True)), intermediate=56, experts=4,
            ids=((0, 1), (2, 3), (3, 0), (-1, 2)), ranks=tuple((r, 2, e) for r in range(2) for e in ((3, 1), (0, 2))),
        ),
        "sizes of Nemotron-3-Nano": Case(
            "no gate, and sizes that few tiles divide", ungated(Plan(bits=(2,))), experts=1, hidden=2688,
            intermediate=1856, ids=((0,),),
        ),
        "experts of Nemotron-3-Super": Case(
            "no gate, as many experts as the routing has bins, 22 of them for a token", ungated(Plan(bits=(1, 2))),
            experts=512, hidden=24, intermediate=16, ids=spread(3, 22, 512), kwidth=4,
        ),
        "sizes of Qwen4": Case(
            "a hidden size of whole tiles, an intermediate size that few divide", widths(2), experts=1, hidden=2560,
            intermediate=640, ids=((0,),), kwidth=4,
        ),
    }  # fmt: skip
    return cases


CASES = _cases()


@cache
def made_layer(name: str) -> MadeLayer:
    """The layer of a case."""
    case = CASES[name]
    made = build_layer(
        case.plans,
        num_experts=case.experts,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        block_size=case.block,
        seed=1 + list(CASES).index(name),
    )
    return case.change(made) if case.change else made


@cache
def exact_weights(name: str) -> tuple[Array, Array, Array]:
    """gate, up and down of a case in float64."""
    made = made_layer(name)
    return expert_weights(made.layer.model_dump(mode="json"), made.block_size, made.tensors)


LARGE = {
    "many experts", "sizes of Gemma 4", "sizes of gpt-oss", "sizes of Kimi-K3 and Qwen4", "sizes of Qwen4",
    "sizes of Nemotron-3-Nano", "experts of Nemotron-3-Super",
}  # fmt: skip
"""Cases of many seconds. By day tests/ptx executes them on one architecture, and CPU kernels take one dtype; the
interpreter takes them by night."""


def call_of(name: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x in its dtype, routing weights and ids of a case."""
    case = CASES[name]
    gen = torch.Generator().manual_seed(seed)
    T = len(case.ids)
    top_k = len(case.ids[0]) if T else 2
    x = (torch.randn(T, case.hidden, generator=gen) * case.amplitude).to(dtype)
    # Of either sign and never small: no token and no expert can go missing unnoticed.
    sign = torch.randint(2, (T, top_k), generator=gen) * 2 - 1
    weights = (torch.rand(T, top_k, generator=gen) + 0.5) * sign
    ids = torch.tensor(case.ids, dtype=case.ids_dtype).reshape(T, top_k)
    if case.strided:
        x, weights, ids = (torch.stack([v, torch.full_like(v, 77)], 2).flatten(1)[:, ::2] for v in (x, weights, ids))
        assert not x.is_contiguous()
    return x, weights, ids


def poisoned_call(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`call_of`, and what no expert is to see is NaN: weights of its slots, inputs of such tokens."""
    x, weights, ids = call_of(name, dtype)
    skipped = (ids < 0) | (ids >= CASES[name].experts)
    weights[skipped] = float("nan")
    x[skipped.all(1)] = float("nan")
    return x, weights, ids


def shards(name: str) -> list[tuple[LayerWeights, Tensor | None]]:
    """Each rank's part of a case's layer with its map of experts."""
    case, made = CASES[name], made_layer(name)
    out: list[tuple[LayerWeights, Tensor | None]] = []
    for tp_rank, tp_size, experts in case.ranks:
        layer, tensors = shard_layer(made.layer, made.tensors, made.block_size, tp_rank, tp_size, experts)
        expert_map = None
        if experts is not None:
            expert_map = torch.full((case.experts,), -1, dtype=torch.int32)
            expert_map[list(experts)] = torch.arange(len(experts), dtype=torch.int32)
        out.append((LayerWeights(layer, made.block_size, tensors), expert_map))
    return out


def exact(name: str, dtype: torch.dtype) -> Array:
    """What a case should give, float64, from its input as rounded to the dtype."""
    made = made_layer(name)
    bias = biases(made.layer.model_dump(mode="json"), made.tensors)
    return brute_moe(exact_weights(name), *call_of(name, dtype), hidden_act=made.layer.hidden_act, bias=bias)


MARGIN = 4096
"""Bytes on either side of a tensor in `guarded_memory`."""


class guarded_memory(TorchFunctionMode):  # noqa: N801
    """What torch.empty and its kin return lies between margins; leaving fails if one was written to.

    A margin is full of one int32. The number 1 is the default: whoever reads an expert there takes it for one.
    """

    def __init__(self, fill: int = 1) -> None:
        super().__init__()
        self._fill = fill
        self._made: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return self.put(made) if func.__name__ in ("empty", "empty_like", "new_empty") and made.numel() else made

    def put(self, tensor: Tensor) -> Tensor:
        """A contiguous copy between margins."""
        size = MARGIN + tensor.nbytes + -tensor.nbytes % 4 + MARGIN
        memory = torch.full((size // 4,), self._fill, dtype=torch.int32).view(torch.uint8)
        inner = memory[MARGIN : MARGIN + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        inner.copy_(tensor)
        self._made.append((memory, inner))
        return inner

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for memory, inner in self._made if error[0] is None else ():
            size = -(-inner.nbytes // 4) * 4
            before, behind = memory[:MARGIN].view(torch.int32), memory[MARGIN + size :].view(torch.int32)
            for words, where in ((before, "before"), (behind, "behind")):
                written = (words != self._fill).nonzero().flatten().tolist()
                assert not written, (
                    f"written {where} {list(inner.shape)} {inner.dtype}: words {written[:8]} of a margin"
                )


def bytes_of(tensor: Tensor) -> Tensor:
    """Its bytes in order: NaN equals itself there."""
    return tensor.contiguous().view(torch.uint8)


RESTRICTED: tuple[tuple[Plans, str], ...] = (
    (
        {"gate_up": Plan(), "down": Plan(component_axis="output")},
        "its down projection has components on the output",
    ),
    (
        {"gate": Plan(component_axis="output"), "up": Plan(), "down": Plan()},
        "gate or up has components on the output",
    ),
    ({"gate_up": Plan(), "down": Plan(basis=Basis(rank=8, bits=8))}, "its down projection has a basis"),
    (
        {"gate": Plan(basis=Basis(rank=8, bits=8)), "up": Plan(basis=Basis(rank=8, bits=16)), "down": Plan()},
        "bases of different kinds",
    ),
    ({"gate": Plan(basis=Basis(rank=8, bits=8)), "up": Plan(), "down": Plan()}, "bases of different kinds"),
)
"""Layers that no kernel computes, on GPUs or CPUs, and part of the reason."""


def check_outputs(ys: Sequence[Tensor], x: Tensor) -> None:
    """Results are of the input's dtype and shape, and contiguous."""
    for y in ys:
        assert y.dtype == x.dtype
        assert y.shape == x.shape
        assert y.is_contiguous()
