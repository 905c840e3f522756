"""Every operation in plain NumPy: the specification, and the place to read what each one computes.

Nothing here is about speed. cpu.py and gpu.py have functions of the same names and arguments that
are fast; the tests compare them with these. Images are NHWC and filters (KH, KW, C, F); the axis
letters are defined at the top of model.py. Any dtype will do: training uses float32, the checks of
gradients float64. No operation changes its arguments, except `sgd`, which is there to do so.
"""
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .philox import DRAWS, DROPOUT, philox

LANES = 16                  # dropout takes 16 numbers of 16 bits from one Philox block


# ------------------------------------------------------------------------------ convolution

def ceil_div(a, b):
    """⌈a / b⌉ of whole numbers."""
    return -(-a // b)


def output_size(size, kernel, stride, pad=0, ceil=False):
    """Output pixels along one axis; with `ceil` a last window may hang over the edge."""
    spare = size + 2 * pad - kernel
    if not ceil:
        return spare // stride + 1
    out = ceil_div(spare, stride) + 1
    starts_outside = (out - 1) * stride >= size + pad
    return out - 1 if starts_outside else out


def _patches(x, kh, kw, stride, pad):
    """What each output pixel sees of x: (N, OH, OW, KH, KW, C), a view of x with a zero border."""
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = sliding_window_view(padded, (kh, kw), axis=(1, 2))    # (N, …, …, C, KH, KW)
    return windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def conv_forward(x, w, b, stride=1, pad=0, relu=False):
    """y[n,i,j,f] = b[f] + Σ_{p,q,c} x[n, i·stride+p-pad, j·stride+q-pad, c] · w[p,q,c,f].

    x (N, H, W, C), w (KH, KW, C, F), b (F,) -> (N, OH, OW, F). With `relu`, max(y, 0).
    """
    kh, kw, _, _ = w.shape
    patches = _patches(x, kh, kw, stride, pad)                      # (N, OH, OW, KH, KW, C)
    y = np.tensordot(patches, w, axes=3) + b                        # (N, OH, OW, F)
    return np.maximum(y, 0) if relu else y


def conv_backward_input(dy, w, x_shape, stride=1, pad=0):
    """dx[n,i,j,c] = Σ dy[n,i',j',f] · w[p,q,c,f] over i'·stride+p-pad = i, j'·stride+q-pad = j.

    dy (N, OH, OW, F), w (KH, KW, C, F) -> (N, H, W, C), which is x_shape.
    """
    n, h, width, c = x_shape
    kh, kw, _, _ = w.shape
    _, oh, ow, _ = dy.shape
    dx = np.zeros((n, h + 2 * pad, width + 2 * pad, c), dy.dtype)   # with the border
    for p, q in np.ndindex(kh, kw):
        # y[n,i,j] has x[n, i·stride+p, j·stride+q] w[p,q] in it, so that pixel gets dy w[p,q]ᵀ
        rows = slice(p, p + stride * oh, stride)
        columns = slice(q, q + stride * ow, stride)
        dx[:, rows, columns] += dy @ w[p, q].T                      # (N, OH, OW, C)
    return dx[:, pad:pad + h, pad:pad + width].copy()


def conv_backward_filter(x, dy, w_shape, stride=1, pad=0):
    """dw[p,q,c,f] = Σ_{n,i,j} x[n, i·stride+p-pad, j·stride+q-pad, c] · dy[n,i,j,f]; db = Σ dy.

    x (N, H, W, C), dy (N, OH, OW, F) -> dw (KH, KW, C, F), which is w_shape, and db (F,).
    """
    kh, kw, _, _ = w_shape
    patches = _patches(x, kh, kw, stride, pad)                      # (N, OH, OW, KH, KW, C)
    pixels = (0, 1, 2)
    dw = np.tensordot(patches, dy, axes=(pixels, pixels))           # (KH, KW, C, F)
    return dw, dy.sum(axis=pixels)


def relu_backward(dy, y):
    """dx = dy where y > 0, else 0: the derivative of y = max(x, 0)."""
    return np.where(y > 0, dy, 0).astype(dy.dtype)


# ---------------------------------------------------------------------------------- pooling

def _window(index, kernel, stride, pad):
    """First pixel of window `index` along one axis, and its pixels inside the image, a slice."""
    first = index * stride - pad
    return first, slice(max(0, first), first + kernel)


def max_pool_forward(x, kernel, stride, pad=0, ceil=False):
    """y = maximum over each kernel×kernel window, pixels outside the image left out; and argmax.

    x (N, H, W, C) -> y and argmax, uint8, both (N, OH, OW, C). With `ceil` the last window may
    hang over the edge. argmax is the maximum's place p·kernel + q in its window, the first of
    several; kernel is at most 15. Where a window has a NaN, y is NaN, and argmax is any place.
    """
    n, h, w, c = x.shape
    oh = output_size(h, kernel, stride, pad, ceil)
    ow = output_size(w, kernel, stride, pad, ceil)
    y = np.empty((n, oh, ow, c), x.dtype)
    argmax = np.empty((n, oh, ow, c), np.uint8)
    for i, j in np.ndindex(oh, ow):
        top, rows = _window(i, kernel, stride, pad)
        left, columns = _window(j, kernel, stride, pad)
        window = x[:, rows, columns]                                # at most kernel×kernel pixels
        y[:, i, j] = window.max(axis=(1, 2))
        flat = window.reshape(n, -1, c).argmax(axis=1)              # (N, C)
        p, q = np.divmod(flat, window.shape[2])
        argmax[:, i, j] = (p + rows.start - top) * kernel + q + columns.start - left
    return y, argmax


def max_pool_backward(dy, argmax, x_shape, kernel, stride, pad=0):
    """dx (N, H, W, C), which is x_shape: each dy goes to the pixel that was its maximum."""
    dx = np.zeros(x_shape, dy.dtype)
    images = np.arange(x_shape[0])[:, None]                         # (N, 1)
    channels = np.arange(x_shape[3])                                # (C,)
    for i, j in np.ndindex(*dy.shape[1:3]):
        p, q = np.divmod(argmax[:, i, j].astype(int), kernel)       # (N, C)
        dx[images, i * stride - pad + p, j * stride - pad + q, channels] += dy[:, i, j]
    return dx


def avg_pool_forward(x, kernel, stride):
    """y = mean over each kernel×kernel window, all of which lie inside the image.

    x (N, H, W, C) -> (N, OH, OW, C).
    """
    n, h, w, c = x.shape
    y = np.empty((n, output_size(h, kernel, stride), output_size(w, kernel, stride), c), x.dtype)
    for i, j in np.ndindex(*y.shape[1:3]):
        _, rows = _window(i, kernel, stride, 0)
        _, columns = _window(j, kernel, stride, 0)
        y[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    return y


def avg_pool_backward(dy, x_shape, kernel, stride):
    """dx (N, H, W, C), which is x_shape: each dy is shared equally among its window's pixels."""
    dx = np.zeros(x_shape, dy.dtype)
    for i, j in np.ndindex(*dy.shape[1:3]):
        _, rows = _window(i, kernel, stride, 0)
        _, columns = _window(j, kernel, stride, 0)
        dx[:, rows, columns] += dy[:, i, j][:, None, None] / kernel**2
    return dx


# ---------------------------------------------------------------------------- normalisation

def _window_sum(x, size):
    """Sum over the `size` channels around each channel, cut off at the edges (size is odd)."""
    border = [(0, 0)] * (x.ndim - 1) + [(size // 2, size // 2)]
    return sliding_window_view(np.pad(x, border), size, axis=-1).sum(axis=-1)


def lrn_forward(x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """y = x s^-β with s = k + α Σ x², the sum over `size` neighbouring channels (size is odd).

    x (..., C) -> y like x.
    """
    s = k + alpha * _window_sum(x * x, size)
    return x * s ** -beta


def lrn_backward(dy, x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """dx_c = dy_c s_c^-β - 2αβ x_c Σ_{c' near c} dy_c' x_c' s_c'^(-β-1).

    Since ∂s_c'/∂x_c = 2α x_c for each c' near c, and c is near c' when c' is near c.
    """
    s = k + alpha * _window_sum(x * x, size)
    through_s = _window_sum(dy * x * s ** (-beta - 1), size)
    return dy * s ** -beta - 2 * alpha * beta * x * through_s


# ------------------------------------------------------------------ products, sums and dropout

def matmul(a, b, bias=None, relu=False):
    """y = a b + bias, with `relu` max(y, 0): (M, D) times (D, E) -> (M, E); bias (E,)."""
    y = a @ b                                                       # (M, E)
    if bias is not None:
        y = y + bias
    return np.maximum(y, 0) if relu else y


def sum_gradients(terms):
    """Σ terms, up to four arrays of one shape: where several layers read x, dx adds up."""
    total = terms[0].copy()
    for term in terms[1:]:
        total += term
    return total


def dropout(x, rate, seed, step, mask_id, row=0):
    """y = x · mask / (1 - rate); the same call on dy gives dx, for the mask is drawn again.

    x (N, E). Element (n, e) of global row `row`+n takes 16 bits, lane e mod 16 of the block at
    Philox counter ((row+n)·⌈E/16⌉ + ⌊e/16⌋, step, mask_id, DROPOUT), and is kept if they are at
    least rate·2^16.
    """
    n, e = x.shape
    blocks = ceil_div(e, LANES)                                     # of a row
    raw = philox(seed, (row * blocks, step, mask_id, DROPOUT)).random_raw(n * blocks * 4)
    lanes = raw.view(np.uint16).reshape(n, blocks * LANES)[:, :e]   # little-endian lanes
    kept = lanes >= round(rate * 65536)
    return x * (kept * x.dtype.type(1 / (1 - rate)))


# ------------------------------------------------------------------------ photos and sampling

def prepare(photos, top, left, flip, crop):
    """Crop, mirror and normalise photos: (x - mean) / deviation, one mean per photo (paper, §3).

    photos uint8 (N, S, S, 3); top, left (N,) int; flip (N,) bool -> float32 (N, crop, crop, 3).
    The deviation counts as at least 1/255 of the range, so a blank photo gives zeros and no NaN.
    """
    x = np.empty((len(photos), crop, crop, 3), np.float32)
    for n in range(len(photos)):
        pixels = photos[n, top[n]:top[n] + crop, left[n]:left[n] + crop].astype(np.float32)
        pixels -= pixels.mean()
        deviation = np.sqrt(np.vdot(pixels, pixels) / pixels.size)
        if flip[n]:
            pixels = pixels[:, ::-1]
        x[n] = pixels / max(deviation, 1)
    return x


def below(raw, n):
    """⌊raw · n / 2^64⌋: uniform numbers below n from 64 random bits, without a bias to speak of.

    raw uint64; n is below 2^32. The product has 96 bits, so raw is split into two halves.
    """
    n = np.asarray(n, np.uint64)
    high = (raw >> np.uint64(32)) * n
    low = (raw & np.uint64(0xFFFFFFFF)) * n                         # raw · n = high · 2^32 + low
    return ((high + (low >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)


def crops_of(bits, spare):
    """top, left int32 from 0 to `spare`, and flip, of random crops, out of 33 random bits each."""
    top = ((bits & np.uint64(0xFFFF)) * np.uint64(spare + 1)) >> np.uint64(16)
    left = ((bits >> np.uint64(16) & np.uint64(0xFFFF)) * np.uint64(spare + 1)) >> np.uint64(16)
    flip = (bits >> np.uint64(32) & np.uint64(1)).astype(bool)
    return top.astype(np.int32), left.astype(np.int32), flip


def sample_by_class(class_photos, class_ends, spare, seed, step, steps, count):
    """Per-class uniform sampling (paper, §3): a word uniformly, then one of its photos uniformly.

    class_photos: the photos of word 0, then those of word 1, …; word k's end at class_ends[k].
    `count` rows for each of `steps` steps from `step` on; row i of step t takes the block of Philox
    counter (i, t, 0, DRAWS): a word, a photo, a crop and a flip. Returns words int32, photos
    int64, top and left int32, from 0 to `spare`, and flip, each (steps, count).
    """
    raw = np.empty((steps, count, 4), np.uint64)
    for t in range(steps):
        block = philox(seed, (0, step + t, 0, DRAWS)).random_raw(4 * count)
        raw[t] = block.reshape(count, 4)
    words = below(raw[..., 0], len(class_ends))                     # (steps, count)
    starts = np.append(0, class_ends[:-1])[words]
    photos = class_photos[starts + below(raw[..., 1], class_ends[words] - starts)]
    return words.astype(np.int32), photos.astype(np.int64), *crops_of(raw[..., 2], spare)


# ------------------------------------------------------------------------ losses and update

def softmax_loss(s, targets, weights, shift=None):
    """ℓ = - Σ_n Σ_t weights[n,t] log p_nk, with k = targets[n,t], p_nk = exp s_nk / Σ_k' exp s_nk'.

    The multi-class logistic loss (eq. 2 with weights 1/N). ∂ℓ/∂s_nk = (Σ_t weights[n,t]) p_nk, less
    weights[n,t] for a target, since ∂ log Σ exp s / ∂s_k = p_k. s (N, K); targets int32 (N, T), no
    class twice in a row, padded with -1; weights (N, T), zero for a row that does not count. shift
    (K,), if given, is added to the scores of all but a row's targets: the logarithm of how many
    classes each of them stands for. Returns each row's part of ℓ, (N,) float64, and the gradient
    (N, K).
    """
    rows, slots = np.nonzero(targets >= 0)
    words = targets[rows, slots]                                    # the classes of all targets
    weights = np.asarray(weights)[rows, slots]
    if shift is not None:
        own = s[rows, words]
        s = s + shift.astype(s.dtype)
        s[rows, words] = own
    s = s - s.max(axis=1, keepdims=True)                            # exp cannot overflow
    exps = np.exp(s)
    total = exps.sum(axis=1, keepdims=True)                         # (N, 1), at least 1
    log_p = s[rows, words].astype(np.float64) - np.log(total[rows, 0])
    losses = np.bincount(rows, -weights * log_p, len(s))            # (N,)
    row_weights = np.bincount(rows, weights, len(s))[:, None]       # (N, 1)
    ds = exps * (row_weights / total).astype(s.dtype)
    ds[rows, words] -= weights.astype(s.dtype)
    return losses, ds


def one_vs_all_loss(s, targets, weights, positive, negative):
    """ℓ = - Σ_nk weights[n] (y_nk positive[k] log σ(s_nk) + (1-y_nk) negative[k] log(1-σ(s_nk))).

    The one-versus-all logistic loss (eq. 1 with positive 1/N_k and negative 1/(N - N_k)); y_nk
    says whether k is in targets[n]. With z = -s where y = 1 and z = s elsewhere each term is
    log(1 + exp z), and ∂ log(1 + exp z) / ∂z = σ(z). positive, negative (K,), weights (N,); the
    rest, and what is returned, as in softmax_loss.
    """
    carried = np.zeros(s.shape, bool)                               # y
    rows, slots = np.nonzero(targets >= 0)
    carried[rows, targets[rows, slots]] = True
    scale = (weights[:, None] * np.where(carried, positive, negative)).astype(s.dtype)
    z = np.where(carried, -s, s)
    small = np.exp(-np.abs(z))                                      # in (0, 1]: no overflow
    softplus = np.maximum(z, 0) + np.log1p(small)                   # log(1 + exp z)
    sigmoid = np.where(z > 0, 1, small) / (1 + small)               # σ(z)
    losses = (scale * softplus).sum(axis=1, dtype=np.float64)
    return losses, scale * np.where(carried, -sigmoid, sigmoid)


def sgd(w, v, dw, rate, momentum, decay, rows=None):
    """v ← momentum·v + dw + decay·w, then w ← w - rate·v, in place.

    With rows (R,), none twice, only w[rows] and v[rows] move, by dw (R, …); all others stay.
    """
    moving = ... if rows is None else rows
    v[moving] = momentum * v[moving] + dw + decay * w[moving]
    w[moving] -= rate * v[moving]


# ----------------------------------------------------------------------------------- arrays

def to_device(x):
    """x, in C's order, where this device computes: on the CPU x itself if that is so already."""
    return np.asarray(x, order="C")


def to_host(x):
    """x, an array of this device, as a NumPy array."""
    return np.asarray(x)


def host_empty(shape):
    """Memory of the host for photos, uint8, from which `prepare` reads them best."""
    return np.empty(shape, np.uint8)


def memory():
    """Free bytes of the device's own memory; None on the CPU."""
    return None
