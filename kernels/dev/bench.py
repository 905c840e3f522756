"""How fast the kernels, whole steps, the loader and the captions index are, against their limits.

    python kernels/dev/bench.py layers      each convolution: GFLOP/s, share of a plain product's
    python kernels/dev/bench.py step        whole training steps against PyTorch, where installed
    python kernels/dev/bench.py loader --images DIR     photos/s against PyTorch's DataLoader
    python kernels/dev/bench.py targets     steps with K = 1,000 and 100,000, of a batch's words
    python kernels/dev/bench.py bounds      the loss over some words against that over all
    python kernels/dev/bench.py ranks       the allreduce of gradients, under mpiexec
    python kernels/dev/bench.py index       captions/s and memory for 10^4 to 10^7 lines of YFCC
    python kernels/dev/bench.py gpu         each CUDA kernel and whole steps, in each precision
    python kernels/dev/bench.py resources   registers, spills, instructions a mma; needs no GPU

Machines are noisy: things that are compared take turns in one run, and medians are printed.
"""
import bz2
import ctypes
import glob
import importlib.util
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from typing import Callable, NamedTuple
from urllib.parse import quote_plus

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import numpy as np

import data
import kernels
import model
from kernels import gpu as launches         # `gpu` is a command here
from kernels import ranks as several
from kernels.console import Parser, run_command

ALEXNET = [                     # input pixels, C, F, kernel, stride, pad of its convolutions
    ("conv1", 224, 3, 64, 11, 4, 2), ("conv2", 27, 64, 192, 5, 1, 2),
    ("conv3", 13, 192, 384, 3, 1, 1), ("conv4", 13, 384, 256, 3, 1, 1),
    ("conv5", 13, 256, 256, 3, 1, 1)]


def timed(*functions, rounds=5, each=3, burst=1, sync=lambda: None):
    """Median seconds of each function, in turns: one call to warm up, then `each` that count.

    The call that warms up matters: memory that another function left idle may have gone back to
    the system, and fetching it again can cost more than the call itself. On a GPU, which works
    through a queue, `burst` calls are timed together and `sync` waits for their end.
    """
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, own_times in zip(functions, times):
            function()
            for _ in range(each):
                sync()
                started = time.perf_counter()
                for _ in range(burst):
                    function()
                sync()
                own_times.append((time.perf_counter() - started) / burst)
    return [statistics.median(own_times) for own_times in times]


def synchronise():
    """Wait for the GPU, if that is what computes."""
    if kernels.memory() is not None:
        import cupy
        cupy.cuda.Device().synchronize()


def blas():
    """What NumPy's own OpenBLAS calls the kernels it chose for this processor."""
    folder = os.path.join(os.path.dirname(os.path.dirname(np.__file__)), "numpy.libs")
    for path in glob.glob(os.path.join(folder, "*openblas*")):
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_get_corename64_", "scipy_openblas_get_corename",
                     "openblas_get_corename64_", "openblas_get_corename"):
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype = ctypes.c_char_p
                return f"OpenBLAS {function().decode()}"
    return "a BLAS of unknown kernels"


def random_array(*shape):
    """Random float32 numbers on the device, the same for the same shape."""
    return kernels.to_device(np.random.default_rng(0).standard_normal(shape, np.float32))


def in_each_thread(work):
    """Median seconds of work() done by each of the threads at once."""
    everywhere = partial(kernels.threads.share, lambda _: work(), range(kernels.threads.count))
    (seconds,) = timed(everywhere)
    return seconds


def product_rate(rows=1536, depth=1536, columns=1536):
    """GFLOP/s of a plain matrix product, its rows shared among the threads."""
    count = kernels.threads.count
    a = random_array(max(1, rows // count), depth)
    b = random_array(depth, columns)
    return 2 * a.size * columns * count / in_each_thread(lambda: a @ b) / 1e9


def memory_rate():
    """GB/s that are read and written where each thread copies an array larger than any cache."""
    # ones: what was never written is one page of zeros, which stays in the cache
    arrays = [np.ones((2, 1 << 25), np.float32) for _ in range(kernels.threads.count)]
    items = range(len(arrays))

    def copy(mine):
        for item in mine:
            np.copyto(arrays[item][0], arrays[item][1])

    (seconds,) = timed(lambda: kernels.threads.share(copy, items))
    return sum(array.nbytes for array in arrays) / seconds / 1e9


class Part(NamedTuple):
    """A part of a training step: what it calls, and how much there is to compute or to move."""
    name: str
    call: Callable
    gflop: float = 0                    # of a plain product; 0: it is the bytes that bound it
    gigabytes: float = 0                # of arrays read or written, each once
    product: tuple = ()                 # rows, depth, columns of the plain product


def convolution_parts(name, layer, x, y):
    """Forward, input gradient and filter gradient of a convolution; the first one needs no dx."""
    k, _, c, f = layer.w.shape
    pixels = y.size // f
    depth = k * k * c
    gflop = 2 * pixels * depth * f / 1e9
    how = layer.stride, layer.pad
    parts = [Part(f"{name} y", partial(kernels.conv_forward, x, layer.w, layer.b, *how, True),
                  gflop, product=(pixels, depth, f))]
    if c > 3:
        call = partial(kernels.conv_backward_input, y, layer.w, x.shape, *how)
        parts.append(Part(f"{name} dx", call, gflop, product=(x.size // c, k * k * f, c)))
    call = partial(kernels.conv_backward_filter, x, y, layer.w.shape, *how)
    # each thread takes its share of the pixels, and multiplies depth × pixels × f
    count = kernels.threads.count
    parts.append(Part(f"{name} dw", call, gflop, product=(depth * count, pixels // count, f)))
    call = partial(kernels.relu_backward, y, y)
    parts.append(Part(f"{name} ReLU back", call, gigabytes=3 * y.nbytes / 1e9))
    return parts


def pooling_parts(name, layer, x):
    """Both directions of a max-pooling."""
    how = layer.kernel, layer.stride, layer.pad
    y, argmax = kernels.max_pool_forward(x, *how, layer.ceil)
    gigabytes = (x.nbytes + y.nbytes + argmax.nbytes) / 1e9
    forward = partial(kernels.max_pool_forward, x, *how, layer.ceil)
    backward = partial(kernels.max_pool_backward, y, argmax, x.shape, *how)
    return [Part(f"{name} y", forward, gigabytes=gigabytes),
            Part(f"{name} dx", backward, gigabytes=gigabytes)]


def step_parts(name, n, k):
    """The convolutions and poolings of a network, its photos and its update.

    Layers that are made of others, as inception modules, are left out, and said.
    """
    recipe = model.NETWORKS[name]
    net = recipe.build(k)
    photos = np.ones((n, recipe.size, recipe.size, 3), np.uint8)     # written, unlike zeros
    zeros = np.zeros(n, int)
    x = random_array(n, recipe.crop, recipe.crop, 3)
    prepare = partial(kernels.prepare, photos, zeros, zeros, zeros, recipe.crop)
    parts = [Part("photos", prepare, gigabytes=(photos.nbytes + x.nbytes) / 1e9)]
    for layer_name, layer in net.layers.items():
        y = layer.forward(x)
        if layer.layers:
            print(f"{layer_name} is left out: it is made of other layers")
        if isinstance(layer, model.Conv):
            parts += convolution_parts(layer_name, layer, x, y)
        if isinstance(layer, model.MaxPool):
            parts += pooling_parts(layer_name, layer, x)
        if isinstance(layer, model.Flatten):
            break
        x = y
    weights = [getattr(layer, attribute) for _, layer, attribute in net.parameters()]
    arrays = [(w, np.zeros_like(w), np.zeros_like(w)) for w in weights]

    def update():
        for w, v, dw in arrays:
            kernels.sgd(w, v, dw, 0.0, 0.9, 5e-4)

    # w and v are read and written, dw is read
    parts.append(Part("update", update, gigabytes=5 * sum(w.nbytes for w in weights) / 1e9))
    return parts


def layers(options):
    """Each convolution beside plain products, and what moves bytes beside the memory's rate."""
    kernels.use("cpu")
    limit = product_rate()
    bandwidth = memory_rate()
    print(f"{options.network}, batch {options.batch}, {kernels.threads.count} threads, {blas()}; a "
          f"product of 1,536³ reaches {limit:.0f} GFLOP/s, a copy {bandwidth:.0f} GB/s")
    parts = step_parts(options.network, options.batch, options.words)
    times = timed(*[part.call for part in parts], rounds=options.rounds)
    print(f"{'':18}{'ms':>8}{'GFLOP/s':>10}{'of 1,536³':>12}{'of its own product':>20}"
          f"{'GB/s':>8}{'of a copy':>11}")
    for part, seconds in zip(parts, times):
        line = f"{part.name:18}{seconds * 1e3:8.2f}"
        if part.gflop:
            rate = part.gflop / seconds
            own = product_rate(*part.product)
            line += f"{rate:10.0f}{rate / limit:12.0%}{rate / own:20.0%}"
        else:
            rate = part.gigabytes / seconds
            line += f"{'':42}{rate:8.1f}{rate / bandwidth:11.0%}"
        print(line, flush=True)


def our_step(name, n, k, sparse=False):
    """A function that makes one training step of ours; if sparse, on a batch's words alone."""
    recipe = model.NETWORKS[name]
    rng = np.random.default_rng(0)
    net = recipe.build(k, recipe.dropout)
    optimiser = model.SGD(net, 0.9, 5e-4)
    for v in optimiser.v.values():
        v.fill(0)                               # memory that was never written comes at a price
    photos = rng.integers(0, 256, (n, recipe.size, recipe.size, 3), np.uint8)
    x = kernels.prepare(photos, *data.centre(n, recipe.size - recipe.crop), recipe.crop)
    weights = np.full(n, 1 / n, np.float32)
    loss = model.Softmax()
    numbers = itertools.count(1)

    def step():
        targets = rng.integers(0, k, (n, 1)).astype(np.int32)
        classes = None
        if sparse:                              # other rows of the output layer in every step
            classes = np.unique(targets)
            targets = data.columns(targets, classes)
        context = model.Context(step=next(numbers), classes=classes)
        scores = net.forward_training(x, context)
        labels = data.Labels(targets, weights, classes=classes)
        _, gradients = model.training_losses(loss, scores, labels)
        net.backward(gradients)
        optimiser.step(1e-4)
    return step


def torch_joints(torch):
    """PyTorch modules for our Concat and Head; a Head's scores stay in `s`."""

    class Concat(torch.nn.Module):
        def __init__(self, branches):
            super().__init__()
            self.branches = torch.nn.ModuleList(
                torch_network(torch, branch.layers) for branch in branches)

        def forward(self, x):
            return torch.cat([branch(x) for branch in self.branches], 1)

    class Head(torch.nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.branch = torch_network(torch, layers)

        def forward(self, x):
            self.s = self.branch(x) if self.training else None
            return x
    return Concat, Head


def torch_network(torch, layers):
    """Our layers, by name, as PyTorch's, with our weights, to compare with."""
    modules = []
    channels = 3                                # of what a flat layer's features were
    for layer in layers.values():
        module = torch_layer(torch, layer, channels)
        if module is not None:
            modules.append(module)
        if isinstance(layer, (model.Conv, model.Linear)):
            channels = layer.shapes["b"][0]
            if layer.relu:
                modules.append(torch.nn.ReLU(True))
        if isinstance(layer, model.Concat):
            channels = sum(list(branch.layers.values())[-1].shapes["b"][0]
                           for branch in layer.branches)
    return torch.nn.Sequential(*modules)


def torch_layer(torch, layer, channels):
    """One layer without its ReLU, or None; `channels` are those of the image before it."""
    nn = torch.nn
    concat, head = torch_joints(torch)
    if isinstance(layer, model.Conv):
        size, _, c, f = layer.shapes["w"]
        module = nn.Conv2d(c, f, size, layer.stride, layer.pad)
        return with_weights(torch, module, layer.w.transpose(3, 2, 0, 1), layer.b)
    if isinstance(layer, model.Linear):         # ours come from NHWC, theirs from NCHW
        d, e = layer.shapes["w"]
        w = layer.w.reshape(-1, channels, e).swapaxes(0, 1).reshape(d, e)
        return with_weights(torch, nn.Linear(d, e), w.T, layer.b)
    if isinstance(layer, model.Output):
        k, e = layer.shapes["w"]
        return with_weights(torch, nn.Linear(e, k), layer.w, layer.b)
    if isinstance(layer, model.MaxPool):
        return nn.MaxPool2d(layer.kernel, layer.stride, layer.pad, ceil_mode=layer.ceil)
    if isinstance(layer, model.AvgPool):
        return nn.AvgPool2d(layer.kernel, layer.stride)
    if isinstance(layer, model.LRN):
        size, k, alpha, beta = layer.constants
        return nn.LocalResponseNorm(size, alpha * size, beta, k)
    if isinstance(layer, model.Concat):
        return concat(layer.branches)
    if isinstance(layer, model.Head):
        return head(layer.layers)
    if isinstance(layer, model.Flatten):
        return nn.Flatten()
    if isinstance(layer, model.Dropout) and layer.rate:
        return nn.Dropout(layer.rate)
    return None


def with_weights(torch, module, w, b):
    """The module, with these weights of NumPy."""
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.ascontiguousarray(w)))
        module.bias.copy_(torch.from_numpy(b))
    return module


def torch_step(torch, name, n, k, channels_last, device="cpu"):
    """The same step of the same network in PyTorch, eager."""
    recipe = model.NETWORKS[name]
    ours = recipe.build(k, recipe.dropout)
    for _, layer, attribute in ours.parameters():
        setattr(layer, attribute, kernels.to_host(getattr(layer, attribute)))
    net = torch_network(torch, ours.layers).to(device)
    x = torch.randn(n, 3, recipe.crop, recipe.crop, device=device)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(net.parameters(), 1e-4, 0.9, weight_decay=5e-4)
    targets = torch.randint(0, k, (n,), device=device)
    loss_of = torch.nn.CrossEntropyLoss()

    def step():
        optimiser.zero_grad()
        loss = loss_of(net(x), targets)
        for module in net:
            if hasattr(module, "s"):
                loss = loss + model.HEAD_WEIGHT * loss_of(module.s, targets)
        loss.backward()
        optimiser.step()
    return step


def step(options):
    """Whole training steps, forward, backward and update, in turns with PyTorch."""
    print(kernels.use(options.device))
    names = ["weak.py"]
    steps = [our_step(options.network, options.batch, options.words)]
    try:
        import torch
        torch.set_num_threads(kernels.threads.count)
        for last in (False, True):
            names.append(f"PyTorch {torch.__version__}, {'channels last' if last else 'NCHW'}")
            steps.append(torch_step(torch, options.network, options.batch, options.words, last))
    except ImportError:
        print("PyTorch is not installed: no comparison")
    times = timed(*steps, rounds=options.rounds)
    print(f"{options.network}, batch {options.batch}, K = {options.words}, "
          f"{kernels.threads.count} threads, {blas()}, median of {3 * options.rounds}")
    for name, seconds in zip(names, times):
        print(f"{name:34}{options.batch / seconds:8.1f} images/s")
    if len(times) > 1:
        print(f"ratio to PyTorch's better format: {min(times[1:]) / times[0]:.2f}")


def targets(options):
    """Whole steps on the words of a batch alone, K = 1,000 and K = 100,000 in turns."""
    kernels.use("auto")
    n = options.batch
    for name in ("small", "alexnet"):
        steps = [our_step(name, n, k, sparse=True) for k in (1000, 100_000)]
        few, many = timed(*steps, rounds=options.rounds, sync=synchronise)
        print(f"{name}, batch {n}, --targets batch: K = 1,000 {few * 1e3:.0f} ms, K = 100,000 "
              f"{many * 1e3:.0f} ms, ratio {many / few:.3f}", flush=True)


def bounds(options):
    """log Σ s over some classes C: the paper's bounds (eq. 3 and 4), and the corrected estimate.

    Scores of K words, drawn from a Gaussian of deviation 2; C uniform, 2,000 draws of each size.
    """
    k = options.words
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(k) * 2
    scores -= scores.min()                      # so that all s_k = exp(score) are at least 1
    s = np.exp(scores)
    whole = np.log(s.sum())
    print(f"K = {k:,}, log Σ s over all words {whole:.3f}")
    print(f"{'|C|':>8}{'eq. 4':>9}{'E log Σ_C s':>13}{'Jensen':>9}{'eq. 3':>9}{'corrected':>11}")
    for size in [2**i for i in range(7, 30) if 2**i < k] + [k]:
        sums = np.array([s[rng.choice(k, size, replace=False)].sum() for _ in range(2000)])
        scale = np.log(size / k)
        likely = (sums / size >= s.mean() * (1 - 1e-12)).mean()     # for C = all, but for rounding
        print(f"{size:8,}{likely * (whole + scale):9.3f}{np.log(sums).mean():13.3f}"
              f"{whole + scale:9.3f}{whole:9.3f}{(np.log(sums) - scale).mean():11.3f}", flush=True)


def ranks(options):
    """The allreduce of the gradients of each network, and its rate; under mpiexec."""
    joined = several.join()
    if joined.size == 1:
        raise RuntimeError("start it with mpiexec -n 2 or more")
    kernels.use("auto", number=joined.local_rank)
    for name, recipe in model.NETWORKS.items():
        net = recipe.build(1000)
        arrays = [getattr(layer, attribute) for _, layer, attribute in net.parameters()]

        def allreduce():
            for x in arrays:
                joined.begin_allreduce(x)
            joined.wait()

        (seconds,) = timed(allreduce, rounds=options.rounds, each=1, sync=synchronise)
        size = sum(x.nbytes for x in arrays)
        print(f"{name}: {size / 1e6:.0f} MB over {joined.size} ranks in {seconds * 1e3:.0f} ms, "
              f"{size / seconds / 1e9:.2f} GB/s", flush=True)


class Case(NamedTuple):
    """A call of a CUDA kernel, and what to compare it with."""
    name: str
    unit: str                           # TFLOP/s or GB/s
    work: float                         # operations or bytes
    ours: Callable
    rival: Callable | None = None       # of torch: PyTorch's call
    naive: Callable | None = None       # the same by naive.cu


def gpu_cases(n):
    """A Case for each CUDA kernel."""
    yield from convolution_cases(n)
    yield from pooling_cases(n)
    yield from pointwise_cases(n)


def convolution_cases(n):
    """The convolutions of AlexNet."""
    for name, size, c, f, k, stride, pad in ALEXNET:
        x = random_array(n, size, size, c)
        w = random_array(k, k, c, f)
        b = random_array(f)
        y = kernels.conv_forward(x, w, b, stride, pad)
        work = 2 * y.size * k * k * c
        rival = partial(torch_convolution, n, size, c, f, k, stride, pad)
        yield Case(name + " forward", "TFLOP/s", work,
                   partial(kernels.conv_forward, x, w, b, stride, pad, True),
                   partial(rival, "forward"), partial(launches.naive_forward, x, w, b, stride, pad))
        if name != "conv1":                     # whose x is the photo
            backward = y, w, x.shape, stride, pad
            yield Case(name + " dx", "TFLOP/s", work,
                       partial(kernels.conv_backward_input, *backward),
                       partial(rival, "dx"), partial(launches.naive_backward_input, *backward))
        backward = x, y, w.shape, stride, pad
        yield Case(name + " dw, db", "TFLOP/s", work,
                   partial(kernels.conv_backward_filter, *backward),
                   partial(rival, "dw"), partial(launches.naive_backward_filter, *backward))


def pooling_cases(n):
    """The pooling of AlexNet."""
    for name, size, c in (("pool1", 55, 64), ("pool2", 27, 192), ("pool5", 13, 256)):
        x = random_array(n, size, size, c)
        y, argmax = kernels.max_pool_forward(x, 3, 2)
        bytes_each = 4 * x.size + 5 * y.size
        rival = partial(torch_pool, n, size, c)
        yield Case(name + " forward", "GB/s", bytes_each,
                   partial(kernels.max_pool_forward, x, 3, 2), partial(rival, False))
        yield Case(name + " dx", "GB/s", bytes_each,
                   partial(kernels.max_pool_backward, y, argmax, x.shape, 3, 2),
                   partial(rival, True))


def pointwise_cases(n):
    """What is bound by memory."""
    x = random_array(n, 56, 56, 64)
    yield Case("LRN forward", "GB/s", 8 * x.size, partial(kernels.lrn_forward, x))
    yield Case("LRN dx", "GB/s", 12 * x.size, partial(kernels.lrn_backward, x, x))
    yield Case("ReLU dx", "GB/s", 12 * x.size, partial(kernels.relu_backward, x, x))
    e = random_array(n, 4096)
    yield Case("dropout", "GB/s", 8 * e.size, partial(kernels.dropout, e, 0.5, 0, 1, 2))
    s = random_array(n, 100_000)
    targets = np.zeros((n, 1), np.int32)
    weights = np.full((n, 1), 1 / n, np.float32)
    yield Case("loss, K = 100,000", "GB/s", 12 * s.size,
               partial(kernels.softmax_loss, s, targets, weights))
    w, v, dw = (random_array(9216, 4096) for _ in range(3))
    yield Case("update of fc6", "GB/s", 20 * w.size,
               partial(kernels.sgd, w, v, dw, 0.1, 0.9, 5e-4))
    photos = np.random.default_rng(0).integers(0, 256, (n, 256, 256, 3), np.uint8)
    yield Case("photos, copied and prepared", "GB/s", photos.size + 12 * n * 224 * 224,
               partial(kernels.prepare, photos, *data.centre(n, 32), 224))


def torch_convolution(n, size, c, f, k, stride, pad, direction, torch):
    """PyTorch's call for one direction of a convolution, channels last."""
    last = torch.channels_last
    x = torch.randn(n, c, size, size, device="cuda").to(memory_format=last)
    w = torch.randn(f, c, k, k, device="cuda").to(memory_format=last)
    b = torch.randn(f, device="cuda")
    forward = partial(torch.nn.functional.conv2d, x, w, b, stride, pad)
    if direction == "forward":
        return lambda: torch.relu_(forward())
    wanted = [direction == "dx", direction == "dw", direction == "dw"]
    return partial(torch.ops.aten.convolution_backward, torch.randn_like(forward()), x, w, [f],
                   [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1, wanted)


def torch_pool(n, size, c, backward, torch):
    """PyTorch's call for one direction of a 3×3 maximum with stride 2, channels last."""
    x = torch.randn(n, c, size, size, device="cuda").to(memory_format=torch.channels_last)
    y, where = torch.nn.functional.max_pool2d(x, 3, 2, return_indices=True)
    if not backward:
        return partial(torch.nn.functional.max_pool2d, x, 3, 2)
    return partial(torch.ops.aten.max_pool2d_with_indices_backward, y, x, [3, 3], [2, 2], [0, 0],
                   [1, 1], False, where)


def installed_torch():
    """PyTorch, or None, which is said."""
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: no comparison")
        return None
    torch.backends.cudnn.benchmark = True
    return torch


def gpu(options):
    """Each CUDA kernel and whole steps in each precision, in turns with PyTorch if installed."""
    kernels.use("gpu")
    torch = installed_torch()
    measure = partial(timed, rounds=options.rounds, sync=synchronise)
    for precision in kernels.PRECISIONS:
        try:
            line = kernels.use("gpu", precision)
        except RuntimeError as error:           # no tensor cores for that
            print(f"\n{error}")
            continue
        print(f"\n{line}, batch {options.batch}, {time.strftime('%d %B %Y')}")
        if torch:
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        measure_kernels(options.batch, measure, torch)
        measure_steps(options.batch, options.words, measure, torch)


def gpu_limits(measure):
    """What a plain product and a plain copy reach, by unit.

    Of random numbers, since a GPU draws less power, and runs faster, on ones.
    """
    a = random_array(8192, 8192)
    (seconds,) = measure(lambda: kernels.matmul(a, a), burst=5)
    product = 2 * 8192**3 / seconds / 1e12
    whole = random_array(16384, 16384)
    (seconds,) = measure(lambda: whole.copy(), burst=10)
    copy = 2 * whole.nbytes / seconds / 1e9
    print(f"limits: {product:.0f} TFLOP/s, a product of 8192×8192 by cuBLAS; {copy:,.0f} GB/s, a "
          "copy of 1 GB")
    return {"TFLOP/s": product, "GB/s": copy}


def measure_kernels(n, measure, torch):
    """A line for each kernel; the last two columns are times as fast as another."""
    limits = gpu_limits(measure)
    print(f"{'':30}{'ms':>9}{'rate':>18}{'of limit':>10}{'PyTorch':>10}{'naive.cu':>10}")
    for case in gpu_cases(n):
        rival = case.rival(torch=torch) if torch and case.rival else None
        calls = [call for call in (case.ours, rival, case.naive) if call]
        times = dict(zip(calls, measure(*calls, burst=3)))
        seconds = times[case.ours]
        rate = case.work / seconds / (1e12 if case.unit == "TFLOP/s" else 1e9)
        line = (f"{case.name:30}{seconds * 1e3:9.3f}{rate:10.1f} {case.unit:7}"
                f"{rate / limits[case.unit]:10.0%}")
        for other in (rival, case.naive):
            line += f"{times[other] / seconds:10.2f}" if other else " " * 10
        print(line.rstrip(), flush=True)


def measure_steps(n, k, measure, torch):
    """A line for a whole step of each large network."""
    for name in ("alexnet", "googlenet"):
        steps = [our_step(name, n, k)]
        if torch:
            steps.append(torch_step(torch, name, n, k, True, "cuda"))
        ours, *others = measure(*steps, burst=5)
        line = f"{name} step: {n / ours:,.0f} images/s"
        for seconds in others:
            line += (f", PyTorch {torch.__version__} {n / seconds:,.0f}, ratio "
                     f"{seconds / ours:.2f}")
        print(line, flush=True)


def variants(tf32):
    """(file, defines) of every kernel variant that is launched on a GPU with TF32, or without."""
    for file in ("lrn.cu", "loss.cu", "naive.cu", "pointwise.cu", "prepare.cu", "random.cu",
                 "sgd.cu"):
        yield file, ()
    for vec in (4, 1):
        yield "pool.cu", (("VEC", vec),)
    for precision in kernels.PRECISIONS if tf32 else ("fp32",):
        for filter_gradient, vec, bn in itertools.product(
                (False, True), (4, 1), launches.COLUMNS[precision]):
            for dilate in (1,) if filter_gradient else (1, 2):
                yield "conv.cu", launches.conv_defines(
                    bn, launches.STAGES, vec, filter_gradient, launches.INNER[precision], dilate)


def compile_for(architecture, file, defines):
    """Compile a variant as CuPy would, for "90" say, without a GPU; (cubin, the compiler's notes).

    RuntimeError with the compiler's message where that fails.
    """
    from cupy.cuda import nvrtc
    program = nvrtc.createProgram(launches.source(file), file, (), ())
    try:
        nvrtc.compileProgram(program, (
            *launches.options(defines), f"-arch=sm_{architecture}", "-ftz=true",
            "--device-as-default-execution-space", "--ptxas-options=-v"))
        # CuPy takes the last byte for the end of a string
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError:
        raise RuntimeError(f"{file} {defines} for sm_{architecture}: "
                           f"{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


def disassembler():
    """The path of nvdisasm: $NVDISASM, on PATH, or in the wheel of `triton`; None if not found."""
    path = os.environ.get("NVDISASM") or shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if path is None and triton:
        path = os.path.join(triton.submodule_search_locations[0], "backends/nvidia/bin/nvdisasm")
    return path if path and os.path.exists(path) else None


def disassemble(cubin):
    """The lines of a compiled kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([disassembler(), "-c", file.name], capture_output=True, text=True)
    return done.stdout.splitlines()


def instructions_per_mma(cubin):
    """Instructions in the loop around the tensor cores' products, for each product; or None.

    The loop is the shortest that holds them all, from a label to the branch back to it. What the
    compiler did not unroll within it counts once.
    """
    if not disassembler():
        return None
    lines = disassemble(cubin)
    labels = {line.strip(): at for at, line in enumerate(lines) if line.startswith(".L_")}
    most = 0                                    # products in a loop
    length = 0                                  # instructions of the shortest such loop
    for at, line in enumerate(lines):
        branch = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        if not branch or labels[branch[1] + ":"] >= at:
            continue
        loop = [line for line in lines[labels[branch[1] + ":"]:at + 1] if re.match(r"\s+/\*", line)]
        products = sum("HMMA" in line for line in loop)
        if products > most or products == most and len(loop) < length:
            most = products
            length = len(loop)
    return length / most if most else None


def resources(options):
    """Registers, bytes spilled and instructions a mma of each kernel variant; needs no GPU.

    NVRTC's ptxas reports the first two; the last is counted where a disassembler is found.
    """
    print(f"{'sm_' + options.architecture:62}{'registers':>10}{'spilled':>9}{'a mma':>7}")
    for file, defines in variants(int(options.architecture) >= 80):
        cubin, notes = compile_for(options.architecture, file, defines)
        label = " ".join(f"{name}={value}" for name, value in defines)
        each = instructions_per_mma(cubin) if file == "conv.cu" else None
        for kernel, note in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers)",
                                       notes, re.DOTALL):
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", note)))
            count = re.search(r"Used (\d+) registers", note)[1]
            line = f"{kernel + ' ' + label:62}{count:>10}{spilled:>9}"
            print(line + (f"{each:7.1f}" if each else ""), flush=True)


class Photos:
    """The same decoding and transformations as a PyTorch data set; without torch at the top."""

    def __init__(self, paths, recipe):
        self.paths = paths
        self.recipe = recipe

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from PIL import Image
        image = Image.open(self.paths[i])
        image.draft("RGB", (self.recipe.size, self.recipe.size))
        image = image.convert("RGB").resize((self.recipe.size,) * 2, Image.Resampling.BILINEAR)
        middle = (self.recipe.size - self.recipe.crop) // 2
        x = np.asarray(image)[middle:middle + self.recipe.crop, middle:middle + self.recipe.crop]
        x = x.astype(np.float32)
        return (x - x.mean()) / max(x.std(), 1)


def read_all(names, options, recipe, step):
    """What weak.py does with photos: decode, copy and prepare them in batches, and then a step."""
    n = options.batch
    plans = (data.FixedOrder(list(range(i, min(i + n, len(names)))))
             for i in range(0, len(names), n))
    with data.Loader(options.images, names.__getitem__, len(names), recipe.size,
                     options.workers) as loader:
        for _, photos, pixels, _ in loader.batches(plans):
            crops = data.centre(len(photos), recipe.size - recipe.crop)
            kernels.prepare(pixels, *crops, recipe.crop)
            step()


def torch_reader(torch, names, options, recipe, step):
    """A function that does the same with PyTorch's DataLoader."""
    from torch.utils.data import DataLoader
    torch.set_num_threads(kernels.threads.count)
    paths = [os.path.join(options.images, name) for name in names]

    def read():
        for _ in DataLoader(Photos(paths, recipe), batch_size=options.batch,
                            num_workers=options.workers):
            step()
    return read


def loader(options):
    """Photos/s from files to normalised batches, nothing cached, in turns with PyTorch's loader."""
    recipe = model.NETWORKS[options.network]
    names = sorted(os.listdir(options.images))[:options.photos]
    step = lambda: None
    if options.beside:
        step = our_step(options.beside, options.batch, options.words)
    readers = {"weak.py": partial(read_all, names, options, recipe, step)}
    try:
        import torch
        readers[f"PyTorch {torch.__version__} DataLoader"] = torch_reader(
            torch, names, options, recipe, step)
    except ImportError:
        print("PyTorch is not installed: no comparison")
    if options.beside:
        def train_alone():
            for _ in range(0, len(names), options.batch):
                step()
        readers[f"training {options.beside} alone"] = train_alone
    times = timed(*readers.values(), rounds=options.rounds, each=1)
    print(f"{len(names):,} photos for {options.network}, {options.workers} workers, starting them "
          f"included, median of {options.rounds}")
    for label, seconds in zip(readers, times):
        print(f"{label:34}{len(names) / seconds:8.0f} photos/s")
    if options.beside:
        *beside, alone = times
        extra = [f"{(seconds - alone) / len(names) * 1e6:.0f}" for seconds in beside]
        print("beside training a photo takes more than alone, microseconds:", ", ".join(extra))


def write_yfcc(path, count, columns=25, vocabulary=200_000, pack=open):
    """`count` lines in the format of the YFCC100M table, words of several languages by Zipf's law.

    One line in 125 is a video, as in the real one; columns: 23, or 25 with line number and hash.
    """
    rng = np.random.default_rng(0)
    ends = np.cumsum(1 / np.arange(1, vocabulary + 1))
    url, part = "http://www.flickr.com/photos/39019111@N00", 50_000
    stems = ["word"] * 6 + [quote_plus(stem) for stem in ("été", "straße", "собака", "犬")]
    with pack(path, "wt") as file:
        for start in range(0, count, part):
            size = min(part, count - start)
            ranks = np.searchsorted(ends, rng.random((size, 10)) * ends[-1]).tolist()
            drawn = [[f"{stems[row[0] % 10]}{rank:x}" for rank in row] for row in ranks]
            for i, w in enumerate(drawn, start):
                photo = 6_000_000_000 + i
                head = f"{i}\t{photo}\t{photo:032x}" if columns == 25 else str(photo)
                file.write(
                    f"{head}\t39019111@N00\tnick\t2012-02-16 09:56:37.0\t1331840483\tCanon\t"
                    f"{'+'.join(w[:3])}\tA+%3Ci%3E{'+'.join(w[3:7])}%3C%2Fi%3E%0AThe+end.\t"
                    f"{','.join(w[7:])}\t\t-81.8\t24.5\t12\t{url}/{photo}/\thttp://farm8.static"
                    f"flickr.com/7205/{photo}_df7747990d.jpg\tAttribution License\thttp://creative"
                    f"commons.org/licenses/by/2.0/\t7205\t8\tdf7747990d\t692d7e0a7f\tjpg\t"
                    f"{int(i % 125 == 60)}\n")


class Memory(threading.Thread):
    """The most anonymous memory of this process while it runs, in MB: no page cache."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most = 0
        self.over = False

    def run(self):
        while not self.over:
            with open("/proc/self/status") as file:
                kb = next(line for line in file if line.startswith("RssAnon")).split()[1]
            self.most = max(self.most, int(kb) / 1024)
            time.sleep(0.02)


def index(options):
    """Lines/s of the index in one process, and its memory: each size in a process of its own."""
    if options.captions:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            index_of(options.captions, options.bz2, folder)
        return
    print(f"{'lines':>12}{'photos':>12}{'MB':>9}{'seconds':>9}{'lines/s':>14}{'memory MB':>11}"
          f"{'index MB':>10}{'batch ms':>11}", flush=True)
    for count in (10**4, 10**5, 10**6, 10**7):
        subprocess.run([sys.executable, __file__, "index", "--captions", str(count),
                        *["--bz2"] * options.bz2,
                        *(["--scratch", options.scratch] if options.scratch else [])], check=True)


def index_of(count, bz2_packed, folder):
    """Generate so many captions in a folder, and print what their index takes."""
    path = os.path.join(folder, "captions" + ".bz2" * bz2_packed)
    write_yfcc(path, count, pack=bz2.open if bz2_packed else open)
    memory = Memory()
    memory.start()
    started = time.perf_counter()
    built = data.build_index(data.Source(path), os.path.join(folder, "index"),
                             data.Text(100_000, 500))
    seconds = time.perf_counter() - started
    memory.over = True
    size = sum(os.path.getsize(os.path.join(built.folder, name))
               for name in os.listdir(built.folder))
    started = time.perf_counter()
    for number in range(50):
        data.BatchSampler(built, 0, 128).batch(number)
    draw = (time.perf_counter() - started) / 50
    print(f"{count:>12,}{len(built):>12,}{os.path.getsize(path) / 1e6:9.0f}{seconds:9.1f}"
          f"{count / seconds:14,.0f}{memory.most:11.0f}{size / 1e6:10.1f}{draw * 1000:11.2f}",
          flush=True)


COMMANDS = {"layers": layers, "step": step, "targets": targets, "bounds": bounds, "ranks": ranks,
            "loader": loader, "index": index, "gpu": gpu, "resources": resources}


def main():
    top = Parser(description=__doc__.splitlines()[0])
    top.add_argument("what", choices=tuple(COMMANDS), help="what to measure")
    top.add_argument("--network", choices=tuple(model.NETWORKS), default="alexnet", help="of steps")
    top.add_argument("--device", choices=("cpu", "reference"), default="cpu", help="of `step`")
    top.add_argument("--batch", type=int, help="images a step; if not given 32, on a GPU 128")
    top.add_argument("--words", type=int, help="K; if not given 1000, for bounds 100000")
    top.add_argument("--rounds", type=int, default=5, help="turns of each")
    top.add_argument("--images", default=".", help="photos for the loader")
    top.add_argument("--beside", choices=model.NETWORKS, help="… while that network trains")
    top.add_argument("--photos", type=int, default=1000, help="how many of them")
    top.add_argument("--workers", type=int, default=2,
                     help="our threads, and PyTorch's processes, that decode")
    top.add_argument("--captions", type=int, help="one size only for the index")
    top.add_argument("--bz2", action="store_true", help="captions packed by bzip2")
    top.add_argument("--architecture", default="90", help="of resources, e.g. 75, 80, 90, 120")
    top.add_argument("--scratch", help="folder for generated captions")
    options = top.parse_args()
    if options.batch is None:
        options.batch = 128 if options.what == "gpu" else 32
    if options.words is None:
        options.words = 100_000 if options.what == "bounds" else 1000
    try:
        COMMANDS[options.what](options)
    except ImportError as error:
        raise RuntimeError(f"{options.what}: {error}") from None


if __name__ == "__main__":
    run_command(main)
