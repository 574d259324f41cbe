"""RSD in a LightningModule, with the loss over the batch of all devices.

The lines that RSD adds or changes end in ``# rsd``. ``RSDLoss(gather_distributed=True)`` does its own communication:
there is no ``all_gather`` here, and in one process it is the ordinary loss. The projector is an attribute, so that
``configure_optimizers``, DistributedDataParallel and checkpoints see it. Its BatchNorm has the statistics of one
device; ``Trainer(sync_batchnorm=True)`` makes them those of all, on GPUs.

Run it with ``python docs/examples/with_lightning.py``; ``main(devices=2)`` takes two processes.
"""

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from digits import ConvTeacher, ViTStudent, accuracy, all_shifts, load_splits, train_teacher
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from rsd_loss import DecouplingProjector, RSDLoss  # rsd


class Distiller(lightning.LightningModule):
    def __init__(self, teacher: ConvTeacher) -> None:
        super().__init__()
        self.student = ViTStudent()
        self.teacher = teacher.eval().requires_grad_(False)
        self.projector = DecouplingProjector(ViTStudent.width, teacher.width)  # rsd
        self.rsd = RSDLoss(kappa=0.0, reduction="mean", gather_distributed=True)  # rsd

    def train(self, mode: bool = True) -> "Distiller":
        """Lightning since 2.2 leaves the modes as they are when it starts to fit; this holds for every call."""
        super().train(mode)
        self.teacher.eval()
        return self

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        embedding, logits = self.student(images)  # rsd
        with torch.no_grad():  # rsd
            target, _ = self.teacher(images)  # rsd
        loss = F.cross_entropy(logits, labels)
        rsd = self.rsd(self.projector(embedding), target)  # rsd
        # The same on all devices: sync_dist is not needed.
        self.log("rsd", rsd.detach())
        return loss + 25 * rsd  # rsd

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)

    # A checkpoint is loaded into a module that has its teacher already. strict_loading=False would do in place of the
    # second hook, and would say nothing where the projector is missing either.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in self.teacher.state_dict(prefix="teacher."):
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].update(self.teacher.state_dict(prefix="teacher."))


def main(devices: int = 1, epochs: int = 8, **options: Any) -> tuple[lightning.Trainer, Distiller, float]:
    """Returns the trainer, the module and the student's test accuracy in percent; options are the Trainer's."""
    train, _, test = load_splits()
    lightning.seed_everything(0, verbose=False)
    teacher = ConvTeacher()
    train_teacher(teacher, all_shifts(train.images), train.labels, epochs=20)
    module = Distiller(teacher)
    # A batch of one row has no statistics: drop_last. With several devices Lightning gives each its own part.
    loader = DataLoader(TensorDataset(*train), batch_size=64 // devices, shuffle=True, drop_last=True)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options}
    strategy = "ddp_spawn" if devices > 1 else "auto"  # on GPUs "ddp"
    trainer = lightning.Trainer(devices=devices, strategy=strategy, max_epochs=epochs, **options)
    trainer.fit(module, loader)
    result = accuracy(module.student.eval(), test)
    print(f"test accuracy: teacher {accuracy(teacher, test):.1f} %, student {result:.1f} %")
    return trainer, module, result


if __name__ == "__main__":
    main()
