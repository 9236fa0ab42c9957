"""Questionnaires: each question, choice, answer and reason is there with and without widgets; a click is answered."""

import subprocess
import sys
from pathlib import Path

import pytest

from unimod.config import ParameterError
from unimod.workbook import teach as room
from unimod.workbook.teach import Question, clickable, quiz, written

ASKED = (Question("Is 2 < 3 for `a & b`?", "b", ["no", "<b>yes</b>", "sometimes"], "Because 3 - 2 > 0."),
         Question("How many?", "a", ["one", "two " * 60], "One is " + "very " * 60 + "enough."))


def test_headless_it_prints_everything_and_the_answers_below(capsys):
    assert quiz(False, *ASKED) is None
    out = capsys.readouterr().out
    asked, _, answers = out.partition("Answers")
    assert "1. Is 2 < 3 for `a & b`?\n   a) no\n   b) <b>yes</b>\n   c) sometimes\n" in asked and "Because" not in asked
    assert "1. b: Because 3 - 2 > 0.\n2. a: One is very" in answers and max(map(len, out.splitlines())) <= room.WIDTH


def test_without_a_front_end_or_without_widgets_it_prints(capsys, monkeypatch):
    assert quiz(True, *ASKED) is None and "Answers" in capsys.readouterr().out
    monkeypatch.setattr(room, "has_front_end", lambda: True)
    assert quiz(False, *ASKED) is None and "Answers" in capsys.readouterr().out


def test_the_module_needs_no_widgets():
    code = ("import sys; sys.modules['ipywidgets'] = None; from unimod.workbook.teach import Question, quiz; "
            "quiz(True, Question('?', 'a', ['x', 'y'], 'so'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and "1. a: so" in done.stdout, done.stderr


def test_a_click_is_answered_with_the_reason(capsys, monkeypatch):
    monkeypatch.setattr(room, "has_front_end", lambda: True)
    box = quiz(True, *ASKED)
    first, second, score = box.children
    title, no, yes, _, said = first.children
    assert title.value == "<b>1.</b> Is 2 &lt; 3 for <code>a &amp; b</code>?" and said.value == ""
    assert yes.children[1].value == "&lt;b&gt;yes&lt;/b&gt;"
    no.children[0].click()
    assert "Not a." in said.value and "3 - 2" not in said.value and no.children[0].button_style == "danger"
    yes.children[0].click()
    assert "Yes, b." in said.value and "3 - 2 &gt; 0" in said.value and yes.children[0].button_style == "success"
    assert score.value == "0 of 2 right at the first click, 1 to go."
    second.children[1].children[0].click()
    assert score.value == "1 of 2 right at the first click." and capsys.readouterr().out == ""


@pytest.mark.parametrize(("answer", "choices", "why", "message"), [
    ("c", ["x", "y"], "so", "has 2 choices and the answer 'c'"),
    ("", ["x", "y"], "so", "the answer ''"),
    ("a", ["x"], "so", "Give 2 to 6 choices"),
    ("a", ["x", "y"], " ", "does not say why a is right"),
])
def test_a_question_without_its_answer_is_refused(answer, choices, why, message):
    with pytest.raises(ParameterError, match=message):
        Question("?", answer, choices, why)


def test_both_forms_hold_the_same_questions():
    assert len(clickable(ASKED).children) == 3 and written(ASKED).count(") ") == 5
