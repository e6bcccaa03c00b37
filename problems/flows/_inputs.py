"""Points, weights and numbers as people hand them over: checked where they are concrete, with errors that name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def concrete(value: Any) -> bool:
    """Whether entries can be looked at."""
    return not isinstance(value, jax.core.Tracer)


def real(owner: str, name: str, values: Any) -> Array:
    """A floating array, finite where concrete; integers become JAX's default floating dtype."""
    if not concrete(values):
        return values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(float)
    array = values if isinstance(values, jax.Array) else np.asarray(values)
    if jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool:
        return jnp.asarray(array, float)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{owner}: {name} must hold real numbers, found dtype {array.dtype}.")
    finite = np.isfinite(np.asarray(array))
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        where = "" if not first else f", the first at {first[0] if len(first) == 1 else first}"
        raise ValueError(f"{owner}: {name} has {int((~finite).sum())} entries that are NaN or infinite{where}.")
    return jnp.asarray(array)


def points(owner: str, name: str, values: Any, *, dimension: int | None = None, like: str = "") -> Float[Array, "n d"]:
    """An array of shape (n, d), n and d at least 1; raises ValueError for anything else."""
    array = real(owner, name, values)
    if array.ndim != 2:
        hint = "; points on a line have shape (n, 1)" if array.ndim == 1 else ""
        raise ValueError(f"{owner}: {name} must have shape (points, dimension), found shape {array.shape}{hint}.")
    if array.shape[0] == 0:
        raise ValueError(f"{owner}: {name} is empty, its shape is {array.shape}.")
    if array.shape[1] == 0:
        raise ValueError(f"{owner}: {name} has points of dimension 0, its shape is {array.shape}.")
    if dimension is not None and array.shape[1] != dimension:
        raise ValueError(f"{owner}: {name} has dimension {array.shape[1]}, but {like} has dimension {dimension}.")
    return array


def weights(owner: str, name: str, values: Any, count: int, dtype: Any) -> Float[Array, " n"]:
    """Non-negative weights of `count` points, not all zero; None: 1 / count each."""
    if values is None:
        return jnp.full((count,), 1 / count, dtype)
    array = real(owner, name, values)
    if array.shape != (count,):
        raise ValueError(f"{owner}: {name} must have shape ({count},), one weight for each point, found {array.shape}.")
    if concrete(array):
        found = np.asarray(array)
        if (found < 0).any():
            worst = int(found.argmin())
            raise ValueError(f"{owner}: {name} must not be negative, entry {worst} is {found[worst]:g}.")
        if not found.sum() > 0:
            raise ValueError(f"{owner}: {name} are all zero.")
    return array.astype(dtype)


def number(owner: str, name: str, value: Any, dtype: Any, *, zero: bool = False) -> Float[Array, ""]:
    """One number, positive (`zero`: or zero) where concrete."""
    if isinstance(value, (str, bool)) or value is None:
        raise TypeError(f"{owner}: {name} must be a number, found {value!r}.")
    array = real(owner, name, value)
    if array.shape != ():
        raise ValueError(f"{owner}: {name} must be one number, found shape {array.shape}.")
    if concrete(array) and not (float(array) >= 0 if zero else float(array) > 0):
        bound = "at least 0" if zero else "positive"
        raise ValueError(f"{owner}: {name} must be {bound}, found {float(array):g}.")
    return array.astype(dtype)


def common_dtype(*arrays: Array) -> Any:
    """The widest floating dtype."""
    dtype = arrays[0].dtype
    for array in arrays[1:]:
        dtype = jnp.promote_types(dtype, array.dtype)
    return dtype


def snapshots(owner: str, values: Any) -> tuple[Array, ...]:
    """At least two clouds of points of one dimension, in one dtype; raises ValueError, TypeError naming the one."""
    if isinstance(values, (jax.Array, np.ndarray)) and values.ndim == 3:
        values = list(values)
    if isinstance(values, (str, dict)) or not isinstance(values, Sequence):
        raise TypeError(
            f"{owner}: `snapshots` must be a sequence of arrays of shape (points, dimension), found "
            f"{type(values).__name__}."
        )
    if len(values) < 2:
        raise ValueError(f"{owner}: `snapshots` must hold at least two snapshots, found {len(values)}.")
    first = points(owner, "`snapshots`, number 0,", values[0])
    rest = [
        points(owner, f"`snapshots`, number {t},", one, dimension=first.shape[1], like="number 0")
        for t, one in enumerate(values[1:], 1)
    ]
    dtype = common_dtype(first, *rest)
    return tuple(one.astype(dtype) for one in (first, *rest))


def snapshot_weights(owner: str, values: Any, clouds: Sequence[Array]) -> tuple[Array, ...]:
    """Probabilities for each snapshot; None: all points alike."""
    if values is None:
        values = [None] * len(clouds)
    if not isinstance(values, Sequence) or len(values) != len(clouds):
        found = len(values) if isinstance(values, Sequence) else type(values).__name__
        raise ValueError(f"{owner}: `weights` must have one entry for each of {len(clouds)} snapshots, found {found}.")
    out = []
    for t, (one, cloud) in enumerate(zip(values, clouds, strict=True)):
        one = weights(owner, f"`weights`, number {t},", one, len(cloud), cloud.dtype)
        out.append(one / jnp.sum(one))
    return tuple(out)


def step_sizes(owner: str, value: Any, steps: int, dtype: Any) -> Float[Array, " steps"]:
    """A positive number for each step, from one number or one for each."""
    if isinstance(value, (list, tuple)):
        value = np.asarray(value)
    array = real(owner, "`step_size`", value)
    if array.shape not in ((), (steps,)):
        raise ValueError(
            f"{owner}: `step_size` must be a number, or one for each of the {steps} steps, found shape {array.shape}."
        )
    if concrete(array) and not np.all(np.asarray(array) > 0):
        raise ValueError(f"{owner}: `step_size` must be positive, found {float(np.asarray(array).min()):g}.")
    return jnp.broadcast_to(array.astype(dtype), (steps,))


def kept_steps(owner: str, without: Any, count: int) -> list[int]:
    """The steps between `count` snapshots that do not touch snapshot number `without`."""
    if without is None:
        return list(range(count - 1))
    if isinstance(without, bool) or not isinstance(without, int) or not 0 <= without < count:
        raise ValueError(f"{owner}: `without` must be the number of a snapshot, 0 to {count - 1}, found {without!r}.")
    keep = [t for t in range(count - 1) if without not in (t, t + 1)]
    if not keep:
        raise ValueError(f"{owner}: without snapshot {without} there is no step left; give more `snapshots`.")
    return keep
