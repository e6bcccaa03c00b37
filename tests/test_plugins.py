"""The contract over every problem that a plugin lists: a new one is tested by being listed."""

import jax
import pytest

import bilevel.testing
from problems import flows, transport, tuning

PLUGINS = {"tuning": tuning, "transport": transport, "flows": flows}
CASES = {f"{name}: {key}": make for name, plugin in PLUGINS.items() for key, make in plugin.examples().items()}
# what `make test` has time for; the others run in `make test-slow`
QUICK = ("tuning: ridge, folds, shared",)


@pytest.mark.long
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_listed_problems_pass_the_checks(name):
    problem, x, y0 = CASES[name](jax.random.PRNGKey(1))
    bilevel.testing.check_problem(problem, x, y0)
