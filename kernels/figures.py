"""Plots, and maps of words, drawn as pixels and as SVG by the same calls; fonts for any script.

A Plot says what is shown: its axes, Curves, baselines. draw_plots makes a Drawing of plots, which
has an image() and an svg(), and plot_table a table of their numbers. Like console.py this file is
no operation; it knows nothing of runs and models.
"""
import argparse
import functools
import glob
import itertools
import os
import sys
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK = (40, 40, 40)                              # of texts and axes
PALE = (225, 225, 225)                          # of the lines behind a plot
MARKED = (190, 200, 220)                        # of its vertical line
COLOURS = ((31, 98, 180), (214, 92, 20), (46, 140, 70), (140, 60, 150))        # of curves, in turn
DASHES = (4, 9, 2, 15)                          # baselines' lines are broken into such pieces
LOG_TICKS = (1, 2, 5)                           # times a power of ten
TEXT = 14                                       # the size of a plot's letters
SMOOTH = 2                                      # lines are drawn so many times as large, …
LARGE = 5000                                    # … in pictures of fewer pixels across
SVG_ANCHORS = {"l": "start", "m": "middle", "r": "end"}
BASELINES_BELOW = {"a": 0.9, "m": 0.35, "s": 0, "d": -0.25}     # an anchor, of a font's size
MARGIN = np.array([-2, -1, 2, 1])               # left, top, right, bottom of a map's word, pixels
FONTS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts",
         "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts")


class Fonts:
    """Fonts with the letters of words: the given one, Pillow's own, or any of the system's."""

    def __init__(self, given=None):
        self.first = [given, None]              # None is Pillow's own
        self.system = list_fonts()
        self.warned = False
        try:
            open_font(given, 20)
        except OSError:
            raise argparse.ArgumentTypeError(f"{given} is no font that can be read") from None

    def find(self, word, size):
        """A font that has all letters of the word; where none has, one that shows boxes."""
        for path in self.first + self.system:
            if all(has_letter(path, letter) for letter in word):
                self.try_sooner(path)
                return open_font(path, size)
        self.warn(word)
        return open_font(self.first[0], size)

    def try_sooner(self, path):
        """From now on try a font of the system first: the next word may need it, too."""
        if path in self.system:
            self.system.remove(path)
            self.system.insert(0, path)

    def warn(self, word):
        """Say once that there are words without a font, and how to mend that."""
        if not self.warned:
            print(f"no font has the letters of {word}: pictures show boxes; install the packages "
                  "fonts-noto-core and fonts-noto-cjk, or give --font FILE", file=sys.stderr)
        self.warned = True


@functools.cache
def usual_fonts():
    """Fonts without one that is given."""
    return Fonts()


def list_fonts():
    """Paths of the system's fonts, the plainest first."""
    paths = []
    for folder in FONTS:
        paths += glob.glob(os.path.expanduser(folder) + "/**/*.[ot]t[fc]", recursive=True)
    paths = [path for path in paths if "LastResort" not in path]    # which has boxes for all
    return sorted(paths, key=lambda path: "Sans-Regular" not in path)


@functools.lru_cache(1000)
def open_font(path, size):
    """The font of a file, or Pillow's own."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@functools.cache
def has_letter(path, letter):
    """Whether a font draws the letter otherwise than a character that no font has."""
    try:
        font = open_font(path, 20)
        mask = font.getmask(letter)
        missing = font.getmask("\uffff")
    except OSError:                             # a broken file, or one of coloured pictures
        return False
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


class Stroke(NamedTuple):
    """A line through points; with a dash above 0 between two points, in pieces of that length."""

    points: list
    colour: tuple
    width: float
    dash: float

    def draw(self, canvas, scale):
        points = np.array(self.points) * scale                      # (P, 2)
        width = max(1, round(self.width * scale))
        if not self.dash:
            canvas.line([tuple(point) for point in points], self.colour, width, "curve")
            return
        start, end = points
        length = np.hypot(*(end - start)) / scale
        for at in np.arange(0, length, 2 * self.dash):
            piece = np.minimum([at, at + self.dash], length) / length
            ends = start + piece[:, None] * (end - start)           # (2, 2)
            canvas.line([tuple(point) for point in ends], self.colour, width)

    def svg(self):
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in self.points)
        dash = f' stroke-dasharray="{self.dash}"' if self.dash else ""
        return (f'<polyline points="{points}" fill="none" stroke="rgb{self.colour}" '
                f'stroke-width="{self.width}"{dash}/>')


class Dot(NamedTuple):
    """A filled circle."""

    centre: tuple
    radius: float
    colour: tuple

    def draw(self, canvas, scale):
        x, y = np.array(self.centre) * scale
        canvas.circle((x, y), self.radius * scale, self.colour)

    def svg(self):
        x, y = self.centre
        return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{self.radius}" fill="rgb{self.colour}"/>'


class Text(NamedTuple):
    """A text, of which the anchor, as in Pillow, says which corner is at the point.

    In SVG it is stretched to `length`, if that is not 0.
    """

    point: tuple
    text: str
    anchor: str
    size: float
    colour: tuple
    length: float
    fonts: object                               # Fonts

    def draw(self, canvas, scale):
        x, y = np.array(self.point) * scale
        font = self.fonts.find(self.text, self.size * scale)
        canvas.text((x, y), self.text, self.colour, font, self.anchor)

    def svg(self):
        across, down = self.anchor
        x, y = self.point
        baseline = y + BASELINES_BELOW[down] * self.size
        stretched = f' textLength="{self.length:.0f}"' if self.length else ""
        return (f'<text x="{x:.1f}" y="{baseline:.1f}" font-size="{self.size:.1f}" '
                f'text-anchor="{SVG_ANCHORS[across]}" fill="rgb{self.colour}"{stretched}>'
                f'{escape(self.text)}</text>')


class Drawing:
    """Lines, dots and texts on a page, as pixels or as SVG.

    Points (x, y) are from the top left; widths, dashes, radii and sizes have the same unit.
    """

    def __init__(self, width, height, fonts=None):
        self.width = width
        self.height = height
        self.fonts = fonts or usual_fonts()
        self.shapes = []

    def line(self, points, colour=INK, width=1, dash=0):
        self.shapes.append(Stroke(list(points), colour, width, dash))

    def dot(self, centre, radius, colour):
        self.shapes.append(Dot(centre, radius, colour))

    def text(self, point, text, anchor="la", size=TEXT, colour=INK, length=0):
        self.shapes.append(Text(point, text, anchor, size, colour, length, self.fonts))

    def image(self, width=None):
        """As pixels, that many across; one for each unit of the page if not given."""
        scale = (width or self.width) / self.width
        factor = SMOOTH if self.width * scale < LARGE else 1        # then reduced: smooth edges
        lines = [shape for shape in self.shapes if not isinstance(shape, Text)]
        texts = [shape for shape in self.shapes if isinstance(shape, Text)]
        size = (round(self.width * scale) * factor, round(self.height * scale) * factor)
        image = Image.new("RGB", size, "white")
        draw_shapes(lines, image, scale * factor)
        image = image.reduce(factor)
        draw_shapes(texts, image, scale)
        return image

    def svg(self):
        """As an <svg> element, and a file of that alone."""
        shapes = "\n".join(shape.svg() for shape in self.shapes)
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" font-family="sans-serif">\n'
                f'{shapes}\n</svg>\n')


def draw_shapes(shapes, image, scale):
    """Draw shapes, so many times as large, onto an image."""
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        shape.draw(canvas, scale)


class Curve(NamedTuple):
    """Points of a plot, and of each the length of half an error bar, 0 for none."""

    name: str
    x: list
    y: list
    deviations: list                            # one standard deviation of each point
    over: list                                  # over what that is: "3 seeds", or "" without


class Plot(NamedTuple):
    """What a plot shows: its axes' names with units, curves, and baselines, {name: height}."""

    x_name: str
    y_name: str
    curves: list
    levels: dict
    log: bool = False                           # whether x is on a log scale
    mark: tuple = ()                            # (x, name) of a vertical line


def plot_table(plots):
    """A heading, and rows of all numbers that plots show; baselines have no x."""
    heading = ["plot", "curve", plots[0].x_name, "value", "deviation", "deviation over"]
    rows = []
    for plot in plots:
        for curve in plot.curves:
            for x, y, deviation, over in zip(*curve[1:]):
                rows.append([plot.y_name, curve.name, x, y, deviation if over else "", over])
        for name, y in plot.levels.items():
            rows.append([plot.y_name, name, "", y, "", ""])
    return heading, rows


def draw_plots(plots):
    """A Drawing of plots, in two columns."""
    columns = min(2, len(plots))
    height = max(Frame.BOTTOM + Frame.BELOW + Frame.ENTRY * len(legend_of(plot)) for plot in plots)
    drawing = Drawing(columns * Frame.WIDTH, -(-len(plots) // columns) * height)
    for i, plot in enumerate(plots):
        Frame(drawing, plot, i % columns * Frame.WIDTH, i // columns * height).draw_all()
    return drawing


def legend_of(plot):
    """What the legend of a plot explains: (kind, colour, name) of each line of it."""
    entries = []
    curves = [curve for curve in plot.curves if curve.x]
    for i, curve in enumerate(curves):
        entries.append(("curve", COLOURS[i % len(COLOURS)], curve.name))
    for i, name in enumerate(plot.levels):
        entries.append((DASHES[i % len(DASHES)], INK, name))
    over = list(filter(None, itertools.chain(*(curve.over for curve in curves))))
    if over:
        names = " or ".join(dict.fromkeys(over))
        entries.append(("bar", INK, f"± 1 standard deviation over {names}"))
    if plot.mark:
        entries.append(("mark", INK, plot.mark[1]))
    return entries


class Frame:
    """Draws a plot into a drawing, its top left corner at (left, top)."""

    WIDTH = 480
    LEFT = 70                                   # of the axes, from the corner
    RIGHT = 455
    TOP = 45
    BOTTOM = 265
    BELOW = 58                                  # what the x axis takes
    ENTRY = 20                                  # what a line of the legend takes
    FITTING = 56                                # letters that fit into it

    def __init__(self, drawing, plot, left, top):
        self.drawing = drawing
        self.plot = plot
        self.curves = [curve for curve in plot.curves if curve.x]
        self.left = left + self.LEFT
        self.right = left + self.RIGHT
        self.top = top + self.TOP
        self.bottom = top + self.BOTTOM
        self.title_y = top + 17

    def draw_all(self):
        if not self.curves:
            self.drawing.text((self.left, self.title_y),
                              f"{self.plot.y_name}: nothing to show")
            return
        self.drawing.text((self.left, self.title_y), self.plot.y_name)
        self.set_axes()
        self.draw_y_axis()
        self.draw_baselines()
        self.draw_x_axis()
        for curve, colour in zip(self.curves, itertools.cycle(COLOURS)):
            self.draw_curve(curve, colour)
        self.draw_legend()

    def set_axes(self):
        """What is at the frame's edges."""
        ys = [*self.plot.levels.values()]
        xs = [self.plot.mark[0]] if self.plot.mark else []
        for curve in self.curves:
            deviations = np.array(curve.deviations)
            ys += [*(curve.y - deviations), *(curve.y + deviations)]
            xs += curve.x
        low = min(ys) - 0.02 * (max(ys) - min(ys))                  # so no line lies on the axis
        if min(ys) >= 0:
            low = max(0, low)                   # no score is negative
        self.y_ticks = round_ticks(low, max(ys))
        self.xs = np.array([min(xs), max(xs)], float)               # the curves' ends
        ends = self.scale(self.xs)
        margin = 0.04 * (ends[1] - ends[0]) or 0.5
        self.ends = ends + [-margin, margin]                        # the frame's

    def scale(self, x):
        """x as the axis measures it."""
        return np.log10(x) if self.plot.log else np.asarray(x, float)

    def x_pixel(self, x):
        """The distance of x from the page's left."""
        return np.interp(self.scale(x), self.ends, [self.left, self.right])

    def y_pixel(self, y):
        """The distance of y from the page's top."""
        return np.interp(y, self.y_ticks[[0, -1]], [self.bottom, self.top])

    def draw_y_axis(self):
        """The axes; a pale line for each of the ticks of y, and its number."""
        for tick in self.y_ticks:
            height = self.y_pixel(tick)
            self.drawing.line([(self.left, height), (self.right, height)], PALE)
            self.drawing.text((self.left - 6, height), f"{tick:.6g}", "rm")
        self.drawing.line([(self.left, self.top), (self.left, self.bottom),
                           (self.right, self.bottom)])

    def draw_baselines(self):
        """A broken line for each baseline, and a pale upright one at the mark."""
        for height, dash in zip(self.plot.levels.values(), itertools.cycle(DASHES)):
            ends = [(self.left, self.y_pixel(height)), (self.right, self.y_pixel(height))]
            self.drawing.line(ends, INK, dash=dash)
        if self.plot.mark:
            x = self.x_pixel(self.plot.mark[0])
            self.drawing.line([(x, self.top), (x, self.bottom)], MARKED, 2)

    def draw_x_axis(self):
        """Whole numbers under the x axis, and its name."""
        for x in self.x_ticks():
            self.drawing.line([(self.x_pixel(x), self.bottom), (self.x_pixel(x), self.bottom + 4)])
            self.drawing.text((self.x_pixel(x), self.bottom + 7), f"{x:,.0f}", "ma")
        name = self.plot.x_name + (" (log scale)" if self.plot.log else "")
        self.drawing.text(((self.left + self.right) / 2, self.bottom + 26), name, "ma")

    def x_ticks(self):
        """Where the x axis has numbers."""
        low, high = self.xs
        if self.plot.log:
            powers = 10.0 ** np.arange(0, 15)
            ticks = np.sort(np.outer(powers, LOG_TICKS).ravel())
        else:
            ticks = round_ticks(low, high)
        inside = [x for x in ticks if low <= x <= high and x % 1 == 0]
        return inside if len(inside) > 1 else sorted({low, high})

    def draw_curve(self, curve, colour):
        """A line through points, with error bars."""
        xs = self.x_pixel(curve.x)
        points = list(zip(xs, self.y_pixel(curve.y)))
        self.drawing.line(points, colour, 2)
        for (x, y), value, deviation, over in zip(points, curve.y, curve.deviations, curve.over):
            self.drawing.dot((x, y), 3, colour)
            if over:
                low = self.y_pixel(value - deviation)
                high = self.y_pixel(value + deviation)
                self.draw_bar(x, low, high, colour)

    def draw_bar(self, x, low, high, colour):
        """An error bar."""
        self.drawing.line([(x, low), (x, high)], colour)
        for end in low, high:
            self.drawing.line([(x - 4, end), (x + 4, end)], colour)

    def draw_legend(self):
        """Under the axes, what each line is."""
        for i, (kind, colour, name) in enumerate(legend_of(self.plot)):
            height = self.bottom + self.BELOW + self.ENTRY * i
            start = self.left
            ends = [(start, height), (start + 30, height)]
            if kind == "curve":
                self.drawing.line(ends, colour, 2)
                self.drawing.dot((start + 15, height), 3, colour)
            elif kind == "bar":
                self.draw_bar(start + 15, height - 7, height + 7, colour)
            elif kind == "mark":
                self.drawing.line([(start + 15, height - 8), (start + 15, height + 8)], MARKED, 2)
            else:
                self.drawing.line(ends, colour, dash=kind)
            size = min(TEXT, TEXT * self.FITTING / len(name))
            self.drawing.text((start + 40, height), name, "lm", size)


def round_ticks(low, high):
    """Multiples of 1, 2, 2.5 or 5 times a power of ten around low … high, in 5 steps at most."""
    if high - low <= 1e-9 * abs(high):          # flat
        margin = abs(high) / 10 if high else 1
        low -= margin
        high += margin
    power = 10 ** np.floor(np.log10((high - low) / 5))
    for step in power * np.array([1, 2, 2.5, 5, 10, 20]):
        first = np.floor(low / step + 1e-9)
        last = np.ceil(high / step - 1e-9)
        if last - first <= 5:
            return step * np.arange(first, last + 1) + 0.0          # no -0


def words_picture(names, y, weights, size, fonts):
    """A Drawing of words at points (N, 2) in [0, 1]², without overlaps (Fig. 6).

    The heaviest words come first and are largest; a word that finds no room is left out.
    """
    drawing = Drawing(size, size, fonts)
    centres = (0.05 + 0.9 * y) * size                               # (N, 2)
    spiral = spiral_from_centre(size)
    largest = 0.65 * size / (6 + len(names) ** 0.5)
    boxes = np.zeros((0, 4))                                        # of the words that are there
    for rank, i in enumerate(np.argsort(-weights, kind="stable")):
        height = max(9, largest * (1 - 0.6 * rank / len(names)))
        font = fonts.find(names[i], height)
        box = np.array(font.getbbox(names[i], "1", anchor="mm"))    # hinted: whole pixels
        point = find_room(centres[i] + spiral, box, boxes, size)
        if point is None:
            continue
        boxes = np.vstack([boxes, np.tile(point, 2) + box + MARGIN])
        colour = COLOURS[len(drawing.shapes) % len(COLOURS)]
        drawing.text(tuple(point), names[i], "mm", height, colour, box[2] - box[0])
    return drawing


def spiral_from_centre(size):
    """Points (300, 2) of a spiral around (0, 0), the nearest first."""
    step = np.arange(300)
    radius = np.sqrt(step) * size / 300
    return np.stack([radius * np.cos(2.4 * step), radius * np.sin(2.4 * step)], axis=1)


def find_room(points, box, boxes, size):
    """The first of the points (T, 2) around which a word's box (4,) is inside and free, or None.

    boxes (B, 4): those of the words that are there; all are left, top, right, bottom.
    """
    tried = np.tile(points, 2) + box + MARGIN                       # (T, 4)
    inside = (tried[:, :2] >= 0).all(axis=1) & (tried[:, 2:] <= size).all(axis=1)
    beyond = tried[:, None, :2] >= boxes[:, 2:]                     # (T, B, 2)
    before = tried[:, None, 2:] <= boxes[:, :2]
    free = (beyond | before).any(axis=2).all(axis=1)                # (T,)
    good = np.flatnonzero(inside & free)
    return points[good[0]] if len(good) else None
