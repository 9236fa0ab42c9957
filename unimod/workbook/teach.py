"""Exercises and questionnaires of the notebooks: an answer is checked and gets a hint, never a traceback.

    rank = check(rank, numerical_rank,
                 Stage("Count entries of a comparison: (s > ...).sum().", (values, 0.1)),
                 Stage("The tolerance is relative: multiply it by the largest value.", (10 * values, 0.1)))
    quiz(params.interactive, Question("Where does a skipped token's value come from?", "b",
                                      ["from its neighbour", "it passes by unchanged", "it is 0"], "The residual ..."))

On every stage the reader's function and the package's own must agree, in value and, where the result carries a
gradient, in the gradients of their arguments. Both get copies of these: whatever a reader's code does to them, the next
stage and the notebook are untouched. A questionnaire is clickable where a front end shows widgets, and printed with its
answers elsewhere; ipywidgets is imported only for the former.
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
from .run_folder import has_front_end

CLOSE = 1e-4            # how far two numbers may differ, absolute and relative
SHOWN = 8               # entries of a tensor or list that a message spells out; a larger one is named by type and shape
ECHO = 200              # characters of what a reader's function prints that are repeated
LETTERS = "abcdef"
WIDTH = 120             # characters of a line of a printed questionnaire
OURS: weakref.WeakSet[Callable] = weakref.WeakSet()     # what `check` has handed out in a reader's function's place


@dataclass(frozen=True)
class Stage:
    """One call both functions must agree on, and the hint that helps when they do not."""

    hint: str
    args: tuple


class Wrong(Exception):
    """What is wrong with a reader's function or its result, in a few words."""


def check(yours: Callable, reference: Callable, *stages: Stage) -> Callable:
    """Run `yours` through the stages and print how far it got; returns it, or `reference` where a stage fails.

    Results may be numbers, tensors, or tuples and lists of them.
    """
    if any(yours is ours for ours in OURS):
        print("Run the cell with your function again first: since the last check its name stands for the package's "
              "own.")
        return reference
    for number, stage in enumerate(stages, 1):
        printed = io.StringIO()
        try:
            _agree(yours, reference, stage.args, printed)
        except Wrong as wrong:
            call = f"with {', '.join(map(shown, stage.args))}" if stage.args else "called without arguments"
            print(f"Stage {number} of {len(stages)}, {call}: {wrong}.")
            if output := printed.getvalue().strip():
                print(f"(It printed: {output[:ECHO]}{' ...' if len(output) > ECHO else ''})")
            print(f"Hint: {stage.hint}\nUntil then the package's own function is used below.")
            OURS.add(reference)
            return reference
    print(f"All {len(stages)} stages passed: your function is used below.")
    return yours


def _agree(yours: Callable, reference: Callable, args: tuple, printed: io.StringIO) -> None:
    """Raise `Wrong` where `yours` differs from `reference` on copies of `args`; its output goes to `printed`."""
    mine, theirs = copy.deepcopy(args), copy.deepcopy(args)
    want = reference(*theirs)
    try:
        with contextlib.redirect_stdout(printed):
            got = yours(*mine)
    except (Exception, SystemExit) as error:            # answered with the hint; only an interrupt ends the cell
        reason = f": {str(error)[:ECHO]}" if str(error) else ""
        raise Wrong(f"it raised {type(error).__name__}{reason}") from None
    if got is None:
        raise Wrong(f"it returns None, expected {shown(want)} (not written yet, or no `return`: printing a value "
                    "does not return it)")
    for number, (after, before) in enumerate(zip(mine, args), 1):
        if _differs(after, before):
            raise Wrong(f"it changes its argument {number} in place: make a new tensor and leave what is given as it "
                        "is")
    try:
        _same(got, want)
        if isinstance(want, Tensor) and want.requires_grad:
            _same_gradient(got, want, mine, theirs)
    except (RuntimeError, TypeError) as error:          # a sparse tensor, a graph that a backward has freed
        raise Wrong(f"its result cannot be compared ({str(error)[:ECHO]})") from None


def _same(got: object, want: object) -> None:
    """Raise `Wrong` where a result is of another kind, shape or value than expected."""
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
        made = f"{shown(got)}, a {type(got).__name__}"
        if inspect.isgenerator(got):
            made = "a generator (it uses `yield`; use `return`)"
        raise Wrong(f"it gives {made}; expected {'the number' if number else 'the tensor'} {shown(want)}")
    a, b = torch.as_tensor(got).detach().cpu(), torch.as_tensor(want).detach().cpu()
    if a.shape != b.shape:
        raise Wrong(f"its shape is {list(a.shape)}, expected {list(b.shape)}")
    if _kind(a) != _kind(b) and not (a.ndim == 0 and _kind(a) == "int" and _kind(b) == "float"):
        raise Wrong(f"its numbers are of type {_kind(a)} ({shown(got)}), expected {_kind(b)} ({shown(want)})")
    a, b = a.to(torch.float64), b.to(torch.float64)
    nans = int((a.isnan() & ~b.isnan()).sum())
    if nans:
        raise Wrong(f"it gives NaN{f' in {nans} of {a.numel()} places' if a.ndim else ''}, expected {shown(want)}")
    off = ~torch.isclose(a, b, rtol=CLOSE, atol=CLOSE)
    if off.any() and a.numel() <= SHOWN:
        raise Wrong(f"it gives {shown(got)}, expected {shown(want)}")
    if off.any():
        at = off.nonzero()[0].tolist()
        raise Wrong(f"{int(off.sum())} of {a.numel()} values differ; at {at} it gives {a[tuple(at)]:.4g}, "
                    f"expected {b[tuple(at)]:.4g}")


def _same_gradient(got: object, want: Tensor, mine: tuple, theirs: tuple) -> None:
    """Raise `Wrong` where the value is right but the gradient of an argument is not."""
    if not isinstance(got, Tensor) or not got.requires_grad:
        raise Wrong("its value is right, but no gradient flows back through it")
    weight = torch.linspace(1, 2, want.numel()).view_as(want)       # not uniform: a gradient on the wrong token shows

    def gradients(out: Tensor, args: tuple) -> tuple[Tensor, ...]:
        inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        return torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True)

    try:
        _same(gradients(got, mine), gradients(want, theirs))
    except Wrong as wrong:
        raise Wrong(f"its value is right, its gradient is not: {wrong}") from None


def _differs(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, tuple | list):
        return len(a) != len(b) or any(map(_differs, a, b))
    return False


def _kind(x: Tensor) -> str:
    if x.dtype is torch.bool:
        return "bool"
    return "float" if x.is_floating_point() else "complex" if x.is_complex() else "int"


def shown(value: object) -> str:
    """A value in a few words: small ones spelled out, large tensors by type and shape, functions by name."""
    if isinstance(value, Tensor):
        if value.numel() <= SHOWN:
            return shown(value.tolist())
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        rest = ["..."] if len(value) > SHOWN else []
        return f"[{', '.join([*map(shown, value[:SHOWN]), *rest])}]"
    if callable(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


@dataclass(frozen=True)
class Question:
    """A question with its choices, the letter of the right one (a is the first) and why it is right.

    Raises `ParameterError` for a letter without a choice, or a question without a reason.
    """

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
            raise ParameterError(f"{self.text!r} does not say why {self.answer} is right: a reader who is wrong "
                                 "wants the reason.")


def quiz(interactive: bool, *questions: Question):
    """The questions as a box of buttons for the cell to show when `interactive` and in a front end, else printed."""
    if interactive and has_front_end():
        return clickable(questions)
    print(written(questions))


def written(questions: Sequence[Question]) -> str:
    """All questions with their choices, then all answers with their reasons."""
    asked = []
    for number, q in enumerate(questions, 1):
        choices = [_wrapped(f"   {letter}) ", choice) for letter, choice in zip(LETTERS, q.choices)]
        asked += [_wrapped(f"{number}. ", q.text), *choices, ""]
    answers = [_wrapped(f"{number}. {q.answer}: ", q.why) for number, q in enumerate(questions, 1)]
    return "\n".join([*asked, "Answers", *answers])


def clickable(questions: Sequence[Question]):
    """The same as an ipywidgets.VBox: one button per choice, the reason at once, and a count of right first clicks."""
    import ipywidgets as widgets

    first: dict[int, bool] = {}
    score = widgets.HTML()
    boxes = []
    for number, q in enumerate(questions, 1):
        reply = widgets.HTML()

        def press(button, number=number, q=q, reply=reply) -> None:
            right = button.description == q.answer
            first.setdefault(number, right)
            button.button_style = "success" if right else "danger"
            reply.value = f"<b>Not {button.description}.</b> Try another one."
            if right:
                reply.value = f"<b>Yes, {q.answer}.</b> {_marked(q.why)}"
            to_go = f", {len(questions) - len(first)} to go" if len(first) < len(questions) else ""
            score.value = f"{sum(first.values())} of {len(questions)} right at the first click{to_go}."

        rows = []
        for letter, choice in zip(LETTERS, q.choices):
            button = widgets.Button(description=letter, tooltip=choice, layout=widgets.Layout(width="3em"))
            button.on_click(press)
            rows.append(widgets.HBox([button, widgets.HTML(_marked(choice))]))
        boxes.append(widgets.VBox([widgets.HTML(f"<b>{number}.</b> {_marked(q.text)}"), *rows, reply]))
    return widgets.VBox([*boxes, score])


def _marked(text: str) -> str:
    """Escaped, with `code` between backticks set as code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _wrapped(lead: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead))
