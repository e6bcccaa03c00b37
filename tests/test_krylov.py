"""Conjugate gradients: the dense solve after n steps, no NaN on the way, and an honest report."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.krylov import conjugate_gradient


def spd(eigenvalues, seed: int = 0) -> jax.Array:
    n = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return jnp.asarray(Q @ np.diag(eigenvalues) @ Q.T)


@functools.partial(jax.jit, static_argnames=("rtol", "max_steps"))
def solve(A, b, rtol=1e-14, max_steps=None, guess=None, diagonal=None, scale=None):
    return conjugate_gradient(
        lambda v: A @ v,
        b,
        rtol=rtol,
        max_steps=max_steps,
        guess=guess,
        preconditioner=None if diagonal is None else lambda v: v / diagonal,
        forcing=None if scale is None else (0.3, scale),
    )


@pytest.mark.parametrize("n", [1, 2, 12])
def test_n_steps_reproduce_the_dense_solve(n):
    """The test that two released packages fail."""
    A = spd(np.linspace(1, 30, n))
    b = jnp.asarray(np.random.default_rng(1).normal(size=n))
    out = solve(A, b, max_steps=n)
    np.testing.assert_allclose(out.value, np.linalg.solve(A, b), rtol=1e-10)
    assert str(out.status) == "converged"
    if n > 2:
        assert float(jnp.linalg.norm(A @ solve(A, b, max_steps=n - 2).value - b)) > 1e-6


def test_the_reported_residual_is_the_recomputed_one():
    A, b = spd(np.logspace(0, 4, 12)), jnp.ones(12)
    out = solve(A, b, max_steps=5)
    np.testing.assert_allclose(out.residual, b - A @ out.value, atol=1e-12)
    assert str(out.status) == "linear_solve"
    assert int(out.steps) == 5


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_repeated_eigenvalues_finish_early_without_nan(distinct):
    A = spd([1.0 + (k % distinct) for k in range(12)])
    b = jnp.asarray(np.random.default_rng(2).normal(size=12))
    for rtol in (1e-10, 0.0):  # 0: goes on after it has finished
        out = solve(A, b, rtol=rtol)
        assert np.all(np.isfinite(out.value))
        np.testing.assert_allclose(out.value, np.linalg.solve(A, b), rtol=1e-9)
    assert int(solve(A, b, rtol=1e-10).steps) <= distinct


def test_zero_right_hand_sides_and_exact_guesses():
    A, b = spd([1.0, 2.0, 3.0]), jnp.array([1.0, -2.0, 3.0])
    out = solve(A, jnp.zeros(3))
    np.testing.assert_array_equal(out.value, 0)
    assert str(out.status) == "converged"
    warm = solve(A, b, rtol=1e-8, guess=jnp.linalg.solve(A, b))
    assert int(warm.steps) == 0
    assert str(warm.status) == "converged"
    wrong = solve(A, b, guess=100 * jnp.ones(3))
    np.testing.assert_allclose(wrong.value, np.linalg.solve(A, b), rtol=1e-9)


def test_a_jacobi_preconditioner_pays_on_a_badly_scaled_matrix():
    s = np.logspace(0, 3, 12)
    A = jnp.asarray(s[:, None] * np.asarray(spd(np.linspace(1, 2, 12))) * s)
    b = jnp.ones(12)
    plain, scaled = solve(A, b, rtol=1e-8), solve(A, b, rtol=1e-8, diagonal=jnp.diagonal(A))
    assert int(scaled.steps) < int(plain.steps)
    np.testing.assert_allclose(scaled.value, np.linalg.solve(A, b), rtol=1e-4)


def test_forcing_stops_early_and_no_later():
    A, b = spd(np.logspace(0, 3, 12)), jnp.ones(12)
    loose, tight = solve(A, b, rtol=1e-12, scale=jnp.asarray(1.0)), solve(A, b, rtol=1e-12)
    assert int(loose.steps) < int(tight.steps)
    assert float(jnp.linalg.norm(loose.residual)) <= 0.01 * float(jnp.linalg.norm(b))


def test_negative_curvature_is_no_minimum():
    for seed in range(5):
        assert str(solve(spd([1.0, 2.0, 3.0, -0.5], seed), jnp.ones(4)).status) == "not_a_minimum"
    assert str(solve(-spd([1.0, 2.0]), jnp.ones(2)).status) == "not_a_minimum"


def test_many_unknowns_in_float32_are_not_singular_for_their_number():
    """n eps is 0.03 here, so that a condition number of 300 was called singular; a null direction still is."""
    n = 2**18
    b = jax.random.normal(jax.random.PRNGKey(0), (n,), jnp.float32)
    run = jax.jit(lambda d: conjugate_gradient(lambda v: d * v, b, rtol=1e-4, max_steps=200))
    d = jnp.linspace(1, 300, n, dtype=jnp.float32)
    out = run(d)
    assert str(out.status) == "converged", out.status
    np.testing.assert_allclose(d * out.value, b, atol=1e-2)
    assert str(run(jnp.where(jnp.arange(n) < n // 8, 0, d)).status) == "singular"


@pytest.mark.parametrize("seed", range(5))
def test_a_singular_matrix_that_the_right_hand_side_excites(seed):
    b = jnp.asarray(np.random.default_rng(seed).normal(size=6))
    assert str(solve(spd([1.0, 2.0, 3.0, 4.0, 5.0, 0.0], seed), b).status) in ("singular", "not_a_minimum")
    assert str(solve(jnp.zeros((6, 6)), b).status) == "singular"


def test_nan_is_not_finite_and_never_converged():
    for A, b in ((spd([1.0, 2.0]) * jnp.nan, jnp.ones(2)), (spd([1.0, 2.0]), jnp.array([1.0, jnp.nan]))):
        assert str(solve(A, b).status) == "non_finite"


def test_the_condition_number_is_a_lower_bound_and_near():
    for cond in (1.0, 1e2, 1e5):
        eigenvalues = np.logspace(0, np.log10(cond), 20)
        out = solve(spd(eigenvalues), jnp.ones(20), rtol=1e-13)
        assert cond / 3 < float(out.condition) <= cond * 1.01


def test_vmap_is_a_loop():
    A = jnp.stack([spd(np.linspace(1, c, 6), seed) for seed, c in enumerate((1.0, 10.0, 1e4))])
    b = jnp.ones((3, 6))
    batch = jax.vmap(lambda A, b: solve(A, b, rtol=1e-10))(A, b)
    for i in range(3):
        np.testing.assert_allclose(batch.value[i], solve(A[i], b[i], rtol=1e-10).value, rtol=1e-8)
        assert int(batch.steps[i]) == int(solve(A[i], b[i], rtol=1e-10).steps)


def test_float32():
    A, b = spd(np.linspace(1, 30, 12)).astype(jnp.float32), jnp.ones(12, jnp.float32)
    out = solve(A, b, rtol=1e-5)
    assert out.value.dtype == jnp.float32
    assert str(out.status) == "converged"
    np.testing.assert_allclose(out.value, np.linalg.solve(A, b), rtol=1e-3)
