"""A training step on static memory learns what a plain one does, whatever the batch is filled up with."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from unimod.baselines import PRESETS
from unimod.batch import Task, lengths_of, pack
from unimod.config import RouterConfig
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.graph import FINE, SPARE, StaticStep, filled, whole_step_refused
from unimod.layers import apply_mod, learn_capacity
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.ops.backend import meta_as, use_backend
from unimod.plan import last_half
from unimod.train import Objective, TrainConfig, train
from unimod.upload import upload

DATA = open_data("scenes")
CAN = [name for name, config in PRESETS.items() if config.topk_scope == "segment"]


def built(name, router="dense", batch=(2, 2, 1)):
    model, tokenizer = from_pretrained(shipped(name))
    if router != "dense":
        torch.manual_seed(0)
        apply_mod(model, last_half(8), PRESETS[router])
    return model, Batches(DATA, tokenizer, model.layout, batch)


def learned(objective, *given):
    """Losses and gradients."""
    torch.manual_seed(1)
    objective.zero_grad()
    outcome = objective(*given)
    outcome.objective.backward()
    return outcome, {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("router", ["dense", *CAN])
@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_the_filler_changes_neither_losses_nor_gradients(name, router):
    """Also those on routers; where scores are drawn, the filler draws behind the batch's own."""
    model, batches = built(name, router)
    objective, batch = Objective(model, TrainConfig(steps=1, membership=0.1, budget=0.1)).train(), batches.train(0)
    new, plan, signature = filled(model, batch)
    assert len(new) == signature.tokens == sum(new.lengths) > len(batch) and len(new.lengths) == signature.sequences
    for number, layer in plan.layers.items():
        assert sum(layer.kept) in signature.kept and all(k <= n for k, n in zip(layer.kept, layer.lengths))
        assert layer.kept[:len(batch.segments)] == model.plan(batch).layers[number].kept
        assert max(lengths_of(layer.segments)) <= layer.longest <= signature.longest[0]
    assert max(new.lengths) <= signature.longest[0] and max(s.length for s in new.segments) <= 2**signature.block
    if "random" in PRESETS.get(router, RouterConfig()).score:
        return                                              # a longer batch draws other scores: sizes only
    (ours, grads), (theirs, expected) = learned(objective, new, plan), learned(objective, batch)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert grads.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-3, atol=1e-5 * max(1, float(grad.abs().max())), msg=key)


@pytest.mark.parametrize("router, accumulate", [("dense", 1), ("unimod", 1), ("unimod", 3), ("early-exit", 2)])
def test_training_on_static_memory_is_training(router, accumulate):
    """AdamW, clipping, the schedule of the learning rate, accumulation: the same curve and the same model."""
    found = []
    for graph in (False, True):
        model, batches = built("showo-tiny", router)
        records = train(model, batches, TrainConfig(steps=5, clip=0.5, accumulate=accumulate, graph=graph))
        found.append(([[r["loss"], r["grad_norm"], r["lr"], r["tokens"], r["flops"]] for r in records],
                      model(batches.held_out("test", 4)).detach()))
    (ours, hidden), (theirs, expected) = found
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    # not weights one by one: a key's bias has no gradient but rounding, of which AdamW makes a step of full size
    torch.testing.assert_close(hidden, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("graph", [False, True])
def test_what_no_batch_of_a_step_uses_is_not_decayed(graph):
    """A projector beside picture codes: no gradient is not a gradient of zero, which AdamW would act upon."""
    model, batches = built("showo-tiny", "unimod")
    model.projector = torch.nn.Linear(24, model.width)
    before = model.projector.weight.detach().clone()
    train(model, batches, TrainConfig(steps=2, accumulate=2, graph=graph))
    assert torch.equal(model.projector.weight, before)


def test_a_graph_is_for_one_number_of_batches():
    """By which it divides the loss."""
    model, batches = built("showo-tiny", "dense", (1, 1, 0))
    step, batch = StaticStep(Objective(model).train(), optimizer(model), 1.0), batches.train(0)
    for n in (2, 3):
        seen = len(step._seen)
        step([batch] * n, 0.0)
        assert len(step._seen) >= seen + 2


def test_a_step_that_cannot_be_recorded_runs_where_it_did_and_says_why(monkeypatch, capsys):
    """As torch does it: the end of a broken capture fails, too, and leaves the capture's stream in place."""
    def waits(*held):
        raise RuntimeError("it waits")

    class Broken:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            streams.append("capture")
            monkeypatch.setattr(step, "_whole", waits)

        def __exit__(self, *args):
            monkeypatch.setattr(step, "_whole", whole)
            raise RuntimeError("the end fails")

    streams, cuda = ["own"], {"synchronize": lambda: None, "CUDAGraph": object, "graph": Broken}
    cuda |= {"current_stream": lambda: streams[-1], "set_stream": streams.append}
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    model, batches = built("showo-tiny", "dense")
    step = StaticStep(Objective(model).train(), optimizer(model), 1.0)
    step.records, whole = True, step._whole
    for _ in range(3):
        assert step([batches.train(0)], 1.0)[0].isfinite().any()
    said = "".join(capsys.readouterr())
    assert streams == ["own", "capture", "own"] and said.count("cannot be recorded: it waits") == 1


def test_accumulated_gradients_are_the_mean_of_their_batches():
    model, batches = built("showo-tiny", "unimod")
    step = StaticStep(Objective(model).train(), optimizer(model), clip=1e9)
    grads = [learned(Objective(model), batches.train(i))[1] for i in range(2)]
    expected = {key: (grads[0][key] + grads[1][key]) / 2 for key in grads[0]}
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    torch.testing.assert_close(step([batches.train(0), batches.train(1)], 0.0)[1], norm, rtol=1e-4, atol=1e-5)


def optimizer(model):
    return torch.optim.AdamW([{"params": model.parameters(), "peak": 1e-3}], lr=1e-3)


def test_batches_of_one_signature_lie_in_one_place():
    """What a recorded graph reads: the same addresses for every batch of a signature, whatever it holds."""
    model, batches = built("emu3-tiny", "unimod")
    step, places = StaticStep(Objective(model).train(), optimizer(model), 1.0), {}
    for i in range(6):
        key, batch, plan, rate = step._upload(batches.train(i), 1.0)
        layer = next(iter(plan.layers.values()))
        tensors = [batch.ids, batch.mask.lo, layer.eligible, layer.sizes, plan.targets.index, rate]
        place = [(x.data_ptr(), x.shape) for x in tensors]
        assert places.setdefault(key, place) == place
        given = batches.train(i)
        assert torch.equal(batch.ids[:len(given)], given.ids) and torch.equal(batch.host.ids, batch.ids)
    assert len(places) < 6


def test_batches_of_one_size_that_attend_otherwise_share_no_memory(monkeypatch):
    """Causal ones beside ones with pictures; ones for which another backend is the faster; one without targets."""
    model, batches = built("showo-tiny", "unimod", (8, 8, 1))
    step, batch = StaticStep(Objective(model).train(), optimizer(model), 1.0), batches.train(0)
    causal = replace(batch, mask=replace(batch.mask, kinds=("causal",) * len(batch.lengths)))
    keys = [step._upload(x, 1.0)[0] for x in (batch, batch, causal)]
    monkeypatch.setattr("unimod.ops.attention.implementation", lambda *_: "varlen")
    keys += [step._upload(x, 1.0)[0] for x in (batch, causal)]
    assert keys[0] == keys[1] and len(set(keys)) == 4 and len({signature for signature, _ in keys}) == 1
    few = replace(batch, target=torch.where(torch.arange(len(batch)) == batch.labelled[0], batch.target, -100))
    none = replace(batch, target=torch.full_like(batch.target, -100))
    first, second = (step._upload(x, 1.0)[0] for x in (few, none))
    assert first != second


def test_features_of_a_vision_tower_go_through_the_same_step():
    """Fillers change nothing, the projector learns, and no size is read from the device."""
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    model, _ = built("showo-tiny", "unimod")
    model.projector, seen = torch.nn.Linear(24, model.width), set()
    rows = [model.layout.mmu(torch.randn(n, 24), [("what is it?", "a circle")]) for n in (9, 7, 12)]
    batch, objective = pack(rows), Objective(model).train()
    new, plan, signature = filled(model, batch)
    assert signature.features == len(new.features) == 28
    (_, expected), held = learned(objective, batch), Names()
    with held:
        _, grads = learned(objective, new, plan)
    assert float(grads["model.projector.weight"].abs().max()) > 0 and grads.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-3, atol=1e-5 * max(1, float(grad.abs().max())), msg=key)
    assert not seen & {"masked_select", "masked_scatter_backward", "nonzero", "unique_dim", "_local_scalar_dense"}


def test_masks_of_unknown_kinds_stay_so():
    model, batches = built("showo-tiny", "dense")
    batch = batches.train(0)
    unknown = replace(batch, mask=replace(batch.mask, kinds=()))
    objective = Objective(model).train()
    (ours, _), (theirs, _) = learned(objective, *filled(model, unknown)[:2]), learned(objective, batch)
    torch.testing.assert_close(ours.total, theirs.total)


@pytest.mark.parametrize("router", ["unimod", "p-mod"])
def test_kernels_are_the_same_for_all_batches_of_a_signature(router, monkeypatch):
    """A graph holds what the host gave to a launch once: also where the longest segment is of another block."""
    triton = pytest.importorskip("unimod.ops.kernels_triton")
    model, _ = built("emu3-tiny", router)
    layout, objective, known, launched = model.layout, Objective(model.to("meta")).train(), {}, []
    monkeypatch.setattr(triton, "launch", lambda kernel, grid, *given, **options: launched.append(
        (kernel.fn.__name__, grid, [x for x in given if not isinstance(x, torch.Tensor)], options)))
    model.__dict__["rotary"] = model.rotary.to("meta")
    for questions in ([120] * 3, [114, 114, 131]):
        rows = [layout.mmu(torch.zeros(36, dtype=torch.long), [("x" * n, "y" * 5)]) for n in questions]
        new, plan, signature = filled(model, pack(rows), known)
        longest = max(s.length for s in new.segments)
        launched.clear()
        with use_backend("triton"), meta_as("cuda"):
            objective(*upload((new, plan), "meta")).objective.backward()
        expected, lengths = known.setdefault(signature, (launched[:], []))
        lengths.append(longest)
        assert launched == expected and longest <= launched[0][-1]["BLOCK"]
    assert any(len({(n - 1).bit_length() for n in lengths}) > 1 for _, lengths in known.values())


def test_whose_step_cannot_have_one_size_says_so(capsys):
    for router, why in (("competitive", "topk_scope='batch'"), ("layer-drop", "topk_scope='sequences'")):
        model, batches = built("showo-tiny", router)
        assert why in whole_step_refused(model)
    records = train(model, batches, TrainConfig(steps=1, graph=True))
    assert len(records) == 1 and f"one kernel at a time: {why}" in "".join(capsys.readouterr())
    model, _ = built("showo-tiny", "unimod")
    assert not whole_step_refused(model)
    learn_capacity(model, 0.3)
    assert "learned" in whole_step_refused(model)


def test_mixed_precision_is_not_planned_for(monkeypatch, capsys):
    """Attention would be planned for weights that are not cast, and a scaler of float16 be passed by."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(True)
    try:
        model, batches = built("showo-tiny", "unimod")
        train(model, batches, TrainConfig(steps=1, graph=True))
    finally:
        AcceleratorState._reset_state(True)
    assert "one kernel at a time: accelerate casts to bf16" in "".join(capsys.readouterr())


@pytest.mark.parametrize("graph", [False, True])
def test_a_loss_that_is_not_finite_in_one_batch_of_a_step_stops_the_run(graph, monkeypatch, tmp_path):
    """Before a checkpoint is written."""
    model, batches = built("showo-tiny", "unimod")
    forward, given = Objective.forward, []

    def second_fails(self, *args):
        given.append(args)
        outcome = forward(self, *args)
        bad = torch.nan if len(given) == 6 else 1.0
        return outcome._replace(objective=outcome.objective * bad, total=outcome.total * bad)

    monkeypatch.setattr(Objective, "forward", second_fails)
    with pytest.raises(RuntimeError, match="loss of step 2 is nan"):
        train(model, batches, TrainConfig(steps=5, accumulate=2, graph=graph, save_every=1), folder=tmp_path)
    assert len(torch.load(tmp_path / "last.pt")["records"]) == 2


def test_an_interrupted_run_on_static_memory_goes_on(tmp_path):
    """Rates that are tensors are saved and read with the optimizer."""
    class Stopped(Exception):
        pass

    def log(record):
        if stop and record["step"] == 3:
            raise Stopped

    config, curves, stop = TrainConfig(steps=4, graph=True, save_every=2), [], False
    model, batches = built("showo-tiny", "unimod")
    curves.append(train(model, batches, config))
    for stop in (True, False):
        model, batches = built("showo-tiny", "unimod")
        if stop:
            with pytest.raises(Stopped):
                train(model, batches, config, folder=tmp_path, log=log)
        else:
            curves.append(train(model, batches, config, folder=tmp_path))
    ours, theirs = ([[r["loss"], r["grad_norm"], r["lr"]] for r in records] for records in curves)
    assert ours == theirs


def test_batches_share_signatures_and_a_long_one_gets_its_own():
    """Fillers within bounds, one row alone, and rows without a target."""
    model, batches = built("showo-tiny", "unimod")
    known, fillers = {}, []
    for i in range(24):
        batch = batches.train(i)
        new, _, signature = filled(model, batch, known)
        known[signature] = known.get(signature, 0) + 1
        fillers.append((len(new) - len(batch)) / len(batch))
    assert len(known) < 12 and max(known.values()) > 2 and max(fillers) <= SPARE + 6 * FINE / 300
    rows = [model.layout.t2i("a red circle", torch.zeros(36, dtype=torch.long), torch.ones(36, dtype=torch.bool))]
    new, _, signature = filled(model, pack(rows * 40), known)
    assert signature not in known and len(new) > 40 * len(rows[0].ids) and set(new.tasks[40:]) == {Task.LM}
    unlabelled = pack([replace(rows[0], target=torch.full_like(rows[0].target, -100))])
    with pytest.raises(ValueError, match="No token of this batch has a target"):
        StaticStep(Objective(model), optimizer(model), 1.0)([unlabelled], 1.0)
