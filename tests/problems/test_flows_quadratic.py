"""Pairings, the quadratic estimator, scores, and choosing by forecasts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import bilevel
from problems import flows
from problems.flows._pairing import optimal_pairs

RNG = np.random.default_rng(5)
Q, CENTRE, TAU = np.array([[1.0, 0.3], [0.3, 0.6]]), np.array([0.5, -0.2]), 0.3
THETA = flows.Quadratic.coefficients(Q, CENTRE)


def explicit(n=30, steps=2):
    """Particles moved by explicit Euler steps."""
    path: list[np.ndarray] = [RNG.normal(size=(n, 2))]
    for _ in range(steps):
        path.append(path[-1] - TAU * (path[-1] - CENTRE) @ Q)
    return path


def implicit(n=30, steps=2):
    """Particles moved by exact JKO steps without temperature: implicit Euler steps."""
    path: list[np.ndarray] = [RNG.normal(size=(n, 2))]
    for _ in range(steps):
        path.append(np.linalg.solve(np.eye(2) + TAU * Q, (path[-1] + TAU * CENTRE @ Q).T).T)
    return path


def by_all_pairs(cost, a, b):
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    return scipy.optimize.linprog(cost.ravel(), A_eq=np.vstack(rows), b_eq=np.concatenate([a, b])).fun


def test_pairings_are_optimal(monkeypatch):
    x, y = RNG.normal(size=(60, 2)), RNG.normal(size=(50, 2))
    cost = np.sum((x[:, None] - y[None]) ** 2, -1)
    a, b = RNG.uniform(0.5, 1, 60), RNG.uniform(0.5, 1, 50)
    a, b = a / a.sum(), b / b.sum()
    expected = by_all_pairs(cost, a, b)
    for limit in (10**9, 0):  # all pairs at once, and a few at a time
        monkeypatch.setattr("problems.flows._pairing._ALL", limit)
        found = optimal_pairs(cost, a, b)
        np.testing.assert_allclose(found.cost, expected, rtol=1e-9)
        np.testing.assert_allclose(np.bincount(found.rows, found.masses, 60), a, atol=1e-9)
        np.testing.assert_allclose(np.bincount(found.columns, found.masses, 50), b, atol=1e-9)
    square = optimal_pairs(cost[:50], np.full(50, 0.02), np.full(50, 0.02))
    np.testing.assert_allclose(square.cost, by_all_pairs(cost[:50], np.full(50, 0.02), np.full(50, 0.02)), rtol=1e-9)


def test_pairings_and_distances_are_pots():
    ot = pytest.importorskip("ot")
    x, y = RNG.normal(size=(40, 3)), RNG.normal(size=(30, 3))
    distance = np.linalg.norm(x[:, None] - y[None], axis=-1)
    np.testing.assert_allclose(flows.earth_mover(x, y), ot.emd2([], [], distance), rtol=1e-9)


def test_each_data_are_exact_for_its_own_points():
    for data, at, other in ((explicit(), "old", "new"), (implicit(), "new", "old")):
        model = flows.QuadraticJKO(data, flows.Quadratic(), TAU, at=at)
        found = model.newton()
        assert found.converged
        np.testing.assert_allclose(found.x, THETA, atol=1e-8)
        assert abs(float(model.loss(found.x))) < 1e-12
        assert np.abs(flows.QuadraticJKO(data, flows.Quadratic(), TAU, at=other).newton().x - THETA).max() > 0.02


def test_the_loss_is_the_mean_over_pairs_summed_over_steps():
    data = [RNG.normal(size=(n, 2)) for n in (6, 5, 5)]
    model = flows.QuadraticJKO(data, flows.Polynomials(3), TAU, ridge=0.1)
    theta = jnp.asarray(RNG.normal(size=9))
    slope = jax.vmap(jax.grad(lambda z: theta @ flows.Polynomials(3)(z)))
    expected = 0.1 * theta @ theta
    for x, y in zip(data, data[1:], strict=False):
        cost = 0.5 * np.sum((x[:, None] - y[None]) ** 2, -1)
        pairs = optimal_pairs(cost, np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y)))
        rest = TAU * slope(jnp.asarray(y))[pairs.columns] + y[pairs.columns] - x[pairs.rows]
        expected += pairs.masses @ np.sum(np.square(rest), 1)
    np.testing.assert_allclose(model.loss(theta), expected, rtol=1e-10)
    np.testing.assert_allclose(model.hessian(), jax.hessian(lambda t: model.loss(t))(theta), rtol=1e-9, atol=1e-12)


def test_bad_input_is_named():
    data = explicit()
    with pytest.raises(ValueError, match="`at` must be 'new' or 'old', found 'both'"):
        flows.QuadraticJKO(data, flows.Quadratic(), TAU, at="both")
    with pytest.raises(ValueError, match=re.escape("flat direction theta = +1 e_0 -0.5 e_1")):
        flows.QuadraticJKO(data, lambda z: jnp.stack([z[0], 2 * z[0]]), TAU).newton()
    with pytest.raises(ValueError, match="without snapshot 1 there is no step left"):
        flows.QuadraticJKO(data, flows.Quadratic(), TAU, without=1)
    with pytest.raises(ValueError, match="must hold at least two snapshots"):
        flows.QuadraticJKO(data[:1], flows.Quadratic(), TAU)
    with pytest.raises(ValueError, match="`snapshot` has dimension 1"):
        flows.mmd(data[0], data[0][:, :1])
    with pytest.raises(ValueError, match="`score` must be 'emd' or 'mmd'"):
        flows.compare(data, flows.Quadratic(), TAU, 0.1, score="w2")


def test_scores():
    x = RNG.normal(size=(20, 2))
    np.testing.assert_allclose(flows.earth_mover(x, x + [3.0, 4.0]), 5.0, rtol=1e-9)
    assert abs(float(flows.mmd(x, x[::-1]))) < 1e-14
    shifted = [float(flows.mmd(x + s, x)) for s in (0.1, 0.5, 1.0)]
    assert 0 < shifted[0] < shifted[1] < shifted[2]
    kernel = lambda u, v: np.exp(-np.sum((u[:, None] - v[None]) ** 2, -1) / 2)
    expected = kernel(x, x).mean() - 2 * kernel(x, x[:7]).mean() + kernel(x[:7], x[:7]).mean()
    np.testing.assert_allclose(flows.mmd(x, x[:7], width=1.0), expected, rtol=1e-10)


def test_compare_chooses_what_forecasts_best():
    data = explicit(n=25, steps=3)
    found = flows.compare(data, flows.Quadratic(), TAU, 0.1, sharpening=(np.inf,))
    assert found.best == "quadratic, old points"
    assert found.held_out == (1, 2, 3)
    np.testing.assert_allclose(found.scores[found.best], 0, atol=1e-6)
    assert len(found.scores) == 3
    assert "<- best" in repr(found)
    assert found.plot().get_ylabel() == "emd of its one-step forecast"
    np.testing.assert_allclose(found.fits[found.best].x, THETA, atol=1e-8)
    test = explicit(n=10, steps=3)
    held = flows.compare(data, flows.Quadratic(), TAU, 0.1, sharpening=(np.inf,), test=test, score="mmd")
    assert held.best == "quadratic, old points"


@pytest.mark.slow
@pytest.mark.parametrize("tune", [("epsilon",), ("epsilon", "l1"), ("sharpening", "epsilon")])
def test_leave_one_snapshot_out_is_tuned_three_levels_deep(tune):
    data = [RNG.normal(size=(6, 1)) * s + m for s, m in ((1.0, 1.0), (0.9, 0.7), (0.8, 0.5), (0.7, 0.4))]
    model = flows.InverseJKO(
        data,
        flows.Quadratic(),
        0.4,
        0.3,
        sharpening=1.0 if "sharpening" in tune else 0,
        penalty=flows.L1(1e-3) if "l1" in tune else None,
    )
    problem = flows.LeaveOneOut(model, data, tune=tune)
    x0, y0 = problem.initial()
    assert jax.tree.leaves(y0)[0].shape == (3, 2)
    found = bilevel.hypergradient(problem, x0, y0, rtol=1e-5)
    if "sharpening" in tune:  # coefficients and potentials found together are those of each fold's own fit
        fits = [flows.InverseJKO(data, flows.Quadratic(), 0.4, 0.3, sharpening=1.0, without=s) for s in problem.folds]
        np.testing.assert_allclose(found.y[0], [fit.newton().x for fit in fits], atol=1e-5)
    for word in tune:
        at = lambda t, word=word: float(
            bilevel.hypergradient(problem, x0 | {word: x0[word] + t}, found.y, rtol=1e-5).value
        )
        np.testing.assert_allclose(found.gradient[word], (at(1e-3) - at(-1e-3)) / 2e-3, rtol=1e-3, atol=1e-8)
    best = bilevel.minimize(problem, x0, y0, bounds=(-5.0, 2.0), max_steps=5)
    assert best.value < found.value
