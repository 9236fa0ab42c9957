"""The command line: `python -m unimod {list,check,run,report,inspect,plan,bench,train-tiny,doctor}`; each has a --help.

    python -m unimod run all -f params/default.yaml

torch takes over a second to import and most commands do without: an action imports what it alone needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from .config import MODELS, ParameterError, SetupError, expanded
from .plan import MAKERS, CapacityPlan, maker_of, solve
from .workbook import report, runner
from .workbook.request import Request, notebooks


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`runner`'s); an error is one paragraph on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")            # a terminal that cannot show a bar's character ends nothing
    args = TOP.parse_args(argv)
    try:
        args.action(args)
    except BaseException as error:
        code = runner.exit_code(error)
        if code == 1:                                       # unforeseen: with its traceback
            raise
        print(f"unimod: {runner.in_words(error)}", file=sys.stderr, flush=True)
        return code
    return 0


def command(name: str, *options: tuple) -> Callable:
    """Make a function of the parsed arguments a command; its docstring is the command's help."""
    def register(action: Callable) -> Callable:
        what = action.__doc__
        made = COMMANDS.add_parser(name, help=f"{what[0].lower()}{what[1:-1]}", description=what)
        made.set_defaults(action=action)
        for words, settings in options:
            made.add_argument(*words, **settings)
        return action
    return register


def option(*words: str, **settings: object) -> tuple[tuple[str, ...], dict[str, object]]:
    """What `add_argument` is called with."""
    return words, settings


TOP = argparse.ArgumentParser(prog="python -m unimod", description="The UniMoD workbook, without a browser.")
COMMANDS = TOP.add_subparsers(dest="command", required=True, metavar="command")
JSON = option("--json", action="store_true", help="as one JSON object")
REQUEST = (
    option("notebook", help="number (03), name, path, or all"),
    option("-f", "--file", action="append", default=[], metavar="YAML", help="parameters; a later file wins"),
    option("-p", "--param", action="append", default=[], metavar="NAME=VALUE",
           help="one parameter; wins over every file"),
    option("--runs", default="runs", metavar="DIR", help="folder of all runs (default: runs)"),
    option("--force", action="store_true", help="run again what is done already, from scratch"))
SAVINGS = {
    "paper": "kept tokens, as the paper counts",
    "full": "a training step: attention's quadratic term, routers, head, text that is always kept, the image tokenizer",
    "measured": "torch's counter, forward and backward, on the same step",
    "model": "as full, without the image tokenizer",
}


@command("list")
def list_notebooks(args: argparse.Namespace) -> None:
    """The notebooks, what each asks and how long it takes."""
    for book in notebooks():
        print(f"{book.name:24s} {book.minutes:4g} min  {book.title}")


@command("check", *REQUEST)
def check(args: argparse.Namespace) -> None:
    """Resolve and print the parameters, and run nothing."""
    for step in Request(args.notebook, args.file, args.param, args.runs).steps(args.force):
        state = "waits for an earlier notebook"
        if step.folder is not None:
            state = f"{'done before' if step.done and not args.force else 'to run'}, {step.folder}"
        print(f"{step.book.name}: {state}")
        for name, value in step.asked.items():
            print(f"    {name} = {value!r}")


@command("run", *REQUEST, option("--timeout", type=float, metavar="SECONDS",
                                 help="at most so long per notebook (default: no limit)"))
def run(args: argparse.Namespace) -> None:
    """Run notebooks headlessly and write the report."""
    request = Request(args.notebook, args.file, args.param, args.runs)
    print(f"report: {runner.run(request, args.force, args.timeout)}")


@command("report", option("runs", type=expanded, help="folder of all runs, or of one run"))
def write_report(args: argparse.Namespace) -> None:
    """Write the report of runs that are done."""
    print(f"report: {report.write_report(args.runs)}")


@command("inspect", option("folder", type=expanded, help="folder with config.json and the weights"), JSON)
def inspect(args: argparse.Namespace) -> None:
    """What a model folder holds: kind, sizes, memory, keys that do not fit, routers; loads nothing."""
    from .models.checkpoint import inspect as examine

    found = examine(args.folder)
    print(json.dumps(asdict(found), indent=1) if args.json else found)
    if not found.loads:
        raise ParameterError(f"{args.folder} cannot be loaded: its weights do not fit its config.json (see the keys "
                             "above).")


@command(
    "plan",
    option("plan", help=f"a maker ({', '.join(MAKERS)}) or a YAML file, such as notebook 03's plan.yaml and "
                        "plan-highest.yaml"),
    option("--model", required=True, type=expanded,
           help="a preset (showo-256, showo-512, emu3-4k, emu3-8k, showo-tiny, emu3-tiny) or a folder"),
    option("--saving", type=float, default=0.3, help="share that a maker should save (default 0.3)"),
    option("--count", choices=("paper", "full", "time"), default="paper",
           help="what the share is of: token-layer computations as the paper counts, a training step's FLOPs, or the "
                "stack's time on this machine, predicted from measured layers (default paper)"),
    option("--router", default="unimod",
           help="routers to count with, a name in unimod.baselines.PRESETS (default unimod)"), JSON)
def show_plan(args: argparse.Namespace) -> None:
    """A capacity plan and what it saves on a model, counted three ways."""
    from .baselines import PRESETS
    from .batch import pack
    from .bench.costs import costs, predicted_seconds
    from .flops import count, planned, savings
    from .presets import picture_tokenizer, preset

    make = maker_of(args.plan)              # what depends on no model is refused before one is built
    countable = [name for name, config in PRESETS.items() if config.topk_scope == "segment"]
    if args.router not in countable:
        raise ParameterError(f"--router {args.router} is not known, or needs many rows where one of each task is "
                             f"counted. Allowed: {', '.join(countable)}.")
    if not 0 <= args.saving < 1:
        raise ParameterError(f"--saving {args.saving:g} must be a share: 0 saves nothing, 0.3 saves 30 %.")
    (model, rows), image_tokenizer, router = preset(args.model), picture_tokenizer(args.model), PRESETS[args.router]

    def flops(plan: CapacityPlan) -> float:
        with planned(model, plan, router):
            found = count(model, pack(rows), image_tokenizer)
        return found.step / found.dense_step

    def seconds(plan: CapacityPlan) -> float:
        return predicted_seconds(model, plan, pack(rows), table, router) / (len(model.layers) * table.dense)

    maker = partial(make, len(model.layers))
    try:
        table = costs(model, rows, router) if args.count == "time" else None
        cost = seconds if table else flops
        plan = maker(args.saving) if args.count == "paper" else solve(maker, cost, 1 - args.saving)
    except ParameterError as error:
        asked = f"{args.plan} on {args.model}, {args.saving:.1%} counted as {args.count}"
        raise ParameterError(f"{asked}: {error}") from None
    saved = asdict(savings(model, plan, rows, router, image_tokenizer))
    tokens, kinds = {row.task.name.lower(): len(row.ids) for row in rows}, [plan.kind(i) for i in range(plan.layers)]
    time = 1 - seconds(plan) if table else None
    if args.json:
        print(json.dumps({"model": args.model, "plan": args.plan, "router": args.router, "layers": plan.layers,
                          "tokens": tokens, "capacity": plan.capacity, "kinds": kinds, "savings": saved, "time": time}))
        return
    print(plan, f"kinds  {' '.join(kinds)}", plan.draw(), sep="\n")
    sizes = " and one of ".join(f"{n} {task} tokens" for task, n in tokens.items())
    print(f"on {args.model}, routers {args.router}, one row of {sizes}:")
    for name, what in SAVINGS.items():
        print(f"  {name:9s} {saved[name]:6.1%} saved   {what}")
    if table:
        print(f"  time      {time:6.1%} saved   of the stack's predicted time, forward and backward of {table.tokens} "
              f"tokens on {table.device}")


@command(
    "bench",
    option("what", help="layer (the stack, forward and backward), step (a training step), decode, attention, capture "
                        "(of one long row's attention), counts (operations that routing adds at released sizes, on "
                        "any machine), or gpu (all, on released sizes)"),
    option("--preset", default="",
           help="cpu (default), showo-tiny, emu3-tiny; with CUDA showo-256, showo-512, emu3-4k, emu3-8k, or gpu for "
                "these four; for capture showo-tiny, emu3-tiny, showo-512, emu3-8k, or released for the last two "
                "(default)"),
    option("--rounds", type=int, default=9, help="rounds that count (default 9, at least 5)"),
    option("--deadline", type=float, default=0.0, metavar="SECONDS",
           help="end by then; every job gets a share, what is left out says why (default: none; 450 for gpu)"), JSON,
    option("--out", metavar="FILE", type=expanded,
           help="also write the JSON object there, after every job, such as notebooks/records/bench-h200.json"))
def run_bench(args: argparse.Namespace) -> None:
    """What routing saves in time and memory on this machine, measured in turn with the dense model."""
    from .bench.record import bench, table

    if args.out and Path(args.out).is_dir():
        raise ParameterError(f"--out {args.out} is a folder; name a file in it, such as "
                             f"{Path(args.out) / 'bench.json'}.")
    found = bench(args.what, args.preset, args.rounds, args.deadline, args.out or "")
    text = json.dumps(found, indent=1) + "\n"
    print(text if args.json else f"{found['device']}, {found['command']}\n\n{table(found)}", end="")


@command("train-tiny", option("name", choices=MODELS),
         option("--out", required=True, metavar="DIR", type=expanded,
                help="folder for the checkpoint; an interrupted training there goes on"))
def train_tiny(args: argparse.Namespace) -> None:
    """Train a tiny checkpoint from scratch, the way the shipped ones were made."""
    from .experiment import train_tiny as make

    quality = make(args.name, args.out)["quality"]
    questions, pictures = quality["questions"]["all"], quality["pictures"]["all"]
    print(f"{args.out}: questions right {questions:.3f}, pictures right {pictures:.3f}")


@command("doctor", option("--runs", default="runs", metavar="DIR",
                          help="folder of all runs, which has to be writable (default: runs)"), JSON)
def show_diagnosis(args: argparse.Namespace) -> None:
    """Versions against the tested ones, device, backends and why, what is missing and what that costs."""
    from .workbook import doctor

    found = doctor.diagnose(args.runs)
    print(json.dumps(found, indent=1) if args.json else doctor.in_words(found))
    if found["wrong"]:
        raise SetupError("not ready: " + " ".join(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
