"""What must not get in: nothing asks the network, and stored configurations hold no secret."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import TINY

REPOSITORY = Path(__file__).resolve().parents[1]

WATCHED = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        raise SystemExit(f"{event} {arguments}")
    if event in ("pickle.find_class", "os.system") and LOADING:
        raise SystemExit(f"{event} {arguments}")
LOADING = []
sys.addaudithook(watch)
sys.path[:0] = [PATHS]
from runs import shrink
from detbb.heads.loading import load_config
from detbb.inference.evaluate import evaluate
from detbb.training.loop import train
shrink()
last = train(load_config(FILE, []))
LOADING.append(1)
from detbb.checkpoint.content import open_checkpoint
open_checkpoint(last)
LOADING.clear()
evaluate(last)
print("DONE")
"""


@pytest.mark.slow
def test_training_and_evaluation_never_ask_the_network(tmp_path):
    """Python's audit hooks see every connection and name look-up, also while modules are imported."""
    file = tmp_path / "run.yaml"
    values = yaml.safe_load(TINY.format(out=tmp_path / "run", data=tmp_path / "shapes"))
    values["train"]["steps"] = 1
    values["schedule"]["warmup_steps"] = 0
    file.write_text(yaml.safe_dump(values))
    paths = f"{str(REPOSITORY)!r}, {str(REPOSITORY / 'tests' / 'support')!r}"
    code = WATCHED.replace("PATHS", paths).replace("FILE", repr(str(file)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.endswith("DONE\n"), done.stderr[-2000:]
