"""Train what a configuration describes; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detbb.core.cli import Parser, run


def parse(arguments: list[str]):
    parser = Parser(
        "Train and evaluate every branch of a configuration.",
        "python tools/train.py --config configs/shapes_fcos.yaml train.steps=200 optimizer.lr=0.0005",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file; docs/config.md lists its keys")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|CKPT",
        help="go on from a checkpoint, or a run folder's newest; alone: output_dir's, or a fresh start if it has none",
    )
    parser.add_import()
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch_size=8")
    for index, argument in enumerate(arguments[:-1]):
        if argument == "--resume" and "=" in arguments[index + 1] and not Path(arguments[index + 1]).exists():
            arguments = [*arguments[:index], "--resume=auto", *arguments[index + 1 :]]  # what follows is an override
    return parser.parse_intermixed_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    from detbb.heads.loading import load_config

    config = load_config(options.config, options.overrides)
    from detbb.training.loop import train

    train(config, resume=options.resume)


if __name__ == "__main__":
    run(main)
