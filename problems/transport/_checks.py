"""What every problem here asks of its arguments. What is traced is checked only by its shape."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def is_concrete(value: Any) -> bool:
    """Whether the numbers of an array, or of a number, can be looked at."""
    return not isinstance(value, jax.core.Tracer)


def as_floating(owner: str, name: str, value: Any, ndim: int | None = None) -> Array:
    """The value as a floating array (integers become JAX's default); TypeError, ValueError naming it otherwise."""
    if value is None or isinstance(value, str):
        raise TypeError(f"{owner}: `{name}` must be an array of real numbers, found {value!r}.")
    if hasattr(value, "todense"):
        raise TypeError(f"{owner}: `{name}` is a sparse matrix; pass a dense array, for example {name}.toarray().")
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
        kind = np.dtype(array.dtype).kind
    except (TypeError, ValueError) as error:
        raise TypeError(f"{owner}: `{name}` must be an array of real numbers, found {type(value).__name__}.") from error
    if kind == "c":
        raise ValueError(f"{owner}: `{name}` must be real, found dtype {array.dtype}.")
    if kind not in "fiub" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{owner}: `{name}` must be an array of real numbers, found dtype {array.dtype}.")
    if ndim is not None and array.ndim != ndim:
        axes = {0: "be a number", 1: "have one axis", 2: "have two axes"}[ndim]
        raise ValueError(f"{owner}: `{name}` must {axes}, found shape {array.shape}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.result_type(float))
    return jnp.asarray(array)


def common_dtype(*arrays: Any) -> Any:
    """The widest floating dtype among the arrays (Python numbers have no say)."""
    found = [np.dtype(a.dtype) for a in arrays if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)]
    return max(found, key=lambda d: d.itemsize) if found else jnp.result_type(float)


def check_finite(owner: str, name: str, value: Any) -> None:
    """Raises ValueError where a concrete array has NaN or infinite entries."""
    if not is_concrete(value):
        return
    array = np.asarray(value)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{owner}: `{name}` has {len(bad)} entries that are NaN or infinite, the first at {first}; remove or "
            f"replace them."
        )


def check_weights(owner: str, name: str, value: Any, count: int | None = None) -> Array:
    """Weights of points, shape (count,): finite, none negative, not all zero."""
    array = as_floating(owner, name, value, 1)
    if count is not None and array.shape != (count,):
        raise ValueError(f"{owner}: `{name}` has {array.shape[0]} entries, but the cost has {count} of its points.")
    if array.size == 0:
        raise ValueError(f"{owner}: `{name}` is empty: there is no point to transport.")
    check_finite(owner, name, array)
    if is_concrete(array):
        numbers = np.asarray(array)
        negative = np.flatnonzero(numbers < 0)
        if negative.size:
            raise ValueError(
                f"{owner}: `{name}` has {negative.size} negative weights, the first is {numbers[negative[0]]:g} at "
                f"index {negative[0]}; weights are at least 0."
            )
        if not numbers.any():
            raise ValueError(f"{owner}: all weights in `{name}` are zero: there is no mass to transport.")
    return array


def check_equal_mass(owner: str, a: Any, b: Any) -> None:
    """Raises ValueError where two concrete measures differ in mass by more than rounding."""
    if not (is_concrete(a) and is_concrete(b)):
        return
    first, second = (float(np.sum(np.asarray(w, np.float64))) for w in (a, b))
    eps = float(np.finfo(np.asarray(a).dtype).eps)
    if abs(first - second) > 100 * eps * max(np.size(a), np.size(b)) * max(first, second):
        raise ValueError(
            f"{owner}: `a` and `b` must have the same total mass where both marginals are kept exactly, found "
            f"{first:.12g} and {second:.12g}; normalise them, or pass a finite `tau`."
        )


def check_positive(owner: str, name: str, value: Any, *, infinite: bool = False) -> Array:
    """A positive number as a scalar array; infinity only where it has a meaning."""
    if isinstance(value, bool) or isinstance(value, str) or value is None:
        raise TypeError(f"{owner}: `{name}` must be a positive number, found {value!r}.")
    array = as_floating(owner, name, value, 0)
    if is_concrete(array):
        number = float(array)
        if math.isnan(number) or number <= 0 or (math.isinf(number) and not infinite):
            words = "positive" if infinite else "positive and finite"
            raise ValueError(f"{owner}: `{name}` must be {words}, found {number:g}.")
    return array


def tau_pair(owner: str, tau: Any) -> tuple[Array | None, Array | None]:
    """`tau`, a number or a pair, as one entry for each marginal: None where it is infinite (kept exactly)."""
    if isinstance(tau, (tuple, list)):
        if len(tau) != 2:
            raise ValueError(f"{owner}: `tau` must be a number or a pair of them, found {len(tau)} entries.")
        pair = tuple(tau)
    elif np.ndim(tau) == 1 and np.shape(tau) == (2,):
        pair = (tau[0], tau[1])
    else:
        pair = (tau, tau)
    return _tau(owner, pair[0]), _tau(owner, pair[1])


def _tau(owner: str, value: Any) -> Array | None:
    if value is None or (is_concrete(value) and np.ndim(value) == 0 and _is_infinite(value)):
        return None
    return check_positive(owner, "tau", value)


def _is_infinite(value: Any) -> bool:
    try:
        return float(value) == math.inf
    except (TypeError, ValueError):
        return False
