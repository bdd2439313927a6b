"""Ways to compute a layer in this process: our CPU kernels, the torch reference, vLLM's experts.

Weights are made up. Every rival is checked against float64 on a small layer (`rounds.small_shape`).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from benchmarks.cpu.rounds import CHECKED_TOKENS, Call, small_shape
from benchmarks.kernels.baselines import random_scales, random_words, unpacked
from benchmarks.kernels.experts import GROUP, reference, relative_error
from benchmarks.kernels.grouped import PER_WORD
from benchmarks.kernels.routing import UNIFORM, route
from benchmarks.kernels.shapes import Shape
from benchmarks.kernels.synthetic import NATURAL, WHITENED, fewer_experts, format_layer
from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.backends.base import Target
from bitsmoe_kernels.backends.cpu_moe import CpuMoE
from bitsmoe_kernels.backends.torch_reference import TorchReference
from bitsmoe_kernels.format.schema import MAX_BITS, Basis, Layer, Projection

DTYPE = torch.bfloat16
"""Of activations, as vLLM serves these models."""
ROUNDED, INTEGER = 1e-2, 5e-2
"""Relative error that a rival may have: a few roundings to bfloat16; activations of 8 bits with a scale for many."""
OURS, REFERENCE = "bitsmoe", "torch reference"
BASIS = {NATURAL: "natural", WHITENED: "8-bit basis"}
UNIFORM_2 = torch.tensor([0.0, 0.0, 1.0])
"""Probabilities of code widths from 0 on: all are 2."""
WIDTH_SPREAD = 1.4
"""Of code widths; with it their shares are about those that `bitsmoe inspect` shows for tiny_moe at 2.125 bits."""


def repeated(some: Tensor, experts: int) -> Tensor:
    """Tensors of a few experts, along the first side, over and over."""
    return some.repeat(-(-experts // len(some)), *[1] * (some.ndim - 1))[:experts].contiguous()


class _InProcess(ABC):
    """What rivals in this process share; see `rounds.Rival`.

    Attributes:
        limit: relative error allowed.
        small_shape: of a small layer. Its calls also wake threads before a turn.
    """

    name: str
    bits: float
    expert_bytes: float
    shared_bytes: float
    copies: int
    detail = ""
    limit: float
    small_shape: Shape

    @abstractmethod
    def forward(self, number: int, x: Tensor, call: Call) -> Tensor:
        """The layer by one of the copies."""

    @abstractmethod
    def small(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The small layer."""

    @abstractmethod
    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gate over up [2 I, H] and down [H, I] of the small layer, float64."""

    def check(self) -> float:
        """See `rounds.Rival`.

        Raises:
            ValueError: it is above the limit, or not a number.
        """
        worst = 0.0
        for tokens in CHECKED_TOKENS:
            x = made_up_tokens(tokens, self.small_shape)
            weights, ids = self._small_routing(tokens)
            error = relative_error(self.small(x, weights, ids), reference(self, x, weights, ids))
            if not error <= self.limit:
                raise ValueError(f"{self.name}: wrong result: relative error {error:.2e}, above {self.limit:.0e}")
            worst = max(worst, error)
        return worst

    def turn(self, x: Tensor, calls: Sequence[tuple[int, Call]]) -> float:
        """See `rounds.Rival`."""
        self.small(x, *self._small_routing(len(x)))
        before = time.perf_counter()
        for number, call in calls:
            self.forward(number, x, call)
        return time.perf_counter() - before

    def _small_routing(self, tokens: int) -> tuple[Tensor, Tensor]:
        return route(UNIFORM, tokens, self.small_shape.num_experts, self.small_shape.top_k, tokens, "cpu")


def made_up_tokens(count: int, shape: Shape) -> Tensor:
    """Activations [T, H]."""
    return torch.randn(count, shape.hidden_size, generator=torch.Generator().manual_seed(count)).to(DTYPE)


def copies_for(layer_bytes: int, working_set: int) -> int:
    """How many copies of a layer hold so many bytes."""
    return max(1, -(-working_set // layer_bytes))


def bare_bits(shape: Shape, form: str) -> float:
    """Bits per weight of everything but codes."""
    basis = Basis(rank=shape.hidden_size, bits=8) if form == WHITENED else None
    layer = Layer(
        num_experts=shape.num_experts, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        projections={
            "gate_up": Projection(code_rows=0, order="expert", basis=basis), "down": Projection(code_rows=0),
        },
    )  # fmt: skip
    return 8 * layer.nbytes(16) / layer.num_weights


def width_mix(average: float) -> Tensor:
    """Probabilities of 0 to 8 bits: a normal distribution at whole numbers, with the given average.

    Raises:
        ValueError: an average that is not between 0 and 8.
    """
    if not 0 < average < MAX_BITS:
        raise ValueError(f"an average of {average} bits: must be between 0 and {MAX_BITS}")
    bits, low, high = torch.arange(MAX_BITS + 1, dtype=torch.float64), -20.0, 20.0 + MAX_BITS
    for _ in range(80):
        center = (low + high) / 2
        p = torch.softmax(-((bits - center) ** 2) / (2 * WIDTH_SPREAD**2), 0)
        low, high = (center, high) if p @ bits < average else (low, center)
    return p


def title(form: str, bits: float | None, isa: str | None) -> str:
    """Name of our kernels with such a layer and instruction set; None: 2-bit codes; the best."""
    words = [f"{OURS} {BASIS[form]}", "2-bit codes" if bits is None else f"{bits:g} bits"]
    return ", ".join([*words, isa] if isa else words)


class _Ours(_InProcess):
    """What the reference and the kernels share.

    Args:
        shape: of the layer.
        form: of `synthetic.FORMS`.
        bits: per weight, all included, of code widths as an allocation mixes them; None: all codes have 2 bits.
    """

    limit = ROUNDED

    def __init__(self, shape: Shape, form: str, bits: float | None):
        mix = UNIFORM_2 if bits is None else width_mix(bits - bare_bits(shape, form))
        self.weights = format_layer(shape, form, mix, 0, "cpu")
        layer = self.weights.layer
        self.bits = 8 * layer.nbytes(self.weights.block_size) / layer.num_weights
        self.small_shape = small_shape(shape)
        self.small_weights = format_layer(self.small_shape, form, mix, 0, "cpu")
        self.shared_bytes = sum(t.nbytes for n, t in self.weights.tensors.items() if "_basis" in n)

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """See `_InProcess`."""
        gate, up, down = self.small_weights.expert_weights(expert)
        return torch.cat([gate, up]).double(), down.double()


class Reference(_Ours):
    """The torch reference."""

    name = REFERENCE
    copies = 1

    def __init__(self, shape: Shape, form: str, bits: float | None):
        super().__init__(shape, form, bits)
        stored = self.weights.layer.nbytes(self.weights.block_size)
        self.expert_bytes = (stored - self.shared_bytes) / shape.num_experts
        target = Target("cpu", None, DTYPE)
        backend = TorchReference()
        self._compute = backend.compute
        self._layer, self._small = backend.prepare(self.weights, target), backend.prepare(self.small_weights, target)

    def forward(self, number: int, x: Tensor, call: Call) -> Tensor:
        """See `_InProcess`."""
        tensors = list(self._layer.tensors.values())
        return self._compute(x, call.weights, call.ids, None, tensors, self._layer.key)

    def small(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `_InProcess`."""
        return self._compute(x, weights, ids, None, list(self._small.tensors.values()), self._small.key)


class Kernels(_Ours):
    """Our CPU kernels.

    The best instruction set is called as vLLM calls it, through the op. Others (`using`) go by `library.forward`.

    Args:
        working_set: bytes that the copies hold together at least.
    """

    def __init__(self, shape: Shape, form: str, bits: float | None, working_set: int):
        super().__init__(shape, form, bits)
        self.name = title(form, bits, None)
        target = Target("cpu", None, DTYPE)
        backend = CpuMoE()
        if reason := backend.why_not(self.weights.layer, target):
            raise ValueError(reason)
        (first,) = backend.prepare(self.weights, target).tensors.values()
        (self._small,) = backend.prepare(self.small_weights, target).tensors.values()
        del self.weights
        self.copies = copies_for(first.nbytes, working_set)
        self._layers = [first] + [_copy(first) for _ in range(self.copies - 1)]
        self.expert_bytes = (first.nbytes - self.shared_bytes) / shape.num_experts
        self._isa: str | None = None
        self.detail = library.best()
        self._compute = backend.compute

    def using(self, name: str, isa: str | None) -> "Kernels":
        """The same weights by another instruction set, of `library.INSTRUCTION_SETS`; None: the best."""
        other = copy(self)
        other.name, other._isa, other.detail = name, isa, isa or library.best()
        return other

    def _call(self, layer: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if self._isa:
            return library.forward(layer, x, weights, ids, None, isa=self._isa)
        return self._compute(x, weights, ids, None, [layer], "")

    def forward(self, number: int, x: Tensor, call: Call) -> Tensor:
        """See `_InProcess`."""
        return self._call(self._layers[number], x, call.weights, call.ids)

    def small(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `_InProcess`."""
        return self._call(self._small, x, weights, ids)


def _copy(tensor: Tensor) -> Tensor:
    """The same bytes at another address, in large pages."""
    other = torch.empty_like(tensor)
    library.large_pages(other)
    return other.copy_(tensor)


class Vllm(_InProcess):
    """What vLLM's experts share: tensors in vLLM's layout, experts along the first side."""

    shared_bytes: float = 0.0

    def __init__(self, shape: Shape, working_set: int):
        gen = torch.Generator().manual_seed(0)
        self.small_shape = small_shape(shape)
        self.plain = self.made_up(self.small_shape, gen)
        self._small = self.packed(self.plain)
        some = self.packed(self.made_up(fewer_experts(shape, 2), gen))
        first = [repeated(t, shape.num_experts) for t in some]
        layer_bytes = sum(t.nbytes for t in first)
        self.copies = copies_for(layer_bytes, working_set)
        self._layers = [first] + [[t.clone() for t in first] for _ in range(self.copies - 1)]
        self.expert_bytes = layer_bytes / shape.num_experts
        self.bits = 8 * self.expert_bytes / shape.expert_weights

    @classmethod
    @abstractmethod
    def able(cls) -> bool:
        """Whether vLLM has this kind of experts for this processor."""

    @abstractmethod
    def made_up(self, shape: Shape, gen: torch.Generator) -> list[Tensor]:
        """Tensors of a checkpoint."""

    @abstractmethod
    def packed(self, plain: list[Tensor]) -> list[Tensor]:
        """The same as vLLM's layer keeps them after loading, experts along the first side as before."""

    @abstractmethod
    def compute(self, layer: list[Tensor], out: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        """The call that vLLM's layer makes."""

    def forward(self, number: int, x: Tensor, call: Call) -> Tensor:
        """See `_InProcess`."""
        out = torch.empty_like(x)
        self.compute(self._layers[number], out, x, call.weights, call.ids)
        return out

    def small(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `_InProcess`."""
        out = torch.empty_like(x)
        self.compute(self._small, out, x, weights, ids)
        return out


class VllmPlain(Vllm):
    """16-bit weights, by the class that vLLM itself would choose on this processor."""

    name = "vLLM 16 bits"
    limit = ROUNDED

    def __init__(self, shape: Shape, working_set: int):
        from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
            UnquantizedMoeBackend,
            backend_to_kernel_cls,
        )

        # In the order of preference; what else they ask for holds here: bfloat16, sizes divisible by 32.
        classes = backend_to_kernel_cls(UnquantizedMoeBackend.CPU)
        self.isa = self.detail = next(c for c in classes if c._supports_current_device()).isa
        super().__init__(shape, working_set)

    @classmethod
    def able(cls) -> bool:
        """See `Vllm`."""
        return True

    def made_up(self, shape: Shape, gen: torch.Generator) -> list[Tensor]:
        """See `Vllm`."""
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        return [torch.randn(E, N, K, generator=gen).div_(K**0.5).to(DTYPE) for N, K in ((2 * I, H), (H, I))]

    def packed(self, plain: list[Tensor]) -> list[Tensor]:
        """See `Vllm`."""
        from vllm._custom_ops import cpu_prepack_moe_weight

        return [cpu_prepack_moe_weight(t, self.isa) for t in plain]

    def compute(self, layer: list[Tensor], out: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        """See `Vllm`."""
        from vllm._custom_ops import cpu_fused_moe

        cpu_fused_moe(out, x, *layer, None, None, weights, ids, "silu", self.isa)

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """See `_InProcess`."""
        w13, w2 = self.plain
        return w13[expert].double(), w2[expert].double()


class VllmInt4(Vllm):
    """GPTQ's 4-bit codes, a scale and a zero point for 128 weights; activations are rounded to 8 bits."""

    limit = INTEGER
    name = "vLLM GPTQ 4 bits"

    @classmethod
    def able(cls) -> bool:
        """See `Vllm`."""
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

        return CPUExpertsInt4._supports_current_device()

    def made_up(self, shape: Shape, gen: torch.Generator) -> list[Tensor]:
        """See `Vllm`."""
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        found = []
        for N, K in ((2 * I, H), (H, I)):
            found.append(random_words(gen, E, K // PER_WORD, N))
            found.append(random_scales(gen, E, K // GROUP, N, steps=4.6, inputs=K, dtype=DTYPE))
        return found

    def packed(self, plain: list[Tensor]) -> list[Tensor]:
        """See `Vllm`."""
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import prepare_int4_moe_layer_for_cpu

        w13, s13, w2, s2 = plain
        return list(prepare_int4_moe_layer_for_cpu(w13, w2, s13, s2))

    def compute(self, layer: list[Tensor], out: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        """See `Vllm`."""
        from vllm._custom_ops import CPUQuantMethod, fused_experts_cpu

        w13, w2, *scales_and_zeros = layer
        fused_experts_cpu(out, x, w13, w2, weights, ids, CPUQuantMethod.INT4_W4A8, *scales_and_zeros, None)

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """See `_InProcess`."""
        w13, s13, w2, s2 = (t[expert] for t in self.plain)
        return _from_gptq(w13, s13), _from_gptq(w2, s2)


def _from_gptq(words: Tensor, scales: Tensor) -> Tensor:
    """Weights float64 [N, K] of words [K / 8, N] and scales [K / 128, N]; code 8 stands for 0."""
    return (unpacked(words.T, 4) - 8).double() * scales.T.double().repeat_interleave(GROUP, -1)


class VllmMxfp4(Vllm):
    """MXFP4: 4-bit floating-point numbers, a power of two for 32 weights."""

    limit = ROUNDED
    name = "vLLM MXFP4"
    VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    @classmethod
    def able(cls) -> bool:
        """See `Vllm`."""
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsMxfp4

        return CPUExpertsMxfp4._supports_current_device()

    def made_up(self, shape: Shape, gen: torch.Generator) -> list[Tensor]:
        """See `Vllm`."""
        E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
        found = []
        for N, K in ((2 * I, H), (H, I)):
            found.append(torch.randint(256, (E, N, K // 2), generator=gen, dtype=torch.uint8))
            exponent = 127 - round(torch.tensor(2.9 * K**0.5).log2().item())
            found.append(torch.randint(exponent - 1, exponent + 2, (E, N, K // 32), generator=gen, dtype=torch.uint8))
        return found

    def packed(self, plain: list[Tensor]) -> list[Tensor]:
        """See `Vllm`."""
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import prepare_mxfp4_moe_layer_for_cpu

        w13, s13, w2, s2 = plain
        return list(prepare_mxfp4_moe_layer_for_cpu(w13, w2, s13, s2))

    def compute(self, layer: list[Tensor], out: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        """See `Vllm`."""
        from vllm._custom_ops import CPUQuantMethod, fused_experts_cpu

        w13, w2, s13, s2 = layer
        fused_experts_cpu(out, x, w13, w2, weights, ids, CPUQuantMethod.MXFP4, s13, s2, None, None, None)

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """See `_InProcess`."""
        w13, s13, w2, s2 = (t[expert] for t in self.plain)
        return self._dense(w13, s13), self._dense(w2, s2)

    def _dense(self, codes: Tensor, scales: Tensor) -> Tensor:
        table = torch.tensor([*self.VALUES, *(-v for v in self.VALUES)], dtype=torch.float64)
        values = table[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]
        return values * torch.exp2(scales.double() - 127).repeat_interleave(32, -1)
