"""What the term adds to a training step of a timm model: `python -m benchmarks.speed.overhead`.

A step is the student's forward and backward pass and AdamW's update on random images. The term adds the projector and
the loss on the student's embeddings. Neither has the teacher's forward pass, so the share of a real step is smaller.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.speed import measure
from rsd_loss import DecouplingProjector, RSDLoss


@dataclass
class Row:
    """One student with a teacher of one width: a line of the CSV."""

    student: str
    batch: int
    side: int
    teacher_features: int
    implementation: str
    autocast: str
    parameters: int = 0
    added_parameters: int = 0  # by the projector, in training only
    without_ms: float | None = None
    with_ms: float | None = None
    status: str = "ok"
    device: str = ""
    torch: str = ""
    date: str = ""
    commit: str = ""
    command: str = ""


def run(row: Row, device: torch.device, seconds: float) -> Row:
    """Fills in the row; steps with and without the term take turns."""
    torch.manual_seed(0)
    student = timm.create_model(row.student, num_classes=100, img_size=row.side).to(device).train()
    projector = DecouplingProjector(student.num_features, row.teacher_features, device=device)
    criterion = RSDLoss(kappa=0.0, implementation=row.implementation)  # type: ignore[arg-type]
    row.parameters, row.added_parameters = (sum(p.numel() for p in m.parameters()) for m in (student, projector))
    optimizer = torch.optim.AdamW([*student.parameters(), *projector.parameters()])
    images, labels = torch.randn(row.batch, 3, row.side, row.side), torch.randint(100, (row.batch,))
    images, labels = images.to(device), labels.to(device)
    teacher = torch.randn(row.batch, row.teacher_features, device=device)

    def step(term: bool) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, getattr(torch, row.autocast or "bfloat16"), enabled=bool(row.autocast)):
            embeddings = student.forward_head(student.forward_features(images), pre_logits=True)
            loss = F.cross_entropy(student.get_classifier()(embeddings), labels)
            if term:
                loss = loss + 0.1 * criterion(projector(embeddings), teacher)
        loss.backward()
        optimizer.step()

    times: dict[bool, list[float]] = {False: [], True: []}
    with measure.noted(row):
        step(True)
        for _ in range(3):
            for term, found in times.items():
                timer = measure.timer(partial(step, term), device)
                found += timer.blocked_autorange(min_run_time=seconds / 6).times
        row.without_ms, row.with_ms = (1e3 * median(found) for found in times.values())
    return row


def share(row: Row) -> str:
    """The term's part of the whole step; where noise hides it, none."""
    if row.without_ms is None or row.with_ms is None:
        return row.status
    return f"{max(0.0, 100 * (1 - row.without_ms / row.with_ms)):.1f} %"


def table(rows: list[Row]) -> Table:
    result = Table("student", "teacher's width", "implementation", show_edge=False)
    for heading in ("ms without", "ms with", "share of a step"):
        result.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        times = ("-" if ms is None else f"{ms:.2f}" for ms in (row.without_ms, row.with_ms))
        result.add_row(row.student, str(row.teacher_features), row.implementation, *times, share(row))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.overhead",
        description="The term's share of a training step of a ViT on random images. Takes about a minute on a CPU.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--student", default="vit_tiny_patch16_224", help="a ViT of timm (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--csv", type=records.output, metavar="PATH", help="write the measurements there")
    args = parser.parse_args(argv)
    if args.student not in timm.list_models("*vit*"):
        parser.error(f"argument --student: timm has no ViT {args.student!r}: see timm.list_models('*vit*')")
    if args.batch < 2:
        parser.error("argument --batch: the loss needs at least 2 samples")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device here: leave it out for the CPU")
    device = torch.device(args.device)
    origin: dict[str, Any] = records.origin("benchmarks.speed.overhead", argv, device, torch.get_num_threads())
    autocast = "bfloat16" if args.device == "cuda" else ""
    rows = [Row(args.student, args.batch, 224, width, "auto", autocast, **origin) for width in (768, 2048)]
    rows = [run(row, device, 6.0) for row in rows]
    Console().print(table(rows))
    if args.csv:
        records.write_csv(rows, args.csv)


if __name__ == "__main__":
    main()
