"""Inputs of the routed experts of one layer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from offline_quant.model.sizes import FLOAT, INT, RunSizes


@dataclass(frozen=True)
class ExpertInputs:
    """Tokens that entered the routed experts of one layer, and their routing.

    Attributes:
        x: float32 [T, H].
        topk_ids: int64 [T, top_k].
        topk_weights: float32 [T, top_k].
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    @classmethod
    def gathered(cls, parts: "Iterable[ExpertInputs]", tokens: int, device: torch.device) -> "ExpertInputs":
        """Concatenate several on a device. Each part is freed before the next one is made.

        Args:
            parts: at least one.
            tokens: T of all parts together.
            device: of the result.
        """
        whole: ExpertInputs | None = None
        at = 0
        for part in parts:
            if whole is None:
                like = (part.x, part.topk_ids, part.topk_weights)
                whole = cls(*(torch.empty(tokens, t.shape[1], dtype=t.dtype, device=device) for t in like))
            end = at + len(part.x)
            whole.x[at:end], whole.topk_ids[at:end], whole.topk_weights[at:end] = (
                part.x, part.topk_ids, part.topk_weights
            )  # fmt: skip
            at = end
        assert whole is not None
        return whole

    def cpu(self) -> "ExpertInputs":
        """The same in the CPU's memory."""
        return ExpertInputs(self.x.cpu(), self.topk_ids.cpu(), self.topk_weights.cpu())


def called_for_all(forward: Callable[[Tensor, Tensor, Tensor], Tensor], num_experts: int) -> Callable[[Tensor], Tensor]:
    """A function of tokens and their routing, as modules are called that get the inputs of all tokens for every expert.

    Args:
        forward: of x [T, H], ids [T, 1] and weights [T, 1].
        num_experts: E.

    Returns:
        A function of [E T, H], expert by expert, which are zeros where a token does not go to an expert: what `forward`
        gives of the others, with weights of one, at their places. Gradients pass.
    """

    def called(rows: Tensor) -> Tensor:
        each = rows.view(num_experts, -1, rows.shape[-1])
        ids = each.detach().ne(0).any(-1).int().argmax(0)
        place = ids, torch.arange(len(ids), device=ids.device)
        y = forward(each[place], ids[:, None], each.new_ones(len(ids), 1))
        return torch.zeros_like(each).index_put(place, y.to(each)).view_as(rows)

    return called


def expert_input_bytes(sizes: RunSizes) -> int:
    """Bytes of one layer's `ExpertInputs` for all of the calibration text, with an order of its slots."""
    return sizes.tokens * (FLOAT * sizes.shape.hidden_size + sizes.top_k * (FLOAT + 3 * INT))
