"""Captions → words → dictionary → index → draws → batches of pixels (paper, §3: data).

The captions are read once. Their words are counted, and written with the photo's name into one of
256 files by the hash of that name. Then the counts choose the dictionary, and each file is grouped
by photo and appended to the index: arrays on the disk, opened by memory map. So memory does not
grow with the photos, and the held-out ones, those of the smallest hashes, come first in the index.
"""
import binascii
import bz2
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kernels.console import Progress, write_json
from kernels.cpu import host_empty
from kernels.philox import DRAWS, NEGATIVES, philox

STOP_WORDS = 500                # the most frequent words, left out (paper, §3)
FEW_STOP_WORDS = 50             # … where there are not
MANY = 1_000_000                # captions
WORDS = 1000                    # K: 1,000, 10,000 or 100,000 in the paper
POSITIVES = "drawn", "all", "balanced"
ATTEMPTS = 8                    # photos tried for a drawn word before its row counts nothing

BUCKETS = 256                   # files of records, by the first byte of the name's hash
BLOCK_BYTES = 4 << 20           # captions a process takes at a time
LONGEST_LINE = 64 << 20
SWALLOWED = 20                  # lines without the other quote: nobody closed it
MOST_COUNTED = 2_000_000        # distinct words counted at a time: rare ones are dropped beyond
SMALL_FILE = 8 << 20            # captions files below this are indexed without other processes
INDEX_VERSION = 5
COLUMNS = "names", "name_ends", "words", "word_ends", "photos", "photo_ends"
FILES = "words.json", *(f"{name}.npy" for name in COLUMNS)          # of an index, with index.json
HASH = 32                       # letters of a photo's hash in the YFCC100M table

FORMATS = ("tsv", "csv", "jsonl", "coco", "yfcc")
NO_TEXT = (                     # what files hold at a place that are no captions, and what to do
    (0, b"PK", "a zip archive or an Excel workbook; unpack it, or save the sheet as CSV"),
    (0, b"PAR1", "a Parquet table; save it as CSV, e.g. by pandas' read_parquet and to_csv"),
    (257, b"ustar", "an archive; unpack it"), (0, b"SQLite", "a database; save its table as CSV"))
LARGEST = 256 << 20             # bytes of a plausible photo
MOST_FILES = 2_000_000          # of a folder, known by nearly their names
AHEAD = 2                       # batches of photos under way besides the one in use
DIGESTS = 500_000               # photos whose contents are remembered
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")   # of this machine, bytes
PICTURES = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
NAME_KEYS = ("file_name", "filename", "image", "image_name", "photo", "file", "path", "name",
             "image_path", "filepath", "image_id")
TEXT_KEYS = ("caption", "text", "comment", "captions", "sentence", "title", "description", "tags",
             "alt_text", "keywords")
EMOJI = re.compile("[\u2600-\u27bf\U0001f000-\U0001faff]")
NO_NAME = re.compile("[\0\n\ud800-\udc7f\udd00-\udfff]")           # no file is called so


# === text =========================================================================================
class _Letters(dict):
    """What each character becomes in `words_of`, None where it goes; filled as they are met."""

    JOINING = "'’‘ʼ`´-‐‑."                      # don't → dont, tri-colored → tricolored, u.s. → us
    KEEP = "йўї"                                # letters of their own, not accented ones

    def __missing__(self, code):
        c = chr(code)
        if "\udc80" <= c <= "\udcff":           # a byte that is not UTF-8: Windows' Latin letters
            c = bytes([code & 0xFF]).decode("cp1252", "replace").lower()
        category, script = unicodedata.category(c), unicodedata.name(c, "").partition(" ")[0]
        if (c in self.JOINING or category in ("Cf", "Me") or "\u0300" <= c <= "\u036f"
                or "\ufe00" <= c <= "\ufe0f"):  # gone, the letters around it join
            c = None
        elif category[0] in "PSZC" or category == "No":
            c = " "
        elif script in ("LATIN", "GREEK", "CYRILLIC") and c not in self.KEEP:   # others' are vowels
            c = "".join(part for part in unicodedata.normalize("NFD", c)
                        if not unicodedata.combining(part))
        return self.setdefault(code, c)


_LETTERS = _Letters()
_ASCII = bytes(ord(_LETTERS[code] or " ") for code in range(128)).ljust(256)    # the same rule
_ASCII_GONE = bytes(code for code in range(128) if _LETTERS[code] is None)


def words_of(caption):
    """The words of one caption (paper, §3: text): lower-case, without accents, no digits alone."""
    text = caption.lower()
    if text.isascii():                          # many times faster than by characters
        text = text.encode().translate(_ASCII, _ASCII_GONE).decode()
    else:
        text = unicodedata.normalize("NFC", text).translate(_LETTERS)
    return [word for word in text.split() if not word.isdecimal()]


class Text(NamedTuple):
    """What decides which words are classes and which photos are held out."""
    words: int = WORDS              # K
    stop_words: int | None = None   # the most frequent ones, left out; None: by the size
    valid: float = 0.1              # fraction of the photos that is held out


def choose_words(counts, text, captions):
    """The stop words, K words, whose places are their classes, and the rest, by frequency."""
    ranked, stop = sorted(sorted(counts), key=counts.get, reverse=True), text.stop_words
    if stop is None:
        stop = min(STOP_WORDS if captions >= MANY else FEW_STOP_WORDS, len(ranked) // 20)
    words = ranked[stop:stop + text.words]
    if not words:
        raise ValueError(f"none of {len(ranked)} words is left; lower --stop-words or --valid")
    return ranked[:stop], words, ranked[stop + text.words:]


# === reading core: the index and the draws ========================================================
class Index:
    """photo → words and word → training photos, by memory map; the first photos are held out."""

    def __init__(self, folder):
        self.folder = folder
        self.facts, self.dictionary = (
            json.loads(Path(folder, name).read_bytes()) for name in ("index.json", "words.json"))
        self.held_out = self.facts["held_out"]
        for name in COLUMNS:
            setattr(self, "_" + name, np.load(f"{folder}/{name}.npy", mmap_mode="r"))
        self.training = len(self) - self.held_out                   # they follow the others
        self.labels = len(self._words)          # words of all photos together
        self.counts = np.diff(self._photo_ends, prepend=0)          # (K,) N_k, training photos

    def __len__(self):
        return len(self._word_ends)

    def name(self, photo):
        """The photo's name below the images folder."""
        return bytes(_take(self._names, self._name_ends, photo)).decode("utf-8", "surrogateescape")

    def words(self, photo):
        """The classes of a photo's words, ascending."""
        return np.asarray(_take(self._words, self._word_ends, photo))

    def photos(self, word):
        """The training photos that carry a word."""
        return _take(self._photos, self._photo_ends, word)

    def share(self, sampling, positives="drawn"):
        """The share of the training rows that have each word as a target, (K,)."""
        k, counts = len(self.dictionary), self.counts
        if sampling == "image":
            return counts / self.training
        if positives == "drawn":
            return np.full(k, 1 / k)
        share = np.zeros(k)
        for start in range(self.held_out, len(self), 1_000_000):    # bounded memory
            ends = self._word_ends[max(0, start - 1):start + 1_000_000].astype(int)
            sizes = np.diff(ends, prepend=0)[start > 0:]
            words = self._words[ends[-1] - sizes.sum():ends[-1]]
            photos = np.repeat(np.arange(len(sizes)), sizes)
            chance = np.bincount(photos, 1 / (k * counts[words]))   # of each photo to be drawn
            share += np.bincount(words, chance[photos], k)
        return share


def _take(values, ends, i):
    """List i of lists that lie one after the other."""
    return values[ends[i - 1] if i else 0:ends[i]]


class Labels(NamedTuple):
    """What a step scores."""
    targets: np.ndarray             # int32 (N, T) columns of the scores, padded with -1
    weights: np.ndarray             # (N,), 0 for a row that does not count
    share: np.ndarray               # (K,) share of the training rows that carry each word
    classes: np.ndarray = None      # int32 (C,) words that are scored, ascending; None: all K
    chance: np.ndarray = None       # (C,) of each to be scored where a row does not carry it
    parts: np.ndarray = None        # (N, T) of a row's weight that its targets have; None: each all


class Draws:
    """The photos and labels of one step, a pure function of (seed, step, row, attempt).

    Sampling by class: a word uniformly, then one of its photos uniformly; the drawn word is the
    row's only target (paper, §3: class balancing). By image: a photo uniformly, with all its words.
    Positives other than "drawn" make all words of a photo targets by class, too: "all" alike, and
    "balanced" with the chance that each of them was the one drawn, which is (1/N_k) / Σ_j 1/N_j
    over the photo's words. That is the mean of the drawn word's loss, given the photo: so the
    gradient has the same expectation, and no larger variance (Rao and Blackwell).

    Row i of attempt a takes the block of Philox counter (i, step, a, DRAWS): word, photo, crop
    and flip. With one target, a photo that cannot be read is replaced by another of its word.
    part: a rank's rows.
    """

    def __init__(self, index, seed, step, count, sampling="class", part=slice(None),
                 positives="drawn"):
        self.index, self.seed, self.step, self.sampling = index, seed, step, sampling
        self.positives = positives if sampling == "class" else "all"
        self.count, self.rows = count, range(count)[part]
        raw = philox(seed, (0, step, 0, DRAWS)).random_raw(4 * count).reshape(count, 4)
        self.words = [_below(r, len(index.dictionary)) for r in raw[:, 0]]
        self.everyone = [self._photo(i, raw[i, 1]) for i in range(count)]
        self.photos, self.pixels = self.everyone[part], raw[part, 2]
        self.targets = [[word] for word in self.words] if self.positives == "drawn" else [
            index.words(photo) for photo in self.everyone]
        self.attempts = np.zeros(len(self.rows), int)
        self.weights = np.full(len(self.rows), 1 / count, np.float32)

    def _photo(self, row, raw):
        if self.sampling == "image":
            return self.index.held_out + _below(raw, self.index.training)
        photos = self.index.photos(self.words[row])
        return int(photos[_below(raw, len(photos))])

    def retry(self, row):
        """Another photo for the row of `photos`, or None once it counts nothing."""
        self.attempts[row] += 1
        if self.positives != "drawn" or self.attempts[row] >= ATTEMPTS:
            self.weights[row] = 0
            return None
        counter = self.rows[row], self.step, int(self.attempts[row]), DRAWS
        self.photos[row] = self._photo(self.rows[row], philox(self.seed, counter).random_raw(4)[1])
        return self.photos[row]

    def labels(self, share, targets="all", negatives=0):
        """What the step scores: all words, those of its batch ("batch"), or some more ("sampled").

        To the words of the whole batch, "sampled" adds `negatives`: one drawn uniformly from each
        of as many runs of classes. The chance is that of a class where one row does not carry it:
        another of the B rows does, with probability 1 - (1 - share)^(B-1), or its run gave it.
        """
        words = pad_rows([self.targets[row] for row in self.rows])  # (N, T); share: (K,)
        parts = None
        if self.positives == "balanced":
            parts = np.where(words < 0, 0, 1 / self.index.counts[words])
            parts /= parts.sum(axis=1, keepdims=True)
        if targets == "all":
            return Labels(words, self.weights, share, parts=parts)
        k, count = len(share), min(negatives, len(share)) if targets == "sampled" else 0
        ends = np.arange(count + 1) * k // max(1, count)
        runs = np.diff(ends)
        raw = philox(self.seed, (0, self.step, 0, NEGATIVES)).random_raw(len(runs)) >> 32
        drawn = ends[:-1] + (raw * runs.astype(np.uint64) >> 32).astype(int)
        classes = np.union1d(np.concatenate(self.targets), drawn).astype(np.int32)      # (C,)
        absent = (1 - share[classes]) ** (self.count - 1)           # from the other rows
        if count:
            absent *= 1 - 1 / runs[np.searchsorted(ends, classes, side="right") - 1]
        return Labels(columns(words, classes), self.weights, share, classes, 1 - absent, parts)

    def crops(self, spare, random):
        """top, left (N,) and flip (N,): random ones, or the centre (paper, §3)."""
        if not random:
            return centre(len(self.photos), spare)
        top, left = (((self.pixels >> bit) & 0xFFFF) * (spare + 1) >> 16 for bit in (0, 16))
        return top.astype(np.int64), left.astype(np.int64), (self.pixels >> 32 & 1).astype(bool)


def _below(raw, n):
    """A uniform number below n from 64 random bits."""
    return int(raw) * int(n) >> 64


def columns(targets, classes):
    """Where targets (N, T), padded with -1, stand among the classes (C,): columns of scores."""
    return np.where(targets < 0, -1, np.searchsorted(classes, targets)).astype(np.int32)


def centre(count, spare):
    """top, left (N,) and flip (N,) of central crops."""
    middle = np.full(count, spare // 2)
    return middle, middle, np.zeros(count, bool)


def pad_rows(rows):
    """Rows of different lengths as one int32 array, padded with -1."""
    out = np.full((len(rows), max([1, *map(len, rows)])), -1, np.int32)
    for row, values in zip(out, rows):
        row[:len(values)] = values
    return out


# === photos =======================================================================================
class Gone(ValueError):
    """A photo that is not to be had now: its disk may come back."""


def decode(path, size, square=True):
    """A photo as uint8 (size, size, 3), rescaled to a square (paper, §3), and its content's hash.

    RGB, turned as the camera was; if not `square`, the longer side has that size. ValueError: why.
    """
    warnings.filterwarnings("ignore", module="PIL", append=True)    # in all threads at once
    try:
        length = os.path.getsize(path)
        if not os.path.isfile(path):
            raise OSError("not a file")         # a pipe would keep us waiting
        if not 0 < length <= LARGEST:
            raise OSError("too large for a photo" if length else "zero bytes")
        content = Path(path).read_bytes()
        image = Image.open(io.BytesIO(content), formats=PICTURES)
        image.draft("RGB", (size, size))        # JPEG: decode at a fraction of the size
        image = _to_rgb(ImageOps.exif_transpose(image))
        shape = (size, size) if square else ImageOps.contain(image, (size, size)).size
        image = image.resize(shape, Image.Resampling.BILINEAR, reducing_gap=2.0)
        return np.asarray(image), hashlib.blake2b(content, digest_size=8).digest()
    except UnidentifiedImageError:
        raise ValueError("not a picture") from None
    except OSError as error:
        kind = Gone if error.errno else ValueError
        raise kind((error.strerror or str(error)).splitlines()[0].lower()) from None
    except Exception as error:                  # broken files raise anything from deep inside
        raise ValueError(f"cannot be decoded ({error!r:.150})") from None


def _to_rgb(image):
    """Any mode as RGB: 16 bits scaled down, transparent parts on white."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image).astype(np.float64)
        top = 65535 if image.mode.startswith("I") else max(1e-9, float(np.nanmax(pixels)))
        image = Image.fromarray((np.nan_to_num(pixels) / top * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def refused(name):
    """True for a name that is absolute or leaves the images folder."""
    return name[:1] in "/\\" or ".." in name and ".." in name.replace("\\", "/").split("/")


def is_picture(path):
    """True for the name of a picture file, by its ending."""
    return Image.registered_extensions().get(os.path.splitext(path)[1].lower()) in PICTURES


def walk_files(folder):
    """Paths of the files in a folder and below it, but for hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (os.path.join(place, name) for name in sorted(names) if name[0] != ".")


def list_photos(folder):
    """Names of the picture files in a folder and below it, told by their ending, in order."""
    names = sorted(os.path.relpath(path, folder) for path in walk_files(folder) if is_picture(path))
    if not names:
        raise ValueError(f"there is no picture in {folder} or its sub-folders")
    return names


class Folder:
    """Finds photos below a folder: by their names or, but for case and ending, in sub-folders.

    A YFCC100M name, hash/id.jpg, may be id.jpg or, as that set is stored, abc/def/abcdef….jpg.
    """

    def __init__(self, folder):
        self.folder, self.real = folder, os.path.realpath(folder)
        self.lock, self.map = threading.Lock(), None

    def find(self, name):
        """The path of the photo's file; where there is none, of the file it should be."""
        if self.folder and refused(name):       # without a folder, names are paths
            name = os.path.basename(name)
        names = [name]
        if name[HASH:HASH + 1] == "/":
            code, ending = name[:HASH], os.path.splitext(name)[1]
            names += [name[HASH + 1:], f"{code[:3]}/{code[3:6]}/{code}{ending}"]
        paths = [os.path.join(self.folder, name) for name in names]
        found = itertools.chain(paths, self._find_near(names))      # which looks only if need be
        return next(filter(os.path.exists, found), paths[0])

    def check(self, path):
        """The path; ValueError if links lead from it out of the folder."""
        if self.folder and os.path.commonpath([self.real, os.path.realpath(path)]) != self.real:
            raise ValueError("a link that leads out of the images folder")
        return path

    def _find_near(self, names):
        """Paths of files with a name but for the folder, for case and ending; the best first."""
        with self.lock:                         # one thread makes the map, the others wait
            if self.map is None:
                self.map = defaultdict(list)    # {stem in lower case: paths}
                for path in itertools.islice(walk_files(self.folder), MOST_FILES):
                    self.map[_base(os.path.splitext(path)[0]).casefold()].append(path)
        for base in map(_base, names):
            low = base.casefold()
            near = [(_base(path) != base, _base(path).casefold() != low, path)
                    for stem in {low, os.path.splitext(low)[0]} for path in self.map.get(stem, ())]
            yield from (path for other, _, path in sorted(near) if not other or is_picture(path))


def _base(path):
    """The name of a file without its folder, which may be Windows'."""
    return unicodedata.normalize("NFC", path.replace("\\", "/").rpartition("/")[2])


def drawn_sources(run):
    """Where a run keeps the photos and captions that it drew."""
    return {"images": f"{run}/drawn/photos", "captions": f"{run}/drawn/captions.tsv"}


def check_photos(folder, index, most=2000):
    """Say how many of `most` photos have other names or are not there; ValueError if none is."""
    find = Folder(folder).find                  # their order is a random one
    paths = {name: find(name) for name in map(index.name, range(min(len(index), most)))}
    other = [f"{name} is {path}" for name, path in paths.items()
             if path != os.path.join(folder, name)]
    gone = [name for name, path in paths.items() if not os.path.exists(path)]
    if len(gone) == len(paths) and not any(
            os.path.exists(find(index.name(i))) for i in range(most, len(index))):
        raise ValueError(f"none of the captions' photos, as {gone[0]!r}, is in {folder}, which has "
                         f"{next(walk_files(folder), 'nothing')!r}; check --images")
    for some, what in (other, "have another name or place"), (gone, "are not there"):
        if some:
            print(f"photos: {len(some):,} of {len(paths):,} {what}, e.g. {some[0]}")


class Listed:
    """Given photos, in their order and without replacement: a plan for evaluation."""

    def __init__(self, photos):
        self.photos = list(photos)
        self.weights = np.ones(len(self.photos), np.float32)

    def retry(self, row):
        self.weights[row] = 0


class Loader(AbstractContextManager):
    """Decodes photos in threads, some batches ahead, and keeps some in a quarter of the memory.

    name(i): the name of photo i of `photos`; share: how many loaders this machine has; empty(shape)
    makes a batch's memory. With 0 workers photos are decoded here, for whole tracebacks. `skipped`
    maps a photo's name to what is wrong, `digests` its number to the hash of its content.
    """

    def __init__(self, folder, name, photos, size, workers=0, share=1, empty=host_empty):
        self.folder, self.name, self.shape = Folder(folder), name, (size, size, 3)
        self.room = min(photos, MEMORY // 4 // share // (3 * size * size))
        self.workers, self.pool = workers, ThreadPoolExecutor(workers or 1)
        self.kept, self.broken, self.skipped, self.digests = {}, {}, {}, {}
        self.waited, self.empty = 0.0, empty

    def close(self, *_):
        """End the threads."""
        self.pool.shutdown(cancel_futures=True)

    __exit__ = close

    def batches(self, plans):
        """(plan, uint8 (N, S, S, 3), blank where a weight is 0) of each plan: Listed or Draws."""
        plans, running = iter(plans), deque()
        while True:
            for plan in itertools.islice(plans, AHEAD + 1 - len(running)):
                pixels, fills = self.empty((len(plan.photos), *self.shape)), []
                for row, photo in enumerate(plan.photos):
                    fill = functools.partial(self._fill, plan, row, pixels[row])
                    here = photo in self.kept or not self.workers
                    fills.append(fill if here else self.pool.submit(fill).result)
                running.append((plan, pixels, fills))
            if not running:
                return
            plan, pixels, fills = running.popleft()
            started = time.monotonic()
            for photo, digest, broken in (fill() for fill in fills):
                self.skipped.update(broken)
                if photo is not None and self.skipped:              # it may have come back
                    self.skipped.pop(self.name(photo), None)
                if photo is not None and len(self.digests) < DIGESTS:
                    self.digests[photo] = digest
            self.waited += time.monotonic() - started
            yield plan, pixels

    def read(self, photos, progress=None):
        """(numbers (n,), pixels uint8 (n, S, S, 3)) of those that can be read, 64 at a time."""
        plans = (Listed(photos[i:i + 64]) for i in range(0, len(photos), 64))
        for plan, pixels in self.batches(plans):
            good = np.flatnonzero(plan.weights)
            if len(good):
                yield np.array(plan.photos)[good], pixels[good]
            if progress:
                progress.tick(len(plan.photos))

    def _fill(self, plan, row, out):
        """Write the row's photo or another into `out` (S, S, 3): it, its digest, {unread: why}."""
        photo, broken = plan.photos[row], {}
        while photo is not None:
            name = self.name(photo)
            try:
                if photo in self.broken:        # it is not read at every draw
                    raise ValueError(self.broken[photo])
                found = self.kept.get(photo) or decode(
                    self.folder.check(self.folder.find(name)), len(out))
                if len(self.kept) < self.room:
                    self.kept[photo] = found
                out[:], digest = found
                return photo, digest, broken
            except ValueError as error:
                broken[name] = str(error)
                if not isinstance(error, Gone):
                    self.broken[photo] = str(error)
                photo = plan.retry(row)
        out[:] = 0
        return None, None, broken


# === building the index ===========================================================================
def build_index(path, folder, text, kind=None, dictionary=None, processes=0):
    """The Index of a captions file, kept in `folder`; dictionary: its words, or chosen if None."""
    kind = kind or recognise(path)
    if (index := cached_index(path, folder, text, kind, dictionary)) is not None:
        return index
    origin = fingerprint(path, kind, text, dictionary)
    if os.path.isdir(folder) and not {*FILES, "index.json"}.issuperset(os.listdir(folder)):
        raise ValueError(f"{folder} holds other things than an index; move them away")
    work = folder + ".part"
    if os.path.isdir(work):
        print("starting the index again: it was not finished", file=sys.stderr, flush=True)
        shutil.rmtree(work)
    try:
        os.makedirs(work)
        facts = _write_index(work, path, text, kind, dictionary, processes)
        facts |= {"fingerprint": origin, "files": checksums(work)}
        write_json(f"{work}/index.json", facts)
        for name in FILES:                      # all of it reaches the disk before its name
            with open(f"{work}/{name}", "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)       # what is left of it if killed, is noticed
        os.rename(work, folder)
    finally:                                    # the disk may be full
        shutil.rmtree(work, ignore_errors=True)
    return Index(folder)


def cached_index(path, folder, text, kind, dictionary=None):
    """The index in `folder` if it was built from this captions file with these options, or None."""
    origin = fingerprint(path, kind, text, dictionary)
    if os.path.isdir(folder):
        with suppress(Exception):               # a damaged file raises anything
            index = Index(folder)
            used = {} if text.stop_words is None else {"stop_words": index.facts.get("stop_words")}
            if {**index.facts["fingerprint"], **used} != origin:
                return None
            if index.facts["files"] == checksums(folder):
                return index
        print(f"the index in {folder} is damaged: making it again", file=sys.stderr, flush=True)
    return None


def checksums(folder):
    """{name: [size, CRC-32]} of an index's files."""
    contents = {name: np.memmap(f"{folder}/{name}", np.uint8, "r") for name in FILES}
    return {name: [len(content), zlib.crc32(content)] for name, content in contents.items()}


def fingerprint(path, kind, text, dictionary):
    """Of the captions file (size, time, sampled blocks) and all that decides the index."""
    digest = hashlib.blake2b("\n".join(dictionary or []).encode(), digest_size=8)
    with open_captions(path) as (_, file):
        size, time_changed = file.seek(0, os.SEEK_END), os.stat(path).st_mtime_ns
        block = size if os.path.isdir(path) else 4096
        for start in np.linspace(0, max(0, size - block), 16).astype(int):
            file.seek(start)
            digest.update(file.read(block))
    return {"version": INDEX_VERSION, "size": size, "mtime": time_changed,
            "content": digest.hexdigest(), "format": kind, **text._asdict()}


def _write_index(work, path, text, kind, dictionary, processes):
    """Write records of all words, choose the dictionary, group the records; returns facts."""
    counts, facts, away, shown = Counter(), Counter(), [], []
    size, paths = os.path.getsize(path), [f"{work}/{i:03}.records" for i in range(BUCKETS)]
    processes = 0 if size < SMALL_FILE else processes
    function = functools.partial(record_block, kind=kind, text=text)
    with ExitStack() as stack, Progress("reading captions", size >> 20, "MB") as progress:
        files = [stack.enter_context(open(record, "wb")) for record in paths]
        for some, names, found, records in _map(function, blocks(path, kind, progress), processes):
            facts.update(some)
            away = (away + names)[:100]
            counts.update(found)
            if len(counts) > MOST_COUNTED:      # drop the rarest, so that memory is bounded
                most = sorted(counts.values())[-MOST_COUNTED // 2 - 1]
                counts = Counter({word: n for word, n in counts.items() if n > most})
            for file, record in zip(files, records):
                file.write(record)
    if not facts["words"]:
        why = "see --format"
        if os.path.isdir(path):
            why = "it needs photo.txt beside photo.jpg; or name a file by --captions"
        if away:
            why = f"names like {away[0]!r} lead out of --images; give photos' paths below it"
        raise ValueError(f"captions: {path}, read as {kind}, has no word of a photo: {why}")
    facts["stop_words"] = text.stop_words
    if not dictionary:
        stop, dictionary, rest = choose_words(counts, text, facts["captions"])
        facts["stop_words"], facts["rest"] = len(stop), len(rest)
        shown = [*stop[:3], *stop[3:][-2:], *rest[:3]]
    write_json(f"{work}/words.json", dictionary)
    facts.update(_group(work, paths, dictionary, text, processes))
    _invert(work, len(dictionary), facts["held_out"])
    return {**facts, "refused_names": away, "left_out": [(word, counts[word]) for word in shown]}


def _map(function, items, processes):
    """Results of function(item) in order, by so many processes, which read only little ahead."""
    if not processes:
        yield from map(function, items)
        return
    before = os.environ.get("PYTHONSAFEPATH", "")
    os.environ["PYTHONSAFEPATH"] = "1"          # the processes import nothing of this folder
    context, running = multiprocessing.get_context("spawn"), deque()
    try:
        with ProcessPoolExecutor(processes, context, _begin_process) as pool:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > 2 * processes:
                    yield running.popleft().result()
            yield from (future.result() for future in running)
    except BrokenExecutor:
        raise RuntimeError("an indexing process died (of memory?); try --workers 0") from None
    finally:
        os.environ["PYTHONSAFEPATH"] = before


def _begin_process():
    """Leave Ctrl-C to the parent, and end when it ends, which may have been killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def record_block(block, kind, text):
    """Facts of a block of captions, the names refused, the counts of training words, and records.

    A record for each of the 256 files: names, how many words each photo has, and the words. As
    classes are not known yet, these are hashes of 64 bits; two of 10^7 are equal by 3·10⁻⁶.
    """
    pairs, bad = parse(block, kind)
    away = dict.fromkeys(name for name, _ in pairs if refused(name))
    photos, words = (defaultdict(itertools.count().__next__) for _ in range(2))     # numbers
    owners, tokens = [], []                     # of each word
    for name, caption in pairs:
        if name not in away:
            found = words_of(caption)
            owners += itertools.repeat(photos[name], len(found))
            tokens += map(words.__getitem__, found)
    names = [name.encode("utf-8", "surrogateescape") for name in photos]
    hashes, codes = hash_all(names, 4), hash_all(map(str.encode, words), 8)
    owners, tokens = np.array(owners, int), np.array(tokens, int)
    train = (hashes >= text.valid * 2**32)[owners]
    counts = np.bincount(tokens[train], minlength=len(words)).tolist()
    order = np.argsort(hashes >> 24, kind="stable")                 # photos by file
    names, sizes, distinct = _distinct(names, owners, tokens, len(words), order)
    ends = np.searchsorted(hashes[order] >> 24, np.arange(BUCKETS + 1))
    places = np.append(0, np.cumsum(sizes))[ends]
    records = [pickle.dumps((names[a:b], sizes[a:b], codes[distinct[c:d]]))
               for (a, b), (c, d) in zip(*map(itertools.pairwise, (ends, places)))]
    facts = {"captions": len(pairs), "bad_lines": bad, "refused": len(away), "words": len(tokens),
             "emoji": sum(not text.isascii() and bool(EMOJI.search(text)) for _, text in pairs)}
    return facts, list(away), {word: n for word, n in zip(words, counts) if n}, records


def _distinct(names, owners, words, k, order):
    """Names in that order, how many of k words each has, and the words; owners: whose they are."""
    labels = np.sort(np.argsort(order)[owners] * k + words)         # np.unique is much slower
    photos, words = np.divmod(labels[np.diff(labels, prepend=-1) > 0], k)
    return [names[i] for i in order], np.bincount(photos, minlength=len(names)), words


def hash_all(texts, size):
    """The hashes of texts (bytes), unsigned numbers of `size` bytes: always the same ones."""
    joined = b"".join([hashlib.blake2b(text, digest_size=size).digest() for text in texts])
    return np.frombuffer(joined, f">u{size}").astype(f"u{size}")


def _group(work, records, dictionary, text, processes):
    """Group every file of records and append it to the index's columns; returns facts."""
    codes = hash_all(map(str.encode, dictionary), 8)
    classes = np.argsort(codes)
    call = functools.partial(group_records, codes=codes[classes], classes=classes, valid=text.valid)
    paths = [f"{work}/{name}.npy" for name in ("names", "words", "name_ends", "word_ends")]
    facts, lengths = Counter(), [0, 0, 0, 0]
    with Progress("grouping captions", BUCKETS, "parts") as progress:
        for some, names, words, name_ends, word_ends in _map(call, records, processes):
            columns = names, words, name_ends + lengths[0], word_ends + lengths[1]
            lengths = list(map(_append, paths, columns, lengths))
            facts.update(some)
            progress.tick()
    return facts


def _append(path, values, length):
    """Append to an .npy file, whose header has room for any length; returns the new one."""
    header = {"descr": values.dtype.str, "fortran_order": False, "shape": (length + len(values),)}
    with open(path, "r+b" if length else "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(0, os.SEEK_END)
        file.write(values.data)
    return length + len(values)


def group_records(path, codes, classes, valid):
    """Facts of a file of records, which it removes, photos' names and words, and their ends.

    Held-out photos come first, those without words are left out. codes (K,): the hashes of the
    dictionary's words, ascending; classes (K,): whose they are.
    """
    photos, records = defaultdict(itertools.count().__next__), []
    with open(path, "rb") as file:
        while file.peek(1):
            records.append(pickle.load(file))
    os.remove(path)
    names, sizes, hashes = zip(*records)
    owners = [photos[name] for name in itertools.chain(*names)]
    names, hashes = list(photos), np.concatenate(hashes)
    held = hash_all(names, 4) < valid * 2**32
    order = np.argsort(~held, kind="stable")
    place = np.minimum(np.searchsorted(codes, hashes), len(codes) - 1)
    known = codes[place] == hashes
    owners = np.repeat(np.array(owners, int), np.concatenate(sizes))[known]
    names, sizes, words = _distinct(names, owners, classes[place[known]], len(codes), order)
    used = np.flatnonzero(sizes)
    facts = {"held_out": int(held[order[used]].sum()), "without_words": len(names) - len(used)}
    names = [names[i] for i in used]
    return (facts, np.frombuffer(b"".join(names), np.uint8), words.astype(np.int32),
            np.cumsum([len(name) for name in names], dtype=np.int64), np.cumsum(sizes[used]))


def _invert(work, k, held, size=2_000_000):
    """photo → words becomes word → training photos, by counting sort through memory maps."""
    words, ends = (np.load(f"{work}/{name}.npy", mmap_mode="r") for name in ("words", "word_ends"))
    first, counts = int(ends[held - 1]) if held else 0, np.zeros(k, np.int64)
    for start in range(first, len(words), size):
        counts += np.bincount(words[start:start + size], minlength=k)
    np.save(f"{work}/photo_ends.npy", np.cumsum(counts))
    photos = np.lib.format.open_memmap(f"{work}/photos.npy", "w+", "u4", (int(counts.sum()),))
    place = np.cumsum(counts) - counts          # where the next photo of each word goes
    for start in range(first, len(words), size):
        part = words[start:start + size].astype(np.int64)
        photo = np.searchsorted(ends, np.arange(start, start + len(part)), side="right")
        part, photo = np.divmod(np.sort(part << 32 | photo), 1 << 32)
        counts = np.bincount(part, minlength=k)
        fresh = np.cumsum(counts) - counts                          # first of each word's run
        photos[(place - fresh)[part] + np.arange(len(part))] = photo
        place += counts


# === formats of captions ==========================================================================
@contextmanager
def open_captions(path):
    """The captions as (stream, file): the stream unpacks gzip and bzip2, told by content."""
    try:
        with _folder_captions(path) if os.path.isdir(path) else open(path, "rb") as file:
            magic = file.read(3)
            if not magic:
                raise ValueError(f"captions: {path} is empty; it needs lines of photo<TAB>caption")
            file.seek(0)
            yield (gzip.open(file) if magic[:2] == b"\x1f\x8b" else
                   bz2.open(file) if magic == b"BZh" else file), file
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"captions: {path} is damaged or not to be read ({error})") from None


def _folder_captions(folder):
    """A folder of photos as JSON lines: photo.txt by each photo.jpg, or names of sub-folders."""
    paths = {name: Path(folder, name).with_suffix(".txt") for name in list_photos(folder)}
    texts = {name: path.read_text("utf-8-sig", "replace")
             for name, path in paths.items() if path.is_file()}
    rows = ({"file_name": name, "caption": texts.get(name, "") if texts else os.path.dirname(name)}
            for name in paths)
    return io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())


def recognise(path):
    """The format of a captions file, by its content: one of FORMATS."""
    with open_captions(path) as (stream, _):
        head = stream.read(1 << 16) + stream.readline(LONGEST_LINE)
    for place, magic, what in NO_TEXT if b"\0" in head else ():
        if head.startswith(magic, place):
            raise ValueError(f"captions: {path} is {what}")
    text = head.decode("utf-8-sig", "replace")
    if sum(text.count(c) for c in "\ufffd\0") > len(text) / 10:
        raise ValueError(f"captions: {path} is not text in UTF-8 (UTF-16?); save it as UTF-8")
    if "\r" in text and "\n" not in text:
        raise ValueError(f"captions: {path} has no line ends but \\r; convert them to \\n")
    line = text.lstrip().partition("\n")[0].strip()
    if line.startswith(("{", "[")):
        return "jsonl" if _json_pair(line)[0] else "coco"
    if _yfcc_pair(line) != ("", ""):
        return "yfcc"
    if _csv_header(line) or line.lower().startswith("sep="):
        return "csv"
    found = re.split("[,;|]", line)
    if len(found) > 1 and text.count("\t") < text.count("\n") / 2:
        raise ValueError(f"captions: {path} has the columns {', '.join(found)[:200]}, and needs "
                         f"one of {', '.join(NAME_KEYS)}, and some of {', '.join(TEXT_KEYS)}")
    return "tsv"


def blocks(path, kind, progress=None):
    """The captions in blocks for `parse`: bytes of whole lines, or lists of pairs."""
    with open_captions(path) as (stream, file):
        if kind in ("csv", "coco"):
            pairs = _csv_pairs(stream, path) if kind == "csv" else _coco_pairs(stream, path)
            found = iter(lambda: list(itertools.islice(pairs, 50_000)), [])
        else:
            found = iter(lambda: stream.read(BLOCK_BYTES) + stream.readline(LONGEST_LINE), b"")
        for block in found:
            if progress:
                progress.tick((file.tell() >> 20) - progress.done)
            yield block


def parse(block, kind):
    """(name, caption) pairs of a block, and how many of its lines are none."""
    if isinstance(block, bytes):
        text = block.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        block = map({"tsv": _tsv_pair, "jsonl": _json_pair, "yfcc": _yfcc_pair}[kind],
                    filter(str.strip, text.split("\n")))
    pairs = [(name.strip(), caption) for name, caption in filter(None, block)]
    good = [pair for pair in pairs if pair[0] and not NO_NAME.search(pair[0])]
    return good, len(pairs) - len(good)


def _tsv_pair(line):
    """photo<TAB>caption; `photo#0` numbers the captions of a photo."""
    name, tab, caption = line.partition("\t")
    stem, mark, number = name.rstrip().rpartition("#")
    return (stem if mark and number.isdigit() else name) if tab else "", caption


def _json_pair(row):
    """Photo and text of a JSON object, or of a line with one; all of TEXT_KEYS count."""
    with suppress(ValueError, RecursionError):
        row = json.loads(row) if isinstance(row, str) else row
    row = {_key(key): value for key, value in row.items()} if isinstance(row, dict) else {}
    name = next((row[key] for key in NAME_KEYS if key in row), None)
    texts = [row[key] for key in TEXT_KEYS if key in row]
    parts = [part for text in texts for part in (text if isinstance(text, list) else [text])]
    return str(name or ""), " ".join(str(part) for part in parts if part is not None)


def _key(name):
    """A column's name as in NAME_KEYS and TEXT_KEYS: "File Name" is file_name."""
    return "_".join(name.strip().strip('"').lower().split())


def _csv_header(line):
    """(delimiter, column of the photo, columns of text, width) of a CSV header, or None."""
    for delimiter in (",", "\t", ";", "|"):
        names = list(map(_key, line.split(delimiter)))
        photo = next((names.index(key) for key in NAME_KEYS if key in names), None)
        texts = [i for i, name in enumerate(names) if name in TEXT_KEYS]
        if photo is not None and texts:
            return delimiter, photo, texts, len(names)
    return None


def _csv_pairs(stream, path):
    csv.field_size_limit(sys.maxsize)
    lines = (line.decode("utf-8", "surrogateescape").replace("\r", " ") for line in stream)
    header = next(lines, "").removeprefix("\ufeff")
    if header.lower().startswith("sep="):       # Excel's
        header = next(lines, "")
    if not _csv_header(header):
        raise ValueError(f"captions: the first line of {path} names no columns `image,caption`")
    delimiter, photo, texts, width = _csv_header(header)
    more = width if texts[-1] == width - 1 else sys.maxsize     # columns of commas nobody quoted
    read = functools.partial(csv.reader, delimiter=delimiter, skipinitialspace=True)
    for line in lines:
        part = [line]
        while "".join(part).count('"') % 2 and len(part) <= SWALLOWED:
            part.append(next(lines, ""))
        closed = "".join(part).count('"') % 2 == 0
        for row in read(part) if closed else [next(read([line]), []) for line in part]:
            if len(row) > max(photo, texts[0]):
                yield row[photo], " ".join([*(row[i] for i in texts if i < len(row)), *row[more:]])
            elif row:
                yield "", ""


def _coco_pairs(stream, path):
    """COCO's captions, Karpathy's, whose images have sentences, or a list of objects."""
    try:
        table = json.load(stream)
        rows = list(table if isinstance(table, list) else table.get("annotations", []))
        images = [] if isinstance(table, list) else list(table["images"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"captions: {path} is neither COCO nor lines with a file_name") from None
    images = [image for image in images if isinstance(image, dict)]
    names = {str(image["id"]): image for image in images if {"id", "file_name"} <= image.keys()}
    for row in rows:
        row = row if isinstance(row, dict) else {}                  # counted as a bad line
        image = names.get(str(row.get("image_id")), {}) | {"caption": row.get("caption")}
        yield _json_pair(image if images else row)
    for image in images:
        yield from (_json_pair({**image, "caption": sentence["raw"]})
                    for sentence in image.get("sentences", ()))


def _yfcc_pair(line):
    """hash/id.jpg, or id.jpg, and title, description and tags of a YFCC100M line; None: a video."""
    columns = line.split("\t")
    url = 0 if len(columns) < 23 else next(     # the place of the page's address tells the others
        (i for i in (13, 14, 15) if columns[i].startswith("http")), 0)
    if not url:
        return "", ""
    if columns[-1].strip() == "1":
        return None
    first = int(url == 15 or (url == 14 and len(columns[1]) < HASH))        # a line number
    folder = f"{columns[first + 1]}/" * (len(columns[first + 1]) == HASH)
    name = f"{folder}{columns[first]}.{columns[-2] or 'jpg'}"
    # + and %xx: quoted-printable is the same with =, and Python decodes that eight times as fast
    text = " ".join(columns[url - 7:url - 4]).replace("+", " ").replace("=", "=3D")
    text = binascii.a2b_qp(text.replace("%", "=").encode("utf-8", "surrogateescape"))
    return name, text.decode("utf-8", "replace")
