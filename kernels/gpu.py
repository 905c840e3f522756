"""The operations as CUDA kernels: how each is launched, with its geometry beside the launch.

Same names and arguments as the NumPy twins in cpu.py. The .cu files are compiled by NVRTC through
CuPy when they are first needed. `Cuda` is the GPU; in tests on machines without one emulate_cupy.py
is what it finds as CuPy. Arrays are float32 and NHWC. Where a channel slice of a wider array will
do, a kernel takes its pitch: the numbers from row to row.
"""
import functools
from pathlib import Path

import numpy as np

from .cpu import LANES, output_size

FOLDER = Path(__file__).parent
INNER = {"fp32": 0, "tf32": 1, "3xtf32": 3}        # the product of conv.cu, by precision
NULL = np.uint64(0)                     # a pointer to nothing
BLOCK = 256                             # threads a block of the kernels that take a number each
BM, BK, STAGES = 128, 32, 3             # the tile of conv.cu, and how many are in flight
COLUMNS = {0: (128, 64), 1: (128, 96, 64, 32, 16)}          # of a tile, by INNER > 0
LEAST_TILES = 8                         # tiles of BK along the reduction, that a split is worth
LRN_BYTES = 12 << 10                    # shared memory of a block of lrn.cu, at least a pixel

# The structs of conv.cu and pool.cu, field by field. CuPy passes an array of one record by value,
# and cannot know what the kernel takes: a static_assert there compares the sizes.
DIVISOR = np.dtype([(name, np.uint32) for name in ("d", "mul", "shift")])
GEOMETRY = np.dtype([(name, DIVISOR if name in ("c", "kw", "oh", "ow") else np.int32) for name in (
    "h w stride pad pixels c kw oh ow rows cols depth part x_pitch right_pitch pitch relu round"
    ).split()])
WINDOW = np.dtype([(name, np.int32) for name in "h w c oh ow kernel stride pad".split()])
SIZES = ("GEOMETRY_BYTES", GEOMETRY.itemsize), ("WINDOW_BYTES", WINDOW.itemsize)


class Cuda:
    """A GPU: what it is, its kernels and copies, through CuPy.

    Everything is queued on the current stream, but photos: they travel on a stream of their own,
    beside the computation, out of page-locked memory that the loader has filled.
    """

    def __init__(self, number=0):
        import cupy
        self.xp = cupy
        cupy.cuda.Device(number).use()
        facts = cupy.cuda.runtime.getDeviceProperties(number)
        self.name = facts["name"].decode()
        self.multiprocessors = facts["multiProcessorCount"]
        self.tf32 = facts["major"] >= 8
        self.shared_bytes = cupy.cuda.Device(number).attributes["MaxSharedMemoryPerBlockOptin"]
        if self.shared_bytes < 64 << 10:
            raise RuntimeError(f"{self.name} is too old: these kernels need 64 KB of shared memory "
                               "for a block (compute capability 7.0)")
        self.kernels = {}                       # compiled, by file, name and constants
        self.travel = cupy.cuda.Stream(non_blocking=True)
        self.under_way = []                     # (event, photos) of copies that may not be over

    def upload(self, photos):
        """Photos of host_empty on the device; until they are there, their memory is kept."""
        with self.travel:
            there = self.xp.empty(photos.shape, np.uint8)
            there.set(photos, self.travel)
            arrived = self.travel.record()
        self.xp.cuda.get_current_stream().wait_event(arrived)
        self.under_way = [row for row in self.under_way if not row[0].done] + [(arrived, photos)]
        return there


def source(file):
    """A .cu file's text, with the text of ptx.cuh before it.

    Pasted, not included: CuPy's cache of compiled kernels would not see a header change.
    """
    return "\n".join(f'#line 1 "{name}"\n{(FOLDER / name).read_text("utf-8")}'
                     for name in ("ptx.cuh", file))


def options(defines):
    """Compiler options of a kernel variant."""
    return "-std=c++17", *(f"-D{name}={value}" for name, value in (*SIZES, *defines))


_device = None                          # a Cuda
_precision = "fp32"
_trained = None, None, {}               # what sgd updates, and the _forms of its filters


def use(device, precision):
    """Compute on `device` from now on; RuntimeError if it has not the precision asked for."""
    global _device, _precision, _trained
    if precision != "fp32" and not device.tf32:
        raise RuntimeError(f"--precision {precision}: {device.name} has no TF32 tensor cores; use "
                           "--precision fp32")
    _device, _precision, _trained = device, precision, (None, None, {})
    linalg = device.xp._core._routines_linalg
    linalg.set_compute_type(np.float32, linalg.COMPUTE_TYPE_TF32 if precision == "tf32"
                            else linalg.COMPUTE_TYPE_FP32)


# ------------------------------------------------------------------------- what all launches share

KINDS = {int: np.int32, bool: np.int32, float: np.float32, type(None): lambda _: NULL,
         str: lambda name: np.int32(name == _precision)}            # how a kernel gets them


def _launch(file, kernel, grid, block, args, shared=0, defines=()):
    """Queue a kernel of a .cu file, compiled with `defines`.

    Numbers become int32 and float32, None null, "tf32" whether that is on.
    """
    key, kept = (file, kernel, defines), _device.kernels
    if key not in kept:
        module = _device.xp.RawModule(code=source(file), options=options(defines))
        kept[key] = module.get_function(kernel)
        kept[key].max_dynamic_shared_size_bytes = _device.shared_bytes
        if file == "conv.cu":                   # two blocks want all that a multiprocessor has
            kept[key].preferred_shared_memory_carveout = 100
    args = tuple(KINDS[type(arg)](arg) if type(arg) in KINDS else arg for arg in args)
    kept[key](grid, block, args, shared_mem=shared)


def _each(file, kernel, total, args, defines=()):
    """Queue a kernel with a thread for each of `total` numbers."""
    if total:
        _launch(file, kernel, (-(-total // BLOCK),), (BLOCK,), args, defines=defines)


def _empty(shape):
    return _device.xp.empty(shape, np.float32)


def _dense(*arrays, dtype=np.float32):
    """ValueError if one is neither None nor contiguous and of the dtype: kernels check nothing."""
    for x in arrays:
        if x is not None and (x.dtype != dtype or not x.flags.c_contiguous or x.size >= 1 << 31):
            raise ValueError(f"a contiguous {np.dtype(dtype)} array of less than 2^31 numbers is "
                             f"needed, not {x.dtype} {x.shape} with strides {x.strides}")


def _pitch(x):
    """Numbers from a row of x (…, C) to the next; x may be a slice of a wider array's channels."""
    if x.flags.c_contiguous:
        _dense(x)
        return x.shape[-1]
    whole = x.strides[0] // 4 * len(x)                              # numbers, with what is beside x
    if x.dtype != np.float32 or x.strides[-1] != 4 and x.shape[-1] > 1 or whole >= 1 << 31 or any(
            step != n * within for step, within, n in zip(x.strides, x.strides[1:-1], x.shape[1:])):
        _dense(x)                                                   # says what is wrong
    return x.strides[-2] // 4


def _fits(arrays, *numbers):
    """Whether 16 bytes at a time can be read: counts are multiples of 4, addresses of 16."""
    return all(n % 4 == 0 for n in numbers) and all(
        x is None or x.data.ptr % 16 == 0 for x in arrays)


def divisor(d):
    """(d, mul, shift) with n // d = (n·mul / 2^32 + n) >> shift for 0 <= n < 2^31."""
    shift = (d - 1).bit_length()
    return d, ((1 << 32) * ((1 << shift) - d)) // d + 1, shift


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
    fitting = [bn for bn in COLUMNS[_precision != "fp32"]
               if device.shared_bytes >= 2 * stage_bytes(bn, True)]
    each = 65 if _precision == "fp32" else 16           # what a tile costs, in columns
    bn = min(fitting, key=lambda bn: -(-cols // bn) * (bn + each))
    stages = min(STAGES, device.shared_bytes // stage_bytes(bn, filter_gradient))
    blocks = -(-rows // BM) * -(-cols // bn)
    slots, steps = 2 * device.multiprocessors, -(-depth // BK)

    def cost(parts):
        waves = -(-blocks * parts // slots)
        added = 0 if parts == 1 else 4 * (parts + 1) * blocks / slots   # in steps of a tile
        return waves * (-(-steps // parts) + 4) + added

    return bn, stages, min(range(1, max(1, min(steps // LEAST_TILES, 256)) + 1), key=cost)


def conv_defines(bn, stages, vec, filter_gradient, inner, dilate=1):
    """The constants of a variant of conv.cu."""
    return (("BM", BM), ("BN", bn), ("STAGES", stages), ("VEC", vec),
            ("FILTER", int(filter_gradient)), ("INNER", inner), ("DILATE", dilate))


@functools.cache
def _plan(device, precision, shape, place, cols, pitches, vec, filter_gradient, relu):
    """Grid, threads, shared bytes, constants and geometry of a launch of conv.cu: see _convolve."""
    (n, h, w, c), (kh, kw, oh, ow, stride, pad, dilate) = shape, place
    pixels, patch, inner = n * oh * ow, kh * kw * c, INNER[precision]
    rows, depth = (patch, pixels) if filter_gradient else (pixels, patch)
    bn, stages, parts = tile(rows, cols, depth, filter_gradient, device)
    part = -(-(-(-depth // parts)) // BK) * BK
    grid = -(-rows // BM), -(-cols // bn), -(-depth // part)
    whole = grid[2] == 1                        # else bias, ReLU and gate wait for the sum
    geometry = np.array((
        h, w, stride, pad, pixels, *map(divisor, (c, kw, oh, ow)), rows, cols, depth, part,
        *pitches[:2], pitches[2] if whole else cols, relu and whole,
        whole and not filter_gradient and precision == "tf32"), GEOMETRY)
    return (grid, (128 if inner else 256,), stages * stage_bytes(bn, filter_gradient),
            conv_defines(bn, stages, vec, filter_gradient, inner, dilate), geometry)


def _convolve(x, right, y, place, bias=None, relu=False, gate=None, db=None):
    """y (rows, cols) = the left operand gathered from x, times right (depth, cols): conv.cu.

    place: KH, KW of the patches of x (N, H, W, C), OH, OW that say how many there are, and stride,
    pad and dilation that say where. x, right and y may be channel slices. db: Σ of right's rows.
    """
    _dense(bias, gate)
    cols, pitches = y.shape[-1], tuple(map(_pitch, (x, right, y)))
    vec = 4 if _fits((x, right, y), x.shape[3], cols, *pitches) else 1
    grid, threads, shared, defines, geometry = _plan(
        _device, _precision, x.shape, place, cols, pitches, vec, db is not None, relu)
    shares = 0 if db is None else min(4, grid[0])
    sums = _empty((grid[2] * shares, cols)) if shares else None
    parts = _empty((grid[2], y.size)) if grid[2] > 1 else None
    _launch("conv.cu", "conv", grid, threads, (
        x, right, y if parts is None else parts, bias, gate, sums, shares, geometry),
            shared, defines)
    _reduce(parts, y, bias, relu, gate, db is None and "tf32", sums, db)
    return y


def _forms(flat, filters, channels=None):
    """Products' right operands of the filters that lie in `flat`.

    The launch that made them, and makes them again; and {(address of w (KH, KW, C, F), channels):
    for x of so many channels, (KH*KW*channels, F), which is w, rounded where tensor cores want
    that, with zeros for the fourth channel of photos; and for dy, turned, (KH*KW*F, C)}.
    """
    rows, end = [], 0
    for w in filters:
        (*taps, c, f), start = w.shape, end
        wide = channels or (4 if c == 3 else c)
        turned = start + -(-w.size // c * wide // 4) * 4            # 16 bytes apart
        end = turned + -(-w.size // 4) * 4
        rows.append(((w.data.ptr - flat.data.ptr) // 4, taps[0] * taps[1], c, f, wide, start,
                     turned))
    forms, most = _empty(end), max(flat.size // len(rows) // BLOCK, 1)
    launch = functools.partial(
        _launch, "pointwise.cu", "filters", (min(64, most), len(rows)), (BLOCK,),
        (flat, forms, _device.xp.array(np.array(rows, np.int32)), "tf32"))
    launch()
    return launch, {(w.data.ptr, wide): (forms[start:start + taps * wide * f].reshape(-1, f),
                                         forms[turned:turned + w.size].reshape(-1, c))
                    for w, (_, taps, c, f, wide, start, turned) in zip(filters, rows)}


def _filters(w, channels):
    """The two forms of the filters w: those that the last update made, or else new ones."""
    _dense(w)
    key = w.data.ptr, channels
    return _trained[2].get(key) or _forms(w, [w], channels)[1][key]


def conv_forward(x, w, b, stride=1, pad=0, relu=False, out=None):
    """Rows are output pixels, and the reduction goes over the patch."""
    kh, kw, c, f = w.shape
    grid = output_size(x.shape[1], kh, stride, pad), output_size(x.shape[2], kw, stride, pad)
    y = _empty((len(x), *grid, f)) if out is None else out
    return _convolve(x, _filters(w, x.shape[3])[0], y, (kh, kw, *grid, stride, pad, 1), b, relu)


def conv_backward_input(dy, w, x_shape, stride=1, pad=0, gate=None):
    """The forward product on dy, its pixels `stride` apart, with turned filters."""
    kh, kw, c, f = w.shape
    if kh != kw:
        raise ValueError(f"filters must be square, not {kh}×{kw}")
    return _convolve(dy, _filters(w, x_shape[3])[1], _empty((*x_shape[:3], c)),
                     (kh, kw, *x_shape[1:3], 1, kh - 1 - pad, stride), gate=gate)


def conv_backward_filter(x, dy, w_shape, stride=1, pad=0, out=(None, None)):
    """Rows are the numbers of a patch, and the reduction goes over the pixels of dy."""
    kh, kw, c, f = w_shape
    dw, db = (_empty(shape) if y is None else y for y, shape in zip(out, (w_shape, f)))
    wide = dw if x.shape[3] == c else _empty((kh, kw, x.shape[3], f))
    _convolve(x, dy.reshape(-1, f), wide, (kh, kw, *dy.shape[1:3], stride, pad, 1), db=db)
    if wide is not dw:
        dw[...] = wide[:, :, :c]
    return dw, db


def column_sums(x, out=None):
    """A thread for each column, which adds it in order."""
    _dense(x)
    y = _empty(x.shape[1]) if out is None else out
    _reduce(None, y, sums=x, db=y)
    return y


def _reduce(parts, y, bias=None, relu=False, gate=None, round=False, sums=None, db=None):
    """y (…, E) = Σ of parts (Z, y.size), if any, + bias, gate, ReLU; db (E,) = Σ of sums (M, E)."""
    total = 0 if parts is None else y.size
    threads = total + (0 if db is None else db.size)
    _each("pointwise.cu", "reduce", threads, (
        parts, y, bias, gate, sums, db, threads, total, total and len(parts), y.shape[-1],
        _pitch(y), 0 if sums is None else len(sums), relu, round))


# ---------------------------------------------------------------------------------- pooling

def _pool(kernel, arrays, place, shapes, window, *more):
    """A thread for each four channels of the second of `arrays`, or for each one; returns that."""
    _dense(*arrays)
    _dense(place, dtype=np.uint8)
    (_, h, w, c), (_, oh, ow, _) = shapes                           # of x and y
    vec = 4 if _fits(arrays, c) else 1
    at, total = np.array((h, w, c // vec, oh, ow, *window), WINDOW), arrays[1].size // vec
    _each("pool.cu", kernel, total, (*arrays, place, total, at, *more), (("VEC", vec),))
    return arrays[1]


def max_pool_forward(x, kernel, stride, pad=0, ceil=False, gated=False, average=False):
    """The maxima and their places, or averages and None."""
    n, h, w, c = x.shape
    shape = n, *(output_size(size, kernel, stride, pad, ceil) for size in (h, w)), c
    y, place = _empty(shape), None if average else _device.xp.empty(shape, np.uint8)
    _pool("pool_forward", (x, y), place, (x.shape, shape), (kernel, stride, pad), gated, "tf32")
    return y, place


def max_pool_backward(dy, place, x_shape, kernel, stride, pad=0, gate=None):
    """A gather, by the places if there are any."""
    return _pool("pool_backward", (dy, _empty(x_shape), gate), place, (x_shape, dy.shape),
                 (kernel, stride, pad), "tf32")


def avg_pool_forward(x, kernel, stride):
    """The same kernel, without places."""
    return max_pool_forward(x, kernel, stride, average=True)[0]


def avg_pool_backward(dy, x_shape, kernel, stride, gate=None):
    """The same kernel, without places."""
    return max_pool_backward(dy, None, x_shape, kernel, stride, gate=gate)


# ------------------------------------------------------------------------- normalisation

def lrn_backward(dy, x, size=5, k=2.0, alpha=1e-4, beta=0.75, gated=False):
    """A block for a few pixels, which keeps three numbers a channel in shared memory."""
    _dense(dy, x)
    out, c, kept = _empty(x.shape), x.shape[-1], 1 if dy is None else 3
    pixels, rows = out.size // c, max(1, LRN_BYTES // (4 * c * kept))
    _launch("lrn.cu", "lrn", (-(-pixels // rows),), (BLOCK,), (
        dy, x, out, pixels, c, rows, size // 2, float(k), float(alpha), float(beta), gated, "tf32"),
            shared=4 * c * rows * kept)
    return out


def lrn_forward(x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """The same kernel without dy, which keeps one."""
    return lrn_backward(None, x, size, k, alpha, beta)


# ------------------------------------------------------------------------- pointwise passes

def prepare(photos, top, left, flip, crop):
    """A block for each photo; the result has a fourth channel of zeros."""
    _dense(photos, dtype=np.uint8)
    there = _device.upload(photos)
    places = _device.xp.asarray(np.array((top, left, flip), np.int32))          # (3, N)
    y, threads = _empty((len(photos), crop, crop, 4)), 1024
    _launch("pointwise.cu", "prepare", (len(photos),), (threads,),
            (there, places, y, len(photos), photos.shape[1], crop, "tf32"), shared=16 * threads)
    _device.travel.wait_event(_device.xp.cuda.get_current_stream().record())    # `there` was read
    return y


def dropout(x, rate, seed, step, layer, row=0):
    """A thread for each Philox block, 16 numbers of a row."""
    _dense(x)
    y, e = _empty(x.shape), x.shape[1]
    blocks = -(-e // LANES)
    _each("pointwise.cu", "dropout", len(x) * blocks, (
        x, y, len(x) * blocks, e, blocks, np.uint32(round(rate * 65536)),
        float(1 / (1 - rate)), *map(np.uint64, (seed, step, layer, row))))
    return y


def sum_gradients(terms, gate=None):
    """A thread for each number, if there is anything to do."""
    _dense(*terms, gate)
    total = terms[0].size if gate is not None or len(terms) > 1 else 0
    one, two, three, four = [*terms, *[None] * (4 - len(terms))]    # ValueError: five
    _each("pointwise.cu", "sum_gradients", total, (one, two, three, four, gate, total, "tf32"))
    return one


# ------------------------------------------------------------------- products, loss, update

def matmul(a, b, out=None, bias=None, relu=False):
    """A product by the library that the device has for it; bias and ReLU in a pass after it."""
    y = _device.xp.matmul(a, b, out=out)
    if relu or bias is not None:
        _reduce(y[None], y, bias, relu)
    return y


def _loss(kernel, s, targets, weights, *vectors):
    """A block for each row."""
    _dense(s)
    losses = _empty(len(s))
    targets, weights, *vectors = (
        None if x is None else _device.xp.asarray(np.ascontiguousarray(x, dtype))
        for x, dtype in zip((targets, weights, *vectors), (np.int32, *[np.float32] * 3)))
    _launch("loss.cu", kernel, (len(s),), (1024 if s.shape[1] > 4096 else BLOCK,),
            (s, targets, weights, *vectors, losses, s.shape[1], targets.shape[1]), shared=4 * 64)
    return losses, s


def softmax_loss(s, targets, weights, shift=None):
    """A block for each row, which it reads twice."""
    return _loss("softmax_loss", s, targets, weights, shift)


def one_vs_all_loss(s, targets, weights, positive, negative):
    """A block for each row, which it reads once."""
    return _loss("one_vs_all_loss", s, targets, weights, positive, negative)


def sgd(w, v, dw, rate, momentum, decay, rows=None, biases=0, filters=()):
    """A thread for each four numbers of dw."""
    global _trained
    _dense(w, v, dw)
    rows = None if rows is None else _device.xp.asarray(rows, np.int32)
    _each("sgd.cu", "sgd", -(-dw.size // 4), (
        w, v, dw, rows, dw.size, dw.size - biases, w.size // len(w), float(rate), float(momentum),
        float(decay)))
    if filters and _trained[0] is w:
        _trained[1]()
    elif filters:
        _trained = w, *_forms(w, filters)


# ----------------------------------------------------------------------------------- arrays

def to_device(x):
    """A copy of x where this device computes."""
    return _device.xp.array(x)


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
