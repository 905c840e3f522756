"""How fast the kernels, whole steps, the loader and the captions index are, against their limits.

    python kernels/bench.py layers          each convolution: GFLOP/s, share of a plain product's
    python kernels/bench.py step            whole training steps against PyTorch, where installed
    python kernels/bench.py loader --images DIR          photos/s against PyTorch's DataLoader
    python kernels/bench.py targets         steps with K = 1,000 and 100,000, of a batch's words
    python kernels/bench.py bounds          the loss over some words against that over all
    python kernels/bench.py ranks           the allreduce of gradients, under mpiexec
    python kernels/bench.py index           captions/s and memory for 10^4 to 10^7 lines of YFCC
    python kernels/bench.py gpu             each CUDA kernel and whole steps, in each precision
    python kernels/bench.py resources       registers, spills, instructions a mma; needs no GPU

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
        for function, mine in zip(functions, times):
            function()
            for _ in range(each):
                sync()
                started = time.perf_counter()
                for _ in range(burst):
                    function()
                sync()
                mine.append((time.perf_counter() - started) / burst)
    return [statistics.median(mine) for mine in times]


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


def layers(options):
    """Each convolution of AlexNet in three directions, beside a plain matrix product."""
    kernels.use("cpu")
    rng = np.random.default_rng(0)
    n = options.batch
    a, b = (rng.standard_normal((1536, 1536)).astype(np.float32) for _ in range(2))
    (seconds,) = timed(lambda: kernels.threads.share(lambda _: a @ b, range(kernels.threads.count)))
    limit = 2 * 1536 ** 3 * kernels.threads.count / seconds / 1e9
    print(f"the limit: {limit:.0f} GFLOP/s, a matrix product in each of "
          f"{kernels.threads.count} threads, {blas()}")
    print(f"{'':8}{'forward':>10}{'dx':>10}{'dw':>10}   GFLOP/s and share of the limit, batch {n}")
    for name, size, c, f, k, stride, pad in ALEXNET:
        x = rng.standard_normal((n, size, size, c)).astype(np.float32)
        w = rng.standard_normal((k, k, c, f)).astype(np.float32)
        y = kernels.conv_forward(x, w, np.zeros(f, np.float32), stride, pad)
        times = timed(lambda: kernels.conv_forward(x, w, w[0, 0, 0], stride, pad, relu=True),
                      lambda: stride > 1 or kernels.conv_backward_input(y, w, x.shape, 1, pad),
                      lambda: kernels.conv_backward_filter(x, y, w.shape, stride, pad))
        rates = [2 * y.size * k * k * c / seconds / 1e9 for seconds in times]
        print(f"{name:8}" + "".join("         -" if direction == 1 and stride > 1 else
                                    f"{rate:5.0f}{rate / limit:5.0%}"
                                    for direction, rate in enumerate(rates)))


def our_step(name, n, k, some=False):
    """A function that makes one training step of ours, with `some` on a batch's words alone."""
    recipe, rng = model.NETWORKS[name], np.random.default_rng(0)
    net = recipe.build(k, recipe.dropout).init(0)
    optimiser = model.SGD(net, 0.9, 5e-4, sparse=some)
    for v in optimiser.v.values():
        v.fill(0)                               # memory that was never written comes at a price
    photos = rng.integers(0, 256, (n, recipe.size, recipe.size, 3), np.uint8)
    x = kernels.prepare(photos, *data.centre(n, recipe.size - recipe.crop), recipe.crop)
    weights, numbers = np.full(n, 1 / n, np.float32), itertools.count(1)

    def step():
        targets, classes = rng.integers(0, k, (n, 1)).astype(np.int32), None
        if some:                                # other rows of the output layer in every step
            classes = np.unique(targets)
            targets = data.columns(targets, classes)
        s = net.forward(x, model.Pass(step=next(numbers), classes=classes))
        labels = data.Labels(targets, weights, None, classes)
        net.backward(model.training_loss(net, s, labels, model.softmax)[1])
        optimiser.step(1e-4)
    return step


def torch_joints(torch):
    """PyTorch modules for our Concat and Head; a Head's scores stay in `s`."""

    class Concat(torch.nn.Module):
        def __init__(self, branches):
            super().__init__()
            self.branches = torch.nn.ModuleList(
                torch_network(torch, one.layers) for one in branches)

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
    nn, parts, channels = torch.nn, [], 3
    concat, head = torch_joints(torch)

    def add(module, w, b):
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(np.ascontiguousarray(w)))
            module.bias.copy_(torch.from_numpy(b))
        parts.append(module)

    for layer in layers.values():
        if isinstance(layer, model.Conv):
            size, _, c, channels = layer.shapes["w"]
            add(nn.Conv2d(c, channels, size, layer.stride, layer.pad),
                layer.w.transpose(3, 2, 0, 1), layer.b)
        elif isinstance(layer, model.MaxPool):
            parts.append(nn.MaxPool2d(layer.kernel, layer.stride, layer.pad, ceil_mode=layer.ceil))
        elif isinstance(layer, model.AvgPool):
            parts.append(nn.AvgPool2d(layer.kernel, layer.stride))
        elif isinstance(layer, model.LRN):
            size, k, alpha, beta = layer.constants
            parts.append(nn.LocalResponseNorm(size, alpha * size, beta, k))
        elif isinstance(layer, model.Concat):
            parts.append(concat(layer.branches))
            channels = layer.slices[-1].stop
        elif isinstance(layer, model.Head):
            parts.append(head(layer.layers))
        elif isinstance(layer, model.Flatten):
            parts.append(nn.Flatten())
        elif isinstance(layer, model.Dropout) and layer.rate:
            parts.append(nn.Dropout(layer.rate))
        elif isinstance(layer, model.Linear):   # ours come from NHWC, theirs from NCHW
            d, e = layer.shapes["w"]
            w = layer.w.reshape(-1, channels, e).swapaxes(0, 1).reshape(d, e)
            channels = e
            add(nn.Linear(d, e), w.T, layer.b)
        elif isinstance(layer, model.Output):
            add(nn.Linear(*layer.w.shape[::-1]), layer.w, layer.b)
        if isinstance(layer, (model.Conv, model.Linear)) and layer.relu:
            parts.append(nn.ReLU(True))
    return nn.Sequential(*parts)


def torch_step(torch, name, n, k, channels_last, device="cpu"):
    """The same step of the same network in PyTorch, eager."""
    recipe = model.NETWORKS[name]
    ours = recipe.build(k, recipe.dropout).init(0)
    for _, layer, attribute in ours.parameters():
        setattr(layer, attribute, kernels.to_host(getattr(layer, attribute)))
    net = torch_network(torch, ours.layers).to(device)
    x = torch.randn(n, 3, recipe.crop, recipe.crop, device=device)
    if channels_last:
        net, x = (thing.to(memory_format=torch.channels_last) for thing in (net, x))
    optimiser = torch.optim.SGD(net.parameters(), 1e-4, 0.9, weight_decay=5e-4)
    targets, loss_of = torch.randint(0, k, (n,), device=device), torch.nn.CrossEntropyLoss()

    def step():
        optimiser.zero_grad()
        loss = loss_of(net(x), targets)
        for part in net:
            if hasattr(part, "s"):
                loss = loss + model.HEAD_WEIGHT * loss_of(part.s, targets)
        loss.backward()
        optimiser.step()
    return step


def step(options):
    """Whole training steps, forward, backward and update, in turns with PyTorch."""
    names, steps = ["weak.py"], [our_step(options.network, options.batch, options.words)]
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
    sizes, n = (1000, 100_000), options.batch
    for name in ("small", "alexnet"):
        times = timed(*(our_step(name, n, k, some=True) for k in sizes), rounds=options.rounds,
                      sync=synchronise)
        print(f"{name}, batch {n}, --targets batch: " + ", ".join(
            f"K = {k:,} {seconds * 1e3:.0f} ms" for k, seconds in zip(sizes, times))
            + f", ratio {times[1] / times[0]:.3f}", flush=True)


def bounds(options):
    """log Σ s over some classes C: the paper's bounds (eq. 3 and 4), and the corrected estimate.

    Scores of K words, drawn from a Gaussian of deviation 2; C uniform, 2,000 draws of each size.
    """
    k, rng = options.words, np.random.default_rng(0)
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
        net = recipe.build(1000, 0).init(0)
        arrays = [getattr(layer, attribute) for _, layer, attribute in net.parameters()]

        def allreduce():
            for x in arrays:
                joined.begin_allreduce(x)
            joined.wait()

        (seconds,) = timed(allreduce, rounds=options.rounds, each=1, sync=synchronise)
        size = sum(x.nbytes for x in arrays)
        print(f"{name}: {size / 1e6:.0f} MB over {joined.size} ranks in {seconds * 1e3:.0f} ms, "
              f"{size / seconds / 1e9:.2f} GB/s", flush=True)


def some(*shape):
    """A random array on the device."""
    return kernels.to_device(np.random.default_rng(0).standard_normal(shape, np.float32))


def gpu_cases(n):
    """(name, what counts, operations or bytes, our call, PyTorch's call) of each CUDA kernel.

    PyTorch's call is made by a function of torch.
    """
    yield from convolution_cases(n)
    yield from pooling_cases(n)
    yield from pointwise_cases(n)


def convolution_cases(n):
    """The convolutions of AlexNet."""
    for name, size, c, f, k, stride, pad in ALEXNET:
        x, w, b = some(n, size, size, c + c % 2), some(k, k, c, f), some(f)
        y = kernels.conv_forward(x, w, b, stride, pad)
        work = 2 * y.size * k * k * c
        rival = partial(torch_convolution, n, size, c, f, k, stride, pad)
        yield (name + " forward", "TFLOP/s", work,
               partial(kernels.conv_forward, x, w, b, stride, pad, True), partial(rival, "forward"))
        if stride == 1:
            yield (name + " dx", "TFLOP/s", work,
                   partial(kernels.conv_backward_input, y, w, x.shape, stride, pad),
                   partial(rival, "dx"))
        yield (name + " dw, db", "TFLOP/s", work,
               partial(kernels.conv_backward_filter, x, y, w.shape, stride, pad),
               partial(rival, "dw"))


def pooling_cases(n):
    """The pooling of AlexNet."""
    for name, size, c in (("pool1", 55, 64), ("pool2", 27, 192), ("pool5", 13, 256)):
        x = some(n, size, size, c)
        y, place = kernels.max_pool_forward(x, 3, 2)
        bytes_each = 4 * x.size + 5 * y.size
        rival = partial(torch_pool, n, size, c)
        yield (name + " forward", "GB/s", bytes_each, partial(kernels.max_pool_forward, x, 3, 2),
               partial(rival, False))
        yield (name + " dx", "GB/s", bytes_each,
               partial(kernels.max_pool_backward, y, place, x.shape, 3, 2), partial(rival, True))


def pointwise_cases(n):
    """What is bound by memory."""
    x, e, s = some(n, 56, 56, 64), some(n, 4096), some(n, 100_000)
    yield "LRN forward", "GB/s", 8 * x.size, partial(kernels.lrn_forward, x), None
    yield "LRN dx", "GB/s", 12 * x.size, partial(kernels.lrn_backward, x, x), None
    yield "ReLU dx", "GB/s", 12 * x.size, partial(kernels.sum_gradients, [x], 1 * x), None
    yield "dropout", "GB/s", 8 * e.size, partial(kernels.dropout, e, 0.5, 0, 1, 2), None
    targets, weights = np.zeros((n, 1), np.int32), np.full((n, 1), 1 / n, np.float32)
    yield ("loss, K = 100,000", "GB/s", 12 * s.size,
           partial(kernels.softmax_loss, s, targets, weights), None)
    w, v, dw = (some(9216, 4096) for _ in range(3))
    yield "update of fc6", "GB/s", 20 * w.size, partial(kernels.sgd, w, v, dw, .1, .9, 5e-4), None
    photos = np.random.default_rng(0).integers(0, 256, (n, 256, 256, 3), np.uint8)
    yield ("photos, copied and prepared", "GB/s", photos.size + 16 * n * 224 * 224,
           partial(kernels.prepare, photos, *data.centre(n, 32), 224), None)


def torch_convolution(n, size, c, f, k, stride, pad, direction, torch):
    """PyTorch's call for one direction of a convolution, channels last."""
    last = torch.channels_last
    x = torch.randn(n, c, size, size, device="cuda").to(memory_format=last)
    w = torch.randn(f, c, k, k, device="cuda").to(memory_format=last)
    b = torch.randn(f, device="cuda")
    forward = partial(torch.nn.functional.conv2d, x, w, b, stride, pad)
    if direction == "forward":
        return lambda: torch.relu_(forward())
    return partial(torch.ops.aten.convolution_backward, torch.randn_like(forward()), x, w, [f],
                   [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1,
                   [direction == "dx", direction == "dw", direction == "dw"])


def torch_pool(n, size, c, backward, torch):
    """PyTorch's call for one direction of a 3×3 maximum with stride 2, channels last."""
    x = torch.randn(n, c, size, size, device="cuda").to(memory_format=torch.channels_last)
    y, where = torch.nn.functional.max_pool2d(x, 3, 2, return_indices=True)
    if not backward:
        return partial(torch.nn.functional.max_pool2d, x, 3, 2)
    return partial(torch.ops.aten.max_pool2d_with_indices_backward, y, x, [3, 3], [2, 2], [0, 0],
                   [1, 1], False, where)


def gpu(options):
    """Each CUDA kernel and whole steps in each precision, in turns with PyTorch if installed."""
    kernels.use("gpu")
    import cupy
    try:
        import torch
        torch.backends.cudnn.benchmark = True
    except ImportError:
        torch = None
        print("PyTorch is not installed: no comparison")
    run = partial(timed, rounds=options.rounds, sync=cupy.cuda.Device().synchronize)
    # random numbers, since a GPU draws less power, and runs faster, on ones
    big, half = some(8192, 8192), some(16384, 16384)
    other = cupy.empty_like(half)
    (seconds,) = run(lambda: cupy.copyto(other, half), burst=10)
    bandwidth = 2 * half.nbytes / seconds / 1e9
    n = options.batch
    for precision in kernels.PRECISIONS:
        print(f"\n{kernels.use('gpu', precision)}, batch {n}, {time.strftime('%d %B %Y')}")
        if torch:
            tf32 = precision == "tf32"
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        (seconds,) = run(lambda: kernels.matmul(big, big), burst=5)
        limits = {"TFLOP/s": 2 * 8192**3 / seconds / 1e12, "GB/s": bandwidth}
        print(f"limits: {limits['TFLOP/s']:.0f} TFLOP/s, a product of 8192×8192 by cuBLAS; "
              f"{bandwidth:,.0f} GB/s, a copy of 1 GB")
        print(f"{'':30}{'ms':>9}{'rate':>18}{'of limit':>10}{'of PyTorch':>12}")
        for name, unit, work, ours, rival in gpu_cases(n):
            rivals = [rival(torch=torch)] if torch and rival else []
            times = run(ours, *rivals, burst=10)
            rate = work / times[0] / (1e12 if unit == "TFLOP/s" else 1e9)
            print(f"{name:30}{times[0] * 1e3:9.3f}{rate:10.1f} {unit:7}{rate / limits[unit]:10.0%}"
                  + "".join(f"{seconds / times[0]:12.2f}" for seconds in times[1:]), flush=True)
        for name in "alexnet", "googlenet":
            steps = [our_step(name, n, options.words)]
            if torch:
                steps.append(torch_step(torch, name, n, options.words, True, "cuda"))
            times = run(*steps, burst=5)
            print(f"{name} step: {n / times[0]:,.0f} images/s" + "".join(
                f", PyTorch {torch.__version__} {n / seconds:,.0f}, ratio {seconds / times[0]:.2f}"
                for seconds in times[1:]), flush=True)


def variants(tf32):
    """(file, defines) of every kernel variant that is launched on a GPU with TF32, or without."""
    yield from (("pool.cu", (("VEC", vec),)) for vec in (4, 1))
    yield from ((file, ()) for file in ("lrn.cu", "pointwise.cu", "loss.cu", "sgd.cu"))
    for inner in (0, 1, 3) if tf32 else (0,):
        for filter_gradient, vec, bn in itertools.product(
                (False, True), (4, 1), launches.COLUMNS[inner > 0]):
            for dilate in (1,) if filter_gradient else (1, 2):
                yield "conv.cu", launches.conv_defines(
                    bn, launches.STAGES, vec, filter_gradient, inner, dilate)


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
    triton = importlib.util.find_spec("triton")
    path = os.environ.get("NVDISASM") or shutil.which("nvdisasm") or triton and os.path.join(
        triton.submodule_search_locations[0], "backends", "nvidia", "bin", "nvdisasm")
    return path if path and os.path.exists(path) else None


def instructions_per_mma(cubin):
    """Instructions in the loop around the tensor cores' products, for each product; or None.

    The loop is the shortest that holds them all, from a label to the branch back to it. What the
    compiler did not unroll within it counts once.
    """
    if not disassembler():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        lines = subprocess.run([disassembler(), "-c", file.name], capture_output=True,
                               text=True).stdout.splitlines()
    labels = {line.strip(): at for at, line in enumerate(lines) if line.startswith(".L_")}
    ends = ((at, re.search(r"BRA.*`\((\.L_\w+)\)", line)) for at, line in enumerate(lines))
    loops = [[line for line in lines[labels[back[1] + ":"]:at + 1] if re.match(r"\s+/\*", line)]
             for at, back in ends if back and labels[back[1] + ":"] < at]
    counts = [(-sum("HMMA" in line for line in loop), len(loop)) for loop in loops]
    products, whole = min(counts, default=(0, 0))
    return whole / -products if products else None


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
            print(f"{kernel + ' ' + label:62}{count:>10}{spilled:>9}"
                  + (f"{each:7.1f}" if each else ""), flush=True)


class Photos:
    """The same decoding and transformations as a PyTorch data set; without torch at the top."""

    def __init__(self, paths, recipe):
        self.paths, self.recipe = paths, recipe

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


def loader(options):
    """Photos/s from files to normalised batches, nothing cached, in turns with PyTorch's loader."""
    recipe = model.NETWORKS[options.network]
    names = sorted(os.listdir(options.images))[:options.photos]
    paths = [os.path.join(options.images, name) for name in names]
    n = options.batch
    step = our_step(options.beside, n, options.words) if options.beside else lambda: None

    def ours():
        plans = (data.Listed(range(i, min(i + n, len(names)))) for i in range(0, len(names), n))
        with data.Loader(options.images, names.__getitem__, len(names), recipe.size,
                         options.workers) as mine:
            for _, photos in mine.batches(plans):
                where = data.centre(len(photos), recipe.size - recipe.crop)
                kernels.prepare(photos, *where, recipe.crop)
                step()

    rivals, labels = [ours], ["weak.py"]
    try:
        import torch
        from torch.utils.data import DataLoader
        torch.set_num_threads(kernels.threads.count)
        labels.append(f"PyTorch {torch.__version__} DataLoader")
        rivals.append(lambda: [step() for _ in DataLoader(
            Photos(paths, recipe), batch_size=n, num_workers=options.workers)])
    except ImportError:
        print("PyTorch is not installed: no comparison")
    if options.beside:
        labels.append(f"training {options.beside} alone")
        rivals.append(lambda: [step() for _ in range(0, len(names), n)])
    times = timed(*rivals, rounds=options.rounds, each=1)
    print(f"{len(names):,} photos for {options.network}, {options.workers} workers, starting them "
          f"included, median of {options.rounds}")
    for label, seconds in zip(labels, times):
        print(f"{label:34}{len(names) / seconds:8.0f} photos/s")
    if options.beside:
        print("beside training a photo takes more than alone, microseconds:", ", ".join(
            f"{(seconds - times[-1]) / len(names) * 1e6:.0f}" for seconds in times[:-1]))


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
        self.most, self.over = 0, False

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
    built = data.build_index(path, os.path.join(folder, "index"), data.Text(100_000, 500))
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
