"""The operations that the networks are made of: one public function each, on the chosen device.

`use(device)` chooses once; model.py then calls these functions and never asks where it runs.
cpu.py holds the NumPy twins, which are the specification: same names, same arguments. gpu.py
launches the CUDA kernels of the .cu files.
"""
import functools
import os

from . import cpu, ranks

_device = cpu                           # the module whose functions run

DEVICES = ("auto", "cpu", "gpu")
PRECISIONS = ("fp32", "tf32", "3xtf32")


def use(device, precision=None, number=0):
    """Choose where everything computes from now on; returns one line that says what was chosen.

    device: one of DEVICES, or what runs the CUDA kernels in the place of gpu.Cuda. precision: one
    of PRECISIONS, for a GPU; if None, tf32 where it has tensor cores for that. number: which of
    the GPUs. RuntimeError if the device or the precision cannot be had.
    """
    global _device
    chosen = _find(device, number) if device in DEVICES else device
    if chosen is None:
        _device = cpu
        count = cpu.threads()
        note = f"; --precision {precision} is for a GPU" if precision else ""
        return f"device: CPU, {count} thread{'s' * (count > 1)}, NumPy{note}"
    from . import gpu
    precision = precision or ("tf32" if chosen.tf32 else "fp32")
    gpu.use(chosen, precision)
    _device = gpu
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
        ranks.joined.check_gpus()
        cupy.cuda.Device(number).use()
        return _cuda()
    if device == "gpu":
        raise RuntimeError("--device gpu: no GPU that CuPy can use was found; use --device cpu")
    return None


@functools.cache
def _cuda():
    """The one gpu.Cuda of this process, which keeps the kernels that it compiled."""
    from . import gpu
    return gpu.Cuda()


def memory():
    """Free bytes of the GPU's memory, or None on the CPU."""
    return None if _device is cpu else _device.memory()


def set_threads(count):
    """Number of CPU worker threads; the last bits of sums depend on it."""
    if not 1 <= count <= 4 * (os.cpu_count() or 1):
        raise ValueError(f"--threads {count}: it must be 1 to {4 * (os.cpu_count() or 1)} here")
    cpu.set_threads(count)


def threads():
    """The number of CPU worker threads in use."""
    return cpu.threads()


def conv_forward(x, w, b, stride=1, pad=0, relu=False, out=None):
    """x (N, H, W, C) * w (KH, KW, C, F) + b -> (N, OH, OW, F), with `relu` max(·, 0)."""
    return _device.conv_forward(x, w, b, stride, pad, relu, out)


def conv_backward_input(dy, w, x, stride=1, pad=0, relu=False):
    """dx (N, H, W, C) from dy (N, OH, OW, F); with `relu` times (x > 0)."""
    return _device.conv_backward_input(dy, w, x, stride, pad, relu)


def conv_backward_filter(x, dy, w_shape, stride=1, pad=0):
    """dw (KH, KW, C, F) and db (F,), summed over images and pixels."""
    return _device.conv_backward_filter(x, dy, w_shape, stride, pad)


def max_pool_forward(x, kernel, stride, pad=0, ceil=False, out=None):
    """Maximum over windows; with `ceil` the last window may hang over the edge."""
    return _device.max_pool_forward(x, kernel, stride, pad, ceil, out)


def max_pool_backward(dy, x, y, kernel, stride, pad=0, relu=False):
    """dx: each dy goes to the first maximum of its window; with `relu` times (x > 0)."""
    return _device.max_pool_backward(dy, x, y, kernel, stride, pad, relu)


def avg_pool_forward(x, kernel, stride, pad=0, ceil=False, out=None):
    """Mean over windows, pixels outside the image left out."""
    return _device.avg_pool_forward(x, kernel, stride, pad, ceil, out)


def avg_pool_backward(dy, x, kernel, stride, pad=0, relu=False):
    """dx: each dy shared equally among its window; with `relu` times (x > 0)."""
    return _device.avg_pool_backward(dy, x, kernel, stride, pad, relu)


def lrn_forward(x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """Local response normalisation across channels: x / (k + α Σ x²)^β."""
    return _device.lrn_forward(x, size, k, alpha, beta)


def lrn_backward(dy, x, size=5, k=2.0, alpha=1e-4, beta=0.75, relu=False):
    """dx of lrn_forward; with `relu` times (x > 0)."""
    return _device.lrn_backward(dy, x, size, k, alpha, beta, relu)


def add(y, x):
    """y += x, in place; returns y."""
    return _device.add(y, x)


def add_bias(y, b, relu=False):
    """y (M, E) += b (E,), in place, then with `relu` max(·, 0); returns y."""
    return _device.add_bias(y, b, relu)


def relu_backward(dy, x, out=None):
    """dy · (x > 0), into `out` (which may be dy) if given."""
    return _device.relu_backward(dy, x, out)


def column_sums(x):
    """Σ of x (…, E) over all axes but the last: (E,)."""
    return _device.column_sums(x)


def dropout(x, rate, seed, step, layer, row=0, relu=None):
    """x · mask / (1 - rate), the mask a function of (seed, step, layer, global row) alone."""
    return _device.dropout(x, rate, seed, step, layer, row, relu)


def prepare(photos, top, left, flip, crop):
    """uint8 photos (N, S, S, 3) -> cropped, mirrored, normalised float32 (N, crop, crop, 3 or 4).

    The GPU's kernels pad three channels to four with zeros, and convolutions take either.
    """
    return _device.prepare(photos, top, left, flip, crop)


def matmul(a, b, out=None):
    """a b: (M, D) times (D, E) -> (M, E), into `out` if given."""
    return _device.matmul(a, b, out)


def softmax_loss(s, targets, weights, shift=None):
    """The loss (eq. 2) and its gradient, which takes the memory of s (N, K).

    float() of the loss is its value; on a GPU that may have to wait for it.
    """
    return _device.softmax_loss(s, targets, weights, shift)


def one_vs_all_loss(s, targets, weights, positive, negative):
    """The loss (eq. 1) and its gradient, which takes the memory of s (N, K)."""
    return _device.one_vs_all_loss(s, targets, weights, positive, negative)


def sgd(w, v, dw, rate, momentum, decay):
    """v ← momentum·v + dw + decay·w; w ← w - rate·v; in place."""
    _device.sgd(w, v, dw, rate, momentum, decay)


def sgd_rows(w, v, dw, rows, rate, momentum, decay):
    """sgd on the rows w[rows] and v[rows] alone; dw (R, …), no row twice."""
    _device.sgd_rows(w, v, dw, rows, rate, momentum, decay)


def take_rows(w, rows):
    """w[rows]: the rows of a batch's words, (R, …)."""
    return _device.take_rows(w, rows)


def to_device(x):
    """x (a NumPy array) where this device computes: a copy, or x itself on the CPU."""
    return _device.to_device(x)


def to_host(x):
    """x as a NumPy array."""
    return _device.to_host(x)
