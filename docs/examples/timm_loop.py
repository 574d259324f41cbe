"""Any two timm models in a loop of your own, with RSD on their embeddings and on every position of a feature map.

The lines that RSD adds or changes end in ``# rsd``. A CNN, a ViT with a class token, a Swin and a mixer take the same
lines: ``forward_intermediates`` gives the maps of all as (B, C, H, W), without class and register tokens.

Run it with ``python docs/examples/timm_loop.py``: a ResNet teaches a ViT handwritten digits.
"""

import timm
import torch
import torch.nn.functional as F
from digits import Split, load_splits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rsd_loss import DecouplingProjector, rsd_loss  # rsd
from rsd_loss.features import dense_pairs  # rsd

# Small ones for images of 64 x 64. Yours need no more than a name.
MODELS = {
    "cnn": {"model_name": "test_resnet"},
    "vit": {"model_name": "test_vit", "img_size": 64},
    "swin": {"model_name": "swin_tiny_patch4_window7_224", "img_size": 64, "window_size": 4, "embed_dim": 24},
    "mixer": {"model_name": "mixer_s32_224", "img_size": 64},
}
MODELS["swin"] |= {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}


def features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # rsd
    # The last two stages of a CNN or a Swin, the last two blocks of a ViT or a mixer; the first of the two is taken.
    last, maps = model.forward_intermediates(images, indices=2)  # rsd
    return model.forward_head(last), model.forward_head(last, pre_logits=True), maps[0]  # rsd


def new_projectors(student: nn.Module, teacher: nn.Module, images: Tensor) -> nn.ModuleList:
    widths = [[x.shape[1] for x in features(model.eval(), images)[1:]] for model in (student, teacher)]  # rsd
    return nn.ModuleList(map(DecouplingProjector, *widths))  # rsd


def objective(
    student: nn.Module, teacher: nn.Module, projectors: nn.ModuleList, images: Tensor, labels: Tensor
) -> Tensor:
    logits, s, s_map = features(student, images)  # rsd
    loss = F.cross_entropy(logits, labels)
    _, t, t_map = features(teacher, images)  # rsd
    pairs = (s, t), dense_pairs(s_map, t_map)  # rsd
    return loss + 0.1 * sum(rsd_loss(p(a), b) for p, (a, b) in zip(projectors, pairs, strict=True))  # rsd


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


def main(epochs: int = 8, teacher: str = "cnn", student: str = "vit", compiled: bool = False) -> float:
    """Returns the student's test accuracy in percent."""
    train, _, test = load_splits()
    torch.manual_seed(0)
    above, below = (timm.create_model(**MODELS[name], num_classes=10) for name in (teacher, student))
    fit(above, loader(train), epochs=2)
    above.eval().requires_grad_(False)  # frozen, it builds no graph
    batches = loader(train)
    projectors = new_projectors(below, above, next(iter(batches))[0])
    optimizer = torch.optim.AdamW([*below.parameters(), *projectors.parameters()], lr=3e-3)  # rsd
    step = torch.compile(objective) if compiled else objective  # one graph, with the loss in it
    for _ in range(epochs):
        below.train()
        for images, labels in batches:
            optimizer.zero_grad()
            step(below, above, projectors, images, labels).backward()
            torch.nn.utils.clip_grad_norm_(below.parameters(), 5.0)
            optimizer.step()
    below.eval()
    with torch.no_grad():
        correct = torch.cat([below(images).argmax(1) == labels for images, labels in loader(test)])
    accuracy = 100 * correct.float().mean().item()
    print(f"test accuracy: {accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
