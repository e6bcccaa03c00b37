"""Point clouds in blocks against the same problem with its matrix."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from problems.transport import EntropicOT, PointCloudCost, UnbalancedOT, clouds

RNG = np.random.default_rng(2)
N, M, D = 7, 5, 2
X, Y = RNG.normal(size=(N, D)), RNG.normal(size=(M, D))
A, B = RNG.uniform(0.5, 1.5, size=N), RNG.uniform(0.5, 1.5, size=M)
A, B = A / A.sum(), B / B.sum()
W = RNG.normal(size=(N, M))
EPSILON = 0.8


def network(x, p, q):
    return jnp.sum(jnp.square(jnp.tanh(x @ p) - jnp.tanh(x @ q)))


KINDS = {
    "sqeuclidean": ("sqeuclidean", jnp.zeros(()), lambda x, p, q: jnp.sum((p - q) ** 2)),
    "bilinear": ("bilinear", jnp.asarray(RNG.normal(size=(D, D))), lambda x, p, q: -(p @ x @ q)),
    "mahalanobis": ("mahalanobis", jnp.asarray(RNG.normal(size=(3, D))), lambda x, p, q: jnp.sum((x @ (p - q)) ** 2)),
    "function": (network, jnp.asarray(RNG.normal(size=(4, D))), network),
}


def everything(x, points, cost, tau):
    """Value, marginals, a product and a function of the potentials, at the solution."""
    X, Y = points
    b = jnp.asarray(B if tau is None else 1.3 * B)
    make = (lambda c: EntropicOT(c, A, b, EPSILON)) if tau is None else (lambda c: UnbalancedOT(c, A, b, EPSILON, tau))
    ot = make(cost(X, Y))
    y = bilevel.solve(ot, x, ot.initial()).y
    rows, columns = ot.marginals(x, y)
    sums = jnp.sum(jnp.cos(rows)) + jnp.sum(columns**2)
    return jnp.stack([ot.value(x, y), sums, jnp.sum(ot.apply(x, y, Y) ** 2), jnp.sum(W * ot.coupling(x, y))])


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "tau"),
    [
        ("bilinear", None),
        *(pytest.param(kind, None, marks=pytest.mark.slow) for kind in KINDS if kind != "bilinear"),
        pytest.param("mahalanobis", (0.5, 2.0), marks=pytest.mark.slow),
    ],
)
def test_blocks_are_the_matrix(name, tau, monkeypatch):
    """Values and gradients, in x and in the points; five rows do not divide into blocks of two."""
    monkeypatch.setattr(clouds, "_ENTRIES", 2 * M)
    kind, x, pair = KINDS[name]
    by_blocks = lambda X, Y: PointCloudCost(X, Y, kind)
    by_matrix = lambda X, Y: lambda x: jax.vmap(lambda p: jax.vmap(lambda q: pair(x, p, q))(Y))(X)
    points = (jnp.asarray(X), jnp.asarray(Y))

    def both(cost):
        value = everything(x, points, cost, tau)
        weights = jnp.asarray([1.0, 0.3, -0.2, 2.0])
        return value, jax.grad(lambda x, p: jnp.vdot(weights, everything(x, p, cost, tau)), (0, 1))(x, points)

    found, expected = (jax.jit(both, static_argnums=0)(cost) for cost in (by_blocks, by_matrix))
    for u, v in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(u, v, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(by_blocks(*points)(x), by_matrix(*points)(x), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_weight_of_zero_in_blocks(monkeypatch):
    monkeypatch.setattr(clouds, "_ENTRIES", 2 * M)
    a = np.append(A, 0.0)
    ot = EntropicOT(PointCloudCost(np.vstack([X, [[9.0, 9.0]]]), Y), a, B, EPSILON)
    y = bilevel.solve(ot, jnp.zeros(()), ot.initial()).y
    small = EntropicOT(PointCloudCost(X, Y), A, B, EPSILON)
    z = bilevel.solve(small, jnp.zeros(()), small.initial()).y
    np.testing.assert_allclose(ot.coupling(0.0, y)[:N], small.coupling(0.0, z), rtol=1e-8)
    np.testing.assert_allclose(ot.coupling(0.0, y)[N], 0, atol=0)


@pytest.mark.slow
def test_memory_stays_linear():
    """A hypergradient between 20,000 and 20,000 points compiles to less than 2 GiB (a matrix of them takes 3)."""
    n = 20_000
    points = jax.ShapeDtypeStruct((n, 3), jnp.float64)
    weights = np.full(n, 1 / n)

    def gradient(x, X, Y):
        ot = EntropicOT(PointCloudCost(X, Y, "mahalanobis"), weights, weights, 3.0)
        outer = lambda x, y: jnp.sum(ot.apply(x, y, Y) ** 2)
        return bilevel.hypergradient(bilevel.BilevelProblem(ot, outer), x, ot.initial(), throw=False).gradient

    compiled = jax.jit(gradient).lower(jnp.eye(3), points, points).compile()
    memory = compiled.memory_analysis()
    assert memory is None or memory.temp_size_in_bytes < 2**31


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PointCloudCost(X[0], Y), "`X` must have two axes, found shape (2,)"),
        (lambda: PointCloudCost(X, np.nan * Y), "`Y` has 10 entries that are NaN"),
        (lambda: PointCloudCost(X, Y[:, :1]), "`X` has 2 coordinates, but `Y` has 1"),
        (lambda: PointCloudCost(X, Y, "cosine"), "`kind` must be one of sqeuclidean, bilinear, mahalanobis or a func"),
        (
            lambda: EntropicOT(PointCloudCost(X, Y), A[1:] / A[1:].sum(), B, 1.0),
            "`a` has 6 entries, but the cost's `X`",
        ),
        (
            lambda: bilevel.solve(ot := EntropicOT(PointCloudCost(X, Y, "bilinear"), A, B, 1.0), B, ot.initial()),
            "x must have shape (2, 2), that of A, found (5,)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
    with pytest.raises(TypeError, match="`kind` must be a word or a function"):
        PointCloudCost(X, Y, 3)
