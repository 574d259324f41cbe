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
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from rsd_loss import DecouplingProjector, rsd_loss

try:
    from lightning import Callback
except ImportError:  # test_lightning is skipped
    Callback = object

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
RECIPES = (
    "plain_loop",
    "timm_loop",
    "with_timm",
    "with_torchvision",
    "with_lightning",
    "with_trainer",
    "with_torchdistill",
)


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe as it is imported where it lies; its models are too small for a second thread to help."""
    pytest.importorskip("sklearn", reason="the recipes' data needs the demo extra")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)


def needs(library):
    return pytest.importorskip(library, reason="needs the integrations extra")


def snapshot(module):
    return copy.deepcopy(module.state_dict())


def assert_same(ours, theirs):
    """Parameters and buffers, bit for bit."""
    assert_close(dict(ours), dict(theirs), rtol=0, atol=0)


def assert_trained(projector):
    """The optimizer has the projector's parameters: the scale of its BatchNorm starts at one."""
    assert isinstance(projector, DecouplingProjector)
    assert (projector.norm.weight != 1).all()


def new_teacher(digits):
    torch.manual_seed(0)
    teacher = digits.ConvTeacher()
    train = digits.load_splits()[0]
    digits.train_teacher(teacher, digits.all_shifts(train.images), train.labels, 3)
    return teacher


@pytest.mark.parametrize("name", RECIPES)
def test_rsd_takes_few_lines(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    marked = [line for line in lines if line.endswith("  # rsd")]
    assert 1 <= len(marked) <= (12 if name == "timm_loop" else 8)  # which distils positions, too
    unmarked = "\n".join(line for line in lines if line not in marked and not line.lstrip().startswith("#"))
    for word in ("DecouplingProjector(", "rsd_loss(", "RSDLoss("):
        code = unmarked.split('"""', 2)[2]  # past the docstring
        assert word not in code


def test_plain_loop_resumes_exactly(recipe, tmp_path):
    plain, digits = recipe("plain_loop"), recipe("digits")
    train, _, test = digits.load_splits()
    teacher = new_teacher(digits).train()
    before = snapshot(teacher)
    files = [tmp_path / name for name in ("none", "whole", "parts")]
    _, initial = plain.distil(teacher, train, 0, files[0])
    student, projector = plain.distil(teacher, train, 4, files[1])
    plain.distil(teacher, train, 2, files[2])
    resumed, resumed_projector = plain.distil(teacher, train, 4, files[2])
    assert_same(student.state_dict(), resumed.state_dict())
    assert_same(projector.state_dict(), resumed_projector.state_dict())
    whole, parts = (torch.load(file) for file in files[1:])
    assert_close(whole, parts, rtol=0, atol=0)  # optimizer, scaler and random numbers, too
    assert_same(whole["projector"], projector.state_dict())

    assert_trained(projector)
    assert not torch.equal(projector.expand.weight, initial.expand.weight)
    assert not teacher.training
    assert_same(teacher.state_dict(), before)
    assert digits.accuracy(student.eval(), test) > 50


def test_plain_loop(recipe):
    assert recipe("plain_loop").main(epochs=4) > 50


@pytest.mark.parametrize(("student", "teacher"), [("cnn", "vit"), ("vit", "swin"), ("swin", "mixer"), ("mixer", "cnn")])
def test_timm_loop_takes_any_two_by_changing_names(recipe, student, teacher):
    timm, loop = needs("timm"), recipe("timm_loop")
    torch.manual_seed(0)
    student, teacher = (timm.create_model(**loop.MODELS[name], num_classes=10) for name in (student, teacher))
    teacher.eval().requires_grad_(False)
    images, labels = torch.randn(6, 3, 64, 64), torch.arange(6)
    projectors = loop.new_projectors(student, teacher, images)
    student.eval()  # so that two passes see the same numbers
    loss = loop.objective(student, teacher, projectors, images, labels)
    with torch.no_grad():
        _, s, s_map = loop.features(student, images)
        _, t, t_map = loop.features(teacher, images)
        assert s_map.ndim == t_map.ndim == 4
        rows = [F.adaptive_avg_pool2d(x, min(s_map.shape[3], t_map.shape[3])) for x in (s_map, t_map)]
        rows = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in rows]
        reference = [
            rsd_loss(p(a), b, implementation="reference") for p, (a, b) in zip(projectors, ((s, t), rows), strict=True)
        ]
        expected = F.cross_entropy(student(images), labels) + 0.1 * sum(reference)
    assert_close(loss.detach(), expected, rtol=1e-4, atol=0)  # float32, through two different orders of sums
    loss.backward()
    assert all(parameter.grad is not None for parameter in projectors.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_timm_loop(recipe):
    needs("timm")
    assert recipe("timm_loop").main(epochs=2) > 15  # a tenth is chance; it takes eight epochs to come to 90


def test_timm_loop_compiled(recipe):
    timm, loop = needs("timm"), recipe("timm_loop")
    student, teacher = (timm.create_model(**loop.MODELS[name], num_classes=10).eval() for name in ("vit", "cnn"))
    images, labels = torch.randn(6, 3, 64, 64), torch.arange(6)
    parts = student, teacher.requires_grad_(False), loop.new_projectors(student, teacher, images), images, labels
    # One graph, from which no code is generated: that takes a minute and is the business of test_compile.
    compiled = torch.compile(loop.objective, fullgraph=True, backend="eager")
    assert_close(compiled(*parts), loop.objective(*parts))


def timm_parts(recipe):
    timm, module = needs("timm"), recipe("with_timm")
    torch.manual_seed(0)
    student, teacher = timm.create_model(**module.STUDENT, num_classes=10), timm.create_model(module.TEACHER)
    train = recipe("digits").load_splits()[0]
    return module, module.new_task(student, teacher), student, teacher, module.loader(train, student)


def test_timm_step(recipe):
    _, task, student, teacher, batches = timm_parts(recipe)
    seen = []
    # timm calls forward_features, which passes by the hooks of the model itself.
    teacher.conv_stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before = snapshot(teacher)
    task.train()
    images, labels = next(iter(batches))
    result = task(images, labels)
    result["loss"].backward()

    mean, std = (torch.tensor(teacher.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert_close(seen[0], (images * 0.5 + 0.5 - mean) / std)  # the student's normalisation is 0.5 and 0.5
    assert (seen[0] - images).abs().max() > 0.1
    with torch.no_grad():
        features = student.forward_features(images)
        projected = task.trainable_module.projection(student.forward_head(features, pre_logits=True))
        want = F.cross_entropy(student.forward_head(features), labels)
        want += 0.1 * rsd_loss(projected, teacher.forward_head(teacher.forward_features(seen[0]), pre_logits=True))
    assert_close(result["loss"], want)
    assert result["output"].shape == (50, 10)
    assert all(parameter.grad is not None for parameter in task.get_trainable_module().parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training
    assert_same(teacher.state_dict(), before)


def test_timm_distributed_and_checkpoint(recipe, tmp_path):
    module, task, student, teacher, batches = timm_parts(recipe)
    task.setup_ema(decay=0.5)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        task.prepare_distributed()
        optimizer = module.create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1)
        task.train()
        task(*next(iter(batches)))["loss"].backward()
        optimizer.step()
        task.update_ema()
        state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
        trained = snapshot(task.get_trainable_module().module)
    finally:
        dist.destroy_process_group()
    assert_trained(task.get_trainable_module().module.projection)
    for suffix in ("", "_ema"):
        assert set(state[f"state_dict{suffix}"]) == set(student.state_dict())  # what is evaluated and published
        assert "expand.weight" in state[f"task_state{suffix}"]["projection"]
    assert not torch.equal(*(state[key]["projection"]["expand.weight"] for key in ("task_state", "task_state_ema")))

    torch.manual_seed(1)
    other = module.new_task(module.timm.create_model(**module.STUDENT, num_classes=10), teacher)
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert_same(other.get_trainable_module().state_dict(), trained)


def test_timm(recipe):
    needs("timm")
    task, accuracy = recipe("with_timm").main(epochs=4)
    assert_trained(task.get_trainable_module().projection)
    assert accuracy > 25


def test_torchvision(recipe):
    needs("torchvision")
    module = recipe("with_torchvision")
    student, teacher, accuracy = module.main(epochs=3)
    assert accuracy > 25

    before, before_student = snapshot(teacher.train()), snapshot(student)
    batches = [next(iter(module.loader(recipe("digits").load_splits()[0])))]
    projector = module.distil(student, teacher, batches, epochs=1)
    assert_trained(projector)
    assert_same(teacher.state_dict(), before)
    assert not any(layer.training for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d))
    assert not torch.equal(student.conv_proj.weight, before_student["conv_proj.weight"])
    assert student.state_dict().keys() == before_student.keys()  # no wrapper, no projector


class Recorder(Callback):
    """Writes what a process saw in its first step, and the weights it ended with."""

    def __init__(self, folder):
        self.folder = folder
        self.first = {}

    def on_train_start(self, trainer, module):
        module.projector.norm.eval()  # with the statistics of its own rows, two processes differ from one

    def on_train_batch_start(self, trainer, module, batch, batch_index):
        if not self.first:
            self.first = {"batch": [x.clone() for x in batch], "before": snapshot(module)}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if "gradients" not in self.first:
            named = module.named_parameters()
            self.first["gradients"] = {name: p.grad.clone() for name, p in named if p.requires_grad}
            self.first["rsd"] = trainer.callback_metrics["rsd"]

    def on_train_end(self, trainer, module):
        torch.save({**self.first, "after": snapshot(module)}, self.folder / f"{trainer.global_rank}.pt")


def test_lightning_in_two_processes_steps_as_in_one(recipe, tmp_path):
    needs("lightning")
    module = recipe("with_lightning")
    options = {"precision": "64-true", "callbacks": [Recorder(tmp_path)], "enable_progress_bar": False}
    _, distiller, _ = module.main(devices=2, epochs=1, **options)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(ours["after"], theirs["after"])
    assert not torch.equal(ours["batch"][0], theirs["batch"][0])
    assert_close(ours["rsd"], theirs["rsd"])

    distiller.double().load_state_dict(ours["before"])
    distiller.projector.norm.eval()
    images, labels = (torch.cat(parts) for parts in zip(ours["batch"], theirs["batch"], strict=True))
    embedding, logits = distiller.student(images.double())
    loss = rsd_loss(distiller.projector(embedding), distiller.teacher(images.double())[0])
    assert_close(ours["rsd"], loss.detach(), check_dtype=False)
    distiller.zero_grad()
    (F.cross_entropy(logits, labels) + 0.1 * loss).backward()
    want = {name: p.grad for name, p in distiller.named_parameters() if p.requires_grad}
    for process in (ours, theirs):
        assert_close(process["gradients"], want, rtol=1e-7, atol=1e-10)


def test_lightning(recipe, tmp_path):
    needs("lightning")
    module, digits = recipe("with_lightning"), recipe("digits")
    trainer, distiller, accuracy = module.main(epochs=4, enable_progress_bar=False)
    assert accuracy > 50
    assert_trained(distiller.projector)
    file = tmp_path / "last.ckpt"
    trainer.save_checkpoint(file)
    names = torch.load(file, weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in names} == {"student", "projector"}
    loaded = module.Distiller.load_from_checkpoint(file, teacher=copy.deepcopy(distiller.teacher))
    assert_same(loaded.state_dict(), distiller.state_dict())

    # Validation takes the whole module to eval mode and back.
    before = snapshot(distiller.teacher)
    distiller.validation_step = lambda batch, batch_idx: None
    loader = DataLoader(TensorDataset(*digits.load_splits()[1]), batch_size=64)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module.lightning.Trainer(max_epochs=2, **options).fit(distiller.train(), loader, loader)
    assert distiller.student.training
    assert not any(layer.training for layer in distiller.teacher.modules())
    assert_same(distiller.teacher.state_dict(), before)


def trainer_parts(recipe, rows):
    needs("transformers")
    needs("accelerate")
    module = recipe("with_trainer")
    torch.manual_seed(0)
    student, teacher = module.new_models()
    split = recipe("digits").load_splits()[0]
    return module, student, teacher, module.dataset(type(split)(split.images[:rows], split.labels[:rows]))


def test_trainer_accumulates_the_mean_of_its_micro_batches(recipe, tmp_path):
    module, student, teacher, rows = trainer_parts(recipe, 51)  # the last row is dropped
    seen = []

    class Recording(module.DistillationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(dict(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    options = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    options |= {"per_device_train_batch_size": 25, "gradient_accumulation_steps": 2, "max_steps": 1}
    before, before_teacher = copy.deepcopy(student).train(), snapshot(teacher)
    trainer = Recording(student, module.arguments(str(tmp_path), **options), teacher=teacher, train_dataset=rows)
    trainer.train()

    assert [len(inputs["labels"]) for inputs in seen] == [25, 25]
    for inputs in seen:
        seen_by_classifier = []
        hook = before.classifier.register_forward_pre_hook(
            lambda module, args, of=seen_by_classifier: of.append(args[0])
        )
        outputs = before(**inputs)
        hook.remove()
        embedding = before.projector(seen_by_classifier[0])
        with torch.no_grad():
            target = teacher.resnet(inputs["pixel_values"]).pooler_output.flatten(1)
        loss = F.cross_entropy(outputs.logits, inputs["labels"]) + 0.1 * rsd_loss(embedding, target)
        (loss / 2).backward()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)
    assert_close(dict(student.named_parameters()), dict(before.named_parameters()), rtol=1e-4, atol=1e-5)
    assert_trained(student.projector)
    assert not teacher.training
    assert_same(teacher.state_dict(), before_teacher)


def test_trainer_evaluates_a_last_batch_of_one_row_and_saves_the_projector(recipe, tmp_path):
    module, student, teacher, rows = trainer_parts(recipe, 51)
    options = module.arguments(str(tmp_path), per_device_eval_batch_size=50, dataloader_drop_last=False)
    trainer = module.DistillationTrainer(student, options, teacher=teacher, eval_dataset=rows)
    metrics, predictions = trainer.evaluate(), trainer.predict(rows)
    assert predictions.predictions.shape == (51, 10)
    labels = torch.as_tensor(predictions.label_ids)
    want = F.cross_entropy(torch.as_tensor(predictions.predictions), labels)
    assert math.isclose(metrics["eval_loss"], want.item(), rel_tol=0.05)  # the Trainer weighs the batches alike
    trainer.save_model()
    saved = importlib.import_module("safetensors.torch").load_file(tmp_path / "model.safetensors")
    assert_same(
        {name: saved[f"projector.{name}"] for name in student.projector.state_dict()}, student.projector.state_dict()
    )
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


def test_trainer_with_distributed_data_parallel(tmp_path):
    """In a process of its own: what the Trainer reads from the environment holds for a process's lifetime."""
    needs("transformers")
    needs("accelerate")
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **one, "PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DISTRIBUTED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["DistributedDataParallel True"], done.stderr


def test_trainer(recipe):
    needs("transformers")
    needs("accelerate")
    trainer, accuracy = recipe("with_trainer").main(epochs=3)
    assert_trained(trainer.model.projector)
    assert accuracy > 25


def test_torchdistill(recipe):
    needs("torchdistill")
    module, digits = recipe("with_torchdistill"), recipe("digits")
    train = digits.load_splits()[0]
    teacher, student = new_teacher(digits), digits.ViTStudent()
    before = snapshot(teacher)
    box = module.new_box(student, teacher, TensorDataset(*train))
    initial = copy.deepcopy(box.student_model.projector)
    box.pre_epoch_process(epoch=0)
    for index, (images, labels, extra) in enumerate(box.train_data_loader):
        loss = box.forward_process(images, labels, extra)
        if index == 0:
            embedding, logits = student(images)
            want = F.cross_entropy(logits, labels) + 0.1 * rsd_loss(initial(embedding), teacher(images)[0])
            assert_close(loss, want)
        box.post_forward_process(loss=loss)
    box.post_epoch_process()
    assert_trained(box.student_model.projector)
    assert not torch.equal(box.student_model.projector.expand.weight, initial.expand.weight)
    assert not teacher.training
    assert_same(teacher.state_dict(), before)
    assert module.main()[1] > 80
