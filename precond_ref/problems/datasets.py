"""Real data: the embedded digits, and MNIST, LIBSVM and text files found through ``PRECOND_REF_DATA``.

A *name* (a str without a folder part) is searched in the folder that the environment variable names, then in the
current folder; anything else (``"./a9a"``, a ``pathlib.Path``) is a path. A file with any suffix may be gzipped.
Missing files raise FileNotFoundError with all places tried, damaged ones ValueError, and so do files of more than
256 MiB, packed or unpacked, and LIBSVM files of more than 2^28 dense entries (2 GiB).
"""

from __future__ import annotations

import gzip
import math
import os
import struct
from array import array
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from precond_ref.files import shown, unpacked
from precond_ref.problems.base import check_int, import_numpy, permutation

if TYPE_CHECKING:
    import numpy as np

VARIABLE = "PRECOND_REF_DATA"
IDX_UINT8 = 0x0800
"""First two bytes zero, the third 8 for unsigned bytes; the fourth is the number of axes."""
MOST_ENTRIES = 2**28
"""Largest number of dense features of a LIBSVM file."""


class Split(NamedTuple):
    """Images as rows, scaled to [0, 1] (float64), with labels 0, ..., classes - 1 (uint8)."""

    train_inputs: np.ndarray
    """(n, pixels)."""
    train_labels: np.ndarray
    """(n,)."""
    test_inputs: np.ndarray
    """(m, pixels)."""
    test_labels: np.ndarray
    """(m,)."""
    classes: int


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the UCI optical digits, test part: images (1797, 8, 8) of values 0..16 and labels (1797,), both uint8.

    They come with this package; source and licence are in ``data/digits-licence.txt``.
    """
    np = import_numpy()
    text = gzip.decompress((files("precond_ref.problems") / "data" / "digits.csv.gz").read_bytes())
    table = np.loadtxt(text.decode("ascii").splitlines(), delimiter=",", dtype="uint8")
    return table[:, :64].reshape(-1, 8, 8), table[:, 64]


def load_mnist(split: str = "t10k") -> tuple[np.ndarray, np.ndarray]:
    """Return MNIST from its idx files: images (n, 28, 28) of values 0..255 and labels (n,), both uint8.

    ``split`` is "t10k" (n = 10000) or "train" (n = 60000). FileNotFoundError without the files, ValueError for damaged
    files or another ``split``.
    """
    if split not in ("t10k", "train"):
        raise ValueError(f"split must be 't10k' or 'train', got {split!r}")
    images_path = find(f"{split}-images-idx3-ubyte", (".gz", ""))
    labels_path = find(f"{split}-labels-idx1-ubyte", (".gz", ""))
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if images.shape[0] != labels.shape[0]:
        raise ValueError(
            f"{images_path} holds {images.shape[0]} images but {labels_path} holds {labels.shape[0]} labels"
        )
    if images.shape[0] == 0 or images.shape[1:] != (28, 28):
        raise ValueError(f"{images_path} must hold images of 28 x 28, got the shape {images.shape}")
    if labels.max(initial=0) > 9:
        raise ValueError(f"{labels_path}: labels must be 0 to 9, got {labels.max()}")
    return images, labels


def load_libsvm(name_or_path: str | Path, n_features: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return a LIBSVM file of lines ``label index:value ...``: dense features (n, d) and labels (n,), both float64.

    Indices start at 1 and increase within a line; d is ``n_features`` or, if None, the largest index. Blank
    lines and the text after a ``#`` are skipped. FileNotFoundError without the file, ValueError for other content.
    """
    np = import_numpy()
    limit = math.inf if n_features is None else check_int("n_features", n_features, ge=1)
    path = find(name_or_path, ("", ".gz", ".txt", ".txt.gz"))
    labels, values = array("d"), array("d")
    rows, columns = array("q"), array("q")
    width = n_features or 0
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        content = line.partition("#")[0]
        if not content.strip():
            continue
        try:
            if "_" in content or not content.isascii():
                raise ValueError("Python would read it as a number, other readers would not")
            label, *entries = content.split()
            labels.append(finite(label))
            last = 0
            for entry in entries:
                index, _, value = entry.partition(":")
                column = int(index)
                if not last < column <= limit:
                    raise ValueError(f"index {column} after {last}, largest allowed {limit}")
                rows.append(len(labels) - 1)
                columns.append(column - 1)
                values.append(finite(value))
                last = column
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}, line {number}: not 'label index:value ...' ({shown(error, 200)})") from None
        width = max(width, last)
        if len(labels) * width > MOST_ENTRIES:
            raise ValueError(
                f"{path}, line {number}: {len(labels)} samples of {width} features are more than {MOST_ENTRIES} entries"
            )
    if not labels:
        raise ValueError(f"{path} holds no samples")
    features = np.zeros((len(labels), width))
    features[np.asarray(rows), np.asarray(columns)] = values
    return features, np.asarray(labels)


def load_text(name_or_path: str | Path) -> str:
    """Return a UTF-8 text, with its line ends; FileNotFoundError without the file, ValueError for other content."""
    path = find(name_or_path, ("", ".txt", ".gz", ".txt.gz"))
    text = read_text(path)
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def digits_split() -> Split:
    """Return `load_digits` as 1437 training and 360 test images."""
    return split_four_fifths(*load_digits(), scale=16.0)


def mnist_split() -> Split:
    """Return `load_mnist` ("t10k": MNIST's own test set) as 8000 training and 2000 test images."""
    return split_four_fifths(*load_mnist("t10k"), scale=255.0)


def split_four_fifths(images: np.ndarray, labels: np.ndarray, scale: float) -> Split:
    """Return images (n, height, width) divided by ``scale``; four fifths of a fixed random order are for training."""
    order = permutation(len(images), 0, "split")
    train, test = order[: len(images) * 4 // 5], order[len(images) * 4 // 5 :]
    inputs = images.reshape(len(images), -1) / scale
    return Split(inputs[train], labels[train], inputs[test], labels[test], classes=10)


def find(name_or_path: str | Path, suffixes: tuple[str, ...]) -> Path:
    """Return the first existing file: the path itself, or the name with one of the suffixes in the two folders."""
    if not isinstance(name_or_path, str) or Path(name_or_path).name != name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        return path
    names = [name_or_path + suffix for suffix in suffixes]
    folder = os.environ.get(VARIABLE, "")
    for path in [Path(place, name) for place in dict.fromkeys((folder, "")) for name in names]:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"looked for {', '.join(names)} in the current folder and in that named by the environment variable "
        f"{VARIABLE}, {folder or 'but it is not set'}; set it to the folder that holds the file, for example "
        f"`export {VARIABLE}=path/to/data`"
    )


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file."""
    try:
        return unpacked(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Return an idx file of unsigned bytes with ``ndim`` axes: magic number, lengths (big-endian uint32), bytes."""
    content = unpacked(path)
    header = 4 * (1 + ndim)
    if len(content) < header:
        raise ValueError(f"{path}: truncated, {len(content)} bytes are less than the header's {header}")
    magic, *shape = struct.unpack(f">{1 + ndim}I", content[:header])
    if magic != IDX_UINT8 + ndim:
        raise ValueError(f"{path}: the magic number must be {IDX_UINT8 + ndim}, got {magic}")
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path}: the header promises {math.prod(shape)} bytes of data, there are {len(content) - header}"
        )
    return import_numpy().frombuffer(content, dtype="uint8", offset=header).reshape(shape).copy()


def finite(text: str) -> float:
    """Return ``text`` as a finite float; ValueError for others."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value
