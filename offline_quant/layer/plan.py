"""What was decided for a layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import Layer, ProjectionName
from offline_quant.allocation.choices import ChoiceTable
from offline_quant.allocation.solver import Allocation
from offline_quant.decomposition.ranking import RankedProjection


@dataclass(frozen=True)
class LayerPlan:
    """What was decided for a layer.

    Attributes:
        layer: schema as stored, code_rows and ranks filled in, without unused components.
        bits: uint8 [E, B] by projection, of all components.
        ranks: compensators' ranks int32 [E]; None without compensators.
        allocation: the solver's result.
        table: the choices it was made from.
        pilot_error: relative errors of projections that a pilot measured, weighed and added up; None if there was none.
    """

    layer: Layer
    bits: dict[ProjectionName, Tensor]
    ranks: Tensor | None
    allocation: Allocation
    table: ChoiceTable
    pilot_error: float | None = None

    @property
    def losses(self) -> dict[ProjectionName, float]:
        """Loss by projection, not weighed, for objectives whose units lie within one."""
        return self.table.losses(self.allocation.choice)

    @property
    def basis(self) -> str:
        """The form chosen."""
        return self.table.form

    @property
    def projections(self) -> dict[ProjectionName, RankedProjection]:
        """Components of every projection."""
        return self.table.projections

    def basis_tensors(self, name: ProjectionName) -> dict[str, Tensor]:
        """A projection's basis as stored, `{projection}_{part}`; empty without one."""
        tensors = self.projections[name].decomposition.tensors
        if (unused := self.table.unused.get(name)) is not None:
            used = torch.ones(self.table.schema.components(name), dtype=torch.bool, device=unused.device)
            used[unused] = False
            tensors = {part: tensor[used] for part, tensor in tensors.items()}
        return {f"{name}_{part}": tensor for part, tensor in tensors.items()}

    def widths(self, name: ProjectionName, chunk: range, block_size: int, device: torch.device) -> Tensor:
        """Width of every component of some experts.

        Returns:
            uint8 [n, C, 1] where components are inputs, [n, 1, C] where they are outputs.
        """
        bits = self.bits[name][chunk.start : chunk.stop].to(device)
        width = bits.repeat_interleave(block_size, 1)[:, : self.table.schema.components(name)]
        return width[:, :, None] if self.layer.projections[name].component_axis == "input" else width[:, None]

    def stored_rows(self, name: ProjectionName, width: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of some experts' factors that are stored, and the stored component of each.

        Rows of 0 bits come first: those that remain then still fill whole blocks.

        Args:
            name: the projection.
            width: [n, C], of the factors' rows.
            order: int64 [n, C], component of every row.

        Returns:
            int64 [n, R] both.
        """
        if (unused := self.table.unused.get(name)) is None:
            return torch.arange(order.shape[1], device=order.device).expand_as(order), order
        gone = torch.isin(order, unused)
        rows = torch.where(gone, 0, 1 + (width > 0)).argsort(dim=1, stable=True)[:, len(unused) :]
        component = order.gather(1, rows)
        return rows, component - torch.searchsorted(unused, component)


def without_components(schema: Layer, unused: Mapping[ProjectionName, Tensor]) -> Layer:
    """A layer's schema without some components of its bases."""
    projections = dict(schema.projections)
    for name, rows in unused.items():
        basis = projections[name].basis
        assert basis is not None
        smaller = basis.model_copy(update={"rank": basis.rank - len(rows)})
        projections[name] = projections[name].model_copy(update={"basis": smaller})
    return schema.model_copy(update={"projections": projections})
