"""Evaluate trained classifiers on one split of a data folder, and write a report.

The report folder OUT gets report.html (everything on one page), metrics.json, per_class.csv, predictions.csv and
pictures, which replace those of an earlier report. Several checkpoints are compared on the same images: OUT is then the
report of the first, the others have their files in OUT/<name>/, and metrics.json lists all of them as `models`. The
text of the report goes to stderr, and the content of metrics.json to stdout unless that is a terminal.

`loss` is the cross entropy without the temperature, as in the training history. All other numbers are computed from
probabilities that are calibrated by the temperature, like those of predict.py, except those whose names end in
`_uncalibrated`.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import html
import json
import math
import os
import platform
import random
import shlex
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import EXIT_BELOW_BAR, HISTORY_FIELDS, SPLITS, TTA_HELP
from common import Checkpoint, Estimate, FeatureCache, FeatureRequest, InferenceModel, LazyModule, Split, UserError
from common import View
from common import add_cache_options, add_hardware_options, are_among, atomic_write, check_output_outside
from common import checkpoint_precision, checkpoint_views, command, defer_signals, draw_images, extract_features
from common import few_val_images, fraction, hash_file, hash_images, hold_lock, library_versions, list_split, log
from common import log_device, make_parser, new_figure, paired_difference, pick_device, pick_precision, print_json
from common import printable, read_batches, read_checkpoint, read_known, rows_per_chunk, save_figure, shorten
from common import to_json_text, unfamiliarity, wilson, write_csv

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

# ---------------------------------------------------------------- command line


def parse_args(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line."""
    example = "python evaluate.py --checkpoint runs/eurosat/model.pt --data data/eurosat"
    parser = make_parser("evaluate.py", __doc__, example)
    group = parser.add_argument_group("input and output")
    checkpoint_help = "a model.pt of train.py; several are compared"
    group.add_argument("--checkpoint", type=Path, required=True, nargs="+", metavar="FILE", help=checkpoint_help)
    group.add_argument("--data", type=Path, default=Path("data/eurosat"), help="folder with a folder for each split")
    group.add_argument("--split", default="test", help="the folder in DATA whose images are classified")
    group.add_argument("--allow-missing", action="store_true", help="leave out images of classes unknown to a model")
    history_help = "training histories to draw in one picture (default: the history.csv beside each checkpoint)"
    group.add_argument("--history", type=Path, nargs="+", metavar="FILE", help=history_help)
    group.add_argument("--out", type=Path, help="report folder (default: report/ beside the first checkpoint)")
    group.add_argument("--tta", action="store_true", help=TTA_HELP)
    fail_help = "end with exit code 4 if the accuracy of the first checkpoint is below this"
    group.add_argument("--fail-under", type=fraction, metavar="ACCURACY", help=fail_help)
    add_cache_options(parser)
    add_hardware_options(parser)
    parser.set_defaults(command=shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)]))
    args = parser.parse_args(argv)
    args.out = args.out or args.checkpoint[0].parent / "report"
    check_output_outside("--out", args.out, [args.data / split for split in (*SPLITS, args.split)])
    return args


@command
def main(argv: Sequence[str] | None = None) -> int | None:
    """Evaluate the checkpoints of the command line and write the report. Returns the exit code."""
    args = parse_args(argv)
    device = pick_device(args.device)
    models = read_models(args.checkpoint, args.tta)
    precisions = {checkpoint_precision(model.checkpoint, args.precision) for model in models}
    log_device(device, [pick_precision(precision, device) for precision in precisions])
    histories = read_histories(args.history, models)
    images = list_images(args.data / args.split, models, args.allow_missing, args.workers)
    with replace_report(args.out, [model.subfolder for model in models]) as folder:
        for model in models:
            model.predictions, measured = classify(model, images, device, args)
            model.metrics |= compute_metrics(model, measured)
            model.metrics |= count_seen_images(model.checkpoint, images.hashes, model.predictions.correct)
        comparisons = compare_models(models)
        content = metrics_content(args, models, comparisons, histories, images)
        for model in models:
            write_tables(folder / model.subfolder, model, images.paths)
        sections = report_sections(models, comparisons, histories, images, folder)
        for section in sections:
            log_section(section)
        names = ", ".join(f"{model.name} ({model.checkpoint.arch})" for model in models)
        title = f"{names} on {args.data.resolve().name}/{args.split}, {content['date']}"
        write_report(folder / "report.html", title, [*sections, origin_section(models, content)])
        files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        content["report_files"] = [*sorted(files), "metrics.json"]
        with atomic_write(folder / "metrics.json") as file:
            file.write(to_json_text(content, indent=2) + "\n")
    accuracies = ", ".join(model.metrics["accuracy"].text(".2%") for model in models)
    summary = f"{title}: accuracy {accuracies}; report: {args.out}/report.html"
    below = args.fail_under is not None and content["accuracy"] < args.fail_under
    if below:
        summary += f"\naccuracy {content['accuracy']:.4f} is below --fail-under {args.fail_under}"
    print_json(content, summary)
    return EXIT_BELOW_BAR if below else None


@contextlib.contextmanager
def replace_report(out: Path, subfolders: list[str]) -> Iterator[Path]:
    """Yield a temporary folder with these subfolders. If the block succeeds, its files replace an earlier report.

    Other files in `out` stay. All files of the earlier report are removed before the first new one arrives, and
    metrics.json comes last, so that even a killed run leaves no mixture of two reports.
    """
    with hold_lock(out / ".lock"):
        for leftover in out.glob(".report.*.tmp"):  # of a killed run
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".report.", suffix=".tmp", dir=out) as temporary:
            for subfolder in subfolders:
                Path(temporary, subfolder).mkdir(exist_ok=True)
            yield Path(temporary)
            with defer_signals():
                for name in report_files(out):
                    (out / name).unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # other files are there still
                        (out / name).parent.rmdir()
                for name in report_files(Path(temporary)):
                    (out / name).parent.mkdir(exist_ok=True)
                    Path(temporary, name).replace(out / name)


def report_files(folder: Path) -> list[str]:
    """Return the relative paths of the files of a report, as listed in its metrics.json, which itself comes last."""
    try:
        names = json.loads((folder / "metrics.json").read_bytes())["report_files"]
        return [name for name in names if (folder / name).resolve().is_relative_to(folder.resolve())]
    except (OSError, ValueError, LookupError, TypeError):  # there is none, or it is not that of a report
        return []


def metrics_content(
    args: Namespace, models: list[Model], comparisons: list[dict], histories: list[History], images: Images
) -> dict[str, Any]:
    """Return the content of metrics.json: the metrics of the first model, those of all if several, and their origin."""
    import matplotlib

    versions = {"python": platform.python_version(), **library_versions(), "matplotlib": matplotlib.__version__}
    content = {"checkpoint": str(args.checkpoint[0]), "data": str(args.data), "split": args.split, "tta": args.tta}
    content |= to_json(models[0].metrics)
    content |= {"curves": [summarize_history(history) for history in histories], "notes": images.notes}
    content |= {"date": time.strftime("%Y-%m-%d %H:%M"), "intervals": INTERVALS, "command": args.command}
    content |= {"data_sha256": images.sha256, "versions": versions}
    if comparisons:
        content["models"] = [
            {"name": model.name, "checkpoint": str(model.path), "folder": str(args.out / model.subfolder)}
            | to_json(model.metrics)
            for model in models
        ]
        content["comparisons"] = [to_json(comparison) for comparison in comparisons]
    return content


# ---------------------------------------------------------------- input

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # for color-blind readers too
# Notes on splits that were used in training.
SPLIT_NOTES = {
    "train": "the model was trained on these images, so the numbers do not show how well it classifies others.",
    "val": "epoch and temperature may have been chosen on these images, so the numbers are slightly optimistic.",
}


@dataclass
class Model:
    """A checkpoint to evaluate."""

    path: Path
    name: str  # short, and different for each model
    subfolder: str  # of the report, for the files of this model; empty for the first one
    checkpoint: Checkpoint
    views: list[View]  # the views of each image to average over
    temperature: float  # what the averaged log-probabilities are divided by
    predictions: Predictions | None = None  # until it is evaluated
    metrics: dict[str, Any] = field(default_factory=dict)  # as `compute_metrics` returns them


@dataclass
class Images:
    """The images to classify, the same for all models."""

    data: Path  # the tree
    split: str  # the name of their folder
    paths: list[str]
    labels: list[str]  # the true class of each image
    hashes: list[str]  # the SHA-256 of each image
    notes: list[str]  # sentences about these images that a reader of the report has to know
    sha256: str  # of the sorted lines `<class>/<SHA-256 of the image>`, which do not depend on file names


@dataclass
class History:
    """The history of a training run."""

    path: Path
    name: str  # short, and different for each history
    rows: list[dict[str, float]]  # for each epoch HISTORY_FIELDS, NaN where the file has no number
    best: dict[str, float]  # the row of the best epoch, or with the numbers of the saved model
    metrics: dict[str, Any]  # those in the model beside it; empty if there is no model
    color: str  # of its curves, if there are several histories


def short_names(paths: list[Path]) -> list[str]:
    """Return a different name for each file: that of its folder for a model.pt or history.csv, else its own."""
    names = []
    for path in paths:
        base = path.resolve().parent.name if path.stem in ("model", "history") else path.stem
        base = base.strip(".") or "model"  # it names a folder of the report
        choices = [base, *(f"{base}-{number}" for number in range(2, len(paths) + 1))]
        names.append(next(name for name in choices if name not in names))
    return names


def read_models(paths: list[Path], tta: bool) -> list[Model]:
    """Read all checkpoints, so that an invalid one is reported before any is run."""
    models = []
    for path, name in zip(paths, short_names(paths)):
        checkpoint = read_checkpoint(path)
        views, temperature = checkpoint_views(checkpoint, tta, path)
        model = Model(path, name, name if models else "", checkpoint, views, temperature)
        model.metrics = {"checkpoint_sha256": hash_file(path), "trained": checkpoint.date}
        models.append(model)
    return models


def read_histories(paths: list[Path] | None, models: list[Model]) -> list[History]:
    """Read these histories, or by default those beside the checkpoints, as far as they exist.

    The best epoch is that of the model beside the history; without a model, that of the lowest val loss. A model with
    weights between two networks (`alpha`) has its own losses and accuracies.
    """
    required, histories = bool(paths), []
    paths = paths or list(dict.fromkeys(model.path.with_name("history.csv") for model in models))
    for number, (path, name) in enumerate(zip(paths, short_names(paths))):
        if path.exists():
            rows, metrics = read_history(path), saved_metrics(path, models)
            keys = ("epoch", "lr", "seconds") if metrics.get("alpha", 1) != 1 else rows[0]
            keys = [key for key in keys if isinstance(metrics.get(key), (int, float))]
            own = [row for row in rows if all(row[key] == metrics[key] for key in keys)]
            if not own:
                log(f"no training curves: {path} is of another run than the model beside it, whose epoch is not in it")
                continue
            with_val = [row for row in rows if not math.isnan(row["val_loss"])] or rows[-1:]
            best = own[0] if "epoch" in keys else min(with_val, key=lambda row: row["val_loss"])
            if "alpha" in metrics:
                best = best | {key: metrics[key] for key in best if isinstance(metrics.get(key), (int, float))}
            histories.append(History(path, name, rows, best, metrics, COLORS[number % len(COLORS)]))
        elif required:
            raise UserError(f"no such file: {path}")
        else:
            log(f"no training curves: {path} does not exist")
    return histories


def read_history(path: Path) -> list[dict[str, float]]:
    """Read the rows of a history. Raises UserError for a file that is not a history of train.py."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [
                {"epoch": int(row["epoch"]), **{key: float(row[key] or "nan") for key in HISTORY_FIELDS[1:]}}
                for row in csv.DictReader(file)
            ]
        if not rows or any(math.isinf(value) or value > 1e9 for row in rows for value in row.values()):
            raise ValueError
    except (ValueError, LookupError, TypeError, OverflowError, csv.Error):
        raise UserError(f"{path} is not a history of train.py: it needs numbers in epoch, train_loss, ...") from None
    return rows


def saved_metrics(history: Path, models: list[Model]) -> dict[str, Any]:
    """Return the metrics in the given model, or else in the model.pt, beside a history; empty if there is none."""
    metrics = {model.path.resolve().with_name("history.csv"): model.checkpoint.metrics for model in models}
    other = history.with_name("model.pt")
    if history.resolve() not in metrics and history.name == "history.csv" and other.exists():
        with contextlib.suppress(UserError):  # this model is not evaluated, so it may be damaged
            return read_checkpoint(other).metrics
    return metrics.get(history.resolve(), {})


def list_images(folder: Path, models: list[Model], allow_missing: bool, workers: int | None) -> Images:
    """List the images of FOLDER/<class>/ with their class names, hash them, and log the notes on them.

    Raises UserError for a class that a model does not know; with `allow_missing` its images are left out instead.
    """
    if not folder.parent.is_dir():
        raise UserError(f"no such folder: {folder.parent}")
    if not folder.is_dir():
        raise UserError(f"{folder.parent} has no {folder.name}/ folder; choose another with --split")
    paths, names, targets = list_split(folder)
    labels, notes = [names[target] for target in targets], []
    if folders := list(filter(os.path.isdir, paths)):
        notes.append(f"Folders that cannot be read, whose images are left out: {', '.join(folders)}.")
        labels = [label for path, label in zip(paths, labels) if path not in folders]
        paths = [path for path in paths if path not in folders]
    known, all_classes = set(labels), {}
    for model in models:
        classes = model.checkpoint.classes
        if unknown := [f"{name} ({labels.count(name)} images)" for name in names if name not in classes]:
            problem = f"{folder} has classes that {model.path} does not know: {', '.join(unknown)}"
            if not allow_missing:
                raise UserError(f"{problem}; leave their images out with --allow-missing")
            notes.append(f"{problem}. Their images are left out.")
        if warning := few_val_images(model.checkpoint.metrics.get("measured", {}).get("val", 0)):
            notes.append(f"{model.path}: {warning}.")
        known &= set(classes)
        all_classes |= dict.fromkeys(classes)
    if not known:
        raise UserError(f"{folder} has no images of known classes")
    if folder.name in SPLIT_NOTES:
        notes.append(f"{folder}: {SPLIT_NOTES[folder.name]}")
    if absent := [name for name in all_classes if name not in known]:
        effect = "balanced accuracy omits them, and macro F1 counts 0 for them if an image is classified as one."
        notes.append(f"{folder} has no images of these classes: {', '.join(absent)}; {effect}")
    for note in notes:
        log(f"warning: {note}")
    paths, labels = map(list, zip(*((path, label) for path, label in zip(paths, labels) if label in known)))
    hashes = hash_images(paths, workers)
    return Images(folder.parent, folder.name, paths, labels, hashes, notes, hash_split(hashes, labels))


def hash_split(hashes: list[str], labels: list[str]) -> str:
    """Return the SHA-256 of the sorted lines `<class>/<SHA-256 of the image>`."""
    lines = sorted(f"{label}/{sha256}\n" for label, sha256 in zip(labels, hashes))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


# ---------------------------------------------------------------- predictions

# Shares for --reject-unfamiliar of predict.py, by the names in metrics.json of the shares of these images it rejects.
UNFAMILIAR = {"unfamiliar_at_1_percent": 0.01, "unfamiliar_at_5_percent": 0.05}
CHECKED_IMAGES = 64  # images whose features are always computed, to compare them with those in the cache
MAX_ROUNDING = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}  # by which features may differ, relative to their norm


class Predictions:
    """What a model predicts for N images; it has C classes."""

    def __init__(self, targets: torch.Tensor, uncalibrated: torch.Tensor, calibrated: torch.Tensor) -> None:
        """Derive all from true classes [N], and log-probabilities [N, C] without and with the temperature, float64."""
        self.targets, self.uncalibrated, self.calibrated = targets, uncalibrated, calibrated
        self.confidence, self.predicted = calibrated.exp().max(1)  # probability and index of the most probable class
        self.correct = self.predicted == targets
        # The number of images for each [true class, predicted class], sparse: with 10,000 classes nearly all are zero.
        cells = torch.stack([targets, self.predicted]), torch.ones_like(targets), (calibrated.shape[1],) * 2
        self.confusion = torch.sparse_coo_tensor(*cells, check_invariants=True).coalesce()


def classify(
    candidate: Model, images: Images, device: torch.device, args: Namespace
) -> tuple[Predictions, dict[str, Any]]:
    """Run a model on all images. Returns the predictions, and what metrics.json has on speed and unfamiliar images.

    What the feature cache knows is not computed again. Raises ImageError for the first image that cannot be read.
    """
    checkpoint, views = candidate.checkpoint, candidate.views
    model = InferenceModel(checkpoint, device, checkpoint_precision(checkpoint, args.precision))
    index = {name: number for number, name in enumerate(checkpoint.classes)}
    targets = torch.tensor([index[label] for label in images.labels])
    request = FeatureRequest(Split(images.paths, targets, images.hashes), views)
    cache = FeatureCache.open(model, args)
    (features,) = extract_features(model, [request], cache, args.out, args.workers)
    milliseconds, count = check_features(model, request, features, cache, args.workers)
    results = []
    for rows in torch.arange(len(targets)).split(rows_per_chunk(features)):
        logits = torch.stack([model.forward_cached(view[rows]) for view in features])
        results.append(model.log_probabilities(logits, (1, candidate.temperature)))
    timing = f"fastest batch, without reading the files; {count} images; views per image: {len(views)}; "
    timing += f"{device}, {model.precision}"
    metrics = {"ms_per_image": len(views) * milliseconds, "timing": timing}
    if checkpoint.familiarity:
        scores = unfamiliarity(features[0], checkpoint.familiarity)
        metrics |= {key: (scores > 1 - share).double().mean().item() for key, share in UNFAMILIAR.items()}
    return Predictions(targets, *(torch.cat(parts) for parts in zip(*results))), metrics


def check_features(
    model: InferenceModel, request: FeatureRequest, features: torch.Tensor, cache: FeatureCache, workers: int | None
) -> tuple[float, int]:
    """Compute some features, drawn at random, again, and compare them with the given ones [views, N, D].

    Returns the milliseconds per image and view, from pixels in memory to logits in the fastest batch (the others share
    the processor with the threads that read images), and the number of images. Raises UserError if the features differ
    by more than rounding, so that the cache is not to be trusted.
    """
    split = request.split
    rows = random.sample(range(len(split)), min(len(split), max(CHECKED_IMAGES, 2 * model.batch_size)))
    count = max(math.ceil(len(rows) / model.batch_size), len(request.views))  # so that each view is checked
    batches = [rows[start::count] for start in range(min(count, len(rows)))]
    _, times = model.backbone, []  # the backbone is prepared outside the measured time
    items = ([(split.paths[row], split.sha256[row]) for row in batch] for batch in batches)
    reader = read_batches(items, model.preprocessing, workers, read_known)
    for view, batch, read in zip(cycle(range(len(request.views))), batches, reader):
        pixels = read.complete_pixels()
        start = time.perf_counter()
        computed = model.forward_views(pixels, [request.views[view]])[0]
        model.fetch_logits(model.forward_head(computed))
        times.append(1000 * (time.perf_counter() - start) / len(pixels))
        expected = features[view, batch].float()
        distances = (computed.cpu() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-6)
        if cache.folder and not distances.max() < MAX_ROUNDING[model.precision]:
            raise UserError(
                f"the features in {cache.folder} are not those of the images: they differ by {distances.max():.1%}, "
                "more than rounding explains; remove that folder, or use --no-cache"
            )
    return min(times), len(rows)


# ---------------------------------------------------------------- statistics

RESAMPLES, BINS = 2000, 15
THRESHOLDS = (0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
MCNEMAR = "McNemar's exact test, two-sided"
INTERVALS = (
    "95%: Wilson's score interval for accuracy, precision and recall, and by a transformation for F1 (Lam, Gopal and "
    "Qian); Bonett and Price's for the difference of two models' accuracies; Newcombe's for the gap between the "
    f"accuracies on train and val; for balanced accuracy and macro F1, the percentiles of a bootstrap with {RESAMPLES} "
    "resamples of the n images, which has width 0 if all resamples agree, for example if there are no mistakes."
)


# To add a metric of a whole model that has an interval: add `key: label` here, where the key is its name in
# metrics.json, and its Estimate under that key to what `compute_metrics` returns. The text on stderr, report.html and
# the comparison of models then show it, unless `summary_labels` leaves it out. Also mention its interval in INTERVALS,
# and absent classes in `list_images`.
SUMMARY_METRICS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}
CLASS_METRICS = {"precision": "precision", "recall": "recall", "f1": "F1"}  # of each class; columns of per_class.csv


def compute_metrics(model: Model, measured: dict[str, Any]) -> dict[str, Any]:
    """Return all metrics of a model, by their names in metrics.json; those with an interval are of type Estimate."""
    classes, predictions = model.checkpoint.classes, model.predictions
    targets, confusion = predictions.targets, predictions.confusion
    num_correct, num_true, num_predicted = bootstrap_counts(confusion)
    f1 = 2 * num_correct / (num_true + num_predicted)  # [C, 1 + RESAMPLES]; NaN if both numbers are 0
    counts = (count[:, 0].long().tolist() for count in (num_correct, num_true, num_predicted))
    per_class = []
    for name, correct, true, predicted in zip(classes, *counts):
        row = {"class": name, "precision": wilson(correct, predicted), "recall": wilson(correct, true)}
        per_class.append({**row, "f1": f1_estimate(correct, true, predicted), "support": true})
    ranks = (predictions.calibrated > predictions.calibrated.gather(1, targets[:, None])).sum(1)
    uncalibrated = calibration(predictions.uncalibrated, targets)
    return {
        "n": len(targets),
        "accuracy": wilson(predictions.correct.sum().item(), len(targets)),
        "balanced_accuracy": percentile_estimate((num_correct / num_true).nanmean(0)),
        "macro_f1": percentile_estimate(f1.nanmean(0)),
        "loss": uncalibrated["nll"],  # mean cross entropy in nats, as in the training history
        **{f"top{k}_accuracy": (ranks < k).double().mean().item() for k in (3, 5) if k < len(classes)},
        **calibration(predictions.calibrated, targets),
        **ece_if_perfect(predictions.confidence),
        **{f"{key}_uncalibrated": value for key, value in uncalibrated.items()},
        "temperature": model.temperature,
        "parameters": sum(parameter.numel() for parameter in model.checkpoint.model.parameters()),
        **measured,
        "per_class": per_class,
        "coverage": coverage(predictions.confidence, predictions.correct),
        "confused_pairs": confused_pairs(confusion, classes),
    }


def f1_estimate(correct: int, true: int, predicted: int) -> Estimate:
    """Return the F1 of a class, from its numbers of correctly classified, true and predicted images.

    F1 is 2 J / (1 + J), where J is the share of the correctly classified images among those that are true or predicted.
    Its interval is Wilson's for J, transformed in the same way (Lam, Gopal and Qian, arXiv 2309.14621).
    """
    shares = wilson(correct, true + predicted - correct)
    return shares if shares.value is None else Estimate(*(2 * share / (1 + share) for share in shares))


def unpaired_difference(a: Estimate, b: Estimate) -> Estimate:
    """Return a - b with a 95% interval, for two proportions of different images with their Wilson intervals.

    The interval is Newcombe's hybrid score interval (Statistics in Medicine 1998, method 10).
    """
    difference = a.value - b.value
    low = difference - math.hypot(a.value - a.low, b.high - b.value)
    return Estimate(difference, low, difference + math.hypot(a.high - a.value, b.value - b.low))


def bootstrap_counts(confusion: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count the correctly classified, true and predicted images of each class, with a bootstrap (Efron, 1979).

    Returns three float64 [C, 1 + RESAMPLES]: column 0 has the counts in the confusion matrix [true, predicted], sparse,
    the other columns those in the resamples. To draw n images with replacement is a multinomial draw over the cells of
    the matrix. It is made as a binomial draw for one cell after the other, from the images that are left, so that the
    time does not depend on n.
    """
    generator = torch.Generator().manual_seed(0)
    (true, predicted), cells = confusion.indices(), confusion.values().double()
    draws = torch.empty(len(cells), 1 + RESAMPLES, dtype=torch.float64)
    draws[:, 0] = cells
    left = cells.sum().expand(RESAMPLES)
    shares = cells / cells.flip(0).cumsum(0).flip(0)  # of each cell, among it and those after it
    for cell, share in enumerate(shares):
        draws[cell, 1:] = torch.binomial(left, share.expand(RESAMPLES), generator)
        left = left - draws[cell, 1:]
    zeros = torch.zeros(len(confusion), 1 + RESAMPLES, dtype=torch.float64)
    on_diagonal = true == predicted
    correct = zeros.index_add(0, true[on_diagonal], draws[on_diagonal])
    return correct, zeros.index_add(0, true, draws), zeros.index_add(0, predicted, draws)


def percentile_estimate(values: torch.Tensor) -> Estimate:
    """Return the number values[0] with the percentile interval of its bootstrap resamples values[1:] (Efron, 1979)."""
    if values[0].isnan():
        return Estimate()
    bounds = values[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype))
    return Estimate(values[0].item(), *bounds.tolist())


def calibration(scores: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """Return how well log-probabilities [N, C] agree with the frequency of correct predictions.

    nll is the mean negative log-likelihood in nats. ece is the expected calibration error: |accuracy - mean confidence|
    in BINS bins of equal width, weighted by their images (Guo et al., ICML 2017); `reliability` has these bins. brier
    is the squared error summed over the classes, from 0 to 2 (Brier, 1950). mean_probability is the mean confidence.
    """
    probabilities, target_scores = scores.exp(), scores.gather(1, targets[:, None])[:, 0]
    confidence, predicted = probabilities.max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    counts, confidence_sums, correct = (
        torch.bincount(bins, weights=values.double(), minlength=BINS).tolist()
        for values in (torch.ones_like(confidence), confidence, predicted == targets)
    )
    return {
        "nll": -target_scores.mean().item(),
        "ece": sum(abs(hits - total) for hits, total in zip(correct, confidence_sums)) / len(targets),
        "brier": (probabilities.square().sum(1) - 2 * target_scores.exp() + 1).mean().item(),
        "mean_probability": confidence.mean().item(),
        "reliability": [
            {"bin": number, "n": int(count), "probability": total / count, "accuracy": wilson(hits, count)}
            for number, (count, total, hits) in enumerate(zip(counts, confidence_sums, correct))
            if count
        ],
    }


def ece_if_perfect(confidence: torch.Tensor) -> dict[str, float]:
    """Return the ECE that chance alone causes: that of confidences [N] which are the probabilities of being correct.

    Simulates RESAMPLES times which predictions are correct, and returns the mean and the 95th percentile. Confidences
    in the same hundredth of a bin share one binomial draw with their mean, so that the time does not depend on N.
    """
    parts = (confidence * BINS * 100).ceil().long().clamp(1, BINS * 100) - 1
    parts, groups, counts = parts.unique(return_inverse=True, return_counts=True)
    sums = torch.bincount(groups, weights=confidence.double())
    arguments = (row.expand(RESAMPLES, -1).contiguous() for row in (counts.double(), (sums / counts).clamp(max=1)))
    excess = torch.binomial(*arguments, torch.Generator().manual_seed(0)) - sums  # [RESAMPLES, number of groups]
    by_bin = torch.zeros(RESAMPLES, BINS, dtype=torch.float64).index_add(1, parts // 100, excess)
    eces = by_bin.abs().sum(1) / len(confidence)
    return {"ece_if_perfect": eces.mean().item(), "ece_if_perfect_p95": eces.quantile(0.95).item()}


def count_seen_images(checkpoint: Checkpoint, hashes: list[str], correct: torch.Tensor) -> dict[str, Any]:
    """Count the images, by the SHA-256 [N] of their files, that the model was trained on or its epoch was chosen on.

    The numbers are None for a model of an earlier version, which does not say. If there are such images, the accuracy
    on all others is returned too; `correct` [N] says which images are classified correctly.
    """
    if not len(checkpoint.train_hashes):
        return {"seen_in_training": None, "seen_in_val": None}
    trained, chosen = are_among(hashes, checkpoint.train_hashes), are_among(hashes, checkpoint.val_hashes)
    unseen, counts = ~(trained | chosen), {"seen_in_training": trained.sum().item(), "seen_in_val": chosen.sum().item()}
    if unseen.all():
        return counts
    return {**counts, "accuracy_unseen": wilson((correct & unseen).sum().item(), unseen.sum().item())}


def coverage(confidence: torch.Tensor, correct: torch.Tensor) -> list[dict[str, Any]]:
    """Return for each threshold how many predictions have at least this confidence, and the accuracy of these."""
    rows = []
    for threshold in THRESHOLDS:
        accepted = confidence >= threshold
        count = accepted.sum().item()
        accuracy = wilson((accepted & correct).sum().item(), count)
        rows.append({"threshold": threshold, "n": count, "coverage": count / len(correct), "accuracy": accuracy})
    return rows


def confused_pairs(confusion: torch.Tensor, classes: list[str], limit: int = 10) -> list[dict[str, Any]]:
    """Return the most frequent pairs of a true class and another, predicted class, with their number of images."""
    cells = zip(*confusion.indices().tolist(), confusion.values().tolist())
    support, keys = confusion.sum(1).to_dense().tolist(), ("true", "predicted", "n", "support")
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])[:limit]
    return [dict(zip(keys, (classes[true], classes[predicted], n, support[true]))) for true, predicted, n in wrong]


def compare_models(models: list[Model]) -> list[dict[str, Any]]:
    """Compare the accuracies of every pair of models, the better one first, with the keys of metrics.json."""
    pairs, n = [], models[0].metrics["n"]
    for a, b in combinations(models, 2):
        a_correct, b_correct = a.predictions.correct, b.predictions.correct
        only_a, only_b = (a_correct & ~b_correct).sum().item(), (b_correct & ~a_correct).sum().item()
        pairs.append((a.name, b.name, only_a, only_b) if only_a >= only_b else (b.name, a.name, only_b, only_a))
    p_values = [mcnemar(only_a, only_b) for _, _, only_a, only_b in pairs]
    comparisons = []
    for (a, b, only_a, only_b), p, p_holm in zip(pairs, p_values, holm(p_values)):
        comparison = {"a": a, "b": b, "n": n, "only_a_right": only_a, "only_b_right": only_b, "test": MCNEMAR}
        comparison |= {"difference": paired_difference(only_a, only_b, n), "p": p, "p_holm": p_holm}
        comparisons.append({**comparison, "words": comparison_sentence(comparison, len(pairs))})
    return comparisons


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test for images that only one model gets right (McNemar 1947)."""
    n, smaller = only_a + only_b, min(only_a, only_b)
    logs = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(smaller + 1))
    return min(1.0, 2 * sum(math.exp(log_count - n * math.log(2)) for log_count in logs))


def holm(p_values: list[float]) -> list[float]:
    """Return the p-values adjusted for their number (Holm, 1979)."""
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


# ---------------------------------------------------------------- tables and text


@dataclass
class Section:
    """A section of the report, which appears as text on stderr, and with its picture in report.html."""

    title: str
    sentences: Sequence[str]  # each is a paragraph
    table: Sequence[Sequence[str]] = ()  # rows of cells, the heading first
    picture: Path | None = None  # a PNG file


def to_json(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics as JSON values; an Estimate becomes <name> and <name>_ci95."""
    result = {}
    for key, value in metrics.items():
        if isinstance(value, Estimate):
            result[key] = value.value
            result[f"{key}_ci95"] = None if value.value is None else [value.low, value.high]
        else:
            result[key] = [to_json(item) for item in value] if isinstance(value, list) else value
    return result


def write_tables(folder: Path, model: Model, paths: list[str]) -> None:
    """Write per_class.csv, with the bounds of the intervals in its last columns, and predictions.csv."""
    bounds, rows = [f"{key}_{side}" for key in CLASS_METRICS for side in ("low", "high")], []
    for row in model.metrics["per_class"]:
        values, lows, highs = zip(*(row[key] for key in CLASS_METRICS))
        rows.append([row["class"], *values, row["support"], *chain.from_iterable(zip(lows, highs))])
    write_csv(folder / "per_class.csv", ["class", *CLASS_METRICS, "support", *bounds], rows)
    classes, predictions, rows = model.checkpoint.classes, model.predictions, []
    columns = (column.tolist() for column in (predictions.targets, predictions.predicted, predictions.confidence))
    for path, true, predicted, confidence in zip(paths, *columns):
        rows.append([path, classes[true], classes[predicted], round(confidence, 6)])
    write_csv(folder / "predictions.csv", ["path", "true", "predicted", "probability"], rows)


def summary_labels(metrics: dict[str, Any]) -> dict[str, str]:
    """Return SUMMARY_METRICS, without balanced accuracy if it is the accuracy, because the classes have equal sizes."""
    equal_sizes = len({row["support"] for row in metrics["per_class"] if row["support"]}) == 1
    return {key: label for key, label in SUMMARY_METRICS.items() if key != "balanced_accuracy" or not equal_sizes}


def comparison_section(models: list[Model], comparisons: list[dict], picture: Path) -> Section:
    """Compare the models by their summary metrics and the F1 of the first model's classes."""
    chosen, note = classes_to_show(models[0].predictions.confusion)
    names = [models[0].checkpoint.classes[index] for index in chosen]
    summary_keys, labels = map(list, zip(*summary_labels(models[0].metrics).items()))
    estimates, table = {}, [["model [95% interval]", *labels, "ECE", "parameters", "ms per image"]]
    for model in models:
        metrics = model.metrics
        summary = [metrics[key] for key in summary_keys]
        f1 = {row["class"]: row["f1"] for row in metrics["per_class"]}
        estimates[model.name] = [*summary, *(f1.get(name, Estimate()) for name in names)]
        cells = f"{metrics['ece']:.4f}", f"{metrics['parameters']:,}", f"{metrics['ms_per_image']:.2f}"
        table.append([model.name, *(estimate.cell() for estimate in summary), *cells])
    labels += [f"F1 of {shorten(name)}" for name in names]
    plot_estimates(picture, labels, estimates, f"Models on the same images, with 95% intervals{note}")
    return Section("Comparison", [comparison["words"] for comparison in comparisons], table, picture)


def comparison_sentence(comparison: dict[str, Any], num_pairs: int) -> str:
    """Return which of two models is better, if any; `num_pairs` is the number of pairs that are compared."""
    a, b, only_a, only_b, p_holm = (comparison[key] for key in ("a", "b", "only_a_right", "only_b_right", "p_holm"))
    value, low, high = (f"{100 * share:.2f}" for share in comparison["difference"])
    verdict = f"{a} is better than {b}" if p_holm < 0.05 else f"No evidence that {a} and {b} differ"
    holm = f", and {p_holm:.2g} after Holm's correction for {num_pairs} pairs" if num_pairs > 1 else ""
    return (
        f"{verdict}: the accuracy of {a} is {value} points higher (95% interval {low} to {high}). Only "
        f"one of them is right on {only_a + only_b:,} images, {a} on {only_a:,} and {b} on {only_b:,}: "
        f"p = {comparison['p']:.2g}{holm} ({MCNEMAR})."
    )


def report_sections(
    models: list[Model], comparisons: list[dict], histories: list[History], images: Images, folder: Path
) -> list[Section]:
    """Return the sections of the report, except the last, and draw their pictures into its folder."""
    sections = [Section("Notes", images.notes)] if images.notes else []
    if comparisons:
        sections.append(comparison_section(models, comparisons, folder / "comparison.png"))
    for model in models:
        for section in model_sections(model, images, folder / model.subfolder):
            sections.append(replace(section, title=f"{model.name}: {section.title}") if comparisons else section)
    if histories:
        plot_curves(folder / "curves.png", histories)
        sentences = [summarize_history(history)["words"] for history in histories]
        sections.append(Section("Training curves and overfitting", sentences, picture=folder / "curves.png"))
    return sections


def model_sections(model: Model, images: Images, folder: Path) -> list[Section]:
    """Return the sections of a model, and draw their pictures into its folder."""
    metrics, predictions = model.metrics, model.predictions
    pairs = "{n:,} of {support:,} images of {true} are classified as {predicted}."
    confusions = [pairs.format(**pair) for pair in metrics["confused_pairs"][:5]]
    plot_confusion(folder / "confusion_matrix.png", predictions.confusion, model.checkpoint.classes)
    coverage_table = [["P", "images", "coverage", "accuracy [95% interval]"]]
    for row in metrics["coverage"]:
        cells = "{threshold:.2f}", "{n:,}", "{coverage:.1%}"
        coverage_table.append([*(cell.format(**row) for cell in cells), row["accuracy"].cell()])
    thresholds = ["With --min-confidence P, predict.py names a class where the confidence is at least P."]
    advice = "Choose P from the table of --split val: the accuracy of a P chosen from this table is too optimistic."
    thresholds.append("Choose P from this table, which is that of val." if images.split == "val" else advice)
    if "unfamiliar_at_1_percent" in metrics:
        rejected = " and ".join(f"{metrics[key]:.2%} with SHARE {share}" for key, share in UNFAMILIAR.items())
        thresholds.append(f"predict.py --reject-unfamiliar SHARE rejects {rejected} of these images.")
    wrong = (~predictions.correct).nonzero()[:, 0]
    shown = wrong[predictions.confidence[wrong].argsort(descending=True)[:20]].tolist()
    table = plot_mistakes(folder / "mistakes.png", model, images.paths, shown) if shown else ()
    mistakes = f"The {len(shown)} most confident of {len(wrong):,} mistakes." if shown else "There are none."
    return [
        accuracy_section(model, folder / "per_class.png"),
        Section("Most frequent confusions", confusions, picture=folder / "confusion_matrix.png"),
        calibration_section(metrics, folder / "reliability.png"),
        Section("Confidence thresholds", thresholds, coverage_table),
        Section("Is this a fair test?", fairness_sentences(model, images)),
        Section("Mistakes", [mistakes], table, folder / "mistakes.png" if shown else None),
    ]


def fairness_sentences(model: Model, images: Images) -> list[str]:
    """Return what is known about images that the model has used in training, and about near-duplicates of those."""
    n, trained, chosen = (model.metrics[key] for key in ("n", "seen_in_training", "seen_in_val"))
    sentences = [f"The model was trained on none of these {n:,} images."]
    if "accuracy_unseen" in model.metrics:
        unseen = model.metrics["accuracy_unseen"]
        rest = "there are no others" if unseen.value is None else f"without these the accuracy is {unseen.text('.4f')}"
        seen = f"Of these {n:,} images, the model was trained on {trained:,}, and its epoch was chosen on {chosen:,}"
        sentences = [f"{seen}; {rest}."]
    elif not len(model.checkpoint.train_hashes):
        sentences = ["The model does not say which images it was trained on."]
    file = model.path.with_name("duplicates.csv")
    if not file.is_file():
        return [*sentences, "Near-duplicates of training images were not looked for: train.py --audit does that."]
    own, found = {os.path.relpath(path, images.data).replace(os.sep, "/") for path in images.paths}, {}
    try:
        with open(file, newline="", encoding="utf-8", errors="surrogateescape") as stream:
            for row in csv.DictReader(stream):
                pair = [(row.get(f"{other}path"), row.get(f"{other}split")) for other in ("", "other_")]
                for (path, _), (other, split) in (pair, pair[::-1]):
                    if path in own and split == "train":
                        found.setdefault(path, other)
    except csv.Error:
        return [*sentences, f"Near-duplicates of training images are unknown: {file} is not a CSV file."]
    origin = model.checkpoint.args.get("data")
    text = f"{file.name}, which was made from {origin}, lists none of these images with train."
    if found:
        examples = ", ".join(f"{path} and {other}" for path, other in islice(found.items(), 3))
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        text = f"Images with near-duplicates in train, by {file.name}: {len(found):,} ({examples}{more})."
    return [*sentences, text]


def accuracy_section(model: Model, picture: Path) -> Section:
    """Report the summary metrics, and precision, recall and F1 of each class."""
    metrics, per_class = model.metrics, model.metrics["per_class"]
    chosen, note = classes_to_show(model.predictions.confusion)
    shown = [per_class[index] for index in chosen]
    labels = [f"{shorten(row['class'])} ({row['support']:,})" for row in shown]
    estimates = {label: [row[key] for row in shown] for key, label in CLASS_METRICS.items()}
    plot_estimates(picture, labels, estimates, f"Metrics by class (number of images), with 95% intervals{note}")
    present = sorted((row for row in per_class if row["support"]), key=lambda row: row["f1"].value)
    lowest = [f"{row['class']} ({row['f1'].value:.3f})" for row in present[:3]]
    sentences = [
        f"{model.predictions.correct.sum():,} of {metrics['n']:,} images are classified correctly.",
        *(f"The {label} is {metrics[key].text('.4f')}." for key, label in summary_labels(metrics).items()),
        f"F1 is lowest for {', '.join(lowest)}.",
    ]
    if len(model.views) > 1:
        sentences.append(f"Probabilities are averaged over {len(model.views)} views of each image.")
    table = [["class [95% interval]", *CLASS_METRICS.values(), "images"]]
    for row in per_class:
        table.append([row["class"], *(row[key].cell() for key in CLASS_METRICS), f"{row['support']:,}"])
    return Section("Accuracy", sentences, table, picture)


def calibration_section(metrics: dict[str, Any], picture: Path) -> Section:
    """Report whether the confidence, the probability of the predicted class, agrees with the accuracy."""
    plot_reliability(picture, metrics)
    accuracy, low, high = metrics["accuracy"]
    confidence, highest = metrics["mean_probability"], metrics["coverage"][-1]
    bias = f"{'over' if confidence > accuracy else 'under'}confident by {100 * abs(confidence - accuracy):.1f} points"
    verdict = "the mean is within the interval of the accuracy" if low <= confidence <= high else f"the model is {bias}"
    mean = f"The mean confidence (probability of the predicted class) is {confidence:.1%}, the accuracy {accuracy:.1%}"
    chance, bound = f"{metrics['ece_if_perfect']:.4f}", f"{metrics['ece_if_perfect_p95']:.4f}"
    ece = f"The expected calibration error (ECE) is {metrics['ece']:.4f}; for a perfectly calibrated model, it would be"
    sentences = [f"{mean}: {verdict}.", f"{ece} {chance} on average, and at most {bound} in 95% of cases."]
    if metrics["nll"] > metrics["nll_uncalibrated"]:
        sentences.append(
            "The temperature, fitted on val, makes the probabilities worse here: val may be small or different."
        )
    if highest["n"]:
        claim = f"{highest['n']:,} predictions have a confidence of {highest['threshold']:.0%} or more"
        sentences.append(f"{claim}; {highest['accuracy'].text('.2%')} of them are correct.")
    table = [["", "uncalibrated", f"calibrated (temperature {metrics['temperature']:.3f})"]]
    labels = {"ece": f"expected calibration error ({BINS} bins)", "nll": "negative log-likelihood (nats)"}
    labels |= {"brier": "Brier score (sum over classes)", "mean_probability": "mean confidence"}
    for key, label in labels.items():
        table.append([label, f"{metrics[f'{key}_uncalibrated']:.4f}", f"{metrics[key]:.4f}"])
    return Section("Calibration", sentences, table, picture)


def summarize_history(history: History) -> dict[str, Any]:
    """Return the accuracies of the best epoch and a sentence on overfitting, with their keys in metrics.json."""
    best, epochs, alpha = history.best, history.rows[-1]["epoch"], history.metrics.get("alpha", 1)
    kind, other = ("last", "test") if math.isnan(best["val_acc"]) else ("best", "val")
    gap, loss = best["train_acc"] - best[f"{other}_acc"], f"{other}_loss"
    _, low, high = accuracy_gap(history, other)
    rows = [row for row in history.rows if not math.isnan(row[loss])] or [best]
    lowest = min(rows, key=lambda row: row[loss])
    earlier = [row[loss] for row in rows[: -math.ceil(len(rows) / 4)]]  # without the last quarter
    is_last = lowest["epoch"] == best["epoch"] == rows[-1]["epoch"]
    falling = kind == "best" and is_last and lowest[loss] < 0.99 * min(earlier, default=0)
    words = f"{history.name}: the {kind} epoch is {best['epoch']} of {epochs}"
    words += ", by the calibrated loss on val." if kind == "best" and history.metrics else "."
    if not math.isnan(gap):
        if low is None:
            verdict = " (interval unknown, because no model beside the history says how many images were measured)"
        else:
            overfits = "it overfits slightly" if gap < 0.05 else "it overfits"
            verdict = "no sign of overfitting" if gap < 0.01 else "this can be chance" if low <= 0 else overfits
            interval = f" (95% interval {100 * low:.2f} to {100 * high:.2f})"
            verdict = interval if falling else f"{interval}: {verdict}"
        rises = f"rises after epoch {lowest['epoch']}" if rows[-1][loss] > 1.02 * lowest[loss] else "does not rise"
        rises = "was still falling: train longer (--epochs)" if falling else rises
        words += (
            f" Accuracy is {best['train_acc']:.2%} on train and {best[f'{other}_acc']:.2%} on {other}, a gap of "
            f"{100 * gap:.2f} points{verdict}; the loss on {other} {rises}."
        )
    if alpha != 1:
        between = "between those before fine-tuning (alpha 0) and those of this epoch (alpha 1)"
        words += f" The weights of the saved model are interpolated {between}, with alpha {alpha}."
    numbers = {"gap": gap, **{f"{split}_acc": best[f"{split}_acc"] for split in SPLITS}}
    known = {key: None if math.isnan(value) else value for key, value in numbers.items()}
    known["gap_ci95"] = None if low is None else [low, high]
    return {"history": str(history.path), "epochs": epochs, "best_epoch": best["epoch"], "words": words, **known}


def accuracy_gap(history: History, other: str) -> Estimate:
    """Return how much more accurate the best epoch is on train than on the split `other`.

    Undefined if an accuracy is missing, or if the model beside the history does not say how many images were measured.
    """
    accuracies = {split: history.best[f"{split}_acc"] for split in ("train", other)}
    counts = {split: history.metrics.get("measured", {}).get(split) for split in accuracies}
    if None in counts.values() or any(map(math.isnan, accuracies.values())):
        return Estimate()
    return unpaired_difference(*(wilson(round(accuracies[split] * counts[split]), counts[split]) for split in counts))


def origin_section(models: list[Model], content: dict[str, Any]) -> Section:
    """Return what is needed to make the report again; `content` is that of metrics.json."""

    def join(values: dict) -> str:
        return ", ".join(f"{key} {value}" for key, value in values.items())

    data = f"{content['n']:,} images; SHA-256 of the lines <class>/<SHA-256 of the image>: {content['data_sha256']}"
    table = [["", ""], ["command", content["command"]], ["versions", join(content["versions"])]]
    table += [["intervals", content["intervals"]], ["data", data]]
    for model in models:
        checkpoint, speed = model.checkpoint, f"{model.metrics['ms_per_image']:.2f} ms per image"
        table.append(["checkpoint", f"{model.path}: {checkpoint.arch}, {join(checkpoint.preprocessing)}"])
        table.append(["its SHA-256", model.metrics["checkpoint_sha256"]])
        table.append(["its time", f"{speed}, {model.metrics['timing']}"])
        table.append(["its training", f"{checkpoint.date or 'date unknown'}, with {join(checkpoint.versions)}"])
        options = checkpoint.args.get("changed", checkpoint.args)  # what differs from the defaults, if that is known
        table += [[f"--{key}".replace("_", "-"), str(value)] for key, value in options.items()]
    return Section("How this report was made", [], table)


# ---------------------------------------------------------------- report page

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; overflow-wrap: anywhere }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem }}
h2 {{ margin: 2.5rem 0 .5rem; border-top: 1px solid #8886; padding-top: 1rem }}
p {{ margin: .4rem 0 }}
div {{ overflow-x: auto; margin: 1rem 0 }}
img {{ display: block; max-width: max(100%, 38rem); background: white; border-radius: 6px }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884 }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; vertical-align: top }}
section:last-child td + td {{ text-align: left; white-space: normal }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def log_section(section: Section) -> None:
    """Print a section's table and sentences on stderr."""
    table = [[printable(cell) for cell in row] for row in section.table]
    widths = [max(map(len, column)) for column in zip(*table)]
    rows = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    log("\n".join(["", printable(section.title), *rows, *map(printable, section.sentences)]), stamp=False)


def write_report(path: Path, title: str, sections: list[Section]) -> None:
    """Write all sections as one page that needs no other file: pictures are embedded, and all texts are escaped."""

    def tag(name: str, text: str) -> str:
        return f"<{name}>{html.escape(printable(text))}</{name}>"

    body = []
    for section in sections:
        body += ["<section>", tag("h2", section.title), *(tag("p", sentence) for sentence in section.sentences)]
        if section.table:
            rows = [[tag("td" if number else "th", cell) for cell in row] for number, row in enumerate(section.table)]
            body += ["<div><table>", *(f"<tr>{''.join(row)}</tr>" for row in rows), "</table></div>"]
        if section.picture:
            data, alt = base64.b64encode(section.picture.read_bytes()).decode(), html.escape(printable(section.title))
            body.append(f'<div><img alt="{alt}" src="data:image/png;base64,{data}"></div>')
        body.append("</section>")
    with atomic_write(path) as file:
        file.write(PAGE.format(title=html.escape(printable(title)), body="\n".join(body)))


# ---------------------------------------------------------------- pictures

MAX_CLASSES = 40  # in a picture
MARKERS = "os^Dvp*"


def classes_to_show(confusion: torch.Tensor) -> tuple[list[int], str]:
    """Return the classes to show in a picture, in order, and a note for its title if these are not all classes."""
    true, predicted = confusion.indices()
    wrong = confusion.values() * (true != predicted)
    mistakes = torch.zeros(len(confusion), dtype=torch.int64).index_add(0, true, wrong).index_add(0, predicted, wrong)
    chosen = sorted(mistakes.argsort(descending=True, stable=True)[:MAX_CLASSES].tolist())
    note = f"\nthe {MAX_CLASSES} of {len(mistakes)} classes with the most mistakes"
    return chosen, note if len(mistakes) > MAX_CLASSES else ""


def plot_estimates(path: Path, labels: list[str], series: dict[str, list[Estimate]], title: str) -> None:
    """Draw estimates with their intervals: a row for each label, and in it a color and marker for each series."""
    figure = new_figure(9, 1.6 + (0.14 + 0.1 * len(series)) * len(labels))
    axes = figure.subplots()
    for number, (name, estimates) in enumerate(series.items()):
        shift = 0.7 * ((number + 0.5) / len(series) - 0.5)
        points = [(row + shift, *estimate) for row, estimate in enumerate(estimates) if estimate.value is not None]
        rows, values, lows, highs = zip(*points) if points else ((), (), (), ())
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        axes.plot(values, rows, marker, markersize=4.5, color=color, label=shorten(name))
        axes.hlines(rows, lows, highs, linewidth=1.2, color=color)
    axes.set(title=title, xlabel="value", ylim=(len(labels) - 0.5, -0.5))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_yticks([row + 0.5 for row in range(len(labels) - 1)], minor=True)
    axes.tick_params(axis="y", which="minor", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.grid(axis="y", which="minor", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=4)
    save_figure(path, figure)


def plot_confusion(path: Path, confusion: torch.Tensor, classes: list[str]) -> None:
    """Draw a confusion matrix [true, predicted]: numbers of images, colored by their share of the true class."""
    chosen, note = classes_to_show(confusion)
    picked, support = torch.tensor(chosen), confusion.sum(1).to_dense()
    counts = confusion.index_select(0, picked).index_select(1, picked).to_dense()
    shares = (counts / support[picked, None].clamp(min=1)).tolist()
    side = 3.5 + 0.45 * len(chosen)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [shorten(classes[index]) for index in chosen]
    axes.set_xticks(range(len(chosen)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(chosen)), labels)
    axes.set(title=f"Confusion matrix: number of images{note}", xlabel="predicted class", ylabel="true class")
    for row, numbers in enumerate(counts.tolist()):
        for column, number in enumerate(numbers):
            if number:
                color = "white" if shares[row][column] > 0.5 else "black"
                axes.text(column, row, number, ha="center", va="center", fontsize=9, color=color)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    save_figure(path, figure)


def plot_reliability(path: Path, metrics: dict[str, Any]) -> None:
    """Draw accuracy against confidence, before and after calibration, and the number of images per bin."""
    figure = new_figure(7, 6.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfect calibration")
    for side, (suffix, color, marker) in enumerate((("_uncalibrated", COLORS[1], "s"), ("", COLORS[0], "o"))):
        bins = metrics[f"reliability{suffix}"]
        confidence = [row["probability"] for row in bins]
        accuracy, lows, highs = zip(*(row["accuracy"] for row in bins))
        sizes = [10 + 290 * row["n"] / metrics["n"] for row in bins]  # areas in square points
        label = f"{suffix[1:] or 'calibrated'}: ECE {metrics[f'ece{suffix}']:.4f}"
        upper.scatter(confidence, accuracy, sizes, color, marker=marker, label=label, alpha=0.6)
        upper.vlines(confidence, lows, highs, linewidth=1.2, color=color)
        places = [(row["bin"] + 0.3 + 0.4 * side) / BINS for row in bins]
        lower.bar(places, [row["n"] for row in bins], 0.4 / BINS, color=color)
    title = f"Reliability of {BINS} bins (area: share of the images), 95% intervals"
    upper.set(title=title, ylabel="accuracy", xlim=(-0.01, 1.01), ylim=(-0.02, 1.03))
    figure.legend(loc="outside lower center", ncols=3)
    upper.grid(alpha=0.25)
    lower.set(xlabel="confidence (probability of the predicted class)", ylabel="images", yscale="log")
    lower.set_ylim(bottom=0.7)  # so that the bar of a single image is visible
    lower.yaxis.set_major_formatter("{x:,.0f}")
    lower.yaxis.set_minor_formatter("")
    save_figure(path, figure)


def plot_mistakes(path: Path, model: Model, paths: list[str], shown: list[int]) -> list[list[str]]:
    """Draw the images with these numbers, with captions, and return a table of these, with the whole paths."""
    classes, predictions, rows, pictures = model.checkpoint.classes, model.predictions, [], []
    for number in shown:
        predicted, true = (classes[index[number]] for index in (predictions.predicted, predictions.targets))
        rows.append([paths[number], predicted, f"{predictions.confidence[number]:.2%}", true])
        cells = (shorten(cell, 24) for cell in (Path(paths[number]).name, *rows[-1][1:]))
        pictures.append((paths[number], "{}\npredicted: {}\nconfidence: {}\ntrue: {}".format(*cells)))
    draw_images(path, pictures, columns=5)
    return [["image, by rows", "predicted", "confidence", "true"], *rows]


def plot_curves(path: Path, histories: list[History]) -> None:
    """Draw loss and accuracy over the epochs. Colors distinguish the splits, or the runs if there are several."""
    several = len(histories) > 1
    figure = new_figure(11, 4.6 + 0.2 * (math.ceil(3 * len(histories) / 2) + several))  # with room for the legend
    for axes, quantity, title in zip(figure.subplots(1, 2), ("loss", "acc"), ("Cross entropy (nats)", "Accuracy")):
        for history in histories:
            best = history.best
            before = history.metrics.get("head_epochs", 0) if several else 0  # those of the classifier alone
            prefix, colors = (f"{shorten(history.name)}, ", [history.color] * 3) if several else ("", COLORS)
            for split, style, color in zip(SPLITS, (":", "-", "--"), colors):
                key = f"{split}_{quantity}"
                rows = [row for row in history.rows if not math.isnan(row[key])]  # not all splits in all epochs
                if rows:
                    label = f"{prefix}{split}" + ("" if math.isnan(best[key]) else f" {best[key]:.4f}")
                    epochs, values = [row["epoch"] + before for row in rows], [row[key] for row in rows]
                    axes.plot(epochs, values, style, linewidth=1.6, color=color, label=label)
                    axes.plot(best["epoch"] + before, best[key], "o", color=color)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.25)
        dot = "saved model" if all(history.metrics for history in histories) else "best epoch"
        title = f"dot: {dot}" + several * "; fine-tuning starts after the epochs of its classifier"
        look = {"fontsize": 8, "title_fontsize": 8, "ncols": 2, "handlelength": 4}
        axes.legend(title=title, loc="upper center", bbox_to_anchor=(0.5, -0.13), **look)
    save_figure(path, figure)


if __name__ == "__main__":
    sys.exit(main())
