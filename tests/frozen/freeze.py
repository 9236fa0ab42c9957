"""What a refactoring must not change: outputs, trainings, keys, answers, images, FLOPs, a notebook's results, the
command line's JSON.

    python tests/frozen/freeze.py take OUT.pt           # all of it, from the package that is imported
    python tests/frozen/freeze.py same A.pt B.pt        # equal to the last bit, or what is not
    python tests/frozen/freeze.py against COMMIT    # take both here, that commit's by its own copy, and compare

Bits are compared on one machine only; `test_frozen.py` compares a digest of the numbers, with a tolerance, with
frozen.json.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("showo-tiny", "emu3-tiny")
STEPS = 20


def take(notebook: bool = True) -> dict[str, object]:
    """Name -> tensor or plain JSON value; one thread and one seed for each, so that their order does not matter."""
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    for name in MODELS:
        found |= {f"{name}, {what}": value for what, value in _model(name).items()}
    found |= _command_line()
    if notebook:
        found |= _notebook()
    return found


def _model(name: str) -> dict[str, object]:
    from unimod.baselines import PRESETS
    from unimod.batch import Task
    from unimod.data import open_data
    from unimod.data.batches import Batches
    from unimod.flops import count
    from unimod.generate import answer, calibrate, draw
    from unimod.layers import apply_mod
    from unimod.losses import losses
    from unimod.models.checkpoint import from_pretrained, shipped
    from unimod.plan import last_half
    from unimod.train import TrainConfig, train

    found: dict[str, object] = {}
    for router in (None, *PRESETS):
        what = router or "dense"
        model, tokenizer = from_pretrained(shipped(name))
        batches = Batches(open_data("scenes"), tokenizer, model.layout, (2, 2, 1))
        packed = batches.held_out("test", 2)
        torch.manual_seed(0)
        if router:
            apply_mod(model, last_half(len(model.layers)), PRESETS[router])
        found[f"{what}: keys"] = sorted(model.state_dict())
        torch.manual_seed(1)
        with torch.no_grad():
            hidden = model(packed)
        found[f"{what}: hidden"] = hidden
        model.train()
        torch.manual_seed(2)
        loss = losses(model, packed)
        loss.total.backward()
        found[f"{what}: losses"] = torch.cat([loss.total.detach()[None], loss.per_task])
        found[f"{what}: gradient"] = torch.stack([p.grad.double().norm() for p in model.parameters()
                                                  if p.grad is not None])
        model.zero_grad(set_to_none=True)
        model.eval()
        cost = count(model, packed)
        found[f"{what}: FLOPs"] = [cost.step, cost.dense_step]
        if router in (None, "unimod"):
            if router:
                calibrate(model, packed)
            rows = [row for i in range(2) for row in [_asked(batches, i)]]
            found[f"{what}: answers"] = answer(model, rows)
            found[f"{what}: drawings"] = draw(model, ["a red circle", "a blue square"], seed=3)
        if router in (None, "unimod", "gamma-mod"):
            torch.manual_seed(4)
            records = train(model, batches, TrainConfig(steps=STEPS, lr=1e-3))
            found[f"{what}: training"] = torch.tensor([[r["loss"], r["tokens"]] for r in records], dtype=torch.float64)
            found[f"{what}: trained"] = torch.stack([p.detach().double().norm() for p in model.parameters()])
    assert Task.MMU == 1
    return found


def _asked(batches: object, index: int) -> object:
    """An open-ended row about a test picture."""
    (sample,) = batches.samples("test", index, 1)
    return batches.layout.mmu(batches.codes([sample])[0], [(sample.questions[0].text, "")], open_ended=True)


def _command_line() -> dict[str, object]:
    from unimod.__main__ import main
    from unimod.models.checkpoint import shipped

    found = {}
    for name in MODELS:
        for args in (["plan", "last_half", "--model", name, "--json"], ["inspect", str(shipped(name)), "--json"]):
            out = io.StringIO()
            with redirect_stdout(out):
                assert main(args) == 0, args
            found[f"{args[0]} --json, {name}"] = _without_paths(json.loads(out.getvalue()))
    return found


def _without_paths(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _notebook() -> dict[str, object]:
    """The results of 03 but for times, executed at the smallest values."""
    with tempfile.TemporaryDirectory() as runs:
        subprocess.run([sys.executable, "-m", "unimod", "run", "03", "-f", "params/smoke.yaml", "--runs", runs],
                       check=True, cwd=ROOT, capture_output=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        (results,) = Path(runs).glob("03_*/*/results.json")
        return {f"03: {row['name']}": row["value"] for row in json.loads(results.read_text(encoding="utf-8"))
                if "time" not in row["name"]}


def digest(value: object) -> object:
    """A tensor as its shape, sum, norm and first values; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    x = value.double().flatten().nan_to_num(nan=-1.0)
    return {"shape": list(value.shape), "sum": x.sum().item(), "norm": x.norm().item(), "first": x[:6].tolist()}


def different(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """The names of what is not equal to the last bit."""
    def equal(x: object, y: object) -> bool:
        if isinstance(x, torch.Tensor):
            return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x.nan_to_num(nan=-1.0),
                                                                                      y.nan_to_num(nan=-1.0))
        return x == y
    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not equal(a[name], b[name]))


def against(commit: str) -> int:
    """Hold the working tree against a commit."""
    with tempfile.TemporaryDirectory() as work:
        other, files = Path(work) / "other", [Path(work) / "before.pt", Path(work) / "now.pt"]
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", other, commit], check=True, cwd=ROOT)
        try:
            for root, file in zip((other, ROOT), files):
                subprocess.run([sys.executable, root / "tests" / "frozen" / "freeze.py", "take", file], check=True,
                               cwd=root,
                               env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], check=True, cwd=ROOT)
        return same(*files)


def same(a: Path, b: Path) -> int:
    """Say what differs; returns the exit code."""
    before, after = torch.load(a), torch.load(b)
    names = different(before, after)
    print(f"{len(before)} things frozen, {len(names)} differ" + "".join(f"\n  {name}" for name in names))
    return bool(names)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["take", out]:
            torch.save(take(), out)
        case ["same", a, b]:
            sys.exit(same(Path(a), Path(b)))
        case ["against", commit]:
            sys.exit(against(commit))
        case ["digest", out]:
            text = json.dumps({name: digest(value) for name, value in take(notebook=False).items()}, indent=0)
            Path(out).write_text(text + "\n", encoding="utf-8")
        case _:
            sys.exit(__doc__)
