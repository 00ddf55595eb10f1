"""What the four scripts share: command line, files, images, model, features, checkpoint.

A function that only one script needs lives in that script. torch is imported when it is first used, so that `--help`
answers at once.
"""

from __future__ import annotations

import os
import signal
import sys

# Until a script has its own handler, Ctrl-C ends it at once: nothing is to be cleaned up while modules are imported.
if os.path.dirname(getattr(sys.modules["__main__"], "__file__", "")) == os.path.dirname(__file__):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import array
import collections
import contextlib
import copy
import csv
import ctypes
import datetime
import difflib
import errno
import functools
import gc
import glob
import hashlib
import http.client
import importlib
import io
import json
import math
import mmap
import platform
import re
import stat
import statistics
import struct
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

import PIL
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401
from PIL import Image, ImageOps, UnidentifiedImageError

# ---------------------------------------------------------------- command line

EXIT_USAGE, EXIT_SOME_UNREADABLE, EXIT_BELOW_BAR, EXIT_KEPT_OLD, EXIT_LOCKED, EXIT_SIGINT = 2, 3, 4, 5, 75, 130
EXIT_CODES = """exit codes:
  0 success    1 a bug in this program (please report it)    2 wrong usage or input: see the error message
  3 finished, but some images could not be read (predict.py)    4 accuracy below --fail-under (evaluate.py)
  5 --only-if-better kept the old model (train.py)    75 another run holds the output folder
  129, 130, 143 ended by SIGHUP, SIGINT, SIGTERM"""
TTA_HELP = (
    "test-time augmentation: average the probabilities over the views that the model was trained with, one forward "
    "pass for each; refused for a model that was trained without views"
)
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # this process was started by torchrun
RANK, WORLD_SIZE = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if TORCHRUN else (0, 1)


class LazyModule:
    """A module that is imported when it is first used: torch takes seconds to import, and `--help` should not wait."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if self._name not in sys.modules:
            gc.disable()  # garbage collection would take a fifth of the import's time and find nothing
            try:
                with defer_signals():  # some libraries abort if an exception interrupts their import
                    importlib.import_module(self._name)
            finally:
                gc.enable()
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch
    import torchvision
    from torchvision.transforms.v2 import functional
else:
    torch, torchvision = LazyModule("torch"), LazyModule("torchvision")
    functional = LazyModule("torchvision.transforms.v2.functional")


class UserError(Exception):
    """Wrong input. The message is one line that names the problem and the way out; the script ends with `exit_code`."""

    exit_code = EXIT_USAGE


class ImageError(UserError):
    """An image that cannot be read. `reason` is the message without the path."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path, self.reason = str(path), one_line(reason)
        super().__init__(f"cannot read image {self.path}: {self.reason}")


class LockedError(UserError):
    """Another run holds the lock of an output folder."""

    exit_code = EXIT_LOCKED


def one_line(text: object) -> str:
    """Replace every run of white space, line breaks included, by one space."""
    return " ".join(str(text).split())


def printable(text: str) -> str:
    """Escape what cannot be shown in a line, a picture or a page, such as a line break in a file name."""
    return text if text.isprintable() else repr(text)[1:-1]


def shorten(text: str, length: int = 26) -> str:
    """Return a printable text of at most `length` characters, shortened in the middle."""
    text = printable(text)
    return text if len(text) <= length else f"{text[: length // 2 - 1]}...{text[2 - length // 2 :]}"


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[[Sequence[str] | None], int]:
    """Decorate a script's main(argv): return its exit code, and report wrong input as one line on stderr."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        if argv is None and sys.getfilesystemencoding() != "utf-8":  # in the locale C, but file names are UTF-8
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)):  # not on Windows
            if signal.getsignal(number) != signal.SIG_IGN:  # a shell ignores SIGINT in the jobs it starts with &
                with contextlib.suppress(ValueError):  # not in the main thread
                    signal.signal(number, handle_signal)
        sys.stdout = sys.stdout or open(os.devnull, "w")  # it was closed by >&-
        sys.stderr = sys.stderr or open(os.devnull, "w", errors="replace")
        return run_main(argv) if WORLD_SIZE == 1 else leave_at_once_on_failure(lambda: run_main(argv))

    def run_main(argv: Sequence[str] | None) -> int:
        code = 0
        try:
            code = main(argv) or 0
            print(end="", flush=True)  # so that a write error is reported here, not when Python exits
            return code
        except UserError as error:
            message, code = one_line(error), error.exit_code
        except KeyboardInterrupt as error:
            message, code = "interrupted", error.args[0] if error.args else EXIT_SIGINT
        except OSError as error:  # a full disk, a folder without write permission: name it
            name = " to ".join(str(name) for name in (error.filename, error.filename2) if name)
            try:
                print(end="", flush=True)
            except OSError:  # stdout itself failed: discard what is still buffered
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                name = name or "stdout"
            if isinstance(error, BrokenPipeError):  # the reader has seen enough, as in `predict.py ... | head`
                return code
            message, code = f"{name}: {error.strerror}" if name else str(error), EXIT_USAGE
        except (MemoryError, RuntimeError, ImportError) as error:
            if not is_out_of_memory(error):
                raise
            message, code = ": ".join(filter(None, ("not enough memory", one_line(error)[:200]))), EXIT_USAGE
        script = Path(sys.modules[main.__module__].__file__).name
        log(f"{script}: error: {message}", stamp=False, every_rank=True)
        return code

    return run


def leave_at_once_on_failure(main: Callable[[], int]) -> int:
    """Run one of several processes; end it without cleaning up if it raises, or returns an exit code other than 0.

    The exit handlers of libraries would wait for the other processes, and these for this one: a deadlock. Once this
    process is gone, torchrun ends the others.
    """
    code = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException as error:
        if "gloo" in str(error) or isinstance(error, torch.distributed.DistError):
            log("ended, because the connection to another process is lost", every_rank=True)
        else:
            traceback.print_exc()
    if code:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


pending_signals: list[int] | None = None  # inside `defer_signals`: the signals received so far


def handle_signal(number: int, _frame: object) -> None:
    """End the program by KeyboardInterrupt, so that temporary files are removed; `defer_signals` delays that."""
    if pending_signals != []:
        raise KeyboardInterrupt(128 + number)
    pending_signals.append(number)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Let a signal take effect at the end of the block instead of inside it. A second signal takes effect at once."""
    global pending_signals
    if pending_signals is not None:  # nested: the outer block handles the signal
        yield
        return
    pending_signals = received = []
    try:
        yield
    finally:
        pending_signals = None
        if received:
            raise KeyboardInterrupt(128 + received[0])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of descriptions, and append `(default: ...)` where there is a default worth stating."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors show the usage of the options that they are about, not that of all."""

    def error(self, message: str) -> NoReturn:
        options = {name: action for action in self._actions for name in action.option_strings}
        if message.startswith("unrecognized arguments: "):
            names = (text.partition("=")[0] for text in message.split() if text.startswith("-"))
            if close := [match for name in names for match in difflib.get_close_matches(name, options, 1)]:
                message += f"; did you mean {' and '.join(close)}?"
        shown = dict.fromkeys(options[name] for name in re.findall(r"--?[a-z0-9-]+", message) if name in options)
        formatter = self._get_formatter()
        formatter.add_usage(None if shown else "%(prog)s [options], see %(prog)s --help", shown, [])
        self.exit(EXIT_USAGE, f"{formatter.format_help()}{self.prog}: error: {printable(message)}\n")


def make_parser(script: str, description: str, example: str) -> argparse.ArgumentParser:
    """Make an argument parser whose help ends with an example and the exit codes."""
    epilog = f"example:\n  {example}\n\n{EXIT_CODES}"
    options = {"epilog": epilog, "formatter_class": HelpFormatter, "allow_abbrev": False}
    return Parser(prog=script, description=description, **options)


def number_type(kind: type, description: str, accept: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Make an argparse type: numbers of a kind (int or float) for which `accept` is true."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if accept(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")

    return parse


positive_int = number_type(int, "a whole number between 1 and 2^31 - 1", lambda value: 1 <= value < 1 << 31)
positive_float = number_type(float, "a positive number", lambda value: 0 < value < math.inf)
non_negative_float = number_type(float, "zero or a positive number", lambda value: 0 <= value < math.inf)
fraction = number_type(float, "a number between 0 and 1", lambda value: 0 <= value <= 1)
seed_number = number_type(int, "a whole number between 0 and 2^63 - 1", lambda value: 0 <= value < 1 << 63)


def add_hardware_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every script that runs a model: --device, --precision, --workers."""
    add = parser.add_argument_group("hardware").add_argument
    add("--device", help="cpu, cuda, cuda:1, mps (default: CUDA, else MPS, else CPU)")
    precision = (
        "of the network; auto: bf16 where the processor supports it natively, else fp16 on NVIDIA GPUs from 7.0 "
        "(not for fine-tuning), else fp32, which never means TF32; a model that was trained in fp32 stays in fp32"
    )
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=precision)
    workers = "threads that read images (default: 2 per core, at most 16; fewer when fine-tuning on a CPU)"
    add("--workers", type=positive_int, metavar="N", help=workers)


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the feature cache."""
    add = parser.add_argument_group("feature cache").add_argument
    add("--cache", type=Path, default=default_cache(), metavar="DIR", help="folder of the feature cache")
    add("--no-cache", action="store_true", help="do not use the feature cache")
    limit = "above this size, remove the least recently used features"
    add("--cache-limit", type=positive_float, default=20, metavar="GB", help=limit)


def default_cache() -> Path | None:
    """Return the default of --cache, in the user's cache folder; None for a user without a home."""
    with contextlib.suppress(RuntimeError):  # as in some containers
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "transfer-learning", "features")
    return None


def log(message: str, stamp: bool = True, every_rank: bool = False, redraw: bool = False) -> None:
    """Print a message on stderr, with date and time if stderr is not a terminal, and `stamp` is left on.

    Of several processes only the first prints, unless `every_rank` is set. With `redraw`, the message replaces the
    terminal's current line. Characters that would control the terminal are escaped.
    """
    if RANK and not every_rank:
        return
    prefix = time.strftime("%Y-%m-%d %H:%M:%S ") if stamp and not sys.stderr.isatty() else ""
    prefix, end = ("\r\x1b[K", "") if redraw else (prefix, "\n")
    try:
        print(prefix + "\n".join(map(printable, message.split("\n"))), end=end, file=sys.stderr, flush=True)
    except OSError:  # stderr is closed or its disk is full: the work goes on without messages
        sys.stderr = open(os.devnull, "w", errors="replace")


class Progress:
    """Progress on stderr with rate and time left: a bar on a terminal, otherwise a line every `every` seconds."""

    def __init__(self, label: str, total: int | None, unit: str = "img", every: float = 30) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.bar = sys.stderr.isatty()
        self.every = 0.1 if self.bar else every
        self.done, self.start, self.shown = 0, time.monotonic(), time.monotonic()

    def update(self, count: int) -> None:
        """Count `count` more units as done."""
        self.done += count
        now = time.monotonic()
        if now - self.shown < self.every:
            return
        self.shown, rate = now, self.done / max(now - self.start, 1e-9)
        total, rest, filled = "", "", 0
        if self.total:
            left = int((self.total - self.done) / max(rate, 1e-9))
            total, rest, filled = f"/{self.total}", f", {left // 60}:{left % 60:02d} left", 20 * self.done // self.total
        speed = f"{rate:.{0 if rate >= 100 else 1}f} {self.unit}/s"
        text = f"{self.label} {self.done}{total} {self.unit}, {speed}{rest}"
        if self.bar:
            log(f"[{'#' * filled}{'.' * (20 - filled)}] {text}", redraw=True)
        else:
            log(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.bar:
            log("", redraw=True)
        seconds = time.monotonic() - self.start
        if kind is None and seconds > 1:
            log(f"{self.label}: {self.done} {self.unit} in {seconds:.1f} s, {self.done / seconds:.0f} {self.unit}/s")


# ---------------------------------------------------------------- files


def remove_leftovers(folder: Path, pattern: str = "*", age: float = 0) -> None:
    """Remove the temporary files of `atomic_write` for names like `pattern` that are at least `age` seconds old.

    Killed runs leave them behind. Running processes have such files too: pass an age, or hold a lock.
    """
    for leftover in folder.glob(f".{pattern}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.suppress(OSError):  # another run may have removed it
            if time.time() - leftover.stat().st_mtime >= age:
                leftover.unlink()


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that replaces `path` when the block ends without an error, completely written and flushed to disk."""
    path = Path(path)
    remove_leftovers(path.parent, glob.escape(path.name), age=86400)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        text = {} if "b" in mode else {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
        with name_errors(path):
            with open(temporary, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json_text(value: Any, indent: int | None = None) -> str:
    """Return plain values as JSON. Raises UserError for numbers that JSON does not have: infinite ones and NaN."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        raise UserError("a number in the result is not finite: the model's weights or its data are damaged") from None


def print_json(result: dict, summary: str) -> None:
    """Print the result of a script as a line on stdout, unless that is a terminal, and log a summary for people.

    A closed pipe does not change the exit code.
    """
    with contextlib.suppress(BrokenPipeError):
        if not sys.stdout.isatty():
            print(to_json_text(result), flush=True)
    log(summary)


def check_output_outside(option: str, out: Path, inputs: Iterable[str | Path]) -> None:
    """Raise UserError if an output is one of these files or folders, or inside one, and so would become an input."""
    real = Path(os.path.realpath(out))

    def is_same(place: Path, path: str | Path) -> bool:
        with contextlib.suppress(OSError):  # one of them does not exist
            return os.path.samefile(place, path)
        return False

    for path in inputs:
        if any(is_same(place, path) for place in (real, *real.parents)):
            raise UserError(f"{option} {out} would replace or be inside the input {path}; choose another place")


@contextlib.contextmanager
def name_errors(path: str | Path) -> Iterator[None]:
    """Name a file or folder in an OSError of the block that names none, as that of a full disk does."""
    try:
        yield
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def csv_writer(file: IO[str]) -> Any:
    """Make the csv.writer that all scripts use, with a line feed at the end of each line."""

    class LineFeedFile:  # with lineterminator="\n", Python 3.10 would not quote cells with a carriage return
        def write(self, line: str) -> None:
            file.write(line.removesuffix("\r\n") + "\n")

    return csv.writer(LineFeedFile())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically; None becomes an empty cell."""
    with atomic_write(path) as file:
        csv_writer(file).writerows([header, *rows])


def new_figure(width: float, height: float) -> Any:
    """Make a matplotlib figure of width x height inches that needs no display."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a $ in a class name is a dollar sign
    return Figure(figsize=(width, height), layout="constrained")


@functools.cache
def fit_text(text: str) -> tuple[str, str]:
    """Return a text, and the file of a font that has its letters.

    If no font has all of them, those that the default font lacks are escaped, in place of boxes.
    """
    from matplotlib import font_manager, ft2font

    default = font_manager.findfont(font_manager.FontProperties())
    installed = (font.fname for font in font_manager.fontManager.ttflist if "LastResort" not in font.fname)
    for file in chain([default], installed):
        font = os.path.exists(file) and ft2font.FT2Font(file)  # matplotlib's list may name one that was removed
        if font and font.scalable and all(map(font.get_char_index, map(ord, text.replace("\n", "")))):
            return text, file
    has = ft2font.FT2Font(default).get_char_index
    return "".join(letter if letter == "\n" or has(ord(letter)) else ascii(letter)[1:-1] for letter in text), default


def save_figure(path: Path, figure: Any) -> None:
    """Save a matplotlib figure as a PNG file, atomically, each text with a font that has its letters."""
    from matplotlib.text import Text

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if labels != (fitted := [fit_text(label)[0] for label in labels]):
            axis.set_ticks(axis.get_ticklocs(), fitted)
    for artist in figure.findobj(Text):
        text, font = fit_text(artist.get_text())
        artist.set_text(text)
        artist.get_fontproperties().set_file(None if font == fit_text("")[1] else font)
    with atomic_write(path, "wb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a bold font may lack a letter
        figure.savefig(file, format="png", dpi=120)


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold a lock file during the block. The operating system releases the lock when the process ends, even if killed.

    Folders above `path` are created, and removed again if they are empty in the end. Raises LockedError if another
    process holds the lock.
    """
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        file = acquire_lock(path)
        try:
            yield
        finally:
            # Windows cannot remove an open file; and a file with content is that of another program.
            if os.name != "nt" and not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)
            file.close()
    finally:
        for folder in created:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()


def acquire_lock(path: Path) -> IO[str]:
    """Open and lock a file, but no link; closing it releases it. Raises LockedError if another process holds it."""
    no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a", opener=lambda name, flags: os.open(name, flags | no_link, 0o666))
        except FileNotFoundError:  # another process has just removed the empty folder
            continue
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):  # its last holder has just removed it
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()  # try again with a new file
        except (BlockingIOError, PermissionError):
            file.close()
            raise LockedError(f"another run holds {path}; wait for it to end") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            log(f"warning: {path} cannot be locked ({error.strerror}): let no other run use this folder")
            return file


def hash_file(path: str | Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal digest of a file's content. Raises OSError for pipes and devices, which may never end."""
    require_regular_file(path)
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_regular_file(path: str | Path) -> None:
    """Raise OSError for a file that does not exist, and for pipes and devices, which may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file, or a folder that cannot be read", str(path))


def read_content(path: str | Path) -> bytes:
    """Return the content of an image file. Raises ImageError if it cannot be read."""
    try:
        require_regular_file(path)
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageError(
            path, "no such file" if error.errno == errno.ENOENT else error.strerror or str(error)
        ) from None


def hash_images(paths: Sequence[str], workers: int | None = None) -> list[str]:
    """Return the SHA-256 of each file's content. Raises ImageError for a file that cannot be read.

    A plain loop is fastest as long as the files are small and near; threads read large files and slow disks.
    """

    def read(path: str) -> str:
        return hashlib.sha256(read_content(path)).hexdigest()

    hashes: list[str] = []
    seconds = 0.0  # per file
    while len(hashes) < len(paths) and seconds < 2e-4:
        chunk, start = paths[len(hashes) : len(hashes) + 64], time.perf_counter()
        hashes += map(read, chunk)
        seconds = (time.perf_counter() - start) / len(chunk)
    with ThreadPoolExecutor(reader_threads(workers)) as executor:
        return hashes + list(executor.map(read, paths[len(hashes) :]))


def short_hashes(sha256: Sequence[str]) -> torch.Tensor:
    """Return the first 8 bytes of each SHA-256, uint8 [N, 8]: how a checkpoint remembers images."""
    return torch.tensor(list(bytes.fromhex("".join(digest[:16] for digest in sha256))), dtype=torch.uint8).view(-1, 8)


def are_among(sha256: Sequence[str], known: torch.Tensor) -> torch.Tensor:
    """Return whether each image [N] is among those remembered as `short_hashes` [M, 8]: bool [N]."""
    return torch.isin(short_hashes(sha256).view(torch.int64), known.contiguous().view(torch.int64))[:, 0]


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries on which the result of a network depends."""
    return {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__), "pillow": PIL.__version__}


def digest_of(value: object) -> str:
    """Return a digest of plain values, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


# ---------------------------------------------------------------- images

warnings.filterwarnings("ignore", module="PIL")  # about unusual images, even if all their pixels can be read
# The formats that are read, whatever a file is called; JPEG includes MPO, as from phones, and PPM the other portable
# bitmaps. Their plugins are imported above, because Pillow would import all that it has to find one.
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".tif", ".tiff", ".webp", ".bmp")
IMAGE_EXTENSIONS += (".ppm", ".pgm", ".pbm", ".pnm", ".pfm")
LARGE_IMAGE = 25_000_000  # pixels; an image takes up to 12 bytes a pixel until it is resized
large_image = threading.Lock()  # held by the thread that reads a larger one, so that one at a time is in memory
reading = threading.local()  # `scope` in a thread that reads images: holds the lock until the image is resized
SPLITS = ("train", "val", "test")
HISTORY_FIELDS = ["epoch", "lr", *(f"{split}_{what}" for split in SPLITS for what in ("loss", "acc")), "seconds"]
MAX_IMAGE_SIZE = 4096  # pixels per side of the images that a network takes
View = tuple[int, bool]  # quarter turns counterclockwise, and whether the image is mirrored first
# The views of each kind of augmentation; the first is the image as it is. "dihedral" has all symmetries of a square.
VIEWS: dict[str, list[View]] = {
    "none": [(0, False)],
    "flip": [(0, False), (0, True)],
    "dihedral": [(turns, mirrored) for mirrored in (False, True) for turns in range(4)],
}


@dataclass(frozen=True, eq=False)
class Split:
    """The images of a split, or some of them."""

    paths: list[str]
    targets: torch.Tensor  # class index of each image, int64 [N]
    sha256: list[str]  # hash of each file's content at the start of the run, in hexadecimal

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Sequence[int]) -> Split:
        """Return the images with these numbers."""
        paths, sha256 = ([values[row] for row in rows] for values in (self.paths, self.sha256))
        return Split(paths, self.targets[list(rows)], sha256)


def open_image(file: str | Path | IO[bytes]) -> Image.Image:
    """Open an image file, of IMAGE_FORMATS only: Pillow decides by the content, and runs Ghostscript for PostScript."""
    return Image.open(file, formats=IMAGE_FORMATS)


def read_image(path: str | Path, size: int | None = None, content: bytes | None = None) -> Image.Image:
    """Read an image file, or its content if that is given, as RGB, upright according to its EXIF orientation.

    With `size`, the side in pixels to which it will be resized, a JPEG that is several times as large is decoded at a
    half, a quarter or an eighth of its resolution, at least twice `size`, which is several times faster.

    Transparency is dropped and 16 bits per channel are scaled to 8. 32-bit integers and floats, which have no agreed
    range, are stretched from their finite minimum and maximum; NaN becomes black. Raises ImageError for a file that
    cannot be read or that declares more than 178 million pixels (Pillow's limit against decompression bombs).
    """
    try:
        if content is None:
            require_regular_file(path)
        with open_image(path if content is None else io.BytesIO(content)) as image:
            if size and image.format in ("JPEG", "MPO"):
                image.draft(None, (2 * size, 2 * size))
            if math.prod(image.size) > LARGE_IMAGE and hasattr(reading, "scope"):
                reading.scope.enter_context(large_image)
            image.load()
            is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            with contextlib.suppress(Exception):  # a broken EXIF block does not make the pixels unreadable
                ImageOps.exif_transpose(image, in_place=True)
            if is_16_bit:
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            elif image.mode in ("I", "F"):
                low, high = find_range(image)
                scale = 255 / (high - low) if high > low else 0
                image = image.convert("F").point(lambda value: value * scale - low * scale).convert("L")
            elif image.mode == "P":  # through RGBA: Pillow warns about transparency given as bytes otherwise
                image = image.convert("RGBA")
            return image if image.mode == "RGB" else image.convert("RGB")
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except UnidentifiedImageError:
        raise ImageError(path, "not a JPEG, PNG, TIFF, WebP, BMP, PPM or PGM file") from None
    except (
        *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError),
        *(RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
    ) as error:  # what Pillow's decoders raise for broken files
        reason = str(error).replace(repr(str(path)), "").replace(str(path), "").strip() or type(error).__name__
        raise ImageError(path, getattr(error, "strerror", None) or reason) from None


def find_range(image: Image.Image) -> tuple[float, float]:
    """Return minimum and maximum of the finite pixels of an image of mode "I" or "F"; raise ValueError without any."""
    low, high = image.getextrema()  # NaN if the first pixel is
    if not math.isfinite(high - low):
        pixels = array.array("f", image.tobytes())
        low, high = (extremum(filter(math.isfinite, pixels), default=math.nan) for extremum in (min, max))
        if math.isnan(low):
            raise ValueError("no pixel has a finite value")
    return low, high


def is_image_name(name: str) -> bool:
    """Return whether a file name has an image extension, in upper or lower case, and is not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def walk_folders(folder: str | Path, on_error: Callable | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield (path of a folder, names of its files) for a folder and all below it, sorted, without hidden folders.

    Links to folders are followed, and each folder is visited once. The error of one that cannot be read is passed on.
    """
    seen = set()
    for root, folders, files in os.walk(folder, onerror=on_error, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield root, sorted(files)
        seen.add(real)


def find_images(folder: str | Path) -> Iterator[str]:
    """Yield the paths of all images in a folder and below, and then of the folders there that cannot be read."""
    errors: list[OSError] = []
    for root, files in walk_folders(folder, errors.append):
        yield from (os.path.join(root, name) for name in files if is_image_name(name))
    yield from (error.filename for error in errors)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders in a folder, in ImageFolder's order. Hidden folders are not classes."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def list_split(folder: Path, classes: list[str] | None = None) -> tuple[list[str], list[str], list[int]]:
    """List FOLDER/<class>/*: (paths, class names, class index of each path).

    With `classes`, folders are matched to these names. Raises UserError for a folder that does not exist or has no
    class folders, for a class folder that `classes` lacks, and for a class folder without images.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    found = class_folders(folder)
    if not found:
        raise UserError(f"{folder} has no class folders; expected {folder}/<class>/<image>")
    names = classes if classes is not None else found
    if unknown := [name for name in found if name not in names]:
        raise UserError(
            f"{folder} has class folders that are not among the {len(names)} known classes: {', '.join(unknown[:5])}"
        )
    paths, targets = [], []
    for name in found:
        images = list(find_images(folder / name))
        if not images:
            raise UserError(f"class folder without images: {folder / name}; remove it, or put images into it")
        paths += images
        targets += [names.index(name)] * len(images)
    return paths, names, targets


def read_known(image: tuple[str, str], size: int | None = None) -> Image.Image:
    """Read an image, given as (path, SHA-256), like `read_image`. Raises ImageError if its content has changed."""
    path, sha256 = image
    content = read_content(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ImageError(path, "the file has changed since the run started; start again")
    return read_image(path, size, content)


def preprocess(images: Sequence[Image.Image], preprocessing: dict) -> torch.Tensor:
    """Turn RGB images into squares: uint8 [B, 3, s, s].

    If all images are squares of one side s <= `size`, they stay as they are, and are resized on the device of the
    network, with the same result. Otherwise they are resized to s = `size`.
    """
    parts = []
    for image in images:
        if crops_squares(preprocessing):
            image = image.crop(center_square(image.size))
        # Channels last, as Pillow has the pixels, which is also the fastest layout to resize and normalize.
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        parts.append(pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2))
    return join_pixels(parts, preprocessing["size"], preprocessing["interpolation"])


def crops_squares(preprocessing: dict) -> bool:
    """Return whether images are cropped to their center squares, as in all checkpoints of earlier versions."""
    return preprocessing.get("resize", "crop") == "crop"


def center_square(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, bottom) of the center square of an image of this width and height."""
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def join_pixels(parts: Sequence[torch.Tensor], size: int, interpolation: str) -> torch.Tensor:
    """Concatenate uint8 pixels [B, 3, h, w], resized to `size` unless all are squares with the same side up to that."""
    sides = {side for part in parts for side in part.shape[2:]}
    if len(sides) > 1 or max(sides, default=0) > size:
        parts = [resize(part, size, interpolation) for part in parts]
    return torch.cat(list(parts)) if parts else torch.empty(0, 3, size, size, dtype=torch.uint8)


def resize(pixels: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """Resize uint8 pixels [B, 3, h, w] to [B, 3, size, size] with antialiasing, with the same result on all devices.

    (Some versions of torchvision resize bilinearly in float32 on some processors, as 0.21 does with AVX-512: there the
    last bit may differ.)
    """
    if pixels.shape[2:] == (size, size):
        return pixels
    if pixels.device.type == "cpu" or interpolation.startswith("nearest"):
        mode = functional.InterpolationMode(interpolation)
        return functional.resize(pixels, [size, size], mode, antialias=True)
    return resize_by_products(pixels, size, interpolation)


def resize_weights(
    old: int, new: int, interpolation: str, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return the weights [new, old] of torch's resize of uint8 images, float32, computed in `dtype` (default: float64).

    They are rounded to fixed point, with as many binary places as keep the largest below 2^15, as in torch.
    """
    identity = torch.eye(old, dtype=dtype or torch.float64)[None, None]
    weights = torch.nn.functional.interpolate(identity, (new, old), mode=interpolation, antialias=True)[0, 0]
    unit = 2.0 ** -((2**15 - 0.5) / weights.max()).log2().floor().clamp(max=22)
    return ((weights / unit + 0.5 * weights.sign()).trunc() * unit).float().to(device)


cached_resize_weights = functools.cache(resize_weights)  # so that they are sent to a GPU only once


def resize_by_products(
    pixels: torch.Tensor, size: int, interpolation: str, weights_of: Callable[..., torch.Tensor] = cached_resize_weights
) -> torch.Tensor:
    """Resize uint8 pixels [B, 3, h, w] like torchvision on a CPU: rows, then columns, each rounded: [B, 3, size, size].

    It is a product of matrices for each, in float32, in which these weights and their sums are exact (except for
    images several times as large as `size`, of which a pixel in a hundred thousand may differ by 1).
    """
    rows, columns = (weights_of(side, size, interpolation, pixels.device) for side in pixels.shape[2:])

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return values.add_(0.5).floor_().clamp_(0, 255)

    return rounded(rows @ rounded(pixels.float() @ columns.T)).to(torch.uint8)


def apply_view(images: torch.Tensor, view: View) -> torch.Tensor:
    """Return a view of images [..., S, S]: mirrored left to right or not, then rotated by quarter turns."""
    turns, mirrored = view
    return torch.rot90(images.flip(-1) if mirrored else images, turns, (-2, -1))


def reader_threads(workers: int | None) -> int:
    """Return the number of threads that read images: --workers, or its default."""
    return workers or min(2 * (os.cpu_count() or 1), 16)


READ_CHUNK = 16  # images that a thread reads at a time: with one at a time, the threads wait for each other


class ImageBatch(NamedTuple):
    """A batch as `read_batches` yields it."""

    items: list[Any]  # what was to be read
    pixels: torch.Tensor  # of the images that could be read, as `preprocess` returns them
    errors: dict[int, ImageError]  # of the others, by their position in `items`

    def complete_pixels(self) -> torch.Tensor:
        """Return the pixels; raise the error of the first image that could not be read."""
        for error in self.errors.values():
            raise error
        return self.pixels


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any] | None]:
    """Group items into lists of `size`; a None among them ends a list early, and is passed on."""
    batch = []
    for item in items:
        if item is not None:
            batch.append(item)
        if batch and (item is None or len(batch) == size):
            yield batch
            batch = []
        if item is None:
            yield None
    if batch:
        yield batch


def read_batches(
    batches: Iterable[list[Any] | None],
    preprocessing: dict,
    workers: int | None = None,
    read: Callable[[Any, int], Image.Image] = read_image,
) -> Iterator[ImageBatch | None]:
    """Read batches of images in threads, ahead of the consumer, and yield them in order.

    `read` turns an item of a batch, and the size to which the image will be resized, into an RGB image. A None among
    the batches announces a possible wait for the next one: all that has been started is yielded first, then the None.
    Besides a batch, at most two chunks of resized images per thread are in memory, and of files an image per thread.

    Threads are enough, because Pillow and torch release the interpreter lock while they decode and resize; unlike
    worker processes they start at once and need no shared memory.
    """
    size, interpolation = preprocessing["size"], preprocessing["interpolation"]

    def load(chunk: list[Any]) -> tuple[torch.Tensor, list[ImageError | None]]:
        parts, errors = [], []
        for item in chunk:
            try:
                with contextlib.ExitStack() as reading.scope:
                    parts.append(preprocess([read(item, size)], preprocessing))
                errors.append(None)
            except ImageError as error:
                errors.append(ImageError(error.path, error.reason))  # without a traceback, which would keep the pixels
        return join_pixels(parts, size, interpolation), errors

    def merge(batch: list[Any], tasks: list[Future]) -> ImageBatch:
        parts, errors = zip(*(task.result() for task in tasks))
        failed = {number: error for number, error in enumerate(chain.from_iterable(errors)) if error}
        return ImageBatch(batch, join_pixels([part for part in parts if len(part)], size, interpolation), failed)

    threads = reader_threads(workers)
    executor, ahead = ThreadPoolExecutor(threads), collections.deque()
    try:
        for batch in chain(batches, [()]):
            if batch:
                ahead.append((batch, [executor.submit(load, chunk) for chunk in in_batches(batch, READ_CHUNK)]))
            while ahead and (not batch or sum(len(tasks) for _, tasks in islice(ahead, 1, None)) >= 2 * threads):
                yield merge(*ahead.popleft())
            if batch is None:
                yield None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def draw_images(file: Path, pictures: Sequence[tuple[str, str]], columns: int, title: str | None = None) -> None:
    """Draw at least one image, given as (path, caption), in a grid."""
    images = []
    for path, _ in pictures:
        images.append(read_image(path))
        images[-1].thumbnail((360, 360))
    rows, height = math.ceil(len(images) / columns), max(image.height / image.width for image in images)
    lines = max(caption.count("\n") + 1 for _, caption in pictures)
    figure = new_figure(2.1 * columns, (2 * min(height, 1.5) + 0.15 * lines + 0.3) * rows + 0.3)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells:
        axes.set_axis_off()
        axes.set_anchor("N")  # so that all captions of a row have one height
    for axes, image, (_, caption) in zip(cells, images, pictures):
        axes.imshow(image, interpolation="nearest" if max(image.size) < 128 else "antialiased")
        axes.set_title(caption, fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    save_figure(file, figure)


# ---------------------------------------------------------------- statistics

Z = statistics.NormalDist().inv_cdf(0.975)  # of a 95% interval


class Estimate(NamedTuple):
    """A number with its 95% interval; all are None if the number is undefined, because its denominator is 0."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    def cell(self) -> str:
        """Return the text for a cell of a table."""
        return "-" if self.value is None else f"{self.value:.4f} [{self.low:.3f}, {self.high:.3f}]"

    def text(self, spec: str) -> str:
        """Return the text for a sentence, its numbers formatted by `spec`."""
        return f"{self.value:{spec}} (95% interval {self.low:{spec}} to {self.high:{spec}})"


def wilson(count: int, total: int) -> Estimate:
    """Return the proportion count / total with Wilson's 95% score interval (Wilson, JASA 1927)."""
    if not total:
        return Estimate()
    share, scale = count / total, 1 + Z * Z / total
    middle = (share + Z * Z / (2 * total)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / total + (Z / (2 * total)) ** 2)
    # Exactly 0 and 1 at the ends, without rounding errors.
    return Estimate(share, middle - half if count else 0.0, middle + half if count < total else 1.0)


def few_val_images(count: int) -> str | None:
    """Return a warning if val has too few images (fewer than 100) for what is chosen on them, or None."""
    if not 0 < count < 100:
        return None
    low = f"{wilson(count, count).low:.0%}"
    return f"val has only {count} images: even 100% correct may mean a true {low}, and choices on val may be chance"


def paired_difference(only_a: int, only_b: int, n: int) -> Estimate:
    """Return the difference of two accuracies on the same n images, with a 95% interval (Bonett and Price, 2012)."""
    more, less = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = Z * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    return Estimate((only_a - only_b) / n, max(-1.0, more - less - half), min(1.0, more - less + half))


# ---------------------------------------------------------------- processors and processes


def pick_device(name: str | None) -> torch.device:
    """Return the device of --device, by default CUDA, else MPS, else the CPU. On CUDA, float32 is set to be exact.

    Raises UserError for a device that does not exist here or cannot compute, and for an NVIDIA GPU that torch cannot
    use, unless the CPU is asked for; nothing ever falls back to another device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with a driver is in the error below
        cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available() and WORLD_SIZE == 1
    if WORLD_SIZE > 1 and name not in (None, "cpu", "cuda"):
        raise UserError(f"--device {name}: with several processes use cuda (each takes its own GPU) or cpu")
    if name in (None, "cuda") and not cuda and (reason := unusable_gpu()):
        raise UserError(
            f"torch {torch.__version__} cannot use the NVIDIA GPU of this machine: {reason}; update the driver, "
            "install a build of torch for this driver (pytorch.org/get-started/previous-versions), start the container "
            "with its GPUs, or compute on the processor with --device cpu"
        )
    if name in (None, "cuda") and cuda and WORLD_SIZE > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name is None:
        name = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; use cpu, cuda, cuda:N or mps") from None
    count = {"cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps), "cpu": 1}.get(device.type, 0)
    if (device.index or 0) >= count:
        raise UserError(f"--device {name}: not available here ({count} {device.type} device{'s' * (count != 1)} found)")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # otherwise pinned memory and other global state belong to the first GPU
        if hasattr(torch.backends, "fp32_precision"):  # torch 2.9; to mix it with the flags below is an error
            torch.backends.fp32_precision = "ieee"
        else:  # by default, convolutions round the factors to the 10 bits of TF32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{device_name(device)} cannot compute with torch {torch.__version__}: {one_line(error)[:200]}; install a "
            "build of torch for this GPU (pytorch.org/get-started/previous-versions), or use --device cpu"
        ) from None
    return device


def unusable_gpu() -> str | None:
    """Return why torch cannot use this machine's NVIDIA GPU; None if there is none, or if it is hidden on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    driver_files = "/dev/nvidiactl", "/proc/driver/nvidia/version"  # the second also in containers without GPUs
    if hidden or torch.version.hip or not (any(map(os.path.exists, driver_files)) or torch.cuda.device_count()):
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return one_line(error)
    return "no GPU is visible"


def device_name(device: torch.device) -> str:
    """Return a device with the name of its hardware, such as "cuda:0 NVIDIA H100 80GB HBM3"."""
    hardware = platform.processor() or platform.machine()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError):  # Linux
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            hardware = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), hardware)
    return f"{device} {hardware}"


def log_device(device: torch.device, dtypes: Iterable[torch.dtype]) -> None:
    """Log what the networks run on, and in which precision."""
    names = sorted({precision_name(dtype) for dtype in dtypes})
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    log(f"device: {device_name(device)}{threads}, {' and '.join(names)}")


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of --precision. Raises UserError for one that the device lacks.

    "auto" is bfloat16 where the processor supports it natively, else float16 on NVIDIA GPUs with tensor cores for it,
    else float32.
    """
    bf16 = fp16 = False
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        fp16 = torch.cuda.get_device_capability(device) >= (7, 0)
    elif device.type == "cpu":  # these checks have no public name in all supported versions; without them, fp32
        bf16 = any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("avx512_bf16", "amx_tile"))
    if name == "auto":
        name = "bf16" if bf16 else "fp16" if fp16 else "fp32"
    elif name == "bf16" and device.type == "cuda" and not bf16:
        raise UserError(f"--precision bf16: {device_name(device)} does not support it; use fp16 or fp32")
    elif name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: slow on a processor; use bf16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def precision_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, as --precision takes it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that the memory of the device or the machine is used up.

    CUDA, MPS, cuDNN, cuBLAS and the CPU have their own errors for that, and so has a library that cannot be loaded.
    """
    words = ("out of memory", "alloc_failed", "not enough memory", "allocate memory", "bad_alloc", "map segment")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on the device, copied in the background to CUDA (on MPS that could read memory already freed)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


MEMORY_SHARE = 1 / 3  # of the machine's memory that features may take before they are mapped from a file


def usable_memory() -> float:
    """Return the bytes that features or pixels may take: a share of the memory of the machine or container."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        total = 8 << 30
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total * MEMORY_SHARE


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks: by default each activation is mapped anew, and page faults halve a CPU's rate."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        set_option, trim_threshold, mmap_threshold = ctypes.CDLL("libc.so.6").mallopt, -1, -3
        if set_option(mmap_threshold, 1 << 30) or set_option(mmap_threshold, 32 << 20):  # the limit of older glibc
            set_option(trim_threshold, (1 << 31) - 1)


slow_group: Any = None  # of all processes, with a timeout of days: to wait while the first process works alone


@contextlib.contextmanager
def process_group(device_name: str | None) -> Iterator[torch.device]:
    """Pick the device, and connect to the other processes if torchrun started several."""
    global slow_group
    device = pick_device(device_name)
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        slow_group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    yield device
    if WORLD_SIZE > 1:  # not after an error: it would wait for the others, which may never get here
        torch.distributed.destroy_process_group()


def broadcast_from_rank0(make: Callable[[], Any]) -> Any:
    """Return in all processes what make() returns in the first. If it raises there, the others exit quietly."""
    if WORLD_SIZE == 1:
        return make()
    box, error = [None, None], None
    if RANK == 0:
        try:
            box[0] = make()
        except Exception as raised:
            box[1], error = getattr(raised, "exit_code", 1), raised
    torch.distributed.broadcast_object_list(box, group=slow_group)
    if error:
        raise error
    if box[1]:
        sys.exit(box[1])
    return box[0]


def all_gather_list(items: list) -> list:
    """Return the items of all processes, in all processes."""
    parts = [None] * WORLD_SIZE
    torch.distributed.all_gather_object(parts, items)
    return list(chain.from_iterable(parts))


# ---------------------------------------------------------------- model


@dataclass
class Network:
    """A torchvision model with what is needed to build it again and to give it images."""

    arch: str  # torchvision's name of the architecture
    model_kwargs: dict  # the arguments with which torchvision builds the model, `num_classes` among them
    # `size` in pixels, `resize` ("squish": the whole image becomes a square; "crop": its center square, the default of
    # checkpoints without the key), `interpolation`, `mean` and `std` of the channels for pixels in 0..1.
    preprocessing: dict
    model: torch.nn.Module
    # `short_hashes` of the images with which train.py has trained the model, and on which it has chosen the epoch.
    train_hashes: torch.Tensor = field(default_factory=lambda: short_hashes([]), kw_only=True)
    val_hashes: torch.Tensor = field(default_factory=lambda: short_hashes([]), kw_only=True)


def list_architectures() -> list[str]:
    """Return the names that --arch takes: torchvision's classification models that end in a linear layer."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if not name.startswith("squeezenet")]


class PretrainedWeights(NamedTuple):
    """What --weights stands for."""

    name: str
    state_dict: dict[str, torch.Tensor] | None  # None for random weights
    preprocessing: dict  # with which the weights were trained
    transform_input: bool = True  # whether GoogLeNet and Inception rescale their input, as with ImageNet weights
    hashes: dict[str, torch.Tensor] = {}  # `train_hashes` and `val_hashes`, if these images have shaped the backbone


def load_pretrained(
    arch: str, weights: str | None, num_classes: int, image_size: int | None, resize_mode: str | None, seed: int
) -> Network:
    """Build torchvision's `arch` with pre-trained weights and a new classifier for `num_classes` classes.

    `weights` is as in `find_weights`; `image_size` and `resize_mode` replace what the preprocessing of these weights
    has. Raises UserError for an unknown architecture, for weights that are not available or do not fit, and for an
    impossible image size.
    """
    if arch.startswith("squeezenet"):
        raise UserError(f"--arch {arch}: SqueezeNet classifies by a convolution; only linear classifiers are supported")
    if arch not in list_architectures():
        close = difflib.get_close_matches(arch, list_architectures(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see --list-archs"
        raise UserError(f"unknown --arch {arch}; {hint}")
    pretrained = find_weights(arch, weights)
    preprocessing, state_dict, kwargs = dict(pretrained.preprocessing), pretrained.state_dict, {}
    preprocessing["size"] = image_size or preprocessing["size"]
    preprocessing["resize"] = resize_mode or preprocessing["resize"]
    if arch in ("googlenet", "inception_v3"):  # without auxiliary classifiers
        kwargs = {"aux_logits": False, "transform_input": pretrained.transform_input}
    elif arch.startswith("vit_"):
        kwargs = {"image_size": preprocessing["size"]}
    torch.manual_seed(seed)
    try:
        model = build_model(arch, kwargs, "cpu" if state_dict is None else "meta")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--image-size {preprocessing['size']}: {arch} cannot take it: {one_line(error)}") from None
    classifier = classifier_name(model, 1000)
    initialize_classifier(reset_classifier(model, classifier, num_classes), seed)
    if state_dict is not None:
        own = model.get_submodule(classifier).state_dict(prefix=f"{classifier}.")
        unused = (f"{classifier}.", "aux1.", "aux2.", "AuxLogits.")
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(unused)}
        what = f"{arch} of {preprocessing['size']} pixels" if "image_size" in kwargs else arch
        try:
            load_weights(model, {**state_dict, **own}, f"{what} (choose another with --arch)", pretrained.name)
        except UserError as error:
            fitting = architectures_of(pretrained.state_dict)
            hint = f"; it looks like {fitting[0]}" if len(fitting) == 1 and fitting != [arch] else ""
            raise UserError(f"{error}{hint}") from None
    return Network(arch, {"num_classes": num_classes, **kwargs}, preprocessing, model, **pretrained.hashes)


def architectures_of(state_dict: dict[str, Any]) -> list[str]:
    """Return the architectures with the names of a state dict, and as many parameters for as many classes."""
    floats = {key: value for key, value in state_dict.items() if torch.is_tensor(value) and value.is_floating_point()}
    classes, width = next((value.shape for value in reversed(floats.values()) if value.dim() == 2), (0, 0))
    count = sum(value.numel() for key, value in floats.items() if "running_" not in key)  # BatchNorm's statistics
    count -= (classes - 1000) * (width + 1)
    entries = {arch: torchvision.models.get_model_weights(arch) for arch in list_architectures()}
    found = [arch for arch in entries if any(entry.meta["num_params"] == count for entry in entries[arch])]
    return [arch for arch in found if build_model(arch, {}, "meta").state_dict().keys() == state_dict.keys()]


def find_weights(arch: str, weights: str | None) -> PretrainedWeights:
    """Download or read weights: the name of a torchvision entry, a file, "none", or None for the default entry.

    A file has a torchvision state dict or a checkpoint of train.py. Raises UserError for weights that are not
    available, or are those of another architecture.
    """
    entries = torchvision.models.get_model_weights(arch)
    names = dict(entries.__members__)
    name = weights or ("IMAGENET1K_V1" if "IMAGENET1K_V1" in names else "DEFAULT")
    name = name.removeprefix(f"{entries.__name__}.")
    entry = names.get(name) or names.get("IMAGENET1K_V1") or entries.DEFAULT
    preprocessing = entry_preprocessing(entry)
    if name in names:
        return PretrainedWeights(name, download_weights(arch, entry), preprocessing)
    if name == "none":
        log(f"warning: --weights none: {arch} has random weights; a frozen random network has poor features")
        return PretrainedWeights(name, None, preprocessing, transform_input=False)
    if not Path(name).exists():
        raise UserError(f"--weights {name}: neither a file nor one of {', '.join(names)}, none")
    content = read_torch_file(name)
    if content.get("format") != CHECKPOINT_FORMAT:
        return PretrainedWeights(name, content, preprocessing)
    checkpoint, hashes = read_checkpoint(name), {}
    if checkpoint.arch != arch:
        raise UserError(f"{name} is a {checkpoint.arch}; pass --arch {checkpoint.arch}")
    fine_tuned = checkpoint.args.get("finetune", "head") != "head"
    # A frozen backbone has seen no images, unless it came from another checkpoint, whose images are listed too.
    if fine_tuned or len(checkpoint.train_hashes) > checkpoint.metrics.get("measured", {}).get("train", 0):
        hashes = {"train_hashes": checkpoint.train_hashes, "val_hashes": checkpoint.val_hashes}
    preprocessing = {"resize": "crop", **checkpoint.preprocessing}
    transform_input = checkpoint.model_kwargs.get("transform_input", False)
    return PretrainedWeights(name, checkpoint.model.state_dict(), preprocessing, transform_input, hashes)


def entry_preprocessing(entry: Any) -> dict:
    """Return the preprocessing with which the weights of a torchvision weights entry were trained.

    Except for `resize`: the weights were trained on crops, but whole images give better features.
    """
    transform = entry.transforms()
    preprocessing = {"size": transform.crop_size[0], "resize": "squish", "interpolation": transform.interpolation.value}
    return {**preprocessing, "mean": list(transform.mean), "std": list(transform.std)}


def download_weights(arch: str, entry: Any) -> dict[str, torch.Tensor]:
    """Return the state dict of a torchvision weights entry, from torchvision's download cache or from the network."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where torch says what it downloads
            return torchvision.models.get_model(arch, weights=entry, progress=sys.stderr.isatty()).state_dict()
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: an incomplete file's wrong hash
        raise UserError(
            f"cannot download {entry} from {entry.url}: {one_line(error)}; download it elsewhere and pass the file "
            "with --weights FILE, or start from random weights with --weights none"
        ) from None


def build_model(arch: str, model_kwargs: dict, device: str = "cpu") -> torch.nn.Module:
    """Build torchvision's model `arch` with random weights; `model_kwargs` are passed on. Raises ValueError if unknown.

    On the device "meta" the weights have no values, and take no time to draw: for a model that is to be loaded.
    """
    if arch not in list_architectures():  # get_model knows other kinds of models, and some download weights
        raise ValueError(f"the architecture {arch} is not supported")
    with warnings.catch_warnings():
        # googlenet, inception_v3: "the default initialization will change"
        warnings.simplefilter("ignore", FutureWarning)
        try:
            with torch.device(device):
                return torchvision.models.get_model(arch, weights=None, **model_kwargs)
        except RuntimeError:  # RegNet computes its widths with tensors, which have no values on "meta"
            return torchvision.models.get_model(arch, weights=None, **model_kwargs)


def classifier_name(model: torch.nn.Module, num_classes: int) -> str:
    """Return the name of the classifier: the last Linear layer with `num_classes` outputs. The rest is the backbone."""
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and module.out_features == num_classes:
            return name
    raise UserError(f"{type(model).__name__} has no linear layer with {num_classes} outputs as classifier")


def reset_classifier(model: torch.nn.Module, name: str, num_classes: int) -> torch.nn.Linear:
    """Replace the classifier of a model, in place, by a new one for `num_classes` classes, and return that."""
    old = model.get_submodule(name)
    new = torch.nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    model.set_submodule(name, new)
    return new


def initialize_classifier(layer: torch.nn.Linear, seed: int) -> None:
    """Draw small random weights that depend on shape and seed alone, on any device; the bias becomes 0."""
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.01)
        if layer.bias is not None:
            layer.bias.zero_()


class InferenceModel:
    """A network as all scripts run it: in eval mode, split before its classifier, in the device's layout and precision.

    The network given is not changed, except that its classifier moves to the device.
    """

    def __init__(self, network: Network, device: torch.device, precision: str) -> None:
        self.network, self.preprocessing, self.device = network, network.preprocessing, device
        self.dtype = pick_precision(precision, device)  # of the backbone; the classifier computes in float32
        # 16 images keep a CPU's cores busy and its caches warm; MPS often has little memory. Fewer if they are large.
        most = {"cpu": 16, "mps": 32}.get(device.type, 128)
        self.batch_size = max(1, min(most, most * 512**2 // self.preprocessing["size"] ** 2))
        self.expendable: dict[str, torch.Tensor] = {}  # what is dropped first if the memory of the device is used up
        # For a row of pixels in 0..255, channels last: [3 S].
        mean, std = (torch.tensor(self.preprocessing[key] * self.preprocessing["size"]) for key in ("mean", "std"))
        self.mean, self.scale = (255 * mean).to(device), (1 / (255 * std)).to(device)
        self.classifier = classifier_name(network.model, network.model_kwargs["num_classes"])
        self.head = network.model.get_submodule(self.classifier).to(device).eval()
        self.num_features = self.head.in_features

    @property
    def precision(self) -> str:
        """The name of the backbone's dtype, as --precision takes it."""
        return precision_name(self.dtype)

    @functools.cached_property
    def backbone(self) -> torch.nn.Module:
        """The model without its classifier, with BatchNorm folded, prepared for the device. It is made when first used.

        Raises UserError if the model cannot take images of this size.
        """
        keep_freed_memory()
        backbone = fold_batchnorm(self.copy_backbone().eval().requires_grad_(False))
        backbone = backbone.to(self.device, self.dtype, memory_format=torch.channels_last)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # all batches have one size, so that it pays to compare algorithms
        return backbone

    def copy_backbone(self) -> torch.nn.Module:
        """Return a copy of the model with the identity in place of the classifier."""
        backbone = copy.deepcopy(self.network.model)
        backbone.set_submodule(self.classifier, torch.nn.Identity())
        return backbone

    def load_backbone(self, weights: dict[str, torch.Tensor]) -> None:
        """Replace weights of the network's backbone, given under the model's own names."""
        update_weights(self.network.model, weights)
        self.release_backbone()

    def release_backbone(self) -> None:
        """Free the prepared backbone; it is made again when it is next used."""
        self.__dict__.pop("backbone", None)

    def load_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Copy uint8 pixels [B, 3, s, s] to this model's device and resize them there: [B, 3, S, S]."""
        size, interpolation = self.preprocessing["size"], self.preprocessing["interpolation"]
        return resize(to_device(pixels, self.device), size, interpolation)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 pixels [B, 3, S, S] on this model's device into normalized float32 images, channels last."""
        rows = pixels.permute(0, 2, 3, 1).flatten(2).float()
        return rows.sub_(self.mean).mul_(self.scale).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)

    def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Run the backbone: uint8 pixels [B, 3, s, s] on any device -> float32 features [B, D] on this model's device.

        If the device's memory is used up, what is expendable is dropped; if that does not help, the batch is halved
        until it fits. Raises UserError if a single image does not fit, or if the model cannot take images of this size.
        """
        if len(pixels) > self.batch_size:
            return torch.cat([self.forward_features(part) for part in pixels.split(self.batch_size)])
        try:
            return self._forward_batch(pixels)
        except (RuntimeError, AssertionError, ValueError, MemoryError) as error:
            if not is_out_of_memory(error):
                self._check_image_size()
                raise
            if self.batch_size == 1 and not self.expendable:
                raise UserError(f"not enough memory on {self.device} for an image; use another --device") from None
        # After the except block, because the error keeps what the failed attempt has allocated.
        if not self.free_memory():
            self.batch_size = max(1, self.batch_size // 2)
        return self.forward_features(pixels)

    def free_memory(self) -> bool:
        """Return unused memory to the device, after dropping what is expendable; return whether there was any."""
        dropped = bool(self.expendable)
        self.expendable.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return dropped

    def _forward_batch(self, pixels: torch.Tensor) -> torch.Tensor:
        count = len(pixels)
        with torch.inference_mode():
            images = self.normalize(self.load_pixels(pixels)).to(self.dtype)
            if self.device.type == "cuda":  # each new batch size would cost the search for the fastest algorithms
                padding = images.new_zeros(self.batch_size - count, *images.shape[1:])
                images = torch.cat([images, padding])
            images = images.contiguous(memory_format=torch.channels_last)
            return self.backbone(images)[:count].float()

    def _check_image_size(self) -> None:
        """Raise UserError if the model cannot take images of this size, which shows on a device without memory."""
        size = self.preprocessing["size"]
        try:
            self.copy_backbone().to("meta").eval()(torch.zeros(1, 3, size, size, device="meta"))
        except (RuntimeError, AssertionError, ValueError) as error:
            name, reason = type(self.network.model).__name__, one_line(error)[:120]
            raise UserError(f"--image-size {size}: {name} cannot take images of {size} pixels ({reason})") from None

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """Run the classifier: features [..., D] -> logits [..., C], float32, on this model's device."""
        with torch.inference_mode():
            return self.head(features)

    def fetch_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits on the CPU, which waits for a GPU. Raises UserError if they are not finite."""
        logits = logits.cpu()
        if not logits.isfinite().all():
            what = f"the outputs of {type(self.network.model).__name__} are not finite"
            raise UserError(f"{what}: its weights are damaged, or need another --precision")
        return logits

    def forward_cached(self, features: torch.Tensor) -> torch.Tensor:
        """Run the classifier on cached features [N, D] of any type and device, in parts: logits [N, C] on the CPU."""
        parts = features.split(rows_per_chunk(features))
        return self.fetch_logits(torch.cat([self.forward_head(rows.to(self.device, torch.float32)) for rows in parts]))

    def forward_views(self, pixels: torch.Tensor, views: Sequence[View] = VIEWS["none"]) -> torch.Tensor:
        """Run the backbone on views of uint8 pixels [B, 3, s, s]: features [views, B, D] on this model's device."""
        pixels = self.load_pixels(pixels)
        return torch.stack([self.forward_features(apply_view(pixels, view)) for view in views])

    def log_probabilities(self, logits: torch.Tensor, temperatures: Sequence[float]) -> list[torch.Tensor]:
        """Return log-probabilities [B, C] for each temperature, float64 on the CPU, from logits [views, B, C].

        The probabilities of several views of an image are averaged before the temperature is applied.
        """
        averaged = average_views(self.fetch_logits(logits))
        return [(averaged / temperature).log_softmax(1) for temperature in temperatures]


def average_views(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the logarithm of probabilities averaged over views, [B, C] float64, from the logits [B, C] of each."""
    views = torch.stack([view.double().log_softmax(1) for view in logits])
    return views.logsumexp(0) - math.log(len(views))


def fold_batchnorm(model: torch.nn.Module) -> torch.nn.Module:
    """Fold each BatchNorm of a model in eval mode into the convolution before it. Changes the model: use the result."""
    try:
        return importlib.import_module("torch.fx.experimental.optimization").fuse(model, inplace=True)
    except torch.fx.proxy.TraceError:  # torch.fx cannot trace this forward: the model is right as it is, only slower
        return model


# ---------------------------------------------------------------- features

CACHE_FILES = "[0-9a-f]" * 64 + ".pt"  # whatever else is in the feature cache is not ours
FILE_BYTES, MAX_SMALL_FILES = 64_000_000, 20  # smaller files are joined if they are more


class FeatureRequest(NamedTuple):
    """Images whose features are needed, each in these views."""

    split: Split
    views: Sequence[View]


class MissingBatch(NamedTuple):
    """Images of which the same views have to be computed, at most a batch."""

    request: int  # number of the request
    views: tuple[int, ...]  # numbers of the views
    rows: list[int]  # of the request's split


def extract_features(
    model: InferenceModel,
    requests: Sequence[FeatureRequest],
    cache: FeatureCache,
    spill_folder: Path,
    workers: int | None = None,
) -> list[torch.Tensor]:
    """Return the backbone's features for each request: [views, N, D] in the model's dtype, on the CPU.

    What the cache knows is read; the rest runs through the backbone, once. Several processes share that work; the first
    one has the result, the others get an empty list. Features that do not fit into memory are mapped from a file in
    `spill_folder`. Raises ImageError for the first image that cannot be read.
    """
    shapes = [(len(views), len(split), model.num_features) for split, views in requests]
    folder = spill_folder if sum(map(math.prod, shapes)) * model.dtype.itemsize > usable_memory() else None
    results = [allocate_features(shape, model.dtype, folder) for shape in shapes if RANK == 0]
    missing = broadcast_from_rank0(lambda: read_cached_features(requests, results, cache, model.batch_size))
    count = sum(len(batch.views) * len(batch.rows) for batch in missing)
    if known := sum(math.prod(shape[:2]) for shape in shapes) - count:
        log(f"features: {known} remembered in {cache.folder}, {count} to compute")
    # Number of batches between two collections of results: a GPU and other processes wait during one.
    interval = 1 if WORLD_SIZE == 1 and model.device.type == "cpu" else max(1, 4096 // model.batch_size)
    computed = compute_features(model, requests, missing[RANK::WORLD_SIZE], workers)
    try:
        with Progress("features", count) as progress:
            for _ in range(0, len(missing), interval * WORLD_SIZE):
                pending = list(islice(computed, interval))
                fetched = [(batch, features.cpu()) for batch, features in pending]
                for batch, features in fetched if WORLD_SIZE == 1 else all_gather_list(fetched):
                    progress.update(len(batch.rows) * len(batch.views))
                    if RANK == 0:
                        split, views = requests[batch.request]
                        hashes = [split.sha256[row] for row in batch.rows]
                        for view, rows in zip(batch.views, features):
                            results[batch.request][view, batch.rows] = rows
                            cache.add(views[view], hashes, rows)
    finally:  # also after an interruption: the next run continues from here
        cache.flush()
    if count:
        cache.prune()
    return results


def read_cached_features(
    requests: Sequence[FeatureRequest], results: list[torch.Tensor], cache: FeatureCache, batch_size: int
) -> list[MissingBatch]:
    """Copy what the cache knows into the results; return what it does not know, in batches."""
    missing = []
    for request, (split, views) in enumerate(requests):
        unknown: dict[int, list[int]] = {}  # row -> numbers of the views
        for number, view in enumerate(views):
            for row in cache.read_into(view, split.sha256, results[request][number]):
                unknown.setdefault(row, []).append(number)
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in sorted(unknown):
            groups.setdefault(tuple(unknown[row]), []).append(row)
        for numbers, rows in groups.items():
            missing += [MissingBatch(request, numbers, part) for part in in_batches(rows, batch_size)]
    return missing


def compute_features(
    model: InferenceModel, requests: Sequence[FeatureRequest], missing: list[MissingBatch], workers: int | None
) -> Iterator[tuple[MissingBatch, torch.Tensor]]:
    """Read the missing images and run them through the backbone: yield features [views, B, D] on the model's device."""

    def images(batch: MissingBatch) -> list[tuple[str, str]]:
        split = requests[batch.request].split
        return [(split.paths[row], split.sha256[row]) for row in batch.rows]

    read = read_batches(map(images, missing), model.preprocessing, workers, read_known)
    for batch, read_batch in zip(missing, read):
        views = [requests[batch.request].views[number] for number in batch.views]
        pixels = read_batch.complete_pixels()
        # The last bits depend on the size of a batch, and must not depend on what the cache knows.
        filled = torch.cat([pixels, pixels.new_zeros(-len(pixels) % model.batch_size, *pixels.shape[1:])])
        yield batch, model.forward_views(filled, views)[:, : len(pixels)].to(model.dtype)


def allocate_features(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """Return an uninitialized tensor in memory, or, with a folder, mapped from a temporary file there."""
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    log(f"features of {size / 1e9:.1f} GB are mapped from disk, in {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name; its content lives as long as the tensor
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # so that a full disk is an error here, not a crash later
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)
    except OSError as error:
        raise OSError(error.errno, f"no room to map features: {error.strerror}", str(folder)) from None


def relative_residuals(features: torch.Tensor, familiarity: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the share of standardized features [N, D] that lies outside the principal components of train: [N], 0..1.

    It is large for images unlike those of the training: the residual of ViM (Wang et al., CVPR 2022), divided by the
    norm. `familiarity` is that of a checkpoint.
    """
    mean, scale, components = (familiarity[key] for key in ("mean", "scale", "components"))
    parts = []
    for rows in features.split(rows_per_chunk(features)):
        standardized = (rows.cpu().float() - mean) * scale
        residual = standardized - (standardized @ components) @ components.T
        parts.append(residual.norm(dim=1) / standardized.norm(dim=1).clamp(min=1e-30))
    return torch.cat(parts)


def unfamiliarity(features: torch.Tensor, familiarity: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the share of val images with smaller residuals than those of features [N, D]: float64 [N] in 0..1."""
    residuals = familiarity["residuals"]
    return torch.searchsorted(residuals, relative_residuals(features, familiarity)).double() / len(residuals)


def rows_per_chunk(features: torch.Tensor) -> int:
    """Return how many rows of features [..., D] to process at a time: 64 MB of float32, at most 4096."""
    return max(1, min(4096, (16 << 20) // features.shape[-1]))


def feature_key(model: InferenceModel) -> dict:
    """Return all that features depend on, except the image and its view."""
    network = model.network
    return {
        "version": 3,
        "arch": network.arch,
        "weights": hash_weights(network.model, model.classifier),
        "model": {key: value for key, value in network.model_kwargs.items() if key != "num_classes"},
        "preprocessing": network.preprocessing,
        "precision": str(model.dtype),
        "device": model.device.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "libraries": library_versions(),
    }


def hash_weights(model: torch.nn.Module, excluded: str) -> str:
    """Return the SHA-256 of a model's weights and buffers, except those of the module named `excluded`."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith(excluded + "."):
            tensor = tensor.contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()


class FeatureCache:
    """Features on disk, found by the content of the image.

    There is a folder for each view of a network (everything in `feature_key`), and in it files of rows, found by the
    SHA-256 of the image file. A file is named by the SHA-256 of its own content and never changes: damage is noticed,
    and runs side by side cannot harm each other. What cannot be read is computed again; what cannot be written is a
    warning.
    """

    def __init__(self, folder: Path | None, key: dict, limit: float = math.inf) -> None:
        """Use the cache in `folder`, bounded to `limit` bytes; with None, remember nothing."""
        self.folder, self.key, self.limit = folder, key, limit
        self.pending: dict[View, list[tuple[list[str], torch.Tensor]]] = {}  # (hashes, rows) not yet written
        self.known: dict[View, dict[Path, dict]] = {}  # what the files of a view contain, mapped from disk
        self.flushed, self.writable = time.monotonic(), folder is not None

    @classmethod
    def open(cls, model: InferenceModel, args: argparse.Namespace) -> FeatureCache:
        """Return a model's cache according to the command line; of several processes only the first has one."""
        return cls(None if args.no_cache or RANK else args.cache, feature_key(model), args.cache_limit * 1e9)

    def view_folder(self, view: View) -> Path:
        """Return the folder of a view's files."""
        return self.folder / digest_of({**self.key, "view": view})

    def read_into(self, view: View, hashes: list[str], out: torch.Tensor) -> list[int]:
        """Copy the known rows of these images into out [N, D]; return the numbers of the rows that are not known."""
        wanted: dict[str, list[int]] = {}
        for row, sha256 in enumerate(hashes):
            wanted.setdefault(sha256, []).append(row)
        if view not in self.known and self.folder:
            files = sorted(self.view_folder(view).glob("*.pt"))
            self.known[view] = {file: content for file in files if (content := self.read_file(file))}
        for content in self.known.get(view, {}).values():
            if (content["features"].shape[1:], content["features"].dtype) == (out.shape[1:], out.dtype):
                found = [(at, row) for at, sha256 in enumerate(content["hashes"]) for row in wanted.pop(sha256, ())]
                if found:
                    at, rows = torch.tensor(found).unbind(1)
                    out[rows] = content["features"][at]
        return sorted(chain.from_iterable(wanted.values()))

    def read_file(self, file: Path) -> dict | None:
        """Return a file's `hashes` and `features`, mapped from disk; None, with a warning, if the file is damaged."""
        try:
            if hash_file(file) == file.stem:
                with contextlib.suppress(OSError):  # a read-only cache is useful too
                    os.utime(file)  # `prune` removes what was not used for longest
                content = torch.load(file, mmap=True, weights_only=True)
                hashes, features = content["hashes"], content["features"]
                is_usable = is_dense(features) and features.is_floating_point() and len(features) == len(hashes)
                if is_usable and all(isinstance(sha256, str) for sha256 in hashes):
                    return content
            elif len(file.stem) == 64:
                file.unlink()
            log(f"warning: ignored {file}: damaged, or not written by this program")
        except FileNotFoundError:  # removed by another run
            pass
        except Exception as error:
            log(f"warning: ignored {file}: {one_line(error)}")
        return None

    def add(self, view: View, hashes: list[str], rows: torch.Tensor) -> None:
        """Remember rows [N, D]. They are written when a view has 64 MB, every five minutes, and by `flush`."""
        if self.writable:
            pending = self.pending.setdefault(view, [])
            pending.append((hashes, rows))
            if sum(rows.nbytes for _, rows in pending) > FILE_BYTES or time.monotonic() - self.flushed > 300:
                self.flush()

    def flush(self) -> None:
        """Write what is pending, and close the files that were read. After an error it warns and stops writing."""
        pending, self.pending, self.flushed = self.pending, {}, time.monotonic()
        for view, parts in pending.items() if self.writable else ():
            # Many small files, as after weeks of nightly runs, are joined with the new one. Other runs that have read
            # them, or join them at the same time, lose nothing.
            known = self.known.pop(view, {})
            known = {file: part for file, part in known.items() if part["features"].nbytes < FILE_BYTES}
            small = list(known) if len(known) > MAX_SMALL_FILES else []
            parts += [(known[file]["hashes"], known[file]["features"]) for file in small]
            try:
                self.write_file(view, parts)
            except OSError as error:
                log(f"warning: features are not remembered: {self.view_folder(view)}: {error.strerror}")
                self.writable = False
                break
            del known, parts[:]  # Windows cannot remove a file that is mapped
            with contextlib.suppress(OSError):  # they are there still
                for file in small:
                    file.unlink(missing_ok=True)
        self.known = {}

    def write_file(self, view: View, parts: list[tuple[list[str], torch.Tensor]]) -> None:
        """Write (hashes, rows) of a view to a new file."""
        buffer = io.BytesIO()
        hashes = list(chain.from_iterable(hashes for hashes, _ in parts))
        torch.save({"hashes": hashes, "features": torch.cat([rows for _, rows in parts])}, buffer)
        file = self.view_folder(view) / f"{hashlib.sha256(buffer.getbuffer()).hexdigest()}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, "wb") as stream:
            stream.write(buffer.getbuffer())

    def prune(self) -> None:
        """Remove the files that were not used for longest until the cache is within its limit, and report its size."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):  # another run may prune at the same time
            folders = [folder for folder in self.folder.glob("[0-9a-f]" * 32) if folder.is_dir()]
            for folder in folders:
                remove_leftovers(folder, CACHE_FILES, age=86400)
            files = [file for folder in folders for file in folder.glob(CACHE_FILES)]
            files = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in files)
            total = sum(size for _, size, _ in files)
            for _, size, file in files:
                if total > self.limit:
                    file.unlink()
                    total -= size
            log(f"the cache {self.folder} holds {total / 1e9:.2f} GB of at most {self.limit / 1e9:g}")


# ---------------------------------------------------------------- checkpoint

CHECKPOINT_FORMAT, RUN_FORMAT, FORMAT_VERSION = "image classifier", "training run", 1


@dataclass
class Checkpoint(Network):
    """A trained classifier, as train.py saves it in model.pt."""

    classes: list[str]  # in the order of the model's outputs
    temperature: float  # divide the logits by it before the softmax
    temperature_tta: float  # divide the logarithm of probabilities averaged over views by it, before another softmax
    views: list[View]  # of the images on which the classifier was trained
    # The saved epoch's row of the history; after fine-tuning, the numbers of the interpolated weights, with `alpha`.
    metrics: dict
    args: dict  # how it was trained
    versions: dict  # with which libraries
    # For `unfamiliarity`, from standardized features of train: mean and scale [D], components [D, K]; and the sorted
    # `relative_residuals` of val [Q]. None for a checkpoint of an earlier version.
    familiarity: dict[str, torch.Tensor] | None = None
    # The median of the shorter sides of the training images in pixels, before they were resized. None for a checkpoint
    # of an earlier version.
    native_size: int | None = None
    date: str | None = None  # when it was trained; None likewise


# What a file may contain: levels of dicts and lists, their items in all, and bytes of a text, such as a path.
MAX_DEPTH, MAX_ITEMS, MAX_TEXT = 10, 10**7, 4096


def read_torch_file(path: str | Path) -> dict:
    """Read a dict with string keys by torch.load(weights_only=True), which runs no code from the file.

    Raises UserError for a file that is missing, damaged (where torch has written it, even by a single bit) or holds
    something else, for one that would take more memory than its own size, and for what `check_values` refuses.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a regular file" if Path(path).exists() else f"no such file: {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not verify them
                if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                    raise UserError(f"refused to load {path}: it is compressed, which no file of PyTorch is")
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, UserError):
        raise
    except Exception as error:  # pickle, zipfile and torch raise a dozen kinds for a damaged file
        if is_out_of_memory(error):
            raise UserError(f"{path} is damaged, or needs more memory than there is") from None
        if "unsupported global" in str(error).lower() or "unsupported class" in str(error).lower():
            raise UserError(f"refused to load {path}: it contains more than plain values, and could run code") from None
        raise UserError(f"{path} is damaged, or not a PyTorch file") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} does not contain a dict of tensors by name, but a {type(content).__name__}")
    try:
        check_values(content)
    except ValueError as error:
        problem = "a text that is not Unicode" if isinstance(error, UnicodeError) else error
        raise UserError(f"refused to load {path}: it contains {problem}") from None
    return content


def check_values(content: dict) -> None:
    """Raise ValueError for values that no training writes, and for which other code is not prepared."""
    depth, items, level = 0, 0, [content]
    while level:  # level by level: recursion would be bounded by the interpreter, and a value may contain itself
        for value in level:
            if isinstance(value, str) and len(value.encode("utf-8", "surrogateescape")) > MAX_TEXT:  # or not Unicode
                raise ValueError(f"a text of {len(value)} characters")
            if isinstance(value, (int, float)) and not abs(value) < 1 << 64:
                raise ValueError("a number that is not finite, or too large")
            if is_dense(value) and value.nbytes > (stored := value.untyped_storage().nbytes()):
                raise ValueError(f"a tensor of {value.nbytes} bytes, of which {stored} are stored")
        containers = [value for value in level if isinstance(value, (dict, list, tuple, set))]
        depth, items = depth + 1, items + sum(map(len, containers))
        if depth > MAX_DEPTH or items > MAX_ITEMS:
            raise ValueError("values that are nested too deeply, or are too many")
        level = list(chain.from_iterable(containers))
        level += chain.from_iterable(value.values() for value in containers if isinstance(value, dict))


def write_torch_file(path: Path, content: dict) -> None:
    """Write a dict by torch.save, atomically."""
    buffer = io.BytesIO()  # torch.save would turn the OSError of a full disk into a RuntimeError
    torch.save(content, buffer)
    with atomic_write(path, "wb") as file:
        file.write(buffer.getbuffer())


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of train.py, with its model in eval mode on the CPU. Raises UserError for any other file."""
    content = read_torch_file(path)
    if content.get("format") != CHECKPOINT_FORMAT:
        what = "a file of another program"
        if content.get("format") == RUN_FORMAT:
            what = "the state of an unfinished run; pass the model.pt beside it"
        elif all(map(torch.is_tensor, content.values())):
            what = "a plain state dict, which train.py takes as --weights"
        raise UserError(f"{path} is not a checkpoint of train.py, but {what}")
    # Earlier versions did not write all fields.
    later = {"views": VIEWS["none"], "temperature_tta": content.get("temperature"), "args": {}, "versions": {}}
    later |= {"train_hashes": short_hashes([]), "val_hashes": short_hashes([])}
    later |= {"familiarity": None, "native_size": None, "date": None}
    content = later | content
    if wrong := invalid_fields(content):
        reason = f"missing or invalid {', '.join(wrong)}"
        raise UserError(f"{path} is damaged, or was written by a newer version of this program: {reason}")
    try:
        model = build_model(content["arch"], content["model_kwargs"], "meta")
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"{path}: its model cannot be built here: {one_line(error)}") from None
    load_weights(model, content["state_dict"], content["arch"], path)
    fields = {key: content[key] for key in Checkpoint.__dataclass_fields__ if key != "model"}
    return Checkpoint(model=model.eval(), **fields)


def invalid_fields(content: dict) -> list[str]:
    """Return the names of the fields of a checkpoint that are missing or have values that no training writes."""

    def is_number(value: Any, low: float = -(1 << 63), high: float = 1 << 63, kinds: tuple = (int, float)) -> bool:
        return type(value) in kinds and low < value < high

    def is_size(value: Any) -> bool:
        return is_number(value, 0, MAX_IMAGE_SIZE + 1, (int,))

    def is_tensor(value: Any, dtype: torch.dtype, dims: int) -> bool:
        return is_dense(value) and value.dtype == dtype and value.dim() == dims and bool(value.isfinite().all())

    def are_hashes(value: Any) -> bool:
        return is_tensor(value, torch.uint8, 2) and value.shape[1] == 8

    def are_channels(value: Any, low: float) -> bool:
        return isinstance(value, list) and len(value) == 3 and all(is_number(number, low) for number in value)

    def is_familiarity(value: Any) -> bool:
        dims = {"mean": 1, "scale": 1, "components": 2, "residuals": 1}
        if not isinstance(value, dict) or not all(is_tensor(value.get(key), torch.float32, dims[key]) for key in dims):
            return False
        return len(value["mean"]) == len(value["scale"]) == len(value["components"]) and len(value["residuals"]) > 0

    dicts = ("model_kwargs", "preprocessing", "state_dict", "metrics", "args", "versions")
    if wrong := [name for name in dicts if not isinstance(content.get(name), dict)]:
        return wrong
    get, kwargs, preprocessing = content.get, content["model_kwargs"], content["preprocessing"]
    classes, views, metrics = get("classes"), get("views"), content["metrics"]
    kinds = {"num_classes": int, "image_size": int, "aux_logits": bool, "transform_input": bool}
    are_kwargs = "num_classes" in kwargs and all(kinds.get(key) is type(value) for key, value in kwargs.items())
    are_names = isinstance(classes, list) and all(isinstance(name, str) and len(name) < 256 for name in classes)
    are_distinct = are_names and 0 < len(set(classes)) == len(classes)
    measured = metrics.get("measured", {})
    counts = measured.values() if isinstance(measured, dict) else [None]
    valid = {
        "version": is_number(get("version"), 0, FORMAT_VERSION + 1, (int,)),
        "arch": isinstance(get("arch"), str),
        "classes": are_distinct and (not are_kwargs or len(classes) == kwargs["num_classes"]),
        "model_kwargs": are_kwargs and is_size(kwargs.get("image_size", 1)),
        "size": is_size(preprocessing.get("size")),
        "resize": preprocessing.get("resize", "crop") in ("squish", "crop"),
        "interpolation": preprocessing.get("interpolation") in ("nearest", "nearest-exact", "bilinear", "bicubic"),
        "mean": are_channels(preprocessing.get("mean"), -math.inf),
        "std": are_channels(preprocessing.get("std"), 0),
        "temperature": is_number(get("temperature"), 0.01, 100),
        "temperature_tta": is_number(get("temperature_tta"), 0.01, 100),
        "date": isinstance(get("date"), (str, type(None))),
        "args": isinstance(content["args"].get("changed", {}), dict),
        "views": isinstance(views, list) and views and set(map(repr, views)) <= set(map(repr, VIEWS["dihedral"])),
        "metrics": all(is_number(metrics.get(key, 0)) for key in ("epoch", "head_epochs"))
        and is_number(metrics.get("alpha", 0), -1, 2)
        and all(is_number(count, 0, kinds=(int,)) for count in counts),
        "train_hashes": are_hashes(get("train_hashes")),
        "val_hashes": are_hashes(get("val_hashes")),
        "familiarity": get("familiarity") is None or is_familiarity(get("familiarity")),
        "native_size": get("native_size") is None or is_number(get("native_size"), 0, kinds=(int,)),
    }
    return [name for name, is_valid in valid.items() if not is_valid]


def checkpoint_views(checkpoint: Checkpoint, tta: bool, path: Path) -> tuple[list[View], float]:
    """Return the views to average over, with --tta those of the training, and the temperature for that average."""
    if not tta:
        return VIEWS["none"], checkpoint.temperature
    if len(checkpoint.views) == 1:
        raise UserError(
            f"{path}: --tta averages over the views that a model was trained with, and this one was trained with each "
            "image only as it is: train with --augment flip or dihedral"
        )
    return checkpoint.views, checkpoint.temperature_tta


def checkpoint_precision(checkpoint: Checkpoint, precision: str) -> str:
    """Resolve --precision auto: a model that was trained in fp32 stays in fp32, so that its numbers stay the same."""
    return "fp32" if precision == "auto" and checkpoint.args.get("precision") == "fp32" else precision


def load_weights(model: torch.nn.Module, state_dict: dict, arch: str, path: str | Path) -> None:
    """Load a state dict that must have exactly the model's keys and shapes, in place of the model's own tensors.

    The model may be on the meta device. Raises UserError that names `path`, `arch` and the keys that do not fit.
    """
    own, floats = model.state_dict(), (torch.float16, torch.bfloat16, torch.float32, torch.float64)

    def problem(key: str) -> str | None:
        if key not in state_dict or key not in own:
            return "missing" if key in own else "unknown"
        value, dtype = state_dict[key], own[key].dtype
        if not is_dense(value) or (value.dtype != dtype and not (value.dtype in floats and dtype in floats)):
            return "of the wrong type"
        if value.shape != own[key].shape:
            return "of the wrong shape"
        return None if value.to(dtype).isfinite().all() else "with values that are not finite"

    problems = [f"{key} ({kind})" for key in {**own, **state_dict} if (kind := problem(key))]
    if problems:
        listed = ", ".join(problems[:5]) + (", ..." if len(problems) > 5 else "")
        raise UserError(f"{path} does not fit the architecture {arch}: {len(problems)} wrong keys: {listed}")
    update_weights(model, {key: state_dict[key].to(own[key].dtype).contiguous() for key in own}, assign=True)


def is_dense(value: Any) -> bool:
    """Return whether a value from a file is an ordinary tensor: dense, not nested, on the CPU."""
    is_tensor = torch.is_tensor(value) and not value.is_nested
    return is_tensor and value.layout == torch.strided and value.device.type == "cpu"


def update_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], assign: bool = False) -> None:
    """Load weights by name, in place; the others stay.

    The weights pass through the model's own state dict, which records the versions of its modules: MNASNet needs its
    own.
    """
    own = model.state_dict()
    own.update(weights)
    model.load_state_dict(own, assign=assign)
