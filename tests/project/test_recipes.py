"""The recipes in docs/examples, each with the library it is for: what they promise holds, and RSD takes few lines."""

import copy
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from rsd_loss import DecouplingProjector, rsd_loss
from rsd_loss.features import dense_pairs

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
# What each needs besides the demo extra, and what its main takes and must reach: a tenth is chance.
RECIPES = {
    "plain_loop": ([], {"epochs": 4}, 50),
    "timm_loop": (["timm"], {"epochs": 3}, 20),
    "with_timm": (["timm"], {"epochs": 4}, 25),
    "with_torchvision": (["torchvision"], {"epochs": 3}, 25),
    "with_lightning": (["lightning"], {"epochs": 4, "enable_progress_bar": False}, 50),
    "with_lightning in two processes": (["lightning"], {"devices": 2, "epochs": 1, "enable_progress_bar": False}, 15),
    "with_trainer": (["transformers", "accelerate"], {"epochs": 8}, 80),
    "with_torchdistill": (["torchdistill"], {}, 80),
}


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe as it is imported where it lies; its models are too small for a second thread to help."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def get(name):
        for library in ["sklearn", *RECIPES.get(name, [[]])[0]]:
            pytest.importorskip(library, reason="needs the integrations extra")
        return importlib.import_module(name)

    yield get
    torch.set_num_threads(threads)


def snapshot(module):
    return copy.deepcopy(dict(module.state_dict()))


def assert_same(ours, theirs):
    """Parameters and buffers, bit for bit."""
    assert_close(dict(ours), dict(theirs), rtol=0, atol=0)


def assert_trained(projector):
    """The optimizer has the projector's parameters: the scale of its BatchNorm starts at one."""
    assert isinstance(projector, DecouplingProjector)
    assert (projector.norm.weight != 1).all()


def assert_frozen(teacher, before):
    assert not any(layer.training for layer in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert_same(teacher.state_dict(), before)


@pytest.mark.parametrize("name", [name for name in RECIPES if " " not in name])
def test_rsd_takes_few_lines(name):
    code = (EXAMPLES / f"{name}.py").read_text().split('"""', 2)[2].splitlines()
    marked = [line for line in code if line.endswith("  # rsd")]
    assert len(marked) <= (27 if name == "timm_loop" else 16)  # which distils positions, too
    assert max(len(line.removesuffix("  # rsd")) for line in marked) <= 80  # no line of the page scrolls
    for line in {*code} - {*marked}:
        assert not any(word in line.partition("#")[0] for word in ("DecouplingProjector(", "rsd_loss(", "RSDLoss("))


@pytest.mark.parametrize("name", RECIPES)
def test_main(recipe, name, capsys):
    _, options, least = RECIPES[name]
    result = recipe(name.split()[0]).main(**options)
    assert (result if isinstance(result, float) else result[-1]) > least
    assert "test accuracy: teacher " in capsys.readouterr().out


def test_plain_loop_resumes_exactly(recipe, tmp_path):
    plain, digits = recipe("plain_loop"), recipe("digits")
    train, teacher = digits.load_splits()[0], digits.ConvTeacher().train()
    before = snapshot(teacher)
    student, projector = plain.distil(teacher, train, 4, tmp_path / "whole")
    plain.distil(teacher, train, 2, tmp_path / "parts")
    resumed, _ = plain.distil(teacher, train, 4, tmp_path / "parts")
    assert_same(student.state_dict(), resumed.state_dict())
    whole, parts = (torch.load(tmp_path / name) for name in ("whole", "parts"))
    assert_close(whole, parts, rtol=0, atol=0)  # optimizer, scaler and random numbers, too
    assert_same(whole["projector"], projector.state_dict())
    assert_trained(projector)
    assert_frozen(teacher, before)


@pytest.mark.parametrize("names", [("cnn", "vit"), ("vit", "swin"), ("swin", "mixer"), ("mixer", "cnn")])
def test_timm_loop_takes_any_two(recipe, names):
    loop = recipe("timm_loop")
    student, teacher = (loop.timm.create_model(**loop.MODELS[name], num_classes=10) for name in names)
    before, before_student = snapshot(teacher), snapshot(student)
    images, labels = torch.randn(6, 3, 64, 64), torch.arange(6)
    projectors = loop.new_projectors(student.train(), teacher, images)
    assert student.training
    assert_same(student.state_dict(), before_student)
    student.eval()  # so that two passes see the same numbers
    loss = loop.objective(student, teacher, projectors, images, labels)
    # One graph, from which no code is generated: that takes a minute and is the business of test_compile.
    compiled = torch.compile(loop.objective, fullgraph=True, backend="eager")
    assert_close(compiled(student, teacher, projectors, images, labels), loss)
    with torch.no_grad():
        (_, s, s_map), (_, t, t_map) = (loop.features(model, images) for model in (student, teacher))
        expected = F.cross_entropy(student(images), labels)
        for projector, (a, b) in zip(projectors, ((s, t), dense_pairs(s_map, t_map)), strict=True):
            expected += 25 * rsd_loss(projector(a), b, kappa=0.0, reduction="mean", implementation="reference")
    assert_close(loss.detach(), expected, rtol=1e-4, atol=0)  # float32, through two different orders of sums
    loss.backward()
    assert all(parameter.grad is not None for parameter in projectors.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())
    assert_frozen(teacher, before)


def test_timm_task(recipe):
    module = recipe("with_timm")
    student, other = (module.timm.create_model(**module.STUDENT, num_classes=10) for _ in range(2))
    teacher = module.timm.create_model(module.TEACHER)
    task, before = module.new_task(student, teacher), snapshot(teacher)
    images, labels = next(iter(module.loader(recipe("digits").load_splits()[0], student)))
    for_teacher = task.teacher.normalize_input(images, task.student_mean, task.student_std)
    assert (for_teacher - images).abs().max() > 0.1
    target = teacher.eval().forward_head(teacher.forward_features(for_teacher), pre_logits=True)
    embedding = student.forward_head(student.forward_features(images), pre_logits=True)
    projector = task.trainable_module.projection
    rsd = rsd_loss(copy.deepcopy(projector)(embedding), target, kappa=0.0, reduction="mean")
    loss = task.train()(images, labels)["loss"]
    assert_close(loss, F.cross_entropy(student(images), labels) + 25 * rsd)
    loss.backward()
    module.create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1).step()
    assert_trained(projector)
    assert_frozen(teacher, before)
    state = task.get_checkpoint_state()
    assert set(state["state_dict"]) == set(student.state_dict())  # what is evaluated and published
    resumed = module.new_task(other, teacher)
    resumed.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert_same(resumed.get_trainable_module().state_dict(), task.get_trainable_module().state_dict())


def test_torchvision(recipe):
    module = recipe("with_torchvision")
    student, teacher, _ = module.main(epochs=0)
    before, before_student = snapshot(teacher.train()), snapshot(student)
    batches = [next(iter(module.loader(recipe("digits").load_splits()[0])))]
    assert_trained(module.distil(student, teacher, batches, epochs=1))
    assert_frozen(teacher, before)
    assert not torch.equal(student.conv_proj.weight, before_student["conv_proj.weight"])
    assert student.state_dict().keys() == before_student.keys()  # no wrapper, no projector


def test_lightning(recipe, tmp_path):
    module = recipe("with_lightning")
    trainer, distiller, _ = module.main(epochs=1, enable_progress_bar=False)
    assert_trained(distiller.projector)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    names = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in names} == {"student", "projector"}
    loaded = module.Distiller.load_from_checkpoint(tmp_path / "last.ckpt", teacher=copy.deepcopy(distiller.teacher))
    assert_same(loaded.state_dict(), distiller.state_dict())
    assert not any(layer.training for layer in distiller.train().teacher.modules())
    assert distiller.student.training


def trainer_parts(recipe, rows):
    module = recipe("with_trainer")
    split = recipe("digits").load_splits()[0]
    return module, *module.new_models(), module.dataset(type(split)(split.images[:rows], split.labels[:rows]))


def test_trainer_accumulates_the_mean_of_its_micro_batches(recipe, tmp_path):
    module, student, teacher, rows = trainer_parts(recipe, 50)
    options = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    options |= {"per_device_train_batch_size": 25, "gradient_accumulation_steps": 2, "max_steps": 1}
    before, before_teacher, seen = copy.deepcopy(student).train(), snapshot(teacher), []
    student.register_forward_pre_hook(lambda module, args, inputs: seen.append(dict(inputs)), with_kwargs=True)
    arguments = module.arguments(str(tmp_path), **options)
    module.DistillationTrainer(student, arguments, teacher=teacher, train_dataset=rows).train()
    assert len(seen) == 2
    for inputs in seen:
        outputs = before(**inputs)
        projected = before.projector(before.vit.layernorm(outputs.hidden_states[-1])[:, 0])
        with torch.no_grad():
            target = teacher.resnet(inputs["pixel_values"]).pooler_output.flatten(1)
        ((outputs.loss + 25 * rsd_loss(projected, target, kappa=0.0, reduction="mean")) / 2).backward()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)
    assert_close(dict(student.named_parameters()), dict(before.named_parameters()), rtol=1e-4, atol=1e-5)  # float32
    assert_frozen(teacher, before_teacher)


def test_trainer_evaluates_a_last_batch_of_one_row_and_saves_the_projector(recipe, tmp_path):
    module, student, teacher, rows = trainer_parts(recipe, 51)
    options = module.arguments(str(tmp_path), per_device_eval_batch_size=50, dataloader_drop_last=False)
    trainer = module.DistillationTrainer(student, options, teacher=teacher, eval_dataset=rows)
    assert math.isclose(trainer.evaluate()["eval_loss"], math.log(10), rel_tol=0.2)  # cross-entropy alone, as new
    trainer.save_model()
    saved = importlib.import_module("safetensors.torch").load_file(tmp_path / "model.safetensors")
    assert "projector.norm.weight" in saved
    assert not any("teacher" in name for name in saved)


DISTRIBUTED = """
import with_trainer as module
student, teacher = module.new_models()
rows = module.dataset(module.load_splits()[0])[:100]
options = module.arguments("unused", use_cpu=True, ddp_backend="gloo", max_steps=2)
trainer = module.DistillationTrainer(student, options, teacher=teacher, train_dataset=rows)
trainer.train()
print(type(trainer.model_wrapped).__name__, (student.projector.norm.weight != 1).all().item())
"""


def test_trainer_with_distributed_data_parallel(recipe, tmp_path):
    """In a process of its own: what the Trainer reads from the environment holds for a process's lifetime."""
    recipe("with_trainer")
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **one, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["DistributedDataParallel True"], done.stderr


def test_torchdistill(recipe):
    module, digits = recipe("with_torchdistill"), recipe("digits")
    teacher, student = digits.ConvTeacher(), digits.ViTStudent()
    before = snapshot(teacher)
    box = module.new_box(student, teacher, TensorDataset(*digits.load_splits()[0]))
    initial = copy.deepcopy(box.student_model.projector)
    box.pre_epoch_process(epoch=0)
    images, labels, extra = next(iter(box.train_data_loader))
    loss = box.forward_process(images, labels, extra)
    embedding, logits = student(images)
    expected = rsd_loss(initial(embedding), teacher(images)[0], kappa=0.0, reduction="mean")
    assert_close(loss, F.cross_entropy(logits, labels) + 25 * expected)
    box.post_forward_process(loss=loss)
    assert_trained(box.student_model.projector)
    assert_frozen(teacher, before)


def test_hidden_states_of_a_vision_model(recipe):
    """What the pages say of transformers' ViTs: any layer's hidden state fits dense_pairs, with one prefix token."""
    module = recipe("with_trainer")
    layers = []
    for width in (16, 32):
        config = module.ViTConfig(**module.LABELS, **(module.VIT | {"hidden_size": width}))
        model = module.ViTForImageClassification(config)
        layers.append(model(torch.randn(6, 1, 16, 16), output_hidden_states=True).hidden_states)
    for s, t in zip(*layers, strict=True):
        assert_close(dense_pairs(s, t, prefix_tokens=1)[1], t[:, 1:].flatten(0, 1))
