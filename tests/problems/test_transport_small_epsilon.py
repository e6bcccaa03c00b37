"""Transport with a small epsilon: how far it goes in either precision, and that it says where that ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from problems.transport import EntropicOT
from tests.problems._transport import SQUARES, Affine


@pytest.mark.parametrize(("dtype", "smallest"), [(np.float64, 1e-3), (np.float32, 1e-2)])
def test_epsilon_may_be_small(dtype, smallest):
    """The same program at every epsilon; the value tends to that of the linear program (HiGHS)."""
    C = jnp.asarray(SQUARES, dtype)
    weights = jnp.full(40, 1 / 40, dtype)
    cost = Affine(C, jnp.zeros_like(C))
    exact = linear_program(SQUARES, np.asarray(weights, float), np.asarray(weights, float))
    gaps = []
    for share in (1.0, 0.1, 1e-2, 1e-3):
        if share < smallest:
            break
        epsilon = share * float(np.median(SQUARES))
        ot = EntropicOT(cost, weights, weights, epsilon)
        solution = bilevel.solve(ot, jnp.asarray(0.0, dtype), ot.initial())
        rows, columns = ot.marginals(jnp.asarray(0.0, dtype), solution.y)
        violation = float(jnp.sum(jnp.abs(rows - weights)) + jnp.sum(jnp.abs(columns - weights)))
        assert violation <= (1e-10 if dtype == np.float64 else 3e-5)
        gaps.append(float(ot.value(jnp.asarray(0.0, dtype), solution.y)) - exact)
    assert gaps[-1] < gaps[0]
    assert -1e-5 < gaps[-1] < smallest * float(np.median(SQUARES)) * np.log(40) + 1e-5


def linear_program(C, a, b):
    from scipy.optimize import linprog

    n, m = C.shape
    equal = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    return linprog(C.ravel(), A_eq=equal, b_eq=np.concatenate([a, b]), bounds=(0, None), method="highs").fun


def test_where_single_precision_ends_it_says_so():
    C = jnp.asarray(SQUARES, jnp.float32)
    weights = jnp.full(40, 1 / 40, jnp.float32)
    ot = EntropicOT(Affine(C, jnp.zeros_like(C)), weights, weights, 1e-4 * float(np.median(SQUARES)))
    solution = bilevel.solve(ot, jnp.asarray(0.0, jnp.float32), ot.initial(), throw=False, rtol=1e-7)
    assert not solution.converged
    assert str(solution.status) in ("round_off", "singular", "max_steps", "correction_rejected")


@pytest.mark.long
def test_parts_that_hardly_see_each_other():
    """f_1 - f_2 = x (c_12 - c_21) / 2 for two points on each side, at every epsilon; marginals hardly show it."""
    weights, costs = jnp.full(2, 0.5), jnp.asarray([[0.0, 1.0], [1.4, 0.0]])
    difference = lambda y: y[0][0] - y[0][1]
    transport = lambda epsilon: EntropicOT(jax.tree_util.Partial(jnp.multiply, costs), weights, weights, epsilon)

    @jax.jit
    def at(epsilon):
        ot = transport(epsilon)
        measured = bilevel.hypergradient(
            bilevel.BilevelProblem(ot, lambda x, y: difference(y)), jnp.asarray(1.0), ot.initial(), throw=False
        )
        solution = lambda x: bilevel.solve(ot, x, ot.initial(), throw=False)
        slope = jax.grad(lambda x: difference(solution(x).y))(jnp.asarray(1.0))
        found = solution(jnp.asarray(1.0))
        return difference(found.y), slope, found.converged, measured.gradient, measured.converged

    refused = 0
    for epsilon, rtol in ((0.1, 1e-7), (0.07, 1e-7), (0.05, 1e-5), (0.045, 1e-3), (0.04, 3e-3), (0.035, 0), (0.02, 0)):
        value, slope, converged, gradient, certified = at(epsilon)
        assert not certified or abs(float(gradient) + 0.2) < 1e-6
        if rtol == 0:  # round-off in the marginals hides what the potentials are
            refused += np.isnan(slope)
            continue
        assert converged
        np.testing.assert_allclose([value, slope], -0.2, rtol=rtol)
    assert refused == 2


@pytest.mark.long
def test_no_sweeps_after_round_off():
    """Where epsilon is small and the accuracy asked for is out of reach, the solver is not asked for it again."""
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 0.5
    distances = lambda points: jnp.sum((points[:, None] - target[None]) ** 2, axis=2)
    epsilon = 0.02 * float(np.median(distances(source)))
    ot = EntropicOT(distances, np.full(100, 0.01), np.full(100, 0.01), epsilon)
    problem = bilevel.BilevelProblem(ot, lambda x, y: jnp.sum(jnp.square(ot.coupling(x, y) @ target * 100 - x)))
    found = bilevel.hypergradient(problem, jnp.asarray(source), ot.initial(), rtol=1e-9, throw=False)
    assert found.status == "round_off"
    assert int(found.steps) < 500
