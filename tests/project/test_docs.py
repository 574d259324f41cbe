"""What the documents show runs, what they link to exists, and the site can be built."""

import inspect
import operator
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rsd_loss
from rsd_loss import DecouplingProjector

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page):
    """(language, text, the comment right above or None) of each fenced block."""
    text = (ROOT / page).read_text()
    return re.findall(r"(?:<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


class Network(nn.Module):
    """Stands for a reader's own: an embedding and logits."""

    def __init__(self, width):
        super().__init__()
        self.body, self.head = nn.Linear(12, width), nn.Linear(width, 10)

    def forward(self, images):
        embedding = self.body(images)
        return embedding, self.head(embedding)


def readers_own():
    batches = [(torch.randn(8, 12), torch.randint(10, (8,))) for _ in range(2)]
    return {"student": Network(192), "teacher": Network(768).eval(), "loader": batches}


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page):
    """A page's Python blocks run, one after the other; others are commands with a name, or say why they are not run."""
    namespace = readers_own() if page == "README.md" else {}
    for number, (comment, language, text) in enumerate(blocks(page)):
        if comment.startswith("not run: "):
            continue
        if language == "python":
            exec(compile(text, f"{page}, block {number}", "exec"), namespace)
        else:
            assert comment.startswith("command: ") or text.startswith("pip install "), f"{page}, block {number}"


@pytest.mark.parametrize("name", ["demo", "test"])
def test_readme_command_is_one_line_in_a_block(name):
    (command,) = re.findall(rf"<!-- command: {name} -->\n```\n([^\n]+)\n```\n", README)
    assert command.startswith("python3 -m venv .venv && ")


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository(page):
    made = {"index.md", "contributing.md", "changelog.md"}  # from the root's documents, when the site is built
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert target in made or (ROOT / page).parent.joinpath(target).exists(), target


def test_every_public_name_is_documented():
    page = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^::: rsd_loss\.(\S+)$", page, re.MULTILINE))
    public = set(rsd_loss.__all__) - {"diagnostics", "features"}
    for module in (rsd_loss.diagnostics, rsd_loss.features):
        name = module.__name__.removeprefix("rsd_loss.")
        own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
        public |= {f"{name}.{v.__name__}" for v in own if not v.__name__.startswith("_")}
    assert documented == public
    for name in public:
        text = inspect.getdoc(operator.attrgetter(name)(rsd_loss))
        assert re.search(r"\(B, |[Ss]calar", text), f"{name}: no shape"
        if not name.endswith(("Terms", "Summary")):
            assert "Raises:" in text, name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; in strict mode a broken link stops the build."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml", "rich"):
        pytest.importorskip(package, reason="needs the docs extra")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    return {path.name: path.read_text() for path in folder.glob("*.html")}


def test_site_loads_nothing_from_outside(site):
    for name, text in site.items():
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            assert not re.search(r"(src|href)=[\"']?(https?:)?//", tag), f"{name}: {tag}"


def test_site_has_no_raw_equation_or_placeholder(site):
    assert site["method.html"].count("<math") > 5
    for name, text in site.items():
        assert "arithmatex" not in text, name
        assert not re.search(r"<!-- (table|diff): ", text), name


def test_site_shows_the_results(site):
    assert "50176 x 384" in site["benchmarks.html"]
    for path in sorted((ROOT / "docs" / "examples").glob("with_*.py")):
        assert f"examples/{path.name}" in site["integrations.html"]


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
    evidence = pytest.importorskip("benchmarks.evidence", reason="needs the bench extra")
    overhead = pytest.importorskip("benchmarks.overhead", reason="needs the bench extra")
    page = (ROOT / "docs" / "evidence.md").read_text()
    names = ("distill", "distill_steps", "sensitivity")
    lines, steps, settings = (evidence.read(evidence.RESULTS / f"{name}.csv") for name in names)
    for pair in evidence.pairs(lines):
        assert evidence.markdown(lines, pair, steps) in page
    assert evidence.origin(lines) in page
    assert evidence.origin(steps) in page
    assert evidence.origin(settings) in page
    assert evidence.tuning(settings, *evidence.TUNED) in page
    assert overhead.markdown(evidence.RESULTS / "overhead.csv") in page
    page, dense = (ROOT / "docs" / "features.md").read_text(), evidence.read(evidence.RESULTS / "dense.csv")
    for pair in ("small_cnn_coarse", "small_cnn_vit", "vit_cnn", "cnn_cnn"):
        assert evidence.variants(dense, pair) in page
    assert evidence.origin(dense) in page
    scenes = evidence.read(evidence.RESULTS / "segment.csv")
    assert evidence.scenes(scenes, "8") in page
    for pair in ("cnn_vit", "vit_cnn"):
        assert evidence.variants(scenes, pair, "8") in page
        assert evidence.variants(scenes, pair) in page
    assert evidence.origin(scenes, "benchmarks.segment") in page
    page, width = (ROOT / "docs" / "settings.md").read_text(), evidence.read(evidence.RESULTS / "width.csv")
    assert evidence.widths(width) in page
    assert evidence.origin(width) in page


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
