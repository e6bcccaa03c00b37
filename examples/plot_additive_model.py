"""
An additive model with a smoothing parameter for each feature
=============================================================

How far a car goes on a gallon, as a sum of smooth functions of its features. How smooth each function is, is a
hyperparameter of its own: seven of them, which a grid with five values each would try in 78125 combinations. Their
hypergradients go there directly. pyGAM, where it is installed, searches one value for all of them on a grid.
"""

import time
import warnings
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from mlxtend.data import autompg_data
from sklearn.model_selection import train_test_split

import bilevel
from problems.tuning import AdditiveTuning

jax.config.update("jax_enable_x64", True)

NAMES = ("cylinders", "displacement", "horsepower", "weight", "acceleration", "model year", "origin")
X, mpg = autompg_data()
X = np.asarray(X)[:, :7].astype(float)
parts = train_test_split(X, np.asarray(mpg, float), test_size=0.25, random_state=0)
X, X_test, mpg, mpg_test = map(np.asarray, parts)

# %%
# Generalized cross-validation
# ----------------------------

problem = AdditiveTuning(X, mpg, cv="gcv")
x0, y0 = problem.initial()
begin = time.perf_counter()
found = bilevel.minimize(problem, x0, y0, bounds=(-14.0, 8.0), tol=1e-5)
first = time.perf_counter() - begin
begin = time.perf_counter()
found = bilevel.minimize(problem, x0, y0, bounds=(-14.0, 8.0), tol=1e-5)
seconds = time.perf_counter() - begin
y = problem.refit(found.x)
ours = np.mean((np.asarray(problem.predict(y, X_test)) - mpg_test) ** 2)
freedom = float(problem.leverage(found.x).sum())
print(f"hypergradients: GCV {2 * found.value:.3f}, test error {ours:.3f}, {freedom:.1f} degrees of freedom, ", end="")
print(f"{seconds:.2f} s (the first time, with compilation: {first:.1f} s)")


# %%
# pyGAM's grid
# ------------

try:
    from pygam import LinearGAM, s
except ImportError:
    print("pyGAM is not installed: no comparison.")
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begin = time.perf_counter()
        terms: Any = s(0, n_splines=10)
        for j in range(1, 7):
            terms = terms + s(j, n_splines=10)
        gam = LinearGAM(terms).gridsearch(X, mpg, progress=False)
        seconds = time.perf_counter() - begin
        theirs = np.mean((gam.predict(X_test) - mpg_test) ** 2)
        print(f"pyGAM, one value for all: GCV {gam.statistics_['GCV']:.3f}, test error {theirs:.3f}, {seconds:.2f} s")

# %%
# The picture: the seven functions, on a common scale, with the logarithm of each smoothing parameter.

figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained", sharey=True)
for j, (name, axis) in enumerate(zip(NAMES, axes.flat, strict=False)):
    values = np.linspace(X[:, j].min(), X[:, j].max(), 200)
    axis.plot(values, problem.smooth(y, j, values))
    axis.plot(X[:, j], np.full(len(X), -14), "|", color="gray", alpha=0.3)
    axis.set(title=f"{name} (x = {float(found.x[j]):.1f})")
axes[0, 0].set_ylabel("effect on miles per gallon")
axes[1, 0].set_ylabel("effect on miles per gallon")
axes.flat[-1].remove()

picture = Path("build", "additive_model.png").absolute()
picture.parent.mkdir(exist_ok=True)
figure.savefig(picture, dpi=120)
print(f"The picture: {picture}")
