"""What the bits are spent for: every objective fills the same table of choices, and one knapsack solves them all.

bitsmoe     blocks of components; predicted error of the layer's output (BitsMoE, arXiv 2606.00079)
alphaq      expert matrices; heavy-tail exponent of the spectrum, free of calibration (AlphaQ, arXiv 2606.04980)
bt-moe      experts; bits and compensator rank jointly, activation frequency times output error (BT-MoE)
frequency   expert matrices; activation frequency times what a width loses of a Gaussian
uniform     expert matrices; all alike
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitsmoe_kernels.format.schema import Layer, ProjectionName, num_blocks
from bitsmoe_kernels.models.families import MoEShape
from offline_quant.allocation.heavy_tail import alpha_hill
from offline_quant.config import QuantizeConfig, Scope
from offline_quant.decomposition.forms import _shares_bases, schema_of
from offline_quant.decomposition.ranking import RankedProjection
from offline_quant.linalg import add_damping
from offline_quant.rounding.compensator import tail_energies
from offline_quant.rounding.error_feedback import quantize
from offline_quant.rounding.gaussian import kappa

Plans = dict[ProjectionName, RankedProjection]
Loaded = tuple[Tensor, Tensor]
Result = TypeVar("Result")


class LayerView(Protocol):
    """What an objective may ask of the layer it values."""

    config: QuantizeConfig
    shape: MoEShape

    @property
    def routing_frequency(self) -> Tensor:
        """Share of expert slots that went to each expert, with a floor, float32 [E]."""

    def each(self, work: Callable[[range], Result]) -> Iterator[Result]:
        """`work` of every chunk of experts, in their order."""

    def load(self, chunk: range) -> Loaded:
        """Gate and up [n, 2 I, H] and down [n, H, I] of experts."""

    def weights(self, name: ProjectionName, chunk: range, loaded: Loaded) -> Tensor:
        """W [n, N, K] of a projection, rows scaled by the root of what their outputs weigh."""

    def moments(self, projection: RankedProjection, chunk: range) -> Tensor:
        """Second moments [n, K, K] of what enters the contraction, rows in stored order."""

    def unit_energy(self, name: ProjectionName) -> float:
        """Energy at the layer's output of one unit of a projection's error."""


@dataclass(frozen=True)
class Table:
    """Choices of one layer under one form of decomposition.

    Attributes:
        form: natural, whitened, paper or split.
        schema: the layer's, with no codes yet.
        projections: components of every projection.
        loss: [units, choices], infinite where there is no such choice.
        cost: [units, choices], bits of codes and compensators.
        unit_of: for each projection the unit of every block, int64 [E, B].
        width: [choices].
        rank: [choices], of the compensators of the unit's projections.
        overhead: bits of scales, metadata and basis, as stored.
        unused: components, int64 and ascending, that are held at 0 bits in every expert: their rows of the basis are
            not stored.
    """

    form: str
    schema: Layer
    projections: Plans
    loss: NDArray[np.float64]
    cost: NDArray[np.int64]
    unit_of: dict[ProjectionName, NDArray[np.int64]]
    width: NDArray[np.int64]
    rank: NDArray[np.int64]
    overhead: int
    unused: Mapping[ProjectionName, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """One way to value bits.

    Attributes:
        name: as `--objective` takes it.
        unit: what gets one width: a block of components, an expert's matrix, or a whole expert.
        forms: decompositions it chooses from with `--basis auto`.
        scope: whether one budget holds for each layer or for the model.
        loss: [units, choices] of a layer, given its projections, widths and ranks of all choices.
        ranks: whether compensators are among the choices.
        sensitive: whether losses are relative errors, to be weighed by layer sensitivities under one model budget.
    """

    name: str
    unit: Literal["block", "matrix", "expert"]
    forms: tuple[str, ...]
    scope: Scope
    loss: Callable[[LayerView, Plans, NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]
    ranks: bool = False
    sensitive: bool = False


def table(objective: Objective, view: LayerView, form: str, schema: Layer, plans: Plans, overhead: int) -> Table:
    """All choices of a layer under one form."""
    config, E = view.config, schema.num_experts
    widths = np.array(config.widths, dtype=np.int64)
    ranks = np.array(
        [r for r in config.ranks if r < min(schema.hidden_size, schema.intermediate_size)] if objective.ranks else [0]
    )
    width, rank = np.repeat(widths, len(ranks)), np.tile(ranks, len(widths))
    unit_of: dict[ProjectionName, NDArray[np.int64]] = {}
    units = 0
    for name in plans:
        B = num_blocks(schema.components(name), config.block_size)
        if objective.unit == "block":
            unit_of[name] = units + np.arange(E * B, dtype=np.int64).reshape(E, B)
            units += E * B
        else:
            unit_of[name] = (units + np.arange(E, dtype=np.int64))[:, None].repeat(B, 1)
            units += E if objective.unit == "matrix" else 0
    units = units or E
    cost = np.zeros((units, len(width)), dtype=np.int64)
    for name, unit in unit_of.items():
        rows = np.bincount(unit.ravel(), minlength=units) * config.block_size
        cost += rows[:, None] * schema.features(name) * width
        if objective.ranks:
            cost += 16 * rank * (schema.side(name, "input") + schema.side(name, "output"))
    loss = objective.loss(view, plans, width, rank)
    return Table(form, schema, plans, loss, cost, unit_of, width, rank, overhead)


def _ratios(width: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.array([kappa(int(b)) for b in width])


def _bitsmoe(view: LayerView, plans: Plans, width: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """kappa_b d_k |F_k|^2 f_e, summed over a block, as a share of the projection's output energy."""
    G, share, losses = view.config.block_size, view.routing_frequency.double().cpu(), []
    for plan in plans.values():
        c = plan.components
        energy = c.energy.double().cpu() * share[:, None]
        E, C = energy.shape
        blocks = torch.zeros(E, num_blocks(C, G) * G, dtype=torch.float64)
        blocks[:, :C] = energy
        weight = blocks.view(E, -1, G).sum(-1) / (c.total.double().cpu() * share).sum().clamp(min=1e-300)
        losses.append(weight.flatten().numpy())
    return np.concatenate(losses)[:, None] * _ratios(width)


def _alphaq(view: LayerView, plans: Plans, width: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """alpha^-gamma Var(W) 2^-2b; the paper's median of alpha is one factor for all and changes nothing."""
    gamma = view.config.gamma

    def value(chunk: range) -> NDArray[np.float64]:
        loaded = view.load(chunk)
        matrices = (part(name, loaded) for name in plans)
        return np.stack(
            [(alpha_hill(W) ** -gamma * W.double().var((1, 2), correction=0)).cpu().numpy() for W in matrices]
        )

    return np.concatenate(list(view.each(value)), 1).ravel()[:, None] * np.exp2(-2.0 * width)


def part(name: ProjectionName, loaded: tuple[Tensor, Tensor]) -> Tensor:
    """W [n, N, K] of a projection from gate and up [n, 2 I, H] and down [n, H, I]."""
    gate_up, down = loaded
    gate, up = gate_up.chunk(2, 1)
    return {"gate_up": gate_up, "gate": gate, "up": up, "down": down}[name]


def _sizes(view: LayerView, plans: Plans) -> NDArray[np.float64]:
    """Weights of one expert's matrix, by projection."""
    one = float(view.shape.hidden_size * view.shape.intermediate_size)
    return np.array([2 * one if name == "gate_up" else one for name in plans])


def _frequency(view: LayerView, plans: Plans, width: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every weight counts as often as its expert is used."""
    share = view.routing_frequency.double().cpu().numpy()
    return np.outer(_sizes(view, plans), share).ravel()[:, None] * _ratios(width)


def _uniform(view: LayerView, plans: Plans, width: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every weight counts the same."""
    return _sizes(view, plans).repeat(view.shape.num_experts)[:, None] * _ratios(width)


def _bt_moe(view: LayerView, plans: Plans, width: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """F_i L_ij: activation frequency times L2 of the layer's output change at width and rank j.

    Measured: the expert is quantized at every width, and the singular values of the residual, in the metric of its
    activations, tell what each rank leaves over.
    """

    def energies(chunk: range) -> NDArray[np.float64]:
        loaded, energy = view.load(chunk), np.zeros((len(chunk), len(width)))
        for name, plan in plans.items():
            W, M = view.weights(name, chunk, loaded), view.moments(plan, chunk)
            order = plan.components.order[chunk.start : chunk.stop]
            F, M = W.mT.gather(1, order[:, :, None].expand(-1, -1, W.shape[1])), add_damping(M)
            for bits in np.unique(width):
                widths = torch.full(order.shape, int(bits), dtype=torch.uint8, device=F.device)
                found = quantize(F, M, widths, "K", 0, view.config.feedback)
                tail = tail_energies(F - found.dequantize(widths[:, :, None]), M).double().cpu().numpy()
                here = width == bits
                energy[:, here] += tail[:, rank[here]] * view.unit_energy(name)
        return energy

    energy = np.concatenate(list(view.each(energies)))
    return view.routing_frequency.double().cpu().numpy()[:, None] * np.sqrt(energy)


OBJECTIVES = {
    o.name: o
    for o in (
        Objective("bitsmoe", "block", ("natural", "whitened"), "layer", _bitsmoe, sensitive=True),
        Objective("alphaq", "matrix", ("split",), "model", _alphaq),
        Objective("bt-moe", "expert", ("natural",), "model", _bt_moe, ranks=True),
        Objective("frequency", "matrix", ("natural",), "layer", _frequency, sensitive=True),
        Objective("uniform", "matrix", ("natural",), "layer", _uniform, sensitive=True),
    )
}


def forms_of(config: QuantizeConfig) -> tuple[str, ...]:
    """The forms that may be chosen from."""
    return OBJECTIVES[config.objective].forms if config.basis == "auto" else (config.basis,)


def may_share_bases(shape: MoEShape, config: QuantizeConfig) -> bool:
    """Whether a form with shared bases may be chosen."""
    return any(_shares_bases(schema_of(form, shape, config)) for form in forms_of(config))
