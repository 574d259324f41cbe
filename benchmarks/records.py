"""What every benchmark needs to leave a record: where a figure comes from, CSV files, and answers to mistakes."""

import argparse
import csv
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device, threads: int) -> str:
    """The GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {threads} thread{'s' * (threads > 1)}"


def commit() -> str:
    """The short hash of this checkout, with ``-dirty`` if it was changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def origin(module: str, argv: Sequence[str] | None, device: torch.device, threads: int) -> dict[str, Any]:
    """The columns that say where a row comes from; `argv` as argparse takes it."""
    return {
        "device": machine(device, threads),
        "torch": str(torch.__version__),
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)]),
    }


def write_csv(rows: list[Any], path: Path) -> None:
    """One line for each dataclass in `rows`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values})


def read_csv(path: Path, row: type[Any]) -> list[Any]:
    """The dataclasses that `write_csv` wrote."""

    def parse(kind: object, text: str) -> object:
        if kind is str:
            return text
        if kind is bool:
            return text == "True"
        return (int if kind in (int, int | None) else float)(text) if text else None

    with path.open(newline="") as file:
        return [row(**{f.name: parse(f.type, line[f.name]) for f in fields(row)}) for line in csv.DictReader(file)]


def output(text: str) -> Path:
    """The argparse type of a file to write later: it can be written now, and nothing is left behind."""
    path = Path(text)
    try:
        if path.exists():
            path.open("a").close()
        else:  # missing folders will be made in the first that exists
            tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())).close()
    except OSError as error:
        message = f"{text!r} cannot be written ({error.strerror}): give a file in a folder that you may write to"
        raise argparse.ArgumentTypeError(message) from error
    return path


def refuse(sentence: str) -> NoReturn:
    """Answers a mistake that shows only after work has begun, with argparse's exit code."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)
