"""Killed runs, full disks and damaged files: nothing is lost, and the user gets one line in place of a traceback."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, TINY, after_epochs, load_pt, make_tree, names
from PIL import Image

pytestmark = pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals and limits")
FILES = ["history.csv", "last.pt", "model.pt"]


def run_script(name, *argv):
    """Run a script of tests/ in a process of its own."""
    line = [sys.executable, ROOT / "tests" / f"{name}.py", *argv]
    return subprocess.run([str(part) for part in line], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_killed_runs_lose_nothing():
    done = run_script("faults", "--kills", 4)
    assert done.returncode == 0 and done.stdout.strip().endswith("4 kills, 4 resumed, 0 lost"), (
        done.stdout + done.stderr
    )


@pytest.mark.slow
def test_damaged_images_crash_nothing(trained):
    done = run_script("fuzz", "--files", 400, "--checkpoint", trained.model)
    assert done.returncode == 0 and done.stdout.strip().endswith("unreadable, 0 failures"), done.stdout + done.stderr


# ---------------------------------------------------------------- damaged checkpoints


def change_state(tensor, key="fc.weight"):
    return lambda content: content["state_dict"].update({key: tensor})


@pytest.mark.parametrize(
    "change, words",
    [
        (change_state(torch.full((3, 512), float("nan"))), "not finite"),
        (change_state(torch.full((3, 512), 3e38)), "not finite"),
        (change_state(torch.ones(3, 512).to_sparse()), "fc.weight (of the wrong type)"),
        (change_state(torch.ones(3, 512, device="meta")), "fc.weight (of the wrong type)"),
        (change_state(torch.ones(3, 512, dtype=torch.complex64)), "fc.weight (of the wrong type)"),
        (change_state(torch.ones(1).expand(10**12)), "a tensor of 4000000000000 bytes, of which 4 are stored"),
        (change_state(7, key=7), "7 (unknown)"),
        (lambda content: content.update(classes=["a", "a", "b"]), "missing or invalid classes"),
        (lambda content: content.update(classes=["a", "b", 3]), "missing or invalid classes"),
        (lambda content: content.update(temperature=float("nan")), "a number that is not finite"),
        (lambda content: content.update(temperature=-1.0), "missing or invalid temperature"),
        (lambda content: content.update(views=[(5, True)]), "missing or invalid views"),
        (lambda content: content.update(args=[]), "missing or invalid args"),
        (lambda content: content.update(arch="fasterrcnn_resnet50_fpn"), "fasterrcnn_resnet50_fpn"),
        (lambda content: content.update(arch="squeezenet1_1"), "squeezenet1_1"),
        (lambda content: content["model_kwargs"].update(width_per_group=10**7), "missing or invalid model_kwargs"),
        (lambda content: content["preprocessing"].update(size=10**9), "missing or invalid size"),
        (lambda content: content["preprocessing"].update(size="32"), "missing or invalid size"),
        (lambda content: content["preprocessing"].update(interpolation="box"), "missing or invalid interpolation"),
        (lambda content: content["preprocessing"].update(mean=[0.5, 0.5]), "missing or invalid mean"),
        (lambda content: content["preprocessing"].update(std=[0.5, 0.0, 0.5]), "missing or invalid std"),
        (lambda content: content["preprocessing"].update(mean=[10**400] * 3), "a number that is not"),
    ],
)
def test_invalid_checkpoints_are_refused(run, trained, tree, tmp_path, change, words):
    content = load_pt(trained.model)
    change(content)
    torch.save(content, tmp_path / "odd.pt")
    report = ["--data", tree, "--out", tmp_path / "report"]
    for script, rest in (("predict", [tree / "test" / "red"]), ("evaluate", report)):
        message = run(script, "--checkpoint", tmp_path / "odd.pt", *rest, code=2).error[0]
        assert words in message


def test_flipped_bit_is_noticed(run, trained, tree, tmp_path):
    """torch.load does not notice a changed value: it would return another class name, or other weights."""
    content = trained.model.read_bytes()
    class_name = content.index(b"green")
    for at in (class_name, class_name + 1, len(content) // 3, len(content) // 2, 2 * len(content) // 3):
        flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        (tmp_path / "flipped.pt").write_bytes(flipped)
        assert "damaged" in run("predict", "--checkpoint", tmp_path / "flipped.pt", tree / "test", code=2).error[0]


def test_damaged_states_of_runs_are_refused(run, trained, tree, tmp_path):
    args = ["--data", tree, "--out", tmp_path, *SMALL]
    unfinished = {"format": "training run", "version": 2, "finished": False}
    torch.save({**unfinished, "run": 7}, tmp_path / "wrong.pt")
    torch.save(unfinished, tmp_path / "missing.pt")
    contents = [b"", (trained.folder / "last.pt").read_bytes()[:999]]
    for content in (*contents, *((tmp_path / name).read_bytes() for name in ("wrong.pt", "missing.pt"))):
        (tmp_path / "last.pt").write_bytes(content)
        message = run("train", *args, "--resume", code=2).error[0]
        assert "last.pt" in message and "--restart" in message
    for name in ("wrong.pt", "missing.pt"):
        (tmp_path / name).unlink()
    (tmp_path / ".model.pt.01230123.tmp").write_bytes(b"left behind by a killed run")
    run("train", *args, "--restart", "--epochs", 1)
    assert names(tmp_path) == FILES


def test_unreadable_folders(run, trained, tree, tmp_path, monkeypatch):
    """Folders below class folders that cannot be read are not left out without a trace."""
    shutil.copytree(tree, tmp_path / "data")
    for split in ("train", "test"):
        (tmp_path / "data" / split / "red" / "closed").mkdir()

    scandir = os.scandir

    def scan(path="."):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    checkpoint = ("--checkpoint", trained.model)
    result = run("predict", *checkpoint, tmp_path / "data" / "test", "--format", "csv", code=3)
    (line,) = (line for line in result.out.splitlines() if "closed" in line)
    assert line.endswith(',"not a regular file, or a folder that cannot be read"')
    run("evaluate", *checkpoint, "--data", tmp_path / "data", "--out", tmp_path / "report")
    notes = json.loads((tmp_path / "report" / "metrics.json").read_text())["notes"]
    assert [note for note in notes if "cannot be read" in note and "closed" in note]
    message = run("train", "--data", tmp_path / "data", "--out", tmp_path / "run", *SMALL, code=2).error[0]
    assert "closed: not a regular file, or a folder that" in message


# ---------------------------------------------------------------- full disks and closed streams


def test_report_is_complete_or_the_old_one(run, trained, tree, tmp_path, monkeypatch):
    """A disk that is full when the last file is written leaves the old report as it was."""
    import evaluate

    argv = ("--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "report")
    run("evaluate", *argv)
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(evaluate, "write_report", fail)
    assert "report.html: No space" in run("evaluate", *argv, "--split", "val", code=2).error[0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_full_disk(trained, tree, tmp_path):
    """Where files may have only 20 MB, which is too little for a ResNet-18, the old model stays, and nothing else."""
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        shutil.copy(trained.folder / name, out)
    train = [sys.executable, ROOT / "train.py", "--data", tree, "--out", out, "--epochs", 1, *SMALL]
    line = ["sh", "-c", 'ulimit -f 20000; exec "$@"', "sh", *train]
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model.pt: File too large" in done.stderr.splitlines()[-1]
    assert (out / "model.pt").read_bytes() == trained.model.read_bytes() and names(out) == FILES
    assert load_pt(out / "last.pt")["finished"] is False


def predict_in_a_shell(trained, tree, redirection):
    line = [sys.executable, ROOT / "predict.py", "--checkpoint", trained.model, tree / "test" / "red"]
    return subprocess.run(f"{shlex.join(map(str, line))} {redirection}", shell=True, capture_output=True, text=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_full_stdout(trained, tree, monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = predict_in_a_shell(trained, tree, "> /dev/full")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "predict.py: error: stdout: No space left on device"


@pytest.mark.parametrize(
    "redirection", [">&-", *(pytest.param(text, marks=pytest.mark.slow) for text in ("2>&-", "2>/dev/full"))]
)
def test_closed_streams(trained, tree, redirection):
    assert predict_in_a_shell(trained, tree, redirection).returncode == 0


# ---------------------------------------------------------------- files that are not what they seem


def test_pipes_and_decompression_bombs(run, trained, tree, tmp_path):
    """Files that never end, or that declare too many pixels, are refused by name and at once."""
    source = make_tree(tmp_path / "source", counts=(("", 5),))
    red = source / "red"
    os.mkfifo(red / "pipe.png")
    os.symlink("/dev/zero", red / "zero.png")
    os.symlink("/nowhere", red / "gone.png")
    Image.new("L", (30000, 1)).save(red / "wide.png")
    Image.new("L", (1, 1)).save(red / "point.png")
    bomb = bytearray((red / "point.png").read_bytes())
    bomb[16:24] = b"\x7f\xff\xff\xff" * 2  # width and height
    (red / "bomb.png").write_bytes(bomb)
    result = run("prepare_data", "--source", source, "--out", tmp_path / "data", "--on-bad", "skip").json
    assert (result["images"], result["rejected"]) == (17, 4)
    lines = run("predict", "--checkpoint", trained.model, source, "--format", "csv", code=3).out.splitlines()
    failed = [os.path.basename(record["path"]) for record in csv.DictReader(lines) if record["error"]]
    assert sorted(failed) == ["bomb.png", "gone.png", "pipe.png", "zero.png"]
    assert "pipe.png" in run("predict", "--checkpoint", red / "pipe.png", source, code=2).error[0]
    data = tmp_path / "tree"
    shutil.copytree(tree, data)
    os.mkfifo(data / "test" / "red" / "pipe.png")
    assert "pipe.png" in run("train", "--data", data, "--out", tmp_path / "out", *SMALL, code=2).error[0]
    args = ["--checkpoint", trained.model, "--data", data, "--out", tmp_path / "report"]
    assert "pipe.png" in run("evaluate", *args, code=2).error[0]


@pytest.mark.parametrize(
    "change, words",
    [(os.unlink, "no such file"), (lambda path: shutil.copy(path.with_name("red 4.png"), path), "has changed")],
)
def test_images_that_vanish_or_change_during_a_run(run, tree, tmp_path, monkeypatch, change, words):
    import common

    data = tmp_path / "data"
    shutil.copytree(tree, data)
    monkeypatch.setattr(common, "MEMORY_SHARE", 1e-7)  # images are read again in each epoch
    args = ["--data", data, "--out", tmp_path / "out", "--finetune", "last", "--epochs", 3, *TINY]
    with after_epochs(lambda _count: change(data / "train" / "red" / "red 3.png")):
        message = run("train", *args, code=2).error[0]
    assert words in message and "red 3.png" in message
    assert len(load_pt(tmp_path / "out" / "last.pt")["run"]["history"]) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"epoch\n1\0\n",
        b"epoch,val_loss\n" + b"9" * 400 + b",1\n",
        b"\xff\xfe",
        b"x" * 200_000,
        b"epoch,train_loss,train_acc,val_loss,val_acc,test_loss,test_acc\n1,inf,1,1,1,1,1\n",
    ],
)
def test_invalid_histories_are_refused(run, trained, tree, tmp_path, content):
    (tmp_path / "history.csv").write_bytes(content)
    args = ["--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "report"]
    message = run("evaluate", *args, "--history", tmp_path / "history.csv", code=2).error[0]
    assert "history.csv" in message and "not a history" in message


def test_foreign_files_beside_a_tree(run, tmp_path):
    """The files beside the images may be from elsewhere, and must not name places outside the tree."""
    source = make_tree(tmp_path / "source", counts=(("", 8),))
    args = ["--source", source, "--out", tmp_path / "data"]
    run("prepare_data", *args)
    before = names(tmp_path / "data")
    (tmp_path / "data" / ".prepared.json").write_text("[1, 2]")
    message = run("prepare_data", *args, code=2).error[0]
    assert str(tmp_path / "data") in message and "--force" in message
    assert names(tmp_path / "data") == before
    (tmp_path / "splits.csv").write_text("path,class,split,sha256\ntrain/../../x.png,../../x,train,ab\n")
    args = ["--source", source, "--out", tmp_path / "new", "--splits", tmp_path / "splits.csv"]
    assert "not a splits.csv" in run("prepare_data", *args, code=2).error[0]
    assert not (tmp_path / "new").exists()
