"""Runs the CUDA kernels on the host, for the tests: the same .cu text, the same launch code.

`Emulator` compiles the text that gpu.Cuda gives to CuPy behind emulate.h with the host's C++
compiler and runs it on NumPy arrays, in three orders of blocks and threads. Different bits are a
race; what else it finds, emulate.h says. Any finding is a RuntimeError that names the kernel.
"""
import atexit
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile

import numpy as np

FOLDER = os.path.dirname(os.path.abspath(__file__))
COMPILED = "WEAK_EMULATED"              # in the environment: the folder of what is compiled
ORDERS = ("ascending", "descending", "shuffled")
FLAGS = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-w",
         "-U_FORTIFY_SOURCE", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")


class _Argument(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


def compiler():
    """The C++ compiler's path, or None."""
    for name in (os.environ.get("CXX") or "g++", "c++", "clang++"):
        if shutil.which(name):
            return shutil.which(name)
    return None


@functools.cache
def compiled():
    """The folder of what is compiled, for this process and those that it starts; then it goes.

    It holds emulate.h in g++'s own format: reading the text takes half a second.
    """
    if COMPILED not in os.environ:
        folder = tempfile.mkdtemp(prefix="weak-emulated-")
        os.environ[COMPILED] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        subprocess.run([compiler(), *FLAGS, "-x", "c++-header", os.path.join(FOLDER, "emulate.h"),
                        "-o", os.path.join(folder, "emulate.h.gch")], capture_output=True)
    return os.environ[COMPILED]


class Emulator:
    """Runs the kernels of .cu texts on NumPy arrays."""

    def __init__(self, change=lambda text: text):
        """`change` is applied to each .cu text first: the tests plant mistakes with it."""
        if not compiler():
            raise RuntimeError("no C++ compiler: install g++ to run the kernels on the host")
        self.change = change
        self.orders = range(len(ORDERS))
        self.libraries = {}                     # by text and options

    def library(self, code, options):
        """A compiled .cu text as a library with one `run_NAME` for each kernel."""
        if (code, options) in self.libraries:
            return self.libraries[code, options]
        text = self.change(code[code.rindex("#line 1"):])           # emulate.h is for ptx.cuh
        name = hashlib.blake2b(repr((text, options)).encode(), digest_size=16).hexdigest()
        path = os.path.join(compiled(), name + ".so")
        if not os.path.exists(path):
            compile_library(text, options, path)
        self.libraries[code, options] = ctypes.CDLL(path)
        return self.libraries[code, options]

    def launch(self, code, options, kernel, grid, block, args, shared=0):
        """Run a kernel in every order; the arrays among `args` change as the kernel changes them.

        An array of one record is a struct, passed by value as CuPy does. RuntimeError with kernel,
        block and thread for whatever is wrong.
        """
        run = getattr(self.library(code, options), "run_" + kernel)
        run.restype = ctypes.c_char_p
        spans = [_span(arg) for arg in args]
        expected = None
        for order in self.orders:
            results = _run(run, args, spans, _size(grid), _size(block), shared, order, kernel)
            if expected is None:
                expected = results
            for number, (a, b) in enumerate(zip(expected, results), 1):
                if not np.array_equal(a, b):
                    raise RuntimeError(f"{kernel}: a race: argument {number} depends on the order "
                                       f"of threads, from byte {np.argmax(a != b)}")
        for i, (start, length) in enumerate(spans):
            if length and spans.index((start, length)) == i:        # not passed before
                ctypes.memmove(start, expected[i].ctypes.data, length)


def compile_library(text, options, path):
    """Make a library of a .cu text; RuntimeError with what the compiler says."""
    base = f"{path}.{os.getpid()}"              # two processes may be at it
    kernels = re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text)
    with open(base + ".cpp", "w", encoding="utf-8") as source:
        source.write('#include "emulate.h"\n' + text)
        for name in kernels:
            source.write(
                f'\nextern "C" const char* run_{name}(emulated::Argument* arguments, '
                "unsigned* grid, unsigned* block, size_t bytes, int order, void** results)\n{\n"
                f"    return emulated::launch({name}, arguments, grid, block, bytes, order, "
                "results);\n}\n")
    done = subprocess.run([compiler(), *FLAGS, *options, f"-I{compiled()}", f"-I{FOLDER}",
                           base + ".cpp", "-o", base], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{text[8:40]} does not compile for the host: {done.stderr[:2000]}")
    os.replace(base, path)


def _span(arg):
    """First address and number of bytes of an array; zeros for what is passed by value."""
    if not isinstance(arg, np.ndarray) or arg.dtype.names:
        return 0, 0
    return arg.ctypes.data, arg.nbytes


def _size(numbers):
    """A grid's or a block's three numbers."""
    return (ctypes.c_uint * 3)(*numbers, *[1] * (3 - len(numbers)))


def _run(run, args, spans, grid, block, shared, order, kernel):
    """The bytes of each argument after a launch in that order; RuntimeError if something is wrong.
    """
    arguments = (_Argument * len(args))()
    values = []                                 # numbers and records, kept while the kernel runs
    for argument, arg, (start, length) in zip(arguments, args, spans):
        if not length:
            values.append(np.array(arg))
            start = values[-1].ctypes.data
        argument.at = start
        argument.bytes = length
    results = [np.zeros(length, np.uint8) for _, length in spans]
    pointers = (ctypes.c_void_p * len(args))(*[result.ctypes.data for result in results])
    wrong = run(arguments, grid, block, ctypes.c_size_t(shared), order, pointers)
    if wrong:
        raise RuntimeError(f"{kernel}: {wrong.decode()}")
    return results


class RawModule:
    """CuPy's, of a .cu text that the emulator runs when its stream, the last of `current`, does."""

    def __init__(self, emulator, current, *, code, options=()):
        self.current = current
        self.run = functools.partial(emulator.launch, code, options)

    def get_function(self, name):
        return RawKernel(self, name)


class RawKernel:
    """CuPy's: it takes arrays of the device (their numbers are in `_x`), NumPy's numbers, records.
    """

    max_dynamic_shared_size_bytes = 48 << 10
    preferred_shared_memory_carveout = -1

    def __init__(self, module, name):
        self.module = module
        self.name = name

    def __call__(self, grid, block, args, *, shared_mem=0):
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory")
        if not all(hasattr(arg, "_x") or isinstance(arg, np.generic) or arg.dtype.names
                   for arg in args):
            raise TypeError(f"Unsupported type in {list(map(type, args))}")
        args = [getattr(arg, "_x", arg) for arg in args]
        self.module.current[-1].add(
            lambda: self.module.run(self.name, grid, block, args, shared_mem))
