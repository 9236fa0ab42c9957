"""Exercises: check a reader's function in stages and say what to try next, never with a traceback.

    rank = check(rank, numerical_rank,
                 Stage("Count entries of a comparison: (s > ...).sum().", (values, 0.1)),
                 Stage("The tolerance is relative: multiply it by the largest value.", (10 * values, 0.1)))

A stage is one call on which both functions must agree; where the reference's result carries a gradient, the gradients of the two must agree as well.
`check` hands back the reader's function when it passes every stage and the package's own otherwise, so a notebook always goes on. Both get copies of a
stage's arguments: whatever a reader's code does to them, the next stage and the notebook are untouched.
"""

from __future__ import annotations

import contextlib
import copy
import html
import inspect
import io
import numbers
import textwrap
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ParameterError
from .run_folder import someone_looks

CLOSE = 1e-4
"""How far two numbers may differ, absolute and relative."""
SHOWN = 8
"""Entries of a tensor or list that a message spells out; a larger one is named by type and shape."""
ECHO = 200
"""Characters of what a reader's function prints that are repeated."""


@dataclass(frozen=True)
class Stage:
    """One call both functions must agree on, and the hint that helps when they do not."""

    hint: str
    args: tuple


OURS: weakref.WeakSet[Callable] = weakref.WeakSet()
"""What `check` has handed out in the place of a reader's function."""


class Wrong(Exception):
    """What is wrong with a reader's function or its result, in a few words."""


def check(yours: Callable, reference: Callable, *stages: Stage) -> Callable:
    """Run `yours` through the stages (results: numbers, tensors, or tuples and lists of them) and print how far it got. Returns the function to use.

    The message of a stage that fails says which call it was, what came out, what was expected, and gives the stage's hint.
    """
    if any(yours is ours for ours in OURS):
        print("Run the cell with your function again first: since the last check its name stands for the package's own.")
        return reference
    for number, stage in enumerate(stages, 1):
        printed = io.StringIO()
        try:
            _agree(yours, reference, stage.args, printed)
        except Wrong as wrong:
            call = f"with {', '.join(map(shown, stage.args))}" if stage.args else "called without arguments"
            print(f"Stage {number} of {len(stages)}, {call}: {wrong}.")
            if said := printed.getvalue().strip():
                print(f"(It printed: {said[:ECHO]}{' ...' if len(said) > ECHO else ''})")
            print(f"Hint: {stage.hint}\nUntil then the package's own function is used below.")
            OURS.add(reference)
            return reference
    print(f"All {len(stages)} stages passed: your function is used below.")
    return yours


def _agree(yours: Callable, reference: Callable, args: tuple, printed: io.StringIO) -> None:
    """Raises `Wrong` where `yours` does something else than `reference` on copies of `args`; what `yours` prints goes to `printed`."""
    mine, theirs = copy.deepcopy(args), copy.deepcopy(args)
    want = reference(*theirs)
    try:
        with contextlib.redirect_stdout(printed):
            got = yours(*mine)
    except (Exception, SystemExit) as error:  # whatever a reader's code raises is answered with the hint; only an interrupt ends the cell
        raise Wrong(f"it raised {type(error).__name__}: {str(error)[:ECHO]}" if str(error) else f"it raised {type(error).__name__}") from None
    if got is None:
        raise Wrong(f"it returns None, expected {shown(want)} (not written yet, or no `return`: printing a value does not return it)")
    if changed := [i for i, (a, b) in enumerate(zip(mine, args), 1) if _differs(a, b)]:
        raise Wrong(f"it changes its argument {changed[0]} in place: make a new tensor and leave what is given as it is")
    try:
        _same(got, want)
        if isinstance(want, Tensor) and want.requires_grad:
            _same_slope(got, want, mine, theirs)
    except (RuntimeError, TypeError) as error:  # a sparse tensor, a graph that the reader's own backward has freed
        raise Wrong(f"its result cannot be compared ({str(error)[:ECHO]})") from None


def _same(got: object, want: object) -> None:
    """Raises `Wrong` where a result is of another kind, shape or value than expected."""
    if isinstance(want, tuple | list):
        if not isinstance(got, tuple | list):
            raise Wrong(f"it gives {shown(got)}, expected {len(want)} results: {shown(want)}")
        if len(got) != len(want):
            raise Wrong(f"it gives {len(got)} results, expected {len(want)}: {shown(want)}")
        for part, wanted in zip(got, want):
            _same(part, wanted)
        return
    number = not isinstance(want, Tensor) or want.ndim == 0
    if not isinstance(got, Tensor) and not (number and isinstance(got, numbers.Real)):
        made = "a generator (it uses `yield`; use `return`)" if inspect.isgenerator(got) else f"{shown(got)}, a {type(got).__name__}"
        raise Wrong(f"it gives {made}; expected {'the number' if number else 'the tensor'} {shown(want)}")
    a, b = torch.as_tensor(got).detach().cpu(), torch.as_tensor(want).detach().cpu()
    if a.shape != b.shape:
        raise Wrong(f"its shape is {list(a.shape)}, expected {list(b.shape)}")
    if _kind(a) != _kind(b) and not (a.ndim == 0 and _kind(a) == "int" and _kind(b) == "float"):
        raise Wrong(f"its numbers are of type {_kind(a)} ({shown(got)}), expected {_kind(b)} ({shown(want)})")
    a, b = a.to(torch.float64), b.to(torch.float64)
    if bad := int((a.isnan() & ~b.isnan()).sum()):
        raise Wrong(f"it gives NaN{f' in {bad} of {a.numel()} places' if a.ndim else ''}, expected {shown(want)}")
    off = ~torch.isclose(a, b, rtol=CLOSE, atol=CLOSE)
    if off.any() and a.numel() <= SHOWN:
        raise Wrong(f"it gives {shown(got)}, expected {shown(want)}")
    if off.any():
        at = off.nonzero()[0].tolist()
        raise Wrong(f"{int(off.sum())} of {a.numel()} values differ; at {at} it gives {a[tuple(at)]:.4g}, expected {b[tuple(at)]:.4g}")


def _same_slope(got: object, want: Tensor, mine: tuple, theirs: tuple) -> None:
    """Raises `Wrong` where the value is right but what flows back to the arguments is not."""
    if not isinstance(got, Tensor) or not got.requires_grad:
        raise Wrong("its value is right, but no gradient flows back through it")
    weight = torch.linspace(1, 2, want.numel()).view_as(want)  # not all alike: a gradient that lands on the wrong token shows
    slopes = [torch.autograd.grad((out * weight).sum(), [a for a in args if isinstance(a, Tensor) and a.requires_grad], materialize_grads=True)
              for out, args in ((got, mine), (want, theirs))]
    try:
        _same(*slopes)
    except Wrong as wrong:
        raise Wrong(f"its value is right, its gradient is not: {wrong}") from None


def _differs(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, tuple | list):
        return len(a) != len(b) or any(map(_differs, a, b))
    return False


def _kind(x: Tensor) -> str:
    return "bool" if x.dtype is torch.bool else "float" if x.is_floating_point() else "complex" if x.is_complex() else "int"


def shown(value: object) -> str:
    """A value in a few words: small ones spelled out, large tensors by type and shape, functions by name."""
    if isinstance(value, Tensor):
        small = value.numel() <= SHOWN
        return shown(value.tolist()) if small else f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join([*map(shown, value[:SHOWN]), *(["..."] if len(value) > SHOWN else [])]) + "]"
    if callable(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


LETTERS = "abcdef"
WIDTH = 120
"""Characters of a line of the written form."""


@dataclass(frozen=True)
class Question:
    """A question with its choices, the letter of the right one (a is the first) and why it is right. Raises `ParameterError` for a letter without a choice."""

    text: str
    answer: str
    choices: Sequence[str]
    why: str

    def __post_init__(self) -> None:
        letters = LETTERS[: len(self.choices)]
        if not 2 <= len(self.choices) <= len(LETTERS) or self.answer not in list(letters):
            raise ParameterError(f"{self.text!r} has {len(self.choices)} choices and the answer {self.answer!r}. "
                                 f"Give 2 to {len(LETTERS)} choices and the letter of one of them.")
        if not self.why.strip():
            raise ParameterError(f"{self.text!r} does not say why {self.answer} is right: a reader who is wrong wants the reason.")


def quiz(interactive: bool, *questions: Question):
    """The questions as a box of buttons when `interactive` and someone looks (the last value of a cell is shown), else printed, answers below."""
    if interactive and someone_looks():
        return clickable(questions)
    print(written(questions))
    return None


def written(questions: Sequence[Question]) -> str:
    """All questions with their choices, then all answers with their reasons."""
    asked = []
    for number, q in enumerate(questions, 1):
        asked += [_wrapped(f"{number}. ", q.text), *(_wrapped(f"   {letter}) ", choice) for letter, choice in zip(LETTERS, q.choices)), ""]
    return "\n".join([*asked, "Answers", *(_wrapped(f"{number}. {q.answer}: ", q.why) for number, q in enumerate(questions, 1))])


def clickable(questions: Sequence[Question]):
    """The same as widgets (ipywidgets.VBox): one button per choice, the reason at once, and how many were right at the first click."""
    import ipywidgets as widgets

    first: dict[int, bool] = {}
    score = widgets.HTML()
    boxes = []
    for number, q in enumerate(questions, 1):
        said = widgets.HTML()
        rows = []
        for letter, choice in zip(LETTERS, q.choices):
            button = widgets.Button(description=letter, tooltip=choice, layout=widgets.Layout(width="3em"))
            button.on_click(lambda pressed, number=number, q=q, said=said: _press(pressed, number, q, said, score, first, len(questions)))
            rows.append(widgets.HBox([button, widgets.HTML(_marked(choice))]))
        boxes.append(widgets.VBox([widgets.HTML(f"<b>{number}.</b> {_marked(q.text)}"), *rows, said]))
    return widgets.VBox([*boxes, score])


def _press(button, number: int, q: Question, said, score, first: dict[int, bool], total: int) -> None:
    right = button.description == q.answer
    first.setdefault(number, right)
    button.button_style = "success" if right else "danger"
    said.value = f"<b>Yes, {q.answer}.</b> {_marked(q.why)}" if right else f"<b>Not {button.description}.</b> Try another one."
    score.value = f"{sum(first.values())} of {total} right at the first click" + (f", {total - len(first)} to go." if len(first) < total else ".")


def _marked(text: str) -> str:
    """Escaped, with `code` between backticks set as code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _wrapped(lead: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead))
