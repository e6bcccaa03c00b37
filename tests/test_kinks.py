"""A minimum at a kink is seen from two points beside it."""

import numpy as np

from bilevel._oracle import Evaluation
from bilevel._outer import Setting, kink_between


def at(x, gradient):
    nothing = np.zeros(0)
    return Evaluation(np.array(x, float), 0.0, np.array(gradient, float), 0.0, nothing, nothing, False)


def setting(size, tol=1e-4, lower=-5.0):
    return Setting(np.full(size, lower), np.full(size, 5.0), None, None, tol, 100)


def test_one_variable():
    left, right = at([1.0], [-0.5]), at([1.0 + 5e-6], [0.7])
    assert kink_between(left, right, setting(1), 1.0)
    assert kink_between(right, left, setting(1), 1.0)
    assert not kink_between(at([1.0], [0.5]), at([1.0 + 5e-6], [-0.7]), setting(1), 1.0)  # a maximum
    assert not kink_between(left, at([1.001], [0.7]), setting(1), 1.0)  # too far apart for this tolerance
    assert not kink_between(left, at([1.0 + 5e-6], [-0.4]), setting(1), 1.0)  # falls through
    assert not kink_between(at([1.0], [-1e-4]), at([1.0 + 5e-6], [1e-4]), setting(1), 1.0)  # smooth, nearly there
    assert not kink_between(left, left, setting(1), 1.0)


def test_several_variables_have_a_way_to_go_unless_an_average_of_the_gradients_vanishes():
    left, right = at([1.0, 2.0], [-0.5, 1e-5]), at([1.0 + 5e-6, 2.0], [0.7, -2e-5])
    assert kink_between(left, right, setting(2), 1.0)
    assert not kink_between(left, at([1.0 + 5e-6, 2.0], [0.7, 0.1]), setting(2), 1.0)
    along = at([1.0, 2.0], [-0.5, 0.3]), at([1.0 + 5e-6, 2.0], [0.5, -0.3])  # a kink across both
    assert kink_between(*along, setting(2), 1.0)
    # what a bound holds does not count
    held = at([1.0, 2.0], [-0.5, 0.4]), at([1.0 + 5e-6, 2.0], [0.7, 0.4])
    assert not kink_between(*held, setting(2), 1.0)
    assert kink_between(*held, setting(2, lower=2.0)._replace(lower=np.array([-5.0, 2.0])), 1.0)
