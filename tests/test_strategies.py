"""The engine on random problems whose hypergradients are known, and the strategies themselves."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel import testing

# beartype, which checks the annotations in our tests, rolls dice; hypothesis sees that and warns. No draw is of it.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

# One size: each shape compiles anew, and takes longer than all draws together.
PROBLEMS = {
    "quadratic": testing.quadratic_problems(size=2),
    "glm": testing.glm_problems(size=2),
    "fixed point": testing.fixed_points(size=2),
    "lasso": testing.lasso_problems(size=2),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_hypergradients_are_those_known(name):
    @given(PROBLEMS[name])
    def check(case):
        size = float(jnp.linalg.norm(case.hypergradient))
        found = bilevel.hypergradient(case.problem, case.x, case.y0, rtol=1e-7, atol=1e-9)
        wrong = float(jnp.linalg.norm(found.gradient - case.hypergradient))
        assert wrong <= max(1e-7 * size, 1e-9)
        # below this an error is round-off, that of terms cancelling in F included, which the estimate cannot see
        assert wrong <= max(3 * float(found.error), 1e-12 + 1e-14 * size)

    check()


@given(
    st.sampled_from([1.0, 10.0, 1e4]).flatmap(lambda c: st.tuples(st.just(c), testing.spd_operators(cond=c, size=3)))
)
def test_spd_operators(drawn):
    cond, operator = drawn
    assert lx.is_positive_semidefinite(operator)
    values = np.linalg.eigvalsh(np.asarray(operator.as_matrix()))
    np.testing.assert_allclose([values[-1], values[0]], [1, 1 / cond], rtol=1e-8)


@given(testing.pytrees())
def test_pytrees(tree):
    leaves = jax.tree.leaves(tree)
    assert leaves
    assert all(leaf.dtype == jnp.float64 and leaf.size > 0 for leaf in leaves)


@given(testing.measures(), testing.couplings())
def test_measures_and_couplings(measure, coupling):
    assert measure.points.shape[:1] == measure.weights.shape
    assert bool(jnp.all(measure.weights > 0))
    np.testing.assert_allclose([measure.weights.sum(), coupling.plan.sum()], 1, rtol=1e-12)
    np.testing.assert_allclose(coupling.plan.sum(1), coupling.a, rtol=1e-12)
    np.testing.assert_allclose(coupling.plan.sum(0), coupling.b, rtol=1e-12)
    assert bool(jnp.all(coupling.a > 0) & jnp.all(coupling.b > 0) & jnp.all(coupling.plan >= 0))


@given(testing.reparametrizations(), testing.pytrees(), testing.pytrees())
def test_reparametrizations(phi, x, y):
    back = phi.forward(x, phi.inverse(x, y))
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
