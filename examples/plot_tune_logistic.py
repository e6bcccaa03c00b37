"""
Tuning a logistic regression
============================

How many penalties should a logistic regression have: one for all features, one for each natural group of them, or one
for each feature? Hypergradients tune any number of them on the same five folds. A test set that was never touched says
which number was worth having.

The data are scikit-learn's breast cancer set. It has ten measurements of cell nuclei, each given as mean, standard
error and worst value: thirty features, and three groups that nature suggests.
"""

import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedKFold, StratifiedShuffleSplit
from tqdm.auto import tqdm

import bilevel
from problems.tuning import LogisticTuning

jax.config.update("jax_enable_x64", True)

# %%
# The problem
# -----------
#
# Ten times, a quarter of the rows is put aside for the test. On the rest, the inner problem trains the weights in five
# folds at once, and the outer function is the average loss on what each fold leaves out. The variable `x` holds the
# logarithms of the penalties, bounded to a sensible range around the mean loss's own scale.

FOLDS, BOUNDS, TOL = 5, (-7.0, 7.0), 1e-5
GROUPS = np.repeat([0, 1, 2], 10)
GROUP_NAMES = ("mean", "standard error", "worst")
KINDS = {"one": {"penalties": "shared"}, "three": {"groups": GROUPS}, "thirty": {"penalties": "per-feature"}}

X, labels = map(np.asarray, load_breast_cancer(return_X_y=True))
splits = list(StratifiedShuffleSplit(10, test_size=0.25, random_state=0).split(X, labels))


def train_and_test(split):
    """The rows of a split, features scaled by the training rows."""
    train, test = split
    mean, deviation = X[train].mean(0), X[train].std(0)
    return (X[train] - mean) / deviation, labels[train], (X[test] - mean) / deviation, labels[test]


def tune(kind, rows, labels, progress=False):
    """The problem and its minimum, for one, three or thirty penalties."""
    problem = LogisticTuning(rows, labels, cv=FOLDS, **KINDS[kind])
    x0, y0 = problem.initial()
    return problem, bilevel.minimize(problem, x0, y0, bounds=BOUNDS, tol=TOL, progress=progress)


# %%
# One split, step by step
# -----------------------
#
# These runs are the first of their kind, so they include compilation. All later ones have the same shapes and reuse
# it.

first, compile_seconds = {}, {}
for kind in KINDS:
    begin = time.perf_counter()
    problem, first[kind] = tune(kind, *train_and_test(splits[0])[:2], progress=True)
    problem.refit(first[kind].x)
    compile_seconds[kind] = time.perf_counter() - begin
    print(f"{kind:>6}: {first[kind].message}")

# %%
# Ten splits
# ----------
#
# The grid search minimizes the same criterion over one shared penalty, on the same folds. A hypergradient counts as
# one fit in each fold, although most of them start so close to their solution that a Newton step ends them.


def by_grid(rows, labels):
    """Validation loss, fitted model and number of fits of a grid search over one penalty."""
    x = np.linspace(*BOUNDS, 15)
    n = len(rows) * (FOLDS - 1) / FOLDS
    grid = {"C": rows.shape[1] / (n * np.exp(x))}
    model = LogisticRegression(fit_intercept=False, solver="newton-cholesky")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some members of the grid hardly converge
        search = GridSearchCV(model, grid, scoring="neg_log_loss", cv=folds).fit(rows, labels)
    return -search.best_score_, lambda new: search.predict_proba(new)[:, 1], len(x) * FOLDS + 1


def by_hypergradients(kind):
    def run(rows, labels):
        problem, result = tune(kind, rows, labels)
        weights = problem.refit(result.x)
        return result.value, lambda new: problem.predict_proba(weights, new), FOLDS * result.hypergradients + 1

    return run


methods = {"one, grid search": by_grid} | {f"{kind}, hypergradients": by_hypergradients(kind) for kind in KINDS}
rows_of = {name: [] for name in methods}
for split in tqdm(splits, desc="splits"):
    rows, known, new, truth = train_and_test(split)
    for name, method in methods.items():
        begin = time.perf_counter()
        value, predict, fits = method(rows, known)
        seconds = time.perf_counter() - begin
        probability = np.asarray(predict(new))
        accuracy = np.mean((probability > 0.5) == truth)
        rows_of[name].append((value, log_loss(truth, probability), accuracy, fits, seconds))
scores = {name: np.array(rows) for name, rows in rows_of.items()}

print(f"{'penalties':<24}{'validation loss':>18}{'test loss':>18}{'test accuracy':>18}{'fits':>7}{'seconds':>9}")
for name, found in scores.items():
    cells = [f"{m:.4f} ± {s:.4f}" for m, s in zip(found.mean(0)[:3], found.std(0)[:3], strict=True)]
    print(f"{name:<24}{cells[0]:>18}{cells[1]:>18}{cells[2]:>18}{found[:, 3].mean():7.0f}{found[:, 4].mean():9.2f}")
once = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in compile_seconds.items())
print(f"Mean ± standard deviation over {len(splits)} splits. Compilation, once for all splits, included: {once}.")

# %%
# What the numbers say


def verdict(name):
    """In words: the median relative change of both losses against one shared penalty, over the splits."""
    one, other = scores["one, hypergradients"], scores[f"{name}, hypergradients"]
    validation, test = np.median(other[:, :2] / one[:, :2], axis=0) - 1
    better = f"better in {np.sum(other[:, 1] < one[:, 1])} of {len(splits)} splits"
    direction = "lower" if validation < 0 else "raise"
    seen = f"{name.capitalize()} penalties {direction} the validation loss by {abs(validation):.0%}"
    if test > 0.02:
        return f"{seen}, but raise the test loss by {test:.0%} ({better}): they fit the folds, and lose on new data."
    if test < -0.02:
        return f"{seen} and the test loss by {-test:.0%} ({better}): a {'little' if test > -0.1 else 'clear'} gain."
    return f"{seen} and leave the test loss as it is ({test:+.1%}, {better}): no gain worth the name."


print("Against one shared penalty, in the median over the splits:")
print(verdict("three"), verdict("thirty"), sep="\n")

# %%
# The picture: how the thirty penalties were found, what was found, and what it was worth.

colors = {"one": "tab:blue", "three": "tab:orange", "thirty": "tab:red"}
figure, (steps, found, worth) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")

history = first["thirty"].history
steps.plot([s.step for s in history], [s.value for s in history], color=colors["thirty"])
steps.set(title="Thirty penalties, step by step", xlabel="outer step", ylabel="outer value (validation loss)")
errors = steps.twinx()
errors.semilogy([s.step for s in history], [jnp.linalg.norm(s.gradient) for s in history], ":", color="gray")
errors.semilogy([s.step for s in history], [s.error for s in history], color="black", lw=1)
errors.set_ylabel("norm of the hypergradient (dotted), its error (solid)")

features = np.arange(30)
for group, name in enumerate(GROUP_NAMES):
    mine = GROUPS == group
    found.axvspan(10 * group - 0.5, 10 * group + 9.5, color="black", alpha=0.04 * (group % 2))
    found.text(10 * group + 4.5, BOUNDS[1] + 0.5, name, ha="center")
    found.hlines(first["three"].x[group], 10 * group - 0.5, 10 * group + 9.5, color=colors["three"])
    found.plot(features[mine], first["thirty"].x[mine], "o", color=colors["thirty"], ms=4)
found.axhline(float(first["one"].x), color=colors["one"], lw=1)
found.set(title="Penalties found", xlabel="feature", ylabel="log-penalty x", ylim=(BOUNDS[0] - 0.5, BOUNDS[1] + 1.5))

for kind, color in colors.items():
    values = scores[f"{kind}, hypergradients"]
    worth.loglog(values[:, 0], values[:, 1], ".", color=color, alpha=0.4)
    worth.loglog(*values.mean(0)[:2], "o", color=color, ms=9, label=kind)
ends = [min(v[:, :2].min() for v in scores.values()), max(v[:, :2].max() for v in scores.values())]
worth.plot(ends, ends, color="gray", lw=0.5)
for axis in (worth.xaxis, worth.yaxis):
    axis.set_major_locator(FixedLocator([0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 1.0]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
worth.set(title="What they were worth, ten splits", xlabel="validation loss", ylabel="test loss")
worth.legend(title="penalties")

path = Path("build", "tune_logistic.png").absolute()
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=120)
print(f"The picture: {path}")
