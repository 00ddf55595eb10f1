"""prepare_data.py: sources, the split, what it refuses, what it leaves behind."""
import csv
import hashlib
import http.server
import inspect
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, command, make_tree, real, tile
from PIL import Image


def rows(out):
    with open(out / "splits.csv", newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def source(tmp_path):
    return make_tree(tmp_path / "source", counts=(("", 20),))


def pack(folder, archive, prefix=""):
    with zipfile.ZipFile(archive, "w") as z:
        for path in sorted(folder.rglob("*.png")):
            z.write(path, prefix + str(path.relative_to(folder)))
    return archive


def test_folder_to_tree(run, source, tmp_path):
    out = tmp_path / "out"
    result = run("prepare_data", "--source", source, "--out", out)
    assert (result.json["images"], result.json["train"], result.json["val"], result.json["test"]) == (60, 42, 6, 12)
    assert result.json["counts"]["test"] == {"blue": 4, "green": 4, "red": 4}
    table = rows(out)
    assert len(table) == 60
    for row in table:  # each file is where its row says, with the content of the source
        content = (out / row["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        assert row["path"] == f"{row['split']}/{row['class']}/{Path(row['path']).name}"
        assert content == (source / row["class"] / Path(row["path"]).name).read_bytes()
    assert files(out) == sorted([".prepared.json", "splits.csv"] + [row["path"] for row in table])
    from torchvision.datasets import ImageFolder
    assert ImageFolder(out / "train").classes == ["blue", "green", "red"] and len(ImageFolder(out / "train")) == 42


def test_split_depends_on_content_alone(run, source, tmp_path):
    run("prepare_data", "--source", source, "--out", tmp_path / "a")
    for path in sorted(source.rglob("*.png")):
        path.rename(path.with_name("x" + path.name[::-1].replace("gnp.", "") + ".png"))
    run("prepare_data", "--source", pack(source, tmp_path / "s.zip"), "--out", tmp_path / "b")
    run("prepare_data", "--source", source, "--out", tmp_path / "c", "--seed", 1)
    a, b, c = ({row["sha256"]: row["split"] for row in rows(tmp_path / name)} for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and a != c


def test_no_val_is_the_papers_split(run, source, tmp_path):
    result = run("prepare_data", "--source", source, "--out", tmp_path / "out", "--val", 0, "--test", 0.2)
    assert (result.json["train"], result.json["val"], result.json["test"]) == (48, 0, 12)
    assert not (tmp_path / "out" / "val").exists()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_archives_with_a_wrapping_folder(run, source, tmp_path, kind):
    (source / "red" / "notes.txt").write_text("not an image")
    (source / ".ipynb_checkpoints").mkdir()
    shutil.copy(source / "red" / "red 0.png", source / ".ipynb_checkpoints" / "red 0-checkpoint.png")
    archive = tmp_path / f"s.{kind}"
    shutil.make_archive(str(tmp_path / "s"), {"tar.gz": "gztar"}.get(kind, kind), source.parent, "source")
    result = run("prepare_data", "--source", archive, "--out", tmp_path / "out")
    assert (result.json["images"], result.json["classes"], result.json["not_images"]) == (60, 3, 2)


def test_split_source_is_kept_and_val_made_from_train(run, tmp_path):
    source = make_tree(tmp_path / "source", counts=(("train", 10), ("test", 5)))
    result = run("prepare_data", "--source", source, "--out", tmp_path / "out", "--val", 0.2)
    assert result.json["counts"] == {name: {c: n for c in ("blue", "green", "red")} for name, n in (("train", 8), ("val", 2), ("test", 5))}
    assert files(tmp_path / "out" / "test") == files(source / "test")


def test_equal_images_stay_together_and_never_have_two_classes(run, source, tmp_path):
    for number in range(8):
        shutil.copy(source / "red" / f"red {number}.png", source / "red" / f"again {number}.png")
    result = run("prepare_data", "--source", source, "--out", tmp_path / "out")
    assert "8 images repeat" in result.err
    splits = {}
    for row in rows(tmp_path / "out"):
        assert splits.setdefault(row["sha256"], row["split"]) == row["split"]
    shutil.copy(source / "red" / "red 0.png", source / "blue" / "sea.png")
    error, = run("prepare_data", "--source", source, "--out", tmp_path / "out2", code=2).error
    assert "blue/sea.png" in error and "red/red 0.png" in error and not (tmp_path / "out2").exists()


@pytest.mark.parametrize("mode", ["P", "I;16", "CMYK", "RGBA", "LA", "L", "1", "I", "F", "exif"])
def test_images_of_any_mode(run, source, tmp_path, mode):
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
    run("prepare_data", "--source", source, "--out", tmp_path / "out")
    from common import read_image
    image = read_image(extra)
    assert image.mode == "RGB" and image.size == {"exif": (30, 40), "I;16": (2, 1)}.get(mode, (40, 30))
    if mode == "I;16":  # scaled, not clipped
        assert image.getpixel((1, 0)) == (155, 155, 155) and image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("damage, words", [
    (lambda s: (s / "red" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 no jpeg"), "bad.jpg"),
    (lambda s: (s / "red" / "cut.png").write_bytes((s / "red" / "red 0.png").read_bytes()[:900]), "cut.png"),
    (lambda s: [p.unlink() for p in s.rglob("*.png")], "no images"),
    (lambda s: [shutil.rmtree(s / c) for c in ("red", "green")], "one class"),
    (lambda s: shutil.copy(s / "red" / "red 0.png", s / "loose.png"), "in no class folder"),
    (lambda s: shutil.rmtree(s), "no such file or folder"),
    (lambda s: (s / "empty").mkdir(), "class folder without images: empty"),
    (lambda s: [p.unlink() for p in sorted((s / "red").iterdir())[1:]] and [p.unlink() for c in ("green", "blue") for p in
                sorted((s / c).iterdir())[2:]], None),
])
def test_bad_sources(run, source, tmp_path, damage, words):
    damage(source)
    extra = [] if words else ["--val", "0.45", "--test", "0.45"]
    error, = run("prepare_data", "--source", source, "--out", tmp_path / "new" / "out", *extra, code=2).error
    assert (words or "leave none for train") in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../climb.png", "/abs.png", "a/../../climb.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_that_climb_out_are_refused(run, source, tmp_path, name, kind):
    content = (source / "red" / "red 0.png").read_bytes()
    archive = tmp_path / f"evil.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as z:
            z.writestr(name, content)
    else:
        with tarfile.open(archive, "w") as t:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    before = files(tmp_path)
    error, = run("prepare_data", "--source", archive, "--out", tmp_path / "out", code=2).error
    assert "climbs out" in error and files(tmp_path) == before


def test_links_bombs_and_damaged_archives_are_refused(run, source, tmp_path):
    with tarfile.open(tmp_path / "link.tar", "w") as t:
        info = tarfile.TarInfo("red/link.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        t.addfile(info)
    assert "link" in run("prepare_data", "--source", tmp_path / "link.tar", "--out", tmp_path / "out", code=2).error[0]
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        with z.open("red/bomb.png", "w", force_zip64=True) as file:
            for _ in range(1030):
                file.write(bytes(1 << 20))
    assert "times its size" in run("prepare_data", "--source", tmp_path / "bomb.zip", "--out", tmp_path / "out", code=2).error[0]
    whole = pack(source, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:len(whole) // 2])
    assert "damaged" in run("prepare_data", "--source", tmp_path / "cut.zip", "--out", tmp_path / "out", code=2).error[0]
    (tmp_path / "flip.zip").write_bytes(whole[:400] + b"\x55" * 8 + whole[408:])
    assert "damaged" in run("prepare_data", "--source", tmp_path / "flip.zip", "--out", tmp_path / "out", code=2).error[0]
    shutil.make_archive(str(tmp_path / "s"), "xztar", source)
    shutil.make_archive(str(tmp_path / "s"), "tar", source)
    for name in ("s.tar.xz", "s.tar"):  # in a plain tar, a header, which tarfile would take for the end
        packed = (tmp_path / name).read_bytes()
        at = packed.index(b"./green/green 7.png") if name == "s.tar" else len(packed) // 2
        (tmp_path / name).write_bytes(packed[:at] + b"\x01" * 40 + packed[at + 40:])
        assert "damaged" in run("prepare_data", "--source", tmp_path / name, "--out", tmp_path / "out", code=2).error[0]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_existing_target_stands_until_forced(run, source, tmp_path):
    out = tmp_path / "out"
    run("prepare_data", "--source", source, "--out", out)
    before = files(out)
    error, = run("prepare_data", "--source", source, "--out", out, "--seed", 5, "--val", 0, code=2).error
    assert "--force" in error and "seed was 0, is 5" in error and "val was 0.1, is 0.0" in error
    assert "nothing to do" in (again := run("prepare_data", "--source", source, "--out", out)).err
    assert again.json["changed"] is False and again.json["images"] == 60
    (source / "red" / "bad.jpg").write_bytes(b"no jpeg")
    run("prepare_data", "--source", source, "--out", out, "--force", code=2)
    assert files(out) == before
    (source / "red" / "bad.jpg").unlink()
    run("prepare_data", "--source", source, "--out", out, "--force", "--val", 0)
    assert files(out) != before and not (out / "val").exists() and not list(tmp_path.glob(".*"))


def test_force_replaces_only_a_tree_of_ours(run, source, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for out in (tmp_path / "home", source, source / "red", tmp_path, tmp_path / "home" / "thesis.tex"):
        run("prepare_data", "--source", source, "--out", out, "--force", code=2)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work" and len(list(source.rglob("*.png"))) == 60


def test_parent_folders_and_links(run, source, tmp_path):
    """A user's own empty folder stays; an OUT that is a link is made where it points."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    run("prepare_data", "--source", tmp_path / "none", "--out", tmp_path / "mine" / "a" / "b" / "out", code=2)
    assert (tmp_path / "mine").exists() and not (tmp_path / "mine" / "a").exists()
    for _ in range(2):
        run("prepare_data", "--source", source, "--out", tmp_path / "link", "--force")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "splits.csv").exists()


def test_leaks_of_a_split_source_are_told(run, tmp_path):
    source = make_tree(tmp_path / "source", counts=(("train", 5), ("test", 5)))
    shutil.copy(source / "train" / "red" / "red 0.png", source / "test" / "red" / "leak.png")
    assert "1 images stand in more than one split" in run("prepare_data", "--source", source, "--out", tmp_path / "out", "--val", 0).err


def test_per_class_samples_by_content(run, source, tmp_path):
    shutil.copy(source / "red" / "red 0.png", source / "red" / "again.png")
    for name, archive in (("a", source), ("b", pack(source, tmp_path / "s.zip"))):
        result = run("prepare_data", "--source", archive, "--out", tmp_path / name, "--per-class", 10)
        assert result.json["counts"]["train"] == {"blue": 7, "green": 7, "red": 7} and result.json["images"] == 30
    hashes = [{row["sha256"] for row in rows(tmp_path / name)} for name in "ab"]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 30
    run("prepare_data", "--source", source, "--out", tmp_path / "c", "--per-class", 10, "--seed", 1)
    assert {row["sha256"] for row in rows(tmp_path / "c")} != hashes[0]


def test_links_in_circles_and_names_of_any_bytes(run, source, tmp_path):
    (source / "red" / "loop").symlink_to(source)
    try:
        (source / "red" / "red 0.png").rename(source / "red" / "r\udce9d\n.png")
    except OSError:
        pytest.skip("the file system allows only UTF-8 names")
    result = run("prepare_data", "--source", source, "--out", tmp_path / "out")
    assert result.json["images"] >= 60
    with open(tmp_path / "out" / "splits.csv", newline="", errors="surrogateescape") as file:
        assert any("r\udce9d\n.png" in row["path"] for row in csv.DictReader(file))


def test_a_second_preparation_waits_outside(run, source, tmp_path):
    from common import locked
    with locked(tmp_path / ".out.lock"):
        run("prepare_data", "--source", source, "--out", tmp_path / "out", code=75)
    run("prepare_data", "--source", source, "--out", tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_download(run, source, tmp_path, monkeypatch):
    """The address is torchvision's; the checksum is verified before anything is unpacked; a failure leaves nothing."""
    import prepare_data
    from torchvision.datasets import EuroSAT
    assert prepare_data.EUROSAT_MD5 in inspect.getsource(EuroSAT.download)
    archive = pack(source, tmp_path / "EuroSAT.zip", prefix="2750/")
    monkeypatch.setattr(prepare_data, "EUROSAT_URL", archive.as_uri())
    out = tmp_path / "made" / "eurosat"
    error, = run("prepare_data", "--out", out, code=2).error
    assert "md5" in error and "--source" in error and "--synthetic" in error and not out.parent.exists()
    monkeypatch.setattr(prepare_data, "EUROSAT_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert run("prepare_data", "--out", out).json["images"] == 60
    archive.unlink()  # the download is kept for the next time
    assert run("prepare_data", "--out", out, "--force", "--val", 0).json["val"] == 0
    shutil.rmtree(out.parent)
    error, = run("prepare_data", "--out", out, code=2).error
    assert "cannot download" in error and "--source" in error and "--synthetic" in error and not out.parent.exists()


@pytest.fixture
def serve(tmp_path):
    """serve(content, mode) -> (address, log of Range headers): a local server that misbehaves as asked."""
    servers = []

    def start(content, mode):
        seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(self.headers.get("Range"))
                begin = int(seen[-1][6:-1]) if seen[-1] and mode != "no ranges" else 0
                if mode == "500":
                    return self.send_error(500)
                if begin >= len(content):
                    return self.send_error(416)
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                end = begin + (len(content) - begin) // 2 if mode in ("drops", "no ranges") and len(seen) == 1 else len(content)
                self.wfile.write(content[begin:end])

            def log_message(self, *_):
                pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/set.zip", seen
    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("mode", ["drops", "no ranges"])
def test_a_dropped_download_goes_on(run, source, tmp_path, serve, mode):
    content = pack(source, tmp_path / "set.zip").read_bytes()
    url, seen = serve(content, mode)
    args = ["--url", url, "--sha256", hashlib.sha256(content).hexdigest(), "--out", tmp_path / "d" / "out"]
    error, = run("prepare_data", *args, code=2).error
    assert f"{len(content) // 2} of {len(content)} bytes" in error and not (tmp_path / "d" / "out").exists()
    assert (tmp_path / "d" / "set.zip.part").stat().st_size == len(content) // 2
    assert run("prepare_data", *args).json["images"] == 60
    assert seen == [None, f"bytes={len(content) // 2}-"]
    assert (tmp_path / "d" / "set.zip").read_bytes() == content and not (tmp_path / "d" / "set.zip.part").exists()
    (tmp_path / "d" / "set.zip").rename(tmp_path / "d" / "set.zip.part")  # killed between the last byte and the renaming
    run("prepare_data", *args, "--force")


def test_servers_that_fail_or_lie(run, source, tmp_path, serve):
    content = pack(source, tmp_path / "set.zip").read_bytes()
    good = hashlib.sha256(content).hexdigest()
    error, = run("prepare_data", "--url", serve(content, "500")[0], "--sha256", good, "--out", tmp_path / "d" / "out", code=2).error
    assert "500" in error and not (tmp_path / "d").exists()
    error, = run("prepare_data", "--url", serve(content[:-9] + b"something", "")[0], "--sha256", good, "--out", tmp_path / "d" / "out", code=2).error
    assert good in error and not (tmp_path / "d").exists()
    run("prepare_data", "--url", "http://127.0.0.1:1/set.zip", "--out", tmp_path / "d" / "out", code=2)  # no checksum
    result = run("prepare_data", "--url", (tmp_path / "set.zip").as_uri(), "--sha256", good.upper(), "--out", tmp_path / "d" / "out")
    assert result.json["images"] == 60


def test_bad_images_can_be_skipped(run, source, tmp_path):
    (source / "red" / "bad.jpg").write_bytes(b"no image")
    result = run("prepare_data", "--source", source, "--out", tmp_path / "out", "--on-bad", "skip")
    assert (result.json["images"], result.json["rejected"]) == (60, 1)
    with open(tmp_path / "out" / "rejected.csv", newline="") as file:
        row, = csv.DictReader(file)
    assert row["path"] == "red/bad.jpg" and row["reason"]


def test_update_keeps_every_assignment(run, source, tmp_path):
    out = tmp_path / "out"
    args = ["--source", source, "--out", out]
    run("prepare_data", *args)
    before = {row["sha256"]: row["split"] for row in rows(out)}
    assert "nothing to do" in run("prepare_data", *args, "--update").err
    for number in range(100, 130):
        tile((10, 10, 10), number).save(source / "red" / f"new {number}.png")
    (source / "green" / "green 0.png").rename(source / "green" / "renamed.png")
    assert "--update" in run("prepare_data", *args, code=2).error[0]
    result = run("prepare_data", *args, "--update")
    after = {row["sha256"]: row["split"] for row in rows(out)}
    assert len(after) == 90 and all(after[sha256] == split for sha256, split in before.items())
    assert [result.json["counts"][part]["red"] for part in ("train", "val", "test")] == [35, 5, 10]
    assert [result.json["counts"][part]["green"] for part in ("train", "val", "test")] == [14, 2, 4]
    for row in rows(out):
        assert hashlib.sha256((out / row["path"]).read_bytes()).hexdigest() == row["sha256"]
    assert run("prepare_data", *args, "--update").json["changed"] is False
    for extra in (["--seed", 1], ["--val", 0.3], ["--splits", out / "splits.csv"]):
        assert "differ" in run("prepare_data", *args, "--update", *extra, code=2).error[0]
    tile((90, 0, 0), "edited").save(source / "red" / "red 1.png")
    assert "red 1.png" in run("prepare_data", *args, "--update", code=2).error[0]
    assert {row["sha256"]: row["split"] for row in rows(out)} == after


def test_splits_of_ours_and_published_lists(run, source, tmp_path):
    run("prepare_data", "--source", source, "--out", tmp_path / "a", "--seed", 3)
    wanted = {row["sha256"]: row["split"] for row in rows(tmp_path / "a")}
    lists = tmp_path / "lists"
    lists.mkdir()
    for part in ("train", "val", "test"):
        names = [Path(row["path"]) for row in rows(tmp_path / "a") if row["split"] == part]
        (lists / f"{part}.txt").write_text("".join(f"{p.parent.name}/{p.name}\n" if part == "val" else f"{p.name}\n" for p in names))
    archive = pack(source, tmp_path / "s.zip", prefix="wrap/")
    for number, splits in enumerate((tmp_path / "a" / "splits.csv", lists)):
        run("prepare_data", "--source", archive, "--out", tmp_path / f"b{number}", "--splits", splits)
        assert {row["sha256"]: row["split"] for row in rows(tmp_path / f"b{number}")} == wanted
    few = run("prepare_data", "--source", archive, "--out", tmp_path / "few", "--splits", lists, "--per-class", 2).json
    assert few["counts"] == {part: {"blue": 2, "green": 2, "red": 2} for part in ("train", "val", "test")}
    train, test = (lists / "train.txt").read_text(), (lists / "test.txt").read_text()
    (lists / "train.txt").write_text(train.split("\n", 1)[1] + "ghost 1.png\n" + test.split("\n")[0] + "\n")
    error, = run("prepare_data", "--source", archive, "--out", tmp_path / "c", "--splits", lists, code=2).error
    assert "1 names are not in the source (ghost 1.png)" in error and "1 names are doubled" in error and "1 names of the source are in no list" in error
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    run("prepare_data", "--source", archive, "--out", tmp_path / "c", "--splits", tmp_path / "odd.csv", code=2)
    run("prepare_data", "--source", archive, "--out", tmp_path / "c", "--splits", tmp_path / "none", code=2)


def test_names_in_a_zip_without_the_flag_of_utf8(run, source, tmp_path):
    """As `zip` of some systems writes them; names that are no UTF-8 stay as the old code page has them."""
    class Unflagged(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):
            return self.filename.encode(encoding), self.flag_bits & ~0x800

    for encoding, name in (("utf-8", "M\u00fcll"), ("cp437", "\u00e9t\u00e9")):
        with zipfile.ZipFile(tmp_path / f"{encoding}.zip", "w") as archive:
            for path in sorted(source.rglob("*.png")):
                folder = name if path.parent.name == "red" else path.parent.name
                archive.writestr(Unflagged(f"{folder}/{path.name}"), path.read_bytes())
        run("prepare_data", "--source", tmp_path / f"{encoding}.zip", "--out", tmp_path / encoding)
        assert {row["class"] for row in rows(tmp_path / encoding)} == {"blue", "green", name}


def test_hard_links_and_dry_run(run, source, tmp_path):
    assert "--source folder" in run("prepare_data", "--source", pack(source, tmp_path / "s.zip"), "--link", "hard", code=2).error[0]
    (tmp_path / "s.zip").unlink()
    result = run("prepare_data", "--source", source, "--out", tmp_path / "out", "--dry-run")
    assert result.json["train"] == 42 and "32x32" in result.err and "RGB 60" in result.err and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    run("prepare_data", "--source", source, "--out", tmp_path / "out", "--link", "hard")
    assert all((tmp_path / "out" / row["path"]).stat().st_nlink == 2 for row in rows(tmp_path / "out"))


def test_killed_at_any_moment(source, tmp_path):
    """SIGKILL at random moments, of a first preparation and of one that replaces: the tree is whole or absent, each time."""
    archive, out = pack(source, tmp_path / "s.zip"), tmp_path / "out"
    base = [sys.executable, str(ROOT / "prepare_data.py"), "--source", str(archive), "--out", str(out)]
    start = time.monotonic()
    assert subprocess.run(base, capture_output=True).returncode == 0
    whole, rng, kills, seeds = time.monotonic() - start, random.Random(0), 0, [0]
    for round in range(16):
        if round % 2:
            shutil.rmtree(out, ignore_errors=True)
        seeds.append(round + 1)
        process = subprocess.Popen([*base, "--force", "--seed", str(seeds[-1])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.05, 1.1) * whole)
        kills += process.poll() is None
        process.kill()
        process.wait()
        if out.exists():
            assert len(rows(out)) == 60
            for row in rows(out):
                assert hashlib.sha256((out / row["path"]).read_bytes()).hexdigest() == row["sha256"]
    assert kills >= 8
    done = subprocess.run([*base, "--force", "--seed", "99"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s.zip", "source"]


def test_killed_while_the_old_tree_is_removed(run, source, tmp_path):
    """What is left of a replaced tree never comes back, not even when the new one is then removed by hand."""
    out = tmp_path / "out"
    run("prepare_data", "--source", source, "--out", out)
    dying = ("import os, pathlib, shutil, sys, prepare_data\n"
             "def rmtree(path, **options):\n"
             "    list_of_files = pathlib.Path(path, 'splits.csv')\n"
             "    if list_of_files.exists():\n"
             "        list_of_files.unlink()\n"
             "        os._exit(9)\n"
             "shutil.rmtree = rmtree\n"
             "prepare_data.main(sys.argv[1:])\n")
    killed = subprocess.run([sys.executable, "-c", dying, "--source", source, "--out", out, "--force", "--seed", "1"], cwd=ROOT)
    assert killed.returncode == 9 and len(rows(out)) == 60
    shutil.rmtree(out)
    run("prepare_data", "--source", source, "--out", out, "--seed", 2)
    assert len(rows(out)) == 60 and sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_synthetic_is_seeded(run, tmp_path):
    result = run("prepare_data", "--synthetic", "--per-class", 4, "--out", tmp_path / "a", "--val", 0.25, "--test", 0.25)
    assert (result.json["images"], result.json["classes"], result.json["test"]) == (40, 10, 10)
    run("prepare_data", "--synthetic", "--per-class", 4, "--out", tmp_path / "b", "--val", 0.25, "--test", 0.25)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert {Image.open(tmp_path / "a" / row["path"]).size for row in rows(tmp_path / "a")} == {(64, 64)}


def test_unwritable_output(run, source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run("prepare_data", "--source", source, "--out", tmp_path / "file" / "out", code=2)


def test_real_eurosat_with_its_published_split(tmp_path):
    """The whole of EuroSAT by the real command: exactly the published split, and at once when there is nothing to do."""
    args = ["--source", real("eurosat", "EuroSAT.zip"), "--splits", real("eurosat", "split-neumann"), "--out", tmp_path / "eurosat"]
    done = command("prepare_data", *args)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["images"], result["classes"], result["train"], result["val"], result["test"]) == (27000, 10, 16200, 5400, 5400)
    for part in ("train", "val", "test"):
        listed = set(real("eurosat", "split-neumann", f"{part}.txt").read_text().split())
        assert {path.name for path in (tmp_path / "eurosat" / part).glob("*/*")} == listed
    start = time.monotonic()
    assert "nothing to do" in command("prepare_data", *args).stderr
    assert time.monotonic() - start < 4  # 2 s, with room for a busy machine
