"""Classify images: one record per image on stdout, in input order, and pictures if asked for.

Takes files, folders (searched recursively) and - for paths on stdin, one a line. A terminal gets a table, a pipe CSV. An
image that cannot be read gives a record with the reason, the rest goes on, and the exit code is 3. The probabilities are
calibrated by the temperature in the checkpoint.
"""
from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import sys
from pathlib import Path

from common import (EXIT_SOME_UNREADABLE, TTA_HELP, FrozenModel, ImageError, LazyModule, UserError, add_hardware_options,
                    checkpoint_views, command, find_images, log, make_parser, pick_device, positive_int, read_batches,
                    read_checkpoint, read_image, replacing, torch)

matplotlib = LazyModule("matplotlib")
PLOT_COLUMNS, PLOT_ROWS, PLOT_BARS = 3, 6, 5


def parse_args(argv):
    parser = make_parser("predict.py", __doc__,
                         "python predict.py --checkpoint runs/eurosat/model.pt photo.jpg tiles/ --top-k 3")
    group = parser.add_argument_group("input")
    group.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, a folder of images, or - for paths on stdin")
    group.add_argument("--checkpoint", type=Path, required=True, help="the model.pt that train.py wrote")
    group.add_argument("--tta", action="store_true", help=TTA_HELP)
    group = parser.add_argument_group("output")
    group.add_argument("--top-k", type=positive_int, default=1, help="report this many classes, the most probable first")
    group.add_argument("--format", choices=("table", "csv", "jsonl"), help="(default: table on a terminal, else csv)")
    group.add_argument("--plot", type=Path, metavar="FILE.png",
                       help=f"show each image with its {PLOT_BARS} most probable classes; beyond {PLOT_COLUMNS * PLOT_ROWS} "
                            "images, further pages are FILE-2.png, FILE-3.png, ...")
    add_hardware_options(parser)
    args = parser.parse_args(argv)
    args.format = args.format or ("table" if sys.stdout.isatty() else "csv")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    for folder in filter(os.path.isdir, args.images):
        if not any(True for _ in find_images(folder)):
            raise UserError(f"no images in folder {folder}")
    for stream in (sys.stdin, sys.stdout):  # file names need not be valid UTF-8, and a pipe on Windows is not UTF-8 by default
        with contextlib.suppress(AttributeError):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    device = pick_device(args.device)
    checkpoint, model = read_checkpoint(args.checkpoint)
    classes, preprocessing = checkpoint["classes"], checkpoint["preprocessing"]
    frozen = FrozenModel(model, preprocessing, len(classes), device, args.precision)
    views = checkpoint_views(checkpoint, args.tta)
    write = record_writer(args.format, classes, min(args.top_k, len(classes)))
    album = Album(args.plot, classes) if args.plot else None
    images = failures = 0
    for batch in read_batches(list_paths(args.images), preprocessing, frozen.batch_size, args.workers):
        readable = [pixels for _, pixels in batch if not isinstance(pixels, ImageError)]
        rows = iter(probabilities(frozen, readable, checkpoint["temperature"], views))
        for path, pixels in batch:
            images += 1
            if isinstance(pixels, ImageError):
                failures += 1
                write(path, None, pixels.reason)
            else:
                row = next(rows)
                write(path, row, None)
                if album:
                    album.add(path, row)
        sys.stdout.flush()
    if album:
        album.save_page()
    if failures:
        log(f"{failures} of {images} images could not be read")
        return EXIT_SOME_UNREADABLE


def list_paths(arguments: list[str]):
    """Yield the image paths that the arguments stand for; a file that is not there is left for the reader to report."""
    for argument in arguments:
        if argument == "-":
            yield from (line for line in (line.rstrip("\r\n") for line in sys.stdin) if line)
        elif Path(argument).is_dir():
            yield from find_images(argument)
        else:
            yield argument


def probabilities(frozen: FrozenModel, pixels: list[torch.Tensor], temperature: float, views: list) -> list[list[float]]:
    """Calibrated probabilities, a row of one number per class for each uint8 image [3, S, S]."""
    if not pixels:
        return []
    return frozen.log_probabilities(torch.stack(pixels), [temperature], views)[0].exp().tolist()


def top(row: list[float], classes: list[str], count: int) -> list[tuple[str, float]]:
    return [(classes[i], row[i]) for i in sorted(range(len(row)), key=lambda i: -row[i])[:count]]


def record_writer(form: str, classes: list[str], top_k: int):
    """A function write(path, probabilities or None, error or None) that prints one record in the format asked for."""
    width = max(map(len, classes))

    def write_table(path, row, error):
        path = path if path.isprintable() else repr(path)
        best = "  ".join(f"{p:7.2%} {name:<{width}}" for name, p in top(row, classes, top_k)) if row else "error:"
        print(f"{best}  {path}" + (f" ({error})" if error else ""))

    def write_jsonl(path, row, error):
        if error:
            record = {"path": path, "error": error}
        else:
            first, *rest = ({"class": name, "probability": round(p, 6)} for name, p in top(row, classes, top_k))
            record = {"path": path, **first, **({"rest": rest} if top_k > 1 else {})}
        print(json.dumps(record))

    if form != "csv":
        return {"table": write_table, "jsonl": write_jsonl}[form]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    others = [f"{what}_{k}" for k in range(2, top_k + 1) for what in ("class", "probability")]
    writer.writerow(["path", "class", "probability", *others, "error"])

    def write_csv(path, row, error):
        cells = [cell for name, p in top(row, classes, top_k) for cell in (name, round(p, 6))] if row else [""] * (2 * top_k)
        writer.writerow([path, *cells, error or ""])
    return write_csv


class Album:
    """Pages of pictures: each image with its predicted class and bars of its most probable classes."""

    def __init__(self, file: Path, classes: list[str]):
        if not file.parent.is_dir() or file.is_dir():
            raise UserError(f"--plot {file}: " + ("is a folder" if file.is_dir() else f"no such folder: {file.parent}"))
        self.file, self.classes, self.page, self.waiting = file, classes, 1, []

    def add(self, path: str, row: list[float]):
        """Put an image on the page; a full page is written."""
        if len(self.waiting) == PLOT_COLUMNS * PLOT_ROWS:
            self.save_page()
        thumbnail = read_image(path)
        thumbnail.thumbnail((360, 360))
        name = Path(path).name.encode("utf-8", "replace").decode()
        self.waiting.append((thumbnail, name, top(row, self.classes, PLOT_BARS)))

    def save_page(self):
        """Write the images that wait as one page."""
        if not self.waiting:
            return
        matplotlib.rcParams["text.parse_math"] = False
        from matplotlib.figure import Figure
        columns = min(PLOT_COLUMNS, len(self.waiting))
        rows = math.ceil(len(self.waiting) / columns)
        figure = Figure(figsize=(4.6 * columns, 2.05 * rows + 0.2), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.06)
        cells = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.35] * columns).ravel()
        for axes in cells:
            axes.set_axis_off()
        for (image, name, best), left, right in zip(self.waiting, cells[::2], cells[1::2]):
            left.imshow(image, interpolation="nearest" if max(image.size) < 128 else "antialiased")
            left.set_title(name if len(name) < 28 else f"{name[:12]}...{name[-13:]}", fontsize=8, color="0.35")
            right.set_axis_on()
            values = [p for _, p in best]
            right.barh(range(len(best)), values, color=["#8cbde6"] + ["0.85"] * (len(best) - 1))
            for position, (label, p) in enumerate(best):
                right.text(0.02, position, f"{label}  {p:.1%}", va="center", fontsize=8)
            right.set(xlim=(0, 1), xticks=[], yticks=[], ylim=(PLOT_BARS - 0.5, -0.5))
            right.set_title(f"{best[0][0]}  {best[0][1]:.1%}", fontsize=10, fontweight="bold")
            right.spines[["top", "right", "bottom"]].set_visible(False)
        file = self.file if self.page == 1 else self.file.with_name(f"{self.file.stem}-{self.page}{self.file.suffix}")
        with replacing(file, "wb") as opened:
            figure.savefig(opened, format="png", dpi=120)
        log(f"wrote {file}")
        self.waiting, self.page = [], self.page + 1


if __name__ == "__main__":
    sys.exit(main())
