"""An exercise never stops a notebook: it hints and falls back."""

import torch

from unimod.teach import Stage, check

DOUBLE = (Stage("Twice.", (2,)), Stage("Negative, too.", (-3,)))


def double(x):
    return 2 * x


def test_right_stub_wrong_and_broken(capsys):
    right = lambda x: x + x  # noqa: E731
    assert check(right, double, *DOUBLE) is right
    assert check(lambda x: None, double, *DOUBLE) is double
    assert check(lambda x: 2 * abs(x), double, *DOUBLE) is double
    assert check(lambda x: x.nothing, double, *DOUBLE) is double
    assert check(lambda x: torch.zeros(2, 3), lambda x: torch.zeros(4), Stage("Shape.", (1,))).__name__ == "<lambda>"
    said = capsys.readouterr().out
    for text in ("All 2 stages", "Not written yet", "Stage 2 of 2: it gives 6", "Negative, too.", "AttributeError", "cannot be compared"):
        assert text in said
