"""Sparse models with more features than rows: the adjoint on the gathered columns of the support."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model as sk

import bilevel
from bilevel.linear import linear_system
from problems import tuning
from problems.tuning._criteria import CrossValidation
from problems.tuning._gathered import LARGEST, GatheredSupport, capacity
from problems.tuning._sparse import Grams, SparseTraining, exact_step_length

RNG = np.random.default_rng(7)
N, P = 24, 60
X = RNG.normal(size=(N + 16, P))
B = X[:, :4] @ RNG.normal(size=4) + 0.3 * RNG.normal(size=N + 16)
ROWS = (X[:N], B[:N], X[N:], B[N:])
MOST = 32  # columns that are gathered
TRAIN = RNG.uniform(size=(2, N)) * (np.arange(N) % 2 == [[0], [1]])


@eqx.filter_jit
def solved(inner, x, y):
    """For A and for A': solutions to round-off, from a guess, and at once; the matrix, the right-hand side, and the
    number of weights that are not held."""
    _, system = linear_system(inner, x, y)
    solver, b = inner.linear_solver, jnp.cos(jnp.arange(1.0, system.size + 1))
    assert isinstance(solver, GatheredSupport)
    state = solver.prepare(system)
    solve = lambda t, **more: solver.solve(state, system, b, transpose=t, **more)
    found = [(solve(t), solve(t, guess=b), solver.approximate(state, system, b, transpose=t)) for t in (False, True)]
    assert system.active is not None
    active = jnp.count_nonzero(system.active(jnp.ones(system.size)))
    return found, system.matrix(), b, active


@pytest.mark.parametrize(
    ("problem", "xs"),
    [
        (tuning.LassoTuning(*ROWS), [1.0, 0.0]),
        (tuning.ElasticNetTuning(*ROWS), [[-1.0, -1.0], [-8.0, -1.0]]),  # the second: more than are gathered
    ],
)
def test_the_system_on_gathered_columns_is_the_system(problem, xs):
    y = jnp.asarray(np.where(np.arange(P) < 9, 0.3 * RNG.normal(size=P), 0))
    for x in xs:
        found, matrix, b, active = solved(problem.inner, jnp.asarray(x), y)
        assert (active > MOST) == (x == [-8.0, -1.0])
        for answers, A in zip(found, (matrix, matrix.T), strict=True):
            exact = jnp.linalg.solve(A, b)
            tight, guessed, rough = answers
            for answer in (tight, guessed):
                assert answer.status == "converged"
                np.testing.assert_allclose(answer.value, exact, rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(rough.value, exact, atol=1e-9 if active <= MOST else 0.5)


def test_more_weights_than_a_lasso_can_have_are_said_to_be_singular():
    found, *_, active = solved(tuning.LassoTuning(*ROWS).inner, jnp.asarray(-12.0), jnp.ones(P))
    assert active > MOST
    assert all(answer.status == "singular" for answers in found for answer in answers)


def test_the_hypergradient_is_that_of_scikit_learns_fits_and_takes_few_products():
    problem = tuning.LassoTuning(*ROWS)

    def reference(x):
        fit = sk.Lasso(alpha=np.exp(x), fit_intercept=False, tol=1e-14, max_iter=100000).fit(X[:N], B[:N])
        return fit.coef_, np.mean((X[N:] @ fit.coef_ - B[N:]) ** 2) / 2

    x, h = -2.0, 1e-4
    found = bilevel.hypergradient(problem, jnp.asarray(x), problem.initial()[1], rtol=1e-7)
    np.testing.assert_allclose(found.y, reference(x)[0], atol=1e-7)
    slope = (reference(x + h)[1] - reference(x - h)[1]) / (2 * h)
    np.testing.assert_allclose(found.gradient, slope, rtol=1e-5)
    assert 5 <= np.count_nonzero(found.y) < N
    assert found.products < 60  # conjugate gradients take some for each weight, in each solve


def test_folds_share_rows_or_have_their_own_and_large_supports_are_not_gathered():
    wide = RNG.normal(size=(N, 1100))
    problem = tuning.LassoTuning(wide, B[:N], cv=2)
    y = jnp.asarray(np.where(np.arange(1100) < 6, RNG.normal(size=(2, 1100)), 0))
    _, system = linear_system(problem.inner, jnp.asarray(2.5), y)
    solver, b = problem.inner.linear_solver, jnp.cos(jnp.arange(1.0, 2201))
    assert isinstance(solver, GatheredSupport)
    own = GatheredSupport(jnp.stack([solver.X, solver.X]), solver.weights, solver.step, solver.capacity)

    @jax.jit
    def residuals(b):
        sizes = []
        for each in (solver, own):
            state = each.prepare(system)
            for transpose in (False, True):
                value = each.approximate(state, system, b, transpose=transpose).value
                sizes.append(jnp.linalg.norm(b - system.product(value, transpose)))
        return jnp.stack(sizes)

    assert jnp.all(residuals(b) <= 1e-9 * jnp.linalg.norm(b))
    assert capacity(N, 1100) == capacity(N, P) == MOST
    assert capacity(2 * LARGEST, 10 * LARGEST) is None


def test_the_matrices_of_the_folds_stand_for_their_rows():
    """As in the search: each fold has its own features, and a quadratic penalty makes D more than zeros and ones."""
    data, targets, train = RNG.normal(size=(2, N, 5)), RNG.normal(size=N), jnp.asarray(TRAIN)
    rows = CrossValidation(jnp.asarray(data), jnp.asarray(targets), jnp.zeros(5), train, train)
    step = jnp.asarray(exact_step_length(data, TRAIN))
    penalty = bilevel.prox.elastic_net(0.3, 0.5)
    plain = SparseTraining(rows, penalty, None, step=step)
    small = SparseTraining(rows, penalty, None, step=step, grams=Grams(data, targets, TRAIN))
    x, y = jnp.zeros(()), jnp.asarray(RNG.normal(size=(2, 5)) * (RNG.uniform(size=(2, 5)) < 0.6))
    np.testing.assert_allclose(small.optimality(x, y), plain.optimality(x, y), atol=1e-12)

    @jax.jit
    def solved(y):
        _, system = linear_system(small, x, y)
        state, b = small.linear_solver.prepare(system), jnp.cos(jnp.arange(1.0, 11))
        found = [small.linear_solver.approximate(state, system, b, transpose=t).value for t in (False, True)]
        return found, system.matrix(), b

    found, matrix, b = solved(y)
    for value, A in zip(found, (matrix, matrix.T), strict=True):
        np.testing.assert_allclose(value, jnp.linalg.solve(A, b), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(N, P), (N, 5), (2, N, P), (2, N, 5)])
def test_the_step_length_is_that_of_the_worst_fold(shape):
    data = RNG.normal(size=shape)
    each = data if data.ndim == 3 else [data, data]
    largest = max(np.linalg.norm(A.T * w @ A, 2) for A, w in zip(each, TRAIN, strict=True))
    np.testing.assert_allclose(exact_step_length(data, TRAIN), 1 / largest, rtol=1e-10)
