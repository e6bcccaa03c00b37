"""The JKO step against Gaussian closed forms, its laws, and differences."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from problems import flows

GRID = np.linspace(-8, 8, 121)[:, None]
MEAN, VARIANCE, CURVATURE, CENTRE, TAU, EPSILON = 1.0, 1.0, 0.5, -0.5, 0.4, 0.3
DENSITY = np.exp(-((GRID[:, 0] - MEAN) ** 2) / (2 * VARIANCE))
DENSITY /= DENSITY.sum()  # spans 27 orders of magnitude
CELLS = np.full(121, GRID[1, 0] - GRID[0, 0])


def quadratic(x, z):
    return 0.5 * x * (z[0] - CENTRE) ** 2


def grid_step(internal, epsilon=EPSILON, tau=TAU, source=GRID):
    weights = {"source_weights": DENSITY, "support_weights": CELLS}
    return flows.JKOStep(source, GRID, quadratic, tau, epsilon, internal=internal, **weights)


def moments(weights, points):
    mean = weights @ points / weights.sum()
    return mean, (points - mean).T @ ((points - mean) * weights[:, None]) / weights.sum()


def matrices(d=3, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, d, d))
    return rng.normal(size=d), a @ a.T + np.eye(d), (b + b.T) / 2 + np.eye(d), rng.normal(size=d)


# ------------------------------------------------------------------------------------------------ closed forms


def test_the_exact_step_solves_its_equations_without_commutation():
    m, S, Q, v = matrices()
    M = np.eye(3) + TAU * Q
    for temperature in (0.0, 0.7, 30.0):
        mean, new = map(np.asarray, flows.gaussian.jko_step(m, S, Q, v, TAU, temperature))
        back = M - TAU * temperature * np.linalg.inv(new)  # the Jacobian of the map back to the source
        np.testing.assert_allclose(back @ new @ back, S, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(M @ mean, m + TAU * Q @ v, rtol=1e-12)
    s, q, k = 1.7, 0.6, TAU * 0.4
    sigma = (s + np.sqrt(s**2 + 4 * k * (1 + TAU * q))) / (2 * (1 + TAU * q))
    found = flows.gaussian.jko_step([0.0], [[s**2]], [[q]], [0.0], TAU, 0.4)[1]
    np.testing.assert_allclose(found, [[sigma**2]], rtol=1e-12)
    fixed = 0.4 * np.linalg.inv(S)
    np.testing.assert_allclose(flows.gaussian.jko_step(m, fixed, S, m, TAU, 0.4)[1], fixed, rtol=1e-10)


@pytest.mark.parametrize(("epsilon", "kappa"), [(0.2, 0.5), (0.2, 0.2), (0.2, 0.05), (3.0, 1.0), (0.1, 0.0)])
def test_the_entropic_step_solves_its_equations_without_commutation(epsilon, kappa):
    m, S, Q, v = matrices()
    M = np.eye(3) + TAU * Q
    mean, new = map(np.asarray, flows.gaussian.entropic_jko_step(m, S, Q, v, TAU, epsilon, kappa))
    conditional = np.linalg.inv(M / epsilon + (1 - kappa / epsilon) * np.linalg.inv(new))
    np.testing.assert_allclose(new, conditional + conditional @ S @ conditional / epsilon**2, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(M @ mean, m + TAU * Q @ v, rtol=1e-12)
    if kappa in (0.0, epsilon):
        inverse = np.linalg.inv(M)
        expected = inverse @ S @ inverse + (epsilon if kappa else -epsilon) * inverse
        np.testing.assert_allclose(new, expected, rtol=1e-10)


def test_the_entropic_step_tends_to_the_exact_one():
    m, S, Q, v = matrices()
    exact = flows.gaussian.jko_step(m, S, Q, v, TAU, 0.5)[1]
    gaps = [
        np.abs(flows.gaussian.entropic_jko_step(m, S, Q, v, TAU, e, TAU * 0.5)[1] - exact).max() for e in (1e-4, 1e-5)
    ]
    assert 9 < gaps[0] / gaps[1] < 11


@pytest.mark.long
def test_gaussian_steps_have_derivatives_at_repeated_eigenvalues():
    eye = jnp.eye(2)

    def value(t):
        exact = flows.gaussian.jko_step(t * jnp.ones(2), 2 * eye, (1 + t) * eye, jnp.zeros(2), t, t)
        soft = flows.gaussian.entropic_jko_step(jnp.ones(2), eye, eye, jnp.zeros(2), t, 0.2, t * t)
        return sum(jnp.sum(jnp.arange(a.size, dtype=float).reshape(a.shape) * a) for a in (*exact, *soft))

    t, h = jnp.asarray(0.3), 1e-4
    for order in range(3):
        derivative = jax.jit(jax.grad(value))
        np.testing.assert_allclose(
            derivative(t), (value(t + h) - value(t - h)) / (2 * h), rtol=1e-6, err_msg=str(order)
        )
        value = derivative


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "internal",
    [None, pytest.param(1.0, marks=SLOW), 0.0, pytest.param(EPSILON, marks=SLOW), pytest.param(0.01, marks=SLOW)],
)
def test_a_step_on_a_grid_is_the_closed_form(internal):
    step = grid_step(internal)
    x = jnp.asarray(CURVATURE)
    found = bilevel.solve(step, x, step.initial())
    weights = np.asarray(step.next_weights(x, found.y))
    kappa = EPSILON if internal is None else internal
    arguments = [MEAN], [[VARIANCE]], [[CURVATURE]], [CENTRE], TAU, EPSILON, kappa
    mean, covariance = flows.gaussian.entropic_jko_step(*arguments)
    got = moments(weights, GRID)
    np.testing.assert_allclose(got[0], mean, atol=1e-5)
    np.testing.assert_allclose(got[1], covariance, atol=1e-5)
    coupling = np.asarray(step.coupling(x, found.y))
    np.testing.assert_allclose(coupling.sum(1), DENSITY, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(coupling.sum(0), weights, rtol=1e-7, atol=1e-300)
    assert step.initial().shape == found.y.shape == (121,)

    # the derivative of a moment in the curvature
    problem = bilevel.BilevelProblem(step, SecondMoment(step))
    result = bilevel.estimate(problem, x, found.y)
    assert result.converged
    assert result.error < 3e-6 * abs(result.gradient)  # kappa = 0 too, where round-off is amplified
    gradient = result.gradient

    def closed(q):
        mean, covariance = flows.gaussian.entropic_jko_step(
            jnp.array([MEAN]), jnp.array([[VARIANCE]]), q * jnp.eye(1), jnp.array([CENTRE]), TAU, EPSILON, kappa
        )
        return mean[0] ** 2 + covariance[0, 0]

    np.testing.assert_allclose(gradient, jax.grad(closed)(x), rtol=2e-5)


class SecondMoment(eqx.Module):
    step: flows.JKOStep

    def __call__(self, x, y):
        return jnp.sum(self.step.next_weights(x, y) * self.step.support[:, 0] ** 2)


@pytest.mark.parametrize("internal", [None, pytest.param(0.2, marks=SLOW)])
def test_a_step_in_the_plane_without_commutation(internal):
    axis = np.linspace(-4.2, 4.2, 22)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    S, Q, m, v = np.array([[0.7, 0.2], [0.2, 0.5]]), np.array([[0.6, -0.3], [-0.3, 1.0]]), [0.2, -0.1], [0.1, 0.3]
    weights = np.exp(-0.5 * np.einsum("ni,ij,nj->n", grid - m, np.linalg.inv(S), grid - m))
    weights /= weights.sum()
    potential = lambda x, z: 0.5 * (z - jnp.asarray(v)) @ jnp.asarray(Q) @ (z - jnp.asarray(v))
    step = flows.JKOStep(
        grid, grid, potential, 0.5, 0.4, internal=internal, source_weights=weights, support_weights=np.full(484, 0.16)
    )
    found = bilevel.solve(step, None, step.initial())
    mean, covariance = flows.gaussian.entropic_jko_step(m, S, Q, v, 0.5, 0.4, 0.4 if internal is None else internal)
    got = moments(np.asarray(step.next_weights(None, found.y)), grid)
    np.testing.assert_allclose(got[0], mean, atol=1e-5)
    np.testing.assert_allclose(got[1], covariance, atol=1e-5)


@pytest.mark.slow
def test_large_samples_have_the_closed_forms_moments_to_sampling_error():
    rng = np.random.default_rng(0)
    m, S, Q, v = np.array([0.5, 0.0]), np.diag([1.0, 0.5]), np.diag([1.0, 0.3]), np.zeros(2)
    source = rng.multivariate_normal(m, S, size=1500)
    support = 5 * rng.uniform(-1, 1, size=(2500, 2))  # uniform: a constant reference density
    potential = lambda x, z: 0.5 * z @ jnp.asarray(Q) @ z
    step = flows.JKOStep(source, support, potential, 0.5, 0.6)
    found = bilevel.solve(step, None, step.initial())
    mean, covariance = flows.gaussian.entropic_jko_step(m, S, Q, v, 0.5, 0.6, 0.6)
    got = moments(np.asarray(step.next_weights(None, found.y)), support)
    np.testing.assert_allclose(got[0], mean, atol=0.12)
    np.testing.assert_allclose(got[1], covariance, atol=0.12)


# ------------------------------------------------------------------------------------------------ derivatives, laws

RNG = np.random.default_rng(1)
SOURCE, SUPPORT = RNG.normal(size=(5, 2)), RNG.normal(size=(7, 2))
VALUES = jnp.asarray(RNG.normal(size=7))


def wavy(x, z):
    return x[0] * jnp.sin(z[0]) + x[1] * z[1] ** 2


@pytest.mark.parametrize("internal", [pytest.param(None, marks=SLOW), pytest.param(0.9, marks=SLOW), 0.2])
def test_gradients_in_everything_are_differences(internal):
    @jax.jit
    def value(x, source, support, epsilon, tau, a, b):
        step = flows.JKOStep(
            source, support, wavy, tau, epsilon, source_weights=a, support_weights=b, internal=internal
        )
        y = bilevel.solve(step, x, step.initial(), rtol=1e-13).y
        return jnp.vdot(VALUES, step.next_weights(x, y))

    a, b = np.linspace(1, 2, 5), np.linspace(1, 3, 7)
    point = [jnp.asarray(p) for p in ([0.3, 0.8], SOURCE, SUPPORT, 0.5, 0.7, a, b)]
    gradients = jax.jit(jax.grad(value, argnums=tuple(range(7))))(*point)
    for i, gradient in enumerate(gradients):
        direction = jnp.asarray(RNG.normal(size=point[i].shape))

        def along(t, i=i, direction=direction):
            return float(value(*point[:i], point[i] + t * direction, *point[i + 1 :]))

        h = 1e-3
        expected = (8 * (along(h) - along(-h)) - along(2 * h) + along(-2 * h)) / (12 * h)
        np.testing.assert_allclose(jnp.vdot(gradient, direction), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_weights_of_zero_are_points_that_are_not_there():
    padded = np.vstack([SOURCE, [[50.0, 1.0]]]), np.vstack([SUPPORT, [[0.1, 0.2]]])
    a, b = np.linspace(1, 2, 5), np.linspace(1, 3, 7)
    x = jnp.array([0.3, 0.8])
    for internal in (0.2,):
        small = flows.JKOStep(SOURCE, SUPPORT, wavy, 0.7, 0.5, source_weights=a, support_weights=b, internal=internal)
        large = flows.JKOStep(
            *padded, wavy, 0.7, 0.5, internal=internal, source_weights=[*a, 0], support_weights=[*b, 0]
        )
        one, two = (bilevel.solve(s, x, s.initial()) for s in (small, large))
        np.testing.assert_allclose(large.next_weights(x, two.y)[:7], small.next_weights(x, one.y), rtol=1e-8)
        assert large.next_weights(x, two.y)[7] == 0
        np.testing.assert_array_equal(large.coupling(x, two.y)[5], 0)


def test_the_minimizer_beats_its_neighbours_and_an_interaction_moves_it():
    repel = lambda x, r: jnp.exp(-jnp.sum(r**2))
    x, a, b = jnp.array([0.3, 0.8]), np.full(5, 0.2), np.linspace(0.1, 0.2, 7)
    for kappa in (0.9, 0.2):
        step = flows.JKOStep(
            SOURCE, SUPPORT, wavy, 0.7, 0.5, source_weights=a, support_weights=b, internal=kappa, interaction=repel
        )
        found = bilevel.solve(step, x, step.initial())
        plan = np.asarray(step.coupling(x, found.y))
        squares = 0.5 * np.sum((SOURCE[:, None] - SUPPORT[None]) ** 2, -1)
        V = np.asarray(jax.vmap(lambda z: wavy(x, z))(jnp.asarray(SUPPORT)))
        U = np.exp(-np.sum((SUPPORT[:, None] - SUPPORT[None]) ** 2, -1))

        def energy(p, kappa=kappa, squares=squares, V=V, U=U):
            mu = p.sum(0)
            cost = np.sum(p * (squares + 0.7 * V)) + 0.35 * mu @ U @ mu
            return cost + 0.5 * np.sum(p * np.log(p / (a[:, None] * b))) + (kappa - 0.5) * np.sum(mu * np.log(mu / b))

        np.testing.assert_allclose(plan.sum(1), a, rtol=1e-8)
        for _ in range(10):
            move = RNG.normal(size=plan.shape)
            move -= plan * (move.sum(1) / plan.sum(1))[:, None]  # keeps rows
            move *= plan.min() / np.abs(move).max()
            sides = [energy(plan + t * move) - energy(plan) for t in (0.1, -0.1, 0.05, -0.05)]
            assert min(sides) > 0
            # the slope, third order removed
            assert abs(8 * (sides[2] - sides[3]) - (sides[0] - sides[1])) < 1e-3 * (sides[0] + sides[1])


def test_float32_and_casting():
    step = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), grid_step(0.1))
    x = jnp.asarray(CURVATURE, jnp.float32)
    found = bilevel.solve(step, x, step.initial())
    assert found.y.dtype == jnp.float32
    _, covariance = moments(np.asarray(step.next_weights(x, found.y), np.float64), GRID)
    expected = flows.gaussian.entropic_jko_step([MEAN], [[VARIANCE]], [[CURVATURE]], [CENTRE], TAU, EPSILON, 0.1)[1]
    np.testing.assert_allclose(covariance, expected, rtol=1e-3)


def test_new_data_of_the_same_shape_do_not_recompile():
    traces = []

    @eqx.filter_jit
    def run(step, x):
        traces.append(1)
        return step.optimality(x, step.initial())

    one = run(flows.JKOStep(SOURCE, SUPPORT, wavy, 0.7, 0.5), jnp.ones(2))
    two = run(flows.JKOStep(2 * SOURCE, SUPPORT, wavy, 0.8, 0.6, source_weights=np.arange(5.0)), jnp.ones(2))
    assert len(traces) == 1
    assert not np.allclose(one, two)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": np.zeros((0, 2))}, "`source` is empty"),
        ({"source": np.zeros(3)}, "points on a line have shape (n, 1)"),
        ({"support": np.zeros((3, 1))}, "`support` has dimension 1, but `source` has dimension 2"),
        ({"support": np.array([[0.0, np.nan]])}, "`support` has 1 entries that are NaN or infinite, the first at"),
        ({"step_size": 0.0}, "`step_size` must be positive, found 0"),
        ({"epsilon": -1.0}, "`epsilon` must be positive, found -1"),
        ({"internal": -0.1}, "`internal` must be at least 0"),
        ({"source_weights": [1.0, 2.0]}, "`source_weights` must have shape (5,)"),
        ({"support_weights": [-1.0, *[1.0] * 6]}, "`support_weights` must not be negative, entry 0 is -1"),
        ({"support_weights": np.zeros(7)}, "`support_weights` are all zero"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    arguments = {"source": SOURCE, "support": SUPPORT, "potential": wavy, "step_size": 0.7, "epsilon": 0.5} | change
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        flows.JKOStep(**arguments)
    assert str(error.value).startswith("flows.JKOStep: ")


def test_bad_potentials_are_named():
    with pytest.raises(TypeError, match="`potential` must be a function"):
        flows.JKOStep(SOURCE, SUPPORT, 3.0, 0.7, 0.5)
    hole = flows.JKOStep(SOURCE, np.vstack([SUPPORT, [[0.0, 0.0]]]), lambda x, z: jnp.log(z @ z), 0.7, 0.5)
    with pytest.raises(ValueError, match="`potential` is -inf, unbounded below on the support, at point 7"):
        bilevel.solve(hole, None, hole.initial())
    vector = flows.JKOStep(SOURCE, SUPPORT, lambda x, z: z, 0.7, 0.5)
    with pytest.raises(ValueError, match="must return one scalar at a point"):
        bilevel.solve(vector, None, vector.initial())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"covariance": [[1.0, 0.5], [0.0, 1.0]]}, "`covariance` must be symmetric"),
        (
            {"covariance": [[1.0, 2.0], [2.0, 1.0]]},
            "`covariance` must be positive definite; its smallest eigenvalue is -1",
        ),
        ({"Q": [[1.0]]}, "`Q` must have shape (2, 2), found (1, 1)"),
        ({"Q": [[-9.0, 0.0], [0.0, 1.0]]}, "unbounded below"),
        ({"mean": [0.0, np.nan]}, "`mean` has entries that are NaN"),
        ({"step_size": 0}, "`step_size` must be positive, found 0"),
        ({"epsilon": 2.0, "kappa": 0.0}, "the minimizer is degenerate"),
    ],
)
def test_bad_gaussians_are_named(change, message):
    arguments = {
        "mean": [0.0, 1.0], "covariance": [[1.0, 0.2], [0.2, 1.0]], "Q": [[1.0, 0.0], [0.0, 2.0]],
        "centre": [0.0, 0.0], "step_size": 0.5, "epsilon": 0.1, "kappa": 0.2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        flows.gaussian.entropic_jko_step(**(arguments | change))
