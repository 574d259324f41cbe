"""Processes joined by gloo, started once, that run a test's function each on its own part of the data."""

import datetime
import os
import traceback

import torch
import torch.distributed as dist

SIZE = 4
SECONDS = 30


class Pool:
    """Process r calls function(rank, group, *args) where the group is that of the first ``size`` processes."""

    def __init__(self, folder):
        context = torch.multiprocessing.get_context("spawn")
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
        self.pipes, self.processes = [], []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, folder / "store", theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        if before is None:
            del os.environ["TRITON_INTERPRET"]

    def run(self, size, function, *args):
        """Raises with the first traceback if any process raises; a process that hangs makes all of them time out."""
        for pipe in self.pipes[:size]:
            pipe.send((size, function, args))
        failed = []
        for rank, pipe in enumerate(self.pipes[:size]):
            error = pipe.recv() if pipe.poll(4 * SECONDS) else "hangs"
            failed += [f"rank {rank}: {error}"] if error else []
        # Where one process fails, others wait for it in vain: its own complaint comes first.
        failed.sort(key=lambda error: ("hangs" in error, "gloo" in error))
        assert not failed, "\n".join(failed)

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank, store, pipe):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills memory that is not initialised with NaN
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=timeout)
    groups = {size: dist.new_group(range(size)) for size in range(1, SIZE)}
    while True:
        size, function, args = pipe.recv()
        try:
            function(rank, groups.get(size), *args)  # None is the default group, of all
        except BaseException:
            pipe.send(traceback.format_exc())
        else:
            pipe.send(None)
