"""Damage image files of every kind at random and give them to prepare_data.py and predict.py, which must live.

    python tests/fuzz.py --files 3000 --checkpoint runs/eurosat/model.pt

JPEG, PNG, TIFF, WebP and GIF files in several modes and compressions, made by Pillow and, where they are present, real tiles, get
bytes flipped, cut out, zeroed or doubled, mostly near the start, where the headers are, or are cut short. Both scripts have to
end with a documented exit code, to account for every file, and to agree on which can be read; a batch that takes longer than
five minutes is a hang. The last line is `N files, R unreadable, 0 failures`; the exit code is 1 if there are any.
"""
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
from pathlib import Path

from conftest import REAL, tile
from PIL import Image

BATCH, SECONDS = 500, 300


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", required=True)
    args = parser.parse_args()
    rng, originals, unreadable, failures = random.Random(args.seed), make_originals(), 0, []
    for first in range(0, args.files, BATCH):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        with tempfile.TemporaryDirectory() as folder:
            bad, found = try_batch(Path(folder), originals, min(BATCH, args.files - first), args.checkpoint, rng)
        faulthandler.cancel_dump_traceback_later()
        unreadable, failures = unreadable + bad, failures + found
    print(*failures, sep="\n", end="\n" if failures else "")
    print(f"{args.files} files, {unreadable} unreadable, {len(failures)} failures")
    return bool(failures)


def make_originals() -> list[bytes]:
    """Whole image files of all kinds."""
    picture = tile((90, 120, 60), "fuzz", (64, 48))
    deep = Image.frombytes("I;16", (64, 48), bytes(range(256)) * 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    frames = {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    kinds = [(picture, "JPEG", {}), (picture, "JPEG", {"progressive": True, "exif": exif}), (picture.convert("CMYK"), "JPEG", {}),
             (picture.convert("L"), "JPEG", {"restart_marker_blocks": 1}), (picture, "PNG", {}), (picture.convert("P"), "PNG", {"transparency": 3}),
             (picture.convert("RGBA"), "PNG", {"exif": exif}), (deep, "PNG", {}), (picture.convert("1"), "PNG", {}), (picture, "PNG", frames),
             (picture, "WEBP", {}), (picture.convert("RGBA"), "WEBP", {"lossless": True}), (picture, "WEBP", frames),
             (picture, "GIF", {}), (picture, "GIF", frames), (deep, "TIFF", {}), (picture.convert("F"), "TIFF", {}), (picture, "TIFF", frames),
             *((picture, "TIFF", {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
             (picture.convert("1"), "TIFF", {"compression": "group4"})]
    files = []
    for image, form, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files.append(buffer.getvalue())
    with contextlib.suppress(OSError):
        import zipfile
        with zipfile.ZipFile(REAL / "eurosat" / "EuroSAT.zip") as archive:
            files += [archive.read(name) for name in archive.namelist() if name.endswith("_1.jpg")]
    return files


def damage(content: bytes, rng: random.Random) -> bytes:
    """The file with one to a dozen faults."""
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
            data[at] = rng.choice((0, 1, 0x7f, 0x80, 0xff))
        elif kind == 4:
            data[at:at + length] = rng.choice((b"\0", b"\xff")) * length
        elif kind == 5:
            del data[at:at + length]
        elif kind == 6:
            data[at:at] = data[at:at + length]
        else:
            del data[rng.randrange(len(data)):]
    return bytes(data)


def try_batch(folder: Path, originals: list[bytes], count: int, checkpoint, rng: random.Random) -> tuple[int, list[str]]:
    """Damage `count` files and give them to both scripts: how many cannot be read, and what went wrong."""
    files = {}
    while len(files) < count:
        files[damage(rng.choice(originals), rng)] = None
    source = folder / "source"
    for name in ("a", "b"):
        (source / name).mkdir(parents=True)
        tile((9, 9, 9), name).save(source / name / "whole.png")
    for number, content in enumerate(files):  # a file's format goes by its content
        (source / "ab"[number % 2] / f"{number}.{rng.choice(('jpg', 'png', 'tif', 'webp'))}").write_bytes(content)
    failures, rejected = [], set()
    prepared = call("prepare_data", ["--source", source, "--out", folder / "tree", "--on-bad", "skip", "--val", 0, "--test", 0], (0,), failures)
    predicted = call("predict", ["--checkpoint", checkpoint, source, "--format", "jsonl", "--device", "cpu"], (0, 3), failures)
    if not failures:
        with contextlib.suppress(FileNotFoundError), open(folder / "tree" / "rejected.csv", newline="") as file:
            rejected = {row["path"] for row in csv.DictReader(file)}
        records = [json.loads(line) for line in predicted.splitlines()]
        errors = {Path(record["path"]).relative_to(source).as_posix() for record in records if "error" in record}
        counts = json.loads(prepared.splitlines()[-1])
        if len(records) != count + 2 or counts["images"] + counts["rejected"] != count + 2:
            failures.append(f"{len(records)} records and {counts['images']} + {counts['rejected']} images of {count + 2} files")
        if rejected != errors:
            failures.append(f"prepare_data.py and predict.py do not agree on {sorted(rejected ^ errors)[:5]}")
    if failures:
        failures.append(f"the files: {shutil.copytree(source, tempfile.mkdtemp(prefix='fuzz-'), dirs_exist_ok=True)}")
    return len(rejected), failures


def call(script: str, argv: list, expected: tuple, failures: list) -> str:
    """Call a script's main: its stdout. An exception, or another exit code than those expected, is added to the failures."""
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on odd metadata
        try:
            code = __import__(script).main([str(argument) for argument in argv])
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
    if code not in expected:
        failures.append(f"{script}.py ended with {code}: {told.getvalue()[-300:]}")
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
