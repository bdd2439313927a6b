"""Other ways to run the same layer: 16-bit weights, plain 4-bit Triton, GPTQ-Marlin at 4 bits, Humming at 2 bits.

Weights are random; every method is checked against float64 on the layer's own sizes before it is timed (`methods`).
GPTQ-Marlin's weight order follows its published layout: tiles of 16 inputs x 64 outputs, and within one, for each of 32
lanes and four 16-wide column groups, the eight weights that the lane's matrix instruction takes, even ones in the low
half of the word.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from benchmarks.kernels.experts import GROUP, Experts
from benchmarks.kernels.grouped import PER_WORD, grouped_forward, silu_and_mul
from benchmarks.kernels.shapes import Shape
from bitsmoe_kernels.backends import triton_launch as moe

UINT4B8 = 4 << 8 | 8 << 17 | 1 << 50
"""vLLM's number for unsigned 4-bit codes that stand for code - 8."""


def random_scales(gen: torch.Generator, *shape: int, steps: float, inputs: int, dtype: torch.dtype) -> Tensor:
    """Scales of codes whose standard deviation is `steps`, for weights of about 1 / sqrt(inputs)."""
    uniform = torch.rand(*shape, generator=gen, device=gen.device) + 0.5
    return (uniform / steps / inputs**0.5).to(dtype)


def random_words(gen: torch.Generator, *shape: int) -> Tensor:
    """int32, any bits."""
    return torch.randint(-(2**31), 2**31, shape, generator=gen, device=gen.device, dtype=torch.int32)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes along the last side, lowest bits first: int32 [..., n] -> int32 [..., n * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def _scaled(codes: Tensor, zero: int, scales: Tensor) -> Tensor:
    """(codes - zero) * scales of groups of 128, float64 [N, K]."""
    return (codes - zero).double() * scales.double().repeat_interleave(GROUP, -1)


class _Tensors:
    """What all baselines share: named tensors with experts along the first side."""

    tensors: dict[str, Tensor]

    def expert_bytes(self) -> list[int]:
        """See `Experts`."""
        some = next(iter(self.tensors.values()))
        return [sum(t[0].nbytes for t in self.tensors.values())] * len(some)

    def shared_bytes(self) -> int:
        """See `Experts`."""
        return 0

    def stored_bytes(self) -> int:
        """See `Experts`."""
        return sum(t.nbytes for t in self.tensors.values())

    def copy(self) -> Self:
        """See `Experts`."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | {"tensors": {k: v.clone() for k, v in self.tensors.items()}}
        return other


class PlainExperts(_Tensors):
    """Weights at 16 bits, by our plain grouped GEMM."""

    def __init__(self, shape: Shape, dtype: torch.dtype, gen: torch.Generator):
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        self.tensors = {
            "w13": torch.randn(E, 2 * I, H, generator=gen, device=gen.device, dtype=dtype).div_(H**0.5),
            "w2": torch.randn(E, H, I, generator=gen, device=gen.device, dtype=dtype).div_(I**0.5),
        }

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `Experts`."""
        w13, w2 = self.tensors["w13"], self.tensors["w2"]
        return grouped_forward(x, weights, ids, w13, w13, w2, w2, 16)

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """See `Experts`."""
        return self.tensors["w13"][expert].double(), self.tensors["w2"][expert].double()


class FusedExperts(PlainExperts):
    """Weights at 16 bits, by vLLM's `fused_experts`."""

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `Experts`."""
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        return fused_experts(x, self.tensors["w13"], self.tensors["w2"], weights, ids)


class Int4Experts(_Tensors):
    """4-bit codes with a scale for 128 inputs, by our plain grouped GEMM."""

    def __init__(self, shape: Shape, dtype: torch.dtype, gen: torch.Generator):
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        self.tensors = {}
        for name, N, K in (("13", 2 * I, H), ("2", H, I)):
            self.tensors[f"w{name}"] = random_words(gen, E, N, K // PER_WORD)
            self.tensors[f"s{name}"] = random_scales(gen, E, N, K // GROUP, steps=4.6, inputs=K, dtype=dtype)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `Experts`."""
        t = self.tensors
        return grouped_forward(x, weights, ids, t["w13"], t["s13"], t["w2"], t["s2"], 4)

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """See `Experts`."""
        t = self.tensors
        gate_up, down = (_scaled(unpacked(t[f"w{n}"][expert], 4), 8, t[f"s{n}"][expert]) for n in ("13", "2"))
        return gate_up, down


def _marlin_places(device: torch.device) -> tuple[Tensor, Tensor]:
    """Input and output, within a tile of 16 x 64, of nibble m of word (lane, column group): int64 [32, 4, 8] each."""
    lane, group, place = torch.meshgrid(torch.arange(32), torch.arange(4), torch.arange(8), indexing="ij")
    # Nibbles 0 to 3 are the even ones of the eight, 4 to 7 the odd ones.
    entry = place % 4 * 2 + place // 4
    k = 2 * (lane % 4) + entry % 2 + 8 * (entry % 4 // 2)
    n = 16 * group + lane // 4 + 8 * (entry // 4)
    return k.to(device), n.to(device)


def marlin_words(codes: Tensor) -> Tensor:
    """4-bit codes in GPTQ-Marlin's order: uint8 or int32 [K, N] -> int32 [K / 16, 2 N]."""
    K, N = codes.shape
    k, n = _marlin_places(codes.device)
    tiles = codes.int().view(K // 16, 16, N // 64, 64).permute(0, 2, 1, 3)
    words = torch.zeros(K // 16, N // 64, 32, 4, dtype=torch.int32, device=codes.device)
    for m in range(PER_WORD):
        words |= tiles[:, :, k[..., m], n[..., m]] << 4 * m
    return words.view(K // 16, 2 * N)


def marlin_codes(words: Tensor) -> Tensor:
    """Inverse of `marlin_words`: int32 [K, N]."""
    rows, columns = words.shape
    k, n = _marlin_places(words.device)
    tiles = words.view(rows, columns // 128, 32, 4)
    out = torch.empty(rows, columns // 128, 16, 64, dtype=torch.int32, device=words.device)
    for m in range(PER_WORD):
        out[:, :, k[..., m], n[..., m]] = tiles >> 4 * m & 15
    return out.permute(0, 2, 1, 3).reshape(rows * 16, columns // 2)


def marlin_scales(scales: Tensor) -> Tensor:
    """Scales [..., K / 128, N] in GPTQ-Marlin's order: in every 64 outputs, those 8 apart stand together.

    Its own inverse.
    """
    return scales.unflatten(-1, (-1, 8, 8)).transpose(-1, -2).flatten(-3).contiguous()


def aligned(ids: Tensor, block: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots sorted by expert and padded to blocks, each block's expert, and how many padded slots there are.

    By vLLM's operator where it is loaded, else by our own kernel and two small torch operations.
    """
    S = ids.numel()
    most = min(S * block, S + num_experts * (block - 1)) if num_experts > S else S + num_experts * (block - 1)
    if hasattr(torch.ops._moe_C, "moe_align_block_size"):
        slots = torch.empty(most, dtype=torch.int32, device=ids.device)
        experts = torch.empty(-(-most // block), dtype=torch.int32, device=ids.device)
        padded = torch.empty(1, dtype=torch.int32, device=ids.device)
        torch.ops._moe_C.moe_align_block_size(ids, num_experts, block, slots, experts, padded, None)
        return slots, experts, padded
    route = moe._route(ids, None, num_experts, block, 1, None)
    return torch.where(route.block_slot < 0, S, route.block_slot), route.block_expert, route.num_blocks * block


def _summed(y: Tensor, T: int) -> Tensor:
    """Sum over a token's slots: [T * top_k, H] -> [T, H]."""
    y = y.view(T, -1, y.shape[-1])
    out = torch.empty_like(y[:, 0])
    return torch.sum(y, 1, out=out)


class MarlinExperts(_Tensors):
    """4-bit codes with a scale for 128 inputs, by vLLM's GPTQ-Marlin operator, called as vLLM calls it."""

    BLOCKS = (8, 16, 32, 48, 64)

    def __init__(self, shape: Shape, dtype: torch.dtype, gen: torch.Generator):
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        self.tensors = {}
        for name, N, K in (("13", 2 * I, H), ("2", H, I)):
            # Any word is eight valid codes, so random layers need no repacking; `dense` reads this order back.
            self.tensors[f"w{name}"] = random_words(gen, E, K // 16, 2 * N)
            self.tensors[f"s{name}"] = random_scales(gen, E, K // GROUP, N, steps=4.6, inputs=K, dtype=dtype)
        processors = 0
        if gen.device.type == "cuda":
            processors = torch.cuda.get_device_properties(gen.device).multi_processor_count
        self.workspace = torch.zeros(4 * processors, dtype=torch.int32, device=gen.device)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `Experts`."""
        (T, top_k), t = ids.shape, self.tensors
        E, H, both = len(t["w13"]), x.shape[1], t["s13"].shape[2]
        block = next((b for b in self.BLOCKS if T * top_k / E / b < 0.9), self.BLOCKS[-1])
        tables = aligned(ids, block, E)

        def gemm(a: Tensor, name: str, top_k: int, weighted: bool, rows: int, N: int, K: int) -> Tensor:
            out = a.new_empty(rows * top_k, N)
            return torch.ops._moe_C.moe_wna16_marlin_gemm(
                a, out, t[f"w{name}"], None, t[f"s{name}"], None, None, None, None, None, self.workspace, *tables,
                weights, block, top_k, weighted, UINT4B8, rows, N, K, True, False, True, False, -1, -1, -1,
            )  # fmt: skip

        gate_up = gemm(x, "13", top_k, False, T, both, H)
        hidden = x.new_empty(T * top_k, both // 2)
        silu_and_mul(gate_up, hidden)
        return _summed(gemm(hidden, "2", 1, True, T * top_k, H, both // 2), T)

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """See `Experts`."""
        out = []
        for name in ("13", "2"):
            scales = marlin_scales(self.tensors[f"s{name}"][expert]).mT
            out.append(_scaled(marlin_codes(self.tensors[f"w{name}"][expert]).mT, 8, scales))
        return out[0], out[1]


class HummingExperts(_Tensors):
    """2-bit codes with a scale for 128 inputs, by Humming's indexed GEMM, called as vLLM calls it."""

    BITS = 2

    def __init__(self, shape: Shape, dtype: torch.dtype, gen: torch.Generator):
        from humming.layer import HummingMethod
        from humming.schema import HummingInputSchema, HummingWeightSchema

        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        self.method = HummingMethod
        self.stored: dict[str, Tensor] = {}
        module: Any = torch.nn.Module()
        sizes = {"w13": (2 * I, H), "w2": (H, I)}
        for name, (N, K) in sizes.items():
            words = random_words(gen, E, N, K * self.BITS // 32)
            scales = random_scales(gen, E, N, K // GROUP, steps=1.2, inputs=K, dtype=dtype)
            for part, tensor in (("weight", words), ("weight_scale", scales)):
                self.stored[f"{name}_{part}"] = tensor
                setattr(module, f"{name}_{part}", torch.nn.Parameter(tensor.clone(), requires_grad=False))
            HummingMethod.prepare_layer_meta(
                layer=module, shape_n=N, shape_k=K, pad_n_to_multiple=256, pad_k_to_multiple=128,
                weight_schema=HummingWeightSchema(b_dtype=f"uint{self.BITS}", weight_scale_group_size=GROUP),
                input_schema=HummingInputSchema(), num_experts=E, torch_dtype=dtype, sublayer_name=name,
            )  # fmt: skip
            HummingMethod.transform_humming_layer(module, sublayer_name=name)
        self.metas = module.humming_metas
        self.compute = json.dumps({"use_f16_accum": False, "use_batch_invariant": False, "gemm_type": "indexed"})
        self.tuning = {
            name: HummingMethod.get_default_tuning_configs(layer=module, gemm_type="indexed", sublayer_name=name)
            for name in sizes
        }
        self.tensors = {k: v.data for k, v in module.named_parameters()}

    def _module(self) -> Any:
        module: Any = torch.nn.Module()
        module.humming_metas = self.metas
        for name, tensor in self.tensors.items():
            setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
        some = next(iter(self.tensors.values()))
        module.locks = torch.zeros(1024, dtype=torch.int32, device=some.device)
        return module

    def copy(self) -> Self:
        """See `Experts`."""
        other = super().copy()
        other.__dict__.pop("module", None)
        return other

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `Experts`."""
        from humming.ops import moe_fused_mul_sum

        if "module" not in self.__dict__:
            self.module = self._module()
        T, top_k = ids.shape
        S, H = ids.numel(), x.shape[1]
        both = self.stored["w13_weight"].shape[1]
        block = next((c["block_shape"][0] for low, high, c in self.tuning["w13"] if low < S <= high), 64)
        slots, experts, padded = aligned(ids, block, len(self.stored["w13_weight"]))
        common = {
            "layer": self.module, "sorted_ids": slots, "expert_ids": experts, "num_tokens_padded": padded,
            "compute_config": self.compute, "valid_shape_m": S,
        }  # fmt: skip
        gate_up, hidden, y = x.new_empty(S, both), x.new_empty(S, both // 2), x.new_empty(S, H)
        self.method.forward_layer(
            inputs=x, outputs=gate_up, top_k=top_k, tuning_config=json.dumps(self.tuning["w13"]), sublayer_name="w13",
            **common,
        )  # fmt: skip
        silu_and_mul(gate_up, hidden)
        self.method.forward_layer(
            inputs=hidden, outputs=y, top_k=1, tuning_config=json.dumps(self.tuning["w2"]), sublayer_name="w2",
            **common,
        )  # fmt: skip
        return moe_fused_mul_sum(y.view(T, top_k, H), weights)

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """See `Experts`. From the codes as they were before Humming re-ordered them."""
        gate_up, down = (
            _scaled(
                unpacked(self.stored[f"{n}_weight"][expert], self.BITS),
                1 << self.BITS - 1,
                self.stored[f"{n}_weight_scale"][expert],
            )
            for n in ("w13", "w2")
        )
        return gate_up, down


Maker = Callable[[Shape, torch.dtype, torch.Generator], Experts]


def importable(module: str) -> bool:
    """Whether a package is installed; nothing is imported."""
    return importlib.util.find_spec(module) is not None


def load_marlin(extension: Path | None) -> None:
    """Make `torch.ops._moe_C` exist, by an extension file or by vLLM.

    Raises:
        OSError: the extension does not load.
    """
    if extension is not None:
        torch.ops.load_library(str(extension))
    elif importable("vllm"):
        importlib.import_module("vllm._custom_ops")
