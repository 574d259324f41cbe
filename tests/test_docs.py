"""What the documents show runs: the README's snippets and commands, and the example."""

import re
import runpy
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_within_the_repository(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def test_readme_table_is_that_of_the_results():
    report = pytest.importorskip("benchmarks.report", reason="needs the bench extra")
    table = report.markdown(report.read_csv(ROOT / "benchmarks" / "results" / "throughput_cpu.csv"))
    assert table.strip() in README


def test_digits_example(tmp_path):
    pytest.importorskip("sklearn", reason="the example needs the demo extra")
    picture = tmp_path / "digits.png"
    main = runpy.run_path(str(ROOT / "docs" / "examples" / "digits.py"))["main"]
    accuracies = main(["--seeds", "1", "--epochs", "2", "--output", str(picture)])
    assert picture.stat().st_size > 10_000
    # The tenth part would be chance; two epochs teach the teacher something.
    assert accuracies["teacher"][0] > 50
    assert [len(values) for values in accuracies.values()] == [1, 1, 1, 1]
