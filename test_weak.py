"""The promises of this project, as tests: `pytest` runs them all, without a GPU, in minutes.

Gradients in float64 against central differences, twins against SciPy, plain loops and (where it is
installed) PyTorch, the text, the index, the draws, the loader, training, resuming, and bad input.
"""

import bz2
import errno
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from scipy.signal import correlate
from scipy.special import log_expit, logsumexp
from scipy.special import softmax as scipy_softmax
from scipy.stats import chisquare

import data
import eval as evaluation
import kernels
import model
import weak
from kernels import bench, cpu, emulate, gpu

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ------------------------------------------------------------------------------- gradients


def as_float64(net, seed=0):
    """The network with float64 weights, biases drawn so that they matter."""
    net.init(seed)
    noise = np.random.default_rng(seed)
    for _, layer, name in net.parameters():
        value = getattr(layer, name).astype(np.float64)
        setattr(layer, name, value + 0.1 * noise.standard_normal(value.shape) * (name == "b"))
    return net


def check_gradients(net, x, loss_of=None, samples=12, tolerance=1e-6, eps=1e-5):
    """Every gradient of the network against central differences, on random coordinates.

    The loss is gy·y with a random gy, or loss_of(y) -> (loss, dy). A failure names the tensor,
    the index and both values.
    """
    rng = np.random.default_rng(3)
    y = net.forward(x, seed=1, step=5)
    gy = rng.standard_normal(y.shape)
    loss_of = loss_of or (lambda s: ((s * gy).sum(), gy))

    def loss():
        return loss_of(net.forward(x, seed=1, step=5).copy())[0]

    dy = loss_of(y.copy())[1].copy()
    if net.rows[-1][1].relu:
        dy = dy * (y > 0)  # whoever stands above takes the ReLU's derivative
    before = dy.copy()
    dx = net.backward(dy)
    assert np.array_equal(dy, before), "backward changed dy"
    tensors = [
        (path, getattr(layer, name), np.array(getattr(layer, "d" + name)))
        for path, layer, name in net.parameters()
    ]
    if dx is not None:
        tensors.append(("x", x, dx.copy()))
    for path, value, gradient in tensors:
        assert gradient.shape == value.shape, path
        for flat in rng.choice(value.size, min(samples, value.size), replace=False):
            index = np.unravel_index(flat, value.shape)
            kept = value[index]
            value[index] = kept + eps
            above = loss()
            value[index] = kept - eps
            below = loss()
            value[index] = kept
            numeric = (above - below) / (2 * eps)
            assert abs(numeric - gradient[index]) <= tolerance * max(1, abs(numeric)), (
                f"d{path}{list(map(int, index))}: {gradient[index]} by backward, "
                f"{numeric} by differences"
            )


def alone(*layers):
    """A network of the layers whose first dx is wanted, too."""
    net = model.Network([(f"layer{i}", layer) for i, layer in enumerate(layers)])
    net.link(below_relu=False, needs_dx=True)
    return as_float64(net)


LAYERS = {
    "conv": lambda: [model.Conv(3, 5, 3, pad=1, relu=False)],
    "conv_relu": lambda: [model.Conv(3, 5, 3, stride=2, pad=1)],
    "conv_strided": lambda: [model.Conv(3, 4, 5, stride=3, pad=2, relu=False)],
    "conv_wide_pad": lambda: [model.Conv(3, 4, 2, stride=2, pad=3, relu=False)],
    "conv_1x1": lambda: [model.Conv(3, 6, 1)],
    "conv_on_relu": lambda: [model.Conv(3, 4, 3, pad=1), model.Conv(4, 2, 3)],
    "max_pool": lambda: [model.MaxPool(3, 2)],
    "max_pool_ceil": lambda: [model.MaxPool(3, 2, ceil=True)],
    "max_pool_pad": lambda: [model.MaxPool(3, 1, pad=1)],
    "max_pool_on_relu": lambda: [model.Conv(3, 4, 3), model.MaxPool(3, 2, ceil=True)],
    "avg_pool": lambda: [model.AvgPool(3, 2)],
    "avg_pool_on_relu": lambda: [model.Conv(3, 4, 3), model.AvgPool(3, 2, pad=1, ceil=True)],
    "lrn": lambda: [model.LRN(3, k=1.5, alpha=0.3, beta=0.75)],
    "lrn_on_relu": lambda: [model.Conv(3, 7, 3), model.LRN(5, alpha=0.2)],
    "linear": lambda: [model.Flatten(), model.Linear(10 * 8 * 3, 6, relu=False)],
    "linear_on_relu": lambda: [model.Flatten(), model.Linear(10 * 8 * 3, 6), model.Linear(6, 4)],
    "flatten_on_relu": lambda: [
        model.Conv(3, 2, 3),
        model.Flatten(),
        model.Linear(96, 3, relu=False),
    ],
    "dropout": lambda: [model.Flatten(), model.Dropout(0.4)],
    "dropout_on_relu": lambda: [
        model.Flatten(),
        model.Linear(240, 40),
        model.Dropout(0.5),
        model.Linear(40, 3, relu=False),
    ],
    "output": lambda: [model.Flatten(), model.Linear(240, 9), model.Output(9, 5)],
    "concat": lambda: [
        model.Conv(3, 4, 3, pad=1),
        model.Concat(
            [model.Conv(4, 3, 1)],
            [model.Conv(4, 2, 1), model.Conv(2, 5, 3, pad=1)],
            [model.MaxPool(3, 1, pad=1), model.Conv(4, 2, 1)],
        ),
        model.Conv(10, 2, 3),
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradient_is_numerical(name, rng):
    check_gradients(alone(*LAYERS[name]()), rng.standard_normal((2, 10, 8, 3)))


def batch_of(rng, n, crop, k):
    targets = data.pad_rows([rng.choice(k, size, replace=False) for size in (2, 1, 3)[:n]])
    weights = np.array([0.5, 0.25, 0.25])[:n]
    return (
        rng.standard_normal((n, crop, crop, 3)),
        lambda s, share=1: kernels.softmax_loss(s, targets, share * weights),
    )


def test_small_network_gradient_is_numerical(rng):
    x, loss = batch_of(rng, 3, 64, 11)
    check_gradients(as_float64(model.small(11, 0.3)), x, loss, samples=8, tolerance=1e-5, eps=1e-6)


def test_alexnet_gradient_is_numerical(rng):
    x, loss = batch_of(rng, 2, 224, 13)
    net = as_float64(model.alexnet(13, 0.5))
    check_gradients(net, x, loss, samples=3, tolerance=1e-5, eps=1e-6)


def with_heads(net, loss):
    """The loss of the scores and of the auxiliary heads', as training minimises it."""
    def loss_of(s):
        heads = sum(loss(head.s.copy(), model.HEAD_WEIGHT)[0] for head in net.heads())
        value, ds = model.training_loss(net, s, np.ones(1), lambda s, w: loss(s, w[0]))
        return value + heads, ds
    return loss_of


def test_auxiliary_head_gradient_is_numerical(rng):
    net = alone(
        model.Conv(3, 4, 3),
        model.Head(("conv", model.Conv(4, 2, 2)), ("flat", model.Flatten()),
                   ("drop", model.Dropout(0.4)), ("output", model.Output(2 * 7 * 5, 6))),
        model.Conv(4, 2, 3),
        model.Flatten(),
        model.Output(2 * 6 * 4, 6))
    _, loss = batch_of(rng, 2, 2, 6)
    check_gradients(net, rng.standard_normal((2, 10, 8, 3)), with_heads(net, loss))


def test_googlenet_gradient_is_numerical(rng):
    """Module by module, along a random direction of all its weights."""
    x, loss = batch_of(rng, 1, 224, 7)
    net = as_float64(model.googlenet(7, 0.4))

    whole = with_heads(net, loss)
    net.backward(whole(net.forward(x, seed=1, step=5))[1])
    arrays = {path: (getattr(layer, name), np.array(getattr(layer, "d" + name)))
              for path, layer, name in net.parameters()}
    for module, layer in net.rows:
        mine = [arrays[path] for path in arrays if path.split(".")[0] == module]
        directions = [rng.standard_normal(w.shape) / np.sqrt(w.size) for w, _ in mine]
        ends = []
        for eps in (1e-6, -2e-6, 1e-6) if mine else ():
            for (w, _), direction in zip(mine, directions):
                w += eps * direction
            ends.append(whole(net.forward(x, seed=1, step=5))[0] if len(ends) < 2 else None)
        if mine:
            numeric = (ends[0] - ends[1]) / 2e-6
            exact = sum((dw * direction).sum() for (_, dw), direction in zip(mine, directions))
            assert abs(numeric - exact) < 1e-5 * max(1, abs(numeric)), (module, exact, numeric)


def test_gathered_output_is_the_full_one_on_its_classes(rng):
    net = alone(model.Flatten(), model.Linear(240, 9), model.Output(9, 12))
    x, classes = rng.standard_normal((3, 10, 8, 3)), np.array([1, 4, 5, 11], np.int32)
    ds = np.zeros((3, 12))
    ds[:, classes] = rng.standard_normal((3, 4))
    whole, output, linear = net.forward(x), net.rows[2][1], net.rows[1][1]
    net.backward(ds)
    dw, db, below = output.dw.copy(), output.db.copy(), linear.dw.copy()
    np.testing.assert_allclose(net.forward(x, classes=classes), whole[:, classes])
    net.backward(ds[:, classes].copy())
    np.testing.assert_allclose(output.dw, dw[classes])
    np.testing.assert_allclose(output.db, db[classes])
    np.testing.assert_allclose(linear.dw, below)
    before = {path: getattr(layer, name).copy() for path, layer, name in net.parameters()}
    optimiser = model.SGD(net, 0.9, 0.1)
    optimiser.v = {path: np.ones_like(v, np.float64) for path, v in optimiser.v.items()}
    optimiser.step(0.1)
    others = np.setdiff1d(np.arange(12), classes)
    for path in ("layer2.w", "layer2.b"):
        after, v = getattr(output, path[-1]), optimiser.v[path]
        assert np.array_equal(after[others], before[path][others]) and (v[others] == 1).all()
        assert (after[classes] != before[path][classes]).all() and (v[classes] != 1).all()


@pytest.mark.parametrize(
    "name, spoil",
    list(
        {
            "conv": lambda layer: setattr(layer, "stride", 2),
            "max_pool": lambda layer: setattr(layer, "pad", 1),
            "avg_pool": lambda layer: setattr(
                layer, "backward", lambda dy: -type(layer).backward(layer, dy)
            ),
            "conv_on_relu": lambda layer: setattr(layer, "below_relu", False),
            "dropout": lambda layer: layer.at(model.Pass(1, 6)),
        }.items()
    ),
)
def test_wrong_backward_is_caught(name, spoil, rng):
    net = alone(*LAYERS[name]())
    layer = net.rows[-1][1]

    def wrong(dy):
        vars(layer).pop("backward")
        spoil(layer)
        return layer.backward(dy)

    layer.backward = wrong
    with pytest.raises((AssertionError, ValueError)):
        check_gradients(net, rng.standard_normal((2, 10, 8, 3)), samples=200)


def test_wrong_gradient_is_named(rng):
    net = alone(*LAYERS["conv"]())
    layer = net.rows[0][1]
    layer.backward = lambda dy: (model.Conv.backward(layer, dy), layer.dw.__setitem__(..., 0))[0]
    with pytest.raises(AssertionError, match=r"dlayer0\.w\[\d, \d, \d, \d\]: 0\.0 by backward"):
        check_gradients(net, rng.standard_normal((2, 10, 8, 3)))


# ------------------------------------------------------------------------- twins and others


def random_shapes(count):
    rng = np.random.default_rng(11)
    for _ in range(count):
        kh, kw = rng.integers(1, 8, 2)
        stride, pad = int(rng.integers(1, 5)), int(rng.integers(0, 6))
        h, w = rng.integers(max(1, kh - 2 * pad), 16), rng.integers(max(1, kw - 2 * pad), 16)
        yield (
            int(rng.integers(1, 6)),
            int(h),
            int(w),
            int(rng.integers(1, 6)),
            int(kh),
            int(kw),
            int(rng.integers(1, 8)),
            stride,
            pad,
        )


@pytest.mark.parametrize("n, h, w, c, kh, kw, f, stride, pad", list(random_shapes(40)))
def test_convolution_agrees_with_scipy_and_its_adjoints(n, h, w, c, kh, kw, f, stride, pad, rng):
    x, filters = rng.standard_normal((n, h, w, c)), rng.standard_normal((kh, kw, c, f))
    b = rng.standard_normal(f)
    y = kernels.conv_forward(x, filters, b, stride, pad)
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    whole = np.stack(
        [
            sum(
                correlate(padded[i, :, :, j], filters[:, :, j, k], "valid", "direct")
                for j in range(c)
            )
            for i in range(n)
            for k in range(f)
        ]
    )
    whole = whole.reshape(n, f, *whole.shape[1:]).transpose(0, 2, 3, 1)[:, ::stride, ::stride]
    np.testing.assert_allclose(y, whole + b, atol=1e-11)
    dy = rng.standard_normal(y.shape)
    dx = kernels.conv_backward_input(dy, filters, x, stride, pad)
    dw, db = kernels.conv_backward_filter(x, dy, filters.shape, stride, pad)
    np.testing.assert_allclose((dx * x).sum(), (dy * (y - b)).sum(), atol=1e-9)  # <Aᵀdy, x> =
    np.testing.assert_allclose((dw * filters).sum(), (dy * (y - b)).sum(), atol=1e-9)  # <dy, Ax>
    np.testing.assert_allclose(db, dy.sum(axis=(0, 1, 2)), atol=1e-11)


@pytest.mark.parametrize(
    "kernel, stride, pad, ceil",
    [(3, 2, 0, False), (3, 2, 0, True), (3, 1, 1, False), (2, 3, 1, True)],
)
def test_pooling_agrees_with_a_plain_loop(kernel, stride, pad, ceil, rng):
    x = np.maximum(rng.standard_normal((2, 9, 12, 3)), 0)  # zeros: ties
    y = kernels.max_pool_forward(x, kernel, stride, pad, ceil)
    mean = kernels.avg_pool_forward(x, kernel, stride, pad, ceil)
    dy, dx = rng.standard_normal(y.shape), np.zeros(x.shape)
    for n, i, j, c in np.ndindex(y.shape):
        window = [
            (p, q)
            for p in range(i * stride - pad, i * stride - pad + kernel)
            for q in range(j * stride - pad, j * stride - pad + kernel)
            if 0 <= p < 9 and 0 <= q < 12
        ]
        values = [x[n, p, q, c] for p, q in window]
        assert y[n, i, j, c] == max(values)
        assert math.isclose(mean[n, i, j, c], sum(values) / len(values), abs_tol=1e-12)
        p, q = window[int(np.argmax(values))]  # the first of the largest
        dx[n, p, q, c] += dy[n, i, j, c]
    np.testing.assert_allclose(kernels.max_pool_backward(dy, x, y, kernel, stride, pad), dx)


def test_lrn_follows_its_formula(rng):
    x = rng.standard_normal((1, 2, 3, 9))
    y = kernels.lrn_forward(x, 5, 2.0, 0.1, 0.75)
    for c in range(9):
        near = x[..., max(0, c - 2) : c + 3]
        np.testing.assert_allclose(y[..., c], x[..., c] / (2 + 0.1 * (near**2).sum(-1)) ** 0.75)


def test_results_do_not_depend_on_the_number_of_threads(rng):
    x = rng.standard_normal((7, 13, 11, 6)).astype(np.float32)
    w, b = rng.standard_normal((3, 3, 6, 8)).astype(np.float32), np.zeros(8, np.float32)
    before, results = kernels.threads(), []
    try:
        for count in (1, 2, 3):
            kernels.set_threads(count)
            y = kernels.conv_forward(x, w, b, 1, 1, relu=True)
            results.append(
                (
                    y,
                    *kernels.conv_backward_filter(x, y, w.shape, 1, 1),
                    kernels.max_pool_forward(y, 3, 2),
                )
            )
    finally:
        kernels.set_threads(before)
    for one in results[1:]:
        for a, c in zip(results[0], one):
            np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-4)  # sums may differ in last bits


@pytest.mark.parametrize("name", model.NETWORKS)
def test_networks_agree_with_pytorch(name, rng):
    torch = pytest.importorskip("torch")
    recipe = model.NETWORKS[name]
    net = recipe.build(50, 0.0).init(1)
    for path, layer, attribute in net.parameters():
        if attribute == "b":                    # so that they matter
            layer.b += rng.standard_normal(layer.b.shape).astype(np.float32) / 10
    x = rng.standard_normal((2, recipe.crop, recipe.crop, 3)).astype(np.float32)
    theirs = bench.torch_network(torch, net.rows)
    for part in theirs.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0                        # masks are our own affair
    for head in net.heads():
        dict(head.branch.rows)["drop"].rate = 0
    y = theirs(torch.tensor(x).permute(0, 3, 1, 2))
    scores = net.forward(x, step=1)
    np.testing.assert_allclose(scores, y.detach().numpy(), rtol=1e-3, atol=1e-4)
    sides = [part for part in theirs if hasattr(part, "s")]
    assert len(sides) == len(net.heads())
    for head, side in zip(net.heads(), sides):
        np.testing.assert_allclose(head.s, side.s.detach().numpy(), rtol=1e-3, atol=1e-4)
    targets, weights = np.array([[3], [7]], np.int32), np.full(2, 0.5)
    _, ds = model.training_loss(net, scores, weights,
                                lambda s, w: kernels.softmax_loss(s, targets, w))
    net.backward(ds)
    loss_of = torch.nn.functional.cross_entropy
    (loss_of(y, torch.tensor([3, 7])) + sum(
        0.3 * loss_of(side.s, torch.tensor([3, 7])) for side in sides)).backward()
    first = next(part for part in theirs if hasattr(part, "weight"))
    dw = first.weight.grad.permute(2, 3, 1, 0).numpy()
    np.testing.assert_allclose(net.rows[0][1].dw, dw, rtol=1e-2, atol=1e-3 * abs(dw).max())


def philox_by_hand(key, counter):
    """Philox4x64-10 in whole numbers, from its publication (Salmon et al. 2011, §3.3)."""
    mask = 2**64 - 1
    k0, k1, (c0, c1, c2, c3) = key, 0, counter
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = b >> 64 ^ c1 ^ k0, b & mask, a >> 64 ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    "counter", [(0, 0, 0, 0), (5, 3, 2, 1), (0, 9, 0, 1), (2**40, 7, 2**33, 0)]
)
def test_philox_numbers_are_those_of_the_counter(counter):
    block, step, layer, stream = counter
    expected = philox_by_hand(42, counter) + philox_by_hand(42, (block + 1, step, layer, stream))
    assert cpu.philox(42, counter, 8).tolist() == expected


def test_dropout_mask_is_a_function_of_the_global_row():
    x = np.ones((64, 1000), np.float32)
    whole = kernels.dropout(x, 0.3, 9, 4, 77)
    assert np.array_equal(whole[16:40], kernels.dropout(x[16:40], 0.3, 9, 4, 77, row=16))
    assert abs((whole > 0).mean() - 0.7) < 0.01 and np.allclose(whole[whole > 0], 1 / 0.7)
    assert not np.array_equal(whole, kernels.dropout(x, 0.3, 9, 5, 77))


def test_prepare_crops_mirrors_and_normalises(rng):
    photos = rng.integers(0, 256, (3, 12, 12, 3)).astype(np.uint8)
    photos[2] = 200  # a blank photo
    y = kernels.prepare(photos, [0, 4, 1], [2, 1, 1], [False, True, False], 8)
    part = photos[1, 4:12, 1:9][:, ::-1].astype(np.float64)
    np.testing.assert_allclose(y[1], (part - part.mean()) / part.std(), atol=1e-5)
    assert abs(y[0].mean()) < 1e-5 and abs(y[0].std() - 1) < 1e-5
    assert not y[2].any()


# ------------------------------------------------------------------------ losses and SGD


def test_softmax_loss_is_worked_out_by_hand():
    s = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0], [5.0, 5.0, 5.0]])
    targets, weights = np.array([[0, 2], [2, -1], [1, -1]], np.int32), np.array([0.5, 0.25, 0])
    z0, z1 = sum(map(math.exp, s[0])), sum(map(math.exp, s[1]))
    expected = -0.5 * (math.log(math.exp(1) / z0) + math.log(math.exp(0.5) / z0)) - 0.25 * math.log(
        math.exp(3) / z1
    )
    loss, ds = kernels.softmax_loss(s.copy(), targets, weights)
    assert math.isclose(loss, expected, rel_tol=1e-12)
    np.testing.assert_allclose(
        ds[0],
        [0.5 * (2 * math.exp(1) / z0 - 1), math.exp(2) / z0, 0.5 * (2 * math.exp(0.5) / z0 - 1)],
    )
    assert not ds[2].any()  # a row that does not count


def check_loss_gradient(loss, s):
    """The gradient of loss(s) -> (ℓ, ∂ℓ/∂s) at every score against central differences."""
    gradient = loss(s.copy())[1]
    for index in np.ndindex(s.shape):
        step = np.zeros(s.shape)
        step[index] = 1e-6
        numeric = (loss(s + step)[0] - loss(s - step)[0]) / 2e-6
        assert abs(numeric - gradient[index]) < 1e-8, index


def test_softmax_loss_gradient_is_numerical(rng):
    check_loss_gradient(batch_of(rng, 3, 2, 9)[1], rng.standard_normal((3, 9)))


def test_softmax_loss_survives_large_scores():
    s = np.array([[1e4, -1e4, 0]], np.float32)
    loss, ds = kernels.softmax_loss(s, np.array([[1]], np.int32), np.ones(1, np.float32))
    assert loss == 2e4 and ds.tolist() == [[1, -1, 0]]


def test_one_vs_all_loss_is_equation_1(rng):
    n, k, total = 4, 5, 40                      # N = 40 photos, of which a batch of 4
    counts, s = rng.integers(1, 30, k), 3 * rng.standard_normal((n, k))
    targets = np.array([[0, 2], [2, -1], [1, 3], [-1, -1]], np.int32)
    expected = 0
    for i, j in np.ndindex(n, k):
        term = (log_expit(s[i, j]) / counts[j] if j in targets[i] else
                log_expit(-s[i, j]) / (total - counts[j]))
        expected -= total / (n * k) * term
    loss, _ = model.OneVersusAll(counts / total)(s.copy(), targets, np.full(n, 1 / n))
    assert math.isclose(loss, expected, rel_tol=1e-12)


def test_one_vs_all_loss_gradient_is_numerical(rng):
    targets = np.array([[0, 2], [2, -1], [-1, -1]], np.int32)
    loss_of = model.OneVersusAll(rng.uniform(0.1, 0.9, 6))
    loss = lambda s: loss_of(s, targets, np.array([0.5, 0.25, 0.25]))
    check_loss_gradient(loss, 2 * rng.standard_normal((3, 6)))


def test_one_vs_all_loss_survives_large_scores_and_words_of_every_photo():
    s = np.array([[1e4, -1e4, 0, -3e38, 7]], np.float32)
    share = np.array([0.5, 0.5, 0.5, 0.5, 1.0])
    loss, ds = model.OneVersusAll(share)(s, np.array([[1, 4]], np.int32), np.ones(1))
    assert loss == pytest.approx(0.4 * (2e4 + math.log(2)) + 0.2 * math.log1p(math.exp(-7)))
    np.testing.assert_allclose(ds, [[0.4, -0.4, 0.2, 0, -0.2 / (1 + math.exp(7))]], rtol=1e-6)


def test_softmax_with_shifts_is_a_sum_over_what_classes_stand_for(rng):
    s, shift = rng.standard_normal((2, 4)), rng.uniform(0, 3, 4)
    targets, weights = np.array([[0, 2], [3, -1]], np.int32), np.array([0.5, 0.25])
    loss, ds = kernels.softmax_loss(s.copy(), targets, weights, shift)
    for i, mine in enumerate(([0, 2], [3])):
        z = s[i] + np.where(np.isin(range(4), mine), 0, shift)
        expected = weights[i] * (len(mine) * scipy_softmax(z) - np.isin(range(4), mine))
        np.testing.assert_allclose(ds[i], expected)
        loss += weights[i] * sum(z[t] - logsumexp(z) for t in mine)
    assert abs(loss) < 1e-12


def test_sgd_follows_its_formula(rng):
    w, v, dw = (rng.standard_normal(300_000) for _ in range(3))
    new_v = 0.9 * v + dw + 0.01 * w
    new_w = w - 0.1 * new_v
    kernels.sgd(w, v, dw, 0.1, 0.9, 0.01)
    np.testing.assert_allclose(v, new_v)
    np.testing.assert_allclose(w, new_w)


def test_learning_rate_is_halved_when_the_error_rose():
    rule = model.Plateau(0.1, 3, 0.02)
    rates = []
    for error in [5, 6, 4, 5, 6, 4, 5, 3, 4, 5]:
        rates.append(rule.rate)
        going = rule.update(error)
    assert rates == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025, 0.025] and not going


def test_networks_have_their_parameter_counts():
    def count(net, heads=True):
        return sum(
            np.prod(layer.shape if name == "w" else layer.bias)
            for path, layer, name in net.parameters()
            if heads or not path.startswith("head")
        )

    for k in (10, 1000):
        assert count(model.alexnet(k, 0.5)) == 57_003_840 + 4097 * k
        assert count(model.googlenet(k, 0.4), heads=False) == 6_998_552 + 1025 * (k - 1000)
        assert count(model.googlenet(k, 0.4)) == 13_378_280 + 3 * 1025 * (k - 1000)


def test_network_overfits_one_batch(rng):
    net = model.small(20, 0.0).init(0)
    x = rng.standard_normal((16, 64, 64, 3)).astype(np.float32)
    targets, weights = np.arange(16, dtype=np.int32)[:, None], np.full(16, 1 / 16, np.float32)
    optimiser, losses = model.SGD(net, 0.9, 0), []
    for step in range(150):
        loss, ds = kernels.softmax_loss(net.forward(x, step=step), targets, weights)
        losses.append(loss)
        net.backward(ds)
        optimiser.step(0.003)
    assert abs(losses[0] - math.log(20)) < 0.1 and losses[-1] < 0.05


# ------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    "caption, words",
    [
        ("A tri-colored dog, isn't it?", "a tricolored dog isnt it"),
        ("#sunset#beach 2014 mp3 3.5 12-13", "sunset beach mp3"),
        ("Été à Nîmes — Ça va: cœur", "ete a nimes ca va cœur"),
        ("e\u0301te\u0301 naïve ÅNGSTRÖM", "ete naive angstrom"),
        ("Ёлка и йогурт Київ", "елка и йогурт київ"),
        ("ΚΑΛΗΜΈΡΑ", "καλημερα"),
        ("हिन्दी में फूल", "हिन्दी में फूल"),
        ("สวัสดีครับ ประเทศไทย", "สวัสดีครับ ประเทศไทย"),
        ("한국어 사진", "한국어 사진"),
        ("日本の写真 2015", "日本の写真"),
        ("dog,cat/bird|fish", "dog cat bird fish"),
        ("❤️ love☀️ ½ ² ٣", "love"),
        ("", ""),
        ("!!! 12", ""),
        ("a\nb\tc\u2028d\u00a0e", "a b c d e"),
    ],
)
def test_words_are_the_papers_in_every_script(caption, words):
    assert data.words_of(caption) == words.split()


def test_words_of_decomposed_hangul_and_marks_stay_whole():
    assert data.words_of("\u1112\u1161\u11ab\u1100\u1173\u11af") == ["한글"]


# --------------------------------------------------------------------------------- formats

ROWS = [
    ("a.jpg", "one dog"),
    ("b c.jpg", "two, dogs"),
    ("sub/ü.jpg", 'three "dogs"'),
    ("a.jpg", "four"),
]


def yfcc_line(photo, title, description, tags, columns, video=False):
    head = {23: [photo], 24: ["7", photo], 25: ["7", photo, "0f" * 16]}[columns]
    url = "http://www.flickr.com/photos/1@N00/1/"
    return "\t".join(
        [
            *head,
            "1@N00",
            "nick",
            "2009-01-01",
            "123",
            "Canon",
            title,
            description,
            tags,
            "",
            "",
            "",
            "",
            url,
            url,
            "CC",
            url,
            "1",
            "2",
            "3",
            "4",
            "jpg",
            str(int(video)),
        ]
    )


def captions_text(kind):
    if kind == "tsv":
        return "".join(f"{name}\t{text}\n" for name, text in ROWS)
    if kind == "token":
        return "".join(f"{name}#{i}\t{text}\r\n" for i, (name, text) in enumerate(ROWS))
    if kind == "csv":
        quoted = ((name, '"' + text.replace('"', '""') + '"') for name, text in ROWS)
        return "image,caption\n" + "".join(f"{name},{text}\n" for name, text in quoted)
    if kind == "bare csv":
        return "image_name| comment_number| comment\n" + "".join(
            f"{name}| 0| {text}\n" for name, text in ROWS
        )
    if kind == "jsonl":
        keys = ["text", "caption", "captions", "tags"]
        return "".join(
            json.dumps({"file_name": name, key: text.split(" ") if key == "tags" else text}) + "\n"
            for key, (name, text) in zip(keys, ROWS)
        )
    if kind == "coco":
        names = list(dict.fromkeys(name for name, _ in ROWS))
        return json.dumps(
            {
                "info": {},
                "images": [{"id": i, "file_name": n} for i, n in enumerate(names)],
                "annotations": [{"image_id": names.index(n), "caption": t} for n, t in ROWS],
            },
            indent=1,
        )
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind, found",
    [
        ("tsv", "tsv"),
        ("token", "tsv"),
        ("csv", "csv"),
        ("bare csv", "csv"),
        ("jsonl", "jsonl"),
        ("coco", "coco"),
    ],
)
@pytest.mark.parametrize(
    "pack",
    [bytes, gzip.compress, bz2.compress, b"\xef\xbb\xbf".__add__],
    ids=["plain", "gzip", "bzip2", "BOM"],
)
def test_captions_formats_are_recognised_and_read(kind, found, pack, tmp_path):
    path = tmp_path / "captions"
    path.write_bytes(pack(captions_text(kind).encode()))
    assert data.recognise(path) == found
    rows = []
    for block, _ in data.blocks(path, found):
        names, captions, bad = data.parse(block, found)
        assert not bad
        rows += zip(names, captions)
    assert [(name, data.words_of(text)) for name, text in rows] == [
        (name, data.words_of(text)) for name, text in ROWS
    ]


@pytest.mark.parametrize("columns", [23, 24, 25])
def test_yfcc_table_is_read_with_and_without_line_numbers(columns, tmp_path):
    path = tmp_path / "yfcc"
    path.write_text(
        "\n".join(
            [
                yfcc_line("6185218911", "My+Caf%C3%A9", "at+the%0Asea", "red+car,sun", columns),
                yfcc_line("5", "a+video", "", "", columns, video=True),
                "junk",
            ]
        )
        + "\n"
    )
    assert data.recognise(path) == "yfcc"
    ((block, _),) = data.blocks(path, "yfcc")
    names, captions, bad = data.parse(block, "yfcc")
    code = "0f" * 16 + "/" if columns == 25 else ""
    assert names == [f"{code}6185218911.jpg"] and bad == 1
    assert data.words_of(captions[0]) == "my cafe at the sea red car sun".split()


def test_yfcc_names_hold_the_hash_where_the_table_has_one(tmp_path):
    for columns, name in ((23, "6000000000.jpg"), (25, f"{6_000_000_000:032x}/6000000000.jpg")):
        bench.write_yfcc(tmp_path / "y", 300, columns)
        ((block, _),) = data.blocks(tmp_path / "y", data.recognise(tmp_path / "y"))
        names, captions, bad = data.parse(block, "yfcc")
        assert names[0] == name and len(names) == 298 and not bad           # two are videos
        assert data.words_of(captions[0])[-3:-1] != data.words_of(captions[0])[:2]
        assert "the end" in data.normalise(captions[7]) and "\n" not in captions[7]


LAYOUTS = {
    "as named": lambda code, photo: f"{code}/{photo}.jpg",
    "by id": lambda code, photo: f"{photo}.jpg",
    "by hash": lambda code, photo: f"{code[:3]}/{code[3:6]}/{code}.jpg",
    "first letters of the id": lambda code, photo: f"{photo[:3]}/{photo[3:6]}/{photo}.jpg",
    "last letters of the id": lambda code, photo: f"{photo[-2:]}/{photo}.jpg",
    "folders of any name": lambda code, photo: f"part {int(photo) % 3}/{photo}.jpg",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_photos_are_found_in_sub_folders(layout, tmp_path):
    rng = np.random.default_rng(1)
    photos = [(f"{code:032x}", str(photo)) for code, photo in zip(
        rng.integers(1 << 60, 1 << 62, 30), rng.integers(1_000_000, 9_999_999, 30))]
    for pair in photos:
        path = tmp_path / LAYOUTS[layout](*pair)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    folder = data.Folder(str(tmp_path))
    for pair in photos:
        found = folder.find("/".join(pair) + ".jpg")
        assert found == str(tmp_path / LAYOUTS[layout](*pair))
    assert folder.find("0" * 32 + "/5.jpg") == str(tmp_path / ("0" * 32) / "5.jpg")     # missing


def test_photos_are_never_sought_outside_the_folder(tmp_path):
    for path in ("in/ab/abc.jpg", "in/cde/x/de.jpg", "ab/x/ab.jpg", "x.jpg", "in/ef/.DS_Store",
                 "in/ef/efg.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    folder = data.Folder(str(tmp_path / "in"))
    assert ((0, 2),) in folder.ways and ("ef",) not in folder.ways
    for name in ("..x.jpg", "./x.jpg", "x/ab.jpg", "/ab.jpg", "a.jpg"):
        for candidate in list(folder._candidates(name))[1:]:
            path = os.path.normpath(os.path.join(str(tmp_path / "in"), candidate))
            assert path.startswith(str(tmp_path / "in")), (name, candidate)


def test_what_a_kill_left_beside_an_index_is_taken_away(tmp_path):
    write_captions(tmp_path / "c")
    arguments = str(tmp_path / "c"), str(tmp_path / "i"), data.Text(30, 5, 0.2)
    whole = columns_of(data.build_index(*arguments))
    (tmp_path / "i" / data.PASSES).mkdir()
    (tmp_path / "i" / data.PASSES / "000.records").write_text("much")
    assert columns_of(data.build_index(*arguments)) == whole
    assert not (tmp_path / "i" / data.PASSES).exists()
    os.rename(tmp_path / "i", tmp_path / "i.old")                   # killed between two renames
    assert columns_of(data.build_index(*arguments)) == whole
    assert sorted(os.listdir(tmp_path)) == ["c", "i"]


def test_index_goes_on_after_a_kill(tmp_path, monkeypatch):
    write_captions(tmp_path / "c")
    text = data.Text(30, 5, 0.2)
    arguments = str(tmp_path / "c"), str(tmp_path / "i"), text
    whole = columns_of(data.build_index(str(tmp_path / "c"), str(tmp_path / "whole"), text))
    honest = {name: getattr(data, name) for name in ("_count", "_record", "group_records")}

    def killed(*_):
        raise KeyboardInterrupt

    calls = []
    for name in ("_record", "group_records"):
        monkeypatch.setattr(data, name, killed)
        with pytest.raises(KeyboardInterrupt):
            data.build_index(*arguments)
        assert not (tmp_path / "i").exists()
        monkeypatch.setattr(data, name, honest[name])
        monkeypatch.setattr(data, "_count", lambda *_: calls.append("counted again"))
    monkeypatch.setattr(data, "_record", lambda *_: calls.append("recorded again"))
    assert columns_of(data.build_index(*arguments)) == whole and not calls
    assert sorted(os.listdir(tmp_path / "i")) == sorted(os.listdir(tmp_path / "whole"))
    monkeypatch.undo()
    monkeypatch.setattr(data, "_record", killed)
    with pytest.raises(KeyboardInterrupt):
        data.build_index(*arguments[:2], data.Text(20, 5, 0.2))
    monkeypatch.undo()                          # other options: what was left is of no use
    assert len(data.build_index(*arguments[:2], data.Text(10, 5, 0.2)).dictionary) == 10


def test_failed_index_leaves_nothing_behind(tmp_path, monkeypatch):
    write_captions(tmp_path / "c")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "group_records", full)
    with pytest.raises(OSError):
        data.build_index(str(tmp_path / "c"), str(tmp_path / "i"), data.Text(30, 5, 0.2))
    assert os.listdir(tmp_path) == ["c"]


def test_captions_in_odd_encodings_are_read(tmp_path):
    path = tmp_path / "captions.tsv"
    path.write_bytes(
        b"a.jpg\tcaf\xe9 noir\nb.jpg\t\xff\xfe\x00\x01\nno tab here\n\xe9.jpg\tok\nc.jpg\t"
        + b"word " * 200_000
        + b"\n"
    )
    ((block, _),) = data.blocks(path, "tsv")
    names, captions, bad = data.parse(block, "tsv")
    assert bad == 1 and names[0] == "a.jpg" and data.words_of(captions[0]) == ["cafe", "noir"]
    assert os.fsencode(names[2]) == b"\xe9.jpg" and len(data.words_of(captions[3])) == 200_000


def test_commas_that_nobody_quoted_stay_in_the_caption(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('image,caption\na.jpg,one, two, three\nb.jpg\n"c.jpg","x\ny"\n')
    ((block, _),) = data.blocks(path, "csv")
    names, captions, bad = data.parse(block, "csv")
    assert names == ["a.jpg", "c.jpg"] and bad == 1
    assert data.words_of(captions[0]) == ["one", "two", "three"]


# ------------------------------------------------------------------------- index and draws


def write_captions(path, photos=400, seed=0, extra=""):
    rng = np.random.default_rng(seed)
    vocabulary = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60)]
    chance = 1 / np.arange(1, 61)
    lines = [
        f"p{i}.jpg\t{' '.join(rng.choice(vocabulary, 4, p=chance / chance.sum()))}"
        for _ in range(3)
        for i in range(photos)
    ]  # a photo's captions far apart
    path.write_text("\n".join(lines) + "\n" + extra)
    return [line.split("\t") for line in lines]


def columns_of(index):
    return {
        index.name(i): [index.dictionary.words[w] for w in index.words(i)]
        for i in range(len(index))
    }


def test_index_is_the_captions_words(tmp_path):
    rows = write_captions(tmp_path / "c", extra="../out.jpg\twaa\n/etc/x.jpg\twaa\nempty.jpg\t \n")
    index = data.build_index(str(tmp_path / "c"), str(tmp_path / "i"), data.Text(30, 5, 0.2))
    held = {name for name, _ in rows if data.name_hashes([name.encode()])[0] < 0.2 * 2**32}
    counts = {}
    for name, caption in rows:
        for word in caption.split() if name not in held else ():
            counts[word] = counts.get(word, 0) + 1
    words = sorted(counts, key=lambda word: (-counts[word], word))[5:35]
    assert index.dictionary.words == words
    expected = {}
    for name, caption in rows:
        expected.setdefault(name, set()).update(set(caption.split()) & set(words))
    assert {n: set(w) for n, w in columns_of(index).items()} == {
        n: w for n, w in expected.items() if w
    }
    assert {index.name(i) for i in range(index.held_out)} == {n for n in held if expected[n]}
    assert index.facts["refused"] == 2 and index.facts["without_words"] >= 1
    for k, word in enumerate(words):
        photos = {index.name(int(p)) for p in index.photos(k)}
        assert photos == {n for n in expected if word in expected[n] and n not in held}
        assert len(photos) == index.photo_counts()[k] > 0


def test_index_does_not_depend_on_blocks_or_processes(tmp_path, monkeypatch):
    write_captions(tmp_path / "c")
    text = data.Text(30, 5, 0.2)
    one = columns_of(data.build_index(str(tmp_path / "c"), str(tmp_path / "1"), text))
    monkeypatch.setattr(data, "BLOCK_BYTES", 3000)
    assert columns_of(data.build_index(str(tmp_path / "c"), str(tmp_path / "2"), text)) == one
    monkeypatch.setattr(data, "SMALL_FILE", 0)
    assert (
        columns_of(data.build_index(str(tmp_path / "c"), str(tmp_path / "3"), text, processes=2))
        == one
    )


def test_words_of_a_block_are_those_of_its_captions():
    captions = ["a dog", "", "  ", "aaaaaaaa aaaaaaaab aaaaaaaaa a", "Straße прыжок狗 Café cafe",
                "12 ½", "supercalifragilistic don't", "狗在跑 a\u2028aaaaaaaa\x85b\x0bx", "last"]
    words, number, per_caption = data._tokens(captions)
    found = np.split(np.array(words)[number], np.cumsum(per_caption)[:-1])
    assert [[word for word in row if not word.isdecimal()] for row in found] == [
        data.words_of(caption) for caption in captions]


def test_index_is_cached_until_something_changes(tmp_path):
    write_captions(tmp_path / "c")
    build = lambda text: data.build_index(str(tmp_path / "c"), str(tmp_path / "i"), text)
    build(data.Text(30, 5, 0.2))
    made = os.stat(tmp_path / "i" / "index.json").st_mtime_ns
    build(data.Text(30, 5, 0.2))
    assert os.stat(tmp_path / "i" / "index.json").st_mtime_ns == made
    assert len(build(data.Text(29, 5, 0.2)).dictionary) == 29
    write_captions(tmp_path / "c", seed=1)
    build(data.Text(29, 5, 0.2))
    assert os.stat(tmp_path / "i" / "index.json").st_mtime_ns != made


def test_held_out_photos_stay_held_out_when_photos_are_added(tmp_path):
    write_captions(tmp_path / "c", 200)
    write_captions(tmp_path / "d", 400)
    held = []
    for name in "cd":
        index = data.build_index(
            str(tmp_path / name), str(tmp_path / f"i{name}"), data.Text(60, 0, 0.25)
        )
        held.append({index.name(i) for i in range(index.held_out)})
    assert held[0] == {name for name in held[1] if int(name[1:-4]) < 200}
    assert 0.15 < len(held[1]) / 400 < 0.35


def test_rare_words_are_pruned_and_frequent_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_COUNTED", 40)
    monkeypatch.setattr(data, "BLOCK_BYTES", 3000)
    write_captions(tmp_path / "c")
    index = data.build_index(str(tmp_path / "c"), str(tmp_path / "i"), data.Text(5, 0, 0))
    assert index.dictionary.words == ["waa", "wab", "wac", "wad", "wae"]


@pytest.fixture
def index(tmp_path):
    write_captions(tmp_path / "c")
    return data.build_index(str(tmp_path / "c"), str(tmp_path / "i"), data.Text(30, 5, 0.2))


def test_draws_are_uniform_over_words_and_over_their_photos(index):
    words, photos = [], []
    for step in range(300):
        draw = data.Draws(index, 3, step, 64)
        words += draw.words
        photos += [p for w, p in zip(draw.words, draw.photos) if w == 2]
        assert all(
            w in index.words(p) and p >= index.held_out for w, p in zip(draw.words[:5], draw.photos)
        )
    assert chisquare(np.bincount(words, minlength=30)).pvalue > 1e-3
    seen = np.bincount(photos, minlength=len(index))[np.asarray(index.photos(2))]
    assert chisquare(seen).pvalue > 1e-3


def test_draws_by_image_are_uniform_over_photos_with_all_words(index):
    photos = [p for step in range(200) for p in data.Draws(index, 3, step, 64, "image").photos]
    counts = np.bincount(photos, minlength=len(index))
    assert not counts[: index.held_out].any()
    assert chisquare(counts[index.held_out :]).pvalue > 1e-3
    draw = data.Draws(index, 3, 0, 8, "image")
    for photo, row in zip(draw.photos, draw.targets()):
        assert [w for w in row if w >= 0] == list(index.words(photo))
    assert draw.retry(0) is None and draw.weights[0] == 0


def test_draws_are_a_function_of_seed_step_row_and_attempt(index):
    one, two = data.Draws(index, 3, 9, 64), data.Draws(index, 3, 9, 128)
    assert one.photos == two.photos[:64] and one.words == two.words[:64]
    assert one.photos != data.Draws(index, 4, 9, 64).photos
    word = one.words[5]
    tried = [one.retry(5) for _ in range(7)]
    assert tried == [two.retry(5) for _ in range(7)] and len(set(tried)) > 1
    assert all(word in index.words(photo) for photo in tried)
    assert one.retry(5) is None and one.weights[5] == 0


def test_rows_of_a_part_are_those_of_the_whole_batch(index):
    for sampling in ("class", "image"):
        whole = data.Draws(index, 3, 9, 10, sampling)
        share = index.share(sampling)
        parts = [data.Draws(index, 3, 9, 10, sampling, slice(*ends)) for ends in ((0, 3), (3, 10))]
        assert parts[0].photos + parts[1].photos == whole.photos
        assert parts[0].words == parts[1].words == whole.words
        assert np.array_equal(parts[1].weights, whole.weights[3:])
        assert parts[1].retry(2) == whole.retry(5)
        rows = parts[1].targets()
        assert np.array_equal(rows, whole.targets()[3:, :rows.shape[1]])
        for a, b in zip(parts[1].crops(8, True), whole.crops(8, True)):
            assert np.array_equal(a, b[3:])
        for a, b in zip(parts[1].classes(share, 7), whole.classes(share, 7)):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("sampling", ["class", "image"])
@pytest.mark.parametrize("negatives", [0, 7, 99])
def test_chance_of_a_class_is_how_often_it_is_there(index, sampling, negatives):
    share, steps, n = index.share(sampling), 1500, 6
    there, left_out = np.zeros(30), np.zeros(30)
    for step in range(steps):
        draw = data.Draws(index, 3, step, n, sampling)
        classes, chance = draw.classes(share, negatives)
        mine = draw.targets()[0]
        assert set(classes) >= {w for row in draw.targets() for w in row if w >= 0}
        free = np.setdiff1d(np.arange(30), mine)                    # row 0 does not carry them
        left_out[free] += 1
        free = np.isin(classes, free)
        there[classes[free]] += 1 / chance[free]
    np.testing.assert_allclose(there / left_out, 1, atol=0.35 if not negatives else 0.2)
    assert abs(np.mean(there / left_out) - 1) < 0.02
    if negatives == 99:
        assert len(classes) == 30 and np.array_equal(chance, np.ones(30))


def losses_over_all_draws(k, n, loss_of, corrected):
    """Mean gradient of the scores of row 0 over all draws of n words; and that over all words."""
    s = np.random.default_rng(0).standard_normal((n, k))
    mean, whole, share = np.zeros(k), np.zeros(k), np.full(k, 1 / k)
    for words in np.ndindex(*[k] * n):
        targets, weights = np.array(words, np.int32)[:, None], np.full(n, 1 / n)
        classes = np.unique(targets)
        chance = 1 - (1 - share[classes]) ** (n - 1) if corrected else None
        ds = loss_of(s[:, classes].copy(), data.columns(targets, classes), weights, classes, chance)
        mean[classes] += ds[1][0] / k**n
        whole += loss_of(s.copy(), targets, weights)[1][0] / k**n
    return mean, whole


def test_one_vs_all_over_the_batchs_words_is_unbiased():
    loss_of = model.OneVersusAll(np.full(4, 0.25))
    mean, whole = losses_over_all_draws(4, 3, loss_of, corrected=True)
    np.testing.assert_allclose(mean, whole)
    mean, _ = losses_over_all_draws(4, 3, loss_of, corrected=False)
    assert abs(mean - whole).max() > 0.01


def test_sampled_softmax_approaches_the_full_one(rng):
    k, n = 1000, 16
    s, share = rng.standard_normal((n, k)), np.full(k, 1 / k)
    off = []
    for negatives in (0, 10, 100, 1000):
        losses = []
        for step in range(200):
            words = np.random.default_rng(step).integers(0, k, n)
            draw = data.Draws.__new__(data.Draws)
            vars(draw).update(sampling="class", words=words, count=n, seed=5, step=step)
            classes, chance = draw.classes(share, negatives)
            some, whole = (
                model.Softmax(share)(s[:, c].copy(), data.columns(words[:, None], c),
                                     np.full(n, 1 / n), c, p)[0]
                for c, p in ((classes, chance), (np.arange(k), None)))
            losses.append(some - whole)
        off.append(abs(np.mean(losses)))
    assert off[0] > off[1] > off[2] > off[3] and off[2] < 0.02 and off[3] < 1e-12


def test_normaliser_is_bracketed_by_equations_3_and_4(rng):
    k = 1000
    scores = rng.standard_normal(k) * 2
    s = np.exp(scores - scores.min())           # all at least 1
    whole = np.log(s.sum())
    for size in (10, 128, 500, k):
        sums = np.array([s[rng.choice(k, size, replace=False)].sum() for _ in range(500)])
        expected, scale = np.log(sums).mean(), np.log(size / k)
        likely = (sums / size >= s.mean() * (1 - 1e-12)).mean()
        assert likely * (whole + scale) <= expected + 1e-12 and expected <= whole + 1e-12
        assert expected <= whole + scale + 3 * np.log(sums).std() / np.sqrt(500)    # Jensen
    for size in (10, 128):                      # a batch's C holds the target, here the best word
        rest = np.delete(s, s.argmax())
        sums = np.array([s.max() + rng.choice(rest, size - 1, replace=False).sum()
                         for _ in range(500)])
        assert np.log(size / k) + whole < np.log(sums).mean() <= whole


# ---------------------------------------------------------------------------------- photos


def odd_photos(folder):
    """Files that bite, with what is wrong with them, or None where nothing is."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (50, 70, 3)).astype(np.uint8))
    rgb.save(folder / "good.jpg")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.convert("LA").save(folder / "la.png")
    rgb.convert("1").save(folder / "bits.png")
    Image.fromarray(rng.integers(0, 65536, (40, 30)).astype(np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    Image.new("RGB", (20_000, 3), "red").save(folder / "wide.png")
    (folder / "späce name ☃.jpg").write_bytes((folder / "good.jpg").read_bytes())
    whole = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("broken image")
    (folder / "folder.jpg").mkdir()
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "noise.jpg").write_bytes(b"\xff\xd8\xff" + rng.bytes(500))
    return {
        "good.jpg": None,
        "cmyk.jpg": None,
        "palette.png": None,
        "alpha.png": None,
        "la.png": None,
        "bits.png": None,
        "deep.png": None,
        "dot.png": None,
        "wide.png": None,
        "späce name ☃.jpg": None,
        "cut.jpg": "truncated",
        "empty.jpg": "zero bytes",
        "text.jpg": "not a picture",
        "folder.jpg": "not a file",
        "bomb.png": "pixels",
        "noise.jpg": ".",
        "missing.jpg": "no such file",
    }


def test_every_kind_of_photo_is_decoded_or_named(tmp_path):
    for name, wrong in odd_photos(tmp_path).items():
        if wrong is None:
            pixels, digest = data.decode(str(tmp_path / name), 32)
            assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 and len(digest) == 8
        else:
            with pytest.raises(ValueError, match=wrong):
                data.decode(str(tmp_path / name), 32)


def test_photos_are_turned_and_scaled_as_they_should(tmp_path):
    left = Image.new("RGB", (60, 30), "black")
    left.paste("white", (0, 0, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise
    left.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels, _ = data.decode(str(tmp_path / "turned.jpg"), 16)
    assert pixels[:6].mean() > 240 and pixels[-6:].mean() < 15
    Image.fromarray(np.full((9, 9), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert abs(data.decode(str(tmp_path / "deep.png"), 8)[0].mean() - 127.5) < 1.5
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert data.decode(str(tmp_path / "clear.png"), 8)[0].min() == 255


@pytest.fixture
def photos(tmp_path):
    """A folder of photos named as in write_captions, one in ten of them missing or broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(2)
    for i in range(400):
        if i % 20 == 3:
            continue
        if i % 20 == 7:
            (folder / f"p{i}.jpg").write_text("broken")
            continue
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).resize((20, 20)).save(
            folder / f"p{i}.jpg"
        )
    return folder


def load_all(index, photos, workers, batch=16, steps=12, room=None, hurt=None):
    loader = data.Loader(str(photos), index.name, room or len(index), 24, batch, workers)
    found = []
    for plan, pixels in loader.batches(data.Draws(index, 1, step, batch) for step in range(steps)):
        found.append((pixels.copy(), list(plan.photos), plan.weights.copy()))
        if hurt and len(found) == 3:
            hurt(loader)
    loader.close()
    return found, loader.skipped


def same_batches(one, two):
    return all(
        np.array_equal(a[0], b[0]) and a[1] == b[1] and np.array_equal(a[2], b[2])
        for a, b in zip(one, two, strict=True)
    )


def test_batches_do_not_depend_on_workers_or_cache(index, photos):
    found, skipped = load_all(index, photos, 0)
    for workers, room in ((1, None), (2, None), (3, 1), (0, 1)):
        again, skipped_again = load_all(index, photos, workers, room=room)
        assert same_batches(found, again) and skipped == skipped_again
    assert {why for why in skipped.values()} == {"no such file or directory", "not a picture"}


def test_batches_survive_a_worker_that_dies(index, photos):
    def kill(loader):
        os.kill(loader.workers[0]["process"].pid, signal.SIGKILL)
        time.sleep(0.2)

    assert same_batches(
        load_all(index, photos, 0)[0], load_all(index, photos, 2, room=1, hurt=kill)[0]
    )


def test_features_are_followed_by_scores_of_all_words(index, photos):
    net = model.small(len(index.dictionary), 0).init(0)
    net.forward(np.zeros((1, 64, 64, 3), np.float32), classes=np.array([3], np.int32))
    loader = data.Loader(str(photos), index.name, len(index), 72, 8)
    x, found = evaluation.features_of(net, loader, [], 64)          # this rank has no photo
    loader.close()
    assert not found and net.rows[-1][1].forward(np.zeros((2, 512), np.float32)).shape == (2, 30)


def test_listed_photos_keep_their_order_and_lose_what_is_broken(index, photos):
    loader = data.Loader(str(photos), index.name, len(index), 24, 64)
    ((plan, pixels),) = loader.batches([data.Listed(range(50))])
    loader.close()
    for row in range(50):
        path = photos / index.name(row)
        if plan.weights[row]:
            assert np.array_equal(pixels[row], data.decode(str(path), 24)[0])
        else:
            assert not pixels[row].any() and index.name(row) in loader.skipped


# --------------------------------------------------------------------------------- metrics


def test_precision_is_worked_out_by_hand():
    scores = np.array([[0.1, 0.9, 0.5, 0.2], [0.4, 0.3, 0.2, 0.1]])
    rows = [np.array([1, 3]), np.array([2])]
    best = evaluation.top_words(scores, 10)
    assert best.tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]
    np.testing.assert_allclose(
        evaluation.precision_at(best, rows, (1, 2, 3)), [[1, 0.5, 2 / 3], [0, 0, 1 / 3]]
    )


def test_auc_and_average_precision_are_worked_out_by_hand(rng):
    scores = np.array([[0.9, 0.5], [0.8, 0.5], [0.7, 0.5], [0.1, 0.5]])
    carried = np.array([[1, 1], [0, 0], [1, 0], [0, 1]], bool)
    auc, ap = evaluation.auc_and_ap(scores, carried)
    np.testing.assert_allclose(auc, [3 / 4, 1 / 2])
    assert math.isclose(ap[0], (1 + 2 / 3) / 2)
    scores, carried = rng.standard_normal((40, 5)), rng.random((40, 5)) < 0.3
    carried[:, 4] = False
    auc, _ = evaluation.auc_and_ap(scores, carried)
    for k in range(4):
        pairs = [(a > b) for a in scores[carried[:, k], k] for b in scores[~carried[:, k], k]]
        assert math.isclose(auc[k], np.mean(pairs))
    assert np.isnan(auc[4])


# --------------------------------------------------------------------- the commands, as used


def run(*arguments, folder, script="weak.py", expect=0):
    """A command as a user types it; its output. No traceback, whatever happens."""
    done = subprocess.run(
        [sys.executable, os.path.join(HERE, script), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


TINY = (
    "--words",
    30,
    "--stop-words",
    5,
    "--valid",
    0.2,
    "--batch",
    16,
    "--epoch-size",
    96,
    "--threads",
    2,
    "--workers",
    1,
)


@pytest.fixture
def mine(tmp_path, photos):
    """The options of a tiny run on photos of one's own."""
    write_captions(tmp_path / "captions.tsv")
    return ["--images", photos, "--captions", tmp_path / "captions.tsv", *TINY]


def arrays(path):
    with np.load(path) as file:
        return {key: file[key] for key in file.files if key[:2] in ("w/", "v/")}


def same_models(one, two):
    one, two = arrays(one), arrays(two)
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def test_run_leaves_all_its_files_and_eval_reads_them(mine, tmp_path):
    done = run(*mine, "--epochs", 2, "--out", "r", folder=tmp_path)
    assert "device: CPU" in done.stdout and "next: python eval.py tag" in done.stdout
    log = [json.loads(line) for line in open(tmp_path / "r" / "log.jsonl")]
    assert [row["epoch"] for row in log] == [1, 2] and log[-1]["step"] == 12
    assert {"loss", "learning_rate", "images_per_second", "loader_wait", "precision@10"} <= set(
        log[0]
    )
    words = [line.split("\t") for line in open(tmp_path / "r" / "words.txt")]
    assert len(words) == 30 and all(int(count) > 0 for _, count in words)
    skipped = dict(line.rstrip("\n").split("\t") for line in open(tmp_path / "r" / "skipped.txt"))
    assert "not a picture" in skipped.values()
    for picture in ("curves.png", "filters.png"):
        assert Image.open(tmp_path / "r" / picture).size[0] > 100
    run("words", "--model", "r", "--json", "w.json", folder=tmp_path, script="eval.py")
    result = json.load(open(tmp_path / "w.json"))
    assert {
        "precision@1",
        "precision@5",
        "precision@10",
        "auc",
        "map",
        "photos",
        "words",
        "baseline",
    } <= set(result)
    assert 0 < result["photos"] < 100 and set(result["baseline"]) == {
        "precision@1",
        "precision@5",
        "precision@10",
    }
    run("words", "--model", "r", "--all", "--json", "a.json", folder=tmp_path, script="eval.py")
    assert json.load(open(tmp_path / "a.json"))["photos"] > 300
    good = tmp_path / "photos" / "p1.jpg"
    run(
        "tag",
        "--model",
        "r",
        good,
        "--top",
        3,
        "--json",
        "t.json",
        folder=tmp_path,
        script="eval.py",
    )
    assert len(json.load(open(tmp_path / "t.json"))["tags"][str(good)]) == 3
    done = run(
        "tag",
        "--model",
        "r",
        good,
        "none.jpg",
        "--threshold",
        0.9,
        folder=tmp_path,
        script="eval.py",
        expect=1,
    )
    assert "no word above" in done.stdout and "none.jpg: no such file" in done.stderr
    done = run(*mine, "--out", "r", folder=tmp_path, expect=2)
    assert "--resume" in done.stderr


def test_resumed_run_is_the_uninterrupted_one_to_the_bit(mine, tmp_path):
    mine += ["--dropout", 0.2, "--min-lr", 1e-9]
    run(*mine, "--epochs", 3, "--out", "whole", folder=tmp_path)
    run(*mine, "--epochs", 1, "--out", "parts", folder=tmp_path)
    assert not same_models(tmp_path / "whole" / "model.npz", tmp_path / "parts" / "model.npz")
    run("--resume", "--out", "parts", "--epochs", 3, "--workers", 0, folder=tmp_path)
    assert same_models(tmp_path / "whole" / "model.npz", tmp_path / "parts" / "model.npz")
    logs = [
        [json.loads(line)["loss"] for line in open(tmp_path / name / "log.jsonl")]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    done = run("--resume", "--out", "parts", "--lr", 0.5, folder=tmp_path, expect=2)
    assert "--lr (0.02, now 0.5)" in done.stderr


def test_interrupted_run_saves_and_resumes_to_the_bit(mine, tmp_path):
    mine[mine.index("--epoch-size") + 1] = 1600
    run(*mine, "--epochs", 1, "--out", "whole", folder=tmp_path)
    process = subprocess.Popen(
        [
            sys.executable,
            os.path.join(HERE, "weak.py"),
            *map(str, mine),
            "--epochs",
            "1",
            "--out",
            "parts",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "parameters" in line:
            break
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait() == 130 and "--resume" in rest, rest
    assert (
        0 < json.loads(np.load(tmp_path / "parts" / "model.npz")["facts"].tobytes())["step"] < 100
    )
    run("--resume", "--out", "parts", folder=tmp_path)
    assert same_models(tmp_path / "whole" / "model.npz", tmp_path / "parts" / "model.npz")


@pytest.mark.parametrize("options", [
    ["--loss", "one-vs-all"],
    ["--targets", "batch"],
    ["--targets", "batch", "--loss", "one-vs-all", "--sampling", "image"],
    ["--targets", "sampled", "--negatives", 9],
    ["--targets", "sampled", "--loss", "one-vs-all"],
])
def test_losses_and_targets_train_resume_and_are_evaluated(options, mine, tmp_path):
    mine += ["--min-lr", 1e-9, *options]
    run(*mine, "--epochs", 2, "--out", "whole", folder=tmp_path)
    run(*mine, "--epochs", 1, "--out", "parts", folder=tmp_path)
    run("--resume", "--out", "parts", "--epochs", 2, folder=tmp_path)
    assert same_models(tmp_path / "whole" / "model.npz", tmp_path / "parts" / "model.npz")
    run("tag", "--model", "whole", tmp_path / "photos" / "p1.jpg", folder=tmp_path,
        script="eval.py")
    done = run("--resume", "--out", "parts", "--targets", "all" if "--targets" in options else
               "batch", folder=tmp_path, expect=2)
    assert "--targets (" in done.stderr and "--negatives" not in done.stderr


def test_run_on_the_yfcc_table_finds_its_photos(tmp_path):
    bench.write_yfcc(tmp_path / "y.bz2", 400, 25, vocabulary=40, pack=bz2.open)
    rng = np.random.default_rng(0)
    for i in range(400):
        code = f"{6_000_000_000 + i:032x}"
        folder = tmp_path / "photos" / code[:3] / code[3:6]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).save(
            folder / f"{code}.jpg")
    done = run("--images", "photos", "--captions", "y.bz2", *TINY, "--epochs", 1, "--out", "r",
               folder=tmp_path)
    assert "397 as yfcc" in done.stdout and "skipped" not in done.stdout    # three are videos
    photo = done.stdout.rpartition("--model r ")[2].strip().strip("'")
    run("tag", "--model", "r", photo, folder=tmp_path, script="eval.py")


# ---------------------------------------------------------------------------- several ranks


def ranks(count, *arguments, folder, code=None, expect=0, traceback=False):
    """The training script, or code, under mpiexec; its output."""
    pytest.importorskip("mpi4py")
    mpiexec = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    mpiexec = mpiexec if os.path.exists(mpiexec) else shutil.which("mpiexec")
    if not mpiexec:
        pytest.skip("no mpiexec")
    script = ["-c", code, HERE] if code else [os.path.join(HERE, "weak.py")]
    done = subprocess.run(
        [mpiexec, "-n", str(count), sys.executable, *script, *map(str, arguments)], cwd=folder,
        capture_output=True, text=True, timeout=240)
    assert done.returncode == expect, done.stdout + done.stderr
    assert ("Traceback" in done.stderr) == traceback, done.stderr
    return done


@pytest.mark.parametrize("options", [
    ["--dropout", 0.3], ["--targets", "sampled", "--negatives", 5, "--sampling", "image",
                         "--loss", "one-vs-all"], ["--targets", "batch"]])
def test_two_ranks_are_one(options, mine, tmp_path):
    mine += ["--batch", 9, "--epoch-size", 36, "--epochs", 2, "--threads", 1, *options]
    run(*mine, "--out", "one", folder=tmp_path)
    done = ranks(2, *mine, "--out", "two", folder=tmp_path)
    assert "ranks: 2" in done.stdout and "for other ranks" in done.stdout
    assert done.stdout.count("device:") == 1    # one of them speaks
    one, two = arrays(tmp_path / "one" / "model.npz"), arrays(tmp_path / "two" / "model.npz")
    for key, value in one.items():
        np.testing.assert_allclose(two[key], value, rtol=1e-3, atol=2e-5 * abs(value).max())
    logs = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
            for name in ("one", "two")]
    for a, b in zip(*logs):
        for key in ("loss", "validation_loss"):
            assert math.isclose(a[key], b[key], rel_tol=1e-5)
        assert a["skipped"] == b["skipped"]
    for name in ("words.txt", "skipped.txt"):
        assert sorted(open(tmp_path / "one" / name)) == sorted(open(tmp_path / "two" / name))


def test_run_of_two_ranks_goes_on_with_one(mine, tmp_path):
    mine += ["--min-lr", 1e-9]
    run(*mine, "--epochs", 2, "--out", "one", folder=tmp_path)
    ranks(2, *mine, "--epochs", 1, "--out", "two", folder=tmp_path)
    run("--resume", "--out", "two", "--epochs", 2, folder=tmp_path)
    one, two = arrays(tmp_path / "one" / "model.npz"), arrays(tmp_path / "two" / "model.npz")
    for key, value in one.items():
        np.testing.assert_allclose(two[key], value, rtol=1e-3, atol=1e-4 * abs(value).max())


FAILING = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import eval as evaluation, model, weak
step = weak.Run.train_step
def failing(self, draw, photos):
    if self.ranks.rank == 1 and self.step == 8:
        {what}
    return step(self, draw, photos)
weak.Run.train_step = failing
if int(os.environ["PMI_RANK"]):
    model.save = lambda *_: print("rank 1 writes")
evaluation.guarded(weak.main)
"""


@pytest.mark.parametrize("what, status, line", [
    ("raise RuntimeError('a planted fault')", 1, "rank 1 of 2: .*: a planted fault"),
    ("1 / 0", 1, "ZeroDivisionError"), ("os.kill(os.getpid(), 9)", 9, "")])
def test_rank_that_dies_ends_the_job_and_leaves_the_checkpoint_whole(
        what, status, line, mine, tmp_path):
    done = ranks(2, *mine, "--epochs", 3, "--out", "r", folder=tmp_path, expect=status,
                 code=FAILING.format(what=what), traceback="1 / 0" in what)
    assert len(re.findall(line, done.stderr)) == (1 if line else len(done.stderr) + 1)
    assert "rank 1 writes" not in done.stdout
    assert model.load(str(tmp_path / "r" / "model.npz"))[2]["step"] == 6


def test_more_ranks_than_photos_a_step_are_refused_by_one_line(mine, tmp_path):
    done = ranks(2, *mine, "--batch", 1, folder=tmp_path, expect=2)
    assert done.stderr.count("--batch 1 is less than the 2 ranks") == 1


def test_bad_options_are_told_once_whatever_the_ranks(mine, tmp_path):
    for options in (["--batch", "many"], ["--lr", -1]):
        done = ranks(3, *mine, *options, folder=tmp_path, expect=2)
        assert done.stderr.count("weak.py: ") == 1


def test_mpiexec_of_another_mpi_is_said_with_the_remedy(tmp_path):
    pytest.importorskip("mpi4py")
    done = subprocess.run([sys.executable, os.path.join(HERE, "weak.py")], capture_output=True,
                          text=True, env={**os.environ, "OMPI_COMM_WORLD_SIZE": "2"}, cwd=tmp_path)
    assert done.returncode == 1 and "not of the MPI that mpi4py uses" in done.stderr


def test_missing_mpi4py_is_said_with_the_remedy(tmp_path, monkeypatch):
    code = ("import sys; sys.modules['mpi4py'] = None; sys.path.insert(0, sys.argv.pop(1));"
            "import eval, weak; eval.guarded(weak.main)")
    done = subprocess.run([sys.executable, "-c", code, HERE], capture_output=True, text=True,
                          env={**os.environ, "PMI_SIZE": "2"}, cwd=tmp_path)
    assert done.returncode == 1 and "pip install mpi4py" in done.stderr
    assert done.stderr.count("\n") == 1


def test_infinite_loss_stops_the_run_in_one_line(mine, tmp_path):
    done = run(*mine, "--lr", 1e9, "--epochs", 3, "--out", "bad", folder=tmp_path, expect=1)
    assert "lower --lr" in done.stderr and "step" in done.stderr and done.stderr.count("\n") == 1
    assert not os.path.exists(tmp_path / "bad" / "model.npz")


def test_infinite_loss_leaves_the_last_checkpoint_untouched(mine, tmp_path, monkeypatch):
    honest, out = kernels.softmax_loss, str(tmp_path / "r")
    options, _ = weak.parse([*map(str, mine), "--epochs", "3", "--out", out])
    lock = weak.lock_folder(out)
    training = weak.Run(options, weak.read_captions(options), None)

    def spoilt(s, targets, weights, shift):
        loss, ds = honest(s, targets, weights, shift)
        return (float("inf") if training.step == 8 else loss), ds

    monkeypatch.setattr(kernels, "softmax_loss", spoilt)
    with pytest.raises(RuntimeError, match="inf at step 8: the checkpoint of step 6 is untouched"):
        training.train(weak.Interrupt())
    training.loader.close()
    lock.close()
    assert model.load(os.path.join(out, "model.npz"))[2]["step"] == 6


def test_full_disk_costs_a_run_only_the_checkpoint(mine, tmp_path, monkeypatch, capsys):
    honest, out = os.fsync, str(tmp_path / "r")
    options, _ = weak.parse([*map(str, mine), "--epochs", "2", "--out", out])
    lock = weak.lock_folder(out)
    training = weak.Run(options, weak.read_captions(options), None)

    def full(descriptor):
        if training.epoch == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert training.train(weak.Interrupt())
    training.loader.close()
    lock.close()
    assert "free some space" in capsys.readouterr().err
    assert model.load(os.path.join(out, "model.npz"))[2]["step"] == 12


SAVER = """
import sys, numpy as np
sys.path.insert(0, {here!r})
import model
net = model.small(500, 0).init(0)
optimiser = model.SGD(net, 0.9, 0)
step = 0
while True:
    for _, layer, name in net.parameters():
        getattr(layer, name)[...] = step
    model.save({path!r}, net, optimiser, {{"step": step}}, ["a"])
    step += 1
    print(step, flush=True)
"""


def test_checkpoint_is_whole_after_kill_in_mid_save(tmp_path):
    path = str(tmp_path / "model.npz")
    rng = np.random.default_rng(5)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER.format(here=HERE, path=path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0.01, 0.2))
        process.kill()
        process.wait()
        weights, _, facts, _ = model.load(path)
        assert all((value == facts["step"]).all() for value in weights.values())


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    net = model.small(5, 0).init(0)
    optimiser, path = model.SGD(net, 0.9, 0), str(tmp_path / "model.npz")
    model.save(path, net, optimiser, {"step": 1}, ["a"])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        model.save(path, net, optimiser, {"step": 2}, ["a"])
    assert model.load(path)[2] == {"step": 1} and os.listdir(tmp_path) == ["model.npz"]


def test_drawn_set_is_drawn_trained_and_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weak, "PHOTOS", 300)
    monkeypatch.setattr(sys, "argv", ["weak.py", "--epochs", "1", "--epoch-size", "256"])
    assert weak.main() == 0
    lines = open(tmp_path / "runs" / "drawn" / "drawn" / "captions.tsv").read()
    assert len(lines.splitlines()) == 300 and "#" in lines
    assert len(weak._shapes()) >= 12
    assert "precision@10" in capsys.readouterr().out


def test_drawn_scene_is_a_function_of_its_number():
    one, two = weak.draw_scene(0, 5), weak.draw_scene(0, 5)
    assert one[1] == two[1] and np.array_equal(np.asarray(one[0]), np.asarray(two[0]))
    assert weak.draw_scene(0, 6)[1] != one[1]


BAD = {
    "no such images": (lambda d: ["--images", "none", "--captions", "captions.tsv"], "no folder"),
    "no such captions": (lambda d: ["--images", "photos", "--captions", "none"], "no file"),
    "captions missing": (lambda d: ["--images", "photos"], "go together"),
    "images missing": (lambda d: ["--captions", "captions.tsv"], "--images"),
    "captions is a folder": (
        lambda d: ["--images", "photos", "--captions", "photos"],
        "is a folder",
    ),
    "captions empty": (lambda d: ["--images", "photos", "--captions", "empty"], "is empty"),
    "captions binary": (lambda d: ["--images", "photos", "--captions", "binary"], "captions"),
    "captions of nothing": (lambda d: ["--images", "photos", "--captions", "blank"], "no training"),
    "captions utf-16": (lambda d: ["--images", "photos", "--captions", "utf16"], "UTF-16"),
    "captions broken json": (lambda d: ["--images", "photos", "--captions", "json"], "COCO"),
    "captions torn gzip": (lambda d: ["--images", "photos", "--captions", "torn.gz"], "damaged"),
    "photos elsewhere": (
        lambda d: ["--images", "other", "--captions", "captions.tsv", "--stop-words", 5],
        "none of the",
    ),
    "too many stop words": (
        lambda d: ["--images", "photos", "--captions", "captions.tsv", "--stop-words", 5000],
        "lower --stop-words",
    ),
    "words of zero": (lambda d: ["--words", 0], "at least 1"),
    "rate below zero": (lambda d: ["--lr", -1], "out of range"),
    "rate infinite": (lambda d: ["--lr", "inf"], "out of range"),
    "seed too large": (lambda d: ["--seed", 2**64], "below"),
    "threads without end": (lambda d: ["--threads", 99999], "--threads"),
    "workers without end": (lambda d: ["--workers", 99999], "--workers"),
    "out is a file": (lambda d: ["--out", "captions.tsv"], "choose another"),
    "out is somebody else's": (lambda d: ["--out", "other"], "holds other things"),
    "nothing to resume": (lambda d: ["--resume", "--out", "fresh"], "no run in"),
    "gpu": (lambda d: ["--device", "gpu"], "--device cpu"),
    "a batch of one word": (lambda d: ["--targets", "batch", "--batch", 1], "--batch 2"),
    "negatives of nothing": (lambda d: ["--negatives", 5], "--targets sampled"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_the_remedy(name, tmp_path, photos):
    write_captions(tmp_path / "captions.tsv", 40)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "words.txt").write_text("mine")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(np.random.default_rng(0).bytes(100_000))
    (tmp_path / "blank").write_text("a.jpg\t\nb.jpg\t12\n")
    (tmp_path / "utf16").write_text("a.jpg\tx\n", encoding="utf-16")
    (tmp_path / "json").write_text('{"images": [')
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"a.jpg\tx y z\n" * 9999)[:-40])
    arguments, remedy = BAD[name]
    expect = 1 if name == "gpu" else 2
    done = run(*arguments(tmp_path), folder=tmp_path, expect=expect)
    assert done.stderr.count("\n") == 1 and remedy in done.stderr, done.stderr
    assert (tmp_path / "other" / "words.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "annotations", ["null", "5", '[null, [], {"image_id": [1]}, {"image_id": 1}]']
)
def test_odd_coco_files_cost_no_traceback(annotations, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        '{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2}, 7], "annotations": '
        + annotations
        + "}"
    )
    if annotations.startswith("["):
        ((block, _),) = data.blocks(path, "coco")
        assert data.parse(block, "coco")[0] == ["a.jpg"]
    else:
        with pytest.raises(ValueError, match="annotations"):
            list(data.blocks(path, "coco"))


def test_odd_json_lines_are_counted(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"file_name": "a.jpg", "text": "x"}\n{"file_name": "b\\ud800.jpg", "text": "x"}\n'
        "null\n5\n" + "[" * 200_000 + "\n"
    )
    ((block, _),) = data.blocks(path, "jsonl")
    assert data.parse(block, "jsonl") == (["a.jpg"], ["x"], 4)


def test_quote_that_nobody_closed_costs_one_row(tmp_path):
    path = tmp_path / "c.csv"
    path.write_bytes(
        b'image,caption\n0.jpg,caf\xe9\n1.jpg,"a cat sits\n'
        + b"".join(b"%d.jpg,word\n" % i for i in range(2, 60))
    )
    ((block, _),) = data.blocks(path, "csv")
    names, captions, _ = data.parse(block, "csv")
    assert len(names) == 60 and data.words_of(captions[0]) == ["cafe"]
    assert data.words_of(captions[1]) == ["a", "cat", "sits"]


def test_missing_captions_are_not_the_word_none(tmp_path):
    (tmp_path / "c").write_text('{"file_name": "a.jpg", "text": null}\n')
    ((block, _),) = data.blocks(tmp_path / "c", "jsonl")
    assert data.parse(block, "jsonl") == (["a.jpg"], [""], 0)


def test_long_first_line_of_json_lines_is_recognised(tmp_path):
    (tmp_path / "c").write_text(json.dumps({"file_name": "a.jpg", "text": "word " * 99_999}) + "\n")
    assert data.recognise(tmp_path / "c") == "jsonl"


def test_steps_without_any_photo_cost_nothing_but_themselves(mine, tmp_path):
    mine[mine.index("--batch") + 1] = 1
    run(*mine, "--sampling", "image", "--lr", 0.001, "--epochs", 1, "--out", "r", folder=tmp_path)
    kept = open(tmp_path / "r" / "skipped.txt").read()
    run("--resume", "--out", "r", folder=tmp_path)
    assert kept and open(tmp_path / "r" / "skipped.txt").read() == kept


def test_diverged_weights_are_not_saved(mine, tmp_path):
    mine[mine.index("--epoch-size") + 1] = 16  # the first step ends an epoch
    done = run(*mine, "--lr", 1e30, "--out", "r", folder=tmp_path, expect=1)
    assert "lower --lr" in done.stderr and not os.path.exists(tmp_path / "r" / "model.npz")


def test_resume_with_the_same_relative_paths_goes_on(mine, tmp_path):
    mine[1:4:2] = ["photos", "captions.tsv"]
    run(*mine, "--epochs", 1, "--out", "r", folder=tmp_path)
    run(*mine, "--epochs", 2, "--out", "r", "--resume", folder=tmp_path)


def test_folder_of_a_running_run_is_refused(tmp_path):
    lock = weak.lock_folder(str(tmp_path / "r"))
    with pytest.raises(ValueError, match="another run"):
        weak.lock_folder(str(tmp_path / "r"))
    lock.close()
    weak.lock_folder(str(tmp_path / "r")).close()


def test_flat_and_diverged_curves_are_drawn(tmp_path):
    for losses in ([5e35, 5e35], [0.0, 0.0], [1e-12, 3.0], [float("nan")]):
        evaluation.curves_picture(
            [{"epoch": i + 1, "loss": loss} for i, loss in enumerate(losses)], tmp_path / "c.png"
        )


def test_small_dictionary_is_said_and_used(mine, tmp_path):
    mine[mine.index("--words") + 1] = 999
    done = run(*mine, "--epochs", 1, "--out", "r", folder=tmp_path)
    assert "only 55 words" in done.stdout and len(open(tmp_path / "r/words.txt").readlines()) == 55


def test_eval_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path / "model.npz").write_text("not a model")
    for arguments, remedy in (
        (["words", "--model", "none"], "train one"),
        (["tag", "--model", tmp_path, "x.jpg"], "not a model"),
        (["words", "--model", "none", "--threads", -1], "--threads"),
        (["words", "--model", "none", "--json", "/nope/x"], "--json"),
        (["tag", "--model", "none", "x.jpg", "--top", 0], "--top"),
    ):
        done = run(*arguments, folder=tmp_path, script="eval.py", expect=2)
        assert remedy in done.stderr


def test_cupy_is_optional(tmp_path):
    code = (
        "import sys; sys.modules['cupy'] = None; sys.path.insert(0, sys.argv[1]);"
        "import kernels; print(kernels.use('auto'))"
    )
    done = subprocess.run([sys.executable, "-c", code, HERE], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("device: CPU")


# ------------------------------------------------------------------------- the CUDA kernels

EMULATOR = emulate.Emulator() if emulate.compiler() else None
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
HALF = 2.0**-24                         # a float's rounding error, relative


@pytest.fixture(params=["emulated", "gpu"])
def device(request):
    """Each test of the kernels runs twice: on the host's processor, and on a GPU if one is here."""
    if request.param == "emulated" and not EMULATOR:
        pytest.skip("no C++ compiler to run the kernels with")
    try:
        kernels.use(EMULATOR if request.param == "emulated" else "gpu", "fp32")
    except RuntimeError as error:
        pytest.skip(str(error))
    yield EMULATOR if request.param == "emulated" else "gpu"
    kernels.use("cpu")


def up(*arrays):
    """Arrays where the device computes."""
    return [kernels.to_device(x) for x in arrays]


def wide(x, before=4, after=8):
    """x on the device as a channel slice of a wider array, and that array; x None: NaN inside."""
    whole = kernels.to_device(np.full((*x.shape[:-1], before + x.shape[-1] + after), np.nan))
    part = whole[..., before:before + x.shape[-1]]
    part[...] = kernels.to_device(x)
    return part, whole


def check_close(y, expected, magnitude, terms, error=HALF):
    """y within what rounding `terms` products explains; a failure names the index and values."""
    y = kernels.to_host(y).astype(np.float64)
    bound = error * (3 + 3 * np.sqrt(terms)) * magnitude + 1e-30
    assert y.shape == expected.shape and not np.isnan(y).any()
    worst = np.unravel_index(np.argmax(np.abs(y - expected) / bound), y.shape)
    assert (np.abs(y - expected) <= bound).all(), (
        f"at {worst}: {y[worst]} instead of {expected[worst]}")


def conv_case(seed):
    """A random convolution: x, w, b, stride, pad; sizes odd and even, images smaller than a tile.

    Float64 arrays whose numbers are floats. Every fourth case has channels in multiples of four.
    """
    rng = np.random.default_rng(seed)
    four = 4 if seed % 4 == 0 else 1
    k, stride, pad = rng.integers(1, 12), int(rng.integers(1, 5)), int(rng.integers(0, 6))
    n, c, f = rng.integers(1, 4), rng.integers(1, 20) * four, rng.integers(1, 36) * four
    h, w = (max(1, k - 2 * pad + rng.integers(0, 12)) for _ in range(2))
    return (*(rng.standard_normal(shape).astype(np.float32).astype(np.float64)
              for shape in ((n, h, w, c), (k, k, c, f), (f,))), stride, pad)


def check_convolution(case, error=HALF):
    """All three directions against the float64 twin, reading and writing channel slices."""
    x, w, b, stride, pad = case
    y = cpu.conv_forward(x, w, b, stride, pad, relu=True)
    dy = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32).astype(np.float64)
    k, c, f = w.shape[0], w.shape[2], w.shape[3]
    (xd, wd, bd), (dyd, _), (out, whole) = up(x, w, b), wide(dy), wide(y * 0)
    kernels.conv_forward(xd, wd, bd, stride, pad, relu=True, out=out)
    check_close(out, y, cpu.conv_forward(abs(x), abs(w), abs(b), stride, pad), k * k * c, error)
    beside = kernels.to_host(whole)
    assert np.isnan(beside[..., :4]).all() and np.isnan(beside[..., -8:]).all()
    check_close(kernels.conv_backward_input(dyd, wd, xd, stride, pad, relu=True),
                cpu.conv_backward_input(dy, w, x, stride, pad, relu=True),
                cpu.conv_backward_input(abs(dy), abs(w), x, stride, pad), k * k * f, error)
    dw, db = kernels.conv_backward_filter(xd, dyd, w.shape, stride, pad)
    right, magnitude = (cpu.conv_backward_filter(part(x), part(dy), w.shape, stride, pad)
                        for part in (np.asarray, np.abs))
    pixels = dy.size // f
    check_close(dw, right[0], magnitude[0], pixels, error)
    check_close(db, right[1], magnitude[1], pixels)


@pytest.mark.parametrize("seed", range(16))
def test_convolution_kernel_agrees_with_its_twin(device, seed):
    check_convolution(conv_case(seed))


@pytest.mark.parametrize("seed", (0, 3, 4, 8))
@pytest.mark.parametrize("precision, error", [("tf32", 2.0**-11), ("3xtf32", 4 * HALF)])
def test_tensor_core_convolution_agrees_with_its_twin(device, precision, error, seed):
    kernels.use(device, precision)
    check_convolution(conv_case(seed), error)


@pytest.mark.parametrize("shape, taps", [
    ((2, 23, 19, 8), (3, 3, 8, 76)), ((3, 9, 9, 64), (1, 1, 64, 132)),
    ((1, 31, 8, 4), (7, 7, 4, 64))])
@pytest.mark.parametrize("precision", kernels.PRECISIONS)
def test_convolution_over_many_tiles_and_parts_agrees(device, precision, shape, taps, rng):
    kernels.use(device, precision)
    x, w, b = (rng.standard_normal(size) for size in (shape, taps, taps[3:]))
    check_convolution((x, w, b, 1, taps[0] // 2), {"fp32": 2, "tf32": 2.0**13, "3xtf32": 4}[
        precision] * HALF)


def test_tf32_operands_are_rounded_to_nearest(device, rng):
    kernels.use(device, "tf32")
    x, w = rng.random((1, 16, 16, 32)), rng.random((1, 1, 32, 64))
    y = kernels.to_host(kernels.conv_forward(*up(x, w, np.zeros(64))))
    off = y.reshape(-1, 64) / (x.reshape(-1, 32) @ w.reshape(32, 64)) - 1
    assert abs(off.mean()) < 2.0**-14           # cut off instead, they would be 2^-10.5 too small


def test_convolution_kernel_fits_into_little_shared_memory(device, monkeypatch):
    target = gpu._device
    for kilobytes in (64, 99):                  # compute capability 7.5; 8.6, 8.9 and 12.0
        monkeypatch.setattr(target, "shared_bytes", kilobytes << 10)
        check_convolution(conv_case(0))
        assert gpu.tile(1000, 512, 1000, True, target)[1] >= 2


@pytest.mark.parametrize("kernel, stride, pad, ceil", [
    (3, 2, 0, False), (3, 2, 1, True), (2, 2, 0, True), (3, 1, 1, False), (5, 3, 2, True)])
def test_pooling_kernels_agree_with_their_twins(device, kernel, stride, pad, ceil, rng):
    x = rng.integers(-3, 4, (2, 11, 8, 5)).astype(np.float64)       # many ties
    window = kernel, stride, pad
    y, mean = (pool(x, *window, ceil) for pool in (cpu.max_pool_forward, cpu.avg_pool_forward))
    dy = rng.integers(-9, 9, y.shape).astype(np.float64)
    (xd,), (dyd, _), (out, _) = up(x), wide(dy), wide(y * 0)
    kernels.max_pool_forward(xd, *window, ceil, out=out)
    assert np.array_equal(kernels.to_host(out), y)
    for relu in (False, True):
        assert np.array_equal(
            kernels.to_host(kernels.max_pool_backward(dyd, xd, out, *window, relu=relu)),
            cpu.max_pool_backward(dy, x, y, *window, relu=relu))
        check_close(kernels.avg_pool_backward(dyd, xd, *window, relu=relu),
                    cpu.avg_pool_backward(dy, x, *window, relu=relu), 9, kernel)
    check_close(kernels.avg_pool_forward(xd, *window, ceil), mean, 9, kernel)


@pytest.mark.parametrize("channels", (1, 7, 64, 700))
def test_lrn_kernels_agree_with_their_twins(device, channels, rng):
    x, dy = (10 * rng.standard_normal((2, 3, 5, channels)) for _ in range(2))
    for constants in ((5, 2.0, 1e-4, 0.75), (3, 1.0, 0.5, 0.6)):
        check_close(kernels.lrn_forward(*up(x), *constants), cpu.lrn_forward(x, *constants),
                    abs(x) + 1, 30)
        expected = cpu.lrn_backward(dy, x, *constants, relu=True)
        check_close(kernels.lrn_backward(*up(dy, x), *constants, relu=True), expected,
                    abs(dy) + abs(x) + 10, 100)


def test_prepare_kernel_agrees_with_its_twin(device, rng):
    photos = rng.integers(0, 256, (4, 43, 43, 3), np.uint8)
    photos[2] = 77                              # a blank photo
    top, left, flip = np.array([0, 3, 6, 2]), np.array([6, 1, 0, 2]), np.array([0, 1, 0, 1], bool)
    y = kernels.to_host(kernels.prepare(photos, top, left, flip, 37))
    assert not y[..., 3].any() and not y[2].any()
    check_close(kernels.to_device(y[..., :3]), cpu.prepare(photos, top, left, flip, 37), 8, 4)


@pytest.mark.parametrize("n, e", [(3, 16), (2, 37), (5, 1), (1, 4096)])
def test_dropout_kernel_draws_the_masks_of_its_twin(device, n, e, rng):
    x, relu = (rng.standard_normal((n, e)).astype(np.float32) for _ in range(2))
    counter = 2**62 + 11, 2**40 + 3, 3_000_000_000, 7               # seed, step, layer, row
    for rate, gate in ((0.5, None), (0.2, relu)):
        y = kernels.dropout(*up(x), rate, *counter, relu=None if gate is None else up(gate)[0])
        assert np.array_equal(kernels.to_host(y), cpu.dropout(x, rate, *counter, relu=gate))


def test_bias_relu_and_column_sum_kernels_agree_with_their_twins(device, rng):
    shapes = (701, 35), (701, 35), 35
    x, y, b = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    for relu in (False, True):
        assert np.array_equal(kernels.to_host(kernels.add_bias(*up(x, b), relu)),
                              cpu.add_bias(x.copy(), b, relu))
    assert np.array_equal(kernels.to_host(kernels.relu_backward(*up(x, y))),
                          cpu.relu_backward(x, y))
    check_close(kernels.column_sums(*up(x)), x.sum(axis=0, dtype=np.float64),
                abs(x).sum(axis=0), len(x))


@pytest.mark.parametrize("n, k", [(3, 1), (2, 31), (4, 300), (2, 5000)])
def test_loss_kernel_agrees_with_its_twin(device, n, k, rng):
    s = 30 * rng.standard_normal((n, k))
    s[0, 0] = 3e38                              # exp of it overflows
    targets = np.array([[0, -1, k - 1] if k > 1 else [0, -1, -1]] * n, np.int32)
    targets[-1] = -1                            # a photo that could not be read
    weights = np.where(np.arange(n) < n - 1, 0.25, 0.0)
    (sd,) = up(s)
    expected, ds = cpu.softmax_loss(kernels.to_host(sd).astype(np.float64), targets, weights)
    loss, grad = kernels.softmax_loss(sd, targets, weights)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    check_close(grad, ds, abs(ds) + 1e-3, k)


@pytest.mark.parametrize("n, k", [(2, 31), (3, 300), (2, 5000)])
def test_corrected_and_one_vs_all_loss_kernels_agree_with_their_twins(device, n, k, rng):
    s = 5 * rng.standard_normal((n, k))
    s[0, :3] = 1e4, -1e4, 3e4
    targets = np.array([[0, -1, k - 1], [-1, 3, 1], [-1, -1, -1]], np.int32)[:n]
    weights = np.array([0.5, 0.25, 0.0])[:n]
    one, two = rng.uniform(0.01, 3, (2, k))
    for name, vectors in (("softmax_loss", (one,)), ("one_vs_all_loss", (one, two))):
        (sd,) = up(s)
        expected, ds = getattr(cpu, name)(
            kernels.to_host(sd).astype(np.float64), targets, weights, *vectors)
        loss, grad = getattr(kernels, name)(sd, targets, weights, *vectors)
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        check_close(grad, ds, abs(ds) + 1e-3, k)


def test_sum_kernel_agrees_with_its_twin(device, rng):
    x, y = (rng.standard_normal((7, 13)).astype(np.float32) for _ in range(2))
    assert np.array_equal(kernels.to_host(kernels.add(*up(x, y))), x + y)


def test_update_kernels_agree_with_their_twins(device, rng):
    constants = 0.1, 0.9, 5e-4                  # rate, momentum, decay
    w, v, dw = (rng.standard_normal((7, 13)) for _ in range(3))
    rows = np.array([5, 0, 3], np.int32)
    for mine, arrays in (((), (w, v, dw)), ((rows,), (w, v, dw[:3]))):
        wd, vd, dwd = up(*arrays)
        w1, v1 = w.copy(), v.copy()
        (kernels.sgd_rows if mine else kernels.sgd)(wd, vd, dwd, *mine, *constants)
        (cpu.sgd_rows if mine else cpu.sgd)(w1, v1, arrays[2], *mine, *constants)
        check_close(wd, w1, 4, 4)
        check_close(vd, v1, 4, 4)
    for x in (w, w[:, 0].copy()):               # a bias has one number a row
        (xd,) = up(x)
        taken = kernels.to_host(kernels.take_rows(xd, rows))
        assert np.array_equal(taken, x[rows].astype(np.float32))


def tiny_googlenet(k, dropout):
    """All kinds of layers of GoogLeNet on 64×64 pixels."""
    return model.Network([
        ("conv1", model.Conv(3, 8, 7, stride=4, pad=3)),                    # 16
        ("norm1", model.LRN()),
        ("pool1", model.MaxPool(3, 2, ceil=True)),                          # 8
        ("3a", model.inception(8, 4, 4, 8, 4, 4, 8)),                       # 8, 24 channels
        ("head", model.Head(("pool", model.AvgPool(5, 3)), ("conv", model.Conv(24, 8, 1)),
                            ("flat", model.Flatten()), ("fc", model.Linear(32, 12)),
                            ("drop", model.Dropout(0.7)), ("output", model.Output(12, k)))),
        ("3b", model.inception(24, 8, 8, 8, 4, 8, 8)),                      # 8, 32 channels
        ("pool5", model.AvgPool(8, 1)),
        ("flat", model.Flatten()),
        ("drop", model.Dropout(dropout)),
        ("output", model.Output(32, k)),
    ])


@pytest.mark.parametrize("build", [model.small, tiny_googlenet])
@pytest.mark.parametrize("classes", [None, np.array([0, 1, 4, 6, 7], np.int32)],
                         ids=["all", "gathered"])
def test_step_on_a_device_is_the_twins(device, build, classes, rng):
    photos = rng.integers(0, 256, (3, 72, 72, 3), np.uint8)
    where = np.array([0, 4, 8]), np.array([8, 2, 0]), np.array([1, 0, 1], bool)
    targets = np.array([[1, 4], [7, -1], [0, -1]], np.int32)
    if classes is not None:
        targets = data.columns(targets, classes)

    def step(on):
        kernels.use(on, "fp32")
        net = build(9, dropout=0.5).init(0)
        optimiser = model.SGD(net, 0.9, 5e-4)
        losses = []
        for number in (1, 2):
            s = net.forward(kernels.prepare(photos, *where, 64), seed=3, step=number,
                            classes=classes)
            loss, ds = model.training_loss(
                net, s, np.full(3, 1 / 3, np.float32),
                lambda s, weights: kernels.softmax_loss(s, targets, weights))
            net.backward(ds)
            optimiser.step(0.05)
            losses.append(float(loss))
        return losses, net.state()

    losses, state = step(device)
    expected, twin = step("cpu")
    assert losses == pytest.approx(expected, rel=1e-4)
    for path, w in state.items():
        assert np.abs(w - twin[path]).max() < 1e-4 * max(0.01, np.abs(twin[path]).max()), path


def test_kernels_refuse_arrays_they_would_misread(device):
    x = kernels.to_device(np.zeros((2, 4, 4, 8)))
    for wrong in (x.transpose(0, 2, 1, 3)[:, :, 1:], x[:, ::2], x.astype(np.float64)):
        with pytest.raises(ValueError, match="float32"):
            kernels.max_pool_forward(wrong, 2, 2)


# a text of a kernel file, what it is changed to, and the test that must then fail
MUTATIONS = [
    ("conv.cu", "i = m < pixels ? oi * stride - pad", "i = m < pixels ? oi * stride + pad", 0),
    ("conv.cu", "p = kw.divide(c.divide(k, channel), q);",
     "q = kw.divide(c.divide(k, channel), p);", 0),
    ("conv.cu", "i % dilate == 0 && j % dilate == 0", "i % dilate == 0", 5),
    ("conv.cu", "copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();", 0),
    ("conv.cu", "const int next = tile + STAGES - 1;", "const int next = tile + STAGES;", 0),
    ("conv.cu", "        __syncthreads();", "        ;", 0),
    ("conv.cu", "if (row >= rows || col >= cols) return;", "if (col >= cols) return;", 0),
    ("conv.cu", "const bool valid = k0 + k < depth && col0 + n < cols;",
     "const bool valid = k0 + k < depth;", 0),
    ("conv.cu", "copy_async<4 * VEC>(&A_AT(m, k), at, valid && there",
     "copy_async<4 * VEC>(&A_AT(m, k), at, there", 0),
    ("conv.cu", "if (bias) v += bias[col];", "if (bias) v -= bias[col];", 1),
    ("pointwise.cu", "turned[(static_cast<long long>(taps - 1 - tap) * f",
     "turned[(static_cast<long long>(tap) * f", 0),
    ("pointwise.cu", "    __syncthreads();                                        // the tile is",
     "    ;                                        // the tile is", 0),
    ("pointwise.cu", "for (int z = 0; z < count; z++)", "for (int z = 1; z < count; z++)", 0),
]


@pytest.mark.parametrize("file, right, wrong, seed", MUTATIONS)
def test_mistake_in_a_kernel_is_caught(file, right, wrong, seed):
    if not EMULATOR:
        pytest.skip("no C++ compiler to run the kernels with")

    with open(os.path.join(HERE, "kernels", file)) as opened:
        assert right in opened.read()
    kernels.use(emulate.Emulator(lambda text: text.replace(right, wrong, 1)), "fp32")
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            check_convolution(conv_case(seed))
    finally:
        kernels.use("cpu")


@pytest.mark.parametrize("body, message", [
    ("y[blockIdx.x * 64 + threadIdx.x + 1] = 0;", "out of bounds, argument 1 of 1, byte 512"),
    ("y[threadIdx.x] = y[(int)threadIdx.x - 1];", "out of bounds, argument 1 of 1, byte -4"),
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
def test_emulator_finds_what_a_gpu_would_hide(body, message, tmp_path):
    if not EMULATOR:
        pytest.skip("no C++ compiler to run the kernels with")
    (tmp_path / "bad.cu").write_text(f'extern "C" __global__ void bad(float* y)\n{{\n{body}\n}}\n')
    emulator = emulate.Emulator()
    with pytest.raises(RuntimeError, match="^bad: .*" + message):
        emulator.launch(str(tmp_path / "bad.cu"), "bad", (), (2,), (64,),
                        (np.zeros(128, np.float32),), shared=256)


def test_emulator_finds_a_write_just_beside_an_array(tmp_path):
    if not EMULATOR:
        pytest.skip("no C++ compiler to run the kernels with")
    (tmp_path / "bad.cu").write_text('extern "C" __global__ void bad(float* y) { y[5] = 0; }\n')
    with pytest.raises(RuntimeError, match="a write beside argument 1 of 1"):
        emulate.Emulator().launch(str(tmp_path / "bad.cu"), "bad", (), (1,), (1,),
                                  (np.zeros(5, np.float32),))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_for(architecture):
    pytest.importorskip("cupy")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda variant: gpu.compile_for(architecture, *variant),
                      gpu.variants(int(architecture) >= 80)))


def test_run_on_the_kernels_goes_on_on_the_cpu(mine, tmp_path, monkeypatch, capsys):
    if not EMULATOR:
        pytest.skip("no C++ compiler to run the kernels with")
    fast = emulate.Emulator()
    fast.orders = [0]                           # one order: other tests look for races
    monkeypatch.setattr(kernels, "_find", lambda device, number: None if device == "cpu" else fast)
    monkeypatch.setattr(weak, "VALIDATED", 4)
    monkeypatch.chdir(tmp_path)
    arguments = ["weak.py", *map(str, mine), "--epoch-size", "16", "--batch", "8", "--workers", "0",
                 "--out", "r"]
    try:
        monkeypatch.setattr(sys, "argv", [*arguments, "--epochs", "1", "--precision", "tf32"])
        assert weak.main() == 0
        out = capsys.readouterr().out
        assert "device: emulated, tf32" in out and "MB an image" in out and "epoch 1" in out
        monkeypatch.setattr(sys, "argv", [*arguments, "--epochs", "2", "--resume", "--device",
                                          "cpu"])
        assert weak.main() == 0 and "going on at step 2" in capsys.readouterr().out
        for free, remedy in ((9 << 20, "--batch [1-7] or less"), (1 << 20, "--device cpu")):
            fast.memory = lambda free=free: free
            monkeypatch.setattr(sys, "argv", [*arguments[:-1], f"other{free}"])
            with pytest.raises(ValueError, match=f"--batch 8 does not fit .* use {remedy}"):
                weak.main()
    finally:
        kernels.use("cpu")


# --------------------------------------------------------------------------- the experiments

def check_numerically(loss, x, gradient, samples=20, eps=1e-5, tolerance=1e-6):
    """A gradient against central differences of loss(x) on random coordinates."""
    for flat in np.random.default_rng(5).choice(x.size, min(samples, x.size), replace=False):
        index = np.unravel_index(flat, x.shape)
        step = np.zeros_like(x)
        step[index] = eps
        numeric = (loss(x + step) - loss(x - step)) / (2 * eps)
        assert abs(numeric - gradient[index]) <= tolerance * max(1, abs(numeric)), (
            index, gradient[index], numeric)


def test_regression_gradient_is_numerical(rng):
    x, y = rng.standard_normal((13, 4)), rng.integers(0, 3, 13)
    flat = rng.standard_normal(5 * 3)
    _, gradient = evaluation.logistic(flat, x, y, 0.3)
    check_numerically(lambda w: evaluation.logistic(w, x, y, 0.3)[0], flat, gradient)


def test_regression_loss_is_worked_out_by_hand():
    x, y = np.array([[1.0], [0.0]]), np.array([0, 1])
    flat = np.array([[2.0, 0.0], [0.0, 0.0]]).ravel()               # w, then b
    loss, gradient = evaluation.logistic(flat, x, y, 0.5)
    p = 1 / (1 + math.exp(-2))
    assert loss == pytest.approx((-math.log(p) + math.log(2)) / 2 + 0.25 * 4)
    assert gradient == pytest.approx([(p - 1) / 2 + 1, (1 - p) / 2, (p - 0.5) / 2, (0.5 - p) / 2])


def test_regression_agrees_with_scikit_learn(rng, monkeypatch):
    linear = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(evaluation, "FIT", {"maxiter": 5000, "gtol": 1e-9, "ftol": 1e-15})
    x, y = rng.standard_normal((90, 6)), rng.integers(0, 4, 90)
    table = evaluation.fitted(x, y, 4, 0.01)
    other = linear.LogisticRegression(C=1 / (0.01 * 90), tol=1e-10, max_iter=5000).fit(x, y)
    assert np.abs(table[:-1] - other.coef_.T).max() < 1e-4
    assert evaluation.accuracy(evaluation.scores_of(table, x), y) == other.score(x, y)


def test_regression_strength_is_chosen_on_held_out_rows(rng):
    x, y = rng.standard_normal((60, 40)), rng.integers(0, 2, 60)    # noise: the strongest is best
    held = evaluation.drawn(y, evaluation.held_share, 0, 1)
    seen = []

    def goodness(scores, given):
        seen.append(len(given))
        return -float(np.abs(scores).sum())
    _, strength = evaluation.chosen(x, y, 2, held, goodness)
    assert strength == evaluation.STRENGTHS[0] and set(seen) == {int(held.sum())}


def test_splits_are_a_function_of_seed_and_number():
    y = np.repeat([0, 1, 2], (10, 4, 30))
    one = evaluation.drawn(y, lambda n: n // 2, 0, 5)
    assert np.bincount(y[one]).tolist() == [5, 2, 15]
    assert np.array_equal(one, evaluation.drawn(y, lambda n: n // 2, 0, 5))
    assert not np.array_equal(one, evaluation.drawn(y, lambda n: n // 2, 0, 6))
    assert all(0 < evaluation.held_share(n) < n for n in (2, 3, 10))


def test_voc_average_precision_is_worked_out_by_hand(rng):
    scores, positive = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1, 0, 1, 0, 0])
    # recalls up to 0.5 have precision 1, the others 2/3: points 0 to 0.5 are six, five follow
    eleven, area = evaluation.voc_ap(scores, positive)
    assert eleven == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert area == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert evaluation.voc_ap(-scores, np.array([0, 0, 0, 1, 1])) == (1, 1)
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positive = rng.standard_normal(50), rng.random(50) < 0.3
    precision, recall, _ = metrics.precision_recall_curve(positive, scores)
    points = [precision[:-1][recall[:-1] >= t - 1e-12].max() for t in np.arange(11) / 10]
    assert evaluation.voc_ap(scores, positive)[0] == pytest.approx(np.mean(points))


def test_voc_labels_leave_difficult_objects_out(tmp_path):
    (tmp_path / "a.xml").write_text(
        "<annotation>" + "".join(
            f"<object><name>{name}</name><difficult>{hard}</difficult><part><name>head</name>"
            "</part></object>" for name, hard in (("cat", 1), ("dog", 1), ("dog", 0), ("ufo", 0))
        ) + "</annotation>")
    unknown = evaluation.Counter()
    labels = evaluation.voc_labels(tmp_path / "a.xml", ["cat", "cow", "dog"], unknown)
    assert labels.tolist() == [0, -1, 1] and unknown == {"ufo": 1}
    (tmp_path / "b.xml").write_text("<annotation><object>")
    with pytest.raises(ValueError, match="b.xml"):
        evaluation.voc_labels(tmp_path / "b.xml", ["cat"], unknown)


def test_rank_correlation_is_scipys_and_worked_out_by_hand():
    vectors = evaluation.units(np.array([[1.0, 0], [1, 1], [0, 1], [1, 3]]))
    pairs = [(0, 1, 9.0), (0, 2, 1.0), (0, 3, 5.0), (1, 3, 4.0)]
    # cosines .71 0 .32 .89 have ranks 3 1 2 4, the scores 4 1 3 2: ρ = 1 - 6·6 / (4·15)
    rho, p = evaluation.correlation(vectors, pairs)
    assert rho == pytest.approx(1 - 6 * (1 + 0 + 1 + 4) / 60) and 0 < p < 1


def test_csls_is_worked_out_by_hand():
    cosines = np.array([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3]])
    # with k = 2: rows have means .85 and .5; columns .8, .5 and .2
    expected = 2 * cosines - np.array([[0.85], [0.5]]) - np.array([0.8, 0.5, 0.2])
    np.testing.assert_allclose(evaluation.csls(cosines, 2), expected)
    assert expected[0].argmax() == 1 and cosines[0].argmax() == 0   # the hub lost a row


def test_retrieval_and_its_chance_are_worked_out_by_hand(rng):
    scores = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3]])
    right = np.array([[0, 1, 0, 0], [1, 0, 0, 1]], bool)
    precision, chance = evaluation.retrieval(scores, right, (1, 2))
    assert precision == {"precision@1": 0.5, "precision@2": 1}
    # two of four columns drawn: one right is missed with 3/4·2/3, two with 2/4·1/3
    assert chance["precision@1"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert chance["precision@2"] == pytest.approx((1 - 1 / 2 + 1 - 1 / 6) / 2)


def test_map_gradient_is_numerical(rng, monkeypatch):
    monkeypatch.setattr(evaluation, "row_blocks", lambda n: [slice(0, 5), slice(5, n)])
    p = evaluation.affinities(rng.standard_normal((12, 4)), 4)
    y = rng.standard_normal((12, 2))
    gradient, _ = evaluation.tsne_gradient(p, y)
    check_numerically(lambda y: evaluation.tsne_gradient(p, y, divergence=True)[1], y, gradient)


def test_map_affinities_have_the_perplexity_and_the_divergence_its_formula(rng):
    x = rng.standard_normal((40, 3))
    d = ((x[:, None] - x) ** 2).sum(axis=2)
    np.fill_diagonal(d, evaluation.FAR)
    rows = evaluation.conditional(d, 7)
    entropy = -(rows * np.log(np.maximum(rows, 1e-300))).sum(axis=1)
    np.testing.assert_allclose(np.exp(entropy), 7, rtol=1e-6)
    p = evaluation.affinities(x, 7)
    assert np.array_equal(p, p.T) and p.sum() == pytest.approx(1) and not p.diagonal().any()
    y = rng.standard_normal((40, 2))
    near = 1 / (1 + ((y[:, None] - y) ** 2).sum(axis=2))
    np.fill_diagonal(near, 0)
    q, off = near / near.sum(), ~np.eye(40, dtype=bool)
    kl = evaluation.tsne_gradient(p, y, 1, True)[1] + evaluation.negative_entropy(p)
    assert kl == pytest.approx((p[off] * np.log(p[off] / q[off])).sum())


def test_map_does_not_depend_on_blocks_and_takes_twin_points(rng, monkeypatch):
    x = np.repeat(rng.standard_normal((20, 5)), 2, axis=0).astype(np.float32)
    whole = evaluation.affinities(x, 5)
    monkeypatch.setattr(evaluation, "row_blocks",
                        lambda n: [slice(i, min(n, i + 7)) for i in range(0, n, 7)])
    np.testing.assert_allclose(evaluation.affinities(x, 5), whole, rtol=1e-4, atol=1e-9)
    y, kl = evaluation.tsne(x, 5, 60, lambda line: None)
    assert np.isfinite(y).all() and np.isfinite(kl)


def test_map_parts_clusters_and_agrees_with_scikit_learn(rng):
    centres = 3 * rng.standard_normal((6, 20))
    x = (np.repeat(centres, 25, axis=0) + rng.standard_normal((150, 20))).astype(np.float32)
    y, kl = evaluation.tsne(x, 15, 750, lambda line: None)
    nearest = ((y[:, None] - y) ** 2).sum(axis=2).argsort(axis=1)[:, 1]
    assert (nearest // 25 == np.arange(150) // 25).mean() > 0.95
    manifold = pytest.importorskip("sklearn.manifold")
    other = manifold.TSNE(perplexity=15, method="exact", init="pca", random_state=0).fit(x)
    assert kl == pytest.approx(other.kl_divergence_, rel=0.05)


def test_mosaic_and_words_do_not_overlap(rng):
    cells = evaluation.free_cells(rng.standard_normal((60, 2)), 10)
    assert len({tuple(cell) for cell in cells}) == 60 and cells.min() >= 0 and cells.max() < 10
    drawn, boxes = evaluation.words_picture(["dog"] * 400, rng.standard_normal((400, 2)),
                                            np.arange(400), 200)
    assert drawn.size == (200, 200) and 5 < boxes < 400


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny run `r` of made-up words, its photos, and pairs of its words."""
    folder = tmp_path_factory.mktemp("tiny")
    photos.__wrapped__(folder)
    write_captions(folder / "captions.tsv")
    run("--images", "photos", "--captions", "captions.tsv", *TINY, "--epochs", 1, "--out", "r",
        folder=folder)
    known = [line.split("\t")[0] for line in open(folder / "r" / "words.txt")]
    (folder / "similar.txt").write_text("one\ttwo\tscore\n" + "".join(
        f"{a}\t{b}\t{i}.5\n" for i, (a, b) in enumerate(zip(known, known[1:]))) + "no\tsuch\t1\n")
    (folder / "pairs.txt").write_text("".join(
        f"{a.upper()} {b}\n" for a, b in zip(known[::2], known[1::2])) + f"{known[0]} {known[0]}\n")
    for i in range(24):
        place = folder / "classes" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (250 * (i % 2), 90, 10 * i)).save(place / f"{i}.png")
    (folder / "classes" / "class0" / "broken.jpg").write_text("broken")
    (folder / "classes" / "class0" / "notes.txt").write_text("no picture")
    return folder, known


@pytest.fixture
def ask(tiny, monkeypatch, capsys):
    """ask(command, …): what an eval command writes as JSON, and what it says, in this process."""
    monkeypatch.chdir(tiny[0])
    evaluation.opened.cache_clear()

    def ask(command, *arguments, expect=0):
        monkeypatch.setattr(sys, "argv", ["eval.py", command, "--model", "r", *map(str, arguments),
                                          "--json", "o.json"])
        assert evaluation.main() == expect
        return json.load(open("o.json")), capsys.readouterr()
    return ask


def test_features_are_the_networks_and_named(tiny, ask):
    folder, _ = tiny
    result, done = ask("features", "--images", "classes", "--out", "f.npz")
    assert result["photos"] == 24 and "broken.jpg: not a picture" in done.err
    with np.load(folder / "f.npz") as file:
        names, one = file["names"], file["features"]
    assert len(names) == 24 and one.shape == (24, 512) and one.dtype == np.float32
    trained = evaluation.Trained(str(folder / "r"))
    pixels = data.decode(str(folder / "classes" / names[3]), 72)[0][None]
    np.testing.assert_allclose(one[3], evaluation.central(trained.net, pixels, 64)[0], atol=1e-5)
    ask("features", "--images", "classes", "--out", "g.npz", "--crops", 10)
    with np.load(folder / "g.npz") as file:                         # the pictures are of one colour
        np.testing.assert_allclose(file["features"], one, atol=1e-4)
    result, _ = ask("features", "--images", "classes", "--out", "c.npz", "--layer",
                          "pool4")
    assert result["numbers"] == 4 * 4 * 128


def test_ten_crops_are_corners_centre_and_mirror_images():
    crops = [(int(t[0]), int(l[0]), bool(f[0])) for t, l, f in evaluation.ten_crops(1, 8)]
    assert set(crops) == {(t, l, f) for t, l in ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4))
                          for f in (False, True)}


def test_transfer_tells_colours_apart(tiny, ask):
    folder, _ = tiny
    result, done = ask("transfer", "--images", "classes", "--splits", 3)
    assert result["chance"] == 0.5 and result["photos"] == 24 and len(result["skipped"]) == 1
    assert result["accuracy"]["raw pixels, 16 × 16"]["accuracy"] == 1
    assert len(result["accuracy"]["this model"]["runs"]) == 3 and "± " in done.out


def test_transfer_reads_a_voc_folder(tmp_path, ask):
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    for i in range(40):
        kind = ("cat", "dog")[i % 2]
        Image.new("RGB", (20, 20), (250 * (i % 2), 90, 5 * i)).save(
            tmp_path / "JPEGImages" / f"{i:06}.jpg")
        (tmp_path / "Annotations" / f"{i:06}.xml").write_text(
            "<annotation" if i == 7 else f"<annotation><object><name>{kind}</name></object>"
            "<object><name>ufo</name></object></annotation>")
    for part, some in (("trainval", range(20)), ("test", range(20, 40))):
        for kind in ("cat", "dog"):
            (tmp_path / "ImageSets" / "Main" / f"{kind}_{part}.txt").write_text(
                "".join(f"{i:06}  1\n" for i in some))
    result, done = ask("transfer", "--images", tmp_path)
    assert set(result["classes"]) == {"cat", "dog"} and result["train"] == 19
    assert result["mean"]["raw pixels, 16 × 16"] == {"points": 1, "area": 1}
    assert "000007.xml" in done.err and "ufo" in done.err


def test_words_of_several_runs_make_a_curve(tiny, ask):
    folder, _ = tiny
    lines = open(folder / "captions.tsv").read().splitlines()
    (folder / "half.tsv").write_text("\n".join(lines[:len(lines) // 2]) + "\n")
    run("--images", "photos", "--captions", "half.tsv", *TINY, "--epochs", 1, "--out", "h",
        folder=folder)
    result, done = ask("words", "h", "--out", "w.png")
    assert 10 < result["words"] <= 30 and len(result["runs"]) == 2
    sizes = [row["training_photos"] for row in result["runs"].values()]
    assert sizes[0] < sizes[1] and {row["photos"] for row in result["runs"].values()} != {0}
    assert len({row["photos"] for row in result["runs"].values()}) == 1
    assert Image.open(folder / "w.png").size[0] > 300


def test_search_neighbors_similar_translate_and_map_answer(tiny, ask):
    folder, known = tiny
    result, _ = ask("search", known[0], known[1], "--out", "s.png", "--top", 3)
    assert [len(row) for row in result["words"].values()] == [3, 3]
    assert Image.open(folder / "s.png").size[0] > 300
    result, _ = ask("neighbors", known[2].upper(), "--top", 4)
    near = list(result["neighbors"][known[2]].values())
    assert len(near) == 4 and near == sorted(near, reverse=True) and near[0] < 1
    result, _ = ask("similar", "--pairs", "similar.txt")
    assert result["similar.txt"]["covered"] == 29 and result["similar.txt"]["pairs"] == 30
    for csls in ((), ("--csls",)):
        result, _ = ask("translate", "--pairs", "pairs.txt", *csls)
        assert result["pairs"] == 15 and result["alike"] == 1 and len(result["best"]) == 12
        assert result["forth"]["chance"]["precision@1"] == pytest.approx(1 / 15)
    for kind in (("--words",), ("--images", "classes")):
        result, done = ask("map", *kind, "--out", "m.png", "--steps", 50, "--size",
                                 400)
        assert Image.open(folder / "m.png").size == (400, 400) and result["kl"] > 0
        assert "about" in done.err and "KL divergence" in done.err


def test_report_is_one_file_with_its_pictures(tiny, ask):
    folder, known = tiny
    result, _ = ask(
        "report", known[0], "--transfer", "classes", "--splits", 2, "--pairs-similar",
        "similar.txt", "--translate", "pairs.txt", "--steps", 40, "--size", 300, "--out", "r.html")
    page = (folder / "r.html").read_text()
    assert not result["failed"] and len(result["parts"]) == 9
    assert page.count("data:image/") == 4 and "<script" not in page and "@media print" in page
    assert "src=\"http" not in page and "href=" not in page
    _, done = ask("report", "nosuchword", "--steps", 40, "--out", "r.html", expect=1)
    assert "nosuchword" in (folder / "r.html").read_text() and "nosuchword" in done.err


WRONG = {
    "layer": (["features", "--images", "classes", "--out", "x.npz", "--layer", "fc9"], "conv1"),
    "ending": (["features", "--images", "classes", "--out", "x.zip"], "must end in .npz"),
    "place": (["search", "dog", "--out", "nope/x.png"], "choose another place"),
    "no folder": (["transfer", "--images", "nope"], "no folder"),
    "empty folder": (["features", "--images", "empty", "--out", "x.npz"], "no picture"),
    "one photo": (["transfer", "--images", "lone"], "too few photos in b"),
    "one class": (["transfer", "--images", "single"], "two classes"),
    "no classes": (["transfer", "--images", "photos"], "no sub-folder"),
    "not so many": (["transfer", "--images", "classes", "--train-per-class", "50"], "too few"),
    "voc without lists": (["transfer", "--images", "voc"], "lists no photo"),
    "unknown word": (["neighbors", "wrod1"], "not among the model's 30 words"),
    "pairs of two": (["similar", "--pairs", "pairs.txt"], "line 2 is not word<TAB>word<TAB>score"),
    "pairs missing": (["translate", "--pairs", "nope"], "cannot read"),
    "pairs binary": (["translate", "--pairs", "r/model.npz"], "UTF-8"),
    "pairs unknown": (["translate", "--pairs", "foreign.txt"], "knows both words of 0"),
    "scores unknown": (["similar", "--pairs", "foreign.txt"], "of no file"),
    "captions foreign": (["words", "--captions", "foreign.tsv"], "word"),
    "curve of one": (["words", "--out", "x.png"], "several runs"),
    "another dictionary": (["words", "other"], "share 0 words"),
    "tiny map": (["map", "--images", "single", "--out", "x.png"], "takes 10"),
    "splits": (["transfer", "--images", "classes", "--splits", "0"], "--splits"),
}


@pytest.mark.parametrize("name", WRONG)
def test_experiment_with_bad_input_says_so_in_one_line(name, tiny, ask, capsys):
    folder, _ = tiny
    (folder / "empty").mkdir(exist_ok=True)
    for place, photo in (("lone/a", 0), ("lone/a", 2), ("lone/a", 4), ("lone/b", 0),
                         ("single/a", 0), ("single/a", 2), ("single/a", 4)):
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.open(folder / "classes" / "class0" / f"{photo}.png").save(
            folder / place / f"{photo}.png")
    (folder / "voc" / "JPEGImages").mkdir(parents=True, exist_ok=True)
    (folder / "foreign.txt").write_text("zyx\txyz\t1\nyxz\txzy\t2\n")
    (folder / "foreign.tsv").write_text("p1.jpg\tzyx yzx\n")
    if name == "another dictionary" and not (folder / "other").exists():
        with np.load(folder / "r" / "model.npz") as file:
            arrays = dict(file)
        arrays["words"] = np.frombuffer("\n".join(f"z{i}" for i in range(30)).encode(), np.uint8)
        (folder / "other").mkdir()
        np.savez(folder / "other" / "model.npz", **arrays)
    (command, *arguments), remedy = WRONG[name]
    with pytest.raises(ValueError) as error:
        ask(command, *arguments)
    assert remedy in str(error.value) and "\n" not in str(error.value)
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") <= 1               # the device


def test_experiments_end_in_one_line_and_status_2(tiny):
    done = run("neighbors", "--model", "r", "zebra", folder=tiny[0], script="eval.py", expect=2)
    assert "not among the model's 30 words" in done.stderr.splitlines()[1]
