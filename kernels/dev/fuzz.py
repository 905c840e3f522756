"""Damaged captions and pictures: each is read, or refused in one line, soon and in little memory.

    python kernels/dev/fuzz.py captions 2000            so many of each format
    python kernels/dev/fuzz.py pictures 2000 --seed 7   so many of each kind, by another seed

It ends with status 1 if something was not so: another exception than a ValueError of one line, more
than SECONDS, or more than MEGABYTES of memory. Such a file is kept, and named. A crash of the
interpreter leaves the file of its time in the folder, too.
"""
import argparse
import bz2
import gzip
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

import numpy as np
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import data

SECONDS = 20
MEGABYTES = 500
ROWS = [(f"sub/p{i}.jpg", f'a "{colour}" ball, no. {i} &amp; <b>a café</b>')
        for i, colour in enumerate(["red", "green", "blue"] * 8)]


def captions_files():
    """{kind: the bytes of a whole captions file}."""
    url = "http://www.flickr.com/photos/1@N00/1/"
    before = ["1@N00", "nick", "2009", "1", "Canon", "A+caf%C3%A9"]
    behind = ["red,sun", "", "", "", "", url, url, "CC", url, "1", "2", "3", "4", "jpg", "0"]
    texts = dict.fromkeys(("tsv", "jsonl", "yfcc"), "")
    texts["csv"] = "image,caption,split\n"
    images = []
    annotations = []
    for i, (name, text) in enumerate(ROWS):
        quoted = text.replace('"', '""')
        texts["tsv"] += f"{name}#0\t{text}\r\n"
        texts["csv"] += f'{name},"{quoted}\nmore",train\n'
        texts["jsonl"] += json.dumps({"file_name": name, "caption": text}) + "\n"
        texts["yfcc"] += "\t".join([str(i), *before, text, *behind]) + "\n"
        images.append({"id": i, "file_name": name, "sentences": [{"raw": text}]})
        annotations.append({"image_id": i, "caption": text})
    texts["coco"] = json.dumps({"images": images, "annotations": annotations})
    files = {kind: text.encode() for kind, text in texts.items()}
    files["utf-16"] = texts["csv"].encode("utf-16")
    files["gzip"] = gzip.compress(files["tsv"])
    files["bzip2"] = bz2.compress(files["coco"])
    return files


def picture_files():
    """{kind: the bytes of a whole picture}."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8))
    deep = Image.fromarray(rng.integers(0, 4096, (60, 80)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    recipes = {
        "jpg": (photo, "JPEG", {"exif": exif}), "cmyk": (photo.convert("CMYK"), "JPEG", {}),
        "progressive": (photo, "JPEG", {"progressive": True}), "gif": (photo, "GIF", {}),
        "palette": (photo.convert("P"), "PNG", {"transparency": 3}), "deep": (deep, "PNG", {}),
        "png": (photo, "PNG", {"exif": exif}), "webp": (photo, "WEBP", {"exif": exif}),
        "bmp": (photo, "BMP", {}), "tif": (photo, "TIFF", {"compression": "tiff_lzw"}),
        "fax": (photo.convert("1"), "TIFF", {"compression": "group4"}), "ppm": (photo, "PPM", {}),
        "floats": (deep.convert("F"), "TIFF", {}), "avif": (photo, "AVIF", {}),
        "jp2": (photo, "JPEG2000", {})}
    files = {}
    for kind, (image, format, how) in recipes.items():
        content = io.BytesIO()
        image.save(content, format, **how)
        files[kind] = content.getvalue()
    return files


def damage(content, rng):
    """The bytes with one to four changes, most of them where a file says how large things are."""
    inserted = [b'"', b"\n", b"\t", b"\r", b"\0", b"{", b"[" * 9999, b"\xff\xfe", b"\xef\xbb\xbf",
                b"&#", b"<a "]
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(len(content) + 1) * rng.choice([1, 0.1, 0.02]))
        length = int(rng.choice([1, 2, 4, 50, 1000]))
        change = rng.integers(6)
        if change == 0:
            content[place:place + length] = rng.bytes(length)
        elif change == 1:
            content[place:place + length] = bytes([rng.choice([0, 1, 127, 255])]) * length
        elif change == 2:
            del content[place:place + length]
        elif change == 3:
            content[place:place] = content[place:place + length] * int(rng.choice([1, 2, 500]))
        elif change == 4:
            content[place:place] = inserted[rng.integers(len(inserted))]
        else:
            del content[max(1, place):]
    return bytes(content)


def read_captions(path):
    """Index a captions file, or refuse it."""
    data.build_index(data.Source(path), path + ".index", data.Text(50, 0, 0.2))


def read_picture(path):
    """Decode a picture twice, or refuse it."""
    data.decode(path, 64)
    data.decode(path, 64, square=False)


def fault_of(read, path):
    """What is wrong with the way in which a file is read; None if all is well."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                         # the peak of memory begins anew
    before = megabytes("VmRSS")
    started = time.monotonic()
    signal.alarm(3 * SECONDS)                   # whose default ends this process
    try:
        read(path)
    except ValueError as error:
        if "\n" in str(error):
            return f"says more than a line: {error}"
    except Exception:
        return traceback.format_exc()
    signal.alarm(0)
    seconds = time.monotonic() - started
    if seconds > SECONDS:
        return f"takes {seconds:.0f} s"
    taken = megabytes("VmHWM") - before
    return f"takes {taken:.0f} MB" if taken > MEGABYTES else None


def megabytes(line):
    """A number of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(text.split()[1]) for text in file if text.startswith(line)) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("captions", "pictures"))
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files, read = captions_files(), read_captions
    if options.what == "pictures":
        files, read = picture_files(), read_picture
    folder = tempfile.mkdtemp(prefix="fuzz-")
    faults = 0
    warnings.simplefilter("ignore")
    for kind, whole in files.items():
        read(write(folder, kind, whole))
        for i in range(options.count):
            rng = np.random.default_rng([options.seed, i])
            path = write(folder, f"{kind}-{i}", damage(whole, rng))
            fault = fault_of(read, path)
            shutil.rmtree(path + ".index", ignore_errors=True)
            if fault:
                faults += 1
                print(f"{path}: {fault}", flush=True)
            else:
                os.remove(path)
        print(f"{kind}: {options.count:,} files", flush=True)
    if not faults:
        shutil.rmtree(folder)
    return 1 if faults else 0


def write(folder, name, content):
    """The path of a file with this content."""
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        file.write(content)
    return path


if __name__ == "__main__":
    sys.exit(main())
