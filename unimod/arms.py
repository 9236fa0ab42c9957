"""Arms of a comparison: dense, MoD and UniMoD fine-tuned from one checkpoint with the same training FLOPs.

    for arm in arms_of(params, session):
        run_arm(params, session, arm, seed=0, folder=run.path(f"arms/{arm.name}"))
    rows = read_arms([folder])                       # one dictionary per finished arm, for tables and figures

MoD has one router and every other layer; UniMoD a router per task and the layers of `params.plan`. unimod-last-half is the control of a
measured plan: the same routers in the second half of the layers, as in the paper's own runs. Any router may be put on any plan:
shared.last_half, separate.interleaved, p-mod.cosine_decay (`config.ROUTERS` and `config.LAYERS`); lowest_arank and highest_arank route the
half of the layers where this very model's ARank is lowest or, as the control, highest. MoD and these arms save whatever makes their
step cost what unimod's costs. Every arm spends the FLOPs of `params.steps` dense steps: a cheaper step buys more of them.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .analysis.collapse import collapsed
from .analysis.redundancy import shares
from .analysis.routing import figures, routings
from .baselines import PRESETS
from .batch import Task
from .capacity import LearnedCapacity
from .config import ARMS, TASKS, ParameterError, Params, RouterConfig
from .data.batches import Batches
from .evaluate.quality import evaluate
from .files import write
from .flops import Cost, count
from .layers import apply_mod, learn_capacity, suits
from .models.checkpoint import save_pretrained
from .models.unified import UnifiedModel
from .plan import FIXED, MAKERS, CapacityPlan, dense, from_arank, last_half, make_plan, solve
from .session import Session, device_of, rows_of
from .train import TrainConfig, train

NEAR = 0.02
"""How far the share of FLOPs that an arm saves may lie from unimod's."""
ANY = CapacityPlan({task: [0.5, 0.4, 0.6] for task in TASKS})
"""A plan as capacities that are learned may turn out: layer 0 routed, rising and falling."""


@dataclass(frozen=True)
class Arm:
    """One way to train: a plan, a router, and what a step of it costs on a typical batch."""

    name: str
    plan: CapacityPlan
    router: RouterConfig
    cost: Cost
    steps: int

    @property
    def membership(self) -> float:
        """Weight of the auxiliary loss that belongs to the method: 0.01 in gamma-MoD."""
        return 0.01 if self.router == PRESETS["gamma-mod"] else 0.0

    def model(self, base: UnifiedModel, seed: int) -> UnifiedModel:
        """A copy of the base model with this arm's routers, initialised from `seed`."""
        torch.manual_seed(seed)
        return apply_mod(copy.deepcopy(base), self.plan, self.router)


def arms_of(params: Params, session: Session) -> list[Arm]:
    """The arms that `params.arms` names, with costs counted on the session's first training batch.

    A plan whose saving is free is solved so that its step costs what unimod's does; in any case all arms spend the FLOPs of the dense
    one. Raises `ParameterError` for an arm that no saving makes as cheap.
    """
    packed = session.batches.train(0)
    layers = len(session.model.layers)

    def cost(plan: CapacityPlan, router: RouterConfig) -> Cost:
        return count(apply_mod(copy.deepcopy(session.model), plan, router).train(), packed)

    @functools.cache
    def arank() -> dict[str, list[float]]:
        return shares(session.model, session.batches, params.samples, params.tolerance)

    @functools.cache
    def learned() -> LearnedCapacity:
        return search(params, session)

    separate, shared = RouterConfig(), RouterConfig(shared=True)
    unimod = make_plan(params.plan, layers, params.saving)
    plans = {"dense": (dense(layers), separate), "unimod": (unimod, separate), "unimod-last-half": (last_half(layers, params.saving), separate)}
    foresees = session.model.layout.causal_images            # a token drawn alone has received no attention yet: a predictor says
    routers = {"separate": separate, "shared": shared, **PRESETS, "a-mod": replace(PRESETS["a-mod"], predictor=foresees)}
    makers = {name: partial(make, layers) for name, make in MAKERS.items()}
    makers |= {f"{name}_arank": lambda saving, highest=name == "highest": from_arank(arank(), saving, highest) for name in ("lowest", "highest")}
    makers["learned"] = lambda saving: learned().plan(saving or 1e-6)
    target = cost(unimod, separate)

    def at_unimods_price(name: str, maker: str, router: RouterConfig) -> CapacityPlan:
        try:
            suits(ANY if maker == "learned" else makers[maker](0.05), router)
        except ParameterError as error:
            raise ParameterError(f"arms: {name} does not go together. {error}") from None
        if maker in FIXED:
            return makers[maker](params.saving)
        try:
            plan = solve(makers[maker], lambda plan: 1 - cost(plan, router).saved, 1 - target.saved)
        except ParameterError as error:
            raise ParameterError(f"arms: {name} cannot be as cheap as unimod, whose layers take {1 - target.saved:.3f} of the dense "
                                 f"ones' FLOPs with saving={params.saving:g}. {error} Lower saving, or leave the arm out.") from None
        if abs(cost(plan, router).saved - target.saved) > NEAR:
            raise ParameterError(f"arms: {name} saves {cost(plan, router).saved:.3f} of the layers' FLOPs at the nearest, unimod {target.saved:.3f}. "
                                 "Where whole rows are dropped a larger batch has finer steps; or change saving, or leave the arm out.")
        return plan

    for name in params.arms:
        router, at, maker = ("shared", ".", "interleaved") if name == "mod" else name.partition(".")
        if at:
            plans[name] = at_unimods_price(name, maker, routers[router]), routers[router]
    budget = cost(*plans["dense"]).step * params.steps
    prices = {name: cost(*plans[name]) for name in params.arms}
    return [Arm(name, *plans[name], price, round(budget / price.step)) for name, price in prices.items()]


def search(params: Params, session: Session) -> LearnedCapacity:
    """Capacities of all layers and tasks, learned on a copy of the session's model in a training of `params.steps` at `params.saving`.

    A token-layer of each task counts as often as the training batch has tokens of it that compete. The arm's own FLOPs do not include this.
    """
    tokens = {task.name.lower(): sum(s.length for s in session.batches.train(0).segments if s.task == task and s.rule != "keep") for task in Task}
    layers = len(session.model.layers)
    torch.manual_seed(params.seed)
    model = apply_mod(copy.deepcopy(session.model), CapacityPlan({task: [1 - params.saving] * layers for task in tokens}), RouterConfig())
    found = learn_capacity(model.to(device_of(params)), params.saving, tokens)
    train(model, session.batches, TrainConfig(steps=params.steps, lr=params.lr, router_lr=params.router_lr, device=device_of(params)))
    return found


def run_arm(params: Params, session: Session, arm: Arm, seed: int, folder: str | Path, log: Callable[[dict], None] = lambda record: None) -> dict:
    """Train one arm from the session's model, evaluate it before, half-way and after, and write arm.json last.

    An evaluation is the quality (`evaluate.quality`) and what the routers do with a fixed held-out batch (`analysis.routing.figures`); `collapsed`
    names the routers that have collapsed in the end.
    A finished folder is read instead of trained again when `params.resume` holds. Returns what arm.json holds.
    """
    folder = Path(folder)
    if params.resume and (folder / "arm.json").exists():
        return json.loads((folder / "arm.json").read_text(encoding="utf-8"))
    model = arm.model(session.model, seed).to(device_of(params))
    batches = Batches(session.data, session.image_tokenizer, model.layout, rows_of(params), seed=1000 + seed)

    held_out = batches.held_out("test", min(16, params.eval_samples))
    start = routings(model, held_out)

    def judge(m: UnifiedModel) -> dict[str, float]:
        quality = evaluate(m, session.image_tokenizer, session.data, "test", params.eval_samples, seed=seed)
        return quality.flat() | figures(routings(m, held_out), held_out, start)

    evaluations = [{"step": 0, "flops": 0.0, **judge(model)}]
    config = TrainConfig(steps=arm.steps, seed=seed, lr=params.lr, router_lr=params.router_lr, membership=arm.membership,
                         evaluate_every=max(1, (arm.steps + 1) // 2), save_every=50, device=device_of(params))
    records = train(model, batches, config, folder=folder, resume=params.resume, evaluate=judge, log=log)
    spent = 0.0
    for record in records:
        spent += record["flops"]
        if "losses/t2i" in record:
            evaluations.append({"step": record["step"], "flops": spent, **{k: v for k, v in record.items() if "/" in k}})
    save_pretrained(folder / "model", model, session.image_tokenizer)
    result = {
        "model": session.name, "arm": arm.name, "seed": seed, "data": params.data, "steps": arm.steps, "batch": params.batch,
        "eval_samples": params.eval_samples, "capacity": arm.plan.capacity, "saved": arm.cost.saved, "saved_paper": arm.cost.saved_paper,
        "flops_per_step": arm.cost.step, "dense_flops_per_step": arm.cost.dense_step, "train_flops": spent,
        "tokens_per_step": statistics.mean(r["tokens"] for r in records), "config": asdict(config), "evaluations": evaluations,
        "collapsed": [asdict(finding) for finding in collapsed(routings(model, held_out), held_out, arm.router.gate)],
    }
    text = json.dumps(result)
    write(folder / "arm.json", text)
    return json.loads(text)


def read_arms(folders: list[str | Path]) -> list[dict]:
    """Every finished arm below the folders, sorted by model, arm and seed. Raises `ParameterError` when there is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for folder in folders for path in sorted(Path(folder).rglob("arm.json"))]
    if not found:
        raise ParameterError(f"No finished arm in {', '.join(map(str, folders)) or 'no folder'}: run notebook 07 first, or give its run folder in compare=.")
    return sorted(found, key=lambda a: (a["model"], ARMS.index(a["arm"]) if a["arm"] in ARMS else len(ARMS), a["arm"], a["seed"]))
