"""The picture set that `python weak.py` draws: captions as people write them, and the truth.

A scene is a place (sky and ground), and on it one to three things beside each other, each in one
of five colours, of many sizes and at any height. Its caption is weak supervision: in English or
French, it leaves things out, tells of some that are not there, and has words that no picture shows
(names, fillers).
captions.tsv has the captions and truth.tsv, a captions file as well, all words of what was drawn:

    python eval.py words --model runs/drawn             scores the words against both

Everything is drawn by random numbers from counters: scene n of a seed is always the same. (No
operation, like console.py: both are here since the top level is for the paper's own parts.)
"""
import os

import numpy as np
from PIL import Image, ImageDraw

from . import console
from .philox import SCENES, philox

COLOURS = {                     # English and French: RGB; no white, no black: all things have them
    "red rouge": (205, 30, 30), "blue bleu": (30, 80, 215), "yellow jaune": (250, 220, 40),
    "green vert": (20, 140, 60), "purple violet": (160, 50, 180)}
PLACES = {                      # English and French: sky, ground
    "sea mer": ((150, 205, 240), (30, 90, 160)),
    "meadow prairie": ((170, 215, 250), (90, 170, 70)),
    "night nuit": ((25, 25, 75), (70, 70, 95)),
    "beach plage": ((250, 225, 170), (225, 180, 100)),
    "snow neige": ((200, 215, 230), (240, 245, 250)),
    "sunset crépuscule": ((250, 150, 90), (90, 60, 80))}
THINGS = {                      # English and French, most frequent first: see `draw_shape`
    "tree arbre": "box .38 .6 .62 1 #6e4628; oval 0 0 1 .74; oval .15 .28 .36 .48 #282828; "
                  "oval .4 .1 .6 .3 #282828; oval .64 .28 .85 .48 #282828; "
                  "oval .4 .46 .6 .66 #282828",
    "house maison": "box .1 .45 .9 1; poly 0 .45 .5 0 1 .45 #46322d; box .42 .6 .62 1 #5a3c28; "
                    "box .17 .55 .36 .75 #ffffff; box .68 .55 .84 .75 #ffffff",
    "car voiture": "box 0 .45 1 .8; poly .2 .45 .3 .15 .7 .15 .8 .45; box .36 .22 .64 .42 #c8e6fa; "
                   "oval .06 .6 .4 .95 #141414; oval .6 .6 .94 .95 #141414; "
                   "oval .17 .71 .29 .84 #dcdcdc; oval .71 .71 .83 .84 #dcdcdc",
    "ball ballon": "oval .05 .05 .95 .95; wedge .05 .05 .95 .95 0 60 #ffffff; "
                   "wedge .05 .05 .95 .95 120 180 #ffffff; wedge .05 .05 .95 .95 240 300 #ffffff",
    "boat bateau": "poly 0 .7 1 .7 .8 1 .2 1; box .46 0 .54 .7 #5a3c28; "
                   "poly .54 .02 .54 .62 1 .62; poly .46 .15 .46 .62 .1 .62 #ffffff",
    "flower fleur": "box .46 .5 .54 1 #282828; oval .3 0 .7 .35; oval .02 .12 .42 .47; "
                    "oval .58 .12 .98 .47; oval .12 .4 .5 .75; oval .5 .4 .88 .75; "
                    "oval .32 .24 .68 .56 #ffffff; oval .55 .8 .85 .95 #282828",
    "cat chat": "poly .1 .5 .1 0 .45 .25; poly .9 .5 .9 0 .55 .25; oval .05 .15 .95 .95; "
                "oval .18 .32 .42 .55 #ffffff; oval .58 .32 .82 .55 #ffffff; "
                "box .27 .35 .33 .52 #141414; box .67 .35 .73 .52 #141414; "
                "oval .25 .58 .75 .92 #ffffff; poly .38 .6 .62 .6 .5 .75 #141414",
    "mushroom champignon": "box .36 .5 .64 1 #ebe1cd; wedge 0 .05 1 1.15 180 360; "
                           "oval .08 .32 .3 .54 #ffffff; oval .37 .1 .63 .36 #ffffff; "
                           "oval .7 .32 .92 .54 #ffffff",
    "umbrella parapluie": "box .47 .1 .53 .95 #3c3c3c; box .53 .88 .66 .95 #3c3c3c; "
                          "wedge 0 .05 1 1 180 360; wedge 0 .05 1 1 225 270 #ffffff; "
                          "wedge 0 .05 1 1 315 360 #ffffff",
    "flag drapeau": "box .04 0 .14 1 #5a3c28; box .14 .05 1 .65; box .14 .25 1 .45 #ffffff",
    "fish poisson": "poly .65 .5 1 .1 1 .9 #ffffff; oval 0 .2 .8 .8; oval .1 .33 .28 .51 #141414; "
                    "box .36 .22 .45 .78 #ffffff; box .54 .24 .63 .76 #ffffff",
    "bicycle vélo": "oval 0 .45 .46 .91; oval .54 .45 1 .91; "
                    "ring 0 .45 .46 .91 #141414; ring .54 .45 1 .91 #141414; "
                    "line .23 .68 .4 .3 .77 .3 .77 .68 #141414; "
                    "line .23 .68 .5 .68 .77 .3 #141414; line .28 .28 .52 .28 #141414; "
                    "line .77 .3 .72 .1 .9 .08 #141414",
    "butterfly papillon": "oval 0 0 .48 .55; oval .52 0 1 .55; oval .1 .5 .48 .98; "
                          "oval .52 .5 .9 .98; oval .1 .12 .36 .42 #ffffff; "
                          "oval .64 .12 .9 .42 #ffffff; oval .17 .2 .29 .34 #282828; "
                          "oval .71 .2 .83 .34 #282828; oval .43 .05 .57 .95 #282828",
    "ladder échelle": "box .3 .08 .7 .2 #ffffff; box .3 .32 .7 .44 #ffffff; "
                      "box .3 .56 .7 .68 #ffffff; box .3 .8 .7 .92 #ffffff; "
                      "box .12 0 .32 1; box .68 0 .88 1",
    "rocket fusée": "poly .3 .85 .7 .85 .5 1 #ffffff; "
                    "poly .05 .88 .33 .45 .67 .45 .95 .88 #3c3c3c; box .28 .28 .72 .85; "
                    "poly .28 .28 .5 0 .72 .28 #ffffff; oval .36 .36 .64 .64 #ffffff",
    "windmill moulin": "poly .3 1 .42 .35 .58 .35 .7 1; poly .5 .42 0 .1 .12 0 #ffffff; "
                       "poly .5 .42 1 .1 .88 0 #ffffff; poly .5 .42 0 .74 .12 .84 #ffffff; "
                       "poly .5 .42 1 .74 .88 .84 #ffffff; oval .42 .34 .58 .5 #282828"}
KINDS = {"things": THINGS, "colours": COLOURS, "places": PLACES}
FILLERS = "lovely nice summer holiday canon photo été vacances".split()
NAMES = "Emma Hugo Paris Oslo Nina Tom Berlin Anna".split()     # noise: no picture shows them
PHRASES = ("a", "and", "in the", "with"), ("un", "et", "dans la", "avec")      # English, French
PICTURES = 6000
WIDTHS = (0.45, 0.75), (0.4, 0.5), (0.34, 0.44)   # of one, two, three things, of the picture's
COUNTS = (0.65, 0.25, 0.1)      # … and how often there are so many
ZIPF = 8                        # the i-th thing, from 0, is drawn in proportion to 1 / (i + ZIPF)
OUTLINE = (30, 30, 30)


def sources(run):
    """Where a run keeps the photos and captions that it drew."""
    return {"images": f"{run}/drawn/photos", "captions": f"{run}/drawn/captions.tsv"}


def truth_file(run):
    """Where a run keeps the words of what it drew."""
    return f"{run}/drawn/truth.tsv"


def draw_set(run, seed, count):
    """Draw a run's pictures, with captions and truth beside them, unless they are there."""
    if has_set(run, seed, count):
        return
    folder = sources(run)["images"]
    captions = sources(run)["captions"]         # which is written last
    truth = truth_file(run)
    os.makedirs(folder, exist_ok=True)
    print(f"drawing {count:,} captioned pictures into {os.path.dirname(captions)}", flush=True)
    with (console.whole_file(captions, "w", encoding="utf-8") as file,
          console.whole_file(truth, "w", encoding="utf-8") as true_file,
          console.Progress("drawing", count, "pictures") as progress):
        for n in range(count):
            image, caption, true_words = draw_scene(seed, n)
            image.save(os.path.join(folder, f"{n:05}.jpg"), quality=90)
            file.write(f"{n:05}.jpg\t{caption}\n")
            true_file.write(f"{n:05}.jpg\t{true_words}\n")
            progress.tick()


def has_set(run, seed, count):
    """Whether a run's folder has these pictures: as many captions, and the last one is the same."""
    captions = sources(run)["captions"]
    if not os.path.exists(captions) or not os.path.exists(truth_file(run)):
        return False
    with open(captions, encoding="utf-8") as file:
        lines = file.readlines()
    _, caption, _ = draw_scene(seed, count - 1)
    return len(lines) == count and lines[-1] == f"{count - 1:05}.jpg\t{caption}\n"


def draw_scene(seed, n, size=96):
    """Scene n of the set of a seed: a picture, its caption, and the words of what is in it."""
    rng = np.random.Generator(philox(seed, (0, n, 0, SCENES)))
    place = choose(rng, PLACES)
    sky, ground = PLACES[place]
    image = Image.new("RGB", (size, size), shade(sky, rng))
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, size * rng.uniform(.5, .8), size, size], shade(ground, rng))
    things = []
    truth = [place]
    count = 1 + rng.choice(len(COUNTS), p=COUNTS)
    for i in range(count):
        thing = choose(rng, THINGS, zipf=ZIPF)
        colour = choose(rng, COLOURS)
        width = size * rng.uniform(*WIDTHS[count - 1])
        left = (size - width) * column(rng, i, count)
        top = rng.uniform(0, size - width)
        for shape in THINGS[thing].split("; "):
            draw_shape(draw, shape, (left, top), width, shade(COLOURS[colour], rng))
        things.append((thing, colour))
        truth += [thing, colour]
    return image, write_caption(rng, things, place), " ".join(truth)


def column(rng, i, count):
    """How far right thing i of so many stands, from 0 to 1: beside the others."""
    if count == 1:
        return rng.uniform(0, 1)
    return np.clip((i + rng.uniform(-.15, .15)) / (count - 1), 0, 1)


def choose(rng, things, zipf=0):
    """One of the things: all alike, or the i-th, from 0, in proportion to 1 / (i + zipf)."""
    weights = np.ones(len(things))
    if zipf:
        weights = 1 / (np.arange(len(things)) + zipf)
    return list(things)[rng.choice(len(things), p=weights / weights.sum())]


def draw_shape(draw, shape, corner, width, colour):
    """A shape with points in a unit box, in the thing's colour or, if it has one, in its own."""
    kind, *fields = shape.split()
    fill = colour
    if fields[-1].startswith("#"):
        fill = fields.pop()
    angles = []
    if kind == "wedge":
        angles = [float(angle) for angle in fields[4:]]
        fields = fields[:4]
    unit_points = np.array(fields, float).reshape(-1, 2)            # (points, 2)
    points = (unit_points * width + corner).ravel().tolist()        # x, y, x, y, …
    stroke = max(2, round(width / 13))
    if kind == "box":
        draw.rectangle(points, fill, OUTLINE)
    elif kind == "oval":
        draw.ellipse(points, fill, OUTLINE)
    elif kind == "poly":
        draw.polygon(points, fill, OUTLINE)
    elif kind == "ring":
        draw.ellipse(points, None, fill, stroke)
    elif kind == "line":
        draw.line(points, fill, stroke)
    else:                                       # a wedge of an oval, between two angles
        draw.pieslice(points, *angles, fill, OUTLINE)


def shade(colour, rng):
    """The colour, a little lighter or darker."""
    channels = np.array(colour) + rng.uniform(-22, 22)
    return tuple(channels.clip(0, 255).astype(int).tolist())


def write_caption(rng, things, place):
    """A caption as people write them: true in the main, and with everything else they write."""
    language = 1 if rng.random() < 0.5 else 0   # 0: English, 1: French
    article, conjunction, preposition, along = PHRASES[language]
    texts = describe_things(rng, things, article, language)
    words = [f" {conjunction} ".join(texts)]
    if rng.random() < 0.6:
        words += [preposition, place.split()[language]]
    if rng.random() < 0.4:
        words += [along, choose(rng, NAMES, zipf=4)]
    if rng.random() < 0.12:                     # not in the picture at all
        words.append(choose(rng, THINGS, zipf=ZIPF).split()[language])
    if rng.random() < 0.3:
        mark = "#" if rng.random() < 0.4 else ""
        words.append(mark + choose(rng, FILLERS, zipf=4))
    if rng.random() < 0.25:
        words.append(str(int(rng.uniform(1, 2016))))
    text = " ".join(words).strip()
    if not text:                                # only a camera's number
        text = str(int(rng.uniform(1, 9999)))
    end = "!" if rng.random() < 0.1 else ""
    return text.capitalize() + end


def describe_things(rng, things, article, language):
    """A text for each thing, with its colour or without; some are left out, as people do."""
    texts = []
    for thing, colour in things:
        if rng.random() < 0.15:
            continue
        thing = thing.split()[language]
        colour = colour.split()[language]
        if rng.random() < 0.15:
            texts.append(f"{article} {thing}")
        elif language == 0:
            texts.append(f"{article} {colour} {thing}")
        else:                                   # in French, the colour follows
            texts.append(f"{article} {thing} {colour}")
    return texts
