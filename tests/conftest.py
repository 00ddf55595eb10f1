"""Shared by all tests: running a script as a user does, small made trees, and the real data where it is present."""
import atexit
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared"))
sys.path.insert(0, str(ROOT))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-of-tests-")  # nobody's own cache is read or written
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# The smallest useful run: random weights, small images, a model that runs in milliseconds.
SMALL = ["--arch", "resnet18", "--weights", "none", "--image-size", "32", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def run(capsys):
    """run("train", "--data", ...) calls train.main(argv): an object with code, out, err and json (the last line of stdout).

    It ends with `code`; None: with any.
    """
    def call(script, *argv, code=0):
        module = __import__(script)
        capsys.readouterr()
        try:
            result = module.main([str(a) for a in argv])
        except SystemExit as exit:  # argparse
            result = exit.code
        captured = capsys.readouterr()
        assert code is None or result == code, f"{script} ended with {result}, not {code}:\n{captured.err}"
        if code == 2:
            assert captured.err.strip().splitlines()[-1].startswith(f"{script}.py: error: ") and "Traceback" not in captured.err
        lines = captured.out.strip().splitlines()
        last = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
        return SimpleNamespace(code=result, out=captured.out, err=captured.err, json=last, error=captured.err.strip().splitlines()[-1:])
    return call


def command(script, *argv, **kwargs):
    """Start the real command in a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)], capture_output=True, text=True, timeout=300, **kwargs)


def tile(colour, seed, size=(32, 32)):
    """A noisy tile of one colour: classes are easy to tell apart, and no two files are equal."""
    rng = random.Random(seed)
    noise = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    return Image.blend(Image.new("RGB", size, colour), noise, 0.3)


COLOURS = {"blue": (30, 40, 190), "green": (40, 160, 50), "red": (190, 40, 40)}


def make_tree(folder, counts=(("train", 20), ("val", 8), ("test", 10)), classes=COLOURS):
    """Make FOLDER/<split>/<class>/*.png; with counts=(("", n),), FOLDER/<class>/*.png."""
    for split, count in counts:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                tile(COLOURS[name], f"{split}{name}{number}").save(folder / split / name / f"{name} {number}.png")
    return folder


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A tree of three classes that nobody may change."""
    return make_tree(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def trained(tree, tmp_path_factory):
    """A finished run on that tree, by the real command: an object with folder, model, stdout, stderr."""
    out = tmp_path_factory.mktemp("runs") / "colours"
    done = command("train", "--data", tree, "--out", out, "--epochs", 4, "--lr", 0.01, *SMALL)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=out, model=out / "model.pt", out=done.stdout, err=done.stderr, json=json.loads(done.stdout.splitlines()[-1]))


def real(*parts):
    """A path of the real data; the test is skipped where it is not present."""
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path.name} of the real data (set REAL_DATA)")
    return path
