"""train.py: the files it writes, what it learns and what it leaves unchanged, resuming, and what it refuses."""

import copy
import csv
import functools
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, SMALL, TINY, command, equal_tensors, load_pt, make_tree, names
from conftest import pipe_without_reader, read_csv, real, stamps, tile
from PIL import Image

FIELDS = ["epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc", "seconds"]
FILES = ["history.csv", "last.pt", "model.pt"]


def history(folder):
    return read_csv(folder / "history.csv")


def same_model(*folders):
    """Return whether the models in two output folders have the same weights, to the bit, and the same temperature."""
    a, b = (load_pt(folder / "model.pt") for folder in folders)
    return equal_tensors(a["state_dict"], b["state_dict"]) and a["temperature"] == b["temperature"]


def measure(file, split):
    """Return loss and accuracy of a checkpoint, by plain torchvision: without folded BatchNorm and channels last."""
    from common import list_split, preprocess, read_image, resize

    checkpoint = load_pt(file)
    model = torchvision.models.get_model(checkpoint["arch"], **checkpoint["model_kwargs"]).eval()
    model.load_state_dict(checkpoint["state_dict"])
    size, interpolation, *rest = (checkpoint["preprocessing"][key] for key in ("size", "interpolation", "mean", "std"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in rest)
    paths, _, targets = list_split(split, checkpoint["classes"])
    images = [read_image(path) for path in paths]
    images = resize(preprocess(images, checkpoint["preprocessing"]), size, interpolation)
    with torch.no_grad():
        logits, targets = model((images / 255 - mean) / std), torch.tensor(targets)
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    return loss, (logits.argmax(1) == targets).float().mean().item()


# ---------------------------------------------------------------- results and files


def test_result_line_history_and_checkpoint(trained, tree):
    result, rows, checkpoint = trained.json, history(trained.folder), load_pt(trained.model)
    assert list(rows[0]) == FIELDS and [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert result["model"] == str(trained.model) and result["arch"] == "resnet18" and result["epochs"] == 4
    best = rows[result["best_epoch"] - 1]
    assert float(best["val_acc"]) == max(float(row["val_acc"]) for row in rows)
    for split in ("train", "val", "test"):
        assert result[f"{split}_acc"] == float(best[f"{split}_acc"])
    assert result["test_acc"] >= 0.9
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[0]["lr"]) == 0.01 and float(rows[-1]["lr"]) < float(rows[0]["lr"])
    assert checkpoint["classes"] == ["blue", "green", "red"]
    preprocessing = {"size": 32, "resize": "squish", "interpolation": "bilinear"}
    preprocessing |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert checkpoint["preprocessing"] == preprocessing
    assert checkpoint["args"]["epochs"] == 4 and checkpoint["args"]["data"] == str(tree)
    options = {"data", "out", "epochs", "lr", "arch", "weights", "image_size", "device", "precision"}
    assert set(checkpoint["args"]["changed"]) == options and checkpoint["args"]["changed"]["epochs"] == "4"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", checkpoint["date"])
    assert "torch" in checkpoint["versions"] and checkpoint["temperature"] > 0
    assert checkpoint["metrics"]["measured"] == {"train": 60, "val": 24, "test": 30}
    for split in ("train", "val"):
        hashes = {hashlib.sha256(path.read_bytes()).digest()[:8] for path in (tree / split).glob("*/*.png")}
        assert set(map(bytes, checkpoint[f"{split}_hashes"].tolist())) == hashes
    torchvision.models.resnet18(num_classes=3).load_state_dict(checkpoint["state_dict"])


def test_saved_model_is_the_measured_one(trained, tree):
    for split in ("train", "val", "test"):
        loss, accuracy = measure(trained.model, tree / split)
        metrics = load_pt(trained.model)["metrics"]
        assert accuracy == pytest.approx(metrics[f"{split}_acc"])
        assert loss == pytest.approx(metrics[f"{split}_loss"], abs=1e-4)


def test_frozen_backbone_does_not_change(run, tree, tmp_path):
    """Not one bit, BatchNorm statistics included."""
    torch.manual_seed(1)
    before = torchvision.models.mobilenet_v3_small().state_dict()
    torch.save(before, tmp_path / "weights.pth")
    args = ["--epochs", 2, "--arch", "mobilenet_v3_small", "--weights", tmp_path / "weights.pth", "--image-size", 32]
    run("train", "--data", tree, "--out", tmp_path / "out", *args)
    after = load_pt(tmp_path / "out" / "model.pt")["state_dict"]
    assert after.keys() == before.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == ["classifier.3.weight", "classifier.3.bias"]


def test_same_seed_gives_the_same_weights(run, trained, tree, tmp_path):
    args = ["--data", tree, "--epochs", 4, "--lr", 0.01, *SMALL]
    run("train", *args, "--out", tmp_path / "again")
    run("train", *args, "--out", tmp_path / "other", "--seed", 1)
    assert same_model(trained.folder, tmp_path / "again")
    assert not same_model(trained.folder, tmp_path / "other")


def test_without_val_nothing_is_selected(run, tree, tmp_path):
    shutil.copytree(tree / "train", tmp_path / "data" / "train")
    args = ["--data", tmp_path / "data", "--out", tmp_path / "out", *SMALL]
    for option in ("--tune", "--patience"):
        message = run("train", *args, option, 3, code=2).error[0]
        assert option in message and "no val/" in message
    assert run("train", *args, "--seeds", 2, "--epochs", 2).json["test_acc"] is None


# ---------------------------------------------------------------- architectures and weights


SLOW_ARCHITECTURES = {
    "googlenet": 64,
    "inception_v3": 96,
    "maxvit_t": 224,
    "vit_b_32": 224,
    "convnext_tiny": 64,
    "vgg11": 64,
}


@pytest.mark.parametrize(
    "arch, size",
    [
        ("mnasnet0_5", 64),
        ("densenet121", 64),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_ARCHITECTURES.items()),
    ],
)
def test_unusual_architectures(run, tmp_path, arch, size):
    """Trained, saved, loaded by plain torchvision, and evaluated from pixels: the accuracies agree."""
    data, out = make_tree(tmp_path / "data", counts=(("train", 6), ("test", 4))), tmp_path / "out"
    args = ["--epochs", 3, "--arch", arch, "--weights", "none", "--image-size", size]
    result = run("train", "--data", data, "--out", out, *args).json
    checkpoint = load_pt(out / "model.pt")
    torchvision.models.get_model(arch, **checkpoint["model_kwargs"]).load_state_dict(checkpoint["state_dict"])
    assert result["val_acc"] is None and result["best_epoch"] == 3 and checkpoint["temperature"] == 1
    measured = run("evaluate", "--checkpoint", out / "model.pt", "--data", data).json
    assert measured["accuracy"] == pytest.approx(result["test_acc"])
    assert measured["loss"] == pytest.approx(float(history(out)[-1]["test_loss"]), abs=2e-3)


def test_own_checkpoint_as_weights(run, trained, tmp_path):
    """A model.pt is a starting point: its classifier, for other classes, is dropped, its preprocessing is kept."""
    data = make_tree(tmp_path / "two", classes=["blue", "red"])
    args = ["--data", data, "--epochs", 1, "--arch", "resnet18"]
    run("train", *args, "--out", tmp_path / "out", "--weights", trained.model)
    new, old = load_pt(tmp_path / "out" / "model.pt"), load_pt(trained.model)
    assert new["classes"] == ["blue", "red"] and new["preprocessing"] == old["preprocessing"]
    key = "layer4.1.conv2.weight"
    assert torch.equal(new["state_dict"][key], old["state_dict"][key])
    torch.save(old["state_dict"], tmp_path / "plain.pth")
    run("train", *args, "--out", tmp_path / "plain", "--weights", tmp_path / "plain.pth", "--image-size", 32)
    assert equal_tensors(new["state_dict"], load_pt(tmp_path / "plain" / "model.pt")["state_dict"])


def test_resize_modes(run, trained, tmp_path):
    """Images that are not square are squished by default; a model.pt without the key, of an older version, crops."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        for name, (left, right) in {"a": ("red", "blue"), "b": ("blue", "red")}.items():
            (data / split / name).mkdir(parents=True)
            for number in range(6):
                image = tile((90, 90, 90), f"{split}{name}{number}", (96, 32))
                image.paste(left, (0, 0, 32, 32))
                image.paste(right, (64, 0, 96, 32))  # the center square shows no class
                image.save(data / split / name / f"{number}.png")
    args = ["--data", data, "--epochs", 20, "--lr", 0.02, "--augment", "none", *SMALL]
    whole = run("train", *args, "--out", tmp_path / "whole").json
    cropped = run("train", *args, "--out", tmp_path / "crop", "--resize", "crop").json
    assert whole["val_acc"] == 1 and cropped["val_acc"] < 0.9
    content = load_pt(tmp_path / "crop" / "model.pt")
    assert content["preprocessing"].pop("resize") == "crop"
    torch.save(content, tmp_path / "old.pt")
    results = [
        run("evaluate", "--checkpoint", model, "--data", data, "--split", "val", "--out", tmp_path / "report").json
        for model in (tmp_path / "crop" / "model.pt", tmp_path / "old.pt")
    ]
    assert results[0]["loss"] == results[1]["loss"] and results[0]["accuracy"] == cropped["val_acc"]
    args = ["--data", data, "--epochs", 1, "--arch", "resnet18", "--weights", tmp_path / "old.pt"]
    for options, expected in (([], "crop"), (["--resize", "squish"], "squish")):
        run("train", *args, "--out", tmp_path / "next", *options)
        assert load_pt(tmp_path / "next" / "model.pt")["preprocessing"]["resize"] == expected


def test_pretrained_googlenet_keeps_its_input_scale(run, tree, tmp_path):
    """ImageNet weights set transform_input, which is not in a state dict."""
    torch.save(torchvision.models.googlenet(init_weights=False).state_dict(), tmp_path / "googlenet.pth")
    args = ["--arch", "googlenet", "--weights", tmp_path / "googlenet.pth", "--image-size", 64]
    run("train", "--data", tree, "--out", tmp_path / "out", "--epochs", 1, *args)
    kwargs = load_pt(tmp_path / "out" / "model.pt")["model_kwargs"]
    assert kwargs == {"num_classes": 3, "aux_logits": False, "transform_input": True}


def test_weights_that_do_not_fit(run, trained, tree, tmp_path):
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({1: 2}, tmp_path / "numbers.pth")
    more = torchvision.models.resnet18().state_dict() | {"extra.weight": torch.zeros(1)}
    torch.save(more, tmp_path / "more.pth")
    for file, words in (
        ("numbers.pth", "by name"),
        ("other.pth", "conv1.weight (missing)"),
        ("other.pth", "it looks like mobilenet_v3_small"),
        ("list.pth", "a list"),
        ("text.pth", "damaged"),
        ("more.pth", "extra.weight (unknown)"),
        (trained.model, "--arch resnet18"),
    ):
        arch = "resnet50" if file == trained.model else "resnet18"
        args = ["--arch", arch, "--weights", tmp_path / file]
        message = run("train", "--data", tree, "--out", tmp_path / "out", *args, code=2).error[0]
        assert words in message and str(tmp_path / file) in message


def test_failed_download_is_an_error(tree, tmp_path):
    """Without a network the default weights are an error that names both ways out; nothing else replaces them."""
    unreachable = {"https_proxy": "http://127.0.0.1:0", "http_proxy": "http://127.0.0.1:0"}
    env = {"PATH": "", "HOME": str(tmp_path), "TORCH_HOME": str(tmp_path), **unreachable}
    done = command("train", "--data", tree, "--out", tmp_path / "out", env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    for words in ("cannot download", "resnet50-0676ba61.pth", "--weights FILE", "--weights none"):
        assert words in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- interrupted runs


def test_resumed_run_gives_the_same_model(run, run_interrupted, trained, tree, tmp_path):
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(tree, data)
    args = ["--data", data, "--epochs", 4, "--lr", 0.01, *SMALL, "--out", out]
    run_interrupted(2, *args)
    assert names(out) == ["history.csv", "last.pt"]
    message = run("train", *args, code=2).error[0]
    assert "--resume" in message and "--restart" in message
    assert "lr was 0.01, is 0.02" in run("train", *args, "--resume", "--lr", 0.02, code=2).error[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # they decide how sums are split, and so the last bits
    try:
        assert f"threads was {threads}, is {threads + 1}" in run("train", *args, "--resume", code=2).error[0]
    finally:
        torch.set_num_threads(threads)
    first, second, extra = (data / "train" / "red" / name for name in ("red 0.png", "red 1.png", "more.png"))
    shutil.copy(first, extra)
    assert "images was" in run("train", *args, "--resume", code=2).error[0]
    extra.unlink()
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert "images was" in run("train", *args, "--resume", code=2).error[0]
    first.write_bytes(content)
    assert "resumed after epoch 2" in run("train", *args, "--resume").err
    assert same_model(out, trained.folder)
    rows, expected = (
        [{key: value for key, value in row.items() if key != "seconds"} for row in history(folder)]
        for folder in (out, trained.folder)
    )
    assert rows == expected
    assert "nothing to resume" in run("train", *args, "--resume").err


def test_state_of_an_unfinished_run(run, run_interrupted, tree, tmp_path):
    """The fields of last.pt; that of an unfinished run of another version is refused, of a finished one ignored."""
    out = tmp_path / "out"
    args = ["--data", tree, "--out", out, "--epochs", 3, *SMALL]
    run_interrupted(2, *args)
    state = load_pt(out / "last.pt")
    head = {"format": "training run", "version": 4}
    fields = {"settings", "completed", "run", "optimizer", "weights", "finished"}
    assert state.keys() == head.keys() | fields and state | head == state
    assert (state["completed"], state["finished"]) == ([], False)
    assert state["run"].keys() == {"hparams", "seed", "history", "best"} and len(state["run"]["history"]) == 2
    torch.save(state | {"version": 3}, out / "last.pt")  # the order of the optimizer's parameters was another
    message = run("train", *args, "--resume", code=2).error[0]
    assert "last.pt" in message and "version" in message and "--restart" in message
    for *parents, name, value in (
        ("optimizer", "state", 0, "exp_avg", torch.zeros(1, 1)),  # was a segmentation fault
        ("optimizer", "state", {0: {}}),
        ("optimizer", "state", {5: state["optimizer"]["state"][0]}),
        ("weights", "1.weight", torch.zeros(3, 3)),
        ("run", "best", "weights", {}),
        ("run", "best", "row", "val_loss", "low"),
        ("run", "best", "temperature", 0.0),
        ("run", "hparams", "lr", -1.0),
        ("run", "history", []),
        ("run", "seed", 7),
        ("completed", [{}]),
        ("settings", "seeds", torch.zeros(3)),
        ("settings", "seed", "x"),
        ("run", None),
        ("version", torch.zeros(3)),
    ):
        altered = target = copy.deepcopy(state)
        for parent in parents:
            target = target[parent]
        target[name] = value
        torch.save(altered, out / "last.pt")
        message = run("train", *args, "--resume", code=2).error[0]
        assert "last.pt is damaged; discard it with --restart" in message, (parents, name)
    torch.save({"format": "training run", "version": 1, "finished": True}, out / "last.pt")
    assert run("train", *args).json["epochs"] == 3
    assert load_pt(out / "last.pt").keys() == {"format", "version", "settings", "finished"}


def test_restart_discards_the_unfinished_run(run, run_interrupted, tree, tmp_path, monkeypatch):
    """A restart that ends before its first epoch does not bring the discarded run back; one refused keeps the run."""
    import train

    def interrupt(*_):
        raise KeyboardInterrupt

    args = ["--data", tree, "--epochs", 4, *SMALL, "--out", tmp_path / "out"]
    run_interrupted(1, *args)
    (tmp_path / "out" / ".report.abc_1234.tmp").mkdir()  # of a killed evaluation with the same --out
    (tmp_path / "out" / ".model.pt.0123abcd.tmp").touch()
    run("train", *args, "--restart", "--weights", tmp_path / "missing.pth", code=2)
    assert load_pt(tmp_path / "out" / "last.pt")["finished"] is False
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", interrupt)
        assert "in place of --restart" in run("train", *args, "--restart", "--lr", 0.02, code=130).err
    result = run("train", *args, "--lr", 0.02, "--resume")
    assert "nothing to resume" in result.err and result.json["epochs"] == 4
    assert not (tmp_path / "out" / ".model.pt.0123abcd.tmp").exists()


def test_another_network_is_not_resumed(run, run_interrupted, tree, tmp_path):
    weights = tmp_path / "weights.pth"
    args = ["--data", tree, "--arch", "resnet18", "--image-size", 32, "--weights", weights, "--out", tmp_path / "out"]
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    run_interrupted(1, *args)
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    assert "network and libraries was" in run("train", *args, "--resume", code=2).error[0]


@pytest.mark.parametrize("mode", ["head", pytest.param("last", marks=pytest.mark.slow)])
def test_signals_end_the_run(tree, tmp_path, mode):
    """SIGTERM and SIGINT: the exit code, how to continue, last.pt of the last complete epoch, and nothing else."""
    out, done = tmp_path / "out", 0
    args = ["--data", tree, "--out", out, "--epochs", 9999, "--finetune", mode, *TINY, "--resume"]
    line = [str(part) for part in (sys.executable, ROOT / "train.py", *args)]
    # A shell that started the tests in the background has them ignore SIGINT.
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    options["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(line, **options)
        lines = [""]
        while f"epoch {done + 3}/" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        process.send_signal(number)
        lines += process.stderr.readlines()
        assert process.wait() == code and "--resume" in lines[-2] and "interrupted" in lines[-1], "".join(lines)
        before, done = done, len(load_pt(out / "last.pt")["run"]["history"])
        assert done >= before + 2 and (not before or f"resumed after epoch {before}\n" in "".join(lines))
        assert [int(row["epoch"]) for row in history(out)] in (list(range(1, done + 1)), list(range(1, done + 2)))
        assert names(out) == ["history.csv", "last.pt"]


def test_second_run_in_the_same_folder_is_refused(run, tree, tmp_path):
    from common import hold_lock

    with hold_lock(tmp_path / "out" / ".lock"):
        result = run("train", "--data", tree, "--out", tmp_path / "out", *SMALL, code=75)
        assert ".lock" in result.error[0] and "Traceback" not in result.err
        # The lock is taken before anything is read.
        run("train", "--data", tmp_path / "missing", "--out", tmp_path / "out", *SMALL, code=75)
    assert not (tmp_path / "out").exists()
    inside = run("train", "--data", tree, "--out", tree / "train" / "red", "--tune", 2, *SMALL, code=2).error[0]
    assert "would replace or be inside" in inside  # where its pictures would be images of the next run


# ---------------------------------------------------------------- the feature cache


def test_features_are_found_by_content(run, tree, tmp_path):
    """Moved and renamed images are found, edited ones are not; the result is the same as without a cache."""
    data = tmp_path / "data"
    shutil.copytree(tree, data)
    args = ["--data", data, "--epochs", 2, "--augment", "flip", "--cache", tmp_path / "cache", *SMALL]
    assert f"the cache {tmp_path / 'cache'} holds" in run("train", *args, "--out", tmp_path / "first").err
    assert "222 remembered" in run("train", *args, "--out", tmp_path / "second").err
    run("train", *args, "--out", tmp_path / "without", "--no-cache")
    assert same_model(tmp_path / "first", tmp_path / "second") and same_model(tmp_path / "first", tmp_path / "without")
    (data / "train" / "red" / "red 0.png").rename(data / "train" / "red" / "x.png")
    (data / "test" / "red" / "red 1.png").rename(data / "val" / "red" / "moved.png")
    tile((190, 40, 40), "edited").save(data / "train" / "red" / "red 2.png")
    messages = run("train", *args, "--out", tmp_path / "third").err
    assert "221 remembered" in messages and "3 to compute" in messages
    messages = run("train", *args, "--out", tmp_path / "fourth", "--precision", "bf16").err
    assert "remembered in" not in messages  # no features of another precision
    result = run("train", *args, "--out", tmp_path / "fifth", "--image-size", 48, "--epochs", 8, "--lr", 0.01)
    assert "remembered in" not in result.err and result.json["test_acc"] > 0.9


def test_features_do_not_depend_on_what_the_cache_knows(run, tree, tmp_path):
    """The last bits of this network depend on the size of a batch: a cache that a part of the tree has filled."""
    shutil.copytree(tree, tmp_path / "part")
    for file in [*(tmp_path / "part").rglob("* [1-5].png"), *(tmp_path / "part").rglob("green 1?.png")]:
        file.unlink()
    args = ["--epochs", 1, *SMALL, "--arch", "regnet_y_400mf"]
    cached = [*args, "--cache", tmp_path / "cache"]
    run("train", "--data", tmp_path / "part", "--out", tmp_path / "first", *cached)
    messages = run("train", "--data", tree, "--out", tmp_path / "warm", *cached).err
    assert "remembered" in messages and ", 0 to compute" not in messages
    run("train", "--data", tree, "--out", tmp_path / "cold", *args, "--no-cache")
    assert same_model(tmp_path / "warm", tmp_path / "cold")


def test_damaged_cache_is_a_warning(run, tree, tmp_path):
    cache = tmp_path / "cache"
    args = ["--data", tree, "--epochs", 1, "--cache", cache, *SMALL]
    run("train", *args, "--out", tmp_path / "first")
    (file,) = cache.glob("*/*.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (file.parent / "foreign.pt").write_text("not ours")
    result = run("train", *args, "--out", tmp_path / "second")
    assert f"ignored {file}" in result.err and "foreign.pt" in result.err
    assert "114 remembered" in run("train", *args, "--out", tmp_path / "third").err
    assert (file.parent / "foreign.pt").read_text() == "not ours"
    assert same_model(tmp_path / "first", tmp_path / "second")


def test_without_a_home_there_is_no_cache(run, tree, tmp_path, monkeypatch):
    """Not among the temporary files either, where others could put features into it."""

    def no_home():
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    args = ["--data", tree, "--epochs", 1, *TINY, "--out", tmp_path / "out"]
    assert "remembered" not in run("train", *args).err + run("train", *args).err


def test_cache_is_bounded_and_may_be_unwritable(run, tree, tmp_path):
    cache = tmp_path / "cache"
    args = ["--data", tree, "--epochs", 1, *SMALL]
    for seed in (0, 1):
        limit = ["--cache", cache, "--cache-limit", 0.0003]
        run("train", *args, "--seed", seed, "--out", tmp_path / str(seed), *limit)
    files = list(cache.glob("*/*.pt"))
    assert len(files) == 1 and sum(file.stat().st_size for file in files) <= 3e5
    (cache / "mine").mkdir()
    (cache / "mine" / "model.pt").write_text("in the folder of the cache, but not a part of it")
    run("train", *args, "--cache", cache, "--out", tmp_path / "2", "--cache-limit", 1e-9)
    assert (cache / "mine" / "model.pt").exists() and not list(cache.glob("?" * 32 + "/*.pt"))
    (tmp_path / "file").write_text("not a folder")
    result = run("train", *args, "--cache", tmp_path / "file" / "cache", "--out", tmp_path / "out")
    assert "not remembered" in result.err and result.json["epochs"] == 1


def test_many_small_files_are_joined(run, tmp_path):
    """As after nightly runs that each add a few images. Nothing is forgotten, and foreign files stay."""
    data, cache = make_tree(tmp_path / "data", counts=(("train", 4),)), tmp_path / "cache"
    args = ["--data", data, "--epochs", 1, "--cache", cache, *SMALL]
    for number in range(22):
        run("train", *args, "--out", tmp_path / "out", "--restart")
        tile((190, 40, 40), f"night {number}").save(data / "train" / "red" / f"new {number}.png")
        (folder,) = cache.iterdir()
        (folder / "foreign.pt").write_text("not ours")
    assert len(list(folder.iterdir())) <= 3 and (folder / "foreign.pt").exists()
    assert f"{12 + 21} remembered in {cache}, 1 to compute" in run("train", *args, "--out", tmp_path / "out").err


def test_interrupted_feature_pass_continues(run, tree, tmp_path, monkeypatch):
    import common

    compute_features = common.compute_features

    def stop_after_three_batches(*args):
        for number, result in enumerate(compute_features(*args)):
            if number == 3:
                raise KeyboardInterrupt
            yield result

    args = ["--data", tree, "--epochs", 1, "--cache", tmp_path / "cache", "--out", tmp_path / "out", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(common, "compute_features", stop_after_three_batches)
        run("train", *args, code=130)
    assert "48 remembered" in run("train", *args).err


def test_features_beyond_memory_are_mapped(run, trained, tree, tmp_path, monkeypatch):
    import common

    monkeypatch.setattr(common, "MEMORY_SHARE", 0)
    result = run("train", "--data", tree, "--epochs", 4, "--lr", 0.01, *SMALL, "--out", tmp_path / "out")
    assert "mapped from disk" in result.err
    assert same_model(tmp_path / "out", trained.folder) and names(tmp_path / "out") == FILES


# ---------------------------------------------------------------- training options


def test_without_weight_decay_the_optimizer_is_adam(run, trained, tree, tmp_path, monkeypatch):
    optimizers = []

    def make_adam(*args, **kwargs):
        optimizers.append(torch.optim.Adam(*args, **kwargs))
        return optimizers[-1]

    monkeypatch.setattr(torch.optim, "AdamW", make_adam)
    run("train", "--data", tree, "--out", tmp_path / "adam", "--epochs", 4, "--lr", 0.01, *SMALL)
    assert optimizers and not any(group["weight_decay"] for group in optimizers[0].param_groups)
    adam, adamw = (load_pt(folder / "model.pt")["state_dict"] for folder in (tmp_path / "adam", trained.folder))
    for key in ("fc.weight", "fc.bias"):
        assert torch.allclose(adam[key], adamw[key], rtol=0, atol=1e-7)


def test_training_options_have_their_effects(run, similar_tree, tmp_path):
    args = ["--data", similar_tree, "--epochs", 6, "--lr", 0.02, *SMALL]
    options = {"plain": [], "decay": ["--weight-decay", 1], "warm": ["--warmup", 3]}
    options["smooth"] = ["--label-smoothing", 0.3]
    norm, loss = {}, {}
    for name, extra in options.items():
        run("train", *args, "--out", tmp_path / name, *extra)
        norm[name] = load_pt(tmp_path / name / "model.pt")["state_dict"]["fc.weight"].norm().item()
        loss[name] = float(history(tmp_path / name)[-1]["train_loss"])
    assert norm["decay"] < norm["plain"] and loss["smooth"] > 1.5 * loss["plain"]
    rates = [float(row["lr"]) for row in history(tmp_path / "warm")]
    assert rates[0] < rates[1] < rates[2] < rates[3] == 0.02 > rates[4] > rates[5]


def test_patience_and_time_limit(run, similar_tree, tmp_path):
    args = ["--data", similar_tree, *SMALL]
    result = run("train", *args, "--epochs", 400, "--lr", 0.3, "--patience", 3, "--out", tmp_path / "patience").json
    assert result["epochs"] == result["best_epoch"] + 3 < 400
    start, out = time.monotonic(), tmp_path / "minutes"
    result = run("train", *args, "--epochs", 1000000, "--max-minutes", 0.06, "--out", out).json
    rows = history(out)
    assert time.monotonic() - start < 20 and 1 < len(rows) == result["epochs"] < 1000000
    assert float(rows[-1]["lr"]) < 0.2 * float(rows[0]["lr"])  # the cosine ends near 0, though epochs were left out
    result = run("train", *args, "--epochs", 50, "--max-minutes", 1e-6, "--out", tmp_path / "none").json
    assert result["epochs"] == 1 and (tmp_path / "none" / "model.pt").exists()


def test_class_imbalance(run, tmp_path):
    """Red is rare and looks like blue: there is a warning, and balanced weights find more of it."""
    data = make_tree(tmp_path / "data", counts=(("train", 30), ("val", 12), ("test", 12)))
    for split, count in (("train", 30), ("val", 12), ("test", 12)):
        for number in range(count):
            path = data / split / "red" / f"red {number}.png"
            tile((50, 40, 170), f"{split} hard {number}").save(path)
            if split == "train" and number >= 3:
                path.unlink()
    args = ["--data", data, "--epochs", 3, "--seed", 1, *SMALL]
    plain = run("train", *args, "--out", tmp_path / "plain")
    assert "imbalanced" in plain.err and "30 blue, 30 green, 3 red" in plain.err
    balanced = run("train", *args, "--out", tmp_path / "balanced", "--class-weights", "balanced")
    assert "imbalanced" not in balanced.err
    recall = {}
    for name in ("plain", "balanced"):
        model = ["--checkpoint", tmp_path / name / "model.pt"]
        rows = csv.DictReader(run("predict", *model, data / "test" / "red", "--format", "csv").out.splitlines())
        recall[name] = sum(row["class"] == "red" for row in rows) / 12
    assert recall["balanced"] > recall["plain"]
    again = run("train", *args, "--out", tmp_path / "balanced", "--class-weights", "balanced", "--only-if-better")
    best = re.findall(r"calibrated val loss ([\d.]+)  best so far", again.err)[-1]  # with the class weights
    assert f"{again.json['val_loss_calibrated']:.4f}" == best == f"{again.json['old_val_loss_calibrated']:.4f}"


def test_views_are_used_in_training(run, tmp_path):
    """Mirrored, left is right: a data set that is easy without views cannot be learned with them."""
    for split in ("train", "val"):
        for name in ("left", "right"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(12):
                image = Image.new("RGB", (32, 32), (random.Random(f"{split}{name}{number}").randrange(60),) * 3)
                image.paste((220, 220, 220), (0, 0, 16, 32) if name == "left" else (16, 0, 32, 32))
                image.save(tmp_path / "data" / split / name / f"{number}.png")
    args = ["--data", tmp_path / "data", "--epochs", 20, "--lr", 0.01, *SMALL]
    for augment, low, high in (("none", 0, 0.2), ("flip", 0.45, 9)):
        run("train", *args, "--out", tmp_path / augment, "--augment", augment)
        assert low <= float(history(tmp_path / augment)[-1]["val_loss"]) < high


@pytest.mark.parametrize(
    "finetune, augment, turns", [("head", "flip", 1), pytest.param("all", "dihedral", 4, marks=pytest.mark.slow)]
)
def test_tta_averages_the_views_of_the_training(run, trained, similar_tree, tmp_path, finetune, augment, turns):
    from common import InferenceModel, list_split, preprocess, read_checkpoint, read_image

    args = ["--data", similar_tree, "--epochs", 2, "--augment", augment, *SMALL, "--finetune", finetune]
    run("train", *args, "--out", tmp_path / "out")
    args = ["--checkpoint", tmp_path / "out" / "model.pt", "--precision", "fp32"]
    checkpoint = read_checkpoint(args[1])
    model = InferenceModel(checkpoint, torch.device("cpu"), "fp32")

    def averaged(split):
        paths, _, targets = list_split(similar_tree / split)
        pixels = preprocess([read_image(path) for path in paths], checkpoint.preprocessing)
        views = [view.rot90(turn, (-2, -1)) for view in (pixels, pixels.flip(-1)) for turn in range(turns)]
        probabilities = [model.forward_head(model.forward_features(view)).softmax(1) for view in views]
        return (sum(probabilities) / len(views)).log(), torch.tensor(targets)

    logits, targets = averaged("val")
    losses = []
    for factor in (0.95, 1, 1.05):
        temperature = factor * checkpoint.temperature_tta
        prior = math.log(temperature) ** 2 / (2 * 0.5**2 * len(targets))
        losses.append(torch.nn.functional.cross_entropy(logits / temperature, targets) + prior)
    assert losses[1] < min(losses[0], losses[2])
    logits, targets = averaged("test")
    expected = (logits / checkpoint.temperature_tta).softmax(1)
    measured = run("evaluate", *args, "--data", similar_tree, "--tta", "--out", tmp_path / "report").json
    assert measured["accuracy"] == pytest.approx((expected.argmax(1) == targets).float().mean().item())
    confidence = [float(row["probability"]) for row in read_csv(tmp_path / "report" / "predictions.csv")]
    assert confidence == pytest.approx(expected.amax(1).tolist(), abs=1e-5)
    lines = run("predict", *args, similar_tree / "test", "--tta", "--format", "jsonl").out.splitlines()
    assert [json.loads(line)["probability"] for line in lines] == pytest.approx(confidence, abs=1e-5)
    for script, rest in (("evaluate", ["--data", similar_tree]), ("predict", [similar_tree / "test"])):
        assert "--augment" in run(script, "--checkpoint", trained.model, *rest, "--tta", code=2).error[0]


def test_bf16_agrees_with_fp32(run, tree, tmp_path):
    args = ["--data", tree, "--epochs", 4, "--lr", 0.01, *SMALL, "--precision", "bf16"]
    result = run("train", *args, "--out", tmp_path / "out").json
    args = ["--checkpoint", tmp_path / "out" / "model.pt", "--data", tree]
    bf16, fp32 = (run("evaluate", *args, "--precision", precision).json for precision in ("bf16", "fp32"))
    assert bf16["accuracy"] == result["test_acc"]
    assert fp32["accuracy"] == pytest.approx(result["test_acc"], abs=0.07)
    assert fp32["loss"] == pytest.approx(bf16["loss"], abs=0.05)


def test_default_epochs_depend_on_the_data(run, similar_tree, tmp_path):
    """72 images in batches of 8 are 9 steps: 56 epochs make 500, and 128,000 images would be 1,778 epochs."""
    args = ["--data", similar_tree, *TINY]
    result = run("train", *args, "--batch-size", 8, "--out", tmp_path / "head")
    assert result.json["epochs"] == 56 and "--epochs 56 by default: 500 steps" in result.err
    assert load_pt(tmp_path / "head" / "model.pt")["args"]["lr"] == 1e-3
    result = run("train", *args, "--finetune", "all", "--max-minutes", 1e-6, "--out", tmp_path / "all")
    assert "--epochs 100 by default: 128,000 images" in result.err and "--backbone-lr 0.0003 by default" in result.err
    chosen = load_pt(tmp_path / "all" / "model.pt")["args"]
    assert (chosen["epochs"], chosen["lr"], chosen["backbone_lr"], chosen["warmup"]) == (100, 3e-4, 3e-4, None)
    assert (chosen["augment"], load_pt(tmp_path / "head" / "model.pt")["args"]["augment"]) == ("flip", "none")

    import common
    import train

    without_norm = common.Network("none", {}, {}, torch.nn.Linear(2, 2))
    args = train.parse_args(["--finetune", "all"])
    dataset = train.Dataset(["a", "b"], {"train": common.Split(["x"] * 3000, torch.zeros(3000), [""] * 3000)})
    args = train.with_defaults(args, dataset, without_norm)
    assert (args.epochs, args.lr, args.backbone_lr, args.warmup) == (43, 5e-5, 5e-5, None)


def test_same_image_in_two_splits_is_a_warning(run, tmp_path):
    data = make_tree(tmp_path / "data", counts=(("train", 6), ("val", 4), ("test", 4)))
    shutil.copy(data / "train" / "red" / "red 0.png", data / "val" / "red" / "twin.png")
    shutil.copy(data / "train" / "red" / "red 0.png", data / "test" / "blue" / "twin.png")
    shutil.copy(data / "train" / "red" / "red 1.png", data / "test" / "red" / "other.png")
    log = run("train", "--data", data, "--out", tmp_path / "out", "--epochs", 1, *SMALL).err
    for text in ("1 of 13 images of val are also in train", "2 of 14 images of test are also in train", "1 of 14"):
        assert text in log
    assert f"{data / 'val' / 'red' / 'twin.png'} = {data / 'train' / 'red' / 'red 0.png'}" in log


# ---------------------------------------------------------------- search and repetition


def test_tune_chooses_the_best_configuration_on_val(run, similar_tree, tmp_path):
    """tune.csv has every configuration; that of the command line gets the result of a training alone."""
    args = ["--data", similar_tree, "--epochs", 4, "--lr", 0.01, *SMALL]
    alone = run("train", *args, "--out", tmp_path / "alone").json
    result = run("train", *args, "--out", tmp_path / "tuned", "--tune", 12)
    tuned, log = result.json, result.err
    assert "val has only 90 images: even 100% correct may mean a true 96%" in log
    assert "val has too few images (90) to tell the best from the others: its accuracy is" in log
    assert "edge of the range" not in log
    rows = read_csv(tmp_path / "tuned" / "tune.csv")
    assert len(rows) == 12 and not any("test" in name for name in rows[0])
    (winner,) = [row for row in rows if row["winner"] == "1"]
    assert float(winner["val_loss_calibrated"]) == min(float(row["val_loss_calibrated"]) for row in rows)
    assert int(rows[0]["best_epoch"]) == alone["best_epoch"]
    assert float(rows[0]["val_acc"]) == pytest.approx(alone["val_acc"])
    best = history(tmp_path / "alone")[alone["best_epoch"] - 1]
    assert float(rows[0]["val_loss"]) == pytest.approx(float(best["val_loss"]), rel=1e-3)
    assert len({row["lr"] for row in rows}) == 12 and len({row["epochs"] for row in rows}) > 1
    checkpoint = load_pt(tmp_path / "tuned" / "model.pt")
    for name in ("lr", "weight_decay", "label_smoothing", "epochs"):
        assert checkpoint["args"][name] == pytest.approx(float(winner[name])) == tuned["tuned"][name]
    assert len(history(tmp_path / "tuned")) == int(winner["epochs"])
    with Image.open(tmp_path / "tuned" / "tune.png") as picture:
        assert min(picture.size) > 300


def test_diverging_configuration_is_just_the_worst(run, similar_tree, tmp_path):
    args = ["--epochs", 2, "--lr", 3e34, "--tune", 8, *SMALL]
    run("train", "--data", similar_tree, "--out", tmp_path / "out", *args)
    rows = read_csv(tmp_path / "out" / "tune.csv")
    finite = [math.isfinite(float(row["val_loss"])) for row in rows]
    assert not all(finite) and finite[[row["winner"] for row in rows].index("1")]
    args[3], args[5] = 1e-7, 12  # the largest is still too small
    (tmp_path / "slow" / "report").mkdir(parents=True)
    result = run("train", "--data", similar_tree, "--out", tmp_path / "slow", *args)
    assert f"{tmp_path / 'slow' / 'report'} is the report of an earlier model" in result.err
    changed = load_pt(tmp_path / "slow" / "model.pt")["args"]["changed"]
    assert changed["tune"] == "12" and changed["lr"] == result.json["tuned"]["lr"]
    assert "the best lies at the edge of the range of --lr" in result.err


def test_seeds_are_like_single_runs(run, similar_tree, random_weights, tmp_path):
    args = ["--data", similar_tree, "--epochs", 3, *SMALL, "--weights", random_weights]
    together = run("train", *args, "--seeds", 3, "--out", tmp_path / "all")
    single = [run("train", *args, "--seed", seed, "--out", tmp_path / str(seed)).json for seed in range(3)]
    for split in ("val", "test"):
        values = [result[f"{split}_acc"] for result in single]
        assert together.json[f"{split}_acc_mean"] == pytest.approx(statistics.mean(values))
        assert together.json[f"{split}_acc_std"] == pytest.approx(statistics.stdev(values))
    assert "±" in together.err and together.json["seeds"] == 3
    assert sum(same_model(tmp_path / "all", tmp_path / str(seed)) for seed in range(3)) == 1
    assert len(history(tmp_path / "all")) == 3


def test_seeds_are_resumed(run, run_interrupted, similar_tree, tmp_path):
    args = ["--data", similar_tree, "--epochs", 8, "--seeds", 3, "--tune", 3, *SMALL]
    expected = run("train", *args, "--out", tmp_path / "expected").json
    epochs = expected["tuned"]["epochs"]
    run_interrupted(epochs + 1, *args, "--out", tmp_path / "out")
    state = load_pt(tmp_path / "out" / "last.pt")
    assert [len(content["history"]) for content in (*state["completed"], state["run"])] == [epochs, 1]
    resumed = run("train", *args, "--out", tmp_path / "out", "--resume")
    assert "resumed after epoch" in resumed.err and "tuned:" not in resumed.err
    ignored = {"seconds": 0, "model": 0, "history": 0}
    assert {**resumed.json, **ignored} == {**expected, **ignored}
    assert same_model(tmp_path / "out", tmp_path / "expected")


# ---------------------------------------------------------------- fine-tuning


def changed_parts(before, after):
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


def test_finetune_trains_the_chosen_parts(run, similar_tree, random_weights, tmp_path):
    """All parts or the last stage, never BatchNorm statistics; the reported accuracy is that of the saved model."""
    before = load_pt(random_weights)
    args = ["--data", similar_tree, *SMALL, "--weights", random_weights, "--epochs", 2, "--augment", "flip"]
    parts = {"all": "conv1 bn1 layer1 layer2 layer3 layer4 fc".split(), "last": ["layer4", "fc"]}
    for mode in ("all", "last"):
        # A network of random weights, without BatchNorm statistics of its own, needs a low rate.
        result = run("train", *args, "--finetune", mode, "--backbone-lr", 1e-5, "--out", tmp_path / mode)
        after = load_pt(tmp_path / mode / "model.pt")
        assert changed_parts(before, after["state_dict"]) == set(parts[mode])
        assert all(torch.equal(before[key], after["state_dict"][key]) for key in before if "running_" in key)
        assert after["metrics"]["alpha"] == result.json["alpha"] > 0
        assert f"the classifier alone, {after['metrics']['head_epochs']} epochs" in result.err
        assert f"fine-tuning {', '.join(parts[mode][:-1])}:" in result.err
        assert "the classifier alone" in result.err and len(history(tmp_path / mode)) == 2
        loss, accuracy = measure(tmp_path / mode / "model.pt", similar_tree / "test")
        assert accuracy == pytest.approx(result.json["test_acc"])
        assert loss == pytest.approx(after["metrics"]["test_loss"], abs=1e-4)
    frozen = run("train", *args, "--out", tmp_path / "frozen").json
    best_frozen = history(tmp_path / "frozen")[frozen["best_epoch"] - 1]
    assert float(history(tmp_path / "all")[-1]["val_loss"]) < float(best_frozen["val_loss"])  # the network has learned


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", pytest.param("vit_b_32", marks=pytest.mark.slow)])
def test_finetune_last_of_other_architectures(run, tmp_path, arch):
    data = make_tree(tmp_path / "data", counts=(("train", 3),))
    args = ["--epochs", 1, "--arch", arch, "--weights", "none", "--image-size", 64, "--finetune", "last"]
    run("train", "--data", data, "--out", tmp_path / "out", *args)
    checkpoint = load_pt(tmp_path / "out" / "model.pt")
    torchvision.models.get_model(arch, **checkpoint["model_kwargs"]).load_state_dict(checkpoint["state_dict"])


def test_finetune_is_repeatable_and_resumable(run, run_interrupted, similar_tree, tmp_path):
    args = ["--data", similar_tree, "--epochs", 3, "--finetune", "last", "--augment", "dihedral", "strong", *TINY]
    args += ["--label-smoothing", 0.1, "--batch-size", 16]
    expected = run("train", *args, "--out", tmp_path / "expected").json
    args += ["--out", tmp_path / "out"]
    run_interrupted(2, *args)
    assert "--resume" in run("train", *args, code=2).error[0]
    assert "backbone_lr was" in run("train", *args, "--resume", "--backbone-lr", 1e-3, code=2).error[0]
    resumed = run("train", *args, "--resume")
    assert "resumed after epoch 2" in resumed.err
    assert same_model(tmp_path / "out", tmp_path / "expected")
    assert resumed.json["test_acc"] == expected["test_acc"] and len(history(tmp_path / "out")) == 3


def test_images_beyond_memory_are_read_in_each_epoch(run, similar_tree, tmp_path, monkeypatch):
    """From memory or from disk: the same pixels, the same model."""
    import common

    args = ["--data", similar_tree, "--epochs", 2, "--finetune", "last", "--augment", "flip", *TINY]
    run("train", *args, "--out", tmp_path / "memory")
    monkeypatch.setattr(common, "MEMORY_SHARE", 1e-7)
    run("train", *args, "--out", tmp_path / "disk")
    assert same_model(tmp_path / "memory", tmp_path / "disk")


def test_finetuning_never_ends_worse_than_the_classifier_alone(run, similar_tree, random_weights, tmp_path):
    """A rate that destroys the network: the weights before fine-tuning are saved, with their own accuracy."""
    args = ["--data", similar_tree, *SMALL, "--weights", random_weights, "--epochs", 2, "--finetune", "all"]
    result = run("train", *args, "--backbone-lr", 0.3, "--out", tmp_path / "out")
    (line,) = [line for line in result.err.splitlines() if "from the classifier alone" in line]
    losses = dict(re.findall(r"([\d.]+): ([\d.]+)", line))
    assert list(losses) == ["0", "0.25", "0.5", "0.75", "1"] and result.json["alpha"] == 0
    assert float(losses["0"]) == min(map(float, losses.values()))
    again = run("train", *args, "--backbone-lr", 0.3, "--lr", 1e-6, "--out", tmp_path / "again")
    assert f"fine-tuned (1): 0: {losses['0']}, " in again.err  # --lr is not the rate of the classifier alone
    checkpoint, before = load_pt(tmp_path / "out" / "model.pt"), load_pt(random_weights)
    assert changed_parts(before, checkpoint["state_dict"]) == {"fc"}
    loss, accuracy = measure(tmp_path / "out" / "model.pt", similar_tree / "test")
    assert accuracy == pytest.approx(result.json["test_acc"])
    assert loss == pytest.approx(checkpoint["metrics"]["test_loss"], abs=1e-4)


def test_interpolated_weights(run, similar_tree, random_weights, tmp_path, monkeypatch):
    """Half of the way from the network before fine-tuning to the fine-tuned one is the mean of their weights."""
    import train

    args = ["--data", similar_tree, *SMALL, "--weights", random_weights, "--epochs", 2, "--finetune", "last"]
    weights, count = {}, itertools.count()
    monkeypatch.setattr(train, "selection_key", lambda epoch: next(count))  # the last that is measured is the best
    for alpha in (0, 0.5, 1):
        monkeypatch.setattr(train, "ALPHAS", (alpha,) if alpha < 1 else ())
        result = run("train", *args, "--out", tmp_path / str(alpha)).json
        assert result["alpha"] == alpha
        weights[alpha] = load_pt(tmp_path / str(alpha) / "model.pt")["state_dict"]
    for key, half in weights[0.5].items():
        mean = (weights[0][key] + weights[1][key]) / 2
        assert torch.allclose(half.float(), mean.float(), atol=1e-5), key
    assert changed_parts(weights[0], weights[1]) == {"layer4", "fc"}


def test_finetuning_measures_test_now_and_then(run, similar_tree, tmp_path, monkeypatch):
    """Every third of 11 epochs, the last and the saved one; val in each, and train on a sample."""
    import train

    monkeypatch.setattr(train, "TRAIN_SAMPLE", 30)
    args = ["--data", similar_tree, *TINY, "--epochs", 11, "--finetune", "last"]
    result = run("train", *args, "--out", tmp_path / "out").json
    rows = history(tmp_path / "out")
    measured = [int(row["epoch"]) for row in rows if row["test_acc"]]
    assert measured == sorted({3, 6, 9, 11, result["best_epoch"]})
    assert all(row["val_acc"] and row["train_acc"] for row in rows)
    assert load_pt(tmp_path / "out" / "model.pt")["metrics"]["measured"] == {"train": 24, "val": 90, "test": 90}


@pytest.mark.slow
def test_finetune_trains_attention(run, tmp_path):
    """Torchvision's attention reads the weights of its submodules without calling them: they are trained, too."""
    data = make_tree(tmp_path / "data", counts=(("train", 6),))
    torch.manual_seed(0)
    torch.save(torchvision.models.swin_t().state_dict(), tmp_path / "w.pth")
    args = ["--arch", "swin_t", "--weights", tmp_path / "w.pth", "--image-size", 64, "--finetune", "last"]
    run("train", "--data", data, "--out", tmp_path / "out", "--epochs", 1, *args)
    before, after = load_pt(tmp_path / "w.pth"), load_pt(tmp_path / "out" / "model.pt")["state_dict"]
    stage = [key for key in before if key.startswith("features.7") and before[key].is_floating_point()]
    assert stage and not [key for key in stage if torch.equal(before[key], after[key])]
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("features.5"))


def test_random_network_learns_batchnorm_statistics(run, tmp_path):
    data = make_tree(tmp_path / "data", counts=(("train", 6),))
    args = ["--epochs", 3, "--finetune", "all", *TINY]
    assert run("train", "--data", data, "--out", tmp_path / "out", *args).json["epochs"] == 3
    state = load_pt(tmp_path / "out" / "model.pt")["state_dict"]
    assert not torch.equal(state["conv1.1.running_var"], torch.ones(24))


def test_out_of_memory_suggests_a_batch_size(run, similar_tree, tmp_path, monkeypatch):
    import train

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.FineTuner, "forward", fail)
    args = ["--finetune", "all", "--batch-size", 48, *TINY]
    message = run("train", "--data", similar_tree, "--out", tmp_path / "out", *args, code=2).error[0]
    assert "--batch-size 24" in message and "48 images of 32 pixels" in message


# ---------------------------------------------------------------- --audit


def test_audit_finds_wrong_labels_and_near_duplicates(run, tree, tmp_path):
    """Wrong labels come first, with the right class; near-duplicates are in other splits; the data stay as they are."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(tree, data)
    wrong = {}
    for split, name, number, other in (
        ("train", "red", 3, "blue"),
        ("train", "green", 5, "red"),
        ("val", "blue", 2, "green"),
    ):
        path = data / split / other / f"wrong {number}.png"
        (data / split / name / f"{name} {number}.png").rename(path)
        wrong[str(path.relative_to(data))] = (split, other, name)
    copy = data / "test" / "red" / "copy.png"
    image = Image.open(data / "train" / "red" / "red 7.png")
    image.putpixel((3, 3), (0, 0, 0))
    image.save(copy)
    shutil.copy(data / "train" / "red" / "red 8.png", data / "test" / "red" / "equal.png")
    before = stamps(data)
    args = ["--epochs", 5, "--cache", tmp_path / "cache", *SMALL]
    result = run("train", "--data", data, "--out", out, "--audit", *args)
    assert "remembered" not in result.err  # audit and training share one pass
    rows = read_csv(out / "audit.csv")
    found = {row["path"]: (row["split"], row["class"], row["suggested"]) for row in rows[:3]}
    assert found == wrong and all(float(row["probability_of_suggested"]) > 0.5 for row in rows[:3])
    margins = [float(row["probability_of_suggested"]) - float(row["probability_of_class"]) for row in rows]
    assert margins == sorted(margins, reverse=True) and result.json["suspicious_labels"] == sum(
        row["suspicious"] == "1" for row in rows
    )
    pairs = read_csv(out / "duplicates.csv")
    assert (pairs[0]["path"], pairs[0]["other_path"]) == ("train/red/red 7.png", "test/red/copy.png")
    assert (pairs[0]["split"], pairs[0]["other_split"]) == ("train", "test")
    assert not [pair for pair in pairs if "equal.png" in pair["other_path"] and "red 8.png" in pair["path"]]
    assert result.json["near_duplicates"] == len(pairs) < 10 and "the data are unchanged" in result.err
    assert stamps(data) == before and {"audit.png", "duplicates.png", "model.pt"} <= set(names(out))
    run("train", "--data", data, "--out", tmp_path / "plain", "--epochs", 5, *SMALL)
    assert same_model(out, tmp_path / "plain")


def test_audit_needs_no_val_or_test(run, tmp_path):
    data = make_tree(tmp_path / "data", counts=(("train", 6),))
    result = run("train", "--data", data, "--out", tmp_path / "out", "--epochs", 1, "--audit", *SMALL).json
    assert (result["suspicious_labels"], result["near_duplicates"]) == (0, 0)
    assert names(tmp_path / "out") == ["audit.csv", "duplicates.csv", *FILES]


# ---------------------------------------------------------------- --only-if-better


def test_only_if_better(run, similar_tree, tmp_path, monkeypatch):
    """The old model stays, with its history and exit code 5, unless the new one's calibrated val loss is as low."""
    out = tmp_path / "out"
    args = ["--data", similar_tree, "--out", out, "--only-if-better", *SMALL]
    first = run("train", *args, "--epochs", 8, "--lr", 0.01).json
    assert (first["kept_old"], first["old_val_acc"]) == (False, None) and len(history(out)) == 8
    before = {name: (out / name).read_bytes() for name in ("model.pt", "history.csv")}
    worse = run("train", *args, "--epochs", 1, "--lr", 1e-9, code=5)
    assert (worse.json["kept_old"], worse.json["old_val_acc"]) == (True, first["val_acc"])
    assert worse.json["val_loss_calibrated"] > worse.json["old_val_loss_calibrated"]
    assert "90 remembered" in worse.err and "the old model is kept" in worse.err  # both models have the same backbone
    assert re.search(r"new minus old: -[\d.]+ points \(95% interval -[\d.]+ to [+-][\d.]+\)", worse.err)
    with monkeypatch.context() as patch, pipe_without_reader() as pipe:
        patch.setattr(sys, "stdout", pipe)
        assert "the old model is kept" in run("train", *args, "--epochs", 1, "--lr", 1e-9, code=5).error[0]
    assert {name: (out / name).read_bytes() for name in before} == before and load_pt(out / "last.pt")["finished"]
    again = run("train", *args, "--epochs", 8, "--lr", 0.01).json
    assert (again["kept_old"], again["old_val_acc"], again["val_acc"]) == (False, first["val_acc"], first["val_acc"])
    assert again["val_loss_calibrated"] == again["old_val_loss_calibrated"]
    tuned = run("train", *args, "--epochs", 2, "--finetune", "last", code=None).json
    assert tuned["old_val_acc"] == first["val_acc"]
    old, new = tuned["old_val_loss_calibrated"], tuned["val_loss_calibrated"]
    assert old == again["val_loss_calibrated"] != new and tuned["kept_old"] == (new > old)


def test_only_if_better_after_another_split(run, tree, tmp_path):
    """Val images on which the old model was trained are left out; if these are the most, there is no comparison."""
    data, out = tmp_path / "data", tmp_path / "out"
    run("prepare_data", "--source", tree / "train", "--out", data, "--val", 0.2, "--test", 0.1)
    args = ["--data", data, "--out", out, "--only-if-better", "--epochs", 2, *SMALL]
    run("train", *args)
    known = set(load_pt(out / "model.pt")["train_hashes"].view(torch.int64).flatten().tolist())
    train_images = sorted((data / "train").glob("*/*"))
    for number, path in enumerate(train_images[:6]):  # of 6 + 12 images of val, the old model was trained on 6
        path.rename(data / "val" / path.parent.name / path.name)
    result = run("train", *args, code=None)
    log = result.err
    assert (12 * result.json["new_val_acc"]).is_integer() and (12 * result.json["old_val_acc"]).is_integer()
    assert "was trained on 6 of the 18 images of val, which are left out" in log and "on 12 images of val" in log
    shutil.rmtree(out)
    run("train", *args)
    before = (out / "model.pt").read_bytes()
    run("prepare_data", "--source", tree / "train", "--out", data, "--val", 0.2, "--test", 0.1, "--force", "--seed", 1)
    message = run("train", *args, code=2).error[0]
    assert "too many for a comparison" in message and "--only-if-better" in message
    assert (out / "model.pt").read_bytes() == before and len(known) == 42


def test_finetuned_weights_remember_their_images(run, tree, similar_tree, tmp_path):
    """A network fine-tuned on other images, then used as --weights, has seen those too; a frozen one has not."""
    seen = {}
    for mode in ("all", "head"):
        run("train", "--data", tree, "--out", tmp_path / mode, "--finetune", mode, "--epochs", 1, *TINY)
        args = ["--data", similar_tree, "--epochs", 1, *TINY, "--weights", tmp_path / mode / "model.pt"]
        run("train", *args, "--out", tmp_path / "next")
        seen[mode] = len(load_pt(tmp_path / "next" / "model.pt")["train_hashes"])
    assert seen == {"all": 60 + 72, "head": 72}


def test_only_if_better_needs_comparable_models(run, tree, trained, tmp_path):
    """Other classes or no val are errors before any work; another backbone, size or order of classes is not."""
    out = tmp_path / "out"
    shutil.copytree(trained.folder, out)
    args = ["--out", out, "--only-if-better", "--epochs", 1, *SMALL]
    classes = make_tree(tmp_path / "classes", counts=(("train", 4), ("val", 4)), classes=["red", "green"])
    message = run("train", "--data", classes, *args, code=2).error[0]
    assert "class blue" in message and "model.pt" in message
    grown = make_tree(tmp_path / "grown", counts=(("train", 4), ("val", 4)))
    for split in ("train", "val"):
        shutil.copytree(grown / split / "red", grown / split / "purple")
    result = run("train", "--data", grown, *args)
    assert "does not know the class purple, so the new model replaces it" in result.err
    assert result.json["kept_old"] is False and "purple" in load_pt(out / "model.pt")["classes"]
    without_val = make_tree(tmp_path / "unmeasured", counts=(("train", 4),))
    assert "no val/" in run("train", "--data", without_val, *args, code=2).error[0]
    content, order = load_pt(trained.model), [2, 0, 1]
    content["classes"] = [content["classes"][index] for index in order]
    content["state_dict"] |= {key: content["state_dict"][key][order] for key in ("fc.weight", "fc.bias")}
    content["preprocessing"]["size"] = 48
    torch.save(content, out / "model.pt")
    _, accuracy = measure(out / "model.pt", tree / "val")
    assert run("train", "--data", tree, *args, code=None).json["old_val_acc"] == pytest.approx(accuracy)
    (out / "model.pt").write_bytes(b"damaged")
    assert "model.pt is damaged" in run("train", "--data", tree, *args, "--restart", code=2).error[0]


# ---------------------------------------------------------------- wrong input


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: remove(data), "no such folder"),
        (lambda data: remove(data / "train"), "no train/"),
        (lambda data: [remove(path) for path in (data / "train").iterdir()], "no class folders"),
        (lambda data: [remove(path) for name in ("red", "blue") for path in data.glob(f"*/{name}")], "one class"),
        (lambda data: (data / "train" / "empty").mkdir(), "empty"),
        (lambda data: shutil.copytree(data / "test" / "red", data / "test" / "purple"), "purple"),
        (lambda data: (data / "val" / "red" / "bad.jpg").write_bytes(b"not an image"), "bad.jpg"),
    ],
)
def test_bad_trees(run, tree, tmp_path, damage, words):
    data = tmp_path / "data"
    shutil.copytree(tree, data)
    damage(data)
    assert words in run("train", "--data", data, "--out", tmp_path / "new" / "out", *SMALL, code=2).error[0]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "1" + 21 * "0"], "--batch-size"),
        (["--epoch", "10"], "did you mean --epochs?"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--arch", "resnet5"], "resnet50"),
        (["--arch", "squeezenet1_1"], "SqueezeNet"),
        (["--device", "tpu"], "tpu"),
        (["--device", "cuda:99"], "not available"),
        (["--weights", "IMAGENET1K_V9"], "IMAGENET1K_V1"),
        (["--weights", "MobileNet_V2_Weights.IMAGENET1K_V1"], "IMAGENET1K_V1"),
        (["--weights", "no/such.pth"], "no/such.pth"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--arch", "densenet121", "--image-size", "1"], "--image-size 1"),
        (["--arch", "vit_b_16", "--image-size", "200"], "--image-size 200"),
        (["--image-size", "5000"], "--image-size 5000"),
        (["--resume", "--restart"], "--resume and --restart"),
        (["--augment", "strong"], "--finetune"),
        (["--augment", "flip", "dihedral"], "choose one"),
        (["--backbone-lr", "1e-3"], "--finetune last or all"),
        (["--finetune", "all", "--batch-size", "1"], "--batch-size"),
        (["--finetune", "all", "--tune", "4"], "--finetune head"),
        (["--finetune", "last", "--seeds", "2"], "--finetune head"),
    ],
)
def test_bad_arguments(run, tree, tmp_path, argv, words):
    assert words in run("train", "--data", tree, "--out", tmp_path / "out", *SMALL, *argv, code=2).error[0]
    assert not (tmp_path / "out").exists()


def test_loss_that_is_not_finite_is_an_error(run, tree, similar_tree, tmp_path):
    args = ["--data", tree, *SMALL]
    high = run("train", "--data", similar_tree, *SMALL, "--out", tmp_path / "high", "--epochs", 1, "--lr", 1000)
    assert "warning: the loss is far above that of guessing, 1.10: lower --lr" in high.err
    message = run("train", *args, "--out", tmp_path / "out", "--lr", 1e37, code=2).error[0]
    assert "lower --lr" in message and "epoch 1" in message and "1e+37" in message
    one_step = ["--lr", 1e38, "--epochs", 1, "--batch-size", 500]  # it shows only after the last step of all
    message = run("train", *args, "--out", tmp_path / "last", *one_step, code=2).error[0]
    assert "the loss became" in message and "lower --lr" in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "last").exists()
    weights = torchvision.models.resnet18().state_dict()
    weights["layer4.1.conv2.weight"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    args = ["--data", tree, "--arch", "resnet18", "--image-size", 32, "--weights", tmp_path / "nan.pth"]
    assert "not finite" in run("train", *args, "--out", tmp_path / "out", code=2).error[0]


def test_unwritable_output(run, tree, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "file" in run("train", "--data", tree, "--out", tmp_path / "file" / "out", *SMALL, code=2).error[0]


def test_help_needs_no_library():
    """--help answers at once, because it imports neither torch nor matplotlib."""
    for script in ("prepare_data", "train", "evaluate", "predict"):
        line = [sys.executable, "-X", "importtime", ROOT / f"{script}.py", "--help"]
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
        assert done.returncode == 0 and "example:" in done.stdout and "exit codes:" in done.stdout
        imported = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
        assert "argparse" in imported and not imported & {"torch", "torchvision", "matplotlib", "numpy"}, script


def test_list_archs(run):
    expected = torchvision.models.list_models(module=torchvision.models)
    assert run("train", "--list-archs").out.split() == [name for name in expected if "squeezenet" not in name]


def test_wrong_option_of_a_command():
    done = command("train", "--epochs", 0)
    usage, message = done.stderr.splitlines()
    assert (
        done.returncode == 2 and not done.stdout and "--epochs" in message and usage == "usage: train.py [--epochs N]"
    )


# ---------------------------------------------------------------- real data, and the benchmarks


@pytest.mark.slow
def test_real_weights_on_real_tiles(run, tmp_path):
    """ImageNet's mobilenet_v2 on 40 EuroSAT tiles of each class, at 96 pixels: far above chance."""
    data, out = tmp_path / "data", tmp_path / "out"
    with zipfile.ZipFile(real("eurosat", "EuroSAT.zip")) as archive:
        tiles = [name for name in archive.namelist() if name.endswith(".jpg")]
        archive.extractall(tmp_path / "source", [name for name in tiles if int(name.rsplit("_", 1)[1][:-4]) <= 40])
    run("prepare_data", "--source", tmp_path / "source", "--out", data)
    args = ["--arch", "mobilenet_v2", "--image-size", 96, "--epochs", 10]
    weights = real("weights", "mobilenet_v2_imagenet.pth")
    result = run("train", "--data", data, "--out", out, *args, "--weights", weights).json
    assert result["test_acc"] > 0.55
    measured = run("evaluate", "--checkpoint", out / "model.pt", "--data", data).json
    assert measured["accuracy"] == pytest.approx(result["test_acc"], abs=0.013)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, options, words",
    [
        ("pass", ["--images", 16], "pass / bare"),
        ("cache", [], "images changed"),
        ("compare", ["--epochs", 1], "notebook / warm"),
        ("fewshot", ["--shots", 2, "--draws", 2], "2 images per class"),
        ("finetune", ["--images", 16, "--image-size", 32, "--augment", "dihedral strong"], "training / random"),
        ("predict", ["--images", 16], "one image"),
        ("mosaic", [], "cells correct"),
    ],
)
def test_benchmarks_run(trained, tree, tmp_path, what, options, words):
    line = [sys.executable, ROOT / "tests" / "benchmark.py", what, "--data", tree, "--arch", "resnet18", "--rounds", 1]
    line += [*options, "--checkpoint", trained.model]
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
