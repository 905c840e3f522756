"""Several processes that train as one, on one machine or on many: `mpiexec -n R python weak.py …`

Data parallelism: each rank takes its part of a batch, and the gradients are summed over the ranks
before each of them makes the same update. The sums go by MPI between CPUs, by NCCL between GPUs;
a layer's sum is on its way while the layers below it are still computed. One rank needs no mpi4py.
"""
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

GRACE = 2                               # seconds in which the first rank may tell what went wrong


class Alone:
    """The one rank where there are no others: every sum is there already."""

    rank, size, local_rank, local_size, waited = 0, 1, 0, 1, 0.0

    def part(self, n):
        """The slice of n rows that is this rank's."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def allreduce(self, numbers):
        """Σ over the ranks of a few numbers, float64."""
        return np.array(numbers, np.float64)

    def gather(self, rows):
        """All ranks' rows in the order of ranks, a list, on the first rank; on the others []."""
        return list(rows)

    def broadcast(self, thing):
        """The first rank's thing, on all ranks."""
        return thing

    def begin_allreduce(self, x):
        """Begin to replace the array x by its sum over the ranks."""

    def wait(self):
        """Until all sums that were begun are there; `waited` counts the seconds."""

    def fail(self, status, line):
        """End the job with this exit status and one line that says why."""
        print(line, file=sys.stderr, flush=True)
        sys.exit(status)


class Ranks(Alone):
    """This process among those that mpiexec started; only the first one's output is shown."""

    def __init__(self):
        from mpi4py import MPI
        self.mpi, self.world = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.world.Get_rank(), self.world.Get_size()
        local = self.world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.Get_rank(), local.Get_size()
        self.sums, self.thread = self.world.Dup(), ThreadPoolExecutor(1)
        self.running, self.nccl = [], None
        if self.rank:
            sys.stdout = open(os.devnull, "w")

    def allreduce(self, numbers):
        return self.world.allreduce(np.array(numbers, np.float64))

    def gather(self, rows):
        return [row for part in self.world.gather(list(rows)) or () for row in part]

    def broadcast(self, thing):
        here = self.world.Ibarrier()
        while not here.Test():                  # a wait of MPI's own would take a whole core
            time.sleep(0.005)
        return self.world.bcast(thing)

    def check_gpus(self, count):
        """RuntimeError, with the remedy, unless every rank has a GPU and a way to the others."""
        from cupy.cuda import nccl              # CuPy does not import it by itself
        if self.local_size > count:
            raise RuntimeError(f"{self.local_size} ranks on a machine with {count} GPUs: start one "
                               "for each, or use --device cpu")
        if not nccl.available:
            raise RuntimeError("GPU ranks need NCCL: pip install nvidia-nccl-cu12, or --device cpu")

    def begin_allreduce(self, x):
        if isinstance(x, np.ndarray):
            running = self.thread.submit(self.sums.Allreduce, self.mpi.IN_PLACE, x)
            self.running.append(running.result)
            return
        import cupy                             # by NCCL, on a stream beside the computation
        if self.nccl is None:
            from cupyx.distributed import NCCLBackend
            self.nccl = NCCLBackend(self.size, self.rank, use_mpi=True)
            self.stream = cupy.cuda.Stream(non_blocking=True)
        main = cupy.cuda.get_current_stream()
        self.stream.wait_event(main.record())   # x is computed
        self.nccl.all_reduce(x, x, "sum", self.stream)
        self.running.append(partial(main.wait_event, self.stream.record()))

    def wait(self):
        started = time.monotonic()
        for wait in self.running:
            wait()
        self.running.clear()
        self.waited += time.monotonic() - started

    def fail(self, status, line):
        if self.rank:                           # what fails everywhere is told once, by the first
            time.sleep(GRACE)
            line = f"rank {self.rank} of {self.size}: {line}"
        print(line, file=sys.stderr, flush=True)
        time.sleep(0.3)                         # until mpiexec has passed it on
        self.world.Abort(status)


joined = Alone()                        # what this process is part of


def join():
    """Join the other ranks of an mpiexec, if any; RuntimeError if mpi4py is not fit for that."""
    global joined
    launched = max(int(os.environ.get(name, 0)) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if launched > 1 or "PMIX_RANK" in os.environ:
        try:
            found = Ranks()
        except ImportError:
            raise RuntimeError("several ranks need mpi4py: pip install mpi4py") from None
        if found.size == 1 < launched:
            raise RuntimeError("this mpiexec is not of the MPI that mpi4py uses; call that one's, "
                               "such as the one of `pip install mpich`")
        joined = found
    return joined
