"""Ridge and logistic tuning against closed forms, scikit-learn, and differences of inner solutions found here."""

import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import sklearn.linear_model as sk
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, StratifiedKFold

import bilevel
import problems
from bilevel.linear import linear_system
from problems.tuning import LogisticTuning, MultinomialTuning, RidgeTuning
from problems.tuning._criteria import CrossValidation
from problems.tuning._foldwise import Foldwise

N, P, GROUPS = 41, 4, (0, 1, 1, 0)
RNG = np.random.default_rng(7)
X = RNG.normal(size=(N, P)) * [1.0, 2.0, 0.5, 1.0]
B = X @ [1.0, -0.5, 0.0, 2.0] + RNG.normal(size=N)
LABELS = (B > 0).astype(int)
X_VAL = RNG.normal(size=(23, P))
B_VAL = X_VAL @ [1.0, -0.5, 0.0, 2.0] + RNG.normal(size=23)
SHUFFLED = {"shuffle": True, "random_state": 0}
PENALTIES = np.array([0.3, -1.0, 2.0, -0.2])


@eqx.filter_jit
def minimizer(problem, x):
    """The inner solution by dense Newton steps from zero, without the engine."""
    start = problem.inner.initial()
    objective = lambda v: problem.inner.objective(x, v.reshape(start.shape))
    step = lambda _, v: v - jnp.linalg.solve(jax.hessian(objective)(v), jax.grad(objective)(v))
    return jax.lax.fori_loop(0, 12, step, start.reshape(-1)).reshape(start.shape)


def differences(problem, x, h=1e-4):
    """Central differences (of fourth order) of the outer value in x, the inner problem solved anew at each point."""
    value = lambda x: float(problem.outer(x, minimizer(problem, x)))
    found = np.empty(x.shape)
    for i in np.ndindex(*x.shape):
        at = lambda t, i=i: value(x.at[i].add(t) if x.shape else x + t)
        found[i] = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    return found


def ridge_closed_form(train, b, judge, b_judge, x):
    """Weights, half the mean squared error on (judge, b_judge), and its gradient in x."""
    n, p = train.shape
    a = train.T @ train / n + np.diag(np.exp(x)) / p
    w = np.linalg.solve(a, train.T @ b / n)
    rest = judge @ w - b_judge
    v = np.linalg.solve(a, judge.T @ rest / len(rest))
    return w, np.mean(rest**2) / 2, -v * np.exp(x) * w / p


# ------------------------------------------------------------------------------------------------ ridge


def test_ridge_on_a_validation_set_is_its_closed_form():
    problem = RidgeTuning(X, B, X_VAL, B_VAL)
    x0, y0 = problem.initial()
    assert (x0.shape, y0.shape) == ((P,), (P,))
    found = bilevel.estimate(problem, jnp.asarray(PENALTIES), minimizer(problem, jnp.asarray(PENALTIES)))
    weights, value, gradient = ridge_closed_form(X, B, X_VAL, B_VAL, PENALTIES)
    np.testing.assert_allclose(found.y, weights, rtol=1e-10)
    np.testing.assert_allclose(found.value, value, rtol=1e-10)
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-8)
    np.testing.assert_allclose(problem.predict(found.y, X_VAL), X_VAL @ weights, rtol=1e-10)


def test_ridge_folds_are_the_average_of_closed_forms_for_every_kind_of_penalties():
    parts = [ridge_closed_form(X[a], B[a], X[b], B[b], PENALTIES) for a, b in KFold(5, **SHUFFLED).split(X)]
    weights, value, gradient = (np.array(part) for part in zip(*parts, strict=True))
    problem = RidgeTuning(X, B, cv=5)
    assert problem.initial()[1].shape == (5, P)
    found = bilevel.estimate(problem, jnp.asarray(PENALTIES), minimizer(problem, jnp.asarray(PENALTIES)))
    np.testing.assert_allclose(found.y, weights, rtol=1e-10)
    np.testing.assert_allclose(found.value, value.mean(), rtol=1e-10)
    np.testing.assert_allclose(found.gradient, gradient.mean(0), rtol=1e-8)

    # a penalty that several features share: the sum of their derivatives
    rows = KFold(5, **SHUFFLED).split(X)
    each = np.mean([ridge_closed_form(X[a], B[a], X[b], B[b], np.full(P, 0.4))[2] for a, b in rows], 0)
    shared = RidgeTuning(X, B, cv=5, penalties="shared")
    grouped = RidgeTuning(X, B, cv=5, groups=GROUPS)
    assert (shared.initial()[0].shape, grouped.initial()[0].shape) == ((), (2,))
    for model, x, expected in (
        (shared, jnp.asarray(0.4), each.sum()),
        (grouped, jnp.asarray([0.4, 0.4]), [each[0] + each[3], each[1] + each[2]]),
    ):
        found = bilevel.estimate(model, x, minimizer(model, x))
        assert found.converged
        np.testing.assert_allclose(found.gradient, expected, rtol=1e-9)


def test_refit_is_scikit_learns_ridge_on_all_rows():
    for problem in (RidgeTuning(X, B, cv=5, penalties="shared"), RidgeTuning(X, B, X_VAL, B_VAL, penalties="shared")):
        reference = sk.Ridge(alpha=N * np.exp(0.7) / P, fit_intercept=False).fit(X, B)
        weights = problem.refit(jnp.asarray(0.7))
        np.testing.assert_allclose(weights, reference.coef_, rtol=1e-6)
        np.testing.assert_allclose(problem.predict(weights, X_VAL), reference.predict(X_VAL), rtol=1e-6)


def test_folds_of_unequal_size_with_repeated_rows():
    pairs = [([0, 1, 2, 3, 4, 5, 5], [10, 11, 12]), (np.arange(20, 40), [0]), (np.arange(15), np.arange(15, N))]
    problem = RidgeTuning(X, B, cv=pairs)
    parts = [ridge_closed_form(X[a], B[a], X[b], B[b], PENALTIES) for a, b in pairs]
    y = minimizer(problem, jnp.asarray(PENALTIES))
    np.testing.assert_allclose(y, [part[0] for part in parts], rtol=1e-9)
    np.testing.assert_allclose(problem.outer(PENALTIES, y), np.mean([part[1] for part in parts]), rtol=1e-9)
    np.testing.assert_allclose(problem.predict(y, X_VAL), np.mean(X_VAL @ np.array(y).T, axis=1), rtol=1e-12)


def test_leave_one_out():
    problem = RidgeTuning(X[:9], B[:9], cv=9)
    y = minimizer(problem, jnp.asarray(PENALTIES))
    parts = [
        ridge_closed_form(np.delete(X[:9], i, 0), np.delete(B[:9], i), X[i : i + 1], B[i : i + 1], PENALTIES)[1]
        for i in range(9)
    ]
    np.testing.assert_allclose(problem.outer(PENALTIES, y), np.mean(parts), rtol=1e-9)


# ------------------------------------------------------------------------------------------------ logistic


def test_logistic_folds_are_scikit_learns_fits_and_the_gradient_is_that_of_their_loss():
    problem = LogisticTuning(X, LABELS, cv=3, groups=GROUPS)
    x = jnp.asarray([-1.0, 0.5])
    found = bilevel.hypergradient(problem, x, problem.initial()[1], rtol=1e-8)
    np.testing.assert_allclose(found.gradient, differences(problem, x), rtol=1e-6)

    shared = LogisticTuning(X, LABELS, cv=3, penalties="shared")
    y, losses = minimizer(shared, jnp.asarray(0.5)), []
    for k, (a, b) in enumerate(StratifiedKFold(3, **SHUFFLED).split(X, LABELS)):
        model = scikit_learn(X[a], LABELS[a], 0.5)
        np.testing.assert_allclose(y[k], model.coef_[0], rtol=1e-6)
        losses.append(log_loss(LABELS[b], model.predict_proba(X[b])))
    np.testing.assert_allclose(shared.outer(0.5, y), np.mean(losses), rtol=1e-6)
    together = bilevel.estimate(problem, jnp.asarray([0.5, 0.5]), y).gradient.sum()
    np.testing.assert_allclose(together, differences(shared, jnp.asarray(0.5)), rtol=1e-6)


def scikit_learn(X, labels, x):
    C = X.shape[1] / (len(X) * np.exp(x))
    return sk.LogisticRegression(C=C, fit_intercept=False, solver="newton-cholesky", tol=1e-12).fit(X, labels)


def test_refit_is_scikit_learns_logistic_regression_and_labels_keep_their_coding():
    reference = scikit_learn(X, LABELS, -1.0)
    signs = np.where(LABELS == 1, 1.0, -1.0)
    for labels, val in ((LABELS, B_VAL > 0), (signs, np.where(B_VAL > 0, 1, -1))):
        problem = LogisticTuning(X, labels, X_VAL, val, penalties="shared")
        weights = problem.refit(jnp.asarray(-1.0))
        np.testing.assert_allclose(weights, reference.coef_[0], rtol=1e-6)
        np.testing.assert_allclose(
            problem.predict_proba(weights, X_VAL), reference.predict_proba(X_VAL)[:, 1], rtol=1e-6
        )
        np.testing.assert_array_equal(
            problem.predict(weights, X_VAL), np.where(reference.predict(X_VAL) == 1, 1, labels.min())
        )
        expected = log_loss(B_VAL > 0, reference.predict_proba(X_VAL))
        np.testing.assert_allclose(problem.outer(-1.0, weights), expected, rtol=1e-6)
    folds = jnp.stack([weights, 2 * weights])
    average = (problem.predict_proba(weights, X_VAL) + problem.predict_proba(2 * weights, X_VAL)) / 2
    np.testing.assert_allclose(problem.predict_proba(folds, X_VAL), average, rtol=1e-12)


# ------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_folds_are_scikit_learns(count):
    labels = np.where(np.arange(N) % 3 == 1, 1, -1)
    for model, y, reference in ((RidgeTuning, B, KFold), (LogisticTuning, labels, StratifiedKFold)):
        ours, theirs = model(X, y, cv=count).criterion, model(X, y, cv=reference(count, **SHUFFLED)).criterion
        assert eqx.tree_equal(ours, theirs)
        assert isinstance(ours, CrossValidation)
        for k, (train, validation) in enumerate(reference(count, **SHUFFLED).split(X, y)):
            np.testing.assert_array_equal(np.flatnonzero(ours.train[k]), train)
            np.testing.assert_array_equal(np.flatnonzero(ours.judge[k]), validation)


@pytest.mark.parametrize("model", [RidgeTuning, LogisticTuning])
@pytest.mark.parametrize("options", [{"cv": 3}, {"X_val": X_VAL, "y_val": B_VAL > 0}])
def test_data_are_leaves_and_their_dtype_is_the_problems(model, options):
    traces = 0

    @eqx.filter_jit
    def gradient(problem, x, y):
        nonlocal traces
        traces += 1
        return jax.grad(lambda y: problem.inner.objective(x, y) + problem.outer(x, y))(y)

    problem = model(X, LABELS, **options)
    gradient(problem, *problem.initial())
    other = model(2 * X, np.roll(LABELS, 1), **options)
    assert not np.allclose(gradient(problem, *problem.initial()), gradient(other, *other.initial()))
    assert traces == 1

    single = {name: v.astype(np.float32) if name == "X_val" else v for name, v in options.items()}
    for small in (
        model(X.astype(np.float32), LABELS, **single),
        jax.tree.map(lambda a: a.astype(jnp.float32), problem),
    ):
        x, y = small.initial()
        assert x.dtype == y.dtype == jnp.float32
        assert gradient(small, x, y).dtype == jnp.float32
        assert small.predict(y, X_VAL).shape == (len(X_VAL),)
    assert model(LABELS[:, None] + np.arange(3), LABELS, cv=3).initial()[0].dtype == jnp.float64


@pytest.mark.parametrize("model", [RidgeTuning, LogisticTuning])
@pytest.mark.parametrize("options", [{"cv": 3}, {"X_val": X_VAL, "y_val": B_VAL > 0}])
def test_features_may_be_traced(model, options):
    def loss(X):
        problem = model(X, LABELS, **options)
        x, y = problem.initial()
        return problem.inner.objective(x, y + 0.1)

    slope = jax.jit(jax.jvp, static_argnums=0)(loss, (jnp.asarray(X),), (jnp.asarray(X),))[1]
    expected = (loss(jnp.asarray(X) * (1 + 1e-6)) - loss(jnp.asarray(X) * (1 - 1e-6))) / 2e-6
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_hypergradient_in_single_precision():
    problem = RidgeTuning(X.astype(np.float32), B, cv=5)
    x = jnp.asarray(PENALTIES, jnp.float32)
    found = bilevel.estimate(problem, x, minimizer(problem, x))
    assert found.gradient.dtype == jnp.float32
    expected = [ridge_closed_form(X[a], B[a], X[b], B[b], PENALTIES)[2] for a, b in KFold(5, **SHUFFLED).split(X)]
    np.testing.assert_allclose(found.gradient, np.mean(expected, 0), rtol=1e-3)


def test_folds_are_solved_block_by_block():
    problem = LogisticTuning(X, LABELS, cv=3)
    x, y = jnp.asarray(PENALTIES), jnp.asarray(RNG.normal(size=(3, P)))
    assert problem.inner.linear_solver == Foldwise(3)
    b = jnp.asarray(RNG.normal(size=3 * P))

    @eqx.filter_jit
    def solve(inner, x, y):
        _, system = linear_system(inner, x, y)
        state = Foldwise(3).prepare(system)
        return system.matrix(), Foldwise(3).solve(state, system, b, transpose=True)

    matrix, found = solve(problem.inner, x, y)
    np.testing.assert_allclose(found.value, np.linalg.solve(matrix, b), rtol=1e-10)
    assert found.status.word == "converged"
    # one singular fold is enough: two equal columns, no penalty on them
    twins = np.column_stack([X[:, :3], X[:, 0]])
    flat = LogisticTuning(twins, LABELS, cv=3)
    assert solve(flat.inner, jnp.full(P, -jnp.inf), y)[1].status.word == "singular"


def test_without_folds_a_hessian_is_formed_where_classes_make_it_cheap():
    three = np.digitize(B, np.quantile(B, [0.33, 0.66]))
    model = MultinomialTuning(X, three, X[:5], three[:5], penalties="per-feature")
    x, y = jnp.asarray(PENALTIES), jnp.asarray(RNG.normal(size=(3, P)))
    assert model.inner.linear_solver == Foldwise(1)
    hessian, expected = eqx.filter_jit(
        lambda inner: (inner.operator_at(x, y).as_matrix(), jax.hessian(lambda w: inner.objective(x, w))(y))
    )(model.inner)
    np.testing.assert_allclose(hessian, expected.reshape(3 * P, 3 * P), rtol=1e-9, atol=1e-12)
    many = jax.ShapeDtypeStruct((2**20, P), float)  # data that stream from memory, and one class: the engine's choice
    for other in (eqx.tree_at(lambda m: m.criterion.X, model, many), LogisticTuning(X, LABELS, X[:5], LABELS[:5])):
        assert other.inner.linear_solver is None
        assert other.inner.operator_at(x, y) is None


# ------------------------------------------------------------------------------------------------ bad input


def with_entry(array, index, value):
    array = np.array(array, float)
    array[index] = value
    return array


SPLIT = {"X_val": X_VAL, "y_val": B_VAL > 0}


@pytest.mark.parametrize("model", [RidgeTuning, LogisticTuning])
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[:40], LABELS[:39]), {"cv": 5}, "`X` has 40 rows, but `y` has 39 entries"),
        ((X, LABELS), {"X_val": X_VAL, "y_val": LABELS[:5]}, "`X_val` has 23 rows, but `y_val` has 5 entries"),
        ((X, LABELS), {"X_val": X_VAL[:, :2], "y_val": B_VAL > 0}, "`X_val` has 2 features, but `X` has 4"),
        ((with_entry(X, (3, 1), np.nan), LABELS), {"cv": 5}, "1 entries that are NaN or infinite, the first at (3,"),
        ((X, LABELS), SPLIT | {"X_val": with_entry(X_VAL, (0, 2), np.inf)}, "`X_val` has 1 entries"),
        ((X[:, 0], LABELS), {"cv": 5}, "found shape (41,); one feature is X[:, None]"),
        ((X[:, :0], LABELS), {"cv": 5}, "`X` is empty, its shape is (41, 0)"),
        ((X, LABELS[:, None]), {"cv": 5}, "`y` must have one axis, found shape (41, 1)"),
        ((X * 1j, LABELS), {"cv": 5}, "found dtype complex128"),
        ((X.astype(str), LABELS), {"cv": 5}, "must hold real numbers"),
        ((scipy.sparse.csr_matrix(X), LABELS), {"cv": 5}, "sparse matrix"),
        ((X, LABELS), {}, "found neither"),
        ((X, LABELS), SPLIT | {"cv": 5}, "found both"),
        ((X, LABELS), {"X_val": X_VAL}, "`X_val` comes without `y_val`"),
        ((X, LABELS), {"y_val": B_VAL > 0, "cv": 5}, "`y_val` comes without `X_val`"),
        ((X, LABELS), {"cv": 5, "penalties": "per-row"}, "or 'shared' (or pass `groups`), found 'per-row'"),
        ((X, LABELS), {"cv": 5, "groups": [0, 1]}, "`groups` has 2 entries, but `X` has 4 features"),
        ((X, LABELS), {"cv": 5, "groups": [0, 1, -1, 0]}, "numbered from 0, found -1"),
        ((X, LABELS), {"cv": 5, "groups": [0, 3, 1, 0]}, "goes up to 3, but no feature is in group 2"),
        ((X, LABELS), {"cv": 5, "groups": [0.0, 1.0, 0.0, 0.0]}, "one integer per feature"),
        ((X, LABELS), {"cv": 5, "groups": GROUPS, "penalties": "shared"}, "not both"),
        ((X, LABELS), {"cv": 1}, "`cv` must be at least 2"),
        ((X, LABELS), {"cv": 42}, "found 42"),
        ((X, LABELS), {"cv": []}, "no folds"),
        ((X, LABELS), {"cv": [np.arange(3)]}, "fold 0: expected a pair"),
        ((X, LABELS), {"cv": [([0, 1], [])]}, "validation rows"),
        ((X, LABELS), {"cv": [([0, 1], [-1])]}, "must lie in [0, 41), found -1"),
        ((X, LABELS), {"cv": [([0, 1, 2], [2, 3])]}, "1 rows are in both parts, the first is 2"),
    ],
)  # fmt: skip
def test_bad_input_is_named(model, arguments, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        model(*arguments, **options)
    assert str(error.value).startswith(f"{model.__name__}: ")


@pytest.mark.parametrize("cv", ["5", 2.5, True])
def test_unknown_kind_of_folds(cv):
    with pytest.raises(TypeError, match="`cv` must be a number of folds"):
        RidgeTuning(X, B, cv=cv)


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        (LABELS + 1, {"cv": 5}, "the labels `y` must be 0 and 1, or -1 and 1, found 1, 2"),
        (np.where(LABELS == 1, "b", "a"), {"cv": 5}, "found 'a', 'b'"),
        (with_entry(LABELS, 4, np.nan), {"cv": 5}, "nan"),
        (np.ones(N), {"cv": 5}, "`y` has one class only, all its labels are 1"),
        (np.where(LABELS == 1, 1, -1), SPLIT, "the labels `y_val` must be -1 and 1, as in `y`, found 0, 1"),
        (LABELS, {"cv": [(np.flatnonzero(LABELS), np.flatnonzero(LABELS == 0))]}, "fold 0: its training rows"),
        (np.arange(N) < 3, {"cv": 5}, "at most the 3 rows of the smallest class, found 5"),
    ],
)
def test_bad_labels_are_named(y, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LogisticTuning(X, y, **options)


def test_x_and_y_of_wrong_shape_are_refused():
    problem = RidgeTuning(X, B, cv=5, penalties="shared")
    x, y = problem.initial()
    with pytest.raises(ValueError, match=r"log-penalties x must have shape \(\), found \(4,\)"):
        bilevel.hypergradient(problem, jnp.zeros(P), y)
    with pytest.raises(ValueError, match=r"weights y must have shape \(folds, features\) = \(5, 4\), found \(4,\)"):
        bilevel.hypergradient(problem, x, y[0])
    with pytest.raises(ValueError, match=r"shape \(folds, features\) = \(5, 4\), found \(4,\)"):
        problem.outer(x, y[0])
    with pytest.raises(ValueError, match=r"must have shape \(4,\) or \(folds, 4\), found \(3,\)"):
        problem.predict(jnp.zeros(3), X)
    with pytest.raises(ValueError, match="`X` has 2 features"):
        problem.predict(y, X[:, :2])


def test_problems_contain_no_derivatives():
    words = re.compile(r"jax\.(grad|jvp|vjp|jac\w+|hessian|linearize|value_and_grad|custom_\w+)")
    for file in pathlib.Path(problems.__file__).parent.rglob("*.py"):
        assert not words.search(file.read_text(encoding="utf-8")), file
