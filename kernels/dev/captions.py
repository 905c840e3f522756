"""Captions for controls, made of those that one has.

    python kernels/dev/captions.py noise 0.5 captions.tsv noisy.tsv      half of the words elsewhere
    python kernels/dev/captions.py shuffle captions.tsv shuffled.tsv     captions of other photos
    python kernels/dev/captions.py apart english.tsv french.tsv apart.tsv  each photo's of one file

The files that are read may be of any kind that weak.py reads; what is written are lines
`photo<TAB>caption`. The same command writes the same file (`--seed`). Which photos a run holds out
depends on their names alone, so a run on any of these files holds out the same photos.
"""
import itertools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import numpy as np

import data
from kernels import console
from kernels.console import number


def read_pairs(path):
    """The (photo, caption) pairs of a captions file; tabs and ends of lines become blanks."""
    return [(name, " ".join(caption.split()))
            for name, caption in data.captions_of(data.Source(path))]


def fractions(names, seed):
    """A number from 0 to 1 for each photo's name, always the same one."""
    keys = [f"{seed} {name}".encode("utf-8", "surrogateescape") for name in names]
    return data.hash_all(keys, 8) / 2.0**64


def add_noise(pairs, part, seed):
    """Permute a random part of all words among their places, over all captions.

    So every word stays as frequent as it was among all captions. As words also change between
    training and held-out photos, a rare one may leave the dictionary, or come into it.
    """
    rng = np.random.default_rng(seed)
    captions = [caption.split() for _, caption in pairs]
    words = np.array(list(itertools.chain.from_iterable(captions)), object)
    noisy = np.flatnonzero(rng.random(len(words)) < part)
    words[noisy] = words[rng.permutation(noisy)]
    ends = np.cumsum([len(caption) for caption in captions])
    cut = np.split(words, ends[:-1])
    return [(name, " ".join(caption)) for (name, _), caption in zip(pairs, cut)]


def shuffle_photos(pairs, seed):
    """All captions of a photo go to one drawn at random; one in the whole file may keep its own."""
    names = sorted({name for name, _ in pairs})
    other = dict(zip(names, np.random.default_rng(seed).permutation(names)))
    return [(other[name], caption) for name, caption in pairs]


def set_apart(first, second, seed):
    """Captions of two files, of which no photo has both: a coin decides for each photo."""
    halves = []
    for pairs, is_second in ((first, False), (second, True)):
        numbers = fractions([name for name, _ in pairs], seed)
        halves += [pair for pair, fraction in zip(pairs, numbers) if (fraction >= 0.5) == is_second]
    return halves


def write_pairs(path, pairs):
    """Lines photo<TAB>caption."""
    with console.whole_file(path) as file:
        for name, caption in pairs:
            file.write(f"{name}\t{caption}\n".encode("utf-8", "surrogateescape"))
    photos = len({name for name, _ in pairs})
    print(f"{path}: {len(pairs):,} captions of {photos:,} photos")


def make(options):
    """The pairs that the options ask for."""
    if options.what == "apart":
        return set_apart(read_pairs(options.first), read_pairs(options.second), options.seed)
    pairs = read_pairs(options.captions)
    if options.what == "shuffle":
        return shuffle_photos(pairs, options.seed)
    return add_noise(pairs, options.part, options.seed)


def parse(arguments):
    """The options."""
    parser = console.Parser(description=console.summary(__doc__))
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("noise", "shuffle", "apart"):
        command = commands.add_parser(what)
        if what == "noise":
            command.add_argument("part", type=number(float, 0, 1), help="of the words, from 0 to 1")
        for name in ("first", "second") if what == "apart" else ("captions",):
            command.add_argument(name, help="a captions file")
        command.add_argument("out", help="where to write")
        command.add_argument("--seed", type=number(int, 0), default=0)
    return parser.parse_args(arguments)


def main(arguments=None):
    """Write the captions that the command line asks for."""
    options = parse(arguments)
    write_pairs(options.out, make(options))


if __name__ == "__main__":
    console.run_command(main)
