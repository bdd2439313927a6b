"""Plain-torch meaning of a checkpoint's tensors: dequantized weights and the routed-experts forward pass.

Every kernel is tested against this file, and vLLM runs it where no kernel can compute a layer. Symbols as in
`format/schema.py`, and

    T  tokens      top_k  experts per token      N  output size of a projection      K  its input size

One mixed-bit matrix M [C, F] of an expert reads

    M[c, f] = component_scale[c] * feature_scale[f] * (q[c, f] - (2^b - 1) / 2)        b: bits of c's block; b = 0: 0
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bitsmoe_kernels.expert_mlp import activated
from bitsmoe_kernels.format.packing import unpack_codes
from bitsmoe_kernels.format.schema import Layer, Part, Projection, ProjectionName


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


@dataclass(frozen=True)
class ProjectionWeights:
    """One projection of a layer: its schema and its tensors."""

    layer: Layer
    name: ProjectionName
    block_size: int
    tensors: Mapping[str, Tensor]

    @cached_property
    def spec(self) -> Projection:
        """Schema of this projection."""
        return self.layer.projections[self.name]

    def part(self, which: Part) -> Tensor:
        """One stored tensor."""
        return self.tensors[f"{self.name}_{which}"]

    @cached_property
    def row_ends(self) -> list[int]:
        """For each expert, the end of its rows in `codes`."""
        return self.part("bits").sum(1, dtype=torch.int64).cumsum(0).tolist()

    @cached_property
    def basis(self) -> Tensor | None:
        """The basis in float32 [R, side], or None."""
        if not self.spec.basis:
            return None
        basis = self.part("basis").float()
        return basis * self.part("basis_scale")[:, None] if self.spec.basis.bits == 8 else basis

    def codes(self, expert: int) -> Tensor:
        """q of one expert, uint8 [C, F], rows in stored order; 0 where b = 0."""
        start = self.row_ends[expert - 1] if expert else 0
        words = self.part("codes")[start : self.row_ends[expert]]
        return unpack_codes(words, self.part("bits")[expert], self.layer.components(self.name), self.block_size)

    def levels(self, expert: int) -> Tensor:
        """q - (2^b - 1) / 2 of one expert, float32 [C, F], rows in stored order; 0 where b = 0."""
        half = (torch.exp2(self.part("bits")[expert].float()) - 1) / 2
        q = self.codes(expert)
        return q - half.repeat_interleave(self.block_size)[: len(q), None]

    def matrix(self, expert: int) -> Tensor:
        """M of one expert, float32 [C, F], rows in stored order."""
        s, t = self.part("component_scale")[expert].float(), self.part("feature_scale")[expert].float()
        return s[:, None] * self.levels(expert) * t

    def _ordered(self, expert: int) -> Tensor:
        """M with its rows in the order of the components themselves."""
        m = self.matrix(expert)
        order = self.order(expert)
        return m if order is None else torch.empty_like(m).index_copy_(0, order, m)

    def order(self, expert: int) -> Tensor | None:
        """The component each stored row describes, int64 [C]; None: its own."""
        if self.spec.order == "none":
            return None
        order = self.part("order")
        return (order if order.dim() == 1 else order[expert]).long()

    def lowrank(self, expert: int) -> tuple[Tensor, Tensor] | None:
        """Compensator of one expert: [r, K] and [r, N], or None."""
        if not self.spec.lowrank_total:
            return None
        ranks = self.part("lowrank_rank").tolist()
        start = sum(ranks[:expert])
        rows = slice(start, start + ranks[expert])
        return self.part("lowrank_in")[rows].float(), self.part("lowrank_out")[rows].float()

    def weight(self, expert: int) -> Tensor:
        """The dequantized weight of one expert, float32 [N, K], as `torch.nn.functional.linear` takes it."""
        if expert in self.spec.kept_experts:
            return self.part("kept")[self.spec.kept_experts.index(expert)].float()
        m = self._ordered(expert)
        if self.basis is not None:
            m = self.basis.T @ m
        w = m.T if self.spec.component_axis == "input" else m
        if (lowrank := self.lowrank(expert)) is not None:
            w = w + lowrank[1].T @ lowrank[0]
        return w.contiguous()

    def bias(self, expert: int) -> Tensor | None:
        """What is added to the outputs of one expert, float32 [N]; None: nothing."""
        return self.part("shift")[expert].float() if self.spec.bias else None

    def project(self, x: Tensor) -> Tensor:
        """The step that all experts share: basis @ x for an input-side basis, else x. [T, K] -> [T, C or K]."""
        if self.basis is not None and self.spec.component_axis == "input":
            return x @ self.basis.T
        return x

    def forward(self, expert: int, x: Tensor, z: Tensor) -> Tensor:
        """One expert on its tokens.

        Args:
            expert: which.
            x: [n, K] float32.
            z: [n, C or K] float32, `project(x)`.

        Returns:
            [n, N] float32.
        """
        if expert in self.spec.kept_experts:
            return self._biased(expert, x @ self.weight(expert).T)
        s, t = self.part("component_scale")[expert].float(), self.part("feature_scale")[expert].float()
        return self.product(expert, x, z, self.levels(expert), s, t, self.order(expert))

    def product(
        self,
        expert: int,
        x: Tensor,
        z: Tensor,
        q: Tensor,
        s: Tensor | None,
        t: Tensor | None,
        order: Tensor | None,
    ) -> Tensor:
        """`forward` with levels q [C, F] and scales s [C], t [F] in place of the stored ones; gradients pass.

        Args:
            expert, x, z: as for `forward`.
            q, s, t: see above; scales are None where q has them.
            order: the component of every row of q and s, as `order` returns it.
        """
        # As kernels do: integers in the product, one scale before it and one after.
        if self.spec.component_axis == "input":
            y = _scaled(_scaled(z if order is None else z[:, order], s) @ q, t)
        else:
            y = _scaled(_scaled(x, t) @ q.T, s)
            if order is not None:
                y = torch.empty_like(y).index_copy(1, order, y)
            if self.basis is not None:
                y = y @ self.basis
        if (lowrank := self.lowrank(expert)) is not None:
            y = y + (x @ lowrank[0].T) @ lowrank[1]
        return self._biased(expert, y)

    def _biased(self, expert: int, y: Tensor) -> Tensor:
        return y if (bias := self.bias(expert)) is None else y + bias


@dataclass(frozen=True)
class LayerWeights:
    """The routed experts of one layer: schema and tensors (`{projection}_{part}` -> tensor)."""

    layer: Layer
    block_size: int
    tensors: Mapping[str, Tensor]

    @cached_property
    def projections(self) -> dict[ProjectionName, ProjectionWeights]:
        """The stored projections, two or three."""
        return {n: ProjectionWeights(self.layer, n, self.block_size, self.tensors) for n in self.layer.projections}

    def expert_weights(self, expert: int) -> tuple[Tensor, ...]:
        """Dequantized gate [I, H] if there is one, up [I, H] and down [H, I] of one expert, float32."""
        p = self.projections
        if "gate_up" in p:
            return *p["gate_up"].weight(expert).chunk(2), p["down"].weight(expert)
        return tuple(p[name].weight(expert) for name in ("gate", "up", "down") if name in p)

    def experts(self, chosen: range) -> tuple[Tensor, Tensor]:
        """Dequantized gate and up [n, 2 I, H], or up alone [n, I, H], and down [n, H, I] of some experts, float32."""
        experts = [self.expert_weights(e) for e in chosen]
        return torch.stack([torch.cat(e[:-1]) for e in experts]), torch.stack([e[-1] for e in experts])

    def biases(self, chosen: range) -> tuple[Tensor, Tensor] | None:
        """Biases of gate and up [n, 2 I], or of up alone, and of down [n, H], float32; None where there are none."""
        if not any(p.spec.bias for p in self.projections.values()):
            return None

        def stored(name: ProjectionName) -> Tensor:
            p = self.projections[name]
            if p.spec.bias:
                return p.part("shift")[chosen.start : chosen.stop].float()
            return torch.zeros(len(chosen), self.layer.side(name, "output"), device=p.part("bits").device)

        return torch.cat([stored(name) for name in self.projections if name != "down"], 1), stored("down")


def expert_of_slots(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """The expert each slot goes to, int64 in the shape of `topk_ids`; -1: none of those held here.

    An id that names no expert is skipped, for routers leave such ids in slots that they pad or never write.

    Args:
        topk_ids: integers, of any value.
        num_experts: E, held here.
        expert_map: [global experts] -> local index, anything outside 0 to E - 1 for experts elsewhere; None: ids are
            local.
    """
    expert = topk_ids.long()
    here = (expert >= 0) & (expert < (num_experts if expert_map is None else len(expert_map)))
    if expert_map is not None:
        expert = expert_map.long()[torch.where(here, expert, 0)]
        here &= (expert >= 0) & (expert < num_experts)
    return torch.where(here, expert, -1)


def moe_forward(
    weights: LayerWeights,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Routed experts of one layer: sum over a token's experts of weight * down(act(gate(x), up(x))),
    or of weight * down(act(up(x))).

    Dequantizes the experts that were routed to, one after another, and no others. Computes in float32.

    Args:
        weights: E local experts.
        x: [T, H], any float dtype.
        topk_weights: [T, top_k] routing weights.
        topk_ids: [T, top_k] expert ids; global ids where `expert_map` is given. Ids of no expert, negative ones or
            those beyond the last, are skipped, whatever their weight.
        expert_map: [global experts] -> local index or -1 for experts held elsewhere (expert parallelism).

    Returns:
        [T, H] in x's dtype.
    """
    T, H = x.shape
    ids = expert_of_slots(topk_ids, weights.layer.num_experts, expert_map)
    xf = x.float()
    out = xf.new_zeros(T, H)
    p = weights.projections
    inputs = [p[n] for n in ("gate_up", "gate", "up") if n in p]
    shared = [w.project(xf) for w in inputs]
    down = p["down"]
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        hidden = [w.forward(expert, xf[token], z[token]) for w, z in zip(inputs, shared, strict=True)]
        pre = hidden[0].chunk(2, -1) if "gate_up" in p else hidden
        h = activated(pre, weights.layer.hidden_act)
        y = down.forward(expert, h, down.project(h))
        out.index_add_(0, token, y * topk_weights[token, slot, None].float())
    return out.to(x.dtype)
