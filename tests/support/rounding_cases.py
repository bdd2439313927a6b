"""Problems for rounding kernels, and what float64 says of a solution."""

import numpy as np
import torch
from torch import Tensor

# n, K, N, along, what it is for
CASES = {
    "one row, one column": (1, 1, 1, "K"),
    "one row, widths of columns": (2, 1, 5, "N"),
    "one column": (2, 66, 1, "K"),
    "one column, width of its own": (3, 33, 1, "N"),
    "a block and a panel exactly": (2, 32, 48, "K"),
    "one more of each": (2, 33, 49, "N"),
    "ragged, several blocks and panels": (3, 150, 131, "K"),
    "more rows than one depth of products": (2, 300, 100, "N"),
    "more experts than threads": (5, 40, 20, "K"),
}
STEP = (0.0, 1.5957, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)


class RoundingCase:
    """Factors, moments and levels of one case; every width from 0 to 8."""

    def __init__(self, n: int, K: int, N: int, along: str, scale: float = 1.0):
        g = torch.Generator().manual_seed(n + 10 * K + 1000 * N)
        self.F = torch.randn(n, K, N, generator=g) * scale
        x = torch.randn(n, 4 * K + 8, K, generator=g) @ (torch.eye(K) + 0.3 * torch.randn(n, K, K, generator=g))
        self.M = x.mT @ x / x.shape[1]
        self.M.diagonal(dim1=1, dim2=2).add_(0.01 * self.M.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True))
        inverse = torch.from_numpy(np.linalg.inv(self.M.double().numpy()))
        self.U = torch.linalg.cholesky(inverse).mT.float().contiguous()
        width = torch.randint(0, 9, (n, K, 1) if along == "K" else (n, 1, N), generator=g)
        self.half = (torch.exp2(width.float()) - 1) / 2
        self.power = torch.where(width > 0, torch.tensor(STEP)[width].clamp(min=1e-6).pow(-2), 0.0)
        self.c = ((0.5 + torch.rand(n, N, generator=g)) * scale**0.5).clamp(max=2.0**15).half().float()

    def value(self, codes: Tensor, a: Tensor) -> Tensor:
        """What codes mean, float64."""
        return a.double()[:, :, None] * self.c.double()[:, None] * (codes.double() - self.half.double())

    def error(self, codes: Tensor, a: Tensor) -> Tensor:
        """tr((F - F^)^T M (F - F^)) [n], float64."""
        left = self.F.double() - self.value(codes, a)
        return (left * (self.M.double() @ left)).sum((1, 2))

    def nearest(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of x [n, K, N] or of a row of it, and how far x lies from a boundary between two, float64."""
        half = self.half.double()
        inside = x / step.masked_fill(step == 0, torch.inf) + half
        codes = torch.minimum(inside.round().clamp(min=0), 2 * half)
        return codes, ((inside - inside.floor()) - 0.5).abs()


def check_feedback(case: RoundingCase, codes: Tensor, a: Tensor, norms: Tensor, error: Tensor) -> None:
    """w_k = F_k - sum over j < k of U_jk e_j and e_k = (w_k - rounded) / U_kk, with the scales that were found."""
    F, U, value = case.F.double(), case.U.double(), case.value(codes, a)
    handed, K = torch.zeros_like(F), F.shape[1]
    for k in range(K):
        row = F[:, k] - (U[:, :k, k, None] * handed[:, :k]).sum(1)
        step = (a.double()[:, k, None] * case.c.double())[:, None]
        nearest, margin = case.nearest(row[:, None].expand(-1, K, -1), step)
        # Within float32 rounding of a boundary a value may fall either way.
        sure = margin[:, k] > 1e-3
        assert torch.equal(nearest[:, k][sure], codes[:, k].double()[sure])
        assert torch.allclose(norms[:, k].double(), row.square().sum(-1), rtol=1e-3, atol=1e-6)
        handed[:, k] = (row - value[:, k]) / U[:, k, k, None]
    assert torch.allclose(error.double(), case.error(codes, a), rtol=1e-3)


def check_alone(case: RoundingCase, codes: Tensor, a: Tensor, norms: Tensor, left: Tensor) -> None:
    """Every value gets the nearest level of its row's scale."""
    nearest, margin = case.nearest(case.F.double(), a.double()[:, :, None] * case.c.double()[:, None])
    sure = margin > 1e-4
    assert torch.equal(nearest[sure], codes.double()[sure])
    assert torch.allclose(left.double(), case.F.double() - case.value(codes, a), atol=1e-5)
    assert torch.allclose(norms.double(), case.F.double().square().sum(-1), rtol=1e-5)


def check_descent(case: RoundingCase, before: Tensor, after: Tensor, a: Tensor) -> None:
    """Every row has its best codes for those of the rows before it as they are now, and after it as they were."""
    F, M, value, new = case.F.double(), case.M.double(), case.value(before, a), case.value(after, a)
    K = F.shape[1]
    for k in range(K):
        target = value[:, k] + (M[:, k, None] @ (F - value))[:, 0] / M[:, k, k, None]
        step = (a.double()[:, k, None] * case.c.double())[:, None]
        best, margin = case.nearest(target[:, None].expand(-1, K, -1), step)
        sure = margin[:, k] > 1e-3
        assert torch.equal(best[:, k][sure], after[:, k].double()[sure])
        value[:, k] = new[:, k]
    assert bool((case.error(after, a) <= 1.0001 * case.error(before, a)).all())


def check_scales(case: RoundingCase, a: Tensor, rough: bool) -> None:
    """Of rows alone: alternating least squares from four starts, or from one; columns weigh their scale's square."""
    half, weight, v = case.half.double(), case.c.double().square()[:, None], case.F.double() / case.c.double()[:, None]

    def nearest(a: Tensor) -> Tensor:
        return case.nearest(v * case.c.double()[:, None], a[..., None] * case.c.double()[:, None])[0] - half

    def lost(a: Tensor) -> Tensor:
        return (weight * (v - a[..., None] * nearest(a)).square()).sum(-1)

    start = ((weight * v.square()).sum(-1) / (weight * case.power.double()).sum(-1).clamp(min=1e-30)).sqrt()
    results = []
    for candidate in (1.0,) if rough else (0.7, 0.85, 1.0, 1.2):
        found = candidate * start
        for _ in range(1 if rough else 3):
            level = nearest(found)
            found = (weight * v * level).sum(-1) / (weight * level.square()).sum(-1).clamp(min=1e-30)
        results.append(lost(found.half().double()))
    assert torch.allclose(lost(a.double()), torch.stack(results).amin(0), rtol=1e-2)
