"""A plain PyTorch loop with RSD: mixed precision, and checkpoints from which training goes on as if never stopped.

The lines that RSD adds or changes end in ``# rsd``. Run it with ``python docs/examples/plain_loop.py``: it trains a
convolutional teacher on handwritten digits, distils a transformer from it, stops half-way and resumes.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import ConvTeacher, Split, ViTStudent, accuracy, all_shifts, load_splits, train_teacher
from torch.utils.data import DataLoader, TensorDataset

from rsd_loss import DecouplingProjector, RSDLoss  # rsd

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# float16 loses small gradients unless the loss is scaled; bfloat16 has the exponents of float32 and needs no scaling.
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16


def distil(teacher: ConvTeacher, train: Split, epochs: int, checkpoint: Path) -> tuple[ViTStudent, DecouplingProjector]:
    """Trains up to epoch ``epochs``, from the checkpoint's epoch if there is one; writes it after every epoch."""
    torch.manual_seed(0)
    # A batch of one row has no statistics: drop_last.
    loader = DataLoader(TensorDataset(*train), batch_size=64, shuffle=True, drop_last=True)
    student = ViTStudent().to(DEVICE)
    projector = DecouplingProjector(student.width, teacher.width)  # rsd
    projector.to(DEVICE)  # rsd
    trained = torch.nn.ModuleList([student, projector])  # rsd
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)  # rsd
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=DEVICE.type == "cuda")
    parts = {"student": student, "optimizer": optimizer, "scaler": scaler}
    parts["projector"] = projector  # rsd
    criterion = RSDLoss(kappa=0.0, reduction="mean")  # rsd

    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        start = saved["epoch"]
        torch.set_rng_state(saved["rng"])  # the order of the images; on a GPU also torch.cuda.set_rng_state
    teacher.to(DEVICE).eval()  # its BatchNorm uses the running statistics and leaves them alone
    for epoch in range(start, epochs):
        student.train()
        for batch in loader:
            images, labels = (x.to(DEVICE, non_blocking=True) for x in batch)
            with torch.autocast(DEVICE.type, DTYPE):
                embedding, logits = student(images)  # rsd
                with torch.no_grad():  # rsd
                    target, _ = teacher(images)  # rsd
                # Under autocast, too, statistics, sums and the loss are float32.
                loss = F.cross_entropy(logits, labels)
                loss = loss + 25 * criterion(projector(embedding), target)  # rsd
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**states, "epoch": epoch + 1, "rng": torch.get_rng_state()}, checkpoint)
    return student, projector


def main(epochs: int = 10) -> float:
    """Returns the student's test accuracy in percent."""
    train, _, test = load_splits()
    torch.manual_seed(0)
    teacher = ConvTeacher()
    train_teacher(teacher, all_shifts(train.images), train.labels, epochs=20)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "last.pt"
        distil(teacher, train, epochs // 2, checkpoint)  # stopped here
        student, _ = distil(teacher, train, epochs, checkpoint)  # goes on from there
    result = accuracy(student.cpu().eval(), test)
    print(f"test accuracy: teacher {accuracy(teacher.cpu(), test):.1f} %, student {result:.1f} %")
    return result


if __name__ == "__main__":
    main()
