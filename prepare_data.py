"""Lay out a set of images for training: OUT/{train,val,test}/<class>/*, and OUT/splits.csv that reproduces the split.

Downloads EuroSAT (27,000 Sentinel-2 tiles, 10 land-cover classes, 94 MB), or takes your own images with --source, or draws
a small demonstration set with --synthetic. Every image is decoded. OUT appears only when it is complete. The last line on
stdout is one JSON object with the counts.
"""
from __future__ import annotations

import collections
import contextlib
import csv
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath

from PIL import Image, ImageDraw, ImageFilter, ImageOps

from common import (SPLITS, ImageError, Progress, UserError, command, file_hash, find_images, fraction, is_image_name, log, make_parser,
                    one_line, positive_int, read_image, replacing)

# The address and checksum that torchvision's datasets.EuroSAT uses.
EUROSAT_URL = "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip"
EUROSAT_MD5 = "c8fa014336c82ac7804f0398fcb19387"
# An archive may unpack to this many times its own size; below the floor, to anything. Images hardly compress.
UNPACK_RATIO, UNPACK_FLOOR = 20, 1 << 30


def parse_args(argv):
    parser = make_parser("prepare_data.py", __doc__, "python prepare_data.py --source photos.zip --out data/photos")
    group = parser.add_argument_group("source (default: download EuroSAT)")
    group.add_argument("--source", type=Path, help="a folder, zip or tar of class folders of images; wrapping folders are looked "
                       "through, and folders train/, val/, test/ of class folders are kept as they are")
    group.add_argument("--synthetic", action="store_true", help="draw a demonstration set: 10 classes of 64x64 tiles that look a little "
                       "like land cover; needs no network, and says nothing about real images")
    group.add_argument("--per-class", type=positive_int, default=100, help="with --synthetic, tiles to draw of each class")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, help="the tree to make (default: data/eurosat, with --synthetic data/synthetic)")
    group.add_argument("--force", action="store_true", help="replace OUT; the old tree stands until the new one is complete")
    group = parser.add_argument_group("split")
    group.add_argument("--val", type=fraction, default=0.1, help="share of each class for choosing epochs and settings; 0: no val/")
    group.add_argument("--test", type=fraction, default=0.2, help="share of each class for the final measurement; 0: no test/")
    group.add_argument("--seed", type=int, default=0, help="of the split and of --synthetic")
    args = parser.parse_args(argv)
    if args.source and args.synthetic:
        parser.error("--source and --synthetic exclude each other")
    if args.val + args.test >= 1:
        parser.error(f"--val {args.val} and --test {args.test} leave nothing to train on")
    args.out = args.out or Path("data/synthetic" if args.synthetic else "data/eurosat")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    out = args.out
    if out.exists() and not args.force and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists; choose another --out, or replace it with --force")
    source = args.source if args.source or args.synthetic else download_eurosat(out.parent / "EuroSAT.zip")
    if source and not source.exists():
        raise UserError(f"no such file or folder: {source}")
    staging = out.with_name(f".{out.name}.partial")  # on the file system of OUT, so that it can be renamed
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        if source is None:
            files, others = draw_synthetic(staging / "files", args.per_class, args.seed), 0
        else:
            files, others = unpack(source, staging / "files")
        records = check(classify(files, str(source)))
        split(records, args.val, args.test, args.seed)
        lay_out(records, staging)
        replace_tree(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # a data/ that we made for nothing
            out.parent.rmdir()
    counts = {name: dict(sorted(collections.Counter(r["class"] for r in records if r["split"] == name).items())) for name in SPLITS}
    show_counts(counts)
    if others:
        log(f"left out {others} files that are not images (by their extension)")
    print(json.dumps({"out": str(out), "images": len(records), "classes": len({r["class"] for r in records}),
                      **{name: sum(counts[name].values()) for name in SPLITS}, "not_images": others, "counts": counts}))


# ---------------------------------------------------------------- source -> files on disk

def download_eurosat(archive: Path) -> Path:
    """Download EuroSAT.zip unless it is there already; a file with the wrong MD5 is never unpacked."""
    import urllib.request  # takes longer than all that --help needs
    if archive.exists():
        if file_hash(archive, "md5") != EUROSAT_MD5:
            raise UserError(f"{archive} is there, but its MD5 is not {EUROSAT_MD5}: remove it to download it again, or use it with --source {archive}")
        log(f"using {archive}, downloaded before")
        return archive
    way_out = "download it elsewhere and pass it with --source FILE, or draw a demonstration set with --synthetic"
    made = [folder for folder in (archive.parent, *archive.parent.parents) if not folder.exists()]
    try:
        with contextlib.ExitStack() as stack:
            response = stack.enter_context(urllib.request.urlopen(EUROSAT_URL, timeout=60))
            archive.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(replacing(archive, "wb"))
            total = int(response.headers.get("Content-Length") or 0)
            digest = hashlib.md5(usedforsecurity=False)
            with Progress("download EuroSAT.zip", total >> 10 or None, "KiB", every=10) as progress:
                while block := response.read(1 << 18):
                    file.write(block)
                    digest.update(block)
                    progress.update(len(block) >> 10)
            if digest.hexdigest() != EUROSAT_MD5:
                raise UserError(f"{EUROSAT_URL} has MD5 {digest.hexdigest()}, not {EUROSAT_MD5}: {way_out}")
    except (UserError, OSError, ValueError) as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot download {EUROSAT_URL}: {one_line(error)}; {way_out}") from None
    return archive


def unpack(source: Path, folder: Path) -> tuple[list[tuple[PurePosixPath, Path]], int]:
    """The image files of a folder or archive: [(path within the source, file to read)], and how many other files there are.

    Archives are extracted into `folder`, with plain names, so that nothing in an archive can name a place outside. Raises
    UserError for an archive that is damaged, holds links or paths that climb out, or unpacks to far more than it weighs.
    """
    if source.is_dir():
        images = [Path(path) for path in find_images(source)]
        everything = sum(len(files) for _, _, files in os.walk(source, followlinks=True))
        return [(PurePosixPath(path.relative_to(source)), path) for path in images], everything - len(images)
    folder.mkdir()
    files, others, room = [], 0, max(UNPACK_FLOOR, UNPACK_RATIO * source.stat().st_size)
    try:
        with Progress(f"unpack {source.name}", None, "files", every=10) as progress:
            for name, stream in archive_members(source):
                path = PurePosixPath(name)
                if any(part.startswith((".", "__MACOSX")) for part in path.parts) or not is_image_name(path.name):
                    others += 1
                    continue
                target = folder / f"{len(files)}{path.suffix}"
                with stream() as content, open(target, "wb") as file:
                    while block := content.read(1 << 20):
                        room -= len(block)
                        if room < 0:
                            raise UserError(f"{source} unpacks to more than {UNPACK_RATIO} times its size: refused; if you trust it, unpack it yourself "
                                            "and pass the folder")
                        file.write(block)
                files.append((path, target))
                progress.update(1)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot unpack {source}: {one_line(error) or type(error).__name__}; is it damaged?") from None
    return files, others


def archive_members(source: Path):
    """The regular files of a zip or tar: (name, function that opens it). Raises UserError for names and links that are not safe."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                mode = member.external_attr >> 16
                if not member.is_dir():
                    check_member(source, member.filename, link=mode & 0o170000 == 0o120000)
                    yield member.filename, lambda: archive.open(member)
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            for member in archive:
                if not member.isdir():
                    check_member(source, member.name, link=not member.isreg())
                    yield member.name, lambda: archive.extractfile(member)
    else:
        raise UserError(f"{source} is no folder, zip or tar that can be read; is it damaged?")


def check_member(source: Path, name: str, link: bool):
    if link or name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts or name[1:2] == ":":
        kind = "is a link or a special file" if link else "climbs out of the archive"
        raise UserError(f"{source}: entry {name!r} {kind}; refused. Nothing was unpacked to OUT")


# ---------------------------------------------------------------- files -> records: class, name, content

def classify(files: list[tuple[PurePosixPath, Path]], source: str) -> list[dict]:
    """Find the class of each file: its first folder below the folders that wrap all. train/, val/, test/ in its place are kept.

    Returns records with class, name (unique within its class and split), file and split (None: to be assigned).
    """
    if not files:
        raise UserError(f"no images in {source}; expected <class>/<image> with one of the usual extensions")
    parts = [path.parts for path, _ in files]
    while len({p[0] for p in parts}) == 1 and all(len(p) > 2 for p in parts):
        parts = [p[1:] for p in parts]
    given = "train" in {p[0] for p in parts} and {p[0] for p in parts} <= set(SPLITS) and all(len(p) > 2 for p in parts)
    records, seen = [], set()
    for (path, file), p in zip(files, parts):
        split, p = (p[0], p[1:]) if given else (None, p)
        if len(p) < 2:
            raise UserError(f"{path} in {source} is in no class folder; expected <class>/<image>")
        record = {"class": p[0], "name": "__".join(p[1:]), "file": str(file), "split": split, "path": str(path)}
        key = (split, record["class"].casefold(), record["name"].casefold())
        if key in seen:
            raise UserError(f"two images would both become {record['class']}/{record['name']}; rename one of them")
        seen.add(key)
        records.append(record)
    if len(classes := {record["class"] for record in records}) < 2:
        raise UserError(f"{source} has one class, {classes.pop()}; a classifier needs two or more class folders")
    return records


def check(records: list[dict]) -> list[dict]:
    """Decode and hash every file, in parallel; adds sha256. Raises UserError naming the images that cannot be read, or those
    whose content stands under two classes."""
    chunks = [records[i:i + 200] for i in range(0, len(records), 200)]
    bad = []
    with contextlib.ExitStack() as stack:
        run = map  # in this process, where starting others takes longer than the work
        if len(chunks) > 5:
            run = stack.enter_context(ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))).map
        progress = stack.enter_context(Progress("check", len(records), every=10))
        for chunk, results in zip(chunks, run(check_files, [[r["file"] for r in chunk] for chunk in chunks])):
            for record, (sha256, reason) in zip(chunk, results):
                record["sha256"] = sha256
                bad += [f"{record['path']} ({reason})"] if reason else []
            progress.update(len(chunk))
    if bad:
        raise UserError(f"{len(bad)} of {len(records)} images cannot be read: {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}; repair or remove them")
    by_content = collections.defaultdict(list)
    for record in records:
        by_content[record["sha256"]].append(record)
    if torn := [group for group in by_content.values() if len({r["class"] for r in group}) > 1]:
        raise UserError(f"equal content under two classes ({len(torn)} times), such as {' and '.join(r['path'] for r in torn[0][:3])}: remove one of them")
    if doubled := sum(len(group) - 1 for group in by_content.values()):
        log(f"{doubled} images repeat the content of another; equal images go into the same split")
    return records


def check_files(files: list[str]) -> list[tuple[str, str | None]]:
    """For each file its SHA-256 and, where it does not decode as an image, the reason."""
    results = []
    for file in files:
        reason = None
        try:
            read_image(file)
        except ImageError as error:
            reason = error.reason
        results.append((file_hash(file), reason))
    return results


# ---------------------------------------------------------------- records -> tree

def split(records: list[dict], val: float, test: float, seed: int):
    """Assign records to train, val and test, class by class and exact to the image (equal content stays together).

    The order in which a class is dealt out is that of a hash of seed and content, so the same content, shares and seed give
    the same split whatever the files' names or order. Records of an already split source keep their split; where that lacks a
    val/, it is made from train.
    """
    given = {record["split"] for record in records}
    if None not in given:
        if "val" in given or not val:
            return
        pools, shares = [r for r in records if r["split"] == "train"], {"val": val}
    else:
        pools, shares = records, {"test": test, "val": val}
    by_class = collections.defaultdict(lambda: collections.defaultdict(list))
    for record in pools:
        by_class[record["class"]][record["sha256"]].append(record)
    for name, contents in sorted(by_class.items()):
        count = sum(map(len, contents.values()))
        wanted = {part: round(count * share) for part, share in shares.items()}
        if sum(wanted.values()) >= count or any(share and not wanted[part] for part, share in shares.items()):
            log(f"warning: class {name} has only {count} images: {count - sum(wanted.values())} for train, "
                + ", ".join(f"{number} for {part}" for part, number in wanted.items()))
        for sha256 in sorted(contents, key=lambda content: hashlib.sha256(f"{seed}:{content}".encode()).digest()):
            group = contents[sha256]
            part = next((part for part in wanted if wanted[part] >= len(group)), "train")
            wanted[part] = wanted.get(part, 0) - len(group)
            for record in group:
                record["split"] = part


def lay_out(records: list[dict], staging: Path):
    """Put every file at staging/<split>/<class>/<name> and write staging/splits.csv: extracted files are moved, others copied."""
    for record in records:
        record["target"] = f"{record['split']}/{record['class']}/{record['name']}"
    for folder in {os.path.dirname(record["target"]) for record in records}:
        (staging / folder).mkdir(parents=True)
    with Progress("lay out", len(records), every=10) as progress:
        for record in records:
            ours = Path(record["file"]).parent == staging / "files"
            (os.rename if ours else shutil.copyfile)(record["file"], staging / record["target"])
            progress.update(1)
    shutil.rmtree(staging / "files", ignore_errors=True)
    with replacing(staging / "splits.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "split", "sha256"])
        writer.writerows(sorted([r["target"], r["class"], r["split"], r["sha256"]] for r in records))


def replace_tree(staging: Path, out: Path):
    """Rename the finished tree to OUT; an old tree is moved aside first, and removed last."""
    os.sync() if hasattr(os, "sync") else None
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def show_counts(counts: dict):
    """The table of images per class and split, on stderr."""
    names = sorted({name for part in counts.values() for name in part})
    width = max(map(len, [*names, "total"]))
    rows = [(name, [counts[part].get(name, 0) for part in SPLITS]) for name in names]
    rows.append(("total", [sum(counts[part].values()) for part in SPLITS]))
    print("\n".join([f"{'class':<{width}}" + "".join(f"{part:>8}" for part in SPLITS),
                     *(f"{name:<{width}}" + "".join(f"{count:>8}" for count in row) for name, row in rows)]), file=sys.stderr)


# ---------------------------------------------------------------- a demonstration set, drawn

def draw_synthetic(folder: Path, per_class: int, seed: int) -> list[tuple[PurePosixPath, Path]]:
    """Draw per_class PNG tiles of 64x64 pixels for each of ten classes named as EuroSAT's; the same seed draws the same tiles."""
    folder.mkdir()
    files = []
    with Progress("draw", per_class * len(PAINTERS), every=10) as progress:
        for name, paint in PAINTERS.items():
            for number in range(1, per_class + 1):
                rng = random.Random(f"{seed}/{name}/{number}")
                tile = Image.blend(paint(rng), noise(rng, 64, jitter(rng, (128, 128, 128), 60), (128, 128, 128)), rng.uniform(0.05, 0.3))
                path = folder / f"{name}_{number}.png"
                tile.save(path)
                files.append((PurePosixPath(name, path.name), path))
                progress.update(1)
    return files


def jitter(rng: random.Random, colour: tuple, spread: int = 18) -> tuple:
    shift = rng.randint(-spread, spread)
    return tuple(max(0, min(255, value + shift + rng.randint(-spread // 2, spread // 2))) for value in colour)


def noise(rng: random.Random, cells: int, dark: tuple, light: tuple) -> Image.Image:
    """A 64x64 texture between two colours whose grain is 64 / cells pixels."""
    grey = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells)).resize((64, 64), Image.Resampling.BICUBIC)
    return ImageOps.colorize(grey, jitter(rng, dark), jitter(rng, light))


def turned(rng: random.Random, draw_on, background: Image.Image) -> Image.Image:
    """Let draw_on(ImageDraw, size) draw over a larger canvas, turn it at random and lay its centre over the background."""
    size = 96
    canvas = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    draw_on(ImageDraw.Draw(canvas), size)
    layer = canvas.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC).crop((16, 16, 80, 80))
    background.paste(layer, (0, 0), layer)
    return background


def grass(rng):
    return noise(rng, rng.choice((3, 5, 8)), (72, 98, 62), (112, 134, 84))


def paint_fields(rng):
    def fields(draw, size):
        y = 0
        while y < size:
            height, x = rng.randint(14, 40), 0
            while x < size:
                width = rng.randint(18, 60)
                draw.rectangle((x, y, x + width, y + height), (*jitter(rng, rng.choice(((150, 122, 88), (126, 134, 78), (178, 158, 116), (98, 84, 70)))), 255))
                x += width + 1
            y += height + 1
    return turned(rng, fields, grass(rng)).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))


def paint_orchard(rng):
    step, size_of_tree, colour = rng.randint(5, 9), rng.randint(2, 4), jitter(rng, (66, 84, 54))

    def trees(draw, size):
        for y in range(0, size, step):
            for x in range(0, size, step):
                draw.ellipse((x, y, x + size_of_tree, y + size_of_tree), (*colour, 220))
    return turned(rng, trees, noise(rng, 6, (136, 114, 88), (170, 148, 116))).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))


def paint_buildings(rng, small: bool):
    ground = noise(rng, 16, (100, 98, 92), (140, 136, 128))
    roofs = ((150, 96, 80), (128, 116, 110), (172, 150, 136)) if small else ((206, 206, 204), (168, 174, 184), (128, 132, 140))

    def blocks(draw, size):
        y, low, high = 0, *((4, 8) if small else (12, 30))
        while y < size:
            x, depth = 0, rng.randint(low, high)
            while x < size:
                width = rng.randint(low, high)
                if rng.random() < 0.8:
                    draw.rectangle((x, y, x + width, y + depth), (*jitter(rng, rng.choice(roofs)), 255))
                x += width + rng.randint(2, 5)
            y += depth + rng.randint(2, 6)
    return turned(rng, blocks, ground).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))


def paint_band(rng, water: bool):
    """A river, wide and winding, or a highway, narrow and bent a little."""
    width, bend = (rng.randint(9, 22), rng.uniform(6, 16)) if water else (rng.randint(3, 6), rng.uniform(0, 5))
    colour, phase = jitter(rng, (56, 78, 98) if water else (150, 148, 146), 12), rng.uniform(0, 6)

    def band(draw, size):
        centre = size / 2 + rng.uniform(-12, 12)
        for thickness, paint in ((width, colour), *([(1, (110, 112, 108))] if not water and width > 4 else [])):
            for step in range(4 * size):
                x = step / 4
                y = centre + bend * math.sin(x / 18 + phase)
                draw.ellipse((x - thickness / 2, y - thickness / 2, x + thickness / 2, y + thickness / 2), (*paint, 255))
    ground = grass(rng) if rng.random() < 0.6 else paint_fields(rng)
    return turned(rng, band, ground).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))


PAINTERS = {
    "AnnualCrop": paint_fields,
    "Forest": lambda rng: noise(rng, rng.choice((24, 32)), (24, 44, 34), (62, 84, 56)),
    "HerbaceousVegetation": lambda rng: noise(rng, rng.choice((12, 16, 24)), (86, 92, 60), (142, 136, 96)),
    "Highway": lambda rng: paint_band(rng, water=False),
    "Industrial": lambda rng: paint_buildings(rng, small=False),
    "Pasture": grass,
    "PermanentCrop": paint_orchard,
    "Residential": lambda rng: paint_buildings(rng, small=True),
    "River": lambda rng: paint_band(rng, water=True),
    "SeaLake": lambda rng: noise(rng, rng.choice((2, 4, 24)), (28, 50, 78), (44, 70, 96)),
}


if __name__ == "__main__":
    sys.exit(main())
