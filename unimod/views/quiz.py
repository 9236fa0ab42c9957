"""A questionnaire: clickable in JupyterLab, written out with its answers where nobody can click.

    quiz(params.interactive,
         Question("Where does a skipped token's value come from?", "b", ["from its neighbour", "it passes by unchanged", "it is 0"], "The residual ..."))

This file and the explorer alone know ipywidgets, and only while someone looks: a headless run, or a machine without it, gets the text.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import ParameterError
from ..run import someone_looks

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
