"""The paper's experiments on a trained run, using the model, and the pictures of a run.

    python eval.py words --model runs/NAME                precision@k, AUC and AP on held-out photos
    python eval.py tag   --model runs/NAME PHOTO...       words for photos

`--model` is the run's folder, as weak.py made it. Fractions, not percent, everywhere.
"""
import argparse
import errno
import json
import os
import signal
import sys
import time
import traceback

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # while the rest is imported

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.special import expit, softmax
from scipy.stats import rankdata

import data
import kernels
import model
from kernels import ranks

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


def _plot(draw, box, title, points, colour):
    """One pair of axes with one line through the points."""
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
    spots = [(left + (right - left) * (x - xs[0]) / max(1, xs[-1] - xs[0]),
              bottom - (bottom - top) * (y - low) / (high - low)) for x, y in points]
    for i in range(5):
        height = bottom - (bottom - top) * i / 4
        draw.line([(left + 1, height), (right, height)], PALE)
        draw.text((left - 6, height), f"{low + (high - low) * i / 4:.4g}", INK, font, anchor="rm")
    draw.line([(left, bottom), (right, bottom)], INK)
    draw.text((left, bottom + 8), str(xs[0]), INK, font)
    draw.text((right, bottom + 8), f"epoch {xs[-1]}", INK, font, anchor="ra")
    draw.line(spots, colour, 2)
    for x, y in spots:
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], colour)


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
        self.loss = model.LOSSES[self.options.get("loss", "softmax")](
            self.counts / max(1, facts["training"]) if self.one_vs_all else None)

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


def ticker(total, what):
    """A function that counts photos and shows how far it is, with a rate and the time left."""
    started, state = time.monotonic(), {"done": 0, "last": 0.0}

    def tick(count):
        state["done"] += count
        now = time.monotonic()
        if now - state["last"] > (0.5 if sys.stderr.isatty() else 10):
            state["last"] = now
            rate = state["done"] / max(1e-9, now - started)
            end = "\r" if sys.stderr.isatty() else "\n"
            print(f"{what}: {state['done']:,} of {total:,} photos, {rate:.0f}/s, "
                  f"{(total - state['done']) / max(rate, 1e-9):.0f} s left  ", end=end,
                  file=sys.stderr, flush=True)
    return tick


def words(options):
    """Precision@k on photos that were not trained on, AUC and AP over words, and baselines."""
    trained = Trained(options.model)
    index = trained.index(options.captions, options.workers)
    images = options.images or trained.options["images"]
    if not os.path.isdir(images):
        raise ValueError(f"images: there is no folder {images}; name it with --images")
    photos = range(len(index) if options.all else index.held_out)
    if not len(photos):
        raise ValueError("no photo is held out; use --all to score every photo of the captions")
    loader = data.Loader(images, index.name, len(photos), trained.size, BATCH, options.workers,
                         options.model)
    features, found = features_of(trained.net, loader, photos, trained.crop,
                                  ticker(len(photos), "scoring"))
    loader.close()
    if not found:
        raise ValueError(f"none of {len(photos):,} photos could be read from {images}; first: "
                         + "; ".join(f"{n}: {e}" for n, e in list(loader.skipped.items())[:1]))
    result = word_metrics(features, trained.net.rows[-1][1], target_rows(index, found),
                          trained.counts, trained.loss)
    result["skipped"] = len(loader.skipped)
    print_words(result)
    return result


def print_words(result):
    """The table of `eval.py words`."""
    print(f"{result['photos']:,} photos, {result['words']:,} of {result['dictionary']:,} "
          "words occur in them")
    print(f"{'':20}{'model':>9}{'frequent words':>16}{'chance':>9}{'ceiling':>9}")
    for key in [f"precision@{k}" for k in KS]:
        print(f"{key:20}{result[key]:9.4f}{result['baseline'][key]:16.4f}"
              f"{result['chance'][key]:9.4f}{result['ceiling'][key]:9.4f}")
    print(f"{'AUC, mean of words':20}{result['auc']:9.4f}{0.5:16.4f}{0.5:9.4f}{1:9.4f}")
    print(f"{'AP, mean of words':20}{result['map']:9.4f}{result['chance']['map']:16.4f}"
          f"{result['chance']['map']:9.4f}{1:9.4f}")
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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parser():
    """The commands and their options."""
    formatter = HelpFormatter
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function):
        one = commands.add_parser(function.__name__, help=function.__doc__,
                                  description=function.__doc__, formatter_class=formatter)
        one.set_defaults(function=function)
        one.add_argument("--model", required=True, metavar="RUN", help="folder of a trained run")
        one.add_argument("--json", metavar="FILE", help="write the result as JSON, too")
        one.add_argument("--device", choices=kernels.DEVICES, default="auto", help="where to run")
        one.add_argument("--threads", type=int, help="CPU threads; all cores if not given")
        return one

    one = command(words)
    one.add_argument("--images", metavar="DIR", help="photos; those of the run if not given")
    one.add_argument("--captions", metavar="FILE", help="captions; those of the run if not given")
    one.add_argument("--all", action="store_true", help="score all photos, not the held-out ones")
    one.add_argument("--workers", type=int, default=2, help="processes that decode photos")
    one = command(tag)
    one.add_argument("photos", nargs="+", metavar="PHOTO", help="picture files")
    one.add_argument("--top", type=int, default=10, help="how many words a photo")
    one.add_argument("--threshold", type=float, help="instead: all words at least as probable")
    return top


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
        sys.exit(1)
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
    """ValueError for options that cannot be; before any work, also for where the JSON goes."""
    for name, low, high in (("threads", 1, np.inf), ("workers", 0, MOST_WORKERS),
                            ("top", 1, np.inf), ("threshold", 0, 1)):
        value = getattr(options, name, None)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} {value}: it must be {low} to {high}")
    if options.json:
        try:
            open(options.json, "a").close()
        except OSError as error:
            raise ValueError(f"--json: cannot write {options.json}: {error.strerror}") from None


def main():
    options = parser().parse_args()
    check(options)
    if options.threads:
        kernels.set_threads(options.threads)
    print(kernels.use(options.device), file=sys.stderr)
    result = options.function(options)
    if options.json:
        write_json(options.json, result)
    return 1 if result.get("skipped") and options.function is tag else 0


if __name__ == "__main__":
    guarded(main)
