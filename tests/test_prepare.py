"""prepare_data.py: its sources, the split, the input that it refuses, and the files that it leaves behind."""

import array
import hashlib
import http.server
import inspect
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, command, make_tree, read_csv, real, stamps, tile
from PIL import Image

import prepare_data
from common import hash_file, hold_lock, read_image

SPLITS = ("train", "val", "test")


@pytest.fixture
def prepare(run):
    """Return a function: prepare("--source", ...) calls prepare_data.main(argv) and returns a Result."""
    return lambda *argv, code=0: run("prepare_data", *argv, code=code)


@pytest.fixture
def source(tmp_path):
    """A folder of three class folders with 20 images each."""
    return make_tree(tmp_path / "source", counts=(("", 20),))


def rows(out):
    return read_csv(out / "splits.csv")


def split_by_content(out):
    """Return {sha256: split} of a tree."""
    return {row["sha256"]: row["split"] for row in rows(out)}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pack(folder, archive, prefix=""):
    """Write the images of a folder to a zip, and return its path."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, prefix + str(path.relative_to(folder)))
    return archive


def assert_complete(out, count):
    """Check that a tree has `count` images, each with the content that splits.csv names."""
    table = rows(out)
    assert len(table) == count
    for row in table:
        assert hash_file(out / row["path"]) == row["sha256"]


# ---------------------------------------------------------------- the tree and its split


def test_folder_to_tree(prepare, source, tmp_path):
    out = tmp_path / "out"
    report = prepare("--source", source, "--out", out).json
    assert (report["images"], report["train"], report["val"], report["test"]) == (60, 42, 6, 12)
    assert report["counts"]["test"] == {"blue": 4, "green": 4, "red": 4}
    table = rows(out)
    assert_complete(out, 60)
    for row in table:
        name = Path(row["path"]).name
        assert row["path"] == f"{row['split']}/{row['class']}/{name}"
        assert (out / row["path"]).read_bytes() == (source / row["class"] / name).read_bytes()
    assert files(out) == sorted([".prepared.json", "splits.csv"] + [row["path"] for row in table])
    from torchvision.datasets import ImageFolder

    assert ImageFolder(out / "train").classes == ["blue", "green", "red"] and len(ImageFolder(out / "train")) == 42


def test_split_depends_only_on_content(prepare, source, tmp_path):
    prepare("--source", source, "--out", tmp_path / "a")
    for path in sorted(source.rglob("*.png")):
        path.rename(path.with_name(f"x{path.stem[::-1]}.png"))
    prepare("--source", pack(source, tmp_path / "s.zip"), "--out", tmp_path / "b")
    prepare("--source", source, "--out", tmp_path / "c", "--seed", 1)
    a, b, c = (split_by_content(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and a != c


def test_no_val_is_the_split_of_the_paper(prepare, source, tmp_path):
    report = prepare("--source", source, "--out", tmp_path / "out", "--val", 0, "--test", 0.2).json
    assert (report["train"], report["val"], report["test"]) == (48, 0, 12)
    assert not (tmp_path / "out" / "val").exists()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_archives_with_an_outer_folder(prepare, source, tmp_path, kind):
    (source / "red" / "notes.txt").write_text("not an image")
    (source / ".ipynb_checkpoints").mkdir()
    shutil.copy(source / "red" / "red 0.png", source / ".ipynb_checkpoints" / "red 0-checkpoint.png")
    archive = tmp_path / f"s.{kind}"
    shutil.make_archive(str(tmp_path / "s"), {"tar.gz": "gztar"}.get(kind, kind), source.parent, "source")
    report = prepare("--source", archive, "--out", tmp_path / "out").json
    assert (report["images"], report["classes"], report["not_images"]) == (60, 3, 2)


def test_classes_without_images_for_val_or_test(prepare, source, tmp_path):
    for number in range(9):
        (source / f"small {number}").mkdir()
        for image in range(1 + number % 2):
            tile((9, 9, 9), f"{number} {image}").save(source / f"small {number}" / f"{image}.png")
    warnings = [
        line for line in prepare("--source", source, "--out", tmp_path / "out").err.splitlines() if "few" in line
    ]
    assert len(warnings) == 1 and "small 0 (1 image), small 1 (2 images)" in warnings[0] and "4 more" in warnings[0]
    assert "too few images for test and val" in warnings[0]


def test_split_of_the_source_is_kept_and_val_taken_from_train(prepare, tmp_path):
    source = make_tree(tmp_path / "source", counts=(("train", 10), ("test", 5)))
    report = prepare("--source", source, "--out", tmp_path / "out", "--val", 0.2).json
    expected = {"train": 8, "val": 2, "test": 5}
    assert report["counts"] == {part: dict.fromkeys(("blue", "green", "red"), n) for part, n in expected.items()}
    assert files(tmp_path / "out" / "test") == files(source / "test")


def test_equal_images_get_the_same_split_and_must_have_the_same_class(prepare, source, tmp_path):
    for number in range(8):
        shutil.copy(source / "red" / f"red {number}.png", source / "red" / f"again {number}.png")
    result = prepare("--source", source, "--out", tmp_path / "out")
    assert "8 images repeat" in result.err and "red/red 0.png = red/again 0.png" in result.err
    splits = split_by_content(tmp_path / "out")
    assert all(row["split"] == splits[row["sha256"]] for row in rows(tmp_path / "out"))
    shutil.copy(source / "red" / "red 0.png", source / "blue" / "sea.png")
    message = prepare("--source", source, "--out", tmp_path / "out2", code=2).error[0]
    assert "blue/sea.png" in message and "red/red 0.png" in message and not (tmp_path / "out2").exists()


def test_equal_images_in_different_splits_of_the_source_are_reported(prepare, tmp_path):
    source = make_tree(tmp_path / "source", counts=(("train", 5), ("test", 5)))
    shutil.copy(source / "train" / "red" / "red 0.png", source / "test" / "red" / "leak.png")
    result = prepare("--source", source, "--out", tmp_path / "out", "--val", 0)
    assert "1 images are in more than one split" in result.err


def test_per_class_samples_by_content(prepare, source, tmp_path):
    shutil.copy(source / "red" / "red 0.png", source / "red" / "again.png")
    for name, archive in (("a", source), ("b", pack(source, tmp_path / "s.zip"))):
        report = prepare("--source", archive, "--out", tmp_path / name, "--per-class", 10).json
        assert report["counts"]["train"] == {"blue": 7, "green": 7, "red": 7} and report["images"] == 30
    a, b = (split_by_content(tmp_path / name).keys() for name in "ab")
    assert a == b and len(a) == 30
    prepare("--source", source, "--out", tmp_path / "c", "--per-class", 10, "--seed", 1)
    assert split_by_content(tmp_path / "c").keys() != a


def test_splits_csv_and_published_lists(prepare, source, tmp_path):
    prepare("--source", source, "--out", tmp_path / "a", "--seed", 3)
    expected = split_by_content(tmp_path / "a")
    lists = tmp_path / "lists"
    lists.mkdir()
    for part in SPLITS:
        paths = [Path(row["path"]) for row in rows(tmp_path / "a") if row["split"] == part]
        names = [f"{path.parent.name}/{path.name}" if part == "val" else path.name for path in paths]
        (lists / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    archive = pack(source, tmp_path / "s.zip", prefix="outer/")
    for number, splits in enumerate((tmp_path / "a" / "splits.csv", lists)):
        prepare("--source", archive, "--out", tmp_path / f"b{number}", "--splits", splits)
        assert split_by_content(tmp_path / f"b{number}") == expected
    few = prepare("--source", archive, "--out", tmp_path / "few", "--splits", lists, "--per-class", 2).json
    assert few["counts"] == {part: {"blue": 2, "green": 2, "red": 2} for part in SPLITS}
    train, test = (lists / "train.txt").read_text(), (lists / "test.txt").read_text()
    (lists / "train.txt").write_text(train.split("\n", 1)[1] + "ghost 1.png\n" + test.split("\n")[0] + "\n")
    message = prepare("--source", archive, "--out", tmp_path / "c", "--splits", lists, code=2).error[0]
    assert "1 names are not in the source (ghost 1.png)" in message
    assert "1 names are listed twice, or fit several" in message and "1 images of the source are not listed" in message
    (lists / "train.txt").write_text(train)
    (source / "red" / "red 0.png").write_bytes(b"no image")
    skipped = ["--splits", lists, "--on-bad", "skip"]
    assert prepare("--source", source, "--out", tmp_path / "d", *skipped).json["images"] == 59
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    for splits in (tmp_path / "odd.csv", tmp_path / "none"):
        prepare("--source", archive, "--out", tmp_path / "c", "--splits", splits, code=2)


def test_splits_csv_with_carriage_returns(prepare, source, tmp_path):
    """Earlier versions ended lines with a carriage return and a line feed."""
    out = tmp_path / "out"
    prepare("--source", source, "--out", out)
    expected = split_by_content(out)
    content = (out / "splits.csv").read_bytes().replace(b"\n", b"\r\n")
    (out / "splits.csv").write_bytes(content)
    assert prepare("--source", source, "--out", out).json["changed"] is False
    prepare("--source", source, "--out", tmp_path / "again", "--splits", out / "splits.csv")
    assert split_by_content(tmp_path / "again") == expected


# ---------------------------------------------------------------- images and names


@pytest.mark.parametrize("mode", ["P", "I;16", "CMYK", "RGBA", "LA", "L", "1", "I", "F", "exif"])
def test_images_of_any_mode(prepare, source, tmp_path, mode):
    picture = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50)
    extra = source / "red" / {"CMYK": "x.jpg", "exif": "x.JPG", "F": "x.tif", "I": "x.tiff"}.get(mode, "x.png")
    if mode == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.convert("RGB").save(extra, exif=exif)
    elif mode == "I;16":
        Image.frombytes("I;16", (2, 1), (0).to_bytes(2, "little") + (40000).to_bytes(2, "little")).save(extra)
    else:
        picture.convert("RGB" if mode in ("P", "CMYK") else "L").convert(mode).save(extra)
    assert prepare("--source", source, "--out", tmp_path / "out").json["images"] == 61
    image = read_image(extra)
    assert image.mode == "RGB" and image.size == {"exif": (30, 40), "I;16": (2, 1)}.get(mode, (40, 30))
    if mode == "I;16":  # scaled, not clipped
        assert image.getpixel((1, 0)) == (155, 155, 155) and image.getpixel((0, 0)) == (0, 0, 0)


def test_floats_are_stretched_between_the_finite_ones(prepare, source, tmp_path):
    """NaN, as for nodata in a corner, and infinity do not make an image black; without a finite pixel it is bad."""
    nan, extra = math.nan, source / "red" / "x.tif"

    def save(*values):
        Image.frombytes("F", (len(values), 1), array.array("f", values).tobytes()).save(extra)

    for values in (nan, 3, 4, 5), (math.inf, 5, 3, 4), (4, -math.inf, 3, 5):
        save(*values)
        levels = {3: 0, 4: 127, 5: 255}
        expected = [levels.get(value, 255 if value == math.inf else 0) for value in values]
        assert list(read_image(extra).convert("L").tobytes()) == expected
    save(nan, nan, math.inf)
    error = prepare("--source", source, "--out", tmp_path / "out", code=2).error[0]
    assert "red/x.tif (no pixel has a finite value)" in error


def test_bad_images_can_be_skipped(prepare, source, tmp_path):
    (source / "red" / "bad.jpg").write_bytes(b"no image")
    report = prepare("--source", source, "--out", tmp_path / "out", "--on-bad", "skip").json
    assert (report["images"], report["rejected"]) == (60, 1)
    (row,) = read_csv(tmp_path / "out" / "rejected.csv")
    assert row["path"] == "red/bad.jpg" and row["reason"]


def test_circular_links_and_names_of_any_bytes(prepare, source, tmp_path, monkeypatch):
    (source / "red" / "loop").symlink_to(source)
    try:
        (source / "red" / "red 0.png").rename(source / "red" / "r\udce9d\n.png")
    except OSError:
        pytest.skip("the file system allows only UTF-8 names")
    assert prepare("--source", source, "--out", tmp_path / "out").json["images"] >= 60
    assert any("r\udce9d\n.png" in row["path"] for row in rows(tmp_path / "out"))
    (source / "red" / "r\udce9d\n.png").write_bytes(b"no image")
    monkeypatch.setattr(sys, "stderr", None)  # closed by 2>&-
    assert prepare_data.main(["--source", str(source), "--out", str(tmp_path / "out"), "--dry-run"]) == 0


def test_names_in_a_zip_without_the_utf8_flag(prepare, source, tmp_path):
    """Some programs write UTF-8 without its flag. Names that are not UTF-8 are in the old code page."""

    class UnflaggedInfo(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):  # noqa: N802 (a method of zipfile)
            return self.filename.encode(encoding), self.flag_bits & ~0x800

    for encoding, name in (("utf-8", "M\u00fcll"), ("cp437", "\u00e9t\u00e9")):
        with zipfile.ZipFile(tmp_path / f"{encoding}.zip", "w") as archive:
            for path in sorted(source.rglob("*.png")):
                folder = name if path.parent.name == "red" else path.parent.name
                archive.writestr(UnflaggedInfo(f"{folder}/{path.name}"), path.read_bytes())
        prepare("--source", tmp_path / f"{encoding}.zip", "--out", tmp_path / encoding)
        assert {row["class"] for row in rows(tmp_path / encoding)} == {"blue", "green", name}


def test_locale_without_utf8(source, tmp_path):
    """File names are UTF-8 also in the locale C; and stderr has no warnings of Pillow."""
    (source / "red").rename(source / "M\u00fcll")
    tile((9, 9, 9), "exif").save(source / "M\u00fcll" / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    for changed in (True, False):
        done = command("prepare_data", "--source", source, "--out", tmp_path / "out", env=env)
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
        report = json.loads(done.stdout)
        assert report["changed"] is changed and report["counts"]["train"]["M\u00fcll"] == 15


def test_unreadable_folders(prepare, source, tmp_path, monkeypatch):
    """They are left out like images that cannot be read, not without a trace."""
    scandir, folder = os.scandir, source / "red" / "closed"
    folder.mkdir()

    def scan(path):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    args = ["--source", source, "--out", tmp_path / "out"]
    assert "problems with 1 file: red/closed (Permission denied)" in prepare(*args, code=2).error[0]
    assert prepare(*args, "--on-bad", "skip").json["images"] == 60
    assert rejected(tmp_path / "out") == {"red/closed": "Permission denied"}
    folder = source
    assert f"{source}: Permission denied" in prepare(*args, "--force", code=2).error[0]


# ---------------------------------------------------------------- what is left out


def rejected(out):
    """Return {path: reason} of what a tree leaves out."""
    return {row["path"]: row["reason"] for row in read_csv(out / "rejected.csv")}


def test_contradictions_can_be_left_out(prepare, source, tmp_path):
    """Content in two classes is an error that lists it; --dry-run goes on, --on-bad skip leaves out all copies."""
    for number in range(25):
        shutil.copy(source / "red" / f"red {number % 20}.png", source / "blue" / f"sea {number:02}.png")
    args = ["--source", source, "--out", tmp_path / "out"]
    message = prepare(*args, code=2).error[0]
    assert "problems with 45 files" in message and "blue/sea 01.png (also in" not in message  # with its copy 21
    assert "blue/sea 00.png, blue/sea 20.png (also in red/red 0.png as red)" in message and message.count("sea") == 25
    for number in range(25):
        shutil.copy(source / "green" / f"green {number % 20}.png", source / "red" / f"grass {number:02}.png")
    message = prepare(*args, code=2).error[0]
    assert "problems with 90 files" in message and message.count("(also in") == 20 and "and 20 more" in message
    shutil.rmtree(source / "red")
    for number in (0, 1):
        shutil.copy(source / "green" / f"green {number}.png", source / "blue" / f"wood {number}.png")
    shutil.copy(source / "green" / "green 0.png", source / "green" / "again.png")
    dry = prepare(*args, "--dry-run")
    assert dry.json["rejected"] == 5 and "left out: blue/wood 0.png (also in green/again.png as green" in dry.err
    assert "left out 5 files, listed above" in dry.err
    result = prepare(*args, "--on-bad", "skip").json
    assert (result["images"], result["rejected"]) == (20 + 25 + 20 + 3 - 5, 5)
    reasons = rejected(tmp_path / "out")
    assert sorted(reasons) == [f"blue/wood {n}.png" for n in (0, 1)] + ["green/again.png", "green/green 0.png"] + [
        "green/green 1.png"
    ]
    assert reasons["green/green 1.png"] == "also in blue/wood 1.png as blue"


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_other_things_that_are_left_out(prepare, source, tmp_path, kind):
    """Loose images, names that collide and empty class folders: an error, or a line in rejected.csv."""
    tile((9, 9, 9), "loose").save(source / "loose.png")
    (source / "red" / "a").mkdir()
    tile((9, 9, 9), "one").save(source / "red" / "a" / "b.png")
    tile((9, 9, 9), "two").save(source / "red" / "a__b.png")
    (source / "blue" / "bad.jpg").write_bytes(b"no image")
    (source / "empty").mkdir()
    (source / "empty" / "notes.txt").write_text("no images yet")
    place = source
    if kind == "zip":
        place = Path(shutil.make_archive(str(tmp_path / "source"), "zip", source.parent, source.name))
    prefix = "source/" if kind == "zip" else ""
    expected = {"loose.png": "not in a class folder", "empty": "class folder without images"}
    args = ["--source", place, "--out", tmp_path / "out"]
    message = prepare(*args, code=2).error[0]
    assert "problems with 4 files" in message
    assert all(f"{prefix}{path} ({reason})" in message for path, reason in expected.items())
    result = prepare(*args, "--on-bad", "skip")
    assert (result.json["images"], result.json["rejected"], result.json["not_images"]) == (61, 4, 1)
    assert "left out 4 files, listed in rejected.csv" in result.err
    reasons = rejected(tmp_path / "out")
    assert reasons.items() >= {prefix + path: reason for path, reason in expected.items()}.items()
    assert any("it would have the same name in the tree as" in reason for reason in reasons.values())
    assert f"{prefix}blue/bad.jpg" in reasons and len(reasons) == 4


def test_loose_images_beside_given_splits(prepare, tmp_path):
    source = make_tree(tmp_path / "source", counts=(("train", 10), ("test", 5)))
    tile((9, 9, 9), "loose").save(source / "train" / "loose.png")
    result = prepare("--source", source, "--out", tmp_path / "out", "--on-bad", "skip").json
    assert (result["train"] + result["val"], result["test"], result["classes"]) == (30, 15, 3)
    assert rejected(tmp_path / "out") == {"train/loose.png": "not in a class folder"}


def test_other_formats_are_counted(prepare, source, tmp_path):
    for name in ("a.gif", "b.GIF", "c.heic", "d.txt", ".hidden.jpg"):
        (source / "red" / name).write_bytes(b"anything")
    log = prepare("--source", source, "--out", tmp_path / "out").err
    assert "left out files of other formats: 2 .gif, 1 .heic; convert them to JPEG or PNG" in log
    assert "left out 2 files without an image extension" in log


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"train/cat": 20, "train/dog": 20, "test": 60}, {"cat", "dog"}),  # test without labels, as from Kaggle
        ({"train/cat": 6, "train/dog": 6, "test/cat": 3, "test/dog": 3, "docs": 1}, {"cat", "dog"}),
        ({"a/b/train/cat": 6, "a/b/train/dog": 6, "a/b/train/dog/more": 3, "a": 1}, {"cat", "dog"}),
        ({"train": 9, "test": 9}, "test, train in"),
        ({"train": 9, "valid": 9}, "train, valid in"),
        ({"train/cat": 9, "train/dog": 9, "valid/cat": 4}, {"cat", "dog"}),
        ({".": 9}, "found no classes in"),
    ],
)
def test_layouts_of_folders(prepare, tmp_path, files, expected):
    for folder, count in files.items():
        for number in range(count):
            path = tmp_path / "source" / folder / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            tile((9, 99, 9), f"{folder}{number}").save(path)
    args = ["--source", tmp_path / "source", "--out", tmp_path / "out", "--on-bad", "skip"]
    if isinstance(expected, str):
        assert expected in prepare(*args, code=2).error[0]
    else:
        left_out = prepare(*args).json["rejected"]
        assert {row["class"] for row in rows(tmp_path / "out")} == expected
        assert left_out == sum(count for folder, count in files.items() if folder in ("test", "docs", "a", "valid/cat"))


def test_classes_that_are_left_out_as_a_whole(prepare, source, tmp_path):
    for path in (source / "red").iterdir():
        path.write_bytes(b"no image")
    args = ["--source", source, "--out", tmp_path / "out", "--on-bad", "skip"]
    assert "warning: all images of these classes are left out: red" in prepare(*args).err
    shutil.rmtree(source / "green")
    assert "found one class, blue, in the images that are not left out" in prepare(*args, "--force", code=2).error[0]
    dry = prepare(*args[:4], "--group-by", "(nothing)", "--dry-run", code=2)
    assert "left out: blue/blue 0.png, blue/blue 1.png" in dry.err and "does not match --group-by" in dry.err


def test_no_two_images_get_the_same_name(prepare, tmp_path):
    """A zip may have a path twice; and images of two splits of a source may meet in one."""
    source = make_tree(tmp_path / "source", counts=(("train", 6), ("test", 6)))
    with zipfile.ZipFile(pack(source / "train", tmp_path / "s.zip"), "a") as archive, pytest.warns(UserWarning):
        archive.writestr("red/red 0.png", (source / "test" / "red" / "red 3.png").read_bytes())
    args = ["--source", tmp_path / "s.zip", "--out", tmp_path / "out"]
    assert "same name in the tree as red/red 0.png" in prepare(*args, code=2).error[0]
    assert prepare(*args, "--on-bad", "skip").json["images"] == 18 == len(list((tmp_path / "out").glob("*/*/*.png")))
    prepare("--source", source, "--out", tmp_path / "a", "--val", 0)
    text = (tmp_path / "a" / "splits.csv").read_text().replace(",test,", ",train,")
    (tmp_path / "splits.csv").write_text(text)
    (source / "train" / "Red").mkdir()
    tile((9, 9, 9), "new").save(source / "train" / "Red" / "RED 0.png")
    message = prepare("--source", source, "--out", tmp_path / "b", code=2).error[0]
    assert "it would have the same name in the tree as" in message and "apart from upper and lower case" in message
    shutil.rmtree(source / "train" / "Red")
    args = ["--source", source, "--splits", tmp_path / "splits.csv", "--out", tmp_path / "b"]
    assert "same name in the tree as" in prepare(*args, code=2).error[0] and not (tmp_path / "b").exists()


# ---------------------------------------------------------------- labels from a list


def flat_source(source, folder):
    """Move the images of the class folders into one folder with subfolders of ten; return {relative path: class}."""
    classes = {}
    for number, path in enumerate(sorted(source.rglob("*.png"))):
        target = folder / f"part{number // 10}" / f"{number:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        classes[str(target.relative_to(folder))] = path.parent.name
    return classes


@pytest.mark.parametrize(
    "separator, heading, start, by",
    [
        (",", "path,class", b"", lambda path: path),
        (";", "", "\ufeff".encode(), lambda path: path),
        ("\t", "Label\timage_id", b"", lambda path: Path(path).stem),
        (",", "id,breed", b"", lambda path: Path(path).name),
        (",", "note,path,class", b"", lambda path: path.replace("/", "\\")),
    ],
)
def test_labels(prepare, source, tmp_path, separator, heading, start, by):
    classes = flat_source(source, tmp_path / "flat")
    lines = [heading] * bool(heading)
    for path, name in classes.items():
        cells = {"Label\timage_id": [name, by(path)], "note,path,class": ["x", by(path), name]}
        lines.append(separator.join(cells.get(heading, [by(path), name])))
    (tmp_path / "labels.csv").write_bytes(start + "\r\n".join([*lines, "", ""]).encode())
    args = ["--source", tmp_path / "flat", "--labels", tmp_path / "labels.csv", "--out", tmp_path / "out"]
    assert prepare(*args).json["counts"]["train"] == {"blue": 14, "green": 14, "red": 14}
    prepare("--source", source, "--out", tmp_path / "expected")
    assert {(row["class"], row["sha256"], row["split"]) for row in rows(tmp_path / "out")} == {
        (row["class"], row["sha256"], row["split"]) for row in rows(tmp_path / "expected")
    }
    assert {Path(row["path"]).name.replace("__", "/") for row in rows(tmp_path / "out")} == set(classes)
    (tmp_path / "labels.csv").write_text("\n".join(lines[:-1]))
    assert "(--labels has changed)" in prepare(*args, code=2).error[0]


def test_splits_csv_as_labels(prepare, source, tmp_path):
    """A corrected splits.csv: the classes that it names, and its splits."""
    prepare("--source", source, "--out", tmp_path / "a")
    text = (tmp_path / "a" / "splits.csv").read_text()
    (tmp_path / "new.csv").write_text(text.replace("red/red 3.png,red,", "red/red 3.png,blue,"))
    prepare("--source", tmp_path / "a", "--labels", tmp_path / "new.csv", "--out", tmp_path / "b")
    before, after = ({row["sha256"]: row for row in rows(tmp_path / name)} for name in "ab")
    assert all(before[key]["split"] == after[key]["split"] for key in before)
    changed = [key for key in before if before[key]["class"] != after[key]["class"]]
    assert [Path(after[key]["path"]).name for key in changed] == ["red 3.png"]


def test_labels_with_some_splits(prepare, source, tmp_path):
    """Some lines have a split; the images are also sampled."""
    lines = [
        f"{path},{name},{'test' * (i % 5 == 0)}"
        for i, (path, name) in enumerate(flat_source(source, tmp_path / "flat").items())
    ]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    args = ["--labels", tmp_path / "labels.csv", "--out", tmp_path / "out", "--per-class", 6]
    assert prepare("--source", tmp_path / "flat", *args).json["images"] == 3 * (4 + 6)


def test_labels_and_images_that_do_not_fit(prepare, source, tmp_path):
    classes = flat_source(source, tmp_path / "flat")
    args = ["--source", tmp_path / "flat", "--labels", tmp_path / "labels.csv", "--out", tmp_path / "out"]
    lines = [f"{path},{name}" for path, name in classes.items()]
    (tmp_path / "labels.csv").write_text("\n".join([*lines[2:], "ghost.png,red", "part0/001.png,"]))
    message = prepare(*args, code=2).error[0]
    assert "problems with 3 files" in message and "ghost.png (listed in labels.csv, but not in the source)" in message
    assert "part0/000.png, part0/001.png (not listed in labels.csv)" in message
    assert prepare(*args, "--on-bad", "skip").json["images"] == 58
    assert sorted(rejected(tmp_path / "out")) == ["ghost.png", "part0/000.png", "part0/001.png"]
    for content, words in (
        ("\n".join([*lines, lines[0]]), "listed twice, or fit several images: part0/000.png"),
        ("\n".join([*lines[1:], lines[0].replace(",", ",../")]), "'../blue' of part0/000.png cannot be the name"),
        ("\n".join(f"{line},train" for line in lines[1:]) + f"\n{lines[0]},later", "split 'later' of part0/000.png"),
        ("path,class\n", "no lines with a path and a class"),
        ("photo,kind\nx,y\n", "none of its 2 names fits an image of the source: the first name is photo, an image"),
        ("path,split,species,genus\n0.png,train,a,b\n", "which column has the classes?"),
        ("\n".join(f"{line.partition(',')[0]},one" for line in lines), "found one class, one,"),
    ):
        (tmp_path / "labels.csv").write_text(content)
        assert words in prepare(*args, "--out", tmp_path / "new", code=2).error[0]
    (tmp_path / "labels.csv").write_bytes("001.png;M\u00fcll".encode("latin-1"))
    assert "CSV UTF-8" in prepare(*args, "--out", tmp_path / "new", code=2).error[0]
    assert "no such file" in prepare(*args, "--labels", tmp_path / "no.csv", code=2).error[0]
    shutil.copytree(tmp_path / "flat" / "part0", tmp_path / "flat" / "twin")
    (tmp_path / "labels.csv").write_text("\n".join(f"{Path(path).stem},{name}" for path, name in classes.items()))
    assert "10 names are listed twice, or fit several" in prepare(*args, "--out", tmp_path / "new", code=2).error[0]


def test_update_with_a_longer_list(prepare, source, tmp_path):
    classes = flat_source(source, tmp_path / "flat")
    lines = [f"{path},{name}" for path, name in classes.items()]
    args = ["--source", tmp_path / "flat", "--labels", tmp_path / "labels.csv", "--out", tmp_path / "out"]
    args += ["--on-bad", "skip"]
    (tmp_path / "labels.csv").write_text("\n".join(lines[::2]))
    assert prepare(*args).json["images"] == 30
    before = split_by_content(tmp_path / "out")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    assert prepare(*args, "--update").json["images"] == 60
    assert split_by_content(tmp_path / "out").items() >= before.items()


@pytest.mark.parametrize("line", ["0.png,name", "path,class,,"])
def test_headings_and_lines_like_headings(prepare, tmp_path, line):
    source = tmp_path / "source"
    source.mkdir()
    lines = [line]
    for number in range(20):
        tile((9, 99, 9), number).save(source / f"{number}.png")
        lines.append(f"{number}.png,{'name' if number % 2 else 'id'}")
    del lines[1 : 1 + line.startswith("0")]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    result = prepare("--source", source, "--labels", tmp_path / "labels.csv", "--out", tmp_path / "out").json
    assert (result["images"], result["classes"]) == (20, 2)


def test_lists_name_classes_in_place_of_folders(prepare, source, tmp_path):
    """A line of train.txt may be <class>/<name>, also if the image is in a folder below that of the class."""
    (source / "red" / "sub").mkdir()
    (source / "red" / "red 0.png").rename(source / "red" / "sub" / "red 0.png")
    lists = tmp_path / "lists"
    lists.mkdir()
    names = [f"{path.relative_to(source).parts[0]}/{path.name}" for path in source.rglob("*.png")]
    for part, share in (("train", names[::2]), ("test", names[1::2])):
        (lists / f"{part}.txt").write_text("\n".join(share))
    prepare("--source", source, "--splits", lists, "--out", tmp_path / "out")
    assert sum(row["split"] == "test" for row in rows(tmp_path / "out")) == 30


# ---------------------------------------------------------------- groups


def grouped_source(folder, sizes):
    """Make FOLDER/<class>/<group>_<number>.png with sizes[group][class] images, and return FOLDER."""
    for group, counts in sizes.items():
        for name, count in counts.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                tile((9, 99, 9), f"{group}{name}{number}").save(folder / name / f"{group}_{number}.png")
    return folder


def groups_of(out):
    """Return {group: its splits} of a tree."""
    found = {}
    for row in rows(out):
        found.setdefault(row["group"], set()).add(row["split"])
    return found


def test_groups_stay_together(prepare, tmp_path):
    """The shares are within one group of what is asked; with another seed other groups are in test."""
    rng = random.Random(1)
    sizes = {f"p{number}": {"red": rng.randint(1, 6), "blue": rng.randint(0, 6)} for number in range(40)}
    source = grouped_source(tmp_path / "source", sizes)
    args = ["--source", source, "--group-by", r"/(p\d+)_"]
    tested = []
    for seed in range(3):
        result = prepare(*args, "--out", tmp_path / f"out{seed}", "--seed", seed)
        groups = groups_of(tmp_path / f"out{seed}")
        assert len(groups) == 40 and all(len(splits) == 1 for splits in groups.values())
        counts = result.json["counts"]
        for name in ("red", "blue"):
            total = sum(counts[part][name] for part in SPLITS)
            assert abs(counts["test"][name] - 0.2 * total) <= 6 and abs(counts["val"][name] - 0.1 * total) <= 6
            assert abs(counts["test"][name] / total - 0.2) < 0.02 and abs(counts["val"][name] / total - 0.1) < 0.02
        assert "40 groups; the largest" in result.err and "test has" in result.err and "warning" not in result.err
        tested.append({group for group, splits in groups.items() if splits == {"test"}})
    assert len(set(map(frozenset, tested))) == 3


def test_equal_content_joins_groups(prepare, tmp_path):
    source = grouped_source(tmp_path / "source", {f"p{n}": {"red": 2, "blue": 2} for n in range(12)})
    for number in range(1, 12, 2):
        shutil.copy(source / "red" / f"p{number - 1}_0.png", source / "red" / f"p{number}_9.png")
    prepare("--source", source, "--group-by", r"(p\d+)_", "--out", tmp_path / "out", "--test", 0.4)
    groups = groups_of(tmp_path / "out")
    assert all(groups[f"p{n}"] == groups[f"p{n + 1}"] and len(groups[f"p{n}"]) == 1 for n in range(0, 12, 2))
    assert {"test", "train"} <= set().union(*groups.values())


def test_groups_that_do_not_fit(prepare, tmp_path):
    source = grouped_source(tmp_path / "source", {f"p{n}": {"red": 5, "blue": 5} for n in range(4)})
    tile((1, 1, 1), "odd").save(source / "red" / "odd.png")
    args = ["--source", source, "--group-by", r"(p\d)_", "--out", tmp_path / "out"]
    assert "red/odd.png (its path does not match --group-by)" in prepare(*args, code=2).error[0]
    result = prepare(*args, "--on-bad", "skip", code=2)
    assert "larger than the share of val: p" in result.err and "every group is too large for val" in result.error[0]
    assert prepare(*args, "--on-bad", "skip", "--val", 0.2).json["val"] == 10
    for pattern, words in (("(", "not a regular expression"), ("p", "one pair"), ("(p)(_)", "one pair")):
        assert words in prepare(*args[:2], "--group-by", pattern, "--out", tmp_path / "x", code=2).error[0]


def test_update_keeps_groups_where_they_are(prepare, tmp_path):
    """New images of a group follow it, also if its old images are no longer in the source."""
    sizes = {f"p{number}": {"red": 3, "blue": 3} for number in range(20)}
    source = grouped_source(tmp_path / "source", sizes)
    args = ["--source", source, "--group-by", r"(p\d+)_", "--out", tmp_path / "out"]
    prepare(*args)
    before = groups_of(tmp_path / "out")
    for path in source.rglob("p1_*"):
        path.unlink()
    for number in range(25):
        for name in ("red", "blue"):
            tile((99, 9, 9), f"new {number} {name}").save(source / name / f"p{number}_new.png")
    result = prepare(*args, "--update").json
    after = groups_of(tmp_path / "out")
    assert result["images"] == 120 + 50 and len(after) == 25
    assert all(after[group] == splits for group, splits in before.items())
    assert "group_by was" in prepare(*args[:2], *args[4:], "--update", code=2).error[0]


# ---------------------------------------------------------------- sources that are refused


def keep_few_images(source):
    for name, count in {"red": 1, "green": 2, "blue": 2}.items():
        for path in sorted((source / name).iterdir())[count:]:
            path.unlink()


def cut_image(source):
    (source / "red" / "cut.png").write_bytes((source / "red" / "red 0.png").read_bytes()[:900])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda source: (source / "red" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 no jpeg"), "bad.jpg"),
        (cut_image, "cut.png"),
        (lambda source: [path.unlink() for path in source.rglob("*.png")], "no images"),
        (lambda source: [shutil.rmtree(source / name) for name in ("red", "green")], "one class"),
        (lambda source: tile((9, 9, 9), "loose").save(source / "loose.png"), "loose.png (not in a class folder)"),
        (shutil.rmtree, "no such file or folder"),
        (lambda source: (source / "empty").mkdir(), "empty (class folder without images)"),
        (keep_few_images, "for train"),
    ],
)
def test_bad_sources_are_refused(prepare, source, tmp_path, damage, words):
    damage(source)
    shares = ["--val", 0.45, "--test", 0.45] if damage is keep_few_images else []
    assert words in prepare("--source", source, "--out", tmp_path / "new" / "out", *shares, code=2).error[0]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../climb.png", "/abs.png", "a/../../climb.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_that_lead_out_of_an_archive_are_refused(prepare, source, tmp_path, name, kind):
    content = (source / "red" / "red 0.png").read_bytes()
    archive = tmp_path / f"evil.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(name, content)
    else:
        with tarfile.open(archive, "w") as file:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    before = files(tmp_path)
    assert "leads out of the archive" in prepare("--source", archive, "--out", tmp_path / "out", code=2).error[0]
    assert files(tmp_path) == before


def test_links_bombs_and_damaged_archives_are_refused(prepare, source, tmp_path):
    def refuse(name, words):
        assert words in prepare("--source", tmp_path / name, "--out", tmp_path / "out", code=2).error[0]

    with tarfile.open(tmp_path / "link.tar", "w") as file:
        info = tarfile.TarInfo("red/link.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(info)
    refuse("link.tar", "is a link")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("red/bomb.png", "w", force_zip64=True) as file:
            for _ in range(1030):
                file.write(bytes(1 << 20))
    refuse("bomb.zip", "times its size")
    with tarfile.open(tmp_path / "header.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("red/header.png")
        info.pax_headers = {"comment": "x" * (2 << 20)}
        file.addfile(info)
    refuse("header.tar.gz", "header.tar.gz: an entry is a sparse file, or its header")
    complete = pack(source, tmp_path / "complete.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(complete[: len(complete) // 2])
    refuse("cut.zip", "damaged")
    (tmp_path / "flip.zip").write_bytes(complete[:400] + b"\x55" * 8 + complete[408:])
    refuse("flip.zip", "damaged")
    shutil.make_archive(str(tmp_path / "s"), "xztar", source)
    shutil.make_archive(str(tmp_path / "s"), "tar", source)
    for name in ("s.tar.xz", "s.tar"):  # in the plain tar a header, which tarfile takes for the end of the archive
        packed = (tmp_path / name).read_bytes()
        at = packed.index(b"./green/green 7.png") if name == "s.tar" else len(packed) // 2
        (tmp_path / name).write_bytes(packed[:at] + b"\x01" * 40 + packed[at + 40 :])
        refuse(name, "damaged")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- OUT: what is there, --force, --update, --link


def test_existing_tree_stays_until_it_is_replaced(prepare, source, tmp_path):
    out = tmp_path / "out"
    prepare("--source", source, "--out", out)
    before = files(out)
    message = prepare("--source", source, "--out", out, "--seed", 5, "--val", 0, code=2).error[0]
    assert "--force" in message and "seed was 0, is 5" in message and "val was 0.1, is 0.0" in message
    again = prepare("--source", source, "--out", out)
    assert "nothing to do" in again.err
    assert again.json["changed"] is False and again.json["images"] == 60
    (source / "red" / "bad.jpg").write_bytes(b"no jpeg")
    prepare("--source", source, "--out", out, "--force", code=2)
    assert files(out) == before
    (source / "red" / "bad.jpg").unlink()
    prepare("--source", source, "--out", out, "--force", "--val", 0)
    assert files(out) != before and not (out / "val").exists() and not list(tmp_path.glob(".*"))


def test_missing_images_of_a_tree_are_reported(prepare, source, tmp_path):
    out = tmp_path / "out"
    prepare("--source", source, "--out", out)
    path = rows(out)[0]["path"]
    (out / path).unlink()
    message = prepare("--source", source, "--out", out, code=2).error[0]
    assert f"1 images of {out} are missing" in message and path in message and "--force" in message


def test_force_replaces_only_a_tree_of_this_program(prepare, source, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for out in (tmp_path / "home", source, source / "red", tmp_path, tmp_path / "home" / "thesis.tex"):
        prepare("--source", source, "--out", out, "--force", code=2)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work" and len(list(source.rglob("*.png"))) == 60


@pytest.mark.parametrize("name", [".out.partial", ".out.old"])
def test_folders_of_others_beside_out_stay(prepare, source, tmp_path, name):
    """Only what this program made is removed; a dry run removes nothing, and needs neither name."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work")
    args = ["--source", source, "--out", tmp_path / "out"]
    message = prepare(*args, code=2).error[0]
    assert str(tmp_path / name) in message and "rename it" in message
    assert prepare(*args, "--dry-run").json["images"] == 60
    prepare("--source", tmp_path / "none", *args[2:], "--dry-run", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "source"]
    assert (tmp_path / name / "thesis.tex").read_text() == "years of work"


def test_download_with_the_name_of_out_is_refused(prepare, source, tmp_path):
    (tmp_path / "d").mkdir()
    url, folder = pack(source, tmp_path / "set").as_uri(), tmp_path / "d"
    args = ["--url", url, "--sha256", hash_file(tmp_path / "set")]
    for out in ("set", "Set.part"):
        assert "choose another --out" in prepare(*args, "--out", folder / out, code=2).error[0]
        assert not list(folder.iterdir())


def test_runs_that_write_nothing_need_no_folder_to_write(prepare, source, tmp_path, monkeypatch):
    """With nothing to do, or in a dry run; also while another run works on the same tree."""
    archive = pack(source, tmp_path / "s.zip")
    args = ["--source", archive, "--out", tmp_path / "d" / "out"]
    prepare(*args)
    before = stamps(tmp_path)
    monkeypatch.setattr(prepare_data, "hold_lock", lambda path: pytest.fail("takes a lock"))
    assert prepare(*args).json["changed"] is False
    assert prepare(*args, "--force", "--val", 0.5, "--dry-run").json["val"] == 30
    assert stamps(tmp_path) == before


def test_parent_folders_and_links(prepare, source, tmp_path):
    """An empty folder of the user stays, and an OUT that is a link stays a link."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    prepare("--source", tmp_path / "none", "--out", tmp_path / "mine" / "a" / "b" / "out", code=2)
    assert (tmp_path / "mine").exists() and not (tmp_path / "mine" / "a").exists()
    for _ in range(2):
        prepare("--source", source, "--out", tmp_path / "link", "--force")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "splits.csv").exists()


def test_second_run_for_the_same_tree_is_refused(prepare, source, tmp_path):
    with hold_lock(tmp_path / ".out.lock"):
        prepare("--source", source, "--out", tmp_path / "out", code=75)
    prepare("--source", source, "--out", tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_update_keeps_the_split_of_every_image(prepare, source, tmp_path):
    out = tmp_path / "out"
    args = ["--source", source, "--out", out]
    prepare(*args)
    before = split_by_content(out)
    assert "nothing to do" in prepare(*args, "--update").err
    for number in range(100, 130):
        tile((10, 10, 10), number).save(source / "red" / f"new {number}.png")
    (source / "green" / "green 0.png").rename(source / "green" / "renamed.png")
    assert "--update" in prepare(*args, code=2).error[0]
    counts = prepare(*args, "--update").json["counts"]
    after = split_by_content(out)
    assert len(after) == 90 and all(after[sha256] == split for sha256, split in before.items())
    assert [counts[part]["red"] for part in SPLITS] == [35, 5, 10]
    assert [counts[part]["green"] for part in SPLITS] == [14, 2, 4]
    assert_complete(out, 90)
    assert prepare(*args, "--update").json["changed"] is False
    for extra in (["--seed", 1], ["--val", 0.3], ["--splits", out / "splits.csv"]):
        assert "differ" in prepare(*args, "--update", *extra, code=2).error[0]
    shutil.copy(source / "red" / "red 2.png", source / "blue" / "sea.png")
    assert prepare(*args, "--update", "--on-bad", "skip", "--dry-run").json["rejected"] == 1  # the old image stays
    (source / "blue" / "sea.png").unlink()
    tile((90, 0, 0), "edited").save(source / "red" / "red 1.png")
    assert "red 1.png" in prepare(*args, "--update", code=2).error[0]
    assert split_by_content(out) == after


def test_update_with_images_of_one_class(prepare, source, tmp_path):
    """Files that are left out are named even if there is nothing new, and thus no new rejected.csv."""
    out, new = tmp_path / "out", tmp_path / "new" / "red"
    prepare("--source", source, "--out", out)
    new.mkdir(parents=True)
    shutil.copy(source / "red" / "red 0.png", new / "red 0.png")
    (new / "broken.png").write_bytes(b"no image")
    args = ["--source", new.parent, "--out", out, "--update", "--on-bad", "skip"]
    result = prepare(*args)
    assert (
        not result.json["changed"] and "red/broken.png" in result.err and "left out 1 file, listed above" in result.err
    )
    assert "nothing to do" in prepare(*args).err
    (new / "2024").mkdir()
    for number in range(3):
        tile((1, 2, 3), number).save(new / "2024" / f"{number}.png")  # the class is still red
    result = prepare(*args)
    assert (result.json["images"], result.json["classes"]) == (63, 3) and list(rejected(out)) == ["red/broken.png"]
    (tmp_path / "more" / "pink").mkdir(parents=True)
    tile((9, 2, 3), "new").save(tmp_path / "more" / "pink" / "0.png")
    log = prepare("--source", tmp_path / "more", *args[2:], "--val", 0, "--test", 0, "--dry-run").err
    assert "classes that the tree does not have yet: pink" in log


def test_update_of_a_tree_that_has_changed(prepare, source, tmp_path):
    """It keeps only the images that it made, and only those inside of the tree."""
    out, args = tmp_path / "out", ["--source", source, "--out", tmp_path / "out", "--update"]
    prepare(*args)
    tile((9, 9, 9), "new").save(source / "red" / "new.png")
    table, path = (out / "splits.csv").read_text(), out / rows(out)[0]["path"]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    assert f"1 images of {out} have changed ({rows(out)[0]['path']})" in prepare(*args, code=2).error[0]
    path.write_bytes(content)
    (tmp_path / "secret.png").write_bytes(content)
    for place in (tmp_path / "secret.png", "test/../../secret.png", "test//../../secret.png", "/"):
        (out / "splits.csv").write_text(table.replace(rows(out)[0]["path"], str(place)))
        assert "not a splits.csv of this program" in prepare(*args, code=2).error[0]
        (out / "splits.csv").write_text(table)
    assert prepare(*args).json["images"] == 61


def test_interrupt_waits_for_no_further_image(prepare, source, tmp_path, monkeypatch):
    checked = []

    def check_slowly(record):
        checked.append(record)
        if len(checked) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return check_image(record)

    check_image = prepare_data.check_image
    monkeypatch.setattr(prepare_data, "check_image", check_slowly)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # it is ignored in jobs of a shell
    prepare("--source", source, "--out", tmp_path / "out", code=130)
    assert len(checked) <= 10 and not list(tmp_path.glob(".*"))


def test_hard_links(prepare, source, tmp_path):
    message = prepare("--source", pack(source, tmp_path / "s.zip"), "--link", "hard", code=2).error[0]
    assert "--source folder" in message
    prepare("--source", source, "--out", tmp_path / "out", "--link", "hard")
    assert all((tmp_path / "out" / row["path"]).stat().st_nlink == 2 for row in rows(tmp_path / "out"))
    (tmp_path / "links" / "red").mkdir(parents=True)
    shutil.copytree(source / "blue", tmp_path / "links" / "blue")
    for image in (source / "red").iterdir():
        (tmp_path / "links" / "red" / image.name).symlink_to(f"../../source/red/{image.name}")
    prepare("--source", tmp_path / "links", "--out", tmp_path / "linked", "--link", "hard")
    assert not any((tmp_path / "linked" / row["path"]).is_symlink() for row in rows(tmp_path / "linked"))


def test_dry_run_writes_nothing(prepare, source, tmp_path, monkeypatch):
    result = prepare("--source", source, "--out", tmp_path / "out", "--dry-run")
    assert result.json["train"] == 42 and "32x32" in result.err and "RGB 60" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (source / "red" / "bad.jpg").write_bytes(b"no image")
    result = prepare("--source", pack(source, tmp_path / "s.zip"), "--out", tmp_path / "out", "--dry-run")
    assert (result.json["images"], result.json["rejected"], result.json["dry_run"]) == (60, 0, True)
    result = prepare("--source", source, "--out", tmp_path / "out", "--dry-run")
    assert (result.json["images"], result.json["rejected"]) == (60, 1) and "red/bad.jpg" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.zip", "source"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # people read the numbers; JSON would be in their way
    result = prepare("--source", source, "--out", tmp_path / "out", "--dry-run")
    assert result.out == "" and "60 images of 3 classes, not written, because of --dry-run" in result.error[0]


def test_out_below_a_file_is_an_error(prepare, source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    prepare("--source", source, "--out", tmp_path / "file" / "out", code=2)


# ---------------------------------------------------------------- download


def test_eurosat(prepare, source, tmp_path, monkeypatch):
    """The address is torchvision's, the checksum is verified before anything is unpacked, a failure leaves nothing."""
    from torchvision.datasets import EuroSAT

    assert prepare_data.EUROSAT_MD5 in inspect.getsource(EuroSAT.download)
    archive = pack(source, tmp_path / "EuroSAT.zip", prefix="2750/")
    monkeypatch.setattr(prepare_data, "EUROSAT_URL", archive.as_uri())
    out = tmp_path / "made" / "eurosat"
    message = prepare("--out", out, code=2).error[0]
    assert all(word in message for word in ("md5", "--source", "--synthetic")) and not out.parent.exists()
    monkeypatch.setattr(prepare_data, "EUROSAT_MD5", hash_file(archive, "md5"))
    assert prepare("--out", out).json["images"] == 60
    archive.unlink()  # the download is kept for the next time
    assert prepare("--out", out, "--force", "--val", 0).json["val"] == 0
    (out.parent / "EuroSAT.zip").write_bytes(b"something else")
    assert "EuroSAT.zip exists" in prepare("--out", out, "--force", code=2).error[0] and out.exists()
    shutil.rmtree(out.parent)
    message = prepare("--out", out, code=2).error[0]
    assert all(word in message for word in ("cannot download", "--source", "--synthetic")) and not out.parent.exists()


@dataclass
class Server:
    """A local web server: its address, and the Range header of each request."""

    url: str
    ranges: list[str | None]


@pytest.fixture
def serve():
    """Return a function: serve(content, fault) starts a Server of one file with a fault.

    "error 500": every request fails; "dropped": the first response ends halfway; "no ranges": the same, and the server
    ignores Range headers; "no length": the same as "dropped", and the server does not declare the length; "drips": a
    byte every 10 ms.
    """
    servers = []

    def start(content, fault=""):
        ranges = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802 (a method of BaseHTTPRequestHandler)
                ranges.append(self.headers.get("Range"))
                begin = int(ranges[-1][len("bytes=") : -1]) if ranges[-1] and fault != "no ranges" else 0
                if fault == "error 500":
                    return self.send_error(500)
                if begin >= len(content):
                    return self.send_error(416)
                self.send_response(206 if begin else 200)
                if fault != "no length":
                    self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                for number in range(100 * (fault == "drips")):
                    time.sleep(0.01)
                    self.wfile.write(content[number : number + 1])
                halfway = fault in ("dropped", "no ranges", "no length") and len(ranges) == 1
                self.wfile.write(content[begin : (begin + len(content)) // 2 if halfway else len(content)])

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return Server(f"http://127.0.0.1:{server.server_port}/set.zip", ranges)

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("fault", ["dropped", "no ranges", "no length"])
def test_interrupted_download_is_continued(prepare, source, tmp_path, serve, fault):
    content = pack(source, tmp_path / "set.zip").read_bytes()
    server, folder = serve(content, fault), tmp_path / "d"
    archive, partial = folder / "set.zip", folder / "set.zip.part"
    args = ["--url", server.url, "--sha256", hashlib.sha256(content).hexdigest(), "--out", folder / "out"]
    message = prepare(*args, code=2).error[0]
    assert "run the same command again to continue" in message
    assert fault == "no length" or f"after {len(content) // 2} of {len(content)} bytes" in message
    assert not (folder / "out").exists()
    assert partial.stat().st_size == len(content) // 2
    assert prepare(*args).json["images"] == 60
    assert server.ranges == [None, f"bytes={len(content) // 2}-"]
    assert archive.read_bytes() == content and not partial.exists()
    archive.rename(partial)  # as if killed after the last byte, before it got its name
    prepare(*args, "--force")


def test_downloads_without_end(prepare, source, tmp_path, serve, monkeypatch):
    """A slow server, one that sends too much, and a device."""
    content = pack(source, tmp_path / "set.zip").read_bytes()
    args = ["--sha256", "0" * 64, "--out", tmp_path / "d" / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "SLOW_SECONDS", 0.1)
        message = prepare("--url", serve(content, "drips").url, *args, code=2).error[0]
    assert "less than 1 KiB/s" in message and "run the same command again to continue" in message
    kept = (tmp_path / "d" / "set.zip.part").read_bytes()
    assert 0 < len(kept) < 50 and content.startswith(kept)
    shutil.rmtree(tmp_path / "d")
    monkeypatch.setattr(prepare_data, "MAX_UNDECLARED", 1000)
    for url, words in ((serve(content, "no length").url, "more than 1000 bytes"), ("file:///dev/zero", "more than 0")):
        assert words in prepare("--url", url, *args, code=2).error[0]
    assert "http://[::1/x.zip" in prepare("--url", "http://[::1/x.zip", *args, code=2).error[0]


def test_full_disk_is_named(prepare, source, tmp_path):
    """An error of a full disk names no file, neither when an archive is unpacked nor in a download."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    archive = pack(source, tmp_path / "set.zip")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "set.zip.part").symlink_to("/dev/full")
    args = ["--url", archive.as_uri(), "--sha256", hash_file(archive), "--out", tmp_path / "d" / "out"]
    message = prepare(*args, code=2).error[0]
    assert "No space left" in message and "set.zip.part" in message
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", lambda *_: open("/dev/full", "wb", buffering=0).write(b"x"))
        message = prepare("--source", archive, "--out", tmp_path / "out", code=2).error[0]
    assert "No space left" in message and ".out.partial" in message


def test_failed_and_wrong_downloads(prepare, source, tmp_path, serve):
    content = pack(source, tmp_path / "set.zip").read_bytes()
    sha256, folder = hashlib.sha256(content).hexdigest(), tmp_path / "d"
    args = ["--sha256", sha256, "--out", folder / "out"]
    assert "500" in prepare("--url", serve(content, "error 500").url, *args, code=2).error[0]
    assert not folder.exists()
    assert sha256 in prepare("--url", serve(content[:-9] + b"something").url, *args, code=2).error[0]
    assert not folder.exists()
    prepare("--url", "http://127.0.0.1:1/set.zip", "--out", folder / "out", code=2)  # no checksum
    args = ["--sha256", sha256.upper(), "--out", folder / "out"]
    assert prepare("--url", (tmp_path / "set.zip").as_uri(), *args).json["images"] == 60


# ---------------------------------------------------------------- killed runs


def test_killed_at_any_moment(source, tmp_path):
    """SIGKILL at random moments of a first run and of one that replaces a tree: there is a complete tree, or none."""
    archive, out = pack(source, tmp_path / "s.zip"), tmp_path / "out"
    line = [sys.executable, str(ROOT / "prepare_data.py"), "--source", str(archive), "--out", str(out)]
    start = time.monotonic()
    assert subprocess.run(line, capture_output=True).returncode == 0
    seconds, rng, kills = time.monotonic() - start, random.Random(0), 0
    for number in range(16):
        if number % 2:
            shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(
            [*line, "--force", "--seed", str(number + 1)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.05, 1.1) * seconds)
        kills += process.poll() is None
        process.kill()
        process.wait()
        if out.exists():
            assert_complete(out, 60)
    assert kills >= 8
    done = subprocess.run([*line, "--force", "--seed", "99"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s.zip", "source"]


def test_killed_while_the_old_tree_is_removed(prepare, source, tmp_path):
    """The rest of a replaced tree never comes back, even if the user then removes the new one."""
    out = tmp_path / "out"
    prepare("--source", source, "--out", out)
    script = (
        "import os, shutil, sys, prepare_data\n"
        "def rmtree(path, **options):\n"
        "    if path.name == 'train':\n"
        "        next(path.rglob('*.png')).unlink()\n"
        "        os._exit(9)\n"
        "shutil.rmtree = rmtree\n"
        "prepare_data.main(sys.argv[1:])\n"
    )
    line = [sys.executable, "-c", script, "--source", source, "--out", out, "--force", "--seed", "1"]
    assert subprocess.run(line, cwd=ROOT).returncode == 9 and len(rows(out)) == 60
    shutil.rmtree(out)
    prepare("--source", source, "--out", out, "--seed", 2)
    assert len(rows(out)) == 60 and sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


# ---------------------------------------------------------------- demonstration set and real data


def test_synthetic_is_seeded(prepare, tmp_path):
    args = ["--synthetic", "--per-class", 4, "--val", 0.25, "--test", 0.25]
    report = prepare(*args, "--out", tmp_path / "a").json
    assert (report["images"], report["classes"], report["test"]) == (40, 10, 10)
    prepare(*args, "--out", tmp_path / "b")
    prepare(*args, "--out", tmp_path / "c", "--seed", 1)
    a, b, c = (split_by_content(tmp_path / name) for name in "abc")
    assert a == b and len(a) == 40 and not a.keys() & c.keys()
    assert {Image.open(tmp_path / "a" / row["path"]).size for row in rows(tmp_path / "a")} == {(64, 64)}


@pytest.mark.slow
def test_real_eurosat_with_its_published_split(tmp_path):
    """The real command makes exactly the published split of all of EuroSAT, and then finds at once nothing to do."""
    splits, out = real("eurosat", "split-neumann"), tmp_path / "eurosat"
    args = ["--source", real("eurosat", "EuroSAT.zip"), "--splits", splits, "--out", out]
    done = command("prepare_data", *args)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    counts = [report[key] for key in ("images", "classes", *SPLITS)]
    assert counts == [27000, 10, 16200, 5400, 5400]
    for part in SPLITS:
        listed = set((splits / f"{part}.txt").read_text().split())
        assert {path.name for path in (out / part).glob("*/*")} == listed
    start = time.monotonic()
    assert "nothing to do" in command("prepare_data", *args).stderr
    assert time.monotonic() - start < 4  # 2 s, with room for a busy machine
