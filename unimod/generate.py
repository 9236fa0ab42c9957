"""Generation: answers token by token, pictures by masked decoding (Show-o) or token by token (the causal models).

    texts = answer(model, rows)                                      # rows: open-ended mmu sequences
    codes = draw(model, ["a red circle at the top left"], seed=0)    # int64 [B, N]
    codes = draw(model, captions, codes=codes, masked=slots)         # inpainting: only the masked slots are drawn anew
    wider = extend(model, captions, codes.view(-1, 16, 16), "right", 8)
    calibrate(model, batch)                                          # before draw() on a routed causal model

Token by token means with a cache of keys and values, in which a routed layer writes the tokens it keeps. Text that is
generated is kept; pictures generated token by token are routed by a calibrated threshold (see `config.RULES`). Masked
decoding runs the whole sequence at every step, so a routed layer may choose among all tokens that are known.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import IGNORE, Batch, Modality, Segment, Task, TokenSequence, lengths_of, pack
from .layers import record_routing, routed_layers
from .mask import IntervalMask
from .models.cache import KVCache
from .models.layout import Layout
from .models.unified import UnifiedModel

ROWS = 64
"""Rows per forward: answers, or captions with and without guidance."""
SIDES = ("left", "right", "top", "bottom")


class DecodeSession:
    """Sequences that grow token by token over a KV cache with room for `new` more tokens each.

    The prompts are run at once (prefill). static: every decode step runs all sequences at one size and waits for
    nothing; on CUDA it is recorded once and replayed as one graph. Numbers are the same. Raises ValueError for static
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
        self._static: Batch | None = None
        self._graph: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def step(self, ids: Tensor, active: list[int]) -> Tensor:
        """One more token (int64 [R], on the CPU) for the sequences `active` (ascending); hidden states of these tokens,
        [R, D]."""
        if self.static:
            return self._static_step(ids, active)
        out = self.model(self._next(ids, active).to(self.model.device), cache=self.cache)
        self.position[active] += 1
        return out

    def _next(self, ids: Tensor, active: list[int]) -> Batch:
        """The batch of one further token of each active sequence."""
        # a batch of one token per sequence: each sees itself here, and the cache what came before
        row, n = torch.tensor(active), torch.arange(len(active))
        segments = tuple(Segment(i, self.rows[i].task, 1, self.rows[i].parts[-1][1]) for i in active)
        task, modality = torch.tensor([self.rows[i].task for i in active]), self.model.layout.modality(ids)
        mask = IntervalMask(n, n + 1, lengths_of(segments))
        return Batch(ids, row, self.position[row], task, modality, torch.full_like(ids, IGNORE), mask, segments,
                     score_source=self.score_source)

    def _static_step(self, ids: Tensor, active: list[int]) -> Tensor:
        """All sequences take a step; one that has ended gets token 0, whose result nobody reads."""
        whole = torch.zeros(len(self.rows), dtype=torch.long).index_copy(0, torch.tensor(active), ids)
        batch = self._next(whole, list(range(len(self.rows))))
        self.position[active] += 1
        if self._static is None:
            self._static = batch.to(self.model.device)
            self._graph = self._record() if self.model.device.type == "cuda" else None
        for name in ("ids", "position", "modality"):
            getattr(self._static, name).copy_(getattr(batch, name), non_blocking=True)
        if self._graph is None:
            return _of(self.model(self._static, cache=self.cache, decode=True), active)
        self._graph[0].replay()
        return _of(self._graph[1].clone(), active)              # the next step is written where this one was

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """One step as a CUDA graph. The steps that warm it up write where the next token will, and are forgotten."""
        used = {layer: x.clone() for layer, x in self.cache.used.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.model(self._static, cache=self.cache, decode=True)
                self._forget(used)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.model(self._static, cache=self.cache, decode=True)
        self._forget(used)
        return graph, out

    def _forget(self, used: dict[int, Tensor]) -> None:
        for layer, x in self.cache.used.items():
            x.copy_(used.get(layer, torch.zeros_like(x)))


def _of(x: Tensor, active: list[int]) -> Tensor:
    """The rows `active` of x, without waiting for its device."""
    return x if len(active) == len(x) else x[torch.tensor(active).to(x.device, non_blocking=True)]


def _refuse_batch_competition(model: UnifiedModel) -> None:
    """Refuse to generate with routers for which rows compete with one another."""
    if any(layer.router.config.topk_scope == "batch" for layer in routed_layers(model)):
        raise ValueError("Nothing can be generated with topk_scope='batch': what a row keeps depends on its neighbours "
                         "and on what comes later. "
                         "Use topk_scope='segment'.")


def _generator(model: UnifiedModel, seed: int) -> torch.Generator:
    """Samples are drawn where the model is: a step of real size has millions of them."""
    return torch.Generator(model.device if model.device.type == "cuda" else "cpu").manual_seed(seed)


def _sample(logits: Tensor, top_k: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Sample among the top_k (0: all) at a temperature; top_k=1 takes the best. logits: [R, V]; returns int64 [R] on
    the CPU."""
    if top_k == 1:
        return logits.argmax(-1).cpu()
    logits = (logits / temperature).to(generator.device)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].cpu()


@torch.no_grad()
def answer(model: UnifiedModel, rows: list[TokenSequence], max_new: int = 6, *, top_k: int = 1,
           temperature: float = 1.0, seed: int = 0, static: bool = False) -> list[str]:
    """Answers to open-ended understanding rows, at most `max_new` tokens each.

    top_k: sample among so many tokens (0: all) at `temperature`; 1 is greedy decoding. static: see `DecodeSession`.
    """
    _refuse_batch_competition(model)
    generator = _generator(model, seed)
    texts: list[str] = []
    for start in range(0, len(rows), ROWS):
        session = DecodeSession(model, rows[start:start + ROWS], max_new, static=static)
        generated: list[list[int]] = [[] for _ in session.rows]
        active, hidden = list(range(len(generated))), session.hidden
        for left in reversed(range(max_new)):
            chosen = _sample(model.text_logits(hidden), top_k, temperature, generator)
            going = [j for j, token in enumerate(chosen.tolist()) if token != model.layout.stop]
            active, chosen = [active[j] for j in going], chosen[going]
            for i, token in zip(active, chosen.tolist()):
                generated[i].append(token)
            if not active or not left:
                break
            hidden = session.step(chosen, active)
        texts += [model.layout.text.decode(ids) for ids in generated]
    return texts


@torch.no_grad()
def draw(model: UnifiedModel, captions: list[str], seed: int = 0, guidance: float | None = None, steps: int = 8, *,
         negative: str = "", codes: Tensor | None = None, masked: Tensor | None = None,
         grid: tuple[int, int] | None = None, top_k: int = 2048, temperature: float = 1.0, share: bool = False,
         static: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Pictures for captions: codes int64 [B, N].

    guidance: weight w of the captioned branch over the one with the text `negative`, score = uncond + (1 + w)(cond -
    uncond); 0 for none (Emu3 calls 1 + w its guidance scale). Default 1.5 for masked decoding, 0 for token-by-token.
    grid: rows and columns of codes, default the layout's. share: with guidance, routed layers judge the picture tokens
    of both branches by the captioned one's scores; else each branch by its own. The same seed gives the same pictures
    on the same kind of device; `generator` may be given in its place, and a CPU one draws the same samples everywhere.

    Masked decoding only: `steps`; `codes` [B, N] and `masked` bool [B, N] draw the masked slots anew and keep the
    others. Token by token only: `top_k`, `temperature` and `static` (see `DecodeSession`). Raises ValueError when codes
    and masked do not fit.
    """
    _refuse_batch_competition(model)
    generator = generator or _generator(model, seed)
    layout = model.layout if grid is None else model.layout.resized(grid)
    given = (codes is not None) + (masked is not None)
    shape = (len(captions), layout.image_tokens)
    if given and (given == 1 or layout.causal_images or codes.shape != shape or masked.shape != shape):
        raise ValueError(f"codes and masked go together, {list(shape)} each, and need masked decoding; got "
                         f"{[None if x is None else list(x.shape) for x in (codes, masked)]} for a {layout.kind} "
                         f"model.")
    w = (0.0 if layout.causal_images else 1.5) if guidance is None else guidance
    drawn = []
    for at in range(0, len(captions), ROWS // 2):
        part = slice(at, at + ROWS // 2)
        if layout.causal_images:
            drawn.append(_draw_causal(model, layout, captions[part], generator, w, negative, share, top_k, temperature,
                                      static))
        else:
            known = (codes[part], masked[part]) if given else None
            drawn.append(_draw_masked(model, layout, captions[part], generator, w, negative, share, steps, known))
    return torch.cat(drawn)


def _draw_masked(model: UnifiedModel, layout: Layout, captions: list[str], generator: torch.Generator, w: float,
                 negative: str, share: bool, steps: int, known: tuple[Tensor, Tensor] | None) -> Tensor:
    """MaskGIT decoding as Show-o does it: sample every slot, keep the confident ones, mask the rest again.

    logits = (1 + w) cond - w uncond;  score = log p + temperature * gumbel;  m = floor(N cos(pi/2 (s + 1) / steps))
    stay masked, at least one and fewer than before. The temperature is a running product of 1 - (s + 1) / steps. A
    picture with nothing masked stays.
    """
    n, count, at = layout.image_tokens, len(captions), generator.device
    codes, unknown = (x.to(at, copy=True) for x in known
                      or (torch.zeros(count, n, dtype=torch.long), torch.ones(count, n, dtype=torch.bool)))
    untouched = ~unknown.any(-1, keepdim=True)
    temperature = 1.0
    for step in range(steps):
        ratio = (step + 1) / steps
        texts = captions + [negative] * count * (w > 0)
        rows = list(zip(codes.cpu(), unknown.cpu()))
        batch = pack([layout.t2i(text, *rows[i % count]) for i, text in enumerate(texts)])
        batch = batch.share_scores() if share and w > 0 else batch
        slots = (batch.modality == Modality.IMAGE).nonzero()[:, 0].to(model.device)
        logits = model.code_logits(model(batch.to(model.device))[slots]).to(at).view(len(texts), n, -1)
        if w > 0:
            logits = (1 + w) * logits[:count] - w * logits[count:]
        probability = logits.softmax(-1)
        sampled = torch.multinomial(probability.flatten(0, 1), 1, generator=generator).view(count, n)
        sampled = torch.where(unknown, sampled, codes)
        # known slots get the largest number, so they are never the ones masked again
        confidence = probability.gather(-1, sampled[..., None])[..., 0].masked_fill(~unknown,
                                                                                    torch.finfo(probability.dtype).max)
        gumbel = -(-torch.rand(count, n, generator=generator, device=at).clamp(min=1e-20).log()).clamp(min=1e-20).log()
        temperature *= 1 - ratio
        score = confidence.clamp(min=1e-20).log() + temperature * gumbel
        # in float32, whose rounding decides at whole numbers
        left = int(n * torch.cos(torch.tensor(ratio) * math.pi / 2))
        m = (unknown.sum(-1, keepdim=True) - 1).clamp(max=left).clamp(min=1, max=n - 1)
        unknown = (score < score.sort(-1).values.gather(-1, m)) & ~untouched
        codes = sampled
    return codes.cpu()


def _draw_causal(model: UnifiedModel, layout: Layout, captions: list[str], generator: torch.Generator, w: float,
                 negative: str, share: bool, top_k: int, temperature: float, static: bool) -> Tensor:
    """Token by token in raster order, the row ends written by the layout: score = u + (1 + w)(c - u) over
    log-probabilities."""
    n, count = layout.image_tokens, len(captions)
    texts = captions + [negative] * count * (w > 0)
    nothing = torch.zeros(0, dtype=torch.long)
    score_source = torch.arange(len(texts)) % count if share else None
    session = DecodeSession(model, [layout.t2i(text, nothing, prompt=True) for text in texts], 2 * n, score_source,
                            static)
    hidden, codes = session.hidden, []
    for number in range(1, n + 1):
        logits = model.code_logits(hidden).log_softmax(-1)
        if w > 0:
            logits = logits[count:] + (1 + w) * (logits[:count] - logits[count:])
        codes.append(_sample(logits, top_k, temperature, generator))
        if number < n:
            for ids in layout.after_code(codes[-1], number):
                hidden = session.step(ids.repeat(1 + (w > 0)), list(range(len(texts))))
    return torch.stack(codes, 1)


def slots_of(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which slots to draw anew from a mask in pixels (float [B, H, W], 1: anew): bool [B, N], bicubic resize, at least
    half."""
    return (F.interpolate(mask[:, None].float(), size=grid, mode="bicubic") >= 0.5).flatten(1)


def extend(model: UnifiedModel, captions: list[str], codes: Tensor, side: str, by: int, **options: object) -> Tensor:
    """Extrapolate pictures by masked decoding: codes int64 [B, h, w] grow by `by` rows or columns on a side.

    A window keeps the picture's edge and draws the rest: the whole picture, or as much of it along the growth as the
    model's own grid has. Options go to `draw`. Raises ValueError for an unknown side or no less than the window.
    """
    along = 1 if side in ("top", "bottom") else 2
    size = min(codes.shape[along], model.layout.grid[along - 1])
    if side not in SIDES or not 0 < by < size:
        raise ValueError(f"side={side!r}, by={by}: side is one of {', '.join(SIDES)}, and by is less than the window's "
                         f"{size} slots.")
    first = side in ("left", "top")
    edge = codes.narrow(along, 0 if first else codes.shape[along] - size + by, size - by)
    fresh = torch.zeros_like(codes.narrow(along, 0, by))
    order = (fresh, edge) if first else (edge, fresh)
    masked = torch.cat([torch.full_like(x, x is fresh, dtype=torch.bool) for x in order], along)
    known = torch.cat(order, along)
    window = draw(model, captions, codes=known.flatten(1), masked=masked.flatten(1), grid=tuple(known.shape[1:]),
                  **options).view(known.shape)
    new = window.narrow(along, 0 if first else size - by, by)
    return torch.cat([new, codes] if first else [codes, new], along)


@torch.no_grad()
def calibrate(model: UnifiedModel, batch: Batch) -> None:
    """Set every router's threshold to the mean score of the k-th best token, per task, on a typical batch.

    A token-by-token decision can then be made from the token's own score; it keeps the planned share on average.
    """
    training = model.training
    with record_routing() as log:
        model.eval()(batch.to(model.device))
    model.train(training)
    for number, routing in log.items():
        chose = routing.eligible[routing.kth].tolist()      # else the k-th token is one that is always kept
        for task in Task:
            kth = [at for at, yes, s in zip(routing.kth.tolist(), chose, batch.segments)
                   if yes and s.task == task and s.rule == "topk" and s.length]
            if kth:
                model.layers[number].router.threshold[task] = routing.score[kth].mean()
