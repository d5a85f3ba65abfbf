"""A command line arrives; a loaded recipe, an open run folder, and what a stage may do from outside, leave."""

from __future__ import annotations

import errno
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from keeptune.errors import KeeptuneError, OutOfMemoryError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from keeptune.config import Recipe
    from keeptune.stages import Context, Run
    from keeptune.terminal import PlainProgress

# As after SIGKILL: 143 says that the state was saved.
_KILLED = 137
# What libraries repeat of the system's refusals in errors of their own.
_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EROFS)


class _LastingFile(io.FileIO):
    """A file that takes whatever is written; what the system refuses is dropped, and the first reason kept."""

    refused: OSError | None = None

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.refused = self.refused or error
            return len(data)


class Output:
    """Standard output and error, on which a command may say what it did without failing by it.

    A reader that has gone, a full disk behind a redirection, a closed descriptor or a character that the terminal has
    no code for must not end hours of work.
    """

    def __init__(self) -> None:
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:
                # This takes the lowest free number, which no file of a run may get.
                os.open(os.devnull, os.O_RDWR)
        self._file = _LastingFile(1, "w", closefd=False)
        # A test has others in their place.
        if sys.stdout is sys.__stdout__:
            sys.stdout = _text(self._file, like=sys.stdout)
        if sys.stderr is sys.__stderr__:
            sys.stderr = _text(_LastingFile(2, "w", closefd=False), like=sys.stderr)

    def end(self, code: int) -> int:
        """Write what is left and return the exit code: `code`, or that of an outcome that could not be written."""
        sys.stdout.flush()
        refused = self._file.refused
        if refused is not None and refused.errno != errno.EPIPE and code == 0:
            code = report_fault(OSError(refused.errno, str(refused), "standard output"))
        sys.stderr.flush()
        return code


def _text(file: _LastingFile, *, like: TextIO | None) -> TextIO:
    encoding = like.encoding if like is not None else "utf-8"
    lines = file.isatty() or file.fileno() == 2
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, "backslashreplace", line_buffering=lines)


def report_fault(error: Exception) -> int:
    """Say what ended a command, and return its exit code; what the user's machine caused is no fault of ours."""
    known = _machine_fault(error) if not isinstance(error, KeeptuneError) else error
    if known is None:
        traceback.print_exception(error)
        sys.stderr.write("keeptune: this is a fault of keeptune's own; please report it with the lines above.\n")
        return 1
    # A remedy names a command that works here.
    message = str(known).replace("`keeptune ", f"`{program()} ")
    sys.stderr.write(f"keeptune: {printable(message)}\n")
    return known.exit_code


def _machine_fault(error: Exception) -> KeeptuneError | None:
    from keeptune.storage import refusal

    if isinstance(error, MemoryError):
        return OutOfMemoryError("found too little memory; expected room for the work. Close other programs.")
    if isinstance(error, OSError) and error.errno:
        return refusal(str(error.filename or "this process"), error)
    found = next((number for number in _MACHINE if os.strerror(number) in str(error)), None)
    return None if found is None else refusal("this process", OSError(found, os.strerror(found)))


class _Signals:
    """The first Ctrl-C or SIGTERM asks the work to save and stop; the second ends the process at once."""

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # What `nohup` ignores stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: Any) -> None:
        self.received += 1
        if self.received > 1:
            os._exit(_KILLED)
        # A signal may come amid a write to the same stream, which a second one may not enter.
        with suppress(OSError):
            os.write(2, b"\nkeeptune: stopping after this piece of work; once more ends at once, without saving.\n")

    def stop_requested(self) -> bool:
        return self.received > 0


def command_line(*arguments: str) -> str:
    """Return a command line of keeptune's that the shell understands where this one was given."""
    return f"{program()} {shlex.join(arguments)}"


def next_steps(run: Path) -> list[str]:
    """Return what one may do after a run: ask the delivered model, fold its adapter, compare the run with another."""
    steps = []
    model = run / "instruct-model"
    if (model / "README.md").is_file():
        steps.append(("ask the model", f"see the code in {model / 'README.md'}"))
    if (model / "adapter_config.json").is_file():
        steps.append(("fold the adapter", command_line("export", str(model), "--merged", "FOLDER")))
    steps.append(("compare", command_line("compare", str(run), "OTHER_RUN")))
    return [f"  {what + ':':<18}{how}" for what, how in steps]


def program() -> str:
    """Return what starts keeptune: its name where the shell finds that, else the path that this process came from."""
    if shutil.which("keeptune"):
        return "keeptune"
    started = sys.argv[0]
    return shlex.join([sys.executable, "-m", "keeptune.cli"] if started.endswith(".py") else [started])


def load(path: Path, overrides: list[str] | None) -> Recipe:
    """Return the recipe in `path` after its `--set` overrides."""
    from keeptune.config import load_recipe

    return load_recipe(path, overrides=overrides or [])


def load_with_ranges(path: Path, overrides: list[str] | None) -> tuple[Recipe, list[str]]:
    """Return the recipe in `path` with the largest value in place of each range, and the keys of the ranges."""
    from keeptune.config import is_fractional, make_recipe, read_sections
    from keeptune.search.space import plan_search, range_keys

    sections = read_sections(path, overrides=overrides or [])
    keys = range_keys(sections)
    if keys:
        sections = plan_search(sections, where=str(path), is_fractional=is_fractional).recipe
    return make_recipe(sections, path=path), keys


def count_of(option: str) -> Callable[[Any], int]:
    """Return what reads the whole number above 0 of an option."""

    def read(text: Any) -> int:
        from keeptune.errors import RecipeError

        if not str(text).isdecimal() or int(text) < 1:
            raise RecipeError(f"{option}: found {text}; expected a whole number above 0. Write for example {option} 4.")
        return int(text)

    return read


@contextmanager
def open_recipe(
    path: Path,
    overrides: list[str] | None,
    *,
    quiet: bool,
    begun: bool = False,
    check: Callable[[Recipe], None] | None = None,
) -> Iterator[Run]:
    """Open the run folder, after `check` has passed the recipe: a refused one leaves no folder behind."""
    from keeptune import stages

    recipe = load(path, overrides)
    with stages.naming_recipe(path, recipe):
        if check is not None:
            check(recipe)
        with stages.open_run(recipe, context=make_context(quiet=quiet), begun=begun) as opened:
            try:
                yield opened
            finally:
                opened.context.progress.finish()


def make_context(*, quiet: bool, signals: bool = True) -> Context:
    """Return what a stage needs of the world outside; with `signals` the first Ctrl-C asks it to save and stop."""
    from keeptune import stages, terminal
    from keeptune.progress import Joined
    from keeptune.stages.openings import LEDGER

    received = _Signals()
    if signals:
        received.install()
    console = make_console(stderr=True)
    if console.is_terminal and not quiet:
        listener = terminal.LiveProgress(console)
    else:
        listener = terminal.PlainProgress(console, quiet=quiet)
        if not quiet:
            _keep_telling(listener)
    return stages.Context(
        progress=Joined(listener),
        stop_requested=received.stop_requested,
        command=shlex.join(["keeptune", *sys.argv[1:]]),
        now=lambda: datetime.now(UTC).isoformat(timespec="seconds"),
        ledger=_data_home() / "keeptune" / "ledger" / LEDGER,
    )


def _data_home() -> Path:
    """Return where the user's data lie; a relative $XDG_DATA_HOME counts for nothing, as its specification says."""
    named = Path(os.environ.get("XDG_DATA_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".local" / "share"


def _keep_telling(listener: PlainProgress) -> None:
    """Let a thread call the listener's `beat` once a second, for as long as anything holds the listener."""
    held = weakref.ref(listener)

    def beat() -> None:
        while (progress := held()) is not None:
            progress.beat()
            del progress
            time.sleep(1.0)

    threading.Thread(target=beat, daemon=True).start()


def trial_launcher(*, num_jobs: int) -> Callable[..., subprocess.Popen[bytes]]:
    """Return what starts the process of a trial, given its recipe, `parts`, its `subset` of train and its `log`.

    `num_jobs` of them share the cores. A process of its own session gets no Ctrl-C but what the driver passes on.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // num_jobs)), **os.environ}

    def launch(recipe: Path, *, parts: Path, subset: str, log: Path) -> subprocess.Popen[bytes]:
        arguments = ["trial", str(recipe), str(parts), subset]
        with log.open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "keeptune.cli", *arguments],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env=environment,
                start_new_session=True,
            )

    return launch


def end_with_driver() -> None:
    """End this process as soon as the one that holds the other end of its standard input is no more."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(_KILLED)

    threading.Thread(target=watch, daemon=True).start()


def make_console(*, stderr: bool = False) -> Console:
    """Return a terminal to print on."""
    from rich.console import Console

    return Console(stderr=stderr)
