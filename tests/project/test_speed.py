import csv
import importlib
import io
import re
from pathlib import Path

import pytest
import torch
from conftest import pair
from pool import SIZE

from benchmarks import rivals
from rsd_loss import rsd_loss

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(("rows", "features"), [(16, 24), (24, 16)])
def test_naive_is_the_same_loss(rows, features):
    teacher = torch.randn(rows, features, dtype=torch.float64)
    student = (torch.randn(rows, features, dtype=torch.float64) + teacher).requires_grad_()
    expected = rsd_loss(student, teacher, kappa=rivals.KAPPA, implementation="reference")
    (expected_grad,) = torch.autograd.grad(expected, student)
    for name in ("naive", "reference", "fused"):
        actual = rivals.build(name, student.device, compiled=False)(student, teacher)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, student)[0], expected_grad)


def test_measures_of_a_known_step():
    pytest.importorskip("rich")
    from benchmarks import measure

    a = torch.randn(256, 128, requires_grad=True)
    b = torch.randn(128, 512)
    cpu = torch.device("cpu")

    def step():
        return torch.autograd.grad((a @ b).relu().sum(), a)

    # Forward holds the product and its relu at a time, backward the relu and the gradient before it.
    product = 256 * 512 * 4
    peak = measure.peak_bytes(step, cpu)
    assert 2 * product <= peak <= 2 * product + 4096, peak
    # Forward: mm, relu, sum. Backward: the seed, threshold_backward, mm; t() and expand() are views.
    assert measure.operations(step, cpu, compiled=False) == 6
    assert measure.operations(step, cpu, compiled=True) is None


def test_limit():
    from benchmarks.measure import Rates

    rates = Rates(matmul=1e9, copy=1e9)
    assert rates.limit(128, 768, "value_and_grad", 4) == pytest.approx(4 * 128 * 768 * 128 / 1e9)
    assert rates.limit(768, 128, "value", 4) == pytest.approx(2 * 768 * 128**2 / 1e9)
    assert Rates(matmul=1e15, copy=1e9).limit(128, 768, "value_and_grad", 2) == pytest.approx(3 * 128 * 768 * 2 / 1e9)


def test_a_contestant_that_fails_is_reported(monkeypatch):
    pytest.importorskip("rich")
    from benchmarks import throughput

    def build(name, device, compiled):
        def loss(student, teacher):
            return torch.empty(2**60) if name == "naive" else student.sum() / 0

        return loss

    rows = [throughput.Row(name, False, 4, 4, "float32", "", "value") for name in ("naive", "fused")]
    monkeypatch.setattr(rivals, "build", build)
    throughput.run_case(rows, torch.device("cpu"), 1, 1e-3, lambda: None)
    assert [row.status for row in rows] == ["out of memory", "ok"]
    assert rows[0].median_ms is None


def test_sent_bytes_by_hand():
    pytest.importorskip("rich")
    from benchmarks.distributed import markdown_on_paper, sent_bytes

    # By features, K being 256 x 256: three halves of an embedding go to the other; K and six vectors around a ring.
    wide = sent_bytes(128, 768, 2)
    assert wide["distributed"] == 128 + 3 * 128 * 384 * 4 + (256 * 256 + 6 * 768) * 4
    assert wide["gather+reference"] == wide["gather+fused"] == 3 * 128 * 768 * 4
    # By rows: 3/2 of P, four vectors in float64 (two of them) or float32, and for the gradient one more.
    tall = sent_bytes(1024, 384, 4)
    assert tall["distributed"] == 3 * 128 + 1.5 * 4 * (384 * 384 + 2 * 2 * 384 + 2 * 384 + 384)
    assert tall["gather+fused"] == 3 * 3 * 1024 * 384 * 4
    assert sent_bytes(1024, 384, 4, mode="value")["gather+fused"] == 2 * 3 * 1024 * 384 * 4
    assert f"| 64 | 2048 | rows | {3 * 63 * 128 * 2048 * 4 / 1e6:.0f} | 33.2 |" in markdown_on_paper()


def sends_as_on_paper(rank, group, rows, features, dtype, mode):
    from benchmarks import distributed, measure

    student, teacher = (x[rank * rows :][:rows].clone() for x in pair(SIZE * rows, features, dtype))
    student.requires_grad_()
    first = None
    for name in rivals.DISTRIBUTED:
        row = distributed.Row(name, SIZE, rows, features, str(dtype), "", mode)
        with distributed.SentBytes() as sent:
            out = measure.make_step(row, student, teacher)()
        counted = distributed.over_processes(sent.count, torch.distributed.ReduceOp.SUM) / SIZE
        expected = distributed.sent_bytes(rows, features, SIZE, dtype.itemsize, mode)[name]
        assert round(counted) == expected, (name, counted, expected)
        if dtype == torch.float64:  # they compute the same loss
            first = out if first is None else first
            torch.testing.assert_close(out, first)


@pytest.mark.parametrize("mode", ["value_and_grad", "value"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [15, 16, 17, 50])  # of 16 rows in all
def test_sends_as_on_paper(pool, features, dtype, mode):
    pytest.importorskip("rich")
    pool.run(SIZE, sends_as_on_paper, 4, features, dtype, mode)


def test_quick_run_of_several_processes(tmp_path):
    pytest.importorskip("rich")
    from benchmarks import distributed, throughput

    path = tmp_path / "distributed.csv"
    throughput.main(["--nproc", "2", "--quick", "--csv", str(path)])
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(distributed.QUICK_SHAPES) * len(throughput.MODES) * len(rivals.DISTRIBUTED)
    assert {"iqr_ms", "note", "device", "torch", "threads", "date", "commit", "command"} <= lines[0].keys()
    for line in lines:
        assert (line["status"], line["processes"], line["threads"]) == ("ok", "2", "1")
        assert float(line["median_ms"]) > 0
        assert int(line["peak_bytes"]) > 0
        shape = int(line["rows"]), int(line["features"])
        assert int(line["sent_bytes"]) == distributed.sent_bytes(*shape, 2, mode=line["mode"])[line["contestant"]]


# A command, what somebody asks of it, and the argument that its answer names. There is no {missing}; {file} is a file
# and no table, {folder} a folder and {cut} one with the file of a run that was stopped.
MISTAKES = [
    *(("throughput", ["--shapes", text], f"--shapes: '{text}'") for text in ("0x192", "1x192", "128x0", "128", "axb")),
    *(("throughput", ["--nproc", text], f"--nproc: '{text}'") for text in ("0", "-1", "two")),
    ("throughput", ["--nproc", "2", "0"], "--nproc: '0'"),
    ("throughput", ["--repeats", "0"], "--repeats: '0'"),
    *(("throughput", ["--min-time", text], f"--min-time: '{text}'") for text in ("0", "nan", "inf", "short")),
    ("throughput", ["--csv", "{folder}"], "--csv: '{folder}'"),
    ("throughput", ["--csv", "{file}/a/b.csv"], "--csv: '{file}/a/b.csv'"),
    ("throughput", ["--csv", "{missing}/a.csv", "--shapes", "0x1"], "--shapes: '0x1'"),
    ("throughput", ["--plot", "{file}"], "--plot: '{file}'"),
    ("throughput", ["--plot", "{folder}", "--contestants", "fused"], "--plot: naive's"),
    ("throughput", ["--plot", "{folder}", "--modes", "value"], "--plot: naive's"),
    ("throughput", ["--plot", "{folder}", "--nproc-table"], "--plot: --nproc"),
    ("throughput", ["--nproc", "2", "--plot", "{folder}"], "--plot: --nproc"),
    ("throughput", ["--nproc", "2", "--device", "cuda"], "--device: --nproc"),
    ("throughput", ["--table", "{missing}"], "--table: '{missing}'"),
    ("throughput", ["--table", "{file}"], "--table: '{file}'"),
    ("throughput", ["--nproc-table", "--nproc", "2"], "--nproc: not allowed with argument --nproc-table"),
    ("throughput", ["--nproc-table", "--csv", "{missing}"], "--csv: nothing is measured"),
    ("throughput", ["--device", "cuda"], "--device: cuda"),
    ("throughput", ["--contestants", "distributed"], "--contestants: distributed"),
    ("throughput", ["--nproc", "2", "--contestants", "naive"], "--contestants: naive"),
    ("distributed", ["--quick", "--nproc", "0"], "--nproc: '0'"),
    ("overhead", ["--csv", "{folder}"], "--csv: '{folder}'"),
    ("overhead", ["--csv", "{file}/a.csv"], "--csv: '{file}/a.csv'"),
    ("evidence", ["--results", "{missing}"], "--results: '{missing}/distill.csv'"),
    ("evidence", ["--results", "{cut}"], "--results: '{cut}/distill.csv'"),
    ("triton_resources", ["--csv", "{folder}"], "--csv: '{folder}'"),
]
COMMANDS = {  # and what it takes to import them
    "throughput": ["rich", "matplotlib"],
    "distributed": ["rich"],
    "overhead": ["rich", "timm", "torchvision"],
    "evidence": ["rich", "timm", "torchvision", "matplotlib"],
    "triton_resources": ["triton"],
}


def command(name):
    for module in COMMANDS[name]:
        pytest.importorskip(module)
    return importlib.import_module(f"benchmarks.{name}").main


@pytest.mark.parametrize(("name", "argv", "named"), MISTAKES)
def test_mistakes_are_answered_before_any_work(name, argv, named, tmp_path, capsys, monkeypatch):
    main = command(name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    places = {place: str(tmp_path / place) for place in ("missing", "file", "folder", "cut")}
    (tmp_path / "file").write_text("no table\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut").mkdir()
    header = (RESULTS / "distill.csv").read_text().splitlines()[0]
    (tmp_path / "cut" / "distill.csv").write_text(f"{header}\ncifar100-20,1,cnn_vit,rsd\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main([*(word.format(**places) for word in argv), *["--quick"] * (name == "throughput")])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    usage, _, message = err.partition(": error: ")
    assert "usage: python -m benchmarks." in usage  # torch may log a line before
    assert message.startswith(f"argument {named.format(**places)}"), message
    assert message.endswith("\n")
    assert message.count("\n") == 1
    assert not out
    assert sorted(tmp_path.rglob("*")) == before


def test_the_interpreter_in_place_of_the_compiler(capsys, monkeypatch):
    main = command("triton_resources")
    monkeypatch.setattr("rsd_loss._triton._moments", None)
    with pytest.raises(SystemExit):
        main([])
    assert "error: TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_how_long_it_takes(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command(name)(["--help"])
    assert not ended.value.code
    assert re.search(r"\b(seconds|minutes?)\b", capsys.readouterr().out.partition("options:")[0])


def test_tensors_that_do_not_fit():
    pytest.importorskip("rich")
    from benchmarks import throughput

    rows = [throughput.Row(name, False, 2**30, 2**29, "float32", "", "value") for name in ("naive", "fused")]
    throughput.run_case(rows, torch.device("cpu"), 1, 1e-3, lambda: None)
    assert [row.status for row in rows] == ["out of memory"] * 2


def printed(table):
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_tables_have_whole_names_at_80_columns():
    pytest.importorskip("rich")
    from benchmarks import distributed, throughput

    status = "RuntimeError: no/such/file/whose/name/is/longer/than/a/column.so cannot be loaded"
    rows = [throughput.Row("naive", False, 128, 8192, "float32", "", "value", 62300.0, 1.0, 10.0, 2_500_000_000, 12345)]
    rows += [throughput.Row("reference", True, 128, 8192, "float32", "", "value", 12300.0, 1.0, 10.0, 2_500_000_000)]
    out = printed(throughput.table([*rows, throughput.Row("lightly", False, 128, 8192, "", "", "", status=status)]))
    assert "reference + compile" in out
    assert "…" not in out
    rows = [distributed.Row(name, 4, 128, 8192, "float32", "", "value") for name in rivals.DISTRIBUTED]
    for row in rows[:2]:
        row.median_ms, row.sent_bytes, row.peak_bytes = 12345.0, 123_456_000, 2_500_000_000
    rows[2].status = status
    out = printed(distributed.table(rows))
    assert all(name in out for name in rivals.DISTRIBUTED)
    assert "…" not in out


def test_overhead_has_whole_names_at_80_columns():
    command("overhead")
    from benchmarks import overhead, paper

    counts = {"student_parameters": 15_350_872, "rsd_added": 5_248_000, "ofa_added": 28_187_040}
    counts |= {"rsd_percent": 223.1, "ofa_percent": 293.6}
    pairs = [(c, s, t) for c, students in paper.PAIRS.items() for s, teachers in students.items() for t in teachers]
    out = printed(overhead.table([{"classes": c, "student": s, "teacher": t, **counts} for c, s, t in pairs]))
    lines = [line for line in out.splitlines() if "28.19 (293.6 %)" in line]
    assert len(lines) == len(pairs)
    for line, (_, student, teacher) in zip(lines, pairs, strict=True):
        assert student in line
        assert teacher in line
        assert "5.25 (223.1 %)" in line
    assert "…" not in out


def test_a_rehearsal_of_the_gpu_day(tmp_path, capsys):
    """With it the quick run of the throughput benchmark, of which the day makes one table, and its plots."""
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from benchmarks import gpu_day, report, throughput

    gpu_day.main(["--out", str(tmp_path / "day"), "--device", "cpu", "--quick", "--dtypes", "float32"])
    out = capsys.readouterr().out
    assert " passed" in out.split("tests: ")[1].splitlines()[0]
    assert out.count("| 128 x 256 | fused, ") + out.count("| 128 x 256 | reference, ") == 1
    assert "triton was not timed: nothing follows" in out

    (path,) = (tmp_path / "day").glob("*.csv")
    assert path.name.endswith("_float32.csv")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {"contestant", "compiled", "rows", "features", "dtype", "mode", "median_ms", "limit_ms"} <= lines[0].keys()
    assert {"peak_bytes", "operations", "device", "torch", "threads", "date", "commit", "status"} <= lines[0].keys()
    assert len(lines) == len(throughput.QUICK_SHAPES) * len(throughput.MODES) * len(rivals.NAMES)
    for line in lines:
        if line["contestant"] in ("naive", "reference", "fused"):
            assert line["status"] == "ok"
            assert float(line["median_ms"]) > 0
            assert float(line["limit_ms"]) > 0
            assert int(line["peak_bytes"]) > 0
            assert int(line["operations"]) > 0
    missing = {line["status"] for line in lines if line["contestant"] == "triton"}
    assert missing == {"missing: triton needs a CUDA device"}
    assert [row.label for row in report.read_csv(path)][:2] == ["naive", "reference"]

    throughput.main(["--table", str(path), "--plot", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| 128 x 256 |" in out
    assert f"torch {torch.__version__}" in out
    assert out.rstrip().endswith("`")
    assert (tmp_path / "speedup.png").stat().st_size > 0
    assert (tmp_path / "width.png").stat().st_size > 0


def test_the_closing_table_of_the_gpu_day():
    pytest.importorskip("rich")
    from benchmarks import gpu_day
    from benchmarks.report import Row

    times = {"reference": 4.0, "fused": 2.0, "triton": 1.0, "lightly": 3.0, "fused+graph": 0.5}
    rows = [Row(name, False, 8, 4, "float32", "", "value_and_grad", median_ms=ms) for name, ms in times.items()]
    line = gpu_day.winners(rows).splitlines()[-1]
    assert line == "| 8 x 4 | triton, 1 ms; 2.00x before fused; 3.00x before lightly | - | fused, 0.5 ms |"
    assert gpu_day.rule(rows) == "triton is faster than fused by a tenth at 1 of 1 shapes"


def test_the_gpu_day_asks_for_a_gpu(tmp_path, capsys):
    pytest.importorskip("rich")
    from benchmarks import gpu_day

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu_day.main(["--out", str(tmp_path)])
    assert "rehearse with --device cpu --quick" in capsys.readouterr().err
