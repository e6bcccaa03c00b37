"""
When some of the mass is missing
================================

A quarter of the source has lost its target, and a quarter of the target has no source. Balanced transport must match
everything; unbalanced transport leaves mass behind where moving it costs more than losing it. The cost is then found
again from what was transported: by the unbalanced model, which knows all there was, and by a balanced one, which can
only be told the marginals of what it saw.
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
# Two clouds and two couplings
# ----------------------------

N, EPSILON, TAU = 60, 0.1, 0.6
X = np.vstack([rng.normal([0, 0], 0.4, (45, 2)), rng.normal([0, 3], 0.3, (15, 2))])
Y = np.vstack([rng.normal([2, 0.3], 0.4, (45, 2)), rng.normal([2, -3], 0.3, (15, 2))])
weights = np.full(N, 1 / N)
features = np.stack([(X[:, None, k] - Y[None, :, k]) ** 2 for k in range(2)])
truth = jnp.asarray([0.2, 0.6])


def cost(theta):
    return jnp.tensordot(theta, jnp.asarray(features), 1)


models = {
    "balanced": EntropicOT(cost, weights, weights, EPSILON),
    "unbalanced": UnbalancedOT(cost, weights, weights, EPSILON, TAU),
}
couplings = {}
for name, model in models.items():
    couplings[name] = np.asarray(model.coupling(truth, bilevel.solve(model, truth, model.initial()).y))
    print(f"{name}: mass transported {couplings[name].sum():.3f} of 1")

# %%
# The cost, estimated from 2000 transported pairs
# -----------------------------------------------
#
# Twenty samples of the unbalanced coupling. The unbalanced estimate also uses how much mass was lost where.

pi, PAIRS = couplings["unbalanced"], 2000
estimates = {"balanced": [], "unbalanced": []}
for seed in range(20):
    draw = np.random.default_rng(seed).multinomial(PAIRS, pi.ravel() / pi.sum()).reshape(N, N) / PAIRS
    balanced = InverseOT(features, draw, epsilon=EPSILON)
    unbalanced = InverseOT(features, draw * pi.sum(), weights, weights, epsilon=EPSILON, tau=TAU)
    estimates["balanced"].append(balanced.newton().x)
    estimates["unbalanced"].append(unbalanced.newton().x)
for name, found in estimates.items():
    print(f"{name}: mean {np.mean(found, axis=0).round(3)}, spread {np.std(found, axis=0).round(3)}, truth {truth}")

# %%
# The picture
# -----------

figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), constrained_layout=True)
for ax, (name, coupling) in zip(axes, couplings.items(), strict=False):
    for i, j in np.argwhere(coupling > 0.1 * coupling.max()):
        ax.plot(*np.transpose([X[i], Y[j]]), color="gray", lw=0.5, alpha=float(coupling[i, j] / coupling.max()))
    for points, axis, color in ((X, 1, "C0"), (Y, 0, "C1")):
        ax.scatter(*points.T, s=40 * N * coupling.sum(axis=axis), color=color)
        ax.scatter(*points.T, s=40, facecolors="none", edgecolors=color, lw=0.5)
    ax.set(title=f"{name}: mass {coupling.sum():.2f} moves")
for name, found in estimates.items():
    axes[2].plot(*np.transpose(found), "o", alpha=0.6, label=name)
axes[2].plot(*truth, "k*", ms=14, label="truth")
axes[2].set(title="The cost, estimated", xlabel="horizontal", ylabel="vertical")
axes[2].legend()
path = Path("build", "unbalanced_transport.png").absolute()
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=120)
print(f"The picture: {path}")
