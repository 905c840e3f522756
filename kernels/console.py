"""What all commands share: options, progress, files that are whole, and one line for each error.

    with Progress("scoring", 500) as progress:
        progress.tick(64)                       # scoring: 64 of 500 photos, 1 s left, 310/s
    with whole_file("runs/x/log.jsonl", "w") as file:
        file.write("…")                         # there at the end of the block, or not at all
    run_command(main)                           # exit status 2 for what a user can mend

This file holds no operation: it lies here since every file above imports it.
"""
import argparse
import errno
import json
import math
import os
import secrets
import signal
import sys
import time
import traceback
from contextlib import AbstractContextManager, contextmanager, suppress

from . import ranks
from .cpu import cores

MOST_THREADS = 4 * cores()
GRACE = 2                       # seconds in which the first rank may tell what went wrong
PASSED_ON = 0.3                 # seconds until mpiexec has passed on what a rank printed
TERMINAL_SECONDS = 0.5          # between two lines of progress on a terminal
FILE_SECONDS = 10               # … and elsewhere
# Control characters, and those that change the direction of the text
CONTROLS = [*range(32), *range(127, 160), *range(0x202a, 0x202f), *range(0x2066, 0x206a)]
VISIBLE = {code: ascii(chr(code))[1:-1] for code in CONTROLS if chr(code) not in "\n\t"}


# ---------------------------------------------------------------------------------- options

EXAMPLE = "example:\n  "        # begins an epilog that is a command to paste


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any, and with examples that stay in one line."""

    def _fill_text(self, text, width, indent):
        if text.startswith(EXAMPLE):
            return text
        return super()._fill_text(text, width, indent)

    def _get_help_string(self, action):
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, which `run_command` says in one line.

    stray: what is said of an argument that is no option, with {} for it.
    """

    def __init__(self, stray=None, **settings):
        super().__init__(formatter_class=Formatter, **settings)
        self.stray = stray

    def error(self, message):
        words = message.removeprefix("unrecognized arguments: ")
        if self.stray and words != message and not words.startswith("-"):
            message = f"{message}; {self.stray.format(words)}"
        raise ValueError(message)

    def defaults(self):
        """{option: its default}."""
        return vars(self.parse_args([]))

    def parse_given(self, arguments=None):
        """{option: value} of those options alone that are given."""
        # argparse puts a default only where the namespace has nothing yet
        not_given = object()
        options = argparse.Namespace(**dict.fromkeys(self.defaults(), not_given))
        self.parse_args(arguments, options)
        return {name: value for name, value in vars(options).items() if value is not not_given}


def summary(doc):
    """The first line of a docstring, which `python -OO` leaves out."""
    return (doc or "").partition("\n")[0]


def number(kind, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf):
    """The argparse type of an int or float from low to high, and strictly between the others."""
    limits = {"at least": low, "at most": high, "above": above, "below": below}
    finite = [f"{word} {limit:,}" for word, limit in limits.items() if math.isfinite(limit)]

    def read(text):
        value = kind(text)                      # argparse says what is no number, and of which kind
        if not (low <= value <= high and above < value < below):
            raise argparse.ArgumentTypeError(f"{text}: it must be {' and '.join(finite)}")
        return value

    read.__name__ = "whole number" if kind is int else "number"
    return read


# --------------------------------------------------------------------------------- progress

def duration(seconds):
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{int(seconds)} s"
    if seconds < 7200:
        return f"{int(seconds) // 60} min"
    return f"{int(seconds) // 3600} h"


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
        shown_on = Screen.progress
        Screen.progress = self if progress else None
        if shown_on:
            shown_on._put("\r\033[K")
        self._put(text.translate(VISIBLE))
        return len(text)

    def _put(self, text):
        with suppress(OSError, ValueError, RuntimeError):   # full, closed, lost; Ctrl-C in a write
            self.stream.write(text)
            self.stream.flush()


class Progress(AbstractContextManager):
    """Counts work, and shows how far it is: on a terminal twice a second, else every 10 seconds.

    done: what was done of it before, in so many seconds.
    """

    def __init__(self, what, total, unit="photos", stream=None, done=0, seconds=0):
        stream = stream or sys.stderr
        self.what = what
        self.total = total
        self.unit = unit
        self.screen = stream if isinstance(stream, Screen) else Screen(stream)
        self.terminal = self.screen.isatty()
        self.shown = time.monotonic()
        self.started = self.shown - seconds
        self.done = done

    def __exit__(self, *_):
        self.screen.write("")                   # clears the line on a terminal

    def seconds(self):
        """Those that the work has taken."""
        return max(1e-9, time.monotonic() - self.started)

    def rate(self):
        """Units of work a second."""
        return max(1e-9, self.done) / self.seconds()

    def left(self):
        """Seconds that the rest will take at this rate."""
        return max(0, self.total - self.done) / self.rate()

    def tick(self, count=1):
        """`count` units are done; shown if it is time to."""
        self.done += count
        if self.is_due():
            self.show()

    def is_due(self):
        """Whether it is time to show the progress again."""
        seconds = TERMINAL_SECONDS if self.terminal else FILE_SECONDS
        return time.monotonic() - self.shown >= seconds

    def show(self, note=""):
        """Show how far the work is, and the note: parts with ", " between them, which may go."""
        self.shown = time.monotonic()
        parts = [f"{self.what}: {self.done:,} of {self.total:,} {self.unit}",
                 f"{duration(self.left())} left", f"{self.rate():.3g}/s"]
        if note:
            parts.append(note)
        text = self._shorten(", ".join(parts))
        if self.terminal:
            self.screen.write(text, progress=True)
        else:
            self.screen.write(text + "\n")

    def _shorten(self, text):
        """The text without its last parts, the least important, if the terminal is too narrow."""
        try:
            width = os.get_terminal_size(self.screen.fileno()).columns or 80
        except (OSError, ValueError):           # no terminal
            return text
        while len(text) >= width > 0:
            text = text.rpartition(", ")[0] or text[:width - 1]
        return text


# ------------------------------------------------------------------------------------ files

@contextmanager
def whole_file(path, mode="wb", **how):
    """A file written beside `path` that takes its name, whole, at the end, or leaves nothing."""
    # A name that nobody foresees and that must be new: no link there is followed.
    beside = f"{path}.{secrets.token_hex(4)}.part"
    try:
        with open(beside, mode.replace("w", "x"), **how) as file:
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
    text = json.dumps(without_nan(thing), indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    with whole_file(path, "w") as file:
        file.write(text)


# ------------------------------------------------------------------------------- the way out

def stop_signals():
    """What asks a process to end: Ctrl-C, kill, and the lost terminal, but not under nohup."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


def run_command(work):
    """Run work() and exit as a command should: after an error with one line that says the remedy.

    A mistake of this program prints a traceback, and after `python -X dev` every error does. The
    exit status is what work() returns, or that of `explain` if it raises something.
    """
    handle_stop_signals(signal.default_int_handler)
    for name in "stdout", "stderr":
        protect_stream(name)
    try:
        status = work()
        line = None
    except (Exception, KeyboardInterrupt) as error:
        status, line = explain(error)
    # From here on a signal ends the process at once, without a traceback of the threads' end.
    handle_stop_signals(signal.SIG_DFL)
    if line is not None:
        leave(status, line)                     # it does not return
    sys.exit(status)


def handle_stop_signals(handler):
    """What is done from now on when something asks this process to end."""
    for signum in stop_signals():
        signal.signal(signum, handler)


def protect_stream(name):
    """Make sys.stdout or sys.stderr a Screen."""
    stream = getattr(sys, name)
    if stream is None:                          # it was closed before the start
        stream = open(os.devnull, "w")
    stream.reconfigure(errors="backslashreplace")       # whatever a photo is called
    setattr(sys, name, Screen(stream))


def explain(error):
    """The exit status that an exception means, and the line that says it."""
    command = os.path.basename(sys.argv[0])
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error) or "interrupted"
    if sys.flags.dev_mode:
        return 1, f"{command}: {traceback.format_exc()}"
    if isinstance(error, ValueError):
        return 2, f"{command}: {error}"
    if isinstance(error, RuntimeError):
        return 1, f"{command}: {error}"
    if isinstance(error, MemoryError):
        return 1, f"{command}: there is not enough memory; lower --batch, --words or --limit"
    if isinstance(error, OSError):
        return 1, f"{command}: {explain_file_error(error)}"
    return 1, f"{command}: {traceback.format_exc()}"        # a mistake of this program


def explain_file_error(error):
    """The file of an OSError, what is wrong with it, and what to do."""
    text = error.strerror or str(error)
    if error.filename:
        text = f"{error.filename}: {text}"
    if error.errno == errno.ENOSPC:
        text += "; free some space, or choose another place"
    return text


def leave(status, line):
    """Say why this process ends, and end it by SystemExit, or with all other ranks."""
    joined = ranks.joined
    if joined.rank:                             # what fails everywhere is told once, by the first
        time.sleep(GRACE)
        line = f"rank {joined.rank} of {joined.size}: {line}"
    print(line, file=sys.stderr, flush=True)
    if joined.size > 1:
        time.sleep(PASSED_ON)
    joined.abort(status)
