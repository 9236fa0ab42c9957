"""The benchmark: its rows and messages, what is refused and dropped, plans by predicted time. No time is asserted."""

import json
import math
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from unimod import seam
from unimod.__main__ import main
from unimod.baselines import PRESETS as ROUTERS
from unimod.batch import Task, pack
from unimod.bench import costs as costs_module
from unimod.bench import parts as parts_module
from unimod.bench import record as record_module
from unimod.bench.costs import CostTable, costs, predicted_seconds
from unimod.bench.jobs import Job, available, jobs_of
from unimod.bench.parts import PARTS
from unimod.bench.record import COMMAND, PAPER, bench, on_gpu, run_jobs, table
from unimod.bench.timing import MIN_ROUNDS, OutOfTime, Times, paired_ratios, realised, time_interleaved
from unimod.config import ParameterError
from unimod.flops import count
from unimod.layers import apply_mod
from unimod.losses import losses
from unimod.plan import CapacityPlan, last_half, solve
from unimod.presets import CUDA, SIZES, Size, preset, ragged, row_of, shared_copy

TABLE = CostTable("a machine", 1000, dense=10.0, kept=(0.0, 0.5, 1.0), seconds=(2.0, 7.0, 12.0))
KEYS = {"bench", "preset", "tokens", "capacity", "backend", "realised", "note"}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    for name in ("showo-tiny", "emu3-tiny"):
        monkeypatch.setitem(SIZES, name, (Size(name, 90, 2, (0.5,), layers=4),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_realised_by_hand():
    assert realised(0.8, 0.6) == pytest.approx(0.5) and realised(1.1, 0.9) == pytest.approx(-1.0)
    assert realised(0.5, 1.0) is None
    times = {
        "dense": Times(wall=[2.0, 4.0, 10.0], cpu=[2.0, 2.0, 2.0]),
        "routed": Times(wall=[1.0, 3.0, 6.0], cpu=[1.0, 1.5, 1.9]),
    }
    by_wall, by_cpu = paired_ratios(times)["routed"], paired_ratios(times, "cpu")["routed"]
    assert (by_wall["ratio"], by_wall["ratio_low"], by_wall["ratio_high"], by_wall["ms"]) == (0.6, 0.5, 0.75, 3000)
    assert by_cpu["ratio"] == by_wall["cpu"] == 0.75 and by_cpu["wall"] == 0.6 and by_cpu["rounds"] == 3


def test_rounds_are_interleaved_and_warm_up_is_not_counted():
    calls = []
    times = time_interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=3,
        warmup=1,
        after=lambda: calls.append("."),
    )
    assert "".join(calls) == "b.a.a.b.b.a.a.b." and all(len(t.wall) == len(t.cpu) == 3 for t in times.values())
    with pytest.raises(OutOfTime, match="0 rounds done, 5 needed"):
        time_interleaved({"a": lambda: None}, rounds=9, until=-math.inf)


def test_a_deadline_leaves_rows_that_say_so():
    size = Size("emu3-tiny", 60, 2, (0.5,))
    late, fine = Job("layer", size, 5, ("reference",), "sdpa", until=-1.0), Job("step", size, 5, ("reference",), "sdpa")

    def stops(job):
        yield fine.row(120, preset("emu3-tiny")[0], capacity=1.0, backend="x", realised=None)
        raise OutOfTime("2 rounds done, 5 needed")

    def bursts(job):
        raise torch.OutOfMemoryError
        yield

    rows = run_jobs([late, fine], {"layer": None, "step": stops})
    assert [row["note"] for row in rows] == [
        "dropped at the deadline: no time was left",
        "",
        "dropped at the deadline: 2 rounds done, 5 needed",
    ]
    assert all(row.keys() >= KEYS for row in rows) and rows[0]["preset"] == "emu3-tiny" and rows[2]["bench"] == "step"
    assert run_jobs([fine], {"step": bursts})[0]["note"] == "out of memory"
    assert "dropped at the deadline" in table({"rows": rows})


def test_a_slow_job_takes_its_share_and_no_more(tmp_path):
    size, seen = Size("emu3-tiny", 60, 2, (0.5,)), []
    slow, fine = (Job(kind, size, 5, ("reference",), "sdpa", time.monotonic() + 2.0) for kind in ("layer", "step"))

    def hangs(job):
        yield fine.row(120, preset("emu3-tiny")[0], capacity=1.0, backend="x", realised=None)
        time.sleep(60)

    def runs(job):
        seen.append(job.until - time.monotonic())
        yield fine.row(120, preset("emu3-tiny")[0], capacity=1.0, backend="x", realised=None)

    kept = []
    rows = run_jobs([slow, fine], {"layer": hangs, "step": runs}, lambda rows: kept.append(len(rows)))
    assert [row["note"] for row in rows] == ["", "dropped at the deadline: no time was left", ""] and kept == [2, 3]
    assert 0 < seen[0] <= 1.1, "the second half of the time is the other's"


@pytest.mark.parametrize(("kind", "jobs", "seconds"), [("gpu", 9, 0.001), ("gpu", 9, 3.0), ("gpu", 9, 20.0),
                                                       ("step", 2, 0.5), ("attention", 2, 20.0)])
def test_the_gpu_set_ends_at_its_deadline(monkeypatch, capsys, tmp_path, kind, jobs, seconds):
    """On the CPU at tiny sizes, also with less time than one job takes: what is not measured says why."""
    monkeypatch.setattr(record_module, "needs_cuda", lambda what: None)
    monkeypatch.setattr(record_module, "CUDA", ("showo-tiny", "emu3-tiny"))
    monkeypatch.setitem(record_module.CAPTURE_SIZES, "released", record_module.CAPTURE_SIZES["showo-tiny"])
    path, written, began = tmp_path / "record.json", [], time.monotonic()
    real = record_module.write
    monkeypatch.setattr(record_module, "write", lambda *given: written.append(given) or real(*given))
    command = ["bench", kind, "--preset", "gpu", "--rounds", "5", "--deadline", str(seconds), "--out", str(path)]
    assert main([*command, "--json"]) == 0
    assert time.monotonic() - began < seconds + 5, "what the machine does beside it is not counted"
    out, err = capsys.readouterr()
    found = json.loads(out)
    rows = found["rows"]
    assert found == json.loads(path.read_text()) and len(written) == jobs and f"1 of {jobs}, " in err
    kinds = list(dict.fromkeys(row["bench"] for row in rows))
    assert kinds == (["layer", "step", "decode", "attention", "capture"] if kind == "gpu" else [kind])
    assert list(dict.fromkeys(row["preset"] for row in rows if row["bench"] == kinds[0])) == ["showo-tiny", "emu3-tiny"]
    assert all(row.get("ms") or "deadline" in row["note"] or row["bench"] == "capture" for row in rows)
    timed = [row for row in rows if row.get("ms")]
    assert timed if seconds > 10 else len(timed) < len(rows)


def test_layer_prints_one_json_object_and_nothing_else(capsys, tmp_path):
    path = tmp_path / "new" / "record.json"
    assert main(["bench", "layer", "--preset", "showo-tiny", "--rounds", "5", "--json", "--out", str(path)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found == json.loads(path.read_text()) and set(found) == {"device", "versions", "commit", "command", "rows"}
    assert found["command"].endswith("python -m unimod bench layer --preset showo-tiny --rounds 5")
    assert "1 of 1, layer showo-tiny" in err
    assert [row["capacity"] for row in found["rows"]] == [1.0, 0.5, "paper"]
    for row in found["rows"]:
        assert row.keys() >= KEYS and row["tokens"] == 180 and row["rounds"] == 5 and row["memory"] > 0
        assert row["time_low"] <= row["time"] <= row["time_high"]
    for row in found["rows"][1:]:
        assert row["realised"] == pytest.approx((1 - row["time"]) / (1 - row["flops"]), abs=0.02)
    size = SIZES["showo-tiny"][0]
    model, rows = size.build("cpu", torch.float32)
    routed = apply_mod(shared_copy(model), size.plans(4)["0.5"])
    assert found["rows"][1]["flops"] == pytest.approx(1 - count(routed, pack(rows)).saved, rel=1e-3)
    assert {row.task for row in rows} == {Task.T2I, Task.MMU}
    assert routed.layers[0].mlp.fc1.weight is model.layers[0].mlp.fc1.weight


def test_a_step_has_the_padded_way_and_shares_that_sum_to_one(capsys):
    assert main(["bench", "step", "--preset", "emu3-tiny", "--rounds", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["capacity"], row["way"]) for row in rows] == [
        (1.0, "packed"),
        (0.5, "packed"),
        ("paper", "packed"),
        (1.0, "padded"),
    ]
    assert rows[3]["shares"] is None and rows[3]["backend"] == "stock,sdpa" and rows[0]["memory"] > rows[1]["memory"]
    for row in rows[:3]:
        assert set(row["shares"]) == set(PARTS) and sum(row["shares"].values()) == pytest.approx(1)
        assert row["note"].startswith("4 layers only")
        routing = [row["shares"][part] for part in ("router", "select", "gather", "scatter")]
        assert all(routing) if row["capacity"] != 1 else not any(routing)
        assert all(row["shares"][part] > 0 for part in ("attention", "mlp", "head", "optimiser"))


def test_every_product_of_forward_and_backward_is_attributed(model, packed):
    apply_mod(model, CapacityPlan({"t2i": [1, 0.5] * 4}))

    def step():
        with torch.profiler.record_function(parts_module.RANGE + "head"):
            loss = losses(model, packed).total
        loss.backward()

    found = parts_module.operations(parts_module.recorded(model, step), cuda=False)
    products = [part for part, name, _ in found if name in ("aten::mm", "aten::addmm")]
    per_mlp = sum(isinstance(m, torch.nn.Linear) for m in model.layers[0].mlp.modules())
    assert products.count("mlp") == 3 * 8 * per_mlp
    assert products.count("attention") == 3 * 8 * 4, "one forward, two backward"
    assert products.count("router") == 3 * 4 and products.count("head") == 3 and products.count("other") == 0
    assert not any(part == "optimiser" for part, *_ in found)
    assert sum(parts_module.part_shares(model, lambda: losses(model, packed).total).values()) == pytest.approx(1)


class Marked(torch.autograd.Function):
    """The identity; its backward calls an operation that nothing else calls, given by name."""

    @staticmethod
    def forward(ctx, x, name):
        ctx.name = name
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        getattr(torch, ctx.name)(g)
        return g, None


@torch.library.custom_op("unimod_test::marked", mutates_args=())
def marked(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


marked.register_autograd(lambda ctx, g: (torch.cosh(g), g)[1])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_backward_of_functions_and_custom_ops_is_their_parts(model, packed, checkpointed):
    """Also where layers are computed again in the backward, so that new nodes are made there."""
    apply_mod(model, CapacityPlan({"t2i": [1, 0.5] * 4}))
    if checkpointed:
        model.lm.gradient_checkpointing_enable()
    for layer in model.layers:
        seam.attention(layer).register_forward_hook(lambda _, __, out: (marked(out[0]), *out[1:]))
        seam.mlp(layer).register_forward_hook(lambda _, __, out: Marked.apply(out, "sinh"))
        if hasattr(layer, "router"):
            layer.router.proj.register_forward_hook(lambda _, __, out: Marked.apply(out, "erfc"))
    model.head.register_forward_hook(lambda _, __, out: Marked.apply(out, "digamma"))

    def step():
        with torch.profiler.record_function(parts_module.RANGE + "head"):
            loss = losses(model, packed).total
        loss.backward()

    parts = {}
    for part, name, _ in parts_module.operations(parts_module.recorded(model, step), cuda=False):
        if name in ("aten::cosh", "aten::sinh", "aten::erfc", "aten::digamma"):
            parts.setdefault(name, []).append(part)
    assert parts == {"aten::cosh": ["attention"] * 8, "aten::sinh": ["mlp"] * 8, "aten::erfc": ["router"] * 4,
                     "aten::digamma": ["head"]}


def host(name, begin, end, number=-1, thread=1, forward=0, scope=0, id=0):
    span = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(name=name, time_range=span, sequence_nr=number, thread=thread, fwd_thread=forward,
                           scope=scope, id=id, device_type=torch.autograd.DeviceType.CPU, self_cpu_time_total=1.0)


def kernel(id, microseconds, annotation=False):
    span = SimpleNamespace(start=100, end=100 + microseconds, elapsed_us=lambda: microseconds)
    return SimpleNamespace(name="kernel", time_range=span, id=id, device_type=torch.autograd.DeviceType.CUDA,
                           is_user_annotation=annotation)


def test_kernels_belong_to_what_launched_them():
    """A number counts in the thread of the forward only; a call and an operation may have the same id."""
    events = [
        host(parts_module.RANGE + "mlp", 0, 9, id=7), host("aten::mm", 1, 8, number=5, id=1),
        host("cudaLaunchKernel", 2, 3, thread=900, id=4),
        host(parts_module.RANGE + "attention", 10, 19, id=8), host("aten::mul", 11, 18, number=5, thread=2, id=4),
        host("cuLaunchKernelEx", 12, 13, thread=900, id=1),
        host(parts_module.BACKWARD + "MmBackward0", 20, 30, number=6),
        host("MmBackward0", 21, 26, 5, forward=1, scope=1),
        host("aten::mm", 22, 25), host("cudaLaunchKernel", 23, 24, id=9),
        host("aten::add", 27, 29), host("cudaLaunchKernel", 28, 28.5, id=10),
        kernel(4, 3.0), kernel(1, 2.0), kernel(9, 6.0), kernel(10, 0.5), kernel(7, 50.0, annotation=True),
    ]
    assert parts_module.operations(events, cuda=True) == [
        ("mlp", "kernel", 3.0), ("attention", "kernel", 2.0), ("mlp", "kernel", 6.0), ("mlp", "kernel", 0.5)]


def test_decoding_is_held_against_reading_the_weights(capsys):
    assert main(["bench", "decode", "--preset", "emu3-tiny", "--rounds", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["what"], r["batch"], r["capacity"]) for r in rows] == [
        (w, b, c) for w in ("answer", "picture") for b in (1, 8) for c in (1.0, "paper")
    ]
    for row in rows:
        assert row["of_floor"] == pytest.approx(row["per_second"] / row["floor_per_second"], rel=1e-2)
        assert row["realised"] is None
        assert row["per_second"] * row["ms"] / 1000 == pytest.approx(
            (8 if row["what"] == "answer" else 6) * row["batch"], rel=1e-2
        )


def test_attention_by_every_backend_and_a_table_to_read(capsys, tmp_path):
    assert (
        main(["bench", "attention", "--preset", "showo-tiny", "--rounds", "5", "--out", str(tmp_path / "r.json")]) == 0
    )
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["backend"] for row in found["rows"]] == ["sdpa"] and table(found) in out and "| showo-tiny" in out
    assert "1.00 [1.00, 1.00]" in out


@pytest.mark.parametrize(("words", "message"), [
    (["layers"], "is not known. Allowed: layer, step, decode, attention, capture"),
    (["layer", "--preset", "showo-1024"], "Allowed: cpu, showo-tiny, emu3-tiny, showo-256"),
    (["looking", "--preset", "showo-256"], "looking is now called capture"),
    (["capture", "--preset", "showo-256"], "Allowed: showo-tiny, emu3-tiny, showo-512, emu3-8k, released"),
    (["layer", "--rounds", "4"], f"less than {MIN_ROUNDS} rounds"),
    (["layer", "--deadline", "-1"], "must be seconds"),
    (["layer", "--preset", "showo-256"], "needs CUDA"),
    (["step", "--preset", "gpu"], "The GPU set needs CUDA"),
    (["gpu"], "Presets for a CPU: cpu, showo-tiny, emu3-tiny"),
])
def test_refusals(monkeypatch, capsys, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""


@pytest.mark.parametrize("name", CUDA)
def test_rows_of_released_sizes_have_exactly_so_many_tokens(name):
    layout = preset(name)[0].layout
    for size in SIZES[name]:
        assert [len(row_of(layout, size.tokens, mmu).ids) for mmu in (False, True)] == [size.tokens] * 2
        assert len({len(row.ids) for row in ragged(layout, size.tokens, 4)}) == 4
        assert len(ragged(layout, size.tokens, 1)[0].ids) == size.tokens
        assert set(size.plans(16 if name.startswith("emu3") else 24)) == {"0.5", "0.8", "0.2", "paper"}


def test_the_gpu_set_begins_with_the_fastest_backends(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        "unimod.bench.jobs.available",
        lambda family, device: {"kernels": ("triton", "reference"), "attention": ("flash", "sdpa")}[family],
    )
    jobs = jobs_of(("layer", "step"), [*SIZES["showo-256"], *SIZES["emu3-8k"]], 9)
    assert [(job.kind, job.attention, job.kernels) for job in jobs[:6]] == [
        (k, "measured", ("triton", "reference")) for k in ("layer",) * 3 + ("step",) * 3
    ]
    assert [(job.kind, job.attention, job.kernels) for job in jobs[6:]] == [
        ("layer", name, ("triton",)) for name in ("flash", "sdpa") * 3
    ]
    model, rows = jobs[0].size.outline()
    monkeypatch.setattr("unimod.bench.jobs.implementation", lambda *_: "sdpa")
    assert jobs[0].on(model, pack(rows).mask).backend == "triton,sdpa" and jobs[6].on(model, None) is jobs[6]
    assert [list(job.size.plans(16)) for job in (jobs[0], jobs[-1])] == [
        ["0.5", "0.8", "0.2", "paper"],
        ["0.5", "paper"],
    ]
    assert [job.size.preset for job in jobs_of(("decode",), [SIZES[name][0] for name in CUDA], 9)] == [
        "showo-256",
        "emu3-4k",
    ]
    assert main(COMMAND.split()[3:]) == 2, "the command that notebook 06 names is one that exists"


def test_a_plan_is_priced_by_the_table():
    model, rows = preset("showo-tiny")
    packed = pack(rows)
    assert [TABLE.routed(share) for share in (0.0, 0.25, 0.5, 0.9, 1.5)] == pytest.approx([2, 4.5, 7, 11, 12])
    assert CostTable("noisy", 10, 10.0, (0.1, 0.5, 0.9), (4.0, 3.0, 6.0)).routed(0.5) == 4, (
        "more tokens never take less"
    )
    plan = last_half(8, 0.25)
    kept = count(apply_mod(shared_copy(model), plan), packed).token_layers / len(packed) / 8
    assert predicted_seconds(model, plan, packed, TABLE) == pytest.approx(4 * 10 + 4 * (2 + 10 * (2 * kept - 1)))
    assert predicted_seconds(model, last_half(8, 0.005), packed, TABLE) > 80, "a small saving is none"
    solved = solve(partial(last_half, 8), lambda p: predicted_seconds(model, p, packed, TABLE) / 80, 0.8)
    assert predicted_seconds(model, solved, packed, TABLE) == pytest.approx(64, rel=0.01)


def test_tables_are_kept_and_used_again(monkeypatch, tmp_path, capsys):
    asked = []

    def measured(model, rows, config, device):
        asked.append(config)
        return TABLE

    monkeypatch.setattr(costs_module, "measured", measured)
    model, rows = preset("emu3-tiny")
    for _ in range(2):
        assert costs(model, rows, ROUTERS["unimod"]) == TABLE
    assert len(asked) == 1
    costs(model, rows, ROUTERS["mod"])
    costs(preset("showo-tiny")[0], rows, ROUTERS["unimod"])
    assert len(asked) == 3 and len(list((tmp_path / "unimod" / "costs").glob("*.json"))) == 3
    words = ["plan", "last_half", "--model", "emu3-tiny", "--count", "time", "--saving", "0.2"]
    assert main([*words, "--json"]) == 0 and json.loads(capsys.readouterr().out)["time"] == pytest.approx(0.2, abs=0.01)
    assert main(words) == 0
    assert (
        "% saved   of the stack's predicted time, forward and backward of 1000 tokens on a machine"
        in capsys.readouterr().out
    )
    assert len(asked) == 3
    if not torch.cuda.is_available():
        assert main(["plan", "last_half", "--model", "showo-256", "--count", "time"]) == 2
        assert "is not timed on a CPU" in capsys.readouterr().err
    with pytest.raises(ParameterError, match="delete its file"):
        CostTable("x", 1, 1.0, (0.5, 0.2), (1.0, 1.0))


def test_a_table_that_cannot_be_kept_is_measured_for_each_process(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(costs_module, "measured", lambda *_: TABLE)
    assert costs(*preset("emu3-tiny"), ROUTERS["unimod"]) == TABLE


def test_a_record_that_cannot_be_written_is_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record_module, "run_jobs", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(record_module, "counts", lambda: pytest.fail("counted"))
    (tmp_path / "file").touch()
    for words in (["layer"], ["counts"]):
        assert main(["bench", *words, "--out", str(tmp_path / "file" / "bench.json")]) == 3
        assert "The folder of --out, " in (said := capsys.readouterr().err) and "--runs" not in said


@pytest.mark.parametrize("family, name", [("attention", "sdpa"), ("kernels", "reference")])
def test_a_backend_that_is_forced_is_measured_alone(family, name, monkeypatch):
    monkeypatch.delenv("UNIMOD_BACKEND", raising=False)
    assert name in available(family, "cuda") and len(available(family, "cuda")) > 1
    monkeypatch.setenv("UNIMOD_BACKEND", name)
    assert available(family, "cuda") == (name,)


def test_a_measured_table_rises_with_what_is_kept():
    model, rows = preset("showo-tiny")
    found = costs_module.measured(model, rows[:1], None, "cpu", rounds=1)
    assert found.tokens >= 1024 and found.kept == pytest.approx(costs_module.SHARES, abs=0.01) and found.dense > 0
    assert len(found.seconds) == 6


def test_an_estimate_is_called_one_until_there_is_a_record(tmp_path):
    assert {row["source"] for row in on_gpu(tmp_path)} == {PAPER}
    row = {
        "bench": "layer",
        "preset": "showo-256",
        "tokens": 3870,
        "capacity": 0.5,
        "backend": "triton,flash",
        "realised": 0.5,
    }
    for name, device in (("bench-cpu.json", "CPU (x), 1 of 2 cores"), ("bench-gpu.json", "NVIDIA Z")):
        (tmp_path / name).write_text(
            json.dumps(
                {"device": device, "commit": "abc", "rows": [row, row | {"realised": None}, row | {"bench": "step"}]}
            )
        )
    assert on_gpu(tmp_path) == [
        {
            "model": "showo-256, 3870 tokens",
            "kept": "0.5",
            "way": "triton,flash",
            "realised": 0.5,
            "source": "bench-gpu.json: NVIDIA Z, commit abc",
        }
    ]


def test_an_earlier_record_is_called_one_and_stands_beside_a_later(tmp_path):
    row = {"bench": "layer", "preset": "showo-256", "tokens": 3870, "capacity": 0.5, "backend": "triton,varlen"}
    records = (("bench-h200-before-8e10363-layer", "unknown", -1.7), ("bench-gpu", "f" * 40, 0.9))
    for name, commit, realised_share in records:
        found = {"device": "NVIDIA H200", "commit": commit, "rows": [row | {"realised": realised_share}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert [(row["way"], row["realised"], row["source"]) for row in on_gpu(tmp_path)] == [
        ("triton,varlen", 0.9, "bench-gpu.json: NVIDIA H200, commit ffffffffff"),
        ("triton,varlen, before", -1.7, "measured before, NVIDIA H200, commit 8e10363"),
    ]


def test_every_attention_backend_gets_the_masks_that_it_asks_for(monkeypatch):

    module, seen = sys.modules["unimod.bench.cases"], []
    real = module.interval_attention
    monkeypatch.setattr(module, "interval_attention", lambda *given: seen.append((given[3], given[5])) or real(*given))
    rows = bench("attention", "emu3-tiny", rounds=5)["rows"]
    assert [row["backend"] for row in rows] == ["sdpa"]
    assert all(set(mask.kinds) == {"causal"} and memo is seen[0][1] for mask, memo in seen)


def test_what_breaks_leaves_a_row_and_costs_no_other(monkeypatch):
    from unimod.bench import record

    def breaks(job):
        raise RuntimeError("no kernel image\nmore")
    monkeypatch.setitem(record.MEASURES, "attention", breaks)
    rows = bench("attention", "showo-tiny", rounds=5)["rows"]
    assert rows and all(row["note"] == "failed: RuntimeError: no kernel image" for row in rows)


def test_a_folder_is_no_file(tmp_path, capsys):
    assert main(["bench", "attention", "--preset", "showo-tiny", "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
