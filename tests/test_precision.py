"""Float32 copies of large data: made once, gone with the data, never stale."""

import gc
import re

import jax
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


@pytest.mark.long
@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_products_have_all_their_digits_where_the_default_has_fewer(monkeypatch, backend):
    """All matrix products that a hypergradient, a solution and its derivatives take ask for them on a GPU."""
    A = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    inner = bilevel.Minimization(lambda x, y: jnp.sum(jnp.square(A @ y - x)) + jnp.sum(jnp.square(y)))
    problem = bilevel.BilevelProblem(inner, lambda x, y: jnp.sum(A @ y))
    x, y0 = jnp.ones(4, jnp.float32), jnp.zeros(3, jnp.float32)
    solution = lambda x: jnp.sum(jnp.sin(bilevel.solve(inner, x, y0).y))

    def asked():
        programs = (
            lambda x: bilevel.hypergradient(problem, x, y0).gradient,
            lambda x: bilevel.estimate(problem, x, y0).gradient,
            lambda x: bilevel.hessian_vector_product(problem, x, y0, x),
            jax.grad(jax.jit(solution)),
            jax.jacfwd(solution),
        )
        found = []
        for program in programs:
            products = str(jax.make_jaxpr(program)(x)).split("dot_general[")[1:]
            words = (re.search(r"^.*?preferred_element_type", one, re.DOTALL) for one in products)
            found.append({w for word in words if word for w in re.findall(r"Precision\.\w+", word[0]) or ["default"]})
        return found

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for words in asked():
        assert "default" in words if backend == "cpu" else words == {"Precision.HIGHEST"}
    with jax.default_matmul_precision("high"):  # JAX's own linear algebra asks for the highest here and there
        assert all("Precision.HIGH" in words and "default" not in words for words in asked())
