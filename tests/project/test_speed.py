import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import pair

from rsd_loss import rsd_loss

pytest.importorskip("timm", reason="needs the bench extra")
from benchmarks import __main__ as bench
from benchmarks import records
from benchmarks.speed import contestants, gpu_day, measure, processes, report
from benchmarks.speed.report import Row

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SIZE = 4  # all processes of the pool


def rows_of(times, **columns):
    settings = {"compiled": False, "rows": 8, "features": 4, "dtype": "float32", "autocast": ""} | columns
    return [Row(name, mode="value_and_grad", median_ms=ms, limit_ms=0.1, **settings) for name, ms in times.items()]


@pytest.mark.parametrize(("rows", "features"), [(16, 24), (24, 16)])
def test_naive_is_the_same_loss(rows, features):
    teacher = torch.randn(rows, features, dtype=torch.float64)
    student = (torch.randn(rows, features, dtype=torch.float64) + teacher).requires_grad_()
    expected = rsd_loss(student, teacher, kappa=contestants.KAPPA, implementation="reference")
    (expected_grad,) = torch.autograd.grad(expected, student)
    for name in ("naive", "reference", "fused"):
        actual = contestants.build(name, student.device, compiled=False)(student, teacher)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, student)[0], expected_grad)


def test_measures_of_a_known_step():
    a = torch.randn(256, 128, requires_grad=True)
    b = torch.randn(128, 512)

    def step():
        return torch.autograd.grad((a @ b).relu().sum(), a)

    # Forward holds the product and its relu at a time, backward the relu and the gradient before it.
    product = 256 * 512 * 4
    peak = measure.peak_bytes(step, CPU)
    assert 2 * product <= peak <= 2 * product + 4096, peak  # and a few scalars
    # Forward: mm, relu, sum. Backward: the seed, threshold_backward, mm; t() and expand() are views.
    assert measure.operations(step, CPU, compiled=False) == 6
    assert measure.operations(step, CPU, compiled=True) is None


def test_limit():
    rates = measure.Rates(matmul=1e9, copy=1e9)
    assert rates.limit(128, 768, "value_and_grad", 4) == pytest.approx(4 * 128 * 768 * 128 / 1e9)
    assert rates.limit(768, 128, "value", 4) == pytest.approx(2 * 768 * 128**2 / 1e9)
    fast = measure.Rates(matmul=1e15, copy=1e9)
    assert fast.limit(128, 768, "value_and_grad", 2) == pytest.approx(3 * 128 * 768 * 2 / 1e9)


def test_a_contestant_that_fails_is_reported(monkeypatch):
    def build(name, device, compiled):
        return lambda student, teacher: torch.empty(2**60) if name == "naive" else student.sum() / 0

    rows = [Row(name, False, 4, 4, "float32", "", "value") for name in ("naive", "fused")]
    monkeypatch.setattr(contestants, "build", build)
    bench.run_case(rows, CPU, 1e-3)
    assert [row.status for row in rows] == ["out of memory", "ok"]
    assert rows[0].median_ms is None
    large = [Row(name, False, 2**30, 2**29, "float32", "", "value") for name in ("naive", "fused")]
    bench.run_case(large, CPU, 1e-3)
    assert [row.status for row in large] == ["out of memory"] * 2


def test_the_microbenchmark_its_table_and_plot(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "SECONDS", 0.005)
    path = tmp_path / "new" / "a.csv"
    command = "python -m benchmarks --shapes 128x64 16x256 --value"
    bench.main(["--shapes", "128x64", "16x256", "--value", "--csv", str(path), "--plot", str(tmp_path / "plot.png")])
    out = capsys.readouterr().out
    assert "128 x 64, value" in out
    assert "needs CUDA tensors" in out
    rows = records.read_csv(path, Row)
    assert len(rows) == 2 * 2 * len(contestants.NAMES)
    for row in rows:
        if row.contestant in ("naive", "reference", "fused"):
            assert row.status == "ok"
            assert min(row.median_ms, row.limit_ms, row.peak_bytes, row.operations) > 0
            assert row.threads == torch.get_num_threads()
            assert row.command == f"{command} --csv {path} --plot {tmp_path / 'plot.png'}"
    assert {row.status[:8] for row in rows if row.contestant == "triton"} == {"missing:"}
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def printed(table):
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_table_has_whole_names_at_80_columns():
    status = "RuntimeError: no/such/file/whose/name/is/longer/than/a/column.so cannot be loaded"
    rows = rows_of({"naive": 62300.0}, rows=100_000, features=10_000)
    rows += rows_of({"reference": 12300.0, "fused": None}, rows=100_000, features=10_000, compiled=True)
    rows[2].status, rows[0].peak_bytes = status, 2_500_000_000
    out = printed(report.table(rows))
    assert "100000 x 10000" in out
    assert "reference + compile" in out
    assert "5.07x" in out
    assert "…" not in out


def test_markdown_by_hand():
    times = {"naive": 8.0, "reference": 4.0, "lightly": 3.0, "fused": 2.0}
    rows = rows_of(times) + rows_of({"naive": 5.0, "fused": 1.0}, compiled=True) + rows_of(times, rows=9)
    rows[0].peak_bytes, rows[3].peak_bytes = 4_000_000, 1_000_000
    table = report.markdown(rows).splitlines()
    assert "| 8 x 4 | 2 | 4x | 1.5x (lightly) | 5x | 1 / 4 |" in table
    assert "| 9 x 4 | 2 | 4x | 1.5x (lightly) | - | - / - |" in table


def test_committed_results_are_read():
    for name, shapes in (("throughput_cpu", 13), ("throughput_cpu_bfloat16", 6)):
        rows = records.read_csv(records.RESULTS / f"{name}.csv", Row)
        lines = report.markdown(rows).splitlines()
        assert len([line for line in lines if re.match(r"\| \d+ x \d+ \| [\d.]+ \| [\d.]+x \|", line)]) == shapes
        assert rows[0].commit in lines[-1]
    rows = records.read_csv(records.RESULTS / "distributed_cpu.csv", processes.Row)
    assert "| 4 | 128 x 768 | 85.6 | 61.5 | 65.5 | 0.94x | 3.54 / 2.49 | 12.1 / 3.81 |" in processes.markdown(rows)


def on_paper(rows, features, processes, itemsize, grad):
    """Bytes that each contestant sends per process and step, `rows` of the batch being in each process."""
    batch, others, sums, exchanged = rows * processes, processes - 1, max(itemsize, 4), 0
    if features <= batch:  # means in float64, squares, P; the upstream, and for half precision the column sums
        summed = 16 * features + (2 * features + features**2 + grad * (1 + (itemsize < 4)) * features) * sums
    else:  # both embeddings, and the student's gradient back; K, the three vectors of the result and their gradient
        exchanged = (2 + grad) * rows * features * itemsize
        summed = (batch**2 + (1 + grad) * 3 * features) * sums
    gathered = (2 + grad) * rows * features * itemsize * others  # embeddings, and the student's gradient
    # The processes tell each other 16 numbers of 8 bytes first. A ring sends a sum twice, less each process's share.
    ours = 16 * 8 * others + round((exchanged + 2 * summed) * others / processes)
    return {"gather+reference": gathered, "gather+fused": gathered, "distributed": ours}


def sends_as_on_paper(rank, group, rows, features, dtype, mode):
    student, teacher = (x[rank * rows :][:rows].clone() for x in pair(SIZE * rows, features, dtype))
    student.requires_grad_()
    first, found = None, {}
    for name in contestants.DISTRIBUTED:
        row = processes.Row(name, SIZE, rows, features, str(dtype), "", mode)
        with processes.SentBytes() as sent:
            out = measure.make_step(row, student, teacher)()
        found[name] = round(processes.over_processes(sent.count, torch.distributed.ReduceOp.SUM) / SIZE)
        if dtype == torch.float64:  # they compute the same loss
            first = out if first is None else first
            torch.testing.assert_close(out, first)
    assert found == on_paper(rows, features, SIZE, dtype.itemsize, mode == "value_and_grad")


@pytest.mark.parametrize("mode", ["value_and_grad", "value"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [15, 16, 17, 50])  # of 16 rows in all
def test_sends_as_on_paper(pool, features, dtype, mode):
    pool.run(SIZE, sends_as_on_paper, 4, features, dtype, mode)


def test_several_processes(monkeypatch):
    rows = processes.run(2, [(16, 24), (16, 100)], {"device": "here"})
    assert [row.contestant for row in rows] == [*contestants.DISTRIBUTED] * 2
    for row in rows:
        assert (row.status, row.processes, row.threads, row.device) == ("ok", 2, 1, "here")
        assert min(row.median_ms, row.peak_bytes) > 0
        assert row.sent_bytes == on_paper(row.rows, row.features, 2, 4, True)[row.contestant]
    out = printed(processes.table(rows))
    assert out.count("gather+reference") == 2
    assert "…" not in out


def test_a_rehearsal_of_the_gpu_run(tmp_path):
    """All steps on the CPU, with Triton's interpreter in place of its compiler; a budget that leaves some cells out."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.speed.gpu_day", "--rehearse", "--tune", "--budget", "45"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line[9:] for line in done.stdout.splitlines()]
    assert sum(re.match(r"exact: .* (fused|triton): right", line) is not None for line in lines) == 4
    assert "WRONG" not in done.stdout
    for step, found in (("tests", "passed|cut short"), ("eager", "triton: .* ms"), ("compiled", "fused .* ms")):
        assert any(re.match(f"{step}: .*({found})", line) for line in lines), (step, done.stdout)
    (path,) = tmp_path.glob("*.csv")
    rows = records.read_csv(path, Row)
    assert {"naive", "fused", "triton"} <= {row.contestant for row in rows if row.median_ms}
    assert "Suggested for auto: fused where inputs are wide and fused where inputs are tall" in done.stdout


def test_the_summary_of_the_gpu_run():
    fast = rows_of({"reference": 4.0, "fused": 2.0, "triton": 1.0, "lightly": 3.0, "fused+graph": 0.5})
    line = (
        "| 8 x 4 | float32 | triton wins, 1 ms, fused 2.00x as long, lightly 3.00x as long | - | fused wins, 0.5 ms |"
    )
    assert line in gpu_day.summary(fast).splitlines()
    slow = rows_of({"fused": 1.0, "triton": 1.2}, rows=4, features=8)
    assert "auto: fused where inputs are wide and triton where inputs are tall" in gpu_day.summary(fast + slow)
    assert "auto: fused where inputs are wide and fused where inputs are tall" in gpu_day.summary(slow[:1])


# A command, what somebody asks of it, and how its answer begins. {folder} is a folder, {file} is no table.
MISTAKES = [
    ("__main__", ["--shapes", "1x192"], "argument --shapes: '1x192'"),
    ("__main__", ["--csv", "{folder}"], "argument --csv: '{folder}'"),
    ("__main__", ["--device", "cuda"], "argument --device: torch finds no CUDA device"),
    ("speed.processes", ["--nproc", "2", "1"], "argument --nproc: '1'"),
    ("speed.processes", ["--csv", "{file}/a.csv"], "argument --csv: '{file}/a.csv'"),
    ("speed.gpu_day", ["--out", "{folder}"], "torch finds no CUDA device"),
    ("speed.gpu_day", ["--out", "{file}", "--rehearse"], "argument --out: "),
]


@pytest.mark.parametrize(("name", "argv", "answer"), MISTAKES)
def test_mistakes_get_one_sentence_before_any_work(name, argv, answer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    places = {"file": str(tmp_path / "file"), "folder": str(tmp_path / "folder")}
    (tmp_path / "file").write_text("no table\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main([word.format(**places) for word in argv])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    message = err.partition(": error: ")[2]
    assert message.startswith(answer.format(**places)), err
    assert message.count("\n") == 1
    assert not out
    assert len(list(tmp_path.rglob("*"))) == 2
