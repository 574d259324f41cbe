"""Any two timm models in a loop of your own, with RSD on their embeddings and at every position of a feature map.

The lines that RSD adds or changes end in ``# rsd``. A CNN, a ViT with a class token, a Swin and a mixer take the same
lines: ``forward_intermediates`` gives the maps of all as (B, C, H, W), without class and register tokens.

Run it with ``python docs/examples/timm_loop.py``: a ResNet teaches a ViT handwritten digits.
"""

import timm
import torch
import torch.nn.functional as F
from digits import Split, load_splits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rsd_loss import DecouplingProjector, RSDLoss  # rsd
from rsd_loss.features import dense_pairs  # rsd

# Small ones for images of 64 x 64. Yours need no more than a name.
MODELS = {
    "cnn": {"model_name": "test_resnet"},
    "vit": {"model_name": "test_vit", "img_size": 64},
    "swin": {
        "model_name": "swin_tiny_patch4_window7_224",
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 4, 8),
    },
    "mixer": {"model_name": "mixer_s32_224", "img_size": 64},
}

criterion = RSDLoss(kappa=0.0, reduction="mean")  # rsd


def features(model, images):  # rsd
    # Of the last two stages (CNN, Swin) or blocks (ViT, mixer), the first.
    last, maps = model.forward_intermediates(images, indices=2)  # rsd
    embedding = model.forward_head(last, pre_logits=True)  # rsd
    return model.forward_head(last), embedding, maps[0]  # rsd


@torch.no_grad()  # rsd
def new_projectors(student, teacher, images):  # rsd
    _, s, s_map = features(student.eval(), images)  # rsd
    _, t, t_map = features(teacher.eval(), images)  # rsd
    student.train()  # rsd
    widths = (s.shape[1], t.shape[1]), (s_map.shape[1], t_map.shape[1])  # rsd
    projectors = [DecouplingProjector(*pair) for pair in widths]  # rsd
    return nn.ModuleList(projectors).to(images.device)  # rsd


def objective(student, teacher, projectors, images, labels):  # rsd
    logits, s, s_map = features(student, images)  # rsd
    loss = F.cross_entropy(logits, labels)
    with torch.no_grad():  # rsd
        _, t, t_map = features(teacher, images)  # rsd
    pairs = (s, t), dense_pairs(s_map, t_map)  # rsd
    for projector, (a, b) in zip(projectors, pairs, strict=True):  # rsd
        loss = loss + 25 * criterion(projector(a), b)  # rsd
    return loss


def loader(split: Split) -> DataLoader:
    images = F.interpolate(split.images, (64, 64), mode="bilinear").repeat(1, 3, 1, 1)
    return DataLoader(TensorDataset(images, split.labels), batch_size=50, shuffle=True, drop_last=True)


def fit(model: nn.Module, batches: DataLoader, epochs: int) -> None:
    """Trains the teacher with the labels."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    """In percent."""
    model.eval()
    correct = torch.cat([model(images).argmax(1) == labels for images, labels in batches])
    return 100 * correct.float().mean().item()


def main(epochs: int = 8, names: tuple[str, str] = ("vit", "cnn"), compiled: bool = False) -> float:
    """Returns the student's test accuracy in percent; ``names`` are the student's and the teacher's."""
    train, _, test = load_splits()
    torch.manual_seed(0)
    student, teacher = (timm.create_model(**MODELS[name], num_classes=10) for name in names)
    fit(teacher, loader(train), epochs)
    batches = loader(train)
    teacher.eval().requires_grad_(False)  # rsd
    projectors = new_projectors(student, teacher, next(iter(batches))[0])  # rsd
    trained = nn.ModuleList([student, projectors])  # rsd
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)  # rsd
    # Compiled, student, teacher and loss are one graph.
    step = torch.compile(objective) if compiled else objective
    for _ in range(epochs):
        student.train()
        for images, labels in batches:
            optimizer.zero_grad()
            step(student, teacher, projectors, images, labels).backward()  # rsd
            torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)  # the projectors stay out of the norm
            optimizer.step()
    result = accuracy(student, loader(test))
    print(f"test accuracy: teacher {accuracy(teacher, loader(test)):.1f} %, student {result:.1f} %")
    return result


if __name__ == "__main__":
    main()
