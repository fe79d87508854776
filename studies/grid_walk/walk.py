"""The task: walk on a board from a start to a goal. Strings, rules and the verifier; no model in here.

A prompt is `31>67:` (column and row of the start, then of the goal), an answer moves and its end: `RRRUUUUUU`.
Every order of the right moves is right; a wrong move can be made good by going back; a step off the board cannot.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

SIDE, LEAST = 8, 4  # of the board; distance of start and goal
TEST = 384  # tasks
STEPS = {"U": (0, 1), "D": (0, -1), "L": (-1, 0), "R": (1, 0)}
LETTERS = "01234567>:UDLR"
Place = tuple[int, int]


def on_board(place: Place) -> bool:
    """Whether it is one of the board's squares."""
    return all(0 <= coordinate < SIDE for coordinate in place)


def moved(place: Place, move: str) -> Place:
    """Where a move leads, on the board or off it."""
    dx, dy = STEPS[move]
    return place[0] + dx, place[1] + dy


def distance(a: Place, b: Place) -> int:
    """The length of a shortest walk."""
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def best_moves(place: Place, goal: Place) -> list[str]:
    """All moves that begin a shortest walk; none at the goal."""
    return [move for move in STEPS if distance(moved(place, move), goal) < distance(place, goal)]


@dataclass(frozen=True)
class Task:
    """Start and goal."""

    start: Place
    goal: Place

    @property
    def prompt(self) -> str:
        """As the models read it."""
        return f"{self.start[0]}{self.start[1]}>{self.goal[0]}{self.goal[1]}:"

    @staticmethod
    def read(prompt: str) -> Task:
        """From a prompt, which forced moves may follow."""
        x, y, u, v = (int(prompt[i]) for i in (0, 1, 3, 4))
        return Task((x, y), (u, v))


def split_tasks() -> tuple[list[Task], list[Task]]:
    """All tasks whose start and goal are far enough apart: those to train on, and those to test on."""
    squares = list(itertools.product(range(SIDE), repeat=2))
    tasks = [Task(start, goal) for start in squares for goal in squares if distance(start, goal) >= LEAST]
    random.Random("split").shuffle(tasks)
    return tasks[TEST:], tasks[:TEST]


def shortest_walk(draw: random.Random, task: Task) -> str:
    """One of the shortest walks, every next move drawn from the best ones."""
    place, walk = task.start, ""
    while place != task.goal:
        walk += draw.choice(best_moves(place, task.goal))
        place = moved(place, walk[-1])
    return walk


def random_moves(draw: random.Random, place: Place, count: int) -> str:
    """So many moves that stay on the board and are drawn without a look at the goal."""
    walk = ""
    for _ in range(count):
        walk += draw.choice([move for move in STEPS if on_board(moved(place, move))])
        place = moved(place, walk[-1])
    return walk


def arrives(prompt: str, answer: str) -> bool:
    """The verifier: from where the prompt's moves led, only moves on the board, that end on the goal, in at most twice
    the shortest length (or four moves more, where that is longer)."""
    task = Task.read(prompt)
    place = task.start
    for move in prompt[6:]:
        place = moved(place, move)
    if len(answer) > max(2 * distance(place, task.goal), distance(place, task.goal) + 4):
        return False
    for move in answer:
        if move not in STEPS or not on_board(place := moved(place, move)):
            return False
    return place == task.goal


def leaves_the_board(prompt: str, answer: str) -> bool:
    """Whether an answer steps off the board, or says what is no move."""
    place, moves = Task.read(prompt).start, prompt[6:] + answer
    return any(move not in STEPS or not on_board(place := moved(place, move)) for move in moves)
