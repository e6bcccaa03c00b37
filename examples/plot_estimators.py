"""
How wrong is a hypergradient?
=============================

The inner solution is never exact, and its error ends up in the hypergradient. How much of it depends on the estimator:
plain implicit differentiation passes the error on, a correction or other coordinates may dampen it, and Newton's
correction squares it. This is the study of Ye, Peyré, Cremers and Ablin (AISTATS 2024), with this library's estimators:
the error of the hypergradient against the error of the inner solution, along the iterates of gradient descent, ten
random draws of each problem.
"""

from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from benchmarks._study import CASES, DISTANCES, ESTIMATORS, errors, slope

jax.config.update("jax_enable_x64", True)
SEEDS = 10

# %%
# Ridge regression on the fuel consumption of cars (auto-mpg) with one penalty for each feature, an outer function
# affine in the weights and then a quadratic one; and logistic regression on the breast cancer data with a logistic
# outer loss. Gradient descent starts far away, and at each distance to the solution every estimator gives its
# hypergradient.

runs = {name: [errors(name, seed) for seed in range(SEEDS)] for name in CASES}

# %%
# On doubly logarithmic axes the order of an estimator is the slope of its line. Errors at round-off are no straight
# line, and an estimator that is exact for a problem has no slope there.

print(f"{'slope (mean over ten draws)':28s}" + "".join(f"{key:>21s}" for key in ESTIMATORS))
for name in CASES:
    slopes = {key: [slope(d, e[key], 1e-11) for d, e in runs[name]] for key in ESTIMATORS}
    shown = ["exact" if np.all(np.isnan(s)) else f"{np.nanmean(s):.2f}" for s in slopes.values()]
    print(f"{name:28s}" + "".join(f"{s:>21s}" for s in shown))

# %%
# Newton's line is the steep one. The affine outer function shows what coordinates can do: they change the Jacobian of
# the solution and nothing else, so gradient coordinates are exact there, and `JacobiScaling` is the Jacobi correction.
# With a curved outer function their advantage is gone, while a correction keeps its own.

figure, axes = plt.subplots(1, len(CASES), figsize=(15, 4.6), sharex=True)
for panel, name in zip(axes, CASES, strict=True):
    for k, key in enumerate(ESTIMATORS):
        logs = np.log10(np.stack([np.maximum(e[key], 1e-16) for _, e in runs[name]]))
        mean, spread = logs.mean(axis=0), logs.std(axis=0)
        style = "--" if key in ("JacobiScaling", "Exp") else "-"
        panel.loglog(DISTANCES, 10**mean, style, color=f"C{k}", label=key)
        panel.fill_between(DISTANCES, 10 ** (mean - spread), 10 ** (mean + spread), color=f"C{k}", alpha=0.15, lw=0)
    panel.set_title(name)
    panel.set_xlabel("error of the inner solution, |y − y*|")
    panel.grid(alpha=0.3)
axes[0].invert_xaxis()
axes[0].set_ylabel("error of the hypergradient")
axes[0].legend(fontsize=8)
figure.tight_layout()
path = Path("build/estimators.png")
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=130)
print(path.resolve())
