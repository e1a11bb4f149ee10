from lemix.supervision import RestartBudget


def test_a_budget_is_spent_and_comes_back_with_time() -> None:
    budget = RestartBudget(max_restarts=3, window_s=60)
    assert [budget.take(now_s) for now_s in (0, 1, 2, 3)] == [True, True, True, False]
    assert not budget.take(59.9)
    assert budget.take(60.1)
    assert not budget.take(60.2)
