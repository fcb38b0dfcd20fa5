"""The one exception that the person at the shell is meant to read."""


class UserError(Exception):
    """A mistake or a condition that the user can act on; the message is one line that says how.

    exit_code: 2 for what is caught before a run begins, 1 for what ends a run that had begun.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def some(texts: list[str], most: int = 5) -> str:
    more = f", and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
