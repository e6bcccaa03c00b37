"""The matrix of hard cases: the right number or a refusal, never a wrong number. One row a case.

The cases live beside the benchmark that shows what other packages return on them, `python -m benchmarks.trust`.
"""

import numpy as np
import pytest

from benchmarks._trust import CASES, outcome


@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name):
    case = CASES[name]()
    said, error = outcome(case.ours, case.truth)
    if said:
        assert said in case.may
    else:
        assert "right" in case.may, f"a number came out, relative error {error}"
        assert error <= case.tolerance


def test_a_wrong_number_would_be_seen():
    case = CASES["cube root of 8"]()
    assert outcome(lambda: 1.01 * case.ours(), case.truth)[1] > case.tolerance
    assert outcome(lambda: np.nan, case.truth)[0] == "nan"
