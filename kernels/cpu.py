"""The NumPy twins: what every operation computes, and how two cores compute it fast.

Each function here is the specification of the CUDA kernel of the same name and arguments. Images
are NHWC and filters (KH, KW, C, F); the axis letters are defined at the top of model.py.
Convolution is a matrix product of patches and filters. In NHWC a patch is KH contiguous runs of
KW*C numbers, so copying the patches out costs little, and a few images at a time stay in the
cache. Speed comes from worker threads that each take chunks of images with single-threaded BLAS.
Chunks belong to threads by number and partial sums are added in a fixed order, so the bits of a
result depend on the number of threads and on nothing else.
"""
import ctypes
import functools
import glob
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .philox import DROPOUT, philox

PATCH_BYTES = 2 << 20       # patches one thread multiplies at a time: they stay in the cache
TILE_BYTES = 1 << 20        # … and tiles that Winograd's algorithm multiplies
POOL_BYTES = 4 << 20        # images one thread pools at a time: fewer would leave Python the limit
FLAT_CHUNK = 1 << 17        # numbers per chunk of an elementwise pass: the arrays stay in cache
LANES = 16                  # dropout lanes of 16 bits in one Philox block of four 64-bit words


# ---------------------------------------------------------------------------------- threads

def _set_blas_threads(count):
    """Set the threads of NumPy's own OpenBLAS, and of SciPy's; False if NumPy carries another."""
    site, found = os.path.dirname(os.path.dirname(np.__file__)), {"numpy": [], "scipy": []}
    names = ["scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads",
             "openblas_set_num_threads64_", "openblas_set_num_threads"]
    for package, setters in found.items():
        libraries = map(ctypes.CDLL, glob.glob(f"{glob.escape(site)}/{package}.libs/*openblas*"))
        setters += [getattr(library, name, None) for library in libraries for name in names]
        for setter in filter(None, setters):
            setter(ctypes.c_int(count))
    return any(found["numpy"])


class Threads:
    """The worker threads, each with single-threaded BLAS; they start when first needed."""

    def __init__(self):
        self._count, self._executor = None, None

    def start(self, count):
        """Use so many from now on; another count may change the last bits of sums."""
        if not _set_blas_threads(1):
            count = 1                           # BLAS has threads of its own: do not fight them
        self._count = count
        self._executor = ThreadPoolExecutor(count) if count > 1 else None

    @property
    def count(self):
        """The number of threads in use."""
        if self._count is None:
            self.start(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                       else os.cpu_count())
        return self._count

    def share(self, work, items):
        """[work(some)] of all threads in their order; the t-th takes items[t::count]."""
        shares = [items[t::self.count] for t in range(self.count)]
        return list((self._executor.map if self._executor else map)(work, shares))

    def chunks(self, n, size, work):
        """work(start, stop) on chunks of range(n), shared among the threads."""
        def some(starts):
            for start in starts:
                work(start, min(start + size, n))
        self.share(some, range(0, n, size))


threads = Threads()


def _chunk_size(n, bytes_each, limit=PATCH_BYTES):
    """Images a chunk: within the cache, and the threads' shares of equal size."""
    share = -(-n // threads.count)
    most = max(1, min(share, limit // max(1, bytes_each)))
    return -(-share // -(-share // most))


# ------------------------------------------------------------------------------ convolution

def output_size(size, kernel, stride, pad=0, ceil=False):
    """Output pixels along one axis; with `ceil` a last window may hang over the edge."""
    spare = size + 2 * pad - kernel
    out = (-(-spare // stride) if ceil else spare // stride) + 1
    return out - 1 if ceil and (out - 1) * stride >= size + pad else out


def _embed(x, top, left, shape, dilate=1):
    """x (n, H, W, C) on a zero canvas (n, *shape, C): x[:, i, j] at (top + i·dilate, left + …).

    What would lie outside the canvas is left out; top and left may be negative.
    """
    cut_i, cut_j = max(0, -top), max(0, -left)
    canvas = np.zeros((len(x), shape[0] + cut_i, shape[1] + cut_j, x.shape[3]), x.dtype)
    inner = canvas[:, top + cut_i::dilate, left + cut_j::dilate][:, :x.shape[1], :x.shape[2]]
    inner[:] = x[:, :inner.shape[1], :inner.shape[2]]
    return canvas[:, cut_i:, cut_j:]


def _patches(x, kh, kw, stride, oh, ow):
    """All patches of a padded x, one a row: (n*OH*OW, KH*KW*C)."""
    n, _, _, c = x.shape
    sn, sh, sw, _ = x.strides                   # NumPy does not care for the stride of one channel
    view = as_strided(x, (n, oh, ow, kh, kw * c), (sn, sh * stride, sw * stride, sh, x.itemsize))
    # KH runs of KW*C numbers; as one item each, because NumPy copies item by item
    runs = np.ascontiguousarray(view.view((np.void, kw * c * x.itemsize)))
    return runs.view(x.dtype).reshape(-1, kh * kw * c)


def _input_patches(x, w_shape, stride, pad, oh, ow):
    """The patches that the filters see: x with its zero border, one patch a row."""
    kh, kw = w_shape[:2]
    if (kh, kw, stride, pad) == (1, 1, 1, 0):
        return x.reshape(-1, x.shape[3])                            # (n*H*W, C), no copy
    need = (oh - 1) * stride + kh, (ow - 1) * stride + kw
    if pad or not x.flags.c_contiguous:
        x = _embed(x, pad, pad, need)
    return _patches(x, kh, kw, stride, oh, ow)


# Winograd's F(m×m, r×r), m = 7 - r (Lavin and Gray 2016, §4): m×m numbers of y = x * w come from
# 6×6 numbers d of x by 36 products instead of m²r²: a quarter for r = 3, 9/25 for r = 5. It
# multiplies polynomials by their values at 0, ±1, ±2 and ∞: y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ d B)] A. The
# transformations are products, too: Bᵀ d B is (Bᵀ ⊗ Bᵀ) d with the numbers of d in a column.
_B = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0],
      [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
_POINTS, _SCALES = [0, 1, -1, 2, -2], np.array([6, -4, -4, 1, 1]) / 24


def _matrices(r):
    """G ⊗ G (36×r²) and Aᵀ ⊗ Aᵀ (m²×36): the points' powers, of which ∞ has only the last."""
    def powers(count):
        return np.vstack([np.vander(_POINTS, count, increasing=True), np.eye(count)[-1]])
    g, a = powers(r) * np.append(_SCALES, 1)[:, None], powers(7 - r).T
    return np.kron(g, g), np.kron(a, a)


_INPUT = np.kron(_B, _B)                                            # 36×36
_FILTER, _OUTPUT = ({r: _matrices(r)[i] for r in (3, 5)} for i in (0, 1))


def _is_winograd(w_shape, stride, pad):
    """Whether that algorithm is faster: few channels do not pay for its transformations."""
    least = {(3, 3, 1, 1): 16, (5, 5, 1, 2): 64}.get((*w_shape[:2], stride, pad))
    return bool(least and min(w_shape[2:]) >= least)


def _tiles_chunk(w_shape, y_shape, itemsize):
    """Images a chunk: their tiles are as large as the filters that it reads, up to 8 MB."""
    (r, _, c, f), (n, oh, ow, _) = w_shape, y_shape
    each = 36 * -(-oh // (7 - r)) * -(-ow // (7 - r)) * max(c, f) * itemsize
    return _chunk_size(n, each, np.clip(36 * c * f * itemsize, TILE_BYTES, 8 * TILE_BYTES))


def _transform(matrix, x, size, step, pad):
    """Tiles of size×size pixels of x, `step` apart, by a matrix (36, size²): (36, n·tiles, C)."""
    n, h, w, c = x.shape
    rows, cols = -(-h // step), -(-w // step)
    x = _embed(x, pad, pad, (step * (rows - 1) + size, step * (cols - 1) + size))
    sn, sh, sw, item = x.strides
    tiles = as_strided(x, (size, size, n, rows, cols, c),
                       (sh, sw, sn, step * sh, step * sw, item))
    return (matrix.astype(x.dtype) @ tiles.reshape(size * size, -1)).reshape(36, -1, c)


def _convolution(w, y_shape, stride, pad):
    """A function of some images (n, H, W, C) and their y that computes y = x * w, and n for it."""
    r, _, c, f = w.shape
    n, oh, ow, _ = y_shape
    flat = w.reshape(-1, f)                                         # (KH*KW*C, F)

    def multiply(x, y):
        patches = _input_patches(x, w.shape, stride, pad, oh, ow)
        np.matmul(patches, flat, out=y.reshape(-1, f))              # (n*OH*OW, F), a view of y

    def multiply_tiles(x, y):
        m = 7 - r
        rows, cols = -(-oh // m), -(-ow // m)
        products = np.matmul(_transform(_INPUT, x, 6, m, pad), turned)      # (36, n·tiles, F)
        tiles = _OUTPUT[r].astype(x.dtype) @ products.reshape(36, -1)
        y[:] = tiles.reshape(m, m, len(x), rows, cols, f).transpose(2, 3, 0, 4, 1, 5).reshape(
            len(x), m * rows, m * cols, f)[:, :oh, :ow]

    if not _is_winograd(w.shape, stride, pad):
        return multiply, _chunk_size(n, oh * ow * len(flat) * w.itemsize)
    turned = (_FILTER[r].astype(w.dtype) @ w.reshape(r * r, -1)).reshape(36, c, f)
    return multiply_tiles, _tiles_chunk(w.shape, y_shape, w.itemsize)


def conv_forward(x, w, b, stride=1, pad=0, relu=False, out=None):
    """y[n,i,j,f] = b[f] + Σ_{p,q,c} x[n, i·stride+p-pad, j·stride+q-pad, c] · w[p,q,c,f].

    x (N, H, W, C), w (KH, KW, C, F), b (F,) -> (N, OH, OW, F). With `relu`, max(y, 0). `out` may
    be a channel slice of a wider array: an inception branch writes into its concatenation.
    """
    kh, kw, _, f = w.shape
    oh, ow = output_size(x.shape[1], kh, stride, pad), output_size(x.shape[2], kw, stride, pad)
    y = np.empty((len(x), oh, ow, f), x.dtype) if out is None else out
    multiply, size = _convolution(w, y.shape, stride, pad)

    def work(start, stop):
        part = y[start:stop]
        multiply(x[start:stop], part)
        part += b
        if relu:
            np.maximum(part, 0, out=part)

    threads.chunks(len(x), size, work)
    return y


def conv_backward_input(dy, w, x_shape, stride=1, pad=0, gate=None):
    """dx[n,i,j,c] = Σ dy[n,i',j',f] · w[p,q,c,f] over i'·stride+p-pad = i, j'·stride+q-pad = j.

    A convolution again: dy, its pixels `stride` apart, with the filters turned round.
    dy (N, OH, OW, F), w (KH, KW, C, F) -> (N, H, W, C), which is x_shape. Here and below dy may be
    a channel slice, and a gate is the x, if a ReLU made it: dx counts times (gate > 0).
    """
    kh, kw, c, f = w.shape
    n, h, width, _ = x_shape
    dx, plain = np.empty(x_shape, dy.dtype), kh == kw and stride == 1 and 2 * pad == kh - 1
    turned = np.ascontiguousarray(w[::-1, ::-1].swapaxes(2, 3))     # (KH, KW, F, C)
    multiply, size = _convolution(turned, x_shape, 1, pad if plain else 0)

    def work(start, stop):
        part = dy[start:stop]
        if not plain:
            part = _embed(part, kh - 1 - pad, kw - 1 - pad, (h + kh - 1, width + kw - 1), stride)
        multiply(part, dx[start:stop])
        if gate is not None:
            dx[start:stop] *= gate[start:stop] > 0

    threads.chunks(n, size, work)
    return dx


def conv_backward_filter(x, dy, w_shape, stride=1, pad=0, out=(None, None)):
    """dw[p,q,c,f] = Σ_{n,i,j} x[n, i·stride+p-pad, j·stride+q-pad, c] · dy[n,i,j,f]; db = Σ dy.

    x (N, H, W, C), dy (N, OH, OW, F) -> dw (KH, KW, C, F), which is w_shape, and db (F,), in the
    arrays `out` if given. By Winograd's algorithm dw = Gᵀ [(Bᵀ x B) ⊙ (A dy Aᵀ)] G, summed over
    the tiles.
    """
    n, oh, ow, f = dy.shape
    r, rows, tiles = w_shape[0], int(np.prod(w_shape[:3])), _is_winograd(w_shape, stride, pad)
    if tiles:
        size = _tiles_chunk(w_shape, dy.shape, x.itemsize)
    else:                                       # large beside dw, to which each chunk adds
        most = np.clip(16 * rows * f * x.itemsize, PATCH_BYTES, 9 * PATCH_BYTES)
        size = _chunk_size(n, oh * ow * rows * x.itemsize, most)

    def partial(starts):
        dw, db, product = None, np.zeros(f, x.dtype), None
        for start in starts:
            part, d = x[start:start + size], dy[start:start + size]
            if tiles:                                               # (36, n·tiles, C), … F)
                left = _transform(_INPUT, part, 6, 7 - r, pad)
                right = _transform(_OUTPUT[r].T, d, 7 - r, 7 - r, 0)
            else:                                                   # (n*OH*OW, KH*KW*C), (…, F)
                left = _input_patches(part, w_shape, stride, pad, oh, ow)
                right = d.reshape(-1, f)
            db += np.ones(d.size // f, d.dtype) @ d.reshape(-1, f)
            if dw is None:
                dw = np.matmul(left.swapaxes(-1, -2), right)        # (KH*KW*C, F), or (36, C, F)
            else:
                product = np.matmul(left.swapaxes(-1, -2), right, out=product)
                dw += product
        return dw, db

    parts = [part for part in threads.share(partial, range(0, n, size)) if part[0] is not None]
    dw, db = (np.empty(shape, x.dtype) if y is None else y for y, shape in zip(out, (w_shape, f)))
    total, db[:] = (functools.reduce(np.add, part) for part in zip(*parts))
    total = _FILTER[r].T.astype(x.dtype) @ total.reshape(36, -1) if tiles else total
    dw[:] = total.reshape(w_shape)
    return dw, db


# ---------------------------------------------------------------------------------- pooling

def _taps(shape, out_shape, kernel, stride, pad=0):
    """For each of the window's pixels, in scan order: its outputs, where it is, its number."""
    def along(size, out, k):
        first = max(0, -(-(pad - k) // stride))                     # first window that has pixel k
        last = min(out, (size - 1 + pad - k) // stride + 1)
        start = first * stride + k - pad
        return slice(first, last), slice(start, start + (last - first - 1) * stride + 1, stride)

    found = []
    for p, q in np.ndindex(kernel, kernel):
        (oi, ii), (oj, ij) = along(shape[0], out_shape[0], p), along(shape[1], out_shape[1], q)
        if oi.stop > oi.start and oj.stop > oj.start:
            found.append(((slice(None), oi, oj), (slice(None), ii, ij), p * kernel + q))
    return found


def max_pool_forward(x, kernel, stride, pad=0, ceil=False, gated=False):
    """y = maximum over each kernel×kernel window, pixels outside the image left out; and its place.

    x (N, H, W, C) -> y and place, uint8, both (N, OH, OW, C). With `ceil` the last window may hang
    over the edge. place is the maximum's number p·kernel + q in the window, the first's where
    several tie, and 255, which gets no gradient, for a NaN and, if x is gated, where the maximum
    is not positive; the kernel is at most 15.
    """
    n, h, w, c = x.shape
    out = tuple(output_size(size, kernel, stride, pad, ceil) for size in (h, w))
    y, place = np.empty((n, *out, c), x.dtype), np.empty((n, *out, c), np.uint8)
    rows, cols = (np.maximum(0, pad - stride * np.arange(size)) for size in out)
    first = (rows[:, None] * kernel + cols)[..., None]              # (OH, OW, 1), inside the image

    def work(start, stop):
        part, where = y[start:stop], place[start:stop]
        part[:], where[:] = -np.inf, first
        for outs, ins, number in _taps((h, w), out, kernel, stride, pad):
            larger = np.greater(x[start:stop][ins], part[outs]).view(np.uint8)
            larger *= np.uint8(number)                              # numbers grow from tap to tap
            np.maximum(where[outs], larger, out=where[outs])
            np.maximum(part[outs], x[start:stop][ins], out=part[outs])
        nowhere = ~(part > 0) if gated else np.isnan(part)
        where |= -nowhere.view(np.uint8)                            # 255 where true

    threads.chunks(n, _chunk_size(n, x[0].nbytes, POOL_BYTES), work)
    return y, place


def max_pool_backward(dy, place, x_shape, kernel, stride, pad=0):
    """dx (N, H, W, C), which is x_shape: each dy goes to the place of its window's maximum."""
    dx = np.zeros(x_shape, dy.dtype)

    def work(start, stop):
        for outs, ins, number in _taps(x_shape[1:3], dy.shape[1:3], kernel, stride, pad):
            dx[start:stop][ins] += dy[start:stop][outs] * (place[start:stop][outs] == number)

    threads.chunks(len(dy), _chunk_size(len(dy), dx[0].nbytes, POOL_BYTES), work)
    return dx


def avg_pool_forward(x, kernel, stride):
    """y = mean over each kernel×kernel window, all of which lie inside the image."""
    n, h, w, c = x.shape
    y = np.zeros((n, output_size(h, kernel, stride), output_size(w, kernel, stride), c), x.dtype)
    for outs, ins, _ in _taps((h, w), y.shape[1:3], kernel, stride):
        y[outs] += x[ins]
    y /= kernel * kernel
    return y


def avg_pool_backward(dy, x_shape, kernel, stride, gate=None):
    """dx (N, H, W, C), which is x_shape: each dy is shared equally among its window's pixels."""
    dx = np.zeros(x_shape, dy.dtype)
    each = dy / (kernel * kernel)
    for outs, ins, _ in _taps(x_shape[1:3], dy.shape[1:3], kernel, stride):
        dx[ins] += each[outs]
    return dx if gate is None else dx * (gate > 0)


# ------------------------------------------------------------------------- normalisation

def _window_sum(x, size):
    """Sum over the `size` channels around each one, cut off at the edges."""
    half = size // 2
    total = x.copy()
    for shift in range(1, min(half, x.shape[-1] - 1) + 1):
        total[..., shift:] += x[..., :-shift]
        total[..., :-shift] += x[..., shift:]
    return total


def _power(s, beta):
    """s^-β, by square roots where β = 3/4: powers take long."""
    root = np.sqrt(s)
    return 1 / (root * np.sqrt(root)) if beta == 0.75 else s ** -beta


def lrn_forward(x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """y = x / (k + α Σ x²)^β, the sum over `size` neighbouring channels (size is odd)."""
    pixels = x.reshape(-1, x.shape[-1])
    y = np.empty(pixels.shape, x.dtype)

    def work(start, stop):
        part = pixels[start:stop]
        scale = k + alpha * _window_sum(part * part, size)
        np.multiply(part, _power(scale, beta), out=y[start:stop])

    threads.chunks(len(pixels), max(1, 2 * FLAT_CHUNK // x.shape[-1]), work)
    return y.reshape(x.shape)


def lrn_backward(dy, x, size=5, k=2.0, alpha=1e-4, beta=0.75, gated=False):
    """dx_c = dy_c s_c^-β - 2αβ x_c Σ_{c' near c} dy_c' x_c' s_c'^(-β-1), with s = k + α Σ x²."""
    pixels, d = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
    dx = np.empty(pixels.shape, x.dtype)

    def work(start, stop):
        part = pixels[start:stop]
        scale = k + alpha * _window_sum(part * part, size)
        own = d[start:stop] * _power(scale, beta)
        near = _window_sum(own * part / scale, size)
        np.subtract(own, 2 * alpha * beta * part * near, out=dx[start:stop])
        if gated:
            dx[start:stop] *= part > 0

    threads.chunks(len(pixels), max(1, 2 * FLAT_CHUNK // x.shape[-1]), work)
    return dx.reshape(x.shape)


# --------------------------------------------------------------- sums, dropout and photos

def sum_gradients(terms, gate=None):
    """Σ terms, up to four arrays (N, …), times (gate > 0), in the memory of the first.

    The gradients of all that read the same x add up; that of one is only gated.
    """
    total, *others = terms

    def work(start, stop):
        for other in others:
            total[start:stop] += other[start:stop]
        if gate is not None:
            total[start:stop] *= gate[start:stop] > 0

    threads.chunks(len(total), max(1, FLAT_CHUNK * len(total) // max(1, total.size)), work)
    return total


def column_sums(x, out=None):
    """y[e] = Σ_m x[m, e]: (M, E) -> (E,), into `out` if given."""
    return x.sum(axis=0, out=out)


def dropout(x, rate, seed, step, layer, row=0):
    """y = x · mask / (1 - rate); the same call on dy gives dx, for the mask is drawn again.

    x (N, E). Element (n, e) of global row `row`+n takes 16 bits, lane e of Philox counters
    ((row+n)·⌈E/16⌉ + ⌊e/16⌋, step, layer, DROPOUT) and is kept if they are at least rate·2^16.
    """
    n, e = x.shape
    blocks = -(-e // LANES)
    raw = philox(seed, (row * blocks, step, layer, DROPOUT)).random_raw(n * blocks * 4)
    lanes = raw.view(np.uint16).reshape(n, blocks * LANES)[:, :e]   # little-endian lanes
    return x * ((lanes >= round(rate * 65536)) * x.dtype.type(1 / (1 - rate)))


def prepare(photos, top, left, flip, crop):
    """Crop, mirror and normalise photos: (x - mean) / deviation, one mean per photo (paper, §3).

    photos uint8 (N, S, S, 3); top, left (N,) int; flip (N,) bool -> float32 (N, crop, crop, 3).
    The deviation counts as at least 1/255 of the range, so a blank photo gives zeros and no NaN.
    """
    y = np.empty((len(photos), crop, crop, 3), np.float32)

    def work(start, stop):
        for n in range(start, stop):
            part = photos[n, top[n]:top[n] + crop, left[n]:left[n] + crop]
            y[n] = part[:, ::-1] if flip[n] else part
            flat = y[n].reshape(-1)                                 # a view
            flat -= flat.mean()
            deviation = np.sqrt(flat @ flat / flat.size)
            flat *= np.float32(1) / max(deviation, np.float32(1))

    threads.chunks(len(photos), 8, work)
    return y


# --------------------------------------------------------------------- products and losses

def matmul(a, b, out=None, bias=None, relu=False):
    """y = a b + bias, with `relu` max(y, 0), into `out` if given.

    (M, D) times (D, E) -> (M, E); bias (E,). The longer side is shared among the threads.
    """
    m, e = a.shape[0], b.shape[1]
    y = np.empty((m, e), np.result_type(a, b)) if out is None else out

    def work(start, stop):
        mine = (slice(start, stop), slice(None)) if m >= e else (slice(None), slice(start, stop))
        np.matmul(a[mine[0]], b[:, mine[1]], out=y[mine])
        if bias is not None:
            y[mine] += bias[mine[1]]
        if relu:
            np.maximum(y[mine], 0, out=y[mine])

    threads.chunks(max(m, e), -(-max(m, e) // threads.count), work)
    return y


def _positives(targets):
    """Row and column of each target: targets int32 (N, T), padded with -1."""
    rows, slots = np.nonzero(targets >= 0)
    return rows, targets[rows, slots]


def softmax_loss(s, targets, weights, shift=None):
    """ℓ = - Σ_n Σ_t weights[n,t] log p_nk, with k = targets[n,t], p_nk = exp s_nk / Σ_k' exp s_nk'.

    The multi-class logistic loss (eq. 2 with weights 1/N). s (N, K) becomes the gradient,
    ∂ℓ/∂s_nk = (Σ_t weights[n,t]) p_nk - weights[n,t] for targets, since ∂ log Σ exp s / ∂s_k = p_k.
    targets int32 (N, T), padded with -1; weights (N, T), zero for a row that does not count.
    shift (K,), if given, is added to the scores of all but a row's targets: the logarithm of how
    many classes each of them stands for. Returns each row's part of ℓ, (N,) float64, and the
    gradient, in the memory of s.
    """
    rows, words = _positives(targets)
    weights = weights[targets >= 0]                                 # in the order of rows
    if shift is not None:
        s += shift.astype(s.dtype)
        s[rows, words] -= shift[words].astype(s.dtype)
    s -= s.max(axis=1, keepdims=True)                               # exp cannot overflow
    picked = s[rows, words].astype(np.float64)                      # s_nk - max
    np.exp(s, out=s)
    total = s.sum(axis=1, keepdims=True)                            # (N, 1), at least 1
    log_p = picked - np.log(total[rows, 0])
    s *= np.bincount(rows, weights, len(s))[:, None].astype(s.dtype) / total
    s[rows, words] -= weights.astype(s.dtype)
    return np.bincount(rows, -weights * log_p, len(s)), s


def one_vs_all_loss(s, targets, weights, positive, negative):
    """ℓ = - Σ_nk weights[n] (y_nk positive[k] log σ(s_nk) + (1-y_nk) negative[k] log(1-σ(s_nk))).

    The one-versus-all logistic loss (eq. 1 with positive 1/N_k and negative 1/(N - N_k)); y_nk
    says whether k is in targets[n]. s (N, K) becomes the gradient, weights[n] times
    negative[k] σ(s) for y = 0 and -positive[k] σ(-s) for y = 1, since ∂ log(1 + exp s) / ∂s = σ(s).
    positive, negative (K,), weights (N,); the rest, and what is returned, as in softmax_loss.
    """
    rows, words = _positives(targets)
    s[rows, words] *= -1                        # both terms are now log(1 + exp s)
    scale = weights[:, None].astype(s.dtype) * negative.astype(s.dtype)             # (N, K)
    scale[rows, words] = weights[rows] * positive[words]
    small = np.exp(-np.abs(s))                                      # in (0, 1]: no overflow
    losses = (scale * (np.maximum(s, 0) + np.log1p(small))).sum(axis=1, dtype=np.float64)
    np.divide(np.where(s > 0, 1, small), 1 + small, out=s)          # σ(s)
    s *= scale
    s[rows, words] *= -1
    return losses, s


def sgd(w, v, dw, rate, momentum, decay, rows=None, biases=0, filters=()):
    """v ← momentum·v + dw + decay·w, then w ← w - rate·v, in place and in one pass.

    With rows (R,), none twice, only w[rows] and v[rows] move, by dw (R, …); all others stay.
    biases: so many numbers at the end of w do not decay.
    filters: the parts of w that convolutions use next; a GPU prepares them all at once.
    """
    if rows is not None:
        part_w, part_v = w[rows], v[rows]                           # copies, (R, …)
        sgd(part_w, part_v, dw, rate, momentum, decay)
        w[rows], v[rows] = part_w, part_v
        return
    flat_w, flat_v, flat_dw = w.reshape(-1), v.reshape(-1), dw.reshape(-1)
    rate, momentum, decay = (w.dtype.type(number) for number in (rate, momentum, decay))

    def work(start, stop):
        part_w, part_v = flat_w[start:stop], flat_v[start:stop]
        part_v *= momentum
        part_v += flat_dw[start:stop]
        weights = flat_w[start:min(stop, w.size - biases)]
        part_v[:len(weights)] += decay * weights
        part_w -= rate * part_v

    threads.chunks(w.size, FLAT_CHUNK, work)


# ---------------------------------------------------------------------------------- arrays

def to_device(x):
    """x, a NumPy array, where this device computes: x itself on the CPU, a copy on a GPU."""
    return np.asarray(x)


def to_host(x):
    """x, an array of this device, as a NumPy array."""
    return np.asarray(x)


def host_empty(shape):
    """Memory of the host for photos, uint8, from which `prepare` reads them best."""
    return np.empty(shape, np.uint8)


def memory():
    """Free bytes of the device's own memory; None on the CPU."""
    return None
