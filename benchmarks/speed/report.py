"""What becomes of the measurements: CSV, plots, and the README's table; argparse's types of where they go."""

import argparse
import csv
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.rivals import RIVALS


@dataclass
class Row:
    """One contestant at one shape in one mode: a line of the CSV."""

    contestant: str
    compiled: bool
    rows: int
    features: int
    dtype: str
    autocast: str
    mode: str
    median_ms: float | None = None
    iqr_ms: float | None = None
    limit_ms: float = 0.0
    peak_bytes: int | None = None
    operations: int | None = None
    status: str = "ok"
    matmul_gflops: float = 0.0  # per second, the best of this run
    copy_gbytes: float = 0.0  # per second, read plus written
    device: str = ""
    torch: str = ""
    threads: int = 0
    date: str = ""
    commit: str = ""
    command: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.features

    @property
    def label(self) -> str:
        return f"{self.contestant} + compile" if self.compiled else self.contestant


def refuse(sentence: str) -> NoReturn:
    """Answers a mistake that shows only when the work has begun, with argparse's exit code."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, a whole number of at least 1 expected, such as 2")
    return int(text)


def output(text: str, inside: str = "") -> Path:
    """A file, or a folder for the file `inside`, that can be written when the work is done; leaves nothing behind."""
    path = Path(text, inside)
    try:
        if path.exists():
            path.open("a").close()
        else:  # the folders that are missing are made in the first that is there
            tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())).close()
    except OSError as error:
        where = "a folder" if inside else "a file in a folder"
        message = f"{text!r} cannot be written ({error.strerror}): give {where} that you may write to"
        raise argparse.ArgumentTypeError(message) from error
    return Path(text)


def measured(text: str) -> list[Row]:
    """The rows of a file that `--csv` wrote."""
    try:
        rows = read_csv(Path(text))
    except (OSError, KeyError, ValueError, csv.Error):
        rows = []
    if not any(row.mode == "value_and_grad" for row in rows):
        expected = "give a file that --csv wrote without --nproc, with the mode value_and_grad"
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read or has no such measurements: {expected}")
    return rows


def write_csv(rows: list[Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values})


def read_csv(path: Path, row: type[Any] = Row) -> list[Any]:
    def parse(kind: object, text: str) -> object:
        if kind is str:
            return text
        if kind is bool:
            return text == "True"
        return (int if kind in (int, int | None) else float)(text) if text else None

    with path.open(newline="") as file:
        return [row(**{f.name: parse(f.type, line[f.name]) for f in fields(row)}) for line in csv.DictReader(file)]


def short(value: float | None, unit: str = "") -> str:
    return f"{float(f'{value:.3g}'):g}{unit}" if value else "-"


def _best(rows: Iterable[Row], compiled: bool, names: Iterable[str]) -> Row | None:
    timed = [row for row in rows if row.median_ms and row.compiled == compiled and row.contestant in names]
    return min(timed, key=lambda row: row.median_ms or 0, default=None)


def markdown(rows: list[Row]) -> str:
    """The README's table, of the value with the student's gradient, and a line that says where it comes from."""
    rows = [row for row in rows if row.mode == "value_and_grad"]
    lines = [
        "| rows x features | naive, ms | best rival, ms | fused, ms | naive / fused | best rival / fused "
        "| compiled: best rival / fused | peak MB, naive / fused |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def ratio(slow: Row | None, fast: Row | None) -> str:
        return short(slow.median_ms / fast.median_ms, "x") if slow and fast else "-"

    def with_name(text: str, row: Row | None) -> str:
        return f"{text} ({row.contestant})" if row else text

    for shape in dict.fromkeys(row.shape for row in rows):
        case = [row for row in rows if row.shape == shape]
        naive, rival, fused = (_best(case, False, names) for names in (["naive"], RIVALS, ["fused"]))
        compiled_rival, compiled_fused = (_best(case, True, names) for names in (RIVALS, ["fused"]))
        cells = (
            f"{shape[0]} x {shape[1]}",
            short(naive and naive.median_ms),
            with_name(short(rival and rival.median_ms), rival),
            short(fused and fused.median_ms),
            ratio(naive, fused),
            ratio(rival, fused),
            with_name(ratio(compiled_rival, compiled_fused), compiled_rival),
            " / ".join(short(row and (row.peak_bytes or 0) / 1e6) for row in (naive, fused)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    dtype = f"{first.dtype} under autocast to {first.autocast}" if first.autocast else first.dtype
    lines += [
        "",
        f"Value and the student's gradient, {dtype}, medians. "
        "lightly: its BarlowTwinsLoss, a different loss of similar cost.",
        f"{first.device}; torch {first.torch}; {first.date}; commit {first.commit}; `{first.command}`",
    ]
    return "\n".join(lines)


_COLOURS = {"naive": "C7", "reference": "C0", "lightly": "C2", "fused": "C3", "triton": "C4"}


def plot(rows: list[Row], folder: Path) -> None:
    """Writes speedup.png and width.png into the folder; both show the value with the student's gradient."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row.mode == "value_and_grad" and row.median_ms]
    if not any(row.label == "naive" for row in rows):
        raise SystemExit("nothing to plot: it takes naive's value_and_grad to compare with")
    _plot_speedup(rows, folder / "speedup.png")
    _plot_width(rows, folder / "width.png")


def _styled(rows: list[Row]) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """The rows of each contestant, eager ones first, with the keywords to draw them."""
    for compiled, name in product((False, True), _COLOURS):
        group = [row for row in rows if row.compiled == compiled and row.contestant == name]
        shape = {"marker": "D", "markerfacecolor": "white", "linestyle": "--"} if compiled else {"marker": "o"}
        if group:
            yield group, {"label": group[0].label, "color": _COLOURS[name], **shape}


def _plot_speedup(rows: list[Row], path: Path) -> None:
    """Against the eager naive loss, shape by shape; contestants that run compiled stand below."""
    import matplotlib.pyplot as plt

    naive = {row.shape: row.median_ms for row in rows if row.label == "naive"}
    place = {shape: i for i, shape in enumerate(naive)}
    rows = [row for row in rows if row.shape in naive]
    figure, axes = plt.subplots(figsize=(5, 0.45 * len(naive) + 1.8), layout="constrained")
    for group, style in _styled(rows):
        shift = 0.15 if group[0].compiled else -0.15
        y = [place[row.shape] + shift for row in group]
        axes.plot([naive[row.shape] / row.median_ms for row in group], y, **{**style, "linestyle": ""})
    limits = {place[row.shape]: naive[row.shape] / row.limit_ms for row in rows}
    top, bottom = [i - 0.35 for i in limits], [i + 0.35 for i in limits]
    axes.vlines(list(limits.values()), top, bottom, color="black", label="limit of the machine")
    axes.set(xscale="log", xlabel="speed-up over naive (eager)")
    axes.set_yticks(range(len(naive)), [f"{rows} x {features}" for rows, features in naive])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    axes.set_title(f"Value and gradient, {rows[0].dtype}\n{rows[0].device}", fontsize=10)
    figure.savefig(path, dpi=150)


def _plot_width(rows: list[Row], path: Path) -> None:
    """Time and memory against D, at the batch size measured at the most widths."""
    import matplotlib.pyplot as plt

    batch = Counter(rows for rows, _ in {row.shape for row in rows}).most_common(1)[0][0]
    rows = sorted((row for row in rows if row.rows == batch), key=lambda row: row.features)
    widths = sorted({row.features for row in rows})
    figure, (time, memory) = plt.subplots(2, 1, figsize=(5, 8.5), layout="constrained")
    for group, style in _styled(rows):
        x = [row.features for row in group]
        time.plot(x, [row.median_ms for row in group], **style)
        memory.plot(x, [(row.peak_bytes or 0) / 1e6 for row in group], **style)
    limits = {row.features: row.limit_ms for row in rows}
    time.plot(widths, [limits[width] for width in widths], "k:", label="limit")
    gradient = [batch * width * getattr(torch, rows[0].dtype).itemsize / 1e6 for width in widths]
    memory.plot(widths, gradient, "k:", label="limit (time), the gradient alone (memory)")
    for axes, title in ((time, "median time, ms"), (memory, "peak memory beyond the inputs, MB")):
        axes.set(xscale="log", yscale="log", xlabel="features D", title=title)
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(f"Value and gradient at batch {batch}, {rows[0].dtype}\n{rows[0].device}", fontsize=10)
    figure.savefig(path, dpi=150)
