"""Products of operator norms: above singular values and samples, and hardly so."""

from __future__ import annotations

import pytest
import torch
from helpers import Threat, check_below, normal, random_points
from nets import NETS, frames_of, gated, gradients_of, jacobian_of

from utils.certify import certified_margin, certified_radius
from utils.graph import Graph
from utils.graph.nodes import Node
from utils.jacobian.operator_norms import NormPass, operator_norm
from utils.jacobian.shells import SpectralPass
from utils.perturbation.lp_ball import INF, dual_norm
from utils.question import margin_rows

ROWS = margin_rows(torch.arange(3), 3).double()
SHAPES = ((1, 1), (3, 3), (2, 7), (9, 4), (40, 30))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def check_norm(weight, norm, bound) -> None:
    """Fail unless ||W^T a||_q <= bound ||a||_q, for many a and the worst one."""
    ends = {1.0: torch.eye(len(weight)), INF: torch.eye(len(weight))}.get(norm)
    vectors = torch.linalg.svd(weight.double()).U.T if norm == 2.0 else ends.double()
    signs = weight.double().sign().T  # in l_inf the worst of the dual, l_1 there, is a column's signs
    for a in (vectors, signs, normal(20, len(weight), seed=3)):
        check_below(dual_norm(a @ weight.double(), norm), bound.double() * dual_norm(a, norm), "norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_operator_norms_are_norms_and_nothing_above(norm, dtype):
    for shape in SHAPES:
        for scale in (1.0, 1e-6, 1e6):
            weight = (scale * normal(*shape, seed=sum(shape))).to(dtype)
            bound = operator_norm(weight, norm)
            exact = torch.linalg.matrix_norm(weight.double(), {1.0: 1, 2.0: 2, INF: torch.inf}[norm])
            assert exact <= bound.double() <= exact * (1.0 + (1e-3 if dtype == torch.float32 else 1e-9))
            check_norm(weight, norm, bound)


def test_the_norm_of_the_other_side_is_noticed():
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -6.0]]).double()
    for norm, other in ((1.0, INF), (INF, 1.0)):
        check_norm(weight, norm, operator_norm(weight, norm))
        if operator_norm(weight, other) < operator_norm(weight, norm):
            with pytest.raises(AssertionError, match="above value"):
                check_norm(weight, norm, operator_norm(weight, other))
    assert operator_norm(weight, 1.0) < operator_norm(weight, INF)  # so that one of the two is too small


def test_no_matrix_is_above_its_norm_where_rank_is_low():
    column, row = normal(30, 1, seed=1), normal(1, 20, seed=2)
    for weight in (column @ row, torch.zeros(4, 3).double(), 1e-200 * normal(4, 3, seed=1)):
        assert operator_norm(weight, 2.0) >= torch.linalg.matrix_norm(weight, 2) * (1.0 - 1e-12)


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
@pytest.mark.parametrize("name", NETS)
def test_norms_of_all_adjoints_hold(name, norm):
    """At the points of the set, of what the gradient is made of; with known intervals and without."""
    graph = NETS[name]()
    threat = Threat(norm)
    x = 0.5 * normal(3, frames_of(graph), 3, seed=50)
    eps = torch.full(x.shape[:2], 0.4).double()
    jacobian = jacobian_of(graph, threat, x, eps, ROWS[:, :1])
    known, free = (NormPass(norm, bounds, graph) for bounds in (jacobian, None))
    points = random_points(x, eps, threat, 6, 2)
    found: dict[Node, list] = {node: [] for node in jacobian.adjoint.of.values()}
    for point in points:
        for node, value in zip(jacobian.graph.nodes, values_at(jacobian.graph, point), strict=True):
            if node in found:
                found[node].append(dual_norm(value, norm))
    for node, sizes in found.items():
        for norms in (known, free):
            check_below(torch.stack(sizes), norms(node).expand(3), "norm of an adjoint")
            product = norms.by_product(node)
            assert not product.isnan().any()
            check_below(torch.stack(sizes), product.expand(3).clamp(max=1e9), "norm by a product")


def values_at(graph: Graph, point) -> list:
    values = []
    for node in graph.nodes:
        parents = [values[parent.index] for parent in node.parents]
        values.append(point[:, node.frame] if not parents and hasattr(node, "frame") else node.value(*parents))
    return values


# --- spectral margins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [Threat(n, b) for n in (1.0, 2.0, INF) for b in ("frame", "sequence")], ids=str)
@pytest.mark.parametrize("name", ["relu", "two layers, mean", "perceptron, sigmoid", "perceptron, leaky_relu(0.2)"])
def test_spectral_margins_hold(name, threat):
    graph = NETS[name]()
    x = 0.5 * normal(3, frames_of(graph), 3, seed=50)
    eps = torch.tensor([[0.1], [0.0], [0.5]]).double().expand(3, x.shape[1])
    margins = SpectralPass(graph, threat.around(x, eps)).margin(ROWS)
    clean = torch.einsum("brc,bc->br", ROWS, graph.evaluate(x))
    torch.testing.assert_close(margins[1], clean[1])
    for point in random_points(x, eps, threat, 12, 4):
        check_below(margins, torch.einsum("brc,bc->br", ROWS, graph.evaluate(point)), "spectral margin")
        lengths = dual_norm(gradients_of(graph, point, ROWS), threat.norm)
        deviation = threat.around(x, eps).total_deviation(list((eps[:, None] * lengths).unbind(-1)))
        check_below(deviation, clean - margins, "spectral fall")


def test_gates_have_no_global_constant():
    """The derivative of x * sigmoid(y) in y grows with x: nothing is certified, and nothing is NaN."""
    model = gated(torch.nn.LSTM)
    x = 0.5 * normal(3, 3, 3, seed=50)
    labels = model(x).argmax(dim=1)
    margins = certified_margin(model, x, labels, torch.tensor([0.1, 0.0, 0.2]), method="spectral")
    assert not margins.isnan().any() and not (margins[::2] > 0).any() and (margins[1] > 0).all()
    assert (certified_radius(model, x, labels, method="spectral") == 0).all()
