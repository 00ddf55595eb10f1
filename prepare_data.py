"""Lay out a set of images for training: OUT/{train,val,test}/<class>/*, and OUT/splits.csv that reproduces the split.

Downloads EuroSAT (27,000 Sentinel-2 tiles, 10 land-cover classes, 94 MB), or takes your own images with --source, or draws
a small demonstration set with --synthetic. Every image is decoded. OUT appears only when it is complete. The last line on
stdout is one JSON object with the counts.
"""
from __future__ import annotations

import collections
import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import lzma
import math
import multiprocessing
import os
import random
import shutil
import signal
import stat
import sys
import tarfile
import threading
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath

from PIL import Image, ImageDraw, ImageFilter, ImageOps

from common import (SPLITS, ImageError, Progress, UserError, command, file_hash, fraction, is_image_name, locked, log,
                    make_parser, one_line, positive_int, read_image, replacing, seed_number, walk)

# The address and checksum that torchvision's datasets.EuroSAT uses.
EUROSAT_URL = "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip"
EUROSAT_MD5 = "c8fa014336c82ac7804f0398fcb19387"
REQUEST_FILE = ".prepared.json"  # in OUT: the request that made it
# An archive may unpack to this many times its own size; below the floor, to anything. Images hardly compress.
UNPACK_RATIO, UNPACK_FLOOR = 20, 1 << 30


def parse_args(argv):
    parser = make_parser("prepare_data.py", __doc__, "python prepare_data.py --source photos.zip --out data/photos")
    group = parser.add_argument_group("source (default: download EuroSAT)")
    group.add_argument("--source", type=Path, metavar="PATH",
                       help="a folder, zip or tar of class folders of images; wrapping folders are looked through, and "
                            "folders train/, val/, test/ of class folders are kept as they are")
    group.add_argument("--url", help="download a zip or tar from here (http, https, file); needs --sha256 or --md5. It is kept "
                                     "beside OUT, and an interrupted download goes on where it stopped")
    group.add_argument("--sha256", type=str.lower, metavar="SUM", help="checksum of what --url gives")
    group.add_argument("--md5", type=str.lower, metavar="SUM", help="likewise")
    group.add_argument("--synthetic", action="store_true",
                       help="draw a demonstration set: 10 classes of 64x64 tiles that look a little like land cover; needs "
                            "no network, and says nothing about real images")
    group.add_argument("--per-class", type=positive_int, metavar="N",
                       help="take a sample of N images of each class before splitting (of each class and split, where the "
                            "split is given); with --synthetic, draw N (default: all; with --synthetic 100)")
    group.add_argument("--on-bad", choices=("fail", "skip"), default="fail",
                       help="an image that cannot be read: end, naming it, or leave it out and list it in OUT/rejected.csv")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR",
                       help="the tree to make (default: data/eurosat, with --synthetic data/synthetic)")
    group.add_argument("--force", action="store_true",
                       help="replace the tree at OUT; the old one stands until the new one is complete")
    group.add_argument("--update", action="store_true",
                       help="add what is new in the source to the tree at OUT; every image there keeps its split")
    group.add_argument("--link", choices=("copy", "hard"), default="copy",
                       help="hard: images in OUT are the very files of a source folder on the same file system, so a change of "
                            "one is a change of both")
    group.add_argument("--dry-run", action="store_true", help="show what would be made, and make nothing")
    group = parser.add_argument_group("split")
    group.add_argument("--val", type=fraction, default=0.1, metavar="SHARE",
                       help="share of each class for choosing epochs and settings; 0: no val/")
    group.add_argument("--test", type=fraction, default=0.2, metavar="SHARE",
                       help="share of each class for the final measurement; 0: no test/")
    group.add_argument("--splits", type=Path, metavar="PATH",
                       help="a split made before: a splits.csv of this program, or a folder with train.txt, test.txt and "
                            "perhaps val.txt that name files, one a line, with or without class folder")
    group.add_argument("--seed", type=seed_number, default=0, metavar="N", help="of the split and of all drawing")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.source, args.url, args.synthetic))) > 1:
        parser.error("--source, --url and --synthetic exclude each other")
    if bool(args.url) != bool(args.sha256 or args.md5):
        parser.error("--url and a checksum (--sha256 or --md5) need each other")
    if args.link == "hard" and (not args.source or args.source.is_file()):
        parser.error("--link hard is for the files of a --source folder; others are unpacked or drawn into the tree itself")
    if args.update and (args.force or args.per_class):
        parser.error("--update excludes --force and --per-class")
    if args.val + args.test >= 1:
        parser.error(f"--val {args.val} and --test {args.test} leave nothing to train on")
    args.out = args.out or Path("data/synthetic" if args.synthetic else "data/eurosat")
    if not (args.source or args.url or args.synthetic):
        args.url, args.md5 = EUROSAT_URL, EUROSAT_MD5
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    out = args.out.resolve()
    staging, old, lock = (out.with_name(f".{out.name}.{what}") for what in ("partial", "old", "lock"))  # all beside OUT
    with made_parents(out), locked(lock):
        recover(out, staging, old)
        request = describe_request(args)
        if not args.dry_run and is_done(args, out, request):
            log(f"{args.out} is complete, nothing to do")
            print(json.dumps({"out": str(args.out), "changed": False, "dry_run": False,
                              **summary(read_splits_csv(out / "splits.csv")), "not_images": None, "rejected": None}))
            return
        source = args.source if args.source or args.synthetic else download(args, out.parent)
        try:
            staging.mkdir()
            records, others = gather(args, source, staging / "files")
            bad = check(records, source, args.dry_run)
            records = choose(args, out, records, bad)
            changed = not args.dry_run and not all("kept" in record for record in records)
            if args.dry_run:
                show_dry_run(records, bad)
            elif changed:
                lay_out(records, bad, request, args.link, staging)
                replace_tree(staging, out, old)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    report = summary(records)
    show_counts(report["counts"])
    for count, what in ((others, "files that are not images (by their extension)"), (len(bad), "images that cannot be read")):
        if count:
            log(f"left out {count} {what}")
    print(json.dumps({"out": str(args.out), "changed": changed, "dry_run": args.dry_run, **report,
                      "not_images": others, "rejected": len(bad)}))


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


# ---------------------------------------------------------------- what is asked for, and what is there

def recover(out: Path, staging: Path, old: Path):
    """Clear what a killed run has left beside OUT; if it died between moving the old tree out and the new one in, undo that."""
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(staging, ignore_errors=True)
    discard(old, staging)


def discard(old: Path, staging: Path):
    """Remove the tree that was replaced, under the other name, so that what bears the name `old` is whole at any moment."""
    if old.exists():
        old.rename(staging)
        shutil.rmtree(staging, ignore_errors=True)


def describe_request(args) -> dict:
    """All that shapes the tree, as plain values, with a digest of the source by names, sizes and times."""
    if args.source:
        if not args.source.exists():
            raise UserError(f"no such file or folder: {args.source}")
        source, out = args.source.resolve(), args.out.resolve()
        if out == source or out in source.parents or source in out.parents:
            raise UserError(f"--source {args.source} and --out {args.out} lie within each other; choose another --out")
        files = [args.source]
        if args.source.is_dir():
            files = [Path(root, name) for root, names in walk(args.source) for name in names]
        looks = [(f, f.stat() if f.exists() else f.lstat()) for f in files]  # a link may lead nowhere
        stats = "".join(f"{os.fsencode(f)!r} {look.st_size} {look.st_mtime_ns}\n" for f, look in looks)
        content = hashlib.sha256(stats.encode()).hexdigest()
    else:
        source, content = args.url or "synthetic", args.sha256 or args.md5
    listed = None
    if args.splits:
        files = [args.splits] if args.splits.is_file() else [args.splits / f"{part}.txt" for part in SPLITS]
        if not all(file.is_file() for file in files if file.stem != "val"):
            raise UserError(f"--splits {args.splits}: expected a splits.csv, or a folder of train.txt, test.txt, val.txt")
        listed = [file_hash(file) for file in files if file.is_file()]
    return {"source": str(source), "content": content, "val": args.val, "test": args.test, "seed": args.seed, "splits": listed,
            "per_class": args.per_class, "on_bad": args.on_bad}


def is_done(args, out: Path, request: dict) -> bool:
    """Whether OUT is what is asked for. Raises UserError where it is something else that must not be replaced."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    if not (out / "splits.csv").is_file():
        raise UserError(f"{args.out} exists, and is no tree of this program (it has no splits.csv); choose another --out")
    if args.force:
        return False
    try:
        before = dict(json.loads((out / REQUEST_FILE).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        before = {}
    different = [key for key in request if before.get(key) != request[key]]
    told = ", ".join(f"{key} was {before.get(key)}, is {request[key]}" for key in different if key not in ("content", "splits"))
    told += ", the list of --splits differs" if "splits" in different else ""
    if args.update:
        if fixed := [key for key in different if key not in ("source", "content", "on_bad")]:
            raise UserError(f"--update keeps the settings of {args.out}, but {', '.join(fixed)} differ: {told.strip(', ')}")
        return not {"source", "content"} & set(different)
    if different:
        hint = "add what is new with --update, or " if set(different) <= {"source", "content"} else ""
        raise UserError(f"{args.out} exists, from another request ({told.strip(', ') or 'the source has changed since'}); "
                        f"{hint}choose another --out, or replace it with --force")
    if gone := [row["path"] for row in read_splits_csv(out / "splits.csv") if not (out / row["path"]).exists()]:
        raise UserError(f"{len(gone)} images of {args.out} are gone, such as {gone[0]}; make it anew with --force")
    return True


def read_splits_csv(path: Path) -> list[dict]:
    """The rows of a splits.csv; raises UserError for a file that is none."""
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        if all(row["split"] in SPLITS and row["sha256"] and row["class"] not in (None, "", "..") and "/" not in row["class"]
               and row["path"] and ".." not in PurePosixPath(row["path"]).parts for row in rows):
            return rows
    except (KeyError, csv.Error):
        pass
    raise UserError(f"{path} is no splits.csv of this program: expected the columns path,class,split,sha256")


# ---------------------------------------------------------------- source -> files on disk

def download(args, folder: Path) -> Path:
    """Download --url into the folder unless it is there already; what has the wrong checksum is never unpacked.

    What a broken connection has left goes on from there, where the server allows ranges.
    """
    import http.client
    import urllib.error
    import urllib.parse
    import urllib.request  # these take longer than all that --help needs
    algorithm, wanted = ("sha256", args.sha256) if args.sha256 else ("md5", args.md5)
    archive = folder / (PurePosixPath(urllib.parse.urlsplit(args.url).path).name or "download")
    way_out = "download it elsewhere and pass it with --source FILE, or draw a demonstration set with --synthetic"
    if archive.exists():
        if file_hash(archive, algorithm) == wanted:
            log(f"using {archive}, downloaded before")
            return archive
        raise UserError(f"{archive} is there, but its {algorithm} is not {wanted}: remove it to download it again, or use it "
                        f"with --source {archive}")
    part = archive.with_name(f"{archive.name}.part")
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(args.url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            have = have if response.status == 206 else 0  # a server without ranges, or a file: from the beginning
            total = have + int(response.headers.get("Content-Length") or 0)
            progress = Progress(f"download {archive.name}", total >> 10, "KiB", 10)
            with open(part, "ab" if have else "wb") as file, progress:
                progress.update(have >> 10)
                while block := response.read(1 << 18):
                    file.write(block)
                    progress.update(len(block) >> 10)
        if part.stat().st_size < total:
            raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes; the same command goes on there")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 416:  # nothing is left to fetch of it
            pass
        else:
            if part.exists() and not part.stat().st_size:
                part.unlink()
            raise UserError(f"cannot download {args.url}: {one_line(error)}; {way_out}") from None
    if (found := file_hash(part, algorithm)) != wanted:
        part.unlink()
        raise UserError(f"{args.url} has {algorithm} {found}, not {wanted}: what was downloaded is removed; {way_out}")
    part.replace(archive)
    return archive


def gather(args, source: Path | None, folder: Path) -> tuple[list[dict], int]:
    """The images of the source, or drawn ones, as records on disk; and the number of its other files."""
    if source is None:
        return classify(draw_synthetic(folder, args.per_class or 100, args.seed), set(), "--synthetic"), 0
    files, folders, others = unpack(source, folder)
    return classify(files, folders, str(source)), others


def unpack(source: Path, folder: Path) -> tuple[list[tuple], set[PurePosixPath], int]:
    """The images of a folder or archive, all its folders, and a count of other files.

    An image is (path within the source, file to read, None); or, in a zip, (path, file to extract to, number of its entry),
    for `check` to extract in parallel. Extracted files have plain names in `folder`, so that nothing in an archive can name
    a place outside. Raises UserError for an archive that is damaged, holds links or paths that climb out, or unpacks to
    far more than it weighs.
    """
    files, folders, others = [], set(), 0
    if source.is_dir():
        for root, names in walk(source):
            folders.add(PurePosixPath(Path(root).relative_to(source)))
            images = [name for name in names if is_image_name(name)]
            files += [(PurePosixPath(Path(root, name).relative_to(source)), os.path.join(root, name), None) for name in images]
            others += len(names) - len(images)
        return files, folders, others
    folder.mkdir()
    room = max(UNPACK_FLOOR, UNPACK_RATIO * source.stat().st_size)
    with damage_is_named(source), Progress(f"read {source.name}", None, "files", every=10) as progress:
        for number, (name, is_folder, size, stream) in enumerate(archive_members(source)):
            path = PurePosixPath(name)
            hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
            if not hidden and (is_folder or not is_image_name(path.name)):
                folders.add(path if is_folder else path.parent)
            if is_folder or hidden or not is_image_name(path.name):
                others += not is_folder
                continue
            room -= size  # as declared: more than that is never read
            if room < 0:
                raise UserError(f"{source} unpacks to more than {UNPACK_RATIO} times its size: refused; if you trust it, "
                                "unpack it yourself and pass the folder")
            target = f"{folder}{os.sep}{len(files)}{path.suffix}"
            if stream:
                with stream, open(target, "wb") as file:
                    shutil.copyfileobj(stream, file)
            files.append((path, target, None if stream else number))
            progress.update(1)
    return files, folders, others


@contextlib.contextmanager
def damage_is_named(archive):
    """Turn what the decoders of archives raise on damaged data into a UserError that names the archive."""
    try:
        yield
    except OSError as error:
        if error.errno:  # a full disk, say; bzip2 raises an OSError without a number for damaged data
            raise
        raise UserError(f"cannot unpack {archive}: {one_line(error)}; is it damaged?") from None
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
            ValueError) as error:
        raise UserError(f"cannot unpack {archive}: {one_line(error) or type(error).__name__}; is it damaged?") from None


def archive_members(source: Path):
    """Yield (name, whether it is a folder, size, open stream or None) of what is in a tar, or in a zip (without stream).

    Raises UserError for links and for names that climb out.
    """
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                name = member.filename
                if not member.flag_bits & 0x800:  # old code page by the letter of the format, UTF-8 as many programs write it
                    with contextlib.suppress(UnicodeError):
                        name = name.encode("cp437").decode("utf-8")
                check_member(source, name, link=member.external_attr >> 28 == 0o12)
                yield name, member.is_dir(), member.file_size, None
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            for member in archive:
                check_member(source, member.name, link=not (member.isreg() or member.isdir()))
                yield member.name, member.isdir(), member.size, archive.extractfile(member)
            archive.fileobj.seek(archive.offset)  # tarfile takes a broken header for the end, and would lose what follows
            while block := archive.fileobj.read(1 << 20):
                if block.strip(b"\0"):
                    raise tarfile.ReadError("a broken header")
    else:
        raise UserError(f"{source} is no folder, zip or tar that can be read; is it damaged?")


def check_member(source: Path, name: str, link: bool):
    if link:
        raise UserError(f"{source}: entry {name!r} is a link or a special file; refused")
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
        raise UserError(f"{source}: entry {name!r} climbs out of the archive; refused")


# ---------------------------------------------------------------- files -> records: class, name, content

def classify(files: list[tuple], folders: set[PurePosixPath], source: str) -> list[dict]:
    """Find the class of each file: its first folder below those that wrap all. train/, val/, test/ in that place are kept.

    Returns records with class, name (unique within its class and split), file, member (number of its entry, if it is in a
    zip) and split (None: to be assigned). Raises UserError for no images or one class, an image outside the class folders,
    a class folder without images, and for names that would collide.
    """
    if not files:
        raise UserError(f"no images in {source}; expected <class>/<image> with one of the usual extensions")
    parts, depth = [path.parts for path, *_ in files], 0
    while len({p[depth] for p in parts}) == 1 and all(len(p) > depth + 2 for p in parts):
        depth += 1
    first = {p[depth] for p in parts}
    given = "train" in first and first <= set(SPLITS) and all(len(p) > depth + 2 for p in parts)
    depth += given
    used = {p[:depth + 1] for p in parts if len(p) > depth + 1}
    records, seen = [], set()
    for (path, file, member), p in zip(files, parts):
        if len(p) < depth + 2:
            raise UserError(f"{path} in {source} is in no class folder; expected <class>/<image>")
        record = {"class": p[depth], "name": "__".join(p[depth + 1:]), "file": file, "path": str(path),
                  "member": member, "split": p[depth - 1] if given else None}
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


def check(records: list[dict], archive: Path | None, describe: bool = False) -> list[dict]:
    """Decode and hash every file, in parallel, extracting those that are in a zip; adds sha256, and with `describe` size and
    mode. Returns those that cannot be read, with a reason."""
    chunks = [records[i:i + 200] for i in range(0, len(records), 200)]
    with contextlib.ExitStack() as stack:
        run = map  # in this process, where starting others takes longer than the work
        if len(chunks) > 5:
            spawn = multiprocessing.get_context("spawn")
            run = stack.enter_context(ProcessPoolExecutor(mp_context=spawn, initializer=follow)).map
        progress = stack.enter_context(Progress("check", len(records), every=10))
        stamp = archive.stat().st_mtime_ns if archive else 0
        look = functools.partial(check_files, archive=archive and (str(archive), stamp), describe=describe)
        try:
            for chunk, results in zip(chunks, run(look, [[(r["file"], r["member"]) for r in chunk] for chunk in chunks])):
                for record, result in zip(chunk, results):
                    record.update(result)
                progress.update(len(chunk))
        except BrokenProcessPool:
            raise UserError("a process that checks images was killed, perhaps for want of memory; run it again") from None
    open_zip.cache_clear()
    return [record for record in records if "reason" in record]


def follow():
    """In a process that checks images: leave it to the one that started it to answer signals, and end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def check_files(files: list[tuple[str, int | None]], archive: tuple | None, describe: bool) -> list[dict]:
    """For each (file, number of its entry in the zip, or None) its sha256 and, where it is no image, the reason."""
    results = []
    for file, member in files:
        if member is None:
            try:
                if not stat.S_ISREG(os.stat(file).st_mode):  # a named pipe would be waited for for ever
                    raise OSError(errno.EINVAL, "not a regular file")
                content = Path(file).read_bytes()
            except OSError as error:
                results.append({"sha256": None, "reason": error.strerror})
                continue
        else:
            with damage_is_named(archive[0]):
                zipped = open_zip(*archive)
                content = zipped.read(zipped.infolist()[member])
            Path(file).write_bytes(content)
        result = {"sha256": hashlib.sha256(content).hexdigest()}
        try:
            read_image(file, content)
            if describe:
                with Image.open(io.BytesIO(content)) as image:
                    result |= {"size": image.size, "mode": image.mode}
        except ImageError as error:
            result["reason"] = error.reason
        results.append(result)
    return results


@functools.lru_cache(maxsize=1)
def open_zip(path: str, stamp: int) -> zipfile.ZipFile:
    """An archive opened once per process: reading the table of a large one takes a while."""
    return zipfile.ZipFile(path)


# ---------------------------------------------------------------- records -> splits

def choose(args, out: Path, records: list[dict], bad: list[dict]) -> list[dict]:
    """The records that make the tree, each with its split. Raises UserError for bad images unless they may be skipped, and
    for content that stands under two classes."""
    if bad and args.on_bad == "fail" and not args.dry_run:
        raise UserError(f"{len(bad)} of {len(records)} images cannot be read: "
                        + some(f"{r['path']} ({r['reason']})" for r in bad)
                        + "; repair or remove them, or leave them out with --on-bad skip")
    records = [record for record in records if "reason" not in record]
    if torn := [group for group in by_content(records).values() if len({r["class"] for r in group}) > 1]:
        raise UserError(f"equal content under two classes ({len(torn)} times): "
                        + some(" and ".join(r["path"] for r in group) for group in torn) + "; remove one of them")
    if args.splits:
        follow_list(records, args.splits)
    if args.per_class and not args.synthetic:
        records = sample(records, args.per_class, args.seed)
    if args.update and (out / "splits.csv").is_file():
        records = merge(records, out)
    if any(record["split"] is None for record in records) or not args.splits:
        split(records, args.val, args.test, args.seed)
    contents = by_content(records)
    if not any(record["split"] == "train" for record in records):
        raise UserError("nothing is left to train on")
    if doubled := len(records) - len(contents):
        log(f"{doubled} images repeat the content of another; the program gives equal images to the same split")
    if leaked := sum(len({r["split"] for r in group}) > 1 for group in contents.values()):
        log(f"warning: {leaked} images stand in more than one split of the source or list: the measurement is too good")
    return records


def some(items, most: int = 5) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")


def follow_list(records: list[dict], splits: Path):
    """Give every record the split that a splits.csv (by content) or train.txt, val.txt, test.txt (by name) has for it.

    Raises UserError with the counts and first names where list and source are not the same set.
    """
    missing, doubled = [], []
    if splits.is_file():
        waiting = by_content(records)
        for row in read_splits_csv(splits):
            group = waiting.get(row["sha256"], [])
            same_name = [record for record in group if record["name"] == PurePosixPath(row["path"]).name]
            if not group:
                missing.append(row["path"])
            else:
                record = (same_name or group)[0]
                record["split"], record["listed"] = row["split"], True
                group.remove(record)
    else:
        by_name = collections.defaultdict(list)
        for record in records:
            name = PurePosixPath(record["path"]).name
            by_name[name].append(record)
            by_name[f"{record['class']}/{name}"].append(record)
        for part in SPLITS:
            file = splits / f"{part}.txt"
            lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if file.is_file() else []
            for name in filter(None, map(str.strip, lines)):
                found = by_name.get("/".join(PurePosixPath(name).parts[-2:]), [])
                if not found:
                    missing.append(name)
                elif len(found) > 1 or "listed" in found[0]:
                    doubled.append(name)
                else:
                    found[0]["split"], found[0]["listed"] = part, True
    unlisted = [record["path"] for record in records if "listed" not in record]
    kinds = (missing, "are not in the source"), (doubled, "are doubled"), (unlisted, "of the source are in no list")
    if problems := [f"{len(names)} names {what} ({some(names, 3)})" for names, what in kinds if names]:
        raise UserError(f"--splits {splits} does not fit the source: {'; '.join(problems)}")


def merge(records: list[dict], out: Path) -> list[dict]:
    """The images of the tree at OUT, with their splits, and those of the source whose content it does not know."""
    rows = read_splits_csv(out / "splits.csv")
    known = {row["sha256"]: row for row in rows}
    if moved := [r["path"] for r in records if r["sha256"] in known and known[r["sha256"]]["class"] != r["class"]]:
        raise UserError(f"{len(moved)} images have another class than in {out}: {some(moved)}; make the tree anew with --force")
    new = [record for record in records if record["sha256"] not in known]
    taken = {(row["class"].casefold(), PurePosixPath(row["path"]).name.casefold()) for row in rows}
    if changed := [r["path"] for r in new if (r["class"].casefold(), r["name"].casefold()) in taken]:
        raise UserError(f"{len(changed)} images have the name of one in {out}, but other content: {some(changed)}; rename "
                        "them, or make the tree anew with --force")
    found = {record["sha256"] for record in records}
    gone = sum(row["sha256"] not in found for row in rows)
    log(f"{len(rows)} images in the tree, {len(new)} new ones in the source"
        + (f"; {gone} are no longer in the source, and are kept" if gone else ""))
    return [{"class": row["class"], "split": row["split"], "sha256": row["sha256"], "file": str(out / row["path"]),
             "name": PurePosixPath(row["path"]).name, "path": row["path"], "kept": True} for row in rows] + new


def shuffled(contents, seed: int) -> list[str]:
    """SHA-256 sums in an order that depends on themselves and the seed alone, not on any file's name or place."""
    return sorted(contents, key=lambda content: hashlib.sha256(f"{seed}:{content}".encode()).digest())


def by_content(records: list[dict]) -> dict[str, list[dict]]:
    """{sha256: records}."""
    groups = collections.defaultdict(list)
    for record in records:
        groups[record["sha256"]].append(record)
    return groups


def sample(records: list[dict], count: int, seed: int) -> list[dict]:
    """`count` images of each class, or of each class and split of a split source, no two with equal content."""
    groups = collections.defaultdict(list)
    for record in records:
        groups[record["class"], str(record["split"])].append(record)
    chosen = []
    for _, members in sorted(groups.items()):
        contents = by_content(members)
        chosen += [contents[sha256][0] for sha256 in shuffled(contents, seed)[:count]]
    return chosen


def split(records: list[dict], val: float, test: float, seed: int):
    """Assign records without a split to train, val, test, class by class and exact to the image; equal content stays together.

    The same content, shares and seed give the same split, whatever the files' names or order. With some records assigned
    before (--update), the others bring each class as near to the shares as they can. Where all are, because the source is
    split, and val/ is lacking, it is made from train.
    """
    shares = {"test": test, "val": val}
    if all(record["split"] for record in records):
        if not val or any(record["split"] == "val" or "kept" in record for record in records):
            log("every image has a split already, and keeps it")
            return
        records, shares = [r for r in records if r["split"] == "train"], {"val": val}
        for record in records:
            record["split"] = None
    classes = collections.defaultdict(list)
    for record in records:
        classes[record["class"]].append(record)
    for name, members in sorted(classes.items()):
        wanted = {part: round(len(members) * share) for part, share in shares.items()}
        if sum(wanted.values()) >= len(members):
            raise UserError(f"class {name} has {len(members)} images, of which --val {val} and --test {test} leave none for "
                            "train; lower them, or add images")
        if short := [part for part, share in shares.items() if share and not wanted[part]]:
            log(f"warning: class {name} has only {len(members)} images: none for {', '.join(short)}")
        left = {part: count - sum(r["split"] == part for r in members) for part, count in wanted.items()}
        contents = by_content([record for record in members if record["split"] is None])
        for sha256 in shuffled(contents, seed):
            group = contents[sha256]
            part = next((part for part in left if left[part] >= len(group)), "train")
            left[part] = left.get(part, 0) - len(group)
            for record in group:
                record["split"] = part


# ---------------------------------------------------------------- splits -> tree

def lay_out(records: list[dict], bad: list[dict], request: dict, link: str, staging: Path):
    """Make the tree in `staging`: files that we extracted are moved, those of an older tree linked, others copied or linked."""
    targets = [f"{record['split']}/{record['class']}/{record['name']}" for record in records]
    for folder in {os.path.dirname(target) for target in targets}:
        (staging / folder).mkdir(parents=True)
    with Progress("lay out", len(records), every=10) as progress:
        for record, target in zip(records, targets):
            target = f"{staging}/{target}"
            if record["file"].startswith(f"{staging}{os.sep}"):
                os.rename(record["file"], target)
            elif link == "hard" or "kept" in record:
                link_file(record["file"], target, or_copy="kept" in record)
            else:
                shutil.copyfile(record["file"], target)
            progress.update(1)
    shutil.rmtree(staging / "files", ignore_errors=True)
    rows = sorted([target, r["class"], r["split"], r["sha256"]] for r, target in zip(records, targets))
    write_csv(staging / "splits.csv", ["path", "class", "split", "sha256"], rows)
    if bad:
        write_csv(staging / "rejected.csv", ["path", "reason"], [[record["path"], record["reason"]] for record in bad])
    with replacing(staging / REQUEST_FILE) as file:
        json.dump(request, file)


def link_file(source: str, target: str, or_copy: bool):
    try:
        os.link(source, target)
    except OSError as error:
        if not or_copy:
            raise UserError(f"--link hard: cannot link {source}: {error.strerror}; leave out --link hard to copy") from None
        shutil.copyfile(source, target)


def write_csv(path: Path, header: list[str], rows: list[list]):
    with replacing(path) as file:
        csv.writer(file).writerows([header, *rows])


def replace_tree(staging: Path, out: Path, old: Path):
    """Rename the finished tree to OUT; an old one is moved aside first and removed last. `recover` mends a death in between."""
    if hasattr(os, "sync"):
        os.sync()  # names must not reach the disk before the contents do
    if out.exists():
        out.rename(old)
    staging.rename(out)
    discard(old, staging)


def summary(records: list[dict]) -> dict:
    """Counts of images by class and split."""
    counts = {part: dict(sorted(collections.Counter(r["class"] for r in records if r["split"] == part).items()))
              for part in SPLITS}
    return {"images": len(records), "classes": len({r["class"] for r in records}),
            **{part: sum(counts[part].values()) for part in SPLITS}, "counts": counts}


def show_counts(counts: dict):
    """The table of images per class and split, on stderr."""
    names = sorted({name for part in counts.values() for name in part})
    width = max(map(len, [*names, "total"]))
    rows = [(name, [counts[part].get(name, 0) for part in SPLITS]) for name in names]
    rows.append(("total", [sum(counts[part].values()) for part in SPLITS]))
    lines = [f"{name:<{width}}" + "".join(f"{cell:>8}" for cell in row) for name, row in [("class", SPLITS), *rows]]
    log("\n".join(lines), stamp=False)


def show_dry_run(records: list[dict], bad: list[dict]):
    """What --dry-run tells beyond the counts: bad files, sizes in pixels, modes."""
    for record in bad:
        log(f"cannot be read: {record['path']} ({record['reason']})", stamp=False)
    sizes = sorted((r["size"] for r in records if "size" in r), key=lambda size: size[0] * size[1])
    if sizes:
        told = "  ".join(f"{what} {w}x{h}" for what, (w, h) in zip(("smallest", "median", "largest"),
                                                                    (sizes[0], sizes[len(sizes) // 2], sizes[-1])))
        counts = collections.Counter(r["mode"] for r in records if "mode" in r)
        modes = ", ".join(f"{mode} {count}" for mode, count in counts.most_common())
        log(f"pixels: {told}\nmodes: {modes}", stamp=False)


# ---------------------------------------------------------------- a demonstration set, drawn

def draw_synthetic(folder: Path, per_class: int, seed: int) -> list[tuple]:
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
                files.append((PurePosixPath(name, path.name), str(path), None))
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
