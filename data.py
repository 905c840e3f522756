"""Everything on the disk, on its way in: captions → index → batches of photos (paper, §3: data).

In this order:

    text            a caption's words; which of all words are the classes
    index           photo → words and word → photos, in arrays on the disk
    formats         captions files of several formats, read as (photo's name, caption) pairs
    building        captions → index: count, prune, sort, index
    sampling        which photos and words a training step takes: BatchSampler
    photos          names → files → pixels; Loader decodes batches in threads, ahead of time
    checkpoints     weights and what else a run needs to go on

The captions are read once and may be more than the memory holds: one pass counts the words and
writes the captions to flat files as hashes; the counts choose the dictionary; the files are sorted
by the photo's hash and appended to the index, which is opened by memory map.
"""
import binascii
import bz2
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

import kernels
from kernels.console import Progress, whole_file, write_json
from kernels.philox import DRAWS, NEGATIVES, philox
from kernels.reference import below, crops_of

MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")   # of this machine, bytes


# === text =========================================================================================

STOP_WORDS = 500                # the most frequent words, left out (paper, §3)
FEW_STOP_WORDS = 50             # the same, where there are fewer captions than MANY
MANY = 1_000_000
WORDS = 1000                    # K: 1,000, 10,000 or 100,000 in the paper


class _Letters(dict):
    """What each character becomes in `words_of`, None where it goes; filled as they are met."""

    JOINING = "'’‘ʼ`´-‐‑."      # the letters around these join: don't → dont, u.s. → us
    OWN_LETTERS = "йўї"         # й is a letter of its own, not an и with an accent

    def __missing__(self, code):
        character = self._simplified(code)
        self[code] = character
        return character

    def _simplified(self, code):
        c = chr(code)
        if "\udc80" <= c <= "\udcff":
            # a byte that is not UTF-8 stands for a Latin letter, as Windows writes them
            c = bytes([code & 0xFF]).decode("cp1252", "replace").lower()
        category = unicodedata.category(c)
        combining_mark = "\u0300" <= c <= "\u036f"
        variation_selector = "\ufe00" <= c <= "\ufe0f"
        invisible = category in ("Cf", "Me")
        if c in self.JOINING or combining_mark or variation_selector or invisible:
            return None
        if category[0] in "PSZC" or category == "No":
            return " "
        script = unicodedata.name(c, "").partition(" ")[0]
        # in other scripts the marks are vowels, which stay
        if script in ("LATIN", "GREEK", "CYRILLIC") and c not in self.OWN_LETTERS:
            letters = unicodedata.normalize("NFD", c)
            return "".join(x for x in letters if not unicodedata.combining(x))
        return c


_LETTERS = _Letters()
# the same rule as tables of bytes, for captions in ASCII
_ASCII = bytes(ord(_LETTERS[code] or " ") for code in range(128)).ljust(256)
_ASCII_GONE = bytes(code for code in range(128) if _LETTERS[code] is None)


def words_of(caption):
    """The words of one caption (paper, §3: text): lower-case, without accents, no digits alone."""
    text = caption.lower()
    if text.isascii():                          # translating bytes is many times faster
        text = text.encode().translate(_ASCII, _ASCII_GONE).decode()
    else:
        text = unicodedata.normalize("NFC", text).translate(_LETTERS)
    return [word for word in text.split() if not word.isdecimal()]


class Text(NamedTuple):
    """What decides which words are classes and which photos are held out."""
    words: int = WORDS              # K
    stop_words: int | None = None   # how many of the most frequent are left out; None: by the size
    valid: float = 0.1              # fraction of the photos that is held out


def choose_words(counts, text, captions):
    """Three lists of words, by falling frequency: the stop words, the dictionary, and the rest.

    counts: {word: occurrences}. A word's place in the dictionary is its class. ValueError if no
    word is left.
    """
    ranked = sorted(sorted(counts), key=counts.get, reverse=True)   # ties by the alphabet
    stop = text.stop_words
    if stop is None:
        most = STOP_WORDS if captions >= MANY else FEW_STOP_WORDS
        stop = min(most, len(ranked) // 20)
    end = stop + text.words
    if not ranked[stop:end]:
        raise ValueError(f"none of {len(ranked)} words is left; lower --stop-words or --valid")
    return ranked[:stop], ranked[stop:end], ranked[end:]


# === index ========================================================================================

COLUMNS = {                     # the arrays of an index, each an .npy file
    "names": "|u1", "name_ends": "<i8",         # photo → the bytes of its name
    "words": "<i4", "word_ends": "<i8",         # photo → the classes of its words
    "photos": "<u4", "photo_ends": "<i8"}       # class → its training photos
ROWS_AT_A_TIME = 1_000_000


class Ragged:
    """Rows of different lengths: `values`, one row after the other, and where each row `ends`."""

    def __init__(self, values, ends):
        self.values = values
        self.ends = ends

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, row):
        return self.values[self._start(row):self.ends[row]]

    def _start(self, row):
        return self.ends[row - 1] if row else 0

    def counts(self):
        """How long each row is, (rows,)."""
        return np.diff(self.ends, prepend=0)

    def part(self, first, last):
        """The rows from `first` to before `last`, a view."""
        start = self._start(first)
        end = self._start(last)
        return Ragged(self.values[start:end], np.asarray(self.ends[first:last]) - start)

    def take(self, rows):
        """The rows with these numbers (n,), in that order, a copy."""
        starts = np.where(rows > 0, self.ends[rows - 1], 0)
        counts = self.ends[rows] - starts
        ends = np.cumsum(counts)
        # value j of the copy stands j - (its row's start there) after its row's start here
        shifts = np.repeat(starts - (ends - counts), counts)
        return Ragged(self.values[np.arange(len(shifts)) + shifts], ends)


class Index:
    """photo → words and word → training photos, by memory map; the first photos are held out.

    The order of the photos is that of their names' hashes, a random one. Files are not read through
    at the start: what is read later is checked against its bounds. ValueError if it is damaged.
    """

    def __init__(self, folder):
        self.folder = folder
        self.facts = _read_facts(folder)
        self.dictionary = self.facts.pop("dictionary")
        columns = {name: np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in COLUMNS}
        for name, column in columns.items():
            self._check(column.dtype.str == COLUMNS[name])
            self._check(column.shape == (self.facts["lengths"][name],))
        self._names = Ragged(columns["names"], columns["name_ends"])
        self._words = Ragged(columns["words"], columns["word_ends"])
        self.class_photos = Ragged(columns["photos"], np.array(columns["photo_ends"]))
        self.counts = self.class_photos.counts()                    # (K,) N_k, training photos
        self.held_out = self.facts["held_out"]
        self.training = len(self) - self.held_out                   # they follow the others
        self.labels = len(self._words.values)   # words of all photos together
        self._check((self.counts >= 0).all() and self.counts.sum() == len(columns["photos"]))

    def __len__(self):
        return len(self._words)

    def name(self, photo):
        """The photo's name below the images folder."""
        name = bytes(self._names[photo])
        self._check(name)
        return name.decode("utf-8", "surrogateescape")

    def words(self, photo):
        """The classes of a photo's words, ascending."""
        words = np.asarray(self._words[photo])
        self._check(len(words) and words.min() >= 0 and words.max() < len(self.dictionary))
        return words

    def photos(self, word):
        """The training photos that carry a word."""
        return self.class_photos[word]

    def check_training(self, photos):
        """ValueError if these numbers, read from `class_photos`, are not all training photos."""
        self._check((photos >= self.held_out).all() and (photos < len(self)).all())

    def _check(self, good):
        if not good:
            raise ValueError(f"the index in {self.folder} is damaged; remove that folder, and it "
                             "is made again")

    def label_frequency(self, sampling, positives):
        """The fraction of the training rows that have each word as a target, (K,)."""
        k = len(self.dictionary)
        if sampling == "image":
            return self.counts / self.training
        if positives == "drawn":
            return np.full(k, 1 / k)
        frequency = np.zeros(k)
        for words, photos in self._training_words():
            # a photo is drawn by any of its words j, with probability 1 / (K N_j)
            drawn = np.bincount(photos, 1 / (k * self.counts[words]))
            frequency += np.bincount(words, drawn[photos], k)
        return frequency

    def idf_frequency(self):
        """What each word weighs in a training photo whose words share it by `idf`, a mean, (K,)."""
        weights = idf(self.counts, self.training)                   # (K,)
        total = np.zeros_like(weights)
        for words, photos in self._training_words():
            sums = np.bincount(photos, weights[words])              # of each photo
            total += np.bincount(words, weights[words] / sums[photos], len(total))
        return total / self.training

    def _training_words(self):
        """Yield words and photos, of equal length: the words of some training photos, and whose."""
        k = len(self.dictionary)
        for start in range(self.held_out, len(self), ROWS_AT_A_TIME):
            words = self._words.part(start, min(start + ROWS_AT_A_TIME, len(self)))
            self._check((words.values >= 0).all() and (words.values < k).all())
            yield words.values, np.repeat(np.arange(len(words)), words.counts())


def _read_facts(folder):
    """What index.json holds; ValueError if that is not what was written."""
    facts = json.loads(Path(folder, "index.json").read_bytes())
    if facts.pop("checksum") != _checksum(facts):
        raise ValueError(f"{folder}/index.json is damaged")
    return facts


def _checksum(facts):
    """The CRC-32 of facts, as JSON."""
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


# === formats ======================================================================================
# A format is two functions: whether a file's first line looks like it, and a generator of (name,
# caption) pairs from lines of text, NO_CAPTION for what is none. Adding one takes a row of FORMATS.

LONGEST_LINE = 64 << 20         # characters
OPEN_QUOTE_LINES = 20           # after so many lines a quote counts as never closed
HASH = 32                       # letters of a photo's hash in the YFCC100M table
NAME_KEYS = ("file_name", "filename", "image", "image_name", "photo", "file", "path", "name",
             "image_path", "filepath", "image_id")
TEXT_KEYS = ("caption", "text", "comment", "captions", "sentence", "title", "description", "tags",
             "alt_text", "keywords")
NO_NAME = re.compile("[\0\n\ud800-\udc7f\udd00-\udfff]")           # no file is called so
NO_CAPTION = "", ""
NO_TEXT = (                     # (offset, bytes there) of files that hold no text, and what to do
    (0, b"PK", "a zip archive or an Excel workbook; unpack it, or save the sheet as CSV"),
    (0, b"PAR1", "a Parquet table; save it as CSV, e.g. by pandas' read_parquet and to_csv"),
    (257, b"ustar", "an archive; unpack it"),
    (0, b"SQLite", "a database; save its table as CSV"))


class Captions:
    """The (name, caption) pairs of a captions file, by iteration.

    `count` is how many there were, `bad_lines` how many lines or rows were none.
    """

    def __init__(self, path, kind):
        self.path = path
        self.kind = kind
        self.size = os.path.getsize(path)
        self.count = 0
        self.bad_lines = 0
        self._file = None

    def __iter__(self):
        with open_captions(self.path) as (stream, self._file):
            for name, caption in FORMATS[self.kind].pairs(_lines(stream)):
                name = name.strip()
                if not name or NO_NAME.search(name):
                    self.bad_lines += 1
                else:
                    self.count += 1
                    yield name, caption

    def bytes_read(self):
        """How much of the file was read, packed as it is."""
        return self.size if self._file.closed else self._file.tell()


def _lines(stream):
    """The lines of a stream of bytes as text, each with its \\n; too long ones in pieces."""
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="\n")
    return iter(partial(text.readline, LONGEST_LINE), "")


@contextmanager
def open_captions(path):
    """The captions as (stream, file): the stream unpacks gzip and bzip2, told by content."""
    try:
        with _folder_captions(path) if os.path.isdir(path) else open(path, "rb") as file:
            magic = file.read(3)
            file.seek(0)
            if not magic:
                raise ValueError("is empty; it needs lines of photo<TAB>caption")
            if magic.startswith(b"\x1f\x8b"):
                yield gzip.open(file), file
            elif magic == b"BZh":
                yield bz2.open(file), file
            else:
                yield file, file
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"captions: {path} is damaged or not to be read ({error})") from None
    except ValueError as error:                 # of a reader of FORMATS
        raise ValueError(f"captions: {path} {error}") from None


def _folder_captions(folder):
    """A folder of photos as JSON lines: photo.txt by each photo.jpg, or names of sub-folders."""
    names = list_photos(folder)
    texts = {}
    for name in names:
        path = Path(folder, name).with_suffix(".txt")
        if path.is_file():
            texts[name] = path.read_text("utf-8-sig", "replace")
    lines = []
    for name in names:
        caption = texts.get(name, "") if texts else os.path.dirname(name)
        lines.append(json.dumps({"file_name": name, "caption": caption}) + "\n")
    return io.BytesIO("".join(lines).encode())


def recognise(path):
    """The format of a captions file, by its content: one of FORMATS."""
    with open_captions(path) as (stream, _):
        head = stream.read(1 << 16) + stream.readline(LONGEST_LINE)
    if b"\0" in head:
        for offset, magic, what in NO_TEXT:
            if head.startswith(magic, offset):
                raise ValueError(f"captions: {path} is {what}")
    text = head.decode("utf-8-sig", "replace")
    if text.count("\ufffd") + text.count("\0") > len(text) / 10:
        raise ValueError(f"captions: {path} is not text in UTF-8 (UTF-16?); save it as UTF-8")
    if "\r" in text and "\n" not in text:
        raise ValueError(f"captions: {path} has no line ends but \\r; convert them to \\n")
    line = text.lstrip().partition("\n")[0].strip()
    kind = next(name for name, format in FORMATS.items() if format.recognises(line))
    columns = re.split("[,;|]", line)
    if kind == "tsv" and len(columns) > 1 and text.count("\t") < text.count("\n") / 2:
        raise ValueError(f"captions: {path} has the columns {', '.join(columns)[:200]}, and needs "
                         f"one of {', '.join(NAME_KEYS)}, and some of {', '.join(TEXT_KEYS)}")
    return kind


def is_tsv(line):
    """Anything is, that is no other format."""
    return True


def tsv_pairs(lines):
    """Lines of photo<TAB>caption."""
    for line in lines:
        if line.isspace():
            continue
        name, tab, caption = line.partition("\t")
        yield (_without_number(name), caption) if tab else NO_CAPTION


def _without_number(name):
    """`photo#0` numbers the captions of a photo."""
    if "#" not in name:
        return name
    photo, _, number = name.rstrip().rpartition("#")
    return photo if number.isdigit() else name


def is_jsonl(line):
    """An object with the name of a photo."""
    name, _ = _line_pair(line)
    return line.startswith(("{", "[")) and name != ""


def jsonl_pairs(lines):
    """Lines with a JSON object each."""
    for line in lines:
        if line.isspace():
            continue
        yield _line_pair(line)


def _line_pair(line):
    """The pair of a line with a JSON object."""
    try:
        return _object_pair(json.loads(line))
    except (ValueError, RecursionError):
        return NO_CAPTION


def _object_pair(row):
    """The pair of a JSON object: the first of NAME_KEYS, and all of TEXT_KEYS."""
    if not isinstance(row, dict):
        return NO_CAPTION
    row = {_key(key): value for key, value in row.items()}
    name = next((row[key] for key in NAME_KEYS if key in row), None)
    texts = []
    for key in TEXT_KEYS:
        value = row.get(key)
        texts += value if isinstance(value, list) else [value]
    return str(name or ""), " ".join(str(text) for text in texts if text is not None)


def _key(name):
    """A column's name as in NAME_KEYS and TEXT_KEYS: "File Name" is file_name."""
    return "_".join(name.strip().strip('"').lower().split())


def is_coco(line):
    """JSON of any kind."""
    return line.startswith(("{", "["))


def coco_pairs(lines):
    """COCO's captions, Karpathy's, whose images have sentences, or a list of objects."""
    try:
        table = json.loads("".join(lines))
        if isinstance(table, list):
            table = {"annotations": table, "images": []}
        rows = list(table.get("annotations", []))
        images = list(table["images"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("is neither COCO nor lines with a file_name") from None
    images = [image for image in images if isinstance(image, dict)]
    yield from _annotation_pairs(rows, images)
    for image in images:
        for sentence in image.get("sentences", ()):
            yield _object_pair({**image, "caption": sentence["raw"]})


def _annotation_pairs(rows, images):
    """The pairs of COCO's annotations; without images the rows have the names themselves."""
    by_id = {str(image["id"]): image for image in images if {"id", "file_name"} <= image.keys()}
    for row in rows:
        if images and isinstance(row, dict):
            image = by_id.get(str(row.get("image_id")), {})
            row = {**image, "caption": row.get("caption")}
        yield _object_pair(row)


def is_csv(line):
    """A header, or what Excel writes above it."""
    return line.lower().startswith("sep=") or _csv_columns(line) is not None


def csv_pairs(lines):
    """Lines below a header that names the columns."""
    csv.field_size_limit(sys.maxsize)
    lines = (line.replace("\r", " ") for line in lines)
    header = next(lines, "")
    if header.lower().startswith("sep="):
        header = next(lines, "")
    columns = _csv_columns(header)
    if columns is None:
        raise ValueError("names no columns `image,caption` in its first line")
    for row in _csv_rows(lines, columns.delimiter):
        if len(row) > max(columns.photo, columns.texts[0]):
            texts = [row[i] for i in columns.texts if i < len(row)]
            if columns.texts[-1] == columns.count - 1:
                texts += row[columns.count:]    # the last text's commas, which nobody quoted
            yield row[columns.photo], " ".join(texts)
        elif row:
            yield NO_CAPTION


class _Columns(NamedTuple):
    """The columns of a CSV table."""
    delimiter: str
    photo: int
    texts: list
    count: int


def _csv_columns(header):
    """The columns that a line names, or None."""
    for delimiter in (",", "\t", ";", "|"):
        names = [_key(name) for name in header.split(delimiter)]
        photo = next((names.index(key) for key in NAME_KEYS if key in names), None)
        texts = [i for i, name in enumerate(names) if name in TEXT_KEYS]
        if photo is not None and texts:
            return _Columns(delimiter, photo, texts, len(names))
    return None


def _csv_rows(lines, delimiter):
    """Rows of a CSV table; a quote that is never closed spoils its own line alone."""
    read = partial(csv.reader, delimiter=delimiter, skipinitialspace=True)
    for line in lines:
        quoted = [line]
        quotes = line.count('"')
        while quotes % 2 and len(quoted) <= OPEN_QUOTE_LINES:
            quoted.append(next(lines, ""))
            quotes += quoted[-1].count('"')
        if quotes % 2 == 0:
            yield from read(quoted)
            continue
        for line in quoted:
            yield next(read([line]), [])


def is_yfcc(line):
    """A line with a page's address at its place."""
    return _yfcc_url(line.split("\t")) is not None


def yfcc_pairs(lines):
    """Lines of the YFCC100M table; videos are left out."""
    for line in lines:
        if line.isspace():
            continue
        columns = line.split("\t")
        url = _yfcc_url(columns)
        if url is None:
            yield NO_CAPTION
        elif columns[-1].strip() != "1":        # a video
            yield _yfcc_name(columns, url), _yfcc_text(columns, url)


def _yfcc_url(columns):
    """The place of the page's address, which tells where the other columns are; None: nowhere."""
    if len(columns) < 23:
        return None
    return next((i for i in (13, 14, 15) if columns[i].startswith("http")), None)


def _yfcc_name(columns, url):
    """hash/id.jpg, or id.jpg where there is no hash."""
    numbered = url == 15 or (url == 14 and len(columns[1]) < HASH)  # the lines begin with a number
    first = 1 if numbered else 0
    name = f"{columns[first]}.{columns[-2] or 'jpg'}"
    code = columns[first + 1]
    return f"{code}/{name}" if len(code) == HASH else name


def _yfcc_text(columns, url):
    """Title, description and tags, which are encoded as in a URL."""
    text = " ".join(columns[url - 7:url - 4]).replace("+", " ")
    # %xx of a URL is =xx of quoted-printable, which Python decodes eight times as fast
    text = text.replace("=", "=3D").replace("%", "=")
    return binascii.a2b_qp(text.encode("utf-8", "surrogateescape")).decode("utf-8", "replace")


class Format(NamedTuple):
    """A format of captions."""
    recognises: Callable            # the first line -> bool
    pairs: Callable                 # all lines -> (name, caption) pairs


FORMATS = {                     # the first that recognises a file's first line reads it
    "jsonl": Format(is_jsonl, jsonl_pairs),
    "coco": Format(is_coco, coco_pairs),
    "yfcc": Format(is_yfcc, yfcc_pairs),
    "csv": Format(is_csv, csv_pairs),
    "tsv": Format(is_tsv, tsv_pairs)}


# === building =====================================================================================
# count: one pass over the captions counts their words, and writes them to flat files as hashes
# prune: the most frequent words and the rare ones are left out; the others are the dictionary
# sort:  each set of these files is sorted by the hash of the photo's name: captions of a photo come
#        to stand beside each other, and the held-out photos, those of the smallest hashes, first
# index: photo → words is written set after set, and then turned round into word → photos

INDEX_VERSION = 7
BATCH_CHARACTERS = 8 << 20      # captions hashed at a time
MOST_COUNTED = 2_000_000        # distinct words counted at a time: rare ones are dropped beyond
SET_BYTES = 32 << 20            # captions of a set, which is sorted in memory
UNPACKED = 5                    # about how many times larger a packed file is when unpacked
REFUSED_LISTED = 100
CAPTION = np.dtype([("photo", "u8"), ("name_size", "u4"), ("word_count", "u4")])


def build_index(path, folder, text, kind=None, dictionary=None):
    """The Index of a captions file, kept in `folder`; dictionary: its words, or chosen if None."""
    kind = kind or recognise(path)
    index = cached_index(path, folder, text, kind, dictionary)
    if index is not None:
        return index
    if os.path.isdir(folder) and not _index_files().issuperset(os.listdir(folder)):
        raise ValueError(f"{folder} holds other things than an index; move them away")
    origin = fingerprint(path, kind, text, dictionary)
    work = folder + ".part"
    if os.path.isdir(work):
        print("starting the index again: it was not finished", file=sys.stderr, flush=True)
        shutil.rmtree(work)
    try:
        os.makedirs(work)
        facts = _write_index(work, path, text, kind, dictionary)
        _write_facts(work, {**facts, "fingerprint": origin})
        shutil.rmtree(folder, ignore_errors=True)       # what a kill leaves of it is noticed
        os.rename(work, folder)
    finally:                                    # the disk may be full
        shutil.rmtree(work, ignore_errors=True)
    return Index(folder)


def cached_index(path, folder, text, kind, dictionary=None):
    """The index in `folder` if it was built from this captions file with these options, or None."""
    if not os.path.isdir(folder):
        return None
    expected = fingerprint(path, kind, text, dictionary)
    try:
        index = Index(folder)
        found = dict(index.facts["fingerprint"])
    except Exception:                           # a damaged file raises anything
        print(f"the index in {folder} is damaged, or of another version: making it again",
              file=sys.stderr, flush=True)
        return None
    if text.stop_words is not None:             # the number chosen then may be named now
        found["stop_words"] = index.facts["stop_words"]
    return index if found == expected else None


def fingerprint(path, kind, text, dictionary):
    """Of the captions file (size, time, sampled blocks) and all that decides the index."""
    digest = hashlib.blake2b("\n".join(dictionary or []).encode(), digest_size=8)
    with open_captions(path) as (_, file):
        size = file.seek(0, os.SEEK_END)
        block = size if os.path.isdir(path) else 4096
        for start in np.linspace(0, max(0, size - block), 16).astype(int):
            file.seek(start)
            digest.update(file.read(block))
    return {"version": INDEX_VERSION, "size": size, "mtime": os.stat(path).st_mtime_ns,
            "content": digest.hexdigest(), "format": kind, **text._asdict()}


def _index_files():
    """The names of an index's files; words.json was one until version 5."""
    return {"index.json", "words.json", *(f"{name}.npy" for name in COLUMNS)}


def _write_facts(work, facts):
    """Write index.json, the last file of an index, when all others have reached the disk.

    It has a digest of all that training sees of the captions, wherever they are and however packed.
    """
    lengths = {}
    digest = hashlib.blake2b("\n".join(facts["dictionary"]).encode(), digest_size=16)
    for name in COLUMNS:
        with open(f"{work}/{name}.npy", "rb") as file:
            os.fsync(file.fileno())
            digest.update(hashlib.file_digest(file, "blake2b").digest())
        lengths[name] = len(np.load(f"{work}/{name}.npy", mmap_mode="r"))
    facts = {**facts, "lengths": lengths, "digest": digest.hexdigest()}
    write_json(f"{work}/index.json", {**facts, "checksum": _checksum(facts)})


def _write_index(work, path, text, kind, dictionary):
    """Count, sort, prune, index; returns the facts."""
    captions = Captions(path, kind)
    records = Records(work, _number_of_sets(path))
    tally = _count_captions(captions, records, text.valid)
    if not tally.words:
        raise ValueError(f"captions: {path}, read as {kind}, has no word of a photo: "
                         + _why_no_word(path, tally.refused_names))
    facts = {"captions": captions.count, "bad_lines": captions.bad_lines, "words": tally.words,
             "refused": tally.refused, "refused_names": tally.refused_names[:REFUSED_LISTED],
             "stop_words": text.stop_words, "rest": 0, "left_out": []}
    if not dictionary:
        stop, dictionary, rest = choose_words(tally.occurrences, text, captions.count)
        # the most frequent and the rarest of the stop words, the most frequent of the rest
        examples = [*stop[:3], *stop[3:][-2:], *rest[:3]]
        facts["stop_words"] = len(stop)
        facts["rest"] = len(rest)
        facts["left_out"] = [(word, tally.occurrences[word]) for word in examples]
    facts |= _sort_captions(work, records, dictionary, text.valid)
    _write_class_photos(work, len(dictionary), facts["held_out"])
    return {**facts, "dictionary": dictionary}


def _number_of_sets(path):
    """How many sets of captions are each sorted in memory: as many as the file's size needs."""
    size = os.path.getsize(path)
    with open_captions(path) as (stream, file):
        if stream is not file:
            size *= UNPACKED
    return 1 + size // SET_BYTES


def _why_no_word(path, refused_names):
    """What to do about captions without any word."""
    if refused_names:
        return f"names like {refused_names[0]!r} lead out of --images; give photos' paths below it"
    if os.path.isdir(path):
        return "it needs photo.txt beside photo.jpg; or name a file by --captions"
    return "see --format"


# --- count

@dataclass
class Tally:
    """What the pass over the captions counts."""
    occurrences: Counter = field(default_factory=Counter)   # {word: how often}, training photos'
    words: int = 0                                          # all of them
    refused: int = 0                                        # names that lead out of the folder
    refused_names: list = field(default_factory=list)       # some of them


def _count_captions(captions, records, valid):
    """The Tally of the captions, which are written to `records`."""
    tally = Tally()
    with Progress("reading captions", captions.size >> 20, "MB") as progress:
        for batch in _batches(captions):
            batch = _leave_out_refused(batch, tally)
            _count_batch(batch, tally, records, valid)
            if len(tally.occurrences) > MOST_COUNTED:
                _drop_rarest(tally.occurrences)
            progress.tick((captions.bytes_read() >> 20) - progress.done)
    return tally


def _leave_out_refused(batch, tally):
    """The pairs of a batch, but for names that lead out of the images folder."""
    outside = {name for name, _ in batch if refused(name)}
    tally.refused += len(outside)
    if len(tally.refused_names) < REFUSED_LISTED:
        tally.refused_names += sorted(outside)
    return [(name, caption) for name, caption in batch if name not in outside]


def _batches(pairs):
    """Lists of pairs with some BATCH_CHARACTERS each."""
    batch = []
    characters = 0
    for pair in pairs:
        batch.append(pair)
        characters += len(pair[0]) + len(pair[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def _count_batch(batch, tally, records, valid):
    """Count the words of a batch, and write its captions to `records`."""
    words, tokens = _tokenize(caption for _, caption in batch)
    hashes, names = _hash_captions(name for name, _ in batch)
    word_hashes = hash_all([word.encode() for word in words], 8)
    records.append(hashes, names, Ragged(word_hashes[tokens.values], tokens.ends))
    training = np.repeat(~is_held_out(hashes, valid), tokens.counts())          # (tokens,)
    times = np.bincount(tokens.values[training], minlength=len(words)).tolist()
    tally.occurrences.update({word: n for word, n in zip(words, times) if n})
    tally.words += len(tokens.values)


def _tokenize(captions):
    """The distinct words of captions, and a Ragged of each caption's words as numbers of these."""
    tokens = []
    ends = []
    for caption in captions:
        tokens += words_of(caption)
        ends.append(len(tokens))
    words, numbers = _number(tokens)
    return words, Ragged(numbers, np.array(ends, np.int64))


def _hash_captions(names):
    """The hashes (n,) of the names of n captions' photos, and these names, a Ragged of bytes."""
    names, numbers = _number(names)             # a photo often has several captions
    names = [name.encode("utf-8", "surrogateescape") for name in names]
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    joined = Ragged(np.frombuffer(b"".join(names), np.uint8), ends)
    return hash_names(names)[numbers], joined.take(numbers)


def _number(things):
    """The distinct things, in the order of their first occurrences, and each thing's number."""
    numbers = {}
    each = [numbers.setdefault(thing, len(numbers)) for thing in things]
    return list(numbers), np.array(each, np.int64)


def _drop_rarest(counts):
    """Leave at most half of MOST_COUNTED words, the most frequent, so that memory is bounded."""
    limit = sorted(counts.values())[-MOST_COUNTED // 2 - 1]
    for word in [word for word, n in counts.items() if n <= limit]:
        del counts[word]


def hash_all(texts, size):
    """The hashes of texts (bytes), unsigned numbers of `size` bytes: always the same ones."""
    joined = b"".join([hashlib.blake2b(text, digest_size=size).digest() for text in texts])
    return np.frombuffer(joined, f">u{size}").astype(f"u{size}")


def hash_names(names):
    """64 bits of each photo's name (bytes): the upper 32 hold photos out, a CRC-32 follows."""
    upper = hash_all(names, 4).astype(np.uint64)
    lower = np.array([zlib.crc32(name) for name in names], np.uint64)
    return upper << 32 | lower


def is_held_out(hashes, valid):
    """True where a photo of this hash is held out: for the smallest hashes."""
    return hashes >> 32 < valid * 2**32


class Records:
    """Captions in flat files, in sets by the hash of their photo: set 0 has the smallest ones.

    A set is three files: CAPTION rows, the bytes of the photos' names, and the hashes of the words.
    """

    def __init__(self, folder, sets):
        self.folder = folder
        self.sets = sets

    def append(self, hashes, names, words):
        """Write captions: hashes (n,) of the photos, names and words: Ragged of n rows."""
        numbers = (hashes >> 32) * self.sets >> 32                  # (n,) each caption's set
        order = np.argsort(numbers, kind="stable")
        captions = np.empty(len(hashes), CAPTION)
        captions["photo"] = hashes
        captions["name_size"] = names.counts()
        captions["word_count"] = words.counts()
        captions = captions[order]
        names = names.take(order)
        words = words.take(order)
        ends = np.searchsorted(numbers[order], np.arange(self.sets), side="right")
        start = 0
        for number, end in enumerate(ends):
            self._append(number, "captions", captions[start:end])
            self._append(number, "names", names.part(start, end).values)
            self._append(number, "words", words.part(start, end).values)
            start = end

    def _append(self, number, what, values):
        with open(self._path(number, what), "ab") as file:          # too many to stay open
            file.write(values.data)

    def _path(self, number, what):
        return f"{self.folder}/{number}.{what}"

    def take(self, number):
        """The hashes, names and words of a set, whose files are removed."""
        captions = np.fromfile(self._path(number, "captions"), CAPTION)
        names = np.fromfile(self._path(number, "names"), np.uint8)
        words = np.fromfile(self._path(number, "words"), np.uint64)
        for what in ("captions", "names", "words"):
            os.remove(self._path(number, what))
        name_ends = np.cumsum(captions["name_size"], dtype=np.int64)
        word_ends = np.cumsum(captions["word_count"], dtype=np.int64)
        return captions["photo"], Ragged(names, name_ends), Ragged(words, word_ends)


# --- sort

def _sort_captions(work, records, dictionary, valid):
    """Write the names and words of all photos, the held-out ones first; returns facts."""
    find_classes = ClassFinder(dictionary)
    facts = {"held_out": 0, "without_words": 0}
    with (RaggedWriter(f"{work}/names.npy", f"{work}/name_ends.npy", np.uint8) as all_names,
          RaggedWriter(f"{work}/words.npy", f"{work}/word_ends.npy", np.int32) as all_words,
          Progress("sorting captions", records.sets, "parts") as progress):
        for number in range(records.sets):
            hashes, names, words = _group_by_photo(*records.take(number), find_classes)
            used = np.flatnonzero(words.counts())
            facts["held_out"] += int(is_held_out(hashes[used], valid).sum())
            facts["without_words"] += len(hashes) - len(used)
            all_names.append(names.take(used))
            all_words.append(words.take(used))
            progress.tick()
    return facts


def _group_by_photo(hashes, names, words, find_classes):
    """Captions' hashes, names and words become those of photos, whose words are classes.

    Photos are in the order of their hashes, the classes of each ascending, without repetition.
    """
    order, is_first = sort_by_photo(hashes, names)
    first = order[is_first]                     # (photos,) a caption of each
    photos = np.empty(len(order), np.int64)     # (captions,) each caption's
    photos[order] = np.cumsum(is_first) - 1
    photos, classes = _distinct_labels(photos, words, find_classes)
    counts = np.bincount(photos, minlength=len(first))
    return hashes[first], names.take(first), Ragged(classes, np.cumsum(counts))


def _distinct_labels(photos, words, find_classes):
    """(photo, class) for each word of a photo that is in the dictionary, ascending, each once.

    photos (captions,), words: Ragged of hashes (captions,) -> photos and classes (labels,).
    """
    classes = find_classes(words.values)
    known = classes >= 0
    owners = np.repeat(photos, words.counts())[known]
    labels = owners * find_classes.count + classes[known]           # as one number each
    labels.sort()
    labels = labels[np.diff(labels, prepend=-1) > 0]
    return np.divmod(labels, find_classes.count)


def sort_by_photo(hashes, names):
    """An order of captions in which those of a photo follow each other, and where each begins.

    hashes (n,), names: Ragged (n,) -> order (n,) by hash, is_first (n,) bool, in that order. Names
    that have the same hash, as two of 10^7 have with probability 3e-6, are told apart.
    """
    order = np.argsort(hashes)
    ascending = hashes[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = ascending[1:] != ascending[:-1]
    again = np.flatnonzero(~is_first)
    before = names.take(order[again - 1])
    after = names.take(order[again])
    if np.array_equal(before.ends, after.ends) and np.array_equal(before.values, after.values):
        return order, is_first
    keys = [(hash, bytes(names[i])) for i, hash in enumerate(hashes.tolist())]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    is_first = [i == 0 or keys[order[i]] != keys[order[i - 1]] for i in range(len(keys))]
    return np.array(order), np.array(is_first)


class ClassFinder:
    """Classes of words from their hashes; two of 10^7 words share one with probability 3e-6."""

    def __init__(self, dictionary):
        hashes = hash_all([word.encode() for word in dictionary], 8)
        self.count = len(dictionary)
        order = np.argsort(hashes)
        self.hashes = hashes[order]
        self.classes = order.astype(np.int32)   # of these hashes

    def __call__(self, hashes):
        """(n,) hashes -> (n,) classes, -1 for words that are not in the dictionary."""
        places = np.minimum(np.searchsorted(self.hashes, hashes), self.count - 1)
        return np.where(self.hashes[places] == hashes, self.classes[places], np.int32(-1))


class RaggedWriter(AbstractContextManager):
    """Two .npy files, values and ends of a Ragged, that grow by `append`."""

    def __init__(self, values_path, ends_path, dtype):
        self.values = GrowingArray(values_path, dtype)
        self.ends = GrowingArray(ends_path, np.int64)

    def __exit__(self, *_):
        self.values.close()
        self.ends.close()

    def append(self, ragged):
        """Write the rows behind those that are there."""
        self.ends.append(ragged.ends + self.values.length)
        self.values.append(ragged.values)


class GrowingArray:
    """An .npy file of one dimension that grows; its header tells the length once it is closed."""

    def __init__(self, path, dtype):
        self.file = open(path, "wb")
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._write_header()

    def _write_header(self):
        # NumPy leaves room in the header for a length of any number of digits
        np.lib.format.write_array_header_1_0(self.file, {
            "descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)})

    def append(self, values):
        """Write values behind those that are there."""
        self.file.write(values.astype(self.dtype).data)
        self.length += len(values)

    def close(self):
        """Write the header with the length."""
        self.file.seek(0)
        self._write_header()
        self.file.close()


# --- index

def _write_class_photos(work, k, held_out):
    """photo → words becomes word → training photos, by a counting sort through memory maps."""
    words = np.load(f"{work}/words.npy", mmap_mode="r")
    ends = np.load(f"{work}/word_ends.npy", mmap_mode="r")
    start = int(ends[held_out - 1]) if held_out else 0
    parts = [slice(i, i + 2 * ROWS_AT_A_TIME)
             for i in range(start, len(words), 2 * ROWS_AT_A_TIME)]
    counts = np.zeros(k, np.int64)
    for part in parts:
        counts += np.bincount(words[part], minlength=k)
    class_ends = np.cumsum(counts)
    np.save(f"{work}/photo_ends.npy", class_ends)
    photos = np.lib.format.open_memmap(f"{work}/photos.npy", "w+", "<u4", (int(counts.sum()),))
    free = class_ends - counts                  # (K,) where the next photo of each class goes
    for part in parts:
        classes = words[part]
        places = np.arange(part.start, part.start + len(classes))
        owners = np.searchsorted(ends, places, side="right")        # whose words these are
        order = np.argsort(classes, kind="stable")
        classes = classes[order]
        counts = np.bincount(classes, minlength=k)
        first = np.cumsum(counts) - counts      # (K,) where each class begins in this part
        photos[free[classes] + np.arange(len(classes)) - first[classes]] = owners[order]
        free += counts


# === sampling =====================================================================================

POSITIVES = {                   # by how rows are sampled; the first is the default
    "class": ("drawn", "all", "balanced"),
    "image": ("all", "idf")}
ATTEMPTS = 8                    # photos tried for a drawn word before its row counts nothing
STEPS_AHEAD = 64                # sampled by class at a time


class Labels(NamedTuple):
    """What a step scores."""
    targets: np.ndarray                         # int32 (N, T) columns of the scores, padded with -1
    weights: np.ndarray                         # (N,), 0 for a row that does not count
    target_weights: np.ndarray = None           # (N, T) how a row's weight is divided; None: not
    classes: np.ndarray = None                  # int32 (C,) the words scored, ascending; None: all
    inclusion_probability: np.ndarray = None    # (C,) of each where a row does not carry it


class Batch(NamedTuple):
    """The photos of a step, and their words: a record that is never changed."""
    step: int
    rows: range                 # this rank's rows of the batch
    photos: list                # of these rows: numbers in the index
    top: np.ndarray             # (N,) where each of these rows is cropped
    left: np.ndarray
    flip: np.ndarray            # (N,) bool, whether it is mirrored
    targets: list               # the classes (T,) of each row of the whole batch


class FixedOrder(NamedTuple):
    """Photos in a given order, without replacement: a batch for evaluation."""
    photos: list


class BatchSampler:
    """The photos and labels of steps: pure functions of (seed, step, row, attempt).

    Sampling by class: a word uniformly, then one of its photos uniformly; the drawn word is the
    row's only target (paper, §3: class balancing). By image: a photo uniformly, with all its words.
    Positives other than "drawn" make all words of a photo targets by class, too: "all" alike, and
    "balanced" by the probability that each was the one drawn, which is (1/N_k) / Σ_j 1/N_j over the
    photo's words. That is the mean of the drawn word's loss, given the photo: so the gradient has
    the same expectation, and no larger variance (Rao and Blackwell). By image, the words may share
    the photo's weight by `idf` (Huang et al. 2024, SuperClass).

    Row i of attempt a takes the block of Philox counter (i, step, a, DRAWS): word, photo, crop.
    count: rows of a batch, of which `rows`, a slice, are this rank's. spare: pixels that a photo is
    larger than its crop.
    """

    def __init__(self, index, seed, count, sampling="class", positives=None, spare=0,
                 random_crops=True, rows=slice(None)):
        self.index = index
        self.seed = seed
        self.count = count
        self.sampling = sampling
        self.positives = positives or POSITIVES[sampling][0]
        self.spare = spare
        self.random_crops = random_crops
        self.rows = range(count)[rows]
        self._first_step = None                 # of those that are sampled already
        self._sampled = None                    # words, photos, top, left, flip: (steps, count)

    @cached_property
    def label_frequency(self):
        """The fraction of the training rows that have each word as a target, (K,)."""
        return self.index.label_frequency(self.sampling, self.positives)

    @cached_property
    def word_weights(self):
        """How the words of a photo share its weight, (K,), up to a factor; None if they do not."""
        if self.positives == "balanced":
            return 1 / self.index.counts
        if self.positives == "idf":
            return idf(self.index.counts, self.index.training)
        return None

    def batch(self, step):
        """The Batch of a step; fastest for one step after the other."""
        if self.sampling == "class":
            words, photos, top, left, flip = self._sample_by_class(step)
        else:
            photos, top, left, flip = self._sample_by_image(step)
        if not self.random_crops:
            top, left, flip = centre(self.count, self.spare)
        if self.positives == "drawn":
            targets = list(words[:, None])                          # (count, 1)
        else:
            targets = [self.index.words(photo) for photo in photos]
        mine = slice(self.rows.start, self.rows.stop)
        return Batch(step, self.rows, photos[mine].tolist(), top[mine], left[mine], flip[mine],
                     targets)

    def _sample_by_class(self, step):
        """words, photos, top, left and flip (count,) of a step, drawn for many steps at a time."""
        first = self._first_step
        if first is None or not first <= step < first + STEPS_AHEAD:
            class_photos, class_ends = self._on_device
            sampled = kernels.sample_by_class(
                class_photos, class_ends, self.spare, self.seed, step, STEPS_AHEAD, self.count)
            _, photos, _, _, _ = sampled
            self.index.check_training(photos)
            self._sampled = sampled
            self._first_step = step
        return [values[step - self._first_step] for values in self._sampled]

    @cached_property
    def _on_device(self):
        """The photos of each class, where this device computes."""
        photos = self.index.class_photos
        return kernels.to_device(photos.values), kernels.to_device(photos.ends)

    def _sample_by_image(self, step):
        """photos, top, left and flip (count,) of a step."""
        raw = philox(self.seed, (0, step, 0, DRAWS)).random_raw(4 * self.count)
        _, photo, crop, _ = raw.reshape(self.count, 4).T
        photos = self.index.held_out + below(photo, self.index.training)
        top, left, flip = crops_of(crop, self.spare)
        return photos, top, left, flip

    def replacement(self, batch, row, attempt):
        """The photo to try after `attempt` others of this row of batch.photos; None: no more.

        With one target, it is another photo of the same word.
        """
        if self.positives != "drawn" or attempt >= ATTEMPTS:
            return None
        row = batch.rows[row]
        photos = self.index.photos(batch.targets[row][0])
        raw = philox(self.seed, (row, batch.step, attempt, DRAWS)).random_raw(4)
        photo = photos[below(raw[1], len(photos))]
        self.index.check_training(photo)
        return int(photo)

    def labels(self, batch, available, targets="all", negatives=0, counted=None):
        """The Labels of this rank's rows; a row whose photo is not available (N,) weighs nothing.

        targets: which words are scored: "all", those of the whole "batch", or these and as many
        `negatives`, "sampled". counted: how many rows of the whole batch have a photo, so that the
        loss is their mean; if not given these rows are all.
        """
        words = pad_rows([batch.targets[row] for row in batch.rows])                # (N, T)
        if counted is None:
            counted = available.sum()
        weights = np.where(available, 1 / max(1, counted), 0).astype(np.float32)
        labels = Labels(words, weights, self._target_weights(words))
        if targets == "all":
            return labels
        if targets == "batch":
            return self._score_batch(labels, batch)
        return self._score_sampled(labels, batch, negatives)

    def _target_weights(self, words):
        """What each of the words (N, T) weighs in its row, which sums to 1; None: 1 each."""
        if self.word_weights is None:
            return None
        weights = np.where(words < 0, 0, self.word_weights[words])
        return weights / weights.sum(axis=1, keepdims=True)

    def _score_batch(self, labels, batch):
        """Labels that score the words of the whole batch alone."""
        classes = np.unique(np.concatenate(batch.targets))          # (C,)
        return _score(labels, classes, 1 - self._absent(classes))

    def _score_sampled(self, labels, batch, negatives):
        """Labels that score the batch's words and some more.

        The dictionary is cut into as many runs as there are negatives; each gives one of its words.
        """
        k = len(self.index.dictionary)
        negatives = min(negatives, k)
        if not negatives:
            return self._score_batch(labels, batch)
        ends = np.arange(negatives + 1) * k // negatives
        starts = ends[:-1]                      # (negatives,)
        lengths = np.diff(ends)
        raw = philox(self.seed, (0, batch.step, 0, NEGATIVES)).random_raw(negatives)
        sampled = starts + below(raw, lengths)
        classes = np.union1d(np.concatenate(batch.targets), sampled)                # (C,)
        run = np.searchsorted(ends, classes, side="right") - 1      # (C,) the run of each class
        absent = self._absent(classes) * (1 - 1 / lengths[run])
        return _score(labels, classes, 1 - absent)

    def _absent(self, classes):
        """The probability (C,) that no other row of the batch carries a class."""
        return (1 - self.label_frequency[classes]) ** (self.count - 1)


def idf(counts, photos):
    """What a word tells of a photo, (K,): log((1 + N) / N_k), N_k of N photos carry it.

    The 1 leaves a word of every photo some weight, since it may be a photo's only one.
    """
    return np.log((1 + photos) / counts)


def _score(labels, classes, probability):
    """Labels that score these classes alone; their targets are columns of these scores."""
    return labels._replace(targets=columns(labels.targets, classes),
                           classes=classes.astype(np.int32), inclusion_probability=probability)


def columns(targets, classes):
    """Where targets (N, T), padded with -1, stand among the classes (C,): columns of scores."""
    return np.where(targets < 0, -1, np.searchsorted(classes, targets)).astype(np.int32)


def centre(count, spare):
    """top, left (N,) and flip (N,) of central crops."""
    middle = np.full(count, spare // 2)
    return middle, middle, np.zeros(count, bool)


def pad_rows(rows):
    """Rows of different lengths as one int32 array, padded with -1."""
    longest = max([1, *(len(row) for row in rows)])
    padded = np.full((len(rows), longest), -1, np.int32)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = row
    return padded


# === photos =======================================================================================

LARGEST = 256 << 20             # bytes of a plausible photo
MOST_FILES = 2_000_000          # of a folder, known by nearly their names
AHEAD = 2                       # batches of photos under way besides the one in use
ROWS_A_TASK = 8                 # photos that a thread takes at a time
PICTURES = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


class PhotoUnavailable(ValueError):
    """A photo that cannot be read now, but perhaps later: its disk may come back."""


def decode(path, size, square=True):
    """A photo as uint8 RGB (size, size, 3), rescaled to a square (paper, §3).

    It is turned as the camera was. If not `square`, the longer side has that size. ValueError says
    what is wrong with it, PhotoUnavailable what is wrong with its disk.
    """
    warnings.filterwarnings("ignore", module="PIL", append=True)    # in all threads at once
    try:
        _check_file(path)
        # read first: an error while decoding is then the photo's, not the disk's
        image = Image.open(io.BytesIO(Path(path).read_bytes()), formats=PICTURES)
        image.draft("RGB", (size, size))        # JPEG: decode at a fraction of the size
        image = _to_rgb(ImageOps.exif_transpose(image))
        shape = (size, size) if square else ImageOps.contain(image, (size, size)).size
        image = image.resize(shape, Image.Resampling.BILINEAR, reducing_gap=2.0)
        return np.asarray(image)
    except UnidentifiedImageError:
        raise ValueError("not a picture") from None
    except OSError as error:
        kind = PhotoUnavailable if error.errno else ValueError
        raise kind((error.strerror or str(error)).splitlines()[0].lower()) from None
    except Exception as error:                  # broken files raise anything from deep inside
        raise ValueError(f"cannot be decoded ({error!r:.150})") from None


def _check_file(path):
    """OSError if a file cannot be a photo."""
    length = os.path.getsize(path)
    if not os.path.isfile(path):
        raise OSError("not a file")             # a pipe would keep us waiting
    if not length:
        raise OSError("zero bytes")
    if length > LARGEST:
        raise OSError("too large for a photo")


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
    if name.startswith(("/", "\\")):
        return True
    return ".." in name and ".." in name.replace("\\", "/").split("/")


def is_picture(path):
    """True for the name of a picture file, by its ending."""
    return Image.registered_extensions().get(os.path.splitext(path)[1].lower()) in PICTURES


def walk_files(folder):
    """Paths of the files in a folder and below it, but for hidden ones and those of a run."""
    for place, folders, names in os.walk(folder):
        if "run.lock" in names and place != folder:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(place, name)


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
        self.folder = folder
        self.real = os.path.realpath(folder)
        self.lock = threading.Lock()
        self.by_stem = None                     # {stem in lower case: paths}, made when needed

    def find(self, name):
        """The path of the photo's file; where there is none, of the file it should be."""
        if self.folder and refused(name):       # without a folder, names are paths
            name = os.path.basename(name)
        names = [name]
        if name[HASH:HASH + 1] == "/":
            code = name[:HASH]
            ending = os.path.splitext(name)[1]
            names += [name[HASH + 1:], f"{code[:3]}/{code[3:6]}/{code}{ending}"]
        paths = [os.path.join(self.folder, name) for name in names]
        for path in paths:
            if os.path.exists(path):
                return path
        return next(filter(os.path.exists, self._near_paths(names)), paths[0])

    def check(self, path):
        """ValueError if links lead from a path out of the folder."""
        if not self.folder:
            return
        try:
            real = os.path.realpath(path)
        except OSError as error:                # of the disk, while it reads a link
            raise PhotoUnavailable(str(error.strerror or error).lower()) from None
        if os.path.commonpath([self.real, real]) != self.real:
            raise ValueError("a link that leads out of the images folder")

    def _near_paths(self, names):
        """Paths of files with a name but for the folder, for case and ending; the best first."""
        with self.lock:                         # one thread makes the map, the others wait
            if self.by_stem is None:
                self.by_stem = self._map_stems()
        for base in map(_base, names):
            low = base.casefold()
            near = []
            for stem in {low, os.path.splitext(low)[0]}:
                for path in self.by_stem.get(stem, ()):
                    other_case = _base(path) != base
                    other_ending = _base(path).casefold() != low
                    if not other_ending or is_picture(path):
                        near.append((other_case, other_ending, path))
            for _, _, path in sorted(near):
                yield path

    def _map_stems(self):
        """{stem in lower case: paths} of the files below the folder."""
        by_stem = defaultdict(list)
        for path in itertools.islice(walk_files(self.folder), MOST_FILES):
            stem = os.path.splitext(path)[0]
            by_stem[_base(stem).casefold()].append(path)
        return by_stem


def _base(path):
    """The name of a file without its folder, which may be Windows'."""
    return unicodedata.normalize("NFC", path.replace("\\", "/").rpartition("/")[2])


def drawn_sources(run):
    """Where a run keeps the photos and captions that it drew."""
    return {"images": f"{run}/drawn/photos", "captions": f"{run}/drawn/captions.tsv"}


def check_photos(folder, index, most=2000):
    """Say how many of `most` photos have other names or are not there; ValueError if none is."""
    find = Folder(folder).find                  # the index has photos in a random order
    paths = {}
    for i in range(min(len(index), most)):
        name = index.name(i)
        paths[name] = find(name)
    missing = [name for name, path in paths.items() if not os.path.exists(path)]
    if len(missing) == len(paths):
        others = (find(index.name(i)) for i in range(most, len(index)))
        if not any(os.path.exists(path) for path in others):
            raise ValueError(
                f"none of the captions' photos, as {missing[0]!r}, is in {folder}, which has "
                f"{next(walk_files(folder), 'nothing')!r}; check --images")
    elsewhere = [f"{name} is {path}" for name, path in paths.items()
                 if path != os.path.join(folder, name)]
    for names, what in (elsewhere, "have another name or place"), (missing, "are not there"):
        if names:
            print(f"photos: {len(names):,} of {len(paths):,} {what}, e.g. {names[0]}")


def find_duplicates(folder, held_out, training):
    """[(held-out name, training name)] of photos below a folder whose files are the same bytes.

    Sizes are compared first, then the contents of files that have a size in common.
    """
    find = Folder(folder).find
    held_by_size = defaultdict(list)
    for name in held_out:
        held_by_size[_file_size(find(name))].append(name)
    trained_by_size = defaultdict(list)         # of the sizes that held-out photos have
    for name in training:
        size = _file_size(find(name))
        if size and size in held_by_size:
            trained_by_size[size].append(name)
    duplicates = []
    for size, names in trained_by_size.items():
        trained = {_file_digest(find(name)): name for name in names}
        for name in held_by_size[size]:
            digest = _file_digest(find(name))
            if digest and digest in trained:
                duplicates.append((name, trained[digest]))
    return duplicates


def _file_size(path):
    """Bytes of a file, 0 where there is none."""
    with suppress(OSError):
        return os.path.getsize(path)
    return 0


def _file_digest(path):
    """A hash of a file's content, None where it cannot be read."""
    with suppress(OSError):
        return hashlib.blake2b(Path(path).read_bytes()).digest()
    return None


class Loader(AbstractContextManager):
    """Decodes photos in threads, some batches ahead, and keeps some in a quarter of the memory.

    name(i): the name of photo i of `photos`; loaders: how many this machine runs; empty(shape)
    makes a batch's memory. With 0 workers photos are decoded when they are asked for, in the
    caller's thread, for whole tracebacks. `skipped` maps a photo's name to what is wrong with it,
    `waited` is for how many seconds the caller waited.
    """

    def __init__(self, folder, name, photos, size, workers=0, loaders=1,
                 empty=partial(np.empty, dtype=np.uint8)):
        self.folder = Folder(folder)
        self.name = name
        self.size = size
        self.empty = empty
        self.pool = ThreadPoolExecutor(workers or 1)
        self.map = self.pool.map if workers else map                # the latter is lazy
        self.room = min(photos, MEMORY // 4 // loaders // (3 * size * size))
        self.kept = {}                          # {photo: pixels}, at most `room`
        self.broken = {}                        # {photo: why}, which are not read again
        self.skipped = {}
        self.waited = 0.0

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the threads."""
        self.pool.shutdown(cancel_futures=True)

    def batches(self, plans, replacement=None):
        """Yield (plan, photos, pixels, available) for each plan, a Batch or FixedOrder.

        photos is a list of the N numbers that were read, with None where there is none; pixels are
        uint8 (N, S, S, 3), blank there, and available (N,) is False there. replacement(plan, row,
        attempt) tells which photo to try next where a row's cannot be read, or None.
        """
        plans = iter(plans)
        under_way = deque()
        while True:
            for plan in itertools.islice(plans, AHEAD + 1 - len(under_way)):
                pixels, results = self._begin(plan, replacement)
                under_way.append((plan, pixels, results))
            if not under_way:
                return
            plan, pixels, results = under_way.popleft()
            photos = self._finish(results)
            yield plan, photos, pixels, np.array([photo is not None for photo in photos])

    def read(self, photos, progress=None):
        """(numbers (n,), pixels uint8 (n, S, S, 3)) of those that can be read, 64 at a time."""
        plans = (FixedOrder(photos[i:i + 64]) for i in range(0, len(photos), 64))
        for plan, _, pixels, available in self.batches(plans):
            if available.any():
                yield np.array(plan.photos)[available], pixels[available]
            if progress:
                progress.tick(len(plan.photos))

    def _begin(self, plan, replacement):
        """Memory for a plan's pixels, and an iterator over the results of filling it."""
        count = len(plan.photos)
        pixels = self.empty((count, self.size, self.size, 3))
        tasks = [range(i, min(i + ROWS_A_TASK, count)) for i in range(0, count, ROWS_A_TASK)]
        return pixels, self.map(partial(self._fill_rows, plan, pixels, replacement), tasks)

    def _finish(self, results):
        """The photos read, when all tasks are done; what could not be read is noted."""
        started = time.monotonic()
        photos = []
        for filled in results:
            for photo, failures in filled:
                self.skipped.update(failures)
                if self.skipped and photo is not None:
                    self.skipped.pop(self.name(photo), None)        # it has come back
                photos.append(photo)
        self.waited += time.monotonic() - started
        return photos

    def _fill_rows(self, plan, pixels, replacement, rows):
        """What _fill_row returns for each of these rows: the work of a thread."""
        return [self._fill_row(plan, pixels, replacement, row) for row in rows]

    def _fill_row(self, plan, pixels, replacement, row):
        """Write a row's photo, or its replacement, into pixels[row].

        Returns the photo, None if there is none, and {name: why} of those that cannot be read.
        """
        failures = {}
        attempt = 0
        photo = plan.photos[row]
        while photo is not None:
            try:
                pixels[row] = self._pixels(photo)
                return photo, failures
            except ValueError as error:
                failures[self.name(photo)] = str(error)
            attempt += 1
            photo = replacement(plan, row, attempt) if replacement else None
        pixels[row] = 0
        return None, failures

    def _pixels(self, photo):
        """The photo's pixels (S, S, 3), kept if there is room; ValueError if it cannot be read."""
        if photo in self.broken:
            raise ValueError(self.broken[photo])
        if photo in self.kept:
            return self.kept[photo]
        try:
            path = self.folder.find(self.name(photo))
            self.folder.check(path)
            pixels = decode(path, self.size)
        except PhotoUnavailable:
            raise
        except ValueError as error:
            self.broken[photo] = str(error)
            raise
        if len(self.kept) < self.room:
            self.kept[photo] = pixels
        return pixels


# === checkpoints ==================================================================================

class Checkpoint(NamedTuple):
    """A run as it is saved; best.npz has no velocities, since no run goes on from it."""
    weights: dict               # {path of a parameter: array}
    velocities: dict            # {path: array}, of SGD
    facts: dict                 # options, step and all else, for JSON
    words: list                 # the dictionary


def save_checkpoint(path, checkpoint):
    """Write a checkpoint: arrays w/… and v/…, `facts` as JSON and the words, as bytes."""
    arrays = {}
    for prefix, parameters in (("w/", checkpoint.weights), ("v/", checkpoint.velocities)):
        for name, value in parameters.items():
            arrays[prefix + name] = kernels.to_host(value)
    arrays["facts"] = _as_bytes(json.dumps(checkpoint.facts))
    arrays["words"] = _as_bytes("\n".join(checkpoint.words))
    with whole_file(path) as file:
        np.savez(file, **arrays)


def load_checkpoint(path):
    """The Checkpoint in a file; ValueError if it is none, or damaged."""
    if not os.path.isfile(path):                # a pipe would keep us waiting
        raise ValueError(f"no model at {path}; train one with `python weak.py --out "
                         f"{os.path.dirname(path) or '.'}`")
    try:
        with np.load(path, allow_pickle=False) as file:             # the zip checks each member
            arrays = {key: file[key] for key in file.files}
        facts = json.loads(arrays["facts"].tobytes())
        words = arrays["words"].tobytes().decode("utf-8", "surrogateescape").split("\n")
    except Exception as error:                  # a broken zip file raises anything
        if isinstance(error, OSError) and error.errno:              # of the disk
            raise OSError(error.errno, error.strerror, path) from None
        raise ValueError(f"{path} is not a model of weak.py, or it is damaged") from None
    weights = {key[2:]: value for key, value in arrays.items() if key.startswith("w/")}
    velocities = {key[2:]: value for key, value in arrays.items() if key.startswith("v/")}
    return Checkpoint(weights, velocities, facts, words)


def _as_bytes(text):
    """A text as an array of bytes."""
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)


def find_checkpoint(run, which="best"):
    """The path of a run's checkpoint: best.npz where there is one, or model.npz ("model").

    run: the run's folder, or a checkpoint itself.
    """
    best = os.path.join(run, "best.npz")
    if os.path.isfile(run):
        return run
    if which == "best" and os.path.isfile(best):
        return best
    return os.path.join(run, "model.npz")


def read_log(folder):
    """The rows of a run's log.jsonl, one an epoch; lines that are no rows are left out."""
    rows = []
    with suppress(OSError), open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
