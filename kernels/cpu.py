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
import glob
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.lib.stride_tricks import as_strided

PATCH_BYTES = 9 << 20       # patches one thread multiplies at a time: they stay in a 32 MB L3 cache
POOL_BYTES = 4 << 20        # images one thread pools at a time: fewer would leave Python the limit
FLAT_CHUNK = 1 << 17        # numbers per chunk of an elementwise pass: the arrays stay in cache
LANES = 16                  # dropout lanes of 16 bits in one Philox block of four 64-bit words


# ---------------------------------------------------------------------------------- threads

def _blas_threads(count):
    """Set the number of threads of NumPy's own OpenBLAS; False if this NumPy carries another."""
    folder = os.path.join(os.path.dirname(os.path.dirname(np.__file__)), "numpy.libs")
    names = ["scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads",
             "openblas_set_num_threads64_", "openblas_set_num_threads"]
    for path in glob.glob(os.path.join(folder, "*openblas*")):
        library = ctypes.CDLL(path)
        for name in names:
            if hasattr(library, name):
                getattr(library, name)(ctypes.c_int(count))
                return True
    return False


class _Pool:
    """The worker threads; `count` of them, each with single-threaded BLAS."""

    def __init__(self):
        self.count, self.executor = 1, None
        self.start(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                   else os.cpu_count())

    def start(self, count):
        if not _blas_threads(1):
            count = 1                           # BLAS threads by itself; do not fight with it
        if self.executor:
            self.executor.shutdown()
        self.count = count
        self.executor = ThreadPoolExecutor(count) if count > 1 else None

    def run(self, work):
        """work(t) on every thread t, results in the order of t."""
        if self.executor is None:
            return [work(t) for t in range(self.count)]
        return list(self.executor.map(work, range(self.count)))

    def chunks(self, n, size, work):
        """work(start, stop) on chunks of range(n); chunk i belongs to thread i modulo count."""
        def mine(t):
            for start in range(t * size, n, self.count * size):
                work(start, min(start + size, n))
        self.run(mine)


_pool = _Pool()


def set_threads(count):
    """Use `count` worker threads from now on; another count may change the last bits of sums."""
    _pool.start(count)


def threads():
    """The number of worker threads in use."""
    return _pool.count


def _chunk_size(n, bytes_each, limit=PATCH_BYTES):
    """Images a chunk: within the cache, and the threads' shares of equal size."""
    share = -(-n // _pool.count)
    most = max(1, min(share, limit // max(1, bytes_each)))
    return -(-share // -(-share // most))


# ------------------------------------------------------------------------------ convolution

def conv_size(size, kernel, stride, pad):
    """Output pixels along one axis of a convolution."""
    return (size + 2 * pad - kernel) // stride + 1


def _padded(x, top, left, shape, dilate=1):
    """x (n, H, W, C) on a zero canvas (n, *shape, C): x[:, i, j] at (top + i·dilate, left + …).

    What would lie outside the canvas is left out; top and left may be negative.
    """
    def along(offset, size, count):
        first = max(0, -(offset // dilate))
        start = offset + first * dilate
        take = max(0, min(count - first, -(-(size - start) // dilate)))
        return slice(start, start + take * dilate, dilate), slice(first, first + take)

    canvas = np.zeros((len(x), *shape, x.shape[3]), x.dtype)
    (to_i, from_i), (to_j, from_j) = (along(top, shape[0], x.shape[1]),
                                      along(left, shape[1], x.shape[2]))
    canvas[:, to_i, to_j] = x[:, from_i, from_j]
    return canvas


def _patches(x, kh, kw, stride, oh, ow):
    """All patches of a padded x, one a row: (n*OH*OW, KH*KW*C)."""
    n, _, _, c = x.shape
    sn, sh, sw, sc = x.strides
    view = as_strided(x, (n, oh, ow, kh, kw * c), (sn, sh * stride, sw * stride, sh, sc))
    return view.reshape(n * oh * ow, kh * kw * c)                   # a copy: KH runs of KW*C


def _input_patches(x, w_shape, stride, pad, oh, ow):
    """The patches that the filters see: x with its zero border, one patch a row."""
    kh, kw = w_shape[:2]
    if (kh, kw, stride, pad) == (1, 1, 1, 0):
        return x.reshape(-1, x.shape[3])                            # (n*H*W, C), no copy
    need = (oh - 1) * stride + kh, (ow - 1) * stride + kw
    if pad or not x.flags.c_contiguous:
        x = _padded(x, pad, pad, need)
    return _patches(x, kh, kw, stride, oh, ow)


def conv_forward(x, w, b, stride=1, pad=0, relu=False, out=None):
    """y[n,i,j,f] = b[f] + Σ_{p,q,c} x[n, i·stride+p-pad, j·stride+q-pad, c] · w[p,q,c,f].

    x (N, H, W, C), w (KH, KW, C, F), b (F,) -> (N, OH, OW, F). With `relu`, max(y, 0). `out` may
    be a channel slice of a wider array: an inception branch writes into its concatenation.
    """
    kh, kw, _, f = w.shape
    oh, ow = conv_size(x.shape[1], kh, stride, pad), conv_size(x.shape[2], kw, stride, pad)
    y = np.empty((len(x), oh, ow, f), x.dtype) if out is None else out
    flat = w.reshape(-1, f)                                         # (KH*KW*C, F)

    def work(start, stop):
        rows = y[start:stop].reshape(-1, f)                         # (n*OH*OW, F), a view
        np.matmul(_input_patches(x[start:stop], w.shape, stride, pad, oh, ow), flat, out=rows)
        rows += b
        if relu:
            np.maximum(rows, 0, out=rows)

    _pool.chunks(len(x), _chunk_size(len(x), oh * ow * len(flat) * x.itemsize), work)
    return y


def conv_backward_input(dy, w, x, stride=1, pad=0, relu=False):
    """dx[n,i,j,c] = Σ dy[n,i',j',f] · w[p,q,c,f] over i'·stride+p-pad = i, j'·stride+q-pad = j.

    A convolution again: dy, its pixels `stride` apart, with the filters turned round. With
    `relu`, x came out of a ReLU and dx is multiplied by its derivative (x > 0).
    """
    kh, kw, c, f = w.shape
    n, h, width, _ = x.shape
    turned = np.ascontiguousarray(w[::-1, ::-1].swapaxes(2, 3)).reshape(-1, c)  # (KH*KW*F, C)
    dx = np.empty(x.shape, dy.dtype)

    def work(start, stop):
        canvas = dy[start:stop]
        if (kh, kw, stride, pad) != (1, 1, 1, 0):
            canvas = _padded(canvas, kh - 1 - pad, kw - 1 - pad, (h + kh - 1, width + kw - 1),
                             dilate=stride)
        rows = dx[start:stop].reshape(-1, c)                        # (n*H*W, C)
        np.matmul(_patches(canvas, kh, kw, 1, h, width), turned, out=rows)
        if relu:
            rows *= x[start:stop].reshape(-1, c) > 0

    _pool.chunks(n, _chunk_size(n, h * width * len(turned) * dy.itemsize), work)
    return dx


def conv_backward_filter(x, dy, w_shape, stride=1, pad=0):
    """dw[p,q,c,f] = Σ_{n,i,j} x[n, i·stride+p-pad, j·stride+q-pad, c] · dy[n,i,j,f]; db = Σ dy.

    Returns dw (KH, KW, C, F) and db (F,).
    """
    oh, ow, f = dy.shape[1:]
    rows = int(np.prod(w_shape[:3]))
    size = _chunk_size(len(x), oh * ow * rows * x.itemsize, limit=2 * PATCH_BYTES)

    def partial(t):
        dw, db, product = None, np.zeros(f, x.dtype), None
        for start in range(t * size, len(x), _pool.count * size):
            stop = min(start + size, len(x))
            patches = _input_patches(x[start:stop], w_shape, stride, pad, oh, ow)
            d = dy[start:stop].reshape(-1, f)                       # (n*OH*OW, F)
            db += np.ones(len(d), d.dtype) @ d
            if dw is None:
                dw = patches.T @ d                                  # (KH*KW*C, F)
            else:
                product = np.matmul(patches.T, d, out=product)
                dw += product
        return dw, db

    parts = [part for part in _pool.run(partial) if part[0] is not None]
    dw, db = parts[0]
    for more_dw, more_db in parts[1:]:
        dw += more_dw
        db += more_db
    return dw.reshape(w_shape), db


# ---------------------------------------------------------------------------------- pooling

def pool_size(size, kernel, stride, pad, ceil):
    """Output pixels along one axis of a pooling; with `ceil` a last window may hang over."""
    spare = size + 2 * pad - kernel
    out = (-(-spare // stride) if ceil else spare // stride) + 1
    return out - 1 if ceil and (out - 1) * stride >= size + pad else out


def _taps(shape, out_shape, kernel, stride, pad):
    """For each of the window's pixels, in scan order: which outputs have it, and where it is."""
    def along(size, out, k):
        first = max(0, -(-(pad - k) // stride))                     # first window that has pixel k
        last = min(out, (size - 1 + pad - k) // stride + 1)
        start = first * stride + k - pad
        return slice(first, last), slice(start, start + (last - first - 1) * stride + 1, stride)

    found = []
    for p in range(kernel):
        for q in range(kernel):
            (oi, ii), (oj, ij) = along(shape[0], out_shape[0], p), along(shape[1], out_shape[1], q)
            if oi.stop > oi.start and oj.stop > oj.start:
                found.append(((slice(None), oi, oj), (slice(None), ii, ij)))
    return found


def _pool_shape(x, kernel, stride, pad, ceil):
    n, h, w, c = x.shape
    return n, pool_size(h, kernel, stride, pad, ceil), pool_size(w, kernel, stride, pad, ceil), c


def max_pool_forward(x, kernel, stride, pad=0, ceil=False, out=None):
    """y = maximum over each kernel×kernel window, pixels outside the image left out."""
    shape = _pool_shape(x, kernel, stride, pad, ceil)
    y = np.empty(shape, x.dtype) if out is None else out
    taps = _taps(x.shape[1:3], shape[1:3], kernel, stride, pad)

    def work(start, stop):
        part = y[start:stop]
        part[:] = -np.inf
        for outs, ins in taps:
            np.maximum(part[outs], x[start:stop][ins], out=part[outs])

    _pool.chunks(len(x), _chunk_size(len(x), x[0].nbytes, POOL_BYTES), work)
    return y


def max_pool_backward(dy, x, y, kernel, stride, pad=0, relu=False):
    """dx: each dy goes to its window's maximum, to the first in scan order where several tie.

    No mask was kept: the maximum is found again by comparing x with y. With `relu`, dx is
    multiplied by (x > 0).
    """
    dx = np.empty(x.shape, dy.dtype)
    taps = _taps(x.shape[1:3], y.shape[1:3], kernel, stride, pad)

    def work(start, stop):
        xs, ys, left, part = x[start:stop], y[start:stop], dy[start:stop].copy(), dx[start:stop]
        part[:] = 0
        for outs, ins in taps:
            given = left[outs] * (xs[ins] == ys[outs])
            part[ins] += given
            left[outs] -= given                 # exactly zero once it is given away
        if relu:
            part *= xs > 0

    _pool.chunks(len(x), _chunk_size(len(x), x[0].nbytes, POOL_BYTES), work)
    return dx


def avg_pool_forward(x, kernel, stride, pad=0, ceil=False, out=None):
    """y = mean over each kernel×kernel window, pixels outside the image left out."""
    shape = _pool_shape(x, kernel, stride, pad, ceil)
    y = np.empty(shape, x.dtype) if out is None else out
    y[:] = 0
    count = np.zeros((1, *shape[1:3], 1), x.dtype)
    for outs, ins in _taps(x.shape[1:3], shape[1:3], kernel, stride, pad):
        y[outs] += x[ins]
        count[outs] += 1
    y /= count
    return y


def avg_pool_backward(dy, x, kernel, stride, pad=0, relu=False):
    """dx: each dy is shared equally among its window's pixels."""
    dx = np.zeros(x.shape, dy.dtype)
    count = np.zeros((1, *dy.shape[1:3], 1), dy.dtype)
    taps = list(_taps(x.shape[1:3], dy.shape[1:3], kernel, stride, pad))
    for outs, _ in taps:
        count[outs] += 1
    share = dy / count
    for outs, ins in taps:
        dx[ins] += share[outs]
    if relu:
        dx *= x > 0
    return dx


# ------------------------------------------------------------------------- normalisation

def _window_sum(x, size):
    """Sum over the `size` channels around each one, cut off at the edges."""
    half = size // 2
    total = x.copy()
    for shift in range(1, min(half, x.shape[-1] - 1) + 1):
        total[..., shift:] += x[..., :-shift]
        total[..., :-shift] += x[..., shift:]
    return total


def lrn_forward(x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """y = x / (k + α Σ x²)^β, the sum over `size` neighbouring channels (size is odd)."""
    y = np.empty_like(x)

    def work(start, stop):
        part = x[start:stop]
        scale = k + alpha * _window_sum(part * part, size)
        np.multiply(part, scale ** -beta, out=y[start:stop])

    _pool.chunks(len(x), 1, work)
    return y


def lrn_backward(dy, x, size=5, k=2.0, alpha=1e-4, beta=0.75, relu=False):
    """dx_c = dy_c s_c^-β - 2αβ x_c Σ_{c' near c} dy_c' x_c' s_c'^(-β-1), with s = k + α Σ x²."""
    dx = np.empty_like(x)

    def work(start, stop):
        part, d = x[start:stop], dy[start:stop]
        scale = k + alpha * _window_sum(part * part, size)
        power = scale ** -beta
        near = _window_sum(d * part * power / scale, size)
        dx[start:stop] = d * power - 2 * alpha * beta * part * near
        if relu:
            dx[start:stop] *= part > 0

    _pool.chunks(len(x), 1, work)
    return dx


# ---------------------------------------------------------------------- dropout and photos

def philox(seed, counter, words):
    """`words` raw 64-bit numbers of Philox4x64-10: a pure function of the seed and the counter.

    counter: (block, step, layer or attempt, stream); the numbers of block c are the first four.
    """
    block, step, layer, stream = counter
    number = block | step << 64 | layer << 128 | stream << 192
    before = (number - 1) % 2**256                                  # NumPy counts before it draws
    return np.random.Philox(counter=before, key=seed).random_raw(words)


def add(y, x):
    """y += x, in place and in chunks; returns y."""
    flat_y, flat_x = y.reshape(-1), x.reshape(-1)

    def work(start, stop):
        flat_y[start:stop] += flat_x[start:stop]

    _pool.chunks(y.size, FLAT_CHUNK, work)
    return y


def add_bias(y, b, relu=False):
    """y[m, e] += b[e], in place, then with `relu` max(y, 0)."""
    y += b
    return np.maximum(y, 0, out=y) if relu else y


def relu_backward(dy, x, out=None):
    """dx = dy · (x > 0), into `out` (which may be dy) if given."""
    return np.multiply(dy, x > 0, out=out)


def column_sums(x):
    """y[e] = Σ x[…, e], over all axes but the last."""
    return x.reshape(-1, x.shape[-1]).sum(axis=0)


def dropout(x, rate, seed, step, layer, row=0, relu=None):
    """y = x · mask / (1 - rate); the same call on dy gives dx, for the mask is drawn again.

    x (N, E). Element (n, e) of global row `row`+n takes 16 bits, lane e of Philox counters
    ((row+n)·⌈E/16⌉ + ⌊e/16⌋, step, layer, stream 1) and is kept if they are at least rate·2^16.
    relu: the array whose ReLU gave the layer's input, to multiply dx by (relu > 0).
    """
    n, e = x.shape
    blocks = -(-e // LANES)
    raw = philox(seed, (row * blocks, step, layer, 1), n * blocks * 4)
    lanes = raw.view(np.uint16).reshape(n, blocks * LANES)[:, :e]   # little-endian lanes
    keep = lanes >= round(rate * 65536)
    if relu is not None:
        keep &= relu > 0
    return x * (keep * x.dtype.type(1 / (1 - rate)))


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

    _pool.chunks(len(photos), 8, work)
    return y


# --------------------------------------------------------------------- products and losses

def matmul(a, b, out=None):
    """a b, (M, D) times (D, E); the longer side of the result is shared among the threads."""
    m, e = a.shape[0], b.shape[1]
    y = np.empty((m, e), np.result_type(a, b)) if out is None else out
    size = -(-max(m, e) // _pool.count)

    def work(start, stop):
        if m >= e:
            np.matmul(a[start:stop], b, out=y[start:stop])
        else:
            np.matmul(a, b[:, start:stop], out=y[:, start:stop])

    _pool.chunks(max(m, e), size, work)
    return y


def _positives(targets):
    """Row and column of each target: targets int32 (N, T), padded with -1."""
    rows, slots = np.nonzero(targets >= 0)
    return rows, targets[rows, slots]


def softmax_loss(s, targets, weights, shift=None):
    """ℓ = - Σ_n weights[n] Σ_{k in targets[n]} log p_nk, with p_nk = exp s_nk / Σ_k' exp s_nk'.

    The multi-class logistic loss (eq. 2 with weights 1/N). s (N, K) becomes the gradient,
    ∂ℓ/∂s_nk = weights[n] (|targets[n]| p_nk - [k in targets[n]]), since ∂ log Σ exp s / ∂s_k = p_k.
    targets int32 (N, T), padded with -1; weights (N,), zero for a row that does not count.
    shift (K,), if given, is added to the scores of all but a row's targets: the logarithm of how
    many classes each of them stands for. Returns ℓ as a float and the gradient, in s's memory.
    """
    rows, words = _positives(targets)
    count = np.bincount(rows, minlength=len(s)).astype(s.dtype)     # |targets[n]|
    if shift is not None:
        s += shift.astype(s.dtype)
        s[rows, words] -= shift[words].astype(s.dtype)
    s -= s.max(axis=1, keepdims=True)                               # exp cannot overflow
    picked = s[rows, words].astype(np.float64)                      # s_nk - max
    np.exp(s, out=s)
    total = s.sum(axis=1, keepdims=True)                            # (N, 1), at least 1
    log_p = picked - np.log(total[rows, 0])
    s *= (weights * count)[:, None].astype(s.dtype) / total
    s[rows, words] -= weights[rows].astype(s.dtype)
    return float((weights[rows] * log_p).sum() * -1), s


def one_vs_all_loss(s, targets, weights, positive, negative):
    """ℓ = - Σ_nk weights[n] (y_nk positive[k] log σ(s_nk) + (1-y_nk) negative[k] log(1-σ(s_nk))).

    The one-versus-all logistic loss (eq. 1 with positive 1/N_k and negative 1/(N - N_k)); y_nk
    says whether k is in targets[n]. s (N, K) becomes the gradient, weights[n] times
    negative[k] σ(s) for y = 0 and -positive[k] σ(-s) for y = 1, since ∂ log(1 + exp s) / ∂s = σ(s).
    Arguments as in softmax_loss; positive, negative (K,). Returns ℓ and the gradient.
    """
    rows, words = _positives(targets)
    s[rows, words] *= -1                        # both terms are now log(1 + exp s)
    scale = weights[:, None].astype(s.dtype) * negative.astype(s.dtype)             # (N, K)
    scale[rows, words] = weights[rows] * positive[words]
    small = np.exp(-np.abs(s))                                      # in (0, 1]: no overflow
    loss = (scale * (np.maximum(s, 0) + np.log1p(small))).sum(dtype=np.float64)
    np.divide(np.where(s > 0, 1, small), 1 + small, out=s)          # σ(s)
    s *= scale
    s[rows, words] *= -1
    return float(loss), s


def sgd(w, v, dw, rate, momentum, decay):
    """v ← momentum·v + dw + decay·w, then w ← w - rate·v, in place and in one pass."""
    flat_w, flat_v, flat_dw = w.reshape(-1), v.reshape(-1), dw.reshape(-1)
    rate, momentum, decay = (w.dtype.type(number) for number in (rate, momentum, decay))

    def work(start, stop):
        part_w, part_v = flat_w[start:stop], flat_v[start:stop]
        part_v *= momentum
        part_v += flat_dw[start:stop]
        if decay:
            part_v += decay * part_w
        part_w -= rate * part_v

    _pool.chunks(w.size, FLAT_CHUNK, work)


def sgd_rows(w, v, dw, rows, rate, momentum, decay):
    """The same on w[rows] and v[rows], with dw (R, …); no row twice. All other rows stay."""
    part_w, part_v = w[rows], v[rows]                               # copies, (R, E)
    sgd(part_w, part_v, dw, rate, momentum, decay)
    w[rows], v[rows] = part_w, part_v


def take_rows(w, rows):
    """w[rows], (R, …)."""
    return w[rows]


def to_device(x):
    """x itself: it is where this device computes."""
    return np.asarray(x)


def to_host(x):
    """x as a NumPy array."""
    return np.asarray(x)
