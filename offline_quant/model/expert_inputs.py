"""What enters the routed experts of one layer."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertInputs:
    """What entered the routed experts of one layer, and where it went.

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
        """Tokens of several, one after another, on a device; each part is let go before the next one comes.

        Args:
            parts: at least one.
            tokens: T of all.
            device: where to.
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
