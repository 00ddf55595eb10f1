"""Shared by all tests: run a script as a user does, make small image trees, and find the real data where it exists."""

from __future__ import annotations

import atexit
import contextlib
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared"))
sys.path.insert(0, str(ROOT))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-of-tests-")  # tests never use the user's own cache
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# Idle threads sleep instead of spinning, which on a busy machine would slow the tests down several times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The smallest useful run: random weights and small images, so that an epoch takes milliseconds.
SMALL = ["--arch", "resnet18", "--weights", "none", "--image-size", "32", "--device", "cpu", "--precision", "fp32"]
# The same for fine-tuning, which saves all weights after each epoch: a network of 1.4 million parameters.
TINY = ["--arch", "shufflenet_v2_x0_5", *SMALL[2:]]
COLORS = {"blue": (30, 40, 190), "green": (40, 160, 50), "red": (190, 40, 40)}


# ---------------------------------------------------------------- run a script


@dataclass
class Result:
    """How a script ended, and what it printed."""

    code: int | str | None
    out: str
    err: str

    @property
    def json(self) -> dict | None:
        """The JSON object on the last line of stdout, or None if there is none."""
        lines = self.out.strip().splitlines()
        return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None

    @property
    def error(self) -> list[str]:
        """A list of one item, the last line of stderr; an empty list if there is none."""
        return self.err.strip().splitlines()[-1:]


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    """Return a function: run("train", "--data", ...) calls train.main(argv) in this process and returns a Result.

    It fails unless the exit code is `code`; None accepts any. With exit code 2, the last line of stderr has to be an
    error message of the script, and there must not be a traceback.
    """

    def call(script: str, *argv: object, code: int | None = 0) -> Result:
        module = __import__(script)
        capsys.readouterr()
        try:
            returned = module.main([str(argument) for argument in argv])
        except SystemExit as error:  # argparse
            returned = error.code
        result = Result(returned, *capsys.readouterr())
        assert code is None or returned == code, f"{script} ended with {returned}, not {code}:\n{result.err}"
        if code == 2:
            assert result.error[0].startswith(f"{script}.py: error: ") and "Traceback" not in result.err
        return result

    return call


@contextlib.contextmanager
def after_epochs(action: Callable[[int], object]) -> Iterator[None]:
    """Have train.py call action(n) once it has saved n epochs, in this process and during the block."""
    import train

    record_epoch, count = train.RunFiles.record_epoch, 0

    def record_and_act(*args: object) -> None:
        nonlocal count
        record_epoch(*args)
        count += 1
        action(count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.RunFiles, "record_epoch", record_and_act)
        yield


@pytest.fixture
def run_interrupted(run: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function: run_interrupted(n, "--data", ...) runs train.py, interrupted as by Ctrl-C after n epochs."""

    def call(epochs: int, *argv: object) -> Result:
        def interrupt(count: int) -> None:
            if count == epochs:
                raise KeyboardInterrupt

        with after_epochs(interrupt):
            return run("train", *argv, code=130)

    return call


def command(script: str, *argv: object, **kwargs: object) -> subprocess.CompletedProcess:
    """Run a script as a command, in a process of its own; `kwargs` are those of subprocess.run."""
    line = [sys.executable, ROOT / f"{script}.py", *argv]
    return subprocess.run([str(part) for part in line], capture_output=True, text=True, timeout=300, **kwargs)


def pipe_without_reader() -> TextIO:
    """Return a pipe to write to, whose reader is gone, as in `script.py | true`."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


# ---------------------------------------------------------------- read what a script wrote


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header. Its lines have to end in line feeds, as all our files' do."""
    content = Path(path).read_bytes()
    assert content.endswith(b"\n") and b"\r\n" not in content
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> list[str]:
    """Return the names of the files and folders in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def load_pt(path: str | Path) -> dict:
    """Return the content of a file that was written by torch.save."""
    import torch

    return torch.load(path, weights_only=True)


def equal_tensors(a: dict, b: dict) -> bool:
    """Return whether two dicts have the same tensors, to the bit, under the same names."""
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- data


def tile(color: tuple[int, int, int], seed: object, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Return a noisy tile of one color: classes are easy to recognize, and no two files are equal."""
    rng = random.Random(seed)
    noise = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    return Image.blend(Image.new("RGB", size, color), noise, 0.3)


def make_tree(folder: Path, counts=(("train", 20), ("val", 8), ("test", 10)), classes=COLORS) -> Path:
    """Make FOLDER/<split>/<class>/*.png, or, with counts=(("", n),), FOLDER/<class>/*.png, and return FOLDER."""
    for split, count in counts:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = tile(COLORS[name], f"{split}{name}{number}")
                image.save(folder / split / name / f"{name} {number}.png")
    return folder


def real(*parts: str) -> Path:
    """Return a path of the real data; the test is skipped where it does not exist."""
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path.name} of the real data (set REAL_DATA)")
    return path


# ---------------------------------------------------------------- fixtures that all tests share

Stamps = dict[Path, tuple[int, int]]  # size and modification time of files and folders
shared: dict[Path, Stamps] = {}  # the files and folders of these fixtures, as they were made


def stamps(path: Path) -> Stamps:
    """Return the stamps of a file, or of a folder and all that it contains."""
    found = [inner for inner in (path, *path.rglob("*")) if inner.exists()]
    return {inner: (inner.stat().st_size, inner.stat().st_mtime_ns) for inner in found}


@pytest.fixture(autouse=True)
def shared_files_stay_the_same() -> Iterator[None]:
    """Fail the test that changes the files of a shared fixture. (Read-only files would not stop the user root.)"""
    yield
    changed = {path: now for path, before in shared.items() if (now := stamps(path)) != before}
    shared.update(changed)
    if changed:
        pytest.fail(f"the test changed files that all tests share, copy them first: {', '.join(map(str, changed))}")


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of three classes. Tests that change it work on a copy."""
    folder = make_tree(tmp_path_factory.mktemp("data") / "colors")
    shared[folder] = stamps(folder)
    return folder


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of a ResNet-18 with random weights, as a file: runs with different seeds share their backbone."""
    import torch
    import torchvision

    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(5)
    torch.save(torchvision.models.resnet18().state_dict(), file)
    shared[file] = stamps(file)
    return file


@pytest.fixture(scope="session")
def similar_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of three classes of which two look alike: no model is without errors."""
    counts = (("train", 24), ("val", 30), ("test", 30))
    data = make_tree(tmp_path_factory.mktemp("similar") / "data", counts)
    for split, count in counts:
        for number in range(count):
            for name, red in (("red", 105), ("blue", 95)):
                shade = red + random.Random(f"{split}{name}{number}").randrange(-12, 12)
                tile((shade, 40, 100), f"hard {split}{name}{number}").save(data / split / name / f"{name} {number}.png")
    shared[data] = stamps(data)
    return data


@dataclass
class Trained(Result):
    """A finished run of train.py."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model.pt"


@pytest.fixture(scope="session")
def trained(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run on that tree, by the real command. Tests that change its files work on a copy."""
    out = tmp_path_factory.mktemp("runs") / "colors"
    done = command("train", "--data", tree, "--out", out, "--epochs", 4, "--lr", 0.01, *SMALL)
    assert done.returncode == 0, done.stderr
    for name in ("model.pt", "last.pt", "history.csv"):  # not the folder, which receives the reports of evaluate.py
        shared[out / name] = stamps(out / name)
    return Trained(done.returncode, done.stdout, done.stderr, out)
