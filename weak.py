"""Learn visual features from captions: train a convolutional network to predict their words.

    python weak.py                                       draws a captioned picture set, trains on it
    python weak.py --images DIR --captions FILE          your own photos
    python weak.py --images DIR                          … with photo.txt files, or in named folders
    python weak.py --resume --out runs/NAME              go on where a run stopped

Joulin, van der Maaten, Jabri, Vasilache: Learning Visual Features from Large Weakly Supervised
Data (2016). `main` is the table of contents, `train` and `train_step` the method. A run's folder
holds model.npz (all of the run), best.npz (the weights of the best epoch), words.txt,
log.jsonl, skipped.txt, curves.png and .csv, and filters.png.
"""
import argparse
import errno
import fcntl
import glob
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # while the rest is imported

import numpy as np

import data
import eval as evaluation
import kernels
import model
from kernels import console, drawn
from kernels import ranks as several
from kernels.console import number

EPOCH = 1_000_000               # training images between two validations
LEAST_EPOCH = 10_000            # … for collections smaller than that
EPOCHS_PER_RATE = 10            # epochs that each learning rate is kept at least
LEAST_RATE = 1e-6               # training stops when the learning rate falls below this
MOMENTUM = 0.9                  # not stated in the paper; Krizhevsky's (2012, §5)
DECAY = 5e-4                    # likewise
FINAL = 0.2                     # the last part of the steps of --epochs has a lower rate, …
FINAL_RATE = 0.1                # … which is this times the learning rate
PATIENCE = 2                    # training ends after this times --epochs-per-lr worse epochs
SEVERAL_TARGETS = 0.8           # n targets of a row: the rate is this / √n of the network's
NEGATIVES = 1000                # of --targets sampled
MOST_WORKERS = 8                # if --workers is not given
VALIDATED = 10_000              # held-out photos scored after an epoch, at most
DIVERGED = 10                   # times the loss of guessing: beyond that training diverges
SAVE_SECONDS = 600              # between two checkpoints within an epoch
RETRY_SECONDS = 10              # between two tries to make the last save on a full disk
RETRIES = 360                   # how often it is tried: for an hour
# Errors of a disk that no waiting mends
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}
EXAMPLES = 100                  # held-out photos, of which one is named at the end
EMPTY_STEPS = 100               # steps in a row without a photo that can be read: give up
ORDER = 4                       # version of what steps draw, how they weigh it, and what is saved
DRAWN = {"pictures": drawn.PICTURES, "words": 80, "stop_words": 10, "epochs": 3,
         "epoch_size": 11_000, "batch": 32}     # defaults without --images
# Options that a resumed run may change
CHANGEABLE = {"resume", "out", "images", "captions", "format", "epochs", "final", "min_lr",
              "patience", "workers", "threads", "device", "precision"}


def main(arguments=None):
    """Train as `arguments` say, a list, or else the command line; returns the exit status."""
    ranks = several.join()
    if ranks.rank:                              # the first rank speaks for all
        sys.stdout = open(os.devnull, "w")
    options, checkpoint = read_options(arguments)
    share_machine(options, ranks)
    print(kernels.use(options.device, options.precision, ranks.local_rank), flush=True)
    with hold_folder(options.out, ranks):
        if options.drawn and ranks.rank == 0:
            drawn.draw_set(options.out, options.seed, options.pictures)
        index = read_captions(options, ranks)
        complete_options(options, index)
        if ranks.rank == 0:
            data.check_photos(options.images, index)
        run = begin_run(options, index, checkpoint, ranks)
        finished = train_and_finish(run)
    return 0 if finished else 130


def train_and_finish(run):
    """Train, save, and say what to do next; False if interrupted before the end."""
    warnings.filterwarnings("ignore", "(overflow|invalid value)", RuntimeWarning)   # the loss says
    try:
        with run.loader:
            with Interrupt() as interrupt:
                finished = train(run, interrupt)
            finish(run, finished)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {describe_saved(run)}") from None
    return finished


# ---------------------------------------------------------------------------------- options

def make_parser():
    """All options; the defaults of --batch, --dropout and --lr depend on the network."""
    parser = console.Parser(description=console.summary(__doc__),
                            stray="photos' folder is given as --images {}",
                            epilog=f"{console.EXAMPLE}python weak.py --images photos --captions "
                                   "captions.tsv --words 500 --positives all")
    add_data_options(parser.add_argument_group("data").add_argument)
    add_model_options(parser.add_argument_group("model").add_argument)
    add_training_options(parser.add_argument_group("training").add_argument)
    add_running_options(parser.add_argument_group("running").add_argument)
    return parser


def add_data_options(add):
    """Where photos and captions are, and how they are drawn."""
    recipe = [f"--{name.replace('_', '-')} {value}" for name, value in DRAWN.items()]
    add("--images", type=os.path.abspath, metavar="DIR", help="photos' folder; if not given a set "
        f"is drawn, and the defaults are {' '.join(recipe)} --positives balanced")
    add("--pictures", type=number(int, 1), metavar="N", help="how many are drawn without --images")
    add("--captions", type=os.path.abspath, metavar="FILE", help="also .gz or .bz2; if not given "
        "metadata.csv, texts beside the photos, or the folders' names")
    add("--format", choices=data.FORMATS, help="of the captions; recognised if not given")
    add("--image-column", metavar="NAME", help="of the captions' column, or key, of photos' names; "
        "or its number, from 1, if they have no heading")
    add("--text-column", metavar="NAME", help="the same of the captions' text; several with commas")
    add("--words", type=number(int, 1), default=data.WORDS, help="K, the size of the dictionary")
    add("--stop-words", type=number(int, 0), help="most frequent words, left out; if not given "
        f"{data.STOP_WORDS} from {data.MANY:,} captions on, else {data.FEW_STOP_WORDS}, but 5%% "
        "of the different words at most, and none of folders' names")
    add("--valid", type=number(float, 0, below=1), default=0.1, help="part of photos held out")
    add("--crop", choices=("center", "random"), default="random", help="random: mirrored, too")
    add("--sampling", choices=("class", "image"), default="class", help="draw a word, then its "
        "photo; or a photo with all its words")
    add("--positives", choices=sorted({*data.POSITIVES["class"], *data.POSITIVES["image"]}),
        help="of a photo drawn by class: the drawn word (default), or all its words, each of the "
        "same weight or balanced as the drawn ones (default without --images); by image: all its "
        "words, of the same weight (default), or the more the rarer (idf)")


def add_model_options(add):
    """The network, its loss, and its first weights."""
    add("--network", choices=model.NETWORKS, default="small",
        help="small, and narrow, half as wide: 64x64 pixels, for CPUs")
    add("--loss", choices=model.LOSSES, default="softmax", help="the paper's equation 2, or 1")
    add("--targets", choices=("all", "batch", "sampled"), default="all",
        help="words that a step scores: all, those of its batch, or those and --negatives others")
    add("--negatives", type=number(int, 1), help=f"of --targets sampled; if not given {NEGATIVES}")
    add("--dropout", type=number(float, 0, below=1), help="rate; if not given the network's")
    add("--from", type=os.path.abspath, metavar="RUN", help="begin with its weights (fine-tuning)")


def add_training_options(add):
    """SGD, its learning rate, and when training ends."""
    add("--batch", type=number(int, 1), help="photos a step; if not given the network's")
    add("--lr", type=number(float, above=0), help="first learning rate; if not given the "
        f"network's; with --positives all times {SEVERAL_TARGETS} / √n, n targets of a row on "
        "average; with --targets sampled half of it")
    add("--momentum", type=number(float, 0, below=1), default=MOMENTUM, help="of SGD")
    add("--weight-decay", type=number(float, 0), default=DECAY, help="of SGD, not for biases")
    add("--epoch-size", type=number(int, 1), help="photos an epoch; if not given as many as there "
        f"are, but {LEAST_EPOCH:,} to {EPOCH:,}")
    add("--epochs", type=number(int, 1), help="stop after so many, if not by --min-lr before; "
        "a resumed run may ask for more")
    add("--final", type=number(float, 0, 1), default=FINAL, help="the part of the steps of all "
        f"--epochs, the last ones, that are at {FINAL_RATE:g} of the learning rate; 0: none. A "
        "resumed run counts the epochs that are asked for now. Without --epochs there are none")
    add("--epochs-per-lr", type=number(int, 1), default=EPOCHS_PER_RATE,
        help="epochs before the rate may be halved, which happens when the held-out loss rises")
    add("--min-lr", type=number(float, above=0), default=LEAST_RATE,
        help="stop when the rate is halved below this one")
    add("--patience", type=number(int, 1), metavar="N", help="stop when none of N epochs "
        "is the best, the one with the highest mean AP on held-out photos; if neither this nor "
        f"--epochs is given {PATIENCE} x --epochs-per-lr")
    add("--seed", type=number(int, 0, below=2**63), default=0, help="of all random numbers")


def add_running_options(add):
    """The run's folder, and the machine."""
    add("--out", metavar="DIR", help="folder of the run; if not given runs/ and the images' name")
    add("--resume", action="store_true", help="go on with the run in --out, with its options")
    add("--device", choices=kernels.DEVICES, default="auto",
        help="where to compute; reference: on the CPU, by the plain code that one reads")
    add("--precision", choices=kernels.PRECISIONS, help="on a GPU; if not given tf32 if it has it")
    add("--workers", type=number(int, 0, console.MOST_THREADS), help="threads that decode photos; "
        "if not given one a core, at most 8; 0: none, for whole tracebacks")
    add("--threads", type=number(int, 1, console.MOST_THREADS), help="that compute, on the CPU")


def read_options(arguments=None):
    """The options, and the checkpoint to go on with or None; ValueError for what cannot be."""
    if arguments is not None:
        arguments = [str(argument) for argument in arguments]
    parser = make_parser()
    given = parser.parse_given(arguments)
    out = given.get("out") or default_folder(given)
    path = os.path.join(out, "model.npz")
    checkpoint = None
    if given.get("resume"):
        checkpoint = load_run(path)
        options = resumed_options(parser.defaults(), checkpoint.facts["options"], given, out)
    elif os.path.exists(path):
        raise ValueError(f"{path} holds a trained model; use --resume, or choose another --out")
    else:
        options = new_options(parser.defaults(), given)
    options.out = out
    if options.drawn:
        vars(options).update(drawn.sources(out))
    check_options(options)
    return options, checkpoint


def default_folder(given):
    """The folder of a run for which --out is not given."""
    return os.path.join("runs", os.path.basename(given.get("images", "drawn")))


def load_run(path):
    """The checkpoint of a run; ValueError unless training can go on from it."""
    checkpoint = data.load_checkpoint(path)
    if not checkpoint.velocities:
        raise ValueError(f"{path} has weights only, as best.npz; begin a new run by --from")
    if checkpoint.facts.get("order") != ORDER:
        raise ValueError(f"{path} is of another version of weak.py, whose runs this one cannot go "
                         "on with; begin a new run with its weights by --from "
                         f"{os.path.dirname(path)}")
    return checkpoint


def resumed_options(defaults, stored, given, out):
    """The options that the run began with, with those of CHANGEABLE that are given now.

    ValueError if others are changed.
    """
    changes = []
    for name, value in given.items():
        if name not in CHANGEABLE and stored.get(name) != value:
            changes.append(f"--{name.replace('_', '-')} ({stored.get(name)}, now {value})")
    if changes:
        raise ValueError(f"the run in {out} began with other options: {', '.join(changes)}; "
                         "leave them out, or choose another --out")
    options = argparse.Namespace(**{**defaults, **stored, **given})
    moved = given.keys() & {"images", "captions"}
    if options.drawn and moved:
        raise ValueError(f"the run in {out} drew its own photos; leave out --{min(moved)}")
    if "captions" in given:
        options.format = given.get("format")    # the same captions may be in another format now
    elif stored["captions"] == stored["images"]:
        options.captions = options.images       # the folder is its own captions
    return options


def new_options(defaults, given):
    """The options of a new run, with the defaults that depend on other options."""
    is_drawn = "images" not in given
    if is_drawn and "captions" in given:
        raise ValueError("--captions goes with --images, the folder that its photos are in")
    if not is_drawn and "pictures" in given:
        raise ValueError("--pictures are drawn without --images; leave out one of the two")
    if is_drawn:
        defaults = {**defaults, **DRAWN}
    options = argparse.Namespace(**{**defaults, **given})
    options.drawn = is_drawn
    options.captions = options.captions or options.images
    recipe = model.NETWORKS[options.network]    # --lr: see complete_options
    if options.positives is None:
        options.positives = default_positives(options)
    if options.batch is None:
        options.batch = recipe.batch
    if options.dropout is None:
        options.dropout = recipe.dropout
    if options.targets == "sampled" and options.negatives is None:
        options.negatives = NEGATIVES
    return options


def default_positives(options):
    """The targets of a row if --positives is not given."""
    balances = model.LOSSES[options.loss].balances
    if options.drawn and options.sampling == "class" and balances:
        return "balanced"
    return data.POSITIVES[options.sampling][0]


def check_options(options):
    """ValueError for what no run can be made of."""
    if not options.drawn:
        check_sources(options)
    possible = data.POSITIVES[options.sampling]
    if options.positives not in possible:
        raise ValueError(f"--positives {options.positives} is impossible with --sampling "
                         f"{options.sampling}; use {' or '.join(possible)}")
    weighed = options.positives in ("balanced", "idf")
    if weighed and not model.LOSSES[options.loss].balances:
        raise ValueError(f"--positives {options.positives} is impossible with --loss "
                         f"{options.loss}; use {possible[0]}")
    if options.negatives and options.targets != "sampled":
        raise ValueError("--negatives goes with --targets sampled")
    if not options.valid and not options.epochs:
        raise ValueError("with --valid 0 nothing tells when to stop: give --epochs")
    if options.targets == "batch" and options.batch == 1:
        raise ValueError("--targets batch compares a batch's photos; use --batch 2 or more")


def check_sources(options):
    """ValueError unless the photos' folder and the captions are there."""
    where = "if it has moved, give its new place by" if options.resume else "check"
    captions = options.captions
    if not os.path.isdir(options.images):
        raise ValueError(f"images: there is no folder {options.images}; {where} --images")
    if not os.path.exists(captions):
        raise ValueError(f"captions: there is no file {captions}; {where} --captions")
    if not os.path.isfile(captions) and not os.path.isdir(captions):
        raise ValueError(f"captions: {captions} is no file; save a pipe to one first")


def share_machine(options, ranks):
    """Threads for this rank: its part of what the machine's ranks have together."""
    count = ranks.local_size
    if options.batch < ranks.size:
        raise ValueError(f"--batch {options.batch} is less than the {ranks.size} ranks: raise it")
    if ranks.size > 1:
        print(f"ranks: {ranks.size}, {count} on this machine; they share --batch {options.batch}")
    kernels.threads.start(options.threads or max(1, kernels.threads.count // count))


def count_workers(options, ranks):
    """How many threads decode photos on this rank."""
    if options.workers is not None:
        return options.workers
    return min(MOST_WORKERS, max(1, kernels.cores() // ranks.local_size))


@contextmanager
def hold_folder(out, ranks):
    """Hold the run's folder in this block, for all ranks.

    If the run wrote nothing, the lock is removed after it, and the folder if it is new.
    """
    if ranks.rank:
        yield
        return
    is_new = not os.path.exists(out)
    with lock_folder(out):
        try:
            yield
        finally:
            with suppress(OSError):             # somebody may have removed the folder
                remove_if_empty(out, is_new)


def remove_if_empty(out, is_new):
    """Remove run.lock if a run that was refused left nothing else, and the folder if it is new."""
    if os.listdir(out) != ["run.lock"]:
        return
    os.remove(os.path.join(out, "run.lock"))
    if is_new:
        os.rmdir(out)


def lock_folder(out):
    """Make the run's folder and lock it.

    ValueError if it holds other files than a run's, or another process uses it.
    """
    path = os.path.join(out, "run.lock")
    try:
        os.makedirs(out, exist_ok=True)
        names = [name for name in os.listdir(out) if not name.startswith(".")]
        # a run that was copied may lack the lock, which is empty
        if names and "run.lock" not in names and "model.npz" not in names:
            raise ValueError(f"{out} holds other things than a run; choose another --out")
        lock = open(path, "a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_unfinished_files(out)
        return lock
    except BlockingIOError:
        raise ValueError(f"another run is using {out}; choose another --out") from None
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}; choose another") from None


def remove_unfinished_files(out):
    """Remove what a run that was killed left of the files that it was writing."""
    for path in glob.glob(os.path.join(glob.escape(out), "*.*.part")):
        if os.path.isfile(path):
            os.remove(path)


# ------------------------------------------------------------------------------------- data

def read_captions(options, ranks):
    """The index, of which it prints what it holds. ValueError without any photo."""
    text = data.Text(options.words, options.stop_words, options.valid)
    folder = os.path.join(options.out, "index")
    if ranks.rank == 0:
        source = data.Source(options.captions, options.format, options.image_column,
                             options.text_column, options.images)
        index = data.build_index(source, folder, text)
    ranks.broadcast(None)                       # the others wait here
    if ranks.rank:
        index = open_index(folder)
    describe_index(index)
    return index


def open_index(folder):
    """The index that the first rank made; RuntimeError if it is not to be seen here."""
    try:
        return data.Index(folder)
    except FileNotFoundError:
        raise RuntimeError(f"the first rank's {folder} is not to be seen here; put --out and the "
                           "photos on a disk that all machines share") from None


def describe_index(index):
    """Print what the captions hold, and what of it is left out."""
    facts = index.facts
    if facts["origin"]:
        print(f"captions: {facts['origin']}")
    print(f"captions: {facts['captions']:,} as {index.format}, {len(index):,} photos "
          f"({index.held_out:,} held out), {len(index.dictionary):,} words, "
          f"{index.label_count / max(1, len(index)):.2f} a photo", flush=True)
    examples = [f"{word} ({times:,} times)" for word, times in facts["left_out"]]
    first_rare = min(facts["stop_words"], 5)    # before it are stop words
    stop_words = ", ".join(examples[:first_rare])
    rare_words = ", ".join(examples[first_rare:])
    notes = {
        "bad_lines": "lines are no captions, or do not fit the heading",
        "recoded": "are not in UTF-8, and are read as Windows-1252; else save them as UTF-8",
        "refused": "names are absolute or leave --images: refused",
        "without_words": "photos have no word of the dictionary",
        "stop_words": f"most frequent words are left out as stop words, e.g. {stop_words}; "
                      "to train on them as well, --stop-words 0",
        "rest": f"rarer words are left out, e.g. {rare_words}"}
    for fact, note in notes.items():
        if facts[fact]:
            print(f"captions: {facts[fact]:,} {note}")
    if index.label_count == len(index) * len(index.dictionary):
        print("captions: all photos have the same words: there is nothing to learn")


def complete_options(options, index):
    """Set --format and --stop-words as the index has them, and --lr if it is not given."""
    options.format = index.format
    options.stop_words = index.facts["stop_words"]
    if options.lr is None:
        options.lr = default_rate(options, index)
    print(f"first learning rate: {options.lr:g}")
    if options.lr < options.min_lr:
        raise ValueError(f"--lr {options.lr:g} is below --min-lr {options.min_lr:g}: lower that")


def default_rate(options, index):
    """The network's learning rate, lowered where gradients are larger, or vary more."""
    rate = model.NETWORKS[options.network].lr
    if options.positives == "all":                                  # several words of a photo
        targets = index.label_frequency(options.sampling, "all").sum()          # of a row
        rate *= SEVERAL_TARGETS / math.sqrt(targets)                # 1 / √targets diverged
    if options.targets == "sampled":                                # a class counts 1/π times
        rate /= 2                                                   # as the whole rate diverged
    return float(f"{rate:.2g}")


# ------------------------------------------------------------------------------ the run's state

@dataclass
class Epoch:
    """The epoch under way."""

    losses: np.ndarray                  # (rows,) each row's weighted losses, summed over the steps
    weights: np.ndarray                 # (rows,) their weights; those of a step sum to 1
    steps: int = 0                      # that were made
    final_steps: int = 0                # those of them at FINAL_RATE
    shown_loss: float = 0.0             # the sum of `losses` when progress was last shown
    shown_weight: float = 0.0           # the sum of `weights` then
    seconds: float = 0.0                # that the steps took, also before a resume
    photos_waited: float = 0.0          # seconds of these that the steps waited for photos
    ranks_waited: float = 0.0           # seconds that they waited for other ranks


@dataclass
class Run:
    """A training run: what it is made of, and how far it is."""

    options: argparse.Namespace
    index: data.Index
    ranks: several.Alone
    net: model.Network
    label_frequency: np.ndarray         # (K,) data.Index.label_frequency of what training draws
    label_weight: np.ndarray            # (K,) data.Index.label_weight of it
    trained_on: dict                    # what its weights saw: see `read_history`
    loss: object                        # of model.LOSSES, which the steps minimise
    held_out_loss: object               # the same loss, for photos as they are
    shift: np.ndarray | None            # (K,) model.prior_shift, which scores of these photos get
    sgd: model.SGD
    schedule: model.Plateau             # of the learning rate
    sampler: data.BatchSampler
    loader: data.Loader
    current: Epoch
    step: int = 0                       # steps that were made
    epoch: int = 0                      # epochs that are over
    log: list = field(default_factory=list)     # a dictionary for each of them
    empty_steps: int = 0                # steps without a photo since the last one with some
    saved: int | None = None            # the step of model.npz
    saved_best: int | None = None       # the step of best.npz, if this process wrote it
    unsaved_best: data.Checkpoint | None = None     # … and what it shall be, if that failed
    write_error: OSError | None = None  # of the last save
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def recipe(self):
        """The network's row of model.NETWORKS."""
        return model.NETWORKS[self.options.network]

    @property
    def rows(self):
        """The slice of a batch that is this rank's."""
        return self.ranks.part(self.options.batch)

    @property
    def steps_per_epoch(self):
        """Batches between two validations."""
        size = self.options.epoch_size
        if size is None:
            size = min(EPOCH, max(LEAST_EPOCH, self.index.training))
        return math.ceil(size / self.options.batch)

    def path(self, name):
        """Where the run keeps a file."""
        return os.path.join(self.options.out, name)


def begin_run(options, index, checkpoint, ranks):
    """A new run, or the one of the checkpoint as it was when that was written."""
    if checkpoint:
        check_captions(checkpoint, index, options.out)
    recipe = model.NETWORKS[options.network]
    frequency = index.label_frequency(options.sampling, options.positives)      # (K,)
    weight = index.label_weight(options.sampling, options.positives)            # (K,)
    loss = model.LOSSES[options.loss]
    rows = ranks.part(options.batch)
    source = None if checkpoint else read_source(options, index)
    net = make_network(options, index, checkpoint, source)
    run = Run(
        options, index, ranks, net, frequency, weight,
        trained_on=extend_history(options, index, read_history(checkpoint or source)),
        loss=loss(frequency),
        held_out_loss=loss(index.label_frequency("image", "all")),
        shift=model.prior_shift(vars(options), index.counts, index.training, frequency, weight),
        sgd=model.SGD(net, options.momentum, options.weight_decay),
        schedule=model.Plateau(options.lr, options.epochs_per_lr),
        sampler=data.BatchSampler(
            index, options.seed, options.batch, options.sampling, options.positives,
            spare=recipe.size - recipe.crop, random_crops=options.crop == "random", rows=rows),
        loader=data.Loader(options.images, index.name, len(index), recipe.size,
                           count_workers(options, ranks), ranks.local_size, kernels.host_empty),
        current=new_epoch(rows))
    if checkpoint:
        restore(run, checkpoint)
    check_disk(run)
    check_memory(run)
    write_files(run)
    return run


def check_captions(checkpoint, index, out):
    """ValueError unless the captions are those of the checkpoint, wherever they are now."""
    same_photos = checkpoint.facts["digest"] == index.facts["digest"]
    if same_photos and checkpoint.words == index.dictionary:
        return
    raise ValueError(f"the captions changed: {describe_changes(checkpoint, index)}; choose another "
                     f"--out, and --from {out} to begin with its weights")


def describe_changes(checkpoint, index):
    """What of the captions is not as it was when the checkpoint was written."""
    missing = sorted(set(checkpoint.words).difference(index.dictionary))
    new = sorted(set(index.dictionary).difference(checkpoint.words))
    if missing:
        return f"words of the dictionary are missing ({len(missing):,}), e.g. {missing[0]}"
    if new:
        return f"words of the dictionary are new ({len(new):,}), e.g. {new[0]}"
    if checkpoint.facts["training"] != index.training:
        return f"{checkpoint.facts['training']:,} training photos are {index.training:,} now"
    before = dict(zip(checkpoint.words, checkpoint.facts["counts"]))
    for word, count in zip(index.dictionary, index.counts):
        if count != before[word]:
            return f"{word} is a word of {before[word]:,} training photos, now of {count:,}"
    return "photos have other names, or other words of the dictionary"


def read_source(options, index):
    """The checkpoint of --from, if that is given; ValueError if the run cannot begin with it."""
    source = getattr(options, "from")
    if not source:
        return None
    path = data.find_checkpoint(source)
    checkpoint = data.load_checkpoint(path)
    network = checkpoint.facts["options"]["network"]
    if network != options.network:
        raise ValueError(f"--from: that run is of --network {network}")
    check_history(options, index, read_history(checkpoint))
    print(f"beginning with {evaluation.describe_checkpoint(path, checkpoint.facts)}", flush=True)
    return checkpoint


def read_history(checkpoint):
    """{captions: the smallest part of their photos that was held out} of all training so far.

    A checkpoint's weights were trained with these captions, by itself or by the runs that it began
    with; they are known by the content of their fingerprint. Another --valid holds out more photos
    or fewer, but always the same ones first.
    """
    if checkpoint is None:
        return {}
    unknown = {"unknown": checkpoint.facts["options"]["valid"]}     # before this was written
    return checkpoint.facts.get("trained_on", unknown)


def check_history(options, index, history):
    """ValueError if photos that are held out now were trained on; say if that is not known."""
    captions = index.facts["fingerprint"]["content"]
    least = history.get(captions, 1)
    if options.valid > least:
        raise ValueError(f"--from: that run or one before it trained on photos that --valid "
                         f"{options.valid:g} holds out; use --valid {least:g} at most")
    if set(history) - {captions}:
        print("--from: that run or one before it had other captions; whether it trained on photos "
              "that are held out now is not known", flush=True)


def extend_history(options, index, history):
    """The history with this run's captions."""
    captions = index.facts["fingerprint"]["content"]
    return {**history, captions: min(options.valid, history.get(captions, 1))}


def make_network(options, index, checkpoint, source):
    """The network with its first weights, those to go on with, or those of a source."""
    build = model.NETWORKS[options.network].build
    net = build(len(index.dictionary), options.dropout, seed=options.seed)
    if checkpoint:
        check_arrays(checkpoint.weights, net.state(), options.out)
        net.load(checkpoint.weights)
    elif source:
        take_weights(source, net, index.dictionary)
    return net


def take_weights(source, net, dictionary):
    """Take another run's weights; in output layers, only those of words that both runs know."""
    _, rows, their_rows = np.intersect1d(dictionary, source.words, return_indices=True)
    for name, layer, attribute in net.parameters():
        weights = source.weights[name]
        if isinstance(layer, model.Output):
            getattr(layer, attribute)[rows] = kernels.to_device(weights[their_rows])
        else:
            setattr(layer, attribute, kernels.to_device(weights))
    print(f"both know {len(rows):,} of its {len(source.words):,} words", flush=True)


def new_epoch(rows):
    """An epoch of which nothing is done yet; rows: the slice of a batch that is this rank's."""
    zeros = np.zeros(rows.stop - rows.start)
    return Epoch(losses=kernels.to_device(zeros), weights=zeros.copy())


def weight_bytes(run):
    """Bytes of all weights, which are those of all velocities."""
    return sum(v.nbytes for v in run.sgd.v.values())


def scored_words(run):
    """About how many words a step scores."""
    k = len(run.index.dictionary)
    if run.options.targets == "all":
        return k
    targets = run.options.batch * run.label_frequency.sum()         # of a batch's rows
    return min(k, int(targets) + (run.options.negatives or 0))


def gradient_bytes(run):
    """Bytes of all gradients, and of the copies of output layers' rows that a step scores."""
    total = 0
    for path, layer, _ in run.net.parameters():
        size = run.sgd.v[path].nbytes
        if run.options.targets != "all" and isinstance(layer, model.Output):
            size = 2 * size * scored_words(run) / len(run.index.dictionary)
        total += size
    return total


def disk_bytes(run):
    """Bytes of the two checkpoints, and how many must be free to save them, again and again.

    model.npz has the weights and the velocities, best.npz the weights alone: 3 times the weights.
    The next model.npz is written beside the last, so 5 times; what is there already counts.
    """
    size = weight_bytes(run)
    there = 0
    for name in "model.npz", "best.npz":
        with suppress(FileNotFoundError):
            there += os.path.getsize(run.path(name))
    return 3 * size, max(0, 5 * size - there)


def check_disk(run):
    """Say what the checkpoints take; ValueError if the disk has no room to write them safely."""
    out = run.options.out
    total, needed = disk_bytes(run)
    free = shutil.disk_usage(out).free
    print(f"{run.options.network}: {weight_bytes(run) // 4:,} parameters; checkpoint and best "
          f"model take {total / 1e6:,.0f} MB, {free / 1e9:,.1f} GB are free", flush=True)
    if free < needed:
        raise ValueError(f"{out} has {free / 1e6:,.0f} MB free, and saving needs "
                         f"{needed / 1e6:,.0f}; free some, or choose another --out")


def check_memory(run):
    """Say what memory a step takes; ValueError if that is more than there is."""
    batch = run.options.batch
    image = run.net.bytes_per_image(run.recipe.size, run.recipe.crop, run.loss, scored_words(run))
    needed = image * (run.rows.stop - run.rows.start)
    where = "the GPU"
    free = kernels.memory()
    remedy = "--device cpu, or a smaller --network or --words"
    if free is None:
        where = "this machine"
        free = (1 - data.KEPT) * data.MEMORY / run.ranks.local_size - 2 * weight_bytes(run)
        remedy = "a smaller --network or --words"
    free = max(0, free - gradient_bytes(run))   # which are not there yet
    print(f"memory: a step of --batch {batch} takes {needed / 1e9:,.2f} of {free / 1e9:,.1f} GB "
          f"that {where} has for it, {image / 1e6:,.1f} MB an image", flush=True)
    if needed <= free:
        return
    fitting = int(free / image) * run.ranks.size
    if fitting > 0:
        remedy = f"--batch {fitting} or less"
    raise ValueError(f"--batch {batch} does not fit into {where}'s memory; use {remedy}")


# --------------------------------------------------------------------------------- training

class Interrupt:
    """While training, Ctrl-C, kill, a closed terminal and a closed pipe only set `asked`.

    Then the step is finished, and the run saved. A second Ctrl-C or kill ends it at once.
    """

    def __init__(self):
        self.asked = False
        self.handlers_before = {}

    def __enter__(self):
        for signum in [*console.stop_signals(), signal.SIGPIPE]:
            before = signal.signal(signum, self.handle)
            self.handlers_before[signum] = before
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers_before.items():
            signal.signal(signum, handler)

    def handle(self, signum, _):
        """What the signals do while training."""
        if not self.asked:
            self.asked = True                   # first, since printing may bring the next signal
            print("\nstopping after this step or scoring, and saving; once more to stop at once",
                  flush=True)
        elif signum in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt


def train(run, interrupt):
    """Train until there is a `stop_reason`; False if interrupted before."""
    plans = map(run.sampler.batch, itertools.count(run.step))
    batches = run.loader.batches(plans, run.sampler.replacement)    # read ahead across epochs
    while not stop_reason(run):
        if stop_together(run, interrupt):       # while photos were scored
            return False
        progress = begin_progress(run)
        rest = run.steps_per_epoch - run.current.steps
        for batch, _, pixels, available in itertools.islice(batches, rest):
            decision = decide_together(run, available, interrupt)
            count_step(run, decision.counted)
            if decision.counted:
                train_step(run, batch, pixels, available, decision.counted)
            show_progress(run, progress)
            if decision.stop:
                return False
            if decision.save:
                save(run)
        end_epoch(run, progress)
    return True


def train_step(run, batch, pixels, available, counted):
    """One step of SGD: forward, loss, backward, the sum of all ranks' gradients, update.

    batch: a data.Batch, the photos drawn and their words; from the loader, pixels, uint8
    (N, S, S, 3), and available (N,), False where no photo could be read; counted: how many could,
    on all ranks. With one rank, begin_allreduce and wait do nothing: the sums are there already.
    """
    labels = make_labels(run, batch, available, counted)
    # run.step counts this step already, so masks are drawn for batch.step + 1
    context = model.Context(run.options.seed, run.step, batch.rows.start, labels.classes)
    x = kernels.prepare(pixels, batch.top, batch.left, batch.flip, run.recipe.crop)  # (N, H, W, 3)
    scores = run.net.forward_training(x, context)                   # a list, the main ones last
    losses, gradients = model.training_losses(run.loss, scores, labels)     # (N,), like scores
    run.net.backward(gradients, on_gradient=run.ranks.begin_allreduce)
    run.ranks.wait()
    run.sgd.step(learning_rate(run))
    run.current.losses += losses                # on a GPU this does not wait for them
    run.current.weights += labels.weights


def learning_rate(run):
    """The rate of the step under way: the rule's, or a part of it in the final steps."""
    if run.step > first_steps(run):
        return FINAL_RATE * run.schedule.rate
    return run.schedule.rate


def first_steps(run):
    """How many steps the run makes before its final ones; without --epochs there are none."""
    options = run.options
    if not options.epochs:
        return math.inf
    steps = options.epochs * run.steps_per_epoch
    return steps - round(options.final * steps)


def make_labels(run, batch, available, counted):
    """What the step scores, and the weight of each row: 0 without a photo."""
    options = run.options
    labels = run.sampler.labels(batch, available, options.targets, options.negatives, counted)
    if options.targets == "batch" and not run.loss.corrects_batch:
        # The paper's estimate over a batch's own words is biased, and not corrected.
        labels = labels._replace(inclusion_probability=None)
    return labels


class Decision(NamedTuple):
    """What all ranks do alike in a step."""

    counted: int                        # the rows of the batch that have a photo, on all ranks
    save: bool                          # for some rank it is time to
    stop: bool                          # some rank was asked to


def decide_together(run, available, interrupt):
    """The Decision for a step: the ranks do whatever any of them must do."""
    time_to_save = time.monotonic() - run.saved_at > SAVE_SECONDS
    votes = run.ranks.allreduce([available.sum(), time_to_save, interrupt.asked])
    counted, save, stop = votes
    return Decision(int(counted), save > 0, stop > 0)


def stop_together(run, interrupt):
    """Whether some rank was asked to stop."""
    (asked,) = run.ranks.allreduce([interrupt.asked])
    return asked > 0


def count_step(run, counted):
    """One more step; RuntimeError if too many of the last ones had no photo."""
    run.step += 1
    run.current.steps += 1
    if run.step > first_steps(run):
        run.current.final_steps += 1
    if counted:
        run.empty_steps = 0
        return
    run.empty_steps += 1
    if run.empty_steps >= min(EMPTY_STEPS, run.steps_per_epoch):
        reasons = [f"{name}: {why}" for name, why in run.loader.skipped.items()]
        example = reasons[0] if reasons else "none of this rank"
        raise RuntimeError(f"no photo of the last {run.empty_steps} steps could be read, e.g. "
                           f"{example}; {describe_saved(run)}")


def stop_reason(run):
    """The option by which training is over, or None while it is not."""
    options = run.options
    if run.schedule.rate < options.min_lr:
        return "--min-lr"
    if options.epochs and run.epoch >= options.epochs:
        return "--epochs"
    best = best_epoch(run.log)
    patience = patience_of(options)
    if patience and best and run.epoch - best["epoch"] >= patience:
        return "--patience"
    return None


def patience_of(options):
    """After how many epochs without a better one training ends; None: after any number."""
    if options.patience is None and options.epochs is None:
        return PATIENCE * options.epochs_per_lr
    return options.patience


def best_epoch(log):
    """The row of the best epoch, the first of equal ones; None if nothing is held out.

    It is that of the highest mean AP on held-out photos. Their loss is lowest long before words and
    features are best, since a network grows too sure; it decides only where no word has an AP,
    because no held-out photo, or each of them, carries it.
    """
    rows = [row for row in log if row["validation_loss"] is not None]
    if all(row["scored_words"] for row in rows):
        return max(rows, key=lambda row: row["map"], default=None)
    return min(rows, key=lambda row: row["validation_loss"])


# ------------------------------------------------------------------------ the end of an epoch

def end_epoch(run, progress):
    """Validate, log, apply the learning-rate rule, save, and say how the epoch went."""
    run.epoch += 1
    waiting = describe_waiting(run, progress)
    row = describe_steps(run, progress)
    row.update(describe_scores(run))            # afterwards, since scoring waits for photos, too
    run.log.append(row)
    held_out = row["validation_loss"]
    run.schedule.update(row["loss"] if held_out is None else held_out)
    run.current = new_epoch(run.rows)
    compare_weights(run)
    save(run)
    write_files(run)
    print(describe_epoch(row, run.options.targets, waiting), flush=True)
    reason = stop_reason(run)
    if reason:
        print(f"training is over by {reason}", flush=True)


def describe_steps(run, progress):
    """The epoch's steps in the log; "loss" is what they minimised, the objective."""
    loss, weight = run.ranks.allreduce([sum_losses(run), run.current.weights.sum()])
    return {"epoch": run.epoch, "step": run.step, "loss": float(loss / weight),
            "learning_rate": learning_rate(run), "final_steps": run.current.final_steps,
            "images_per_second": progress.rate(),
            "loader_wait": run.loader.waited / progress.seconds(),
            "skipped": len(gather_skipped(run))}


def describe_scores(run):
    """The epoch's scores in the log, None where no photo is held out, or none can be read."""
    started = time.monotonic()
    training_loss = measure_training_loss(run)
    scores = validate(run)
    row = {"training_loss": training_loss, "scoring_seconds": time.monotonic() - started}
    if scores is None:
        none = dict.fromkeys(("validation_loss", "precision@10", "auc", "map"))
        return {**row, **none, "scored_photos": 0, "scored_words": 0}
    check_divergence(run, scores["loss"])
    return {**row, "validation_loss": scores["loss"],
            "precision@10": scores["precision@10"], "auc": scores["auc"], "map": scores["map"],
            "scored_photos": scores["photos"], "scored_words": scores["words"],
            "precision@10_frequent_words": scores["baseline"]["precision@10"],
            "map_chance": scores["chance"]["map"]}


def describe_epoch(row, targets, waiting):
    """The line that says how an epoch went."""
    scores = {"training_loss": "training loss", "validation_loss": "held-out loss",
              "precision@10": "precision@10", "auc": "AUC", "map": "mean AP"}
    parts = []
    for key, name in scores.items():
        if row[key] is not None:
            parts.append(f"{name} {row[key]:.4f}")
    if not parts:                               # no photo is held out
        among = "" if targets == "all" else f" ({targets} words)"
        parts.append(f"objective{among} {row['loss']:.4f}")
    parts[0] = f"epoch {row['epoch']}: {parts[0]}"
    rate = f"rate {row['learning_rate']:g}"     # of its last step
    if row["final_steps"]:
        rate += f" ({row['final_steps']:,} final steps)"
    parts.append(rate)
    parts.append(f"{row['images_per_second']:.0f} images/s")
    parts.append(waiting)
    if row["skipped"]:
        parts.append(f"{row['skipped']:,} photos cannot be read")
    return ", ".join(parts)


def validate(run):
    """Metrics on held-out photos; None without any."""
    return score_photos(run, *read_features(run, validation_photos(run.index)))


def score_photos(run, features, photos):
    """Metrics of photos with features (N, E), both as of read_features; None without any."""
    scores = None
    if photos:                                  # the first rank has them, if there are any
        targets = [run.index.words(photo) for photo in photos]
        carried = evaluation.mark_words(targets, len(run.index.counts))
        scores = evaluation.word_metrics(make_scorer(run, features), targets, carried,
                                         run.index.counts)
    return run.ranks.broadcast(scores)


def make_scorer(run, features):
    """The Scorer of photos with features (N, E) for all words, with the prior."""
    return evaluation.Scorer(features, run.net.output, run.held_out_loss, run.shift)


def measure_training_loss(run):
    """The loss of training photos by the definition of the held-out loss; None without any."""
    features, photos = read_features(run, compared_photos(run.index))
    loss = None
    if photos:                                  # the first rank has them, if there are any
        targets = [run.index.words(photo) for photo in photos]
        loss = evaluation.mean_loss(make_scorer(run, features), targets)
    return run.ranks.broadcast(loss)


def read_features(run, photos):
    """Features (N, E) of those photos that can be read, and these photos, on the first rank.

    Each rank reads a part of the photos. Both are empty on the others, and where none can be read.
    """
    mine = photos[run.ranks.part(len(photos))]
    with console.Progress("scoring", len(mine), stream=sys.stdout) as progress:
        features, readable = evaluation.extract_features(
            run.net, run.loader, mine, run.recipe.crop, progress)
    readable = run.ranks.gather(readable)
    features = run.ranks.gather(kernels.to_host(features))          # a list of N rows (E,)
    if not readable:
        return [], []
    return kernels.to_device(np.stack(features)), readable


def validation_photos(index):
    """The held-out photos to score after an epoch, evenly from all: fewer where K is large."""
    count = max(100, evaluation.BLOCK // len(index.dictionary))
    count = min(VALIDATED, count, index.held_out)
    return np.linspace(0, index.held_out - 1, count).astype(int).tolist()


def compared_photos(index):
    """As many training photos, evenly from all, whose loss stands beside the held-out loss."""
    count = min(len(validation_photos(index)), index.training)
    return np.linspace(index.held_out, len(index) - 1, count).astype(int).tolist()


def check_divergence(run, loss):
    """RuntimeError if the held-out loss is far above that of guessing."""
    k = max(2, len(run.index.dictionary))       # of one word guessing costs nothing
    if not loss < DIVERGED * run.held_out_loss.of_guessing(k):
        raise divergence(run, f"training diverges, the held-out loss is {loss:.4g}")


def compare_weights(run):
    """RuntimeError unless all ranks have the same weights, to the bit."""
    if run.ranks.size == 1:
        return
    checksum = 0
    for array in run.net.state().values():
        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    checksums = run.ranks.gather([checksum])    # empty but on the first rank
    if len(set(checksums)) > 1:
        raise RuntimeError(f"the ranks' weights differ after step {run.step:,}: are their "
                           "machines and libraries alike?")


# -------------------------------------------------------------------------------- progress

def begin_progress(run):
    """The progress of the epoch under way; loader and ranks go on from its waiting times."""
    epoch = run.current
    run.loader.waited = epoch.photos_waited
    run.ranks.waited = epoch.ranks_waited
    batch = run.options.batch
    return console.Progress(f"epoch {run.epoch + 1}", run.steps_per_epoch * batch, "images",
                            sys.stdout, epoch.steps * batch, epoch.seconds)


def note_times(run, progress):
    """Note what the epoch's steps took so far, for a checkpoint."""
    run.current.seconds = progress.seconds()
    run.current.photos_waited = run.loader.waited
    run.current.ranks_waited = run.ranks.waited


def show_progress(run, progress):
    """Count a batch, and show the time left, the objective, the waiting if it is time to.

    A narrow terminal shows the first of these alone.
    """
    progress.done += run.options.batch
    note_times(run, progress)
    if not progress.is_due():
        return
    notes = []
    end = describe_end(run, progress)
    if end:
        notes.append(end)
    loss = loss_since_shown(run)
    if loss is not None:
        notes.append(f"objective {loss:.4f}")
    notes.append(describe_waiting(run, progress))
    progress.show(", ".join(notes))


def describe_end(run, progress):
    """In what time training will be over, by --epochs or, at the earliest, by patience; or ""."""
    options = run.options
    patience = patience_of(options)
    if options.epochs:
        last = options.epochs
    elif patience and run.index.held_out:
        best = best_epoch(run.log)
        last = patience + (best["epoch"] if best else 1)
    else:
        return ""
    epochs_left = last - run.epoch - 1          # after this one
    scoring = run.log[-1]["scoring_seconds"] if run.log else 0      # which follows each epoch
    seconds = progress.left() + scoring
    seconds += epochs_left * (progress.total / progress.rate() + scoring)
    if options.epochs:
        return f"{console.duration(seconds)} for all epochs"
    return f"ends {patience} epochs after the best (in {console.duration(seconds)} or more)"


def loss_since_shown(run):
    """The mean loss of this rank's rows since progress was last shown; None if there are none."""
    epoch = run.current
    total_loss = sum_losses(run)
    total_weight = float(epoch.weights.sum())
    loss = total_loss - epoch.shown_loss
    weight = total_weight - epoch.shown_weight
    epoch.shown_loss = total_loss
    epoch.shown_weight = total_weight
    return loss / weight if weight else None


def describe_waiting(run, progress):
    """The parts of the epoch's time that were spent waiting; on a GPU, only its queue waits."""
    seconds = progress.seconds()
    text = f"waited for photos {run.loader.waited / seconds:.0%}"
    if run.ranks.size > 1 and kernels.memory() is None:
        text += f" and for other ranks {run.ranks.waited / seconds:.0%}"
    return text


def sum_losses(run):
    """The losses of this rank's rows, summed over the epoch's steps; waits for a GPU."""
    total = float(kernels.to_host(run.current.losses).sum())
    if not math.isfinite(total):
        raise divergence(run, f"the loss is {total:.4g}")
    return total


def divergence(run, what):
    """The error that ends a run whose loss or weights are beyond reason."""
    return RuntimeError(f"{what} at step {run.step:,}: {describe_saved(run)}; lower --lr "
                        f"({run.schedule.rate:g})")


# ---------------------------------------------------------------------------- save and resume

def save(run, trying_again=False):
    """Write model.npz, and after the best epoch best.npz.

    If that fails, the reason is printed, and the next save tries again.
    """
    sum_losses(run)                             # which raises unless they are finite
    weights = run.net.state()
    check_weights(run, weights)                 # the last update may have diverged
    facts = collect_facts(run)
    words = run.index.dictionary
    written = False
    if run.ranks.rank == 0:
        run.write_error = None
        if best_is_due(run):
            run.unsaved_best = data.Checkpoint(weights, {}, facts, words)
        if run.unsaved_best:
            save_best(run, trying_again)
        checkpoint = data.Checkpoint(weights, run.sgd.v, facts, words)
        written = write_checkpoint(run, "model.npz", checkpoint, trying_again)
    if run.ranks.broadcast(written):
        run.saved = run.step
    run.saved_at = time.monotonic()


def save_best(run, trying_again):
    """Write best.npz; what the disk does not take is kept for the next save."""
    best = run.unsaved_best
    if write_checkpoint(run, "best.npz", best, trying_again):
        run.saved_best = best.facts["step"]
        run.unsaved_best = None
        return
    copies = {}                                 # the next step changes the weights in place
    for name, array in best.weights.items():
        copies[name] = np.array(kernels.to_host(array))
    run.unsaved_best = best._replace(weights=copies)


def check_weights(run, weights):
    """RuntimeError unless all weights are finite."""
    for array in weights.values():
        if not np.isfinite(array).all():
            raise divergence(run, "a weight is nan")


def best_is_due(run):
    """Whether the weights are those of the best epoch, and best.npz does not hold them yet."""
    best = best_epoch(run.log)
    return best is not None and best["step"] == run.step and run.saved_best != run.step


def collect_facts(run):
    """What a checkpoint holds besides arrays, from all ranks; later steps change nothing of it."""
    losses = run.ranks.gather(kernels.to_host(run.current.losses).tolist())
    weights = run.ranks.gather(run.current.weights.tolist())
    return {
        "order": ORDER,
        "options": vars(run.options),
        "step": run.step,
        "epoch": run.epoch,
        "under_way": {"steps": run.current.steps, "final_steps": run.current.final_steps,
                      "losses": losses, "weights": weights, "seconds": run.current.seconds,
                      "photos_waited": run.current.photos_waited,
                      "ranks_waited": run.current.ranks_waited},
        "log": list(run.log),
        "plateau": dict(vars(run.schedule)),
        "digest": run.index.facts["digest"],
        "counts": run.index.counts.tolist(),
        "training": run.index.training,
        "label_frequency": run.label_frequency.tolist(),
        "label_weight": run.label_weight.tolist(),
        "trained_on": run.trained_on,
        "skipped": gather_skipped(run)}


def gather_skipped(run):
    """{name: what is wrong} of the photos that any rank skipped; complete on the first rank."""
    return dict(run.ranks.gather(run.loader.skipped.items()))


def write_checkpoint(run, name, checkpoint, trying_again):
    """Write a checkpoint; False, and a line that says why, if the disk does not take it."""
    try:
        data.save_checkpoint(run.path(name), checkpoint)
    except OSError as error:
        run.write_error = error
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _, needed = disk_bytes(run)
            remedy = f"; saving needs {needed / 1e6:,.0f} MB, free some space"
        if trying_again and waiting_may_help(run):
            remedy += f"; trying again in {RETRY_SECONDS} s"
        print(f"step {run.step:,}: {run.path(name)} is not saved: {error.strerror or error}"
              f"{remedy}", file=sys.stderr, flush=True)
        return False
    return True


def describe_saved(run):
    """What of this run is on the disk."""
    path = run.path("model.npz")
    if run.saved is None:
        text = "nothing was saved yet"
    elif os.path.exists(path):
        text = f"{path} is of step {run.saved:,}"
    else:
        text = f"nothing is saved, {path} was removed"
    if run.unsaved_best:
        text += f"; best.npz lacks step {run.unsaved_best.facts['step']:,}, the best"
    return text


def restore(run, checkpoint):
    """Go on exactly where the checkpoint was written."""
    facts = checkpoint.facts
    check_arrays(checkpoint.velocities, run.sgd.v, run.options.out)
    for name, v in run.sgd.v.items():
        v[...] = kernels.to_device(checkpoint.velocities[name])
    run.step = facts["step"]
    run.saved = facts["step"]
    run.epoch = facts["epoch"]
    run.log = facts["log"]
    vars(run.schedule).update(facts["plateau"])
    run.loader.skipped.update(facts["skipped"])
    under_way = dict(facts["under_way"])
    losses = np.array(under_way.pop("losses"))[run.rows]
    weights = np.array(under_way.pop("weights"))[run.rows]
    run.current = Epoch(kernels.to_device(losses), weights, **under_way)
    reason = stop_reason(run)
    if reason:
        print(f"this run is finished; to train on, change {reason}", flush=True)
    else:
        print(f"going on at step {run.step:,}, epoch {run.epoch + 1}", flush=True)


def check_arrays(arrays, expected, out):
    """ValueError unless a checkpoint's arrays have the names, shapes and types of this run's."""
    if describe_arrays(arrays) != describe_arrays(expected):
        raise ValueError(f"{out}/model.npz does not fit its own options, or it is damaged; choose "
                         "another --out")


def describe_arrays(arrays):
    """{name: (shape, type)} of {name: array}."""
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


# -------------------------------------------------------------------- files for people to look at

def write_files(run):
    """Texts and pictures for people to look at; losing one of them never ends a run."""
    skipped = gather_skipped(run)               # by all ranks
    if run.ranks.rank:
        return
    try:
        write_texts(run, skipped)
        draw_pictures(run)
    except OSError as error:
        print(f"{run.options.out}: text or picture not written: {error.strerror or error}",
              file=sys.stderr)


def write_texts(run, skipped):
    """words.txt, log.jsonl and skipped.txt."""
    words = zip(run.index.dictionary, run.index.counts)
    refused = dict.fromkeys(run.index.facts["refused_names"], "refused: outside --images")
    problems = {**skipped, **refused}
    write_lines(run.path("words.txt"), [f"{word}\t{count}" for word, count in words])
    write_lines(run.path("log.jsonl"), [json.dumps(console.without_nan(row)) for row in run.log])
    write_lines(run.path("skipped.txt"), [f"{name}\t{why}" for name, why in problems.items()])


def write_lines(path, lines):
    """A text file of these lines."""
    with console.whole_file(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        for line in lines:
            file.write(line + "\n")


def draw_pictures(run):
    """curves.png with curves.csv, once there is an epoch, and filters.png."""
    if run.log:
        best = best_epoch(run.log)
        mark = (best["epoch"], f"best weights, of epoch {best['epoch']}") if best else ()
        plots = evaluation.curves_plots(run.log, run.options.loss, mark)
        evaluation.save_plots(run.path("curves.png"), plots)
    filters = evaluation.filters_picture(kernels.to_host(run.net.first.w))
    evaluation.save_image(filters, run.path("filters.png"))


# ------------------------------------------------------------------------------------ the end

def finish(run, finished):
    """Save, show what the best weights learned, and say what to do next."""
    saved = save_at_last(run)
    write_files(run)
    if finished:
        show_scores(run, saved)
    skipped = gather_skipped(run)
    if skipped:
        name, why = next(iter(skipped.items()))
        print(f"skipped {len(skipped):,} photos, e.g. {name}: {why}; "
              f"all: {run.path('skipped.txt')}")
    if not saved:
        raise RuntimeError(f"not all of step {run.step:,} could be saved: {describe_saved(run)}")
    kinds = ("best.npz", ".jsonl", ".png", ".csv", ".txt")
    files = [name for name in sorted(os.listdir(run.options.out)) if name.endswith(kinds)]
    print(f"{describe_saved(run)}; beside it: {', '.join(files)}")
    photo = None
    if finished:
        photo = example_photo(run)
        show_example(run, photo)
    print(f"next: {next_command(run, photo)}")


def save_at_last(run):
    """Save what is not on the disk yet, for an hour if waiting may help; False if in vain."""
    if not run.ranks.broadcast(save_is_due(run)):
        return True
    for tries_left in range(RETRIES, -1, -1):
        save(run, trying_again=tries_left > 0)
        if not run.ranks.broadcast(save_is_due(run)):
            return True
        if not tries_left or not run.ranks.broadcast(waiting_may_help(run)):
            return False
        time.sleep(RETRY_SECONDS)


def waiting_may_help(run):
    """Whether what went wrong with the last save is such that it may pass."""
    return run.write_error is None or run.write_error.errno not in LASTING


def save_is_due(run):
    """Whether something of this run is not on the disk."""
    return (run.saved != run.step or best_is_due(run) or run.unsaved_best is not None
            or not os.path.exists(run.path("model.npz")))           # somebody may have removed it


def show_scores(run, saved):
    """Load the best weights, if they are saved, and print their scores, or else the last ones'."""
    if saved:
        path = data.find_checkpoint(run.options.out)
        checkpoint = data.load_checkpoint(path)
        run.net.load(checkpoint.weights)
        print(evaluation.describe_checkpoint(path, checkpoint.facts))
        best = best_epoch(run.log)
        if best and best["step"] != checkpoint.facts["step"]:
            print(f"epoch {best['epoch']} was better, but its weights could not be saved")
    features, photos = read_features(run, validation_photos(run.index))
    scores = score_photos(run, features, photos)
    if photos:                                  # the first rank has them, if there are any
        scores.update(score_by_truth(run, features, photos))
    if scores:
        evaluation.print_words(scores, evaluation.Output())


def score_by_truth(run, features, photos):
    """{"truth": evaluation.truth_metrics} of pictures that were drawn; {} of others."""
    names = [run.index.name(photo) for photo in photos]
    rows, targets = evaluation.match_photos(read_truth(run), names)
    if not rows:
        return {}
    scorer = make_scorer(run, features[rows])
    return {"truth": evaluation.truth_metrics(scorer, targets, run.index.dictionary)}


def read_truth(run):
    """The index of what a run truly drew, in the words of its dictionary; () of other runs."""
    options = run.options
    if not options.drawn:
        return ()
    source = data.Source(drawn.truth_file(options.out), images=options.images)
    text = data.Text(options.words, options.stop_words, options.valid)
    folder = os.path.join(options.out, "index-truth")
    return data.build_index(source, folder, text, run.index.dictionary)


def show_example(run, photo):
    """Print the words of a photo's captions and, of one that was drawn, what it shows."""
    if run.ranks.rank:
        return
    name = run.index.name(photo)
    print(f"for example, {name} has the words {name_words(run, run.index.words(photo))}")
    _, targets = evaluation.match_photos(read_truth(run), [name])
    for classes in targets:                     # of a drawn run
        print(f"what it shows is {name_words(run, classes)}")


def next_command(run, photo):
    """The command to paste now, whatever the names in it are and wherever one stands.

    It tags a photo, or, with None, goes on with the run.
    """
    out = shlex.quote(run.options.out)
    if photo is None:
        return f"python {script_path('weak.py')} --resume --out {out}"
    path = shlex.quote(run.loader.folder.find(run.index.name(photo)))
    return f"python {script_path('eval.py')} tag --model {out} {path}"


def script_path(name):
    """The path of a script beside this one, as a shell takes it."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    return shlex.quote(min(os.path.relpath(path), path, key=len))


def name_words(run, classes):
    """The words of these classes, as a person reads them."""
    return ", ".join(run.index.dictionary[k] for k in classes)


def example_photo(run):
    """The held-out photo of whose words the weights are surest together; photo 0 without any.

    So it is one that the weights and its caption agree on, whoever is right.
    """
    features, photos = read_features(run, validation_photos(run.index)[:EXAMPLES])
    best = 0
    if photos:                                  # the first rank has them, if there are any
        blocks = [kernels.to_host(s) for _, s in make_scorer(run, features).photo_blocks()]
        p = run.held_out_loss.probabilities(np.concatenate(blocks))             # (n, K)
        sureness = [p[i, run.index.words(photo)].sum() for i, photo in enumerate(photos)]
        best = photos[int(np.argmax(sureness))]
    return run.ranks.broadcast(best)


if __name__ == "__main__":
    console.run_command(main)
