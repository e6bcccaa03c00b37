"""Solving with dF/dy: the closed form, the transposed one, honest residuals and statuses, whatever the method."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import bilevel
import bilevel._system
from bilevel import ConjugateGradient, Direct, Krylov, Minimization, Neumann, Root
from bilevel.linear import Lineax, choose, linear_system, spectral_norm

RNG = np.random.default_rng(0)
N = 8
SPD = np.diag(np.linspace(1, 20, N)) + 0.5 * np.cos(np.add.outer(np.arange(N), np.arange(N)))
GENERAL = np.diag(np.linspace(3, 9, N)) + RNG.normal(size=(N, N))
B = jnp.asarray(RNG.normal(size=N))
X0, Y0 = jnp.zeros(()), jnp.zeros(3)


def split(y):
    """The flat vector as a tree of a scalar, a matrix, an empty leaf and a rest."""
    return {"a": y[0], "b": y[1:5].reshape(2, 2), "c": jnp.zeros((0, 3), y.dtype), "d": y[5:]}


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def minimization(A=SPD):
    return Minimization(lambda x, y: 0.5 * jnp.dot(flat(y), jnp.asarray(A, flat(y).dtype) @ flat(y)))


def root(A=GENERAL):
    return Root(lambda x, y: split(jnp.asarray(A, flat(y).dtype) @ flat(y)))


def run(solver, inner, b=B, y=None, **options):
    y = split(jnp.zeros(b.shape[0], b.dtype)) if y is None else y
    _, system = linear_system(inner, jnp.zeros(()), y)
    return solver.solve(solver.prepare(system), system, b, **options)


SOLVERS = [Direct(), ConjugateGradient(), Krylov(), Krylov("bicgstab"), Lineax(lx.AutoLinearSolver(well_posed=True))]


@pytest.mark.parametrize("solver", SOLVERS)
def test_symmetric_systems(solver):
    for transpose in (False, True):
        out = run(solver, minimization(), transpose=transpose)
        np.testing.assert_allclose(out.value, np.linalg.solve(SPD, B), rtol=1e-9)
        np.testing.assert_allclose(out.residual, B - SPD @ out.value, atol=1e-12)
        assert str(out.status) == "converged"


@pytest.mark.parametrize("solver", [Direct(), Krylov(), Krylov("bicgstab"), Lineax(lx.LU())])
def test_general_systems_and_their_transposes(solver):
    for transpose in (False, True):
        A = GENERAL.T if transpose else GENERAL
        out = run(solver, root(), transpose=transpose)
        np.testing.assert_allclose(out.value, np.linalg.solve(A, B), rtol=1e-8)
        np.testing.assert_allclose(out.residual, B - A @ out.value, atol=1e-11)
        assert str(out.status) == "converged"


def test_conjugate_gradients_refuse_what_is_not_symmetric():
    with pytest.raises(ValueError, match="not symmetric"):
        run(ConjugateGradient(), root())


@pytest.mark.parametrize("solver", [ConjugateGradient(max_steps=3), Krylov(max_steps=3), Neumann(3)])
def test_stopped_early_is_said_and_the_residual_is_there(solver):
    out = run(solver, minimization())
    assert str(out.status) == "linear_solve"
    np.testing.assert_allclose(out.residual, B - SPD @ out.value, atol=1e-12)
    assert float(jnp.linalg.norm(out.residual)) > 1e-6


@pytest.mark.parametrize("terms", [0, 1, 5])
def test_neumann_is_the_series_written_out(terms):
    a = 0.04
    series = a * sum(np.linalg.matrix_power(np.eye(N) - a * GENERAL.T, k) for k in range(terms + 1))
    out = run(Neumann(terms, step=a), root(), transpose=True)
    np.testing.assert_allclose(out.value, series @ B, rtol=1e-12)


@pytest.mark.parametrize("exponent", range(1, 11))
def test_badly_scaled_diagonals_are_not_singular(exponent):
    d = np.logspace(0, -exponent, N)
    out = run(Direct(), minimization(np.diag(d)))
    np.testing.assert_allclose(out.value, B / d, rtol=1e-10)
    assert str(out.status) == "converged"
    if exponent <= 5:
        out = run(Direct(), minimization(np.diag(d)), B.astype(jnp.float32))
        assert out.value.dtype == jnp.float32
        np.testing.assert_allclose(out.value, B / d, rtol=1e-4)


@functools.partial(jax.jit, static_argnames="symmetric")
def directly(A, b, symmetric=True):
    """`Direct()` for a matrix that is data: one compilation for many matrices."""
    inner = Minimization(lambda x, y: 0.5 * jnp.dot(y, A @ y)) if symmetric else Root(lambda x, y: A @ y)
    _, system = linear_system(inner, jnp.zeros(()), jnp.zeros_like(b))
    return Direct().solve(Direct().prepare(system), system, b)


def singular(seed: int, negative: float) -> np.ndarray:
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))[0]
    return Q @ np.diag([*np.linspace(1, 3, N - 1), negative]) @ Q.T


@pytest.mark.parametrize("symmetric", [True, False])
def test_singular_matrices_in_every_direction(symmetric):
    """A null vector may hide from an unpivoted factorization: its last pivot is lambda_min / u_n^2, not lambda_min."""
    words = [str(directly(jnp.asarray(singular(seed, 0.0)), B, symmetric).status) for seed in range(100)]
    assert set(words) <= {"singular", "linear_solve"}, [seed for seed, word in enumerate(words) if word == "converged"]
    assert str(directly(jnp.zeros((N, N)), B, symmetric).status) == "singular"


def test_indefinite_is_not_singular():
    for seed in range(20):
        A = jnp.asarray(singular(seed, -0.01))
        assert str(directly(A, B).status) == "not_a_minimum"
        assert str(directly(A, B, False).status) == "converged"


def test_the_condition_seen_is_near_the_true_one():
    """The floor of round-off rests on it: too small a number promises too much."""
    worst = 0.0
    for seed in range(40):
        Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))[0]
        A = Q @ np.diag(np.logspace(0, -6, N)) @ Q.T
        D = 1 / np.sqrt(np.diag(A))
        scaled = float(np.linalg.cond(A * D[:, None] * D))
        seen = float(directly(jnp.asarray(A), B).condition)
        assert seen < 10 * scaled
        worst = max(worst, scaled / seen)
    assert worst < 20


def test_nan_is_not_finite():
    A = SPD.copy()
    A[2, 2] = np.nan
    for solver, make in ((Direct(), minimization), (Direct(), root), (ConjugateGradient(), minimization)):
        assert str(run(solver, make(A)).status) == "non_finite"


def test_a_stale_factorization_is_refined():
    inner = Minimization(lambda x, y: jnp.sum(jnp.exp(y)) + 0.5 * jnp.dot(y, jnp.asarray(SPD) @ y))
    _, old = linear_system(inner, jnp.zeros(()), jnp.zeros(N))
    _, new = linear_system(inner, jnp.zeros(()), 0.3 * jnp.ones(N))
    state = Direct().prepare(old)
    out = Direct().solve(state, new, B, rtol=1e-10)
    np.testing.assert_allclose(out.value, np.linalg.solve(new.matrix(), B), rtol=1e-9)
    assert float(jnp.linalg.norm(Direct().approximate(state, new, B).value - out.value)) > 1e-4


def test_a_hopelessly_stale_factorization_is_said():
    inner = Minimization(lambda x, y: jnp.sum(jnp.exp(8 * y)))
    _, old = linear_system(inner, jnp.zeros(()), jnp.zeros(N))
    _, new = linear_system(inner, jnp.zeros(()), jnp.ones(N))
    out = Direct().solve(Direct().prepare(old), new, B, rtol=1e-8)
    assert str(out.status) == "linear_solve"
    np.testing.assert_allclose(out.residual, B - new.mv(out.value), rtol=1e-10)


def test_the_matrix_is_the_matrix_in_blocks_too(monkeypatch):
    _, system = linear_system(root(), jnp.zeros(()), split(jnp.zeros(N)))
    np.testing.assert_allclose(system.matrix(), GENERAL, atol=1e-13)
    monkeypatch.setattr(bilevel._system, "_COLUMNS", 3)
    np.testing.assert_allclose(system.matrix(), GENERAL, atol=1e-13)
    np.testing.assert_allclose(system.rmv(B), GENERAL.T @ B, rtol=1e-12)


def test_the_spectral_norm_is_not_underestimated_by_much():
    for make, A in ((minimization, SPD), (root, GENERAL)):
        _, system = linear_system(make(), jnp.zeros(()), split(jnp.zeros(N)))
        true = np.linalg.norm(A, 2)
        assert 0.98 * true <= float(spectral_norm(system)) <= 1.1 * true


def test_declared_operators_are_used_and_checked():
    d = jnp.linspace(1, 5, 3)
    objective = lambda x, y: 0.5 * jnp.sum(d * y**2)
    inner = Minimization(objective, operator=lambda x, y: lx.DiagonalLinearOperator(d))
    assert isinstance(choose(None, inner, X0, Y0), Lineax)
    out = run(choose(None, inner, X0, Y0), inner, jnp.ones(3), jnp.zeros(3))
    np.testing.assert_allclose(out.value, 1 / d, rtol=1e-14)
    wrong = Minimization(objective, operator=lambda x, y: lx.DiagonalLinearOperator(jnp.ones(4)))
    with pytest.raises(ValueError, match="operator"):
        run(choose(None, wrong, X0, Y0), wrong, jnp.ones(3), jnp.zeros(3))
    no_operator: Any = Minimization(objective, operator=lambda x, y: d)
    with pytest.raises(TypeError, match="operator"):
        run(choose(None, no_operator, X0, Y0), no_operator, jnp.ones(3), jnp.zeros(3))
    false = Minimization(objective, operator=lambda x, y: lx.DiagonalLinearOperator(3 * d[::-1]))
    assert str(run(choose(None, false, X0, Y0), false, jnp.ones(3), jnp.zeros(3)).status) == "linear_solve"


def test_the_choice_by_kind_and_size():
    limit = bilevel.linear.DENSE_LIMIT
    # choosing never evaluates F: sizes that these problems do not have are fine
    assert isinstance(choose(None, minimization(), X0, jnp.zeros(10)), Direct)
    assert isinstance(choose(None, minimization(), X0, jnp.zeros(limit + 1)), ConjugateGradient)
    assert isinstance(choose(None, root(), X0, jnp.zeros(limit + 1)), Krylov)
    assert isinstance(choose(lx.LU(), root(), X0, Y0), Lineax)
    with pytest.raises(TypeError, match="linear_solver"):
        choose("cg", root(), X0, Y0)


def test_preconditioners_in_every_form():
    M = np.linalg.inv(SPD)
    forms = [
        lambda v: split(jnp.asarray(M) @ flat(v)),
        lx.FunctionLinearOperator(lambda v: split(jnp.asarray(M) @ flat(v)), jax.eval_shape(lambda: split(B))),
    ]
    for preconditioner in forms:
        out = run(ConjugateGradient(preconditioner=preconditioner), minimization(), rtol=1e-10)
        assert int(out.products) <= 4
        np.testing.assert_allclose(out.value, M @ B, rtol=1e-9)


@pytest.mark.parametrize(("method", "size"), [("gmres", 1.0), ("gmres", 0.0), ("bicgstab", 0.0)])
def test_krylov_on_the_identity_and_on_nothing(method, size):
    """Methods that break down at once when they are done at once (BiCGStab on the identity does, and says so)."""
    _, system = linear_system(root(np.eye(N)), X0, split(jnp.zeros(N)))
    solver = Krylov(method)
    found = solver.solve(solver.prepare(system), system, size * B)
    np.testing.assert_allclose(found.value, size * B, rtol=1e-12)
    assert str(found.status) == "converged"
