"""Find every fault of a configuration's data at once, and repair a copy; see --help."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detbb.core.cli import Parser, run


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "Find every fault of a configuration's data at once. Exit code 0: nothing, or only what training repairs by "
        "itself; 2: something that training refuses.",
        "python tools/check_data.py --config configs/bccd_fcos_r18.yaml --json /tmp/report.json",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file to train with")
    parser.add_argument("--json", metavar="REPORT", help="write the findings to this file, too")
    parser.add_argument(
        "--fix", metavar="DIR", help="write repaired copies and a config that uses them to a new folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.coco.train.images=DIR")
    return parser.parse_intermixed_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    from detbb.data.doctor.repair import check
    from detbb.heads.loading import load_config

    check(load_config(options.config, options.overrides, world_size=1), json_file=options.json, fix=options.fix)


if __name__ == "__main__":
    run(main)
