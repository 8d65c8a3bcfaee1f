"""What every command shares: one-line errors, exit codes, and a parser that needs no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from detbb.errors import Stopped, UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, and whose epilog (the example) is printed as written."""

    def __init__(self, description: str, example: str) -> None:
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run(main: Callable[[], object]) -> NoReturn:
    """Run a command and exit: 0 done, 2 the user's input (one line), 128 + signal stopped, 1 anything else."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"{'' if rank == '0' else f'[rank {rank}] '}error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
