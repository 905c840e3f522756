"""The operations that the networks are made of, on the device that `use` chose.

After `use("cpu")`, kernels.conv_forward is cpu.conv_forward, and so on for each of OPERATIONS;
model.py calls them here and never asks where it runs. cpu.py holds the NumPy twins, which are the
specification, with the docstrings: gpu.py has functions of the same names and arguments that launch
the CUDA kernels of the .cu files.
"""
from . import cpu, ranks
from .cpu import threads

OPERATIONS = (
    "conv_forward", "conv_backward_input", "conv_backward_filter",
    "max_pool_forward", "max_pool_backward", "avg_pool_forward", "avg_pool_backward",
    "lrn_forward", "lrn_backward", "sum_gradients", "dropout", "prepare", "column_sums",
    "matmul", "softmax_loss", "one_vs_all_loss", "sgd",
    "to_device", "to_host", "host_empty", "memory")
DEVICES = ("auto", "cpu", "gpu")
PRECISIONS = ("fp32", "tf32", "3xtf32")


def _take(module):
    """The operations of a module become this one's."""
    globals().update({name: getattr(module, name) for name in OPERATIONS})


_take(cpu)


def use(device, precision=None, number=0):
    """Choose where everything computes from now on; returns one line that says what was chosen.

    device: one of DEVICES. precision: one of PRECISIONS, for a GPU; if None, tf32 where it has
    tensor cores for that. number: which of the GPUs. RuntimeError if what is asked for cannot be.
    """
    found, why = _find(device, number)
    if found is None:
        _take(cpu)
        count = threads.count
        note = f"; --precision {precision} is for a GPU" if precision in PRECISIONS[1:] else ""
        return f"device: CPU, {count} thread{'s' * (count > 1)}, NumPy{why}{note}"
    from . import gpu
    precision = precision or ("tf32" if found.tf32 else "fp32")
    gpu.use(found, precision)
    _take(gpu)
    return f"device: {found.name}, {precision}"


def _find(device, number):
    """The GPU, or None for the CPU, and why there is no GPU: CuPy is optional at run time."""
    if device == "cpu":
        return None, ""
    try:
        import cupy
        count, why = cupy.cuda.runtime.getDeviceCount(), "there is none"
    except ImportError:
        count, why = 0, "CuPy is not installed"
    except Exception as error:          # no driver, no device, and many more
        old = "InsufficientDriver" in str(error)
        count, why = 0, "its driver is missing or too old" if old else error
    if count:
        if ranks.joined.size > 1:
            ranks.joined.check_gpus(count)
        try:
            from . import gpu
            return gpu.Cuda(number), ""
        except RuntimeError as error:   # too old
            why = error
    if device == "gpu":
        raise RuntimeError(f"--device gpu: no GPU can be used ({why}); use --device cpu")
    return None, f" (no GPU: {why})"
