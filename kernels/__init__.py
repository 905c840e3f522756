"""The operations that the networks are made of, on the device that `use` chose.

reference.py is the specification of each operation, in plain NumPy. cpu.py and gpu.py have the same
names and arguments: fast NumPy, and CUDA kernels. After `use("cpu")`, kernels.conv_forward is
cpu.conv_forward, and so on for each of OPERATIONS; model.py calls them here and never asks where
it runs. (So look an operation up when you call it: a name that was imported stays what it was.)

A new operation needs a name in OPERATIONS; a function in reference.py, and in cpu.py, which may
import the reference's; a kernel in a .cu file and its launch in gpu.py; and a test with the
fixture `device`, which compares all of them with the reference.
"""
from . import cpu, ranks, reference
from .cpu import cores, threads  # noqa: F401

OPERATIONS = (
    "conv_forward", "conv_backward_input", "conv_backward_filter", "relu_backward",
    "max_pool_forward", "max_pool_backward", "avg_pool_forward", "avg_pool_backward",
    "lrn_forward", "lrn_backward", "matmul", "sum_gradients", "dropout", "prepare",
    "sample_by_class", "softmax_loss", "one_vs_all_loss", "sgd",
    "to_device", "to_host", "host_empty", "memory")
DEVICES = ("auto", "reference", "cpu", "gpu")
PRECISIONS = ("fp32", "tf32", "3xtf32")


def _take(module):
    """The operations of a module become this one's."""
    for name in OPERATIONS:
        globals()[name] = getattr(module, name)


_take(cpu)


def use(device, precision=None, number=0):
    """Choose where everything computes from now on; returns one line that says what was chosen.

    device: one of DEVICES; "auto" is a GPU, or else "cpu". precision: one of PRECISIONS, for a GPU;
    if None, tf32 where it has tensor cores for that. number: which of the GPUs. RuntimeError if
    what is asked for cannot be, and where several ranks find fewer GPUs than ranks, or no NCCL.
    """
    if device == "reference":
        _take(reference)
        return ("device: CPU, the plain NumPy of kernels/reference.py"
                + _describe_ignored(precision))
    cuda, why_not = (None, "") if device == "cpu" else _find_gpu(number)
    if cuda is None and device == "gpu":
        raise RuntimeError(f"--device gpu: no GPU can be used ({why_not}); use --device cpu")
    if cuda is None:
        _take(cpu)
        return _describe_cpu(why_not, precision)
    from . import gpu
    precision = precision or ("tf32" if cuda.tf32 else "fp32")
    gpu.use(cuda, precision)
    _take(gpu)
    return f"device: {cuda.name}, {precision}"


def _describe_cpu(why_not, precision):
    """The line about a CPU: its threads, why it is not a GPU, and what is ignored."""
    plural = "s" if threads.count > 1 else ""
    line = f"device: CPU, {threads.count} thread{plural}, NumPy"
    if why_not:
        line += f" (no GPU: {why_not})"
    return line + _describe_ignored(precision)


def _describe_ignored(precision):
    """What a CPU says of a precision that is not its own, or ""."""
    return f"; --precision {precision} is for a GPU" if precision in ("tf32", "3xtf32") else ""


def _find_gpu(number):
    """The GPU and "", or None and why there is none: CuPy is optional at run time."""
    try:
        import cupy
        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return None, "CuPy is not installed"
    except Exception as error:          # no driver, no device, and many more
        too_old = "InsufficientDriver" in str(error)
        return None, "its driver is missing or too old" if too_old else str(error)
    if not count:
        return None, "there is none"
    if ranks.joined.size > 1:
        ranks.joined.check_gpus(count)
    try:
        from . import gpu
        return gpu.Cuda(number), ""
    except RuntimeError as error:       # too old
        return None, str(error)
