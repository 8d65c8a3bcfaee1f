"""Draw what the branches of a checkpoint see on images; see --help."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detbb.core.cli import Parser, run


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "Predict on images: a picture of each image and branch, and predictions.json.",
        "python tools/predict.py runs/shapes_fcos/checkpoints/best.pt data/shapes/val --output-dir /tmp/predictions",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a .pt file, or a run folder (its best.pt, else last.pt)")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, or folders that are searched throughout")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where pictures and predictions.json go")
    parser.add_argument("--head", nargs="+", metavar="NAME", help="only these branches")
    parser.add_argument("--threshold", type=float, metavar="T", help="least score, 0 to 1 (default: each branch's own)")
    parser.add_import()
    return parser.parse_intermixed_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    from detbb.inference.predict import predict

    images = predict(
        options.checkpoint,
        options.inputs,
        output_dir=options.output_dir,
        heads=options.head,
        threshold=options.threshold,
    )
    print(f"{len(images)} images: {options.output_dir}")


if __name__ == "__main__":
    run(main)
