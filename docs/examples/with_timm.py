"""RSD as a timm task (timm 1.0.27 or newer), in the place of timm's FeatureDistillationTask.

The lines that RSD adds or changes end in ``# rsd``. The rest of the task is timm's: the teacher stays in eval mode and
gets the images with its own normalisation, and whatever lies in ``task.trainable_module`` (the student and the
projection) goes to the optimizer, DistributedDataParallel, EMA, gradient clipping and checkpoints.

Run it with ``python docs/examples/with_timm.py``: an EfficientNet teaches a ViT handwritten digits.
"""

import timm
import torch
from digits import Split, load_splits
from timm.optim import create_optimizer_v2
from timm.task import FeatureDistillationTask
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

from rsd_loss import DecouplingProjector, RSDLoss  # rsd

TEACHER = "test_efficientnet"  # small, and its normalisation is not the ViT's
STUDENT = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}
STUDENT |= {"num_heads": 4, "class_token": False, "global_pool": "avg", "weight_init": "jax"}


# s and t are the student's projected and the teacher's embedding. timm's loop needs the loss, and the output for its
# metrics. Of the constructor's weights this takes distill_loss_weight; that of the classification is 1.
class RSDTask(FeatureDistillationTask):  # rsd
    rsd = RSDLoss(kappa=0.0, reduction="mean")  # rsd

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # rsd
        out, s = self.trainable_module(input)  # rsd
        mean, std = self.student_mean, self.student_std  # rsd
        t = self.teacher(self.teacher.normalize_input(input, mean, std), True)  # rsd
        rsd = self.distill_loss_weight * self.rsd(s, t)  # rsd
        return {"loss": self.criterion(out, target) + rsd, "output": out}  # rsd


def loader(split: Split, model: nn.Module) -> DataLoader:
    """Batches of three channels, 32 x 32, with the model's normalisation, as timm's own loader gives them."""
    low, high = split.images.min(), split.images.max()
    images = interpolate((split.images - low) / (high - low), (32, 32), mode="bilinear").repeat(1, 3, 1, 1)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return DataLoader(TensorDataset((images - mean) / std, split.labels), batch_size=50, shuffle=True, drop_last=True)


def new_task(student: nn.Module, teacher: nn.Module) -> FeatureDistillationTask:
    # timm itself freezes the teacher in prepare_distributed only. Frozen, it builds no graph.
    teacher.requires_grad_(False)
    criterion = nn.CrossEntropyLoss()
    task = RSDTask(student, teacher, criterion, distill_loss_weight=25.0)  # rsd
    widths = student.head_hidden_size, teacher.head_hidden_size  # rsd
    task.trainable_module.projection = DecouplingProjector(*widths)  # rsd
    # Then task.to(device), task.compile() and task.prepare_distributed(), in this order.
    return task


def fit(model: nn.Module, batches: DataLoader, epochs: int) -> None:
    """Trains the teacher with the labels."""
    optimizer = create_optimizer_v2(model.train(), opt="adamw", lr=3e-3)
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    """In percent."""
    model.eval()
    correct = torch.cat([model(images).argmax(1) == labels for images, labels in batches])
    return 100 * correct.float().mean().item()


def main(epochs: int = 12) -> tuple[FeatureDistillationTask, float]:
    """Returns the task after training, and the student's test accuracy in percent."""
    train, _, test = load_splits()
    torch.manual_seed(0)
    teacher = timm.create_model(TEACHER, num_classes=10)
    student = timm.create_model(**STUDENT, num_classes=10)
    fit(teacher, loader(train, teacher), epochs // 2)
    task = new_task(student, teacher)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=3e-3, weight_decay=0.05)
    task.setup_ema(decay=0.9)
    batches = loader(train, student)
    for _ in range(epochs):
        task.train()
        for images, labels in batches:
            result = task(images, labels)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            task.update_ema()
    result = accuracy(task.get_eval_model(), loader(test, student))
    print(f"test accuracy: teacher {accuracy(teacher, loader(test, teacher)):.1f} %, student {result:.1f} %")
    return task, result


if __name__ == "__main__":
    main()
