"""predict.py: a record for each image, in order, for any input; the pages of --plot; maps of scenes."""

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref
import zipfile

import pytest
import torch
import torchvision
from conftest import COLORS, ROOT, command, load_pt, read_csv, real, tile
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import EpsImagePlugin, Image, ImageDraw
from torchvision.transforms.v2 import functional

import common
import predict
from common import (
    IMAGE_EXTENSIONS,
    IMAGE_FORMATS,
    VIEWS,
    Checkpoint,
    InferenceModel,
    in_batches,
    load_pretrained,
    read_batches,
)


@pytest.fixture
def images(tmp_path):
    """A folder of images, some in a folder inside it: 0.png is blue, 1.png green, 2.png and the last one red."""
    folder = tmp_path / "in put"
    (folder / "sub").mkdir(parents=True)
    for number, (name, color) in enumerate(COLORS.items()):
        tile(color, name).save(folder / f"{number}.png")
    tile(COLORS["red"], 9, (50, 20)).save(folder / "sub" / 'wide, "quoted".PNG')
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def classify(run, trained):
    """Return a function that runs predict.py with the trained model."""

    def call(*argv, model=trained.model, code=0):
        return run("predict", "--checkpoint", model, *argv, code=code)

    return call


def records(text):
    """Return the records of CSV output."""
    return list(csv.DictReader(io.StringIO(text, newline="")))


def classes(text):
    return [row["class"] for row in records(text)]


def save_changed(trained, path, **changes):
    """Save a copy of the trained checkpoint with some entries changed, and return its path."""
    torch.save({**load_pt(trained.model), **changes}, path)
    return path


# ---------------------------------------------------------------- records


def test_folder_files_and_formats(classify, images):
    rows = records(classify(images, images / "2.png").out)
    assert [row["class"] for row in rows] == ["blue", "green", "red", "red", "red"]
    names = "0.png", "1.png", "2.png", 'sub/wide, "quoted".PNG', "2.png"
    assert [row["path"] for row in rows] == [str(images / name) for name in names]
    assert all(0.5 < float(row["probability"]) <= 1 and not row["error"] for row in rows)
    lines = [json.loads(line) for line in classify(images, "--format", "jsonl", "--top-k", 9).out.splitlines()]
    assert lines[0]["class"] == "blue" and [len(line["rest"]) for line in lines] == [2] * 4
    total = lines[0]["probability"] + sum(other["probability"] for other in lines[0]["rest"])
    assert total == pytest.approx(1, abs=1e-5)
    table = classify(images / "0.png", "--format", "table", "--top-k", 2).out
    assert "blue" in table and "0.png" in table and "%" in table
    (top2,) = records(classify(images / "0.png", "--top-k", 2).out)
    assert list(top2) == ["path", "class", "probability", "class_2", "probability_2", "error"]


def test_every_format_is_found_in_folders(classify, tmp_path):
    """What is read when it is named is found in a folder, by the names that Pillow knows for its formats."""
    Image.init()
    extensions = {extension for extension, name in Image.EXTENSION.items() if name in (*IMAGE_FORMATS, "MPO")}
    assert extensions <= set(IMAGE_EXTENSIONS)  # older versions know fewer
    image = tile(COLORS["red"], 1)
    for number, extension in enumerate((".jfif", ".JPE", ".tif", ".pnm", ".webp", ".bmp")):
        image.save(tmp_path / f"{number}{extension}")
    image.save(tmp_path / "9.mpo", save_all=True, append_images=[tile(COLORS["blue"], 2)])
    assert Image.open(tmp_path / "9.mpo").format == "MPO"
    (tmp_path / "9.mpo").rename(tmp_path / "9.jpg")
    result = classify(tmp_path)
    assert classes(result.out) == ["red"] * 7 and result.out == classify(*sorted(tmp_path.iterdir())).out


@pytest.mark.skipif(os.name != "posix", reason="the program is a shell script")
def test_postscript_does_not_start_ghostscript(run, classify, images, tmp_path, monkeypatch):
    """Pillow decides by the content of a file: it would run `gs` for an EPS file that is called .png."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # look for it again
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n"
    (images / "1.png").write_bytes(header + b"showpage\n%%EOF\n")
    assert "not a JPEG" in records(classify(images / "1.png", code=3).out)[0]["error"]
    assert "not a JPEG" in classify("--scene", images / "1.png", "--out", tmp_path / "map", code=2).error[0]
    (tmp_path / "data").mkdir()
    images.rename(tmp_path / "data" / "red")
    (tmp_path / "data" / "green").mkdir()
    tile(COLORS["green"], 7).save(tmp_path / "data" / "green" / "a.png")
    error = run("prepare_data", "--source", tmp_path / "data", "--out", tmp_path / "out", code=2).error[0]
    assert "red/1.png (not a JPEG" in error and not (tmp_path / "started").exists()


def test_classes_are_ranked_by_probability_and_ties_by_class_order():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2], dtype=torch.float64)
    best = predict.Prediction("x.png", probabilities=probabilities).rank(list("abcde"), 4)
    assert best == [("c", 0.3), ("b", 0.2), ("d", 0.2), ("e", 0.2)]


def test_a_bad_image_is_a_record(classify, images):
    (images / "1.png").write_bytes(b"not an image")
    result = classify(images, images / "gone.png", "--format", "jsonl", code=3)
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert ["error" in row for row in rows] == [False, True, False, False, True]
    assert rows[1] == {"path": str(images / "1.png"), "error": rows[1]["error"]}
    assert "no such file" in rows[4]["error"] and "2 of 5" in result.err
    (row,) = records(classify(images / "1.png", code=3).out)
    assert row["error"] and not row["class"]
    assert classify(images / "1.png", "--format", "table", code=3).out.startswith("error:  ")


def test_paths_from_stdin_in_a_pipe(trained, images):
    names = "\n".join(str(images / f"{number}.png") for number in (2, 0, 1)) + "\n"
    done = command("predict", "--checkpoint", trained.model, "-", input=names)
    assert done.returncode == 0 and classes(done.stdout) == ["red", "blue", "green"]


def test_temperature_and_agreement_with_evaluate(run, trained, classify, tree, tmp_path):
    run("evaluate", "--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "report")
    expected = {row["path"]: row for row in read_csv(tmp_path / "report" / "predictions.csv")}
    rows = records(classify(tree / "test").out)
    assert len(rows) == len(expected) == 30
    for row in rows:
        assert row["class"] == expected[row["path"]]["predicted"]
        assert float(row["probability"]) == pytest.approx(float(expected[row["path"]]["probability"]), abs=1e-4)
    hot = save_changed(trained, tmp_path / "hot.pt", temperature=99.0)
    assert float(records(classify(tree / "test", model=hot).out)[0]["probability"]) < 0.36


def test_shapes_and_modes(classify, tmp_path):
    Image.new("RGB", (1, 1), COLORS["red"]).save(tmp_path / "a.png")
    Image.new("RGB", (30000, 3), COLORS["red"]).save(tmp_path / "b.png")
    tile(COLORS["green"], 1, (7, 900)).convert("P").save(tmp_path / "c.png")
    tile(COLORS["blue"], 1).convert("RGBA").save(tmp_path / "d.png")
    tile(COLORS["blue"], 1).convert("CMYK").save(tmp_path / "e.jpg")
    assert classes(classify(tmp_path).out) == ["red", "red", "green", "blue", "blue"]


def test_a_folder_without_images_is_an_error(classify, images, tmp_path):
    (tmp_path / "empty").mkdir()
    result = classify(images, tmp_path / "empty", code=2)
    assert "empty" in result.error[0] and result.out == ""


def test_names_of_any_bytes(trained, images, tmp_path):
    name = images / "caf\udce9 $x$ \n.png"
    try:
        (images / "0.png").rename(name)
    except OSError:
        pytest.skip("the file system allows only UTF-8 names")
    argv = "predict", "--checkpoint", trained.model
    done = command(*argv, images, "--plot", tmp_path / "plot.png", errors="surrogateescape")
    assert done.returncode == 0 and [row["path"] for row in records(done.stdout)][2] == str(name)
    paths = f"{images}/2.png\n{images}/caf\udce9.png\n"
    done = command(*argv, "-", input=paths, errors="surrogateescape")
    assert done.returncode == 3 and classes(done.stdout) == ["red", ""]


def test_names_that_no_font_has(trained, classify, images, tmp_path):
    """A class name that is not UTF-8 and a file name with a carriage return: CSV can be parsed, the page is drawn."""
    names = ["bad\udcff", "two\nlines", "\u6c34"]
    odd = save_changed(trained, tmp_path / "odd.pt", classes=names)
    (images / "0.png").rename(images / "return\r.png")
    line = [sys.executable, ROOT / "predict.py", "--checkpoint", odd, images, "--plot", tmp_path / "plot.png"]
    done = subprocess.run(list(map(str, line)), capture_output=True, timeout=300)  # bytes: \r must stay what it is
    assert done.returncode == 0 and b"Warning" not in done.stderr and (tmp_path / "plot.png").exists()
    rows = records(done.stdout.decode("utf-8", "surrogateescape"))
    assert str(images / "return\r.png") in {row["path"] for row in rows}
    assert {row["class"] for row in rows} == set(names)


def test_letters_that_no_font_has_are_escaped_in_pictures(trained, classify, images, mosaic, tmp_path, monkeypatch):
    own = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    for number, letter in enumerate(("\u6c34", r"\u6c34")):  # the second name is the escape of the first
        model = save_changed(trained, tmp_path / "model.pt", classes=[f"{name} {letter}" for name in COLORS])
        common.fit_text.cache_clear()
        classify(images / "0.png", "--plot", tmp_path / f"plot-{number}.png", model=model)
        classify("--scene", mosaic[0], "--tile", 32, "--out", tmp_path / f"map-{number}", model=model)
    for name in ("plot-{}.png", "map-{}/map.png"):
        first, second = (Image.open(tmp_path / name.format(number)).tobytes() for number in range(2))
        assert first == second
    common.fit_text.cache_clear()


def test_a_path_that_the_system_refuses_is_a_record(classify, images):
    assert classes(classify(images / f"{300 * 'a'}.png", images / "2.png", code=3).out) == ["", "red"]


def test_broken_exif_does_not_make_an_image_unreadable(classify, images):
    Image.open(images / "2.png").save(images / "3.png", exif=b"II*\0")
    assert classes(classify(images / "3.png").out) == ["red"]


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_closed_pipe_ends_it_quietly(trained, tree):
    script = f"'{sys.executable}' '{ROOT}/predict.py' --checkpoint '{trained.model}' -"
    line = f"yes '{tree}/test/red/red 0.png' | head -500 | {script} | head -2"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.splitlines()
    assert len(done.stdout.splitlines()) == 2 and "device: " in line


def test_min_confidence(classify, images):
    argv = images, "--top-k", 2
    everything = records(classify(*argv).out)
    least = sorted(float(row["probability"]) for row in everything)[2] - 1e-6

    def table(least):
        return classify(*argv, "--format", "table", "--min-confidence", least).out.splitlines()

    rows = records(classify(*argv, "--min-confidence", least).out)
    assert [row["class"] == "unknown" for row in rows].count(True) == 2
    for row, before in zip(rows, everything):
        if float(before["probability"]) >= least:
            assert row == before
        else:  # the most probable class comes second
            second = {"class_2": before["class"], "probability_2": before["probability"]}
            assert row == {**before, "class": "unknown", **second}
    for line, row, before in zip(table(least), rows, everything):
        unknown = row["class"] == "unknown"
        label = f"unknown ({before['class']} {float(before['probability']):.1%})" if unknown else before["class"]
        assert label in line and ("unknown" in line) == unknown and f"{float(before['probability_2']):7.2%}" in line
    assert len({line.index(str(images)) for line in table(least)}) == 1  # columns are aligned
    assert set(classes(classify(images, "--min-confidence", 0).out)) == set(COLORS)
    assert "between 0 and 1" in classify(images, "--min-confidence", 1.5, code=2).error[0]


def test_results_do_not_depend_on_the_batch(run, trained, classify, tree, tmp_path):
    """An image has the same probabilities alone, in a full batch, among bad images, and in evaluate.py."""
    paths = sorted((tree / "test").glob("*/*"))
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 0.02)):
        hardware = "--precision", precision, "--device", "cpu"
        run("evaluate", "--checkpoint", trained.model, *hardware, "--data", tree, "--out", tmp_path / precision)
        expected = {row["path"]: row for row in read_csv(tmp_path / precision / "predictions.csv")}
        argv = *hardware, "--top-k", 2
        outputs = [classify(*argv, path).out for path in paths[::7]]
        outputs.append(classify(*argv, *paths).out)
        mixed = [argument for path in paths for argument in (path, "gone.png")]
        outputs.append(classify(*argv, *mixed, code=3).out)
        for row in (row for output in outputs for row in records(output) if not row["error"]):
            probability = float(row["probability"])
            assert probability == pytest.approx(float(expected[row["path"]]["probability"]), abs=tolerance)
            is_tie = probability - float(row["probability_2"]) < tolerance
            assert row["class"] == expected[row["path"]]["predicted"] or is_tie


# ---------------------------------------------------------------- paths on stdin, and memory


def test_nul_separated_paths(trained, images):
    (images / "0.png").rename(images / "new\nline.png")
    names = "\0".join(str(images / name) for name in ("2.png", "new\nline.png")) + "\0"
    for arguments in (["-0"], ["-", "-0"], ["--null", "-"]):
        done = command("predict", "--checkpoint", trained.model, *arguments, input=names)
        assert done.returncode == 0 and classes(done.stdout) == ["red", "blue"]
    names = f"{images}/2.png\r\n\n{images}/1.png"  # the last line is not terminated
    assert classes(command("predict", "--checkpoint", trained.model, "-", input=names).stdout) == ["red", "green"]


def test_a_slow_producer_gets_each_record_at_once(trained, images):
    argv = [sys.executable, ROOT / "predict.py", "--checkpoint", trained.model, "-", "--format", "jsonl"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(60, process.kill)  # otherwise a script that waits for a full batch waits forever
        timer.start()
        for number in (2, 0, 1):
            print(images / f"{number}.png", file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line and json.loads(line)["path"].endswith(f"{number}.png")
        timer.cancel()
        process.stdin.close()
        assert process.stdout.read() == "" and process.wait() == 0


def test_batches_are_full_unless_paths_pause():
    ahead = most_ahead = 0  # paths that were taken and whose batch has not yet been returned

    def read(number, _size):
        return Image.new("RGB", (8, 8), (number % 256, 0, 0))

    def paths():
        nonlocal ahead, most_ahead
        for number in range(5000):
            ahead += 1
            most_ahead = max(most_ahead, ahead)
            yield number
            if number == 20:
                yield None

    sizes, seen = [], []
    batches = in_batches(paths(), 16)
    for batch in filter(None, read_batches(batches, {"size": 8, "interpolation": "bilinear"}, 2, read)):
        ahead -= len(batch.items)
        sizes.append(len(batch.items))
        seen += batch.items
        assert batch.pixels[:, 0, 0, 0].tolist() == [number % 256 for number in batch.items] and not batch.errors
    assert seen == list(range(5000)) and sizes[:3] == [16, 5, 16] and set(sizes[2:-1]) == {16}
    assert most_ahead <= 16 * 6  # a batch, and two chunks for each thread, for any number of paths


def test_large_images_are_in_memory_one_at_a_time(classify, images, monkeypatch):
    """Whatever the number of threads; nine small PNG files of 177 million pixels took 19 GB."""
    preprocess, pictures, alive = common.preprocess, [], []

    def observe(images, preprocessing):
        pictures.extend(map(weakref.ref, images))
        time.sleep(0.01)
        alive.append(sum(picture() is not None for picture in pictures))
        return preprocess(images, preprocessing)

    monkeypatch.setattr(common, "preprocess", observe)
    monkeypatch.setattr(common, "READ_CHUNK", 3)
    monkeypatch.setattr(common, "LARGE_IMAGE", 1000)
    files = sorted(images.glob("*.png")) * 6
    assert len(classes(classify(*files, "--workers", 4).out)) == 18 and set(alive) == {1}
    alive.clear()
    monkeypatch.setattr(common, "LARGE_IMAGE", 1024)
    classify(*files, "--workers", 4)
    assert 1 < max(alive) <= 4  # one for each thread


NO_MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_too_little_memory_is_one_line(classify, images, monkeypatch, error):
    """Of a batch, half is tried."""
    forward, expected = InferenceModel._forward_batch, classes(classify(images).out)

    def limited(model, pixels):
        if len(pixels) > 1 and not isinstance(error, ImportError):
            raise error
        return forward(model, pixels)

    def fail(*_):
        raise error

    monkeypatch.setattr(InferenceModel, "_forward_batch", limited)
    assert classes(classify(images).out) == expected
    monkeypatch.setattr(predict, "read_checkpoint", fail)
    message = classify(images, code=2).error[0]
    assert message == f"predict.py: error: not enough memory: {error}".removesuffix(": ")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(trained, images):
    script = """
import re, sys
sys.path.insert(0, sys.argv.pop(1))
import predict
code = predict.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""

    def peak(count):
        """Return the largest memory in MiB of a run over `count` images."""
        line = [sys.executable, "-c", script, ROOT, "--checkpoint", trained.model, "-"]
        paths = f"{images}/2.png\n" * count
        done = subprocess.run(list(map(str, line)), input=paths, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and done.stdout.count("red") == count, done.stderr
        return int(done.stderr.split()[-1]) / 1024

    assert peak(6000) - peak(500) < 40


# ---------------------------------------------------------------- pictures


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that predict.py saves during the test."""
    saved, save = [], predict.save_figure
    monkeypatch.setattr(predict, "save_figure", lambda path, figure: (saved.append(figure), save(path, figure)))
    return saved


def test_pages_of_pictures(classify, tree, images, tmp_path):
    classify(images / "0.png", "--plot", tmp_path / "one.png")
    classify(tree / "test", "--plot", tmp_path / "many.png")  # 30 images: 18 on the first page
    heights = [Image.open(tmp_path / name).height for name in ("many.png", "many-2.png", "one.png")]
    assert heights[0] > heights[1] > heights[2] and not (tmp_path / "many-3.png").exists()
    classify(*sorted((tree / "test").glob("*/*"))[:18], "--plot", tmp_path / "full.png")
    assert (tmp_path / "full.png").exists() and not (tmp_path / "full-2.png").exists()
    for file, word in (("no/x.png", "no such folder"), ("in put", "is a folder"), ("plot.jpg", "end in .png")):
        assert word in classify(images, "--plot", tmp_path / file, code=2).error[0]
    assert "is a folder" in classify(images, "--plot", ".", code=2).error[0]


def test_no_output_replaces_an_input(trained, classify, images, tmp_path, monkeypatch):
    """Not even a later page of --plot, or an input with another name; nothing is written."""
    (images / "0-2.png").write_bytes((images / "1.png").read_bytes())
    (tmp_path / "link.png").symlink_to(images / "0.png")
    (tmp_path / "model.pt2").write_bytes(trained.model.read_bytes())
    before = {file: file.read_bytes() for file in [*images.rglob("*.*"), tmp_path / "model.pt2"]}
    one, model = images / "0.png", tmp_path / "model.pt2"
    for argv in (
        (one, "--plot", one),
        (tmp_path / "link.png", "--plot", one),
        (images / "2.png", images / "0-2.png", "--plot", one),
        (one, "--features", one),
        (one, "--features", model),
        ("--export", model),
    ):
        result = classify(*argv, model=model, code=2)
        assert "would replace" in result.error[0] and result.out == ""
    assert "choose another place" in classify(images, "--plot", images / "sub" / "new.png", code=2).error[0]
    paths = io.BytesIO(f"{images}/1.png\n{images}/0-2.png".encode())  # this one would be the second page
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(buffer=paths))
    assert "would replace" in classify("-", "--plot", one, code=2).error[0]
    assert all(file.read_bytes() == content for file, content in before.items())


def test_grad_cam_is_high_where_the_color_of_the_class_is():
    """A network that measures how red, how green and how blue an image is: each class is found on its color's patch."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 3, 3, padding=1),
        torch.nn.BatchNorm2d(3),
        torch.nn.ReLU(inplace=True),
        torch.nn.AvgPool2d(8),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(3, 3),
    ).eval()
    with torch.no_grad():
        network[0].weight.copy_((1.5 * torch.eye(3) - 0.5)[:, :, None, None].expand(3, 3, 3, 3))
        network[0].bias.zero_()
        network[6].weight.copy_(2 * torch.eye(3) - 1)  # the other colors count against a class
    preprocessing = {"size": 64, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}
    checkpoint = Checkpoint(
        "none", {"num_classes": 3}, preprocessing, network, list(COLORS), 1.0, 1.0, [(0, False)], {}, {}, {}
    )
    model = InferenceModel(checkpoint, torch.device("cpu"), "fp32")
    image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    image[0, :16, :16], image[1, 48:, 8:24], image[2, 24:40, 48:] = 250, 250, 250
    patches = (slice(0, 2), slice(0, 2)), (slice(6, 8), slice(1, 3)), (slice(3, 5), slice(6, 8))
    for target, patch in enumerate(patches):
        cam = predict.grad_cam(model, image, target)
        assert cam.shape == (8, 8) and cam.min() >= 0 and cam.max() == 1
        assert cam[patch].min() > 0.9 and cam.sum() < 4.5  # four cells, and a margin
    assert predict.grad_cam(model, torch.zeros_like(image), 0).max() == 0  # nothing supports the class
    assert not any(module._forward_hooks for module in network.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_grad_cam_beside_each_image(classify, images, figures, tmp_path):
    plain = classify(images, "--plot", tmp_path / "plain.png")
    explained = classify(images, "--plot", tmp_path / "cam.png", "--explain", "--min-confidence", 0)
    assert explained.out == plain.out
    for file in ("plain.png", "cam.png"):  # the text is readable on a screen
        assert Image.open(tmp_path / file).width < 1440
    *axes, key = figures[1].axes
    assert "support" in key.get_xlabel()
    for image, heat, bars in list(zip(axes[::3], axes[1::3], axes[2::3]))[:4]:
        ((shown,), (map_of_support,)) = image.images, heat.images  # side by side, not one over the other
        assert shown.get_alpha() is None and map_of_support.get_clim() == (0, 1)
        assert image.get_xlim() == heat.get_xlim() and image.get_ylim() == heat.get_ylim()
        assert image.get_position().y1 == pytest.approx(bars.get_position().y1, abs=0.01)  # the rows are aligned
    assert "--plot" in classify(images, "--explain", code=2).error[0]


def test_titles_of_unknown_images_and_long_names(trained, classify, images, figures, tmp_path):
    """They do not reach into the next picture."""
    long = save_changed(trained, tmp_path / "long.pt", classes=[f"{letter} {letter * 60}" for letter in "abc"])
    classify(images, "--plot", tmp_path / "plot.png", "--min-confidence", 1, model=long)
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    boxes = [axes.title.get_window_extent(renderer) for axes in figures[0].axes if axes.get_title()]
    assert len(boxes) == 8 and not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)
    assert all(axes.get_title().startswith("unknown\n(") for axes in figures[0].axes[1:6:2])


NETWORKS = {"densenet121": True, "convnext_tiny": True, "regnet_y_400mf": True, "swin_t": True, "vit_b_32": False}


@pytest.mark.parametrize("arch, supported", NETWORKS.items())
def test_grad_cam_of_other_networks(trained, classify, images, tmp_path, arch, supported):
    kwargs = {"num_classes": 3, **({"image_size": 64} if "vit" in arch else {})}
    state = torchvision.models.get_model(arch, **kwargs).state_dict()
    preprocessing = {**load_pt(trained.model)["preprocessing"], "size": 64}
    changes = {"arch": arch, "model_kwargs": kwargs, "state_dict": state, "preprocessing": preprocessing}
    model = save_changed(trained, tmp_path / "model.pt", **changes)
    argv = images / "0.png", "--plot", tmp_path / "cam.png", "--explain"
    result = classify(*argv, model=model, code=0 if supported else 2)
    assert (tmp_path / "cam.png").exists() == supported
    assert supported or ("feature map" in result.error[0] and result.out == "")  # refused before the first record


# ---------------------------------------------------------------- map of a scene


def test_features(classify, trained, images, tmp_path):
    """The file has the classifier's input for each readable image: the classifier turns it into the probabilities."""
    (images / "bad.png").write_bytes(b"no image")
    args = ["--format", "jsonl", "--top-k", 3]
    result = classify(images, *args, "--features", tmp_path / "features.pt", code=3)
    assert result.out == classify(images, *args, code=3).out
    content, checkpoint = load_pt(tmp_path / "features.pt"), load_pt(trained.model)
    records = [record for record in map(json.loads, result.out.splitlines()) if "class" in record]
    assert content["paths"] == [record["path"] for record in records] and len(records) == 4
    assert (content["arch"], content["preprocessing"]) == ("resnet18", checkpoint["preprocessing"])
    assert content["features"].shape == (4, 512) and content["features"].dtype == torch.float32
    weight, bias = (checkpoint["state_dict"][f"fc.{name}"] for name in ("weight", "bias"))
    logits = content["features"] @ weight.T + bias
    for record, probabilities in zip(records, (logits / checkpoint["temperature"]).softmax(1)):
        index = checkpoint["classes"].index(record["class"])
        assert probabilities[index].item() == pytest.approx(record["probability"], abs=1e-4)
    assert "no such folder" in classify(images, "--features", tmp_path / "no" / "f.pt", code=2).error[0]


# ---------------------------------------------------------------- export


def test_pt2_needs_nothing_but_torch(classify, images, tmp_path):
    """The README's lines, in a process that cannot import torchvision, give the probabilities of predict.py."""
    report = classify(*sorted(images.glob("*.png")), "--export", tmp_path / "model.pt2").json
    assert report["images"] == 3 and report["max_difference"] < 1e-3
    pixels = torch.stack([functional.pil_to_tensor(Image.open(file)) for file in sorted(images.glob("*.png"))])
    torch.save(pixels, tmp_path / "pixels.pt")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "torch.export.load" in block]
    example = "torch.zeros(1, 3, 64, 64, dtype=torch.uint8)"
    assert example in code
    code = f"""import sys; sys.modules["torchvision"] = None
{code.replace(example, 'torch.load("pixels.pt")')}
classes = json.loads(extra["metadata.json"])["classes"]
print(json.dumps([dict(zip(classes, row)) for row in model(images).tolist()]))
assert model(torch.zeros(1, 3, 50, 20, dtype=torch.uint8)).shape == (1, len(classes))"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    for found, record in zip(
        json.loads(result.stdout.splitlines()[-1]), records(classify(*sorted(images.glob("*.png"))).out)
    ):
        assert found[record["class"]] == pytest.approx(float(record["probability"]), abs=0.01)  # that is in bf16


@pytest.mark.parametrize("suffix, resize, tta", [("pt2", "crop", []), ("onnx", "squish", ["--tta"])])
def test_an_exported_model_is_this_program_without_it(trained, classify, images, tmp_path, suffix, resize, tta):
    """Crops, views and the temperature are inside; images have any size, batches any length."""
    preprocessing = {**load_pt(trained.model)["preprocessing"], "resize": resize}
    changes = {"preprocessing": preprocessing, "temperature": 3.0, "temperature_tta": 0.7, "views": VIEWS["flip"]}
    model, file = save_changed(trained, tmp_path / "changed.pt", **changes), tmp_path / f"model.{suffix}"
    if suffix == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
    assert classify("--export", file, *tta, model=model).json["max_difference"] < 0.01  # on drawn images
    if suffix == "onnx":
        session = onnxruntime.InferenceSession(file)
        metadata = json.loads(session.get_modelmeta().custom_metadata_map["classifier"])
    else:
        extra = {"metadata.json": ""}
        program = torch.export.load(file, extra_files=extra).module()
        metadata = json.loads(extra["metadata.json"])
    assert metadata["preprocessing"] == preprocessing and metadata["classes"] == load_pt(model)["classes"]
    for path in [images / "0.png", images / "sub" / 'wide, "quoted".PNG']:
        pixels = functional.pil_to_tensor(Image.open(path))[None]
        found = session.run(None, {"images": pixels.numpy()})[0] if suffix == "onnx" else program(pixels)
        args = ["--format", "jsonl", "--top-k", 3, "--precision", "fp32", *tta]
        record = json.loads(classify(path, *args, model=model).out)
        for answer in [record, *record["rest"]]:
            probability = found[0][metadata["classes"].index(answer["class"])].item()
            assert probability == pytest.approx(answer["probability"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "suffix, arch", [("pt2", "mobilenet_v3_small"), ("onnx", "vit_b_16"), ("pt2", "swin_t"), ("onnx", "convnext_tiny")]
)
def test_export_of_other_networks(tmp_path, suffix, arch):
    network = load_pretrained(arch, "none", 3, 32, None, 0)
    model = InferenceModel(network, torch.device("cpu"), "fp32")
    checkpoint = argparse.Namespace(**vars(network), classes=["a", "b", "c"])
    classifier = predict.Classifier(model, checkpoint.classes, VIEWS["none"], 0.05)
    file = tmp_path / f"model.{suffix}"
    assert predict.export(file, checkpoint, classifier, [])[0]["max_difference"] < 0.01
    assert file.stat().st_size == pytest.approx(4 * sum(p.numel() for p in network.model.parameters()), rel=0.1)


def test_an_export_that_fails_leaves_nothing(classify, images, tmp_path, monkeypatch):
    file = tmp_path / "model.pt2"
    monkeypatch.setattr(predict, "EXPORT_TOLERANCE", -1)
    assert "not written, because on" in classify(images / "0.png", "--export", file, code=2).error[0]
    for argument, words in (("model.pth", "model.pt2 or model.onnx"), ("no/model.pt2", "no such folder")):
        assert words in classify("--export", tmp_path / argument, code=2).error[0]
    assert "--export goes with" in classify("--export", file, "--top-k", 2, code=2).err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnx" in classify("--export", tmp_path / "model.onnx", code=2).error[0]
    assert not list(tmp_path.glob("*model*"))


@pytest.fixture
def mosaic(tmp_path):
    """A scene of 5 x 4 tiles of 32 pixels with a world file, and the class of each tile."""
    names = list(COLORS)
    truth = [[names[(row + column * column) % 3] for column in range(5)] for row in range(4)]
    scene = Image.new("RGB", (160, 128))
    for row, classes_of_row in enumerate(truth):
        for column, name in enumerate(classes_of_row):
            scene.paste(tile(COLORS[name], f"{row}, {column}"), (32 * column, 32 * row))
    scene.save(tmp_path / "scene.png")
    (tmp_path / "scene.PGW").write_text("10.0\n0.5\n0.25\n-10.0\n500005.125\n4999995.0\n")
    return tmp_path / "scene.png", truth


def read_cells(folder):
    """Return the cells of a map by (row, column)."""
    return {(int(row["row"]), int(row["column"])): row for row in read_csv(folder / "map.csv")}


def test_map_of_a_mosaic(classify, mosaic, tmp_path):
    scene, truth = mosaic
    out = tmp_path / "map"
    result = classify("--scene", scene, "--tile", 32, "--out", out)
    cells = read_cells(out)
    assert list(cells) == [(row, column) for row in range(4) for column in range(5)]
    assert all(cell["class"] == truth[row][column] for (row, column), cell in cells.items())
    percent = {name: 5 * sum(row.count(name) for row in truth) for name in COLORS}
    assert result.json["percent"] == pytest.approx({**percent, "unknown": 0})
    assert result.json == json.loads((out / "map.json").read_text())
    keys = ["scene", "map", "tiles", "rows", "columns", "tile_pixels", "cell_pixels", "map_scale", "percent"]
    assert list(result.json) == [*keys, "expected_percent", "classes"] and result.json["classes"] == list(COLORS)
    picture, gray_scene = Image.open(out / "map.png"), Image.open(scene).convert("L")
    assert picture.width > 160 and picture.height >= 128
    assert picture.getpixel((picture.width - 1, 0)) == (255, 255, 255)
    for row, column in cells:  # the scene in gray, under the color of its class
        pixel = 32 * column + 1, 32 * row + 30
        color, gray = predict.pick_color(list(COLORS).index(truth[row][column])), gray_scene.getpixel(pixel)
        assert picture.getpixel(pixel) == pytest.approx([0.6 * part + 0.4 * gray for part in color], abs=2)
    for row, column in cells:
        box = 32 * column, 32 * row, 32 * column + 32, 32 * row + 32
        Image.open(scene).crop(box).save(tmp_path / "map" / f"tile-{row}-{column}.png")
    singles = records(classify(*sorted(out.glob("tile-*")), "--top-k", 3).out)
    expected, names = dict.fromkeys(COLORS, 0.0), [("class", "probability"), ("class_2", "probability_2")]
    for single in singles:
        for name, probability in [*names, ("class_3", "probability_3")]:
            expected[single[name]] += 100 * float(single[probability]) / len(singles)
    assert result.json["expected_percent"] == pytest.approx(expected, abs=0.5) and expected != percent
    assert float(cells[1, 2]["probability"]) == pytest.approx(float(singles[7]["probability"]), abs=0.02)


def test_overlaps_and_ragged_edges(classify, mosaic, tmp_path):
    scene, truth = mosaic
    out = tmp_path / "map"
    Image.open(scene).crop((0, 0, 150, 100)).save(tmp_path / "ragged.png")
    argv = "--scene", tmp_path / "ragged.png", "--tile", 32, "--out", out
    report = classify(*argv).json
    assert (report["rows"], report["columns"], report["tiles"]) == (4, 5, 20)
    cells = read_cells(out)
    assert all(cells[row, column]["class"] == truth[row][column] for row in range(3) for column in range(4))
    report = classify(*argv, "--stride", 16).json
    cells = read_cells(out)
    assert (report["rows"], report["columns"], report["tiles"]) == (7, 10, 6 * 9) and len(cells) == 70
    assert cells[0, 0]["class"] == truth[0][0] and sum(report["percent"].values()) == pytest.approx(100, abs=0.01)
    assert sum(report["expected_percent"].values()) == pytest.approx(100, abs=0.01)
    result = classify(*argv, "--stride", 16, "--min-confidence", 0.9)
    report = result.json
    assert "not calibrated" in result.err
    unknown = {key for key, cell in read_cells(out).items() if cell["class"] == "unknown"}
    assert unknown == {key for key, cell in cells.items() if float(cell["probability"]) < 0.9}
    assert report["percent"]["unknown"] > 0


def test_arithmetic_of_tiles_and_cells():
    for length, stride, starts in ((64, 64, [0]), (128, 64, [0, 64]), (100, 32, [0, 32, 36])):
        assert predict.TileAxis(length, 64, stride).tile_starts() == starts
    axis = predict.TileAxis(100, 64, 64)  # tiles 0..64 and 36..100, cells 0..64 and 64..100
    assert axis.cell_sizes().tolist() == [64, 36]
    assert axis.cell_weights().tolist() == [[pytest.approx(64 / 92), pytest.approx(28 / 92)], [0, 1]]


def test_a_large_map_is_scaled_down_in_place(classify, mosaic, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "MAX_MAP_SIDE", 40)
    (tmp_path / "map").mkdir()
    result = classify("--scene", mosaic[0], "--tile", 32, "--out", tmp_path / "map")
    picture, white = Image.open(tmp_path / "map" / "map.png"), (255, 255, 255)
    assert result.json["map_scale"] == 4 and picture.getpixel((39, 31)) != white
    assert picture.getpixel((40, 31)) == white and picture.getpixel((39, 32)) == white


@pytest.fixture
def write_scene(mosaic):
    """Return a function that writes a TIFF of the mosaic with some changes, or other bands, and returns its path."""
    rasterio = pytest.importorskip("rasterio")
    numpy = pytest.importorskip("numpy")

    def write(bands=None, tags=None, **profile):
        pixels = numpy.asarray(Image.open(mosaic[0])).transpose(2, 0, 1)
        bands, path = pixels if bands is None else bands(pixels.astype("int64")), mosaic[0].with_suffix(".tif")
        profile = {"dtype": "uint8", "count": len(bands), "height": 128, "width": 160, **profile}
        with rasterio.open(path, "w", driver="GTiff", **profile) as file:
            file.write(bands[:, : profile["height"], : profile["width"]].astype(profile["dtype"]))
            file.update_tags(**tags or {})
        return path

    return write


NORTH_UP, ROTATED = (10, 0, 500000, 0, -10, 5200000), (8, 6, 500000, 6, -8, 5200000)


@pytest.mark.filterwarnings("ignore")  # of rasterio, for a scene without georeference
@pytest.mark.parametrize(
    "transform, changes, options",
    [
        (NORTH_UP, {}, ()),
        (NORTH_UP, {"tags": {"AREA_OR_POINT": "Point"}}, ()),
        (NORTH_UP, {"height": 100, "width": 150}, ()),
        (NORTH_UP, {}, ("--stride", 16, "--min-confidence", 0.9)),
        (ROTATED, {}, ()),
        (ROTATED, {"tags": {"AREA_OR_POINT": "Point"}}, ()),
        (None, {"world": "10 0.5 0.25 -10 500005.125 5199995.25"}, ()),
        (None, {"world": ""}, ()),
    ],
)
def test_map_as_geotiff(classify, write_scene, tmp_path, transform, changes, options):
    """Each cell lies on its pixels of the scene, in its coordinate system, with the colors of map.png."""
    rasterio = pytest.importorskip("rasterio")
    (tmp_path / "scene.PGW").unlink()
    changes = dict(changes)
    world = changes.pop("world", None)
    place = {} if world is not None else {"transform": rasterio.Affine(*transform), "crs": "EPSG:32632"}
    scene = write_scene(**place, **changes)
    if world:
        scene.with_suffix(".tfw").write_text(world.replace(" ", "\n"))
    out = tmp_path / "map"
    report = classify("--scene", scene, "--tile", 32, "--out", out, *options).json
    with rasterio.open(scene) as source, rasterio.open(out / "map.tif") as raster:
        assert (raster.crs, raster.nodata, raster.shape) == (source.crs, 255, (report["rows"], report["columns"]))
        step = report["cell_pixels"] if place or world else 1
        for row, column in ((0, 0), (0, 3), (2, 0), (2, 3)):
            corner = source.transform * (step * column, step * row)
            assert raster.transform * (column, row) == pytest.approx(corner, abs=1e-6)
        names = {**dict(enumerate(report["classes"])), 255: "unknown"}
        values, colors = raster.read(1), raster.colormap(1)
    assert {key: names[values[key]] for key in read_cells(out)} == {
        key: cell["class"] for key, cell in read_cells(out).items()
    }
    for index in range(len(COLORS)):
        assert colors[index][:3] == pytest.approx(predict.pick_color(index), abs=1)
    assert colors[255][:3] == predict.GRAY and ("unknown" in {names[value] for value in values.flat}) == bool(options)


def test_the_map_of_many_classes_has_16_bits():
    names, indices = [*map(str, range(300)), "unknown"], torch.tensor([[0, 299, 300]])
    raster = predict.draw_raster(predict.SceneMap(names, indices, torch.ones(1, 3), [], [], 8, 8, 3))
    assert raster.mode == "I;16" and [raster.getpixel((x, 0)) for x in range(3)] == [0, 299, 65535]


@pytest.mark.filterwarnings("ignore")  # of rasterio, for a scene without georeference
@pytest.mark.parametrize(
    "count, options",
    [
        (3, {}),
        (4, {"compress": "deflate", "predictor": 2, "tiled": True, "blockxsize": 64, "blockysize": 64}),
        (4, {"photometric": "RGB", "ENDIANNESS": "BIG"}),
        (3, {"photometric": "RGB", "compress": "lzw", "BIGTIFF": "YES", "nodata": 65535}),
    ],
)
def test_scene_of_16_bits(classify, write_scene, mosaic, tmp_path, count, options):
    """The 2nd to the 98th percentile of all that is not 0 or nodata become 0 to 255."""
    numpy = pytest.importorskip("numpy")

    def convert(pixels):
        bands = numpy.concatenate([pixels, 255 - pixels[:1]])[:count] * 11 + 700
        bands[:, :, :48] = options.get("nodata", 0)
        return bands

    scene = write_scene(convert, dtype="uint16", **options)
    image = numpy.asarray(predict.read_scene(scene, 32))
    result = classify("--scene", scene, "--tile", 32, "--out", tmp_path / "map")
    pixels = convert(numpy.asarray(Image.open(mosaic[0])).astype("int64").transpose(2, 0, 1))[:3].transpose(1, 2, 0)
    low, high = (numpy.percentile(pixels[:, 48:], share) for share in (2, 98))
    assert numpy.abs(image - numpy.clip((pixels - low) / (high - low) * 255, 0, 255)).max() < 2
    assert f"{low:.0f} to {high:.0f}" in result.err and "16-bit" in result.err
    cells = read_cells(tmp_path / "map")
    assert all(cells[row, column]["class"] == mosaic[1][row][column] for row in range(4) for column in range(2, 5))


@pytest.mark.filterwarnings("ignore")  # of rasterio, for a scene without georeference
def test_scene_of_four_bands_and_scenes_that_pillow_cannot_read(classify, write_scene, mosaic, tmp_path):
    numpy = pytest.importorskip("numpy")
    scene = write_scene(lambda bands: numpy.concatenate([bands, bands[:1]]), photometric="RGB", ALPHA="UNSPECIFIED")
    assert predict.read_scene(scene, 32).tobytes() == Image.open(mosaic[0]).tobytes()
    for changes in (
        {"dtype": "uint16", "interleave": "band"},
        {"interleave": "band", "compress": "deflate", "photometric": "MINISBLACK"},
        {"dtype": "uint16", "interleave": "band", "photometric": "RGB"},
        {"dtype": "float32"},
        {"bands": lambda bands: numpy.concatenate([bands] * 4), "dtype": "uint16"},
        {"bands": lambda bands: bands[:1], "dtype": "uint16"},
    ):
        scene = write_scene(**changes)
        message = classify("--scene", scene, "--tile", 32, "--out", tmp_path / "map", code=2).err
        assert f"gdal_translate -b 1 -b 2 -b 3 -co INTERLEAVE=PIXEL -co PHOTOMETRIC=RGB {scene} rgb.tif" in message
        assert len(message.strip().splitlines()) == 1


def test_tiles_have_the_size_of_the_training_images(classify, trained, mosaic, tmp_path):
    scene = "--scene", mosaic[0], "--out", tmp_path / "map"
    result = classify(*scene)
    assert load_pt(trained.model)["native_size"] == result.json["tile_pixels"] == 32
    assert "tiles of 32 pixels (as the training images" in result.err
    assert "gaps" in classify(*scene, "--stride", 33, code=2).error[0]
    content = load_pt(trained.model)
    del content["native_size"]
    torch.save(content, tmp_path / "old.pt")
    result = classify(*scene, model=tmp_path / "old.pt")
    assert result.json["tile_pixels"] == 64 and "tiles of 64 pixels (the model does not know" in result.err
    changed = save_changed(trained, tmp_path / "new.pt", native_size=200)
    assert "tiles of 200 pixels are larger than" in classify(*scene, model=changed, code=2).error[0]
    changed = save_changed(trained, tmp_path / "new.pt", native_size=-1)
    assert "invalid native_size" in classify(*scene, model=changed, code=2).error[0]


def test_the_world_file_of_the_scenes_own_format_is_preferred(tmp_path):
    for suffix, first in ((".jgw", 1), (".pgw", 2), (".wld", 3)):
        (tmp_path / f"scene{suffix}").write_text(f"{first} 0 0 1 0 0")
    found = [predict.read_world_file(tmp_path / f"scene{suffix}") for suffix in (".jpg", ".png", ".tif")]
    assert [world[0] for world in found] == [1, 2, 1]
    assert predict.read_world_file(tmp_path / "other.png") is None


def test_a_turned_scene_with_a_world_file_is_refused(classify, mosaic, tmp_path):
    scene, exif = Image.open(mosaic[0]), Image.Exif()
    exif[0x112] = 6  # turned by 90 degrees
    scene.save(mosaic[0], exif=exif)
    argv = "--scene", mosaic[0], "--tile", 32, "--out", tmp_path / "map"
    assert "EXIF" in classify(*argv, code=2).error[0]
    (tmp_path / "scene.PGW").unlink()
    report = classify(*argv).json
    assert (report["rows"], report["columns"]) == (5, 4)


def test_wrong_scenes(classify, mosaic, images, tmp_path, monkeypatch):
    scene, out = ("--scene", mosaic[0]), ("--out", tmp_path / "map")
    for argv, word in (
        ((), "--scene"),
        (scene, "--out"),
        ((images, *out), "--scene"),
        ((*scene, *out, images), "IMAGE"),
        ((*scene, *out, "--tile", 16, "--stride", 17), "gaps"),
        ((*scene, *out, "--tile", 129), "larger"),
        ((*scene, *out, "--tile", 32, "--tta"), "--augment"),
        (("--scene", tmp_path / "no.png", *out), "no such file"),
    ):
        assert word in classify(*argv, code=2).error[0]
    (tmp_path / "map.png").write_bytes(mosaic[0].read_bytes())
    argv = "--scene", tmp_path / "map.png", "--out", tmp_path, "--tile", 32
    assert "would replace" in classify(*argv, code=2).error[0]
    (tmp_path / "scene.PGW").write_text("1 2 3")
    assert "scene.PGW" in classify(*scene, *out, "--tile", 32, code=2).error[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # restored after the test
    monkeypatch.setattr(predict, "MAX_SCENE_PIXELS", 160 * 128 - 2)
    assert "exceeds limit" in classify(*scene, *out, "--tile", 32, code=2).error[0]
    assert not (tmp_path / "map").exists()


def oklab(linear):
    """Return colors, linear RGB [N, 3], in OKLab (Ottosson, 2020), where equal distances look equal."""
    to_cones = torch.tensor([[0.41222, 0.53633, 0.05145], [0.2119, 0.68070, 0.1074], [0.0883, 0.28172, 0.62998]])
    to_lab = torch.tensor([[0.21045, 0.79362, -0.00407], [1.978, -2.42859, 0.45059], [0.0259, 0.78277, -0.80868]])
    return (linear @ to_cones.T).clamp(min=0) ** (1 / 3) @ to_lab.T


def test_colors_of_classes_are_distinct():
    colors = [predict.pick_color(index) for index in range(200)]
    assert len(set(colors)) == 200 and all(0 <= part <= 255 for color in colors for part in color)
    strongest = [max("rgb", key=dict(zip("rgb", color)).get) for color in colors]
    assert [strongest[index] for index in (1, 5, 7, 8, 9)] == list("ggrbb")  # Forest, Pasture, Residential, water
    assert max(colors[3]) < 64  # Highway is as dark as asphalt
    blended = torch.tensor([*colors[:10], predict.GRAY]) * 0.6 / 255 + 0.4 * 128 / 255
    linear = ((blended + 0.055) / 1.055) ** 2.4
    red_blind = [[0.15229, 1.05258, -0.20487], [0.1145, 0.78628, 0.09922], [-0.00388, -0.04812, 1.052]]
    green_blind = [[0.36732, 0.86065, -0.22797], [0.28009, 0.6725, 0.04741], [-0.01182, 0.04294, 0.96888]]
    for vision in (torch.eye(3).tolist(), red_blind, green_blind):
        seen = oklab((linear @ torch.tensor(vision).T).clamp(0, 1))
        assert torch.nn.functional.pdist(seen).min() > 0.09


def test_a_legend_ends_with_the_sum_of_the_smallest_classes(monkeypatch):
    monkeypatch.setattr(predict, "LEGEND_ROWS", 2)
    indices, names = torch.tensor([[0, 1, 2, 3]]), ["a", "b", "c", "d", "unknown"]
    scene_map = predict.SceneMap(names, indices, torch.ones(1, 4), [40.0, 30.0, 20.0, 10.0, 0.0], [], 8, 8, 4)
    labels, draw_text = [], ImageDraw.ImageDraw.text

    def record_text(draw, position, label, *args, **kwargs):
        labels.append(label)
        draw_text(draw, position, label, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record_text)
    predict.draw_map(Image.new("RGB", (32, 8)), scene_map, 1)
    assert labels == ["a  40.0 %", "b  30.0 %", "2 more  30.0 %"]


def test_map_of_real_tiles(run, classify, tmp_path):
    """The map of a scene that consists of published test tiles of three classes is correct in 95 of 100 cells."""
    archive = zipfile.ZipFile(real("eurosat", "EuroSAT.zip"))
    weights = real("weights", "mobilenet_v2_imagenet.pth")
    train, test = (real("eurosat", "split-neumann", f"{name}.txt").read_text().split() for name in ("train", "test"))

    def read(file):
        stem = file.rpartition(".")[0]
        return archive.read(f"2750/{stem.rpartition('_')[0]}/{stem}.jpg")

    names = "Forest", "Residential", "SeaLake"
    for name in names:
        folder = tmp_path / "data" / "train" / name
        folder.mkdir(parents=True)
        for file in [file for file in train if file.startswith(f"{name}_")][:30]:
            (folder / f"{file.rpartition('.')[0]}.jpg").write_bytes(read(file))
    model = "--arch", "mobilenet_v2", "--weights", weights, "--device", "cpu"
    run("train", "--data", tmp_path / "data", "--out", tmp_path / "run", *model, "--epochs", 20, "--no-cache")
    scene, truth = Image.new("RGB", (10 * 64, 6 * 64)), {}
    tiles = {name: iter([file for file in test if file.startswith(f"{name}_")]) for name in names}
    for row in range(6):
        for column in range(10):
            truth[row, column] = names[(column + row // 2) // 4 % 3]
            content = read(next(tiles[truth[row, column]]))
            scene.paste(Image.open(io.BytesIO(content)), (64 * column, 64 * row))
    scene.save(tmp_path / "scene.png")
    argv = "--scene", tmp_path / "scene.png", "--out", tmp_path / "map"
    classify(*argv, model=tmp_path / "run" / "model.pt")
    cells = read_cells(tmp_path / "map")
    assert sum(cell["class"] == truth[key] for key, cell in cells.items()) >= 0.95 * 60


# ---------------------------------------------------------------- use without this program


# ---------------------------------------------------------------- images of another kind


def test_unfamiliar_images_are_rejected(classify, trained, tree, tmp_path):
    """Photographs of something else are unknown; test images are rejected about as often as val images."""
    folder = tmp_path / "other"
    folder.mkdir()
    for number in range(6):
        size = (32, 32)
        Image.effect_mandelbrot(size, (-2 + number / 9, -1, 1, 1), 40 + number).convert("RGB").save(
            folder / f"{number}.png"
        )
    args = ["--format", "jsonl", "--reject-unfamiliar"]
    other = [json.loads(line) for line in classify(folder, *args).out.splitlines()]
    assert [record["class"] for record in other] == ["unknown"] * 6 and {record["unfamiliar"] for record in other} == {
        1.0
    }
    own = [json.loads(line) for line in classify(tree / "test", *args, "0.1").out.splitlines()]
    rejected = [record for record in own if record["unfamiliar"] > 0.9]
    assert [record for record in own if record["class"] == "unknown"] == rejected and len(rejected) <= 12
    rows = list(
        csv.DictReader(io.StringIO(classify(folder, "--format", "csv", "--reject-unfamiliar", "--top-k", 2).out))
    )
    assert list(rows[0]) == ["path", "class", "probability", "class_2", "probability_2", "unfamiliar", "error"]
    assert rows[0]["class"] == "unknown" and rows[0]["class_2"] in COLORS
    content = load_pt(trained.model)
    del content["familiarity"]
    torch.save(content, tmp_path / "old.pt")
    message = classify(folder, "--reject-unfamiliar", model=tmp_path / "old.pt", code=2).error[0]
    assert "old.pt" in message and "train the model again" in message
    content["familiarity"] = {"mean": torch.zeros(3)}
    torch.save(content, tmp_path / "wrong.pt")
    assert "invalid familiarity" in classify(folder, model=tmp_path / "wrong.pt", code=2).error[0]


def test_unfamiliar_tiles_of_a_scene_are_unknown(classify, tmp_path):
    scene = Image.new("RGB", (96, 32))
    for number, name in enumerate(("red", "blue")):
        scene.paste(tile(COLORS[name], f"scene {name}"), (32 * number, 0))
    scene.paste(Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 40).convert("RGB"), (64, 0))
    scene.save(tmp_path / "scene.png")
    args = ["--scene", tmp_path / "scene.png", "--tile", 32, "--out", tmp_path / "map", "--reject-unfamiliar", 0.01]
    classify(*args)
    assert [row["class"] for row in read_csv(tmp_path / "map" / "map.csv")][2] == "unknown"
