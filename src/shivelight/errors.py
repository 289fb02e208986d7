"""The errors of Shivelight. Every message says what was wrong, where, and what to do about it."""


class ShivelightError(Exception):
    """Base of every error that Shivelight raises on purpose."""


class UnsupportedBackboneError(ShivelightError):
    """The model, or the way it is set up, is one that no backbone spec covers."""


class AdapterError(ShivelightError):
    """An adapter is missing, corrupt, of another backbone or of another version."""


class BudgetError(ShivelightError):
    """A budget is malformed or cannot be reached; `nearest` is the closest reachable one, where there is one."""

    def __init__(self, message: str, nearest: float | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class DataError(ShivelightError):
    """A data set is missing, empty, unreadable or without captions."""


class TrainingError(ShivelightError):
    """Training cannot start or go on: a bad setting, a loss that is not finite, a checkpoint that does not fit."""
