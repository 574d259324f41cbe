"""What the documents show runs, what they link to exists, their figures are on file, and the site can be built."""

import csv
import inspect
import operator
import os
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import rsd_loss
from rsd_loss import DecouplingProjector

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
TEXT = {name: (ROOT / name).read_text() for name in PAGES}
RESULTS = ROOT / "benchmarks" / "results"


def blocks(name):
    """(language, text, the comment right above or None) of each fenced block."""
    return re.findall(r"(?:<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", TEXT[name], re.DOTALL | re.MULTILINE)


def run_blocks(name, namespace):
    """A page's Python blocks run, one after the other; others are commands with a name, or say why they are not run."""
    for number, (comment, language, text) in enumerate(blocks(name)):
        if language == "python":
            assert max(map(len, text.splitlines())) <= 80, f"{name}, block {number} scrolls sideways"
        if comment.startswith(("not run: ", "printed by: ")) or language == "bibtex":
            continue
        if language == "python":
            exec(compile(text, f"{name}, block {number}", "exec"), namespace)
        else:
            assert comment.startswith("command: ") or text.startswith("pip install "), f"{name}, block {number}"


@pytest.mark.parametrize("name", sorted({*PAGES} - {"docs/integrations.md"}))
def test_blocks_run(name):
    if name == "README.md":
        pytest.importorskip("timm", reason="needs the bench extra")
    run_blocks(name, {"loader": [(torch.randn(4, 3, 224, 224), torch.randint(100, (4,)))]})


class Network(nn.Module):
    """Returns what networks of mdistiller do (logits, and a dictionary), or of RepDistiller (features, and logits)."""

    def __init__(self, width):
        super().__init__()
        self.body, self.fc = nn.Linear(12, width), nn.Linear(width, 10)

    def forward(self, x, is_feat=False):
        e = self.body(x)
        return ([x, e], self.fc(e)) if is_feat else (self.fc(e), {"feats": [x], "pooled_feat": e})


class Distiller(nn.Module):
    """Has what mdistiller's has."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def get_learnable_parameters(self):
        return list(self.student.parameters())


def test_mdistiller_and_repdistiller(monkeypatch):
    for module in ("mdistiller", "mdistiller.distillers", "mdistiller.distillers._base"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    sys.modules["mdistiller.distillers._base"].Distiller = Distiller
    torch.manual_seed(0)
    student, teacher, images, labels = Network(6), Network(8).eval(), torch.randn(9, 12), torch.randint(10, (9,))
    (feat_s, _), (feat_t, _) = (network(images, is_feat=True) for network in (student, teacher))
    lists = {"module_list": nn.ModuleList([student]), "trainable_list": nn.ModuleList([student])}
    page = {"opt": SimpleNamespace(distill="rsd"), "feat_s": feat_s, "feat_t": feat_t, **lists}
    run_blocks("docs/integrations.md", page)
    projected = page["trainable_list"][1](feat_s[-1])
    assert_close(page["loss_kd"], rsd_loss.rsd_loss(projected, feat_t[-1], kappa=0.0, reduction="mean"))

    distiller = page["RSD"](student, teacher, None)
    _, losses = distiller.forward_train(image=images, target=labels)
    projected = distiller.projector(student.body(images))
    expected = rsd_loss.rsd_loss(projected, teacher.body(images), kappa=0.0, reduction="mean")
    assert_close(losses["loss_kd"], 25 * expected)
    assert_close(losses["loss_ce"], F.cross_entropy(student(images)[0], labels))
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.get_learnable_parameters())
    assert {*distiller.projector.parameters()} < {*distiller.get_learnable_parameters()}
    assert all(parameter.grad is None for parameter in teacher.parameters())


BEFORE = """
import torch
from torch import nn
class Network(nn.Linear):
    def forward(self, x):
        return super().forward(x), x  # an embedding, and logits of 12 classes
student, teacher = Network(12, 192), Network(12, 768)
loader = [(torch.randn(8, 12), torch.randint(12, (8,)))] * 3
"""
AFTER = """
everyones = [torch.zeros(()) for _ in range(2)]
dist.all_gather(everyones, criterion(projected, target).detach())
trained = (model.module.projector.norm.weight != 1).all().item()
told = "same loss" if everyones[0] == everyones[1] else everyones
print(f"{told} {trained}\\n", end="")  # in one piece, as both processes write to one pipe
del loss
dist.destroy_process_group()
"""


def test_distributed_script(tmp_path):
    """The page's loop, with the page's command, in two processes that see different images."""
    (_, _, script), (_, _, command) = blocks("docs/distributed.md")
    (tmp_path / "train.py").write_text(BEFORE + script + AFTER)
    words = [sys.executable, "-m", "torch.distributed.run", *command.split()[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("same loss True") == 2, done


@pytest.mark.parametrize("name", PAGES)
def test_links_within_the_repository(name):
    made = {"index.md", "contributing.md", "changelog.md"}  # from the root's documents, when the site is built
    prose = re.sub(r"```.*?```", "", TEXT[name], flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert target in made or (ROOT / name).parent.joinpath(target).exists(), target


def test_readme_holds_on_a_registrys_page():
    """There a link has no repository to start from, and nothing draws equations."""
    assert "$$" not in TEXT["README.md"]
    home = re.search(r'^Source = "(\S+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    places = f"{home}/blob/main/", home.replace("github.com", "raw.githubusercontent.com") + "/main/"
    targets = re.findall(r"(?:\]\(|^\[\w+\]: )([^)#\s]+)", TEXT["README.md"], re.MULTILINE)
    assert len(targets) > 10
    for target in targets:
        assert target.startswith(places), target
        assert (ROOT / target.removeprefix(places[0]).removeprefix(places[1])).is_file(), target


def test_every_public_name_is_documented():
    documented = set(re.findall(r"^::: rsd_loss\.(\S+)$", TEXT["docs/api.md"], re.MULTILINE))
    public = set(rsd_loss.__all__) - {"diagnostics", "features"}
    for module in (rsd_loss.diagnostics, rsd_loss.features):
        name = module.__name__.removeprefix("rsd_loss.")
        own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
        public |= {f"{name}.{v.__name__}" for v in own if not v.__name__.startswith("_")}
    assert documented == public
    for name in public:
        text = inspect.getdoc(operator.attrgetter(name)(rsd_loss))
        assert re.search(r"\(B, |[Ss]calar", text), f"{name}: no shape"
        assert name.endswith(("Terms", "Summary")) or "Raises:" in text, name


def test_site(tmp_path):
    """By the command that a person types; in strict mode a broken link stops the build."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml", "rich"):
        pytest.importorskip(package, reason="needs the docs extra")
    command = [Path(sys.executable).with_name("mkdocs"), "build", "--quiet", "--site-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    site = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    for name, text in site.items():
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            assert not re.search(r"(src|href)=[\"']?(https?:)?//", tag), f"{name} loads from outside: {tag}"
        assert not re.search(r"arithmatex|<!-- (table|diff): ", text), name
    assert site["method.html"].count("<math") > 5
    assert "50176 x 384" in site["speed.html"]
    assert 'href="settings.html"' in site["index.html"]
    assert "/blob/main/docs" not in site["index.html"]
    assert "examples/with_timm.py" in site["integrations.html"]


def on_file(name):
    """The figures of a results file as pages write them: means over seeds, with their deviation, or 3 digits."""
    runs = {}
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            setting = tuple(
                line.get(key) for key in ("pair", "labelled", "method", "weight", "kappa", "epochs", "batch")
            )
            for column in ("validation", "test"):
                runs.setdefault((*setting, column), []).append(float(line.get(column) or 0))
            if line.get("mode") == "value_and_grad":
                for column, unit in (("median_ms", 1), ("peak_bytes", 1e6), ("sent_bytes", 1e6)):
                    yield f"{float(f'{float(line.get(column) or 0) / unit:.3g}'):g}"
    for values in runs.values():
        yield f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if values[1:] else "")


TABLES = {
    "README.md": ["throughput_cpu"],
    "docs/dense.md": ["distill", "dense"],
    "docs/segmentation.md": ["segment"],
    "docs/distributed.md": ["distributed_cpu"],
}


@pytest.mark.parametrize("page", TABLES)
def test_figures_in_tables_are_those_of_the_results(page):
    cells = "".join(re.findall(r"^\|[^|]+(\|.*\d.*)$", TEXT[page], re.MULTILINE))  # past the first column
    shown = set(re.findall(r"\d+(?:\.\d+)?(?: ± \d+\.\d)?", cells))
    assert len(shown) > 15
    assert shown <= {figure for name in TABLES[page] for figure in on_file(name)}


def test_digits_example(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the example needs the demo extra")
    picture = tmp_path / "digits.png"
    main = runpy.run_path(str(ROOT / "docs" / "examples" / "digits.py"))["main"]
    accuracies = main(["--seeds", "1", "--epochs", "2", "--width", "96", "--output", str(picture)])
    assert picture.stat().st_size > 10_000
    # The tenth part would be chance; two epochs teach the teacher something.
    assert accuracies["teacher, all labels"][0] > 50
    assert [len(values) for values in accuracies.values()] == [1, 1, 1, 1]
    printed = capsys.readouterr().out
    (shown,) = (text for comment, _, text in blocks("README.md") if comment.startswith("printed by: "))
    assert [line[:34] for line in shown.splitlines()] == [line[:34] for line in printed.splitlines()[1:6]]
    labels = re.findall(r"^\| ([\w ]+) \| -?\d\.\d\d \| \d\.\d\d \|", TEXT["docs/settings.md"], re.MULTILINE)
    assert len(labels) == 3
    assert all(f"\n{label}  " in printed for label in labels)


def test_large_batch_example():
    """Exact, and with the same random choices in both passes of an encoder that has dropout."""
    pytest.importorskip("sklearn", reason="the example needs the demo extra")
    example = runpy.run_path(str(ROOT / "docs" / "examples" / "large_batch.py"))
    assert example["main"]() < 1e-5  # float32
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.LayerNorm(32), nn.Linear(32, 8))
    modules = nn.ModuleList((encoder, DecouplingProjector(8, 12), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))))
    data = torch.randn(500, 16), torch.randint(3, (500,)), torch.randn(500, 12)
    results = []
    for step, last in (("whole", ()), ("accumulate", (100,))):
        modules.zero_grad()
        torch.manual_seed(1)
        first = encoder if last else lambda x: torch.cat([encoder(part) for part in x.split(100)])
        example[step](first, *modules[1:], *data, *last)
        results.append([*(p.grad.clone() for p in modules.parameters()), torch.rand(1)])  # where chance is afterwards
    assert_close(*results, rtol=1e-4, atol=1e-5)  # float32
