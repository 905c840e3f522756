"""The operations that the networks are made of, on the device that `use` chose.

After `use("cpu")`, kernels.conv_forward is cpu.conv_forward, and so on for each of OPERATIONS;
model.py calls them here and never asks where it runs. cpu.py holds the NumPy twins, which are the
specification, with the docstrings: gpu.py has functions of the same names and arguments that launch
the CUDA kernels of the .cu files.
"""
from . import cpu, ranks
from .cpu import set_threads, threads

OPERATIONS = (
    "conv_forward", "conv_backward_input", "conv_backward_filter",
    "max_pool_forward", "max_pool_backward", "avg_pool_forward", "avg_pool_backward",
    "lrn_forward", "lrn_backward", "relu_backward", "dropout", "prepare", "column_sums",
    "matmul", "softmax_loss", "one_vs_all_loss", "sgd",
    "to_device", "to_host", "memory")
DEVICES = ("auto", "cpu", "gpu")
PRECISIONS = ("fp32", "tf32", "3xtf32")


def _take(module):
    """The operations of a module become this one's."""
    globals().update({name: getattr(module, name) for name in OPERATIONS})


_take(cpu)


def use(device, precision=None, number=0):
    """Choose where everything computes from now on; returns one line that says what was chosen.

    device: one of DEVICES, or what runs the CUDA kernels in the place of gpu.Cuda. precision: one
    of PRECISIONS, for a GPU; if None, tf32 where it has tensor cores for that. number: which of
    the GPUs. RuntimeError if the device or the precision cannot be had.
    """
    chosen = _find(device, number) if device in DEVICES else device
    if chosen is None:
        _take(cpu)
        count = cpu.threads()
        note = f"; --precision {precision} is for a GPU" if precision else ""
        return f"device: CPU, {count} thread{'s' * (count > 1)}, NumPy{note}"
    from . import gpu
    precision = precision or ("tf32" if chosen.tf32 else "fp32")
    gpu.use(chosen, precision)
    _take(gpu)
    return f"device: {chosen.name}, {precision}"


def _find(device, number):
    """The GPU, or None for the CPU: CuPy is optional at run time."""
    if device == "cpu":
        return None
    try:
        import cupy
        found = cupy.cuda.runtime.getDeviceCount()
    except Exception:                   # not installed, no driver, no device: many kinds
        found = 0
    if found:
        if ranks.joined.size > 1:
            ranks.joined.check_gpus()
        cupy.cuda.Device(number).use()
        from . import gpu
        return gpu.Cuda()
    if device == "gpu":
        raise RuntimeError("--device gpu: no GPU that CuPy can use was found; use --device cpu")
    return None
