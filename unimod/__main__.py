"""The command line: `python -m unimod {list,check,run,report,inspect,plan,bench,train-tiny,doctor}`; each command explains itself with --help.

    python -m unimod run all -f params/default.yaml
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
from .files import write
from .plan import MAKERS, CapacityPlan, maker_of, solve
from .workbook import report, runner
from .workbook.request import Request, notebooks
from .workbook.run_folder import RUNNERS, RunError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; what went wrong is one paragraph on stderr."""
    for stream in (sys.stdout, sys.stderr):                 # a bar that a terminal of another encoding cannot show is replaced, and ends nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog="python -m unimod", description="The UniMoD workbook, without a browser.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    add(commands, "list", list_notebooks, "the notebooks, what each asks and how long it takes")
    for name, action, what in (("check", check, "resolve and print the parameters, and run nothing"),
                               ("run", run, "run notebooks headlessly and write the report")):
        command = add(commands, name, action, what)
        command.add_argument("notebook", help="number (03), name, path, or all")
        command.add_argument("-f", "--file", action="append", default=[], metavar="YAML", help="parameters; a later file wins")
        command.add_argument("-p", "--param", action="append", default=[], metavar="NAME=VALUE", help="one parameter; wins over every file")
        command.add_argument("--runs", default="runs", metavar="DIR", help="folder of all runs (default: runs)")
        command.add_argument("--force", action="store_true", help="run again what is done already, from scratch")
        if name == "run":
            command.add_argument("--timeout", type=float, metavar="SECONDS", help="at most so long per notebook (default: no limit)")
    command = add(commands, "report", write_report, "write the report of runs that are done")
    command.add_argument("runs", type=expanded, help="folder of all runs, or of one run")

    command = add(commands, "inspect", inspect, "what a model folder holds: kind, sizes, memory, keys that do not fit, routers; loads nothing")
    command.add_argument("folder", type=expanded, help="folder with config.json and the weights")
    command.add_argument("--json", action="store_true", help="as one JSON object")

    command = add(commands, "plan", show_plan, "a capacity plan and what it saves on a model, counted three ways")
    command.add_argument("plan", help=f"a maker ({', '.join(MAKERS)}) or a YAML file, such as notebook 03's plan.yaml and plan-highest.yaml")
    command.add_argument("--model", required=True, type=expanded, help="a preset (showo-256, showo-512, emu3-4k, emu3-8k, showo-tiny, emu3-tiny) or a folder")
    command.add_argument("--saving", type=float, default=0.3, help="share that a maker should save (default 0.3)")
    command.add_argument("--count", choices=("paper", "full", "time"), default="paper",
                         help="what the share is of: token-layer computations as the paper counts, a training step's FLOPs, or the stack's time on this "
                              "machine, predicted from measured layers (default paper)")
    command.add_argument("--router", default="unimod", help="routers to count with, a name in unimod.baselines.PRESETS (default unimod)")
    command.add_argument("--json", action="store_true", help="as one JSON object")

    command = add(commands, "bench", run_bench, "what routing saves in time and memory on this machine, measured in turn with the dense model")
    command.add_argument("what", help="layer (the stack, forward and backward), step (a training step), decode, attention, capture (of one long row's "
                         "attention), or gpu (all, on released sizes)")
    command.add_argument("--preset", default="", help="cpu (default), showo-tiny, emu3-tiny; with CUDA showo-256, showo-512, emu3-4k, emu3-8k, or gpu for "
                         "these four; for capture showo-tiny, emu3-tiny, showo-512, emu3-8k, or released for the last two (default)")
    command.add_argument("--rounds", type=int, default=9, help="rounds that count (default 9, at least 5)")
    command.add_argument("--deadline", type=float, default=0.0, metavar="SECONDS", help="drop what is not done by then (default: none; 450 for gpu)")
    command.add_argument("--json", action="store_true", help="as one JSON object")
    command.add_argument("--out", metavar="FILE", type=expanded, help="also write the JSON object there, such as notebooks/records/bench-h200.json")

    command = add(commands, "train-tiny", train_tiny, "train a tiny checkpoint from scratch, the way the shipped ones were made")
    command.add_argument("name", choices=MODELS)
    command.add_argument("--out", required=True, metavar="DIR", type=expanded, help="folder for the checkpoint; an interrupted training there goes on")

    command = add(commands, "doctor", show_diagnosis, "versions against the tested ones, device, backends and why, what is missing and what that costs")
    command.add_argument("--runs", default="runs", metavar="DIR", help="folder of all runs, which has to be writable (default: runs)")
    command.add_argument("--json", action="store_true", help="as one JSON object")

    args = parser.parse_args(argv)
    try:
        args.action(args)
    except (ParameterError, RunError) as error:
        return fail(2, error)
    except SetupError as error:
        return fail(error.code, error)
    except runner.Stop as stop:
        return fail(stop.code, stop)
    except report.ReportError as error:
        return fail(4, error)
    except OSError as error:
        return fail(3, f"{error.filename or 'A file'} cannot be read or written ({error.strerror or error}).")
    except KeyboardInterrupt:
        return fail(130, "Interrupted. The notebook under way counts as not done; the same command goes on from there.")
    return 0


def add(commands: argparse._SubParsersAction, name: str, action: Callable, what: str) -> argparse.ArgumentParser:
    """Add a command whose `action` takes the parsed arguments."""
    command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    command.set_defaults(action=action)
    return command


def fail(code: int, message: object) -> int:
    """Say why on stderr; gives `code` back."""
    print(f"unimod: {message}", file=sys.stderr, flush=True)
    return code


def list_notebooks(args: argparse.Namespace) -> None:
    """One line per notebook."""
    for book in notebooks():
        print(f"{book.name:24s} {book.minutes:4g} min  {book.title}")


def check(args: argparse.Namespace) -> None:
    """Everything a run would check before its first kernel, and what it would do."""
    for step in Request.of(args.notebook, args.file, args.param, args.runs).steps(args.force):
        state = "waits for an earlier notebook" if step.folder is None else "done before" if step.done and not args.force else "to run"
        print(f"{step.book.name}: {state}" + (f", {step.folder}" if step.folder else ""))
        for name in step.book.defaults:
            if name not in RUNNERS:
                print(f"    {name} = {getattr(step.params, name)!r}")


def run(args: argparse.Namespace) -> None:
    """Run and say where the report is."""
    page = runner.run(Request.of(args.notebook, args.file, args.param, args.runs), args.force, args.timeout)
    print(f"report: {page}")


def write_report(args: argparse.Namespace) -> None:
    """Write the report and say where it is."""
    print(f"report: {report.write_report(Path(args.runs))}")


def inspect(args: argparse.Namespace) -> None:
    """Say what a folder holds. Raises `ParameterError` (after saying it) when its weights do not fit its configuration."""
    from .models.checkpoint import inspect as look  # torch is not needed by most other commands

    found = look(args.folder)
    print(json.dumps(asdict(found), indent=1) if args.json else found)
    if not found.loads:
        raise ParameterError(f"{args.folder} cannot be loaded: its weights do not fit its config.json (see the keys above).")


def show_plan(args: argparse.Namespace) -> None:
    """Print a plan and its savings. Raises `ParameterError`, for all but what depends on the model before there is one."""
    from .baselines import PRESETS
    from .batch import pack
    from .bench.costs import costs, predicted_seconds  # torch is not needed by most other commands
    from .flops import count, planned, savings
    from .presets import picture_tokenizer, preset

    make = maker_of(args.plan)
    alone = [name for name, config in PRESETS.items() if config.compete == "segment"]
    if args.router not in alone:
        raise ParameterError(f"--router {args.router} is not known, or needs many rows where one of each task is counted. Allowed: {', '.join(alone)}.")
    if not 0 <= args.saving < 1:
        raise ParameterError(f"--saving {args.saving:g} must be a share: 0 saves nothing, 0.3 saves 30 %.")
    (model, rows), image_tokenizer, router = preset(args.model), picture_tokenizer(args.model), PRESETS[args.router]

    def cost(plan: CapacityPlan) -> float:
        with planned(model, plan, router):
            found = count(model, pack(rows), image_tokenizer)
        return found.step / found.dense_step

    def seconds(plan: CapacityPlan) -> float:
        return predicted_seconds(model, plan, pack(rows), table, router) / (len(model.layers) * table.dense)

    maker = partial(make, len(model.layers))
    try:
        table = costs(model, rows, router) if args.count == "time" else None
        plan = maker(args.saving) if args.count == "paper" else solve(maker, seconds if table else cost, 1 - args.saving)
    except ParameterError as error:
        raise ParameterError(f"{args.plan} on {args.model}, {args.saving:.1%} counted as {args.count}: {error}") from None
    found = savings(model, plan, rows, router, image_tokenizer)
    tokens, kinds = {row.task.name.lower(): len(row.ids) for row in rows}, [plan.kind(i) for i in range(plan.layers)]
    if args.json:
        print(json.dumps({"model": args.model, "plan": args.plan, "router": args.router, "layers": plan.layers, "tokens": tokens,
                          "capacity": plan.capacity, "kinds": kinds, "savings": asdict(found), "time": 1 - seconds(plan) if table else None}))
        return
    print(plan, f"kinds  {' '.join(kinds)}", plan.draw(), sep="\n")
    print(f"on {args.model}, routers {args.router}, one row of {' and one of '.join(f'{n} {task} tokens' for task, n in tokens.items())}:")
    print(f"  paper     {found.paper:6.1%} saved   kept tokens, as the paper counts")
    print(f"  full      {found.full:6.1%} saved   a training step: attention's quadratic term, routers, head, text kept by rule, the pictures' codes")
    print(f"  measured  {found.measured:6.1%} saved   torch's counter, forward and backward, on the same step")
    print(f"  model     {found.model:6.1%} saved   as full, without the pictures' codes")
    if table:
        print(f"  time      {1 - seconds(plan):6.1%} saved   of the stack's predicted time, forward and backward of {table.tokens} tokens on {table.device}")


def run_bench(args: argparse.Namespace) -> None:
    """Measure, write the record and print it. Raises `ParameterError`, before anything is measured."""
    from .bench.record import bench, table  # torch is not needed by most other commands

    if args.out and Path(args.out).is_dir():
        raise ParameterError(f"--out {args.out} is a folder; name a file in it, such as {Path(args.out) / 'bench.json'}.")
    found = bench(args.what, args.preset, args.rounds, args.deadline)
    text = json.dumps(found, indent=1) + "\n"
    if args.out:
        write(Path(args.out), text)
    print(text if args.json else f"{found['device']}, {found['command']}\n\n{table(found)}", end="")


def train_tiny(args: argparse.Namespace) -> None:
    """Train, evaluate on the test split and say how good it is."""
    from .experiment import train_tiny as make  # torch is not needed by the other commands

    card = make(args.name, args.out)
    print(f"{args.out}: questions right {card['quality']['questions']['all']:.3f}, pictures right {card['quality']['pictures']['all']:.3f}")


def show_diagnosis(args: argparse.Namespace) -> None:
    """Say how this installation stands. Raises `SetupError` (after saying it) when something has to be mended."""
    from .workbook.doctor import diagnose

    found = diagnose(args.runs)
    print(json.dumps(asdict(found), indent=1) if args.json else found)
    if found.wrong:
        raise SetupError("not ready: " + " ".join(found.wrong))


if __name__ == "__main__":
    sys.exit(main())
