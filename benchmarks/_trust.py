"""Hard cases for hypergradients, each with its true answer: what `tests/test_never_silently_wrong.py` runs.

A case says what is true (a closed form, or differences of solutions found by NumPy alone), how ours is called, what
may come out (the right number, a refusal, or either), and how a user of each peer would write it, at the peer's own
defaults or, where a peer has none, at tolerances of 1e-8.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel import prox

CASES: dict[str, Callable[[], Case]] = {}


@dataclass
class Case:
    """`ours()` gives the gradient or raises `NotConverged`; `may` lists what is allowed: "right" or a status word."""

    truth: Any
    ours: Callable[[], Any]
    may: tuple[str, ...] = ("right",)
    tolerance: float = 1e-6
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)


def case(name: str):
    """Lists a function that makes a case."""

    def add(make):
        CASES[name] = make
        return make

    return add


def outcome(call: Callable[[], Any], truth: Any) -> tuple[str, float]:
    """`("", relative error)` of a number, or `(what was said, nan)` of a refusal. A NaN counts as a refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = np.asarray(jax.block_until_ready(call()))
    except bilevel.NotConverged as error:
        return error.result.status.word, np.nan
    except Exception as error:  # whatever a peer raises is its way of refusing
        return type(error).__name__, np.nan
    if not np.all(np.isfinite(found)):
        return "nan", np.nan
    truth = np.asarray(truth)
    return "", float(np.linalg.norm(found - truth) / (np.linalg.norm(truth) or 1.0))


# ------------------------------------------------------------------------------------------------ peers


def _minimizers(f, g, x, y0) -> dict[str, Callable]:
    def with_jaxopt():
        import jaxopt

        solve = jaxopt.LBFGS(lambda y, x: f(x, y)).run
        return jax.grad(lambda x: g(x, solve(y0, x).params))(x)

    def with_optimistix():
        import optimistix

        def h(x):
            solver = optimistix.LBFGS(rtol=1e-8, atol=1e-8)
            return g(x, optimistix.minimise(lambda y, x: f(x, y), solver, y0, x, max_steps=5000).value)

        return jax.grad(h)(x)

    return {"jaxopt": with_jaxopt, "optimistix": with_optimistix}


def _root_finders(residual, g, x, y0) -> dict[str, Callable]:
    def with_jaxopt():
        import jaxopt

        solve = jaxopt.Broyden(lambda y, x: residual(x, y)).run
        return jax.grad(lambda x: g(x, solve(y0, x).params))(x)

    def with_optimistix():
        import optimistix

        def h(x):
            solver = optimistix.Newton(rtol=1e-8, atol=1e-8)
            return g(x, optimistix.root_find(lambda y, x: residual(x, y), solver, y0, x).value)

        return jax.grad(h)(x)

    return {"jaxopt": with_jaxopt, "optimistix": with_optimistix}


def _fixed_points(step, g, x, y0) -> dict[str, Callable]:
    def with_jaxopt():
        import jaxopt

        solve = jaxopt.AndersonAcceleration(lambda y, x: step(x, y)).run
        return jax.grad(lambda x: g(x, solve(y0, x).params))(x)

    def with_optimistix():
        import optimistix

        def h(x):
            solver = optimistix.FixedPointIteration(rtol=1e-8, atol=1e-8)
            return g(x, optimistix.fixed_point(lambda y, x: step(x, y), solver, y0, x, max_steps=5000).value)

        return jax.grad(h)(x)

    return {"jaxopt": with_jaxopt, "optimistix": with_optimistix}


def _proximal(smooth, proximal, g, x, y0) -> dict[str, Callable]:
    def with_jaxopt():
        import jaxopt

        solve = jaxopt.ProximalGradient(
            lambda y, hyper: smooth(hyper, y), lambda v, hyper, scaling: proximal(hyper, v, scaling)
        ).run
        return jax.grad(lambda x: g(x, solve(y0, x, x).params))(x)

    return {"jaxopt": with_jaxopt}


# ------------------------------------------------------------------------------------------------ composite


class _Squares(eqx.Module):
    A: Any
    b: Any

    def __call__(self, x, y):
        return 0.5 * jnp.mean((self.A @ y - self.b) ** 2)


def _regression(n: int, p: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    truth = np.zeros(p)
    truth[:6] = 2 * rng.normal(size=6)
    A, B = rng.normal(size=(n, p)), rng.normal(size=(n, p))
    return A, A @ truth + 0.1 * rng.normal(size=n), B, B @ truth


def _fista(A, b, proximal, steps: int) -> np.ndarray:
    """argmin |A y - b|^2 / (2 n) + r by accelerated forward-backward steps with restarts, NumPy alone."""
    n = b.size
    t = n / np.linalg.norm(A, 2) ** 2
    y = z = np.zeros(A.shape[1])
    k = 1.0
    for _ in range(steps):
        new = proximal(z - t * A.T @ (A @ z - b) / n, t)
        ahead = (1 + np.sqrt(1 + 4 * k * k)) / 2
        if np.vdot(z - new, new - y) > 0:
            z, k = new, 1.0
        else:
            z, k = new + (k - 1) / ahead * (new - y), ahead
        y = new
    return y


def _differences(h: Callable, x: np.ndarray, size: float = 2e-4) -> np.ndarray:
    """The gradient of h by central differences, extrapolated twice."""

    def along(e):
        once = lambda s: (h(x + s * e) - h(x - s * e)) / (2 * s)
        return (4 * once(size / 2) - once(size)) / 3

    return np.stack([along(e) for e in np.eye(x.size)]) if x.ndim else np.asarray(along(1.0))


def _composite(A, b, B, c, proximal, x, in_numpy, steps: int = 4000, loose: bool = False) -> Case:
    smooth, outer = _Squares(jnp.asarray(A), jnp.asarray(b)), _Squares(jnp.asarray(B), jnp.asarray(c))
    problem = bilevel.BilevelProblem(bilevel.Composite(smooth, proximal), outer)
    y0 = jnp.zeros(A.shape[1])
    solved = lambda x: _fista(A, b, in_numpy(x), steps)
    truth = _differences(lambda x: 0.5 * np.mean((B @ solved(x) - c) ** 2), np.asarray(x))
    if loose:

        def ours():
            near = jnp.full(A.shape[1], 1e-3)  # every entry is on: nothing is identified
            found = bilevel.estimate(problem, x, near)
            if not found.converged:
                raise bilevel.NotConverged(found.status.meaning, found)
            return found.gradient

        return Case(truth, ours, ("estimate_untrusted", "correction_rejected"))
    ours = lambda: bilevel.hypergradient(problem, x, y0).gradient
    return Case(truth, ours, peers=_proximal(smooth, proximal, outer, x, y0))


def _soft(v, t):
    return np.sign(v) * np.maximum(np.abs(v) - t, 0)


@case("lasso, n = 100, p = 1000")
def _lasso(n=100, p=1000, loose=False):
    A, b, B, c = _regression(n, p)
    x = jnp.asarray(np.log(0.1 * np.max(np.abs(A.T @ b)) / n))
    return _composite(A, b, B, c, prox.l1(jnp.exp), x, lambda x: lambda v, t: _soft(v, t * np.exp(x)), loose=loose)


@case("lasso before its support is identified")
def _lasso_loose():
    return _lasso(40, 60, loose=True)


@case("elastic net")
def _elastic_net():
    A, b, B, c = _regression(40, 60)
    x = jnp.asarray([np.log(0.1 * np.max(np.abs(A.T @ b)) / 40), -3.0])
    proximal = prox.elastic_net(lambda x: jnp.exp(x[0]), lambda x: jnp.exp(x[1]))
    in_numpy = lambda x: lambda v, t: _soft(v, t * np.exp(x[0])) / (1 + t * np.exp(x[1]))
    return _composite(A, b, B, c, proximal, x, in_numpy)


@case("group lasso")
def _group_lasso():
    A, b, B, c = _regression(40, 60)
    groups = np.repeat(np.arange(20), 3)
    x = jnp.asarray(np.log(0.1 * np.max(np.abs(A.T @ b)) / 40))

    def in_numpy(x):
        def apply(v, t):
            size = np.sqrt(np.bincount(groups, v**2))[groups]
            return v * np.maximum(1 - t * np.exp(x) / np.maximum(size, 1e-300), 0)

        return apply

    return _composite(A, b, B, c, prox.group_lasso(jnp.exp, groups), x, in_numpy)


class _Scaled(eqx.Module):
    A: Any
    b: Any

    def __call__(self, x, y):
        return 0.5 * jnp.mean((self.A @ y - x * self.b) ** 2)


@case("least squares on the simplex")
def _simplex():
    rng = np.random.default_rng(2)
    A, b, target = rng.normal(size=(30, 8)), rng.normal(size=30), rng.normal(size=8)
    x, y0 = jnp.asarray(1.3), jnp.full(8, 1 / 8)

    def project(v, t):
        u = np.sort(v)[::-1]
        excess = (np.cumsum(u) - 1) / np.arange(1, v.size + 1)
        return np.maximum(v - excess[np.nonzero(u > excess)[0][-1]], 0)

    truth = _differences(lambda x: 0.5 * np.sum((_fista(A, x * b, project, 4000) - target) ** 2), np.asarray(x))
    smooth, outer = _Scaled(jnp.asarray(A), jnp.asarray(b)), lambda x, y: 0.5 * jnp.sum((y - target) ** 2)
    problem = bilevel.BilevelProblem(bilevel.Composite(smooth, prox.simplex()), outer)
    ours = lambda: bilevel.hypergradient(problem, x, y0).gradient
    return Case(truth, ours, peers=_proximal(smooth, prox.simplex(), outer, x, y0))


# ------------------------------------------------------------------------------------------------ Hessians


def _diagonal(exponent: int, dtype) -> Case:
    """y* = x / d, h = |y* - 1|^2 / 2, so grad h = (y* - 1) / d in closed form."""
    d = 10.0 ** (-np.linspace(0, exponent, 6))
    x = np.cos(np.arange(6.0)) + 1.5
    truth = (x / d - 1) / d
    diagonal, point, y0 = jnp.asarray(d, dtype), jnp.asarray(x, dtype), jnp.zeros(6, dtype)
    f = lambda x, y: 0.5 * jnp.sum(diagonal * y**2) - jnp.sum(x * y)
    g = lambda x, y: 0.5 * jnp.sum((y - 1) ** 2)
    rtol = 1e-6 if dtype == np.float64 else 1e-3
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(f, g), point, y0, rtol=rtol).gradient
    refusals = ("round_off", "singular", "max_steps", "estimate_untrusted", "correction_rejected", "non_finite")
    hard = exponent > (7 if dtype == np.float64 else 4)  # there a refusal is an answer too
    may = ("right", *refusals) if hard else ("right",)
    return Case(truth, ours, may, rtol, _minimizers(f, g, point, y0))


for _exponent in (1, 4, 7, 10):
    for _dtype in (np.float64, np.float32):
        case(f"diagonal Hessian, cond 1e{_exponent}, {_dtype.__name__}")(
            lambda e=_exponent, t=_dtype: _diagonal(e, t)  # type: ignore[misc]
        )


def _flat(last: float, gauge=None, depends: bool = False) -> Case:
    """Hessian diag(1, 2, 3, last); the fourth direction does not enter x."""
    d = jnp.asarray([1.0, 2.0, 3.0, last])
    x = jnp.asarray([0.4, -0.3, 0.9])
    f = lambda x, y: 0.5 * jnp.sum(d * y**2) - jnp.sum(x * y[:3])
    g = lambda x, y: 0.5 * jnp.sum((y[:3] - 1) ** 2) + (y[3] if depends else 0.0)
    truth = (np.asarray(x) / np.asarray(d[:3]) - 1) / np.asarray(d[:3])
    y0 = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    inner = bilevel.Minimization(f, gauge=gauge)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(inner, g), x, y0).gradient
    return Case(truth, ours, peers=_minimizers(f, g, x, y0))


@case("indefinite Hessian")
def _indefinite():
    found = _flat(-1.0)
    return Case(np.nan, found.ours, ("not_a_minimum", "unbounded"), peers=found.peers)


@case("singular Hessian")
def _singular():
    found = _flat(0.0)
    return Case(np.nan, found.ours, ("singular",), peers=found.peers)


@case("singular Hessian, gauge declared")
def _gauge():
    return _flat(0.0, gauge=[jnp.asarray([0.0, 0.0, 0.0, 1.0])])


@case("gauge declared, outer function depends on it")
def _gauge_dependent():
    found = _flat(0.0, gauge=[jnp.asarray([0.0, 0.0, 0.0, 1.0])], depends=True)
    return Case(np.nan, found.ours, ("gauge_dependent",), peers=found.peers)


# ------------------------------------------------------------------------------------------------ roots


@case("cube root of 8")
def _cube_root():
    residual, g = lambda x, y: y**3 - x, lambda x, y: y
    x, y0 = jnp.asarray(8.0), jnp.asarray(1.0)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(bilevel.Root(residual), g), x, y0).gradient
    return Case(1 / 12, ours, peers=_root_finders(residual, g, x, y0))


@case("non-symmetric root, 50 unknowns")
def _non_symmetric():
    rng = np.random.default_rng(3)
    A, c = np.eye(50) + rng.normal(size=(50, 50)) / 12, rng.normal(size=50)
    B = rng.normal(size=(50, 3))
    x, y0 = jnp.asarray([0.3, -0.2, 0.7]), jnp.zeros(50)
    truth = B.T @ np.linalg.solve(A.T, c)
    residual, g = lambda x, y: A @ y - B @ x, lambda x, y: jnp.vdot(jnp.asarray(c), y)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(bilevel.Root(residual), g), x, y0).gradient
    return Case(truth, ours, peers=_root_finders(residual, g, x, y0))


@case("fixed point, spectral radius 0.99")
def _slow():
    rng = np.random.default_rng(4)
    Q = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    A = Q @ np.diag(np.linspace(-0.5, 0.99, 20)) @ Q.T
    x, y0 = jnp.asarray(rng.normal(size=20)), jnp.zeros(20)
    inverse = np.linalg.inv(np.eye(20) - A)
    truth = inverse.T @ (inverse @ np.asarray(x) - 1)
    step, g = lambda x, y: A @ y + x, lambda x, y: 0.5 * jnp.sum((y - 1) ** 2)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(bilevel.FixedPoint(step), g), x, y0).gradient
    return Case(truth, ours, peers=_fixed_points(step, g, x, y0))


@case("deep equilibrium, 200 units")
def _equilibrium():
    rng = np.random.default_rng(5)
    W, U = 0.9 * rng.normal(size=(200, 200)) / np.sqrt(200), rng.normal(size=(200, 4))
    x, y0 = jnp.asarray([0.2, -0.4, 0.1, 0.5]), jnp.zeros(200)
    y = np.zeros(200)
    for _ in range(4000):
        y = np.tanh(W @ y + U @ np.asarray(x))
    slope = 1 - y**2
    truth = (slope[:, None] * U).T @ np.linalg.solve(np.eye(200) - (slope[:, None] * W).T, y - 0.1)
    step, g = lambda x, y: jnp.tanh(W @ y + U @ x), lambda x, y: 0.5 * jnp.sum((y - 0.1) ** 2)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(bilevel.FixedPoint(step), g), x, y0).gradient
    return Case(truth, ours, peers=_fixed_points(step, g, x, y0))


# ------------------------------------------------------------------------------------------------ constraints


def _program(weak: bool) -> Case:
    """min y'Qy/2 - q(x)'y with E y = e and A y <= a: 20 unknowns, 5 equalities, 10 inequalities, 3 of them active."""
    rng = np.random.default_rng(6)
    L = rng.normal(size=(20, 20))
    Q, B, c = L @ L.T / 20 + np.eye(20), rng.normal(size=(20, 4)), rng.normal(size=20)
    E, A = rng.normal(size=(5, 20)), rng.normal(size=(10, 20))
    x = np.asarray([0.5, -0.3, 0.8, 0.1])
    y, equal = rng.normal(size=20), rng.normal(size=5)
    pressing = np.asarray([0.7, 1.1, 0.0 if weak else 0.4])
    on = np.vstack([E, A[:3]])
    e, a = E @ y, A @ y + np.concatenate([np.zeros(3), np.linspace(0.5, 1.5, 7)])
    shift = Q @ y - B @ x + E.T @ equal + A[:3].T @ pressing  # makes y the solution, by its optimality conditions
    # y'(x) on the active set: the first rows of the inverse KKT matrix
    system = np.block([[Q, on.T], [on, np.zeros((8, 8))]])
    tangent = np.linalg.solve(system, np.vstack([B, np.zeros((8, 4))]))[:20]
    inner = bilevel.Constrained(
        lambda x, y: 0.5 * y @ (Q @ y) - (B @ x + shift) @ y,
        equality=lambda x, y: E @ y - e,
        inequality=lambda x, y: A @ y - a,
    )
    outer = lambda x, y: jnp.asarray(c) @ y
    point, y0 = jnp.asarray(x), jnp.zeros(20)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(inner, outer), point, y0).gradient

    def with_jaxopt():
        import jaxopt

        def h(x):
            parameters = jaxopt.OSQP().run(
                params_obj=(jnp.asarray(Q), -(B @ x + shift)),
                params_eq=(jnp.asarray(E), jnp.asarray(e)),
                params_ineq=(jnp.asarray(A), jnp.asarray(a)),
            )
            return outer(x, parameters.params.primal)

        return jax.grad(h)(point)

    if weak:
        return Case(np.nan, ours, ("degenerate_active_set",), peers={"jaxopt": with_jaxopt})
    return Case(tangent.T @ c, ours, peers={"jaxopt": with_jaxopt})


@case("quadratic program, 5 equalities, 10 inequalities")
def _quadratic_program():
    return _program(weak=False)


@case("quadratic program, a weakly active constraint")
def _weak_program():
    return _program(weak=True)


# ------------------------------------------------------------------------------------------------ the rest


@case("linear solve stopped after 3 steps")
def _stopped():
    rng = np.random.default_rng(7)
    d = 10.0 ** np.linspace(0, 3, 30)
    Q = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    H = jnp.asarray(Q @ np.diag(d) @ Q.T)
    x, y0 = jnp.asarray(rng.normal(size=30)), jnp.zeros(30)
    f, g = lambda x, y: 0.5 * y @ (H @ y) - x @ y, lambda x, y: 0.5 * jnp.sum((y - 1) ** 2)
    inverse = np.linalg.inv(np.asarray(H))
    truth = inverse @ (inverse @ np.asarray(x) - 1)
    adjoint = bilevel.ImplicitAdjoint(bilevel.ConjugateGradient(max_steps=3))
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(f, g), x, y0, adjoint=adjoint).gradient

    def with_jaxopt():
        import functools

        import jaxopt
        from jaxopt.linear_solve import solve_cg

        stop = functools.partial(solve_cg, maxiter=3)
        solve = jaxopt.LBFGS(lambda y, x: f(x, y), maxiter=5000, tol=1e-8, implicit_diff_solve=stop).run
        return jax.grad(lambda x: g(x, solve(y0, x).params))(x)

    def with_optimistix():
        import lineax
        import optimistix

        def h(x):
            rule = optimistix.ImplicitAdjoint(lineax.CG(rtol=1e-8, atol=1e-8, max_steps=3))
            solver = optimistix.LBFGS(rtol=1e-8, atol=1e-8)
            tags = frozenset({lineax.positive_semidefinite_tag})
            return g(
                x,
                optimistix.minimise(lambda y, x: f(x, y), solver, y0, x, adjoint=rule, max_steps=5000, tags=tags).value,
            )

        return jax.grad(h)(x)

    refusals = ("linear_solve", "estimate_untrusted", "max_steps")
    return Case(truth, ours, refusals, peers={"jaxopt": with_jaxopt, "optimistix": with_optimistix})


@case("derivative of an auxiliary output")
def _auxiliary():
    d = jnp.asarray([1.0, 2.0, 4.0])
    x, y0 = jnp.asarray([0.5, -1.0, 2.0]), jnp.zeros(3)
    f = lambda x, y: (0.5 * jnp.sum(d * y**2) - jnp.sum(x * y), jnp.sum(y**2))
    truth = 2 * np.asarray(x) / np.asarray(d) ** 2
    inner = bilevel.Minimization(f, has_aux=True)
    ours = lambda: jax.grad(lambda x: bilevel.solve(inner, x, y0).aux)(x)

    def with_jaxopt():
        import jaxopt

        solve = jaxopt.LBFGS(lambda y, x: f(x, y), has_aux=True).run
        return jax.grad(lambda x: solve(y0, x).state.aux)(x)

    def with_optimistix():
        import optimistix

        def h(x):
            solver = optimistix.BFGS(rtol=1e-8, atol=1e-8)
            return optimistix.minimise(lambda y, x: f(x, y), solver, y0, x, has_aux=True).aux

        return jax.grad(h)(x)

    return Case(truth, ours, peers={"jaxopt": with_jaxopt, "optimistix": with_optimistix})


@case("objective closes over the traced value")
def _closure():
    d = jnp.asarray([1.0, 2.0, 4.0])
    x, y0 = jnp.asarray([0.5, -1.0, 2.0]), jnp.zeros(3)
    truth = (np.asarray(x) / np.asarray(d) - 1) / np.asarray(d)
    g = lambda y: 0.5 * jnp.sum((y - 1) ** 2)
    f = lambda x: lambda y: 0.5 * jnp.sum(d * y**2) - jnp.sum(x * y)
    nothing = jnp.zeros(())
    ours = lambda: jax.grad(lambda x: g(bilevel.solve(lambda _, y: f(x)(y), nothing, y0).y))(x)

    def with_jaxopt():
        import jaxopt

        return jax.grad(lambda x: g(jaxopt.LBFGS(f(x)).run(y0).params))(x)

    def with_optimistix():
        import optimistix

        def h(x):
            solver = optimistix.BFGS(rtol=1e-8, atol=1e-8)
            return g(optimistix.minimise(lambda y, _: f(x)(y), solver, y0).value)

        return jax.grad(h)(x)

    return Case(truth, ours, peers={"jaxopt": with_jaxopt, "optimistix": with_optimistix})
