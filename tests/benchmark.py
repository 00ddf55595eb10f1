"""Measure speed and accuracy, so that every number in the README can be measured again.

    python tests/benchmark.py pass --data data/eurosat --arch resnet50
    python tests/benchmark.py cache --data data/eurosat --arch mobilenet_v2
    python tests/benchmark.py compare --data data/eurosat100 --arch resnet50
    python tests/benchmark.py fewshot --data data/eurosat --arch resnet50
    python tests/benchmark.py finetune --data data/eurosat --arch resnet50
    python tests/benchmark.py predict --data data/eurosat --arch resnet50
    python tests/benchmark.py mosaic --data data/eurosat --checkpoint runs/eurosat/model.pt

pass      images/s of four tasks: a matrix product, converted to images by their number of operations; the frozen
          backbone as train.py runs it, on images in memory ("bare forward"); the network as tutorials run it, on images
          in memory (fp32, planar layout, BatchNorm not folded, batches of 64); and train.py's feature pass, from image
          files to features, with the hashes of the files and without the cache. Images have 224 pixels. Each task runs
          once before the first round, to warm up.
cache     seconds of three runs of train.py: with an empty cache, again, and after the bytes of 1 % of the images have
          changed; besides, the peak memory of the first run, and the median seconds of an epoch of the third.
compare   seconds of whole commands: the tutorial way (the subcommand `notebook`, which runs the frozen network over all
          images in each epoch), train.py with an empty cache, and the same again.
fewshot   test accuracy after training with dihedral views on 10, 50 and 100 images of each class (--shots), without
          val: mean and standard deviation over five random draws of images (--draws).
finetune  images/s of training all layers: an epoch with augmentation, from image files or pixels in memory as in
          train.py, and the same number of steps on random images on the device. One round warms up.
predict   images/s from image files to CSV records, and of the backbone alone, on images in memory; and seconds of
          predict.py for one image, and of a Python process that imports torch and torchvision, plus one forward pass.
          Each task runs once before the first round, to warm up. Images have 224 pixels.
mosaic    share of correct cells in predict.py's map of a scene made of 16 x 12 test tiles, which form regions of one
          class, for tiles side by side and for tiles that overlap by half.

Tasks that are compared alternate: each round measures each of them once, one after the other, on the same machine. A
ratio is that of two measurements of the same round (a pair), so that a slow minute of the machine affects both sides.
Printed are the medians over --rounds, with the lowest and the highest value in parentheses. Except for fewshot and
mosaic, weights are random by default, because speed does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from common import Network

# Not from conftest.py, which changes the environment for the tests.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PREPROCESSING = {"size": 224, "resize": "squish", "interpolation": "bilinear"}
PREPROCESSING |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def main() -> None:
    args = parse_args()
    job = TrainingJob(args.data, args.arch, args.weights, args.epochs, args.device, args.precision)
    if args.what == "pass":
        measure_pass(args.data, args.arch, args.images, args.rounds, args.device, args.precision)
    elif args.what == "cache":
        measure_cache(job)
    elif args.what == "compare":
        compare_with_tutorial(job, args.rounds)
    elif args.what == "notebook":
        train_as_tutorials_do(args.data, args.arch, args.weights, args.epochs, args.device)
    elif args.what == "fewshot":
        measure_few_shots(job, args.shots, args.draws, args.options.split())
    elif args.what == "finetune":
        learner = make_learner(job, args.images, args.image_size, args.batch_size, args.augment.split())
        measure_finetune(learner, args.rounds)
    elif args.what == "predict":
        measure_predict(args.data, args.arch, args.images, args.rounds, args.device, args.precision)
    else:
        map_mosaic(args.data, args.checkpoint, args.out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("pass", "cache", "compare", "notebook", "fewshot", "finetune", "predict", "mosaic")
    parser.add_argument("what", choices=names)
    parser.add_argument("--data", type=Path, default=Path("data/eurosat"))
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--weights", default="none", help="a torchvision state dict, or none")
    parser.add_argument("--images", type=int, default=256, help="pass, finetune, predict: images per round")
    parser.add_argument("--checkpoint", type=Path, help="mosaic: the model.pt to map it with")
    parser.add_argument("--out", type=Path, default=Path("mosaic"), help="mosaic: folder for the scene and its maps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=224, help="finetune")
    parser.add_argument("--batch-size", type=int, default=64, help="finetune")
    parser.add_argument("--augment", default="dihedral", help="finetune: as in train.py, as one argument")
    parser.add_argument("--device", help="as in train.py")
    parser.add_argument("--precision", default="auto", help="as in train.py")
    parser.add_argument("--shots", type=int, nargs="+", default=[10, 50, 100], help="fewshot: images per class")
    parser.add_argument("--draws", type=int, default=5, help="fewshot: random draws of images, at least 2")
    parser.add_argument("--options", default="", help="fewshot: further options of train.py, as one argument")
    return parser.parse_args()


# ---------------------------------------------------------------- measuring


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that work() takes, including what it started on the device."""
    import torch

    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed_command(arguments: Sequence[object]) -> float:
    """Return the seconds that a Python command takes, from start to end."""
    start = time.perf_counter()
    line = [sys.executable, *map(str, arguments)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def summary(values: Sequence[float], digits: int) -> str:
    """Return the median, with the lowest and the highest value, as text."""
    median, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median}   ({low} to {high})"


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def print_ratio(rates: dict[str, list[float]], a: str, b: str, digits: int = 2) -> None:
    """Print the ratio of two rates or times, of which each round has a pair."""
    print(f"{a} / {b}: {summary([x / y for x, y in zip(rates[a], rates[b])], digits)}")


def sample_evenly(paths: list[str], count: int) -> list[str]:
    """Return `count` paths, evenly spread over all, so that all classes are among them."""
    return paths[:: max(1, len(paths) // count)][:count]


# ---------------------------------------------------------------- pass


def measure_pass(data: Path, arch: str, count: int, rounds: int, device_name: str | None, precision: str) -> None:
    import torch
    import torchvision
    from common import VIEWS, FeatureCache, FeatureRequest, InferenceModel, Split, extract_features, hash_images
    from common import list_split, pick_device
    from torch.utils.flop_counter import FlopCounterMode

    device, network = pick_device(device_name), random_network(arch)
    paths = sample_evenly(list_split(data / "train")[0], count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.model(torch.zeros(1, 3, 224, 224))
    flops, model = counter.get_total_flops(), InferenceModel(network, device, precision)
    size = 4096 if device.type == "cpu" else 16384
    matrix = torch.randn(size, size, device=device, dtype=model.dtype)
    images = random_images(model, model.batch_size)
    plain_model = torchvision.models.get_model(arch, num_classes=10).eval().to(device)
    plain_images = torch.randn(64, 3, 224, 224, device=device)
    bare_batches, plain_batches = max(1, len(paths) // model.batch_size), max(1, len(paths) // 64)

    def run_plain() -> None:
        with torch.no_grad():
            for _ in range(plain_batches):
                plain_model(plain_images)

    def run_pass() -> None:
        split = Split(paths, torch.zeros(len(paths), dtype=torch.int64), hash_images(paths))
        extract_features(model, [FeatureRequest(split, VIEWS["none"])], FeatureCache(None, {}), Path())

    tasks = {
        "matrix": (lambda: matrix @ matrix, 2 * size**3 / flops),
        "bare": (lambda: run_backbone(model, images, bare_batches), bare_batches * model.batch_size),
        "plain": (run_plain, plain_batches * 64),
        "pass": (run_pass, len(paths)),
    }
    for work, _ in tasks.values():
        work()
    rates = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, (work, amount) in tasks.items():
            rates[name].append(amount / timed(work, device))
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{arch}, 224 px, {model.dtype}, {device}, {threads}, {flops / 1e9:.2f} GFLOP/image")
    texts = {
        "matrix": f"matrix product, {statistics.median(rates['matrix']) * flops / 1e9:.0f} GFLOP/s, as images",
        "bare": "bare forward, images in memory",
        "plain": "forward as in tutorials",
        "pass": "pass, files to features",
    }
    for name, text in texts.items():
        print(f"{text:42} {summary(rates[name], 1)} img/s")
    for a, b in (("pass", "bare"), ("bare", "matrix"), ("bare", "plain")):
        print_ratio(rates, a, b)


def random_network(arch: str) -> Network:
    """Return a network with random weights for ten classes and images of 224 pixels."""
    import torchvision
    from common import Network

    model = torchvision.models.get_model(arch, num_classes=10).eval()
    return Network(arch, {"num_classes": 10}, PREPROCESSING, model)


def random_images(model: Any, count: int) -> torch.Tensor:
    """Return normalized images on the device, in the layout and type of the model's backbone."""
    import torch

    images = torch.randn(count, 3, 224, 224, device=model.device, dtype=model.dtype)
    return images.to(memory_format=torch.channels_last)


def run_backbone(model: Any, images: torch.Tensor, times: int = 1) -> None:
    """Run the backbone of an inference model on normalized images, without reading, resizing or normalizing."""
    import torch

    with torch.inference_mode():
        for _ in range(times):
            model.backbone(images)


# ---------------------------------------------------------------- cache and compare: whole trainings


@dataclass
class TrainingJob:
    """What the commands that are compared train, and how."""

    data: Path
    arch: str
    weights: str
    epochs: int
    device: str | None
    precision: str

    def common_options(self) -> list[object]:
        options = ["--arch", self.arch, "--weights", self.weights, "--epochs", self.epochs]
        return options + (["--device", self.device] if self.device else [])

    def train_command(self, folder: str, data: Path | None = None) -> list[object]:
        """Return train.py's command line, with output and cache in a folder."""
        options = ["--precision", self.precision, "--out", f"{folder}/run", "--cache", f"{folder}/cache"]
        return [ROOT / "train.py", "--data", data or self.data, *self.common_options(), *options]


def measure_cache(job: TrainingJob) -> None:
    import resource

    with tempfile.TemporaryDirectory() as folder:
        data = Path(shutil.copytree(job.data, f"{folder}/data"))
        command = job.train_command(folder, data)
        cold = timed_command(command)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"empty cache: {cold:.1f} s, peak memory {memory:.2f} GiB")
        warm = timed_command(command)
        print(f"again: {warm:.1f} s, {warm / cold:.1%} of the first run")
        images = sorted(path for path in data.glob("*/*/*") if path.is_file())
        changed = images[::100]
        for path in changed:
            with open(path, "ab") as file:
                file.write(b"\n")  # another content with the same pixels
        third = timed_command(command)
        share = (third - warm) / (cold - warm)
        print(f"{len(changed)} of {len(images)} images changed: {third:.1f} s, {share:.1%} of the feature pass")
        seconds = [float(row["seconds"]) for row in read_csv(Path(folder, "run", "history.csv"))]
        print(f"an epoch of the classifier: {statistics.median(seconds):.2f} s (median)")


def compare_with_tutorial(job: TrainingJob, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train = job.train_command(folder)
        tutorial = [__file__, "notebook", "--data", job.data, *job.common_options()]
        commands = {"notebook": tutorial, "cold": train, "warm": train}
        times = {name: [] for name in commands}
        for number in range(rounds):
            shutil.rmtree(f"{folder}/cache", ignore_errors=True)
            for name, command in commands.items():
                times[name].append(timed_command(command))
                print(f"round {number + 1}  {name:9} {times[name][-1]:8.1f} s", flush=True)
        print_ratio(times, "notebook", "cold", 1)
        print_ratio(times, "notebook", "warm", 1)


def train_as_tutorials_do(data: Path, arch: str, weights: str, epochs: int, device_name: str | None) -> None:
    """Train a new classifier while the frozen network runs over every image in every epoch."""
    import torch
    from common import classifier_name
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, models, transforms

    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    normalize = transforms.Normalize(PREPROCESSING["mean"], PREPROCESSING["std"])
    transform = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor(), normalize])
    train_set, test_set = (datasets.ImageFolder(data / split, transform) for split in ("train", "test"))
    train_loader = DataLoader(train_set, batch_size=64, shuffle=True, num_workers=2)
    test_loader = DataLoader(test_set, batch_size=64, num_workers=2)
    model = models.get_model(arch)
    if weights != "none":
        model.load_state_dict(torch.load(weights, weights_only=True))
    for parameter in model.parameters():
        parameter.requires_grad = False
    name = classifier_name(model, 1000)  # "fc" of a ResNet
    head = nn.Linear(model.get_submodule(name).in_features, len(train_set.classes))
    model.set_submodule(name, head)
    model.to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for epoch in range(epochs):
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in test_loader:
                correct += (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
        print(f"epoch {epoch + 1} test accuracy {correct / len(test_set):.4f}", flush=True)


# ---------------------------------------------------------------- fewshot


def measure_few_shots(job: TrainingJob, shots: list[int], draws: int, options: list[str]) -> None:
    for count in shots:
        accuracies = []
        for seed in range(draws):
            with tempfile.TemporaryDirectory() as folder:
                link_few_images(job.data, Path(folder) / "few", count, seed)
                line = [ROOT / "train.py", "--data", f"{folder}/few", *job.common_options()]
                line += ["--precision", job.precision, "--out", f"{folder}/run", "--seed", seed]
                line += ["--augment", "dihedral", *options]
                command = [sys.executable, *map(str, line)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                accuracies.append(json.loads(done.stdout.splitlines()[-1])["test_acc"])
        mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
        single = ", ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        print(f"{count} images per class: {mean:.4f} ± {deviation:.4f}   ({single})", flush=True)


def link_few_images(data: Path, few: Path, count: int, seed: int) -> None:
    """Make a tree of links: `count` random images of each class of train, and all of test."""
    for source in sorted((data / "train").iterdir()):
        target = few / "train" / source.name
        target.mkdir(parents=True)
        images = sorted(source.iterdir())
        for image in random.Random(f"{seed} {source.name}").sample(images, min(count, len(images))):
            (target / image.name).symlink_to(image.resolve())
    (few / "test").symlink_to((data / "test").resolve())


# ---------------------------------------------------------------- finetune


def make_learner(job: TrainingJob, count: int, image_size: int, batch_size: int, augment: list[str]) -> Any:
    """Return train.py's learner that trains all layers of a network on `count` images."""
    import torch
    import train
    from common import VIEWS, InferenceModel, Split, hash_images, load_pretrained, pick_device

    tree = train.list_tree(job.data, [])
    classes, listed = tree.classes, tree.splits["train"]
    chosen = sample_evenly(list(range(len(listed))), count)
    paths = [listed.paths[row] for row in chosen]
    dataset = train.Dataset(classes, {"train": Split(paths, listed.targets[chosen], hash_images(paths))})
    network = load_pretrained(job.arch, job.weights, len(classes), image_size, None, 0)
    model = InferenceModel(network, pick_device(job.device), job.precision)
    head = train.standardized_head(model.head, torch.randn(1, 64, model.num_features))
    (views,) = [name for name in augment if name != "strong"] or ["flip"]
    options = train.TrainOptions(
        *(batch_size, 0, torch.ones(len(classes))),
        finetune="all",
        backbone_lr=1e-4,
        learn_statistics=job.weights == "none",
        augmentation=train.Augmentation(VIEWS[views], len(classes), "strong" in augment, crop=views == "flip"),
    )
    return train.FineTuner(model, head, dataset, options)


def measure_finetune(learner: Any, rounds: int) -> None:
    import torch
    import train

    hparams = train.HParams(lr=1e-3, weight_decay=0, label_smoothing=0, epochs=1)
    optimizer = torch.optim.AdamW(learner.param_groups([hparams]), fused=learner.device.type != "mps")
    smoothing = torch.zeros(1, device=learner.device)
    weights = learner.options.class_weights.to(learner.device)

    def train_epoch(batches: Any) -> None:
        for images, targets, _ in batches:
            loss = train.cross_entropies(learner.forward(images, [0]), targets, smoothing, weights)
            optimizer.zero_grad()
            loss.sum().backward()
            learner.clip_gradients()
            optimizer.step()

    (images, targets, _), *rest = learner.train_batches(1)
    random_batches = [(torch.randn_like(images), targets, 1)] * (1 + len(rest))
    epochs = {"training": lambda: learner.train_batches(1), "random": lambda: random_batches}
    count, rates = len(learner.targets["train"]), {name: [] for name in epochs}
    for number in range(rounds + 1):
        for name, make_batches in epochs.items():
            rate = count / timed(lambda make_batches=make_batches: train_epoch(make_batches()), learner.device)
            rates[name] += [rate] if number else []  # the first round warms up
    for name, values in rates.items():
        print(f"{name:8} images {summary(values, 1)} img/s")
    print_ratio(rates, "training", "random")


# ---------------------------------------------------------------- predict


def measure_predict(data: Path, arch: str, count: int, rounds: int, device_name: str | None, precision: str) -> None:
    import predict
    import torch
    from common import VIEWS, InferenceModel, find_images, pick_device

    device, network = pick_device(device_name), random_network(arch)
    classes = [f"class {number}" for number in range(10)]
    paths = sample_evenly(list(find_images(data / "test")), count)
    with tempfile.TemporaryDirectory() as folder:
        content = {"format": "image classifier", "version": 1, "arch": arch, "model_kwargs": network.model_kwargs}
        content |= {"classes": classes, "preprocessing": PREPROCESSING, "state_dict": network.model.state_dict()}
        torch.save({**content, "temperature": 1.0, "metrics": {}}, f"{folder}/model.pt")
        model = InferenceModel(network, device, precision)
        images, batches = random_images(model, model.batch_size), max(1, len(paths) // model.batch_size)
        classifier = predict.Classifier(model, classes, VIEWS["none"], 1.0)

        def write_records() -> None:
            with open(f"{folder}/records.csv", "w") as file, contextlib.redirect_stdout(file):
                writer = predict.RecordWriter("csv", classes, predict.Rejection(0, None), top_k=1)
                predict.print_records(classifier.classify(paths), writer, [])

        command = [ROOT / "predict.py", "--checkpoint", f"{folder}/model.pt", paths[0], "--precision", precision]
        command += ["--device", device_name] if device_name else []
        run_backbone(model, images)
        write_records()
        timed_command(command)
        rates = {name: [] for name in ("bare", "records", "imports and forward", "one image")}
        for _ in range(rounds):
            forward = timed(lambda: run_backbone(model, images, batches), device)
            rates["bare"].append(batches * model.batch_size / forward)
            rates["records"].append(len(paths) / timed(write_records, device))
            imports = timed_command(["-c", "import torch, torchvision"])
            imports += timed(lambda: run_backbone(model, images[:1]), device)
            rates["imports and forward"].append(imports)
            rates["one image"].append(timed_command(command))
    for name, unit in (("bare", "img/s"), ("records", "img/s"), ("imports and forward", "s"), ("one image", "s")):
        print(f"{name:20} {summary(rates[name], 1 if unit == 'img/s' else 2)} {unit}")
    print_ratio(rates, "records", "bare")
    print_ratio(rates, "one image", "imports and forward")


# ---------------------------------------------------------------- mosaic


def map_mosaic(data: Path, checkpoint: Path, out: Path) -> None:
    tile = 64
    truth = make_mosaic(data / "test", out, tile)
    for stride in (tile, tile // 2):
        folder, line = out / f"stride{stride}", [ROOT / "predict.py", "--checkpoint", checkpoint]
        timed_command([*line, "--scene", out / "scene.png", "--tile", tile, "--stride", stride, "--out", folder])
        rows, correct = read_csv(folder / "map.csv"), 0
        for row in rows:
            place = tuple(int(row[name]) * stride // tile for name in ("row", "column"))
            correct += row["class"] == truth[place]
        print(f"--stride {stride}: {correct} of {len(rows)} cells correct, {correct / len(rows):.3f}")


def make_mosaic(folder: Path, out: Path, tile: int) -> dict[tuple[int, int], str]:
    """Save a scene of 16 x 12 tiles as OUT/scene.png; return the class of each tile, by its row and column.

    Each tile has the class of the nearest of some random centers, of which each class has two.
    """
    from PIL import Image

    rng, columns, rows = random.Random(0), 16, 12
    images = {path.name: sorted(path.iterdir()) for path in sorted(folder.iterdir())}
    centers = [(rng.uniform(0, columns), rng.uniform(0, rows), name) for name in [*images] * 2]
    truth, scene = {}, Image.new("RGB", (columns * tile, rows * tile))
    for row in range(rows):
        for column in range(columns):
            *_, name = min(centers, key=lambda center: (center[0] - column) ** 2 + (center[1] - row) ** 2)
            truth[row, column] = name
            scene.paste(Image.open(rng.choice(images[name])), (column * tile, row * tile))
    out.mkdir(parents=True, exist_ok=True)
    scene.save(out / "scene.png")
    return truth


if __name__ == "__main__":
    main()
