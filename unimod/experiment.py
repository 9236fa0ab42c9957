"""A notebook's session, the arms that it trains with equal FLOPs, and the shipped tiny checkpoints.

    session = load(params, "showo-tiny")
    session.model, session.image_tokenizer, session.data, session.batches

    for arm in arms_of(params, session):
        run_arm(params, session, arm, seed=0, folder=run.path(f"arms/{arm.name}"))
    rows = read_arms([folder])                       # one dictionary per finished arm, for tables and figures

    python -m unimod train-tiny showo-tiny --out runs/showo-tiny        # 40 minutes on one core; emu3-tiny 90

All arms are fine-tuned from one checkpoint and spend the FLOPs of `params.steps` dense steps: a cheaper step buys more
of them. MoD has one router and every other layer; UniMoD a router per task and the layers of `params.plan`;
unimod-last-half, the control of a measured plan, has UniMoD's routers in the second half of the layers, as in the
paper's own runs. Any router may be put on any plan: shared.last_half, p-mod.cosine_decay (`config.ROUTERS` and
`config.LAYERS`); lowest_arank and highest_arank route the half of the layers where this very model's ARank is lowest
or, as the control, highest. MoD and these arms save whatever makes their step cost what unimod's costs.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .analysis.layers import collapsed
from .analysis.redundancy import shares
from .analysis.routing import figures, routings
from .baselines import PRESETS, suits
from .batch import Task
from .capacity import LearnedCapacity
from .config import ARMS, TASKS, ParameterError, RouterConfig
from .data import open_data
from .data.batches import Batches
from .data.sources import Dataset
from .evaluate import evaluate
from .files import runs_folder, write
from .flops import Cost, count
from .layers import apply_mod, learn_capacity
from .models.checkpoint import build_model, from_pretrained, save_pretrained, shipped
from .models.image_tokenizer import CONFIG_FILE, ImageTokenizer, build_image_tokenizer, load_image_tokenizer
from .models.unified import UnifiedModel
from .params import Params
from .plan import FIXED, MAKERS, CapacityPlan, dense, from_arank, last_half, make_plan, solve
from .train import TrainConfig, train

NEAR = 0.02  # how far the share of FLOPs that an arm saves may lie from unimod's
ANY = CapacityPlan({task: [0.5, 0.4, 0.6] for task in TASKS})  # as learned ones may be: layer 0 routed, up and down
FIT_STEPS = 1000  # optimiser steps of a learned image tokenizer; the dictionary needs none


@dataclass(frozen=True)
class Session:
    """A loaded model (in eval mode, on its device) with data in its own layout."""

    name: str
    model: UnifiedModel
    image_tokenizer: ImageTokenizer
    data: Dataset
    batches: Batches


def load(params: Params, name: str) -> Session:
    """Load `params.checkpoint`, or the shipped checkpoint of that name, with the data of `params`.

    The shipped image tokenizer fits the default scenes. For other data, levels or tokenizers one is fitted here, so the
    model's codes get a new meaning and it has to be trained before its figures say anything about that data.
    Raises `ParameterError` for a checkpoint of another model or a device that is not there.
    """
    data = open_data(params.data, level=params.level, folder=params.folder, strict=params.strict)
    if params.data == "folder":
        print(data.report())
    model, image_tokenizer = from_pretrained(params.checkpoint or shipped(name))
    if f"{model.layout.kind}-tiny" != name:
        raise ParameterError(f"checkpoint={params.checkpoint!r} holds a {model.layout.kind} model, not {name}. "
                             "Set models to match it.")
    if not fits(params):
        cache = runs_folder(params.runs) / "image_tokenizers"
        image_tokenizer = fit_image_tokenizer(data, params.image_tokenizer, cache=cache)
    batches = Batches(data, image_tokenizer, model.layout, rows_of(params), params.seed)
    return Session(name, model.to(device_of(params)), image_tokenizer, data, batches)


def rows_of(params: Params) -> tuple[int, int, int]:
    """Sequences of t2i, mmu and lm in a training step: `params.batch` of two, an eighth of it of the third."""
    return params.batch, params.batch, max(1, params.batch // 8)


def fits(params: Params) -> bool:
    """Whether the model was trained on this data: default scenes through the dictionary, or the user's checkpoint."""
    shipped_data = (params.data, params.level, params.image_tokenizer) == ("scenes", "default", "dictionary")
    return bool(params.checkpoint) or shipped_data


def device_of(params: Params) -> str:
    """cpu or cuda. Raises `ParameterError` when CUDA is asked for and missing."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ParameterError("device='cuda', but torch sees no CUDA device here. Use device=auto or device=cpu.")
    return "cuda" if params.device != "cpu" and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Arm:
    """One way to train: a plan, a router, and what a step of it costs on a typical batch."""

    name: str
    plan: CapacityPlan
    router: RouterConfig
    cost: Cost
    steps: int

    def model(self, base: UnifiedModel, seed: int) -> UnifiedModel:
        """A copy of the base model with this arm's routers, initialised from `seed`."""
        torch.manual_seed(seed)
        return apply_mod(copy.deepcopy(base), self.plan, self.router)


def arms_of(params: Params, session: Session) -> list[Arm]:
    """The arms that `params.arms` names, with costs counted on the session's first training batch.

    A plan whose saving is free is solved so that its step costs what unimod's does. Raises `ParameterError` for an arm
    that no saving makes as cheap, and for a router that cannot carry out its plan.
    """
    batch, layers = session.batches.train(0), len(session.model.layers)

    def cost(plan: CapacityPlan, router: RouterConfig) -> Cost:
        return count(apply_mod(copy.deepcopy(session.model), plan, router).train(), batch)

    arank = functools.cache(lambda: shares(session.model, session.batches, params.samples, params.tolerance))
    learned = functools.cache(lambda: search(params, session))
    separate, shared = RouterConfig(), RouterConfig(shared=True)
    unimod = make_plan(params.plan, layers, params.saving)
    plans = {"dense": (dense(layers), separate), "unimod": (unimod, separate),
             "unimod-last-half": (last_half(layers, params.saving), separate)}
    # a token generated alone has received no attention yet, so in a causal model a predictor has to decide for A-MoD
    a_mod = replace(PRESETS["a-mod"], predictor=session.model.layout.causal_images)
    routers = {"separate": separate, "shared": shared, **PRESETS, "a-mod": a_mod}
    makers = {name: partial(make, layers) for name, make in MAKERS.items()}
    makers["lowest_arank"] = lambda saving: from_arank(arank(), saving)
    makers["highest_arank"] = lambda saving: from_arank(arank(), saving, highest=True)
    makers["learned"] = lambda saving: learned().plan(saving or 1e-6)       # `solve` starts at 0, which has no solution
    target = cost(unimod, separate).saved

    def at_unimods_cost(name: str, maker: str, router: RouterConfig) -> CapacityPlan:
        try:
            suits(ANY if maker == "learned" else makers[maker](0.05), router)       # a saving that every maker can meet
        except ParameterError as error:
            raise ParameterError(f"arms: {name} does not go together. {error}") from None
        if maker in FIXED:
            return makers[maker](params.saving)
        try:
            plan = solve(makers[maker], lambda plan: 1 - cost(plan, router).saved, 1 - target)
        except ParameterError as error:
            raise ParameterError(f"arms: {name} cannot be as cheap as unimod, whose layers take {1 - target:.3f} of "
                                 f"the dense ones' FLOPs with saving={params.saving:g}. {error} Lower saving, or leave "
                                 "the arm out.") from None
        saved = cost(plan, router).saved
        if abs(saved - target) > NEAR:
            raise ParameterError(f"arms: {name} saves {saved:.3f} of the layers' FLOPs at the nearest, unimod "
                                 f"{target:.3f}. Where whole rows are dropped a larger batch has finer steps; or "
                                 "change saving, or leave the arm out.")
        return plan

    budget, arms = cost(*plans["dense"]).step * params.steps, []
    for name in params.arms:
        if name not in plans:
            router, maker = ("shared", "interleaved") if name == "mod" else name.split(".")
            plans[name] = at_unimods_cost(name, maker, routers[router]), routers[router]
        each = cost(*plans[name])
        arms.append(Arm(name, *plans[name], each, round(budget / each.step)))
    return arms


def search(params: Params, session: Session) -> LearnedCapacity:
    """Capacities of all layers and tasks, learned on a copy of the session's model in `params.steps` steps at
    `params.saving`; a task counts by its competing tokens in a training batch. An arm's FLOPs leave the search out."""
    segments = [s for s in session.batches.train(0).segments if s.rule != "keep"]
    tokens = {task.name.lower(): sum(s.length for s in segments if s.task == task) for task in Task}
    start = CapacityPlan({task: [1 - params.saving] * len(session.model.layers) for task in tokens})
    torch.manual_seed(params.seed)
    model = apply_mod(copy.deepcopy(session.model), start, RouterConfig()).to(device_of(params))
    found = learn_capacity(model, params.saving, tokens)
    train(model, session.batches, TrainConfig(steps=params.steps, lr=params.lr, router_lr=params.router_lr,
                                              device=device_of(params)))
    return found


def run_arm(params: Params, session: Session, arm: Arm, seed: int, folder: str | Path,
            log: Callable[[dict], None] = lambda record: None) -> dict:
    """Train one arm from the session's model, evaluate it before, half-way and after, and write arm.json last.

    An evaluation is the quality (`unimod.evaluate`) and the routing of a fixed held-out batch
    (`analysis.routing.figures`); `collapsed` names the routers that have collapsed in the end. A finished folder is
    read instead of trained again when `params.resume` holds. Returns what arm.json holds.
    """
    folder = Path(folder)
    if params.resume and (folder / "arm.json").exists():
        return json.loads((folder / "arm.json").read_text(encoding="utf-8"))
    model = arm.model(session.model, seed).to(device_of(params))
    # 1000: the shipped checkpoints were trained in the data orders of seeds 0 to 4
    batches = Batches(session.data, session.image_tokenizer, model.layout, rows_of(params), seed=1000 + seed)
    held_out = batches.held_out("test", min(16, params.eval_samples))
    start = routings(model, held_out)

    def judge(m: UnifiedModel) -> dict[str, float]:
        quality = evaluate(m, session.image_tokenizer, session.data, "test", params.eval_samples, seed=seed)
        return quality.flat() | figures(routings(m, held_out), held_out, start)

    evaluations = [{"step": 0, "flops": 0.0, **judge(model)}]
    half = max(1, (arm.steps + 1) // 2)
    config = TrainConfig(steps=arm.steps, seed=seed, lr=params.lr, router_lr=params.router_lr, evaluate_every=half,
                         save_every=50, device=device_of(params),
                         membership=0.01 if arm.router == PRESETS["gamma-mod"] else 0.0)        # as in gamma-MoD
    records = train(model, batches, config, folder=folder, resume=params.resume, evaluate=judge, log=log)
    spent = 0.0
    for record in records:
        spent += record["flops"]
        if "losses/t2i" in record:
            scores = {name: value for name, value in record.items() if "/" in name}
            evaluations.append({"step": record["step"], "flops": spent, **scores})
    save_pretrained(folder / "model", model, session.image_tokenizer)
    result = {
        "model": session.name, "arm": arm.name, "seed": seed, "data": params.data, "steps": arm.steps,
        "batch": params.batch, "eval_samples": params.eval_samples, "capacity": arm.plan.capacity,
        "saved": arm.cost.saved, "saved_paper": arm.cost.saved_paper, "flops_per_step": arm.cost.step,
        "dense_flops_per_step": arm.cost.dense_step, "train_flops": spent,
        "tokens_per_step": statistics.mean(r["tokens"] for r in records), "config": asdict(config),
        "evaluations": evaluations,
        "collapsed": [asdict(found) for found in collapsed(routings(model, held_out), held_out, arm.router.gate)],
    }
    text = json.dumps(result)
    write(folder / "arm.json", text)
    return json.loads(text)                                 # as a finished folder is read: lists for tuples


def read_arms(folders: list[str | Path]) -> list[dict]:
    """Every finished arm below the folders, by model, arm and seed. Raises `ParameterError` when there is none."""
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("arm.json"))]
    if not paths:
        raise ParameterError(f"No finished arm in {', '.join(map(str, folders)) or 'no folder'}: run notebook 07 "
                             "first, or give its run folder in compare=.")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    order = {name: place for place, name in enumerate(ARMS)}
    return sorted(found, key=lambda a: (a["model"], order.get(a["arm"], len(ARMS)), a["arm"], a["seed"]))


@dataclass(frozen=True)
class Stage:
    """A part of a tiny model's training with its own warm-up and cosine. rows: sequences of t2i, mmu, lm in a step."""

    steps: int
    rows: tuple[int, int, int]
    lr: float


FIRST, LATER = Stage(3000, (12, 16, 2), 1.5e-3), (4, 24, 2)
STAGES = {
    "showo-tiny": (FIRST, Stage(800, LATER, 1.0e-3)),
    # pictures are learned early; later stages are mostly questions, "where is ..." above all, Emu3 longer than Show-o
    "emu3-tiny": (FIRST, Stage(1500, LATER, 1.5e-3), Stage(700, LATER, 1.0e-3), Stage(1500, LATER, 1.5e-3),
                  Stage(1200, LATER, 1.5e-3)),
}
"""How the shipped checkpoints were trained."""


def vocabulary() -> tuple[str, ...]:
    """Words of the embedded data sets, so that one checkpoint can go on with either."""
    return tuple(sorted({*open_data("scenes").words(), *open_data("digits").words()}))


def fit_image_tokenizer(data: Dataset, name: str = "dictionary", count: int = 4000, seed: int = 0,
                        cache: str | Path | None = None) -> ImageTokenizer:
    """An image tokenizer of 256 codes fitted on the first `count` training pictures of a data set (all, if fewer).

    The dictionary takes seconds, the learned ones minutes; with `cache`, a folder, one that was fitted on the same
    pictures before is read from there.
    """
    count = min(count, data.size("train") or count)         # generated data sets have no size
    images = np.stack([data.sample("train", i, seed).image for i in range(count)])
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2)                 # uint8 [N, 3, H, W]
    digest = hashlib.blake2b(pictures.numpy().tobytes(), digest_size=6).hexdigest()
    folder = Path(cache) / f"{name}-{digest}-{seed}" if cache else None
    if folder and (folder / CONFIG_FILE).exists():
        return load_image_tokenizer(folder)
    tokenizer = build_image_tokenizer(name)
    tokenizer.fit(pictures, steps=FIT_STEPS, seed=seed, log=lambda text: print(f"fitting {name}: {text}", flush=True))
    if folder:
        tokenizer.save(folder)
    return tokenizer


def train_tiny(name: str, out: str | Path, seed: int = 0) -> dict:
    """Train a tiny dense model on the default scenes and save it in `out` with card.json: how it was made, its quality.

    An interrupted training goes on at its last checkpoint when it is called again with the same folder.
    """
    data, out = open_data("scenes"), Path(out)
    image_tokenizer = fit_image_tokenizer(data)
    model = build_model(name, vocabulary(), image_tokenizer.codebook_size, seed=seed)
    began = time.perf_counter()
    for number, stage in enumerate(STAGES[name]):
        folder = out / f"stage-{number}"
        if (folder / "config.json").exists():
            model, _ = from_pretrained(folder)
            continue

        def log(record: dict, stage: Stage = stage, number: int = number) -> None:
            if record["step"] % 20 == 0:
                shown = {key: round(value, 4) for key, value in record.items()
                         if key.startswith("loss_") or key.endswith("/all") or key == "seconds"}
                print(f"{name} stage {number} step {record['step']}/{stage.steps} {shown} "
                      f"{time.perf_counter() - began:.0f} s", flush=True)

        batches = Batches(data, image_tokenizer, model.layout, stage.rows, seed + number)
        train(model, batches, TrainConfig(steps=stage.steps, lr=stage.lr, evaluate_every=400), folder=folder, log=log,
              evaluate=lambda m: evaluate(m, image_tokenizer, data, "validation", 48).flat())
        save_pretrained(folder, model, image_tokenizer)
    save_pretrained(out, model, image_tokenizer)
    card = {"name": name, "stages": [asdict(s) for s in STAGES[name]], "seed": seed, "torch": torch.__version__,
            "quality": asdict(evaluate(model, image_tokenizer, data, "test", 400))}
    (out / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
    return card
