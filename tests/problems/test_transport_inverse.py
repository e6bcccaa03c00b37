"""Inverse transport: losses, Hessians and estimates against differences, Poisson regression and proximal optimality."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from problems.transport import (
    L1,
    Box,
    EntropicOT,
    Group,
    InverseOT,
    NuclearNorm,
    PointCloudCost,
    Sign,
    UnbalancedOT,
)
from tests.problems._transport import derivative, kl, reference

RNG = np.random.default_rng(4)
K, N, M, EPSILON = 3, 6, 5, 0.5
FEATURES = RNG.normal(size=(K, N, M))
TRUTH = np.array([0.5, -0.3, 0.8])
A, B = RNG.uniform(0.5, 1.5, size=N), RNG.uniform(0.5, 1.5, size=M)
A, B = A / A.sum(), B / B.sum()
TAUS = {"balanced": (np.inf, np.inf), "unbalanced": (0.7, 1.2)}
THETA = jnp.asarray([0.2, 0.1, 0.4])


def weights(kind):
    return (A, B) if kind == "balanced" else (2 * A, B)


def coupling(kind, theta=TRUTH, features=FEATURES):
    return reference(np.tensordot(theta, features, 1), *weights(kind), EPSILON, *TAUS[kind])[0]


def problem(kind, rho: float = 0, **options):
    a, b = weights(kind)
    return InverseOT(FEATURES, coupling(kind), a, b, epsilon=EPSILON, tau=TAUS[kind], sharpening=rho, **options)


def energy(kind, theta, pi):
    """F_theta(pi), the marginal penalties included where they are finite."""
    a, b = weights(kind)
    value = np.sum(np.tensordot(theta, FEATURES, 1) * pi) + EPSILON * kl(pi, np.outer(a, b))
    for t, p, w in zip(TAUS[kind], (pi.sum(1), pi.sum(0)), (a, b), strict=True):
        value += t * kl(p, w) if t < np.inf else 0
    return value


@pytest.mark.long
@pytest.mark.parametrize("kind", TAUS)
def test_the_gap_is_the_gap_and_its_bregman_form(kind):
    theta = np.asarray(THETA)
    observed, model = coupling(kind), coupling(kind, theta)
    gap = energy(kind, theta, observed) - energy(kind, theta, model)
    loss = problem(kind).loss(THETA)
    np.testing.assert_allclose(loss, gap, rtol=1e-9)
    bregman = EPSILON * kl(observed, model)
    for t, axis in zip(TAUS[kind], (1, 0), strict=True):
        bregman += t * kl(observed.sum(axis), model.sum(axis)) if t < np.inf else 0
    np.testing.assert_allclose(loss, bregman, rtol=1e-9)
    gradient = jax.grad(problem(kind).loss)(THETA)
    np.testing.assert_allclose(gradient, np.tensordot(FEATURES, observed - model, 2), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rho", [0, 0.3, pytest.param(5.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", TAUS)
def test_losses_vanish_at_the_truth_and_are_convex(kind, rho):
    iot = problem(kind, rho)
    value_and_slope = jax.jit(jax.value_and_grad(iot.loss))
    value, slope = value_and_slope(jnp.asarray(TRUTH))
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(slope, 0, atol=1e-11)
    for seed in range(3):
        ends = TRUTH + np.random.default_rng(seed).normal(size=(2, K))
        left, right, middle = (float(value_and_slope(jnp.asarray(p))[0]) for p in (*ends, ends.mean(0)))
        assert 0 <= middle <= (left + right) / 2 + 1e-12
        if rho:
            assert float(value_and_slope(THETA)[0]) <= float(problem(kind).loss(THETA))


@pytest.mark.parametrize("kind", ["unbalanced", pytest.param("balanced", marks=pytest.mark.slow)])
def test_sharpened_loss_is_its_definition_and_its_derivative_in_rho(kind):
    """inf over pi of F_theta + rho KL(pi | observed), with the cost shifted by hand; dL/drho = -KL(pi | observed)."""
    a, b = weights(kind)
    observed, theta = coupling(kind), np.asarray(THETA)

    def least(rho):
        q = (np.outer(a, b) ** EPSILON * observed**rho) ** (1 / (EPSILON + rho))
        costs = np.tensordot(theta, FEATURES, 1) - (EPSILON + rho) * np.log(q / np.outer(a, b))
        pi = reference(costs, a, b, EPSILON + rho, *TAUS[kind])[0]
        return energy(kind, theta, pi) + rho * kl(pi, observed), pi

    base = energy(kind, theta, observed)
    for rho in (0.3, 5.0):
        np.testing.assert_allclose(problem(kind, rho).loss(THETA), base - least(rho)[0], rtol=1e-9)
    loss = lambda rho: InverseOT(
        FEATURES, observed, a, b, epsilon=EPSILON, tau=TAUS[kind], sharpening=rho
    ).loss(THETA)  # fmt: skip
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.3), -kl(least(0.3)[1], observed), rtol=1e-7)


def test_limits_in_rho():
    """rho -> 0: the gap; rho -> infinity: rho L -> half the variance of the first variation under the observation."""
    observed, theta = coupling("balanced"), np.asarray(THETA)
    np.testing.assert_allclose(problem("balanced", 1e-7).loss(THETA), problem("balanced").loss(THETA), rtol=1e-5)
    h = np.tensordot(theta, FEATURES, 1) + EPSILON * np.log(observed / np.outer(A, B))
    # on the tangent space of the marginals: what is left of h after functions of one side (weighted least squares)
    design = np.vstack([np.kron(np.eye(N), np.ones(M)), np.kron(np.ones(N), np.eye(M))]).T
    root = np.sqrt(observed.ravel())
    rest = root * h.ravel() - root * (design @ np.linalg.lstsq(root[:, None] * design, root * h.ravel(), rcond=None)[0])
    limit = 0.5 * rest @ rest
    gaps = [abs(rho * float(problem("balanced", rho).loss(THETA)) - limit) for rho in (1e2, 1e3)]
    assert gaps[1] < 0.12 * gaps[0] < 0.02 * limit


@pytest.mark.parametrize(
    ("kind", "rho"),
    [
        ("balanced", 0.3),
        ("unbalanced", 0),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("balanced", 0), ("unbalanced", 0.3))),
    ],
)
def test_hessian_is_exact(kind, rho):
    iot = problem(kind, rho)
    H = np.asarray(iot.hessian(THETA))
    slope = jax.jit(jax.grad(iot.loss))
    expected = np.stack([derivative(lambda s, e=e: slope(THETA + s * e), 0.02) for e in jnp.eye(K)])
    np.testing.assert_allclose(H, expected, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(H, H.T)
    assert np.linalg.eigvalsh(H)[0] > 0
    pi = np.asarray(iot.inner.coupling(THETA, bilevel.solve(iot.inner, THETA, iot.inner.initial()).y))
    flat = FEATURES.reshape(K, -1)
    bound = (flat * pi.ravel()) @ flat.T / (EPSILON + rho)
    assert np.linalg.eigvalsh(bound - H)[0] > -1e-12  # second moments of the features


@pytest.mark.slow
def test_functions_of_one_side_are_flat_when_balanced_and_curved_when_not():
    u, w = RNG.normal(size=(N, 1)), RNG.normal(size=(1, M))
    features = np.stack([FEATURES[0], u + 0 * w, w + 0 * u, np.ones((N, M))])
    theta = jnp.asarray([0.3, 0.0, 0.0, 0.0])
    for kind, (t1, t2) in TAUS.items():
        a, b = weights(kind)
        observed = coupling(kind)
        iot = InverseOT(features, observed, a, b, epsilon=EPSILON, tau=(t1, t2))
        H = np.asarray(iot.hessian(theta))
        if kind == "balanced":
            np.testing.assert_allclose(H[1:], 0, atol=1e-12)
            slope = jax.grad(iot.loss)(theta)
            np.testing.assert_allclose(slope[1:], 0, atol=1e-10)
            for call in (lambda i=iot: i.newton(), lambda i=iot: bilevel.minimize(i, *i.initial())):
                with pytest.raises(ValueError, match=r"not identified: the loss is flat along"):
                    call()
        else:
            assert np.linalg.eigvalsh(H)[0] > 1e-3
            mass = float(jnp.sum(iot.inner.marginals(theta, bilevel.solve(iot.inner, theta, iot.inner.initial()).y)[0]))
            np.testing.assert_allclose(H[3, 3], mass / (EPSILON + t1 + t2), rtol=1e-8)


def test_collinear_features_are_refused_with_the_direction():
    features = FEATURES.copy()
    features[2] = features[0] - 2 * features[1]
    iot = InverseOT(features, coupling("balanced"), epsilon=EPSILON)
    for call in (lambda: iot.newton(), lambda: bilevel.minimize(iot, *iot.initial())):
        with pytest.raises(ValueError, match=re.escape("features[0]")) as error:
            call()
        numbers = re.findall(r"moved by \[(.*?)\]", str(error.value))[0].split()
        v = np.array([float(n) for n in numbers])
        np.testing.assert_allclose(v / v[2], [-1, 2, 1], rtol=1e-3)


# ------------------------------------------------------------------------------------------------ estimates


@pytest.mark.parametrize("rho", [0, 0.3])
@pytest.mark.parametrize("kind", TAUS)
def test_newton_and_minimize_find_the_truth(kind, rho):
    iot = problem(kind, rho)
    result = iot.newton()
    assert result.converged
    assert np.max(np.abs(result.gradient)) <= 1e-10
    np.testing.assert_allclose(result.x, TRUTH, rtol=1e-8)
    assert "converged=True" in repr(result)
    if rho == 0:
        other = bilevel.minimize(iot, *iot.initial(), tol=1e-9)
        np.testing.assert_allclose(other.x, TRUTH, rtol=1e-6)


def poisson(counts, features, epsilon):
    """Poisson regression with two-way fixed effects by dense Newton steps: (theta, standard errors)."""
    n, m = counts.shape
    dummies = [np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))[1:]]
    X = np.vstack([-features.reshape(len(features), -1) / epsilon, *dummies]).T
    y, beta = counts.ravel(), np.zeros(X.shape[1])
    beta[len(features) : len(features) + n] = np.log(counts.mean())
    for _ in range(60):
        mu = np.exp(X @ beta)
        beta = beta + np.linalg.solve(X.T @ (mu[:, None] * X), X.T @ (y - mu))
    covariance = np.linalg.inv(X.T @ (np.exp(X @ beta)[:, None] * X))
    return beta[: len(features)], np.sqrt(np.diag(covariance))[: len(features)]


def test_balanced_inverse_transport_is_poisson_regression():
    counts = RNG.multinomial(2000, coupling("balanced").ravel() / coupling("balanced").sum()).reshape(N, M)
    theta, errors = poisson(counts.astype(float), FEATURES, EPSILON)
    pairs = np.repeat(np.argwhere(counts >= 0), counts.ravel(), axis=0)
    for iot in (
        InverseOT(FEATURES, counts, epsilon=EPSILON),
        InverseOT.from_samples(FEATURES, pairs, epsilon=EPSILON),
    ):
        result = iot.newton()
        np.testing.assert_allclose(result.x, theta, rtol=1e-8)
        np.testing.assert_allclose(iot.standard_errors(result.x), errors, rtol=1e-7)
    assert iot.count == 2000


def test_standard_errors_are_the_spread_of_estimates():
    """Unbalanced: the sandwich, against 300 estimates to first order, H^-1 features'(counts / N - pi)."""
    pi, (a, b) = coupling("unbalanced"), weights("unbalanced")
    iot = InverseOT(FEATURES, pi, a, b, epsilon=EPSILON, tau=TAUS["unbalanced"])
    count = int(400 * pi.sum())
    H = np.asarray(iot.hessian(jnp.asarray(TRUTH)))
    draws = RNG.poisson(pi * count / pi.sum(), size=(4000, N, M)) * pi.sum() / count
    spread = np.std(np.linalg.solve(H, np.tensordot(FEATURES, draws, ((1, 2), (1, 2)))), axis=1)
    np.testing.assert_allclose(iot.standard_errors(TRUTH, count=count), spread, rtol=0.05)
    with pytest.raises(ValueError, match="not known to be a sample"):
        iot.standard_errors(TRUTH)


@pytest.mark.long
@pytest.mark.parametrize(
    "penalty",
    [
        L1(np.array([0.0, 0.2, 0.01])),
        *(pytest.param(p, marks=pytest.mark.slow) for p in (L1(0.05), Group(0.05, [0, 1, 0]), Box(-0.1, 0.3), Sign(1))),
    ],
    ids=lambda p: type(p).__name__,
)
def test_penalised_estimates_satisfy_their_optimality(penalty):
    iot = problem("balanced", 0, penalty=penalty)
    result = iot.newton()
    assert result.converged
    slope = np.asarray(jax.grad(problem("balanced").loss)(result.x))
    np.testing.assert_allclose(result.gradient, slope, atol=1e-9)
    x = np.asarray(result.x)
    if isinstance(penalty, L1):
        weight = np.broadcast_to(np.asarray(penalty.weight), x.shape)
        assert np.all(np.abs(slope) <= weight * (1 + 1e-6) + 1e-12)
        np.testing.assert_allclose(slope[x != 0], -(weight * np.sign(x))[x != 0], rtol=1e-6, atol=1e-10)
    other = bilevel.minimize(iot, *iot.initial(), tol=1e-8)
    np.testing.assert_allclose(other.x, x, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.value, other.value, rtol=1e-7)


def test_a_low_rank_affinity_by_the_nuclear_norm():
    P, Q = RNG.normal(size=(N, 2)), RNG.normal(size=(M, 2))
    features = -np.einsum("ip,jq->pqij", P, Q).reshape(4, N, M)
    truth = np.outer([1.0, 0.5], [0.6, -0.8]).ravel()
    observed = reference(np.tensordot(truth, features, 1), A, B, EPSILON)[0]
    iot = InverseOT(features, observed, epsilon=EPSILON, penalty=NuclearNorm(0.02, (2, 2)))
    result = iot.newton()
    assert result.converged
    singular = np.linalg.svd(np.asarray(result.x).reshape(2, 2), compute_uv=False)
    assert singular[1] < 1e-9 < 0.3 < singular[0]


@pytest.mark.long
def test_an_outer_function_of_the_coupling():
    """Any: here the squared error, whose hypergradient needs the adjoint."""
    observed = coupling("balanced")
    iot = InverseOT(FEATURES, observed, epsilon=EPSILON, outer=lambda theta, pi: 50 * jnp.sum((pi - observed) ** 2))
    moved = lambda s, e: 50 * np.sum((coupling("balanced", np.asarray(THETA) + s * e) - observed) ** 2)
    expected = [derivative(lambda s, e=e: moved(s, e), 0.02) for e in np.eye(K)]
    found = bilevel.hypergradient(iot, THETA, iot.initial()[1], rtol=1e-8)
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-7)
    np.testing.assert_allclose(iot.loss(THETA), found.value, rtol=1e-9)
    np.testing.assert_allclose(bilevel.minimize(iot, *iot.initial(), tol=1e-8).x, TRUTH, rtol=1e-4)


@pytest.mark.slow
def test_features_may_be_a_function():
    iot = InverseOT(
        lambda theta: jnp.tensordot(theta, jnp.asarray(FEATURES), 1), coupling("balanced"), epsilon=EPSILON,
        theta0=np.zeros(K), sharpening=0.3,
    )  # fmt: skip
    given = problem("balanced", 0.3)
    np.testing.assert_allclose(iot.loss(THETA), given.loss(THETA), rtol=1e-10)
    np.testing.assert_allclose(iot.hessian(THETA), given.hessian(THETA), rtol=1e-6)


@pytest.mark.long
def test_samples_of_point_clouds_need_no_matrix():
    """The loss and its gradient are those of the matrix of frequencies."""
    P, Q = RNG.normal(size=(N, 2)), RNG.normal(size=(M, 2))
    pairs = RNG.integers(0, (N, M), size=(60, 2))
    pairs = np.concatenate([pairs, np.stack([np.arange(N), np.arange(N) % M], axis=1)])  # every point is seen
    cost = PointCloudCost(P, Q, "bilinear")
    sparse = InverseOT.from_samples(cost, pairs, epsilon=EPSILON)
    counts = np.zeros((N, M))
    np.add.at(counts, tuple(pairs.T), 1.0)
    dense = InverseOT(-np.einsum("ip,jq->pqij", P, Q).reshape(4, N, M), counts / len(pairs), epsilon=EPSILON)
    A0 = jnp.asarray(RNG.normal(size=(2, 2)))
    value, slope = jax.value_and_grad(sparse.loss)(A0)
    expected, expected_slope = jax.value_and_grad(dense.loss)(A0.reshape(-1))
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(slope.reshape(-1), expected_slope, rtol=1e-7, atol=1e-10)
    assert sparse.count == len(pairs)
    with pytest.raises(ValueError, match="`sharpening` and `outer` need the coupling as a matrix"):
        InverseOT.from_samples(cost, pairs, epsilon=EPSILON, sharpening=0.5)
    for kind, point in (("mahalanobis", jnp.eye(2)), (lambda x, p, q: jnp.sum(jnp.abs(x * (p - q))), jnp.ones(()))):
        costs = PointCloudCost(P, Q, kind)
        some = costs.pairs(point).at(jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1]))
        np.testing.assert_allclose(some, costs(point)[pairs[:, 0], pairs[:, 1]], rtol=1e-10)


def test_single_precision():
    iot = InverseOT(FEATURES.astype(np.float32), coupling("balanced").astype(np.float32), epsilon=EPSILON)
    result = iot.newton(tol=1e-5)
    assert result.x.dtype == jnp.float32
    np.testing.assert_allclose(result.x, TRUTH, rtol=1e-3)


# ------------------------------------------------------------------------------------------------ bad input

GOOD = coupling("balanced")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InverseOT(FEATURES, GOOD[1:], epsilon=1.0), "`coupling` has shape (5, 5), but `features` has (6, 5)"),
        (lambda: InverseOT(FEATURES, -GOOD, epsilon=1.0), "`coupling` has negative entries, the first is -"),
        (lambda: InverseOT(FEATURES, 0 * GOOD, epsilon=1.0), "all entries of `coupling` are zero"),
        (lambda: InverseOT(FEATURES, GOOD[0], epsilon=1.0), "`coupling` must have two axes, found shape (5,)"),
        (lambda: InverseOT(FEATURES[0], GOOD, epsilon=1.0), "`features` must have shape (K, n, m), found (6, 5)"),
        (lambda: InverseOT(np.nan * FEATURES, GOOD, epsilon=1.0), "`features` has 90 entries that are NaN"),
        (lambda: InverseOT(FEATURES, GOOD, 2 * A, 2 * B, epsilon=1.0), "`coupling` must have the mass of `a`"),
        (lambda: InverseOT(FEATURES, GOOD, A[1:], B, epsilon=1.0), "`a` has 5 entries, but `coupling` has 6"),
        (lambda: InverseOT(FEATURES, GOOD, -A, B, epsilon=1.0), "`a` has 6 negative weights"),
        (lambda: InverseOT(FEATURES, GOOD, epsilon=0.0), "`epsilon` must be positive"),
        (lambda: InverseOT(FEATURES, GOOD, epsilon=1.0, tau=1.0), "pass `a`: with a finite `tau`"),
        (lambda: InverseOT(FEATURES, GOOD, A, B, epsilon=1.0, tau=-1.0), "`tau` must be positive"),
        (lambda: InverseOT(FEATURES, GOOD, epsilon=1.0, sharpening=-1.0), "`sharpening` must be positive"),
        (lambda: InverseOT(FEATURES, GOOD, epsilon=1.0, penalty=L1(np.ones(2))), "`weight` has shape (2,)"),
        (lambda: InverseOT(FEATURES, GOOD, epsilon=1.0, penalty=Group(1.0, [0, 1])), "has 2 group labels"),
        (lambda: InverseOT(FEATURES, GOOD, epsilon=1.0, penalty=NuclearNorm(1.0, (2, 2))), "does not hold the 3"),
        (lambda: InverseOT(lambda t: t, GOOD, epsilon=1.0), "pass `theta0`"),
        (lambda: InverseOT(FEATURES, GOOD, np.roll(np.eye(N)[0], 1), B, epsilon=1.0), "has mass at ("),
        (lambda: InverseOT.from_samples(FEATURES, [[0, 9]], epsilon=1.0), "the first is (0, 9)"),
        (lambda: InverseOT.from_samples(FEATURES, [[0.0, 1.0]], epsilon=1.0), "must hold integer indices"),
        (lambda: InverseOT.from_samples(FEATURES, [0, 1], epsilon=1.0), "must have shape (N, 2), found (2,)"),
        (lambda: problem("balanced").newton(tol=0.0), "`tol` must be a positive number"),
        (lambda: problem("balanced").newton(np.zeros(2)), "`theta0` must have shape (3,), found (2,)"),
        (lambda: L1(-1.0), "L1: `weight` must be finite and at least 0"),
        (lambda: Box(1.0, 0.0), "`lower` must be at most `upper`"),
        (lambda: Sign(2), "`signs` must be 1, -1 or 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_repr_says_what_it_is():
    assert repr(problem("balanced", 0.3)) == (
        "InverseOT(theta of shape (3,), EntropicOT(6 x 5 points, epsilon=0.8), sharpened gap)"
    )
    assert isinstance(problem("balanced").inner, EntropicOT)
    assert isinstance(problem("unbalanced").inner, UnbalancedOT)
