"""
A low-rank affinity
===================

Two sides have six traits each, and what makes a good match is a matrix of how the traits interact. If few
combinations of traits matter, that matrix has low rank, and the nuclear norm looks for such a one. Its weight is chosen
on pairs that were held out, by the same convex loss.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevel
from problems.transport import EntropicOT, InverseOT, NuclearNorm

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(1)

# %%
# The truth has rank two
# ----------------------

POINTS, TRAITS, EPSILON, PAIRS = 40, 6, 1.0, 200
P, Q = rng.normal(size=(POINTS, TRAITS)), rng.normal(size=(POINTS, TRAITS))
features = -np.einsum("ip,jq->pqij", P, Q).reshape(TRAITS**2, POINTS, POINTS)
A = 0.3 * rng.normal(size=(TRAITS, 2)) @ rng.normal(size=(2, TRAITS))
weights = np.full(POINTS, 1 / POINTS)
model = EntropicOT(lambda x: jnp.tensordot(x, jnp.asarray(features), 1), weights, weights, EPSILON)
theta = jnp.asarray(A.ravel())
pi = np.asarray(model.coupling(theta, bilevel.solve(model, theta, model.initial()).y))
counts = rng.multinomial(PAIRS, pi.ravel() / pi.sum()).reshape(pi.shape)
held_out = rng.binomial(counts, 1 / 3)

# %%
# The weight of the penalty
# -------------------------
#
# Fits on two thirds of the pairs, judged by the gap on the last third, each with its own marginals.


def fit(sample, weight, start=None):
    penalty = NuclearNorm(weight, (TRAITS, TRAITS)) if weight else None
    problem = InverseOT(features, sample / sample.sum(), epsilon=EPSILON, penalty=penalty)
    return problem.newton(start, tol=1e-8).x


judge = InverseOT(features, held_out / held_out.sum(), epsilon=EPSILON)
grid = np.geomspace(0.003, 0.3, 9)
losses = [float(judge.loss(fit(counts - held_out, weight))) for weight in grid]
best = grid[int(np.argmin(losses))]
estimates = {"truth": A, "plain": fit(counts, 0).reshape(A.shape), "nuclear norm": fit(counts, best).reshape(A.shape)}

# %%
# The picture
# -----------

figure, axes = plt.subplots(1, 4, figsize=(14, 3.5), constrained_layout=True)
top = np.abs(A).max()
for ax, (name, matrix) in zip(axes, estimates.items(), strict=False):
    error = np.linalg.norm(matrix - A) / np.linalg.norm(A)
    rank = int(np.sum(np.linalg.svd(np.asarray(matrix), compute_uv=False) > 1e-6))
    ax.imshow(matrix, vmin=-top, vmax=top, cmap="RdBu")
    ax.set(title=f"{name}: rank {rank}" + ("" if name == "truth" else f", error {error:.2f}"), xticks=[], yticks=[])
    print(f"{name}: rank {rank}, relative error {error:.3f}")
axes[3].semilogx(grid, losses, "o-")
axes[3].axvline(best, color="gray", ls=":")
axes[3].set(xlabel="weight", title="loss on held-out pairs")
path = Path("build", "inverse_transport_low_rank.png").absolute()
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=120)
print(f"The picture: {path}")
