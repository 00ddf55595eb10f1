"""Measure trained classifiers on one split of a tree: intervals, calibration, mistakes, comparison, and a report to publish.

Writes report.html (all of it on one page), metrics.json, per_class.csv, predictions.csv and pictures into the report folder,
replacing an earlier report. `loss` is the cross entropy of the history, without the temperature; all else is calibrated by
it, as predict.py's probabilities are, but for what is called `_uncalibrated`. Several checkpoints are compared on the same
images: OUT is the report of the first, OUT/<name>/ has the files of each other one, and metrics.json lists all as `models`.
Findings and tables go to stderr, the JSON of metrics.json to stdout.
"""
from __future__ import annotations

import base64
import contextlib
import csv
import html
import json
import math
import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import PIL

from common import (EXIT_BELOW_BAR, SPLITS, TTA_HELP, FrozenModel, ImageError, LazyModule, Progress, UserError,
                    add_hardware_options, checkpoint_precision, checkpoint_views, command, file_hash, fraction, log,
                    make_parser, pick_device, printable, read_batches, read_checkpoint, read_image, read_split,
                    read_torch_file, reader_threads, replacing, torch, torchvision)

matplotlib = LazyModule("matplotlib")
Z = statistics.NormalDist().inv_cdf(0.975)  # of a 95% interval
RESAMPLES, BINS = 2000, 15
THRESHOLDS = (0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
# What to say of the numbers on the splits that made the model.
TAINTED = {"train": "a model that learned from these images knows them; only others tell how well it does.",
           "val": "epoch and temperature may have been chosen on these images, so the numbers are a little too good."}
SHOWN = 40  # classes in a picture; of more, those with most mistakes
COLOURS, MARKERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"), "os^Dvp*"  # for all eyes
INTERVALS = (f"95%: Wilson's score interval for accuracy, precision and recall; for F1 and macro F1 the percentiles of a "
             f"bootstrap of {RESAMPLES} resamples of the n images. A bootstrap finds no width where nothing is wrong.")
MCNEMAR = "McNemar's exact test, two-sided"
CURVES = [f"{split}_{what}" for split in SPLITS for what in ("loss", "acc")]


class Estimate(NamedTuple):
    """A number with its 95% interval; all None without a denominator."""
    value: float | None
    low: float | None
    high: float | None

    def __str__(self):
        return "-" if self.value is None else f"{self.value:.4f} [{self.low:.3f}, {self.high:.3f}]"

    def __format__(self, spec):
        return f"{self.value:{spec}} (95% interval {self.low:{spec}} to {self.high:{spec}})"


class Section(NamedTuple):
    """A part of the report, which is told twice: as text on stderr, and with its picture in report.html."""
    title: str
    sentences: list[str]
    table: list[list[str]] = []  # its heading first
    picture: Path | None = None


def parse_args(argv):
    parser = make_parser("evaluate.py", __doc__, "python evaluate.py --checkpoint runs/eurosat/model.pt --data data/eurosat")
    group = parser.add_argument_group("input and output")
    group.add_argument("--checkpoint", type=Path, required=True, nargs="+", metavar="FILE",
                       help="the model.pt that train.py wrote; several are compared")
    group.add_argument("--data", type=Path, default=Path("data/eurosat"), help="the tree of images")
    group.add_argument("--split", default="test", help="the folder of DATA to measure")
    group.add_argument("--allow-missing", action="store_true",
                       help="leave out the images of a class that a model does not know, instead of ending with an error")
    group.add_argument("--history", type=Path, nargs="+", metavar="FILE",
                       help="histories of training, to draw over each other (default: history.csv beside each checkpoint)")
    group.add_argument("--out", type=Path, help="folder for the results (default: report/ beside the first checkpoint)")
    group.add_argument("--tta", action="store_true", help=TTA_HELP)
    group.add_argument("--fail-under", type=fraction, metavar="ACCURACY",
                       help="end with exit code 4 if the accuracy of the first checkpoint is below this")
    add_hardware_options(parser)
    args = parser.parse_args(argv)
    args.out = args.out or args.checkpoint[0].parent / "report"
    args.command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)])
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    models = read_models(args)
    histories = read_histories(args, models)
    paths, truth, notes = read_truth(args.data / args.split, models, args.allow_missing)
    data_sha256 = hash_split(paths, truth, args.workers)
    with staged(args.out, [model.part for model in models]) as folder:
        for model in models:
            model.folder = folder / model.part
            model.folder.mkdir(exist_ok=True)
            classify(model, paths, truth, device, args)
            measure(model)
        metrics = write_all(models, histories, paths, notes, data_sha256, folder, args)
    log(f"wrote {args.out}/report.html, metrics.json and the files beside them")
    print(json.dumps(metrics))
    if args.fail_under is not None and metrics["accuracy"] < args.fail_under:
        log(f"accuracy {metrics['accuracy']:.4f} is below --fail-under {args.fail_under}")
        return EXIT_BELOW_BAR


@contextlib.contextmanager
def staged(out: Path, parts: list[str]):
    """A folder whose files replace those of an earlier report when the block has ended well: none is half old, half new."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report.", suffix=".tmp", dir=out) as folder:
        yield Path(folder)
        for part in parts:
            (out / part).mkdir(exist_ok=True)
            for name in ("comparison.png", "curves.png", "mistakes.png"):  # this report may have none
                if not Path(folder, part, name).exists():
                    (out / part / name).unlink(missing_ok=True)
            for file in filter(Path.is_file, Path(folder, part).iterdir()):
                file.replace(out / part / file.name)


def write_all(models: list, histories: list, paths: list[str], notes: list[str], data_sha256: str, folder: Path, args) -> dict:
    """Tell what was measured, and write the report; returns what metrics.json has."""
    comparisons = compare(models)
    sections = [Section("Note", notes)] if notes else []
    sections += describe_comparison(models, comparisons, folder / "comparison.png") if comparisons else []
    for model in models:
        write_tables(model, paths)
        sections += describe(model, paths, f"{model.name}: " if comparisons else "")
    sections += describe_curves(histories, folder / "curves.png") if histories else []
    metrics = {"checkpoint": str(args.checkpoint[0]), "data": str(args.data), "split": args.split, "tta": args.tta,
               **plain(models[0].metrics), "curves": [history.findings for history in histories], "notes": notes,
               "intervals": INTERVALS, "command": args.command, "data_sha256": data_sha256,
               "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                            "torchvision": str(torchvision.__version__), "pillow": PIL.__version__,
                            "matplotlib": matplotlib.__version__}}
    if comparisons:
        metrics["models"] = [{"name": model.name, "checkpoint": str(model.path), "folder": str(args.out / model.part),
                              **plain(model.metrics)} for model in models]
        metrics["comparisons"] = [plain(pair) for pair in comparisons]
    for section in sections:
        show(section)
    title = f"{', '.join(model.name for model in models)} on {args.data.resolve().name}/{args.split}"
    write_report(folder / "report.html", title, [*sections, describe_making(models, metrics)])
    with replacing(folder / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=2) + "\n")
    return metrics


# ---------------------------------------------------------------- input

def short_names(paths: list[Path]) -> list[str]:
    """A name for each file, all different: its folder's for a model.pt or history.csv, else its own."""
    names = []
    for path in paths:
        base = (path.resolve().parent.name if path.stem in ("model", "history") else "") or path.stem
        names.append(next(name for name in (base, *(f"{base}-{k}" for k in range(2, len(paths) + 1))) if name not in names))
    return names


def read_models(args) -> list[SimpleNamespace]:
    """All checkpoints, before the first is run: a wrong one costs no time. The steps below add what they find to each."""
    models = []
    for path, name in zip(args.checkpoint, short_names(args.checkpoint)):
        checkpoint, network = read_checkpoint(path)
        try:
            views, temperature = checkpoint_views(checkpoint, args.tta)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        models.append(SimpleNamespace(path=path, name=name, checkpoint=checkpoint, network=network, views=views,
                                      temperature=temperature, classes=checkpoint["classes"],
                                      part=name if models else ""))
    return models


def read_truth(folder: Path, models: list, allow_missing: bool) -> tuple[list[str], list[str], list[str]]:
    """The images of FOLDER/<class>/ and the class name of each, the same for all models; and notes on what is missing.

    A class that a model does not know is a UserError, or left out with `allow_missing`.
    """
    if not folder.parent.is_dir():
        raise UserError(f"no such folder: {folder.parent}")
    if not folder.is_dir():
        raise UserError(f"{folder.parent} has no {folder.name}/ folder; choose another with --split")
    paths, names, targets = read_split(folder)
    truth, notes = [names[target] for target in targets], []
    for model in models:
        if unknown := [f"{name} ({truth.count(name)} images)" for name in names if name not in model.classes]:
            told = f"{folder} has classes that {model.path} does not know: {', '.join(unknown)}"
            if not allow_missing:
                raise UserError(f"{told}; leave their images out with --allow-missing")
            notes.append(f"{told}: their images are left out.")
    images = [(path, name) for path, name in zip(paths, truth) if all(name in model.classes for model in models)]
    if not images:
        raise UserError(f"{folder} has no image of a known class")
    paths, truth = map(list, zip(*images))
    if folder.name in TAINTED:
        notes.append(f"{folder}: {TAINTED[folder.name]}")
    if absent := [name for name in dict.fromkeys(sum((model.classes for model in models), [])) if name not in truth]:
        notes.append(f"{folder} has no images of {', '.join(absent)}: of these nothing is measured, but to take another class "
                     "for one of them is a mistake, and an F1 of 0 in macro F1.")
    for note in notes:
        log(f"warning: {note}")
    return paths, truth, notes


def hash_split(paths: list[str], truth: list[str], workers: int | None) -> str:
    """SHA-256 over the sorted lines `<class>/<SHA-256 of the file>`: what was measured, whatever the files are called."""
    with ThreadPoolExecutor(reader_threads(workers)) as executor:
        lines = sorted(f"{name}/{digest}\n" for name, digest in zip(truth, executor.map(file_hash, paths)))
    return sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def read_histories(args, models: list) -> list[SimpleNamespace]:
    """The histories asked for, or those beside the checkpoints: their rows as numbers, and the best of them.

    The best is the epoch that the checkpoint beside the history was taken from; without one, that of the lowest val loss.
    """
    saved = {model.path.resolve().with_name("history.csv"): model.checkpoint["metrics"].get("epoch") for model in models}
    histories, paths = [], args.history or list(dict.fromkeys(path.with_name("history.csv") for path in args.checkpoint))
    for number, (path, name) in enumerate(zip(paths, short_names(paths))):
        if not path.exists():
            if args.history:
                raise UserError(f"no such file: {path}")
            log(f"no curves: {path} is not there")
            continue
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [{"epoch": int(row["epoch"]), **{key: float(row[key] or "nan") for key in CURVES}}
                        for row in csv.DictReader(file)]
            if any(math.isinf(number) or number > 1e9 for row in rows for number in row.values()):
                raise ValueError
            with_val = [row for row in rows if not math.isnan(row["val_loss"])]
            best = min(with_val, key=lambda row: row["val_loss"]) if with_val else rows[-1]
            epoch = saved_epoch(path, saved)
            best = next((row for row in rows if row["epoch"] == epoch), best)
        except (ValueError, LookupError, TypeError, OverflowError, csv.Error):
            raise UserError(f"{path} is no history of train.py, with numbers under epoch, train_loss, train_acc, ...") from None
        histories.append(SimpleNamespace(path=path, name=name, rows=rows, best=best, number=number))
    return histories


def saved_epoch(history: Path, known: dict):
    """The epoch of the model beside a history: of a checkpoint given, else of the model.pt there; None where there is none."""
    beside = history.with_name("model.pt")
    if history.resolve() not in known and history.name == "history.csv" and beside.exists():
        with contextlib.suppress(UserError, AttributeError):  # it is only looked at
            return read_torch_file(beside).get("metrics").get("epoch")
    return known.get(history.resolve())


# ---------------------------------------------------------------- measuring

def classify(model: SimpleNamespace, paths: list[str], truth: list[str], device: torch.device, args):
    """Give a model its `targets` [N] and log-probabilities [N, C], float64: `raw`, and `calibrated` by the temperature.

    What is timed is the way from pixels in memory to probabilities, and of all batches the fastest tells what the model needs:
    the others share the processor with the reading. Raises ImageError at the first image that cannot be read.
    """
    preprocessing, temperatures = model.checkpoint["preprocessing"], (1, model.temperature)
    frozen = FrozenModel(model.network, preprocessing, len(model.classes), device,
                         checkpoint_precision(model.checkpoint, args.precision))
    results, times = [], []
    frozen.backbone  # made here, so that its time is nobody's
    with Progress(f"evaluate {model.name}", len(paths)) as progress:
        for batch in read_batches(paths, preprocessing, frozen.batch_size, args.workers):
            if bad := [pixels for _, pixels in batch if isinstance(pixels, ImageError)]:
                raise bad[0]
            pixels, start = torch.stack([pixels for _, pixels in batch]), time.perf_counter()
            results.append(frozen.log_probabilities(pixels, temperatures, model.views))
            times.append(1000 * (time.perf_counter() - start) / len(batch))
            progress.update(len(batch))
    model.speed = {"ms_per_image": min(times), "timing": f"the fastest of {len(times)} batches, without reading; views of each "
                   f"image: {len(model.views)}; {device}, {str(frozen.dtype).removeprefix('torch.')}"}
    model.raw, model.calibrated = (torch.cat(parts) for parts in zip(*results))
    index = {name: number for number, name in enumerate(model.classes)}
    model.targets = torch.tensor([index[name] for name in truth])


def measure(model: SimpleNamespace):
    """Give a model what it `predicted`, with what `probability`, which are `right` [N], the `confusion` matrix and `metrics`.

    The confusion matrix is [true, predicted]; losses are mean cross entropies in nats. A precision, recall or F1 without a
    denominator is None; macro F1 is the mean over the classes that occur, as truth or as prediction.
    """
    model.probability, model.predicted = model.calibrated.exp().max(1)
    model.right = model.predicted == model.targets
    count, n, right = len(model.classes), len(model.targets), model.right.sum().item()
    model.confusion = torch.bincount(model.targets * count + model.predicted, minlength=count * count).view(count, count)
    hits, support, answered = (values.tolist() for values in
                               (model.confusion.diag(), model.confusion.sum(1), model.confusion.sum(0)))
    *f1s, macro_f1 = bootstrap_f1(model.confusion)
    coverage = []
    for threshold in THRESHOLDS:
        sure = model.probability >= threshold
        answers = sure.sum().item()
        coverage.append({"threshold": threshold, "n": answers, "coverage": answers / n,
                         "accuracy": wilson((sure & model.right).sum().item(), answers)})
    wrong = model.confusion - model.confusion.diag().diag()
    pairs = [divmod(cell, count) for cell in wrong.flatten().argsort(descending=True, stable=True)[:10].tolist()]
    ranks = (model.calibrated > model.calibrated.gather(1, model.targets[:, None])).sum(1)
    after, before = (calibration(scores, model.targets) for scores in (model.calibrated, model.raw))
    model.metrics = {
        "n": n, "accuracy": wilson(right, n), "macro_f1": macro_f1, "loss": before["nll"],
        **{f"top{k}_accuracy": (ranks < k).double().mean().item() for k in (3, 5) if k < count}, **after,
        **{f"{key}_uncalibrated": value for key, value in before.items()}, "temperature": model.temperature,
        "parameters": sum(p.numel() for p in model.network.parameters()), **model.speed,
        "per_class": [{"class": name, "precision": wilson(hit, said), "recall": wilson(hit, there), "f1": f1, "support": there}
                      for name, hit, there, said, f1 in zip(model.classes, hits, support, answered, f1s)],
        "coverage": coverage,
        "confused_pairs": [{"true": model.classes[true], "predicted": model.classes[said], "n": wrong[true, said].item(),
                            "support": support[true]} for true, said in pairs if wrong[true, said]]}


def wilson(part: int, whole: int) -> Estimate:
    """The proportion part / whole with Wilson's 95% score interval (Wilson, JASA 1927)."""
    if not whole:
        return Estimate(None, None, None)
    share, scale = part / whole, 1 + Z * Z / whole
    middle = (share + Z * Z / (2 * whole)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / whole + (Z / (2 * whole)) ** 2)
    return Estimate(share, middle - half if part else 0.0, middle + half if part < whole else 1.0)  # not 1e-18 for 0


def bootstrap_f1(confusion: torch.Tensor) -> list[Estimate]:
    """F1 of each class and, last, macro F1, with the percentiles of a bootstrap over the images (Efron, 1979).

    To draw n images with replacement is a multinomial draw over the cells of the confusion matrix [true, predicted], and that
    is a binomial draw for one cell after the other out of the images that are left: the time does not depend on n. The
    first column is no draw, but the matrix itself.
    """
    generator = torch.Generator().manual_seed(0)
    true, predicted = confusion.nonzero().unbind(1)
    cells = confusion[true, predicted].double()
    draws = torch.empty(len(cells), 1 + RESAMPLES, dtype=torch.float64)
    draws[:, 0] = cells
    left = cells.sum().expand(RESAMPLES)
    for cell, share in enumerate(cells / cells.flip(0).cumsum(0).flip(0)):  # of the cell among itself and those after it
        draws[cell, 1:] = torch.binomial(left, share.expand(RESAMPLES), generator)
        left = left - draws[cell, 1:]
    total, hits = torch.zeros(2, len(confusion), 1 + RESAMPLES, dtype=torch.float64)
    total.index_add_(0, true, draws).index_add_(0, predicted, draws)
    hits.index_add_(0, true[true == predicted], draws[true == predicted])
    f1 = 2 * hits / total  # not a number where a resample has nothing of a class
    f1 = torch.cat([f1, f1.nanmean(0, keepdim=True)])
    bounds = f1[:, 1:].nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    return [Estimate(*(None if math.isnan(row[0]) else number for number in row))
            for row in torch.stack([f1[:, 0], *bounds], 1).tolist()]


def calibration(scores: torch.Tensor, targets: torch.Tensor) -> dict:
    """How far log-probabilities [N, C] are to be believed.

    nll: mean negative log-likelihood in nats. ece: expected calibration error, |accuracy - mean probability of the answer| in
    15 bins of equal width of that probability, weighted by images (Guo et al., ICML 2017); these bins are `reliability`.
    brier: squared error summed over the classes, 0 to 2 (Brier, 1950).
    """
    probabilities, own = scores.exp(), scores.gather(1, targets[:, None])[:, 0]
    claimed, predicted = probabilities.max(1)
    bins = (claimed * BINS).ceil().long().clamp(1, BINS) - 1
    sums = [torch.bincount(bins, weights=values.double(), minlength=BINS).tolist()
            for values in (torch.ones_like(claimed), claimed, predicted == targets)]
    return {"nll": -own.mean().item(), "ece": sum(abs(right - claim) for _, claim, right in zip(*sums)) / len(targets),
            "brier": (probabilities.square().sum(1) - 2 * own.exp() + 1).mean().item(),
            "mean_probability": claimed.mean().item(),
            "reliability": [{"bin": number, "n": int(n), "probability": claim / n, "accuracy": wilson(right, n)}
                            for number, (n, claim, right) in enumerate(zip(*sums)) if n]}


def compare(models: list) -> list[dict]:
    """Every pair of models on the same images: the difference in accuracy, and McNemar's exact test of it (McNemar, 1947).

    The interval of the difference is Bonett and Price's (2012) for paired proportions; p_holm is adjusted for the number of
    pairs (Holm, 1979), and decides.
    """
    pairs, highest = [], 0.0
    for a, b in combinations(models, 2):
        only_a, only_b, n = (a.right & ~b.right).sum().item(), (b.right & ~a.right).sum().item(), len(a.right)
        if only_a < only_b:  # the better one is named first
            a, b, only_a, only_b = b, a, only_b, only_a
        more, less = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
        half = Z * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
        pairs.append({"a": a.name, "b": b.name, "n": n, "only_a_right": only_a, "only_b_right": only_b, "test": MCNEMAR,
                      "difference": Estimate((only_a - only_b) / n, more - less - half, more - less + half),
                      "p": mcnemar(only_a, only_b)})
    for rank, pair in enumerate(sorted(pairs, key=lambda pair: pair["p"])):
        pair["p_holm"] = highest = max(highest, min(1.0, (len(pairs) - rank) * pair["p"]))
        a, b, better, worse = pair["a"], pair["b"], pair["only_a_right"], pair["only_b_right"]
        value, low, high = (f"{100 * share:.2f}" for share in pair["difference"])
        points = f"{value} points (95% interval {low} to {high})"
        verdict = f"{a} is better than {b} by {points}" if highest < 0.05 else f"No evidence that {a} and {b} differ: {points}"
        holm = f", and {highest:.2g} after Holm's correction for {len(pairs)} pairs" if len(pairs) > 1 else ""
        pair["words"] = (f"{verdict}. Of the {better + worse:,} images that only one of them gets right, {a} gets {better:,}: "
                         f"p = {pair['p']:.2g}{holm} ({MCNEMAR}).")
    return pairs


def mcnemar(b: int, c: int) -> float:
    """The probability, were two models equally good, that their b + c differing images split at least as unevenly as b to c."""
    n = b + c
    return min(1.0, 2 * sum(math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
                            for k in range(min(b, c) + 1)))


# ---------------------------------------------------------------- tables and words

def plain(numbers: dict) -> dict:
    """Numbers as JSON has them, an estimate as <name> and <name>_ci95."""
    result = {}
    for key, value in numbers.items():
        if isinstance(value, Estimate):
            result |= {key: value.value, f"{key}_ci95": None if value.value is None else [value.low, value.high]}
        else:
            result[key] = [plain(item) for item in value] if isinstance(value, list) else value
    return result


def write_tables(model: SimpleNamespace, paths: list[str]):
    """Write per_class.csv, the numbers and then the bounds of their intervals, and predictions.csv, a row per image."""
    what = ("precision", "recall", "f1")
    classes = [[row["class"], *(row[key].value for key in what), row["support"],
                *(bound for key in what for bound in row[key][1:])] for row in model.metrics["per_class"]]
    bounds = [f"{key}_{side}" for key in what for side in ("low", "high")]
    columns = (values.tolist() for values in (model.targets, model.predicted, model.probability))
    images = [[path, model.classes[true], model.classes[said], round(p, 6)] for path, true, said, p in zip(paths, *columns)]
    for name, heading, rows in (("per_class.csv", ["class", *what, "support", *bounds], classes),
                                ("predictions.csv", ["path", "true", "predicted", "probability"], images)):
        with replacing(model.folder / name) as file:
            csv.writer(file).writerows([heading, *rows])


def shorten(text: str, length: int = 26) -> str:
    text = printable(text)
    return text if len(text) <= length else f"{text[:length // 2 - 1]}...{text[2 - length // 2:]}"


def show(section: Section):
    """Print a section's table and sentences on stderr."""
    cells = [[printable(cell) for cell in row] for row in section.table]
    widths = [max(map(len, column)) for column in zip(*cells)]
    rows = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    log("\n".join(["", printable(section.title), *rows, *map(printable, section.sentences)]), stamp=False)


def describe(model: SimpleNamespace, paths: list[str], prefix: str) -> list[Section]:
    """Draw a model's pictures, and tell what its numbers say."""
    numbers, n, wrong = model.metrics, model.metrics["n"], (~model.right).sum().item()
    accuracy, low, high = numbers["accuracy"]
    known = [row for row in numbers["per_class"] if row["support"]]
    worst = [f"{row['class']} ({row['f1'].value:.3f})" for row in sorted(known, key=lambda row: row["f1"].value)[:3]]
    claimed, surest = numbers["mean_probability"], numbers["coverage"][-1]
    verdict = ("that is within the interval of the accuracy" if low <= claimed <= high else
               f"it is {'too sure' if claimed > accuracy else 'not sure enough'} by {100 * abs(claimed - accuracy):.1f} points")
    chosen, note = pick_shown(model)
    rows = [numbers["per_class"][index] for index in chosen]
    plot_estimates(model.folder / "per_class.png", [f"{shorten(row['class'])} ({row['support']:,})" for row in rows],
                   {key: [row[key.lower()] for row in rows] for key in ("precision", "recall", "F1")},
                   f"Each class (its images), with 95% intervals{note}")
    plot_confusion(model.folder / "confusion_matrix.png", model, chosen, note)
    plot_reliability(model.folder / "reliability.png", numbers)
    shown = plot_mistakes(model.folder / "mistakes.png", model, paths)
    return [
        Section(f"{prefix}Accuracy", [
            f"Of {n:,} images {n - wrong:,} are right: {numbers['accuracy']:.2%}.",
            f"Macro F1 is {numbers['macro_f1']:.4f}; F1 is lowest for {', '.join(worst)}.",
            *([f"Probabilities are averaged over {len(model.views)} views of each image."] if len(model.views) > 1 else [])],
            [["class [95% interval]", "precision", "recall", "F1", "images"],
             *([row["class"], *(str(row[key]) for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
               for row in numbers["per_class"])], model.folder / "per_class.png"),
        Section(f"{prefix}Confusions", [
            f"{pair['n']:,} of {pair['support']:,} images of {pair['true']} are taken for {pair['predicted']}."
            for pair in numbers["confused_pairs"][:5]], picture=model.folder / "confusion_matrix.png"),
        Section(f"{prefix}Is a high probability deserved?", [
            f"On average an answer claims a probability of {claimed:.1%}, and {accuracy:.1%} are right: {verdict}.",
            *(["The temperature, fitted on val, does not help here: perhaps val is small, or of another kind."]
              if numbers["nll"] > numbers["nll_uncalibrated"] else []),
            *([f"{surest['n']:,} answers claim {surest['threshold']:.0%} or more; of these {surest['accuracy']:.2%} are right."]
              if surest["n"] else [])],
            [["", "uncalibrated", f"calibrated (temperature {numbers['temperature']:.3f})"],
             *([label, f"{numbers[f'{key}_uncalibrated']:.4f}", f"{numbers[key]:.4f}"] for label, key in
               ((f"expected calibration error ({BINS} bins)", "ece"), ("negative log-likelihood (nats)", "nll"),
                ("Brier score (sum over classes)", "brier"), ("mean probability of the answer", "mean_probability")))],
            model.folder / "reliability.png"),
        Section(f"{prefix}How sure to ask it to be", [
            "predict.py --min-confidence P gives an answer where the probability is at least P."],
            [["P", "images answered", "share", "accuracy of the answers [95% interval]"],
             *([f"{row['threshold']:.2f}", f"{row['n']:,}", f"{row['coverage']:.1%}", str(row["accuracy"])]
               for row in numbers["coverage"])]),
        Section(f"{prefix}Mistakes", [f"The {shown} most confident of {wrong:,} wrong answers." if shown else "None."],
                picture=model.folder / "mistakes.png" if shown else None)]


def describe_comparison(models: list, comparisons: list[dict], picture: Path) -> list[Section]:
    """Draw and tell how the models differ; the classes are those of the first."""
    chosen, note = pick_shown(models[0])
    names, series = [models[0].classes[index] for index in chosen], {}
    for model in models:
        own = {row["class"]: row["f1"] for row in model.metrics["per_class"]}
        series[model.name] = [model.metrics["accuracy"], model.metrics["macro_f1"],
                              *(own.get(name, wilson(0, 0)) for name in names)]
    plot_estimates(picture, ["accuracy", "macro F1", *(f"F1 of {shorten(name)}" for name in names)], series,
                   f"Models on the same images, with 95% intervals{note}")
    rows = [[model.name, *(str(model.metrics[key]) for key in ("accuracy", "macro_f1")), f"{model.metrics['ece']:.4f}",
             f"{model.metrics['parameters']:,}", f"{model.metrics['ms_per_image']:.2f}"] for model in models]
    return [Section("Comparison", [pair["words"] for pair in comparisons],
                    [["model [95% interval]", "accuracy", "macro F1", "ECE", "parameters", "ms per image"], *rows], picture)]


def describe_curves(histories: list, picture: Path) -> list[Section]:
    """Draw the histories and say of each whether it overfits: the gap between train and val, and whether val's loss rises."""
    for history in histories:
        best, last = history.best, history.rows[-1]
        other = "test" if math.isnan(best["val_acc"]) else "val"
        gap, loss = best["train_acc"] - best[f"{other}_acc"], f"{other}_loss"
        what = "last" if other == "test" else "best"
        words = f"{history.name}: the {what} epoch is {best['epoch']} of {last['epoch']}."
        if not math.isnan(gap):
            lowest = min(history.rows, key=lambda row: row[loss])
            rises = f"rises after epoch {lowest['epoch']}" if last[loss] > 1.02 * lowest[loss] else "does not rise"
            verdict = "no sign of overfitting there" if gap < 0.01 else "it overfits a little" if gap < 0.05 else "it overfits"
            words += (f" Accuracy is {best['train_acc']:.2%} on train and {best[f'{other}_acc']:.2%} on {other}, a gap of "
                      f"{100 * gap:.2f} points: {verdict}; the loss on {other} {rises}.")
        numbers = {"gap": gap, **{f"{split}_acc": best[f"{split}_acc"] for split in SPLITS}}
        history.findings = {"history": str(history.path), "epochs": last["epoch"], "best_epoch": best["epoch"], "words": words,
                            **{key: None if math.isnan(value) else value for key, value in numbers.items()}}
    plot_curves(picture, histories)
    return [Section("Does it overfit?", [history.findings["words"] for history in histories], picture=picture)]


def describe_making(models: list, metrics: dict) -> Section:
    """All that is needed to make the report again."""
    def listing(values: dict) -> str:
        return ", ".join(f"{key} {value}" for key, value in values.items())

    rows = [["command", metrics["command"]], ["with", listing(metrics["versions"])], ["intervals", metrics["intervals"]],
            ["data", f"{metrics['n']:,} images; SHA-256 of the lines <class>/<SHA-256 of the image>: {metrics['data_sha256']}"]]
    for model in models:
        content = model.checkpoint
        rows += [["checkpoint", f"{model.path}: {content['arch']}, {listing(content['preprocessing'])}"],
                 ["its training", f"{listing(content.get('args', {}))}; with {listing(content.get('versions', {}))}"],
                 ["its time", f"{model.metrics['ms_per_image']:.2f} ms per image: {model.metrics['timing']}"]]
    return Section("How this was made", [], [["", ""], *rows])


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }}
h2 {{ margin: 2.5rem 0 .5rem; border-top: 1px solid #8886; padding-top: 1rem }}
div {{ overflow-x: auto; margin: 1rem 0 }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884 }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; vertical-align: top }}
section:last-child td + td {{ text-align: left; white-space: normal }}
p {{ margin: .4rem 0 }}
img {{ display: block; max-width: max(100%, 38rem); background: white; border-radius: 6px }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_report(path: Path, title: str, sections: list[Section]):
    """One page with all sections, which loads nothing: pictures are embedded, and every text is escaped."""
    def tag(name: str, text: str) -> str:
        return f"<{name}>{html.escape(printable(text))}</{name}>"

    body = []
    for section in sections:
        body += ["<section>", tag("h2", section.title), *(tag("p", sentence) for sentence in section.sentences)]
        if section.table:
            rows = ["".join(tag("td" if number else "th", cell) for cell in row) for number, row in enumerate(section.table)]
            body += ["<div><table>", *(f"<tr>{row}</tr>" for row in rows), "</table></div>"]
        if section.picture:
            data = base64.b64encode(section.picture.read_bytes()).decode()
            body.append(f'<div><img alt="{html.escape(printable(section.title))}" src="data:image/png;base64,{data}"></div>')
        body.append("</section>")
    with replacing(path) as file:
        file.write(PAGE.format(title=html.escape(printable(title)), body="\n".join(body)))


# ---------------------------------------------------------------- pictures

@contextlib.contextmanager
def drawing(path: Path, width: float, height: float):
    """A matplotlib figure of width x height inches, drawn without a display and saved as a PNG when the block ends."""
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a class name is a $
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with replacing(path, "wb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters that the font lacks are boxes, and no noise
        figure.savefig(file, format="png", dpi=120)


def pick_shown(model: SimpleNamespace) -> tuple[list[int], str]:
    """The classes to show in a picture, in order, and what to add to its title if they are not all."""
    mistakes = model.confusion.sum(0) + model.confusion.sum(1) - 2 * model.confusion.diag()
    note = f"\nthe {SHOWN} of {len(mistakes)} classes with most mistakes" if len(mistakes) > SHOWN else ""
    return sorted(mistakes.argsort(descending=True, stable=True)[:SHOWN].tolist()), note


def plot_estimates(path: Path, labels: list[str], series: dict[str, list[Estimate]], title: str):
    """Estimates with their intervals: a row for each label, in it a colour and marker for each of the series."""
    with drawing(path, 9, 1.6 + (0.14 + 0.1 * len(series)) * len(labels)) as figure:
        axes = figure.subplots()
        for number, (name, estimates) in enumerate(series.items()):
            shift = 0.7 * ((number + 0.5) / len(series) - 0.5)
            known = [(at + shift, *estimate) for at, estimate in enumerate(estimates) if estimate.value is not None]
            at, values, lows, highs = zip(*known) if known else ((),) * 4
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(values, at, MARKERS[number % len(MARKERS)], markersize=4.5, color=colour, label=shorten(name))
            axes.hlines(at, lows, highs, linewidth=1.2, color=colour)
        axes.set(title=title, xlabel="share", ylim=(len(labels) - 0.5, -0.5))
        axes.set_yticks(range(len(labels)), labels)
        axes.set_yticks([at + 0.5 for at in range(len(labels) - 1)], minor=True)
        axes.tick_params(axis="y", which="minor", length=0)
        axes.grid(axis="x", alpha=0.25)
        axes.grid(axis="y", which="minor", alpha=0.25)
        figure.legend(loc="outside lower center", ncols=4)


def plot_confusion(path: Path, model: SimpleNamespace, chosen: list[int], note: str):
    """The confusion matrix [true, predicted] of the chosen classes: counts, coloured by the share of the true class."""
    counts = model.confusion[chosen][:, chosen].tolist()
    shares = (model.confusion / model.confusion.sum(1, keepdim=True).clamp(min=1))[chosen][:, chosen].tolist()
    side = 3.5 + 0.45 * len(chosen)
    with drawing(path, side + 1, side) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        labels = [shorten(model.classes[index]) for index in chosen]
        axes.set_xticks(range(len(chosen)), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(chosen)), labels)
        axes.set(title=f"Images by true and predicted class{note}", xlabel="predicted", ylabel="true")
        for row, numbers in enumerate(counts):
            for column, number in enumerate(numbers):
                if number:
                    axes.text(column, row, number, ha="center", va="center", fontsize=9,
                              color="white" if shares[row][column] > 0.5 else "black")
        figure.colorbar(image, label="share of the true class", shrink=0.8)


def plot_reliability(path: Path, numbers: dict):
    """Accuracy against the probability claimed, before and after calibration, and how many images claim it."""
    with drawing(path, 7, 6.5) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="as right as claimed")
        for side, (suffix, colour, marker) in enumerate(zip(("_uncalibrated", ""), COLOURS[1::-1], "so")):
            bins = numbers[f"reliability{suffix}"]
            claimed, counts = [row["probability"] for row in bins], [row["n"] for row in bins]
            accuracy, lows, highs = zip(*(row["accuracy"] for row in bins))
            upper.plot(claimed, accuracy, marker=marker, markersize=4.5, linewidth=1.2, color=colour,
                       label=f"{suffix[1:] or 'calibrated'}: ECE {numbers[f'ece{suffix}']:.4f}")
            upper.vlines(claimed, lows, highs, linewidth=1.2, color=colour)
            lower.bar([(row["bin"] + 0.3 + 0.4 * side) / BINS for row in bins], counts, 0.4 / BINS, color=colour)
        upper.set(title=f"Is a high probability deserved? {BINS} bins, with 95% intervals", ylabel="accuracy",
                  xlim=(-0.01, 1.01), ylim=(-0.02, 1.03))
        figure.legend(loc="outside lower center", ncols=3)
        upper.grid(alpha=0.25)
        lower.set(xlabel="probability of the answer", ylabel="images", yscale="log")
        lower.set_ylim(bottom=0.7)  # a bar of one image is seen
        lower.yaxis.set_major_formatter("{x:,.0f}")
        lower.yaxis.set_minor_formatter("")


def plot_mistakes(path: Path, model: SimpleNamespace, paths: list[str], columns: int = 5, rows: int = 4) -> int:
    """The most confident wrong answers, with true and predicted class; returns how many."""
    wrong = (~model.right).nonzero()[:, 0]
    order = wrong[model.probability[wrong].argsort(descending=True)[:columns * rows]].tolist()
    if not order:
        return 0
    rows = math.ceil(len(order) / columns)
    with drawing(path, 2.3 * columns, 2.95 * rows) as figure:
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in cells:
            axes.set_axis_off()
        for axes, at in zip(cells, order):
            image = read_image(paths[at])
            image.thumbnail((360, 360))
            axes.imshow(image, interpolation="nearest" if max(image.size) < 128 else "antialiased")
            said, true = (shorten(model.classes[index[at]], 24) for index in (model.predicted, model.targets))
            axes.set_title(f"{shorten(Path(paths[at]).name)}\nsays {said} {model.probability[at]:.2%}\nis {true}", fontsize=8.5)
    return len(order)


def plot_curves(path: Path, histories: list):
    """Loss and accuracy over the epochs, with a dot at the best: a colour per split, or per run where there are several."""
    several = len(histories) > 1
    lines = math.ceil(3 * len(histories) / 2) + several  # of the legend
    with drawing(path, 11, 4.6 + 0.2 * lines) as figure:
        for axes, what, title in zip(figure.subplots(1, 2), ("loss", "acc"), ("Cross entropy (nats)", "Accuracy")):
            for history in histories:
                epochs, at = [row["epoch"] for row in history.rows], history.rows.index(history.best)
                for number, (split, line) in enumerate(zip(SPLITS, (":", "-", "--"))):
                    values = [row[f"{split}_{what}"] for row in history.rows]
                    if not all(map(math.isnan, values)):
                        label = (f"{shorten(history.name)}, " if several else "") + f"{split} {values[at]:.4f}"
                        axes.plot(epochs, values, line, marker="o", markevery=[at], linewidth=1.6, label=label,
                                  color=COLOURS[(history.number if several else number) % len(COLOURS)])
                if not several:
                    axes.axvline(history.best["epoch"], color="0.6", linestyle="--", linewidth=1, zorder=0,
                                 label=f"best epoch: {history.best['epoch']}")
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.25)
            axes.legend(fontsize=8, title="dot: best epoch" if several else None, ncols=2, loc="upper center",
                        bbox_to_anchor=(0.5, -0.13), title_fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
