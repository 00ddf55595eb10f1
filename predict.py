"""Classify images and print a record for each, in input order, or map a large scene.

IMAGE is a file, a folder (searched with its subfolders), or - for paths on stdin. Each record is printed before the
next wait for stdin. An image that cannot be read gets a record with the reason, the others are classified, and the exit
code is 3. Probabilities are calibrated with the temperature in the checkpoint.

--scene cuts a large image into tiles and writes DIR/map.png, map.csv, map.json and map.tif, which has a byte per cell:
the index of its class in `classes` of map.json, or 255 (unknown). With more than 255 classes, it has two bytes, and
65535. In map.json, `percent` is the area of each class on the map, and `expected_percent` its mean probability: a
better estimate of the area if the probabilities are calibrated for this scene and the classes are as frequent as in the
training. For official figures, use a sample of reference data (Olofsson et al., 2014).

--export writes the model to a file that other programs can run.
"""

from __future__ import annotations

import argparse
import colorsys
import contextlib
import functools
import importlib
import io
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, islice, product, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import ExifTags, Image, ImageDraw, ImageFont, TiffImagePlugin

from common import EXIT_SOME_UNREADABLE, TTA_HELP
from common import Checkpoint, ImageBatch, ImageError, InferenceModel, LazyModule, Progress, UserError, View
from common import add_hardware_options, apply_view, atomic_write, center_square, check_output_outside
from common import checkpoint_precision, checkpoint_views, command, crops_squares, csv_writer, find_images, fit_text
from common import fraction, in_batches, is_image_name, log, log_device, make_parser, new_figure, one_line, open_image
from common import pick_device, positive_int, print_json, printable, read_batches, read_checkpoint, read_image
from common import resize_by_products, resize_weights, save_figure, shorten, to_json_text, unfamiliarity, write_csv
from common import write_torch_file

if TYPE_CHECKING:
    import torch
    import torchvision
    from torchvision.transforms.v2 import functional
else:
    torch, torchvision = LazyModule("torch"), LazyModule("torchvision")
    functional = LazyModule("torchvision.transforms.v2.functional")

# ---------------------------------------------------------------- command line

UNKNOWN = "unknown"  # the answer where a Rejection applies
PAGE_IMAGES, BARS = 18, 5  # images on a page of --plot, and classes shown for each
EXPORT_IMAGES, EXPORT_TOLERANCE = 32, 0.01  # images on which an exported model is tried; the largest difference allowed
MAX_SCENE_PIXELS = 400_000_000  # a pixel takes 4 bytes of memory, and 4 more if the file is not RGB


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, check which options go together, and fill in the defaults that depend on others."""
    example = "python predict.py --checkpoint runs/eurosat/model.pt photo.jpg tiles/ --top-k 3"
    parser = make_parser("predict.py", __doc__, example)
    add = parser.add_argument_group("input").add_argument
    add("images", nargs="*", metavar="IMAGE", help="an image file, a folder of images, or - for paths on stdin")
    add("-0", "--null", action="store_true", help="paths on stdin end with NUL, as from find -print0; implies -")
    add("--checkpoint", type=Path, required=True, help="the model.pt that train.py wrote")
    add("--tta", action="store_true", help=TTA_HELP)
    add = parser.add_argument_group("output").add_argument
    add("--top-k", type=positive_int, default=1, help="report this many classes, the most probable first")
    least = f"answer {UNKNOWN} below this probability, which is to be chosen from the report of evaluate.py --split val"
    add("--min-confidence", type=fraction, default=0.0, metavar="P", help=least)
    unfamiliar_help = (
        f"also answer {UNKNOWN} for images unlike those of the training. SHARE of the val images would be rejected too "
        "(default: 0.01; put the option last, or give SHARE). It recognizes images of another kind, but often not a "
        "new class that is similar to the others"
    )
    add("--reject-unfamiliar", type=fraction, nargs="?", const=0.01, metavar="SHARE", help=unfamiliar_help)
    add("--format", choices=("table", "csv", "jsonl"), help="(default: table on a terminal, else csv)")
    plot_help = f"draw images with their {BARS} best classes, {PAGE_IMAGES} per page: FILE.png, FILE-2.png"
    add("--plot", type=Path, metavar="FILE.png", help=plot_help)
    features_help = "save the network's output before its classifier for each image: a dict of paths, features [N, D], "
    features_help += "arch and preprocessing, for torch.load"
    add("--features", type=Path, metavar="FILE.pt", help=features_help)
    add("--explain", action="store_true", help="in --plot, show what supports the prediction (convolutional networks)")
    export_help = (
        "write the model with its preprocessing for other programs, instead of classifying: FILE.pt2 for torch alone, "
        "FILE.onnx for ONNX runtimes. It takes upright RGB images of any size, uint8 [N, 3, H, W], and returns the "
        f"probabilities [N, classes]; before it is kept, it is compared with this program on {EXPORT_IMAGES} images: "
        "those given as IMAGE, else drawn ones (large JPEGs are decoded in full for that, not at a reduced size)"
    )
    add("--export", type=Path, metavar="FILE", help=export_help)
    add = parser.add_argument_group("map of a large scene").add_argument
    size_help = f"an image of at most {MAX_SCENE_PIXELS // 10**6} million pixels; of a TIFF, the first three bands"
    add("--scene", type=Path, metavar="IMAGE", help=size_help)
    add("--tile", type=positive_int, metavar="PIXELS", help="side of a tile (default: that of the training images)")
    stride_help = (
        "step between tiles, side of a cell (default: --tile); if it is smaller than --tile, a cell averages several "
        "tiles, and its probability is no longer calibrated"
    )
    add("--stride", type=positive_int, metavar="PIXELS", help=stride_help)
    add("--out", type=Path, metavar="DIR", help="folder for the map")
    add_hardware_options(parser)
    args = parser.parse_args(argv)
    if args.null and "-" not in args.images:
        args.images.append("-")
    if not args.images and not args.scene and not args.export:
        parser.error("nothing to classify: give images, folders, - for paths on stdin, or --scene")
    if args.export:
        records = args.plot or args.explain or args.features or args.format or args.top_k > 1 or args.min_confidence
        if records or args.reject_unfamiliar is not None or args.scene or args.device or args.precision != "auto":
            parser.error("--export goes with --checkpoint, IMAGE, --tta, --workers only; it computes in fp32 on a CPU")
    if args.scene:
        if args.images or args.plot or args.explain or args.features or args.format or args.top_k > 1:
            parser.error("--scene cannot be combined with IMAGE, --top-k, --format, --features, --plot or --explain")
        if not args.out:
            parser.error("--scene needs --out DIR, the folder for the map")
    elif args.out or args.tile or args.stride:
        parser.error("--tile, --stride and --out need --scene")
    if args.explain and not args.plot:
        parser.error("--explain draws into the pictures of --plot FILE.png, which is missing")
    args.format = args.format or ("table" if sys.stdout.isatty() else "csv")
    return args


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code."""
    args = parse_args(argv)
    check_output("--plot", args.plot, ".png")
    check_output("--features", args.features)
    check_output("--export", args.export, ".pt2", ".onnx")
    written = [args.out / name for name in MAP_FILES] if args.scene else [args.plot, args.features, args.export]
    check = functools.partial(check_input, [file for file in written if file], args.plot)
    check(args.checkpoint)
    paths = list_paths(args.images, args.null, check)
    with contextlib.suppress(AttributeError):  # file names need not be UTF-8, nor is a pipe on Windows by default
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    device = pick_device("cpu" if args.export else args.device)
    checkpoint = read_checkpoint(args.checkpoint)
    if args.scene:
        check(args.scene)
        tile, stride = pick_tile(args.tile, args.stride, checkpoint.native_size)
        scene = read_scene(args.scene, tile)
    precision = "fp32" if args.export else checkpoint_precision(checkpoint, args.precision)
    model = InferenceModel(checkpoint, device, precision)
    log_device(device, [model.dtype])
    views, temperature = checkpoint_views(checkpoint, args.tta, args.checkpoint)
    familiarity = None if args.reject_unfamiliar is None else checkpoint.familiarity
    if args.reject_unfamiliar is not None and familiarity is None:
        problem = f"{args.checkpoint} was trained by an earlier version; train the model again"
        raise UserError(f"--reject-unfamiliar: {problem}")
    rejection = Rejection(args.min_confidence, args.reject_unfamiliar)
    classifier = Classifier(model, checkpoint.classes, views, temperature, familiarity, args.workers)
    if args.scene:
        args.out.mkdir(parents=True, exist_ok=True)
        scene_map = map_scene(scene, classifier, tile, stride, rejection)
        print_json(*write_map(args.out, args.scene, scene, scene_map))
        return 0
    if args.export:
        print_json(*export(args.export, checkpoint, classifier, paths))
        return 0
    outputs: list[Any] = [PredictionPages(args.plot, classifier, rejection, args.explain)] if args.plot else []
    outputs += [FeatureFile(args.features, checkpoint)] if args.features else []
    writer = RecordWriter(args.format, classifier.classes, rejection, args.top_k)
    return print_records(classifier.classify(paths), writer, outputs)


def check_output(option: str, file: Path | None, *suffixes: str) -> None:
    """Raise UserError if a file of the command line cannot be written: a folder, in no folder, or a wrong name."""
    if file is None:
        return
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"{option} {file}: " + ("is a folder" if file.is_dir() else f"no such folder: {file.parent}"))
    if suffixes and file.suffix.lower() not in suffixes:
        names = " or ".join(file.with_suffix(suffix).name for suffix in suffixes)
        raise UserError(f"{option} {file}: the name has to end in {' or '.join(suffixes)}; call it {names}")


def check_input(outputs: Sequence[Path], plot: Path | None, path: str | Path) -> str | Path:
    """Return the path of an input. Raises UserError if an output would replace it, or be an image in that folder."""
    with contextlib.suppress(ValueError):  # a path with NUL, which no file can have
        number = plot and re.search(r"-\d+$", Path(os.path.realpath(path)).stem)  # as in the name of a later page
        for file in [*outputs, *([plot.with_stem(plot.stem + number[0])] if number else [])]:
            if is_image_name(file.name) or not os.path.isdir(path):
                check_output_outside("output", file, [path])
    return path


def list_paths(arguments: list[str], null: bool, check: Callable[[str], str]) -> Iterator[str | None]:
    """Return the paths in files, folders and on stdin, each after `check`. Raises UserError for an empty folder."""
    for path in map(check, arguments):
        if os.path.isdir(path) and next(find_images(path), None) is None:
            raise UserError(f"no images in folder {path}")
    found = (
        read_stdin(null) if path == "-" else find_images(path) if os.path.isdir(path) else [path] for path in arguments
    )
    return (path and check(path) for path in chain.from_iterable(found))


def read_stdin(null: bool) -> Iterator[str | None]:
    """Yield the paths on stdin, and None before each wait for more, so that the images so far are classified first."""
    if sys.stdin is None:
        raise UserError("no paths to read: stdin is closed")
    end, rest, block = b"\0" if null else b"\n", b"", True
    while block:
        block = sys.stdin.buffer.read1(1 << 16)
        *names, rest = (rest + (block or end)).split(end)  # the last path need not be terminated
        names = names if null else [name.rstrip(b"\r") for name in names]
        yield from (os.fsdecode(name) for name in names if name)
        yield None


# ---------------------------------------------------------------- classification


class Prediction(NamedTuple):
    """The result for one image: its pixels and probabilities, or an error."""

    path: Any  # the file; for a tile of a scene its box (left, top, right, bottom)
    pixels: torch.Tensor | None = None  # as read by `read_batches`: uint8 [3, s, s]
    probabilities: torch.Tensor | None = None  # of each class, calibrated, float64 [C]
    features: torch.Tensor | None = None  # before the classifier, float32 [D]
    unfamiliar: float | None = None  # see `unfamiliarity`; only with --reject-unfamiliar
    error: str | None = None  # why the image cannot be read

    def rank(self, classes: list[str], count: int) -> list[tuple[str, float]]:
        """Return the `count` most probable classes with their probabilities; ties are in the order of classes."""
        values, order = (part[:count].tolist() for part in self.probabilities.sort(descending=True, stable=True))
        return [(classes[index], probability) for index, probability in zip(order, values)]


class Rejection(NamedTuple):
    """When to answer UNKNOWN."""

    min_confidence: float  # below this probability
    unfamiliar_share: float | None  # for images unlike those of train; the share of val that this rejects too

    def applies(self, probability: Any, unfamiliar: Any) -> Any:
        """Return whether to answer UNKNOWN, for numbers or for tensors."""
        unsure = probability < self.min_confidence
        return unsure if self.unfamiliar_share is None else unsure | (unfamiliar > 1 - self.unfamiliar_share)


class Classifier(NamedTuple):
    """A trained network, and how to use it."""

    model: InferenceModel
    classes: list[str]  # in the order of the network's outputs
    views: Sequence[View]  # to average over
    temperature: float  # of that average
    familiarity: dict[str, torch.Tensor] | None = None  # of the checkpoint; None: predictions are not checked for it
    workers: int | None = None  # threads that read images; None: the default

    def classify(self, paths: Iterable[Any], read: Callable = read_image) -> Iterator[list[Prediction]]:
        """Yield the predictions for batches of images, in order.

        A None among the paths means that the next one may have to be waited for. `read` is that of `read_batches`. A
        batch is started before the results of the previous one are fetched, so that a GPU always has something to do.
        """
        batches = in_batches(paths, self.model.batch_size)
        started = None
        for batch in chain(read_batches(batches, self.model.preprocessing, self.workers, read), [None]):
            previous, started = started, batch and self.start(batch)
            if previous:
                yield self.finish(*previous)

    def start(self, batch: ImageBatch) -> tuple[ImageBatch, torch.Tensor | None, torch.Tensor | None]:
        """Run the network on a batch; return it with logits and features on the device, None if no image is readable.

        The features are those of the first view, the image as it is.
        """
        if not len(batch.pixels):
            return batch, None, None
        features = self.model.forward_views(batch.pixels, self.views)
        return batch, self.model.forward_head(features), features[0]

    def finish(self, batch: ImageBatch, logits: torch.Tensor | None, features: torch.Tensor | None) -> list[Prediction]:
        """Return the predictions for a batch."""
        rows = iter(())
        if logits is not None:
            probabilities, features = self.model.log_probabilities(logits, [self.temperature])[0].exp(), features.cpu()
            unfamiliar = unfamiliarity(features, self.familiarity).tolist() if self.familiarity else repeat(None)
            rows = zip(batch.pixels, probabilities, features, unfamiliar)
        return [
            Prediction(path, error=error.reason) if error else Prediction(path, *next(rows))
            for path, error in zip(batch.items, map(batch.errors.get, count()))
        ]


# ---------------------------------------------------------------- records


class RecordWriter:
    """Print a record for each image on stdout, as "table", "csv" or "jsonl", with up to `top_k` classes."""

    def __init__(self, record_format: str, classes: list[str], rejection: Rejection, top_k: int) -> None:
        self.format, self.classes, self.top_k = record_format, classes, min(top_k, len(classes))
        space = len("100.00% " if rejection == Rejection(0, None) else unknown_label("", 1))
        self.width = space + max(len(printable(name)) for name in classes)  # of a table's columns
        self.rejection, self.csv = rejection, csv_writer(sys.stdout)
        if self.format == "csv":
            others = [f"{column}_{k}" for k in range(2, self.top_k + 1) for column in ("class", "probability")]
            unfamiliar = ["unfamiliar"] * (rejection.unfamiliar_share is not None)
            self.csv.writerow(["path", "class", "probability", *others, *unfamiliar, "error"])

    def write(self, prediction: Prediction) -> None:
        """Print the record of an image."""
        path, error, unfamiliar = prediction.path, prediction.error, {}
        if self.rejection.unfamiliar_share is not None:
            unfamiliar = {"unfamiliar": None if error else round(prediction.unfamiliar, 4)}
        best = prediction.rank(self.classes, self.top_k) if error is None else []
        unknown = error is None and self.rejection.applies(best[0][1], prediction.unfamiliar)
        if unknown and self.format != "table":
            best = [(UNKNOWN, best[0][1]), *best][: self.top_k]
        if self.format == "csv":
            cells = [cell for name, p in best for cell in (name, round(p, 6))] or [""] * (2 * self.top_k)
            self.csv.writerow([path, *cells, *unfamiliar.values(), error])
        elif self.format == "jsonl":
            first, *rest = [{"class": name, "probability": round(p, 6)} for name, p in best] or [{"error": error}]
            more = {"rest": rest} if best and self.top_k > 1 else {}
            print(to_json_text({"path": path, **first, **more, **(unfamiliar if best else {})}))
        else:
            cells = [f"{p:7.2%} {printable(name)}".ljust(self.width) for name, p in best]
            cells[:1] = [unknown_label(*best[0]).ljust(self.width)] if unknown else cells[:1]
            print("  ".join([*cells, printable(path)]) if best else f"error:  {printable(path)} ({printable(error)})")


def unknown_label(name: str, probability: float) -> str:
    """Return UNKNOWN with the most probable class behind it, for people to read."""
    return f"{UNKNOWN} ({printable(name)} {probability:.1%})"


class FeatureFile:
    """The file of --features: what the network computes for each image, before its classifier."""

    def __init__(self, file: Path, checkpoint: Checkpoint) -> None:
        self.file, self.checkpoint = file, checkpoint
        self.paths: list[str] = []
        self.rows: list[torch.Tensor] = []  # float32 [D] of each path

    def add(self, prediction: Prediction) -> None:
        """Remember the features of an image."""
        self.paths.append(prediction.path)
        self.rows.append(prediction.features)

    def save(self) -> None:
        """Write the file."""
        content = {"arch": self.checkpoint.arch, "preprocessing": self.checkpoint.preprocessing, "paths": self.paths}
        content["features"] = torch.stack(self.rows) if self.rows else torch.empty(0, 0)
        write_torch_file(self.file, content)
        log(f"wrote {self.file}")


def print_records(batches: Iterable[list[Prediction]], writer: RecordWriter, outputs: Sequence[Any]) -> int:
    """Print a record for each prediction, and add those of readable images to the outputs; return the exit code."""
    images = failures = 0
    for batch in batches:
        for prediction in batch:
            writer.write(prediction)
            for output in outputs if prediction.error is None else ():
                output.add(prediction)
        images, failures = images + len(batch), failures + sum(prediction.error is not None for prediction in batch)
        sys.stdout.flush()
    for output in outputs:
        output.save()
    if failures:
        log(f"{failures} of {images} images could not be read")
    return EXIT_SOME_UNREADABLE if failures else 0


# ---------------------------------------------------------------- pictures


def grad_cam(model: InferenceModel, pixels: torch.Tensor, target: int) -> torch.Tensor:
    """Return where an image supports the class `target`: uint8 pixels [3, s, s] -> [h, w] in 0..1, on the CPU.

    Grad-CAM (Selvaraju et al., ICCV 2017): the last feature map, weighted by the mean gradients of the class's logit.
    Moves the network to the model's device. Raises UserError if it ends in tokens, as a vision transformer does.
    """
    network, features = model.network.model.to(model.device), None

    def remember(_module: torch.nn.Module, _inputs: tuple, output: Any) -> None:
        nonlocal features  # the last output that is tokens [1, N, C], or a map [1, C, H, W] of more than one pixel
        if torch.is_tensor(output) and (output.dim() == 3 or min(output.shape[2:], default=1) > 1):
            features = output

    with contextlib.ExitStack() as hooks:  # it removes them in the end
        for module in network.modules():
            hooks.enter_context(module.register_forward_hook(remember))
        logits = network(model.normalize(model.load_pixels(pixels[None])).requires_grad_(True))
    if features is None or features.dim() != 4:
        raise UserError(f"--explain needs a network that ends in a feature map: {type(network).__name__} does not")
    (gradient,) = torch.autograd.grad(logits[0, target], features)
    cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1)[0].relu().detach()
    return (cam / cam.max()).nan_to_num().cpu()  # 0 / 0 if nothing supports the class


class PredictionPages:
    """The pages of --plot, FILE.png, FILE-2.png, ..., with Grad-CAM maps if `explain` is set."""

    def __init__(self, file: Path, classifier: Classifier, rejection: Rejection, explain: bool) -> None:
        if explain:  # a network without a feature map is refused before the first record
            size = classifier.model.preprocessing["size"]
            grad_cam(classifier.model, torch.zeros(3, size, size, dtype=torch.uint8), 0)
        self.file, self.classifier, self.rejection, self.explain = file, classifier, rejection, explain
        self.page, self.pictures = 1, []  # the number of the page, and (prediction, thumbnail) of its images

    def add(self, prediction: Prediction) -> None:
        """Put an image on the page, and write the page if it is full."""
        thumbnail = read_image(prediction.path)
        thumbnail.thumbnail((360, 360))
        self.pictures.append((prediction, thumbnail))
        if len(self.pictures) == PAGE_IMAGES:
            self.save()

    def save(self) -> None:
        """Write the page, if it has images, and start the next one."""
        if not self.pictures:
            return
        widths = [1, 1, 1.2] if self.explain else [1, 1.2]
        columns = min(2 if self.explain else 3, len(self.pictures))  # a page fits a screen without being scaled down
        rows = math.ceil(len(self.pictures) / columns)
        figure = new_figure(1.75 * sum(widths) * columns, 2.1 * rows + 0.2 + self.explain)
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.06)
        axes = figure.subplots(rows, len(widths) * columns, squeeze=False, width_ratios=widths * columns).ravel()
        for number, cell in enumerate(axes):
            cell.set(anchor="N", xticks=[], yticks=[], visible=number < len(self.pictures) * len(widths))
            cell.spines[:].set_color("0.8")  # a frame, because an image may be as white as the page
        for number, (prediction, image) in enumerate(self.pictures):
            left, *middle, right = axes[number * len(widths) :][: len(widths)]
            left.imshow(image, interpolation="nearest" if max(image.size) < 128 else "antialiased")
            left.set_title(shorten(Path(prediction.path).name), fontsize=8, color="0.35")
            best = prediction.rank(self.classifier.classes, BARS)
            if self.explain:
                model, target = self.classifier.model, int(prediction.probabilities.argmax())
                seen = center_square(image.size) if crops_squares(model.preprocessing) else (0, 0, *image.size)
                draw_cam(middle[0], image.size, seen, grad_cam(model, prediction.pixels, target))
            draw_bars(right, best, self.rejection.applies(best[0][1], prediction.unfamiliar))
        if self.explain:
            label = "support for the first class, relative to its maximum in the image"
            figure.colorbar(middle[0].images[0], ax=axes, location="bottom", panchor=False, shrink=0.4, label=label)
        file = self.file if self.page == 1 else self.file.with_stem(f"{self.file.stem}-{self.page}")
        save_figure(file, figure)
        log(f"wrote {file}")
        self.pictures, self.page = [], self.page + 1


def draw_cam(axes: Any, image_size: tuple[int, int], seen: tuple[int, int, int, int], cam: torch.Tensor) -> None:
    """Draw a Grad-CAM map where the network has seen an image, in its part (left, top, right, bottom)."""
    (width, height), (left, top, right, bottom) = image_size, (edge - 0.5 for edge in seen)
    extent = (left, right, bottom, top)
    axes.imshow(cam.tolist(), cmap="inferno", vmin=0, vmax=1, interpolation="bilinear", extent=extent)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_title("support" if cam.any() else "nothing supports it", fontsize=8, color="0.35")


def draw_bars(axes: Any, best: list[tuple[str, float]], unknown: bool) -> None:
    """Draw the most probable classes as bars, under the first one, or UNKNOWN, as title."""
    axes.barh(range(len(best)), [p for _, p in best], color=["#8cbde6"] + ["0.85"] * (len(best) - 1))
    labels = [f"{shorten(name, 22)}  {p:.1%}" for name, p in best]
    for position, label in enumerate(labels):
        axes.text(0.02, position, label, va="center", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(BARS - 0.5, -0.5))
    title = unknown_label(shorten(best[0][0], 22), best[0][1]).replace(" (", "\n(", 1) if unknown else labels[0]
    axes.set_title(title, fontsize=8, fontweight="bold")
    axes.spines[["top", "right", "bottom"]].set_visible(False)


# ---------------------------------------------------------------- export


def export(file: Path, checkpoint: Checkpoint, classifier: Classifier, paths: Iterable[str | None]) -> tuple[dict, str]:
    """Write the model and its preprocessing to FILE.pt2 (torch.export) or FILE.onnx; return a report and a summary.

    The classes, the preprocessing and the form of input and output are inside as JSON: the extra file metadata.json of
    a .pt2, the metadata "classifier" of an .onnx. Raises UserError if a package is missing, if the network cannot be
    exported, or if the result differs from `classifier` by more than EXPORT_TOLERANCE; then nothing is written.
    """
    images, origin = [read_image(path) for path in islice(filter(None, paths), EXPORT_IMAGES)], "given"
    if not images:
        images, origin = draw_test_images(), "drawn"
    save_and_load, dtype = export_torch, torch.float64
    if file.suffix.lower() == ".onnx":
        save_and_load, dtype = export_onnx, torch.float32  # ONNX runtimes do not resize in float64
    metadata = {"arch": checkpoint.arch, "classes": checkpoint.classes, "preprocessing": checkpoint.preprocessing}
    metadata |= {"views": len(classifier.views), "temperature": classifier.temperature}
    metadata |= {"input": "uint8 [N, 3, H, W], upright RGB images of any size", "output": "probabilities [N, classes]"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        try:
            dynamic = torch.export.Dim.DYNAMIC
            example, shapes = torch.zeros(2, 3, 65, 67, dtype=torch.uint8), ({0: dynamic, 2: dynamic, 3: dynamic},)
            module = exportable_model(classifier, dtype)
            program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
            content, run = save_and_load(program, to_json_text(metadata))
        except ImportError as error:
            packages = "pip install onnx onnxscript onnxruntime"
            raise UserError(f"--export {file}: {one_line(error)}; the packages it needs: {packages}") from None
        except Exception as error:  # the exporters raise many kinds
            reason = one_line(str(error.__cause__ or error).partition("\n")[0])[:200]
            problem = f"torch {torch.__version__} cannot export {checkpoint.arch}: {reason}"
            raise UserError(f"--export {file}: {problem}; a newer version may be able to") from None
        difference = max_difference(classifier, images, run)
    if not difference <= EXPORT_TOLERANCE:
        problem = f"on {len(images)} images its probabilities differ from those of this program by up to "
        version = f"torchvision {torchvision.__version__}; 0.21 resizes differently on some processors"
        raise UserError(f"--export {file}: not written, because {problem}{difference:.3g} ({version})")
    with atomic_write(file, "wb") as stream:
        stream.write(content)
    report = {"export": str(file), "bytes": len(content), "images": len(images), "max_difference": difference}
    reference = f"those of predict.py --precision fp32 on {len(images)} {origin} images"
    return report, f"wrote {file}; its probabilities differ by at most {difference:.1e} from {reference}"


def exportable_model(classifier: Classifier, resize_dtype: torch.dtype) -> torch.nn.Module:
    """Return the module that is exported: uint8 images [N, 3, H, W] -> probabilities [N, C], float32.

    It resizes like torchvision (in float32 with rounding errors, where the image is large), averages over the views and
    applies the temperature like `Classifier`.
    """
    model, preprocessing = classifier.model, classifier.model.preprocessing
    size = preprocessing["size"]
    weights_of = functools.partial(resize_weights, dtype=resize_dtype)

    class ExportableModel(torch.nn.Module):  # defined inside the function, because torch is imported lazily
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model.backbone, model.head
            for name in ("mean", "std"):
                self.register_buffer(name, 255 * torch.tensor(preprocessing[name]).view(3, 1, 1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if crops_squares(preprocessing):  # indices, because the exporter cannot trace slices of unknown size
                height, width = images.shape[2:]
                side = torch.sym_min(height, width)
                steps = torch.arange(side, device=images.device)
                images = images.index_select(2, (height - side) // 2 + steps)
                images = images.index_select(3, (width - side) // 2 + steps)
            pixels = resize_by_products(images, size, preprocessing["interpolation"], weights_of)
            normalized = (pixels - self.mean) / self.std
            views = [self.head(self.backbone(apply_view(normalized, view))) for view in classifier.views]
            averaged = torch.stack([logits.log_softmax(1) for logits in views]).logsumexp(0)
            return (averaged / classifier.temperature).softmax(1)

    return ExportableModel().eval().requires_grad_(False)


def export_torch(program: torch.export.ExportedProgram, metadata: str) -> tuple[bytes, Callable]:
    """Return the content of a .pt2 file, and a function that runs it: uint8 [N, 3, H, W] -> [N, C]."""
    for node in program.graph.nodes:
        node.meta.pop("nn_module_stack", None)  # torch 2.6 writes it in a form that it cannot read
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": metadata})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def export_onnx(program: torch.export.ExportedProgram, metadata: str) -> tuple[bytes, Callable]:
    """Return the content of an .onnx file, and a function that runs it: uint8 [N, 3, H, W] -> [N, C]."""
    onnxruntime = importlib.import_module("onnxruntime")
    names = {"input_names": ["images"], "output_names": ["probabilities"]}
    exported = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    proto = exported.model_proto
    proto.metadata_props.add(key="classifier", value=metadata)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def draw_test_images() -> list[Image.Image]:
    """Return EXPORT_IMAGES colorful images of three sizes, the same ones each time: clouds under fine noise."""
    generator, images = torch.Generator().manual_seed(0), []
    for number in range(EXPORT_IMAGES):
        height, width = ((64, 64), (333, 500), (640, 480))[number % 3]
        clouds = torch.rand(1, 3, 5, 5, generator=generator)
        clouds = torch.nn.functional.interpolate(clouds, (height, width), mode="bicubic")[0]
        noise = torch.rand(3, height, width, generator=generator)
        pixels = (255 * (0.8 * clouds + 0.2 * noise)).clamp(0, 255).byte()
        images.append(functional.to_pil_image(pixels))
    return images


def max_difference(classifier: Classifier, images: Sequence[Image.Image], run: Callable) -> float:
    """Return the largest difference of a probability between `classifier` and an exported model, NaN if it has one.

    Images of the same size are given to the exported model together, up to four, because large ones take much memory.
    """
    batches = classifier.classify(images, lambda image, _size: image)
    expected = [prediction.probabilities for batch in batches for prediction in batch]
    differences = []
    for size in {image.size for image in images}:
        for rows in in_batches((row for row, image in enumerate(images) if image.size == size), 4):
            found = run(torch.stack([functional.pil_to_tensor(images[row]) for row in rows]))
            differences.append((found - torch.stack([expected[row] for row in rows])).abs().max())
    return torch.stack(differences).max().item()


# ---------------------------------------------------------------- map of a scene

MAX_MAP_SIDE, LEGEND_ROWS, OPACITY = 4096, 30, 0.6  # pixels of map.png; names in the legend; opacity of the colors
MAP_FILES = ("map.png", "map.csv", "map.json", "map.tif")
WORLD_FILES = (".pgw", ".jgw", ".tfw", ".wld")
GRAY = (128, 128, 128)  # the color of unknown
# Hues like those of EuroSAT's classes, in order, chosen by a search that maximizes the smallest distance between two
# colors, GRAY included: 0.09 in OKLab after blending with gray, for normal, red-blind and green-blind vision (Machado
# et al., 2009).
COLORS = ("ffff00", "228800", "ccaa88", "000000", "9944cc", "99ffaa", "ffaa00", "aa0033", "66ccff", "0000aa")


class TileAxis(NamedTuple):
    """The tiles along one side of a scene, and the cells of its map."""

    length: int  # of the side, in pixels
    tile: int  # side of a tile
    stride: int  # from tile to tile, and side of a cell

    def tile_starts(self) -> list[int]:
        """Return the first pixel of each tile; the last tile is moved inward to end with the scene."""
        return [*range(0, self.length - self.tile, self.stride), self.length - self.tile]

    def cell_sizes(self) -> torch.Tensor:
        """Return the pixels of each cell, float64 [cells]; the last one may be cut off by the edge."""
        return (self.length - torch.arange(0, self.length, self.stride)).clamp(max=self.stride).double()

    def cell_weights(self) -> torch.Tensor:
        """Return the weight of each tile in each cell, float64 [cells, tiles], by the pixels that they share."""
        tiles, cells = torch.tensor(self.tile_starts()), torch.arange(0, self.length, self.stride)[:, None]
        shared = torch.minimum(tiles + self.tile, cells + self.stride).sub(torch.maximum(tiles, cells)).clamp(min=0)
        return shared.double() / shared.sum(1, keepdim=True)


class SceneMap(NamedTuple):
    """The class of each cell of a scene."""

    names: list[str]  # of the classes, and UNKNOWN
    classes: torch.Tensor  # index into names, int64 [rows, columns]
    probabilities: torch.Tensor  # of the most probable class, float64 [rows, columns]
    percent: list[float]  # of the scene's area, for each name
    expected_percent: list[float]  # mean probability of each class over the area, also where the answer is UNKNOWN
    tile: int  # side of a tile in pixels of the scene
    cell: int  # side of a cell
    tiles: int  # how many were classified


def pick_tile(tile: int | None, stride: int | None, native_size: int | None) -> tuple[int, int]:
    """Return the sides of a tile and of a cell, by default the size of the training images."""
    if not tile:
        tile = native_size or 64
        reason = "as the training images" if native_size else "the model does not know the size of its training images"
        log(f"tiles of {tile} pixels ({reason}); see --tile")
    if stride and stride > tile:
        raise UserError(f"--stride {stride} would leave gaps between tiles of {tile} pixels")
    return tile, stride or tile


def read_scene(path: Path, tile: int) -> Image.Image:
    """Read a scene. Raises UserError if it is smaller than a tile."""
    Image.MAX_IMAGE_PIXELS = MAX_SCENE_PIXELS // 2  # Pillow warns above this number, and refuses twice as many
    TiffImagePlugin.logger.disabled = True  # it prints an error that is raised anyway
    for (order, end), name in product(((b"II", "L"), (b"MM", "B")), ("RGB", "RGBA")):
        # Pillow reads bands of 16 bits if they are marked as RGB; GDAL marks them as gray and others by default.
        key = (order, 1, (1,), 1, (16,) * len(name), (0,) * (len(name) - 1))
        TiffImagePlugin.OPEN_INFO.setdefault(key, (name, f"{name};16{end}"))
    try:
        image = read_image(path)
        with open_image(path) as raw:
            tags, turned = getattr(raw, "tag_v2", {}), raw.getexif().get(ExifTags.Base.Orientation, 1) != 1
            bits, color, planes = (tags.get(tag, default) for tag, default in ((258, (8,)), (262, 2), (284, 1)))
            if planes == 2 and len(bits) > 1 and (max(bits) > 8 or color != 2):  # Pillow would read something else
                raise ImageError(path, "its bands are stored one after the other")
            if raw.mode.startswith("I;16") and tags:
                raise ImageError(path, "it has one band of 16 bits")
            if max(bits) == 16 and raw.mode in ("RGB", "RGBA"):
                image = stretch_16_bits(image, raw)
    except ImageError as error:
        if path.suffix.lower() not in (".tif", ".tiff") or not path.is_file() or "limit" in error.reason:
            raise
        options = "-co INTERLEAVE=PIXEL -co PHOTOMETRIC=RGB"
        convert = f"gdal_translate -b 1 -b 2 -b 3 {options} {shlex.quote(str(path))} rgb.tif"
        also = "For floats or signed numbers add -ot Byte -scale; for a single band write -b 1 -b 1 -b 1"
        raise UserError(f"{error}. GDAL can convert it: {convert}. {also}") from None
    if read_georeference(path) and turned:  # programs disagree on what that means
        raise UserError(f"{path} is turned by its EXIF tag, its georeference is not: save it upright, without the tag")
    if min(image.size) < tile:
        size = f"{image.width} x {image.height} pixels"
        raise UserError(f"tiles of {tile} pixels are larger than {path}, which has {size}; see --tile")
    return image


def stretch_16_bits(high: Image.Image, raw: Image.Image) -> Image.Image:
    """Return RGB of a TIFF of 16 bits, of which Pillow has read the higher bytes; 0 and 255 are percentiles 2 and 98.

    One range for the three bands preserves the hue. Nodata and zeros, which often mean that, do not count.
    """
    swapped = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}  # N: the order of this machine
    for number, (*place, (rawmode, *others)) in enumerate(raw.tile):  # a swapped byte order gives the lower bytes
        make = getattr(raw.tile[number], "_make", tuple)  # a named tuple in later versions of Pillow
        raw.tile[number] = make((*place, (rawmode[:-1] + swapped[rawmode[-1]], *others)))
    raw.load()
    rows = math.ceil(2**20 / high.width)  # at a time, to save memory
    tops, counts = range(0, high.height, rows), torch.zeros(1 << 16, dtype=torch.int64)

    def read_rows(top: int) -> torch.Tensor:
        box = 0, top, high.width, min(top + rows, high.height)
        parts = (torch.frombuffer(bytearray(half.crop(box).tobytes()), dtype=torch.uint8) for half in (high, raw))
        first, second = (part.view(box[3] - top, high.width, -1)[..., :3] for part in parts)
        return 256 * first.int() + second

    for top in tops:
        counts += torch.bincount(read_rows(top).flatten(), minlength=len(counts))
    with contextlib.suppress(TypeError, ValueError, IndexError):
        counts[int(float(raw.tag_v2.get(42113)))] = 0  # nodata, in GDAL's tag
    shares = counts[1:].cumsum(0) / counts[1:].sum().clamp(min=1)
    least, most = (torch.searchsorted(shares, torch.tensor([0.02, 0.98])) + 1).tolist()
    log(f"16-bit scene: bands 1 to 3 are red, green, blue; {least} to {most} (percentiles 2 and 98) become 0 to 255")
    table = ((torch.arange(len(counts)) - least) * (255 / max(1, most - least))).clamp(0, 255).round().byte()
    for top in tops:
        pixels = table[read_rows(top)]
        high.paste(Image.frombytes("RGB", (high.width, len(pixels)), pixels.numpy().tobytes()), (0, top))
    return high


def read_georeference(path: Path, cell: int = 1) -> dict[int, Any]:
    """Return the TIFF tags that georeference a map of a scene, one pixel per `cell` x `cell` pixels; {} if unknown.

    They come from the tags of a GeoTIFF (OGC 19-008r4), or from the world file beside the scene.
    """
    with open_image(path) as scene:
        tags = getattr(scene, "tag_v2", {})
    matrix, scale, tie, keys, *texts = (tags.get(tag, ()) for tag in (34264, 33550, 33922, 34735, 34736, 34737))
    # Key 1025 is 2 if coordinates are those of the center of a pixel. Here, they are those of its upper left corner.
    corner_keys = tuple(1 if keys[at - 3 : at + 1] == (1025, 0, 1, 2) else key for at, key in enumerate(keys))
    centered = corner_keys != keys
    if len(matrix) == 16:  # x = a column + b row + c, y = d column + e row + f
        a, b, _, c, d, e, _, f = matrix[:8]
    elif len(scale) >= 2 and len(tie) >= 6:
        a, b, d, e = scale[0], 0.0, 0.0, -scale[1]
        c, f = tie[3] - a * tie[0], tie[4] - e * tie[1]
    elif world := read_world_file(path):
        (a, d, b, e, c, f), centered = world, True
    else:
        return {}
    c, f = c - centered * (a + b) / 2, f - centered * (d + e) / 2
    place = (a * cell, b * cell, 0.0, c, d * cell, e * cell, 0.0, f, *[0.0] * 7, 1.0)
    return {34264: place} | {tag: value for tag, value in zip((34735, 34736, 34737), (corner_keys, *texts)) if value}


def read_world_file(scene: Path) -> list[float] | None:
    """Return the numbers of the world file beside a scene, that of its own format before others, or None.

    They are the steps in x and y to the next pixel on the right and to that below, and the center of the first one.
    """
    own = f".{scene.suffix[1:2]}{scene.suffix[-1:]}w".lower()
    found = [file for file in scene.parent.iterdir() if file.stem == scene.stem and file.suffix.lower() in WORLD_FILES]
    for file in sorted(found, key=lambda file: (file.suffix.lower() != own, file.name)):
        with contextlib.suppress(ValueError):
            numbers = [float(text) for text in file.read_text(encoding="ascii").split()]
            if len(numbers) == 6 and all(map(math.isfinite, numbers)):
                return numbers
        raise UserError(f"{file} is not a world file, which has six numbers, one per line")
    return None


def map_scene(scene: Image.Image, classifier: Classifier, tile: int, stride: int, rejection: Rejection) -> SceneMap:
    """Classify the tiles of a scene, and average them, and how unfamiliar they are, over each cell of the map."""
    rows, columns = (TileAxis(length, tile, stride) for length in (scene.height, scene.width))
    tops, lefts, parts, unfamiliar = rows.tile_starts(), columns.tile_starts(), [], []
    if rejection.min_confidence and stride < tile:
        log("warning: averages of overlapping tiles are not calibrated, which --min-confidence takes for granted")
    boxes = ((left, top, left + tile, top + tile) for top in tops for left in lefts)
    with Progress("map", len(tops) * len(lefts), "tiles") as progress:
        for batch in classifier.classify(boxes, lambda box, _size: scene.crop(box)):
            parts.append(torch.stack([prediction.probabilities for prediction in batch]))
            unfamiliar += [prediction.unfamiliar or 0.0 for prediction in batch]
            progress.update(len(batch))
    tiles = torch.cat([torch.cat(parts), torch.tensor(unfamiliar).double()[:, None]], 1).view(len(tops), len(lefts), -1)
    cells = torch.einsum("rt,tuc,ku->rkc", rows.cell_weights(), tiles, columns.cell_weights())
    probabilities, classes = cells[..., :-1].max(2)
    classes[rejection.applies(probabilities, cells[..., -1])] = len(classifier.classes)
    areas = torch.outer(rows.cell_sizes(), columns.cell_sizes())
    expected = (100 * torch.einsum("rk,rkc->c", areas / areas.sum(), cells[..., :-1])).tolist()
    areas = torch.bincount(classes.flatten(), areas.flatten(), len(classifier.classes) + 1)
    percent, names = (100 * areas / areas.sum()).tolist(), [*classifier.classes, UNKNOWN]
    return SceneMap(names, classes, probabilities, percent, expected, tile, stride, len(tops) * len(lefts))


def write_map(folder: Path, path: Path, scene: Image.Image, scene_map: SceneMap) -> tuple[dict, str]:
    """Write map.csv, map.png, map.tif and map.json; return the content of map.json and a summary."""
    names, factor = scene_map.names, math.ceil(max(scene.size) / MAX_MAP_SIDE)
    rows, columns = scene_map.classes.shape
    place = read_georeference(path, scene_map.cell)
    cells = zip(scene_map.classes.flatten().tolist(), scene_map.probabilities.flatten().tolist())
    table = ((*divmod(number, columns), names[index], round(p, 6)) for number, (index, p) in enumerate(cells))
    write_csv(folder / "map.csv", ("row", "column", "class", "probability"), table)
    with atomic_write(folder / "map.png", "wb") as file:
        draw_map(scene.reduce(factor), scene_map, factor).save(file, format="png")
    with atomic_write(folder / "map.tif", "wb") as file:
        raster = draw_raster(scene_map)
        nodata = {42113: "255" if raster.mode == "P" else "65535"}  # GDAL's tag
        raster.save(file, format="tiff", tiffinfo=place | nodata)
    percent = dict.fromkeys(names, 0.0)
    for name, share in zip(names, scene_map.percent):  # a class may be called "unknown" too
        percent[name] += share
    report = {"scene": str(path), "map": str(folder / "map.png"), "tiles": scene_map.tiles}
    report |= {"rows": rows, "columns": columns, "tile_pixels": scene_map.tile, "cell_pixels": scene_map.cell}
    report |= {"map_scale": factor, "percent": {name: round(share, 4) for name, share in percent.items()}}
    report["expected_percent"] = dict(zip(names, (round(share, 4) for share in scene_map.expected_percent)))
    report["classes"] = names[:-1]
    with atomic_write(folder / "map.json") as file:
        file.write(to_json_text(report, indent=2) + "\n")
    shares = sorted(percent.items(), key=lambda item: -item[1])[:5]
    largest = ", ".join(f"{name} {share:.1f} %" for name, share in shares if share)
    return report, f"wrote {folder}/map.png, map.csv, map.tif, map.json: {largest}"


def draw_raster(scene_map: SceneMap) -> Image.Image:
    """Return the class of each cell, unknown as 255; more than 255 classes take 16 bits, with 65535 and no colors."""
    unknown = len(scene_map.names) - 1
    mode, nodata = ("P", 255) if unknown <= 255 else ("I;16", 65535)
    image = Image.new(mode, scene_map.classes.shape[::-1])
    image.putdata([nodata if index == unknown else index for index in scene_map.classes.flatten().tolist()])
    if mode == "P":
        image.putpalette(b"".join(bytes(pick_color(index) if index < unknown else GRAY) for index in range(256)))
    return image


def pick_color(index: int) -> tuple[int, int, int]:
    """Return the color of a class: one of COLORS, after them hues a golden angle apart, in alternating strengths."""
    if index < len(COLORS):
        return tuple(bytes.fromhex(COLORS[index]))
    rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, (1, 0.5)[index % 2], (1, 0.75, 0.5)[index % 3])
    return tuple(round(255 * part) for part in rgb)


def draw_map(scene: Image.Image, scene_map: SceneMap, factor: int) -> Image.Image:
    """Draw a scene, reduced by `factor`, in gray under the colors of its cells; a legend is added to its right."""
    names, percent, cell = scene_map.names, scene_map.percent, scene_map.cell / factor
    colors = [*map(pick_color, range(len(names) - 1)), GRAY]
    rgb = b"".join(bytes(colors[index]) for index in scene_map.classes.flatten().tolist())
    cells = Image.frombytes("RGB", scene_map.classes.shape[::-1], rgb)
    cells = cells.transform(scene.size, Image.Transform.AFFINE, (1 / cell, 0, 0, 0, 1 / cell, 0))
    picture = Image.blend(scene.convert("L").convert("RGB"), cells, OPACITY)
    size = max(12, max(picture.size) // 60)
    line = 2 * round(size * 0.75)
    present = sorted((index for index in range(len(names)) if percent[index]), key=lambda index: -percent[index])
    labels = [f"{printable(names[index])}  {percent[index]:.1f} %" for index in present[:LEGEND_ROWS]]
    if others := present[LEGEND_ROWS:]:
        labels.append(f"{len(others)} more  {sum(percent[index] for index in others):.1f} %")
    labels = [(text, ImageFont.truetype(file, size)) for text, file in map(fit_text, labels)]
    width = picture.width + round(max(font.getlength(text) for text, font in labels)) + 3 * line
    canvas = Image.new("RGB", (width, max(picture.height, line * (len(labels) + 1))), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for number, (label, font) in enumerate(labels):
        x, y = picture.width + line // 2, round((number + 0.5) * line)
        if number < LEGEND_ROWS:  # the color as it looks over a medium gray
            fill = tuple(round(OPACITY * a + (1 - OPACITY) * b) for a, b in zip(colors[present[number]], GRAY))
            draw.rectangle((x, y + line // 8, x + line, y + line * 7 // 8), fill=fill)
        draw.text((x + line * 3 // 2, y + line / 2), label, "black", font, anchor="lm")
    return canvas


if __name__ == "__main__":
    sys.exit(main())
