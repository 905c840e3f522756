"""Layers with forward and backward, the networks, losses, SGD, and checkpoints (paper, §3).

Axis letters, everywhere: N images, H×W pixels, C channels in, F filters out, KH×KW filter, OH×OW
output pixels, D features in, E embedding (the last hidden layer), K words. Tensors x w b y and
their gradients dx dw db dy; s are scores, ds their gradient. Arrays are float32 (float64 in
gradient checks), NHWC.
"""
import json
import os
import zlib
from collections import namedtuple
from contextlib import suppress
from typing import NamedTuple

import numpy as np

import kernels
from kernels.console import whole_file

OUTPUT_STD = 0.001                      # first scores near 0: the loss starts at ln K
HEAD_WEIGHT = 0.3                       # of an auxiliary classifier's loss (Szegedy 2014, §5)
HEAD_DROPOUT = 0.7


# ----------------------------------------------------------------------------------- layers

class Pass(NamedTuple):
    """What a forward pass depends on besides x and the weights."""

    seed: int = 0
    step: int | None = None             # None: evaluation, without dropout and auxiliary heads
    row: int = 0                        # of x[0] in the whole batch, for dropout's counter
    classes: np.ndarray | None = None   # the words that scores are wanted of; None: all K


class Layer:
    """What all layers share.

    A ReLU, y = max(s, 0), lets the gradient through where y > 0. The layer after it sees to that:
    its dx is 0 where its x, which is this y, is not positive. So `backward` of a layer that ends
    in a ReLU is given the gradient of s, and that of a network whose last layer does.
    """

    needs_dx = True                     # that of a network's first Conv is nobody's input
    relu = False                        # whether it ends in a ReLU
    gated = False                       # whether its x comes out of one: see Network
    shapes = {}                         # of the parameters, by name; gradients are d + name
    layers = {}                         # those that it is made of, by name, if it is
    x = None                            # what is kept for the backward pass
    dw = db = None                      # where their memory is, once there is some

    def init(self, rng):
        """First weights, of variance 2 / fan-in: ReLU layers keep the scale (He 2015, eq. 10)."""
        if self.shapes:
            shape = self.shapes["w"]
            std = np.sqrt(2 / np.prod(shape[:-1]))
            self.w = rng.standard_normal(shape, np.float32) * np.float32(std)
            self.b = np.zeros(shape[-1], np.float32)

    @property
    def gate(self):
        """x, if a ReLU made it and it is kept, or None."""
        return self.x if self.gated else None

    def walk(self, *names):
        """(path, layer) of itself, or else of all the layers that it is made of, in order."""
        inner = [row for name, one in self.layers.items() for row in one.walk(*names, name)]
        return inner or [(".".join(map(str, names)), self)]

    def parameters(self):
        """(path, layer, attribute) of everything learned, e.g. ("conv1.w", conv1, "w")."""
        return [(f"{path}.{name}", layer, name) for path, layer in self.walk()
                for name in layer.shapes]


class Conv(Layer):
    """y = relu(x * w + b), a convolution with stride and zero padding."""

    def __init__(self, c, f, kernel, stride=1, pad=0, relu=True):
        self.shapes = {"w": (kernel, kernel, c, f), "b": (f,)}
        self.stride, self.pad, self.relu = stride, pad, relu

    def forward(self, x, now, out=None):
        self.x = x                                                  # (N, H, W, C)
        return kernels.conv_forward(x, self.w, self.b, self.stride, self.pad, self.relu, out)

    def backward(self, dy):
        # dy (N, OH, OW, F) is that of x * w + b, which is linear in x, w and b
        window = self.stride, self.pad
        self.dw, self.db = kernels.conv_backward_filter(self.x, dy, self.w.shape, *window,
                                                        out=(self.dw, self.db))
        if self.needs_dx:
            return kernels.conv_backward_input(
                dy, self.w, self.x.shape, *window, self.gate)       # (N, H, W, C)


class Linear(Layer):
    """y = relu(x w + b), or without the ReLU."""

    def __init__(self, d, e, relu=True):
        self.shapes, self.relu = {"w": (d, e), "b": (e,)}, relu

    def forward(self, x, now):
        self.x = x                                                  # (N, D)
        return kernels.matmul(x, self.w, bias=self.b, relu=self.relu)           # (N, E)

    def backward(self, dy):
        # dy (N, E) is that of x w + b, so dw = xᵀ dy and dx = dy wᵀ
        self.dw = kernels.matmul(self.x.T, dy, out=self.dw)         # (D, E)
        self.db = kernels.column_sums(dy, out=self.db)              # (E,)
        return kernels.sum_gradients([kernels.matmul(dy, self.w.T)], self.gate)         # (N, D)


class Output(Layer):
    """s = e wᵀ + b: a row of w for each word, which is also the word's embedding (paper, §5.3).

    With the classes of a batch in the pass, only their rows are gathered and get a gradient, so
    that a step's time does not depend on K (paper, §3: SGD over targets).
    """

    def __init__(self, e, k):
        self.shapes = {"w": (k, e), "b": (k,)}

    def init(self, rng):
        k, e = self.shapes["w"]
        self.w, self.b = np.empty((k, e), np.float32), np.zeros(k, np.float32)
        for part in np.array_split(self.w, 1 + self.w.size // (1 << 24)):       # bounded memory
            part[...] = rng.standard_normal(part.shape) * OUTPUT_STD

    def forward(self, x, now):
        self.x, self.classes = x, now.classes                       # (N, E)
        rows = slice(None) if now.classes is None else now.classes
        self.used = self.w[rows]
        return kernels.matmul(x, self.used.T, bias=self.b[rows])    # (N, K), or (N, C)

    def backward(self, ds):
        # s = e wᵀ + b, so dw = dsᵀ e and de = ds w
        if self.dw is None or len(self.dw) != ds.shape[1]:          # another number of classes
            self.dw = self.db = None
        self.dw = kernels.matmul(ds.T, self.x, out=self.dw)         # (K, E)
        self.db = kernels.column_sums(ds, out=self.db)              # (K,)
        return kernels.sum_gradients([kernels.matmul(ds, self.used)], self.gate)        # (N, E)


class MaxPool(Layer):
    """y = the maximum of each window; windows may overlap, and hang over the edge with `ceil`."""

    def __init__(self, kernel, stride, pad=0, ceil=False):
        self.kernel, self.stride, self.pad, self.ceil = kernel, stride, pad, ceil

    def forward(self, x, now):
        self.shape = x.shape                                        # (N, H, W, C)
        y, self.place = kernels.max_pool_forward(x, self.kernel, self.stride, self.pad, self.ceil,
                                                 self.gated)
        return y                                                    # (N, OH, OW, C)

    def backward(self, dy):
        return kernels.max_pool_backward(dy, self.place, self.shape, self.kernel, self.stride,
                                         self.pad)                  # (N, H, W, C)


class AvgPool(Layer):
    """y = the mean of each window."""

    def __init__(self, kernel, stride):
        self.kernel, self.stride = kernel, stride

    def forward(self, x, now):
        self.x = x                                                  # (N, H, W, C)
        return kernels.avg_pool_forward(x, self.kernel, self.stride)            # (N, OH, OW, C)

    def backward(self, dy):
        return kernels.avg_pool_backward(dy, self.x.shape, self.kernel, self.stride, self.gate)


class LRN(Layer):
    """y = x / (k + α Σ x²)^β over neighbouring channels (Krizhevsky 2012, §3.3)."""

    def __init__(self, size=5, k=2.0, alpha=1e-4, beta=0.75):
        self.constants = size, k, alpha, beta

    def forward(self, x, now):
        self.x = x                                                  # (N, H, W, C)
        return kernels.lrn_forward(x, *self.constants)

    def backward(self, dy):
        return kernels.lrn_backward(dy, self.x, *self.constants, self.gated)


class Dropout(Layer):
    """y = x · mask / (1 - rate) while training, y = x otherwise (Krizhevsky 2012, §4.2)."""

    def __init__(self, rate):
        self.rate = rate

    def init(self, rng):
        self.stream = int(rng.integers(1 << 32))                    # its own stream of masks

    def forward(self, x, now):
        drops = self.rate and now.step is not None
        self.counter = (now.seed, now.step, self.stream, now.row) if drops else None
        return kernels.dropout(x, self.rate, *self.counter) if drops else x     # (N, E)

    def backward(self, dy):
        # y = x · mask, so dx = dy · mask: the counter draws the same mask again
        return kernels.dropout(dy, self.rate, *self.counter) if self.counter else dy


class Flatten(Layer):
    """(N, H, W, C) -> (N, H*W*C)."""

    def forward(self, x, now):
        self.x = x
        return x.reshape(len(x), -1)                                # (N, H*W*C)

    def backward(self, dy):
        return dy.reshape(self.x.shape)                             # (N, H, W, C)


class Concat(Layer):
    """Branches side by side on one input, joined along the channels (inception modules).

    Each branch keeps H×W and ends in a Conv with ReLU, which writes into its slice of y: no copy.
    """

    relu = True

    def __init__(self, *branches):
        self.branches = [Network(list(enumerate(branch)), True) for branch in branches]
        self.layers = dict(enumerate(self.branches))                # their paths: 0.0, 1.0, …
        assert all(branch.output.relu for branch in self.branches)
        stops = np.cumsum([0] + [branch.output.shapes["b"][0] for branch in self.branches])
        self.slices = [slice(a, b) for a, b in zip(stops, stops[1:])]

    def forward(self, x, now):
        self.x = x                                                  # (N, H, W, C)
        y = np.empty_like(x, shape=(*x.shape[:3], self.slices[-1].stop))    # (N, H, W, ΣF)
        for branch, mine in zip(self.branches, self.slices):
            branch.forward(x, now, out=y[..., mine])
        return y

    def backward(self, dy):
        # every branch saw the same x, so its gradients add up
        return kernels.sum_gradients([branch.backward(dy[..., mine]) for branch, mine in
                                      zip(self.branches, self.slices)], self.gate)  # (N, H, W, C)


# --------------------------------------------------------------------------------- networks

class Network(Layer):
    """Layers one after the other, by name: rows of (name, layer)."""

    def __init__(self, rows, needs_dx=False):
        self.layers = dict(rows)
        for (_, before), (_, layer) in zip(rows, rows[1:]):
            passes = isinstance(before, (Flatten, Dropout))         # positive where its x is
            layer.gated = before.gated if passes else before.relu
        self.first, self.output = rows[0][1], rows[-1][1]
        self.heads = [layer for layer in self.layers.values() if isinstance(layer, Head)]
        self.first.needs_dx = needs_dx

    def init(self, seed):
        """First weights, each layer's from a counter of its own: a larger K changes no other."""
        for name, layer in self.layers.items():
            rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
            for _, one in layer.walk():
                one.init(rng)
        return self.load(self.state())

    def state(self):
        """{path: array} of everything learned, as NumPy arrays."""
        return {path: kernels.to_host(getattr(layer, attribute))
                for path, layer, attribute in self.parameters()}

    def load(self, state):
        """Take the weights of `state`, {path: array}."""
        for path, layer, attribute in self.parameters():
            setattr(layer, attribute, kernels.to_device(state[path]))
        return self

    def forward(self, x, now=Pass(), out=None):
        """The last layer's y, into `out` if given; with a step number in `now` this is training."""
        for layer in self.layers.values():
            into = {"out": out} if out is not None and layer is self.output else {}
            x = layer.forward(x, now, **into)
        return x

    def features(self, x, last=None):
        """The last hidden layer e = f(x; θ), (N, E), or what the layer called `last` gives (§3)."""
        if last and last not in self.layers:
            raise ValueError(f"the layer {last} is none of {', '.join(self.layers)}")
        stop = list(self.layers).index(last) + 1 if last else -1
        for layer in list(self.layers.values())[:stop]:
            x = layer.forward(x, Pass())
        return x

    def backward(self, dy, done=lambda gradient: None):
        """All gradients, last layer first, each given to done; returns the first dx if needed."""
        for layer in reversed(self.layers.values()):
            dy = layer.backward(dy)
            for _, one, name in layer.parameters():
                done(getattr(one, "d" + name))
        return dy

    def bytes_per_image(self, size, crop):
        """Device memory that one image of a batch takes in a training step.

        Most layers' inputs stay for the backward pass, which holds up to three gradients as large
        as the largest; the photo is there twice, on its way and in use.
        """
        x = kernels.prepare(np.zeros((1, size, size, 3), np.uint8), [0], [0], [False], crop)
        self.forward(x, Pass(step=0, classes=np.zeros(1, np.int32)))
        kept = [layer.x for _, layer in self.walk() if layer.x is not None]
        wholes = [x if x.base is None else x.base for x in kept]
        sizes = {id(whole): whole.nbytes for whole in wholes}.values()
        return sum(sizes) + 3 * max(sizes) + 2 * 3 * size ** 2


class Head(Network):
    """y = x; while training, an auxiliary classifier on x, its scores s (Szegedy 2014, §5).

    Whoever computes the loss of s leaves the gradient in `ds`: see `training_loss`.
    """

    def forward(self, x, now):
        self.x, self.s = x, None if now.step is None else super().forward(x, now)
        return x                                                    # s (N, K), or (N, C)

    def backward(self, dy):
        # x goes on and into the classifier, so the two gradients add up
        return kernels.sum_gradients([super().backward(self.ds), dy], self.gate)


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


def inception(c, n1, reduce3, n3, reduce5, n5, pooled):
    """An inception module (Szegedy 2014, fig. 2b): four branches, H×W as it was."""
    return Concat([Conv(c, n1, 1)],
                  [Conv(c, reduce3, 1), Conv(reduce3, n3, 3, pad=1)],
                  [Conv(c, reduce5, 1), Conv(reduce5, n5, 5, pad=2)],
                  [MaxPool(3, 1, pad=1), Conv(c, pooled, 1)])


def auxiliary(c, k):
    """An auxiliary classifier on 14 x 14 pixels (Szegedy 2014, §5)."""
    return Head([("pool", AvgPool(5, 3)),                                   # 4
                 ("conv", Conv(c, 128, 1)),
                 ("flat", Flatten()),                                       # 2048
                 ("fc", Linear(2048, 1024)),
                 ("drop", Dropout(HEAD_DROPOUT)),
                 ("output", Output(1024, k))], needs_dx=True)


def googlenet(k, dropout):
    """GoogLeNet (Szegedy 2014, table 1): 5.97M + 1,025 K parameters, 10.3M + 3,075 K with heads."""
    return Network([                                                        # 224 x 224 x 3
        ("conv1", Conv(3, 64, 7, stride=2, pad=3)),                         # 112
        ("pool1", MaxPool(3, 2, ceil=True)),                                # 56
        ("norm1", LRN()),
        ("reduce2", Conv(64, 64, 1)),                                       # 56
        ("conv2", Conv(64, 192, 3, pad=1)),                                 # 56
        ("norm2", LRN()),
        ("pool2", MaxPool(3, 2, ceil=True)),                                # 28
        #                        1x1  reduce, 3x3  reduce, 5x5  pool
        ("3a", inception(192,  64,  96, 128, 16,  32,  32)),                # 28, 256 channels
        ("3b", inception(256, 128, 128, 192, 32,  96,  64)),                # 28, 480
        ("pool3", MaxPool(3, 2, ceil=True)),                                # 14
        ("4a", inception(480, 192,  96, 208, 16,  48,  64)),                # 14, 512
        ("head1", auxiliary(512, k)),
        ("4b", inception(512, 160, 112, 224, 24,  64,  64)),                # 14, 512
        ("4c", inception(512, 128, 128, 256, 24,  64,  64)),                # 14, 512
        ("4d", inception(512, 112, 144, 288, 32,  64,  64)),                # 14, 528
        ("head2", auxiliary(528, k)),
        ("4e", inception(528, 256, 160, 320, 32, 128, 128)),                # 14, 832
        ("pool4", MaxPool(3, 2, ceil=True)),                                # 7
        ("5a", inception(832, 256, 160, 320, 32, 128, 128)),                # 7, 832
        ("5b", inception(832, 384, 192, 384, 48, 128, 128)),                # 7, 1024
        ("pool5", AvgPool(7, 1)),                                           # 1
        ("flat", Flatten()),                                                # the feature e, 1024
        ("drop5", Dropout(dropout)),
        ("output", Output(1024, k)),
    ])


# build(K, dropout); pixels of the decoded photo, and of what the network sees; options' defaults
Recipe = namedtuple("Recipe", "build size crop batch dropout lr")

NETWORKS = {
    "alexnet": Recipe(alexnet, size=256, crop=224, batch=64, dropout=0.2, lr=0.0025),
    "googlenet": Recipe(googlenet, size=256, crop=224, batch=32, dropout=0.4, lr=0.01),
    "small": Recipe(small, size=72, crop=64, batch=64, dropout=0.2, lr=0.02),
}


# ---------------------------------------------------------------------------------- losses
# loss(s, labels) -> each row's part of ℓ, (N,), and ∂ℓ/∂s in the memory of s, (N, C). The labels
# (data.Labels) say which columns of s are targets, what each row weighs, and which words, if not
# all K, the columns stand for.

def softmax(s, labels):
    """The multi-class logistic loss (eq. 2), over all K words or over some classes.

    With labels.chance, each class counts for 1/chance classes where a row does not carry it, and
    the sum over some is an unbiased estimate of that over all (sampled softmax).
    """
    shift = None if labels.chance is None else -np.log(labels.chance)
    parts = np.ones(labels.targets.shape) if labels.parts is None else labels.parts
    return kernels.softmax_loss(s, labels.targets, labels.weights[:, None] * parts, shift)


def one_vs_all(s, labels):
    """The one-versus-all logistic loss (eq. 1), its class weights scaled by N / K.

    Of the training rows a share carries each word. A class's positives weigh 1 / (K share) and its
    negatives 1 / (K (1 - share)), so each class counts 1/K for either. With labels.chance a
    negative counts for 1/chance of them, as in `softmax`.
    """
    k = len(labels.share)
    share = labels.share[... if labels.classes is None else labels.classes]     # (K,), or (C,)
    others = k * (1 - share) * (1 if labels.chance is None else labels.chance)
    # 0 for a word that every row carries, or that no other row can bring
    negative = np.divide(1, others, out=np.zeros_like(others), where=others > 0)
    return kernels.one_vs_all_loss(s, labels.targets, labels.weights, 1 / (k * share), negative)


LOSSES = {"softmax": softmax, "one-vs-all": one_vs_all}


def training_loss(net, s, labels, loss):
    """The scores' losses, (N,), and ∂ℓ/∂s; auxiliary heads count HEAD_WEIGHT, and keep theirs."""
    for head in net.heads:
        _, head.ds = loss(head.s, labels._replace(weights=HEAD_WEIGHT * labels.weights))
    return loss(s, labels)


# ------------------------------------------------------------------------------------- SGD

class SGD:
    """v ← μ v + dw + λ w; w ← w - η v. The decay λ is for weights, not for biases.

    All weights, then all biases, become parts of one array, and so do velocities and gradients: a
    step is one pass. If `sparse`, output layers stay apart, and only the rows of a batch's classes
    move: the others keep weights and velocities, as if no time had passed for them.
    """

    def __init__(self, net, momentum, decay, sparse=False):
        self.momentum, self.decay = momentum, decay
        rows = sorted(net.parameters(), key=lambda row: row[2] == "b")
        self.apart = [row for row in rows if sparse and isinstance(row[1], Output)]
        self.v = {path: np.zeros_like(getattr(layer, name)) for path, layer, name in self.apart}
        rows = [row for row in rows if row not in self.apart]
        w = np.concatenate([getattr(layer, name).reshape(-1) for _, layer, name in rows])
        self.joined = w, v, dw = w, np.zeros_like(w), np.empty_like(w)
        end, self.biases = 0, sum(layer.b.size for _, layer, name in rows if name == "b")
        for path, layer, name in rows:
            shape, end, start = layer.shapes[name], end + getattr(layer, name).size, end
            self.v[path] = v[start:end].reshape(shape)
            setattr(layer, name, w[start:end].reshape(shape))
            setattr(layer, "d" + name, dw[start:end].reshape(shape))
        self.filters = [layer.w for _, layer in net.walk() if isinstance(layer, Conv)]

    def step(self, rate):
        kernels.sgd(*self.joined, rate, self.momentum, self.decay, biases=self.biases,
                    filters=self.filters)
        for path, layer, name in self.apart:
            kernels.sgd(getattr(layer, name), self.v[path], getattr(layer, "d" + name), rate,
                        self.momentum, self.decay if name == "w" else 0, layer.classes)


class Plateau:
    """The paper's rule: halve the rate when the validation error rose."""

    def __init__(self, rate, epochs_per_rate):
        self.rate, self.epochs_per_rate = rate, epochs_per_rate
        self.epochs, self.error = 0, None       # epochs at this rate, the last validation error

    def update(self, error):
        """After an epoch: may halve `rate`."""
        self.epochs += 1
        rose = self.error is not None and error > self.error
        self.error = error
        if rose and self.epochs >= self.epochs_per_rate:
            self.rate, self.epochs = self.rate / 2, 0


# ------------------------------------------------------------------------------ checkpoints

def save(path, net, velocities, facts, words):
    """Write a checkpoint: weights `w/…`, velocities `v/…`, `facts` (JSON) and the dictionary."""
    arrays = {"w/" + key: value for key, value in net.state().items()}
    arrays |= {"v/" + key: kernels.to_host(value) for key, value in velocities.items()}
    for key, text in (("facts", json.dumps(facts)), ("words", "\n".join(words))):
        arrays[key] = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
    with whole_file(path) as file:
        np.savez(file, **arrays, checksum=checksum(arrays))


def checksum(arrays):
    """The CRC-32 of {name: array}, so that a checkpoint is what was saved, or is refused."""
    total = 0
    for name, array in sorted(arrays.items()):
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array), total)
    return total


def load(path):
    """A checkpoint: (weights, velocities, facts, words); ValueError if it is none."""
    if not os.path.isfile(path):                # a pipe would keep us waiting
        raise ValueError(f"no model at {path}; train one with `python weak.py --out "
                         f"{os.path.dirname(path) or '.'}`")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        if arrays.pop("checksum") != checksum(arrays):
            raise ValueError("this is not what was saved")
        facts = json.loads(arrays["facts"].tobytes())
        words = arrays["words"].tobytes().decode("utf-8", "surrogateescape").split("\n")
    except Exception:                           # a broken zip file raises anything
        raise ValueError(f"{path} is not a model of weak.py, or it is damaged") from None
    return (*({key[2:]: value for key, value in arrays.items() if key.startswith(kind)}
              for kind in ("w/", "v/")), facts, words)


def load_best(run):
    """Weights, facts with the whole log, words, and a line that says what these are.

    run: a folder, whose best.npz is taken where there is one, or a file. ValueError as in `load`.
    """
    paths = run, os.path.join(run, "best.npz"), os.path.join(run, "model.npz")
    path = next(filter(os.path.isfile, paths), paths[-1])
    weights, _, facts, words = load(path)
    log = os.path.join(os.path.dirname(path), "log.jsonl")      # best.npz has that of its own epoch
    with suppress(OSError, ValueError), open(log) as file:
        facts["log"] = max(facts["log"], list(map(json.loads, file)), key=len)
    line = f"{path}: step {facts['step']:,}, epoch {facts['epoch']} of {len(facts['log'])}"
    loss = {row["step"]: row["validation_loss"] for row in facts["log"]}.get(facts["step"])
    return weights, facts, words, line + (f", held-out loss {loss:.4f}" if loss else "")
