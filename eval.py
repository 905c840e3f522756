"""The paper's experiments on a trained run, using the model, and the pictures of a run.

    python eval.py                              lists the commands, with an example of each
    python eval.py COMMAND --model RUN …        RUN is a run's folder

Metrics are fractions, not percent. In this order: metrics, baselines, features, regression,
pictures, trained runs, what the commands share, and the commands themselves. (t-SNE is in
kernels/tsne.py, plots are in kernels/figures.py.)
"""
import argparse
import base64
import csv
import difflib
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from html import escape
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # while the rest is imported

import numpy as np
from PIL import Image, ImageDraw
from scipy.linalg import cho_factor, cho_solve, eigh
from scipy.optimize import minimize
from scipy.sparse import csr_array, issparse, vstack
from scipy.sparse.linalg import norm as sparse_norm
from scipy.special import log_softmax, logsumexp
from scipy.stats import hypergeom, rankdata, spearmanr

import data
import kernels
import model
from kernels import console, drawn, figures
from kernels.console import MOST_THREADS, number
from kernels.philox import SPLITS, philox
from kernels.tsne import tsne

BLOCK = 20_000_000              # scores held at a time
PAGE = 730                      # pixels across a report's page, on a screen that has room
LETTER = 7.2                    # pixels of a table's letter on a page, about …
CELL = 18                       # … and of the space around a cell
KS = (1, 5, 10)                 # precision@k …
PRECISIONS = tuple(f"precision@{k}" for k in KS)        # … and its keys
SPREAD = " ±"                   # ends the key of a value's standard deviation
OVER = " ± over"                # … and of what that is taken over
LEVELS = " baselines"           # … and of what baselines have
SHORT = {"auc": "AUC", "map": "mean AP"}       # of a score, in a table
MOST_COMPARED = 200_000         # photos among which duplicates are looked for
RESAMPLES = 200                 # of the photos, for deviations over them
MOST_ROWS = 50                  # of a picture of photos and their nearest
CANDIDATES = 1000               # photos among which one is looked for by its words
LEAST_PHOTOS = 5                # that carry a word, to choose its threshold on
MOST_TOGETHER = 500_000_000     # pairs of words on a photo that are counted, for a control
NEAREST = 50                    # training photos whose words a baseline takes …
MOST_NEIGHBOURS = 50_000        # … of so many at most
RIDGE = 10.0 ** np.arange(2, -3.5, -0.5)        # λ to choose from, of the mean eigenvalue of xᵀx


def slices(n, size):
    """Slices that cover range(n), of `size` numbers each; of one at least."""
    size = max(1, size)
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


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
    n = len(scores)
    positives = carried.sum(axis=0)                                 # (words,)
    both = (positives > 0) & (positives < n)
    ranks = (rankdata(scores, axis=0) * carried).sum(axis=0)
    auc = (ranks - positives * (positives + 1) / 2) / np.maximum(1, positives * (n - positives))
    hits = np.take_along_axis(carried, np.argsort(-scores, axis=0, kind="stable"), 0)
    precision = np.cumsum(hits, axis=0) / np.arange(1, n + 1)[:, None]          # (N, words)
    ap = (precision * hits).sum(axis=0) / np.maximum(1, positives)
    return np.where(both, auc, np.nan), np.where(both, ap, np.nan)


def chance_of_ap(positives, n):
    """The mean AP of a random order of n photos, of which so many are positive.

    A positive stands at any rank r alike often. Before it are (r - 1) (m - 1) / (n - 1) others of
    the m on average, so its precision is (1 + (r - 1) (m - 1) / (n - 1)) / r; the mean over r is
    q + (1 - q) H_n / n with q = (m - 1) / (n - 1) and H_n = 1 + 1/2 + … + 1/n.
    """
    q = (positives - 1) / max(1, n - 1)
    harmonic = (1 / np.arange(1, n + 1)).sum()
    return q + (1 - q) * harmonic / n


def word_metrics(scorer, targets, carried, counts):
    """What `words` reports of N photos, as a plain dictionary.

    scorer: of these photos for K words; targets: N arrays, the classes of each photo's words, which
    mark_words makes carried (N, K) of; counts (K,): the training photos of each word, for baseline,
    thirds and tenths.
    """
    n, k = carried.shape
    sizes = carried.sum(axis=1)                                     # (N,) words of a photo
    positives = carried.sum(axis=0)                                 # (K,) photos of a word
    most = np.argsort(-counts, kind="stable")                       # (K,) the most frequent first
    return {
        **rank_metrics(scorer, carried, counts),
        "loss": mean_loss(scorer, targets),
        "photos": n,
        "dictionary": k,
        "ceiling": name_precisions(np.minimum.outer(sizes, KS).mean(axis=0) / KS),
        "baseline": name_precisions([positives[most[:top]].sum() / (n * top) for top in KS]),
        "chance": {**name_precisions(sizes.mean() / k * np.minimum(KS, k) / KS), "auc": 0.5,
                   "map": mean_of_finite(chance_of_words(carried))},
    }


def rank_metrics(scorer, carried, counts):
    """How well scores order words within a photo, and photos for a word: a dictionary.

    scorer: of N photos for K words; carried (N, K); counts (K,), for thirds and tenths.
    """
    precision = photo_hits(scorer, carried).mean(axis=0, dtype=np.float64) / KS     # (Table 1)
    auc, ap = score_words(scorer, carried)                          # (K,) each
    by_frequency = np.argsort(-counts, kind="stable")               # (K,)
    third = max(1, len(counts) // 3)
    return {
        **name_precisions(precision),
        "auc": mean_of_finite(auc),
        "map": mean_of_finite(ap),
        "auc_frequent": mean_of_finite(auc[by_frequency[:third]]),
        "auc_rare": mean_of_finite(auc[by_frequency[-third:]]),
        "map_frequent": mean_of_finite(ap[by_frequency[:third]]),
        "map_rare": mean_of_finite(ap[by_frequency[-third:]]),
        "deciles": score_deciles(auc, ap, chance_of_words(carried), counts, by_frequency),
        "words": int(np.isfinite(ap).sum()),
    }


def chance_of_words(carried):
    """chance_of_ap of each word, (K,), NaN for a word of no photo, or of all; carried (N, K)."""
    n = carried.shape[0]
    positives = carried.sum(axis=0)                                 # (K,)
    both = (positives > 0) & (positives < n)
    return np.where(both, chance_of_ap(positives, n), np.nan)


def mark_words(targets, k):
    """Which of the K words each photo carries, a sparse boolean (N, K)."""
    sizes = [len(words) for words in targets]
    photos = np.repeat(np.arange(len(targets)), sizes)
    marks = np.ones(len(photos), bool)
    return csr_array((marks, (photos, np.concatenate(targets))), (len(targets), k))


class Scorer:
    """The scores of N photos for K words, a block of photos or of words at a time.

    They compare between words and between photos: they hold the prior, and the loss's normaliser is
    taken off. After softmax that is log p, else the log-odds of a word.
    """

    def __init__(self, features, output, loss, shift=None):
        """features (N, E); output: the layer of the K words; loss: one of model.LOSSES, made with
        the frequencies of the words among the training photos; shift (K,): as of model.prior_shift,
        to add to the scores; None for nothing.
        """
        self.features = features                                    # (N, E)
        self.output = output
        self.loss = loss
        self.shift = shift if shift is None else kernels.to_device(shift)
        self.words = len(output.b)
        self._normaliser = None                                     # (N, 1)

    def __len__(self):
        return len(self.features)

    def take(self, photos):
        """The Scorer of some of the photos, by a slice or their numbers."""
        return Scorer(self.features[photos], self.output, self.loss, self.shift)

    def photo_blocks(self):
        """Yield (slice, raw scores with the prior (B, K)) of all photos, on the device."""
        for photos in slices(len(self), BLOCK // self.words):
            scores = self.output.scores(self.features[photos])      # (B, K)
            yield photos, scores if self.shift is None else scores + self.shift

    def word_blocks(self):
        """Yield (slice, scores (N, B)) of all words, as NumPy."""
        for words in slices(self.words, BLOCK // 4 // len(self)):
            yield words, self.of_words(np.arange(words.start, words.stop))

    def of_words(self, classes):
        """The scores of some words (C,), (N, C), as NumPy."""
        scores = self.output.scores(self.features, classes)
        if self.shift is not None:
            scores = scores + self.shift[classes]
        return kernels.to_host(scores - self.normaliser())

    def normaliser(self):
        """The loss's normaliser of each photo, (N, 1)."""
        if self._normaliser is None:
            blocks = [self.loss.normaliser(scores) for _, scores in self.photo_blocks()]
            self._normaliser = np.concatenate(blocks)
        return self._normaliser


def photo_hits(scorer, carried):
    """How many of its k best words each photo carries, (N, len(KS)); carried (N, K)."""
    hits = np.zeros((len(scorer), len(KS)), np.float32)
    for photos, scores in scorer.photo_blocks():
        best = top_words(kernels.to_host(scores), max(KS))
        rows = np.arange(len(best))[:, None]                        # (B, 1)
        right = carried[photos][rows, best].toarray()               # (B, 10)
        for i, top in enumerate(KS):
            hits[photos, i] = right[:, :top].sum(axis=1)
    return hits


def score_words(scorer, carried):
    """AUC and average precision of each word, (K,) each; carried (N, K)."""
    columns = carried.tocsc()
    auc = np.full(scorer.words, np.nan)
    ap = np.full(scorer.words, np.nan)
    for words, scores in scorer.word_blocks():
        auc[words], ap[words] = auc_and_ap(scores, columns[:, words].toarray())
    return auc, ap


def mean_loss(scorer, targets):
    """The loss of N photos, one definition for training and held-out ones; see word_metrics.

    Softmax: the mean over photos of the mean over its words of -log p, with the prior. One-versus-
    all: eq. 1, a photo's mean, whose class weights stand in the place of the prior.
    """
    loss = scorer.loss
    if not loss.measured_with_prior:
        scorer = Scorer(scorer.features, scorer.output, loss)
    total = 0.0
    for photos, scores in scorer.photo_blocks():
        weights = loss.photo_weights(targets[photos])               # (B,)
        losses, _ = loss(scores, data.Labels(data.pad_rows(targets[photos]), weights))
        total += float(kernels.to_host(losses).sum())
    return total / len(targets)


def score_deciles(auc, ap, chance, counts, by_frequency):
    """{"1 of 10": numbers of the most frequent tenth of the words, …}; fewer where K < 10.

    auc, ap, and its chance (K,): NaN for a word that is not scored.
    """
    deciles = {}
    for i, words in enumerate(np.array_split(by_frequency, 10), 1):
        if len(words):
            deciles[f"{i} of 10"] = {
                "words": len(words), "photos": float(counts[words].mean()),
                "auc": mean_of_finite(auc[words]), "map": mean_of_finite(ap[words]),
                "chance": {"auc": 0.5, "map": mean_of_finite(chance[words])}}
    return deciles


def deviations(scorer, carried):
    """How much precision@k, AUC and AP vary with the choice of photos: {key: one deviation}.

    By the bootstrap: N photos are drawn from these with replacement, RESAMPLES times. The model and
    the dictionary stay; a word that no drawn photo carries is not in that resample's mean.
    """
    n = len(scorer)
    raw = philox(0, (0, 1, 0, SPLITS)).random_raw(RESAMPLES * n)
    choices = (raw % n).astype(np.int64).reshape(RESAMPLES, n)
    counts = [np.bincount(photos, minlength=n) for photos in choices]
    weights = np.stack(counts, axis=1).astype(np.float32)           # (N, R) how often each is drawn
    means = weights.T @ photo_hits(scorer, carried) / (n * np.array(KS))        # (R, len(KS))
    values = np.full((scorer.words, 2, RESAMPLES), np.nan, np.float32)
    columns = carried.tocsc()
    for words, scores in scorer.word_blocks():
        marks = columns[:, words].toarray()                         # (N, B)

        def work(start, stop):
            for i in range(start, stop):
                values[words.start + i] = weighted_auc_and_ap(scores[:, i], marks[:, i], weights)

        kernels.threads.chunks(marks.shape[1], 16, work)
    present = np.isfinite(values[:, 0]).sum(axis=0)                 # (R,) words of some photo drawn
    auc, ap = np.nansum(values, axis=0) / np.maximum(1, present)    # (R,) each
    return {**name_precisions(means.std(axis=0, ddof=1)),
            "auc": float(auc.std(ddof=1)), "map": float(ap.std(ddof=1))}


def weighted_auc_and_ap(scores, carried, weights):
    """AUC and AP (2, R) of one word where photo n counts weights (N, R) times.

    scores, carried (N,). NaN without a photo with the word, or without one that lacks it. Sums of
    weights down to each photo that carries the word take the place of numbers of photos in
    auc_and_ap; ties, which count half there, are broken by the photos' order.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.flatnonzero(carried[order])                           # (m,) their ranks
    above = np.cumsum(weights[order], axis=0)                       # (N, R)
    own = weights[order[hits]]                                      # (m, R)
    positives = np.cumsum(own, axis=0)
    total = own.sum(axis=0)                                         # (R,)
    negatives = above[-1] - total
    with np.errstate(divide="ignore", invalid="ignore"):            # 0 / 0: no such photo is drawn
        wrong = (own * (above[hits] - positives)).sum(axis=0) / (total * negatives)
        precision = positives / np.maximum(1, above[hits])
        ap = (own * precision).sum(axis=0) / total
    return np.stack([1 - wrong, np.where(negatives > 0, ap, np.nan)])


def retrieve_photos(scorer, carried):
    """How often a photo is among the k best for its words, and its words among the k best for it.

    Among the first CANDIDATES photos, which are in random order, so that numbers of different
    collections compare. The score of a set of words for a photo is Σ log p of its words; photos are
    compared for a set by it. It is higher for small sets and for frequent words, so sets are
    compared for a photo after a softmax of each set's scores over the photos. A photo with exactly
    the same words counts as right.
    """
    count = min(len(scorer), CANDIDATES)
    carried = carried[:count].astype(np.float32)                    # (C, K)
    first = scorer.take(slice(count))
    scores = np.zeros((count, count), np.float32)                   # (sets, photos)
    columns = carried.tocsc()
    for words, s in first.word_blocks():
        scores += columns[:, words] @ scorer.loss.log_probability(s).T
    sizes = carried.sum(axis=1)                                     # (C,)
    common = (carried @ carried.T).toarray()                        # words that two photos share
    right = (common == sizes) & (common == sizes[:, None])
    by_photo = scores - logsumexp(scores, axis=1, keepdims=True)
    return {"candidates": count, "photo for its words": retrieval(scores, right),
            "words for their photo": retrieval(by_photo.T, right)}      # which is symmetric


WORD_COLUMNS = ("word", "training_photos", "photos", "auc", "ap", "threshold", "f1", "step")


def table_of_words(scorer, carried, words, counts, step):
    """A row for each word, of WORD_COLUMNS; "" for what is not known.

    photos: how many of these carry the word. threshold: the least probability of a tag that has the
    best F1 on these photos; f1: that F1, which is lower on new photos, since the threshold was
    chosen on these. Neither is known of a word on fewer than LEAST_PHOTOS photos, or on all.
    """
    rows = []
    columns = carried.tocsc()
    for block, scores in scorer.word_blocks():
        marks = columns[:, block].toarray()                         # (N, B)
        auc, ap = auc_and_ap(scores, marks)
        for i, k in enumerate(range(block.start, block.stop)):
            threshold = np.nan
            f1 = np.nan
            photos = int(marks[:, i].sum())
            if LEAST_PHOTOS <= photos < len(marks):
                score, f1 = best_f1(scores[:, i], marks[:, i])
                threshold = float(np.exp(scorer.loss.log_probability(score)))
            rows.append([words[k], int(counts[k]), photos, auc[i], ap[i], threshold, f1, step])
    return [["" if is_nan(value) else value for value in row] for row in rows]


def is_nan(value):
    """Whether this is a number that is none."""
    return isinstance(value, float) and np.isnan(value)


def best_f1(scores, carried):
    """The least score (N,) at which calling photos positive has the best F1, and that F1."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    called = np.arange(1, len(scores) + 1)
    f1 = 2 * np.cumsum(carried[order]) / (called + carried.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = 0                          # no cut between equal scores
    last = f1.argmax()
    lower = ranked[min(last + 1, len(ranked) - 1)]
    return (ranked[last] + lower) / 2, float(f1[last])              # halfway to the next photo


def name_precisions(values, ks=KS):
    """{"precision@1": value, …}."""
    return {f"precision@{k}": float(value) for k, value in zip(ks, values)}


def mean_of_finite(values):
    """The mean of the values that are numbers; NaN where none is."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def units(x):
    """Rows of length 1, (N, D): their products are cosines. A row of zeros stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def cosines_of(units, rows, columns):
    """Cosines (R, C) of some rows with others (C,) of unit vectors, dense or sparse."""
    cosines = units[rows] @ units[columns].T
    return cosines.toarray() if issparse(cosines) else cosines


def csls(cosines, k=10):
    """2 cos(x, y) - r(x) - r(y), r the mean of the k best: hubs get less (Conneau 2018, §2.3)."""
    rows = mean_of_best(cosines, k)                                 # (S,)
    columns = mean_of_best(cosines.T, k)                            # (T,)
    return 2 * cosines - rows[:, None] - columns                    # (S, T)


def mean_of_best(cosines, k):
    """The mean of the k largest numbers of each row."""
    return np.sort(cosines, axis=1)[:, -k:].mean(axis=1)


def retrieval(scores, right, ks=KS):
    """How often a row's k best columns hold a right one, and k drawn by chance do; both (S, T)."""
    hits = np.take_along_axis(right, top_words(scores, max(ks)), 1)             # (S, k)
    precision = [hits[:, :k].any(axis=1).mean() for k in ks]
    columns = right.shape[1]                                        # T
    good = right.sum(axis=1)                                        # (S,)
    chance = [hypergeom.sf(0, columns, good, min(k, columns)).mean() for k in ks]
    return {**name_precisions(precision, ks), "chance": name_precisions(chance, ks)}


# ------------------------------------- baselines: words of photos by those of training photos

class NearestScores:
    """What score_by_nearest makes of N photos for K words, a block at a time, as a Scorer does.

    Words that no near photo has are ordered by frequency.
    """

    def __init__(self, scores, frequency):
        self.scores = scores                                        # (N, K), sparse
        self.frequency = frequency                                  # (K,)
        self.words = len(frequency)

    def __len__(self):
        return self.scores.shape[0]

    def take(self, photos):
        """The NearestScores of some of the photos, by their numbers."""
        return NearestScores(self.scores[photos], self.frequency)

    def photo_blocks(self):
        """Yield (slice, scores (B, K)) of all photos."""
        for photos in slices(len(self), BLOCK // self.words):
            yield photos, self.scores[photos].toarray() + 1e-6 * self.frequency

    def of_words(self, classes):
        """The scores of some words (C,), (N, C)."""
        return self.scores[:, classes].toarray() + 1e-6 * self.frequency[classes]

    def word_blocks(self):
        """Yield (slice, scores (N, B)) of all words."""
        columns = self.scores.tocsc()
        for words in slices(self.words, BLOCK // 4 // len(self)):
            yield words, columns[:, words].toarray()


def score_by_nearest(x, training_x, labels):
    """NearestScores of N photos: the words of their nearest training photos.

    Of the NEAREST photos by cosine, about the mean of the training photos, the r-th nearest adds
    1 / r to each of its words. (Equal weights, 1 / distance and exp(-distance), by cosine or
    Euclidean, were behind in every number, on pixels and on features.) x (N, D), training_x (M, D),
    labels a sparse boolean (M, K).
    """
    x, training_x = directions(x, training_x)
    others = kernels.to_device(training_x)
    labels = labels.astype(np.float32)
    blocks = []
    for photos in slices(len(x), BLOCK // len(others)):
        some = kernels.to_device(x[photos])
        cosines = kernels.to_host(kernels.matmul(some, others.T))   # (B, M)
        nearest = top_words(cosines, NEAREST)
        blocks.append(rank_weights(nearest, len(others)) @ labels)              # (B, K)
    return NearestScores(vstack(blocks).tocsr(), labels.mean(axis=0))


def directions(x, training_x):
    """Rows of x (N, D) and training_x (M, D), of length 1 about the mean of the latter, float32."""
    mean = training_x.mean(axis=0, dtype=np.float64)
    return units((x - mean).astype(np.float32)), units((training_x - mean).astype(np.float32))


def rank_weights(nearest, count):
    """Of each row of `nearest` (B, k), numbers of `count` photos, the r-th weighs 1 / r: sparse."""
    b, k = nearest.shape
    weights = np.tile(1 / np.arange(1, k + 1, dtype=np.float32), b)
    rows = np.repeat(np.arange(b), k)
    return csr_array((weights, (rows, nearest.ravel())), (b, count))


def score_by_regression(x, training_x, labels):
    """A Scorer of N photos by a linear regression of the training photos' words (ridge).

    w and b minimise |X wᵀ + b - Y|² + λ |w|² for the labels Y of 0 and 1: with the columns of X
    about their means, w (XᵀX + λ I) = YᵀX. Rows of X are those that score_by_nearest compares
    (columns of variance 1, or as they are, did about as well), λ is that of choose_ridge. The score
    of a word is its estimated label.
    x (N, D), training_x (M, D), labels a sparse boolean (M, K).
    """
    x, training_x = directions(x, training_x)
    labels = labels.astype(np.float32)
    frequency = labels.mean(axis=0)                                 # (K,)
    mean = training_x.mean(axis=0)                                  # (D,)
    w = fit_ridge(training_x - mean, labels, choose_ridge(training_x, labels))
    output = model.Output(len(mean), len(frequency))
    output.w = kernels.to_device(w)
    output.b = kernels.to_device(frequency - w @ mean)
    return Scorer(kernels.to_device(x), output, model.OneVersusAll(frequency))


def fit_ridge(x, labels, penalty):
    """w (K, D) that minimises |x wᵀ - Y|² + λ |w|², λ = penalty · the mean eigenvalue of xᵀx.

    x (M, D): about its mean, so that Y, the labels (M, K), need not be.
    """
    gram = (x.T @ x).astype(np.float64)                             # (D, D)
    gram += penalty * gram.trace() / len(gram) * np.eye(len(gram))
    factor = cho_factor(gram)
    products = labels.T @ x                                         # (K, D)
    w = np.empty_like(products)
    for words in slices(len(w), BLOCK // len(gram)):
        w[words] = cho_solve(factor, products[words].T).T
    return w


def choose_ridge(x, labels):
    """The one of RIDGE whose fit to the other photos has the least error on a tenth of them, H.

    x (M, D), labels (M, K). With xᵀx = V diag(l) Vᵀ all fits are w Vᵀ, w = Yᵀx V / (l + λ), and
    |H V wᵀ - R|² = tr(w (H V)ᵀ(H V) wᵀ) - 2 tr(w (H V)ᵀR) + |R|²: nothing takes a number for each
    photo and word.
    """
    held = len(x) // 10                         # the photos of an index are in random order
    if not held:
        return RIDGE[0]
    mean = x[held:].mean(axis=0)
    others = x[held:] - mean
    values, vectors = eigh((others.T @ others).astype(np.float64))  # (D,), (D, D)
    h = (x[:held] - mean) @ vectors                                 # (m, D)
    hh = h.T @ h                                                    # (D, D)
    errors = np.zeros(len(RIDGE))                                   # without |R|²
    for words in slices(labels.shape[1], BLOCK // len(hh)):
        known = labels[held:, words]                                # (M - m, B)
        products = (known.T @ others) @ vectors                     # (B, D)
        hr = labels[:held, words].T @ h - np.outer(known.mean(axis=0), h.sum(axis=0))
        for i, penalty in enumerate(RIDGE):
            w = products / (values + penalty * values.mean())
            errors[i] += ((w @ hh) * w).sum() - 2 * (w * hr).sum()
    return RIDGE[errors.argmin()]


READOUTS = {f"{NEAREST} nearest": score_by_nearest, "linear regression": score_by_regression}


def best_readout(scores, view, key):
    """Which of READOUTS is better on one of VIEWS, and its score; scores: {name: rank_metrics}."""
    values = {readout: scores[f"{readout}: {view}"][key] for readout in READOUTS}
    best = max(values, key=values.get)
    return best, values[best]


# ------------------------------------------------------------ words by captions, without a pixel

def word_photos(index):
    """Which training photos carry each word of an index, a sparse (K, photos) of ones."""
    photos = np.asarray(index.class_photos.values)
    index.check_training(photos)
    ends = np.concatenate([[0], index.class_photos.ends])
    return csr_array((np.ones(len(photos), np.float32), photos, ends), (len(ends) - 1, len(index)))


def ppmi(carried):
    """How much more often two words share a photo than chance has it: sparse (K, K).

    carried (K, photos): which words a photo has. Positive pointwise mutual information, max(0, log
    p_ij / (p_i p_j)): p_ij is the part of the pairs of different words on one photo that are i and
    j, and p_i = Σ_j p_ij (Church and Hanks 1990). Words with like rows keep like company.
    """
    together = (carried @ carried.T).tocoo()                        # (K, K) photos with both
    apart = together.row != together.col                            # not a word with itself
    i = together.row[apart]
    j = together.col[apart]
    count = together.data[apart].astype(np.float64)
    total = np.bincount(i, count, together.shape[0])                # (K,)
    ratio = count * count.sum() / (total[i] * total[j])
    return csr_array((np.maximum(0, np.log(ratio)), (i, j)), together.shape)


def sparse_units(x):
    """Rows of a sparse x (N, D) of length 1; a row of zeros stays zero."""
    lengths = np.maximum(sparse_norm(x, axis=1), 1e-12)             # (N,)
    return csr_array(x.multiply(1 / lengths[:, None]))


def break_ties(scores):
    """Equal scores in a random order, a function of their places, not that of the dictionary."""
    raw = philox(0, (0, 2, 0, SPLITS)).random_raw(scores.size)
    return scores + 1e-9 * (raw / 2**64).reshape(scores.shape)


# --------------------------------------------------------------------------------- features

def central_crops(loader, photos, crop, progress=None):
    """Yield (numbers (n,), x, pixels) of the photos that can be read, n at a time.

    pixels are uint8 (n, S, S, 3), as decoded; x (n, crop, crop, 3) is their centre for a network.
    """
    for numbers, pixels in loader.read(photos, progress):
        top, left, flip = data.centre(len(pixels), pixels.shape[1] - crop)
        yield numbers, kernels.prepare(pixels, top, left, flip, crop), pixels


def extract_features(net, loader, photos, crop, progress=None):
    """Features (N, E) of the photos that can be read, and the N numbers of these photos."""
    readable = []
    features = []
    for numbers, x, _ in central_crops(loader, photos, crop, progress):
        readable += numbers.tolist()
        features.append(net.features(x))                            # (n, E)
    if not features:
        return np.zeros((0, 1), np.float32), readable
    return np.concatenate(features), readable


def ten_crops(pixels, crop):
    """Yield x (n, crop, crop, 3) of the corners, the centre, and their mirror images."""
    n = len(pixels)
    spare = pixels.shape[1] - crop
    middle = spare // 2
    for top, left in ((0, 0), (0, spare), (spare, 0), (spare, spare), (middle, middle)):
        for flip in (False, True):
            yield kernels.prepare(pixels, np.full(n, top), np.full(n, left), np.full(n, flip), crop)


# ------------------------------------------------------------------ regression (paper, §5.2)

PENALTIES = 10.0 ** np.arange(-1, -7, -1)       # λ to choose from, strongest first
USUAL_PENALTY = 1e-4                            # where no photo can be held out to choose
FOLDS = 5                                       # of the training photos; one is held to choose λ,
FEW = 20                                        # or each in turn if a class has fewer photos
ORDERS = 300                                    # random ones, whose mean is the chance
RAW = 16                                        # raw pixels: that many rows and columns
ZERO_SHOT = "class names as words"
VIEWS = ("this model", "untrained network", f"raw pixels, {RAW} × {RAW}")
VIEWS_OF_PLOTS = {VIEWS[1]: VIEWS[1], VIEWS[2]: f"{RAW}x{RAW} pixels"}      # names in a legend
FIT = {"maxiter": 300, "maxcor": 10, "gtol": 1e-5, "ftol": 1e-8}


def logistic(flat, x, y, penalty):
    """Multinomial logistic regression with an L2 penalty: loss and gradient.

    ℓ = -1/N Σ_n log p_n,y(n) + λ/2 |w|² with p = softmax(x w + b), so ∂ℓ/∂s = (p - [y]) / N for
    the scores s, and ∂ℓ/∂w = xᵀ ∂ℓ/∂s + λ w. x (N, D), y (N,) classes; flat is w (D, C) with the
    row b (C,) under it, which is not penalised. Products have the precision of x, sums are float64.
    """
    table = flat.reshape(x.shape[1] + 1, -1)                        # (D+1, C)
    w = table[:-1]
    rows = np.arange(len(x))
    log_p = log_softmax(predict(table, x), axis=1)                  # (N, C)
    loss = -log_p[rows, y].mean(dtype=np.float64) + penalty / 2 * (w * w).sum()
    ds = np.exp(log_p) / len(x)                                     # (N, C)
    ds[rows, y] -= 1 / len(x)
    return loss, np.vstack([x.T @ ds + penalty * w, ds.sum(axis=0)]).ravel()


def fit(x, y, penalty, start=None):
    """The table (D+1, C) of w and b that minimises `logistic`, by L-BFGS from `start`."""
    if start is None:
        start = np.zeros((x.shape[1] + 1, y.max() + 1))
    result = minimize(logistic, start.ravel(), args=(x, y, penalty), method="L-BFGS-B", jac=True,
                      options=FIT)
    return result.x.reshape(start.shape)


def predict(table, x):
    """The scores x w + b, (N, C)."""
    return x @ table[:-1].astype(x.dtype) + table[-1].astype(x.dtype)


def choose_penalty(x, y, folds, goodness):
    """The fit to all with the λ whose fits to the rest are best on those held, and that λ.

    folds: boolean (N,) each, of the photos that are held; where there are several, the mean counts.
    """
    if not folds:                               # one photo a class
        return fit(x, y, USUAL_PENALTY), USUAL_PENALTY
    values = np.zeros(len(PENALTIES))
    for held in folds:
        table = None
        for i, penalty in enumerate(PENALTIES):
            table = fit(x[~held], y[~held], penalty, table)         # begins at a stronger λ's
            values[i] += goodness(predict(table, x[held]), y[held]) / len(folds)
    best = PENALTIES[values.argmax()]           # the strongest of equally good ones
    return fit(x, y, best), best


def fold_masks(y, seed, number):
    """Boolean (N,) each: photos of each class to choose λ by, at random by (seed, number).

    A fifth of the photos, or five in turn where a class has few, as one fifth says little then. The
    only photo of a class is never among them.
    """
    order = shuffled(len(y), seed, number)
    fold = np.full(len(y), -1)
    fewest = len(y)
    for label in np.unique(y):
        photos = order[y[order] == label]
        fewest = min(fewest, len(photos))
        if len(photos) > 1:
            fold[photos] = np.arange(len(photos)) % FOLDS
    count = FOLDS if fewest < FEW else 1
    masks = [fold == i for i in range(count)]
    return [mask for mask in masks if mask.any()]


def shuffled(n, seed, number):
    """The numbers 0 … n - 1 in a random order, a function of (seed, number)."""
    return np.argsort(philox(seed, (0, number, 0, SPLITS)).random_raw(n), kind="stable")


def split(y, take, seed, number):
    """Boolean (N,): take(n) of each class's n photos at random, a function of (seed, number)."""
    order = shuffled(len(y), seed, number)
    mask = np.zeros(len(y), bool)
    for label in np.unique(y):
        photos = order[y[order] == label]
        mask[photos[:take(len(photos))]] = True
    return mask


def accuracy(scores, y):
    """How often the class with the highest of the scores (N, C) is the photo's."""
    return float((scores.argmax(axis=1) == y).mean())


def class_accuracy(scores, y):
    """The mean over the classes of y of each one's accuracy: a constant guess has 1 / C."""
    right = scores.argmax(axis=1) == y
    return float(np.mean([right[y == label].mean() for label in np.unique(y)]))


def voc_ap(scores, y):
    """Average precision of scores (N, 2) as in Pascal VOC 2007; y (N,) is 1 where the class is."""
    if not y.any():
        return 0.0                              # a fold without the class says nothing of λ
    hits = np.cumsum(y[np.argsort(scores[:, 0] - scores[:, 1], kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    recall = hits / hits[-1]
    highest = np.maximum.accumulate(precision[::-1])[::-1]          # at that recall or a greater
    return float(highest[np.searchsorted(recall, np.arange(11) / 10 - 1e-12)].mean())


# -------------------------------------------------------------------------------- pictures

SIDE = 150                      # of a photo in a grid of photos, pixels …
GAP = 6                         # … between two of them …
TEXTS = 50                      # … and for the texts above and below a row
ZOOM = 6                        # pixels of a filter's weight
LOSS_NAMES = {"softmax": "loss of a photo's words, mean of -log p (nats)",
              "one-vs-all": "loss of a photo, equation 1"}
SCORES = {                                      # key of a score: its axis
    "precision@10": "precision@10 (fraction)",
    "auc": "AUC, mean over the words (fraction)",
    "map": "average precision, mean over the words (fraction)"}


def save_image(image, path):
    """Write a picture file, whole or not at all."""
    with console.whole_file(path) as file:
        image.save(file, "PNG")


def thumbnail(path, side, square=False):
    """A photo in its own shape, its longer side of `side` pixels; blank, and named, if it is gone.

    It was read before, but photos may vanish or change while a command runs.
    """
    try:
        return Image.fromarray(data.decode(path, side, square))
    except ValueError as error:
        print(f"{path} is left out: {error}", file=sys.stderr, flush=True)
        return Image.new("RGB", (side, side), "white")


def filters_picture(w):
    """The first layer's filters (KH, KW, 3, F), each stretched to full contrast, as a grid."""
    kh, kw, _, f = w.shape
    side = int(np.ceil(np.sqrt(f)))
    low = w.min(axis=(0, 1, 2))                                     # (F,)
    high = w.max(axis=(0, 1, 2))
    stretched = (w - low) / np.maximum(high - low, 1e-12) * 255
    tiles = np.full((side * side, kh + 1, kw + 1, 3), 255, np.uint8)            # with white edges
    tiles[:f, 1:, 1:] = stretched.transpose(3, 0, 1, 2)
    grid = tiles.reshape(side, side, kh + 1, kw + 1, 3)
    grid = grid.transpose(0, 2, 1, 3, 4)                            # (side, KH+1, side, KW+1, 3)
    pixels = grid.reshape(side * (kh + 1), side * (kw + 1), 3)
    return Image.fromarray(pixels.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1))


def curve_of(rows, name, across, key):
    """The Curve of row[key] against row[across], with row[key + SPREAD], where they are numbers."""
    rows = [row for row in rows if row.get(key) is not None and np.isfinite(row[key])]
    return figures.Curve(name, [row[across] for row in rows], [row[key] for row in rows],
                         [row.get(key + SPREAD, 0) for row in rows],
                         [row.get(key + OVER, "") for row in rows])


def logged_level(log, key):
    """The baseline of a score that a run's log has, {name: value}, empty if it has none."""
    last = log[-1] if log else {}
    levels = {"precision@10": ("most frequent words", last.get("precision@10_frequent_words")),
              "auc": ("chance", 0.5), "map": ("chance", last.get("map_chance"))}
    name, level = levels[key]
    return {} if level is None else {name: level}


def curves_plots(log, loss="softmax", mark=()):
    """The learning curves of a run's log, over the epochs, a list of Plots.

    loss: its option; mark: an epoch, and what is said of it.
    """
    losses = [curve_of(log, "held-out photos", "epoch", "validation_loss"),
              curve_of(log, "training photos", "epoch", "training_loss")]
    plots = [figures.Plot("epoch", LOSS_NAMES[loss], losses, {}, mark=mark)]
    if not losses[1].x:                         # of an older run, or nothing is held out
        objective = curve_of(log, "objective", "epoch", "loss")
        plots.insert(0, figures.Plot("epoch", "objective of training", [objective], {}, mark=mark))
    for key, name in SCORES.items():
        curve = curve_of(log, "held-out photos", "epoch", key)
        plots.append(figures.Plot("epoch", name, [curve], logged_level(log, key), mark=mark))
    shown = [plot for plot in plots if any(curve.x for curve in plot.curves)]
    return shown or plots[:1]


def grid_picture(rankings, find, fonts, width=None):
    """Words above their photos, {word: {name: text under the photo}} (Fig. 3).

    find(name) is a photo's path; width: in pixels; if not given, photos are SIDE wide.
    """
    columns = max(len(photos) for photos in rankings.values())
    own_width = columns * (SIDE + GAP) + GAP
    scale = (width or own_width) / own_width
    side = int(SIDE * scale)
    gap = int(GAP * scale)
    row_height = round((SIDE + GAP + TEXTS) * scale)
    size = (width or own_width, len(rankings) * row_height + gap)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for row, (word, photos) in enumerate(rankings.items()):
        top = gap + row * row_height
        draw.text((gap, top + 20 * scale), word, figures.INK, fonts.find(word, 20 * scale), "ls")
        bottom = round(top + 28 * scale) + side
        for column, (name, label) in enumerate(photos.items()):
            left = gap + column * (side + gap)
            photo = thumbnail(find(name), side)
            image.paste(photo, (left, bottom - photo.height))
            font = fonts.find(label, 13 * scale)
            draw.text((left, bottom + 3 * scale), label, figures.INK, font)
    return image


def mosaic_picture(paths, y, size):
    """Photos at points (N, 2) in [0, 1]², each in the nearest free cell of a grid (Fig. 4)."""
    side = int(np.ceil(np.sqrt(1.5 * len(y))))                      # so that the shape shows
    cell = max(1, size // side)                                     # pixels of a photo
    image = Image.new("RGB", (max(size, side), max(size, side)), "white")
    edge = (image.width - side * cell) // 2
    free = np.argwhere(np.ones((side, side)))                       # (side², 2)
    for path, point in zip(paths, y * (side - 1)):
        nearest = ((free - point) ** 2).sum(axis=1).argmin()
        left, top = free[nearest] * cell + edge
        image.paste(thumbnail(path, cell, square=True), (int(left), int(top)))
        free = np.delete(free, nearest, axis=0)
    return image


# ----------------------------------------------------------------------------- trained runs

PLACES = ("seed", "out", "resume", "workers", "threads", "device", "images")
DATA = ("captions", "format", "image_column", "text_column", "valid", "drawn", "pictures")
LENGTH = ("epochs", "epoch_size", "lr")         # often chosen by the number of photos


class Trained:
    """A run's model: its best weights, or those of a given checkpoint.

    net, and recipe, of model.NETWORKS; loss; words, and classes, {word: class}; counts (K,), the
    training photos of each word, and training, all of them; options and log of the run.
    shift (K,), of model.prior_shift, is in the biases of net's output layer, so that its scores are
    those of photos as they are; None for nothing. learned_b (K,): the biases as they were trained.
    prior: which frequencies of words the probabilities assume, as a text.
    """

    def __init__(self, run, prior="real"):
        """run: a run's folder, or a checkpoint; it says on stderr which weights these are.

        prior: "none" leaves the biases as training made them.
        """
        path = data.find_checkpoint(run)
        checkpoint = data.load_checkpoint(path)
        facts = checkpoint.facts
        self.name = run
        self.folder = os.path.dirname(path) or "."
        self.file = os.path.basename(path)
        self.log = whole_log(path, facts)
        print(describe_checkpoint(path, facts), file=sys.stderr, flush=True)
        self.words = checkpoint.words
        self.classes = {word: i for i, word in enumerate(self.words)}
        self.options = facts["options"]
        if self.options["drawn"]:               # wherever the run's folder is now
            self.options.update(drawn.sources(self.folder))
        self.step = facts["step"]
        self.epoch = facts["epoch"]
        self.training = facts["training"]       # photos
        self.counts = np.array(facts["counts"])
        self.loss = self.make_loss(self.counts)
        self.recipe = model.NETWORKS[self.options["network"]]
        self.net = self.recipe.build(len(self.words), self.options["dropout"], seed=None)
        self.net.load(checkpoint.weights)
        self.learned_b = self.net.output.b
        self.label_frequency, self.label_weight = self.find_label_frequency(facts)
        self.shift = None
        self.prior = "words are as frequent as training drew them"
        if prior == "real":
            self.add_prior()

    def add_prior(self):
        """Add the prior of real photos to the biases, and say how good it is."""
        if self.label_frequency is None:
            print(f"prior: not known, {self.folder}/index is not that of the training captions; "
                  "probabilities are those of the words as training drew them", file=sys.stderr,
                  flush=True)
            return
        self.prior = "words are as frequent as in photos"
        self.shift = self.prior_shift(self.counts)
        if self.shift is None:
            return
        self.net.output.b = self.learned_b + kernels.to_device(self.shift)
        how = "an exact" if model.prior_is_exact(self.options) else "an approximate"
        self.prior += f", by {how} correction of how training drew them"
        print(f"prior: {self.prior}", file=sys.stderr, flush=True)

    def describe_weights(self):
        """Which of the run's weights these are, as a sentence."""
        kinds = {"best.npz": "the best epoch's, by its scores on held-out photos",
                 "model.npz": "the last ones"}
        kind = kinds.get(self.file, "those of another checkpoint")
        return (f"The weights are {kind} ({self.file}): step {self.step:,}, epoch {self.epoch} of "
                f"{len(self.log)}.")

    def curves(self):
        """The Plots of the run's learning curves, with a mark at the epoch of these weights."""
        mark = ()
        if self.epoch in [row["epoch"] for row in self.log]:        # else it ended within the first
            mark = (self.epoch, f"these weights, of epoch {self.epoch}")
        return curves_plots(self.log, self.options["loss"], mark)

    def prior_shift(self, counts):
        """model.prior_shift to photos of which so many, (K,), carry each word; None for nothing."""
        return model.prior_shift(self.options, counts, self.training, self.label_frequency,
                                 self.label_weight)

    def equal_output(self):
        """The output layer as if all words were equally frequent in photos.

        Where training's prior is not known it is the one that training made.
        """
        output = model.Output(self.net.output.w.shape[1], len(self.words))
        output.w = self.net.output.w
        output.b = self.learned_b
        shift = None
        if self.label_frequency is not None:
            shift = self.prior_shift(np.full(len(self.words), self.counts.mean()))
        if shift is not None:
            output.b = self.learned_b + kernels.to_device(shift)
        return output

    def find_label_frequency(self, facts):
        """How often training's rows have each word as a target, and what it weighs, (K,) each.

        None, twice, if that is lost. The checkpoints of older versions have neither, or one: the
        weight after `idf`, else the frequency.
        """
        frequency = facts.get("label_frequency")
        if "label_weight" in facts:
            return frequency, facts["label_weight"]
        if frequency is None:
            frequency = self.derive_label_frequency()
        positives = self.options["positives"]
        if frequency is not None and positives == "balanced":
            return frequency, np.full(len(self.words), 1 / len(self.words))
        if positives == "idf":
            return self.counts / self.training, frequency
        return frequency, frequency

    def derive_label_frequency(self):
        """How often training's rows have each word as a target, (K,), or None if that is lost."""
        sampling = self.options["sampling"]
        positives = self.options["positives"]
        if sampling == "image":
            return self.counts / self.training
        if positives == "drawn":
            return np.full(len(self.words), 1 / len(self.words))
        index = self.training_index()
        return None if index is None else index.label_frequency(sampling, positives)

    def training_index(self):
        """The index that the run was trained on, or None where that is lost.

        It tells which photos carry which words, wherever captions and photos are now. The index in
        the run's folder is it if each word has as many training photos as in training.
        """
        try:
            index = data.Index(os.path.join(self.folder, "index"))
        except (OSError, ValueError, KeyError):                     # none, or a damaged one
            return None
        is_same = (index.dictionary == self.words and index.training == self.training
                   and np.array_equal(index.counts, self.counts))
        return index if is_same else None

    def source(self, captions=None):
        """How captions are read: those of the run, or a file of the same columns."""
        own = self.options["captions"]
        captions = captions or own
        return data.Source(captions, self.options["format"] if captions == own else None,
                           self.options.get("image_column"), self.options.get("text_column"),
                           self.options["images"])

    def make_loss(self, counts):
        """The run's loss for words with so many training photos."""
        return model.LOSSES[self.options["loss"]](counts / self.training)

    def settings(self):
        """All that training depends on but the seed, as text: runs that share it are one.

        A drawn set's pictures, and how many have words, are the seed's.
        """
        apart = PLACES + ("captions",) if self.options["drawn"] else PLACES
        settings = {}
        for key, value in self.options.items():
            if key not in apart and value is not None:              # older runs lack newer options
                settings[key] = value
        count = None if self.options["drawn"] else self.training
        epochs = len(self.log) if self.options["epochs"] else None  # fewer if it was interrupted
        return json.dumps([count, epochs, settings], sort_keys=True)

    def index(self, captions, words, valid, place="index-eval"):
        """The index of the captions under a dictionary of these words; the run's own if it fits.

        captions: a file, or None for the run's; valid: the fraction of the photos held out; place:
        the folder of the run that another index than its own is kept in.
        """
        text = data.Text(self.options["words"], self.options["stop_words"], valid)
        source = self.source(captions)
        index = data.cached_index(source, os.path.join(self.folder, "index"), text)
        if index is not None and index.dictionary == words:
            return index
        folder = os.path.join(self.writable_folder(), place)
        return data.build_index(source, folder, text, words)

    def writable_folder(self):
        """The run's folder, or a temporary one where that takes no files."""
        if os.access(self.folder, os.W_OK):
            return self.folder
        self.scratch = tempfile.TemporaryDirectory()                # until the run is forgotten
        return self.scratch.name

    def photos(self, options):
        """The folder and names of the photos: those of --images, or the held-out ones."""
        if options.images:
            return options.images, data.list_photos(options.images)
        index = self.index(None, self.words, self.options["valid"])
        return self.options["images"], [index.name(i) for i in range(index.held_out)]

    def read(self, folder, names, workers):
        """The photos of a folder for this network."""
        return PhotoReader(folder, names, self.recipe, workers)

    def features(self, folder, names, workers):
        """Features (N, E) of a folder's photos that can be read, and the reader that read them."""
        reader = self.read(folder, names, workers)
        features = [self.net.features(x) for _, x, _ in reader]
        return np.concatenate(features), reader

    def words_by_path(self):
        """{path: words} of the photos of the run's captions; none where they are very many."""
        index = self.training_index()
        if index is None or len(index) > MOST_COMPARED:
            return {}
        folder = os.path.realpath(self.options["images"])
        return {os.path.join(folder, index.name(i)): [self.words[k] for k in index.words(i)]
                for i in range(len(index))}

    def find_words(self, words):
        """Classes of words as a person gives them."""
        stop_words = data.stop_words(os.path.join(self.folder, "index"))
        classes = []
        for word in words:
            word = " ".join(data.words_of(word)) or word
            if word in stop_words and word not in self.classes:
                raise ValueError(f"{word!r} was left out as a stop word, one of the "
                                 f"{len(stop_words):,} most frequent words; train with "
                                 "--stop-words 0")
            if word not in self.classes:
                near = ", ".join(near_words(word, self.words)) or "none"
                raise ValueError(f"{word!r} is not among the model's {len(self.words):,} words, "
                                 f"which are in {self.folder}/words.txt; near in spelling: {near}")
            classes.append(self.classes[word])
        return np.array(classes, np.int32)

    def scorer(self, words, features):
        """The Scorer of features (N, E) for some of the run's words."""
        classes = self.find_words(words)
        output = model.Output(features.shape[1], len(words))
        output.w = self.net.output.w[classes]
        output.b = self.learned_b[classes]
        shift = None if self.shift is None else self.shift[classes]
        return Scorer(features, output, self.make_loss(self.counts[classes]), shift)

    def fingerprint(self):
        """A text that differs between runs whose features of one photo differ."""
        digest = hashlib.blake2b(digest_size=16)
        for path, layer, attribute in self.net.parameters():
            if getattr(layer, attribute) is not None and layer is not self.net.output:
                digest.update(path.encode())
                digest.update(kernels.to_host(getattr(layer, attribute)).tobytes())
        return digest.hexdigest()

    def thresholds_file(self):
        """Where `words` writes the table of words that `tag --threshold auto` reads."""
        return os.path.join(self.folder, "thresholds.csv")

    def thresholds(self):
        """The least probability of each word to tag a photo with it, (K,), inf without one."""
        path = self.thresholds_file()
        remedy = f"first let `eval.py words --model {self.name}` choose the words' thresholds"
        if not os.path.exists(path):
            raise ValueError(f"--threshold auto: there is no {path}; {remedy}")
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or any(row.get("step") != str(self.step) for row in rows):
            raise ValueError(f"--threshold auto: {path} is of other weights; {remedy}")
        thresholds = np.full(len(self.words), np.inf)
        for row in rows:
            if row["threshold"]:
                thresholds[self.classes[row["word"]]] = float(row["threshold"])
        return thresholds

    def vectors(self):
        """The words' vectors, the rows of the output layer's w, as NumPy: (K, E)."""
        return kernels.to_host(self.net.output.w)


def whole_log(path, facts):
    """The rows of a run's log: a checkpoint has those up to itself, log.jsonl may have more."""
    rows = data.read_log(os.path.dirname(path) or ".")
    return rows if len(rows) > len(facts["log"]) else facts["log"]


def describe_checkpoint(path, facts):
    """A line that says which weights these are, and how good they were if that is known."""
    log = whole_log(path, facts)
    line = f"{path}: step {facts['step']:,}, epoch {facts['epoch']} of {len(log)}"
    for row in log:
        if row["step"] == facts["step"] and row["validation_loss"] is not None:
            line += f", held-out loss {row['validation_loss']:.4f}"
            if row.get("map") is not None:
                line += f", mean AP {row['map']:.4f}"
    return line


def near_words(word, words, count=3):
    """Words that begin with this one, then those spelt nearly alike, same first letter first."""
    if not word:
        return []
    longer = [other for other in words if other.startswith(word)]
    close = difflib.get_close_matches(word, words, 9, 0.65)
    close.sort(key=lambda other: other[0] != word[0])
    return list(dict.fromkeys(longer + close))[:count]


class PhotoReader:
    """Photos to iterate over, once, in batches for a network: (names, x, pixels).

    x and pixels are as of central_crops. Progress is shown; at the end, photos that cannot be read
    are said, and stand in `skipped`, {name: why}; `names` are the others. ValueError if none can.
    """

    def __init__(self, folder, names, recipe, workers):
        self.folder = folder
        self.asked = names
        self.recipe = recipe
        self.workers = workers
        self.names = []
        self.skipped = {}

    def __iter__(self):
        if not self.asked:
            raise ValueError("there is no photo: none is held out, or none has words of the model")
        if self.folder and not os.path.isdir(self.folder):
            raise ValueError(f"there is no folder {self.folder}; if its photos have moved, give "
                             "their new place by --images")
        count = len(self.asked)
        size = self.recipe.size
        with (data.Loader(self.folder, self.asked.__getitem__, 0, size, self.workers) as loader,
              console.Progress("photos", count) as progress):
            crops = central_crops(loader, range(count), self.recipe.crop, progress)
            for numbers, x, pixels in crops:
                names = [self.asked[i] for i in numbers]
                self.names += names
                yield names, x, pixels
        self.skipped = loader.skipped
        self.report_skipped()

    def report_skipped(self):
        """Say what cannot be read; ValueError if that is all."""
        count = len(self.asked)
        reasons = [f"{name}: {why}" for name, why in itertools.islice(self.skipped.items(), 10)]
        if not self.names:
            source = f" from {self.folder!r}" if self.folder else ""
            raise ValueError(f"none of the {count:,} photos can be read{source}; "
                             f"{'; '.join(reasons[:3])}")
        if self.skipped:
            more = "; …" if len(self.skipped) > 10 else ""
            print(f"{len(self.skipped):,} of {count:,} photos cannot be read: "
                  f"{'; '.join(reasons)}{more}", file=sys.stderr, flush=True)


def read_pairs(path, run, scored=False):
    """[(class, class, score)] of a file's pairs whose two words the run knows; how many it has.

    Lines are word<TAB>word, and <TAB>score if `scored`, else the score is 0. The first of those
    with scores may be a heading.
    """
    kind = "word<TAB>word<TAB>score" if scored else "word<TAB>word"
    count = 0
    pairs = []
    for i, line in read_lines(path, kind).items():
        first, second, score = split_pair(line)
        if scored and score is None:
            if i > 1:
                raise ValueError(f"--pairs: line {i} of {path} is not {kind}: {line[:60]!r}")
            continue
        count += 1
        classes = [run.classes.get(" ".join(data.words_of(word))) for word in (first, second)]
        if None not in classes:
            pairs.append((*classes, score if scored else 0))
    return pairs, count


def read_lines(path, kind):
    """{number of a line: its text} of those with text; the first is line 1."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise ValueError(f"--pairs: {path}: {error.strerror}; it takes a file of {kind} lines"
                         ) from None
    return {i: line for i, line in enumerate(lines, 1) if line}


def split_pair(line):
    """Two words and a score of a line, by tabs or spaces; "" and None where it has less."""
    columns = line.split("\t") if "\t" in line else line.split()
    first, second, text, *_ = columns + ["", "", ""]
    try:
        score = float(text)
    except ValueError:
        return first, second, None
    if not np.isfinite(score):
        return first, second, None
    return first, second, score


# ------------------------------------------------------------------ what the commands share

class Output:
    """Shows what a command finds: on the terminal, in the picture file `out`, and as HTML."""

    def __init__(self, out=None):
        self.out = out
        self.html = []

    def line(self, text):
        """A line of text."""
        print(text)
        self.html.append(f'<p class="note">{escape(text)}</p>')

    def best(self, rankings, nothing="none", captions=()):
        """Show rankings as of best_of, a line for each name; `nothing` where there is nothing.

        captions: {name: the words that it should have}, to show beside them.
        """
        for name, others in rankings.items():
            items = [f"{other} {value:.3g}" for other, value in others.items()]
            text = ", ".join(items) if items else nothing
            if name in captions:
                text += f" (its captions: {', '.join(captions[name])})"
            print(f"{name}: {text}", flush=True)
            self.html.append(f"<p><b>{escape(name)}</b>: {escape(text)}</p>")

    def table(self, heading, rows):
        """A heading over rows of texts and numbers, {name: row}; the names are on the left."""
        lines = [list(heading)]
        for name, row in rows.items():
            lines.append([name] + [format_cell(cell) for cell in row])
        widths = [max(len(cell) for cell in column) for column in zip(*lines)]
        for first, *rest in lines:
            cells = [first.ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
            print("  ".join(cells).rstrip())
        body = [html_row(line, "td") for line in lines[1:]]
        table = "<table>" + html_row(lines[0], "th") + "".join(body) + "</table>"
        self.html.append(wide_html(table, table_width(lines)))

    def plots(self, plots, what, width=None):
        """Plots, into the file, so many pixels wide, or on the page, each of its own."""
        if self.out:
            self.save(figures.draw_plots(plots), what, figures.plot_table(plots), width)
            return
        panels = [f"<figure>{figures.draw_plots([plot]).svg()}</figure>" for plot in plots]
        self.html.append(f'<div class="plots">{"".join(panels)}</div>')

    def picture(self, picture, what, table):
        """A Drawing or a picture of photos, and its numbers: into the file, or on the page."""
        if self.out:
            self.save(picture, what, table)
        elif isinstance(picture, figures.Drawing):
            self.html.append(wide_html(picture.svg(), picture.width))
        else:
            self.html.append(image_html(picture, what))

    def save(self, picture, what, table, width=None):
        """Write the picture file, a Drawing so many pixels wide, and beside it its numbers."""
        save_picture(self.out, picture, table, width)
        print(f"{self.out}: {what}; its numbers are in {numbers_file(self.out)}")

    def photos(self, photos):
        """Photos beside each other on the page: (path, what it shows, HTML to stand under it)."""
        self.html.append('<div class="photos">')
        for path, what, below in photos:
            image = image_html(thumbnail(path, 200), what)
            self.html.append(f"<figure>{image}<figcaption>{below}</figcaption></figure>")
        self.html.append("</div>")


def table_width(lines):
    """How many pixels a table of these rows takes on a page, about, where its heading may wrap."""
    heading, *rows = lines
    longest = [max(name.split(), key=len, default="") for name in heading]
    letters = [max(map(len, column)) for column in zip(longest, *rows)]
    return LETTER * sum(letters) + CELL * len(letters)


def wide_html(html, width):
    """HTML that is so many pixels wide: where the page is less, one can scroll, and is told so."""
    hint = '<p class="hint">wider than the page: scroll sideways →</p>'
    return (f'<div class="wide" style="--width: {width:.0f}px">{hint}'
            f'<div class="scroll">{html}</div></div>')


def numbers_file(path):
    """The file with the numbers of a picture, beside it."""
    return os.path.splitext(path)[0] + ".csv"


def save_picture(path, picture, table, width=None):
    """Write a Drawing, so many pixels wide, or a picture of photos, and beside it its numbers."""
    if path.lower().endswith(".svg"):
        with console.whole_file(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(picture.svg())
    else:
        save_image(picture.image(width) if isinstance(picture, figures.Drawing) else picture, path)
    heading, rows = table
    with write_table(numbers_file(path), heading) as file:
        file.writerows(rows)


def save_plots(path, plots, width=None):
    """Write a picture of plots, so many pixels wide, and beside it their numbers."""
    save_picture(path, figures.draw_plots(plots), figures.plot_table(plots), width)


@contextmanager
def write_table(path, heading, encoding="utf-8"):
    """A csv.writer into a file of that name, which is there, whole, at the end of the block."""
    how = {"encoding": encoding, "errors": "surrogateescape", "newline": ""}    # any photo's name
    with console.whole_file(path, "w", **how) as file:
        table = csv.writer(file)
        table.writerow(heading)
        yield table


def best_of(names, scores, others, top, least=-np.inf):
    """{name: {other: score}}: the `top` best of the others, none below `least`, by name.

    scores (len(names), len(others)); least: a number, or one for each other.
    """
    result = {}
    least = np.broadcast_to(least, len(others))
    for name, row, best in zip(names, scores, top_words(scores, top)):
        result[name] = {others[i]: float(row[i]) for i in best if row[i] >= least[i]}
    return result


def format_cell(cell):
    """A text as it is, a whole number with commas, another number with four decimals."""
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.4f}"


def html_row(cells, tag):
    """A row of a table; tag: th for a heading, or td."""
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def image_html(image, what):
    """An <img> that holds the image itself."""
    packed = io.BytesIO()
    image.convert("RGB").save(packed, "jpeg", quality=85, optimize=True)
    text = base64.b64encode(packed.getvalue()).decode()
    return f'<img alt="{escape(what)}" src="data:image/jpeg;base64,{text}">'


PARSER = console.Parser(description=console.summary(__doc__))
COMMANDS = PARSER.add_subparsers(required=True, metavar="COMMAND")
EXAMPLES = {}                   # {command: (what it does, an example of it)}


def command(name, *options, example, runs=1):
    """Make the function under this line a command with these options.

    It is called with the options' values, an Output and the Trained run; with runs="+", all runs.
    example: arguments that show what it is for.
    """
    def register(function):
        says = console.summary(function.__doc__)
        line = f"python eval.py {name} {example}"
        EXAMPLES[name] = says, line
        parser = COMMANDS.add_parser(name, help=says, description=says,
                                     epilog=console.EXAMPLE + line)
        parser.set_defaults(function=function, out=None, prior="none")
        parser.add_argument("--model", required=True, nargs=runs, metavar="RUN",
                            help="a run's folder, or an .npz")
        function.defaults = {}                  # of its own options, for commands that call it
        for flag, settings in options + COMMON:
            action = parser.add_argument(flag, **settings)
            function.defaults[action.dest] = action.default
        return function
    return register


def option(flag, **settings):
    """An option of a command, as of argparse's add_argument."""
    return flag, settings


RUN_FILES = {"run.lock", "model.npz", "best.npz", "words.txt", "log.jsonl", "skipped.txt",
             "curves.png", "curves.csv", "filters.png", "thresholds.csv"}


def output_option(flag, *endings, required=True, **settings):
    """An option that names a file to write: its name ends so, and its folder takes files."""
    def check(path):
        if endings and not path.lower().endswith(endings):
            raise argparse.ArgumentTypeError(f"{path}: its name must end in "
                                             f"{' or '.join(endings)}")
        check_writable(path)
        return path

    settings = {"help": "the file to write", "metavar": "FILE" + "|".join(endings), **settings}
    return option(flag, type=check, required=required, **settings)


def check_writable(path):
    """ArgumentTypeError unless this file can be written, and is no run's own."""
    folder = os.path.dirname(path) or "."
    if path != "-" and not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {folder}; make it first")
    if path != "-" and (os.path.isdir(path) or not os.access(folder, os.W_OK)):
        raise argparse.ArgumentTypeError(f"cannot write {path}; choose another place")
    in_run = os.path.exists(os.path.join(folder, "model.npz"))
    if in_run and os.path.basename(path) in RUN_FILES:
        raise argparse.ArgumentTypeError(f"{path} is a run's own file; choose another name")


def picture_option(*endings, required=False):
    """--out of a command that draws: the picture, with its numbers beside it as a CSV file."""
    flag, settings = output_option("--out", *endings)
    check_picture = settings["type"]

    def check(path):
        check_picture(path)
        numbers = numbers_file(path)
        check_writable(numbers)
        stem = os.path.splitext(path)[0]
        pictures = [path] + [stem + ending for ending in PLOTS]
        if os.path.exists(numbers) and not any(map(os.path.exists, pictures)):  # not of one
            raise argparse.ArgumentTypeError(f"{numbers} is there already, where the numbers of "
                                             f"{path} would be; choose another name")
        return path

    says = "the picture to write, and beside it its numbers as .csv"
    return option(flag, **{**settings, "type": check, "required": required, "help": says})


COMMON = (
    option("--workers", type=number(int, 0, MOST_THREADS), default=2, help="threads to decode"),
    option("--device", choices=kernels.DEVICES, default="auto", help="where to compute"),
    option("--threads", type=number(int, 1, MOST_THREADS), help="threads that compute"),
    output_option("--json", required=False, help="the file to write, or -"))
WORDS = option("words", nargs="+", metavar="WORD", help="words of the dictionary")
TOP = option("--top", type=number(int, 1), default=6, help="how many to show for each")
FOLDER = option("--images", required=True, metavar="DIR", help="folder of photos")
IMAGES = option("--images", metavar="DIR", help="folder of photos; the run's if not given")
CAPTIONS = option("--captions", metavar="FILE", help="captions; the run's if not given")
PRIOR = option("--prior", choices=("real", "none"), default="real",
               help="probabilities of photos as they are, or as training drew them")
BASELINES = option("--no-baselines", action="store_true",
                   help="without words by the nearest training photos and by linear regression, "
                    "which take minutes")
FONT = option("--font", type=figures.Fonts, metavar="FILE",
              help="of words; else any with their letters")
SPLITTING = (
    option("--splits", type=number(int, 1, 10_000), default=10, help="random splits"),
    option("--train-share", type=number(float, 0, 1), default=0.5, help="of each class"),
    option("--train-per-class", type=number(int, 1), help="instead: so many photos"),
    option("--seed", type=number(int, 0, below=2**63), default=0, help="of the splits"))
PLOTS = (".png", ".svg")        # what pictures without photos can be
SIZE = option("--size", type=number(int, 100, 20_000), metavar="PIXELS",
              help="width of a .png; for print, about twice the default")
MAPPING = (
    option("--limit", type=number(int, 10, 100_000), default=2000, help="points at most"),
    option("--perplexity", type=number(float, 1), default=30, help="how many are near, about"),
    option("--steps", type=number(int, 1), default=1000, help="of gradient descent"),
    option("--size", type=number(int, 100, 20_000), default=1600, metavar="PIXELS",
           help="width of the map; larger ones have room for more words"))


def options_of(function, options, **changes):
    """The options of another command: these, its defaults for what is not among them, and changes.
    """
    defaults = getattr(function, "defaults", {})
    return argparse.Namespace(**{**defaults, **vars(options), **changes})


# --------------------------------------------------------------------------- words (Table 1)

TRUTH = option("--truth", metavar="FILE", help="also score against this captions file of what "
               "photos truly show; if not given, what a drawn run drew")


@command("words", IMAGES, CAPTIONS, TRUTH, PRIOR, *SPLITTING, picture_option(*PLOTS), SIZE,
         option("--deciles", action="store_true", help="AUC and AP by frequency of the words, too"),
         option("--transfer", nargs="+", metavar="DIR",
                help="accuracy of features, as `transfer`, too"),
         option("--all", action="store_true", help="score all photos, not the held-out ones"),
         output_option("--per-word", ".csv", required=False,
                       help="AUC, AP and the threshold of the best F1 of each word, to write"),
         BASELINES, example="--model runs/photos", runs="+")
def predict_words(options, show, *runs):
    """Precision@k, AUC and AP of words for photos that were not trained on (Table 1, Fig. 2).

    Of several runs: on photos that none of them trained on, over the words that all of them know.
    """
    if options.per_word and (len(runs) > 1 or show.out):
        raise ValueError("--per-word is of one run, and goes without --out")
    check_different(runs)
    runs = sorted(runs, key=lambda run: run.training)
    test = choose_test(options, runs)
    scored = [score_run(test, run, options, show) for run in runs]
    last = scored[-1]
    if not options.all:
        warn_about_duplicates(test.index, test.folder, last.names, show)
    results = {each.run.name: each.result for each in scored}
    if options.deciles:
        show_deciles(results, show)
    baselines = None
    if test.is_own and not options.no_baselines:
        baselines = score_baselines(test, last, options)
    if len(runs) > 1 or show.out:
        show_curve(scored, baselines, options, show)
        return add_baselines({"runs": results, "words": len(test.words)}, baselines)
    result = add_baselines(last.result, baselines)
    print_words(result, show)
    write_words(test, last, options)
    return result


class TestSet(NamedTuple):
    """The photos and words that runs are scored on."""

    owner: Trained                  # the run with the most training photos, whose photos these are
    index: data.Index               # which photos carry which words
    folder: str                     # of the photos
    photos: dict                    # {name: its number in the index}
    words: list                     # those that all runs know
    counts: np.ndarray              # (K,) how many of the owner's training photos carry each
    is_own: bool                    # whether these are photos that the owner held out


class ScoredRun(NamedTuple):
    """A run, and how well it tells the words of a TestSet's photos."""

    run: Trained
    names: list                     # of the N photos that can be read
    carried: csr_array              # (N, K), which of the words each carries
    scorer: Scorer
    result: dict                    # what `words` reports


def choose_test(options, runs):
    """The TestSet that the options name for runs, the one with the most training photos last."""
    owner = runs[-1]
    words = common_words(runs)
    index = common_index(options, runs, words)
    count = len(index) if options.all else index.held_out
    return TestSet(owner, index, options.images or owner.options["images"],
                   {index.name(i): i for i in range(count)}, words,
                   owner.counts[owner.find_words(words)],           # one order of words for all
                   not (options.all or options.captions or options.images))


def score_run(test, run, options, show):
    """The ScoredRun of a run: its numbers, those against the truth, and accuracies of transfer."""
    features, reader = run.features(test.folder, list(test.photos), options.workers)
    targets = [test.index.words(test.photos[name]) for name in reader.names]
    carried = mark_words(targets, len(test.words))
    scorer = run.scorer(test.words, features)
    result = {"training_photos": run.training, "skipped": len(reader.skipped),
              **score_photos(scorer, targets, carried, test.counts)}
    rows, shown = find_truth(test, run, run.words, reader.names, options)
    if rows:
        own_scorer = run.scorer(run.words, features[rows])
        result["truth"] = truth_metrics(own_scorer, shown, run.words)
    for images, key in transfer_keys(options).items():
        result.update(score_transfer(run, images, key, options, show))
    return ScoredRun(run, reader.names, carried, scorer, result)


def add_baselines(result, baselines):
    """A result with those of baselines, if they are there."""
    return result if baselines is None else {**result, "baselines": baselines}


def check_different(runs):
    """ValueError where a run is given twice."""
    names = [os.path.realpath(run.name) for run in runs]
    for run, name in zip(runs, names):
        if names.count(name) > 1:
            raise ValueError(f"--model: {run.name} is given twice; name each run once")


def common_words(runs):
    """The words that all runs know, in the order of the last one."""
    words = [word for word in runs[-1].words if all(word in run.classes for run in runs)]
    if not words:
        raise ValueError("the runs' dictionaries have no word in common")
    return words


def common_index(options, runs, words):
    """The index of these words, whose held-out photos are held out by all runs."""
    valid = min(run.options["valid"] for run in runs)
    return runs[-1].index(options.captions, words, valid)


def score_photos(scorer, targets, carried, counts):
    """word_metrics of photos, what they vary by, and retrieval."""
    return {**word_metrics(scorer, targets, carried, counts),
            "deviations": deviations(scorer, carried),
            "retrieval": retrieve_photos(scorer, carried)}


def write_words(test, scored, options):
    """Write the table of words: to --per-word, and for `tag` to the run's folder."""
    run = scored.run
    paths = [options.per_word] if options.per_word else []
    if test.is_own and options.prior == "real" and os.access(run.folder, os.W_OK):
        paths.append(run.thresholds_file())
    if not paths:
        return
    rows = table_of_words(scored.scorer, scored.carried, test.words, test.counts, run.step)
    for path in paths:
        with write_table(path, WORD_COLUMNS) as table:
            table.writerows(rows)


def score_baselines(test, scored, options):
    """What each of READOUTS makes of each of VIEWS of a run, for the same photos.

    {"training_photos": how many these know, "scores": {name: rank_metrics}, "truth": {name:
    truth_metrics}, without a truth empty}. The photos of an index are in random order, so the first
    training photos are a random choice.
    """
    run = scored.run
    index = test.index
    count = min(index.training, MOST_NEIGHBOURS)
    training = {index.name(i): i for i in range(index.held_out, index.held_out + count)}
    views = extract_views(run, run.read(test.folder, scored.names, options.workers))[1]
    reader = run.read(test.folder, list(training), options.workers)
    training_views = extract_views(run, reader)[1]
    labels = mark_words([index.words(training[name]) for name in reader.names], len(test.words))
    rows, shown = find_truth(test, run, test.words, scored.names, options)
    scores = {}
    truth = {}
    for readout, score in READOUTS.items():
        for view in VIEWS:
            name = f"{readout}: {view}"
            scorer = score(views[view], training_views[view], labels)
            scores[name] = rank_metrics(scorer, scored.carried, test.counts)
            if rows:
                truth[name] = truth_metrics(scorer.take(rows), shown, test.words)
    return {"training_photos": len(reader.names), "scores": scores, "truth": truth}


def find_truth(test, run, words, names, options):
    """Rows of photos with these names, a list, and the classes of what each one truly shows.

    That is in --truth, or what the owner of the photos drew; without either both are empty. Photos
    that it does not have, or of which it has none of the words, which the run knows, are left out.
    """
    owner = test.owner
    path = options.truth or drawn.truth_file(owner.folder)
    is_drawn = owner.options["drawn"] and not options.images and os.path.exists(path)
    if not options.truth and not is_drawn:
        return [], []
    index = run.index(path, words, run.options["valid"], "index-truth")
    rows, targets = match_photos(index, names)
    if options.truth and not rows:
        raise ValueError(f"--truth {path} has no word of the {len(names):,} photos, e.g. "
                         f"{names[0]}, that the run knows; it must name them as the captions do")
    return rows, targets


def match_photos(index, names):
    """Rows of the names that an index has, a list, and the classes of the words of each."""
    photos = {index.name(i): i for i in range(len(index))}
    rows = [row for row, name in enumerate(names) if name in photos]
    return rows, [index.words(photos[names[row]]) for row in rows]


def truth_metrics(scorer, targets, words):
    """How well each kind of words is told, against what photos truly show: {kind: numbers}.

    scorer: of N photos for the K words; targets: N arrays, the classes of what each photo shows.
    Words that no photo shows, as names, are not scored. Kinds are those of drawn.KINDS if all words
    are of them, otherwise there is one, "words". "precision@1": the part of the photos that show
    the best of the words of that kind.
    """
    carried = mark_words(targets, len(words))                       # (N, K)
    auc, ap = score_words(scorer, carried)                          # (K,) each
    chance = chance_of_words(carried)
    shown = np.flatnonzero(carried.sum(axis=0))                     # words of any photo
    metrics = {}
    for kind, classes in group_words(words, shown).items():
        best = classes[scorer.of_words(classes).argmax(axis=1)]     # (N,)
        metrics[kind] = {
            "photos": len(targets), "words": len(classes),
            "precision@1": float(carried[np.arange(len(targets)), best].mean()),
            "auc": mean_of_finite(auc[classes]), "map": mean_of_finite(ap[classes]),
            "chance": {"map": mean_of_finite(chance[classes])}}
    return metrics


def kinds_of_words():
    """{word: its kind}, of drawn.KINDS, of all words as captions are read."""
    kinds = {}
    for kind, table in drawn.KINDS.items():
        for word in data.words_of(" ".join(table)):
            kinds[word] = kind
    return kinds


def group_words(words, classes):
    """{kind: an array of classes}: of the drawn set's kinds of words, or all of one kind."""
    kinds = kinds_of_words()
    if any(words[k] not in kinds for k in classes):
        return {"words": classes}
    groups = {}
    for k in classes:
        groups.setdefault(kinds[words[k]], []).append(k)
    return {kind: np.array(groups[kind]) for kind in drawn.KINDS if kind in groups}


def show_truth(result, show, title=""):
    """Show the numbers of truth_metrics, if a result has them."""
    if "truth" not in result:
        return
    rows = {}
    for kind, numbers in result["truth"].items():
        rows[kind] = [numbers["words"], numbers["precision@1"], numbers["auc"], numbers["map"],
                      numbers["chance"]["map"]]
    photos = max(numbers["photos"] for numbers in result["truth"].values())
    show.line(f"{title}against what {photos:,} photos truly show; precision@1 is of the likeliest "
              "word of each kind")
    show.table(["", "words", "precision@1", "AUC", "AP", "AP by chance"], rows)


def compare_by_truth(results, baselines, show):
    """Show the AUC of results, {name: result}, and of baselines against the truth, if known."""
    if not baselines or not baselines["truth"]:
        return
    truths = {name: result["truth"] for name, result in results.items()}
    truths.update(baselines["truth"])
    kinds = list(truths[next(iter(baselines["truth"]))])
    rows = {}
    for name, numbers in truths.items():
        rows[name] = [numbers[kind]["auc"] if kind in numbers else "" for kind in kinds]
    show.table(["AUC against the truth", *kinds], rows)


def transfer_keys(options):
    """{folder of photos: the name of the accuracy on it}, of --transfer."""
    names = short_names(options.transfer or ())
    return {images: f"transfer to {name}" for images, name in names.items()}


def short_names(paths):
    """{path: the last of its parts}, as many of them as tell the paths from each other."""
    parts = {path: os.path.abspath(path).split(os.sep) for path in paths}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: os.sep.join(of_path[-count:]) for path, of_path in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}       # of two that are the same


def score_transfer(run, images, key, options, show):
    """{key: the run's mean accuracy on a folder's photos, …: its deviation over the splits}."""
    show.line(f"{run.name}: {key}")
    result = transfer_features(options_of(transfer_features, options, images=images), show, run)
    rows = result["rows"]
    means = dict(zip(result["columns"], rows["mean"]))
    scores = {key: means[VIEWS[0]], key + LEVELS: means}
    deviations = rows.get(f"± over {result['over']}")
    if deviations:                              # of more than one split
        own = result["columns"].index(VIEWS[0])
        scores[key + SPREAD] = deviations[own]
        scores[key + OVER] = result["over"]
    return scores


def warn_about_duplicates(index, folder, held_out, show):
    """Say how many of the held-out photos are also trained on, byte for byte: it flatters scores.

    held_out: the names of those that were read.
    """
    if len(index) > MOST_COMPARED:
        show.line(f"there are more than {MOST_COMPARED:,} photos: held-out ones that are also "
                  "training photos were not looked for")
        return
    training = [index.name(i) for i in range(index.held_out, len(index))]
    pairs = data.find_duplicates(folder, held_out, training)
    if pairs:
        examples = [f"{name} = {training_name}" for name, training_name in pairs[:3]]
        more = ", …" if len(pairs) > 3 else ""
        show.line(f"{len(pairs):,} held-out photos are byte-identical to training photos: "
                  f"{', '.join(examples)}{more}")


def show_deciles(results, show):
    """AUC and AP of the words by frequency: a row for each tenth of them, two columns a run."""
    heading = ["words by frequency", "photos", "AP by chance"]
    for name in results:
        heading += [f"AUC, {name}", f"AP, {name}"]
    largest = list(results.values())[-1]
    rows = {}
    for decile, numbers in largest["deciles"].items():
        rows[decile] = [f"{numbers['photos']:,.0f}", numbers["chance"]["map"]]
        for result in results.values():
            rows[decile] += [result["deciles"][decile]["auc"], result["deciles"][decile]["map"]]
    show.table(heading, rows)


def show_curve(scored, baselines, options, show):
    """The runs' numbers as a table, and curves of some against their training photos (Fig. 2)."""
    results = {each.run.name: each.result for each in scored}
    largest = scored[-1].result
    transfers = list(transfer_keys(options).values())
    keys = [*PRECISIONS, "auc", "map", *transfers]
    show.line(describe_sample(largest, options))
    show.table(["", "training photos", *(SHORT.get(key, key) for key in keys)],
               curve_rows(results, baselines, keys))
    if baselines:
        show.line(describe_baselines(baselines["training_photos"]))
    for name, result in results.items():
        show_truth(result, show, f"{name}: ")
    compare_by_truth(results, baselines, show)
    points = join_seeds([each.run for each in scored], list(results.values()), keys)
    plots = []
    for key in ("precision@10", "auc", "map", *transfers):
        name = SCORES.get(key, f"{key}, accuracy (fraction)")
        curves = [curve_of(rows, curve, "training_photos", key) for curve, rows in points.items()]
        levels = find_levels(key, largest, baselines)
        plots.append(figures.Plot("training photos", name, curves, levels, log=True))
    show.plots(plots, "scores against training photos", options.size)


def curve_rows(results, baselines, keys):
    """Rows of a table: training photos and these numbers of runs, of baselines and of chance."""
    rows = {}
    for name, result in results.items():
        rows[name] = [result[key] for key in ("training_photos", *keys)]
    if baselines:
        for name, numbers in baselines["scores"].items():
            rows[name] = ["", *(numbers.get(key, "") for key in keys)]
    largest = list(results.values())[-1]
    levels = {key: simple_levels(key, largest) for key in keys}
    for name in dict.fromkeys(itertools.chain(*levels.values())):
        rows[name] = ["", *(levels[key].get(name, "") for key in keys)]
    return rows


def describe_sample(result, options):
    """Over which photos and words the scores of several runs are."""
    which = "" if options.all else " that no run trained on"
    return (f"{result['photos']:,} photos{which}; of the {result['dictionary']:,} words that all "
            f"runs know {result['words']:,} occur in them")


def describe_baselines(count):
    """What the baselines of score_baselines are, which know so many training photos."""
    return (f"{NEAREST} nearest: a photo gets the words of its {NEAREST} nearest of {count:,} "
            "training photos, of the r-th with weight 1/r; linear regression: ridge regression of "
            "these photos' words; both on the features or pixels that are named")


def find_levels(key, result, baselines):
    """The horizontal lines in the plot of a score, {name: value}.

    Of the untrained network and of pixels that is the better of READOUTS.
    """
    levels = {}
    if baselines and key + LEVELS not in result:
        for view, name in VIEWS_OF_PLOTS.items():
            readout, value = best_readout(baselines["scores"], view, key)
            levels[f"{name}, {readout}"] = value
    return {**levels, **simple_levels(key, result)}


def simple_levels(key, result):
    """What chance or frequent words have of a score, {name: value}; of transfer all baselines."""
    if key + LEVELS in result:
        means = result[key + LEVELS]
        names = {**VIEWS_OF_PLOTS, "chance": "chance"}
        return {names[view]: means[view] for view in names}
    if key in result["baseline"]:
        return {"most frequent words": result["baseline"][key]}
    return {"chance": result["chance"][key]}


def join_seeds(runs, results, keys):
    """{name of a curve: its points}, a dictionary each, the fewest training photos first.

    Results of runs that differ in nothing but the seed are one point: means, deviations.
    row[key + SPREAD] is one deviation, and row[key + OVER] says over what.
    """
    groups = {}
    earlier = Counter()
    for i, run in enumerate(runs):
        settings = run.settings()
        again = earlier[settings, run.options["seed"]]      # a seed's repetition is no new sample
        earlier[settings, run.options["seed"]] += 1
        groups.setdefault((settings, again), []).append(i)
    curves = {}
    names = name_curves(runs)
    for places in groups.values():
        point = join_rows([results[i] for i in places], keys)
        point["training_photos"] = round(np.mean([runs[i].training for i in places]))
        curves.setdefault(names[places[0]], []).append(point)
    for points in curves.values():
        points.sort(key=lambda point: point["training_photos"])
    return curves


def name_curves(runs):
    """Of each run the name of its curve: those of its options in which the runs differ.

    The seed names no curve, which averages over it, nor do the data, which it runs along, nor the
    length of training; but data and length do where two runs that differ in them would otherwise
    have one name and about as many photos.
    """
    for apart in (PLACES + DATA + LENGTH, PLACES + DATA, PLACES):
        names = name_differences(runs, apart)
        points = {(name, f"{run.training:.1e}", run.settings()) for name, run in zip(names, runs)}
        if len(points) == len({point[:2] for point in points}):
            break
    return names


def name_differences(runs, apart):
    """Of each run those of its options in which the runs differ, but those apart, as a text."""
    differing = []
    for key in runs[-1].options:
        values = {json.dumps(run.options.get(key)) for run in runs}
        if len(values) > 1 and key not in apart:
            differing.append(key)
    names = []
    for run in runs:
        values = [f"--{key.replace('_', '-')} {run.options.get(key)}" for key in differing]
        names.append(", ".join(values) or "trained network")
    return names


def join_rows(rows, keys):
    """The mean of each key, and its deviation: that of one row over what it says, or over seeds."""
    joined = {}
    for key in keys:
        values = [row[key] for row in rows]
        joined[key] = float(np.mean(values))
        if len(rows) > 1:
            joined[key + SPREAD] = float(np.std(values, ddof=1))
            joined[key + OVER] = f"{len(rows)} seeds"
        else:
            joined.update(deviation_of(rows[0], key))
    return joined


def deviation_of(row, key):
    """{} or how much a result's score deviates, and over what: splits, classes or photos."""
    if key + SPREAD in row:
        return {key + SPREAD: row[key + SPREAD], key + OVER: row[key + OVER]}
    if key in row.get("deviations", {}):
        over = f"a bootstrap of {row['photos']:,} photos"
        return {key + SPREAD: row["deviations"][key], key + OVER: over}
    return {}


def print_words(result, show):
    """Show the numbers of `words` (Table 1), and those of baselines and truth, if there are."""
    show.line(f"{result['photos']:,} photos, {result['words']:,} of {result['dictionary']:,} words "
              "occur in them")
    baselines = result.get("baselines")
    columns = {"model": result}
    if "deviations" in result:
        columns["± (bootstrap of photos)"] = result["deviations"]
    if baselines:
        columns.update(baselines["scores"])
    columns["frequent words"] = {**result["chance"], **result["baseline"]}
    columns["chance"] = result["chance"]
    columns["ceiling"] = {**result["ceiling"], "auc": 1.0, "map": 1.0}
    keys = [*PRECISIONS, "auc", "map"]
    rows = {}
    for name, numbers in columns.items():
        rows[name] = [numbers[key] for key in keys]
    show.table(["", *PRECISIONS, "AUC", "mean AP"], rows)
    show.line("AUC and AP are means over the words (AP is lower among more photos, so compare it "
              "among equally many); of the most frequent third of the words "
              f"{result['auc_frequent']:.4f} and {result['map_frequent']:.4f}, of the rarest third "
              f"{result['auc_rare']:.4f} and {result['map_rare']:.4f}")
    if "retrieval" in result:
        show_retrieval(result["retrieval"], show)
    if baselines:
        show.line(describe_baselines(baselines["training_photos"]))
    show_truth(result, show)
    compare_by_truth({"model": result}, baselines, show)


def show_retrieval(result, show):
    """How often photos and their words find each other."""
    ways = {name: numbers for name, numbers in result.items() if name != "candidates"}
    rows = {}
    for name, numbers in ways.items():
        rows[name] = [numbers[key] for key in PRECISIONS]
    chances = [numbers["chance"] for numbers in ways.values()]
    rows["chance"] = [chances[0][key] for key in PRECISIONS]
    show.table([f"found among {result['candidates']:,}", *(f"R@{k}" for k in KS)], rows)


# -------------------------------------------------------------------- photos, one at a time

def threshold(text):
    """A probability, or "auto"."""
    return text if text == "auto" else number(float, 0, 1)(text)


@command("tag", TOP, PRIOR,
         option("photos", nargs="+", metavar="PHOTO", help="picture files, or folders of them"),
         option("--threshold", type=threshold, metavar="P",
                help="instead of --top: the least probability; or auto, of each word the one that "
                     "`words` found best"),
         output_option("--out", ".csv", required=False,
                       help="a table of the tags to write, a row for each photo"),
         example="--model runs/photos photos/one.jpg new-photos --out tags.csv")
def tag_photos(options, show, run):
    """The most probable words of photos; softmax: of one word among all, one-vs-all: of each."""
    top, least, nothing = choose_tags(options, run)
    tags = {}
    captions = {}
    reader = run.read("", expand_folders(options.photos), options.workers)
    carried = run.words_by_path()
    for names, x, _ in reader:
        s = kernels.to_host(run.net.forward(x))                     # (n, K)
        for name in names:
            path = real_place(name)
            if path in carried:
                captions[name] = carried[path]
        best = best_of(names, run.loss.probabilities(s), run.words, top, least)
        tags.update(best)
        if not show.out:
            show.best(best, nothing, captions)
    if show.out:
        write_tags(show.out, reader, tags)
        show.line(f"{show.out}: the words of {len(tags):,} photos, a row for each photo")
    return {"tags": tags, "captions": captions, "failed": reader.skipped}


def choose_tags(options, run):
    """How many words a photo gets at most, their least probabilities, and what to say of none.

    The least probability is a number, or (K,), one for each word.
    """
    if options.threshold is None:
        return options.top, 0, "none"
    if options.threshold != "auto":
        return len(run.words), options.threshold, f"no word of at least {options.threshold:g}"
    if options.prior == "none":
        raise ValueError("--threshold auto goes with --prior real")
    return len(run.words), run.thresholds(), "no word above its threshold"


def real_place(path, realpath=os.path.realpath):
    """The path of a file in the folder that this really is, whatever links lead there."""
    folder, file = os.path.split(path)
    return os.path.join(realpath(folder), file)


def write_tags(path, reader, tags):
    """Write tags {photo: {word: probability}} as a table for spreadsheets.

    A row for each photo that the reader was asked for, in that order: its name, its words in one
    cell, what is wrong with it if it cannot be read, and then each word and its probability in
    cells of their own, the most probable first. The file begins with the mark by which a
    spreadsheet knows UTF-8.
    """
    most = max(len(words) for words in tags.values())
    heading = ["photo", "tags", "not read"]
    for i in range(1, most + 1):
        heading += [f"tag {i}", f"probability {i}"]
    with write_table(path, heading, encoding="utf-8-sig") as table:
        for name in reader.asked:
            words = tags.get(name, {})
            row = [name, ", ".join(words), reader.skipped.get(name, "")]
            for word, probability in words.items():
                row += [word, f"{probability:.4f}"]
            table.writerow(row)


def expand_folders(paths):
    """The paths, with those of all photos in place of a folder's."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            files += [os.path.join(path, name) for name in data.list_photos(path)]
        else:
            files.append(path)
    return files


@command("curves", picture_option(*PLOTS, required=True), SIZE,
         example="--model runs/photos --out curves.png")
def draw_curves(options, show, run):
    """Loss and scores after each epoch of training."""
    show.plots(run.curves(), "learning curves", options.size)
    return {"log": run.log}


@command("search", WORDS, IMAGES, TOP, PRIOR, FONT, picture_option(".png", required=True), SIZE,
         example="--model runs/photos sea boat --out search.png")
def search_photos(options, show, run):
    """The most probable photos for a word, with the probability of the word (Fig. 3)."""
    classes = run.find_words(options.words)
    folder, names = run.photos(options)
    reader = run.read(folder, names, options.workers)
    scores = []
    for _, x, _ in reader:
        s = run.net.forward(x)                                      # (n, K)
        comparable = s - run.loss.normaliser(s)
        scores.append(kernels.to_host(comparable[:, classes]))      # (n, C)
    s = np.concatenate(scores)                                      # (N, C)
    rankings = best_of(options.words, s.T, reader.names, options.top)
    for photos in rankings.values():            # the same order, but numbers that a reader knows
        for name, score in photos.items():
            photos[name] = float(np.exp(run.loss.log_probability(score)))
    Output().best(rankings)
    find = data.Folder(folder).find
    if show.out:
        fonts = options.font or figures.Fonts()
        image = grid_picture(label_photos(rankings), find, fonts, options.size)
        show.picture(image, "photos for words", ranking_table(rankings))
    else:
        show_photos(label_photos(rankings), find, show)
    return {"words": rankings, "photos": len(reader.names), "skipped": reader.skipped}


def ranking_table(rankings):
    """A heading, and rows of {word: {name: probability}}, the best first."""
    rows = []
    for word, photos in rankings.items():
        for rank, (name, p) in enumerate(photos.items(), 1):
            rows.append([word, rank, name, p])
    return ["word", "rank", "photo", "probability"], rows


def label_photos(rankings):
    """{word: {name: its probability as a text}}."""
    labels = {}
    for word, photos in rankings.items():
        labels[word] = {name: f"p {format_probability(p)}" for name, p in photos.items()}
    return labels


def show_photos(labels, find, show):
    """Words above their photos, {word: {name: text under the photo}}, on the page."""
    for word, photos in labels.items():
        show.html.append(f"<h3>{escape(word)}</h3>")
        show.photos([(find(name), f"{word}: {name}", escape(label))
                     for name, label in photos.items()])


class Features(NamedTuple):
    """Features of photos, as `features` writes and `nearest-photos` reads them."""

    folder: str                     # that the names are below; "" where they are paths
    names: list
    x: np.ndarray                   # (N, D) float32
    layer: str | None               # that they are taken from; None for the last hidden one
    crops: int                      # of which they are the mean


@command("features",
         option("--images", nargs="+", required=True, metavar="PATH",
                help="picture files, or folders of them"),
         output_option("--out", ".npz", ".csv"),
         option("--layer", help="of that name, all its pixels; the last hidden one if not given"),
         option("--crops", type=int, choices=(1, 10), default=1,
                help="central crop, or the mean of corners, centre and their mirror images"),
         example="--model runs/photos --images photos --out features.npz")
def write_features(options, show, run):
    """Features of photos, one crop or the mean of ten, with their names: an .npz or a .csv."""
    folder, names = find_photos(options.images)
    reader = run.read(folder, names, options.workers)
    beside = os.path.dirname(os.path.abspath(options.out))
    with tempfile.TemporaryFile(dir=beside) as raw:                 # more than memory holds
        for x in read_features(run, reader, options.layer, options.crops):
            raw.write(x.tobytes())
        raw.flush()
        x = np.memmap(raw, np.float32, "r").reshape(len(reader.names), -1)      # (N, D)
        features = Features(folder, reader.names, x, options.layer, options.crops)
        save_features(options.out, features, run)
    show.line(f"{options.out}: features {x.shape} float32 and names")
    return {"photos": len(reader.names), "numbers": x.shape[1], "skipped": reader.skipped}


def find_photos(paths):
    """The folder and the names below it of one folder's photos; of several paths, "" and paths."""
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"--images: there is no file or folder {path}")
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return paths[0], data.list_photos(paths[0])
    return "", expand_folders(paths)


def read_features(run, reader, layer=None, crops=1):
    """Yield the features float32 (n, D) of a reader's photos, n at a time."""
    for _, x, pixels in reader:
        pieces = [x] if crops == 1 else ten_crops(pixels, run.recipe.crop)
        features = mean_features(run.net, pieces, layer)
        yield features.reshape(len(features), -1)                   # (n, D)


def save_features(path, features, run):
    """Write Features, by their names, and with what it takes to compute those of another photo."""
    if path.lower().endswith(".csv"):
        numbers = range(features.x.shape[1])
        with write_table(path, ["photo", *(f"f{i}" for i in numbers)]) as table:
            for name, x in zip(features.names, features.x):
                table.writerow([name, *(f"{value:.9g}" for value in x.tolist())])
        return
    place = os.path.dirname(os.path.realpath(path))
    folder = os.path.relpath(os.path.realpath(features.folder or "."), place)
    with console.whole_file(path) as file:
        np.savez(file, names=np.array(features.names), features=features.x,
                 folder=np.array(folder), layer=np.array(features.layer or ""),
                 crops=np.array(features.crops), weights=np.array(run.fingerprint()))


def load_features(path, run):
    """The Features that save_features wrote; ValueError if that, or this run, did not."""
    again = f"write it by `eval.py features --model {run.name} --images … --out FILE.npz`"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        names = arrays["names"].tolist()
        x = np.asarray(arrays["features"], np.float32).reshape(len(names), -1)
        is_own = str(arrays["weights"]) == run.fingerprint()
        folder = os.path.join(os.path.dirname(os.path.realpath(path)), str(arrays["folder"]))
        layer = str(arrays["layer"]) or None
        crops = int(arrays["crops"])
    except Exception as error:                  # a broken zip file raises anything
        if getattr(error, "errno", None):       # of the disk
            raise ValueError(f"--features: {path}: {error.strerror}; {again}") from None
        raise ValueError(f"--features: {path} holds no features that can be used; {again}"
                         ) from None
    if not is_own:
        raise ValueError(f"--features: {path} is of other weights than those of {run.name}; "
                         f"{again}")
    return Features(os.path.normpath(folder), names, x, layer, crops)


def mean_features(net, crops, layer):
    """What a layer, or the last hidden one, makes of photos' crops, on average: float32 (n, …)."""
    total = 0
    count = 0
    for x in crops:
        total = total + kernels.to_host(net.features(x, layer))
        count += 1
    return (total / count).astype(np.float32)


@command("nearest-photos", TOP, FONT,
         option("photos", nargs="+", metavar="PHOTO", help="picture files to find others like"),
         option("--images", metavar="DIR", help="folder of photos to look among; with --features "
                "where its photos are now"),
         option("--features", metavar="FILE.npz", help="that `features` wrote, to look among"),
         picture_option(".png"), SIZE,
         example="--model runs/photos --images photos one.jpg --out near.png")
def find_nearest_photos(options, show, run):
    """The photos nearest to a photo, by the cosine of their features (about the mean of these)."""
    if not (options.images or options.features):
        raise ValueError("photos to look among are missing; give --images, their folder, or "
                         "--features, a file that `features` wrote")
    others = load_features(options.features, run) if options.features else None
    layer = others.layer if others else None
    crops = others.crops if others else 1
    queries, asked = extract_photos(run, "", options.photos, options, layer, crops)
    skipped = {}
    if others is None:
        others, reader = extract_photos(run, *find_photos([options.images]), options)
        skipped = reader.skipped
    elif options.images:
        others = others._replace(folder=options.images)
    nearest = rank_photos(queries, others, options.top)
    show.best(nearest, "there is no other photo")
    if show.out:
        draw_nearest(nearest, others.folder, options, show)
    return {"nearest": nearest, "photos": len(others.names), "skipped": skipped,
            "failed": asked.skipped}


def extract_photos(run, folder, names, options, layer=None, crops=1):
    """The Features of photos that can be read, and the reader, which knows what cannot."""
    reader = run.read(folder, names, options.workers)
    x = np.concatenate(list(read_features(run, reader, layer, crops)))          # (N, D)
    return Features(folder, reader.names, x, layer, crops), reader


def rank_photos(queries, others, top):
    """{query: {name of another photo: cosine}}, the `top` largest, the largest first.

    Queries and others are Features; cosines are about the mean of the others. A photo is no
    neighbour of itself, but a copy of it is.
    """
    realpath = functools.cache(os.path.realpath)                    # which asks the disk
    paths = [os.path.join(others.folder, name) for name in others.names]
    places = np.array([real_place(path, realpath) for path in paths])           # (N,)
    nearest = {}
    for rows in slices(len(queries.names), BLOCK // len(others.names)):
        names = queries.names[rows]
        cosines = centred_cosines(queries.x[rows], others.x)        # (n, N)
        for row, name in zip(cosines, names):
            row[places == real_place(name, realpath)] = -np.inf
        nearest.update(best_of(names, cosines, others.names, top, least=-2))
    return nearest


def centred_cosines(x, others):
    """The cosines (n, N) of x (n, D) with others (N, D), about the mean of the others."""
    mean = others.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = units(x - mean)
    cosines = np.empty((len(x), len(others)), np.float32)
    for rows in slices(len(others), BLOCK // others.shape[1]):
        cosines[:, rows] = centred @ units(others[rows] - mean).T   # (n, N)
    return cosines


def draw_nearest(nearest, folder, options, show):
    """A row for each photo: itself, and its nearest with their cosines and names."""
    if folder and not os.path.isdir(folder):
        raise ValueError(f"there is no folder {folder} to take the photos from; give its new place "
                         "by --images")
    rows = {}
    for query, photos in list(nearest.items())[:MOST_ROWS]:
        rows[query] = {query: "asked for"}
        for name, cosine in photos.items():
            file = os.path.basename(name)
            label = file if len(file) < 17 else "…" + file[-15:]    # which is all that has room
            rows[query][os.path.join(folder, name)] = f"{cosine:.2f} {label}"
    image = grid_picture(rows, str, options.font or figures.Fonts(), options.size)
    table = ["photo", "nearest", "cosine"], list_pairs(nearest)
    show.picture(image, f"the photos nearest to {len(rows):,} photos", table)
    if len(rows) < len(nearest):
        show.line(f"the picture has the first {len(rows)} of {len(nearest):,}")


def list_pairs(scores):
    """[name, other, score] of each of {name: {other: score}}."""
    rows = []
    for name, others in scores.items():
        rows += [[name, other, score] for other, score in others.items()]
    return rows


# ----------------------------------------------------------- transfer (Fig. 5, Tables 2 to 4)

class Task(NamedTuple):
    """A regression that is trained and tested: of N photos, boolean (N,) each say which for."""

    name: str
    y: np.ndarray                   # (N,) classes
    train: np.ndarray
    test: np.ndarray


@command("transfer", FOLDER, *SPLITTING,
         option("--layer",
                help="of that name, the mean of its pixels; the last hidden one if not given"),
         example="--model runs/photos --images classes")
def transfer_features(options, show, run):
    """Regression on features: DIR/class/*.jpg, or a Pascal VOC folder (Fig. 5, Tables 2 to 4).

    For folders of classes also without any regression and labelled photo: the class whose name has
    the most probable words.
    """
    is_voc = os.path.isdir(os.path.join(options.images, "JPEGImages"))
    collection = Voc(options) if is_voc else SubFolders(options)
    collection.tasks(list(collection.labels))                       # may fail: before the work
    reader = run.read(options.images, list(collection.labels), options.workers)
    hidden, views = extract_views(run, reader, options.layer)
    tasks = collection.tasks(reader.names)
    scores = run_regressions(tasks, views, collection, options.seed)
    columns = ["chance", *VIEWS]
    words = known_words(run, collection.class_names)
    unknown = [name for name, classes in words.items() if not classes]
    if len(unknown) < len(words):
        report_unknown(unknown, len(words), show)
        columns.append(ZERO_SHOT)
        by_names = score_by_names(run, words, hidden)               # (N, C)
        for task in tasks:
            scores[task.name].append(by_names[task.test])
    rows = measure_tasks(tasks, scores, collection)
    count = len(reader.names)
    show.line(f"{count:,} photos; {tasks[-1].train.sum():,} to train and "
              f"{tasks[-1].test.sum():,} to test")
    if collection.class_names:
        show.line(f"classes: {data.listing(collection.class_names, 20)}")
    show.table([collection.measured, *columns], rows)
    return {"columns": columns, "rows": rows, "over": collection.describe(tasks), "photos": count,
            "unknown_names": unknown, "skipped": reader.skipped}


def known_words(run, names):
    """{name of a class: those of its words that the run knows, as classes of the run}."""
    known = {}
    for name in names:
        classes = [run.classes.get(word) for word in data.folder_words(name)]
        known[name] = [k for k in classes if k is not None]
    return known


def report_unknown(unknown, count, show):
    """Say which of so many classes are missed, whatever the model does, if there are any."""
    if unknown:
        show.line(f"{ZERO_SHOT}: {len(unknown)} of {count} classes have no word that the model "
                  f"knows, so all their photos count as wrong: {', '.join(unknown)}")


def score_by_names(run, words, features):
    """Scores (N, C) of photos for classes by their names: the mean of log p of the words of each.

    words: as of known_words, of C classes; features (N, E). p takes all words as equally frequent,
    since a class whose name is a rare word has as many photos as any other. A class of which the
    run knows no word has -inf, so that all its photos count as wrong.
    """
    output = run.equal_output()
    scores = np.full((len(features), len(words)), -np.inf)
    for photos in slices(len(features), BLOCK // len(run.words)):
        s = output.scores(features[photos])                         # (B, K)
        comparable = kernels.to_host(s - run.loss.normaliser(s))
        log_p = run.loss.log_probability(comparable)                # (B, K)
        for i, classes in enumerate(words.values()):
            if classes:
                scores[photos, i] = log_p[:, classes].mean(axis=1)
    return scores


def extract_views(run, reader, layer=None):
    """The last hidden layer (N, E) of the reader's photos, and {view: (N, D)}, each of VIEWS.

    layer: the one that views are taken from, by its name; None for the last hidden one.
    """
    untrained = run.recipe.build(len(run.words), 0, seed=run.options["seed"])
    hidden = []
    batches = []
    for _, x, pixels in reader:
        hidden.append(run.net.features(x))                          # (n, E)
        own = hidden[-1] if layer is None else run.net.features(x, layer)
        batches.append([mean_of_pixels(kernels.to_host(own)),
                        mean_of_pixels(kernels.to_host(untrained.features(x, layer))),
                        shrink(pixels)])
    views = {}
    for i, view in enumerate(VIEWS):
        views[view] = np.concatenate([batch[i] for batch in batches])
    return np.concatenate(hidden), views


def measure_tasks(tasks, scores, collection):
    """Rows of a table: chance and what the scores of each task's photos to test are worth.

    scores: {task: [(n, C) of each view]}. Rows of means over the tasks follow, with deviations,
    and, where the collection has classes of unequal size, the mean accuracy of a class.
    """
    rows = {}
    by_class = []
    for task in tasks:
        y = task.y[task.test]
        values = [collection.measure(s, y) for s in scores[task.name]]
        rows[task.name] = [collection.chance(task), *values]
        if collection.measure is accuracy:
            values = [class_accuracy(s, y) for s in scores[task.name]]
            by_class.append([1 / len(np.unique(y)), *values])
    over = collection.describe(tasks)
    add_means(rows, list(rows.values()), "mean", f"± over {over}")
    if by_class:
        add_means(rows, by_class, "mean class accuracy", f"± of it over {over}")
    return rows


def add_means(rows, values, name, spread):
    """Add to rows the mean of some rows, and, if they are several, their deviation."""
    rows[name] = np.mean(values, axis=0).tolist()
    if len(values) > 1:
        rows[spread] = np.std(values, axis=0, ddof=1).tolist()


def mean_of_pixels(features):
    """(n, H, W, C) -> (n, C); (n, E) stays."""
    return features.mean(axis=tuple(range(1, features.ndim - 1)))


def shrink(pixels):
    """Photos uint8 (n, S, S, 3) as rows of RAW x RAW pixels: (n, 3 RAW²)."""
    rows = []
    for photo in pixels:
        image = Image.fromarray(photo).resize((RAW, RAW), Image.Resampling.BOX)
        rows.append(np.asarray(image).ravel())
    return np.stack(rows)


def run_regressions(tasks, views, collection, seed):
    """{task: [scores of its photos to test by a regression on each view]}, by several threads."""
    waiting = {}
    scores = {}
    pool = ThreadPoolExecutor(kernels.threads.count)
    try:
        for i, task in enumerate(tasks):
            waiting[task.name] = []
            for view in VIEWS:
                waiting[task.name].append(pool.submit(
                    regress, views[view], task, collection.measure, seed, 2 * i + 1))
        with console.Progress("regressions", len(tasks), "tasks") as progress:
            for task in tasks:
                scores[task.name] = [result.result() for result in waiting[task.name]]
                progress.tick()
    finally:
        pool.shutdown(cancel_futures=True)      # after Ctrl-C
    return scores


def regress(x, task, measure, seed, number):
    """The scores (n, C) of the task's photos to test, by a regression on features x (N, D).

    λ is the best by `measure` on some of the photos to train on, a function of (seed, number).
    """
    y = task.y[task.train]
    mean = x[task.train].mean(axis=0, dtype=np.float64)
    features = units((x - mean).astype(np.float32))                 # so one λ suits all
    folds = fold_masks(y, seed, number)
    table, _ = choose_penalty(features[task.train], y, folds, measure)
    return predict(table, features[task.test])


class SubFolders:
    """Photos in folders of their classes, DIR/class/*.jpg: accuracy on random splits (Fig. 5)."""

    measured = "accuracy"
    measure = staticmethod(accuracy)

    def __init__(self, options):
        self.options = options
        folders = data.class_folders(data.list_photos(options.images))
        self.labels = {name: path[0] for name, path in folders.items() if path}
        self.class_names = sorted(set(self.labels.values()))

    def describe(self, tasks):
        """What the tasks differ in."""
        return f"{len(tasks)} splits"

    def tasks(self, names):
        """A Task of the photos for each split; ValueError where there are too few."""
        y = np.searchsorted(self.class_names, [self.labels[name] for name in names])
        self.check(np.bincount(y, minlength=len(self.class_names)))
        tasks = []
        for i in range(self.options.splits):
            train = split(y, self.count_to_train, self.options.seed, 2 * i)
            tasks.append(Task(f"split {i + 1}", y, train, ~train))
        return tasks

    def count_to_train(self, n):
        """How many of a class's n photos are trained on."""
        if self.options.train_per_class:
            return self.options.train_per_class
        return min(n - 1, max(2, round(self.options.train_share * n)))

    def check(self, counts):
        """ValueError where a class has no photos to train, choose λ and test; counts (C,)."""
        least = (self.options.train_per_class or 2) + 1
        if len(counts) < 2 or counts.min() < least:
            sizes = [f"{name} {count}" for name, count in zip(self.class_names, counts)]
            raise ValueError(f"--images: two or more sub-folders of {least} or more photos are "
                             "needed, to train, choose and test; there are "
                             f"{', '.join(sizes) or 'none'}")

    def chance(self, task):
        """The accuracy of always guessing the largest class."""
        y = task.y[task.test]
        return float(np.bincount(y).max() / len(y))


class Voc:
    """Pascal VOC's folder: average precision of each class on its own split (Tables 2 to 4)."""

    measured = "average precision"
    measure = staticmethod(voc_ap)
    class_names = ()                            # photos are not told apart by these

    def __init__(self, options):
        """labels: {photo: {class: 1, or 0 where it is difficult, -1 where it is not there}}."""
        self.labels = {}
        self.trained = set()                    # the photos to train on
        lists = os.path.join(glob.escape(options.images), "ImageSets", "Main")
        for path in glob.glob(f"{lists}/*_trainval.txt") + glob.glob(f"{lists}/*_test.txt"):
            self.read_list(path)

    def read_list(self, path):
        """Add the labels of class_trainval.txt or class_test.txt."""
        name, _, subset = os.path.basename(path).removesuffix(".txt").rpartition("_")
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
        for line in lines:
            photo, label, *_ = line.split() + [""]
            if label not in ("-1", "0", "1") or data.refused(photo):
                raise ValueError(f"--images: a line of {path} is not the name of a photo in "
                                 f"JPEGImages and 1, 0 or -1: {line[:60]!r}")
            photo = os.path.join("JPEGImages", photo + ".jpg")
            self.labels.setdefault(photo, {})
            self.labels[photo][name] = int(label)
            if subset == "trainval":
                self.trained.add(photo)

    def describe(self, tasks):
        """What the tasks differ in."""
        return f"{len(tasks)} classes"

    def tasks(self, names):
        """A Task of the photos for each class that they can train and test."""
        training = np.array([name in self.trained for name in names])           # (N,)
        classes = set()
        for name in names:
            classes.update(self.labels[name])
        tasks = []
        for kind in sorted(classes):
            label = np.array([self.labels[name].get(kind, 0) for name in names])
            y = (label > 0).astype(int)
            train = training & (label != 0)
            test = ~training & (label != 0)
            if min(np.bincount(y[train], minlength=2)) > 1 and min(
                    np.bincount(y[test], minlength=2)) > 0:
                tasks.append(Task(kind, y, train, test))
        if not tasks:
            raise ValueError("--images: ImageSets/Main lists for no class two photos with it and "
                             "two without to train on, and both kinds to test")
        return tasks

    def chance(self, task):
        """The average precision of a random order of the photos to test, the mean of many."""
        y = task.y[task.test]
        keys = philox(0, (0, 0, 0, SPLITS)).random_raw(ORDERS * len(y))
        values = []
        for order in keys.reshape(ORDERS, len(y)):
            ranks = order / 2**64
            values.append(voc_ap(np.stack([-ranks, ranks], axis=1), y))
        return float(np.mean(values))


# --------------------------------------------------------------- words' vectors (Tables 5 to 7)

@command("similar",
         option("--pairs", nargs="+", required=True, metavar="FILE",
                help="word<TAB>word<TAB>score"),
         example="--model runs/photos --pairs scored-pairs.txt")
def compare_similarity(options, show, run):
    """Spearman's ρ of the cosines of the words' vectors with human scores (Table 5)."""
    pairs = {}
    result = {}
    for path, name in short_names(options.pairs).items():
        pairs[name], count = read_pairs(path, run, scored=True)
        rho, p = correlate(units(run.vectors()), pairs[name])
        result[name] = {"rho": rho, "p": p, "covered": len(pairs[name]), "of": count}
    if max(row["covered"] for row in result.values()) < 3:
        raise ValueError("--pairs: of no file the model knows both words of 3 pairs")
    control = vectors_of_captions(run, show).get(BY_COMPANY)        # (K, K), sparse
    if control is not None:
        for name in result:
            result[name]["captions_alone"], _ = correlate(control, pairs[name])
    show_similarity(result, show)
    return result


def correlate(vectors, pairs):
    """Spearman's ρ of cosines with the scores of pairs (class, class, score), and its p-value.

    vectors (K, D): of length 1, dense or sparse.
    """
    if len(pairs) < 3:
        return float("nan"), float("nan")
    first, second, scores = np.array(pairs).T
    products = vectors[first.astype(int)] * vectors[second.astype(int)]         # (P, D)
    rho, p = spearmanr(products.sum(axis=1), scores)
    return float(rho), float(p)


def show_similarity(result, show):
    """A row for each file of pairs."""
    is_controlled = any("captions_alone" in numbers for numbers in result.values())
    heading = ["word pairs", "Spearman's ρ", "p-value"]
    if is_controlled:
        heading.append("captions alone")
    rows = {}
    for name, numbers in result.items():
        rows[name] = [numbers["rho"], f"{numbers['p']:.2g}"]
        if is_controlled:
            rows[name].append(numbers["captions_alone"])
        rows[name] += [numbers["covered"], numbers["of"]]
    show.table([*heading, "covered", "of"], rows)
    if is_controlled:
        show.line("captions alone: ρ without any pixel, by the words that words are with on "
                  "training photos (cosine of rows of PPMI)")


BY_PHOTOS = "captions by photos"
BY_COMPANY = "captions by company"


def vectors_of_captions(run, show):
    """{control: sparse vectors of length 1 of the K words} from the training captions alone.

    By photos, words are alike if the same photos carry them; by company, if the same words share
    their photos (ppmi). Nothing, and a line says so, where the run's index is not at hand.
    """
    index = run.training_index()
    if index is None:
        show.line(f"{run.folder}/index is not that of the training captions: no control by "
                  "captions alone")
        return {}
    carried = word_photos(index)                                    # (K, photos)
    pairs = int((carried.sum(axis=0).astype(np.float64) ** 2).sum())
    if pairs > MOST_TOGETHER:
        show.line(f"the captions have {pairs:,} pairs of words on a photo, more than "
                  f"{MOST_TOGETHER:,}: no control by captions alone")
        return {}
    return {BY_PHOTOS: sparse_units(carried), BY_COMPANY: sparse_units(ppmi(carried))}


@command("neighbors", WORDS, TOP, example="--model runs/photos sea boat")
def find_neighbors(options, show, run):
    """The words whose vectors are nearest to a word's, by cosine."""
    classes = run.find_words(options.words)
    vectors = units(run.vectors())                                  # (K, E)
    cosines = vectors[classes] @ vectors.T                          # (words, K)
    cosines[np.arange(len(classes)), classes] = -np.inf             # not the word itself
    neighbors = best_of(options.words, cosines, run.words, options.top, least=-1)
    show.best(neighbors)
    return {"neighbors": neighbors}


@command("translate",
         option("--pairs", required=True, metavar="FILE", help="word<TAB>its translation"),
         option("--csls", action="store_true", help="correct the cosine for hubs"),
         example="--model runs/photos --pairs english-french.txt --csls")
def translate_words(options, show, run):
    """Precision@k of finding a word's translation by its vector's nearest (Tables 6 and 7)."""
    rows, count = read_pairs(options.pairs, run)
    known = {(source, target) for source, target, _ in rows}
    pairs = np.array(sorted(pair for pair in known if pair[0] != pair[1]))      # (P, 2)
    if len(pairs) < 2:
        raise ValueError(f"--pairs: the model knows both words of {len(pairs)} of {count:,} pairs "
                         "(not counting pairs of one word); it takes 2")
    alike = len(known) - len(pairs)
    show.line(f"{len(pairs):,} pairs of words that the model knows, of {count:,}; {alike:,} spelt "
              "alike are left out")
    views = {"model": units(run.vectors()), **vectors_of_captions(run, show)}
    results = {}
    for view, vectors in views.items():
        results[view] = {"forward": find_translations(vectors, pairs, options.csls),
                         "backward": find_translations(vectors, pairs[:, ::-1], options.csls)}
    show_translations(results, options.csls, show)
    best = show_best_pairs(run, pairs, options.csls, show)
    own = results.pop("model")
    return {"pairs": len(pairs), "alike": alike, **own, "controls": results, "best": best}


def find_translations(vectors, pairs, by_csls):
    """retrieval of the second words of pairs (P, 2) by the first: among all second ones, and all K.

    vectors (K, D): of length 1, dense or sparse. The numbers hang on how many there are to choose
    among, which is said beside them.
    """
    sources, rows = np.unique(pairs[:, 0], return_inverse=True)     # (S,), (P,)
    targets, columns = np.unique(pairs[:, 1], return_inverse=True)  # (T,), (P,)
    everything = np.arange(vectors.shape[0])                        # (K,)
    results = []
    for candidates, places in ((targets, columns), (everything, pairs[:, 1])):
        right = np.zeros((len(sources), len(candidates)), bool)
        right[rows, places] = True
        scores = break_ties(score_translations(vectors, sources, candidates, by_csls))
        results.append({**retrieval(scores, right), "candidates": len(candidates)})
    among_targets, among_all = results
    return {**among_targets, "words": len(sources), "all": among_all}


def score_translations(vectors, sources, targets, by_csls):
    """How near the vectors (K, D) of some words are to others': classes (S,), (T,) -> (S, T)."""
    is_itself = np.equal.outer(sources, targets)                    # (S, T)
    scores = cosines_of(vectors, sources, targets)
    scores[is_itself] = -1                      # so that no word counts as near to itself
    if by_csls:
        scores = csls(scores)
    scores[is_itself] = -np.inf                 # a word is not its translation
    return scores


def show_translations(results, by_csls, show):
    """A row for each way, set of candidates and view, with the chance of each.

    results: {"model", or a control: {way: what find_translations returns}}.
    """
    rows = {}
    for way in results["model"]:
        for among in ("", ", all words"):
            for view, ways in results.items():
                name = way + among if view == "model" else f"{way}{among}: {view}"
                numbers = ways[way]["all"] if among else ways[way]
                rows[name] = [ways[way]["words"], numbers["candidates"]]
                for key in PRECISIONS:
                    rows[name] += [numbers[key], numbers["chance"][key]]
    heading = ["by CSLS" if by_csls else "by cosine", "words", "candidates"]
    for key in PRECISIONS:
        heading += [key, "chance"]
    show.table(heading, rows)
    if len(results) > 1:
        show.line(f"{BY_PHOTOS}: by the training photos that words are on, without any pixel; "
                  f"{BY_COMPANY}: by the words that they are with there (rows of PPMI)")


def show_best_pairs(run, pairs, by_csls, show):
    """{heading: {pair: score}} of words with the translation that was nearest; ! if it is wrong."""
    sources = np.unique(pairs[:, 0])                                # (S,)
    targets = np.unique(pairs[:, 1])                                # (T,)
    vectors = units(run.vectors())                                  # (K, E)
    scores = score_translations(vectors, sources, targets, by_csls)             # (S, T)
    right = set(map(tuple, pairs.tolist()))
    names = []
    for source, nearest in zip(sources, targets[scores.argmax(axis=1)]):
        name = f"{run.words[source]} {run.words[nearest]}"
        names.append(name if (source, nearest) in right else name + " !")
    best = best_of(["best pairs (! is wrong)"], scores.max(axis=1)[None], names, 12)
    show.best(best)
    return best


# ------------------------------------------------------------------------ maps (Figs. 4 and 6)

@command("map", IMAGES, *MAPPING, FONT, picture_option(*PLOTS, required=True),
         option("--words", action="store_true", help="a map of words, not of photos"),
         example="--model runs/photos --words --out map.png")
def draw_map(options, show, run):
    """A map by t-SNE: photos by their features (Fig. 4), or words by their vectors (Fig. 6)."""
    if options.words:
        return map_words(options, show, run)
    if show.out and not show.out.lower().endswith(".png"):
        raise ValueError("--out: a map of photos is a .png; choose such a name, or add --words")
    return map_photos(options, show, run)


def map_photos(options, show, run):
    """Photos with features alike lie near each other, by t-SNE (Fig. 4).

    Of all photos --limit are taken, evenly.
    """
    folder, names = run.photos(options)
    count = min(len(names), options.limit)
    names = [names[int(i)] for i in np.linspace(0, len(names) - 1, count)]
    features, reader = run.features(folder, names, options.workers)
    y, result = place_points(kernels.to_host(features), "photos", options, show)
    find = data.Folder(folder).find
    paths = [find(name) for name in reader.names]
    table = ["photo", "x", "y"], [[name, *point] for name, point in zip(reader.names, y.tolist())]
    show.picture(mosaic_picture(paths, y, options.size), "a map of photos", table)
    return {**result, "skipped": reader.skipped}


def map_words(options, show, run):
    """Words with vectors alike lie near each other, by t-SNE; the frequent ones are large (Fig. 6).

    They are the --limit most frequent ones.
    """
    most = np.argsort(-run.counts, kind="stable")[:options.limit]
    y, result = place_points(run.vectors()[most], "words", options, show)
    size = options.size if show.out else min(options.size, PAGE)
    fonts = options.font or figures.Fonts()
    names = [run.words[i] for i in most]
    drawing = figures.words_picture(names, y, run.counts[most], size, fonts)
    placed = {text.text for text in drawing.shapes}
    if len(placed) < len(names):
        show.line(f"{len(names) - len(placed):,} words have no room; --size has more")
    rows = [[name, int(run.counts[i]), *point, "yes" if name in placed else "no"]
            for name, i, point in zip(names, most, y.tolist())]
    show.picture(drawing, "a map of words", (["word", "training photos", "x", "y", "drawn"], rows))
    return {**result, "skipped": {}}


def place_points(x, what, options, show):
    """Points (N, 2) in [0, 1]² for vectors x (N, D), near each other by cosine, and the numbers."""
    if len(x) < 10:
        raise ValueError(f"a map of {len(x)} points is none; it takes 10 or more")
    perplexity = min(options.perplexity, (len(x) - 1) / 3)
    y, kl = tsne(units(x), perplexity, options.steps)
    y = (y - y.min(axis=0)) / np.maximum(np.ptp(y, axis=0), 1e-12)
    show.line(f"{len(x):,} {what}, perplexity {perplexity:g}, KL divergence {kl:.4f}")
    return y, {"points": len(x), "perplexity": perplexity, "kl": kl}


# ---------------------------------------------------------------------------------- report

STYLE = """
:root { color-scheme: light dark } h1 { line-height: 1.2 } h1, p { overflow-wrap: anywhere }
body { font: 17px/1.5 Georgia, serif; max-width: 46rem; margin: 0 auto; padding: 1rem }
h2 { margin: 2.2rem 0 .4rem } h3, p { margin: .5rem 0 } .note, footer { font-size: .9rem }
.note, footer, s { opacity: .75 } s { text-decoration: none } footer { margin-top: 2.5rem }
table, figure { font: 14px/1.4 sans-serif; margin: 0 }
img, svg { display: block; max-width: 100%; height: auto; margin: .5rem auto }
.photos, .plots { display: grid; gap: .8rem }
.photos { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)) }
.wrong { color: light-dark(#b00020, #ff8a80) }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.settings span { font: 13px monospace; white-space: nowrap; margin-right: .6rem }
.number { opacity: .75; font-variant-numeric: tabular-nums }
/* What is wider than the page is scrolled, and only there the hint has a height. */
.wide { container-type: inline-size } .scroll { overflow-x: auto }
.scroll > * { min-width: var(--width) }
.hint { font: 13px/1.5 sans-serif; margin: 0; overflow: hidden; white-space: nowrap;
  height: clamp(0px, (var(--width) - 100cqw) * 999, 1.5em) }
table { border-collapse: collapse } td { white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8886 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td:first-child, th:first-child { position: sticky; left: 0; background: Canvas }
@media (max-width: 35rem) { td:first-child { white-space: normal; max-width: 7rem } }
@media (prefers-color-scheme: dark) { svg { filter: invert(.93) hue-rotate(180deg) } }
@media print { body { font-size: 10.5pt; max-width: none } h2, h3, .note { break-after: avoid }
  img, svg { max-height: 17cm } img, svg, table, figure { break-inside: avoid }
  .hint { display: none } .scroll { overflow: visible } .scroll > * { min-width: 0 }
  .photos { grid-template-columns: repeat(6, 1fr) } .plots { grid-template-columns: 1fr 1fr }
  td { white-space: normal } }
"""


WORDS_SECTION = "Word prediction"
MEANINGS = {"softmax": "of one word among all", "one-vs-all": "of each word by itself"}
CLOSING = """<footer><p>precision@k: the part of a photo's k most probable words that its captions
have. AUC: how often a photo with a word ranks before one without it. AP: the mean of the precision
at the ranks of all photos with the word. <i>Held-out</i> photos were not trained on, but they
chose the epoch whose weights these are.</p>
<p>Method: A. Joulin, L. van der Maaten, A. Jabri and N. Vasilache, Learning Visual Features from
Large Weakly Supervised Data, ECCV 2016. Made by <code>eval.py report</code>.</p></footer>"""


@command("report", CAPTIONS, IMAGES, PRIOR, BASELINES, *SPLITTING, *MAPPING, FONT,
         output_option("--out", ".html"),
         option("words", nargs="*", metavar="WORD", help="words to search photos for"),
         option("--series", nargs="+", metavar="RUN", help="runs for `words` side by side"),
         option("--pairs-similar", nargs="+", metavar="FILE", help="as `similar --pairs`"),
         option("--translate", metavar="FILE", help="as `translate --pairs`"),
         option("--transfer", nargs="+", metavar="DIR", help="as `transfer --images`"),
         example="--model runs/photos --out report.html")
def write_report(options, show, run):
    """All experiments that the options allow, in one HTML file with its pictures inside."""
    page = Output()
    results = {}
    failed = {}
    for title, function, changes in list_sections(options, run):
        print(f"\n{title}", flush=True)
        note = console.summary(function.__doc__)
        page.html.append(f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>')
        own = options_of(function, options, **changes)
        try:
            runs = []
            for path in own.model:
                runs.append(run if path == run.name else Trained(path, options.prior))
            results[title] = function(own, page, *runs)
        except (ValueError, OSError) as error:
            failed[title] = str(error)
            page.html.append(f'<p class="wrong">{escape(str(error))}</p>')
            print(f"{title}: {error}", file=sys.stderr)
    write_page(options.out, run, results.get(WORDS_SECTION), page.html)
    show.line(f"\n{options.out}: {os.path.getsize(options.out) / 1e6:.1f} MB")
    return {"sections": results, "failed": failed}


def list_sections(options, run):
    """(title, function of a command, its options that differ) of each section of the report."""
    few = {"words": options.words or run.words[:8], "top": 6}
    sections = [("The model at work", show_examples, {}),
                (WORDS_SECTION, predict_words, {"transfer": ()}),
                ("The run", show_run, {})]
    if options.series:
        sections.append(("More photos", predict_words, {"model": options.series}))
    sections += [("Photos for words", search_photos, few),
                 ("A map of photos", map_photos, {}),
                 ("A map of words", map_words, {}),
                 ("Nearest words", find_neighbors, few)]
    if options.pairs_similar:
        sections.append(("Similar words", compare_similarity, {"pairs": options.pairs_similar}))
    if options.translate:
        pairs = {"pairs": options.translate}
        sections += [("Translation", translate_words, pairs),
                     ("Translation, corrected for hubs", translate_words, {**pairs, "csls": True})]
    for path, name in short_names(options.transfer or ()).items():
        sections.append((f"Transfer to {name}", transfer_features, {"images": path}))
    return sections


def write_page(path, run, result, html):
    """Write an HTML file about a run, of which result is what `words` found, or None."""
    name = os.path.basename(os.path.abspath(run.folder))
    photos = "drawn pictures"
    if not run.options["drawn"]:
        photos = f"photos of {short_path(run.options['images'])}"
    title = escape(f"{name}: {len(run.words):,} words learned from {run.training:,} {photos}")
    head = ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{title}</title><style>{STYLE}</style>')
    opening = [f"<h1>{title}</h1>", f"<p>{escape(describe_data(run))}</p>"]
    if result:
        opening.append(f"<p>{escape(describe_scores(result))}</p>")
    opening.append(f'<p class="note">{escape(run.describe_weights())}</p>')
    with console.whole_file(path, "w", encoding="utf-8", errors="replace") as file:
        file.write("\n".join([head, *opening, *html, CLOSING]) + "\n")


def describe_data(run):
    """What a run was trained on, as a sentence for its report."""
    images = run.options["images"]
    captions = run.options["captions"]
    words = "their captions" if run.options["drawn"] else f"the captions in {short_path(captions)}"
    if captions == images:                      # the folder is its own captions
        words = "what is written beside them"
    return ("A network was shown these photos and learned to predict the words that go with them, "
            f"from {words}; nobody labelled a photo for it.")


def describe_scores(result):
    """What `words` found, with baselines, as a sentence for the report."""
    right = 10 * result["precision@10"]         # words of a photo
    baselines = [f"of the most frequent words {10 * result['baseline']['precision@10']:.1f}"]
    if "baselines" in result:
        readout, pixels = best_readout(result["baselines"]["scores"], VIEWS[2], "precision@10")
        baselines.append(f"by {readout} on raw pixels {10 * pixels:.1f}")
    return (f"Scored on {result['photos']:,} photos that it was not trained on: of the ten words "
            f"that it finds most probable for a photo {right:.1f} are in its captions, on average "
            f"({', '.join(baselines)}); and of a photo with a word and one "
            f"without, it ranks the one with it first in {result['auc']:.2f} of all cases (chance: "
            "0.50).")


def short_path(path):
    """The end of a path, which names it without telling where it lies."""
    return "/".join(os.path.abspath(path).split(os.sep)[-2:])


def show_examples(options, show, run):
    """Held-out photos with probable words, ✓ where their captions have them, ✗ where not."""
    index = run.index(options.captions, run.words, run.options["valid"])
    numbers = {index.name(i): i for i in range(min(100, index.held_out))}
    folder = options.images or run.options["images"]
    reader = run.read(folder, list(numbers), options.workers)
    scores = [kernels.to_host(run.net.forward(x)) for _, x, _ in reader]
    p = run.loss.probabilities(np.concatenate(scores))              # (N, K)
    find = data.Folder(folder).find
    result = {}
    photos = []
    for name, row, best in zip(reader.names[:12], p, top_words(p, 5)):
        guessed = {run.words[i]: float(row[i]) for i in best}
        carried = [run.words[i] for i in index.words(numbers[name])]
        result[name] = {"best": guessed, "words": carried}
        caption = ", ".join(carried)
        items = [f"{word} {format_probability(value)}" for word, value in guessed.items()]
        print(f"{name}: {', '.join(items)}; its words are {caption}")
        html = mark_guesses(guessed, carried)
        photos.append((find(name), f"a photo of: {caption}",
                       f"{html}<p>Its words: {escape(caption)}</p>"))
    show.line(f"The numbers are probabilities {MEANINGS[run.options['loss']]}; {run.prior}.")
    show.photos(photos)
    return result


def format_probability(p):
    """A probability, with two decimals, or two digits of a small one."""
    if p < 1e-4:
        return "<0.0001"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.2g}"


def mark_guesses(guessed, carried):
    """Lines of HTML of {word: p}: ✓ before the words that a photo carries, ✗ before the others."""
    lines = []
    for word, p in guessed.items():
        number = f'<span class="number">{escape(format_probability(p))}</span>'
        if word in carried:
            lines.append(f"<b>✓ {escape(word)}</b> {number}")
        else:
            lines.append(f"<s>✗ {escape(word)}</s> {number}")
    return "<br>".join(lines)


def show_run(options, show, run):
    """What the run was trained on, how, how long, and its learning curves."""
    steps = np.diff([row["step"] for row in run.log], prepend=0)    # of each epoch
    photos = run.options["batch"] * steps
    seconds = sum(photos / [row["images_per_second"] for row in run.log])
    show.line(f"{run.training:,} training photos, {len(run.words):,} words; epochs: "
              f"{len(run.log)}, {photos.sum():,} photos in {console.duration(seconds)} of training")
    hidden = ("images", "captions", "out", "drawn", "resume", "device")
    settings = []
    for key, value in run.options.items():
        if value is not None and key not in hidden:
            settings.append(f"--{key.replace('_', '-')} {value}")
    print(" ".join(settings))
    items = [f"<span>{escape(setting)}</span>" for setting in settings]
    show.html.append(f'<p class="note settings">{" ".join(items)}</p>')
    show.plots(run.curves(), "learning curves")
    return {"epochs": len(run.log), "photos": int(photos.sum()), "seconds": seconds}


def list_commands():
    """Print what each command does, and an example of it."""
    print("python eval.py COMMAND --model RUN …, of a trained run RUN; all options of a command: "
          "python eval.py COMMAND --help")
    for name, (says, example) in EXAMPLES.items():
        print(f"\n{name}: {says}\n    {example}")


def check_outputs(options, runs):
    """ValueError where a file to write is named twice, or is one that the command reads."""
    given = vars(options)
    outputs = [given.get(name) for name in ("out", "json", "per_word") if given.get(name)]
    if options.out and options.out.lower().endswith(PLOTS):
        outputs.append(numbers_file(options.out))
    outputs = [os.path.realpath(path) for path in outputs if path != "-"]
    inputs = [run.options["captions"] for run in runs]
    for name in ("captions", "truth", "features", "pairs", "photos"):
        value = given.get(name)
        inputs += value if isinstance(value, list) else [value]
    inputs = [os.path.realpath(path) for path in inputs if path]
    for path in outputs:
        if path in inputs:
            raise ValueError(f"{path} is read, it is no place to write; choose another file")
        if outputs.count(path) > 1:
            raise ValueError(f"two options name {path} to be written; choose two files")


def main(arguments=None):
    """Run the command that the arguments give, a list, or else the command line; its status."""
    if not (sys.argv[1:] if arguments is None else arguments):
        list_commands()
        return 2                                # nothing was done
    options = PARSER.parse_args(arguments)
    if options.threads:
        kernels.threads.start(options.threads)
    print(kernels.use(options.device, "fp32"), file=sys.stderr)     # distances cancel in TF32
    terminal = sys.stderr if options.json == "-" else sys.stdout
    with redirect_stdout(terminal):
        runs = [Trained(path, options.prior) for path in options.model]
        check_outputs(options, runs)
        result = options.function(options, Output(options.out), *runs)
    if options.json:
        console.write_json(options.json, result)
    return 1 if result.get("failed") else 0


if __name__ == "__main__":
    console.run_command(main)
