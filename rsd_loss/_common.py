"""Shared argument checks, dtype rules, and the refusal of a second derivative."""

import math
import numbers
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_number(name: str, value: float) -> float:
    """Returns value as a Python float; raises unless it is a finite number of at least 0."""
    # A tensor is refused too: comparing it would read its value, a hidden device synchronisation.
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: pass a Python float")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number that is not negative, got {value}")
    return number


def check_integer(name: str, value: int, least: int = 1) -> int:
    """Returns value as an int; raises unless it is an integer (numpy's included) of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)  # a SymInt is a size that a compiler keeps


def check_tensor(name: str, x: object) -> None:
    """Raises unless x is a tensor of a floating-point dtype that the loss takes."""
    if not isinstance(x, Tensor):
        way_out = "convert it with torch.as_tensor"
        if x is None or isinstance(x, (tuple, dict)) or (isinstance(x, list) and x and isinstance(x[0], Tensor)):
            way_out = "pick the embedding out of the model's output; for several layers, call the loss once for each"
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}: {way_out}")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}: "
            "pass real-valued embeddings, not labels or indices"
        )


def check_embedding(name: str, x: Tensor, min_rows: int = 0) -> None:
    """Raises unless x is a dense (B, D) tensor; like all checks, looks at metadata only, never at values."""
    check_tensor(name, x)
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}: pass {name}.to_dense()")
    if x.ndim != 2:
        pooled = "pool maps and tokens with rsd_loss.features.pool, or make samples of positions with dense_pairs"
        way_out = pooled if x.ndim > 2 else "keep the batch dimension"
        raise ValueError(f"{name} must be (batch, features), got shape {tuple(x.shape)}: {way_out}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one feature, got shape {tuple(x.shape)}")
    if x.shape[0] < min_rows:
        raise ValueError(
            f"{name} must have at least {min_rows} row{'s' * (min_rows > 1)} to correlate over, got {x.shape[0]}: "
            f"skip the batch{' in all processes' * (min_rows < 2)}, or set drop_last=True in the DataLoader"
        )


def check_embeddings(student: Tensor, teacher: Tensor, same_width: bool = False, min_rows: int = 2) -> None:
    """Raises unless both are embeddings of the same batch, on the same device and, if so asked, of the same width."""
    check_embedding("student", student, min_rows)
    check_embedding("teacher", teacher, min_rows)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student has {student.shape[0]} rows and teacher {teacher.shape[0]}: "
            "give both networks the same batch, so that row i of both is the same sample"
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


def why_only_reference(*embeddings: Tensor) -> str | None:
    """Why these inputs need the reference implementation, or None."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms differentiate and batch plain operations only"
    if forward_ad._current_level >= 0:
        return "forward-mode AD differentiates plain operations only"
    if any(hasattr(x, "device_mesh") for x in embeddings):
        return "an embedding is a DTensor, of which it would see the local part only"
    return None


def statistics_dtype(*embeddings: Tensor) -> torch.dtype:
    """Dtype of means, norms and sums: float32 or wider."""
    return reduce(torch.promote_types, (x.dtype for x in embeddings), torch.float32)


def product_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Dtype of the matrix products: autocast's, else that of the embeddings."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    device = student.device.type
    # As for any matmul under autocast, float64 stays as it is.
    return torch.get_autocast_dtype(device) if autocasts(device) and dtype != torch.float64 else dtype


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)  # meta has no autocast to ask about


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Switches autocast off where it is on."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def refuse_second_derivative(x: Tensor, *inputs: Tensor) -> Tensor:
    """A copy of x that raises a clear error where it is differentiated with respect to itself or the inputs."""
    # Batched by is_grads_batched=True, with create_graph=True.
    if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(x):
        raise_no_second_derivative()
    return _refuse_op(x, list(inputs))


def raise_no_second_derivative(*_: Any) -> NoReturn:
    """The backward of a gradient, for torch's register_autograd."""
    raise RuntimeError(
        "the fast implementations of rsd_loss have no second derivative: "
        'pass implementation="reference" where double backward is needed'
    )


# An operator, as a compiler would look through a function and drop inputs of which no value is used.
_refuse_op = torch.library.custom_op(
    "rsd_loss::refuse", lambda x, inputs: x.clone(), mutates_args=(), schema="(Tensor x, Tensor[] inputs) -> Tensor"
)
_refuse_op.register_fake(lambda x, inputs: x.clone())
_refuse_op.register_autograd(raise_no_second_derivative)
