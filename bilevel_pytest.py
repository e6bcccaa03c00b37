"""`pytest --problems=mypackage.mymodule`: the checks of `bilevel.testing` on every problem that a module lists.

A pytest plugin, registered by an entry point. It imports nothing of bilevel until the option is given and pytest
collects: jaxtyping's import hook, which is a pytest plugin as well, has to see the packages first.
"""

from __future__ import annotations

import importlib
import os
import sys

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options; pytest calls this."""
    group = parser.getgroup("bilevel")
    group.addoption(
        "--problems",
        action="append",
        default=[],
        metavar="MODULE",
        help="check every bilevel problem in MODULE.examples(), a dict from a name to a function "
        "key -> (problem, x, y0) of a JAX PRNG key; may be given several times. Only these are run.",
    )
    group.addoption("--problems-float32", action="store_true", help="leave JAX in float32 while doing so")


def pytest_configure(config: pytest.Config) -> None:
    """Takes collection over where the option is given; pytest calls this."""
    if config.getoption("--problems"):
        config.pluginmanager.register(_Problems(config), "bilevel-problems")


class _Problems:
    """Collects one test a problem, instead of the folder's test files."""

    def __init__(self, config: pytest.Config):
        self.modules = [name for given in config.getoption("--problems") or [] for name in given.split(",") if name]
        self.single = config.getoption("--problems-float32")

    def pytest_ignore_collect(self, collection_path) -> bool | None:
        """Test files are not what was asked for."""
        return True if collection_path.is_file() else None

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self, session: pytest.Session):
        """What the modules list, after whatever pytest collects (nothing)."""
        outcome = yield
        here = os.getcwd()
        if here not in sys.path:  # a module beside the caller, as with `python -m`
            sys.path.insert(0, here)
        session.items[:] = [
            item
            for module in self.modules
            for item in _Module.from_parent(session, name=module, nodeid=module).collect()
        ]
        if not self.single:
            import jax

            jax.config.update("jax_enable_x64", True)
        for item in session.items:
            session.config.hook.pytest_itemcollected(item=item)
        session.testscollected = len(session.items)
        return outcome


class _Module(pytest.Collector):
    def collect(self):
        try:
            module = importlib.import_module(self.name)
        except ImportError as error:
            raise pytest.UsageError(f"--problems={self.name}: cannot import it: {error}") from error
        listed = getattr(module, "examples", None)
        if not callable(listed):
            raise pytest.UsageError(
                f"--problems={self.name}: the module has no function examples() -> {{name: key -> (problem, x, y0)}}."
            )
        made = listed()
        if not isinstance(made, dict) or not made:
            raise pytest.UsageError(f"--problems={self.name}: examples() must return a dict with at least one entry.")
        for name, make in made.items():
            yield _Problem.from_parent(self, name=str(name), make=make)


class _Problem(pytest.Item):
    def __init__(self, *, make, **kwargs):
        super().__init__(**kwargs)
        self.make = make

    def runtest(self) -> None:
        import jax

        from bilevel.testing import check_problem

        problem, x, y0 = self.make(jax.random.key(0))
        check_problem(problem, x, y0)

    def repr_failure(self, excinfo, style=None):
        """An AssertionError of a check says all there is to say."""
        if isinstance(excinfo.value, AssertionError) and str(excinfo.value).startswith("bilevel.testing."):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        parent = self.parent.name if self.parent is not None else ""
        return self.path, None, f"{parent}: {self.name}"
