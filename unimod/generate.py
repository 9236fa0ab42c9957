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

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch, Task, TokenSequence
from .config import ParameterError
from .decode import Choice, DecodeSession
from .layers import record_routing, routed_layers
from .maskgit import MaskedDrawing
from .models.layout import Layout
from .models.unified import UnifiedModel

ROWS = 64
"""Rows per forward: answers, or captions with and without guidance."""
BLOCK = 8
"""Steps between two looks at static answers: a row's end is noticed at most so much later."""
SIDES = ("left", "right", "top", "bottom")


def _refuse_batch_competition(model: UnifiedModel) -> None:
    """Refuse to generate with routers for which rows compete with one another."""
    if any(layer.router.config.topk_scope == "batch" for layer in routed_layers(model)):
        raise ValueError("Nothing can be generated with topk_scope='batch': what a row keeps depends on its neighbours "
                         "and on what comes later. "
                         "Use topk_scope='segment'.")


def _generator(model: UnifiedModel, seed: int) -> torch.Generator:
    """Samples are drawn where the model is: a step of real size has millions of them."""
    return torch.Generator(model.device if model.device.type == "cuda" else "cpu").manual_seed(seed)


def _at_least(least: int, **given: int) -> None:
    """Raise `ParameterError` for a number below `least`, or one that is not whole."""
    for name, value in given.items():
        if not isinstance(value, Integral) or value < least:
            raise ParameterError(f"{name}={value!r} is not allowed; give a whole number of at least {least}.")


def _greedy(top_k: int, temperature: float) -> int:
    """top_k as it is meant at this temperature: 1, the best token, at 0. Raises `ParameterError` for one below, or a
    negative top_k."""
    _at_least(0, top_k=top_k)
    if not temperature >= 0:
        raise ParameterError(f"temperature={temperature!r} is not a temperature; allowed: 0 (the best token) and "
                             f"above. Give 1.0 for the model's own distribution.")
    return top_k if temperature > 0 else 1


@torch.no_grad()
def answer(model: UnifiedModel, rows: list[TokenSequence], max_new: int = 6, *, top_k: int = 1,
           temperature: float = 1.0, seed: int = 0, static: bool = False) -> list[str]:
    """Answers to open-ended understanding rows, at most `max_new` tokens each.

    top_k: sample among so many tokens (0: all) at `temperature`; 1, or a temperature of 0, is greedy decoding. static:
    see `DecodeSession`. Raises `ParameterError` for a negative temperature, top_k or max_new.
    """
    _refuse_batch_competition(model)
    _at_least(0, max_new=max_new)
    generator = _generator(model, seed)
    choice = Choice(model, False, _greedy(top_k, temperature), temperature, generator)
    texts: list[str] = []
    for start in range(0, len(rows), ROWS):
        session = DecodeSession(model, rows[start:start + ROWS], max_new, static=static)
        # a generator of the CPU draws for the rows that go on, as it does where steps are not static
        alone = static and max_new > 0 and (choice.top_k == 1 or generator.device.type == "cuda")
        ids = _answer_in_blocks(session, choice, max_new) if alone else _answer_by_token(session, choice, max_new)
        texts += [model.layout.text.decode(one) for one in ids]
    return texts


def _answer_by_token(session: DecodeSession, choice: Choice, max_new: int) -> list[list[int]]:
    """Token ids of each row's answer; a row that has ended takes no further step."""
    generated: list[list[int]] = [[] for _ in session.rows]
    active, hidden = list(range(len(generated))), session.hidden
    for left in reversed(range(max_new)):
        chosen = choice(hidden).cpu()
        going = [j for j, token in enumerate(chosen.tolist()) if token != session.model.layout.stop]
        active, chosen = [active[j] for j in going], chosen[going]
        for i, token in zip(active, chosen.tolist()):
            generated[i].append(token)
        if not active or not left:
            break
        hidden = session.step(chosen, active)
    return generated


def _answer_in_blocks(session: DecodeSession, choice: Choice, max_new: int) -> list[list[int]]:
    """The same where steps choose their own tokens: all rows go on, and every `BLOCK` steps the host looks who is
    left."""
    stop, steps = session.model.layout.stop, session.steps(choice, max_new)
    while True:
        for _ in range(min(BLOCK, max_new - steps.number)):
            steps.choose()
        rows = steps.chosen[:steps.number].T.tolist()
        if steps.number == max_new or all(stop in ids for ids in rows):
            return [ids[:ids.index(stop)] if stop in ids else ids for ids in rows]


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
    others. Token by token only: `top_k`, `temperature` (0 takes the best) and `static` (see `DecodeSession`). Raises
    ValueError when codes and masked do not fit, `ParameterError` for a negative temperature, top_k or guidance, for no
    steps, and for a grid without slots.
    """
    _refuse_batch_competition(model)
    if isinstance(captions, str):
        raise ParameterError(f"captions={captions!r} is one text; give a list: [{captions!r}].")
    _at_least(1, steps=steps)
    for side in grid or ():
        _at_least(1, grid=side)
    if guidance is not None and not guidance >= 0:
        raise ParameterError(f"guidance={guidance!r} is not a weight; allowed: 0 (none) and above.")
    generator = generator or _generator(model, seed)
    layout = model.layout if grid is None else model.layout.resized(grid)
    given = (codes is not None) + (masked is not None)
    shape = (len(captions), layout.image_tokens)
    if given and (given == 1 or layout.causal_images or codes.shape != shape or masked.shape != shape):
        raise ValueError(f"codes and masked go together, {list(shape)} each, and need masked decoding; got "
                         f"{[None if x is None else list(x.shape) for x in (codes, masked)]} for a {layout.kind} "
                         f"model.")
    w = (0.0 if layout.causal_images else 1.5) if guidance is None else guidance
    drawn = [torch.zeros(0, layout.image_tokens, dtype=torch.long)]     # all there is without captions
    for at in range(0, len(captions), ROWS // 2):
        part = slice(at, at + ROWS // 2)
        if layout.causal_images:
            choice = Choice(model, True, _greedy(top_k, temperature), temperature, generator, w)
            drawn.append(_draw_causal(model, layout, captions[part], choice, negative, share, static))
        else:
            # sequences are written on the host, wherever an image tokenizer has left the codes
            known = (codes[part].cpu(), masked[part].cpu()) if given else None
            drawing = MaskedDrawing(model, layout, captions[part], generator, steps, w, negative, share, known)
            drawing.run()
            drawn.append(drawing.codes.cpu())
    return torch.cat(drawn)


def _draw_causal(model: UnifiedModel, layout: Layout, captions: list[str], choice: Choice, negative: str, share: bool,
                 static: bool) -> Tensor:
    """Token by token in raster order, the row ends written by the layout."""
    n, count = layout.image_tokens, len(captions)
    texts = captions + [negative] * count * (choice.guidance > 0)
    nothing = torch.zeros(0, dtype=torch.long)
    score_source = torch.arange(len(texts)) % count if share else None
    # behind each code but the last, whatever code it is: its own id, then the end of a row
    written = [layout.after_code(torch.zeros(1, dtype=torch.long), number) for number in range(1, n)]
    session = DecodeSession(model, [layout.t2i(text, nothing, prompt=True) for text in texts], sum(map(len, written)),
                            score_source, static)
    if static and choice.stays_on(model.device):
        steps = session.steps(choice, n, layout.code_ids)
        for _, *ends in written:
            for ids in ends:
                steps.force(int(ids))
            steps.choose()
        return steps.chosen.T.cpu()
    hidden, codes = session.hidden, []
    for number in range(1, n + 1):
        codes.append(choice(hidden).cpu())
        if number < n:
            for ids in layout.after_code(codes[-1], number):
                hidden = session.step(ids.repeat(len(texts) // count), list(range(len(texts))))
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
    return torch.cat([new, codes.cpu()] if first else [codes.cpu(), new], along)


@torch.no_grad()
def calibrate(model: UnifiedModel, batch: Batch) -> None:
    """Set every router's threshold to the mean score of the k-th best token, per task, on a typical batch.

    A token-by-token decision can then be made from the token's own score; it keeps the planned share on average.
    """
    training = model.training
    try:
        with record_routing() as log:
            model.eval()(batch.to(model.device))
    finally:
        model.train(training)
    for number, routing in log.items():
        chose = routing.eligible[routing.kth].tolist()      # else the k-th token is one that is always kept
        for task in Task:
            kth = [at for at, yes, s in zip(routing.kth.tolist(), chose, batch.segments)
                   if yes and s.task == task and s.rule == "topk" and s.length]
            if kth:
                model.layers[number].router.threshold[task] = routing.score[kth].mean()
