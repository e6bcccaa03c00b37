"""The inverse JKO loss: its laws, dense reference formulas, differences, and recovery."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from problems import flows

RNG = np.random.default_rng(3)
TAU, EPSILON = 0.4, 0.5
CLOUDS = [RNG.normal(size=(n, 2)) + [t / 2, 0] for t, n in enumerate((9, 8, 9))]
MASSES = [RNG.uniform(1, 2, size=len(z)) for z in CLOUDS]
THETA = jnp.asarray(RNG.normal(size=5))
RHOS = [0, 1.0, np.inf]


def problem(rho: float = 0, **options):
    return flows.InverseJKO(CLOUDS, flows.Quadratic(), TAU, EPSILON, **{"sharpening": rho, "weights": MASSES} | options)


def schroedinger(a, b, cost, epsilon):
    """Potentials and coupling of balanced entropic transport, by plain iterations."""
    f, g, K = np.zeros(len(a)), np.zeros(len(b)), np.exp(-cost / epsilon)
    for _ in range(5000):
        f = -epsilon * np.log(K @ (b * np.exp(g / epsilon)))
        g = -epsilon * np.log(K.T @ (a * np.exp(f / epsilon)))
    return f, g, a[:, None] * b * np.exp((f[:, None] + g - cost) / epsilon)


def semi_unbalanced(a, b, cost, epsilon, rho):
    """The coupling with rows a and columns penalized by rho KL(· | b), by plain iterations."""
    K, g = np.exp(-cost / epsilon), np.zeros(len(b))
    for _ in range(3000):
        f = -epsilon * np.log(K @ (b * np.exp(g / epsilon)))
        g = -(rho * epsilon / (rho + epsilon)) * np.log(K.T @ (a * np.exp(f / epsilon))) if rho else g
    return a[:, None] * b * np.exp((f[:, None] + g - cost) / epsilon)


def kl(p, q):
    return np.sum(p * np.log(p / q) - p + q)


def dense_loss(theta, rho):
    """(6.2): epsilon KL(balanced coupling | model) + rho KL(b | model's columns), or its limit."""
    total = 0.0
    for X, Y, a, b in zip(CLOUDS, CLOUDS[1:], MASSES, MASSES[1:], strict=False):
        a, b = a / a.sum(), b / b.sum()
        cost = 0.5 * np.sum((X[:, None] - Y[None]) ** 2, -1)
        w = TAU * np.asarray(jax.vmap(flows.Quadratic())(jnp.asarray(Y)) @ theta)
        _, g, balanced = schroedinger(a, b, cost, EPSILON)
        if np.isinf(rho):
            h = g + w
            total += 0.5 * (b @ h**2 - (b @ h) ** 2)
        else:
            plan = semi_unbalanced(a, b, cost + w, EPSILON, rho)
            total += EPSILON * kl(balanced, plan) + rho * kl(b, plan.sum(0))
    return total


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize(
    "rho", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow), np.inf]
)
def test_loss_gradient_and_hessian(rho):
    """The loss is its Bregman form, found densely; the derivatives are differences; all ways to a gradient agree."""
    model = problem(rho)
    for theta in (THETA, 0 * THETA):
        np.testing.assert_allclose(model.loss(theta), dense_loss(theta, rho), rtol=1e-8)
    value = jax.jit(lambda theta: model.loss(theta))
    gradient = jax.jit(jax.grad(lambda theta: model.loss(theta)))
    direction = jnp.asarray(RNG.normal(size=5))
    h = 1e-3
    for function, expected in ((value, gradient(THETA) @ direction), (gradient, model.hessian(THETA) @ direction)):
        at = lambda t, function=function: function(THETA + t * direction)
        found = (8 * (at(h) - at(-h)) - at(2 * h) + at(-2 * h)) / (12 * h)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    H = model.hessian(THETA)
    np.testing.assert_allclose(H, H.T, rtol=1e-12, atol=1e-14)
    values = np.linalg.eigvalsh(H)
    assert values[0] > 0
    np.testing.assert_allclose(model.conditioning(THETA), values[-1] / values[0], rtol=1e-10)
    assert isinstance(model.conditioning(THETA), float)

    found = bilevel.hypergradient(model, THETA, model.initial()[1], rtol=1e-8)
    np.testing.assert_allclose(found.value, model.loss(THETA), rtol=1e-9)
    np.testing.assert_allclose(found.gradient, gradient(THETA), rtol=1e-7)


@pytest.mark.parametrize(
    "rho", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow), np.inf]
)
def test_newton_finds_the_minimum_and_minimize_the_same(rho):
    model = problem(rho)
    found = model.newton()
    assert found.converged
    assert np.abs(jax.grad(model.loss)(found.x)).max() < 1e-10
    assert [s.value for s in found.history] == sorted((s.value for s in found.history), reverse=True)
    again = model.newton(found.x + 0.1)
    np.testing.assert_allclose(again.x, found.x, atol=1e-7)
    other = bilevel.minimize(model, *model.initial(), tol=1e-9)
    np.testing.assert_allclose(other.x, found.x, atol=1e-5)
    np.testing.assert_allclose(other.value, found.value, rtol=1e-9)


def test_the_loss_falls_with_sharpening_and_is_convex():
    ends = jnp.asarray(RNG.normal(size=(2, 5)))
    last = np.full(3, np.inf)
    for rho in (0, 0.3, 1.0, 10.0):
        model = problem(rho)
        values = np.array([model.loss(t) for t in (ends[0], ends.mean(0), ends[1])])
        assert values[1] < (values[0] + values[2]) / 2
        assert np.all((values >= 0) & (values <= last))
        last = values


def test_limits_in_rho():
    limit, soft = problem(np.inf), problem(0)
    gaps = {}
    for rho in (1e3, 1e4):
        model = problem(rho)
        pairs = (
            (rho * model.loss(THETA), limit.loss(THETA)),
            (rho * model.hessian(THETA), limit.hessian(THETA)),
            (model.newton(tol=1e-14).x, limit.newton().x),
        )
        gaps[rho] = [float(np.abs(a - b).max()) for a, b in pairs]
    np.testing.assert_allclose(np.array(gaps[1e3]) / gaps[1e4], 10, rtol=0.1)
    small = [problem(rho) for rho in (1e-5, 1e-6)]
    gaps = [np.abs(model.hessian(THETA) - soft.hessian(THETA)).max() for model in small]
    np.testing.assert_allclose(gaps[0] / gaps[1], 10, rtol=0.05)
    np.testing.assert_allclose(small[1].loss(THETA), soft.loss(THETA), rtol=1e-4)


# ------------------------------------------------------------------------------------------------ calibration


def calibrated():
    """Weights a, b under which the kappa = 0 step from a is exactly b: row and column sums of one positive matrix."""
    rng = np.random.default_rng(0)
    Y = np.array([[i, j] for i in range(3) for j in range(3)]) + 0.03 * rng.normal(size=(9, 2))
    theta = np.array([0.2, -0.1, 0.3, 0.4, 0.1])
    V = np.asarray(jax.vmap(flows.Quadratic())(jnp.asarray(Y)) @ theta)
    X = Y + 0.02 * rng.normal(size=Y.shape)
    C = 0.5 * np.sum((X[:, None] - Y[None]) ** 2, -1) + TAU * V
    K = np.exp(-(C - np.diag(C)[:, None]) / 0.06) * 9  # rows scaled: f = diag C + epsilon log 9
    a, b = np.linalg.solve(K.T, np.ones(9)), np.linalg.solve(K, np.ones(9))
    assert min(a.min(), b.min()) > 0
    return X, Y, a, b, theta


def test_snapshots_of_points_far_apart():
    """To round-off each point goes to its own image, so the balanced coupling is a permutation and its potentials are
    anyone's guess: the loss has them only in its value, the limit rho = inf itself."""
    grid = 2.0 * np.stack(np.meshgrid(range(5), range(5)), -1).reshape(-1, 2) - 4.0
    X = grid + np.random.default_rng(0).uniform(-0.3, 0.3, grid.shape)
    Y, epsilon, theta = X * np.linalg.norm(X, axis=1, keepdims=True), 0.05, THETA / 10
    step = 0.5 * np.sum((X[:, None] - Y[None]) ** 2, -1)
    log_model = -(step + TAU * np.asarray(jax.vmap(flows.Quadratic())(jnp.asarray(Y)) @ theta)) / epsilon
    log_model -= np.max(log_model, 1, keepdims=True)
    expected = -epsilon * np.mean(np.diag(log_model) - np.log(np.sum(np.exp(log_model), 1)))
    found = flows.InverseJKO([X, Y], flows.Quadratic(), TAU, epsilon)
    np.testing.assert_allclose(found.loss(theta), expected, rtol=1e-9)
    for clouds in ([X, Y], [grid, 1.3 * grid]):
        with pytest.raises(bilevel.NotConverged, match="its potentials may be wrong.*raise `epsilon`"):
            flows.InverseJKO(clouds, flows.Quadratic(), TAU, epsilon, sharpening=np.inf)


def test_the_loss_is_zero_at_the_truth_of_calibrated_data():
    X, Y, a, b, theta = calibrated()
    for rho in RHOS:
        model = flows.InverseJKO([X, Y], flows.Quadratic(), TAU, 0.06, sharpening=rho, weights=[a, b])
        assert abs(model.loss(theta)) < 1e-14
        found = model.newton()
        assert abs(found.value) < 1e-14
        np.testing.assert_allclose(found.x, theta, atol=1e-7)


@pytest.mark.parametrize(
    ("kappa", "rho", "fitted"),
    [
        (None, 0, False),
        pytest.param(0.8, np.inf, False, marks=pytest.mark.slow),
        pytest.param(0.8, 1.0, True, marks=pytest.mark.slow),  # the temperature unknown: the same point
    ],
)
def test_data_of_a_step_with_internal_energy_are_fitted_with_that_energy(kappa, rho, fitted):
    axis = np.linspace(-2, 2, 6)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    features = flows.Quadratic()
    theta = np.array([0.3, -0.2, 0.5, 0.8, 0.1])
    step = flows.JKOStep(
        CLOUDS[0], grid, lambda x, z: x @ features(z), TAU, EPSILON, internal=kappa, support_weights=np.full(36, 0.64)
    )
    b = step.next_weights(theta, bilevel.solve(step, theta, step.initial()).y)
    energy = EPSILON if kappa is None else kappa
    model = flows.InverseJKO(
        [CLOUDS[0], grid], features, TAU, EPSILON, sharpening=rho, weights=[np.ones(9), b],
        internal="fit" if fitted else energy, log_density=[np.log(b / 0.64)],
    )  # fmt: skip
    found = model.newton()
    np.testing.assert_allclose(found.x, [*theta, energy / TAU] if fitted else theta, atol=1e-6)
    assert fitted or abs(float(found.value)) < 1e-12


def test_an_interaction_is_a_frozen_field():
    pull = lambda r: jnp.stack([jnp.exp(-r @ r), r @ r])
    model = problem(1.0, interaction=pull)
    assert model.initial()[0].shape == (7,)
    field = []
    for Y, b in zip(CLOUDS[1:], MASSES[1:], strict=True):
        squares = np.sum((Y[:, None] - Y[None]) ** 2, -1)
        field.append(np.stack([np.exp(-squares) @ b, squares @ b], 1) / b.sum())
    for design, expected in zip(model.inner.designs or (), field, strict=True):
        np.testing.assert_allclose(design[:, 5:], expected, rtol=1e-12)
    assert model.potential(jnp.ones(7), jnp.ones(2)) == jnp.sum(flows.Quadratic()(jnp.ones(2)))


# ------------------------------------------------------------------------------------------------ penalties, others


def test_an_l1_penalty():
    weight = 0.02
    model = problem(1.0, penalty=flows.L1(weight))
    found = model.newton()
    assert found.converged
    gradient = np.asarray(jax.grad(model.loss)(found.x))
    zero = np.asarray(found.x) == 0
    assert 0 < zero.sum() < 5
    assert np.all(np.abs(gradient[zero]) <= weight)
    np.testing.assert_allclose(gradient[~zero], -weight * np.sign(found.x[~zero]), atol=1e-9)
    np.testing.assert_allclose(found.value, model.loss(found.x) + weight * np.abs(found.x).sum(), rtol=1e-12)


@pytest.mark.slow
def test_minimize_with_an_l1_penalty():
    model = problem(1.0, penalty=flows.L1(0.02))
    other = bilevel.minimize(model, *model.initial(), tol=1e-8, max_steps=2000)
    np.testing.assert_allclose(other.x, model.newton().x, atol=1e-4)


@pytest.mark.slow
def test_a_network_as_potential():
    network = eqx.nn.MLP(2, "scalar", 4, 1, activation=jax.nn.softplus, key=jax.random.key(0), dtype=jnp.float64)
    model = flows.InverseJKO(CLOUDS, flows.Neural(network), TAU, EPSILON)
    x0, y0 = model.initial()
    found = bilevel.minimize(model, x0, y0, max_steps=5)
    assert found.value < model.loss(x0)
    assert model.predict(found.x, CLOUDS[0], 2).shape == (3, 9, 2)
    with pytest.raises(ValueError, match=r"newton: this potential is not linear in x, its loss is not convex"):
        model.newton()


@pytest.mark.long
@pytest.mark.parametrize("rho", [0.0, np.inf])
def test_an_epsilon_beside_which_single_precision_does_not_see_the_costs_is_refused(rho):
    single = [z.astype(np.float32) for z in CLOUDS]
    with pytest.raises(bilevel.NotConverged, match="`epsilon` = 1e.07 is so large .* float32 .* lower `epsilon`, or"):
        flows.InverseJKO(single, flows.Quadratic(), TAU, 1e7, sharpening=rho)
    below, exact = (
        flows.InverseJKO(clouds, flows.Quadratic(), TAU, 1e3, sharpening=rho) for clouds in (single, CLOUDS)
    )
    found = bilevel.hypergradient(below, jnp.asarray(THETA, jnp.float32), below.initial()[1], rtol=1e-2).gradient
    expected = bilevel.hypergradient(exact, THETA, exact.initial()[1]).gradient
    assert jnp.linalg.norm(found.astype(float) - expected) <= 1e-3 * jnp.linalg.norm(expected)


@pytest.mark.slow  # a minute
def test_weights_of_zero_and_float32():
    padded = [np.vstack([z, [[9.0, 9.0]]]) for z in CLOUDS]
    masses = [np.append(w, 0.0) for w in MASSES]
    for rho in (1.0,):
        small = problem(rho)
        large = flows.InverseJKO(padded, flows.Quadratic(), TAU, EPSILON, sharpening=rho, weights=masses)
        np.testing.assert_allclose(large.newton().x, small.newton().x, atol=1e-8)
        single = flows.InverseJKO(
            [z.astype(np.float32) for z in CLOUDS], flows.Quadratic(), TAU, EPSILON, sharpening=rho, weights=MASSES
        )
        assert single.initial()[0].dtype == jnp.float32
        found = single.newton(tol=1e-5)
        assert found.converged
        assert found.x.dtype == jnp.float32
        np.testing.assert_allclose(found.x, small.newton().x, atol=2e-2)
        assert not single.newton(tol=1e-12).converged


def test_simulate_and_predict():
    well = lambda x, z: 0.5 * x * jnp.sum(z**2)
    path = flows.simulate(well, jnp.asarray(2.0), CLOUDS[0], steps=3, step_size=0.1)
    np.testing.assert_allclose(path, CLOUDS[0][None] * 0.8 ** np.arange(4)[:, None, None], rtol=1e-12)
    hot = flows.simulate(
        lambda x, z: 0 * z[0], None, np.zeros((4000, 2)), steps=2, step_size=0.1, temperature=0.5, key=jax.random.key(0)
    )
    np.testing.assert_allclose(hot[2].var(), 0.2, rtol=0.05)
    with pytest.raises(ValueError, match="needs a `key`"):
        flows.simulate(well, jnp.asarray(2.0), CLOUDS[0], steps=1, step_size=0.1, temperature=1.0)
    theta = flows.Quadratic.coefficients(2 * np.eye(2), np.zeros(2))
    path = problem().predict(theta, CLOUDS[0], 2, step_size=0.1)
    np.testing.assert_allclose(path[2], 0.64 * CLOUDS[0], rtol=1e-12)


def test_features():
    z = jnp.array([0.5, -2.0])
    Q, centre = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([0.3, 0.1])
    theta = flows.Quadratic.coefficients(Q, centre)
    difference = theta @ flows.Quadratic()(z) - 0.5 * (z - centre) @ Q @ (z - centre)
    np.testing.assert_allclose(difference, -0.5 * centre @ Q @ centre, rtol=1e-12)
    np.testing.assert_array_equal(flows.Quadratic.matrix(theta)[0], Q)
    np.testing.assert_allclose(flows.Polynomials(3)(z), [0.5, -2, 0.25, -1, 4, 0.125, -0.5, 2, -8], rtol=1e-12)
    np.testing.assert_allclose(flows.RadialBasis([[0.5, -2.0], [0.5, 0.0]], 2.0)(z), [1, np.exp(-0.5)], rtol=1e-12)
    fourier = flows.Fourier(2, period=3.0)
    assert fourier(z).shape == (24,)
    np.testing.assert_allclose(fourier(z), fourier(z + jnp.array([3.0, -6.0])), atol=1e-12)
    gram = jax.vmap(fourier)(jnp.asarray(np.stack(np.meshgrid(*[np.arange(12) / 4] * 2), -1).reshape(-1, 2)))
    np.testing.assert_allclose(gram.T @ gram / 144, np.eye(24) / 2, atol=1e-12)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snapshots": CLOUDS[:1]}, "`snapshots` must hold at least two snapshots, found 1"),
        ({"snapshots": [CLOUDS[0], np.zeros((0, 2))]}, "`snapshots`, number 1, is empty"),
        ({"snapshots": [CLOUDS[0], np.zeros((3, 1))]}, "`snapshots`, number 1, has dimension 1, but number 0 has"),
        ({"snapshots": [CLOUDS[0], np.array([[np.nan, 0.0]])]}, "number 1, has 1 entries that are NaN"),
        ({"step_size": 0}, "`step_size` must be positive, found 0"),
        ({"step_size": [0.1, 0.2, 0.3]}, "one for each of the 2 steps, found shape (3,)"),
        ({"epsilon": -0.1}, "`epsilon` must be positive, found -0.1"),
        ({"sharpening": -1}, "`sharpening` must be at least 0, found -1"),
        ({"internal": -1}, "`internal` must be at least 0, found -1"),
        ({"weights": [np.ones(9)]}, "`weights` must have one entry for each of 3 snapshots, found 1"),
        ({"features": lambda z: jnp.log(z[:1] * 0)}, "unbounded below"),
        ({"features": lambda z: z[0]}, "`features` must give one vector of K numbers"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    arguments = {"snapshots": CLOUDS, "features": flows.Quadratic(), "step_size": TAU, "epsilon": EPSILON} | change
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        flows.InverseJKO(**arguments)
    assert str(error.value).startswith("flows.InverseJKO")


def test_collinear_features_are_named_with_the_flat_direction():
    twins = lambda z: jnp.stack([z[0], z[1], 2 * z[0] + 3.0])
    constant = lambda z: jnp.stack([z[0], jnp.ones(())])
    for rho in (0, 1.0):
        with pytest.raises(ValueError, match=r"collinear .* flat direction theta = \+1 e_0 -0.5 e_2"):
            flows.InverseJKO(CLOUDS, twins, TAU, EPSILON, sharpening=rho).newton()
    with pytest.raises(ValueError, match="number 1 is constant on the snapshots"):
        flows.InverseJKO(CLOUDS, constant, TAU, EPSILON).newton()
    assert flows.InverseJKO(CLOUDS, constant, TAU, EPSILON, penalty=flows.L1(1e-3)).newton().converged
    model = flows.InverseJKO(CLOUDS, twins, TAU, EPSILON)
    with pytest.raises(ValueError, match=r"bilevel.minimize: .* flat direction theta = \+1 e_0 -0.5 e_2"):
        bilevel.minimize(model, *model.initial())
    H = np.asarray(model.hessian(jnp.ones(3)))
    np.testing.assert_allclose(H @ [1, 0, -0.5], 0, atol=1e-12)


def test_wrong_shapes_and_types():
    model = problem()
    with pytest.raises(ValueError, match=r"theta must have shape \(5,\), found \(4,\)"):
        bilevel.hypergradient(model, jnp.zeros(4), model.initial()[1])
    with pytest.raises(ValueError, match=r"`theta0` must have shape \(5,\)"):
        model.newton(np.zeros(3))
    with pytest.raises(TypeError, match="`penalty` must be None or"):
        problem(penalty=0.1)
    with pytest.raises(TypeError, match="`snapshots` must be a sequence"):
        flows.InverseJKO("abc", flows.Quadratic(), TAU, EPSILON)


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0, 1.0])
def test_recovery_on_calibrated_gaussians_has_slope_one_half(rho):
    m, S, tau, epsilon = np.array([1.0, 0.0]), np.array([[1.0, 0.3], [0.3, 0.8]]), 0.4, 0.1
    Q, centre = np.array([[1.0, 0.2], [0.2, 0.5]]), np.array([0.5, -0.3])
    mean, covariance = flows.gaussian.entropic_jko_step(m, S, Q, centre, tau, epsilon, 0.0)
    truth = flows.Quadratic.coefficients(Q, centre)
    sizes = [100, 200, 400, 800, 1600]
    errors = np.zeros((len(sizes), 30))
    for seed in range(30):
        rng = np.random.default_rng(seed)
        X, Y = rng.multivariate_normal(m, S, 1600), rng.multivariate_normal(mean, covariance, 1600)
        for k, n in enumerate(sizes):
            model = flows.InverseJKO([X[:n], Y[:n]], flows.Quadratic(), tau, epsilon, sharpening=rho)
            errors[k, seed] = np.linalg.norm(model.newton(tol=1e-8).x - truth)
    slope = np.polyfit(np.log(sizes), np.log(errors.mean(1)), 1)[0]
    print(f"rho = {rho}: mean errors {errors.mean(1).round(4)}, slope {slope:.3f}")
    assert abs(slope + 0.5) < 0.1
