import csv

import pytest
import torch
from conftest import pair
from pool import SIZE

from benchmarks import rivals
from rsd_loss import rsd_loss


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


def test_quick_run(tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from benchmarks import report, throughput

    path = tmp_path / "results" / "throughput.csv"
    throughput.main(["--quick", "--csv", str(path), "--plot", str(tmp_path)])
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
    assert {line["status"] for line in lines if line["contestant"] == "triton"} == {
        "missing: triton needs a CUDA device"
    }
    assert [row.label for row in report.read_csv(path)][:2] == ["naive", "reference"]
    assert (tmp_path / "speedup.png").stat().st_size > 0
    assert (tmp_path / "width.png").stat().st_size > 0

    capsys.readouterr()
    throughput.main(["--table", str(path)])
    out = capsys.readouterr().out
    assert "| 128 x 256 |" in out
    assert f"torch {torch.__version__}" in out
    assert out.rstrip().endswith("`")


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


def test_contestants_of_the_other_benchmark_are_refused(capsys):
    pytest.importorskip("rich")
    from benchmarks import throughput

    for argv in (["--contestants", "distributed"], ["--nproc", "2", "--contestants", "naive"]):
        with pytest.raises(SystemExit):
            throughput.main(["--quick", *argv])
        assert f"{argv[-1]}: not with" in capsys.readouterr().err
