"""The segmentation benchmark: its score against loops, its views, and a run of every method on a few random scenes."""

import csv

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the bench extra")
pytest.importorskip("rich", reason="needs the bench extra")
from PIL import Image

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import data, losses, segmentation

METHODS = ("none", "kd", "cwd", "pkd", "fitnet_map", "rsd", "rsd_dense", "cwd_rsd_dense:student_stage=3")


def test_mean_iou():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(11, (3, 5, 7), generator=generator)
    labels = torch.randint(11, (3, 5, 7), generator=generator)
    labels[:, 2] = data.UNLABELLED
    pixels = [(p, y) for p, y in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True) if y >= 0]
    scores = []
    for kind in range(11):
        both = sum(p == kind and y == kind for p, y in pixels)
        scores.append(both / sum(kind in pair for pair in pixels))
    assert segmentation.score(predicted, labels) == pytest.approx(100 * np.mean(scores))


def test_labels_move_with_their_images():
    labels = torch.arange(1, 61).view(1, 6, 10)
    split = data.Split(labels[:, None].expand(1, 3, 6, 10).to(torch.uint8), labels)
    for view in ([4, 4, 0], [4, 4, 1], [1, 7, 0], [8, 0, 1]):
        images, moved = data.in_views(split, torch.tensor([0]), torch.tensor([view]))
        kept = moved != data.UNLABELLED
        assert kept.all() == (view[:2] == [4, 4])  # a shift leaves an edge without labels
        assert torch.equal(images[:, 0][kept], data.normalise(moved[kept]))
        assert (images[:, 0][~kept] == data.normalise(torch.zeros(()))).all()


def test_cwd():
    """For each image and class: KL between softmaxes over the positions, here of a constant student."""
    teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    p = (teacher / 4).flatten(2).softmax(dim=2)
    expected = 16 * (p * (p * 20).log()).sum(dim=2).mean()
    torch.testing.assert_close(losses.cwd(torch.zeros_like(teacher), teacher), expected)


def test_pkd_is_one_minus_the_correlation():
    student, teacher = torch.randn(2, 40, 3, dtype=torch.float64)
    expected = 1 - np.mean([np.corrcoef(s, t)[0, 1] for s, t in zip(student.T.numpy(), teacher.T.numpy(), strict=True)])
    assert losses.pkd(student, teacher).item() == pytest.approx(expected, rel=1e-4)  # eps is 1e-5


def test_kd_of_maps_is_the_mean_over_pixels():
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    pixels = [losses.kd(student[:, :, i, j], teacher[:, :, i, j]) for i in range(4) for j in range(5)]
    torch.testing.assert_close(losses.kd(student, teacher), torch.stack(pixels).mean())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2), ("test", 2)):
        for kind, shape, classes in (("images", (96, 128, 3), 255), ("labels", (96, 128), 12)):
            (folder / part / kind).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, classes, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / kind / f"{i}.png")
    return folder


@pytest.fixture
def words(scenes, tmp_path):
    return ["segmentation", "--data", str(scenes), "--cache", str(tmp_path), "--csv", str(tmp_path / "runs.csv")]


@pytest.mark.parametrize("pair", segmentation.pairs)
def test_every_method_runs_once(words, tmp_path, pair):
    few = ["--epochs", "1", "--teacher-epochs", "1", "--batches", "4", "--views", "2", "--seeds", "0", "--threads", "1"]
    command.main([*words, *few, "--pairs", pair, "--labelled", "8", "--methods", *METHODS])
    with (tmp_path / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["teacher", *METHODS]
    assert [line["labelled"] for line in lines] == ["1", *["8"] * len(METHODS)]
    assert all(0 < float(line["test"]) < 100 for line in lines)


def test_a_mistake_is_answered_with_a_sentence(words, scenes, capsys):
    words[2] = str(scenes / "train")
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    assert caught.value.code == 2
    assert "has no train/images and train/labels" in capsys.readouterr().err.replace("\n", " ")
