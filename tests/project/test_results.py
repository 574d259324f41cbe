"""Committed results belong to this code: cheap ones are made again, dear ones have probes, all have an origin."""

import csv
import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
README = (RESULTS / "README.md").read_text().splitlines()


def read(name):
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def same_versions(line):
    """Skips where the figures belong to another torch or timm."""
    torch, timm = (pytest.importorskip(name, reason="needs the bench extra") for name in ("torch", "timm"))
    pytest.importorskip("rich", reason="needs the bench extra")
    here = {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__}
    then = {name: line[name] for name in here if name in line}
    if not then.items() <= here.items():
        pytest.skip(f"these figures belong to {then}, and here is {here}")


def test_parameters_added():
    then = read("overhead.csv")
    same_versions(then[0])
    from benchmarks.accuracy import parameters

    now = [{key: str(value) for key, value in row.items()} for row in parameters.rows()]
    assert now == [{key: line[key] for key in now[0]} for line in then], "run python -m benchmarks.accuracy.parameters"


def test_the_pair_that_the_paper_quotes():
    lines = read("overhead.csv")
    (line,) = (x for x in lines if (x["classes"], x["teacher"], x["student"]) == ("1000", "ConvNeXt-T", "Swin-N"))
    assert int(line["student_parameters"]) / 1e6 == pytest.approx(9.6, abs=0.05)
    assert int(line["ofa_added"]) / 1e6 == pytest.approx(28.2, abs=0.05)
    assert int(line["rsd_added"]) == 512 * 1024 + 2 * 1024 + 1024 * 768


def test_methods_are_those_of_the_results():
    """To 1e-3: rounding differs by 1e-5 between numbers of threads, and a step of Adam makes more of it."""
    then = read("probe.csv")
    same_versions(then[0])
    from benchmarks.accuracy import probe

    for line, found in zip(then, probe.losses(then), strict=True):
        kept = [float(line["first_loss"]), float(line["second_loss"])]
        assert found == pytest.approx(kept, rel=1e-3), f"{line}: its results are other code's; see accuracy/probe.py"


def test_every_method_of_the_results_has_a_probe():
    pytest.importorskip("timm", reason="needs the bench extra")
    from benchmarks.accuracy.methods import METHODS

    probed = {(line["task"], line["method"].partition(":")[0]) for line in read("probe.csv")}
    files = {"classification": ("distill", "sensitivity", "dense", "width"), "segmentation": ("segment",)}
    lines = [(task, line["method"]) for task, names in files.items() for name in names for line in read(f"{name}.csv")]
    published = {(task, method.partition(":")[0]) for task, method in lines}
    assert probed == {(task, method) for task, method in published if method in METHODS}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.name)
def test_the_origin_of_every_file(path):
    """The README's line has all commits, dates and machines that the file's own columns have."""
    (line,) = (line for line in README if f"({path.name})" in line)
    for column in {"commit", "device"} & read(path.name)[0].keys():
        for value in {row[column] for row in read(path.name)}:
            assert value in line
    dates = sorted({row["date"] for row in read(path.name) if row.get("date")})
    assert not dates or re.search(rf"\| {dates[0]}( to {dates[-1]})? \|", line)
    assert len(set(dates)) < 2 or dates[-1] in line
