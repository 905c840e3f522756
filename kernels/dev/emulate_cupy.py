"""A stand-in for CuPy, as strict as CuPy is, for tests of gpu.Cuda on machines without a GPU.

Under `with installed(…):` it is what `import cupy` finds. Nothing converts its arrays to NumPy's
silently, and they have only the functions that the installed CuPy has. Memory is handed out with
garbage in it. Whatever is queued happens as late as streams and events allow: when the host waits
for it. So a copy may be on its way when its memory is somebody else's, for of page-locked memory
the block that was given back last is handed out first. Kernels are run by emulate.Emulator.
"""
import ctypes
import functools
import sys
from collections import defaultdict, deque
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np

from .emulate import RawModule

try:
    import cupy as REAL                         # needs no GPU to say what it has
    REAL.cuda.nvrtc.getVersion()                # loaded while CuPy finds itself
except ImportError:
    REAL = None

LIMITS = {"shared": 227 << 10, "multiprocessor": 228 << 10, "free": 8 << 30, "gpus": 1}


def real_has(path):
    """Whether CuPy has, e.g., ndarray.sum; True where it is not installed."""
    return not REAL or functools.reduce(lambda x, name: getattr(x, name, None), path.split("."),
                                        REAL) is not None


class Stream:
    """A queue of work: nothing of it is done before somebody waits for it."""

    def __init__(self, null=False, non_blocking=False):
        self.queue = deque()
        self.begun = 0                          # how much was queued so far
        self.over = 0                           # how much of that has happened

    def add(self, work):
        self.queue.append(work)
        self.begun += 1

    def run(self, place):
        """What was queued before that place happens now."""
        while self.over < place:
            self.over += 1
            with np.errstate(all="ignore"):
                self.queue.popleft()()

    def synchronize(self):
        self.run(self.begun)

    def record(self):
        return Event(self, self.begun)

    def wait_event(self, event):
        self.add(event.synchronize)

    def __enter__(self):
        current.append(self)
        return self

    def __exit__(self, *_):
        current.pop()


class Event(NamedTuple):
    """A place in a stream's queue."""
    stream: Stream
    place: int
    synchronize = lambda self: self.stream.run(self.place)
    done = property(lambda self: self.stream.over >= self.place)


current = [Stream(null=True)]           # the last one is in use
pinned = defaultdict(list)              # free blocks of page-locked memory, by size
blocks = {}                             # all of them, by address


def alloc_pinned_memory(size):
    block = pinned[size].pop() if pinned[size] else (ctypes.c_ubyte * size)()
    blocks[ctypes.addressof(block)] = block
    back = {"__del__": lambda self: pinned[size].append(block)}
    return type("PinnedMemoryPointer", (ctypes.c_ubyte * size,), back).from_buffer(block)


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array of the device."""

    def __init__(self, x, base=None):
        self._x = x                             # the numbers
        self.base = base                        # the array that this is a view of

    def _refuse(self, *_, **__):
        raise TypeError("nothing leaves the device silently: use asnumpy")

    __array__ = __float__ = __int__ = __bool__ = __index__ = __complex__ = _refuse

    def __array_ufunc__(self, ufunc, method, *inputs, **how):
        known = method == "__call__" and real_has(ufunc.__name__)
        return call(ufunc, inputs, how) if known else NotImplemented

    def __array_function__(self, function, types, args, how):
        known = all(issubclass(kind, ndarray) for kind in types) and real_has(function.__name__)
        return call(function, args, how) if known else NotImplemented

    def __getattr__(self, name):
        if name.startswith("_") or not real_has("ndarray." + name):
            raise AttributeError(f"cupy.ndarray has no {name}")
        value = getattr(self._x, name)
        if callable(value):
            return lambda *args, **how: call(value, args, how, self)
        return wrap(value, self)

    data = property(lambda self: SimpleNamespace(ptr=self._x.ctypes.data))

    def __len__(self):
        return len(self._x)

    def __getitem__(self, where):
        return call(self._x.__getitem__, (), {}, self, where)

    def __setitem__(self, where, value):
        where = unwrap(where, strict=False)
        value = unwrap(value)
        current[-1].add(lambda: self._x.__setitem__(where, value))

    def set(self, x, stream=None):
        """Copy from the host: page-locked memory is read when that happens, and nobody keeps it."""
        if type(x) is not np.ndarray or (x.dtype, x.shape) != (self.dtype, self.shape):
            raise TypeError("only a NumPy array of the same type and shape can be set")
        source = blocks.get(x.ctypes.data) or bytearray(x)
        dtype = x.dtype

        def copy():
            numbers = np.frombuffer(source, dtype, self._x.size)
            np.copyto(self._x, numbers.reshape(self._x.shape))
        (stream or current[-1]).add(copy)


def unwrap(value, strict=True):
    """What NumPy computes with; if strict, TypeError for an array of NumPy's."""
    if strict and isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(value, (list, tuple)):
        return type(value)(unwrap(item, strict) for item in value)
    return value._x if isinstance(value, ndarray) else value


def wrap(value, source=None):
    """A result of NumPy's as an array of the device, perhaps a view of `source`."""
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    view = source is not None and np.may_share_memory(value, source._x)
    return ndarray(np.asarray(value), (source if source.base is None else source.base) if view
                   else None)


def call(function, args, how, source=None, *where):
    """Queue a function of NumPy's, of which `where` may be arrays of NumPy's, too.

    What it gives for the garbage that its arguments still hold says the shape of the result.
    """
    def work():
        return function(*map(unwrap, args), *unwrap(where, strict=False),
                        **{key: unwrap(value) for key, value in how.items()})

    out = how.get("out")
    if out is not None:
        current[-1].add(work)
        return out[0] if isinstance(out, tuple) else out
    with np.errstate(all="ignore"):
        result = wrap(work(), source)
    if isinstance(result, ndarray) and result.base is None:
        result._x.fill(np.nan if result.dtype.kind == "f" else 1)
        if not function.__name__.startswith("empty"):
            current[-1].add(lambda: np.copyto(result._x, work()))
    return result


def array(x, dtype=None):
    """A copy; an array of the host is read at once."""
    return x.astype(dtype or x.dtype) if isinstance(x, ndarray) else ndarray(np.array(x, dtype))


def asnumpy(x):
    current[-1].synchronize()
    return np.array(unwrap(x, strict=False))


def from_numpy(name):
    """cupy.name, as NumPy's function of that name."""
    if name.startswith("_") or not real_has(name):
        raise AttributeError(f"cupy has no {name}")
    return lambda *args, **how: call(getattr(np, name), args, how)


class NCCLBackend:
    """cupyx.distributed's sums over the ranks, by MPI."""

    def __init__(self, n_devices, rank, use_mpi=False):
        from mpi4py import MPI
        self.world = MPI.COMM_WORLD.Dup()

    def all_reduce(self, in_array, out_array, op="sum", stream=None):
        stream.synchronize()                    # what is summed is there; the sum comes late
        total = np.empty_like(in_array._x)
        request = self.world.Iallreduce(in_array._x.copy(), total)  # which keeps the copy

        def finish():
            request.Wait()
            np.copyto(out_array._x, total)
        stream.add(finish)


@contextmanager
def installed(emulator, **limits):
    """`import cupy` finds the stand-in, whose kernels the emulator runs, with these LIMITS."""
    current[:] = [Stream(null=True)]            # nothing is left over from a launch that failed
    limits = SimpleNamespace(**{**LIMITS, **limits})
    facts = {"name": b"emulated", "multiProcessorCount": 3, "major": 9}     # 3: to split sums
    runtime = SimpleNamespace(
        getDeviceCount=lambda: limits.gpus, getDeviceProperties=lambda _: facts,
        memGetInfo=lambda: (limits.free, limits.free))
    cuda = dict(
        Stream=Stream, get_current_stream=lambda: current[-1], runtime=runtime,
        alloc_pinned_memory=alloc_pinned_memory, nvrtc=REAL and REAL.cuda.nvrtc,
        Device=lambda number: SimpleNamespace(use=lambda: None, attributes={
            "MaxSharedMemoryPerBlockOptin": limits.shared,
            "MaxSharedMemoryPerMultiprocessor": limits.multiprocessor}))
    contents = {
        "cupy": dict(ndarray=ndarray, array=array, asarray=array, asnumpy=asnumpy,
                     RawModule=functools.partial(RawModule, emulator, current),
                     cuda=SimpleNamespace(**cuda), __getattr__=from_numpy,
                     get_default_memory_pool=lambda: SimpleNamespace(free_bytes=lambda: 0),
                     _core=SimpleNamespace(_routines_linalg=mock.Mock())),
        "cupy.cuda": cuda, "cupy.cuda.nccl": dict(available=True),
        "cupyx": {}, "cupyx.distributed": dict(NCCLBackend=NCCLBackend)}
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        vars(module).update(contents[name])
    with mock.patch.dict(sys.modules, modules):
        yield
