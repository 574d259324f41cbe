"""What backends, modules, features and diagnostics share: checks, dtypes, and the refusal of a second derivative."""

import numbers
from typing import Any, NoReturn

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_number(name: str, value: float) -> None:
    """Raises unless value is a finite number that is not negative."""
    # A tensor is refused too: comparing it would read its value, a hidden device synchronisation.
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: pass a Python float")
    if not 0 <= value <= 1e308:  # an int or a fraction may be more than any float
        raise ValueError(f"{name} must be a finite number that is not negative, got {value}")


def check_tensor(name: str, x: object) -> None:
    """Raises unless x is a tensor."""
    if not isinstance(x, Tensor):
        way_out = "convert it with torch.as_tensor"
        if x is None or isinstance(x, (tuple, dict)):
            way_out = "pick the embedding out of the model's output"
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}: {way_out}")


def check_embeddings(student: Tensor, teacher: Tensor, same_width: bool = False, min_rows: int = 2) -> None:
    """Raises unless both are (B, D) floating-point tensors that fit; looks at metadata only, never at values."""
    for name, x in (("student", student), ("teacher", teacher)):
        check_tensor(name, x)
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}: "
                "pass real-valued embeddings, not labels or indices"
            )
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}: pass {name}.to_dense()")
        if x.ndim != 2:
            pooled = "pool maps and tokens with rsd_loss.features.pool, or make samples of positions with dense_pairs"
            way_out = pooled if x.ndim > 2 else "keep the batch dimension"
            raise ValueError(f"{name} must be (batch, features), got shape {tuple(x.shape)}: {way_out}")
        if x.shape[1] == 0:
            raise ValueError(f"{name} must have at least one feature, got shape {tuple(x.shape)}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student has {student.shape[0]} rows and teacher {teacher.shape[0]}: "
            "give both networks the same batch, so that row i of both is the same sample"
        )
    if student.shape[0] < min_rows:
        raise ValueError(
            f"student and teacher must have at least {min_rows} row{'s' * (min_rows > 1)} to correlate over, "
            f"got {student.shape[0]}: skip the batch{' in all processes' * (min_rows < 2)}, "
            "or set drop_last=True in the DataLoader"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student is on {student.device} and teacher on {teacher.device}: "
            "move the teacher's with .to(student.device)"
        )
    if getattr(student, "placements", None) != getattr(teacher, "placements", None):
        raise ValueError(
            "student and teacher must be DTensors with the same placements, or neither one: redistribute the teacher"
        )
    if same_width and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student has {student.shape[1]} features and teacher {teacher.shape[1]}: "
            f"project the student with DecouplingProjector({student.shape[1]}, {teacher.shape[1]}), "
            f"or give the projector that it comes from out_features={teacher.shape[1]}"
        )


def needs_reference(*embeddings: Tensor) -> str | None:
    """Why only the plain formula can take these embeddings, or None if others can."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms differentiate and batch plain operations only"
    if any(hasattr(x, "device_mesh") for x in embeddings):
        return "an embedding is a DTensor, of which it would see the local part only"
    return None


def statistics_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """That of means, norms and sums: at least float32."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def product_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """That of the matrix products: autocast's, else that of the embeddings."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    device = student.device.type
    # As for any matmul under autocast, float64 stays as it is.
    return torch.get_autocast_dtype(device) if autocasts(device) and dtype != torch.float64 else dtype


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)  # meta has no autocast to ask about


def once_differentiable(grads: list[Tensor | None], *inputs: Tensor) -> list[Tensor | None]:
    """Under create_graph=True, makes gradients refuse to be differentiated with respect to the inputs."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    return [None if grad is None else _Once.apply(grad, *inputs) for grad in grads]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            "the fast implementations of rsd_loss have no second derivative: "
            'pass implementation="reference" where double backward is needed'
        )
