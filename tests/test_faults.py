"""What must not happen: something lost by a killed run, a crash on a damaged file, a traceback where a line would do."""
import csv
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, make_tree
from PIL import Image

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


def test_killed_runs_lose_nothing():
    done = subprocess.run([sys.executable, ROOT / "tests" / "faults.py", "--kills", "6"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip().endswith("6 kills, 6 resumed, 0 lost"), done.stdout + done.stderr


def test_damaged_images_crash_nothing(trained):
    done = subprocess.run([sys.executable, ROOT / "tests" / "fuzz.py", "--files", "400", "--checkpoint", trained.model], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip().endswith("unreadable, 0 failures"), done.stdout + done.stderr


def nan_weight(content):
    content["state_dict"]["fc.weight"] = torch.full((3, 512), float("nan"))


@pytest.mark.parametrize("change, words", [
    (nan_weight, "not finite"),
    (lambda c: c["state_dict"].update({"fc.weight": torch.full((3, 512), 3e38)}), "not finite"),
    (lambda c: c["state_dict"].update({"fc.weight": torch.ones(3, 512).to_sparse()}), "of another kind (fc.weight)"),
    (lambda c: c["state_dict"].update({"fc.weight": torch.ones(3, 512, device="meta")}), "of another kind (fc.weight)"),
    (lambda c: c["state_dict"].update({"fc.weight": torch.ones(3, 512, dtype=torch.complex64)}), "of another kind (fc.weight)"),
    (lambda c: c["state_dict"].update({"fc.weight": torch.ones(1).expand(10 ** 12)}), "of another shape (fc.weight)"),
    (lambda c: c["state_dict"].update({7: 7}), "unknown (7)"),
    (lambda c: c.update(classes=["a", "a", "b"]), "classes"),
    (lambda c: c.update(classes=["a", "b", 3]), "classes"),
    (lambda c: c.update(temperature=float("nan")), "temperature"),
    (lambda c: c.update(temperature=-1.0), "temperature"),
    (lambda c: c.update(views=[(5, True)]), "views"),
    (lambda c: c.update(args=[]), "args"),
    (lambda c: c.update(arch="fasterrcnn_resnet50_fpn"), "unknown classification model"),
    (lambda c: c["model_kwargs"].update(width_per_group=10 ** 7), "model_kwargs"),
    (lambda c: c["preprocessing"].update(size=10 ** 9), "size"),
    (lambda c: c["preprocessing"].update(size="32"), "size"),
    (lambda c: c["preprocessing"].update(interpolation="box"), "interpolation"),
    (lambda c: c["preprocessing"].update(mean=[0.5, 0.5]), "mean and std"),
    (lambda c: c["preprocessing"].update(std=[0.5, 0.0, 0.5]), "mean and std"),
    (lambda c: c["preprocessing"].update(mean=[10 ** 400] * 3), "mean and std"),
])
def test_checkpoints_that_make_no_sense(run, trained, tree, tmp_path, change, words):
    content = torch.load(trained.model, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "odd.pt")
    for script, rest in (("predict", [tree / "test" / "red"]), ("evaluate", ["--data", tree, "--out", tmp_path / "report"])):
        assert words in run(script, "--checkpoint", tmp_path / "odd.pt", *rest, code=2).error[0]


def test_a_flipped_bit_is_noticed(run, trained, tree, tmp_path):
    """Anywhere in the values: torch.load would take a class that is called otherwise, or other weights, without a word."""
    whole = trained.model.read_bytes()
    names = whole.index(b"green")
    for at in (names, names + 1, len(whole) // 3, len(whole) // 2, 2 * len(whole) // 3):
        (tmp_path / "flipped.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        assert "damaged" in run("predict", "--checkpoint", tmp_path / "flipped.pt", tree / "test", code=2).error[0]


def test_a_report_is_all_new_or_all_old(run, trained, tree, tmp_path, monkeypatch):
    """A disk that fills up while the last file is written leaves the earlier report as it was."""
    import evaluate
    argv = ("--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "report")
    run("evaluate", *argv)
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device", "report.html")
    monkeypatch.setattr(evaluate, "write_report", full)
    assert "report.html: No space" in run("evaluate", *argv, "--split", "val", code=2).error[0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_full_disk(trained, tree, tmp_path):
    """Files may have 20 MB, which a ResNet-18 has not room in: one line, the old model stands, and nothing is left lying."""
    shutil.copytree(trained.folder, tmp_path / "out", ignore=shutil.ignore_patterns("report"))  # of other tests
    line = ["sh", "-c", 'ulimit -f 20000; exec "$@"', "sh", sys.executable, ROOT / "train.py", "--data", tree, "--out", tmp_path / "out", "--epochs", "1", *SMALL]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "model.pt: File too large" in done.stderr.splitlines()[-1]
    assert (tmp_path / "out" / "model.pt").read_bytes() == trained.model.read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["history.csv", "last.pt", "model.pt"]
    torch.load(tmp_path / "out" / "last.pt", weights_only=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_stdout_and_closed_streams(trained, tree):
    line = f"'{sys.executable}' '{ROOT / 'predict.py'}' --checkpoint '{trained.model}' '{tree / 'test' / 'red'}'"
    full = subprocess.run(f"{line} > /dev/full", shell=True, capture_output=True, text=True)
    assert full.returncode == 2 and full.stderr.splitlines()[-1] == "predict.py: error: stdout: No space left on device"
    for closed in (">&-", "2>&-", "2>/dev/full"):
        assert subprocess.run(f"{line} {closed}", shell=True, capture_output=True).returncode == 0, closed


def test_pipes_and_bombs_are_no_images(run, trained, tree, tmp_path):
    """What never ends, or promises too many pixels, is refused by name and at once."""
    source = make_tree(tmp_path / "source", counts=(("", 5),))
    os.mkfifo(source / "red" / "pipe.png")
    os.symlink("/dev/zero", source / "red" / "zero.png")
    os.symlink("/nowhere", source / "red" / "gone.png")
    Image.new("L", (30000, 1)).save(source / "red" / "wide.png")
    Image.new("L", (1, 1)).save(source / "red" / "point.png")
    bomb = bytearray((source / "red" / "point.png").read_bytes())
    bomb[16:24] = b"\x7f\xff\xff\xff" * 2  # width and height
    (source / "red" / "bomb.png").write_bytes(bomb)
    result = run("prepare_data", "--source", source, "--out", tmp_path / "data", "--on-bad", "skip").json
    assert (result["images"], result["rejected"]) == (17, 4)
    records = list(csv.DictReader(run("predict", "--checkpoint", trained.model, source, "--format", "csv", code=3).out.splitlines()))
    assert sorted(os.path.basename(record["path"]) for record in records if record["error"]) == ["bomb.png", "gone.png", "pipe.png", "zero.png"]
    assert "pipe.png" in run("predict", "--checkpoint", source / "red" / "pipe.png", source, code=2).error[0]
    data = tmp_path / "tree"
    shutil.copytree(tree, data)
    os.mkfifo(data / "test" / "red" / "pipe.png")
    assert "pipe.png" in run("train", "--data", data, "--out", tmp_path / "out", *SMALL, code=2).error[0]
    assert "pipe.png" in run("evaluate", "--data", data, "--checkpoint", trained.model, "--out", tmp_path / "report", code=2).error[0]


@pytest.mark.parametrize("change, words", [(os.unlink, "no such file"), (lambda path: shutil.copy(path.with_name("red 4.png"), path), "has changed")])
def test_images_that_vanish_or_change_in_mid_run(run, tree, tmp_path, monkeypatch, change, words):
    import train
    data, save = tmp_path / "data", train.save_last
    shutil.copytree(tree, data)
    monkeypatch.setattr(train, "MEMORY_SHARE", 1e-7)  # images are read again in each epoch
    monkeypatch.setattr(train, "save_last", lambda *args, **state: (save(*args, **state), change(data / "train" / "red" / "red 3.png")))
    error, = run("train", "--data", data, "--out", tmp_path / "out", "--finetune", "last", "--epochs", 3, *SMALL, code=2).error
    assert words in error and "red 3.png" in error
    assert len(torch.load(tmp_path / "out" / "last.pt", weights_only=True)["history"]) == 1


@pytest.mark.parametrize("content", [b"", b"epoch\n1\0\n", b"epoch,val_loss\n" + b"9" * 400 + b",1\n", b"\xff\xfe", b"x" * 200_000,
                                     b"epoch,train_loss,train_acc,val_loss,val_acc,test_loss,test_acc\n1,inf,1,1,1,1,1\n"])
def test_histories_that_are_none(run, trained, tree, tmp_path, content):
    (tmp_path / "history.csv").write_bytes(content)
    error, = run("evaluate", "--checkpoint", trained.model, "--data", tree, "--history", tmp_path / "history.csv", "--out", tmp_path / "report", code=2).error
    assert "history.csv is no history" in error


def test_trees_of_another_hand(run, tmp_path):
    """What stands beside the images names no place outside the tree, and need not be what we wrote."""
    source = make_tree(tmp_path / "source", counts=(("", 8),))
    run("prepare_data", "--source", source, "--out", tmp_path / "data")
    (tmp_path / "data" / ".prepared.json").write_text("[1, 2]")
    assert "another request" in run("prepare_data", "--source", source, "--out", tmp_path / "data", code=2).error[0]
    (tmp_path / "splits.csv").write_text("path,class,split,sha256\ntrain/../../x.png,../../x,train,ab\n")
    assert "is no splits.csv" in run("prepare_data", "--source", source, "--out", tmp_path / "new", "--splits", tmp_path / "splits.csv", code=2).error[0]


def test_states_of_runs_that_are_none(run, trained, tree, tmp_path):
    for content in (b"", (trained.folder / "last.pt").read_bytes()[:999]):
        (tmp_path / "last.pt").write_bytes(content)
        assert "--restart" in run("train", "--data", tree, "--out", tmp_path, "--resume", *SMALL, code=2).error[0]
    torch.save({"format": "training run", "version": 1, "finished": False, "history": 7}, tmp_path / "last.pt")
    assert "--restart" in run("train", "--data", tree, "--out", tmp_path, "--resume", *SMALL, code=2).error[0]
    (tmp_path / ".model.pt.0123.tmp").write_bytes(b"left by a killed run")
    run("train", "--data", tree, "--out", tmp_path, "--restart", "--epochs", 1, *SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.csv", "last.pt", "model.pt"]
