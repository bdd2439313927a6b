"""From a dense MLP to routed experts: clusters of channels, a router for them, and its training.

T tokens, H hidden size, I intermediate size, E experts, k of them active.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real_model.all_active import cut

ACTIVE_SHARE = 0.1
"""Channels with the largest part in a token's output that count as active."""
ITERATIONS = 8
"""Of clustering."""
RIDGE = 1e-2
"""Added to the second moments of inputs, relative to their mean diagonal."""
TEMPERATURES = (0.01, 0.03, 0.1, 0.3)
"""Factors of logits that are tried."""
TRAINED = ("router", "channel_scale", "norm.weight")
"""Ends of names of the parameters that are trained."""
LOGITS_OF = 2
"""Of so many tokens one has its logits computed."""


class RoutedMLP(nn.Module):
    """Experts of a Mixtral, computed as one masked MLP.

    The output is `sum over chosen e of k softmax(logits of chosen)[e] expert[e](x)`: a Mixtral whose down matrices are
    stored k times as large. With all experts active and a router of zeros it is the dense MLP.

    Args:
        gate, up: float [I, H]; expert e has the rows from e I / E on.
        down: float [H, I].
        experts: E; divides I.
        active: k.
    """

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, experts: int, active: int):
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(w, requires_grad=False) for w in (gate, up, down))
        self.router = nn.Parameter(gate.new_zeros(experts, gate.shape[1]))
        self.channel_scale = nn.Parameter(gate.new_ones(len(gate)))
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., H] of inputs [..., H]."""
        return F.linear(self.hidden(x) * self.channel_weights(x), self.down)

    def hidden(self, x: Tensor) -> Tensor:
        """What enters down, of all experts: [..., I]."""
        return F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)

    def channel_weights(self, x: Tensor) -> Tensor:
        """Factors of `hidden` [..., I], 0 for experts that are not chosen."""
        logits = F.linear(x, self.router)
        best, chosen = logits.topk(self.active, -1)
        weights = torch.zeros_like(logits).scatter(-1, chosen, self.active * best.softmax(-1))
        return weights.repeat_interleave(len(self.gate) // len(self.router), -1) * self.channel_scale

    @torch.no_grad()
    def experts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Gate and up [I / E, H] and down [H, I / E] of each expert, as a Mixtral stores them."""
        return cut(self.gate, self.up, self.down * self.channel_scale, len(self.router), self.active)


def cluster_channels(contribution: Tensor, clusters: int, seed: int) -> Tensor:
    """Channels in equal clusters of those that are active for the same tokens: k-means with balanced assignment.

    Args:
        contribution: [T, I], how much each channel adds to a token's output.
        clusters: divides I.
        seed: of the first centres.

    Returns:
        int64 [I], a permutation; each cluster's channels lie together.
    """
    channels = contribution.shape[1]
    least = contribution.topk(round(ACTIVE_SHARE * channels), -1).values[:, -1:]
    active = F.normalize((contribution >= least).to(contribution.dtype).T, dim=1)
    drawn = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))[:clusters]
    centres = active[drawn]
    for _ in range(ITERATIONS):
        assigned = assign_balanced(active @ F.normalize(centres, dim=1).T)
        centres = torch.stack([active[assigned == cluster].mean(0) for cluster in range(clusters)])
    return assigned.argsort(stable=True)


def assign_balanced(similarity: Tensor) -> Tensor:
    """Give each of I items one of E clusters, I / E items to each, the most similar pairs first.

    Args:
        similarity: [I, E].

    Returns:
        int64 [I].
    """
    items, clusters = similarity.shape
    assigned, room = [-1] * items, [items // clusters] * clusters
    for pair in similarity.flatten().argsort(descending=True, stable=True).tolist():
        item, cluster = divmod(pair, clusters)
        if assigned[item] < 0 and room[cluster]:
            assigned[item] = cluster
            room[cluster] -= 1
    return torch.tensor(assigned)


@torch.no_grad()
def route(gate: Tensor, up: Tensor, down: Tensor, x: Tensor, experts: int, active: int, seed: int = 0) -> RoutedMLP:
    """Cut a dense MLP into clusters of its channels, with a router that is fitted to their energies.

    Args:
        gate, up: float [I, H].
        down: float [H, I].
        x: [T, H], what enters the MLP on calibration text.
        experts: E; divides I.
        active: k.
        seed: of the clusters.
    """
    hidden = F.silu(x @ gate.T) * (x @ up.T)
    order = cluster_channels(hidden.abs() * down.norm(dim=0), experts, seed)
    mlp = RoutedMLP(gate[order], up[order], down[:, order], experts, active)
    hidden = hidden[:, order]
    router = fit_router(x, output_energies(hidden, mlp.down, experts))
    aim, errors = hidden @ mlp.down.T, []
    for temperature in TEMPERATURES:
        mlp.router.copy_(temperature * router)
        errors.append(float((F.linear(hidden * mlp.channel_weights(x), mlp.down) - aim).square().sum()))
    mlp.router.copy_(TEMPERATURES[errors.index(min(errors))] * router)
    return mlp


def output_energies(hidden: Tensor, down: Tensor, experts: int) -> Tensor:
    """Squared norms of the outputs of every expert, [T, E].

    Args:
        hidden: [T, I], what enters down.
        down: [H, I].
        experts: E.
    """
    parts = zip(hidden.chunk(experts, 1), down.chunk(experts, 1), strict=True)
    return torch.stack([((h @ (d.T @ d)) * h).sum(1) for h, d in parts], 1)


def fit_router(x: Tensor, energies: Tensor) -> Tensor:
    """The linear map of inputs that is nearest to the logarithms of energies, above each token's mean.

    Args:
        x: [T, H].
        energies: [T, E], positive.

    Returns:
        [E, H]; its logits rank experts as their energies do, as far as a linear map can.
    """
    aim = energies.clamp_min(torch.finfo(energies.dtype).tiny).log()
    aim = aim - aim.mean(1, keepdim=True)
    moments = x.T @ x
    damping = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=x.dtype)
    return torch.linalg.solve(moments + damping, x.T @ aim).T.contiguous()


def distill(student: Any, teacher: Any, windows: Tensor, rate: float) -> list[float]:
    """Train routers, norms and the scales of channels on the teacher's logits, one window a step.

    Args:
        student: a causal model of transformers whose MLPs are `RoutedMLP`.
        teacher: the dense one.
        windows: int64 [steps, L].
        rate: Adam's at the start, relative to the size of a router, a norm or a scale; falls linearly to 0.

    Returns:
        KL(teacher || student) of each step, nats per token.
    """
    trained = [p for name, p in student.named_parameters() if name.endswith(TRAINED)]
    for p in student.parameters():
        p.requires_grad_(any(p is q for q in trained))
    groups = [{"params": [p], "lr": rate * float(p.detach().square().mean().sqrt())} for p in trained]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(windows))
    losses = []
    for ids in windows:
        with torch.no_grad():
            aim = _log_probabilities(teacher, ids)
        loss = F.kl_div(_log_probabilities(student, ids), aim, log_target=True, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Of every `LOGITS_OF`-th token's successor, [L / LOGITS_OF, V]."""
    states = model.model(ids[None]).last_hidden_state[0, ::LOGITS_OF]
    return model.lm_head(states).log_softmax(-1)
