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
import lzma
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

from common import (SPLITS, ImageError, Progress, UserError, command, file_hash, fraction, is_image_name, locked, log,
                    make_parser, one_line, positive_int, read_image, replacing, seed_number, walk)

# The address and checksum that torchvision's datasets.EuroSAT uses.
EUROSAT_URL = "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip"
EUROSAT_MD5 = "c8fa014336c82ac7804f0398fcb19387"
# An archive may unpack to this many times its own size; below the floor, to anything. Images hardly compress.
UNPACK_RATIO, UNPACK_FLOOR = 20, 1 << 30


def parse_args(argv):
    parser = make_parser("prepare_data.py", __doc__, "python prepare_data.py --source photos.zip --out data/photos")
    group = parser.add_argument_group("source (default: download EuroSAT)")
    group.add_argument("--source", type=Path, metavar="PATH",
                       help="a folder, zip or tar of class folders of images; wrapping folders are looked through, and "
                            "folders train/, val/, test/ of class folders are kept as they are")
    group.add_argument("--synthetic", action="store_true",
                       help="draw a demonstration set: 10 classes of 64x64 tiles that look a little like land cover; needs "
                            "no network, and says nothing about real images")
    group.add_argument("--per-class", type=positive_int, metavar="N",
                       help="take a sample of N images of each class (of each split, where the source is split already); with "
                            "--synthetic, draw N (default: all; with --synthetic 100)")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR",
                       help="the tree to make (default: data/eurosat, with --synthetic data/synthetic)")
    group.add_argument("--force", action="store_true",
                       help="replace the tree at OUT; the old one stands until the new one is complete")
    group = parser.add_argument_group("split")
    group.add_argument("--val", type=fraction, default=0.1, metavar="SHARE",
                       help="share of each class for choosing epochs and settings; 0: no val/")
    group.add_argument("--test", type=fraction, default=0.2, metavar="SHARE",
                       help="share of each class for the final measurement; 0: no test/")
    group.add_argument("--seed", type=seed_number, default=0, metavar="N", help="of the split and of all drawing")
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
    out = args.out.resolve()
    with made_parents(out), locked(out):
        check_target(args, out)
        source = args.source if args.source or args.synthetic else download_eurosat(out.with_name("EuroSAT.zip"))
        staging = out.with_name(f".{out.name}.partial")  # beside OUT, so that it can be renamed
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            if source:
                files, folders, others = unpack(source, staging / "files")
            else:
                files, folders, others = draw_synthetic(staging / "files", args.per_class or 100, args.seed), set(), 0
            records = classify(files, folders, str(source))
            check(records)
            records = sample(records, args.per_class, args.seed) if args.per_class and source else records
            split(records, args.val, args.test, args.seed)
            report_duplicates(records)
            lay_out(records, staging)
            replace_tree(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    counts = {name: dict(sorted(collections.Counter(r["class"] for r in records if r["split"] == name).items()))
              for name in SPLITS}
    show_counts(counts)
    if others:
        log(f"left out {others} files that are not images (by their extension)")
    print(json.dumps({"out": str(args.out), "images": len(records), "classes": len({r["class"] for r in records}),
                      **{name: sum(counts[name].values()) for name in SPLITS}, "not_images": others, "counts": counts}))


@contextlib.contextmanager
def made_parents(path: Path):
    """Make the folders above `path`; those made here are removed again if they stay empty."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in missing:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_target(args, out: Path):
    """See that OUT may be made: it is new or empty, or --force is given and it is a tree of ours, apart from the source."""
    if args.source:
        if not args.source.exists():
            raise UserError(f"no such file or folder: {args.source}")
        source = args.source.resolve()
        if out == source or out in source.parents or source in out.parents:
            raise UserError(f"--source {args.source} and --out {args.out} lie within each other; choose another --out")
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return
    if not (out / "splits.csv").is_file():
        raise UserError(f"{args.out} exists, and is no tree of this program (it has no splits.csv); choose another --out")
    if not args.force:
        raise UserError(f"{args.out} exists; choose another --out, or replace it with --force")


# ---------------------------------------------------------------- source -> files on disk

def download_eurosat(archive: Path) -> Path:
    """Download EuroSAT.zip unless it is there already; a file with the wrong MD5 is never unpacked."""
    import http.client
    import urllib.request  # takes longer than all that --help needs
    if archive.exists():
        if file_hash(archive, "md5") != EUROSAT_MD5:
            raise UserError(f"{archive} is there, but its MD5 is not {EUROSAT_MD5}: remove it to download it again, or use "
                            f"it with --source {archive}")
        log(f"using {archive}, downloaded before")
        return archive
    way_out = "download it elsewhere and pass it with --source FILE, or draw a demonstration set with --synthetic"
    try:
        with urllib.request.urlopen(EUROSAT_URL, timeout=60) as response, replacing(archive, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            digest = hashlib.md5(usedforsecurity=False)
            with Progress("download EuroSAT.zip", total >> 10 or None, "KiB", every=10) as progress:
                while block := response.read(1 << 18):
                    file.write(block)
                    digest.update(block)
                    progress.update(len(block) >> 10)
            if digest.hexdigest() != EUROSAT_MD5:
                raise UserError(f"{EUROSAT_URL} has MD5 {digest.hexdigest()}, not {EUROSAT_MD5}: {way_out}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {EUROSAT_URL}: {one_line(error)}; {way_out}") from None
    return archive


def unpack(source: Path, folder: Path) -> tuple[list[tuple[PurePosixPath, Path]], set[PurePosixPath], int]:
    """The images of a folder or archive: [(path within the source, file to read)], all its folders, and a count of other files.

    Archives are extracted into `folder` under plain names, so that nothing in an archive can name a place outside. Raises
    UserError for an archive that is damaged, holds links or paths that climb out, or unpacks to far more than it weighs.
    """
    files, folders, others = [], set(), 0
    if source.is_dir():
        for root, names in walk(source):
            folders.add(PurePosixPath(Path(root).relative_to(source)))
            images = [name for name in names if is_image_name(name)]
            files += [(PurePosixPath(Path(root, name).relative_to(source)), Path(root, name)) for name in images]
            others += len(names) - len(images)
        return files, folders, others
    folder.mkdir()
    room = max(UNPACK_FLOOR, UNPACK_RATIO * source.stat().st_size)
    try:
        with Progress(f"unpack {source.name}", None, "files", every=10) as progress:
            for name, stream in archive_members(source):
                path = PurePosixPath(name)
                if any(part.startswith((".", "__MACOSX")) for part in path.parts):
                    others += stream is not None
                    continue
                folders.add(path.parent if stream else path)
                if stream is None:
                    continue
                if not is_image_name(path.name):
                    others += 1
                    continue
                target = folder / f"{len(files)}{path.suffix}"
                with stream() as content, open(target, "wb") as file:
                    while block := content.read(1 << 20):
                        room -= len(block)
                        if room < 0:
                            raise UserError(f"{source} unpacks to more than {UNPACK_RATIO} times its size: refused; if you "
                                            "trust it, unpack it yourself and pass the folder")
                        file.write(block)
                files.append((path, target))
                progress.update(1)
    except OSError as error:
        if error.errno:  # a full disk, say; bzip2 raises an OSError without a number for damaged data
            raise
        raise UserError(f"cannot unpack {source}: {one_line(error)}; is it damaged?") from None
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
            ValueError) as error:
        raise UserError(f"cannot unpack {source}: {one_line(error) or type(error).__name__}; is it damaged?") from None
    return files, folders, others


def archive_members(source: Path):
    """Yield (name, function that opens it) of the files in a zip or tar, and (name, None) of its folders.

    Raises UserError for links and for names that climb out.
    """
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                check_member(source, member.filename, link=member.external_attr >> 28 == 0o12)
                yield member.filename, None if member.is_dir() else lambda: archive.open(member)
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            for member in archive:
                check_member(source, member.name, link=not (member.isreg() or member.isdir()))
                yield member.name, None if member.isdir() else lambda: archive.extractfile(member)
    else:
        raise UserError(f"{source} is no folder, zip or tar that can be read; is it damaged?")


def check_member(source: Path, name: str, link: bool):
    if link:
        raise UserError(f"{source}: entry {name!r} is a link or a special file; refused")
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts or name[1:2] == ":":
        raise UserError(f"{source}: entry {name!r} climbs out of the archive; refused")


# ---------------------------------------------------------------- files -> records: class, name, content

def classify(files: list[tuple[PurePosixPath, Path]], folders: set[PurePosixPath], source: str) -> list[dict]:
    """Find the class of each file: its first folder below those that wrap all. train/, val/, test/ in that place are kept.

    Returns records with class, name (unique within its class and split), file and split (None: to be assigned). Raises
    UserError for no images or one class, an image outside the class folders, a class folder without images, and for
    names that would collide.
    """
    if not files:
        raise UserError(f"no images in {source}; expected <class>/<image> with one of the usual extensions")
    parts, depth = [path.parts for path, _ in files], 0
    while len({p[depth] for p in parts}) == 1 and all(len(p) > depth + 2 for p in parts):
        depth += 1
    first = {p[depth] for p in parts}
    given = "train" in first and first <= set(SPLITS) and all(len(p) > depth + 2 for p in parts)
    depth += given
    used = {p[:depth + 1] for p in parts if len(p) > depth + 1}
    records, seen = [], set()
    for (path, file), p in zip(files, parts):
        if len(p) < depth + 2:
            raise UserError(f"{path} in {source} is in no class folder; expected <class>/<image>")
        record = {"class": p[depth], "name": "__".join(p[depth + 1:]), "file": str(file), "path": str(path),
                  "split": p[depth - 1] if given else None}
        key = (record["split"], record["class"].casefold(), record["name"].casefold())
        if key in seen:
            raise UserError(f"two images would both become {record['class']}/{record['name']}; rename one of them")
        seen.add(key)
        records.append(record)
    if len(classes := {record["class"] for record in records}) < 2:
        raise UserError(f"{source} has one class, {classes.pop()}; a classifier needs two or more class folders")
    wrapper = parts[0][:depth - given]
    if empty := sorted(str(f) for f in folders if len(f.parts) == depth + 1 and f.parts[:len(wrapper)] == wrapper
                       and f.parts not in used):
        raise UserError(f"class folder without images: {', '.join(empty[:5])} in {source}; remove it, or put images into it")
    return records


def check(records: list[dict]):
    """Decode and hash every file, in parallel; adds sha256. Raises UserError naming those that cannot be read, or whose
    content stands under two classes."""
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
        raise UserError(f"{len(bad)} of {len(records)} images cannot be read: {', '.join(bad[:5])}"
                        f"{', ...' if len(bad) > 5 else ''}; repair or remove them")
    by_content = collections.defaultdict(list)
    for record in records:
        by_content[record["sha256"]].append(record)
    if torn := [group for group in by_content.values() if len({r["class"] for r in group}) > 1]:
        raise UserError(f"equal content under two classes ({len(torn)} times), such as "
                        f"{' and '.join(r['path'] for r in torn[0][:3])}: remove one of them")


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

def shuffled(contents, seed: int) -> list[str]:
    """SHA-256 sums in an order that depends on themselves and the seed alone, not on any file's name or place."""
    return sorted(contents, key=lambda content: hashlib.sha256(f"{seed}:{content}".encode()).digest())


def group_by_content(records: list[dict], *fields: str) -> dict:
    """{values of the fields: {sha256: [records]}}, the outer keys sorted."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for record in records:
        groups[tuple(str(record[field]) for field in fields)][record["sha256"]].append(record)
    return dict(sorted(groups.items()))


def sample(records: list[dict], count: int, seed: int) -> list[dict]:
    """`count` images of each class, or of each class and split of a split source, no two with equal content."""
    return [contents[sha256][0] for contents in group_by_content(records, "class", "split").values()
            for sha256 in shuffled(contents, seed)[:count]]


def split(records: list[dict], val: float, test: float, seed: int):
    """Assign records to train, val and test, class by class and exact to the image (equal content stays together).

    The same content, shares and seed give the same split, whatever the files' names or order. Records of a source that is
    split already keep their split; where that lacks a val/, it is made from train.
    """
    given = {record["split"] for record in records}
    shares = {"test": test, "val": val}
    if None not in given:
        if "val" in given or not val:
            return
        records, shares = [r for r in records if r["split"] == "train"], {"val": val}
    for (name,), contents in group_by_content(records, "class").items():
        count = sum(map(len, contents.values()))
        left = {part: round(count * share) for part, share in shares.items()}
        if sum(left.values()) >= count:
            raise UserError(f"class {name} has {count} images, of which --val {val} and --test {test} leave none for train; "
                            "lower them, or add images")
        if short := [part for part, share in shares.items() if share and not left[part]]:
            log(f"warning: class {name} has only {count} images: none for {', '.join(short)}")
        for sha256 in shuffled(contents, seed):
            group = contents[sha256]
            part = next((part for part in left if left[part] >= len(group)), "train")
            left[part] = left.get(part, 0) - len(group)
            for record in group:
                record["split"] = part


def report_duplicates(records: list[dict]):
    """Tell how many images repeat another's content; warn where a source that was split before has them in two splits."""
    (contents,) = group_by_content(records).values()
    if doubled := len(records) - len(contents):
        log(f"{doubled} images repeat the content of another; equal images were given to the same split")
    if leaked := sum(len({r["split"] for r in group}) > 1 for group in contents.values()):
        log(f"warning: {leaked} images stand in more than one split of the source; what is measured on them will be too good")


def lay_out(records: list[dict], staging: Path):
    """Put every file at staging/<split>/<class>/<name>, moved if we extracted it, else copied; write staging/splits.csv."""
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
    lines = [f"{name:<{width}}" + "".join(f"{cell:>8}" for cell in row) for name, row in [("class", SPLITS), *rows]]
    log("\n".join(lines), stamp=False)


# ---------------------------------------------------------------- a demonstration set, drawn

def draw_synthetic(folder: Path, per_class: int, seed: int) -> list[tuple[PurePosixPath, Path]]:
    """Draw per_class tiles of 64x64 pixels for each of ten classes named as EuroSAT's; the same seed draws the same."""
    folder.mkdir()
    files = []
    with Progress("draw", per_class * len(PAINTERS), every=10) as progress:
        for name, paint in PAINTERS.items():
            for number in range(1, per_class + 1):
                rng = random.Random(f"{seed}/{name}/{number}")
                grain = noise(rng, 64, jitter(rng, (128, 128, 128), 60), (128, 128, 128))
                tile = Image.blend(paint(rng), grain, rng.uniform(0.05, 0.3))
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
    colours = ((150, 122, 88), (126, 134, 78), (178, 158, 116), (98, 84, 70))

    def fields(draw, size):
        y = 0
        while y < size:
            height, x = rng.randint(14, 40), 0
            while x < size:
                width = rng.randint(18, 60)
                draw.rectangle((x, y, x + width, y + height), (*jitter(rng, rng.choice(colours)), 255))
                x += width + 1
            y += height + 1
    return turned(rng, fields, grass(rng)).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))


def paint_orchard(rng):
    step, size_of_tree, colour = rng.randint(5, 9), rng.randint(2, 4), jitter(rng, (66, 84, 54))

    def trees(draw, size):
        for y in range(0, size, step):
            for x in range(0, size, step):
                draw.ellipse((x, y, x + size_of_tree, y + size_of_tree), (*colour, 220))
    soil = noise(rng, 6, (136, 114, 88), (170, 148, 116))
    return turned(rng, trees, soil).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))


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
