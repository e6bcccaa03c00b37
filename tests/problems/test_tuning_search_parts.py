"""What the search is made of: the rows' curvatures, the folds' inverses, coordinate descent on the folds' own data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model as sk

from problems.tuning import _search_families as families
from problems.tuning._coordinate_descent import _fit

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("name", ["squared", "logistic", "multinomial", "poisson", "hinge"])
def test_the_hessian_made_of_curvatures_is_the_hessian(name):
    losses, classes = getattr(families, name), 3 if name == "multinomial" else None
    X, weights = jnp.asarray(RNG.normal(size=(9, 2))), jnp.asarray(RNG.uniform(size=9))
    w = jnp.asarray(RNG.normal(size=(2,) if classes is None else (classes, 2)))
    targets = jnp.asarray(RNG.integers(0, 3, 9) * 1.0 if classes else RNG.choice([-1.0, 1.0], 9))

    def total(flat):
        return jnp.vdot(weights, losses(None, X, flat.reshape(w.shape), targets))

    np.testing.assert_allclose(
        losses.hessian(X, w, targets, weights), jax.hessian(total)(w.reshape(-1)), rtol=1e-10, atol=1e-12
    )


def test_coordinate_descent_takes_each_folds_own_rows_and_targets():
    X, targets = RNG.normal(size=(2, 20, 4)), RNG.normal(size=(2, 20))
    train = np.array([[1.0] * 12 + [0.0] * 8, [0.0] * 8 + [1.0] * 12]) / 12
    y, _ = _fit(X, targets, train, np.full(4, 0.1), np.zeros(()), np.zeros((2, 4)), np.asarray(1e-9))
    for k in range(2):
        rows = train[k] > 0
        alone = sk.Lasso(alpha=0.1, fit_intercept=False, tol=1e-12).fit(X[k, rows], targets[k, rows])
        np.testing.assert_allclose(y[k], alone.coef_, atol=1e-8)
