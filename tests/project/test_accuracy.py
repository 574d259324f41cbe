"""The accuracy benchmark: its losses against slow formulas, and a run of every method on a few random images."""

import csv
import math
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs the bench extra")
pytest.importorskip("rich", reason="needs the bench extra")
from PIL import Image

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import cache, classification, data, distilling, losses, methods, ofa, probe, redundancy
from rsd_loss import rsd_loss

T = 4.0


def softmax(logits, temperature=1.0):
    """Of one row, in Python's floats."""
    powers = [math.exp(x / temperature) for x in logits.tolist()]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.fixture
def batch():
    """Logits of a student and a teacher for six samples of five classes, and labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(5, (6,), generator=generator)


def slow_dkd(student, teacher, label):
    def split(logits):
        p = softmax(logits, T)
        rest = 1 - p[label]
        return [p[label], rest], [x / rest for i, x in enumerate(p) if i != label]

    (binary_s, others_s), (binary_t, others_t) = split(student), split(teacher)
    return T**2 * (kl(binary_t, binary_s) + 8 * kl(others_t, others_s))


def test_kd(batch):
    student, teacher, _ = batch
    expected = np.mean([T**2 * kl(softmax(t, T), softmax(s, T)) for s, t in zip(student, teacher, strict=True)])
    assert losses.kd(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_dkd(batch):
    expected = np.mean([slow_dkd(s, t, int(y)) for s, t, y in zip(*batch, strict=True)])
    assert losses.dkd(*batch).item() == pytest.approx(expected, rel=1e-9)


def test_dist(batch):
    student, teacher, _ = batch
    s, t = (np.array([softmax(row, T) for row in x]) for x in (student, teacher))
    between = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    within = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    expected = T**2 * (2 * between + 3 * within)
    assert losses.dist(student, teacher, gamma=3.0).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_ofa(batch, gamma):
    expected = []
    for student, teacher, label in zip(*batch, strict=True):
        p_s, p_t = softmax(student), softmax(teacher)
        of_label = ((1 + p_t[label]) ** gamma - 1) * math.log(p_s[label])
        expected.append(-of_label - sum(p_t[i] ** gamma * math.log(p_s[i]) for i in range(5) if i != label))
    assert losses.ofa(*batch, gamma=gamma).item() == pytest.approx(np.mean(expected), rel=1e-9)


def test_sdd():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 6, 5, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (6,), generator=generator)
    total, complementary = 0.0, 0
    for s, t, y in zip(student, teacher, labels, strict=True):
        whole = t.mean(dim=(1, 2)).argmax()
        for size in (4, 2):
            for top in range(0, 4, size):
                for left in range(0, 4, size):
                    cell = (slice(None), slice(top, top + size), slice(left, left + size))
                    cell_s, cell_t = s[cell].mean(dim=(1, 2)), t[cell].mean(dim=(1, 2))
                    other = cell_t.argmax() != whole
                    complementary += int(other)
                    total += (2 if other else 1) * slow_dkd(cell_s, cell_t, int(y)) / len(labels)
    assert 0 < complementary < 30
    assert losses.sdd(student, teacher, labels).item() == pytest.approx(total, rel=1e-9)


def test_methods_add_up_by_their_weights(batch):
    student, teacher = (methods.Outputs(x, x, []) for x in batch[:2])
    setup = methods.Setup(student, teacher, nn.Identity(), nn.Identity(), 0.3)
    total = methods.together(setup, nn.ModuleList(), weights={"kd": 2.0, "rsd_logits": 0.1})(student, teacher, batch[2])
    expected = 2 * losses.kd(*batch[:2]) + 0.1 * rsd_loss(*batch[:2], kappa=0.3)
    torch.testing.assert_close(total, expected)


def test_merged_patches_are_neighbours():
    rearrange = ofa._merge_patches(1, 4, side=4)[0]
    merged = rearrange(torch.arange(16.0).view(1, 16, 1))
    assert merged[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_views_are_padded_crops_and_flipped_ones():
    image = torch.randint(4, 255, (1, 3, 24, 32), dtype=torch.uint8)
    plain, flipped = (data.shift(image, torch.tensor([[4, 4, flip]])) for flip in (0, 1))
    assert torch.equal(plain, image)
    assert torch.equal(flipped, image.flip(3))
    moved = data.shift(image, torch.tensor([[4, 7, 0]]), fill=3)
    assert torch.equal(moved[..., :-3], image[..., 3:])
    assert (moved[..., -3:] == 3).all()


def test_the_first_classes_of_cifar(tmp_path):
    """In the order of a folder of images: by class, then by name."""
    pixels = np.random.default_rng(0).integers(0, 255, (5, 3 * 32 * 32), dtype=np.uint8)
    raw = {"data": pixels, "fine_labels": [1, 0, 2, 0, 1], "filenames": ["d", "z", "a", "b", "c"]}
    (tmp_path / "train").write_bytes(pickle.dumps(raw))
    images, labels = data.first_classes(tmp_path / "train", 2)
    assert labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(images.flatten(1).numpy(), pixels[[3, 1, 4, 0]])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 14), ("test", 4)):
        for label in "abc":
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """Runs the benchmark for one epoch and returns the lines of its CSV, to which later calls add."""
    folder = tmp_path_factory.mktemp("results")

    def call(*options, name="runs.csv"):
        always = ("--epochs", "1", "--teacher-epochs", "1", "--batches", "16", "--views", "2", "--seeds", "0")
        places = ("--data", str(images), "--cache", str(folder), "--csv", str(folder / name))
        command.main(["classification", *places, *always, *options])
        with (folder / name).open(newline="") as file:
            return list(csv.DictReader(file))

    return call


def test_every_method_runs_once(run):
    every = [name for name in methods.METHODS if name not in classification.refused]
    lines = run("--pairs", "cnn_cnn", "--methods", *every)
    assert [line["method"] for line in lines] == ["teacher", *every]
    by_method = {line["method"]: line for line in lines}
    for line in lines:
        assert 0 <= float(line["validation"]) <= 100
        assert 0 <= float(line["test"]) <= 100
        assert float(line["step_ms"]) > 0
        assert (line["kappa"] == "") == ("rsd" not in line["method"])
        assert all(line[name] for name in ("device", "torch", "commit", "date"))
        assert line["command"].startswith("python -m benchmarks.accuracy classification --data images")
    assert float(by_method["rsd_kappa0"]["kappa"]) == 0
    # 128 wide student, 256 wide teacher: Linear, BatchNorm, Linear.
    assert int(by_method["rsd"]["added_parameters"]) == 128 * 256 + 2 * 256 + 256 * 256
    for name in ("none", "kd", "dkd", "dist", "sdd", "rsd_logits"):
        assert int(by_method[name]["added_parameters"]) == 0
    assert run("--pairs", "cnn_cnn", "--methods", *every) == lines, "what has been run is not run again"
    more = run("--pairs", "cnn_cnn", "--methods", "rsd", "--weights", "0.1", "0.3", "--kappas", "0.01", "0.1")
    settings = [(line["weight"], line["kappa"]) for line in more[len(lines) :]]
    assert settings == [("0.1", "0.1"), ("0.3", "0.01"), ("0.3", "0.1")]


def test_transformer_teacher_is_taught_by_a_cnn(run):
    lines = run("--pairs", "vit_cnn", "--methods", "none", "--bfloat16", name="vit.csv")
    found = [(line["pair"], line["method"], line["weight"], line["precision"]) for line in lines]
    assert found == [("vit", "teacher", "9", "bfloat16"), ("vit_cnn", "none", "0", "bfloat16")]


def on_noise(folder, method, pair="cnn_cnn", labels=None, **settings):
    bench = probe.bench("classification", folder)
    if labels is not None:
        bench.data.train = bench.data.train._replace(labels=labels)
    return distilling.distil(bench, probe.short_run(pair, method, **settings))


def test_the_term_teaches_by_its_weight(tmp_path):
    alone, weightless, taught = (
        list(on_noise(tmp_path, method, weight=weight)[1].parameters())
        for method, weight in (("none", 0.0), ("rsd", 0.0), ("rsd", 1.0))
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, weightless, strict=True))
    assert not torch.equal(alone[0], taught[0])


def test_labels_held_back_teach_nothing(tmp_path):
    labels = torch.arange(16) % 5
    others = torch.where(torch.arange(16) % 4 == 0, labels, 4 - labels)
    found = [on_noise(tmp_path, "none", labels=y, labelled=4)[0] for y in (labels, others, 4 - labels)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_stopped_run_goes_on_from_its_last_epoch(tmp_path, monkeypatch):
    """As if it had not been stopped, to the last bit. The views and a weight that grows are part of that."""

    def short(folder):
        return on_noise(tmp_path / folder, "dkd", pair="small_cnn_coarse", epochs=3, warmup=0.9)[0]

    def stop(state, path):
        cache.write(state, path)
        if path.suffix == ".run" and state["log"][0] == 2:
            raise KeyboardInterrupt

    whole = short("whole")
    assert len(whole) == 3 * 2
    with monkeypatch.context() as patched:
        patched.setattr("benchmarks.accuracy.training.write", stop)
        with pytest.raises(KeyboardInterrupt):
            short("stopped")
    torch.rand(5)  # whatever else happens in between
    assert short("stopped") == whole
    assert not list(tmp_path.rglob("*.run")), "a run that is over leaves no checkpoint"


def test_the_splits_do_not_overlap(run, images, tmp_path):
    words = ["classification", "--data", str(images), "--cache", str(tmp_path), "--views", "1"]
    found = classification.load(command.parse(words), torch.device("cpu"))
    splits = (found.train, found.validation, found.test)
    assert [len(split.labels) for split in splits] == [38, 4, 12]
    assert len(torch.cat([split.images for split in splits]).flatten(1).unique(dim=0)) == 38 + 4 + 12
    assert found.classes == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "rsd_dense:grid=2"], "rsd_dense has no such settings as 'grid=2': got an unexpected keyword"),
        (["--labelled", "8", "--methods", "dkd"], "dkd needs one label for every image: leave out it or --labelled"),
        (["--csv", "notes"], "--csv: notes has other columns"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(images, words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("no runs\n")
    with pytest.raises(SystemExit) as caught:
        command.main(["classification", "--data", str(images), "--cache", ".", "--csv", "runs.csv", *words])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_a_teacher_spread_over_more_features():
    """The covariance of the wide one has as many eigenvalues of 1 as there are directions, and zeros."""
    features = torch.randn(5000, 20) @ torch.randn(20, 20)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(redundancy.spread(features, width=16, directions=4).T))
    torch.testing.assert_close(eigenvalues, torch.tensor([0.0] * 12 + [1.0] * 4), rtol=0, atol=1e-3)  # float32


def test_kappa_follows_the_redundancy(images, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the pretrained extra")
    places = ["--data", str(images), "--cache", str(tmp_path), "--csv", str(tmp_path / "runs.csv")]
    few = ["--seeds", "0", "--batch", "16", "--epochs", "1", "--teacher-epochs", "1", "--kappa-r", "0", "0.1"]
    teachers, names = ["resnet_small", "raw1280", "adapted8", "spread96"], ["none", "rsd", "rsd_both"]
    redundancy.main([*places, *few, "--teachers", *teachers, "--methods", *names])
    lines, told = (list(csv.DictReader(path.open(newline=""))) for path in sorted(tmp_path.glob("runs*.csv")))
    assert [line["features"] for line in told] == ["128", "1280", "8", "96"]
    assert len(lines) == 4 * (1 + 2 + 2)
    found = {line["teacher"]: float(line["redundancy"]) for line in told}
    for line in lines:
        if line["method"] != "none" and float(line["kappa"]):
            assert float(line["kappa"]) * found[line["teacher"]] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("plot", ["gain", "redundancy"])
def test_plots_are_drawn(tmp_path, plot):
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    from benchmarks.accuracy import plots

    getattr(plots, plot)(tmp_path / "plot.png")
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 1
