"""Layers with forward and backward, the networks, SGD, and checkpoints (paper, §3).

Axis letters, everywhere: N images, H×W pixels, C channels in, F filters out, KH×KW filter, OH×OW
output pixels, D features in, E embedding (the last hidden layer), K words. Tensors x w b y and
their gradients dx dw db dy; s are scores. Arrays are float32 (float64 in gradient checks), NHWC.

One convention saves a pass over memory: a ReLU's derivative is taken by the layer *above* it.
Whoever computes a dx whose x came out of a ReLU multiplies it by (x > 0) on the way, so Conv and
Linear receive a dy that is already the gradient of x w + b. `Network` tells each layer which.
"""
import json
import os
import zlib
from typing import Callable, NamedTuple

import numpy as np

import kernels

OUTPUT_STD = 0.001                      # first scores near 0: the loss starts at ln K


# ----------------------------------------------------------------------------------- layers

class Layer:
    """What all layers share: `below_relu` says that x came out of a ReLU; `relu`, that y does."""

    below_relu = False
    relu = False
    needs_dx = True                     # the first layer's dx is nobody's input
    names = ()                          # names of the parameters; gradients are d + name

    def link(self, below_relu, needs_dx):
        """Tell the layer what it stands on; `Network` calls this once."""
        self.below_relu, self.needs_dx = below_relu, needs_dx

    def init(self, rng):
        """Draw the first weights."""

    def at(self, seed, step, row):
        """The counter of this pass's random numbers; step None is evaluation."""

    def parameters(self):
        """(path, layer, attribute) of each array learned; its gradient is the attribute d…"""
        return [(name, self, name) for name in self.names]


class Conv(Layer):
    """y = relu(x * w + b), a convolution with stride and zero padding."""

    names = ("w", "b")

    def __init__(self, c, f, kernel, stride=1, pad=0, relu=True):
        self.shape, self.bias = (kernel, kernel, c, f), (f,)
        self.stride, self.pad, self.relu = stride, pad, relu
        self.x = None

    def init(self, rng):
        fan_in = np.prod(self.shape[:3])
        self.w = he_normal(rng, self.shape, fan_in)
        self.b = np.zeros(self.bias, np.float32)

    def forward(self, x, out=None):
        self.x = x                                                  # (N, H, W, C)
        return kernels.conv_forward(x, self.w, self.b, self.stride, self.pad, self.relu, out)

    def backward(self, dy):
        # y = x * w + b is linear in x, w and b: see the two kernels
        self.dw, self.db = kernels.conv_backward_filter(self.x, dy, self.w.shape,
                                                        self.stride, self.pad)
        if not self.needs_dx:
            return None
        return kernels.conv_backward_input(dy, self.w, self.x, self.stride, self.pad,
                                           self.below_relu)         # (N, H, W, C)


class Linear(Layer):
    """y = x w + b, with a ReLU unless it is asked not to."""

    names = ("w", "b")

    def __init__(self, d, e, relu=True):
        self.shape, self.bias, self.relu = (d, e), (e,), relu
        self.x = self.dw = None             # dw is kept: new memory would cost page faults

    def init(self, rng):
        self.w = he_normal(rng, self.shape, fan_in=self.shape[0])
        self.b = np.zeros(self.bias, np.float32)

    def forward(self, x):
        self.x = x                                                  # (N, D)
        return kernels.add_bias(kernels.matmul(x, self.w), self.b, self.relu)   # (N, E)

    def backward(self, dy):
        # y = x w + b, so dw = xᵀ dy and dx = dy wᵀ
        self.dw = kernels.matmul(self.x.T, dy, out=self.dw)         # (D, E)
        self.db = kernels.column_sums(dy)                           # (E,)
        if not self.needs_dx:
            return None
        dx = kernels.matmul(dy, self.w.T)                           # (N, D)
        return kernels.relu_backward(dx, self.x, out=dx) if self.below_relu else dx


class Output(Layer):
    """s = e wᵀ + b: a row of w for each word, which is also the word's embedding (paper, §5.3)."""

    names = ("w", "b")

    def __init__(self, e, k):
        self.shape, self.bias = (k, e), (k,)
        self.x = self.dw = None

    def init(self, rng):
        self.w = rng.standard_normal(self.shape).astype(np.float32) * np.float32(OUTPUT_STD)
        self.b = np.zeros(self.bias, np.float32)

    def forward(self, x):
        self.x = x                                                  # (N, E)
        return kernels.add_bias(kernels.matmul(x, self.w.T), self.b)            # (N, K)

    def backward(self, ds):
        # s = e wᵀ + b, so dw = dsᵀ e and de = ds w
        self.dw = kernels.matmul(ds.T, self.x, out=self.dw)         # (K, E)
        self.db = kernels.column_sums(ds)                           # (K,)
        dx = kernels.matmul(ds, self.w)                             # (N, E)
        return kernels.relu_backward(dx, self.x, out=dx) if self.below_relu else dx


class MaxPool(Layer):
    """y = the maximum of each window; windows may overlap, and hang over the edge with `ceil`."""

    def __init__(self, kernel, stride, pad=0, ceil=False):
        self.kernel, self.stride, self.pad, self.ceil = kernel, stride, pad, ceil
        self.x = self.y = None

    def forward(self, x, out=None):
        self.x = x                                                  # (N, H, W, C)
        self.y = kernels.max_pool_forward(x, self.kernel, self.stride, self.pad, self.ceil, out)
        return self.y                                               # (N, OH, OW, C)

    def backward(self, dy):
        return kernels.max_pool_backward(dy, self.x, self.y, self.kernel, self.stride, self.pad,
                                         self.below_relu)           # (N, H, W, C)


class AvgPool(Layer):
    """y = the mean of each window."""

    def __init__(self, kernel, stride, pad=0, ceil=False):
        self.kernel, self.stride, self.pad, self.ceil = kernel, stride, pad, ceil
        self.x = None

    def forward(self, x, out=None):
        self.x = x                                                  # (N, H, W, C)
        return kernels.avg_pool_forward(x, self.kernel, self.stride, self.pad, self.ceil, out)

    def backward(self, dy):
        return kernels.avg_pool_backward(dy, self.x, self.kernel, self.stride, self.pad,
                                         self.below_relu)           # (N, H, W, C)


class LRN(Layer):
    """y = x / (k + α Σ x²)^β over neighbouring channels (Krizhevsky 2012, §3.3)."""

    def __init__(self, size=5, k=2.0, alpha=1e-4, beta=0.75):
        self.constants = size, k, alpha, beta
        self.x = None

    def forward(self, x):
        self.x = x                                                  # (N, H, W, C)
        return kernels.lrn_forward(x, *self.constants)

    def backward(self, dy):
        return kernels.lrn_backward(dy, self.x, *self.constants, relu=self.below_relu)


class Dropout(Layer):
    """y = x · mask / (1 - rate) while training, y = x otherwise (Krizhevsky 2012, §4.2)."""

    def __init__(self, rate):
        self.rate = rate
        self.x = self.counter = None

    def init(self, rng):
        self.stream = int(rng.integers(1 << 32))                    # its own stream of masks

    def at(self, seed, step, row):
        self.counter = None if step is None else (seed, step, self.stream, row)

    def forward(self, x):
        self.x = x                                                  # (N, E)
        return x if not self.counter or not self.rate else kernels.dropout(
            x, self.rate, *self.counter)

    def backward(self, dy):
        # y = x · mask, so dx = dy · mask: the counter draws the same mask again
        relu = self.x if self.below_relu else None
        if not self.counter or not self.rate:
            return dy if relu is None else kernels.relu_backward(dy, relu)
        return kernels.dropout(dy, self.rate, *self.counter, relu=relu)


class Flatten(Layer):
    """(N, H, W, C) -> (N, H*W*C)."""

    def forward(self, x):
        self.x = x
        return x.reshape(len(x), -1)                                # (N, H*W*C)

    def backward(self, dy):
        dx = dy.reshape(self.x.shape)                               # (N, H, W, C)
        return kernels.relu_backward(dx, self.x) if self.below_relu else dx


class Concat(Layer):
    """Branches side by side on one input, joined along the channels (inception modules).

    Each branch keeps H×W and ends in a Conv, which writes into its slice of y: no copy.
    """

    def __init__(self, *branches):
        self.branches = [Network([(f"{i}.{j}", layer) for j, layer in enumerate(branch)])
                         for i, branch in enumerate(branches)]
        ends = [branch[-1] for branch in branches]
        self.relu = all(end.relu for end in ends)
        stops = np.cumsum([0] + [end.shape[3] for end in ends])
        self.slices = [slice(a, b) for a, b in zip(stops, stops[1:])]

    def link(self, below_relu, needs_dx):
        for branch in self.branches:
            branch.link(below_relu, needs_dx)

    def init(self, rng):
        for branch in self.branches:
            for _, layer in branch.rows:
                layer.init(rng)

    def parameters(self):
        return [row for branch in self.branches for row in branch.parameters()]

    def forward(self, x):
        y = np.empty_like(x, shape=(*x.shape[:3], self.slices[-1].stop))    # (N, H, W, ΣF)
        for branch, part in zip(self.branches, self.slices):
            branch.forward(x, out=y[..., part])
        return y

    def backward(self, dy):
        # every branch saw the same x, so its gradients add up
        parts = [branch.backward(dy[..., part])
                 for branch, part in zip(self.branches, self.slices)]
        return sum(parts[1:], parts[0]) if parts[0] is not None else None


# --------------------------------------------------------------------------------- networks

class Network:
    """Layers one after the other: rows of (name, layer)."""

    def __init__(self, rows):
        self.rows = rows
        self.link(below_relu=False, needs_dx=False)

    def link(self, below_relu, needs_dx):
        for _, layer in self.rows:
            layer.link(below_relu, needs_dx)
            below_relu, needs_dx = layer.relu, True

    def init(self, seed):
        """First weights, each layer's from a counter of its own: a larger K changes no other."""
        for name, layer in self.rows:
            layer.init(np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())])))
        for _, layer, attribute in self.parameters():
            setattr(layer, attribute, kernels.to_device(getattr(layer, attribute)))
        return self

    def parameters(self):
        """(path, layer, attribute) of everything learned, e.g. ("conv1.w", conv1, "w")."""
        return [(f"{name}.{path}", owner, attribute) for name, layer in self.rows
                for path, owner, attribute in layer.parameters()]

    def state(self):
        """{path: array} of everything learned, as NumPy arrays."""
        return {path: kernels.to_host(getattr(layer, attribute))
                for path, layer, attribute in self.parameters()}

    def load(self, state):
        """Take the weights of `state`, {path: array}; ValueError if they are of another network."""
        for path, layer, attribute in self.parameters():
            wanted = layer.shape if attribute == "w" else layer.bias
            if path not in state or state[path].shape != tuple(wanted):
                raise ValueError(f"the model is not one of this network: {path} should be "
                                 f"{tuple(wanted)}")
            setattr(layer, attribute, kernels.to_device(state[path]))
        return self

    def forward(self, x, out=None, seed=0, step=None, row=0):
        """The last layer's y. With a step number this is training: dropout is on."""
        for _, layer in self.rows:
            layer.at(seed, step, row)
            into = [out] if layer is self.rows[-1][1] and out is not None else []
            x = layer.forward(x, *into)
        return x

    def features(self, x):
        """The last hidden layer e = f(x; θ), (N, E), without dropout (paper, §3)."""
        for _, layer in self.rows[:-1]:
            layer.at(0, None, 0)
            x = layer.forward(x)
        return x

    def bytes_per_image(self, size, crop):
        """GPU memory that one image of a batch takes in a training step.

        Every layer's input stays for the backward pass, which holds two gradients at a time; the
        photo itself is there twice, on its way and in use. Parts of split sums are not counted.
        """
        x = kernels.prepare(np.zeros((1, size, size, 3), np.uint8), [0], [0], [False], crop)
        self.forward(x, step=0)
        kept = [layer.x.nbytes for _, layer in self.rows if not isinstance(layer, Flatten)]
        return sum(kept) + max(map(sum, zip(kept, kept[1:]))) + 2 * 3 * size ** 2

    def backward(self, dy):
        """Every layer's gradients, last to first; returns the first layer's dx if it is needed."""
        for _, layer in reversed(self.rows):
            dy = layer.backward(dy)
        return dy


def alexnet(k, dropout):
    """AlexNet in one tower (Krizhevsky 2014): 57.0M + 4,097 K parameters."""
    return Network([                                                        # 224 x 224 x 3
        ("conv1", Conv(3, 64, 11, stride=4, pad=2)),                        # 55
        ("pool1", MaxPool(3, 2)),                                           # 27
        ("conv2", Conv(64, 192, 5, pad=2)),                                 # 27
        ("pool2", MaxPool(3, 2)),                                           # 13
        ("conv3", Conv(192, 384, 3, pad=1)),                                # 13
        ("conv4", Conv(384, 256, 3, pad=1)),                                # 13
        ("conv5", Conv(256, 256, 3, pad=1)),                                # 13
        ("pool5", MaxPool(3, 2)),                                           # 6
        ("flat", Flatten()),                                                # 9216
        ("drop6", Dropout(dropout)),
        ("fc6", Linear(9216, 4096)),
        ("drop7", Dropout(dropout)),
        ("fc7", Linear(4096, 4096)),                                        # the feature e
        ("output", Output(4096, k)),
    ])


def small(k, dropout):
    """A small AlexNet for 64 x 64 pixels that two CPU cores train in minutes."""
    return Network([                                                        # 64 x 64 x 3
        ("conv1", Conv(3, 32, 5, stride=2, pad=2)),                         # 32
        ("pool1", MaxPool(3, 2, pad=1)),                                    # 16
        ("conv2", Conv(32, 96, 3, pad=1)),                                  # 16
        ("pool2", MaxPool(3, 2, pad=1)),                                    # 8
        ("conv3", Conv(96, 128, 3, pad=1)),                                 # 8
        ("conv4", Conv(128, 128, 3, pad=1)),                                # 8
        ("pool4", MaxPool(3, 2, pad=1)),                                    # 4
        ("flat", Flatten()),                                                # 2048
        ("drop5", Dropout(dropout)),
        ("fc5", Linear(2048, 512)),                                         # the feature e
        ("output", Output(512, k)),
    ])


class Recipe(NamedTuple):
    """A network, and what it trains with where nothing else is asked for."""

    build: Callable
    size: int                           # pixels of the decoded photo
    crop: int                           # pixels that the network sees
    batch: int
    dropout: float
    lr: float


NETWORKS = {
    "alexnet": Recipe(alexnet, size=256, crop=224, batch=64, dropout=0.2, lr=0.0025),
    "small": Recipe(small, size=72, crop=64, batch=64, dropout=0.2, lr=0.02),
}


def he_normal(rng, shape, fan_in):
    """Gaussian weights of variance 2 / fan_in: ReLU layers keep the scale (He 2015, eq. 10)."""
    return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_in))


# ------------------------------------------------------------------------------------- SGD

class SGD:
    """v ← μ v + dw + λ w; w ← w - η v. The decay λ is for weights, not for biases."""

    def __init__(self, net, momentum, decay):
        self.net, self.momentum, self.decay = net, momentum, decay
        self.v = {path: kernels.to_device(np.zeros(getattr(layer, name).shape,
                                                   getattr(layer, name).dtype))
                  for path, layer, name in net.parameters()}

    def step(self, rate):
        for path, layer, name in self.net.parameters():
            kernels.sgd(getattr(layer, name), self.v[path], getattr(layer, "d" + name), rate,
                        self.momentum, self.decay if name == "w" else 0)

    def load(self, state):
        """Take the velocities of `state`, {path: array}."""
        self.v = {path: kernels.to_device(state[path]) for path in self.v}


class Plateau:
    """The paper's rule: halve the rate when the validation error rose, stop when it is tiny."""

    def __init__(self, rate, epochs_per_rate, least):
        self.rate, self.epochs_per_rate, self.least = rate, epochs_per_rate, least
        self.epochs, self.error = 0, None       # epochs at this rate, the last validation error

    def update(self, error):
        """After an epoch: may halve `rate`; True while training should go on."""
        self.epochs += 1
        rose = self.error is not None and error > self.error
        self.error = error
        if rose and self.epochs >= self.epochs_per_rate:
            self.rate, self.epochs = self.rate / 2, 0
        return self.rate >= self.least


# ------------------------------------------------------------------------------ checkpoints

def save(path, net, optimiser, facts, words):
    """Write a checkpoint: weights `w/…`, velocities `v/…`, `facts` (JSON) and the dictionary.

    It is written beside `path`, flushed and renamed: whatever happens, `path` is whole.
    """
    arrays = {"w/" + key: value for key, value in net.state().items()}
    arrays |= {"v/" + key: kernels.to_host(value) for key, value in optimiser.v.items()}
    for key, text in (("facts", json.dumps(facts)), ("words", "\n".join(words))):
        arrays[key] = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
    beside = path + ".part"
    try:
        with open(beside, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        if os.path.exists(beside):
            os.remove(beside)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)                            # the new name itself reaches the disk
    os.close(folder)


def load(path):
    """A checkpoint: (weights, velocities, facts, words); ValueError if it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        facts = json.loads(arrays["facts"].tobytes())
        words = arrays["words"].tobytes().decode("utf-8", "surrogateescape").split("\n")
    except FileNotFoundError:
        raise ValueError(f"no model at {path}; train one with `python weak.py --out "
                         f"{os.path.dirname(path) or '.'}`") from None
    except Exception:                           # a broken zip file raises anything
        raise ValueError(f"{path} is not a model of weak.py, or it is damaged") from None
    return (*({key[2:]: value for key, value in arrays.items() if key.startswith(kind)}
              for kind in ("w/", "v/")), facts, words)
