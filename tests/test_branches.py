"""Branch surgery: branches trained apart come together to the bit; nothing goes where it would predict otherwise."""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from runs import flat, load
from stages import FIRST, SECOND, SMALL_FILES, THIRD, evaluated, results, stage

from detbb.checkpoint.branches import BranchForm, attach, extract, remove
from detbb.checkpoint.content import KEYS, load_detector, read_checkpoint
from detbb.checkpoint.inspection import diff, show
from detbb.core.errors import UserError
from detbb.freeze import digest
from detbb.inference.evaluate import evaluate
from detbb.training.loop import train

TOOL = Path(__file__).resolve().parents[1] / "tools" / "checkpoint.py"
COMMANDS = ("show", "diff", "extract", "attach", "remove", "slim")
pytestmark = pytest.mark.usefixtures("unsynced", "thin_resnets")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints: a detector, and three runs apart that add branches to it; and the branch files of two."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "images"
    base = train(stage(folder, data, {"first": FIRST}, *SMALL_FILES, name="base"))
    frozen = "freeze=[backbone, neck, heads.first]"
    deep = THIRD.replace("}", ", levels: [p2]}")
    return {
        "folder": folder,
        "data": data,
        "base": base,
        "second": train(
            stage(
                folder, data, {"first": FIRST, "second": SECOND}, frozen, "checkpoint.every=4", base=base, name="second"
            )
        ),
        "third": train(stage(folder, data, {"third": THIRD}, "freeze=[backbone, neck]", base=base, name="third")),
        "deep": train(
            stage(folder, data, {"first": FIRST, "fourth": SECOND, "deep": deep}, frozen, base=base, name="deep")
        ),
    }


@pytest.fixture(scope="module")
def files(trained):
    """Branch files by head."""
    found = {}
    for head, run in (("second", "second"), ("third", "third"), ("fourth", "deep"), ("deep", "deep")):
        found[head] = trained["folder"] / f"{head}.branch.pt"
        extract(trained[run], head, output=found[head])
    return found


@pytest.fixture(scope="module")
def merged(trained, files):
    output = trained["folder"] / "merged.pt"
    attach(trained["base"], [files["second"], files["third"]], output=output)
    return output


def changed_by_one_bit(source: Path, output: Path, name: str, *, section: str = "model") -> Path:
    """A copy of a checkpoint in which the last bit of one number of one tensor is another."""
    content = torch.load(source, weights_only=True)
    tensor = (content["model"] if section == "model" else content["ema"]["tensors"])[name]
    bits = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)
    bits[(0,) * bits.ndim] ^= 1
    torch.save(content, output)
    return output


def printed(items) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for item in items:
        console.print(item, markup=False, soft_wrap=isinstance(item, str))
    return console.export_text()


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the command in this process: its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [TOOL.name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return call


def test_branches_trained_apart_predict_the_same_after_attach(tmp_path, trained, merged):
    together = results(merged, tmp_path / "merged")
    assert set(together) == {"first", "second", "third"} and all(json.loads(text) for text in together.values())
    for name, own in (("first", "base"), ("second", "second"), ("third", "third")):
        assert together[name] == results(trained[own], tmp_path / own, name)[name], name


def test_attach_leaves_all_that_the_checkpoint_holds(trained, merged):
    before, after = load(trained["base"].parents[1]), read_checkpoint(merged)
    assert tuple(after) == KEYS
    for key in ("step", "phase", "ema", "optimizer", "scaler", "rng", "data", "versions"):
        assert flat(before[key]) == flat(after[key]), key
    assert flat(before["model"]).items() <= flat(after["model"]).items()
    assert after["ema"]["tensors"] and after["config"]["inherited_heads"] == ["second", "third"]
    assert after["frozen"]["names"] == ["heads.second", "heads.third"]
    new = {n for n in after["model"] if n not in before["model"]}
    assert after["frozen"]["digests"] == {n: digest(after["model"][n]) for n in new}
    assert {n.rsplit(".", 1)[0].split(".")[1] for n in new} == {"second", "third"}
    assert list(after["classes"]) == ["first", "second", "third"] and "pixels" in after["config"]["data"]


def test_a_branch_file_is_plain_data_of_evaluated_weights(trained, files):
    content = torch.load(files["second"], weights_only=True)
    assert (
        tuple(content) == tuple(BranchForm.model_fields) and content["kind"] == "branch" and content["head"] == "second"
    )
    run = load(trained["second"].parents[1])
    own = evaluated(run, "heads.second.")
    assert {f"heads.second.{n}": digest(t) for n, t in content["tensors"].items()} == own
    assert own != evaluated(run | {"ema": None}, "heads.second.")
    assert list(content["config"]["heads"]) == ["second"] and list(content["config"]["data"]) == ["pixels"]
    assert content["classes"] == run["classes"]["second"]
    assert content["shared"]["tensors"].items() <= evaluated(run, "backbone.", "neck.").items()
    backbone = {n for n in run["model"] if n.startswith("backbone.")}
    assert {n for n in content["shared"]["tensors"] if n.startswith("backbone.")} == backbone


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("backbone.conv1.weight", "ema"),
        ("backbone.layer4.1.bn2.running_var", "ema"),
        ("backbone.bn1.num_batches_tracked", "model"),
        ("neck.output.p3.0.bias", "ema"),
    ],
)
def test_another_backbone_by_one_bit_is_refused(tmp_path, trained, files, name, section):
    other = changed_by_one_bit(trained["base"], tmp_path / "other.pt", name, section=section)
    with pytest.raises(UserError, match=rf"1 of the \d+ tensors it reads differ \({name}\).*or use --force"):
        attach(other, [files["second"]], output=tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_force_attaches_and_says_what_will_be_wrong(tmp_path, trained, files):
    other = changed_by_one_bit(trained["base"], tmp_path / "other.pt", "backbone.conv1.weight", section="ema")
    lines = attach(other, [files["second"]], output=tmp_path / "out.pt", force=True)
    assert "WARNING" in lines[0] and "neither its predictions nor its metrics would be those of its own run" in lines[0]
    assert set(evaluate(tmp_path / "out.pt", heads=["second"]))


def test_only_what_is_evaluated_counts(tmp_path, trained, files):
    """The raw weights behind an average are another bit: no branch ever saw them."""
    other = changed_by_one_bit(trained["base"], tmp_path / "other.pt", "backbone.conv1.weight", section="model")
    attach(other, [files["second"]], output=tmp_path / "out.pt")


def test_levels_that_a_branch_does_not_read_do_not_matter(tmp_path, trained, files):
    """`fourth` comes from a run whose other branch added p2 to the neck; `third` goes into that run."""
    attach(trained["base"], [files["fourth"]], output=tmp_path / "a.pt")
    own = results(trained["deep"], tmp_path / "own", "fourth")
    assert results(tmp_path / "a.pt", tmp_path / "attached", "fourth") == own
    attach(trained["deep"], [files["third"]], output=tmp_path / "b.pt")
    assert set(results(tmp_path / "b.pt", tmp_path / "all")) == {"first", "third", "fourth", "deep"}
    for force in (False, True):
        with pytest.raises(UserError, match=r"reads neck\..*which this checkpoint lacks"):
            attach(trained["base"], [files["deep"]], output=tmp_path / "c.pt", force=force)


def test_a_taken_name_is_refused_and_another_may_be_given(tmp_path, trained, files, merged):
    with pytest.raises(UserError, match="has a branch 'second' already"):
        attach(merged, [files["second"]], output=tmp_path / "out.pt")
    with pytest.raises(UserError, match="has a branch 'third' already"):
        attach(trained["base"], [files["third"], files["third"]], output=tmp_path / "out.pt")
    with pytest.raises(UserError, match="is not a valid name"):
        attach(merged, [files["second"]], output=tmp_path / "out.pt", head="a b")
    with pytest.raises(UserError, match="renames the branch of one file"):
        attach(merged, [files["second"], files["third"]], output=tmp_path / "out.pt", head="again")
    assert not (tmp_path / "out.pt").exists()
    attach(merged, [files["second"]], output=tmp_path / "out.pt", head="again")
    found = results(tmp_path / "out.pt", tmp_path / "all", "second", "again")
    assert found["again"] == found["second"]


def test_a_stage_goes_on_from_a_merged_checkpoint(tmp_path, trained, merged):
    last = train(stage(tmp_path, trained["data"], {"fifth": THIRD}, "freeze=[backbone, neck]", base=merged))
    before, after = results(merged, tmp_path / "before"), results(last, tmp_path / "after")
    assert before == {n: t for n, t in after.items() if n != "fifth"} and "fifth" in after


def test_a_merged_checkpoint_resumes_with_its_branches_at_rest(tmp_path, trained, merged):
    config = stage(tmp_path, trained["data"], {"first": FIRST}, *SMALL_FILES, "train.steps=8")
    content = load(train(config, resume=str(merged)).parents[1])
    rest = ("heads.second.", "heads.third.")
    assert content["step"] == 8 and evaluated(content, *rest) == evaluated(read_checkpoint(merged), *rest)
    assert evaluated(content, "heads.first.") != evaluated(read_checkpoint(merged), "heads.first.")
    text = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "heads.second, heads.third: frozen while backbone and neck is trained" in text


def test_removing_what_was_attached_gives_the_checkpoint_back(tmp_path, trained, merged):
    remove(merged, "third", output=tmp_path / "one.pt")
    remove(tmp_path / "one.pt", "second", output=tmp_path / "none.pt")
    before, after = read_checkpoint(trained["base"]), read_checkpoint(tmp_path / "none.pt")
    assert "pixels" not in after["config"]["data"]
    before["config"]["data"].pop("pixels")  # the base's file names it too, but no head of it reads it
    assert flat(before) == flat(after)


def test_remove_takes_every_trace_of_a_trained_branch(tmp_path, trained):
    lines = remove(trained["deep"], "deep", output=tmp_path / "out.pt")
    assert any("neck.inner.layer1" in line and "no other branch reads" in line for line in lines)
    content = read_checkpoint(tmp_path / "out.pt")
    gone = ("heads.deep", "neck.inner.layer1", "neck.output.p2")
    assert not [key for key in flat(content) if any(name in key for name in gone)]
    assert content["ema"]["tensors"] and all(n.startswith("heads.fourth.") for n in content["ema"]["tensors"])
    assert set(content["optimizer"]["state"]) <= set(content["model"])
    kept = [n for n in results(tmp_path / "out.pt", tmp_path / "after")]
    assert kept == ["first", "fourth"]


def test_remove_refuses_the_only_branch_and_an_unknown_one(tmp_path, trained):
    with pytest.raises(UserError, match="the only branch"):
        remove(trained["base"], "first", output=tmp_path / "out.pt")
    with pytest.raises(UserError, match="did you mean 'second'"):
        remove(trained["second"], "secnd", output=tmp_path / "out.pt")
    with pytest.raises(UserError, match="did you mean 'second'"):
        extract(trained["second"], "secnd", output=tmp_path / "out.pt")


def test_nothing_is_written_over_unless_asked(tmp_path, trained, files, merged):
    output = tmp_path / "out.pt"
    output.write_bytes(b"mine")
    for write in (
        lambda **o: extract(trained["second"], "second", output=output, **o),
        lambda **o: attach(trained["base"], [files["second"]], output=output, **o),
        lambda **o: remove(merged, "second", output=output, **o),
    ):
        with pytest.raises(UserError, match="exists already"):
            write()
        assert output.read_bytes() == b"mine"
        write(overwrite=True)
        assert output.read_bytes() != b"mine"
        output.write_bytes(b"mine")


def test_what_is_no_branch_file_is_refused(tmp_path, trained, files):
    content = torch.load(files["second"], weights_only=True)
    content["shared"]["tensors"]["backbone.conv1.weight"] = "0" * 64
    torch.save(content, tmp_path / "forged.pt")
    torch.save(content | {"format_version": 99}, tmp_path / "newer.pt")
    torch.save(content | {"tensors": {"a": 1}}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("hello")
    for file, message in (
        (trained["base"], "not a branch file"),
        (tmp_path / "forged.pt", "do not fit together"),
        (tmp_path / "newer.pt", "branch format 99"),
        (tmp_path / "foreign.pt", "tensors.a is a int"),
        (tmp_path / "text.pt", "text.pt"),
        (tmp_path / "gone.pt", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            attach(trained["base"], [file], output=tmp_path / "out.pt")


def test_diff_knows_averages_from_changes(tmp_path, trained):
    shown, wrong = diff(trained["base"], trained["second"])
    text = printed(shown)
    assert not wrong and "A's averages (EMA), not its raw weights: unchanged as evaluated" in text
    assert "tensors that are frozen in B are as in A, to the bit" in text
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if line.count("│") == 8}
    counts = {name: [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert counts["backbone.stem"] == ["1", "5", "6", "-", "-", "-"]  # only num_batches_tracked has no average
    assert counts["heads.second"][:5] == ["-"] * 5 and int(counts["heads.second"][5]) > 5
    assert not diff(trained["base"], trained["base"])[1]
    assert "heads.second" in printed(diff(trained["second"], trained["base"])[0])


@pytest.mark.parametrize(
    "name", ["backbone.layer1.0.bn1.running_mean", "heads.first.classification_head.cls_logits.bias"]
)
def test_diff_finds_one_bit_of_a_frozen_tensor(tmp_path, trained, name):
    other = changed_by_one_bit(trained["second"], tmp_path / "other.pt", name)
    shown, wrong = diff(trained["second"], other)
    assert wrong and f"FROZEN IN B, BUT NOT AS IN A: {name}" in printed(shown)
    assert "NOT WHAT B'S OWN RUN RECORDED" in printed(shown)
    shown, wrong = diff(other, trained["second"])  # B is what its run recorded, but it is not what A holds
    assert wrong and "RECORDED" not in printed(shown)


def test_diff_names_what_differs_but_may(trained):
    moved = [trained["second"].parent / f"step_000000{step}.pt" for step in (4, 6)]
    shown, wrong = diff(*moved, names=True)
    assert not wrong and "heads.second differs in" in printed(shown) and " more" not in printed(shown)
    text = printed(diff(trained["base"], trained["second"])[0])
    assert "differs in" not in text  # all that differs is raw
    assert "backbone.conv1.weight (only raw)" in printed(diff(trained["base"], trained["second"], names=True)[0])


def test_show_says_what_is_inside(trained, merged, files):
    text = printed(show(merged))
    for word in ("6, in phase 0", "6 updates", "heads.second, heads.third", "torch 2", "circle, rectangle, triangle"):
        assert word in text, word
    assert "semantic (inherited)" in text and "fcos (inherited" not in text
    detector = load_detector(merged)
    assert f"{sum(p.numel() for p in detector.parameters()):,}" in text
    branch = printed(show(files["second"]))
    assert "second, as evaluated at step 6" in branch and "background, circle" in branch


def test_the_exit_code_says_what_happened(tmp_path, trained, files, tool):
    other = changed_by_one_bit(trained["base"], tmp_path / "other.pt", "backbone.conv1.weight", section="ema")
    for arguments in (("attach", other, files["second"]), ("extract", trained["base"]), ("move", other)):
        code, out, error = tool(*arguments, "-o", tmp_path / "out.pt")
        assert code == 2 and not out and error.startswith("error: ") and error.count("\n") == 1, error
    code, out, _ = tool("attach", trained["base"], files["second"], files["third"], "-o", tmp_path / "out.pt")
    assert code == 0 and "branches first, second, third" in out
    assert tool("show", tmp_path / "out.pt")[0] == 0
    other = changed_by_one_bit(trained["second"], tmp_path / "other.pt", "backbone.conv1.weight")
    code, out, _ = tool("diff", trained["second"], other)
    assert code == 1 and "FROZEN IN B, BUT NOT AS IN A: backbone.conv1.weight" in out


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_is_there_without_torch_and_its_example_parses(capsys, command):
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = ['checkpoint.py', *{command}, '--help']"
    code += f"; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    example = done.stdout.split("example:\n")[1].split()
    assert example[:2] == ["python", "tools/checkpoint.py"]
    parsed = runpy.run_path(str(TOOL))["parse"](example[2:])
    assert parsed.command in ([*command] or COMMANDS)


def test_the_documented_formats_are_the_real_ones(monkeypatch, trained):
    text = (TOOL.parents[1] / "docs" / "checkpoints.md").read_text()
    tables = [re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) for part in text.split("## Branch file")]
    assert tables == [list(KEYS), list(BranchForm.model_fields)]
    monkeypatch.chdir(trained["second"].parent)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})


def test_the_documented_commands_parse():
    parse = runpy.run_path(str(TOOL))["parse"]
    text = (TOOL.parents[1] / "docs" / "branches.md").read_text()
    commands = re.findall(r"^python tools/checkpoint.py (.+)$", text, re.MULTILINE)
    assert {parse(command.split()).command for command in commands} == {"diff", "extract", "attach"}
