"""The paper's experiments on a trained run, using the model, and the pictures of a run.

    python eval.py words     --model RUN [RUN ...]           precision@k, AUC, AP (Table 1, Fig. 2)
    python eval.py tag       --model RUN PHOTO...            words for photos
    python eval.py search    --model RUN WORD... --out PNG   the best photos for words (Fig. 3)
    python eval.py features  --model RUN --images DIR --out FILE.npz
    python eval.py transfer  --model RUN --images DIR        DIR/class/*.jpg, or Pascal VOC (Fig. 5)
    python eval.py similar   --model RUN --pairs FILE...     word<TAB>word<TAB>score (Table 5)
    python eval.py translate --model RUN --pairs FILE        word<TAB>word (Tables 6 and 7)
    python eval.py neighbors --model RUN WORD...             nearest words
    python eval.py map       --model RUN [--words] --out PNG t-SNE of photos or words (Figs. 4, 6)
    python eval.py report    --model RUN --out FILE.html     all of it on one page

RUN is the run's folder, as weak.py made it. Fractions, not percent, everywhere. The order here:
metrics, regression, maps, word vectors, pictures, commands, transfer, report, options.
"""
import argparse
import base64
import difflib
import errno
import functools
import html
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from xml.etree import ElementTree

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # while the rest is imported

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.linalg import eigh
from scipy.optimize import minimize
from scipy.special import expit, softmax
from scipy.stats import rankdata, spearmanr

import data
import kernels
import model
from kernels import cpu, ranks

BATCH = 64                      # photos a forward pass: this is about memory, not results
BLOCK = 20_000_000              # scores held at a time
MOST_WORKERS = 4 * (os.cpu_count() or 1)
KS = (1, 5, 10)                 # precision@k


# ---------------------------------------------------------------------------------- metrics

def target_rows(index, photos):
    """The classes of each photo's words: a list of arrays."""
    return [index.words(photo) for photo in photos]


def top_words(scores, k):
    """The k best-scored words of each photo, best first: (N, K) -> (N, k)."""
    k = min(k, scores.shape[1])
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]           # (N, k), unordered
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


def precision_at(best, rows, ks=KS):
    """Precision@k of each photo: the share of its k best-scored words that it carries (Table 1).

    best (N, max k) classes, best first; rows N arrays of classes -> (N, len(ks)); divided by k.
    """
    hits = np.array([np.isin(words, row) for words, row in zip(best, rows)]).reshape(len(rows), -1)
    return np.stack([hits[:, :k].sum(axis=1) / k for k in ks], axis=1)


def auc_and_ap(scores, carried):
    """Area under the ROC curve and average precision of each column.

    scores, carried (N, words): NaN for a word that all photos carry, or none. Ties count half in
    the AUC (it is the Mann-Whitney statistic); in the AP, the first of tied photos ranks first.
    """
    n = len(scores)
    positives = carried.sum(axis=0)
    both = (positives > 0) & (positives < n)
    with np.errstate(invalid="ignore", divide="ignore"):
        ranks = (rankdata(scores, axis=0) * carried).sum(axis=0)
        auc = (ranks - positives * (positives + 1) / 2) / (positives * (n - positives))
        hits = np.take_along_axis(carried, np.argsort(-scores, axis=0, kind="stable"), 0)
        precision = np.cumsum(hits, axis=0) / np.arange(1, n + 1)[:, None]
        ap = (precision * hits).sum(axis=0) / positives
    return np.where(both, auc, np.nan), np.where(both, ap, np.nan)


def word_metrics(features, output, rows, counts, loss_of):
    """What `words` reports, from features (N, E) and each photo's classes; a plain dictionary.

    counts: N_k, the training photos of each word, for the baseline and for the split into the
    most frequent and the rarest third of the words. `loss` is the mean of loss_of (of
    model.LOSSES) over the photos and all K words.
    """
    n, k = len(rows), len(counts)
    sizes = np.array([len(row) for row in rows])
    precision, loss = np.zeros((n, len(KS))), 0.0
    for start in range(0, n, max(1, BLOCK // k)):
        part = rows[start:start + max(1, BLOCK // k)]
        scores = output.forward(features[start:start + len(part)])
        best = top_words(kernels.to_host(scores), max(KS))
        precision[start:start + len(part)] = precision_at(best, part)
        loss += float(loss_of(scores, data.pad_rows(part), loss_of.photo_weights(part) / n)[0])
    auc, ap = _by_word(features, output, rows, k)
    order = np.argsort(-counts, kind="stable")
    third = max(1, k // 3)
    baseline = precision_at([order[:max(KS)]] * n, rows).mean(axis=0)
    return {
        **{f"precision@{at}": float(value) for at, value in zip(KS, precision.mean(axis=0))},
        "auc": _mean(auc), "map": _mean(ap), "loss": loss,
        "auc_frequent": _mean(auc[order[:third]]), "auc_rare": _mean(auc[order[-third:]]),
        "photos": n, "words": int(np.isfinite(auc).sum()), "dictionary": k,
        "ceiling": {f"precision@{at}": float(np.minimum(sizes, at).mean() / at) for at in KS},
        "baseline": {f"precision@{at}": float(value) for at, value in zip(KS, baseline)},
        "chance": {**{f"precision@{at}": float(sizes.mean() / k * min(at, k) / at) for at in KS},
                   "auc": 0.5, "map": float(sizes.sum() / n / max(1, np.isfinite(auc).sum()))},
    }


def _by_word(features, output, rows, k):
    """AUC and AP of all K words, a block of words at a time: all scores would not fit."""
    n = len(rows)
    photo, word = np.repeat(np.arange(n), [len(row) for row in rows]), np.concatenate(rows)
    auc, ap = np.full(k, np.nan), np.full(k, np.nan)
    for start in range(0, k, max(1, BLOCK // 4 // n)):
        stop = min(k, start + max(1, BLOCK // 4 // n))
        part = kernels.matmul(features, output.w[start:stop].T) + output.b[start:stop]
        mine = (word >= start) & (word < stop)
        carried = np.zeros((n, stop - start), bool)
        carried[photo[mine], word[mine] - start] = True
        auc[start:stop], ap[start:stop] = auc_and_ap(kernels.to_host(part), carried)
    return auc, ap


def _mean(values):
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def features_of(net, loader, photos, crop, tick=None):
    """Features (N, E) of the photos that can be read, central crop, and which photos those are."""
    net.at(model.Pass())                        # scores of all words again, after training on some
    plans = (data.Listed(photos[i:i + BATCH]) for i in range(0, len(photos), BATCH))
    found, parts = [], []
    for plan, pixels in loader.batches(plans):
        good = np.flatnonzero(plan.weights)
        if len(good):
            pixels = pixels[good]
            where = data.centre(len(good), pixels.shape[1] - crop)
            parts.append(net.features(kernels.prepare(pixels, *where, crop)))
            found += [plan.photos[i] for i in good]
        if tick:
            tick(len(plan.photos))
    return (np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)), found


# ------------------------------------------------------------------ regression (paper, §5.2)

STRENGTHS = 10.0 ** np.arange(-1, -7, -1)       # λ to choose from, strongest first
HELD = 0.2                                      # share of the training photos that chooses λ
FIT = {"maxiter": 300, "maxcor": 10, "gtol": 1e-5, "ftol": 1e-8}
STREAM = 4                                      # of Philox: nobody else's counters


def logistic(flat, x, y, strength):
    """Multinomial logistic regression with an L2 penalty: loss and gradient, in float64.

    ℓ = -1/N Σ_n log p_n,y(n) + λ/2 |w|² with p = softmax(x w + b), so ∂ℓ/∂s = (p - [y]) / N for
    the scores s, and ∂ℓ/∂w = xᵀ ∂ℓ/∂s + λ w. x (N, D), y (N,) classes; flat is w (D, C) with the
    row b (C,) under it, which is not penalised.
    """
    n, d = x.shape
    table = flat.reshape(d + 1, -1)                                 # (D+1, C)
    w, s = table[:d], cpu.matmul(x, table[:d]) + table[d]           # (N, C)
    s -= s.max(axis=1, keepdims=True)
    picked = s[np.arange(n), y]
    p = np.exp(s, out=s)
    total = p.sum(axis=1, keepdims=True)
    loss = (np.log(total[:, 0]) - picked).mean() + strength / 2 * (w * w).sum()
    p /= total
    p[np.arange(n), y] -= 1
    p /= n
    gradient = np.vstack([cpu.matmul(x.T, p) + strength * w, p.sum(axis=0)])
    return loss, gradient.ravel()


def fitted(x, y, classes, strength, start=None):
    """The table (D+1, C) of w and b that minimises `logistic`, by L-BFGS from `start`."""
    start = np.zeros((x.shape[1] + 1, classes)) if start is None else start
    found = minimize(logistic, start.ravel(), (x, y, strength), "L-BFGS-B", True, options=FIT)
    return found.x.reshape(start.shape)


def scores_of(table, x):
    """x w + b, (N, C)."""
    return cpu.matmul(x, table[:-1]) + table[-1]


def chosen(x, y, classes, held, goodness):
    """The fit on all rows with the λ whose fit on the others is best on the `held` rows, and λ.

    goodness(scores, y) -> float; each fit starts from the one of the next stronger λ.
    """
    table, best = None, (-np.inf,)
    for strength in STRENGTHS:
        table = fitted(x[~held], y[~held], classes, strength, table)
        value = goodness(scores_of(table, x[held]), y[held])
        if value > best[0]:
            best = value, strength, table
    return fitted(x, y, classes, *best[1:]), best[1]


def accuracy(scores, y):
    """Share of the rows whose best-scored class is theirs."""
    return float((scores.argmax(axis=1) == y).mean())


def drawn(y, take, seed, number):
    """Boolean (N,): take(n) of each class's n rows at random, a function of (seed, number)."""
    order = np.argsort(cpu.philox(seed, (0, number, 0, STREAM), len(y)), kind="stable")
    mask = np.zeros(len(y), bool)
    for one in np.unique(y):
        mine = order[y[order] == one]
        mask[mine[:take(len(mine))]] = True
    return mask


def held_share(n):
    """How many of n training rows of a class choose λ: at least one, and never all."""
    return min(n - 1, max(1, round(HELD * n)))


def scaled(x, rows):
    """Features as float64, less their mean over the given rows, each row then of length 1.

    So the same λ suit every layer, and raw pixels. (Of five scalings, each feature's own deviation
    among them, this was the best one or near it, for trained, untrained and raw alike.)
    """
    x = x.astype(np.float64)
    return units(x - x[rows].mean(axis=0))


def precision_recall(scores, positive):
    """Precision and recall after each photo, best-scored first: two (N,)."""
    hits = np.cumsum(positive[np.argsort(-scores, kind="stable")])
    return hits / np.arange(1, len(scores) + 1), hits / max(1, hits[-1])


def voc_ap(scores, positive):
    """Average precision as Pascal VOC has it: by 11 points (2007) and by area (from 2010 on).

    The precision at a recall is the highest one at that or any greater recall. 11 points: its mean
    at recalls 0, 0.1, … 1. Area: its integral over the recall.
    """
    precision, recall = precision_recall(scores, positive)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    points = np.searchsorted(recall, np.arange(11) / 10 - 1e-12)
    eleven = np.where(points < len(recall), envelope[np.minimum(points, len(recall) - 1)], 0).mean()
    return float(eleven), float((np.diff(recall, prepend=0) * envelope).sum())


# ----------------------------------------------------- maps (van der Maaten and Hinton 2008)

EXAGGERATION, EXAGGERATED = 4, 100              # P is larger by that factor, for so many steps
MOMENTUM = ((250, 0.5), (np.inf, 0.8))          # (until step, momentum)
SHOWN = 100                                     # steps between two lines with the divergence
COMPONENTS = 50                                 # principal components that distances are taken of
FAR = 1e20                                      # the squared distance of a point from itself


def row_blocks(n):
    """Slices of rows, n numbers each: a block stays in a core's cache, or fills a GPU."""
    size = max(1, (1 << 18 if kernels.memory() is None else 1 << 25) // n)
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


def principal(x, count):
    """The coordinates of x (N, D) along its first principal components, (N, ≤ count), float32."""
    x = np.asarray(x, np.float32) - x.mean(axis=0, dtype=np.float64).astype(np.float32)
    count = min(count, *x.shape)
    _, axes = eigh(cpu.matmul(x.T, x), subset_by_index=(x.shape[1] - count, x.shape[1] - 1))
    return x @ axes[:, ::-1].astype(np.float32)                     # (N, count), widest first


def conditional(d, perplexity, steps=40):
    """p_j|i ∝ exp(-β_i d_ij), each β_i by bisection so that the row's entropy is ln perplexity.

    d (B, N) squared distances of about 1, FAR for a point itself (2008, §2).
    """
    d = d - d.min(axis=1, keepdims=True)                            # changes no p_j|i
    beta = np.ones_like(d[:, :1])
    low, high = np.zeros_like(beta), np.full_like(beta, np.inf)
    for _ in range(steps):
        p = np.exp(-d * beta)
        total = p.sum(axis=1, keepdims=True)
        entropy = np.log(total) + beta * (d * p).sum(axis=1, keepdims=True) / total
        wide = entropy > np.log(perplexity)                         # β must grow
        low, high = np.where(wide, beta, low), np.where(wide, high, beta)
        beta = np.where(np.isinf(high), beta * 2, (low + high) / 2)
    return p / total


def affinities(x, perplexity):
    """P (N, N) of points x (N, D): symmetric, sums to 1; p_ij = (p_j|i + p_i|j) / 2N."""
    n = len(x)
    p = np.empty_like(x, shape=(n, n))
    squares = (x * x).sum(axis=1)                                   # (N,)
    unit = squares.mean()                                           # distances of about 1
    for rows in row_blocks(n):
        d = squares[rows, None] + squares - 2 * kernels.matmul(x[rows], x.T)        # (B, N)
        d = np.maximum(d / unit, 0)
        d[np.arange(len(d)), np.arange(rows.start, rows.stop)] = FAR
        p[rows] = conditional(d, perplexity)
    for rows in row_blocks(n):                                      # in place, block by block
        rest = slice(rows.start, n)
        p[rows, rest] = (p[rows, rest] + p[rest, rows].T) / (2 * n)
        p[rest, rows] = p[rows, rest].T
    return p


def tsne_gradient(p, y, exaggeration=1, divergence=False):
    """∂KL(P‖Q)/∂y (N, 2) with exaggeration·P for P, and the divergence less Σ p log p, or None.

    n_ij = 1 / (1 + |y_i - y_j|²), q_ij = n_ij / Z, Z = Σ n over i ≠ j;
    ∂KL/∂y_i = 4 Σ_j (p_ij - q_ij) n_ij (y_i - y_j) (2008, eq. 5), here as pull and push, since Z
    is known at the end only; KL = Σ p log p - Σ p log n + log Z.
    """
    n, columns = len(y), np.ascontiguousarray(y.T)                  # (2, N)
    pull, push, z, cross = np.empty_like(y), np.empty_like(y), -n, 0
    for rows in row_blocks(n):
        apart = columns[:, rows, None] - columns[:, None]           # (2, B, N)
        near = np.reciprocal(1 + apart[0] * apart[0] + apart[1] * apart[1])         # (B, N)
        z = z + near.sum(dtype=np.float64)
        if divergence:
            cross = cross + (p[rows] * np.log(near)).sum(dtype=np.float64)
        pull[rows] = np.einsum("bn,abn->ba", p[rows] * near, apart)
        push[rows] = np.einsum("bn,abn->ba", np.square(near, out=near), apart)
    gradient = 4 * (exaggeration * pull - push / z).astype(y.dtype)
    return gradient, float(np.log(z) - cross) if divergence else None


def negative_entropy(p):
    """Σ p log p, 0 log 0 being 0."""
    return sum(float((p[rows] * np.log(np.maximum(p[rows], 1e-30))).sum(dtype=np.float64))
               for rows in row_blocks(len(p)))


def tsne(x, perplexity, steps, say=print):
    """Places (N, 2) for points x (N, D), and their KL divergence: exact t-SNE, float32.

    The first places are the two widest principal components, tiny; each coordinate has a gain that
    grows while its gradient keeps its sign (2008, §3.4). `say` gets lines.
    """
    x = kernels.to_device(principal(x, COMPONENTS))
    p = affinities(x, perplexity)
    known, n = negative_entropy(p), len(x)
    y = x[:, :2] * (1e-4 / x[:, 0].std())                           # (N, 2)
    velocity, gain = np.zeros_like(y), np.ones_like(y)
    rate, started = max(50, n / EXAGGERATION / 4), time.monotonic()
    for step in range(1, steps + 1):
        shown = step % SHOWN == 0 or step == steps
        gradient, kl = tsne_gradient(p, y, EXAGGERATION if step <= EXAGGERATED else 1, shown)
        turned = (gradient > 0) == (velocity > 0)                   # velocity is downhill
        gain = np.maximum(np.where(turned, gain * 0.8, gain + 0.2), 0.01)
        momentum = next(value for until, value in MOMENTUM if step <= until)
        velocity = momentum * velocity - rate * gain * gradient
        y = y + velocity
        y = y - y.mean(axis=0)
        each = (time.monotonic() - started) / step
        if step == 3:
            say(f"t-SNE: {n:,} points, {steps:,} steps, about {each * steps:.0f} s")
        if shown:
            say(f"t-SNE: step {step:,}, KL divergence {kl + known:.4f}, {1 / each:.0f} steps/s, "
                f"{each * (steps - step):.0f} s left")
    return kernels.to_host(y), float(kl + known)


# ------------------------------------------------------------ words as vectors (paper, §5.3)

def units(x):
    """Rows of length 1, (N, D): their products are cosines. A row of zeros stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def read_pairs(path, scored):
    """[(word, word)] or [(word, word, score)] of lines `word<TAB>word[<TAB>score]`.

    Blanks part columns where there is no tab; a heading is allowed. ValueError names the line.
    """
    form, rows = "word<TAB>word" + "<TAB>score" * scored, []
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise ValueError(f"--pairs: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--pairs: {path} is not text in UTF-8; save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        parts = [part.strip() for part in (line.split("\t") if "\t" in line else line.split())]
        try:
            if line.strip():
                rows.append((parts[0], parts[1], *([float(parts[2])] if scored else [])))
        except (IndexError, ValueError):
            if number > 1:
                raise ValueError(f"--pairs: {path}, line {number} is not {form}: {line[:60]!r}"
                                 ) from None
    if not rows:
        raise ValueError(f"--pairs: {path} has no line of {form}")
    return rows


def known_pairs(rows, words):
    """The rows whose two words are in the dictionary, as (class, class, …)."""
    place = {word: i for i, word in enumerate(words)}
    found = []
    for one, two, *rest in rows:
        names = [data.words_of(one), data.words_of(two)]
        if all(len(name) == 1 and name[0] in place for name in names):
            found.append((place[names[0][0]], place[names[1][0]], *rest))
    return found


def csls(cosines, k=10):
    """2 cos(x, y) - r(x) - r(y), r being the mean cosine with the k nearest of the other side.

    Rows (S) against columns (T); it takes from hubs, which are near to all (Conneau 2018, §2.3).
    """
    def nearness(c):
        k_ = min(k, c.shape[1])
        return np.partition(c, -k_, axis=1)[:, -k_:].mean(axis=1)
    return 2 * cosines - nearness(cosines)[:, None] - nearness(cosines.T)


def retrieval(scores, right, ks=KS):
    """Precision@k of finding a right column for each row, and chance: {"precision@k": …} twice.

    right (S, T) boolean. A row counts 1 if a right one is among its k best; chance is that of k
    columns drawn without replacement.
    """
    found = np.take_along_axis(right, top_words(scores, max(ks)), 1)            # (S, k)
    n, good = right.shape[1], right.sum(axis=1)
    missed = np.cumprod([np.maximum(n - good - i, 0) / max(1, n - i) for i in range(max(ks))], 0)
    return ({f"precision@{k}": float(found[:, :k].any(axis=1).mean()) for k in ks},
            {f"precision@{k}": float(1 - missed[k - 1].mean()) for k in ks})


# -------------------------------------------------------------------------------- pictures

INK, PALE, COLOURS = (40, 40, 40), (225, 225, 225), (
    (31, 98, 180), (214, 92, 20), (46, 140, 70), (140, 60, 150))


def filters_picture(w, path, scale=6):
    """The first layer's filters (KH, KW, 3, F), each stretched to full contrast, as a grid."""
    kh, kw, _, f = w.shape
    columns = int(np.ceil(np.sqrt(f)))
    low, high = w.min(axis=(0, 1, 2)), w.max(axis=(0, 1, 2))
    tiles = ((w - low) / np.maximum(high - low, 1e-12) * 255).astype(np.uint8)
    canvas = np.full((-(-f // columns) * (kh + 1) + 1, columns * (kw + 1) + 1, 3), 255, np.uint8)
    for i in range(f):
        top, left = i // columns * (kh + 1) + 1, i % columns * (kw + 1) + 1
        canvas[top:top + kh, left:left + kw] = tiles[..., i]
    Image.fromarray(canvas).resize((canvas.shape[1] * scale, canvas.shape[0] * scale),
                                   Image.Resampling.NEAREST).save(path)


def curves_picture(log, path):
    """The learning curves of a run's log: four panels over the epochs."""
    image = Image.new("RGB", (960, 640), "white")
    draw = ImageDraw.Draw(image)
    panels = [("training loss", "loss"), ("held-out loss", "validation_loss"),
              ("held-out precision@10", "precision@10"), ("held-out AUC, mean of words", "auc")]
    for number, (title, key) in enumerate(panels):
        left, top = 70 + 480 * (number % 2), 50 + 310 * (number // 2)
        points = [(row["epoch"], row[key]) for row in log
                  if row.get(key) is not None and np.isfinite(row[key])]
        _plot(draw, (left, top, left + 380, top + 220), title, points, COLOURS[number])
    image.save(path)


def _plot(draw, box, title, points, colour, scale=float, unit="epoch"):
    """One pair of axes with one line through the points; scale(x) is where x lies."""
    font = ImageFont.load_default(14)
    left, top, right, bottom = box
    draw.text((left, top - 28), title, INK, font)
    draw.line([(left, top), (left, bottom), (right, bottom)], INK)
    if not points:
        return draw.text((left + 20, top + 20), "nothing to show", INK, font)
    xs, ys = zip(*points)
    low, high = min(ys), max(ys)
    spare = max(abs(low) * 0.05, 1e-9) * (high - low <= 1e-9 * abs(high))     # a flat line
    low, high = low - spare, high + spare
    wide = max(scale(xs[-1]) - scale(xs[0]), 1e-9)
    spots = [(left + (right - left) * (scale(x) - scale(xs[0])) / wide,
              bottom - (bottom - top) * (y - low) / (high - low)) for x, y in points]
    for i in range(5):
        height = bottom - (bottom - top) * i / 4
        draw.line([(left + 1, height), (right, height)], PALE)
        draw.text((left - 6, height), f"{low + (high - low) * i / 4:.4g}", INK, font, anchor="rm")
    draw.line([(left, bottom), (right, bottom)], INK)
    draw.text((left, bottom + 8), f"{xs[0]:,}", INK, font)
    draw.text((right, bottom + 8), f"{unit} {xs[-1]:,}", INK, font, anchor="ra")
    for (across, _), x in list(zip(spots, xs))[1:-1] if scale is not float else ():
        draw.text((across, bottom + 8), f"{x:,}", INK, font, anchor="ma")
    draw.line(spots, colour, 2)
    for x, y in spots:
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], colour)


def series_picture(points, title, path):
    """A number against a number of photos, with a logarithmic axis (Fig. 2 left)."""
    image = Image.new("RGB", (720, 420), "white")
    _plot(ImageDraw.Draw(image), (80, 50, 680, 350), title, points, COLOURS[0], np.log10, "photos")
    image.save(path)


def grid_picture(rows, side=150):
    """Rows of (label, [(picture, caption)]) under each other, each label above its pictures."""
    columns = max(len(found) for _, found in rows)
    image = Image.new("RGB", (columns * (side + 6) + 6, len(rows) * (side + 56) + 6), "white")
    draw, font, small_font = ImageDraw.Draw(image), *map(ImageFont.load_default, (20, 13))
    for number, (label, found) in enumerate(rows):
        top = 6 + number * (side + 56)
        draw.text((8, top + 2), label, INK, font)
        for column, (pixels, caption) in enumerate(found):
            left = 6 + column * (side + 6)
            image.paste(Image.fromarray(pixels).resize((side, side)), (left, top + 28))
            draw.text((left + 2, top + side + 31), caption, INK, small_font)
    return image


def free_cells(y, side):
    """The nearest free cell of a side × side grid for each point: (N, 2) -> (N, 2), none twice."""
    span = np.maximum(np.ptp(y, axis=0), 1e-12)
    spots = (y - y.min(axis=0)) / span * (side - 1)
    cells = np.argwhere(np.ones((side, side))).astype(np.float32)   # (side², 2)
    free, found = np.ones(len(cells), bool), np.empty(y.shape, int)
    for i, spot in enumerate(spots):
        away = ((cells - spot) ** 2).sum(axis=1)
        away[~free] = np.inf
        best = int(away.argmin())
        free[best], found[i] = False, cells[best]
    return found


def mosaic_side(count):
    """Cells along one side of a mosaic: half as many again as photos, so that its shape shows."""
    return int(np.ceil(np.sqrt(1.5 * count)))


def mosaic_picture(thumbnails, y, size):
    """Thumbnails (N, S, S, 3) at their places (N, 2), moved to free cells of a grid (Fig. 4)."""
    side = mosaic_side(len(y))
    each = thumbnails.shape[1]
    image = np.full((size, size, 3), 255, np.uint8)
    edge = (size - side * each) // 2
    for pixels, (column, row) in zip(thumbnails, free_cells(y, side) * each + edge):
        image[row:row + each, column:column + each] = pixels
    return Image.fromarray(image)


def words_picture(names, y, weights, size):
    """Words at their places (N, 2) without overlaps (Fig. 6): the picture, and how many found room.

    The heaviest words come first and are largest; where others are in the way, a word moves along
    a spiral, and after 300 turns it is left out.
    """
    image = Image.new("RGB", (size, size), "white")
    draw, boxes = ImageDraw.Draw(image), np.zeros((0, 4))
    spots = (0.05 + 0.9 * (y - y.min(axis=0)) / np.maximum(np.ptp(y, axis=0), 1e-12)) * size
    steps = np.arange(300)
    spiral = np.stack([np.cos(2.4 * steps), np.sin(2.4 * steps)], 1) * (
        np.sqrt(steps) * size / 300)[:, None]                       # (300, 2), from the centre out
    order = np.argsort(-weights, kind="stable")
    largest = 0.65 * size / (6 + len(names) ** 0.5)
    for place, i in enumerate(order):
        font = ImageFont.load_default(max(9, largest * (1 - 0.6 * place / len(order))))
        left, top, right, bottom = draw.textbbox((0, 0), names[i], font, anchor="mm")
        tried = np.tile(spots[i] + spiral, 2) + (left - 2, top - 1, right + 2, bottom + 1)
        inside = (tried[:, :2] >= 0).all(axis=1) & (tried[:, 2:] <= size).all(axis=1)
        apart = ((tried[:, None, :2] >= boxes[:, 2:]) | (tried[:, None, 2:] <= boxes[:, :2]))
        good = np.flatnonzero(inside & apart.any(axis=2).all(axis=1))
        if len(good):
            boxes = np.vstack([boxes, tried[good[0]]])
            draw.text(tuple(spots[i] + spiral[good[0]]), names[i], COLOURS[place % 4], font, "mm")
    return image, len(boxes)


# -------------------------------------------------------------------------------- commands

class Trained:
    """A run's model: `net`, `words`, `options`, `counts` (N_k) and the pixels it wants."""

    def __init__(self, run):
        self.run = run
        weights, _, facts, self.words = model.load(os.path.join(run, "model.npz"))
        self.options, self.counts = facts["options"], np.array(facts["counts"])
        recipe = model.NETWORKS[self.options["network"]]
        self.size, self.crop = recipe.size, recipe.crop
        self.net = recipe.build(len(self.words), self.options["dropout"]).load(weights)
        self.one_vs_all = self.options.get("loss") == "one-vs-all"
        self.share = self.counts / facts.get("training", np.inf)    # of the training photos

    def loss_of(self, places=slice(None)):
        """The loss that the model was trained with, over all its words or those at some places."""
        return model.LOSSES[self.options.get("loss", "softmax")](self.share[places])

    def index(self, captions, processes):
        """The index of the captions under this model's dictionary; the run's own if it fits."""
        options = self.options
        captions = captions or options["captions"]
        text = data.Text(options["words"], options["stop_words"], options["valid"])
        kind = None if captions != options["captions"] else options["format"]
        kind = kind or data.recognise(captions)
        own = data.cached_index(captions, os.path.join(self.run, "index"), text, kind)
        if own is not None and own.dictionary.words == self.words:
            return own
        return data.build_index(captions, os.path.join(self.run, "index-eval"), text, kind,
                                data.Dictionary(self.words), processes)


def ticker(total, what, unit="photos"):
    """A function that counts and shows how far it is, with a rate and the time left."""
    started = time.monotonic()
    state = {"done": 0, "last": started}

    def tick(count):
        state["done"] += count
        now = time.monotonic()
        if now - state["last"] > (0.5 if sys.stderr.isatty() else 10):
            state["last"] = now
            rate = state["done"] / max(1e-9, now - started)
            end = "\r" if sys.stderr.isatty() else "\n"
            print(f"{what}: {state['done']:,} of {total:,} {unit}, {rate:.3g}/s, "
                  f"{(total - state['done']) / max(rate, 1e-9):.0f} s left  ", end=end,
                  file=sys.stderr, flush=True)
    return tick


@functools.cache
def opened(run):
    """The run's model; several parts of a report share it."""
    return Trained(run)


def show(rows):
    """Print a table: a heading and rows of texts, the first column on the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip())


def photos_in(folder):
    """Names of the picture files in a folder and below it, told by their ending, in order."""
    if not os.path.isdir(folder):
        raise ValueError(f"--images: there is no folder {folder}")
    endings = tuple(ending for ending, kind in Image.registered_extensions().items()
                    if kind in data.PICTURES)
    names = sorted(os.path.relpath(os.path.join(place, name), folder)
                   for place, _, files in os.walk(folder) for name in files
                   if name.lower().endswith(endings) and name[0] != ".")
    if not names:
        raise ValueError(f"--images: {folder} and its sub-folders hold no picture "
                         f"({', '.join(data.PICTURES).lower()})")
    return names


def photos_for(options, trained):
    """The folder and names of the photos: those of --images, or the run's held-out ones."""
    if options.images:
        return options.images, photos_in(options.images)
    index, folder = trained.index(None, options.workers), trained.options["images"]
    if not os.path.isdir(folder):
        raise ValueError(f"images: there is no folder {folder}; name one with --images")
    if not index.held_out:
        raise ValueError("the run held out no photo; name a folder of photos with --images")
    return folder, [index.name(i) for i in range(index.held_out)]


def decoded(trained, folder, names, workers, skipped):
    """(numbers, photos uint8 (n, S, S, 3)) of the photos that can be read, a batch at a time.

    `skipped` takes the others, {name: what is wrong}. Memory does not grow with their number.
    """
    loader = data.Loader(folder, names.__getitem__, 0, trained.size, BATCH, workers, trained.run)
    tick = ticker(len(names), "photos")
    plans = (data.Listed(range(start, min(start + BATCH, len(names))))
             for start in range(0, len(names), BATCH))
    try:
        for plan, pixels in loader.batches(plans):
            good = np.flatnonzero(plan.weights)
            if len(good):
                yield good + plan.photos[0], pixels[good]
            tick(len(plan.photos))
    finally:
        skipped.update(loader.skipped)
        loader.close()
    if skipped:
        some = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:10])
        print(f"eval.py: {len(skipped):,} of {len(names):,} photos cannot be read: {some}"
              + "; …" * (len(skipped) > 10), file=sys.stderr)
    if len(skipped) == len(names):
        raise ValueError(f"none of the {len(names):,} photos in {folder} can be read")


def central(net, pixels, crop):
    """Features (n, E) of decoded photos, central crop, as a NumPy array."""
    where = data.centre(len(pixels), pixels.shape[1] - crop)
    return kernels.to_host(net.features(kernels.prepare(pixels, *where, crop)))


def ten_crops(count, spare):
    """(top, left, flip) of the corners' crops and the centre's, and their mirror images."""
    for top, left in ((0, 0), (0, spare), (spare, 0), (spare, spare), (spare // 2, spare // 2)):
        for flip in (False, True):
            yield np.full(count, top), np.full(count, left), np.full(count, flip)


def features(options):
    """Features of a folder's photos, one crop or the mean of ten, into an .npz with their names."""
    trained = opened(options.model)
    rows = [name for name, _ in trained.net.rows]
    if options.layer and options.layer not in rows:
        raise ValueError(f"--layer {options.layer}: the layers of {trained.options['network']} are "
                         + ", ".join(rows))
    names, skipped, found, width = photos_in(options.images), {}, [], 0
    with tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(options.out))) as raw:
        for numbers, pixels in decoded(trained, options.images, names, options.workers, skipped):
            spare = pixels.shape[1] - trained.crop
            crops = ten_crops(len(pixels), spare) if options.crops == 10 else [
                data.centre(len(pixels), spare)]
            x = sum(kernels.to_host(trained.net.features(
                kernels.prepare(pixels, *crop, trained.crop), options.layer)).reshape(
                    len(pixels), -1) for crop in crops) / options.crops             # (n, D)
            width = x.shape[1]
            raw.write(np.ascontiguousarray(x, np.float32).data)
            found += [names[i] for i in numbers]
        write_features(options.out, found, raw, width)
    print(f"{options.out}: features ({len(found):,}, {width:,}) float32 and names")
    return {"photos": len(found), "numbers": width, "layer": options.layer or rows[-2],
            "crops": options.crops, "skipped": skipped}


def write_features(path, names, raw, width):
    """An .npz of `features`, copied from an open file of float32 in pieces, and `names`."""
    raw.seek(0)
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(names), width)}
    try:
        with zipfile.ZipFile(path + ".part", "w") as file:
            with file.open("names.npy", "w") as part:
                np.lib.format.write_array(part, np.array(names), allow_pickle=False)
            with file.open("features.npy", "w", force_zip64=True) as part:
                np.lib.format.write_array_header_1_0(part, header)
                shutil.copyfileobj(raw, part, 1 << 22)
        os.replace(path + ".part", path)
    finally:
        if os.path.exists(path + ".part"):
            os.remove(path + ".part")


def words(options):
    """Precision@k on photos that were not trained on, AUC and AP over words, and baselines."""
    if len(options.model) > 1:
        return series(options)
    if options.out:
        raise ValueError("--out is the curve of several runs: name them all after --model")
    trained = opened(options.model[0])
    index = trained.index(options.captions, options.workers)
    images = options.images or trained.options["images"]
    result = score(trained, index, images, options, len(index) if options.all else index.held_out)
    print_words(result)
    return result


def score(trained, index, images, options, count, names=None):
    """What word_metrics says of the first `count` photos of the index, over the words `names`."""
    if not os.path.isdir(images):
        raise ValueError(f"images: there is no folder {images}; name it with --images")
    if not len(index):
        raise ValueError("no photo of the captions carries a word of the model's dictionary; are "
                         "they captions of another kind?")
    if not count:
        raise ValueError("no photo is held out; use --all to score every photo of the captions")
    photos = range(count)
    loader = data.Loader(images, index.name, len(photos), trained.size, BATCH, options.workers,
                         trained.run)
    features, found = features_of(trained.net, loader, photos, trained.crop,
                                  ticker(len(photos), "scoring"))
    loader.close()
    if not found:
        raise ValueError(f"none of {len(photos):,} photos could be read from {images}; first: "
                         + "; ".join(f"{n}: {e}" for n, e in list(loader.skipped.items())[:1]))
    output, counts, loss = trained.net.rows[-1][1], trained.counts, trained.loss_of()
    if names is not None:
        places = [trained.words.index(name) for name in names]
        output, counts, loss = some_rows(output, places), counts[places], trained.loss_of(places)
    result = word_metrics(features, output, target_rows(index, found), counts, loss)
    return {**result, "skipped": len(loader.skipped)}


def some_rows(output, places):
    """An output layer of some of the words."""
    part = model.Output(output.w.shape[1], len(places))
    part.w = kernels.take_rows(output.w, places)
    part.b = kernels.take_rows(output.b, places)
    return part


def series(options):
    """Precision@k against the number of training photos (Fig. 2 left), for several runs.

    Scored on photos that no run trained on, over the words that all runs know.
    """
    runs = [opened(run) for run in options.model]
    shared = [word for word in runs[0].words if all(word in set(run.words) for run in runs)]
    if len(shared) <= max(KS):
        raise ValueError(f"the runs' dictionaries share {len(shared)} words; compare runs on "
                         "captions of one kind")
    sizes = [len(data.Index(os.path.join(run.run, "index"))) for run in runs]
    largest = runs[int(np.argmax(sizes))]
    text = data.Text(len(shared), 0, min(run.options["valid"] for run in runs))
    captions = options.captions or largest.options["captions"]
    index = data.build_index(captions, os.path.join(largest.run, "index-series"), text, None,
                             data.Dictionary(shared), options.workers)
    images, points, result = options.images or largest.options["images"], [], {}
    for run in runs:
        scored = score(run, index, images, options, index.held_out, shared)
        count = data.Index(os.path.join(run.run, "index")).training
        result[run.run] = {"training_photos": count, **scored}
        points.append((count, scored["precision@10"]))
    result = dict(sorted(result.items(), key=lambda item: item[1]["training_photos"]))
    show(series_table(result))
    if options.out:
        series_picture(sorted(points), "precision@10 against training photos", options.out)
    return {"runs": result, "words": len(shared)}


def series_table(runs):
    """The table of `series`: a row for each run."""
    return [["training photos", *(f"precision@{k}" for k in KS), "AUC", "run"]] + [
        [f"{row['training_photos']:,}", *(f"{row[f'precision@{k}']:.4f}" for k in KS),
         f"{row['auc']:.4f}", run] for run, row in runs.items()]


def words_table(result):
    """The numbers of `words` (Table 1)."""
    rows = [[key, f"{result[key]:.4f}", f"{result['baseline'][key]:.4f}",
             f"{result['chance'][key]:.4f}", f"{result['ceiling'][key]:.4f}"]
            for key in (f"precision@{k}" for k in KS)]
    return [["", "model", "frequent words", "chance", "ceiling"], *rows,
            ["AUC, mean of words", f"{result['auc']:.4f}", "0.5", "0.5", "1"],
            ["AP, mean of words", f"{result['map']:.4f}", f"{result['chance']['map']:.4f}",
             f"{result['chance']['map']:.4f}", "1"]]


def print_words(result):
    """What `eval.py words` prints, and the end of a run."""
    print(f"{result['photos']:,} photos, {result['words']:,} of {result['dictionary']:,} "
          "words occur in them")
    show(words_table(result))
    print(f"AUC of the most frequent third of the words {result['auc_frequent']:.4f}, "
          f"of the rarest third {result['auc_rare']:.4f}")
    if result.get("skipped"):
        print(f"{result['skipped']:,} photos could not be read")


def tag(options):
    """The words of given photos with their probabilities: the top k, or those above a threshold."""
    trained = Trained(options.model)
    result, failed = {}, []
    for start in range(0, len(options.photos), BATCH):
        names, pixels = [], []
        for path in options.photos[start:start + BATCH]:
            try:
                pixels.append(data.decode(path, trained.size)[0])
                names.append(path)
            except ValueError as error:
                failed.append(f"{path}: {error}")
        if names:
            where = data.centre(len(names), trained.size - trained.crop)
            scores = kernels.to_host(trained.net.forward(
                kernels.prepare(np.stack(pixels), *where, trained.crop)))
            for name, row in zip(names, scores):
                result[name] = tagged(row, trained, options.top, options.threshold)
    for name, found in result.items():
        print(f"{name}: " + (", ".join(f"{word} {p:.3f}" for word, p in found)
                             or f"no word above {options.threshold:g}"))
    for line in failed:
        print(f"eval.py: skipped {line}", file=sys.stderr)
    if failed and not result:
        raise ValueError("none of the photos could be read")
    return {"tags": {name: dict(found) for name, found in result.items()}, "skipped": failed}


def tagged(scores, trained, top, threshold):
    """[(word, probability)] of one row of scores, most probable first.

    Probabilities are of one word among K, or of each word by itself after one-versus-all training.
    """
    p = expit(scores) if trained.one_vs_all else softmax(scores)
    best = np.argsort(-p, kind="stable")
    best = best[:top] if threshold is None else best[p[best] >= threshold]
    return [(trained.words[i], float(p[i])) for i in best]


def looked_up(trained, words):
    """Classes of words as a person gives them; ValueError says which are near in spelling."""
    place, found, unknown = {word: i for i, word in enumerate(trained.words)}, [], []
    for given in words:
        name = " ".join(data.words_of(given))
        if name in place:
            found.append(place[name])
            continue
        near = difflib.get_close_matches(name, trained.words, 3, 0.5)
        unknown.append(f"{given!r} is not among the model's {len(place):,} words"
                       + (f"; near in spelling: {', '.join(near)}" if near else ""))
    if unknown:
        raise ValueError(" | ".join(unknown) + f"; all are in {trained.run}/words.txt")
    return found


def search(options):
    """The photos that score highest for each word, as a labelled grid (Fig. 3)."""
    trained = opened(options.model)
    places = looked_up(trained, options.words)
    folder, names = photos_for(options, trained)
    output = trained.net.rows[-1][1]
    w, b = kernels.to_host(output.w)[places], kernels.to_host(output.b)[places]
    skipped, scores, found = {}, [], []
    for numbers, pixels in decoded(trained, folder, names, options.workers, skipped):
        scores.append(cpu.matmul(central(trained.net, pixels, trained.crop), w.T) + b)
        found += [names[i] for i in numbers]
    scores = np.concatenate(scores)                                 # (N, words)
    best = top_words(scores.T, options.top)                         # (words, top)
    result = {trained.words[place]: {found[i]: float(scores[i, row]) for i in best[row]}
              for row, place in enumerate(places)}
    for word, row in result.items():
        print(f"{word}: " + ", ".join(f"{name} {value:.2f}" for name, value in row.items()))
    place_of = data.Folder(folder).find
    grid_picture([(word, [(data.decode(place_of(name), 150)[0], f"{value:.2f}")
                          for name, value in row.items()])
                  for word, row in result.items()]).save(options.out)
    return {"words": result, "photos": len(found), "skipped": skipped}


def similar(options):
    """Spearman's ρ of the words' cosines against human scores: lines word<TAB>word<TAB>score."""
    trained = opened(options.model)
    vectors, result = units(kernels.to_host(trained.net.rows[-1][1].w)), {}
    for path in options.pairs:
        rows = read_pairs(path, scored=True)
        found = known_pairs(rows, trained.words)
        rho, p = correlation(vectors, found) if len(found) > 2 else (np.nan, np.nan)
        result[os.path.basename(path)] = {"rho": float(rho), "p": float(p), "covered": len(found),
                                          "pairs": len(rows)}
    if not any(row["covered"] > 2 for row in result.values()):
        raise ValueError(f"--pairs: of no file the model knows both words of 3 pairs; its words "
                         f"are in {trained.run}/words.txt")
    show(similar_table(result))
    return result


def correlation(vectors, pairs):
    """Spearman's ρ of the pairs' cosines with their human scores, and its p-value."""
    one, two, human = map(np.array, zip(*pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                             # scores that are all the same
        return spearmanr((vectors[one] * vectors[two]).sum(axis=1), human)


def similar_table(result):
    """The table of `similar` (Table 5)."""
    return [["word pairs", "Spearman's ρ", "p-value", "covered", "of"]] + [
        [name, f"{row['rho']:.3f}", f"{row['p']:.2g}", f"{row['covered']:,}", f"{row['pairs']:,}"]
        for name, row in result.items()]


def neighbors(options):
    """The words whose vectors are nearest to each given word's, by cosine."""
    trained = opened(options.model)
    places = looked_up(trained, options.words)
    vectors = units(kernels.to_host(trained.net.rows[-1][1].w))
    cosines = cpu.matmul(vectors[places], vectors.T)                # (words, K)
    cosines[np.arange(len(places)), places] = -np.inf
    best = top_words(cosines, min(options.top, len(trained.words) - 1))
    result = {trained.words[place]: {trained.words[i]: float(cosines[row, i]) for i in best[row]}
              for row, place in enumerate(places)}
    for word, near in result.items():
        print(f"{word}: " + ", ".join(f"{name} {value:.2f}" for name, value in near.items()))
    return {"neighbors": result}


def translate(options):
    """Precision@k of finding translations among the nearest words: lines word<TAB>word."""
    trained = opened(options.model)
    rows = read_pairs(options.pairs, scored=False)
    known = known_pairs(rows, trained.words)
    pairs = sorted({pair for pair in known if pair[0] != pair[1]})
    if len(pairs) < 2:
        raise ValueError(f"--pairs: of {len(rows):,} pairs in {options.pairs} the model knows both "
                         f"words of {len(pairs)} that are spelt differently; it takes 2")
    sides = [sorted({pair[side] for pair in pairs}) for side in (0, 1)]
    vectors = units(kernels.to_host(trained.net.rows[-1][1].w))
    scores = cpu.matmul(vectors[sides[0]], vectors[sides[1]].T)     # (S, T)
    if options.csls:
        scores = csls(scores)
    scores[np.equal.outer(*sides)] = -np.inf                        # a word is not its translation
    right = np.zeros(scores.shape, bool)
    right[tuple(np.searchsorted(side, part) for side, part in zip(sides, zip(*pairs)))] = True
    result = {"pairs": len(pairs), "sources": len(sides[0]), "targets": len(sides[1]),
              "alike": len(set(known)) - len(pairs), "csls": bool(options.csls)}
    for name, s, r in (("forth", scores, right), ("back", scores.T, right.T)):
        precision, chance = retrieval(s, r)
        result[name] = {**precision, "chance": chance}
    best = sorted(((float(scores[i, j]), i, j) for i, j in enumerate(scores.argmax(axis=1))),
                  reverse=True)[:12]
    result["best"] = {f"{trained.words[sides[0][i]]} {trained.words[sides[1][j]]}":
                      {"score": value, "right": bool(right[i, j])} for value, i, j in best}
    print(f"{len(pairs):,} pairs of {len(sides[0]):,} and {len(sides[1]):,} words that the model "
          f"knows, of {len(rows):,}; {result['alike']:,} spelt alike are left out; "
          + ("CSLS" if options.csls else "cosine"))
    show(translate_table(result))
    print("best pairs (! is wrong): " + ", ".join(
        f"{pair} {row['score']:.2f}" + " !" * (not row["right"])
        for pair, row in result["best"].items()))
    return result


def translate_table(result):
    """The table of `translate` (Tables 6 and 7): one column a direction, and chance."""
    return [["", "forth", "chance", "back", "chance"]] + [
        [key] + [f"{value:.3f}" for way in ("forth", "back")
                 for value in (result[way][key], result[way]["chance"][key])]
        for key in (f"precision@{k}" for k in KS)]


# -------------------------------------------------------------------- transfer (paper, §5.2)

RAW = 16                                        # raw pixels: that many rows and columns
VIEWS = "this model", "untrained network", f"raw pixels, {RAW} × {RAW}"
VOC = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
       "person pottedplant sheep sofa train tvmonitor").split()


def views(options, trained, names):
    """{view: (N, D)} of the photos by each of VIEWS, their numbers among names, the skipped."""
    blank = model.NETWORKS[trained.options["network"]].build(len(trained.words), 0)
    blank.init(trained.options["seed"])
    found, skipped, parts = [], {}, []
    for numbers, pixels in decoded(trained, options.images, names, options.workers, skipped):
        edge = np.linspace(0, pixels.shape[1], RAW + 1).astype(int)
        raw = np.add.reduceat(np.add.reduceat(pixels, edge[:-1], 1, dtype=np.float32), edge[:-1], 2)
        raw /= np.multiply.outer(np.diff(edge), np.diff(edge))[..., None]           # (n, 16, 16, 3)
        parts.append([central(trained.net, pixels, trained.crop),
                      central(blank, pixels, trained.crop), raw.reshape(len(raw), -1)])
        found += list(numbers)
    return dict(zip(VIEWS, map(np.concatenate, zip(*parts)))), found, skipped


def transfer(options):
    """Logistic regression on the features: DIR/class/*.jpg, or a Pascal VOC folder (Tables 2-4)."""
    trained = opened(options.model)
    if os.path.isdir(os.path.join(options.images, "JPEGImages")):
        return transfer_voc(options, trained)
    return transfer_classes(options, trained)


def classes_of(options, names):
    """The classes, and each photo's; a class is a sub-folder. ValueError if some cannot be."""
    owner = [name.split(os.sep)[0] for name in names]
    classes, y = np.unique(owner, return_inverse=True)
    few = [str(one) for one, count in zip(classes, np.bincount(y))
           if count < max(3, (options.train_per_class or 0) + 1)]
    if few:
        raise ValueError(f"--images: too few photos in {', '.join(few[:5])}{', …' * (len(few) > 5)}"
                         ": each class needs 3 (to train, choose and test), and more than "
                         "--train-per-class; add some, or take the folder away")
    if len(classes) < 2:
        raise ValueError(f"--images: {options.images} has {len(classes)} sub-folders with photos; "
                         "it takes a sub-folder for each of two classes or more")
    return [str(one) for one in classes], y


def transfer_classes(options, trained):
    """Accuracy over random splits, mean and standard deviation, for each of VIEWS."""
    names = [name for name in photos_in(options.images) if os.sep in name]
    if not names:
        raise ValueError(f"--images: {options.images} has photos, but no sub-folder for each class")
    classes_of(options, names)                                      # before the work
    x, found, skipped = views(options, trained, names)
    classes, y = classes_of(options, [names[i] for i in found])
    tick = ticker(options.splits * len(VIEWS), "regressions", "fits")
    take = (lambda n: options.train_per_class) if options.train_per_class else (
        lambda n: min(n - 1, max(2, round(options.train_share * n))))
    result = {view: {"runs": []} for view in VIEWS}
    for number in range(options.splits):
        train = drawn(y, take, options.seed, 2 * number)
        held = drawn(y[train], held_share, options.seed, 2 * number + 1)
        for view in VIEWS:
            rows = scaled(x[view], train)
            table, _ = chosen(rows[train], y[train], len(classes), held, accuracy)
            result[view]["runs"].append(accuracy(scores_of(table, rows[~train]), y[~train]))
            tick(1)
    for row in result.values():
        row["accuracy"] = float(np.mean(row["runs"]))
        row["deviation"] = float(np.std(row["runs"], ddof=1)) if options.splits > 1 else None
    result = {"accuracy": result, "chance": 1 / len(classes), "classes": len(classes),
              "photos": len(y), "train": int(train.sum()), "splits": options.splits,
              "skipped": skipped}
    print(f"{len(classes):,} classes, {len(y):,} photos; {options.splits} random splits, "
          f"{result['train']:,} to train and {len(y) - result['train']:,} to test")
    show(transfer_table(result))
    return result


def transfer_table(result):
    """The table of `transfer`: accuracies, or a VOC folder's average precisions."""
    if "accuracy" in result:
        return [["", "accuracy", "± deviation"]] + [
            [view, f"{row['accuracy']:.3f}",
             "" if row["deviation"] is None else f"± {row['deviation']:.3f}"]
            for view, row in result["accuracy"].items()] + [
                ["chance", f"{result['chance']:.3f}", ""]]
    rows = {**result["classes"], "mean": result["mean"]}
    return [["AP by 11 points, by area", *(cell for view in VIEWS for cell in (view, "area")),
             "chance"]] + [
        [name, *(f"{row[view][rule]:.3f}" for view in VIEWS for rule in ("points", "area")),
         f"{row['chance']:.3f}"] for name, row in rows.items()]


def voc_names(folder, part):
    """Names without ending of the photos of `trainval` or `test`: of its list, or the classes'."""
    lists = os.path.join(folder, "ImageSets", "Main")
    files = sorted(os.listdir(lists)) if os.path.isdir(lists) else []
    files = [f"{part}.txt"] if f"{part}.txt" in files else [
        file for file in files if file.endswith(f"_{part}.txt")]
    names = set()
    for file in files:
        with open(os.path.join(lists, file), errors="surrogateescape") as lines:
            names |= {line.split()[0] for line in lines if line.strip()}
    if not names:
        raise ValueError(f"--images: {lists} lists no photo in {part}.txt or in *_{part}.txt, as "
                         "a Pascal VOC folder does")
    return sorted(names)


def voc_labels(path, classes, unknown):
    """(C,): 1 for a class that is in the photo, 0 if only as `difficult`, -1 if it is not.

    Names of classes that are none go to the Counter `unknown`; ValueError for a broken file.
    """
    labels = np.full(len(classes), -1, np.int8)
    try:
        objects = ElementTree.parse(path).getroot().iter("object")
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    for one in objects:
        name = (one.findtext("name") or "").strip()
        if name not in classes:
            unknown[name] += 1
            continue
        place = classes.index(name)
        easy = (one.findtext("difficult") or "0").strip() != "1"
        labels[place] = max(labels[place], int(easy))
    return labels


def voc_photos(folder, classes):
    """(names, labels (N, C), for training (N,)) of a Pascal VOC folder; what is broken is named."""
    names, labels, train, unknown, broken = [], [], [], Counter(), []
    test = set(voc_names(folder, "test"))
    for name in sorted({*voc_names(folder, "trainval"), *test}):
        try:
            labels.append(voc_labels(os.path.join(folder, "Annotations", name + ".xml"), classes,
                                     unknown))
        except ValueError as error:
            broken.append(str(error))
            continue
        names.append(os.path.join("JPEGImages", name + ".jpg"))
        train.append(name not in test)
    for what, some in (("annotations cannot be read", broken),
                       ("classes are unknown, their objects skipped", list(unknown))):
        if some:
            print(f"eval.py: {len(some):,} {what}: {'; '.join(some[:10])}"
                  + "; …" * (len(some) > 10), file=sys.stderr)
    if not names:
        raise ValueError(f"--images: no annotation of {folder} can be read")
    return names, np.array(labels), np.array(train), broken, dict(unknown)


def transfer_voc(options, trained):
    """Average precision of each class of a Pascal VOC folder, one regression a class."""
    lists = os.path.join(options.images, "ImageSets", "Main")
    classes = sorted(file.removesuffix("_trainval.txt") for file in os.listdir(lists)
                     if file.endswith("_trainval.txt")) if os.path.isdir(lists) else []
    classes = classes or VOC
    names, labels, train, broken, unknown = voc_photos(options.images, classes)
    x, found, skipped = views(options, trained, names)
    labels, train = labels[found], train[found]
    tick, result, left_out = ticker(len(classes), "regressions", "classes"), {}, []
    for place, name in enumerate(classes):
        easy, y = labels[:, place] != 0, (labels[:, place] > 0).astype(int)
        fit, test = easy & train, easy & ~train
        if min(y[fit].sum(), (1 - y)[fit].sum()) < 2 or not 0 < y[test].sum() < test.sum():
            left_out.append(name)
            continue
        held = drawn(y[fit], held_share, options.seed, place)
        result[name] = {"chance": float(y[test].mean())}
        for view in VIEWS:
            rows = scaled(x[view], fit)
            table, _ = chosen(rows[fit], y[fit], 2, held,
                              lambda s, y: voc_ap(s[:, 1] - s[:, 0], y)[1])
            s = scores_of(table, rows[test])
            result[name][view] = dict(zip(("points", "area"), voc_ap(s[:, 1] - s[:, 0], y[test])))
        tick(1)
    if not result:
        raise ValueError("--images: no class has two photos with it and two without to train on, "
                         "and both kinds to test")
    mean = {view: {rule: float(np.mean([row[view][rule] for row in result.values()]))
                   for rule in ("points", "area")} for view in VIEWS}
    mean["chance"] = float(np.mean([row["chance"] for row in result.values()]))
    result = {"classes": result, "mean": mean, "train": int(train.sum()),
              "test": int((~train).sum()), "left_out": left_out, "broken": broken,
              "unknown": unknown, "skipped": skipped}
    print(f"Pascal VOC: {result['train']:,} photos to train, {result['test']:,} to test"
          + (f"; too few photos for {', '.join(left_out)}" if left_out else ""))
    show(transfer_table(result))
    return result


def spread(count, limit):
    """At most `limit` numbers below count, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(int))


def map_(options):
    """A map by t-SNE: photos as a mosaic of thumbnails (Fig. 4), or words (Fig. 6)."""
    trained = opened(options.model)
    x, draw, skipped = (word_points if options.words else photo_points)(options, trained)
    if len(x) < 10:
        raise ValueError(f"a map of {len(x)} points is none; it takes 10 or more")
    perplexity = min(options.perplexity, (len(x) - 1) / 3)
    y, divergence = tsne(units(x), perplexity, options.steps,
                         lambda line: print(line, file=sys.stderr, flush=True))
    image, what = draw(y)
    image.save(options.out)
    print(f"{options.out}: {what}, perplexity {perplexity:g}, KL divergence {divergence:.4f}")
    return {"points": len(x), "perplexity": perplexity, "kl": divergence, "skipped": skipped}


def word_points(options, trained):
    """Vectors of the most frequent words, and what draws them: draw(y) -> (picture, line)."""
    most = np.argsort(-trained.counts, kind="stable")[:options.limit]
    names = [trained.words[i] for i in most]

    def draw(y):
        image, room = words_picture(names, y, trained.counts[most], options.size)
        lost = len(names) - room
        return image, f"{room:,} words" + (f", and {lost:,} that found no room (--size)" if lost
                                           else "")
    return kernels.to_host(trained.net.rows[-1][1].w)[most], draw, {}


def photo_points(options, trained):
    """Features of photos, and what draws their thumbnails: draw(y) -> (picture, line)."""
    folder, names = photos_for(options, trained)
    names = [names[i] for i in spread(len(names), options.limit)]
    each = options.size // mosaic_side(len(names))
    if not each:
        raise ValueError(f"--size {options.size}: too small for {len(names):,} photos")
    skipped, x, small = {}, [], []
    for _, pixels in decoded(trained, folder, names, options.workers, skipped):
        x.append(central(trained.net, pixels, trained.crop))
        small += [np.asarray(Image.fromarray(one).resize((each, each))) for one in pixels]

    def draw(y):
        return mosaic_picture(np.array(small), y, options.size), f"{len(small):,} photos"
    return np.concatenate(x), draw, skipped


# -------------------------------------------------------------------------------- the report

STYLE = """
body { font: 17px/1.5 Georgia, serif; color: #222; max-width: 46rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem }
p { margin: .5rem 0 } .note { color: #666; font-size: .9rem } .wrong { color: #b03020 }
.wide { overflow-x: auto } table { border-collapse: collapse; font: 14px/1.4 sans-serif }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td { white-space: nowrap; font-variant-numeric: tabular-nums }
img { display: block; max-width: 100%; height: auto; margin: .7rem auto }
@media print { @page { margin: 16mm } body { font-size: 10.5pt; max-width: none; padding: 0 }
  h2, .note { break-after: avoid } img { width: auto; max-height: 17cm }
  img, table { break-inside: avoid }
  .wide { overflow: visible } table { font-size: 8.5pt } td { white-space: normal } }
"""


def html_table(rows):
    """Rows of texts, the first a heading, as a table that scrolls on a narrow screen."""
    lines = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
             for tag, row in zip(["th"] + ["td"] * len(rows), rows)]
    return f'<div class="wide"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def html_list(rows):
    """{word: {word: number}} as lines of text."""
    return "".join(f"<p><b>{html.escape(word)}</b>: {html.escape(', '.join(near))}</p>"
                   for word, near in rows.items())


def html_picture(path, what, photos=False):
    """A picture file inside the page: as JPEG if it is made of photos."""
    packed = io.BytesIO()
    image = Image.open(path).convert("RGB")
    image.save(packed, "JPEG" if photos else "PNG", quality=85, optimize=True)
    text = base64.b64encode(packed.getvalue()).decode()
    return (f'<img alt="{html.escape(what)}" width="{image.width}" height="{image.height}" '
            f'src="data:image/{"jpeg" if photos else "png"};base64,{text}">')


def report_parts(options, folder):
    """(title, note, command, its options, what makes HTML of its result) of a report's sections."""
    png = os.path.join(folder, "picture.png")
    photos = {"images": options.images, "out": png}
    frequent = opened(options.model).words[:8]
    yield ("Word prediction", "Words for photos that were not trained on (Table 1).", words,
           {"model": [options.model], "all": False, "out": None},
           lambda r: html_table(words_table(r)) + f'<p class="note">{r["photos"]:,} photos, '
           f'{r["words"]:,} words occur in them.</p>')
    if options.series:
        yield ("More photos", "Precision@10 against the number of training photos (Fig. 2).",
               words, {"model": options.series, "out": png},
               lambda r: html_table(series_table(r["runs"])) + html_picture(png, "a curve"))
    yield ("Photos for words", "The photos that score highest for a word, with their scores "
           "(Fig. 3).", search, {**photos, "words": options.words or frequent, "top": 5},
           lambda r: html_picture(png, "photos by word", True))
    yield ("A map of photos", "t-SNE of the last hidden layer (Fig. 4).", map_,
           {**photos, "words": False}, lambda r: html_picture(png, "a map of photos", True))
    yield ("A map of words", "t-SNE of the words' vectors, which were learned from pictures alone "
           "(Fig. 6).", map_, {"words": True, "out": png},
           lambda r: html_picture(png, "a map of words"))
    yield ("Nearest words", "By the cosine of the words' vectors.", neighbors,
           {"words": options.words or frequent, "top": 6}, lambda r: html_list(r["neighbors"]))
    if options.pairs_similar:
        yield ("Similar words", "Rank correlation of cosines with human scores (Table 5).",
               similar, {"pairs": options.pairs_similar}, lambda r: html_table(similar_table(r)))
    for more in (False, True) if options.translate else ():
        yield ("Translation" + ", corrected for hubs" * more, "A word's translation among its "
               f"nearest words, by {'CSLS' if more else 'cosine'} (Tables 6 and 7).", translate,
               {"pairs": options.translate, "csls": more},
               lambda r: html_table(translate_table(r)) + "<p>" + ", ".join(
                   html.escape(pair) if row["right"] else
                   f'<span class="wrong">{html.escape(pair)}</span>'
                   for pair, row in r["best"].items()) + "</p>")
    for path in options.transfer or ():
        yield (f"Transfer to {os.path.basename(os.path.abspath(path))}", "Logistic regression on "
               "the features (Fig. 5, Tables 2 to 4).", transfer, {"images": path},
               lambda r: html_table(transfer_table(r)))


def report(options):
    """All experiments that the options allow, in one HTML file with its pictures inside."""
    trained, parts, failed, result = opened(options.model), [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for title, note, command, more, drawn_as in report_parts(options, folder):
            print(f"\n{title}", flush=True)
            parts.append(f'<h2>{html.escape(title)}</h2><p class="note">{html.escape(note)}</p>')
            try:
                result[title] = command(argparse.Namespace(**{**vars(options), **more}))
                parts.append(drawn_as(result[title]))
            except ValueError as error:
                failed[title] = str(error)
                parts.append(f'<p class="wrong">{html.escape(str(error))}</p>')
                print(f"eval.py: {title}: {error}", file=sys.stderr)
    name = html.escape(os.path.basename(os.path.abspath(options.model)))
    facts = (f"{trained.options['network']}, {len(trained.words):,} words, sampling by "
             f"{trained.options['sampling']}")
    curves = os.path.join(options.model, "curves.png")
    if os.path.exists(curves):
        parts.append(f"<h2>Training</h2>{html_picture(curves, 'learning curves')}")
    with open(options.out, "w", encoding="utf-8", errors="replace") as file:
        file.write(f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
                   f'content="width=device-width"><title>{name}</title><style>{STYLE}</style>'
                   f"<h1>What {name} learned from captions</h1><p>{facts}</p>"
                   + "\n".join(parts) + "</html>\n")
    print(f"\n{options.out}: {os.path.getsize(options.out) / 1e6:.1f} MB")
    return {"parts": result, "failed": failed}


# ----------------------------------------------------------------------------------- options

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parser():
    """The commands and their options."""
    formatter = HelpFormatter
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function, ending=None):
        says = function.__doc__.splitlines()[0]
        one = commands.add_parser(function.__name__.strip("_"), help=says, description=says,
                                  formatter_class=formatter)
        one.set_defaults(function=function, ending=ending)
        one.add_argument("--model", required=True, metavar="RUN", help="folder of a trained run",
                         nargs="+" if function is words else None)
        one.add_argument("--json", metavar="FILE", help="write the result as JSON, too")
        one.add_argument("--device", choices=kernels.DEVICES, default="auto", help="where to run")
        one.add_argument("--threads", type=int, help="CPU threads; all cores if not given")
        if ending:
            one.add_argument("--out", required=function is not words, metavar="FILE" + ending,
                             help="the file to write")
        return one

    one = command(words, ".png")
    one.add_argument("--images", metavar="DIR", help="photos; those of the run if not given")
    one.add_argument("--captions", metavar="FILE", help="captions; those of the run if not given")
    one.add_argument("--all", action="store_true", help="score all photos, not the held-out ones")
    _workers(one)
    one = command(tag)
    one.add_argument("photos", nargs="+", metavar="PHOTO", help="picture files")
    one.add_argument("--top", type=int, default=10, help="how many words a photo")
    one.add_argument("--threshold", type=float, help="instead: all words at least as probable")
    _photo_commands(command)
    _word_commands(command)
    return top


def _photo_commands(command):
    one = command(search, ".png")
    one.add_argument("words", nargs="+", metavar="WORD", help="words of the dictionary")
    one.add_argument("--top", type=int, default=6, help="how many photos a word")
    _images(one)
    one = command(features, ".npz")
    one.add_argument("--images", metavar="DIR", required=True, help="folder of photos")
    one.add_argument("--layer", help="name of a layer; the last hidden one if not given")
    one.add_argument("--crops", type=int, choices=(1, 10), default=1, help="central crop, or the "
                     "mean of corners, centre and their mirror images")
    _workers(one)
    one = command(transfer)
    one.add_argument("--images", metavar="DIR", required=True,
                     help="a sub-folder of photos for each class, or a Pascal VOC folder")
    _transfer(one)
    _workers(one)
    one = command(map_, ".png")
    one.add_argument("--words", action="store_true", help="a map of words, not of photos")
    _images(one)
    _map(one)


def _word_commands(command):
    one = command(similar)
    one.add_argument("--pairs", nargs="+", required=True, metavar="FILE",
                     help="word<TAB>word<TAB>human score")
    one = command(translate)
    one.add_argument("--pairs", required=True, metavar="FILE", help="word<TAB>its translation")
    one.add_argument("--csls", action="store_true", help="correct the cosine for hubs")
    one = command(neighbors)
    one.add_argument("words", nargs="+", metavar="WORD", help="words of the dictionary")
    one.add_argument("--top", type=int, default=10, help="how many words")
    one = command(report, ".html")
    one.add_argument("words", nargs="*", metavar="WORD", help="words to search photos for")
    one.add_argument("--captions", metavar="FILE", help="captions; those of the run if not given")
    one.add_argument("--series", nargs="+", metavar="RUN", help="runs for `words` side by side")
    one.add_argument("--pairs-similar", nargs="+", metavar="FILE", help="as `similar --pairs`")
    one.add_argument("--translate", metavar="FILE", help="as `translate --pairs`")
    one.add_argument("--transfer", nargs="+", metavar="DIR", help="as `transfer --images`")
    _images(one)
    _transfer(one)
    _map(one)


def _workers(one):
    one.add_argument("--workers", type=int, default=2, help="processes that decode photos")


def _images(one):
    one.add_argument("--images", metavar="DIR",
                     help="folder of photos; the run's held-out ones if not given")
    _workers(one)


def _transfer(one):
    one.add_argument("--splits", type=int, default=10, help="random splits into train and test")
    one.add_argument("--train-share", type=float, default=0.5, help="of each class's photos")
    one.add_argument("--train-per-class", type=int, metavar="N", help="instead: that many photos")
    one.add_argument("--seed", type=int, default=0, help="of the splits")


def _map(one):
    one.add_argument("--limit", type=int, default=2000, metavar="N",
                     help="points at most: photos evenly spread, or the most frequent words")
    one.add_argument("--perplexity", type=float, default=30, help="about how many neighbours count")
    one.add_argument("--steps", type=int, default=1000, help="of gradient descent")
    one.add_argument("--size", type=int, default=1600, help="pixels of a side of the picture")


def guarded(work):
    """Run work() and exit as a command should: one line for what a user can mend, never more."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")               # whatever a photo is called
    try:
        sys.exit(work())
    except KeyboardInterrupt:
        fail(130, "interrupted")
    except BrokenPipeError:                     # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1) if ranks.joined.size == 1 else fail(1, "nobody reads the output any more")
    except ValueError as error:
        fail(2, error)
    except RuntimeError as error:
        fail(1, error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        remedy = ("; free some space, or choose another place" if error.errno == errno.ENOSPC else
                  "")
        fail(1, f"{where}{error.strerror or error}{remedy}")
    except Exception:                           # a mistake of this program
        if ranks.joined.size == 1:
            raise
        fail(1, traceback.format_exc())         # the other ranks must not wait for this one


def fail(status, error):
    """End this process, and all ranks with it, with one line."""
    ranks.joined.fail(status, f"{os.path.basename(sys.argv[0])}: {error}"
                      if status != 130 else str(error))


def without_nan(value):
    """The value for JSON, which lacks NaN and infinity: null instead."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_json(path, result):
    """The result of a command as JSON."""
    with open(path, "w") as file:
        json.dump(without_nan(result), file, indent=1)
        file.write("\n")


def check(options):
    """ValueError for options that cannot be; before any work, also for where results go."""
    for name, low, high in (("threads", 1, np.inf), ("workers", 0, MOST_WORKERS),
                            ("top", 1, np.inf), ("threshold", 0, 1), ("splits", 1, 10_000),
                            ("train_share", 0, 1), ("train_per_class", 2, np.inf),
                            ("seed", 0, 2**63), ("limit", 10, 100_000), ("perplexity", 1, np.inf),
                            ("steps", 1, np.inf), ("size", 100, 20_000)):
        value = getattr(options, name, None)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be {low} to {high}")
    out = getattr(options, "out", None)
    if out and not out.lower().endswith(options.ending):
        raise ValueError(f"--out {out}: its name must end in {options.ending}")
    for name, path in (("json", options.json), ("out", out)):
        folder = os.path.dirname(os.path.abspath(path or "."))
        if path and (os.path.isdir(path) or not os.path.isdir(folder)
                     or not os.access(path if os.path.exists(path) else folder, os.W_OK)):
            raise ValueError(f"--{name}: cannot write {path}; choose another place")


def main():
    options = parser().parse_args()
    check(options)
    if options.threads:
        kernels.set_threads(options.threads)
    print(kernels.use(options.device), file=sys.stderr)
    result = options.function(options)
    if options.json:
        write_json(options.json, result)
    return 1 if result.get("failed") or result.get("skipped") and options.function is tag else 0


if __name__ == "__main__":
    guarded(main)
