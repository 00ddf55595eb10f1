"""Measure a trained classifier on one split of a tree: numbers as JSON and CSV, and pictures.

Writes metrics.json, per_class.csv, predictions.csv, confusion_matrix.png and, where the training's history.csv is at hand,
curves.png into the report folder, replacing an earlier report. The loss is that of the history, without the temperature;
the probabilities in predictions.csv are calibrated by it. A table goes to stderr, the JSON of metrics.json to stdout.
"""
from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from common import (EXIT_BELOW_BAR, SPLITS, TTA_HELP, FrozenModel, ImageError, LazyModule, Progress, UserError,
                    add_hardware_options, checkpoint_views, command, fraction, log, make_parser, pick_device, read_batches,
                    read_checkpoint, read_split, replacing, torch)

matplotlib = LazyModule("matplotlib")
COLOURS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:green"}


def parse_args(argv):
    parser = make_parser("evaluate.py", __doc__, "python evaluate.py --checkpoint runs/eurosat/model.pt --data data/eurosat")
    group = parser.add_argument_group("input and output")
    group.add_argument("--checkpoint", type=Path, required=True, help="the model.pt that train.py wrote")
    group.add_argument("--data", type=Path, default=Path("data/eurosat"), help="the tree of images")
    group.add_argument("--split", default="test", help="the folder of DATA to measure")
    group.add_argument("--history", type=Path, help="the training's history (default: history.csv beside the checkpoint)")
    group.add_argument("--out", type=Path, help="folder for the results (default: report/ beside the checkpoint)")
    group.add_argument("--tta", action="store_true", help=TTA_HELP)
    group.add_argument("--fail-under", type=fraction, metavar="ACCURACY",
                       help="end with exit code 4 if the accuracy is below this")
    add_hardware_options(parser)
    args = parser.parse_args(argv)
    args.out = args.out or args.checkpoint.parent / "report"
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    checkpoint, model = read_checkpoint(args.checkpoint)
    history = read_history(args.history or args.checkpoint.with_name("history.csv"), required=args.history is not None)
    paths, targets = read_targets(args.data / args.split, checkpoint["classes"])
    args.out.mkdir(parents=True, exist_ok=True)
    raw, calibrated = classify(model, checkpoint, paths, device, args)
    metrics, per_class, confusion = measure(raw, targets, checkpoint)
    metrics = {"checkpoint": str(args.checkpoint), "data": str(args.data), "split": args.split, "tta": args.tta, **metrics}
    write_csv(args.out / "per_class.csv", per_class)
    write_csv(args.out / "predictions.csv", list_predictions(paths, calibrated, targets, checkpoint))
    plot_confusion(args.out / "confusion_matrix.png", confusion, checkpoint["classes"],
                   f"{checkpoint['arch']} on {args.data.name}/{args.split}: {metrics['accuracy']:.2%} of {metrics['n']}")
    if history:
        plot_curves(args.out / "curves.png", history, checkpoint["metrics"].get("epoch"))
    with replacing(args.out / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=2) + "\n")
    show_table(metrics, per_class)
    log(f"wrote {args.out}/")
    print(json.dumps(metrics))
    if args.fail_under is not None and metrics["accuracy"] < args.fail_under:
        log(f"accuracy {metrics['accuracy']:.4f} is below --fail-under {args.fail_under}")
        return EXIT_BELOW_BAR


# ---------------------------------------------------------------- input

def read_targets(folder: Path, classes: list[str]) -> tuple[list[str], torch.Tensor]:
    """The images of FOLDER/<class>/ and their class indices [N] in the checkpoint's list, matched by name."""
    if not folder.parent.is_dir():
        raise UserError(f"no such folder: {folder.parent}")
    if not folder.is_dir():
        raise UserError(f"{folder.parent} has no {folder.name}/ folder; choose another with --split")
    paths, _, targets = read_split(folder, classes)
    if absent := [name for index, name in enumerate(classes) if index not in set(targets)]:
        log(f"warning: {folder} has no images of {', '.join(absent)}: their recall is not known")
    return paths, torch.tensor(targets)


def read_history(path: Path, required: bool) -> list[dict] | None:
    """The rows of a history.csv as numbers, empty cells as None; None without a file that was not asked for."""
    if not path.exists():
        if required:
            raise UserError(f"no such file: {path}")
        log(f"no curves: {path} is not there")
        return None
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]
        [row["epoch"] + 0 for row in rows]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"{path} is no history of train.py: its cells should be numbers under epoch, train_loss, ...") from None
    return rows


# ---------------------------------------------------------------- measuring

def classify(model: torch.nn.Module, checkpoint: dict, paths: list[str], device: torch.device, args) -> list[torch.Tensor]:
    """Log-probabilities [N, C] of the images, float64: as the model gives them, and calibrated by the temperature.

    Raises ImageError at the first image that cannot be read.
    """
    frozen = FrozenModel(model, checkpoint["preprocessing"], len(checkpoint["classes"]), device, args.precision)
    views, results = checkpoint_views(checkpoint, args.tta), []
    with Progress("evaluate", len(paths)) as progress:
        for batch in read_batches(paths, checkpoint["preprocessing"], frozen.batch_size, args.workers):
            if bad := [pixels for _, pixels in batch if isinstance(pixels, ImageError)]:
                raise bad[0]
            pixels = torch.stack([pixels for _, pixels in batch])
            results.append(frozen.log_probabilities(pixels, (1, checkpoint["temperature"]), views))
            progress.update(len(batch))
    return [torch.cat(parts) for parts in zip(*results)]


def measure(scores: torch.Tensor, targets: torch.Tensor, checkpoint: dict) -> tuple[dict, list[dict], torch.Tensor]:
    """Metrics, a row per class, and the confusion matrix [true, predicted], from log-probabilities [N, C] and targets [N].

    The loss is the mean cross entropy in nats, as in the history. A precision, recall or F1
    without a denominator is None; macro F1 is the mean over the classes that occur, as truth or as prediction.
    """
    classes = checkpoint["classes"]
    count = len(classes)
    predicted = scores.argmax(1)
    confusion = torch.bincount(targets * count + predicted, minlength=count * count).view(count, count)
    hits, support, answered = confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    per_class = [{"class": name, "precision": ratio(hit, said), "recall": ratio(hit, there), "f1": ratio(2 * hit, there + said),
                  "support": there} for name, hit, there, said in zip(classes, hits, support, answered)]
    f1s = [row["f1"] for row in per_class if row["f1"] is not None]
    ranks = (scores > scores.gather(1, targets[:, None])).sum(1)
    metrics = {"n": len(targets), "accuracy": sum(hits) / len(targets), "macro_f1": sum(f1s) / len(f1s),
               "loss": torch.nn.functional.nll_loss(scores, targets).item(),
               **{f"top{k}_accuracy": (ranks < k).double().mean().item() for k in (3, 5) if k < count},
               "temperature": checkpoint["temperature"]}
    return metrics, per_class, confusion


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def list_predictions(paths: list[str], scores: torch.Tensor, targets: torch.Tensor, checkpoint: dict) -> list[dict]:
    """A row per image: its path, true and predicted class, and the probability of the predicted one, from log-probabilities."""
    probability, predicted = scores.exp().max(1)
    names = checkpoint["classes"]
    return [{"path": path, "true": names[t], "predicted": names[p], "probability": round(q, 6)}
            for path, t, p, q in zip(paths, targets.tolist(), predicted.tolist(), probability.tolist())]


# ---------------------------------------------------------------- output

def write_csv(path: Path, rows: list[dict]):
    with replacing(path) as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def show_table(metrics: dict, per_class: list[dict]):
    """The metrics of each class and of all, on stderr."""
    width = max(len("class"), *(len(row["class"]) for row in per_class))
    lines = [f"{'class':<{width}}  precision  recall      f1  support"]
    for row in per_class:
        precision, recall, f1 = ("-" if row[key] is None else f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))
        lines.append(f"{row['class']:<{width}}  {precision:>9}  {recall:>6}  {f1:>6}  {row['support']:7}")
    lines.append(f"accuracy {metrics['accuracy']:.4f}  macro F1 {metrics['macro_f1']:.4f}  loss {metrics['loss']:.4f}  "
                 f"on {metrics['n']} images")
    log("\n".join(lines), stamp=False)


def new_figure(width: float, height: float):
    """A matplotlib figure of width x height inches, drawn without a display; a $ in a class name is a $."""
    matplotlib.rcParams["text.parse_math"] = False
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path):
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def plot_curves(path: Path, history: list[dict], best_epoch: int | None):
    """Loss and accuracy of every split over the epochs, with the epoch that the checkpoint was taken from."""
    figure = new_figure(11, 4.2)
    epochs = [row["epoch"] for row in history]
    for axes, what, title in zip(figure.subplots(1, 2), ("loss", "acc"), ("Cross entropy (nats)", "Accuracy")):
        for split in SPLITS:
            values = [row.get(f"{split}_{what}") for row in history]
            if None not in values:
                label = f"{split} {values[epochs.index(best_epoch)]:.4f}" if best_epoch in epochs else split
                axes.plot(epochs, values, marker="o", markersize=3.5, color=COLOURS[split], label=label)
        if best_epoch in epochs:
            axes.axvline(best_epoch, color="0.6", linestyle="--", linewidth=1, zorder=0,
                         label=f"saved model: epoch {best_epoch}")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.legend()
    save_figure(figure, path)


def plot_confusion(path: Path, confusion: torch.Tensor, classes: list[str], title: str):
    """The confusion matrix [true, predicted]: counts, coloured by the share of the true class."""
    count = len(classes)
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(3.5 + 0.55 * count, 24)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(share.tolist(), cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted", ylabel="true", xticks=range(count), yticks=range(count))
    size = max(3, min(10, 260 / count))
    axes.set_xticklabels(classes, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticklabels(classes, fontsize=size)
    if count <= 40:
        for row in range(count):
            for column in range(count):
                if number := confusion[row, column].item():
                    axes.text(column, row, number, ha="center", va="center", fontsize=min(9, size),
                              color="white" if share[row, column] > 0.5 else "black")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
