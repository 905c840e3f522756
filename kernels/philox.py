"""Random numbers from counters: each is a pure function of a seed and of what it is for.

There is no hidden state, so that any step can be drawn again, on any number of machines. The
fourth number of a counter says what the numbers are for, below. (First weights have a key of their
own instead of a counter: Network.draw_weights.)
"""
import numpy as np

DRAWS = 0                       # words, photos and crops: (row, step, attempt, DRAWS)
DROPOUT = 1                     # masks: (block of 16 numbers, step, the layer's mask_id, DROPOUT)
SCENES = 2                      # the drawn set: (0, scene, 0, SCENES)
NEGATIVES = 3                   # words that --targets sampled adds: (0, step, 0, NEGATIVES)
SPLITS = 4                      # photos to train on and to test on: (0, split, 0, SPLITS)


def philox(seed, counter):
    """NumPy's Philox4x64-10 (Salmon 2011) from a counter of four numbers on.

    The first four raw 64-bit numbers are those of the counter's block, which is its first number,
    the next four those of (block + 1, …).
    """
    block, step, detail, purpose = counter
    number = block | step << 64 | detail << 128 | purpose << 192
    before = (number - 1) % 2**256                                  # NumPy counts before it draws
    return np.random.Philox(counter=before, key=seed)
