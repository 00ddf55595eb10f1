"""Classify images, one record each on stdout in input order, or map a large scene; with pictures if asked for.

Takes files, folders (searched recursively) and - for paths on stdin. A terminal gets a table, a pipe CSV. Records come as
soon as stdin has nothing more to give, so it can follow a slow producer. An image that cannot be read gives a record with the
reason, the rest goes on, and the exit code is 3. The probabilities are calibrated by the temperature in the checkpoint.

--scene cuts one large image into tiles and writes DIR/map.png, map.csv, map.json, and map.pgw if it has a world file.
"""
from __future__ import annotations

import colorsys
import contextlib
import csv
import functools
import json
import math
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

from PIL import ExifTags, Image, ImageDraw, ImageFont

from common import (EXIT_SOME_UNREADABLE, TTA_HELP, FrozenModel, ImageError, LazyModule, Progress, UserError,
                    add_hardware_options, checkpoint_precision, checkpoint_views, command, find_images, fraction, log,
                    make_parser, pick_device, positive_int, printable, read_batches, read_checkpoint, read_image, replacing,
                    torch)

matplotlib = LazyModule("matplotlib")
PLOT_COLUMNS, PLOT_ROWS, PLOT_BARS = 3, 6, 5
UNKNOWN = "unknown"  # the answer below --min-confidence
SCENE_PIXELS = 400_000_000  # 20,000 x 20,000; a pixel takes 4 bytes of memory, and 4 more where it is not RGB to begin with
MAP_SIDE, LEGEND_ROWS, TINT = 4096, 30, 0.6  # longest side of map.png in pixels, classes listed, opacity of their colours
WORLD_FILES = (".pgw", ".jgw", ".tfw", ".wld")
# Found by search for the largest smallest distance (OKLab, tinted over grey), to unknown's grey too, as seen with normal and
# with red- or green-blind eyes (Machado et al., 2009). For EuroSAT's classes the order is a natural one.
COLOURS = ("ccff00", "00cc00", "ffcc99", "660000", "990099", "00ffff", "ff66ff", "ff0000", "0000ff", "000066")


def parse_args(argv):
    parser = make_parser("predict.py", __doc__,
                         "python predict.py --checkpoint runs/eurosat/model.pt photo.jpg tiles/ --top-k 3")
    group = parser.add_argument_group("input")
    group.add_argument("images", nargs="*", metavar="IMAGE", help="an image file, a folder of images, or - for paths on stdin")
    group.add_argument("-0", "--null", action="store_true", help="paths on stdin end in NUL, as after find -print0; implies -")
    group.add_argument("--checkpoint", type=Path, required=True, help="the model.pt that train.py wrote")
    group.add_argument("--tta", action="store_true", help=TTA_HELP)
    group = parser.add_argument_group("output")
    group.add_argument("--top-k", type=positive_int, default=1, help="report this many classes, the most probable first")
    group.add_argument("--min-confidence", type=fraction, default=0.0, metavar="P",
                       help=f"answer {UNKNOWN} where no class has this probability, with the most probable one next in "
                            "--top-k; evaluate.py's report helps to choose it")
    group.add_argument("--format", choices=("table", "csv", "jsonl"), help="(default: table on a terminal, else csv)")
    group.add_argument("--plot", type=Path, metavar="FILE.png",
                       help=f"show each image with its {PLOT_BARS} most probable classes; beyond {PLOT_COLUMNS * PLOT_ROWS} "
                            "images, further pages are FILE-2.png, FILE-3.png, ...")
    group.add_argument("--explain", action="store_true",
                       help="in --plot, also show where in each image lies what spoke for its class (convolutional networks)")
    group = parser.add_argument_group("map of a large scene")
    group.add_argument("--scene", type=Path, metavar="IMAGE", help=f"a scene of up to {SCENE_PIXELS // 10 ** 6} million pixels")
    group.add_argument("--tile", type=positive_int, metavar="PIXELS", help="side of a tile (default: 64)")
    group.add_argument("--stride", type=positive_int, metavar="PIXELS",
                       help="from tile to tile, and the side of a cell of the map; less than --tile overlaps (default: --tile)")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder for the map")
    add_hardware_options(parser)
    args = parser.parse_args(argv)
    if args.null and "-" not in args.images:
        args.images.append("-")
    if not args.images and not args.scene:
        parser.error("give images, folders, - for paths on stdin, or --scene")
    if args.scene:
        if args.images or args.plot or args.explain or args.format or args.top_k > 1:
            parser.error("--scene goes without IMAGE, --top-k, --format, --plot and --explain")
        if not args.out:
            parser.error("--scene needs --out DIR, the folder for the map")
        args.tile = args.tile or 64
        args.stride = args.stride or args.tile
        if args.stride > args.tile:
            parser.error(f"--stride {args.stride} would leave gaps between tiles of {args.tile} pixels")
    elif args.out or args.tile or args.stride:
        parser.error("--tile, --stride and --out are for --scene")
    if args.explain and not args.plot:
        parser.error("--explain draws into --plot FILE.png, which is missing")
    args.format = args.format or ("table" if sys.stdout.isatty() else "csv")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    scene = read_scene(args.scene, args.tile) if args.scene else None
    for folder in filter(os.path.isdir, args.images):
        if not any(True for _ in find_images(folder)):
            raise UserError(f"no images in folder {folder}")
    with contextlib.suppress(AttributeError):  # a file name need not be valid UTF-8, nor is a pipe on Windows UTF-8 by itself
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    device = pick_device(args.device)
    checkpoint, model = read_checkpoint(args.checkpoint)
    precision = checkpoint_precision(checkpoint, args.precision)
    frozen = FrozenModel(model, checkpoint["preprocessing"], len(checkpoint["classes"]), device, precision)
    run = functools.partial(classify, frozen, *checkpoint_views(checkpoint, args.tta), args.workers)
    if args.scene:
        return map_scene(scene, run, checkpoint["classes"], args)
    return list_classes(run(list_paths(args.images, args.null)), checkpoint["classes"], frozen, args)


def classify(frozen: FrozenModel, views: list, temperature: float, workers: int | None, paths, read=read_image):
    """Yield lists of (path, uint8 pixels [3, S, S] or ImageError, calibrated probability of each class or None), in order."""
    for batch in read_batches(paths, frozen.preprocessing, frozen.batch_size, workers, read):
        readable = [pixels for _, pixels in batch if not isinstance(pixels, ImageError)]
        rows = iter(frozen.log_probabilities(torch.stack(readable), [temperature], views)[0].exp().tolist()
                    if readable else [])
        yield [(path, pixels, None if isinstance(pixels, ImageError) else next(rows)) for path, pixels in batch]


# ---------------------------------------------------------------- a record per image

def list_classes(batches, classes: list[str], frozen: FrozenModel, args):
    """Print a record of each image in the batches that `classify` yields, and draw it if asked for; returns the exit code."""
    if args.explain:  # a network that cannot is refused before the first record
        size = frozen.preprocessing["size"]
        explain(frozen, torch.zeros(3, size, size, dtype=torch.uint8), 0)
    album = Album(args.plot, frozen if args.explain else None) if args.plot else None
    top_k = min(args.top_k, len(classes))
    write = record_writer(args.format, classes, top_k)
    images = failures = 0
    for batch in batches:
        for path, pixels, row in batch:
            images += 1
            if row is None:
                failures += 1
                write(path, [], pixels.reason)
                continue
            best = sorted(zip(classes, row), key=lambda pair: -pair[1])
            p = best[0][1]
            sure = p >= args.min_confidence
            write(path, (best if sure else [(UNKNOWN, p), *best])[:top_k], None)
            if album:
                album.add(path, pixels, row.index(p), best, f"{best[0][0]}  {p:.1%}" if sure else UNKNOWN)
        sys.stdout.flush()
    if album:
        album.save_page()
    if failures:
        log(f"{failures} of {images} images could not be read")
        return EXIT_SOME_UNREADABLE


def list_paths(arguments: list[str], null: bool):
    """Yield the image paths that the arguments stand for; a file that is not there is left for the reader to report."""
    for argument in arguments:
        if argument == "-":
            yield from read_names(null)
        elif os.path.isdir(argument):
            yield from find_images(argument)
        else:
            yield argument


def read_names(null: bool):
    """Yield the paths on stdin, and None before each wait for more: what has piled up meanwhile is the next to be read."""
    if sys.stdin is None:
        raise UserError("no paths to read: stdin is closed")
    end, rest, block = b"\0" if null else b"\n", b"", True
    while block:
        block = sys.stdin.buffer.read1(1 << 16)
        *names, rest = (rest + (block or end)).split(end)
        yield from (os.fsdecode(name) for name in (name if null else name.rstrip(b"\r") for name in names) if name)
        yield None


def record_writer(form: str, classes: list[str], top_k: int):
    """A function write(path, (class, probability) pairs, error or None) that prints one record in the format asked for."""
    width = max(len(printable(name)) for name in [*classes, UNKNOWN])

    def write_table(path, best, error):
        columns = "  ".join(f"{p:7.2%} {printable(name):<{width}}" for name, p in best)
        print(f"{columns}  {printable(path)}" if best else f"error:  {printable(path)} ({error})")

    def write_jsonl(path, best, error):
        first, *rest = [{"class": name, "probability": round(p, 6)} for name, p in best] or [{"error": error}]
        print(json.dumps({"path": path, **first, **({"rest": rest} if top_k > 1 and best else {})}))

    if form != "csv":
        return {"table": write_table, "jsonl": write_jsonl}[form]
    writer = csv_writer(sys.stdout)
    others = [f"{what}_{k}" for k in range(2, top_k + 1) for what in ("class", "probability")]
    writer.writerow(["path", "class", "probability", *others, "error"])

    def write_csv(path, best, error):
        cells = [cell for name, p in best for cell in (name, round(p, 6))] or [""] * (2 * top_k)
        writer.writerow([path, *cells, error or ""])
    return write_csv


def csv_writer(file):
    """A csv.writer whose lines end in a line feed; told so itself, that of Python 3.10 would not quote a carriage return."""
    return csv.writer(SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n")))


# ---------------------------------------------------------------- pictures

def explain(frozen: FrozenModel, pixels: torch.Tensor, target: int) -> torch.Tensor:
    """What of an image, uint8 pixels [3, S, S], spoke for the class `target`: heat [h, w] in 0..1, on the CPU.

    Grad-CAM (Selvaraju et al., ICCV 2017): the channels of the last feature map before the head, each weighted by the mean
    gradient of the class's logit, and of their sum what is positive. Raises UserError for a network whose head does not
    look at a map but at tokens, such as a vision transformer.
    """
    model, seen = frozen.model.to(frozen.device).requires_grad_(False), [None]
    head = model.get_submodule(frozen.cut[0])

    def remember(module, _, output):
        if module is head:
            seen.append(None)  # what follows is no feature map
        elif len(seen) == 1 and torch.is_tensor(output) and (output.dim() == 3 or min(output.shape[2:], default=1) > 1):
            seen[0] = output  # tokens [1, N, C] or a map [1, C, H, W]
    with torch.nn.modules.module.register_module_forward_hook(remember), torch.enable_grad():
        images = (pixels[None].to(frozen.device).float() - frozen.mean) / frozen.std
        logits = model(images.requires_grad_(True))
    if seen[0] is None or seen[0].dim() != 4:
        raise UserError("--explain needs a network that ends in a feature map, as convolutional ones do: "
                        f"{type(model).__name__} does not")
    gradient, = torch.autograd.grad(logits[0, target], seen[0])
    heat = (gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1)[0].relu().detach()
    return (heat / heat.max()).nan_to_num().cpu()  # nothing spoke for it: 0 / 0


class Album:
    """Pages of pictures: each image, where it speaks for its class if asked for, and bars of its most probable classes."""

    def __init__(self, file: Path, explained: FrozenModel | None):
        if file.suffix.lower() != ".png":
            raise UserError(f"--plot {file}: pictures are PNG files; call it {file.with_suffix('.png').name}")
        if not file.parent.is_dir() or file.is_dir():
            raise UserError(f"--plot {file}: " + ("is a folder" if file.is_dir() else f"no such folder: {file.parent}"))
        self.file, self.explained, self.page, self.waiting = file, explained, 1, []

    def add(self, path: str, pixels: torch.Tensor, target: int, best: list[tuple[str, float]], title: str):
        """Put an image on the page, with the heat of class index `target`; a full page is written."""
        if len(self.waiting) == PLOT_COLUMNS * PLOT_ROWS:
            self.save_page()
        thumbnail = read_image(path)
        thumbnail.thumbnail((360, 360))
        name = printable(Path(path).name)
        heat = explain(self.explained, pixels, target) if self.explained else None
        self.waiting.append((thumbnail, name, best[:PLOT_BARS], heat, title))

    def save_page(self):
        """Write the images that wait as one page."""
        if not self.waiting:
            return
        matplotlib.rcParams["text.parse_math"] = False
        from matplotlib.figure import Figure
        columns, ratios = min(PLOT_COLUMNS, len(self.waiting)), [1, 1, 1.35] if self.explained else [1, 1.35]
        rows = math.ceil(len(self.waiting) / columns)
        figure = Figure(figsize=(1.96 * sum(ratios) * columns, 2.05 * rows + 0.2), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.06)
        cells = figure.subplots(rows, len(ratios) * columns, squeeze=False, width_ratios=ratios * columns).ravel()
        for axes in cells:
            axes.set_axis_off()
        for number, (image, name, best, heat, title) in enumerate(self.waiting):
            left, *middle, right = cells[number * len(ratios):][:len(ratios)]
            for axes in (left, *middle):
                axes.imshow(image, interpolation="nearest" if max(image.size) < 128 else "antialiased")
            if heat is not None and not heat.any():
                middle[0].set_title("nothing spoke for it", fontsize=8, color="0.35")
            elif heat is not None:  # of the centre square, which is what the network saw
                (width, height), side = image.size, min(image.size)
                x, y = (width - side) / 2 - 0.5, (height - side) / 2 - 0.5
                middle[0].imshow(heat.tolist(), cmap="inferno", alpha=0.6, vmin=0, vmax=1, interpolation="bilinear",
                                 extent=(x, x + side, y + side, y))
                middle[0].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            left.set_title(name if len(name) < 28 else f"{name[:12]}...{name[-13:]}", fontsize=8, color="0.35")
            right.set_axis_on()
            values = [p for _, p in best]
            right.barh(range(len(best)), values, color=["#8cbde6"] + ["0.85"] * (len(best) - 1))
            for position, (label, p) in enumerate(best):
                right.text(0.02, position, f"{printable(label)}  {p:.1%}", va="center", fontsize=8)
            right.set(xlim=(0, 1), xticks=[], yticks=[], ylim=(PLOT_BARS - 0.5, -0.5))
            right.set_title(printable(title), fontsize=10, fontweight="bold")
            right.spines[["top", "right", "bottom"]].set_visible(False)
        file = self.file if self.page == 1 else self.file.with_name(f"{self.file.stem}-{self.page}{self.file.suffix}")
        with replacing(file, "wb") as opened, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # letters that the font lacks are boxes, and no noise
            figure.savefig(opened, format="png", dpi=120)
        log(f"wrote {file}")
        self.waiting, self.page = [], self.page + 1


# ---------------------------------------------------------------- a map of a large scene

def read_scene(path: Path, tile: int) -> Image.Image:
    """Read the scene as RGB; raises ImageError where it has more than SCENE_PIXELS, UserError where a tile is larger.

    And UserError where an EXIF tag turns the picture under its world file, since programs disagree on what is meant then.
    """
    Image.MAX_IMAGE_PIXELS = SCENE_PIXELS // 2  # Pillow warns beyond this, and refuses beyond twice this
    scene = read_image(path)
    with Image.open(path) as raw:
        turned = raw.getexif().get(ExifTags.Base.Orientation, 1) != 1
    if turned and read_world_file(path):
        raise UserError(f"{path} is to be turned by its EXIF tag, and its world file is not: save it upright, without the tag")
    if min(scene.size) < tile:
        raise UserError(f"--tile {tile} is larger than {path}, which has {scene.width} x {scene.height} pixels")
    return scene


def map_scene(scene: Image.Image, classify, classes: list[str], args):
    """Classify the tiles of a scene and write its map: DIR/map.png, map.csv, map.json, and map.pgw beside a world file."""
    world = read_world_file(args.scene)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.scene.resolve() == (args.out / "map.png").resolve():
        raise UserError(f"the map would replace the scene, {args.scene}; choose another --out")
    lefts, tops = (tile_starts(length, args.tile, args.stride) for length in scene.size)
    boxes = ((x, y, x + args.tile, y + args.tile) for y in tops for x in lefts)
    parts = []
    with Progress("map", len(lefts) * len(tops), "tiles") as progress:
        for batch in classify(boxes, scene.crop):
            parts.append(torch.tensor([row for *_, row in batch], dtype=torch.float64))
            progress.update(len(batch))
    tiles = torch.cat(parts).view(len(tops), len(lefts), -1)
    down, across = (share_cells(starts, args, length) for starts, length in ((tops, scene.height), (lefts, scene.width)))
    probability, winner = torch.einsum("rt,tuc,ku->rkc", down, tiles, across).max(2)
    winner[probability < args.min_confidence] = len(classes)
    names = [*classes, UNKNOWN]
    shares = measure_shares(winner, len(names), args.stride, scene)
    with replacing(args.out / "map.csv") as file:
        writer = csv_writer(file)
        writer.writerow(["row", "column", "class", "probability"])
        for row, cells in enumerate(zip(winner.tolist(), probability.tolist())):
            writer.writerows([row, column, names[index], round(p, 6)] for column, (index, p) in enumerate(zip(*cells)))
    factor = math.ceil(max(scene.size) / MAP_SIDE)
    with replacing(args.out / "map.png", "wb") as file:
        draw_map(scene.reduce(factor), winner, args.stride / factor, names, shares).save(file, format="png")
    write_world_file(args.out / "map.pgw", world, factor)
    percent = {name: 0.0 for name in names}
    for name, share in zip(names, shares):  # a class may be called "unknown" too
        percent[name] += share
    report = {"scene": str(args.scene), "map": str(args.out / "map.png"), "tiles": len(tops) * len(lefts), "rows": len(winner),
              "columns": len(winner[0]), "cell_pixels": args.stride, "map_scale": factor,
              "percent": {name: round(share, 4) for name, share in percent.items()}}
    with replacing(args.out / "map.json") as file:
        file.write(json.dumps(report, indent=2) + "\n")
    log(f"wrote {args.out}/map.png, map.csv, map.json" + (", map.pgw" if world else ""))
    print(json.dumps(report))


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """The first pixels of the tiles along a side of `length` pixels; the last tile is moved inwards to end with the side."""
    return [*range(0, length - tile, stride), length - tile]


def share_cells(starts: list[int], args, length: int) -> torch.Tensor:
    """Weights [cells, tiles] by which cells along a side average the tiles over them: by the pixels that both have."""
    first, cells = torch.tensor(starts), torch.arange(0, length, args.stride)[:, None]
    pixels = (torch.minimum(first + args.tile, cells + args.stride) - torch.maximum(first, cells)).clamp(min=0).double()
    return pixels / pixels.sum(1, keepdim=True)


def measure_shares(winner: torch.Tensor, count: int, stride: int, scene: Image.Image) -> list[float]:
    """Percent of the scene's pixels that each of `count` indices has in winner [rows, columns]; the last cells may be cut."""
    width, height = ((length - torch.arange(0, length, stride)).clamp(max=stride).double() for length in scene.size)
    pixels = torch.bincount(winner.flatten(), torch.outer(height, width).flatten(), count)
    return (100 * pixels / pixels.sum()).tolist()


def pick_colour(index: int) -> tuple[int, int, int]:
    """The colour of a class: from COLOURS; beyond them, hues a golden angle apart, in three strengths in turn."""
    if index < len(COLOURS):
        return tuple(bytes.fromhex(COLOURS[index]))
    rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, (1, 0.5)[index % 2], (1, 0.75, 0.5)[index % 3])
    return tuple(round(255 * part) for part in rgb)


def draw_map(scene: Image.Image, winner: torch.Tensor, cell: float, names: list[str], shares: list[float]) -> Image.Image:
    """The scene in grey under the colours of winner [rows, columns] in cells of `cell` pixels; right of it, the legend.

    The picture's upper left part is the scene, pixel for pixel, so a world file that fits the one fits the other.
    """
    grey, colours = (128, 128, 128), [*map(pick_colour, range(len(names) - 1)), (128, 128, 128)]
    paint = Image.frombytes("RGB", winner.shape[::-1], b"".join(bytes(colours[index]) for index in winner.flatten().tolist()))
    paint = paint.transform(scene.size, Image.Transform.AFFINE, (1 / cell, 0, 0, 0, 1 / cell, 0))
    picture = Image.blend(scene.convert("L").convert("RGB"), paint, TINT)
    font = ImageFont.load_default(max(12, max(picture.size) // 60))
    line = 2 * round(font.size * 0.75)
    present = sorted((index for index in range(len(names)) if shares[index]), key=lambda index: -shares[index])
    texts = [f"{printable(names[index])}  {shares[index]:.1f} %" for index in present[:LEGEND_ROWS]]
    if others := present[LEGEND_ROWS:]:
        texts.append(f"{len(others)} more  {sum(shares[index] for index in others):.1f} %")
    width = round(max(map(font.getlength, texts))) + 3 * line
    canvas = Image.new("RGB", (picture.width + width, max(picture.height, line * (len(texts) + 1))), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(texts):
        x, y = picture.width + line // 2, round((number + 0.5) * line)
        if number < LEGEND_ROWS:  # the colour as it is over a middle grey
            tint = tuple(round(TINT * a + (1 - TINT) * b) for a, b in zip(colours[present[number]], grey))
            draw.rectangle((x, y + line // 8, x + line, y + line * 7 // 8), fill=tint)
        draw.text((x + line * 3 // 2, y + line / 2), text, "black", font, anchor="lm")
    return canvas


def read_world_file(scene: Path) -> list[float] | None:
    """The six numbers of the world file beside a scene, that of its own format before others; None where there is none.

    In the file's order: x and y per column, x and y per row (A, D, B, E), x and y of the centre of the first pixel (C, F).
    """
    own = f".{scene.suffix[1:2]}{scene.suffix[-1:]}w".lower()
    found = [file for file in scene.parent.iterdir() if file.stem == scene.stem and file.suffix.lower() in WORLD_FILES]
    for file in sorted(found, key=lambda file: (file.suffix.lower() != own, file.name)):
        try:
            world = [float(text) for text in file.read_text(encoding="ascii").split()]
        except ValueError:
            world = []
        if len(world) != 6 or not all(map(math.isfinite, world)):
            raise UserError(f"{file} is no world file: it should hold six numbers, one a line")
        return world


def write_world_file(path: Path, world: list[float] | None, factor: int):
    """Write the world file of a map whose pixels are `factor` scene pixels wide; without one, remove that of an earlier map."""
    if not world:
        return path.unlink(missing_ok=True)
    a, d, b, e, x, y = world
    middle = (factor - 1) / 2  # of a map pixel, in scene pixels from the centre of its first
    with replacing(path) as file:
        file.writelines(f"{value!r}\n" for value in (a * factor, d * factor, b * factor, e * factor,
                                                     x + middle * (a + b), y + middle * (d + e)))


if __name__ == "__main__":
    sys.exit(main())
