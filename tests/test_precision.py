"""Float32 copies of large data: made once, gone with the data, never stale."""

import gc

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import _precision as precision

from .helpers import glm, reference, relative


def large(seed):
    return glm("logistic", seed, 5000, 4)


@pytest.mark.long
def test_copies_are_kept_as_long_as_the_data_and_follow_them(monkeypatch):
    monkeypatch.setattr(precision, "WORTH", 2**14)
    before = len(precision._copies)
    case = large(0)
    first = precision.kept_copies(case.problem.inner)
    again = precision.kept_copies(case.problem.inner)
    assert len(first) >= 1
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert all(copy.dtype == jnp.float32 for copy in first)
    other = large(1)
    for data in (case, other, case):
        found = bilevel.hypergradient(*data, rtol=1e-8)
        assert relative(found.gradient, reference(*data).gradient) < 1e-8
    assert len(precision._copies) > before
    del case, other, data, first, again, found
    gc.collect()
    assert len(precision._copies) == before


def test_arrays_that_may_change_and_small_ones_are_not_kept():
    assert precision.kept_copies(np.ones((2**19, 2))) == (None,)
    assert precision.kept_copies(jnp.ones(10)) == ()
