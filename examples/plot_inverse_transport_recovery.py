"""
Recovering the cost of a transport
==================================

Two clouds are matched at the least cost, with some entropy; all one sees is a sample of matched pairs. How well is the
cost recovered? The estimator minimizes the Fenchel-Young gap, a convex function of the coefficients, and its error
falls like one over the square root of the number of pairs, whether mass is kept or only penalised.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevel
from problems.transport import EntropicOT, InverseOT, UnbalancedOT

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)

# %%
# The truth
# ---------
#
# The cost is a combination of four features of a pair of points; where a coupling's marginals are penalised, the two
# measures have different masses.

POINTS, EPSILON, TAU = 30, 0.5, (0.8, 1.5)
P, Q = rng.normal(size=(POINTS, 2)), 0.8 * rng.normal(size=(POINTS, 2)) + 0.3
features = np.stack([-P[:, None, i] * Q[None, :, j] for i in range(2) for j in range(2)])
truth = jnp.asarray([1.0, -0.5, 0.3, 0.8])
a, b = np.full(POINTS, 1 / POINTS), np.full(POINTS, 1 / POINTS)


def cost(theta):
    return jnp.tensordot(theta, jnp.asarray(features), 1)


models = {"balanced": EntropicOT(cost, a, b, EPSILON), "unbalanced": UnbalancedOT(cost, a, 1.5 * b, EPSILON, TAU)}
couplings = {}
for name, model in models.items():
    couplings[name] = np.asarray(model.coupling(truth, bilevel.solve(model, truth, model.initial()).y))

# %%
# The estimates
# -------------
#
# Pairs are counts with the coupling's means. Balanced, the sample's own marginals are kept; unbalanced, what there was
# to transport is known.

SIZES, SEEDS = [100, 200, 400, 800, 1600, 3200], 15
errors = {name: np.zeros((len(SIZES), SEEDS)) for name in models}
for name, pi in couplings.items():
    for i, size in enumerate(SIZES):
        for seed in range(SEEDS):
            draw = np.random.default_rng([i, seed]).multinomial(size, pi.ravel() / pi.sum()).reshape(pi.shape)
            sample = draw * pi.sum() / size
            if name == "balanced":
                problem = InverseOT(features, sample, epsilon=EPSILON)
            else:
                problem = InverseOT(features, sample, a, 1.5 * b, epsilon=EPSILON, tau=TAU)
            errors[name][i, seed] = np.linalg.norm(problem.newton(tol=1e-8).x - truth)

# %%
# The picture
# -----------

figure, axes = plt.subplots(figsize=(6, 4.5), constrained_layout=True)
for name, found in errors.items():
    mean = found.mean(axis=1)
    slope = np.polyfit(np.log(SIZES), np.log(mean), 1)[0]
    axes.loglog(SIZES, mean, "o-", label=f"{name}, slope {slope:.2f}")
    axes.loglog(np.repeat(SIZES, SEEDS), found.ravel(), ".", color=axes.lines[-1].get_color(), alpha=0.2)
    print(f"{name}: slope {slope:.2f}")
guide = 2 * errors["balanced"].mean(axis=1)[0] * np.sqrt(SIZES[0] / np.array(SIZES))
axes.loglog(SIZES, guide, ":", color="gray", label="-1/2")
axes.set(xlabel="observed pairs", ylabel="error of the coefficients", title="Recovering a cost")
axes.legend()
path = Path("build", "inverse_transport_recovery.png").absolute()
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=120)
print(f"The picture: {path}")
