"""Class labels: checked, and turned into numbers."""

from __future__ import annotations

from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np

from ._criteria import AbstractRows, CrossValidation


def negative_label(owner: str, y: Any) -> int:
    """0 or -1, whichever the other class of y is called; ValueError naming what was found instead."""
    found = _values(y)
    for negative in (0, -1):
        if found == {negative, 1}:
            return negative
    if len(found) == 1 and found <= {0, 1, -1}:
        raise ValueError(f"{owner}: `y` has one class only, all its labels are {found.pop():g}.")
    raise ValueError(f"{owner}: the labels `y` must be 0 and 1, or -1 and 1, found {_listed(found)}.")


def signs(owner: str, name: str, y: Any, negative: int) -> np.ndarray:
    """Labels as -1.0 and 1.0, of y's shape."""
    found = _values(y)
    if not found <= {negative, 1}:
        raise ValueError(f"{owner}: the labels `{name}` must be {negative} and 1, as in `y`, found {_listed(found)}.")
    return np.where(np.asarray(y) == 1, 1.0, -1.0)


def class_labels(owner: str, y: Any) -> tuple:
    """The classes of y, sorted, at least two; ValueError for one class, NaN, or labels that are continuous."""
    array = np.asarray(y)
    if array.dtype.kind in "fc" and not np.all(np.isfinite(array)):
        raise ValueError(f"{owner}: the labels `y` have entries that are NaN or infinite.")
    if array.dtype.kind == "f" and np.any(array != np.round(array)):
        raise ValueError(
            f"{owner}: the labels `y` must be classes, found the number {array[array != np.round(array)][0]:g}."
        )
    classes = np.unique(array.astype(int) if array.dtype.kind in "fb" else array)
    if len(classes) < 2:
        raise ValueError(f"{owner}: `y` has one class only, all its labels are {_listed(set(classes.tolist()))}.")
    return tuple(classes.tolist())


def class_numbers(owner: str, name: str, y: Any, classes: tuple) -> np.ndarray:
    """Labels as 0.0, 1.0, …: their places in `classes`, of y's shape."""
    array = np.asarray(y)
    strange = ~np.isin(array, classes)
    if strange.any():
        found = _listed(set(np.unique(array[strange]).tolist()))
        raise ValueError(f"{owner}: the labels `{name}` must be those of `y`, found {found}.")
    return np.searchsorted(np.asarray(classes), array).astype(float)


def named(classes: tuple, numbers: jax.Array) -> Any:
    """The labels at the places `numbers`: a JAX array where labels are integers, else a NumPy array."""
    if isinstance(classes[0], int):
        return jnp.asarray(classes)[numbers]
    return np.asarray(classes)[np.asarray(numbers)]


def check_folds(owner: str, criterion: AbstractRows) -> None:
    """Raises ValueError where a fold trains without one of the classes."""
    if not isinstance(criterion, CrossValidation) or isinstance(criterion.train, jax.core.Tracer):
        return
    weights, targets = np.asarray(criterion.train), criterion.targets
    if isinstance(targets, jax.core.Tracer):
        return
    targets = np.asarray(targets)
    for label in np.unique(targets):
        alone = np.flatnonzero(~(weights @ (targets == label) > 0))
        if alone.size:
            classes = len(np.unique(targets))
            why = "have one class only" if classes == 2 else f"lack one of the {classes} classes"
            raise ValueError(f"{owner}: `cv`, fold {alone[0]}: its training rows {why}.")


def _values(y: Any) -> set:
    array = np.asarray(y).ravel()
    if array.dtype.kind in "biuf":
        return set(np.unique(array.astype(float)).tolist())
    return set(map(str, array.tolist()))


def _listed(found: set) -> str:
    some = sorted(found, key=str)
    return ", ".join(f"{v:g}" if isinstance(v, float) else repr(v) for v in some[:5]) + (", …" if len(some) > 5 else "")
