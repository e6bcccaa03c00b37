"""Both estimators on the same data, judged by forecasts of what they have not seen."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import numpy as np

import bilevel

from . import _inputs as inputs
from .inverse import InverseJKO
from .quadratic import QuadraticJKO
from .scores import earth_mover, mmd

OWNER = "flows.compare"


class Comparison(eqx.Module):
    """What `compare` found: `scores` maps the name of an estimator to one score for each forecast, inf where the
    estimator failed (`failures` says why); `best` is the name with the smallest mean; `fits` are the `Result`s on all
    snapshots; `held_out` says which snapshots were forecast."""

    scores: dict[str, np.ndarray]
    fits: dict[str, Any]
    failures: dict[str, str] = eqx.field(static=True)
    held_out: tuple[int, ...] = eqx.field(static=True)
    score: str = eqx.field(static=True)

    @property
    def best(self) -> str:
        """The estimator with the smallest mean score."""
        return min(self.scores, key=lambda name: float(np.mean(self.scores[name])))

    def __repr__(self):
        width = max(map(len, self.scores))
        lines = [f"Comparison by {self.score} of one-step forecasts of snapshots {list(self.held_out)}:"]
        for name, values in sorted(self.scores.items(), key=lambda pair: float(np.mean(pair[1]))):
            mark = " <- best" if name == self.best else ""
            lines.append(f"  {name:<{width}}  {np.mean(values):.5g}{mark}")
        return "\n".join(lines)

    def plot(self, ax: Any = None):
        """Draws the score of each forecast for each estimator; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        for name, values in self.scores.items():
            label = f"{name} (mean {np.mean(values):.3g})" + (", chosen" if name == self.best else "")
            ax.plot(self.held_out, values, "o-", lw=2.5 if name == self.best else 1, label=label)
        ax.set(xlabel="snapshot held out", ylabel=f"{self.score} of its one-step forecast")
        ax.set_xticks(self.held_out)
        ax.legend()
        return ax


def compare(
    snapshots: Any,
    features: Any,
    step_size: Any,
    epsilon: Any,
    *,
    sharpening: Any = (0, 1.0, math.inf),
    internal: Any = 0,
    penalty: Any = None,
    ridge: Any = 0,
    weights: Any = None,
    test: Any = None,
    score: str = "emd",
) -> Comparison:
    """Fits `InverseJKO` for each `sharpening` and `QuadraticJKO` at new and old points, and scores their forecasts.

    **Arguments:** as for the estimators. `test`: snapshots of held-out particles at the same times, forecast one step
    ahead from each other by fits on all `snapshots`; None: each snapshot but the first in turn is left out of the fit
    and forecast from the one before. `score`: "emd" (earth mover's distance) or "mmd" (squared).

    **Returns:** a `Comparison`; `.best` names the estimator with the smallest mean, `.plot()` draws it.

    **Raises:** ValueError, TypeError as the estimators; an estimator that fails on these data (not identified, not
    converged) does not raise, its score is inf.
    """
    clouds = inputs.snapshots(OWNER, snapshots)
    masses = inputs.snapshot_weights(OWNER, weights, clouds)
    sizes = inputs.step_sizes(OWNER, step_size, len(clouds) - 1, clouds[0].dtype)
    if score not in ("emd", "mmd"):
        raise ValueError(f"{OWNER}: `score` must be 'emd' or 'mmd', found {score!r}.")
    judged = clouds if test is None else inputs.snapshots(OWNER, test)
    if len(judged) != len(clouds):
        raise ValueError(f"{OWNER}: `test` must have as many snapshots as `snapshots`, {len(clouds)}.")
    if test is None and len(clouds) < 3:
        raise ValueError(f"{OWNER}: leaving a snapshot out needs at least three, found {len(clouds)}; or give `test`.")
    makers = {}
    for rho in sharpening if isinstance(sharpening, (tuple, list)) else (sharpening,):
        options = {"sharpening": rho, "internal": internal, "penalty": penalty, "weights": masses}
        makers[f"entropic, sharpening {float(rho):g}"] = lambda without, o=options: InverseJKO(
            clouds, features, sizes, epsilon, without=without, **o
        )
    for at in ("new", "old"):
        makers[f"quadratic, {at} points"] = lambda without, at=at: QuadraticJKO(
            clouds, features, sizes, at=at, ridge=ridge, weights=masses, without=without
        )
    held = tuple(
        s for s in range(1, len(clouds)) if test is not None or any(s not in (t, t + 1) for t in range(len(sizes)))
    )
    measure = earth_mover if score == "emd" else mmd
    scores, fits, failures = {}, {}, {}
    for name, make in makers.items():
        values = []
        for s in held:
            key = None if test is not None else s
            model, found = _fitted(make, key, name, fits, failures)
            if model is None or found is None:
                values.append(math.inf)
                continue
            forecast = model.predict(found.x, judged[s - 1], 1, step_size=sizes[s - 1])[-1]
            good = bool(np.isfinite(np.asarray(forecast)).all())
            given = {} if test is not None else {"weights": masses[s - 1], "snapshot_weights": masses[s]}
            values.append(float(measure(forecast, judged[s], **given)) if good else math.inf)
        scores[name] = np.array(values)
        _fitted(make, None, name, fits, failures)
    return Comparison(scores, fits, failures, held, score)


def _fitted(make, without, name, fits, failures):
    """The model and its fit, or None with the reason noted; the fit on everything is kept."""
    try:
        model = make(without)
        found = fits.get(name) if without is None else None
        found = model.newton(tol=1e-8) if found is None else found
    except (ValueError, bilevel.NotConverged) as error:
        if isinstance(error, ValueError) and "not identified" not in str(error):
            raise
        failures[name] = str(error)
        return None, None
    if not found.converged and float(np.abs(found.gradient).max()) > 1e-5:
        failures[name] = found.message
        return model, None
    if without is None:
        fits[name] = found
    return model, found
