"""The distillation benchmark: its losses against slow formulas, and a run of every method on a few random images."""

import csv
import itertools
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs the bench extra")
pytest.importorskip("rich", reason="needs the bench extra")
from PIL import Image

from benchmarks import distill, evidence, methods, segment
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


def slow_dkd(student, teacher, label, alpha=1.0, beta=8.0):
    def split(logits):
        p = softmax(logits, T)
        rest = 1 - p[label]
        return [p[label], rest], [x / rest for i, x in enumerate(p) if i != label]

    (binary_s, others_s), (binary_t, others_t) = split(student), split(teacher)
    return T**2 * (alpha * kl(binary_t, binary_s) + beta * kl(others_t, others_s))


def test_kd(batch):
    student, teacher, _ = batch
    expected = np.mean([T**2 * kl(softmax(t, T), softmax(s, T)) for s, t in zip(student, teacher, strict=True)])
    assert methods.kd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_dkd(batch):
    expected = np.mean([slow_dkd(s, t, int(y)) for s, t, y in zip(*batch, strict=True)])
    assert methods.dkd_loss(*batch).item() == pytest.approx(expected, rel=1e-9)


def test_dist(batch):
    student, teacher, _ = batch
    s, t = (np.array([softmax(row, T) for row in x]) for x in (student, teacher))
    between = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    within = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    expected = T**2 * (2 * between + 3 * within)
    assert methods.dist_loss(student, teacher, gamma=3.0).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_ofa(batch, gamma):
    expected = []
    for student, teacher, label in zip(*batch, strict=True):
        p_s, p_t = softmax(student), softmax(teacher)
        of_label = ((1 + p_t[label]) ** gamma - 1) * math.log(p_s[label])
        expected.append(-of_label - sum(p_t[i] ** gamma * math.log(p_s[i]) for i in range(5) if i != label))
    assert methods.ofa_loss(*batch, gamma=gamma).item() == pytest.approx(np.mean(expected), rel=1e-9)


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
    assert methods.sdd_loss(student, teacher, labels).item() == pytest.approx(total, rel=1e-9)


def test_debiased_decorrelation_leaves_out_each_sample_with_itself(batch):
    student, teacher = batch[0], batch[1]
    count = len(student)
    expected = 0.0
    z_s, z_t = ((x - x.mean(0)) / (x.std(0, correction=0) + 1e-5) for x in (student, teacher))
    for i, j, n, m in itertools.product(range(5), range(5), range(count), range(count)):
        if i != j and n != m:
            expected += (z_t[n, i] * z_s[n, j] * z_t[m, i] * z_s[m, j]).item() / count**2
    expected = ((z_t * z_s).mean(0) - 1).square().sum().item() + 0.3 * expected
    for reduction, value in (("sum", expected), ("mean", expected / 5)):
        loss = methods.debiased_loss(student, teacher, kappa=0.3, reduction=reduction)
        assert loss.item() == pytest.approx(value, rel=1e-9)


def test_relative_decorrelation_is_towards_that_of_the_teacher(batch):
    student, teacher = batch[0], batch[1]
    z_s, z_t = (((x - x.mean(0)) / (x.std(0, correction=0) + 1e-5)).numpy() for x in (student, teacher))
    p, own = ([[np.mean(z_t[:, i] * z[:, j]) for j in range(5)] for i in range(5)] for z in (z_s, z_t))
    expected = sum((p[i][i] - 1) ** 2 for i in range(5))
    expected += 0.3 * sum((p[i][j] - own[i][j]) ** 2 for i in range(5) for j in range(5) if i != j)
    for reduction, value in (("sum", expected), ("mean", expected / 5)):
        loss = methods.relative_loss(student, teacher, kappa=0.3, reduction=reduction)
        assert loss.item() == pytest.approx(value, rel=1e-9)


def test_balanced_gradient_is_as_long_as_that_of_the_labels(batch):
    student, teacher, labels = batch[0].float().requires_grad_(), batch[1].float(), batch[2]
    head = nn.Linear(5, 5)
    out = methods.Outputs(head(student), student, [])
    above = methods.Outputs(teacher, teacher, [])
    term = methods.rsd_balanced(methods.Setup(out, above, head, head, 0.01, "sum"), nn.ModuleList())
    losses = term(out, above, labels), nn.functional.cross_entropy(out.logits, labels)
    ours, theirs = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in losses)
    torch.testing.assert_close(ours.norm(), theirs.norm())


def test_methods_add_up_by_their_weights(batch):
    student, teacher = (methods.Outputs(x, x, []) for x in batch[:2])
    setup = methods.Setup(student, teacher, nn.Identity(), nn.Identity(), 0.3, "sum")
    total = methods.together(setup, nn.ModuleList(), weights={"kd": 2.0, "rsd_logits": 0.1})(student, teacher, batch[2])
    expected = 2 * methods.kd_loss(*batch[:2]) + 0.1 * rsd_loss(*batch[:2], kappa=0.3)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("name", ["resnet_small", "vit_small", "resmlp_small"])
def test_ofa_projectors_reach_the_logits_from_every_stage(name):
    network = distill.NETWORKS[name]
    student = distill.outputs(network.build(7).eval(), network, torch.randn(2, 3, 32, 32))
    setup = methods.Setup(student, student, nn.Identity(), nn.Identity(), 0.01, "sum")
    projectors = methods._ofa_projectors(setup, nn.ModuleList())
    assert [p(x).shape for p, x in zip(projectors, student.stages, strict=True)] == [(2, 7)] * 4


def test_merged_patches_are_neighbours():
    merge = methods.MergePatches(1, 4)
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()
    merged = merge(torch.arange(16.0).view(1, 16, 1))
    assert merged[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_views_are_padded_crops_and_mirrored_ones():
    image = torch.randint(4, 255, (1, 3, 24, 32), dtype=torch.uint8)
    plain, mirrored = (distill.shift(image, torch.tensor([[4, 4, flip]])) for flip in (0, 1))
    assert torch.equal(plain, image)
    assert torch.equal(mirrored, image.flip(3))
    moved = distill.shift(image, torch.tensor([[4, 7, 0]]), fill=3)
    assert torch.equal(moved[..., :-3], image[..., 3:])
    assert (moved[..., -3:] == 3).all()


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
    """Runs the benchmark for one epoch and returns the lines of its CSV, which later calls add to."""
    folder = tmp_path_factory.mktemp("results")

    def call(*options, name="runs.csv", cache="cache"):
        always = ("--epochs", "1", "--teacher-epochs", "1", "--batches", "16", "--views", "2", "--seeds", "0")
        places = ("--data", str(images), "--cache", str(folder / cache), "--csv", str(folder / name))
        distill.main([*places, *always, *options])
        with (folder / name).open(newline="") as file:
            return list(csv.DictReader(file))

    return call


def test_every_method_runs_once(run):
    every = [name for name in methods.METHODS if name not in distill.OF_MAPS]
    lines = run("--pairs", "cnn_cnn", "--methods", *every)
    assert [line["method"] for line in lines] == ["teacher", *every]
    assert {"pair", "method", "seed", "epochs", "batch", "weight", "kappa", "labelled"} <= lines[0].keys()
    assert {"validation", "test", "added_parameters", "step_ms", "commit", "date"} <= lines[0].keys()
    by_method = {line["method"]: line for line in lines}
    for line in lines:
        assert 0 <= float(line["validation"]) <= 100
        assert 0 <= float(line["test"]) <= 100
        assert float(line["step_ms"]) > 0
        assert (line["kappa"] == "") == ("rsd" not in line["method"])
    assert float(by_method["rsd_kappa0"]["kappa"]) == 0
    # 128 wide student, 256 wide teacher: Linear, BatchNorm, Linear.
    assert int(by_method["rsd"]["added_parameters"]) == 128 * 256 + 2 * 256 + 256 * 256
    for name in ("none", "kd", "dkd", "dist", "sdd", "rsd_logits"):
        assert int(by_method[name]["added_parameters"]) == 0
    assert run("--pairs", "cnn_cnn", "--methods", *every) == lines, "what has been run is not run again"
    more = run("--pairs", "cnn_cnn", "--methods", "rsd", "--weights", "0.1", "x3", "--kappas", "0.01", "0.1")
    assert [(line["weight"], line["kappa"]) for line in more[len(lines) :]] == [
        ("0.1", "0.1"),
        ("0.3", "0.01"),
        ("0.3", "0.1"),
    ]


def test_same_seed_same_result(run):
    options = ("--pairs", "small_cnn_coarse", "--methods", "rsd_dense", "ofa", "--epochs", "2")
    results = [
        [(line["method"], line["validation"], line["test"]) for line in run(*options, name=name, cache=cache)]
        for name, cache in (("first.csv", "cache"), ("again.csv", "another_cache"))
    ]
    assert results[0] == results[1]
    assert len(results[0]) == 3


def test_the_term_teaches_by_its_weight(run, monkeypatch):
    students, build = [], distill.NETWORKS["resnet_small"]
    monkeypatch.setitem(
        distill.NETWORKS,
        "resnet_small",
        build._replace(build=lambda n: students.append(build.build(n)) or students[-1]),
    )
    run("--pairs", "cnn_cnn", "--methods", "none", "rsd", "--weights", "0", "1", name="term.csv")
    alone, weightless, taught = (list(student.parameters()) for student in students)
    assert all(torch.equal(a, b) for a, b in zip(alone, weightless, strict=True))
    assert not torch.equal(alone[0], taught[0])


def test_transformer_teacher_is_taught_by_a_cnn(run):
    lines = run("--pairs", "vit_cnn", "--methods", "none", name="vit.csv")
    assert [(line["pair"], line["method"], line["weight"]) for line in lines] == [
        ("vit", "teacher", "9"),
        ("vit_cnn", "none", "0"),
    ]


def losses_on_noise(cache, *options, pair="cnn_cnn", labels=None, **settings):
    from benchmarks import probe

    data = probe.noise(distill.CLASSIFICATION)
    split = data.train if labels is None else data.train._replace(labels=labels)
    task = distill.CLASSIFICATION._replace(source=str, load=lambda *_: data._replace(train=split))
    few = ["--epochs", "1", "--teacher-epochs", "1", "--batches", "8", "--views", "1", "--seeds", "0"]
    args = distill.parse(["--data", "noise", "--cache", str(cache), "--pairs", pair, *few, *options], task)
    vars(args).update(settings)
    (run,) = distill.planned(args)
    return distill.Bench(task, args, distill.Progress(disable=True)).distil(run)


def test_labels_held_back_teach_nothing(tmp_path):
    def losses(labels):
        return losses_on_noise(tmp_path, "--methods", "none", "--labelled", "4", labels=labels)

    labels = torch.arange(16) % 5
    others = torch.where(torch.arange(16) % 4 == 0, labels, 4 - labels)
    assert losses(labels) == losses(others)
    assert losses(labels) != losses(4 - labels)


def test_a_stopped_run_goes_on_from_its_last_epoch(tmp_path, monkeypatch):
    """As if it had not been stopped, to the last bit; random positions and a weight that grows are part of that."""

    def losses(folder):
        options = ("--methods", "rsd_dense:share=0.5", "--epochs", "3", "--warmup", "0.9")
        return losses_on_noise(tmp_path / folder, *options, pair="small_cnn_coarse")

    def stop(state, path, write=distill.write):
        write(state, path)
        if path.suffix == ".run" and state["epoch"] == 2:
            raise KeyboardInterrupt

    whole = losses("whole")
    assert len(whole) == 3 * 2
    with monkeypatch.context() as patched:
        patched.setattr(distill, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            losses("stopped")
    torch.rand(5)  # whatever else happens in between
    assert losses("stopped") == whole
    assert not list(tmp_path.glob("*/*.run")), "a run that is over leaves no checkpoint"


def test_float16_follows_float32(tmp_path):
    """Loosely: float16 has three digits, and the first steps overflow until the scaler has found its scale."""
    options = ("--methods", "rsd", "--epochs", "6")
    plain, half = (losses_on_noise(tmp_path, *options, float16=half) for half in (False, True))
    assert half[:2] == pytest.approx(plain[:2], rel=0.05)
    assert half[:2] != plain[:2]
    assert half[-1] < 0.85 * half[0], "it learns, which it does not if scaled gradients are clipped: 0.73 against 0.99"


def test_bfloat16(run):
    (_, line) = run("--pairs", "small_cnn_coarse", "--methods", "none", "--bfloat16", name="half.csv")
    assert line["precision"] == "bfloat16"


def test_sdd_refuses_what_it_is_not_for(run):
    with pytest.raises(ValueError, match="convolutional"):
        run("--pairs", "cnn_vit", "--methods", "sdd")


def test_the_splits_do_not_overlap(images, tmp_path):
    data = distill.load(str(images), tmp_path, torch.device("cpu"))
    assert [len(split.labels) for split in (data.train, data.validation, data.test)] == [38, 4, 12]
    rows = torch.cat([split.images for split in data[:3]]).flatten(1).unique(dim=0)
    assert len(rows) == 38 + 4 + 12
    assert data.classes == 3


def some_runs(path):
    shared = {"data": "d", "pair": "cnn_vit", "teacher_epochs": 1, "epochs": 2, "batch": 8, "precision": "float32"}
    shared |= {"processes": 1, "teacher": ""}
    shared |= {
        "labelled": 1,
        "views": 1,
        "warmup": 0.0,
        "device": "a machine",
        "command": "python -m x",
        "date": "2026-01-02",
    }
    cases = (("none", None, "", (40.0, 50.0, 48.0)), ("rsd", 0.01, "sum", (44.0, 53.0)))
    for method, kappa, reduction, accuracies in cases:
        for seed, accuracy in enumerate(accuracies):
            settings = {"weight": 0.1, "kappa": kappa, "reduction": reduction, "added_parameters": 1234}
            measured = {"validation": accuracy, "test": accuracy, "step_ms": accuracy}
            distill.append(distill.Run(**shared, method=method, seed=seed, **settings, **measured), path)
    return evidence.read(path)


def test_table_pairs_the_seeds(tmp_path):
    """A gain is over the student alone of the same seeds, of which there may be more."""
    lines = some_runs(tmp_path / "runs.csv")
    table = evidence.markdown(lines, "cnn_vit", lines)
    assert "| rsd | 2 | 0.1 | 0.01 | 2 | 48.5 ± 6.4 | +3.5 | 1,234 | x 1.08 |\n" in table
    assert table.endswith("| none | 2 | 0.1 |  | 3 | 46.0 ± 5.3 |  | 1,234 | x 1.00 |")
    start = "2026-01-02:\n\n<!-- not run: hours of training -->\n```\npython -m benchmarks.distill --data d "
    assert start in evidence.origin(lines)
    assert evidence.origin(lines).endswith("\n```")


def test_weights_are_chosen_on_the_validation_images(tmp_path):
    lines = [line for line in some_runs(tmp_path / "runs.csv") if line["seed"] == "0"]
    rsd = next(line for line in lines if line["method"] == "rsd")
    lines += [rsd | {"weight": "0.03", "validation": "45.0", "test": "41.0"}]
    lines += [rsd | {"weight": "1", "validation": "42.0", "test": "60.0"}]
    lines += [rsd | {"validation": "70.0"} | other for other in ({"kappa": "1"}, {"warmup": "0.3"}, {"batch": "9"})]
    table = evidence.tuning(lines, "cnn_vit", "8").splitlines()[2:]
    assert table == ["| rsd | 0.03: 45.0; 0.1: 44.0; 1: 42.0 | 41.0 |", "| none | 0.1: 40.0 | 40.0 |"]


@pytest.mark.parametrize("name", ["distill", "distill_steps", "sensitivity", "dense", "width", "segment"])
def test_commands_plan_the_runs_of_the_results_and_no_others(name):
    lines = evidence.read(evidence.RESULTS / f"{name}.csv")
    students = [tuple(line[key] for key in distill.KEY) for line in lines if line["method"] != "teacher"]
    task = segment.SEGMENTATION if name == "segment" else distill.CLASSIFICATION
    planned = [
        run.key
        for line in evidence.commands(lines)
        for run in distill.planned(distill.parse(line.split()[3:], task._replace(source=str)))
    ]
    assert sorted(planned) == sorted(students)


def test_label_says_what_sets_a_run_apart():
    short = {"method": "kd", "weight": "9", "epochs": "15"}
    long, light, other = short | {"epochs": "30"}, short | {"weight": "1"}, short | {"method": "rsd", "weight": "1"}
    assert evidence.label(short, [short, other]) == "kd"
    assert evidence.label(short, [short, long]) == "kd, epochs 15"
    assert evidence.label(long, [short, light, long]) == "kd, weight 9, epochs 30"


@pytest.mark.parametrize("plot", ["plot_accuracy", "plot_sensitivity"])
def test_plots_are_drawn(tmp_path, plot):
    getattr(evidence, plot)(some_runs(tmp_path / "runs.csv"), tmp_path / "plot.png")
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 1


def test_the_map_of_settings_is_of_runs_without_a_warmup(tmp_path):
    lines, path = some_runs(tmp_path / "runs.csv"), tmp_path / "plot.png"
    evidence.plot_sensitivity(lines, path)
    drawn = np.asarray(Image.open(path))
    evidence.plot_sensitivity([*lines, {**lines[-1], "warmup": "0.3", "validation": "12"}], path)
    assert np.array_equal(np.asarray(Image.open(path)), drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "nowhere has no train/ and test/ with a folder for each class"),
        (["--seeds", "-1"], "--seeds must be at least 0"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batches", "1", "64"], "--batches must be at least 2"),
        (["--methods", "rsd_dens"], "there is no method 'rsd_dens': choose from none, kd"),
        (["--methods", "rsd_dense:grid=2"], "rsd_dense has no setting 'grid': it has pooled, dense, kappa"),
        (["--methods", "rsd_dense:side"], "rsd_dense has no value for 'side'"),
        (["--device", "gpu"], "--device: gpu cannot be used here: Expected one of cpu, cuda"),
        (["--labelled", "8", "--methods", "dkd"], "dkd needs the label of every image"),
        (["--methods", "cwd_rsd_dense"], "cwd_rsd_dense is for other networks than these pairs have"),
        (["--csv", "."], r"--csv: '.' cannot be written \(Is a directory\)"),
        (["--csv", "notes/runs.csv"], r"--csv: .* cannot be written \(Not a directory\)"),
        (["--csv", "notes"], "--csv: notes has other columns"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(images, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes").write_text("no runs\n")
    places = ["--data", str(images), "--cache", ".", "--csv", "runs.csv"]  # for a mistake that is none any more
    with pytest.raises(SystemExit) as caught:
        distill.main([*places, *options])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_the_first_classes_of_cifar(tmp_path):
    """In the order of a folder of them: by class, then by name."""
    pixels = np.random.default_rng(0).integers(0, 255, (5, 3 * 32 * 32), dtype=np.uint8)
    raw = {"data": pixels, "fine_labels": [1, 0, 2, 0, 1], "filenames": ["d", "z", "a", "b", "c"]}
    (tmp_path / "train").write_bytes(pickle.dumps(raw))
    images, labels = distill.first_classes(tmp_path / "train", 2)
    assert labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(images.flatten(1).numpy(), pixels[[3, 1, 4, 0]])
