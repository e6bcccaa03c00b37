"""
Predicting links by inverse transport
=====================================

A network's links are a coupling of its vertices with themselves, and each vertex has only so many: its degree.
Learning an affinity between features of vertices from some of the links is then inverse transport, where the degrees
are the marginals that are kept. Here the network is the novel Les Misérables (shipped with networkx); features are
products of the vertices' coordinates along the leading eigenvectors of the links one may see. The rest of the links is
ranked, and a logistic regression on the same features ranks them too.
"""

from pathlib import Path

import jax
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

import bilevel
from problems.transport import L1, InverseOT

jax.config.update("jax_enable_x64", True)

# %%
# The data: four fifths of the links
# ----------------------------------

graph = nx.les_miserables_graph()
links = (nx.to_numpy_array(graph) > 0).astype(float)
rng = np.random.default_rng(0)
upper = np.transpose(np.triu_indices(len(links), 1))
present = upper[links[upper[:, 0], upper[:, 1]] > 0]
seen = rng.permutation(len(present)) < 0.8 * len(present)
known = np.zeros_like(links)
for i, j in present[seen]:
    known[i, j] = known[j, i] = 1

# %%
# Features of a pair
# ------------------
#
# Coordinates of the known links' leading eigenvectors. The products of two vertices' coordinates are the features of a
# pair, all symmetric; each is scaled to variance one.

COORDINATES = 6
values, vectors = np.linalg.eigh(known)
leading = vectors[:, np.argsort(-np.abs(values))[:COORDINATES]]
pairs = [(i, j) for i in range(COORDINATES) for j in range(i, COORDINATES)]
products = [np.outer(leading[:, i], leading[:, j]) for i, j in pairs]
features = -np.stack([product + product.T for product in products])
features /= features.std(axis=(1, 2), keepdims=True)

# %%
# Two models
# ----------

problem = InverseOT(features, known / known.sum(), epsilon=1.0, penalty=L1(3e-3))
theta = problem.newton().x
y = bilevel.solve(problem.inner, theta, problem.inner.initial()).y
affinity = np.asarray(problem.inner.coupling(theta, y))

rest = upper[known[upper[:, 0], upper[:, 1]] == 0]
labels = links[rest[:, 0], rest[:, 1]]
table = features[:, upper[:, 0], upper[:, 1]].T
plain = LogisticRegression(max_iter=2000).fit(table, known[upper[:, 0], upper[:, 1]])
scores = {
    "inverse transport": affinity[rest[:, 0], rest[:, 1]],
    "logistic regression": plain.decision_function(features[:, rest[:, 0], rest[:, 1]].T),
}

# %%
# The picture
# -----------

figure, (curve, picture) = plt.subplots(1, 2, figsize=(10, 4.5), constrained_layout=True)
for name, score in scores.items():
    area = roc_auc_score(labels, score)
    curve.plot(*roc_curve(labels, score)[:2], label=f"{name}, area {area:.3f}")
    print(f"{name}: area under the curve {area:.3f}")
curve.plot([0, 1], [0, 1], ":", color="gray")
curve.set(xlabel="false positives", ylabel="true positives", title="Links that were held out")
curve.legend()
order = np.argsort(-leading[:, 0] * np.sign(leading[:, 0].sum()))
picture.imshow(np.log10(affinity + 1e-6)[np.ix_(order, order)], cmap="Blues")
held = present[~seen]
rank = np.argsort(order)
picture.plot(rank[held[:, 0]], rank[held[:, 1]], "r.", ms=3, label="held out")
picture.set(title="The learned coupling (log10)", xticks=[], yticks=[])
picture.legend(loc="lower left")
path = Path("build", "inverse_transport_links.png").absolute()
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=120)
print(f"The picture: {path}")
