"""Look into checkpoints, compare two, move branches between them; see --help."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detbb.core.cli import Parser, run

TOOL = "python tools/checkpoint.py"
RUN = "runs/shapes_two_branches"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "Look into checkpoints, compare two bit by bit, and move branches between them.",
        f"{TOOL} show runs/shapes_fcos/checkpoints/last.pt",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, description: str, example: str) -> Parser:
        return commands.add_parser(name, help=description, description=description, example=f"{TOOL} {name} {example}")

    show = add("show", "What a checkpoint or branch file holds.", "runs/shapes_fcos/checkpoints/last.pt")
    show.add_argument("path", metavar="FILE")
    diff = add(
        "diff",
        "Which tensors of two checkpoints differ, bit for bit; exit code 1 if one that is frozen in B does.",
        f"{RUN}/1_detector/checkpoints/best.pt {RUN}/2_add_semantic/checkpoints/last.pt",
    )
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")
    diff.add_argument("--names", action="store_true", help="name every differing tensor, not only the first ones")
    extract = add(
        "extract",
        "Take a branch out, into a file of its own.",
        f"{RUN}/2_add_semantic/checkpoints/last.pt --head pixels -o pixels.pt",
    )
    attach = add(
        "attach",
        "Put branches into a checkpoint with the backbone and neck that they were trained on.",
        f"{RUN}/1_detector/checkpoints/best.pt pixels.pt -o both.pt",
    )
    remove = add("remove", "Drop a branch.", "both.pt --head pixels -o detector.pt")
    slim = add(
        "slim", "The weights as evaluated, without averages and optimizer state.", f"{RUN}/1_detector -o model.pt"
    )
    for command in (extract, attach, remove, slim):
        command.add_argument("checkpoint", metavar="CKPT")
    attach.add_argument("files", nargs="+", metavar="FILE", help="branch files made by `extract`")
    attach.add_argument("--head", metavar="NAME", help="another name for the branch of a single FILE")
    attach.add_argument(
        "--force", action="store_true", help="also on another backbone or neck; says what will be wrong"
    )
    for command in (extract, remove):
        command.add_argument("--head", required=True, metavar="NAME")
    for command in (extract, attach, remove, slim):
        command.add_import()
        command.add_argument("-o", "--output", required=True, metavar="FILE")
        command.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    return parser.parse_args(arguments)


def main() -> None:
    options = vars(parse(sys.argv[1:]))
    command = options.pop("command")
    from detbb.checkpoint import branches, inspection
    from detbb.core.console import show

    differs = False
    if command == "diff":
        shown, differs = inspection.diff(**options)
    else:
        shown = getattr(inspection if command == "show" else branches, command)(**options)
    show(*shown)
    sys.exit(int(differs))


if __name__ == "__main__":
    run(main)
