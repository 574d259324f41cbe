"""The papers' pairs: all 27 built without memory, and a few real steps of some on random images."""

import csv
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the bench extra")
pytest.importorskip("rich", reason="needs the bench extra")
from PIL import Image

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import classification, methods, paper, parameters, training

ROOT = Path(__file__).parents[2]
PAPERS = {classes: paper.Paper(classes) for classes in (100, 1000)}


def test_there_are_the_27_pairs():
    assert {n: len(task.pairs) for n, task in PAPERS.items()} == {100: 12, 1000: 15}


@pytest.mark.parametrize("name", ["resnet50", "convnext-t", "swin-t", "mixer-b16", "resmlp-s12"])
def test_a_network_gives_four_stages(name):
    """Of maps or tokens, each on a quarter of the positions of the one before or on as many."""
    _, out, _ = parameters.build(f"teacher-{name}" if f"teacher-{name}" in PAPERS[1000].networks else name, 1000)
    assert out.logits.shape == (2, 1000)
    sides = [x.shape[2] if x.ndim == 4 else math.isqrt(x.shape[1]) for x in out.stages]
    assert sides in ([56, 28, 14, 7], [14] * 4)
    assert (out.stages[0].ndim == 4) == (name in ("resnet50", "convnext-t"))


@pytest.mark.parametrize(
    ("classes", "student", "rates"),
    [
        (100, "resnet18", {0: 0.05 / 9, 8: 0.05, 899: 0.001}),
        (100, "deit-t", {0: 5e-4 / 60, 59: 5e-4, 899: 1e-5}),
        (1000, "resnet18", {0: 0.1 / 27, 269: 0.1, 270: 0.01, 540: 0.001, 899: 0.0001}),
        (1000, "resmlp-s12", {0: 1e-3 / 60, 59: 1e-3, 899: 1e-6}),
    ],
)
def test_the_learning_rate_is_that_of_the_public_settings(classes, student, rates):
    """Of 900 steps of as many images as theirs: up over 3 or 20 of 300 epochs, then half a cosine or stairs."""
    network = PAPERS[classes].networks[student]
    batch = 128 if classes == 100 else 8 * 64 if student == "resnet18" else 8 * 128
    factor = network.schedule(900)
    for step, rate in rates.items():
        assert network.lr * batch / 128 * factor(step) == pytest.approx(rate, rel=0.01)


def test_vectors_have_no_weight_decay():
    network = PAPERS[100].networks["resnet18"]
    layer = torch.nn.Linear(3, 3)
    matrix, vector = network.optimizer(list(layer.parameters()), lr=1.0, weight_decay=0.3).param_groups
    assert (matrix["params"], matrix["weight_decay"]) == ([layer.weight], 0.3)
    assert (vector["params"], vector["weight_decay"]) == ([layer.bias], 0.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Small ones with train/ and test/, large ones with train/ and val/."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for kind, side, part in (("small", 32, "test"), ("large", 240, "val")):
        for label in "ab":
            for where in ("train", part):
                (folder / kind / where / label).mkdir(parents=True)
                for i in range(2 if where == "train" else 1):
                    pixels = random.integers(0, 255, (side, side, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / kind / where / label / f"{i}.png")
    return folder


def weights(folder, name):
    """A file of random weights of a teacher."""
    torch.manual_seed(0)
    networks = PAPERS[1000].networks | PAPERS[100].networks
    torch.save(networks[f"teacher-{name}"].build(2).state_dict(), folder / f"{name}.pth")
    return folder / f"{name}.pth"


def options(images, folder, pair, *more):
    task = "paper-cifar100" if images.name == "small" else "paper-imagenet"
    teacher = weights(folder, pair.partition("_")[0])
    places = ["--data", images, "--cache", folder / "cache", "--csv", folder / "runs.csv", "--teacher", teacher]
    return [task, *(str(word) for word in (*places, "--workers", "1", "--pairs", pair, *more))]


def test_what_cannot_work_is_not_trained(images, tmp_path, capsys):
    words = options(images / "small", tmp_path, "vit-s_resnet18", "--methods", "rsd")
    at = words.index("--teacher")
    for more, sentence in (
        ([*words, "--batches", "9"], "a process has 4 images and a batch of 9: give smaller --batches"),
        ([*words[:at], *words[at + 2 :], "--teacher-epochs", "0"], "classifier would be random"),
    ):
        with pytest.raises(SystemExit) as caught:
            command.main(more)
        assert caught.value.code == 2
        assert sentence in capsys.readouterr().err


def lines(folder):
    with (folder / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("kind", "pair", "method"),
    [("small", "vit-s_resnet18", "rsd_dense"), ("large", "resnet50_deit-t", "rsd")],
)
def test_two_steps(images, tmp_path, kind, pair, method):
    few = ["--epochs", "1", "--batches", "2", "--methods", method]
    command.main(options(images / kind, tmp_path, pair, *few))
    teacher, student = lines(tmp_path)
    assert (teacher["method"], student["method"]) == ("teacher", method)
    assert re.fullmatch(pair.partition("_")[0] + "-[0-9a-f]{8}", student["teacher"])
    assert float(student["test"]) in (0, 50, 100)
    assert student["validation"] == "nan"
    assert not list((tmp_path / "cache").glob("*.run")), "a run that is over leaves no checkpoint"


def test_a_step_of_two_processes(images, tmp_path):
    words = options(images / "small", tmp_path, "swin-t_resmlp-s12", "--methods", "rsd", "rsd:gather=True")
    few = ["--epochs", "1", "--batches", "2", "--threads", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run([*launch, __file__, *words, *few], env=environment, check=True, timeout=300)
    assert [(line["processes"], line["batch"]) for line in lines(tmp_path)] == [("2", "2")] * 3


def test_the_losses_of_a_step_are_one_graph():
    network = classification.networks["vit_coarse"]
    model, images, y = network.build(5), torch.randn(4, 3, 32, 32), torch.arange(4)
    teacher = classification.outputs(model, network, images)
    added = torch.nn.ModuleList()
    term = methods.rsd(methods.Setup(teacher, teacher, model.head, model.head, 0.01), added)
    outputs = functools.partial(classification.outputs, network=network)
    objective = training.Objective(lambda model, images: outputs(model, images=images), model, added, term, 0.1)
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, y, teacher), objective(images, y, teacher))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "convnext-t_deit-t", "--methods", "ofa"], "ofa needs one label for every image"),
        (["--teacher", "nothing.pth"], "--teacher: .* No such file or directory: 'nothing.pth'"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_downloaded(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command.main(["paper-cifar100", "--data", "cifar100", "--cache", ".", "--csv", "runs.csv", *words])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def compared(bench, name, model, run, *rest, fit=training.fit):
    """A training after which all processes have the same weights, though each has seen other images."""
    found = fit(bench, name, model, run, *rest)
    for mine in (torch.cat([p.detach().flatten() for p in model.parameters()]), torch.tensor(found)):
        everybody = [torch.empty_like(mine) for _ in range(run.processes)]
        torch.distributed.all_gather(everybody, mine)
        # The classifier starts at zero, so it is the statistics that losses differ by.
        assert torch.equal(*everybody) == (len(mine) > 1 or run.method != "rsd")
    return found


if __name__ == "__main__":  # in each of the two processes
    training.fit = compared
    command.main()
