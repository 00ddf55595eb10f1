"""evaluate.py: numbers that agree with scikit-learn, scipy and counts by hand, the files it writes, what it refuses."""

import hashlib
import json
import os
import shutil
import signal
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
import torch
from conftest import SMALL, command, load_pt, names, pipe_without_reader, read_csv
from PIL import Image
from scipy import stats
from sklearn import metrics as sklearn

import common
import evaluate
from common import Checkpoint, LockedError, handle_signal, hash_file, hold_lock, short_hashes

FALLING = """epoch,lr,train_loss,train_acc,val_loss,val_acc,test_loss,test_acc,seconds
1,0.1,0.9,0.60,0.8,0.60,,,1
2,0.1,0.1,0.99,0.7,0.70,,,1
"""
HISTORY = """epoch,lr,train_loss,train_acc,val_loss,val_acc,test_loss,test_acc,seconds
1,0.1,0.9,0.60,0.8,0.60,,,1
2,0.1,0.5,0.80,0.6,0.75,,,1
3,0.1,0.1,0.99,0.9,0.75,,,1
"""
# Without val, and with test measured in every second epoch, as when fine-tuning.
HISTORY_WITH_GAPS = """epoch,lr,train_loss,train_acc,val_loss,val_acc,test_loss,test_acc,seconds
1,0.1,0.9,0.60,,,,,1
2,0.1,0.5,0.80,,,0.5,0.70,1
3,0.1,0.4,0.85,,,,,1
4,0.1,0.3,0.90,,,0.6,0.75,1
5,0.1,0.1,0.99,,,,,1
"""
HISTORY_WITHOUT_VAL = """epoch,lr,train_loss,train_acc,val_loss,val_acc,test_loss,test_acc,seconds
1,0.1,0.9,0.60,,,,,
2,0.1,0.5,0.80,,,,,
3,0.1,0.1,0.99,,,,,
"""


@pytest.fixture
def hard_tree(tree, tmp_path):
    """A copy of the tree with 3 of 10 red test images in the folder blue, and 2 blue ones in green: known mistakes."""
    data = tmp_path / "hard"
    shutil.copytree(tree, data)
    for number in range(3):
        shutil.move(data / "test" / "red" / f"red {number}.png", data / "test" / "blue")
    for number in range(2):
        shutil.move(data / "test" / "blue" / f"blue {number}.png", data / "test" / "green")
    return data


def save_changed(trained, path, **changes):
    """Save a copy of the trained checkpoint with some entries changed, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**load_pt(trained.model), **changes}, path)
    return path


def constant_weights(trained, index):
    """Return the trained weights with a classifier that predicts the same class for every image."""
    state = load_pt(trained.model)["state_dict"]
    return {**state, "fc.weight": torch.zeros_like(state["fc.weight"]), "fc.bias": torch.eye(3)[index]}


def random_model(num_classes=7, n=400, seed=0):
    """Return an evaluated model with random predictions: about half are correct, and no image is of the last class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_classes - 1, (n,), generator=generator)
    logits = 1.5 * torch.randn(n, num_classes, generator=generator).double()
    logits[torch.arange(n), targets] += 2
    classes = [f"class {number}" for number in range(num_classes)]
    checkpoint = Checkpoint("none", {}, {}, torch.nn.Linear(2, 2), classes, 0.7, 0.7, [(0, False)], {}, {}, {})
    model = evaluate.Model(Path("model.pt"), "random", "", checkpoint, checkpoint.views, 0.7)
    model.predictions = evaluate.Predictions(targets, logits.log_softmax(1), (logits / 0.7).log_softmax(1))
    model.metrics = evaluate.compute_metrics(model, {"ms_per_image": 1.0, "timing": "none"})
    return model


# ---------------------------------------------------------------- statistics


def test_metrics_agree_with_scikit_learn():
    model = random_model()
    predictions, numbers = model.predictions, evaluate.to_json(model.metrics)
    true, predicted, labels = predictions.targets.numpy(), predictions.predicted.numpy(), range(7)
    assert (predictions.confusion.to_dense().numpy() == sklearn.confusion_matrix(true, predicted, labels=labels)).all()
    per_class = sklearn.precision_recall_fscore_support(true, predicted, labels=labels, zero_division=numpy.nan)
    for row, *expected in zip(numbers["per_class"], *per_class):
        found = [numpy.nan if row[key] is None else row[key] for key in ("precision", "recall", "f1", "support")]
        assert found == pytest.approx(expected, nan_ok=True)
    assert numbers["per_class"][6]["recall"] is None and numbers["per_class"][6]["recall_ci95"] is None
    assert numbers["accuracy"] == pytest.approx(sklearn.accuracy_score(true, predicted))
    assert numbers["macro_f1"] == pytest.approx(sklearn.f1_score(true, predicted, average="macro"))
    recalls = sklearn.recall_score(true, predicted, labels=range(6), average=None)  # no image is of the last class
    assert numbers["balanced_accuracy"] == pytest.approx(recalls.mean())
    for k in (3, 5):
        expected = sklearn.top_k_accuracy_score(true, predictions.calibrated.numpy(), k=k, labels=labels)
        assert numbers[f"top{k}_accuracy"] == pytest.approx(expected)


def test_calibration_agrees_with_scikit_learn():
    model = random_model()
    predictions, numbers = model.predictions, evaluate.to_json(model.metrics)
    true, labels = predictions.targets.numpy(), range(7)
    for scores, suffix in ((predictions.uncalibrated, "_uncalibrated"), (predictions.calibrated, "")):
        probabilities = scores.exp().numpy()
        assert numbers[f"nll{suffix}"] == pytest.approx(sklearn.log_loss(true, probabilities, labels=labels))
        brier = sum(sklearn.brier_score_loss(true == label, probabilities[:, label]) for label in labels)
        assert numbers[f"brier{suffix}"] == pytest.approx(brier)
        confidence, correct, ece = probabilities.max(1), probabilities.argmax(1) == true, 0
        for low in numpy.arange(15) / 15:
            inside = (confidence > low) & (confidence <= low + 1 / 15)
            ece += abs(correct[inside].sum() - confidence[inside].sum()) / 400
        assert numbers[f"ece{suffix}"] == pytest.approx(ece)
        assert all(row["bin"] < 15 * row["probability"] <= row["bin"] + 1 for row in numbers[f"reliability{suffix}"])
    assert numbers["loss"] == numbers["nll_uncalibrated"] != numbers["nll"]


def test_ece_of_a_perfectly_calibrated_model():
    """By hand: of two images with confidence 0.75, both are wrong (ECE 0.75) in 1/16 of the cases, else ECE is 0.25."""
    found = evaluate.ece_if_perfect(torch.tensor([0.75, 0.75]).double())
    assert found["ece_if_perfect"] == pytest.approx((0.75 + 15 * 0.25) / 16, abs=0.01)
    assert found["ece_if_perfect_p95"] == 0.75
    assert set(evaluate.ece_if_perfect(torch.ones(9).double()).values()) == {0}
    rng, confidence = numpy.random.default_rng(0), random_model(10, 1000).predictions.confidence
    bins, eces = numpy.ceil(15 * confidence.numpy()), []
    for _ in range(1000):
        excess = (rng.random(1000) < confidence.numpy()) - confidence.numpy()
        eces.append(sum(abs(excess[bins == number].sum()) for number in range(1, 16)) / 1000)
    found = evaluate.ece_if_perfect(confidence)
    assert found["ece_if_perfect"] == pytest.approx(numpy.mean(eces), rel=0.03)
    assert found["ece_if_perfect_p95"] == pytest.approx(numpy.percentile(eces, 95), rel=0.04)
    assert evaluate.ece_if_perfect(confidence) == found


def test_wilson_interval_agrees_with_scipy():
    for count, total in ((0, 5), (5, 5), (1, 30), (5072, 5400)):
        expected = stats.binomtest(count, total).proportion_ci(method="wilson")
        assert evaluate.wilson(count, total) == pytest.approx((count / total, expected.low, expected.high))
    assert evaluate.wilson(15, 50)[1:] == pytest.approx((0.1910, 0.4375), abs=1e-4)  # by hand
    assert evaluate.wilson(0, 0) == (None, None, None)


def test_f1_interval_by_hand():
    """8 of the 12 images that are true or predicted are correct: Wilson's interval is 0.3906 to 0.8619."""
    assert evaluate.f1_estimate(8, 10, 10) == pytest.approx((0.8, 0.5618, 0.9258), abs=1e-4)
    low, high = evaluate.wilson(8, 12)[1:]
    assert evaluate.f1_estimate(8, 9, 11) == pytest.approx((0.8, 2 * low / (1 + low), 2 * high / (1 + high)))
    assert evaluate.f1_estimate(0, 0, 0) == (None, None, None)
    assert evaluate.f1_estimate(10, 10, 10)[1] < 0.9 and evaluate.f1_estimate(10, 10, 10)[2] == 1
    assert evaluate.f1_estimate(0, 0, 3)[:2] == (0, 0) and evaluate.f1_estimate(0, 0, 3)[2] > 0.5


def test_f1_of_a_class_without_mistakes_is_uncertain():
    """All 12 images of a class are correct: resamples agree on an F1 of 1, but 12 images cannot show that."""
    model = random_model(4, 300)
    targets = model.predictions.targets.clone()
    targets[:12], scores = 3, model.predictions.calibrated.clone()
    scores[:, 3] = torch.where(targets == 3, 9.0, -99.0)
    model.predictions = evaluate.Predictions(targets, scores.log_softmax(1), scores.log_softmax(1))
    row = evaluate.compute_metrics(model, {})["per_class"][3]
    assert row["support"] == 12 and row["f1"].value == 1 and row["f1"].low == pytest.approx(0.8621, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("support", [10, 30, 540])
@pytest.mark.parametrize("recall, precision", [(0.95, 0.95), (0.9, 0.8), (0.6, 0.7)])
def test_coverage_of_the_f1_interval(support, recall, precision):
    """Of a class with this mean support among 5,400 images, 95% of the intervals contain the true F1."""
    hits = support * recall
    cells = numpy.array([hits, support - hits, hits / precision - hits, 0])
    cells[3] = 5400 - cells.sum()
    true_f1, rng = 2 * recall * precision / (recall + precision), numpy.random.default_rng(0)

    def coverage(interval, repetitions):
        draws = rng.multinomial(5400, cells / 5400, size=repetitions).tolist()
        found = [interval(*draw) for draw in draws if sum(draw[:3])]
        return numpy.mean([low <= true_f1 <= high for _, low, high in found])

    def bootstrap(tp, fn, fp, tn):
        correct, true, predicted = evaluate.bootstrap_counts(torch.tensor([[tp, fn], [fp, tn]]).to_sparse())
        return evaluate.percentile_estimate((2 * correct / (true + predicted))[0])

    covered = coverage(lambda tp, fn, fp, tn: evaluate.f1_estimate(tp, tp + fn, tp + fp), 20_000)
    by_bootstrap = coverage(bootstrap, 500)
    print(f"support {support}, recall {recall}, precision {precision}: {covered:.3f}; bootstrap: {by_bootstrap:.3f}")
    assert 0.93 <= covered <= 0.97
    assert (support, recall) != (10, 0.95) or by_bootstrap < 0.8  # why the bootstrap is not used for this interval


def test_bootstrap_agrees_with_resampling_images():
    model, rng, resampled = random_model(4, 300), numpy.random.default_rng(1), []
    targets, predicted = model.predictions.targets, model.predictions.predicted
    for _ in range(1000):
        rows = rng.integers(300, size=300)
        true, found = targets[rows], predicted[rows]
        recalls = sklearn.recall_score(true, found, labels=range(3), average=None)
        resampled.append((sklearn.f1_score(true, found, labels=range(4), average="macro"), recalls.mean()))
    numbers = evaluate.to_json(model.metrics)
    for key, *bounds in zip(("macro_f1", "balanced_accuracy"), *numpy.percentile(resampled, (2.5, 97.5), axis=0)):
        low, high = numbers[f"{key}_ci95"]
        assert [low, high] == pytest.approx(bounds, abs=0.015) and low < numbers[key] < high
    assert evaluate.to_json(random_model(4, 300).metrics) == numbers  # the same seed gives the same bounds


def test_bootstrap_keeps_the_number_of_images():
    confusion = torch.tensor([[5, 1, 0], [2, 7, 0], [0, 0, 0]])
    correct, support, predicted = evaluate.bootstrap_counts(confusion.to_sparse())
    assert correct[:, 0].tolist() == [5, 7, 0]
    assert support[:, 0].tolist() == [6, 9, 0] and predicted[:, 0].tolist() == [7, 8, 0]
    assert (support.sum(0) == 15).all() and (predicted.sum(0) == 15).all() and len(correct[0].unique()) > 5


def test_mcnemar_agrees_with_scipy():
    assert evaluate.mcnemar(0, 0) == evaluate.mcnemar(7, 7) == 1
    assert evaluate.mcnemar(0, 6) == pytest.approx(2 / 64)
    for only_a, only_b in ((10, 2), (2, 10), (59, 91), (4000, 4300)):
        expected = stats.binomtest(only_a, only_a + only_b).pvalue
        assert evaluate.mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_paired_difference_by_hand():
    """8 / 102 plus and minus 1.96 * sqrt((14 / 102 - (8 / 102) ** 2) / 102), by Bonett and Price's formula."""
    assert evaluate.paired_difference(10, 2, 100) == pytest.approx((0.08, 0.0082, 0.1487), abs=1e-4)
    assert evaluate.paired_difference(2, 10, 100) == pytest.approx((-0.08, -0.1487, -0.0082), abs=1e-4)
    low, high = evaluate.paired_difference(0, 3, 3)[1], evaluate.paired_difference(3, 0, 3)[2]
    assert (low, high) == (-1, 1)  # not beyond what is possible


def test_unpaired_difference_agrees_with_the_paper():
    """Newcombe (1998), table II, method 10."""
    cases = [((56, 70), (48, 80), (0.0524, 0.3339)), ((9, 10), (3, 10), (0.1705, 0.8090))]
    cases += [((10, 10), (0, 10), (0.6075, 1)), ((5, 56), (0, 29), (-0.0381, 0.1926))]
    for a, b, bounds in cases:
        difference = evaluate.unpaired_difference(evaluate.wilson(*a), evaluate.wilson(*b))
        assert difference == pytest.approx((a[0] / a[1] - b[0] / b[1], *bounds), abs=1e-4)


def test_holm_by_hand():
    assert evaluate.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evaluate.holm([0.5, 0.9]) == [1, 1] and evaluate.holm([]) == []


def test_names_of_models_differ(tmp_path):
    paths = [tmp_path / name for name in ("a/model.pt", "b/a/model.pt", "a.pt", "c/model.pt", "b/history.csv", "...pt")]
    assert evaluate.short_names(paths) == ["a", "a-2", "a-3", "c", "b", "model"]  # not "..", the folder above


def test_pictures_show_at_most_40_classes(tmp_path):
    model = random_model(60, 900)
    confusion = model.predictions.confusion
    chosen, note = evaluate.classes_to_show(confusion)
    wrong = confusion.to_dense().fill_diagonal_(0)
    mistakes = [int(wrong[number].sum() + wrong[:, number].sum()) for number in range(60)]
    assert len(chosen) == 40 and chosen == sorted(chosen) and "40 of 60" in note
    left_out = set(range(60)) - set(chosen)
    assert min(mistakes[number] for number in chosen) >= max(mistakes[number] for number in left_out)
    evaluate.plot_confusion(tmp_path / "confusion.png", confusion, model.checkpoint.classes)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.width > 2000


def test_many_classes_take_little_memory(tmp_path):
    """The confusion matrix of these classes would have 10^11 cells; where it was dense, 10,000 classes took 5 GB."""
    scores, targets = torch.zeros(2, 300_000).index_fill_(1, torch.tensor([7]), 5), torch.tensor([7, 299_999])
    predictions = evaluate.Predictions(targets, scores.log_softmax(1), scores.log_softmax(1))
    names = [str(number) for number in range(300_000)]
    (pair,) = evaluate.confused_pairs(predictions.confusion, names)
    assert pair == {"true": "299999", "predicted": "7", "n": 1, "support": 1}
    chosen, _ = evaluate.classes_to_show(predictions.confusion)
    assert chosen[7] == 7 and chosen[-1] == 299_999
    evaluate.plot_confusion(tmp_path / "confusion.png", predictions.confusion, names)


def test_pictures_can_be_read(tmp_path, monkeypatch):
    """Captions of images of different shapes align, bins of one image are not connected, and curves follow in time."""
    figures = []
    for module in (common, evaluate):
        monkeypatch.setattr(module, "save_figure", lambda path, figure: figures.append(figure))
    pictures = [(tmp_path / f"{width}.png", "name\nclass") for width in (20, 40, 80)]
    for width, (path, _) in zip((20, 40, 80), pictures):
        Image.new("RGB", (width, 40)).save(path)
    common.draw_images(tmp_path / "grid.png", pictures, columns=2)
    figures[0].draw_without_rendering()
    first, second, third, _ = (axes.title.get_window_extent().y0 for axes in figures[0].axes)
    assert abs(first - second) < 1 and first > third
    evaluate.plot_reliability(tmp_path / "bins.png", random_model().metrics)
    upper = figures[1].axes[0]
    assert len(upper.lines) == 1 and len(set(upper.collections[0].get_sizes())) > 3
    (tmp_path / "history.csv").write_text(HISTORY)
    rows = evaluate.read_history(tmp_path / "history.csv")
    runs = [evaluate.History(Path("a"), "a", rows, rows[1], {"head_epochs": count}, "red") for count in (0, 5)]
    evaluate.plot_curves(tmp_path / "curves.png", runs)
    curves = [list(line.get_xdata()) for line in figures[2].axes[0].lines]
    assert [x[0] for x in curves if len(x) > 1] == [1, 1, 6, 6]


# ---------------------------------------------------------------- one model


def test_numbers_files_and_pictures(run, trained, hard_tree, tmp_path):
    out = tmp_path / "report"
    result = run("evaluate", "--checkpoint", trained.model, "--data", hard_tree, "--out", out)
    assert json.loads((out / "metrics.json").read_text()) == result.json
    predictions = read_csv(out / "predictions.csv")
    assert list(predictions[0]) == ["path", "true", "predicted", "probability"] and len(predictions) == 30
    correct = [row["true"] == row["predicted"] for row in predictions]
    assert result.json["n"] == 30 and result.json["accuracy"] == pytest.approx(sum(correct) / 30)
    assert all(row["path"].startswith(str(hard_tree / "test" / row["true"])) for row in predictions)
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in predictions)
    f1s = []
    for row in read_csv(out / "per_class.csv"):
        true = [prediction["true"] == row["class"] for prediction in predictions]
        predicted = [prediction["predicted"] == row["class"] for prediction in predictions]
        hits = sum(map(min, true, predicted))
        assert int(row["support"]) == sum(true) == {"blue": 11, "green": 12, "red": 7}[row["class"]]
        assert float(row["precision"]) == pytest.approx(hits / sum(predicted))
        assert float(row["recall"]) == pytest.approx(hits / sum(true))
        f1s.append(2 * hits / (sum(true) + sum(predicted)))
        assert float(row["f1"]) == pytest.approx(f1s[-1])
    assert len(f1s) == 3 and result.json["macro_f1"] == pytest.approx(sum(f1s) / 3)
    assert result.json["accuracy"] <= 25 / 30 and "top3_accuracy" not in result.json
    for name in ("curves.png", "confusion_matrix.png", "per_class.png", "reliability.png", "mistakes.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert "recall" in result.err


def test_intervals_and_coverage_in_the_files(run, trained, hard_tree, tmp_path):
    result = run("evaluate", "--checkpoint", trained.model, "--data", hard_tree, "--out", tmp_path / "out")
    numbers, predictions = result.json, read_csv(tmp_path / "out" / "predictions.csv")
    assert numbers["accuracy_ci95"][0] < numbers["accuracy"] < numbers["accuracy_ci95"][1]
    assert "Wilson" in numbers["intervals"]
    for key, label in evaluate.SUMMARY_METRICS.items():
        assert f"{label} is {numbers[key]:.4f}" in result.err and len(numbers[f"{key}_ci95"]) == 2
    for row, found in zip(read_csv(tmp_path / "out" / "per_class.csv"), numbers["per_class"]):
        assert list(row)[:5] == ["class", "precision", "recall", "f1", "support"]
        for key in ("precision", "recall", "f1"):
            assert [float(row[f"{key}_low"]), float(row[f"{key}_high"])] == pytest.approx(found[f"{key}_ci95"])
        assert float(row["f1_low"]) <= float(row["f1"]) <= float(row["f1_high"])
    for row in numbers["coverage"]:
        confident = [p["true"] == p["predicted"] for p in predictions if float(p["probability"]) >= row["threshold"]]
        accuracy = pytest.approx(sum(confident) / len(confident)) if confident else None
        assert row["n"] == len(confident) and row["accuracy"] == accuracy
    assert numbers["coverage"][0]["coverage"] == 1
    pairs = [(p["true"], p["predicted"]) for p in predictions if p["true"] != p["predicted"]]
    found = {(p["true"], p["predicted"]): p["n"] for p in numbers["confused_pairs"]}
    assert found == {pair: pairs.count(pair) for pair in pairs}
    first = numbers["confused_pairs"][0]
    sentence = f"{first['n']} of {first['support']} images of {first['true']} are classified as {first['predicted']}"
    assert sentence in result.err


def test_split_default_folder_and_agreement_with_training(run, trained, tree):
    metrics = load_pt(trained.model)["metrics"]
    for split in ("val", "test", "train"):
        result = run("evaluate", "--checkpoint", trained.model, "--data", tree, "--split", split).json
        assert result["accuracy"] == pytest.approx(trained.json[f"{split}_acc"])
        assert result["loss"] == pytest.approx(metrics[f"{split}_loss"], abs=1e-4)
        few, *notes = result["notes"]
        assert "val has only 24 images: even 100% correct may mean a true 86%" in few and bool(notes) == (
            split != "test"
        )
    assert (trained.folder / "report" / "metrics.json").exists()


def test_classes_are_matched_by_name(run, trained, tree, tmp_path):
    """If a split lacks the first class, the labels of the others are not shifted."""
    data = tmp_path / "data"
    shutil.copytree(tree, data)
    shutil.rmtree(data / "test" / "blue")
    args = ["--checkpoint", trained.model, "--data", data, "--out", tmp_path / "out"]
    result = run("evaluate", *args)
    assert result.json["accuracy"] >= 0.9 and "blue" in result.err
    (data / "test" / "red").rename(data / "test" / "crimson")
    assert "crimson" in run("evaluate", *args, code=2).error[0]


def test_allow_missing(run, trained, tree, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tree, data)
    shutil.copytree(data / "test" / "red", data / "test" / "crimson")
    args = ["--checkpoint", trained.model, "--data", data, "--out", tmp_path / "out"]
    assert "crimson (10 images)" in run("evaluate", *args, code=2).error[0]
    result = run("evaluate", *args, "--allow-missing")
    assert result.json["n"] == 30 and "crimson (10 images)" in result.err
    shutil.rmtree(data / "test" / "blue")  # now a class of the model is absent too
    result = run("evaluate", *args, "--allow-missing")
    assert result.json["n"] == 20 and "no images of these classes: blue" in result.err
    assert next(row for row in result.json["per_class"] if row["class"] == "blue")["recall"] is None
    for name in ("red", "green"):
        shutil.rmtree(data / "test" / name)
    assert "no images of known classes" in run("evaluate", *args, "--allow-missing", code=2).error[0]


def test_balanced_accuracy_is_shown_where_class_sizes_differ(run, trained, tree, hard_tree, tmp_path):
    always_red = save_changed(trained, tmp_path / "red.pt", state_dict=constant_weights(trained, 2))
    args = ["--checkpoint", trained.model, always_red, "--out", tmp_path / "out", "--data"]
    same, different = run("evaluate", *args, tree), run("evaluate", *args, hard_tree)
    for model in same.json["models"]:
        assert model["balanced_accuracy"] == pytest.approx(model["accuracy"])
        assert len(model["balanced_accuracy_ci95"]) == 2
    assert "balanced accuracy" not in same.err
    model = different.json["models"][0]
    recalls = [row["recall"] for row in model["per_class"]]
    assert model["balanced_accuracy"] == pytest.approx(sum(recalls) / 3) != model["accuracy"]
    assert different.err.count(f"balanced accuracy is {model['balanced_accuracy']:.4f} (95% interval") == 1
    (heading,) = [line for line in different.err.splitlines() if line.startswith("model [95% interval]")]
    assert "balanced accuracy" in heading


def test_images_that_the_model_has_seen(run, trained, tree, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(tree, data)
    args = ["--checkpoint", trained.model, "--data", data, "--out", out]
    clean = run("evaluate", *args)
    assert clean.json["seen_in_training"] == clean.json["seen_in_val"] == 0
    assert "accuracy_unseen" not in clean.json and clean.err.count("warning") == 1  # of the size of val
    for split, sentence in (("train", "trained on 60"), ("val", "epoch was chosen on 24")):
        result = run("evaluate", *args, "--split", split)
        seen = {"seen_in_training": 60 * (split == "train"), "seen_in_val": 24 * (split == "val")}
        assert {key: result.json[key] for key in seen} == seen and result.json["accuracy_unseen"] is None
        assert sentence in result.err
    for split, folder, number in (("train", "test", 4), ("val", "test", 2), ("train", "val", 3)):
        for index in range(number):  # blue images among the green ones, so that the model is wrong
            shutil.copy(tree / split / "blue" / f"blue {index}.png", data / folder / "green" / f"{split} {index}.png")
    result, on_val = run("evaluate", *args), run("evaluate", *args, "--split", "val", "--out", tmp_path / "val")
    unseen = [
        row
        for row in read_csv(out / "predictions.csv")
        if Path(row["path"]).stem.split()[0] in ("red", "blue", "green")
    ]
    accuracy = sum(row["true"] == row["predicted"] for row in unseen) / 30
    assert len(unseen) == 30 and result.json["n"] == 36 and result.json["accuracy_unseen"] == pytest.approx(accuracy)
    assert (result.json["seen_in_training"], result.json["seen_in_val"]) == (4, 2)
    sentence = (
        "Of these 36 images, the model was trained on 4, and its epoch was chosen on 2; without these the accuracy is "
    )
    low, high = result.json["accuracy_unseen_ci95"]
    sentence += f"{accuracy:.4f} (95% interval {low:.4f} to {high:.4f})."
    assert f"\nIs this a fair test?\n{sentence}\n" in result.err
    assert sentence in Page((out / "report.html").read_text()).text
    assert (
        "Of these 27 images, the model was trained on 3, and its epoch was chosen on 24; there are no others."
        in on_val.err
    )
    none = short_hashes([])
    old = save_changed(trained, tmp_path / "old.pt", train_hashes=none, val_hashes=none)
    result = run("evaluate", "--checkpoint", old, *args[2:])
    assert (
        result.json["seen_in_training"] is result.json["seen_in_val"] is None
        and "does not say which images" in result.err
    )


def test_ece_is_compared_with_its_level_by_chance(run, trained, hard_tree, tmp_path):
    unsure = save_changed(trained, tmp_path / "unsure.pt", temperature=20.0)
    result = run("evaluate", "--checkpoint", unsure, "--data", hard_tree, "--out", tmp_path / "out")
    mean, bound = result.json["ece_if_perfect"], result.json["ece_if_perfect_p95"]
    assert 0 < mean < bound < 1
    sentence = (
        f"The expected calibration error (ECE) is {result.json['ece']:.4f}; for a perfectly calibrated model, it "
    )
    sentence += f"would be {mean:.4f} on average, and at most {bound:.4f} in 95% of cases."
    assert sentence in result.err


def test_thresholds_are_chosen_on_val(run, trained, tree, tmp_path):
    args = ["--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "out", "--split"]
    test, val = run("evaluate", *args, "test").err, run("evaluate", *args, "val").err
    assert "Choose P from the table of --split val" in test and "too optimistic" in test
    assert "Choose P from this table, which is that of val." in val
    assert "evaluate.py --split val" in " ".join(command("predict", "--help").stdout.split())


def test_fail_under(run, trained, hard_tree, tmp_path, monkeypatch):
    args = ["--checkpoint", trained.model, "--data", hard_tree, "--out", tmp_path / "out"]
    assert run("evaluate", *args, "--fail-under", 0.99, code=4).json["accuracy"] < 0.99
    with monkeypatch.context() as patch, pipe_without_reader() as pipe:
        patch.setattr(sys, "stdout", pipe)
        assert "below --fail-under" in run("evaluate", *args, "--fail-under", 0.99, code=4).error[0]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # where what a person wants to read comes last
    result = run("evaluate", *args, "--fail-under", 0.1)
    assert result.out == "" and f"; report: {tmp_path}/out/report.html" in result.error[0]
    run("evaluate", *args, "--fail-under", 93, code=2)


def test_hash_of_the_data_depends_on_its_content_only(run, trained, tree, tmp_path):
    result = run("evaluate", "--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "out")
    found = result.json["data_sha256"]
    files = sorted((tree / "test").rglob("*.png"))
    lines = sorted(f"{path.parent.name}/{hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files)
    assert found == hashlib.sha256("".join(lines).encode()).hexdigest()
    labels = [path.parent.name for path in files]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert evaluate.hash_split(hashes[::-1], labels[::-1]) == found  # in any order, so with any file names
    assert evaluate.hash_split(hashes, ["red", *labels[1:]]) != found


def test_mistakes_are_shown_and_removed(run, trained, hard_tree, tmp_path):
    """Those of an earlier report; the user's own files stay, whatever their names, and what another program lists."""
    (tmp_path / "out").mkdir()
    for name in ("keep.txt", "out/curves.png", "out/comparison.png"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "out" / "metrics.json").write_text('{"report_files": ["../keep.txt"], "x": NaN}')
    args = ["--out", tmp_path / "out", "--data", hard_tree, "--checkpoint"]
    model = save_changed(trained, tmp_path / "model.pt")  # without a history
    wrong = round(30 * (1 - run("evaluate", *args, model).json["accuracy"]))
    with Image.open(tmp_path / "out" / "mistakes.png") as picture:
        assert 0 < wrong <= 10 and picture.height > 300 * -(-wrong // 5)
    for name in ("blue", "green"):
        shutil.rmtree(hard_tree / "test" / name)
    always_red = save_changed(trained, tmp_path / "red.pt", state_dict=constant_weights(trained, 2))
    result = run("evaluate", *args, always_red)
    assert result.json["accuracy"] == 1 and result.json["confused_pairs"] == []
    assert not (tmp_path / "out" / "mistakes.png").exists()
    for name in ("keep.txt", "out/curves.png", "out/comparison.png"):
        assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("how", ["signal", "death"])
def test_interrupted_report_is_old_or_new(tmp_path, monkeypatch, how):
    """A signal waits until all files are replaced; what a death leaves has no file of the old report."""
    rename, renamed, out = Path.replace, [], tmp_path / "out"

    def write(text):
        with evaluate.replace_report(out, ["", "b"]) as folder:
            for name in (files := ["a.csv", "b/a.csv", "report.html", "metrics.json"]):
                (folder / name).write_text(text)
            (folder / "metrics.json").write_text(json.dumps({"report_files": files, "text": text}))

    def rename_and_act(path, target):
        renamed.append(path.name)
        if len(renamed) == 2:
            os.kill(os.getpid(), signal.SIGTERM) if how == "signal" else rename(path, tmp_path / "none" / "x")
        return rename(path, target)

    signal.signal(signal.SIGTERM, handle_signal)  # as in the scripts
    write("old")
    monkeypatch.setattr(Path, "replace", rename_and_act)
    with pytest.raises(KeyboardInterrupt if how == "signal" else OSError):
        write("new")
    texts = {path.name: path.read_text() for path in out.rglob("*") if path.is_file()}
    assert texts["a.csv"] == "new" and "old" not in str(texts) and not list(out.glob(".*"))
    assert ("metrics.json" in texts) == ("report.html" in texts) == (how == "signal")
    (out / ".report.x.tmp").mkdir()
    with hold_lock(out / ".lock"), pytest.raises(LockedError):
        write("third")
    write("third")
    assert names(out) == ["a.csv", "b", "metrics.json", "report.html"]


# ---------------------------------------------------------------- several models, views


def test_comparison(run, trained, tree, tmp_path):
    """Three models: the trained one, the same with its classes in another order, and one that always predicts red."""
    state, order = load_pt(trained.model)["state_dict"], [2, 0, 1]
    reordered = {**state, "fc.weight": state["fc.weight"][order], "fc.bias": state["fc.bias"][order]}
    same = save_changed(trained, tmp_path / "a" / "model.pt", state_dict=reordered, classes=["red", "blue", "green"])
    always_red = save_changed(trained, tmp_path / "b" / "dull.pt", state_dict=constant_weights(trained, 2))
    args = ["--checkpoint", trained.model, same, always_red, "--data", tree, "--out", tmp_path / "out"]
    result = run("evaluate", *args, "--fail-under", 0.5)
    first, second, third = result.json["models"]
    name = trained.folder.name
    assert [model["name"] for model in result.json["models"]] == [name, "a", "dull"]
    assert result.json["accuracy"] == first["accuracy"] == second["accuracy"] > third["accuracy"]
    assert third["accuracy"] == pytest.approx(1 / 3)
    weights = [value for key, value in state.items() if "running" not in key and "num_" not in key]
    assert first["parameters"] == sum(value.numel() for value in weights)
    assert all(model["ms_per_image"] > 0 and len(model["accuracy_ci95"]) == 2 for model in result.json["models"])
    ab, ac, bc = result.json["comparisons"]
    assert (ab["only_a_right"], ab["only_b_right"], ab["p"], ab["difference"]) == (0, 0, 1, 0)
    assert "No evidence" in ab["words"]
    hits = round(30 * first["accuracy"])
    assert ac["difference"] == pytest.approx(hits / 30 - 1 / 3) and ac["difference_ci95"][0] > 0
    assert ac["p"] == pytest.approx(stats.binomtest(ac["only_b_right"], ac["only_a_right"] + ac["only_b_right"]).pvalue)
    assert ac["p_holm"] == bc["p_holm"] == pytest.approx(3 * ac["p"])  # the two smallest of three
    assert "McNemar" in ac["test"] and f"{name} is better than dull" in ac["words"] and ac["words"] in result.err
    for folder in (tmp_path / "out", tmp_path / "out" / "a", tmp_path / "out" / "dull"):
        assert len(read_csv(folder / "predictions.csv")) == 30 and (folder / "per_class.csv").exists()
    assert {row["predicted"] for row in read_csv(tmp_path / "out" / "dull" / "predictions.csv")} == {"red"}
    report = (tmp_path / "out" / "report.html").read_text()
    assert ac["words"].replace("'", "&#x27;") in report and (tmp_path / "out" / "comparison.png").exists()
    assert "none.pt" in run("evaluate", *args[:3], tmp_path / "none.pt", *args[4:], code=2).error[0]
    assert str(trained.model) in run("evaluate", *args, "--tta", code=2).error[0]
    rest = ["--data", tree, "--out", tmp_path / "out"]
    run("evaluate", "--checkpoint", always_red, trained.model, *rest, "--fail-under", 0.5, code=4)
    run("evaluate", "--checkpoint", trained.model, *rest)
    assert set(names(tmp_path / "out")).isdisjoint(["comparison.png", "a", "dull"])  # of the earlier reports


def test_views_are_averaged(run, trained, tree, tmp_path):
    model = save_changed(trained, tmp_path / "model.pt", views=[(turns, False) for turns in range(4)])
    single = run("evaluate", "--checkpoint", model, "--data", tree).json
    result = run("evaluate", "--checkpoint", model, model, "--data", tree, "--tta")
    assert result.json["nll"] != single["nll"] and result.json["tta"] and "4 views of each image" in result.err
    assert result.json["comparisons"][0]["p"] == 1


# ---------------------------------------------------------------- training curves


def write_run(trained, folder, history, **metrics):
    """Write a model with these metrics and the history beside it, and return the path of the history."""
    save_changed(trained, folder / "model.pt", metrics=metrics)
    (folder / "history.csv").write_text(history)
    return folder / "history.csv"


def test_curves_and_overfitting(run, trained, tree, tmp_path):
    (tmp_path / "over.csv").write_text(HISTORY)
    (tmp_path / "noval.csv").write_text(HISTORY_WITHOUT_VAL)
    args = ["--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "out", "--history"]
    result = run("evaluate", *args, tmp_path / "over.csv", tmp_path / "noval.csv", trained.folder / "history.csv")
    over, noval, own = result.json["curves"]
    assert over["best_epoch"] == 2  # of two epochs with the same accuracy, that with the lower loss
    assert over["gap"] == pytest.approx(0.05) and over["test_acc"] is None and over["gap_ci95"] is None
    assert "a gap of 5.00 points (interval unknown, because no model" in over["words"]
    assert "overfit" not in over["words"] and "rises after epoch 2" in over["words"] and over["words"] in result.err
    assert noval["best_epoch"] == 3 and noval["gap"] is None
    assert own["best_epoch"] == trained.json["best_epoch"] and own["val_acc"] == trained.json["val_acc"]
    assert own["gap_ci95"][0] <= own["gap"] <= own["gap_ci95"][1] and "interpolated" not in own["words"]
    three = (tmp_path / "out" / "curves.png").read_bytes()
    run("evaluate", *args, tmp_path / "over.csv")
    assert (tmp_path / "out" / "curves.png").read_bytes() != three
    for text in ("", HISTORY.splitlines()[0], HISTORY.replace("0.60", "none")):
        (tmp_path / "odd.csv").write_text(text)
        assert "odd.csv" in run("evaluate", *args, tmp_path / "odd.csv", code=2).error[0]


def test_overfitting_is_claimed_only_beyond_chance(run, trained, tree, tmp_path):
    """The same gap, 80% on train and 75% on val, with few and with many images, in models that are not evaluated."""
    few = write_run(trained, tmp_path / "few", HISTORY, epoch=2, measured={"train": 1000, "val": 100})
    many = write_run(trained, tmp_path / "many", HISTORY, epoch=2, measured={"train": 1000, "val": 10000}, alpha=0.5)
    zero = write_run(trained, tmp_path / "zero", HISTORY, epoch=2, measured={"train": 1000, "test": 5}, alpha=0)
    args = ["--data", tree, "--out", tmp_path / "out", "--checkpoint"]
    counts = {"train": 1000, "val": 10000}
    falling = write_run(trained, tmp_path / "falling", FALLING, epoch=2, measured=counts)
    flat = write_run(trained, tmp_path / "flat", FALLING.replace("0.7,", "0.795,"), epoch=2, measured=counts)
    other = write_run(trained, tmp_path / "other", FALLING, epoch=2, measured=counts, val_loss=0.71)
    alpha = write_run(trained, tmp_path / "alpha", FALLING, epoch=2, lr=0.2, val_loss=0.71, alpha=0.5)
    mixed = write_run(
        trained, tmp_path / "mixed", HISTORY, epoch=2, alpha=0.5, train_acc=0.78, val_acc=0.77, val_loss=0.6
    )
    histories = [few, many, zero, falling, flat, other, alpha, mixed]
    result = run("evaluate", *args, trained.model, "--history", *histories)
    few, many, zero, falling, flat, mixed = result.json["curves"]
    assert mixed["gap"] == pytest.approx(0.01) and "Accuracy is 78.00% on train and 77.00% on val" in mixed["words"]
    assert "the best epoch is 2 of 3, by the calibrated loss on val." in mixed["words"]
    for name in ("other", "alpha"):  # trained again and interrupted
        assert f"no training curves: {tmp_path / name / 'history.csv'} is of another run" in result.err
    assert falling["words"].endswith("30.01); the loss on val was still falling: train longer (--epochs).")
    assert flat["words"].endswith("it overfits; the loss on val does not rise.")  # it fell by less than 1%
    assert few["gap_ci95"] == pytest.approx([-0.0289, 0.1460], abs=1e-4) and few["gap"] == pytest.approx(0.05)
    assert "a gap of 5.00 points (95% interval -2.89 to 14.60): this can be chance; the loss" in few["words"]
    assert many["gap_ci95"][0] > 0 and "it overfits; the loss" in many["words"]
    assert "interpolated between those before fine-tuning (alpha 0) and" in many["words"]
    assert many["words"].endswith("with alpha 0.5.") and zero["words"].endswith("with alpha 0.")
    assert zero["gap_ci95"] is None and "interval unknown" in zero["words"]
    beside = run("evaluate", *args, tmp_path / "many" / "model.pt").json["curves"]  # now it is evaluated
    assert [{**beside[0], "words": "", "history": ""}] == [{**many, "words": "", "history": ""}]
    (tmp_path / "few" / "model.pt").write_bytes(b"damaged")
    (damaged,) = run("evaluate", *args, trained.model, "--history", tmp_path / "few" / "history.csv").json["curves"]
    assert damaged["gap"] == pytest.approx(0.05) and damaged["gap_ci95"] is None


def test_curves_of_a_split_that_is_not_measured_in_every_epoch(run, trained, tree, tmp_path, monkeypatch):
    figures, save_figure = [], evaluate.save_figure
    monkeypatch.setattr(evaluate, "save_figure", lambda *args: (figures.append(args), save_figure(*args)))
    write_run(trained, tmp_path, HISTORY_WITH_GAPS, epoch=4, measured={"train": 1000, "test": 500})
    args = ["--checkpoint", tmp_path / "model.pt", "--data", tree, "--out", tmp_path / "out"]
    (curve,) = run("evaluate", *args).json["curves"]
    assert curve["best_epoch"] == 4 and curve["gap"] == pytest.approx(0.15) and curve["gap_ci95"][0] > 0.1
    assert "a gap of 15.00 points" in curve["words"] and "the loss on test rises after epoch 2" in curve["words"]
    write_run(trained, tmp_path, HISTORY_WITH_GAPS, epoch=5, measured={"train": 1000, "test": 500})
    (curve,) = run("evaluate", *args).json["curves"]
    assert curve["gap"] is curve["gap_ci95"] is curve["test_acc"] is None and curve["train_acc"] == 0.99
    labels = []
    for figure in [figure for path, figure in figures if path.name == "curves.png"]:
        (line,) = [line for line in figure.axes[1].lines if line.get_label().startswith("test")]
        assert list(line.get_xdata()) == [2, 4] and list(line.get_ydata()) == [0.70, 0.75]
        dots = [
            (line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[1].lines if len(line.get_xdata()) == 1
        ]
        labels.append((line.get_label(), (4, 0.75) in dots))
    assert labels == [("test 0.7500", True), ("test", False)]


def test_without_history_there_are_no_curves(run, trained, tree, tmp_path):
    shutil.copy(trained.model, tmp_path / "model.pt")
    args = ["--checkpoint", tmp_path / "model.pt", "--data", tree]
    result = run("evaluate", *args)
    assert "no training curves" in result.err and not (tmp_path / "report" / "curves.png").exists()
    run("evaluate", *args, "--history", tmp_path / "none.csv", code=2)
    (tmp_path / "odd.csv").write_text("a,b\nx,y\n")
    assert "odd.csv" in run("evaluate", *args, "--history", tmp_path / "odd.csv", code=2).error[0]


# ---------------------------------------------------------------- report page


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_report_is_self_contained_and_escaped(run, trained, tree, tmp_path):
    """Class names, file names and a path that would break a page, a picture or a table if they were not escaped."""
    names = {"blue": '<script>alert("1")<', "green": "a'b&amp;\n$x^$", "red": os.fsdecode(b"\xff\xe9")}
    data = tmp_path / 'a"><img src=x>'
    for name, odd in names.items():
        shutil.copytree(tree / "test" / name, data / "test" / odd)
    shutil.move(data / "test" / names["red"] / "red 0.png", data / "test" / names["blue"] / "<b>\n.png")
    options = {"data": "</table><i>", "weight_decay": "0.1"}  # that differ from the defaults
    changes = {"classes": list(names.values()), "args": {"batch_size": 64, "changed": options}, "date": "2020-02-02"}
    model = save_changed(trained, tmp_path / "odd" / "model.pt", **changes)
    result = run("evaluate", "--checkpoint", model, "--data", data)
    out = tmp_path / "odd" / "report"
    page = Page((out / "report.html").read_text())
    allowed = "html meta title style h1 h2 section p div table tr th td img"
    assert {tag for tag, _ in page.tags} <= set(allowed.split())
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 4 and all(source.startswith("data:image/png;base64,") for source in pictures)
    assert not any("href" in attributes for _, attributes in page.tags)
    assert "url(" not in page.text and "@import" not in page.text
    escaped = ['<script>alert("1")<', "a'b&amp;\\n$x^$", "</table><i>"]
    origin = ["python evaluate.py --checkpoint", str(torch.__version__), result.json["data_sha256"], "30 images"]
    origin += [hash_file(model), "2020-02-02", "--weight-decay", f"odd (resnet18) on {data.name}/test, 20"]
    for part in (*escaped, *origin, "resnet18", "<b>\\n.png"):
        assert part in page.text
    assert "--batch-size" not in page.text
    assert (result.json["checkpoint_sha256"], result.json["trained"]) == (hash_file(model), "2020-02-02")
    assert {row["class"] for row in read_csv(out / "per_class.csv")} == set(names.values())
    assert {row["class"] for row in result.json["per_class"]} == set(names.values())


# ---------------------------------------------------------------- invalid input


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("script, rest", [("evaluate", ["--data", "x"]), ("predict", ["x.png"])])
def test_files_that_are_not_checkpoints(run, trained, tmp_path, script, rest):
    content, complete = load_pt(trained.model), trained.model.read_bytes()
    (tmp_path / "cut.pt").write_bytes(complete[: len(complete) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({**content, "extra": Evil(tmp_path / "marker")}, tmp_path / "evil.pt")
    torch.save(content["state_dict"], tmp_path / "plain.pt")
    torch.save({key: value for key, value in content.items() if key != "classes"}, tmp_path / "part.pt")
    torch.save({**content, "version": 99}, tmp_path / "new.pt")
    torch.save({**content, "model_kwargs": {"num_classes": 7}}, tmp_path / "odd.pt")
    torch.save({**content, "arch": "resnet34"}, tmp_path / "shape.pt")
    torch.save({**content, "arch": "resnet1000"}, tmp_path / "arch.pt")
    shutil.copy(trained.folder / "last.pt", tmp_path / "run.pt")
    for name, words in {
        "cut": "damaged",
        "empty": "damaged",
        "text": "damaged",
        "evil": "refused",
        "plain": "state dict",
        "part": "missing or invalid classes",
        "odd": "missing or invalid classes",
        "new": "written by a newer version of this program: missing or invalid version",
        "arch": "cannot be built",
        "run": "pass the model.pt",
        "shape": "layer1.2.conv1.weight",
        "absent": "no such file",
    }.items():
        (error,) = run(script, "--checkpoint", tmp_path / f"{name}.pt", *rest, code=2).error
        assert words in error and f"{name}.pt" in error
    assert not (tmp_path / "marker").exists()


def test_bad_data(run, trained, tree, tmp_path):
    data = tmp_path / "data"
    args = ["--checkpoint", trained.model, "--data", data, "--out", tmp_path / "out"]
    assert "no such folder" in run("evaluate", *args, code=2).error[0]
    shutil.copytree(tree, data)
    assert "other/" in run("evaluate", *args, "--split", "other", code=2).error[0]
    for out in ("test/red", "train/new/report", "val"):  # otherwise its pictures would be images of the next run
        assert f"{out} would replace or be inside" in run("evaluate", *args, "--out", data / out, code=2).error[0]
    assert not (data / "train" / "new").exists()
    (data / "test" / "red" / "bad.png").write_bytes(b"no image")
    assert "bad.png" in run("evaluate", *args, code=2).error[0]


# ---------------------------------------------------------------- the feature cache


def test_each_view_is_compared_with_the_cache(run, trained, tree, tmp_path, monkeypatch):
    """Also if there are hardly more images than views."""
    model = save_changed(trained, tmp_path / "model.pt", views=common.VIEWS["dihedral"])
    for name in ("blue", "red"):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        for image in sorted((tree / "test" / name).iterdir())[:5]:
            shutil.copy(image, tmp_path / "data" / "test" / name)
    args = ["--checkpoint", model, "--data", tmp_path / "data", "--tta", "--cache", tmp_path / "cache"]
    run("evaluate", *args)
    checked, forward_views = [], common.InferenceModel.forward_views
    monkeypatch.setattr(common.InferenceModel, "forward_views", lambda *a: checked.extend(a[2]) or forward_views(*a))
    run("evaluate", *args)
    assert sorted(checked) == sorted(common.VIEWS["dihedral"])


def test_features_are_not_computed_twice(run, tree, tmp_path):
    """evaluate.py knows the features from training, also of views; the numbers are those without a cache."""
    cache, out = ["--cache", tmp_path / "cache"], tmp_path / "out"
    run("train", "--data", tree, "--out", out, "--epochs", 2, "--augment", "flip", *cache, *SMALL)
    args = ["--checkpoint", out / "model.pt", "--data", tree, "--out", tmp_path / "report"]
    with_cache = run("evaluate", *args, *cache)
    assert "features: 30 remembered" in with_cache.err and ", 0 to compute" in with_cache.err
    assert "30 remembered" in run("evaluate", *args, *cache, "--tta").err  # the mirror images are new
    assert "60 remembered" in run("evaluate", *args, *cache, "--tta").err
    assert "120 remembered" in run("evaluate", *args, *cache, "--tta", "--split", "train").err
    without = run("evaluate", *args, "--no-cache")
    assert "remembered" not in without.err
    keys = ("accuracy", "loss", "ece", "brier", "macro_f1")
    assert [with_cache.json[key] for key in keys] == pytest.approx([without.json[key] for key in keys], abs=1e-6)
    assert with_cache.json["ms_per_image"] > 0
    assert 0 <= with_cache.json["unfamiliar_at_1_percent"] <= with_cache.json["unfamiliar_at_5_percent"] < 0.5


def test_wrong_features_in_the_cache_are_noticed(run, tree, tmp_path):
    """Features of other images, in a file that is not damaged."""
    cache = tmp_path / "cache"
    args = ["--data", tree, "--cache", cache]
    run("train", *args, "--out", tmp_path / "out", "--epochs", 1, *SMALL)
    (file,) = cache.glob("*/*.pt")
    content = load_pt(file)
    content["features"] = content["features"].roll(1, 0)
    torch.save(content, tmp_path / "new.pt")
    file.unlink()
    shutil.copy(tmp_path / "new.pt", file.with_name(hash_file(tmp_path / "new.pt") + ".pt"))
    args += ["--checkpoint", tmp_path / "out" / "model.pt", "--out", tmp_path / "report"]
    message = run("evaluate", *args, code=2).error[0]
    assert str(cache) in message and "--no-cache" in message and not (tmp_path / "report" / "report.html").exists()
    run("evaluate", *args, "--no-cache")


# ---------------------------------------------------------------- whether the test is fair


def test_near_duplicates_are_in_the_report(run, tree, tmp_path):
    """As far as train.py --audit has looked for them, and only those in train."""
    out = tmp_path / "out"
    run("train", "--data", tree, "--out", out, "--epochs", 1, *SMALL)
    args = ["--checkpoint", out / "model.pt", "--data", tree, "--out", tmp_path / "report"]
    before = run("evaluate", *args).err
    assert "The model was trained on none of these 30 images." in before and "were not looked for" in before
    header = "path,other_path,split,other_split,class,other_class,similarity\n"
    pairs = "train/red/red 1.png,test/red/red 2.png,train,test,red,red,0.99\n"
    pairs += "val/red/red 1.png,test/red/red 3.png,val,test,red,red,0.98\n"
    (out / "duplicates.csv").write_text(header + pairs)
    text = "Images with near-duplicates in train, by duplicates.csv: 1 (test/red/red 2.png and train/red/red 1.png)."
    assert text in run("evaluate", *args).err
    assert "Is this a fair test?" in (tmp_path / "report" / "report.html").read_text()
    (out / "duplicates.csv").write_text(header)
    none = f"duplicates.csv, which was made from {tree}, lists none of these images with train."
    assert none in run("evaluate", *args).err
    (out / "duplicates.csv").write_text(header + "x" * (1 << 18))  # which the csv module refuses
    assert "Near-duplicates of training images are unknown" in run("evaluate", *args).err
