"""Learned capacity: keep fractions per layer and task that training moves, while their total stays on a budget.

    learned = learn_capacity(apply_mod(model, plan), saving=0.3)     # all routed layers and tasks start at one capacity
    ...                                                              # train as usual
    plan = learned.plan()                                            # an ordinary plan with what was found

How many tokens are kept is a whole number, through which no gradient flows. So the last of them fade: the token of rank
r among n (0 is the best) that a capacity c keeps carries the factor

    m = min(1, (c n - r) / (WIDTH n)),

and the loss becomes continuous in c: a token enters with weight 0. Where the last tokens to enter still lower the loss,
the capacity grows. The number that is processed, and so the cost, is that of the plan; the plan that is read off in the
end has no faded tokens. Fractions are c = FLOOR + (1 - FLOOR) sigmoid(theta + mu) with one mu for all, such that their
weighted mean is the budget at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import TASKS, ParameterError
from .plan import FLOOR, CapacityPlan

WIDTH = 0.1
"""Share of the competing tokens over which the factor falls from 1 to 0; at least one token."""


class LearnedCapacity(nn.Module):
    """Fractions of all routed layers, [R, tasks], from parameters `theta` of that shape.

    routed: numbers of the R layers out of `layers`. weight: what a token-layer of each task counts in the budget (0:
    the task stays dense). saving: share of all token-layers that is saved, so weighted. Raises `ParameterError` when
    the routed layers cannot save that much.
    """

    def __init__(self, layers: int, routed: Sequence[int], weight: Mapping[str, float], saving: float) -> None:
        super().__init__()
        self.layers, self.routed = layers, tuple(routed)
        self.target = self._target(saving)
        share = torch.tensor([float(weight.get(task, 0.0)) for task in TASKS])
        if not share.sum() > 0 or (share < 0).any():
            raise ParameterError(f"weight={dict(weight)!r}: give a positive number for at least one of "
                                 f"{', '.join(TASKS)}, and none below 0.")
        self.register_buffer("share", share / share.sum() / len(routed), persistent=False)
        self.theta = nn.Parameter(torch.zeros(len(routed), len(TASKS)))
        self._seen: tuple[tuple[int, int], Tensor, list[tuple[float, ...]]] | None = None

    def fractions(self) -> Tensor:
        """Keep fractions [R, tasks], differentiable in theta and on the budget."""
        mu, _ = self._solved()
        # d c / d mu of c = FLOOR + (1 - FLOOR) sigmoid: (c - FLOOR)(1 - c) / (1 - FLOOR)
        slope = self._at(mu).detach()
        slope = ((slope - FLOOR) * (1 - slope) / (1 - FLOOR) * self.share).sum()
        total = (self._at(mu) * self.share).sum()
        # mu's own dependence on theta, by the implicit function theorem
        c = self._at(mu - (total - total.detach()) / slope)
        return torch.where(self.share > 0, c, 1.0)

    def host(self, row: int) -> tuple[float, ...]:
        """Fractions of one routed layer as numbers; read from the device once per change of theta."""
        return self._solved()[1][row]

    def edge(self, row: int, task: Tensor, rank: Tensor, n: Tensor) -> Tensor:
        """Factors of kept tokens, [K], by their task, their rank and how many compete with them."""
        return ((self.fractions()[row][task] * n - rank) / (WIDTH * n).clamp(min=1)).clamp(0, 1)

    def plan(self, saving: float | None = None) -> CapacityPlan:
        """The fractions as a plan; with a saving, those that the same theta gives on another budget."""
        found = self._solved()[1] if saving is None else self._solve(self._target(saving))[1]
        rows = {task: [1.0] * self.layers for task in TASKS}
        for layer, fractions in zip(self.routed, found):
            for task, c in zip(TASKS, fractions):
                rows[task][layer] = c
        return CapacityPlan(rows)

    def _target(self, saving: float) -> float:
        """Mean fraction of the routed layers on a budget."""
        target = 1 - saving * self.layers / len(self.routed)
        if not FLOOR < target < 1:
            raise ParameterError(f"saving={saving:g}: {len(self.routed)} of {self.layers} layers can save more than 0 "
                                 f"and less than "
                                 f"{len(self.routed) * (1 - FLOOR) / self.layers:.2f}.")
        return target

    def _at(self, mu: Tensor) -> Tensor:
        return FLOOR + (1 - FLOOR) * torch.sigmoid(self.theta + mu)

    def _solved(self) -> tuple[Tensor, list[tuple[float, ...]]]:
        """`_solve` for the present theta, once per change of it."""
        # an optimiser writes in place, which moves the version; load_state_dict and .to may bring another tensor
        state = id(self.theta), self.theta._version
        if self._seen is None or self._seen[0] != state or self._seen[1].device != self.theta.device:
            self._seen = (state, *self._solve(self.target))
        return self._seen[1:]

    @torch.no_grad()
    def _solve(self, target: float) -> tuple[Tensor, list[tuple[float, ...]]]:
        """mu for a mean fraction, by bisection, and the fractions that it gives."""
        # sigmoid is flat beyond 30 in float32, so the root lies within
        low, high = -30 - self.theta.max(), 30 - self.theta.min()
        # 60 / 2^50 is below float32's resolution of mu
        for _ in range(50):
            mu = (low + high) / 2
            over = (self._at(mu) * self.share).sum() > target
            low, high = torch.where(over, low, mu), torch.where(over, mu, high)
        return mu, [tuple(c) for c in torch.where(self.share > 0, self._at(mu), 1.0).tolist()]
