"""Whether the loss determines the coefficients, and the direction along which it does not."""

from __future__ import annotations

from typing import Any

import numpy as np


def refuse_flat(function: str, hessian: Any, raw: Any) -> None:
    """Raises ValueError, naming the direction, where the Hessian is singular; `raw`: the features' second moments."""
    direction = _flat_direction(hessian, raw)
    if direction is not None:
        words = " + ".join(f"{v:.3g} features[{k}]" for k, v in enumerate(direction) if abs(v) > 1e-6)
        raise ValueError(
            f"InverseOT.{function}: theta is not identified: the loss is flat along {words} (theta moved by "
            f"{np.array2string(direction, precision=4)}): no coupling tells these features apart, or together they "
            f"are a function of one side plus a function of the other. Remove a feature, or add a penalty such as "
            f"L1(weight)."
        )


def _flat_direction(hessian: Any, raw: Any) -> np.ndarray | None:
    """The direction of the smallest scaled eigenvalue where that is zero to round-off."""
    H, raw = np.asarray(hessian), np.asarray(raw)
    eps = float(np.finfo(H.dtype).eps)
    if not np.all(raw > 0):
        return np.eye(len(raw))[int(np.argmin(raw))]
    scale = 1 / np.sqrt(raw)
    values, vectors = np.linalg.eigh(H * scale[:, None] * scale[None, :])
    if values[0] > 5e3 * eps * len(raw):
        return None
    direction = vectors[:, 0] * scale
    direction = np.where(np.abs(direction) < 1e-6 * np.max(np.abs(direction)), 0, direction)
    return direction / direction[np.argmax(np.abs(direction))]
