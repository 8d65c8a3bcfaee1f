"""Write a checkpoint as ONNX; see --help."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detbb.core.cli import Parser, run


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "Write all branches of a checkpoint to one ONNX file, from uint8 image to detections, checked against PyTorch.",
        "python tools/export.py runs/shapes_fcos/checkpoints/best.pt -o model.onnx --size 128 160",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a .pt file, or a run folder (its best.pt, else last.pt)")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the ONNX file to write")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="input size (default: data's image_size)")
    parser.add_argument("--head", nargs="+", metavar="NAME", help="only these branches")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    parser.add_import()
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    from detbb.inference.export import export_onnx

    size = None if options.size is None else (options.size[0], options.size[1])
    written = export_onnx(
        options.checkpoint, options.output, size=size, heads=options.head, overwrite=options.overwrite
    )
    print("\n".join(written.lines()))


if __name__ == "__main__":
    run(main)
