"""Evaluate the branches of a checkpoint; see --help."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detbb.core.cli import Parser, run


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "Evaluate every branch of a checkpoint that has data for the split, or those named.",
        "python tools/eval.py runs/shapes_fcos/checkpoints/best.pt --output-dir /tmp/eval eval.batch_size=4",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a .pt file, or a run folder (its best.pt, else last.pt)")
    parser.add_argument("--config", metavar="FILE", help="data and settings to use instead of those in the checkpoint")
    parser.add_argument("--head", nargs="+", metavar="NAME", help="only these branches")
    parser.add_argument("--split", default="val", choices=["val", "train"], help="which images (default: val)")
    parser.add_argument("--output-dir", metavar="DIR", help="where results.json, metrics.json and pictures go")
    parser.add_import()
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.coco.val.images=DIR")
    options = parser.parse_intermixed_args(arguments)
    if options.head is not None:  # overrides may follow the names
        options.overrides += [word for word in options.head if "=" in word]
        options.head = [word for word in options.head if "=" not in word]
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    from detbb.inference.evaluate import evaluate
    from detbb.report.tables import print_summary

    metrics = evaluate(
        options.checkpoint,
        config=options.config,
        heads=options.head,
        split=options.split,
        output_dir=options.output_dir,
        overrides=options.overrides,
    )
    print_summary(metrics, output_dir=options.output_dir)


if __name__ == "__main__":
    run(main)
