"""What every script shares at the shell: parser, logging, signals, exit codes.

Imports nothing heavy, so that `--help` and flag errors answer at once; scripts import JAX,
transformers and datasets after parsing.
"""

import argparse
import contextlib
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, NoReturn

from utils.errors import UserError


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one; keeps the lines of the description."""

    def _get_help_string(self, action: argparse.Action) -> str:
        help_text = action.help or ""
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return help_text
        if isinstance(default, list | tuple):
            default = " ".join(default)
        return f"{help_text} (default: {default})"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and whose help shows defaults."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--verbose", action="store_true", help="debug log, and the traceback of an error"
        )

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def int_at_least(lowest: int) -> Callable[[str], int]:
    """An argparse type: an integer not below `lowest`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is below {lowest}")
        return value

    return integer


def float_at_least(lowest: float) -> Callable[[str], float]:
    """An argparse type: a finite number not below `lowest`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not lowest <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {lowest}")
        return value

    return number


def option(
    group: str,
    help: str,
    *,
    default: Any = None,
    unset: str | None = None,
    required: bool = False,
    flag_default: Any = None,
    **words: Any,
) -> Any:
    """A field of a dataclass of options, from which `add_flags` makes the flag of its name.

    help may hold `{unit}`. unset: what the default None means, for the help. flag_default: of the
    flag, in its words, where the field's default is of another type. words: what else argparse is
    told, such as `type`, `choices` and `metavar`; a field whose default is False is a switch.
    """
    metadata = {"group": group, "help": help, "unset": unset, "words": words}
    if flag_default is not None:
        metadata["default"] = flag_default
    return field(default=MISSING if required else default, metadata=metadata)


def add_flags(
    parser: argparse._ActionsContainer,
    options: type,
    group: str,
    changes: Mapping[str, Mapping[str, Any]] = {},
    unit: str = "",
) -> None:
    """The flags of one group of a dataclass whose fields are `option`s, in their order.

    changes: field -> what is different in this script: `flag` (its name), `default`, `help`.
    """
    for entry in fields(options):
        if entry.metadata.get("group") != group:
            continue
        told = {"default": entry.default, **entry.metadata, **changes.get(entry.name, {})}
        words = {**told["words"], "help": told["help"].replace("{unit}", unit)}
        if told["default"] is False:
            words["action"] = "store_true"
        elif told["default"] is MISSING:
            words["required"] = True
        else:
            words["default"] = told["default"]
        if told["default"] is None and told["unset"]:
            words["help"] += f" (default: {told['unset']})"
        if "flag" in told:
            words["dest"] = entry.name
        parser.add_argument(told.get("flag", f"--{entry.name}"), **words)


def command_to_resume() -> str:
    """The command of this process, to be pasted into a shell, that goes on with its run."""
    words = [word for word in sys.argv if word not in ("--overwrite", "--resume")]
    return shlex.join(["python", *words, "--resume"])


class Interrupted(BaseException):
    """SIGINT or SIGTERM reached the main thread; exit code 128 + signum."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Turns SIGINT and SIGTERM into `Interrupted`, held back while `shielded`.

    The exception is raised in the main thread, which must therefore wait in Python (a future, a
    queue) and leave blocking device calls to other threads.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._pending: int | None = None
        self._raised = False
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: object) -> None:
        self._pending = signum
        if self._depth == 0 and not self._raised:
            self._raised = True  # what follows is the end; a second Ctrl-C does not cut it short
            raise Interrupted(signum)

    def ignore(self) -> None:
        """From here on: the process is about to end, and nobody's patience can cut that short."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """A section that a signal must not cut in half; the exception comes at its end."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0 and self._pending is not None and not self._raised:
            self._raised = True
            raise Interrupted(self._pending)


def run(
    main: Callable[[argparse.Namespace, Signals], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse `argv`, call `main(args, signals)`, and leave the process with its exit code.

    A `UserError` is one line on stderr; `--verbose` adds the traceback. Leaves through `os._exit`
    so that a device computation nobody waits for any more cannot hold the process.
    """
    args = parser.parse_args(argv)
    logging.basicConfig(
        format="%(message)s", stream=sys.stderr, level="DEBUG" if args.verbose else "INFO"
    )
    # Without torch, which nothing here needs, transformers would say so at every start.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not args.verbose:
        for noisy in (
            "jax",
            "httpx",
            "httpx2",
            "datasets",
            "transformers",
            "absl",
            "filelock",
            "urllib3",
        ):
            logging.getLogger(noisy).setLevel(logging.WARNING)
    signals = Signals()
    try:
        code = main(args, signals) or 0
        signals.ignore()
    except UserError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except Interrupted as stop:
        signals.ignore()  # a second Ctrl-C
        name = signal.Signals(stop.signum).name
        print(f"stopped by {name}; what was written is intact", file=sys.stderr)
        code = 128 + stop.signum
    except BrokenPipeError:  # the reader of our output, `head` for one, has left
        code = 141
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
