"""The operations of reference.py, as two cores compute them fast.

Same names and arguments; what each operation computes is said there, and only how it is done here.
What profits little *is* the reference's function: see the import.

Speed comes from four things. Worker threads each take chunks of images, with single-threaded BLAS.
A chunk is a few images, so that what is made of them stays in the cache. In NHWC a patch is KH
contiguous runs of KW*C numbers, so that copying the patches out costs little. And Winograd's
algorithm takes fewer products for 3×3 and 5×5 filters. Chunks belong to threads by number and
partial sums are added in a fixed order, so on one machine the bits of a result depend on the number
of threads alone.
"""
import ctypes
import functools
import glob
import os
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
from numpy.lib.stride_tricks import as_strided

from . import reference
from .reference import (  # noqa: F401: these are operations of this device, too
    avg_pool_backward, avg_pool_forward, ceil_div, dropout, host_empty, memory, one_vs_all_loss,
    output_size, prepare, sample_by_class, softmax_loss, to_device, to_host)

PATCH_BYTES = 2 << 20       # patches one thread multiplies at a time: they stay in the cache
TILE_BYTES = 1 << 20        # the same of the tiles that Winograd's algorithm multiplies
POOL_BYTES = 4 << 20        # images one thread pools at a time: with fewer, Python is the limit
FLAT_CHUNK = 1 << 18        # numbers per chunk of an elementwise pass: they stay in the cache


# ---------------------------------------------------------------------------------- threads

BLAS_SETTERS = ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads",
                "openblas_set_num_threads64_", "openblas_set_num_threads")


def _set_blas_threads(count):
    """Set the threads of NumPy's own OpenBLAS, and of SciPy's; False if NumPy carries another."""
    packages = os.path.dirname(os.path.dirname(np.__file__))
    is_set = {"numpy": False, "scipy": False}
    for package in is_set:
        for path in glob.glob(f"{glob.escape(packages)}/{package}.libs/*openblas*"):
            library = ctypes.CDLL(path)
            for name in BLAS_SETTERS:
                if hasattr(library, name):
                    getattr(library, name)(ctypes.c_int(count))
                    is_set[package] = True
    return is_set["numpy"]


def _keep_freed_memory():
    """Let arrays that are freed stay with the process, where the C library can be told so.

    By default each large array is given back at once, and the next one costs a page fault for
    every 4 KB. That is a tenth of a step of `alexnet`, whose largest gradient has 151 MB.
    """
    m_trim_threshold = -1                                           # the names in malloc.h
    m_mmap_threshold = -3
    largest_int = (1 << 31) - 1                                     # bytes, as is the next
    larger_than_any_array = 1 << 30
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(m_mmap_threshold, larger_than_any_array)
        library.mallopt(m_trim_threshold, largest_int)


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):        # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Threads:
    """The worker threads, each with single-threaded BLAS; they start when first needed."""

    def __init__(self):
        self._count = None
        self._executor = None

    def start(self, count):
        """Use so many from now on; another count may change the last bits of sums."""
        _keep_freed_memory()
        if not _set_blas_threads(1):
            count = 1                           # BLAS has threads of its own: do not fight them
        self._count = count
        self._executor = ThreadPoolExecutor(max(1, count - 1))

    @property
    def count(self):
        """The number of threads in use."""
        if self._count is None:
            self.start(cores())
        return self._count

    def share(self, work, items):
        """[work(items of a thread)] of all threads in order; the t-th takes items[t::count]."""
        first, *others = [items[t::self.count] for t in range(self.count)]
        futures = [self._executor.submit(work, share) for share in others]
        try:
            # this thread works, too: to wake one costs 0.1 ms, and to wait for it as much again
            result = work(first)
            return [result] + [future.result() for future in futures]
        except BaseException:
            wait(futures)                       # who catches it finds no array still written to
            raise

    def chunks(self, n, size, work):
        """work(start, stop) on chunks of range(n), shared among the threads."""
        def work_on(starts):
            for start in starts:
                work(start, min(start + size, n))

        if n <= size:
            work_on(range(0, n, size))          # not worth another thread
        else:
            self.share(work_on, range(0, n, size))


threads = Threads()


def _chunk_size(n, bytes_each, limit=PATCH_BYTES):
    """Images a chunk: within the cache, and the threads' shares of equal size."""
    share = ceil_div(n, threads.count)                              # of a thread
    most = max(1, min(share, int(limit) // max(1, bytes_each)))
    chunks = ceil_div(share, most)
    return ceil_div(share, chunks)


# ---------------------------------------------------------------------- convolution by patches

def _embed(x, top, left, shape, dilate=1):
    """x (n, H, W, C) on a zero canvas (n, *shape, C): x[:, i, j] at (top + i·dilate, left + …).

    What would lie outside the canvas is left out; top and left may be negative.
    """
    cut_i = max(0, -top)
    cut_j = max(0, -left)
    canvas = np.zeros((len(x), shape[0] + cut_i, shape[1] + cut_j, x.shape[3]), x.dtype)
    inner = canvas[:, top + cut_i::dilate, left + cut_j::dilate]
    inner = inner[:, :x.shape[1], :x.shape[2]]
    inner[:] = x[:, :inner.shape[1], :inner.shape[2]]
    return canvas[:, cut_i:, cut_j:]


def _patches(x, w_shape, stride, pad, oh, ow):
    """What each output pixel sees of x, one patch a row: (n*OH*OW, KH*KW*C)."""
    kh, kw, c, _ = w_shape
    if (kh, kw, stride, pad) == (1, 1, 1, 0):
        return x.reshape(-1, c)                                     # (n*H*W, C), no copy
    if pad or not x.flags.c_contiguous:
        x = _embed(x, pad, pad, ((oh - 1) * stride + kh, (ow - 1) * stride + kw))
    sn, sh, sw, item = x.strides
    view = as_strided(x, (len(x), oh, ow, kh, kw * c), (sn, sh * stride, sw * stride, sh, item))
    # NumPy copies item by item, so each run of KW*C numbers becomes one item
    run = np.dtype((np.void, kw * c * x.itemsize))
    runs = np.ascontiguousarray(view.view(run))
    return runs.view(x.dtype).reshape(-1, kh * kw * c)


def _patch_product(w, y_shape, stride, pad):
    """multiply(x, y), which writes y = x * w for some images, and how many to give it at a time."""
    n, oh, ow, f = y_shape
    flat = w.reshape(-1, f)                                         # (KH*KW*C, F)

    def multiply(x, y):
        patches = _patches(x, w.shape, stride, pad, oh, ow)
        np.matmul(patches, flat, out=y.reshape(-1, f))              # (n*OH*OW, F), a view of y

    return multiply, _chunk_size(n, oh * ow * len(flat) * w.itemsize)


def _sum_of_products(n, size, operands):
    """Σ leftᵀ right over chunks of images, where operands(start, stop) gives left and right.

    Each thread adds its own chunks, and then the threads' sums are added in the threads' order.
    """
    def add_up(starts):
        total = None
        product = None                                              # memory that is used again
        for start in starts:
            left, right = operands(start, min(start + size, n))
            if total is None:
                total = np.matmul(left.swapaxes(-1, -2), right)
            else:
                product = np.matmul(left.swapaxes(-1, -2), right, out=product)
                total += product
        return total

    sums = threads.share(add_up, range(0, n, size))
    return functools.reduce(np.add, [total for total in sums if total is not None])


def _filter_by_patches(x, dy, w_shape, stride, pad):
    """dw as the product of the patches, transposed, and dy."""
    n, oh, ow, f = dy.shape
    row = int(np.prod(w_shape[:3])) * x.itemsize                    # bytes of a patch
    # each chunk adds a product as large as dw, so the patches should be large beside it
    limit = np.clip(16 * row * f, PATCH_BYTES, 9 * PATCH_BYTES)

    def operands(start, stop):
        patches = _patches(x[start:stop], w_shape, stride, pad, oh, ow)
        return patches, dy[start:stop].reshape(-1, f)               # (n*OH*OW, KH*KW*C), (…, F)

    return _sum_of_products(n, _chunk_size(n, oh * ow * row, limit), operands)


def _column_sums(dy):
    """Σ over all pixels of dy (N, OH, OW, F): (F,). A product with ones is faster than a sum."""
    pixels = dy.reshape(-1, dy.shape[3])                            # (N*OH*OW, F)
    return np.ones(len(pixels), dy.dtype) @ pixels


# --------------------------------------------------------- convolution by Winograd's algorithm
# F(4×4, r×r) (Lavin and Gray 2016, §4): 4×4 numbers of y = x * w come from a tile d of s×s numbers
# of x, s = r + 3, by s² products instead of 16 r²: a quarter for r = 3, 4/25 for r = 5. It
# multiplies polynomials by their values at s points, of which the last is ∞:
# y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ d B)] A. The transformations are products, too: Bᵀ d B is (Bᵀ ⊗ Bᵀ) d
# with the numbers of d in a column.

TILE = 4                                        # pixels of a tile of y, along a side
POINTS = {3: (0, 1, -1, 2, -2),                 # the finite ones, by r
          5: (0, 1, -1, 2, -2, 0.5, -0.5)}
FEWEST_CHANNELS = {3: 16, 5: 24}                # by r: fewer do not pay for the transformations


def _powers(points, count):
    """The points' powers 0 … count - 1, a row each; ∞ has only the last: (s, count)."""
    finite = np.vander(points, count, increasing=True)
    return np.vstack([finite, np.eye(count)[-1]])


def _input_matrix(points):
    """Bᵀ ⊗ Bᵀ, (s², s²). Row i of Bᵀ has the coefficients of Π_{j≠i} (t - point_j)."""
    rows = [np.poly(np.delete(points, i))[::-1] for i in range(len(points))]
    rows = np.pad(rows, [(0, 0), (0, 1)])                           # the highest power is ∞'s alone
    b_transposed = np.vstack([rows, np.poly(points)[::-1]])         # (s, s)
    return np.kron(b_transposed, b_transposed)


def _filter_matrix(points, r):
    """G ⊗ G, (s², r²). Row i of G has the powers of point i, over Π_{j≠i} (point_i - point_j)."""
    g = _powers(points, r).astype(float)
    for i, point in enumerate(points):
        g[i] /= np.prod(point - np.delete(points, i))
    return np.kron(g, g)


def _output_matrix(points):
    """Aᵀ ⊗ Aᵀ, (16, s²)."""
    a_transposed = _powers(points, TILE).T
    return np.kron(a_transposed, a_transposed)


INPUT_MATRIX = {r: _input_matrix(points) for r, points in POINTS.items()}
FILTER_MATRIX = {r: _filter_matrix(points, r) for r, points in POINTS.items()}
OUTPUT_MATRIX = {r: _output_matrix(points) for r, points in POINTS.items()}


def _keeps_size(kh, kw, stride, pad):
    """Whether a convolution's output has the height and width of its input."""
    return stride == 1 and kh == kw and 2 * pad == kh - 1


def _is_winograd(w_shape, stride, pad):
    """Whether Winograd's algorithm applies, and is faster."""
    kh, kw, c, f = w_shape
    if not _keeps_size(kh, kw, stride, pad):
        return False
    return kh in FEWEST_CHANNELS and min(c, f) >= FEWEST_CHANNELS[kh]


def _tiles_chunk(w_shape, y_shape, itemsize):
    """Images a chunk: their tiles are as large as the filters that it reads, up to 8 MB."""
    r, _, c, f = w_shape
    n, oh, ow, _ = y_shape
    tiles = ceil_div(oh, TILE) * ceil_div(ow, TILE)                     # of an image
    products = len(INPUT_MATRIX[r])                                     # of a tile
    filters = products * c * f * itemsize
    limit = np.clip(filters, TILE_BYTES, 8 * TILE_BYTES)
    return _chunk_size(n, products * tiles * max(c, f) * itemsize, limit)


def _transform(matrix, x, size, pad):
    """Tiles of size×size pixels of x, TILE apart, by a matrix (s², size²): (s², n·tiles, C)."""
    n, h, w, c = x.shape
    rows = ceil_div(h, TILE)
    columns = ceil_div(w, TILE)
    x = _embed(x, pad, pad, (TILE * (rows - 1) + size, TILE * (columns - 1) + size))
    sn, sh, sw, item = x.strides
    tiles = as_strided(x, (size, size, n, rows, columns, c),
                       (sh, sw, sn, TILE * sh, TILE * sw, item))
    transformed = matrix.astype(x.dtype) @ tiles.reshape(size * size, -1)
    return transformed.reshape(len(matrix), -1, c)


def _tile_product(w, y_shape, pad):
    """As _patch_product."""
    r, _, c, f = w.shape
    _, oh, ow, _ = y_shape
    rows = ceil_div(oh, TILE)
    columns = ceil_div(ow, TILE)
    filters = FILTER_MATRIX[r].astype(w.dtype) @ w.reshape(r * r, -1)
    filters = filters.reshape(-1, c, f)                             # (s², C, F)
    output = OUTPUT_MATRIX[r].astype(w.dtype)                       # (16, s²)

    def multiply(x, y):
        products = np.matmul(_transform(INPUT_MATRIX[r], x, r + TILE - 1, pad), filters)
        tiles = output @ products.reshape(len(products), -1)        # (16, n·tiles·F)
        tiles = tiles.reshape(TILE, TILE, len(x), rows, columns, f)
        pixels = tiles.transpose(2, 3, 0, 4, 1, 5)                  # (n, rows, 4, columns, 4, F)
        y[:] = pixels.reshape(len(x), TILE * rows, TILE * columns, f)[:, :oh, :ow]

    return multiply, _tiles_chunk(w.shape, y_shape, w.itemsize)


def _filter_by_tiles(x, dy, w_shape, pad):
    """dw = Gᵀ [(Bᵀ x B) ⊙ (A dy Aᵀ)] G, summed over the tiles."""
    r, _, c, f = w_shape

    def operands(start, stop):
        left = _transform(INPUT_MATRIX[r], x[start:stop], r + TILE - 1, pad)
        right = _transform(OUTPUT_MATRIX[r].T, dy[start:stop], TILE, 0)
        return left, right                                          # (s², n·tiles, C), (…, F)

    size = _tiles_chunk(w_shape, dy.shape, x.itemsize)
    total = _sum_of_products(len(x), size, operands)                # (s², C, F)
    return FILTER_MATRIX[r].T.astype(x.dtype) @ total.reshape(-1, c * f)


# ------------------------------------------------------------------- convolution, by either

def _product(w, y_shape, stride, pad):
    """multiply(x, y) by the faster algorithm, and how many images to give it at a time."""
    if _is_winograd(w.shape, stride, pad):
        return _tile_product(w, y_shape, pad)
    return _patch_product(w, y_shape, stride, pad)


def conv_forward(x, w, b, stride=1, pad=0, relu=False):
    """Bias and ReLU are applied to a chunk while it is in the cache."""
    kh, kw, _, f = w.shape
    oh = output_size(x.shape[1], kh, stride, pad)
    ow = output_size(x.shape[2], kw, stride, pad)
    y = np.empty((len(x), oh, ow, f), x.dtype)
    multiply, size = _product(w, y.shape, stride, pad)

    def work(start, stop):
        chunk = y[start:stop]
        multiply(x[start:stop], chunk)
        chunk += b
        if relu:
            np.maximum(chunk, 0, out=chunk)

    threads.chunks(len(x), size, work)
    return y


def conv_backward_input(dy, w, x_shape, stride=1, pad=0):
    """A convolution again: of dy, its pixels `stride` apart, with the filters turned round."""
    kh, kw, _, _ = w.shape
    n, h, width, _ = x_shape
    turned = np.ascontiguousarray(w[::-1, ::-1].swapaxes(2, 3))     # (KH, KW, F, C)
    dx = np.empty(x_shape, dy.dtype)
    same_size = _keeps_size(kh, kw, stride, pad)                    # then dy needs no canvas
    multiply, size = _product(turned, x_shape, 1, pad if same_size else 0)

    def work(start, stop):
        chunk = dy[start:stop]
        if not same_size:
            canvas = h + kh - 1, width + kw - 1
            chunk = _embed(chunk, kh - 1 - pad, kw - 1 - pad, canvas, stride)
        multiply(chunk, dx[start:stop])

    threads.chunks(n, size, work)
    return dx


def conv_backward_filter(x, dy, w_shape, stride=1, pad=0):
    """Chunks of images, whose products are added up."""
    if _is_winograd(w_shape, stride, pad):
        dw = _filter_by_tiles(x, dy, w_shape, pad)
    else:
        dw = _filter_by_patches(x, dy, w_shape, stride, pad)
    return dw.reshape(w_shape), _column_sums(dy)


# ---------------------------------------------------------------------------------- pooling

# A tap (p, q) is one of the kernel×kernel places of a window; its number is p·kernel + q. A tap
# sees every stride-th row and column of the image. So the image is parted into stride×stride grids
# of such pixels: in the memory of its own grid, the pixels of a tap's windows lie side by side.

def _along(size, out, k, stride, pad):
    """Along one axis, for pixel k of each window: two slices and the number of a grid.

    The first slice is of the windows whose pixel k lies inside the image, the second says where
    these pixels are in their grid, one of the `stride` grids.
    """
    first = max(0, ceil_div(pad - k, stride))                       # the first such window
    last = min(out, (size - 1 + pad - k) // stride + 1)             # and the one behind the last
    grid_first, grid = divmod(first * stride + k - pad, stride)
    return slice(first, last), slice(grid_first, grid_first + last - first), grid


def _taps(shape, out_shape, kernel, stride, pad):
    """Of each tap: its grid, its windows inside the image, their pixels in the grid, its number."""
    taps = []
    for p, q in np.ndindex(kernel, kernel):
        windows_i, pixels_i, grid_i = _along(shape[0], out_shape[0], p, stride, pad)
        windows_j, pixels_j, grid_j = _along(shape[1], out_shape[1], q, stride, pad)
        if windows_i.stop > windows_i.start and windows_j.stop > windows_j.start:
            windows = slice(None), windows_i, windows_j
            pixels = slice(None), pixels_i, pixels_j
            taps.append(((grid_i, grid_j), windows, pixels, p * kernel + q))
    return taps


def max_pool_forward(x, kernel, stride, pad=0, ceil=False):
    """Tap by tap, all windows at once."""
    n, h, w, c = x.shape
    oh = output_size(h, kernel, stride, pad, ceil)
    ow = output_size(w, kernel, stride, pad, ceil)
    y = np.empty((n, oh, ow, c), x.dtype)
    argmax = np.empty((n, oh, ow, c), np.uint8)
    first_row = np.maximum(0, pad - stride * np.arange(oh))[:, None, None]
    first_column = np.maximum(0, pad - stride * np.arange(ow))[:, None]
    first = first_row * kernel + first_column                       # the first tap inside the image
    taps = _taps((h, w), (oh, ow), kernel, stride, pad)

    def work(start, stop):
        grids = {(i, j): np.ascontiguousarray(x[start:stop, i::stride, j::stride])
                 for i, j in np.ndindex(stride, stride)}
        largest = y[start:stop]
        place = argmax[start:stop]
        largest[:] = -np.inf
        place[:] = first
        for grid, windows, pixels, tap in taps:
            values = grids[grid][pixels]
            larger = np.greater(values, largest[windows]).view(np.uint8)
            larger *= np.uint8(tap)
            # taps come in ascending order, so the larger of the two places is the later one
            np.maximum(place[windows], larger, out=place[windows])
            np.maximum(largest[windows], values, out=largest[windows])

    threads.chunks(n, _chunk_size(n, x[0].nbytes, POOL_BYTES), work)
    return y, argmax


def max_pool_backward(dy, argmax, x_shape, kernel, stride, pad=0):
    """Grid by grid, and tap by tap.

    An infinite dy makes NaN of its window's other pixels, by ∞ · 0.
    """
    dx = np.empty(x_shape, dy.dtype)
    taps = _taps(x_shape[1:3], dy.shape[1:3], kernel, stride, pad)

    def work(start, stop):
        for i, j in np.ndindex(stride, stride):
            pixels_of_grid = dx[start:stop, i::stride, j::stride]
            total = np.zeros(pixels_of_grid.shape, dy.dtype)
            for grid, windows, pixels, tap in taps:
                if grid == (i, j):
                    chosen = argmax[start:stop][windows] == tap
                    total[pixels] += dy[start:stop][windows] * chosen
            pixels_of_grid[:] = total

    threads.chunks(len(dy), _chunk_size(len(dy), dx[0].nbytes, POOL_BYTES), work)
    return dx


# ------------------------------------------------------------------------- normalisation

def _window_sum(x, size):
    """Sum over the `size` channels around each one: by shifts, faster than by windows."""
    total = x.copy()
    for shift in range(1, min(size // 2, x.shape[-1] - 1) + 1):
        total[..., shift:] += x[..., :-shift]
        total[..., :-shift] += x[..., shift:]
    return total


def _power(s, beta):
    """s^-β, by square roots where β = 3/4, since powers take long."""
    if beta != 0.75:
        return s ** -beta
    root = np.sqrt(s)
    return 1 / (root * np.sqrt(root))


def lrn_forward(x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """Chunks of pixels."""
    pixels = x.reshape(-1, x.shape[-1])                             # (P, C)
    y = np.empty(pixels.shape, x.dtype)

    def work(start, stop):
        chunk = pixels[start:stop]
        s = k + alpha * _window_sum(chunk * chunk, size)
        np.multiply(chunk, _power(s, beta), out=y[start:stop])

    threads.chunks(len(pixels), max(1, 2 * FLAT_CHUNK // x.shape[-1]), work)
    return y.reshape(x.shape)


def lrn_backward(dy, x, size=5, k=2.0, alpha=1e-4, beta=0.75):
    """Chunks of pixels."""
    pixels = x.reshape(-1, x.shape[-1])                             # (P, C)
    gradients = dy.reshape(-1, x.shape[-1])
    dx = np.empty(pixels.shape, x.dtype)

    def work(start, stop):
        chunk = pixels[start:stop]
        s = k + alpha * _window_sum(chunk * chunk, size)
        direct = gradients[start:stop] * _power(s, beta)
        through_s = _window_sum(direct * chunk / s, size)
        np.subtract(direct, 2 * alpha * beta * chunk * through_s, out=dx[start:stop])

    threads.chunks(len(pixels), max(1, 2 * FLAT_CHUNK // x.shape[-1]), work)
    return dx.reshape(x.shape)


# ------------------------------------------------------------------- elementwise, and products

def _flat_chunks(size, work):
    """work(start, stop) on chunks of `size` numbers that lie one after the other."""
    threads.chunks(size, FLAT_CHUNK, work)


def relu_backward(dy, y):
    """Chunks of numbers, by a product, the fastest way: an infinite dy becomes NaN where y is 0."""
    flat_dy = dy.reshape(-1)
    flat_y = y.reshape(-1)
    dx = np.empty(flat_dy.shape, dy.dtype)

    def work(start, stop):
        np.multiply(flat_dy[start:stop], flat_y[start:stop] > 0, out=dx[start:stop])

    _flat_chunks(dx.size, work)
    return dx.reshape(dy.shape)


def sum_gradients(terms):
    """Chunks of numbers."""
    flat_terms = [term.reshape(-1) for term in terms]
    total = np.empty(flat_terms[0].shape, terms[0].dtype)

    def work(start, stop):
        total[start:stop] = flat_terms[0][start:stop]
        for term in flat_terms[1:]:
            total[start:stop] += term[start:stop]

    _flat_chunks(total.size, work)
    return total.reshape(terms[0].shape)


def matmul(a, b, bias=None, relu=False):
    """The longer side of the product is shared among the threads."""
    rows = a.shape[0]
    columns = b.shape[1]
    y = np.empty((rows, columns), np.result_type(a, b))

    def finish(product, bias):
        if bias is not None:
            product += bias
        if relu:
            np.maximum(product, 0, out=product)

    def some_rows(start, stop):
        np.matmul(a[start:stop], b, out=y[start:stop])
        finish(y[start:stop], bias)

    def some_columns(start, stop):
        np.matmul(a, b[:, start:stop], out=y[:, start:stop])
        finish(y[:, start:stop], None if bias is None else bias[start:stop])

    work = some_rows if rows >= columns else some_columns
    longer = max(rows, columns)
    threads.chunks(longer, ceil_div(longer, threads.count), work)
    return y


def sgd(w, v, dw, rate, momentum, decay, rows=None):
    """Chunks of numbers, in one pass; rows are gathered, moved and put back."""
    if not (w.flags.c_contiguous and v.flags.c_contiguous):         # a flat copy would be moved
        raise ValueError("weights and velocities must be contiguous, as Network.load makes them")
    if rows is not None:
        w_rows = w[rows]                                            # copies, (R, …)
        v_rows = v[rows]
        sgd(w_rows, v_rows, dw, rate, momentum, decay)
        w[rows] = w_rows
        v[rows] = v_rows
        return
    flat_w = w.reshape(-1)
    flat_v = v.reshape(-1)
    flat_dw = dw.reshape(-1)

    def work(start, stop):
        weights = flat_w[start:stop]
        velocity = flat_v[start:stop]
        velocity *= momentum
        velocity += flat_dw[start:stop]
        if decay:
            velocity += decay * weights
        weights -= rate * velocity

    _flat_chunks(w.size, work)
