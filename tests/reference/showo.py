"""Show-o v1, plain reference: rows, attention rule, backbone, losses, noise and both kinds of decoding.

Written for reading and for comparing, not for use: one row at a time, dense masks, Python loops, no cache. A state dict
is a flat {name: tensor} with the published names (`showo.model.layers.0.self_attn.q_proj.weight`, ...). Letters used
below: T text budget, N image tokens, L row length, B rows, H hidden width, V vocabulary, K codes.
"""

import math
from dataclasses import dataclass

import torch

IGNORE = -100
FEATURE = -1                       # id of a slot that holds a projected CLIP feature instead of a token
BLOCKED = -(2.0**63)               # what a forbidden pair adds to its score; finite


@dataclass(frozen=True)
class Vocabulary:
    """Text ids, then pad and nine markers, then the image codes, then the mask id. sot, bos and eos are all `eot`."""

    text_size: int = 50295
    codebook_size: int = 8192
    eot: int = 50256

    pad = property(lambda self: self.text_size)
    soi = property(lambda self: self.text_size + 1)
    eoi = property(lambda self: self.text_size + 2)
    sov = property(lambda self: self.text_size + 3)
    eov = property(lambda self: self.text_size + 4)
    t2i = property(lambda self: self.text_size + 5)
    mmu = property(lambda self: self.text_size + 6)
    t2v = property(lambda self: self.text_size + 7)
    v2v = property(lambda self: self.text_size + 8)
    lvg = property(lambda self: self.text_size + 9)
    image_offset = property(lambda self: self.text_size + 10)
    mask = property(lambda self: self.text_size + 10 + self.codebook_size)
    size = property(lambda self: self.text_size + 10 + self.codebook_size + 1)


@dataclass(frozen=True)
class Config:
    layers: int
    heads: int
    rotary: float = 0.5
    theta: float = 10000.0
    eps: float = 1e-5


def _ints(ids):
    return [int(i) for i in ids]


def _with_bos(v, text_ids):
    """The text with one bos in front: added only where it is missing, alone where the text is empty."""
    text = _ints(text_ids)
    return text if text and text[0] == v.eot else [v.eot, *text]


def _no_pads(v, labels):
    return [IGNORE if label == v.pad else label for label in labels]


def t2i_row(v, text_ids, image_ids, T, image_labels=None):
    """[PAD..., t2i, sot, text, eot] in T + 1 slots, soi, N image ids, eoi -> (ids, labels), lists of T + N + 3.

    `image_ids` and `image_labels` (true id where masked, -100 elsewhere; None: nothing is a target) are vocabulary ids.
    Labels are NOT shifted by the loss. Text that is too long keeps its first T ids, task token included, and then eot.
    """
    image = _ints(image_ids)
    part = [v.t2i, *_with_bos(v, text_ids), v.eot]
    if len(part) > T + 1:
        part = [*part[:T], v.eot]
    part = [v.pad] * (T + 1 - len(part)) + part
    targets = [IGNORE] * len(image) if image_labels is None else _ints(image_labels)
    assert len(targets) == len(image)
    return [*part, v.soi, *image, v.eoi], _no_pads(v, [*part, v.soi, *targets, v.eoi])


def t2i_gen_row(v, text_ids, n_image, T):
    """The t2i row with every image slot masked, and labels that are all ignored. Empty text: the unconditional row."""
    ids, _ = t2i_row(v, text_ids, [v.mask] * n_image, T)
    return ids, [IGNORE] * len(ids)


def lm_row(v, text_ids, L):
    """sot, text, eot, PAD... -> (ids, labels), lists of L. Long text is cut at L, without eot. Loss shifts labels."""
    ids = [*_with_bos(v, text_ids), v.eot][:L]
    ids = ids + [v.pad] * (L - len(ids))
    return ids, _no_pads(v, ids)


def mmu_caption_row(v, image_ids, text_ids, T):
    """mmu, soi, N image ids, eoi, [sot, text, eot, PAD...] in T slots -> (ids, labels), lists of T + N + 3.

    The whole text part is a target, sot and question included. The loss shifts the labels.
    """
    head = [v.mmu, v.soi, *_ints(image_ids), v.eoi]
    part = [*_with_bos(v, text_ids), v.eot]
    if len(part) > T:
        part = [*part[: T - 1], v.eot]
    part = part + [v.pad] * (T - len(part))
    return head + part, [IGNORE] * len(head) + _no_pads(v, part)


def _conversation(v, rounds, n):
    """Rounds of (prompt ids, answer ids), one eot after every answer, in exactly n slots; targets: answers and eots."""
    ids, labels = [], []
    for prompt, answer in rounds:
        prompt, answer = _ints(prompt), [*_ints(answer), v.eot]
        ids += prompt + answer
        labels += [IGNORE] * len(prompt) + answer
    ids, labels = ids[:n], labels[:n]
    return ids + [v.pad] * (n - len(ids)), _no_pads(v, labels + [v.pad] * (n - len(labels)))


def mmu_llava_row(v, image_ids, rounds, T):
    """mmu, soi, N image ids, eoi, [conversation, PAD...] in T slots (no sot) -> (ids, labels), lists of T + N + 3."""
    head = [v.mmu, v.soi, *_ints(image_ids), v.eoi]
    ids, labels = _conversation(v, rounds, T)
    return head + ids, [IGNORE] * len(head) + labels


def mmu_clip_row(v, n_features, rounds, T, system_ids=()):
    """mmu, system ids, soi, n_features slots of id -1, eoi, [conversation, PAD...] -> ids, labels: T + n_features + 3.

    The system ids are paid for by the conversation, which gets T - len(system_ids) slots. Beside rows of N image tokens
    and text budget T0, pass T = T0 - (n_features - N): all rows are then T0 + N + 3 long.
    """
    system = _ints(system_ids)
    assert len(system) <= T, "no room is left for the conversation"
    head = [v.mmu, *system, v.soi, *[FEATURE] * n_features, v.eoi]
    ids, labels = _conversation(v, rounds, T - len(system))
    return head + ids, [IGNORE] * len(head) + labels


def mmu_ask_row(v, image_ids, prompt_ids):
    """mmu, soi, N image ids, eoi, sot, prompt: the row an answer is decoded from, without pads; labels all ignored."""
    ids = [v.mmu, v.soi, *_ints(image_ids), v.eoi, *_with_bos(v, prompt_ids)]
    return ids, [IGNORE] * len(ids)


def allow(task, ids, v, system=0):
    """Which key k each query q may see: bool [L, L], rows are queries. `task`: t2i, lm, mmu or mmu_clip.

    `system` is the number of system-prompt ids of an mmu_clip row; its feature columns are counted from the -1 ids.
    """
    ids = _ints(ids)
    L = len(ids)
    soi, eoi = (-1, -1) if task == "lm" else (ids.index(v.soi), ids.index(v.eoi))
    last_pad = max((i for i in range(soi) if ids[i] == v.pad), default=-1)               # of the left pads, t2i only
    first, n = 2 + system, ids.count(FEATURE)
    out = torch.zeros(L, L, dtype=torch.bool)
    for q in range(L):
        for k in range(L):
            if task == "t2i" and soi <= q <= eoi:
                out[q, k] = ids[k] != v.pad
            elif task == "t2i" and q > last_pad:
                out[q, k] = last_pad < k <= q
            elif task in ("t2i", "lm"):                                                    # a left pad, or plain text
                out[q, k] = k <= q
            elif task == "mmu":
                out[q, k] = k <= q or k <= eoi
            elif task == "mmu_clip":
                out[q, k] = k <= q or first <= k < first + n
            else:
                raise ValueError(f"unknown task {task!r}")
    return out


def _linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _wide(x):
    """At least fp32; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _layer_norm(state, name, x, eps):
    wide = _wide(x)
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * state[f"{name}.weight"] + state[f"{name}.bias"]).to(x.dtype)


def _softmax(x):
    e = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def _gelu_new(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _rotate(x, config):
    """Partial rotary embedding of one head: x [L, D] -> [L, D]. Channel i of the first R is paired with i + R / 2."""
    L, D = x.shape
    R = int(D * config.rotary)
    wide = _wide(x)
    frequencies = 1.0 / config.theta ** (torch.arange(0, R, 2, dtype=wide.dtype) / R)
    angles = torch.arange(L, dtype=wide.dtype)[:, None] * frequencies[None, :]  # position ids 0..L-1, pads counted
    cos, sin = torch.cos(angles), torch.sin(angles)
    a, b = wide[:, : R // 2], wide[:, R // 2 : R]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, wide[:, R:]], dim=-1).to(x.dtype)


def _attention(state, name, config, x, bias):
    """x [L, H] after the norm, bias [L, L] added to the scores -> [L, H]. Heads one by one."""
    q, k, v = (_linear(state, f"{name}.{part}_proj", x) for part in "qkv")
    D = x.shape[-1] // config.heads
    heads = []
    for h in range(config.heads):
        part = slice(h * D, (h + 1) * D)
        qh = _rotate(_layer_norm(state, f"{name}.q_layernorm", q[:, part], config.eps), config)
        kh = _rotate(_layer_norm(state, f"{name}.k_layernorm", k[:, part], config.eps), config)
        scores = _wide(qh) @ _wide(kh).T / math.sqrt(D) + bias
        heads.append(_softmax(scores).to(x.dtype) @ v[:, part])
    return _linear(state, f"{name}.dense", torch.cat(heads, dim=-1))


def project(state, features):
    """CLIP features [n, 1024] -> embeddings [n, H] through the two-layer projector with the exact GELU."""
    y = _linear(state, "mm_projector.0", features)
    return _linear(state, "mm_projector.2", 0.5 * y * (1 + torch.erf(y / math.sqrt(2))))


def forward(state, config, ids, allow, embeds=None):
    """One row: ids [L] and allow bool [L, L] -> logits [L, V] in the dtype of the weights.

    The i-th slot of id -1 takes embeds[i] ([n, H], already projected) in place of an embedding row.
    """
    table = state["showo.model.embed_tokens.weight"]
    rows, used = [], 0
    for i in _ints(ids):
        if i == FEATURE:
            rows.append(embeds[used].to(table.dtype))
            used += 1
        else:
            rows.append(table[i])
    assert embeds is None or used == len(embeds)
    x = torch.stack(rows)
    bias = torch.zeros(len(rows), len(rows), dtype=_wide(x).dtype).masked_fill(~allow, BLOCKED)
    for n in range(config.layers):
        name = f"showo.model.layers.{n}"
        y = _layer_norm(state, f"{name}.input_layernorm", x, config.eps)
        mixed = _attention(state, f"{name}.self_attn", config, y, bias)
        fed = _linear(state, f"{name}.mlp.fc2", _gelu_new(_linear(state, f"{name}.mlp.fc1", y)))
        x = x + mixed + fed
    return _linear(state, "showo.lm_head", _layer_norm(state, "showo.model.final_layernorm", x, config.eps))


def losses(logits_by_row, labels_by_row, tasks, T):
    """Logits [L, V] and labels [L] of every row with its task -> (total, t2i, lm, mmu), scalars.

    t2i compares position i with label i from index T + 1 (soi) on; lm and mmu compare it with label i + 1. Each loss is
    the plain mean over all targets of its rows together, 0 where there are none; total = t2i + 0.1 lm + mmu.
    """
    terms = {"t2i": [], "lm": [], "mmu": []}
    for logits, labels, task in zip(logits_by_row, labels_by_row, tasks, strict=True):
        logits, labels = _wide(logits), _ints(labels)
        kind = "mmu" if task == "mmu_clip" else task
        first, shift = (T + 1, 0) if kind == "t2i" else (0, 1)
        pairs = [(i, labels[i + shift]) for i in range(first, len(labels) - shift)]
        for i, label in pairs:
            if label != IGNORE:
                terms[kind].append(torch.logsumexp(logits[i], dim=-1) - logits[i, label])
    t2i, lm, mmu = (
        torch.stack(terms[kind]).mean() if terms[kind] else torch.zeros(()) for kind in ("t2i", "lm", "mmu")
    )
    return 1.0 * t2i + 0.1 * lm + 1.0 * mmu, t2i, lm, mmu


def schedules(name):
    """Masked fraction as a function of a tensor t in [0, 1]: cosine, linear, or powX with a number X (pow2, pow0.5)."""
    if name == "cosine":
        return lambda t: torch.cos(math.pi / 2 * t)
    if name == "linear":
        return lambda t: 1 - t
    if name.startswith("pow"):
        return lambda t: 1 - t ** float(name[3:])
    raise ValueError(f"no formula is known for schedule {name!r}")


def noise(codes, mask_id, generator, offset, min_rate=0.0, drop_prob=0.1):
    """Codes [B, N] -> (image ids [B, N] with some slots masked, image labels [B, N], dropped bool [B]).

    Three draws in this order: the time of each row, the slot order of each row, the caption dropout of each row.
    """
    B, N = codes.shape
    times = torch.rand(B, generator=generator)
    orders = torch.argsort(torch.rand(B, N, generator=generator), dim=-1)
    dropped = torch.rand(B, generator=generator) < drop_prob
    rates = schedules("cosine")(times).clamp(min=min_rate)
    counts = torch.round(N * rates)
    ids = torch.empty(B, N, dtype=torch.long)
    labels = torch.empty(B, N, dtype=torch.long)
    for b in range(B):
        n = max(1, int(counts[b]))
        for j in range(N):
            true_id = int(codes[b, j]) + offset
            masked = int(orders[b, j]) < n                   # the value of the permutation at j, not the rank of slot j
            ids[b, j] = mask_id if masked else true_id
            labels[b, j] = true_id if masked else IGNORE
    return ids, labels, dropped


def maskgit(logits_fn, codes, unknown, w, steps, generator):
    """Fill the unknown slots of codes [B, N] in steps -> (codes sampled last [B, N], [unknown mask fed to each step]).

    logits_fn(codes, unknown, step) -> (conditional [B, N, K], unconditional [B, N, K] or None); where `unknown` is true
    the value in `codes` means nothing. All arithmetic is in fp32, the slot count too: its floor sits on whole numbers.
    """
    B, N = codes.shape
    codes, unknown, masks, temperature = codes.clone(), unknown.clone(), [], 1.0
    for step in range(steps):
        masks.append(unknown.clone())
        ratio = (step + 1) / steps
        cond, uncond = logits_fn(codes.clone(), unknown.clone(), step)
        logits = cond.float()
        if w > 0 and uncond is not None:
            logits = (1 + w) * cond.float() - w * uncond.float()
        K = logits.shape[-1]
        probs = torch.softmax(logits, dim=-1)
        sampled = torch.multinomial(probs.reshape(B * N, K), 1, generator=generator)[:, 0].reshape(B, N)
        u = torch.rand([B, N], generator=generator)
        temperature = temperature * (1 - ratio)              # a running product, not a line
        wanted = int(torch.floor(N * torch.cos(math.pi / 2 * torch.tensor(ratio))))
        after = torch.zeros(B, N, dtype=torch.bool)
        for b in range(B):
            scores = []
            for j in range(N):
                confidence = probs[b, j, sampled[b, j]]
                if not unknown[b, j]:
                    sampled[b, j] = codes[b, j]
                    confidence = torch.tensor(torch.finfo(probs.dtype).max)
                gumbel = -torch.log((-torch.log(u[b, j].clamp(min=1e-20))).clamp(min=1e-20))
                scores.append(torch.log(confidence.clamp(min=1e-20)) + temperature * gumbel)
            m = max(1, min(int(unknown[b].sum()) - 1, wanted))
            cut = sorted(scores)[m]
            for j in range(N):
                after[b, j] = scores[j] < cut
        codes, unknown = sampled, after
    return codes, masks


@torch.no_grad()
def greedy_answer(state, config, v, row_ids, n):
    """Up to n more ids after an mmu row, each the best of the whole vocabulary; an eot ends the answer, its last id."""
    ids, answer = _ints(row_ids), []
    for _ in range(n):
        logits = forward(state, config, ids, allow("mmu", ids, v))
        best = int(torch.argmax(logits[-1]))
        ids.append(best)
        answer.append(best)
        if best == v.eot:
            break
    return answer
