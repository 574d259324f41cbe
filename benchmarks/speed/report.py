"""What becomes of the measurements: a table for the terminal, one for the pages, and a plot."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.speed.contestants import OURS


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


def short(value: float | None, unit: str = "") -> str:
    return f"{float(f'{value:.3g}'):g}{unit}" if value else "-"


def best(rows: Iterable[Row], compiled: bool, names: Iterable[str] | None = None) -> Row | None:
    """The fastest of these contestants, or of all but this package's fast ones."""
    timed = [row for row in rows if row.median_ms and row.compiled == compiled]
    wanted = [row for row in timed if (row.contestant in names if names else row.contestant not in OURS)]
    return min(wanted, key=lambda row: row.median_ms or 0, default=None)


def ratio(slow: Row | None, fast: Row | None) -> str:
    return short(slow.median_ms / fast.median_ms, "x") if slow and fast and slow.median_ms and fast.median_ms else "-"


def table(rows: list[Row]) -> Table:
    """Every shape and contestant, in 80 columns."""
    result = Table(show_edge=False, title_justify="left")
    for heading in ("rows x features", "implementation"):
        result.add_column(heading, no_wrap=True)
    for heading in ("ms", "over naive", "x limit", "peak MB"):
        result.add_column(heading, justify="right", overflow="fold")
    for shape, mode in dict.fromkeys((row.shape, row.mode) for row in rows):
        case = [row for row in rows if (row.shape, row.mode) == (shape, mode) and not row.status.startswith("missing")]
        naive = best(case, False, ["naive"])
        name = f"{shape[0]} x {shape[1]}{', value' * (mode == 'value')}"
        for row in case:
            cells = [row.status]
            if row.median_ms:
                limit, peak = row.median_ms / row.limit_ms, (row.peak_bytes or 0) / 1e6
                cells = [f"{row.median_ms:.3f}", ratio(naive, row), f"{limit:.1f}", f"{peak:.1f}"]
            result.add_row(name, row.label, *cells, end_section=row is case[-1])
            name = ""
    return result


def source(row: Row) -> str:
    """Where a row comes from."""
    return f"{row.device}; torch {row.torch}; {row.date}; commit {row.commit}; `{row.command}`"


def markdown(rows: list[Row]) -> str:
    """The page's table, of the value with the student's gradient, and a line that says where it comes from."""
    rows = [row for row in rows if row.mode == "value_and_grad"]
    lines = [
        "| rows x features | fused, ms | over naive | over next best | compiled, over next best "
        "| peak MB, fused / naive |",
        "|---" * 6 + "|",
    ]
    for shape in dict.fromkeys(row.shape for row in rows):
        case = [row for row in rows if row.shape == shape]
        naive, fused, following = (best(case, False, names) for names in (["naive"], ["fused"], None))
        cells = (
            f"{shape[0]} x {shape[1]}",
            short(fused and fused.median_ms),
            ratio(naive, fused),
            f"{ratio(following, fused)}{f' ({following.contestant})' * bool(following)}" if following else "-",
            ratio(best(case, True), best(case, True, ["fused"])),
            " / ".join(short(row and (row.peak_bytes or 0) / 1e6) for row in (fused, naive)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    dtype = f"{first.dtype} under autocast to {first.autocast}" if first.autocast else first.dtype
    return "\n".join([*lines, "", f"Value and the student's gradient, {dtype}, medians. {source(first)}"])


_COLOURS = {"naive": "C7", "reference": "C0", "lightly": "C2", "fused": "C3", "triton": "C4"}


def plot(rows: list[Row], path: Path) -> None:
    """The value with the student's gradient against the eager naive loss, shape by shape."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.mode == "value_and_grad" and row.median_ms]
    naive = {row.shape: row.median_ms for row in rows if row.label == "naive"}
    place = {shape: i for i, shape in enumerate(naive)}
    figure, axes = plt.subplots(figsize=(5, 0.45 * len(naive) + 1.8), layout="constrained")
    for label in dict.fromkeys(row.label for row in rows):
        group = [row for row in rows if row.label == label and row.shape in naive]
        marker, colour = ("D" if group[0].compiled else "o"), _COLOURS[group[0].contestant]
        y = [place[row.shape] + (0.15 if row.compiled else -0.15) for row in group]
        face = "white" if group[0].compiled else colour
        speedups = [naive[row.shape] / row.median_ms for row in group]
        axes.plot(speedups, y, marker, color=colour, markerfacecolor=face, label=label)
    limits = {place[row.shape]: naive[row.shape] / row.limit_ms for row in rows if row.shape in naive}
    top, bottom = [i - 0.35 for i in limits], [i + 0.35 for i in limits]
    axes.vlines(list(limits.values()), top, bottom, color="black", label="limit of the machine")
    axes.set(xscale="log", xlabel="speed-up over naive (eager)")
    axes.set_yticks(range(len(naive)), [f"{rows} x {features}" for rows, features in naive])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    axes.set_title(f"Value and gradient, {rows[0].dtype}\n{rows[0].device}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
