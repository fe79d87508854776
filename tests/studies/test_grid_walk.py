"""The rules of the grid walk, against a search of the board."""

import itertools
import random
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "studies" / "grid_walk"


@pytest.fixture
def walk(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "walk", raising=False)
    import walk

    yield walk
    sys.modules.pop("walk", None)


def steps_to(goal, side):
    """Of every square, by breadth-first search."""
    found, edge = {goal: 0}, [goal]
    while edge:
        x, y = edge.pop(0)
        for near in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            if near not in found and all(0 <= c < side for c in near):
                found[near] = found[x, y] + 1
                edge.append(near)
    return found


def test_best_moves_are_those_of_a_search(walk):
    squares = list(itertools.product(range(walk.SIDE), repeat=2))
    for goal in random.Random(0).sample(squares, 6):
        steps = steps_to(goal, walk.SIDE)
        for square in squares:
            nearer = {m for m in walk.STEPS if steps.get(walk.moved(square, m), 99) == steps[square] - 1}
            assert set(walk.best_moves(square, goal)) == nearer


def test_no_task_is_trained_on_and_tested_on(walk):
    train, test = walk.split_tasks()
    assert len(test) == walk.TEST == len(set(test))
    assert not set(train) & set(test)
    assert all(walk.distance(task.start, task.goal) >= walk.LEAST for task in train + test)


def test_who_arrives(walk):
    draw = random.Random(1)
    for task in walk.split_tasks()[1]:
        forced = walk.random_moves(draw, task.start, draw.randrange(5))
        assert not walk.leaves_the_board(task.prompt + forced, "")
        assert walk.arrives(task.prompt, walk.shortest_walk(draw, task))
    assert walk.arrives("00>22:", "RRUU")
    assert walk.arrives("00>22:RU", "UR")  # from where the forced moves have led
    assert walk.arrives("00>22:", "RRRLUUDU")  # twice the shortest
    assert not walk.arrives("00>22:", "RRRLUUDUDU")  # longer
    assert not walk.arrives("00>22:", "RRU")
    assert not walk.arrives("00>22:", "RRUUU")
    assert not walk.arrives("00>22:", "LRRRUU")  # off the board, though it would come back
    assert not walk.arrives("00>22:", "RR3UU")
    assert walk.leaves_the_board("00>22:", "D")
