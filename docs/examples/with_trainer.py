"""RSD in a subclass of Hugging Face's Trainer, as one that distils logits has it.

The lines that RSD adds or changes end in ``# rsd``. The projector becomes a part of the student, so that the Trainer's
optimizer, DistributedDataParallel and checkpoints see it; delete it before you publish the student.

Run it with ``python docs/examples/with_trainer.py``: a ResNet teaches a ViT handwritten digits. Both are small and come
from configurations; nothing is downloaded.
"""

import tempfile
from typing import Any

import torch
from digits import Split, load_splits
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from rsd_loss import DecouplingProjector, rsd_loss  # rsd
from rsd_loss.features import pool  # rsd

LABELS = {"num_channels": 1, "num_labels": 10}
VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}


class DistillationTrainer(Trainer):
    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        # The loss has statistics of its micro-batch: it is a value per micro-batch, which the Trainer must divide by
        # the number of accumulation steps. Left as it is for a model whose forward takes **kwargs, the Trainer takes
        # the loss to be divided by num_items_in_batch already, and accumulated gradients come out as their sum.
        # Accumulation does not enlarge the batch that the loss sees; large_batch.py does.
        # The class attribute loss_is_scaled_for_ga = False says the same to the newest transformers only.
        self.model_accepts_loss_kwargs = False  # rsd

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # In evaluation the loss is the student's own: a last batch of one row has no statistics, and the hidden states
        # would be gathered with the predictions.
        outputs = model(**inputs, output_hidden_states=model.training)  # rsd
        loss = outputs.loss
        if model.training:  # rsd
            with torch.no_grad():
                taught = self.teacher(**inputs, output_hidden_states=True)  # rsd
            # self.model is the student, where ``model`` may be a wrapper.
            projected = self.model.projector(embedding(self.model, outputs))  # rsd
            target = pool(taught.hidden_states[-1])  # rsd
            term = rsd_loss(projected, target, kappa=0.0, reduction="mean")  # rsd
            loss = loss + 25 * term  # rsd
        return (loss, outputs) if return_outputs else loss


def embedding(student: ViTForImageClassification, outputs: Any) -> Tensor:  # rsd
    # The classifier sees the class token after the last norm, hidden_states are before it.
    return student.vit.layernorm(outputs.hidden_states[-1])[:, 0]  # rsd


def dataset(split: Split) -> list[dict[str, Tensor]]:
    images = interpolate(split.images, (16, 16), mode="bilinear")
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, split.labels, strict=True)]


def new_models() -> tuple[ViTForImageClassification, ResNetForImageClassification]:
    """The student with its projector, and the teacher, as new."""
    student = ViTForImageClassification(ViTConfig(**LABELS, **VIT, intermediate_size=96))
    teacher = ResNetForImageClassification(ResNetConfig(**LABELS, **RESNET))
    widths = student.config.hidden_size, teacher.config.hidden_sizes[-1]  # rsd
    student.projector = DecouplingProjector(*widths)  # rsd
    return student, teacher


def arguments(folder: str, **options: Any) -> TrainingArguments:
    common = {"per_device_train_batch_size": 50, "learning_rate": 3e-3, "report_to": "none", "save_strategy": "no"}
    # A batch of one row has no statistics, so the last is dropped; in evaluation and prediction as well, so let its
    # batch size divide the rows, or set trainer.args.dataloader_drop_last = False before. For a transformers model
    # DistributedDataParallel looks for unused parameters, finds the projector's and fails when they are used later.
    common["dataloader_drop_last"] = True  # rsd
    common["ddp_find_unused_parameters"] = False  # rsd
    return TrainingArguments(folder, disable_tqdm=True, **(common | options))


def accuracy(trainer: Trainer, rows: list[dict[str, Tensor]]) -> float:
    """In percent."""
    predicted = trainer.predict(rows)
    return 100 * (predicted.predictions.argmax(1) == predicted.label_ids).mean().item()


def main(epochs: int = 8) -> tuple[DistillationTrainer, float]:
    """Returns the trainer and the student's test accuracy in percent."""
    train, _, test = (dataset(split) for split in load_splits())
    torch.manual_seed(0)
    student, teacher = new_models()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(teacher, arguments(folder, num_train_epochs=6), train_dataset=train)
        trainer.train()
        above = accuracy(trainer, test)
        options = arguments(folder, num_train_epochs=epochs, per_device_eval_batch_size=50)
        trainer = DistillationTrainer(student, options, teacher=teacher, train_dataset=train)
        trainer.train()
    result = accuracy(trainer, test)
    print(f"test accuracy: teacher {above:.1f} %, student {result:.1f} %")
    return trainer, result


if __name__ == "__main__":
    main()
