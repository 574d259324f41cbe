"""RSD in torchdistill's configuration file, in the place of a hint that regresses the teacher's embedding.

The lines that RSD adds or changes end in ``# rsd``; those in the configuration are comments in YAML, too. The loss is
used as it is, through SimpleLossWrapper: its student side is the projector's output, its teacher side the embedding.
An auxiliary model wrapper holds the projector and runs it after the student. The hooks take an embedding as the input
of the model's head.

Run it with ``python docs/examples/with_torchdistill.py``: a convolutional network teaches a ViT handwritten digits.
"""

from typing import Any

import torch
import yaml
from digits import ConvTeacher, ViTStudent, accuracy, all_shifts, load_splits, train_teacher
from torch import Tensor, nn
from torch.utils.data import RandomSampler, TensorDataset
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.losses.registry import register_low_level_loss
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.util import wrap_if_distributed
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from rsd_loss import DecouplingProjector, RSDLoss  # rsd

register_low_level_loss(RSDLoss)  # rsd

# drop_last: a batch of one row has no statistics. requires_grad: False, or torchdistill trains the teacher, too.
CONFIG = """
num_epochs: 8
train_data_loader:
  dataset_id: train
  kwargs: {batch_size: 50, drop_last: True}
teacher:
  forward_proc: forward_batch_only
  forward_hook: {input: [head], output: []}
  requires_grad: False
student:
  forward_proc: forward_batch_only
  forward_hook: {input: [student_model.head], output: [student_model.head, projector]}
  auxiliary_model_wrapper:
    key: WithProjector
    kwargs: {embedding: student_model.head, student_width: 48, teacher_width: 64}
optimizer: {key: AdamW, kwargs: {lr: 0.003}}
criterion:
  key: WeightedSumLoss
  kwargs:
    sub_terms:
      cross_entropy:
        criterion: {key: CrossEntropyLoss, kwargs: {}}
        criterion_wrapper:
          key: SimpleLossWrapper
          kwargs: {input: {is_from_teacher: False, module_path: student_model.head, io: output}}
        weight: 1.0
      embedding:
        criterion: {key: RSDLoss, kwargs: {kappa: 0.0, reduction: mean}}  # rsd
        criterion_wrapper:
          key: SimpleLossWrapper
          kwargs:
            input: {is_from_teacher: False, module_path: projector, io: output}
            target: {is_from_teacher: True, module_path: head, io: input}
        weight: 25  # rsd
"""


@register_auxiliary_model_wrapper
class WithProjector(AuxiliaryModelWrapper):
    """The student, and beside it a projector that runs on the embedding which a hook caught."""

    def __init__(
        self, student_model: nn.Module, embedding: str, student_width: int, teacher_width: int, **options: Any
    ) -> None:
        super().__init__()
        where = {name: options[name] for name in ("device", "device_ids", "distributed")}
        # Wrapped as the student is.
        projector = DecouplingProjector(student_width, teacher_width)  # rsd
        self.student_model = wrap_if_distributed(student_model, **where)
        self.projector = wrap_if_distributed(projector, **where)
        self.embedding = embedding

    def forward(self, images: Tensor) -> Any:
        return self.student_model(images)

    def secondary_forward(self, io_dict: dict[str, Any]) -> None:
        self.projector(io_dict[self.embedding]["input"])


def new_box(student: nn.Module, teacher: nn.Module, train: TensorDataset) -> DistillationBox:
    config = yaml.safe_load(CONFIG)
    config["train_data_loader"]["sampler"] = {"class_or_func": RandomSampler}  # a class: yaml.safe_load cannot name it
    # torchdistill sets the student to training mode at every epoch; the teacher's mode is left to you.
    return get_distillation_box(
        teacher.eval(), student, {"train": train}, config, torch.device("cpu"), None, distributed=False, lr_factor=1
    )


def main() -> tuple[DistillationBox, float]:
    """Returns the box after training, and the student's test accuracy in percent."""
    train, _, test = load_splits()
    torch.manual_seed(0)
    teacher, student = ConvTeacher(), ViTStudent()
    train_teacher(teacher, all_shifts(train.images), train.labels, epochs=20)
    box = new_box(student, teacher, TensorDataset(*train))
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for images, labels, extra in box.train_data_loader:
            loss = box.forward_process(images, labels, extra)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
    result = accuracy(student.eval(), test)
    print(f"test accuracy: teacher {accuracy(teacher, test):.1f} %, student {result:.1f} %")
    return box, result


if __name__ == "__main__":
    main()
