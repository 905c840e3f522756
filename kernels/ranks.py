"""Several processes that train as one, on one machine or on many: `mpiexec -n R python weak.py …`

Data parallelism: each rank takes its part of a batch, and the gradients are summed over the ranks
before each of them makes the same update. The sums go by MPI between CPUs, by NCCL between GPUs;
a layer's sum is on its way while the layers below it are still computed. One rank needs no mpi4py.
"""
import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


class Alone:
    """The one rank where there are no others: every sum is there already."""

    rank = 0
    size = 1
    local_rank = 0                      # among the ranks of this machine
    local_size = 1
    waited = 0.0                        # seconds spent in `wait`

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

    def abort(self, status):
        """End this process and all other ranks with this exit status."""
        sys.exit(status)


class Ranks(Alone):
    """This process among those that mpiexec started."""

    def __init__(self):
        from mpi4py import MPI
        self.mpi = MPI
        self.world = MPI.COMM_WORLD
        self.rank = self.world.Get_rank()
        self.size = self.world.Get_size()
        local = self.world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank = local.Get_rank()
        self.local_size = local.Get_size()
        self.sums = self.world.Dup()            # sums and votes under way must not be mixed up
        self.thread = ThreadPoolExecutor(1)     # sums are begun in the same order on every rank
        self.futures = []                       # of the sums between CPUs that are under way
        self.nccl = None                        # what sums between GPUs, once it is needed
        self.stream = None                      # where it does

    def allreduce(self, numbers):
        return self.world.allreduce(np.array(numbers, np.float64))

    def gather(self, rows):
        lists = self.world.gather(list(rows))
        if lists is None:                       # this is not the first rank
            return []
        return list(itertools.chain.from_iterable(lists))

    def broadcast(self, thing):
        everyone_is_here = self.world.Ibarrier()
        while not everyone_is_here.Test():      # a wait of MPI's own would take a whole core
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
            self.futures.append(self.thread.submit(self.sums.Allreduce, self.mpi.IN_PLACE, x))
        else:
            self._begin_on_gpu(x)

    def _begin_on_gpu(self, x):
        """Sum by NCCL, on a stream beside the computation."""
        import cupy
        if self.nccl is None:
            from cupyx.distributed import NCCLBackend
            self.nccl = NCCLBackend(self.size, self.rank, use_mpi=True)
            self.stream = cupy.cuda.Stream(non_blocking=True)
        computing = cupy.cuda.get_current_stream()
        self.stream.wait_event(computing.record())          # x is computed
        self.nccl.all_reduce(x, x, "sum", self.stream)

    def wait(self):
        started = time.monotonic()
        for future in self.futures:
            future.result()
        self.futures.clear()
        if self.stream is not None:
            import cupy
            # the stream sums in order: its end ends them all
            cupy.cuda.get_current_stream().wait_event(self.stream.record())
        self.waited += time.monotonic() - started

    def abort(self, status):
        self.world.Abort(status)


joined = Alone()                        # what this process is part of


def join():
    """Join the other ranks of an mpiexec, if any; RuntimeError if mpi4py is not fit for that."""
    global joined
    sizes = [int(os.environ.get(name, 0)) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")]
    launched = max(sizes)
    if launched <= 1 and "PMIX_RANK" not in os.environ:
        return joined
    try:
        ranks = Ranks()
    except ImportError:
        raise RuntimeError("several ranks need mpi4py: pip install mpi4py") from None
    if ranks.size == 1 and launched > 1:
        raise RuntimeError("this mpiexec is not of the MPI that mpi4py uses; call that one's, "
                           "such as the one of `pip install mpich`")
    joined = ranks
    return joined
