"""Learn visual features from captions: train a convolutional network to predict their words.

    python weak.py                                       draws a captioned picture set, trains on it
    python weak.py --images DIR --captions FILE          your own photos
    python weak.py --images DIR                          … with photo.txt files, or in named folders
    python weak.py --resume --out runs/NAME              go on where a run stopped

Joulin, van der Maaten, Jabri, Vasilache: Learning Visual Features from Large Weakly Supervised
Data (2016). `main` is the table of contents, `Run.train` the method. A run's folder holds
model.npz (all of the run), best.npz (the weights of the lowest held-out loss), words.txt,
log.jsonl, skipped.txt, curves.png and filters.png.
"""
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import ExitStack

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # while the rest is imported

import numpy as np
from PIL import Image, ImageDraw

import data
import eval as evaluation
import kernels
import model
from kernels import console
from kernels import ranks as several
from kernels.console import number
from kernels.philox import SCENES, philox

EPOCH = 1_000_000               # training images between two validations
LEAST_EPOCH = 10_000            # … for collections smaller than that
EPOCHS_PER_RATE = 10            # epochs that each learning rate is kept at least
LEAST_RATE = 1e-6               # training stops below
MOMENTUM, DECAY = 0.9, 5e-4     # not stated in the paper; Krizhevsky's (2012, §5)
SAVE_SECONDS = 600
PATIENCE = 2                    # learning rates' epochs without a lower held-out loss
RETRY_SECONDS = 10              # between two tries to make the last save on a full disk
RETRIES = 360                   # of them: an hour
EMPTY_STEPS = 100               # steps in a row without a photo that can be read: give up
NEGATIVES = 1000                # of --targets sampled
VALIDATED = 10_000              # held-out photos scored after an epoch, at most
DRAWN = {"words": 80, "stop_words": 10, "epochs": 3, "epoch_size": 9_000,
         "positives": "balanced"}       # without arguments
HARMLESS = {"resume", "out", "images", "epochs", "min_lr", "patience", "workers", "threads",
            "device", "precision"}      # options that a resumed run may change


def main():
    ranks = several.join()
    if ranks.rank:                              # the first rank speaks for all
        sys.stdout = open(os.devnull, "w")
    options, checkpoint = parse()
    warnings.filterwarnings("ignore", "(overflow|invalid value)", RuntimeWarning)   # the loss says
    share_machine(options, ranks)
    print(kernels.use(options.device, options.precision, ranks.local_rank), flush=True)
    lock = None if ranks.rank else lock_folder(options.out)         # until the end
    if options.drawn and not ranks.rank:
        draw_set(options.images, options.captions, options.seed)
    index = read_captions(options, ranks)
    run = Run(options, index, checkpoint, ranks)
    try:
        with Interrupt() as interrupt:
            finished = run.train(interrupt)
        run.finish(finished)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {run.say_kept()}") from None
    return 0 if finished else 130


def share_machine(options, ranks):
    """Threads and workers for this rank: its part of what the machine's ranks have together."""
    count = ranks.local_size
    kernels.threads.start(options.threads or max(1, kernels.threads.count // count))
    if options.workers is None:
        options.workers = min(8, max(1, (os.cpu_count() or 1) // count))
    if ranks.size > 1:
        print(f"ranks: {ranks.size}, {count} on this machine; they share --batch {options.batch}")
    if options.batch < ranks.size:
        raise ValueError(f"--batch {options.batch} is less than the {ranks.size} ranks: raise it")


# ---------------------------------------------------------------------------------- options

def make_parser():
    """All options; the defaults of --batch, --dropout and --lr depend on the network."""
    parser = console.Parser(description=console.summary(__doc__))
    add = parser.add_argument_group("data").add_argument
    add("--images", type=os.path.abspath, metavar="DIR", help="photos' folder; else a set is drawn")
    add("--captions", type=os.path.abspath, metavar="FILE", help="also .gz or .bz2; if not given "
        "photo.txt beside photo.jpg, or else the sub-folders' names")
    add("--format", choices=data.FORMATS, help="of the captions; recognised if not given")
    add("--words", type=number(int, 1), default=data.WORDS, help="K, the size of the dictionary")
    add("--stop-words", type=number(int, 0), help="most frequent words, left out; if not given "
        f"{data.STOP_WORDS} from {data.MANY:,} captions on, else {data.FEW_STOP_WORDS} or 5%%")
    add("--valid", type=number(float, 0, below=1), default=0.1, help="part of photos held out")
    add("--crop", choices=("center", "random"), default="random", help="random: mirrored, too")
    add("--sampling", choices=("class", "image"), default="class", help="draw a word, then its "
        "photo; or a photo with all its words")
    add("--positives", choices=data.POSITIVES, default="drawn", help="of a photo drawn by class: "
        "the drawn word, or all its words, each of the same weight or balanced as the drawn ones")
    add = parser.add_argument_group("model").add_argument
    add("--network", choices=model.NETWORKS, default="small", help="small: 64x64 pixels, for CPUs")
    add("--loss", choices=model.LOSSES, default="softmax", help="the paper's equation 2, or 1")
    add("--targets", choices=("all", "batch", "sampled"), default="all",
        help="words that a step scores: all, those of its batch, or those and --negatives others")
    add("--negatives", type=number(int, 1), help=f"of --targets sampled; if not given {NEGATIVES}")
    add("--dropout", type=number(float, 0, below=1), help="rate; if not given the network's")
    add("--from", type=os.path.abspath, metavar="RUN", help="begin with its weights (fine-tuning)")
    add = parser.add_argument_group("training").add_argument
    add("--batch", type=number(int, 1), help="photos a step; if not given the network's")
    add("--lr", type=number(float, above=0), help="first learning rate; if not given the "
        "network's, times 0.8 / √n where n words of a photo, on average, are targets")
    add("--momentum", type=number(float, 0, below=1), default=MOMENTUM, help="of SGD")
    add("--weight-decay", type=number(float, 0), default=DECAY, help="of SGD, not for biases")
    add("--epoch-size", type=number(int, 1), help="photos an epoch; if not given as many as there "
        f"are, but {LEAST_EPOCH:,} to {EPOCH:,}")
    add("--epochs", type=number(int, 1), help="stop after so many, if not by --min-lr before")
    add("--epochs-per-lr", type=number(int, 1), default=EPOCHS_PER_RATE,
        help="epochs before the rate may be halved, which happens when the held-out loss rises")
    add("--min-lr", type=number(float, above=0), default=LEAST_RATE, help="stop below this rate")
    add("--patience", type=number(int, 1), metavar="N", help="stop when the held-out loss was not "
        f"lower for N epochs; if neither this nor --epochs is given {PATIENCE} x --epochs-per-lr")
    add("--seed", type=number(int, 0, below=2**63), default=0, help="of all random numbers")
    add = parser.add_argument_group("running").add_argument
    add("--out", metavar="DIR", help="folder of the run; if not given runs/ and the images' name")
    add("--resume", action="store_true", help="go on with the run in --out, with its options")
    add("--device", choices=kernels.DEVICES, default="auto", help="where to compute")
    add("--precision", choices=kernels.PRECISIONS, help="on a GPU; if not given tf32 if it has it")
    add("--workers", type=number(int, 0, console.MOST_THREADS), help="threads that decode photos, "
        "processes that read captions; if not given one a core; 0: none, for whole tracebacks")
    add("--threads", type=number(int, 1, console.MOST_THREADS), help="that compute, on the CPU")
    return parser


def parse(arguments=None):
    """The options, and the checkpoint to go on with or None; ValueError for what cannot be."""
    parser, checkpoint = make_parser(), None
    options = parser.parse_args(arguments)
    drawn = not options.images and not options.resume
    if drawn and options.captions:
        raise ValueError("--captions goes with --images, the folder that its photos are in")
    out = options.out or os.path.join("runs", os.path.basename(options.images or "drawn"))
    path = os.path.join(out, "model.npz")
    recipe = model.NETWORKS[options.network]    # --lr depends on the captions, too
    defaults = {"drawn": drawn, "batch": recipe.batch, "dropout": recipe.dropout,
                "negatives": NEGATIVES if options.targets == "sampled" else None}
    defaults |= DRAWN if drawn else {}
    if options.resume:
        checkpoint = model.load(path)
        if not checkpoint[1]:
            raise ValueError(f"{path} has weights only, as best.npz; begin a new run by --from")
        defaults = checkpoint[2]["options"]
    elif os.path.exists(path):
        raise ValueError(f"{path} holds a trained model; use --resume, or choose another --out")
    parser.set_defaults(**defaults)
    options, stored = parser.parse_args(arguments), vars(parser.parse_args([]))
    changed = [f"--{key.replace('_', '-')} ({stored[key]}, now {value})"
               for key, value in vars(options).items()
               if key not in HARMLESS and stored[key] != value]
    if options.resume and changed:
        raise ValueError(f"the run in {out} began with other options: {', '.join(changed)}; "
                         "leave them out, or choose another --out")
    options.out, options.captions = out, options.captions or options.images
    if options.drawn:
        vars(options).update(data.drawn_sources(out))
    return check_options(options), checkpoint


def check_options(options):
    """The options; ValueError for what no run can be made of."""
    if not options.drawn and not os.path.isdir(options.images):
        raise ValueError(f"images: there is no folder {options.images}")
    if not (options.drawn or os.path.isfile(options.captions) or os.path.isdir(options.captions)):
        raise ValueError(f"captions: {options.captions} is no file; save a pipe to one first")
    if options.positives != "drawn" and options.sampling == "image":
        raise ValueError("--positives goes with --sampling class: by image all words are targets")
    if options.positives == "balanced" and options.loss != "softmax":
        raise ValueError("--positives balanced goes with --loss softmax")
    if options.negatives and options.targets != "sampled":
        raise ValueError("--negatives goes with --targets sampled")
    if options.targets == "batch" and options.batch == 1:
        raise ValueError("--targets batch compares a batch's photos; use --batch 2 or more")
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
        raise ValueError(f"another run is using {out}; choose another --out") from None
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}; choose another") from None


# ------------------------------------------------------------------------------------- data

def read_captions(options, ranks=several.Alone()):
    """The index; sets --format, --stop-words, --lr if not given. ValueError without any photo."""
    text = data.Text(options.words, options.stop_words, options.valid)
    folder = os.path.join(options.out, "index")
    if not ranks.rank:
        data.build_index(options.captions, folder, text, options.format,
                         processes=options.workers * ranks.local_size)
    ranks.broadcast(None)                       # the others wait here
    try:
        index = data.Index(folder)
    except OSError:
        raise RuntimeError(f"the first rank's {folder} is not to be seen here; put --out and the "
                           "photos on a disk that all machines share") from None
    options.format = index.facts["fingerprint"]["format"]
    options.stop_words = index.facts["stop_words"]
    describe_index(index, options)
    rate = model.NETWORKS[options.network].lr
    if options.sampling == "image" or options.positives == "all":
        targets = index.share(options.sampling, options.positives).sum()        # of a row
        rate = float(f"{0.8 * rate / math.sqrt(targets):.2g}")      # as 1 / √targets diverged
    options.lr = options.lr or rate
    print(f"first learning rate: {options.lr:g}")
    if options.lr < options.min_lr:
        raise ValueError(f"--lr {options.lr:g} is below --min-lr {options.min_lr:g}: lower that")
    if not ranks.rank:
        data.check_photos(options.images, index)
    return index


def describe_index(index, options):
    """Lines that say what the captions hold, and what of it is left out."""
    facts = index.facts
    print(f"captions: {facts['captions']:,} as {options.format}, {len(index):,} photos "
          f"({index.held_out:,} held out), {len(index.dictionary):,} words, "
          f"{index.labels / max(1, len(index)):.2f} a photo", flush=True)
    words = [f"{word} ({times:,} times)" for word, times in facts["left_out"]]
    stop, rarer = ", ".join(words[:min(facts["stop_words"], 5)]), ", ".join(words[-3:])
    for fact, what in (
            ("bad_lines", "lines are no captions"),
            ("refused", "names are absolute or leave --images: refused"),
            ("without_words", "photos have no word of the dictionary"),
            ("emoji", "have emoji or other pictures among the words, which do not count"),
            ("stop_words", f"stop words are left out, e.g. {stop}"),
            ("rest", f"rarer words are left out, e.g. {rarer}")):
        if facts[fact]:
            print(f"captions: {facts[fact]:,} {what}")


# --------------------------------------------------------------------------------- training

class Interrupt(ExitStack):
    """Ctrl-C, kill, a lost terminal or reader set `asked`: the step ends first; twice ends all."""

    asked = False

    def __enter__(self):
        for one in *console.stop_signals(), signal.SIGPIPE:
            self.callback(signal.signal, one, signal.signal(one, self.ask))     # as it was before
        return self

    def ask(self, one, _):
        if self.asked and one in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = True                   # printing may bring the next one
            print("\nstopping after this step, and saving; once more to stop at once", flush=True)


class Run:
    """A training run: network, optimiser, rate, and where it is."""

    def __init__(self, options, index, checkpoint, ranks=several.Alone()):
        self.options, self.index, self.ranks = options, index, ranks
        self.part = ranks.part(options.batch)                       # this rank's rows of a batch
        recipe = model.NETWORKS[options.network]
        self.size, self.crop = recipe.size, recipe.crop
        self.net = recipe.build(len(index.dictionary), options.dropout).init(options.seed)
        if checkpoint:
            self.net.load(checkpoint[0])
        elif source := getattr(options, "from"):
            self.begin_from(source)
        self.optimiser = model.SGD(self.net, options.momentum, options.weight_decay,
                                   sparse=options.targets != "all")
        self.plateau = model.Plateau(options.lr, options.epochs_per_lr)
        self.step = self.epoch = 0
        self.log, self.saved = [], None         # a row an epoch; the step of the checkpoint
        self.path, self.best_path = (f"{options.out}/{name}.npz" for name in ("model", "best"))
        self.saved_at, self.written = time.monotonic(), {}          # the step of each file written
        self.empty = 0                          # steps without a photo since the last good one
        self.begin_epoch()
        self.loader = data.Loader(options.images, index.name, len(index), self.size,
                                  options.workers, ranks.local_size, kernels.host_empty)
        if checkpoint:
            self.restore(*checkpoint[1:])
        self.share = index.share(options.sampling, options.positives)           # (K,)
        epoch_size = options.epoch_size or min(EPOCH, max(LEAST_EPOCH, index.training))
        self.steps = -(-epoch_size // options.batch)                # per epoch
        most = min(VALIDATED, max(100, evaluation.BLOCK // len(index.dictionary)), index.held_out)
        self.held_out = np.linspace(0, index.held_out - 1, most).astype(int).tolist()
        self.check_space()
        self.write_files()

    def restore(self, velocities, facts, words):
        """Go on exactly where the checkpoint was written."""
        if words != self.index.dictionary:
            raise ValueError("the captions, and so the dictionary, changed; choose another --out")
        for path, v in velocities.items():
            self.optimiser.v[path][...] = kernels.to_device(v)
        self.step, self.epoch, self.log = (facts[key] for key in ("step", "epoch", "log"))
        self.done, self.good, losses = facts["losses"]
        self.losses = kernels.to_device(np.array(losses)[self.part])
        self.loader.skipped.update(facts.get("skipped", {}))
        vars(self.plateau).update(facts["plateau"])
        self.saved = self.step
        print(f"this run is finished; to train on, change {by}" if (by := self.is_over())
              else f"going on at step {self.step:,}, epoch {self.epoch + 1}", flush=True)

    def begin_from(self, source):
        """Another run's weights; of the output layers the rows of words that both runs know."""
        weights, facts, words, line = model.load_best(source)
        if facts["options"]["network"] != self.options.network:
            raise ValueError(f"--from: that run is of --network {facts['options']['network']}")
        _, mine, theirs = np.intersect1d(self.index.dictionary, words, return_indices=True)
        for path, layer, name in self.net.parameters():
            to, of = (mine, theirs) if isinstance(layer, model.Output) else (..., ...)
            getattr(layer, name)[to] = kernels.to_device(weights[path][of])
        print(f"beginning with {line}, and {len(mine):,} of its {len(words):,} words", flush=True)

    def check_space(self):
        """Say what a checkpoint and a GPU must hold, and refuse to start where they cannot."""
        weights = sum(array.nbytes for array in self.optimiser.v.values())
        self.bytes = 3 * weights                # of model.npz and best.npz
        disk, gpu = shutil.disk_usage(self.options.out).free, kernels.memory()
        print(f"{self.options.network}: {weights // 4:,} parameters; checkpoint and best "
              f"model take {self.bytes / 1e6:,.0f} MB of {disk / 1e9:,.1f} GB free", flush=True)
        if disk < 5 * weights:                  # and the next checkpoint beside the last
            raise ValueError(f"{self.options.out} has {disk / 1e6:,.0f} MB free, and saving needs "
                             f"{5 * weights / 1e6:,.0f}; free some, or choose another --out")
        batch, each = self.options.batch, self.net.bytes_per_image(self.size, self.crop)
        need = each * (self.part.stop - self.part.start)
        place = "this machine" if gpu is None else "the GPU"
        free = data.MEMORY / self.ranks.local_size - 3 * weights if gpu is None else gpu
        print(f"memory: a step of --batch {batch} takes {need / 1e9:,.2f} of {free / 1e9:,.1f} GB "
              f"that {place} has left for it, {each / 1e6:,.1f} MB an image", flush=True)
        if need > free:
            most = int(free / each) * self.ranks.size
            raise ValueError(f"--batch {batch} does not fit into {place}'s memory; use "
                             + (f"--batch {most} or less" if most > 0 else
                                "--device cpu, or a smaller --network or --words"))

    # ------------------------------------------------------------------------------ the loop

    def train(self, interrupt):
        """Train until that is over; False if interrupted before."""
        options = self.options
        draws = (data.Draws(self.index, options.seed, step, options.batch, options.sampling,
                            self.part, options.positives) for step in itertools.count(self.step))
        batches = self.loader.batches(draws)
        while not self.is_over():
            self.loader.waited = self.ranks.waited = 0.0
            progress = console.Progress(f"epoch {self.epoch + 1}", self.steps * options.batch,
                                        "images", sys.stdout, self.done * options.batch)
            while self.done < self.steps:
                draw, photos = next(batches)
                good, stop, due = self.ranks.allreduce(     # what all ranks must do alike
                    [draw.weights.any(), interrupt.asked,
                     time.monotonic() - self.saved_at > SAVE_SECONDS])
                self.step, self.done = self.step + 1, self.done + 1
                self.empty = 0 if good else self.empty + 1
                if good:
                    self.train_step(draw, photos)
                elif self.empty >= min(EMPTY_STEPS, self.steps):
                    name, why = next(iter(self.loader.skipped.items()), ("none here", ""))
                    raise RuntimeError(f"no photo of the last {self.empty} steps could be read, "
                                       f"e.g. {name}: {why}; {self.say_kept()}")
                progress.done += options.batch
                if progress.is_due():
                    progress.show(self.describe(progress))
                if stop:
                    return False
                if due:
                    self.save()
            self.end_epoch(progress)
        return True

    def begin_epoch(self):
        """Nothing of an epoch is done yet."""
        self.done = self.good = 0               # steps, and those of them with photos
        self.losses = kernels.to_device(np.zeros(self.part.stop - self.part.start))     # row sums
        self.shown = 0.0, 0                     # the loss and the good steps when last shown

    def since_best(self):
        """Epochs since that of the lowest held-out loss; -1 before there is one."""
        losses = [row["validation_loss"] or math.inf for row in self.log]
        best = min(losses, default=math.inf)
        return len(losses) - 1 - losses.index(best) if best < math.inf else -1

    def is_over(self):
        """The option by which training is over; None while it is not."""
        options = self.options
        patience = options.patience or (
            math.inf if options.epochs else PATIENCE * options.epochs_per_lr)
        reached = {"--min-lr": self.plateau.rate < options.min_lr,
                   "--epochs": self.epoch >= (options.epochs or math.inf),
                   "--patience": self.since_best() >= patience}
        return next((option for option, over in reached.items() if over), None)

    def train_step(self, draw, photos):
        """Forward, loss, backward, update: a step of SGD, by the sum of all ranks' gradients."""
        options = self.options
        labels = draw.labels(self.share, options.targets, options.negatives)
        if options.targets == "batch" and options.loss == "softmax":
            labels = labels._replace(chance=None)       # as in the paper, whose estimate is biased
        now = model.Pass(options.seed, self.step, self.part.start, labels.classes)
        where = draw.crops(self.size - self.crop, options.crop == "random")
        x = kernels.prepare(photos, *where, self.crop)              # (N, crop, crop, 3)
        s = self.net.forward(x, now)                                # (N, K), or (N, C)
        losses, ds = model.training_loss(self.net, s, labels, model.LOSSES[options.loss])
        self.net.backward(ds, done=self.ranks.begin_allreduce)
        self.ranks.wait()
        self.optimiser.step(self.plateau.rate)
        self.losses += losses                   # on a GPU, nobody waits for them
        self.good += 1

    def sum_losses(self):
        """The loss of this rank's rows, summed over the epoch's steps; a GPU is waited for."""
        return self.check_loss(float(kernels.to_host(self.losses).sum()))

    def check_loss(self, loss, what="the loss is", most=math.inf):
        """The loss; RuntimeError if that is not a number, or not below `most`."""
        if not loss < most:
            raise RuntimeError(f"{what} {loss:.4g} at step {self.step:,}: {self.say_kept()}; lower "
                               f"--lr ({self.plateau.rate:g})")
        return loss

    def say_kept(self):
        """What of this run is on the disk."""
        return "nothing was saved yet" if self.saved is None else (
            f"{self.path} is of step {self.saved:,}")

    def describe(self, progress):
        """The mean loss since the last time, what is waited for, and the time to the run's end."""
        (loss, steps), self.shown = self.shown, (self.sum_losses(), self.good)
        text = self.say_waiting(progress)
        if self.good > steps:
            share = len(self.losses) / self.options.batch           # of all ranks' rows
            mean = (self.shown[0] - loss) / (self.good - steps) / share
            text = f"loss {mean:.4f}, {text}"
        if self.options.epochs:
            rest = (self.options.epochs - self.epoch - 1) * progress.total / progress.rate()
            text += f", {console.duration(progress.left() + rest)} for all epochs"
        return text

    def say_waiting(self, progress):
        """The parts of an epoch's time that were spent waiting; on a GPU, its queue waits."""
        ranks = self.ranks.size > 1 and kernels.memory() is None
        return f"waited for photos {self.loader.waited / progress.seconds():.0%}" + (
            f", for other ranks {self.ranks.waited / progress.seconds():.0%}" * ranks)

    def end_epoch(self, progress):
        """Validate, apply the learning-rate rule, save, and log the epoch."""
        self.epoch += 1
        loss = float(self.ranks.allreduce(self.sum_losses())) / max(1, self.good)
        rate, skipped = progress.rate(), self.gather_skipped()
        waited, said = self.loader.waited / progress.seconds(), self.say_waiting(progress)
        among = "" if self.options.targets == "all" else f" ({self.options.targets} words)"
        line = f"epoch {self.epoch}: loss{among} {loss:.4f}, "
        result = self.validate() or {}
        if result:
            # ten times the loss of guessing, which one-versus-all has for each word of a photo
            words = 1 if self.options.loss == "softmax" else self.index.labels / len(self.index)
            self.check_loss(result["loss"], "training diverges, the held-out loss is",
                            10 * words * math.log(1 + len(self.index.dictionary)))
            line += (f"held-out loss {result['loss']:.4f}, precision@10 "
                     f"{result['precision@10']:.4f}, AUC {result['auc']:.4f}, ")
        self.log.append({
            "epoch": self.epoch, "step": self.step, "loss": loss,
            "learning_rate": self.plateau.rate, "images_per_second": rate, "loader_wait": waited,
            "validation_loss": result.get("loss"), "skipped": len(skipped),
            **{key: result.get(key) for key in ("precision@10", "auc", "map")}})
        line += f"rate {self.plateau.rate:g}, {rate:.0f} images/s, {said}"
        line += f", {len(skipped):,} photos cannot be read" * bool(skipped)
        self.plateau.update(result.get("loss", loss))
        self.begin_epoch()
        sums = self.ranks.gather([self.ranks.size > 1 and model.checksum(self.net.state())])
        if len(set(sums)) > 1:                  # to the bit
            raise RuntimeError(f"the ranks' weights differ after step {self.step:,}: are their "
                               "machines and libraries alike?")
        self.save()
        self.write_files()
        print(line + (f"\ntraining is over by {by}" if (by := self.is_over()) else ""), flush=True)

    def validate(self):
        """Metrics on the held-out photos, of which each rank takes a part; None without any."""
        mine = self.held_out[self.ranks.part(len(self.held_out))]
        features, found = evaluation.extract_features(self.net, self.loader, mine, self.crop)
        result, rows = None, self.ranks.gather(zip(kernels.to_host(features), found))
        if rows:
            features = kernels.to_device(np.stack([e for e, _ in rows]))        # (N, E)
            targets = [self.index.words(photo) for _, photo in rows]
            result = evaluation.word_metrics(features, self.net.output, targets, self.index.counts,
                                             self.index.share("image"), self.options.loss)
        return self.ranks.broadcast(result)

    def save(self, then=""):
        """Write the checkpoint; False if the disk does not take it, said with what happens then."""
        self.sum_losses()                       # which are numbers
        facts = {"options": vars(self.options), "step": self.step, "epoch": self.epoch,
                 "losses": (self.done, self.good, self.ranks.gather(kernels.to_host(self.losses))),
                 "log": self.log, "plateau": vars(self.plateau),
                 "counts": self.index.counts.tolist(), "training": self.index.training,
                 "skipped": self.gather_skipped()}
        if not all(np.isfinite(w).all() for w in self.net.state().values()):
            self.check_loss(math.nan, "a weight is")                # the last update diverged
        best = (self.since_best() == 0 and self.log[-1]["step"] == self.step
                and self.written.get(self.best_path) != self.step)
        files = [(self.best_path, {}, "")] * best + [(self.path, self.optimiser.v, then)]
        for path, velocities, next_try in files if not self.ranks.rank else ():
            self.written.pop(path, None)        # what was here before may be gone
            try:
                model.save(path, self.net, velocities, facts, self.index.dictionary)
                self.written[path] = self.step
            except OSError as error:
                print(f"step {self.step:,}: {path} is not saved: {error.strerror or error}; saving "
                      f"needs {self.bytes / 1e6:,.0f} MB, free some space{next_try}",
                      file=sys.stderr, flush=True)
        if done := self.ranks.broadcast(self.written.get(self.path) == self.step):
            self.saved = self.step
        self.saved_at = time.monotonic()
        return done

    def gather_skipped(self):
        """{name: what is wrong} of the photos that any rank skipped; complete on the first rank."""
        return dict(self.ranks.gather(self.loader.skipped.items()))

    def write_files(self):
        """Texts and pictures for people to look at; losing one of them never ends a run."""
        out, skipped = self.options.out, self.gather_skipped()
        skipped |= dict.fromkeys(self.index.facts["refused_names"], "refused: outside --images")
        words = zip(self.index.dictionary, self.index.counts)
        texts = {"words.txt": [f"{word}\t{count}" for word, count in words],
                 "log.jsonl": [json.dumps(console.without_nan(row)) for row in self.log],
                 "skipped.txt": [f"{name}\t{why}" for name, why in skipped.items()]}
        if self.ranks.rank:
            return
        try:
            for name, lines in texts.items():
                with console.whole_file(f"{out}/{name}", "w", encoding="utf-8",
                                        errors="surrogateescape") as file:
                    file.writelines(line + "\n" for line in lines)
            if self.log:
                evaluation.save_image(evaluation.curves_picture(self.log), f"{out}/curves.png")
            filters = evaluation.filters_picture(kernels.to_host(self.net.first.w))
            evaluation.save_image(filters, f"{out}/filters.png")
        except OSError as error:
            print(f"{out}: text or picture not written: {error.strerror or error}", file=sys.stderr)

    def finish(self, finished):
        """Save, draw the pictures, and say what was learned and what to try next."""
        out = self.options.out
        if self.ranks.broadcast(self.saved != self.step or not os.path.exists(self.path)):
            for wait in [RETRY_SECONDS] * RETRIES + [0]:
                if self.save(f": trying again in {wait} s" * (wait > 0)):
                    break
                time.sleep(wait)
        self.write_files()
        if finished and self.saved == self.step:
            weights, *_, line = model.load_best(out)
            self.net.load(weights)
            print(line)
        if finished and (result := self.validate()):
            evaluation.print_words(result)
        self.say_doubles()
        if skipped := self.gather_skipped():
            name, why = next(iter(skipped.items()))
            print(f"skipped {len(skipped):,} photos, e.g. {name}: {why}; all: {out}/skipped.txt")
        self.loader.close()
        kinds = "best.npz", ".jsonl", ".png", ".txt"
        files = [name for name in sorted(os.listdir(out)) if name.endswith(kinds)]
        print(f"{self.say_kept()}; beside it: {', '.join(files)}")
        if self.saved != self.step:
            raise RuntimeError(f"step {self.step:,} could not be saved: {self.say_kept()}")
        photo = self.loader.folder.find(self.index.name(min(self.loader.digests, default=0)))
        print(f"next: python eval.py tag --model {out} {photo!r}" if self.is_over() else
              f"next: python weak.py --resume --out {out}")

    def say_doubles(self):
        """Held-out photos whose very bytes were trained on make a score too good: name them."""
        digests = self.ranks.gather(self.loader.digests.items())
        first, name = self.index.held_out, self.index.name          # first training photo
        trained = {digest: photo for photo, digest in digests if photo >= first}
        doubles = [f"{name(photo)} = {name(trained[digest])}" for photo, digest in digests
                   if photo < first and digest in trained]
        if doubles:
            print(f"{len(doubles):,} held-out photos are byte-identical to training photos:",
                  ", ".join(doubles[:3]) + ", …" * (len(doubles) > 3))


# --------------------------------------------------------------------------- the drawn set

COLOURS = {                     # English and French: RGB
    "red rouge": (214, 40, 40), "blue bleu": (40, 80, 210), "yellow jaune": (245, 215, 50),
    "green vert": (50, 160, 60), "white blanc": (245, 245, 245), "black noir": (25, 25, 25),
    "orange orange": (245, 140, 30), "purple violet": (130, 50, 170)}
PLACES = {                      # English and French: sky, ground
    "sea mer": ((150, 205, 240), (30, 90, 160)),
    "meadow prairie": ((170, 215, 250), (90, 170, 70)),
    "night nuit": ((20, 20, 60), (35, 40, 50)),
    "desert désert": ((250, 225, 170), (225, 180, 100)),
    "snow neige": ((200, 215, 230), (240, 245, 250)),
    "sunset crépuscule": ((250, 150, 90), (90, 60, 80))}
SHAPES = {                      # English and French, most frequent first (Zipf): see `draw_shape`
    "tree arbre": "box .42 .5 .58 1 #6e4628; oval .1 0 .9 .7",
    "house maison": "box .1 .45 .9 1; poly 0 .45 .5 0 1 .45; box .42 .65 .58 1 #5a3c28",
    "car voiture": "box 0 .45 1 .8; box .2 .2 .75 .5; oval .1 .65 .35 .95 #141414; "
                   "oval .65 .65 .9 .95 #141414",
    "ball ballon": "oval .1 .1 .9 .9; oval .3 .25 .45 .4 #ffffff",
    "boat bateau": "poly 0 .65 1 .65 .8 1 .2 1; poly .5 0 .5 .6 .95 .6",
    "flower fleur": "box .47 .5 .53 1 #287828; oval .3 0 .7 .3; oval .1 .15 .45 .5; "
                    "oval .55 .15 .9 .5; oval .3 .3 .7 .6; oval .4 .2 .6 .4 #fadc3c",
    "fish poisson": "oval .0 .25 .75 .75; poly .7 .5 1 .2 1 .8; oval .12 .4 .2 .48 #000000",
    "bird oiseau": "oval .2 .35 .8 .75; oval .65 .15 .95 .45; poly .95 .25 1 .3 .95 .35 .8 .3; "
                   "poly .3 .5 0 .2 .5 .4",
    "cat chat": "oval .2 .4 .9 1; oval .1 .1 .6 .55; poly .12 .25 .15 0 .32 .15; "
                "poly .4 .15 .55 0 .58 .25; oval .22 .28 .28 .36 #fafa78; "
                "oval .42 .28 .48 .36 #fafa78",
    "star étoile": "poly .5 0 .62 .38 1 .38 .7 .6 .8 1 .5 .75 .2 1 .3 .6 0 .38 .38 .38",
    "balloon montgolfière": "oval .1 0 .9 .75; box .4 .82 .6 1 #785028; "
                            "poly .25 .65 .75 .65 .6 .85 .4 .85",
    "umbrella parapluie": "arc 0 .1 1 1; box .48 .5 .52 1 #3c3c3c",
    "mushroom champignon": "box .38 .5 .62 1 #ebe1cd; arc .05 .05 .95 1",
    "mountain montagne": "poly 0 1 .4 0 .65 .5 .75 .35 1 1; poly .4 0 .28 .3 .52 .27 #ffffff",
    "moon lune": "oval .1 .1 .9 .9 #faf5c8",
    "flag drapeau": "box .1 0 .16 1 #5a3c28; box .16 .05 .95 .5"}
FILLERS = "lovely nice summer holiday canon photo été vacances".split()
NAMES = "Emma Hugo Léa Paris Lyon Oslo Nina Tom Berlin Rome Max Zoé Lima Kyoto Anna Paul".split()
PHOTOS = 5000


def choose(rng, things, zipf=0):
    """One of the things: all alike, or the i-th with a chance of 1/(i + zipf), i from 0."""
    weights = 1 / (np.arange(len(things)) + zipf) if zipf else np.ones(len(things))
    return list(things)[rng.choice(len(things), p=weights / weights.sum())]


def draw_scene(seed, n, size=96):
    """Scene n of the drawn set, always the same: a picture, and its caption."""
    rng = np.random.Generator(philox(seed, (0, n, 0, SCENES)))
    place = choose(rng, PLACES)
    sky, ground = PLACES[place]
    image = Image.new("RGB", (size, size), shade(sky, rng))
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, size * rng.uniform(.55, .75), size, size], shade(ground, rng))
    seen = []
    for _ in range(1 + int(rng.uniform(0, 2.6))):
        thing, colour = choose(rng, SHAPES, zipf=4), choose(rng, COLOURS)
        wide = size * rng.uniform(.3, .6)
        corner = rng.uniform(0, size - wide, 2)                     # left, top
        for shape in SHAPES[thing].split("; "):
            draw_shape(draw, shape, corner, wide, COLOURS[colour], rng)
        seen.append((thing, colour))
    return image, write_caption(rng, seen, place)


def draw_shape(draw, shape, corner, wide, colour, rng):
    """A box, oval, arc or polygon with points in a unit box, in its own colour or in a shade."""
    kind, *numbers = shape.split()
    fill = numbers.pop() if numbers[-1][0] == "#" else shade(colour, rng)
    spots = np.array(numbers, float).reshape(-1, 2) * wide + corner             # (points, 2)
    kinds = {"box": draw.rectangle, "oval": draw.ellipse, "poly": draw.polygon,
             "arc": lambda box, fill: draw.pieslice(box, 180, 360, fill)}
    kinds[kind](spots.ravel().tolist(), fill=fill)


def shade(colour, rng):
    """The colour, a little lighter or darker."""
    return tuple(np.clip(np.array(colour) + rng.uniform(-22, 22), 0, 255).astype(int).tolist())


def write_caption(rng, seen, place):
    """A caption as people write them: true in the main, and with everything else they write."""
    french = rng.random() < 0.35
    a, also, there, along = (("un", "et", "dans la", "avec") if french else
                             ("a", "and", "in the", "with"))
    told = []
    for names in seen:                          # of a thing and its colour
        if rng.random() < 0.15:
            continue                            # there, and nobody mentions it
        thing, colour = (name.split()[french] for name in names)
        both = f"{thing} {colour}" if french else f"{colour} {thing}"
        told.append(f"{a} {thing if rng.random() < 0.25 else both}")
    words = [f" {also} ".join(told)]
    if rng.random() < 0.6:
        words += [there, place.split()[french]]
    if rng.random() < 0.3:
        words += [along, choose(rng, NAMES, zipf=1)]
    if rng.random() < 0.12:
        words += [choose(rng, SHAPES, zipf=4).split()[french]]      # not in the picture at all
    for _ in range(int(rng.uniform(0, 2))):
        words += ["#" * (rng.random() < 0.4) + choose(rng, FILLERS, zipf=1)]
    if rng.random() < 0.25:
        words += [str(int(rng.uniform(1, 2016)))]
    text = " ".join(words).strip() or f"IMG {int(rng.uniform(1, 9999))}"
    return text.capitalize() + "!" * (rng.random() < 0.1)


def draw_set(folder, captions, seed):
    """The picture set that `python weak.py` trains on, unless it is already there."""
    if os.path.exists(captions):
        return
    os.makedirs(folder, exist_ok=True)
    print(f"drawing {PHOTOS:,} captioned pictures into {os.path.dirname(captions)}", flush=True)
    with console.whole_file(captions, "w", encoding="utf-8") as file:
        for n in range(PHOTOS):
            image, caption = draw_scene(seed, n)
            image.save(os.path.join(folder, f"{n:05}.jpg"), quality=90)
            file.write(f"{n:05}.jpg\t{caption}\n")


if __name__ == "__main__":
    console.run_command(main)
