"""The shape of the code: imports run one way, files and functions stay small, the project's files agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

from detbb.heads.loading import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = sorted((REPOSITORY / "detbb").rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").glob("test_*.py"))
# Imports run one way only: a folder may import those that stand before it here.
ORDER = (
    "core",  # errors, files, the command line
    "structures",  # what flows: annotations, batches, predictions, class lists
    "config",
    "distributed",
    "data",
    "modeling",
    "metrics",
    "heads",
    "freeze",
    "detector",
    "checkpoint",
    "feature_cache",
    "report",
    "inference",
    "training",
    "__main__",  # python -m detbb
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def module_level(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import; not those under TYPE_CHECKING."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from module_level([n for n in getattr(node, part, []) if isinstance(n, ast.stmt)])


@cache
def imports(module: str, *, hidden: bool = False) -> frozenset[str]:
    """The modules of detbb that `module` imports by name when it is imported; hidden: in any statement."""
    found = set()
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree) if hidden else module_level(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & set(MODULES)) or {str(node.module)}
    return frozenset(found & set(MODULES))


def test_no_import_cycles():
    try:
        TopologicalSorter({module: imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(reversed(error.args[1]))}")


def folder(module: str) -> str:
    return module.split(".")[1]


def test_every_folder_has_its_place():
    assert {folder(m) for m in MODULES if "." in m} == set(ORDER)


def test_imports_between_folders_run_one_way():
    """Also those inside functions and under TYPE_CHECKING: nothing is hidden to break a circle."""
    upward = [
        f"{module} imports {other}"
        for module in MODULES
        if "." in module
        for other in imports(module, hidden=True)
        if "." in other and ORDER.index(folder(other)) > ORDER.index(folder(module))
    ]
    assert not upward


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_small(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"


def test_names_of_tests_are_short_claims():
    names = [name for path in TESTS for name in re.findall(r"def (test_\w+)", path.read_text())]
    assert not [name for name in names if len(name) >= 60]


def test_import_detbb_is_instant_and_its_names_are_there():
    """The names are there whichever modules were imported before."""
    code = """
import sys, detbb
assert not {"torch", "numpy", "yaml", "pydantic"} & set(sys.modules)
import detbb.training.loop, detbb.inference.evaluate, detbb.inference.predict
from detbb import load_config, build_detector, load_detector, train, evaluate, predict
from detbb import build_resnet, build_resnet_c4, SyncBatchNorm, Ema, HEADS, Head, freeze, frozen_names, digests
names = [load_config, build_detector, load_detector, train, evaluate, predict, build_resnet, build_resnet_c4]
names += [detbb.freeze, freeze, frozen_names, digests]
assert all(type(f).__name__ == "function" for f in names), names
assert issubclass(HEADS["fcos"], Head) and set(detbb.__all__) <= set(dir(detbb))
try: detbb.nothing
except AttributeError: pass
else: raise SystemExit("detbb.nothing")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_every_dependency_has_an_exact_pin_inside_its_range():
    from packaging.requirements import Requirement

    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_ci_runs_the_test_command_of_the_readme():
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert script.rstrip().endswith("exec make test") and (REPOSITORY / ".ci" / "run").stat().st_mode & 0o111
    assert "make test" in (REPOSITORY / "README.md").read_text()


def test_yaml_of_the_readme_works(tmp_path: Path):
    own, branch = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert own.count("\n") <= 12
    (tmp_path / "mine.yaml").write_text(own)
    load_config(tmp_path / "mine.yaml")
    recipe = yaml.safe_load((REPOSITORY / "configs/shapes_two_branches/2_add_semantic.yaml").read_text())
    assert yaml.safe_load(branch).items() <= recipe.items()
