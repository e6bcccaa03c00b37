"""Strategies for hypothesis: small problems whose hypergradients are known, trees, operators, measures, coordinates.

Numbers are drawn as short decimals and shapes from 1 to 3, so that examples shrink towards ones a person can read.
Arrays are float64 where x64 is on, else float32. Data are leaves: cases of one shape share a compilation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

import bilevel

from . import _exact as exact


class Case(NamedTuple):
    """A bilevel problem with a point x, a start y0 and its hypergradient at x, known to round-off."""

    problem: bilevel.BilevelProblem
    x: Any
    y0: Any
    hypergradient: Any


class Measure(NamedTuple):
    """A weighted point cloud: `points` (n, d), `weights` (n,), positive, of sum 1."""

    points: jax.Array
    weights: jax.Array


class Coupling(NamedTuple):
    """A coupling: `plan` (n, m), nonnegative, of sum 1, and its marginals `a` (n,) and `b` (m,), positive."""

    plan: jax.Array
    a: jax.Array
    b: jax.Array


def _dtype():
    return jnp.result_type(float)


def _array(a) -> jax.Array:
    return jnp.asarray(np.asarray(a, np.float64), _dtype())


def _rounded(*arrays) -> list[jax.Array]:
    """Arrays in the dtype in use; references are computed from these, so that rounding is no error."""
    return [_array(a) for a in arrays]


def _decimals(low: float | int, high: float | int) -> st.SearchStrategy[float]:
    """Short decimals; 0 is the simplest where it is allowed."""
    return st.integers(round(10 * low), round(10 * high)).map(lambda k: k / 10)


def _vectors(n: int, low: float | int = -2, high: float | int = 2) -> st.SearchStrategy[np.ndarray]:
    return st.lists(_decimals(low, high), min_size=n, max_size=n).map(np.asarray)


def _matrices(n: int, m: int, low: float | int = -2, high: float | int = 2) -> st.SearchStrategy[np.ndarray]:
    return _vectors(n * m, low, high).map(lambda v: v.reshape(n, m))


_SIZES = st.integers(1, 3)


# ------------------------------------------------------------------------------------------------ operators, trees


def _spd(n: int, cond: float | int) -> st.SearchStrategy[np.ndarray]:
    """Eigenvalues from 1 down to 1 / cond, turned by a reflection."""

    def build(v):
        square = float(v @ v)
        reflection = np.eye(n) - (2 * np.outer(v, v) / square if square > 0 else 0)
        values = cond ** -np.linspace(0, 1, n) if n > 1 else np.ones(1)
        a = reflection @ np.diag(values) @ reflection
        return (a + a.T) / 2

    return _vectors(n).map(build)


def spd_operators(cond: float | int = 10.0, *, size: int | None = None) -> st.SearchStrategy[Any]:
    """Symmetric positive definite lineax operators of condition number `cond`, largest eigenvalue 1, size 1 to 3 or
    `size`; shrinks to a diagonal one."""
    if not cond >= 1:
        raise ValueError(f"bilevel.testing.spd_operators: cond must be at least 1, found {cond}.")
    sizes = _SIZES if size is None else st.just(size)
    return sizes.flatmap(lambda n: _spd(n, cond)).map(
        lambda a: lx.MatrixLinearOperator(_array(a), (lx.symmetric_tag, lx.positive_semidefinite_tag))
    )


def pytrees(*, max_leaves: int = 3) -> st.SearchStrategy[Any]:
    """Trees of floating arrays: an array, or dicts, tuples and lists of them, with at least one number in all."""
    shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
    leaves = shapes.flatmap(
        lambda shape: _vectors(int(np.prod(shape, dtype=int))).map(lambda v: _array(v.reshape(shape)))
    )

    def grow(children):
        some = st.lists(children, min_size=1, max_size=2)
        return some.map(tuple) | some | st.dictionaries(st.sampled_from("ab"), children, min_size=1, max_size=2)

    return st.recursive(leaves, grow, max_leaves=max_leaves)


# ------------------------------------------------------------------------------------------------ problems


class _Quadratic(eqx.Module):
    A: Any
    B: Any
    b: Any

    def __call__(self, x, y):
        bowl = 0.5 * jnp.vdot(y, self.A @ y) + 0.5 * jnp.sum(jnp.exp(x) * y**2)
        return bowl - jnp.vdot(self.b + self.B @ x, y)


class _LeastSquares(eqx.Module):
    C: Any
    c: Any
    d: Any
    rho: Any

    def __call__(self, x, y):
        r = self.C @ y - self.c
        return 0.5 * jnp.vdot(r, r) + jnp.vdot(self.d * x, y) + 0.5 * self.rho * jnp.vdot(x, x)


_LOSSES = (
    lambda z, b: jax.nn.softplus(-b * z),
    lambda z, b: jnp.exp(z) - b * z,
    lambda z, b: jnp.sqrt(1 + (z - b) ** 2) - 1,
)


class _Loss(eqx.Module):
    """The mean loss; the family is data, so that all families of one shape share a compilation."""

    X: Any
    b: Any
    kind: Any

    def __call__(self, x, y):
        return jnp.mean(jax.lax.switch(self.kind, _LOSSES, self.X @ y, self.b))


class _Penalized(eqx.Module):
    loss: _Loss

    def __call__(self, x, y):
        return self.loss(x, y) + jnp.sum(jnp.exp(x) * y**2) / (2 * y.shape[0])


class _Tanh(eqx.Module):
    W: Any

    def __call__(self, x, y):
        return jnp.tanh(self.W @ y + x)


@st.composite
def _outer(draw, n: int):
    parts = draw(_matrices(n, n)), draw(_vectors(n)), draw(_vectors(n, -1, 1)), draw(_decimals(0, 1))
    return _rounded(*parts)


@st.composite
def _quadratic_problems(draw, cond: float | int, size: int | None):
    n = draw(_SIZES) if size is None else size
    A, B, b, x = _rounded(draw(_spd(n, cond)), draw(_matrices(n, n, -1, 1)), draw(_vectors(n)), draw(_vectors(n)))
    C, c, d, rho = draw(_outer(n))
    truth = exact.quadratic(A, B, b, exact.least_squares(C, c, d, rho), x)
    problem = bilevel.BilevelProblem(bilevel.Minimization(_Quadratic(A, B, b)), _LeastSquares(C, c, d, rho))
    return Case(problem, x, jnp.zeros_like(b), _array(truth))


def quadratic_problems(*, cond: float | int = 10.0, size: int | None = None) -> st.SearchStrategy[Case]:
    """f = y'(A + diag e^x) y / 2 - (b + B x)'y with A of condition number `cond`, and an outer least-squares function
    coupled to x. The hypergradient is the closed form in fifty digits."""
    return _quadratic_problems(cond, size)


@st.composite
def _glm_problems(draw, size: int | None):
    n = draw(_SIZES) if size is None else size
    kind = draw(st.integers(0, 2))
    rows = n + 2
    target = {
        0: st.lists(st.sampled_from([1.0, -1.0]), min_size=rows, max_size=rows).map(np.asarray),
        1: st.lists(st.integers(0, 3).map(float), min_size=rows, max_size=rows).map(np.asarray),
        2: _vectors(rows),
    }[kind]
    X, b, X_val, b_val, x = _rounded(
        draw(_matrices(rows, n)), draw(target), draw(_matrices(rows, n)), draw(target), draw(_vectors(n))
    )
    family = jnp.asarray(kind)
    truth = exact.glm(X, b, kind, exact.validation(X_val, b_val, kind), x)
    inner = bilevel.Minimization(_Penalized(_Loss(X, b, family)))
    return Case(bilevel.BilevelProblem(inner, _Loss(X_val, b_val, family)), x, jnp.zeros_like(x), _array(truth))


def glm_problems(*, size: int | None = None) -> st.SearchStrategy[Case]:
    """Logistic, Poisson and pseudo-Huber regressions with one log-penalty for each weight, and the mean loss on other
    data as outer function. The hypergradient is a dense solve at the solution, in fifty digits."""
    return _glm_problems(size)


@st.composite
def _fixed_points(draw, size: int | None):
    n = draw(_SIZES) if size is None else size
    raw = draw(_matrices(n, n))
    W, x = _rounded(0.8 * raw / max(1.0, float(np.max(np.sum(np.abs(raw), axis=1)))), draw(_vectors(n, -1, 1)))
    C, c, d, rho = draw(_outer(n))
    truth = exact.fixed_point(W, exact.least_squares(C, c, d, rho), x)
    problem = bilevel.BilevelProblem(bilevel.FixedPoint(_Tanh(W)), _LeastSquares(C, c, d, rho))
    return Case(problem, x, jnp.zeros_like(x), _array(truth))


def fixed_points(*, size: int | None = None) -> st.SearchStrategy[Case]:
    """y = tanh(W y + x), a contraction with a non-symmetric dF/dy. The hypergradient is a dense solve at the fixed
    point, in fifty digits."""
    return _fixed_points(size)


class _Bowl(eqx.Module):
    A: Any
    B: Any
    b: Any

    def __call__(self, x, y):
        return 0.5 * jnp.vdot(y, self.A @ y) - jnp.vdot(self.b + self.B @ x, y)


@st.composite
def _lasso_problems(draw, cond: float | int, size: int | None):
    n = draw(_SIZES) if size is None else size
    A, B, b, x = _rounded(
        draw(_spd(n, cond)), draw(_matrices(n, n, -1, 1)), draw(_vectors(n)), draw(_vectors(n, -2, 1))
    )
    C, c, d, rho = draw(_outer(n))
    truth, margin = exact.lasso(A, B, b, exact.least_squares(C, c, d, rho), x)
    assume(margin > 0.01)  # at the edge between two supports there is no hypergradient
    inner = bilevel.Composite(_Bowl(A, B, b), bilevel.prox.l1(jnp.exp))
    return Case(bilevel.BilevelProblem(inner, _LeastSquares(C, c, d, rho)), x, jnp.zeros_like(b), _array(truth))


def lasso_problems(*, cond: float | int = 10.0, size: int | None = None) -> st.SearchStrategy[Case]:
    """y'A y / 2 - (b + B x)'y + sum e^x_j |y_j| with A of condition number `cond`, clear of the edges between supports.
    The hypergradient is that on the support, found by trying all signs, in fifty digits."""
    return _lasso_problems(cond, size)


# ------------------------------------------------------------------------------------------------ transport


def _weights(n: int, low: int = 1) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(low, 5), min_size=n, max_size=n).map(lambda v: np.asarray(v) / max(sum(v), 1))


def measures(*, dimension: int | None = None, size: int | None = None) -> st.SearchStrategy[Measure]:
    """Weighted point clouds: 1 to 4 points (or `size`) in 1 to 3 dimensions (or `dimension`); shrinks to equal
    weights."""
    sizes = st.integers(1, 4) if size is None else st.just(size)
    dimensions = _SIZES if dimension is None else st.just(dimension)

    def build(shape):
        n, d = shape
        return st.builds(lambda p, w: Measure(_array(p), _array(w)), _matrices(n, d), _weights(n))

    return st.tuples(sizes, dimensions).flatmap(build)


def couplings(*, shape: tuple[int, int] | None = None) -> st.SearchStrategy[Coupling]:
    """Couplings of 1 to 3 by 1 to 3 points (or `shape`) with positive marginals; entries may be zero."""
    shapes = st.tuples(_SIZES, _SIZES) if shape is None else st.just(shape)

    def build(shape):
        n, m = shape
        entries = st.lists(st.integers(0, 5), min_size=n * m, max_size=n * m)

        def finish(v):
            p = np.asarray(v, float).reshape(n, m)
            for i in range(max(n, m)):
                p[i % n, i % m] += 1
            p = p / p.sum()
            return Coupling(_array(p), _array(p.sum(1)), _array(p.sum(0)))

        return entries.map(finish)

    return shapes.flatmap(build)


# ------------------------------------------------------------------------------------------------ coordinates


class _Affine(eqx.Module):
    """y = s z exp(t tanh(sum x)) + u tanh(sum x)."""

    s: Any
    t: Any
    u: Any

    def _numbers(self, x):
        total = jnp.tanh(sum((jnp.sum(a) for a in jax.tree.leaves(x)), jnp.zeros((), self.s.dtype)))
        return self.s * jnp.exp(self.t * total), self.u * total


class _Forward(eqx.Module):
    affine: _Affine
    bent: Any  # 0: none, else y = sinh(bent w) / bent of the affine image w

    def __call__(self, x, z):
        scale, shift = self.affine._numbers(x)
        return jax.tree.map(lambda a: jnp.sinh(self.bent * (scale * a + shift)) / self.bent, z)


class _Inverse(eqx.Module):
    affine: _Affine
    bent: Any

    def __call__(self, x, y):
        scale, shift = self.affine._numbers(x)
        return jax.tree.map(lambda a: (jnp.arcsinh(self.bent * a) / self.bent - shift) / scale, y)


def reparametrizations() -> st.SearchStrategy[bilevel.Reparametrization]:
    """Maps y = sinh(c w) / c, w = s z exp(t tanh(sum x)) + u tanh(sum x), of every structure of x and y (float trees
    of one dtype), invertible everywhere and different at every x."""

    def build(s, t, u, c):
        affine = _Affine(*_rounded(s, t, u))
        bent = _array(c)
        return bilevel.Reparametrization(_Forward(affine, bent), _Inverse(affine, bent))

    return st.builds(build, _decimals(0.5, 2), _decimals(-1, 1), _decimals(-1, 1), _decimals(0.1, 1))
