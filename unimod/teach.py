"""Exercises: check a reader's function in stages and say what to try next, never with a traceback.

    rank = check(yours, numerical_rank, Stage("Compare with tolerance * the largest value, not with the tolerance.", (values, 0.1)))

`check` hands back the reader's function when it passes every stage and the package's own otherwise, so a notebook always goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Stage:
    """One call both functions must agree on, and the hint that helps when they do not."""

    hint: str
    args: tuple


def check(yours: Callable, reference: Callable, *stages: Stage) -> Callable:
    """Run `yours` through the stages (numbers or tensors, agreeing to 1e-4) and print how far it got. Returns the function to use."""
    for number, stage in enumerate(stages, 1):
        try:
            got = yours(*stage.args)
        except Exception as error:  # whatever a reader's code raises is answered with the hint
            return _stop(number, stages, f"it raised {type(error).__name__}: {error}", reference)
        if got is None:
            print("Not written yet; the package's own function is used below.")
            return reference
        want = torch.as_tensor(reference(*stage.args), dtype=torch.float64)
        try:
            fits = torch.allclose(torch.as_tensor(got, dtype=torch.float64), want, atol=1e-4)
        except (RuntimeError, TypeError, ValueError) as error:
            return _stop(number, stages, f"its result cannot be compared ({error})", reference)
        if not fits:
            return _stop(number, stages, f"it gives {got}, expected {want.tolist()}", reference)
    print(f"All {len(stages)} stages passed: your function is used below.")
    return yours


def _stop(number: int, stages: tuple[Stage, ...], what: str, reference: Callable) -> Callable:
    print(f"Stage {number} of {len(stages)}: {what}.\nHint: {stages[number - 1].hint}\nThe package's own function is used below.")
    return reference
