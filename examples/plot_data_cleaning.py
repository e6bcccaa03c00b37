"""
Finding wrong labels
====================

Forty percent of the labels of a training set of digits are wrong. Each training row gets a weight, and the weights are
chosen so that the model trained with them is good on a small set of clean labels: one hyperparameter a row. The plain
alternative asks for each row how probable its label is by models trained on the other rows. Which one finds the wrong
labels better, and which one leads to the better model, is what this example prints.
"""

import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

import bilevel
from problems.tuning import DataCleaning

jax.config.update("jax_enable_x64", True)

rng = np.random.default_rng(0)
X, digits = load_digits(return_X_y=True)
X = X / 16
order = rng.permutation(len(X))
train, clean, test = order[:500], order[500:700], order[700:]
wrong = rng.random(500) < 0.4
labels = np.where(wrong, (digits[train] + rng.integers(1, 10, 500)) % 10, digits[train])


def accuracy(rows, known, weights=None):
    """Of a plain logistic regression on the test set."""
    model = LogisticRegression(C=1.0, max_iter=1000).fit(X[rows], known, sample_weight=weights)
    return model.score(X[test], digits[test])


# %%
# A weight for each row
# ---------------------

problem = DataCleaning(X[train], labels, X[clean], digits[clean], penalty=1e-2)
x0, y0 = problem.initial()
begin = time.perf_counter()
found = bilevel.minimize(problem, x0, y0, tol=1e-3, max_steps=40, progress=True)
seconds = time.perf_counter() - begin
weights = np.asarray(jax.nn.sigmoid(found.x))
ours = roc_auc_score(wrong, -weights)
tuned = np.mean(np.asarray(problem.predict(found.y, X[test])) == digits[test])
print(f"weights: AUC {ours:.3f}, test accuracy {tuned:.3f}, {seconds:.0f} s")

# %%
# Out-of-fold confidence
# ----------------------
#
# It may use the clean rows as well, as rows to train on.

both, known = np.concatenate([train, clean]), np.concatenate([labels, digits[clean]])
model = LogisticRegression(C=0.1, max_iter=1000)
probabilities = np.asarray(cross_val_predict(model, X[both], known, cv=5, method="predict_proba"))
confidence = probabilities[np.arange(len(both)), known][:500]
plain = roc_auc_score(wrong, -confidence)
keep = np.concatenate([confidence > np.quantile(confidence, 0.4), np.ones(len(clean), bool)])
print(f"out-of-fold confidence: AUC {plain:.3f}, test accuracy of what is left {accuracy(both[keep], known[keep]):.3f}")
print(f"no cleaning at all: test accuracy {accuracy(both, known):.3f}")
print(f"the clean rows only: test accuracy {accuracy(clean, digits[clean]):.3f}")
print(f"all true labels: test accuracy {accuracy(both, digits[both]):.3f}")
better = "The confidence" if plain > ours else "The weights"
print(f"{better} found the wrong labels better here.")

# %%
# The picture: what both say of right and wrong labels, and the rows with the lowest weights.

figure, (first, second, third) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
for axis, score, name in ((first, weights, "weight"), (second, confidence, "out-of-fold confidence")):
    axis.hist([score[~wrong], score[wrong]], bins=20, label=["right", "wrong"], color=["tab:blue", "tab:red"])
    axis.set(xlabel=name, ylabel="rows")
    axis.legend(title="labels")
first.set_title(f"AUC {ours:.3f}")
second.set_title(f"AUC {plain:.3f}")
lowest = np.argsort(weights)[:20]
third.imshow(X[train][lowest].reshape(4, 5, 8, 8).transpose(0, 2, 1, 3).reshape(32, 40), cmap="gray_r")
for k, row in enumerate(lowest):
    third.text(8 * (k % 5), 8 * (k // 5) + 1.5, str(labels[row]), color="tab:red", fontsize=9)
third.set(title="The lowest weights, with their labels", xticks=[], yticks=[])

picture = Path("build", "data_cleaning.png").absolute()
picture.parent.mkdir(exist_ok=True)
figure.savefig(picture, dpi=120)
print(f"The picture: {picture}")
