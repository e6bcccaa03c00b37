"""The search's optimizations: one shared penalty, and own penalties pulled towards it."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel._compiling import quickly

from ._search_setup import Setup

INNER_STEPS, SWEEPS = 200, 10**5
"""Of an inner solver, and of coordinate descent in all folds together: a fit that takes more, at an extreme penalty, is
not worth waiting for."""


AGAIN = 5
"""How often a descent that failed goes on from where it was, in a box."""


FLAT = 5
"""Steps that together must lower the criterion by a tenth of the tolerance, relatively; where the criterion has kinks
also evaluations, by three tenths (`ftol` of `bilevel.minimize`)."""


SMALL = 2**21
"""Numbers in a problem up to which compiling takes longer than running what is compiled: then it is done quickly."""


class Point(NamedTuple):
    """A point of the search: the (mixed) log-penalties, the inner solution, the criterion's value and its history.
    `pressed`: by which share of it the criterion would still fall for each unit that bounds of x were moved outward."""

    x: np.ndarray
    y: Any
    value: float
    history: list[dict]
    pressed: float


class Search:
    """Minimizes the criterion of one `Setup`; every problem has the same shapes, so that all share one program."""

    def __init__(self, setup: Setup, n_iter: int, tol: float, verbose: int, unit: float = 1.0):
        self.setup, self.n_iter, self.tol, self.verbose = setup, n_iter, tol, verbose
        self.unit = unit  # of the criterion; the best value that the scan has seen
        self.worst = 0.0  # that the scan has seen
        self.failed: list[str] = []  # what ended a descent early, or kept a penalty from being tried

    def shared(self, near: np.ndarray | None = None) -> Point:
        """The best point with one penalty for all: a coarse scan, then descent; with `near` from there."""
        setup, size = self.setup, len(self.setup.own)
        problem = setup.problem(True, np.zeros(size), 0.0, self.unit)
        y = problem.inner.initial()
        if near is not None:
            with contextlib.suppress(bilevel.NotConverged):  # else from wherever the estimator can be trained
                return self._descend(problem, np.clip(near, setup.lower, setup.upper), y)
        tried, missed = [], []
        for x in setup.scan:
            try:
                (found,), _ = self._minimize(problem, x, y, 0)
            except bilevel.NotConverged as error:
                missed.append((x, f"at log-penalties of {np.unique(setup.offset + x)}: {error}"))
                continue
            y = found.y
            tried.append((found.value, tuple(x), y))
        if not tried:
            raise ValueError(
                "HypergradientSearchCV: the estimator could not be trained at any of the penalties tried. The first "
                f"time, {missed[0][1]}"
            )
        value, x, y = min(tried, key=lambda t: t[0])
        self.worst = self.unit * max(abs(v) for v, _, _ in tried)
        self.unit, x = self.unit * abs(value) or 1.0, np.array(x)
        problem = setup.problem(True, np.zeros(size), 0.0, self.unit)
        best = self._descend(problem, x, y, setup.around(x) if setup.kinks else None)
        # what could not be tried matters where the descent was stopped there
        self.failed += [said for other, said in missed if np.any((other != x) & (np.abs(best.x - other) < 1e-6))]
        return self._towards_bounds(problem, best)

    def own(self, shared: Point, strength: float, start: Point | None = None) -> Point:
        """The best point with own penalties, pulled towards the shared one, from there or from `start`."""
        start = shared if start is None else start
        pull = strength * abs(shared.value) / self.unit
        return self._descend(self.setup.problem(False, shared.x, pull, self.unit), start.x, start.y)

    def _towards_bounds(self, problem: Any, best: Point) -> Point:
        """Where a penalty that is not an own one hardly matters any more, it is sent to its lower bound."""
        setup = self.setup
        if setup.own.any() or len(setup.own) < 2 or best.x[1] > -4:
            return best
        x = np.array([best.x[0], setup.lower[1]])
        try:
            found = self._descend(problem, x, best.y)
        except bilevel.NotConverged:  # it cannot be trained there
            return best
        return found if found.value <= best.value + 1e-4 * abs(best.value) else best

    def _descend(self, problem: Any, x: np.ndarray, y: Any, bounds: Any = None) -> Point:
        return self._point(problem, self._states(problem, x, y, bounds or (self.setup.lower, self.setup.upper)))

    def _states(
        self, problem: Any, x: np.ndarray, y: Any, bounds: tuple[np.ndarray, np.ndarray]
    ) -> list[bilevel.State]:
        """The accepted points. Where a long step led to where the estimator cannot be trained, shorter ones go on."""
        lower, upper = bounds
        states, failure = self._minimize(problem, x, y, self.n_iter, bounds)
        radius = 1.0
        for _ in range(AGAIN):
            left = self.n_iter - (len(states) - 1)
            if not failure or left < 1:
                break
            x = np.asarray(states[-1].x)
            box = np.maximum(lower, x - radius), np.minimum(upper, x + radius)
            try:
                more, again = self._minimize(problem, x, states[-1].y, left, box)
            except bilevel.NotConverged:
                break
            states += more[1:]
            x = np.asarray(states[-1].x)
            at_edge = np.any(((x <= box[0]) & (x > lower)) | ((x >= box[1]) & (x < upper)))
            failure, radius = again or (failure if at_edge else ""), 0.3 * radius if again else radius
        if failure:
            self.failed.append(failure)
        return states

    def _point(self, problem: Any, states: list[bilevel.State]) -> Point:
        """Where they end, and the history, in the criterion's own units."""
        setup, unit, found = self.setup, self.unit, states[-1]
        history = [
            {
                "step": k, "value": s.value * unit, "gradient_norm": float(np.linalg.norm(s.gradient)) * unit,
                "error": s.error * unit,
            }
            for k, s in enumerate(states)
        ]  # fmt: skip
        x, slope = np.asarray(found.x), np.asarray(found.gradient)
        outward = np.where(x <= setup.lower, slope, 0) - np.where(x >= setup.upper, slope, 0)
        if float(problem.mixing.shared) > 0:
            x = np.where(setup.own, np.mean(x[setup.own]) if setup.own.any() else 0.0, x)
        x, pressed = np.clip(x, setup.lower, setup.upper), float(np.sum(np.maximum(outward, 0)))
        return Point(x, found.y, history[-1]["value"], history, pressed)

    def _minimize(self, problem: Any, x: np.ndarray, y: Any, steps: int, bounds: Any = None) -> tuple[list, str]:
        """What was accepted, the start first, until a hypergradient on the way failed, and how that was said; raises
        `NotConverged` where the first one does."""
        lower, upper = (jnp.asarray(side) for side in bounds or (self.setup.lower, self.setup.upper))
        # where n entries share a penalty, each sees an n-th of its slope
        among = max(1, int(self.setup.own.sum())) if float(problem.mixing.shared) > 0 else 1
        data = sum(leaf.size for leaf in jax.tree.leaves(problem) if eqx.is_array(leaf))
        states: list[bilevel.State] = []
        kinks = self.setup.kinks

        def note(state: bilevel.State) -> None:
            states.append(state)
            if len(states) > FLAT and states[-1 - FLAT].value - state.value <= 0.1 * self.tol * abs(state.value):
                raise StopIteration

        try:
            with quickly(data <= SMALL):
                bilevel.minimize(
                    problem, jnp.asarray(x, float), y, bounds=(lower, upper), tol=self.tol / among,
                    max_steps=int(steps), ftol=0.3 * self.tol if kinks else 0.0, callback=note,
                    progress=bool(self.verbose) and steps > 0, max_inner_steps=SWEEPS if kinks else INNER_STEPS,
                )  # fmt: skip
        except bilevel.NotConverged as error:
            if not states:
                raise
            return states, f"after {len(states) - 1} outer steps: {error}"
        return states, ""
