"""The paper's experiments on a trained run, using the model, and the pictures of a run.

    python eval.py COMMAND --model RUN …        RUN is a run's folder; the README has examples
    python eval.py --help                       the commands, with the paper's tables and figures

Fractions, not percent. Here: metrics, regression, t-SNE, pictures, commands.
"""
import argparse
import base64
import difflib
import functools
import glob
import io
import itertools
import os
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from html import escape

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # while the rest is imported

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.linalg import eigh
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit, log_softmax, softmax
from scipy.stats import hypergeom, rankdata, spearmanr

import data
import kernels
import model
from kernels import console, cpu
from kernels.console import MOST_THREADS, number
from kernels.philox import SPLITS, philox

BLOCK = 20_000_000              # scores held at a time
KS = (1, 5, 10)                 # precision@k
SPREAD = " ±"                           # after a key: its deviation


# ---------------------------------------------------------------------------------- metrics

def top_words(scores, k):
    """The k best-scored words of each photo, best first: (N, K) -> (N, k)."""
    k = min(k, scores.shape[1])
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]           # (N, k), unordered
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


def auc_and_ap(scores, carried):
    """Area under the ROC curve and average precision of each column.

    scores, carried (N, words): NaN for a word that all photos carry, or none. Ties count half in
    the AUC (it is the Mann-Whitney statistic); in the AP, the first of tied photos ranks first.
    """
    n, positives = len(scores), carried.sum(axis=0)
    both = (positives > 0) & (positives < n)
    ranks = (rankdata(scores, axis=0) * carried).sum(axis=0)
    auc = (ranks - positives * (positives + 1) / 2) / np.maximum(1, positives * (n - positives))
    hits = np.take_along_axis(carried, np.argsort(-scores, axis=0, kind="stable"), 0)
    precision = np.cumsum(hits, axis=0) / np.arange(1, n + 1)[:, None]          # (N, words)
    ap = (precision * hits).sum(axis=0) / np.maximum(1, positives)
    return np.where(both, auc, np.nan), np.where(both, ap, np.nan)


def word_metrics(features, output, targets, counts, share, loss_name):
    """What `words` reports, a plain dictionary, from features (N, E) and each photo's classes.

    output: the layer of the K words; targets: N arrays of classes; counts (K,): the training photos
    of each word, for baseline, thirds, tenths; share (K,): theirs of all; the loss is a mean.
    """
    n, k = len(targets), len(counts)
    photos = np.repeat(np.arange(n), [len(words) for words in targets])
    carried = csr_array((np.ones(len(photos), bool), (photos, np.concatenate(targets))), (n, k))
    precision, loss = _score_photos(features, output, targets, carried, share, loss_name)
    (auc, ap), columns, size = np.full((2, k), np.nan), carried.tocsc(), max(1, BLOCK // 4 // n)
    for block in (slice(start, start + size) for start in range(0, k, size)):
        scores = kernels.matmul(features, output.w[block].T) + output.b[block]  # (N, B)
        auc[block], ap[block] = auc_and_ap(kernels.to_host(scores), columns[:, block].toarray())
    sizes, positives, scored = carried.sum(axis=1), carried.sum(axis=0), np.isfinite(ap)
    order, third = np.argsort(-counts, kind="stable"), max(1, k // 3)
    return {
        **_by_k(precision), "auc": _mean(auc), "map": _mean(ap), "loss": loss,
        "auc_frequent": _mean(auc[order[:third]]), "auc_rare": _mean(auc[order[-third:]]),
        "deciles": {f"{i} of 10": {"words": len(part), "photos": float(counts[part].mean()),
                                   "auc": _mean(auc[part]), "map": _mean(ap[part])}
                    for i, part in enumerate(np.array_split(order, 10), 1) if len(part)},
        "photos": n, "words": int(scored.sum()), "dictionary": k,
        "ceiling": _by_k(np.minimum.outer(sizes, KS).mean(axis=0) / KS),
        "baseline": _by_k(positives[order[:k]].sum() / (n * k) for k in KS),
        "chance": {**_by_k(sizes.mean() / k * np.minimum(KS, k) / KS), "auc": 0.5,
                   "map": _mean(positives[scored] / n)},
    }


def _score_photos(features, output, targets, carried, share, loss_name):
    """Mean precision@k (len(KS),) (Table 1) and mean loss, summed a block of photos at a time."""
    n, size = len(targets), max(1, BLOCK // len(share))
    precision, loss = np.zeros(len(KS)), 0.0
    for block in (slice(start, start + size) for start in range(0, n, size)):
        part, scores = targets[block], output.forward(features[block], model.Pass())    # (B, K)
        best = top_words(kernels.to_host(scores), max(KS))
        hits = carried[block][np.arange(len(best))[:, None], best].toarray()
        precision += [hits[:, :k].sum() / (n * k) for k in KS]
        # under eq. 2 a photo's words share its weight, as training with one word a row does
        weights = [1 / len(words) if loss_name == "softmax" else 1 for words in part]
        labels = data.Labels(data.pad_rows(part), np.array(weights) / n, share)
        losses, _ = model.LOSSES[loss_name](scores, labels)
        loss += float(kernels.to_host(losses).sum())
    return precision, loss


def _by_k(values, ks=KS):
    return {f"precision@{k}": float(value) for k, value in zip(ks, values)}


def _mean(values):
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def units(x):
    """Rows of length 1, (N, D): their products are cosines. A row of zeros stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def csls(cosines, k=10):
    """2 cos(x, y) - r(x) - r(y), r the mean of the k best: hubs get less (Conneau 2018, §2.3)."""
    rows, columns = (np.sort(c, axis=1)[:, -k:].mean(axis=1) for c in (cosines, cosines.T))
    return 2 * cosines - rows[:, None] - columns                    # (S, T)


def retrieval(scores, right, ks=KS):
    """How often a row's k best columns hold a right one, and k drawn by chance do; both (S, T)."""
    found = np.take_along_axis(right, top_words(scores, max(ks)), 1)            # (S, k)
    columns, good = right.shape[1], right.sum(axis=1)               # T, (S,)
    chance = [hypergeom.sf(0, columns, good, min(k, columns)).mean() for k in ks]
    return {**_by_k([found[:, :k].any(axis=1).mean() for k in ks], ks), "chance": _by_k(chance, ks)}


def extract_features(net, loader, photos, crop, progress=None, compute=None):
    """Features (N, E) of the photos that can be read, or what else is computed, and their numbers.

    compute(x, pixels, numbers) gives rows of some photos: their pixels are uint8 (n, S, S, 3), and
    x (n, crop, crop, 3) the same for a network, cropped centrally.
    """
    compute, parts, found = compute or (lambda x, *_: net.features(x)), [], []
    for numbers, pixels in loader.read(photos, progress):
        middle = data.centre(len(pixels), pixels.shape[1] - crop)
        parts.append(compute(kernels.prepare(pixels, *middle, crop), pixels, numbers))
        found += numbers.tolist()
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32), found


# ------------------------------------------------------------------ regression (paper, §5.2)

PENALTIES = 10.0 ** np.arange(-1, -7, -1)       # λ to choose from, strongest first
HELD = 0.2                                      # share of the training photos that chooses λ
RAW = 16                                        # raw pixels: that many rows and columns
VIEWS = "this model", "untrained network", f"raw pixels, {RAW} × {RAW}"
FIT = {"maxiter": 300, "maxcor": 10, "gtol": 1e-5, "ftol": 1e-8}


def logistic(flat, x, y, penalty):
    """Multinomial logistic regression with an L2 penalty: loss and gradient.

    ℓ = -1/N Σ_n log p_n,y(n) + λ/2 |w|² with p = softmax(x w + b), so ∂ℓ/∂s = (p - [y]) / N for
    the scores s, and ∂ℓ/∂w = xᵀ ∂ℓ/∂s + λ w. x (N, D), y (N,) classes; flat is w (D, C) with the
    row b (C,) under it, which is not penalised. Products have the precision of x, sums are float64.
    """
    table, rows = flat.reshape(x.shape[1] + 1, -1), np.arange(len(x))
    w, log_p = table[:-1], log_softmax(predict(table, x), axis=1)   # (D, C), (N, C)
    loss = -log_p[rows, y].mean(dtype=np.float64) + penalty / 2 * (w * w).sum()
    ds = np.exp(log_p) / len(x)                                     # (N, C)
    ds[rows, y] -= 1 / len(x)
    return loss, np.vstack([x.T @ ds + penalty * w, ds.sum(axis=0)]).ravel()


def fit(x, y, penalty, start=None):
    """The table (D+1, C) of w and b that minimises `logistic`, by L-BFGS from `start`."""
    start = np.zeros((x.shape[1] + 1, y.max() + 1)) if start is None else start
    found = minimize(logistic, start.ravel(), (x, y, penalty), "L-BFGS-B", True, options=FIT)
    return found.x.reshape(start.shape)


def predict(table, x):
    """The scores x w + b, (N, C)."""
    return x @ table[:-1].astype(x.dtype) + table[-1].astype(x.dtype)


def choose_penalty(x, y, held, goodness):
    """The fit to all with the λ whose fit to the rest is best on those held (N,), and that λ.

    With one photo a class nothing can be held, and λ is 10⁻⁴.
    """
    table, best = None, (-np.inf, 1e-4)
    for penalty in PENALTIES if held.any() else ():
        table = fit(x[~held], y[~held], penalty, table)             # from that of a stronger λ
        value = goodness(predict(table, x[held]), y[held])
        if value > best[0]:
            best = value, penalty, table
    return fit(x, y, *best[1:]), best[1]


def split(y, take, seed, number):
    """Boolean (N,): take(n) of each class's n photos at random, a function of (seed, number)."""
    order = np.argsort(philox(seed, (0, number, 0, SPLITS)).random_raw(len(y)), kind="stable")
    mask = np.zeros(len(y), bool)
    for one in np.unique(y):
        mine = order[y[order] == one]
        mask[mine[:take(len(mine))]] = True
    return mask


def voc_ap(scores, y):
    """Average precision of scores (N, 2) as in Pascal VOC 2007; y (N,) is 1 where the class is."""
    hits = np.cumsum(y[np.argsort(scores[:, 0] - scores[:, 1], kind="stable")])
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / max(1, hits[-1])
    highest = np.maximum.accumulate(precision[::-1])[::-1]          # at that recall or a greater
    return float(highest[np.searchsorted(recall, np.arange(11) / 10 - 1e-12)].mean())


# ----------------------------------------------------- maps (van der Maaten and Hinton 2008)

EXAGGERATION, EXAGGERATED = 4, 100              # P is larger by that factor, for so many steps
MOMENTUM, SLOW = (0.5, 0.8), 250                 # the first one for so many steps, then the second
COMPONENTS = 50                                 # principal components that distances are taken of
FAR = 1e20                                      # the squared distance of a point from itself
TILES = 1 << 18, 1 << 25                        # numbers at a time: in a core's cache, on a GPU


def share_blocks(n, work):
    """work(slices of rows, n numbers each): on a CPU its share on each thread, on a GPU all."""
    gpu = kernels.memory() is not None
    size = max(1, TILES[gpu] // n)
    blocks = [slice(start, min(n, start + size)) for start in range(0, n, size)]
    work(blocks) if gpu else kernels.threads.share(work, blocks)


def conditional(d, perplexity, steps=40):
    """p_j|i ∝ exp(-β_i d_ij) of squared distances d (B, N), with an entropy of ln perplexity."""
    d = d - d.min(axis=1, keepdims=True)                            # changes no p_j|i (2008, §2)
    beta = np.ones_like(d[:, :1])
    low, high = np.zeros_like(beta), np.full_like(beta, np.inf)
    for _ in range(steps):                                          # of bisection
        p = np.exp(-d * beta)
        total = p.sum(axis=1, keepdims=True)
        entropy = np.log(total) + beta * (d * p).sum(axis=1, keepdims=True) / total
        wide = entropy > np.log(perplexity)                         # β must grow
        low, high = np.where(wide, beta, low), np.where(wide, high, beta)
        beta = np.where(np.isinf(high), beta * 2, (low + high) / 2)
    return p / total


def affinities(x, perplexity):
    """P (N, N) of points x (N, D): symmetric, sums to 1; p_ij = (p_j|i + p_i|j) / 2N."""
    n, squares = len(x), (x * x).sum(axis=1)                        # (N,)
    p = np.empty_like(x, shape=(n, n))
    unit = squares.mean()                                           # distances of about 1

    def work(blocks):
        for block in blocks:
            d = squares[block, None] + squares - 2 * (x[block] @ x.T)           # (B, N)
            d = np.maximum(d / unit, 0)
            d[np.arange(len(d)), np.arange(block.start, block.stop)] = FAR
            p[block] = conditional(d, perplexity)

    share_blocks(n, work)
    return (p + p.T) / (2 * n)


def tsne_gradient(p, y, exaggeration=1, divergence=False):
    """∂KL(P‖Q)/∂y (N, 2) with exaggeration·P for P, and KL(P‖Q) if `divergence`, or None.

    n_ij = 1 / (1 + |y_i - y_j|²), q_ij = n_ij / Z, Z = Σ n over i ≠ j;
    ∂KL/∂y_i = 4 Σ_j (p_ij - q_ij) n_ij (y_i - y_j) (2008, eq. 5), here as pull and push, since Z
    is known at the end only; KL = log Z + Σ p log (p / n), where 0 log 0 is 0.
    """
    n, columns, one = len(y), y.T.copy(), np.ones_like(y[:, 0])     # columns (2, N)
    pull, push, sums, losses = np.empty_like(y), np.empty_like(y), one.copy(), one.copy()

    def work(blocks):
        most = max((block.stop - block.start for block in blocks), default=0)
        space = np.empty_like(y, shape=(4, most, n))                # used again and again
        for block in blocks:
            part = space[:, :block.stop - block.start]
            apart, near, product = part[:2], part[2], part[3]       # (2, B, N), (B, N), (B, N)
            np.subtract(columns[:, block, None], columns[:, None], out=apart)
            np.square(apart[0], out=near)
            near += np.square(apart[1], out=product)
            near += 1
            np.reciprocal(near, out=near)
            sums[block] = near @ one
            np.multiply(p[block], near, out=product)
            if divergence:
                log = np.log(np.maximum(p[block], 1e-30) / near)
                losses[block] = (p[block] * log).sum(axis=1)
            for force, weights in (pull, product), (push, np.square(near, out=near)):
                # a product takes half the time of einsum: (2, B, 1, N) times (B, N, 1)
                force[block] = (apart[:, :, None] @ weights[..., None])[..., 0, 0].T

    share_blocks(n, work)
    z = sums.sum(dtype=np.float64) - n
    gradient = 4 * (exaggeration * pull - push / z).astype(y.dtype)
    kl = float(kernels.to_host(np.log(z) + losses.sum(dtype=np.float64))) if divergence else None
    return gradient, kl


def tsne(x, perplexity, steps):
    """Places (N, 2) for points x (N, D), and their KL divergence: exact t-SNE, float32.

    Distances are those of the first principal components. The first places are the widest two,
    tiny; each coordinate has a gain that grows while its gradient keeps its sign (2008, §3.4).
    """
    x = np.asarray(x, np.float32) - x.mean(axis=0, dtype=np.float64).astype(np.float32)
    last = x.shape[1] - 1
    _, axes = eigh(cpu.matmul(x.T, x), subset_by_index=(max(0, last + 1 - COMPONENTS), last))
    x = kernels.to_device(x @ axes[:, ::-1].astype(np.float32))     # the widest first
    p = affinities(x, perplexity)
    y = x[:, :2] * (1e-4 / x[:, 0].std())                           # (N, 2)
    velocity, gain = np.zeros_like(y), np.ones_like(y)
    rate = max(50, len(x) / EXAGGERATION / 4)
    with console.Progress(f"t-SNE of {len(x):,} points", steps, "steps") as progress:
        for step in range(1, steps + 1):
            gradient, _ = tsne_gradient(p, y, EXAGGERATION if step <= EXAGGERATED else 1)
            turned = (gradient > 0) == (velocity > 0)               # velocity is downhill
            gain = np.maximum(np.where(turned, gain * 0.8, gain + 0.2), 0.01)
            velocity = MOMENTUM[step > SLOW] * velocity - rate * gain * gradient
            y = y + velocity
            y = y - y.mean(axis=0)
            progress.tick()
    return kernels.to_host(y), tsne_gradient(p, y, divergence=True)[1]


# -------------------------------------------------------------------------------- pictures

INK, PALE, COLOURS = (40, 40, 40), (225, 225, 225), (
    (31, 98, 180), (214, 92, 20), (46, 140, 70), (140, 60, 150))
FONTS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts",
         "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts")


@functools.cache
class Fonts:
    """Fonts with the letters of words: the given one, Pillow's own, or any of the system's."""

    def __init__(self, given=None):
        files = [path for folder in FONTS for path in glob.glob(
            os.path.expanduser(folder) + "/**/*.[ot]t[fc]", recursive=True)
            if "LastResort" not in path]                            # which has boxes for all
        self.paths = [given, None, *sorted(files, key=lambda path: "Sans-Regular" not in path)]
        self.lost = False
        try:
            open_font(given, 20)
        except OSError:
            raise argparse.ArgumentTypeError(f"{given} is no font that can be read") from None

    def find(self, word, size):
        """A font that has all letters of the word; where none has, it is said once, and how."""
        for place, path in enumerate(self.paths):
            if all(has_letter(path, letter) for letter in word):
                self.paths.insert(min(place, 2), self.paths.pop(place))         # sooner next time
                return open_font(path, size)
        if not self.lost:
            print(f"no font has the letters of {word}: pictures show boxes; install the packages "
                  "fonts-noto-core and fonts-noto-cjk, or give --font FILE", file=sys.stderr)
        self.lost = True
        return open_font(self.paths[0], size)


@functools.lru_cache(1000)
def open_font(path, size):
    """The font of a file, or Pillow's own."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@functools.cache
def has_letter(path, letter):
    """Whether a font draws the letter otherwise than one that no font has."""
    with suppress(OSError):                     # a broken file, or one of coloured pictures
        one, none = (open_font(path, 20).getmask(text) for text in (letter, "\uffff"))
        return (one.size, bytes(one)) != (none.size, bytes(none))
    return False


def save_image(image, path):
    """Write a picture file, whole or not at all."""
    with console.whole_file(path) as file:
        image.save(file, "PNG")


def filters_picture(w, zoom=6):
    """The first layer's filters (KH, KW, 3, F), each stretched to full contrast, as a grid."""
    kh, kw, _, f = w.shape
    side = int(np.ceil(np.sqrt(f)))
    low, high = w.min(axis=(0, 1, 2)), w.max(axis=(0, 1, 2))
    tiles = np.full((side * side, kh + 1, kw + 1, 3), 255, np.uint8)            # with white edges
    tiles[:f, 1:, 1:] = ((w - low) / np.maximum(high - low, 1e-12) * 255).transpose(3, 0, 1, 2)
    rows = np.concatenate(tiles.reshape(side, side, kh + 1, kw + 1, 3), axis=1)
    return Image.fromarray(np.concatenate(rows, axis=1).repeat(zoom, axis=0).repeat(zoom, axis=1))


def curves_picture(log):
    """The learning curves of a run's log, over the epochs."""
    titles = {"loss": "training loss", "validation_loss": "held-out loss",
              "precision@10": "held-out precision@10", "auc": "held-out AUC, mean of words"}
    panels = [plot_picture(log, "epoch", key, title, {"auc": 0.5}.get(key), colour=colour)
              for colour, (key, title) in zip(COLOURS, titles.items())]
    return Image.fromarray(np.vstack([np.hstack(panels[:2]), np.hstack(panels[2:])]))


def round_ticks(low, high):
    """Multiples of 1, 2, 2.5 or 5 times a power of ten around low … high, in 5 steps at most."""
    if high - low <= 1e-9 * abs(high):          # flat
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    for step in 10 ** np.floor(np.log10((high - low) / 5)) * np.array([1, 2, 2.5, 5, 10, 20]):
        first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
        if last - first <= 5:
            return step * np.arange(first, last + 1) + 0.0          # no -0


def plot_picture(rows, across, key, title, chance=None, axis=np.asarray, colour=COLOURS[0]):
    """A curve of row[key] against axis(row[across]), with a broken line at `chance`.

    row[key + SPREAD], if there, is half the length of an error bar.
    """
    image, (left, right, top, bottom) = Image.new("RGB", (480, 310), "white"), (70, 450, 45, 265)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.line([(left, top), (left, bottom), (right, bottom)], INK)
    rows = [row for row in rows if np.isfinite(np.array(row.get(key), float))]      # None is NaN
    xs, ys, spreads = (np.array([row.get(name, 0) for row in rows], float)
                       for name in (across, key, key + SPREAD))
    draw.text((left, 17), title + ": nothing to show" * (not len(ys)), INK, font)
    if not len(ys):
        return image
    shown = [*(ys - spreads), *(ys + spreads), ys[0] if chance is None else chance]
    ticks = round_ticks(min(shown), max(shown))
    height = functools.partial(np.interp, xp=ticks[[0, -1]], fp=[bottom, top])
    for tick in ticks:
        draw.line([(left + 1, height(tick)), (right, height(tick))], PALE)
        draw.text((left - 6, height(tick)), f"{tick:.6g}", INK, font, anchor="rm")
    if chance is not None:
        for dash in range(left, right, 8):
            draw.line([(dash, height(chance)), (dash + 4, height(chance))], INK)
        draw.text((right, height(chance) - 2), "chance", INK, font, anchor="rd")
    for x in xs if len(xs) < 7 else round_ticks(xs[0], xs[-1]):
        if xs[0] <= x <= xs[-1] and x % 1 == 0:
            place = np.interp(axis(x), axis(xs[[0, -1]]), [left, right])
            draw.text((place, bottom + 6), f"{x:,.0f}", INK, font, anchor="ma")
    draw.text((right, bottom + 24), across.replace("_", " "), INK, font, anchor="ra")
    spots = list(zip(np.interp(axis(xs), axis(xs[[0, -1]]), [left, right]), height(ys)))
    draw.line(spots, colour, 2)
    for (x, y), low, high in zip(spots, height(ys - spreads), height(ys + spreads)):
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], colour)
        draw.line([(x, low), (x, high)], colour)
    return image


def thumbnail(path, side):
    """A photo in its own shape, its longer side of `side` pixels."""
    return Image.fromarray(data.decode(path, side, square=False)[0])


def grid_picture(found, find, fonts, side=150):
    """Words above their photos, {word: {name: score}}; find(name) is a photo's path (Fig. 3)."""
    columns = max(map(len, found.values()))
    image = Image.new("RGB", (columns * (side + 6) + 6, len(found) * (side + 56) + 6), "white")
    draw, small_font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for line, (word, photos) in enumerate(found.items()):
        top = 6 + line * (side + 56)
        draw.text((8, top + 20), word, INK, fonts.find(word, 20), "ls")
        for column, (name, score) in enumerate(photos.items()):
            left, photo = 6 + column * (side + 6), thumbnail(find(name), side)
            image.paste(photo, (left, top + 28 + side - photo.height))
            draw.text((left + 2, top + side + 31), f"{score:.2f}", INK, small_font)
    return image


def mosaic_picture(paths, y, size):
    """Photos at places (N, 2) in [0, 1]², each in the nearest free cell of a grid (Fig. 4)."""
    side = int(np.ceil(np.sqrt(1.5 * len(y))))                      # so that the shape shows
    each = max(1, size // side)                                     # pixels of a photo
    image = Image.new("RGB", (max(size, side), max(size, side)), "white")
    edge = (image.width - side * each) // 2
    cells = np.argwhere(np.ones((side, side)))                      # (side², 2)
    for path, spot in zip(paths, y * (side - 1)):
        nearest = ((cells - spot) ** 2).sum(axis=1).argmin()
        place = cells[nearest] * each + edge                        # left, top
        image.paste(Image.fromarray(data.decode(path, each)[0]), tuple(place.tolist()))
        cells = np.delete(cells, nearest, axis=0)
    return image


def words_picture(names, spots, weights, size, fonts):
    """Words at spots (N, 2) in [0, 1]², without overlaps (Fig. 6): an image, and SVG <text>s.

    The heaviest words come first and are largest; where others are in the way, a word moves along
    a spiral, and after 300 turns it is left out.
    """
    image, texts, boxes = Image.new("RGB", (size, size), "white"), [], np.zeros((0, 4))
    draw, spots, steps = ImageDraw.Draw(image), (0.05 + 0.9 * spots) * size, np.arange(300)
    spiral = np.stack([np.cos(2.4 * steps), np.sin(2.4 * steps)], 1) * (
        np.sqrt(steps) * size / 300)[:, None]                       # (300, 2), from the centre out
    largest = 0.65 * size / (6 + len(names) ** 0.5)
    for place, i in enumerate(np.argsort(-weights, kind="stable")):
        height = max(9, largest * (1 - 0.6 * place / len(names)))
        word, font, colour = names[i], fonts.find(names[i], height), COLOURS[len(texts) % 4]
        box = np.array(font.getbbox(word, "1", anchor="mm"))        # hinted: whole pixels
        tried = np.tile(spots[i] + spiral, 2) + box + (-2, -1, 2, 1)
        inside = (tried[:, :2] >= 0).all(axis=1) & (tried[:, 2:] <= size).all(axis=1)
        apart = ((tried[:, None, :2] >= boxes[:, 2:]) | (tried[:, None, 2:] <= boxes[:, :2]))
        good = np.flatnonzero(inside & apart.any(axis=2).all(axis=1))
        if len(good):
            boxes = np.vstack([boxes, tried[good[0]]])
            x, y = spots[i] + spiral[good[0]]
            draw.text((x, y), word, colour, font, "mm")
            texts.append(f'<text x="{x:.0f}" y="{y:.0f}" font-size="{height:.1f}" textLength="'
                         f'{box[2] - box[0]:.0f}" fill="rgb{colour}">{escape(word)}</text>')
    return image, texts


# ------------------------------------------------------------------ commands and their options

PARSER = console.Parser(description=console.summary(__doc__))
COMMANDS = PARSER.add_subparsers(required=True, metavar="COMMAND")


def command(name, options):
    """Make the function under this line a command, given options, an Output and the run(s)."""
    def register(function):
        says = console.summary(function.__doc__)
        parser = COMMANDS.add_parser(name, help=says, description=says)
        parser.set_defaults(function=function, out=None, all=False, deciles=False, layer=None)
        for option, settings in {**COMMON, **options}.items():
            parser.add_argument(option, **settings)
        return function
    return register


def name_output(option, ending="", required=True):
    """An option that names a file to write: its name ends so, and its folder takes files."""
    def check(path):
        if not path.lower().endswith(ending):
            raise argparse.ArgumentTypeError(f"{path}: its name must end in {ending}")
        folder = os.path.dirname(path) or "."
        if path != "-" and (os.path.isdir(path) or not os.access(folder, os.W_OK)):
            raise argparse.ArgumentTypeError(f"cannot write {path}; choose another place")
        return path
    return {option: dict(type=check, required=required, metavar="FILE" + ending,
                         help="the file to write" + ", or - " * (option == "--json"))}


WORDS = {"words": dict(nargs="+", metavar="WORD", help="words of the dictionary")}
TOP = {"--top": dict(type=number(int, 1), default=6, help="how many to show for each")}
FOLDER = {"--images": dict(required=True, metavar="DIR", help="folder of photos")}
IMAGES = {"--images": dict(metavar="DIR", help="folder of photos; the run's if not given")}
CAPTIONS = {"--captions": dict(metavar="FILE", help="captions; the run's if not given")}
FONT = {"--font": dict(type=Fonts, metavar="FILE", help="of words; else any with their letters")}
SPLITTING = {"--splits": dict(type=number(int, 1, 10_000), default=10, help="random splits"),
             "--train-share": dict(type=number(float, 0, 1), default=0.5, help="of each class"),
             "--train-per-class": dict(type=number(int, 1), help="instead: so many photos"),
             "--seed": dict(type=number(int, 0, below=2**63), default=0, help="of the splits")}
MAPPING = {"--limit": dict(type=number(int, 10, 100_000), default=2000, help="points at most"),
           "--perplexity": dict(type=number(float, 1), default=30, help="how many are near, about"),
           "--steps": dict(type=number(int, 1), default=1000, help="of gradient descent"),
           "--size": dict(type=number(int, 100, 20_000), default=1600, help="pixels of a side")}
COMMON = {"--model": dict(required=True, nargs=1, metavar="RUN", help="a run's folder, or an .npz"),
          "--workers": dict(type=number(int, 0, MOST_THREADS), default=2, help="threads to decode"),
          "--device": dict(choices=kernels.DEVICES, default="auto", help="where to compute"),
          "--threads": dict(type=number(int, 1, MOST_THREADS), help="threads that compute"),
          **name_output("--json", required=False)}


class Output:
    """Shows what a command found: on the terminal, in the picture file `out`, and as HTML."""

    def __init__(self, out=None):
        self.out, self.html = out, []

    def line(self, text):
        print(text)
        self.html.append(f'<p class="note">{escape(text)}</p>')

    def best(self, names, scores, others, top, least=-np.inf):
        """{name: {other: score}}: the `top` best of the others, none below `least`, by name."""
        result = {}
        for name, row, best in zip(names, scores, top_words(scores, top)):
            result[name] = {others[i]: float(row[i]) for i in best if row[i] >= least}
            text = ", ".join(f"{other} {value:.3g}" for other, value in result[name].items())
            print(f"{name}: {text or f'no word above {least:g}'}", flush=True)
            self.html.append(f"<p><b>{escape(name)}</b>: {escape(text)}</p>")
        return result

    def table(self, heading, rows):
        """A heading over rows of texts and numbers, {name: row}; the names are on the left."""
        rows = [[format(cell, {str: "", int: ","}.get(type(cell), ".4f")) for cell in row]
                for row in (heading, *((name, *row) for name, row in rows.items()))]
        widths = [max(map(len, column)) for column in zip(*rows)]
        for first, *rest in rows:
            print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip())
        lines = "</tr><tr>".join("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
                                 for tag, row in zip(["th"] + ["td"] * len(rows), rows))
        self.html.append(f'<div class="wide"><table><tr>{lines}</tr></table></div>')

    def picture(self, image, what, kind="png", html=None):
        """An image, into the file, or on the page: of that kind, or as this HTML."""
        if self.out:
            save_image(image, self.out)
            print(f"{self.out}: {what}")
        else:
            self.html.append(f'<div class="wide">{html or image_html(image, what, kind)}</div>')

    def photos(self, photos):
        """Photos beside each other on the page: (path, what it shows, HTML to stand under it)."""
        self.html.append('<div class="photos">' + "".join(
            f"<figure>{image_html(thumbnail(path, 200), what, 'jpeg')}<figcaption>{below}"
            "</figcaption></figure>" for path, what, below in photos) + "</div>")


def image_html(image, what, kind):
    """An <img> that holds the image itself."""
    packed = io.BytesIO()
    image.convert("RGB").save(packed, kind, quality=85, optimize=True)
    text = base64.b64encode(packed.getvalue()).decode()
    return f'<img class="{kind}" alt="{escape(what)}" src="data:image/{kind};base64,{text}">'


@functools.cache
class Trained:
    """A run's model, by default its best: `net`, `words`, `options`, `counts` (N_k)."""

    def __init__(self, run):
        self.run = run
        self.folder = os.path.dirname(run) or "." if os.path.isfile(run) else run
        weights, facts, self.words, line = model.load_best(run)
        print(line, file=sys.stderr, flush=True)
        self.classes = {word: i for i, word in enumerate(self.words)}
        self.options, self.training, self.log = map(facts.get, ("options", "training", "log"))
        if self.options["drawn"]:               # wherever the run's folder is now
            self.options |= data.drawn_sources(self.folder)
        self.counts = np.array(facts["counts"])
        self.recipe = model.NETWORKS[self.options["network"]]
        self.net = self.recipe.build(len(self.words), self.options["dropout"]).load(weights)

    def index(self, captions, words, valid, processes):
        """The index of the captions under a dictionary of these words; the run's own if it fits."""
        captions, options, folder = captions or self.options["captions"], self.options, self.folder
        text = data.Text(options["words"], options["stop_words"], valid)
        kind = (captions == options["captions"] and options["format"]) or data.recognise(captions)
        own = data.cached_index(captions, os.path.join(folder, "index"), text, kind)
        if own is not None and own.dictionary == words:
            return own
        if not os.access(folder, os.W_OK):
            self.spare = tempfile.TemporaryDirectory()              # until the end
            folder = self.spare.name
        return data.build_index(captions, f"{folder}/index-eval", text, kind, words, processes)

    def photos(self, options):
        """The folder and names of the photos: those of --images, or the held-out ones."""
        if options.images:
            return options.images, data.list_photos(options.images)
        index = self.index(None, self.words, self.options["valid"], options.workers)
        return self.options["images"], [index.name(i) for i in range(index.held_out)]

    def read(self, folder, names, workers, compute=None):
        """extract_features of a folder's photos: rows, names of those found, what is skipped."""
        if not names:
            raise ValueError("there is no photo: none is held out, or none has words of the model")
        size, crop, photos = self.recipe.size, self.recipe.crop, range(len(names))
        with (data.Loader(folder, names.__getitem__, 0, size, workers) as loader,
              console.Progress("photos", len(names)) as progress):
            rows, found = extract_features(self.net, loader, photos, crop, progress, compute)
        if skipped := [f"{name}: {why}" for name, why in loader.skipped.items()]:
            print(f"{len(skipped):,} of {len(names):,} photos cannot be read: "
                  + "; ".join(skipped[:10]) + "; …" * (len(skipped) > 10),
                  file=sys.stderr, flush=True)
        if not found:
            raise ValueError(f"none of the {len(names):,} photos can be read"
                             + f" from {folder!r}" * bool(folder))
        return rows, [names[i] for i in found], loader.skipped

    def find_words(self, words):
        """Classes of words as a person gives them."""
        names = [" ".join(data.words_of(word)) for word in words]
        for name in names:
            if name not in self.classes:
                close = [word for word in self.words if name and word.startswith(name)] + sorted(
                    difflib.get_close_matches(name, self.words, 9, 0.65),
                    key=lambda word: word[0] != name[0])            # the same first letter first
                raise ValueError(f"{name!r} is not among the model's {len(self.words):,} words, "
                                 f"which are in {self.folder}/words.txt; near in spelling: "
                                 + (", ".join(list(dict.fromkeys(close))[:3]) or "none"))
        return np.array([self.classes[name] for name in names], np.int32)

    def read_pairs(self, path, scored=False):
        """[(class, class[, score])] of a file's lines whose words are known; how many it has."""
        kind, pairs = "word<TAB>word" + "<TAB>score" * scored, []
        try:
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                lines = {place: line.strip() for place, line in enumerate(file, 1) if line.strip()}
        except OSError as error:
            raise ValueError(f"--pairs: {path}: {error.strerror}; it takes a file of {kind} lines"
                             ) from None
        for place, line in lines.items():
            one, two, score, *_ = [*(line.split("\t") if "\t" in line else line.split()), *" " * 3]
            try:
                score = float(score) if scored else 0
            except ValueError:
                score = np.nan
            if not np.isfinite(score) and place > 1:                # the first may be a heading
                raise ValueError(f"--pairs: line {place} of {path} is not {kind}: {line[:60]!r}")
            names = [" ".join(data.words_of(word)) for word in (one, two)]
            if np.isfinite(score) and all(name in self.classes for name in names):
                pairs.append((*map(self.classes.get, names), *[score] * scored))
        return pairs, len(lines)


@command("words", IMAGES | CAPTIONS | SPLITTING | name_output("--out", ".png", False) | {
    "--model": dict(required=True, metavar="RUN", nargs="+", help="trained runs' folders"),
    "--deciles": dict(action="store_true", help="AUC and AP by frequency of the words, too"),
    "--transfer": dict(nargs="+", metavar="DIR", help="accuracy of features, as `transfer`, too"),
    "--all": dict(action="store_true", help="score all photos, not the held-out ones")})
def predict_words(options, show, *runs):
    """Precision@k, AUC and AP of words for photos that were not trained on (Table 1, Fig. 2).

    Of several runs: on photos that none of them trained on, over the words that all of them know.
    """
    runs = sorted(runs, key=lambda run: run.training)
    words = [word for word in runs[-1].words if all(word in run.classes for run in runs)]
    if not words:
        raise ValueError("the runs' dictionaries have no word in common")
    index = runs[-1].index(options.captions, words, min(run.options["valid"] for run in runs),
                           options.workers)
    numbers = {index.name(i): i for i in range(len(index) if options.all else index.held_out)}
    images, result = options.images or runs[-1].options["images"], {}
    transfers = {f"transfer to {os.path.basename(os.path.normpath(path))}": path
                 for path in options.transfer or ()}
    for run in runs:
        x, found, skipped = run.read(images, list(numbers), options.workers)
        classes, output = run.find_words(words), model.Output(x.shape[1], len(words))
        output.w, output.b = run.net.output.w[classes], run.net.output.b[classes]
        result[run.run] = {"training_photos": run.training, **word_metrics(
            x, output, [index.words(numbers[name]) for name in found], run.counts[classes],
            run.counts[classes] / run.training, run.options["loss"]), "skipped": len(skipped)}
        for key, path in transfers.items():
            show.line(f"{run.run}: {key}")
            changed = argparse.Namespace(**{**vars(options), "images": path})
            rows = transfer_features(changed, show, run)["rows"]
            deviations = rows.get("± deviation", [0, 0])
            result[run.run] |= {key: rows["mean"][1], key + SPREAD: deviations[1]}
    last = result[runs[-1].run]
    if options.deciles:
        show.table(["words by frequency", "photos", *(f"{key}, {run}" for run in result
                                                       for key in ("AUC", "AP"))],
                   {name: [f"{part['photos']:,.0f}", *(row["deciles"][name][key] for row in
                           result.values() for key in ("auc", "map"))]
                    for name, part in last["deciles"].items()})
    if len(runs) == 1 and not show.out:
        print_words(last, show)
        return last
    keys = "training_photos", *_by_k(KS), "auc", *transfers
    show.table(["run", *keys], {run: [row[key] for key in keys] for run, row in result.items()})
    curve, chance = join_seeds(result.values(), keys), {**last["chance"], "auc": None}
    up = "precision@10", "auc", *transfers
    panels = [plot_picture(curve, keys[0], key, {"auc": "AUC, mean of words"}.get(key, key),
                           chance.get(key), np.log10) for key in up]
    show.picture(Image.fromarray(np.hstack(panels)), "against training photos: " + ", ".join(up))
    return {"runs": result, "words": len(words)}


def join_seeds(rows, keys):
    """Rows with as many training photos as one: means, and by key + SPREAD their deviations."""
    joined = {}
    for row in rows:
        joined.setdefault(row["training_photos"], []).append(row)
    return [{key: np.mean([row[key] for row in same]) for key in keys} | {
        key + SPREAD: np.std([row[key] for row in same], ddof=1) if len(same) > 1
        else same[0].get(key + SPREAD, 0) for key in keys} for same in joined.values()]


def print_words(result, show=Output()):
    """Show the numbers of `words` (Table 1)."""
    show.line("{photos:,} photos, {words:,} of {dictionary:,} words occur in them".format(**result))
    parts, ap = [result[key] for key in ("baseline", "chance", "ceiling")], result["chance"]["map"]
    rows = {key: [part[key] for part in (result, *parts)] for key in _by_k(KS)}
    show.table(["", "model", "frequent words", "chance", "ceiling"], rows | {
        "AUC, mean of words": [result["auc"], 0.5, 0.5, 1],
        "AP, mean of words": [result["map"], ap, ap, 1]})
    show.line(f"AUC of the most frequent third of the words {result['auc_frequent']:.4f}, "
              f"of the rarest third {result['auc_rare']:.4f}")


@command("tag", TOP | {
    "photos": dict(nargs="+", metavar="PHOTO", help="picture files, or folders of them"),
    "--threshold": dict(type=number(float, 0, 1), help="instead of --top: the least probability")})
def tag_photos(options, show, run):
    """The words of photos with probabilities: of one word among K, or after one-vs-all of each."""
    least, tags = options.threshold, {}
    top = options.top if least is None else len(run.words)
    names = [os.path.join(path, name) if name else path for path in options.photos
             for name in (data.list_photos(path) if os.path.isdir(path) else [""])]
    def tag(x, _, numbers):
        s = kernels.to_host(run.net.forward(x))                     # (n, K)
        p = expit(s) if run.options["loss"] == "one-vs-all" else softmax(s, axis=1)
        tags.update(show.best([names[i] for i in numbers], p, run.words, top, least or 0))
        return np.zeros((len(p), 0))                                # nothing to keep
    return {"tags": tags, "failed": run.read("", names, options.workers, tag)[2]}


@command("search", WORDS | IMAGES | TOP | FONT | name_output("--out", ".png"))
def search_photos(options, show, run):
    """The photos that score highest for a word, with their scores (Fig. 3)."""
    now = model.Pass(classes=run.find_words(options.words))
    folder, names = run.photos(options)
    s, found, skipped = run.read(folder, names, options.workers,
                                 lambda x, *_: kernels.to_host(run.net.forward(x, now)))
    best, find = Output().best(options.words, s.T, found, options.top), data.Folder(folder).find
    if show.out:
        show.picture(grid_picture(best, find, options.font or Fonts()), "photos for words")
    for word, scores in () if show.out else best.items():
        show.html.append(f"<h3>{escape(word)}</h3>")
        show.photos((find(name), f"{word}: {name}", f"{score:.2f}")
                    for name, score in scores.items())
    return {"words": best, "photos": len(found), "skipped": skipped}


@command("features", FOLDER | name_output("--out", ".npz") | {
    "--layer": dict(help="of that name, all its pixels; the last hidden one if not given"),
    "--crops": dict(type=int, choices=(1, 10), default=1,
                    help="central crop, or the mean of corners, centre and their mirror images")})
def write_features(options, show, run):
    """Features of a folder's photos, one crop or the mean of ten, into an .npz with their names."""
    names, net, crop = data.list_photos(options.images), run.net, run.recipe.crop
    def write(x, pixels, _):
        crops, n, spare = [x], len(pixels), pixels.shape[1] - crop
        if options.crops == 10:
            places = (0, 0), (0, spare), (spare, 0), (spare, spare), (spare // 2, spare // 2)
            crops = [kernels.prepare(pixels, np.full(n, top), np.full(n, left), np.full(n, flip),
                                     crop) for top, left in places for flip in (False, True)]
        x = sum(kernels.to_host(net.features(x, options.layer)) for x in crops) / len(crops)
        raw.write(x.astype(np.float32).tobytes())
        return np.zeros((n, 0))                                     # nothing to keep
    with tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(options.out))) as raw:
        _, found, skipped = run.read(options.images, names, options.workers, write)
        raw.flush()
        features = np.memmap(raw, np.float32, "r").reshape(len(found), -1)      # (N, D)
        with console.whole_file(options.out) as file:
            np.savez(file, names=np.array(found), features=features)
    show.line(f"{options.out}: features {features.shape} float32 and names")
    return {"photos": len(found), "numbers": features.shape[1], "skipped": skipped}


@command("transfer", FOLDER | SPLITTING | {
    "--layer": dict(help="of that name, the mean of its pixels; the last hidden one if not given")})
def transfer_features(options, show, run):
    """Regression on features: DIR/class/*.jpg, or a Pascal VOC folder (Fig. 5, Tables 2 to 4)."""
    voc = os.path.isdir(os.path.join(options.images, "JPEGImages"))
    labels = read_voc(options.images) if voc else {
        name: name.split(os.sep)[0] for name in data.list_photos(options.images) if os.sep in name}
    list_tasks, measure = (list_classes, voc_ap) if voc else (
        list_splits, lambda scores, y: float((scores.argmax(axis=1) == y).mean()))  # accuracy
    list_tasks(list(labels.values()), options)                      # may fail: before the work
    x, found, skipped = extract_views(options, run, list(labels))
    tasks, rows = list_tasks([labels[name] for name in found], options), {}
    def regress(i, view):
        _, y, train, test = tasks[i]
        held = split(y[train], lambda n: min(n - 1, max(1, round(HELD * n))), options.seed,
                     2 * i + 1)
        mean = x[view][train].mean(axis=0, dtype=np.float64)
        features = units((x[view] - mean).astype(np.float32))       # so one λ suits all
        table, _ = choose_penalty(features[train], y[train], held, measure)
        return measure(predict(table, features[test]), y[test])
    with (ThreadPoolExecutor(kernels.threads.count) as pool,        # at Ctrl-C map cancels its work
          console.Progress("regressions", len(tasks), "tasks") as progress):
        values = pool.map(regress, *zip(*((i, view) for i in range(len(tasks)) for view in VIEWS)))
        for name, y, train, test in tasks:
            chance = float(y[test].mean()) if voc else 1 / float(y.max() + 1)
            rows[name] = [chance, *itertools.islice(values, len(VIEWS))]
            progress.tick()
    columns, values = ["chance", *VIEWS], np.array(list(rows.values()))
    rows["mean"] = values.mean(axis=0).tolist()
    if len(values) > 1:
        rows["± deviation"] = values.std(axis=0, ddof=1).tolist()
    show.line(f"{len(found):,} photos; {train.sum():,} to train and {test.sum():,} to test")
    show.table(["average precision" if voc else "accuracy", *columns], rows)
    return {"columns": columns, "rows": rows, "photos": len(found), "skipped": skipped}


def extract_views(options, run, names):
    """{view: (N, D)} of the photos by each of VIEWS, the names of those found, the skipped."""
    nets = run.net, run.recipe.build(len(run.words), 0).init(run.options["seed"])
    def compute(x, pixels, _):
        raw = [np.asarray(Image.fromarray(photo).resize((RAW, RAW), Image.Resampling.BOX)).ravel()
               for photo in pixels]
        y = [kernels.to_host(net.features(x, options.layer)) for net in nets]
        return np.hstack([*(e.mean(axis=tuple(range(1, e.ndim - 1))) for e in y), raw])
    x, found, skipped = run.read(options.images, names, options.workers, compute)
    e = (x.shape[1] - 3 * RAW * RAW) // 2                           # x (N, 2 E + 3 RAW²)
    return dict(zip(VIEWS, np.split(x, (e, 2 * e), axis=1))), found, skipped


def list_splits(labels, options):
    """(name, classes (N,), photos to train on, photos to test on) of each random split."""
    classes, y = np.unique(labels, return_inverse=True)
    counts, least = np.bincount(y, minlength=1), (options.train_per_class or 2) + 1
    if len(classes) < 2 or counts.min() < least:
        found = ", ".join(f"{name} {count}" for name, count in zip(classes, counts)) or "none"
        raise ValueError(f"--images: two or more sub-folders of {least} or more photos are needed, "
                         f"to train, choose and test; there are {found}")
    count, share = options.train_per_class, options.train_share
    trains = [split(y, lambda n: count or min(n - 1, max(2, round(share * n))), options.seed, 2 * i)
              for i in range(options.splits)]
    return [(f"split {i}", y, train, ~train) for i, train in enumerate(trains, 1)]


def read_voc(folder):
    """{photo: (is it for training, {class: 1, 0 if difficult, -1 if not there})} of VOC's lists."""
    labels, lists = {}, os.path.join(glob.escape(folder), "ImageSets", "Main")
    for path in glob.glob(f"{lists}/*_trainval.txt") + glob.glob(f"{lists}/*_test.txt"):
        name, _, part = os.path.basename(path).removesuffix(".txt").rpartition("_")
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in filter(str.strip, file):
                photo, label = [*line.split(), "", ""][:2]
                if label not in ("-1", "0", "1") or data.refused(photo):
                    raise ValueError(f"--images: a line of {path} is not the name of a photo in "
                                     f"JPEGImages and 1, 0 or -1: {line.strip()[:60]!r}")
                photo = os.path.join("JPEGImages", photo + ".jpg")
                labels.setdefault(photo, (part == "trainval", {}))[1][name] = int(label)
    return labels


def list_classes(labels, _):
    """(class, 1 where it is (N,), photos to train on, photos to test on) of each VOC class."""
    tasks, part = [], np.array([train for train, _ in labels])
    for name in sorted(set().union(*(classes for _, classes in labels))):
        label = np.array([classes.get(name, 0) for _, classes in labels])
        y, train, test = (label > 0).astype(int), part & (label != 0), ~part & (label != 0)
        if min(np.bincount(y[train], minlength=2)) > 1 and min(np.bincount(y[test], minlength=2)):
            tasks.append((name, y, train, test))
    if not tasks:
        raise ValueError("--images: ImageSets/Main lists for no class two photos with it and two "
                         "without to train on, and both kinds to test")
    return tasks


@command("similar", {
    "--pairs": dict(nargs="+", required=True, metavar="FILE", help="word<TAB>word<TAB>score")})
def compare_similarity(options, show, run):
    """Spearman's ρ of the cosines of the words' vectors with human scores (Table 5)."""
    vectors, result = units(kernels.to_host(run.net.output.w)), {}
    for path in options.pairs:
        pairs, count = run.read_pairs(path, scored=True)
        rho = p = float("nan")
        if len(pairs) > 2:
            one, two, human = map(np.array, zip(*pairs))
            rho, p = map(float, spearmanr((vectors[one] * vectors[two]).sum(axis=1), human))
        result[os.path.basename(path)] = {"rho": rho, "p": p, "covered": len(pairs), "of": count}
    if all(row["covered"] < 3 for row in result.values()):
        raise ValueError("--pairs: of no file the model knows both words of 3 pairs")
    show.table(["word pairs", "Spearman's ρ", "p-value", "covered", "of"], {
        name: (row | {"p": f"{row['p']:.2g}"}).values() for name, row in result.items()})
    return result


@command("neighbors", WORDS | TOP)
def find_neighbors(options, show, run):
    """The words whose vectors are nearest to a word's, by cosine."""
    classes = run.find_words(options.words)
    vectors = units(kernels.to_host(run.net.output.w))
    cosines = cpu.matmul(vectors[classes], vectors.T)               # (words, K)
    cosines[np.arange(len(classes)), classes] = -np.inf
    return {"neighbors": show.best(options.words, cosines, run.words, options.top, least=-1)}


@command("translate", {
    "--pairs": dict(required=True, metavar="FILE", help="word<TAB>its translation"),
    "--csls": dict(action="store_true", help="correct the cosine for hubs")})
def translate_words(options, show, run):
    """Precision@k of finding a word's translation by its vector's nearest (Tables 6 and 7)."""
    known, count = run.read_pairs(options.pairs)
    pairs = np.array(sorted({pair for pair in known if pair[0] != pair[1]}))
    if len(pairs) < 2:
        raise ValueError(f"--pairs: the model knows both words of {len(pairs)} of {count:,} pairs "
                         "(not counting pairs of one word); it takes 2")
    (sources, rows), (targets, columns) = (np.unique(side, return_inverse=True) for side in pairs.T)
    vectors = units(kernels.to_host(run.net.output.w))
    scores = cpu.matmul(vectors[sources], vectors[targets].T)       # (S, T)
    scores = csls(scores) if options.csls else scores
    scores[np.equal.outer(sources, targets)] = -np.inf              # a word is not its translation
    right = csr_array((np.ones(len(pairs), bool), (rows, columns)), scores.shape).toarray()
    ways = {"forward": retrieval(scores, right), "backward": retrieval(scores.T, right.T)}
    alike, nearest = len(set(known)) - len(pairs), scores.argmax(axis=1)        # (S,)
    found = [f"{run.words[sources[i]]} {run.words[targets[j]]}" + " !" * (not right[i, j])
             for i, j in enumerate(nearest)]
    show.line(f"{len(pairs):,} pairs of {len(sources):,} and {len(targets):,} words that the model "
              f"knows, of {count:,}; {alike:,} spelt alike are left out")
    heading = "by CSLS" if options.csls else "by cosine", "forward", "chance", "backward", "chance"
    show.table(heading, {key: [part[key] for way in ways.values() for part in (way, way["chance"])]
                         for key in _by_k(KS)})
    best = show.best(["best pairs (! is wrong)"], scores.max(axis=1)[None], found, 12)
    return {"pairs": len(pairs), "alike": alike, **ways, "best": best}


@command("map", IMAGES | MAPPING | FONT | name_output("--out", ".png") | {
    "--words": dict(action="store_true", help="a map of words, not of photos")})
def draw_map(options, show, run):
    """A map by t-SNE: photos by their features (Fig. 4), or words by their vectors (Fig. 6)."""
    if options.words:
        most = np.argsort(-run.counts, kind="stable")[:options.limit]
        x, skipped = kernels.to_host(run.net.output.w)[most], {}
    else:
        folder, names = run.photos(options)
        spread = np.linspace(0, len(names) - 1, min(len(names), options.limit)).astype(int)
        names = [names[i] for i in spread]
        x, found, skipped = run.read(folder, names, options.workers)
    if len(x) < 10:
        raise ValueError(f"a map of {len(x)} points is none; it takes 10 or more")
    perplexity = min(options.perplexity, (len(x) - 1) / 3)
    y, kl = tsne(units(kernels.to_host(x)), perplexity, options.steps)
    y = (y - y.min(axis=0)) / np.maximum(np.ptp(y, axis=0), 1e-12)
    show.line(f"{len(x):,} {'words' if options.words else 'photos'}, perplexity {perplexity:g}, "
              f"KL divergence {kl:.4f}")
    if options.words:
        fonts, size = options.font or Fonts(), options.size if show.out else min(options.size, 800)
        names = [run.words[i] for i in most]
        image, texts = words_picture(names, y, run.counts[most], size, fonts)
        if len(texts) < len(x):
            show.line(f"{len(x) - len(texts):,} words have no room; --size has more")
        svg = f'<svg viewBox="0 0 {size} {size}">{"".join(texts)}</svg>'
        show.picture(image, "a map of words", html=svg)
    else:
        image = mosaic_picture(map(data.Folder(folder).find, found), y, options.size)
        show.picture(image, "a map of photos", "jpeg")
    return {"points": len(x), "perplexity": perplexity, "kl": kl, "skipped": skipped}


STYLE = """
:root { color-scheme: light dark } h1 { line-height: 1.2 } h1, p { overflow-wrap: anywhere }
body { font: 17px/1.5 Georgia, serif; max-width: 46rem; margin: 0 auto; padding: 1rem }
h2 { margin: 2.2rem 0 .4rem } h3, p { margin: .5rem 0 } .note { font-size: .9rem }
.note, s { opacity: .75 } table, figure { font: 14px/1.4 sans-serif; margin: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse } td { white-space: nowrap }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8886 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
img, svg { display: block; max-width: 100%; height: auto; margin: .5rem auto }
svg { font-family: sans-serif; text-anchor: middle; dominant-baseline: central }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .8rem }
.png, svg { min-width: 40rem } td { font-variant-numeric: tabular-nums }
@media (prefers-color-scheme: dark) { .png, svg { filter: invert(.93) hue-rotate(180deg) } }
@media print { body { font-size: 10.5pt; max-width: none } h2, h3, .note { break-after: avoid }
  img, svg { max-height: 17cm; min-width: 0 } img, svg, table, figure { break-inside: avoid }
  .wide { overflow: visible } td { white-space: normal } }
"""


def show_examples(options, show, run):
    """Held-out photos with the model's words, ✓ where their captions have them, ✗ where not."""
    index = run.index(options.captions, run.words, run.options["valid"], options.workers)
    numbers = {index.name(i): i for i in range(min(100, index.held_out))}
    folder, result, figures = options.images or run.options["images"], {}, []
    s, found, _ = run.read(folder, list(numbers), options.workers,
                           lambda x, *_: kernels.to_host(run.net.forward(x)))
    for name, best in zip(found[:12], top_words(s, 5)):
        true = [run.words[i] for i in index.words(numbers[name])]
        best, carried = [run.words[i] for i in best], ", ".join(true)
        lines = [f"<b>✓ {escape(w)}</b>" if w in true else f"<s>✗ {escape(w)}</s>" for w in best]
        figures.append((data.Folder(folder).find(name), f"a photo of: {carried}",
                        f"{'<br>'.join(lines)}<p>Its words: {escape(carried)}</p>"))
        result[name] = {"best": best, "words": true}
        print(f"{name}: {', '.join(best)}; its words are {carried}")
    show.photos(figures)
    return result


def show_run(options, show, run):
    """What the run was trained on, how, how long, and its learning curves."""
    log, hidden = run.log, ("images", "captions", "out", "drawn", "resume", "device")
    photos = run.options["batch"] * np.diff([row["step"] for row in log], prepend=0)
    seconds = sum(photos / [row["images_per_second"] for row in log])
    show.line(f"{run.training:,} training photos, {len(run.words):,} words; epochs: "
              f"{len(log)}, {photos.sum():,} photos in {console.duration(seconds)} of training")
    show.line(", ".join(f"--{key.replace('_', '-')} {value}" for key, value in
                        run.options.items() if value is not None and key not in hidden))
    show.picture(curves_picture(log), "learning curves: loss, precision and AUC after each epoch")
    return {"epochs": len(log), "photos": int(photos.sum()), "seconds": seconds}


@command("report", CAPTIONS | IMAGES | SPLITTING | MAPPING | FONT
         | name_output("--out", ".html") | {
    "words": dict(nargs="*", metavar="WORD", help="words to search photos for"),
    "--series": dict(nargs="+", metavar="RUN", help="runs for `words` side by side"),
    "--pairs-similar": dict(nargs="+", metavar="FILE", help="as `similar --pairs`"),
    "--translate": dict(metavar="FILE", help="as `translate --pairs`"),
    "--transfer": dict(nargs="+", metavar="DIR", help="as `transfer --images`")})
def write_report(options, show, run):
    """All experiments that the options allow, in one HTML file with its pictures inside."""
    some = {"words": options.words or run.words[:8], "top": 6}
    parts = [                                   # title, command, changed options
        ("The model at work", show_examples, {}),
        ("The run", show_run, {}),
        ("Word prediction", predict_words, {"transfer": ()}),
        ("More photos", predict_words, {"model": options.series}),
        ("Photos for words", search_photos, some),
        ("A map of photos", draw_map, {"words": False}),
        ("A map of words", draw_map, {"words": True}),
        ("Nearest words", find_neighbors, some),
        ("Similar words", compare_similarity, {"pairs": options.pairs_similar}),
        *(("Translation" + ", corrected for hubs" * csls, translate_words,
           {"pairs": options.translate, "csls": csls}) for csls in (False, True)),
        *((f"Transfer to {os.path.normpath(path)}", transfer_features, {"images": path})
          for path in options.transfer or ())]
    page, failed, result = Output(), {}, {}
    for title, function, changes in parts:
        if None in changes.values():            # an option that is not given
            continue
        print(f"\n{title}", flush=True)
        note = console.summary(function.__doc__)
        page.html.append(f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>')
        changed = argparse.Namespace(**{**vars(options), **changes})
        try:
            result[title] = function(changed, page, *map(Trained, changed.model))
        except (ValueError, OSError) as error:
            failed[title] = str(error)
            page.html.append(f'<p class="wrong">{escape(str(error))}</p>')
            print(f"{title}: {error}", file=sys.stderr)
    name = escape(os.path.basename(os.path.abspath(run.run)))
    with console.whole_file(options.out, "w", encoding="utf-8", errors="replace") as file:
        file.write('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
                   f'content="width=device-width"><title>{name}</title><style>{STYLE}</style>'
                   f"<h1>What {name} learned from captions</h1>" + "\n".join(page.html) + "\n")
    show.line(f"\n{options.out}: {os.path.getsize(options.out) / 1e6:.1f} MB")
    return {"parts": result, "failed": failed}


def main():
    options = PARSER.parse_args()
    if options.threads:
        kernels.threads.start(options.threads)
    print(kernels.use(options.device, "fp32"), file=sys.stderr)     # distances cancel in TF32
    with redirect_stdout(sys.stderr if options.json == "-" else sys.stdout):
        result = options.function(options, Output(options.out), *map(Trained, options.model))
    if options.json:
        console.write_json(options.json, result)
    return 1 if result.get("failed") else 0


if __name__ == "__main__":
    console.run_command(main)
