"""What test_device.py runs in a process of its own: the package on a device that is not the CPU."""

import copy

import pytest
import torch
from pretend import DEVICE, On, Pretend, there

from unimod.analysis.attention import capture_overview, capture_patterns
from unimod.analysis.layers import importance
from unimod.analysis.redundancy import arank
from unimod.analysis.routing import diagnose
from unimod.analysis.tasks import gradient_cosine
from unimod.baselines import PRESETS
from unimod.batch import Task
from unimod.capture import capture_batch
from unimod.config import RouterConfig
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.decode import Choice, DecodeSession
from unimod.evaluate import evaluate, in_use
from unimod.generate import answer, calibrate, draw, extend
from unimod.graph import StaticStep
from unimod.layers import apply_mod, learn_capacity
from unimod.maskgit import MaskedDrawing
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.ops import attention_varlen
from unimod.plan import last_half
from unimod.train import Objective, TrainConfig

torch.set_num_threads(1)
DATA = open_data("scenes")
MODELS = pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])


def built(name, router="dense", batch=(2, 2, 1)):
    """A model, its picture tokenizer and its batches, on the CPU."""
    model, tokenizer = from_pretrained(shipped(name))
    if router != "dense":
        torch.manual_seed(0)
        apply_mod(model, last_half(8), RouterConfig(predictor=True) if router == "predictor" else PRESETS[router])
    return model, tokenizer, Batches(DATA, tokenizer, model.layout, batch)


def numbers(x):
    return x.host if isinstance(x, Pretend) else x


def test_the_device_refuses_what_a_gpu_refuses_and_notes_what_crosses():
    with On() as device:
        x = torch.arange(6.0).to(DEVICE, non_blocking=True)
        assert x.device == DEVICE and device.copies == ["_to_copy at "] and not device.waits
        with pytest.raises(RuntimeError, match="add takes tensors of pretend:0 and of the CPU"):
            x + torch.ones(6)
        assert (x + torch.tensor(1.0)).sum().device == DEVICE and len(device.copies) == 1
        down = (x.sum().item, x.nonzero, x.tolist, x.cpu, lambda: x[x > 1], lambda: bool(x[0]))
        up = (
            lambda: x[[0, 1]],
            lambda: torch.ones(3).to(DEVICE),
            lambda: torch.tensor([1, 2], device=DEVICE),
            lambda: x.clone().copy_(torch.ones(6)),
        )
        for n, wait in enumerate((*down, *up), 1):
            wait()
            assert len(device.waits) == n, wait
    y = Pretend(torch.ones(3)).requires_grad_()
    (y * y).sum().backward()
    assert isinstance(y.grad, Pretend) and y.grad.host.tolist() == [2, 2, 2]


@MODELS
@pytest.mark.parametrize("router", ["dense", "predictor", *(n for n, c in PRESETS.items() if c.topk_scope != "batch")])
def test_a_step_is_the_same_there_and_waits_for_nothing(name, router):
    model, _, batches = built(name, router)
    config, packed = TrainConfig(steps=1, membership=0.01, budget=0.1), batches.train(0)
    here, elsewhere = Objective(model, config).train(), Objective(there(copy.deepcopy(model)), config).train()
    torch.manual_seed(0)
    want = here(packed.to("cpu"))
    want.objective.backward()
    with On() as device:
        optimizer = torch.optim.AdamW(
            [p for p in elsewhere.parameters() if p.requires_grad] or elsewhere.parameters(), lr=0.0
        )
        moved = packed.to(elsewhere.model.device)               # waited for here; for CUDA it is pinned first
        elsewhere.model(moved)                                  # rotary frequencies follow the model once
        device.waits.clear()
        torch.manual_seed(0)
        got = elsewhere(moved)
        got.objective.backward()
        torch.nn.utils.clip_grad_norm_(elsewhere.parameters(), 1e9)
        optimizer.step()
        assert not device.waits
    torch.testing.assert_close(
        (numbers(got.objective), numbers(got.per_task)), (want.objective, want.per_task), equal_nan=True
    )
    for p, q in zip(elsewhere.parameters(), here.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(numbers(p.grad), q.grad, atol=1e-4, rtol=1e-3)


def test_learned_capacities_wait_once_a_step():
    model, _, batches = built("showo-tiny", "unimod")
    learn_capacity(there(model), 0.3)
    with On() as device:
        packed = batches.train(0).to(model.device)
        model(packed)  # capacities are read once, rotary frequencies follow the model
        device.waits.clear()
        Objective(model).train()(packed).objective.backward()
        assert not device.waits


@MODELS
@pytest.mark.parametrize("router", ["dense", "unimod", "gamma-mod", "early-exit"])
def test_a_step_on_static_memory_can_be_a_graph(name, router):
    """One copy of what is new, into memory that stays where it is; nothing is waited for."""
    model, _, batches = built(name, router)
    objective = Objective(there(model)).train()
    with On() as device:
        optimizer = torch.optim.AdamW([{"params": model.parameters(), "peak": 0.0}], lr=0.0)
        step = StaticStep(objective, optimizer, 1.0)
        step([batches.train(0)], 1.0)                           # rotary frequencies follow the model once
        device.copies.clear()
        device.waits.clear()
        ready = step._upload(batches.train(1), 1.0)
        assert len(device.copies) == 1
        device.copies.clear()
        device.waits.clear()                                    # here memory is not pinned
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        step._learn(*ready[1:], 1.0, False)
        # the reference of the selection makes its tables itself; the kernel is given them
        others = [copy for copy in device.copies if "ops/select.py" not in copy]
        assert not others and not device.waits


@MODELS
def test_attention_is_planned_without_a_wait(name):
    """The plans of the kernels that only a GPU runs."""
    _, _, batches = built(name)
    packed = batches.train(0)
    with On() as device:
        moved = packed.to(DEVICE)
        device.waits.clear()
        attention_varlen.prepare(moved.mask)
        assert not device.waits


def chosen_steps(model, asked, drawn):
    """Steps with everything inside: an answer's, and a picture's with guidance and samples."""
    yield DecodeSession(model, asked, 4, static=True).steps(Choice(model, False, 1, 1.0), 4).run_chosen
    if model.layout.causal_images:
        guided = Choice(model, True, 5, 0.9, guidance=1.0)
        session = DecodeSession(model, drawn, 4, torch.tensor([0, 0]), static=True)
        yield session.steps(guided, 4, model.layout.code_ids).run_chosen
    else:
        yield MaskedDrawing(model, model.layout, ["a red circle", ""], None, 4, 1.0, share=True).step


@MODELS
@pytest.mark.parametrize("router", ["dense", "predictor", "unimod"])
@torch.no_grad()
def test_a_static_step_can_be_a_graph(name, router):
    """Nothing crosses in it, and with it one says what the CPU says."""
    model, _, batches = built(name, router)
    if router != "dense":
        calibrate(model, batches.held_out("train", 4))
    asked = [
        model.layout.mmu(c, [("is there a red circle?", "")], open_ended=True)
        for c in batches.codes(batches.samples("test", 0, 2))
    ]
    nothing = torch.zeros(0, dtype=torch.long)
    drawn = (
        [model.layout.t2i(c, nothing, prompt=True) for c in ("a red circle", "")]
        if model.layout.causal_images
        else asked
    )
    options = {"static": True} if model.layout.causal_images else {"steps": 2}
    want = answer(model, asked, static=True), draw(model, ["a red circle"], **options)
    there(model)
    with On() as device:
        for rows in (asked, drawn):
            session = DecodeSession(model, rows, 4, static=True)
            session.step(torch.tensor([5, 6]), [0, 1])
            device.copies.clear()
            device.waits.clear()
            session._given.run()
            assert not device.copies and not device.waits
        for steps in chosen_steps(model, asked, drawn):
            steps()                                             # what is uploaded once, such as rotary frequencies
            device.copies.clear()
            device.waits.clear()
            steps()
            # a routed masked step selects by the reference here; the kernel has its sizes on the device
            assert not device.waits and all("ops/select.py" in copy for copy in device.copies)
        assert answer(model, asked, static=True) == want[0]
        assert torch.equal(numbers(draw(model, ["a red circle"], **options)), want[1])


@pytest.mark.parametrize("name, router", [("showo-tiny", "unimod"), ("emu3-tiny", "dense")])
def test_captures_and_analyses_run_there_too(name, router):
    """Captures, the three analyses, evaluation and diagnostics: tensors of both devices are never mixed, and the
    figures are the CPU's."""
    model, tokenizer, batches = built(name, router)
    if router != "dense":
        calibrate(model, batches.held_out("train", 4))

    def figures():
        t2i, mmu = ([batches.single_task(task, "validation", 2)] for task in (Task.T2I, Task.MMU))
        record = capture_batch(model, mmu[0])
        yield from (record.map(0, 5, 1), record.row_weights(0, 5, None, 3), record.tile(0, 5), record.map(1, 5))
        yield from (capture_overview(model, mmu[0], 1).maps[5], capture_patterns(model, t2i, Task.T2I).mass)
        yield arank(record, Task.MMU).rank
        yield importance(model, mmu, Task.MMU).damage
        yield gradient_cosine(model, t2i, mmu).cosine
        yield torch.tensor(list(evaluate(model, tokenizer, DATA, "test", 4).flat().values()))
        if router != "dense":
            yield torch.tensor([row["kept"] for row in diagnose(model, batches, 2)["kept"]])
            in_use(model, tokenizer, batches, 2)

    want = list(figures())
    there(model), there(tokenizer)
    with On():
        for got, expected in zip(figures(), want, strict=True):
            # an overview is float16
            torch.testing.assert_close(numbers(got), expected, atol=1e-3, rtol=1e-2, equal_nan=True)


def test_pictures_are_drawn_anew_from_codes_of_the_device():
    """Where an image tokenizer leaves them."""
    model, _ = from_pretrained(shipped("showo-tiny"))
    codes, masked = torch.zeros(1, 36, dtype=torch.long), torch.arange(36)[None] < 5
    here = draw(model, ["a"], codes=codes, masked=masked), extend(model, ["a"], codes.view(1, 6, 6), "right", 2)
    with On():
        moved = (draw(model, ["a"], codes=Pretend(codes), masked=Pretend(masked)),
                 extend(model, ["a"], Pretend(codes.view(1, 6, 6)), "right", 2))
    assert all(torch.equal(a, b) for a, b in zip(here, moved))
