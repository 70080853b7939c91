"""What a micro-step costs, of the whole model and of 3 layers; on a regression the operators and lines that grew are printed."""

from __future__ import annotations

import pytest

from fakegpu.budgets import Budget, exceeded, grown, read_budgets
from fakegpu.measure import Measured, measured

SHORT = [budget for budget in read_budgets() if budget.job.layers]
LONG = [budget for budget in read_budgets() if not budget.job.layers]


def measure_all(budgets: list[Budget]) -> dict[str, Measured]:
    return {result.job: result for result in measured([budget.job for budget in budgets], top=400)}


@pytest.fixture(scope="module")
def short() -> dict[str, Measured]:
    return measure_all(SHORT)


@pytest.fixture(scope="module")
def long() -> dict[str, Measured]:
    return measure_all(LONG)


@pytest.mark.parametrize("budget", SHORT, ids=lambda budget: budget.job.name)
def test_a_micro_step_stays_within_its_budget(budget: Budget, short: dict[str, Measured]) -> None:
    lines = exceeded(budget, short[budget.job.name])
    assert not lines, "\n".join(lines)


@pytest.mark.verify
@pytest.mark.parametrize("budget", LONG, ids=lambda budget: budget.job.name)
def test_a_micro_step_of_any_method_stays_within_its_budget(budget: Budget, long: dict[str, Measured]) -> None:
    lines = exceeded(budget, long[budget.job.name])
    assert not lines, "\n".join(lines)


def test_a_regression_names_operator_and_line() -> None:
    before = [[10.0, "aten::mul", "[forward] phi3v/model/vision.py:40 x * y"], [3.0, "aten::mm", "a.py:1 x"]]
    now = [[16.0, "aten::mul", "[forward] phi3v/model/vision.py:44 x * y"], [3.0, "aten::mm", "a.py:9 x"]]
    assert grown(before, now) == ["    +6.00 to 16.00  aten::mul  [forward] phi3v/model/vision.py x * y"]
