"""A training in a cell of a notebook: what is on the screen, and what is in log.txt."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).resolve().parent / "support"


def test_a_notebook_shows_each_line_once_and_log_txt_holds_them(tmp_path: Path):
    code = f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
from pathlib import Path
from runs import tiny_config
from detbb import train
train(tiny_config(Path({str(tmp_path)!r}), "train.steps=4", "data.shapes.val=null"))
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    outputs = notebook.cells[0].outputs
    shown = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    kept = (tmp_path / "run" / "log.txt").read_text()
    assert re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", kept, flags=re.MULTILINE) == shown
    assert shown.count("step 2/4") == shown.count("step 4/4") == 1
    assert {output.output_type for output in outputs} <= {"stream", "execute_result"}
