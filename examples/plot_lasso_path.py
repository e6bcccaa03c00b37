"""
The lasso: a path, and a descent
================================

The usual way to choose the penalty of a lasso is to train a hundred of them along a path and to take the best. The
criterion is a piecewise smooth function of one number, so its hypergradient leads to the minimum directly, with a
handful of trainings. The same picture for the elastic net, whose two penalties would take a grid of a thousand.
"""

import time
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNetCV, LassoCV
from sklearn.model_selection import KFold, train_test_split

import bilevel
from problems.tuning import ElasticNetTuning, LassoTuning

jax.config.update("jax_enable_x64", True)

X, b = map(np.asarray, load_diabetes(return_X_y=True))
X, X_test, b, b_test = map(np.asarray, train_test_split(X / X.std(0), b, test_size=0.25, random_state=0))
center = b.mean()
mean = X.mean(0)
X, X_test, b, b_test = X - mean, X_test - mean, b - center, b_test - center
folds = KFold(5, shuffle=True, random_state=0)  # those of cv=5


def test_error(problem, x):
    """Half the mean squared error on rows that nothing was fitted or tuned on."""
    return np.mean((np.asarray(problem.predict(problem.refit(x), X_test)) - b_test) ** 2) / 2


def report(name, validation, test, seconds):
    print(f"{name:<34} validation {validation:9.2f}   test {test:9.2f}   {seconds:6.2f} s")


# %%
# The lasso
# ---------
#
# The second run is timed: the first one compiles, once for all data of this shape.

lasso = LassoTuning(X, b, cv=5)
x0, y0 = lasso.initial()
bilevel.minimize(lasso, x0, y0)
begin = time.perf_counter()
found = bilevel.minimize(lasso, x0, y0)
seconds = time.perf_counter() - begin
report("lasso, hypergradients", found.value, test_error(lasso, found.x), seconds)
print("    ", found.message)

begin = time.perf_counter()
path = LassoCV(alphas=100, cv=folds, fit_intercept=False).fit(X, b)
seconds = time.perf_counter() - begin
criterion = path.mse_path_.mean(1) / 2
report("lasso, path of 100", criterion.min(), np.mean((path.predict(X_test) - b_test) ** 2) / 2, seconds)

# %%
# The elastic net
# ---------------

net = ElasticNetTuning(X, b, cv=5)
x0, y0 = net.initial()
bounds = (-9.0, 6.0)
bilevel.minimize(net, x0, y0, bounds=bounds, tol=1e-5)
begin = time.perf_counter()
both = bilevel.minimize(net, x0, y0, bounds=bounds, tol=1e-5)
seconds = time.perf_counter() - begin
report("elastic net, hypergradients", both.value, test_error(net, both.x), seconds)

begin = time.perf_counter()
ratios: Any = np.linspace(0.1, 1, 10)
grid = ElasticNetCV(alphas=100, l1_ratio=ratios, cv=folds, fit_intercept=False).fit(X, b)
seconds = time.perf_counter() - begin
best = grid.mse_path_.mean(-1).min() / 2
report("elastic net, grid of 10 x 100", best, np.mean((grid.predict(X_test) - b_test) ** 2) / 2, seconds)

# %%
# The pictures: the criterion along the path with the steps taken, and those of the elastic net in the plane.

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
left.plot(np.log(path.alphas_), criterion, color="gray", label="path of 100 lassos")
left.plot([float(s.x) for s in found.history], [s.value for s in found.history], "o-", label="descent")
left.set(title="Lasso", xlabel="log penalty", ylabel="validation loss")
left.legend()
steps = np.array([s.x for s in both.history])
points = right.scatter(steps[:, 0], steps[:, 1], c=[s.value for s in both.history], zorder=2)
right.plot(steps[:, 0], steps[:, 1], color="gray", zorder=1)
right.set(title="Elastic net: the steps taken", xlabel="log of the l1 penalty", ylabel="log of the l2 penalty")
figure.colorbar(points, label="validation loss")

picture = Path("build", "lasso_path.png").absolute()
picture.parent.mkdir(exist_ok=True)
figure.savefig(picture, dpi=120)
print(f"The picture: {picture}")
