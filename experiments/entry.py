"""What `diloco train` does: read the command line, check everything, run, and say how it ended.

The libraries take seconds to import, so that happens inside the functions, where Ctrl-C is answered in one line.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from diloco import Result, RunConfig
    from experiments.composition import Member

FINISHED, FAILED, MISTAKE, STOPPED, INTERRUPTED = 0, 1, 2, 3, 130
SILENT_S = 10.0  # for a launcher to end this process, once rank 0 has said what is wrong
STARTED_AGAIN = "DILOCO_STARTED_AGAIN"  # variable of the environment: set where `--restarts` started the run again
DIRECTORY_TOLD = "DILOCO_DIRECTORY_TOLD"  # variable of the environment: a file to which a run's directory is written
STATUS = {"finished": FINISHED, "stopped": STOPPED, "interrupted": INTERRUPTED}


def main(argv: Sequence[str], *, program: str = "diloco train") -> int:
    """Run what `argv` asks for and return the exit status: 0, 2, 3 or 130; other errors are raised."""
    arguments = _parser(program).parse_intermixed_args(argv)
    if arguments.restarts:
        return _supervise(arguments, argv)
    with _terminated_like_interrupted():
        try:
            return _carry_out(arguments, program)
        except KeyboardInterrupt:
            if speaks():
                print("interrupted", file=sys.stderr)
            return INTERRUPTED


def leave(status: int) -> NoReturn:
    """End this process. An interrupted one at once: a Ray that was just starting would crash it on its way out."""
    if status == INTERRUPTED:
        with suppress(OSError):  # whoever reads may be gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _supervise(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """--restarts N: in a process of its own, which may be killed."""
    from experiments import supervisor
    from experiments.mistakes import Mistake

    if arguments.restarts < 0:
        return tell(Mistake(f"--restarts {arguments.restarts} is negative; give how often to start a killed run again"))
    if arguments.multirun or "RANK" in os.environ:
        who = "a sweep goes on after a failed member" if arguments.multirun else "torchrun has --max-restarts"
        return tell(Mistake(f"--restarts is for one run on its own: {who}"))
    at = [i for i, each in enumerate(argv) if each.partition("=")[0] == "--restarts"]
    dropped = {place for i in at for place in ((i,) if "=" in argv[i] else (i, i + 1))}
    rest = [each for i, each in enumerate(argv) if i not in dropped]
    return supervisor.watch(rest, arguments.restarts)


def speaks() -> bool:
    """Whether this process says what all know: of those that torchrun or the like starts, only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


def tell(mistake: BaseException) -> int:
    """Print a mistake of the user's on stderr, in at most two lines. Returns the exit status for it."""
    if not speaks():
        time.sleep(SILENT_S)
        return MISTAKE
    from experiments.mistakes import first_lines

    print(f"error: {first_lines(mistake)}", file=sys.stderr)
    return MISTAKE


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        if not speaks():
            time.sleep(SILENT_S)
            self.exit(MISTAKE)
        self.exit(MISTAKE, f"error: {message}; see {self.prog} --help\n")


def _parser(program: str) -> Parser:
    parser = Parser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=["job"])
    parser.add_argument("-p", "--package", default="")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--import", dest="imports", action="append", default=[])
    parser.add_argument("--config-dir", default="")
    parser.add_argument("--restarts", type=int, default=0)
    return parser


def _carry_out(arguments: argparse.Namespace, program: str) -> int:
    from experiments import composition
    from experiments.mistakes import Mistake

    request = composition.Request(
        overrides=tuple(arguments.overrides),
        imports=tuple(arguments.imports),
        config_dir=arguments.config_dir,
    )
    try:
        composition.import_parts(request.imports)  # in any case, since a run to go on with may name some too
        if arguments.help:
            from experiments.usage import usage

            try:
                print(usage(program, request), flush=True)
            except (
                BrokenPipeError
            ):  # whoever reads has seen enough, as `| head` does; at the end nothing is flushed again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FINISHED
        several = composition.sweep(request) if arguments.multirun else composition.named(request)
        members = several or [composition.single(request)]
        if several:
            _refuse_launcher(several)
        if arguments.cfg:
            return _show(members, arguments)
    except Mistake as mistake:
        return tell(mistake)
    if several:
        from experiments.sweep import run_sweep

        return run_sweep(several)
    return _run(members[0].config)


def _refuse_launcher(members: Sequence[Member]) -> None:
    from diloco.runtime.spmd import Spmd
    from diloco.runtime.spmd_start import by_launcher
    from experiments.mistakes import Mistake

    if by_launcher() and any(isinstance(member.config.runtime, Spmd) for member in members):
        raise Mistake("several runs need processes of their own each: start them without torchrun, or one by one")


def _run(config: RunConfig) -> int:
    """One run, in a new directory below runs/ or in that of the run it goes on with."""
    from diloco import resume, rundir
    from diloco.runtime.base import Abandoned
    from experiments.mistakes import Mistake, first_lines

    directory = rundir.new_directory(config.name)
    try:
        if config.resume == "auto":
            directory = resume.newest(config.name) or directory
        elif config.resume:
            directory = Path(config.resume).resolve()
        if told := os.environ.get(DIRECTORY_TOLD):
            Path(told).write_text(str(directory))
        return STATUS[attempt(config, directory).summary["status"]]
    except Mistake as mistake:
        return tell(mistake)
    except Abandoned as error:
        if str(error):
            print(f"error: {first_lines(error)}", file=sys.stderr)
        return FAILED


def attempt(config: RunConfig, directory: Path) -> Result:
    """train(config), told apart: Mistake where it refuses to begin, and what training itself raises as it is."""
    from diloco import train
    from experiments.mistakes import Mistake

    before = concluded_ns(directory)
    try:
        return train(config, directory, goes_on=STARTED_AGAIN in os.environ)
    except ValueError as error:
        if concluded_ns(directory) != before:
            raise
        raise Mistake(str(error)) from error


def concluded_ns(directory: Path) -> int:
    """When a run here last wrote its summary, as every run does that has begun; 0 = never."""
    try:
        return (directory / "summary.json").stat().st_mtime_ns
    except OSError:
        return 0


def _show(members: Sequence[Member], arguments: argparse.Namespace) -> int:
    """--cfg job: the configuration of each run as YAML."""
    from omegaconf import OmegaConf

    from experiments.mistakes import Mistake

    for number, member in enumerate(members):
        shown: Any = member.values
        if arguments.package:
            shown = OmegaConf.select(shown, arguments.package)
            if shown is None:
                raise Mistake(f"--package {arguments.package}: there is no such key")
        if number:
            print("---")
        text = OmegaConf.to_yaml(shown, resolve=arguments.resolve) if OmegaConf.is_config(shown) else f"{shown}\n"
        print(text, end="")
    return FINISHED


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Answer SIGTERM as Ctrl-C is answered. A run under way has handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
