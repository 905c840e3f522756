"""Experiments of several runs: trains them, scores them, and makes a table and a picture of it.

    python kernels/dev/experiments.py clean         weak against clean labels, on the drawn set
    python kernels/dev/experiments.py samplings     by class or by image, on the drawn set
    python kernels/dev/experiments.py photos --training '--images DIR --captions FILE …'
                                                    more photos, by two networks (Fig. 2)
    python kernels/dev/experiments.py --help        what may be changed

An experiment is a function under EXPERIMENTS that names its runs: a Row is arguments of weak.py,
and those of the eval.py command that scores it. `score_rows` trains and scores each with each seed,
and what is there already is not made again: an experiment that was stopped goes on.
Numbers are means over the seeds ± one standard deviation.
"""
import json
import os
import shlex
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import numpy as np

import eval as evaluation
import weak
from kernels import console, drawn, figures
from kernels.console import number

TIMES = {                       # how many times --base pictures each set has, by its labels
    "captions": (1, 2, 4, 8),
    "truth": (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)}     # it takes few to be as good as all captions

HELD_OUT = (0.1, 0.55, 0.775, 0.8875)   # parts of the photos; the rest halves from one to the next
NETWORKS = ("small", "narrow")          # which differ in nothing but the width of their layers


class Row(NamedTuple):
    """A row of a table: a training, which is repeated with several seeds, and its score."""

    name: str                   # of the folder of its runs, too
    training: list              # arguments of weak.py, without --out and --seed
    scoring: list               # of eval.py, without --model and --json: the command comes first
    weights: str = ""           # the file of the run that is scored; if not given the best epoch's


# ----------------------------------------------------------------------------------- running

def score_rows(rows, options, seed):
    """{name of a row: what its scoring wrote as JSON}, of one seed, trained where it is not yet."""
    results = {}
    for row in rows:
        name = f"{row.name}, seed {seed}"
        out = os.path.join(options.out, f"{row.name.replace(' ', '-')}-seed{seed}")
        training = [*row.training, "--seed", str(seed), *options.training]
        scoring = [*row.scoring, "--model", os.path.join(out, row.weights)]
        results[row.name] = score_run(name, out, training, scoring, options)
    return results


def score_run(name, out, training, scoring, options):
    """Train the run in the folder `out`, and score it; what either prints goes to `out`.txt."""
    path = out + ".json"
    arguments = [training, scoring]
    done = read_result(path, arguments)
    if done is not None:
        return done
    started = time.monotonic()
    train_run(out, training, options)
    with open_notes(out) as notes, redirect_stdout(notes), redirect_stderr(notes):
        evaluation.main([*scoring, *of_machine(options), "--json", path])
    with open(path, encoding="utf-8") as file:
        result = json.load(file)
    console.write_json(path, {"arguments": arguments, "result": result})
    print(f"{name}: {console.duration(time.monotonic() - started)}", flush=True)
    return result


def train_run(out, training, options):
    """Train the run in the folder `out` to its end, if it is not there; `out`.txt has what it says.
    """
    going_on = ["--resume"] if os.path.exists(os.path.join(out, "model.npz")) else []
    with open_notes(out) as notes, redirect_stdout(notes), redirect_stderr(notes):
        if weak.main([*training, "--out", out, *of_machine(options), *going_on]):
            raise KeyboardInterrupt             # a signal stopped the run: stop them all


def open_notes(out):
    """The file beside a run's folder of what its commands print, to write on."""
    return open(out + ".txt", "a", encoding="utf-8")


def of_machine(options):
    """The arguments of every command that say how it computes, not what."""
    return ["--threads", str(options.threads)] if options.threads else []


def read_result(path, arguments):
    """What was scored before, None if nothing was; ValueError if it was with other arguments."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        done = json.load(file)
    if "arguments" not in done:                 # it was stopped between the two writes
        return None
    if done["arguments"] != arguments:
        raise ValueError(f"{path} is of other options; choose another --out, or remove it and its "
                         "run")
    return done["result"]


# ------------------------------------------------------------------------------------ showing

def join_seeds(values):
    """{"value": the mean of the values of several seeds, …}, as evaluation.join_rows has it."""
    return evaluation.join_rows([{"value": value} for value in values], ["value"])


def describe(values):
    """Mean ± deviation, as text; of one value without a deviation."""
    joined = join_seeds(values)
    text = f"{joined['value']:.3f}"
    if "value" + evaluation.SPREAD in joined:
        text += f" ± {joined['value' + evaluation.SPREAD]:.3f}"
    return text


def make_curve(name, xs, values):
    """A Curve of means over seeds, values (points, seeds), where they are numbers."""
    rows = [{"x": x, **join_seeds(of_seeds)} for x, of_seeds in zip(xs, values)]
    return evaluation.curve_of(rows, name, "x", "value")


# ----------------------------------------------------------------- weak against clean labels

def compare_weak_and_clean(options):
    """The paper's central comparison: captions against the truth, by the number of pictures.

    Each seed draws a set of pictures of its own, of which a part is trained on, by their captions
    or by what they truly show. All runs of a seed are scored against the truth of the same held-out
    pictures. Every run makes as many steps, and its last weights are scored: with few pictures the
    held-out loss is lowest long before anything else is best.
    """
    counts = {}
    for labels, all_times in TIMES.items():
        counts[labels] = [int(options.base * times) for times in all_times]
    curves = {}                                 # {kind: {labels: AUC (counts, seeds)}}
    for kind in drawn.KINDS:
        curves[kind] = {labels: np.full((len(counts[labels]), options.seeds), np.nan)
                        for labels in counts}
    for seed in range(options.seeds):
        results = score_rows(weak_and_clean_rows(options, seed, counts), options, seed)
        for kind, of_kind in curves.items():
            for labels, auc in of_kind.items():
                auc[:, seed] = [find_auc(results[f"{labels} {count}"], kind)
                                for count in counts[labels]]
    show_weak_and_clean(curves, counts, options)
    result = {"pictures": counts}
    for kind, of_kind in curves.items():
        result[kind] = {labels: auc.tolist() for labels, auc in of_kind.items()}
    return result


def find_auc(result, kind):
    """A kind's AUC against the truth; NaN if so few pictures show no word of it."""
    return result["truth"].get(kind, {"auc": np.nan})["auc"]


def weak_and_clean_rows(options, seed, counts):
    """The rows of one seed, whose pictures are drawn first, with captions files of each count."""
    most = max(max(counts_of_labels) for counts_of_labels in counts.values())
    folder = os.path.join(options.out, f"{most}-pictures-seed{seed}")
    drawn.draw_set(folder, seed, most)
    captions = drawn.sources(folder)["captions"]
    truth = drawn.truth_file(folder)
    # by the truth as captions, which has words of all pictures: a caption may have none
    scoring = ["words", "--captions", truth, "--truth", truth, "--no-baselines"]
    recipe = {**weak.DRAWN, "positives": "balanced", "images": drawn.sources(folder)["images"]}
    del recipe["pictures"]
    # the truth has no words that show nothing
    sources = {"captions": (captions, recipe["stop_words"]), "truth": (truth, 0)}
    rows = []
    for labels, (path, stop_words) in sources.items():
        for count in counts[labels]:
            lines = write_first_lines(path, count)
            training = list_options({**recipe, "captions": lines, "stop_words": stop_words})
            rows.append(Row(f"{labels} {count}", training, scoring, "model.npz"))
    return rows


def list_options(values):
    """{option: value} as arguments of a command."""
    arguments = []
    for name, value in values.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def write_first_lines(path, count):
    """The path of a file of the first lines of another, beside it."""
    shortened = f"{os.path.splitext(path)[0]}-{count}.tsv"
    with open(path, encoding="utf-8") as file:
        lines = [next(file) for _ in range(count)]
    with console.whole_file(shortened, "w", encoding="utf-8") as file:
        file.writelines(lines)
    return shortened


def show_weak_and_clean(curves, counts, options):
    """Tables and a picture of compare_weak_and_clean."""
    show = evaluation.Output(os.path.join(options.out, "clean.png"))
    plots = []
    for kind, of_kind in curves.items():
        rows = {f"{count:,}": [] for count in sorted({*counts["captions"], *counts["truth"]})}
        for labels, values in of_kind.items():
            texts = {f"{count:,}": describe(auc) for count, auc in zip(counts[labels], values)}
            for name, row in rows.items():
                row.append(texts.get(name, ""))
        show.table([f"AUC of {kind}, pictures", *of_kind], rows)
        lines = [make_curve(f"trained on {labels}", counts[labels], values)
                 for labels, values in of_kind.items()]
        plots.append(figures.Plot("pictures, of which nine tenths are trained on",
                                  f"AUC of {kind}, against the truth", lines, {}, log=True))
    show.line("labelled pictures that teach things as well as so many captioned ones: "
              + describe_worth(curves["things"], counts))
    show.plots(plots, "weak against clean labels")


def describe_worth(curves, counts):
    """How many labelled pictures are as good as each number of captioned ones, by the mean AUC."""
    captions = finite_points(counts["captions"], curves["captions"].mean(axis=1))
    truth = finite_points(counts["truth"], curves["truth"].mean(axis=1))
    if not truth:
        return "not known"
    texts = []
    for count, auc in captions.items():
        needed = count_for(auc, list(truth), list(truth.values()))
        if needed == 0:
            texts.append(f"fewer than {min(truth):,} for {count:,}")
        elif needed == np.inf:
            texts.append(f"beyond those that were tried for {count:,}")
        else:
            texts.append(f"{needed:.0f} for {count:,} (each worth {count / needed:.1f})")
    return "; ".join(texts)


def finite_points(counts, values):
    """{count: its value} of the values that are numbers."""
    return {count: value for count, value in zip(counts, values) if np.isfinite(value)}


def count_for(auc, counts, reached):
    """At how many pictures a curve passes an AUC, between two counts by the logarithm.

    counts ascend, reached is the AUC of each. 0 below all of them, infinity above: no curve is
    continued.
    """
    reached = np.maximum.accumulate(reached)
    if auc < reached[0]:
        return 0.0
    if auc > reached[-1]:
        return np.inf
    return float(2 ** np.interp(auc, reached, np.log2(counts)))


# ------------------------------------------------------------------------------ more photos

def compare_photos(options):
    """Scores by the number of photos that networks of two widths learned from (Fig. 2).

    A smaller collection is the same one with more of it held out. All runs make as many steps, so
    they see a smaller collection more often. They are scored together, on the photos that none of
    them saw.
    """
    runs = []
    for seed in range(options.seeds):
        for name in NETWORKS:
            for valid in HELD_OUT:
                out = os.path.join(options.out, f"{name}-valid{valid}-seed{seed}")
                training = ["--epochs", "5", "--epoch-size", "35000", *options.training,
                            "--network", name, "--valid", str(valid), "--seed", str(seed)]
                started = time.monotonic()
                train_run(out, training, options)
                print(f"{out}: {console.duration(time.monotonic() - started)}", flush=True)
                runs.append(out)
    path = os.path.join(options.out, "words.json")
    evaluation.main(["words", "--model", *runs, "--out", os.path.join(options.out, "photos.png"),
                     *of_machine(options), "--json", path])
    with open(path, encoding="utf-8") as file:
        return json.load(file)


# ----------------------------------------------------------------------- by class or by image

def compare_samplings(options):
    """How the drawn set is sampled: by class with each kind of targets, or by image."""
    scoring = ["words", "--no-baselines"]
    rows = [Row("class drawn", ["--positives", "drawn"], scoring),
            Row("class all", ["--positives", "all"], scoring),
            Row("class balanced", ["--positives", "balanced"], scoring),
            Row("image all", ["--sampling", "image"], scoring),
            Row("image idf", ["--sampling", "image", "--positives", "idf"], scoring)]
    return compare_rows(rows, ("precision@1", "precision@10", "auc", "map"), options)


def compare_rows(rows, keys, options):
    """Score rows with all seeds, and show these numbers of what their commands wrote as JSON."""
    results = {row.name: [] for row in rows}
    for seed in range(options.seeds):
        for name, result in score_rows(rows, options, seed).items():
            results[name].append(result)
    table = {}
    for name, of_seeds in results.items():
        table[name] = [describe([result[key] for result in of_seeds]) for key in keys]
    evaluation.Output().table([f"{options.seeds} seeds", *keys], table)
    return results


EXPERIMENTS = {"clean": compare_weak_and_clean, "photos": compare_photos,
               "samplings": compare_samplings}


def main(arguments=None):
    """Make the experiment that the command line names."""
    parser = console.Parser(description=console.summary(__doc__))
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS), help="what to compare")
    parser.add_argument("--out", metavar="DIR", help="folder of its runs; if not given "
                        "runs/experiments and its name")
    parser.add_argument("--seeds", type=number(int, 1), default=3, help="of each training")
    parser.add_argument("--base", type=number(int, 1), default=1250, metavar="N",
                        help="pictures of the smallest set of `clean`")
    parser.add_argument("--training", type=shlex.split, default=[], metavar="'OPTION …'",
                        help="more options of weak.py, for all runs")
    parser.add_argument("--threads", type=number(int, 1, console.MOST_THREADS),
                        help="that compute, on the CPU")
    options = parser.parse_args(arguments)
    options.out = options.out or os.path.join("runs", "experiments", options.experiment)
    os.makedirs(options.out, exist_ok=True)
    result = EXPERIMENTS[options.experiment](options)
    console.write_json(os.path.join(options.out, f"{options.experiment}.json"), result)
    return 0


if __name__ == "__main__":
    console.run_command(main)
