"""The one exception that the person at the shell is meant to read, and how a line is made fit."""

MOST_CHARACTERS = 2000  # of a message


class UserError(Exception):
    """A mistake or a condition that the user can act on; the message is one line that says how.

    exit_code: 2 for what is caught before a run begins, 1 for what ends a run that had begun.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def some(texts: list[str], most: int = 5, between: str = ", ") -> str:
    more = f"{between}and {len(texts) - most} more" if len(texts) > most else ""
    return between.join(texts[:most]) + more


def one_line(text: str, most: int = MOST_CHARACTERS) -> str:
    """`text` as a line that is safe to show, whatever stranger's words it quotes.

    Control characters, line breaks and lone surrogates are escaped; of what is longer than `most`
    characters the middle is left out, since the advice stands at the end.
    """
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
