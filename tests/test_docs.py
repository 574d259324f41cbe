"""What the documents show runs: the README's snippets and commands, and the example."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from rsd_loss import DecouplingProjector

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippet(number):
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})


@pytest.mark.parametrize("name", ["demo", "test"])
def test_readme_command_is_one_line_in_a_block(name):
    (command,) = re.findall(rf"<!-- command: {name} -->\n```\n([^\n]+)\n```\n", README)
    assert command.startswith("python3 -m venv .venv && ")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/fast-path.md", "docs/distributed.md", "docs/evidence.md"]
)
def test_links_within_the_repository(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_readme_table_is_that_of_the_results():
    report = pytest.importorskip("benchmarks.report", reason="needs the bench extra")
    table = report.markdown(report.read_csv(ROOT / "benchmarks" / "results" / "throughput_cpu.csv"))
    assert table.strip() in README


def test_distributed_tables_are_those_of_the_results():
    report = pytest.importorskip("benchmarks.report", reason="needs the bench extra")
    distributed = pytest.importorskip("benchmarks.distributed", reason="needs the bench extra")
    page = (ROOT / "docs" / "distributed.md").read_text()
    rows = report.read_csv(ROOT / "benchmarks" / "results" / "distributed_cpu.csv", distributed.Row)
    assert distributed.markdown(rows) in page
    assert distributed.markdown_on_paper() in page


def test_evidence_tables_are_those_of_the_results():
    distill = pytest.importorskip("benchmarks.distill", reason="needs the bench extra")
    overhead = pytest.importorskip("benchmarks.overhead", reason="needs the bench extra")
    page = (ROOT / "docs" / "evidence.md").read_text()
    assert distill.markdown(ROOT / "benchmarks" / "results" / "distill.csv") in page
    assert overhead.markdown(ROOT / "benchmarks" / "results" / "overhead.csv") in page


def test_digits_example(tmp_path):
    pytest.importorskip("sklearn", reason="the example needs the demo extra")
    picture = tmp_path / "digits.png"
    main = runpy.run_path(str(ROOT / "docs" / "examples" / "digits.py"))["main"]
    accuracies = main(["--seeds", "1", "--epochs", "2", "--output", str(picture)])
    assert picture.stat().st_size > 10_000
    # The tenth part would be chance; two epochs teach the teacher something.
    assert accuracies["teacher"][0] > 50
    assert [len(values) for values in accuracies.values()] == [1, 1, 1, 1]


def test_large_batch_example():
    pytest.importorskip("sklearn", reason="the example needs the demo extra")
    example = runpy.run_path(str(ROOT / "docs" / "examples" / "large_batch.py"))
    assert example["main"]() < 1e-5  # float32


def test_large_batch_repeats_random_choices_in_less_memory():
    pytest.importorskip("sklearn", reason="the example needs the demo extra")
    measure = pytest.importorskip("benchmarks.measure", reason="the benchmarks are in a checkout only")
    example = runpy.run_path(str(ROOT / "docs" / "examples" / "large_batch.py"))
    torch.manual_seed(0)
    # Normalisation over the batch has no place in an encoder that sees a part of it.
    encoder = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(256), nn.Linear(256, 8))
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))
    modules = nn.ModuleList((encoder, DecouplingProjector(8, 12), head))
    images, labels, teacher = torch.randn(1000, 16), torch.randint(3, (1000,)), torch.randn(1000, 12)

    class InParts(nn.Module):
        """The encoder in micro-batches, which all stay in memory: the same random choices in the same order."""

        def forward(self, images):
            return torch.cat([encoder(part) for part in images.split(100)])

    results, peaks = [], []
    for step, first, settings in (("whole", InParts(), {}), ("accumulate", encoder, {"micro_batch": 100})):

        def run(step=step, first=first, settings=settings):
            modules.zero_grad()
            torch.manual_seed(1)
            example[step](first, *modules[1:], images, labels, teacher, **settings)

        run()
        results.append([*(parameter.grad.clone() for parameter in modules.parameters()), torch.rand(1)])
        peaks.append(measure.peak_bytes(run, images.device))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)  # the last: where the random numbers are afterwards
    assert peaks[1] < peaks[0] / 3, peaks
