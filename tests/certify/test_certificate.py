"""Certificates and their independent checker: what is confirmed, what is rejected, and that its bounds are rigorous."""

from __future__ import annotations

import ast
import json
import shutil
import sys
import zipfile
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from helpers import Threat, lowest_margins, normal
from mnist_files import ROOT, run_script
from test_bound_scripts import IMAGES, make_place
from torch import nn

from utils.bounds.passes import BoundPass
from utils.certify import certified_margin, certified_radius, margin_problem
from utils.certify.certificate import collect_hints, describe_model, model_hash, save_certificates, write_npz
from utils.certify.problem import SLACK
from utils.network.models import SequenceClassifier
from utils.network.unroll import unroll
from utils.perturbation.sets import Perturbation
from utils.question import margin_rows
from utils.relaxation.lines import relax_relu, relax_tanh
from utils.relaxation.planes import relax_product

CHECKER = ROOT / "scripts" / "check_certificate.py"
sys.path.insert(0, str(CHECKER.parent))
import check_certificate as checker  # noqa: E402

INF = float("inf")
KINDS = {"rnn": nn.RNN, "relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
FRAMES, INPUTS, CLASSES = 3, 4, 3


def small_net(kind="rnn", layers=1, bidirectional=False, bias=True, seed=0, dtype=torch.float64, **options):
    """A small random classifier."""
    activation = {"nonlinearity": "relu"} if kind == "relu" else {}
    rnn = KINDS[kind](INPUTS, 5, layers, bias=bias, batch_first=True, bidirectional=bidirectional, **activation)
    head = nn.Linear(5 * (2 if bidirectional else 1), CLASSES, bias=bias)
    for number, parameter in enumerate((*rnn.parameters(), *head.parameters())):
        parameter.data = 0.7 * normal(*parameter.shape, seed=1000 * seed + number)
    return SequenceClassifier(rnn, head, **options).to(dtype).requires_grad_(False)


def batch_of(net, count=3, seed=5):
    x = 0.5 * normal(count, FRAMES, INPUTS, seed=seed, dtype=net.head.weight.dtype)
    return x, net(x).argmax(dim=1)


STATE = (normal(2, 5, seed=31) * 0.3, normal(2, 5, seed=32) * 0.3)
CASES = {
    "rnn": ({"kind": "rnn"}, {}),
    "relu": ({"kind": "relu", "mean": 0.1, "std": 0.5}, {"norm": 1.0}),
    "rnn float32, no bias": ({"kind": "rnn", "bias": False, "dtype": torch.float32}, {"norm": INF}),
    "rnn bidirectional, mean": ({"kind": "rnn", "bidirectional": True, "pooling": "mean"}, {"norm": INF}),
    "lstm": ({"kind": "lstm", "mean": torch.arange(4) * 0.1, "std": torch.arange(1, 5) / 3}, {}),
    "lstm, state": ({"kind": "lstm", "layers": 2, "state": STATE}, {"ball": "sequence"}),
    "lstm bidirectional": ({"kind": "lstm", "bidirectional": True, "state": STATE}, {"norm": 1.0, "ball": "sequence"}),
    "gru": ({"kind": "gru"}, {"norm": INF, "clip": (-2.0, 2.0)}),
    "gru deep": ({"kind": "gru", "layers": 2, "pooling": "mean"}, {"frames": [0, 2]}),
    "gru last frame": ({"kind": "gru", "bidirectional": True}, {"frames": 2, "norm": 1.0}),
    "gru by intervals": ({"kind": "gru"}, {"method": "ibp"}),
    "lstm crown-ibp": ({"kind": "lstm"}, {"method": "crown-ibp", "relaxation": "line"}),
    "lstm constants": ({"kind": "lstm"}, {"relaxation": "constant"}),
    "lstm alpha": ({"kind": "lstm"}, {"method": "alpha", "alpha_steps": 8}),
    "rnn alpha, some frames": ({"kind": "rnn"}, {"method": "alpha", "frames": [0, 1], "norm": INF}),
    "lengths": ({"kind": "lstm", "bidirectional": True, "pooling": "mean"}, {"lengths": torch.tensor([3, 2, 1])}),
}


def write(folder: Path, net, share=1.0, **threat):
    """Certificates of a batch at ``share`` of its radii: (paths, x, labels, eps, engine margins)."""
    x, labels = batch_of(net)
    if "lengths" in threat:
        labels = net(x, threat["lengths"]).argmax(dim=1)
    eps = share * certified_radius(net, x, labels, **threat)
    paths = save_certificates(folder, net, x, labels, eps, **threat)
    margins = certified_margin(net, x, labels, eps, dtype=torch.float64, **threat)
    return paths, x, labels, eps, margins.amin(dim=1)


def run_checker(capsys, *arguments) -> tuple[int, str, str]:
    """main() in this process: exit code, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["check_certificate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            checker.main()
    return (end.value.code, *capsys.readouterr())


def read(path: Path) -> tuple[dict, dict]:
    with np.load(path) as file:
        arrays = {name: file[name].copy() for name in file.files}
    return json.loads(arrays.pop("header").tobytes()), arrays


def save(path: Path, header: dict, arrays: dict) -> Path:
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    return path


# --- confirmed ------------------------------------------------------------------------------------------------------


def test_checker_imports_numpy_and_the_standard_library_only():
    tree = ast.parse(CHECKER.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert outside == {"numpy"}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"exec", "eval", "__import__", "compile"} and "pickle" not in names


@pytest.mark.parametrize("name", CASES)
def test_certificates_at_the_radius_are_confirmed(name, tmp_path):
    options, threat = CASES[name]
    net = small_net(**options)
    paths, _, _, eps, margins = write(tmp_path, net, **threat)
    assert len(paths) == int((eps > 0).sum()) > 0
    for path, margin in zip(paths, margins[eps > 0].tolist(), strict=True):
        rigorous = checker.check(path)[2]
        assert rigorous > 0
        if threat.get("method") != "alpha":  # tunes its slopes anew
            assert margin - 1e-6 <= rigorous, (rigorous, margin)
            # Where the method bounds operands by intervals alone, the checker does more.
            assert rigorous <= margin + 1e-9 or threat.get("method") == "crown-ibp"


@pytest.mark.parametrize("method", ["alpha", "curve"])
def test_slopes_that_a_search_found_on_its_way_are_found_again(method, tmp_path):
    """Where they double and triple radii, slopes tuned at the radius itself do not reach it."""
    torch.manual_seed(34)
    rnn = nn.RNN(1, 4, batch_first=True, nonlinearity="relu", bidirectional=True)
    net = SequenceClassifier(rnn, nn.Linear(8, 2)).double().requires_grad_(False)
    for parameter in net.parameters():
        parameter *= 4.0
    x = torch.randn(3, 1, 1, dtype=torch.float64)
    labels = net(x).argmax(dim=1)
    how = {"method": method, "curve_steps": 2}
    radius = certified_radius(net, x, labels, **how)
    assert (radius > 2.0 * certified_radius(net, x, labels)).all()
    paths = save_certificates(tmp_path, net, x, labels, 0.99 * radius, **how)
    assert len(paths) == 3 and all(checker.check(path)[2] > 0 for path in paths)


@pytest.mark.parametrize("kind", KINDS)
def test_margins_are_rigorous_for_any_slopes(kind, tmp_path):
    """Slopes are hints: with random ones the margin is low, but it is below what an attack reaches, always."""
    net = small_net(kind)
    x, labels = batch_of(net, count=2)
    threat, eps = Threat(2.0), torch.full((2, FRAMES), 0.3, dtype=torch.float64)
    graph = unroll(net, FRAMES)
    reached = lowest_margins(graph, x, eps, margin_rows(labels, CLASSES).double(), threat).amin(dim=1)
    paths = save_certificates(tmp_path, net, x, labels, certified_radius(net, x, labels))
    generator = np.random.default_rng(1)
    for scale in (0.0, 0.2, 1.0, 3.0):
        for path, value in zip(paths, reached.tolist(), strict=True):
            header, arrays = read(path)
            arrays["eps"][:] = 0.3
            for key in arrays:
                if key.startswith("slopes"):
                    arrays[key] = arrays[key] * (scale != 3.0) + scale * generator.normal(size=arrays[key].shape)
            try:
                assert checker.check(save(tmp_path / "other.npz", header, arrays))[2] <= value
            except checker.Rejected as reason:
                assert float(str(reason).split(",")[0].split()[-1]) <= value


# --- rejected and damaged -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with certificates of an LSTM, x and labels."""
    folder = tmp_path_factory.mktemp("certificates")
    net = small_net("lstm", dtype=torch.float32)
    _, x, labels, _, _ = write(folder, net)
    return folder, net, x, labels


@pytest.fixture
def copy(place, tmp_path):
    shutil.copytree(place[0], tmp_path / "certificates")
    return tmp_path / "certificates"


def hash_of_input(x):
    return checker.hash_arrays({"x": x})


def larger_eps(header, arrays, other):
    arrays["eps"] *= 1.01


def another_norm(header, arrays, other):
    header["norm"] = "inf"


def another_label(header, arrays, other):
    header["label"] = header["targets"].pop()


def another_target_order(header, arrays, other):  # what was the label is to be beaten
    header["targets"], header["label"] = [header["label"]], header["targets"][0]


def another_input(header, arrays, other):
    arrays["x"] = other["x"]


def another_input_and_hash(header, arrays, other):
    arrays["x"] = other["x"]
    header["sample"]["sha256"] = hash_of_input(other["x"])


def moved_input(header, arrays, other):
    arrays["x"] += 0.05
    header["sample"]["sha256"] = hash_of_input(arrays["x"])


def no_slopes(header, arrays, other):
    for key in [key for key in arrays if key.startswith("slopes")]:
        del arrays[key]


def steep_slope(header, arrays, other):
    arrays["slopes.l0.forward.output"][-1, 0, 0, :] += 5.0


def another_model(header, arrays, other):
    header["weights"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    "tamper",
    [
        larger_eps,
        another_norm,
        another_label,
        another_target_order,
        another_input,
        another_input_and_hash,
        moved_input,
        no_slopes,
        steep_slope,
        another_model,
    ],
    ids=lambda function: function.__name__,
)
def test_tampered_certificates_are_rejected(tamper, copy, capsys):
    first, second = sorted(copy.glob("sample_*.npz"))[:2]
    header, arrays = read(first)
    tamper(header, arrays, read(second)[1])
    save(first, header, arrays)
    code, out, err = run_checker(capsys, first)
    assert code == 1 and out.startswith("rejected: ") and out.count("\n") == 1 and err == ""


def test_edited_weight_is_rejected_even_with_its_hash(copy, capsys):
    """Without the hash by the hash; with the hash, because the margin does not hold for the other network."""
    path, weights = sorted(copy.glob("sample_*.npz"))[0], copy / "weights.npz"
    header, arrays = read(weights)
    label = read(path)[0]["label"]
    arrays["head.weight"][label] *= 0.9
    save(weights, header, arrays)
    code, out, _ = run_checker(capsys, path)
    assert code == 1 and "another model" in out
    own, own_arrays = read(path)
    own["weights"]["sha256"] = checker.hash_arrays(arrays, header)
    save(path, own, own_arrays)
    code, out, _ = run_checker(capsys, path)
    assert code == 1 and "margin" in out


def test_hash_is_that_of_the_model(place, tmp_path):
    folder, net, x, labels = place
    assert read(folder / "weights.npz")[0]["model"]["architecture"] == "lstm"
    assert checker.read_weights(folder / "weights.npz")[2] == model_hash(net)
    changed = small_net("lstm", dtype=torch.float32)
    changed.rnn.weight_hh_l0.data[3, 2] = torch.nextafter(changed.rnn.weight_hh_l0[3, 2], torch.tensor(9.0))
    assert model_hash(changed) != model_hash(net)
    shutil.copytree(folder, tmp_path / "used")
    with pytest.raises(ValueError, match="another model"):
        save_certificates(tmp_path / "used", changed, x, labels, 1e-3)


def cut(path, header, arrays):
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path, header, arrays):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def text(path, header, arrays):
    path.write_text("no certificate")


def empty(path, header, arrays):
    path.write_bytes(b"")


def missing(path, header, arrays):
    path.unlink()


def single_array(path, header, arrays):
    with path.open("wb") as file:
        np.save(file, arrays["x"])


def pickled(path, header, arrays):
    save(path, header, arrays | {"x": np.array([{"a": 1}], dtype=object)})


def edit(**changes):
    def change(path, header, arrays):
        save(path, header | changes, arrays)

    return change


def set_array(name, value):
    def change(path, header, arrays):
        arrays[name] = value(arrays.get(name))
        save(path, header, arrays)

    return change


def with_nan(array):
    array = array.copy()
    array.flat[0] = np.nan
    return array


KEPT = "slopes.l0.forward.kept"
DAMAGES = {
    "cut": cut,
    "flipped": flipped,
    "text": text,
    "empty": empty,
    "missing": missing,
    "single array": single_array,
    "pickled": pickled,
    "version": edit(version=99),
    "format": edit(format=[]),
    "norm": edit(norm="3"),
    "ball": edit(ball=None),
    "clip": edit(clip=[0.0]),
    "clip with l_2": edit(clip=[-9.0, 9.0]),
    "label": edit(label=-1),
    "label too large": edit(label=7),
    "label a bool": edit(label=True),
    "no targets": edit(targets=[]),
    "label as target": edit(targets=[0, 1, 2]),
    "weights elsewhere": edit(weights={"file": "../weights.npz", "sha256": ""}),
    "no weights": edit(weights={"file": "none.npz", "sha256": ""}),
    "x shape": set_array("x", lambda x: x[:, :-1]),
    "x infinite": set_array("x", lambda x: x + np.inf),
    "x huge": set_array("x", lambda x: x + 1e200),
    "eps negative": set_array("eps", lambda eps: -eps),
    "eps shape": set_array("eps", lambda eps: eps[:1]),
    "slopes NaN": set_array(KEPT, with_nan),
    "slopes shape": set_array(KEPT, lambda s: s[:1]),
    "slopes of integers": set_array(KEPT, lambda s: s.astype(np.int64)),
    "intercepts": set_array("intercepts.l0.forward.kept", lambda _: np.zeros((3, 2, 5))),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_end_in_one_line(name, copy, capsys):
    path = sorted(copy.glob("sample_*.npz"))[0]
    DAMAGES[name](path, *read(path))
    code, out, err = run_checker(capsys, path)
    assert code == 2 and out == "", (out, err)
    assert err.startswith(f"error: {path}: ") and err.count("\n") == 1


def no_activation(path, header, arrays):
    del header["model"]["activation"]
    save(path, header, arrays)


@pytest.mark.parametrize(
    "damage", [cut, text, edit(model={}), no_activation, set_array("std", np.zeros_like), set_array("h0", with_nan)]
)
def test_damaged_weights_end_in_one_line(damage, copy, capsys):
    damage(copy / "weights.npz", *read(copy / "weights.npz"))
    code, out, err = run_checker(capsys, sorted(copy.glob("sample_*.npz"))[0])
    assert code == 2 and out == "" and "its weights" in err and err.count("\n") == 1


def of_model(**changes):
    """Damage to a weights file: other values in its model."""

    def damage(path, header, arrays):
        header["model"].update(changes)
        save(path, header, arrays)

    return damage


WRONG = ([], {}, [1], "", 1.5, True, None, -1, 10**30, "\ud800", [[[]]])


def test_headers_of_wrong_types_end_in_one_line(copy, capsys):
    for file in ("sample_*.npz", "weights.npz"):
        path = sorted(copy.glob(file))[0]
        header, arrays = read(path)
        before = path.read_bytes()
        table = header.get("model", header)
        for key in sorted(set(table) - {"method", "relaxation"}):
            kept = table[key]
            for value in WRONG:
                if value == kept or (key, value) in (("clip", None), ("targets", [1])):
                    continue
                table[key] = value
                save(path, header, arrays)
                code, out, err = run_checker(capsys, sorted(copy.glob("sample_*.npz"))[0])
                assert code in (1, 2) and (out + err).count("\n") == 1, (key, value, out, err)
            table[key] = kept
        path.write_bytes(before)


@pytest.mark.parametrize("value", [[], 3, "text", None])
def test_a_header_that_is_no_table(value, copy, capsys):
    path = sorted(copy.glob("sample_*.npz"))[0]
    save(path, value, read(path)[1])
    assert run_checker(capsys, path)[0] == 2


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("sample", set_array("x", lambda x: np.zeros((10**5, 4), np.float32))),
        ("sample", set_array(KEPT, lambda slopes: np.zeros((3, 2, 1, 10**6), np.float32))),
        ("weights", of_model(num_layers=999_999)),
        ("weights", of_model(hidden_size=999_999, num_classes=999_999)),
        ("weights", set_array("head.weight", lambda weight: np.zeros((3000, 3000)))),
        ("weights", lambda path, header, arrays: save(path, header | {"padding": "a" * 2**21}, arrays)),
    ],
)
def test_sizes_are_checked_before_anything_is_unpacked(file, damage, copy, capsys, monkeypatch):
    path = sorted(copy.glob("sample_*.npz"))[0]
    damaged = path if file == "sample" else copy / "weights.npz"
    damage(damaged, *read(damaged))
    unpacked = []
    monkeypatch.setattr(checker, "MAX_BYTES", 10**7)
    own = checker.read_array
    monkeypatch.setattr(checker, "read_array", lambda archive, entry: unpacked.append(entry) or own(archive, entry))
    code, _, err = run_checker(capsys, path)
    assert code == 2 and err.count("\n") == 1
    assert all(entry.file_size < 10**6 for entry in unpacked)


def test_entries_that_lie_about_their_size(copy, capsys):
    path = sorted(copy.glob("sample_*.npz"))[0]
    header, arrays = read(path)
    arrays.pop("x")
    save(path, header, arrays)
    with zipfile.ZipFile(path, "a") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (3, 10**8)})
        file.write(bytes(1000))
    code, _, err = run_checker(capsys, path)
    assert code == 2 and "x.npy is cut or padded" in err


def test_folders_and_exit_codes(copy, tmp_path, capsys):
    code, out, err = run_checker(capsys, copy)
    count = len(list(copy.glob("sample_*.npz")))
    assert code == 0 and out.count("confirmed: ") == count and f"{count} confirmed, 0 rejected" in out
    (copy / "sample_bad.npz").write_text("bad")
    assert run_checker(capsys, copy)[0] == 2
    (tmp_path / "empty").mkdir()
    code, out, err = run_checker(capsys, tmp_path / "empty")
    assert code == 2 and err.count("\n") == 1


# --- rigour ---------------------------------------------------------------------------------------------------------


def mp_sigmoid(y):
    return 1 / (1 + mpmath.exp(-y))


FUNCTIONS = {
    "x*sigmoid(y)": (lambda x, y: x * mp_sigmoid(y), checker.gate_intercept),
    "tanh(x)*sigmoid(y)": (lambda x, y: mpmath.tanh(x) * mp_sigmoid(y), checker.tanh_gate_intercept),
}


def boxes(count, seed):
    """Boxes of many sizes, narrow and degenerate ones among them, and slopes of which many can touch."""
    generator = np.random.default_rng(seed)
    scale = 10.0 ** generator.uniform(-3, 1.3, (2, count))
    ends = np.sort(scale[:, None] * generator.normal(size=(2, 2, count)), axis=1)
    ends[:, 1, ::7] = ends[:, 0, ::7]
    ends[0, 1, 1::7] = ends[0, 0, 1::7]
    slopes = generator.normal(size=(2, count)) * 10.0 ** generator.uniform(-3, 0.3, (2, count))
    slopes[0, ::2], slopes[1, ::2] = generator.uniform(0, 1, slopes[0, ::2].shape), -generator.uniform(0, 0.3, 1)
    return (*slopes, *ends[0], *ends[1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gate_intercepts_are_below_and_tight(name):
    function, intercept = FUNCTIONS[name]
    numbers = boxes(60, seed=3)
    found = intercept(*numbers)
    for (a, b, lx, ux, ly, uy), c in zip(np.stack(numbers, axis=1).tolist(), found.tolist(), strict=True):
        for i in range(6):
            for j in range(6):
                x, y = lx + (mpmath.mpf(ux) - lx) * i / 5, ly + (mpmath.mpf(uy) - ly) * j / 5
                assert function(x, y) >= mpmath.mpf(a) * x + mpmath.mpf(b) * y + c
    a, b, lx, ux, ly, uy = (torch.from_numpy(v) for v in boxes(4000, seed=4))
    slopes = ((a, b), (a, b))
    exact = relax_product(name, (lx, ux), (ly, uy), slopes=slopes).lower.intercept.numpy()
    loss = exact - intercept(*(v.numpy() for v in (a, b, lx, ux, ly, uy)))
    assert loss.max() < 1e-7 and loss.min() > -1e-12


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_line_intercepts_are_below_and_tight(name):
    a, _, low, high, _, _ = boxes(2000, seed=6)
    function, intercept, relax = {
        "tanh": (mpmath.tanh, checker.tanh_intercept, relax_tanh),
        "relu": (lambda y: max(y, mpmath.mpf(0)), checker.relu_intercept, relax_relu),
    }[name]
    c = intercept(a, low, high)
    for k in range(0, 200):
        for i in range(9):
            y = low[k] + (mpmath.mpf(high[k]) - low[k]) * i / 8
            assert function(y) >= mpmath.mpf(a[k]) * y + c[k]
    slopes = (torch.from_numpy(a), torch.from_numpy(a))
    exact = relax(torch.from_numpy(low), torch.from_numpy(high), slopes)
    loss = exact.lower.intercept.numpy() - c
    assert abs(loss).max() < 1e-12
    if name == "relu":
        assert abs(exact.upper.intercept.numpy() + checker.relu_intercept(-a, low, high, -1.0)).max() < 1e-12


def test_sigmoid_is_as_exact_as_stated():
    y = np.concatenate([np.linspace(-40, 40, 400), 10.0 ** np.linspace(-12, 2.5, 100)])
    for point, value in zip(y.tolist(), checker.sigmoid(y).tolist(), strict=True):
        exact = mp_sigmoid(mpmath.mpf(point))
        assert abs(value - exact) <= checker.SIGMOID_ERROR * exact
    low, high = checker.tanh_range(y, y)
    for point, below, above in zip(y.tolist(), low.tolist(), high.tolist(), strict=True):
        assert below <= mpmath.tanh(point) <= above <= below + 1e-13


def exact_margin(net, x, label, target):
    """The margin of one sequence over the reals, in high precision."""

    def matrix(tensor):
        return mpmath.matrix(tensor.double().tolist())

    rnn, hidden = net.rnn, net.rnn.hidden_size
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    w_ih, w_hh, b_ih, b_hh = (matrix(getattr(rnn, f"{name}_l0")) for name in names)
    h = c = mpmath.zeros(hidden, 1)
    mean, std = (value.double().expand(INPUTS).tolist() for value in (net.mean, net.std))
    for frame in x.double().tolist():
        u = mpmath.matrix([(mpmath.mpf(v) - m) / mpmath.mpf(s) for v, m, s in zip(frame, mean, std, strict=True)])
        left, right = w_ih * u + b_ih, w_hh * h + b_hh
        count = len(left) // hidden
        part = [[list(v)[k * hidden : (k + 1) * hidden] for v in (left, right)] for k in range(count)]
        gates = [[a + b for a, b in zip(*sides, strict=True)] for sides in part]
        if isinstance(rnn, nn.LSTM):
            i, f, g, o = gates
            c = mpmath.matrix([mp_sigmoid(f[k]) * c[k] + mp_sigmoid(i[k]) * mpmath.tanh(g[k]) for k in range(hidden)])
            h = mpmath.matrix([mp_sigmoid(o[k]) * mpmath.tanh(c[k]) for k in range(hidden)])
        elif isinstance(rnn, nn.GRU):
            r, z = gates[:2]
            n = [mpmath.tanh(part[2][0][k] + mp_sigmoid(r[k]) * part[2][1][k]) for k in range(hidden)]
            h = mpmath.matrix([mp_sigmoid(-z[k]) * n[k] + mp_sigmoid(z[k]) * h[k] for k in range(hidden)])
        else:
            act = mpmath.tanh if rnn.nonlinearity == "tanh" else lambda y: max(y, mpmath.mpf(0))
            h = mpmath.matrix([act(y) for y in gates[0]])
    logits = matrix(net.head.weight) * h + matrix(net.head.bias)
    return logits[label] - logits[target]


def rigorous(net, x, label, target, eps, tmp_path, slopes=True):
    """The checker's margin, whatever its sign."""
    problem = margin_problem(net, x[None], torch.tensor([label]), targets=torch.tensor([target]))
    tmp_path.mkdir(exist_ok=True)
    write_npz(tmp_path / "weights.npz", *describe_model(net))
    model, weights, _ = checker.read_weights(tmp_path / "weights.npz")
    graph = problem.graph(torch.float64)
    bounds = BoundPass(graph, Perturbation(x[None].double(), torch.full((1, FRAMES), eps).double()))
    found = {name: value[0].numpy() for name, value in collect_hints(net, bounds).items()}
    keyed = {}
    for name, value in found.items():
        _, layer, direction, operation = name.split(".")
        keyed[int(layer[1:]), direction, operation] = value
    certificate = {"norm": 2.0, "ball": "frame", "clip": None, "x": x.double().numpy()}
    certificate |= {"eps": np.full(FRAMES, eps), "label": label, "targets": [target], "slopes": keyed if slopes else {}}
    return float(checker.rigorous_margins(model, weights, certificate)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_error_terms_pay_for_all_rounding(kind, tmp_path, monkeypatch):
    """With an eps below the last bit, nothing is between the bound and the true margin but rounding."""
    unsound, losses = 0, []
    for seed in range(4):
        net = small_net(kind, seed=seed, mean=0.1, std=0.3)
        x, _ = batch_of(net, count=1, seed=seed)
        for slopes in (True, False):
            value = rigorous(net, x[0], 0, 1, 1e-22, tmp_path / str(seed), slopes)
            exact = exact_margin(net, x[0], 0, 1)
            assert value <= exact
            losses.append(float(exact - value))
            with monkeypatch.context() as patch:  # without the error terms it would not be so, every now and then
                patch.setattr(checker, "gamma", lambda n: 0.0)
                for name in ("U", "VALUE_ERROR", "SIGMOID_ERROR", "TINY"):
                    patch.setattr(checker, name, 0.0)
                patch.setattr(checker.np, "nextafter", lambda a, b: a)
                try:
                    unsound += rigorous(net, x[0], 0, 1, 1e-22, tmp_path / str(seed), slopes) > exact
                except checker.Rejected:  # two bounds of a node contradict each other
                    unsound += 1
    assert max(losses) < 1e-10
    assert unsound > 0


# --- the bound scripts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["rnn", "gru"])
def test_bound_script_writes_certificates(architecture, tmp_path):
    place = make_place(tmp_path, architecture)
    assert place.bound("--save-certificate", "--p", "inf", "--clip", "--untargeted").code == 0
    folder = place.folder("inf_norm_bound_untargeted_clip_crown" + "_plane" * (architecture == "gru"))
    rows = place.rows(folder.name)
    names = {f"sample_{row.index:05d}.npz" for row in rows if row.radius > 0}
    assert {path.name for path in (folder / "certificates").glob("sample_*")} == names and len(names) > 1
    result = run_script("scripts/check_certificate.py", folder / "certificates", cwd=tmp_path)
    assert result.returncode == 0 and f"{len(names)} confirmed" in result.stdout, result.stdout + result.stderr
    eps = read(folder / "certificates" / f"sample_{rows[0].index:05d}.npz")[1]["eps"]
    assert eps.tolist() == [rows[0].radius] * len(eps)
    assert place.bound("--p", "inf", "--clip", "--untargeted", "--N", IMAGES - 1, "--overwrite").code == 0
    assert not (folder / "certificates").exists()  # they belonged to the rows that were replaced


def test_bound_script_per_frame_and_resumed(tmp_path):
    place = make_place(tmp_path)
    flags = ("--save-certificate", "--per-frame")
    assert place.bound(*flags).code == 0
    folder = place.folder("2_norm_bound_per_frame_crown")
    certificates = {path.name: path.read_bytes() for path in (folder / "certificates").iterdir()}
    lines = (folder / "certified_bound.csv").read_text().splitlines(keepends=True)
    (folder / "certified_bound.csv").write_text("".join(lines[:7]))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert place.bound(*flags, "--resume").code == 0
    assert {path.name for path in (folder / "certificates").iterdir()} == set(certificates)
    assert checker.check(sorted((folder / "certificates").glob("*_frame_2.npz"))[0])[0]["eps"].tolist().count(0.0) == 3


def test_nothing_is_written_for_what_is_not_certified(tmp_path):
    net = small_net("gru")
    x, labels = batch_of(net)
    assert save_certificates(tmp_path / "none", net, x, labels, 0.0) == []
    assert save_certificates(tmp_path / "none", net, x, labels, 1e3) == []
    radius = certified_radius(net, x, labels)
    wrong = (labels + 1) % CLASSES
    assert save_certificates(tmp_path / "none", net, x, wrong, radius) == []
    names = save_certificates(tmp_path / "some", net, x, labels, radius * torch.tensor([1.0, 0.0, 1.0]), names="abc")
    assert [path.name for path in names] == ["sample_a.npz", "sample_c.npz"]
    with pytest.raises(ValueError, match="eps"):
        save_certificates(tmp_path, net, x, labels, radius[:2])


def test_slack_of_the_search_leaves_room_for_the_checker():
    """The engine counts a margin below its slack as none; the checker's error terms must be smaller than that."""
    assert SLACK[torch.float64] > 1e3 * checker.gamma(800)
