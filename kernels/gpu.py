"""The operations as CUDA kernels: how each is launched, with its geometry beside the launch.

Same names and arguments as the NumPy twins in cpu.py. The .cu files are compiled by NVRTC through
CuPy when they are first needed. `Cuda` is the GPU; emulate.Emulator stands in its place in tests
on machines without one, under the very same launch code. Arrays are float32 and NHWC; where a
channel slice of a wider array will do, kernels take its pitch, the numbers from pixel to pixel.
"""
import itertools
import os

import numpy as np

from .cpu import LANES, conv_size, pool_size

FOLDER = os.path.dirname(os.path.abspath(__file__))
INNER = {"fp32": 0, "tf32": 1, "3xtf32": 3}        # the product of conv.cu, by precision
NULL = np.uint64(0)                     # a pointer to nothing
BLOCK = 256                             # threads a block of the kernels that take a number each
BM, BK, STAGES = 128, 32, 3             # the tile of conv.cu, and how many are in flight
LEAST_TILES = 8                         # tiles of BK along the reduction, that a split is worth
LRN_BYTES = 12 << 10                    # shared memory of a block of lrn.cu, at least a pixel


class Cuda:
    """The GPU: allocation, products and launches through CuPy."""

    def __init__(self):
        import cupy
        self.xp, self.functions, self.slots = cupy, {}, []
        facts = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self.name = facts["name"].decode()
        self.multiprocessors = facts["multiProcessorCount"]
        self.tf32 = facts["major"] >= 8
        self.shared_bytes = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
        if self.shared_bytes < 64 << 10:
            raise RuntimeError(f"{self.name} is too old for these kernels, which want 64 KB of "
                               "shared memory for a block (compute capability 7.0); use "
                               "--device cpu")
        self.copies = cupy.cuda.Stream(non_blocking=True)

    def launch(self, file, kernel, defines, grid, block, args, shared=0):
        """Queue a kernel of a .cu file, compiled with `defines`."""
        key = file, kernel, defines
        if key not in self.functions:
            module = self.xp.RawModule(code=source(file), options=options(defines))
            self.functions[key] = module.get_function(kernel)
            if shared > 48 << 10:
                self.functions[key].max_dynamic_shared_size_bytes = shared
        self.functions[key](grid, block, args, shared_mem=shared)

    def matmul(self, a, b, out=None):
        """a b by cuBLAS; `use` has set its compute type."""
        return self.xp.matmul(a, b, out=out)

    def upload(self, x):
        """x on the GPU, without waiting for it: the next batch travels while this one computes.

        What is large goes through page-locked memory on a stream of its own. Two slots take turns:
        a launch may read one large array that came this way, and no more (photos are it).
        """
        if x.nbytes < 1 << 20:
            return self.xp.asarray(x)
        main = self.xp.cuda.get_current_stream()
        if self.slots:
            self.slots[-1].read = main.record()         # after all that reads the last array
        if len(self.slots) == 2 and self.slots[0].host.size >= x.nbytes:
            slot = self.slots.pop(0)
        else:
            slot, self.slots = Slot(self.xp, x.nbytes), self.slots[-1:]
        self.slots.append(slot)
        slot.copied.synchronize()                       # the host's part is free again
        slot.host[:x.nbytes] = x.reshape(-1).view(np.uint8)
        self.copies.wait_event(slot.read)               # …, and so is the GPU's
        slot.device.data.copy_from_host_async(slot.host.ctypes.data, x.nbytes, self.copies)
        slot.copied.record(self.copies)
        main.wait_event(slot.copied)
        return slot.device[:x.nbytes].view(x.dtype).reshape(x.shape)

    def download(self, x):
        return self.xp.asnumpy(x)

    def memory(self):
        """Free bytes: the driver's, and those that CuPy keeps for the next array."""
        pool = self.xp.get_default_memory_pool()
        return self.xp.cuda.runtime.memGetInfo()[0] + pool.free_bytes()

    def later(self, x):
        """The number x of the GPU, read without waiting: float() of it waits if it must."""
        return Later(self.xp, x)


class Slot:
    """Room for an array on its way to the GPU, on both sides, and what is known of its use."""

    def __init__(self, cupy, size):
        self.host = np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
        self.device = cupy.empty(size, np.uint8)
        self.copied = cupy.cuda.Event()
        self.read = cupy.cuda.get_current_stream().record()


class Later:
    """A number on its way from the GPU."""

    def __init__(self, cupy, x):
        self.host = np.frombuffer(cupy.cuda.alloc_pinned_memory(8), x.dtype, 1)
        x.data.copy_to_host_async(self.host.ctypes.data, x.nbytes)
        self.kept, self.event = x, cupy.cuda.get_current_stream().record()

    def __float__(self):
        self.event.synchronize()
        return float(self.host[0])


def source(file):
    """A .cu file's text, with the text of ptx.cuh before it.

    Pasted, not included: CuPy's cache of compiled kernels would not see a header change.
    """
    texts = []
    for name in ("ptx.cuh", file):
        with open(os.path.join(FOLDER, name), encoding="utf-8") as opened:
            texts.append(f'#line 1 "{name}"\n{opened.read()}')
    return "\n".join(texts)


def options(defines):
    """Compiler options of a kernel variant."""
    return "-std=c++17", *(f"-D{name}={value}" for name, value in defines)


def variants(tf32):
    """(file, defines) of every kernel variant that is launched on a GPU with TF32, or without."""
    yield from ((file, ()) for file in ("pool.cu", "lrn.cu", "pointwise.cu", "loss.cu", "sgd.cu"))
    for inner, filter_gradient, vec, bn in itertools.product(
            (0, 1, 3) if tf32 else (0,), (0, 1), (4, 1), (128, 64)):
        yield "conv.cu", _conv_defines(bn, STAGES, vec, filter_gradient, inner)


def compile_for(architecture, file, defines):
    """Compile a variant as CuPy would, for "90" say, without a GPU; (cubin, the compiler's notes).

    RuntimeError with the compiler's message where that fails.
    """
    from cupy.cuda import nvrtc
    program = nvrtc.createProgram(source(file), file, (), ())
    try:
        nvrtc.compileProgram(program, (
            *options(defines), f"-arch=sm_{architecture}", "-ftz=true",
            "--device-as-default-execution-space", "--ptxas-options=-v"))
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError:
        raise RuntimeError(f"{file} {defines} for sm_{architecture}: "
                           f"{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


_device = None                          # a Cuda, or what stands in its place
_precision = "fp32"


def use(device, precision):
    """Compute on `device` from now on; RuntimeError if it has not the precision asked for."""
    global _device, _precision
    if precision != "fp32" and not device.tf32:
        raise RuntimeError(f"--precision {precision}: {device.name} has no TF32 tensor cores; use "
                           "--precision fp32")
    _device, _precision = device, precision
    if isinstance(device, Cuda):
        from cupy._core import _routines_linalg as linalg
        linalg.set_compute_type(np.float32, linalg.COMPUTE_TYPE_TF32 if precision == "tf32"
                                else linalg.COMPUTE_TYPE_FP32)


# ------------------------------------------------------------------------- what all launches share

def _launch(file, kernel, grid, block, args, shared=0, defines=()):
    """Queue a kernel: Python numbers become int32 and float32, None a null pointer."""
    kinds = {int: np.int32, bool: np.int32, float: np.float32, type(None): lambda _: NULL}
    _device.launch(file, kernel, defines, grid, block,
                   tuple(kinds.get(type(arg), lambda same: same)(arg) for arg in args), shared)


def _each(file, kernel, total, args, block=BLOCK):
    """Queue a kernel with a thread for each of `total` numbers."""
    if total:
        _launch(file, kernel, (-(-total // block),), (block,), args)


def _empty(shape):
    return _device.xp.empty(shape, np.float32)


def _dense(*arrays, dtype=np.float32):
    """ValueError unless every array is contiguous and of the dtype: kernels check nothing."""
    for x in arrays:
        if x.dtype != dtype or not x.flags.c_contiguous or x.size >= 1 << 31:
            raise ValueError(f"a contiguous {np.dtype(dtype)} array of less than 2^31 numbers is "
                             f"needed, not {x.dtype} {x.shape} with strides {x.strides}")
    return arrays


def _pitch(x):
    """Numbers from a pixel to the next of x (N, H, W, C), which may be a slice of channels."""
    n, h, w, c = x.shape
    pitch = next((stride // (count * x.itemsize) for size, stride, count in
                  ((w, x.strides[2], 1), (h, x.strides[1], w), (n, x.strides[0], h * w))
                  if size > 1), c)
    strides = [pitch * count * x.itemsize for count in (h * w, w, 1)] + [x.itemsize]
    if x.dtype != np.float32 or x.size >= 1 << 31 or any(
            size > 1 and a != b for size, a, b in zip(x.shape, x.strides, strides)):
        raise ValueError(f"a float32 NHWC array of less than 2^31 numbers or a slice of its "
                         f"channels is needed, not {x.dtype} {x.shape} with strides {x.strides}")
    return pitch


def _address(x):
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


def divisor(d):
    """(d, mul, shift) with n // d = (n·mul / 2^32 + n) >> shift for 0 <= n < 2^31."""
    shift = (d - 1).bit_length()
    mul = ((1 << 32) * ((1 << shift) - d)) // d + 1
    return np.int32(d), np.uint32(mul).view(np.int32), np.int32(shift)


# ------------------------------------------------------------------------------ convolution

def stage_bytes(bn, filter_gradient):
    """Shared memory of one stage of conv.cu: a tile of each operand, rows a little apart."""
    return 4 * ((BK * (BM + 8) if filter_gradient else BM * (BK + 4)) + BK * (bn + 8))


def tile(rows, cols, depth, filter_gradient, device):
    """(columns of a tile, stages, parts of the reduction) for a product of that shape.

    A formula, never a timing, so that the same GPU always adds in the same order. Two blocks run
    on a multiprocessor at a time: parts are chosen so that the waves of blocks are full, against
    what it costs to write the parts and add them.
    """
    bn = 128 if cols > 64 and device.shared_bytes >= 2 * stage_bytes(128, True) else 64
    stages = min(STAGES, device.shared_bytes // stage_bytes(bn, filter_gradient))
    blocks = -(-rows // BM) * -(-cols // bn)
    slots, steps = 2 * device.multiprocessors, -(-depth // BK)

    def cost(parts):
        waves = -(-blocks * parts // slots)
        added = 0 if parts == 1 else 4 * (parts + 1) * blocks / slots   # in steps of a tile
        return waves * (-(-steps // parts) + 4) + added

    return bn, stages, min(range(1, max(1, min(steps // LEAST_TILES, 256)) + 1), key=cost)


def _conv_defines(bn, stages, vec, filter_gradient, inner):
    return (("BM", BM), ("BN", bn), ("STAGES", stages), ("VEC", vec),
            ("FILTER", int(filter_gradient)), ("INNER", inner))


def _convolve(x, right, y, bias, mask, relu, filter_gradient, grid, taps, window):
    """y (rows, cols) = the left operand gathered from x, times right: conv.cu.

    x (N, H, W, C) and right are gathered from, grid (OH, OW) is the grid of patches, taps (KH, KW)
    their shape, window (stride, pad, dilate) their place.
    """
    n, h, w, c = x.shape
    (oh, ow), (kh, kw) = grid, taps
    pixels, patch, cols = n * oh * ow, kh * kw * c, y.shape[-1]
    rows, depth = (patch, pixels) if filter_gradient else (pixels, patch)
    pitches = [_pitch(x), right.shape[-1] if right.ndim == 2 else _pitch(right),
               _pitch(y) if y.ndim == 4 and not filter_gradient else cols]
    fits = c % 4 == 0 and cols % 4 == 0 and all(
        pitch % 4 == 0 for pitch in pitches) and all(
        _address(array) % 16 == 0 for array in (x, right, y))
    inner = INNER[_precision]
    bn, stages, parts = tile(rows, cols, depth, filter_gradient, _device)
    part = -(-(-(-depth // parts)) // BK) * BK
    parts = -(-depth // part)
    into = y if parts == 1 else _empty((parts, rows, cols))
    mask_pitch = 0 if mask is None else _pitch(mask)
    _launch("conv.cu", "conv", (-(-rows // BM), -(-cols // bn), parts), (128 if inner else 256,),
            (x, right, into, *((bias, mask) if parts == 1 else (None, None)),
             h, w, pitches[0], *window, pixels, *divisor(c), *divisor(kw), *divisor(oh),
             *divisor(ow), rows, cols, depth, part, pitches[1],
             pitches[2] if parts == 1 else cols, mask_pitch, relu and parts == 1),
            shared=stages * stage_bytes(bn, filter_gradient),
            defines=_conv_defines(bn, stages, 4 if fits else 1, filter_gradient, inner))
    if parts > 1:
        _each("pointwise.cu", "reduce", rows * cols, (into, y, bias, mask, parts, rows, cols,
                                                      pitches[2], mask_pitch, relu))
    return y


def _as_wide(w, channels):
    """Filters with as many channels as the image, which was padded with zeros: nothing there."""
    if w.shape[2] == channels:
        return w
    wide = _device.xp.zeros((*w.shape[:2], channels, w.shape[3]), np.float32)
    wide[:, :, :w.shape[2]] = w
    return wide


def conv_forward(x, w, b, stride=1, pad=0, relu=False, out=None):
    """Rows are output pixels, and the reduction goes over the patch."""
    _dense(w, b)
    kh, kw, _, f = w.shape
    grid = conv_size(x.shape[1], kh, stride, pad), conv_size(x.shape[2], kw, stride, pad)
    y = _empty((len(x), *grid, f)) if out is None else out
    right = _as_wide(w, x.shape[3]).reshape(-1, f)                  # (KH*KW*C, F)
    return _convolve(x, right, y, b, None, relu, False, grid, (kh, kw), (stride, pad, 1))


def conv_backward_input(dy, w, x, stride=1, pad=0, relu=False):
    """The forward product on dy, its pixels `stride` apart, with turned filters."""
    _dense(w)
    kh, kw, c, f = w.shape
    if kh != kw:
        raise ValueError(f"filters must be square, not {kh}×{kw}")
    turned = _empty((kh * kw * f, c))
    _launch("pointwise.cu", "turn", (-(-f // 32), -(-c // 32), kh * kw), (32, 8),
            (w, turned, kh * kw, c, f), shared=4 * 32 * 33)
    return _convolve(dy, turned, _empty(x.shape), None, x if relu else None, False, False,
                     x.shape[1:3], (kh, kw), (1, kh - 1 - pad, stride))


def conv_backward_filter(x, dy, w_shape, stride=1, pad=0):
    """Rows are the numbers of a patch, and the reduction goes over the pixels of dy."""
    kh, kw, c, f = w_shape
    dw = _empty((kh, kw, x.shape[3], f))
    _convolve(x, dy, dw, None, None, False, True, dy.shape[1:3], (kh, kw), (stride, pad, 1))
    return _device.xp.ascontiguousarray(dw[:, :, :c]), column_sums(dy)


def column_sums(x):
    """Two passes: sums over shares of the rows, then their sum, always in the same order."""
    e = x.shape[-1]
    m = x.size // e
    pitch = _pitch(x if x.ndim == 4 else x.reshape(1, 1, m, e))
    share = max(64, -(-m // (8 * _device.multiprocessors)))
    parts, y = -(-m // share), _empty(e)
    sums = _empty((parts, e))
    _launch("pointwise.cu", "column_sums", (-(-e // 32), parts), (32, 8),
            (x, sums, m, e, pitch, share), shared=4 * 32 * 8)
    _each("pointwise.cu", "reduce", e, (sums, y, None, None, parts, 1, e, e, 0, 0))
    return y


# ---------------------------------------------------------------------------------- pooling

def _pool_out(x, kernel, stride, pad, ceil, out):
    n, h, w, c = x.shape
    shape = n, pool_size(h, kernel, stride, pad, ceil), pool_size(w, kernel, stride, pad, ceil), c
    return _empty(shape) if out is None else out


def _window(x, y, kernel, stride, pad):
    return *x.shape[1:], *y.shape[1:3], kernel, stride, pad


def max_pool_forward(x, kernel, stride, pad=0, ceil=False, out=None):
    """A thread for each number of y."""
    _dense(x)
    y = _pool_out(x, kernel, stride, pad, ceil, out)
    _each("pool.cu", "max_pool_forward", y.size, (
        x, y, y.size, *_window(x, y, kernel, stride, pad), _pitch(y)))
    return y


def max_pool_backward(dy, x, y, kernel, stride, pad=0, relu=False):
    """A thread for each number of dx."""
    _dense(x)
    dx = _empty(x.shape)
    _each("pool.cu", "max_pool_backward", x.size, (
        dy, x, y, dx, x.size, *_window(x, y, kernel, stride, pad), _pitch(dy), _pitch(y),
        relu))
    return dx


def avg_pool_forward(x, kernel, stride, pad=0, ceil=False, out=None):
    """A thread for each number of y."""
    _dense(x)
    y = _pool_out(x, kernel, stride, pad, ceil, out)
    _each("pool.cu", "avg_pool_forward", y.size, (
        x, y, y.size, *_window(x, y, kernel, stride, pad), _pitch(y)))
    return y


def avg_pool_backward(dy, x, kernel, stride, pad=0, relu=False):
    """A thread for each number of dx."""
    _dense(x)
    dx = _empty(x.shape)
    _each("pool.cu", "avg_pool_backward", x.size, (
        dy, x, dx, x.size, *_window(x, dy, kernel, stride, pad), _pitch(dy), relu))
    return dx


# ------------------------------------------------------------------------- normalisation

def _lrn_rows(c, arrays):
    """Pixels that a block takes at a time, and the bytes of shared memory they need."""
    rows = max(1, LRN_BYTES // (4 * c * arrays))
    return rows, 4 * c * rows * arrays


def lrn_forward(x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """A block for a few pixels."""
    _dense(x)
    y, c = _empty(x.shape), x.shape[-1]
    rows, shared = _lrn_rows(c, 1)
    _launch("lrn.cu", "lrn_forward", (-(-x.size // (c * rows)),), (BLOCK,),
            (x, y, x.size // c, c, rows, size // 2, float(k), float(alpha), float(beta)), shared)
    return y


def lrn_backward(dy, x, size=5, k=2.0, alpha=1e-4, beta=0.75, relu=False):
    """A block for a few pixels."""
    _dense(dy, x)
    dx, c = _empty(x.shape), x.shape[-1]
    rows, shared = _lrn_rows(c, 3)
    _launch("lrn.cu", "lrn_backward", (-(-x.size // (c * rows)),), (BLOCK,),
            (dy, x, dx, x.size // c, c, rows, size // 2, float(k), float(alpha), float(beta),
             relu), shared)
    return dx


# ------------------------------------------------------------------------- pointwise passes

def prepare(photos, top, left, flip, crop):
    """A block for each photo; the result has a fourth channel of zeros."""
    photos = _device.upload(photos)
    _dense(photos, dtype=np.uint8)
    y = _empty((len(photos), crop, crop, 4))
    threads = 1024
    _launch("pointwise.cu", "prepare", (len(photos),), (threads,),
            (photos, _device.upload(np.asarray(top, np.int32)),
             _device.upload(np.asarray(left, np.int32)), _device.upload(np.asarray(flip, np.uint8)),
             y, photos.shape[1], crop), shared=16 * threads)
    return y


def dropout(x, rate, seed, step, layer, row=0, relu=None):
    """A thread for each Philox block, 16 numbers of a row."""
    _dense(x)
    y, e = _empty(x.shape), x.shape[1]
    blocks = -(-e // LANES)
    _each("pointwise.cu", "dropout", len(x) * blocks, (
        x, relu, y, len(x) * blocks, e, blocks, np.uint32(round(rate * 65536)),
        float(1 / (1 - rate)), *map(np.uint64, (seed, step, layer, row))))
    return y


def add(y, x):
    """A thread for each four numbers, in place."""
    _dense(y, x)
    _each("pointwise.cu", "add", -(-y.size // 4), (y, x, y.size))
    return y


def add_bias(y, b, relu=False):
    """A thread for each number, in place."""
    _dense(y, b)
    _each("pointwise.cu", "add_bias", y.size, (y, b, y.size, y.shape[-1], relu))
    return y


def relu_backward(dy, x, out=None):
    """A thread for each number."""
    dx = _empty(dy.shape) if out is None else out
    _dense(dy, x, dx)
    _each("pointwise.cu", "relu_backward", x.size, (dy, x, dx, x.size))
    return dx


# ------------------------------------------------------------------- products, loss, update

def matmul(a, b, out=None):
    """A product of matrices, by the library that the device has for it."""
    return _device.matmul(a, b, out)


def _loss(kernel, s, targets, weights, *vectors):
    """A block for each row; the loss is on its way when this returns."""
    _dense(s)
    losses = _empty(len(s))
    targets, weights, *vectors = (
        None if x is None else _device.xp.asarray(np.ascontiguousarray(x, dtype))
        for x, dtype in zip((targets, weights, *vectors), (np.int32, *[np.float32] * 3)))
    _launch("loss.cu", kernel, (len(s),), (1024 if s.shape[1] > 4096 else BLOCK,),
            (s, targets, weights, *vectors, losses, s.shape[1], targets.shape[1]), shared=4 * 64)
    return _device.later(losses.sum(dtype=np.float64)), s


def softmax_loss(s, targets, weights, shift=None):
    """A block for each row, which it reads twice."""
    return _loss("softmax_loss", s, targets, weights, shift)


def one_vs_all_loss(s, targets, weights, positive, negative):
    """A block for each row, which it reads once."""
    return _loss("one_vs_all_loss", s, targets, weights, positive, negative)


def sgd(w, v, dw, rate, momentum, decay):
    """A thread for each four numbers."""
    _dense(w, v, dw)
    _each("sgd.cu", "sgd", -(-w.size // 4), (w, v, dw, w.size, float(rate),
                                             float(momentum), float(decay)))


def sgd_rows(w, v, dw, rows, rate, momentum, decay):
    """A thread for each number of dw."""
    _dense(w, v, dw)
    _each("sgd.cu", "sgd_rows", dw.size, (
        w, v, dw, _device.upload(np.asarray(rows, np.int32)), dw.size, w.size // len(w),
        float(rate), float(momentum), float(decay)))


def take_rows(w, rows):
    """A thread for each number taken."""
    _dense(w)
    taken = _empty((len(rows), *w.shape[1:]))
    _each("sgd.cu", "take_rows", taken.size, (
        w, _device.upload(np.asarray(rows, np.int32)), taken, taken.size, w.size // len(w)))
    return taken


def memory():
    """Free bytes of the device."""
    return _device.memory()


def to_device(x):
    """A copy of x where this device computes."""
    return _device.xp.array(x, np.float32)


def to_host(x):
    """x as a NumPy array."""
    return _device.download(x)
