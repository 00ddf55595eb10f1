"""predict.py: one record per image, in order, whatever the image; pictures."""
import csv
import io
import json
import os
import sys

import pytest
import torch
from conftest import COLOURS, command, tile
from PIL import Image


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "in put"
    (folder / "sub").mkdir(parents=True)
    for number, (name, colour) in enumerate(COLOURS.items()):
        tile(colour, name).save(folder / f"{number}.png")
    tile(COLOURS["red"], 9, (50, 20)).save(folder / "sub" / "wide, \"quoted\".PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def records(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_folder_files_and_formats(run, trained, images):
    rows = records(run("predict", "--checkpoint", trained.model, images, images / "2.png").out)
    assert [row["class"] for row in rows] == ["blue", "green", "red", "red", "red"]
    assert [row["path"] for row in rows] == [str(images / n) for n in ("0.png", "1.png", "2.png", 'sub/wide, "quoted".PNG', "2.png")]
    assert all(0.5 < float(row["probability"]) <= 1 and not row["error"] for row in rows)
    lines = run("predict", "--checkpoint", trained.model, images, "--format", "jsonl", "--top-k", 9).out.splitlines()
    first = json.loads(lines[0])
    assert first["class"] == "blue" and [len(json.loads(line)["rest"]) for line in lines] == [2] * 4
    assert first["probability"] + sum(r["probability"] for r in first["rest"]) == pytest.approx(1, abs=1e-5)
    table = run("predict", "--checkpoint", trained.model, images / "0.png", "--format", "table", "--top-k", 2).out
    assert "blue" in table and "0.png" in table and "%" in table
    top2 = records(run("predict", "--checkpoint", trained.model, images / "0.png", "--top-k", 2).out)[0]
    assert set(top2) == {"path", "class", "probability", "class_2", "probability_2", "error"}


def test_a_bad_image_is_a_record(run, trained, images):
    (images / "1.png").write_bytes(b"no image")
    result = run("predict", "--checkpoint", trained.model, images, images / "gone.png", "--format", "jsonl", code=3)
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert ["error" in row for row in rows] == [False, True, False, False, True]
    assert rows[1] == {"path": str(images / "1.png"), "error": rows[1]["error"]} and "no such file" in rows[4]["error"]
    assert "2 of 5" in result.err
    row = records(run("predict", "--checkpoint", trained.model, images / "1.png", code=3).out)[0]
    assert row["error"] and not row["class"]


def test_paths_from_stdin_in_a_pipe(trained, images):
    names = "\n".join(str(images / f"{i}.png") for i in (2, 0, 1)) + "\n"
    done = command("predict", "--checkpoint", trained.model, "-", input=names)
    assert done.returncode == 0 and [row["class"] for row in records(done.stdout)] == ["red", "blue", "green"]


def test_temperature_and_agreement_with_evaluate(run, trained, tree, tmp_path):
    run("evaluate", "--checkpoint", trained.model, "--data", tree, "--out", tmp_path / "report")
    with open(tmp_path / "report" / "predictions.csv", newline="") as file:
        measured = {row["path"]: row for row in csv.DictReader(file)}
    rows = records(run("predict", "--checkpoint", trained.model, tree / "test").out)
    assert len(rows) == len(measured) == 30
    for row in rows:
        assert row["class"] == measured[row["path"]]["predicted"]
        assert float(row["probability"]) == pytest.approx(float(measured[row["path"]]["probability"]), abs=1e-4)
    content = torch.load(trained.model, weights_only=True)
    torch.save({**content, "temperature": 1000.0}, tmp_path / "hot.pt")
    assert float(records(run("predict", "--checkpoint", tmp_path / "hot.pt", tree / "test").out)[0]["probability"]) < 0.36


def test_pictures_on_pages(run, trained, tree, images, tmp_path):
    run("predict", "--checkpoint", trained.model, images / "0.png", "--plot", tmp_path / "one.png")
    run("predict", "--checkpoint", trained.model, tree / "test", "--plot", tmp_path / "many.png")
    sizes = {name: Image.open(tmp_path / name).size for name in ("one.png", "many.png", "many-2.png")}
    assert not (tmp_path / "many-3.png").exists()
    assert sizes["many.png"][1] > sizes["many-2.png"][1] > sizes["one.png"][1]
    assert "folder" in run("predict", "--checkpoint", trained.model, images, "--plot", tmp_path / "no" / "x.png", code=2).error[0]


def test_shapes_and_modes(run, trained, tmp_path):
    Image.new("RGB", (1, 1), COLOURS["red"]).save(tmp_path / "a.png")
    Image.new("RGB", (30000, 3), COLOURS["red"]).save(tmp_path / "b.png")
    tile(COLOURS["green"], 1, (7, 900)).convert("P").save(tmp_path / "c.png")
    tile(COLOURS["blue"], 1).convert("RGBA").save(tmp_path / "d.png")
    tile(COLOURS["blue"], 1).convert("CMYK").save(tmp_path / "e.jpg")
    rows = records(run("predict", "--checkpoint", trained.model, tmp_path).out)
    assert [row["class"] for row in rows] == ["red", "red", "green", "blue", "blue"]


def test_folder_without_images(run, trained, images, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("predict", "--checkpoint", trained.model, images, tmp_path / "empty", code=2)
    assert "empty" in result.error[0] and result.out == ""


def test_names_of_any_bytes(trained, images, tmp_path):
    name = images / "caf\udce9 $x$ \n.png"
    try:
        (images / "0.png").rename(name)
    except OSError:
        pytest.skip("the file system allows only UTF-8 names")
    done = command("predict", "--checkpoint", trained.model, images, "--plot", tmp_path / "plot.png", errors="surrogateescape")
    assert done.returncode == 0 and [row["path"] for row in records(done.stdout)][2] == str(name)
    done = command("predict", "--checkpoint", trained.model, "-", input=f"{images}/2.png\n{images}/caf\udce9.png\n", errors="surrogateescape")
    assert done.returncode == 3 and [row["class"] for row in records(done.stdout)] == ["red", ""]


def test_broken_exif_is_no_reason_to_refuse(run, trained, images):
    Image.open(images / "2.png").save(images / "3.png", exif=b"II*\0")
    assert records(run("predict", "--checkpoint", trained.model, images / "3.png").out)[0]["class"] == "red"


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_closed_pipe_ends_it_quietly(trained, tree):
    import subprocess
    from conftest import ROOT
    line = f"yes '{tree}/test/red/red 0.png' | head -500 | '{sys.executable}' '{ROOT}/predict.py' --checkpoint '{trained.model}' - | head -2"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert len(done.stdout.splitlines()) == 2 and done.stderr == ""
