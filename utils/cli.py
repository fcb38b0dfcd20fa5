"""What every script shares at the shell: parser, logging, signals, exit codes.

Imports nothing heavy, so that `--help` and flag errors answer at once; scripts import JAX,
transformers and datasets after parsing.
"""

import argparse
import contextlib
import glob
import io
import logging
import os
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from utils.errors import UserError, one_line

GRACE_SECONDS = 18.0  # from a signal to the end of the process, at most; 20 are promised
BAR_SECONDS = 30  # between two lines of a progress bar in a log file
# For libtpu, of which only the compiler is wanted: it asks nothing of this machine, neither a
# metadata server, nor a TPU, nor the lock of another process that has loaded it.
COMPILER_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
NOISY = ("jax", "httpx", "httpx2", "datasets", "transformers", "absl", "filelock", "urllib3")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one; keeps the lines of the description."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return action.help or ""
        if isinstance(default, list | tuple):
            default = " ".join(map(str, default))
        return f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and whose help shows defaults."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        told = "debug log, and the traceback of an error"
        self.add_argument("--verbose", action="store_true", help=told)

    def error(self, message: str) -> NoReturn:
        print(f"error: {one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _at_least(kind: Callable[[str], Any], noun: str, lowest: float) -> Callable[[str], Any]:
    """An argparse type: a number that `kind` reads, not below `lowest`, and finite."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun}") from None
        if kind is float and not lowest <= value < float("inf"):  # which NaN is neither
            raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {lowest}")
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is below {lowest}")
        if value > sys.maxsize:
            raise argparse.ArgumentTypeError(f"{text[:40]} is above {sys.maxsize}")
        return value

    return number


int_at_least = partial(_at_least, int, "whole number")
float_at_least = partial(_at_least, float, "number")


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
    """The flags of one group of a dataclass whose fields are `option`s, or of one field, in order.

    changes: field -> what is different in this script: `flag` (its name), `default`, `help`.
    """
    for entry in fields(options):
        if "group" not in entry.metadata or group not in (entry.metadata["group"], entry.name):
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


def add_output(parser: Parser, what: str = "JSON file to write") -> None:
    """The flags of a script that makes one result, to be checked by `store.local.check_output`."""
    parser.add_argument("--output", type=Path, required=True, help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def command_to_resume() -> str:
    """The command of this process, to be pasted into a shell, that goes on with its run."""
    words = [word for word in sys.argv if word not in ("--overwrite", "--resume")]
    return shlex.join(["python", *words, "--resume"])


class Interrupted(BaseException):
    """A signal has asked for the end of this process; exit code 128 + signum."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into an orderly end, and never into an exception of its own.

    At first a signal ends the process at once. After `hold` it is noted, and `check` raises
    `Interrupted` at the next place that asks; whoever does not ask within GRACE_SECONDS is ended
    all the same, which is safe since what is on the disk is whole at every moment. Only the first
    signal counts.

    A thread does this, fed by a pipe that the interpreter's own C handler writes to. A handler in
    Python would wait for the main thread to return from whatever C code it is in, and an exception
    raised there is lost where the main thread happens to be in a destructor or a callback of the
    garbage collector.
    """

    held = False  # whether there is something to end in order

    def __init__(self) -> None:
        self.signum: int | None = None  # the signal that was noted
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_signals)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup
                signal.signal(signum, lambda *_: None)
        threading.Thread(target=self._wait, args=(reader,), name="signals", daemon=True).start()

    def hold(self) -> None:
        """From here on there is something to end in order: signals are noted for `check`."""
        self.held = True

    def check(self) -> None:
        """Raises Interrupted once a signal was noted."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def note(self, signum: int) -> None:
        """As if `signum` had been sent to this process, for what another one of the run was told.
        May be called in any thread, and returns before the signal is noted."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, bytes([signum]))

    def _wait(self, reader: int) -> None:
        signum = os.read(reader, 1)[0]
        if self.held:
            self.signum = signum
            time.sleep(GRACE_SECONDS)
        leave(*last_words(Interrupted(signum)))


def _forget_signals() -> None:
    """In a forked child, whose signals would otherwise end its parent through the pipe."""
    if signal.set_wakeup_fd(-1) >= 0:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)


class LogStream:
    """A stream for log lines and progress bars whose writes never raise.

    What cannot be written, because the reader has left or the disk is full, is dropped: no run is
    worth less than its log. A line that follows a bar begins a line of its own, and in a file,
    where nothing returns to the start of a line, every state of a bar does.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.in_bar = False  # whether the cursor stands behind a bar

    def write(self, text: str) -> int:
        shown = text
        if self.in_bar and not text.startswith(("\r", "\n", "\x1b")):
            shown = "\n" + text
        if text.startswith("\r") and not self.isatty():
            shown = "\n" * self.in_bar + text.strip("\r ")
        self.in_bar = text.startswith("\r") and not text.endswith(("\r", "\n"))
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(shown)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class LogFormatter(logging.Formatter):
    """The message alone; where it is ours, what it quotes cannot steer the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        ours = record.name.partition(".")[0] in ("utils", "__main__")
        return one_line(record.message) if ours else record.message


def last_words(error: BaseException, begun: bool = True) -> tuple[str, int]:
    """The last line on stderr of a process that `error` ends, and its exit code.

    The line is empty where nothing needs to be said, and where only a traceback says what happened.
    begun: whether the process had begun to write. Before that, what the machine refuses is taken
    for a mistake of the user's, such as a path without permission, and the exit code is 2.
    """
    intact, code = ("; what was written is intact", 1) if begun else ("", 2)
    if isinstance(error, UserError):
        return f"error: {one_line(str(error))}", error.exit_code
    if isinstance(error, Interrupted):
        name = signal.Signals(error.signum).name
        return f"stopped by {name}; what was written is intact", 128 + error.signum
    if isinstance(error, BrokenPipeError):  # the reader of our output, `head` for one, has left
        return "", 141
    if isinstance(error, OSError):
        cause = error.strerror or str(error) or type(error).__name__
        where = "" if error.filename is None else f": {error.filename!s}"
        return f"error: {one_line(cause + where)}{intact}", code
    if isinstance(error, MemoryError):
        return f"error: this machine has not enough memory{intact}", code
    if isinstance(error, RecursionError):
        return "error: something that was read is nested too deeply (--verbose says where)", code
    if isinstance(error, RuntimeError | AssertionError) and _is_of_jax(error):
        return f"error: JAX failed: {one_line(str(error) or type(error).__name__)}{intact}", code
    return "", 1


def _is_of_jax(error: BaseException) -> bool:
    """Whether the error is of a class of JAX's, or was raised in its code."""
    names, trace = [type(error).__module__], error.__traceback__
    while trace is not None:
        names[1:] = [trace.tb_frame.f_globals.get("__name__", "")]
        trace = trace.tb_next
    return any(name.partition(".")[0] in ("jax", "jaxlib") for name in names)


def leave(line: str, code: int) -> NoReturn:
    """Ends the process at once, from whatever thread, with `line` on stderr.

    Through `os._exit`, so that a device computation nobody waits for any more cannot hold the
    process; and past `sys.stderr`, which another thread may be writing to.
    """
    if line:
        start = "\n" if getattr(sys.stderr, "in_bar", False) else ""
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 1.0)[1]:  # else its reader stands still
                os.write(2, f"{start}{line}\n".encode(errors="backslashreplace"))
    os._exit(code)


def leave_later(error: BaseException) -> None:
    """Ends the process as `error` ends it, unless it has ended by itself in GRACE_SECONDS."""

    def wait() -> None:
        time.sleep(GRACE_SECONDS)
        leave(*last_words(error))

    threading.Thread(target=wait, name="deadline", daemon=True).start()


def _prepare_streams() -> None:
    """Nothing that this process opens may take the numbers of the standard streams, and what it
    says on stderr cannot end it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that a terminal lacks is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, LogStream):
        sys.stderr = LogStream(sys.stderr)
    if not sys.stderr.isatty():  # read by tqdm when it is imported
        os.environ.setdefault("TQDM_MININTERVAL", str(BAR_SECONDS))
        os.environ.setdefault("TQDM_MAXINTERVAL", str(BAR_SECONDS))


def _has_tpu() -> bool:
    """Whether there is a TPU's device file, or a PCI device of Google's that is neither a disk nor
    a network card, as JAX looks for one; both are there on a TPU VM, whatever else fails."""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    for vendor in map(Path, glob.glob("/sys/bus/pci/devices/*/vendor")):
        with contextlib.suppress(OSError):
            kind = (vendor.parent / "class").read_text()
            if vendor.read_text().strip() == "0x1ae0" and not kind.startswith(("0x01", "0x02")):
                return True
    return False


def _use_wide_vectors(cpuinfo: str = "/proc/cpuinfo") -> None:
    """Has XLA use all 512 bits of AVX-512, of which it uses half by default; unless the user's
    XLA_FLAGS say how many. Has to come before JAX starts."""
    flags, name = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_prefer_vector_width"
    with contextlib.suppress(OSError):
        if name not in flags and " avx512f " in Path(cpuinfo).read_text():
            os.environ["XLA_FLAGS"] = f"{flags} {name}=512".strip()


def run(
    main: Callable[[argparse.Namespace, Signals], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse `argv`, call `main(args, signals)`, and leave the process with its exit code.

    What ends `main` is one line on stderr; `--verbose` adds the traceback, and an error that has no
    line of its own is a traceback.
    """
    _prepare_streams()
    args = parser.parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    logging.basicConfig(handlers=[handler], level="DEBUG" if args.verbose else "INFO")
    # Without torch, which nothing here needs, transformers would say so at every start.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # JAX tries every kind of device, and libtpu, where it is installed without a TPU, would
    # complain on stderr. A platform is neither chosen nor hidden by this.
    if not _has_tpu():
        os.environ.update({**COMPILER_ALONE, **os.environ})
    _use_wide_vectors()
    if not args.verbose:
        for noisy in NOISY:
            logging.getLogger(noisy).setLevel(logging.WARNING)
    signals, line = Signals(), ""
    try:
        code = main(args, signals) or 0
        signals.check()
    except BaseException as error:
        line, code = last_words(error, signals.held)
        if args.verbose or not (line or isinstance(error, BrokenPipeError)):
            traceback.print_exc()
    try:
        sys.stdout.flush()
    except OSError as error:
        if not code and not isinstance(error, BrokenPipeError):
            line, code = last_words(error, signals.held)
    sys.stderr.flush()
    leave(line, code)
