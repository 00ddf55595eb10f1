"""What the four scripts must agree on: errors and exit codes, images and trees, preprocessing, the model, the checkpoint.

A function that only one script needs lives in that script. Nothing here imports torch before it is used.
"""
from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import copy
import ctypes
import errno
import functools
import gc
import hashlib
import importlib
import io
import math
import os
import signal
import stat
import struct
import sys
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # up to its limit, an image is just large

EXIT_USAGE, EXIT_SOME_UNREADABLE, EXIT_BELOW_BAR, EXIT_KEPT_OLD, EXIT_LOCKED, EXIT_SIGINT = 2, 3, 4, 5, 75, 130
EXIT_CODES = """exit codes:
  0 done    1 a bug of ours (please report it)    2 wrong usage or input: one line says what
  3 finished, but some images could not be read (predict.py)    4 below --fail-under (evaluate.py)
  5 --only-if-better kept the old model (train.py)    75 another run holds the folder    130, 143 ended by SIGINT, SIGTERM"""
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as ImageFolder
SPLITS = ("train", "val", "test")
# Views of an image, (quarter turns, mirrored), the image as it is first; dihedral is all symmetries of a square.
VIEWS = {"none": [(0, False)], "flip": [(0, False), (0, True)],
         "dihedral": [(turns, mirrored) for mirrored in (False, True) for turns in range(4)]}
TTA_HELP = ("average the probabilities of the views that the model was trained with (test-time augmentation), a pass for "
            "each; a model trained without views is refused")
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # this is one of the processes that torchrun started
RANK, WORLD = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if TORCHRUN else (0, 1)
LARGEST_SIZE = 4096  # side in pixels of the images that a network is given
CHECKPOINT_FORMAT, RUN_FORMAT, FORMAT_VERSION = "image classifier", "training run", 1


class LazyModule:
    """A module that is imported when it is first used: torch takes seconds, and --help should not wait for them."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        if self._name not in sys.modules:
            gc.disable()  # a fifth of the import's time would go into looking for garbage, where there is none
            try:
                with signals_held():  # some libraries abort at an exception while they are loaded
                    importlib.import_module(self._name)
            finally:
                gc.freeze()  # nor need it be searched later, but at the end, where some libraries count what they made
                gc.enable()
        return getattr(importlib.import_module(self._name), attribute)


atexit.register(gc.unfreeze)
torch = LazyModule("torch")
torchvision = LazyModule("torchvision")
functional = LazyModule("torchvision.transforms.v2.functional")


# ---------------------------------------------------------------- commands, errors, progress

class UserError(Exception):
    """A wrong input: its message, one line, names the thing and the way out. The command ends with this exit code."""
    exit_code = EXIT_USAGE


class ImageError(UserError):
    """An image that cannot be read; the message starts with its path, `reason` is the rest."""

    def __init__(self, path, reason: str):
        self.path, self.reason = str(path), one_line(reason)
        super().__init__(f"cannot read image {self.path}: {self.reason}")


class Locked(UserError):
    """Another run holds the folder."""
    exit_code = EXIT_LOCKED


def one_line(text) -> str:
    return " ".join(str(text).split())


def printable(text: str) -> str:
    """Text for a line, a picture or a page: what cannot be shown, such as a line break in a file's name, is escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def command(main):
    """Turn main(argv) into a command that returns its exit code and reports a wrong input as one line on stderr."""
    @functools.wraps(main)
    def run(argv=None) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell starts what shall run in the background
                with contextlib.suppress(ValueError):  # signals can only be set in the main thread
                    signal.signal(number, receive_signal)
        sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # closed, as by >&-
        try:
            code = main(argv) or 0
            print(end="", flush=True)  # what cannot be written shows here, not when Python ends
            return code
        except UserError as error:
            message, code = one_line(error), error.exit_code
        except KeyboardInterrupt as error:
            message, code = "interrupted", error.args[0] if error.args else EXIT_SIGINT
        except OSError as error:  # a full disk, a folder that cannot be written: not ours to mend, but to name
            name, code = " to ".join(str(name) for name in (error.filename, error.filename2) if name), EXIT_USAGE
            try:
                print(end="", flush=True)
            except OSError:  # it is stdout: what still waits for it is dropped
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                name = name or "stdout"
            if isinstance(error, BrokenPipeError):  # its reader has seen enough, as in `predict.py ... | head`
                return 0
            message = f"{name}: {error.strerror}" if name else str(error)
        log(f"{Path(sys.modules[main.__module__].__file__).name}: error: {message}", stamp=False)
        return code
    return run


held_signals = None  # within `signals_held`, those that have come


def receive_signal(number: int, _):
    """End the program by an exception, so that temporary files are removed, or leave that to `signals_held`."""
    if held_signals != []:
        raise KeyboardInterrupt(128 + number)
    held_signals.append(number)
    with contextlib.suppress(RuntimeError):  # it came while another line was being printed
        log(f"{signal.Signals(number).name}: ending as soon as this step is done; a second one ends at once")


@contextlib.contextmanager
def signals_held():
    """A block that a signal ends the program after, not in; a second signal ends it at once."""
    global held_signals
    if held_signals is not None:  # in another such block, which will see to it
        yield
        return
    held_signals = []
    try:
        yield
        if held_signals:
            raise KeyboardInterrupt(128 + held_signals[0])
    finally:
        held_signals = None


def whole_steps(steps):
    """Yield the steps of a loop, with signals held in each; the wait for the next can be ended at once."""
    for step in steps:
        with signals_held():
            yield step


def make_parser(script: str, doc: str, example: str) -> argparse.ArgumentParser:
    """An argument parser whose help opens with the script's docstring and ends with an example and the exit codes."""
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):  # no '(default: None)', no '(default: False)'
            told = action.default is not None and action.default is not False and action.default != []
            return super()._get_help_string(action) if told else action.help
    return argparse.ArgumentParser(prog=script, description=doc, formatter_class=Formatter, allow_abbrev=False,
                                   epilog=f"example:\n  {example}\n\n{EXIT_CODES}")


def add_hardware_options(parser: argparse.ArgumentParser):
    """Add the options of everything that runs a model: --device, --precision, --workers. Returns their group."""
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: CUDA, else MPS, else CPU)")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                       help="of the backbone; auto is bf16 where the processor computes in it natively, else fp32, and with a "
                            "model that was trained in fp32 it is that")
    group.add_argument("--workers", type=positive_int, metavar="N",
                       help="threads that read images (default: 2 per core, at most 16; fewer while a CPU fine-tunes)")
    return group


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not zero or a positive number")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def seed_number(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63 - 1")
    return value


for _type, _name in ((positive_int, "whole number"), (positive_float, "number"), (not_negative, "number"),
                     (fraction, "fraction"), (seed_number, "whole number")):
    _type.__name__ = _name  # argparse says "invalid whole number value: 'x'"


def log(message: str, stamp: bool = True, end: str = "\n"):
    """Tell people, on stderr; with the time of day where stderr is a file or a pipe, such as cron's mail.

    Of several processes the first one tells; only errors, which have no stamp, come from all.
    """
    if RANK and stamp:
        return
    prefix = time.strftime("%Y-%m-%d %H:%M:%S ") if stamp and not sys.stderr.isatty() else ""
    try:
        print(f"{prefix}{message}", end=end, file=sys.stderr, flush=True)
    except OSError:  # nobody listens any more, or the disk is full, but the work goes on
        sys.stderr = open(os.devnull, "w")


class Progress:
    """Progress on stderr with rate and time left: a bar on a terminal, elsewhere a line every `every` seconds."""

    def __init__(self, label: str, total: int | None, unit: str = "img", every: float = 30):
        self.label, self.total, self.unit = label, total, unit
        self.bar = sys.stderr.isatty()
        self.every = 0.1 if self.bar else every
        self.done, self.start, self.shown = 0, time.monotonic(), time.monotonic()

    def update(self, count: int):
        self.done += count
        now = time.monotonic()
        if now - self.shown >= self.every:
            self.shown = now
            self._show(now)

    def _show(self, now: float):
        rate = self.done / max(now - self.start, 1e-9)
        if not self.total:
            text = f"{self.label} {self.done} {self.unit}, {rate:.0f} {self.unit}/s"
        else:
            left = (self.total - self.done) / max(rate, 1e-9)
            text = (f"{self.label} {self.done}/{self.total} {self.unit}, {rate:.{0 if rate >= 100 else 1}f} "
                    f"{self.unit}/s, {int(left) // 60}:{int(left) % 60:02d} left")
        if self.bar:
            full = 20 * self.done // max(self.total or 1, 1) if self.total else 0
            log(f"\r\x1b[K[{'#' * full}{'.' * (20 - full)}] {text}", end="")
        else:
            log(text)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.bar:
            log("\r\x1b[K", end="")
        seconds = time.monotonic() - self.start
        if kind is None and seconds > 1:
            log(f"{self.label}: {self.done} {self.unit} in {seconds:.1f} s, {self.done / seconds:.0f} {self.unit}/s")


@contextlib.contextmanager
def replacing(path, mode: str = "w"):
    """Open a file that appears at `path`, whole and on disk, only when the block has ended without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        text = {} if "b" in mode else {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk has no file name in its error
        raise OSError(error.errno, error.strerror, str(error.filename or path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path):
    """Hold a lock file, which the kernel frees when this process ends, however it does; raises Locked if another has it."""
    while True:
        file = open(path, "w")
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # its last holder removed it just now
        except (BlockingIOError, PermissionError):
            file.close()
            raise Locked(f"another run holds {path}; wait for it to end") from None
    try:
        yield
    finally:
        if os.name != "nt":  # Windows removes no open file
            path.unlink(missing_ok=True)
        file.close()


def file_hash(path, algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file's content. OSError for what is no file: a named pipe would be waited for for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- images and trees

def read_image(path, content: bytes | None = None) -> Image.Image:
    """Read an image file (or its content, if at hand) of any mode that Pillow opens as RGB, turned upright by its EXIF tag.

    Transparency is dropped, 16 bits become 8 by division; 32-bit integers and floats, which have no agreed range, are
    stretched from their own minimum and maximum. Raises ImageError, also where a header promises more than 178 million
    pixels (Pillow's bound on decompression bombs).
    """
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would be waited for for ever
            raise ImageError(path, "not a regular file")
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            image.load()
            deep = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
            with contextlib.suppress(Exception):  # a broken EXIF block is no reason to refuse good pixels
                ImageOps.exif_transpose(image, in_place=True)
            if deep:
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            elif image.mode in ("I", "F"):
                low, high = image.getextrema()
                scale = 255 / (high - low) if high > low else 0
                image = image.convert("F").point(lambda value: value * scale - low * scale).convert("L")
            elif image.mode == "P":  # by way of RGBA, else Pillow warns of transparency given as bytes
                image = image.convert("RGBA")
            return image if image.mode == "RGB" else image.convert("RGB")
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except UnidentifiedImageError:
        raise ImageError(path, "cannot identify image file") from None
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError, RuntimeError,
            struct.error, zlib.error, Image.DecompressionBombError) as error:  # what decoders raise on broken files
        reason = getattr(error, "strerror", None) or str(error).replace(repr(str(path)), "").replace(str(path), "").strip()
        reason = reason or type(error).__name__
        raise ImageError(path, reason) from None


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image: by extension in any case, and not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def walk(folder):
    """Yield (path of a folder, names of its files) for a folder and all below it, sorted, hidden ones left out.

    Links are followed, once.
    """
    def complain(error):
        log(f"warning: left out {error.filename}: {error.strerror}")
    seen = set()
    for root, folders, files in os.walk(folder, onerror=complain, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield root, sorted(files)
        seen.add(real)


def find_images(folder):
    """Yield the paths of all images below a folder, in the order of `walk`."""
    return (os.path.join(root, name) for root, files in walk(folder) for name in files if is_image_name(name))


def class_folders(folder) -> list[str]:
    """The names of the class folders in a folder, sorted as ImageFolder sorts them; hidden ones are not classes."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def read_split(folder, classes: list[str] | None = None) -> tuple[list[str], list[str], list[int]]:
    """Read FOLDER/<class>/*: (paths, class names, class index of each path).

    With `classes` given, folders are matched to it by name, never by position, and a folder it lacks is a UserError. So
    are a folder that does not exist, holds no class folder, or holds a class folder without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    found = class_folders(folder)
    if not found:
        raise UserError(f"{folder} has no class folders; expected {folder}/<class>/<image>")
    names = classes if classes is not None else found
    if unknown := [name for name in found if name not in names]:
        raise UserError(f"{folder} has a class that the {len(names)} known classes lack: {', '.join(unknown[:5])}")
    paths, targets = [], []
    for name in found:
        images = list(find_images(folder / name))
        if not images:
            raise UserError(f"class folder without images: {folder / name}; remove it, or put images into it")
        paths += images
        targets += [names.index(name)] * len(images)
    return paths, names, targets


def preprocess(image: Image.Image, size: int, interpolation: str) -> torch.Tensor:
    """RGB image -> uint8 tensor [3, size, size]: the centre square of the shorter side, resized. A square is kept whole."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = functional.pil_to_tensor(image.crop((left, top, left + side, top + side)))
    return resize(pixels, size, interpolation)


def resize(pixels: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """uint8 pixels [..., 3, s, s] -> [..., 3, size, size]."""
    return functional.resize(pixels, [size, size], functional.InterpolationMode(interpolation), antialias=True)


def turn(images: torch.Tensor, turns: int, mirrored: bool) -> torch.Tensor:
    """A view of images [..., S, S]: mirrored left to right, then turned by quarter turns counterclockwise."""
    return torch.rot90(images.flip(-1) if mirrored else images, turns, (-2, -1))


def reader_threads(workers: int | None) -> int:
    """--workers, or its default."""
    return workers or min(2 * (os.cpu_count() or 1), 16)


def read_batches(paths, preprocessing: dict, batch_size: int, workers: int | None = None, read_image=read_image):
    """Read images in threads, ahead of the consumer: yields lists of up to batch_size (path, uint8 [3, S, S] or ImageError).

    Threads suffice, since Pillow and torch release the interpreter while they decode and resize; and unlike loader
    processes they start at once, need no shared memory and cannot die alone. The order of `paths`, which may be any
    iterable, is kept, and only about three batches are in memory at a time. A None among the paths says that the next may
    be long in coming: what is under way is handed out first.
    """
    def read(path):
        try:
            return path, preprocess(read_image(path), preprocessing["size"], preprocessing["interpolation"])
        except ImageError as error:
            return path, error

    executor, ahead = ThreadPoolExecutor(reader_threads(workers)), collections.deque()
    try:
        for path in chain(paths, [None]):
            if path is not None:
                ahead.append(executor.submit(read, path))
            while len(ahead) >= (1 if path is None else 3 * batch_size):
                yield [ahead.popleft().result() for _ in range(min(batch_size, len(ahead)))]
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------- the model

def pick_device(name: str | None) -> torch.device:
    """The device named, or CUDA, then MPS, then CPU. One that is not there is a UserError, never a fallback."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available() and WORLD == 1
    if WORLD > 1 and name not in (None, "cpu", "cuda"):
        raise UserError(f"--device {name}: several processes take cuda, where each has the GPU of its number, or cpu")
    if name in (None, "cuda") and cuda and WORLD > 1:
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
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # else pinned memory, and what else has no tensor to go by, belongs to the first one
    return device


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device. CUDA lets the program go on while it copies; MPS then may read memory that is freed already."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The backbone's dtype for --precision: 'auto' is bf16 where the processor computes in it natively, else fp32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "cpu":  # these checks have no public name yet; without them, fp32
            native = any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("avx512_bf16", "amx_tile"))
        else:
            native = False
        name = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def find_head(model: torch.nn.Module, outputs: int) -> str:
    """The name of the classifier: the last Linear or 1x1 convolution with `outputs` outputs. All before is backbone."""
    for name, module in reversed(list(model.named_modules())):
        linear = isinstance(module, torch.nn.Linear) and module.out_features == outputs
        if linear or isinstance(module, torch.nn.Conv2d) and (module.out_channels, module.kernel_size) == (outputs, (1, 1)):
            return name
    raise UserError(f"{type(model).__name__} has no linear layer or 1x1 convolution with {outputs} outputs as classifier")


class FrozenModel:
    """A model as all scripts run it: in eval mode, cut at its head, in the layout and precision that the device likes.

    `features` runs everything before the head, `logits` the head and what stands behind it (squeezenet's ReLU and pooling),
    in float32. The model given is not changed, but its head is moved to the device.
    """

    def __init__(self, model: torch.nn.Module, preprocessing: dict, outputs: int, device: torch.device, precision: str,
                 compiled: bool = False):
        self.device, self.dtype, self.preprocessing = device, pick_precision(precision, device), preprocessing
        self.batch_size = 16 if device.type == "cpu" else 128  # 16 images keep a CPU's cores busy and its caches warm
        self.compiled = compiled
        self.mean, self.std = (255 * torch.tensor(preprocessing[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
        self.model, name = model, find_head(model, outputs)
        parent, head = model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)
        siblings = dict(parent.named_children()) if isinstance(parent, torch.nn.Sequential) else {}
        behind = list(siblings)[list(siblings).index(name.rpartition(".")[2]) + 1:] if siblings else []
        self.cut = [name] + [f"{name.rpartition('.')[0]}.{key}" for key in behind]
        self.head = torch.nn.Sequential(head, *(siblings[key] for key in behind))
        self.width = getattr(head, "in_features", None)
        if isinstance(head, torch.nn.Conv2d):  # its input is a map, which the model's forward has flattened
            size = preprocessing["size"]
            self.width = self.features(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]
            side = math.isqrt(self.width // head.in_channels)
            unflatten = torch.nn.Unflatten(1, (head.in_channels, side, side))
            self.head = torch.nn.Sequential(unflatten, *self.head, torch.nn.Flatten())
        self.head.to(device).eval()

    @functools.cached_property
    def backbone(self) -> torch.nn.Module:
        """The model without its head, BatchNorm folded, in the device's layout. It is made when first used.

        Raises UserError where the model cannot take images of this size.
        """
        keep_large_blocks()
        backbone = fold_batchnorm(self.copy_backbone().eval().requires_grad_(False))
        backbone = backbone.to(self.device, self.dtype, memory_format=torch.channels_last)
        size = self.preprocessing["size"]
        images = torch.zeros(self.batch_size, 3, size, size, device=self.device, dtype=self.dtype)
        images = images.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            try:
                backbone(images[:1])
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, AssertionError, ValueError) as error:
                raise UserError(f"--image-size {size}: {type(self.model).__name__} cannot take images of {size} pixels "
                                f"({one_line(error)[:120]})") from None
            if self.compiled:
                backbone = torch.compile(backbone, dynamic=False, options={"freezing": True})
                try:
                    backbone(images)
                except Exception as error:  # the compiler's own kinds; most often there is no C++ compiler
                    raise UserError(f"--compile does not work here, run without it: {one_line(error)[:200]}") from None
        return backbone

    def copy_backbone(self) -> torch.nn.Module:
        """A copy of the model, on its device, with nothing in the place of the head and of what stands behind it."""
        backbone = copy.deepcopy(self.model)
        for name in self.cut:
            backbone.set_submodule(name, torch.nn.Identity())
        return backbone

    def update(self, backbone_weights: dict):
        """Take new weights for the model's backbone, under the model's own names."""
        update_weights(self.model, backbone_weights)
        self.__dict__.pop("backbone", None)  # to be made anew

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [B, 3, S, S] on any device -> float32 images on this model's device."""
        return send(pixels, self.device).float().sub_(self.mean).div_(self.std)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [B, 3, S, S] on any device -> float32 features [B, D] on this model's device.

        A batch that is too large for the device's memory is halved until it fits.
        """
        if len(pixels) > self.batch_size:
            return torch.cat([self.features(part) for part in pixels.split(self.batch_size)])
        try:
            return self.forward(pixels)
        except torch.OutOfMemoryError:
            if self.batch_size == 1:
                raise UserError(f"no memory on {self.device} for a single image; use another --device") from None
        self.batch_size = max(1, self.batch_size // 2)
        return self.features(pixels)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            images = self.normalise(pixels).to(self.dtype)
            if self.compiled and len(images) < self.batch_size:  # compiled for one shape: a short batch is filled up
                images = torch.cat([images, images[:1].expand(self.batch_size - len(images), -1, -1, -1)])
            images = images.contiguous(memory_format=torch.channels_last)  # after plane by plane: half the time of mixed first
            return self.backbone(images)[:len(pixels)].float()

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B, D] -> logits [B, classes], float32. Raises UserError where they are not finite."""
        with torch.inference_mode():
            logits = self.head(features)
        if not logits.isfinite().all():
            raise UserError(f"the answers of the {type(self.model).__name__} are not finite: its weights are damaged, or want "
                            "another --precision")
        return logits

    def log_probabilities(self, pixels: torch.Tensor, temperatures, views=VIEWS["none"]) -> list[torch.Tensor]:
        """uint8 pixels [B, 3, S, S] -> for each temperature, log-probabilities [B, classes], float64 on the CPU.

        The probabilities of several views of the same image are averaged (test-time augmentation) before the temperature.
        """
        averaged = average_views([self.logits(self.features(turn(pixels, *view))) for view in views])
        return [(averaged / temperature).log_softmax(1) for temperature in temperatures]


def average_views(logits) -> torch.Tensor:
    """Logits [B, classes] of each view -> the logarithm of the views' mean probabilities [B, classes], float64 on the CPU."""
    views = torch.stack([own.cpu().double().log_softmax(1) for own in logits])
    return views.logsumexp(0) - math.log(len(views))


def fold_batchnorm(model: torch.nn.Module) -> torch.nn.Module:
    """A model in eval mode -> the same function with each BatchNorm multiplied into the convolution before it.

    The model given is used up.
    """
    try:
        return importlib.import_module("torch.fx.experimental.optimization").fuse(model, inplace=True)
    except torch.fx.proxy.TraceError:  # a forward that torch.fx cannot follow: right as it is, only slower
        return model


def keep_large_blocks():
    """Have glibc keep freed blocks: by default every activation is mapped anew, and its page faults halve a CPU's rate."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc, m_trim_threshold, m_mmap_threshold = ctypes.CDLL("libc.so.6"), -1, -3
        if libc.mallopt(m_mmap_threshold, 1 << 30) or libc.mallopt(m_mmap_threshold, 32 << 20):  # old ones take 32 MB at most
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)


# ---------------------------------------------------------------- the checkpoint

def read_torch_file(path) -> dict:
    """torch.load with weights_only=True, which runs no code from the file; a UserError for all that is no dict with names."""
    if not Path(path).is_file():
        raise UserError(f"{path} is no file, but a folder or a device" if Path(path).exists() else f"no such file: {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch writes checksums, and does not look at them
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # pickle, zip and torch raise a dozen kinds on a damaged file
        if "unsupported global" in str(error).lower() or "unsupported class" in str(error).lower():
            raise UserError(f"refused to load {path}: it holds more than plain values, and could run code") from None
        raise UserError(f"{path} is damaged, or is no PyTorch file") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds no dict of tensors by name, but a {type(content).__name__}")
    return content


def is_checkpoint(content: dict) -> bool:
    return content.get("format") == CHECKPOINT_FORMAT


def read_checkpoint(path) -> tuple[dict, torch.nn.Module]:
    """Read a checkpoint that train.py wrote: (its dict, the model with its weights, in eval mode on the CPU)."""
    content = read_torch_file(path)
    if not is_checkpoint(content):
        what = ("the state of a run; give the model.pt beside it" if content.get("format") == RUN_FORMAT
                else "a plain state dict, which train.py takes as --weights" if all(map(torch.is_tensor, content.values()))
                else "a file of another program")
        raise UserError(f"{path} is no checkpoint of train.py, but {what}")
    expected = {"version": int, "arch": str, "model_kwargs": dict, "classes": list, "preprocessing": dict, "state_dict": dict,
                "temperature": float, "metrics": dict, "views": list, "temperature_tta": float, "args": dict, "versions": dict}
    later = {"views": VIEWS["none"], "temperature_tta": content.get("temperature"), "args": {}, "versions": {}}
    content = later | content  # that of an earlier version lacks some
    if wrong := [key for key, kind in expected.items() if not isinstance(content.get(key), kind)]:
        raise UserError(f"{path} is an incomplete checkpoint: it lacks {', '.join(wrong)}")
    if content["version"] > FORMAT_VERSION:
        raise UserError(f"{path} has format version {content['version']}; this program reads up to {FORMAT_VERSION}: update it")
    if wrong := {"size", "interpolation", "mean", "std"} - content["preprocessing"].keys():
        raise UserError(f"{path} is an incomplete checkpoint: its preprocessing lacks {', '.join(sorted(wrong))}")
    if wrong := find_nonsense(content):
        raise UserError(f"{path} is damaged, or wants a newer version of this program: its {', '.join(wrong)} make no sense")
    if len(content["classes"]) != content["model_kwargs"].get("num_classes"):
        raise UserError(f"{path} contradicts itself: {len(content['classes'])} classes, but {content['model_kwargs']}")
    try:
        with skip_random_weights():
            model = build_model(content["arch"], content["model_kwargs"])
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"{path}: this torchvision cannot build its model: {error}") from None
    load_weights(model, content["state_dict"], content["arch"], path)
    return content, model.eval()


def find_nonsense(content: dict) -> list[str]:
    """The keys of a checkpoint, all there and of the right types, whose values no training writes."""
    classes, how, views = content["classes"], content["preprocessing"], VIEWS["dihedral"]
    kinds = {"num_classes": int, "image_size": int, "aux_logits": bool, "transform_input": bool}
    sane = {
        "classes": len(classes) > 0 and all(isinstance(name, str) for name in classes) and len(set(classes)) == len(classes),
        "model_kwargs": all(kinds.get(key) is type(value) for key, value in content["model_kwargs"].items())
        and is_size(content["model_kwargs"].get("image_size", 1)),
        "size": is_size(how["size"]),
        "interpolation": how["interpolation"] in ("nearest", "nearest-exact", "bilinear", "bicubic"),
        "mean and std": all(isinstance(three, list) and len(three) == 3 and all(map(is_number, three)) for three in
                            (how["mean"], how["std"]))
        and min(how["std"]) > 0,
        **{key: 0 < content[key] < math.inf for key in ("temperature", "temperature_tta")},
        "views": len(content["views"]) > 0 and all(repr(view) in map(repr, views) for view in content["views"]),
        "metrics": is_number(content["metrics"].get("epoch", 0))}
    return [what for what, right in sane.items() if not right]


def is_size(value) -> bool:
    return type(value) is int and 0 < value <= LARGEST_SIZE


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 63


def checkpoint_views(checkpoint: dict, tta: bool) -> tuple[list, float]:
    """The views to average over, with --tta those that the model was trained with, and the temperature of the average."""
    if not tta:
        return VIEWS["none"], checkpoint["temperature"]
    if len(checkpoint["views"]) == 1:
        raise UserError("--tta averages the views that a model was trained with, and this one saw every image only as it is: "
                        "train with --augment flip or dihedral")
    return checkpoint["views"], checkpoint["temperature_tta"]


def checkpoint_precision(checkpoint: dict, precision: str) -> str:
    """--precision, where auto is fp32 for a model whose features were measured in fp32: the numbers stay what they were."""
    return "fp32" if precision == "auto" and checkpoint.get("args", {}).get("precision") == "fp32" else precision


def build_model(arch: str, model_kwargs: dict) -> torch.nn.Module:
    """torchvision's model `arch` with random weights; `model_kwargs` are its own arguments, such as num_classes."""
    if arch not in torchvision.models.list_models(module=torchvision.models):  # others may download weights
        raise ValueError(f"unknown classification model {arch}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet, inception_v3: "the default initialization will change"
        return torchvision.models.get_model(arch, weights=None, **model_kwargs)


@contextlib.contextmanager
def skip_random_weights():
    """Build layers without drawing their random weights, which takes longer than to load real ones."""
    init = torch.nn.init
    kept = {name: getattr(init, name) for name in dir(init) if name.endswith("_") and not name.startswith("_")}
    try:
        for name in kept:
            setattr(init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for name, function in kept.items():
            setattr(init, name, function)


def load_weights(model: torch.nn.Module, state_dict: dict, arch: str, path):
    """Load a state dict into a model of exactly its keys and shapes; raises UserError naming the keys that do not fit.

    The model takes the tensors themselves, not copies, where they are what a model holds.
    """
    own = model.state_dict()
    both = {key: (own[key], state_dict[key]) for key in own if key in state_dict}
    wrong = {"missing": [key for key in own if key not in state_dict],
             "unknown": [str(key) for key in state_dict if key not in own],
             "of another kind": [key for key, (mine, value) in both.items() if not is_plain(value, mine.dtype)]}
    wrong["of another shape"] = [key for key, (mine, value) in both.items()
                                 if key not in wrong["of another kind"] and mine.shape != value.shape]
    if not any(wrong.values()):
        state_dict = {key: value.to(mine.dtype).contiguous() for key, (mine, value) in both.items()}
        wrong["with values that are not finite"] = [key for key, value in state_dict.items() if not value.isfinite().all()]
    if any(wrong.values()):
        details = "; ".join(f"{len(keys)} keys {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                            for kind, keys in wrong.items() if keys)
        raise UserError(f"{path} does not fit the architecture {arch}: {details}")
    update_weights(model, state_dict, assign=True)


def update_weights(model: torch.nn.Module, weights: dict, assign: bool = False):
    """Give a model weights by name; those that are not among them it keeps.

    They pass through a state dict of torch's own kind, which also knows the versions of its modules: MNASNet asks for its own.
    """
    own = model.state_dict()
    own.update(weights)
    model.load_state_dict(own, assign=assign)


def is_plain(value, dtype: torch.dtype) -> bool:
    """Whether a value is a dense tensor in memory of this type, or both are floating point."""
    floats = torch.float16, torch.bfloat16, torch.float32, torch.float64
    return (torch.is_tensor(value) and not value.is_nested and value.layout == torch.strided and value.device.type == "cpu"
            and (value.dtype == dtype or value.dtype in floats and dtype in floats))
