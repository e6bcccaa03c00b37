"""Proximal operators: values against jaxopt's, derivatives, weights that depend on x, trees, dtypes."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import prox

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt
    from jaxopt import projection

V = jnp.asarray([1.7, -0.3, 0.2, -2.5, 0.9, 0.05])
LABELS = np.array([0, 1, 0, 1, 2, 2])


def jaxopt_groups(v, w):
    out = v
    for g in range(3):
        out = out.at[LABELS == g].set(jaxopt.prox.prox_group_lasso(v[LABELS == g], w))
    return out


# name: (ours, jaxopt's at step 0.5)
CASES = {
    "l1": (prox.l1(1.2), lambda v: jaxopt.prox.prox_lasso(v, 1.2, 0.5)),
    "l1-each": (prox.l1(jnp.abs(V) + 0.1), lambda v: jaxopt.prox.prox_lasso(v, jnp.abs(V) + 0.1, 0.5)),
    "elastic": (prox.elastic_net(0.8, 0.4), lambda v: jaxopt.prox.prox_elastic_net(v, (0.8, 0.5), 0.5)),
    "group": (prox.group_lasso(1.5, LABELS), lambda v: jaxopt_groups(v, 0.75)),
    "group-axis": (prox.group_lasso(2.5), lambda v: jaxopt.prox.prox_group_lasso(v, 1.25)),
    "non-negative": (prox.non_negative(), lambda v: jaxopt.prox.prox_non_negative_ridge(v, 0.0)),
    "box": (prox.box(-0.4, 1.0), lambda v: projection.projection_box(v, (-0.4, 1.0))),
    "simplex": (prox.simplex(), lambda v: projection.projection_simplex(v)),
    "simplex-scaled": (prox.simplex(3.0), lambda v: projection.projection_simplex(v, 3.0)),
    "ball": (prox.l2_ball(1.1), lambda v: projection.projection_l2_ball(v, 1.1)),
    "ball-inside": (prox.l2_ball(50.0), lambda v: projection.projection_l2_ball(v, 50.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_jaxopts_and_the_derivative_is_between_zero_and_one(name):
    ours, theirs = CASES[name]
    with jax.numpy_dtype_promotion("standard"):
        expected = theirs(V)
    found = ours(None, V, jnp.asarray(0.5))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    D = jax.jacfwd(lambda v: ours(None, v, jnp.asarray(0.5)))(V)
    np.testing.assert_allclose(D, D.T, atol=1e-12)
    values = np.linalg.eigvalsh(D)
    assert values.min() > -1e-12
    assert values.max() < 1 + 1e-12
    e = 1e-6 * jnp.sin(jnp.arange(1.0, 7.0))
    change = ours(None, V + e, jnp.asarray(0.5)) - ours(None, V - e, jnp.asarray(0.5))
    np.testing.assert_allclose(2 * D @ e, change, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: prox.l1(w),
        lambda w: prox.elastic_net(w, w),
        lambda w: prox.group_lasso(w, LABELS),
        lambda w: prox.box(lambda x: -w(x), w),
        lambda w: prox.simplex(w),
        lambda w: prox.l2_ball(w),
    ],
)
def test_derivatives_flow_through_a_weight(make):
    at = lambda x: make(jnp.exp)(x, V, jnp.asarray(0.5))
    x = jnp.asarray(0.1)
    np.testing.assert_allclose(jax.jacfwd(at)(x), (at(x + 1e-6) - at(x - 1e-6)) / 2e-6, rtol=1e-8, atol=1e-9)


def test_trees_and_dtypes():
    tree = {"a": jnp.asarray([[2.0, -1.0], [0.1, 0.2]], jnp.float32), "b": jnp.asarray(0.7, jnp.float32)}
    t = jnp.asarray(0.5, jnp.float32)
    for op in (
        prox.l1(0.4), prox.l1({"a": jnp.ones((2, 2)), "b": 0.1}), prox.elastic_net(0.1, 0.2), prox.non_negative(),
        prox.box(-1.0, {"a": 0.5, "b": 0.3}), prox.simplex(2.0), prox.l2_ball(1.0),
    ):  # fmt: skip
        out = eqx.filter_jit(op)(None, tree, t)
        assert jax.tree.structure(out) == jax.tree.structure(tree)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out))
    flat = np.append(np.asarray(tree["a"]).ravel(), tree["b"])
    out = prox.simplex(2.0)(None, tree, t)
    assert abs(float(jnp.sum(out["a"]) + out["b"]) - 2) < 1e-6
    with jax.numpy_dtype_promotion("standard"):
        expected = projection.projection_simplex(jnp.asarray(flat), 2.0)
    np.testing.assert_allclose(np.append(out["a"].ravel(), out["b"]), expected, rtol=1e-6, atol=1e-7)
    rows = prox.group_lasso(jnp.asarray([0.1, 100.0]))(None, tree["a"], t)
    assert jnp.all(rows[1] == 0)
    assert jnp.all(rows[0] != 0)


def test_at_zero_nothing_is_nan():
    zero = jnp.zeros(6)
    for op, _ in CASES.values():
        value, tangent = jax.jvp(lambda v, op=op: op(None, v, jnp.asarray(0.5)), (zero,), (jnp.ones(6),))
        assert jnp.all(jnp.isfinite(value))
        assert jnp.all(jnp.isfinite(tangent))


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit a leaf of shape"):
        prox.l1(jnp.ones(5))(None, V, jnp.asarray(0.5))
    with pytest.raises(ValueError, match="must be one number"):
        prox.l2_ball(jnp.ones(2))(None, V, jnp.asarray(0.5))
    with pytest.raises(ValueError, match="integer labels"):
        prox.group_lasso(1.0, [0.5, 1.0])
    with pytest.raises(ValueError, match="do not fit y"):
        prox.group_lasso(1.0, [0, 1])(None, V, jnp.asarray(0.5))
    with pytest.raises(ValueError, match="a tree like y"):
        prox.l1((1.0, 2.0))(None, V, jnp.asarray(0.5))
