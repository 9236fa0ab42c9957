"""Notebooks 00 to 05 are lessons: goals, a question per figure, exercises with hints and solutions, a questionnaire.

No kernel needed.
"""

import ast
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from unimod.params import Params

LESSONS = sorted((Path(__file__).parents[2] / "notebooks").glob("0[0-5]_*.ipynb"))
DETAILS = r"<details><summary>{}</summary>\n\n(.+?)\n\n</details>"


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson: the name to write, its prose, stub, check and solution as text."""

    name: str
    prose: str
    stub: str
    check: str
    solution: str

    @property
    def stages(self) -> int:
        return sum(isinstance(node, ast.Call) and ast.unparse(node.func) == "Stage"
                   for node in ast.walk(ast.parse(self.check)))


@cache
def cells(lesson):
    return [(c["cell_type"], "".join(c["source"]), c["id"]) for c in json.loads(lesson.read_text())["cells"]]


def calls(text, name):
    """The calls of a function in a code cell."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def exercises(lesson):
    """Heading with prose, stub, check, perhaps cells that use the result, solution: in this order."""
    found, parts = [], cells(lesson)
    for i, (kind, text, _) in enumerate(parts):
        if kind == "markdown" and "## Exercise" in text:
            code = [parts[i + 1][1], parts[i + 2][1]]
            ends = next(j for j in range(i + 1, len(parts)) if parts[j][0] == "markdown")
            solution = re.search(DETAILS.format("Solution"), parts[ends][1], re.S)
            assert solution and re.fullmatch(r"```python\n.*\n```", solution[1],
                                             re.S), f"{lesson.stem}, {parts[ends][2]}: no solution in code"
            name = ast.parse(code[0]).body[-1].name
            found.append(Exercise(name, text[text.index("## Exercise"):], *code,
                                  solution[1].removeprefix("```python\n").removesuffix("\n```")))
    return found


def run(text, namespace, capsys):
    """What a cell prints."""
    capsys.readouterr()
    exec(compile(text, "cell", "exec"), namespace)
    return capsys.readouterr().out


@pytest.fixture(params=LESSONS, ids=lambda p: p.stem[:2])
def lesson(request):
    return request.param


def test_there_are_six():
    assert len(LESSONS) == 6


def test_it_opens_with_goals_that_can_be_checked(lesson):
    first = cells(lesson)[0][1]
    goals = re.search(r"\*\*At the end you know\*\*.*?:\n((?:- .+\n)+)", first)
    assert goals and len(goals[1].splitlines()) >= 3
    assert re.search(r"\*\*Minutes:\*\* \d+ .*\*\*Difficulty:\*\* [123] of 3\.", first)


def test_every_figure_is_followed_by_a_question_that_it_answers(lesson):
    parts, asked = cells(lesson), []
    for i, (kind, text, name) in enumerate(parts):
        if kind == "code" and (figures := calls(text, "run.figure")):
            assert len(figures) == 1, f"{name}: one figure in a cell, one question"
            question, where = next((text, where) for kind, text, where in parts[i + 1:] if kind == "markdown")
            assert re.search(r"\*\*Question\.\*\* .+\?", question) and re.search(DETAILS.format("Answer"), question,
                                                                                 re.S), f"{where} behind {name}"
            asked.append(where)
    assert asked and len(set(asked)) == len(asked)


def test_what_is_folded_renders(lesson):
    for kind, text, name in cells(lesson):
        if kind == "markdown":
            folded = re.findall(DETAILS.format("[A-Z][a-z]+"), text, re.S)
            whole = text.count("<details>") == text.count("</details>") == len(folded)
            assert whole, f"{name}: a blank line belongs behind <summary> and before </details>"


def test_code_that_knows_the_answers_is_folded_and_no_other(lesson):
    for cell in json.loads(lesson.read_text())["cells"]:
        text = "".join(cell["source"])
        knows = cell["cell_type"] == "code" and bool(calls(text, "check") or calls(text, "quiz"))
        assert (cell["metadata"].get("jupyter") == {"source_hidden": True}) == knows, cell["id"]


def test_shapes_are_printed(lesson):
    code = [text for kind, text, _ in cells(lesson) if kind == "code"]
    first = next(i for i, text in enumerate(code) if ".shape" in text and "print(" in text)
    assert first < 6, "a tensor's shape is printed where the first tensors appear"


def test_two_exercises_or_more_each_with_difficulty_minutes_and_stages(lesson):
    found = exercises(lesson)
    assert len(found) >= 2 and len({e.name for e in found}) == len(found)
    for e in found:
        assert re.search(r"\*Difficulty [123] of 3, \d+ minutes\.\*", e.prose), e.name
        assert e.stages >= 2, e.name
        assert re.fullmatch(rf"def {e.name}\(.*\):\n    return None  # your turn.*", e.stub), e.name
        assert calls(e.check, "check")[0].args[0].id == e.name and f"{e.name} = check(" in e.check
        hints = [ast.literal_eval(stage.args[0]) for stage in calls(e.check, "Stage")]
        assert len(set(hints)) == len(hints) and min(map(len, hints)) > 15, e.name


def test_every_solution_passes_its_check(lesson, capsys):
    namespace = {}
    for e in exercises(lesson):
        run(f"import torch\n{e.solution}", namespace, capsys)
        mine = namespace[e.name]
        assert f"All {e.stages} stages passed" in run(e.check, namespace, capsys), e.name
        assert namespace[e.name] is mine


WRONG = {"nothing": "None", "shape": "torch.zeros(7, 1, 7)", "raises": "1 / 0", "constant": "12345.0",
         "leaves": "sys.exit()", "list": "['?']",
         "nan": "float('nan')"}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_wrong_answer_gets_a_hint_and_the_notebook_goes_on(lesson, wrong, capsys):
    namespace = {}
    for e in exercises(lesson):
        run(f"import sys\nimport torch\n{e.name} = lambda *args: {WRONG[wrong]}", namespace, capsys)
        mine, said = namespace[e.name], run(e.check, namespace, capsys)
        assert f"Stage 1 of {e.stages}, with" in said and "\nHint: " in said and "Traceback" not in said, e.name
        assert callable(namespace[e.name]) and namespace[e.name] is not mine


MISTAKES = [
    ("00", "kept_count", "lambda n, c: math.floor(c * n)", 2),
    ("00", "kept_count", "lambda n, c: math.floor(c * n + 0.5)", 3),
    ("00", "saved", "lambda capacities, n: 1 - sum(kept_count(n, c) for c in capacities) / n", 2),
    ("00", "saved", "lambda capacities, n: 1 - sum(capacities) / len(capacities)", 3),
    ("01", "attend", "lambda q, k, lo, hi: (k @ q).softmax(0)", 2),
    ("01", "attend", "lambda q, k, lo, hi: (k @ q / len(q) ** 0.5).softmax(0)", 3),
    ("01", "to_image", "lambda A, image: A[image].sum(1).mean()", 1),
    ("01", "to_image", "lambda A, image: A[:, image].mean()", 2),
    ("02", "without", "lambda layers, h, skip: reduce(lambda h, f: f(h), layers[:skip], h)", 2),
    ("02", "without", "lambda layers, h, skip: reduce(lambda h, f: f(h), [f for i, f in enumerate(layers) "
     "if not skip or i != skip], h)", 3),
    ("02", "stays", "lambda x, y: (x * y).sum() / (x.norm() * y.norm())", 2),
    ("02", "stays", "lambda x, y: (x * y).sum(-1).mean()", 1),
    ("03", "rank", "lambda s, tolerance: (s > tolerance).sum()", 2),
    ("03", "rank", "lambda s, tolerance: (s >= tolerance * s[0]).sum()", 3),
    ("03", "effective_rank", "lambda s: 1 / ((s / s.sum()) ** 2).sum()", 2),
    ("03", "effective_rank", "lambda s: torch.exp(-(s / s.sum() * (s / s.sum()).log()).sum())", 3),
    ("03", "proportional", "lambda a, saving: torch.where(a < a.median() + 1e-6, 1 - 2 * saving, 1.0)", 2),
    ("03", "proportional", "lambda a, saving: torch.cat([torch.ones(len(a) // 2), (b := a.sort()[0][:len(a) // 2]) "
     "* (0.5 - saving) * len(a) / b.sum()])", 3),
    ("04", "angle", "lambda a, b: sum(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0) "
     "for x, y in zip(a, b)) / len(a)", 2),
    ("04", "angle", "lambda a, b: torch.cosine_similarity(flat(a), flat(b), dim=0).abs()", 3),
    ("04", "choose", "lambda s, k: hard(s, k).detach()", 2),
    ("04", "choose", "lambda s, k: hard(s, k) * (1 + soft(s) - soft(s).detach())", 3),
    ("05", "gated", "lambda h, update, score: h + score[:, None] * update", 1),
    ("05", "gated", "lambda h, update, score: h + (1 + 0.2 * torch.tanh(score)) * update", 2),
    ("05", "gated", "lambda h, update, score: h + (1 + 0.2 * torch.tanh(score.detach()))[:, None] * update", 3),
    ("05", "best", "lambda score, k: score.topk(k).values", 1),
    ("05", "best", "lambda score, k: score.topk(k).indices", 2),
    ("05", "best", "lambda score, k: score.argsort(stable=True)[-k:].sort().values", 3),
    ("05", "renumber", "lambda lo, hi, idx: (lo[idx], hi[idx])", 1),
    ("05", "renumber", "lambda lo, hi, idx: (lo[idx] * 0, torch.arange(1, len(idx) + 1))", 2),
    ("05", "renumber", "lambda lo, hi, idx: (lo[idx] * 0, torch.searchsorted(idx, hi[idx]))", 3),
]


@pytest.mark.parametrize(("number", "name", "mistake", "stage"), MISTAKES,
                         ids=[f"{number}-{name}-{stage}" for number, name, _, stage in MISTAKES])
def test_a_common_mistake_stops_at_the_stage_that_explains_it(number, name, mistake, stage, capsys):
    lesson = next(lesson for lesson in LESSONS if lesson.stem.startswith(number))
    namespace = {}
    for e in exercises(lesson):
        answer = e.solution if e.name != name else f"{name} = {mistake}"
        run(f"import math\nfrom functools import reduce\nimport torch\n{answer}", namespace, capsys)
        said = run(e.check, namespace, capsys)
        if e.name == name:
            assert said.startswith(f"Stage {stage} of {e.stages}, with "), said
            return
    pytest.fail(f"notebook {number} has no exercise {name}")


def test_the_last_stage_of_every_exercise_has_a_mistake_to_catch(lesson):
    for e in exercises(lesson):
        assert any(name == e.name and stage == e.stages for _, name, _,
                   stage in MISTAKES), f"no mistake reaches the last stage of {e.name}"


def test_a_questionnaire_ends_it(lesson, capsys):
    found = [(i, text) for i, (kind, text, _) in enumerate(cells(lesson)) if kind == "code" and calls(text, "quiz")]
    assert len(found) == 1 and "## Questionnaire" in cells(lesson)[found[0][0] - 1][1]
    assert not any(calls(text, "run.figure") or "## Exercise" in text for kind, text, _ in cells(lesson)[found[0][0]:]
                   if kind == "code")
    said = run(found[0][1], {"params": Params(interactive=False), "torch": torch}, capsys)
    asked, _, answers = said.partition("Answers\n")
    assert 3 <= len(re.findall(r"^\d\. ", asked, re.M)) <= 5
    assert re.findall(r"^(\d)\. ", asked, re.M) == re.findall(r"^(\d)\. [a-f]: \S", answers, re.M)
    letters = re.findall(r"^\d\. ([a-f]): ", answers, re.M)
    assert len(set(letters)) > 1, "the right choice should not always stand in the same place"
