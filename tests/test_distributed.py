"""gather_distributed: the same as off in one process, and a clear refusal in several."""

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from rsd_loss import RSDLoss, cross_correlation, rsd_loss


def two_processes(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    student, teacher = torch.randn(8, 6), torch.randn(8, 6)
    for call in (rsd_loss, cross_correlation):
        with pytest.raises(NotImplementedError, match=r"not there yet for 2 processes: pass False"):
            call(student, teacher, gather_distributed=True)
    with pytest.raises(NotImplementedError):
        RSDLoss(gather_distributed=True)(student, teacher)
    assert rsd_loss(student, teacher).isfinite()
    dist.destroy_process_group()


def test_several_processes_are_refused(tmp_path):
    spawn(two_processes, args=(tmp_path / "store",), nprocs=2)


def test_one_process_is_the_same_as_off():
    student, teacher = torch.randn(8, 6), torch.randn(8, 6)
    for call in (rsd_loss, cross_correlation):
        assert torch.equal(call(student, teacher, gather_distributed=True), call(student, teacher))
