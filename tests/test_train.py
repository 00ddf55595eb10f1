"""train.py: the three files it writes, what it learns, what it leaves alone, what it refuses."""
import csv
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
import torchvision
from conftest import ROOT, SMALL, command, make_tree, real, tile
from PIL import Image

FIELDS = ["epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc", "seconds"]


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def load(path):
    return torch.load(path, weights_only=True)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights_file(folder):
    """A ResNet-18 of random weights as w.pth, so that runs with different seeds share their backbone."""
    torch.manual_seed(5)
    torch.save(torchvision.models.resnet18().state_dict(), folder / "w.pth")
    return folder / "w.pth"


def interrupt_after(monkeypatch, epochs):
    """Have the run end as by Ctrl-C once last.pt has been written so many times."""
    import train
    real_save, calls = train.save_last, []

    def die(*positional, **state):
        real_save(*positional, **state)
        calls.append(1)
        if len(calls) == epochs:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_last", die)


@pytest.fixture(scope="session")
def hard_train(tmp_path_factory):
    """Three classes of which two are hard to tell apart: no model is without mistakes."""
    data = make_tree(tmp_path_factory.mktemp("hard") / "data", counts=(("train", 24), ("val", 30), ("test", 30)))
    for split, count in (("train", 24), ("val", 30), ("test", 30)):
        for number in range(count):
            for name, red in (("red", 105), ("blue", 95)):
                shade = red + random.Random(f"{split}{name}{number}").randrange(-12, 12)
                tile((shade, 40, 100), f"hard {split}{name}{number}").save(data / split / name / f"{name} {number}.png")
    return data


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_result_line_history_and_checkpoint(trained, tree):
    result, rows, checkpoint = trained.json, history(trained.folder), load(trained.model)
    assert list(rows[0]) == FIELDS and [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert result["model"] == str(trained.model) and result["arch"] == "resnet18" and result["epochs"] == 4
    best = rows[result["best_epoch"] - 1]
    right = [row for row in rows if float(row["val_acc"]) == 1]  # of epochs without a mistake, that with the lowest loss is best
    assert float(best["val_loss"]) == min(float(row["val_loss"]) for row in right)
    for split in ("train", "val", "test"):
        assert result[f"{split}_acc"] == float(best[f"{split}_acc"])
    assert result["test_acc"] >= 0.9
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[0]["lr"]) == 0.01 and float(rows[-1]["lr"]) < float(rows[0]["lr"])
    assert checkpoint["classes"] == ["blue", "green", "red"]
    assert checkpoint["preprocessing"] == {"size": 32, "interpolation": "bilinear", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert checkpoint["args"]["epochs"] == 4 and checkpoint["args"]["data"] == str(tree) and "torch" in checkpoint["versions"]
    assert checkpoint["temperature"] > 0
    torchvision.models.resnet18(num_classes=3).load_state_dict(checkpoint["state_dict"])


def test_saved_model_is_what_was_measured(trained, tree):
    """Plain torchvision, from pixels, in the plain layout, repeats the accuracies of the best epoch: folding changed nothing."""
    from common import preprocess, read_image, read_split
    checkpoint = load(trained.model)
    model = torchvision.models.get_model(checkpoint["arch"], **checkpoint["model_kwargs"]).eval()
    model.load_state_dict(checkpoint["state_dict"])
    mean, std = (torch.tensor(checkpoint["preprocessing"][k]).view(3, 1, 1) for k in ("mean", "std"))
    for split in ("train", "val", "test"):
        paths, _, targets = read_split(tree / split)
        images = torch.stack([(preprocess(read_image(p), 32, "bilinear") / 255 - mean) / std for p in paths])
        with torch.no_grad():
            logits = model(images)
        assert (logits.argmax(1) == torch.tensor(targets)).float().mean().item() == pytest.approx(checkpoint["metrics"][f"{split}_acc"])
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets)).item()
        assert loss == pytest.approx(checkpoint["metrics"][f"{split}_loss"], abs=1e-4)


def test_frozen_means_frozen(run, tree, tmp_path):
    """Not one bit of the backbone changes, BatchNorm statistics included."""
    torch.manual_seed(1)
    before = torchvision.models.mobilenet_v3_small().state_dict()
    torch.save(before, tmp_path / "weights.pth")
    run("train", "--data", tree, "--out", tmp_path / "out", "--epochs", 2, "--arch", "mobilenet_v3_small", "--weights", tmp_path / "weights.pth",
        "--image-size", 32)
    after = load(tmp_path / "out" / "model.pt")["state_dict"]
    assert after.keys() == before.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == ["classifier.3.weight", "classifier.3.bias"]


def test_seed_repeats_to_the_bit(run, trained, tree, tmp_path):
    run("train", "--data", tree, "--out", tmp_path / "again", "--epochs", 4, "--lr", 0.01, *SMALL)
    run("train", "--data", tree, "--out", tmp_path / "other", "--epochs", 4, "--lr", 0.01, "--seed", 1, *SMALL)
    first, again, other = (load(folder / "model.pt") for folder in (trained.folder, tmp_path / "again", tmp_path / "other"))
    assert same(first["state_dict"], again["state_dict"]) and first["temperature"] == again["temperature"]
    assert not same(first["state_dict"], other["state_dict"])


@pytest.mark.parametrize("arch, size", [("squeezenet1_1", 64), ("googlenet", 64), ("inception_v3", 96), ("maxvit_t", 224), ("vit_b_32", 224),
                                        ("densenet121", 64), ("convnext_tiny", 64), ("vgg11", 64), ("mnasnet0_5", 64)])
def test_odd_architectures(run, tmp_path, arch, size):
    """Trained, saved, loaded by plain torchvision, evaluated from pixels: the accuracies agree."""
    data = make_tree(tmp_path / "data", counts=(("train", 6), ("test", 4)))
    result = run("train", "--data", data, "--out", tmp_path / "out", "--epochs", 3, "--arch", arch, "--weights", "none", "--image-size", size).json
    checkpoint = load(tmp_path / "out" / "model.pt")
    torchvision.models.get_model(arch, **checkpoint["model_kwargs"]).load_state_dict(checkpoint["state_dict"])
    assert result["val_acc"] is None and result["best_epoch"] == 3 and checkpoint["temperature"] == 1
    measured = run("evaluate", "--checkpoint", tmp_path / "out" / "model.pt", "--data", data).json
    assert measured["accuracy"] == pytest.approx(result["test_acc"])
    assert measured["loss"] == pytest.approx(float(history(tmp_path / "out")[-1]["test_loss"]), abs=2e-3)


def test_weights_of_our_own_and_of_another_class_count(run, trained, tree, tmp_path):
    """A model.pt is a starting point; its classifier, for other classes, is left out, and its preprocessing comes along."""
    data = make_tree(tmp_path / "two", classes=["blue", "red"])
    run("train", "--data", data, "--out", tmp_path / "out", "--epochs", 1, "--arch", "resnet18", "--weights", trained.model)
    ours, theirs = load(tmp_path / "out" / "model.pt"), load(trained.model)
    assert ours["classes"] == ["blue", "red"] and ours["preprocessing"] == theirs["preprocessing"]
    assert torch.equal(ours["state_dict"]["layer4.1.conv2.weight"], theirs["state_dict"]["layer4.1.conv2.weight"])
    torch.save(theirs["state_dict"], tmp_path / "plain.pth")
    run("train", "--data", data, "--out", tmp_path / "out2", "--epochs", 1, "--arch", "resnet18", "--weights", tmp_path / "plain.pth", "--image-size", 32)
    assert same(ours["state_dict"], load(tmp_path / "out2" / "model.pt")["state_dict"])


def test_pretrained_inception_expects_its_own_input_scale(run, tree, tmp_path):
    """transform_input is set by ImageNet weights and is no part of a state dict."""
    torch.save(torchvision.models.googlenet(init_weights=False).state_dict(), tmp_path / "googlenet.pth")
    run("train", "--data", tree, "--out", tmp_path / "out", "--epochs", 1, "--arch", "googlenet", "--weights", tmp_path / "googlenet.pth", "--image-size", 64)
    assert load(tmp_path / "out" / "model.pt")["model_kwargs"] == {"num_classes": 3, "aux_logits": False, "transform_input": True}


def test_restart_discards_for_good(run, tree, tmp_path, monkeypatch):
    """A restart that is stopped before its first epoch does not bring back the run that it discarded; a wrong argument costs nothing."""
    import train
    args = ["--data", tree, "--epochs", 4, *SMALL, "--out", tmp_path / "out"]
    real_save, real_fit = train.save_last, train.fit

    def die(*positional, **state):
        real_save(*positional, **state)
        raise KeyboardInterrupt

    def die_at_once(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_last", die)
    run("train", *args, code=130)
    run("train", *args, "--restart", "--weights", tmp_path / "ghost.pth", code=2)
    assert load(tmp_path / "out" / "last.pt")["finished"] is False
    monkeypatch.setattr(train, "fit", die_at_once)
    assert "in place of --restart" in run("train", *args, "--restart", "--lr", 0.02, code=130).err
    monkeypatch.undo()
    assert train.fit is real_fit
    result = run("train", *args, "--lr", 0.02, "--resume")
    assert "nothing to resume" in result.err and result.json["epochs"] == 4


def test_resume_ends_as_if_never_stopped(run, trained, tree, tmp_path, monkeypatch):
    import train
    out = tmp_path / "out"
    args = ["--data", tree, "--epochs", 4, "--lr", 0.01, *SMALL, "--out", out]
    real_save = train.save_last

    def die(*positional, **state):
        real_save(*positional, **state)
        if len(state["history"]) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_last", die)
    run("train", *args, code=130)
    monkeypatch.undo()
    assert not (out / "model.pt").exists()
    error, = run("train", *args, code=2).error
    assert "--resume" in error and "--restart" in error
    assert "lr was 0.01, is 0.02" in run("train", *args, "--resume", "--lr", 0.02, code=2).error[0]
    extra = tree / "train" / "red" / "more.png"
    shutil.copy(tree / "train" / "red" / "red 0.png", extra)
    assert "images was" in run("train", *args, "--resume", code=2).error[0]
    extra.unlink()
    whole = (tree / "train" / "red" / "red 0.png").read_bytes()
    (tree / "train" / "red" / "red 0.png").write_bytes((tree / "train" / "red" / "red 1.png").read_bytes())
    assert "images was" in run("train", *args, "--resume", code=2).error[0]
    (tree / "train" / "red" / "red 0.png").write_bytes(whole)
    assert "resumed after epoch 2" in run("train", *args, "--resume").err
    assert same(load(out / "model.pt")["state_dict"], load(trained.model)["state_dict"])
    drop = [[{k: v for k, v in row.items() if k != "seconds"} for row in history(folder)] for folder in (out, trained.folder)]
    assert drop[0] == drop[1]
    assert "nothing to resume" in run("train", *args, "--resume").err


def test_features_are_remembered_by_content(run, tree, tmp_path):
    """Moved and renamed images are known, edited ones are not; the result is the same as without a cache."""
    data = tmp_path / "data"
    shutil.copytree(tree, data)
    args = ["--data", data, "--epochs", 2, "--augment", "flip", "--cache", tmp_path / "cache", *SMALL]
    assert f"the cache {tmp_path / 'cache'} holds" in run("train", *args, "--out", tmp_path / "first").err
    assert "222 remembered" in run("train", *args, "--out", tmp_path / "second").err
    run("train", *args, "--out", tmp_path / "without", "--no-cache")
    first, second, without = (load(tmp_path / name / "model.pt")["state_dict"] for name in ("first", "second", "without"))
    assert same(first, second) and same(first, without)
    (data / "train" / "red" / "red 0.png").rename(data / "train" / "red" / "x.png")
    (data / "test" / "red" / "red 1.png").rename(data / "val" / "red" / "moved.png")
    tile((190, 40, 40), "edited").save(data / "train" / "red" / "red 2.png")
    assert "221 remembered" in (err := run("train", *args, "--out", tmp_path / "third").err) and "3 to compute" in err
    changed = run("train", *args, "--out", tmp_path / "fourth", "--precision", "bf16").err
    assert "to compute" not in changed  # nothing is known of another precision
    result = run("train", *args, "--out", tmp_path / "fifth", "--image-size", 48, "--epochs", 8, "--lr", 0.01)
    assert "to compute" not in result.err and result.json["test_acc"] > 0.9


def test_tune_trains_side_by_side_and_chooses_on_val(run, trained, hard_train, tmp_path):
    """The table has every configuration, the winner is the best on val, and the one of the arguments does as it does alone."""
    args = ["--data", hard_train, "--epochs", 4, "--lr", 0.01, *SMALL]
    alone = run("train", *args, "--out", tmp_path / "alone").json
    tuned = run("train", *args, "--out", tmp_path / "tuned", "--tune", 12).json
    rows = read_csv(tmp_path / "tuned" / "tune.csv")
    assert len(rows) == 12 and [row["winner"] for row in rows].count("1") == 1 and not any("test" in name for name in rows[0])
    winner = next(row for row in rows if row["winner"] == "1")
    assert float(winner["val_loss_calibrated"]) == min(float(row["val_loss_calibrated"]) for row in rows)
    assert int(rows[0]["best_epoch"]) == alone["best_epoch"] and float(rows[0]["val_acc"]) == pytest.approx(alone["val_acc"])
    best = history(tmp_path / "alone")[alone["best_epoch"] - 1]
    assert float(rows[0]["val_loss"]) == pytest.approx(float(best["val_loss"]), rel=1e-3)
    assert len({row["lr"] for row in rows}) == 12 and len({row["epochs"] for row in rows}) > 1
    checkpoint = load(tmp_path / "tuned" / "model.pt")
    for name in ("lr", "weight_decay", "label_smoothing", "epochs"):
        assert checkpoint["args"][name] == pytest.approx(float(winner[name])) == tuned["tuned"][name]
    assert len(history(tmp_path / "tuned")) == int(winner["epochs"])
    with Image.open(tmp_path / "tuned" / "tune.png") as picture:
        assert min(picture.size) > 300


def test_heads_of_a_conv_classifier_train_side_by_side(run, hard_train, tmp_path):
    run("train", "--data", hard_train, "--out", tmp_path / "out", "--epochs", 2, "--arch", "squeezenet1_1", "--weights", "none", "--image-size", 64,
        "--tune", 3)
    rows = read_csv(tmp_path / "out" / "tune.csv")
    assert len({row["val_loss"] for row in rows}) == 3


def test_a_diverging_configuration_is_just_the_worst(run, hard_train, tmp_path):
    run("train", "--data", hard_train, "--out", tmp_path / "out", "--epochs", 2, "--lr", 3e34, "--tune", 8, *SMALL)
    rows = read_csv(tmp_path / "out" / "tune.csv")
    finite = [math.isfinite(float(row["val_loss"])) for row in rows]
    assert not all(finite) and finite[[row["winner"] for row in rows].index("1")]  # squares of 1e34 times a weight decay overflow


def test_seeds_are_the_runs_one_would_make_one_by_one(run, hard_train, tmp_path):
    args = ["--data", hard_train, "--epochs", 3, *SMALL]
    together = run("train", *args, "--weights", weights_file(tmp_path), "--seeds", 3, "--out", tmp_path / "all")
    single = [run("train", *args, "--weights", tmp_path / "w.pth", "--seed", seed, "--out", tmp_path / str(seed)).json for seed in range(3)]
    for split in ("val", "test"):
        values = [result[f"{split}_acc"] for result in single]
        assert together.json[f"{split}_acc_mean"] == pytest.approx(statistics.mean(values))
        assert together.json[f"{split}_acc_std"] == pytest.approx(statistics.stdev(values))
    assert "±" in together.err and together.json["seeds"] == 3
    saved = load(tmp_path / "all" / "model.pt")["state_dict"]
    assert sum(same(saved, load(tmp_path / str(seed) / "model.pt")["state_dict"]) for seed in range(3)) == 1
    assert len(history(tmp_path / "all")) == 3


def test_seeds_resume_in_the_middle(run, hard_train, tmp_path, monkeypatch):
    args = ["--data", hard_train, "--epochs", 3, "--seeds", 3, "--tune", 3, *SMALL]
    whole = run("train", *args, "--out", tmp_path / "whole").json
    interrupt_after(monkeypatch, 2)
    run("train", *args, "--out", tmp_path / "out", code=130)
    monkeypatch.undo()
    again = run("train", *args, "--out", tmp_path / "out", "--resume")
    assert "resumed after epoch" in again.err and "tuned:" not in again.err
    assert {**again.json, "seconds": 0, "model": 0, "history": 0} == {**whole, "seconds": 0, "model": 0, "history": 0}
    assert same(load(tmp_path / "out" / "model.pt")["state_dict"], load(tmp_path / "whole" / "model.pt")["state_dict"])


def test_patience_ends_early_and_minutes_bound_the_epochs(run, hard_train, tmp_path):
    args = ["--data", hard_train, *SMALL]
    result = run("train", *args, "--epochs", 400, "--lr", 0.3, "--patience", 3, "--out", tmp_path / "patience").json
    assert result["epochs"] == result["best_epoch"] + 3 < 400
    start = time.monotonic()
    result = run("train", *args, "--epochs", 1000000, "--max-minutes", 0.12, "--out", tmp_path / "minutes").json
    rows = history(tmp_path / "minutes")
    assert time.monotonic() - start < 20 and 1 < len(rows) == result["epochs"] < 1000000
    assert float(rows[-1]["lr"]) < 0.2 * float(rows[0]["lr"])  # the cosine came down, though the epochs were cut
    result = run("train", *args, "--epochs", 50, "--max-minutes", 1e-6, "--out", tmp_path / "none").json
    assert result["epochs"] == 1 and (tmp_path / "none" / "model.pt").exists()


def test_training_options_do_what_they_say(run, hard_train, tmp_path):
    args = ["--data", hard_train, "--epochs", 6, "--lr", 0.02, *SMALL]
    norm, entropy = {}, {}
    options = {"plain": [], "decay": ["--weight-decay", 1], "adamw": ["--weight-decay", 1, "--optimizer", "adamw"], "smooth": ["--label-smoothing", 0.3],
               "warm": ["--warmup", 3]}
    for name, extra in options.items():
        run("train", *args, "--out", tmp_path / name, *extra)
        checkpoint = load(tmp_path / name / "model.pt")
        norm[name] = checkpoint["state_dict"]["fc.weight"].norm().item()
        entropy[name] = float(history(tmp_path / name)[-1]["train_loss"])
    assert norm["decay"] < 0.5 * norm["plain"] and norm["decay"] < norm["adamw"] < norm["plain"]
    assert entropy["smooth"] > 1.5 * entropy["plain"]
    rates = [float(row["lr"]) for row in history(tmp_path / "warm")]
    assert rates[0] < rates[1] < rates[2] < rates[3] == 0.02 > rates[4] > rates[5]


def test_class_imbalance(run, tree, tmp_path):
    """Red is rare and looks like blue: it is warned of, and with balanced weights it is found more often."""
    data = make_tree(tmp_path / "data", counts=(("train", 30), ("val", 12), ("test", 12)))
    for split, keep in (("train", 3), ("val", 12), ("test", 12)):
        for number in range(30 if split == "train" else 12):
            path = data / split / "red" / f"red {number}.png"
            tile((50, 40, 170), f"{split} hard {number}").save(path)
            if number >= keep:
                path.unlink()
    args = ["--data", data, "--epochs", 3, "--seed", 1, *SMALL]
    plain = run("train", *args, "--out", tmp_path / "plain")
    assert "imbalanced" in plain.err and "30 blue, 30 green, 3 red" in plain.err
    balanced = run("train", *args, "--out", tmp_path / "balanced", "--class-weights", "balanced")
    assert "imbalanced" not in balanced.err
    recall = {}
    for name in ("plain", "balanced"):
        run("evaluate", "--checkpoint", tmp_path / name / "model.pt", "--data", data)
        recall[name] = {row["class"]: float(row["recall"]) for row in read_csv(tmp_path / name / "report" / "per_class.csv")}["red"]
    assert recall["balanced"] > recall["plain"]


def test_without_val_nothing_can_be_chosen(run, tree, tmp_path):
    shutil.copytree(tree / "train", tmp_path / "data" / "train")
    for option in ("--tune", "--patience"):
        error, = run("train", "--data", tmp_path / "data", "--out", tmp_path / "out", option, 3, *SMALL, code=2).error
        assert option in error and "no val/" in error
    assert run("train", "--data", tmp_path / "data", "--out", tmp_path / "out", "--seeds", 2, "--epochs", 2, *SMALL).json["test_acc"] is None


@pytest.mark.parametrize("finetune", ["head", "all"])
def test_tta_averages_the_views_of_the_training(run, trained, hard_train, tmp_path, finetune):
    from common import FrozenModel, preprocess, read_checkpoint, read_image, read_split
    run("train", "--data", hard_train, "--out", tmp_path / "out", "--epochs", 2, "--augment", "dihedral", *SMALL, "--finetune", finetune)
    args = ["--checkpoint", tmp_path / "out" / "model.pt", "--precision", "fp32"]
    content, model = read_checkpoint(args[1])
    frozen = FrozenModel(model, content["preprocessing"], 3, torch.device("cpu"), "fp32")

    def averaged(split):
        paths, _, targets = read_split(hard_train / split)
        pixels = torch.stack([preprocess(read_image(path), 32, "bilinear") for path in paths])
        views = [view.rot90(turns, (-2, -1)) for view in (pixels, pixels.flip(-1)) for turns in range(4)]
        return (sum(frozen.logits(frozen.features(view)).softmax(1) for view in views) / 8).log(), torch.tensor(targets)

    logs, right = averaged("val")
    losses = [torch.nn.functional.cross_entropy(logs / content["temperature_tta"] * factor, right) for factor in (0.95, 1, 1.05)]
    assert losses[1] < min(losses[0], losses[2])
    logs, targets = averaged("test")
    wanted = (logs / content["temperature_tta"]).softmax(1)
    measured = run("evaluate", *args, "--data", hard_train, "--tta", "--out", tmp_path / "report").json
    assert measured["accuracy"] == pytest.approx((wanted.argmax(1) == targets).float().mean().item())
    said = [float(row["probability"]) for row in read_csv(tmp_path / "report" / "predictions.csv")]
    assert said == pytest.approx(wanted.amax(1).tolist(), abs=1e-5)
    lines = run("predict", *args, hard_train / "test", "--tta", "--format", "jsonl").out.splitlines()
    assert [json.loads(line)["probability"] for line in lines] == pytest.approx(said, abs=1e-5)
    for script, rest in (("evaluate", ["--data", hard_train]), ("predict", [hard_train / "test"])):
        assert "--augment" in run(script, "--checkpoint", trained.model, *rest, "--tta", code=2).error[0]


def changed_parts(before, after):
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


def test_finetune_trains_what_it_says(run, hard_train, tmp_path):
    """Of all, every part learns but no statistic of BatchNorm; of last, the last stage; the accuracies are those of the saved model."""
    weights = weights_file(tmp_path)
    before = load(weights)
    args = ["--data", hard_train, "--arch", "resnet18", "--weights", weights, "--image-size", 32, "--precision", "fp32", "--epochs", 2, "--augment", "dihedral"]
    for mode, parts in (("all", {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"}), ("last", {"layer4", "fc"})):
        result = run("train", *args, "--finetune", mode, "--out", tmp_path / mode)
        after = load(tmp_path / mode / "model.pt")
        assert changed_parts(before, after["state_dict"]) == parts
        assert all(torch.equal(before[key], after["state_dict"][key]) for key in before if "running_" in key)
        assert f"fine-tuning {'conv1, bn1, layer1, layer2, layer3, ' if mode == 'all' else ''}layer4:" in result.err
        assert "the classifier alone" in result.err and len(history(tmp_path / mode)) == 2
        measured = run("evaluate", "--checkpoint", tmp_path / mode / "model.pt", "--data", hard_train).json
        assert measured["accuracy"] == pytest.approx(result.json["test_acc"])
        assert measured["loss"] == pytest.approx(after["metrics"]["test_loss"], abs=1e-4)
        assert run("predict", "--checkpoint", tmp_path / mode / "model.pt", "--tta", hard_train / "test" / "red").out
    rows = [float(history(tmp_path / "all")[-1][f"{split}_loss"]) for split in ("train", "val")]
    frozen = run("train", *args, "--out", tmp_path / "frozen").json
    assert rows[1] < float(history(tmp_path / "frozen")[frozen["best_epoch"] - 1]["val_loss"])  # the network learned


@pytest.mark.parametrize("arch, stage", [("mobilenet_v3_small", {"features.9", "features.12", "classifier"}), ("vgg11", {"features.16", "classifier"}),
                                         ("squeezenet1_1", {"features.9", "features.12"}), ("vit_b_32", {"encoder.layers.encoder_layer_9", "encoder.ln"})])
def test_last_stage_of_others(run, tmp_path, arch, stage):
    data = make_tree(tmp_path / "data", counts=(("train", 3),))
    result = run("train", "--data", data, "--out", tmp_path / "out", "--epochs", 1, "--arch", arch, "--weights", "none", "--image-size", 64,
                 "--finetune", "last")
    line = next(line for line in result.err.splitlines() if "fine-tuning" in line)
    named = line.split("fine-tuning ")[1].split(":")[0].split(", ")
    assert stage <= set(named) and not any(name.startswith(("features.0", "conv_proj")) for name in named)
    torchvision.models.get_model(arch, **load(tmp_path / "out" / "model.pt")["model_kwargs"])


def test_finetune_repeats_and_resumes_to_the_bit(run, hard_train, tmp_path, monkeypatch):
    args = ["--data", hard_train, "--epochs", 3, "--finetune", "last", "--augment", "dihedral", "strong", "--label-smoothing", 0.1, "--batch-size", 16, *SMALL]
    whole = run("train", *args, "--out", tmp_path / "whole").json
    interrupt_after(monkeypatch, 2)
    run("train", *args, "--out", tmp_path / "out", code=130)
    monkeypatch.undo()
    assert "--resume" in run("train", *args, "--out", tmp_path / "out", code=2).error[0]
    assert "backbone_lr was" in run("train", *args, "--out", tmp_path / "out", "--resume", "--backbone-lr", 1e-3, code=2).error[0]
    again = run("train", *args, "--out", tmp_path / "out", "--resume")
    assert "resumed after epoch 2" in again.err
    first, second = (load(tmp_path / name / "model.pt") for name in ("whole", "out"))
    assert same(first["state_dict"], second["state_dict"]) and first["temperature"] == second["temperature"]
    assert again.json["test_acc"] == whole["test_acc"] and len(history(tmp_path / "out")) == 3


def test_images_that_do_not_fit_are_read_again_each_epoch(run, hard_train, tmp_path, monkeypatch):
    """From memory or from disk, the same pixels, the same model."""
    import train
    args = ["--data", hard_train, "--epochs", 2, "--finetune", "last", "--augment", "flip", *SMALL]
    run("train", *args, "--out", tmp_path / "memory")
    monkeypatch.setattr(train, "MEMORY_SHARE", 1e-7)
    run("train", *args, "--out", tmp_path / "disk")
    assert same(*(load(tmp_path / name / "model.pt")["state_dict"] for name in ("memory", "disk")))


def test_attention_of_the_last_stage_learns_too(run, tmp_path):
    """Torchvision's attention uses the weights of its parts without calling them; and a random network learns with BatchNorm."""
    data = make_tree(tmp_path / "data", counts=(("train", 6),))
    torch.manual_seed(0)
    torch.save(torchvision.models.swin_t().state_dict(), tmp_path / "w.pth")
    run("train", "--data", data, "--out", tmp_path / "out", "--epochs", 1, "--arch", "swin_t", "--weights", tmp_path / "w.pth", "--image-size", 64,
        "--finetune", "last")
    before, after = load(tmp_path / "w.pth"), load(tmp_path / "out" / "model.pt")["state_dict"]
    stage = [key for key in before if key.startswith("features.7") and before[key].is_floating_point()]
    assert stage and not [key for key in stage if torch.equal(before[key], after[key])]
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("features.5"))
    result = run("train", "--data", data, "--out", tmp_path / "none", "--epochs", 6, "--finetune", "all", *SMALL).json
    state = load(tmp_path / "none" / "model.pt")["state_dict"]
    assert result["epochs"] == 6 and not torch.equal(state["bn1.running_var"], torch.ones(64))


def test_out_of_memory_says_which_batch_size_to_try(run, hard_train, tmp_path, monkeypatch):
    import train

    def full(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train.FineTuning, "forward", full)
    error, = run("train", "--data", hard_train, "--finetune", "all", "--batch-size", 48, *SMALL, "--out", tmp_path / "out", code=2).error
    assert "--batch-size 24" in error and "48 images of 32 pixels" in error


def test_what_goes_with_finetune_and_what_not(run, tree, tmp_path):
    for options, words in ((["--augment", "strong"], "--finetune"), (["--backbone-lr", 1e-3], "--finetune last or all"), (["--augment", "flip", "dihedral"], "choose one"),
                           (["--finetune", "all", "--batch-size", 1], "--batch-size"), (["--finetune", "all", "--tune", 4], "--finetune head"), (["--finetune", "last", "--seeds", 2], "--finetune head")):
        assert words in run("train", "--data", tree, "--out", tmp_path / "out", *SMALL, *options, code=2).error[0]


@pytest.mark.parametrize("mode", ["head", "all"])
def test_several_processes_do_as_one(run, hard_train, tmp_path, mode):
    """torchrun with two processes: only the first writes and speaks, no image is lost or counted twice, the result is the same."""
    views = {"head": "flip", "all": "none"}[mode]  # when the network learns, each process draws views of its own
    args = ["--data", hard_train, "--epochs", 2, "--finetune", mode, "--augment", views, "--batch-size", 16, "--no-cache", *SMALL,
            "--weights", weights_file(tmp_path)]  # of random weights, BatchNorm would learn statistics, in each process its own
    alone = run("train", *args, "--out", tmp_path / "alone").json
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617", ROOT / "train.py", *args, "--out", tmp_path / "two"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result, = map(json.loads, done.stdout.splitlines())
    assert done.stderr.count("epoch 1/2") == 1
    assert result["test_acc"] == pytest.approx(alone["test_acc"], abs=2 / 90)
    ours, theirs = (load(tmp_path / name / "model.pt")["state_dict"] for name in ("alone", "two"))
    assert all(torch.allclose(ours[key].float(), theirs[key].float(), rtol=1e-2, atol=1e-3) for key in ours)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["history.csv", "last.pt", "model.pt"]


def test_another_network_is_not_resumed(run, tree, tmp_path, monkeypatch):
    import train
    args = ["--data", tree, "--arch", "resnet18", "--image-size", 32, "--weights", tmp_path / "w.pth", "--out", tmp_path / "out"]
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    real_save = train.save_last

    def die(*positional, **state):
        real_save(*positional, **state)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_last", die)
    run("train", *args, code=130)
    monkeypatch.undo()
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    assert "network and libraries was" in run("train", *args, "--resume", code=2).error[0]


def test_bf16_agrees_with_itself_and_with_fp32(run, tree, tmp_path):
    trained = run("train", "--data", tree, "--out", tmp_path / "out", "--epochs", 4, "--lr", 0.01, *SMALL, "--precision", "bf16").json
    args = ["--checkpoint", tmp_path / "out" / "model.pt", "--data", tree]
    same_way, other_way = (run("evaluate", *args, "--precision", precision).json for precision in ("bf16", "fp32"))
    assert same_way["accuracy"] == trained["test_acc"] and other_way["accuracy"] == pytest.approx(trained["test_acc"], abs=0.07)
    assert other_way["loss"] == pytest.approx(same_way["loss"], abs=0.05)


def test_a_damaged_cache_costs_a_warning(run, tree, tmp_path):
    cache = tmp_path / "cache"
    args = ["--data", tree, "--epochs", 1, "--cache", cache, *SMALL]
    run("train", *args, "--out", tmp_path / "first")
    file, = cache.glob("*/*.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (file.parent / "foreign.pt").write_text("not ours")
    result = run("train", *args, "--out", tmp_path / "second")
    assert f"ignored {file}" in result.err and "foreign.pt" in result.err
    assert "114 remembered" in run("train", *args, "--out", tmp_path / "third").err
    assert (file.parent / "foreign.pt").read_text() == "not ours"
    assert same(*(load(tmp_path / name / "model.pt")["state_dict"] for name in ("first", "second")))


def test_the_cache_is_bounded_and_need_not_be_writable(run, tree, tmp_path):
    cache = tmp_path / "cache"
    for seed in (0, 1):
        run("train", "--data", tree, "--epochs", 1, "--cache", cache, *SMALL, "--seed", seed, "--out", tmp_path / str(seed), "--cache-limit", 0.0003)
    files = list(cache.glob("*/*.pt"))
    assert len(files) == 1 and sum(file.stat().st_size for file in files) <= 3e5
    (cache / "mine").mkdir()
    (cache / "mine" / "model.pt").write_text("not of the cache, though in it")
    run("train", "--data", tree, "--epochs", 1, "--cache", cache, *SMALL, "--out", tmp_path / "2", "--cache-limit", 1e-9)
    assert (cache / "mine" / "model.pt").exists() and not list(cache.glob("?" * 32 + "/*.pt"))
    (tmp_path / "file").write_text("in the way")
    result = run("train", "--data", tree, "--epochs", 1, "--cache", tmp_path / "file" / "cache", *SMALL, "--out", tmp_path / "out")
    assert "not remembered" in result.err and result.json["epochs"] == 1


def test_an_interrupted_pass_goes_on_where_it_stopped(run, tree, tmp_path, monkeypatch):
    import train
    real_compute = train.compute_features

    def stop(*positional):
        for number, result in enumerate(real_compute(*positional)):
            if number == 3:
                raise KeyboardInterrupt
            yield result
    monkeypatch.setattr(train, "compute_features", stop)
    args = ["--data", tree, "--epochs", 1, "--cache", tmp_path / "cache", "--out", tmp_path / "out", *SMALL]
    run("train", *args, code=130)
    monkeypatch.undo()
    assert "48 remembered" in run("train", *args).err


def test_features_beyond_memory_are_mapped(run, trained, tree, tmp_path, monkeypatch):
    import train
    monkeypatch.setattr(train, "MEMORY_SHARE", 0)
    result = run("train", "--data", tree, "--epochs", 4, "--lr", 0.01, *SMALL, "--out", tmp_path / "out")
    assert "mapped from disk" in result.err
    assert same(load(tmp_path / "out" / "model.pt")["state_dict"], load(trained.model)["state_dict"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["history.csv", "last.pt", "model.pt"]


def test_views_are_the_symmetries_of_a_square(run, tmp_path):
    """Mirrored, left is right: a set that is easy without views cannot be learned with them."""
    import random
    from PIL import Image
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


def test_compiled_is_the_same_function(run, trained, tree, tmp_path):
    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("needs a C++ compiler")
    run("train", "--data", tree, "--out", tmp_path / "out", "--epochs", 4, "--lr", 0.01, *SMALL, "--compile", "--no-cache")
    ours, theirs = (load(folder / "model.pt")["metrics"] for folder in (tmp_path / "out", trained.folder))
    assert ours["test_loss"] == pytest.approx(theirs["test_loss"], abs=1e-3)


def test_only_if_better(run, hard_train, tmp_path):
    """The old model stays, with its history and exit code 5, unless the new one is as good on today's val."""
    out = tmp_path / "out"
    args = ["--data", hard_train, "--out", out, "--only-if-better", *SMALL]
    first = run("train", *args, "--epochs", 8, "--lr", 0.01).json
    assert (first["kept_old"], first["old_val_acc"]) == (False, None) and len(history(out)) == 8
    whole = {name: (out / name).read_bytes() for name in ("model.pt", "history.csv")}
    worse = run("train", *args, "--epochs", 1, "--lr", 1e-9, code=5)
    assert (worse.json["kept_old"], worse.json["old_val_acc"]) == (True, first["val_acc"]) and worse.json["val_acc"] < first["val_acc"]
    assert "90 remembered" in worse.err and "kept the old" in worse.err  # the same backbone: no second pass over val's images
    assert {name: (out / name).read_bytes() for name in whole} == whole and load(out / "last.pt")["finished"]
    again = run("train", *args, "--epochs", 8, "--lr", 0.01).json
    assert (again["kept_old"], again["old_val_acc"]) == (False, first["val_acc"])
    tuned = run("train", *args, "--epochs", 2, "--finetune", "last", code=None).json
    assert tuned["old_val_acc"] == first["val_acc"] and tuned["kept_old"] == (tuned["val_acc"] < first["val_acc"])


def test_only_if_better_needs_something_to_compare(run, tree, trained, tmp_path):
    """What cannot be compared is an error before any work; what was trained with another backbone, size or order can be."""
    out = tmp_path / "out"
    shutil.copytree(trained.folder, out)
    args = ["--out", out, "--only-if-better", "--epochs", 1, *SMALL]
    classes = make_tree(tmp_path / "classes", counts=(("train", 4), ("val", 4)), classes=["red", "green"])
    error, = run("train", "--data", classes, *args, code=2).error
    assert "class blue" in error and "model.pt" in error
    unmeasured = make_tree(tmp_path / "unmeasured", counts=(("train", 4),))
    assert "has no val/" in run("train", "--data", unmeasured, *args, code=2).error[0]
    content = load(trained.model)
    order = [2, 0, 1]
    content["classes"] = [content["classes"][index] for index in order]
    content["state_dict"] |= {key: content["state_dict"][key][order] for key in ("fc.weight", "fc.bias")}
    content["preprocessing"]["size"] = 48
    torch.save(content, out / "model.pt")
    measured = run("evaluate", "--checkpoint", out / "model.pt", "--data", tree, "--split", "val", "--out", tmp_path / "report").json
    assert run("train", "--data", tree, *args, code=None).json["old_val_acc"] == pytest.approx(measured["accuracy"])
    (out / "model.pt").write_bytes(b"damaged")
    assert "model.pt is damaged" in run("train", "--data", tree, *args, "--restart", code=2).error[0]


@pytest.mark.parametrize("mode", ["head", "last"])
def test_signals_finish_the_step(tree, tmp_path, mode):
    """SIGTERM and SIGINT: the exit code, how to go on, last.pt at the last finished epoch, and nothing else left behind."""
    line = [sys.executable, ROOT / "train.py", "--data", tree, "--out", tmp_path / "out", "--epochs", 9999, "--finetune", mode, *SMALL, "--resume"]
    done = 0
    for name, code in (("SIGTERM", 143), ("SIGINT", 130)):
        process = subprocess.Popen(list(map(str, line)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        told = []
        while f"epoch {done + 3}/" not in (told or [""])[-1]:
            told.append(process.stderr.readline())
            assert told[-1], "".join(told)
        process.send_signal(getattr(signal, name))
        told += process.stderr.readlines()
        assert process.wait() == code and "--resume" in told[-2] and told[-1] == "train.py: error: interrupted\n", "".join(told)
        before, done = done, len(load(tmp_path / "out" / "last.pt")["history"])
        assert done >= before + 3 and (not before or f"resumed after epoch {before}\n" in "".join(told))
        assert [int(row["epoch"]) for row in history(tmp_path / "out")] == list(range(1, done + 1))
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["history.csv", "last.pt"]


def test_a_second_signal_ends_at_once():
    """The first waits for the end of the step, the second does not."""
    import common
    ended, previous = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, common.receive_signal)
    try:
        with pytest.raises(KeyboardInterrupt) as first:
            for step in common.whole_steps(range(3)):
                if step == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                ended.append(step)
        assert ended == [0, 1] and first.value.args == (143,)
        with pytest.raises(KeyboardInterrupt):
            for step in common.whole_steps(range(3)):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                ended.append("after the second")
        assert ended == [0, 1]
        with pytest.raises(KeyboardInterrupt):  # no steps, nothing to wait for
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_second_run_waits_outside(run, tree, tmp_path):
    from common import locked
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".lock"):
        run("train", "--data", tree, "--out", tmp_path / "out", *SMALL, code=75)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("damage, words", [
    (lambda d: remove(d), "no such folder"),
    (lambda d: remove(d / "train"), "no train/"),
    (lambda d: [remove(p) for p in (d / "train").iterdir()], "no class folders"),
    (lambda d: [remove(d / s / c) for s in ("train", "val", "test") for c in ("red", "blue")], "one class"),
    (lambda d: (d / "train" / "empty").mkdir(), "empty"),
    (lambda d: shutil.copytree(d / "test" / "red", d / "test" / "purple"), "purple"),
    (lambda d: (d / "val" / "red" / "bad.jpg").write_bytes(b"no image"), "bad.jpg"),
])
def test_bad_trees(run, tree, tmp_path, damage, words):
    data = tmp_path / "data"
    shutil.copytree(tree, data)
    damage(data)
    error, = run("train", "--data", data, "--out", tmp_path / "out", *SMALL, code=2).error
    assert words in error
    assert not (tmp_path / "out" / "model.pt").exists()


@pytest.mark.parametrize("argv, words", [
    (["--epochs", "0"], "--epochs"), (["--batch-size", "0"], "--batch-size"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--arch", "resnet5"], "resnet50"), (["--device", "tpu"], "tpu"), (["--device", "cuda:99"], "not available"),
    (["--weights", "IMAGENET1K_V9"], "IMAGENET1K_V1"), (["--weights", "MobileNet_V2_Weights.IMAGENET1K_V1"], "IMAGENET1K_V1"),
    (["--seed", "-1"], "--seed"), (["--seed", "99999999999999999999"], "--seed"), (["--weights", "no/such.pth"], "no/such.pth"),
    (["--image-size", "1"], "--image-size 1"), (["--arch", "vit_b_16", "--image-size", "200"], "--image-size 200"),
    (["--resume", "--restart"], "exclude"),
])
def test_bad_arguments(run, tree, tmp_path, argv, words):
    error, = run("train", "--data", tree, "--out", tmp_path / "out", "--arch", "vgg11", "--weights", "none", "--device", "cpu", *argv, code=2).error
    assert words in error


def test_training_that_cannot_work_says_so(run, tree, tmp_path):
    error, = run("train", "--data", tree, "--out", tmp_path / "out", "--lr", 1e37, *SMALL, code=2).error
    assert "lower --lr" in error and not (tmp_path / "out" / "model.pt").exists()
    error, = run("train", "--data", tree, "--out", tmp_path / "last", "--lr", 1e38, "--epochs", 1, "--batch-size", 500, *SMALL, code=2).error
    assert "not finite" in error and "lower --lr" in error and not (tmp_path / "last" / "model.pt").exists()  # in the last step of all
    weights = torchvision.models.resnet18().state_dict()
    weights["layer4.1.conv2.weight"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    error, = run("train", "--data", tree, "--out", tmp_path / "out", "--restart", "--arch", "resnet18", "--image-size", 32, "--weights", tmp_path / "nan.pth", code=2).error
    assert "not finite" in error


def test_weights_that_do_not_fit(run, trained, tree, tmp_path):
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({1: 2}, tmp_path / "numbers.pth")
    for weights, words in (("numbers.pth", "by name"), ("other.pth", "missing (conv1.weight"), ("list.pth", "a list"), ("text.pth", "damaged"), (trained.model, "--arch resnet18")):
        arch = "resnet50" if weights == trained.model else "resnet18"
        error, = run("train", "--data", tree, "--out", tmp_path / "out", "--arch", arch, "--weights", tmp_path / weights, code=2).error
        assert words in error and str(tmp_path / weights) in error


def test_no_download_no_fallback(tree, tmp_path):
    """Without a network the default weights are an error that names both ways out, never random weights in their place."""
    done = command("train", "--data", tree, "--out", tmp_path / "out", env={"PATH": "", "HOME": str(tmp_path), "TORCH_HOME": str(tmp_path),
                                                                             "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "cannot download" in line and "resnet50-0676ba61.pth" in line and "--weights FILE" in line and "--weights none" in line
    assert not (tmp_path / "out" / "model.pt").exists()


def test_unwritable_output(run, tree, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run("train", "--data", tree, "--out", tmp_path / "file" / "out", *SMALL, code=2)


def test_help_is_instant_and_archs_are_listed():
    resource = pytest.importorskip("resource")  # not on Windows
    for script in ("prepare_data", "train", "evaluate", "predict"):
        seconds = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = command(script, "--help")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert done.returncode == 0 and "example:" in done.stdout and "exit codes:" in done.stdout
        assert min(seconds) < 0.25, script  # 0.1 s on an idle machine
    assert command("train", "--epochs", "0").returncode == 2
    assert command("train", "--list-archs").stdout.split() == torchvision.models.list_models(module=torchvision.models)


def test_real_weights_on_real_tiles(run, tmp_path):
    """ImageNet's mobilenet_v2 on 40 EuroSAT tiles of each class, at 96 pixels: far better than chance would do."""
    import zipfile
    with zipfile.ZipFile(real("eurosat", "EuroSAT.zip")) as archive:
        names = [n for n in archive.namelist() if n.endswith(".jpg") and int(n.rsplit("_", 1)[1][:-4]) <= 40]
        archive.extractall(tmp_path / "source", names)
    run("prepare_data", "--source", tmp_path / "source", "--out", tmp_path / "data")
    result = run("train", "--data", tmp_path / "data", "--out", tmp_path / "out", "--arch", "mobilenet_v2", "--image-size", 96, "--epochs", 10,
                 "--weights", real("weights", "mobilenet_v2_imagenet.pth")).json
    assert result["test_acc"] > 0.55
    measured = run("evaluate", "--checkpoint", tmp_path / "out" / "model.pt", "--data", tmp_path / "data").json
    assert measured["accuracy"] == pytest.approx(result["test_acc"], abs=0.013)


@pytest.mark.parametrize("what, words", [("pass", "pass / bare"), ("finetune", "training / random"), ("predict", "one image")])
def test_benchmarks_that_the_readme_names_run(tree, tmp_path, what, words):
    line = [sys.executable, ROOT / "tests" / "benchmark.py", what, "--data", tree, "--arch", "resnet18", "--images", 16, "--rounds", 1, "--image-size", 32]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and words in done.stdout, done.stderr
