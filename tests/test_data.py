"""Loaders of real data: the embedded digits, and idx, LIBSVM and text files, whole, missing and damaged."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from precond_ref import problems
from precond_ref.problems import datasets

REAL = os.environ.get("PRECOND_REF_DATA")


def need_real(*names: str) -> None:
    """Skip unless the real files are there."""
    if not REAL:
        pytest.skip("PRECOND_REF_DATA is not set: no real data to read")
    missing = [name for name in names if not (Path(REAL) / name).is_file()]
    if missing:
        pytest.skip(f"PRECOND_REF_DATA has no {', '.join(missing)}")


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    """An idx file of unsigned bytes."""
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype("uint8").tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
LABELS = np.asarray([3, 1, 4, 1, 9])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder that PRECOND_REF_DATA names."""
    monkeypatch.setenv("PRECOND_REF_DATA", str(tmp_path))
    return tmp_path


# ---- digits ---------------------------------------------------------------------------------------


def test_digits_shapes_and_values():
    images, labels = problems.load_digits()
    assert images.shape == (1797, 8, 8)
    assert labels.shape == (1797,)
    assert images.dtype == labels.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 16)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    expected = sklearn.load_digits()
    images, labels = problems.load_digits()
    assert np.array_equal(images, expected.images)
    assert np.array_equal(labels, expected.target)


def test_digits_file():
    folder = Path(datasets.__file__).parent / "data"
    packed = (folder / "digits.csv.gz").read_bytes()
    digest = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"
    assert len(packed) < 80_000
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == digest
    licence = (folder / "digits-licence.txt").read_text()
    assert "CC BY 4.0" in licence
    assert "Alpaydin" in licence


def test_splits_are_disjoint_and_fixed():
    images, labels = problems.load_digits()
    split = datasets.digits_split()
    assert split.train_inputs.shape == (1437, 64)
    assert split.test_inputs.shape == (360, 64)
    rows = np.concatenate([split.train_inputs, split.test_inputs]) * 16
    both = np.column_stack([rows, np.concatenate([split.train_labels, split.test_labels])])
    original = np.column_stack([images.reshape(1797, 64), labels])
    assert np.array_equal(both[np.lexsort(both.T)], original[np.lexsort(original.T)])
    assert datasets.permutation(1797, 0, "split")[:5].tolist() == [85, 1783, 1193, 1447, 1048]


# ---- MNIST ----------------------------------------------------------------------------------------


def write_mnist(folder: Path, images: bytes, labels: bytes, suffix: str = "", split: str = "t10k") -> None:
    pack = gzip.compress if suffix == ".gz" else bytes
    (folder / f"{split}-images-idx3-ubyte{suffix}").write_bytes(pack(images))
    (folder / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(labels))


@pytest.mark.parametrize("split", ["t10k", "train"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_reads_what_was_written(folder, suffix, split):
    write_mnist(folder, idx(IMAGES), idx(LABELS), suffix, split)
    images, labels = problems.load_mnist(split)
    assert np.array_equal(images, IMAGES)
    assert np.array_equal(labels, LABELS)
    assert images.dtype == labels.dtype == np.uint8
    assert images.flags.writeable


DAMAGED_MNIST = {
    "magic": (idx(IMAGES, magic=2049), idx(LABELS), "the magic number must be 2051, got 2049"),
    "label magic": (idx(IMAGES), idx(LABELS, magic=2051), "the magic number must be 2049, got 2051"),
    "truncated": (idx(IMAGES)[:-1], idx(LABELS), "promises 3920 bytes of data, there are 3919"),
    "too long": (idx(IMAGES) + b"x", idx(LABELS), "promises 3920 bytes of data, there are 3921"),
    "header": (idx(IMAGES)[:11], idx(LABELS), "11 bytes are less than the header's 16"),
    "count": (idx(IMAGES), idx(LABELS[:4]), "5 images but .* 4 labels"),
    "size": (idx(IMAGES[:, :27]), idx(LABELS), "28 x 28"),
    "empty": (idx(IMAGES[:0]), idx(LABELS[:0]), "28 x 28"),
    "label": (idx(IMAGES), idx(LABELS + 1), "labels must be 0 to 9, got 10"),
    "half a gzip": (gzip.compress(idx(IMAGES))[:99], idx(LABELS), "damaged or truncated gzip"),
    "gzip content": (b"\x1f\x8b" + idx(IMAGES), idx(LABELS), "damaged or truncated gzip"),
}


@pytest.mark.parametrize("fault", DAMAGED_MNIST)
def test_damaged_mnist_is_refused(folder, fault):
    images, labels, message = DAMAGED_MNIST[fault]
    write_mnist(folder, images, labels)
    with pytest.raises(ValueError, match=message):
        problems.load_mnist()


def test_mnist_split_name_is_checked():
    with pytest.raises(ValueError, match="'t10k' or 'train', got 'test'"):
        problems.load_mnist("test")


# ---- LIBSVM ---------------------------------------------------------------------------------------

SVM = "-1 1:0.5 3:-2e1\n+1 2:7 # a remark\n\n# another\n-1\n"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_libsvm_reads_what_was_written(tmp_path, pack, ends):
    (tmp_path / "some").write_bytes(pack(SVM.replace("\n", ends).encode()))
    features, labels = problems.load_libsvm(tmp_path / "some")
    assert np.array_equal(features, [[0.5, 0.0, -20.0], [0.0, 7.0, 0.0], [0.0, 0.0, 0.0]])
    assert np.array_equal(labels, [-1.0, 1.0, -1.0])
    assert features.dtype == labels.dtype == np.float64


def test_libsvm_width(folder):
    (folder / "some.txt").write_text(SVM)
    assert problems.load_libsvm("some", n_features=5)[0].shape == (3, 5)
    assert problems.load_libsvm("some")[0].shape == (3, 3)
    with pytest.raises(ValueError, match=r"line 1: .*index 3 after 1, largest allowed 2"):
        problems.load_libsvm("some", n_features=2)
    with pytest.raises(ValueError, match="n_features must be >= 1, got 0"):
        problems.load_libsvm("some", n_features=0)


BAD_LINES = [
    "yes 1:2", "1 2", "1 a:2", "1 1:", "1 :3", "1 0:3", "1 -1:3", "1 3:1 2:1", "1 3:1 3:1", "1 1:nan",
    "inf 1:1", "1 1:2:3", "1 1.5:2", "1 qid:1 2:3", "1 1_0:2", "1 \u0661:2",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_libsvm_line_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "bad"
    path.write_text(f"+1 1:1\n# nothing\n{line}\n+1 2:1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad, line 3: not 'label index:value \.\.\.'"):
        problems.load_libsvm(path)


@pytest.mark.parametrize("content", [b"", b"\n# only a remark\n"])
def test_libsvm_without_samples_is_refused(tmp_path, content):
    (tmp_path / "none").write_bytes(content)
    with pytest.raises(ValueError, match="holds no samples"):
        problems.load_libsvm(tmp_path / "none")


# ---- text -----------------------------------------------------------------------------------------


def test_text_is_read_as_it_is(folder):
    (folder / "poem.txt").write_bytes("Größe\r\nRose\n".encode())
    assert problems.load_text("poem") == problems.load_text("poem.txt") == "Größe\r\nRose\n"


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"\xff\xfe", "not UTF-8")])
def test_bad_text_is_refused(folder, content, message):
    (folder / "poem.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        problems.load_text("poem")


# ---- looking for files ----------------------------------------------------------------------------

LOOKED_FOR = {
    "mnist": (problems.load_mnist, ["t10k-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte"]),
    "a9a": (lambda: problems.load_libsvm("a9a"), ["a9a", "a9a.gz", "a9a.txt", "a9a.txt.gz"]),
    "text": (lambda: problems.load_text("poem"), ["poem", "poem.txt", "poem.gz", "poem.txt.gz"]),
    "problem": (lambda: problems.load("mnist-mlp"), ["t10k-images-idx3-ubyte.gz"]),
}


@pytest.mark.parametrize("case", LOOKED_FOR)
def test_missing_file_says_what_where_and_how(folder, case):
    load, names = LOOKED_FOR[case]
    with pytest.raises(FileNotFoundError) as caught:
        load()
    for part in [*names, str(folder), "export PRECOND_REF_DATA="]:
        assert part in str(caught.value)


@pytest.mark.parametrize("case", LOOKED_FOR)
def test_unset_variable_says_so(monkeypatch, case):
    monkeypatch.delenv("PRECOND_REF_DATA", raising=False)
    load, names = LOOKED_FOR[case]
    with pytest.raises(FileNotFoundError) as caught:
        load()
    for part in [*names, "it is not set", "export PRECOND_REF_DATA="]:
        assert part in str(caught.value)


def test_a_path_is_not_a_name(folder, tmp_path, monkeypatch):
    (folder / "a9a").write_text("+1 1:1\n")
    monkeypatch.chdir(tmp_path)
    assert problems.load_libsvm("./a9a")[0].shape == (1, 1)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*elsewhere"):
        problems.load_libsvm("elsewhere/a9a")
    with pytest.raises(FileNotFoundError, match="no such file: a9b"):
        problems.load_libsvm(Path("a9b"))


# ---- NumPy is loaded late, and its absence is explained -------------------------------------------


def test_listing_loads_no_numpy():
    code = "import sys, precond_ref.problems as p; p.list_problems(); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("load", [problems.load_digits, lambda: problems.load("quadratic")])
def test_missing_numpy_is_explained(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match=r'pip install "precond-ref\[cli\]"'):
        load()


# ---- the real files -------------------------------------------------------------------------------


def test_real_mnist():
    need_real("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    images, labels = problems.load_mnist()
    assert images.shape == (10000, 28, 28)
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_real_mnist_is_learned():
    need_real("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    problem = problems.load("mnist-softmax")
    assert problem.train[0].shape == (8000, 784)
    assert problem.test[0].shape == (2000, 784)
    params = problem.init()
    for step in range(240):
        _, grads = problem.loss_and_grad(params, problem.batch(step))
        params = {name: params[name] - np.float32(0.25) * grads[name] for name in params}
    # linear classifiers reach 0.88 to 0.92 on these 8000 images
    assert 0.85 < problem.metric(params) < 0.95


def test_real_a9a():
    need_real("a9a.gz")
    features, labels = problems.load_libsvm("a9a", n_features=123)
    assert features.shape == (32561, 123)
    assert set(labels) == {-1.0, 1.0}
    assert int((labels == 1).sum()) == 7841
    assert int(features.sum()) == 451592


def test_real_text():
    need_real("tinyshakespeare.txt")
    text = problems.load_text("tinyshakespeare")
    assert len(text) == 1115394
    assert text.startswith("First Citizen:\n")
