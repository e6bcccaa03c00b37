"""How the potentials of a step are found, and its Hessian: block conjugate gradients, sums of kept exponentials."""

import jax
import jax.numpy as jnp
import numpy as np

from problems.flows import _potentials as potentials
from problems.flows._kernel import Kernel, log_weights

RNG = np.random.default_rng(7)
X, Y = RNG.normal(size=(30, 2)), RNG.normal(size=(26, 2)) + 0.3
A, B = np.append(RNG.uniform(1, 2, 29), 0.0), np.append(RNG.uniform(1, 2, 25), 0.0)
W = jnp.asarray(RNG.normal(size=26))


def kernel(ratio, epsilon=0.05):
    a, b = log_weights(jnp.asarray(A / A.sum())), log_weights(jnp.asarray(B / B.sum()))
    return Kernel(jnp.asarray(X), jnp.asarray(Y), a, b, jnp.asarray(epsilon), jnp.asarray(ratio))


def test_potentials_are_found_from_anywhere():
    starts = [np.zeros(30), 50 * RNG.normal(size=30), 1e4 * RNG.normal(size=30)]
    for ratio in (0.0, 0.05, 0.7):
        there = kernel(ratio)
        w = W * ratio
        found = [potentials.find(there, w, jnp.asarray(start), jnp.asarray(0.0)) for start in starts]
        for f, size, sides, _ in found:
            assert size < 1e-10  # round-off of a start of 1e4
            np.testing.assert_allclose(sides.columns[:25], there.columns(f)[:25], atol=1e-8)
            np.testing.assert_allclose(there.coupling(w, f).sum(1), A / A.sum(), rtol=1e-8)
            shift = 0 if ratio else f[0] - found[0][0][0]  # balanced: up to a constant
            np.testing.assert_allclose(f, found[0][0] + shift, atol=1e-8)


def test_a_loose_block_solve_is_wrong_by_what_its_residual_says():
    """M'Z + Z'R / ratio is short of M' S^-1 (ratio M) by R' S^-1 R / ratio, for any residual R."""
    ratio = 0.05
    there = kernel(ratio)
    f, _, sides, _ = potentials.find(there, W * ratio, jnp.zeros(30), jnp.asarray(0.0))
    p = np.asarray(there.coupling(W * ratio, f))
    columns, a = p.sum(0), A / A.sum()
    dense = np.zeros((30, 26))
    dense[:29, :25] = p[:29, :25] / np.sqrt(a[:29, None] * columns[None, :25])
    scaled = potentials._scaled(
        jnp.asarray(p / np.where(a > 0, a, 1)[:, None]),
        jnp.ones(30), jnp.ones(26), jnp.sqrt(jnp.asarray(a)),
    )  # fmt: skip
    features = RNG.normal(size=(26, 4)) * [1.0, 1e-3, 1.0, 0.0]
    features[:, 2] = features[:, 0] - 2e3 * features[:, 1]  # dependent; the last is zero
    M = dense @ (np.sqrt(columns)[:, None] * (features - columns @ features))
    S = np.eye(30) - (1 - ratio) * dense @ dense.T
    exact = ratio * M.T @ np.linalg.solve(S, M)
    start = jnp.asarray(0.1 * RNG.normal(size=(30, 4)))
    solve = jax.jit(
        lambda rtol: potentials.solve_block(scaled, ratio, ratio * jnp.asarray(M), rtol, jnp.zeros((30, 4)))
    )
    for rtol in (0.5, 0.03, 1e-12):
        Z, R = map(np.asarray, solve(rtol))
        np.testing.assert_allclose(ratio * M - S @ Z, R, atol=1e-13)
        assert np.all(np.linalg.norm(R, axis=0) <= 1.01 * rtol * np.linalg.norm(ratio * M, axis=0) + 1e-14)
        missing = exact - (M.T @ Z + Z.T @ R / ratio)
        np.testing.assert_allclose(missing, R.T @ np.linalg.solve(S, R) / ratio, atol=1e-12)
    # and so the Hessian from a nearby guess, taken as it is, is right to second order and never too small
    two = jnp.asarray(features[:, :2])
    at = jax.jit(lambda rtol, guess: potentials.curvature(there, W * ratio, sides, two, rtol, guess, False))
    H, df = at(1e-10, start[:, :2])
    loose = at(0.5, df + 1e-4 * start[:, :2])[0]
    assert 0 < np.abs(loose - H).max() < 1e-7
    assert np.linalg.eigvalsh(loose - H)[0] > -1e-12
    centred = np.sqrt(columns)[:, None] * (features[:, :2] - columns @ features[:, :2])
    expected = ratio / 0.05 * (centred.T @ centred - exact[:2, :2])
    np.testing.assert_allclose(H, expected, atol=1e-8)
