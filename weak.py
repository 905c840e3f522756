"""Learn visual features from captions: train a convolutional network to predict their words.

    python weak.py                                       draws a captioned picture set, trains on it
    python weak.py --images DIR --captions FILE          your own photos
    python weak.py --resume --out runs/NAME              go on where a run stopped

Joulin, van der Maaten, Jabri, Vasilache: Learning Visual Features from Large Weakly Supervised
Data (2016). `main` is the table of contents, `Run.train` the method. A run's folder holds
model.npz (all of the run), words.txt, log.jsonl, skipped.txt, curves.png and filters.png.
"""
import argparse
import errno
import fcntl
import math
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zlib
from contextlib import redirect_stderr

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # while the rest is imported

import numpy as np
from PIL import Image, ImageDraw

import data
import eval as evaluation
import kernels
import model
from kernels import ranks as several
from kernels.cpu import philox

EPOCH = 1_000_000               # training images between two validations
LEAST_EPOCH = 10_000            # … for collections smaller than that
EPOCHS_PER_RATE = 10            # epochs that each learning rate is kept at least
LEAST_RATE = 1e-6               # training stops below
MOMENTUM, DECAY = 0.9, 5e-4     # not stated in the paper; Krizhevsky's (2012, §5)
SAVE_SECONDS = 600
LATE = 4                        # steps until the loss of a GPU is read
EMPTY_STEPS = 100               # steps in a row without a photo that can be read: give up
NEGATIVES = 1000                # of --targets sampled
VALIDATED = 10_000              # held-out photos scored after an epoch, at most
HARMLESS = {"resume", "out", "images", "epochs", "min_lr", "workers", "threads", "device",
            "precision"}


def main():
    ranks = several.join()
    silence = open(os.devnull, "w") if ranks.rank else None         # the first rank speaks for all
    with redirect_stderr(silence or sys.stderr):
        options, checkpoint = parse()
    sys.stdout = silence or sys.stdout
    warnings.filterwarnings("ignore", "(overflow|invalid value)", RuntimeWarning)   # the loss says
    share_machine(options, ranks)
    print(kernels.use(options.device, options.precision, ranks.local_rank), flush=True)
    lock = None if ranks.rank else lock_folder(options.out)
    if options.drawn and not ranks.rank:
        draw_set(os.path.dirname(options.captions), options.seed)
    index = read_captions(options, ranks)
    with Interrupt() as interrupt:
        run = Run(options, index, checkpoint, ranks)
        finished = run.train(interrupt)
        run.finish(finished)
    if lock:
        lock.close()
    return 0 if finished else 130


def share_machine(options, ranks):
    """Threads and workers for this rank: its share of what the machine's ranks have together."""
    cores, count = kernels.threads(), ranks.local_size
    if options.threads or count > 1:
        kernels.set_threads(options.threads or max(1, cores // count))
    if options.workers is None:
        options.workers = min(8, max(1, (os.cpu_count() or 1) // count))
    if ranks.size > 1:
        print(f"ranks: {ranks.size}, {count} of them on this machine; each takes its share of "
              f"--batch {options.batch}", flush=True)
    if options.batch < ranks.size:
        raise ValueError(f"--batch {options.batch} is less than the {ranks.size} ranks; each of "
                         "them needs a photo a step")


# ---------------------------------------------------------------------------------- options

def parser():
    """All options; the defaults of --dropout, --lr and --epoch-size depend on others."""
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Without --images "
                                  "and --captions, a picture set is drawn and trained on.",
                                  formatter_class=evaluation.HelpFormatter)
    _add_what(top)
    _add_how(top)
    return top


def _add_what(top):
    """Options of the data and the model."""
    add = top.add_argument_group("data").add_argument
    add("--images", metavar="DIR", help="folder of the photos that the captions name")
    add("--captions", metavar="FILE", help="captions: one of the formats, also .gz and .bz2")
    add("--format", choices=data.FORMATS, help="of the captions; recognised if not given")
    add("--words", type=int, default=data.WORDS, metavar="K", help="size of the dictionary")
    add("--stop-words", type=int, default=data.STOP_WORDS, metavar="N",
        help="the most frequent words, left out; 30 to 100 suit some thousand captions")
    add("--valid", type=float, default=0.1, metavar="FRACTION", help="share of photos held out")
    add("--crop", choices=("center", "random"), default="random",
        help="training crops; random ones are also mirrored at random")
    add("--sampling", choices=("class", "image"), default="class",
        help="draw a word, then its photo; or a photo with all its words")
    add = top.add_argument_group("model").add_argument
    add("--network", choices=tuple(model.NETWORKS), default="small",
        help="small: 64x64 pixels, for CPUs; the others: 224x224")
    add("--loss", choices=tuple(model.LOSSES), default="softmax",
        help="multi-class logistic (eq. 2), or one-versus-all (eq. 1)")
    add("--targets", choices=("all", "batch", "sampled"), default="all",
        help="words that a step scores: all, those of its batch, or those and --negatives others")
    add("--negatives", type=int, metavar="M", help="words that --targets sampled adds; if not "
        f"given {NEGATIVES:,}")
    add("--dropout", type=float, help="rate" + _by_network("dropout"))


def _add_how(top):
    """Options of training and running."""
    add = top.add_argument_group("training").add_argument
    add("--batch", type=int, metavar="N", help="photos a step" + _by_network("batch"))
    add("--lr", type=float, help="first learning rate" + _by_network("lr"))
    add("--momentum", type=float, default=MOMENTUM, help="of SGD")
    add("--weight-decay", type=float, default=DECAY, help="of SGD, not for biases")
    add("--epoch-size", type=int, metavar="N", help="photos an epoch; if not given as many as "
        f"there are, but {LEAST_EPOCH:,} to {EPOCH:,}")
    add("--epochs", type=int, metavar="N", help="stop after N; if not given when --min-lr says")
    add("--epochs-per-lr", type=int, default=EPOCHS_PER_RATE, metavar="N",
        help="epochs before the rate may be halved, which happens when the validation loss rises")
    add("--min-lr", type=float, default=LEAST_RATE, metavar="RATE", help="stop below this rate")
    add("--seed", type=int, default=0, help="of weights, draws, crops and dropout")
    add = top.add_argument_group("running").add_argument
    add("--out", metavar="DIR", help="folder of the run; if not given runs/ and the images' name")
    add("--resume", action="store_true", help="go on with the run in --out, with its options")
    add("--device", choices=kernels.DEVICES, default="auto", help="where to compute")
    add("--precision", choices=kernels.PRECISIONS,
        help="of products on a GPU; if not given tf32 where it has tensor cores for that")
    add("--workers", type=int, metavar="N", help="processes that read captions and decode photos; "
        "if not given one a core, but at most 8; 0: none, for whole tracebacks")
    add("--threads", type=int, metavar="N", help="threads that compute; all cores if not given")


def _by_network(name):
    """The part of a help line that tells an option's defaults."""
    return "; if not given " + ", ".join(f"{network} {getattr(recipe, name):g}"
                                         for network, recipe in model.NETWORKS.items())


# what `python weak.py` alone trains with
DRAWN = {"words": 80, "stop_words": 10, "epochs": 5, "epoch_size": 10_000}


def parse(arguments=None):
    """The options, and the checkpoint to go on with or None; ValueError for what cannot be."""
    top = parser()
    given = top.parse_args(arguments)
    drawn = given.images is None and given.captions is None and not given.resume
    if drawn:
        top.set_defaults(**DRAWN)
        given = top.parse_args(arguments)
    if given.out == "":
        raise ValueError("--out: name a folder")
    out = given.out or os.path.join("runs", "drawn" if drawn else name_of(given))
    path = os.path.join(out, "model.npz")
    checkpoint = None
    if os.path.exists(path):
        if not given.resume:
            raise ValueError(f"{path} holds a trained model; go on with --resume, or choose "
                             "another --out")
        checkpoint = model.load(path)
        stored = {**vars(top.parse_args([])), **checkpoint[2]["options"]}   # … of newer options
        top.set_defaults(**{key: value for key, value in stored.items() if key != "out"})
        given = top.parse_args(arguments)
        drawn = stored["drawn"]
        if not drawn and given.captions:
            given.captions = os.path.abspath(given.captions)
        changed = [f"--{key.replace('_', '-')} ({stored[key]}, now {value})"
                   for key, value in vars(given).items()
                   if key in stored and key not in HARMLESS and stored[key] != value]
        if changed:
            raise ValueError(f"the run in {out} began with other options: {', '.join(changed)}; "
                             "leave them out, or choose another --out")
    given.out, given.drawn = out, drawn
    if drawn and not given.captions:
        given.images = os.path.join(out, "drawn", "photos")
        given.captions = os.path.join(out, "drawn", "captions.tsv")
    return checked(given), checkpoint


def name_of(options):
    """The run's name where none is given: that of the images folder."""
    if not options.images:
        raise ValueError("--resume: name the run's folder with --out" if options.resume else
                         "--captions needs --images, the folder of the photos")
    return os.path.basename(os.path.abspath(options.images)) or "photos"


def checked(options):
    """The options, completed; ValueError for what no run can be made of."""
    if options.resume and not options.captions:
        raise ValueError(f"--resume: there is no run in {options.out}; begin one without --resume")
    if not options.images or not options.captions:
        raise ValueError("--images and --captions go together: the photos' folder and a file of "
                         "photo<TAB>caption lines (without both, a picture set is drawn)")
    if not options.drawn:
        options.images, options.captions = map(os.path.abspath, (options.images, options.captions))
        if not os.path.isdir(options.images):
            raise ValueError(f"images: there is no folder {options.images}")
        if not os.path.exists(options.captions):
            raise ValueError(f"captions: there is no file {options.captions}")
        if not os.path.isfile(options.captions) and not os.path.isdir(options.captions):
            raise ValueError(f"captions: {options.captions} is a pipe; save it to a file first")
    for name, least in (("words", 1), ("stop_words", 0), ("batch", 1), ("epochs", 1), ("seed", 0),
                        ("epoch_size", 1), ("epochs_per_lr", 1), ("workers", 0), ("threads", 1),
                        ("negatives", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least {least}")
    if options.negatives and options.targets != "sampled":
        raise ValueError("--negatives goes with --targets sampled")
    if options.targets == "sampled":
        options.negatives = options.negatives or NEGATIVES
    if options.targets == "batch" and options.batch == 1:
        raise ValueError("--targets batch compares a photo's words with those of the batch's other "
                         "photos; use --batch 2 or more")
    if options.workers and options.workers > evaluation.MOST_WORKERS:
        raise ValueError(f"--workers {options.workers}: at most {evaluation.MOST_WORKERS} here")
    if options.seed >= 2**63:
        raise ValueError(f"--seed {options.seed}: it must be below 2^63")
    for name in ("batch", "dropout", "lr"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(model.NETWORKS[options.network], name))
    for name, good in (("valid", 0 <= options.valid < 1), ("dropout", 0 <= options.dropout < 1),
                       ("momentum", 0 <= options.momentum < 1), ("lr", 0 < options.lr < math.inf),
                       ("weight_decay", 0 <= options.weight_decay < math.inf),
                       ("min_lr", 0 < options.min_lr < math.inf)):
        if not good:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: out of range")
    return options


def lock_folder(out):
    """Make the run's folder and hold it: ValueError if it holds other things, or another run."""
    path = os.path.join(out, "run.lock")
    try:
        os.makedirs(out, exist_ok=True)
        if os.listdir(out) and not os.path.exists(path):
            raise ValueError(f"{out} holds other things than a run; choose another --out")
        lock = open(path, "a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        raise ValueError(f"another run is using {out}; wait for it, or choose another --out"
                         ) from None
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}; choose another") from None


# ------------------------------------------------------------------------------------- data

def read_captions(options, ranks=several.Alone()):
    """The index of the captions, with a summary line; ValueError if no photo is there.

    The first rank builds it, and the others open it.
    """
    text = data.Text(options.words, options.stop_words, options.valid)
    folder = os.path.join(options.out, "index")
    if not ranks.rank:
        options.format = options.format or data.recognise(options.captions)
        index = data.build_index(options.captions, folder, text, options.format, say=print,
                                 processes=options.workers * ranks.local_size)
    options.format = ranks.share(options.format)                    # the others wait here
    if ranks.rank:
        index = data.cached_index(options.captions, folder, text, options.format)
        if index is None:
            raise RuntimeError(f"the first rank's {folder} is not to be seen here; put --out, the "
                               "captions and the photos on a disk that all machines share")
    facts, found = index.facts, len(index.dictionary)
    print(f"captions: {facts['captions']:,} as {options.format}, {len(index):,} photos "
          f"({index.held_out:,} held out), {found:,} words, "
          f"{index.labels / max(1, len(index)):.2f} a photo", flush=True)
    for count, what in ((facts["bad_lines"], "lines are no captions"),
                        (facts["refused"], "names are absolute or leave --images: refused"),
                        (facts["without_words"], "photos have no word of the dictionary")):
        if count:
            print(f"captions: {count:,} {what}")
    if found < options.words:
        print(f"captions: only {found:,} words are there after the {options.stop_words} most "
              f"frequent ones, not {options.words:,}; going on with them")
    if not ranks.rank and not data.any_photo(options.images, index):
        raise ValueError(f"none of the photos that the captions name is in {options.images}, "
                         f"e.g. {index.name(0)!r}; check --images and the names")
    return index


# --------------------------------------------------------------------------------- training

class Interrupt:
    """Ctrl-C or a polite kill sets `asked`, so that the step ends first; a second one ends all."""

    asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step, and saving; once more to stop at once", flush=True)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Run:
    """A training run: network, optimiser, rate, and where it is."""

    def __init__(self, options, index, checkpoint, ranks=several.Alone()):
        self.options, self.index, self.ranks = options, index, ranks
        self.part = slice(*(options.batch * rank // ranks.size
                            for rank in (ranks.rank, ranks.rank + 1)))      # of a batch's rows
        self.share = index.share(options.sampling)
        self.loss = model.LOSSES[options.loss](self.share)
        self.held_out_loss = model.LOSSES[options.loss](index.share("image"))
        recipe = model.NETWORKS[options.network]
        self.size, self.crop = recipe.size, recipe.crop
        self.net = recipe.build(len(index.dictionary), options.dropout).init(options.seed)
        self.optimiser = model.SGD(self.net, options.momentum, options.weight_decay)
        self.plateau = model.Plateau(options.lr, options.epochs_per_lr, options.min_lr)
        self.step = self.epoch = 0
        self.log, self.losses, self.saved = [], [], None            # a loss a step of the epoch
        self.read = 0                                               # how many of them are read
        self.again = None                                           # the last batch's loss, anew
        if checkpoint:
            self.restore(*checkpoint)
        self.epoch_size = options.epoch_size or min(EPOCH, max(LEAST_EPOCH, index.training))
        self.steps = -(-self.epoch_size // options.batch)           # per epoch
        most = min(VALIDATED, max(100, evaluation.BLOCK // len(index.dictionary)), index.held_out)
        self.held_out = [int(i) for i in np.linspace(0, index.held_out - 1, most)]
        self.check_room()
        self.check_memory()
        self.loader = data.Loader(options.images, index.name, len(index), self.size,
                                  self.part.stop - self.part.start + evaluation.BATCH,
                                  options.workers, options.out, ranks.local_size)
        if checkpoint:
            self.recall_skipped()
        self.write_texts()

    def restore(self, weights, velocities, facts, words):
        """Go on exactly where the checkpoint was written."""
        if words != self.index.dictionary.words:
            raise ValueError("the captions have changed since this run began, and with them the "
                             "dictionary; choose another --out")
        self.net.load(weights)
        self.optimiser.load(velocities)
        self.step, self.epoch, self.log, self.losses = (
            facts[key] for key in ("step", "epoch", "log", "losses"))
        rows = (self.part.stop - self.part.start) / self.options.batch
        self.losses = [loss and loss * rows for loss in self.losses]    # this rank's share of them
        vars(self.plateau).update(facts["plateau"], least=self.options.min_lr)
        self.saved = self.step
        print(f"going on at step {self.step:,}, epoch {self.epoch + 1}", flush=True)

    def check_room(self):
        """Say what a checkpoint takes, and refuse to start where two do not fit."""
        weights = sum(array.nbytes for array in self.optimiser.v.values())
        free = shutil.disk_usage(self.options.out).free
        count = weights // 4
        print(f"{self.options.network}: {count:,} parameters; a checkpoint takes "
              f"{2 * weights / 1e6:,.0f} MB of {free / 1e9:,.1f} GB free", flush=True)
        if free < 4 * weights:
            raise ValueError(f"{self.options.out} has {free / 1e6:,.0f} MB free, and saving needs "
                             f"{4 * weights / 1e6:,.0f}; free some, or choose another --out")

    def check_memory(self):
        """Say what the GPU must hold, and refuse to start where it cannot."""
        free = kernels.memory()
        if free is None:
            return
        each = self.net.bytes_per_image(self.size, self.crop)
        some = self.options.targets != "all"    # then the output layer's are a few rows
        more = sum(self.optimiser.v[path].nbytes for path, layer, _ in self.net.parameters()
                   if not (some and isinstance(layer, model.Output)))       # the gradients
        need = more + each * (self.part.stop - self.part.start)
        kept = 2 * sum(array.nbytes for array in self.optimiser.v.values())
        if max(array.size for array in self.optimiser.v.values()) >= 1 << 31:
            raise ValueError(f"--words {self.options.words}: the GPU's kernels count to 2^31 "
                             "numbers a layer; use fewer, or --device cpu")
        print(f"GPU memory: {(kept + more) / 1e9:,.2f} GB for weights, velocities and gradients, "
              f"{each / 1e6:,.1f} MB an image, {need / 1e9:,.2f} GB more at --batch "
              f"{self.options.batch}; {free / 1e9:,.1f} GB are free", flush=True)
        if need > free:
            most = int((free - more) / each) * self.ranks.size
            raise ValueError(f"--batch {self.options.batch} does not fit into the GPU's memory; "
                             "use " + (f"--batch {most} or less" if most > 0 else "--device cpu"))

    def done(self):
        """True when the options say that training is over."""
        return (self.plateau.rate < self.options.min_lr
                or self.options.epochs is not None and self.epoch >= self.options.epochs)

    def train(self, interrupt):
        """Train until the rate is below --min-lr or --epochs are over; False if interrupted."""
        options = self.options
        draws = (data.Draws(self.index, options.seed, step, options.batch, options.sampling,
                            self.part) for step in iter(range(self.step, sys.maxsize)))
        batches = self.loader.batches(draws)
        saved = time.monotonic()
        while not self.done():
            clock = Clock(self)
            while len(self.losses) < self.steps:
                with clock.waiting:
                    draw, photos = next(batches)
                good, stop, due = self.ranks.total(     # what all ranks must do alike
                    [draw.weights.any(), interrupt.asked, time.monotonic() - saved > SAVE_SECONDS])
                self.losses.append(self.train_step(draw, photos) if good else self.skip_step())
                self.read_losses()
                clock.tick()
                if stop:
                    return False
                if due:
                    self.save()
                    saved = time.monotonic()
            self.end_epoch(clock)
            saved = time.monotonic()
        return True

    def train_step(self, draw, photos):
        """Forward, loss, backward, update: one step of SGD on one batch; returns the loss.

        With several ranks: of this rank's rows, and the update is by the sum of all gradients.
        """
        self.step += 1
        classes, loss = self.loss_on(draw)
        where = draw.crops(self.size - self.crop, self.options.crop == "random")
        x = kernels.prepare(photos, *where, self.crop)              # (N, H, W, 3)
        s = self.net.forward(x, seed=self.options.seed, step=self.step, row=self.part.start,
                             classes=classes)                       # (N, K), or (N, C)
        value, ds = model.training_loss(self.net, s, draw.weights, loss)
        self.net.backward(ds, done=self.add_up)
        self.ranks.wait()
        self.optimiser.step(self.plateau.rate)
        self.again = lambda: loss(self.net.forward(x, classes=classes), draw.weights)[0]
        return value

    def loss_on(self, draw):
        """The classes that the step scores, None for all, and its loss of (s, weights)."""
        options, targets = self.options, draw.targets()
        if options.targets == "all":
            return None, lambda s, weights: self.loss(s, targets, weights)
        classes, chance = draw.classes(self.share, options.negatives or 0)
        if options.targets == "batch" and options.loss == "softmax":
            chance = None                       # as in the paper, whose estimate is biased
        targets = data.columns(targets, classes)
        return classes, lambda s, weights: self.loss(s, targets, weights, classes, chance)

    def add_up(self, layer):
        """Begin to sum the layer's gradients over the ranks."""
        for _, owner, attribute in layer.parameters():
            self.ranks.add_up(getattr(owner, "d" + attribute))

    def skip_step(self):
        """A step of which no photo can be read changes nothing; RuntimeError after many."""
        self.step += 1
        if self.losses[-EMPTY_STEPS:] == [None] * EMPTY_STEPS:
            name, why = next(iter(self.loader.skipped.items()), ("none here", ""))
            raise RuntimeError(f"no photo of the last {EMPTY_STEPS} steps could be read, "
                               f"e.g. {name}: {why}")

    def read_losses(self, late=LATE):
        """Read and check the losses that are due: on a GPU the last ones are still on their way."""
        while self.read < len(self.losses):
            loss, behind = self.losses[self.read], len(self.losses) - 1 - self.read
            if loss is not None and not isinstance(loss, float):
                if behind < late:
                    return
                loss = float(loss)
            if loss is not None:
                self.check_loss(loss, self.step - behind)
            self.losses[self.read] = loss
            self.read += 1

    def check_loss(self, loss, step=None):
        """RuntimeError if the loss is not finite: what was saved before stays as it is."""
        if not np.isfinite(loss):
            kept = ("nothing was saved yet" if self.saved is None
                    else f"the checkpoint of step {self.saved:,} is untouched")
            raise RuntimeError(f"the loss is {loss} at step {step or self.step:,}: {kept}; "
                               f"lower --lr ({self.plateau.rate:g})")

    def mean_loss(self, last):
        """The mean training loss of the last steps, of this rank's rows; NaN without one."""
        losses = [loss for loss in self.losses[:self.read][-last:] if loss is not None]
        rows = (self.part.stop - self.part.start) / self.options.batch
        return float(np.mean(losses)) / rows if losses else math.nan

    def all_losses(self):
        """The losses of the epoch's steps so far, summed over the ranks; None without photos."""
        sums = self.ranks.total([loss or 0 for loss in self.losses])
        return [None if loss is None else float(sum_) for loss, sum_ in zip(self.losses, sums)]

    def end_epoch(self, clock):
        """Validate, apply the learning-rate rule, save, and log the epoch."""
        self.epoch += 1
        self.read_losses(late=0)
        losses = [loss for loss in self.all_losses() if loss is not None]
        row = {"epoch": self.epoch, "step": self.step,
               "loss": float(np.mean(losses)) if losses else math.nan,
               "learning_rate": self.plateau.rate, "images_per_second": clock.rate(),
               "loader_wait": clock.wait_share(), "precision@10": None, "auc": None,
               "validation_loss": None, "skipped": len(self.all_skipped())}
        result = self.validate()
        error = row["loss"]                     # where nothing is held out
        if result:
            error = result["loss"]
            self.check_loss(error)
            row |= {"validation_loss": error, **{key: result[key] for key in
                                                 ("precision@10", "auc", "map")}}
        self.plateau.update(error)
        self.log.append(row)
        self.losses, self.read = [], 0
        self.check_ranks()
        self.save()
        self.write_texts()
        among = "" if self.options.targets == "all" else f" ({self.options.targets} words)"
        print(f"epoch {self.epoch}: loss{among} {row['loss']:.4f}, " + (
            f"held-out loss {error:.4f}, precision@10 {result['precision@10']:.4f}, "
            f"AUC {result['auc']:.4f}, " if result else "")
            + f"rate {row['learning_rate']:g}, {row['images_per_second']:.0f} images/s, "
            f"waited for photos {row['loader_wait']:.0%}{clock.ranks()}", flush=True)

    def validate(self):
        """Metrics on the fixed held-out photos, or None where there are none.

        Each rank computes the features of its share, and the first one what follows from them.
        """
        share = np.array_split(self.held_out, self.ranks.size)[self.ranks.rank]
        features, found = evaluation.features_of(self.net, self.loader, share.tolist(), self.crop)
        parts = [(x, photos) for x, photos in self.ranks.gather((kernels.to_host(features), found))
                 if photos]
        result = None
        if parts:
            features = kernels.to_device(np.concatenate([x for x, _ in parts]))
            found = [photo for _, photos in parts for photo in photos]
            result = evaluation.word_metrics(
                features, self.net.rows[-1][1], evaluation.target_rows(self.index, found),
                self.index.photo_counts(), self.held_out_loss)
        return self.ranks.share(result)

    def check_ranks(self):
        """RuntimeError unless all ranks have the same weights to the bit, as they must."""
        if self.ranks.size > 1:
            sums = [zlib.crc32(np.ascontiguousarray(w)) for w in self.net.state().values()]
            if any(other != sums for other in self.ranks.gather(sums)):
                raise RuntimeError(f"the ranks' weights differ after step {self.step:,}: are their "
                                   "machines and libraries alike?")

    # ------------------------------------------------------------------------ what is written

    def facts(self):
        """What a checkpoint holds besides weights and velocities."""
        options = {key: value for key, value in vars(self.options).items() if key != "resume"}
        return {"options": options, "step": self.step, "epoch": self.epoch, "log": self.log,
                "losses": self.all_losses(), "plateau": vars(self.plateau),
                "counts": self.index.photo_counts().tolist(), "training": self.index.training}

    def save(self, last=False):
        """Write the checkpoint; a full disk is said, and costs the run nothing but this one.

        The last update may have diverged: one more forward pass keeps the checkpoint good.
        """
        self.read_losses(late=0)
        if self.again:
            self.check_loss(float(self.again()))
        facts = self.facts()                    # here all ranks have found their losses finite
        if self.ranks.rank:
            self.saved = self.step
            return True
        places = [self.options.out] + [tempfile.gettempdir()] * last
        for place in places:
            path = os.path.join(place, "model.npz" if place == self.options.out else
                                f"weak-{os.path.basename(self.options.out)}-{os.getpid()}.npz")
            try:
                model.save(path, self.net, self.optimiser, facts, self.index.dictionary.words)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                print(f"not saved to {path}: {error.strerror or error}; "
                      + ("free some space" if full else "the previous checkpoint is untouched"),
                      file=sys.stderr, flush=True)
                continue
            self.saved = self.step
            if place != self.options.out:
                print(f"saved to {path} instead; move it to "
                      f"{os.path.join(self.options.out, 'model.npz')}", flush=True)
            return True
        if last:
            raise RuntimeError("the last steps could not be saved anywhere")
        return False

    def recall_skipped(self):
        """What was skipped before the run was resumed."""
        try:
            with open(os.path.join(self.options.out, "skipped.txt"), encoding="utf-8",
                      errors="surrogateescape") as file:
                rows = [line.rstrip("\n").rpartition("\t") for line in file]
        except OSError:
            return
        self.loader.skipped.update({name: why for name, _, why in rows
                                    if name not in self.index.facts["refused_names"]})

    def all_skipped(self):
        """{name: what is wrong} of the photos that any rank skipped; complete on the first rank."""
        return {name: why for skipped in self.ranks.gather(self.loader.skipped)
                for name, why in skipped.items()}

    def write_texts(self):
        """words.txt, log.jsonl and skipped.txt; losing one of them never ends a run."""
        counts, skipped = self.index.photo_counts(), self.all_skipped()
        if self.ranks.rank:
            return
        skipped = [*skipped.items(),
                   *((name, "refused: outside --images")
                     for name in self.index.facts["refused_names"])]
        texts = {
            "words.txt": [f"{word}\t{count}" for word, count in
                          zip(self.index.dictionary.words, counts)],
            "log.jsonl": [json.dumps(evaluation.without_nan(row)) for row in self.log],
            "skipped.txt": [f"{name}\t{why}" for name, why in skipped]}
        try:
            for name, lines in texts.items():
                path = os.path.join(self.options.out, name)
                with open(path + ".part", "w", encoding="utf-8", errors="surrogateescape") as file:
                    file.writelines(line + "\n" for line in lines)
                os.replace(path + ".part", path)
        except OSError as error:
            print(f"{', '.join(texts)} not written: {error.strerror}", file=sys.stderr)

    def draw_pictures(self):
        """curves.png and filters.png; losing one of them never ends a run."""
        if self.ranks.rank:
            return
        try:
            if self.log:
                evaluation.curves_picture(self.log, os.path.join(self.options.out, "curves.png"))
            evaluation.filters_picture(kernels.to_host(self.net.rows[0][1].w),
                                       os.path.join(self.options.out, "filters.png"))
        except OSError as error:
            print(f"pictures not drawn: {error.strerror or error}", file=sys.stderr)

    def finish(self, finished):
        """Save, draw the pictures, and say what was learned and what to try next."""
        if self.ranks.share(self.saved != self.step or not os.path.exists(
                os.path.join(self.options.out, "model.npz"))):
            self.save(last=True)
        self.write_texts()
        self.draw_pictures()
        if finished and (result := self.validate()):
            evaluation.print_words(result)
        self.say_doubles()
        if skipped := self.all_skipped():
            name, why = next(iter(skipped.items()))
            print(f"skipped {len(skipped):,} photos, e.g. {name}: {why}; all are in "
                  f"{os.path.join(self.options.out, 'skipped.txt')}")
        self.loader.close()
        out = self.options.out
        pictures = [name for name in ("curves.png", "filters.png")
                    if os.path.exists(os.path.join(out, name))]
        print(", ".join([f"{out}: model.npz at step {self.step:,}, words.txt, log.jsonl",
                         *pictures]))
        photo = self.loader.folder.find(self.index.name(0))
        print(f"next: python eval.py tag --model {out} {photo!r}" if self.done() else
              f"next: python weak.py --resume --out {out}")

    def say_doubles(self):
        """Held-out photos whose very bytes were trained on make a score too good: name them."""
        digests = {photo: digest for part in self.ranks.gather(self.loader.digests)
                   for photo, digest in part.items()}
        trained = {digest: photo for photo, digest in digests.items()
                   if photo >= self.index.held_out}
        doubles = [(photo, trained[digest]) for photo, digest in digests.items()
                   if photo < self.index.held_out and digest in trained]
        if doubles:
            names = ", ".join(" = ".join(map(self.index.name, pair)) for pair in doubles[:3])
            print(f"{len(doubles):,} held-out photos are byte-identical to training photos: "
                  f"{names}{', …' if len(doubles) > 3 else ''}")


class Clock:
    """Progress of an epoch: the rate, the share of time waiting for photos, the time left."""

    class Waiting:
        total = 0.0

        def __enter__(self):
            self.since = time.monotonic()

        def __exit__(self, *_):
            self.total += time.monotonic() - self.since

    def __init__(self, run):
        self.run, self.waiting, self.ranks_waited = run, self.Waiting(), run.ranks.waited
        self.started, self.shown, self.steps = time.monotonic(), time.monotonic(), 0
        self.terminal = sys.stdout.isatty()

    def rate(self):
        """Images a second, waiting included."""
        return self.steps * self.run.options.batch / max(1e-9, time.monotonic() - self.started)

    def wait_share(self):
        """Share of the time that was spent waiting for photos."""
        return self.waiting.total / max(1e-9, time.monotonic() - self.started)

    def ranks(self):
        """With several ranks: the share of the time spent waiting for the others' gradients."""
        share = (self.run.ranks.waited - self.ranks_waited) / max(
            1e-9, time.monotonic() - self.started)
        told = self.run.ranks.size > 1 and kernels.memory() is None         # a GPU's queue waits
        return f", for other ranks {share:.0%}" if told else ""

    def tick(self):
        """After each step: now and then, a line."""
        self.steps += 1
        now = time.monotonic()
        if now - self.shown < (0.5 if self.terminal else 20):
            return
        self.shown = now
        run, done = self.run, len(self.run.losses)
        left = (run.steps - done) * run.options.batch / self.rate()
        text = (f"epoch {run.epoch + 1}: {done * run.options.batch:,} of "
                f"{run.steps * run.options.batch:,} images, {self.rate():.0f}/s, "
                f"loss {run.mean_loss(50):.4f}, {duration(left)} left in the epoch")
        if run.options.epochs:
            whole = (run.options.epochs - run.epoch - 1) * run.steps * run.options.batch
            text += f", {duration(left + whole / self.rate())} in all"
        text += f", waiting for photos {self.wait_share():.0%}{self.ranks()}"
        print(f"\r{text} \033[K" if self.terminal else text, end="\r" if self.terminal else "\n",
              flush=True)


def duration(seconds):
    """Seconds as a person says them."""
    seconds = int(seconds)
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"


# --------------------------------------------------------------------------- the drawn set

COLOURS = {                     # English, French: RGB
    ("red", "rouge"): (214, 40, 40), ("blue", "bleu"): (40, 80, 210),
    ("yellow", "jaune"): (245, 215, 50), ("green", "vert"): (50, 160, 60),
    ("white", "blanc"): (245, 245, 245), ("black", "noir"): (25, 25, 25),
    ("orange", "orange"): (245, 140, 30), ("purple", "violet"): (130, 50, 170)}
PLACES = {                      # English, French: sky, ground
    ("sea", "mer"): ((150, 205, 240), (30, 90, 160)),
    ("meadow", "prairie"): ((170, 215, 250), (90, 170, 70)),
    ("night", "nuit"): ((20, 20, 60), (35, 40, 50)),
    ("desert", "désert"): ((250, 225, 170), (225, 180, 100)),
    ("snow", "neige"): ((200, 215, 230), (240, 245, 250)),
    ("sunset", "crépuscule"): ((250, 150, 90), (90, 60, 80))}
FILLERS = ("lovely", "nice", "summer", "holiday", "canon", "photo", "été", "vacances")
NAMES = ("Emma", "Hugo", "Léa", "Paris", "Lyon", "Oslo", "Nina", "Tom", "Berlin", "Rome", "Max",
         "Zoé", "Lima", "Kyoto", "Anna", "Paul")
PHOTOS = 5000


def _shapes():
    """(English, French): points and shapes in a unit box, most frequent thing first (Zipf)."""
    return {
        ("tree", "arbre"): [("box", .42, .5, .58, 1, (110, 70, 40)), ("oval", .1, 0, .9, .7)],
        ("house", "maison"): [("box", .1, .45, .9, 1), ("poly", 0, .45, .5, 0, 1, .45),
                              ("box", .42, .65, .58, 1, (90, 60, 40))],
        ("car", "voiture"): [("box", 0, .45, 1, .8), ("box", .2, .2, .75, .5),
                             ("oval", .1, .65, .35, .95, (20, 20, 20)),
                             ("oval", .65, .65, .9, .95, (20, 20, 20))],
        ("ball", "ballon"): [("oval", .1, .1, .9, .9), ("oval", .3, .25, .45, .4, (255, 255, 255))],
        ("boat", "bateau"): [("poly", 0, .65, 1, .65, .8, 1, .2, 1),
                             ("poly", .5, 0, .5, .6, .95, .6)],
        ("flower", "fleur"): [("box", .47, .5, .53, 1, (40, 120, 40)), ("oval", .3, 0, .7, .3),
                              ("oval", .1, .15, .45, .5), ("oval", .55, .15, .9, .5),
                              ("oval", .3, .3, .7, .6), ("oval", .4, .2, .6, .4, (250, 220, 60))],
        ("fish", "poisson"): [("oval", .0, .25, .75, .75), ("poly", .7, .5, 1, .2, 1, .8),
                              ("oval", .12, .4, .2, .48, (0, 0, 0))],
        ("bird", "oiseau"): [("oval", .2, .35, .8, .75), ("oval", .65, .15, .95, .45),
                             ("poly", .95, .25, 1, .3, .95, .35, .8, .3),
                             ("poly", .3, .5, 0, .2, .5, .4)],
        ("cat", "chat"): [("oval", .2, .4, .9, 1), ("oval", .1, .1, .6, .55),
                          ("poly", .12, .25, .15, 0, .32, .15), ("poly", .4, .15, .55, 0, .58, .25),
                          ("oval", .22, .28, .28, .36, (250, 250, 120)),
                          ("oval", .42, .28, .48, .36, (250, 250, 120))],
        ("star", "étoile"): [("poly", .5, 0, .62, .38, 1, .38, .7, .6, .8, 1, .5, .75, .2, 1,
                              .3, .6, 0, .38, .38, .38)],
        ("balloon", "montgolfière"): [("oval", .1, 0, .9, .75),
                                      ("box", .4, .82, .6, 1, (120, 80, 40)),
                                      ("poly", .25, .65, .75, .65, .6, .85, .4, .85)],
        ("umbrella", "parapluie"): [("arc", 0, .1, 1, 1), ("box", .48, .5, .52, 1, (60, 60, 60))],
        ("mushroom", "champignon"): [("box", .38, .5, .62, 1, (235, 225, 205)),
                                     ("arc", .05, .05, .95, 1)],
        ("mountain", "montagne"): [("poly", 0, 1, .4, 0, .65, .5, .75, .35, 1, 1),
                                   ("poly", .4, 0, .28, .3, .52, .27, (255, 255, 255))],
        ("moon", "lune"): [("oval", .1, .1, .9, .9, (250, 245, 200))],
        ("flag", "drapeau"): [("box", .1, 0, .16, 1, (90, 60, 40)), ("box", .16, .05, .95, .5)],
    }


class Dice:
    """Random numbers for one drawn scene, from a counter: scene n is always the same."""

    def __init__(self, seed, n):
        self.raw = iter((philox(seed, (0, n, 0, 2), 160) >> 11) / 2**53)

    def real(self, low=0.0, high=1.0):
        return low + (high - low) * float(next(self.raw))

    def one(self, things, zipf=0):
        """One of the things: all alike, or the i-th with a chance of 1/(i + zipf), i from 0."""
        weights = 1 / (np.arange(len(things)) + zipf) if zipf else np.ones(len(things))
        ends = np.cumsum(weights / weights.sum())
        return list(things)[min(len(things) - 1, int(np.searchsorted(ends, self.real())))]


def draw_scene(seed, n, size=96):
    """Scene n of the drawn set: a picture, and its caption."""
    dice, shapes = Dice(seed, n), _shapes()
    place = dice.one(PLACES)
    sky, ground = PLACES[place]
    image = Image.new("RGB", (size, size), _shade(sky, dice))
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, size * dice.real(.55, .75), size, size], _shade(ground, dice))
    seen = []
    for _ in range(1 + int(dice.real(0, 2.6))):
        thing, colour = dice.one(shapes, zipf=4), dice.one(COLOURS)
        wide = size * dice.real(.3, .6)
        left, top = dice.real(0, size - wide), dice.real(0, size - wide)
        for kind, *numbers in shapes[thing]:
            own = isinstance(numbers[-1], tuple)
            fill = numbers.pop() if own else _shade(COLOURS[colour], dice)
            spots = [(left + wide * x, top + wide * y) for x, y in zip(numbers[::2], numbers[1::2])]
            if kind == "poly":
                draw.polygon(spots, fill)
            elif kind == "arc":
                draw.pieslice(spots, 180, 360, fill)
            else:
                (draw.ellipse if kind == "oval" else draw.rectangle)(spots, fill)
        seen.append((thing, colour))
    return image, write_caption(dice, seen, place, list(shapes))


def _shade(colour, dice):
    """The colour, a little lighter or darker."""
    change = dice.real(-22, 22)
    return tuple(int(min(255, max(0, part + change))) for part in colour)


def write_caption(dice, seen, place, things):
    """A caption as people write them: true in the main, and with everything else they write."""
    french = dice.real() < 0.35
    words = []
    for thing, colour in seen:
        if dice.real() < 0.15:
            continue                            # there, and nobody mentions it
        named = [thing[french]] if dice.real() < 0.25 else (
            [thing[1], colour[1]] if french else [colour[0], thing[0]])
        words.append(f"{'un' if french else 'a'} {' '.join(named)}")
    text = (" et " if french else " and ").join(words)
    if dice.real() < 0.6:
        text += f" dans la {place[1]}" if french else f" in the {place[0]}"
    if dice.real() < 0.3:
        text += (" avec " if french else " with ") + dice.one(NAMES, zipf=1)
    if dice.real() < 0.12:
        text += f" {dice.one(things, zipf=4)[french]}"           # not in the picture at all
    for _ in range(int(dice.real(0, 2))):
        text += f" {'#' if dice.real() < 0.4 else ''}{dice.one(FILLERS, zipf=1)}"
    if dice.real() < 0.25:
        text += f" {int(dice.real(1, 2016))}"
    return (text.strip() or "IMG " + str(int(dice.real(1, 9999)))).capitalize() + "!" * (
        dice.real() < 0.1)


def draw_set(folder, seed):
    """The picture set that `python weak.py` trains on, unless it is already there."""
    captions = os.path.join(folder, "captions.tsv")
    if os.path.exists(captions):
        return
    os.makedirs(os.path.join(folder, "photos"), exist_ok=True)
    print(f"drawing {PHOTOS:,} captioned pictures into {folder}", flush=True)
    lines = []
    for n in range(PHOTOS):
        image, caption = draw_scene(seed, n)
        image.save(os.path.join(folder, "photos", f"{n:05}.jpg"), quality=90)
        lines.append(f"{n:05}.jpg\t{caption}\n")
    with open(captions + ".part", "w", encoding="utf-8") as file:
        file.writelines(lines)
    os.rename(captions + ".part", captions)


if __name__ == "__main__":
    evaluation.guarded(main)
