"""evaluate.py: numbers that agree with a count by hand, files, pictures, what it refuses."""
import csv
import json
import shutil

import pytest
import torch
from PIL import Image


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def hard_tree(tree, tmp_path):
    """The tree with a third of its red test images filed under blue, and blue's under green: a known confusion matrix."""
    data = tmp_path / "hard"
    shutil.copytree(tree, data)
    for number in range(3):
        shutil.move(data / "test" / "red" / f"red {number}.png", data / "test" / "blue")
    for number in range(2):
        shutil.move(data / "test" / "blue" / f"blue {number}.png", data / "test" / "green")
    return data


def test_numbers_files_and_pictures(run, trained, hard_tree, tmp_path):
    out = tmp_path / "report"
    result = run("evaluate", "--checkpoint", trained.model, "--data", hard_tree, "--out", out)
    assert json.loads((out / "metrics.json").read_text()) == result.json
    predictions = read_csv(out / "predictions.csv")
    assert list(predictions[0]) == ["path", "true", "predicted", "probability"] and len(predictions) == 30
    right = [row["true"] == row["predicted"] for row in predictions]
    assert result.json["n"] == 30 and result.json["accuracy"] == pytest.approx(sum(right) / 30)
    assert all(row["path"].startswith(str(hard_tree / "test" / row["true"])) for row in predictions)
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in predictions)
    per_class = {row["class"]: row for row in read_csv(out / "per_class.csv")}
    f1s = []
    for name, row in per_class.items():
        hits = sum(p["true"] == p["predicted"] == name for p in predictions)
        support, answered = sum(p["true"] == name for p in predictions), sum(p["predicted"] == name for p in predictions)
        assert int(row["support"]) == support == {"blue": 11, "green": 12, "red": 7}[name]
        assert float(row["precision"]) == pytest.approx(hits / answered) and float(row["recall"]) == pytest.approx(hits / support)
        f1s.append(2 * hits / (support + answered))
        assert float(row["f1"]) == pytest.approx(f1s[-1])
    assert result.json["macro_f1"] == pytest.approx(sum(f1s) / 3)
    assert result.json["accuracy"] <= 25 / 30 and "top3_accuracy" not in result.json
    for name in ("curves.png", "confusion_matrix.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert "recall" in result.err


def test_split_default_folder_and_agreement_with_training(run, trained, tree):
    for split in ("val", "test", "train"):
        result = run("evaluate", "--checkpoint", trained.model, "--data", tree, "--split", split).json
        assert result["accuracy"] == pytest.approx(trained.json[f"{split}_acc"])
        assert result["loss"] == pytest.approx(torch.load(trained.model, weights_only=True)["metrics"][f"{split}_loss"], abs=1e-4)
    assert (trained.folder / "report" / "metrics.json").exists()


def test_classes_go_by_name(run, trained, tree, tmp_path):
    """A split without the first class shifts no label."""
    data = tmp_path / "data"
    shutil.copytree(tree, data)
    shutil.rmtree(data / "test" / "blue")
    result = run("evaluate", "--checkpoint", trained.model, "--data", data, "--out", tmp_path / "out")
    assert result.json["accuracy"] >= 0.9 and "blue" in result.err
    (data / "test" / "red").rename(data / "test" / "crimson")
    assert "crimson" in run("evaluate", "--checkpoint", trained.model, "--data", data, "--out", tmp_path / "out", code=2).error[0]


def test_fail_under(run, trained, hard_tree, tmp_path):
    args = ["--checkpoint", trained.model, "--data", hard_tree, "--out", tmp_path / "out"]
    assert run("evaluate", *args, "--fail-under", 0.99, code=4).json["accuracy"] < 0.99
    run("evaluate", *args, "--fail-under", 0.1)
    run("evaluate", *args, "--fail-under", 93, code=2)


def test_without_history_there_are_no_curves(run, trained, tree, tmp_path):
    shutil.copy(trained.model, tmp_path / "model.pt")
    result = run("evaluate", "--checkpoint", tmp_path / "model.pt", "--data", tree)
    assert "no curves" in result.err and not (tmp_path / "report" / "curves.png").exists()
    run("evaluate", "--checkpoint", tmp_path / "model.pt", "--data", tree, "--history", tmp_path / "none.csv", code=2)
    (tmp_path / "odd.csv").write_text("a,b\nx,y\n")
    assert "odd.csv" in run("evaluate", "--checkpoint", tmp_path / "model.pt", "--data", tree, "--history", tmp_path / "odd.csv", code=2).error[0]


class Evil:
    def __reduce__(self):
        import os
        return os.system, ("touch /tmp/evil-code-ran",)


@pytest.mark.parametrize("script, rest", [("evaluate", ["--data", "x"]), ("predict", ["x.png"])])
def test_checkpoints_that_are_not_ours(run, trained, tmp_path, script, rest):
    from pathlib import Path
    marker = Path("/tmp/evil-code-ran")
    marker.unlink(missing_ok=True)
    content = torch.load(trained.model, weights_only=True)
    whole = trained.model.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({**content, "extra": Evil()}, tmp_path / "evil.pt")
    torch.save(content["state_dict"], tmp_path / "plain.pt")
    torch.save({k: v for k, v in content.items() if k != "classes"}, tmp_path / "part.pt")
    torch.save({**content, "version": 99}, tmp_path / "new.pt")
    torch.save({**content, "model_kwargs": {"num_classes": 7}}, tmp_path / "odd.pt")
    torch.save({**content, "arch": "resnet34"}, tmp_path / "shape.pt")
    torch.save({**content, "arch": "resnet1000"}, tmp_path / "arch.pt")
    shutil.copy(trained.folder / "last.pt", tmp_path / "run.pt")
    for name, words in (("cut", "damaged"), ("empty", "damaged"), ("text", "damaged"), ("evil", "refused"), ("plain", "state dict"),
                        ("part", "lacks classes"), ("odd", "contradicts"), ("arch", "cannot build"),
                        ("run", "give the model.pt"), ("new", "version 99"), ("shape", "layer1.2.conv1.weight"), ("absent", "no such file")):
        error, = run(script, "--checkpoint", tmp_path / f"{name}.pt", *rest, code=2).error
        assert words in error and f"{name}.pt" in error
    assert not marker.exists()


def test_bad_data(run, trained, tree, tmp_path):
    data = tmp_path / "data"
    assert "no such folder" in run("evaluate", "--checkpoint", trained.model, "--data", data, code=2).error[0]
    shutil.copytree(tree, data)
    assert "other/" in run("evaluate", "--checkpoint", trained.model, "--data", data, "--split", "other", code=2).error[0]
    (data / "test" / "red" / "bad.png").write_bytes(b"no image")
    assert "bad.png" in run("evaluate", "--checkpoint", trained.model, "--data", data, code=2).error[0]
