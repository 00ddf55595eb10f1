"""Damage image files of many kinds at random, and check that prepare_data.py and predict.py handle them.

    python tests/fuzz.py --files 3000 --checkpoint runs/eurosat/model.pt

The originals are JPEG, PNG, TIFF, WebP and GIF files in several modes and compressions, written by Pillow, and real
tiles if they are present. Bytes are flipped, removed, overwritten or repeated, mostly near the start, where the headers
are, or the file is truncated. Both scripts have to end with a documented exit code, to account for each file, and to
agree on which files can be read; a batch that takes longer than five minutes counts as hanging. The last line is
`N files, R unreadable, 0 failures`; the exit code is 1 if there are failures.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import faulthandler
import io
import json
import random
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

from conftest import REAL, tile
from PIL import Image

BATCH, TIMEOUT = 500, 300  # files, seconds


def main() -> bool:
    """Run all batches and print the failures; return whether there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", required=True)
    args = parser.parse_args()
    rng, originals = random.Random(args.seed), make_originals()
    unreadable, failures = 0, []
    for first in range(0, args.files, BATCH):
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        with tempfile.TemporaryDirectory() as folder:
            count = min(BATCH, args.files - first)
            batch_unreadable, batch_failures = check_batch(Path(folder), originals, count, args.checkpoint, rng)
        faulthandler.cancel_dump_traceback_later()
        unreadable += batch_unreadable
        failures += batch_failures
    for failure in failures:
        print(failure)
    print(f"{args.files} files, {unreadable} unreadable, {len(failures)} failures")
    return bool(failures)


def make_originals() -> list[bytes]:
    """Return the content of undamaged image files of all kinds."""
    picture = tile((90, 120, 60), "fuzz", (64, 48))
    deep = Image.frombytes("I;16", (64, 48), bytes(range(256)) * 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    frames = {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    kinds = [
        (picture, "JPEG", {}),
        (picture, "JPEG", {"progressive": True, "exif": exif}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture.convert("L"), "JPEG", {"restart_marker_blocks": 1}),
        (picture, "PNG", {}),
        (picture.convert("P"), "PNG", {"transparency": 3}),
        (picture.convert("RGBA"), "PNG", {"exif": exif}),
        (deep, "PNG", {}),
        (picture.convert("1"), "PNG", {}),
        (picture, "PNG", frames),
        (picture, "WEBP", {}),
        (picture.convert("RGBA"), "WEBP", {"lossless": True}),
        (picture, "WEBP", frames),
        (picture, "GIF", {}),
        (picture, "GIF", frames),
        (deep, "TIFF", {}),
        (picture.convert("F"), "TIFF", {}),
        (picture, "TIFF", frames),
    ]
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        kinds.append((picture, "TIFF", {"compression": compression}))
    kinds.append((picture.convert("1"), "TIFF", {"compression": "group4"}))
    files = []
    for image, file_format, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        files.append(buffer.getvalue())
    with contextlib.suppress(OSError), zipfile.ZipFile(REAL / "eurosat" / "EuroSAT.zip") as archive:
        files += [archive.read(name) for name in archive.namelist() if name.endswith("_1.jpg")]
    return files


def damage(content: bytes, rng: random.Random) -> bytes:
    """Return a file's content with one to a dozen faults."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 12))):
        if not data:
            break
        at = rng.randrange(min(len(data), rng.choice((64, 512, 1 << 20))))
        length = rng.choice((1, 2, 4, 16))
        kind = rng.randrange(8)
        if kind < 3:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 4:
            data[at : at + length] = rng.choice((b"\0", b"\xff")) * length
        elif kind == 5:
            del data[at : at + length]
        elif kind == 6:
            data[at:at] = data[at : at + length]
        else:
            del data[rng.randrange(len(data)) :]
    return bytes(data)


def check_batch(
    folder: Path, originals: list[bytes], count: int, checkpoint: str, rng: random.Random
) -> tuple[int, list[str]]:
    """Give `count` damaged files to both scripts; return how many cannot be read, and the failures."""
    source = folder / "source"
    write_source(source, originals, count, rng)
    failures, rejected = [], set()
    prepare = "--source", source, "--out", folder / "tree", "--on-bad", "skip", "--val", 0, "--test", 0
    prepared = run_script("prepare_data", prepare, (0,), failures)
    predict = "--checkpoint", checkpoint, source, "--format", "jsonl", "--device", "cpu"
    predicted = run_script("predict", predict, (0, 3), failures)
    if not failures:
        with contextlib.suppress(FileNotFoundError), open(folder / "tree" / "rejected.csv", newline="") as file:
            rejected = {row["path"] for row in csv.DictReader(file)}
        records = [json.loads(line) for line in predicted.splitlines()]
        errors = {Path(record["path"]).relative_to(source).as_posix() for record in records if "error" in record}
        report, total = json.loads(prepared.splitlines()[-1]), count + 2
        if len(records) != total or report["images"] + report["rejected"] != total:
            accounted = f"{len(records)} records and {report['images']} + {report['rejected']} images"
            failures.append(f"{accounted} of {total} files")
        if rejected != errors:
            failures.append(f"prepare_data.py and predict.py do not agree on {sorted(rejected ^ errors)[:5]}")
    if failures:
        kept = shutil.copytree(source, tempfile.mkdtemp(prefix="fuzz-"), dirs_exist_ok=True)
        failures.append(f"the files are kept in {kept}")
    return len(rejected), failures


def write_source(source: Path, originals: list[bytes], count: int, rng: random.Random) -> None:
    """Write `count` different damaged files into two class folders, with an undamaged one in each."""
    contents = {}  # a dict keeps the order, unlike a set
    while len(contents) < count:
        contents[damage(rng.choice(originals), rng)] = None
    for name in ("a", "b"):
        (source / name).mkdir(parents=True)
        tile((9, 9, 9), name).save(source / name / "intact.png")
    for number, content in enumerate(contents):  # any extension: the content determines a file's format
        file = source / "ab"[number % 2] / f"{number}.{rng.choice(('jpg', 'png', 'tif', 'webp'))}"
        file.write_bytes(content)


def run_script(script: str, argv: tuple, expected: tuple[int, ...], failures: list[str]) -> str:
    """Call a script's main and return its stdout; add an exception or an unexpected exit code to `failures`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of unusual metadata
        try:
            code = __import__(script).main([str(argument) for argument in argv])
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
    if code not in expected:
        failures.append(f"{script}.py ended with {code}: {err.getvalue()[-300:]}")
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
