"""`python -m benchmarks.accuracy TASK --data ...`: which students to train, and their rows in a CSV.

Trains a student under a teacher, once for each pair, method and seed, and appends a row for each finished run to a CSV.
It leaves out runs that the file has. If you stop it, the same command goes on from the last whole epoch.
"""

import argparse
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from timm.layers import set_fused_attn

from benchmarks import records
from benchmarks.accuracy import classification, segmentation
from benchmarks.accuracy.cache import rank_and_world, wait
from benchmarks.accuracy.distilling import distil, teacher_of
from benchmarks.accuracy.methods import method_named
from benchmarks.accuracy.paper import Paper
from benchmarks.accuracy.runs import Run, append, finished, told
from benchmarks.accuracy.training import Bench

TASKS = {
    "classification": classification,
    "segmentation": segmentation,
    "paper-cifar100": Paper(100),
    "paper-imagenet": Paper(1000),
}
NEED_LABELS = ("dkd", "ofa", "sdd")  # one for every image


def checked(check: Callable[[str], object], text: str) -> str:
    """The type of a word that `check` accepts, or refuses with an error to show."""
    try:
        check(text)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    return text


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    add, task = parser.add_argument, TASKS[name]
    default = "default: %(default)s"
    several = {"nargs": "+", "help": default}
    add("--data", required=True, type=partial(checked, task.source), help=task.source.__doc__)
    names = {"choices": task.pairs, "metavar": "TEACHER_STUDENT", "help": f"default: {' '.join(task.pairs)}"}
    add("--pairs", nargs="+", default=list(task.pairs), **names)
    described = f"may have settings, as in rsd_dense:pooled=0.0; default: {' '.join(task.methods)}"
    method = partial(checked, method_named)
    add("--methods", type=method, nargs="+", default=list(task.methods), metavar="METHOD", help=described)
    add("--seeds", type=int, **several)
    add("--epochs", type=int, help=f"of a student ({default})")
    add("--batches", type=int, **several)
    add("--weights", type=float, nargs="+", help="default: each method's own")
    add("--kappas", type=float, default=[0.01], **several)
    add("--teacher-epochs", type=int, help=default)
    device = partial(checked, lambda text: torch.empty(0, device=text))
    add("--device", type=device, default="cpu", help=default)
    add("--threads", type=int, help="for torch (default: its own choice)")
    add("--bfloat16", action="store_true", help="train under autocast")
    if task.pretrained:
        add("--compile", action="store_true", help="the student and its losses")
        add("--workers", type=int, default=8, help=f"processes that load images ({default})")
        file = partial(checked, lambda text: open(text).close())
        add("--teacher", type=file, metavar="FILE", help="the teacher's weights, taken as they are")
    else:
        add("--labelled", type=int, metavar="N", help="the student has every Nth image's label (default: 1)")
        add("--views", type=int, default=8, help=f"augmented views of each image ({default})")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rsd-loss"
    add("--cache", type=Path, default=cache, help=f"for teachers and their outputs ({default})")
    add("--csv", type=records.output, default=task.results, help=default)
    parser.set_defaults(labelled=1, views=0, compile=False, teacher=None)
    parser.set_defaults(**task.defaults)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.partition("\n\n")[2])
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, task in TASKS.items():
        first, _, rest = task.__doc__.partition("\n\n")
        add_options(tasks.add_parser(name, help=first, description=f"{first} {rest}"), name)
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    try:
        args.done = finished(args.csv)
    except ValueError as error:
        parser.error(f"--csv: {error}")
    mixing = [pair for pair in args.pairs if task.networks[task.pairs[pair][1]].strong]
    for text in args.methods:
        name = text.partition(":")[0]
        if name in task.refused:
            parser.error(f"{text} is for other networks than these pairs have: leave it out")
        if name in NEED_LABELS and (mixing or args.labelled > 1):
            other = f"{mixing[0]}, which mixes images" if mixing else "--labelled"
            parser.error(f"{text} needs one label for every image: leave out it or {other}")
    args.teacher_name = ""
    if args.teacher:
        digest = hashlib.sha256(Path(args.teacher).read_bytes()).hexdigest()
        args.teacher_name, args.teacher_epochs = f"{Path(args.teacher).stem}-{digest[:8]}", 0
    return args


def planned(args: argparse.Namespace) -> list[Run]:
    alike = {
        "data": Path(args.data).resolve().name,
        "labelled": args.labelled,
        "teacher": args.teacher_name,
        "teacher_epochs": args.teacher_epochs,
        "epochs": args.epochs,
        "processes": rank_and_world()[1],
        "precision": "bfloat16" if args.bfloat16 else "float32",
        "views": args.views,
    }
    runs = []
    for seed, pair, name in itertools.product(args.seeds, args.pairs, args.methods):
        method = method_named(name)
        weights = args.weights if args.weights and name != "none" else [method.weight]
        kappas = args.kappas if method.kappa else [method.kappa]
        own = {"reduction": "" if method.kappa is None else "sum", "warmup": method.warmup, **alike}
        for batch, weight, kappa in itertools.product(args.batches, weights, kappas):
            runs.append(Run(pair=pair, method=name, seed=seed, batch=batch, weight=weight, kappa=kappa, **own))
    return runs


def start(args: argparse.Namespace, progress: Progress, argv: Sequence[str] | None) -> Bench:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    # On a CPU in bfloat16, torch's fused attention is slower: 0.43 s against 0.15 s for a step of vit_small on a core.
    set_fused_attn(device.type != "cpu")
    origin = records.origin("benchmarks.accuracy", told(argv), device, torch.get_num_threads())
    if dist.is_torchelastic_launched():
        launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
        origin["command"] = origin["command"].replace("python", launcher, 1)
    task, rank = TASKS[args.task], rank_and_world()[0]
    if rank:
        wait()  # the first process downloads what is missing
    data = task.load(args, device)
    if not rank:
        wait()
    return Bench(task, data, args, progress, origin)


def main(argv: Sequence[str] | None = None) -> None:
    launched = dist.is_torchelastic_launched()
    if launched and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything asks for "cuda"
    args = parse(argv)
    if launched:
        own = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else None
        # A download, or the evaluation of the first process, may take long.
        dist.init_process_group("nccl" if own else "gloo", device_id=own, timeout=timedelta(hours=2))
    first = rank_and_world()[0] == 0
    runs = [run for run in planned(args) if run.key not in args.done]
    console = Console(quiet=not first)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not first) as progress:
        bar = progress.add_task("all runs", total=len(runs))
        bench = start(args, progress, argv) if runs else None
        for run in runs:
            teacher = teacher_of(bench, run, bench.task.pairs[run.pair][0])[1]
            distil(bench, run)
            for row in (teacher, run):
                if first and row.key not in args.done:
                    append(row, args.csv)
                    chosen_by = "test" if math.isnan(row.validation) else "validation"
                    score = f"{chosen_by} {getattr(row, chosen_by):.1f} %, {row.minutes:.1f} min"
                    console.print(f"{row.pair} {row.method} weight {row.weight:g} seed {row.seed}: {score}")
                args.done.add(row.key)
            progress.advance(bar)
    if launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
