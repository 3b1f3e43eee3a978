"""`flashlight-rewrite`: argv → Options → load → pipeline → files, with exit codes and diagnostics.

Torch is imported only after the command line has been understood, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from rewriter.errors import ExitCode, Reason, RewriteError, Site
from rewriter.options import PROG, Options, parse_options

if TYPE_CHECKING:
    from rewriter.command import Outcome

# Said where a run failed without a reason of its own: every code but 0 comes with a line.
_UNEXPLAINED = {
    ExitCode.CHECK_FAILED: "the check failed",
    ExitCode.BAD_INPUT: "the input can't be used",
    ExitCode.FAILED: "the rewrite failed",
    ExitCode.NOTHING_TO_FUSE: "nothing to fuse",
    ExitCode.INTERRUPTED: "interrupted",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; every failure is one line on stderr.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.
    """
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse's way of ending after --help and --version
        return int(stop.code or 0)
    except RewriteError as error:
        return _fail(error, verbose=False)
    return _guarded(options)


class Progress:
    """A line per stage on stderr, printed as it ends; on a terminal also while it runs.

    Call it with the stage's name as the stage starts.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False):
        self._stream = stream
        self._quiet = quiet
        self._live = not quiet and stream.isatty()
        self._running: tuple[str, float] | None = None
        self._seen: set[str] = set()

    def __call__(self, stage: str) -> None:
        """Say that `stage` starts, and so that the one before it has ended."""
        self.finish()
        shown = f"{stage} again" if stage in self._seen else stage
        self._seen.add(stage)
        self._running = shown, time.perf_counter()
        if self._live:
            self._write(f"{shown} ...")

    def finish(self) -> None:
        """Print the line of the stage that ran."""
        if self._running and not self._quiet:
            stage, start = self._running
            self._clear()
            self._write(f"{stage:<14}{time.perf_counter() - start:6.1f} s\n")
        self._running = None

    def drop(self) -> None:
        """Forget the stage that ran: it failed, and a diagnostic says so."""
        if self._running:
            self._clear()
        self._running = None

    def _clear(self) -> None:
        if self._live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _guarded(options: Options) -> int:
    """Run, and turn whatever goes wrong into a line and an exit code."""
    progress = Progress(sys.stderr, quiet=options.quiet)
    try:
        return int(_run(options, progress))
    except KeyboardInterrupt:
        progress.drop()
        _say("interrupted")
        return int(ExitCode.INTERRUPTED)
    except RewriteError as error:
        progress.drop()
        return _fail(error, verbose=options.verbose)
    except (Exception, SystemExit) as error:
        progress.drop()
        return _fail_inside(error, options)


def _run(options: Options, progress: Progress) -> ExitCode:
    with _users_noise(options.verbose):
        outcome, notes = _rewrite(options, progress)
    progress.finish()
    kept = _deliver(options, outcome)
    reasons = list(dict.fromkeys((*notes, *outcome.diagnostics, *kept)))
    if outcome.code != ExitCode.DONE and not reasons:
        reasons.append(Reason(_UNEXPLAINED[outcome.code], Site(str(options.file))))
    for reason in reasons:
        _say_reason(reason)
    return outcome.code


def _rewrite(options: Options, progress: Progress) -> tuple[Outcome, tuple[Reason, ...]]:
    from rewriter.load import load, read_source
    from rewriter.output import check_destination

    progress("load")
    # Both are quick, and come before the seconds that importing torch takes.
    read_source(options.file)
    if options.writes:
        check_destination(options.out_dir, source=options.file, force=options.force)
    loaded = load(options)
    from rewriter.command import run

    return run(loaded, options, progress), loaded.notes


@contextlib.contextmanager
def _users_noise(verbose: bool) -> Iterator[None]:
    """Keep stdout for our product while the user's code runs, and warnings for `-v`."""
    with _stdout_at_stderr(), contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("default" if verbose else "ignore")
        yield


@contextlib.contextmanager
def _stdout_at_stderr() -> Iterator[None]:
    """Send what child processes and C libraries print to stderr too."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _deliver(options: Options, outcome: Outcome) -> list[Reason]:
    """Print and write what was made; returns what was kept from an earlier run, and why."""
    from rewriter.output import write_package

    if outcome.printed:
        _print(outcome.printed.rstrip("\n"))
    if not outcome.files or outcome.code not in (ExitCode.DONE, ExitCode.CHECK_FAILED):
        return []
    result = write_package(options.out_dir, outcome.files, force=options.force)
    _print("\n".join(map(str, result.written)))
    text = "kept, because it was edited since it was written"
    made = {options.out_dir / name: " (--force overwrites it)" for name in outcome.files}
    return [Reason(text + made.get(path, ""), Site(str(path))) for path in result.kept]


def _print(text: str) -> None:
    """Print to stdout, whose reader may have had enough, as `| head` has: that is no failure."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # else the interpreter would complain as it flushes at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: RewriteError, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    _say_reason(error.reason)
    return int(error.code)


def _fail_inside(error: BaseException, options: Options) -> int:
    if options.verbose:
        traceback.print_exception(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    hint = "" if options.verbose else "; run with -v for the traceback"
    _say_reason(Reason(f"internal error: {text}{hint}", Site(str(options.file))))
    return int(ExitCode.FAILED)


def _say_reason(reason: Reason) -> None:
    if reason.site:
        print(reason, file=sys.stderr)
    else:
        _say(reason.text)


def _say(text: str) -> None:
    print(f"{PROG}: {text}", file=sys.stderr)
