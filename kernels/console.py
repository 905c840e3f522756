"""What all commands share: options, progress, files that are whole, and one line for each error.

    with Progress("scoring", 500) as progress:
        progress.tick(64)                       # scoring: 64 of 500 photos, 1 s left, 310/s
    with whole_file("runs/x/log.jsonl", "w") as file:
        file.write("…")                         # there at the end of the block, or not at all
    guarded(main)                               # exit status 2 for what a user can mend
"""
import argparse
import errno
import json
import math
import os
import signal
import sys
import time
import traceback
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from . import ranks

MOST_THREADS = 4 * (os.cpu_count() or 1)
CONTROLS = [*range(32), *range(127, 160), *range(0x202a, 0x202f), *range(0x2066, 0x206a)]
VISIBLE = {code: ascii(chr(code))[1:-1] for code in CONTROLS if chr(code) not in "\n\t"}


# ---------------------------------------------------------------------------------- options

class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, which `guarded` says in one line."""

    def __init__(self, **settings):
        super().__init__(formatter_class=Formatter, **settings)

    def error(self, message):
        raise ValueError(message)


def summary(doc):
    """The first line of a docstring, which `python -OO` leaves out."""
    return (doc or "").partition("\n")[0]


def number(kind, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf):
    """The argparse type of an int or float from low to high, and strictly between the others."""
    limits = {"at least": low, "at most": high, "above": above, "below": below}

    def read(text):
        value = kind(text)                      # argparse says what is no number, and of which kind
        if not (low <= value <= high and above < value < below):
            raise argparse.ArgumentTypeError(f"{text}: it must be " + " and ".join(
                f"{word} {limit:,}" for word, limit in limits.items() if math.isfinite(limit)))
        return value

    read.__name__ = "whole number" if kind is int else "number"
    return read


# --------------------------------------------------------------------------------- progress

def duration(seconds):
    """Seconds as a person says them."""
    size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
    return f"{int(seconds) // size} {unit}"


class Screen:
    """A stream to print on: what becomes of it ends no run, and no text in it steers a terminal."""

    progress = None                             # the Screen whose last line is one of progress

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def flush(self):
        """All that was written is flushed."""

    def write(self, text, progress=False):
        """Print, with control characters made visible, in the place of a line of progress."""
        before, Screen.progress = Screen.progress, self if progress else None
        if before:
            before._put("\r\033[K")
        self._put(text.translate(VISIBLE))
        return len(text)

    def _put(self, text):
        with suppress(OSError, ValueError, RuntimeError):   # full, closed, lost; Ctrl-C in a write
            self.stream.write(text)
            self.stream.flush()


class Progress(AbstractContextManager):
    """Counts work, and shows how far it is: on a terminal twice a second, else every 10 seconds."""

    def __init__(self, what, total, unit="photos", stream=None, done=0):
        self.what, self.total, self.unit = what, total, unit
        stream = stream or sys.stderr
        self.screen = stream if isinstance(stream, Screen) else Screen(stream)
        self.terminal = self.screen.isatty()
        self.started = self.shown = time.monotonic()
        self.done = self.before = done

    def __exit__(self, *_):
        self.screen.write("")                   # clears the line on a terminal

    def seconds(self):
        """Since the start."""
        return max(1e-9, time.monotonic() - self.started)

    def rate(self):
        """Units of work a second."""
        return max(1e-9, self.done - self.before) / self.seconds()

    def left(self):
        """Seconds that the rest will take at this rate."""
        return max(0, self.total - self.done) / self.rate()

    def tick(self, count=1, note=lambda: ""):
        """`count` units are done; `note` makes a text to show."""
        self.done += count
        now = time.monotonic()
        if now - self.shown < (0.5 if self.terminal else 10):
            return
        self.shown = now
        parts = [f"{self.what}: {self.done:,} of {self.total:,} {self.unit}",
                 f"{duration(self.left())} left", f"{self.rate():.3g}/s", note()]
        text = ", ".join(filter(None, parts))
        with suppress(OSError, ValueError):     # no terminal
            width = os.get_terminal_size(self.screen.fileno()).columns or 80
            while len(text) >= width > 0:       # the least important is last
                text = text.rpartition(", ")[0] or text[:width - 1]
        self.screen.write(text + "\n" * (not self.terminal), progress=self.terminal)


# ------------------------------------------------------------------------------------ files

@contextmanager
def whole_file(path, mode="wb", **how):
    """A file written beside `path` that takes its name, whole, at the end, or leaves nothing."""
    beside = f"{path}.part"
    try:
        with open(beside, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with suppress(FileNotFoundError):       # it is there still where something went wrong
            os.remove(beside)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)                            # the new name itself reaches the disk
    os.close(folder)


def without_nan(value):
    """The value for JSON, which lacks NaN and infinity: null instead."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def write_json(path, thing):
    """A thing as a JSON file, or on standard output where path is "-"."""
    with nullcontext(sys.stdout) if path == "-" else whole_file(path, "w") as file:
        file.write(json.dumps(without_nan(thing), indent=1) + "\n")


# ------------------------------------------------------------------------------- the way out

def stop_signals():
    """What asks a process to end: Ctrl-C, kill, and the lost terminal, but not under nohup."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * (not nohup)


def guarded(work):
    """Run work() and exit as a command should: one line for what a user can mend, never more."""
    for one in stop_signals():
        signal.signal(one, signal.default_int_handler)
    for name in "stdout", "stderr":
        stream = getattr(sys, name) or open(os.devnull, "w")        # None: closed before the start
        stream.reconfigure(errors="backslashreplace")               # whatever a photo is called
        setattr(sys, name, Screen(stream))
    try:
        sys.exit(work())
    except KeyboardInterrupt as stop:
        status, says = 130, str(stop) or "interrupted"
    except (ValueError, RuntimeError) as error:
        status, says = 2 if isinstance(error, ValueError) else 1, error
    except MemoryError:
        status, says = 1, "there is not enough memory; lower --batch, --words or --limit"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        what = "; free some space, or choose another place" * (error.errno == errno.ENOSPC)
        status, says = 1, f"{where}{error.strerror or error}{what}"
    except Exception:                           # a mistake of this program
        status, says = 1, traceback.format_exc()
    name = "" if status == 130 else os.path.basename(sys.argv[0]) + ": "
    ranks.joined.fail(status, f"{name}{says}")  # the other ranks must not wait for this one
