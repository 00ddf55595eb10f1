"""evaluate.py: numbers that agree with scikit-learn's and a count by hand, files, pictures, the report, what it refuses."""
import csv
import hashlib
import json
import os
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn import metrics as sklearn

import evaluate


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
    for name in ("curves.png", "confusion_matrix.png", "per_class.png", "reliability.png", "mistakes.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert "recall" in result.err


def test_split_default_folder_and_agreement_with_training(run, trained, tree):
    for split in ("val", "test", "train"):
        result = run("evaluate", "--checkpoint", trained.model, "--data", tree, "--split", split).json
        assert result["accuracy"] == pytest.approx(trained.json[f"{split}_acc"]) and bool(result["notes"]) == (split != "test")
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


def save_changed(trained, path, **changes):
    """A copy of the trained checkpoint with some entries changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**torch.load(trained.model, weights_only=True), **changes}, path)
    return path


def one_answer(trained, answer):
    """The trained weights, but for a classifier that gives the same answer to every image."""
    state = torch.load(trained.model, weights_only=True)["state_dict"]
    return {**state, "fc.weight": torch.zeros_like(state["fc.weight"]), "fc.bias": torch.eye(3)[answer]}


def made_model(classes=7, n=400, seed=0):
    """A model's answers, made up: the last class is never true, and about half are right."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes - 1, (n,), generator=generator)
    logits = 1.5 * torch.randn(n, classes, generator=generator).double()
    logits[torch.arange(n), targets] += 2
    model = SimpleNamespace(name="made", classes=[f"class {number}" for number in range(classes)], targets=targets, views=[(0, False)],
                            raw=logits.log_softmax(1), calibrated=(logits / 0.7).log_softmax(1), temperature=0.7,
                            network=torch.nn.Linear(2, 2), speed={"ms_per_image": 1.0, "timing": "made up"})
    evaluate.measure(model)
    return model


def test_numbers_agree_with_scikit_learn():
    model = made_model()
    truth, said, labels = model.targets.numpy(), model.predicted.numpy(), range(7)
    numbers = evaluate.plain(model.metrics)
    assert (model.confusion.numpy() == sklearn.confusion_matrix(truth, said, labels=labels)).all()
    precision, recall, f1, support = sklearn.precision_recall_fscore_support(truth, said, labels=labels, zero_division=numpy.nan)
    for row, *expected in zip(numbers["per_class"], precision, recall, f1, support):
        found = [numpy.nan if row[key] is None else row[key] for key in ("precision", "recall", "f1", "support")]
        assert found == pytest.approx(expected, nan_ok=True)
    assert numbers["per_class"][6]["recall"] is None and numbers["per_class"][6]["recall_ci95"] is None
    assert numbers["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, said))
    assert numbers["macro_f1"] == pytest.approx(sklearn.f1_score(truth, said, average="macro"))
    for scores, suffix in ((model.raw, "_uncalibrated"), (model.calibrated, "")):
        shares = scores.exp().numpy()
        assert numbers[f"nll{suffix}"] == pytest.approx(sklearn.log_loss(truth, shares, labels=labels))
        brier = sum(sklearn.brier_score_loss(truth == label, shares[:, label]) for label in labels)
        assert numbers[f"brier{suffix}"] == pytest.approx(brier)
        top, right, ece = shares.max(1), shares.argmax(1) == truth, 0
        for low in numpy.arange(15) / 15:
            inside = (top > low) & (top <= low + 1 / 15)
            ece += abs(right[inside].sum() - top[inside].sum()) / 400
        assert numbers[f"ece{suffix}"] == pytest.approx(ece)
        assert all(row["bin"] < 15 * row["probability"] <= row["bin"] + 1 for row in numbers[f"reliability{suffix}"])
    assert numbers["loss"] == numbers["nll_uncalibrated"] != numbers["nll"]
    for k in (3, 5):
        assert numbers[f"top{k}_accuracy"] == pytest.approx(sklearn.top_k_accuracy_score(truth, model.calibrated.numpy(), k=k, labels=labels))


def test_intervals_agree_with_scipy_and_with_resampling_images():
    for part, whole in ((0, 5), (5, 5), (1, 30), (5072, 5400)):
        expected = stats.binomtest(part, whole).proportion_ci(method="wilson")
        assert evaluate.wilson(part, whole) == pytest.approx((part / whole, expected.low, expected.high))
    assert evaluate.wilson(15, 50)[1:] == pytest.approx((0.1910, 0.4375), abs=1e-4)  # Wilson's formula by hand
    model, rng, f1s = made_model(4, 300), numpy.random.default_rng(1), []
    for _ in range(1000):
        rows = rng.integers(300, size=300)
        f1s.append(sklearn.f1_score(model.targets[rows], model.predicted[rows], labels=range(3), average=None))
    expected = numpy.percentile(f1s, (2.5, 97.5), axis=0)
    for row, *bounds in zip(evaluate.plain(model.metrics)["per_class"], *expected):
        assert row["f1_ci95"] == pytest.approx(bounds, abs=0.015) and row["f1_ci95"][0] < row["f1"] < row["f1_ci95"][1]
    numbers = evaluate.plain(model.metrics)
    assert numbers["macro_f1_ci95"][0] < numbers["macro_f1"] < numbers["macro_f1_ci95"][1]
    assert evaluate.plain(made_model(4, 300).metrics) == numbers  # the same seed, the same bounds


def test_mcnemar_is_exact():
    assert evaluate.mcnemar(0, 0) == evaluate.mcnemar(7, 7) == 1
    assert evaluate.mcnemar(0, 6) == pytest.approx(2 / 64)
    for b, c in ((10, 2), (2, 10), (59, 91), (4000, 4300)):
        assert evaluate.mcnemar(b, c) == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-9)


def test_intervals_and_coverage_in_the_files(run, trained, hard_tree, tmp_path):
    result = run("evaluate", "--checkpoint", trained.model, "--data", hard_tree, "--out", tmp_path / "out")
    numbers, predictions = result.json, read_csv(tmp_path / "out" / "predictions.csv")
    assert numbers["accuracy_ci95"][0] < numbers["accuracy"] < numbers["accuracy_ci95"][1] and "Wilson" in numbers["intervals"]
    for row, found in zip(read_csv(tmp_path / "out" / "per_class.csv"), numbers["per_class"]):
        assert list(row)[:5] == ["class", "precision", "recall", "f1", "support"]
        assert [float(row["recall_low"]), float(row["recall_high"])] == pytest.approx(found["recall_ci95"])
        assert float(row["f1_low"]) <= float(row["f1"]) <= float(row["f1_high"])
    for row in numbers["coverage"]:
        sure = [p["true"] == p["predicted"] for p in predictions if float(p["probability"]) >= row["threshold"]]
        assert row["n"] == len(sure) and row["accuracy"] == (pytest.approx(sum(sure) / len(sure)) if sure else None)
    assert numbers["coverage"][0]["coverage"] == 1
    pairs = [(p["true"], p["predicted"]) for p in predictions if p["true"] != p["predicted"]]
    assert {(p["true"], p["predicted"]): p["n"] for p in numbers["confused_pairs"]} == {pair: pairs.count(pair) for pair in pairs}
    first = numbers["confused_pairs"][0]
    assert f"{first['n']} of {first['support']} images of {first['true']} are taken for {first['predicted']}" in result.err


def test_hash_of_the_data_is_that_of_its_content(run, trained, tree, tmp_path):
    found = run("evaluate", "--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "out").json["data_sha256"]
    files = sorted((tree / "test").rglob("*.png"))
    lines = sorted(f"{path.parent.name}/{hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files)
    assert found == hashlib.sha256("".join(lines).encode()).hexdigest()
    names = [path.parent.name for path in files]
    assert evaluate.hash_split(files[::-1], names[::-1], 2) == found  # whatever the order, and so the files' names
    assert evaluate.hash_split(files, ["red", *names[1:]], 2) != found


def test_comparison(run, trained, tree, tmp_path):
    """Three models: the trained one, the same with its classes in another order, and one that always says red."""
    state = torch.load(trained.model, weights_only=True)["state_dict"]
    order = [2, 0, 1]
    turned = {**state, "fc.weight": state["fc.weight"][order], "fc.bias": state["fc.bias"][order]}
    same = save_changed(trained, tmp_path / "a" / "model.pt", state_dict=turned, classes=["red", "blue", "green"])
    dull = save_changed(trained, tmp_path / "b" / "dull.pt", state_dict=one_answer(trained, 2))
    args = ["--checkpoint", trained.model, same, dull, "--data", tree, "--out", tmp_path / "out"]
    result = run("evaluate", *args, "--fail-under", 0.5)
    first, second, third = result.json["models"]
    assert [model["name"] for model in result.json["models"]] == ["colours", "a", "dull"]
    assert result.json["accuracy"] == first["accuracy"] == second["accuracy"] > third["accuracy"] == pytest.approx(1 / 3)
    assert first["parameters"] == sum(value.numel() for key, value in state.items() if "running" not in key and "num_" not in key)
    assert all(model["ms_per_image"] > 0 and len(model["accuracy_ci95"]) == 2 for model in result.json["models"])
    ab, ac, bc = result.json["comparisons"]
    assert (ab["only_a_right"], ab["only_b_right"], ab["p"], ab["difference"]) == (0, 0, 1, 0) and "No evidence" in ab["words"]
    hits = round(30 * first["accuracy"])
    assert ac["difference"] == pytest.approx(hits / 30 - 1 / 3) and ac["difference_ci95"][0] > 0
    assert ac["p"] == pytest.approx(stats.binomtest(ac["only_b_right"], ac["only_a_right"] + ac["only_b_right"]).pvalue)
    assert ac["p_holm"] == bc["p_holm"] == pytest.approx(3 * ac["p"]) and "McNemar" in ac["test"]  # the two smallest of three
    assert "colours is better than dull" in ac["words"] and ac["words"] in result.err
    for folder in (tmp_path / "out", tmp_path / "out" / "a", tmp_path / "out" / "dull"):
        assert len(read_csv(folder / "predictions.csv")) == 30 and (folder / "per_class.csv").exists()
    assert {row["predicted"] for row in read_csv(tmp_path / "out/dull/predictions.csv")} == {"red"}
    report = (tmp_path / "out" / "report.html").read_text()
    assert ac["words"].replace("'", "&#x27;") in report and (tmp_path / "out" / "comparison.png").exists()
    assert run("evaluate", "--checkpoint", dull, trained.model, "--data", tree, "--out", tmp_path / "out", "--fail-under", 0.5, code=4)
    run("evaluate", "--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "comparison.png").exists()  # nothing stale
    assert "none.pt" in run("evaluate", *args[:3], tmp_path / "none.pt", *args[4:], code=2).error[0]
    assert str(trained.model) in run("evaluate", *args, "--tta", code=2).error[0]


def test_names_of_models_differ(tmp_path):
    paths = [tmp_path / name for name in ("a/model.pt", "b/a/model.pt", "a.pt", "c/model.pt", "b/history.csv")]
    assert evaluate.short_names(paths) == ["a", "a-2", "a-3", "c", "b"]


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
    assert result.json["n"] == 20 and "no images of blue" in result.err
    assert next(row for row in result.json["per_class"] if row["class"] == "blue")["recall"] is None
    for name in ("red", "green"):
        shutil.rmtree(data / "test" / name)
    assert "no image of a known class" in run("evaluate", *args, "--allow-missing", code=2).error[0]


HISTORY = """epoch,lr,train_loss,train_acc,val_loss,val_acc,test_loss,test_acc,seconds
1,0.1,0.9,0.60,0.8,0.60,,,1
2,0.1,0.5,0.80,0.6,0.75,,,1
3,0.1,0.1,0.99,0.9,0.75,,,1
"""


def test_curves_say_whether_it_overfits(run, trained, tree, tmp_path):
    (tmp_path / "over.csv").write_text(HISTORY)
    (tmp_path / "noval.csv").write_text("\n".join(",".join(line.split(",")[:4] + [""] * 5) for line in HISTORY.split()[1:]).join(
        [HISTORY.split()[0] + "\n", "\n"]))
    args = ["--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "out", "--history"]
    result = run("evaluate", *args, tmp_path / "over.csv", tmp_path / "noval.csv", trained.folder / "history.csv")
    over, noval, own = result.json["curves"]
    assert over["best_epoch"] == 2 and over["gap"] == pytest.approx(0.05) and over["test_acc"] is None  # equal accuracy: lower loss
    assert "it overfits" in over["words"] and "rises after epoch 2" in over["words"] and over["words"] in result.err
    assert noval["best_epoch"] == 3 and noval["gap"] is None
    assert own["best_epoch"] == trained.json["best_epoch"] and own["val_acc"] == trained.json["val_acc"]
    three = (tmp_path / "out" / "curves.png").read_bytes()
    run("evaluate", *args, tmp_path / "over.csv")
    assert (tmp_path / "out" / "curves.png").read_bytes() != three
    for text in ("", HISTORY.splitlines()[0], HISTORY.replace("0.60", "none")):
        (tmp_path / "odd.csv").write_text(text)
        assert "odd.csv" in run("evaluate", *args, tmp_path / "odd.csv", code=2).error[0]


def test_mistakes_are_shown_and_vanish(run, trained, hard_tree, tmp_path):
    args = ["--checkpoint", trained.model, "--out", tmp_path / "out", "--data", hard_tree]
    wrong = round(30 * (1 - run("evaluate", *args).json["accuracy"]))
    with Image.open(tmp_path / "out" / "mistakes.png") as picture:
        assert 0 < wrong <= 10 and picture.height > 300 * -(-wrong // 5)
    for name in ("blue", "green"):
        shutil.rmtree(hard_tree / "test" / name)
    args[1] = save_changed(trained, tmp_path / "red.pt", state_dict=one_answer(trained, 2))
    result = run("evaluate", *args)
    assert result.json["accuracy"] == 1 and result.json["confused_pairs"] == [] and not (tmp_path / "out" / "mistakes.png").exists()


def test_views_are_averaged(run, trained, tree, tmp_path):
    model = save_changed(trained, tmp_path / "model.pt", views=[(turns, False) for turns in range(4)])
    plain = run("evaluate", "--checkpoint", model, "--data", tree).json
    result = run("evaluate", "--checkpoint", model, model, "--data", tree, "--tta")
    assert result.json["nll"] != plain["nll"] and result.json["tta"] and "4 views of each image" in result.err
    assert result.json["comparisons"][0]["p"] == 1


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, and its text."""
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_report_is_self_contained_and_escaped(run, trained, tree, tmp_path):
    """Class names and a path that would break a page, a picture or a table, were they not escaped."""
    names = {"blue": '<script>alert("1")<', "green": "a'b&amp;\n$x^$", "red": os.fsdecode(b"\xff\xe9")}
    data = tmp_path / 'a"><img src=x>'
    for name, odd in names.items():
        shutil.copytree(tree / "test" / name, data / "test" / odd)
    shutil.move(data / "test" / names["red"] / "red 0.png", data / "test" / names["blue"] / "<b>\n.png")
    model = save_changed(trained, tmp_path / "odd" / "model.pt", classes=list(names.values()), args={"data": "</table><i>"})
    result = run("evaluate", "--checkpoint", model, "--data", data)
    out = tmp_path / "odd" / "report"
    page = Page((out / "report.html").read_text())
    assert {tag for tag, _ in page.tags} <= {"html", "meta", "title", "style", "h1", "h2", "section", "p", "div", "table", "tr", "th",
                                             "td", "img"}
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 4 and all(source.startswith("data:image/png;base64,") for source in pictures)
    assert not any("href" in attributes for _, attributes in page.tags) and "url(" not in page.text and "@import" not in page.text
    for part in ('<script>alert("1")<', "a'b&amp;\\n$x^$", "</table><i>", "python evaluate.py --checkpoint", str(torch.__version__),
                 result.json["data_sha256"], "30 images", "resnet18"):
        assert part in page.text
    assert {row["class"] for row in read_csv_bytes(out / "per_class.csv")} == set(names.values())
    assert {row["class"] for row in result.json["per_class"]} == set(names.values())


def read_csv_bytes(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_many_classes_are_truncated(tmp_path):
    model = made_model(60, 900)
    chosen, note = evaluate.pick_shown(model)
    mistakes = [sum(t != p and number in (t, p) for t, p in zip(model.targets.tolist(), model.predicted.tolist())) for number in range(60)]
    assert len(chosen) == 40 and chosen == sorted(chosen) and "40 of 60" in note
    assert min(mistakes[number] for number in chosen) >= max(mistakes[number] for number in set(range(60)) - set(chosen))
    evaluate.plot_confusion(tmp_path / "confusion.png", model, chosen, note)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.width > 2000


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
