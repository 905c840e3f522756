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
import errno
import fcntl
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

import kernels
from kernels.console import Progress, whole_file, write_json
from kernels.philox import DRAWS, NEGATIVES, philox
from kernels.reference import below, crops_of


def machine_memory(limit="/sys/fs/cgroup/memory.max"):
    """Bytes of this machine's memory, or of its container's, whose limit is in a file, if less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):         # there is none, or it is "max"
        memory = min(memory, int(Path(limit).read_text()))
    return memory


MEMORY = machine_memory()
KEPT = 0.25                     # the part of it for photos that stay decoded, by all loaders


# === text =========================================================================================

STOP_WORDS = 500                # the most frequent words, left out (paper, §3)
FEW_STOP_WORDS = 50             # the same, where there are fewer captions than MANY
MANY = 1_000_000
WORDS = 1000                    # K: 1,000, 10,000 or 100,000 in the paper


LONGEST_WORD = 40               # letters; what is longer is no word
ZERO_WIDTH_SPACE = "\u200b"     # parts the words of Khmer, Lao and Thai
HTML_TAGS = ("a abbr b big blockquote br center code dd del div dl dt em embed font h1 h2 h3 h4 h5 "
             "h6 hr i iframe img ins li object ol p pre q s small span strike strong sub sup table "
             "tbody td th tr tt u ul var wbr").replace(" ", "|")
# No part of these expressions can match the same letters in two ways, so none takes long.
_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,31};")
_TAG = re.compile(
    rf"</?(?:{HTML_TAGS})(?:\s[^<>]*|/)?>"       # <br />, <a href="…">
    r"|<(?:a|img)\s[^<>=]*=[^<>]*\Z"            # the same, where a caption was cut
    r"|<!--[^<>]*-->", re.IGNORECASE)
_ADDRESS = re.compile(r"\b(?:[a-z]{2,9}://|www\.)[!-~]*")


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
        invisible = category in ("Cf", "Me") and c != ZERO_WIDTH_SPACE
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
    return [word for word in tokens_of(caption) if not word.isdecimal()]


def tokens_of(caption):
    """The words of one caption, and its numbers."""
    if "&" in caption or "<" in caption:
        caption = without_markup(caption)
    text = caption.lower()
    if "://" in text or "www." in text:
        text = _ADDRESS.sub(" ", text)
    if text.isascii():                          # translating bytes is many times faster
        text = text.encode().translate(_ASCII, _ASCII_GONE).decode()
    else:
        text = unicodedata.normalize("NFC", text).translate(_LETTERS)
    return [word for word in text.split() if len(word) <= LONGEST_WORD]


def without_markup(caption):
    """A caption from the web as it is read there: entities are characters, HTML's tags go."""
    text = _ENTITY.sub(_character, caption)
    text = _TAG.sub(" ", text)
    return _ENTITY.sub(_character, text)        # some are written twice over: &amp;quot;


def _character(entity):
    """The character of an HTML entity, or what stands there if it is none."""
    return html.unescape(entity[0])


def folder_words(path):
    """The words of folders' names, which are classes, and so their numbers are words, too.

    A name without any other word, as 2014-05, is one word as it stands.
    """
    words = []
    for name in path.split(os.sep):
        words += tokens_of(name) if words_of(name) else [name.strip().lower()]
    return [word for word in words if word]


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
        # value j of the copy is value j + shift here: its row's start here, less that in the copy
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
        self.label_count = len(self._words.values)      # words of all photos together
        self._check((self.counts >= 0).all() and self.counts.sum() == len(columns["photos"]))

    def __len__(self):
        return len(self._words)

    @property
    def format(self):
        """How the captions were read: one of FORMATS, or "folder"."""
        return self.facts["fingerprint"]["format"]

    def name(self, photo):
        """The photo's name below the images folder."""
        name = bytes(self._names[photo])
        self._check(name)
        return os.fsdecode(name)                # bytes, as the system has them

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
        return self._class_frequency

    def label_weight(self, sampling, positives):
        """What each word weighs in a training row as a target, the mean, (K,)."""
        k = len(self.dictionary)
        if positives == "balanced":             # as if it were drawn: the same expectation
            return np.full(k, 1 / k)
        if positives == "idf":
            return self._idf_weight()
        return self.label_frequency(sampling, positives)            # it weighs 1

    @cached_property
    def _class_frequency(self):
        """The label_frequency of photos drawn by class, with all their words."""
        k = len(self.dictionary)
        frequency = np.zeros(k)
        for words, photos in self._training_words():
            # a photo is drawn with probability Σ_j 1 / (K N_j), the sum over its words j
            drawn = np.bincount(photos, 1 / (k * self.counts[words]))
            frequency += np.bincount(words, drawn[photos], k)
        return frequency

    def _idf_weight(self):
        """The label_weight where the words of a photo share its weight by `idf`."""
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
# bytes → text → rows → names and captions: a file is unpacked by `open_captions` and decoded by
# `open_text`; a format turns this into (name, caption) pairs, NO_CAPTION where a row is none; and
# `Captions` cleans the names and counts what is read and what is not. A format is two functions:
# whether a file's first lines look like it, and the generator of pairs. Adding one takes a row of
# FORMATS.

LONGEST_LINE = 1 << 20          # characters; a longer one is no caption
TOO_LONG = "\ufffd\n"           # no format has such a row
LARGEST_JSON = MEMORY // 24     # characters of JSON that is read as a whole; objects take more
QUOTED_LINES = 200              # of a field in quotes, at most; then the quote was never closed
HEAD = 1 << 16                  # bytes that tell what a file is
HASH = 32                       # letters of a photo's hash in the YFCC100M table
DELIMITERS = ",", "\t", ";", "|"
NAME_KEYS = ("file_name", "filename", "image", "image_name", "photo", "file", "path", "image_path",
             "filepath", "file_path", "name", "image_id")
TEXT_KEYS = ("caption", "text", "comment", "captions", "sentence", "title", "description", "tags",
             "alt_text", "keywords")
INNER_KEYS = *TEXT_KEYS, "raw", "tag", "name", "label"              # of an object among the texts
NOTHING = {"", "nan", "null", "none", "<na>", "n/a"}                # so programs write no text
NO_NAME = re.compile("[\0\n\ud800-\udc7f\udd00-\udfff]")           # no file is called so
NOT_UTF8 = re.compile("[\udc80-\udcff]")                            # bytes, as `open_text` has them
NO_CAPTION = "", ""
UTF16_MARKS = b"\xff\xfe", b"\xfe\xff"
NO_TEXT = (                     # (offset, bytes there) of files that hold no text, and what to do
    (0, b"PK", "a zip archive or an Excel workbook; unpack it, or save the sheet as CSV"),
    (0, b"PAR1", "a Parquet table; save it as CSV, e.g. by pandas' read_parquet and to_csv"),
    (0, b"ARROW1", "an Arrow table; save it as CSV or as JSON lines"),
    (0, b"\xff\xff\xff\xff", "an Arrow table; save it as CSV or as JSON lines"),
    (0, b"\xfd7zXZ", "packed by xz; unpack it, or pack it by gzip"),
    (0, b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it, or pack it by gzip"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (257, b"ustar", "an archive; unpack it"),
    (0, b"SQLite", "a database; save its table as CSV"))


class Source(NamedTuple):
    """A captions file, or a folder of photos, and how it is read."""
    path: str
    kind: str | None = None             # of FORMATS; None: recognised
    image_column: str | None = None     # the column of photos' names: its name, or number from 1
    text_column: str | None = None      # … of captions; several with commas between
    images: str | None = None           # the photos' folder, which absolute names may begin with


class Keys(NamedTuple):
    """The columns, or keys of JSON, of photos' names and of captions."""
    names: tuple = NAME_KEYS            # the first that is there counts
    texts: tuple = TEXT_KEYS            # all count

    @classmethod
    def of(cls, source):
        """Those that a Source gives, else the usual ones."""
        names = NAME_KEYS
        texts = TEXT_KEYS
        if source.image_column:
            names = (_key(source.image_column),)
        if source.text_column:
            texts = tuple(_key(column) for column in source.text_column.split(","))
        return cls(names, texts)


class Captions:
    """(name, caption) pairs, by iteration, and what there is to say of them.

    `count` is how many there were, `bad_lines` how many rows were none, `recoded` how many captions
    were not in UTF-8; `words_of` cuts a caption into words.
    """

    words_of = staticmethod(words_of)
    has_classes = False                 # whether the words are names of classes, not a language's

    def __init__(self, source):
        self.source = source
        self.path = source.path
        self.keys = Keys.of(source)
        self.count = 0
        self.bad_lines = 0
        self.recoded = 0

    def __iter__(self):
        for name, caption in self.pairs():
            if not name or NO_NAME.search(name):
                self.bad_lines += 1
                continue
            self.count += 1
            if not caption.isascii() and NOT_UTF8.search(caption):
                self.recoded += 1
            yield name, caption


class FileCaptions(Captions):
    """Those of a captions file; `kind` is one of FORMATS."""

    def __init__(self, source):
        super().__init__(source)
        self.kind = source.kind or recognise(source)
        self.size = os.path.getsize(self.path)
        self._file = None

    def pairs(self):
        """What the format reads, with names that are cleaned, NO_CAPTION for bad rows."""
        with open_captions(self.path) as (stream, self._file):
            for name, caption in FORMATS[self.kind].pairs(open_text(stream), self.keys):
                yield clean_name(name, self.source.images), caption

    def bytes_read(self):
        """How much of the file was read, packed as it is."""
        return self.size if self._file.closed else self._file.tell()

    def unpacked_size(self):
        """About how many bytes of text there are."""
        with open_captions(self.path) as (stream, file):
            return self.size if stream is file else UNPACKED * self.size

    def fingerprint(self):
        """Size and time of the file, and a digest of sampled blocks."""
        digest = hashlib.blake2b(digest_size=8)
        with open_captions(self.path) as (_, file):
            for start in np.linspace(0, max(0, self.size - 4096), 16).astype(int):
                file.seek(start)
                digest.update(file.read(4096))
        return {"size": self.size, "mtime": os.stat(self.path).st_mtime_ns,
                "content": digest.hexdigest(), "image_column": self.source.image_column,
                "text_column": self.source.text_column}

    def origin(self):
        """Which columns of a table were read, or nothing."""
        if self.kind != "csv":
            return ""
        heading = _heading(first_lines(self.path))
        table = find_columns(heading, self.keys)
        if not table.heading:
            return ""
        names = [name.strip() for name in _fields(heading, table.delimiter)]
        texts = ", ".join(names[i] for i in table.texts)
        return f"photos' names are in the column {names[table.photo]}, words in {texts}"

    def why_no_word(self):
        """What to do about captions without any word."""
        if self.kind == "csv" and self.bad_lines:
            return (f"{self.bad_lines:,} rows have another number of fields than the heading; put "
                    "texts with commas in quotes")
        if self.kind == "tsv" and self.bad_lines:
            return (f"{self.bad_lines:,} lines have no tab between a photo's name and its caption, "
                    f"e.g. {first_lines(self.path)[0][:60]!r}")
        if self.kind not in ("jsonl", "coco"):
            return "see --format, --image-column and --text-column"
        keys = re.findall(r'"([^"\\]{1,40})"\s*:', " ".join(first_lines(self.path)))
        return (f"it has the keys {listing(dict.fromkeys(keys))}, and needs a name, as "
                f"{listing(self.keys.names)}, and a text, as {listing(self.keys.texts)}; see "
                "--image-column and --text-column")


def listing(words, most=5):
    """The first words of many, for a message."""
    words = list(words)
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")


def clean_name(name, images=None):
    """A photo's name as captions have it, without what is around it: blanks, quotes, #0."""
    name = name.strip().strip('"')
    if "#" in name:                             # `photo#0` numbers the captions of a photo
        photo, _, number = name.rpartition("#")
        name = photo if number.isdigit() else name
    if images and name.startswith(os.path.join(images, "")):
        name = os.path.relpath(name, images)
    return name


# --- bytes → text

@contextmanager
def open_captions(path):
    """The captions as (stream, file): the stream unpacks gzip and bzip2, told by content."""
    try:
        with open(path, "rb") as file:
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
        if getattr(error, "errno", None):       # of the disk, not of what is in the file
            raise ValueError(f"captions: {path} cannot be read: {error.strerror}") from None
        raise ValueError(f"captions: {path} is damaged ({error})") from None
    except ValueError as error:                 # of a reader of FORMATS
        raise ValueError(f"captions: {path} {error}") from None


def encoding_of(head):
    """(encoding, errors) of a text that begins with these bytes.

    It is UTF-16 by its mark, else UTF-8, in which other bytes are kept as surrogates: names of
    files are such bytes, and in captions `words_of` takes them for Windows-1252.
    """
    if head.startswith(UTF16_MARKS):
        return "utf-16", "replace"
    return "utf-8", "surrogateescape"


def open_text(stream):
    """A stream of bytes as text, whose lines end in \\n, \\r\\n or \\r."""
    stream = io.BufferedReader(stream)
    encoding, errors = encoding_of(stream.peek(2))
    return io.TextIOWrapper(stream, encoding, errors, newline=None)


def read_lines(text):
    """The lines of a text, each with its \\n; TOO_LONG in the place of those that are."""
    for line in iter(partial(text.readline, LONGEST_LINE), ""):
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            _skip_line(text)
            line = TOO_LONG
        if not line.isascii() and "\ufeff" in line:     # where files were put together
            line = line.replace("\ufeff", "")
        yield line


def _skip_line(text):
    """Read on to the next line."""
    for piece in iter(partial(text.readline, LONGEST_LINE), ""):
        if piece.endswith("\n"):
            return


def read_text(path):
    """The text of a small file; "" where it cannot be read."""
    with suppress(OSError):
        if os.path.isfile(path):                # a pipe would keep us waiting
            with open(path, "rb") as file:
                content = file.read(LONGEST_LINE)
            return content.decode(*encoding_of(content)).replace("\ufeff", "")
    return ""


def first_lines(path):
    """The first lines of a captions file that are not blank; ValueError if it is not of text."""
    with open_captions(path) as (stream, _):
        head = stream.read(HEAD) + stream.readline(LONGEST_LINE)
    encoding, _ = encoding_of(head)
    if b"\0" in head and encoding == "utf-8":
        for offset, magic, what in NO_TEXT:
            if head.startswith(magic, offset):
                raise ValueError(f"captions: {path} is {what}")
    text = head.decode(encoding, "replace")
    if text.count("\ufffd") + text.count("\0") > len(text) / 10:
        raise ValueError(f"captions: {path} is not text in UTF-8, or in UTF-16 with its mark; save "
                         "it as UTF-8")
    lines = [line.strip() for line in read_lines(open_text(io.BytesIO(head)))]
    return [line for line in lines if line] or [""]


# --- text → rows

def recognise(source):
    """The format of a captions file, by its content: one of FORMATS."""
    if os.path.isdir(source.path):
        return FolderCaptions.kind
    keys = Keys.of(source)
    lines = first_lines(source.path)
    kind = next(name for name, format in FORMATS.items() if format.recognises(lines, keys))
    columns = re.split("[,;|\t]", lines[0])
    with_tab = [line for line in lines if "\t" in line]
    columns_given = source.image_column or source.text_column
    if kind == "tsv" and len(columns) > 1 and (columns_given or len(with_tab) < len(lines) / 2):
        raise ValueError(
            f"captions: {source.path} has the columns {listing(columns, 20)[:200]}, and needs one "
            f"of {', '.join(keys.names)}, and some of {', '.join(keys.texts)}; name them by "
            "--image-column and --text-column, both by numbers if there is no heading")
    return kind


def is_tsv(lines, keys):
    """Anything is, that is no other format."""
    return True


def tsv_pairs(text, keys):
    """Lines of photo<TAB>caption."""
    for line in read_lines(text):
        if line.isspace():
            continue
        name, tab, caption = line.partition("\t")
        yield (name, as_text(caption)) if tab else NO_CAPTION


def as_text(value):
    """A value of a table, "" if it is what programs write where there is no text."""
    return "" if len(value) < 7 and value.strip().lower() in NOTHING else value


def is_jsonl(lines, keys):
    """Lines that are JSON each, at least the first one; a single one must name a photo."""
    if not lines[0].startswith(("{", "[")):
        return False
    pairs = [_line_pair(line, keys) for line in lines[:2]]
    return any(name for name, _ in pairs) or (len(lines) > 1 and _parsed(lines[0]) is not None)


def jsonl_pairs(text, keys):
    """Lines with a JSON object each."""
    for line in read_lines(text):
        if not line.isspace():
            yield _line_pair(line, keys)


def _line_pair(line, keys):
    """The pair of a line with a JSON object."""
    return _object_pair(_parsed(line), keys)


def _parsed(line):
    """The value of a line of JSON, None if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _object_pair(row, keys):
    """The pair of a JSON object."""
    if not isinstance(row, dict):
        return NO_CAPTION
    row = {_key(key): value for key, value in row.items()}
    texts = [row[key] for key in keys.texts if key in row]
    names = [_name(row[key]) for key in keys.names if key in row]
    if not texts:
        return NO_CAPTION
    return next(filter(None, names), ""), " ".join(_texts(texts))


def _name(value):
    """A photo's name, or number, in JSON; "" if it is neither."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ""
    return str(value)


def _texts(value, depth=4):
    """The texts of a value of JSON: itself, or those in a list or an object; numbers are none."""
    if isinstance(value, str):
        return [value] if as_text(value) else []
    if isinstance(value, dict):
        value = [value[key] for key in INNER_KEYS if key in value] or value.get("tokens")
    texts = []
    if isinstance(value, list) and depth:
        for item in value:
            texts += _texts(item, depth - 1)
    return texts


@lru_cache(1000)
def _key(name):
    """A column's name as in NAME_KEYS and TEXT_KEYS: "File Name" is file_name."""
    return "_".join(name.strip().strip('"').lower().split())


def is_coco(lines, keys):
    """JSON of any kind."""
    return lines[0].startswith(("{", "["))


def coco_pairs(text, keys):
    """COCO's captions, Karpathy's, whose images have sentences, or a list of objects."""
    content = text.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(f"is JSON of more than {LARGEST_JSON >> 20:,} MB, too much for this "
                         "machine's memory; write one line for each caption")
    table = _parsed(content.replace("\ufeff", ""))
    if isinstance(table, list):
        table = {"annotations": table, "images": []}
    if not isinstance(table, dict) or not {"images", "annotations"} & table.keys():
        content = "no whole JSON" if table is None else f"JSON with the keys {listing(table)}"
        raise ValueError(f"is {content}, neither COCO (images and annotations) nor a list or lines "
                         "with a file_name and a caption each")
    images = [image for image in _list(table.get("images", [])) if isinstance(image, dict)]
    annotations = _list(table.get("annotations", []))
    yield from _annotation_pairs(annotations, images, keys)
    for image in images:
        for sentence in _list(image.get("sentences", [])):
            pair = _object_pair({**image, keys.texts[0]: sentence}, keys)
            yield pair if _texts(sentence) else NO_CAPTION


def _list(value):
    """A list of JSON; [None], a bad row, where something else stands in its place."""
    return value if isinstance(value, list) else [None]


def _annotation_pairs(rows, images, keys):
    """The pairs of COCO's annotations; without images the rows have the names themselves."""
    by_id = {_number_of(image.get("id")): image for image in images}
    by_id.pop("", None)                         # images without an id
    matched = 0
    for row in rows:
        if images and isinstance(row, dict):
            image = by_id.get(_number_of(row.get("image_id")), {})
            matched += len(image) > 0
            row = {**image, **row, "name": None, "image_id": None}
        yield _object_pair(row, keys)
    if images and rows and not matched:
        raise ValueError(f"has {len(rows):,} annotations, but the image_id of none is the id of "
                         f"one of its {len(images):,} images")


def _number_of(value):
    """An id of JSON, by which 7, 7.0, "7" and "0007" are one."""
    name = _name(value)
    return str(int(name)) if name.isdecimal() and len(name) < 100 else name


def is_csv(lines, keys):
    """A header, or what Excel writes above it."""
    return find_columns(_heading(lines), keys) is not None


class Table(NamedTuple):
    """Where a table of text has its columns."""
    delimiter: str
    photo: int                  # the column of the photos' names
    texts: list                 # the columns of captions
    width: int                  # of all columns
    heading: bool               # whether the first line names them


def find_columns(line, keys):
    """The Table that a file's first line tells of, or None."""
    for delimiter in DELIMITERS:
        names = [_key(name) for name in _fields(line, delimiter)]
        photo = next((names.index(key) for key in keys.names if key in names), None)
        texts = [i for i, name in enumerate(names) if name in keys.texts]
        if photo is not None and texts:
            return Table(delimiter, photo, texts, len(names), heading=True)
    if not all(key.isdecimal() and int(key) for key in (*keys.names, *keys.texts)):
        return None
    photo = int(keys.names[0]) - 1              # without a heading, columns have numbers
    texts = sorted(int(key) - 1 for key in keys.texts)
    for delimiter in ("\t", *DELIMITERS):
        width = len(_fields(line, delimiter))
        if width > max(photo, *texts):
            return Table(delimiter, photo, texts, width, heading=False)
    return None


def _heading(lines):
    """The line that names the columns: Excel may write `sep=;` above it."""
    return lines[1] if lines[0].lower().startswith("sep=") and len(lines) > 1 else lines[0]


def _fields(line, delimiter):
    """The fields of a line by itself; where tabs part them, quotes mean nothing."""
    if delimiter == "\t":
        return line.rstrip("\n").split("\t")
    with suppress(csv.Error):                   # a field of very many characters
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return line.split(delimiter)


def csv_pairs(text, keys):
    """Lines below a header that names the columns, or without one, if their numbers are given."""
    csv.field_size_limit(sys.maxsize)
    lines = read_lines(text)
    first = ""
    for first in lines:
        if not first.isspace() and not first.lower().startswith("sep="):
            break
    table = find_columns(first, keys)
    if table is None:
        raise ValueError("names no columns `image,caption` in its first line; see --image-column "
                         "and --text-column")
    if not table.heading:
        lines = itertools.chain([first], lines)
    for row in _tab_rows(lines) if table.delimiter == "\t" else _quoted_rows(lines, table):
        if row:
            yield _row_pair(row, table)


def _row_pair(row, table):
    """The pair of a row of a table; it must fit the heading."""
    while len(row) > table.width and not row[-1].strip():
        row.pop()
    surplus = row[table.width:]                 # of commas which nobody quoted
    text_is_last = table.texts[-1] == table.width - 1
    if len(row) <= max(table.photo, table.texts[0]) or (surplus and not text_is_last):
        return NO_CAPTION
    texts = [row[i] for i in table.texts if i < len(row)]
    return row[table.photo], " ".join([as_text(value) for value in texts] + surplus)


def _tab_rows(lines):
    """Rows of a table whose columns are parted by tabs."""
    for line in lines:
        yield [] if line.isspace() else _fields(line, "\t")


def _quoted_rows(lines, table):
    """Rows of a CSV table; a quote that is never closed spoils its own line alone.

    It is never closed if a row begins before, or not within QUOTED_LINES.
    """
    read = partial(csv.reader, delimiter=table.delimiter, skipinitialspace=True)
    line = next(lines, "")
    while line:
        record = [line]
        quotes = line.count('"')
        line = next(lines, "")
        while quotes % 2 and line and len(record) < QUOTED_LINES and not _begins_row(line, table):
            record.append(line)
            quotes += line.count('"')
            line = next(lines, "")
        yield from _record_rows(record, read)


def _begins_row(line, table):
    """Whether a line within quotes looks like a row: a picture's name is where it belongs."""
    fields = line.split(table.delimiter, table.photo + 1)
    return len(fields) > table.photo + 1 and is_picture(fields[table.photo].strip().strip('"'))


def _record_rows(record, read):
    """The rows of lines that quotes hold together, or of each by itself if they do not."""
    if len(record) > 1:
        with suppress(csv.Error):
            return list(read(record, strict=True))
    return [next(read([line]), []) for line in record]


def is_yfcc(lines, keys):
    """A line with a page's address at its place."""
    return _yfcc_url(lines[0].split("\t")) is not None


def yfcc_pairs(text, keys):
    """Lines of the YFCC100M table; videos are left out."""
    for line in read_lines(text):
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
    text = binascii.a2b_qp(text.encode("utf-8", "surrogateescape"))
    return text.decode("utf-8", "surrogateescape")


class Format(NamedTuple):
    """A format of captions."""
    recognises: Callable            # (the first lines, Keys) -> bool
    pairs: Callable                 # (the text, Keys) -> (name, caption) pairs


FORMATS = {                     # the first that recognises a file's first lines reads it
    "jsonl": Format(is_jsonl, jsonl_pairs),
    "coco": Format(is_coco, coco_pairs),
    "yfcc": Format(is_yfcc, yfcc_pairs),
    "csv": Format(is_csv, csv_pairs),
    "tsv": Format(is_tsv, tsv_pairs)}


# --- a folder

METADATA = "metadata.csv", "metadata.jsonl"     # of an imagefolder of Hugging Face's datasets
TEXT_ENDINGS = ".txt", ".caption", ".json"      # of files beside photos
SPLIT = re.compile(                             # folders that part a set: train, val2014, …
    r"(train(ing)?|val(id|idation)?|dev|test(ing)?)[-_ ]?(set|\d{4})?", re.IGNORECASE)


class FolderCaptions(Captions):
    """Those of a folder of photos, from the first of these that it has:

    metadata.csv or metadata.jsonl, whose names begin at its own folder; photo.txt, .caption or
    .json beside photo.jpg; the names of sub-folders, which are classes.
    """

    kind = "folder"

    def __init__(self, source):
        super().__init__(source)
        self.files = list(list_files(self.path))
        self.photos = sorted(filter(is_picture, self.files))
        if not self.photos:
            raise ValueError(f"captions: {describe_no_picture(self.path)}")
        self.tables = [name for name in self.files if os.path.basename(name).lower() in METADATA]
        self.texts = {} if self.tables else self._find_texts()      # {photo: file}
        self.folders = class_folders(self.photos)
        self.has_classes = not self.tables and not self.texts
        if self.has_classes:
            self.words_of = folder_words
        self.size = sum(_file_size(os.path.join(self.path, name)) for name in self._files_read())
        self._bytes_read = 0

    def _find_texts(self):
        """{photo: the file beside it that holds its text}, {} if none holds any."""
        beside = {}
        for name in self.files:
            stem, ending = os.path.splitext(name)
            if ending.lower() in TEXT_ENDINGS:
                beside[stem, ending.lower()] = name
        texts = {}
        for photo in self.photos:
            stem, _ = os.path.splitext(photo)
            for ending in reversed(TEXT_ENDINGS):       # the first of them stays
                name = beside.get((stem, ending)) or beside.get((photo, ending))
                if name:
                    texts[photo] = name
        return texts if any(map(self._text_beside, texts.values())) else {}

    def _text_beside(self, name):
        """The text of a file beside a photo."""
        text = read_text(os.path.join(self.path, name))
        if name.lower().endswith(".json"):
            _, text = _object_pair(_parsed(text), self.keys)
        return text

    def _files_read(self):
        """The names of the files whose words are read."""
        return [*self.tables, *self.texts.values()]

    def pairs(self, what="reading texts"):
        """A pair for each photo that has a text, or for each row of the tables.

        what: what is said to be done with the texts.
        """
        self._bytes_read = 0
        for name in self.tables:
            path = os.path.join(self.path, name)
            table = FileCaptions(self.source._replace(path=path, kind=None))
            for photo, caption in table.pairs():
                yield photo and os.path.join(os.path.dirname(name), photo), caption
            self._bytes_read += table.size
        with Progress(what, len(self.texts), "files") as progress:
            for photo, name in self.texts.items():
                yield photo, self._text_beside(name)
                self._bytes_read += _file_size(os.path.join(self.path, name))
                progress.tick()
        if self.has_classes:
            for photo, folders in self.folders.items():
                yield photo, os.sep.join(folders)

    def bytes_read(self):
        """How much of the tables and texts was read."""
        return self._bytes_read

    def unpacked_size(self):
        """About how many bytes of text there are."""
        return self.size

    def fingerprint(self):
        """A digest of all names and texts."""
        digest = hashlib.blake2b(digest_size=8)
        for pair in self.pairs("checking texts"):
            digest.update("\n".join(pair).encode("utf-8", "surrogatepass"))
        return {"content": digest.hexdigest()}

    def origin(self):
        """Which files or folders the words are from, and what lies there unread."""
        line = f"words from {self._what_is_read()}"
        unread = self._what_is_not()
        return f"{line}; not read: {listing(unread)}" if unread else line

    def _what_is_read(self):
        """The source of the words, for a message."""
        if self.has_classes:
            return f"the names of folders: {self._classes() or 'none'}"
        if self.tables:
            return listing(self.tables)
        counts = Counter(map(_ending, self.texts.values()))
        kinds = [f"{count:,} photo{ending}" for ending, count in counts.items()]
        return f"{' and '.join(kinds)} for {len(self.photos):,} photos"

    def _what_is_not(self):
        """What else there is in the folder, for a message."""
        unread = []
        if not self.has_classes and self._classes():
            unread.append(f"the folders' names ({self._classes()})")
        files = set(self.files) - set(self.photos) - set(self._files_read())
        for ending, count in Counter(map(_ending, files)).most_common():
            unread.append(f"{count:,} {ending or 'without ending'}")
        return unread

    def _classes(self):
        """The first names of the classes that folders have, for a message."""
        return listing(sorted(set(itertools.chain(*self.folders.values()))), 8)

    def why_no_word(self):
        """What to do about captions without any word."""
        if self.has_classes:
            return (f"{self.origin()}; it needs photo.txt beside photo.jpg, or photos in folders "
                    "with their classes' names; or name a file by --captions")
        return f"{self.origin()}; name another file by --captions"


def _ending(name):
    """A file's ending, as .txt."""
    return os.path.splitext(name)[1].lower()


def class_folders(names):
    """{photo's name: the folders that it is in}, without those that part a set: train, test.

    Such are those of a level where all are called so, and any that has folders of photos below.
    """
    folders = {}
    with_classes = set()                # levels that have other folders, too
    for name in names:
        path = os.path.dirname(name)
        folders[name] = path.split(os.sep) if path else []
        for level, folder in enumerate(folders[name]):
            if not SPLIT.fullmatch(folder):
                with_classes.add(level)
    for name, path in folders.items():
        kept = []
        for level, folder in enumerate(path):
            is_last = level == len(path) - 1
            if not SPLIT.fullmatch(folder) or (is_last and level in with_classes):
                kept.append(folder)
        folders[name] = kept
    return folders


def captions_of(source):
    """The Captions of a Source."""
    return FolderCaptions(source) if os.path.isdir(source.path) else FileCaptions(source)


# === building =====================================================================================
# count: one pass over the captions counts their words, and writes them to flat files as hashes
# prune: the most frequent words and the rare ones are left out; the others are the dictionary
# sort:  each set of these files is sorted by the hash of the photo's name: captions of a photo come
#        to stand beside each other, and the held-out photos, those of the smallest hashes, first
# index: photo → words is written set after set, and then turned round into word → photos

INDEX_VERSION = 9
BATCH_CHARACTERS = 8 << 20      # captions hashed at a time
MOST_COUNTED = 2_000_000        # distinct words counted at a time: rare ones are dropped beyond
SET_BYTES = 32 << 20            # captions of a set, which is sorted in memory
UNPACKED = 5                    # about how many times larger a packed file is when unpacked
REFUSED_LISTED = 100
CAPTION = np.dtype([("photo", "u8"), ("name_size", "u4"), ("word_count", "u4")])


def build_index(source, folder, text, dictionary=None):
    """The Index of a Source, kept in `folder`; dictionary: its words, or chosen if None.

    Another process that wants an index beside this one waits.
    """
    with _alone_beside(folder):
        captions = captions_of(source)
        index = _cached(captions, folder, text, dictionary)
        if index is not None:
            return index
        if os.path.isdir(folder) and not _index_files().issuperset(os.listdir(folder)):
            raise ValueError(f"{folder} holds other things than an index; move them away")
        origin = fingerprint(captions, text, dictionary)
        work = folder + ".part"
        if os.path.isdir(work):
            print("starting the index again: it was not finished", file=sys.stderr, flush=True)
            shutil.rmtree(work)
        try:
            os.makedirs(work)
            facts = _write_index(work, captions, text, dictionary)
            _write_facts(work, {**facts, "fingerprint": origin})
            shutil.rmtree(folder, ignore_errors=True)   # what a kill leaves of it is noticed
            os.rename(work, folder)
        finally:                                # the disk may be full
            shutil.rmtree(work, ignore_errors=True)
        return Index(folder)


@contextmanager
def _alone_beside(folder):
    """Hold the folder that an index is in, so that no other process changes it."""
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    place = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):                 # some disks of a network cannot
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def cached_index(source, folder, text, dictionary=None):
    """The index in `folder` if it was built from this Source with these options, or None."""
    if not os.path.isdir(folder):
        return None
    return _cached(captions_of(source), folder, text, dictionary)


def _cached(captions, folder, text, dictionary):
    """The index in `folder` if it was built from these captions, or None."""
    if not os.path.isdir(folder):
        return None
    expected = fingerprint(captions, text, dictionary)
    try:
        index = Index(folder)
        stored = dict(index.facts["fingerprint"])
    except Exception as error:                  # a damaged file raises anything
        if getattr(error, "errno", None) not in (None, errno.ENOENT):
            raise                               # the disk's fault
        print(f"the index in {folder} is damaged, or of another version: making it again",
              file=sys.stderr, flush=True)
        return None
    if text.stop_words is not None:             # the number chosen then may be named now
        stored["stop_words"] = index.facts["stop_words"]
    if index.facts["refused"] and index.facts["images"] != captions.source.images:
        return None                             # absolute names may begin with this folder
    return index if stored == expected else None


def fingerprint(captions, text, dictionary):
    """Of the captions, and of all that decides the index."""
    digest = hashlib.blake2b("\n".join(dictionary or []).encode(), digest_size=8)
    return {"version": INDEX_VERSION, "format": captions.kind, "dictionary": digest.hexdigest(),
            **captions.fingerprint(), **text._asdict()}


def _index_files():
    """The names of an index's files."""
    return {"index.json", *(f"{name}.npy" for name in COLUMNS)}


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


def _write_index(work, captions, text, dictionary):
    """Count, prune, sort, index; returns the facts."""
    records = Records(work, 1 + captions.unpacked_size() // SET_BYTES)
    tally = _count_captions(captions, records, text.valid)
    if not tally.words:
        raise ValueError(f"captions: {captions.path}, read as {captions.kind}, has no word of a "
                         f"photo: {_why_no_word(captions, tally)}")
    facts = {"captions": captions.count, "bad_lines": captions.bad_lines,
             "recoded": captions.recoded, "origin": captions.origin(), "words": tally.words,
             "refused": tally.refused, "refused_names": tally.refused_names[:REFUSED_LISTED],
             "images": captions.source.images, "stop_words": text.stop_words, "stop_list": [],
             "rest": 0, "left_out": []}
    if not dictionary:
        if captions.has_classes and text.stop_words is None:
            text = text._replace(stop_words=0)
        stop, dictionary, rest = choose_words(tally.occurrences, text, captions.count)
        # the most frequent and the rarest of the stop words, the most frequent of the rest
        examples = [*stop[:3], *stop[3:][-2:], *rest[:3]]
        facts["stop_words"] = len(stop)
        facts["stop_list"] = stop
        facts["rest"] = len(rest)
        facts["left_out"] = [(word, tally.occurrences[word]) for word in examples]
    facts |= _sort_captions(work, records, dictionary, text.valid)
    _write_class_photos(work, len(dictionary), facts["held_out"])
    return {**facts, "dictionary": dictionary}


def _why_no_word(captions, tally):
    """What to do about captions without any word."""
    if tally.refused_names:
        return (f"names like {tally.refused_names[0]!r} lead out of --images; give photos' paths "
                "below it")
    return captions.why_no_word()


def stop_words(folder):
    """The words that an index left out because they are the most frequent; [] without an index."""
    with suppress(OSError, ValueError, KeyError):
        return _read_facts(folder)["stop_list"]
    return []


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
            _count_batch(batch, captions.words_of, tally, records, valid)
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


def _count_batch(batch, words_of, tally, records, valid):
    """Count the words of a batch, and write its captions to `records`."""
    words, tokens = _tokenize((caption for _, caption in batch), words_of)
    hashes, names = _hash_captions(name for name, _ in batch)
    word_hashes = hash_all([word.encode() for word in words], 8)
    records.append(hashes, names, Ragged(word_hashes[tokens.values], tokens.ends))
    training = np.repeat(~is_held_out(hashes, valid), tokens.counts())          # (tokens,)
    times = np.bincount(tokens.values[training], minlength=len(words)).tolist()
    tally.occurrences.update({word: n for word, n in zip(words, times) if n})
    tally.words += len(tokens.values)


def _tokenize(captions, words_of):
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
    photo_of_caption = np.empty(len(order), np.int64)
    photo_of_caption[order] = np.cumsum(is_first) - 1
    photo_of_label, classes = _distinct_labels(photo_of_caption, words, find_classes)
    counts = np.bincount(photo_of_label, minlength=len(first))
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
    blocks = [slice(i, i + 2 * ROWS_AT_A_TIME)
              for i in range(start, len(words), 2 * ROWS_AT_A_TIME)]
    class_counts = np.zeros(k, np.int64)
    for block in blocks:
        class_counts += np.bincount(words[block], minlength=k)
    class_ends = np.cumsum(class_counts)
    np.save(f"{work}/photo_ends.npy", class_ends)
    size = int(class_counts.sum())
    photos = np.lib.format.open_memmap(f"{work}/photos.npy", "w+", "<u4", (size,))
    free = class_ends - class_counts            # (K,) where the next photo of each class goes
    for block in blocks:
        classes = words[block]
        places = np.arange(block.start, block.start + len(classes))
        owners = np.searchsorted(ends, places, side="right")        # whose words these are
        order = np.argsort(classes, kind="stable")
        classes = classes[order]
        counts = np.bincount(classes, minlength=k)
        first = np.cumsum(counts) - counts      # (K,) where each class begins in this block
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
        """The photo to try after `attempt` others of this row of batch.photos, or None.

        Only a row of one drawn word has a replacement: another photo of that word, ATTEMPTS times.
        """
        if self.positives != "drawn" or attempt >= ATTEMPTS:
            return None
        batch_row = batch.rows[row]
        photos = self.index.photos(batch.targets[batch_row][0])
        raw = philox(self.seed, (batch_row, batch.step, attempt, DRAWS)).random_raw(4)
        photo = photos[below(raw[1], len(photos))]
        self.index.check_training(photo)
        return int(photo)

    def labels(self, batch, available, targets="all", negatives=0, counted=None):
        """The Labels of this rank's rows; a row whose photo is not available (N,) weighs nothing.

        targets: which words are scored: "all", those of the whole "batch", or these and as many
        `negatives`, "sampled". counted: how many rows of the whole batch have a photo, so that the
        loss is their mean; None if these rows are the whole batch.
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
        others = self.count - 1                 # seen from a row that lacks the class
        return 1 - presence_among(others, self.label_frequency[classes])


def presence_among(rows, label_frequency):
    """The probability that at least one of so many rows carries each word, like label_frequency."""
    return 1 - (1 - label_frequency) ** rows


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
MOST_MEMORY = 450 << 20         # bytes that a photo may take while it is decoded
MANY_PIXELS = 16 << 20          # a photo of more is made smaller before anything else
MANY_DEEP_PIXELS = 4 << 20      # the same, with more than 8 bits a channel
MOST_FILES = 2_000_000          # of a folder, known by nearly their names
CHECKED = 2000                  # photos whose links are followed before training
AHEAD = 2                       # batches of photos under way besides the one in use
ROWS_A_TASK = 8                 # photos that a thread takes at a time
PICTURES = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
DEEP = ("I", "F")               # beginnings of modes with more than 8 bits
BYTES_A_PIXEL = {               # measured while Pillow decodes, by mode, and by format where more
    "1": 2, "L": 1, "P": 9, "I;16": 2, "I;16B": 2, "LA": 8, "PA": 9, "RGBA": 8,
    "WEBP": 17, "AVIF": 16, "JPEG2000": 24}
ORIENTATION = 0x0112            # EXIF's tag, and how a picture with each of its values is turned
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
BITS_PER_SAMPLE = 258           # TIFF's tag
JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
JPEG_SCAN = b"\xff\xda"         # one in a simple JPEG, one in the small picture in its EXIF
SERVICE_FOLDERS = {             # of NAS boxes and systems, in lower case: no photos are meant there
    "@eadir", "@tmp", "@recycle", "#recycle", "@recently-snapshot", "#snapshot", "__macosx",
    "$recycle.bin", "system volume information", "lost+found"}


class PhotoUnavailable(ValueError):
    """A photo that cannot be read now, but perhaps later: its disk may come back."""


def decode(path, size, square=True):
    """A photo as uint8 RGB (size, size, 3), rescaled to a square (paper, §3).

    It is turned as the camera was. If not `square`, the longer side has that size. ValueError says
    what is wrong with it, PhotoUnavailable what is wrong with its disk.
    """
    return decode_bytes(read_photo(path), size, square)


def read_photo(path, check=None):
    """The bytes of a photo's file; check(path, its status) may raise a ValueError."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a file")
            if not status.st_size:
                raise ValueError("zero bytes")
            if status.st_size > LARGEST:
                raise ValueError("too large for a photo")
            if check:
                check(path, status)
            return file.read()
    except IsADirectoryError:
        raise ValueError("not a file") from None
    except OSError as error:
        raise PhotoUnavailable((error.strerror or str(error)).lower()) from None


def _open_at_once(path, flags):
    """Open a file; a pipe would keep us waiting."""
    return os.open(path, flags | os.O_NONBLOCK)


def decode_bytes(content, size, square=True):
    """A photo as `decode` has it, from the bytes of its file."""
    warnings.filterwarnings("ignore", module="PIL", append=True)    # in all threads at once
    Image.MAX_IMAGE_PIXELS = None               # of _check_memory's own
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        return _decode_whole(content, size, square)
    except UnidentifiedImageError:
        raise ValueError(_unknown_kind(content)) from None
    except OSError as error:
        raise ValueError((str(error) or "damaged").splitlines()[0].lower()) from None
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    except MemoryError:
        raise
    except Exception as error:                  # broken files raise anything from deep inside
        raise ValueError(f"cannot be decoded ({error!r:.150})") from None


def _unknown_kind(content):
    """What to say of a file that Pillow does not know."""
    kind = content[8:12].decode("latin-1")
    if content[4:8] == b"ftyp" and kind.isalnum():      # HEIC, and films
        return f"of the kind {kind}, which is not read; make it a JPEG"
    return "not a picture"


def _decode_whole(content, size, square):
    """A photo's pixels; a JPEG may lack its end, if that is all that it lacks.

    Nothing else is missing if it makes no difference what follows.
    """
    try:
        return _decode(content, size, square)
    except OSError:
        if not content.startswith(JPEG_START) or content.endswith(JPEG_END):
            raise
        content = content.removesuffix(JPEG_END[:1])
        pixels = _decode(content + JPEG_END, size, square)
        others = _decode(content + b"\x55" * (1 << 16) + JPEG_END, size, square)
        if not np.array_equal(pixels, others):
            raise
        return pixels


def _decode(content, size, square):
    """A photo's pixels; whatever Pillow raises."""
    image = Image.open(io.BytesIO(content), formats=_formats())
    width, height = image.size
    image.draft("RGB", (size, size))            # JPEG: decode at a fraction of the size
    _check_memory(image, width * height, content)
    deep_colours = _raw_mode(image).startswith(("RGB;16", "RGBA;16"))
    image.load()
    turn = TURNS.get(_orientation(image))
    image = _shrink(image, size, deep_colours or image.mode.startswith(DEEP))
    if deep_colours and max(high for _, high in image.getextrema()[:3]) < 128:
        image = _add_low_bytes(image, content, size)
    if turn is not None:
        image = image.transpose(turn)
    image = _to_rgb(image)
    shape = (size, size)
    if not square:
        scale = size / max(image.size)
        shape = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(shape, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(image)


@cache
def _formats():
    """Those of PICTURES that this Pillow reads."""
    Image.init()
    return [name for name in PICTURES if name in Image.OPEN]


def _check_memory(image, pixels, content):
    """An error if decoding an image takes more than MOST_MEMORY; pixels: without `draft`."""
    cost = max(BYTES_A_PIXEL.get(image.mode, 4), BYTES_A_PIXEL.get(image.format, 0))
    if image.format == "TIFF":                  # a strip, perhaps all of it, is decoded apart
        cost += sum(image.tag_v2.get(BITS_PER_SAMPLE, ())) / 8
    width, height = image.size
    needed = len(content) + width * height * cost
    several_scans = content.count(JPEG_SCAN) > 2 or "progressive" in image.info
    if hasattr(image, "layer") and several_scans:       # a JPEG, whose coefficients are all kept
        samples = [across * down for _, across, down, _ in image.layer]
        needed += 2 * pixels * sum(samples) / max(samples)
    if needed > MOST_MEMORY:
        raise Image.DecompressionBombError(
            f"{pixels / 1e6:,.0f} million pixels of the kind {image.format} {image.mode} take "
            f"{needed / 1e6:,.0f} MB, too much; make it smaller")


def _orientation(image):
    """The orientation that EXIF gives; None if there is none that can be read."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:                           # a broken EXIF raises anything, and costs no photo
        return None


def _raw_mode(image):
    """How the pixels are in the file, as Pillow calls it: RGB;16B has two bytes a colour."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) else args)


def _add_low_bytes(image, content, size):
    """Colours of 16 bits, of which Pillow takes the high bytes, where these alone are too dark."""
    low = Image.open(io.BytesIO(content), formats=_formats())
    tile = low.tile[0]
    raw_mode = _raw_mode(low)
    order = {"B": "L", "L": "B", "N": "B"}[raw_mode[-1]]            # so that the low ones seem high
    swapped = raw_mode[:-1] + order
    args = (swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped
    low.tile = [part._replace(args=args) for part in low.tile]
    pixels = np.asarray(image)[:, :, :3].astype(np.uint16) * 256
    pixels += np.asarray(_shrink(low, size, deep=True))[:, :, :3]
    rgb = Image.fromarray(_as_8_bits(pixels, "I"))
    if image.mode == "RGBA":
        rgb.putalpha(image.getchannel("A"))
    return rgb


def _shrink(image, size, deep):
    """A photo of very many pixels made smaller, before anything needs a copy of it."""
    width, height = image.size
    if width * height <= (MANY_DEEP_PIXELS if deep else MANY_PIXELS):
        return image
    factors = max(1, width // (4 * size)), max(1, height // (4 * size))
    if image.mode.startswith("I;"):             # which `reduce` cannot
        shape = max(1, width // factors[0]), max(1, height // factors[1])
        return image.resize(shape, Image.Resampling.NEAREST)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == "1":
        image = image.convert("L")
    return image.reduce(factors)


def _to_rgb(image):
    """Any mode as RGB: more than 8 bits scaled down, transparent parts on white."""
    if image.mode.startswith(DEEP):
        image = Image.fromarray(_as_8_bits(np.asarray(image), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _as_8_bits(pixels, mode):
    """Pixels of any numbers as uint8, scaled by what is in them, but for the brightest 1 in 1,000.

    Whole numbers have 8, 9, … or 16 bits, as many as these need; others are scaled by the largest.
    """
    pixels = pixels.astype(np.float32)
    finite = pixels[np.isfinite(pixels)]
    top = float(np.percentile(finite, 99.9)) if len(finite) else 0
    if top <= 0:
        top = max(1e-9, float(finite.max(initial=0)))
    if mode.startswith("I"):
        top = 2 ** max(8, math.ceil(math.log2(top + 1))) - 1
    pixels = np.nan_to_num(pixels, posinf=top, neginf=0)
    return (np.clip(pixels / top, 0, 1) * 255).astype(np.uint8)


# --- names → files

def refused(name):
    """True for a name that is absolute or leaves the images folder."""
    if name.startswith(("/", "\\")):
        return True
    return ".." in name and ".." in name.replace("\\", "/").split("/")


def is_picture(path):
    """True for the name of a picture file, by its ending."""
    return Image.registered_extensions().get(os.path.splitext(path)[1].lower()) in PICTURES


def list_files(folder):
    """Names of the files below a folder, but for hidden ones, those of NAS boxes and of runs."""
    root = os.path.join(folder, "")
    for place, folders, names in os.walk(folder):
        below = place[len(root):]
        if place != folder and _is_run(names):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders
                            if not name.startswith(".") and name.lower() not in SERVICE_FOLDERS)
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(below, name)


def _is_run(names):
    """Whether a folder of these files is that of a training run, with pictures of its own."""
    return "run.lock" in names or {"model.npz", "words.txt"}.issubset(names)


def list_photos(folder):
    """Names of the picture files in a folder and below it, told by their ending, in order."""
    names = sorted(filter(is_picture, list_files(folder)))
    if not names:
        raise ValueError(describe_no_picture(folder))
    return names


def describe_no_picture(folder):
    """What to say of a folder without pictures."""
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    links = []
    with suppress(OSError):
        links = [entry.name for entry in os.scandir(folder) if entry.is_symlink()]
    line = f"there is no picture in {folder} or its sub-folders"
    if links:
        line += f", and links to folders, as {links[0]}, are not followed; name the folder itself"
    return line


class Folder:
    """Finds photos below a folder by their names.

    A name is that of a file below the folder. Its first folders may be missing there, as those of
    a place where the photos were before, and letters be of the other case. Where the folder of a
    name exists, the photo is in that folder, perhaps with another ending, or it is missing. A name
    without a folder may be that of one file in any sub-folder. A YFCC100M name, hash/id.jpg, may be
    id.jpg or, as that set is stored, abc/def/abcdef….jpg.
    """

    def __init__(self, folder):
        self.folder = folder
        self.real = os.path.realpath(folder)
        self.lock = threading.Lock()
        self.by_stem = None                     # {stem: names of files}, made when needed
        self.places = set()                     # the folders of these files
        self.is_whole = True                    # whether these are all files

    def find(self, name):
        """The path of the photo's file; where there is none, of the file it should be."""
        paths = self.candidates(name)
        return paths[0] if len(paths) == 1 else self._path(name)

    def read(self, name):
        """The bytes of the photo's file; ValueError if there is none, or are several."""
        paths = self.candidates(name)
        if len(paths) > 1:
            raise ValueError(f"several files are called so: {listing(paths, 3)}")
        path = paths[0] if paths else self._path(name)
        return read_photo(path, self.check if self.folder else None)

    def candidates(self, name):
        """The paths of the files that a name may mean: none, one, or several."""
        names = [name]
        if name[HASH:HASH + 1] == "/":
            code = name[:HASH]
            ending = os.path.splitext(name)[1]
            names += [name[HASH + 1:], f"{code[:3]}/{code[3:6]}/{code}{ending}"]
        if "%" in name:
            names.append(unquote(name, errors="surrogateescape"))
        for name in names:
            if self._exists(name):
                return [self._path(name)]
        for name in names:
            paths = self._near_paths(name)
            if paths:
                return paths
        return []

    def check(self, path, status=None):
        """ValueError if links lead from a path out of the folder, or the open file is another."""
        real = os.path.realpath(path)
        is_inside = os.path.commonpath([self.real, real]) == self.real
        if not is_inside or (status and not os.path.samestat(os.stat(real), status)):
            raise ValueError("a link that leads out of the images folder")

    def list_all(self):
        """List all files below the folder, up to MOST_FILES."""
        with self.lock:                         # one thread lists, the others wait
            if self.by_stem is not None:
                return
            by_stem = defaultdict(list)
            files = itertools.islice(list_files(self.folder), MOST_FILES)
            for count, name in enumerate(files, 1):
                by_stem[_stem(name)].append(name)
                self.places.add(os.path.dirname(_folded(name)))
                self.is_whole = count < MOST_FILES
            self.by_stem = by_stem

    def _path(self, name):
        """Where a file of this name is, or would be."""
        if self.folder and refused(name):       # without a folder, names are paths
            name = os.path.basename(name)
        return os.path.join(self.folder, name)

    def _exists(self, name):
        """Whether there is a file of exactly this name."""
        if self.by_stem is not None and name in self.by_stem.get(_stem(name), ()):
            return True
        return os.path.exists(self._path(name))

    def _near_paths(self, name):
        """Paths of the files that are nearly called so; see the class."""
        self.list_all()
        *folders, base = _parts(_folded(name))
        files = set(self.by_stem.get(_stem(name), ())) | set(self.by_stem.get(base, ()))
        for first in range(len(folders)):
            place = "/".join(folders[first:])
            there = [file for file in files if _is_below(file, place)]
            if there or self._is_place(name, len(folders) - first):
                return self._best(there, name)
        paths = self._best([file for file in files if os.sep not in file], name)
        if paths or folders:
            return paths
        if is_picture(base):                    # elsewhere, another ending is another picture
            files = [file for file in files if _folded(os.path.basename(file)) == base]
        return self._best(files, name)

    def _is_place(self, name, depth):
        """Whether the last `depth` folders of a name are one of this folder."""
        parts = _parts(name.replace("\\", "/"))
        place = "/".join(parts[-depth - 1:-1])
        return _folded(place) in self.places or os.path.isdir(self._path(place))

    def _best(self, files, name):
        """Paths of those files that are most nearly called so: by ending, then by case."""
        base = os.path.basename(name.replace("\\", "/"))
        ranked = defaultdict(list)
        for file in files:
            other_case = _nfc(os.path.basename(file)) != _nfc(base)
            other_ending = _folded(os.path.basename(file)) != _folded(base)
            if not other_ending or is_picture(file):
                ranked[other_ending, other_case].append(file)
        return [self._path(file) for file in sorted(ranked[min(ranked)])] if ranked else []


def _nfc(text):
    """A name with each letter and its accents as one character, where there is one."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _folded(name):
    """A name by which two that differ in case, or have Windows' slashes, are one."""
    return _nfc(name.replace("\\", "/")).casefold()


def _stem(name):
    """The folded name of a file without its folders and ending."""
    return os.path.splitext(os.path.basename(_folded(name)))[0]


def _parts(name):
    """The folders of a name, and its last part; at least this."""
    return [part for part in name.split("/") if part not in ("", ".")] or [""]


def _is_below(file, place):
    """Whether a file is in a folder whose path ends so."""
    folder = os.path.dirname(_folded(file))
    return folder == place or folder.endswith("/" + place)


class Lookup(NamedTuple):
    """What to say of a photo whose name does not lead to a file of its own."""
    what: str
    remedy: str


MISSING = Lookup("are not there", "check --images, or name the column of names by --image-column")
ELSEWHERE = Lookup("have another name or place", "")
SEVERAL = Lookup("may be several files each", "write folders into the captions, or narrow --images")
LINKS = Lookup("are links that lead out of --images", "give the folder above, that has the files")


def check_photos(folder, index):
    """Say which names of photos lead to no file, to several, or to another.

    ValueError if no name leads to exactly one file.

    They are compared with one listing of the folder, or some of them, if it has too many files.
    """
    finder = Folder(folder)
    finder.list_all()
    count = len(index)
    if not finder.is_whole:
        count = min(CHECKED, count)             # the index has photos in a random order
        print(f"photos: {folder} has more than {MOST_FILES:,} files: {count:,} names are checked")
    examples = defaultdict(list)                # {Lookup or None: photos}
    for i in range(count):
        name = index.name(i)
        lookup, files = look_up(finder, name, check_links=i < CHECKED)
        examples[lookup].append(f"{name} is {files}" if files else name)
    readable = examples.pop(None, []) + examples.get(ELSEWHERE, [])
    for lookup, photos in sorted(examples.items(), key=lambda item: -len(item[1])):
        line = f"{len(photos):,} of {count:,} {lookup.what}, e.g. {photos[0]}"
        if not readable:
            raise ValueError(f"none of the captions' photos is to be found in {folder}, which has "
                             f"{next(list_files(folder), 'nothing')}: {line}; {lookup.remedy}")
        print(f"photos: {line}" + (f"; {lookup.remedy}" if lookup == SEVERAL else ""))


def look_up(finder, name, check_links):
    """What is to be said of a photo, None for nothing, and the names of the files it may be."""
    paths = finder.candidates(name)
    if not paths:
        return MISSING, ""
    if check_links:
        try:
            finder.check(paths[0])
        except OSError:                         # of the disk, which may come back
            return None, ""
        except ValueError:
            return LINKS, ""
    if paths == [os.path.join(finder.folder, name)]:
        return None, ""
    files = " or ".join(os.path.relpath(path, finder.folder) for path in paths[:2])
    return (ELSEWHERE if len(paths) == 1 else SEVERAL), files


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
    """Decodes photos in threads, some batches ahead, and keeps some, in the part KEPT of MEMORY.

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
        self.room = min(photos, int(KEPT * MEMORY / loaders / (3 * size * size)))
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
            pixels = decode_bytes(self.folder.read(self.name(photo)), self.size)
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
        _check_members(path)
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


def _check_members(path):
    """ValueError if what a checkpoint holds is larger than the file: np.savez packs nothing."""
    with zipfile.ZipFile(path) as file:
        if sum(member.file_size for member in file.infolist()) > os.path.getsize(path):
            raise ValueError("packed")


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


LOG_NUMBERS = "epoch", "step", "images_per_second"     # of each row


def read_log(folder):
    """The rows of a run's log.jsonl, one an epoch; lines that are no rows are left out."""
    rows = []
    with suppress(OSError), open(os.path.join(folder, "log.jsonl"), encoding="utf-8",
                                 errors="replace") as file:
        rows = [_parsed(line) for line in file]
    return [row for row in rows if _is_log_row(row)]


def _is_log_row(row):
    """Whether this is a row that a run wrote."""
    if not isinstance(row, dict) or "validation_loss" not in row:
        return False
    return all(isinstance(row.get(key), (int, float)) for key in LOG_NUMBERS)
