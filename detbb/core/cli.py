"""What every command shares: one-line errors, exit codes, and a parser that needs no torch."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import detbb
from detbb.core.errors import ProcessLost, RunFailed, Stopped, UserError, printable, tell_torchrun


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, and whose epilog (the example) is printed as written."""

    def __init__(self, description: str, example: str, **options: Any) -> None:
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self._given: list[str] = []

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = [*args]
        return super().parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        file = next((word for word in self._given if word.endswith((".yaml", ".yml"))), None)
        hint = ""
        if message.endswith("required: --config") and file is not None:
            hint = f"; did you mean --config {file}?"
        elif message.startswith("unrecognized") and any(action.dest == "overrides" for action in self._actions):
            hint = "; overrides are written optimizer.lr=0.1 train.epochs=10, without dashes"
        raise UserError(f"{message}{hint}; see {self.prog} --help")

    def add_import(self) -> None:
        """`--import MODULE`, for commands on a checkpoint: the user says which code may run, not the file."""
        self.add_argument(
            "--import",
            action=_Import,
            metavar="MODULE",
            dest=argparse.SUPPRESS,
            help="import a module with heads that the checkpoint names as MODULE:Class; can be repeated",
        )


class _Import(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: Any = ""
    ) -> None:
        try:
            importlib.import_module(values)
        except Exception as error:
            raise UserError(f"--import: cannot import {values!r} ({type(error).__name__}: {error})") from error


def run(main: Callable[[], object]) -> NoReturn:
    """Run a command and exit: 0 done, 2 the user's input (one line), 128 + signal stopped, 1 anything else."""
    try:
        main()
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        _fail(error, f"error: {' '.join(str(error).split())}", 2)
    except RunFailed as error:
        _fail(error, f"error: {error}", 1)
    except Exception as error:
        _fail(error, traceback.format_exc().rstrip(), 1)
    sys.exit(0)


def command() -> NoReturn:
    """`detbb train …`, or `python -m detbb train …`, is `python tools/train.py …`, also where no repository is."""
    root = Path(__file__).resolve().parents[2]
    folder = root / "detbb_tools" if (root / "detbb_tools").is_dir() else root / "tools"  # an editable installation's
    tools = {path.stem: path for path in sorted(folder.glob("*.py"))}
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print("usage: detbb COMMAND ..., each with --help; detbb --version\n")
        for name, path in tools.items():
            first_line = path.read_text(encoding="utf-8").partition("\n")[0]
            print(f"  {name:12}{first_line.strip(chr(34)).partition('; see')[0]}")
        sys.exit(0)
    if sys.argv[1:2] == ["--version"]:
        print(f"detbb {detbb.__version__}")
        sys.exit(0)
    if len(sys.argv) < 2 or sys.argv[1] not in tools:
        print(f"error: usage: detbb {{{','.join(tools)}}} ..., each with --help", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [str(tools[sys.argv[1]])]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit(0)


def _fail(error: Exception, text: str, code: int) -> NoReturn:
    """Say what was wrong, and exit. torchrun shows the error of the first process that does so, as the last thing."""
    text = printable(text)
    if "RANK" not in os.environ:
        print(text, file=sys.stderr)
        sys.exit(code)
    rank, same_on_all_ranks = os.environ["RANK"], getattr(error, "same_on_all_ranks", False)
    if not same_on_all_ranks or rank == "0":
        prefix = "" if same_on_all_ranks else f"[rank {rank}] "
        sys.stderr.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, ProcessLost) or (same_on_all_ranks and rank != "0"):
        time.sleep(3)  # torchrun ends this process when it sees the one with the original error
    tell_torchrun(os.environ.get("TORCHELASTIC_ERROR_FILE"), text)
    os._exit(code)  # leaving the process group could wait for the others, who wait for this process
