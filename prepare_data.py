"""Prepare images for training: OUT/{train,val,test}/<class>/*, and OUT/splits.csv, which can reproduce the split.

Downloads EuroSAT (27,000 Sentinel-2 tiles, 10 land cover classes, 94 MB), takes your own images with --source, or draws
a small demonstration set with --synthetic. Every image is decoded. OUT appears only when it is complete. The last line
on stdout is a JSON object with the counts.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import http.client
import json
import lzma
import math
import operator
import os
import random
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image, ImageOps

from common import SPLITS
from common import ImageError, Progress, UserError
from common import atomic_write, command, fraction, hash_file, hold_lock, is_image_name, log, make_parser, one_line
from common import positive_int, read_content, read_image, seed_number, walk_folders, write_csv

# The address and checksum that torchvision's datasets.EuroSAT uses.
EUROSAT_URL = (
    "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip"
)
EUROSAT_MD5 = "c8fa014336c82ac7804f0398fcb19387"
REQUEST_FILE = ".prepared.json"  # in OUT: the request from which the tree was made
# An archive may unpack to this many times its own size, and always to the minimum. Images hardly compress.
UNPACK_RATIO, UNPACK_MINIMUM = 20, 1 << 30


@dataclass(eq=False)
class Record:
    """An image of the source, or of the tree that exists at OUT."""

    path: str  # inside the source or tree
    file: str  # the file on disk that has its content
    class_name: str
    name: str  # its file name in the tree, unique within class and split
    split: str | None  # train, val or test; None until it is assigned
    sha256: str = ""  # of the content; empty until the image is checked
    reason: str | None = None  # why the image cannot be read; None if it can be
    in_tree: bool = False  # the tree at OUT already has the image


@dataclass
class Contents:
    """The files of a source."""

    images: list[tuple[PurePosixPath, str]]  # path inside the source, and the file on disk that has its content
    folders: set[PurePosixPath]  # of an archive only those that are listed or have files other than images
    others: int  # number of files that are not images


# ---------------------------------------------------------------- command line


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, check which options go together, and fill in the defaults that depend on others."""
    parser = make_parser("prepare_data.py", __doc__, "python prepare_data.py --source photos.zip --out data/photos")
    add = parser.add_argument_group("source (default: download EuroSAT)").add_argument
    source_help = "a folder, zip or tar with a folder of images per class, perhaps inside other folders; if these are"
    add("--source", type=Path, metavar="PATH", help=f"{source_help} train/, val/ and test/, that split is kept")
    url_help = "download a zip or tar from here (http, https, file) and keep it beside OUT; needs --sha256 or --md5"
    add("--url", help=f"{url_help}; an interrupted download is continued")
    add("--sha256", type=str.lower, metavar="SUM", help="checksum of the file at --url")
    add("--md5", type=str.lower, metavar="SUM", help="checksum of the file at --url")
    add("--synthetic", action="store_true", help="draw a demonstration set: 10 classes of textures of 64x64 pixels")
    per_class_help = "a random sample of N images per class (and split, if it is given); with --synthetic, draw N"
    add("--per-class", type=positive_int, metavar="N", help=f"{per_class_help} (default: all; with --synthetic 100)")
    on_bad_help = "if images cannot be read: end with an error, or leave them out and list them in OUT/rejected.csv"
    add("--on-bad", choices=("fail", "skip"), default="fail", help=on_bad_help)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR", help="(default: data/eurosat, with --synthetic data/synthetic)")
    add("--force", action="store_true", help="replace the tree at OUT as soon as the new one is complete")
    add("--update", action="store_true", help="add the new images of the source to the tree at OUT, and keep its split")
    link_help = "hard: make hard links to the files of a source folder, so that a change of one is a change of both"
    add("--link", choices=("copy", "hard"), default="copy", help=link_help)
    add("--dry-run", action="store_true", help="check the source and show the counts, but write nothing")
    add = parser.add_argument_group("split").add_argument
    add("--val", type=fraction, default=0.1, metavar="SHARE", help="share of each class for validation; 0: no val/")
    add("--test", type=fraction, default=0.2, metavar="SHARE", help="share of each class for testing; 0: no test/")
    splits_help = (
        "a splits.csv of this program, or a folder with train.txt, test.txt and perhaps val.txt, which list file"
    )
    add("--splits", type=Path, metavar="PATH", help=f"{splits_help} names, with or without class folder")
    add("--seed", type=seed_number, default=0, metavar="N", help="of split, sample and drawn images")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.source, args.url, args.synthetic))) > 1:
        parser.error("--source, --url and --synthetic exclude each other")
    if bool(args.url) != bool(args.sha256 or args.md5):
        parser.error("--url and a checksum (--sha256 or --md5) must be given together")
    if args.link == "hard" and (not args.source or args.source.is_file()):
        parser.error("--link hard is only for a --source folder; all other images are unpacked or drawn into OUT")
    if args.update and (args.force or args.per_class):
        parser.error("--update cannot be combined with --force or --per-class")
    if args.val + args.test >= 1:
        parser.error(f"--val {args.val} and --test {args.test} leave no images for training")
    args.out = args.out or Path("data/synthetic" if args.synthetic else "data/eurosat")
    if not (args.source or args.url or args.synthetic):
        args.url, args.md5 = EUROSAT_URL, EUROSAT_MD5
    return args


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Prepare a tree of images."""
    args = parse_args(argv)
    out = args.out.resolve()
    staging, old, lock = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "old", "lock"))
    result = {"out": str(args.out), "changed": False, "dry_run": args.dry_run}
    with hold_lock(lock):
        recover(out, staging, old)
        request = describe_request(args)
        if not args.dry_run and is_complete(args.out, request, args.force, args.update):
            log(f"{args.out} is complete, nothing to do")
            records = read_splits_csv(out / "splits.csv")
            print(json.dumps(result | summarize(records) | {"not_images": None, "rejected": None}))
            return
        source = args.source
        if args.url:
            source = download(args.url, "sha256" if args.sha256 else "md5", args.sha256 or args.md5, out.parent)
        try:
            staging.mkdir()
            if args.synthetic:
                contents = draw_textures(staging / "files", args.per_class or 100, args.seed)
            else:
                contents = list_folder(source) if source.is_dir() else unpack(source, staging / "files")
            checked = check_images(find_classes(contents, source))
            rejected = [record for record in checked if record.reason is not None]
            records = choose_records(args, checked, rejected)
            if args.dry_run:
                show_images(records, rejected)
            elif not all(record.in_tree for record in records):
                build_tree(records, rejected, request, args.link, staging)
                replace_tree(staging, out, old)
                result["changed"] = True
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    result |= summarize(records) | {"not_images": contents.others, "rejected": len(rejected)}
    show_counts(result["counts"])
    if contents.others:
        log(f"left out {contents.others} files that do not have an image extension")
    if rejected:
        log(f"left out {len(rejected)} images that cannot be read")
    print(json.dumps(result))


# ---------------------------------------------------------------- request, and the tree that exists


def recover(out: Path, staging: Path, old: Path) -> None:
    """Clean up after a killed run. If it was killed between the two renames of `replace_tree`, restore the old tree."""
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(staging, ignore_errors=True)
    remove_old(old, staging)


def remove_old(old: Path, staging: Path) -> None:
    """Remove a replaced tree, under the name `staging`, so that a tree with the name `old` is always complete."""
    if old.exists():
        old.rename(staging)
        shutil.rmtree(staging, ignore_errors=True)


def describe_request(args: argparse.Namespace) -> dict:
    """Return all that determines the tree, as plain values; a source is described by its names, sizes and times."""
    if args.source:
        if not args.source.exists():
            raise UserError(f"no such file or folder: {args.source}")
        source, out = args.source.resolve(), args.out.resolve()
        if out == source or out in source.parents or source in out.parents:
            raise UserError(f"--source {args.source} and --out {args.out} overlap; choose another --out")
        files = [args.source]
        if args.source.is_dir():
            files = [Path(root, name) for root, names in walk_folders(args.source) for name in names]
        statuses = [(file, file.stat() if file.exists() else file.lstat()) for file in files]  # a link may be broken
        lines = "".join(f"{os.fsencode(file)!r} {status.st_size} {status.st_mtime_ns}\n" for file, status in statuses)
        content = hashlib.sha256(lines.encode()).hexdigest()
    else:
        source, content = args.url or "synthetic", args.sha256 or args.md5
    splits = None
    if args.splits:
        files = [args.splits] if args.splits.is_file() else [args.splits / f"{part}.txt" for part in SPLITS]
        if not all(file.is_file() for file in files if file.stem != "val"):
            raise UserError(f"--splits {args.splits} is not a splits.csv, or a folder of train.txt, test.txt, val.txt")
        splits = [hash_file(file) for file in files if file.is_file()]
    settings = {"val": args.val, "test": args.test, "seed": args.seed, "splits": splits}
    settings |= {"per_class": args.per_class, "on_bad": args.on_bad}
    return {"source": str(source), "content": content, **settings}


def is_complete(out: Path, request: dict, force: bool, update: bool) -> bool:
    """Return whether the tree at OUT was made from this request. Raises UserError for one that must not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "splits.csv").is_file():
        raise UserError(f"{out} exists, and is not a tree of this program (no splits.csv); choose another --out")
    if force:
        return False
    try:
        previous = dict(json.loads((out / REQUEST_FILE).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        previous = {}
    different = [key for key in request if previous.get(key) != request[key]]
    shown = [key for key in different if key not in ("content", "splits")]
    details = [f"{key} was {previous.get(key)}, is {request[key]}" for key in shown]
    details = ", ".join(details + ["the list of --splits differs"] * ("splits" in different))
    if update:
        if fixed := [key for key in different if key not in ("source", "content", "on_bad")]:
            raise UserError(f"--update keeps the settings of {out}, but {', '.join(fixed)} differ: {details}")
        return not {"source", "content"} & set(different)
    if different:
        advice = "choose another --out, or replace it with --force"
        if set(different) <= {"source", "content"}:
            advice = f"add the new images with --update, {advice}"
        reason = details or "the source has changed since"
        raise UserError(f"{out} exists, but was made from another request ({reason}); {advice}")
    if missing := [row.path for row in read_splits_csv(out / "splits.csv") if not os.path.exists(row.file)]:
        raise UserError(f"{len(missing)} images of {out} are missing ({some(missing, 1)}); make it again with --force")
    return True


def read_splits_csv(path: Path) -> list[Record]:
    """Return the images that the splits.csv of a tree lists. Raises UserError for any other file."""
    records = []
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            for row in csv.DictReader(file):
                place, class_name, split, sha256 = (row[key] or "" for key in ("path", "class", "split", "sha256"))
                parts, file_name = PurePosixPath(place).parts, f"{path.parent}/{place}"
                is_inside = parts and ".." not in parts and class_name not in ("", "..") and "/" not in class_name
                if not is_inside or split not in SPLITS or not sha256:
                    raise ValueError("not a row that this program writes")
                records.append(Record(place, file_name, class_name, parts[-1], split, sha256, in_tree=True))
    except (KeyError, ValueError, csv.Error):
        columns = "path,class,split,sha256"
        raise UserError(f"{path} is not a splits.csv of this program: expected the columns {columns}") from None
    return records


# ---------------------------------------------------------------- source -> files


def download(url: str, algorithm: str, checksum: str, folder: Path) -> Path:
    """Download an archive into a folder, unless it is there already. Raises UserError for a wrong checksum."""
    import urllib.parse

    archive = folder / (PurePosixPath(urllib.parse.urlsplit(url).path).name or "download")
    partial = archive.with_name(f"{archive.name}.part")
    advice = "download it elsewhere and pass it with --source FILE, or draw a demonstration set with --synthetic"
    if archive.exists():
        if hash_file(archive, algorithm) != checksum:
            advice = f"remove it to download it again, or use it with --source {archive}"
            raise UserError(f"{archive} exists, but its {algorithm} is not {checksum}: {advice}")
        log(f"using {archive}, which was downloaded before")
        return archive
    try:
        fetch(url, partial)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if partial.exists() and not partial.stat().st_size:
            partial.unlink()
        raise UserError(f"cannot download {url}: {one_line(error)}; {advice}") from None
    if (found := hash_file(partial, algorithm)) != checksum:
        partial.unlink()
        raise UserError(f"{url} has {algorithm} {found}, not {checksum}: the download was removed; {advice}")
    partial.replace(archive)
    return archive


def fetch(url: str, path: Path) -> None:
    """Download a file. If a part of it is there and the server supports ranges, only the rest is downloaded."""
    import urllib.error
    import urllib.request  # takes longer to import than everything that --help needs

    present = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={present}-"} if present else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the requested range is empty: the file is complete
            return
        raise
    with response:
        if response.status != 206:  # not a partial response: the file from its beginning
            present = 0
        total = present + int(response.headers.get("Content-Length") or 0)
        progress = Progress(f"download {path.stem}", total >> 10, "KiB", every=10)
        with open(path, "ab" if present else "wb") as file, progress:
            progress.update(present >> 10)
            while block := response.read(1 << 18):
                file.write(block)
                progress.update(len(block) >> 10)
    if (size := path.stat().st_size) < total:
        raise OSError(f"the connection ended after {size} of {total} bytes; run the same command again to continue")


def list_folder(source: Path) -> Contents:
    """List the files of a source folder."""
    contents = Contents([], set(), 0)
    for root, names in walk_folders(source):
        folder = PurePosixPath(Path(root).relative_to(source))
        images = [name for name in names if is_image_name(name)]
        contents.images += [(folder / name, os.path.join(root, name)) for name in images]
        contents.folders.add(folder)
        contents.others += len(names) - len(images)
    return contents


def unpack(source: Path, folder: Path) -> Contents:
    """Unpack the images of a zip or tar into a folder, as numbered files: no entry can choose where it is written.

    Raises UserError for an archive that is damaged, has links or paths that lead out of it, or is far larger unpacked.
    """
    folder.mkdir()
    contents = Contents([], set(), 0)
    room = max(UNPACK_MINIMUM, UNPACK_RATIO * source.stat().st_size)
    with explain_damage(source), Progress(f"unpack {source.name}", None, "files", every=10) as progress:
        for name, is_folder, size, open_entry in archive_entries(source):
            path = PurePosixPath(name)
            hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
            if is_folder or hidden or not is_image_name(path.name):
                contents.others += not is_folder
                if not hidden:
                    contents.folders.add(path if is_folder else path.parent)
                continue
            room -= size  # as declared: no more than that is ever read
            if room < 0:
                advice = "if you trust it, unpack it yourself and pass the folder"
                raise UserError(f"{source} would unpack to more than {UNPACK_RATIO} times its size: refused; {advice}")
            target = f"{folder}{os.sep}{len(contents.images)}{path.suffix}"
            with open_entry() as stream, open(target, "wb") as file:
                shutil.copyfileobj(stream, file)
            contents.images.append((path, target))
            progress.update(1)
    return contents


@contextlib.contextmanager
def explain_damage(archive: Path) -> Iterator[None]:
    """Turn the exceptions that damaged data causes in the decoders into a UserError that names the archive."""
    try:
        yield
    except (
        *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, OSError),
        *(EOFError, NotImplementedError, RuntimeError, ValueError),
    ) as error:
        if isinstance(error, OSError) and error.errno:  # a full disk, for example; for damaged data bzip2 sets no errno
            raise
        reason = one_line(error) or type(error).__name__
        raise UserError(f"cannot unpack {archive}: {reason}; is it damaged?") from None


def archive_entries(source: Path) -> Iterator[tuple[str, bool, int, Callable[[], IO[bytes]]]]:
    """Yield the entries of a zip or tar: path, whether it is a folder, declared size, and a function that opens it.

    Raises UserError for links, for paths that lead out of the archive, and for a file that is neither zip nor tar.
    """
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                name = info.filename
                if not info.flag_bits & 0x800:  # by the format in an old code page, but many programs write UTF-8
                    with contextlib.suppress(UnicodeError):
                        name = name.encode("cp437").decode("utf-8")
                check_entry(source, name, is_link=info.external_attr >> 28 == 0o12)
                yield name, info.is_dir(), info.file_size, functools.partial(archive.open, info)
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            for info in archive:
                check_entry(source, info.name, is_link=not (info.isreg() or info.isdir()))
                yield info.name, info.isdir(), info.size, functools.partial(archive.extractfile, info)
            # tarfile takes a damaged header for the end of the archive, after which there are only zeros.
            archive.fileobj.seek(archive.offset)
            while block := archive.fileobj.read(1 << 20):
                if block.strip(b"\0"):
                    raise tarfile.ReadError("damaged header")
    else:
        raise UserError(f"{source} is not a folder, zip or tar that can be read; is it damaged?")


def check_entry(source: Path, name: str, is_link: bool) -> None:
    """Raise UserError for an entry of an archive that is a link, or whose path leads out of the archive."""
    if is_link:
        raise UserError(f"{source}: refused, because its entry {name!r} is a link or a special file")
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
        raise UserError(f"{source}: refused, because the path of its entry {name!r} leads out of the archive")


# ---------------------------------------------------------------- demonstration set

# For each class: a dark and a light color, and a grid of cells in shades between them: columns, rows, and whether the
# cells are regular (checks, or stripes in a single column) or random.
TEXTURES = {
    "AnnualCrop": ((115, 75, 45), (200, 170, 100), 1, 9, False),
    "Forest": ((20, 45, 25), (70, 105, 60), 24, 24, False),
    "HerbaceousVegetation": ((75, 85, 45), (145, 150, 85), 12, 12, False),
    "Highway": ((75, 75, 75), (165, 160, 150), 1, 12, True),
    "Industrial": ((110, 110, 120), (220, 220, 215), 6, 6, True),
    "Pasture": ((60, 110, 50), (125, 170, 85), 4, 4, False),
    "PermanentCrop": ((60, 90, 35), (170, 140, 100), 1, 18, True),
    "Residential": ((95, 75, 70), (195, 135, 115), 14, 14, True),
    "River": ((35, 75, 85), (110, 145, 135), 1, 6, False),
    "SeaLake": ((15, 40, 85), (50, 85, 130), 8, 8, False),
}


def draw_textures(folder: Path, per_class: int, seed: int) -> Contents:
    """Draw `per_class` tiles of 64x64 pixels of each class of TEXTURES; the same seed draws the same tiles."""
    folder.mkdir()
    contents = Contents([], set(), 0)
    with Progress("draw", per_class * len(TEXTURES), every=10) as progress:
        for name, texture in TEXTURES.items():
            for number in range(1, per_class + 1):
                path = folder / f"{name}_{number}.png"
                draw_texture(random.Random(f"{seed}/{name}/{number}"), *texture).save(path)
                contents.images.append((PurePosixPath(name, path.name), str(path)))
                progress.update(1)
    return contents


def draw_texture(rng: random.Random, dark: tuple, light: tuple, columns: int, rows: int, regular: bool) -> Image.Image:
    """Draw a tile of a texture, with random colors close to the given ones, and random scale, rotation and position."""
    dark, light = (tuple(max(0, value + rng.randint(-18, 18)) for value in color) for color in (dark, light))
    shades = rng.randbytes(columns * rows)
    if regular:
        shades = bytes(255 * ((row + column) % 2) for row in range(rows) for column in range(columns))
    size = rng.randint(100, 120)  # of a square that contains the tile in any rotation
    gray = Image.frombytes("L", (columns, rows), shades).resize((size, size), Image.Resampling.BICUBIC)
    gray = gray.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)
    left, top = rng.randint(18, size - 82), rng.randint(18, size - 82)
    return ImageOps.colorize(gray.crop((left, top, left + 64, top + 64)), dark, light)


# ---------------------------------------------------------------- files -> records


def find_classes(contents: Contents, source: Path | None) -> list[Record]:
    """Return a record for each image. Its class is the first folder below those that contain all images.

    If the folders at that level are train, val and test, they are the split, and the classes are one level below.
    Raises UserError for a source without images or with one class, for an image outside the class folders, for a class
    folder without images, and for two images that would have the same name in the tree.
    """
    if not contents.images:
        raise UserError(f"no images in {source}; expected <class>/<image> with one of the usual extensions")
    all_parts = [path.parts for path, _ in contents.images]
    level = 0
    while len({parts[level] for parts in all_parts}) == 1 and all(len(parts) > level + 2 for parts in all_parts):
        level += 1
    top = all_parts[0][:level]
    names = {parts[level] for parts in all_parts}
    is_split = "train" in names and names <= set(SPLITS) and all(len(parts) > level + 2 for parts in all_parts)
    level += is_split
    records, taken = [], set()
    for (path, file), parts in zip(contents.images, all_parts):
        if len(parts) < level + 2:
            raise UserError(f"{path} in {source} is not in a class folder; expected <class>/<image>")
        split, class_name, name = parts[level - 1] if is_split else None, parts[level], "__".join(parts[level + 1 :])
        key = split, class_name.casefold(), name.casefold()
        if key in taken:
            raise UserError(f"two images would both become {class_name}/{name}; rename one of them")
        taken.add(key)
        records.append(Record(str(path), file, class_name, name, split))
    classes = {record.class_name for record in records}
    if len(classes) < 2:
        raise UserError(f"{source} has one class, {classes.pop()}; a classifier needs two or more class folders")
    used = {parts[: level + 1] for parts in all_parts}
    folders = [folder for folder in contents.folders if len(folder.parts) == level + 1 and folder.parts not in used]
    if empty := sorted(str(folder) for folder in folders if folder.parts[: len(top)] == top):
        raise UserError(f"class folder without images: {some(empty)} in {source}; remove it, or put images into it")
    return records


def check_images(records: list[Record]) -> list[Record]:
    """Hash and decode all images, in threads. Returns each record with its sha256, or why the image cannot be read."""
    chunks = [records[i : i + 20] for i in range(0, len(records), 20)]
    checked = []
    with (  # closing: an interrupt cancels the chunks that have not started
        Progress("check", len(records), every=10) as progress,
        ThreadPoolExecutor(os.cpu_count()) as executor,
        contextlib.closing(executor.map(lambda chunk: list(map(check_image, chunk)), chunks)) as results,
    ):
        for chunk in results:
            checked += chunk
            progress.update(len(chunk))
    return checked


def check_image(record: Record) -> Record:
    """Return a record with the sha256 of its file, or with the reason why the file cannot be read."""
    try:
        content = read_content(record.file)
        read_image(record.file, content=content)
    except ImageError as error:
        return replace(record, reason=error.reason)
    return replace(record, sha256=hashlib.sha256(content).hexdigest())


# ---------------------------------------------------------------- records -> splits


def choose_records(args: argparse.Namespace, checked: list[Record], rejected: list[Record]) -> list[Record]:
    """Return the records of the new tree, each with its split. Raises UserError for equal images in two classes."""
    if rejected and args.on_bad == "fail" and not args.dry_run:
        failures = some(f"{record.path} ({record.reason})" for record in rejected)
        advice = "repair or remove them, or leave them out with --on-bad skip"
        raise UserError(f"{len(rejected)} of {len(checked)} images cannot be read: {failures}; {advice}")
    records = [record for record in checked if record.reason is None]
    contents = group_by(records, "sha256").values()
    if conflicts := [group for group in contents if len({record.class_name for record in group}) > 1]:
        names = some(" and ".join(record.path for record in group) for group in conflicts)
        raise UserError(f"equal content in two classes ({len(conflicts)} times): {names}; remove one of them")
    if args.splits:
        assign_listed_splits(records, args.splits)
    if args.per_class and not args.synthetic:
        records = sample(records, args.per_class, args.seed)
    if args.update and (args.out / "splits.csv").is_file():
        records = merge(read_splits_csv(args.out / "splits.csv"), records, args.out)
    if any(record.split is None for record in records) or not args.splits:
        assign_splits(records, args.val, args.test, args.seed)
    if not any(record.split == "train" for record in records):
        raise UserError("no images are left for training")
    contents = group_by(records, "sha256").values()
    if repeated := len(records) - len(contents):
        log(f"{repeated} images repeat the content of another one; equal images are assigned to the same split")
    if leaked := sum(len({record.split for record in group}) > 1 for group in contents):
        log(f"warning: {leaked} images are in more than one split, so the measured accuracy will be too high")
    return records


def group_by(records: Iterable[Record], *names: str) -> dict[str | tuple, list[Record]]:
    """Group records by an attribute, or by the tuple of several."""
    groups, key = collections.defaultdict(list), operator.attrgetter(*names)
    for record in records:
        groups[key(record)].append(record)
    return groups


def some(items: Iterable[str], most: int = 5) -> str:
    """Join the first items for a message."""
    items = list(items)
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")


def assign_listed_splits(records: list[Record], splits: Path) -> None:
    """Set the split of each record from a splits.csv (by content), or from train.txt, val.txt, test.txt (by name).

    Raises UserError with counts and first names if list and source do not have the same images.
    """
    missing, repeated = [], []
    for record in records:
        record.split = None  # the list replaces a split of the source
    if splits.is_file():
        unassigned = group_by(records, "sha256")
        for row in read_splits_csv(splits):
            if group := unassigned.get(row.sha256):
                record = next((record for record in group if record.name == row.name), group[0])
                record.split = row.split
                group.remove(record)
            else:
                missing.append(row.path)
    else:
        by_name = collections.defaultdict(list)
        for record in records:
            name = PurePosixPath(record.path).name
            by_name[name].append(record)
            by_name[f"{record.class_name}/{name}"].append(record)
        for part, line in read_split_lists(splits):
            found = by_name.get("/".join(PurePosixPath(line).parts[-2:]), [])
            if not found:
                missing.append(line)
            elif len(found) > 1 or found[0].split:
                repeated.append(line)
            else:
                found[0].split = part
    unlisted = [record.path for record in records if record.split is None]
    kinds = (missing, "are not in the source"), (repeated, "are repeated"), (unlisted, "of the source are not listed")
    if details := [f"{len(names)} names {what} ({some(names, 3)})" for names, what in kinds if names]:
        raise UserError(f"--splits {splits} does not fit the source: {'; '.join(details)}")


def read_split_lists(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (split, line) for the lines of train.txt, val.txt and test.txt that are not empty."""
    for part in SPLITS:
        file = folder / f"{part}.txt"
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if file.is_file() else []
        yield from ((part, line.strip()) for line in lines if line.strip())


def sample(records: list[Record], count: int, seed: int) -> list[Record]:
    """Return `count` random images of each class (and split, if they have one), all with different content."""
    chosen = []
    for _, members in sorted(group_by(records, "class_name", "split").items()):
        contents = group_by(members, "sha256")
        chosen += [contents[sha256][0] for sha256 in shuffled(contents, seed)[:count]]
    return chosen


def shuffled(hashes: Iterable[str], seed: int) -> list[str]:
    """Return SHA-256 hashes in an order that depends only on them and the seed, not on names or order of the files."""
    return sorted(hashes, key=lambda sha256: hashlib.sha256(f"{seed}:{sha256}".encode()).digest())


def merge(rows: list[Record], records: list[Record], out: Path) -> list[Record]:
    """Return the images of the tree at OUT, and after them those of the source whose content is not in the tree.

    Raises UserError for an image whose class has changed, and for a new image with the name of one in the tree.
    """
    known = {row.sha256: row for row in rows}
    if moved := [r.path for r in records if r.sha256 in known and known[r.sha256].class_name != r.class_name]:
        advice = "make the tree again with --force"
        raise UserError(f"{len(moved)} images have another class than in {out}: {some(moved)}; {advice}")
    new = [record for record in records if record.sha256 not in known]
    taken = {(row.class_name.casefold(), row.name.casefold()) for row in rows}
    if changed := [r.path for r in new if (r.class_name.casefold(), r.name.casefold()) in taken]:
        advice = "rename them, or make the tree again with --force"
        raise UserError(f"{len(changed)} images have the name of another image in {out}: {some(changed)}; {advice}")
    found = {record.sha256 for record in records}
    gone = sum(row.sha256 not in found for row in rows)
    message = f"{len(rows)} images are in the tree, {len(new)} images of the source are new"
    log(message + (f"; {gone} are no longer in the source, and are kept" if gone else ""))
    return rows + new


def assign_splits(records: list[Record], val: float, test: float, seed: int) -> None:
    """Assign the records that have no split to train, val and test, in each class with exactly these shares.

    The split depends only on content, shares and seed, not on the names and order of the files; equal images are
    assigned to the same split. If some records already have a split (--update), the others bring each class as near to
    the shares as possible. If all have one, because the source is split, but none is val, val is taken from train.
    """
    shares = {"test": test, "val": val}
    if all(record.split for record in records):
        if not val or any(record.split == "val" or record.in_tree for record in records):
            log("every image already has a split, and keeps it")
            return
        records, shares = [record for record in records if record.split == "train"], {"val": val}
        for record in records:
            record.split = None
    for name, members in sorted(group_by(records, "class_name").items()):
        wanted = {part: round(len(members) * share) for part, share in shares.items()}
        if sum(wanted.values()) >= len(members):
            problem = f"--val {val} and --test {test} leave none of the {len(members)} images of class {name} for train"
            raise UserError(f"{problem}; lower them, or add images")
        if short := [part for part, share in shares.items() if share and not wanted[part]]:
            log(f"warning: class {name} has only {len(members)} images: none for {', '.join(short)}")
        room = {part: count - sum(record.split == part for record in members) for part, count in wanted.items()}
        contents = group_by((record for record in members if record.split is None), "sha256")
        for sha256 in shuffled(contents, seed):
            group = contents[sha256]
            part = next((part for part in room if room[part] >= len(group)), "train")
            if part in room:
                room[part] -= len(group)
            for record in group:
                record.split = part


# ---------------------------------------------------------------- splits -> tree


def build_tree(records: list[Record], rejected: list[Record], request: dict, link: str, staging: Path) -> None:
    """Build the tree in `staging`: move unpacked files, link those of the old tree, copy or link those of a folder."""
    paths = [f"{record.split}/{record.class_name}/{record.name}" for record in records]
    for folder in {os.path.dirname(path) for path in paths}:
        (staging / folder).mkdir(parents=True)
    with Progress("build", len(records), every=10) as progress:
        for record, path in zip(records, paths):
            target = f"{staging}/{path}"
            if record.file.startswith(f"{staging}{os.sep}"):
                os.rename(record.file, target)
            elif link == "hard" or record.in_tree:
                link_file(record.file, target, or_copy=record.in_tree)
            else:
                shutil.copyfile(record.file, target)
            progress.update(1)
    shutil.rmtree(staging / "files", ignore_errors=True)
    rows = sorted((path, record.class_name, record.split, record.sha256) for record, path in zip(records, paths))
    write_csv(staging / "splits.csv", ["path", "class", "split", "sha256"], rows)
    if rejected:
        write_csv(staging / "rejected.csv", ["path", "reason"], [(record.path, record.reason) for record in rejected])
    with atomic_write(staging / REQUEST_FILE) as file:
        json.dump(request, file)


def link_file(source: str, target: str, or_copy: bool) -> None:
    """Make a hard link. If that is not possible, copy the file, or raise UserError."""
    try:
        os.link(source, target)
    except OSError as error:
        if not or_copy:
            raise UserError(f"--link hard: cannot link {source}: {error.strerror}; use --link copy") from None
        shutil.copyfile(source, target)


def replace_tree(staging: Path, out: Path, old: Path) -> None:
    """Rename the complete tree to OUT, after the old one is moved away. If the run is killed, `recover` cleans up."""
    if hasattr(os, "sync"):
        os.sync()  # the names must not reach the disk before the contents
    if out.exists():
        out.rename(old)
    staging.rename(out)
    remove_old(old, staging)


# ---------------------------------------------------------------- report


def summarize(records: list[Record]) -> dict:
    """Return the numbers of images and classes, and the images per split and per class in each split."""
    counts = {part: collections.Counter(sorted(r.class_name for r in records if r.split == part)) for part in SPLITS}
    totals = {part: sum(counts[part].values()) for part in SPLITS}
    classes = {record.class_name for record in records}
    return {"images": len(records), "classes": len(classes), **totals, "counts": counts}


def show_counts(counts: dict[str, dict[str, int]]) -> None:
    """Show a table of the images per class and split on stderr."""
    names = sorted(set().union(*counts.values()))
    rows = [("class", *SPLITS), *((name, *(counts[part].get(name, 0) for part in SPLITS)) for name in names)]
    rows.append(("total", *(sum(counts[part].values()) for part in SPLITS)))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{name:<{width}}" + "".join(f"{cell:>8}" for cell in cells) for name, *cells in rows]
    log("\n".join(lines), stamp=False)


def show_images(records: list[Record], rejected: list[Record]) -> None:
    """Show unreadable images, and the sizes in pixels and modes of the new images, on stderr."""
    for record in rejected:
        log(f"cannot be read: {record.path} ({record.reason})", stamp=False)
    sizes, modes = [], collections.Counter()
    for record in records:
        if not record.in_tree:
            with Image.open(record.file) as image:
                sizes.append(image.size)
                modes[image.mode] += 1
    if sizes:
        sizes.sort(key=math.prod)
        examples = {"smallest": sizes[0], "median": sizes[len(sizes) // 2], "largest": sizes[-1]}
        log("pixels: " + "  ".join(f"{name} {w}x{h}" for name, (w, h) in examples.items()), stamp=False)
        log("modes: " + ", ".join(f"{mode} {count}" for mode, count in modes.most_common()), stamp=False)


if __name__ == "__main__":
    sys.exit(main())
