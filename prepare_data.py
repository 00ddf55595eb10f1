"""Prepare images for training: OUT/{train,val,test}/<class>/*, and OUT/splits.csv, which can reproduce the split.

Downloads EuroSAT (27,000 Sentinel-2 tiles, 10 land cover classes, 94 MB), takes your own images with --source, or draws
a small demonstration set with --synthetic. Every image is decoded. OUT appears only when it is complete. The last line
on stdout, unless that is a terminal, is a JSON object with the counts.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import http.client
import io
import json
import lzma
import math
import operator
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image, ImageOps

from common import SPLITS
from common import ImageError, Progress, UserError
from common import atomic_write, command, fraction, hash_file, hash_images, hold_lock, is_image_name, log, make_parser
from common import name_errors, one_line, open_image, positive_int, print_json, read_content, read_image, reading
from common import seed_number, to_json_text, walk_folders, write_csv

# The address and checksum that torchvision's datasets.EuroSAT uses.
EUROSAT_URL = (
    "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip"
)
EUROSAT_MD5 = "c8fa014336c82ac7804f0398fcb19387"
REQUEST_FILE = ".prepared.json"  # in OUT: the request from which the tree was made
# Image formats that this program does not read.
OTHER_FORMATS = (".avif", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jp2", ".jpx", ".jxl", ".psd", ".tga")
# Headings of --labels. With two columns, that of the class may have another name.
PATH_HEADINGS = ("path", "file", "filename", "file_name", "filepath", "image", "image_id", "image_path", "id", "name")
CLASS_HEADINGS = ("class", "label", "category")
# An archive may unpack to this many times its size, or to UNPACK_MINIMUM bytes if that is more: images hardly compress.
UNPACK_RATIO, UNPACK_MINIMUM = 20, 1 << 30
MAX_UNDECLARED = 1 << 34  # bytes of a download whose length its server does not declare
SLOW_SECONDS = 60  # a download ends if it is slower than 1 KiB/s for so long


@dataclass(eq=False)
class Record:
    """An image of the source, or of the tree that exists at OUT; or, with a reason, another thing that is left out."""

    path: str  # inside the source or tree
    file: str  # the file on disk that has its content
    class_name: str = ""
    name: str = ""  # its file name in the tree, unique within class and split
    split: str | None = None  # train, val or test; None until it is assigned
    sha256: str = ""  # of the content; empty until the image is checked
    reason: str | None = None  # why it is left out; None if it is not
    in_tree: bool = False  # the tree at OUT already has the image
    group: str | None = None  # with --group-by: images with the same group are assigned to the same split


@dataclass
class Contents:
    """The files of a source."""

    # Path inside the source, and the file on disk that has its content.
    images: list[tuple[PurePosixPath, str]] = field(default_factory=list)
    folders: set[PurePosixPath] = field(default_factory=set)  # of an archive, those listed or with other files
    others: collections.Counter[str] = field(default_factory=collections.Counter)  # files not images, by extension
    unreadable: list[Record] = field(default_factory=list)  # folders, each with the reason


# ---------------------------------------------------------------- command line


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, check which options go together, and fill in the defaults that depend on others."""
    parser = make_parser("prepare_data.py", __doc__, "python prepare_data.py --source photos.zip --out data/photos")
    add = parser.add_argument_group("source (default: download EuroSAT)").add_argument
    source_help = (
        "a folder, zip or tar with a folder of images per class, perhaps inside other folders; if these are train/, "
        "val/ and test/, that split is kept (without val/, a part of train becomes val)"
    )
    add("--source", type=Path, metavar="PATH", help=source_help)
    url_help = "download a zip or tar from here (http, https, file) and keep it beside OUT; needs --sha256 or --md5"
    add("--url", help=f"{url_help}; an interrupted download is continued")
    add("--sha256", type=str.lower, metavar="SUM", help="checksum of the file at --url")
    add("--md5", type=str.lower, metavar="SUM", help="checksum of the file at --url")
    add("--synthetic", action="store_true", help="draw a demonstration set: 10 classes of textures of 64x64 pixels")
    per_class_help = "a random sample of N images per class (and split, if it is given); with --synthetic, draw N"
    add("--per-class", type=positive_int, metavar="N", help=f"{per_class_help} (default: all; with --synthetic 100)")
    labels_help = (
        "a CSV file with the columns path, class and perhaps split, in place of class folders; paths are relative to "
        "the source, and may lack folders at the beginning and the extension where the name stays unique"
    )
    add("--labels", type=Path, metavar="FILE", help=labels_help)
    on_bad_help = (
        "if images cannot be read, have two classes, are not in a class folder or not in --labels: end with an error, "
        "or leave them out and list them in OUT/rejected.csv (written when the tree changes)"
    )
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
    group_help = (
        "keep images together, such as those of a patient, a camera or a video: all for which this regular expression "
        "captures the same text in the path (inside the source), as in '(patient[0-9]+)'"
    )
    add("--group-by", type=group_pattern, metavar="REGEX", help=group_help)
    add("--seed", type=seed_number, default=0, metavar="N", help="of split, sample and drawn images")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.source, args.url, args.synthetic))) > 1:
        parser.error("--source, --url and --synthetic exclude each other")
    if [bool(args.url), bool(args.sha256) + bool(args.md5)] not in ([False, 0], [True, 1]):
        parser.error("--url needs a checksum, either --sha256 or --md5, and these need --url")
    if args.link == "hard" and (not args.source or args.source.is_file()):
        parser.error("--link hard is only for a --source folder; all other images are unpacked or drawn into OUT")
    if args.update and (args.force or args.per_class):
        parser.error("--update cannot be combined with --force or --per-class")
    if args.labels and args.synthetic:
        parser.error("--labels is for images that have no class folders; those of --synthetic have")
    if args.val + args.test >= 1:
        parser.error(f"--val {args.val} and --test {args.test} leave no images for training")
    args.out = args.out or Path("data/synthetic" if args.synthetic else "data/eurosat")
    if not (args.source or args.url or args.synthetic):
        args.url, args.md5 = EUROSAT_URL, EUROSAT_MD5
    return args


def group_pattern(text: str) -> re.Pattern:
    """Argparse type of --group-by: a regular expression with one group."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None
    if pattern.groups != 1:
        raise argparse.ArgumentTypeError(f"{text!r} needs one pair of parentheses, around what names the group")
    return pattern


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Prepare a tree of images."""
    args = parse_args(argv)
    out = args.out.resolve()
    staging, old, lock = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "old", "lock"))
    result = {"out": str(args.out), "changed": False, "dry_run": args.dry_run}
    request = describe_request(args)
    with contextlib.ExitStack() as stack:
        if args.dry_run:
            staging = Path(stack.enter_context(tempfile.TemporaryDirectory()), "tree")
        complete = not args.dry_run and is_complete(args.out, request, args.force, args.update)
        if not complete and (args.url or not args.dry_run):  # all others need no folder that can be written
            stack.enter_context(hold_lock(lock))
        if not complete and not args.dry_run:
            recover(out, staging, old)
            complete = is_complete(args.out, request, args.force, args.update)
        if complete:
            result |= summarize(read_splits_csv(out / "splits.csv")) | {"not_images": None, "rejected": None}
            print_json(result, f"{args.out} is complete, nothing to do")
            return
        source = args.source
        if args.url:
            source = download(args.url, "sha256" if args.sha256 else "md5", args.sha256 or args.md5, out)
        stack.callback(remove_tree, staging)
        stack.enter_context(name_errors(staging))
        staging.mkdir()
        (staging / REQUEST_FILE).touch()
        if args.synthetic:
            contents = draw_textures(staging / "files", args.per_class or 100, args.seed)
        else:
            contents = list_folder(source) if source.is_dir() else unpack(source, staging / "files")
        show_other_files(contents.others)
        if not contents.images:
            raise UserError(f"no images in {source}, with one of the usual extensions")
        tree = read_splits_csv(out / "splits.csv") if args.update and (out / "splits.csv").is_file() else []
        found = label_images(contents, args.labels, tree) if args.labels else find_classes(contents, source, tree)
        checked = check_images(found + contents.unreadable)
        rejected = reject_records(args, checked, tree)
        records = choose_records(args, checked, tree)
        if args.dry_run:
            show_images(records)
        elif not all(record.in_tree for record in records):
            build_tree(records, rejected, request, args.link, staging)
            replace_tree(staging, out, old)
            result["changed"] = True
        else:  # --update without new images: the next one is done at once
            write_request(out, request)
    result |= summarize(records) | {"not_images": contents.others.total(), "rejected": len(rejected)}
    show_counts(result["counts"])
    if rejected:
        where = "in rejected.csv" if result["changed"] else "above"
        log(f"left out {len(rejected)} file{'s' * (len(rejected) > 1)}, listed {where}")
    state = "not written, because of --dry-run" if args.dry_run else "written" if result["changed"] else "unchanged"
    print_json(result, f"{args.out}: {result['images']:,} images of {result['classes']} classes, {state}")


# ---------------------------------------------------------------- request, and the tree that exists


def recover(out: Path, staging: Path, old: Path) -> None:
    """Remove what a killed run left, or restore the old tree. Raises UserError for what is not of this program."""
    for folder in (staging, old):
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
        if folder.is_symlink() or (folder.exists() and not (folder / REQUEST_FILE).is_file()):
            raise UserError(f"{folder} is in the way, and not of this program; rename it, or choose another --out")
    if (old / "splits.csv").exists() and not out.exists():
        old.rename(out)
    remove_tree(staging)
    remove_tree(old)


def remove_tree(folder: Path) -> None:
    """Remove a tree, if it exists: first the list that makes it complete, and last the file by which it is known."""
    (folder / "splits.csv").unlink(missing_ok=True)
    for path in folder.iterdir() if folder.exists() else ():
        if path.name != REQUEST_FILE:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


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
    settings["group_by"] = args.group_by.pattern if args.group_by else None
    if args.labels and not args.labels.is_file():
        raise UserError(f"--labels {args.labels}: no such file")
    settings["labels"] = hash_file(args.labels) if args.labels else None
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
    changed = {"content": "the source has changed", "splits": "--splits has changed", "labels": "--labels has changed"}
    details = ", ".join(changed.get(key, f"{key} was {previous.get(key)}, is {request[key]}") for key in different)
    growing = {"source", "content", "labels"}  # what --update takes new images from
    if update:
        if fixed := [key for key in different if key not in {*growing, "on_bad"}]:
            raise UserError(f"--update keeps the settings of {out}, but {', '.join(fixed)} differ: {details}")
        return not growing & set(different)
    if different:
        advice = "choose another --out, or replace it with --force"
        if set(different) <= growing and not request["per_class"]:
            advice = f"add the new images with --update, {advice}"
        raise UserError(f"{out} exists, but was made from another request ({details}); {advice}")
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
                parts = PurePosixPath(place).parts
                inside = bool(parts) and place == "/".join(parts) and not {"..", "/"} & set(parts)
                inside = inside and not set("\0\\:" if os.name == "nt" else "\0") & set(place)
                if not inside or not is_class_name(class_name) or split not in SPLITS or not sha256:
                    raise ValueError("not a row that this program writes")
                record = Record(place, f"{path.parent}/{place}", class_name, parts[-1], split, sha256, in_tree=True)
                record.group = row.get("group")
                records.append(record)
    except (KeyError, ValueError, csv.Error):
        columns = "path,class,split,sha256"
        raise UserError(f"{path} is not a splits.csv of this program: expected the columns {columns}") from None
    return records


# ---------------------------------------------------------------- source -> files


def download(url: str, algorithm: str, checksum: str, out: Path) -> Path:
    """Download an archive beside OUT, unless it is there already. Raises UserError for a wrong checksum."""
    name = PurePosixPath(re.split("[?#]", url)[0]).name.lstrip(".") or "download"
    archive, partial = out.with_name(name), out.with_name(f"{name}.part")
    if out.name.casefold() in (archive.name.casefold(), partial.name.casefold()):
        raise UserError(f"--out {out} would be in the way of the download {archive}; choose another --out")
    advice = "download it elsewhere and pass it with --source FILE, or draw a demonstration set with --synthetic"
    if archive.exists():
        if hash_file(archive, algorithm) != checksum:
            advice = f"remove it to download it again, or use it with --source {archive}"
            raise UserError(f"{archive} exists, but its {algorithm} is not {checksum}: {advice}")
        log(f"using {archive}, which was downloaded before")
        return archive
    try:
        with name_errors(partial):
            is_whole = fetch(url, partial)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if partial.exists() and not partial.stat().st_size:
            partial.unlink()
        elif partial.exists():
            advice = f"run the same command again to continue, or {advice}"
        raise UserError(f"cannot download {url}: {one_line(error)}; {advice}") from None
    if (found := hash_file(partial, algorithm)) != checksum:
        result = "if the connection was cut, run the same command again to continue"
        if is_whole:
            result = "the download was removed"
            partial.unlink()
        raise UserError(f"{url} has {algorithm} {found}, not {checksum}: {result}; {advice}")
    partial.replace(archive)
    return archive


def fetch(url: str, path: Path) -> bool:
    """Download a file, or only the rest if a part of it is there. Returns whether it is known to be complete."""
    import urllib.error
    import urllib.request  # takes longer to import than everything that --help needs

    present = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={present}-"} if present else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the requested range is empty: the file is complete
            return True
        raise
    with response, open(path, "ab" if response.status == 206 else "wb") as file:  # 206: only the rest
        declared = response.headers.get("Content-Length")
        most = int(declared) if declared else MAX_UNDECLARED - file.tell()
        received, before, since = 0, 0, time.monotonic()
        with Progress(f"download {path.stem}", int(declared or 0) >> 10, "KiB", every=10) as progress:
            while block := response.read1(1 << 18):  # what has arrived
                received += len(block)
                if received > most:
                    raise OSError(f"the server sends more than {most} bytes")
                file.write(block)
                progress.update((received >> 10) - progress.done)
                if time.monotonic() - since > SLOW_SECONDS:
                    if received - before < 1024 * SLOW_SECONDS:
                        raise OSError(f"less than 1 KiB/s arrived for {SLOW_SECONDS} seconds")
                    since, before = time.monotonic(), received
    if received < int(declared or 0):
        raise OSError(f"the connection ended after {received} of {declared} bytes")
    return bool(declared) or not received


def list_folder(source: Path) -> Contents:
    """List the files of a source folder."""
    contents, errors = Contents(), []
    for root, names in walk_folders(source, errors.append):
        folder = PurePosixPath(Path(root).relative_to(source))
        images = [name for name in names if is_image_name(name)]
        contents.images += [(folder / name, os.path.join(root, name)) for name in images]
        contents.folders.add(folder)
        contents.others.update(PurePosixPath(name).suffix.lower() for name in names if not is_image_name(name))
    if errors and not contents.images:
        raise errors[0]
    contents.unreadable = [Record(os.path.relpath(e.filename, source), "", reason=e.strerror) for e in errors]
    return contents


def unpack(source: Path, folder: Path) -> Contents:
    """Unpack the images of a zip or tar into a folder, as numbered files: no entry can choose where it is written.

    Raises UserError for an archive that is damaged, has links or paths that lead out of it, or is far larger unpacked.
    """
    folder.mkdir()
    contents = Contents()
    room = max(UNPACK_MINIMUM, UNPACK_RATIO * source.stat().st_size)
    with explain_damage(source), Progress(f"unpack {source.name}", None, "files", every=10) as progress:
        for name, is_folder, size, open_entry in archive_entries(source):
            path = PurePosixPath(name)
            hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
            left_out = is_folder or hidden or not is_image_name(path.name)
            # The size is as declared: no more than that is ever read. Each entry takes some memory.
            room -= 1024 if left_out else max(size, 1024)
            if room < 0:
                advice = "if you trust it, unpack it yourself and pass the folder"
                raise UserError(f"{source} would unpack to more than {UNPACK_RATIO} times its size: refused; {advice}")
            if left_out:
                if not is_folder:
                    contents.others["" if hidden else path.suffix.lower()] += 1
                if not hidden:
                    contents.folders.add(path if is_folder else path.parent)
                continue
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
        return
    try:
        archive = tarfile.open(source, tarinfo=SmallTarInfo)
    except tarfile.ReadError:
        raise UserError(f"{source} is not a folder, zip or tar that can be read; is it damaged?") from None
    with archive:
        for info in archive:
            archive.members = []  # tarfile would remember them all
            check_entry(source, info.name, is_link=not (info.isreg() or info.isdir()))
            yield info.name, info.isdir(), info.size, functools.partial(archive.extractfile, info)
        # tarfile takes a damaged header for the end of the archive, after which there are only zeros.
        archive.fileobj.seek(archive.offset)
        while block := archive.fileobj.read(1 << 20):
            if block.strip(b"\0"):
                raise tarfile.ReadError("damaged header")


class SmallTarInfo(tarfile.TarInfo):
    """An entry of a tar, of which tarfile reads all but the content into memory: refused if that is large."""

    @classmethod
    def frombuf(cls, *args: object) -> tarfile.TarInfo:
        info = super().frombuf(*args)
        if info.type == tarfile.GNUTYPE_SPARSE or (info.type not in tarfile.REGULAR_TYPES and info.size > 1 << 20):
            raise ValueError("an entry is a sparse file, or its header takes more than 1 MiB")
        return info


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
    contents = Contents()
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


def find_classes(contents: Contents, source: Path | None, tree: list[Record]) -> list[Record]:
    """Return a record for each image. Its class is the first folder below those that most images share.

    If train/ is at that level and has class folders, the level is that of the split. An image outside the class folders
    and a class folder without images get a reason to be left out. Raises UserError for fewer than two classes, those of
    the tree that is updated included, or for classes that are called like splits.
    """
    all_parts = [path.parts for path, _ in contents.images]

    def below(level: int) -> list[tuple[str, ...]]:  # images in a folder at this level of their paths
        return [parts for parts in all_parts if len(parts) > level + 1]

    level, known = 0, {row.class_name for row in tree}
    while len(names := {parts[level] for parts in below(level)}) == 1 and 2 * len(below(level + 1)) > len(all_parts):
        if names & known:
            break
        level += 1
    is_split = any(len(parts) > level + 2 and parts[level] == "train" for parts in all_parts)
    level += is_split
    records = []
    for (path, file), parts in zip(contents.images, all_parts):
        record = Record(str(path), file)
        if is_split and parts[level - 1] not in SPLITS:
            record.reason = "not in train, val or test"
        elif len(parts) < level + 2:
            record.reason = "not in a class folder"
        else:
            record.split, record.class_name = parts[level - 1] if is_split else None, parts[level]
            record.name = "__".join(parts[level + 1 :])
        records.append(record)
    require_two_classes(records + tree, f"{source}, where <class>/<image> is expected (or a list of classes, --labels)")
    classes = {record.class_name for record in records}
    if names := sorted(classes & {*SPLITS, "valid", "validation"}):
        raise UserError(
            f"{', '.join(names)} in {source} would be classes; expected train/<class>/<image>, val/ and test/"
        )
    used = {parts[: level + 1] for parts in all_parts}
    parents = {parts[:level] for record, parts in zip(records, all_parts) if record.reason is None}
    for folder in sorted(contents.folders):
        if len(folder.parts) == level + 1 and folder.parts not in used and folder.parts[:level] in parents:
            records.append(Record(str(folder), "", reason="class folder without images"))
    return records


def require_two_classes(records: list[Record], where: str) -> None:
    """Raise UserError if the records have fewer than two classes."""
    classes = sorted({record.class_name for record in records if record.reason is None})
    if len(classes) < 2:
        found = f"one class, {classes[0]}," if classes else "no classes"
        raise UserError(f"found {found} in {where}; a classifier needs two or more")


def reject_taken_names(records: list[Record], keep_splits: bool) -> None:
    """Give a reason to each record whose file name in the tree is taken, ignoring case.

    Unless they keep the splits that they have, images of all splits need different names.
    """
    taken: dict[tuple, Record] = {}
    for record in records:
        if record.reason is None:
            key = record.split if keep_splits else None, record.class_name.casefold(), record.name.casefold()
            first = taken.setdefault(key, record)
            if first is not record:
                same = f"the same name in the tree as {first.path}, apart from upper and lower case"
                record.reason = f"it would have {same}; rename one of them"


def is_class_name(name: str) -> bool:
    """Return whether a class can have a folder of this name, which must not be hidden, or lead elsewhere."""
    return bool(name) and not name.startswith(".") and not any(separator in name for separator in "/\\\0")


class PathIndex:
    """Finds paths by their ends: the first folders and the extension may be left out."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths: set[str] = set()
        self.by_end: dict[str, list[str]] = collections.defaultdict(list)
        for path in paths:
            self.paths.add(path)
            *folders, name = PurePosixPath(path).parts
            for start in range(len(folders) + 1):
                for end in {name, PurePosixPath(name).stem}:
                    self.by_end["/".join((*folders[start:], end))].append(path)

    def find(self, name: str) -> list[str]:
        """Return the paths that a name fits; only one if it is a whole path."""
        name = str(PurePosixPath(name.replace("\\", "/")))
        return [name] if name in self.paths else self.by_end.get(name, [])


def label_images(contents: Contents, labels: Path, tree: list[Record]) -> list[Record]:
    """Return a record for each image, with the class, and perhaps the split, that a list gives it.

    Images that are not listed and names that fit no image get a reason to be left out. Raises UserError for a file that
    is not such a list, and for names that are listed twice or fit several images.
    """
    index, listed, missing, repeated = PathIndex(str(path) for path, _ in contents.images), {}, [], []
    for name, class_name, split in read_labels(labels):
        found = index.find(name)
        if not found:
            missing.append(Record(name, "", reason=f"listed in {labels.name}, but not in the source"))
        elif len(found) > 1 or found[0] in listed:
            repeated.append(name)
        else:
            listed[found[0]] = class_name, split
    if repeated:
        raise UserError(
            f"--labels {labels}: {len(repeated)} names are listed twice, or fit several images: {some(repeated)}; "
            "list each image once, with its folders if there are several of that name"
        )
    if not listed:
        example = f"the first name is {missing[0].path}, an image of the source is {contents.images[0][0]}"
        raise UserError(f"--labels {labels}: none of its {len(missing)} names fits an image of the source: {example}")
    records = []
    for path, file in contents.images:
        record = Record(str(path), file, reason=f"not listed in {labels.name}")
        if record.path in listed:
            record.class_name, record.split = listed[record.path]
            parts = path.parts[2:] if path.parts[0] in SPLITS and len(path.parts) > 2 else path.parts  # of a tree
            record.name, record.reason = "__".join(parts), None
        records.append(record)
    require_two_classes(records + tree, f"the lines of {labels} that fit an image of the source")
    return records + missing


def read_labels(file: Path) -> list[tuple[str, str, str | None]]:
    """Return (path, class, split or None) for each line of a list that has a class. Raises UserError for other files.

    Columns are separated by commas, semicolons or tabs. Without a heading they are path, class, and perhaps split.
    """
    try:
        # A spreadsheet program marks the beginning of the file. File names, but not classes, may have any bytes.
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        table = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [[cell.strip() for cell in row] for row in table if "".join(row).strip()]
    except csv.Error:
        raise UserError(f"--labels {file} is not a CSV file") from None
    heading = [cell.casefold() for cell in rows[0]] if rows else []
    while heading and not heading[-1]:  # an empty column on the right
        heading.pop()
    path, label, split = (
        next((heading.index(name) for name in names if name in heading), None)
        for names in (PATH_HEADINGS, CLASS_HEADINGS, ("split",))
    )
    if path is None or any(map(is_image_name, heading)):  # there is no heading
        path, label, split = 0, 1, 2
    else:
        if len(heading) == 2:
            label = 1 - path
        if label is None:
            wanted = ", ".join(CLASS_HEADINGS)
            raise UserError(f"--labels {file}: which column has the classes? Give it one of the headings {wanted}")
        rows = rows[1:]
    result = []
    for row in rows:
        name, class_name, part = (row[i] if i is not None and i < len(row) else "" for i in (path, label, split))
        if not class_name.isprintable():
            raise UserError(f"--labels {file} is not a CSV file in UTF-8; save it as such (CSV UTF-8)")
        if class_name and not is_class_name(class_name):
            raise UserError(f"--labels {file}: class {class_name!r} of {name} cannot be the name of a folder")
        if part not in ("", *SPLITS):
            raise UserError(f"--labels {file}: split {part!r} of {name} is not train, val or test")
        if name and class_name:
            result.append((name, class_name, part or None))
    if not result:
        raise UserError(f"--labels {file} has no lines with a path and a class")
    return result


def check_images(records: list[Record]) -> list[Record]:
    """Hash and decode all images, in threads. Returns each record with its sha256, or why it is left out."""
    chunks = [records[i : i + 20] for i in range(0, len(records), 20)]
    checked, ended = [], []

    def check_chunk(chunk: list[Record]) -> list[Record]:
        return [check_image(record) for record in chunk if not ended]

    with Progress("check", len(records), every=10) as progress, ThreadPoolExecutor(os.cpu_count()) as executor:
        try:
            for chunk in executor.map(check_chunk, chunks):
                checked += chunk
                progress.update(len(chunk))
        finally:
            ended.append(True)  # an interrupt waits only for the images that are being read
    return checked


def check_image(record: Record) -> Record:
    """Return a record with the sha256 of its file, or with the reason why the file cannot be read."""
    if record.reason is not None:
        return record
    try:
        content = read_content(record.file)
        with contextlib.ExitStack() as reading.scope:
            read_image(record.file, content=content)
    except ImageError as error:
        return replace(record, reason=error.reason)
    return replace(record, sha256=hashlib.sha256(content).hexdigest())


# ---------------------------------------------------------------- records -> splits


def reject_records(args: argparse.Namespace, checked: list[Record], tree: list[Record]) -> list[Record]:
    """Return the records that are left out, each with its reason; `tree` are those of the tree that is updated.

    Raises UserError if there are any, unless --on-bad skip or --dry-run is given; the latter shows them.
    """
    reject_contradictions(checked, tree)
    if args.group_by:
        set_groups(checked, args.group_by)
    reject_changes(checked, tree, args.out)
    usable = [record for record in checked if record.reason is None]
    reject_taken_names(usable, keep_splits=not args.splits and all(record.split for record in usable))
    rejected = [record for record in checked if record.reason is not None]
    first_class: dict[str, str] = {}  # of each content in two classes, because one side of a contradiction is enough
    shown = [r for r in rejected if not r.sha256 or first_class.setdefault(r.sha256, r.class_name) == r.class_name]
    texts = [f"{some(r.path for r in group)} ({reason})" for reason, group in group_by(shown, "reason").items()]
    if args.dry_run:
        for text in texts:
            log(f"left out: {text}", stamp=False)
    elif rejected and args.on_bad == "fail":
        advice = "correct that, or leave them out with --on-bad skip"
        raise UserError(f"problems with {len(rejected)} file{'s' * (len(rejected) > 1)}: {some(texts, 20)}; {advice}")
    elif rejected and args.update:  # without new images, no rejected.csv is written
        log(f"left out: {some(texts, 20)}")
    return rejected


def choose_records(args: argparse.Namespace, checked: list[Record], tree: list[Record]) -> list[Record]:
    """Return the records of the new tree, each with its split."""
    records = [record for record in checked if record.reason is None]
    if len(records) < len(checked):
        require_two_classes(records + tree, "the images that are not left out")
        if lost := sorted({record.class_name for record in checked} - {record.class_name for record in records} - {""}):
            log(f"warning: all images of these classes are left out: {', '.join(lost)}")
    if args.splits:
        assign_listed_splits(checked, args.splits)
    if args.per_class and not args.synthetic:
        records = sample(records, args.per_class, args.seed)
    if tree:
        found = {record.sha256 for record in checked}
        gone = sum(row.sha256 not in found for row in tree)
        known = {row.sha256 for row in tree}
        records = [record for record in records if record.sha256 not in known]
        if new := sorted({record.class_name for record in records} - {row.class_name for row in tree}):
            log(f"warning: classes that the tree does not have yet: {some(new)}")
        message = f"{len(tree)} images are in the tree, {len(records)} images of the source are new"
        log(message + (f"; {gone} are no longer in the source, and are kept" if gone else ""))
        records = tree + records
    if any(record.split is None for record in records) or not args.splits:
        assign_splits(records, args.val, args.test, args.seed)
    if not any(record.split == "train" for record in records):
        raise UserError("no images are left for training")
    contents = group_by(records, "sha256").values()
    if repeated := len(records) - len(contents):
        names = some(f"{group[1].path} = {group[0].path}" for group in contents if len(group) > 1)
        log(f"{repeated} images repeat the content of another one: {names}")
    warn_of_leaks("images", contents)
    if args.group_by:
        warn_of_leaks("groups", group_by(records, "group").values())
    return records


def warn_of_leaks(what: str, groups: Iterable[list[Record]]) -> None:
    """Log a warning if a source or list that is already split has parted images that belong together."""
    if leaked := sum(len({record.split for record in group}) > 1 for group in groups):
        log(f"warning: {leaked} {what} are in more than one split, so the measured accuracy will be too high")


def reject_contradictions(records: list[Record], tree: list[Record]) -> None:
    """Give a reason to all images whose content is also in another class, except those that are in the tree already."""
    settled = {(row.sha256, row.class_name) for row in tree}
    for group in group_by((record for record in records if record.reason is None), "sha256").values():
        for record in group:
            others = [other for other in group if other.class_name != record.class_name]
            if others and (record.sha256, record.class_name) not in settled:
                record.reason = "also in " + some((f"{other.path} as {other.class_name}" for other in others), 3)


def set_groups(records: list[Record], pattern: re.Pattern) -> None:
    """Set the group of each record; give a reason to those whose path does not match."""
    for record in records:
        match = pattern.search(record.path)
        record.group = match and match[1]
        if record.group is None and record.reason is None:
            record.reason = "its path does not match --group-by"


def reject_changes(records: list[Record], tree: list[Record], out: Path) -> None:
    """With --update: give a reason to images that the tree has in another class, or that have a name of the tree.

    Raises UserError if the tree has other images than when it was made.
    """
    hashes = hash_images([row.file for row in tree])
    if changed := [row.path for row, sha256 in zip(tree, hashes) if row.sha256 != sha256]:
        raise UserError(f"{len(changed)} images of {out} have changed ({some(changed, 1)}); make it again with --force")
    known = {row.sha256: row for row in tree}
    taken = {(row.class_name.casefold(), row.name.casefold()) for row in tree}
    for record in records:
        if record.reason is not None:
            continue
        row = known.get(record.sha256)
        if row and row.class_name != record.class_name:
            record.reason = f"in {out} its class is {row.class_name}; make the tree again with --force"
        elif not row and (record.class_name.casefold(), record.name.casefold()) in taken:
            record.reason = f"{out} has another image of this name; rename it, or make the tree again with --force"


def group_by(records: Iterable[Record], *names: str) -> dict[str | tuple, list[Record]]:
    """Group records by an attribute, or by the tuple of several."""
    groups, key = collections.defaultdict(list), operator.attrgetter(*names)
    for record in records:
        groups[key(record)].append(record)
    return groups


def some(items: Iterable[str], most: int = 5) -> str:
    """Join the first items for a message."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def assign_listed_splits(records: list[Record], splits: Path) -> None:
    """Set the split of each record from a splits.csv (by content), or from train.txt, val.txt, test.txt (by name).

    Raises UserError with counts and first names if list and source do not have the same images, apart from those that
    are left out.
    """
    missing, repeated = [], []
    for record in records:
        record.split = None  # the list replaces a split of the source
    if splits.is_file():
        unassigned = group_by(records, "sha256")
        left_out = {(record.class_name, record.name) for record in records if not record.sha256}
        for row in read_splits_csv(splits):
            if group := unassigned.get(row.sha256):
                record = next((record for record in group if record.name == row.name), group[0])
                record.split = row.split
                group.remove(record)
            elif (row.class_name, row.name) not in left_out:
                missing.append(row.path)
    else:
        by_path = {record.path: record for record in records}
        index = PathIndex(by_path)
        for record in records:  # the class may not be the folder above the image
            found = index.by_end[f"{record.class_name}/{PurePosixPath(record.path).name}"]
            found += [record.path] * (record.path not in found)
        for file in (splits / f"{part}.txt" for part in SPLITS):
            lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if file.is_file() else []
            for line in filter(None, map(str.strip, lines)):
                found = index.find("/".join(PurePosixPath(line).parts[-2:]))
                if not found:
                    missing.append(line)
                elif len(found) > 1 or by_path[found[0]].split:
                    repeated.append(line)
                else:
                    by_path[found[0]].split = file.stem
    unlisted = [record.path for record in records if record.split is None and record.reason is None]
    kinds = (missing, "names are not in the source"), (repeated, "names are listed twice, or fit several images")
    kinds += ((unlisted, "images of the source are not listed"),)
    if details := [f"{len(names)} {what} ({some(names, 3)})" for names, what in kinds if names]:
        raise UserError(f"--splits {splits} does not fit the source: {'; '.join(details)}")


def sample(records: list[Record], count: int, seed: int) -> list[Record]:
    """Return `count` random images of each class (and split, if they have one), all with different content."""
    chosen = []
    for members in group_by(records, "class_name", "split").values():
        contents = group_by(members, "sha256")
        chosen += [contents[sha256][0] for sha256 in shuffled(contents, seed)[:count]]
    return chosen


def shuffled(hashes: Iterable[str], seed: int | str) -> list[str]:
    """Return SHA-256 hashes in an order that depends only on them and the seed, not on names or order of the files."""
    return sorted(hashes, key=lambda sha256: hashlib.sha256(f"{seed}:{sha256}".encode()).digest())


def assign_splits(records: list[Record], val: float, test: float, seed: int) -> None:
    """Assign the records that have no split to train, val and test, in each class with these shares.

    Images that belong together, by content or --group-by, are assigned together, so that the shares are as near as that
    allows; single images give exact shares. The split depends only on content, groups, shares and seed, not on the
    names and order of the files. If some records already have a split (--update), the others bring each class as near
    to the shares as possible. If all have one, because the source is split, but none is val, val is taken from train.
    """
    shares = {"test": test, "val": val}
    if all(record.split for record in records):
        if not val or any(record.split == "val" or record.in_tree for record in records):
            log("every image already has a split, and keeps it")
            return
        records, shares = [record for record in records if record.split == "train"], {"val": val}
        for record in records:
            record.split = None
    sizes = collections.Counter(sorted(record.class_name for record in records))
    room = {part: {name: round(size * share) for name, size in sizes.items()} for part, share in shares.items()}
    small = collections.defaultdict(list)  # classes too small for splits, by the names of these splits
    for name, size in sizes.items():
        if sum(wanted[name] for wanted in room.values()) >= size:
            problem = f"--val {val} and --test {test} leave none of the {size} images of class {name} for train"
            raise UserError(f"{problem}; lower them, or add images")
        if short := [part for part, share in shares.items() if share and not room[part][name]]:
            small[" and ".join(short)].append(f"{name} ({size} image{'s' * (size > 1)})")
    for short, names in small.items():
        log(f"warning: too few images for {short}, where these classes will not be measured: {some(names)}")
    for record in records:
        if record.split in room:
            room[record.split][record.class_name] -= 1
    units = units_of(records)
    with_groups = any(record.group is not None for record in records)
    attempts = (distribute(units, room, sizes, f"{seed}/{n}" if n else str(seed)) for n in range(100 * with_groups + 1))
    parts, _ = min(attempts, key=operator.itemgetter(1))
    for sha256, unit in units.items():
        for record in unit:
            record.split = record.split or parts[sha256]
    if with_groups:
        report_groups(units, sizes, shares)


def distribute(
    units: dict[str, list[Record]], room: dict[str, dict[str, int]], sizes: dict[str, int], seed: str
) -> tuple[dict[str, str], float]:
    """Return the split of each unit, and how far the splits are from their shares, as a sum of fractions of classes.

    `room` is what each split still lacks in each class, `sizes` are the images of each class. In a random order, each
    unit goes to the first split that it brings nearer to its shares, or else to train.
    """
    room, parts = {part: dict(lacking) for part, lacking in room.items()}, {}
    for sha256 in shuffled(units, seed):
        counts = collections.Counter(record.class_name for record in units[sha256] if record.split is None)
        given = collections.Counter(record.split for record in units[sha256] if record.split)
        part = given.most_common(1)[0][0] if given else pick_split(counts, room, sizes)
        parts[sha256] = part
        for name in counts if part in room else ():
            room[part][name] -= counts[name]
    return parts, sum(abs(number) / sizes[name] for lacking in room.values() for name, number in lacking.items())


def units_of(records: list[Record]) -> dict[str, list[Record]]:
    """Return the sets of records that belong into one split, because content or group are equal, by a SHA-256 of each.

    Images of one group may be equal to images of another one, so that their groups are joined.
    """
    parents: dict[tuple, tuple] = {}

    def root(key: tuple) -> tuple:
        while parents.setdefault(key, key) != key:
            key = parents[key]
        return key

    for record in records:
        if record.group is not None:
            parents[root(("sha256", record.sha256))] = root(("group", record.group))
    units = collections.defaultdict(list)
    for record in records:
        units[root(("sha256", record.sha256))].append(record)
    return {min(record.sha256 for record in unit): unit for unit in units.values()}


def pick_split(counts: dict[str, int], room: dict[str, dict[str, int]], sizes: dict[str, int]) -> str:
    """Return the first split that images, of which `counts` are in each class, bring nearer to its shares, or train."""
    for part, lacking in room.items():
        if sum((abs(lacking[name] - n) - abs(lacking[name])) / sizes[name] for name, n in counts.items()) < 0:
            return part
    return "train"


def report_groups(units: dict[str, list[Record]], sizes: dict[str, int], shares: dict[str, float]) -> None:
    """Log how near to the shares the splits are, and which groups are too large for a split.

    Raises UserError if a class has no images for train, or a split has no images.
    """
    total, largest = sum(sizes.values()), max(units.values(), key=len)
    log(f"{len(units)} groups; the largest ({largest[0].group}) has {len(largest)} of {total} images")
    members = {part: collections.Counter() for part in SPLITS}
    for record in chain.from_iterable(units.values()):
        members[record.split][record.class_name] += 1
    for part, share in shares.items():
        found = {name: members[part][name] / size for name, size in sizes.items()}
        name = max(found, key=lambda name: abs(found[name] - share))
        text = f"{part} has {members[part].total() / total:.1%} of the images, for {share:.1%}"
        log(f"{text}; furthest from it is class {name} with {found[name]:.1%}")
        if large := [unit[0].group for unit in units.values() if len(unit) > share * total > 0]:
            log(f"warning: groups that are larger than the share of {part}: {some(map(str, large))}")
        if share and not members[part]:
            raise UserError(f"every group is too large for {part}: raise --{part}, or leave it out with --{part} 0")
    if absent := [name for name in sizes if not members["train"][name]]:
        raise UserError(f"no group is left for train in class {some(absent)}; lower --val and --test, or change --seed")


# ---------------------------------------------------------------- splits -> tree


def build_tree(records: list[Record], rejected: list[Record], request: dict, link: str, staging: Path) -> None:
    """Build the tree in `staging`: move unpacked files, link those of the old tree, copy or link those of a folder."""
    paths = [f"{record.split}/{record.class_name}/{record.name}" for record in records]
    if doubled := [path for path, count in collections.Counter(paths).items() if count > 1]:
        raise UserError(f"several images would have the same name in the tree: {some(doubled)}; rename them")
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
    header = ["path", "class", "split", "sha256"] + ["group"] * any(record.group is not None for record in records)
    cells = ((path, r.class_name, r.split, r.sha256, r.group) for r, path in zip(records, paths))
    write_csv(staging / "splits.csv", header, sorted((row[: len(header)] for row in cells), key=operator.itemgetter(0)))
    if rejected:
        write_csv(staging / "rejected.csv", ["path", "reason"], [(record.path, record.reason) for record in rejected])
    write_request(staging, request)


def write_request(tree: Path, request: dict) -> None:
    """Write the request from which a tree was made, or to which it was updated."""
    with atomic_write(tree / REQUEST_FILE) as file:
        file.write(to_json_text(request))


def link_file(source: str, target: str, or_copy: bool) -> None:
    """Make a hard link. If that is not possible, copy the file, or raise UserError."""
    try:
        os.link(os.path.realpath(source), target)  # of a link, its target: a relative link would lead nowhere
    except OSError as error:
        if not or_copy:
            raise UserError(f"--link hard: cannot link {source}: {error.strerror}; use --link copy") from None
        shutil.copyfile(source, target)


def replace_tree(staging: Path, out: Path, old: Path) -> None:
    """Rename the complete tree to OUT, after the old one is moved away. If the run is killed, `recover` cleans up."""
    if hasattr(os, "sync"):
        os.sync()  # the names must not reach the disk before the contents
    if out.exists():
        if (out / "splits.csv").exists():
            (out / REQUEST_FILE).touch()  # which trees of early versions lack
        out.rename(old)
    staging.rename(out)
    remove_tree(old)


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


def show_images(records: list[Record]) -> None:
    """Show the sizes in pixels and modes of the new images on stderr."""
    sizes, modes = [], collections.Counter()
    for record in records:
        if not record.in_tree:
            with open_image(record.file) as image:
                sizes.append(image.size)
                modes[image.mode] += 1
    if sizes:
        sizes.sort(key=math.prod)
        examples = {"smallest": sizes[0], "median": sizes[len(sizes) // 2], "largest": sizes[-1]}
        log("pixels: " + "  ".join(f"{name} {w}x{h}" for name, (w, h) in examples.items()), stamp=False)
        log("modes: " + ", ".join(f"{mode} {count}" for mode, count in modes.most_common()), stamp=False)


def show_other_files(others: collections.Counter[str]) -> None:
    """Show on stderr how many files of the source are not images, and what to do about images of other formats."""
    formats = {extension: others[extension] for extension in OTHER_FORMATS if others[extension]}
    if formats:
        names = ", ".join(f"{count} {extension}" for extension, count in formats.items())
        example = f"with ImageMagick: magick mogrify -format jpg *{next(iter(formats))}"
        log(f"left out files of other formats: {names}; convert them to JPEG or PNG, {example}")
    if count := others.total() - sum(formats.values()):
        log(f"left out {count} file{'s' * (count > 1)} without an image extension")


if __name__ == "__main__":
    sys.exit(main())
