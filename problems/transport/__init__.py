"""Entropic optimal transport, balanced and unbalanced, as an inner problem; inverse optimal transport over it."""

from . import gaussian

__all__ = ["gaussian"]
