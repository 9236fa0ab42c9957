"""Decoding token by token: sequences that grow over a cache, and steps of one size that a CUDA graph can hold.

    session = DecodeSession(model, rows, new=16, static=True)
    hidden = session.step(ids, active)                      # one token that the host has chosen
    steps = session.steps(choice, count=16)                 # or the choice is made inside the step
    steps.choose()
    steps.chosen[:steps.number]                             # read when the host wants to know

`generate` is the way to use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import IGNORE, Batch, Segment, TokenSequence, lengths_of, pack
from .mask import IntervalMask
from .models.cache import KVCache
from .models.layout import Layout
from .models.unified import UnifiedModel
from .ops.backend import say
from .recording import record, warm_up

WARM = 2
"""Steps that run as they are before one is recorded: kernels are compiled and workspaces allocated in them."""


class Replayed:
    """A step that reads and writes tensors which stay where they are: run as it is, and on CUDA replayed as one graph
    after `WARM` runs.

    generator: what the step draws samples by; one of the CPU cannot be part of a graph. A step that cannot be a graph,
    because it waits for the device, goes on as it is, and one line on stderr says why.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self.runs, self.graph = 0, None
        self.replays = device.type == "cuda" and (generator is None or generator.device.type == "cuda")

    def __call__(self, step: Callable[[], None]) -> None:
        """One step, the same at every call."""
        # given here and not held: what owns the step owns this, and a circle would keep its cache of keys and values,
        # 1 GB a row at Emu3's 8,190 tokens, until the garbage collector comes by
        self.runs += 1
        if self.replays and self.graph is None and self.runs > WARM:
            self._record(step)
        if self.graph is not None:
            self.graph.replay()
        elif self.replays:
            warm_up(step)
        else:
            step()

    def _record(self, step: Callable[[], None]) -> None:
        try:
            self.graph, _ = record(step, self.generator)
        except RuntimeError as error:
            say(f"unimod: steps are not recorded as a CUDA graph, because one of them waits for the device: {error}")
            self.replays = False


@dataclass(frozen=True)
class Choice:
    """How the next tokens are chosen from hidden states: picture codes or words, sampled among the `top_k` (0: all) at
    a temperature, or the best (`top_k` 1). generator: what draws, and where; None: torch's own, where the model is.

    guidance: weight w of the first half of the rows over the second, u + (1 + w)(c - u) of log-probabilities; 0 where
    there is no second half.
    """

    model: UnifiedModel
    codes: bool
    top_k: int
    temperature: float
    generator: torch.Generator | None = None
    guidance: float = 0.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden: [R, D]; returns int64 [R], or [R / 2] with guidance, where the generator is if it was needed."""
        if not self.codes:
            return self._pick(self.model.text_logits(hidden))
        logits = self.model.code_logits(hidden).log_softmax(-1)
        if self.guidance > 0:
            c, u = logits.chunk(2)
            logits = u + (1 + self.guidance) * (c - u)
        return self._pick(logits)

    def _pick(self, logits: Tensor) -> Tensor:
        if self.top_k == 1:
            return logits.argmax(-1)
        logits = logits / self.temperature
        logits = logits if self.generator is None else logits.to(self.generator.device)
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        return sample(logits.softmax(-1), self.generator)

    def stays_on(self, device: torch.device) -> bool:
        """Whether a choice of hidden states on `device` needs nothing from elsewhere."""
        return self.top_k == 1 or self.generator is None or self.generator.device.type == device.type


def sample(probability: Tensor, generator: torch.Generator | None) -> Tensor:
    """One sample of each distribution: int64 [R] of [R, V]."""
    # what torch.multinomial computes, draw by draw, without its check of the numbers, for which a GPU waits
    draws = torch.empty_like(probability).exponential_(generator=generator)
    return (probability / draws).argmax(-1)


def next_tokens(rows: Sequence[TokenSequence], active: Sequence[int], ids: Tensor, position: Tensor, layout: Layout,
                score_source: Tensor | None = None) -> Batch:
    """The batch of one further token, int64 [R] at position [R], of each sequence `active` (ascending)."""
    # of one token per sequence: each sees itself here, and the cache what came before
    n = torch.arange(len(active))
    segments = tuple(Segment(i, rows[i].task, 1, rows[i].parts[-1][1]) for i in active)
    task = torch.tensor([rows[i].task for i in active])
    mask = IntervalMask(n, n + 1, lengths_of(segments))
    return Batch(ids, torch.tensor(active), position, task, layout.modality(ids), torch.full_like(ids, IGNORE), mask,
                 segments, score_source=score_source)


class DecodeSession:
    """Sequences that grow token by token over a KV cache with room for `new` more tokens each.

    The prompts are run at once (prefill). static: every decode step runs all sequences at one size and waits for
    nothing; on CUDA it is recorded and replayed as one graph. Numbers are the same. Raises ValueError for static
    decoding of sequences of several tasks or rules.
    """

    def __init__(self, model: UnifiedModel, rows: list[TokenSequence], new: int, score_source: Tensor | None = None,
                 static: bool = False) -> None:
        kinds = {(row.task, row.parts[-1][1]) for row in rows}
        if static and len(kinds) > 1:
            raise ValueError(f"static=True takes rows of one task and rule; these are of {len(kinds)}. Decode them "
                             f"apart, or with static=False.")
        self.model, self.rows, self.score_source, self.static = model, rows, score_source, static
        # one more place where steps are static: a dropped token is written there and then overwritten
        self.cache = KVCache(len(rows), max(len(r.ids) for r in rows) + new + static)
        batch = pack(rows)
        self.position = torch.stack([r.position[-1] for r in rows]) + 1
        last = (torch.tensor(batch.lengths).cumsum(0) - 1).to(model.device)
        self.hidden = model(batch.to(model.device), cache=self.cache)[last]
        """Hidden states of each sequence's last token: [B, D]."""
        self._given: DecodeStep | None = None

    def step(self, ids: Tensor, active: list[int]) -> Tensor:
        """One more token (int64 [R], on the CPU) for the sequences `active` (ascending); hidden states of these tokens,
        [R, D]."""
        if self.static:
            return self._static_step(ids, active)
        batch = next_tokens(self.rows, active, ids, self.position[active], self.model.layout, self.score_source)
        out = self.model(batch.to(self.model.device), cache=self.cache)
        self.position[active] += 1
        return out

    def steps(self, choice: Choice, count: int, table: Tensor | None = None) -> ChosenSteps:
        """Static steps that choose their own tokens, `count` of each sequence; the first is chosen at once. table:
        int64, from what is chosen to token ids."""
        return ChosenSteps(self.model, self._batch(torch.zeros(len(self.rows), dtype=torch.long)), self.cache, choice,
                           count, self.hidden, table)

    def _batch(self, ids: Tensor) -> Batch:
        """One token of every sequence, at its own position."""
        return next_tokens(self.rows, range(len(self.rows)), ids, self.position.clone(), self.model.layout,
                           self.score_source)

    def _static_step(self, ids: Tensor, active: list[int]) -> Tensor:
        """All sequences take a step; one that has ended gets token 0, whose result nobody reads."""
        batch = self._batch(torch.zeros(len(self.rows), dtype=torch.long).index_copy(0, torch.tensor(active), ids))
        self.position[active] += 1
        if self._given is None:
            self._given = DecodeStep(self.model, batch, self.cache)
        for name in ("ids", "position", "modality"):
            getattr(self._given.batch, name).copy_(getattr(batch, name), non_blocking=True)
        self._given()
        hidden = self._given.hidden.clone()                 # the next step is written where this one was
        return hidden if len(active) == len(hidden) else hidden[torch.tensor(active).to(hidden.device,
                                                                                        non_blocking=True)]


class DecodeStep:
    """One token of every sequence, `batch`, whose result is `hidden`: [B, D]."""

    def __init__(self, model: UnifiedModel, batch: Batch, cache: KVCache) -> None:
        self.model, self.batch, self.cache = model, batch.to(model.device), cache
        self.hidden = torch.empty(0)
        self._replayed = Replayed(model.device)

    def __call__(self) -> None:
        """One step, by a graph where there is one."""
        self._replayed(self.run)

    def run(self) -> None:
        """One step as it is."""
        self.hidden = self.model(self.batch, cache=self.cache, decode=True)


class ChosenSteps:
    """Static steps with everything inside: the model, its head, the choice, and the ids and positions of the next step.

    hidden: [B, D], of which the first tokens are chosen. With guidance both halves of the rows get the same tokens.
    `chosen`: int64 [count, R] on the model's device, filled up to `number`.
    """

    def __init__(self, model: UnifiedModel, batch: Batch, cache: KVCache, choice: Choice, count: int, hidden: Tensor,
                 table: Tensor | None = None) -> None:
        self.model, self.batch, self.cache, self.choice = model, batch.to(model.device), cache, choice
        self.layout, device = model.layout, model.device
        self.table = None if table is None else table.to(device)
        self.modality = self.layout.modality(torch.arange(self.layout.vocab_size)).to(device)
        self.branches = 2 if choice.guidance > 0 else 1
        self.chosen = torch.zeros(count, len(batch) // self.branches, dtype=torch.long, device=device)
        self.number = 0
        self._at = torch.zeros(1, dtype=torch.long, device=device)
        self._forced = torch.zeros(len(batch), dtype=torch.long, device=device)
        self._choose = Replayed(device, choice.generator)
        self._force = Replayed(device)
        self._keep(choice(hidden))
        self.number += 1

    def choose(self) -> None:
        """Feed the tokens that are due and choose the next ones."""
        self._choose(self.run_chosen)
        self.number += 1

    def force(self, token: int) -> None:
        """Feed the tokens that are due; `token` is next in every row."""
        self._forced.fill_(token)
        self._force(self.run_forced)

    def run_chosen(self) -> None:
        """`choose` as it is."""
        hidden = self._run()
        self._keep(self.choice(hidden))

    def run_forced(self) -> None:
        """`force` as it is."""
        self._run()
        self._next(self._forced)

    def _run(self) -> Tensor:
        hidden = self.model(self.batch, cache=self.cache, decode=True)
        self.batch.position.add_(1)
        return hidden

    def _keep(self, chosen: Tensor) -> None:
        self.chosen.index_copy_(0, self._at, chosen[None])
        self._at.add_(1)
        ids = chosen if self.table is None else self.table.index_select(0, chosen)
        self._next(ids.repeat(self.branches) if self.branches > 1 else ids)

    def _next(self, ids: Tensor) -> None:
        self.batch.ids.copy_(ids)
        torch.index_select(self.modality, 0, ids, out=self.batch.modality)
