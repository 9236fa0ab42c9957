"""Sequences of Show-o and Emu3, token by token, against the written description of their formats."""

import torch
from tiny_rows import WORDS

from unimod.batch import IGNORE
from unimod.data.batches import cosine_mask
from unimod.models.checkpoint import build_model
from unimod.models.showo import SPECIAL
from unimod.models.text import WordTokenizer

SHOWO = build_model("showo-tiny", WORDS, codebook_size=16, grid=(3, 4), text_budget=24).layout
EMU3 = build_model("emu3-tiny", WORDS, codebook_size=16, grid=(3, 4), text_budget=24).layout
CODES = torch.arange(12)


def test_text_is_lossless_with_a_byte_fallback():
    text = WordTokenizer(WORDS)
    for sentence in ("a red circle", "a zebra and a naïve 猫", "is there a circle?", "", "USER: yes ASSISTANT: no"):
        assert text.decode([*text.encode(sentence), text.eot, 3]) == sentence


def test_showo_vocabulary_order():
    base = SHOWO.text.size
    assert [getattr(SHOWO, name) for name in SPECIAL] == list(range(base, base + 10))
    assert SHOWO.image_offset == base + 10 and SHOWO.mask == SHOWO.vocab_size - 1 == base + 10 + 16


def test_showo_t2i_row():
    masked = torch.zeros(12, dtype=torch.bool)
    masked[[1, 5]] = True
    row = SHOWO.t2i("a red circle", CODES, masked)
    text, eot = SHOWO.text.encode("a red circle"), SHOWO.text.eot
    image = [SHOWO.mask if m else int(c) + SHOWO.image_offset for c, m in zip(CODES, masked)]
    assert row.ids.tolist() == [SHOWO.t2i_task, eot, *text, eot, SHOWO.soi, *image, SHOWO.eoi]
    assert int(row.position[row.ids == SHOWO.soi]) == 24 + 1, "soi stands at T + 1, as behind the reference's left pads"
    target = {i: int(t) for i, t in enumerate(row.target) if t != IGNORE}
    start = 2 + len(text) + 1
    assert target == {start: SHOWO.soi, start + 2: 1 + SHOWO.image_offset, start + 6: 5 + SHOWO.image_offset,
                      len(row.ids) - 1: SHOWO.eoi}


def test_showo_overlong_and_empty_captions():
    long = SHOWO.t2i("red " * 40, CODES, torch.ones(12, dtype=torch.bool))
    assert len(long.ids) == 24 + 1 + 12 + 2 and int(long.ids[24]) == SHOWO.text.eot and int(long.position[0]) == 0
    empty = SHOWO.t2i("", CODES, torch.ones(12, dtype=torch.bool))
    assert empty.ids[:4].tolist() == [SHOWO.t2i_task, SHOWO.text.eot, SHOWO.text.eot, SHOWO.soi]


def test_mmu_targets_are_the_answers_and_generated_text_is_kept():
    for layout, stop in ((SHOWO, SHOWO.text.eot), (EMU3, EMU3.eos)):
        row = layout.mmu(CODES, [("is there a circle", "yes"), ("a square", "no")])
        learned = [(int(row.ids[i]), int(t)) for i, t in enumerate(row.target) if t != IGNORE]
        yes, no, ask = (layout.text.encode(w)[0] for w in ("yes", "no", "ASSISTANT:"))
        assert learned == [(ask, yes), (yes, stop), (ask, no), (no, stop)]
        rules = [rule for length, rule in row.parts for _ in range(length)]
        assert all(rule == "keep" for rule, t in zip(rules, row.target) if t != IGNORE)
        assert [rule for _, rule in row.parts] == ["topk", "topk", "keep", "topk", "keep"]
        open_row = layout.mmu(CODES, [("is there a circle", "")], open_ended=True)
        assert int(open_row.ids[-1]) == ask and (open_row.target == IGNORE).all()


def test_emu3_picture_block():
    row = EMU3.t2i("a red circle", CODES)
    v = (CODES + EMU3.image_offset).tolist()
    grid = EMU3.text.encode("3*4")
    rows = [*v[:4], EMU3.eol, *v[4:8], EMU3.eol, *v[8:], EMU3.eol]
    assert row.ids.tolist() == [EMU3.bos, *EMU3.text.encode("a red circle"), EMU3.boi, *grid, EMU3.img, *rows, EMU3.eof,
                                EMU3.eoi]
    assert sorted(int(t) for t in row.target if t != IGNORE) == v, "visual tokens are the only targets"
    for n in range(12):
        prompt = EMU3.t2i("a red circle", CODES[:n], prompt=True)
        at = len(prompt.ids) - 1
        assert torch.equal(prompt.ids, row.ids[:at + 1])
        assert int(row.target[at]) == v[n], "a prompt ends where code n is predicted"


def test_masking_noise_by_hand():
    u = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.4, 0.6, 0.8]])
    # argsort: [1, 3, 2, 0] and [0, 1, 2, 3]; cos(pi/2 * 2/3) = 0.5 -> n = 2; cos(pi/2 * 0.9999) -> n = 1 at least
    assert cosine_mask(torch.tensor([2 / 3, 0.9999]), u).tolist() == [[True, False, False, True],
                                                                      [True, False, False, False]]
