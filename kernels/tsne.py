"""Exact t-SNE (van der Maaten and Hinton 2008): points (N, D) -> a map (N, 2), on every device.

Like console.py this file is no operation; it knows nothing of runs and models.
"""
import numpy as np
from scipy.linalg import eigh

import kernels
from kernels.console import Progress

EXAGGERATION = 4                                # P is larger by this factor …
EXAGGERATED = 100                               # … in so many steps, the first ones
MOMENTUM = 0.8
FIRST_MOMENTUM = 0.5                            # in the first steps, so many:
SLOW = 250
COMPONENTS = 50                                 # principal components that distances are taken of
FAR = 1e20                                      # the squared distance of a point from itself
CPU_TILE = 1 << 20                              # numbers at a time: with fewer, Python is the limit
GPU_TILE = 1 << 25


def work_on_rows(n, work):
    """work(slice) for slices that cover n rows of n numbers; on a CPU, threads share them."""
    def work_between(start, stop):
        work(slice(start, stop))

    if kernels.memory() is None:                # on a CPU
        kernels.threads.chunks(n, max(1, CPU_TILE // n), work_between)
    else:
        size = max(1, GPU_TILE // n)
        for start in range(0, n, size):
            work(slice(start, min(n, start + size)))


def conditional(d, perplexity, steps=40):
    """p_j|i ∝ exp(-β_i d_ij) of squared distances d (B, N), with an entropy of ln perplexity."""
    d = d - d.min(axis=1, keepdims=True)                            # changes no p_j|i (2008, §2)
    beta = np.ones_like(d[:, :1])
    low = np.zeros_like(beta)
    high = np.full_like(beta, np.inf)
    for _ in range(steps):                                          # of bisection
        p = np.exp(-d * beta)
        total = p.sum(axis=1, keepdims=True)
        entropy = np.log(total) + beta * (d * p).sum(axis=1, keepdims=True) / total
        wide = entropy > np.log(perplexity)                         # β must grow
        low = np.where(wide, beta, low)
        high = np.where(wide, high, beta)
        beta = np.where(np.isinf(high), beta * 2, (low + high) / 2)
    return p / total


def affinities(x, perplexity):
    """P (N, N) of points x (N, D): symmetric, sums to 1; p_ij = (p_j|i + p_i|j) / 2N."""
    n = len(x)
    squares = (x * x).sum(axis=1)                                   # (N,)
    unit = squares.mean()                                           # distances of about 1
    p = np.empty_like(x, shape=(n, n))

    def work(rows):
        d = squares[rows, None] + squares - 2 * (x[rows] @ x.T)     # (B, N)
        d = np.maximum(d / unit, 0)
        d[np.arange(len(d)), np.arange(rows.start, rows.stop)] = FAR
        p[rows] = conditional(d, perplexity)

    work_on_rows(n, work)
    return (p + p.T) / (2 * n)


def with_squares(y):
    """[1, y_j, |y_j|²] of the points y of a map (N, 2): (N, 4), of which products are made."""
    squares = (y * y).sum(axis=1, keepdims=True)                    # (N, 1)
    return np.concatenate([np.ones_like(squares), y, squares], axis=1)


def closeness(points, rows):
    """n_ij = 1 / (1 + |y_i - y_j|²) of some rows i and all points j, as `with_squares` has them.

    1 + |y_i - y_j|² = [1 + |y_i|², -2 y_i, 1]·[1, y_j, |y_j|²], so one product gives all: (B, N).
    """
    ones = points[rows, :1]
    left = np.concatenate([ones + points[rows, 3:], -2 * points[rows, 1:3], ones], axis=1)  # (B, 4)
    near = left @ points.T                                          # (B, N)
    np.maximum(near, 1, out=near)               # where rounding made less of it
    return np.divide(1, near, out=near)


def kl_gradient(p, y, exaggeration=1):
    """∂KL(P‖Q)/∂y (N, 2), with exaggeration·P for P (N, N).

    q_ij = n_ij / Z, where Z = Σ n over i ≠ j; ∂KL/∂y_i = 4 Σ_j (p_ij - q_ij) n_ij (y_i - y_j)
    (2008, eq. 5). As Z is known at the end only, the sums of p n and of n² are apart.
    """
    n = len(y)
    points = with_squares(y)
    pull = np.empty_like(y)
    push = np.empty_like(y)
    sums = np.empty_like(y[:, 0])

    def work(rows):
        near = closeness(points, rows)                              # (B, N)
        sums[rows] = near @ points[:, 0]                            # whose numbers are ones
        pull[rows] = add_forces(p[rows] * near, points, rows)
        near *= near                                                # in the cache still
        push[rows] = add_forces(near, points, rows)

    work_on_rows(n, work)
    z = sums.sum(dtype=np.float64) - n                              # n_ii is 1
    return 4 * (exaggeration * pull - push / z).astype(y.dtype)


def add_forces(weights, points, rows):
    """Σ_j w_ij (y_i - y_j) of some rows i, (B, 2): y_i Σ_j w_ij - Σ_j w_ij y_j."""
    sums = weights @ points                     # (B, 4): of w_ij, of w_ij y_j, and of w_ij |y_j|²
    return points[rows, 1:3] * sums[:, :1] - sums[:, 1:3]


def kl_divergence(p, y):
    """KL(P‖Q) = log Z + Σ p log (p / n) of a map y (N, 2), where 0 log 0 is 0."""
    n = len(y)
    points = with_squares(y)
    sums = np.empty_like(y[:, 0])
    losses = np.empty_like(sums)

    def work(rows):
        near = closeness(points, rows)                              # (B, N)
        sums[rows] = near.sum(axis=1)
        losses[rows] = (p[rows] * np.log(np.maximum(p[rows], 1e-30) / near)).sum(axis=1)

    work_on_rows(n, work)
    z = sums.sum(dtype=np.float64) - n
    return float(kernels.to_host(np.log(z) + losses.sum(dtype=np.float64)))


def principal_components(x, count):
    """Points x (N, D) along their `count` widest directions, the widest first, about their mean."""
    x = np.asarray(x, np.float32) - x.mean(axis=0, dtype=np.float64).astype(np.float32)
    last = x.shape[1] - 1
    _, axes = eigh(x.T @ x, subset_by_index=(max(0, last + 1 - count), last))   # ascending
    return x @ axes[:, ::-1].astype(np.float32)                     # (N, count)


def tsne(x, perplexity, steps):
    """A map (N, 2) of points x (N, D), and its KL divergence: exact t-SNE, float32.

    It begins with the two widest principal components, made tiny. Each coordinate has a gain that
    grows while its gradient keeps its sign (2008, §3.4).
    """
    x = kernels.to_device(principal_components(x, COMPONENTS))
    p = affinities(x, perplexity)                                   # (N, N)
    y = x[:, :2] * (1e-4 / x[:, 0].std())                           # (N, 2)
    velocity = np.zeros_like(y)
    gain = np.ones_like(y)
    rate = max(50, len(x) / EXAGGERATION / 4)
    with Progress(f"t-SNE of {len(x):,} points", steps, "steps") as progress:
        for step in range(1, steps + 1):
            gradient = kl_gradient(p, y, EXAGGERATION if step <= EXAGGERATED else 1)
            turned = (gradient > 0) == (velocity > 0)               # velocity is downhill
            gain = np.maximum(np.where(turned, gain * 0.8, gain + 0.2), 0.01)
            momentum = FIRST_MOMENTUM if step <= SLOW else MOMENTUM
            velocity = momentum * velocity - rate * gain * gradient
            y = y + velocity
            y = y - y.mean(axis=0)
            progress.tick()
    return kernels.to_host(y), kl_divergence(p, y)
