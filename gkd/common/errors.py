"""How a training ends that cannot or must not go on. No imports: recipes know these before torch is loaded."""


class TrainingStopped(SystemExit):
    """A signal asked training to stop, and a checkpoint was saved; `code` is 128 + its number, as shells have it."""


class NotFiniteError(FloatingPointError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class PushError(RuntimeError):
    """A push to the Hub failed; the message says what is saved where, and how to push it again."""


class DiskFullError(OSError):
    """There is no space left for what was being written; the message names it, the path and the remedy."""
