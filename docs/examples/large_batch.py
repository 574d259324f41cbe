"""The loss of a batch that does not fit in memory, exactly: gradient accumulation over cached embeddings.

Averaging the losses of micro-batches is not the loss of the batch: each would be correlated over its own few rows. But
the loss needs the embeddings only, and they are small. So: embed all micro-batches without gradients, take the loss
and its gradient with respect to all embeddings at once, then embed each micro-batch again and pull its part of that
gradient back. The price is a second forward pass of the encoder; its activations are held for one micro-batch only.

The projector sees all embeddings at once, so that its BatchNorm has the statistics of the batch. The encoder must treat
each image alike whatever the others are (LayerNorm, GroupNorm, frozen BatchNorm), and repeats its random choices.

Run it with ``python docs/examples/large_batch.py``: it takes the same step with and without, and prints how far apart
the gradients are.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from rsd_loss import DecouplingProjector, RSDLoss


def accumulate(
    encoder: nn.Module,
    projector: nn.Module,
    head: nn.Module,
    images: Tensor,
    labels: Tensor,
    teacher_embedding: Tensor,
    micro_batch: int,
    weight: float = 25.0,
) -> Tensor:
    """Adds the gradients of the whole batch's loss to the parameters, and returns the loss."""
    criterion = RSDLoss(kappa=0.0, reduction="mean")
    states, embeddings = [], []
    with torch.no_grad():
        for part in images.split(micro_batch):
            states.append(torch.get_rng_state())  # on a GPU: torch.cuda.get_rng_state()
            embeddings.append(encoder(part))
    embedding = torch.cat(embeddings).requires_grad_()
    loss = F.cross_entropy(head(embedding), labels) + weight * criterion(projector(embedding), teacher_embedding)
    loss.backward()  # reaches the head, the projector and the embeddings
    assert embedding.grad is not None
    after = torch.get_rng_state()
    for part, gradient, state in zip(images.split(micro_batch), embedding.grad.split(micro_batch), states, strict=True):
        torch.set_rng_state(state)
        encoder(part).backward(gradient)
    torch.set_rng_state(after)
    return loss.detach()


def whole(
    encoder: nn.Module,
    projector: nn.Module,
    head: nn.Module,
    images: Tensor,
    labels: Tensor,
    teacher_embedding: Tensor,
    weight: float = 25.0,
) -> Tensor:
    """The same in one go, for comparison."""
    embedding = encoder(images)
    loss = F.cross_entropy(head(embedding), labels) + weight * RSDLoss(kappa=0.0, reduction="mean")(
        projector(embedding), teacher_embedding
    )
    loss.backward()
    return loss.detach()


def main() -> float:
    """Compares the two; returns the largest difference of a gradient, relative to the largest gradient."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = (torch.tensor(pixels[:1024] / 16, dtype=torch.float32), torch.tensor(digits[:1024]))
    encoder = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 48))
    projector, head = DecouplingProjector(48, 96), nn.Linear(48, 10)
    teacher_embedding = torch.tanh(images @ torch.randn(64, 96))  # stands in for a teacher
    modules = nn.ModuleList((encoder, projector, head))
    gradients = []
    for step, settings in ((whole, {}), (accumulate, {"micro_batch": 100})):
        modules.zero_grad()
        loss = step(encoder, projector, head, images, labels, teacher_embedding, **settings)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in modules.parameters()]))
        print(f"{step.__name__:<10} loss {loss:.6f}")
    difference = ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item()
    print(f"largest difference of the gradients: {difference:.1e} of the largest gradient")
    return difference


if __name__ == "__main__":
    main()
