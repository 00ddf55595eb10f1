"""Timing that anyone can repeat: the feature pass against the bare forward, and whole commands against the notebook way.

    python tests/benchmark.py pass --data data/eurosat --arch resnet50
    python tests/benchmark.py cache --data data/eurosat --arch mobilenet_v2
    python tests/benchmark.py compare --data data/eurosat100 --arch resnet50
    python tests/benchmark.py fewshot --data data/eurosat --arch resnet50
    python tests/benchmark.py finetune --data data/eurosat --arch resnet50
    python tests/benchmark.py predict --data data/eurosat --arch resnet50
    python tests/benchmark.py mosaic --data data/eurosat --checkpoint runs/eurosat/model.pt

`pass` measures in turn, several rounds: a matrix product, the frozen backbone on images in memory, the network as a notebook
runs it (fp32, NCHW, batches of 64, BatchNorm not folded), and train.py's pass from files to features; medians and ratios.
`cache` runs train.py cold, warm, and with the bytes of 1 % of the images changed: seconds, seconds of a head epoch, memory.
`compare` runs, in turn: the notebook way (`notebook`, below), train.py with an empty cache, train.py again.
`fewshot` trains on 10, 50 and 100 images of each class of train, without val, and tells the accuracy on all of test: mean and
deviation over five draws of images.
`finetune` measures epochs of fine-tuning, with augmentation, against the same steps on random images that are at hand.
`predict` measures predict.py in pairs: from image files to records against the bare forward on images in memory; and one image,
start to end, against a Python that imports torch and torchvision, plus one forward.
`mosaic` lays out 16 x 12 test tiles as a scene of regions, has predict.py map it, and compares the map with the truth.
"""
import argparse
import contextlib
import csv
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pass", "cache", "compare", "notebook", "fewshot", "finetune", "predict", "mosaic"))
    parser.add_argument("--data", type=Path, default=Path("data/eurosat"))
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--weights", default="none", help="a torchvision state dict, or none: speed does not depend on it")
    parser.add_argument("--images", type=int, default=256, help="pass, predict: images per round")
    parser.add_argument("--checkpoint", type=Path, help="mosaic: the model.pt to map it with")
    parser.add_argument("--out", type=Path, default=Path("mosaic"), help="mosaic: folder for the scene and its map")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=224, help="finetune")
    parser.add_argument("--batch-size", type=int, default=64, help="finetune")
    parser.add_argument("--augment", default="dihedral", help="finetune: as in train.py, in one argument")
    parser.add_argument("--device", help="as in train.py")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--options", default="", help="fewshot: further options of train.py, in one argument")
    return parser.parse_args()


def seconds(work, device) -> float:
    import torch
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_pass(args):
    import torch
    import torchvision
    from torch.utils.flop_counter import FlopCounterMode

    import train
    from common import FrozenModel, pick_device, read_split
    device = pick_device(args.device)
    model = torchvision.models.get_model(args.arch, num_classes=10).eval()
    preprocessing = {"size": 224, "interpolation": "bilinear", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    frozen = FrozenModel(model, preprocessing, 10, device, args.precision)
    paths = read_split(args.data / "train")[0]
    paths = paths[::max(1, len(paths) // args.images)][:args.images]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    flops = counter.get_total_flops()
    n = 4096 if device.type == "cpu" else 16384
    matrix = torch.randn(n, n, device=device, dtype=frozen.dtype)
    images = torch.randn(frozen.batch_size, 3, 224, 224, device=device, dtype=frozen.dtype)
    images = images.to(memory_format=torch.channels_last)
    plain_model = torchvision.models.get_model(args.arch, num_classes=10).eval().to(device)
    plain_images = torch.randn(64, 3, 224, 224, device=device)

    def bare():
        with torch.inference_mode():
            for _ in range(max(1, len(paths) // frozen.batch_size)):
                frozen.backbone(images)

    def plain():
        with torch.no_grad():
            for _ in range(max(1, len(paths) // 64)):
                plain_model(plain_images)

    def from_files():
        job = SimpleNamespace(splits={"train": (paths, torch.zeros(len(paths)))}, files={"train": train.hash_files(paths, None)})
        train.extract_features(frozen, job, {}, SimpleNamespace(finetune="head", augment="none", no_cache=True, workers=None, out=None))
    works = {"matrix": lambda: matrix @ matrix, "bare": bare, "plain": plain, "pass": from_files}
    amounts = {"matrix": 2 * n ** 3 / flops, "bare": max(1, len(paths) // frozen.batch_size) * frozen.batch_size,
               "plain": max(1, len(paths) // 64) * 64, "pass": len(paths)}
    for work in works.values():
        work()
    rates = {name: [] for name in works}
    for _ in range(args.rounds):
        for name, work in works.items():
            rates[name].append(amounts[name] / seconds(work, device))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{args.arch}, 224 px, {frozen.dtype}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{flops / 1e9:.2f} GFLOP/image")
    for name, text in (("matrix", f"matrix product, {middle['matrix'] * flops / 1e9:.0f} GFLOP/s, as images"), ("bare", "bare forward"),
                       ("plain", "forward as a notebook does it"), ("pass", "pass, files to features")):
        print(f"{text:42} {middle[name]:8.1f} img/s   ({min(rates[name]):.1f} to {max(rates[name]):.1f})")
    for a, b in (("pass", "bare"), ("bare", "matrix"), ("bare", "plain")):
        ratios = [x / y for x, y in zip(rates[a], rates[b])]
        print(f"{a} / {b}: {statistics.median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")


def notebook(args):
    """What tutorials do: the frozen network runs over every image in every epoch."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, models, transforms

    from common import find_head
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    transform = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor(),
                                    transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    train_set, test_set = (datasets.ImageFolder(args.data / split, transform) for split in ("train", "test"))
    train_loader = DataLoader(train_set, batch_size=64, shuffle=True, num_workers=2)
    test_loader = DataLoader(test_set, batch_size=64, num_workers=2)
    model = models.get_model(args.arch)
    if args.weights != "none":
        model.load_state_dict(torch.load(args.weights, weights_only=True))
    for parameter in model.parameters():
        parameter.requires_grad = False
    name = find_head(model, 1000)  # "fc" of a ResNet
    head = nn.Linear(model.get_submodule(name).in_features, len(train_set.classes))
    model.set_submodule(name, head)
    model.to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for epoch in range(args.epochs):
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


def train_command(args, folder) -> list:
    return [ROOT / "train.py", "--data", args.data, "--arch", args.arch, "--weights", args.weights, "--epochs", args.epochs,
            "--precision", args.precision, *(["--device", args.device] if args.device else []),
            "--out", f"{folder}/run", "--cache", f"{folder}/cache"]


def timed(command) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def compare(args):
    with tempfile.TemporaryDirectory() as folder:
        train = train_command(args, folder)
        baseline = [__file__, "notebook", "--data", args.data, "--arch", args.arch, "--weights", args.weights,
                    "--epochs", args.epochs, *(["--device", args.device] if args.device else [])]
        ways = {"notebook": baseline, "cold": train, "warm": train}
        times = {name: [] for name in ways}
        for number in range(args.rounds):
            shutil.rmtree(f"{folder}/cache", ignore_errors=True)
            for name, command in ways.items():
                times[name].append(timed(command))
                print(f"round {number + 1}  {name:9} {times[name][-1]:8.1f} s", flush=True)
        for name in ("cold", "warm"):
            ratios = [a / b for a, b in zip(times["notebook"], times[name])]
            print(f"notebook / {name}: {statistics.median(ratios):.1f}   ({min(ratios):.1f} to {max(ratios):.1f})")


def measure_finetune(args):
    import torch

    import train
    from common import FrozenModel, pick_device
    options = train.parse_args(["--data", str(args.data), "--arch", args.arch, "--weights", args.weights, "--finetune", "all", "--image-size",
                                str(args.image_size), "--batch-size", str(args.batch_size), "--augment", *args.augment.split()])
    classes, splits = train.read_tree(options)
    paths, targets = splits["train"]
    chosen = torch.arange(0, len(paths), max(1, len(paths) // args.images))[:args.images]
    splits = {"train": ([paths[row] for row in chosen.tolist()], targets[chosen])}
    files = {"train": train.hash_files(splits["train"][0], None)}
    model, preprocessing, _ = train.load_pretrained(options, len(classes))
    frozen = FrozenModel(model, preprocessing, len(classes), pick_device(args.device), args.precision)
    head = train.standardised_head(frozen, torch.randn(1, 64, frozen.width))
    learner = train.FineTuning(frozen, head, SimpleNamespace(splits=splits, files=files, classes=classes), options)
    optimizer = torch.optim.Adam(learner.groups([train.plain_config(options) | {"backbone_lr": 1e-4}]))

    def epoch(batches):
        for images, wanted, _ in batches:
            loss = train.cross_entropies(learner.logits(images, [0]), wanted, torch.zeros(1, device=learner.device), None)
            optimizer.zero_grad()
            loss.sum().backward()
            torch.nn.utils.clip_grad_norm_(learner.network.parameters(), 1.0)
            optimizer.step()
    fixed = list(learner.batches(1))
    works = {"random images": lambda: epoch([(torch.randn_like(images), wanted, 1) for images, wanted, _ in fixed[:1]] * len(fixed)),
             "training images": lambda: epoch(learner.batches(1))}
    rates = {name: [] for name in works}
    for number in range(args.rounds + 1):
        for name, work in works.items():
            rate = len(chosen) / seconds(work, learner.device)
            rates[name] += [rate] if number else []  # the first round warms up
    for name, values in rates.items():
        print(f"{name:16} {statistics.median(values):8.1f} img/s   ({min(values):.1f} to {max(values):.1f})")
    ratios = [a / b for a, b in zip(rates["training images"], rates["random images"])]
    print(f"training / random: {statistics.median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")


def fewshot(args):
    import json
    import random
    for shots in (10, 50, 100):
        accuracies = []
        for seed in range(5):
            with tempfile.TemporaryDirectory() as folder:
                few = Path(folder) / "few"
                for name in sorted(path.name for path in (args.data / "train").iterdir()):
                    (few / "train" / name).mkdir(parents=True)
                    known = sorted((args.data / "train" / name).iterdir())
                    for image in random.Random(f"{seed} {name}").sample(known, min(shots, len(known))):
                        (few / "train" / name / image.name).symlink_to(image.resolve())
                (few / "test").symlink_to((args.data / "test").resolve())
                command = [ROOT / "train.py", "--data", few, "--arch", args.arch, "--weights", args.weights, "--precision", args.precision,
                           "--out", f"{folder}/run", "--seed", seed, "--epochs", args.epochs, "--augment", "dihedral", *args.options.split()]
                done = subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, text=True)
                accuracies.append(json.loads(done.stdout.splitlines()[-1])["test_acc"])
        print(f"{shots} images per class: {statistics.mean(accuracies):.4f} ± {statistics.stdev(accuracies):.4f}   "
              f"({', '.join(f'{accuracy:.4f}' for accuracy in accuracies)})", flush=True)


def cache(args):
    import resource
    with tempfile.TemporaryDirectory() as folder:
        args.data = Path(shutil.copytree(args.data, f"{folder}/data"))
        command = train_command(args, folder)
        cold = timed(command)
        print(f"cold {cold:.1f} s, peak memory of a run {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20:.2f} GiB")
        warm = timed(command)
        print(f"warm {warm:.1f} s, {warm / cold:.1%} of cold")
        images = sorted(path for path in args.data.glob("*/*/*") if path.is_file())
        for path in images[::100]:
            with open(path, "ab") as file:
                file.write(b"\n")  # another file, for all that anyone can tell
        grown = timed(command)
        print(f"{len(images[::100])} of {len(images)} images changed: {grown:.1f} s, {(grown - warm) / (cold - warm):.1%} of the pass")
        with open(f"{folder}/run/history.csv", newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        print(f"an epoch of the head: {statistics.median(seconds):.2f} s (median)")


def measure_predict(args):
    import torch
    import torchvision

    import predict
    from common import VIEWS, FrozenModel, find_images, pick_device, read_checkpoint
    device = pick_device(args.device)
    paths = list(find_images(args.data / "test"))
    paths = paths[::max(1, len(paths) // args.images)][:args.images]
    options = SimpleNamespace(explain=False, plot=None, format="csv", top_k=1, min_confidence=0)
    with tempfile.TemporaryDirectory() as folder:
        model = torchvision.models.get_model(args.arch, num_classes=10)
        preprocessing = {"size": 224, "interpolation": "bilinear", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        torch.save({"format": "image classifier", "version": 1, "arch": args.arch, "model_kwargs": {"num_classes": 10},
                    "classes": [f"class {number}" for number in range(10)], "preprocessing": preprocessing,
                    "state_dict": model.state_dict(), "temperature": 1.0, "metrics": {}}, f"{folder}/model.pt")
        checkpoint, model = read_checkpoint(f"{folder}/model.pt")
        frozen = FrozenModel(model, preprocessing, 10, device, args.precision)
        images = torch.randn(frozen.batch_size, 3, 224, 224, device=device, dtype=frozen.dtype)
        images = images.to(memory_format=torch.channels_last)
        batches = max(1, len(paths) // frozen.batch_size)

        def forward(images, times=1):
            with torch.inference_mode():
                for _ in range(times):
                    frozen.backbone(images)

        def records():
            with open(f"{folder}/records.csv", "w") as file, contextlib.redirect_stdout(file):
                batches = predict.classify(frozen, VIEWS["none"], 1.0, None, paths)
                predict.list_classes(batches, checkpoint["classes"], frozen, options)
        command = [ROOT / "predict.py", "--checkpoint", f"{folder}/model.pt", paths[0], "--precision", args.precision,
                   *(["--device", args.device] if args.device else [])]
        forward(images), records(), timed(command)
        for number in range(args.rounds):
            bare = batches * frozen.batch_size / seconds(lambda: forward(images, batches), device)
            rate = len(paths) / seconds(records, device)
            least = timed(["-c", "import torch, torchvision"]) + seconds(lambda: forward(images[:1]), device)
            whole = timed(command)
            print(f"round {number + 1}  bare {bare:7.1f} img/s, records {rate:7.1f} img/s: {rate / bare:.2f}    imports and forward "
                  f"{least:.2f} s, one image {whole:.2f} s: {whole / least:.2f}", flush=True)


def mosaic(args):
    from PIL import Image
    rng, columns, rows, tile = random.Random(0), 16, 12, 64
    classes = {path.name: sorted(path.iterdir()) for path in sorted((args.data / "test").iterdir())}
    centres = [(rng.uniform(0, columns), rng.uniform(0, rows), name) for name in [*classes] * 2]
    truth, scene = {}, Image.new("RGB", (columns * tile, rows * tile))
    for row in range(rows):
        for column in range(columns):
            *_, name = min(centres, key=lambda centre: (centre[0] - column) ** 2 + (centre[1] - row) ** 2)
            truth[row, column] = name
            scene.paste(Image.open(rng.choice(classes[name])), (column * tile, row * tile))
    args.out.mkdir(parents=True, exist_ok=True)
    scene.save(args.out / "scene.png")
    for stride in (tile, tile // 2):
        timed([ROOT / "predict.py", "--checkpoint", args.checkpoint, "--scene", args.out / "scene.png", "--tile", tile,
               "--stride", stride, "--out", args.out / f"stride{stride}"])
        with open(args.out / f"stride{stride}" / "map.csv", newline="") as file:
            hits = [row["class"] == truth[int(row["row"]) * stride // tile, int(row["column"]) * stride // tile]
                    for row in csv.DictReader(file)]
        print(f"--stride {stride}: {sum(hits)} of {len(hits)} cells right, {sum(hits) / len(hits):.3f}")


if __name__ == "__main__":
    arguments = parse_args()
    {"pass": measure_pass, "cache": cache, "compare": compare, "notebook": notebook, "fewshot": fewshot, "finetune": measure_finetune,
     "predict": measure_predict, "mosaic": mosaic}[arguments.what](arguments)
