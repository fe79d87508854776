"""Rows whose tokens say which one they are, as the batches of a window."""

from gkd.data.sequences import TokenSequence

STOP = 9


def row(number):
    """A row of the data set whose tokens say which one it is: a prompt of two, an answer of three."""
    ids = [100 + number, 101 + number, 5, 6, STOP]
    return TokenSequence(ids, [-100, -100, 5, 6, STOP], 2, row=number)


def batches(*sizes_of_rows):
    return [[row(number) for number in rows] for rows in sizes_of_rows]
