"""The CSV of runs: one line for each finished run."""

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.records import RESULTS


@dataclass
class Run:
    """One line of the CSV. The fields up to warmup identify the run."""

    data: str
    labelled: int  # 1: every training image has its label, n: every n-th
    pair: str
    method: str
    seed: int
    teacher: str  # the file of its weights, unless it was trained here
    teacher_epochs: int
    epochs: int
    batch: int  # of each process
    processes: int
    precision: str
    views: int
    weight: float
    kappa: float | None
    reduction: str
    warmup: float
    validation: float = 0.0  # accuracy or mean IoU, in percent
    test: float = 0.0
    added_parameters: int = 0
    step_ms: float = 0.0  # median
    minutes: float = 0.0
    device: str = ""
    torch: str = ""
    commit: str = ""
    date: str = ""
    command: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(cell(getattr(self, name)) for name in KEY)


COLUMNS = [field.name for field in fields(Run)]
KEY = COLUMNS[: COLUMNS.index("warmup") + 1]


def cell(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def told(argv: Sequence[str] | None) -> list[str]:
    """The words of a command, of paths their names only: where one machine keeps its files is of no use on another."""
    given = sys.argv[1:] if argv is None else argv
    return [Path(word).name if Path(word).is_absolute() or Path(word).is_dir() else word for word in given]


def append(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow({name: cell(value) for name, value in asdict(run).items()})


def read(name: str, **which: str) -> list[dict[str, str]]:
    """The students' lines of a committed file that have these values."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return [x for x in csv.DictReader(file) if which.items() <= x.items() and x.get("method") != "teacher"]


def finished(path: Path) -> set[tuple[str, ...]]:
    """The keys of the runs in the file."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes: name another file")
        return {tuple(line[name] for name in KEY) for line in reader}
