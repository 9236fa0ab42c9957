"""Show-o's noise, masked decoding and answers, with the same generators as the plain reference in tests/reference."""

from dataclasses import replace

import pytest
import torch
from reference import showo as ref
from tiny_showo import (
    CODES,
    CONFIG,
    FEATURE_WIDTH,
    GRID,
    LAYOUT,
    TEXT,
    VOCABULARY,
    N,
    T,
    make_model,
    rounds,
    some_rows,
    state_of,
)

from unimod.batch import IGNORE, Modality, pack
from unimod.data.batches import Batches, cosine_mask
from unimod.generate import answer, draw, extend, slots_of
from unimod.layers import apply_mod, record_routing
from unimod.models.unified import UnifiedModel
from unimod.plan import CapacityPlan, last_half

CAPTIONS = ["a red circle", "", "there is a blue square and a red circle"]


@pytest.fixture(scope="module")
def model():
    return make_model()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- noise ----


@pytest.mark.parametrize("seed", range(6))
def test_training_noise_is_the_references_draw_by_draw(seed):
    codes, captions = torch.randint(CODES, (40, N), generator=seeded(99)), [CAPTIONS[i % 3] + " red" for i in range(40)]
    expected, labels, dropped = ref.noise(codes, VOCABULARY.mask, seeded(seed), VOCABULARY.image_offset)
    generator = seeded(seed)
    rows = Batches(None, None, LAYOUT).t2i(captions, codes, generator)
    assert 0 < int(dropped.sum()) < 40
    for row, text, ids, targets, drop in zip(rows, captions, expected, labels, dropped):
        at = row.modality == Modality.IMAGE
        assert torch.equal(row.ids[at], ids) and torch.equal(row.target[at], targets)
        assert row.ids.tolist() == [
            i for i in ref.t2i_row(VOCABULARY, [] if drop else TEXT.encode(text), ids, T)[0] if i != VOCABULARY.pad
        ]
    reference = seeded(seed)
    ref.noise(codes, VOCABULARY.mask, reference, VOCABULARY.image_offset)
    assert torch.equal(generator.get_state(), reference.get_state()), "as many draws, so that the next batch agrees too"


@pytest.mark.parametrize("n", [1, 2, 12, 256])
def test_the_share_of_masked_slots_is_the_references(n):
    codes = torch.zeros(300, n, dtype=torch.long)
    ids, _, _ = ref.noise(codes, VOCABULARY.mask, seeded(n), VOCABULARY.image_offset)
    generator = seeded(n)
    masked = cosine_mask(torch.rand(300, generator=generator), torch.rand(300, n, generator=generator))
    assert torch.equal(masked, ids == VOCABULARY.mask) and int(masked.sum(1).min()) == 1
    if n == 256:
        assert masked.float().mean() == pytest.approx(2 / torch.pi, abs=0.05)


# ---- pictures ----


def decoded(model, captions, codes, unknown, w, steps, seed):
    """The reference's decoding over the reference's forward: codes and the masks fed to each step."""
    state, n = state_of(model), codes.shape[1]

    @torch.no_grad()
    def logits(ids):
        of_row = ref.forward(state, CONFIG, ids, ref.allow("t2i", ids, VOCABULARY))
        return of_row[-(n + 1):-1, VOCABULARY.image_offset:VOCABULARY.image_offset + CODES]

    def both(codes, unknown, step):
        image = torch.where(unknown, VOCABULARY.mask, codes + VOCABULARY.image_offset)
        rows = [ref.t2i_row(VOCABULARY, TEXT.encode(text), ids, T)[0] for text, ids in zip(captions, image)]
        nothing = ref.t2i_gen_row(VOCABULARY, [], n, T)[0]
        bare = [nothing[:T + 1] + row[T + 1:] for row in rows]
        return torch.stack([logits(r) for r in rows]), torch.stack([logits(r) for r in bare]) if w > 0 else None

    return ref.maskgit(both, codes, unknown, w, steps, seeded(seed))


def nothing_known(count, n=N):
    return torch.zeros(count, n, dtype=torch.long), torch.ones(count, n, dtype=torch.bool)


@pytest.fixture
def fed(monkeypatch):
    """The slots that are masked in every picture row that a model is given from here on."""
    seen, embed = [], UnifiedModel.embed
    def spy(self, batch):
        for row in batch.rows():
            ids, modality = batch.ids[row], batch.modality[row]
            seen.append(ids[modality == Modality.IMAGE] == self.layout.mask)
        return embed(self, batch)
    monkeypatch.setattr(UnifiedModel, "embed", spy)
    return seen


@pytest.mark.parametrize("steps", [1, 6, 18])
@pytest.mark.parametrize("captions", [CAPTIONS[:1], CAPTIONS], ids=["one", "three"])
@pytest.mark.parametrize("w", [0.0, 1.75])
def test_drawn_pictures_are_the_references(model, w, captions, steps, fed):
    expected, masks = decoded(model, captions, *nothing_known(len(captions)), w, steps, seed=steps)
    generator = seeded(steps)
    assert torch.equal(draw(model, captions, guidance=w, steps=steps, generator=generator), expected)
    branches = len(captions) * (1 + (w > 0))
    assert len(fed) == steps * branches
    for step, mask in enumerate(masks):
        rows = torch.stack(fed[step * branches:(step + 1) * branches])
        assert torch.equal(rows, mask.repeat(branches // len(captions), 1))
    assert torch.equal(draw(model, captions, seed=steps, guidance=w, steps=steps), expected)


@pytest.mark.parametrize("w", [0.0, 1.75])
@pytest.mark.parametrize("steps", [1, 6, 16])
def test_inpainted_pictures_are_the_references(model, w, steps):
    codes = torch.randint(CODES, (4, N), generator=seeded(5))
    masked = torch.rand(4, N, generator=seeded(6)) < torch.tensor([[0.2], [0.5], [0.9], [0.0]])
    masked[3, 7] = True                                       # one slot only
    captions = [*CAPTIONS, "blue"]
    expected, _ = decoded(model, captions, codes, masked, w, steps, seed=3)
    ours = draw(model, captions, codes=codes, masked=masked, guidance=w, steps=steps, generator=seeded(3))
    assert torch.equal(ours, expected)
    assert torch.equal(ours[~masked], codes[~masked]) and not torch.equal(ours, codes)


def test_as_many_slots_stay_masked_as_the_note_says(model, fed):
    draw(model, ["a red circle"], guidance=0, steps=6, grid=(4, 4))
    assert [int(m.sum()) for m in fed] == [16, 15, 13, 11, 7, 4]
    _, masks = decoded(model, ["a red circle"], *nothing_known(1, 16), 0, 6, seed=0)
    assert [int(m.sum()) for m in masks] == [16, 15, 13, 11, 7, 4]


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (5, 3)])
def test_pictures_of_other_grids(model, grid):
    n = grid[0] * grid[1]
    codes = draw(model, CAPTIONS, seed=2, guidance=1.75, steps=5, grid=grid)
    assert codes.shape == (3, n) and codes.min() >= 0 and codes.max() < CODES
    if n > 1:
        assert torch.equal(codes, decoded(model, CAPTIONS, *nothing_known(3, n), 1.75, 5, seed=2)[0])


def test_a_picture_with_nothing_masked_stays_and_moves_no_other(model):
    codes, masked = torch.randint(CODES, (3, N), generator=seeded(7)), torch.ones(3, N, dtype=torch.bool)
    masked[1] = False
    ours = draw(model, CAPTIONS, seed=1, steps=6, codes=codes, masked=masked)
    assert torch.equal(ours[1], codes[1])
    expected, _ = decoded(
        model, CAPTIONS, codes, masked, 1.5, 6, seed=1
    )  # the reference draws one of its slots anew; the others are the same
    assert torch.equal(ours[[0, 2]], expected[[0, 2]])
    nothing = torch.zeros(3, N, dtype=torch.bool)
    assert torch.equal(draw(model, CAPTIONS, codes=codes, masked=nothing, steps=3), codes)


@pytest.mark.parametrize("options", [
    {"codes": torch.zeros(1, N, dtype=torch.long)}, {"masked": torch.ones(1, N, dtype=torch.bool)},
    {"codes": torch.zeros(1, N + 1, dtype=torch.long), "masked": torch.ones(1, N + 1, dtype=torch.bool)},
    {"codes": torch.zeros(2, N, dtype=torch.long), "masked": torch.ones(2, N, dtype=torch.bool)},
])
def test_codes_and_masked_that_do_not_fit_are_refused(model, options):
    with pytest.raises(ValueError, match=r"codes and masked go together, \[1, 12\] each"):
        draw(model, ["a red circle"], **options)


@pytest.mark.parametrize("side, by", [("left", 1), ("right", 3), ("top", 2), ("bottom", 1)])
def test_extended_pictures_keep_theirs_and_are_drawn_as_the_reference_draws_the_window(model, side, by):
    codes = torch.randint(CODES, (3, *GRID), generator=seeded(11))
    wider = extend(model, CAPTIONS, codes, side, by, seed=4, steps=6, guidance=1.75)
    across, first = side in ("left", "right"), side in ("left", "top")
    assert wider.shape == (3, GRID[0] + by * (not across), GRID[1] + by * across)
    axis = 2 if across else 1
    start = by if first else 0
    assert torch.equal(wider.narrow(axis, start, GRID[axis - 1]), codes)
    window = wider.narrow(axis, 0 if first else by, GRID[axis - 1])
    known = torch.zeros(3, *GRID, dtype=torch.bool)
    known.narrow(axis, by if first else 0, GRID[axis - 1] - by).fill_(True)
    expected, _ = decoded(model, CAPTIONS, torch.where(known, window, 0).flatten(1), ~known.flatten(1), 1.75, 6, seed=4)
    assert torch.equal(window.flatten(1), expected)


def test_a_picture_wider_than_the_window_is_extended_from_its_edge(model):
    wide = torch.randint(CODES, (3, 3, 7), generator=seeded(12))
    for side, by, edge in (("right", 2, wide[:, :, 3:]), ("left", 3, wide[:, :, :4])):
        first = side == "left"
        whole = extend(model, CAPTIONS, wide, side, by, seed=4, steps=4)
        assert whole.shape == (3, 3, 7 + by) and torch.equal(whole.narrow(2, by if first else 0, 7), wide)
        assert torch.equal(
            whole.narrow(2, 0 if first else 3, 4 + by), extend(model, CAPTIONS, edge, side, by, seed=4, steps=4)
        )
    with pytest.raises(ValueError, match="by is less than"):
        extend(model, CAPTIONS, wide, "right", 4)


@pytest.mark.parametrize("side, by", [("up", 1), ("right", 0), ("right", -1), ("right", 4), ("top", 3)])
def test_an_extension_that_makes_no_sense_is_refused(model, side, by):
    with pytest.raises(
        ValueError, match=rf"side='{side}', by={by}: side is one of left, right, top, bottom, and by is less than"
    ):
        extend(model, CAPTIONS[:1], torch.zeros(1, *GRID, dtype=torch.long), side, by)


def test_a_mask_in_pixels_becomes_slots():
    mask = torch.zeros(2, 48, 64)
    mask[0, :, 32:] = 1
    mask[1, 16:32, :16] = 1
    slots = slots_of(mask, GRID)
    assert slots.dtype == torch.bool and slots.shape == (2, N)
    assert slots[0].view(GRID).tolist() == [[False, False, True, True]] * 3
    assert slots[1].nonzero()[:, 0].tolist() == [4]
    assert slots_of(torch.full((1, 6, 8), 0.5), GRID).all() and not slots_of(torch.full((1, 6, 8), 0.49), GRID).any()
    assert torch.equal(slots_of(mask, GRID), slots_of(mask.bool(), GRID))


# ---- answers ----


@pytest.fixture
def ids_for_text(monkeypatch):
    """Answers as lists of ids."""
    monkeypatch.setattr(TEXT, "decode", list, raising=False)


def talkative(seed=0, eager=0.0):
    """A model that ends its answers sooner or later."""
    model = make_model(seed)
    with torch.no_grad():
        model.head.bias[TEXT.eot] += eager
    return model


def open_rows():
    """Open-ended rows of different lengths, and the reference's ids of them."""
    g = seeded(8)
    out = []
    for text in ("USER: is there a red circle ? ASSISTANT:", "", "USER: red ? ASSISTANT:", "ox", "a square"):
        codes = torch.randint(CODES, (N,), generator=g)
        out.append(
            (LAYOUT.mmu_caption(codes, text, open_ended=True),
             ref.mmu_ask_row(VOCABULARY, codes + VOCABULARY.image_offset, TEXT.encode(text))[0])
        )
    for turns in ([("is there a circle ?", "")], [("red ?", "yes"), ("is there a blue square and a red circle ?", "")],
                  [("red ?", "yes a")]):
        codes = torch.randint(CODES, (N,), generator=g)
        ids, _ = ref.mmu_llava_row(VOCABULARY, codes + VOCABULARY.image_offset, rounds(turns), 99)
        real = [i for i in ids if i != VOCABULARY.pad][:-1]  # without the last eot
        out.append((LAYOUT.mmu(codes, turns, open_ended=True), real))
    return out


@pytest.mark.parametrize("eager", [0.0, 4.0])
def test_answers_are_the_references(ids_for_text, eager):
    model = talkative(eager=eager)
    state, rows = state_of(model), open_rows()
    assert all(row.ids.tolist() == ids for row, ids in rows)
    expected = [ref.greedy_answer(state, CONFIG, VOCABULARY, ids, 12) for _, ids in rows]
    assert len({len(e) for e in expected}) > 2 or not eager, "answers of different lengths are wanted here"
    ours = answer(model, [row for row, _ in rows], max_new=12)
    assert ours == [e[:-1] if e[-1] == TEXT.eot else e for e in expected]
    assert answer(model, [row for row, _ in rows[::-1]], max_new=12) == ours[::-1]
    assert answer(model, [rows[0][0]], max_new=12) == ours[:1]
    assert answer(model, [row for row, _ in rows], max_new=2) == [o[:2] for o in ours]


@torch.no_grad()
def uncached(model, row, said):
    """Logits of the next token after a row and generated text, which routers keep, by a forward over all of it."""
    n, (length, rule) = len(said), row.parts[-1]
    assert rule == "keep" or not n
    total = len(row.ids) + n
    parts = (*row.parts[:-1], (length + n, rule))
    ids = torch.cat([row.ids, torch.tensor(said, dtype=torch.long)])
    more = replace(row, ids=ids, position=torch.cat([row.position, row.position[-1] + 1 + torch.arange(n)]),
                   modality=LAYOUT.modality(ids), hi=torch.cat([row.hi, torch.arange(len(row.ids), total) + 1]),
                   target=torch.full((total,), IGNORE), parts=parts)
    return model.head(model(pack([more])))[-1]


def greedy(model, row, n):
    said = []
    while len(said) < n and (best := int(uncached(model, row, said).argmax())) != TEXT.eot:
        said.append(best)
    return said


@pytest.mark.parametrize(
    "plan", [last_half(3, 0.4), CapacityPlan({"mmu": (0.3, 0.6, 0.5)})], ids=["last half", "every layer"]
)
def test_a_routed_model_answers_with_its_cache_as_without(ids_for_text, plan):
    torch.manual_seed(2)
    model = apply_mod(talkative(eager=4.0), plan).eval()
    with torch.no_grad():
        for i in plan.routed():
            model.layers[i].router.proj.weight.mul_(300)  # scores that differ from token to token and weigh
    rows = [row for row, _ in open_rows()]
    features, turns = (torch.randn(7, FEATURE_WIDTH, generator=seeded(1)),
                       [("red ?", "yes"), ("is there a circle ?", "")])
    rows.append(LAYOUT.mmu(features, turns, open_ended=True, system="a red"))
    with record_routing() as log, torch.no_grad():
        packed = pack(rows)
        model(packed)
    assert all(len(routing.index) < 0.9 * len(packed) for routing in log.values()) and len(log) == len(plan.routed())
    expected = [greedy(model, row, 10) for row in rows]
    assert len({len(e) for e in expected}) > 2
    assert answer(model, rows, max_new=10) == expected
    assert answer(model, rows[::-1], max_new=10) == expected[::-1]


def test_features_are_answered_with_the_cache_as_without(model, ids_for_text):
    pairs = [p for p in some_rows() if p.task == "mmu_clip"]
    rows = [LAYOUT.mmu(p.row.features, [("is there a circle ?", "")], open_ended=True, system=s)
            for p, s in zip(pairs, ("", "a red"))]
    expected = [greedy(model, row, 8) for row in rows]
    assert answer(model, rows, max_new=8) == expected and any(expected)


@pytest.mark.parametrize("top_k", [2, 5, 0])
def test_sampled_answers_come_from_the_best_and_repeat_by_seed(model, ids_for_text, top_k):
    rows = [row for row, _ in open_rows()]
    drawn = [answer(model, rows, max_new=6, top_k=top_k, temperature=1.5, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != answer(model, rows, max_new=6)
    if top_k:
        for row, said in zip(rows, drawn[0]):
            for i, token in enumerate([*said, TEXT.eot][:6]):
                assert token in uncached(model, row, said[:i]).topk(top_k).indices.tolist()


def test_a_low_temperature_is_greedy(model, ids_for_text):
    rows = [row for row, _ in open_rows()]
    assert (answer(model, rows, max_new=6, top_k=0, temperature=1e-4) == answer(model, rows, max_new=6)
            == answer(model, rows, max_new=6, top_k=1, seed=9))
