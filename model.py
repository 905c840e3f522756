"""Layers with forward and backward, the networks, losses and SGD (paper, §3).

Axis letters, everywhere: N images, H×W pixels, C channels in, F filters out, KH×KW filter, OH×OW
output pixels, D features in, E embedding (the last hidden layer), K words. Tensors x w b y and
their gradients dx dw db dy; s are scores, ds their gradient. Arrays are float32 (float64 in
gradient checks), NHWC.

    net = model.small(k=80)                             # 80 words; print(net) shows its layers
    x = np.random.randn(8, 64, 64, 3).astype("float32")             # (N, H, W, C)
    scores = net.forward_training(x, model.Context())   # [s], s (N, K)
    losses, gradients = model.training_losses(model.Softmax(), scores, np.arange(8))
    net.backward(gradients)                             # net.conv1.dw is there
    model.SGD(net, momentum=0.9, decay=5e-4).step(rate=0.01)
"""
import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

import kernels                          # kernels.f is f of reference.py, or its faster form
from data import Labels, presence_among

OUTPUT_STD = 0.001                      # first scores near 0: the loss starts at ln K
HEAD_WEIGHT = 0.3                       # of an auxiliary classifier's loss (Szegedy 2014, §5)
HEAD_DROPOUT = 0.7


# ----------------------------------------------------------------------------------- layers

class Context(NamedTuple):
    """What a training pass depends on besides x and the weights."""

    seed: int = 0                       # seed, step and row: the counter of dropout's masks
    step: int = 0
    row: int = 0                        # of x[0] in the whole batch, where several ranks share it
    classes: np.ndarray | None = None   # the words (C,) that scores are wanted of; None: all K


class Layer:
    """What all layers share.

    `forward` of x keeps what `backward` needs. `backward` of dy sets the gradients of the weights,
    dw and db, returns dx, and leaves dy as it is. Arrays that are kept are called x, y or argmax,
    by which `bytes_per_image` finds them.
    """

    shapes = {}                         # of the parameters, by name; gradients are d + name
    layers = {}                         # that it consists of, by name; empty for a single layer

    def draw_weights(self, rng):
        """First weights, of variance 2 / fan-in: ReLU layers keep the scale (He 2015, eq. 10)."""
        if not self.shapes:
            return
        shape = self.shapes["w"]
        std = np.sqrt(2 / np.prod(shape[:-1]))
        self.w = rng.standard_normal(shape, np.float32) * np.float32(std)
        self.b = np.zeros(shape[-1], np.float32)

    def forward_training(self, x, context):
        """As `forward`; layers that do something else while training say so."""
        return self.forward(x)

    def walk(self, *names):
        """(path, layer) of itself, or else of all the layers that it is made of, in order."""
        if not self.layers:
            return [(".".join(names), self)]
        rows = []
        for name, layer in self.layers.items():
            rows += layer.walk(*names, name)
        return rows

    def parameters(self):
        """(path, layer, attribute) of everything learned, e.g. ("conv1.w", conv1, "w")."""
        return [(f"{path}.{name}" if path else name, layer, name)
                for path, layer in self.walk() for name in layer.shapes]


class Conv(Layer):
    """y = relu(x * w + b), a convolution with stride and zero padding, or without the ReLU."""

    needs_dx = True                     # False for a network's first layer, whose x is the photo

    def __init__(self, c, f, kernel, stride=1, pad=0, relu=True):
        self.shapes = {"w": (kernel, kernel, c, f), "b": (f,)}
        self.stride = stride
        self.pad = pad
        self.relu = relu
        self.x = None
        self.y = None

    def forward(self, x):
        c = self.shapes["w"][2]
        if x.ndim != 4 or x.shape[3] != c:
            raise ValueError(f"this convolution takes images (N, H, W, C) with C = {c}, not an "
                             f"array of shape {x.shape}")
        self.x = x                                                  # (N, H, W, C)
        self.y = kernels.conv_forward(x, self.w, self.b, self.stride, self.pad, self.relu)
        return self.y                                               # (N, OH, OW, F)

    def backward(self, dy):
        if self.relu:
            dy = kernels.relu_backward(dy, self.y)                  # now that of x * w + b
        self.dw, self.db = kernels.conv_backward_filter(
            self.x, dy, self.w.shape, self.stride, self.pad)
        if not self.needs_dx:
            return None
        return kernels.conv_backward_input(
            dy, self.w, self.x.shape, self.stride, self.pad)        # (N, H, W, C)


class Linear(Layer):
    """y = relu(x w + b), or without the ReLU."""

    def __init__(self, d, e, relu=True):
        self.shapes = {"w": (d, e), "b": (e,)}
        self.relu = relu
        self.x = None
        self.y = None

    def forward(self, x):
        d = self.shapes["w"][0]
        if x.ndim != 2 or x.shape[1] != d:
            raise ValueError(f"this layer takes features (N, {d}), not an array of shape "
                             f"{x.shape}; have the images another size than the network's?")
        self.x = x                                                  # (N, D)
        self.y = kernels.matmul(x, self.w, self.b, self.relu)
        return self.y                                               # (N, E)

    def backward(self, dy):
        if self.relu:
            dy = kernels.relu_backward(dy, self.y)                  # now that of x w + b
        # y = x w + b, so dw = xᵀ dy and dx = dy wᵀ
        self.dw = kernels.matmul(self.x.T, dy)                      # (D, E)
        self.db = dy.sum(axis=0)                                    # (E,)
        return kernels.matmul(dy, self.w.T)                         # (N, D)


class Output(Layer):
    """s = e wᵀ + b: a row of w for each word, which is also the word's embedding (paper, §5.3).

    With the classes of a batch in the context, only their rows are gathered and get a gradient, so
    that a step's time does not depend on K (paper, §3: SGD over targets).
    """

    def __init__(self, e, k):
        self.shapes = {"w": (k, e), "b": (k,)}
        self.x = None
        self.classes = None             # those of the last forward pass; None: all K
        self.used_w = None              # and their rows of w, (C, E)

    def draw_weights(self, rng):
        k, e = self.shapes["w"]
        self.w = np.empty((k, e), np.float32)
        self.b = np.zeros(k, np.float32)
        for rows in np.array_split(self.w, 1 + self.w.size // (1 << 24)):       # bounded memory
            rows[...] = rng.standard_normal(rows.shape) * OUTPUT_STD

    def rows(self, classes=None):
        """w (K, E) and b (K,), or copies of their rows of some classes, (C, E) and (C,)."""
        if classes is None:
            return self.w, self.b
        return self.w[classes], self.b[classes]

    def scores(self, x, classes=None):
        """The scores of features x (N, E): (N, K), or (N, C) of some classes."""
        w, b = self.rows(classes)
        return kernels.matmul(x, w.T, b)

    def forward(self, x):
        return self.forward_training(x, Context())

    def forward_training(self, x, context):
        self.x = x                                                  # (N, E)
        self.classes = context.classes
        self.used_w, b = self.rows(self.classes)
        return kernels.matmul(x, self.used_w.T, b)                  # (N, K), or (N, C)

    def backward(self, ds):
        # s = e wᵀ + b, so dw = dsᵀ e and de = ds w
        self.dw = kernels.matmul(ds.T, self.x)                      # (K, E), or (C, E)
        self.db = ds.sum(axis=0)                                    # (K,), or (C,)
        return kernels.matmul(ds, self.used_w)                      # (N, E)


class MaxPool(Layer):
    """y = the maximum of each window; windows may overlap, and hang over the edge with `ceil`."""

    def __init__(self, kernel, stride, pad=0, ceil=False):
        self.kernel = kernel
        self.stride = stride
        self.pad = pad
        self.ceil = ceil
        self.argmax = None              # the place of each maximum in its window
        self.x_shape = None

    def forward(self, x):
        self.x_shape = x.shape                                      # (N, H, W, C)
        y, self.argmax = kernels.max_pool_forward(x, self.kernel, self.stride, self.pad, self.ceil)
        return y                                                    # (N, OH, OW, C)

    def backward(self, dy):
        return kernels.max_pool_backward(dy, self.argmax, self.x_shape, self.kernel, self.stride,
                                         self.pad)                  # (N, H, W, C)


class AvgPool(Layer):
    """y = the mean of each window."""

    def __init__(self, kernel, stride):
        self.kernel = kernel
        self.stride = stride
        self.x_shape = None

    def forward(self, x):
        self.x_shape = x.shape                                      # (N, H, W, C)
        return kernels.avg_pool_forward(x, self.kernel, self.stride)            # (N, OH, OW, C)

    def backward(self, dy):
        return kernels.avg_pool_backward(dy, self.x_shape, self.kernel, self.stride)


class LRN(Layer):
    """y = x / (k + α Σ x²)^β over neighbouring channels (Krizhevsky 2012, §3.3)."""

    def __init__(self, size=5, k=2.0, alpha=1e-4, beta=0.75):
        self.constants = size, k, alpha, beta
        self.x = None

    def forward(self, x):
        self.x = x                                                  # (N, H, W, C)
        return kernels.lrn_forward(x, *self.constants)

    def backward(self, dy):
        return kernels.lrn_backward(dy, self.x, *self.constants)


class Dropout(Layer):
    """y = x · mask / (1 - rate) while training, y = x otherwise (Krizhevsky 2012, §4.2)."""

    def __init__(self, rate):
        self.rate = rate
        self.mask_id = 0                # so that each Dropout draws masks of its own
        self.counter = None

    def draw_weights(self, rng):
        self.mask_id = int(rng.integers(1 << 32))

    def forward(self, x):
        return x

    def forward_training(self, x, context):
        if not self.rate:
            return x
        self.counter = context.seed, context.step, self.mask_id, context.row
        return kernels.dropout(x, self.rate, *self.counter)         # (N, E)

    def backward(self, dy):
        if not self.rate:
            return dy
        # y = x · mask, so dx = dy · mask: the counter draws the same mask again
        return kernels.dropout(dy, self.rate, *self.counter)


class Flatten(Layer):
    """(N, H, W, C) -> (N, H*W*C)."""

    def __init__(self):
        self.x_shape = None

    def forward(self, x):
        self.x_shape = x.shape
        return x.reshape(len(x), -1)                                # (N, H*W*C)

    def backward(self, dy):
        return dy.reshape(self.x_shape)                             # (N, H, W, C)


class Sequential(Layer):
    """Layers one after the other."""

    def __init__(self, *layers):
        self.layers = {str(number): layer for number, layer in enumerate(layers)}

    def forward(self, x):
        for layer in self.layers.values():
            x = layer.forward(x)
        return x

    def forward_training(self, x, context):
        for layer in self.layers.values():
            x = layer.forward_training(x, context)
        return x

    def backward(self, dy):
        for layer in reversed(self.layers.values()):
            dy = layer.backward(dy)
        return dy


class Concat(Layer):
    """Branches side by side on one input, joined along the channels (inception modules).

    Each branch is a list of layers that keep H×W.
    """

    def __init__(self, *branches):
        self.branches = [Sequential(*branch) for branch in branches]
        self.layers = {str(number): branch for number, branch in enumerate(self.branches)}
        self.stops = None               # where each branch's channels of y end

    def forward(self, x):
        return self._join([branch.forward(x) for branch in self.branches])

    def forward_training(self, x, context):
        return self._join([branch.forward_training(x, context) for branch in self.branches])

    def _join(self, outputs):
        self.stops = np.cumsum([y.shape[3] for y in outputs]).tolist()
        return np.concatenate(outputs, axis=3)                      # (N, H, W, ΣF)

    def backward(self, dy):
        gradients = []
        start = 0
        for branch, stop in zip(self.branches, self.stops):
            gradients.append(branch.backward(dy[..., start:stop].copy()))
            start = stop
        # every branch saw the same x, so its gradients add up
        return kernels.sum_gradients(gradients)                     # (N, H, W, C)


# --------------------------------------------------------------------------------- networks

class Head(Sequential):
    """An auxiliary classifier beside a network's layers, for training only (Szegedy 2014, §5).

    It reads the x that the layer after it reads, and gives scores of its own.
    """

    def __init__(self, rows):
        self.layers = dict(rows)


class Network(Layer):
    """Layers one after the other, by name, and auxiliary heads: rows of (name, layer).

    The first layer is a Conv, whose filters are shown, and the last one an Output.
    """

    def __init__(self, rows, seed=0):
        """seed: of the first weights; None for none, where `load` brings them."""
        if isinstance(rows, str):
            raise ValueError(f"Network takes rows of (name, layer), not {rows!r}; one of NETWORKS "
                             "is made by a function of its name: model.small(k=80)")
        self.layers = dict(rows)
        self.chain = [layer for layer in self.layers.values() if not isinstance(layer, Head)]
        self.first = self.chain[0]
        self.output = self.chain[-1]
        self.first.needs_dx = False     # the photo needs no gradient
        if seed is not None:
            self.draw_weights(seed)

    def draw_weights(self, seed):
        """First weights.

        Each named layer has a generator of its own, whose key is the seed and the CRC-32 of its
        name, so another K changes the output layers alone.
        """
        for name, layer in self.layers.items():
            rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
            for _, inner in layer.walk():
                inner.draw_weights(rng)
        self.load(self.state())         # they were drawn by NumPy: move them to the device

    def state(self):
        """{path: array} of everything learned, as NumPy arrays."""
        return {path: kernels.to_host(getattr(layer, attribute))
                for path, layer, attribute in self.parameters()}

    def load(self, state):
        """Take the weights of `state`, {path: array}."""
        for path, layer, attribute in self.parameters():
            setattr(layer, attribute, kernels.to_device(state[path]))
        return self

    def forward(self, x):
        """The scores (N, K), as in evaluation: without dropout and auxiliary heads."""
        for layer in self.chain:
            x = layer.forward(x)
        return x

    def forward_training(self, x, context):
        """The scores of the auxiliary heads, in their order, and then the network's own, a list."""
        scores = []
        for layer in self.layers.values():
            if isinstance(layer, Head):
                scores.append(layer.forward_training(x, context))
            else:
                x = layer.forward_training(x, context)
        return [*scores, x]

    def backward(self, gradients, on_gradient=None):
        """All gradients, last layer first, from those of forward_training's scores.

        on_gradient(array) is called with each parameter's gradient as soon as it is there. Returns
        the first layer's dx, which is None where that is a Conv.
        """
        *head_gradients, dy = gradients
        for layer in reversed(self.layers.values()):
            if isinstance(layer, Head):
                # x goes on and into the classifier, so the two gradients add up
                dy = kernels.sum_gradients([dy, layer.backward(head_gradients.pop())])
            else:
                dy = layer.backward(dy)
            if on_gradient:
                for _, inner, name in layer.parameters():
                    on_gradient(getattr(inner, "d" + name))
        return dy

    def features(self, x, last=None):
        """The last hidden layer e = f(x; θ), (N, E), or what the layer called `last` gives (§3)."""
        names = [name for name, layer in self.layers.items() if not isinstance(layer, Head)]
        if last and last not in names:
            raise ValueError(f"--layer {last} is none of {', '.join(names)}")
        stop = names.index(last) + 1 if last else -1
        for layer in self.chain[:stop]:
            x = layer.forward(x)
        return x

    def bytes_per_image(self, size, crop, loss, scored):
        """Device memory that one image of a batch takes in a training step, at most.

        What layers keep stays for the backward pass, which holds up to three gradients as large as
        the largest; the photo is there twice, on its way and in use. scored: how many words a step
        scores; loss: by which of LOSSES.
        """
        corner = np.zeros(1, int)
        photos = np.zeros((1, size, size, 3), np.uint8)
        x = kernels.prepare(photos, corner, corner, corner, crop)
        *heads, _ = self.forward_training(x, Context(classes=np.zeros(1, np.int32)))
        # each head's scores wait for the backward pass, as do their gradients
        arrays_of_scores = loss.arrays_of_scores + 2 * len(heads)
        scores = arrays_of_scores * scored * self.output.b.itemsize
        sizes = {}                      # by identity, for a layer's y is the next one's x
        for _, layer in self.walk():
            for name in ("x", "y", "argmax"):
                kept = getattr(layer, name, None)
                if kept is not None:
                    whole = kept if kept.base is None else kept.base
                    sizes[id(whole)] = whole.nbytes
        return sum(sizes.values()) + 3 * max(sizes.values()) + 2 * 3 * size**2 + scores

    def __getattr__(self, name):
        """A layer by its name, as in net.conv1."""
        layers = self.__dict__.get("layers", {})
        if name not in layers:
            raise AttributeError(f"the network has no layer {name}, but {', '.join(layers)}")
        return layers[name]

    def __repr__(self):
        """A line for each layer: its name, kind, shape of w and number of parameters."""
        lines = []
        total = 0
        for name, layer in self.layers.items():
            count = sum(int(np.prod(inner.shapes[p])) for _, inner, p in layer.parameters())
            shape = layer.shapes.get("w", "")
            lines.append(f"{name:8} {type(layer).__name__:8} {str(shape):20} {count:12,}".rstrip())
            total += count
        return "\n".join([*lines, f"{total:,} parameters"])


def alexnet(k, dropout=0.0, seed=0):
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
    ], seed)


def small(k, dropout=0.0, seed=0, width=32):
    """A small AlexNet for 64 x 64 pixels that two CPU cores train in minutes; width: of conv1."""
    return Network([                                                        # 64 x 64 x 3
        ("conv1", Conv(3, width, 5, stride=2, pad=2)),                      # 32
        ("pool1", MaxPool(3, 2, pad=1)),                                    # 16
        ("conv2", Conv(width, 3 * width, 3, pad=1)),                        # 16
        ("pool2", MaxPool(3, 2, pad=1)),                                    # 8
        ("conv3", Conv(3 * width, 4 * width, 3, pad=1)),                    # 8
        ("conv4", Conv(4 * width, 4 * width, 3, pad=1)),                    # 8
        ("pool4", MaxPool(3, 2, pad=1)),                                    # 4
        ("flat", Flatten()),                                                # 2048
        ("drop5", Dropout(dropout)),
        ("fc5", Linear(4 * 4 * 4 * width, 16 * width)),                     # the feature e, 512
        ("output", Output(16 * width, k)),
    ], seed)


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
                 ("output", Output(1024, k))])


def googlenet(k, dropout=0.0, seed=0):
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
    ], seed)



class Recipe(NamedTuple):
    """How a network is built and trained if nothing else is asked for."""

    build: Callable                     # (K, dropout, seed) -> Network
    size: int                           # pixels of a decoded photo's side …
    crop: int                           # … and of the crop of it that the network sees
    batch: int                          # photos a step
    dropout: float                      # rate
    lr: float                           # first learning rate


NETWORKS = {
    "alexnet": Recipe(alexnet, size=256, crop=224, batch=64, dropout=0.2, lr=0.0025),
    "googlenet": Recipe(googlenet, size=256, crop=224, batch=32, dropout=0.4, lr=0.01),
    "small": Recipe(small, size=72, crop=64, batch=64, dropout=0.2, lr=0.02),
    # half as wide, to compare with
    "narrow": Recipe(partial(small, width=16), size=72, crop=64, batch=64, dropout=0.2, lr=0.02),
}


# ---------------------------------------------------------------------------------- losses
# loss(s, labels) -> each row's part of ℓ, (N,), and ∂ℓ/∂s, (N, K). The labels (data.Labels) say
# which columns of s are targets, what each row weighs, and which words, if not all K, the columns
# stand for; or they are the classes of N photos, (N,), of which each weighs 1/N. A loss is made
# with the label frequency, (K,): the part of the rows that carry each word.
#
# Besides that a loss says
#     normaliser, log_probability, probabilities    how its scores become what is reported (eval.py)
#     prior_shift, prior_is_exact                   what puts the collection's word frequencies back
#     measured_with_prior                           whether the loss of held-out photos has them
#     photo_weights                                 how a photo's words count in that loss
#     of_guessing                                   a loss that training should stay below (weak.py)
#     balances, corrects_batch                      which options go with it
#     arrays_of_scores                              how many arrays like s it holds at once

def _as_labels(labels):
    if isinstance(labels, Labels):
        return labels
    targets = np.asarray(labels, np.int32).reshape(len(labels), -1)             # (N, T)
    return Labels(targets, np.full(len(targets), 1 / len(targets)))


class Softmax:
    """The multi-class logistic loss (eq. 2), over all K words or over some classes."""

    balances = True                     # the targets of a photo may share its weight
    corrects_batch = False              # over a batch's own words it is eq. 2 as it stands (§3)
    measured_with_prior = True          # the loss of photos as they are takes prior_shift
    arrays_of_scores = 4                # (N, K) of float32 that it holds at once, with s and ds

    def __init__(self, label_frequency=None):
        """The frequencies play no part in eq. 2."""

    def __call__(self, s, labels):
        """The losses (N,) and their gradient.

        With labels.inclusion_probability π, each class counts for 1/π classes in the rows that do
        not carry it: the sum over some is an unbiased estimate of that over all (sampled softmax).
        """
        labels = _as_labels(labels)
        shift = None
        if labels.inclusion_probability is not None:
            shift = -np.log(labels.inclusion_probability)
        weights = np.repeat(labels.weights[:, None], labels.targets.shape[1], axis=1)
        if labels.target_weights is not None:
            weights = weights * labels.target_weights
        return kernels.softmax_loss(s, labels.targets, weights, shift)

    def normaliser(self, s):
        """log Σ_k exp s_nk, (N, 1): the scores of different photos compare after it is taken off.

        A number added to all scores of a photo changes neither p nor this loss, so that training
        leaves it free, and it differs between photos: order them by log p = s - normaliser.
        """
        highest = s.max(axis=1, keepdims=True)                      # (N, 1): no overflow
        return highest + np.log(np.exp(s - highest).sum(axis=1, keepdims=True))

    def prior_shift(self, counts, training, drawn, presence):
        """log N_k - log q_k + log a_k, about its mean, (K,): see the function of that name."""
        shift = np.log(counts) - np.log(drawn) + np.log(presence)
        return shift - shift.mean()             # p knows no number that is added to all scores

    @staticmethod
    def prior_is_exact(sampling, positives, targets):
        """Whether the shift makes p that of real photos, if the training loss is at its least."""
        if sampling == "class":
            return positives == "drawn" or (positives == "balanced" and targets != "batch")
        return positives != "idf" and targets != "batch"

    def log_probability(self, s):
        """log p from s - normaliser, NumPy of any shape: they are equal."""
        return s

    def probabilities(self, s):
        """p (N, K), of one word among all, from scores of NumPy."""
        return np.exp(s - self.normaliser(s))

    def photo_weights(self, targets):
        """In validation a photo's words share its weight, as one drawn word a row does: (N,)."""
        return np.array([1 / max(1, len(words)) for words in targets])

    def of_guessing(self, k):
        """The loss of scores that are all 0, a photo's mean."""
        return np.log(k)


class OneVersusAll:
    """The one-versus-all logistic loss (eq. 1), its class weights scaled by N / K."""

    balances = False
    corrects_batch = True
    measured_with_prior = False         # in eq. 1 the class weights stand in its place
    arrays_of_scores = 9

    def __init__(self, label_frequency):
        self.label_frequency = np.asarray(label_frequency)

    def __call__(self, s, labels):
        """The losses (N,) and their gradient.

        A class's positives weigh 1 / (K f), f its frequency, and its negatives 1 / (K (1 - f)), so
        each class counts 1/K for either. With labels.inclusion_probability π a negative counts for
        1/π of them, as in Softmax.
        """
        labels = _as_labels(labels)
        k = len(self.label_frequency)
        frequency = self.label_frequency
        if labels.classes is not None:
            frequency = frequency[labels.classes]                   # (C,)
        others = k * (1 - frequency)
        if labels.inclusion_probability is not None:
            others = others * labels.inclusion_probability
        # 0 for a word that every row carries, or that no other row can bring
        negative = np.divide(1, others, out=np.zeros_like(others), where=others > 0)
        return kernels.one_vs_all_loss(s, labels.targets, labels.weights, 1 / (k * frequency),
                                       negative)

    def normaliser(self, s):
        """0, (N, 1): a score is the log-odds of one word by itself, in every photo alike."""
        return np.zeros_like(s[:, :1])

    def prior_shift(self, counts, training, drawn, presence):
        """log (f_k / (1 - f_k)), (K,): see the function of that name."""
        least = 0.5 / training                  # a word of every photo has finite odds, too
        frequency = np.clip(counts / training, least, 1 - least)
        return np.log(frequency) - np.log1p(-frequency)

    @staticmethod
    def prior_is_exact(sampling, positives, targets):
        """By class, other words of a photo count as negatives, or it is drawn more often."""
        return sampling == "image" and positives != "idf"

    def log_probability(self, s):
        """log σ(s), NumPy of any shape."""
        return -np.logaddexp(0, -s)

    def probabilities(self, s):
        """σ(s) (N, K), of each word by itself, from scores of NumPy."""
        small = np.exp(-np.abs(s))                                  # no overflow
        return np.where(s > 0, 1, small) / (1 + small)

    def photo_weights(self, targets):
        """In validation each photo counts once, whatever its words are: (N,)."""
        return np.ones(len(targets))

    def of_guessing(self, k):
        """The loss of scores that are all 0, a photo's mean."""
        # all positives of a class weigh 1/K together, its negatives, too, and each costs log 2
        return 2 * np.log(2)


LOSSES = {"softmax": Softmax, "one-vs-all": OneVersusAll}


def prior_shift(options, counts, training, label_frequency, label_weight):
    """What makes scores those of photos as they are: to add to the biases, (K,); None for nothing.

    options: those of the run, a dictionary; counts (K,): N_k, of the `training` photos, that carry
    word k; label_frequency (K,): of the rows that training draws, that have it as a target;
    label_weight (K,): what it weighs there, the mean over all rows (both of data.Index).

    Training draws (photo, word) pairs otherwise than a collection has them, and scores learn that.
    Softmax: of the collection's pairs a part ∝ N_k has word k, of those drawn a part ∝ q_k, its
    label_weight, and among the photos of one word both draw alike. So by Bayes' rule
        p(k | x) ∝ N_k p(x | k) ∝ N_k / q_k · p_drawn(k | x), or s_k + log N_k - log q_k.
    Over a batch's own words k is in the sum with a probability a_k only, so s_k learns log p -
    log a_k: add log a_k. `sampled` words are corrected while training already.
    One-versus-all: eq. 1 weighs positives by 1/f_k and negatives by 1/(1 - f_k), f_k = N_k / N, so
    s_k learns the log-odds less log (f_k / (1 - f_k)): add that.

    prior_is_exact says for which options this is exact. With all words of a photo by class, photos
    of rare words are drawn more often, whatever their other words are; in one-versus-all by class,
    drawn, a photo's other words are negatives. (Saerens et al. 2002; Menon et al. 2021.)
    """
    counts = np.asarray(counts)
    label_frequency = np.asarray(label_frequency)
    loss = LOSSES[options["loss"]](label_frequency)
    presence = np.ones(len(counts))             # (K,) a_k
    if options["targets"] == "batch":
        presence = presence_among(options["batch"], label_frequency)
    shift = loss.prior_shift(counts, training, np.asarray(label_weight), presence)
    return shift.astype(np.float32) if abs(shift).max() > 1e-9 else None


def prior_is_exact(options):
    """Whether prior_shift is exact, or an approximation that is better than none."""
    loss = LOSSES[options["loss"]]
    return loss.prior_is_exact(options["sampling"], options["positives"], options["targets"])


def training_losses(loss, scores, labels):
    """What SGD minimises: the losses of the network's own scores, (N,), and all gradients, a list.

    scores: as of Network.forward_training. An auxiliary head's loss counts HEAD_WEIGHT.
    """
    labels = _as_labels(labels)
    *head_scores, own_scores = scores
    head_labels = labels._replace(weights=HEAD_WEIGHT * labels.weights)
    gradients = []
    for s in head_scores:
        _, ds = loss(s, head_labels)
        gradients.append(ds)
    losses, ds = loss(own_scores, labels)
    return losses, [*gradients, ds]


# ------------------------------------------------------------------------------------- SGD

class SGD:
    """v ← μ v + dw + λ w; w ← w - η v. The decay λ is for weights, not for biases.

    Of an output layer only the rows of the last batch's classes move, if it had some: the others
    keep weights and velocities, as if no time had passed for them.
    """

    def __init__(self, net, momentum, decay):
        self.net = net
        self.momentum = momentum
        self.decay = decay
        self.v = {path: np.zeros_like(getattr(layer, name))
                  for path, layer, name in net.parameters()}

    def step(self, rate):
        """Move all weights by their gradients."""
        for path, layer, name in self.net.parameters():
            w = getattr(layer, name)
            dw = getattr(layer, "d" + name)
            decay = 0 if name == "b" else self.decay
            rows = layer.classes if isinstance(layer, Output) else None
            kernels.sgd(w, self.v[path], dw, rate, self.momentum, decay, rows)


class Plateau:
    """The paper's rule: after an epoch whose error rose the learning rate is halved.

    Here each rate is kept for some epochs at least, and the error is the held-out loss (weak.py).
    """

    def __init__(self, rate, epochs_per_rate):
        self.rate = rate
        self.epochs_per_rate = epochs_per_rate
        self.epochs = 0                 # since the rate last changed
        self.error = None               # of the last epoch

    def update(self, error):
        """After an epoch: may halve `rate`."""
        self.epochs += 1
        rose = self.error is not None and error > self.error
        self.error = error
        if rose and self.epochs >= self.epochs_per_rate:
            self.rate /= 2
            self.epochs = 0
