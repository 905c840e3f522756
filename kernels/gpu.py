"""The operations of reference.py as CUDA kernels, each with its launch geometry beside the launch.

Same names and arguments; what each operation computes is said there. The .cu files are compiled by
NVRTC through CuPy when they are first needed. A kernel checks nothing, so the functions here check
what they are given: contiguous float32 arrays, NHWC. `Cuda` is the GPU; in tests on machines
without one, dev/emulate_cupy.py is what it finds as CuPy.
"""
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .reference import LANES, output_size

FOLDER = Path(__file__).parent
NULL = np.uint64(0)                     # a pointer to nothing
BLOCK = 256                             # threads of a block, where each makes a number or a few

# The structs that kernels take, field by field. CuPy passes an array of one record by value, and
# cannot know what the kernel takes: a static_assert there compares the sizes.
DIVISOR = np.dtype([("d", np.uint32), ("mul", np.uint32), ("shift", np.uint32)])
GEOMETRY = np.dtype(                                                            # conv.cu
    [(name, np.int32) for name in ("h", "w", "stride", "top", "left", "pixels")]
    + [(name, DIVISOR) for name in ("c", "kw", "oh", "ow")]
    + [(name, np.int32) for name in ("rows", "cols", "depth", "part")])
SHAPE = np.dtype([(name, np.int32) for name in "n h w c kh kw f oh ow stride pad".split()])
WINDOW = np.dtype([(name, np.int32) for name in "h w c oh ow kernel stride pad".split()])
SIZES = (("GEOMETRY_BYTES", GEOMETRY.itemsize), ("SHAPE_BYTES", SHAPE.itemsize),
         ("WINDOW_BYTES", WINDOW.itemsize))


# ------------------------------------------------------------------------------- the device

class Cuda:
    """A GPU: what it is, its kernels and copies, through CuPy.

    Everything is queued on the current stream, except two things that run beside the computation,
    on streams of their own: copies of photos, and samples.
    """

    def __init__(self, number=0):
        import cupy
        self.xp = cupy
        cupy.cuda.Device(number).use()
        facts = cupy.cuda.runtime.getDeviceProperties(number)
        attributes = cupy.cuda.Device(number).attributes
        self.name = facts["name"].decode()
        self.multiprocessors = facts["multiProcessorCount"]
        self.tf32 = facts["major"] >= 8
        self.block_bytes = attributes["MaxSharedMemoryPerBlockOptin"]
        self.multiprocessor_bytes = attributes["MaxSharedMemoryPerMultiprocessor"]
        if self.block_bytes < 64 << 10:
            raise RuntimeError(f"{self.name} is too old: these kernels need 64 KB of shared memory "
                               "for a block (compute capability 7.0)")
        self.kernels = {}                       # compiled, by file, name and constants
        self.copies = cupy.cuda.Stream(non_blocking=True)
        self.samples = cupy.cuda.Stream(non_blocking=True)
        self.under_way = []                     # (event, photos) of copies that may not be over

    def kernel(self, file, name, defines):
        """A kernel of a .cu file that is compiled with `defines`, on its first use."""
        key = file, name, defines
        if key not in self.kernels:
            module = self.xp.RawModule(code=source(file), options=options(defines))
            kernel = module.get_function(name)
            kernel.max_dynamic_shared_size_bytes = self.block_bytes
            if file == "conv.cu":               # it wants all memory that a multiprocessor has
                kernel.preferred_shared_memory_carveout = 100
            self.kernels[key] = kernel
        return self.kernels[key]

    def upload(self, photos):
        """Photos of host_empty on the device; until they are there, their memory is kept."""
        with self.copies:
            on_device = self.xp.empty(photos.shape, np.uint8)
            on_device.set(photos, self.copies)
            arrived = self.copies.record()
        self.xp.cuda.get_current_stream().wait_event(arrived)
        self.under_way = [copy for copy in self.under_way if not copy[0].done]
        self.under_way.append((arrived, photos))
        return on_device


def source(file):
    """A .cu file's text, with the text of ptx.cuh before it.

    Pasted, not included: CuPy's cache of compiled kernels would not see a header change.
    """
    texts = []
    for name in ("ptx.cuh", file):
        texts.append(f'#line 1 "{name}"\n{(FOLDER / name).read_text("utf-8")}')
    return "\n".join(texts)


def options(defines):
    """Compiler options of a kernel variant."""
    return ("-std=c++17", *[f"-D{name}={value}" for name, value in SIZES + defines])


_device = None                          # a Cuda
_precision = "fp32"


def use(device, precision):
    """Compute on `device` from now on; RuntimeError if it has not the precision asked for."""
    global _device, _precision
    if precision != "fp32" and not device.tf32:
        raise RuntimeError(f"--precision {precision}: {device.name} has no TF32 tensor cores; use "
                           "--precision fp32")
    _device = device
    _precision = precision
    linalg = device.xp._core._routines_linalg
    tf32 = linalg.COMPUTE_TYPE_TF32 if precision == "tf32" else linalg.COMPUTE_TYPE_FP32
    linalg.set_compute_type(np.float32, tf32)


# -------------------------------------------------------------------- what all launches share

def _launch(file, kernel, grid, block, args, shared=0, defines=()):
    """Queue a kernel with `shared` bytes of shared memory."""
    if 0 not in grid:                           # where CuPy would run one block
        _device.kernel(file, kernel, defines)(grid, block, args, shared_mem=shared)


def _launch_each(file, kernel, total, args, defines=()):
    """Queue a kernel with a thread for each of `total` numbers."""
    _launch(file, kernel, (-(-total // BLOCK),), (BLOCK,), args, defines=defines)


def _empty(shape):
    return _device.xp.empty(shape, np.float32)


def _or_null(x):
    return NULL if x is None else x


def _check(*arrays, dtype=np.float32):
    """ValueError unless all are contiguous, of the dtype, and small enough for 32-bit indices."""
    for x in arrays:
        if x.dtype != dtype or not x.flags.c_contiguous or x.size >= 1 << 31:
            raise ValueError(f"a contiguous {np.dtype(dtype)} array of less than 2^31 numbers is "
                             f"needed, not {x.dtype} {x.shape} with strides {x.strides}")


def _vector(channels, *arrays):
    """How many channels a thread can access at once: 4 or 1.

    4 where numbers of channels are multiples of 4, and addresses of 16 bytes.
    """
    aligned = all(x.data.ptr % 16 == 0 for x in arrays)
    return 4 if aligned and all(c % 4 == 0 for c in channels) else 1


# ------------------------------------------------------------------------------ convolution

INNER = {"fp32": 0, "tf32": 1, "3xtf32": 3}         # the product of conv.cu, by precision
CONV_THREADS = {0: 256, 1: 128, 3: 128}             # of a block, by that product
BM = 128                                            # rows of a tile
BK = 32                                             # depth of a tile
COLUMNS = {"fp32": (128, 64), "tf32": (128, 96, 64, 32, 16), "3xtf32": (128, 96, 64, 32, 16)}
COST = {"fp32": 65, "tf32": 16, "3xtf32": 16}       # what any tile costs, as so many columns of it
STAGES = 3                                          # tiles in flight
LEAST_TILES = 8                                     # along the reduction, that a split is worth
RESERVED = 1024                                     # bytes of shared memory that CUDA takes a block


class Patches(NamedTuple):
    """Where the patches of an image lie that a convolution's product gathers.

    KH×KW pixels each, OH×OW of them, `stride` pixels apart, with a zero border of `top` rows and
    `left` columns. The image's own pixels count as `dilate` apart, with zeros between them.
    """
    kh: int
    kw: int
    oh: int
    ow: int
    stride: int
    top: int
    left: int
    dilate: int = 1


class Plan(NamedTuple):
    """A launch of conv.cu."""
    grid: tuple                         # row tiles, column tiles, parts of the reduction
    threads: int
    shared: int                         # bytes
    defines: tuple
    geometry: np.ndarray                # a record


def divisor(d):
    """(d, mul, shift) with n // d = (n·mul / 2^32 + n) >> shift for 0 <= n < 2^31."""
    shift = (d - 1).bit_length()
    return d, ((1 << 32) * ((1 << shift) - d)) // d + 1, shift


def stage_bytes(bn, filter_gradient):
    """Bytes of shared memory of one stage of conv.cu, which checks this: a tile of each operand.

    Rows are a little apart.
    """
    left = BK * (BM + 8) if filter_gradient else BM * (BK + 4)
    return 4 * (left + BK * (bn + 8))


def tile(rows, cols, depth, filter_gradient, device, precision):
    """(columns of a tile, stages, parts of the reduction) for a product of that shape.

    A formula, never a timing, so that the same GPU always adds in the same order. Parts are chosen
    so that the waves of blocks are full, against what it costs to write the parts and add them.
    """
    fitting = [bn for bn in COLUMNS[precision] if device.block_bytes >= 2 * stage_bytes(bn, True)]
    bn = min(fitting, key=lambda bn: -(-cols // bn) * (bn + COST[precision]))
    stages = min(STAGES, device.block_bytes // stage_bytes(bn, filter_gradient))
    blocks = -(-rows // BM) * -(-cols // bn)
    steps = -(-depth // BK)
    # registers allow two blocks on a multiprocessor; its shared memory may hold but one
    fit = device.multiprocessor_bytes // (stages * stage_bytes(bn, filter_gradient) + RESERVED)
    slots = device.multiprocessors * max(1, min(2, fit))

    def cost(parts):
        """In steps of a tile: 4 to begin and end a block, and what the parts cost."""
        waves = -(-blocks * parts // slots)
        added = 0 if parts == 1 else 4 * (parts + 1) * blocks / slots
        return waves * (-(-steps // parts) + 4) + added

    most = max(1, min(steps // LEAST_TILES, 256))
    return bn, stages, min(range(1, most + 1), key=cost)


def conv_defines(bn, stages, vec, filter_gradient, inner, dilate=1):
    """The constants of a variant of conv.cu."""
    return (("BM", BM), ("BN", bn), ("BK", BK), ("STAGES", stages), ("VEC", vec),
            ("FILTER", int(filter_gradient)), ("INNER", inner), ("DILATE", dilate),
            ("THREADS", CONV_THREADS[inner]), ("STAGE_BYTES", stage_bytes(bn, filter_gradient)))


@functools.cache                        # of pure arithmetic: a layer asks the same in every step
def plan(device, precision, x_shape, patches, cols, vec, filter_gradient):
    """The Plan of a product of the patches of x (N, H, W, C) and a matrix of `cols` columns.

    In the filter gradient the patches are transposed.
    """
    n, h, w, c = x_shape
    pixels = n * patches.oh * patches.ow
    patch = patches.kh * patches.kw * c
    rows = patch if filter_gradient else pixels
    depth = pixels if filter_gradient else patch
    bn, stages, parts = tile(rows, cols, depth, filter_gradient, device, precision)
    part = max(1, -(-depth // parts // BK)) * BK                    # multiples of a tile
    grid = -(-rows // BM), -(-cols // bn), max(1, -(-depth // part))
    geometry = np.array((
        h, w, patches.stride, patches.top, patches.left, pixels, divisor(c), divisor(patches.kw),
        divisor(patches.oh), divisor(patches.ow), rows, cols, depth, part), GEOMETRY)
    inner = INNER[precision]
    return Plan(grid, CONV_THREADS[inner], stages * stage_bytes(bn, filter_gradient),
                conv_defines(bn, stages, vec, filter_gradient, inner, patches.dilate), geometry)


def _launch_conv(launch, x, right, y, bias=None, relu=False):
    """Queue conv.cu: y, or its parts, = relu(the left operand, gathered from x, · right + bias)."""
    _launch("conv.cu", "conv", launch.grid, (launch.threads,),
            (x, right, y, _or_null(bias), np.int32(relu), launch.geometry), launch.shared,
            launch.defines)


def _convolve(x, right, y, patches, bias=None, relu=False):
    """y (…, cols) = relu(patches of x (N, H, W, C), times right (…, cols), plus bias)."""
    cols = y.shape[-1]
    vec = _vector((x.shape[3], cols), x, right)
    launch = plan(_device, _precision, x.shape, patches, cols, vec, False)
    if launch.grid[2] == 1:
        _launch_conv(launch, x, right, y, bias, relu)
        return y
    parts = _empty((launch.grid[2], *y.shape))
    _launch_conv(launch, x, right, parts)                           # bias and ReLU after the sum
    return _add_parts(parts, y, bias, relu)


def conv_forward(x, w, b, stride=1, pad=0, relu=False):
    """A product whose rows are output pixels; its reduction goes over the patch."""
    _check(x, w, b)
    kh, kw, _, f = w.shape
    oh = output_size(x.shape[1], kh, stride, pad)
    ow = output_size(x.shape[2], kw, stride, pad)
    y = _empty((len(x), oh, ow, f))
    return _convolve(x, w, y, Patches(kh, kw, oh, ow, stride, pad, pad), b, relu)


def conv_backward_input(dy, w, x_shape, stride=1, pad=0):
    """The forward product on dy, its pixels `stride` apart, with the filters turned round."""
    _check(dy, w)
    kh, kw, _, _ = w.shape
    _, h, width, _ = x_shape
    turned = w[::-1, ::-1].swapaxes(2, 3).copy()                    # (KH, KW, F, C)
    patches = Patches(kh, kw, h, width, 1, kh - 1 - pad, kw - 1 - pad, stride)
    return _convolve(dy, turned, _empty(x_shape), patches)


def conv_backward_filter(x, dy, w_shape, stride=1, pad=0):
    """A product whose rows are the numbers of a patch; its reduction goes over the pixels of dy.

    The blocks that read dy first add it up on the way: db is the last row of the result.
    """
    _check(x, dy)
    kh, kw, c, f = w_shape
    _, oh, ow, _ = dy.shape
    vec = _vector((c, f), x, dy)
    patches = Patches(kh, kw, oh, ow, stride, pad, pad)
    launch = plan(_device, _precision, x.shape, patches, f, vec, True)
    parts = _empty((launch.grid[2], kh * kw * c + 1, f))
    _launch_conv(launch, x, dy, parts)
    total = parts[0] if len(parts) == 1 else _add_parts(parts, _empty(parts.shape[1:]))
    return total[:-1].reshape(w_shape), total[-1]


def _add_parts(parts, y, bias=None, relu=False):
    """y (…, E) = relu(Σ of parts (Z, y.size) + bias), a thread for each number; returns y."""
    _launch_each("pointwise.cu", "add_parts", y.size, (
        parts, y, _or_null(bias), np.int32(len(parts)), np.uint32(y.size),
        np.uint32(y.shape[-1]), np.int32(relu)))
    return y


# ------------------------------------------------- the same, a thread for each number: naive.cu

def _naive(kernel, x_shape, w_shape, y_shape, stride, pad, arrays):
    """Queue a kernel of naive.cu, whose last array is the result; returns that."""
    _check(*arrays)
    n, h, w, c = x_shape
    kh, kw, _, f = w_shape
    _, oh, ow, _ = y_shape
    shape = np.array((n, h, w, c, kh, kw, f, oh, ow, stride, pad), SHAPE)
    _launch_each("naive.cu", kernel, arrays[-1].size, (*arrays, shape))
    return arrays[-1]


def naive_forward(x, w, b, stride=1, pad=0):
    """conv_forward without the ReLU."""
    kh, kw, _, f = w.shape
    oh = output_size(x.shape[1], kh, stride, pad)
    ow = output_size(x.shape[2], kw, stride, pad)
    y = _empty((len(x), oh, ow, f))
    return _naive("naive_forward", x.shape, w.shape, y.shape, stride, pad, (x, w, b, y))


def naive_backward_input(dy, w, x_shape, stride=1, pad=0):
    """conv_backward_input."""
    arrays = dy, w, _empty(x_shape)
    return _naive("naive_backward_input", x_shape, w.shape, dy.shape, stride, pad, arrays)


def naive_backward_filter(x, dy, w_shape, stride=1, pad=0):
    """conv_backward_filter without db."""
    arrays = x, dy, _empty(w_shape)
    return _naive("naive_backward_filter", x.shape, w_shape, dy.shape, stride, pad, arrays)


# ---------------------------------------------------------------------------------- pooling

def _pool(kernel, arrays, total, x_shape, y_shape, window):
    """Queue a kernel of pool.cu: a thread for each four channels of the result, or for each one."""
    _, h, w, c = x_shape
    _, oh, ow, _ = y_shape
    vec = _vector((c,), *arrays)
    window = np.array((h, w, c // vec, oh, ow, *window), WINDOW)
    _launch_each("pool.cu", kernel, total // vec, (*arrays, np.uint32(total // vec), window),
                 (("VEC", vec),))


def max_pool_forward(x, kernel, stride, pad=0, ceil=False):
    """The argmax is what the backward pass reads instead of x and y: a byte a window."""
    _check(x)
    n, h, w, c = x.shape
    oh = output_size(h, kernel, stride, pad, ceil)
    ow = output_size(w, kernel, stride, pad, ceil)
    y = _empty((n, oh, ow, c))
    argmax = _device.xp.empty(y.shape, np.uint8)
    _pool("max_pool_forward", (x, y, argmax), y.size, x.shape, y.shape, (kernel, stride, pad))
    return y, argmax


def max_pool_backward(dy, argmax, x_shape, kernel, stride, pad=0):
    """Each pixel gathers from the windows that it lies in."""
    _check(dy)
    _check(argmax, dtype=np.uint8)
    dx = _empty(x_shape)
    _pool("max_pool_backward", (dy, argmax, dx), dx.size, x_shape, dy.shape, (kernel, stride, pad))
    return dx


def avg_pool_forward(x, kernel, stride):
    """As the maximum."""
    _check(x)
    n, h, w, c = x.shape
    y = _empty((n, output_size(h, kernel, stride), output_size(w, kernel, stride), c))
    _pool("avg_pool_forward", (x, y), y.size, x.shape, y.shape, (kernel, stride, 0))
    return y


def avg_pool_backward(dy, x_shape, kernel, stride):
    """As the maximum."""
    _check(dy)
    dx = _empty(x_shape)
    _pool("avg_pool_backward", (dy, dx), dx.size, x_shape, dy.shape, (kernel, stride, 0))
    return dx


# ---------------------------------------------------------------------------- normalisation

LRN_BYTES = 12 << 10                    # shared memory of a block of lrn.cu, at least a pixel's


def _lrn(kernel, arrays, kept, size, k, alpha, beta):
    """A block for a few pixels, of which it keeps `kept` numbers a channel in shared memory."""
    _check(*arrays)
    result = arrays[-1]
    c = result.shape[-1]
    pixels = result.size // c
    rows = max(1, LRN_BYTES // (4 * c * kept))                      # pixels of a block
    _launch("lrn.cu", kernel, (-(-pixels // rows),), (BLOCK,), (
        *arrays, np.int32(pixels), np.int32(c), np.int32(rows), np.int32(size // 2), np.float32(k),
        np.float32(alpha), np.float32(beta)), shared=4 * c * kept * rows)
    return result


def lrn_forward(x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """Blocks keep x."""
    return _lrn("lrn_forward", (x, _empty(x.shape)), 1, size, k, alpha, beta)


def lrn_backward(dy, x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """Blocks keep x and the two products of dy."""
    return _lrn("lrn_backward", (dy, x, _empty(x.shape)), 3, size, k, alpha, beta)


# --------------------------------------------------------------- products, sums and dropout

def matmul(a, b, bias=None, relu=False):
    """A product by the library that the device has for it; bias and ReLU in a pass after it."""
    y = _device.xp.matmul(a, b)
    if bias is None and not relu:
        return y
    _check(y)
    if bias is not None:
        _check(bias)
    return _add_parts(y[None], y, bias, relu)                       # one part, in its own memory


def relu_backward(dy, y):
    """A thread for each number."""
    _check(dy, y)
    dx = _empty(dy.shape)
    _launch_each("pointwise.cu", "relu_backward", dy.size, (dy, y, dx, np.uint32(dy.size)))
    return dx


def sum_gradients(terms):
    """A thread for each number."""
    _check(*terms)
    total = _empty(terms[0].shape)
    a, b, c, d = [*terms, *[NULL] * (4 - len(terms))]               # ValueError beyond four
    _launch_each("pointwise.cu", "sum_gradients", total.size,
                 (a, b, c, d, total, np.uint32(total.size)))
    return total


def dropout(x, rate, seed, step, mask_id, row=0):
    """A thread for each Philox block, 16 numbers of a row."""
    _check(x)
    n, e = x.shape
    y = _empty(x.shape)
    blocks = -(-e // LANES)                                         # of a row
    _launch_each("random.cu", "dropout", n * blocks, (
        x, y, np.uint32(n * blocks), np.int32(e), np.int32(blocks),
        np.uint32(round(rate * 65536)), np.float32(1 / (1 - rate)),
        np.uint64(seed), np.uint64(step), np.uint64(mask_id), np.uint64(row)))
    return y


# ----------------------------------------------------------------------- photos and sampling

PHOTO_THREADS = 1024                    # of a block of prepare.cu


def prepare(photos, top, left, flip, crop):
    """A block for each photo. The photos are copied beside the computation, and then freed."""
    _check(photos, dtype=np.uint8)
    on_device = _device.upload(photos)
    crops = _device.xp.asarray(np.array((top, left, flip), np.int32))           # (3, N)
    n, size, _, _ = photos.shape
    y = _empty((n, crop, crop, 3))
    _launch("prepare.cu", "prepare", (n,), (PHOTO_THREADS,),
            (on_device, crops, y, np.int32(n), np.int32(size), np.int32(crop)),
            shared=2 * 8 * PHOTO_THREADS)                           # two sums of a thread
    read = _device.xp.cuda.get_current_stream().record()
    _device.copies.wait_event(read)
    return y


def sample_by_class(class_photos, class_ends, spare, seed, step, steps, count):
    """A thread for each row, on a stream of its own, which is all that the host then waits for.

    class_photos, uint32 and of any size, and class_ends, int64, are arrays of to_device. What is
    returned are NumPy's, which the loader needs: that is a copy of 40 bytes a row.
    """
    if class_photos.dtype != np.uint32 or class_ends.dtype != np.int64:
        raise ValueError("class_photos of uint32 and class_ends of int64 are needed, not of "
                         f"{class_photos.dtype} and {class_ends.dtype}")
    total = steps * count
    with _device.samples:
        drawn = _device.xp.empty((5, total), np.int64)
        _launch_each("random.cu", "sample_by_class", total, (
            class_photos, class_ends, drawn, np.uint32(len(class_ends)), np.uint32(spare),
            np.uint64(seed), np.uint64(step), np.uint32(count), np.uint32(total)))
        words, photos, top, left, flip = _device.xp.asnumpy(drawn).reshape(5, steps, count)
    return (words.astype(np.int32), photos, top.astype(np.int32), left.astype(np.int32),
            flip.astype(bool))


# ------------------------------------------------------------------------- losses and update

WIDE = 4096                             # scores in a row above which a block has 1,024 threads


def _loss(kernel, s, targets, vectors):
    """A block for each row. targets and vectors are NumPy's, and may be None."""
    _check(s)
    n, k = s.shape
    on_device = [_device.xp.asarray(np.ascontiguousarray(targets, np.int32))]
    for x in vectors:
        x = None if x is None else _device.xp.asarray(np.ascontiguousarray(x, np.float32))
        on_device.append(_or_null(x))
    losses = _empty(n)
    ds = _empty(s.shape)
    _launch("loss.cu", kernel, (n,), (1024 if k > WIDE else BLOCK,),
            (s, *on_device, losses, ds, np.int32(k), np.int32(targets.shape[1])),
            shared=4 * 2 * 32)                                      # two sums of a warp
    return losses, ds


def softmax_loss(s, targets, weights, shift=None):
    """A row is read twice."""
    return _loss("softmax_loss", s, targets, (weights, shift))


def one_vs_all_loss(s, targets, weights, positive, negative):
    """A row is read once."""
    return _loss("one_vs_all_loss", s, targets, (weights, positive, negative))


def sgd(w, v, dw, rate, momentum, decay, rows=None):
    """A thread for each number of dw."""
    _check(w, v, dw)
    rows = None if rows is None else _device.xp.asarray(rows, np.int32)
    _launch_each("sgd.cu", "sgd", dw.size, (
        w, v, dw, _or_null(rows), np.uint32(dw.size), np.uint32(w.size // max(1, len(w))),
        np.float32(rate), np.float32(momentum), np.float32(decay)))


# ----------------------------------------------------------------------------------- arrays

def to_device(x):
    """A copy of x, in C's order, where this device computes, which is there when this returns."""
    on_device = _device.xp.array(x)
    if not on_device.flags.c_contiguous:
        on_device = on_device.copy()            # in C's order, which all kernels take
    _device.xp.cuda.get_current_stream().synchronize()              # other streams may read it
    return on_device


def to_host(x):
    """x as a NumPy array."""
    return _device.xp.asnumpy(x)


def host_empty(shape):
    """Page-locked memory for photos, uint8."""
    size = int(np.prod(shape))
    block = _device.xp.cuda.alloc_pinned_memory(max(1, size))
    return np.frombuffer(block, np.uint8, size).reshape(shape)


def memory():
    """Free bytes: the driver's, and those that CuPy keeps for the next array."""
    kept = _device.xp.get_default_memory_pool().free_bytes()
    return _device.xp.cuda.runtime.memGetInfo()[0] + kept
