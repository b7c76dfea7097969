"""Successive halving: which search runs when, and what goes on."""

from __future__ import annotations

import torch

from agents.evolution.trials import SearchState, Trials


def run(scores: dict[tuple[int, ...], float], counts: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[list, Trials]:
    """Searches whose state is the path of numbers that they drew; each ten steps long a move."""
    trials = Trials(counts, lengths, {"path": torch.zeros(0)})
    state: SearchState = {"path": torch.zeros(0)}
    seen, steps, drawn = [], 0, 0
    while trials.pending:
        drawn += 1
        state = {"path": torch.cat([state["path"], torch.tensor([float(drawn)])])}
        path = tuple(int(x) for x in state["path"])
        steps += 10
        now = state
        chosen = trials.compare(steps, scores[path], lambda now=now: now)
        seen.append(path)
        if chosen is not None:
            state = chosen
    return seen, trials


SCORES = {(1,): 1.0, (2,): 5.0, (3,): 3.0, (4,): 4.0, (2, 5): 0.0, (4, 6): 9.0, (3, 7): 2.0}


def test_the_best_of_each_round_go_on_from_where_they_were() -> None:
    seen, trials = run(SCORES, (4, 3), (10, 10))
    assert seen == [(1,), (2,), (3,), (4,), (2, 5), (4, 6), (3, 7)]
    assert [state["path"].tolist() for state in trials.contenders] == [[4.0, 6.0]]
    assert trials.total_steps == 70


def test_a_search_lasts_for_its_steps() -> None:
    seen, trials = run({(1,): 1.0, (1, 2): 1.0, (3,): 2.0, (3, 4): 0.0}, (2,), (20,))
    assert seen == [(1,), (1, 2), (3,), (3, 4)]
    assert trials.contenders[0]["path"].tolist() == [1.0, 2.0]


def test_without_rounds_nothing_is_compared() -> None:
    trials = Trials((), (), {"path": torch.zeros(1)})
    assert not trials.pending
    assert trials.total_steps == 0
    assert trials.compare(10**9, 1.0, dict) is None


def test_states_are_kept_apart_from_later_updates() -> None:
    first = torch.zeros(1)
    trials = Trials((2,), (10,), {"x": first})
    first += 1
    current = torch.ones(1)
    begun = trials.compare(10, 1.0, lambda: {"x": current})
    assert begun is not None
    assert begun["x"] == 0
    current += 1
    best = trials.compare(20, 0.0, lambda: {"x": current})
    assert best is not None
    assert best["x"] == 1


def test_it_resumes_where_it_was() -> None:
    whole = Trials((4, 3), (10, 10), {"x": torch.zeros(1)})
    steps, scores = 0, [1.0, 5.0, 3.0, 4.0, 0.0, 9.0, 2.0]
    for index, score in enumerate(scores):
        resumed = Trials((4, 3), (10, 10), {"x": torch.full((1,), 99.0)})
        resumed.load(whole.tensors())
        steps += 10
        both = [
            trials.compare(steps, score, lambda index=index: {"x": torch.tensor([float(index)])})
            for trials in (whole, resumed)
        ]
        assert both[0] is not None
        assert both[1] is not None
        assert both[0]["x"] == both[1]["x"]
        assert whole.tensors().keys() == resumed.tensors().keys()
    assert not whole.pending
    assert set(whole.tensors()) == {"progress"}
