"""An exercise never stops a notebook: whatever a reader's function does, it gets the hint and the package's goes on."""

import sys

import pytest
import torch

from unimod.workbook.teach import Stage, check, shown

NUMBERS = (Stage("Twice.", (2,)), Stage("Negative, too.", (-3,)))
X = torch.arange(12.0).view(3, 4)
TENSORS = (Stage("Twice every value.", (X,)), Stage("Any shape.", (X[0],)))


def double(x):
    return 2 * x


def printing(x):
    print("debugging", x)


def in_place(x):
    return x.mul_(2)


def one_nan(x):
    y = 2 * x
    y[0] = torch.nan
    return y


def generator(x):
    yield 2 * x


def test_the_right_one_is_handed_back(capsys):
    right = lambda x: x + x  # noqa: E731
    assert check(right, double, *NUMBERS) is right and check(right, double, *TENSORS) is right
    assert capsys.readouterr().out.count("All 2 stages passed: your function is used below.") == 2


@pytest.mark.parametrize(("wrong", "said"), [
    (lambda x: None, "it returns None, expected float32 tensor of shape [3, 4] (not written yet, or no `return`"),
    (printing, "(It printed: debugging"),
    (lambda x: x.nothing, "it raised AttributeError"),
    (lambda: 3, "it raised TypeError"),
    (7, "it raised TypeError: 'int' object is not callable"),
    (lambda x: sys.exit("bye"), "it raised SystemExit: bye"),
    (lambda x: 1 / 0, "it raised ZeroDivisionError: division by zero"),
    (generator, "a generator (it uses `yield`; use `return`)"),
    (in_place, "it changes its argument 1 in place"),
    (lambda x: (2 * x).tolist(), "a list; expected the tensor float32 tensor of shape [3, 4]"),
    (lambda x: (2 * x).numpy(), "a ndarray; expected the tensor"),
    (lambda x: "2 x", "it gives '2 x', a str"),
    (lambda x: (2 * x)[None], "its shape is [1, 3, 4], expected [3, 4]"),
    (lambda x: (2 * x).sum(), "its shape is [], expected [3, 4]"),
    (lambda x: (2 * x).long(), "its numbers are of type int"),
    (lambda x: 2 * x > 3, "its numbers are of type bool"),
    (lambda x: (2 * x).to(torch.complex64), "its numbers are of type complex"),
    (one_nan, "it gives NaN in 4 of 12 places"),
    (lambda x: 2 * x + torch.inf, "12 of 12 values differ; at [0, 0] it gives inf, expected 0"),
    (lambda x: 2 * x + (x == 5), "1 of 12 values differ; at [1, 1] it gives 11, expected 10"),
    (lambda x: torch.zeros(3, 4), "11 of 12 values differ; at [0, 1] it gives 0, expected 2"),
    (lambda x: (2 * x).to_sparse(), "its result cannot be compared"),
    (lambda x: wrong_forever(x), "it raised RecursionError"),
])
def test_a_wrong_answer_gets_the_hint(wrong, said, capsys):
    assert check(wrong, double, *TENSORS) is double
    out = capsys.readouterr().out
    assert said in out and "Stage 1 of 2, with float32 tensor of shape [3, 4]: " in out, out
    assert "Hint: Twice every value." in out and "Traceback" not in out and len(out) < 700
    assert torch.equal(X, torch.arange(12.0).view(3, 4))


def wrong_forever(x):
    return wrong_forever(x)


def test_the_message_names_the_call_and_what_was_expected(capsys):
    assert check(lambda x: 2 * abs(x), double, *NUMBERS) is double
    assert capsys.readouterr().out.startswith("Stage 2 of 2, with -3: it gives 6, expected -6.\nHint: Negative, too.\n")
    check(lambda x: 2.5 * x, double, Stage("Whole.", (1,)))
    assert "its numbers are of type float (2.5), expected int (2)" in capsys.readouterr().out


def test_a_number_may_be_a_tensor_without_axes_and_an_int_serves_as_a_float():
    for fine in (lambda x: torch.tensor(2 * x), lambda x: 2 * x, lambda x: 4):
        assert check(fine, lambda x: torch.tensor(float(2 * x)), Stage("Twice.", (2,))) is fine


def test_several_results(capsys):
    both = lambda x: (x, 2 * x)  # noqa: E731
    fine = lambda x: [x.clone(), x + x]  # noqa: E731
    assert check(fine, both, Stage("Both.", (X,))) is fine
    for wrong, said in ((lambda x: x, "expected 2 results"), (lambda x: (x, x, x), "it gives 3 results, expected 2"),
                        (lambda x: (x, x), "11 of 12")):
        assert check(wrong, both, Stage("Both.", (X,))) is both
        assert said in capsys.readouterr().out


def test_a_right_value_with_a_wrong_gradient_is_caught(capsys):
    stage = Stage("No detach.", (torch.tensor([1.0, 2.0], requires_grad=True),))
    square = lambda x: x * x  # noqa: E731
    for wrong, said in ((lambda x: (x * x).detach(), "no gradient flows back"),
                        (lambda x: x * x.detach(), "its gradient is not: it gives [1, 4], expected [2, 8]"),
                        (lambda x: backward_itself(x), "its result cannot be compared")):
        assert check(wrong, square, stage) is square
        assert said in capsys.readouterr().out
    fine = lambda x: x**2  # noqa: E731
    assert check(fine, square, stage) is fine and stage.args[0].grad is None


def backward_itself(x):
    y = x * x
    y.sum().backward()
    return y


def test_checking_again_without_running_ones_own_cell_is_noticed(capsys):
    handed = check(lambda x: None, double, *NUMBERS)
    assert check(handed, lambda x: 2 * x, *NUMBERS)(5) == 10
    out = capsys.readouterr().out
    assert "Run the cell with your function again first" in out and "passed" not in out


def test_an_interrupt_still_interrupts():
    def impatient(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(impatient, double, *NUMBERS)


def test_what_is_shown_stays_short():
    assert shown(torch.tensor([0.123456, 2.0])) == "[0.1235, 2]"
    assert shown(torch.zeros(3, 5, dtype=torch.int64)) == "int64 tensor of shape [3, 5]"
    assert shown([torch.sin, 3]) == "[the function sin, 3]" and shown("x" * 100) == "a str"
    assert shown(list(range(20))).endswith("7, ...]")


def test_what_the_packages_own_function_prints_is_not_said_to_be_the_readers(capsys):
    def reference(x):
        print("a note of the package")
        return 2 * x

    check(lambda x: None, reference, *NUMBERS)
    said = capsys.readouterr().out
    assert "Stage 1 of 2" in said and "It printed" not in said
