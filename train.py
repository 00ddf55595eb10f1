"""Train an image classifier by transfer learning: a pre-trained network, frozen, with a new classifier for your classes.

Reads DATA/train/<class>/*, and DATA/val and DATA/test where they are, and writes OUT/model.pt, OUT/last.pt and
OUT/history.csv. The frozen network sees each image once; the classifier is then trained on the remembered features.
With --finetune the network learns too, from there on. The best epoch is chosen on val, test is only ever reported.
The last line on stdout is one JSON object. Several processes: torchrun --nproc-per-node N train.py ...
"""
from __future__ import annotations

import atexit
import contextlib
import copy
import csv
import ctypes
import datetime
import difflib
import functools
import hashlib
import http.client
import io
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import PIL

from common import (CHECKPOINT_FORMAT, EXIT_KEPT_OLD, FORMAT_VERSION, LARGEST_SIZE, RANK, RUN_FORMAT, SPLITS, VIEWS, WORLD,
                    FrozenModel, ImageError, LazyModule, Progress, UserError, add_hardware_options, average_views, build_model,
                    checkpoint_precision, class_folders, command, file_hash, find_head, fraction, is_checkpoint, load_weights,
                    locked, log, make_parser, not_negative, one_line, pick_device, positive_float, positive_int, read_batches,
                    read_checkpoint, read_image, read_split, read_torch_file, reader_threads, replacing, resize, seed_number,
                    send, signals_held, torch, torchvision, turn, update_weights, whole_steps)

v2 = LazyModule("torchvision.transforms.v2")
IMBALANCED = 5  # the largest class has so many times the images of the smallest: worth a warning
VAL_SAMPLE = 1000  # images of val whose views tell the temperature of their average
MEMORY_SHARE = 1 / 3  # of the machine's memory that features may take before they are mapped from disk
HISTORY_FIELDS = ["epoch", "lr", *(f"{split}_{what}" for split in SPLITS for what in ("loss", "acc")), "seconds"]


def parse_args(argv):
    parser = make_parser("train.py", __doc__, "python train.py --data data/eurosat --epochs 5")
    group = parser.add_argument_group("data and output")
    group.add_argument("--data", type=Path, default=Path("data/eurosat"), metavar="DIR",
                       help="the tree that prepare_data.py made, or one like it")
    group.add_argument("--out", type=Path, metavar="DIR",
                       help="folder for the results (default: runs/<name of the data folder>)")
    group.add_argument("--resume", action="store_true", help="continue the unfinished run in OUT; without one, start")
    group.add_argument("--restart", action="store_true", help="discard the unfinished run in OUT and start anew")
    group.add_argument("--only-if-better", action="store_true",
                       help="replace the model.pt in OUT, and the history beside it, only if the new model's accuracy on val "
                            "is at least that of the old one on the same images; otherwise the exit code is 5")
    group = parser.add_argument_group("model")
    group.add_argument("--arch", default="resnet50", help="any torchvision classification model")
    group.add_argument("--list-archs", action="store_true", help="print the names that --arch takes, and end")
    group.add_argument("--weights", metavar="NAME",
                       help="a name such as IMAGENET1K_V2; a file: a torchvision state dict or a model.pt of this program; or "
                            "none: random. Default: IMAGENET1K_V1 where the model has it, else torchvision's DEFAULT. For "
                            "ResNets V1 is the plain softmax cross entropy recipe, whose features transfer better when frozen "
                            "than those trained with label smoothing and mixup (Kornblith et al., NeurIPS 2021)")
    group.add_argument("--image-size", type=positive_int, metavar="PIXELS",
                       help="side that images are resized to (default: as the weights were trained)")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=5, metavar="N",
                       help="passes over the training images; with --finetune last or all, those after the first step")
    group.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="images per step of the optimizer")
    group.add_argument("--optimizer", choices=("adam", "adamw"), default="adam",
                       help="adamw takes the weight decay out of the gradient")
    group.add_argument("--lr", type=positive_float, default=1e-3, metavar="RATE",
                       help="learning rate at its highest; it falls to 0 along a cosine")
    group.add_argument("--warmup", type=not_negative, default=0, metavar="EPOCHS",
                       help="epochs over which the learning rate rises first, at most half of them")
    group.add_argument("--weight-decay", type=not_negative, default=0, metavar="X",
                       help="of weights; biases and the scales of norms are spared")
    group.add_argument("--label-smoothing", type=fraction, default=0, metavar="X",
                       help="share of each label that is spread over all classes")
    group.add_argument("--class-weights", choices=("balanced",),
                       help="balanced: in the loss every class counts the same, however many images it has")
    group.add_argument("--augment", choices=(*VIEWS, "strong"), nargs="+", default="none",
                       help="views of each training image, one drawn at random per epoch: flip adds the mirror image (for "
                            "photographs), dihedral all eight flips and quarter turns (for images from above). strong, which "
                            "needs a network that learns, adds TrivialAugmentWide, random erasing and CutMix or MixUp to flip, "
                            "or to the views named beside it")
    group.add_argument("--patience", type=positive_int, metavar="N",
                       help="stop after N epochs without a better one on val")
    group.add_argument("--max-minutes", type=positive_float, metavar="M",
                       help="shorten the training to end within M minutes of the start, with a finished model; the pass over "
                            "the images and one epoch are always done, and before a fine-tuning the classifier's own training")
    group.add_argument("--seed", type=seed_number, default=0, metavar="N",
                       help="of the new classifier, the order of images and the views drawn")
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--finetune", choices=("head", "last", "all"), default="head",
                       help="what learns: the new classifier alone; with the network's last stage; or with all of the network. "
                            "The classifier learns alone first (Kumar et al., Fine-tuning can distort pretrained features, "
                            "ICLR 2022). BatchNorm keeps its pre-trained statistics, and learns scale and shift")
    group.add_argument("--backbone-lr", type=positive_float, default=1e-4, metavar="RATE",
                       help="--lr for what learns of the network")
    group.add_argument("--clip-norm", type=positive_float, default=1.0, metavar="NORM",
                       help="bound on the norm of the gradient")
    group = parser.add_argument_group("search and spread, at the cost of seconds, since the features are there")
    group.add_argument("--tune", type=positive_int, metavar="N",
                       help="try N settings of learning rate, weight decay, label smoothing and epochs (up to --epochs) side "
                            "by side, and train with the best on val; the table is OUT/tune.csv, the picture OUT/tune.png")
    group.add_argument("--seeds", type=positive_int, default=1, metavar="K",
                       help="train with K seeds from --seed on, and tell mean and standard deviation; the best on val is saved")
    group = parser.add_argument_group("features remembered across runs")
    group.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR",
                       help="features are kept here by the content of image and network; a further run computes what is new")
    group.add_argument("--no-cache", action="store_true", help="neither read nor write remembered features")
    group.add_argument("--cache-limit", type=positive_float, default=20, metavar="GB",
                       help="beyond this size, the features unused for longest are removed")
    add_hardware_options(parser).add_argument(
        "--compile", action="store_true", help="compile the network first: pays after some thousand images on a CPU, and "
        "needs a C++ compiler")
    args = parser.parse_args(argv)
    if args.image_size and args.image_size > LARGEST_SIZE:
        parser.error(f"--image-size {args.image_size} is above {LARGEST_SIZE}")
    if args.resume and args.restart:
        parser.error("--resume and --restart exclude each other")
    augment = [args.augment] if isinstance(args.augment, str) else args.augment
    args.strong, views = "strong" in augment, set(augment) - {"strong"} or {"flip"}
    if len(views) > 1:
        parser.error(f"--augment {' '.join(augment)}: choose one of {', '.join(VIEWS)}, and strong with it or not")
    args.augment = views.pop()
    if args.finetune == "head" and args.strong:
        parser.error("--augment strong needs a network that learns: --finetune last or all. The features of a frozen one are "
                     "computed once for each of a few views")
    if args.finetune == "head" and any(getattr(args, key) != parser.get_default(key) for key in ("backbone_lr", "clip_norm")):
        parser.error("--backbone-lr and --clip-norm need a network that learns: --finetune last or all")
    if args.finetune != "head" and (args.tune or args.seeds > 1):
        parser.error("--tune and --seeds are for a frozen network, --finetune head")
    args.out = args.out or Path("runs") / args.data.resolve().name
    return args


def default_cache() -> Path:
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        base = Path(tempfile.gettempdir())
    return base / "transfer-learning" / "features"


@command
def main(argv=None):
    args, start = parse_args(argv), time.monotonic()
    if args.list_archs:
        print("\n".join(architectures()))
        return
    if RANK == 0 and (args.out / ".lock").exists():  # whoever is in the way is told so before torch is loaded
        with locked(args.out / ".lock"):
            pass
    device = join_processes(pick_device(args.device))
    with contextlib.ExitStack() as lock, told_way_on(args):
        job = share(lambda: prepare(args, lock))
        frozen = FrozenModel(job.model, job.preprocessing, len(job.classes), device, args.precision, args.compile)
        key = feature_key(job.model, job.model_kwargs, frozen, args.arch)
        settings = run_settings(args, job, key)
        if job.unfinished:
            check_resumable(args, job.unfinished, settings)
        if args.restart and RANK == 0:  # not earlier, where a wrong argument would have cost it
            (args.out / "last.pt").unlink(missing_ok=True)
        rival_acc = job.rival and measure_rival(job, device, args)
        sample = sample_val(job, args)
        deadline = start + 60 * (args.max_minutes or math.inf)
        if args.finetune == "head":
            data = extract_features(frozen, SimpleNamespace(splits=job.splits | sample.splits, files=job.files | sample.files),
                                    key, args)
            if RANK:
                return  # one process is enough for a head
            seen = data.pop("sample", None)
            head = standardised_head(frozen, data["train"][0])
            config, runs = train_heads(head, data, args, settings, deadline, job.unfinished)
        else:
            data = extract_features(frozen, job, key, args)
            head, start_from = share(lambda: train_first_head(frozen, data, args))
            del data
            config, runs = finetune(frozen, head, start_from, job, args, settings, deadline)
            seen = extract_features(frozen, sample, key, SimpleNamespace(**{**vars(args), "no_cache": True})).get("sample")
            if RANK:
                return
        run = max(runs, key=lambda run: score(run["best"]))
        head.load_state_dict(run["best"]["weights"])
        fold_standardisation(head, frozen.model.get_submodule(frozen.cut[0]))
        run["best"]["temperature_tta"] = calibrate_views(frozen, *seen) if seen else run["best"]["temperature"]
        row = run["best"]["row"]
        better = rival_acc is None or row["val_acc"] >= rival_acc
        if better:
            save_model(args, frozen, job, run["best"], config | {"seed": run.get("seed", args.seed)})
            write_history(args.out / "history.csv", run["history"])
            for stale in ("tune.csv", "tune.png") if not args.tune else ():  # of an earlier run
                (args.out / stale).unlink(missing_ok=True)
        save_last(args, settings, finished=True)
    print(json.dumps({"model": str(args.out / "model.pt"), "history": str(args.out / "history.csv"), "arch": args.arch,
                      "epochs": len(run["history"]), "best_epoch": row["epoch"],
                      **{f"{split}_acc": row[f"{split}_acc"] for split in SPLITS}, **spread(runs, run),
                      **({"tuned": config} if args.tune else {}),
                      **({"kept_old": not better, "old_val_acc": rival_acc} if args.only_if_better else {}),
                      "seconds": round(time.monotonic() - start, 1)}))
    if not better:
        log(f"kept the old {args.out / 'model.pt'}: accuracy on val {rival_acc:.4f}, of the new model {row['val_acc']:.4f}")
        return EXIT_KEPT_OLD


@contextlib.contextmanager
def told_way_on(args):
    """Where the block is interrupted, tell how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        log(f"stopped; the same command with --resume{' in place of --restart' * args.restart} goes on after the last finished "
            "epoch, and knows the features so far")
        raise


# ---------------------------------------------------------------- several processes

def join_processes(device: torch.device) -> torch.device:
    """Find the other processes that torchrun started, if it did."""
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                             timeout=datetime.timedelta(days=7))  # the others wait while the first one works
        atexit.register(torch.distributed.destroy_process_group)
    return device


def share(make):
    """What make() returns in the first process, in all of them. Where it fails, the others end without a word."""
    if WORLD == 1:
        return make()
    box, error = [None, None], None
    if RANK == 0:
        try:
            box[0] = make()
        except Exception as raised:
            box[1], error = getattr(raised, "exit_code", 1), raised
    torch.distributed.broadcast_object_list(box)
    if error:
        raise error
    if box[1]:
        sys.exit(box[1])
    return box[0]


def gather(items: list) -> list:
    """The items of all processes, in all of them."""
    parts = [None] * WORLD
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


# ---------------------------------------------------------------- what to train on, where to write

def prepare(args, lock: contextlib.ExitStack) -> SimpleNamespace:
    """Read the tree and the pre-trained model, and take hold of OUT: all that does not depend on the processor."""
    classes, splits = read_tree(args)
    args.out.mkdir(parents=True, exist_ok=True)
    lock.enter_context(locked(args.out / ".lock"))
    for leftover in args.out.glob(".*.tmp"):  # of a killed run
        leftover.unlink()
    unfinished, rival = read_unfinished(args), read_rival(args, classes)
    model, preprocessing, model_kwargs = load_pretrained(args, len(classes))
    files = {split: hash_files(paths, args.workers) for split, (paths, _) in splits.items()}
    return SimpleNamespace(classes=classes, splits=splits, files=files, unfinished=unfinished, rival=rival, model=model,
                           preprocessing=preprocessing, model_kwargs=model_kwargs)


def read_tree(args):
    """(classes, {split: (paths, targets)}) of an ImageFolder tree; the classes are those of train/."""
    data = args.data
    if not data.is_dir():
        raise UserError(f"no such folder: {data}; make one with prepare_data.py")
    if not (data / "train").is_dir():
        raise UserError(f"{data} has no train/ folder; make a tree with: prepare_data.py --source {data} --out <new folder>")
    classes, splits = None, {}
    for split in (name for name in SPLITS if (data / name).is_dir()):
        paths, classes, targets = read_split(data / split, classes)
        if len(classes) < 2:
            raise UserError(f"{data / split} has one class, {classes[0]}; a classifier needs two or more")
        splits[split] = paths, torch.tensor(targets)
        if absent := [name for index, name in enumerate(classes) if index not in set(targets)]:
            log(f"warning: {data / split} has no images of {', '.join(absent)}")
    if "val" not in splits:
        if wanted := [f"--{name}" for name in ("tune", "patience", "only-if-better") if getattr(args, name.replace("-", "_"))]:
            raise UserError(f"{' and '.join(wanted)}: {data} has no val/ to choose on; prepare_data.py makes one")
        log(f"{data} has no val/: nothing is selected; the last epoch is the model, the temperature is 1")
    counts = {name: int(count) for name, count in zip(classes, splits["train"][1].bincount(minlength=len(classes)))}
    if args.class_weights is None and max(counts.values()) >= IMBALANCED * min(counts.values()):
        told = [f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])]
        told = told if len(told) <= 20 else [*told[:5], "...", *told[-5:]]
        log(f"warning: {data / 'train'} is imbalanced, and rare classes will be found less often: {', '.join(told)}; "
            "--class-weights balanced lets all classes count the same")
    if ignored := [name for name in class_folders(data) if name not in SPLITS]:
        log(f"warning: ignored in {data}: {', '.join(ignored)}")
    log(f"{data}: {len(classes)} classes, " + ", ".join(f"{len(targets)} {split}" for split, (_, targets) in splits.items()))
    return classes, splits


def read_unfinished(args) -> dict | None:
    """The state of the unfinished run in OUT if --resume asks for it; None where there is none, or --restart discards it."""
    last = args.out / "last.pt"
    if args.restart or not last.exists():
        state = {"finished": True}
    else:
        try:
            state = read_torch_file(last)
        except UserError as error:
            raise UserError(f"{error}; discard it with --restart") from None
        kinds = {"settings": dict, "config": dict, "runs": list, "history": list, "best": dict, "optimizer": dict,
                 "weights": dict}
        if (state.get("format") != RUN_FORMAT or state.get("version") != FORMAT_VERSION or state.get("finished") is not True
                and not all(isinstance(state.get(key), kind) for key, kind in kinds.items())):
            raise UserError(f"{last} is not the state of a run of this train.py; discard it with --restart")
    if state.get("finished"):
        if args.resume:
            log(f"nothing to resume in {args.out}: starting")
        return None
    if not args.resume:
        raise UserError(f"{args.out} holds an unfinished run ({len(state['history'])} epochs done): "
                        "go on with --resume, or discard it with --restart")
    return state


def check_resumable(args, state: dict, settings: dict):
    """Raise UserError naming what differs between the run to resume and this one."""
    before = state["settings"]
    if different := [f"{key} was {before.get(key)}, is {value}" for key, value in settings.items() if value != before.get(key)]:
        raise UserError(f"cannot resume {args.out}, for something differs: {'; '.join(different)}; discard it with --restart")


def read_rival(args, classes: list[str]) -> tuple[dict, torch.nn.Module] | None:
    """The checkpoint in OUT that --only-if-better compares with, if there is one; UserError where it has other classes."""
    path = args.out / "model.pt"
    if not args.only_if_better or not path.exists():
        if args.only_if_better:
            log(f"--only-if-better: no {path} yet")
        return None
    checkpoint, model = read_checkpoint(path)
    if different := sorted(set(classes) ^ set(checkpoint["classes"])):
        raise UserError(f"--only-if-better: {path} cannot be compared, for not both it and {args.data} have the class "
                        f"{', '.join(different[:5])}; choose another --out")
    return checkpoint, model


def measure_rival(job: SimpleNamespace, device: torch.device, args) -> float | None:
    """The accuracy on val, 0..1, of the checkpoint in OUT; only the first process has it."""
    log(f"--only-if-better: measuring {args.out / 'model.pt'} on val")
    checkpoint, model = job.rival
    classes = checkpoint["classes"]
    precision = checkpoint_precision(checkpoint, args.precision)
    frozen = FrozenModel(model, checkpoint["preprocessing"], len(classes), device, precision)
    key = feature_key(model, checkpoint["model_kwargs"], frozen, checkpoint["arch"])
    only_val = SimpleNamespace(splits={"val": job.splits["val"]}, files={"val": job.files["val"]})
    data = extract_features(frozen, only_val, key, args)
    if RANK:
        return None
    features, targets = data["val"]
    wanted = torch.tensor([classes.index(name) for name in job.classes], device=targets.device)[targets]
    return (logits_in_chunks(frozen, features[0]).argmax(1).to(wanted.device) == wanted).sum().item() / len(targets)


def run_settings(args, job: SimpleNamespace, key: dict) -> dict:
    """All that shapes the result, as plain values: arguments, classes, digests of the images and of what features depend on."""
    without = ("resume", "restart", "only_if_better", "list_archs", "out", "workers", "cache", "no_cache", "cache_limit",
               "compile", "max_minutes")
    values = {name: value for name, value in plain_arguments(args).items() if name not in without}
    images = [(split, target, sha256) for split, (_, targets) in job.splits.items()
              for target, (sha256, _) in zip(targets.tolist(), job.files[split])]
    if args.finetune != "head":
        values["processes"] = WORLD
    return values | {"classes": job.classes, "images": digest_of(images), "network and libraries": digest_of(key)}


def plain_arguments(args) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def digest_of(value) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


# ---------------------------------------------------------------- the pre-trained model

def architectures() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def load_pretrained(args, classes: int):
    """Build torchvision's --arch with pre-trained weights and a new classifier for `classes` classes.

    Returns the model, its preprocessing and the arguments that torchvision needs to build the same model again. An
    auxiliary classifier (googlenet, inception_v3) serves only training from scratch and is removed.
    """
    if args.arch not in architectures():
        near = difflib.get_close_matches(args.arch, architectures(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --list-archs"
        raise UserError(f"unknown --arch {args.arch}; {hint}")
    entries = torchvision.models.get_model_weights(args.arch)
    names = dict(entries.__members__)
    name = args.weights or ("IMAGENET1K_V1" if "IMAGENET1K_V1" in names else "DEFAULT")
    name = name.removeprefix(f"{entries.__name__}.")
    default = names.get(name) or names.get("IMAGENET1K_V1") or entries.DEFAULT
    preprocessing, outputs = preset(default), 1000
    size = args.image_size or preprocessing["size"]
    if name in names:
        model = download_pretrained(args.arch, default)
    elif name == "none":
        torch.manual_seed(args.seed)
        model = fresh_model(args.arch, size)
        log(f"warning: --weights none: {args.arch} is random; the features of a frozen random network tell little")
    elif Path(name).exists():
        model, outputs, preprocessing = read_pretrained(args.arch, Path(name), size, preprocessing)
    else:
        raise UserError(f"--weights {name}: neither a file nor one of {', '.join(names)}, none")
    remove_auxiliary(model)
    replace_head(model, outputs, classes, args.seed)
    kwargs = {key: getattr(model, key) for key in ("aux_logits", "transform_input", "image_size") if hasattr(model, key)}
    return model, preprocessing | ({"size": size} if args.image_size else {}), {"num_classes": classes, **kwargs}


def fresh_model(arch: str, size: int) -> torch.nn.Module:
    """torchvision's model with random weights and 1000 outputs; a ViT, which knows its image size, is made for this one."""
    model = build_model(arch, {})
    if getattr(model, "image_size", size) != size:
        try:
            model = build_model(arch, {"image_size": size})
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--image-size {size}: {arch} cannot take it: {one_line(error)}") from None
    return model


def preset(weights) -> dict:
    """The preprocessing that a torchvision weights entry was trained with."""
    transform = weights.transforms()
    return {"size": transform.crop_size[0], "interpolation": transform.interpolation.value,
            "mean": list(transform.mean), "std": list(transform.std)}


def download_pretrained(arch: str, weights) -> torch.nn.Module:
    """torchvision's model with weights from its download cache or the network."""
    try:
        return torchvision.models.get_model(arch, weights=weights, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # an interrupted download has an "invalid hash value"
        raise UserError(f"cannot download {weights} from {weights.url}: {one_line(error)}; download it elsewhere and give the "
                        "file with --weights FILE, or train from random weights with --weights none") from None


def read_pretrained(arch: str, path: Path, size: int, preprocessing: dict) -> tuple[torch.nn.Module, int, dict]:
    """Read weights from a file: (model, number of its classes, preprocessing). The file's classifier may have any class count.

    A checkpoint of this program brings its own preprocessing; a plain state dict is taken to be trained with that given.
    """
    content = read_torch_file(path)
    if is_checkpoint(content):
        content, model = read_checkpoint(path)
        if content["arch"] != arch:
            raise UserError(f"{path} is a {content['arch']}; pass --arch {content['arch']}")
        return model, len(content["classes"]), content["preprocessing"]
    model, outputs = fresh_model(arch, size), 1000
    if hasattr(model, "transform_input"):  # googlenet, inception_v3: ImageNet weights expect it, a state dict cannot say so
        model.transform_input = True
    if not any(key.startswith(("aux1.", "AuxLogits.")) for key in content):
        remove_auxiliary(model)
    weight = content.get(f"{find_head(model, outputs)}.weight")
    if torch.is_tensor(weight) and weight.dim() and len(weight) != outputs:
        replace_head(model, outputs, len(weight))
        outputs = len(weight)
    load_weights(model, content, f"{arch} (choose another with --arch)", path)
    return model, outputs, preprocessing


def remove_auxiliary(model: torch.nn.Module):
    """Remove the auxiliary classifiers of googlenet and inception_v3, as torchvision does with aux_logits=False."""
    if getattr(model, "aux_logits", False):
        model.aux_logits = False
        for name in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, name):
                setattr(model, name, None)


def replace_head(model: torch.nn.Module, outputs: int, classes: int, seed: int = 0):
    """Replace the classifier, which has `outputs` outputs, by a new one of the same kind for `classes` classes."""
    name = find_head(model, outputs)
    old = model.get_submodule(name)
    if isinstance(old, torch.nn.Linear):
        new = torch.nn.Linear(old.in_features, classes, bias=old.bias is not None)
    else:
        new = torch.nn.Conv2d(old.in_channels, classes, kernel_size=1, bias=old.bias is not None)
    initialise(new, seed)
    model.set_submodule(name, new)


def initialise(layer: torch.nn.Module, seed: int):
    """Small random weights that depend on their shape and the seed alone, on any device."""
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.01)
        if layer.bias is not None:
            layer.bias.zero_()


# ---------------------------------------------------------------- features, once per image and view

def extract_features(frozen: FrozenModel, job: SimpleNamespace, key: dict, args) -> dict:
    """The frozen backbone's features of every image: {split: (features [views, N, D], targets [N])}, on its device if they fit.

    The train split of a frozen run, and the `sample` of val, have a row for each view of --augment, the others one for the
    image as it is. What the cache knows is
    read, the rest goes through the backbone, once. Several processes share the work, and the first has the result.
    Raises ImageError at the first image that cannot be read.
    """
    augmented = {"sample", "train"} if args.finetune == "head" else {"sample"}
    views = {split: VIEWS[args.augment if split in augmented else "none"] for split in job.splits}
    shapes = {split: (len(views[split]), len(targets), frozen.width) for split, (_, targets) in job.splits.items()}
    mapped = sum(map(math.prod, shapes.values())) * frozen.dtype.itemsize > usable_memory()
    remember = not args.no_cache and RANK == 0
    stores = {view: FeatureStore(args.cache if remember else None, {**key, "view": view})
              for view in chain(*views.values())}
    data, todo = {}, []
    for split, (_, targets) in job.splits.items() if RANK == 0 else ():
        data[split] = allocate(shapes[split], frozen.dtype, args.out if mapped else None), targets
        missing = {}  # row -> the (number, view) pairs that have to be computed
        for number, view in enumerate(views[split]):
            for row in stores[view].fill([sha256 for sha256, _ in job.files[split]], data[split][0][number]):
                missing.setdefault(row, []).append((number, view))
        todo += [(split, row, missing[row]) for row in sorted(missing)]
    count = sum(len(numbered) for *_, numbered in todo)
    if known := sum(len(features) * len(targets) for features, targets in data.values()) - count:
        log(f"features: {known} remembered in {args.cache}, {count} to compute")
    todo = share(lambda: todo)
    block = len(todo) if WORLD == 1 else 4096  # after which the first process gets and remembers what the others have
    try:
        with Progress("features", count) as progress:
            for first in range(0, len(todo), max(1, block)):
                results = compute_features(frozen, job, todo[first:first + block][RANK::WORLD], args)
                for view, places, features in results if WORLD == 1 else gather(list(results)):
                    progress.update(len(places))
                    if RANK == 0:
                        for (split, number, row, _), feature in zip(places, features):
                            data[split][0][number, row] = feature
                        stores[view].add([sha256 for *_, sha256 in places], features)
    finally:  # a pass that is stopped goes on from here
        for store in stores.values():
            store.flush()
    if remember and count:
        prune_cache(args.cache, args.cache_limit * 1e9)
    return {split: place(features, targets, frozen.device) for split, (features, targets) in data.items()}


def compute_features(frozen: FrozenModel, job: SimpleNamespace, todo: list, args):
    """Run (split, row, [(number, view), ...]) through the backbone: yields (view, [(split, number, row, sha256)], features)."""
    waiting, paths = iter(todo), (job.splits[split][0][row] for split, row, _ in todo)
    for batch in whole_steps(read_batches(paths, frozen.preprocessing, frozen.batch_size, args.workers)):
        chosen = {}  # view -> the (pixels, place) pairs of this batch
        for (path, pixels), (split, row, numbered) in zip(batch, waiting):
            if isinstance(pixels, ImageError):
                raise pixels
            sha256, stamp = job.files[split][row]
            check_unchanged(path, stamp)
            for number, view in numbered:
                chosen.setdefault(view, []).append((pixels, (split, number, row, sha256)))
        for view, pairs in chosen.items():
            features = frozen.features(turn(torch.stack([pixels for pixels, _ in pairs]), *view))
            yield view, [place for _, place in pairs], features.to("cpu", frozen.dtype)


def feature_key(model: torch.nn.Module, model_kwargs: dict, frozen: FrozenModel, arch: str) -> dict:
    """All that features depend on, but for the image and its view."""
    return {"version": 1, "arch": arch, "weights": hash_weights(model, find_head(model, model_kwargs["num_classes"])),
            "model": {key: value for key, value in model_kwargs.items() if key != "num_classes"},
            "preprocessing": frozen.preprocessing, "precision": str(frozen.dtype), "device": frozen.device.type,
            "machine": platform.machine(), "libraries": library_versions()}


def hash_files(paths: list[str], workers: int | None) -> list[tuple[str, tuple]]:
    """The SHA-256 of each file, and a stamp that shows if it changes later. Raises ImageError for one that cannot be read."""
    def look(path):
        try:
            stamp = file_stamp(path)
            return file_hash(path), stamp
        except OSError as error:
            raise ImageError(path, error.strerror) from None
    with ThreadPoolExecutor(reader_threads(workers)) as executor:
        return list(executor.map(look, paths))


def file_stamp(path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ImageError(path, error.strerror) from None
    return status.st_size, status.st_mtime_ns


def check_unchanged(path, stamp: tuple[int, int]):
    if file_stamp(path) != stamp:
        raise ImageError(path, "it has changed since the run began; start again")


def hash_weights(model: torch.nn.Module, without: str) -> str:
    """The SHA-256 of a model's weights and buffers, those of the module `without` left out."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith(without + "."):
            tensor = tensor.contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()


def usable_memory() -> float:
    """The bytes that features may take: a share of the machine's memory, or of the container's if that has less."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        total = 8 << 30
    with contextlib.suppress(OSError, ValueError):  # no such limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total * MEMORY_SHARE


def allocate(shape: tuple, dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """A tensor for features, in memory, or, with a folder, mapped from a file there that needs no name."""
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape)
    handle, file = tempfile.mkstemp(prefix=".features.", suffix=".tmp", dir=folder)
    log(f"features of {size * dtype.itemsize / 1e9:.1f} GB are mapped from disk, in {folder}")
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash later
            os.posix_fallocate(handle, 0, max(1, size * dtype.itemsize))
        return torch.from_file(file, shared=True, size=size, dtype=dtype).view(shape)
    except OSError as error:
        raise OSError(error.errno, f"no room to map {size * dtype.itemsize / 1e9:.1f} GB of features: {error.strerror}",
                      str(folder)) from None
    finally:
        os.close(handle)
        try:
            os.unlink(file)  # the mapping stays until the tensor is gone
        except OSError:  # Windows
            atexit.register(lambda: Path(file).unlink(missing_ok=True))


def place(features: torch.Tensor, targets: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and targets on the device, or in the machine's memory where a GPU has no room for them beside the training."""
    if device.type == "cuda" and features.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return features, targets
    return features.to(device), targets.to(device)


class FeatureStore:
    """Features on disk, by content: a folder for all that they depend on but the image, in it rows by the image's SHA-256.

    A file of rows is named by the SHA-256 of its own bytes and never changes, so a damaged one shows, and runs side by
    side cannot harm each other. What cannot be read is computed again, what cannot be written costs a warning.
    """

    def __init__(self, cache: Path | None, key: dict):
        self.folder = cache and cache / digest_of(key)
        self.known = [self.read(file) for file in sorted(self.folder.glob("*.pt"))] if self.folder else []
        self.hashes, self.rows, self.flushed = [], [], time.monotonic()

    def fill(self, hashes: list[str], out: torch.Tensor) -> list[int]:
        """Write the rows that are known into out [N, D]; returns the numbers of the rows that are not."""
        wanted = {}
        for row, sha256 in enumerate(hashes):
            wanted.setdefault(sha256, []).append(row)
        for content in self.known:
            if content and content["features"].shape[1:] == out.shape[1:]:
                found = [(at, row) for at, sha256 in enumerate(content["hashes"]) for row in wanted.pop(sha256, ())]
                if found:
                    at, rows = torch.tensor(found).unbind(1)
                    out[rows] = content["features"][at]
        return sorted(row for rows in wanted.values() for row in rows)

    def read(self, file: Path) -> dict | None:
        """A file's rows, mapped from disk; None, with a warning, if it is not as it was written."""
        try:
            if file_hash(file) == file.stem:
                with contextlib.suppress(OSError):  # a cache that can only be read is of use too
                    os.utime(file)  # prune_cache removes what was unused for longest
                content = torch.load(file, mmap=True, weights_only=True)
                if len(content["features"]) == len(content["hashes"]):
                    return content
            elif len(file.stem) == 64:
                file.unlink()
            log(f"warning: ignored {file}: damaged, or not written by this program")
        except FileNotFoundError:  # removed by another run
            pass
        except Exception as error:
            log(f"warning: ignored {file}: {one_line(error)}")
        return None

    def add(self, hashes: list[str], rows: torch.Tensor):
        """Remember rows [N, D]; they reach the disk every 64 MB, every five minutes, and with `flush`."""
        if self.folder:
            self.hashes += hashes
            self.rows.append(rows)
            if len(self.hashes) * rows[0].nbytes > 64e6 or time.monotonic() - self.flushed > 300:
                self.flush()

    def flush(self):
        """Write what waits as one file. A disk that is full or read-only costs a warning, and the rest is not written."""
        if self.hashes and self.folder:
            buffer = io.BytesIO()
            torch.save({"hashes": self.hashes, "features": torch.cat(self.rows)}, buffer)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with replacing(self.folder / f"{hashlib.sha256(buffer.getbuffer()).hexdigest()}.pt", "wb") as file:
                    file.write(buffer.getbuffer())
            except OSError as error:
                log(f"warning: features are not remembered: {self.folder}: {error.strerror}")
                self.folder = None
        self.hashes, self.rows, self.flushed = [], [], time.monotonic()


def prune_cache(cache: Path, limit: float):
    """Remove the files that were unused for longest until the cache holds at most `limit` bytes; tell its size."""
    with contextlib.suppress(OSError):  # another run may prune at the same time
        folders = [folder for folder in cache.glob("[0-9a-f]" * 32) if folder.is_dir()]  # what else is there is not ours
        for leftover in (file for folder in folders for file in folder.glob(f".{'[0-9a-f]' * 64}.pt.*.tmp")):
            if time.time() - leftover.stat().st_mtime > 86400:
                leftover.unlink()
        files = sorted((file.stat().st_mtime, file.stat().st_size, file)
                       for folder in folders for file in folder.glob("[0-9a-f]" * 64 + ".pt"))
        total = sum(size for _, size, _ in files)
        for _, size, file in files:
            if total > limit:
                file.unlink()
                total -= size
        log(f"the cache {cache} holds {total / 1e9:.2f} GB of at most {limit / 1e9:g}")


# ---------------------------------------------------------------- the head

def standardised_head(frozen: FrozenModel, features: torch.Tensor) -> torch.nn.Sequential:
    """The trainable head behind a fixed layer that standardises train's features [views, N, D] by their mean and deviation.

    Raw features differ in scale by orders of magnitude, and one learning rate cannot suit them all. Without a bias to
    take the mean in (maxvit_t), only the scale is standardised. `fold_standardisation` undoes the layer after training.
    """
    layers = copy.deepcopy(frozen.head)  # the model's own classifier gets the folded weights, at the end
    if not isinstance(layers[0], torch.nn.Unflatten):
        layers.insert(0, torch.nn.Identity())
    unflatten, linear, *behind = layers
    channels = linear.weight.shape[1]
    mean, square = torch.zeros(2, channels, dtype=torch.float64)
    for rows in features.flatten(0, 1).split(chunk_rows(features)):
        rows = rows.cpu().double().view(len(rows), channels, -1)
        mean += rows.sum((0, 2))
        square += rows.square().sum((0, 2))
    mean /= features.numel() / channels
    var = square / (features.numel() / channels) - mean.square()
    if not var.isfinite().all():
        raise UserError("the network's features are not finite: its weights are damaged, or want another --precision")
    layer = torch.nn.BatchNorm1d if isinstance(linear, torch.nn.Linear) else torch.nn.BatchNorm2d
    standardise = layer(channels, affine=False, eps=0).eval()
    floor = 1e-4 * var.mean() + 1e-8 * mean.square().mean() + 1e-30  # what hardly ever fires is not blown up
    standardise.running_var = var.clamp(min=floor).float()
    if linear.bias is not None:
        standardise.running_mean = mean.float()
    return torch.nn.Sequential(unflatten, standardise, linear, *behind).to(frozen.device).requires_grad_(True)


def chunk_rows(features: torch.Tensor) -> int:
    """How many rows of features [..., D] to take at a time: 64 MB of float32, at most 4096."""
    return max(1, min(4096, (16 << 20) // features.shape[-1]))


def fold_standardisation(head: torch.nn.Sequential, target: torch.nn.Module):
    """Multiply the head's standardisation into the plain classifier `target`, which then is the same function."""
    mean, var, weight, bias = (tensor if tensor is None else tensor.detach().cpu().double() for tensor in
                               (head[1].running_mean, head[1].running_var, head[2].weight, head[2].bias))
    weight = weight / var.sqrt().view(1, -1, *[1] * (weight.dim() - 2))
    with torch.no_grad():
        target.weight.copy_(weight.float())
        if bias is not None:
            target.bias.copy_((bias - weight.flatten(1) @ mean).float())


class Heads:
    """Heads that learn side by side from the same batches of features, as one wide layer: 64 cost little more than one."""
    spread_out, clip_norm = False, None  # a head learns in one process

    def __init__(self, head: torch.nn.Sequential, data: dict, args, seed: int, count: int = 1):
        self.heads = [copy.deepcopy(head) for _ in range(count)]
        self.data, self.batch_size, self.seed = data, args.batch_size, seed
        self.device = next(head.parameters()).device
        self.steps = math.ceil(len(data["train"][1]) / args.batch_size)

    def groups(self, configs: list[dict]) -> list[dict]:
        return [group for head, config in zip(self.heads, configs)
                for group in parameter_groups(head, config["lr"], config)]

    def batches(self, epoch: int):
        """Yield (features [B, D], class indices [B], 1) in an order, and of views, that seed and epoch alone decide."""
        features, targets = self.data["train"]
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
        order = torch.randperm(len(targets), generator=generator).to(targets.device)
        views = torch.randint(len(features), targets.shape, generator=generator).to(targets.device)
        for rows in order.split(self.batch_size):
            yield features[views[rows], rows].to(self.device, torch.float32), targets[rows].to(self.device), 1.0

    def logits(self, features: torch.Tensor, active: list[int]) -> torch.Tensor:
        """Features [B, D] -> logits [B, A, classes] of the active heads."""
        unflatten, standardise, linear, *behind = self.heads[active[0]]
        layers, outputs = [self.heads[index][2] for index in active], linear.weight.shape[0]
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if linear.bias is None else torch.cat([layer.bias for layer in layers])
        apply = torch.nn.functional.linear if isinstance(linear, torch.nn.Linear) else torch.nn.functional.conv2d
        wide = apply(standardise(unflatten(features)), weight, bias).unflatten(1, (len(active), outputs))
        return torch.nn.Sequential(*behind)(wide.flatten(0, 1)).view(len(features), len(active), outputs)

    def split_logits(self, split: str, active: list[int]):
        """Yield (logits [B, A, classes], class indices [B]) for the images of a split as they are, without gradients."""
        features, targets = self.data[split]
        size = max(1, chunk_rows(features) // len(active))
        with torch.no_grad():
            for rows, wanted in zip(features[0].split(size), targets.split(size)):
                yield self.logits(rows.to(self.device, torch.float32), active), wanted.to(self.device)

    def weights(self, index: int) -> dict:
        return {key: value.clone() for key, value in self.heads[index].state_dict().items()}

    def load(self, weights: dict):
        self.heads[0].load_state_dict(weights)


def parameter_groups(module: torch.nn.Module, lr: float, config: dict) -> list[dict]:
    """Groups for the optimizer; weight decay spares biases, also those in tables, and scales, those of norms and others."""
    groups = ([], config["weight_decay"]), ([], 0.0)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = name.rpartition(".")[2]
            groups[parameter.dim() <= 1 or "bias" in own or "scale" in own][0].append(parameter)
    return [{"params": members, "lr": lr, "peak": lr, "epochs": config["epochs"], "weight_decay": decay}
            for members, decay in groups if members]


def fit(learner, configs: list[dict], splits, args, deadline: float = math.inf, state: dict | None = None,
        after_epoch=None) -> list[dict]:
    """Train the learner's models, one per configuration, with cross entropy: {"history": [...], "best": {...}} of each.

    The learning rate rises over --warmup epochs and falls to 0 along a cosine. Where `deadline` (of time.monotonic) leaves
    no time for all epochs, the cosine is shortened to those that fit; the first is always finished. After each epoch
    `splits` are measured and `after_epoch(run, state)`, if given, is called for the first model; its state, given to a
    later call, continues. Raises UserError when the loss of a single model is not finite; one of several is just the worst.
    """
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    optimizer = kind(learner.groups(configs), fused=learner.device.type != "mps")
    runs = [{"history": [], "best": None} for _ in configs]
    if state:
        optimizer.load_state_dict(state["optimizer"])
        learner.load(state["weights"])
        runs = [{"history": state["history"], "best": state["best"]}]
        log(f"resumed after epoch {len(state['history'])}")
    weights = class_weights(learner, args)
    smoothing = torch.tensor([config["label_smoothing"] for config in configs], device=learner.device)
    for done in range(len(runs[0]["history"]), max(config["epochs"] for config in configs)):
        start, epoch = time.monotonic(), done + 1
        longest = max((run["history"][-1]["seconds"] for run in runs if run["history"]), default=0)
        fitting = done + int(max(0, deadline - start) / (1.05 * longest)) if longest and deadline < math.inf else math.inf
        if learner.spread_out:
            fitting = share(lambda: fitting)  # all processes have to agree
        plans = [min(config["epochs"], fitting) for config in configs]
        active = [index for index, run in enumerate(runs) if done < plans[index] and not out_of_patience(run, args)]
        if not active:
            log(f"ended after epoch {done}: " + ("no time for more" if done >= fitting else
                                              f"{args.patience} epochs without a lower val loss at its best temperature"))
            break
        losses, rates, own_smoothing = [], [], smoothing[active]
        for step, (inputs, targets, share_of_step) in enumerate(whole_steps(learner.batches(epoch))):
            for group in optimizer.param_groups:
                planned = min(group["epochs"], fitting)
                group["lr"] = group["peak"] * schedule(done + step / learner.steps, planned, args.warmup)
            logits = learner.logits(inputs, active)
            loss = cross_entropies(logits, targets, own_smoothing, weights)
            optimizer.zero_grad()
            (share_of_step * loss.sum()).backward()
            if learner.clip_norm:
                torch.nn.utils.clip_grad_norm_(learner.network.parameters(), learner.clip_norm)
            optimizer.step()
            losses.append(loss.detach())
            rates.append({group["lr"] for group in optimizer.param_groups})
            if len(configs) == 1 and (learner.device.type == "cpu" or step % 50 == 49 or step + 1 == learner.steps):
                check_finite(losses, rates, epoch, learner.steps)  # a GPU is not made to wait at every step
        measured = {split: measure(learner, split, active) for split in splits}
        if len(configs) == 1 and not all(math.isfinite(result["loss"]) for results in measured.values() for result in results):
            raise diverged("a loss is not finite", epoch, learner.steps, learner.steps, rates[-1])
        seconds = round(time.monotonic() - start, 3)
        for number, index in enumerate(active):
            results = {split: measured[split][number] for split in splits}
            row = {"epoch": epoch, "lr": configs[index]["lr"] * schedule(done, plans[index], args.warmup)}
            row |= {f"{split}_{what}": results.get(split, {}).get(what) for split in SPLITS for what in ("loss", "acc")}
            row["seconds"] = seconds
            runs[index]["history"].append(row)
            candidate = {"row": row, **{key: results.get("val", {}).get(key, 1.0) for key in ("temperature", "calibrated")}}
            runs[index]["calibrated"] = candidate["calibrated"]
            if runs[index]["best"] is None or score(candidate) > score(runs[index]["best"]):
                runs[index]["best"] = candidate | {"weights": learner.weights(index)}
        if after_epoch:
            with signals_held():
                after_epoch(runs[0], {"optimizer": optimizer.state_dict(), "weights": learner.weights(0), **runs[0]})
    return runs


def schedule(epochs: float, planned: int, warmup: float) -> float:
    """The factor of the learning rate after so many epochs: a linear rise over the warm-up, then half a cosine to 0."""
    warmup = min(warmup, planned / 2)
    if epochs < warmup:
        return max(epochs / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1, (epochs - warmup) / (planned - warmup))))


def score(candidate: dict) -> tuple:
    """What orders epochs, configurations and seeds: the lowest val loss that a temperature can reach, then the plain one.

    Accuracy on a few thousand images is a coarse and noisy guide, and the plain loss punishes what the temperature mends
    (Berta et al., Rethinking early stopping: refine, then calibrate, 2025). Without val, the last epoch is the best.
    """
    row = candidate["row"]
    return (row["epoch"],) if row["val_loss"] is None else (-candidate["calibrated"], -row["val_loss"])


def out_of_patience(run: dict, args) -> bool:
    return bool(args.patience and run["history"] and len(run["history"]) - run["best"]["row"]["epoch"] >= args.patience)


def class_weights(learner, args) -> torch.Tensor | None:
    """Weights [classes], 1 in the mean over the images, with which all classes count the same; None if each image shall."""
    if args.class_weights is None:
        return None
    counts = learner.data["train"][1].bincount().to(learner.device)
    return (counts.sum() / (len(counts) * counts)).float()


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor, smoothing: torch.Tensor, weights: torch.Tensor | None):
    """Cross entropy [A] in nats of logits [B, A, C] and class indices [B], or shares [B, C], with label smoothing [A]."""
    count = logits.shape[2]
    if targets.dim() == 1:
        targets = torch.nn.functional.one_hot(targets, count)
    wanted = targets[:, None] * (1 - smoothing[:, None]) + smoothing[:, None] / count
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1), weights, reduction="none")
    return loss.view(logits.shape[:2]).mean(0)


def check_finite(losses: list, rates: list, epoch: int, steps: int):
    """Raise UserError naming the first step of the epoch whose loss is not finite; else forget the losses."""
    wrong = (~torch.cat(losses).isfinite()).nonzero().flatten().tolist()
    if wrong:
        step = len(rates) - len(losses) + wrong[0]
        raise diverged(f"the loss became {losses[wrong[0]].item()}", epoch, step + 1, steps, rates[step])
    losses.clear()


def diverged(what: str, epoch: int, step: int, steps: int, rates: set) -> UserError:
    told = " and ".join(f"{rate:g}" for rate in sorted(rates))
    return UserError(f"{what} in epoch {epoch} at step {step} of {steps}, with learning rate {told}: lower --lr, or "
                     "--backbone-lr where the network learns (an unfinished run is discarded with --restart)")


def measure(learner, split: str, active: list[int]) -> list[dict]:
    """loss (mean cross entropy in nats) and acc (0..1) of each active model on a split, and what `calibrate` says of val."""
    losses = correct = count = 0
    kept = []
    for logits, targets in learner.split_logits(split, active):
        wanted = targets[:, None].expand(logits.shape[:2])
        losses += torch.nn.functional.cross_entropy(logits.permute(0, 2, 1), wanted, reduction="none").sum(0).cpu().double()
        correct += (logits.argmax(2) == wanted).sum(0).cpu().double()
        count += len(targets)
        if split == "val":
            every = math.ceil(len(learner.data["val"][1]) * logits.shape[2] / 5e6)  # images, of a large set, to calibrate on
            kept.append((logits[::every].cpu(), targets[::every].cpu()))
    if learner.spread_out and WORLD > 1:  # exact to the image: no process has one of another's
        parts, kept = gather([(losses, correct, count)]), gather(kept)
        losses, correct, count = map(sum, zip(*parts))
    results = [{"loss": loss, "acc": acc} for loss, acc in zip((losses / count).tolist(), (correct / count).tolist())]
    if kept:
        logits, targets = (torch.cat(parts) for parts in zip(*kept))
        for result, own in zip(results, logits.unbind(1)):
            result |= calibrate(own, targets)
    return results


def calibrate(logits: torch.Tensor, targets: torch.Tensor) -> dict:
    """The temperature that minimises the cross entropy of logits [N, C] / temperature, and that `calibrated` loss, in nats.

    (Guo et al., ICML 2017.) Without a mistake nothing tells how sure is too sure: the temperature is 1, and the loss that
    some temperature could reach is 0. The loss is convex in 1 / temperature, which Newton's method finds, within 1/20 to 20.
    """
    logits, right = logits.double(), logits.gather(1, targets[:, None]).double()
    if not logits.isfinite().all() or (logits.argmax(1) == targets).all():
        return {"temperature": 1.0, "calibrated": 0.0 if logits.isfinite().all() else math.inf}
    sharpness = 1.0
    for _ in range(50):
        shares = (logits * sharpness).softmax(1)
        mean = (shares * logits).sum(1, keepdim=True)
        slope, curvature = (mean - right).mean().item(), (shares * (logits - mean).square()).sum(1).mean().item()
        before = sharpness
        sharpness = min(max(before - slope / max(curvature, 1e-12), before / 2, 0.05), before * 2, 20)
        if abs(sharpness - before) < 1e-7 * before:
            break
    loss = torch.nn.functional.cross_entropy(logits * sharpness, targets).item()
    return {"temperature": 1 / sharpness, "calibrated": loss}


def sample_val(job: SimpleNamespace, args) -> SimpleNamespace:
    """Some images of val, to be seen in all views of --augment; none where there is no val, or one view."""
    if "val" not in job.splits or len(VIEWS[args.augment]) == 1:
        return SimpleNamespace(splits={}, files={})
    (paths, targets), every = job.splits["val"], math.ceil(len(job.files["val"]) / VAL_SAMPLE)
    return SimpleNamespace(splits={"sample": (paths[::every], targets[::every])}, files={"sample": job.files["val"][::every]})


def calibrate_views(frozen: FrozenModel, features: torch.Tensor, targets: torch.Tensor) -> float:
    """The temperature of probabilities that are averaged over views: features [views, N, D], class indices [N].

    It follows the average (Rahaman and Thiery, Uncertainty quantification and deep ensembles, NeurIPS 2021): that of single
    views would make too unsure what has their disagreement in it already.
    """
    return calibrate(average_views(logits_in_chunks(frozen, view) for view in features), targets.cpu())["temperature"]


def logits_in_chunks(frozen: FrozenModel, features: torch.Tensor) -> torch.Tensor:
    """Remembered features [N, D], of any type and on any device -> logits [N, classes] on the model's device."""
    return torch.cat([frozen.logits(rows.to(frozen.device, torch.float32)) for rows in features.split(chunk_rows(features))])


def plain_config(args) -> dict:
    return {name: getattr(args, name) for name in ("lr", "weight_decay", "label_smoothing", "epochs")}


def tune(head: torch.nn.Sequential, data: dict, args, deadline: float) -> dict:
    """Train --tune configurations side by side and return the best on val; writes OUT/tune.csv and OUT/tune.png.

    The first is that of the arguments, the others are spread evenly (a scrambled Sobol sequence) over learning rates of
    1/10 to 10 times --lr and weight decays of 1e-6 to 1e-2, both logarithmic, label smoothing of 0, 0.05 and 0.1, and
    epochs of a quarter, a half and all of --epochs. All see the same batches.
    """
    configs = [plain_config(args)]
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=args.seed).draw(args.tune - 1) if args.tune > 1 else []
    for rate, decay, smoothing, epochs in (point.tolist() for point in points):
        configs.append({"lr": args.lr * 10 ** (2 * rate - 1), "weight_decay": 10 ** (4 * decay - 6),
                        "label_smoothing": 0.05 * int(3 * smoothing), "epochs": math.ceil(args.epochs / 2 ** int(3 * epochs))})
    start = time.monotonic()
    deadline = start + (deadline - start) * 2 / 3  # the rest is for the training with the winner
    runs = fit(Heads(head, data, args, args.seed, len(configs)), configs, ["val"], args, deadline)
    rows = []
    for config, best in zip(configs, (run["best"] for run in runs)):
        rows.append(config | {"best_epoch": best["row"]["epoch"], "val_loss": best["row"]["val_loss"],
                              "val_loss_calibrated": best["calibrated"], "val_acc": best["row"]["val_acc"]})
    winner = max(range(len(rows)), key=lambda index: score(runs[index]["best"]))
    with replacing(args.out / "tune.csv") as file:
        writer = csv.DictWriter(file, [*rows[0], "winner"])
        writer.writeheader()
        writer.writerows(row | {"winner": int(index == winner)} for index, row in enumerate(rows))
    plot_tuning(args.out / "tune.png", rows, winner)
    log(f"tuned: {len(rows)} configurations in {time.monotonic() - start:.1f} s; best on val: " + describe(rows[winner]))
    log(f"       the one of the arguments: {describe(rows[0])}")
    return configs[winner]


def describe(row: dict) -> str:
    return (f"lr {row['lr']:.3g}, weight decay {row['weight_decay']:.2g}, label smoothing {row['label_smoothing']:g}, "
            f"{row['epochs']} epochs: val loss {row['val_loss_calibrated']:.4f} (calibrated) acc {row['val_acc']:.4f}")


def plot_tuning(path: Path, rows: list[dict], winner: int):
    """Calibrated val loss, by which is chosen, and val accuracy over each of the four settings; a point a configuration."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    settings = {"lr": "learning rate", "weight_decay": "weight decay", "label_smoothing": "label smoothing", "epochs": "epochs"}
    measures = {"val_loss_calibrated": "val loss (nats, calibrated)", "val_acc": "val accuracy"}
    rows, chosen = [row for row in rows if math.isfinite(row["val_loss_calibrated"])], rows[winner]
    for line, (measure, y) in zip(figure.subplots(2, 4, sharex="col", sharey="row"), measures.items()):
        for axes, (setting, x) in zip(line, settings.items()):
            axes.scatter([row[setting] for row in rows], [row[measure] for row in rows], s=18, alpha=0.7, color="tab:blue")
            axes.scatter(chosen[setting], chosen[measure], s=120, facecolors="none", edgecolors="tab:red", linewidths=1.8,
                         label="winner")
            if setting == "lr":
                axes.set(xscale="log", ylabel=y)
            elif setting == "weight_decay":
                axes.set_xscale("symlog", linthresh=1e-6)
            if measure == "val_acc":
                axes.set_xlabel(x)
            axes.grid(alpha=0.25)
    axes.legend()
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def train_heads(head, data: dict, args, settings: dict, deadline: float, state: dict | None) -> tuple[dict, list[dict]]:
    """Choose the configuration, and train a head with each of --seeds seeds: it, and the run of each as `fit` returns it.

    `state` is that of an unfinished run's last.pt, which is rewritten, as is history.csv, after each epoch.
    """
    config = state["config"] if state else tune(head, data, args, deadline) if args.tune else plain_config(args)
    runs = state["runs"] if state else []
    for seed in range(args.seed + len(runs), args.seed + args.seeds):
        if runs and time.monotonic() > deadline:
            log(f"no time is left for seed {seed} and those after it")
            break
        if args.seeds > 1:
            log(f"seed {seed}")
        learner = Heads(head, data, args, seed)
        if seed != args.seed:
            initialise(learner.heads[0][2], seed)
        saver = functools.partial(save_epoch, args, settings, config, runs)
        until = time.monotonic() + (deadline - time.monotonic()) / (args.seeds - len(runs))  # the same time for all
        run, = fit(learner, [config], list(data), args, until, state, saver)
        runs, state = [*runs, run | {"seed": seed}], None
    return config, runs


def told(row: dict) -> str:
    """A row of the history in words: loss and accuracy of the splits that were measured."""
    return "  ".join(f"{split} loss {row[f'{split}_loss']:.4f} acc {row[f'{split}_acc']:.4f}" for split in SPLITS
                     if row[f"{split}_loss"] is not None)


def save_epoch(args, settings: dict, config: dict, runs: list[dict], run: dict, state: dict):
    """Tell of the last epoch of a run, and write OUT/history.csv and OUT/last.pt; `runs` are finished ones."""
    row = run["history"][-1]
    chosen_by = "" if row["val_loss"] is None else f"  calibrated val loss {run['calibrated']:.4f}"
    best = "  best so far" if chosen_by and run["best"]["row"]["epoch"] == row["epoch"] else ""
    log(f"epoch {row['epoch']}/{config['epochs']}  {told(row)}{chosen_by}{best}")
    if not args.only_if_better:  # the history is that of the model.pt beside it
        write_history(args.out / "history.csv", run["history"])
    save_last(args, settings, finished=False, config=config, runs=runs, **state)


def spread(runs: list[dict], saved: dict) -> dict:
    """Mean and standard deviation over the seeds of val and test accuracy, for the result line; told on stderr too."""
    if len(runs) < 2:
        return {}
    result = {"seeds": len(runs), "best_seed": saved["seed"]}
    log(f"the model of seed {saved['seed']} is the best on val" if saved["best"]["row"]["val_acc"] is not None else
        f"without val nothing is chosen: the model is that of seed {saved['seed']}")
    for split in ("val", "test"):
        values = [run["best"]["row"][f"{split}_acc"] for run in runs]
        if None not in values:
            result |= {f"{split}_acc_mean": statistics.mean(values), f"{split}_acc_std": statistics.stdev(values)}
            mean, deviation = result[f"{split}_acc_mean"], result[f"{split}_acc_std"]
            log(f"{split} accuracy over {len(runs)} seeds: {mean:.4f} ± {deviation:.4f}")
    return result


# ---------------------------------------------------------------- fine-tuning

FIRST_EPOCHS = 10  # of the head alone, before the network learns too
STRONG_DRAWS = 16  # per step: one for each image would keep a GPU waiting for the processor
TRAIN_SAMPLE = 5000  # images on which the train columns of the history are measured, so that it costs little


def train_first_head(frozen: FrozenModel, data: dict, args) -> tuple[torch.nn.Sequential, dict]:
    """A head trained on the frozen network's features, where fine-tuning starts; and how well it does, to be compared."""
    learner = Heads(standardised_head(frozen, data["train"][0]), data, args, args.seed)
    config, others = plain_config(args) | {"epochs": FIRST_EPOCHS}, [split for split in data if split != "train"]
    run, = fit(learner, [config], others, SimpleNamespace(**{**vars(args), "patience": None}))
    log(f"the classifier alone, {FIRST_EPOCHS} epochs: {told(run['best']['row'])}")
    learner.load(run["best"].pop("weights"))
    return learner.heads[0].cpu(), run["best"]


def finetune(frozen: FrozenModel, head, first: dict, job: SimpleNamespace, args, settings: dict, deadline: float):
    """Train the network, or its last stage, with the head: the configuration, and the run as `fit` returns it.

    The best weights are left in `frozen` and, for the head, in the run. `first` is what the head did alone.
    """
    config = plain_config(args) | {"backbone_lr": args.backbone_lr}
    learner = FineTuning(frozen, head, job, args)
    save = functools.partial(save_epoch, args, settings, config, []) if RANK == 0 else None
    try:
        run, = fit(learner, [config], list(job.splits), args, deadline, job.unfinished, save)
    except torch.OutOfMemoryError:
        advice = f"try --batch-size {args.batch_size // 2}" if args.batch_size > WORLD else "try a smaller --image-size"
        raise UserError(f"no memory on {frozen.device} for batches of {args.batch_size} images of "
                        f"{frozen.preprocessing['size']} pixels: {advice}") from None
    if "val" in job.splits and score(run["best"]) < score(first):
        log("warning: on val, no epoch of fine-tuning is better than the classifier alone; the best of them is saved all the "
            "same. Try more --epochs, another --backbone-lr, or --finetune head")
    weights = run["best"]["weights"]
    frozen.update(strip("backbone.", weights))
    run["best"] |= {"weights": strip("head.", weights)}
    return config, [run]


def strip(prefix: str, weights: dict) -> dict:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


class FineTuning:
    """The network and its head, which learn from images. It is measured by the fast path of the frozen model."""
    spread_out = True  # over all processes

    def __init__(self, frozen: FrozenModel, head: torch.nn.Sequential, job: SimpleNamespace, args):
        self.frozen, self.device, self.args = frozen, frozen.device, args
        self.clip_norm, self.classes = args.clip_norm, len(job.classes)
        self.data = {split: (None, targets.to(self.device)) for split, (_, targets) in job.splits.items()}
        count = len(self.data["train"][1])
        self.steps = min(math.ceil(count / args.batch_size), max(1, count // WORLD))  # no process is without an image
        least = count // self.steps // WORLD
        self.images = Images(job.splits, job.files, frozen, args.workers)
        if args.compile:
            frozen.backbone  # a compiler that does not work shows here
        frozen.compiled = False  # it changes with every epoch
        backbone = frozen.copy_backbone().eval().to(self.device, memory_format=torch.channels_last)
        backbone.requires_grad_(args.finetune == "all")
        names = [name for name, _ in backbone.named_modules() if name]
        if args.finetune == "last":
            names = find_last_stage(backbone, frozen.preprocessing["size"])
        stage = [backbone.get_submodule(name).requires_grad_(True) for name in names]
        self.learning = [module for module in stage  # BatchNorm keeps its statistics, if it has any worth keeping
                         if args.weights == "none" or not isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        if least < 1 + any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in self.learning):
            raise UserError(f"a step has {least} images in some process, too few to learn from, with random weights and "
                            "BatchNorm at least 2: raise --batch-size, or start fewer processes")
        self.network = torch.nn.Module()
        self.network.backbone, self.network.head = backbone, head.to(self.device).requires_grad_(True)
        self.run = self.network
        self.network.forward = self.forward
        tell_stage(backbone, names)
        if WORLD > 1:
            self.run = torch.nn.parallel.DistributedDataParallel(self.network)
        if args.compile:
            self.run = torch.compile(self.run)
        self.trained = True  # since the frozen model has last taken its weights

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, S, S] -> logits [B, classes]; the head computes in float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.frozen.dtype == torch.bfloat16):
            features = self.network.backbone(images)
        return self.network.head(features.float())

    def groups(self, configs: list[dict]) -> list[dict]:
        config, = configs
        return [*parameter_groups(self.network.backbone, config["backbone_lr"], config),
                *parameter_groups(self.network.head, config["lr"], config)]

    def batches(self, epoch: int):
        """Yield (images [B, 3, S, S], class indices [B] or shares [B, C], this process's share of the step).

        All that is random depends on the seed, the epoch and the process alone.
        """
        _, targets = self.data["train"]
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(hash((self.args.seed, epoch))))
        steps = order.to(self.device).tensor_split(self.steps)  # at once: a GPU that waits for each step's would stand still
        mine = [rows[RANK::WORLD] for rows in steps]
        torch.manual_seed(hash((self.args.seed, epoch, RANK)))  # dropout too
        for module in self.learning:
            module.training = True
        self.trained = True
        for rows, own, pixels in zip(steps, mine, self.images.batches("train", mine)):
            images, wanted = augment(self.frozen, pixels, targets[own], self.args, self.classes)
            yield images.contiguous(memory_format=torch.channels_last), wanted, len(own) * WORLD / len(rows)

    def logits(self, images: torch.Tensor, active: list[int]) -> torch.Tensor:
        return self.run(images)[:, None]

    def split_logits(self, split: str, active: list[int]):
        """Yield (logits [B, 1, classes], class indices [B]) of this process's share of a split, of train a sample."""
        if self.trained:
            for buffer in self.network.buffers() if WORLD > 1 else ():  # BatchNorm's statistics, if they move, differ by now
                torch.distributed.broadcast(buffer, 0)
            self.network.eval()
            self.frozen.update(self.network.backbone.state_dict())
            self.trained = False
        _, targets = self.data[split]
        step = math.ceil(len(targets) / TRAIN_SAMPLE) if split == "train" else 1
        rows = torch.arange(0, len(targets), step, device=self.device)[RANK::WORLD]
        chunks = [chunk for chunk in rows.split(self.frozen.batch_size) if len(chunk)]
        with torch.no_grad():
            for rows, pixels in zip(chunks, self.images.batches(split, chunks)):
                yield self.network.head(self.frozen.features(pixels))[:, None], targets[rows]

    def weights(self, index: int) -> dict:
        return {key: value.clone() for key, value in self.network.state_dict().items()}

    def load(self, weights: dict):
        update_weights(self.network, weights)


def tell_stage(backbone: torch.nn.Module, names: list[str]):
    """Say what of the network learns: its parts, and how many parameters."""
    learning = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    parts = [name for name in names if any(p.requires_grad for p in backbone.get_submodule(name).parameters())
             and not any(name.startswith(f"{other}.") for other in names)]
    log(f"fine-tuning {', '.join(parts)}: {learning:,} of the network's {sum(p.numel() for p in backbone.parameters()):,} "
        "parameters, and the classifier")


class Images:
    """The pixels of all splits: on the device, as bytes at the size of their files, if they fit; else read again each time."""

    def __init__(self, splits: dict, files: dict, frozen: FrozenModel, workers: int | None):
        self.splits, self.frozen = splits, frozen
        self.preprocessing, device = frozen.preprocessing, frozen.device
        self.stamps = {path: stamp for split, (paths, _) in splits.items() for path, (_, stamp) in zip(paths, files[split])}
        self.workers = workers or (max(1, (os.cpu_count() or 1) // 4) if device.type == "cpu" else None)  # the rest computes
        self.resident = {}
        with ThreadPoolExecutor(reader_threads(workers)) as executor:
            sides = {min(size) for paths, _ in splits.values() for size in executor.map(image_size, paths)}
        size, processes = self.preprocessing["size"], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        side = min(sides.pop(), size) if len(sides) == 1 and device.type != "mps" else size  # old versions lack resize on MPS
        # A GPU rounds otherwise when it resizes, so there only what is learned from is resized by it, not what is measured.
        stored = {split: size if device.type == "cuda" and split != "train" else side for split in splits}
        room = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else usable_memory() / processes
        if sum(3 * stored[split] ** 2 * len(paths) for split, (paths, _) in splits.items()) > room:
            return
        for split, (paths, _) in splits.items():
            pixels = torch.empty(len(paths), 3, stored[split], stored[split], dtype=torch.uint8, device=device)
            for row, image in enumerate(self.read(paths, self.preprocessing | {"size": stored[split]})):
                pixels[row] = image
            self.resident[split] = pixels

    def read(self, paths, preprocessing: dict):
        for batch in read_batches(paths, preprocessing, self.frozen.batch_size, self.workers):
            for path, pixels in batch:
                if isinstance(pixels, ImageError):
                    raise pixels
                check_unchanged(path, self.stamps[path])
                yield pixels

    def batches(self, split: str, chunks: list[torch.Tensor]):
        """Yield uint8 pixels [B, 3, S, S] for the rows [B], on the device, of each chunk."""
        size, paths = self.preprocessing["size"], self.splits[split][0]
        if split in self.resident:
            pixels = self.resident[split]
            for rows in chunks:
                yield resize(pixels[rows], size, self.preprocessing["interpolation"])
        else:
            stream = self.read((paths[row] for row in torch.cat(chunks).tolist()), self.preprocessing)
            for rows in chunks:
                yield send(torch.stack(list(islice(stream, len(rows)))), self.frozen.device)


def image_size(path) -> tuple[int, int]:
    """Width and height from a file's header; ImageError for one that has none."""
    try:
        with PIL.Image.open(path) as image:
            return image.size
    except Exception:  # read_image says what is wrong with it
        return read_image(path).size


def augment(frozen: FrozenModel, pixels: torch.Tensor, targets: torch.Tensor, args, classes: int):
    """uint8 pixels [B, 3, S, S] and class indices [B] -> normalised images and class indices, or shares [B, C] of classes.

    Each image is seen in a view of --augment drawn at random. `strong` adds TrivialAugmentWide (Mueller and Hutter, ICCV
    2021), random erasing (Zhong et al., AAAI 2020) of a quarter of the images, and to the batch CutMix (Yun et al., ICCV
    2019) or MixUp (Zhang et al., ICLR 2018). The first two are drawn for a few images at a time, which are in random order.
    """
    views = torch.tensor(VIEWS[args.augment])
    turns, mirrored = views[torch.randint(len(views), (len(pixels),))].unbind(1)
    for chosen, view in ((mirrored > 0, (0, True)), (turns % 2 > 0, (1, False)), (turns > 1, (2, False))):  # few, for a GPU
        if chosen.any():
            pixels = torch.where(send(chosen, pixels.device)[:, None, None, None], turn(pixels, *view), pixels)
    if not args.strong:
        return frozen.normalise(pixels), targets
    trivial, erase = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR), v2.RandomErasing(p=0.25)
    together = math.ceil(len(pixels) / STRONG_DRAWS)
    images = frozen.normalise(torch.cat([trivial(part) for part in pixels.split(together)]))
    images = torch.cat([erase(part) for part in images.split(together)])
    return v2.RandomChoice([v2.CutMix(num_classes=classes), v2.MixUp(alpha=0.2, num_classes=classes)])(images, targets)


def find_last_stage(backbone: torch.nn.Module, size: int) -> list[str]:
    """The names of the modules of a network's last stage, in the order in which they run.

    A stage is what works at one resolution: the last one begins with the first part that gives maps of the smallest side
    from maps of that side or the next larger one; a part that spans more than these is looked into. It ends with the
    network. In one whose maps do not shrink (vision transformers) it is the last quarter of the longest row of equal blocks,
    and what follows.
    """
    started, sides = [], {}

    def side(value):
        return value.shape[2] if torch.is_tensor(value) and value.dim() == 4 else None

    def start(name, *_):
        started.append(name)

    def end(name, module, inputs, output):
        if any(True for _ in module.parameters()):
            sides.setdefault(name, (side(inputs[0] if inputs else None), side(output)))
    hooks = [hook for name, module in backbone.named_modules() if name for hook in
             (module.register_forward_pre_hook(functools.partial(start, name)),
              module.register_forward_hook(functools.partial(end, name)))]
    if not hasattr(backbone, "image_size"):
        size = max(size, 224)  # small images shrink to single pixels before the end
    with torch.no_grad():
        backbone.eval()(torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device))
    for hook in hooks:
        hook.remove()
    layers = [name for name in sides if any(True for _ in backbone.get_submodule(name).parameters(recurse=False))]
    smallest = sorted({sides[name][1] for name in layers} - {None, 1})[:2]  # 1: squeeze and excitation
    first = next((name for name in started if sides.get(name, (0, 0))[0] in smallest and sides[name][1] == smallest[0]), None)
    if first is None or len(smallest) < 2:
        rows = [[f"{name}.{child}" for child, _ in module.named_children()] for name, module in backbone.named_modules()
                if name and len(set(map(type, module.children()))) == 1]
        blocks = max(rows, key=len, default=started)
        first = blocks[-math.ceil(len(blocks) / 4)]
    return list(dict.fromkeys(started[started.index(first):]))


# ---------------------------------------------------------------- files

def write_history(path: Path, history: list[dict]):
    with replacing(path) as file:
        writer = csv.DictWriter(file, HISTORY_FIELDS)
        writer.writeheader()
        writer.writerows(history)


def save_last(args, settings: dict, **state):
    """Write OUT/last.pt: the state of a run under way, or that it has finished."""
    write_torch(args.out / "last.pt", {"format": RUN_FORMAT, "version": FORMAT_VERSION, "settings": settings, **state})


def write_torch(path: Path, content: dict):
    buffer = io.BytesIO()  # torch.save would turn a full disk's OSError into a RuntimeError
    torch.save(content, buffer)
    with replacing(path, "wb") as file:
        file.write(buffer.getbuffer())


def save_model(args, frozen: FrozenModel, job: SimpleNamespace, best: dict, config: dict):
    """Write OUT/model.pt, the finished model, with everything that evaluate.py and predict.py need."""
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[frozen.dtype]
    write_torch(args.out / "model.pt", {
        "format": CHECKPOINT_FORMAT, "version": FORMAT_VERSION, "arch": args.arch, "model_kwargs": job.model_kwargs,
        "classes": job.classes, "preprocessing": frozen.preprocessing, "temperature": best["temperature"],
        "temperature_tta": best["temperature_tta"], "views": VIEWS[args.augment], "metrics": best["row"],
        "state_dict": frozen.model.cpu().state_dict(),
        "args": plain_arguments(args) | config | {"precision": precision},
        "versions": {"python": platform.python_version(), **library_versions()}})


def library_versions() -> dict[str, str]:
    return {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__), "pillow": PIL.__version__}


if __name__ == "__main__":
    sys.exit(main())
