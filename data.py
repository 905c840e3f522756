"""Captions → words → dictionary → index → draws → batches of pixels (paper, §3: data).

Nothing here grows with the number of photos but files on disk: captions are read in two streaming
passes, one that counts words and one that writes (photo, words) records into 256 files by the hash
of the photo's name; each file is then grouped in memory and appended to the index, arrays in
`.npy` files that are opened by memory map. Hence the index is in the order of the hashes, and the
held-out photos, those of the smallest hashes, are its first ones. A draw is a pure function of
(seed, step, row, attempt), so any step can be drawn again. Worker processes decode the photos.

    index = build_index("captions.tsv", "runs/x/index", Text(words=1000, stop_words=500))
"""
import bz2
import csv
import gc
import gzip
import hashlib
import io
import json
import mmap
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
import zlib
from collections import Counter, OrderedDict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, count, islice, pairwise, repeat
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from urllib.parse import unquote_plus

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kernels.cpu import philox

STOP_WORDS = 500                # the most frequent words, left out (paper, §3)
WORDS = 1000                    # K: 1,000, 10,000 or 100,000 in the paper
ATTEMPTS = 8                    # photos tried for a drawn word before its row counts nothing

_FIRST = np.array([2**(8 * n) - 1 for n in range(9)], np.uint64)  # masks: the first n bytes
BUCKETS = 256                   # files of records, by the first byte of the name's hash
BLOCK_BYTES = 4 << 20          # captions a process takes at a time
BLOCK_ROWS = 50_000
LONGEST_LINE = 64 << 20
SWALLOWED = 20                  # line ends in one CSV field that mean an unclosed quote
MOST_COUNTED = 2_000_000        # distinct words counted at a time: rare ones are dropped beyond
SMALL_FILE = 8 << 20            # captions files below this are indexed without other processes
INDEX_VERSION = 3
PASSES = "passes"               # folder of an unfinished index: what its passes have written
HASH = 32                       # letters of a photo's hash in the YFCC100M table

FORMATS = ("tsv", "csv", "jsonl", "coco", "yfcc")
PICTURES = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
NAME_KEYS = ("file_name", "filename", "image", "image_name", "photo", "file", "path", "name")
_NO_BREAKS = bytes({*range(256)} - {*b"\t\n"})
TEXT_KEYS = ("caption", "text", "comment", "captions", "sentence", "title", "description", "tags")


# --------------------------------------------------------------------------- captions files

@contextmanager
def open_captions(path):
    """The captions file as (stream, file): the stream unpacks gzip and bzip2, told by content."""
    try:
        with open(path, "rb") as file:
            magic = file.read(3)
            if not magic:
                raise ValueError(f"captions: {path} is empty; it needs lines of photo<TAB>caption")
            file.seek(0)
            yield (gzip.open(file) if magic[:2] == b"\x1f\x8b" else
                   bz2.open(file) if magic == b"BZh" else file), file
    except IsADirectoryError:
        raise ValueError(f"captions: {path} is a folder; name the file in it") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"captions: {path} is damaged ({error}); fetch it again") from None
    except OSError as error:
        raise ValueError(f"captions: cannot read {path}: {error.strerror or error}") from None


def recognise(path):
    """The format of a captions file, by its content: one of FORMATS."""
    with open_captions(path) as (stream, _):
        head = stream.read(1 << 16)
        if b"\n" not in head:
            head += stream.readline(LONGEST_LINE)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"captions: {path} is in UTF-16; save it as UTF-8")
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    text = head.decode("utf-8", "replace")
    if sum(text.count(c) for c in "\ufffd\0") > len(text) / 10:
        raise ValueError(f"captions: {path} is not text in UTF-8; save it as UTF-8")
    if b"\r" in head and b"\n" not in head:
        raise ValueError(f"captions: {path} has no line ends but \\r; convert them to \\n")
    line = head.partition(b"\n")[0].decode("utf-8", "replace").strip()
    if line.startswith(("{", "[")):
        try:
            if _first_key(json.loads(line), NAME_KEYS):
                return "jsonl"
        except (ValueError, TypeError, RecursionError):
            pass
        return "coco"
    columns = line.split("\t")
    if _yfcc_url(columns):
        return "yfcc"
    return "csv" if _csv_header(line) else "tsv"


def _first_key(keys, wanted):
    """The first of the wanted names that is among the keys, or None."""
    return next((key for key in wanted if key in keys), None)


def _csv_header(line):
    """(delimiter, column of the photo, column of the caption) of a CSV header, or None."""
    for delimiter in (",", "\t", ";", "|"):
        names = [name.strip().strip('"').lower() for name in line.split(delimiter)]
        photo, text = _first_key(names, NAME_KEYS), _first_key(names, TEXT_KEYS)
        if len(names) > 1 and photo and text:
            return delimiter, names.index(photo), names.index(text)
    return None


def _yfcc_url(columns):
    """The column of the photo's page address, from which the others are counted; 0 if none is."""
    if len(columns) < 23:
        return 0
    return (13 if columns[13][:4] == "http" else 14 if columns[14][:4] == "http" else
            15 if columns[15][:4] == "http" else 0)


def blocks(path, kind):
    """(block, bytes read) pairs, a block of captions for `parse`: bytes, or rows already parted."""
    with open_captions(path) as (stream, file):
        if kind in ("csv", "coco"):
            rows = _csv_rows(stream, path) if kind == "csv" else _coco_rows(stream, path)
            while block := list(islice(rows, BLOCK_ROWS)):
                yield block, file.tell()
            return
        rest = b""
        while block := stream.read(BLOCK_BYTES):
            cut = block.rfind(b"\n") + 1
            if not cut:
                rest += block
                if len(rest) > LONGEST_LINE:
                    raise ValueError(f"captions: {path} has a line of over {LONGEST_LINE >> 20} MB;"
                                     " is it a captions file?")
                continue
            yield rest + block[:cut], file.tell()
            rest = block[cut:]
        if rest:
            yield rest, file.tell()


def _csv_rows(stream, path):
    csv.field_size_limit(1 << 22)
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    header = text.readline()
    if not _csv_header(header):
        raise ValueError(f"captions: the first line of {path} names no columns `image,caption`")
    delimiter, photo, caption = _csv_header(header)
    width = header.count(delimiter) + 1
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            text.detach()                       # the stream is not this wrapper's to close
            return
        except csv.Error:
            yield "", ""                        # counted as a bad line
            continue
        if len(row) > width and caption == width - 1:
            row[caption:] = [delimiter.join(row[caption:])]         # a comma nobody quoted
        if not row:
            continue
        yield (row[photo], _mended(row[caption])) if len(row) > max(photo, caption) else ("", "")
        for line in row[-1].split("\n")[1:] if row[-1].count("\n") > SWALLOWED else ():
            row = line.split(delimiter)         # a quote nobody closed had swallowed these lines
            yield (row[photo], row[caption]) if len(row) > max(photo, caption) else ("", "")


def _mended(caption):
    """A caption whose bytes were not UTF-8, read as Windows' Latin letters."""
    if caption.count("\n") > SWALLOWED:
        caption = caption.partition("\n")[0]
    try:
        caption.encode()
        return caption
    except UnicodeEncodeError:
        return caption.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def _coco_rows(stream, path):
    try:
        table = json.load(stream)
        images, annotations = list(table["images"]), list(table["annotations"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"captions: {path} is neither COCO captions with `images` and "
                         "`annotations`, nor JSON with an object with `file_name` a line") from None
    names = {str(image["id"]): image["file_name"] for image in images
             if isinstance(image, dict) and {"id", "file_name"} <= image.keys()}
    for row in annotations:
        row = row if isinstance(row, dict) else {}                  # counted as a bad line
        name = names.get(str(row.get("image_id"))) or ""
        yield str(name), str(row.get("caption") or "")


def _decode(block):
    """Text of a block of lines: UTF-8, and Windows' Latin letters for a line that is not."""
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError:
        pass
    lines = []
    for line in block.split(b"\n"):
        name, tab, caption = line.partition(b"\t")
        try:
            caption = caption.decode("utf-8")
        except UnicodeDecodeError:
            caption = caption.decode("cp1252", "replace")
        lines.append(name.decode("utf-8", "surrogateescape") + tab.decode() + caption)
    return "\n".join(lines)


def parse(block, kind):
    """Names and captions of a block, and the number of lines that are none: ([str], [str], int)."""
    if kind in ("csv", "coco"):
        rows = block
    else:
        text = _decode(block).removeprefix("\ufeff").replace("\r\n", "\n")
        if kind == "tsv" and (plain := _plain_rows(text)):
            return *plain, 0
        lines = filter(str.strip, text.split("\n"))
        rows = (_yfcc_rows(lines) if kind == "yfcc" else
                map(_tsv_row if kind == "tsv" else _json_row, lines))
    names, captions, bad = [], [], 0
    for name, caption in rows:
        name = name.strip()
        if not name or "\n" in name or "\0" in name or not (name.isascii() or _encodes(name)):
            bad += 1
            continue
        names.append(name)
        captions.append(caption)
    return names, captions, bad


def _encodes(name):
    """True unless the name has half a character, as JSON may: no file is called so."""
    try:
        return bool(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


def _plain_rows(text):
    """Names and captions of lines that all have one tab, at five times the speed, or None."""
    text = text.rstrip("\n") + "\n"
    breaks = text.encode("utf-8", "surrogateescape").translate(None, _NO_BREAKS)
    if breaks != b"\t\n" * (len(breaks) // 2) or "\0" in text:
        return None
    parts = text.replace("\t", "\n").split("\n")
    names, captions = parts[:-1:2], parts[1::2]
    names = [*map(_unnumbered if "#" in "".join(names) else str.strip, names)]
    return (names, captions) if all(names) else None


def _unnumbered(name):
    """A photo's name without the `#0` that numbers its captions."""
    stem, mark, number = name.rstrip().rpartition("#")
    return (stem if mark and number.isdigit() else name).strip()


def _tsv_row(line):
    name, tab, caption = line.partition("\t")
    return _unnumbered(name) if tab else "", caption


def _json_row(line):
    try:
        row = json.loads(line)
        name = row[_first_key(row, NAME_KEYS)]
        texts = [row[key] for key in ("text", "caption", "captions", "tags", "title",
                                      "description") if key in row]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "", ""
    parts = chain.from_iterable(text if isinstance(text, list) else [text] for text in texts)
    return str(name or ""), " ".join(str(part) for part in parts if part is not None)


def _yfcc_rows(lines):
    """(name, text) of lines of the YFCC100M table, title, description and tags; no videos.

    Where the table has the photo's hash, its name is hash/id.jpg, for `Folder` to find either.
    """
    names, texts = [], []
    for line in lines:
        columns = line.split("\t")
        url = _yfcc_url(columns)
        if not url:
            names.append("")                    # counted as a bad line
            texts.append("")
        elif columns[-1].strip() != "1":
            first = int(url == 15 or (url == 14 and len(columns[1]) < HASH))    # a line number
            photo = f"{columns[first]}.{columns[-2] or 'jpg'}"
            hashed = len(columns[first + 1]) == HASH
            names.append(f"{columns[first + 1]}/{photo}" if hashed else photo)
            title, description, tags = columns[url - 7:url - 4]
            texts.append(f"{title} {description} {tags.replace(',', ' ')}")
    text = "\n".join(texts).replace("%0A", "+").replace("%0a", "+")  # line ends of descriptions
    return zip(names, unquote_plus(text).split("\n"))


# --------------------------------------------------------------------------------- the text

class _Letters(dict):
    """The table of `normalise`: what each character becomes; filled as characters are met."""

    JOINING = "'’‘ʼ`´-‐‑."                      # don't → dont, tri-colored → tricolored, u.s. → us
    KEEP = "йўї"                                # letters of their own, not accented ones

    def __missing__(self, code):
        self[code] = value = self.rule(chr(code))
        return value

    def rule(self, c):
        category = unicodedata.category(c)
        if c == "\n":
            return c
        if c in self.JOINING or category in ("Cf", "Me") or "\u0300" <= c <= "\u036f":
            return None                         # gone, the letters around it join
        if category[0] in "PSZC" or category == "No":
            return " "
        if 0xFE00 <= ord(c) <= 0xFE0F:
            return None                         # variation selectors: of emoji
        script = unicodedata.name(c, "").partition(" ")[0]
        if script in ("LATIN", "GREEK", "CYRILLIC") and c not in self.KEEP:
            c = "".join(part for part in unicodedata.normalize("NFD", c)
                        if not unicodedata.combining(part))
        return c


_LETTERS = _Letters()


def normalise(text):
    """Lower-case, accents and punctuation gone; words are what blanks part. Lines stay lines.

    Accents go from Latin, Greek and Cyrillic letters only: in other scripts marks are vowels.
    """
    text = text.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return text.translate(_LETTERS)


def _normalised(captions):
    """normalise of many lines, joined; those of ASCII, at thirty times the speed, apart."""
    plain = iter(normalise("\n".join(filter(str.isascii, captions))).split("\n"))
    other = iter(normalise("\n".join(c for c in captions if not c.isascii())).split("\n"))
    return "\n".join(next(plain if caption.isascii() else other) for caption in captions)


def words_of(caption):
    """The words of one caption (paper, §3: text): tokens that are not digits alone."""
    return [word for word in normalise(caption.replace("\n", " ")).split()
            if not word.isdecimal()]


# ---------------------------------------------------------------------------- the dictionary

@dataclass(frozen=True)
class Text:
    """What decides which words are classes and which photos are held out."""

    words: int = WORDS              # K
    stop_words: int = STOP_WORDS    # the most frequent ones, left out
    valid: float = 0.1              # share of the photos that is held out


def name_hashes(names):
    """32 bits of each photo's name; the smallest are held out, whatever photos are added."""
    fresh, digests = hashlib.blake2b(digest_size=4), []
    for name in names:
        digest = fresh.copy()                   # quicker than a new one
        digest.update(name)
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), ">u4").astype(np.uint32)


def refused(name):
    """True for a name that is absolute or leaves the images folder."""
    return name[:1] in b"/\\" or (b".." in name and b".." in name.replace(b"\\", b"/").split(b"/"))


def _numbered(things):
    """The distinct things in the order they come, and each thing's number among them."""
    number = dict(zip(dict.fromkeys(things), count()))
    return list(number), np.fromiter(map(number.__getitem__, things), np.int64, len(things))


def _photos(names):
    """Distinct names of a block, in bytes, each caption's number among them, refused numbers."""
    distinct, owner = _numbered(names)
    distinct = [name.encode("utf-8", "surrogateescape") for name in distinct]
    joined = b"\n" + b"\n".join(distinct)       # one look at all is faster than one at each
    odd = b".." in joined or b"\n/" in joined or b"\n\\" in joined
    return distinct, owner, [i for i, name in enumerate(distinct) if refused(name)] if odd else []


def _tokens(captions):
    """Distinct words of captions, each token's number among them, and tokens per caption.

    A token of up to eight bytes is one 64-bit number, so that NumPy sorts a block's
    half a million of them; only longer ones become strings.
    """
    text = _normalised([caption.replace("\n", " ") for caption in captions]).encode()
    raw = np.frombuffer(b" %b\n       " % text, np.uint8)
    blank = raw <= 32                           # `normalise` leaves no other white space
    edges = np.flatnonzero(blank[1:] != blank[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    lengths = ends - starts
    short = lengths <= 8
    eight = np.ndarray(len(raw) - 7, "<u8", raw, strides=(1,))      # the eight bytes at each place
    values, numbers = np.unique(eight[starts[short]] & _FIRST[lengths[short]], return_inverse=True)
    pairs = zip(starts[~short].tolist(), ends[~short].tolist())
    long, long_numbers = _numbered([text[a - 1:b - 1] for a, b in pairs])
    number = np.empty(len(starts), np.int64)
    number[short], number[~short] = numbers, len(values) + long_numbers
    words = [word.decode() for word in values.view("S8").tolist() + long]
    line_ends = np.searchsorted(starts, np.flatnonzero(raw == 10))
    return words, number, np.diff(line_ends, prepend=0)[:len(captions)]


def count_block(block, kind, text):
    """Words of the block's training captions: (dict, captions, bad lines, refused names)."""
    names, captions, bad = parse(block, kind)
    distinct, owner, away = _photos(names)
    train = name_hashes(distinct) >= text.valid * 2**32
    train[away] = False
    words, number, per_caption = _tokens(captions)
    counts = np.bincount(number[np.repeat(train[owner], per_caption)], minlength=len(words))
    found = {word: n for word, n in zip(words, counts.tolist()) if n}
    return found, len(names), bad, [distinct[i].decode("utf-8", "surrogateescape")
                                    for i in away]


class Dictionary:
    """The K words, most frequent first; `ids` maps a word to its class."""

    def __init__(self, words):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)


def choose_words(counts, text):
    """The dictionary of the counts: the K most frequent words after the stop words."""
    ranked = sorted((word for word in counts if not word.isdecimal()),
                    key=lambda word: (-counts[word], word))
    if not ranked:
        raise ValueError("no training photo has a caption with words; lower --valid "
                         f"({text.valid:g} of the photos are held out) or check --format")
    words = ranked[text.stop_words:text.stop_words + text.words]
    if not words:
        raise ValueError(f"the training captions have {len(ranked)} different words and "
                         f"--stop-words {text.stop_words} leaves none; lower --stop-words")
    return Dictionary(words)


def _prune(counts):
    """Drop the rarest words until half of MOST_COUNTED are left, so that memory is bounded."""
    least = 1
    while len(counts) > MOST_COUNTED // 2:
        least += 1
        for word in [word for word, times in counts.items() if times < least]:
            del counts[word]


# --------------------------------------------------------------------------------- the index

_worker = {}                                    # what an indexing process was started with


def _start_worker(ids):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    _worker["ids"] = ids

    def end_with_parent():                      # which may have been killed
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def record_block(block, kind, ids=None):
    """The block's (photo, words) records, framed for each of the 256 files: [bytes]."""
    ids = _worker["ids"] if ids is None else ids
    names, captions, _ = parse(block, kind)
    distinct, owner, away = _photos(names)
    bucket = (name_hashes(distinct) >> 24).astype(np.uint16)
    bucket[away] = BUCKETS
    order = np.argsort(bucket, kind="stable")                       # photos by file
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    words, number, per_caption = _tokens(captions)
    word = np.fromiter(map(ids.get, words, repeat(-1)), np.int64, len(words))[number]
    photo = np.repeat(rank[owner], per_caption)                     # each token's photo
    pairs = _distinct((photo * len(ids) + word)[word >= 0])         # each word once a photo
    photo, word = np.divmod(pairs, len(ids))
    per_photo = np.bincount(photo, minlength=len(order))
    word_ends = np.concatenate([[0], np.cumsum(per_photo)])
    ends = np.searchsorted(bucket[order], np.arange(BUCKETS + 1))
    distinct = [distinct[i] for i in order.tolist()]
    return [_frame(distinct[a:b], per_photo[a:b], word[word_ends[a]:word_ends[b]])
            for a, b in pairwise(ends.tolist())]


def _distinct(numbers):
    """The distinct ones of numbers from 0, ascending; np.unique takes ten times as long."""
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=-1) > 0]


def _frame(names, per_photo, words):
    """One write to a file of records: counts, names, number of words of each, words."""
    if not names:
        return b""
    blob = b"\n".join(names)
    head = np.array([len(names), len(blob), len(words)], np.int64)
    return (head.tobytes() + blob + per_photo.astype(np.int32).tobytes()
            + words.astype(np.int32).tobytes())


def group_records(path, k, valid):
    """One file of records grouped by photo, held-out photos first, photos without words left out.

    Returns names (bytes), their lengths, words per photo, the words, held-out photos, left out.
    """
    names, per_photo, words = [], [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    with open(path, "rb") as file:
        while head := file.read(24):
            count, size, total = np.frombuffer(head, np.int64).tolist()
            names += file.read(size).split(b"\n")
            per_photo.append(np.frombuffer(file.read(4 * count), np.int32))
            words.append(np.frombuffer(file.read(4 * total), np.int32))
    names, owner = _numbered(names)
    held = name_hashes(names) < valid * 2**32
    order = np.argsort(~held, kind="stable")
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    photo = np.repeat(rank[owner], np.concatenate(per_photo))
    photo, word = np.divmod(_distinct(photo * k + np.concatenate(words)), k)
    per_photo = np.bincount(photo, minlength=len(names))
    used = np.flatnonzero(per_photo)
    kept = [names[i] for i in order[used]]
    return (b"".join(kept), np.fromiter(map(len, kept), np.int64, len(kept)), per_photo[used],
            word.astype(np.int32), int(held[order[used]].sum()), len(names) - len(used))


class _Column:
    """An .npy file that grows: its header is written again when the length is known."""

    HEADER = 128

    def __init__(self, path, dtype):
        self.dtype, self.length = np.dtype(dtype), 0
        self.file = open(path, "wb")
        self.file.write(b"\0" * self.HEADER)

    def append(self, array):
        self.length += len(array)
        self.file.write(np.ascontiguousarray(array, self.dtype).data)

    def close(self):
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({self.length},)}}"
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + (self.HEADER - 10).to_bytes(2, "little")
                        + text.encode().ljust(self.HEADER - 11) + b"\n")
        self.file.close()


def _in_order(executor, function, items, *arguments):
    """Results of function(item, …) in order; only a few items are read ahead."""
    if executor is None:
        yield from (function(item, *arguments) for item in items)
        return
    running = deque()
    for item in items:
        with _without_main():                   # the first tasks start a process each
            running.append(executor.submit(function, item, *arguments))
        if len(running) > 2 * executor._max_workers:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def fingerprint(path, kind, text, dictionary):
    """Of the captions file (size, time, sampled blocks) and all that decides the index."""
    with open_captions(path):
        info = os.stat(path)                    # the errors of a missing file, said kindly
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        for start in np.linspace(0, max(0, info.st_size - 4096), 16).astype(int):
            file.seek(start)
            digest.update(file.read(4096))
    if dictionary:
        digest.update("\n".join(dictionary.words).encode())
    return {"version": INDEX_VERSION, "size": info.st_size, "mtime": info.st_mtime_ns,
            "content": digest.hexdigest(), "format": kind, **asdict(text)}


def build_index(path, folder, text, kind=None, dictionary=None, processes=0, say=print):
    """The index of a captions file in `folder`, from its cache if nothing changed.

    With a dictionary (of a trained model) only the second pass runs. `say` gets progress lines.
    Returns an Index; ValueError with the remedy if the captions cannot be used.
    """
    started = time.monotonic()
    kind = kind or recognise(path)
    if (index := cached_index(path, folder, text, kind, dictionary)) is not None:
        return index
    origin = fingerprint(path, kind, text, dictionary)
    processes = 0 if os.path.getsize(path) < SMALL_FILE else processes
    if os.path.isdir(folder) and os.listdir(folder) and not os.path.exists(
            os.path.join(folder, "index.json")):
        raise ValueError(f"{folder} holds other things than an index; move them away")
    work = folder + ".part"
    gc.disable()                                # millions of strings, and no cycles among them
    try:
        facts = _passes(path, work, text, kind, dictionary, origin, processes, say)
    except BrokenProcessPool:
        raise RuntimeError("an indexing process died, perhaps for lack of memory; "
                           "try --workers 0") from None
    except Exception:                           # an interrupt keeps the passes that were made
        shutil.rmtree(work, ignore_errors=True)                     # the disk may be full
        raise
    finally:
        gc.enable()
    facts["seconds"] = round(time.monotonic() - started, 2)
    for name, thing in ("words.json", facts.pop("words")), ("index.json", facts):
        _write(os.path.join(work, name), thing)
    shutil.rmtree(folder + ".old", ignore_errors=True)
    if os.path.isdir(folder):
        os.rename(folder, folder + ".old")      # never half of an index, whenever this is killed
    os.rename(work, folder)
    for rest in folder + ".old", os.path.join(folder, PASSES):
        shutil.rmtree(rest, ignore_errors=True)
    return Index(folder)


def _passes(path, work, text, kind, dictionary, origin, processes, say):
    """Count words, write records, group them; returns the index's facts, with its words.

    After a kill, the passes that were finished before it are not made again.
    """
    passes = os.path.join(work, PASSES)
    state = os.path.join(passes, "state.json")
    facts = _left(state, origin)
    if facts:
        say(f"going on with the index that was left in {work}")
    else:
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(passes)
        facts = {"fingerprint": origin, "captions": 0, "bad_lines": 0, "refused": 0,
                 "refused_names": []}
        if dictionary is None:
            counts = _count(path, kind, text, processes, facts, say)
            if not facts["captions"]:
                raise ValueError(f"captions: {path} has no captions as {kind}; "
                                 f"--format may be one of {', '.join(FORMATS)}")
            dictionary = choose_words(counts, text)
        facts["words"] = dictionary.words
        _write(state, facts)
    dictionary = Dictionary(facts["words"])
    if not facts.pop("recorded", False):
        _record(path, kind, dictionary, processes, passes, say)
        _write(state, facts | {"recorded": True})
    return facts | _group(work, dictionary, text, processes, say)


def _left(state, origin):
    """The facts of an index of the same origin that was left unfinished, or None."""
    try:
        with open(state) as file:
            facts = json.load(file)
        return facts if facts["fingerprint"] == origin and facts["words"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path, thing):
    """JSON that is whole or not there."""
    with open(path + ".part", "w") as file:
        json.dump(thing, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


def cached_index(path, folder, text, kind, dictionary=None):
    """The index in `folder` if it was built from this captions file with these options, or None."""
    try:
        index = Index(folder)
        if index.facts["fingerprint"] != fingerprint(path, kind, text, dictionary):
            return None
        shutil.rmtree(os.path.join(folder, PASSES), ignore_errors=True)    # left by a kill
        return index
    except (OSError, ValueError, KeyError, TypeError):              # none, or a damaged one
        return None


def _executor(processes, ids=None):
    """Processes for one pass, or None to do it here, with whole tracebacks."""
    return processes and ProcessPoolExecutor(
        processes, _forkserver(), _start_worker, (ids,)) or None


def _forkserver():
    """Where processes come from: a server that has imported this file, and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data"])
    return context


@contextmanager
def _without_main():
    """Processes that start meanwhile do not import the script that is running."""
    main = sys.modules["__main__"]
    facts = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(facts)


def _told(items, size, what, say):
    """The blocks of `items`, saying every few seconds how far the pass is."""
    started = last = time.monotonic()
    for block, position in items:
        yield block
        now = time.monotonic()
        if now - last > 5:
            last = now
            left = (now - started) * max(0, size - position) / max(1, position)
            say(f"{what}: {position / max(1, size):.0%}, {left:.0f} s left")


def _count(path, kind, text, processes, facts, say):
    counts, size = Counter(), os.path.getsize(path)
    executor = _executor(processes)
    items = _told(blocks(path, kind), size, "counting words", say)
    for found, captions, bad, away in _in_order(executor, count_block, items, kind, text):
        counts.update(found)
        if len(counts) > MOST_COUNTED:
            _prune(counts)
        facts["captions"] += captions
        facts["bad_lines"] += bad
        facts["refused"] += len(away)
        facts["refused_names"] += away[:max(0, 100 - len(facts["refused_names"]))]
    if executor:
        executor.shutdown()
    return counts


def _record(path, kind, dictionary, processes, passes, say):
    size = os.path.getsize(path)
    executor = _executor(processes, dictionary.ids)
    arguments = (kind,) if executor else (kind, dictionary.ids)
    files = [open(os.path.join(passes, f"{i:03}.records"), "wb") for i in range(BUCKETS)]
    try:
        items = _told(blocks(path, kind), size, "writing the index", say)
        for frames in _in_order(executor, record_block, items, *arguments):
            for file, frame in zip(files, frames):
                file.write(frame)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files:
            file.close()
        if executor:
            executor.shutdown(cancel_futures=True)


def _group(work, dictionary, text, processes, say):
    """Group every file of records and write the index's columns; returns facts."""
    columns = {name: _Column(os.path.join(work, name + ".npy"), dtype) for name, dtype in
               (("names", np.uint8), ("name_ends", np.int64), ("words", np.int32),
                ("word_ends", np.int64))}
    paths = [os.path.join(work, PASSES, f"{i:03}.records") for i in range(BUCKETS)]
    executor = _executor(processes)
    held = left_out = names = words = 0
    items = _told(zip(paths, count(1)), BUCKETS, "grouping the index", say)
    for blob, lengths, per_photo, word, some_held, some_left in _in_order(
            executor, group_records, items, len(dictionary), text.valid):
        columns["names"].append(np.frombuffer(blob, np.uint8))
        columns["name_ends"].append(names + np.cumsum(lengths))
        columns["words"].append(word)
        columns["word_ends"].append(words + np.cumsum(per_photo))
        names, words, held, left_out = (names + len(blob), words + len(word), held + some_held,
                                        left_out + some_left)
    if executor:
        executor.shutdown()
    for column in columns.values():
        column.close()
    _invert(work, len(dictionary), held)
    return {"held_out": held, "without_words": left_out}


def _invert(work, k, held, rows=2_000_000):
    """photo → words becomes word → training photos, by counting sort through memory maps."""
    words = np.load(os.path.join(work, "words.npy"), mmap_mode="r")
    ends = np.load(os.path.join(work, "word_ends.npy"), mmap_mode="r")
    first = int(ends[held - 1]) if held else 0
    counts = np.zeros(k, np.int64)
    for start in range(first, len(words), rows):
        counts += np.bincount(words[start:start + rows], minlength=k)
    place = np.concatenate([[0], np.cumsum(counts)])
    np.save(os.path.join(work, "photo_ends.npy"), place[1:])
    path = os.path.join(work, "photos.npy")
    if place[-1] == 0:
        return np.save(path, np.empty(0, np.uint32))
    out = np.lib.format.open_memmap(path, "w+", np.uint32, (int(place[-1]),))
    place = place[:-1].copy()
    for start in range(first, len(words), rows):
        part = words[start:start + rows].astype(np.int64)
        photo = np.searchsorted(ends, np.arange(start, start + len(part)), side="right")
        part, photo = np.divmod(np.sort(part << 32 | photo), 1 << 32)
        counts = np.bincount(part, minlength=k)
        fresh = np.cumsum(counts) - counts                          # first of each word's run
        out[(place - fresh)[part] + np.arange(len(part))] = photo
        place += counts
    out.flush()


class Index:
    """photo → words and word → training photos, by memory map; the first photos are held out."""

    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, "index.json")) as file:
            self.facts = json.load(file)
        with open(os.path.join(folder, "words.json")) as file:
            self.dictionary = Dictionary(json.load(file))
        for name in ("names", "name_ends", "words", "word_ends", "photos", "photo_ends"):
            path = os.path.join(folder, name + ".npy")
            empty = os.path.getsize(path) <= _Column.HEADER         # nothing to map
            setattr(self, "_" + name, np.load(path, mmap_mode=None if empty else "r"))
        self.held_out = self.facts["held_out"]

    def __len__(self):
        return len(self._word_ends)

    @property
    def labels(self):
        """The number of words of all photos together."""
        return len(self._words)

    @property
    def training(self):
        """The number of training photos; they follow the held-out ones."""
        return len(self) - self.held_out

    def name(self, photo):
        """The photo's name below the images folder."""
        start = self._name_ends[photo - 1] if photo else 0
        return self._names[start:self._name_ends[photo]].tobytes().decode("utf-8",
                                                                          "surrogateescape")

    def words(self, photo):
        """The classes of a photo's words, ascending."""
        start = self._word_ends[photo - 1] if photo else 0
        return np.asarray(self._words[start:self._word_ends[photo]])

    def photos(self, word):
        """The training photos that carry a word."""
        start = self._photo_ends[word - 1] if word else 0
        return self._photos[start:self._photo_ends[word]]

    def photo_counts(self):
        """N_k, the number of training photos of each word."""
        return np.diff(self._photo_ends, prepend=0)

    def share(self, sampling):
        """The share of the training rows that carry each word, (K,): 1/K by class, N_k/N by image.

        By class because a row then has one word, and every word is drawn alike.
        """
        k = len(self.dictionary)
        return np.full(k, 1 / k) if sampling == "class" else self.photo_counts() / self.training


# ----------------------------------------------------------------------------------- draws

def _below(raw, n):
    """A uniform number below n from 64 random bits."""
    return int(raw) * int(n) >> 64


class Draws:
    """The photos and targets of one step, a pure function of (seed, step, row, attempt).

    Sampling by class: a word uniformly, then one of its photos uniformly; that word is the row's
    only target (paper, §3: class balancing). By image: a photo uniformly, with all its words.
    Row i of attempt a takes the block of Philox counter (i, step, a, stream 0): word, photo, crop
    and flip. A photo that cannot be read is replaced by another of the same word. With `part`, the
    photos are only those of some of the batch's rows, one rank's share; words are those of all.
    """

    def __init__(self, index, seed, step, count, sampling="class", part=slice(None)):
        self.index, self.seed, self.step, self.sampling = index, seed, step, sampling
        self.count, self.rows = count, range(count)[part]
        raw = philox(seed, (0, step, 0, 0), 4 * count).reshape(count, 4)
        self.pixels = raw[part, 2]
        self.words = [_below(r, len(index.dictionary)) for r in raw[:, 0]]
        self.photos = [self._photo(i, raw[i, 1]) for i in self.rows]
        self.others = [] if sampling == "class" else [        # photos of the other ranks' rows
            self._photo(i, raw[i, 1]) for i in range(count) if i not in self.rows]
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
        if self.sampling == "image" or self.attempts[row] >= ATTEMPTS:
            self.weights[row] = 0
            return None
        raw = philox(self.seed, (self.rows[row], self.step, int(self.attempts[row]), 0), 4)
        self.photos[row] = self._photo(self.rows[row], raw[1])
        return self.photos[row]

    def targets(self):
        """int32 (N, T), padded with -1."""
        if self.sampling == "class":
            return np.array(self.words, np.int32)[self.rows, None]  # (N, 1)
        return pad_rows([self.index.words(photo) for photo in self.photos])

    def classes(self, share, negatives=0):
        """The classes C whose scores this step needs, and each one's chance to be among them.

        They are the words of the whole batch, and `negatives` more: one drawn uniformly from each
        of as many runs of classes. The chance is that of a class where one row does not carry it:
        another of the B rows does, with probability 1 - (1 - share)^(B-1), or its run gave it.
        share (K,): of the rows that carry each word. Returns int32 (C,), ascending, and (C,).
        """
        k = len(share)
        words = self.words if self.sampling == "class" else np.concatenate(
            [self.index.words(photo) for photo in self.photos + self.others])
        ends = np.arange(min(negatives, k) + 1) * k // max(1, min(negatives, k))
        runs = np.diff(ends)
        raw = philox(self.seed, (0, self.step, 0, 3), len(runs)) >> 32
        found = np.union1d(words, ends[:-1] + (raw * runs.astype(np.uint64) >> 32).astype(int))
        absent = (1 - share[found]) ** (self.count - 1)             # from the other rows
        if len(runs):
            absent *= 1 - 1 / runs[np.searchsorted(ends, found, side="right") - 1]
        return found.astype(np.int32), 1 - absent

    def crops(self, spare, random):
        """top, left (N,) and flip (N,): random ones, or the centre (paper, §3)."""
        count = len(self.photos)
        if not random:
            return centre(count, spare)
        bits = self.pixels
        top, left = (((bits >> shift) & 0xFFFF) * (spare + 1) >> 16 for shift in (0, 16))
        return top.astype(np.int64), left.astype(np.int64), (bits >> 32 & 1).astype(bool)


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


class Listed:
    """Given photos, in their order and without replacement: for evaluation."""

    def __init__(self, photos):
        self.photos = list(photos)
        self.weights = np.ones(len(self.photos), np.float32)

    def retry(self, row):
        self.weights[row] = 0
        return None


# ---------------------------------------------------------------------------------- photos

def decode(path, size):
    """A photo as uint8 (size, size, 3), rescaled to a square (paper, §3), and its content's hash.

    Any mode becomes RGB, the camera's orientation is applied. ValueError says what is wrong.
    """
    try:
        data = _read(path)
    except OSError as error:
        raise ValueError((error.strerror or str(error)).lower()) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=PICTURES)
            image.draft("RGB", (size, size))    # JPEG: decode at a fraction of the size
            image = _rgb(ImageOps.exif_transpose(image))
            image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    except UnidentifiedImageError:
        raise ValueError("not a picture") from None
    except Image.DecompressionBombError:
        raise ValueError(f"over {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except MemoryError:
        raise ValueError("too large for the memory") from None
    except OSError as error:
        raise ValueError((error.strerror or str(error)).splitlines()[0].lower()) from None
    except Exception as error:                  # broken files raise anything from deep inside
        raise ValueError(f"cannot be decoded ({error})"[:200]) from None
    return np.asarray(image), hashlib.blake2b(data, digest_size=8).digest()


def find(path):
    """The path in the form of Unicode under which it is on the disk, or None."""
    forms = [path] if path.isascii() else [path, *(unicodedata.normalize(form, path)
                                                   for form in ("NFC", "NFD"))]
    return next((name for name in forms if os.path.exists(name)), None)


class Folder:
    """Finds photos below a folder: under their names, or in sub-folders, however those are called.

    A name of the YFCC100M table, hash/id.jpg, is also looked for as id.jpg and, as that set's
    photos are stored, as abc/def/abcdef….jpg by its hash. Sub-folders may be named by letters of
    the photos in them (123/1234567.jpg, 67/45/1234567.jpg): a look at some of them tells which.
    Of those with other names, MOST are remembered and tried one after the other.
    """

    LOOK, MOST, DEEP = 10_000, 1000, 3          # entries looked at in a folder; ways; levels

    def __init__(self, folder):
        self.folder = folder
        self.ways = list(dict.fromkeys(islice(self._ways(folder, ()), self.MOST)))

    def _ways(self, folder, parts):
        """For each sub-folder with a photo: how it is called, as `_way` says."""
        try:
            with os.scandir(folder) as entries:
                entries = sorted(islice(entries, self.LOOK), key=lambda entry: entry.name)
        except OSError:
            return
        photo = next((entry.name for entry in entries
                      if entry.name[0] != "." and entry.is_file()), None)
        if photo and parts:
            yield _way(parts, os.path.splitext(photo)[0])
        for entry in entries if len(parts) < self.DEEP else ():
            if entry.is_dir():
                yield from self._ways(entry.path, (*parts, entry.name))

    def _candidates(self, name):
        yield name
        if name[HASH:HASH + 1] == "/":
            code, name = name[:HASH], name[HASH + 1:]
            yield name
            yield f"{code[:3]}/{code[3:6]}/{code}{os.path.splitext(name)[1]}"
        stem = os.path.splitext(name)[0]
        for way in self.ways:
            parts = [part if isinstance(part, str) else stem[slice(*part)] for part in way]
            if "/" not in "".join(parts) and not {"", ".", ".."} & set(parts):
                yield "/".join([*parts, name])          # and never outside the folder

    def find(self, name):
        """The path of the photo's file; where there is none, of the file it should be."""
        paths = (find(os.path.join(self.folder, candidate)) for candidate in self._candidates(name))
        return next(filter(None, paths), os.path.join(self.folder, name))


def _way(parts, stem):
    """Which letters of the photo's name, from where to where, its folders are; or their names."""
    way, used = [], 0
    for part in parts:
        size = len(part)
        places = (used, used + size), (0, size), (-size, None), (-used - size, -used)
        way.append(next((place for place in places if stem[slice(*place)] == part), None))
        used += size
    return tuple(way) if all(way) else parts


def any_photo(folder, index):
    """True if any photo of the index is on the disk: a sample in sub-folders, too, then all."""
    sample = np.linspace(0, len(index) - 1, min(len(index), 200)).astype(int)
    found = Folder(folder)
    return any(os.path.exists(found.find(index.name(int(i)))) for i in sample) or any(
        find(os.path.join(folder, index.name(i))) for i in range(len(index)))


def _read(path):
    """The bytes of a regular file."""
    path = find(path) or path
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("not a file")
    if not info.st_size:
        raise ValueError("zero bytes")
    with open(path, "rb") as file:
        return file.read()


def _rgb(image):
    """Any mode as RGB: 16 bits scaled down, transparent parts on white."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image).astype(np.float64)
        top = 65535 if image.mode.startswith("I") else max(1e-9, float(np.nanmax(pixels)))
        image = Image.fromarray((np.nan_to_num(pixels) / top * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode_loop(connection, file, folder, slots, size):
    """A worker process: decode the photos it is told to into the shared buffer, until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    buffer = _map(file.detach(), slots, size)
    while True:
        try:
            task, slot, name = connection.recv()
        except (EOFError, OSError):
            return
        try:
            buffer[slot], digest = decode(folder.find(name), size)
            result = task, None, digest
        except ValueError as error:
            result = task, str(error), None
        try:
            connection.send(result)
        except OSError:                         # nobody waits for it any more
            return


def _map(descriptor, slots, size):
    shape = (slots, size, size, 3)
    memory = mmap.mmap(descriptor, int(np.prod(shape)))
    return np.frombuffer(memory, np.uint8).reshape(shape)


class Loader:
    """Decoded photos in a shared buffer, least recently used ones making way; batches in order.

    The buffer holds every photo where memory allows, since no number of cores decodes fast enough
    for a big GPU; `loaders` share this machine's memory. workers = 0 decodes here. `skipped` maps a
    photo's name to what was wrong; `digests` its number to the hash of its content. A worker that
    dies is replaced; a photo that kills two is skipped.
    """

    QUEUE = 64                                  # tasks sent ahead to a worker: results fit a pipe
    DIGESTS = 500_000                           # photos whose contents are remembered
    AHEAD = 2                                   # batches under way besides the one in use

    def __init__(self, folder, name, photos, size, batch, workers=0, scratch=None, loaders=1):
        self.folder, self.name, self.size = Folder(folder), name, size
        self.slots = self._room(photos, (self.AHEAD + 2) * batch, scratch, loaders)
        self.buffer = _map(self.file.fileno(), self.slots, size)
        self.free = list(range(self.slots))
        self.ready = OrderedDict()              # photo -> slot, least recently used first
        self.pins = Counter()                   # photos that batches under way hold
        self.waiting = {}                       # photo -> [slot, the rows that wait for it]
        self.backlog, self.done = deque(), deque()
        self.skipped, self.digests, self.deaths = {}, {}, Counter()
        self.decoded = 0
        self.workers = [self._worker() for _ in range(workers)]

    def _room(self, photos, least, scratch, loaders):
        """Reserve the shared buffer, in memory if it fits, else in the scratch folder."""
        each = self.size * self.size * 3
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        slots = max(least, min(photos, memory // 4 // loaders // each))
        for place in ("/dev/shm", scratch, tempfile.gettempdir()):
            for wanted in (slots, least):
                if place and os.path.isdir(place) and (
                        shutil.disk_usage(place).free > wanted * each * 1.2):
                    try:
                        self.file = tempfile.TemporaryFile(dir=place)
                        os.posix_fallocate(self.file.fileno(), 0, wanted * each)
                        return wanted
                    except OSError:
                        continue
        raise RuntimeError(f"no room for {least * each >> 20} MB of decoded photos in memory or "
                           f"on disk; free some, or lower --batch")

    def _worker(self):
        context = _forkserver()
        here, there = context.Pipe()
        process = context.Process(target=_decode_loop, daemon=True, args=(
            there, DupFd(self.file.fileno()), self.folder, self.slots, self.size))
        with _without_main():
            process.start()
        there.close()
        return {"process": process, "pipe": here, "tasks": deque()}

    def close(self):
        """End the workers."""
        for worker in self.workers:
            worker["pipe"].close()
        for worker in self.workers:
            worker["process"].join(5)
        self.workers = []
        self.file.close()

    def batches(self, plans):
        """(plan, photos uint8 (N, S, S, 3)) for each plan, in order; rows of weight 0 are blank.

        A plan has `photos`, and `retry(row)`, which gives another photo or None.
        """
        plans, running = iter(plans), deque()
        while True:
            for plan in islice(plans, self.AHEAD + 1 - len(running)):
                running.append(plan)
                plan.missing, plan.held = len(plan.photos), {}
                for row in range(len(plan.photos)):
                    self._want(plan, row)
            if not running:
                return
            plan = running.popleft()
            while plan.missing:
                self._pump()
            photos = np.empty((len(plan.photos), self.size, self.size, 3), np.uint8)
            for row in range(len(photos)):
                if row in plan.held:
                    photo, slot = plan.held[row]
                    photos[row] = self.buffer[slot]
                    self.pins[photo] -= 1
                else:
                    photos[row] = 0
            yield plan, photos

    def _want(self, plan, row):
        photo = plan.photos[row]
        if photo in self.ready:
            self.ready.move_to_end(photo)
            self._give(photo, plan, row)
        elif photo in self.waiting:
            self.waiting[photo].append((plan, row))
        else:
            self.waiting[photo] = [(plan, row)]
            self.backlog.append(photo)
            self._send()

    def _give(self, photo, plan, row):
        self.pins[photo] += 1
        plan.held[row] = photo, self.ready[photo]
        plan.missing -= 1

    def _slot(self):
        """A slot to decode into: a free one, or that of the least recently used photo."""
        if not self.free:
            old = next(photo for photo in self.ready if not self.pins[photo])
            self.free.append(self.ready.pop(old))
            del self.pins[old]
        return self.free.pop()

    def _send(self):
        """Hand the backlog to the workers that have room, or decode one photo here."""
        while self.backlog:
            worker = min(self.workers, key=lambda w: len(w["tasks"]), default=None)
            if worker and len(worker["tasks"]) >= self.QUEUE:
                return
            photo = self.backlog.popleft()
            slot, name = self._slot(), self.name(photo)
            if worker is None:
                try:
                    self.buffer[slot], digest = decode(self.folder.find(name), self.size)
                    self.done.append((photo, slot, None, digest))
                except ValueError as error:
                    self.done.append((photo, slot, str(error), None))
                continue
            worker["tasks"].append((photo, slot))
            try:
                worker["pipe"].send((photo, slot, name))
            except OSError:
                pass                            # it died: _pump sees the closed pipe

    def _pump(self):
        """Take in at least one result."""
        if not self.done:
            for pipe in wait([worker["pipe"] for worker in self.workers]):
                worker = next(w for w in self.workers if w["pipe"] is pipe)
                try:
                    photo, error, digest = pipe.recv()
                    self.done.append((photo, worker["tasks"].popleft()[1], error, digest))
                except (EOFError, OSError):
                    self._bury(worker)
        while self.done:
            self._take(*self.done.popleft())
        self._send()

    def _bury(self, worker):
        """A worker died over its first task: start another, try the photo once more."""
        worker["process"].join(1)
        self.workers.remove(worker)
        tasks = worker["tasks"]
        if tasks:
            photo, slot = tasks[0]
            self.deaths[photo] += 1
            if self.deaths[photo] > 1:
                self.done.append((photo, slot, "its decoding process died twice", None))
                tasks.popleft()
        if sum(self.deaths.values()) > 20 + self.decoded // 100:
            raise RuntimeError("decoding processes keep dying, perhaps for lack of memory; "
                               "try fewer --workers, or --workers 0 to see the error")
        for photo, slot in reversed(tasks):
            self.free.append(slot)
            self.backlog.appendleft(photo)
        self.workers.append(self._worker())

    def _take(self, photo, slot, error, digest):
        rows = self.waiting.pop(photo)
        if error is None:
            self.decoded += 1
            self.ready[photo] = slot
            if len(self.digests) < self.DIGESTS:
                self.digests[photo] = digest
            for plan, row in rows:
                self._give(photo, plan, row)
            return
        self.free.append(slot)
        self.skipped[self.name(photo)] = error
        for plan, row in rows:
            if plan.retry(row) is None:
                plan.missing -= 1
            else:
                self._want(plan, row)
