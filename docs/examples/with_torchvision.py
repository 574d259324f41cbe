"""RSD with torchvision models, whose embeddings come out of the graph rather than through hooks.

The lines that RSD adds or changes end in ``# rsd``. ``create_feature_extractor`` traces a model once and returns a
module that shares its parameters and outputs the nodes asked for: no hook holds on to tensors, DistributedDataParallel
and ``torch.compile`` see an ordinary forward, and what the later layers do not need is not computed. Which nodes there
are, ``torchvision.models.feature_extraction.get_graph_node_names(model)`` tells.

Run it with ``python docs/examples/with_torchvision.py``: a ResNet teaches a ViT handwritten digits.
"""

import torch
import torch.nn.functional as F
from digits import Split, load_splits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor  # rsd
from torchvision.models.resnet import BasicBlock, ResNet

from rsd_loss import DecouplingProjector, RSDLoss  # rsd


def loader(split: Split) -> DataLoader:
    images = F.interpolate(split.images, (16, 16), mode="bilinear").repeat(1, 3, 1, 1)
    return DataLoader(TensorDataset(images, split.labels), batch_size=50, shuffle=True, drop_last=True)


def fit(model: nn.Module, batches: DataLoader, epochs: int) -> None:
    """Trains the teacher with the labels."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def distil(student: nn.Module, teacher: nn.Module, batches: DataLoader, epochs: int) -> DecouplingProjector:
    """Trains the student, whose parameters are those of its extractor, and returns the projector."""
    student.train()
    teacher.eval()
    # An extractor takes over the mode of its model. The student's embedding is its class token after the last norm,
    # which its head reads; the teacher's is the pooled map.
    projector = DecouplingProjector(student.hidden_dim, teacher.fc.in_features)  # rsd
    nodes = {"encoder.ln": "tokens", "heads": "logits"}  # rsd
    extractor = create_feature_extractor(student, nodes)  # rsd
    teacher = create_feature_extractor(teacher, {"flatten": "embedding"})  # rsd
    trained = nn.ModuleList([student, projector])  # rsd
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)  # rsd
    criterion = RSDLoss(kappa=0.0, reduction="mean")  # rsd
    for _ in range(epochs):
        for images, labels in batches:
            with torch.no_grad():
                target = teacher(images)
            tokens, logits = extractor(images).values()  # rsd
            loss = F.cross_entropy(logits, labels)
            projected = projector(tokens[:, 0])  # rsd
            loss = loss + 25 * criterion(projected, target["embedding"])  # rsd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return projector


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    """In percent."""
    model.eval()
    correct = torch.cat([model(images).argmax(1) == labels for images, labels in batches])
    return 100 * correct.float().mean().item()


def main(epochs: int = 8) -> tuple[nn.Module, nn.Module, float]:
    """Returns student, teacher and the student's test accuracy in percent."""
    train, _, test = load_splits()
    torch.manual_seed(0)
    teacher = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    student = VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=10
    )
    fit(teacher, loader(train), epochs)
    distil(student, teacher, loader(train), epochs)
    # The student is an ordinary torchvision model all along: nothing to unwrap, and its state dict is its own.
    result = accuracy(student, loader(test))
    print(f"test accuracy: teacher {accuracy(teacher, loader(test)):.1f} %, student {result:.1f} %")
    return student, teacher, result


if __name__ == "__main__":
    main()
