"""The promises of this project, as tests: `pytest` runs them all, without a GPU, in minutes.

Gradients in float64 against central differences; the plain operations against SciPy, loops and
(where it is installed) PyTorch; the fast ones and the CUDA kernels, on the host, against the plain
ones; the text, the index, sampling, the loader, training, resuming, bad input, and the experiments.
No test depends on a processor's rounding.
"""
import argparse
import bz2
import csv
import errno
import gzip
import inspect
import io
import itertools
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, PngImagePlugin
from scipy.optimize import minimize
from scipy.signal import correlate
from scipy.sparse import csr_array
from scipy.special import log_expit, log_softmax, softmax
from scipy.stats import chisquare

import data
import eval as evaluation
import kernels
import model
import weak
from kernels import console, cpu, drawn, figures, gpu, philox, ranks, reference, tsne
from kernels.dev import bench, captions, emulate, emulate_cupy, experiments

HERE = os.path.dirname(os.path.abspath(__file__))
IMPORTING = f"import sys; sys.path.insert(0, {HERE!r})\n"
no_space = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def run(*arguments, folder=None, script="weak.py", code=None, ranks=None, expect=0, crash=False):
    """A command as a user types it, or code that imports this project; what it has said.

    ranks: how many, under mpiexec. No traceback, whatever happens, but where a crash is expected.
    """
    what = ["-c", IMPORTING + code] if code else [os.path.join(HERE, script)]
    done = subprocess.run(
        [*mpiexec(ranks), sys.executable, *what, *map(str, arguments)], cwd=folder,
        capture_output=True, text=True, timeout=240)
    assert done.returncode == expect, done.stdout + done.stderr
    assert ("Traceback" in done.stderr) == crash, done.stderr
    return done


def mpiexec(ranks):
    """What starts a command as so many ranks, where there is MPI; [] if ranks is None."""
    if ranks is None:
        return []
    pytest.importorskip("mpi4py")
    beside = os.path.dirname(sys.executable)
    found = shutil.which("mpiexec", path=beside) or shutil.which("mpiexec")
    return [found, "-n", str(ranks)] if found else pytest.skip("no mpiexec")


# ------------------------------------------------------------------------------- gradients

TRAINING = model.Context(seed=1, step=5)


@pytest.fixture
def reference_device():
    """Everything computes by kernels/reference.py."""
    kernels.use("reference")
    yield
    kernels.use("cpu")


def check_numerically(loss, x, gradient, name="x", samples=12, eps=1e-5, tolerance=1e-6):
    """A gradient against central differences of loss() on random coordinates of the array x.

    A failure names the tensor, the index and both values.
    """
    assert gradient.shape == x.shape, name
    for flat in np.random.default_rng(3).choice(x.size, min(samples, x.size), replace=False):
        index = np.unravel_index(flat, x.shape)
        kept = x[index]
        x[index] = kept + eps
        above = loss()
        x[index] = kept - eps
        below = loss()
        x[index] = kept
        numeric = (above - below) / (2 * eps)
        assert abs(numeric - gradient[index]) <= tolerance * max(1, abs(numeric)), (
            f"d{name}{list(map(int, index))}: {gradient[index]} by backward, "
            f"{numeric} by differences")


def as_float64(net):
    """The network with float64 weights, and with biases that matter."""
    noise = np.random.default_rng(0)
    for _, layer, name in net.parameters():
        value = getattr(layer, name).astype(np.float64)
        if name == "b":
            value += 0.1 * noise.standard_normal(value.shape)
        setattr(layer, name, value)
    return net


def alone(*layers):
    """A float64 network of the layers whose first dx is wanted, too."""
    net = as_float64(model.Network([(f"layer{i}", layer) for i, layer in enumerate(layers)]))
    net.first.needs_dx = True
    return net


def check_gradients(net, x, **how):
    """Every gradient of the network, where ℓ is gy·y with a random gy."""
    (y,) = net.forward_training(x, TRAINING)
    gy = np.random.default_rng(3).standard_normal(y.shape)

    def loss():
        (y,) = net.forward_training(x, TRAINING)
        return (y * gy).sum()

    dx = net.backward([gy])
    for path, layer, name in net.parameters():
        check_numerically(loss, getattr(layer, name), getattr(layer, "d" + name), path, **how)
    check_numerically(loss, x, dx, **how)


class Residual(model.Sequential):
    """y = x + f(x), where f is what the layers do one after the other (He 2016)."""

    def forward(self, x):
        return x + super().forward(x)

    def forward_training(self, x, context):
        return x + super().forward_training(x, context)

    def backward(self, dy):
        return kernels.sum_gradients([dy, super().backward(dy)])


Conv = model.Conv
Linear = model.Linear
MaxPool = model.MaxPool
Flatten = model.Flatten
LAYERS = {                      # on images of 10×8 pixels with 3 channels
    "conv": lambda: [Conv(3, 5, 3, pad=1, relu=False)],
    "conv_relu": lambda: [Conv(3, 5, 3, stride=2, pad=1)],
    "conv_wide_pad": lambda: [Conv(3, 4, 2, stride=2, pad=3, relu=False)],
    "convs": lambda: [Conv(3, 4, 3, pad=1), Conv(4, 2, 3)],
    "max_pool": lambda: [MaxPool(3, 2)],
    "max_pool_pad": lambda: [Conv(3, 4, 3), MaxPool(3, 1, pad=1), Conv(4, 2, 1)],
    "avg_pool": lambda: [Conv(3, 4, 3), model.AvgPool(3, 2)],
    "lrn": lambda: [Conv(3, 7, 3), model.LRN(3, k=1.5, alpha=0.3, beta=0.75), Conv(7, 3, 1)],
    "linears": lambda: [Flatten(), Linear(240, 6), Linear(6, 4)],
    "dropout": lambda: [Flatten(), Linear(240, 40, relu=False), model.Dropout(0.4), Linear(40, 3)],
    "output": lambda: [Flatten(), Linear(240, 9), model.Output(9, 5)],
    "concat": lambda: [
        Conv(3, 4, 3, pad=1),
        model.Concat([Conv(4, 3, 1)], [Conv(4, 2, 1), Conv(2, 5, 3, pad=1)],
                     [MaxPool(3, 1, pad=1), Conv(4, 2, 1)]),
        Conv(10, 2, 3)],
    "residual": lambda: [
        Conv(3, 4, 3, pad=1),
        Residual(Conv(4, 6, 1), Conv(6, 4, 3, pad=1, relu=False)),
        Residual(Conv(4, 4, 3, pad=1)), Flatten(), model.Output(320, 3)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradient_is_numerical(name, reference_device, rng):
    check_gradients(alone(*LAYERS[name]()), rng.standard_normal((2, 10, 8, 3)))


def watch_backward(layer):
    """From now on `backward` of this layer, and of those in it, must leave its dy alone."""
    for inner in layer.layers.values():
        watch_backward(inner)
    honest = layer.backward

    def backward(dy, *rest):
        before = np.array(dy)
        dx = honest(dy, *rest)
        assert np.array_equal(dy, before), f"{type(layer).__name__} changed its dy"
        return dx

    layer.backward = backward


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", LAYERS)
def test_backward_never_changes_its_dy(name, device, rng):
    kernels.use(device)
    net = alone(*LAYERS[name]())
    (y,) = net.forward_training(rng.standard_normal((2, 10, 8, 3)), TRAINING)
    for layer in net.layers.values():
        watch_backward(layer)
    net.backward([rng.standard_normal(y.shape)])
    kernels.use("cpu")


def some_labels(rng, n, k):
    """Labels of n photos with up to three of k words each."""
    targets = [rng.choice(k, size, replace=False) for size in (2, 1, 3)[:n]]
    return data.Labels(data.pad_rows(targets), np.array([0.5, 0.25, 0.25])[:n])


def small_with_head(k=11, dropout=0.4):
    """A network of a few numbers with an auxiliary head."""
    head = model.Head([("conv", Conv(4, 2, 2)), ("flat", Flatten()),
                       ("drop", model.Dropout(dropout)), ("output", model.Output(2 * 9 * 9, k))])
    return model.Network([
        ("conv1", Conv(3, 4, 3)), ("head", head), ("conv2", Conv(4, 2, 3)),
        ("flat", Flatten()), ("output", model.Output(2 * 8 * 8, k))])


NETWORKS = {                    # build, pixels, images
    "small": (lambda: model.small(11, 0.3), 64, 3),
    "alexnet": (lambda: model.alexnet(11, 0.5), 224, 1),
    "googlenet": (lambda: model.googlenet(11, 0.4), 224, 1),
    "head": (small_with_head, 12, 3)}


def move(directions, by):
    """Move arrays in place along their directions, which are pairs of (array, direction)."""
    for w, direction in directions:
        w += by * direction


def slopes(loss, directions, gradients, eps=1e-7):
    """The slope of loss() along the directions, by central differences and by the gradients."""
    move(directions, eps)
    above = loss()
    move(directions, -2 * eps)
    below = loss()
    move(directions, eps)
    exact = sum((dw * direction).sum() for dw, (_, direction) in zip(gradients, directions))
    return (above - below) / (2 * eps), exact


@pytest.mark.parametrize("name", NETWORKS)
def test_network_gradient_is_numerical(name, rng):
    """Along a random direction of all its weights; where that is wrong, the modules are named."""
    build, crop, n = NETWORKS[name]
    net = as_float64(build())
    x = rng.standard_normal((n, crop, crop, 3))
    labels = some_labels(rng, n, 11)
    softmax = model.Softmax()

    def loss():                                 # with the auxiliary heads', as it is minimised
        *heads, scores = net.forward_training(x, TRAINING)
        total = softmax(scores, labels)[0].sum()
        for s in heads:
            total += model.HEAD_WEIGHT * softmax(s, labels)[0].sum()
        return total

    _, gradients = model.training_losses(softmax, net.forward_training(x, TRAINING), labels)
    net.backward(gradients)
    wrong = wrong_modules(net, loss, rng, [net])
    assert not wrong, wrong + wrong_modules(net, loss, rng, net.layers.values())


def wrong_modules(net, loss, rng, modules):
    """(module, slope by differences, by backward) of the modules in which the two differ."""
    wrong = []
    for module in modules:
        directions = []
        gradients = []
        for _, layer, name in module.parameters():
            w = getattr(layer, name)
            directions.append((w, rng.standard_normal(w.shape) / np.sqrt(w.size)))
            gradients.append(getattr(layer, "d" + name))
        numeric, exact = slopes(loss, directions, gradients)
        if not abs(numeric - exact) < 1e-6 * max(1, abs(numeric)):
            wrong.append((module, numeric, exact))
    return wrong


def test_gathered_output_is_the_full_one_on_its_classes(rng):
    net = alone(Flatten(), Linear(240, 9), model.Output(9, 12))
    x = rng.standard_normal((3, 10, 8, 3))
    classes = np.array([1, 4, 5, 11], np.int32)
    ds = np.zeros((3, 12))
    ds[:, classes] = rng.standard_normal((3, 4))
    linear = net.layers["layer1"]
    whole = net.forward(x)
    net.backward([ds])
    dw, db, below = net.output.dw, net.output.db, linear.dw
    (gathered,) = net.forward_training(x, model.Context(classes=classes))
    np.testing.assert_allclose(gathered, whole[:, classes])
    np.testing.assert_allclose(net.output.scores(net.features(x), classes), gathered)
    net.backward([ds[:, classes].copy()])
    np.testing.assert_allclose(net.output.dw, dw[classes])
    np.testing.assert_allclose(net.output.db, db[classes])
    np.testing.assert_allclose(linear.dw, below)
    assert net.forward(x).shape == (3, 12)      # all words again: nothing is remembered


def test_sgd_moves_only_the_rows_of_the_batchs_classes(rng):
    net = alone(Flatten(), model.Output(240, 12))
    classes = np.array([1, 4, 5, 11], np.int32)
    others = np.setdiff1d(np.arange(12), classes)
    net.forward_training(rng.standard_normal((3, 10, 8, 3)), model.Context(classes=classes))
    net.backward([rng.standard_normal((3, 4))])
    sgd = model.SGD(net, 0.9, 0.1)
    for v in sgd.v.values():
        v[...] = 1
    before = net.output.w.copy(), net.output.b.copy()
    sgd.step(0.1)
    for after, old, path in zip((net.output.w, net.output.b), before, ("layer1.w", "layer1.b")):
        assert np.array_equal(after[others], old[others]) and (sgd.v[path][others] == 1).all()
        assert (after[classes] != old[classes]).all() and (sgd.v[path][classes] != 1).all()


@pytest.mark.parametrize("name, layer, spoil, message", [
    ("conv", 0, lambda layer: setattr(layer, "x", 0 * layer.x),
     r"dlayer0\.w\[\d, \d, \d, \d\]: -?0\.0 by backward, -?\d"),
    ("conv", 0, lambda layer: setattr(layer, "stride", 2), None),
    ("max_pool", 0, lambda layer: setattr(layer, "pad", 1), None),
    ("convs", 0, lambda layer: setattr(layer, "relu", False), None),
    ("linears", 1, lambda layer: setattr(layer, "relu", False), None),
    ("dropout", 2, lambda layer: setattr(layer, "counter", (1, 6, layer.mask_id, 0)), None),
    ("concat", 1, lambda layer: setattr(layer, "branches", layer.branches[::-1]), None),
    ("avg_pool", 1, lambda layer: setattr(layer, "kernel", 2), None)])
def test_wrong_backward_is_caught_and_named(name, layer, spoil, message, rng):
    net = alone(*LAYERS[name]())
    layer = net.layers[f"layer{layer}"]
    honest = layer.backward

    def backward(dy):
        spoil(layer)
        return honest(dy)

    layer.backward = backward
    with pytest.raises((AssertionError, ValueError), match=message):
        check_gradients(net, rng.standard_normal((2, 10, 8, 3)), samples=200)


def test_first_weights_are_hes_and_biases_begin_at_zero():
    for path, layer, name in model.googlenet(30, seed=3).parameters():
        value = getattr(layer, name)
        shape = layer.shapes[name]
        assert value.shape == shape and value.dtype == np.float32
        assert name == "w" or not value.any()
        if value.size > 10_000:
            he = np.sqrt(2 / np.prod(shape[:-1]))
            expected = model.OUTPUT_STD if isinstance(layer, model.Output) else he
            assert abs(value.std() / expected - 1) < 0.05, path


# --------------------------------------------------- the reference against others' arithmetic

@pytest.mark.parametrize("seed", range(40))
def test_convolution_agrees_with_scipy_and_its_adjoints(seed, reference_device):
    rng = np.random.default_rng(seed)
    kh, kw = rng.integers(1, 8, 2).tolist()
    stride = int(rng.integers(1, 5))
    pad = int(rng.integers(0, 6))
    n, c, f = rng.integers(1, (4, 6, 8)).tolist()
    h, w = (int(rng.integers(max(1, k - 2 * pad), 16)) for k in (kh, kw))
    x = rng.standard_normal((n, h, w, c))
    filters = rng.standard_normal((kh, kw, c, f))
    b = rng.standard_normal(f)
    y = kernels.conv_forward(x, filters, b, stride, pad)
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    for i, k in np.ndindex(n, f):
        whole = sum(correlate(padded[i, :, :, j], filters[:, :, j, k], "valid", "direct")
                    for j in range(c))
        np.testing.assert_allclose(y[i, :, :, k], whole[::stride, ::stride] + b[k], atol=1e-11)
    dy = rng.standard_normal(y.shape)
    dx = kernels.conv_backward_input(dy, filters, x.shape, stride, pad)
    dw, db = kernels.conv_backward_filter(x, dy, filters.shape, stride, pad)
    product = (dy * (y - b)).sum()              # <dy, A x>, which is <Aᵀ dy, x>
    np.testing.assert_allclose((dx * x).sum(), product, atol=1e-9)
    np.testing.assert_allclose((dw * filters).sum(), product, atol=1e-9)
    np.testing.assert_allclose(db, dy.sum(axis=(0, 1, 2)), atol=1e-11)


@pytest.mark.parametrize("kernel, stride, pad, ceil", [
    (3, 2, 0, False), (3, 2, 0, True), (3, 1, 1, False), (2, 3, 1, True)])
def test_pooling_agrees_with_numpys_windows_and_its_adjoints(kernel, stride, pad, ceil, rng,
                                                             reference_device):
    def windows(x, outside):
        x = np.pad(x, [(0, 0), *[(pad, pad + stride)] * 2, (0, 0)], constant_values=outside)
        views = sliding_window_view(x, (kernel, kernel), (1, 2))[:, ::stride, ::stride]
        return views[:, :oh, :ow].reshape(*y.shape, -1)             # (N, OH, OW, C, k²)

    x = np.maximum(rng.standard_normal((2, 9, 12, 3)), 0)           # zeros: ties
    y, argmax = kernels.max_pool_forward(x, kernel, stride, pad, ceil)
    _, oh, ow, _ = y.shape
    dy = rng.standard_normal(y.shape)
    z = rng.standard_normal(x.shape)
    assert np.array_equal(y, windows(x, -np.inf).max(axis=-1))
    assert np.array_equal(argmax, windows(x, -np.inf).argmax(axis=-1))          # the first of them
    chosen = np.take_along_axis(windows(z, np.nan), argmax[..., None].astype(int), -1)[..., 0]
    dx = kernels.max_pool_backward(dy, argmax, x.shape, kernel, stride, pad)
    assert math.isclose((dx * z).sum(), (dy * chosen).sum())        # <Aᵀdy, z> = <dy, Az>
    if not pad and not ceil:
        mean = windows(z, np.nan).mean(axis=-1)
        np.testing.assert_allclose(kernels.avg_pool_forward(z, kernel, stride), mean, 1e-9)
        dx = kernels.avg_pool_backward(dy, z.shape, kernel, stride)
        assert math.isclose((dx * z).sum(), (dy * mean).sum())


def test_lrn_follows_its_formula(reference_device, rng):
    x = rng.standard_normal((1, 2, 3, 9))
    y = kernels.lrn_forward(x, 5, 2.0, 0.1, 0.75)
    for c in range(9):
        near = x[..., max(0, c - 2):c + 3]
        np.testing.assert_allclose(y[..., c], x[..., c] / (2 + 0.1 * (near**2).sum(-1)) ** 0.75)


def test_network_by_name_says_how_one_is_made():
    with pytest.raises(ValueError, match=r"not 'small'; .* model.small\(k=80\)"):
        model.Network("small", 80)


@pytest.mark.parametrize("name", model.NETWORKS)
def test_networks_agree_with_pytorch(name, rng):
    torch = pytest.importorskip("torch")
    recipe = model.NETWORKS[name]
    net = as_float64(recipe.build(50, 0.0, 1))
    for _, layer in net.walk():
        if isinstance(layer, model.Dropout):
            layer.rate = 0                      # masks are our own affair
    torch.set_default_dtype(torch.float64)
    theirs = bench.torch_network(torch, net.layers)
    x = rng.standard_normal((2, recipe.crop, recipe.crop, 3))
    y = theirs(torch.tensor(x).permute(0, 3, 1, 2))
    scores = net.forward_training(x, TRAINING)
    side_scores = [module.s for module in theirs if hasattr(module, "s")]
    for ours, other in zip(scores, [*side_scores, y], strict=True):
        np.testing.assert_allclose(ours, other.detach().numpy(), rtol=1e-9, atol=1e-12)
    _, gradients = model.training_losses(model.Softmax(), scores, np.array([3, 7]))
    net.backward(gradients)
    loss_of = torch.nn.functional.cross_entropy
    targets = torch.tensor([3, 7])
    (loss_of(y, targets) + sum(0.3 * loss_of(s, targets) for s in side_scores)).backward()
    first = next(module for module in theirs if hasattr(module, "weight"))
    dw = first.weight.grad.permute(2, 3, 1, 0).numpy()
    np.testing.assert_allclose(net.first.dw, dw, rtol=1e-7, atol=1e-9 * abs(dw).max())


def test_readme_loads_a_run_into_pytorch(tmp_path, monkeypatch, rng):
    torch = pytest.importorskip("torch")
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall("```python\n(.*?)```", readme, re.S)
               if "import torch" in block]
    net = model.small(30)
    for _, layer, name in net.parameters():
        weights = getattr(layer, name)
        weights[...] = 0.1 * rng.standard_normal(weights.shape)
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/drawn")
    data.save_checkpoint("runs/drawn/best.npz", data.Checkpoint(net.state(), {}, {}, ["word"]))
    names = {}
    torch.set_default_dtype(torch.float32)
    exec(code, names)
    x = rng.standard_normal((2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = names["features"](torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(net.features(x), theirs, rtol=1e-4, atol=1e-4 * theirs.max())


PI = (0x243f6a8885a308d3, 0x13198a2e03707344, 0xa4093822299f31d0, 0x082efa98ec4e6c89,
      0x452821e638d01377, 0xbe5466cf34e90c6c)   # its first digits


@pytest.mark.parametrize("counter, seed, numbers", [
    ((0, 0, 0, 0), 0, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    (PI[:4], PI[4] | PI[5] << 64,
     "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6")])
def test_philox_numbers_are_the_published_ones_of_the_counter(counter, seed, numbers):
    """The known answers of Random123, the code of Salmon et al. 2011; then the next block."""
    block, *rest = counter
    raw = philox.philox(seed, counter).random_raw(8)
    assert [f"{n:016x}" for n in raw[:4]] == numbers.split()
    assert raw[4:].tolist() == philox.philox(seed, (block + 1, *rest)).random_raw(4).tolist()


def test_dropout_mask_is_a_function_of_the_global_row():
    x = np.ones((64, 1000), np.float32)
    whole = kernels.dropout(x, 0.3, 9, 4, 77)
    assert np.array_equal(whole[16:40], kernels.dropout(x[16:40], 0.3, 9, 4, 77, row=16))
    assert abs((whole > 0).mean() - 0.7) < 0.01 and np.allclose(whole[whole > 0], 1 / 0.7)
    assert not np.array_equal(whole, kernels.dropout(x, 0.3, 9, 5, 77))


def test_prepare_crops_mirrors_and_normalises(reference_device, rng):
    photos = rng.integers(0, 256, (3, 12, 12, 3)).astype(np.uint8)
    photos[2] = 200                             # a blank photo
    x = kernels.prepare(photos, [0, 4, 1], [2, 1, 1], [False, True, False], 8)
    pixels = photos[1, 4:12, 1:9][:, ::-1].astype(np.float64)
    np.testing.assert_allclose(x[1], (pixels - pixels.mean()) / pixels.std(), atol=1e-5)
    assert abs(x[0].mean()) < 1e-5 and abs(x[0].std() - 1) < 1e-5
    assert not x[2].any()


def test_numbers_below_n_are_the_upper_half_of_the_product(rng):
    raw = rng.integers(0, 2**64, 1000, np.uint64)
    for n in (1, 7, 2**31 + 5, 2**32 - 1):
        assert reference.below(raw, n).tolist() == [int(number) * n >> 64 for number in raw]


# ------------------------------------------------------------ the fast CPU against the reference

@pytest.mark.parametrize("seed", range(40))
def test_fast_convolution_is_the_references(seed):
    rng = np.random.default_rng(seed)
    kh, kw = rng.integers(1, 8, 2).tolist()
    stride = int(rng.integers(1, 5))
    pad = int(rng.integers(0, 6))
    n, c, f = rng.integers(1, (6, 6, 8)).tolist()
    if seed % 4 == 0:                           # by Winograd's algorithm
        kh, kw, stride, pad, c, f = 3, 3, 1, 1, c + 15, f + 15
    elif seed % 4 == 1:
        n, kh, kw, stride, pad, c, f = 1, 5, 5, 1, 2, c + 23, f + 23
    h, w = (int(rng.integers(max(1, k - 2 * pad), 16)) for k in (kh, kw))
    x = rng.standard_normal((n, c, h, w)).transpose(0, 2, 3, 1)     # as a user may have it
    filters = rng.standard_normal((kh, kw, c, f))
    b = rng.standard_normal(f)
    y = reference.conv_forward(x, filters, b, stride, pad, relu=True)
    dy = rng.standard_normal(y.shape)
    for name, arguments in {
            "conv_forward": (x, filters, b, stride, pad, True),
            "conv_backward_input": (dy, filters, x.shape, stride, pad),
            "conv_backward_filter": (x, dy, filters.shape, stride, pad)}.items():
        fast = getattr(cpu, name)(*arguments)
        exact = getattr(reference, name)(*arguments)
        if name != "conv_backward_filter":      # which gives two arrays
            fast = [fast]
            exact = [exact]
        for ours, expected in zip(fast, exact, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-10)


@pytest.mark.parametrize("r", (3, 5))
def test_winograd_products_have_the_error_that_is_said(r, rng):
    x, w, dy = (rng.standard_normal(shape, np.float32)
                for shape in ((8, 8, 8, 96), (r, r, 96, 128), (8, 8, 8, 128)))
    exact_x, exact_w, exact_dy = (array.astype(np.float64) for array in (x, w, dy))
    y = cpu.conv_forward(x, w, np.zeros(128, np.float32), 1, r // 2)
    exact_y = reference.conv_forward(exact_x, exact_w, np.zeros(128), 1, r // 2)
    assert np.linalg.norm(y - exact_y) < 5e-6 * np.linalg.norm(exact_y)
    dx = cpu.conv_backward_input(dy, w, x.shape, 1, r // 2)
    exact_dx = reference.conv_backward_input(exact_dy, exact_w, x.shape, 1, r // 2)
    assert np.linalg.norm(dx - exact_dx) < 5e-6 * np.linalg.norm(exact_dx)


def test_results_do_not_depend_on_the_number_of_threads(rng):
    x, dy, w = (rng.standard_normal(shape)
                for shape in ((7, 13, 11, 6), (7, 13, 11, 8), (3, 3, 6, 8)))
    before = kernels.threads.count
    results = []
    for count in (1, 2, 3, before):
        kernels.threads.start(count)
        y = kernels.conv_forward(x, w, np.zeros(8), 1, 1, relu=True)
        results.append([y, kernels.relu_backward(dy, y), kernels.sum_gradients([dy, dy]),
                        *kernels.max_pool_forward(x, 3, 2),
                        *kernels.conv_backward_filter(x, dy, w.shape, 1, 1)])
    for others in results[1:]:
        for a, b in zip(results[0], others):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_no_thread_works_on_after_an_error():
    before = kernels.threads.count
    kernels.threads.start(3)
    finished = []

    def work(items):
        if 0 in items:
            raise MemoryError
        time.sleep(0.05)
        finished.append(items)

    with pytest.raises(MemoryError):
        kernels.threads.share(work, range(3))
    assert len(finished) == kernels.threads.count - 1
    kernels.threads.start(before)


def test_imports_set_nothing_and_need_no_cupy():
    """Neither the number of BLAS threads nor a handler of signals: whoever computes first does."""
    done = run(code="import signal; before = signal.getsignal(2)\n"
                    "import data, kernels, model, weak, eval\nfrom kernels import cpu\n"
                    "assert cpu.threads._executor is None and cpu.threads._count is None\n"
                    "assert signal.getsignal(2) is before and 'cupy' not in sys.modules\n"
                    "sys.modules['cupy'] = None; print(kernels.use('auto'))")
    assert done.stdout.startswith("device: CPU")


# ------------------------------------------------------------------------ losses and SGD

@pytest.mark.parametrize("name", model.LOSSES)
@pytest.mark.parametrize("gathered", [False, True])
def test_loss_gradient_is_numerical(name, gathered, rng):
    labels = some_labels(rng, 3, 9)
    k = 9
    if gathered:                                # 9 columns of 12 words
        k = 12
        labels = labels._replace(classes=np.array([0, 2, 3, 5, 7, 8, 9, 10, 11], np.int32),
                                 inclusion_probability=rng.uniform(0.2, 1, 9))
    loss = model.LOSSES[name](rng.uniform(0.1, 0.9, k))
    s = 2 * rng.standard_normal((3, 9))
    _, ds = loss(s, labels)
    check_numerically(lambda: loss(s, labels)[0].sum(), s, ds, samples=27, eps=1e-6,
                      tolerance=1e-8)


def test_losses_leave_the_scores_as_they_are_and_take_plain_classes(rng):
    s = rng.standard_normal((3, 5))
    before = s.copy()
    labels = data.Labels(np.array([[1], [4], [0]], np.int32), np.full(3, 1 / 3))
    for loss in (model.Softmax(), model.OneVersusAll(np.full(5, 0.2))):
        losses, ds = loss(s, labels)
        again, _ = loss(s, np.array([1, 4, 0]))
        np.testing.assert_allclose(again, losses, rtol=1e-6)
        assert np.array_equal(s, before) and not np.shares_memory(s, ds)


def test_losses_survive_large_scores_and_words_of_every_photo():
    s = np.array([[1e4, -1e4, 0]], np.float32)
    for weight in (1, 0):                       # 0: a row that does not count
        losses, ds = kernels.softmax_loss(s, np.array([[1]], np.int32), np.array([[weight]]))
        assert losses == [2e4 * weight] and ds.tolist() == [[weight, -weight, 0]]
    s = np.array([[1e4, -1e4, 0, -3e38, 7]], np.float32)
    labels = data.Labels(np.array([[1, 4]], np.int32), np.ones(1))
    losses, ds = model.OneVersusAll(np.array([.5, .5, .5, .5, 1]))(s, labels)
    assert losses[0] == pytest.approx(0.4 * (2e4 + math.log(2)) + 0.2 * math.log1p(math.exp(-7)))
    np.testing.assert_allclose(ds, [[0.4, -0.4, 0.2, 0, -0.2 / (1 + math.exp(7))]], rtol=1e-6)


def test_losses_are_equations_1_and_2(rng):
    n, k, photos = 4, 5, 40                     # N = 40 photos, of which a batch of 4
    counts = rng.integers(1, 30, k)
    s = 3 * rng.standard_normal((n, k))
    targets = np.array([[0, 2], [2, -1], [1, 3], [-1, -1]], np.int32)
    one_vs_all = np.zeros(n)
    softmax = np.zeros(n)
    for i, j in np.ndindex(n, k):
        if j in targets[i]:
            softmax[i] -= log_softmax(s[i])[j] / n
            one_vs_all[i] -= photos / (n * k) * log_expit(s[i, j]) / counts[j]
        else:
            one_vs_all[i] -= photos / (n * k) * log_expit(-s[i, j]) / (photos - counts[j])
    labels = data.Labels(targets, np.full(n, 1 / n))
    losses, _ = model.OneVersusAll(counts / photos)(s, labels)
    np.testing.assert_allclose(losses, one_vs_all, rtol=1e-12)
    losses, _ = model.Softmax()(s, labels)
    np.testing.assert_allclose(losses, softmax, rtol=1e-12)


def test_probabilities_are_the_losses_own(rng):
    s = 5 * rng.standard_normal((3, 6))
    np.testing.assert_allclose(model.Softmax().probabilities(s), np.exp(log_softmax(s, axis=1)))
    one_vs_all = model.OneVersusAll(np.full(6, 0.1))
    for loss in (model.Softmax(), one_vs_all):
        log_p = loss.log_probability(s - loss.normaliser(s))
        np.testing.assert_allclose(np.exp(log_p), loss.probabilities(s))
    np.testing.assert_allclose(one_vs_all.probabilities(s), np.exp(log_expit(s)))
    assert np.isfinite(one_vs_all.probabilities(1e4 * s)).all()


def test_normaliser_is_log_of_the_sum_and_survives_large_scores(rng):
    s = rng.standard_normal((3, 6))
    np.testing.assert_allclose(s - model.Softmax().normaliser(s), log_softmax(s, axis=1))
    large = np.array([[1e4, 0], [-1e4, -1e4]], np.float32)
    assert model.Softmax().normaliser(large)[:, 0] == pytest.approx([1e4, math.log(2) - 1e4])
    assert not model.OneVersusAll(np.full(6, 0.1)).normaliser(s).any()


# how rows are drawn, and whether the prior makes p exact
PRIORS = {
    "by image": ({"sampling": "image"}, True),
    "drawn": ({}, True),
    "balanced": ({"positives": "balanced"}, True),
    "all": ({"positives": "all"}, False),
    "idf": ({"positives": "idf", "sampling": "image"}, False),
    "one-vs-all by image": ({"loss": "one-vs-all", "sampling": "image"}, True),
    "one-vs-all drawn": ({"loss": "one-vs-all"}, False),
    "one-vs-all all": ({"loss": "one-vs-all", "positives": "all"}, False)}


def toy_photos(rng):
    """The kind of each of 6,000 photos, one of 3, (N, 3), and which of 5 words it carries, (N, K).

    The network can tell kinds apart, and photos of a kind not.
    """
    chance = np.array([[.9, .5, .4, .05, .02], [.3, .1, .7, .3, .01], [.5, .5, .02, .02, .3]])
    kind = np.repeat([0, 1, 2], [2000, 3000, 1000])
    carried = rng.random((6000, 5)) < chance[kind]
    labelled = carried.any(axis=1)
    return np.eye(3)[kind[labelled]], carried[labelled]


def training_draws(carried, options):
    """How often training draws each photo, (N, 1), and each word as its target, (N, K)."""
    n, k = carried.shape
    counts = carried.sum(axis=0)
    by_image = np.full((n, 1), 1 / n)
    by_word = carried / (k * counts)                                # a word, then a photo of it
    by_class = by_word.sum(axis=1, keepdims=True)
    if options["positives"] == "idf":
        weights = carried * np.log(n / counts)
        return by_image, by_image * weights / weights.sum(axis=1, keepdims=True)
    if options["sampling"] == "image":
        return by_image, by_image * carried
    if options["positives"] == "all":
        return by_class, by_class * carried
    return by_class, by_word


@pytest.mark.parametrize("name", PRIORS)
def test_prior_makes_probabilities_those_of_photos_as_they_are(name, rng):
    given, exact = PRIORS[name]
    options = {"loss": "softmax", "sampling": "class", "positives": "drawn", "targets": "all",
               "batch": 64, **given}
    kind, carried = toy_photos(rng)
    rows, targets = training_draws(carried, options)
    weight = targets.sum(axis=0)                                    # (K,)
    frequency = weight
    if options["positives"] in ("balanced", "idf"):     # all words of a row, of less weight
        frequency = (rows * carried).sum(axis=0)
    shift = model.prior_shift(options, carried.sum(axis=0), len(carried), frequency, weight)
    positive = kind.T @ targets                                     # (3, K)
    real = kind.T @ carried
    if options["loss"] == "softmax":            # scores at which the training loss is least
        s = np.log(positive)
        p = real / real.sum(axis=1, keepdims=True)
    else:
        s = np.log(positive / frequency) - np.log((kind.T @ rows - positive) / (1 - frequency))
        p = real / kind.sum(axis=0)[:, None]
    loss = model.LOSSES[options["loss"]](frequency)
    before = abs(loss.probabilities(s) - p).max()
    after = before if shift is None else abs(loss.probabilities(s + shift) - p).max()
    assert model.prior_is_exact(options) == exact
    if exact:
        assert after < 1e-6
        assert before > 0.1 or options["sampling"] == "image"
    else:
        assert 0.01 < after < 0.8 * before


@pytest.mark.parametrize("sampling, error", [("class", 1e-3), ("image", 0.1)])
def test_prior_holds_over_the_batchs_own_words(sampling, error):
    """Photos of one word; the minimum over all batches of 3 such rows is found by L-BFGS."""
    counts = np.array([70, 20, 9, 1])
    p = np.array([0.4, 0.2, 0.3, 0.1])          # of the words of a photo x
    options = {"loss": "softmax", "sampling": sampling, "positives": "drawn", "targets": "batch",
               "batch": 3}
    q = np.full(4, 1 / 4) if sampling == "class" else counts / 100
    drawn = p * q / counts                      # p(k | x) of the rows that training draws
    drawn = drawn / drawn.sum()
    loss = model.Softmax()

    def mean_loss(s):
        total = 0
        gradient = np.zeros(4)
        for words in np.ndindex(4, 4, 4):       # the word of x, and of the other rows
            classes = np.unique(words)
            target = np.searchsorted(classes, words[:1])
            weight = drawn[words[0]] * q[words[1]] * q[words[2]]
            losses, ds = loss(s[None, classes], target)
            total += weight * losses[0]
            gradient[classes] += weight * ds[0]
        return total, gradient

    s = minimize(mean_loss, np.zeros(4), jac=True, method="L-BFGS-B", tol=1e-12).x
    shift = model.prior_shift(options, counts, 100, q, q)
    after = abs(loss.probabilities((s + shift)[None]) - p).max()
    assert after < error
    assert model.prior_is_exact(options) == (sampling == "class")
    if sampling == "image":
        assert after < abs(loss.probabilities(s[None]) - p).max() / 2


@pytest.mark.parametrize("corrected", [True, False])
def test_one_vs_all_over_the_batchs_words_is_unbiased(corrected):
    """By the inclusion probability, over all draws of 3 of 4 words; without it, it is not."""
    k, n = 4, 3
    frequency = np.full(k, 1 / k)
    loss = model.OneVersusAll(frequency)
    s = np.random.default_rng(0).standard_normal((n, k))
    mean = np.zeros(k)
    whole = np.zeros(k)
    for words in np.ndindex(*[k] * n):          # the mean gradients of the scores of row 0
        labels = data.Labels(np.array(words, np.int32)[:, None], np.full(n, 1 / n))
        whole += loss(s, labels)[1][0] / k**n
        classes = np.unique(labels.targets)
        probability = 1 - (1 - frequency[classes]) ** (n - 1)
        labels = labels._replace(
            targets=np.searchsorted(classes, labels.targets), classes=classes,
            inclusion_probability=probability if corrected else None)
        mean[classes] += loss(s[:, classes], labels)[1][0] / k**n
    assert np.allclose(mean, whole, rtol=1e-7, atol=0) == corrected


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_sgd_follows_its_formula(module, rng):
    w, v, dw = rng.standard_normal((3, 300_000))
    new_v = 0.9 * v + dw + 0.01 * w
    new_w = w - 0.1 * new_v
    module.sgd(w, v, dw, 0.1, 0.9, 0.01)
    np.testing.assert_allclose(v, new_v)
    np.testing.assert_allclose(w, new_w)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_weights_in_another_order_are_trained(device, reference_device, rng):
    """As those of a transposed array are; those that `load` never saw are refused, not ignored."""
    kernels.use(device)
    net = model.small(k=5)
    theirs = {path: np.asfortranarray(array) for path, array in net.state().items()}
    assert not theirs["conv1.w"].flags.c_contiguous
    net.load(theirs)
    net.forward_training(rng.standard_normal((2, 64, 64, 3), np.float32), model.Context())
    net.backward([np.ones((2, 5), np.float32)])
    before = {path: array.copy() for path, array in theirs.items()}
    model.SGD(net, 0.9, 0).step(0.1)
    for path, layer, name in net.parameters():
        assert np.allclose(getattr(layer, name), before[path] - 0.1 * getattr(layer, "d" + name))
    if device == "cpu":
        net.conv1.w = theirs["conv1.w"]
        with pytest.raises(ValueError, match="contiguous"):
            model.SGD(net, 0.9, 0).step(0.1)


def test_networks_have_their_parameter_counts():
    def count(net, heads=True):
        total = 0
        for path, layer, name in net.parameters():
            if heads or not path.startswith("head"):
                total += np.prod(layer.shapes[name])
        return total

    for k in (10, 1000):
        assert count(model.alexnet(k, seed=None)) == 57_003_840 + 4097 * k
        googlenet = model.googlenet(k, seed=None)
        assert count(googlenet, heads=False) == 6_998_552 + 1025 * (k - 1000)
        assert count(googlenet) == 13_378_280 + 3 * 1025 * (k - 1000)


def test_network_is_used_from_python_in_five_lines(rng):
    net = model.small(80)
    x = rng.standard_normal((4, 64, 64, 3), np.float32)
    losses, gradients = model.training_losses(
        model.Softmax(), net.forward_training(x, model.Context()), np.arange(4))
    net.backward(gradients)
    assert losses == pytest.approx(np.full(4, math.log(80) / 4), rel=0.05)
    assert net.conv1.dw.shape == (5, 5, 3, 32) and net.conv1 is net.layers["conv1"]
    shown = repr(net)
    assert "conv1    Conv     (5, 5, 3, 32)" in shown and "1,378,608 parameters" in shown
    with pytest.raises(AttributeError, match="no layer conv9, but conv1, pool1"):
        net.conv9
    with pytest.raises(ValueError, match=r"\(N, H, W, C\) with C = 3, not .*\(4, 3, 64, 64\)"):
        net.forward(x.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"features \(N, 2048\), not .* another size"):
        net.forward(x[:, :32, :32])


# ------------------------------------------------------------------------------------ text

@pytest.mark.parametrize("caption, words", [
    ("A tri-colored dog, isn't it?", "a tricolored dog isnt it"),
    ("#sunset#beach 2014 mp3 3.5 12-13", "sunset beach mp3"),
    ("Été à Nîmes — Ça va: cœur", "ete a nimes ca va cœur"),
    ("e\u0301te\u0301 naïve ÅNGSTRÖM", "ete naive angstrom"),
    ("Ёлка и йогурт Київ", "елка и йогурт київ"),
    ("हिन्दी में फूल", "हिन्दी में फूल"),
    ("สวัสดีครับ ประเทศไทย", "สวัสดีครับ ประเทศไทย"),
    ("한국어 \u1112\u1161\u11ab\u1100\u1173\u11af", "한국어 한글"),
    ("日本の写真 2015", "日本の写真"),
    ("dog,cat/bird|fish", "dog cat bird fish"),
    ("❤️ love☀️ ½ ² ٣", "love"),
    ("!!! 12", ""),
    ("a\nb\tc\u2028d\u00a0e\x0bf\x85g", "a b c d e f g"),
    ("ក្រហម\u200bបាល់ so\u00adft ze\ufeffro", "ក្រហម បាល់ soft zero"),
    ("I <3 cats &amp; dogs, 2 < 3 > 1", "i cats dogs"),
    ('<a href="http://x.org/a?b=c" rel="nofollow">more</a><br />now <B>here</B>', "more now here"),
    ("&quot;caf&eacute;&quot; &#39;noir&#x27; &amp;quot;twice&amp;quot;", "cafe noir twice"),
    ("AT&T; &bogus; &#99999999; &#xdc80;", "att bogus".replace("att", "at t")),
    ("a <redacted> man <!-- nobody --> ran", "a redacted man ran"),
    ('cut off <a href="http://www.flickr.com/pho', "cut off"),
    ("at HTTP://x.org/a,b and WWW.y.com/ or ftp://z too", "at and or too"),
    ("a" * 40 + " " + "b" * 41, "a" * 40)])
def test_words_are_the_papers_in_every_script(caption, words):
    assert data.words_of(caption) == words.split()


def test_words_of_ascii_are_cut_by_the_same_rule():
    """ASCII goes another way, for speed: a letter that is not ASCII beside it changes nothing."""
    for code in range(128):
        caption = f"ab{chr(code)}cd 1{chr(code)}2"
        assert data.words_of(caption) + ["e"] == data.words_of(caption + " é"), code


@pytest.mark.parametrize("text", ["<a ", "<a =", "<!--", "&#", "&a", "http://", "www.", "a://",
                                  "ab", "</b ", "<b  ", "&#1", "<3"])
def test_words_of_no_text_take_long(text):
    started = time.monotonic()
    data.words_of(text * (1_000_000 // len(text)) + "&<www.")
    assert time.monotonic() - started < 10      # a few tenths


# --------------------------------------------------------------------------------- formats

ROWS = [("a.jpg", "one dog"), ("b c.jpg", "two, dogs"), ("sub/ü.jpg", 'three "dogs"'),
        ("a.jpg", "four")]
NAMES = ["a.jpg", "b c.jpg", "sub/ü.jpg"]


def in_quotes(text):
    """A text as CSV quotes it."""
    return '"' + text.replace('"', '""') + '"'


def json_lines():
    """The rows as JSON objects, whose keys differ, and whose tags are a list."""
    lines = []
    for key, (name, text) in zip(("text", "caption", "captions", "tags"), ROWS):
        value = text.split() if key == "tags" else text
        lines.append(json.dumps({"file_name": name, key: value}) + "\n")
    return "".join(lines)


def coco():
    """The rows as COCO has them: images, and annotations by the images' numbers."""
    images = [{"id": i, "file_name": name} for i, name in enumerate(NAMES)]
    annotations = [{"image_id": NAMES.index(name), "caption": text} for name, text in ROWS]
    return json.dumps({"info": {}, "images": images, "annotations": annotations}, indent=1)


def karpathys_coco():
    """The rows as Karpathy's files have them: images with sentences."""
    images = [{"filename": name, "sentences": [{"raw": text}]} for name, text in ROWS]
    return json.dumps({"images": images})


CAPTIONS = {                    # the rows in each format; a key begins with the format's name
    "tsv": "".join(f"{name}\t{text}\n" for name, text in ROWS),
    "tsv with numbers": "".join(f"{n}#{i}\t{text}\r\n" for i, (n, text) in enumerate(ROWS)),
    "csv": "image,caption\n" + "".join(f"{name},{in_quotes(text)}\n" for name, text in ROWS),
    "csv with bars": "image_name| comment_number| comment\n" + "".join(
        f"{name}| 0| {text}\n" for name, text in ROWS),
    "csv of Excel": "sep=;\nFile Name;title;keywords\n" + "".join(
        f"{name};;{in_quotes(text)}\n" for name, text in ROWS),
    "jsonl": json_lines(),
    "coco": coco(),
    "coco as a list": json.dumps([{"file_name": name, "alt_text": text} for name, text in ROWS]),
    "coco of Karpathy": karpathys_coco()}


def read(path):
    """A captions file's format, its photos' names and words, and how many of its lines are bad."""
    captions = data.captions_of(data.Source(str(path)))
    rows = [(name, data.words_of(caption)) for name, caption in captions]
    assert captions.count == len(rows)
    return captions.kind, rows, captions.bad_lines


@pytest.mark.parametrize("name", CAPTIONS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, b"\xef\xbb\xbf".__add__],
                         ids=["plain", "gzip", "bzip2", "BOM"])
def test_captions_formats_are_recognised_and_read(name, pack, tmp_path):
    (tmp_path / "c").write_bytes(pack(CAPTIONS[name].encode()))
    kind, rows, bad_lines = read(tmp_path / "c")
    assert kind == name.split()[0]
    assert rows == [(name, data.words_of(text)) for name, text in ROWS]
    assert bad_lines == 0


def as_yfcc(*head):
    """A photo of the YFCC100M table, a video, and a line that is none; head: the first columns."""
    url = "http://www.flickr.com/photos/1@N00/1/"
    lines = ["\t".join([*head, "1@N00", "nick", "2009-01-01", "123", "Canon", "My+Caf%C3%A9",
                        "at+the%0Asea", "red+car,sun", *[""] * 4, url, url, "CC", url, *"1234",
                        "jpg", video]) for video in "01"]
    return "\n".join([*lines, "junk\n"]).encode()


ODD = {                         # format, a file, what is read of it, and the number of bad lines
    "encodings": ("tsv", b"a.jpg\tcaf\xe9 noir\nno tab\n\xe9.jpg\tok\nb.jpg\t" + b"w " * 99_999,
                  [("a.jpg", "cafe noir"), ("\udce9.jpg", "ok"), ("b.jpg", "w " * 99_999)], 1),
    "a bad line in between": ("tsv", b"a.jpg\tone\nb.jpg two\nc.jpg\tthree\n\n\td\ne.jpg\tfour\n",
                                 [("a.jpg", "one"), ("c.jpg", "three"), ("e.jpg", "four")], 2),
    "commas that nobody quoted": (
        "csv", b'image,caption\na.jpg,one, two, three\nb.jpg\n"c.jpg","x\ny"\n',
        [("a.jpg", "one two three"), ("c.jpg", "x y")], 1),
    "json lines": ("jsonl", b'{"file_name": "a.jpg", "text": "x"}\n{"file_name": "b\\ud800.jpg", '
                   b'"text": "x"}\nnull\n5\n{"file_name": "c.jpg", "text": null}\n' + b"[" * 99_999,
                   [("a.jpg", "x"), ("c.jpg", "")], 4),
    "a quote that nobody closed": (
        "csv", b'image,caption\n0.jpg,caf\xe9\n1.jpg,"a cat sits\n' + b"".join(
            b"%d.jpg,word\n" % i for i in range(2, 60)),
        [("0.jpg", "cafe"), ("1.jpg", "a cat sits"), *((f"{i}.jpg", "word") for i in range(2, 60))],
        0),
    "names like an archive's magic": ("tsv", b"PK.jpg\tone\nPAR1.jpg\ttwo\n",
                                      [("PK.jpg", "one"), ("PAR1.jpg", "two")], 0),
    "coco": ("coco", b'{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2}, 7], "annotations": '
             b'[null, [], {"image_id": [1]}, {"image_id": 1}, {"image_id": 1, "caption": "x"}]}',
             [("a.jpg", "x")], 4),
    "quotes in a table of tabs": (
        "csv",
        b'image\tcaption\na.jpg\t"an open one\n"b.jpg"\t"a quoted ""one"""\nc.jpg\t5" wide\n',
        [("a.jpg", "an open one"), ("b.jpg", "a quoted one"), ("c.jpg", "wide")], 0),
    "a long text in quotes": (
        "csv", b'image,caption\na.jpg,"one,\n' + b"more,\n" * 50 + b'end"\nb.jpg,two\n',
        [("a.jpg", "one " + "more " * 50 + "end"), ("b.jpg", "two")], 0),
    "quotes that two rows leave open": (
        "csv", b'image,caption\na.jpg,"one\nb.jpg,two\nc.jpg,"three\nd.jpg,"four, five"\n',
        [("a.jpg", "one"), ("b.jpg", "two"), ("c.jpg", "three"), ("d.jpg", "four five")], 0),
    "inches": ("csv", b'image,caption\na.jpg,a 5" wheel\nb.jpg,"a 6"" nail"\nc.jpg,7" of 8"\n',
               [("a.jpg", "a wheel"), ("b.jpg", "a nail"), ("c.jpg", "of")], 0),
    "rows wider than the heading": (
        "csv", b"caption,image\none,a.jpg\ntwo, in the sun,b.jpg\nthree,c.jpg,\n",
        [("a.jpg", "one"), ("c.jpg", "three")], 1),
    "rows of tabs wider than the heading": (
        "csv", b"caption\timage\none\ta.jpg\ntwo\tin the sun\tb.jpg\n", [("a.jpg", "one")], 1),
    "all ends of lines": ("tsv", b"a.jpg\tone\rb.jpg\ttwo\r\nc.jpg\tthree\n\rd.jpg\tfour",
                          [("a.jpg", "one"), ("b.jpg", "two"), ("c.jpg", "three"),
                           ("d.jpg", "four")], 0),
    "UTF-16": ("tsv", "ü.jpg\tein Café\r\nb.jpg\tzwei".encode("utf-16"),
               [("ü.jpg", "ein cafe"), ("b.jpg", "zwei")], 0),
    "UTF-16 of the other order": ("jsonl", b"\xfe\xff" + '{"image": "ü.jpg", "text": "é"}'.encode(
        "utf-16-be"), [("ü.jpg", "e")], 0),
    "two files in one": ("tsv", b"\xef\xbb\xbfa.jpg\tone\n\xef\xbb\xbfb.jpg\ttwo\n",
                         [("a.jpg", "one"), ("b.jpg", "two")], 0),
    "numbers of captions in a table": (
        "csv", b"image,caption\na.jpg#0,one\na.jpg#1,two\nb#c.jpg,three\n",
        [("a.jpg", "one"), ("a.jpg", "two"), ("b#c.jpg", "three")], 0),
    "numbers of captions in json": ("jsonl", b'{"image": "a.jpg#0", "caption": "one"}\n',
                                    [("a.jpg", "one")], 0),
    "no text in a table": ("csv", b"image,title,caption\na.jpg,nan,one\nb.jpg,NULL,None\n",
                           [("a.jpg", "one"), ("b.jpg", "")], 0),
    "no text in json": (
        "jsonl", b'{"image": "a.jpg", "caption": NaN, "title": "one"}\n'
        b'{"image": "b.jpg", "caption": 5, "title": true, "tags": [1, "two", null, {"x": "y"}]}\n'
        b'{"image": "c.jpg", "prompt": "no key"}\n', [("a.jpg", "one"), ("b.jpg", "two")], 1),
    "objects as texts": (
        "jsonl", b'{"image": "a.jpg", "tags": [{"tag": "horse"}, {"id": 3, "name": "cart"}]}\n'
        b'{"image": "b.jpg", "captions": [{"id": 1, "caption": "two", "lang": "en"}]}\n',
        [("a.jpg", "horse cart"), ("b.jpg", "two")], 0),
    "a first line that is another": ("jsonl", b'{"version": 1}\n{"image": "a.jpg", "text": "x"}\n',
                                     [("a.jpg", "x")], 1),
    "a first line that is broken": ("jsonl", b'{"version":\n{"image": "a.jpg", "text": "x"}\n',
                                    [("a.jpg", "x")], 1),
    "ids": ("coco", b'{"images": [{"id": 0, "file_name": "a.jpg"}, {"id": "007", "file_name": '
            b'"b.jpg"}, {"id": null, "file_name": "c.jpg"}], "annotations": [{"image_id": 0.0, '
            b'"caption": "x"}, {"image_id": 7, "caption": "y"}, {"caption": "z"}, '
            b'{"image_id": null, "caption": "z"}, {"image_id": false, "caption": "z"}]}',
            [("a.jpg", "x"), ("b.jpg", "y")], 3),
    "names that are numbers": ("coco", b'[{"image_id": 0, "caption": "x"}, {"image_id": 7.0, '
                               b'"caption": "y"}]', [("0", "x"), ("7", "y")], 0),
    "sentences": (
        "coco", b'{"images": [{"filename": "a.jpg", "sentences": [{"tokens": ["a", "dog"]}, "a cat"'
        b', null, 5, {"raw": "a cow", "tokens": ["a"]}, {}]}, {"sentences": ["lost"]}, '
        b'{"filename": "b.jpg", "sentences": null}]}',
        [("a.jpg", "a dog"), ("a.jpg", "a cat"), ("a.jpg", "a cow")], 5),
    "a shop's table": ("csv", b"id,name,image_path,description\n0,Nice,a.jpg,one\n",
                       [("a.jpg", "one")], 0),
    "yfcc": ("yfcc", as_yfcc("61"), [("61.jpg", "my cafe at the sea red car sun")], 1),
    "yfcc with line numbers": (
        "yfcc", as_yfcc("7", "61"), [("61.jpg", "my cafe at the sea red car sun")], 1),
    "yfcc with hashes": ("yfcc", as_yfcc("7", "61", "0f" * 16), [
        ("0f" * 16 + "/61.jpg", "my cafe at the sea red car sun")], 1),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_captions_cost_their_own_lines_and_no_more(name, tmp_path):
    expected_kind, content, expected, expected_bad_lines = ODD[name]
    (tmp_path / "c").write_bytes(content)
    kind, rows, bad_lines = read(tmp_path / "c")
    assert kind == expected_kind
    assert rows == [(name, text.split()) for name, text in expected]
    assert bad_lines == expected_bad_lines


@pytest.mark.parametrize("kind, content, complaint", [
    ("csv", b"who,what\na.jpg,x\n", "names no columns"), ("coco", b'{"images": [', "neither COCO"),
    ("coco", b'{"a.jpg": {"caption": "x"}}', "the keys a.jpg, neither COCO"),
    ("coco", b'{"images": [{"id": 1}], "annotations": [{"image_id": 2}]}', "image_id of none"),
    ("tsv", b"", "is empty"), ("tsv", b"\x1f\x8bnot gzip", "is damaged"),
    (None, b"\xfd7zXZ\0", "packed by xz"), (None, b"ARROW1\0\0", "an Arrow table"),
    (None, "а.jpg\tкот и пёс".encode("cp1251"), "not text in UTF-8"),
    (None, "a.jpg\tx".encode("utf-16-le"), "UTF-16 with its mark")])
def test_captions_that_cannot_be_read_are_told_in_one_line(kind, content, complaint, tmp_path):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ValueError, match=f"^captions: {tmp_path}/c [^\n]*{complaint}[^\n]*$"):
        list(data.captions_of(data.Source(str(tmp_path / "c"), kind)))


@pytest.mark.parametrize("content, complaint", [
    ('{"file_name": "a.jpg", "prompt": "x"}\n' * 2, "the keys file_name, prompt, and needs"),
    ("image,caption,split\na.jpg,x, y,train\n", "1 rows have another number of fields"),
    ("a.jpg\t12\n", "see --format, --image-column"),
    ("a.jpg: one\nb.jpg: two\n", "2 lines have no tab between .* e.g. 'a.jpg: one'"),
    ("/etc/a.jpg\tx\n", "lead out of --images")])
def test_captions_without_words_say_why(content, complaint, tmp_path):
    (tmp_path / "c").write_text(content)
    with pytest.raises(ValueError, match=f"^captions: [^\n]*has no word [^\n]*{complaint}[^\n]*$"):
        build(tmp_path)


def test_disk_that_fails_is_not_a_damaged_file(tmp_path, monkeypatch):
    (tmp_path / "c").write_text("a.jpg\tx\n")
    monkeypatch.setattr(data, "open", Mock(side_effect=OSError(errno.EIO, "I/O error")), False)
    with pytest.raises(ValueError, match="cannot be read: I/O error"):
        build(tmp_path)


def test_captions_that_are_not_utf8_are_counted(tmp_path):
    (tmp_path / "c").write_bytes(b"a.jpg\tcaf\xe9\n\xe9.jpg\tplain\nc.jpg\t" + "né\n".encode())
    captions = data.captions_of(data.Source(str(tmp_path / "c")))
    assert [name for name, _ in captions] == ["a.jpg", "\udce9.jpg", "c.jpg"]
    assert captions.recoded == 1


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_line_that_is_too_long_is_a_bad_one(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE", 100)
    content = CAPTIONS[kind].splitlines(keepends=True)
    content.insert(2, content[1].replace("dog", "dog\t" * 99))
    (tmp_path / "c").write_text("".join(content))
    _, rows, bad_lines = read(tmp_path / "c")
    assert [name for name, _ in rows] == [name for name, _ in ROWS]
    assert bad_lines == 1


def test_json_larger_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGEST_JSON", 100)
    (tmp_path / "c").write_text(CAPTIONS["coco"])
    with pytest.raises(ValueError, match="write one line for each caption"):
        read(tmp_path / "c")


COLUMNS_GIVEN = [               # a file, --image-column, --text-column, and what is read of it
    ("id,foto,texto\n1,a.jpg,one\n", "foto", "texto", [("a.jpg", "one")]),
    ("image,caption,alt\na.jpg,one,two\n", None, "alt", [("a.jpg", "two")]),
    ("image,caption,alt\na.jpg,one,two\n", None, "alt,caption", [("a.jpg", "one two")]),
    ("id;My Photo;caption\n1;a.jpg;one\n", "my photo", None, [("a.jpg", "one")]),
    ("7,a.jpg,one\n8,b.jpg,two\n", "2", "3", [("a.jpg", "one"), ("b.jpg", "two")]),
    ("7\ta.jpg\tone, two\n\tb.jpg\t\"three\n", "2", "3", [("a.jpg", "one two"),
                                                         ("b.jpg", "three")]),
    ("one|two|a.jpg\n", "3", "1,2", [("a.jpg", "one two")]),
    ('{"id": 1, "url": "a.jpg", "prompt": "one"}\n', "url", "prompt", [("a.jpg", "one")]),
    ('[{"url": "a.jpg", "prompt": "one", "text": "no"}]', "url", "prompt", [("a.jpg", "one")])]


@pytest.mark.parametrize("content, image, text, expected", COLUMNS_GIVEN)
def test_columns_may_be_given(content, image, text, expected, tmp_path):
    (tmp_path / "c").write_text(content)
    captions = data.captions_of(data.Source(str(tmp_path / "c"), None, image, text))
    rows = [(name, " ".join(data.words_of(caption))) for name, caption in captions]
    assert rows == expected


@pytest.mark.parametrize("content", ["image,caption\na.jpg,one\n", "a.jpg\tone\n"])
def test_columns_that_are_not_there_are_told(content, tmp_path):
    (tmp_path / "c").write_text(content)
    with pytest.raises(ValueError, match="needs one of nope, .*; name them by --image-column"):
        data.recognise(data.Source(str(tmp_path / "c"), None, "nope"))


# ------------------------------------------------------------------------- index and draws

def write_captions(path, photos=400, seed=0, extra=""):
    """Three captions of four made-up words for each photo, far apart; [name, caption] pairs."""
    rng = np.random.default_rng(seed)
    vocabulary = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60)]
    probability = 1 / np.arange(1, 61)
    probability /= probability.sum()
    rows = []
    for i in [*range(photos)] * 3:
        rows.append([f"p{i}.jpg", " ".join(rng.choice(vocabulary, 4, p=probability))])
    path.write_text("".join(f"{name}\t{caption}\n" for name, caption in rows) + extra)
    return rows


def build(folder, text=data.Text(30, 5, 0.2), name="i", captions="c", **how):
    return data.build_index(data.Source(str(folder / captions)), str(folder / name), text, **how)


def words_by_photo(index):
    """{photo's name: its words} of an index."""
    words = {}
    for i in range(len(index)):
        words[index.name(i)] = [index.dictionary[k] for k in index.words(i)]
    return words


@pytest.fixture
def index(tmp_path):
    write_captions(tmp_path / "c")
    return build(tmp_path)


def test_ragged_rows_are_those_of_a_list(rng):
    lists = [rng.integers(0, 9, length).tolist() for length in (0, 3, 0, 1, 5, 0)]
    ends = np.cumsum([len(row) for row in lists])
    ragged = data.Ragged(np.concatenate(lists).astype(int), ends)
    assert [row.tolist() for row in ragged] == lists
    assert ragged.counts().tolist() == [0, 3, 0, 1, 5, 0]
    assert [row.tolist() for row in ragged.part(1, 4)] == lists[1:4]
    taken = ragged.take(np.array([4, 0, 1, 4]))
    assert [row.tolist() for row in taken] == [lists[4], lists[0], lists[1], lists[4]]


class PlainIndex:
    """What an index must hold, by plain loops; valid 0.2, 5 stop words and 30 words."""

    def __init__(self, rows):
        names = {name for name, _ in rows}
        # the same photos as ever are held out, so that old runs are not scored on their own ones
        self.held_out = {name for name in names
                         if data.hash_all([name.encode()], 4)[0] < 0.2 * 2**32}
        counts = Counter()
        for name, caption in rows:
            if name not in self.held_out:
                counts.update(caption.split())
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        self.dictionary = ranked[5:35]
        self.words = {name: set() for name in names}
        for name, caption in rows:
            self.words[name] |= set(caption.split()) & set(self.dictionary)

    def words_by_photo(self):
        """{photo's name: its words, the most frequent first}, of photos that have some."""
        ordered = {}
        for name, words in self.words.items():
            if words:
                ordered[name] = sorted(words, key=self.dictionary.index)
        return ordered

    def photos(self, word):
        """The names of the training photos that carry a word."""
        return {name for name, words in self.words.items()
                if word in words and name not in self.held_out}


OUTSIDE = "../out.jpg\twaa\n/etc/x.jpg\twaa\n"


@pytest.mark.parametrize("batch, set_size", [
    (data.BATCH_CHARACTERS, data.SET_BYTES), (3000, data.SET_BYTES), (3000, 2000)],
    ids=["in one batch", "in batches", "in sets"])
def test_index_is_the_captions_words(batch, set_size, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH_CHARACTERS", batch)
    monkeypatch.setattr(data, "SET_BYTES", set_size)
    dots = ["a..b.jpg", "waa wab wac wad wae waf wag"]              # not outside the folder
    rows = write_captions(tmp_path / "c", extra=OUTSIDE + "empty.jpg\t \n" + "\t".join(dots))
    rows.append(dots)
    index, plain = build(tmp_path), PlainIndex(rows)
    assert 0.1 < len(plain.held_out) / 400 < 0.3
    assert index.dictionary == plain.dictionary
    assert words_by_photo(index) == plain.words_by_photo()
    names = [index.name(i) for i in range(len(index))]
    assert set(names[:index.held_out]) == plain.held_out & plain.words_by_photo().keys()
    assert not set(names[index.held_out:]) & plain.held_out
    assert index.facts["refused"] == 2
    assert index.facts["refused_names"] == ["../out.jpg", "/etc/x.jpg"]
    assert index.facts["without_words"] >= 1
    for k, word in enumerate(index.dictionary):
        assert {names[photo] for photo in index.photos(k)} == plain.photos(word)
        assert len(index.photos(k)) == index.counts[k] > 0


def test_photos_whose_hashes_are_equal_are_told_apart(index, tmp_path, monkeypatch):
    hash_names = data.hash_names
    monkeypatch.setattr(data, "hash_names", lambda names: hash_names(names) >> 60 << 60)
    crowded = build(tmp_path, data.Text(30, 5, 0.2), "crowded", dictionary=index.dictionary)
    assert words_by_photo(crowded) == words_by_photo(index)


def test_photos_in_the_index_follow_their_hashes(index):
    names = [index.name(i).encode() for i in range(len(index))]
    assert (np.diff(data.hash_names(names).astype(float)) > 0).all()


@pytest.mark.parametrize("captions, labels", [("a.jpg\tx\n", 0), ("a.jpg\tdog\nb.jpg\tcat\n", 1)])
def test_index_may_have_no_label_or_one(captions, labels, tmp_path):
    (tmp_path / "c").write_text(captions)
    index = build(tmp_path, data.Text(1, 0, 0), dictionary=["dog"])
    assert index.label_count == len(index) == labels
    assert index.counts.tolist() == [labels]
    assert words_by_photo(index) == ({"a.jpg": ["dog"]} if labels else {})


def test_index_is_cached_until_something_changes(tmp_path):
    write_captions(tmp_path / "c")
    times = []
    for words, seed in ((30, 0), (30, 0), (29, 0), (29, 1)):
        if seed:
            write_captions(tmp_path / "c", seed=seed)
        assert len(build(tmp_path, data.Text(words, 5, 0.2)).dictionary) == words
        times.append(os.stat(tmp_path / "i" / "index.json").st_mtime_ns)
    assert times[0] == times[1] < times[2] < times[3]


@pytest.mark.parametrize("many, few, used", [
    (10**6, 2, 2), (10**6, 50, 3), (1, 2, 3)])  # 3 is a twentieth of the 60 words
def test_stop_words_are_by_size_counted_and_shown(many, few, used, tmp_path, monkeypatch):
    write_captions(tmp_path / "c")
    ranked = build(tmp_path, data.Text(60, 0, 0.2)).dictionary
    monkeypatch.setattr(data, "MANY", many)
    monkeypatch.setattr(data, "FEW_STOP_WORDS", few)
    index = build(tmp_path, data.Text(30, None, 0.2), name="2")
    assert index.facts["stop_words"] == used
    assert index.facts["rest"] == 60 - used - 30
    shown = [word for word, _ in index.facts["left_out"]]
    assert shown == ranked[:used] + ranked[used + 30:][:3]
    times = [count for _, count in index.facts["left_out"]]
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0


def test_stop_words_chosen_by_size_may_be_named(tmp_path):
    write_captions(tmp_path / "c")
    index = build(tmp_path, data.Text(30, None, 0.2))
    assert index.facts["stop_words"] == 3

    def is_cached(stop_words):
        text = data.Text(30, stop_words, 0.2)
        source = data.Source(str(tmp_path / "c"))
        return data.cached_index(source, index.folder, text) is not None

    assert is_cached(3)
    assert is_cached(None)
    assert not is_cached(4)


def replace_bytes(path, old, new):
    """Put other bytes into a file, in the place of some that are there once."""
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def change_number(path, change):
    """Change the last number of an .npy file."""
    array = np.load(path)
    array[-1] += change
    np.save(path, array)


DAMAGE = {                      # of an index, by its folder
    "numbers of another type": lambda i: replace_bytes(i / "words.npy", b"<i4", b"<u4"),
    "a file cut": lambda i: os.truncate(i / "names.npy", (i / "names.npy").stat().st_size - 5),
    "a file emptied": lambda i: os.truncate(i / "photo_ends.npy", 0),
    "a file of an older index": lambda i: np.save(i / "word_ends.npy", np.arange(3)),
    "a count changed": lambda i: change_number(i / "photo_ends.npy", -1),
    "facts lost": lambda i: os.remove(i / "index.json"),
    "a fact changed": lambda i: replace_bytes(i / "index.json", b'"captions": 1200',
                                              b'"captions": 1300'),
    "a word changed": lambda i: replace_bytes(i / "index.json", b'"waf"', b'"waz"')}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_index_is_noticed_and_made_again(damage, index, tmp_path, capsys):
    words = words_by_photo(index)
    DAMAGE[damage](tmp_path / "i")
    assert words_by_photo(build(tmp_path)) == words
    assert "is damaged, or of another version: making it again" in capsys.readouterr().err
    assert words_by_photo(build(tmp_path)) == words
    assert capsys.readouterr().err == ""


def test_index_that_was_not_finished_is_made_again(index, tmp_path, capsys):
    words = words_by_photo(index)
    (tmp_path / "i.part").mkdir()
    (tmp_path / "i").rename(tmp_path / "i.part" / "old")            # killed between two renames
    assert words_by_photo(build(tmp_path)) == words
    assert sorted(os.listdir(tmp_path)) == ["c", "i"]
    assert "starting the index again: it was not finished" in capsys.readouterr().err


def test_numbers_out_of_bounds_are_noticed_when_they_are_read(index, tmp_path):
    photos_of_last_word = len(index.photos(29))
    change_number(tmp_path / "i" / "words.npy", 30)
    change_number(tmp_path / "i" / "photos.npy", len(index))
    damaged = data.Index(str(tmp_path / "i"))
    message = f"the index in {tmp_path}/i is damaged; remove that folder, and it is made again"
    with pytest.raises(ValueError, match=message):
        damaged.words(len(index) - 1)
    sampler = data.BatchSampler(damaged, 3, 30 * photos_of_last_word)
    with pytest.raises(ValueError, match=message):
        sampler.batch(0)


@pytest.mark.parametrize("kind, method", [
    (data.Records, "append"), (data.GrowingArray, "append"), (data.GrowingArray, "close")])
def test_failed_index_leaves_nothing_behind(kind, method, tmp_path, monkeypatch):
    write_captions(tmp_path / "c")
    monkeypatch.setattr(kind, method, no_space)
    with pytest.raises(OSError, match="No space"):
        build(tmp_path)
    assert os.listdir(tmp_path) == ["c"]


def test_rare_words_are_pruned_and_frequent_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_COUNTED", 40)
    monkeypatch.setattr(data, "BATCH_CHARACTERS", 3000)
    write_captions(tmp_path / "c")
    index = build(tmp_path, data.Text(5, 0, 0))
    assert index.dictionary == ["waa", "wab", "wac", "wad", "wae"]
    monkeypatch.undo()                          # what was pruned on the way is in the index
    assert words_by_photo(index) == words_by_photo(build(tmp_path, data.Text(5, 0, 0), "2"))


def all_there(batch):
    """Every photo of the batch could be read."""
    return np.ones(len(batch.photos), bool)


def test_words_are_drawn_uniformly_and_so_are_their_photos(index):
    sampler = data.BatchSampler(index, 3, 64)
    words, photos = [], []
    for batch in map(sampler.batch, range(300)):
        words += [word for word, in batch.targets]
        photos += batch.photos
    assert min(photos) >= index.held_out
    assert all(word in index.words(photo) for word, photo in zip(words[:1500], photos))
    words, photos = np.array(words), np.array(photos)
    assert chisquare(np.bincount(words, minlength=30)).pvalue > 1e-3
    times = np.bincount(photos[words == 2], minlength=len(index))
    assert chisquare(times[index.photos(2)]).pvalue > 1e-3


def test_photos_are_drawn_by_image_uniformly_with_all_words(index):
    sampler = data.BatchSampler(index, 3, 64, "image")
    photos = np.concatenate([sampler.batch(step).photos for step in range(200)])
    counts = np.bincount(photos, minlength=len(index))
    assert not counts[:index.held_out].any()
    assert chisquare(counts[index.held_out:]).pvalue > 1e-3
    batch = sampler.batch(0)
    labels = sampler.labels(batch, all_there(batch))
    for photo, row in zip(batch.photos, labels.targets):
        assert row[row >= 0].tolist() == index.words(photo).tolist()
    assert sampler.replacement(batch, 0, 1) is None


def test_row_without_a_photo_weighs_nothing(index):
    sampler = data.BatchSampler(index, 3, 4)
    available = np.array([True, False, False, True])
    labels = sampler.labels(sampler.batch(0), available)
    assert labels.weights.tolist() == [0.5, 0, 0, 0.5]              # a mean over those that count
    labels = sampler.labels(sampler.batch(0), available, counted=8)
    assert labels.weights.tolist() == [0.125, 0, 0, 0.125]          # … of all ranks
    labels = sampler.labels(sampler.batch(0), np.zeros(4, bool))
    assert not labels.weights.any()


def gradient_statistics(index, s, positives, steps=600):
    """The mean and the variance, over many steps, of a batch's gradient by the scores s (N, K)."""
    loss, sampler, gradients = model.Softmax(), data.BatchSampler(index, 3, 64,
                                                                  positives=positives), []
    for step in range(steps):
        batch = sampler.batch(step)
        _, ds = loss(s[batch.photos], sampler.labels(batch, all_there(batch)))
        gradient = np.zeros_like(s)
        np.add.at(gradient, batch.photos, ds)
        gradients.append(gradient)
    return np.mean(gradients, axis=0), np.var(gradients, axis=0).sum()


def test_balanced_positives_have_the_gradient_of_the_drawn_word_on_average(index, rng):
    s = 2 * rng.standard_normal((len(index), 30))
    drawn, variance = gradient_statistics(index, s, "drawn")
    balanced, balanced_variance = gradient_statistics(index, s, "balanced")
    all_alike, _ = gradient_statistics(index, s, "all")
    error = np.sqrt(variance / 600)
    assert np.linalg.norm(balanced - drawn) < 2 * error
    assert np.linalg.norm(all_alike - drawn) > 2 * error
    assert balanced_variance < 0.9 * variance


@pytest.mark.parametrize("sampling, positives", [
    ("class", "drawn"), ("class", "all"), ("class", "balanced"), ("image", "all"),
    ("image", "idf")])
@pytest.mark.parametrize("at_a_time", [data.ROWS_AT_A_TIME, 7])
def test_label_frequency_is_how_often_a_word_is_a_target(
        index, sampling, positives, at_a_time, monkeypatch):
    monkeypatch.setattr(data, "ROWS_AT_A_TIME", at_a_time)
    sampler = data.BatchSampler(data.Index(index.folder), 3, 64, sampling, positives)
    targets = []
    for step in range(400):
        targets += sampler.batch(step).targets
    counts = np.bincount(np.concatenate(targets))
    expected = 400 * 64 * sampler.label_frequency
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("at_a_time", [data.ROWS_AT_A_TIME, 7])
def test_label_weight_is_what_a_word_weighs_in_a_row(index, at_a_time, monkeypatch):
    monkeypatch.setattr(data, "ROWS_AT_A_TIME", at_a_time)
    weights = np.log((index.training + 1) / index.counts)
    by_idf = np.zeros(30)
    balanced = np.zeros(30)
    for photo in range(index.held_out, len(index)):
        words = index.words(photo)
        by_idf[words] += weights[words] / weights[words].sum() / index.training
        shares = 1 / index.counts[words]        # the photo is drawn with a chance ∝ their sum
        balanced[words] += shares.sum() / 30 * shares / shares.sum()
    assert index.label_weight("image", "idf") == pytest.approx(by_idf)
    assert index.label_weight("class", "balanced") == pytest.approx(balanced)
    for sampling, positives in (("image", "all"), ("class", "all"), ("class", "drawn")):
        frequency = index.label_frequency(sampling, positives)
        assert np.array_equal(index.label_weight(sampling, positives), frequency)


def test_idf_gives_a_photos_weight_to_its_rarest_words(index, monkeypatch):
    index.counts[0] = index.training            # a word of every photo
    sampler = data.BatchSampler(index, 3, 64, "image", "idf")
    batch = sampler.batch(0)
    labels = sampler.labels(batch, all_there(batch))
    for words, weights in zip(batch.targets, labels.target_weights):
        weights = weights[:len(words)]
        assert weights.sum() == pytest.approx(1)
        logs = np.log((index.training + 1) / index.counts[words])
        assert weights / weights[-1] == pytest.approx(logs / logs[-1])
    index.counts[:] = index.training            # which no photo is told apart by
    sampler = data.BatchSampler(index, 3, 64, "image", "idf")
    labels = sampler.labels(batch, all_there(batch))
    assert labels.target_weights.sum(axis=1) == pytest.approx(1)


def test_draws_are_a_function_of_seed_step_row_and_attempt(index):
    sampler, wider = data.BatchSampler(index, 3, 64), data.BatchSampler(index, 3, 128)
    batch = sampler.batch(9)
    assert batch.photos == wider.batch(9).photos[:64]
    assert batch.targets == wider.batch(9).targets[:64]
    assert batch.photos != data.BatchSampler(index, 4, 64).batch(9).photos
    assert batch.photos != sampler.batch(10).photos
    photos = [sampler.replacement(batch, 5, attempt) for attempt in range(1, data.ATTEMPTS)]
    assert photos == [wider.replacement(wider.batch(9), 5, attempt) for attempt in range(1, 8)]
    assert len(set(photos)) > 1
    word, = batch.targets[5]
    assert all(word in index.words(photo) for photo in photos)
    assert sampler.replacement(batch, 5, data.ATTEMPTS) is None


@pytest.mark.parametrize("sampling", ["class", "image"])
def test_steps_may_be_asked_for_in_any_order(sampling, index):
    """Steps are drawn many at a time, and kept; which are kept changes nothing."""
    sampler = data.BatchSampler(index, 3, 16, sampling, spare=9)
    for step in (0, 1, data.STEPS_AHEAD - 1, data.STEPS_AHEAD, 5000, 2):
        alone = data.BatchSampler(index, 3, 16, sampling, spare=9).batch(step)
        batch = sampler.batch(step)
        assert batch.photos == alone.photos
        assert batch.top.tolist() == alone.top.tolist()


@pytest.mark.parametrize("sampling", ["class", "image"])
def test_crops_are_random_or_central(sampling, index):
    batch = data.BatchSampler(index, 3, 500, sampling, spare=3).batch(0)
    for values, most in ((batch.top, 3), (batch.left, 3), (batch.flip, 1)):
        assert chisquare(np.bincount(values, minlength=most + 1)).pvalue > 1e-3
    assert np.corrcoef([batch.top, batch.left, batch.flip])[0, 1:] == pytest.approx(0, abs=0.2)
    batch = data.BatchSampler(index, 3, 5, sampling, spare=3, random_crops=False).batch(0)
    assert batch.top.tolist() == batch.left.tolist() == [1] * 5
    assert not batch.flip.any()


@pytest.mark.parametrize("sampling", ["class", "image"])
@pytest.mark.parametrize("targets", ["all", "batch", "sampled"])
def test_ranks_rows_are_those_of_the_whole_batch(sampling, targets, index):
    whole = data.BatchSampler(index, 3, 10, sampling, spare=8)
    last = data.BatchSampler(index, 3, 10, sampling, spare=8, rows=slice(3, 10))
    batch, mine = whole.batch(9), last.batch(9)
    assert mine.photos == batch.photos[3:]
    for values, expected in ((mine.top, batch.top), (mine.left, batch.left),
                             (mine.flip, batch.flip)):
        assert values.tolist() == expected[3:].tolist()
    labels = whole.labels(batch, all_there(batch), targets, 7)
    my_labels = last.labels(mine, all_there(mine), targets, 7, counted=10)
    assert my_labels.weights.tolist() == labels.weights[3:].tolist()
    width = my_labels.targets.shape[1]
    assert my_labels.targets.tolist() == labels.targets[3:, :width].tolist()
    assert (labels.targets[3:, width:] == -1).all()
    if targets != "all":
        assert my_labels.classes.tolist() == labels.classes.tolist()
        assert (my_labels.inclusion_probability.tolist()
                == labels.inclusion_probability.tolist())
    assert last.replacement(mine, 2, 1) == whole.replacement(batch, 5, 1)


@pytest.mark.parametrize("sampling", ["class", "image"])
@pytest.mark.parametrize("negatives, spread", [(0, 0.35), (7, 0.2), (99, 0.2)])
def test_inclusion_probability_is_how_often_a_class_is_there(index, sampling, negatives, spread):
    sampler = data.BatchSampler(index, 3, 6, sampling)
    weight, not_carried = np.zeros(30), np.zeros(30)
    for step in range(1500):
        batch = sampler.batch(step)
        labels = sampler.labels(batch, all_there(batch), "sampled", negatives)
        mine = batch.targets[0]
        not_carried[np.setdiff1d(np.arange(30), mine)] += 1
        others = ~np.isin(labels.classes, mine)
        weight[labels.classes[others]] += 1 / labels.inclusion_probability[others]
    assert weight / not_carried == pytest.approx(1, abs=spread)
    assert np.mean(weight / not_carried) == pytest.approx(1, abs=0.02)
    if negatives == 99:                         # more than there are: all words are scored
        assert labels.classes.tolist() == list(range(30))
        assert (labels.inclusion_probability == 1).all()


@pytest.mark.parametrize("targets", ["batch", "sampled"])
def test_targets_are_columns_of_the_classes_that_are_scored(targets, index):
    sampler = data.BatchSampler(index, 3, 6, "image")
    batch = sampler.batch(0)
    labels = sampler.labels(batch, all_there(batch), targets, 7)
    for row, words in zip(labels.targets, batch.targets):
        assert labels.classes[row[row >= 0]].tolist() == words.tolist()
    carried = set(np.concatenate(batch.targets).tolist())
    assert carried <= set(labels.classes.tolist())
    assert (len(labels.classes) > len(carried)) == (targets == "sampled")


def test_sampled_softmax_approaches_the_full_one(index, rng):
    s, loss = rng.standard_normal((16, 30)), model.Softmax()
    sampler = data.BatchSampler(index, 5, 16)

    def error(negatives):
        """By how much the sampled loss differs, on average over steps."""
        differences = []
        for step in range(400):
            batch = sampler.batch(step)
            labels = sampler.labels(batch, all_there(batch), "sampled", negatives)
            sampled, _ = loss(s[:, labels.classes], labels)
            full, _ = loss(s, sampler.labels(batch, all_there(batch)))
            differences.append(sampled.sum() - full.sum())
        return abs(np.mean(differences))

    errors = [error(negatives) for negatives in (0, 5, 15, 30)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.03
    assert errors[3] < 1e-12


def test_captions_for_controls_change_only_what_they_say(tmp_path):
    """Noise keeps every word as often, and no photo has two languages."""
    rng = np.random.default_rng(0)
    words = [f"word{letter}" for letter in "abcdefghij"]
    pairs = [(f"{n // 2}.jpg", " ".join(rng.choice(words, 5))) for n in range(400)]
    path = tmp_path / "captions.tsv"
    captions.write_pairs(str(path), pairs)

    def make(*arguments):
        out = tmp_path / "out.tsv"
        captions.main([*map(str, arguments), str(out)])
        return captions.read_pairs(str(out))

    def count(some):
        return Counter(word for _, caption in some for word in caption.split())

    assert make("noise", 0, path) == pairs
    noisy = make("noise", 0.5, path)
    before = " ".join(caption for _, caption in pairs).split()
    after = " ".join(caption for _, caption in noisy).split()
    moved = np.mean([a != b for a, b in zip(before, after)])
    assert count(noisy) == count(pairs)
    assert 0.35 < moved < 0.55                  # a tenth of the moved words meet themselves
    shuffled = dict(make("shuffle", path))
    assert sorted(shuffled.values()) == sorted(dict(pairs).values())
    assert np.mean([shuffled[name] == caption for name, caption in dict(pairs).items()]) < 0.1

    french = [(name, caption.upper()) for name, caption in pairs]
    captions.write_pairs(str(tmp_path / "french.tsv"), french)
    apart = make("apart", path, tmp_path / "french.tsv")
    languages = {name: {c.isupper() for n, c in apart if n == name} for name, _ in pairs}
    assert all(len(which) == 1 for which in languages.values())
    assert 70 < sum(True in which for which in languages.values()) < 130


# ---------------------------------------------------------------------------------- photos

def write(folder, *names, **contents):
    """Files below the folder: of an x, and with contents."""
    for name, content in {**dict.fromkeys(names, "x"), **contents}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


FOLDERS = {                     # files, the words of the photos, and what is said of their origin
    "folders": (
        ["cats/a.jpg", "hot_dogs/b.jpg", "c.png", "hot_dogs/b.xml"],
        {"cats/a.jpg": "cats", "hot_dogs/b.jpg": "dogs hot"},
        "words from the names of folders: cats, hot_dogs; not read: 1 .xml"),
    "numbers": (["0/a.jpg", "1/b.jpg", "2014-05/c.jpg"],
                {"0/a.jpg": "0", "1/b.jpg": "1", "2014-05/c.jpg": "2014-05"},
                "folders: 0, 1, 2014-05"),
    "names that differ by a number": (
        ["cluster_1/a.jpg", "cluster_2/b.jpg", "Cat 3/c.jpg"],
        {"cluster_1/a.jpg": "1 cluster", "cluster_2/b.jpg": "2 cluster", "Cat 3/c.jpg": "3 cat"},
        "folders: Cat 3, cluster_1, cluster_2"),
    "train and test": (["train/cats/a.jpg", "val/cats/b.jpg", "Test2014/dogs/c.jpg"],
                       {"train/cats/a.jpg": "cats", "val/cats/b.jpg": "cats",
                        "Test2014/dogs/c.jpg": "dogs"}, "folders: cats, dogs"),
    "parts within classes": (["cats/train/a.jpg", "cats/test/b.jpg"],
                             {"cats/train/a.jpg": "cats", "cats/test/b.jpg": "cats"}, "cats"),
    "a class of trains": (["train/a.jpg", "bus/b.jpg"],
                          {"train/a.jpg": "train", "bus/b.jpg": "bus"}, "bus, train"),
    "parts, and a photo beside": (["train/cats/a.jpg", "test/cats/b.jpg", "x.jpg", "figures/y.jpg"],
                                  {"train/cats/a.jpg": "cats", "test/cats/b.jpg": "cats",
                                   "figures/y.jpg": "figures"}, "cats, figures"),
    "texts": ({"cats/a.jpg": "", "cats/b.jpg": "", "cats/a.txt": "a red\nball", "c.md": ""},
              {"cats/a.jpg": "a ball red"},
              "words from 1 photo.txt for 2 photos; not read: the folders' names (cats), 1 .md"),
    "texts of kohya": ({"10_x/a.jpg": "", "10_x/a.caption": "blue"}, {"10_x/a.jpg": "blue"},
                       "1 photo.caption for 1 photos"),
    "texts of img2dataset": (
        {"a.jpg": "", "a.json": '{"caption": "one"}', "a.txt": "two", "b.jpg": "",
         "b.json": '{"caption": "three", "url": "u"}', "c.jpg": "", "c.jpg.txt": "four"},
        {"a.jpg": "two", "b.jpg": "three", "c.jpg": "four"},
        "words from 2 photo.txt and 1 photo.json for 3 photos; not read: 1 .json"),
    "json of labelling": ({"cats/a.jpg": "", "cats/a.json": '{"shapes": []}'},
                          {"cats/a.jpg": "cats"}, "folders: cats; not read: 1 .json"),
    "metadata": (
        {"train/a.jpg": "", "train/metadata.csv": "file_name,text\na.jpg,one\n", "test/a.jpg": "",
         "test/metadata.jsonl": '{"file_name": "a.jpg", "text": "two"}\n5\n'},
        {"train/a.jpg": "one", "test/a.jpg": "two"},
        "words from test/metadata.jsonl, train/metadata.csv"),
    "encodings": ({"a.jpg": "", "a.txt": "é".encode("utf-16"), "b.jpg": "", "b.txt": b"caf\xe9"},
                  {"a.jpg": "e", "b.jpg": "cafe"}, "2 photo.txt"),
    "blanks": ({" a.jpg": "", " a.txt": "one", "b#1.jpg": "", "b#1.txt": "two"},
               {" a.jpg": "one", "b#1.jpg": "two"}, "2 photo.txt"),
    "files of others": (
        ["cats/a.jpg", "cats/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/b.jpg", ".x/c.jpg",
         "runs/1/run.lock", "runs/1/curves.png", "runs/1/x/d.jpg", "old/model.npz", "old/words.txt",
         "old/curves.png"], {"cats/a.jpg": "cats"}, "folders: cats")}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_its_own_captions(name, tmp_path):
    files, words, origin = FOLDERS[name]
    write(tmp_path / "f", **(files if isinstance(files, dict) else dict.fromkeys(files, "")))
    index = build(tmp_path, data.Text(99, None, 0), captions="f")
    found = {photo: " ".join(sorted(words)) for photo, words in words_by_photo(index).items()}
    assert found == words
    assert origin in index.facts["origin"]
    for photo in words:                         # as it is called
        assert os.path.exists(data.Folder(str(tmp_path / "f")).find(photo))


def test_bad_lines_of_metadata_are_counted(tmp_path):
    write(tmp_path / "f", "a.jpg", **{"metadata.csv": "file_name,text\na.jpg,caf\xe9\nb.jpg\n"})
    (tmp_path / "f" / "metadata.csv").write_bytes(b"file_name,text\na.jpg,caf\xe9\nb.jpg\n")
    index = build(tmp_path, data.Text(99, 0, 0), captions="f")
    assert index.facts["bad_lines"] == 1
    assert index.facts["recoded"] == 1


def test_folders_names_are_no_stop_words_unless_asked(tmp_path):
    write(tmp_path / "f", *(f"{letter}{letter}/{i}.jpg" for letter in "abcdefghijklmnopqrstuvwxyz"
                            for i in range(1 + 9 * (letter == "c"))))
    assert len(build(tmp_path, data.Text(99, None, 0), captions="f").dictionary) == 26
    assert "cc" not in build(tmp_path, data.Text(99, 1, 0), captions="f").dictionary


@pytest.mark.parametrize("files, complaint", [
    (["a.jpg", "b.jpg", "metadata.parquet"],
     "not read: 1 .parquet; it needs photo.txt beside photo.jpg, or photos in folders"),
    ({"a.jpg": "", "metadata.csv": "file_name,label\na.jpg,cat\n"},
     "has the columns file_name, label, and needs .* --text-column"),
    (["train/a.jpg", "val/a.jpg"], "it needs photo.txt beside"),
    (["a.txt"], "there is no picture")])
def test_folder_without_words_says_what_it_needs(files, complaint, tmp_path):
    write(tmp_path / "f", **(files if isinstance(files, dict) else dict.fromkeys(files, "")))
    with pytest.raises(ValueError, match=f"^captions: [^\n]*{complaint}"):
        build(tmp_path, captions="f")


def test_folder_of_links_says_so(tmp_path):
    write(tmp_path / "away", "cats/a.jpg")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "cats").symlink_to(tmp_path / "away" / "cats")
    with pytest.raises(ValueError, match="links to folders, as cats, are not followed"):
        data.list_photos(str(tmp_path / "f"))


def test_words_that_all_photos_have_are_told(tmp_path, capsys):
    (tmp_path / "c").write_text("a.jpg\tx\nb.jpg\tx\n")
    weak.describe_index(build(tmp_path, data.Text(9, 0, 0)))
    assert "all photos have the same words" in capsys.readouterr().out


def test_absolute_names_below_the_images_are_names_there(tmp_path):
    write(tmp_path / "f", "sub/a.jpg")
    (tmp_path / "c").write_text(f"{tmp_path}/f/sub/a.jpg\tone\n{tmp_path}/g/a.jpg\ttwo\n")
    source = data.Source(str(tmp_path / "c"), images=str(tmp_path / "f"))
    index = data.build_index(source, str(tmp_path / "i"), data.Text(9, 0, 0))
    assert words_by_photo(index) == {"sub/a.jpg": ["one"]}
    assert index.facts["refused_names"] == [f"{tmp_path}/g/a.jpg"]
    other = source._replace(images=str(tmp_path / "g"))             # other names are there
    assert data.cached_index(source, index.folder, data.Text(9, 0, 0)) is not None
    assert data.cached_index(other, index.folder, data.Text(9, 0, 0)) is None


def test_words_that_were_left_out_as_stop_words_are_known(tmp_path):
    write_captions(tmp_path / "c")
    index = build(tmp_path, data.Text(30, 5, 0.2))
    assert data.stop_words(index.folder) == ["waa", "wab", "wac", "wad", "wae"]
    assert data.stop_words(str(tmp_path)) == []


BUILD_IN_TURN = """
import data, json, sys
folder, first = sys.argv[1:]
found = []
for i in range(12):
    seed = (i + int(first)) % 4
    source = data.Source(f"{folder}/c{seed}")
    index = data.build_index(source, f"{folder}/i", data.Text(30, 5, 0.2))
    names = [index.name(photo) for photo in range(len(index))]
    found.append((seed, names, [index.words(photo).tolist() for photo in range(len(index))]))
print(json.dumps(found))
"""


def test_several_that_build_an_index_at_one_place_wait_for_each_other(tmp_path):
    expected = []
    for seed in range(4):
        write_captions(tmp_path / f"c{seed}", seed=seed)
        index = build(tmp_path, name="alone", captions=f"c{seed}")
        expected.append([[index.name(photo) for photo in range(len(index))],
                         [index.words(photo).tolist() for photo in range(len(index))]])
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda first: run(tmp_path, first, code=BUILD_IN_TURN), range(3))
    for done in results:
        assert "damaged" not in done.stderr
        for seed, *found in json.loads(done.stdout):
            assert found == expected[seed]


CODE = "0f1e2d3c" * 4               # a photo's hash
LISTED = f"{CODE}/1234567.jpg"


@pytest.mark.parametrize("name, place", [
    (LISTED, LISTED), (LISTED, "1234567.jpg"), (LISTED, "123/456/1234567.jpg"),
    (LISTED, "part 2/x/1234567.jpg"), (LISTED, f"0f1/e2d/{CODE}.jpg"), ("A.JPG", "sub/a.jpg"),
    ("SUB/A.jpg", "sub/a.jpg"), ("sub\\a.jpg", "sub/a.jpg"), ("a", "sub/a.jpg"),
    ("sub/a", "sub/a.jpg"), ("sub/a.png", "sub/a.jpg"), ("a.png", "a.jpg"),
    ("photos/a.jpg", "a.jpg"), ("photos/sub/a.jpg", "sub/a.jpg"), ("sub/a.jpg", "x/sub/a.jpg"),
    ("http://x.org/sub/a.jpg", "sub/a.jpg"), ("my%20a.jpg", "my a.jpg"), ("50%.jpg", "50%.jpg"),
    ("u\u0308.jpg", "sub/ü.jpg")])
def test_photos_are_found_in_sub_folders_and_by_nearly_their_names(name, place, tmp_path):
    write(tmp_path, place, "sub/a.txt", "sub/b.jpg", "1/12345678.jpg")
    folder = data.Folder(str(tmp_path))
    assert folder.find(name) == str(tmp_path / place)
    missing = "0" * 32 + "/5.jpg"
    assert folder.find(missing) == str(tmp_path / missing)


@pytest.mark.parametrize("name, places", [
    ("cats/4.jpg", ["dogs/4.jpg"]),                                 # missing where it should be
    ("cats/4.jpg", ["4.png", "x/4.jpg", "x/cats/5.jpg"]),
    ("empty/4.jpg", ["4.jpg"]), ("gone/4.jpg", ["cats/4.jpg"]),     # of another class
    ("p.jpg", ["masks/p.png"]), ("images/p.jpg", ["masks/p.jpg", "masks/p.png"]),
    ("cats/4.jpg", ["cats/4.txt", "cats/4.xml"])])
def test_no_other_photo_stands_in_for_one_that_is_missing(name, places, tmp_path):
    write(tmp_path, "cats/5.jpg", "images/q.jpg", *places)
    (tmp_path / "empty").mkdir()
    folder = data.Folder(str(tmp_path))
    assert folder.candidates(name) == []
    assert folder.find(name) == str(tmp_path / name)


@pytest.mark.parametrize("name, places", [
    ("4.jpg", ["cats/4.jpg", "dogs/4.jpg"]), ("p", ["images/p.jpg", "masks/p.png"]),
    ("images/p", ["images/p.jpg", "images/p.png"]), ("a/4.jpg", ["x/a/4.jpg", "y/a/4.jpg"])])
def test_name_of_several_files_is_of_none(name, places, tmp_path):
    write(tmp_path, *places)
    folder = data.Folder(str(tmp_path))
    assert folder.candidates(name) == [str(tmp_path / place) for place in places]
    assert not os.path.exists(folder.find(name))
    with pytest.raises(ValueError, match=f"several files are called so: .*{places[0]}"):
        folder.read(name)


NAMES_CHECKED = {               # captions' names, files, and what is said; ValueError if it is all
    "missing": (["cats/1.jpg", "cats/2.jpg"], ["cats/1.jpg", "dogs/2.jpg"],
                "photos: 1 of 2 are not there, e.g. cats/2.jpg"),
    "elsewhere": (["1.jpg", "2.jpg"], ["1.jpg", "x/2.jpg"],
                  "photos: 1 of 2 have another name or place, e.g. 2.jpg is x/2.jpg"),
    "several": (["1.jpg", "2.jpg"], ["1.jpg", "x/2.jpg", "y/2.jpg"],
                "1 of 2 may be several files each, e.g. 2.jpg is x/2.jpg or y/2.jpg; write"),
    "links": (["1.jpg", "out.jpg"], ["1.jpg"],
              "1 of 2 are links that lead out of --images, e.g. out.jpg"),
    "none": (["1.jpg"], ["x.png"], "none of the .* which has out.jpg: 1 of 1 are not there, e.g. "
             "1.jpg; check --images"),
    "all several": (["1.jpg"], ["x/1.jpg", "y/1.jpg"], "none of .* narrow --images"),
    "all links": (["out.jpg"], [], "none of .*; give the folder above")}


@pytest.mark.parametrize("case", NAMES_CHECKED)
def test_names_are_checked_before_training(case, tmp_path, capsys):
    names, files, line = NAMES_CHECKED[case]
    write(tmp_path, "away.jpg", *(f"f/{name}" for name in files))
    (tmp_path / "f").mkdir(exist_ok=True)
    (tmp_path / "f" / "out.jpg").symlink_to(tmp_path / "away.jpg")
    (tmp_path / "c").write_text("".join(f"{name}\tx\n" for name in names))
    index = build(tmp_path, data.Text(9, 0, 0))
    if line.startswith("none"):
        with pytest.raises(ValueError, match=line):
            data.check_photos(str(tmp_path / "f"), index)
    else:
        data.check_photos(str(tmp_path / "f"), index)
        assert line in capsys.readouterr().out


def test_all_names_are_checked_but_in_a_folder_of_too_many_files(
        index, tmp_path, capsys, monkeypatch):
    names = [index.name(i) for i in range(len(index))]
    write(tmp_path / "f", *names[:-1])
    data.check_photos(str(tmp_path / "f"), index)
    assert capsys.readouterr().out == (
        f"photos: 1 of {len(names)} are not there, e.g. {names[-1]}\n")
    monkeypatch.setattr(data, "MOST_FILES", 50)
    monkeypatch.setattr(data, "CHECKED", 10)
    data.check_photos(str(tmp_path / "f"), index)
    assert capsys.readouterr().out == (
        f"photos: {tmp_path}/f has more than 50 files: 10 names are checked\n")


def test_names_are_bytes_whatever_the_locale(tmp_path):
    write(tmp_path / "f", "ü.jpg", **{"ü.txt": "a ball"})
    (tmp_path / "c").write_text("ü.jpg\tred\n", "utf-8")
    code = f"""
import data
for source in "c", "f":
    index = data.build_index(data.Source({str(tmp_path)!r} + "/" + source), "i", data.Text(9, 0, 0))
    assert data.Folder({str(tmp_path / "f")!r}).read(index.name(0)) == b"x"
"""
    code = f"import os; os.chdir({str(tmp_path)!r})\n" + code
    done = subprocess.run([sys.executable, "-c", IMPORTING + code], capture_output=True, text=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0",
                               "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0, done.stderr


@pytest.fixture
def linked(tmp_path):
    """A folder of photos with links, within it, out of it and to themselves."""
    folder = tmp_path / "in"
    write(tmp_path, "in/ab/abc.jpg", "x.jpg", "in/ef/.hidden.jpg", "away/far.jpg")
    for name in "in/ab/abc.jpg", "x.jpg":
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    for name, target in {"loop": folder, "link": tmp_path / "away", "out.jpg": tmp_path / "x.jpg",
                         "same.jpg": "ab/abc.jpg", "loop.jpg": "loop.jpg"}.items():
        (folder / name).symlink_to(target)
    return folder


def test_photos_outside_the_folder_are_never_read(linked):
    names = data.list_photos(linked)
    assert names == ["ab/abc.jpg", "loop.jpg", "out.jpg", "same.jpg"]
    with data.Loader(str(linked), names.__getitem__, 9, 8) as loader:
        (numbers, _), = loader.read(range(4))
    assert [names[i] for i in numbers] == ["ab/abc.jpg", "same.jpg"]
    assert set(loader.skipped) == {"loop.jpg", "out.jpg"}
    assert "a link that leads out" in loader.skipped["out.jpg"]


@pytest.mark.parametrize("name", ["x.jpg", "far.jpg", ".hidden.jpg"])
def test_files_outside_the_folder_are_not_found(name, linked):
    assert not os.path.exists(data.Folder(str(linked)).find(name))


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "..\\x.jpg", "/x.jpg", "\\x.jpg"])
def test_names_that_lead_out_of_the_folder_are_refused(name, linked):
    assert data.refused(name)
    assert not os.path.exists(data.Folder(str(linked)).find(name))


def numbers_read(loader, photos):
    """The numbers of the photos that a loader reads."""
    numbers = []
    for some, _ in loader.read(photos):
        numbers += some.tolist()
    return numbers


def test_broken_photo_is_read_once_and_one_that_is_unavailable_again(tmp_path, monkeypatch):
    write(tmp_path, "broken.jpg", "large.jpg")
    os.truncate(tmp_path / "large.jpg", data.LARGEST + 1)
    names, seen, read_photo = ["broken.jpg", "gone.jpg", "large.jpg"], [], data.read_photo

    def spy(path, check):
        seen.append(os.path.basename(path))
        return read_photo(path, check)

    monkeypatch.setattr(data, "read_photo", spy)
    with data.Loader(str(tmp_path), names.__getitem__, 3, 8) as loader:
        assert numbers_read(loader, [0, 1, 2]) == []
        assert "too large" in loader.skipped["large.jpg"]
        Image.new("RGB", (9, 9)).save(tmp_path / "gone.jpg")
        assert numbers_read(loader, [0, 1, 2]) == [1]
        assert set(loader.skipped) == {"broken.jpg", "large.jpg"}
    assert seen == ["broken.jpg", "gone.jpg", "large.jpg", "gone.jpg"]


def test_disk_that_fails_at_a_link_makes_a_photo_unavailable(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    with data.Loader(str(tmp_path), ["a.jpg"].__getitem__, 1, 8) as loader:
        with monkeypatch.context() as patch:
            patch.setattr(os.path, "realpath", Mock(side_effect=OSError(errno.EIO, "I/O error")))
            assert numbers_read(loader, [0]) == []
        assert loader.skipped == {"a.jpg": "i/o error"}
        assert numbers_read(loader, [0]) == [0]
        assert loader.skipped == {}


def test_link_that_changes_while_it_is_read_is_noticed(linked, monkeypatch):
    """It is checked when it is open already: what is read then is what was checked."""
    realpath = os.path.realpath
    link = linked / "out.jpg"                   # to a photo outside

    def change_and_follow(path):
        if path == str(link):
            link.unlink()
            link.symlink_to("ab/abc.jpg")
        return realpath(path)

    folder = data.Folder(str(linked))
    monkeypatch.setattr(os.path, "realpath", change_and_follow)
    with pytest.raises(ValueError, match="a link that leads out"):
        folder.read("out.jpg")


@pytest.fixture
def odd_photos(tmp_path, rng):
    """{name: what is wrong with it, or None} of photos of every kind in tmp_path."""
    rgb = Image.fromarray(rng.integers(0, 256, (50, 70, 3)).astype(np.uint8))
    rgb.save(tmp_path / "good.jpg")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for mode in ("P", "RGBA", "LA", "1"):
        rgb.convert(mode).save(tmp_path / f"{mode}.png")
    for ending in ("gif", "webp", "bmp", "tif", "ppm"):
        rgb.save(tmp_path / f"rgb.{ending}")
    Image.fromarray(rng.integers(0, 65536, (40, 30)).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    Image.new("RGB", (20_000, 3), "red").save(tmp_path / "wide.png")
    whole = (tmp_path / "good.jpg").read_bytes()
    write(tmp_path, **{
        "späce name ☃.jpg": whole, "cut.jpg": whole[:len(whole) // 2], "empty.jpg": b"",
        "text.jpg": "broken image", "noise.jpg": b"\xff\xd8\xff" + rng.bytes(500)})
    (tmp_path / "folder.jpg").mkdir()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    return {
        **dict.fromkeys(os.listdir(tmp_path)), "cut.jpg": "truncated", "empty.jpg": "zero bytes",
        "text.jpg": "not a picture", "folder.jpg": "not a file", "bomb.png": "pixels",
        "noise.jpg": ".", "missing.jpg": "no such file"}


def test_every_kind_of_photo_is_decoded_or_named(odd_photos, tmp_path):
    for name, wrong in odd_photos.items():
        if wrong is None:
            pixels = data.decode(str(tmp_path / name), 32)
            assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
        else:
            with pytest.raises(ValueError, match=wrong):
                data.decode(str(tmp_path / name), 32)


def test_loader_skips_what_cannot_be_decoded(odd_photos, tmp_path):
    names = list(odd_photos)
    with data.Loader(str(tmp_path), names.__getitem__, len(names), 16, 2) as loader:
        numbers = numbers_read(loader, range(len(names)))
    assert [names[i] for i in numbers] == [name for name in names if odd_photos[name] is None]
    assert set(loader.skipped) == {name for name in names if odd_photos[name]}


def shades(low, high):
    """Pixels (20, 30) that grow from left to right."""
    return np.tile(np.linspace(low, high, 30), (20, 1))


@pytest.mark.parametrize("pixels", [
    shades(0, 65535).astype(np.uint16), shades(0, 4095).astype(np.uint16),
    shades(0, 255).astype(np.uint16), shades(0, 1023).astype(np.int32),
    shades(0, 255).astype(np.int32),
    shades(0, 1).astype(np.float32), shades(0, 255).astype(np.float32),
    shades(0, 3e30).astype(np.float32), shades(0, 1e-20).astype(np.float32),
    np.where(np.eye(20, 30) * np.arange(30) == 7, np.inf, shades(0, 1)).astype(np.float32),
    np.where(np.eye(20, 30) * np.arange(30) == 7, np.nan, shades(0, 1)).astype(np.float32)],
    ids=["16 bits", "12 of 16", "8 of 16", "10 of 32", "8 of 32", "to 1", "to 255", "to 3e30",
         "to 1e-20", "infinite pixel", "no number"])
def test_deep_photos_are_scaled_by_what_is_in_them(pixels, tmp_path):
    path = str(tmp_path / "x.tif")
    Image.fromarray(pixels).save(path)
    row = data.decode(path, 16)[12, :, 0].astype(int)
    assert (np.diff(row) > 0).all()
    assert row[0] < 10 and row[-1] > 245


def png_of_16_bits(pixels):
    """A PNG of colours, and perhaps alpha, of 16 bits (H, W, 3 or 4), which Pillow cannot write."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, chunk in (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""):
        checksum = zlib.crc32(kind + chunk)
        content += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", checksum)
    return content


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_deep_colours_are_scaled_by_what_is_in_them(bits, channels, tmp_path):
    gray = shades(0, 2 ** bits - 1).astype(int)
    pixels = np.stack([gray, gray // 2, 0 * gray, 0 * gray + 65535][:channels], axis=2)
    (tmp_path / "x.png").write_bytes(png_of_16_bits(pixels))
    row = data.decode(str(tmp_path / "x.png"), 16)[8].astype(int)
    assert (np.diff(row[:, 0]) > 0).all() and row[-1, 0] > 245
    assert np.abs(row[:, 1] - row[:, 0] / 2).max() < 2 and row[:, 2].max() == 0


def test_one_bright_pixel_does_not_darken_a_deep_photo(tmp_path):
    pixels = np.tile(np.linspace(0, 4095, 60), (60, 1)).astype(np.uint16)
    pixels[30, 30] = 65535
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert data.decode(str(tmp_path / "x.png"), 16).max() > 245


def exif_that_cannot_be_written():
    """EXIF of a photo on its side, with a resolution that is no number."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011a] = 72.0
    content = bytearray(exif.tobytes())
    resolution = content.rindex(bytes([0, 0, 0, 72, 0, 0, 0, 1]))
    content[resolution:resolution + 8] = bytes([255, 255, 255, 255, 0, 0, 0, 0])
    return bytes(content)


def save_png_with_long_text(path, photo):
    """A PNG with a text of 3 MB."""
    text = PngImagePlugin.PngInfo()
    text.add_text("history", "x" * 3_000_000, zip=True)
    photo.save(path, pnginfo=text)


GOOD = {                        # photos that every viewer shows: how they are made of a square
    "turned.jpg": lambda path, photo: photo.rotate(90).save(
        path, exif=exif_that_cannot_be_written(), quality=95),
    "text.png": save_png_with_long_text,
    "avif.jpg": lambda path, photo: photo.save(path, "AVIF"),
    "jpeg2000.jpg": lambda path, photo: photo.save(path, "JPEG2000"),
    "no end.jpg": lambda path, photo: save_cut(path, photo, 2),
    "half an end.jpg": lambda path, photo: save_cut(path, photo, 1),
    "no end, progressive.jpg": lambda path, photo: save_cut(path, photo, 2, progressive=True)}


def save_cut(path, photo, missing, **how):
    """A JPEG without its last bytes."""
    photo.save(path, quality=95, **how)
    os.truncate(path, os.path.getsize(path) - missing)


@pytest.fixture
def quarters():
    """A photo whose quarters have different colours."""
    photo = Image.new("RGB", (64, 64), "black")
    for place, colour in (((32, 0), "red"), ((0, 32), "lime"), ((32, 32), "white")):
        photo.paste(colour, (*place, place[0] + 32, place[1] + 32))
    return photo


@pytest.mark.parametrize("name", GOOD)
def test_photos_that_every_viewer_shows_are_used(name, quarters, tmp_path):
    try:
        GOOD[name](tmp_path / name, quarters)
    except (KeyError, OSError):
        pytest.skip("this Pillow cannot write such")
    pixels = data.decode(str(tmp_path / name), 16).astype(int)
    for row, column in (3, 3), (3, 12), (12, 3), (12, 12):
        colour = quarters.getpixel((4 * column, 4 * row))
        assert np.abs(pixels[row, column] - colour).max() < 12


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("how", [{}, {"progressive": True}])
def test_jpeg_that_lacks_more_than_its_end_is_named(part, how, tmp_path, rng):
    path = tmp_path / "x.jpg"
    Image.fromarray(rng.integers(0, 256, (90, 90, 3)).astype(np.uint8)).save(path, **how)
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(ValueError, match="truncated"):
        data.decode(str(path), 32)


@pytest.mark.parametrize("kind", ["x.heic", "x.mp4"])
def test_kind_that_is_not_read_is_named(kind, tmp_path):
    (tmp_path / kind).write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    with pytest.raises(ValueError, match="of the kind heic, which is not read; make it a JPEG"):
        data.decode(str(tmp_path / kind), 32)


@pytest.mark.parametrize("size", [(2000, 3), (3, 2000), (1, 1), (40_000, 1)])
@pytest.mark.parametrize("square", [True, False])
def test_thin_photo_has_at_least_one_pixel(size, square, tmp_path):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    pixels = data.decode(str(tmp_path / "x.png"), 32, square)
    assert pixels.min(axis=(0, 1)).tolist() == [255, 0, 0]
    assert max(pixels.shape) == 32


PEAK_OF_DECODING = """
import sys
import data
for path in sys.argv[1:]:
    try:
        data.decode(path, 256)
        print("read")
    except ValueError as error:
        print(error)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024)
"""


def peak_of_decoding(*paths):
    """What is said of each photo, and how many megabytes a process that decodes them takes."""
    *lines, megabytes = run(*paths, code=PEAK_OF_DECODING).stdout.splitlines()
    return lines, float(megabytes) - 100        # of Python with NumPy and Pillow


@pytest.mark.parametrize("mode, size, ending", [
    ("RGB", (16320, 12240), "jpg"), ("I;16", (13_000, 13_000), "png"), ("F", (7000, 7000), "tif"),
    ("RGBA", (7000, 7000), "png"), ("P", (7000, 7000), "png"), ("L", (15_000, 15_000), "png"),
    ("1", (14_000, 13_000), "tif")],
    ids=["JPEG of a phone", "16 bits", "floats", "RGBA", "palette", "gray", "fax"])
def test_no_photo_takes_more_than_500_megabytes(mode, size, ending, tmp_path):
    path = str(tmp_path / f"x.{ending}")
    how = {"compression": "tiff_lzw"} if ending == "tif" else {}
    make = f"from PIL import Image; Image.new({mode!r}, {size}).save({path!r}, **{how})"
    subprocess.run([sys.executable, "-c", make], check=True)
    lines, megabytes = peak_of_decoding(path)
    assert lines == ["read"]
    assert megabytes < 500


def enlarge(path, kind, width, height):
    """Let the header of a photo of 64×48 pixels say that it is larger."""
    if kind == "JPEG":
        replace_bytes(path, struct.pack(">HH", 48, 64), struct.pack(">HH", height, width))
    elif kind == "WEBP":
        replace_bytes(path, struct.pack("<HH", 64, 48), struct.pack("<HH", width, height))
    elif kind == "TIFF":                        # an entry is tag, type, 1, number
        for tag, old, new in ((256, 64, width), (257, 48, height)):
            replace_bytes(path, struct.pack("<HHII", tag, 3, 1, old),
                          struct.pack("<HHII", tag, 3, 1, new))
    else:                                       # a PNG, whose header has a checksum
        header = path.read_bytes()[12:33]
        larger = b"IHDR" + struct.pack(">II", width, height) + header[12:17]
        replace_bytes(path, header, larger + struct.pack(">I", zlib.crc32(larger)))


def test_photos_that_would_take_more_are_refused_by_their_headers(tmp_path):
    photos = [("RGB", (16320, 12240), "JPEG", {"progressive": True}),
              ("RGB", (16_000, 12_000), "WEBP", {}), ("RGBA", (9000, 9000), "PNG", {}),
              ("F", (13_000, 13_000), "TIFF", {"compression": "tiff_lzw"}),
              ("1", (20_000, 20_000), "PNG", {})]
    paths = [tmp_path / str(i) for i in range(len(photos))]
    for path, (mode, size, kind, how) in zip(paths, photos):
        Image.new(mode, (64, 48)).save(path, kind, **how)
        enlarge(path, kind, *size)
    lines, megabytes = peak_of_decoding(*paths)
    for (mode, (width, height), kind, _), line in zip(photos, lines, strict=True):
        millions = round(width * height / 1e6)
        assert line.startswith(f"{millions} million pixels of the kind {kind} {mode} take ")
    assert megabytes < 500


def test_photos_are_turned_and_scaled_as_they_should(tmp_path):
    left = Image.new("RGB", (60, 30), "black")
    left.paste("white", (0, 0, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6                            # turn by 90° clockwise
    left.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = data.decode(str(tmp_path / "turned.jpg"), 16)
    assert pixels[:6].mean() > 240 and pixels[-6:].mean() < 15
    Image.fromarray(np.full((9, 9), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert abs(data.decode(str(tmp_path / "deep.png"), 8).mean() - 127.5) < 1.5
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert data.decode(str(tmp_path / "clear.png"), 8).min() == 255


def test_duplicates_are_files_of_the_same_bytes(tmp_path):
    write(tmp_path, **{"h0.jpg": "same", "h1.jpg": "else", "h2.jpg": "longer", "h3.jpg": "",
                       "t0.jpg": "emas", "t1.jpg": "same", "sub/t2.jpg": "longer", "t3.jpg": ""})
    held_out = ["h0.jpg", "h1.jpg", "h2.jpg", "h3.jpg", "missing.jpg"]
    training = ["t0.jpg", "t1.jpg", "t2.jpg", "t3.jpg", "missing too.jpg"]
    duplicates = data.find_duplicates(str(tmp_path), held_out, training)
    assert sorted(duplicates) == [("h0.jpg", "t1.jpg"), ("h2.jpg", "t2.jpg")]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of photos named as in write_captions, one in ten of them missing or broken."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(2)
    for i in range(400):
        if i % 20 == 7:
            (folder / f"p{i}.jpg").write_text("broken")
        elif i % 20 != 3:
            pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"p{i}.jpg")
    return folder


@pytest.fixture
def photos(pictures, tmp_path):
    """These photos in a folder that a test may remove."""
    return Path(shutil.copytree(pictures, tmp_path / "photos", copy_function=os.link))


def load_batches(index, photos, workers, kept, **how):
    """[(photos used, pixels, available)] of twelve batches, and what was skipped."""
    batches = []
    sampler = data.BatchSampler(index, 1, 16, **how)
    plans = map(sampler.batch, range(12))
    with data.Loader(str(photos), index.name, kept, 24, workers) as loader:
        for plan, used, pixels, available in loader.batches(plans, sampler.replacement):
            assert plan.photos == sampler.batch(plan.step).photos   # as it was drawn
            batches.append((used, pixels.copy(), available))
    return batches, loader.skipped


@pytest.mark.parametrize("workers, kept", [(1, 400), (2, 400), (3, 1), (0, 0)])
def test_batches_do_not_depend_on_threads_or_memory(workers, kept, index, photos):
    expected, expected_skipped = load_batches(index, photos, 0, 400)
    batches, skipped = load_batches(index, photos, workers, kept)
    assert skipped == expected_skipped
    assert set(skipped.values()) == {"no such file or directory", "not a picture"}
    assert len(batches) == len(expected) == 12
    for (used, pixels, available), (used_0, pixels_0, available_0) in zip(batches, expected):
        assert used == used_0
        assert np.array_equal(pixels, pixels_0)
        assert np.array_equal(available, available_0)


def test_photo_that_cannot_be_read_is_replaced_by_one_of_its_word(index, photos):
    sampler = data.BatchSampler(index, 1, 16)
    batches, skipped = load_batches(index, photos, 2, 400)
    replaced = 0
    for step, (used, _, available) in enumerate(batches):
        batch = sampler.batch(step)
        assert available.all()                  # each word has some photos that can be read
        for drawn, photo, (word,) in zip(batch.photos, used, batch.targets):
            assert word in index.words(photo)
            assert (photo != drawn) == (index.name(drawn) in skipped)
            replaced += photo != drawn
    assert replaced > 5


def test_photo_with_all_its_words_is_not_replaced(index, photos):
    sampler = data.BatchSampler(index, 1, 16, "image")
    batches, skipped = load_batches(index, photos, 2, 400, sampling="image")
    assert skipped
    for step, (used, pixels, available) in enumerate(batches):
        for row, drawn in enumerate(sampler.batch(step).photos):
            is_broken = index.name(drawn) in skipped
            assert available[row] == (not is_broken)
            assert used[row] == (None if is_broken else drawn)
            assert pixels[row].any() == (not is_broken)


def test_loader_reads_only_a_little_ahead(index, photos):
    asked = []

    def plans():
        for step in range(100):
            asked.append(step)
            yield data.FixedOrder([step])

    with data.Loader(str(photos), index.name, 0, 24, 2) as loader:
        next(loader.batches(plans()))
    assert asked == [0, 1, 2]


def test_mistake_in_a_thread_is_not_a_broken_photo(index, photos, monkeypatch):
    monkeypatch.setattr(data, "decode_bytes", lambda content, size: 1 / 0)
    with data.Loader(str(photos), index.name, 9, 24, 2) as loader:
        with pytest.raises(ZeroDivisionError):
            list(loader.batches([data.FixedOrder(range(5))]))


# --------------------------------------------------------------------- the commands, as used

TINY = ("--words", 30, "--stop-words", 5, "--valid", 0.2, "--batch", 16, "--epoch-size", 96,
        "--threads", 2, "--workers", 1)


SMALL = model.NETWORKS["small"]
thin = partial(model.small, width=4)        # for tests of training, not of what is learned


@pytest.fixture
def mine(tmp_path, photos, monkeypatch):
    """The options of a tiny run on photos of one's own, in whose folder the test goes on.

    In this process its network is `thin`, and it draws no pictures after each epoch; a command that
    a test starts has `small` as it is, with pictures.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.NETWORKS, "small", SMALL._replace(build=thin))
    monkeypatch.setattr(weak, "draw_pictures", Mock())
    write_captions(tmp_path / "captions.tsv")
    return ["--images", photos, "--captions", tmp_path / "captions.tsv", *TINY]


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """train(…): what weak.main prints with these arguments, run in this process and tmp_path."""
    monkeypatch.chdir(tmp_path)

    def train(*arguments, expect=0):
        assert weak.main(arguments) == expect
        return capsys.readouterr().out
    return train


@pytest.fixture
def start(mine):
    """start(option, …): the state of a new run on `mine`, in the folder r."""
    with ExitStack() as closing:
        def start(*more):
            options, _ = weak.read_options([*mine, *more, "--out", "r"])
            weak.lock_folder(options.out).close()
            alone = ranks.Alone()
            index = weak.read_captions(options, alone)
            weak.complete_options(options, index)
            new_run = weak.begin_run(options, index, None, alone)
            closing.enter_context(new_run.loader)
            return new_run
        yield start


def after_step(step, monkeypatch, action):
    """From now on, action(run) follows the step of that number."""
    honest = weak.train_step

    def train_step(run, *batch):
        honest(run, *batch)
        if run.step == step:
            action(run)

    monkeypatch.setattr(weak, "train_step", train_step)


def differing(one, two, error=0):
    """The weights and velocities in which two runs differ by more than `error` of the largest."""
    names = []
    with np.load(f"{one}/model.npz") as ours, np.load(f"{two}/model.npz") as theirs:
        assert ours.files == theirs.files
        for name in ours.files:
            if name.startswith(("w/", "v/")):
                difference = abs(theirs[name] - ours[name]).max()
                if not difference <= error * abs(ours[name]).max():
                    names.append(name)
    return names


def facts_of(folder, name="model.npz"):
    return data.load_checkpoint(f"{folder}/{name}").facts


def log_of(folder):
    return [json.loads(line) for line in open(f"{folder}/log.jsonl")]


def losses_of(folder):
    return [row["loss"] for row in log_of(folder)]


def test_run_leaves_all_its_files(tiny):
    folder = tiny[0] / "r"
    said = (tiny[0] / "said.txt").read_text()
    for text in "device: CPU", "precision@1 ", "precision@5 ":
        assert text in said
    log = log_of(folder)
    assert [row["epoch"] for row in log] == [1, 2]
    assert log[-1]["step"] == 12
    assert ", held-out loss " in said.partition(": training loss ")[2]
    keys = {"loss", "training_loss", "validation_loss", "learning_rate", "images_per_second",
            "loader_wait", "precision@10"}
    assert keys <= log[0].keys()
    words = [line.split("\t") for line in open(folder / "words.txt")]
    assert len(words) == 30
    assert all(int(count) > 0 for _, count in words)
    skipped = dict(line.rstrip("\n").split("\t") for line in open(folder / "skipped.txt"))
    assert "not a picture" in skipped.values()
    for picture in "curves.png", "filters.png":
        assert Image.open(folder / picture).size[0] > 100


@pytest.mark.parametrize("options", [
    ["--dropout", 0.2], ["--loss", "one-vs-all"], ["--targets", "batch"],
    ["--targets", "batch", "--loss", "one-vs-all", "--sampling", "image"],
    ["--targets", "sampled", "--negatives", 9, "--sampling", "image", "--positives", "idf"],
    ["--targets", "sampled", "--loss", "one-vs-all"]])
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(options, mine, start, train, monkeypatch):
    """From a checkpoint before any step, from one of Ctrl-C within an epoch, and between epochs."""
    mine += ["--min-lr", 1e-9, "--final", 0, *options]
    train(*mine, "--epochs", 2, "--out", "whole")
    weak.save(start("--epochs", 1))
    after_step(3, monkeypatch, lambda run: signal.raise_signal(signal.SIGINT))
    said = train("--resume", "--out", "r", expect=130)
    assert "going on at step 0," in said
    assert "weak.py --resume --out r\n" in said
    assert facts_of("r")["step"] == 4
    train("--resume", "--out", "r")
    assert facts_of("r")["step"] == 6
    assert differing("whole", "r")
    train("--resume", "--out", "r", "--epochs", 2, "--workers", 0)
    assert not differing("whole", "r")
    assert losses_of("whole") == losses_of("r")


def test_training_on_the_reference_gives_the_same_losses(mine, train):
    mine += ["--epochs", 2, "--epoch-size", 32, "--dropout", 0.2]
    train(*mine, "--out", "fast", "--device", "cpu")
    said = train(*mine, "--out", "plain", "--device", "reference")
    assert "reference.py" in said
    assert losses_of("plain") == pytest.approx(losses_of("fast"), rel=1e-4)
    for fast, plain in zip(log_of("fast"), log_of("plain")):
        assert plain["validation_loss"] == pytest.approx(fast["validation_loss"], rel=1e-4)


def test_training_and_held_out_loss_are_one_function_of_as_many_photos(start, monkeypatch, capsys):
    training = start("--epochs", 1, "--positives", "all")
    assert training.shift is not None           # both are with the prior
    compared = weak.compared_photos(training.index)
    validated = weak.validation_photos(training.index)
    assert len(compared) == len(set(compared)) == len(validated)
    assert min(compared) >= training.index.held_out > max(validated)
    weak.train(training, weak.Interrupt())
    (row,) = training.log
    assert f"training loss {row['training_loss']:.4f}, held-out loss" in capsys.readouterr().out
    assert row["training_loss"] == weak.measure_training_loss(training)
    monkeypatch.setattr(weak, "compared_photos", weak.validation_photos)
    assert row["validation_loss"] == weak.measure_training_loss(training)
    assert row["validation_loss"] == weak.validate(training)["loss"] != row["training_loss"]


def test_checkpoint_knows_what_training_rows_have_of_each_word(start):
    for sampling, positives in ("class", "all"), ("class", "balanced"), ("image", "idf"):
        training = start("--sampling", sampling, "--positives", positives)
        weak.save(training)
        for name in "label_frequency", "label_weight":
            expected = getattr(training.index, name)(sampling, positives).tolist()
            assert facts_of("r")[name] == expected
        shutil.rmtree("r")


@pytest.mark.parametrize("positives", ["all", "balanced", "idf"])
@pytest.mark.parametrize("targets", ["all", "batch"])
def test_prior_of_a_checkpoint_with_one_frequency_is_the_same(positives, targets, start):
    """Of the versions before, which wrote the weight of `idf` as the frequency."""
    sampling = "image" if positives == "idf" else "class"
    training = start("--sampling", sampling, "--positives", positives, "--targets", targets)
    weak.save(training)
    checkpoint = data.load_checkpoint("r/model.npz")
    weight = checkpoint.facts.pop("label_weight")
    if positives == "idf":
        checkpoint.facts["label_frequency"] = weight
    new = evaluation.Trained("r").shift
    data.save_checkpoint("r/model.npz", checkpoint)
    np.testing.assert_allclose(evaluation.Trained("r").shift, new, rtol=1e-6)
    np.testing.assert_allclose(training.shift, new, rtol=1e-6)


def test_resumed_run_keeps_its_options(mine, start, train):
    weak.save(start("--epochs", 1, "--targets", "sampled"))
    assert facts_of("r")["options"]["negatives"] == weak.NEGATIVES
    with pytest.raises(ValueError, match=r"other options: --lr \(0.01, now 0.5\); leave"):
        train("--resume", "--lr", 0.5, "--out", "r")
    with pytest.raises(ValueError, match=r": --targets \(sampled, now all\); leave"):
        train("--resume", "--targets", "all", "--out", "r")
    with pytest.raises(ValueError, match="use --resume"):
        train(*mine, "--out", "r")
    train("--resume", "--targets", "sampled", "--epochs", 1, "--out", "r")      # nothing changed


def test_run_of_another_order_of_photos_is_not_resumed(start, train):
    weak.save(start())
    checkpoint = data.load_checkpoint("r/model.npz")
    del checkpoint.facts["order"]               # as in the versions before
    data.save_checkpoint("r/model.npz", checkpoint)
    with pytest.raises(ValueError, match="another version of weak.py, .*; begin .* by --from r$"):
        train("--resume", "--out", "r")


@pytest.mark.parametrize("name, caption, what", [
    ("p{}.jpg", "novelty " * 25, r"words of the dictionary are missing \(1\), e.g. wbq"),
    ("new{}.jpg", "wag wah", r"\d+ training photos are \d+ now"),
    ("p{}.jpg", "wax", r"wax is a word of \d+ training photos, now of \d+")])
def test_changed_captions_are_not_trained_on(name, caption, what, start, train):
    weak.save(start())
    with open("captions.tsv", "a") as file:
        file.writelines(f"{name.format(i)}\t{caption}\n" for i in range(20))
    with pytest.raises(ValueError, match=f"the captions changed: .*{what}.*; choose another --out"):
        train("--resume", "--out", "r")


def test_changed_pairing_of_photos_and_words_is_noticed(start, train):
    """Even where every word has as many photos as before: two photos change their captions."""
    weak.save(start())
    index = data.Index("r/index")
    first, second = [index.name(photo) for photo in (index.held_out, index.held_out + 1)]
    assert index.words(index.held_out).tolist() != index.words(index.held_out + 1).tolist()
    swapped = {first: second, second: first}
    rows = [line.split("\t") for line in open("captions.tsv")]
    with open("captions.tsv", "w") as file:
        file.writelines(f"{swapped.get(name, name)}\t{caption}" for name, caption in rows)
    with pytest.raises(ValueError, match="changed: photos have other names, or other words"):
        train("--resume", "--out", "r")


def test_photos_and_captions_may_move(mine, train, tmp_path):
    """Packed, in another order, and with other times, captions are the same captions."""
    mine += ["--final", 0, "--epochs"]
    train(*mine, 2, "--out", "whole")
    train(*mine, 1, "--out", "r")
    rows = open("captions.tsv").readlines()
    os.remove("captions.tsv")
    shutil.move("photos", "elsewhere")
    with gzip.open("moved.tsv.gz", "wt") as file:
        file.writelines(reversed(rows))
    with pytest.raises(ValueError, match="photos; if it has moved, give its new place by --images"):
        train("--resume", "--out", "r")
    with pytest.raises(ValueError, match="captions.tsv; if it has moved, .* by --captions"):
        train("--resume", "--out", "r", "--images", "elsewhere")
    train("--resume", "--out", "r", "--images", "elsewhere", "--captions", "moved.tsv.gz",
          "--epochs", 2)
    assert not differing("whole", "r")


def test_captions_may_move_into_a_file_of_another_format(mine, train):
    train(*mine, "--epochs", 1, "--out", "r")
    with open("captions.tsv") as file, open("captions.csv", "w") as table:
        table.write("image,caption\n")
        for line in file:
            table.write(line.replace("\t", ","))
    said = train("--resume", "--out", "r", "--captions", "captions.csv", "--epochs", 2)
    assert "as csv" in said
    assert "going on at step 6," in said


def test_python_in_development_mode_shows_where_an_error_was_raised(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", os.path.join(HERE, "weak.py"),
         "--images", "gone"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "in check_sources" in done.stderr
    assert "ValueError: images: there is no folder" in done.stderr


def link_classes(pictures, folder):
    """60 of the pictures in three sub-folders."""
    for i, name in enumerate(sorted(os.listdir(pictures))[:60]):
        place = folder / f"kind{chr(97 + i % 3)}"
        place.mkdir(parents=True, exist_ok=True)
        os.link(pictures / name, place / name)


def test_captions_instead_of_folders_are_no_reason_to_crash(pictures, train, tmp_path):
    link_classes(pictures, tmp_path / "here")
    train("--images", "here", "--out", "r", *TINY, "--stop-words", 0, "--epochs", 1)
    Path("captions.tsv").write_text("".join(f"p{i}.jpg\tred ball\n" for i in range(60)))
    with pytest.raises(ValueError, match="the captions changed"):
        train("--resume", "--out", "r", "--captions", "captions.tsv", "--epochs", 2)


def test_folder_that_is_its_own_captions_may_move_with_a_run_in_it(pictures, train, tmp_path):
    """The pictures of the run are none of its photos."""
    link_classes(pictures, tmp_path / "here")
    train("--images", "here", "--out", "here/runs/r", *TINY, "--stop-words", 0, "--epochs", 1)
    assert os.path.exists("here/runs/r/curves.png")
    train("--resume", "--out", "here/runs/r", "--epochs", 2)
    shutil.move("here", "there")
    said = train("--resume", "--images", "there", "--out", "there/runs/r", "--epochs", 3)
    assert "going on at step 12," in said
    assert not any("runs" in name for name in data.list_photos("there"))


def test_run_that_was_copied_goes_on(start, train):
    weak.save(start("--epochs", 1))
    os.remove("r/run.lock")                     # which is empty
    assert "going on at step 0," in train("--resume", "--out", "r")


def test_drawn_run_keeps_its_photos(train):
    train("--pictures", 100, "--epochs", 1, "--epoch-size", 64, "--stop-words", 0)
    with pytest.raises(ValueError, match="drew its own photos; leave out --images"):
        train("--resume", "--images", ".", "--out", "runs/drawn")


def test_drawn_set_is_drawn_anew_where_another_one_lies(tmp_path):
    def draw(seed, count):
        drawn.draw_set(str(tmp_path), seed, count)
        return Path(drawn.sources(tmp_path)["captions"]).read_text().splitlines()

    first = draw(0, 3)
    assert len(first) == 3
    assert draw(0, 4)[:3] == first
    assert draw(1, 4)[:3] != first
    photo = tmp_path / "drawn" / "photos" / "00000.jpg"
    photo.write_bytes(b"")
    draw(1, 4)                                  # nothing is drawn where the set is there
    assert photo.read_bytes() == b""
    os.remove(drawn.truth_file(tmp_path))
    draw(1, 4)
    assert photo.read_bytes() != b""


def test_refused_run_leaves_nothing(mine, train):
    os.mkdir("mine")
    Path("none").write_text("a.jpg\t\n")
    for out in "mine", "new":
        with pytest.raises(ValueError, match="no word of a photo"):
            train("--images", "photos", "--captions", "none", "--out", out)
    assert os.listdir("mine") == []
    assert not os.path.exists("new")


def test_next_command_may_be_pasted_whatever_the_names(mine, start, tmp_path, monkeypatch):
    """From any folder, with blanks in paths, and without running what is in a name."""
    training = start("--epochs", 1)
    training.options.out = "a run; $(touch danger)"
    monkeypatch.setattr(weak, "__file__", str(tmp_path / "its code" / "weak.py"))
    monkeypatch.setattr(training.loader.folder, "find", lambda name: f"/x/$(touch danger) {name}")
    command = weak.next_command(training, None)
    assert shlex.split(command) == ["python", "its code/weak.py", "--resume", "--out",
                                    training.options.out]
    *words, photo = shlex.split(weak.next_command(training, 0))
    assert words == ["python", "its code/eval.py", "tag", "--model", training.options.out]
    assert photo.startswith("/x/$(touch danger) p")


def test_example_is_the_photo_that_the_weights_are_surest_of(start, monkeypatch, capsys):
    training = start("--epochs", 1)
    training.epoch = 1
    photos = weak.validation_photos(training.index)
    chosen = photos[5]
    word = training.index.words(chosen)[-1]
    scores = np.zeros((len(photos), 30), np.float32)
    scores[5, word] = 9
    scores[6, :] = 50                           # as sure of every word as of any other
    monkeypatch.setattr(weak, "read_features", lambda run, photos: (scores, photos))
    monkeypatch.setattr(training.net.output, "scores", lambda features: features)
    assert weak.example_photo(training) == chosen
    weak.show_example(training, chosen)
    words = [training.index.dictionary[i] for i in training.index.words(chosen)]
    assert f"{training.index.name(chosen)} has the words {', '.join(words)}\n" in (
        capsys.readouterr().out)
    monkeypatch.setattr(weak, "read_features", lambda run, photos: ([], []))        # none is there
    assert weak.example_photo(training) == 0


def test_progress_says_when_training_ends(start):
    training = start()
    progress = Mock(total=96, left=lambda: 10, rate=lambda: 4.8)    # 20 s an epoch
    best = "ends 20 epochs after the best"
    assert weak.describe_end(training, progress) == f"{best} (in 6 min or more)"    # 10 + 20 · 20
    training.epoch = 7
    row = {"epoch": 7, "validation_loss": 1.0, "map": 0, "scored_photos": 1, "scored_words": 1,
           "scoring_seconds": 3}
    training.log.append(row)
    assert weak.describe_end(training, progress) == f"{best} (in 7 min or more)"    # 13 + 19 · 23
    training.epoch = 22
    assert weak.describe_end(training, progress) == f"{best} (in 105 s or more)"    # 13 + 4 · 23
    training.options.epochs = 25
    assert weak.describe_end(training, progress) == "59 s for all epochs"
    training.options.epochs = None
    training.options.patience = 0               # no end but by --min-lr
    assert weak.describe_end(training, progress) == ""


def test_stop_words_are_said_with_the_remedy(start, capsys):
    start()
    said = capsys.readouterr().out
    assert "5 most frequent words are left out as stop words, e.g. waa (" in said
    assert "; to train on them as well, --stop-words 0\n" in said
    shutil.rmtree("r")
    assert "waa" in start("--stop-words", 0).index.dictionary
    assert "left out as stop words" not in capsys.readouterr().out


def test_rate_is_halved_when_the_error_rose_also_after_a_resume(mine, train, held_out_losses):
    """Two epochs after the last time, at the earliest; it rose since the last epoch, not the best.
    """
    before = [5, 6, 7]
    after = [8, 8.5, 8.2, 8.4]
    held_out_losses(*before, *after, *before, *after)
    mine += ["--epochs-per-lr", 2, "--epoch-size", 16, "--final", 0]
    train(*mine, "--out", "whole", "--epochs", 7)
    train(*mine, "--out", "halves", "--epochs", 3)
    train(*mine, "--out", "halves", "--epochs", 7, "--resume")
    for name in "whole", "halves":
        rates = [row["learning_rate"] for row in log_of(name)]
        assert rates == [0.02, 0.02, 0.01, 0.01, 0.005, 0.005, 0.005]
        assert facts_of(name)["plateau"] == {
            "rate": 0.0025, "epochs_per_rate": 2, "epochs": 0, "error": 8.4}


def rates_of(training, monkeypatch):
    """The rates of the steps of this training, a list that it fills."""
    rates = []
    honest = training.sgd.step

    def step(rate):
        rates.append(rate)
        honest(rate)

    monkeypatch.setattr(training.sgd, "step", step)
    return rates


@pytest.mark.parametrize("options, rates, logged", [
    (["--epochs", 2], 10 * [0.02] + 2 * [0.002], [(0.02, 0), (0.002, 2)]),
    (["--epochs", 2, "--final", 0.75], 3 * [0.02] + 9 * [0.002], [(0.002, 3), (0.002, 6)]),
    (["--epochs", 1, "--final", 0], 6 * [0.02], [(0.02, 0)]),
    (["--patience", 1], 12 * [0.02], [(0.02, 0), (0.02, 0)])])
def test_rate_of_the_final_steps_is_a_tenth_and_so_it_is_logged(
        options, rates, logged, start, held_out_losses, monkeypatch):
    training = start(*options)
    held_out_losses(3.0, 4.0)                   # so that patience ends after 2 epochs
    found = rates_of(training, monkeypatch)
    weak.train(training, weak.Interrupt())
    assert found == pytest.approx(rates)
    assert [(row["learning_rate"], row["final_steps"]) for row in training.log] == logged


def test_run_resumed_in_its_final_steps_is_the_uninterrupted_one(mine, train, monkeypatch):
    mine += ["--epochs", 1, "--final", 0.6]     # 4 of 6 steps
    train(*mine, "--out", "whole")
    for step in (1, 4):
        after_step(step, monkeypatch, lambda run: signal.raise_signal(signal.SIGINT))
        more = mine if step == 1 else ["--resume"]
        train(*more, "--out", "r", expect=130)
    train("--resume", "--out", "r")
    assert not differing("whole", "r")
    (row,) = log_of("r")
    assert row["final_steps"] == 4
    assert losses_of("r") == losses_of("whole")
    train("--resume", "--out", "r", "--epochs", 3, "--final", 0.2)
    assert [row["final_steps"] for row in log_of("r")] == [4, 0, 4]     # of 18 steps
    assert [row["learning_rate"] for row in log_of("r")] == [0.002, 0.02, 0.002]


@pytest.mark.parametrize("options, rate", [
    (["--sampling", "image"], 0.0076), (["--positives", "all"], 0.0072), ([], 0.02),
    (["--positives", "balanced"], 0.02), (["--sampling", "image", "--positives", "idf"], 0.02),
    (["--targets", "batch"], 0.02), (["--targets", "sampled"], 0.01),
    (["--targets", "sampled", "--positives", "all"], 0.0036),
    (["--sampling", "image", "--lr", 0.01], 0.01)])
def test_default_rate_is_by_the_number_of_targets_and_kept(options, rate, start, train, capsys):
    weak.save(start(*options, "--epoch-size", 16, "--epochs", 1))
    assert f"rate: {rate:g}\n" in capsys.readouterr().out
    assert f"rate {rate:g}," in train("--resume", "--out", "r")


def test_training_ends_when_patience_does(mine, train, held_out_losses):
    held_out_losses(3.0, 2.0, 2.5, 2.0, 9, 9, 9, 1.0, 9)
    mine += ["--epoch-size", 16, "--epochs-per-lr", 1]              # so that it is 2 epochs
    assert "training is over by --patience" in train(*mine, "--out", "r")
    assert len(log_of("r")) == 4
    assert "is finished; to train on, change --patience" in train("--resume", "--out", "r")
    train("--resume", "--out", "r", "--epochs", 6)
    assert len(log_of("r")) == 6


def test_training_crops_are_central_if_asked(mine, train, monkeypatch):
    honest = cpu.prepare
    seen = []                                   # of each batch: tops, lefts, flips

    def prepare(photos, top, left, flip, crop):
        seen.append((set(top), set(left), set(flip)))
        return honest(photos, top, left, flip, crop)

    monkeypatch.setattr(cpu, "prepare", prepare)
    mine += ["--epoch-size", 32, "--epochs", 1]
    train(*mine, "--out", "c", "--crop", "center")
    batches = seen[1:]                          # the first is of the question how large a step is
    assert batches
    for crops in batches:
        assert crops == ({4}, {4}, {False})
    seen.clear()
    train(*mine, "--out", "r")
    assert max(len(top) for top, _, _ in seen) > 4
    assert any(flip == {True, False} for _, _, flip in seen)


# ---------------------------------------------------------------------------- several ranks

@pytest.mark.parametrize("options", [
    ["--dropout", 0.3], ["--targets", "sampled", "--negatives", 5, "--sampling", "image",
                         "--loss", "one-vs-all"], ["--targets", "batch"]])
def test_two_ranks_are_one_and_one_goes_on(options, mine, train, monkeypatch):
    monkeypatch.setitem(model.NETWORKS, "small", SMALL)             # as the ranks have it
    mine += ["--batch", 9, "--epoch-size", 9, "--epochs", 1, "--threads", 1, *options]
    train(*mine, "--out", "one")
    done = run(*mine, "--out", "two", ranks=2)
    assert "ranks: 2" in done.stdout
    assert "and for other ranks" in done.stdout
    assert done.stdout.count("device:") == 1    # one of them speaks
    assert not differing("one", "two", 1e-3)
    (one,) = log_of("one")
    (two,) = log_of("two")
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
    assert two["skipped"] == one["skipped"]
    said = train("--resume", "--out", "two", "--epochs", 2)         # by one rank
    assert "going on at step 1," in said
    assert facts_of("two")["step"] == 2
    assert log_of("two")[0] == two


FAILING = """
import os, data, weak
from kernels import console
honest = weak.train_step
def train_step(run, *batch):
    if run.ranks.rank == 1 and run.step == 9:
        {what}
    honest(run, *batch)
weak.train_step = train_step
if int(os.environ["PMI_RANK"]):
    data.save_checkpoint = lambda *_: print("rank 1 writes", file=sys.stderr)
console.run_command(weak.main)
"""


@pytest.mark.parametrize("what, status, lines", [
    ("raise RuntimeError('a planted fault')", 1, ["rank 1 of 2: -c: a planted fault"]),
    ("1 / 0", 1, ["rank 1 of 2: ", "ZeroDivisionError"]),
    ("os.kill(os.getpid(), 9)", 9, [])])
def test_rank_that_dies_ends_the_job_and_leaves_the_checkpoint_whole(what, status, lines, mine):
    done = run(*mine, "--epochs", 3, "--out", "r", ranks=2, code=FAILING.format(what=what),
               expect=status, crash="1 / 0" in what)
    for line in lines:
        assert done.stderr.count(line) == 1
    assert "rank 1 writes" not in done.stderr
    assert facts_of("r")["step"] == 6


@pytest.mark.parametrize("options, line", [
    (["--batch", 1], "--batch 1 is less than the 2 ranks"),
    (["--batch", "many"], "number value: 'many'"),
    (["--lr", -1], "above 0")])
def test_bad_options_are_told_once_whatever_the_ranks(options, line, mine):
    done = run(*mine, *options, ranks=2, expect=2)
    assert done.stderr.count("weak.py: ") == 1
    assert done.stderr.count(line) == 1


@pytest.mark.parametrize("variable, missing, remedy", [
    ("OMPI_COMM_WORLD_SIZE", "None", "not of the MPI that mpi4py uses"),
    ("PMI_SIZE", "'mpi4py'", "pip install mpi4py")])
def test_mpi_that_does_not_fit_is_said_with_the_remedy(variable, missing, remedy, monkeypatch):
    pytest.importorskip("mpi4py")
    monkeypatch.setenv(variable, "2")
    done = run(code=f"sys.modules[{missing}] = None\nimport weak\nfrom kernels import console\n"
                    "console.run_command(weak.main)", expect=1)
    assert remedy in done.stderr.splitlines()[-1]                   # mpi4py itself may warn


def test_ranks_with_other_weights_end_the_run(start):
    one_of_two = start()
    one_of_two.ranks = Mock(size=2)
    one_of_two.ranks.gather = lambda checksums: checksums + checksums
    weak.compare_weights(one_of_two)
    one_of_two.ranks.gather = lambda checksums: [checksums[0], checksums[0] + 1]
    with pytest.raises(RuntimeError, match="the ranks' weights differ after step 0"):
        weak.compare_weights(one_of_two)


# ------------------------------------------------------------------------ what goes wrong

def test_infinite_loss_leaves_the_last_checkpoint_untouched(start, monkeypatch):
    training = start("--epochs", 3)

    def spoil(run):
        run.current.losses *= math.inf

    after_step(8, monkeypatch, spoil)
    with pytest.raises(RuntimeError, match="inf at step 12: .*model.npz is of step 6"):
        weak.train(training, weak.Interrupt())
    assert facts_of("r")["step"] == 6


@pytest.mark.parametrize("rate", [1e30, 1e4])       # infinite weights, and a loss beyond reason
def test_diverged_weights_are_not_saved(rate, mine):
    mine += ["--epoch-size", 16]                # the first step ends an epoch
    done = run(*mine, "--lr", rate, "--out", "r", expect=1)
    assert "training diverges" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not os.path.exists("r/model.npz")


@pytest.fixture
def held_out_losses(monkeypatch):
    """held_out_losses(loss, …): what training takes for the held-out losses of its epochs.

    The lower a loss, the higher the mean AP that it takes.
    """
    def held_out_losses(*losses):
        honest = weak.validate
        remaining = iter(losses)

        def validate(run):
            scores = honest(run)
            scores["loss"] = next(remaining)
            scores["map"] = 1 / scores["loss"]
            return scores

        monkeypatch.setattr(weak, "validate", validate)
    return held_out_losses


def test_best_epoch_is_kept_and_known_after_a_resume(mine, train, held_out_losses):
    held_out_losses(3.0, 2.0, 2.5, 2.7, 1.0)
    mine += ["--epoch-size", 16]
    out = train(*mine, "--epochs", 3, "--out", "r")
    assert facts_of("r", "best.npz")["epoch"] == 2
    assert "r/best.npz: step 2, epoch 2 of 3, held-out loss 2.0000" in out
    assert os.path.getsize("r/best.npz") < 0.6 * os.path.getsize("r/model.npz")
    train("--resume", "--out", "r", "--epochs", 4)
    assert facts_of("r", "best.npz")["epoch"] == 2
    train("--resume", "--out", "r", "--epochs", 5)
    assert facts_of("r", "best.npz")["epoch"] == 5
    os.replace("r/best.npz", "r/model.npz")
    with pytest.raises(ValueError, match="weights only"):
        train("--resume", "--out", "r")


def test_best_epoch_is_evaluated_and_begun_with(mine, train, held_out_losses, capsys):
    held_out_losses(3.0, 2.0, 2.5, 9, 9, 9)
    mine += ["--epoch-size", 16]
    train(*mine, "--epochs", 3, "--out", "r")
    best = data.load_checkpoint("r/best.npz").weights["conv1.w"]
    for name, epoch in ("r", 2), ("r/model.npz", 3):
        trained = evaluation.Trained(name)
        assert f"epoch {epoch} of 3" in capsys.readouterr().err
        assert trained.folder == "r"
        assert np.array_equal(trained.net.first.w, best) == (epoch == 2)
    said = train(*mine, "--from", "r", "--epochs", 1)
    assert "/r/best.npz: step 2, epoch 2 of 3" in said


@pytest.mark.parametrize("words, best", [(1, 3), (0, 2)])
def test_best_epoch_is_by_mean_ap_where_there_is_one(words, best):
    def row(epoch, loss, mean_ap):
        return {"epoch": epoch, "validation_loss": loss, "map": mean_ap if words else math.nan,
                "scored_words": words}

    log = [row(1, 3.0, 0.1), row(2, 2.0, 0.2), row(3, 2.5, 0.4), row(4, 2.2, 0.4)]
    assert weak.best_epoch(log)["epoch"] == best
    assert weak.best_epoch([]) is None
    assert weak.best_epoch([{"validation_loss": None}]) is None


def test_best_weights_and_patience_follow_mean_ap_and_the_rate_the_loss(start, monkeypatch):
    training = start("--patience", 2, "--epochs-per-lr", 1, "--epoch-size", 16)
    honest = weak.validate
    scores = iter([(2.0, 0.1), (3.0, 0.3), (2.5, 0.2), (2.4, 0.1)])

    def validate(run):
        measured = honest(run)
        measured["loss"], measured["map"] = next(scores)
        return measured

    monkeypatch.setattr(weak, "validate", validate)
    weak.train(training, weak.Interrupt())
    assert [row["learning_rate"] for row in training.log] == [0.02, 0.02, 0.01, 0.01]
    assert facts_of("r", "best.npz")["epoch"] == 2
    assert weak.stop_reason(training) == "--patience"


def fail_writes(monkeypatch, *failing):
    """Of the writes of checkpoints from now on, those of these numbers fail; their names, a list.
    """
    honest = data.save_checkpoint
    tries = []

    def save_checkpoint(path, checkpoint):
        tries.append(os.path.basename(path))
        if len(tries) in failing:
            no_space()
        honest(path, checkpoint)

    monkeypatch.setattr(data, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(weak, "RETRY_SECONDS", 0)
    return tries


@pytest.mark.parametrize("lost", [False, True])
def test_full_disk_costs_a_run_only_what_it_cannot_save(
        lost, start, held_out_losses, monkeypatch, capsys):
    """The last checkpoint, or one that was lost since, is written as soon as there is room."""
    training = start("--epochs", 3)
    held_out_losses(3.0, 2.5, 2.0, 2.0)         # so every epoch is the best
    failing = [1, 2, 7, 8] if lost else [1, 2, 6, 7]
    tries = fail_writes(monkeypatch, *failing)
    monkeypatch.setattr(weak, "draw_pictures", no_space)
    assert weak.train(training, weak.Interrupt())
    if lost:
        os.remove("r/model.npz")                # somebody needs the space
    weak.finish(training, finished=True)
    at_the_end = ["model.npz"] * (3 if lost else 2)
    assert tries == ["best.npz", "model.npz"] * 3 + at_the_end
    assert facts_of("r")["step"] == facts_of("r", "best.npz")["step"] == 18
    said = capsys.readouterr().err
    assert said.count("best.npz is not saved") == 1
    assert said.count("free some space") == 4
    assert "text or picture not written" in said


def test_best_epoch_is_written_at_the_end_if_not_before(start, held_out_losses, monkeypatch):
    training = start("--epochs", 2)
    held_out_losses(3.0, 2.5, 2.5)
    tries = fail_writes(monkeypatch, 3)
    weak.train(training, weak.Interrupt())
    weak.finish(training, finished=True)
    assert tries == ["best.npz", "model.npz"] * 3
    assert facts_of("r", "best.npz")["epoch"] == 2


def test_best_epoch_that_could_not_be_saved_is_saved_after_a_worse_one(
        start, held_out_losses, monkeypatch):
    training = start("--epochs", 3)
    held_out_losses(3.0, 2.5, 2.7, 2.5)
    after_step(12, monkeypatch, lambda run: best.update(weights_of(run)))
    tries = fail_writes(monkeypatch, 3)
    best = {}
    weak.train(training, weak.Interrupt())
    assert tries == ["best.npz", "model.npz"] * 3
    saved = data.load_checkpoint("r/best.npz")
    assert saved.facts["epoch"] == 2
    assert len(saved.facts["log"]) == 2
    assert all(np.array_equal(saved.weights[name], best[name]) for name in best)


def weights_of(run):
    """A copy of a run's weights."""
    return {name: np.array(w) for name, w in run.net.state().items()}


def test_best_epoch_that_cannot_be_saved_is_no_success(start, held_out_losses, monkeypatch):
    training = start("--epochs", 2)
    held_out_losses(2.5, 2.7, 2.7)
    fail_writes(monkeypatch, 1, 3, 5, 7)
    monkeypatch.setattr(weak, "RETRIES", 1)
    weak.train(training, weak.Interrupt())
    with pytest.raises(RuntimeError, match="r/model.npz is of step 12; best.npz lacks step 6, the"):
        weak.finish(training, finished=True)


def test_best_epoch_that_was_lost_is_said(mine, train, held_out_losses):
    held_out_losses(2.5, 2.7, 2.7, 2.8, 2.8)
    train(*mine, "--epochs", 2, "--out", "r")
    os.remove("r/best.npz")
    said = train("--resume", "--out", "r", "--epochs", 3)
    assert "epoch 1 was better, but its weights could not be saved" in said


@pytest.mark.parametrize("error", [errno.EFBIG, errno.EACCES])
def test_what_waiting_cannot_mend_is_not_waited_for(error, start, monkeypatch, capsys):
    training = start("--epochs", 1)
    monkeypatch.setattr(data, "save_checkpoint", Mock(side_effect=OSError(error, "It is so")))
    monkeypatch.setattr(weak.time, "sleep", pytest.fail)
    weak.train(training, weak.Interrupt())
    with pytest.raises(RuntimeError, match="step 6 could be saved: nothing was saved yet; best"):
        weak.finish(training, finished=True)
    assert "is not saved: It is so\n" in capsys.readouterr().err


def test_folder_that_was_removed_is_not_waited_for_nor_claimed(start, monkeypatch):
    training = start("--epochs", 1)
    monkeypatch.setattr(weak.time, "sleep", pytest.fail)
    weak.train(training, weak.Interrupt())
    shutil.rmtree("r")
    with pytest.raises(RuntimeError, match="nothing is saved, r/model.npz was removed"):
        weak.finish(training, finished=True)


def test_files_of_a_run_count_as_room_for_the_next_ones(start, monkeypatch):
    training = start()
    size = weak.weight_bytes(training)
    weak.save(training)                         # 2 times the weights, with the velocities
    disk = Mock(free=3.5 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    weak.check_disk(training)
    disk.free = 2.5 * size
    with pytest.raises(ValueError, match="saving needs"):
        weak.check_disk(training)


def test_disk_errors_are_no_damage(checkpoint, monkeypatch, start):
    path = checkpoint(1)
    monkeypatch.setattr(np, "load", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
        data.load_checkpoint(path)
    with pytest.raises(OSError, match="Input/output error"):        # as no matter of ranks
        start()


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(step) is saved, and its path returned."""
    net = model.small(5)
    velocities = model.SGD(net, momentum=0.9, decay=0).v
    path = str(tmp_path / "model.npz")

    def checkpoint(step):
        data.save_checkpoint(path, data.Checkpoint(net.state(), velocities, {"step": step}, ["a"]))
        return path
    return checkpoint


def test_checkpoint_takes_the_place_of_another_when_it_is_whole(checkpoint, tmp_path, monkeypatch):
    """So a process that is killed leaves one of them, and a full disk the one before."""
    path = checkpoint(1)
    steps = []                                  # of the files that are there at each fsync

    def fsync(_):
        files = [data.load_checkpoint(str(place)) for place in tmp_path.iterdir()]
        steps.append(sorted(file.facts["step"] for file in files))

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint(2)
    assert steps == [[1, 2], [2]]
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        checkpoint(3)
    assert os.listdir(tmp_path) == ["model.npz"]
    assert data.load_checkpoint(path).facts["step"] == 2


def test_file_under_way_follows_no_link(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "f.guessed.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        with console.whole_file(tmp_path / "f"):
            pass
    assert not (tmp_path / "elsewhere").exists()


def test_files_of_a_killed_run_are_removed(start):
    start()
    write(Path("r"), **{"model.npz.0123abcd.part": "half"})
    weak.lock_folder("r").close()
    assert not [name for name in os.listdir("r") if name.endswith(".part")]


def test_packed_checkpoint_is_not_unpacked(checkpoint, tmp_path):
    """A few MB may pack thousands; what this project writes is not packed."""
    np.savez_compressed(tmp_path / "bomb.npz", **{"w/x": np.zeros(10**6, np.float32)})
    with pytest.raises(ValueError, match="is not a model of weak.py"):
        data.load_checkpoint(str(tmp_path / "bomb.npz"))


@pytest.mark.parametrize("row", [1, None, [], "x", {}, {"step": 1}, {"step": "1"}])
def test_rows_of_another_kind_are_left_out_of_the_log(row, tmp_path):
    good = {"epoch": 1, "step": 9, "images_per_second": 3.5, "validation_loss": None}
    lines = [json.dumps(good), json.dumps(row), "[" * 99_999, '{"epoch": 2, "st', json.dumps(good)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert data.read_log(str(tmp_path)) == [good, good]


@pytest.mark.parametrize("part", [0.01, 0.3, 0.7, 0.999])
def test_damaged_checkpoint_ends_in_one_line(part, checkpoint):
    path = checkpoint(1)
    with open(path, "r+b") as file:
        file.seek(int(part * os.path.getsize(path)))
        file.write(b"damage")
    with pytest.raises(ValueError, match="^[^\n]*is not a model of weak.py, or it is damaged$"):
        data.load_checkpoint(path)


def lose_velocity(checkpoint):
    del checkpoint.velocities["fc5.w"]


def lose_weights(checkpoint):
    del checkpoint.weights["fc5.w"]


def change_type(checkpoint):
    checkpoint.weights["fc5.b"] = checkpoint.weights["fc5.b"].view(np.int32)


@pytest.mark.parametrize("tamper", [lose_velocity, lose_weights, change_type])
def test_tampered_checkpoint_is_not_resumed(tamper, start, train):
    weak.save(start())
    checkpoint = data.load_checkpoint("r/model.npz")
    tamper(checkpoint)
    data.save_checkpoint("r/model.npz", checkpoint)
    with pytest.raises(ValueError, match="^r/model.npz does not fit its own options[^\n]*$"):
        train("--resume", "--out", "r")


def test_fine_tuning_keeps_the_rows_of_words_that_both_know(start):
    before = start()
    weak.save(before)
    shutil.move("r", "first")
    after = start("--words", 20, "--seed", 5, "--from", "first")
    known = [before.index.dictionary.index(word) for word in after.index.dictionary]
    assert len(known) == 20
    assert np.array_equal(after.net.output.w, before.net.output.w[known])
    assert np.array_equal(after.net.first.w, before.net.first.w)


def test_fine_tuning_holds_out_no_photo_that_was_trained_on(start, train, capsys):
    """Whichever of its ancestors trained on it, as long as the captions are the same."""
    weak.save(start("--valid", 0.1))
    shutil.move("r", "first")
    with pytest.raises(ValueError, match="--valid 0.2 holds out; use --valid 0.1 at most"):
        start("--from", "first")
    shutil.rmtree("r")
    weak.save(start("--from", "first", "--valid", 0.05))
    shutil.move("r", "second")
    assert "not known" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="use --valid 0.05 at most"):
        start("--from", "second", "--valid", 0.1)
    shutil.rmtree("r")
    write_captions(Path("captions.tsv"), seed=1)
    weak.save(start("--from", "second"))
    assert "had other captions; whether it trained on photos" in capsys.readouterr().out
    assert sorted(facts_of("r")["trained_on"].values()) == [0.05, 0.2]
    train("--resume", "--out", "r", "--epochs", 1)
    assert sorted(facts_of("r")["trained_on"].values()) == [0.05, 0.2]


def test_printing_ends_nothing():
    class Busy(io.RawIOBase):
        def writable(self):
            return True

        def write(self, text):                  # the handler of a signal prints, too
            busy.write("stopping")
            return len(text)

    busy = console.Screen(io.TextIOWrapper(io.BufferedWriter(Busy())))
    full = io.StringIO()
    full.write = no_space
    read_only = open(os.devnull)
    for stream in full, read_only, busy:
        print("lost", file=console.Screen(stream), flush=True)


def test_printing_steers_no_terminal():
    shown = console.Screen(io.StringIO())
    other = console.Screen(io.StringIO())
    shown.write("epoch 1", progress=True)
    other.write("a\x1b[31m\x9b\u202e\r\tb\n")
    assert shown.stream.getvalue() == "epoch 1\r\033[K"             # the line is cleared
    assert other.stream.getvalue() == "a\\x1b[31m\\x9b\\u202e\\r\tb\n"


def test_progress_fits_the_terminal(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((40, 9)))
    stream = io.StringIO()
    stream.isatty = lambda: True
    stream.fileno = lambda: 0
    with console.Progress("epoch 1", 1000, stream=stream) as progress:
        progress.done += 10
        progress.show("2 min for all epochs, loss 4, waited for photos 5%")
    line = stream.getvalue().partition("\r")[0]
    assert len(line) < 40
    assert line.startswith("epoch 1: 10 of 1,000 photos")


def test_given_options_are_told_from_defaults():
    parser = console.Parser()
    parser.add_argument("--words", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    assert parser.parse_given([]) == {}
    assert parser.parse_given(["--seed", "0", "--resume"]) == {"seed": 0, "resume": True}
    assert parser.defaults() == {"words": 1000, "seed": 0, "resume": False}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP, "reader is gone"])
def test_stopped_process_saves_and_ends(how, mine):
    process = subprocess.Popen(
        [sys.executable, os.path.join(HERE, "weak.py"), *map(str, mine), "--out", "r"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))        # also under nohup
    next(line for line in process.stdout if "epoch 1" in line)
    if how == "reader is gone":
        process.stdout.close()
    else:
        process.send_signal(how)
        assert "--resume" in process.stdout.read()
    assert process.wait(60) == 130
    assert process.stderr.read() == ""
    assert facts_of("r")["step"] > 0


def test_memory_of_a_step_counts_the_scores_of_all_words(start, monkeypatch, capsys):
    needed = {}
    for options in (), ("--targets", "batch"), ("--loss", "one-vs-all"):
        start(*options)
        line = re.search(r"memory: .*, (\S+) MB an image", capsys.readouterr().out)
        needed[options] = float(line.group(1))
        shutil.rmtree("r")
    assert len(set(needed.values())) == 1       # 30 words are few
    net = model.small(k=10_000)
    none = net.bytes_per_image(72, 64, model.Softmax, 0)
    assert net.bytes_per_image(72, 64, model.Softmax, 10_000) - none == 4 * 40_000
    assert net.bytes_per_image(72, 64, model.Softmax, 500) - none == 4 * 2_000
    assert net.bytes_per_image(72, 64, model.OneVersusAll, 10_000) - none == 9 * 40_000


@pytest.mark.parametrize("options, scored", [
    ([], 30), (["--targets", "batch"], 16), (["--targets", "sampled", "--negatives", 5], 21),
    (["--targets", "sampled", "--negatives", 500], 30)])
def test_step_scores_so_many_words(options, scored, start):
    assert weak.scored_words(start(*options)) == scored             # of 30, with a batch of 16


@pytest.mark.parametrize("name", model.LOSSES)
def test_losses_hold_as_many_arrays_of_scores_as_they_say(name):
    s = np.zeros((8, 50_000), np.float32)
    labels = data.Labels(np.zeros((8, 1), np.int32), np.full(8, 1 / 8, np.float32))
    loss = model.LOSSES[name](np.full(50_000, 0.1))
    tracemalloc.start()
    loss(s, labels)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loss.arrays_of_scores - 1 < 1 + most / s.nbytes < loss.arrays_of_scores + 0.1


def test_computer_with_too_little_memory_is_told_what_helps_there(start, monkeypatch):
    monkeypatch.setattr(data, "MEMORY", 8 << 20)
    with pytest.raises(ValueError, match="this machine's memory; use --batch [0-9]+ or less"):
        start("--batch", 1000)
    shutil.rmtree("r")
    monkeypatch.setattr(data, "MEMORY", 1 << 10)
    with pytest.raises(ValueError, match="this machine's memory; use a smaller --network or"):
        start()


def test_second_interrupt_ends_at_once_with_what_is_saved(start):
    training = start("--epochs", 3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        with weak.Interrupt() as interrupt:
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.asked
            signal.raise_signal(signal.SIGPIPE)                     # which the message may cause
            assert weak.train(training, interrupt) is False
            signal.raise_signal(signal.SIGTERM)
    assert training.step == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_interrupt_while_photos_are_scored_ends_before_the_next_step(start, monkeypatch):
    training = start("--epochs", 3)
    interrupt = weak.Interrupt()
    honest = weak.validate

    def validate(run):
        interrupt.handle(signal.SIGINT, None)
        return honest(run)

    monkeypatch.setattr(weak, "validate", validate)
    assert weak.train(training, interrupt) is False
    assert training.step == 6
    assert [row["epoch"] for row in training.log] == [1]


def test_epoch_that_was_stopped_in_its_last_step_has_its_own_rate(mine, train, monkeypatch):
    """It is resumed where no step is left; what its steps took is in the checkpoint."""
    after_step(5, monkeypatch, lambda run: signal.raise_signal(signal.SIGINT))
    train(*mine, "--epochs", 1, "--out", "r", expect=130)
    under_way = facts_of("r")["under_way"]
    assert under_way["steps"] == 6
    assert "epoch 1: training loss" in train("--resume", "--out", "r")
    (row,) = log_of("r")
    assert row["images_per_second"] == pytest.approx(96 / under_way["seconds"], rel=0.5)
    assert row["loader_wait"] == pytest.approx(
        under_way["photos_waited"] / under_way["seconds"], rel=0.5)


def test_scoring_shows_how_far_it_is(start, monkeypatch, capsys):
    monkeypatch.setattr(console, "FILE_SECONDS", 0)
    training = start()
    weak.validate(training)
    count = len(weak.validation_photos(training.index))
    assert f"scoring: {count} of {count} photos, 0 s left" in capsys.readouterr().out


def test_number_of_workers_that_was_not_given_is_not_stored(start, monkeypatch):
    monkeypatch.setattr(kernels, "cores", lambda: 24)
    options = argparse.Namespace(workers=None)
    assert weak.count_workers(options, Mock(local_size=1)) == 8
    assert weak.count_workers(options, Mock(local_size=4)) == 6
    assert options.workers is None
    options.workers = 0
    assert weak.count_workers(options, Mock(local_size=4)) == 0


def test_memory_is_the_containers_if_that_is_less(tmp_path):
    whole = data.machine_memory(tmp_path / "none")
    for text, memory in (("max\n", whole), ("4096\n", 4096), (f"{2 * whole}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert data.machine_memory(tmp_path / "memory.max") == memory


def test_run_that_nothing_would_end_is_refused(mine):
    with pytest.raises(ValueError, match="nothing tells when to stop: give --epochs"):
        weak.read_options([*mine, "--valid", 0, "--out", "r"])
    weak.read_options([*mine, "--valid", 0, "--epochs", 1, "--out", "r"])


def test_texts_beside_photos_are_counted_while_they_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "FILE_SECONDS", 0)
    write(tmp_path / "f", **{f"{i}.{ending}": "red ball" for i in range(3)
                             for ending in ("jpg", "txt")})
    build(tmp_path, data.Text(99, 0, 0), captions="f")
    said = capsys.readouterr().err
    assert "checking texts: 2 of 3 files" in said
    assert "reading texts: 2 of 3 files" in said


def test_drawing_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "FILE_SECONDS", 0)
    drawn.draw_set(str(tmp_path), 0, 3)
    assert "drawing: 2 of 3 pictures" in capsys.readouterr().err


LINGERING = """
import threading, time
from kernels import console
def work():
    threading.Thread(target=time.sleep, args=(20,)).start()
    print("ready", flush=True)
    time.sleep(60)
console.run_command(work)
"""


def test_interrupt_while_threads_end_is_no_traceback():
    process = subprocess.Popen([sys.executable, "-c", IMPORTING + LINGERING], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "interrupted\n"
    time.sleep(0.5)                             # the thread is waited for
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert process.stderr.read() == ""


def test_checkpoint_is_saved_within_a_long_epoch(start, monkeypatch):
    training = start("--epochs", 1)
    monkeypatch.setattr(weak, "SAVE_SECONDS", 0)
    saved = []
    honest = weak.save

    def save(run):
        saved.append(run.step)
        honest(run)

    monkeypatch.setattr(weak, "save", save)
    weak.train(training, weak.Interrupt())
    assert saved == [1, 2, 3, 4, 5, 6, 6]       # and at the epoch's end


def test_epoch_without_photos_ends_the_run(start):
    training = start("--epochs", 5)
    shutil.rmtree("photos")
    with pytest.raises(RuntimeError, match="no photo of the last 6 steps could be read"):
        weak.train(training, weak.Interrupt())


def test_drawn_set_is_drawn_trained_and_evaluated(train, capsys):
    said = train("--pictures", 300, "--epochs", 1, "--epoch-size", 256)
    assert "precision@10" in said
    assert re.search(r"things +\d+ +0\.\d+ ", said)
    captions = open("runs/drawn/drawn/captions.tsv").read()
    assert len(captions.splitlines()) == 300
    assert "#" in captions
    assert "is finished" in train("--resume")
    assert evaluation.main(["words", "--model", "runs/drawn", "--json", "w.json"]) == 0
    result = json.load(open("w.json"))
    assert list(result["truth"]) == list(drawn.KINDS)
    shown = capsys.readouterr().out.partition("truly show")[2]
    table, _, baselines = shown.partition("AUC against the truth")
    assert table and table in said              # training said the same at its end
    assert "linear regression: untrained network" in baselines


def test_suggested_photo_is_shown_with_its_caption_and_the_truth(train):
    said = train("--pictures", 100, "--epochs", 1, "--epoch-size", 64, "--stop-words", 0)
    name, words = re.search(r"for example, (\S+) has the words (.*)", said).groups()
    captions = dict(line.rstrip().split("\t") for line in open("runs/drawn/drawn/captions.tsv"))
    truth = dict(line.rstrip().split("\t") for line in open("runs/drawn/drawn/truth.tsv"))
    assert set(words.split(", ")) <= set(data.words_of(captions[name]))
    shown = re.search("what it shows is (.*)", said).group(1)
    assert set(shown.split(", ")) <= set(data.words_of(truth[name]))


def test_drawn_run_that_knows_no_word_of_the_truth_is_scored_by_captions(train, capsys):
    said = train("--pictures", 60, "--epochs", 1, "--epoch-size", 64, "--stop-words", 0,
                 "--words", 2, "--lr", 0.001)
    assert "precision@10" in said
    assert "truly show" not in said
    assert evaluation.main(["words", "--model", "runs/drawn", "--no-baselines"]) == 0
    assert "truly show" not in capsys.readouterr().out


def test_drawn_runs_are_scored_by_the_truth_of_the_photos_that_are_read(train):
    """Those of the run with the most training photos; other runs drew other scenes of that name."""
    for seed in (0, 1):
        train("--pictures", 60 + 40 * seed, "--seed", seed, "--out", f"runs/{seed}", "--epochs", 1,
              "--epoch-size", 64, "--stop-words", 0)
    command = ["words", "--model", "runs/0", "runs/1", "--no-baselines", "--json", "w.json"]
    numbers = []
    for truth in ([], ["--truth", "runs/1/drawn/truth.tsv"]):
        assert evaluation.main(command + truth) == 0
        numbers.append([result["truth"] for result in json.load(open("w.json"))["runs"].values()])
    assert numbers[0] == numbers[1]


def test_drawn_run_without_the_truth_is_evaluated(train):
    train("--pictures", 100, "--epochs", 1, "--epoch-size", 64, "--stop-words", 0)
    os.remove("runs/drawn/drawn/truth.tsv")
    assert evaluation.main(["words", "--model", "runs/drawn", "--no-baselines"]) == 0


@pytest.mark.parametrize("arguments, positives", [
    ([], "balanced"), (["--loss", "one-vs-all"], "drawn"), (["--sampling", "image"], "all"),
    (["--positives", "drawn"], "drawn")])
def test_drawn_set_takes_every_loss_and_sampling(arguments, positives, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, _ = weak.read_options(arguments)
    assert options.drawn
    assert options.positives == positives


def test_drawn_scene_is_always_the_same():
    image, caption, truth = drawn.draw_scene(0, 5)
    same_image, same_caption, same_truth = drawn.draw_scene(0, 5)
    assert caption == same_caption
    assert truth == same_truth
    assert np.array_equal(np.asarray(image), np.asarray(same_image))
    assert drawn.draw_scene(0, 6)[1] != caption


def test_truth_is_what_is_drawn(monkeypatch):
    """Its things are those whose shapes are drawn, in its colours, before its place."""
    shapes = []
    monkeypatch.setattr(drawn, "draw_shape", lambda draw, shape, corner, width, colour:
                        shapes.append((shape, colour, width)))
    monkeypatch.setattr(drawn, "shade", lambda colour, rng: colour)
    thing_of = {drawn.THINGS[thing].split("; ")[0]: thing for thing in drawn.THINGS}
    name_of = {colour: name for name, colour in drawn.COLOURS.items()}
    several = 0
    for n in range(200):
        shapes.clear()
        image, _, truth = drawn.draw_scene(3, n)
        sky, ground = image.getpixel((0, 0)), image.getpixel((0, 95))
        expected = [place for place, colours in drawn.PLACES.items() if colours == (sky, ground)]
        drawn_things = [row for row in shapes if row[0] in thing_of]
        for shape, colour, width in drawn_things:
            expected += [thing_of[shape], name_of[colour]]
            assert 0.3 * 96 < width <= 0.75 * 96
        assert truth == " ".join(expected)
        several += len(drawn_things) > 1
    assert 50 < several < 90                    # a third has two things or more


def test_captions_are_true_in_the_main_and_name_what_no_picture_shows():
    kinds = evaluation.kinds_of_words()
    counts = Counter()
    for n in range(1000):
        _, caption, truth = drawn.draw_scene(0, n)
        told = set(data.words_of(caption)) & set(kinds)
        true = set(data.words_of(truth))
        counts.update(told=len(told), wrong=len(told - true), true=len(true))
        assert true <= set(kinds)
        assert not set(data.words_of(" ".join(drawn.NAMES + drawn.FILLERS))) & true
    assert 0.01 < counts["wrong"] / counts["told"] < 0.1
    assert counts["told"] < 0.6 * counts["true"]


GIVEN = ["--images", "photos", "--captions"]
BAD = {
    "pictures of given photos": ([*GIVEN, "captions.tsv", "--pictures", 9], "are drawn without"),
    "no such images": (["--images", "none", "--captions", "captions.tsv"], "no folder"),
    "no such captions": ([*GIVEN, "none"], "there is no file"),
    "captions in a pipe": ([*GIVEN, "photos/model.npz"], "save a pipe to one first"),
    "photos without --images": (["photos"], "photos' folder is given as --images photos"),
    "images missing": (["--captions", "captions.tsv"], "goes with --images"),
    "captions empty": ([*GIVEN, "empty"], "is empty"),
    "captions of nothing": ([*GIVEN, "blank"], "has no word of a photo"),
    "captions broken json": ([*GIVEN, "json"], "COCO"),
    "captions torn gzip": ([*GIVEN, "torn.gz"], "damaged"),
    "captions in Excel": ([*GIVEN, "sheet"], "zip archive or an Excel workbook"),
    "captions of odd columns": ([*GIVEN, "odd"], "the columns who, what, and needs one"),
    "captions of absolute names": ([*GIVEN, "absolute"], "'/a.jpg' lead out of --images"),
    "rate too low": ([*GIVEN, "captions.tsv", "--lr", 1e-9], "below --min-lr"),
    "batch too large": ([*GIVEN, "captions.tsv", "--stop-words", 5, "--batch", 10**7],
                        "does not fit into this machine's memory"),
    "photos elsewhere": (["--images", "other", "--captions", "captions.tsv", "--stop-words", 5],
                         "none of the"),
    "too many stop words": ([*GIVEN, "captions.tsv", "--stop-words", 5000], "lower --stop-words"),
    "rate infinite": (["--lr", "inf"], "--lr"),
    "out is somebody else's": (["--out", "other"], "holds other things"),
    "nothing to resume": (["--resume", "--out", "fresh"], "no model at"),
    "a pipe to resume": (["--resume", "--out", "photos"], "no model at photos/model.npz"),
    "a batch of one word": (["--targets", "batch", "--batch", 1], "--batch 2"),
    "negatives of nothing": (["--negatives", 5], "--targets sampled"),
    "balance by image": (["--sampling", "image", "--positives", "balanced"], "use all or idf"),
    "idf by class": (["--positives", "idf"], "use drawn or all or balanced"),
    "balance of one-vs-all": (["--loss", "one-vs-all", "--positives", "balanced"], "use drawn"),
    "idf of one-vs-all": (["--loss", "one-vs-all", "--sampling", "image", "--positives", "idf"],
                          "use all"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_the_remedy(name, tmp_path, photos, train):
    write_captions(tmp_path / "captions.tsv", 40)
    write(tmp_path, "other/words.txt", **{"torn.gz": gzip.compress(b"a.jpg\tx y z\n" * 9999)[:-40]},
          empty="", blank="a.jpg\t\nb.jpg\t12\n", json='{"images": [', sheet=b"PK\3\4" + bytes(99),
          odd="who,what\na.jpg,x\n", absolute="/a.jpg\tx y\n")
    os.mkfifo(photos / "model.npz")             # which nobody reads, and so nobody waits
    arguments, remedy = BAD[name]
    with pytest.raises(ValueError) as error:
        train(*arguments)
    assert remedy in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "other" / "words.txt").read_text() == "x"


@pytest.mark.parametrize("arguments, remedy", [
    (["features", "--images", "photos", "--out", "r/model.npz"], "is a run's own file; choose"),
    (["words", "--json", "r/log.jsonl"], "is a run's own file; choose another name"),
    (["words", "--out", "r/../r/curves.png"], "is a run's own file; choose another name"),
    (["words", "--out", "o.png", "--json", "./o.png"], "two options name .*/o.png to be"),
    (["words", "--truth", "t.csv", "--per-word", "t.csv"], "t.csv is read, it is no place to"),
    (["curves", "--out", "o.png", "--json", "o.csv"], "two options name .*/o.csv to be")])
def test_output_is_never_written_over_a_runs_own_files(arguments, remedy, start):
    weak.save(start())
    with pytest.raises(ValueError, match=remedy):
        evaluation.main([arguments[0], "--model", "r", *arguments[1:]])


def test_errors_end_in_one_line_and_a_status(tmp_path):
    (tmp_path / "model.npz").write_text("not a model")
    for script, arguments, status, remedy in (
            ("weak.py", ["--words", 0], 2, "at least 1"),
            ("weak.py", ["--device", "gpu"], 1, "--device cpu"),
            ("eval.py", ["tag", "--model", tmp_path, "x.jpg"], 2, "not a model"),
            ("eval.py", ["words", "--model", "none", "--json", "/nope/x"], 2, "--json")):
        done = run(*arguments, folder=tmp_path, script=script, expect=status)
        assert remedy in done.stderr
        assert done.stderr.count("\n") <= 2     # the device is one


@pytest.mark.parametrize("error, status, line", [
    (ValueError("lower --lr"), 2, "lower --lr"),
    (RuntimeError("no GPU"), 1, "no GPU"),
    (MemoryError(), 1, "there is not enough memory; lower --batch, --words or --limit"),
    (FileNotFoundError(errno.ENOENT, "No such file", "x.jpg"), 1, "x.jpg: No such file"),
    (OSError(errno.ENOSPC, "Full"), 1, "Full; free some space, or choose another place"),
    (KeyboardInterrupt("interrupted; r is of step 6"), 130, "interrupted; r is of step 6")])
def test_errors_have_a_status_and_a_line(error, status, line):
    found_status, found_line = console.explain(error)
    assert found_status == status
    assert found_line.endswith(line)


def test_steps_without_any_photo_cost_nothing_but_themselves(mine, train):
    mine += ["--batch", 1, "--sampling", "image", "--lr", 0.001, "--epochs", 1, "--out", "r"]
    train(*mine)
    kept = open("r/skipped.txt").read()
    train("--resume", "--out", "r")
    assert kept
    assert open("r/skipped.txt").read() == kept


def test_missing_photos_leave_the_loss_a_mean_over_the_others(mine, train, monkeypatch):
    """At a rate that moves nothing it is ln K for each word of a photo that is there."""
    for i in range(0, 400, 2):
        Path(f"photos/p{i}.jpg").unlink(missing_ok=True)
    honest = weak.train_step
    sizes = []                                  # a step's mean number of words

    def train_step(run, batch, pixels, available, counted):
        assert 0 < counted < 16
        words = [len(targets) for targets in batch.targets]
        sizes.append(np.mean(np.array(words)[available]))
        honest(run, batch, pixels, available, counted)

    monkeypatch.setattr(weak, "train_step", train_step)
    train(*mine, "--sampling", "image", "--lr", 1e-6, "--min-lr", 1e-9, "--epochs", 1, "--out", "r")
    assert losses_of("r") == pytest.approx([math.log(30) * np.mean(sizes)], rel=5e-3)


def test_folder_of_hidden_files_is_an_empty_one(tmp_path):
    write(tmp_path, "r/.DS_Store")
    weak.lock_folder(str(tmp_path / "r")).close()
    assert sorted(os.listdir(tmp_path / "r")) == [".DS_Store", "run.lock"]


def test_folder_of_a_running_run_is_refused(tmp_path):
    lock = weak.lock_folder(str(tmp_path / "r"))
    with pytest.raises(ValueError, match="another run"):
        weak.lock_folder(str(tmp_path / "r"))
    lock.close()
    weak.lock_folder(str(tmp_path / "r")).close()


# ---------------------------------------------------------------- every operation on every device

EMULATOR = emulate.Emulator() if emulate.compiler() else None
ROUNDING = 2.0**-24                     # a float's rounding error, relative
PRECISIONS = ("fp32", "tf32", "3xtf32")


@contextmanager
def emulated(orders=range(1), change=None, **limits):
    """gpu.Cuda computes on the host, perhaps with mistakes; several orders of threads find races.
    """
    if not EMULATOR:
        pytest.skip("no C++ compiler to run the kernels with")
    runner = emulate.Emulator(change) if change else EMULATOR
    with emulate_cupy.installed(runner, **limits), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "orders", orders)
        try:
            yield kernels.use("gpu", "fp32")
        finally:
            kernels.use("cpu")


@contextmanager
def computing_on(name):
    """Everything computes on that device: "emulated" is a GPU on the host's processor."""
    if name == "emulated":
        with emulated(range(3)):
            yield
        return
    try:
        kernels.use(name, "fp32" if name == "gpu" else None)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield
    kernels.use("cpu")


@pytest.fixture(params=["reference", "cpu", "emulated", "gpu"])
def device(request):
    """The test runs on each device that is here, and compares it with the reference in float64."""
    with computing_on(request.param):
        yield request.param


@pytest.fixture(params=["emulated", "gpu"])
def cuda(request):
    """The test is about the CUDA kernels alone."""
    with computing_on(request.param):
        yield request.param


def up(*arrays):
    """Float32 arrays where the device computes."""
    return [kernels.to_device(np.asarray(x, np.float32)) for x in arrays]


def floats(rng, *shapes):
    """Random float64 arrays whose numbers are floats, too, and none halfway between two of TF32."""
    arrays = []
    for shape in shapes:
        bits = rng.standard_normal(shape, np.float32).view(np.uint32) | 1
        arrays.append(bits.view(np.float32).astype(np.float64))
    return arrays


def as_multiplied(x, precision):
    """x as the tensor cores get it: rounded to TF32 if that is the precision."""
    if precision != "tf32":
        return x
    bits = (x.astype(np.float32).view(np.uint32) + 0x1000) & 0xffffe000
    return bits.view(np.float32).astype(np.float64)


def check_close(y, expected, magnitude, terms, rounding=ROUNDING):
    """y within what rounding `terms` products explains; a failure names the index and values."""
    y = kernels.to_host(y).astype(np.float64)
    bound = rounding * (3 + 3 * np.sqrt(terms)) * magnitude + 1e-30
    assert y.shape == expected.shape and not np.isnan(y).any()
    error = abs(y - expected)
    worst = np.unravel_index(np.argmax(error / bound), y.shape)
    assert (error <= bound).all(), f"at {worst}: {y[worst]} instead of {expected[worst]}"


def conv_case(seed):
    """x, w, b, stride, pad at random; every fourth case has channels in multiples of four."""
    rng = np.random.default_rng(seed)
    multiple = 4 if seed % 4 == 0 else 1
    kh, kw = rng.integers(1, 12, 2).tolist()
    stride = int(rng.integers(1, 5))
    pad = int(rng.integers(0, 6))
    n = rng.integers(1, 4)
    c = rng.integers(1, 20) * multiple
    f = rng.integers(1, 36) * multiple
    h = max(1, kh - 2 * pad + rng.integers(0, 12))
    w = max(1, kw - 2 * pad + rng.integers(0, 12))
    return *floats(rng, (n, h, w, c), (kh, kw, c, f), (f,)), stride, pad


def check_convolution(case, precision="fp32"):
    """All three directions against the reference on the same operands."""
    if precision != "fp32":
        kernels.use("gpu", precision)
    rounding = 4 * ROUNDING if precision == "3xtf32" else ROUNDING
    x, w, b, stride, pad = case
    kh, kw, _, f = w.shape
    size = kh * kw * w.shape[2]
    y_shape = reference.conv_forward(x, w, b, stride, pad).shape
    (dy,) = floats(np.random.default_rng(1), y_shape)
    on_device = up(x, w, b, dy)
    mx, mw, mdy = (as_multiplied(array, precision) for array in (x, w, dy))

    y = kernels.conv_forward(*on_device[:3], stride, pad, relu=True)
    check_close(y, reference.conv_forward(mx, mw, b, stride, pad, relu=True),
                reference.conv_forward(abs(x), abs(w), abs(b), stride, pad), size, rounding)
    dx = kernels.conv_backward_input(on_device[3], on_device[1], x.shape, stride, pad)
    check_close(dx, reference.conv_backward_input(mdy, mw, x.shape, stride, pad),
                reference.conv_backward_input(abs(dy), abs(w), x.shape, stride, pad),
                kh * kw * f, rounding)
    dw, db = kernels.conv_backward_filter(on_device[0], on_device[3], w.shape, stride, pad)
    magnitude_w, magnitude_b = reference.conv_backward_filter(abs(x), abs(dy), w.shape, stride, pad)
    check_close(dw, reference.conv_backward_filter(mx, mdy, w.shape, stride, pad)[0], magnitude_w,
                dy.size // f, rounding)
    check_close(db, dy.sum(axis=(0, 1, 2)), magnitude_b, dy.size // f)


@pytest.mark.parametrize("seed", range(8))
def test_convolution_agrees_on_every_device(device, seed):
    check_convolution(conv_case(seed))


@pytest.mark.parametrize("seed", (0, 3, 12, 16))
@pytest.mark.parametrize("precision", ("tf32", "3xtf32"))
def test_convolution_on_tensor_cores_is_that_of_rounded_operands(cuda, precision, seed):
    check_convolution(conv_case(seed), precision)


@pytest.mark.parametrize("shape, filters", [
    ((2, 19, 15, 8), (3, 3, 8, 76)), ((3, 9, 9, 64), (1, 1, 64, 132)),
    ((1, 31, 8, 3), (5, 5, 3, 70))])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_convolution_over_many_tiles_and_parts_agrees(cuda, precision, shape, filters, rng):
    check_convolution((*floats(rng, shape, filters, filters[3:]), 1, filters[0] // 2), precision)


@pytest.mark.parametrize("seed", (1, 4, 6))
def test_naive_convolution_agrees_with_the_reference_and_the_fast_one(cuda, seed):
    x, w, b, stride, pad = conv_case(seed)
    kh, kw, c, f = w.shape
    y = reference.conv_forward(x, w, b, stride, pad)
    (dy,) = floats(np.random.default_rng(1), y.shape)
    xd, wd, bd, dyd = up(x, w, b, dy)
    dw, _ = reference.conv_backward_filter(x, dy, w.shape, stride, pad)
    cases = [
        (gpu.naive_forward(xd, wd, bd, stride, pad), y,
         kernels.conv_forward(xd, wd, bd, stride, pad), kh * kw * c),
        (gpu.naive_backward_input(dyd, wd, x.shape, stride, pad),
         reference.conv_backward_input(dy, w, x.shape, stride, pad),
         kernels.conv_backward_input(dyd, wd, x.shape, stride, pad), kh * kw * f),
        (gpu.naive_backward_filter(xd, dyd, w.shape, stride, pad), dw,
         kernels.conv_backward_filter(xd, dyd, w.shape, stride, pad)[0], dy.size // f)]
    for naive, exact, fast, terms in cases:
        magnitude = 4 * np.sqrt(terms)          # numbers of a product are below 4, mostly
        check_close(naive, exact, magnitude, terms)
        check_close(fast, kernels.to_host(naive).astype(np.float64), magnitude, terms)


@pytest.mark.parametrize("bits", (0x7fffffff, 0xffffffff, 0x7fc00000))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_stays_a_nan_on_tensor_cores(cuda, precision, bits):
    """To round one by adding to its bits would make a zero of it."""
    kernels.use("gpu", precision)
    x = np.ones((1, 2, 2, 4), np.float32)
    x.view(np.uint32)[0, 1, 0, 2] = bits
    w, b = up(np.ones((1, 1, 4, 4)), np.zeros(4))
    y = kernels.to_host(kernels.conv_forward(kernels.to_device(x), w, b, relu=True))
    assert np.isnan(y[0, 1, 0]).all() and np.isnan(y).sum() == 4
    dw, db = kernels.conv_backward_filter(*up(np.ones((1, 2, 2, 4))), kernels.to_device(x), w.shape)
    assert np.isnan(kernels.to_host(dw)[..., 2]).all() and np.isnan(kernels.to_host(db)[2])


def test_long_sums_in_3xtf32_are_those_of_floats(cuda, rng):
    """Tensor cores truncate: 2,000 sums in them would lose 2^-24 of all each time."""
    x = rng.random((1, 4, 4, 8192), np.float32)
    w = rng.random((1, 1, 8192, 16), np.float32)
    kernels.use("gpu", "3xtf32")
    y = kernels.to_host(kernels.conv_forward(*up(x, w, np.zeros(16)))).reshape(-1, 16)
    exact = x.reshape(-1, 8192).astype(np.float64) @ w[0, 0]
    assert abs(y / exact - 1).max() < 2.0**-19


@pytest.mark.parametrize("kilobytes", (64, 99))     # compute capability 7.5; 8.6, 8.9 and 12.0
def test_convolution_kernel_fits_into_little_shared_memory(kilobytes):
    with emulated(shared=kilobytes << 10, multiprocessor=kilobytes + 1 << 10):
        check_convolution(conv_case(0))
        _, stages, _ = gpu.tile(1000, 512, 1000, True, gpu._device, "fp32")
        assert stages >= 2


def test_parts_of_a_product_fill_the_blocks_that_the_device_holds():
    """80 blocks on 80 multiprocessors leave half of the places free where each holds two."""
    shape = 128 * 80, 128, 32 * 64
    parts = []
    for kilobytes in (100, 228):                # of a multiprocessor: for one block, or two
        place = Mock(multiprocessors=80, block_bytes=99 << 10,
                     multiprocessor_bytes=kilobytes << 10)
        parts.append(gpu.tile(*shape, False, place, "tf32")[2])
    assert parts == [1, 2]


@pytest.mark.parametrize("channels", (5, 8))
@pytest.mark.parametrize("window", [
    (3, 2, 0, False), (3, 2, 1, True), (2, 2, 0, True), (3, 1, 1, False), (5, 3, 2, True)])
def test_max_pooling_agrees_on_every_device(device, window, channels):
    kernel, stride, pad, _ = window
    rng = np.random.default_rng(7)
    x = rng.integers(-3, 4, (2, 11, 8, channels)).astype(np.float64)            # many ties
    x[0, 2, 3, 1] = np.nan
    x[1] = -np.inf
    y, argmax = reference.max_pool_forward(x, *window)
    y_on_device, argmax_on_device = kernels.max_pool_forward(*up(x), *window)
    numbers = ~np.isnan(y)
    assert not numbers.all()
    assert np.array_equal(kernels.to_host(y_on_device), y, equal_nan=True)
    assert np.array_equal(kernels.to_host(argmax_on_device)[numbers], argmax[numbers])
    dy = rng.integers(-9, 9, y.shape) * numbers.astype(np.float64)
    dx = kernels.max_pool_backward(*up(dy), argmax_on_device, x.shape, kernel, stride, pad)
    expected = reference.max_pool_backward(dy, argmax, x.shape, kernel, stride, pad)
    assert np.array_equal(kernels.to_host(dx), expected) and expected.sum() == dy.sum()


@pytest.mark.parametrize("channels", (5, 8))
@pytest.mark.parametrize("kernel, stride", [(3, 2), (2, 2), (3, 1), (5, 3)])
def test_average_pooling_agrees_on_every_device(device, kernel, stride, channels, rng):
    (x,) = floats(rng, (2, 11, 8, channels))
    y = reference.avg_pool_forward(x, kernel, stride)
    check_close(kernels.avg_pool_forward(*up(x), kernel, stride), y, 4, kernel)
    (dy,) = floats(rng, y.shape)
    check_close(kernels.avg_pool_backward(*up(dy), x.shape, kernel, stride),
                reference.avg_pool_backward(dy, x.shape, kernel, stride), 4, kernel)


@pytest.mark.parametrize("channels", (1, 7, 64, 700))
@pytest.mark.parametrize("constants", [(5, 2.0, 1e-4, 0.75), (3, 1.0, 0.5, 0.6)])
def test_lrn_agrees_on_every_device(device, channels, constants, rng):
    x, dy = (10 * array for array in floats(rng, (2, 3, 5, channels), (2, 3, 5, channels)))
    check_close(kernels.lrn_forward(*up(x), *constants), reference.lrn_forward(x, *constants),
                abs(x) + 1, 30)
    check_close(kernels.lrn_backward(*up(dy, x), *constants),
                reference.lrn_backward(dy, x, *constants), abs(dy) + abs(x) + 10, 100)


def test_prepare_agrees_on_every_device(device, rng):
    photos = rng.integers(0, 256, (4, 43, 43, 3), np.uint8)
    photos[2] = 77                              # a blank photo
    crops = np.array([0, 3, 6, 2]), np.array([6, 1, 0, 2]), np.array([0, 1, 0, 1], bool)
    x = kernels.prepare(photos, *crops, 37)
    assert not kernels.to_host(x)[2].any()
    check_close(x, reference.prepare(photos, *crops, 37), 8, 4)


@pytest.mark.parametrize("n, e, rate", [(3, 16, 0.5), (2, 37, 0.2), (5, 1, 0.5), (1, 4096, 0.7)])
def test_dropout_draws_the_same_masks_on_every_device(device, n, e, rate, rng):
    x = rng.standard_normal((n, e), np.float32)
    counter = 2**62 + 11, 2**40 + 3, 3_000_000_000, 7               # seed, step, layer, row
    assert np.array_equal(kernels.to_host(kernels.dropout(*up(x), rate, *counter)),
                          reference.dropout(x, rate, *counter))


@pytest.mark.parametrize("seed, step, spare", [(0, 0, 0), (2**62 + 11, 2**40 + 3, 32)])
def test_samples_are_the_same_on_every_device(device, seed, step, spare, rng):
    class_ends = np.cumsum(rng.integers(1, 50, 30))
    class_photos = rng.integers(0, 2**32, class_ends[-1], np.uint32)
    counter = spare, seed, step, 3, 100         # three steps of 100 rows
    expected = reference.sample_by_class(class_photos, class_ends, *counter)
    samples = kernels.sample_by_class(
        kernels.to_device(class_photos), kernels.to_device(class_ends), *counter)
    for ours, array in zip(samples, expected, strict=True):
        assert isinstance(ours, np.ndarray) and ours.dtype == array.dtype
        assert ours.shape == (3, 100) and np.array_equal(ours, array)


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (3, 7), (300, 5)])
def test_pointwise_passes_agree_on_every_device(device, shape):
    y, *terms = np.random.default_rng(7).integers(-4, 5, (5, *shape)).astype(np.float64)
    for count in (1, 2, 3, 4):
        total = kernels.sum_gradients(up(*terms[:count]))
        assert np.array_equal(kernels.to_host(total), sum(terms[:count]))
    dx = kernels.relu_backward(*up(terms[0], y))
    assert np.array_equal(kernels.to_host(dx), reference.relu_backward(terms[0], y))


@pytest.mark.parametrize("relu", (False, True))
def test_matmul_agrees_on_every_device(device, relu, rng):
    a = rng.integers(-5, 6, (67, 8)).astype(np.float32)
    b = rng.integers(-5, 6, (8, 35)).astype(np.float32)
    bias = rng.integers(-5, 6, 35).astype(np.float32)
    a_on_device, b_on_device, bias_on_device = up(a, b, bias)
    y = kernels.matmul(a_on_device, b_on_device, bias_on_device, relu)
    assert np.array_equal(kernels.to_host(y), reference.matmul(a, b, bias, relu))
    y = kernels.matmul(b_on_device.T, a_on_device.T, relu=relu)
    assert np.array_equal(kernels.to_host(y), reference.matmul(b.T, a.T, relu=relu))


@pytest.mark.parametrize("n, k", [(3, 1), (2, 31), (4, 300), (2, 5000)])
@pytest.mark.parametrize("name, vectors", [
    ("softmax_loss", 0), ("softmax_loss", 1), ("one_vs_all_loss", 2)])
def test_losses_agree_on_every_device(device, name, vectors, n, k, rng):
    s = 5 * rng.standard_normal((n, k), np.float32)
    s[0, 0] = 3e38 if name == "softmax_loss" else 3e4               # exp of it overflows
    targets = np.array([[0, -1, k - 1 if k > 1 else -1]] * n, np.int32)
    targets[-1] = -1                            # a photo that could not be read
    weights = np.where(np.arange(n) < n - 1, 0.25, 0)
    if name == "softmax_loss":
        weights = weights[:, None] * (1, 9, 0.5)                    # of each target
    labels = targets, weights, *rng.uniform(0.01, 3, (vectors, k))
    losses, ds = getattr(kernels, name)(*up(s), *labels)
    expected, exact_ds = getattr(reference, name)(s.astype(np.float64), *labels)
    assert losses.shape == (n,) and kernels.to_host(losses) == pytest.approx(expected, rel=1e-5)
    check_close(ds, exact_ds, abs(exact_ds) + 1e-3, k)


@pytest.mark.parametrize("rows", [None, np.array([5, 0, 3], np.int32)])
@pytest.mark.parametrize("shape", [(7, 13), (7,)])          # a bias has one number a row
def test_updates_agree_on_every_device(device, rows, shape, rng):
    w, v, dw = floats(rng, shape, shape, shape)
    dw = dw if rows is None else dw[:len(rows)]
    w_on_device, v_on_device, dw_on_device = up(w, v, dw)
    kernels.sgd(w_on_device, v_on_device, dw_on_device, 0.1, 0.9, 0.5, rows)
    reference.sgd(w, v, dw, 0.1, 0.9, 0.5, rows)
    check_close(w_on_device, w, 4, 4)
    check_close(v_on_device, v, 4, 4)


def all_operations(rng, n):
    """(name, arrays float32, further arguments) of each operation, on n images or rows."""
    image, y, window = ((n, 9, 8, 5), (n, 9, 8, 6), (n, 4, 3, 5))
    filters = 3, 3, 5, 6
    targets = np.zeros((n, 1), np.int32)
    vectors = np.ones(7), np.ones(7)
    x, dy, w, b, dp, features, scores = floats(
        rng, image, y, filters, (6,), window, (n, 12), (n, 7))
    return [
        ("conv_forward", (x, w, b), (1, 1, True)),
        ("conv_backward_input", (dy, w), (image, 1, 1)),
        ("conv_backward_filter", (x, dy), (filters, 1, 1)),
        ("relu_backward", (x, -x), ()),
        ("max_pool_forward", (x,), (3, 2)),
        ("avg_pool_forward", (x,), (3, 2)),
        ("avg_pool_backward", (dp,), (image, 3, 2)),
        ("lrn_forward", (x,), ()),
        ("lrn_backward", (-x, x), ()),
        ("matmul", (features, features.T @ features, features.sum(axis=0)), (True,)),
        ("dropout", (features,), (0.5, 0, 1, 2)),
        ("softmax_loss", (scores,), (targets, np.ones((n, 1)), vectors[0])),
        ("one_vs_all_loss", (scores,), (targets, np.ones(n), *vectors))]


def test_operations_change_none_of_their_arguments(device, rng):
    for name, arrays, arguments in all_operations(rng, 2):
        on_device = up(*arrays)
        getattr(kernels, name)(*on_device, *arguments)
        for before, after in zip(arrays, on_device, strict=True):
            assert np.array_equal(kernels.to_host(after), before.astype(np.float32)), name
    terms = up(*floats(rng, (3, 5), (3, 5)))
    before = [kernels.to_host(term).copy() for term in terms]
    total = kernels.sum_gradients(terms[:1])
    total[...] = 0                              # new memory, of one term, too
    kernels.sum_gradients(terms)
    assert all(np.array_equal(kernels.to_host(a), b) for a, b in zip(terms, before))


def test_operations_on_no_images_give_nothing_or_zeros(cuda, rng):
    """CuPy would launch one block, which would access what is not there."""
    for name, arrays, arguments in all_operations(rng, 0):
        results = getattr(kernels, name)(*up(*arrays), *arguments)
        for result in results if isinstance(results, tuple) else [results]:
            assert not kernels.to_host(result).any(), name
    no_photos = np.zeros((0, 9, 9, 3), np.uint8)
    assert kernels.prepare(no_photos, [], [], [], 7).shape == (0, 7, 7, 3)
    no_rows = np.zeros(0, np.int32)
    w, v = up(np.ones((3, 2)), np.ones((3, 2)))
    kernels.sgd(w, v, *up(np.ones((0, 2))), 0.1, 0.9, 0.5, no_rows)
    assert (kernels.to_host(w) == 1).all()


def test_kernels_refuse_arrays_they_would_misread(cuda):
    (x,) = up(np.zeros((2, 4, 4, 8)))
    w, b = up(np.zeros((3, 3, 8, 8)), np.zeros(8))
    for wrong in (x.transpose(0, 2, 1, 3)[:, :, 1:], x[:, ::2], x.astype(np.float64)):
        for name, arguments in (
                ("max_pool_forward", (wrong, 2, 2)), ("sum_gradients", ([wrong],)),
                ("conv_forward", (wrong, w, b)), ("lrn_forward", (wrong,)),
                ("relu_backward", (wrong, x))):
            with pytest.raises(ValueError, match="float32"):
                getattr(kernels, name)(*arguments)


# ------------------------------------------------------------------ whole steps on every device

def tiny_googlenet(k, dropout=0.0, seed=0):
    """All kinds of layers of GoogLeNet on 64×64 pixels."""
    head = [("pool", model.AvgPool(5, 3)), ("conv", model.Conv(24, 8, 1)),
            ("flat", model.Flatten()), ("fc", model.Linear(32, 12)), ("drop", model.Dropout(0.7)),
            ("output", model.Output(12, k))]
    return model.Network([
        ("conv1", model.Conv(3, 8, 7, stride=4, pad=3)), ("norm1", model.LRN()),
        ("pool1", model.MaxPool(3, 2, ceil=True)),                          # 8
        ("3a", model.inception(8, 4, 4, 8, 4, 4, 8)),                       # 8, 24 channels
        ("head", model.Head(head)),
        ("3b", model.inception(24, 8, 8, 8, 4, 8, 8)),                      # 8, 32 channels
        ("pool5", model.AvgPool(8, 1)), ("flat", model.Flatten()),
        ("drop", model.Dropout(dropout)), ("output", model.Output(32, k))], seed)


def one_step(build, dtype, x, targets, classes):
    """Everything that one training step computes, as NumPy arrays by name."""
    net = build(9, dropout=0.5)
    for _, layer, name in net.parameters():
        setattr(layer, name, getattr(layer, name).astype(dtype))
    optimiser = model.SGD(net, 0.9, 5e-4)
    weights = np.full(len(targets), 1 / len(targets), np.float32)
    labels = data.Labels(targets, weights, classes=classes)
    scores = net.forward_training(x, model.Context(seed=3, step=1, classes=classes))
    losses, gradients = model.training_losses(model.Softmax(), scores, labels)
    net.backward(gradients)
    optimiser.step(0.05)
    results = {"losses": kernels.to_host(losses), **net.state()}
    for path, v in optimiser.v.items():
        results["v of " + path] = kernels.to_host(v)
    return results


@pytest.mark.parametrize("precision, error", [("fp32", 1e-5), ("tf32", 0.2)])   # ReLUs flip
@pytest.mark.parametrize("build", [model.small, tiny_googlenet])
@pytest.mark.parametrize("classes", [None, np.array([0, 1, 4, 6, 7], np.int32)],
                         ids=["all", "gathered"])
def test_step_on_every_device_is_the_references(device, precision, error, build, classes, rng,
                                                monkeypatch):
    if precision == "tf32":
        if device not in ("emulated", "gpu"):
            pytest.skip("a precision of GPUs")
        kernels.use("gpu", "tf32")
    if device == "cpu":
        error = 0.1                             # Winograd rounds more: a maximum flips
    if EMULATOR:
        monkeypatch.setattr(EMULATOR, "orders", range(1))   # other tests look for races
    crops = np.array([0, 4, 8]), np.array([8, 2, 0]), np.array([1, 0, 1], bool)
    x = kernels.prepare(rng.integers(0, 256, (3, 72, 72, 3), np.uint8), *crops, 64)
    targets = np.array([[1, 4], [7, -1], [0, -1]], np.int32)
    if classes is not None:
        targets = data.columns(targets, classes)
    results = one_step(build, np.float32, x, targets, classes)
    x = kernels.to_host(x).astype(np.float64)
    kernels.use("reference")
    expected = one_step(build, np.float64, x, targets, classes)
    for key, y in expected.items():
        assert np.linalg.norm(results[key] - y) < error * np.linalg.norm(y), key


def test_weights_that_are_changed_in_place_are_seen(device, rng):
    """No device keeps another form of the weights from one pass to the next."""
    (x,) = up(rng.standard_normal((2, 64, 64, 3)))

    def step(net):
        scores = net.forward_training(x, model.Context())
        _, gradients = model.training_losses(model.Softmax(), scores, np.array([3, 7]))
        net.backward(gradients)
        return kernels.to_host(scores[-1]), kernels.to_host(net.first.dw)

    net = tiny_googlenet(9)
    before, _ = step(net)
    model.SGD(net, 0.9, 5e-4).step(0.01)
    for path, layer, name in net.parameters():
        if name == "w":
            getattr(layer, name)[...] *= 0.5
    scores, dw = step(net)
    fresh_scores, fresh_dw = step(tiny_googlenet(9).load(net.state()))
    assert not np.array_equal(scores, before)
    assert np.array_equal(scores, fresh_scores) and np.array_equal(dw, fresh_dw)


# ----------------------------------------------------------------------------- planted mistakes

# a text of a kernel file, what it is changed to, and the check that must then fail
def _case(*shapes):
    return floats(np.random.default_rng(0), *shapes)


CONV, TF32, TF32X3 = (partial(check_convolution, conv_case(12), precision)
                      for precision in PRECISIONS)
DB = partial(check_convolution, (*_case((3, 14, 14, 16), (3, 3, 16, 4), (4,)), 1, 1))
PARTS = partial(check_convolution, (*_case((1, 31, 8, 3), (5, 5, 3, 70), (70,)), 1, 2))
NAIVE = partial(test_naive_convolution_agrees_with_the_reference_and_the_fast_one, None, 4)
POINTWISE = partial(test_pointwise_passes_agree_on_every_device, None, (3, 7))
POOL = partial(test_max_pooling_agrees_on_every_device, None, (3, 2, 1, True), 8)
SAMPLES = lambda: test_samples_are_the_same_on_every_device(
    None, 3, 5, 32, np.random.default_rng(0))
DROPOUT = lambda: test_dropout_draws_the_same_masks_on_every_device(
    None, 2, 37, 0.2, np.random.default_rng(0))
AVERAGE = lambda: test_average_pooling_agrees_on_every_device(
    None, 3, 2, 8, np.random.default_rng(0))
LONG = lambda: test_long_sums_in_3xtf32_are_those_of_floats(None, np.random.default_rng(0))
LRNS = lambda: test_lrn_agrees_on_every_device(
    None, 7, (5, 2.0, 1e-4, 0.75), np.random.default_rng(0))
PREPARE = lambda: test_prepare_agrees_on_every_device(None, np.random.default_rng(0))
MATMUL = lambda: test_matmul_agrees_on_every_device(None, False, np.random.default_rng(0))
SOFTMAX = lambda: test_losses_agree_on_every_device(
    None, "softmax_loss", 1, 4, 300, np.random.default_rng(0))
ONE_VS_ALL = lambda: test_losses_agree_on_every_device(
    None, "one_vs_all_loss", 2, 4, 300, np.random.default_rng(0))
UPDATE = lambda: test_updates_agree_on_every_device(
    None, np.array([5, 0, 3], np.int32), (7, 13), np.random.default_rng(0))
MISTAKES = [
    ("conv.cu", "i = oi * stride - top", "i = oi * stride + top", CONV),
    ("conv.cu", "j = oj * stride - left", "j = oj * stride - top", NAIVE),
    ("conv.cu", "i % DILATE == 0 && j % DILATE == 0", "i % DILATE == 0", CONV),
    ("conv.cu", "copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();", CONV),
    ("conv.cu", "load(tile + STAGES - 1);", "load(tile + STAGES);", CONV),
    ("conv.cu", "        __syncthreads();", "        ;", CONV),
    ("conv.cu", "if (row >= rows || col", "if (col", CONV),
    ("conv.cu", "x + at, valid", "x + at, true", CONV),
    ("conv.cu", "int rows, cols, depth, part; ", "int cols, rows, depth, part; ", CONV),
    ("conv.cu", "depth, part; ", "depth, part, more; ", CONV),                  # the size
    ("conv.cu", "(p * w + q) * int(c.d)", "(p * w + q) * cols", DB),
    ("conv.cu", "if (m >= end) i", "if (m > end) i", CONV),
    ("conv.cu", "if (bias) v[n] += bias[col + n];", "", CONV),
    ("conv.cu", "if (relu && v[n] < 0) v[n] = 0;", "", CONV),
    ("conv.cu", "blockIdx.x == 0 && threadIdx.x < BN", "threadIdx.x < BN / 2", PARTS),
    ("conv.cu", "(shape.rows + FILTER)", "shape.rows", DB),
    ("conv.cu", "if (adds && col < shape.cols)", "if (adds)", DB),
    ("conv.cu", "B_PLACE(k) (INNER && !FILTER", "B_PLACE(k) (0", TF32),
    ("conv.cu", "hi = to_tf32(x);", "hi = __float_as_uint(x);", TF32),
    ("conv.cu", "hi = to_tf32(x);", "hi = __float_as_uint(x) & 0xffffe000;", TF32),
    ("conv.cu", "rest[i] : right[i]", "right[i] : right[i]", TF32X3),
    ("conv.cu", "n == 0 ? lo : left", "left", TF32X3),
    ("conv.cu", "mma_tf32(INNER == 3 ? sum[i] : y[i][j]", "mma_tf32(y[i][j]", LONG),
    ("naive.cu", "i * s.stride + p - s.pad, col", "i * s.stride + p, col", NAIVE),
    ("naive.cu", "if (!s.inside(row, col)) continue;", "", NAIVE),
    ("naive.cu", "row % s.stride || col % s.stride", "row % s.stride", NAIVE),
    ("naive.cu", "i + s.pad - p, col", "i - s.pad + p, col", NAIVE),
    ("naive.cu", "if (s.inside(row, col)) sum", "sum", NAIVE),
    ("pool.cu", "int h, w, c, oh, ow,", "int h, w, c, oh, ow, more,", POOL),
    ("pool.cu", "!(value.at[e] > most.at[e])", "!(value.at[e] >= most.at[e])", POOL),
    ("pool.cu", "&& !is_nan) continue;", ") continue;", POOL),
    ("pool.cu", "where.at[e] = first;", "where.at[e] = 0;", POOL),
    ("pool.cu", "j + pad - oj * stride;", "j - oj * stride;", POOL),
    ("pool.cu", "mean.at[e] /= window.kernel * window.kernel;", "", AVERAGE),
    ("pool.cu", "given.at[e] / (window.kernel * window.kernel)", "given.at[e]", AVERAGE),
    ("lrn.cu", "sqrtf(s) * sqrtf(sqrtf(s))", "s", LRNS),
    ("lrn.cu", "near < min(c, channel + half + 1)", "near < channel + half + 1", LRNS),
    ("lrn.cu", "* sum;", ";", LRNS),
    ("prepare.cu", "flip ? crop - 1 - at % crop", "flip ? crop - at % crop", PREPARE),
    ("prepare.cu", "fmaxf(sqrtf(static_cast<float>(variance)), 1.0f)", "sqrtf(variance)", PREPARE),
    ("random.cu", "row * blocks + index", "index", DROPOUT),
    ("random.cu", "bits >= threshold", "bits < threshold", DROPOUT),
    ("random.cu", "step + index / count", "step", SAMPLES),
    ("random.cu", "word ? class_ends[word - 1] : 0", "class_ends[word]", SAMPLES),
    ("random.cu", "= spare + 1;", "= spare;", SAMPLES),
    ("pointwise.cu", "y[at] > 0 ? dy[at] : 0", "y[at] >= 0 ? dy[at] : 0", POINTWISE),
    ("pointwise.cu", "if (c) number += c[at];", "", POINTWISE),
    ("pointwise.cu", "z = 0; z < count", "z = 1; z < count", PARTS),
    ("pointwise.cu", "if (bias) sum += bias[at % cols];", "", MATMUL),
    ("loss.cu", "shift && !is_target(targets, slots, col)", "shift", SOFTMAX),
    ("loss.cu", "ds[targets[slot]] -= weights[slot];", "", SOFTMAX),
    ("loss.cu", "__syncthreads();                                        // the products",
     ";                                        // the products", SOFTMAX),
    ("loss.cu", "carried ? positive[col] : negative[col]", "negative[col]", ONE_VS_ALL),
    ("loss.cu", "carried ? -sigmoid : sigmoid", "sigmoid", ONE_VS_ALL),
    ("sgd.cu", "static_cast<long long>(rows[at / e]) * e", "at / e * e", UPDATE),
    ("sgd.cu", "decay * w[to]", "decay", UPDATE),
]


def is_caught(file, right, wrong, check):
    """Whether the check fails where a kernel's text is wrong."""
    with emulated(range(3), lambda text: text.replace(right, wrong, 1)):
        try:
            check()
        except (AssertionError, RuntimeError):
            return True
    return False


CATCHING = """
import test_weak
for number in map(int, sys.argv[1:]):
    print(number, test_weak.is_caught(*test_weak.MISTAKES[number]), flush=True)
"""


@pytest.fixture(scope="session", autouse=True)
def mistake_is_caught(request):
    """mistake_is_caught(number) of MISTAKES.

    A process of its own finds out from the session's beginning on, while other tests run, since
    a compilation for each mistake takes a minute in all. It gives way to them.
    """
    numbers = [str(item.callspec.params["number"]) for item in request.session.items
               if item.name.startswith("test_mistake_in_a_kernel_is_caught")]
    if not EMULATOR or not numbers:
        yield None
        return
    emulate.compiled()                          # in this process, which removes the folder
    process = subprocess.Popen([sys.executable, "-c", IMPORTING + CATCHING, *numbers],
                               stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.nice(5))
    found = {}

    def mistake_is_caught(number):
        while number not in found:
            line = process.stdout.readline()
            assert line, "the process that plants mistakes has ended; see what it said"
            planted, caught = line.split()
            found[int(planted)] = caught == "True"
        return found[number]

    with process:
        yield mistake_is_caught
        process.kill()


@pytest.mark.parametrize("number", range(len(MISTAKES)),
                         ids=[f"{file}: {right}" for file, right, _, _ in MISTAKES])
def test_mistake_in_a_kernel_is_caught(number, mistake_is_caught):
    file, right, _, _ = MISTAKES[number]
    with open(os.path.join(HERE, "kernels", file)) as opened:
        assert right in opened.read()
    if not EMULATOR:
        pytest.skip("no C++ compiler to run the kernels with")
    assert mistake_is_caught(number)


@pytest.mark.parametrize("body, message", [
    ("y[blockIdx.x * 64 + threadIdx.x + 1] = 0;", "out of bounds, argument 1 of 1, byte 512"),
    ("y[threadIdx.x] = y[(int)threadIdx.x - 1];", "out of bounds, argument 1 of 1, byte -4"),
    ("y[126] = 0;", "a write beside argument 1 of 1"),
    ("shared_memory()[64 + threadIdx.x] = 0;", "out of bounds of shared memory"),
    ("if (threadIdx.x < 32) __syncthreads();", "not all threads reach in block .*, thread"),
    ("if (threadIdx.x) { __syncthreads(); } else {\n __syncthreads(); }", "not all threads reach"),
    ("if (threadIdx.x % 32) __shfl_xor_sync(~0u, 1, 1);", "not all lanes reach"),
    ("y[0] += 1; y[1] = y[0] * threadIdx.x;", "a race"),
    ("y[64 * blockIdx.x] = 2 * y[0] + blockIdx.x + 1;", "a race"),
    ("y[threadIdx.x] = shared_memory()[threadIdx.x ^ 1]; shared_memory()[threadIdx.x] = 1;",
     "a race"),
    ("*(float2*)(y + 1) = make_float2(0, 0);", "misaligned"),
])
def test_emulator_finds_what_a_gpu_would_hide(body, message):
    code = f'#line 1 "bad.cu"\nextern "C" __global__ void bad(float* y)\n{{\n{body}\n}}\n'
    with emulated(range(3)), pytest.raises(RuntimeError, match="^bad: .*" + message):
        EMULATOR.launch(code, (), "bad", (2,), (64,), (np.zeros(125, np.float32),), shared=256)


def test_failed_launch_leaves_nothing_for_the_next_device(rng):
    (x,) = floats(rng, (2, 3))
    with emulated(change=lambda text: text.replace("if (at >= total) return;", "")):
        kernels.relu_backward(*up(x, x))        # queued, but never waited for
    with emulated():
        assert np.array_equal(kernels.to_host(kernels.sum_gradients(up(x))), x)


@pytest.mark.parametrize("architecture", ["75", "80", "86", "89", "90", "100", "120"])
def test_kernels_compile_for(architecture):
    """All files; of conv.cu three variants, in which each constant takes every value.

    For 7.5, which has no TF32, every variant. (`bench.py resources` compiles all of them for 9.0.)
    """
    pytest.importorskip("cupy")
    few = [gpu.conv_defines(*constants) for constants in (
        (128, 3, 1, 0, 0), (96, 3, 4, 0, 1), (32, 3, 4, 1, 3))]
    chosen = [variant for variant in bench.variants(architecture != "75")
              if architecture == "75" or variant[0] != "conv.cu" or variant[1] in few]
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(lambda variant: bench.compile_for(architecture, *variant)[0], chosen))


# ------------------------------------------------------------- the GPU's host code, on a stand-in

@pytest.fixture
def on_device(mine, train, monkeypatch):
    """on_device(option, …): what weak.main prints of a few steps on the emulated GPU."""
    tiny = model.NETWORKS["small"]._replace(build=tiny_googlenet)
    monkeypatch.setitem(model.NETWORKS, "small", tiny)
    monkeypatch.setattr(weak, "VALIDATED", 4)
    mine += ["--epoch-size", 8, "--batch", 2, "--epochs", 1]

    def on_device(*options, **limits):
        with emulated(**limits):
            return train(*mine, *options)
    return on_device


@pytest.mark.parametrize("options", [
    ["--sampling", "image", "--loss", "one-vs-all"], ["--targets", "batch"],
    ["--targets", "sampled", "--negatives", 5, "--loss", "one-vs-all"]])
def test_training_on_a_gpu_is_that_on_the_cpu_and_goes_on_there(options, mine, on_device, train):
    said = on_device(*options, "--out", "gpu", "--precision", "fp32")
    assert "device: emulated, fp32" in said and "MB an image" in said and "epoch 1" in said
    train(*mine, *options, "--out", "cpu")
    assert not differing("cpu", "gpu", 1e-3)
    again = "--resume", "--out", "gpu", "--epochs"
    assert "going on at step 4" in on_device(*again, 2, "--precision", "tf32")
    assert "going on at step 8" in train(*again, 3)


def test_gpu_with_too_little_memory_or_too_old_is_refused(on_device):
    for free, remedy in ((700 << 10, "--batch [1-3] or less"), (30 << 10, "--device cpu")):
        with pytest.raises(ValueError, match=f"--batch 4 does not fit .* use {remedy}"):
            on_device("--batch", 4, "--out", f"r{free}", free=free)
    with pytest.raises(RuntimeError, match="no GPU can be used .*too old"):
        on_device("--out", "old", "--device", "gpu", shared=48 << 10)


RANKS_ON_GPUS = """
import model, test_weak, weak
model.NETWORKS["small"] = model.NETWORKS["small"]._replace(build=test_weak.tiny_googlenet)
weak.VALIDATED = 4
with test_weak.emulated(gpus={gpus}):
    test_weak.console.run_command(weak.main)
"""


def test_ranks_on_gpus_sum_by_nccl(mine, on_device, train):
    mine += ["--precision", "fp32", "--seed", 3]
    run(*mine, "--out", "gpus", ranks=2, code=RANKS_ON_GPUS.format(gpus=2))
    train(*mine, "--out", "cpu")
    assert not differing("cpu", "gpus", 1e-3)
    done = run(*mine, "--out", "x", ranks=2, code=RANKS_ON_GPUS.format(gpus=1), expect=1)
    assert "2 ranks on a machine with 1 GPUs" in done.stderr


def test_experiments_run_on_a_gpu(on_device, photos, tmp_path):
    on_device("--out", "r")
    words = [line.split("\t")[0] for line in open("r/words.txt")]
    pairs = zip(words[::2], words[1::2])
    lines = [f"{a}\t{b}\t{i}\n" for i, (a, b) in enumerate(pairs)]
    (tmp_path / "pairs.txt").write_text("".join(lines))
    for i, name in enumerate(data.list_photos(photos)[-12:]):
        folder = tmp_path / "classes" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / name, folder)
    few = ["--images", "classes"]
    commands = [
        ["words", *few], ["tag", "classes"], ["search", words[0], *few, "--out", "s.png"],
        ["features", *few, "--crops", "10", "--out", "f.npz"],
        ["nearest-photos", "classes/0/" + os.listdir("classes/0")[0], *few],
        ["transfer", *few, "--splits", "1"], ["similar", "--pairs", "pairs.txt"],
        ["translate", "--pairs", "pairs.txt"], ["neighbors", words[0]],
        ["map", *few, "--steps", "3", "--out", "m.png"],
        ["report", *few, "--steps", "3", "--out", "r.html"]]
    results = {}
    for command in commands:
        for device in ("gpu", "cpu"):
            with emulated():
                evaluation.main(
                    [*command, "--model", "r", "--json", "o.json", "--device", device])
            results[command[0], device] = json.load(open("o.json"))
            assert not results[command[0], device].get("failed"), (command, device)
    on_cpu = results["words", "cpu"]["loss"]
    assert results["words", "gpu"]["loss"] == pytest.approx(on_cpu, rel=1e-4)
    assert results["map", "gpu"]["kl"] > 0      # the map itself hangs on the last bits


def test_photos_that_are_not_kept_until_they_are_there_are_noticed(
        mine, on_device, train, monkeypatch):
    upload = gpu.Cuda.upload

    def forgetting(self, photos):
        there = upload(self, photos)
        self.under_way.clear()                  # the memory goes back before its copy ran
        return there

    monkeypatch.setattr(gpu.Cuda, "upload", forgetting)
    on_device("--precision", "fp32", "--out", "gpu")
    train(*mine, "--out", "cpu")
    assert differing("cpu", "gpu", 1e-3)


def test_arrays_in_another_order_are_brought_into_cs():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    with emulated():
        there = kernels.to_device(np.asfortranarray(x))
        assert there.flags.c_contiguous
        assert np.array_equal(kernels.to_host(there), x)


def test_samples_wait_for_no_other_work():
    class_photos = np.arange(12, dtype=np.uint32)
    class_ends = np.array([4, 12])
    with emulated():
        on_device = kernels.to_device(class_photos), kernels.to_device(class_ends)
        (x,) = up(np.ones((2, 3)))
        total = kernels.sum_gradients([x, x])
        kernels.sample_by_class(*on_device, 8, 0, 1, 5, 16)
        (computation,) = emulate_cupy.current
        assert computation.over < computation.begun                 # the sum is still to come
        assert (kernels.to_host(total) == 2).all()


def test_stand_in_is_as_strict_as_cupy():
    with emulated():
        cupy = gpu._device.xp
        x = kernels.to_device(np.ones((2, 3), np.float32))
        silent = [np.asarray, np.ascontiguousarray, lambda x: float(x[0, 0]),
                  lambda x: x + np.ones(3), lambda x: x.set([1])]
        if emulate_cupy.REAL:
            silent.append(np.spacing)           # which CuPy lacks
        for call in silent:
            with pytest.raises(TypeError):
                call(x)
        with pytest.raises(AttributeError):     # CuPy does not import it by itself
            cupy.cuda.nccl
        assert np.isnan(kernels.to_host(cupy.empty(3, np.float32))).all()


def test_stand_in_has_what_cupy_has():
    cupy = pytest.importorskip("cupy")
    NCCLBackend = pytest.importorskip("cupyx.distributed").NCCLBackend
    own_backend = emulate_cupy.NCCLBackend
    for real, ours in ((cupy.cuda.Stream, emulate_cupy.Stream),
                       (cupy.cuda.Event, emulate_cupy.Event), (cupy.ndarray, emulate_cupy.ndarray),
                       (cupy.RawModule, emulate.RawModule), (cupy.RawKernel, emulate.RawKernel),
                       (NCCLBackend, own_backend)):
        own = set(vars(ours)) - {"add", "run", "stream", "place"}
        assert {name for name in own if name[0] != "_"} <= set(dir(real)), ours
    for name in ("__init__", "all_reduce"):
        ours = inspect.signature(getattr(own_backend, name)).parameters
        assert list(ours) == [name for name in inspect.signature(
            getattr(NCCLBackend, name)).parameters if name in ours]
    for name in ("alloc_pinned_memory", "get_current_stream", "Device", "runtime.memGetInfo",
                 "runtime.getDeviceProperties", "runtime.getDeviceCount"):
        assert emulate_cupy.real_has("cuda." + name)
    for name in ("set_compute_type", "COMPUTE_TYPE_TF32", "COMPUTE_TYPE_FP32"):
        assert emulate_cupy.real_has("_core._routines_linalg." + name)


# --------------------------------------------------------------------------------- metrics

def test_auc_and_average_precision_are_worked_out_by_hand():
    scores = np.array([[0.9, 0.5], [0.8, 0.5], [0.7, 0.5], [0.1, 0.5]])
    carried = np.array([[1, 1], [0, 0], [1, 0], [0, 1]], bool)
    auc, ap = evaluation.auc_and_ap(scores, carried)
    assert auc == pytest.approx([3 / 4, 1 / 2])
    assert ap[0] == pytest.approx((1 + 2 / 3) / 2)


def test_auc_is_the_fraction_of_pairs_in_the_right_order(rng):
    scores = rng.standard_normal((40, 6))
    carried = rng.random((40, 6)) < 0.3
    carried[:, 4] = False                       # no photo's word
    carried[:, 5] = True                        # every photo's word
    auc, ap = evaluation.auc_and_ap(scores, carried)
    for word in range(4):
        positives = scores[carried[:, word], word]
        negatives = scores[~carried[:, word], word]
        assert auc[word] == pytest.approx(np.mean(positives[:, None] > negatives))
    assert np.isfinite(ap[:4]).all()
    assert np.isnan(auc[4:]).all() and np.isnan(ap[4:]).all()


@pytest.mark.parametrize("positives", [1, 2, 5])
def test_chance_of_average_precision_is_the_mean_over_all_orders(positives):
    orders = np.array(list(itertools.permutations(range(6)))).T     # (6, 720)
    _, ap = evaluation.auc_and_ap(-orders.astype(float), orders * 0 + np.arange(6)[:, None]
                                  < positives)
    assert evaluation.chance_of_ap(positives, 6) == pytest.approx(ap.mean())


@pytest.fixture
def scored(rng):
    """9 photos with features (9, 4), 12 words with counts, and which photo carries which word."""
    output = model.Output(4, 12)
    output.w = rng.standard_normal((12, 4))
    output.b = rng.standard_normal(12)
    carried = rng.random((9, 12)) < 0.3
    carried[:, 0] = True
    carried[:, [5, 11]] = False
    carried[:4, 3] = True
    return rng.standard_normal((9, 4)), output, carried, rng.integers(1, 30, 12)


def metrics_of(scored, loss="softmax", shift=None):
    features, output, carried, counts = scored
    targets = [np.flatnonzero(row) for row in carried]
    scorer = evaluation.Scorer(features, output, model.LOSSES[loss](counts / 30), shift)
    return evaluation.word_metrics(scorer, targets, csr_array(carried), counts)


BLOCKS = pytest.mark.parametrize("block", [evaluation.BLOCK, 60])   # 60: 5 photos, or a word


@BLOCKS
def test_precision_is_that_of_a_plain_computation(block, scored, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", block)
    features, output, carried, counts = scored
    result = metrics_of(scored)
    best = np.argsort(-(features @ output.w.T + output.b), axis=1)              # (9, 12)
    often = np.argsort(-counts, kind="stable")
    for k in (1, 5, 10):
        key = f"precision@{k}"
        right = np.take_along_axis(carried, best[:, :k], 1)
        assert result[key] == pytest.approx(right.mean())
        assert result["baseline"][key] == pytest.approx(carried[:, often[:k]].mean())
        assert result["chance"][key] == pytest.approx(carried.mean())
        most = np.minimum(carried.sum(axis=1), k)
        assert result["ceiling"][key] == pytest.approx((most / k).mean())


@BLOCKS
def test_means_over_words_leave_out_those_of_no_photo_and_of_all(block, scored, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", block)
    features, output, carried, counts = scored
    result = metrics_of(scored)
    log_p = log_softmax(features @ output.w.T + output.b, axis=1)
    auc, ap = evaluation.auc_and_ap(log_p, carried)
    often = np.argsort(-counts, kind="stable")
    mixed = carried.any(axis=0) & ~carried.all(axis=0)
    assert result["words"] == mixed.sum() < 12
    assert result["dictionary"] == 12
    assert result["auc"] == pytest.approx(auc[mixed].mean())
    assert result["map"] == pytest.approx(ap[mixed].mean())
    chance = evaluation.chance_of_ap(carried[:, mixed].sum(axis=0), 9)
    assert result["chance"]["map"] == pytest.approx(chance.mean())
    assert result["auc_rare"] == pytest.approx(np.nanmean(auc[often[-4:]]))
    assert result["map_rare"] == pytest.approx(np.nanmean(ap[often[-4:]]))
    assert result["auc_frequent"] == pytest.approx(np.nanmean(auc[often[:4]]))
    deciles = result["deciles"]
    assert [row["words"] for row in deciles.values()] == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert deciles["1 of 10"]["auc"] == pytest.approx(np.nanmean(auc[often[:2]]))


@BLOCKS
def test_held_out_loss_is_that_of_a_plain_computation(block, scored, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", block)
    features, output, carried, counts = scored
    s = features @ output.w.T + output.b                            # (9, 12)
    softmax = -(log_softmax(s, axis=1) * carried).sum(axis=1) / carried.sum(axis=1)
    assert metrics_of(scored, "softmax")["loss"] == pytest.approx(softmax.mean())
    frequency = counts / 30
    positives = carried / frequency * np.log1p(np.exp(-s))
    negatives = ~carried / (1 - frequency) * np.log1p(np.exp(s))
    one_vs_all = (positives + negatives).sum(axis=1) / 12
    assert metrics_of(scored, "one-vs-all")["loss"] == pytest.approx(one_vs_all.mean())


@pytest.mark.parametrize("loss, unchanged", [("softmax", True), ("one-vs-all", False)])
def test_ranks_of_photos_ignore_what_softmax_leaves_free(loss, unchanged, scored, rng):
    """A number added to all scores of a photo changes no p: here, by another column of w."""
    features, output, carried, counts = scored
    result = metrics_of(scored, loss)
    moved = model.Output(5, 12)
    moved.w = np.hstack([output.w, np.ones((12, 1))])
    moved.b = output.b
    noise = 5 * rng.standard_normal((9, 1))     # one for each photo
    again = metrics_of((np.hstack([features, noise]), moved, carried, counts), loss)
    keys = ("auc", "map", "auc_frequent", "auc_rare", "map_frequent", "map_rare", "loss")
    same = [again[key] == pytest.approx(result[key], rel=1e-9) for key in keys]
    assert same == [unchanged] * len(keys)
    assert again["precision@5"] == result["precision@5"]


@BLOCKS
def test_prior_moves_words_within_a_photo_and_the_loss_of_softmax(block, scored, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", block)
    features, output, carried, counts = scored
    shift = np.log(counts)
    with_prior = model.Output(4, 12)
    with_prior.w = output.w
    with_prior.b = output.b + shift
    for loss in model.LOSSES:
        result = metrics_of(scored, loss, shift)
        in_biases = metrics_of((features, with_prior, carried, counts), loss)
        for key in ("precision@1", "precision@10", "auc", "map"):
            assert result[key] == pytest.approx(in_biases[key])
        one_vs_all = loss == "one-vs-all"       # whose class weights stand in the prior's place
        expected = metrics_of(scored, loss) if one_vs_all else in_biases
        assert result["loss"] == pytest.approx(expected["loss"])


def test_deviations_over_photos_are_those_of_many_samples(rng):
    """Of AUC by Hanley and McNeil's formula, of precision as of any mean."""
    n = 400
    output = model.Output(1, 30)
    output.w = np.zeros((30, 1))
    output.b = np.zeros(30)
    output.w[0] = 1
    carried = np.zeros((n, 30), bool)
    carried[:100, 0] = True
    features = rng.standard_normal((n, 1)) + carried[:, :1]
    scorer = evaluation.Scorer(features, output, model.OneVersusAll(np.full(30, 0.1)))
    marks = csr_array(carried)
    found = evaluation.deviations(scorer, marks)
    auc, _ = evaluation.auc_and_ap(features, carried[:, :1])
    auc = auc[0]
    q1 = auc / (2 - auc) - auc**2
    q2 = 2 * auc**2 / (1 + auc) - auc**2
    expected = math.sqrt((auc * (1 - auc) + 99 * q1 + 299 * q2) / (100 * 300))
    assert found["auc"] == pytest.approx(expected, rel=0.2)
    hits = evaluation.photo_hits(scorer, marks)[:, 0]
    assert found["precision@1"] == pytest.approx(hits.std() / math.sqrt(n), rel=0.2)
    assert 0.5 * found["auc"] < found["map"] < 4 * found["auc"]


def test_counted_photos_have_the_auc_of_their_copies(rng):
    scores = rng.standard_normal(12)
    carried = rng.random(12) < 0.4
    counts = rng.integers(0, 4, (12, 2))
    values = evaluation.weighted_auc_and_ap(scores, carried, counts.astype(np.float32))
    for (auc, _), count in zip(values.T, counts.T):
        copies = np.repeat(np.arange(12), count)
        expected, _ = evaluation.auc_and_ap(scores[copies, None], carried[copies, None])
        np.testing.assert_allclose(auc, expected[0], rtol=1e-5)
    plain = evaluation.weighted_auc_and_ap(scores, carried, np.ones((12, 1), np.float32))
    auc, ap = evaluation.auc_and_ap(scores[:, None], carried[:, None])
    assert plain[:, 0] == pytest.approx([auc[0], ap[0]])


def test_sample_without_a_photo_of_either_kind_has_neither_auc_nor_ap():
    scores = np.array([0.3, 0.2, 0.1])
    carried = np.array([True, True, False])
    weights = np.array([[1, 1, 0], [2, 0, 0], [0, 2, 3]], np.float32)
    auc, ap = evaluation.weighted_auc_and_ap(scores, carried, weights)
    assert np.isnan(auc).tolist() == np.isnan(ap).tolist() == [True, False, True]
    assert auc[1] == ap[1] == 1


def perfect_scorer(carried, noise=0.0):
    """Scores that say which words each photo carries; the features are the photos' numbers."""
    n, k = carried.shape
    output = model.Output(n, k)
    output.w = 8 * carried.T + noise
    output.b = np.zeros(k)
    return evaluation.Scorer(np.eye(n), output, model.Softmax())


def test_photos_and_their_words_find_each_other(rng):
    """Also where a frequent word makes the words of some photos likely for all."""
    carried = np.zeros((12, 20), bool)
    carried[:, 0] = True                        # every photo's word
    carried[1:, 1:12] = np.eye(11)              # the first has no other
    carried[5, 12:] = True                      # and one has many
    carried[11] = carried[10]                   # two are equal, and as good as each other
    result = evaluation.retrieve_photos(perfect_scorer(carried), csr_array(carried))
    assert result["candidates"] == 12
    for way in ("photo for its words", "words for their photo"):
        assert result[way]["precision@1"] >= 11 / 12
        assert result[way]["chance"]["precision@1"] == pytest.approx((10 + 2 * 2) / 12 / 12)


def test_threshold_of_the_best_f1_is_found_by_trying_all(rng):
    scores = np.round(rng.standard_normal(60), 1)                   # some are equal
    carried = rng.random(60) < 1 / (1 + np.exp(-2 * scores))
    cut, f1 = evaluation.best_f1(scores, carried)

    def f1_at(cut):
        called = scores >= cut
        return 2 * (called & carried).sum() / (called.sum() + carried.sum())

    assert f1 == pytest.approx(f1_at(cut)) == pytest.approx(max(f1_at(s) for s in scores))
    assert cut not in scores


def test_table_of_words_has_thresholds_where_enough_photos_are(rng):
    carried = rng.random((40, 4)) < np.array([0.3, 0.4, 0, 0])
    carried[:4, 2] = True                       # 4 photos are too few
    scorer = perfect_scorer(carried, rng.standard_normal((4, 40)))
    rows = evaluation.table_of_words(scorer, csr_array(carried), "abcd", np.arange(4), 7)
    named = [dict(zip(evaluation.WORD_COLUMNS, row)) for row in rows]
    assert [row["word"] for row in named] == list("abcd")
    assert [row["photos"] for row in named] == carried.sum(axis=0).tolist()
    assert all(row["threshold"] > 0 and row["f1"] > 0.5 for row in named[:2])
    assert named[2]["threshold"] == "" and named[2]["auc"] > 0.5
    assert named[3]["auc"] == ""
    p = model.Softmax().probabilities(scorer.output.scores(scorer.features))
    called = p[:, 0] >= named[0]["threshold"]
    f1 = 2 * (called & carried[:, 0]).sum() / (called.sum() + carried[:, 0].sum())
    assert named[0]["f1"] == pytest.approx(f1)


def test_nearest_photos_lend_their_words_by_rank():
    training = np.array([[1.0, 0], [0.9, 0.1], [-1, 0], [0, -1]])   # with a mean near 0
    labels = csr_array(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]], bool))
    x = np.array([[2.0, 0.0], [-3.0, 0.1]])
    nearest = evaluation.score_by_nearest(x, training, labels)
    (_, scores), = nearest.word_blocks()
    # photo 0 is nearest, then 1, 3 and 2; from the other side, 2, 3, 1 and 0 are
    np.testing.assert_allclose(scores, [[1 + 1 / 3, 1 / 2, 0], [1 / 2 + 1 / 4, 1 / 3, 0]])
    (_, blocks), = nearest.photo_blocks()
    assert np.argsort(-blocks[0]).tolist() == [0, 1, 2]
    assert len(nearest) == 2 and nearest.words == 3
    np.testing.assert_allclose(nearest.of_words([2, 0]), scores[:, [2, 0]], atol=1e-5)
    (_, second), = nearest.take([1]).photo_blocks()
    assert np.array_equal(second, blocks[1:])


def test_words_that_no_near_photo_has_are_ordered_by_frequency(monkeypatch):
    monkeypatch.setattr(evaluation, "NEAREST", 1)
    training = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    labels = csr_array(np.array([[1, 0, 0], [0, 0, 1], [0, 1, 1], [0, 0, 1]], bool))
    nearest = evaluation.score_by_nearest(np.array([[5.0, 1.0]]), training, labels)
    (_, scores), = nearest.photo_blocks()
    assert np.argsort(-scores[0]).tolist() == [0, 2, 1]
    assert np.argsort(-nearest.of_words([0, 1, 2])[0]).tolist() == [0, 2, 1]


@pytest.fixture
def told_by_photos(rng):
    """5 photos (5, 6), 80 of the training, and the words of these, (80, 7), which x tells."""
    training = rng.standard_normal((80, 6)) + 3
    labels = training @ rng.standard_normal((6, 7)) + rng.standard_normal((80, 7)) > 4
    return rng.standard_normal((5, 6)) + 3, training, labels


def plain_ridge(x, y, penalty):
    """w (D, K) and b (K,) of the least |x w + b - y|² + λ |w|², as equations of all unknowns."""
    d = x.shape[1]
    ones = np.hstack([x, np.ones((len(x), 1))])                     # (N, D+1)
    variance = ((x - x.mean(axis=0)) ** 2).sum() / d
    penalties = np.diag([penalty * variance] * d + [0])             # not of b
    table = np.linalg.solve(ones.T @ ones + penalties, ones.T @ y)
    return table[:-1], table[-1]


@pytest.mark.parametrize("block", [evaluation.BLOCK, 12])           # 12: 2 words at a time
def test_regression_of_words_is_that_of_a_plain_computation(block, told_by_photos, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", block)
    x, training, labels = told_by_photos
    centred, others = evaluation.directions(x, training)
    np.testing.assert_allclose(np.linalg.norm(others, axis=1), 1, rtol=1e-5)
    errors = []
    for penalty in evaluation.RIDGE:                                # 8 of 80 photos are held back
        w, b = plain_ridge(others[8:].astype(np.float64), labels[8:], penalty)
        errors.append(((others[:8] @ w + b - labels[:8]) ** 2).sum())
    best = evaluation.RIDGE[np.argmin(errors)]
    assert min(evaluation.RIDGE) < best < max(evaluation.RIDGE)
    assert evaluation.choose_ridge(others, csr_array(labels.astype(np.float32))) == best
    w, b = plain_ridge(others.astype(np.float64), labels, best)
    scorer = evaluation.score_by_regression(x, training, csr_array(labels))
    scores = scorer.of_words(np.arange(7))
    np.testing.assert_allclose(scores, centred @ w + b, atol=1e-4)
    for photos, raw in scorer.take([3, 1]).photo_blocks():
        np.testing.assert_allclose(raw, scores[[3, 1]][photos], atol=1e-5)


def test_regression_of_words_takes_very_few_photos(told_by_photos):
    x, training, labels = told_by_photos
    for count in (2, 11):                       # without one to choose λ by, and with one
        scorer = evaluation.score_by_regression(x, training[:count], csr_array(labels[:count]))
        assert np.isfinite(scorer.of_words(np.arange(7))).all()


def test_better_readout_is_named():
    names = list(evaluation.READOUTS)
    scores = {f"{name}: a": {"auc": i, "map": -i} for i, name in enumerate(names)}
    assert evaluation.best_readout(scores, "a", "auc") == (names[-1], len(names) - 1)
    assert evaluation.best_readout(scores, "a", "map") == (names[0], 0)


def test_csls_is_worked_out_by_hand():
    cosines = np.array([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3]])
    # with k = 2: rows have means .85 and .5; columns .8, .5 and .2
    expected = 2 * cosines - np.array([[0.85], [0.5]]) - np.array([0.8, 0.5, 0.2])
    np.testing.assert_allclose(evaluation.csls(cosines, 2), expected)


def test_retrieval_and_its_chance_are_worked_out_by_hand():
    scores = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 2, 3, 0]])
    right = np.array([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], bool)
    result = evaluation.retrieval(scores, right, (1, 2, 9))
    assert [result[f"precision@{k}"] for k in (1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    # two of four columns drawn: one right is missed with 3/4·2/3, two with 2/4·1/3; none: always
    chance = [(1 / 4 + 2 / 4 + 0) / 3, (1 / 2 + 5 / 6 + 0) / 3, 2 / 3]
    assert [result["chance"][f"precision@{k}"] for k in (1, 2, 9)] == pytest.approx(chance)


def test_photos_of_words_are_the_training_photos_of_an_index(index):
    carried = evaluation.word_photos(index).toarray()               # (K, photos)
    assert not carried[:, :index.held_out].any()
    for photo in range(index.held_out, len(index)):
        assert np.flatnonzero(carried[:, photo]).tolist() == index.words(photo).tolist()


def test_company_of_words_is_their_mutual_information(rng):
    carried = rng.random((7, 40)) < 0.3
    carried[6] = False                          # a word of no photo
    together = Counter()
    for photo in carried.T:
        for pair in itertools.permutations(np.flatnonzero(photo).tolist(), 2):
            together[pair] += 1
    total = sum(together.values())
    alone = Counter()
    for (i, _), count in together.items():
        alone[i] += count
    expected = np.zeros((7, 7))
    for (i, j), count in together.items():
        chance = alone[i] / total * alone[j] / total
        expected[i, j] = max(0, math.log(count / total / chance))
    company = evaluation.ppmi(csr_array(carried.astype(np.float32)))
    np.testing.assert_allclose(company.toarray(), expected, atol=1e-6)
    lengths = np.linalg.norm(evaluation.sparse_units(company).toarray(), axis=1)
    np.testing.assert_allclose(lengths[:6], 1, rtol=1e-6)
    assert lengths[6] == 0


def test_equal_scores_are_in_a_random_order():
    scores = evaluation.break_ties(np.zeros((2000, 10)))
    firsts = np.bincount(scores.argmax(axis=1), minlength=10)
    assert abs(firsts - 200).max() < 60         # 4 deviations
    unequal = evaluation.break_ties(np.array([[0.1, 0.1 + 1e-6]]))
    assert unequal.argmax() == 1


# ------------------------------------------------------------------------------ regression

def test_regression_gradient_is_numerical(rng):
    x = rng.standard_normal((13, 4))
    y = rng.integers(0, 3, 13)
    flat = rng.standard_normal(5 * 3)
    _, gradient = evaluation.logistic(flat, x, y, 0.3)
    check_numerically(lambda: evaluation.logistic(flat, x, y, 0.3)[0], flat, gradient)


def test_regression_loss_is_worked_out_by_hand():
    x = np.array([[1.0], [0.0]])
    y = np.array([0, 1])
    table = np.array([[2.0, 0.0], [0.0, 0.0]])                      # w, then b
    loss, _ = evaluation.logistic(table.ravel(), x, y, 0.5)
    photos = [math.log(1 + math.exp(-2)), math.log(2)]              # the losses of the two photos
    assert loss == pytest.approx(sum(photos) / 2 + 0.5 / 2 * 2.0 ** 2)


def test_penalty_is_chosen_on_held_out_photos(rng):
    x = rng.standard_normal((60, 40))
    y = rng.integers(0, 2, 60)
    held = evaluation.split(y, lambda n: n // 5, 0, 1)
    other = evaluation.split(y, lambda n: n // 3, 0, 2)
    judged = []

    def goodness(scores, labels):
        judged.append(labels)
        return -float(np.abs(scores).sum())                         # the strongest has the least

    _, penalty = evaluation.choose_penalty(x, y, [held, other], goodness)
    assert penalty == evaluation.PENALTIES[0]
    count = len(evaluation.PENALTIES)
    assert len(judged) == 2 * count
    assert all(np.array_equal(labels, y[held]) for labels in judged[:count])
    assert all(np.array_equal(labels, y[other]) for labels in judged[count:])


def test_penalty_is_the_usual_one_if_no_photo_can_be_held_out(rng):
    x = rng.standard_normal((6, 3))
    _, penalty = evaluation.choose_penalty(x, np.array([0, 0, 0, 1, 1, 1]), [], None)
    assert penalty == 1e-4


def test_few_photos_choose_the_penalty_in_five_turns():
    y = np.array([0] * 40 + [1] * 19 + [2])     # of the last class there is none to spare
    folds = evaluation.fold_masks(y, 0, 1)
    assert len(folds) == 5
    assert np.array_equal(np.sum(folds, axis=0), y != 2)            # each of the others once
    for held in folds:
        assert held[y == 0].sum() == 8 and 3 <= held[y == 1].sum() <= 4
    assert len(evaluation.fold_masks(y[:59], 0, 1)) == 5
    many, = evaluation.fold_masks(np.repeat([0, 1], 20), 0, 1)
    assert many[:20].sum() == many[20:].sum() == 4
    assert evaluation.fold_masks(np.array([0, 1, 2]), 0, 1) == []


def test_split_takes_of_each_class_and_is_a_function_of_seed_and_number(rng):
    y = rng.integers(0, 3, 50)
    mask = evaluation.split(y, lambda n: n // 3, seed=5, number=2)
    for label in range(3):
        assert mask[y == label].sum() == (y == label).sum() // 3
    assert np.array_equal(mask, evaluation.split(y, lambda n: n // 3, 5, 2))
    assert not np.array_equal(mask, evaluation.split(y, lambda n: n // 3, 5, 3))
    assert not np.array_equal(mask, evaluation.split(y, lambda n: n // 3, 6, 2))


def test_voc_average_precision_is_worked_out_by_hand():
    scores = np.array([[0, 0.9], [0, 0.8], [0, 0.7], [0.1, 0.7], [0, 0.5]])
    # recalls up to 0.5 have precision 1, the others 2/3: points 0 to 0.5 are six, five follow
    ap = evaluation.voc_ap(scores, np.array([1, 0, 1, 0, 0]))
    assert ap == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert evaluation.voc_ap(scores, np.zeros(5, int)) == 0


@pytest.mark.parametrize("positives", [2, 3, 4])
def test_class_of_few_photos_has_folds_without_it(positives, rng):
    y = (np.arange(30) < positives).astype(int)
    x = rng.standard_normal((30, 4)) + y[:, None]
    everything = np.ones(30, bool)
    task = evaluation.Task("cat", y, everything, everything)
    scores = evaluation.regress(x, task, evaluation.voc_ap, 0, 1)
    assert evaluation.voc_ap(scores, y) > positives / 30


def test_chance_of_vocs_average_precision_is_the_mean_over_all_orders():
    orders = np.array(list(itertools.permutations(range(6))), float)
    y = np.array([1, 1, 0, 0, 0, 0])
    mean = np.mean([evaluation.voc_ap(np.stack([-order, order], axis=1), y) for order in orders])
    everything = np.ones(6, bool)
    task = evaluation.Task("cat", y, ~everything, everything)
    assert evaluation.Voc.chance(None, task) == pytest.approx(mean, abs=0.03)


# ------------------------------------------------------------------------------------ maps

def squared_distances(x):
    return ((x[:, None] - x) ** 2).sum(axis=2)


def test_map_affinities_have_the_perplexity(rng):
    d = squared_distances(rng.standard_normal((40, 3)))
    np.fill_diagonal(d, tsne.FAR)
    rows = tsne.conditional(d, 7)
    entropy = -(rows * np.log(np.maximum(rows, 1e-300))).sum(axis=1)
    np.testing.assert_allclose(np.exp(entropy), 7, rtol=1e-6)


def test_map_affinities_are_symmetric_and_sum_to_one(rng):
    p = tsne.affinities(rng.standard_normal((40, 3)), 7)
    assert np.array_equal(p, p.T)
    assert p.sum() == pytest.approx(1)
    assert not p.diagonal().any()


def test_map_divergence_follows_its_formula(rng):
    p = tsne.affinities(rng.standard_normal((40, 3)), 7)
    y = rng.standard_normal((40, 2))
    near = 1 / (1 + squared_distances(y))
    np.fill_diagonal(near, 0)
    q = near / near.sum()
    others = ~np.eye(40, dtype=bool)
    kl = (p[others] * np.log(p[others] / q[others])).sum()
    assert tsne.kl_divergence(p, y) == pytest.approx(kl)


def test_map_gradient_is_numerical_in_blocks_of_any_size(rng, monkeypatch):
    p = tsne.affinities(rng.standard_normal((13, 4)), 4)
    y = rng.standard_normal((13, 2))
    for tile in (tsne.CPU_TILE, 5 * 13):                      # of all rows, or of 5
        monkeypatch.setattr(tsne, "CPU_TILE", tile)
        gradient = tsne.kl_gradient(p, y)
        check_numerically(lambda: tsne.kl_divergence(p, y), y, gradient, name="y")


def test_map_gradient_in_float32_is_that_in_float64(rng):
    """On a map as wide as one of 5,000 points: distances are differences of large numbers."""
    p = tsne.affinities(rng.standard_normal((300, 4)), 10)
    y = rng.uniform(-100, 100, (300, 2))
    y[1::2] = y[::2] + rng.uniform(-0.1, 0.1, (150, 2))             # pairs that are close
    exact = tsne.kl_gradient(p, y)
    rounded = tsne.kl_gradient(p.astype(np.float32), y.astype(np.float32))
    assert rounded.dtype == np.float32
    assert np.linalg.norm(rounded - exact) < 5e-3 * np.linalg.norm(exact)


def test_map_closeness_follows_its_formula_where_rounding_bites(rng):
    y = np.concatenate([rng.uniform(-300, 300, (50, 2)), np.full((2, 2), 299)]).astype(np.float32)
    near = tsne.closeness(tsne.with_squares(y), slice(10, 52))          # (42, 52)
    exact = 1 / (1 + squared_distances(y.astype(np.float64)))[10:52]
    np.testing.assert_allclose(near, exact, rtol=0.1)
    assert near.max() <= 1 and near.dtype == np.float32


def test_map_gradient_pulls_more_with_exaggeration(rng):
    p = tsne.affinities(rng.standard_normal((13, 4)), 4)
    y = rng.standard_normal((13, 2))
    push = -tsne.kl_gradient(0 * p, y)
    pull = tsne.kl_gradient(p, y) + push
    np.testing.assert_allclose(tsne.kl_gradient(p, y, 4), 4 * pull - push)


def test_map_parts_clusters_that_have_twins(rng, monkeypatch):
    centres = 3 * rng.standard_normal((6, 20))
    x = np.repeat(centres, 25, axis=0) + rng.standard_normal((150, 20))
    x[1::25] = x[::25]                          # in each cluster, two points are the same
    monkeypatch.setattr(tsne, "CPU_TILE", 70 * 150)
    y, kl = tsne.tsne(x, 15, 500)
    nearest = squared_distances(y).argsort(axis=1)[:, 1]
    same_cluster = nearest // 25 == np.arange(150) // 25
    assert same_cluster.mean() > 0.95
    assert 0 < kl < 2


# -------------------------------------------------------------------------------- pictures

@pytest.mark.parametrize("low, high", [(5e35, 5e35), (0.0, 0.0), (1e-12, 3.0), (-3.0, 1.0)])
def test_ticks_reach_around_their_numbers_be_they_flat_or_far_apart(low, high):
    ticks = figures.round_ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1]
    assert 2 <= len(ticks) <= 6


def test_ticks_are_round():
    ticks = figures.round_ticks(0.62, 0.71)
    assert ticks.tolist() == pytest.approx([0.62, 0.64, 0.66, 0.68, 0.7, 0.72])


def test_axis_of_a_small_score_begins_at_zero():
    curve = figures.Curve("a", [1, 2], [0.007, 0.4], [0, 0], ["", ""])
    drawing = figures.draw_plots([figures.Plot("photos", "AP", [curve], {"chance": 0.001})])
    texts = [element.text for element in ElementTree.fromstring(drawing.svg()).iter()]
    assert "0.4" in texts and "-0.1" not in texts


def dark(image):
    """How many pixels are not nearly white."""
    return int((np.asarray(image).min(axis=2) < 100).sum())


@pytest.mark.parametrize("losses", [[3.0, 1.0], [5e35, 5e35], [2.0], [float("nan")], [None], []])
def test_curves_are_drawn_of_any_log(losses):
    log = [{"epoch": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    image = figures.draw_plots(evaluation.curves_plots(log)).image()
    empty = figures.draw_plots(evaluation.curves_plots([])).image()
    assert image.width == empty.width == 480
    has_numbers = len(losses) > 0 and losses[0] is not None and math.isfinite(losses[0])
    assert (dark(image) != dark(empty)) == has_numbers


def example_plot(**changes):
    """Two curves, one with error bars, over a log scale, with two baselines."""
    first = figures.Curve("first", [100, 1000], [0.2, 0.3], [0.01, 0.0], ["3 seeds", ""])
    second = figures.Curve("second", [10, 1000], [0.1, 0.4], [0, 0], ["", ""])
    plot = figures.Plot("photos", "precision (fraction)", [first, second],
                           {"pixels": 0.15, "chance": 0.05}, log=True)
    return plot._replace(**changes)


def texts_of(drawing):
    return [shape.text for shape in drawing.shapes if isinstance(shape, figures.Text)]


def test_plot_names_axes_curves_baselines_and_error_bars():
    texts = texts_of(figures.draw_plots([example_plot()]))
    for text in ("photos (log scale)", "precision (fraction)", "first", "second", "pixels",
                 "chance", "± 1 standard deviation over 3 seeds"):
        assert texts.count(text) == 1
    assert {"10", "100", "1,000"} <= set(texts)                     # under the axis
    plain = texts_of(figures.draw_plots([example_plot(log=False)]))
    assert "photos" in plain


def test_table_of_a_plot_has_the_numbers_that_are_drawn():
    plot = example_plot()
    heading, rows = figures.plot_table([plot])
    assert heading == ["plot", "curve", "photos", "value", "deviation", "deviation over"]
    assert rows[0] == ["precision (fraction)", "first", 100, 0.2, 0.01, "3 seeds"]
    assert rows[-1] == ["precision (fraction)", "chance", "", 0.05, "", ""]
    drawing = figures.draw_plots([plot])
    frame = figures.Frame(drawing, plot, 0, 0)
    frame.set_axes()
    dots = [shape.centre for shape in drawing.shapes if isinstance(shape, figures.Dot)]
    points = [(frame.x_pixel(row[2]), frame.y_pixel(row[3])) for row in rows[:4]]
    assert np.allclose(dots[:2] + dots[2:4], points)
    heights = [shape.points[0][1] for shape in drawing.shapes
               if isinstance(shape, figures.Stroke) and shape.dash]
    assert np.allclose(heights[:2], [frame.y_pixel(row[3]) for row in rows[4:]])


def test_training_and_held_out_loss_share_a_plot_and_the_kept_epoch_is_marked():
    log = [{"epoch": epoch, "loss": 9.0, "training_loss": 3.0 - epoch, "validation_loss": 3.5,
            "precision@10": 0.1, "auc": 0.7, "map": 0.2, "map_chance": 0.05,
            "precision@10_frequent_words": 0.08} for epoch in (1, 2)]
    plots = evaluation.curves_plots(log, "softmax", (1, "best"))
    assert [curve.name for curve in plots[0].curves] == ["held-out photos", "training photos"]
    assert [plot.levels for plot in plots] == [
        {}, {"most frequent words": 0.08}, {"chance": 0.5}, {"chance": 0.05}]
    assert "best" in texts_of(figures.draw_plots(plots[:1]))
    assert "nats" in plots[0].y_name
    assert "nats" not in evaluation.curves_plots(log, "one-vs-all")[0].y_name


def test_drawing_has_as_many_pixels_as_asked_and_the_same_shapes_as_svg():
    drawing = figures.draw_plots([example_plot(y_name="a < b"), example_plot()])
    assert drawing.image().width == 960
    large = drawing.image(1920)
    assert large.size == (1920, 2 * drawing.height)
    assert 3 < dark(large) / dark(drawing.image()) < 5              # lines and letters grow, too
    root = ElementTree.fromstring(drawing.svg())
    assert root.get("viewBox") == f"0 0 960 {drawing.height}"
    assert len(root) == len(drawing.shapes)
    assert "a < b" in [element.text for element in root]


def test_words_of_a_map_lie_inside_and_those_without_room_are_left_out(rng):
    names = [f"word{i}" for i in range(30)]
    y = rng.random((30, 2))
    y[20:] = 0.5                                # ten of them in one place
    drawing = figures.words_picture(names, y, np.arange(30), 300, figures.Fonts())
    texts = texts_of(drawing)
    assert 10 < len(texts) < 30
    pixels = np.asarray(drawing.image())
    assert pixels.shape == (300, 300, 3)
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edges == 255).all()
    assert texts[0] == "word29"                 # the heaviest is first


def test_word_goes_where_there_is_room_first():
    box = np.array([-10, -5, 10, 5])
    taken = np.array([[40, 40, 60, 60]])
    points = np.array([
        [50, 50],                               # over the other word
        [5, 50],                                # over the edge
        [50, 35],                               # too near
        [50, 34]])
    assert figures.find_room(points, box, taken, 100).tolist() == [50, 34]
    assert figures.find_room(points[:3], box, taken, 100) is None


def test_words_without_a_font_are_said_once(monkeypatch, capsys):
    monkeypatch.setattr(figures, "FONTS", ())
    fonts = figures.Fonts()
    for word in ("dog", "犬", "狗犬", "bird"):
        width, height = fonts.find(word, 20).getmask(word).size
        assert width and height
    assert capsys.readouterr().err.count("fonts-noto-cjk") == 1


# -------------------------------------------------------------------------------- commands

@pytest.fixture(scope="session")
def tiny(tmp_path_factory, pictures):
    """A folder with a tiny run `r` of made-up words, its photos, and pairs of its words."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(pictures, folder / "photos")
    write_captions(folder / "captions.tsv")
    done = run("--images", "photos", "--captions", "captions.tsv", *TINY, "--epochs", 2,
               "--out", "r", folder=folder)
    (folder / "said.txt").write_text(done.stdout)
    words = [line.split("\t")[0] for line in open(folder / "r" / "words.txt")]
    write_pairs(folder, words)
    write_classes(folder / "classes")
    return folder, words


def write_pairs(folder, words):
    """29 pairs of words with scores, and 15 translations, one of them of a word by itself."""
    with open(folder / "similar.txt", "w") as file:
        file.write("one\ttwo\tscore\n")
        for i, (first, second) in enumerate(zip(words, words[1:])):
            file.write(f"{first}\t{second}\t{i}.5\n")
        file.write("no\tsuch\t1\n")
    with open(folder / "pairs.txt", "w") as file:
        for source, target in zip(words[::2], words[1::2]):
            file.write(f"{source.upper()} {target}\n")
        file.write(f"{words[0]} {words[0]}\n")


def write_classes(folder):
    """12 green photos in class0 and 12 pink ones in class1, and a broken one."""
    for i in range(24):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (250 * (i % 2), 90, 10 * i)).save(path)
    (folder / "class0" / "broken.jpg").write_text("broken")


@pytest.fixture
def ask(tiny, monkeypatch, capsys):
    """ask(command, …): what an eval command writes as JSON, and what it says, in this process."""
    monkeypatch.chdir(tiny[0])

    def ask(command, *arguments, expect=0):
        given = [command, "--json", "o.json", "--threads", 2, "--model", "r", *arguments]
        assert evaluation.main([str(argument) for argument in given]) == expect
        return json.load(open("o.json")), capsys.readouterr()
    return ask


def test_trained_is_a_class_that_help_shows():
    assert inspect.isclass(evaluation.Trained)
    assert all(inspect.isclass(kind) for kind in (figures.Fonts, evaluation.Output))


def test_run_says_which_weights_it_is_evaluated_with(tiny, ask):
    _, said = ask("neighbors", tiny[1][0])
    log = log_of(tiny[0] / "r")
    best = max(log, key=lambda row: row["map"])
    assert (f"r/best.npz: step {best['step']}, epoch {best['epoch']} of 2, held-out loss "
            f"{best['validation_loss']:.4f}") in said.err


def test_run_is_loaded_with_the_prior_of_real_photos(tiny, monkeypatch, capsys):
    monkeypatch.chdir(tiny[0])
    plain = evaluation.Trained("r", prior="none")
    assert plain.shift is None and "prior" not in capsys.readouterr().err
    trained = evaluation.Trained("r")
    said = capsys.readouterr().err
    assert "prior: words are as frequent as in photos, by an exact correction" in said
    expected = np.log(plain.counts) - np.log(plain.counts).mean()   # words are drawn alike often
    np.testing.assert_allclose(trained.shift, expected, rtol=1e-5)
    np.testing.assert_allclose(trained.net.output.b - plain.net.output.b, expected, atol=1e-5)
    assert np.array_equal(trained.learned_b, plain.net.output.b)
    # words are drawn alike often, which is what they are if all are equally frequent
    for run_of_one_prior in (plain, trained):
        equal = run_of_one_prior.equal_output().b - plain.net.output.b
        np.testing.assert_allclose(equal, equal[0], atol=1e-5)


def test_words_are_equally_frequent_after_training_by_image(tiny, monkeypatch):
    monkeypatch.chdir(tiny[0])
    run = evaluation.Trained("r")
    run.options.update(sampling="image")
    run.label_frequency = run.label_weight = run.counts / run.training
    shift = run.equal_output().b - run.learned_b
    differences = shift + np.log(run.counts)    # what frequent words have learned is taken away
    np.testing.assert_allclose(differences, differences[0], atol=1e-5)


def test_words_are_equally_frequent_as_one_versus_all_learns_them(tiny, monkeypatch):
    monkeypatch.chdir(tiny[0])
    run = evaluation.Trained("r")
    run.options.update(loss="one-vs-all")
    shift = run.equal_output().b - run.learned_b
    np.testing.assert_allclose(shift, shift[0], atol=1e-5)          # eq. 1 weighs all words alike


@pytest.mark.parametrize("options, said", [
    ({"sampling": "image"}, ""),                                    # nothing to add
    ({"positives": "all"}, "an approximate"),
    ({"positives": "all", "captions": "gone.tsv"}, "an approximate"),           # the index is there
    ({"positives": "all", "index": "gone"}, "not known"),
    ({"loss": "one-vs-all"}, "an approximate")])
def test_prior_of_an_old_run_follows_from_its_options(options, said, tiny, tmp_path, monkeypatch,
                                                      capsys):
    monkeypatch.chdir(tiny[0])
    old = data.load_checkpoint("r/best.npz")
    del old.facts["label_frequency"]
    del old.facts["label_weight"]
    old.facts["options"].update(options)
    if "index" not in options:
        shutil.copytree("r/index", tmp_path / "index")
    data.save_checkpoint(str(tmp_path / "model.npz"), old)
    trained = evaluation.Trained(str(tmp_path))
    assert (trained.shift is None) == (said in ("", "not known"))
    line = capsys.readouterr().err
    assert said in line and ("prior: " in line) == bool(said)


def test_words_are_scored_on_held_out_photos_or_on_all(tiny, ask):
    held_out, _ = ask("words")
    every, _ = ask("words", "--all")
    assert held_out["dictionary"] == every["dictionary"] == 30
    assert 0 < held_out["photos"] < every["photos"]
    index = data.Index("r/index")
    assert held_out["photos"] + held_out["skipped"] == index.held_out
    assert every["photos"] + every["skipped"] == len(index)


def test_words_have_baselines_of_the_same_photos(tiny, ask):
    result, said = ask("words")
    baselines = result["baselines"]
    index = data.Index("r/index")
    training = [index.name(i) for i in range(index.held_out, len(index))]
    readable = [name for name in training if is_whole(Path("photos", name))]
    assert baselines["training_photos"] == len(readable) > 200
    assert baselines["truth"] == {}
    names = [f"{readout}: {view}" for readout in ("50 nearest", "linear regression")
             for view in evaluation.VIEWS]
    assert list(baselines["scores"]) == names
    for name, numbers in baselines["scores"].items():
        assert numbers["words"] == result["words"]
        assert 0.3 < numbers["auc"] < 0.7       # of captions made up
        assert f"\n{name} " in said.out
    assert "baselines" not in ask("words", "--no-baselines")[0]
    assert "baselines" not in ask("words", "--all")[0]


@pytest.mark.parametrize("loss", model.LOSSES)
def test_run_may_be_scored_over_some_of_its_words(loss, tiny, rng, monkeypatch):
    monkeypatch.chdir(tiny[0])
    trained = evaluation.Trained("r")
    trained.options["loss"] = loss
    classes = np.array([7, 2, 11, 5])
    features = rng.random((6, 512)).astype(np.float32)
    targets = [np.array([i % 4]) for i in range(6)]
    words = [trained.words[i] for i in classes]
    scorer = trained.scorer(words, features)
    carried = evaluation.mark_words(targets, 4)
    result = evaluation.score_photos(scorer, targets, carried, trained.counts[classes])
    s = trained.net.output.scores(features)[:, classes]             # (6, 4)
    first = s.argmax(axis=1) == np.concatenate(targets)
    assert result["precision@1"] == pytest.approx(first.mean())
    if loss == "one-vs-all":                    # eq. 1 is measured without the prior
        s = s - trained.shift[classes]
    labels = data.Labels(np.array(targets), np.full(6, 1 / 6))
    losses, _ = trained.make_loss(trained.counts[classes])(s, labels)
    assert result["loss"] == pytest.approx(losses.sum(), rel=1e-5)


def test_words_of_several_runs_make_a_curve(tiny, ask):
    folder, _ = tiny
    lines = open(folder / "captions.tsv").read().splitlines()
    (folder / "half.tsv").write_text("\n".join(lines[:len(lines) // 2]) + "\n")
    run("--images", "photos", "--captions", "half.tsv", *TINY, "--epochs", 1, "--out", "h",
        folder=folder)
    result, said = ask("words", "h", "--out", "w.png", "--transfer", "classes", "--splits", 2,
                       "--deciles")
    small, large = result["runs"].values()
    assert 10 < result["words"] <= 30
    assert small["training_photos"] < large["training_photos"]
    assert small["photos"] == large["photos"] > 0
    for decile, numbers in large["deciles"].items():                # the same words in each row
        assert small["deciles"][decile]["photos"] == numbers["photos"]
    assert 0 <= small["transfer to classes"] <= 1 and "transfer to classes ±" in small
    assert "AUC, r" in said.out and "10 of 10" in said.out
    assert Image.open("w.png").width == 2 * 480
    assert f"{small['photos']} photos that no run trained on" in said.out
    with open("w.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0][2] == "training photos"
    for plot, key in (("precision@10 (fraction)", "precision@10"),
                      ("transfer to classes, accuracy (fraction)", "transfer to classes")):
        drawn = [row for row in table if row[0] == plot]
        assert [float(row[3]) for row in drawn[:2]] == [small[key], large[key]]
        assert any("16x16 pixels" in row[1] for row in drawn[2:])


@pytest.fixture(scope="module")
def told_apart():
    """A Scorer of 200 photos for 8 words, which tells most, the words, and what photos show."""
    rng = np.random.default_rng(4)
    words = ["tree", "arbre", "red", "rouge", "sea", "mer", "emma", "tom"]
    shown = rng.random((200, 8)) < 0.3
    shown[:, 6:] = False                        # no photo shows a name
    features = (shown + 0.4 * rng.standard_normal((200, 8))).astype(np.float32)
    output = model.Output(8, 8)
    output.w = 5 * np.eye(8, dtype=np.float32)
    output.b = np.zeros(8, np.float32)
    scorer = evaluation.Scorer(features, output, model.Softmax())
    return scorer, words, [np.flatnonzero(row) for row in shown]


def test_truth_is_scored_by_kinds_and_without_names(told_apart):
    scorer, words, targets = told_apart
    result = evaluation.truth_metrics(scorer, targets, words)
    assert [result[kind]["words"] for kind in ("things", "colours", "places")] == [2, 2, 2]
    auc, ap = evaluation.score_words(scorer, evaluation.mark_words(targets, 8))
    for kind, classes in {"things": [0, 1], "colours": [2, 3], "places": [4, 5]}.items():
        assert result[kind]["auc"] == pytest.approx(auc[classes].mean())
        assert result[kind]["map"] == pytest.approx(ap[classes].mean())
        best = scorer.features[:, classes].argmax(axis=1)
        right = np.mean([classes[b] in target for b, target in zip(best, targets)])
        assert result[kind]["precision@1"] == pytest.approx(right)
    others = evaluation.truth_metrics(scorer, targets, ["dog", *words[1:]])
    assert list(others) == ["words"]            # not all are words of the drawn set
    assert others["words"]["words"] == 6


def test_truth_of_other_photos_scores_like_chance(told_apart):
    """Shuffled, the truth must not be met."""
    scorer, words, targets = told_apart
    right = evaluation.truth_metrics(scorer, targets, words)
    order = np.random.default_rng(0).permutation(len(targets))
    shuffled = evaluation.truth_metrics(scorer, [targets[i] for i in order], words)
    for kind in drawn.KINDS:
        assert right[kind]["auc"] > 0.8
        assert abs(shuffled[kind]["auc"] - 0.5) < 0.1
        assert shuffled[kind]["map"] == pytest.approx(shuffled[kind]["chance"]["map"], abs=0.1)


def test_words_are_scored_against_a_file_of_truth(tiny, ask):
    """Over those photos that it names; a word that it does not have is not scored."""
    folder, words = tiny
    lines = [line.split("\t") for line in open(folder / "captions.tsv")]
    kept = [f"{name}\t{caption.replace(words[0], '')}" for name, caption in lines[:300]]
    (folder / "truth.tsv").write_text("".join(kept))
    result, said = ask("words", "--truth", "truth.tsv", "--no-baselines")
    truth = result["truth"]["words"]
    assert truth["photos"] < result["photos"]
    assert 0 < truth["words"] < result["words"]
    assert f"against what {truth['photos']} photos truly show" in said.out
    (folder / "other.tsv").write_text(f"elsewhere.jpg\t{words[0]}\n")
    with pytest.raises(ValueError, match="other.tsv has no word of the .* it must name them as"):
        ask("words", "--truth", "other.tsv", "--no-baselines")


def test_own_captions_as_truth_score_as_captions_do(tiny, ask):
    result, _ = ask("words", "--truth", "captions.tsv", "--no-baselines")
    assert result["truth"]["words"]["auc"] == pytest.approx(result["auc"])
    assert result["truth"]["words"]["map"] == pytest.approx(result["map"])
    assert result["truth"]["words"]["precision@1"] == pytest.approx(result["precision@1"])


def test_baselines_are_scored_against_the_truth(tiny, ask):
    """Of these, too, own captions as truth score as captions do."""
    result, said = ask("words", "--truth", "captions.tsv")
    baselines = result["baselines"]
    assert list(baselines["truth"]) == list(baselines["scores"])
    for name, numbers in baselines["scores"].items():
        truth = baselines["truth"][name]["words"]
        assert truth["auc"] == pytest.approx(numbers["auc"])
        assert truth["map"] == pytest.approx(numbers["map"])
        assert truth["precision@1"] == pytest.approx(numbers["precision@1"])
    table = said.out[said.out.index("AUC against the truth"):].splitlines()
    assert table[0].split()[-1] == "words"
    assert table[1].split() == ["model", f"{result['auc']:.4f}"]
    assert [line.rsplit(None, 1)[0] for line in table[2:8]] == list(baselines["scores"])


def test_experiment_trains_scores_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "TIMES", {"captions": (1, 2), "truth": (0.5, 2)})
    given = ["clean", "--out", str(tmp_path / "e"), "--base", "60", "--seeds", "1", "--training",
             "--epochs 1 --epoch-size 16 --batch 16"]
    assert experiments.main(given) == 0
    said = capsys.readouterr().out
    assert said.count(" s\n") == 4              # runs
    assert re.search(r"things, pictures +captions +truth\n30 +0\.\d+\n60 +0\.", said)
    assert (tmp_path / "e" / "clean.png").exists()
    scored = [json.load(open(path))["result"] for path in (tmp_path / "e").glob("*-seed0.json")]
    assert len({result["truth"]["things"]["photos"] for result in scored}) == 1     # the same ones
    trained = (tmp_path / "e" / "truth-120-seed0" / "model.npz").stat().st_mtime_ns
    (tmp_path / "e" / "captions-60-seed0.json").unlink()            # as if it had been stopped
    assert experiments.main(given) == 0
    assert capsys.readouterr().out.count(" s\n") == 1
    assert (tmp_path / "e" / "truth-120-seed0" / "model.npz").stat().st_mtime_ns == trained
    with pytest.raises(ValueError, match="is of other options; choose another --out"):
        experiments.main([*given[:-1], "--epochs 2"])


def test_experiment_of_more_photos_scores_all_runs_together(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny[0])
    for name, width in {"small": 4, "narrow": 2}.items():
        build = partial(model.small, width=width)
        monkeypatch.setitem(model.NETWORKS, name, SMALL._replace(build=build))
    monkeypatch.setattr(experiments, "HELD_OUT", (0.2, 0.6))
    training = f"--images photos --captions captions.tsv {' '.join(map(str, TINY))} --epochs 1"
    given = ["photos", "--out", str(tmp_path), "--seeds", "2", "--training", training]
    assert experiments.main(given) == 0
    said = capsys.readouterr().out
    assert said.count(" s\n") == 8              # runs
    runs = json.load(open(tmp_path / "photos.json"))["runs"]
    assert len({result["photos"] for result in runs.values()}) == 1         # the same ones
    assert len({result["training_photos"] for result in runs.values()}) == 2
    curves = {line.split(",")[1] for line in open(tmp_path / "photos.csv")}
    assert {"--network small", "--network narrow"} <= curves
    assert (tmp_path / "photos.png").exists()


def test_experiment_may_be_a_list_of_commands(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny[0])
    training = ["--images", "photos", "--captions", "captions.tsv", *map(str, TINY)]
    rows = [experiments.Row("one", [*training, "--epochs", "1"], ["words", "--no-baselines"])]
    options = argparse.Namespace(out=str(tmp_path), seeds=2, training=[], threads=None)
    results = experiments.compare_rows(rows, ["auc", "map"], options)
    assert [len(of_seeds) for of_seeds in results.values()] == [2]
    expected = experiments.describe([result["map"] for result in results["one"]])
    assert re.search(f"2 seeds +auc +map\none +.*{expected}\n", capsys.readouterr().out)


def test_experiment_says_how_much_seeds_vary():
    assert experiments.describe([0.5, 0.7]) == "0.600 ± 0.141"
    assert experiments.describe([0.5]) == "0.500"


def test_labelled_pictures_are_not_counted_beyond_those_that_were_tried():
    assert experiments.count_for(0.5, [100, 200, 400], [0.5, 0.6, 0.7]) == pytest.approx(100)
    assert experiments.count_for(0.65, [100, 200, 400], [0.5, 0.6, 0.7]) == pytest.approx(283, 0.01)
    assert experiments.count_for(0.8, [100, 200, 400], [0.5, 0.6, 0.7]) == np.inf
    assert experiments.count_for(0.4, [100, 200, 400], [0.5, 0.6, 0.7]) == 0
    curves = {"captions": np.array([[0.3], [np.nan], [0.6], [0.9]]),
              "truth": np.array([[np.nan], [0.5], [0.7]])}
    counts = {"captions": [100, 150, 200, 400], "truth": [25, 50, 100]}
    assert experiments.describe_worth(curves, counts) == (
        "fewer than 50 for 100; 71 for 200 (each worth 2.8); beyond those that were tried for 400")
    curves["truth"][:] = np.nan
    assert experiments.describe_worth(curves, counts) == "not known"


def test_curve_over_seeds_leaves_out_what_is_no_number():
    values = np.array([[np.nan, 0.5], [0.5, 0.7], [0.6, 0.6]])
    curve = experiments.make_curve("a", [1, 2, 4], values)
    assert curve.x == [2, 4] and curve.y == pytest.approx([0.6, 0.6])
    assert curve.deviations == pytest.approx([0.2 / math.sqrt(2), 0])
    assert curve.over == ["2 seeds"] * 2
    assert experiments.make_curve("a", [1], np.array([[0.5]])).over == [""]


def test_runs_that_differ_in_the_seed_alone_are_joined(tiny, monkeypatch):
    monkeypatch.chdir(tiny[0])
    runs = [evaluation.Trained("r") for _ in range(3)]
    runs[1].options.update(seed=5, out="elsewhere", workers=9)
    runs[2].options.update(epochs=20)           # has as many photos, and is another training
    rows = [{"training_photos": 10, "auc": 0.5}, {"training_photos": 10, "auc": 0.7},
            {"training_photos": 10, "auc": 0.9, "photos": 1200, "deviations": {"auc": 0.01}}]
    curves = evaluation.join_seeds(runs, rows, ["auc"])
    assert list(curves) == ["--epochs 2", "--epochs 20"]
    (joined,), (alone,) = curves.values()
    assert joined["auc"] == pytest.approx(0.6)
    assert joined["auc ±"] == pytest.approx(0.2 / math.sqrt(2))
    assert joined["auc ± over"] == "2 seeds"
    assert (alone["auc"], alone["auc ±"], alone["auc ± over"]) == (
        0.9, 0.01, "a bootstrap of 1,200 photos")


def test_runs_of_one_seed_or_one_cut_short_are_not_joined(tiny, monkeypatch):
    monkeypatch.chdir(tiny[0])
    runs = [evaluation.Trained("r") for _ in range(3)]
    runs[1].options.update(seed=5)
    runs[1].log = runs[1].log[:1]               # was interrupted
    rows = [{"training_photos": 10, "auc": value} for value in (0.5, 0.7, 0.9)]
    (points,) = evaluation.join_seeds(runs, rows, ["auc"]).values()
    assert [point["auc"] for point in points] == [0.5, 0.7, 0.9]


def test_curves_part_by_options_but_not_by_data(tiny, monkeypatch):
    monkeypatch.chdir(tiny[0])
    runs = [evaluation.Trained("r") for _ in range(4)]
    for i, run in enumerate(runs):
        run.training = 100 * (1 + i // 2)
        run.options.update(captions=f"{i // 2}.tsv", lr=0.1 / (1 + i // 2), pictures=100 + i // 2,
                           network=("small", "alexnet")[i % 2])
    rows = [{"training_photos": run.training, "auc": 0.5 + i / 10} for i, run in enumerate(runs)]
    curves = evaluation.join_seeds(runs, rows, ["auc"])
    assert list(curves) == ["--network small", "--network alexnet"]
    for points in curves.values():
        assert [point["training_photos"] for point in points] == [100, 200]


def test_curves_part_by_captions_of_as_many_photos(tiny, monkeypatch):
    monkeypatch.chdir(tiny[0])
    runs = [evaluation.Trained("r") for _ in range(2)]
    for i, run in enumerate(runs):
        run.training = 1000 + i                 # a few photos more or less make no curve
        run.options.update(captions=f"{i}.tsv")
    rows = [{"training_photos": run.training, "auc": 0.5} for run in runs]
    curves = evaluation.join_seeds(runs, rows, ["auc"])
    assert list(curves) == ["--captions 0.tsv", "--captions 1.tsv"]


def test_drawn_sets_of_other_seeds_are_joined(tiny, monkeypatch):
    monkeypatch.chdir(tiny[0])
    first, second = [evaluation.Trained("r") for _ in range(2)]
    for i, run in enumerate((first, second)):
        run.options.update(drawn=True, captions=f"{i}/captions.tsv", seed=i)
        run.training += i
    assert first.settings() == second.settings()
    second.options.update(pictures=1000)
    assert first.settings() != second.settings()


def test_held_out_photos_that_were_trained_on_are_said_once(tiny, ask, tmp_path, monkeypatch):
    shutil.copytree("photos", tmp_path / "photos")
    index = data.Index("r/index")
    whole = [i for i in range(len(index)) if is_whole(tmp_path / "photos" / index.name(i))]
    held_out = index.name(whole[0])
    training = index.name(whole[-1])
    shutil.copy(tmp_path / "photos" / training, tmp_path / "photos" / held_out)
    _, said = ask("words", "--images", tmp_path / "photos")
    assert said.out.count("byte-identical") == 1
    assert f"{held_out} = {training}" in said.out
    _, said = ask("words", "--images", tmp_path / "photos", "--all")
    assert "byte-identical" not in said.out
    _, said = ask("words")
    assert "byte-identical" not in said.out
    monkeypatch.setattr(evaluation, "MOST_COMPARED", len(index) - 1)
    _, said = ask("words", "--images", tmp_path / "photos")
    assert "byte-identical" not in said.out and "not looked for" in said.out


def is_whole(path):
    """Whether there is a photo, and not one of those that are broken."""
    return path.exists() and path.read_bytes() != b"broken"


def test_tag_names_the_words_of_photos(tiny, ask):
    result, _ = ask("tag", "photos/p1.jpg", "--top", 3)
    tags = result["tags"]["photos/p1.jpg"]
    assert len(tags) == 3
    assert list(tags.values()) == sorted(tags.values(), reverse=True)
    assert 0 < sum(tags.values()) <= 1
    trained = evaluation.Trained("r")
    pixels = data.decode("photos/p1.jpg", 72)[None]
    s = trained.net.forward(kernels.prepare(pixels, [4], [4], [False], 64))
    for word, probability in tags.items():
        assert probability == pytest.approx(softmax(s[0])[trained.classes[word]], rel=1e-4)


def test_tag_has_a_threshold_and_says_what_it_cannot_read(ask):
    result, said = ask("tag", "photos/p1.jpg", "none.jpg", "--threshold", 0.9, expect=1)
    assert result["tags"] == {"photos/p1.jpg": {}}
    assert "no word of at least 0.9" in said.out
    assert "none.jpg: no such file" in said.err


def test_tag_by_the_words_own_thresholds(tiny, tmp_path, ask, monkeypatch):
    shutil.copytree("r", tmp_path / "r")
    run_folder = tmp_path / "r"
    (run_folder / "thresholds.csv").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="first let `eval.py words --model"):
        ask("tag", "photos/p1.jpg", "--threshold", "auto", "--model", run_folder)
    ask("words", "--no-baselines", "--per-word", tmp_path / "w.csv", "--model", run_folder)
    table = list(csv.DictReader(open(run_folder / "thresholds.csv")))
    assert (tmp_path / "w.csv").read_text() == (run_folder / "thresholds.csv").read_text()
    assert [row["word"] for row in table] == tiny[1]
    result, said = ask("tag", "photos/p1.jpg", "--threshold", "auto", "--model", run_folder)
    tags = result["tags"]["photos/p1.jpg"]
    for row in table:
        if row["word"] in tags:
            assert tags[row["word"]] >= float(row["threshold"])
    text = (run_folder / "thresholds.csv").read_text()
    (run_folder / "thresholds.csv").write_text(text.replace(f",{table[0]['step']}\n", ",7\n"))
    with pytest.raises(ValueError, match="is of other weights"):
        ask("tag", "photos/p1.jpg", "--threshold", "auto", "--model", run_folder)


def test_tag_shows_the_words_of_a_photos_captions(tiny, ask):
    index = data.Index("r/index")
    names = [index.name(i) for i in range(len(index))]
    name = next(name for name in names if is_whole(Path("photos", name)))
    words = [tiny[1][k] for k in index.words(names.index(name))]
    result, said = ask("tag", f"photos/{name}", "classes/class1/1.png")
    assert result["captions"] == {f"photos/{name}": words}
    assert said.out.count(f"(its captions: {', '.join(words)})") == 1


def test_tags_may_be_a_table_with_a_row_for_each_photo(ask):
    result, said = ask("tag", "classes/class0", "photos/p1.jpg", "--top", 3, "--out", "tags.csv",
                       expect=1)                # one is broken
    assert Path("tags.csv").read_bytes().startswith(b"\xef\xbb\xbfphoto,")     # for spreadsheets
    table = list(csv.DictReader(open("tags.csv", encoding="utf-8-sig")))
    photos = [row["photo"] for row in table]
    assert photos == [*(f"classes/class0/{name}" for name in data.list_photos("classes/class0")),
                      "photos/p1.jpg"]
    for row in table:
        if row["photo"].endswith("broken.jpg"):
            assert (row["tags"], row["not read"]) == ("", "not a picture")
            continue
        tags = result["tags"][row["photo"]]
        assert row["tags"] == ", ".join(tags) and not row["not read"]
        for i, (word, probability) in enumerate(tags.items(), 1):
            assert row[f"tag {i}"] == word
            assert float(row[f"probability {i}"]) == pytest.approx(probability, abs=1e-4)
    assert said.out == "tags.csv: the words of 13 photos, a row for each photo\n"


def test_table_of_tags_has_room_for_the_photo_with_most(ask):
    result, _ = ask("tag", "classes/class1", "--threshold", 0.033, "--out", "tags.csv")
    most = max(len(tags) for tags in result["tags"].values())
    heading = Path("tags.csv").read_text(encoding="utf-8-sig").splitlines()[0]
    assert heading.count("probability") == most > 0


def test_tag_takes_folders(ask):
    result, _ = ask("tag", "classes", "photos/p1.jpg", expect=1)    # one is broken
    assert len(result["tags"]) == 24 + 1
    assert list(result["failed"]) == ["classes/class0/broken.jpg"]


def test_json_may_be_standard_output(tiny, ask):
    word = tiny[1][0]
    _, said = ask("neighbors", word, "--json", "-")
    assert word in json.loads(said.out)["neighbors"]
    assert f"{word}: " in said.err


def test_search_finds_the_photos_of_the_highest_scores(tiny, ask):
    words = tiny[1][:2]
    result, _ = ask("search", *words, "--images", "classes", "--out", "s.png", "--top", 3)
    assert Image.open("s.png").size == (3 * 156 + 6, 2 * 206 + 6)
    trained = evaluation.Trained("r")
    features, reader = trained.features("classes", data.list_photos("classes"), 0)
    log_p = log_softmax(trained.net.output.scores(features), axis=1)
    scores = log_p[:, trained.find_words(words)]                    # (24, 2)
    for column, word in zip(scores.T, words):
        best = [reader.names[i] for i in np.argsort(-column, kind="stable")[:3]]
        assert list(result["words"][word]) == best
        assert result["words"][word][best[0]] == pytest.approx(np.exp(column.max()), rel=1e-4)


def test_neighbors_are_by_cosine(tiny, ask):
    word = tiny[1][2].upper()
    result, _ = ask("neighbors", word, "--top", 4)
    cosines = list(result["neighbors"][word].values())
    assert len(cosines) == 4
    assert cosines == sorted(cosines, reverse=True) and cosines[0] < 1


def test_files_of_one_name_in_two_folders_are_told_apart(ask):
    Path("other").mkdir()
    shutil.copy("similar.txt", "other/similar.txt")
    result, _ = ask("similar", "--pairs", "similar.txt", "other/similar.txt")
    assert len(result) == 2 and "other/similar.txt" in result
    assert evaluation.short_names(["a/x/", "b/y"]) == {"a/x/": "x", "b/y": "y"}
    assert evaluation.short_names(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}
    assert evaluation.short_names(["a/x", "a/x"]) == {"a/x": "x"}
    assert evaluation.short_names(()) == {}


def test_similar_compares_pairs_that_the_model_knows(ask):
    result, _ = ask("similar", "--pairs", "similar.txt")
    assert result["similar.txt"]["covered"] == 29
    assert result["similar.txt"]["of"] == 30    # without the heading
    assert -1 <= result["similar.txt"]["rho"] <= 1


@pytest.mark.parametrize("options", [[], ["--csls"]])
def test_translate_leaves_out_words_spelt_alike(options, ask):
    result, said = ask("translate", "--pairs", "pairs.txt", *options)
    assert result["pairs"] == 15
    assert result["alike"] == 1
    for way in (result["forward"], result["backward"]):
        assert way["candidates"] == 15 and way["all"]["candidates"] == 30
        assert way["chance"]["precision@1"] == pytest.approx(1 / 15)
        assert way["all"]["chance"]["precision@1"] == pytest.approx(1 / 30)
        assert way["all"]["precision@10"] <= way["precision@10"]
    assert "best pairs" in said.out


def carriers(words, index):
    """{word: its training photos} of a run's index."""
    photos = {word: set() for word in words}
    for photo in range(index.held_out, len(index)):
        for k in index.words(photo):
            photos[words[k]].add(photo)
    return photos


def test_translate_has_the_control_of_captions_alone(tiny, ask):
    result, said = ask("translate", "--pairs", "pairs.txt")
    own = carriers(tiny[1], data.Index("r/index"))
    sources = tiny[1][::2]
    targets = tiny[1][1::2]
    hits = 0
    for i, source in enumerate(sources):
        cosines = [len(own[source] & own[target]) / math.sqrt(len(own[source]) * len(own[target]))
                   for target in targets]
        hits += i in np.argsort(cosines)[-10:]
    control = result["controls"]["captions by photos"]["forward"]
    assert control["precision@10"] == pytest.approx(hits / 15, abs=1 / 15)      # there are ties
    for key in ("words", "candidates", "chance"):
        assert control[key] == result["forward"][key]
    assert "forward: captions by photos " in said.out
    assert "backward, all words: captions by company " in said.out


def test_control_of_captions_alone_needs_the_index_of_the_run(tiny, tmp_path, ask):
    result, _ = ask("similar", "--pairs", "similar.txt")
    assert -1 <= result["similar.txt"]["captions_alone"] <= 1
    shutil.copytree("r", tmp_path / "r")
    result_moved, _ = ask("similar", "--pairs", "similar.txt", "--model", tmp_path / "r")
    assert result_moved == result
    shutil.rmtree(tmp_path / "r" / "index")
    build(tmp_path / "r", data.Text(30, 5, 0.3), "index", tiny[0] / "captions.tsv")
    for _ in range(2):                          # an index of another split, and none
        result, said = ask("similar", "--pairs", "similar.txt", "--model", tmp_path / "r")
        assert "captions_alone" not in result["similar.txt"]
        assert "no control by captions alone" in said.out
        shutil.rmtree(tmp_path / "r" / "index", ignore_errors=True)


def test_control_of_captions_alone_is_left_out_where_it_takes_too_much(ask, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_TOGETHER", 100)
    result, said = ask("translate", "--pairs", "pairs.txt")
    assert result["controls"] == {}
    assert "pairs of words on a photo, more than 100" in said.out


def test_word_is_not_its_own_translation():
    vectors = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    scores = evaluation.score_translations(vectors, np.array([0, 1]), np.array([1, 2]), False)
    np.testing.assert_allclose(scores, [[0.6, 0.0], [-np.inf, 0.8]])
    many = np.arange(12)
    rng = np.random.default_rng(0)
    vectors = evaluation.units(rng.standard_normal((30, 5)))
    scores = evaluation.score_translations(vectors, many, np.arange(30), True)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)               # which no word is near enough to see
    expected = evaluation.csls(cosines[many])
    expected[many, many] = -np.inf
    np.testing.assert_allclose(scores, expected)


@pytest.mark.parametrize("kind", [["--words"], ["--images", "classes"]])
def test_map_is_a_picture_of_its_size(kind, ask):
    result, said = ask("map", *kind, "--out", "m.png", "--steps", 50, "--size", 400)
    assert Image.open("m.png").size == (400, 400)
    assert result["kl"] > 0
    assert "KL divergence" in said.out


def test_features_are_the_networks_of_the_central_crop(ask):
    result, said = ask("features", "--images", "classes", "--out", "f.npz")
    assert result["photos"] == 24
    assert "broken.jpg: not a picture" in said.err
    with np.load("f.npz") as file:
        names = file["names"]
        features = file["features"]
    assert features.shape == (24, 512) and features.dtype == np.float32
    pixels = data.decode(f"classes/{names[3]}", 72)[None]
    x = kernels.prepare(pixels, [4], [4], [False], 64)
    expected = evaluation.Trained("r").net.features(x)
    np.testing.assert_allclose(features[3], expected[0], atol=1e-5)


def test_features_of_ten_crops_are_their_mean(ask):
    ask("features", "--images", "photos", "--out", "f.npz", "--crops", 10)
    with np.load("f.npz") as file:
        name = file["names"][3]
        features = file["features"][3]
    pixels = data.decode(f"photos/{name}", 72)[None]
    net = evaluation.Trained("r").net
    crops = []
    for top, left in ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4)):
        crop = pixels[:, top:top + 64, left:left + 64]
        for photo in (crop, crop[:, :, ::-1]):
            crops.append(net.features(kernels.prepare(photo, [0], [0], [False], 64)))
    assert len(np.unique(np.concatenate(crops), axis=0)) == 10
    np.testing.assert_allclose(features, np.mean(crops, axis=0)[0], atol=1e-5)


def test_features_may_be_of_any_layer(ask):
    result, _ = ask("features", "--images", "classes", "--out", "c.npz", "--layer", "pool4")
    assert result["numbers"] == 4 * 4 * 128


def test_features_may_be_a_table(ask):
    ask("features", "--images", "classes", "--out", "f.npz")
    ask("features", "--images", "classes", "--out", "f.csv")
    heading, *rows = csv.reader(open("f.csv"))
    assert heading == ["photo", *(f"f{i}" for i in range(512))]
    with np.load("f.npz") as file:
        assert [row[0] for row in rows] == file["names"].tolist()
        assert np.array_equal(np.array([row[1:] for row in rows], np.float32), file["features"])


def test_features_may_be_of_single_files(ask):
    name = os.fsdecode(b"\xff.png")             # which is no text
    shutil.copy("classes/class1/1.png", name)
    result, _ = ask("features", "--images", name, "classes", "photos/p1.jpg", "--out", "f.csv")
    assert result["photos"] == 1 + 24 + 1
    rows = list(csv.reader(open("f.csv", errors="surrogateescape")))[1:]
    assert rows[0][0] == name
    assert rows[1][0] == "classes/class0/0.png"
    assert rows[-1][0] == "photos/p1.jpg"
    copied = [row[1:] for row in rows if row[0] == "classes/class1/1.png"]
    np.testing.assert_allclose(np.array(copied[0], float), np.array(rows[0][1:], float), atol=1e-5)


@pytest.fixture
def alike(tmp_path):
    """A folder of 12 photos in shades of colours, one of them twice, and a broken one."""
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 250 - 20 * i, 90)).save(tmp_path / f"{i}.png")
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "3.png", tmp_path / "sub" / "copy.png")
    (tmp_path / "broken.jpg").write_text("broken")
    return tmp_path


@pytest.mark.parametrize("block", [evaluation.BLOCK, 512 * 3])
def test_nearest_photos_are_of_the_highest_centred_cosines(block, alike, ask, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", block)
    ask("features", "--images", alike, "--out", "f.npz")
    query = str(alike / "3.png")
    result, said = ask("nearest-photos", query, "--features", "f.npz", "--top", 20)
    with np.load("f.npz") as file:
        names = file["names"].tolist()
        x = file["features"].astype(float)
    x -= x.mean(axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = x @ x[names.index("3.png")]
    expected = [names[i] for i in np.argsort(-cosines) if names[i] != "3.png"]
    nearest = result["nearest"][query]
    assert list(nearest)[0] == "sub/copy.png" and nearest["sub/copy.png"] == pytest.approx(1)
    assert sorted(nearest) == sorted(expected)
    for name, cosine in nearest.items():        # equal ones in any order
        assert cosine == pytest.approx(cosines[names.index(name)], abs=1e-4)
    assert list(nearest.values()) == sorted(nearest.values(), reverse=True)
    assert said.out.startswith(f"{query}: sub/copy.png 1")


def test_nearest_photos_in_a_folder_are_those_in_its_features(alike, ask):
    queries = ["classes/class0/0.png", str(alike / "5.png")]
    ask("features", "--images", alike, "--out", "f.npz")
    stored, _ = ask("nearest-photos", *queries, "--features", "f.npz", "--out", "s.png")
    found, said = ask("nearest-photos", *queries, "--images", alike, "--out", "n.png", "--top", 6)
    assert list(found["skipped"]) == ["broken.jpg"] and "broken.jpg: not a picture" in said.err
    for query in queries:
        assert stored["nearest"][query] == pytest.approx(found["nearest"][query], abs=1e-4)
    picture = Image.open("n.png")
    assert picture.size == (7 * 156 + 6, 2 * 206 + 6)
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open("s.png")))
    with open("n.csv", newline="") as file:
        table = [row for row in csv.DictReader(file) if row["photo"] == queries[0]]
    drawn = {row["nearest"]: float(row["cosine"]) for row in table}
    assert drawn == found["nearest"][queries[0]]
    green = np.asarray(picture)[100, 80]        # the photo that was asked for comes first
    assert abs(green.astype(int) - [0, 90, 0]).max() < 9


def test_features_are_those_of_the_same_layer_and_crops(alike, ask):
    ask("features", "--images", alike, "--out", "f.npz", "--layer", "pool4", "--crops", 10)
    shutil.copy(alike / "7.png", alike.parent / "query.png")
    query = str(alike.parent / "query.png")
    result, _ = ask("nearest-photos", query, "--features", "f.npz", "--top", 1)
    assert result["nearest"][query] == {"7.png": pytest.approx(1)}


def test_photos_of_features_may_move(alike, ask, tmp_path_factory):
    ask("features", "--images", alike, "--out", "f.npz")
    moved = tmp_path_factory.mktemp("moved") / "photos"
    shutil.move(alike, moved)
    query = str(moved / "2.png")
    result, _ = ask("nearest-photos", query, "--features", "f.npz", "--top", 20)
    assert "2.png" in result["nearest"][query]  # it is not known to be the same file
    with pytest.raises(ValueError, match="give its new place by --images"):
        ask("nearest-photos", query, "--features", "f.npz", "--out", "n.png")
    result, said = ask("nearest-photos", query, "--features", "f.npz", "--images", moved, "--top",
                       20, "--out", "n.png")
    assert "2.png" not in result["nearest"][query]
    assert "left out" not in said.err


def test_picture_of_nearest_photos_has_the_first_ones(alike, ask, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_ROWS", 2)
    queries = [str(alike / f"{i}.png") for i in range(5)]
    result, said = ask("nearest-photos", *queries, "broken.jpg", "--images", alike, "--out",
                       "n.png", expect=1)
    assert list(result["nearest"]) == queries and list(result["failed"]) == ["broken.jpg"]
    assert Image.open("n.png").size == (7 * 156 + 6, 2 * 206 + 6)
    assert "the picture has the first 2 of 5" in said.out


def test_only_photo_has_none_nearest(ask, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "1.png")
    result, said = ask("nearest-photos", tmp_path / "1.png", "--images", tmp_path)
    assert result["nearest"] == {str(tmp_path / "1.png"): {}}
    assert "there is no other photo" in said.out


@pytest.mark.parametrize("options", [[], ["--layer", "conv1"]])
def test_transfer_tells_colours_apart(options, ask):
    result, said = ask("transfer", "--images", "classes", "--splits", 3, *options)
    mean = dict(zip(result["columns"], result["rows"]["mean"]))
    assert mean["chance"] == 0.5
    assert mean["raw pixels, 16 × 16"] == 1
    assert list(result["rows"]) == ["split 1", "split 2", "split 3", "mean", "± over 3 splits",
                                    "mean class accuracy", "± of it over 3 splits"]
    assert result["photos"] == 24
    assert list(result["skipped"]) == ["class0/broken.jpg"]
    assert "24 photos; 12 to train and 12 to test" in said.out
    assert "class names as words" not in result["columns"]          # no word of them is known


def test_transfer_by_class_names_needs_no_labelled_photo(tiny, tmp_path, ask):
    """A class without a known word in its name is missed, and that is said."""
    first, second, third = tiny[1][:3]
    for i, folder in enumerate([f"{first.upper()}_{second}", third, "unheardof"]):
        for number in range(6 + 6 * (i == 2)):
            path = tmp_path / folder / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (20, 20), (100 * i, 20 * number, 90)).save(path)
    result, said = ask("transfer", "--images", tmp_path, "--splits", 2)
    assert result["columns"][-1] == "class names as words"
    assert result["unknown_names"] == ["unheardof"] and "unheardof" in said.out
    trained = evaluation.Trained("r", prior="none")
    features, reader = trained.features(tmp_path, data.list_photos(tmp_path), 0)
    log_p = log_softmax(trained.net.output.scores(features), axis=1)
    classes = trained.find_words([first, second, third])
    best = np.where(log_p[:, classes[:2]].mean(axis=1) > log_p[:, classes[2]],
                    f"{first.upper()}_{second}", third)
    right = np.array([name.split("/")[0] for name in reader.names]) == best
    order = {name: i for i, name in enumerate(sorted({n.split("/")[0] for n in reader.names}))}
    y = np.array([order[name.split("/")[0]] for name in reader.names])
    train = evaluation.split(y, lambda n: n // 2, 0, 0)
    assert result["rows"]["split 1"][-1] == pytest.approx(right[~train].mean())
    assert result["rows"]["mean"][0] == 0.5                         # always "unheardof"
    assert result["rows"]["mean class accuracy"][0] == pytest.approx(1 / 3)


def test_class_accuracy_of_a_constant_guess_is_that_of_chance():
    y = np.repeat([0, 1], [270, 30])
    always_first = np.tile([1.0, 0.0], (300, 1))
    assert evaluation.accuracy(always_first, y) == 0.9
    assert evaluation.class_accuracy(always_first, y) == 0.5


def test_transfer_reads_a_voc_folder_and_leaves_difficult_photos_out(tmp_path, ask):
    """Photos 0 to 19 are for training; cats are even, dogs odd; those that end in 7 difficult."""
    (tmp_path / "JPEGImages").mkdir()
    lines = {"cat_trainval": "", "dog_trainval": "", "cat_test": "", "dog_test": ""}
    for i in range(40):
        photo = Image.new("RGB", (20, 20), (250 * (i % 2), 90, 5 * i))
        photo.save(tmp_path / "JPEGImages" / f"{i:06}.jpg")
        for kind, is_there in (("cat", i % 2 == 0), ("dog", i % 2 == 1)):
            label = 1 if is_there else -1
            label = 0 if i % 10 == 7 else label
            lines[f"{kind}_trainval" if i < 20 else f"{kind}_test"] += f"{i:06} {label:2}\n"
    for name, text in lines.items():
        write(tmp_path, **{f"ImageSets/Main/{name}.txt": text})
    result, said = ask("transfer", "--images", tmp_path)
    assert list(result["rows"]) == ["cat", "dog", "mean", "± over 2 classes"]
    assert result["rows"]["mean"][-1] == 1      # of raw pixels
    # the precision at a recall is the best of the following, so chance is more than 10 of 18
    assert 10 / 18 < result["rows"]["cat"][0] < 0.75
    assert "40 photos; 18 to train and 18 to test" in said.out


def test_photo_that_is_gone_when_it_is_shown_is_left_out(tmp_path, capsys):
    (tmp_path / "x.jpg").write_text("broken")
    assert evaluation.thumbnail(str(tmp_path / "x.jpg"), 20).size == (20, 20)
    assert evaluation.thumbnail(str(tmp_path / "gone.jpg"), 20, square=True).size == (20, 20)
    said = capsys.readouterr().err
    assert "x.jpg is left out: not a picture" in said
    assert "gone.jpg is left out: no such file" in said


def test_search_knows_the_words_that_were_left_out(ask):
    with pytest.raises(ValueError, match="'waa' was left out as a stop word.*--stop-words 0"):
        ask("neighbors", "waa")


def test_transfer_names_its_classes_and_knows_parts_of_sets(tiny, ask):
    for path in Path("classes").rglob("*.png"):
        part = Path("parts") / ("train" if int(path.stem) % 3 else "val") / path.parent.name
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part / f"{path.parent.name}{path.name}")
    _, said = ask("transfer", "--images", "parts", "--splits", 1)
    names = sorted(os.listdir("classes"))
    assert f"classes: {', '.join(names)}\n" in said.out


def test_report_is_one_file_with_its_pictures(tiny, ask):
    result, _ = ask(
        "report", tiny[1][0], "--transfer", "classes", "--splits", 2, "--pairs-similar",
        "similar.txt", "--translate", "pairs.txt", "--steps", 40, "--size", 300, "--out", "r.html")
    page = open("r.html").read()
    assert not result["failed"]
    assert len(result["sections"]) == page.count("<h2>") == 11
    assert result["sections"]["The run"]["epochs"] == 2
    assert page.count("<table>") == 6
    # 12 photos with words and 6 of a word, all JPEG, as is the mosaic; 4 curves and a map of words
    assert page.count("data:image/jpeg;base64") == 19
    assert page.count("<img ") == page.count(' alt="') == 19
    assert page.count("<svg ") == 5
    for outside in ("<script", 'src="http', "href=", "url("):
        assert outside not in page


def test_report_draws_all_words_or_says_how_many_it_left_out(tiny, ask):
    ask("report", "--steps", 40, "--size", 300, "--out", "r.html")
    page = open("r.html").read()
    left_out = re.search(r"(\d+) words have no room", page)         # how many hangs on rounding
    count = int(left_out[1]) if left_out else 0
    assert page.count(" textLength=") == 30 - count > 10


def test_report_marks_the_words_that_are_right(ask):
    result, _ = ask("report", "--steps", 40, "--size", 300, "--out", "r.html")
    page = open("r.html").read()
    photos = result["sections"]["The model at work"]
    assert len(photos) == 12
    right = 0
    for photo in photos.values():
        assert len(photo["best"]) == 5
        right += len(set(photo["best"]) & set(photo["words"]))
    assert page.count("<b>✓ ") == right
    assert page.count("<s>✗ ") == 12 * 5 - right
    trained = evaluation.Trained("r")           # with the prior, as the report
    name = list(photos)[0]
    features, _ = trained.features("photos", [name], 0)
    p = softmax(trained.net.output.scores(features)[0])
    assert max(photos[name]["best"].values()) == pytest.approx(p.max(), rel=1e-4)
    assert f">{evaluation.format_probability(p.max())}</span>" in page


def test_report_begins_with_its_run_data_scores_and_weights(tiny, ask):
    result, _ = ask("report", tiny[1][0], "--steps", 40, "--size", 300, "--out", "r.html")
    page = open("r.html").read()
    opening = page[:page.index("<h2>")]
    trained = evaluation.Trained("r/model.npz")
    folder = "/".join(os.path.abspath("photos").split("/")[-2:])
    title = f"r: 30 words learned from {trained.training:,} photos of {folder}"
    assert f"<title>{title}</title>" in opening and f"<h1>{title}</h1>" in opening
    scores = result["sections"]["Word prediction"]
    _, pixels = evaluation.best_readout(scores["baselines"]["scores"], "raw pixels, 16 × 16",
                                        "precision@10")
    for value in (scores["precision@10"], scores["baseline"]["precision@10"], pixels):
        assert f"{10 * value:.1f}" in opening
    assert "The weights are the best epoch" in opening and "(best.npz)" in opening
    assert trained.describe_weights().startswith("The weights are the last ones (model.npz)")
    assert os.getcwd() not in page              # names of places stay here


def test_sections_of_a_report_are_named_apart_and_have_all_options(tiny, monkeypatch):
    monkeypatch.chdir(tiny[0])
    given = ["report", "--model", "r", "--out", "r.html", "--transfer", "x/a/photos", "y/a/photos",
             "--translate", "pairs.txt"]
    options = evaluation.PARSER.parse_args(given)
    sections = evaluation.list_sections(options, evaluation.Trained("r"))
    titles = [title for title, _, _ in sections]
    assert titles[-2:] == ["Transfer to x/a/photos", "Transfer to y/a/photos"]
    assert len(set(titles)) == len(titles)
    for title, function, changes in sections:
        own = evaluation.options_of(function, options, **changes)
        assert set(getattr(function, "defaults", ())) <= set(vars(own))
        assert own.steps == 1000                # the report's
        if function is evaluation.translate_words:
            assert own.csls == title.endswith("corrected for hubs")
        if function is evaluation.transfer_features:
            assert own.layer is None and own.images.endswith("a/photos")


@pytest.mark.parametrize("p, text", [
    (0.5, "0.50"), (0.0312, "0.031"), (0.00871, "0.0087"), (0.00009, "<0.0001")])
def test_probability_is_shown_with_two_digits(p, text):
    assert evaluation.format_probability(p) == text


def test_page_tells_where_it_scrolls():
    page = evaluation.Output()
    page.table(["", "a"], {"x" * 60: [0.5]})
    width = int(re.search(r"--width: (\d+)px", page.html[0])[1])
    assert 60 * 6 < width < 80 * 8
    assert page.html[0].index("scroll sideways") < page.html[0].index("<table>")
    assert "(var(--width) - 100cqw)" in evaluation.STYLE            # the hint's height


def test_numbers_of_a_search_and_of_maps_lie_beside_the_picture(tiny, ask, capsys):
    first, second = tiny[1][:2]
    result, said = ask("search", first, second, "--out", "s.png", "--top", 3, "--size", 1000)
    assert "s.png: photos for words; its numbers are in s.csv" in said.out
    assert Image.open("s.png").width == 1000
    with open("s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["word"] for row in rows] == [first] * 3 + [second] * 3
    assert {row["photo"]: float(row["probability"]) for row in rows[:3]} == result["words"][first]
    ask("map", "--words", "--steps", 30, "--size", 300, "--out", "m.svg")
    drawn = [element.text for element in ElementTree.parse("m.svg").getroot()]
    with open("m.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert {row["word"] for row in rows if row["drawn"] == "yes"} == set(drawn)
    with pytest.raises(ValueError, match="a map of photos is a .png"):
        ask("map", "--steps", 30, "--out", "photos.svg")


def test_numbers_of_a_picture_never_take_the_place_of_another_file(ask):
    Path("mine.csv").write_text("mine")
    with pytest.raises(ValueError, match="mine.csv is there already"):
        ask("curves", "--out", "mine.png")
    with pytest.raises(ValueError, match="is a run's own file"):
        ask("curves", "--out", "r/curves.svg")
    with pytest.raises(ValueError, match="must end in .png or .svg"):
        ask("curves", "--out", "mine.jpg")
    assert Path("mine.csv").read_text() == "mine"
    for name in "c.png", "c.svg", "c.png":      # again, too
        result, _ = ask("curves", "--out", name)
    with open("c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    held_out = [float(row["value"]) for row in rows if row["curve"] == "held-out photos"]
    assert held_out[:2] == [row["validation_loss"] for row in result["log"]]
    assert Path("r/curves.csv").read_text() == Path("c.csv").read_text()
    svg = Path("c.svg").read_text()
    assert "these weights, of epoch 2" in svg


def test_run_that_is_given_twice_is_refused(ask):
    with pytest.raises(ValueError, match="given twice"):
        ask("words", "r", "--out", "twice.png")


def test_report_goes_on_after_an_experiment_that_fails(ask):
    result, said = ask("report", "nosuchword", "--translate", "nope", "--steps", 40, "--size", 300,
                       "--out", "r.html", expect=1)
    assert set(result["failed"]) == {"Photos for words", "Nearest words", "Translation",
                                     "Translation, corrected for hubs"}
    assert "A map of words" in result["sections"]
    assert "nosuchword" in open("r.html").read()
    assert "nope" in said.err


def test_captions_are_indexed_elsewhere_if_the_run_is_read_only(tiny, ask, monkeypatch):
    access = os.access                          # for root, all can be written
    monkeypatch.setattr(os, "access", lambda path, mode: path != "r" and access(path, mode))
    shutil.rmtree("r/index-eval", ignore_errors=True)
    Path("other.tsv").write_text(Path("captions.tsv").read_text() + "\n")
    result, _ = ask("words", "--captions", "other.tsv")
    assert result["photos"] > 0
    assert not os.path.exists("r/index-eval")


# ------------------------------------------------------------------------------- bad input

WRONG = {
    "layer": (["features", "--images", "classes", "--out", "x.npz", "--layer", "fc9"], "conv1"),
    "ending": (["features", "--images", "classes", "--out", "x.zip"], "must end in .npz"),
    "no folder": (["transfer", "--images", "nope"], "there is no folder nope"),
    "empty folder": (["tag", "empty"], "there is no picture in empty"),
    "no photo": (["features", "--images", "classes", "no.jpg", "--out", "x.csv"],
                 "there is no file or folder no.jpg"),
    "broken photo": (["tag", "nan.txt"], "can be read; nan.txt: not a picture"),
    "broken query": (["nearest-photos", "nan.txt", "--images", "classes"], "not a picture"),
    "query gone": (["nearest-photos", "no.jpg", "--images", "classes"], "no.jpg: no such file"),
    "none to look among": (["nearest-photos", "photos/p1.jpg"], "give --images"),
    "features of others": (["nearest-photos", "photos/p1.jpg", "--features", "other.npz"],
                           "is of other weights than those of r; write it by"),
    "features gone": (["nearest-photos", "photos/p1.jpg", "--features", "no.npz"],
                      "no.npz: No such file or directory; write it by"),
    "no features": (["nearest-photos", "photos/p1.jpg", "--features", "r/best.npz"],
                    "holds no features that can be used; write it by"),
    "table of features": (["nearest-photos", "photos/p1.jpg", "--features", "nan.txt"],
                          "holds no features that can be used"),
    "no place": (["tag", "photos/p1.jpg", "--out", "no/such/tags.csv"], "make it first"),
    "place of a folder": (["tag", "photos/p1.jpg", "--out", "folder.csv"], "cannot write"),
    "run's thresholds": (["tag", "photos/p1.jpg", "--out", "r/thresholds.csv"],
                         "is a run's own file; choose another"),
    "run's captions": (["tag", "photos/p1.jpg", "--json", "captions.tsv"],
                       "captions.tsv is read, it is no place to write"),
    "features again": (["nearest-photos", "photos/p1.jpg", "--features", "other.npz", "--json",
                        "other.npz"], "other.npz is read"),
    "one photo": (["transfer", "--images", "lone"], "a 3, b 1"),
    "one class": (["transfer", "--images", "single"], "two or more sub-folders"),
    "unknown word": (["neighbors", "wrod1"], "not among the model's 30 words"),
    "pairs of two": (["similar", "--pairs", "pairs.txt"], "is not word<TAB>word<TAB>score"),
    "pairs of nan": (["similar", "--pairs", "nan.txt"], "line 2 of nan.txt"),
    "pairs gone": (["translate", "--pairs", "gone.txt"], "it takes a file of word<TAB>word lines"),
    "near": (["neighbors", "wxaxgxx"], "near in spelling: none"),
    "no font": (["map", "--words", "--out", "x.png", "--font", "nan.txt"], "no font"),
    "voc outside": (["transfer", "--images", "voc"], "cat_test.txt is not the name of a photo"),
    "pairs unknown": (["translate", "--pairs", "foreign.txt"], "knows both words of 0"),
    "captions foreign": (["words", "--captions", "foreign.tsv"], "there is no photo"),
    "no images": (["words", "--images", "nope"], "give their new place by --images"),
    "other images": (["words", "--images", "empty"], "can be read from 'empty'; p"),
    "per word of two": (["words", "r", "--per-word", "x.csv"], "is of one run"),
    "tiny map": (["map", "--images", "single", "--out", "x.png"], "takes 10"),
}


@pytest.mark.parametrize("name", WRONG)
def test_experiment_with_bad_input_says_so_in_one_line(name, tiny, ask, capsys):
    for path in ("lone/a/0", "lone/a/2", "lone/a/4", "lone/b/0", "single/a/0", "single/a/2"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(f"{path}.png")
    write(tiny[0], "voc/JPEGImages/x", **{
        "voc/ImageSets/Main/cat_test.txt": "../../x 1\n",
        "foreign.tsv": "p1.jpg\tzyx yzx\n",
        "foreign.txt": "zyx\txyz\t1\nyxz\txzy\t2\n",
        "nan.txt": "zyx\txyz\t1\nyxz\txzy\tnan\n"})
    for folder in "empty", "folder.csv":
        Path(folder).mkdir(exist_ok=True)
    np.savez("other.npz", names=["a"], features=np.zeros((1, 512)), folder="photos", layer="",
             crops=1, weights="other")
    arguments, remedy = WRONG[name]
    with pytest.raises(ValueError) as error:
        ask(*arguments)
    assert remedy in str(error.value)
    assert "\n" not in str(error.value)
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") <= 5            # device, models, priors, skipped


@pytest.mark.parametrize("arguments, message", [
    (["nosuch"], "invalid choice"), (["tag", "x.jpg"], "--model")])
def test_command_that_is_not_whole_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluation.main(arguments)


def test_commands_are_listed_with_examples_that_are_whole(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert evaluation.main([]) == 2             # nothing was done
    listed = capsys.readouterr().out
    commands = evaluation.COMMANDS.choices
    assert "nearest-photos" in commands
    for name in commands:
        example = re.search(rf"^    python eval.py ({name} .*)$", listed, re.MULTILINE)[1]
        options = evaluation.PARSER.parse_args(shlex.split(example))
        assert options.model in ("runs/photos", ["runs/photos"])
        with pytest.raises(SystemExit):
            evaluation.main([name, "--help"])
        assert f"\n  python eval.py {example}\n" in capsys.readouterr().out      # in one line


def test_photos_folder_without_its_option_is_told(monkeypatch):
    with pytest.raises(ValueError, match="photos' folder is given as --images photos/"):
        weak.read_options(["photos/"])
