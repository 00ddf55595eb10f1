"""predict.py: one record per image, in order, whatever the image; pictures."""
import csv
import io
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from conftest import COLOURS, ROOT, command, real, tile
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


def test_class_and_file_names_that_no_font_has(run, trained, images, tmp_path):
    """A class of bytes that are no UTF-8 and a file name with a carriage return: the records parse, the picture is drawn."""
    content = torch.load(trained.model, weights_only=True)
    torch.save({**content, "classes": ["bad\udcff", "two\nlines", "\u6c34"]}, tmp_path / "odd.pt")
    (images / "0.png").rename(images / "return\r.png")
    line = [sys.executable, ROOT / "predict.py", "--checkpoint", tmp_path / "odd.pt", images, "--plot", tmp_path / "plot.png"]
    done = subprocess.run(list(map(str, line)), capture_output=True, timeout=300)
    assert done.returncode == 0 and b"Warning" not in done.stderr and (tmp_path / "plot.png").exists()
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode("utf-8", "surrogateescape"), newline="")))
    assert str(images / "return\r.png") in {row["path"] for row in rows} and {row["class"] for row in rows} == {"bad\udcff", "two\nlines", "\u6c34"}
    assert "PNG" in run("predict", "--checkpoint", trained.model, images, "--plot", tmp_path / "plot.jpg", code=2).error[0]


def test_arguments_that_cannot_be_looked_at_are_records(run, trained, images):
    result = run("predict", "--checkpoint", trained.model, images / f"{300 * 'a'}.png", images / "2.png", code=3)
    assert [row["class"] for row in records(result.out)] == ["", "red"]


def test_broken_exif_is_no_reason_to_refuse(run, trained, images):
    Image.open(images / "2.png").save(images / "3.png", exif=b"II*\0")
    assert records(run("predict", "--checkpoint", trained.model, images / "3.png").out)[0]["class"] == "red"


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_closed_pipe_ends_it_quietly(trained, tree):
    line = f"yes '{tree}/test/red/red 0.png' | head -500 | '{sys.executable}' '{ROOT}/predict.py' --checkpoint '{trained.model}' - | head -2"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert len(done.stdout.splitlines()) == 2 and done.stderr == ""


# ---------------------------------------------------------------- a filter

def test_nul_separated_paths(trained, images):
    (images / "0.png").rename(images / "new\nline.png")
    names = "\0".join(str(images / name) for name in ("2.png", "new\nline.png")) + "\0"
    for arguments in (["-0"], ["-", "-0"], ["--null", "-"]):
        done = command("predict", "--checkpoint", trained.model, *arguments, input=names)
        assert done.returncode == 0 and [row["class"] for row in records(done.stdout)] == ["red", "blue"]
    done = command("predict", "--checkpoint", trained.model, "-", input=f"{images}/2.png\r\n\n{images}/1.png")  # no end at the end
    assert [row["class"] for row in records(done.stdout)] == ["red", "green"]


def test_a_slow_producer_gets_each_record_at_once(trained, images):
    argv = [sys.executable, ROOT / "predict.py", "--checkpoint", trained.model, "-", "--format", "jsonl"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(60, process.kill)  # else a filter that waits for a full batch waits for ever
        timer.start()
        for number in (2, 0, 1):
            print(images / f"{number}.png", file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line and json.loads(line)["path"].endswith(f"{number}.png")
        timer.cancel()
        process.stdin.close()
        assert process.stdout.read() == "" and process.wait() == 0


def test_batches_are_full_unless_paths_pause():
    from common import read_batches
    alive, most = 0, 0

    class Counted(Image.Image):  # an image that tells how many there are
        pass

    def read(path):
        return Image.new("RGB", (8, 8), (path % 256, 0, 0))

    def paths():
        nonlocal alive, most
        for number in range(5000):
            alive += 1
            most = max(most, alive)
            yield number
            if number == 20:
                yield None
    sizes, seen = [], []
    for batch in read_batches(paths(), {"size": 8, "interpolation": "bilinear"}, 16, 2, read):
        alive -= len(batch)
        sizes.append(len(batch))
        seen += [path for path, _ in batch]
    assert seen == list(range(5000)) and sizes[:3] == [16, 5, 16] and set(sizes[2:-1]) == {16}
    assert most <= 48  # three batches, however many paths there are


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_stays_flat(trained, images):
    def peak(count):
        script = ("import os, re, sys; sys.path.insert(0, sys.argv.pop(1)); import predict; code = predict.main(sys.argv[1:]); "
                  "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr); sys.exit(code)")
        argv = [sys.executable, "-c", script, ROOT, "--checkpoint", trained.model, "-"]
        done = subprocess.run([str(a) for a in argv], input=f"{images}/2.png\n" * count, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and done.stdout.count("red") == count, done.stderr
        return int(done.stderr.split()[-1]) / 1024
    assert peak(6000) - peak(500) < 40  # MiB


def test_min_confidence(run, trained, images):
    everything = records(run("predict", "--checkpoint", trained.model, images, "--top-k", 2).out)
    least = sorted(float(row["probability"]) for row in everything)[2] - 1e-6
    for row, before in zip(records(run("predict", "--checkpoint", trained.model, images, "--top-k", 2, "--min-confidence", least).out), everything):
        sure = float(before["probability"]) >= least
        next_one = {"class": "unknown", "class_2": before["class"], "probability_2": before["probability"]}
        assert row == (before if sure else {**before, **next_one})
    assert {row["class"] for row in records(run("predict", "--checkpoint", trained.model, images, "--min-confidence", 0).out)} == set(COLOURS)
    assert "between 0 and 1" in run("predict", "--checkpoint", trained.model, images, "--min-confidence", 1.5, code=2).error[0]


def test_a_batch_changes_no_answer(run, trained, tree):
    """Alone, in a full batch, among bad images, and by evaluate.py: the same numbers for the same image."""
    paths = sorted((tree / "test").glob("*/*"))
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 0.02)):
        argv = ("--checkpoint", trained.model, "--precision", precision, "--device", "cpu")
        run("evaluate", *argv, "--data", tree, "--out", tree.parent / precision)
        with open(tree.parent / precision / "predictions.csv", newline="") as file:
            measured = {row["path"]: row for row in csv.DictReader(file)}
        mixed = [part for path in paths for part in (path, "gone.png")]
        ways = [run("predict", *argv, *paths, "--top-k", 2).out, run("predict", *argv, *mixed, "--top-k", 2, code=3).out,
                *(run("predict", *argv, path, "--top-k", 2).out for path in paths[::7])]
        for row in (row for way in ways for row in records(way) if not row["error"]):
            p = float(row["probability"])
            assert p == pytest.approx(float(measured[row["path"]]["probability"]), abs=tolerance)
            assert row["class"] == measured[row["path"]]["predicted"] or p - float(row["probability_2"]) < tolerance


# ---------------------------------------------------------------- heat

def test_heat_is_where_the_class_is():
    """A network that sums up how red, how green and how blue an image is: the heat of each class is on the patch of its colour."""
    import predict
    from common import FrozenModel
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3), torch.nn.ReLU(inplace=True),
                                  torch.nn.AvgPool2d(8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    with torch.no_grad():
        network[0].weight.copy_((1.5 * torch.eye(3) - 0.5)[:, :, None, None].expand(3, 3, 3, 3))
        network[0].bias.zero_()
        network[6].weight.copy_(2 * torch.eye(3) - 1)  # the other colours speak against it
    preprocessing = {"size": 64, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}
    frozen = FrozenModel(network.eval(), preprocessing, 3, torch.device("cpu"), "fp32")
    image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    image[0, :16, :16], image[1, 48:, 8:24], image[2, 24:40, 48:] = 250, 250, 250
    for target, (rows, columns) in enumerate((((0, 2), (0, 2)), ((6, 8), (1, 3)), ((3, 5), (6, 8)))):
        heat = predict.explain(frozen, image, target)
        assert heat.shape == (8, 8) and heat.min() >= 0 and heat.max() == 1
        assert heat[slice(*rows), slice(*columns)].min() > 0.9 and heat.sum() < 4.5  # of four cells, and a rim
    assert predict.explain(frozen, torch.zeros_like(image), 0).max() == 0  # nothing speaks for it


def test_heat_beside_each_image(run, trained, images, tmp_path):
    plain = run("predict", "--checkpoint", trained.model, images, "--plot", tmp_path / "plain.png")
    heated = run("predict", "--checkpoint", trained.model, images, "--plot", tmp_path / "heat.png", "--explain")
    assert heated.out == plain.out
    assert Image.open(tmp_path / "heat.png").width > 1.3 * Image.open(tmp_path / "plain.png").width
    assert "--plot" in run("predict", "--checkpoint", trained.model, images, "--explain", code=2).error[0]


@pytest.mark.parametrize("arch, there", [("squeezenet1_1", True), ("densenet121", True), ("convnext_tiny", True), ("vit_b_32", False)])
def test_heat_of_other_networks(run, trained, images, tmp_path, arch, there):
    import torchvision
    model = torchvision.models.get_model(arch, num_classes=3, **({"image_size": 64} if "vit" in arch else {}))
    content = torch.load(trained.model, weights_only=True)
    torch.save({**content, "arch": arch, "model_kwargs": {"num_classes": 3, **({"image_size": 64} if "vit" in arch else {})},
                "state_dict": model.state_dict(), "preprocessing": {**content["preprocessing"], "size": 64}}, tmp_path / "model.pt")
    result = run("predict", "--checkpoint", tmp_path / "model.pt", images / "0.png", "--plot", tmp_path / "heat.png", "--explain", code=0 if there else 2)
    assert (tmp_path / "heat.png").exists() == there and (there or "feature map" in result.error[0] and result.out == "")


# ---------------------------------------------------------------- a map

@pytest.fixture
def mosaic(tmp_path):
    """A scene of 5 x 4 tiles, the class of each, and its world file."""
    truth = [[list(COLOURS)[(row + column * column) % 3] for column in range(5)] for row in range(4)]
    scene = Image.new("RGB", (160, 128))
    for row, names in enumerate(truth):
        for column, name in enumerate(names):
            scene.paste(tile(COLOURS[name], f"{row}, {column}"), (32 * column, 32 * row))
    scene.save(tmp_path / "scene.png")
    (tmp_path / "scene.PGW").write_text("10.0\n0.5\n0.25\n-10.0\n500005.125\n4999995.0\n")
    return tmp_path / "scene.png", truth


def cells(folder):
    with open(folder / "map.csv", newline="") as file:
        return {(int(row["row"]), int(row["column"])): row for row in csv.DictReader(file)}


def test_map_of_a_mosaic(run, trained, mosaic, tmp_path):
    import predict
    scene, truth = mosaic
    result = run("predict", "--checkpoint", trained.model, "--scene", scene, "--tile", 32, "--out", tmp_path / "map")
    found = cells(tmp_path / "map")
    assert list(found) == [(row, column) for row in range(4) for column in range(5)]
    assert all(found[row, column]["class"] == truth[row][column] for row, column in found)
    counts = {name: 5 * sum(row.count(name) for row in truth) for name in COLOURS}
    assert result.json["percent"] == pytest.approx({**counts, "unknown": 0}) and result.json == json.loads((tmp_path / "map" / "map.json").read_text())
    picture = Image.open(tmp_path / "map" / "map.png")
    assert picture.width > 160 and picture.height >= 128 and picture.getpixel((picture.width - 1, 0)) == (255, 255, 255)
    for row, column in found:  # the colour over the scene's grey, where the scene is
        grey = Image.open(scene).convert("L").getpixel((32 * column + 1, 32 * row + 30))
        colour = predict.pick_colour(list(COLOURS).index(truth[row][column]))
        assert picture.getpixel((32 * column + 1, 32 * row + 30)) == pytest.approx([0.6 * a + 0.4 * grey for a in colour], abs=2)
    assert (tmp_path / "map" / "map.pgw").read_text().split() == ["10.0", "0.5", "0.25", "-10.0", "500005.125", "4999995.0"]
    Image.open(scene).crop((64, 32, 96, 64)).save(tmp_path / "one.png")
    single, = records(run("predict", "--checkpoint", trained.model, tmp_path / "one.png").out)
    assert float(found[1, 2]["probability"]) == pytest.approx(float(single["probability"]), abs=0.02)


def test_overlaps_and_ragged_edges(run, trained, mosaic, tmp_path):
    scene, truth = mosaic
    Image.open(scene).crop((0, 0, 150, 100)).save(tmp_path / "ragged.png")
    argv = ("--checkpoint", trained.model, "--scene", tmp_path / "ragged.png", "--tile", 32, "--out", tmp_path / "map")
    whole = run("predict", *argv)
    assert (whole.json["rows"], whole.json["columns"], whole.json["tiles"]) == (4, 5, 20) and not (tmp_path / "map" / "map.pgw").exists()
    assert all(cells(tmp_path / "map")[row, column]["class"] == truth[row][column] for row in range(3) for column in range(4))
    half = run("predict", *argv, "--stride", 16)
    found = cells(tmp_path / "map")
    assert (half.json["rows"], half.json["columns"], half.json["tiles"]) == (7, 10, 6 * 9) and len(found) == 70
    assert found[0, 0]["class"] == truth[0][0] and sum(half.json["percent"].values()) == pytest.approx(100, abs=0.01)
    unsure = run("predict", *argv, "--stride", 16, "--min-confidence", 0.9)
    assert unsure.json["percent"]["unknown"] > 0
    assert {key for key, row in cells(tmp_path / "map").items() if row["class"] == "unknown"} == {key for key, row in found.items() if float(row["probability"]) < 0.9}


def test_weights_of_overlaps():
    from types import SimpleNamespace

    import predict
    assert predict.tile_starts(64, 64, 64) == [0] and predict.tile_starts(128, 64, 64) == [0, 64] and predict.tile_starts(100, 64, 32) == [0, 32, 36]
    weights = predict.share_cells([0, 36], SimpleNamespace(tile=64, stride=64), 100)
    assert weights.tolist() == [[pytest.approx(64 / 92), pytest.approx(28 / 92)], [0, 1]]


def test_a_large_map_is_scaled_down_in_place(run, trained, mosaic, tmp_path, monkeypatch):
    import predict
    monkeypatch.setattr(predict, "MAP_SIDE", 40)
    (tmp_path / "scene.PGW").rename(tmp_path / "scene.wld")
    result = run("predict", "--checkpoint", trained.model, "--scene", mosaic[0], "--tile", 32, "--out", tmp_path / "map")
    picture = Image.open(tmp_path / "map" / "map.png")
    assert result.json["map_scale"] == 4 and picture.getpixel((39, 31)) != (255, 255, 255) == picture.getpixel((40, 31)) == picture.getpixel((39, 32))
    # The centre of the map's first pixel is 1.5 scene pixels right of and below that of the scene's.
    assert [float(x) for x in (tmp_path / "map" / "map.pgw").read_text().split()] == [40, 2, 1, -40, 500005.125 + 1.5 * 10.25, 4999995 - 1.5 * 9.5]


def test_a_turned_scene_with_a_world_file_is_refused(run, trained, mosaic, tmp_path):
    scene, exif = Image.open(mosaic[0]), Image.Exif()
    exif[0x112] = 6
    scene.save(mosaic[0], exif=exif)
    argv = ("--checkpoint", trained.model, "--scene", mosaic[0], "--tile", 32, "--out", tmp_path / "map")
    assert "EXIF" in run("predict", *argv, code=2).error[0]
    (tmp_path / "scene.PGW").unlink()
    assert (run("predict", *argv).json["rows"], run("predict", *argv).json["columns"]) == (5, 4)


def test_wrong_scenes(run, trained, mosaic, images, tmp_path, monkeypatch):
    import predict
    scene = mosaic[0]
    start = ("--checkpoint", trained.model)
    for argv, word in ((("--scene", scene), "--out"), (("--scene", scene, "--out", tmp_path / "m", images), "IMAGE"),
                       (("--scene", scene, "--out", tmp_path / "m", "--tile", 16, "--stride", 17), "gaps"),
                       (("--scene", scene, "--out", tmp_path / "m", "--tile", 129), "larger"), ((), "--scene"),
                       (("--scene", tmp_path / "no.png", "--out", tmp_path / "m"), "no such file"), ((images, "--out", tmp_path / "m"), "--scene"),
                       (("--scene", scene, "--out", tmp_path / "m", "--tta", "--tile", 32), "--augment")):
        assert word in run("predict", *start, *argv, code=2).error[0]
    (tmp_path / "scene.PGW").write_text("1 2 3")
    assert "scene.PGW" in run("predict", *start, "--scene", scene, "--tile", 32, "--out", tmp_path / "m", code=2).error[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # to be restored
    monkeypatch.setattr(predict, "SCENE_PIXELS", 160 * 128 - 2)
    assert "exceeds limit" in run("predict", *start, "--scene", scene, "--tile", 32, "--out", tmp_path / "m", code=2).error[0]
    assert not (tmp_path / "m").exists() or not list((tmp_path / "m").iterdir())


def test_colours_of_classes():
    import predict
    colours = [predict.pick_colour(index) for index in range(200)]
    assert len(set(colours)) == 200 and all(0 <= part <= 255 for colour in colours for part in colour)
    assert min(sum(abs(a - b) for a, b in zip(x, y)) for x in colours[:10] for y in [*colours[:10], (128, 128, 128)] if x != y) > 100


def test_map_of_real_tiles(run, tmp_path):
    """The published test tiles of three classes, laid out as a scene: the map knows most of them."""
    import zipfile
    archive, weights = zipfile.ZipFile(real("eurosat", "EuroSAT.zip")), real("weights", "mobilenet_v2_imagenet.pth")
    test = real("eurosat", "split-neumann", "test.txt").read_text().split()
    train = real("eurosat", "split-neumann", "train.txt").read_text().split()
    names = ("Forest", "Residential", "SeaLake")
    for name in names:
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for file in [file for file in train if file.startswith(f"{name}_")][:30]:
            (tmp_path / "data" / "train" / name / f"{file.rpartition('.')[0]}.jpg").write_bytes(read_member(archive, file))
    run("train", "--data", tmp_path / "data", "--out", tmp_path / "run", "--arch", "mobilenet_v2", "--weights", weights, "--epochs", 20, "--no-cache", "--device", "cpu")
    scene, truth = Image.new("RGB", (10 * 64, 6 * 64)), {}
    tiles = {name: iter([file for file in test if file.startswith(f"{name}_")]) for name in names}
    for row in range(6):
        for column in range(10):
            truth[row, column] = names[(column + row // 2) // 4 % 3]
            scene.paste(Image.open(io.BytesIO(read_member(archive, next(tiles[truth[row, column]])))), (64 * column, 64 * row))
    scene.save(tmp_path / "scene.png")
    run("predict", "--checkpoint", tmp_path / "run" / "model.pt", "--scene", tmp_path / "scene.png", "--out", tmp_path / "map")
    assert sum(row["class"] == truth[key] for key, row in cells(tmp_path / "map").items()) >= 0.95 * 60


def read_member(archive, file):
    stem = file.rpartition(".")[0]
    return archive.read(f"2750/{stem.rpartition('_')[0]}/{stem}.jpg")


# ---------------------------------------------------------------- no lock-in

def test_five_lines_of_the_readme(run, trained, tree, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code, = [block for block in blocks if "get_model" in block]
    lines = [line for line in code.splitlines() if line and not re.match("import|from", line)]
    assert len(lines) == 5 and not re.search("common|predict|train", code)
    image = tree / "test" / "green" / "green 3.png"
    (tmp_path / "runs" / "eurosat").mkdir(parents=True)
    (tmp_path / "runs" / "eurosat" / "model.pt").write_bytes(trained.model.read_bytes())
    Image.open(image).save(tmp_path / "tile.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("tile.jpg", "tile.png"), names)
    row, = records(run("predict", "--checkpoint", trained.model, image, "--precision", "fp32").out)
    probability, index = names["probabilities"].max(1)
    assert names["checkpoint"]["classes"][index] == row["class"]
    assert probability.item() == pytest.approx(float(row["probability"]), abs=1e-4)
