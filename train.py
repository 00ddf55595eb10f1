"""Train an image classifier by transfer learning: a pre-trained, frozen network with a new classifier for your classes.

Reads DATA/train/<class>/*, and DATA/val and DATA/test if they exist; writes OUT/model.pt, OUT/last.pt and
OUT/history.csv. The frozen network runs once over each view of each image; Adam then trains the classifier on the
cached features. With --finetune the network is trained too, starting from that classifier, and a mixture of the weights
before and after it is saved. Val decides which epoch and which mixture; test is only reported. The last line on stdout,
unless that is a terminal, is one JSON object.

To train with several processes: torchrun --nproc-per-node N train.py ...
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from common import CHECKPOINT_FORMAT, EXIT_KEPT_OLD, FORMAT_VERSION, HISTORY_FIELDS, MAX_IMAGE_SIZE, RANK, RUN_FORMAT
from common import SPLITS, VIEWS, WORLD_SIZE
from common import Checkpoint, FeatureCache, FeatureRequest, InferenceModel, LazyModule, Network, Progress, Split
from common import UserError, View
from common import add_cache_options, add_hardware_options, all_gather_list, apply_view, are_among, average_views
from common import broadcast_from_rank0, check_output_outside, checkpoint_precision, class_folders, command
from common import defer_signals, digest_of, draw_images, extract_features, few_val_images, fraction, hash_images
from common import hold_lock, initialize_classifier, is_out_of_memory, library_versions, list_architectures, list_split
from common import load_pretrained, log, log_device, make_parser, new_figure, non_negative_float, open_image
from common import paired_difference, pick_precision, positive_float, positive_int, print_json, printable, process_group
from common import read_batches, read_checkpoint, read_known, read_torch_file, relative_residuals, remove_leftovers
from common import resize, rows_per_chunk, save_figure, seed_number, short_hashes, to_device, update_weights
from common import usable_memory, wilson, write_csv, write_torch_file

if TYPE_CHECKING:
    import torch
    import torchvision
    from torchvision.transforms import v2
else:
    torch, torchvision, v2 = map(LazyModule, ("torch", "torchvision", "torchvision.transforms.v2"))

IMBALANCE_RATIO = 5  # warn if the largest class has at least this many times as many images as the smallest
CALIBRATION_SAMPLE = 1000  # at most this many val images are used to fit `temperature_tta`
# For `fit_familiarity`: principal components, images from which they come, and residuals that are kept.
COMPONENTS, COMPONENT_IMAGES, RESIDUALS = 64, 5000, 1000
TRAIN_SAMPLE = 1000  # fine-tuning measures train_loss and train_acc on at most this many images
TEST_EVERY = 5  # fine-tuning measures test in at least every fifth epoch
HEAD_LR = 1e-3  # default learning rate of a classifier on a frozen network, also before fine-tuning
HEAD_STEPS, HEAD_MIN_EPOCHS = 500, 5  # default length of its training
FINETUNE_IMAGES, FINETUNE_EPOCHS = 128_000, (3, 100)  # images that fine-tuning sees by default, and bounds of epochs
# Default peak learning rates of a backbone with BatchNorm, and of all others (transformers, ConvNeXt).
BATCHNORM_LR, OTHER_LR = 3e-4, 5e-5
ALPHAS = (0.75, 0.5, 0.25, 0)  # what `interpolate` tries besides the fine-tuned weights
STRONG_PARTS = 16  # parts of a batch; the images of a part share one draw of strong augmentation
TEMPERATURE_PRIOR = 0.5  # standard deviation of the prior of log(temperature)
MIX_MIN_IMAGES = 20_000  # with fewer training images, CutMix and MixUp do harm (Kolesnikov et al., ECCV 2020)
RUN_VERSION = 4  # format version of last.pt
# What last.pt has of each run, as `has_form` takes it.
ROW_FORM = dict.fromkeys(HISTORY_FIELDS, float | int | None) | {"epoch": int, "seconds": float, "measured": dict}
EPOCH_FORM = {"row": ROW_FORM, "calibrated_nll": float, "temperature": float, "weights": dict}
HPARAMS_FORM = {"lr": float, "weight_decay": float | int, "label_smoothing": float | int, "epochs": int}
RUN_FORM = {"hparams": HPARAMS_FORM, "seed": int, "history": [ROW_FORM], "best": EPOCH_FORM}


# ---------------------------------------------------------------- command line

WEIGHTS_HELP = (
    "a torchvision weights name such as IMAGENET1K_V2, a file (a torchvision state dict or a model.pt of this tool), "
    "or none for random weights. Default: IMAGENET1K_V1 if it exists (features of networks trained with plain softmax "
    "cross entropy transfer better when frozen; Kornblith et al., NeurIPS 2021), else DEFAULT"
)
RESIZE_HELP = (
    "of images that are not square. squish: the whole image is resized to a square; crop: its center square is. "
    "Default: squish, or what the model.pt given as --weights was trained with"
)
AUGMENT_HELP = (
    "views of each training image, one of them drawn per epoch. none: the image as it is; flip: also its mirror image "
    "(for photographs); dihedral: all flips and quarter turns (for images from above). strong (only with --finetune "
    "last or all; alone it implies flip) adds TrivialAugmentWide and random erasing; random crops, except with "
    "dihedral; and CutMix or MixUp in half of the batches, from 20,000 training images on. Default: "
    "none; flip when fine-tuning"
)
FINETUNE_HELP = (
    "head: train only the new classifier; last: also the network's last stage; all: the whole network. The classifier "
    "is trained alone first (Kumar et al., ICLR 2022), and of the weights between that and the fine-tuned network the "
    "best on val are saved (Wortsman et al., CVPR 2022). Pre-trained BatchNorm keeps its statistics"
)
ONLY_IF_BETTER_HELP = (
    "keep the model.pt in OUT, and exit with code 5, if its calibrated loss on val is lower than the new model's. With "
    "few images in val, the difference may be chance. Images that the old model was trained on are left out"
)
EPOCHS_HELP = (
    f"passes over the training images (default: enough for {HEAD_STEPS} steps, at least {HEAD_MIN_EPOCHS}; when "
    f"fine-tuning, {FINETUNE_EPOCHS[0]} to {FINETUNE_EPOCHS[1]}, so that {FINETUNE_IMAGES:,} images are seen in all)"
)
TUNE_HELP = (
    "try N settings of learning rate, weight decay, label smoothing and epochs (up to --epochs) side by side, then "
    "train with the best on val; results in OUT/tune.csv and OUT/tune.png"
)
AUDIT_HELP = (
    "before training, look for wrong labels and for near-duplicates in different splits or classes, with the features "
    "of the frozen network: OUT/audit.csv, audit.png, duplicates.csv and duplicates.png, the most suspicious first. "
    "The data stay as they are"
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser("train.py", __doc__, "python train.py --data data/eurosat --epochs 5")
    add = parser.add_argument_group("data and output").add_argument
    add("--data", type=Path, default=Path("data/eurosat"), metavar="DIR", help="image tree, as made by prepare_data.py")
    add("--out", type=Path, metavar="DIR", help="output folder (default: runs/<name of the data folder>)")
    add("--resume", action="store_true", help="continue the unfinished run in OUT, if there is one")
    add("--restart", action="store_true", help="discard the unfinished run in OUT and start again")
    add("--only-if-better", action="store_true", help=ONLY_IF_BETTER_HELP)
    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet50", help="a torchvision classification model")
    add("--list-archs", action="store_true", help="print the names that --arch takes, and exit")
    add("--weights", metavar="NAME", help=WEIGHTS_HELP)
    add("--image-size", type=positive_int, metavar="PIXELS", help="side of the input (default: that of the weights)")
    add("--resize", choices=("squish", "crop"), help=RESIZE_HELP)
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive_int, metavar="N", help=EPOCHS_HELP)
    add("--batch-size", type=positive_int, default=64, metavar="N", help="images per optimizer step")
    lr = f"peak learning rate of the classifier, with cosine decay to 0 (default: {HEAD_LR:g}; when "
    lr += f"fine-tuning, that of --backbone-lr; the classifier alone, trained first, always uses {HEAD_LR:g})"
    add("--lr", type=positive_float, metavar="RATE", help=lr)
    warmup = "linear warm-up, at most half of the schedule (default: 0; a tenth of the schedule when fine-tuning)"
    add("--warmup", type=non_negative_float, metavar="EPOCHS", help=warmup)
    decay = "decoupled weight decay (AdamW; with 0 it is Adam), not applied to biases and normalization layers"
    add("--weight-decay", type=non_negative_float, default=0, metavar="X", help=decay)
    smoothing = "share of each label that is spread over all classes"
    add("--label-smoothing", type=fraction, default=0, metavar="X", help=smoothing)
    weights = "balanced: all classes have the same total weight in the loss, and in all that is chosen on val (epoch, "
    weights += "--tune, temperature, --only-if-better)"
    add("--class-weights", choices=("balanced",), help=weights)
    add("--augment", choices=(*VIEWS, "strong"), nargs="+", help=AUGMENT_HELP)
    add("--patience", type=positive_int, metavar="N", help="stop after N epochs without improvement on val")
    minutes = "shorten the schedule to finish within M minutes; the feature pass, the first epoch and the final "
    minutes += "measurements always complete"
    add("--max-minutes", type=positive_float, metavar="M", help=minutes)
    add("--seed", type=seed_number, default=0, metavar="N", help="random seed")
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--finetune", choices=("head", "last", "all"), default="head", help=FINETUNE_HELP)
    rates = f"(default: {BATCHNORM_LR:g} for networks with BatchNorm, {OTHER_LR:g} for others)"
    add("--backbone-lr", type=positive_float, metavar="RATE", help=f"peak learning rate of the backbone {rates}")
    add("--clip-norm", type=positive_float, default=1.0, metavar="NORM", help="clip the gradient norm to this value")
    add = parser.add_argument_group("search and repetition (--finetune head)").add_argument
    add("--tune", type=positive_int, metavar="N", help=TUNE_HELP)
    seeds = "train with K seeds, report mean and standard deviation, and save the best on val"
    add("--seeds", type=positive_int, default=1, metavar="K", help=seeds)
    parser.add_argument_group("data audit").add_argument("--audit", action="store_true", help=AUDIT_HELP)
    add_cache_options(parser)
    add_hardware_options(parser)
    args = parser.parse_args(argv)
    changed = {key: value for key, value in vars(args).items() if value != parser.get_default(key)}  # for the report
    args.changed = {key: " ".join(value) if isinstance(value, list) else str(value) for key, value in changed.items()}
    if args.image_size and args.image_size > MAX_IMAGE_SIZE:
        parser.error(f"--image-size {args.image_size} is above {MAX_IMAGE_SIZE}")
    if args.resume and args.restart:
        parser.error("--resume and --restart cannot be used together")
    augment = args.augment or (["none"] if args.finetune == "head" else ["flip"])
    args.strong = "strong" in augment
    views = set(augment) - {"strong"} or {"flip"}
    if len(views) > 1:
        parser.error(f"--augment {' '.join(augment)}: choose one of {', '.join(VIEWS)}, with or without strong")
    args.augment = views.pop()  # from here on the name of the views alone
    if args.finetune == "head" and args.strong:
        parser.error("--augment strong needs --finetune last or all: a frozen network sees each view of an image once")
    if args.finetune != "head" and args.precision == "fp16":
        parser.error("--precision fp16 is for a frozen network: fine-tune in bf16 or fp32")
    if args.finetune == "head" and changed.keys() & {"backbone_lr", "clip_norm"}:
        parser.error("--backbone-lr and --clip-norm need --finetune last or all")
    if args.finetune != "head" and (args.tune or args.seeds > 1):
        parser.error("--tune and --seeds need a frozen network: --finetune head")
    args.out = args.out or Path("runs") / args.data.resolve().name
    check_output_outside("--out", args.out, [args.data / split for split in SPLITS])
    return args


@command
def main(argv: Sequence[str] | None = None) -> int | None:
    """Train a classifier according to the command line, and return the exit code."""
    args, start = parse_args(argv), time.monotonic()
    if args.list_archs:
        print("\n".join(list_architectures()))
        return None
    deadline = start + 60 * (args.max_minutes or math.inf)
    with contextlib.ExitStack() as stack:
        stack.enter_context(resume_hint(args.restart))
        device = stack.enter_context(process_group(args.device))
        dtype = pick_precision(args.precision, device)
        if args.finetune != "head" and dtype == torch.float16:  # it would need its gradients scaled
            args.precision, dtype = "fp32", torch.float32
        log_device(device, [dtype])
        # Not before the processes are connected, so that the others learn of a lock that is held.
        broadcast_from_rank0(lambda: stack.enter_context(hold_lock(args.out / ".lock")))
        dataset, network, unfinished, incumbent = broadcast_from_rank0(lambda: prepare(args))
        args = with_defaults(args, dataset, network)
        model = InferenceModel(network, device, args.precision)
        cache = FeatureCache.open(model, args)
        files = RunFiles(args.out, run_settings(vars(args), dataset, cache.key), unfinished, not args.only_if_better)
        if unfinished:
            check_resumable(unfinished, files.settings, args.out)
        if args.restart and RANK == 0:  # not before all input has been read
            (args.out / "last.pt").unlink(missing_ok=True)
        # Before training, so that a model that cannot be used is reported now.
        old = measure_incumbent(incumbent, device, dataset, args) if incumbent else None
        data = frozen_features(model, dataset, cache, args)
        suspects = audit(model, dataset, data, args) if args.audit and RANK == 0 else {}
        train_model = train_linear_probe if args.finetune == "head" else finetune
        result = train_model(model, dataset, data, args, files, deadline)
        new = measure_on_val(model, dataset, dataset.classes, incumbent.val, args) if incumbent else None
        if RANK:
            return None  # the first process alone writes the files and the report
        run = best_run(result.runs)
        row = run.best.row
        comparison = compare_models(old, new, run.best, args.out / "model.pt") if args.only_if_better else {}
        better = not comparison.get("kept_old")
        if better:
            files.publish(checkpoint_content(model, dataset, run, result, vars(args)), run, args)
        files.write_last({"finished": True})
    report = {
        "model": str(args.out / "model.pt"),
        "history": str(args.out / "history.csv"),
        "arch": args.arch,
        "epochs": len(run.history),
        "best_epoch": row["epoch"],
        **{f"{split}_acc": row[f"{split}_acc"] for split in SPLITS},
        **summarize_seeds(result.runs),
        **({"tuned": asdict(run.hparams)} if args.tune else {}),
        **({"alpha": row["alpha"]} if "alpha" in row else {}),
        **comparison,
        **suspects,
        "seconds": round(time.monotonic() - start, 1),
    }
    known = ", ".join(f"{split} {report[f'{split}_acc']:.2%}" for split in SPLITS if report[f"{split}_acc"] is not None)
    state = "written" if better else "the old model is kept"
    print_json(report, f"{report['model']}: {state}; accuracy of the new model: {known}")
    return None if better else EXIT_KEPT_OLD


@contextlib.contextmanager
def resume_hint(restart: bool) -> Iterator[None]:
    """Explain how to continue if the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        option = "--resume in place of --restart" if restart else "--resume"
        log(f"stopped; the same command with {option} continues after the last complete epoch, if there is one")
        raise


# ---------------------------------------------------------------- data and settings of a run


@dataclass
class Dataset:
    """An image tree."""

    classes: list[str]  # in the order of the model's outputs
    splits: dict[str, Split]  # only the splits that exist


@dataclass(frozen=True)
class HParams:
    """The hyper-parameters that --tune searches."""

    lr: float  # peak learning rate
    weight_decay: float  # decoupled
    label_smoothing: float  # share of each label that is spread over all classes
    epochs: int  # length of the schedule


@dataclass
class Epoch:
    """The metrics of one epoch, and its weights if it is the best so far."""

    row: dict  # its row of the history
    calibrated_nll: float  # cross entropy on val in nats, at the best temperature; 1 without val
    temperature: float  # the best temperature
    weights: dict | None = None  # the learner's state dict, if the epoch was the best so far


@dataclass
class Run:
    """A training run with one configuration and one seed."""

    hparams: HParams
    seed: int
    history: list[dict] = field(default_factory=list)  # a row for each epoch
    best: Epoch | None = None  # the best epoch so far

    def to_dict(self) -> dict:
        """Return the run as plain values and tensors."""
        return {**vars(self), "hparams": asdict(self.hparams), "best": vars(self.best)}

    @staticmethod
    def from_dict(content: dict) -> Run:
        """Make the run that `to_dict` described."""
        return Run(**{**content, "hparams": HParams(**content["hparams"]), "best": Epoch(**content["best"])})


@dataclass
class TrainingResult:
    """What training returns in the first process; the others get no runs. The best weights are in the model."""

    runs: list[Run]  # one for each seed
    temperature_tta: float = 1.0
    familiarity: dict[str, torch.Tensor] | None = None  # see `Checkpoint`


@dataclass
class UnfinishedRun:
    """The state of an interrupted training, from last.pt."""

    file: Path
    settings: dict  # everything that affects its result, see `run_settings`
    completed: list[Run]  # those of earlier seeds
    run: Run  # the interrupted one
    optimizer: dict  # state dict after the last complete epoch
    weights: dict  # the learner's state dict after that epoch

    @staticmethod
    def from_dict(content: dict, file: Path) -> UnfinishedRun:
        """Make the unfinished run that last.pt describes. Raises an error unless all but its tensors is as written."""
        form = {"settings": dict, "completed": [RUN_FORM], "run": RUN_FORM, "optimizer": dict, "weights": dict}
        fields = {key: content[key] for key in form}
        valid = has_form(fields, form)
        *completed, run = map(Run.from_dict, (*fields["completed"], fields["run"]))
        for number, part in enumerate((*completed, run)):
            valid &= part.seed == fields["settings"]["seed"] + number and number < fields["settings"]["seeds"]
            valid &= [row["epoch"] for row in part.history] == list(range(1, len(part.history) + 1))
            valid &= part.best.row in part.history and 0.01 < part.best.temperature < 100
            valid &= min(vars(part.hparams).values()) >= 0
        if not valid:
            raise ValueError
        return UnfinishedRun(file, **{**fields, "completed": completed, "run": run})

    def restore(self, learner: Learner, optimizer: torch.optim.Optimizer) -> Run:
        """Give the learner and its optimizer the state after the last complete epoch, and return the run so far.

        Shapes are compared first: the optimizer's fused step would write beyond the end of tensors of another shape.
        """
        with refuse_damaged_state(self.file):
            all_weights = [self.weights, *(run.best.weights for run in (*self.completed, self.run))]
            saved, state = self.optimizer["state"], {}
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index in saved:
                first, second = (torch.zeros_like(parameters[index]) for _ in range(2))
                state[index] = {"step": torch.zeros(()), "exp_avg": first, "exp_avg_sq": second}
            if not has_form(all_weights, [learner.state_dict(0)]) or not has_form(saved, state):
                raise ValueError
            for index, tensors in state.items():
                for key, tensor in tensors.items():
                    tensor.copy_(saved[index][key])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            learner.load_state_dict(self.weights)
        log(f"resumed after epoch {len(self.run.history)}")
        return replace(self.run, history=list(self.run.history))


def has_form(value: Any, form: Any) -> bool:
    """Return whether a value has a form: a type, a list of one form, a dict of forms, or a tensor of the same shape."""
    if isinstance(form, dict):
        same_keys = isinstance(value, dict) and value.keys() == form.keys()
        return same_keys and all(has_form(value[key], form[key]) for key in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(item, form[0]) for item in value)
    if torch.is_tensor(form):
        return torch.is_tensor(value) and (value.shape, value.dtype) == (form.shape, form.dtype)
    return isinstance(value, form)


@contextlib.contextmanager
def refuse_damaged_state(file: Path) -> Iterator[None]:
    """Report the errors of a block that reads or restores a run as a UserError that suggests --restart."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PermissionError) or is_out_of_memory(error):
            raise
        reason = error if isinstance(error, UserError) else f"the state in {file} is damaged"
        raise UserError(f"{reason}; discard it with --restart") from None


@dataclass
class Incumbent:
    """The model in OUT with which --only-if-better compares, and the val images on which it can be compared."""

    checkpoint: Checkpoint
    val: Split


def prepare(args: argparse.Namespace) -> tuple[Dataset, Network, UnfinishedRun | None, Incumbent | None]:
    """Read all input: the tree, the pre-trained network, the unfinished run, and the model to compare with."""
    needs_val = [name for name in ("tune", "patience", "only_if_better") if getattr(args, name)]
    dataset = list_tree(args.data, [f"--{name.replace('_', '-')}" for name in needs_val])
    log_class_sizes(args.data, dataset, args.class_weights is not None)
    remove_leftovers(args.out)  # of a killed run: this one holds the lock
    unfinished = read_unfinished(args.out, args.resume, args.restart)
    network = load_pretrained(args.arch, args.weights, len(dataset.classes), args.image_size, args.resize, args.seed)
    for name, split in dataset.splits.items():
        dataset.splits[name] = replace(split, sha256=hash_images(split.paths, args.workers))
    warn_of_shared_images(dataset.splits, network)
    incumbent = read_incumbent(args.out / "model.pt", dataset, network, args.data) if args.only_if_better else None
    return dataset, network, unfinished, incumbent


def with_defaults(args: argparse.Namespace, dataset: Dataset, network: Network) -> argparse.Namespace:
    """Return the arguments with the defaults that depend on the data and the network, and log how they were chosen."""
    count, defaults = len(dataset.splits["train"]), {}
    if args.finetune == "head":
        defaults = {"epochs": head_epochs(count, args.batch_size), "lr": HEAD_LR, "warmup": 0.0}
        reason = f"{HEAD_STEPS} steps of {args.batch_size} images, at least {HEAD_MIN_EPOCHS} epochs"
    else:  # the warm-up is a tenth of the schedule, however long that turns out to be
        with_norm = any(map(is_batchnorm, network.model.modules()))
        low, high = FINETUNE_EPOCHS
        defaults["epochs"] = min(max(round(FINETUNE_IMAGES / count), low), high)
        reason = f"{FINETUNE_IMAGES:,} images in all, within {low} to {high} epochs"
        defaults["backbone_lr"] = args.backbone_lr or (BATCHNORM_LR if with_norm else OTHER_LR)
        defaults["lr"] = defaults["backbone_lr"]
    chosen = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    if "epochs" in chosen:
        log(f"--epochs {chosen['epochs']} by default: {reason}")
    if "backbone_lr" in chosen:
        log(f"--backbone-lr {chosen['backbone_lr']:g} by default: a network with{'' if with_norm else 'out'} BatchNorm")
    return argparse.Namespace(**{**vars(args), **chosen})


def head_epochs(count: int, batch_size: int) -> int:
    """Return the default number of epochs of a classifier on `count` images."""
    return max(HEAD_MIN_EPOCHS, math.ceil(HEAD_STEPS / math.ceil(count / batch_size)))


def is_batchnorm(module: torch.nn.Module) -> bool:
    """Return whether a module is a BatchNorm layer."""
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def warn_of_shared_images(splits: dict[str, Split], network: Network) -> None:
    """Log a warning if an image is, with the same content, in two splits, or was used to train the network before."""
    for (one, first), (other, second) in combinations(splits.items(), 2):
        paths = dict(zip(first.sha256, first.paths))
        shared = [f"{path} = {paths[key]}" for path, key in zip(second.paths, second.sha256) if key in paths]
        if shared:
            log(
                f"warning: {len(shared)} of {len(second)} images of {other} are also in {one}, so the accuracy on "
                f"{other} will be too high; prepare_data.py keeps equal images in one split ({', '.join(shared[:3])})"
            )
    for name, split in splits.items():
        if name != "train" and (seen := are_among(split.sha256, network.train_hashes).sum().item()):
            log(f"warning: {seen} of {len(split)} images of {name} were used to train the model given as --weights")


def list_tree(data: Path, needs_val: list[str]) -> Dataset:
    """List an image tree, without the hashes of its files. The classes are those of train/.

    Raises UserError for a folder that is not such a tree, and for one without val/ if there are options that need it.
    """
    if not data.is_dir():
        raise UserError(f"no such folder: {data}; make one with prepare_data.py")
    if not (data / "train").is_dir():
        raise UserError(f"{data} has no train/ folder; make a tree: prepare_data.py --source {data} --out NEW_FOLDER")
    classes, splits = None, {}
    for split in (name for name in SPLITS if (data / name).is_dir()):
        paths, classes, targets = list_split(data / split, classes)
        if len(classes) < 2:
            raise UserError(f"{data / split} has only one class, {classes[0]}; a classifier needs at least two")
        splits[split] = Split(paths, torch.tensor(targets), [])
    if "val" not in splits:
        if needs_val:
            raise UserError(f"{' and '.join(needs_val)}: {data} has no val/ to choose on; prepare_data.py makes one")
        log(f"{data} has no val/: no epoch is selected; the last one is saved, with temperature 1")
    return Dataset(classes, splits)


def log_class_sizes(data: Path, dataset: Dataset, balanced: bool) -> None:
    """Log the size of the data set, with warnings about classes without images, unequal classes and ignored folders."""
    classes = dataset.classes
    for split, images in dataset.splits.items():
        counts = images.targets.bincount(minlength=len(classes)).tolist()
        if absent := [name for name, count in zip(classes, counts) if not count]:
            log(f"warning: {data / split} has no images of {', '.join(absent)}")
    counts = dataset.splits["train"].targets.bincount().tolist()
    counts = sorted(zip(counts, classes), key=lambda pair: -pair[0])
    if not balanced and counts[0][0] >= IMBALANCE_RATIO * counts[-1][0]:
        texts = [f"{count} {name}" for count, name in counts]
        texts = texts if len(texts) <= 20 else [*texts[:5], "...", *texts[-5:]]
        log(
            f"warning: {data / 'train'} is imbalanced; rare classes will be recognized less often: {', '.join(texts)}; "
            "--class-weights balanced gives all classes the same weight"
        )
    if few := few_val_images(len(dataset.splits.get("val", ()))):
        log(f"warning: {few}")
    if ignored := [name for name in class_folders(data) if name not in SPLITS]:
        log(f"warning: ignored in {data}: {', '.join(ignored)}")
    totals = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
    log(f"{data}: {len(classes)} classes, {totals}")


def read_unfinished(folder: Path, resume: bool, restart: bool) -> UnfinishedRun | None:
    """Return the state of the unfinished run in a folder, or None if there is none or --restart discards it.

    Raises UserError for an unfinished run if neither --resume nor --restart is given, and for a last.pt that is damaged
    or of another version.
    """
    last, content = folder / "last.pt", {"finished": True}
    with refuse_damaged_state(last):
        if last.exists() and not restart:
            content = read_torch_file(last)
        if content["finished"] is True:
            if resume:
                log(f"nothing to resume in {folder}: starting a new run")
            return None
        if (content["format"], content["version"]) != (RUN_FORMAT, RUN_VERSION):
            raise UserError(f"the state in {last} was written by another version of this program")
        unfinished = UnfinishedRun.from_dict(content, last)
    if not resume:
        epochs = len(unfinished.run.history)
        hint = "continue it with --resume, or discard it with --restart"
        raise UserError(f"{folder} holds an unfinished run ({epochs} epochs done): {hint}")
    return unfinished


def read_incumbent(path: Path, dataset: Dataset, network: Network, data: Path) -> Incumbent | None:
    """Read the model that --only-if-better compares with, if there is one.

    A model that lacks a class of the data is not compared: the new one replaces it. The comparison leaves out the val
    images on which it or the network to be trained was trained. Raises UserError if these are more than half, or if the
    data lack a class of the model.
    """
    if not path.exists():
        log(f"--only-if-better: there is no {path} yet")
        return None
    old, val = read_checkpoint(path), dataset.splits["val"]
    if lost := sorted(set(old.classes) - set(dataset.classes)):
        raise UserError(
            f"--only-if-better: {path} knows the class {', '.join(lost[:5])}, {data} does not; choose another --out"
        )
    if new := sorted(set(dataset.classes) - set(old.classes)):
        log(f"--only-if-better: {path} does not know the class {', '.join(new[:5])}, so the new model replaces it")
        return None
    if not len(old.train_hashes):
        log(f"--only-if-better: {path} does not say which images it was trained on; some of val may be among them")
    known = torch.cat([old.train_hashes, network.train_hashes])
    rows = (~are_among(val.sha256, known)).nonzero()[:, 0].tolist()
    trained = f"{path} or --weights" if len(network.train_hashes) else path
    seen = f"{trained} was trained on {len(val) - len(rows)} of the {len(val)} images of val"
    if 2 * len(rows) < len(val):
        advice = "if the data were split again, train once without --only-if-better"
        raise UserError(f"--only-if-better: {seen}, too many for a comparison; {advice}")
    if len(rows) < len(val):
        log(f"--only-if-better: {seen}, which are left out of the comparison")
    return Incumbent(old, val.select(rows))


def run_settings(arguments: dict, dataset: Dataset, features_key: dict) -> dict:
    """Return everything that affects the result of a run, as plain values. A run is resumed only if it is the same."""
    no_effect = {"changed", "audit", "resume", "restart", "only_if_better", "list_archs", "out", "workers"}
    no_effect |= {"cache", "no_cache", "cache_limit", "max_minutes"}
    settings = {name: value for name, value in plain_values(arguments).items() if name not in no_effect}
    if arguments["finetune"] != "head":
        settings["processes"] = WORLD_SIZE
    settings["threads"] = features_key["threads"]
    images = []
    for name, split in dataset.splits.items():
        images += [(name, target, sha256) for target, sha256 in zip(split.targets.tolist(), split.sha256)]
    digests = {"images": digest_of(images), "network and libraries": digest_of(features_key)}
    return {**settings, "classes": dataset.classes, **digests}


def check_resumable(unfinished: UnfinishedRun, settings: dict, folder: Path) -> None:
    """Raise UserError that lists the settings that differ from those of the unfinished run."""
    before = unfinished.settings
    if different := [key for key, value in settings.items() if str(value) != str(before.get(key))]:
        texts = [f"{key} was {before.get(key)}, is {settings[key]}" for key in different]
        raise UserError(f"cannot resume {folder}: {'; '.join(texts)}; discard the unfinished run with --restart")


def plain_values(arguments: dict) -> dict:
    """Return arguments of the command line as plain values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}


class ValResult(NamedTuple):
    """How a model does on val images."""

    calibrated_nll: float  # what selects epochs, see `selection_key`
    correct: torch.Tensor  # whether each image is classified correctly, bool [N]


def measure_on_val(
    model: InferenceModel, dataset: Dataset, classes: list[str], val: Split, args: argparse.Namespace
) -> ValResult | None:
    """Measure a model, whose outputs are `classes`, on val images; None in all processes but the first."""
    request = FeatureRequest(val, VIEWS["none"])
    features = extract_features(model, [request], FeatureCache.open(model, args), args.out, args.workers)
    if RANK:
        return None
    targets = torch.tensor([classes.index(name) for name in dataset.classes])[val.targets]
    logits = model.forward_cached(features[0][0])
    weights = class_weights(dataset.splits["train"].targets, args.class_weights)
    _, loss = calibrate(logits, targets, weights[val.targets])
    return ValResult(loss, logits.argmax(1) == targets)


def measure_incumbent(
    incumbent: Incumbent, device: torch.device, dataset: Dataset, args: argparse.Namespace
) -> ValResult | None:
    """Measure the model in OUT with which --only-if-better compares."""
    log(f"--only-if-better: measuring {args.out / 'model.pt'} on val")
    checkpoint = incumbent.checkpoint
    model = InferenceModel(checkpoint, device, checkpoint_precision(checkpoint, args.precision))
    return measure_on_val(model, dataset, checkpoint.classes, incumbent.val, args)


def compare_models(old: ValResult | None, new: ValResult | None, best: Epoch, path: Path) -> dict[str, Any]:
    """Compare the new model with the one in OUT, if any: log and return the result, with its keys in the JSON line."""
    if not old:
        kept = {"kept_old": False, "old_val_acc": None, "old_val_loss_calibrated": None}
        return {**kept, "val_loss_calibrated": best.calibrated_nll}
    kept_old = new.calibrated_nll > old.calibrated_nll
    only_new, only_old = ((a & ~b).sum().item() for a, b in ((new.correct, old.correct), (old.correct, new.correct)))
    value, low, high = (f"{100 * share:+.2f}" for share in paired_difference(only_new, only_old, len(old.correct)))
    log(
        f"{path} on {len(old.correct)} images of val: calibrated loss {old.calibrated_nll:.4f}, new model "
        f"{new.calibrated_nll:.4f}; accuracy, new minus old: {value} points (95% interval {low} to {high}); "
        f"by the loss, {'the old model is kept' if kept_old else 'it is replaced'}"
    )
    new_val_acc, old_val_acc = (result.correct.double().mean().item() for result in (new, old))
    losses = {"old_val_loss_calibrated": old.calibrated_nll, "val_loss_calibrated": new.calibrated_nll}
    return {"kept_old": kept_old, "new_val_acc": new_val_acc, "old_val_acc": old_val_acc, **losses}


# ---------------------------------------------------------------- the training loop


class Learner(Protocol):
    """What `fit` trains: one or more models that learn side by side from the same batches.

    `active` lists the indices of the A models that are still training.
    """

    device: torch.device
    options: TrainOptions
    targets: dict[str, torch.Tensor]  # class indices [N] of each split, on the device
    steps_per_epoch: int
    test_every: int = 1  # number of epochs after which test is measured
    distributed: bool = False  # whether every process computes a part of each step
    parts: int = 1  # number of parts in which the gradients of a batch are computed, to save memory

    def param_groups(self, hparams: Sequence[HParams]) -> list[dict]:
        """Return the optimizer's parameter groups, each with its `peak` learning rate and its `epochs`."""

    def train_batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Yield the steps of an epoch: inputs, class indices [B] or probabilities [B, C], and a weight for the loss."""

    def forward(self, inputs: torch.Tensor, active: list[int]) -> torch.Tensor:
        """Return the logits [B, A, C] of the active models."""

    def clip_gradients(self) -> None:
        """Clip the gradients, if the learner uses clipping."""

    def save_memory(self) -> bool:
        """Need less memory from now on; return False if that is not possible."""
        return False

    def eval_batches(self, split: str, active: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits [B, A, C] and class indices [B] of the images of a split, unaugmented, without gradients."""

    def state_dict(self, index: int) -> dict[str, torch.Tensor]:
        """Return a copy of the weights of a model."""

    def load_state_dict(self, weights: dict[str, torch.Tensor]) -> None:
        """Restore the weights of the only model."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train, whatever the hyper-parameters."""

    batch_size: int
    seed: int
    class_weights: torch.Tensor  # [C], in the loss and in the choices on val
    warmup: float | None = 0  # epochs of linear warm-up, at most half of the schedule; None: a tenth of it
    patience: int | None = None  # epochs without improvement on val after which to stop
    deadline: float = math.inf  # the value of time.monotonic() by which to finish
    # Only for fine-tuning, as on the command line.
    finetune: str = "head"
    backbone_lr: float | None = None
    clip_norm: float = 1.0
    test_every: int = 1  # number of epochs after which test is measured
    learn_statistics: bool = False  # whether BatchNorm layers update their running statistics
    workers: int | None = None
    augmentation: Augmentation | None = None


@dataclass
class Measurement:
    """Metrics of a model on n images: mean cross entropy in nats, accuracy in 0..1, and on val those of `calibrate`."""

    n: int
    loss: float
    acc: float
    temperature: float = 1.0
    calibrated_nll: float = 1.0


def fit(
    learner: Learner,
    runs: Sequence[Run],
    splits: Sequence[str],
    unfinished: UnfinishedRun | None = None,
    after_epoch: Callable[[Run, Epoch, dict, dict], None] | None = None,
) -> list[Run]:
    """Train the learner's models with cross entropy, one for each of the new runs, and return the completed runs.

    The learning rate warms up linearly and then decays to 0 along a cosine. If the deadline leaves no time for all
    epochs, the schedule is shortened; the first epoch is always completed. After each epoch the splits are measured,
    and after_epoch(run, epoch, optimizer state, weights) is called for the first model. `unfinished` continues its run.
    Raises UserError if the loss of a single model is not finite; with several models, that model ranks last.
    """
    options, groups = learner.options, learner.param_groups([run.hparams for run in runs])
    optimizer = torch.optim.AdamW(groups, fused=learner.device.type != "mps")
    runs = [replace(run, history=[]) for run in runs]
    if unfinished:
        runs = [unfinished.restore(learner, optimizer)]
    for epoch in range(len(runs[0].history) + 1, max(run.hparams.epochs for run in runs) + 1):
        start = time.monotonic()
        limit = epochs_until(options.deadline, runs, epoch - 1)
        if learner.distributed:
            limit = broadcast_from_rank0(lambda limit=limit: limit)  # all processes have to agree
        lengths = [min(run.hparams.epochs, limit) for run in runs]
        active = [index for index, run in enumerate(runs) if epoch <= lengths[index] and has_patience(run, options)]
        if not active:
            reason = "no time for another" if epoch > limit else f"{options.patience} epochs without improvement on val"
            log(f"stopped after epoch {epoch - 1}: {reason}")
            break
        train_one_epoch(learner, optimizer, runs, active, epoch, limit)
        skipped = "test" if epoch % learner.test_every and epoch < max(lengths) else None
        results = {split: evaluate(learner, split, active) for split in splits if split != skipped}
        if len(runs) == 1:
            check_finite([measured[0].loss for measured in results.values()], epoch, optimizer)
        seconds = round(time.monotonic() - start, 3)
        for number, index in enumerate(active):
            run, measured = runs[index], {split: results[split][number] for split in results}
            rate = run.hparams.lr * lr_factor(epoch - 1, lengths[index], options.warmup)
            latest = make_epoch(epoch, rate, measured, seconds)
            run.history.append(latest.row)
            if run.best is None or selection_key(latest) > selection_key(run.best):
                run.best = replace(latest, weights=learner.state_dict(index))
            if after_epoch and index == 0:
                after_epoch(run, latest, optimizer.state_dict(), learner.state_dict(0))
    return runs


def train_one_epoch(
    learner: Learner, optimizer: torch.optim.Optimizer, runs: Sequence[Run], active: list[int], epoch: int, limit: float
) -> None:
    """Train the active models for one epoch of a schedule that ends after `limit` epochs at the latest."""
    weights = learner.options.class_weights.to(learner.device)
    smoothing = torch.tensor([runs[index].hparams.label_smoothing for index in active], device=learner.device)
    losses, steps = [], learner.steps_per_epoch
    for step, batch in enumerate(learner.train_batches(epoch)):
        for group in optimizer.param_groups:
            length = min(group["epochs"], limit)
            group["lr"] = group["peak"] * lr_factor(epoch - 1 + step / steps, length, learner.options.warmup)
        loss = None
        while loss is None:
            optimizer.zero_grad()
            try:
                loss = backward(learner, batch, active, smoothing, weights)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not learner.save_memory():
                    raise
        learner.clip_gradients()
        optimizer.step()
        losses.append(loss)
        # Reading a loss synchronizes a GPU, so there it is done only now and then.
        if len(runs) == 1 and (learner.device.type == "cpu" or step % 50 == 49 or step + 1 == steps):
            check_finite(torch.cat(losses).tolist(), epoch, optimizer)
            losses.clear()


def backward(
    learner: Learner, batch: tuple, active: list[int], smoothing: torch.Tensor, class_weights: torch.Tensor
) -> torch.Tensor:
    """Add the gradients of a step of `train_batches`, in as many parts as the learner needs; return the losses [A]."""
    inputs, targets, loss_weight = batch
    size = math.ceil(len(inputs) / learner.parts)
    losses = torch.zeros(len(active), device=learner.device)
    for part, wanted in zip(inputs.split(size), targets.split(size)):
        loss = cross_entropies(learner.forward(part, active), wanted, smoothing, class_weights)
        loss = loss * (len(part) / len(inputs))
        (loss_weight * loss.sum()).backward()
        losses += loss.detach()
    return losses


def evaluate(learner: Learner, split: str, active: list[int]) -> list[Measurement]:
    """Measure each active model on a split. Class weights affect the temperature and the loss calibrated by it."""
    losses = correct = count = 0
    kept = []
    for logits, targets in learner.eval_batches(split, active):
        wanted = targets[:, None].expand(logits.shape[:2])
        loss = torch.nn.functional.cross_entropy(logits.permute(0, 2, 1), wanted, reduction="none")
        losses += loss.sum(0).cpu().double()
        correct += (logits.argmax(2) == wanted).sum(0).cpu().double()
        count += len(targets)
        if split == "val":
            every = math.ceil(len(learner.targets["val"]) * logits.shape[2] / 5e6)  # subsample a very large val set
            kept.append((logits[::every].cpu(), targets[::every].cpu()))
    if learner.distributed and WORLD_SIZE > 1:  # each process has measured its own share of the images
        parts, kept = all_gather_list([(losses, correct, count)]), all_gather_list(kept)
        losses, correct, count = map(sum, zip(*parts))
    pairs = zip((losses / count).tolist(), (correct / count).tolist())
    results = [Measurement(count, loss, acc) for loss, acc in pairs]
    if kept:
        logits, targets = (torch.cat(parts) for parts in zip(*kept))
        weights = learner.options.class_weights[targets]
        for result, own in zip(results, logits.unbind(1)):
            result.temperature, result.calibrated_nll = calibrate(own, targets, weights)
    # On other processors the last bits may differ, and with them decisions in which all processes have to agree.
    return broadcast_from_rank0(lambda: results) if learner.distributed else results


def make_epoch(epoch: int, rate: float, measured: dict[str, Measurement], seconds: float) -> Epoch:
    """Make the record of an epoch from what was measured on each split."""
    row = {"epoch": epoch, "lr": rate}
    for split in SPLITS:
        row[f"{split}_loss"] = measured[split].loss if split in measured else None
        row[f"{split}_acc"] = measured[split].acc if split in measured else None
    row |= {"seconds": seconds, "measured": {split: measurement.n for split, measurement in measured.items()}}
    val = measured.get("val", Measurement(0, 0, 0))
    return Epoch(row, val.calibrated_nll, val.temperature)


def epochs_until(deadline: float, runs: Sequence[Run], done: int) -> float:
    """Return how many epochs, `done` included, fit before the deadline, estimated from the longest of the last ones."""
    longest = max((row["seconds"] for run in runs for row in run.history[-TEST_EVERY:]), default=0)
    if deadline == math.inf or not longest:
        return math.inf
    return done + int(max(0, deadline - time.monotonic()) / (1.05 * longest))


def lr_factor(epochs: float, length: float, warmup: float | None) -> float:
    """Return the learning-rate multiplier after `epochs` epochs: linear warm-up, then half a cosine down to 0."""
    warmup = length / 10 if warmup is None else min(warmup, length / 2)
    if epochs < warmup:
        return max(epochs / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1, (epochs - warmup) / (length - warmup))))


def selection_key(epoch: Epoch) -> float:
    """Return the key by which epochs, configurations and seeds are compared; the largest is the best.

    It is the negated val loss at the best temperature, with class weights if these are used. Accuracy on a few thousand
    images is coarse and noisy, and the plain loss penalizes what the temperature corrects (Berta et al., Rethinking
    early stopping: refine, then calibrate, 2025). Without val, the last epoch is the best.
    """
    return epoch.row["epoch"] if epoch.row["val_loss"] is None else -epoch.calibrated_nll


def best_run(runs: Sequence[Run]) -> Run:
    """Return the run with the best epoch."""
    return max(runs, key=lambda run: selection_key(run.best))


def has_patience(run: Run, options: TrainOptions) -> bool:
    """Return whether the best epoch is recent enough to continue."""
    if not options.patience or not run.history:
        return True
    return len(run.history) - run.best.row["epoch"] < options.patience


def cross_entropies(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the mean cross entropy [A] in nats of each of A models.

    Takes logits [B, A, C], class indices [B] or probabilities [B, C], the label smoothing [A] and class weights [C].
    Each image has the weight of its own class, or the mean of the weights under its probabilities. (Those of torch's
    cross_entropy apply to the smoothed target, so that every image would raise the probability of rare classes.)
    """
    num_classes = logits.shape[2]
    if targets.dim() == 1:
        targets = torch.nn.functional.one_hot(targets, num_classes).to(logits.dtype)
    smoothed = targets[:, None] * (1 - smoothing[:, None]) + smoothing[:, None] / num_classes
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), smoothed.flatten(0, 1), reduction="none")
    return (loss.view(logits.shape[:2]) * (targets @ weights)[:, None]).mean(0)


def calibrate(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
    """Return the temperature for logits [N, C] with class indices [N], and the cross entropy in nats at it.

    The logits are to be divided by the temperature (temperature scaling; Guo et al., ICML 2017). It minimizes the mean
    cross entropy with image weights [N], plus the negative logarithm of a prior, divided by the effective number of
    images: a normal distribution of log(temperature) with a standard deviation of TEMPERATURE_PRIOR. Without the prior,
    a few images without an error would give a temperature of 0. If there are several minima, it is one near 1.
    """
    logits, own = logits.double(), logits.gather(1, targets[:, None]).double()[:, 0]
    if not logits.isfinite().all():
        return 1.0, math.inf
    weights = weights.double() / weights.sum()
    precision = weights.square().sum().item() / TEMPERATURE_PRIOR**2  # N equal weights have a sum of squares of 1 / N
    log_inverse = 0.0  # the logarithm of 1 / temperature, optimized by Newton's method
    for _ in range(100):
        inverse = math.exp(log_inverse)
        shares = (logits * inverse).softmax(1)
        mean = (shares * logits).sum(1)
        slope = inverse * (weights @ (mean - own)).item()
        variance = (shares * (logits - mean[:, None]).square()).sum(1)
        # Where the loss is concave in log_inverse, its slope is left out of the curvature, which thus stays positive.
        curvature = inverse**2 * (weights @ variance).item() + max(slope, 0) + precision
        step = -(slope + precision * log_inverse) / curvature
        previous = log_inverse
        log_inverse = min(max(previous + min(max(step, -0.7), 0.7), -4.6), 4.6)  # temperatures between 0.01 and 100
        if abs(log_inverse - previous) < 1e-7:
            break
    loss = torch.nn.functional.cross_entropy(logits * math.exp(log_inverse), targets, reduction="none")
    return math.exp(-log_inverse), (weights @ loss).item()


def param_groups(module: torch.nn.Module, lr: float, hparams: HParams) -> list[dict]:
    """Return optimizer groups of a module's trainable parameters; biases, scales and vectors have no weight decay."""
    groups = ([], hparams.weight_decay), ([], 0.0)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = name.rpartition(".")[2]  # Swin's tables of position biases have two dimensions
            groups[parameter.dim() <= 1 or "bias" in own or "scale" in own][0].append(parameter)
    common = {"lr": lr, "peak": lr, "epochs": hparams.epochs}
    return [{"params": members, "weight_decay": decay, **common} for members, decay in groups if members]


def check_finite(losses: Sequence[float], epoch: int, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError if a loss of this epoch is not finite."""
    if wrong := [loss for loss in losses if not math.isfinite(loss)]:
        rates = " and ".join(f"{rate:g}" for rate in sorted({group["lr"] for group in optimizer.param_groups}))
        raise UserError(
            f"the loss became {wrong[0]} in epoch {epoch}, with learning rate {rates}: lower --lr, or --backbone-lr "
            "when fine-tuning (discard the unfinished run with --restart)"
        )


def epoch_seed(seed: int, epoch: int, purpose: str) -> int:
    """Return the random seed for one purpose in one epoch. It depends on its arguments alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch} {purpose}".encode()).digest()[:8], "big")


# ---------------------------------------------------------------- linear probe: a classifier on cached features


class LabeledFeatures(NamedTuple):
    """Features [views, N, D] of images, and their class indices [N]."""

    features: torch.Tensor
    targets: torch.Tensor


ProbeData = dict[str, LabeledFeatures]  # of each split


def frozen_features(
    model: InferenceModel, dataset: Dataset, cache: FeatureCache, args: argparse.Namespace
) -> ProbeData:
    """Return the frozen network's features of each split; {} in all processes but the first.

    If a classifier is to be trained with several views, train has all of them, and so has "sample", an evenly spaced
    sample of val on which `temperature_tta` is fitted.
    """
    views = VIEWS[args.augment] if args.finetune == "head" else VIEWS["none"]
    requests = {name: FeatureRequest(split, VIEWS["none"]) for name, split in dataset.splits.items()}
    requests["train"] = FeatureRequest(dataset.splits["train"], views)
    if "val" in requests and len(views) > 1:
        requests["sample"] = FeatureRequest(sample_evenly(dataset.splits["val"]), views)
    return label_features(model, requests, cache, args)


def label_features(
    model: InferenceModel, requests: dict[str, FeatureRequest], cache: FeatureCache, args: argparse.Namespace
) -> ProbeData:
    """Return the features of each request; each are on the device if they need at most half of a GPU's free memory."""
    features, data = extract_features(model, list(requests.values()), cache, args.out, args.workers), {}
    for (name, request), values in zip(requests.items(), features):
        small = model.device.type != "cuda" or values.nbytes <= torch.cuda.mem_get_info(model.device)[0] / 2
        device = model.device if small else values.device
        data[name] = LabeledFeatures(values.to(device), request.split.targets.to(device))
    return data


def train_linear_probe(
    model: InferenceModel, dataset: Dataset, data: ProbeData, args: argparse.Namespace, files: RunFiles, deadline: float
) -> TrainingResult:
    """Train the classifier on the frozen network's features, and write the best one into the model.

    With --tune the hyper-parameters are searched first. Only the first process trains.
    """
    if RANK:
        return TrainingResult([])  # one process is enough for a linear probe
    sample = data.pop("sample", None)
    head = standardized_head(model.head, data["train"].features)
    options, unfinished = train_options(args, dataset, deadline), files.unfinished
    if unfinished:
        hparams, runs = unfinished.run.hparams, unfinished.completed
    else:
        hparams, runs = HParams(args.lr, args.weight_decay, args.label_smoothing, args.epochs), []
        if args.tune:
            hparams = tune(head, data, hparams, args.tune, options, args.out)
    for seed in range(args.seed + len(runs), args.seed + args.seeds):
        now = time.monotonic()
        if runs and now > deadline:
            log(f"no time left for seed {seed} and later ones")
            break
        if args.seeds > 1:
            log(f"seed {seed}")
        time_share = (deadline - now) / (args.seeds - len(runs))
        options = replace(options, seed=seed, deadline=now + time_share)
        probes = LinearProbes(head, data, options)
        if seed != args.seed:  # for the first seed, load_pretrained has drawn the weights
            initialize_classifier(probes.heads[0][1], seed)
        save = functools.partial(files.record_epoch, runs)
        runs = [*runs, *fit(probes, [Run(hparams, seed)], list(data), unfinished, save)]
        unfinished = None
    best = best_run(runs).best
    head.load_state_dict(best.weights)
    fold_standardization(head, model.head)
    temperature = calibrate_views(model, sample, options) if sample else best.temperature
    return TrainingResult(runs, temperature, fit_familiarity(data["train"].features, data.get("val")))


def train_options(args: argparse.Namespace, dataset: Dataset, deadline: float) -> TrainOptions:
    """Return the training options of the command line."""
    names = ("batch_size", "seed", "warmup", "patience", "finetune", "backbone_lr", "clip_norm", "workers")
    return TrainOptions(
        **{name: getattr(args, name) for name in names},
        class_weights=class_weights(dataset.splits["train"].targets, args.class_weights),
        deadline=deadline,
        test_every=min(math.ceil(args.epochs / 5), TEST_EVERY),
        learn_statistics=args.weights == "none",  # pre-trained BatchNorm keeps its statistics
    )


def class_weights(targets: torch.Tensor, kind: str | None) -> torch.Tensor:
    """Return class weights [C] with mean 1 over the images [N]; if balanced, all classes have the same total weight."""
    counts = targets.bincount()
    return (counts.sum() / (len(counts) * counts)).float() if kind == "balanced" else torch.ones(len(counts))


def sample_evenly(split: Split) -> Split:
    """Return at most CALIBRATION_SAMPLE images, evenly spread over the split."""
    return split.select(range(0, len(split), math.ceil(len(split) / CALIBRATION_SAMPLE)))


def fit_familiarity(train: torch.Tensor, val: LabeledFeatures | None) -> dict[str, torch.Tensor]:
    """Return what `unfamiliarity` needs, from features [views, N, D]; without val, half of train takes its place."""
    reference = train[0, 1::2] if val is None else val.features[0]
    train = train[:, ::2] if val is None else train
    rows = train[0, :: math.ceil(train.shape[1] / COMPONENT_IMAGES)].cpu().float()
    mean, variance = rows.mean(0), rows.var(0, correction=0)
    scale = 1 / variance.clamp(min=(1e-4 * variance.mean()).item() + 1e-30).sqrt()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        count = min(COMPONENTS, *rows.shape)
        _, _, components = torch.pca_lowrank((rows - mean) * scale, count, center=False)
    familiarity = {"mean": mean, "scale": scale, "components": components.contiguous()}
    residuals = relative_residuals(reference, familiarity).sort().values
    if len(residuals) > RESIDUALS:
        residuals = residuals[torch.linspace(0, len(residuals) - 1, RESIDUALS).long()]
    return {**familiarity, "residuals": residuals.clone()}


def calibrate_views(model: InferenceModel, sample: LabeledFeatures, options: TrainOptions) -> float:
    """Return the temperature for probabilities averaged over views, from a sample of val.

    The average has a temperature of its own (Rahaman and Thiery, Uncertainty quantification and deep ensembles, NeurIPS
    2021): disagreement between the views already lowers its confidence.
    """
    logits, targets = average_views(map(model.forward_cached, sample.features)), sample.targets.cpu()
    return calibrate(logits, targets, options.class_weights[targets])[0]


def standardized_head(classifier: torch.nn.Linear, features: torch.Tensor) -> torch.nn.Sequential:
    """Return a trainable copy of the classifier, preceded by a fixed layer that standardizes features [views, N, D].

    The scales of raw features differ by orders of magnitude, and no single learning rate suits them all. For a
    classifier without bias (maxvit_t) only the scale is standardized. `fold_standardization` removes the layer after
    training.
    """
    mean, square = torch.zeros(2, classifier.in_features, dtype=torch.float64)
    for rows in features.flatten(0, 1).split(rows_per_chunk(features)):
        rows = rows.cpu().double()
        mean += rows.sum(0)
        square += rows.square().sum(0)
    count = features.shape[0] * features.shape[1]
    mean /= count
    variance = square / count - mean.square()
    if not variance.isfinite().all():
        raise UserError("the network's features are not finite: its weights are damaged, or need another --precision")
    standardize = torch.nn.BatchNorm1d(classifier.in_features, affine=False, eps=0).eval()
    floor = 1e-4 * variance.mean() + 1e-8 * mean.square().mean() + 1e-30  # do not amplify features that hardly vary
    standardize.running_var = variance.clamp(min=floor).float()
    if classifier.bias is not None:
        standardize.running_mean = mean.float()
    head = torch.nn.Sequential(standardize, copy.deepcopy(classifier))
    return head.to(classifier.weight.device).requires_grad_(True)


def fold_standardization(head: torch.nn.Sequential, classifier: torch.nn.Linear) -> None:
    """Write the weights of a standardized head into a plain classifier, so that it computes the same function."""
    standardize, linear = head
    tensors = standardize.running_mean, standardize.running_var, linear.weight
    mean, var, weight = (tensor.detach().cpu().double() for tensor in tensors)
    weight = weight / var.sqrt()
    with torch.no_grad():
        classifier.weight.copy_(weight.float())
        if linear.bias is not None:
            classifier.bias.copy_((linear.bias.detach().cpu().double() - weight @ mean).float())


class LinearProbes(Learner):
    """Linear classifiers that learn side by side from the same features.

    As each head is one Linear layer behind the same standardization, all are computed as one wide layer: 64 of them
    cost little more than one.
    """

    def __init__(self, head: torch.nn.Sequential, data: ProbeData, options: TrainOptions, count: int = 1) -> None:
        self.heads = [copy.deepcopy(head) for _ in range(count)]
        self.data, self.options = data, options
        self.rows: torch.Tensor | None = None  # of the current batch, for subclasses
        self.targets = {split: labeled.targets for split, labeled in data.items()}
        self.device = head[1].weight.device
        self.steps_per_epoch = math.ceil(len(self.targets["train"]) / options.batch_size)

    def param_groups(self, hparams: Sequence[HParams]) -> list[dict]:
        return [group for head, own in zip(self.heads, hparams) for group in param_groups(head, own.lr, own)]

    def train_batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Yield batches whose order and views depend on seed and epoch alone."""
        features, targets = self.data["train"]
        generator = torch.Generator().manual_seed(epoch_seed(self.options.seed, epoch, "order"))
        order = torch.randperm(len(targets), generator=generator).to(targets.device)
        views = torch.randint(len(features), targets.shape, generator=generator).to(targets.device)
        for rows in order.split(self.options.batch_size):
            self.rows = rows
            yield features[views[rows], rows].to(self.device, torch.float32), targets[rows].to(self.device), 1.0

    def forward(self, inputs: torch.Tensor, active: list[int]) -> torch.Tensor:
        standardize, linear = self.heads[active[0]]
        layers = [self.heads[index][1] for index in active]
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if linear.bias is None else torch.cat([layer.bias for layer in layers])
        logits = torch.nn.functional.linear(standardize(inputs), weight, bias)
        return logits.unflatten(1, (len(active), linear.out_features))

    def eval_batches(self, split: str, active: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        features, targets = self.data[split]
        size = max(1, rows_per_chunk(features) // len(active))
        with torch.no_grad():
            for rows, wanted in zip(features[0].split(size), targets.split(size)):
                yield self.forward(rows.to(self.device, torch.float32), active), wanted.to(self.device)

    def state_dict(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in self.heads[index].state_dict().items()}

    def load_state_dict(self, weights: dict[str, torch.Tensor]) -> None:
        self.heads[0].load_state_dict(weights)


def tune(
    head: torch.nn.Sequential, data: ProbeData, base: HParams, count: int, options: TrainOptions, folder: Path
) -> HParams:
    """Train `count` configurations side by side, write tune.csv and tune.png, and return the best configuration on val.

    The first configuration is `base`. The others are spread evenly (a scrambled Sobol sequence) over learning rates of
    1/10 to 10 times that of `base` and weight decays of 1e-2 to 1, both logarithmic, label smoothing of 0, 0.05 and
    0.1, and a quarter, a half and all of its epochs. All see the same batches.
    """
    candidates = [base]
    sampler = torch.quasirandom.SobolEngine(4, scramble=True, seed=options.seed)
    points = sampler.draw(count - 1).tolist() if count > 1 else []
    for rate, decay, smoothing, epochs in points:
        lr, length = base.lr * 10 ** (2 * rate - 1), math.ceil(base.epochs / 2 ** int(3 * epochs))
        candidates.append(HParams(lr, 10 ** (2 * decay - 2), 0.05 * int(3 * smoothing), length))
    start = time.monotonic()
    # The last third of the time is for the final training.
    options = replace(options, deadline=start + (options.deadline - start) * 2 / 3)
    probes = LinearProbes(head, data, options, count)
    runs = fit(probes, [Run(hparams, options.seed) for hparams in candidates], ["val"])
    winner = max(range(count), key=lambda index: selection_key(runs[index].best))
    rows = []
    for index, run in enumerate(runs):
        measured = {"best_epoch": run.best.row["epoch"], "val_loss": run.best.row["val_loss"]}
        measured |= {"val_loss_calibrated": run.best.calibrated_nll, "val_acc": run.best.row["val_acc"]}
        rows.append({**asdict(run.hparams), **measured, "winner": int(index == winner)})
    write_csv(folder / "tune.csv", list(rows[0]), [list(row.values()) for row in rows])
    plot_tuning(folder / "tune.png", rows, rows[winner])
    log(f"tuned: {count} configurations in {time.monotonic() - start:.1f} s")
    log(f"  best on val: {format_hparams(rows[winner])}")
    log(f"  from the command line: {format_hparams(rows[0])}")
    places = zip(("--lr", "--weight-decay"), points[winner - 1]) if winner else ()
    if edges := [option for option, place in places if not 0.1 < place < 0.9]:
        log(f"warning: the best lies at the edge of the range of {' and '.join(edges)}; values beyond may be better")
    n, median = len(data["val"].targets), statistics.median_low(row["val_acc"] for row in rows)
    accuracy = wilson(round(rows[winner]["val_acc"] * n), n)
    if count > 2 and median >= accuracy.low:
        text = f"its accuracy is {accuracy.text('.2%')}, that of the median configuration {median:.2%}"
        log(f"warning: val has too few images ({n:,}) to tell the best from the others: {text}")
    return candidates[winner]


def format_hparams(row: dict) -> str:
    """Format a row of tune.csv as text."""
    return (
        f"lr {row['lr']:.3g}, weight decay {row['weight_decay']:.2g}, label smoothing {row['label_smoothing']:g}, "
        f"{row['epochs']} epochs: val loss {row['val_loss_calibrated']:.4f} (calibrated) acc {row['val_acc']:.4f}"
    )


def plot_tuning(path: Path, rows: list[dict], winner: dict) -> None:
    """Plot calibrated val loss (the criterion) and val accuracy against each hyper-parameter."""
    figure = new_figure(12, 5.6)
    measures = {"val_loss_calibrated": "val loss (nats, calibrated)", "val_acc": "val accuracy"}
    ring = {"s": 120, "facecolors": "none", "edgecolors": "tab:red", "linewidths": 1.8, "label": "winner"}
    rows = [row for row in rows if math.isfinite(row["val_loss_calibrated"])]
    for line, (measure, label) in zip(figure.subplots(2, 4, sharex="col", sharey="row"), measures.items()):
        line[0].set_ylabel(label)
        for axes, setting in zip(line, ("lr", "weight_decay", "label_smoothing", "epochs")):
            values = [row[setting] for row in rows], [row[measure] for row in rows]
            axes.scatter(*values, s=18, alpha=0.7, color="tab:blue")
            axes.scatter(winner[setting], winner[measure], **ring)
            if setting == "lr":
                axes.set_xscale("log")
            elif setting == "weight_decay":
                axes.set_xscale("symlog", linthresh=1e-2)
            if setting in ("lr", "weight_decay"):  # the default labels of these scales are mathematical text
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter("")
                axes.tick_params(axis="x", labelsize=8)
            if measure == "val_acc":
                axes.set_xlabel("learning rate" if setting == "lr" else setting.replace("_", " "))
            axes.grid(alpha=0.25)
    axes.legend()
    save_figure(path, figure)


# ---------------------------------------------------------------- data audit

FOLDS = 5  # classifiers of the audit, each of which is not trained on its fold of the images
SHOWN = 24  # images in audit.png and duplicates.png
MIN_FOR_DEVIATION = 20  # images of a class from which mean and deviation are estimated


class OutOfFoldProbes(LinearProbes):
    """Linear classifiers, one for each fold of the images, that do not learn from the images of their fold."""

    def __init__(
        self, head: torch.nn.Sequential, labeled: LabeledFeatures, folds: torch.Tensor, options: TrainOptions
    ) -> None:
        """`folds` are the numbers, below FOLDS, of the folds of the images [N]."""
        super().__init__(head, {"train": labeled}, options, FOLDS)
        self.folds = folds.to(self.device)

    def forward(self, inputs: torch.Tensor, active: list[int]) -> torch.Tensor:
        logits = super().forward(inputs, active)
        own = self.folds[self.rows.to(self.device), None] == torch.tensor(active, device=self.device)
        return torch.where(own[..., None], logits.detach(), logits)

    def logits(self, features: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the logits [B, FOLDS, C] of all classifiers, on the CPU, for chunks of features [N, D]."""
        with torch.no_grad():
            for rows in features.split(rows_per_chunk(features)):
                yield super().forward(rows.to(self.device, torch.float32), list(range(FOLDS))).cpu()

    def out_of_fold_logits(self) -> torch.Tensor:
        """Return the logits [N, C] of each image from the classifier that has not learned from it, on the CPU."""
        features = self.data["train"].features[0]
        chunks = zip(self.logits(features), self.folds.cpu().split(rows_per_chunk(features)))
        return torch.cat([logits[torch.arange(len(own)), own] for logits, own in chunks])


def audit(model: InferenceModel, dataset: Dataset, data: ProbeData, args: argparse.Namespace) -> dict[str, int]:
    """Look for wrong labels and near-duplicates, and return how many were found; the files are written to OUT.

    Five classifiers judge the images of train and val, each those from which it has not learned (confident learning;
    Northcutt, Jiang and Chuang, JAIR 2021), and their average those of test, from which none has learned. Wrong labels
    and near-duplicates are common in well-known test sets (Northcutt, Athalye and Mueller, NeurIPS Datasets 2021; Barz
    and Denzler, Do we train on test data?, 2020).
    """
    start, splits = time.monotonic(), list(dataset.splits)
    paths, sha256 = [], []
    for split in dataset.splits.values():
        paths, sha256 = paths + split.paths, sha256 + split.sha256
    names = [name for name, split in dataset.splits.items() for _ in split.paths]
    features = torch.cat([data[name].features[:1].cpu() for name in splits], 1)  # of the images as they are
    targets = torch.cat([split.targets for split in dataset.splits.values()])
    learned = torch.tensor([name != "test" for name in names])
    probabilities = judge_images(model, LabeledFeatures(features, targets), sha256, learned, args)
    suspects, suspicious = find_suspects(probabilities, targets, learned)
    numbers = torch.tensor([splits.index(name) for name in names])
    pairs = find_duplicates(features[0], targets, numbers, sha256, model)
    in_tree = [Path(path).relative_to(args.data).as_posix() for path in paths]
    labels = [dataset.classes[target] for target in targets.tolist()]
    images = list(map(AuditedImage, paths, in_tree, names, labels))
    write_suspects(args.out, dataset.classes, images, suspects, suspicious, probabilities)
    write_duplicates(args.out, images, pairs)
    log(
        f"audit: {suspicious.sum()} of {len(paths)} labels are suspicious ({args.out / 'audit.csv'}), and {len(pairs)} "
        f"pairs of near-duplicates are in different splits or classes ({args.out / 'duplicates.csv'}); the data are "
        f"unchanged ({time.monotonic() - start:.1f} s)"
    )
    return {"suspicious_labels": suspicious.sum().item(), "near_duplicates": len(pairs)}


def judge_images(
    model: InferenceModel, images: LabeledFeatures, sha256: list[str], learned: torch.Tensor, args: argparse.Namespace
) -> torch.Tensor:
    """Return class probabilities [N, C] of each image, by classifiers that have not learned from it.

    `learned`, bool [N], is whether an image may be learned from. Equal images are in the same fold.
    """
    features, targets = images
    own = learned.nonzero()[:, 0]
    labeled = LabeledFeatures(features[:, own], targets[own])
    folds = torch.tensor([int(sha256[row][:8], 16) % FOLDS for row in own.tolist()])
    head = standardized_head(model.head, labeled.features)
    ones = torch.ones(model.head.out_features)
    options = TrainOptions(args.batch_size, args.seed, ones)
    probes = OutOfFoldProbes(head, labeled, folds, options)
    hparams = HParams(HEAD_LR, 0.0, 0.0, head_epochs(len(own), args.batch_size))
    fit(probes, [Run(hparams, args.seed)] * FOLDS, [])
    logits = probes.out_of_fold_logits()
    temperature, _ = calibrate(logits, targets[own], ones[targets[own]])
    probabilities = torch.empty(len(targets), logits.shape[1], dtype=torch.float64)
    probabilities[own] = (logits.double() / temperature).softmax(1)
    if len(other := (~learned).nonzero()[:, 0]):
        averages = [average_views(part.unbind(1)) for part in probes.logits(features[0, other])]
        probabilities[other] = (torch.cat(averages) / temperature).softmax(1)
    return probabilities


def find_suspects(
    probabilities: torch.Tensor, targets: torch.Tensor, learned: torch.Tensor
) -> tuple[list[int], torch.Tensor]:
    """Return the images to which another class is suggested, in order, and which of all are suspicious, bool [N].

    An image is suspicious if the suggested class is at least as probable as it is on average for the images that are
    labeled with it (confident learning). The order is by how much more probable it is than the image's own class.
    """
    count = probabilities.shape[1]
    given = probabilities.gather(1, targets[:, None])[:, 0]
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, targets[learned], given[learned])
    sizes = targets[learned].bincount(minlength=count)
    thresholds = sums / sizes
    suggested = probabilities.max(1)
    rows = (suggested.indices != targets).nonzero()[:, 0]
    margins = suggested.values - given
    suspicious = (suggested.indices != targets) & (suggested.values >= thresholds[suggested.indices])
    suspicious &= sizes[targets] >= FOLDS  # the classifiers know nothing about a class with fewer images
    return rows[margins[rows].argsort(descending=True, stable=True)].tolist(), suspicious


class Pair(NamedTuple):
    """Two images that look alike."""

    first: int
    second: int
    similarity: float  # cosine of their features, without the mean of all features


def find_duplicates(
    features: torch.Tensor, targets: torch.Tensor, splits: torch.Tensor, sha256: list[str], model: InferenceModel
) -> list[Pair]:
    """Return near-duplicates in different splits or classes, the most alike first; not equal files of one class.

    Takes features [N, D], and class and split indices [N]. All pairs are compared on the device and in the precision of
    the model, and the most alike of each image once more in float32.

    A pair is a near-duplicate if its similarity stands out from that of the images of both classes with their nearest
    neighbors. Fisher's transformation makes these similarities nearly normal, with a mean and deviation of each class
    (of all, for classes of few images) that are estimated by median and median absolute deviation; only one of N normal
    numbers would exceed the threshold.
    """
    mean = torch.stack([rows.float().sum(0) for rows in features.split(4096)]).sum(0) / len(features)
    vectors = torch.cat([torch.nn.functional.normalize(rows.float() - mean) for rows in features.split(4096)])

    def fisher(others: torch.Tensor) -> torch.Tensor:
        parts = ((vectors[rows] * vectors[others[rows]]).sum(1) for rows in torch.arange(len(vectors)).split(4096))
        return torch.cat(list(parts)).clamp(-0.999999, 0.999999).atanh()

    neighbors, partners = nearest_neighbors(vectors.to(model.device, model.dtype), targets, splits, sha256)
    scores, candidates = fisher(neighbors), fisher(partners)
    thresholds = torch.zeros(int(targets.max()) + 1)
    for label in targets.unique().tolist():
        own = scores[targets == label]
        own = own if len(own) >= MIN_FOR_DEVIATION else scores
        deviation = 1.4826 * (own - own.median()).abs().median()
        thresholds[label] = own.median() + deviation * statistics.NormalDist().inv_cdf(1 - 1 / len(vectors))
    limits = torch.maximum(thresholds[targets], thresholds[targets[partners]])
    pairs = {}
    for row in (candidates > limits).nonzero()[:, 0].tolist():
        both = sorted((row, partners[row].item()))
        pairs[tuple(both)] = Pair(*both, candidates[row].tanh().item())
    return sorted(pairs.values(), key=lambda pair: -pair.similarity)


def nearest_neighbors(
    vectors: torch.Tensor, targets: torch.Tensor, splits: torch.Tensor, sha256: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each of the normalized vectors [N, D] the most alike, and the most alike in another split or class.

    Equal files are left out, in the second result only those of one class. Both results are [N], on the CPU.
    """
    numbers = {digest: number for number, digest in enumerate(dict.fromkeys(sha256))}
    content = torch.tensor([numbers[digest] for digest in sha256]).to(vectors.device)
    targets, splits = targets.to(vectors.device), splits.to(vectors.device)
    neighbors, partners = [], []
    with Progress("compare", len(vectors)) as progress:
        for rows in torch.arange(len(vectors), device=vectors.device).split(512):
            similarities = vectors[rows] @ vectors.T
            equal, same_class = content[rows, None] == content, targets[rows, None] == targets
            same_group = same_class & (equal | (splits[rows, None] == splits))
            partners.append(similarities.masked_fill(same_group, -1).max(1).indices)
            neighbors.append(similarities.masked_fill_(equal, -1).max(1).indices)
            progress.update(len(rows))
    return torch.cat(neighbors).cpu(), torch.cat(partners).cpu()


class AuditedImage(NamedTuple):
    """An image of the data set."""

    path: str
    path_in_tree: str  # as in splits.csv
    split: str
    label: str  # name of its class

    def picture(self, note: str = "") -> tuple[str, str]:
        """Return the path, and a caption with name, split, class and a note."""
        name = printable(Path(self.path).name)[-24:]
        return self.path, f"{name} ({self.split})\nclass: {printable(self.label)}{note}"


def write_suspects(
    out: Path,
    classes: list[str],
    images: list[AuditedImage],
    suspects: list[int],
    suspicious: torch.Tensor,
    probabilities: torch.Tensor,
) -> None:
    """Write audit.csv, and draw the most suspicious images in audit.png."""
    header = "path split class suggested probability_of_class probability_of_suggested suspicious"
    rows, pictures, index = [], [], {name: number for number, name in enumerate(classes)}
    for number in suspects:
        image, suggested = images[number], classes[probabilities[number].argmax()]
        own, other = (round(probabilities[number, index[name]].item(), 6) for name in (image.label, suggested))
        labels = image.label, suggested, own, other, int(suspicious[number])
        rows.append((image.path_in_tree, image.split, *labels))
        if suspicious[number]:
            pictures.append(image.picture(f"\nsuggested: {printable(suggested)} {other:.1%}"))
    title = f"{min(SHOWN, len(pictures))} of {len(pictures)} suspicious labels"
    write_findings(out / "audit.csv", header.split(), rows, pictures, title)


def write_duplicates(out: Path, images: list[AuditedImage], pairs: list[Pair]) -> None:
    """Write duplicates.csv, and draw its first pairs in duplicates.png."""
    header = "path other_path split other_split class other_class similarity"
    rows, pictures = [], []
    for pair in pairs:
        one, other = images[pair.first], images[pair.second]
        paths = one.path_in_tree, other.path_in_tree
        rows.append((*paths, one.split, other.split, one.label, other.label, round(pair.similarity, 6)))
        pictures += [one.picture(), other.picture()]
    title = f"{min(SHOWN // 2, len(rows))} of {len(rows)} pairs of near-duplicates, side by side"
    write_findings(out / "duplicates.csv", header.split(), rows, pictures, title)


def write_findings(path: Path, header: list[str], rows: list[tuple], pictures: list, title: str) -> None:
    """Write a CSV file, and draw the first pictures beside it; without any, remove those of an earlier audit."""
    write_csv(path, header, rows)
    path.with_suffix(".png").unlink(missing_ok=True)
    if pictures:
        draw_images(path.with_suffix(".png"), pictures[:SHOWN], columns=6, title=title)


# ---------------------------------------------------------------- fine-tuning: the network on images


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented while a network is fine-tuned."""

    views: Sequence[View]  # one of which is drawn for each image
    num_classes: int
    strong: bool = False  # whether to add the strong augmentation of `augment_batch`
    crop: bool = False  # whether that includes random crops
    mix: bool = False  # whether it includes CutMix and MixUp


def finetune(
    model: InferenceModel, dataset: Dataset, data: ProbeData, args: argparse.Namespace, files: RunFiles, deadline: float
) -> TrainingResult:
    """Train the classifier, then the network or its last stage with it, and write the best weights into the model.

    All processes take part.
    """
    hparams = HParams(args.lr, args.weight_decay, args.label_smoothing, args.epochs)
    options, count = train_options(args, dataset, deadline), len(dataset.splits["train"])
    crop = args.augment != "dihedral"  # images from above have one scale, which crops would change
    mix = count >= MIX_MIN_IMAGES
    augmentation = Augmentation(VIEWS[args.augment], len(dataset.classes), args.strong, crop, mix)
    probe_hparams = replace(hparams, lr=HEAD_LR, epochs=head_epochs(count, args.batch_size))
    head = broadcast_from_rank0(lambda: train_head_alone(model, data, probe_hparams, options))
    data.clear()  # to free memory
    learner = FineTuner(model, head, dataset, replace(options, augmentation=augmentation))
    before = learner.state_dict(0)
    save = functools.partial(files.record_epoch, []) if RANK == 0 else None
    try:
        (run,) = fit(learner, [Run(hparams, args.seed)], list(dataset.splits), files.unfinished, save)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = f"--batch-size {args.batch_size // 2}" if args.batch_size > WORLD_SIZE else "a smaller --image-size"
        batches = f"batches of {args.batch_size} images of {model.preprocessing['size']} pixels"
        raise UserError(f"not enough memory on {model.device} for {batches}: try {advice}") from None
    run = interpolate(learner, before, run)
    run.best.row["head_epochs"] = probe_hparams.epochs
    learner.load_state_dict(run.best.weights)
    trained = learner.updated_model()
    fold_standardization(learner.network.head, trained.head)
    del learner, before  # to free memory
    log("computing features of some images, to calibrate probabilities and to recognize unfamiliar images")
    requests = {"train": FeatureRequest(sample_evenly(dataset.splits["train"]), VIEWS["none"])}
    if "val" in dataset.splits:
        requests["val"] = FeatureRequest(sample_evenly(dataset.splits["val"]), augmentation.views)
    samples = label_features(trained, requests, FeatureCache(None, {}), args)
    if RANK:
        return TrainingResult([])
    temperature = run.best.temperature
    if "val" in samples and len(augmentation.views) > 1:
        temperature = calibrate_views(trained, samples["val"], options)
    return TrainingResult([run], temperature, fit_familiarity(samples["train"].features, samples.get("val")))


def interpolate(learner: FineTuner, before: dict[str, torch.Tensor], run: Run) -> Run:
    """Return the run with the best weights on the line from the network before fine-tuning to its best epoch.

    The weights are (1 - alpha) * before + alpha * after, with the alpha that is best on val (WiSE-FT; Wortsman et al.,
    CVPR 2022); alpha 0 is the classifier alone, so that fine-tuning never ends worse on val than it began. Without val,
    alpha is 1. If the best epoch lacks its numbers on test, they are measured.
    """
    row, splits = run.best.row, list(learner.targets)
    after = {key: value.to(learner.device) for key, value in run.best.weights.items()}  # on the CPU if read from a file

    def measure(alpha: float, splits: Sequence[str]) -> Epoch:
        # Integers, such as the number of batches that BatchNorm has seen, cannot be interpolated.
        pairs = ((key, before[key], value) for key, value in after.items())
        weights = {key: torch.lerp(a, b, alpha) if b.is_floating_point() else b for key, a, b in pairs}
        learner.load_state_dict(weights)
        measured = {split: evaluate(learner, split, [0])[0] for split in splits}
        return replace(make_epoch(row["epoch"], row["lr"], measured, row["seconds"]), weights=weights)

    if "test" in splits and row["test_loss"] is None:
        on_test = measure(1, ["test"]).row
        row |= {key: on_test[key] for key in ("test_loss", "test_acc")}
        row["measured"] |= on_test["measured"]
    history = [row if other["epoch"] == row["epoch"] else other for other in run.history]
    best, keys = run.best, {1: selection_key(run.best)}
    if "val" in splits:
        # Between two networks with different BatchNorm statistics, those of a mixture are unknown.
        alphas = (0,) if any(map(is_batchnorm, learner.in_train_mode)) else ALPHAS
        keys |= {alpha: selection_key(measure(alpha, ["val"])) for alpha in alphas}
        alpha = max(keys, key=keys.get)
        losses = ", ".join(f"{alpha:g}: {-keys[alpha]:.4f}" for alpha in sorted(keys))
        log(f"calibrated val loss, from the classifier alone (alpha 0) to fine-tuned (1): {losses}; chosen: {alpha:g}")
        if alpha != 1:
            best = measure(alpha, splits)
            log(f"with alpha {alpha:g}: {format_metrics(best.row)}")
        best = replace(best, row=best.row | {"alpha": alpha})
    return replace(run, history=history, best=best)


def train_head_alone(
    model: InferenceModel, data: ProbeData, hparams: HParams, options: TrainOptions
) -> torch.nn.Sequential:
    """Train the classifier on the frozen network's features, as the starting point of fine-tuning."""
    head = standardized_head(model.head, data["train"].features)
    options = replace(options, warmup=0, patience=None, deadline=math.inf)
    splits = [split for split in data if split != "train"]
    (run,) = fit(LinearProbes(head, data, options), [Run(hparams, options.seed)], splits)
    log(f"the classifier alone, {hparams.epochs} epochs: {format_metrics(run.best.row)}")
    head.load_state_dict(run.best.weights)
    return head.cpu()


def build_network(backbone: torch.nn.Module, head: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Join a backbone and a classifier: a module that maps normalized images [B, 3, S, S] to logits [B, C].

    The backbone computes in `dtype` where autocast allows it, the classifier in float32.
    """

    class FineTunedNetwork(torch.nn.Module):  # defined inside the function, because torch is imported lazily
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = backbone, head

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                features = self.backbone(images)
            return self.head(features.float())

    return FineTunedNetwork()


class FineTuner(Learner):
    """The network, or its last stage, with its classifier, trained on images.

    `network` is trained; `parallel_network` wraps it for several processes; `model` is the inference model that
    evaluates it.
    """

    distributed = True

    def __init__(
        self, model: InferenceModel, head: torch.nn.Sequential, dataset: Dataset, options: TrainOptions
    ) -> None:
        self.device, self.options, self.test_every = model.device, options, options.test_every
        self.targets = {name: split.targets.to(self.device) for name, split in dataset.splits.items()}
        count = len(dataset.splits["train"])
        # Every process gets at least one image per step.
        self.steps_per_epoch = min(math.ceil(count / options.batch_size), max(1, count // WORLD_SIZE))
        model.release_backbone()
        self.pixels = PixelStore(dataset.splits, model, options.workers)
        self.model = model
        self.model_is_current = False
        backbone = model.copy_backbone().eval().to(self.device, memory_format=torch.channels_last)
        backbone.requires_grad_(options.finetune == "all")
        names = [name for name, _ in backbone.named_modules() if name]
        if options.finetune == "last":
            names = last_stage_modules(backbone, model.preprocessing["size"])
        trainable = [backbone.get_submodule(name).requires_grad_(True) for name in names]
        log_trainable(backbone, names)
        without_norms = [module for module in trainable if not is_batchnorm(module)]
        # Pre-trained BatchNorm keeps its statistics: it stays in eval mode.
        self.in_train_mode = trainable if options.learn_statistics else without_norms
        self.smallest = count // self.steps_per_epoch // WORLD_SIZE
        if self.smallest < 1 + (len(self.in_train_mode) > len(without_norms)):
            raise UserError(
                f"a step has {self.smallest} images in some process, too few to train on (BatchNorm with random "
                "weights needs 2): raise --batch-size, or start fewer processes"
            )
        self.network = build_network(backbone, head.to(self.device).requires_grad_(True), model.dtype)
        self.parallel_network = self.network
        if WORLD_SIZE > 1:
            parallel = torch.nn.parallel.DistributedDataParallel
            self.parallel_network = parallel(self.network, gradient_as_bucket_view=True)
            self.parallel_network.broadcast_buffers = False  # `updated_model` does that

    def param_groups(self, hparams: Sequence[HParams]) -> list[dict]:
        (own,) = hparams
        backbone = param_groups(self.network.backbone, self.options.backbone_lr, own)
        return backbone + param_groups(self.network.head, own.lr, own)

    def train_batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Yield normalized images; all that is random depends on seed, epoch and process alone."""
        targets = self.targets["train"]
        generator = torch.Generator().manual_seed(epoch_seed(self.options.seed, epoch, "order"))
        order = torch.randperm(len(targets), generator=generator)
        # All indices are sent at once, because sending those of each step would synchronize the GPU.
        steps = order.to(self.device).tensor_split(self.steps_per_epoch)
        own = [rows[RANK::WORLD_SIZE] for rows in steps]
        torch.manual_seed(epoch_seed(self.options.seed, epoch, f"process {RANK}"))  # for dropout and augmentation
        for module in self.in_train_mode:
            module.training = True
        self.model_is_current = False
        with Progress(f"epoch {epoch}", len(targets)) as progress:
            for rows, own_rows, pixels in zip(steps, own, self.pixels.batches("train", own)):
                own_targets = targets[own_rows]
                images, wanted = augment_batch(pixels, own_targets, self.options.augmentation, self.model.normalize)
                images = images.contiguous(memory_format=torch.channels_last)
                yield images, wanted, len(own_rows) * WORLD_SIZE / len(rows)
                progress.update(len(rows))

    def forward(self, inputs: torch.Tensor, active: list[int]) -> torch.Tensor:
        return self.parallel_network(inputs)[:, None]

    def clip_gradients(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip_norm)

    def save_memory(self) -> bool:
        """Drop the pixels kept on the device; then halve the batches for which gradients are computed."""
        if self.model.free_memory():
            log("memory is short: images are read from their files again in each epoch")
        elif WORLD_SIZE == 1 and self.smallest >= 4 * self.parts:  # BatchNorm needs two images
            self.parts *= 2
            log(f"memory is short: gradients are computed in {self.parts} parts of each batch")
        else:
            return False
        return True

    def updated_model(self) -> InferenceModel:
        """Return the inference model, with the current weights of the backbone."""
        if not self.model_is_current:
            for buffer in self.network.buffers() if WORLD_SIZE > 1 else ():
                torch.distributed.broadcast(buffer, 0)  # BatchNorm statistics that are learned differ between processes
            self.network.eval()
            self.model.load_backbone(self.network.backbone.state_dict())
            self.model_is_current = True
        return self.model

    def eval_batches(self, split: str, active: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this process's part of the images; for train, only of a sample."""
        model, targets = self.updated_model(), self.targets[split]
        every = math.ceil(len(targets) / TRAIN_SAMPLE) if split == "train" else 1
        rows = torch.arange(0, len(targets), every, device=self.device)[RANK::WORLD_SIZE]
        chunks = [chunk for chunk in rows.split(model.batch_size) if len(chunk)]
        with torch.no_grad():
            for chunk, pixels in zip(chunks, self.pixels.batches(split, chunks)):
                yield self.network.head(model.forward_features(pixels))[:, None], targets[chunk]

    def state_dict(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in self.network.state_dict().items()}

    def load_state_dict(self, weights: dict[str, torch.Tensor]) -> None:
        update_weights(self.network, weights)
        self.model_is_current = False


def log_trainable(backbone: torch.nn.Module, names: list[str]) -> None:
    """Log which modules of the network are trained, and how many parameters that is."""
    total = sum(parameter.numel() for parameter in backbone.parameters())
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    with_weights = [name for name in names if any(p.requires_grad for p in backbone.get_submodule(name).parameters())]
    outermost = [name for name in with_weights if not any(name.startswith(f"{other}.") for other in names)]
    log(f"fine-tuning {', '.join(outermost)}: {trained:,} of the network's {total:,} parameters, and the classifier")


def last_stage_modules(backbone: torch.nn.Module, size: int) -> list[str]:
    """Return the names of the modules of a network's last stage, and of what follows it.

    A stage is a sequence of modules that work at one resolution. The last stage begins where feature maps reach their
    smallest side, among layers with weights; modules that shrink a map to less than a third, such as pooling branches,
    do not count. The maps of vision transformers do not shrink: there it is the last quarter of the blocks.
    """
    names = [name for name, _ in backbone.named_modules() if name]
    if isinstance(backbone, torchvision.models.VisionTransformer):
        blocks = [f"encoder.layers.{name}" for name, _ in backbone.encoder.layers.named_children()]
        return names[names.index(blocks[-math.ceil(len(blocks) / 4)]) :]
    sides: dict[str, tuple[int, int]] = {}  # of the input and output maps of each module

    def record(name: str, _: torch.nn.Module, inputs: tuple, output: Any) -> None:
        maps = [value for value in (*inputs, output) if torch.is_tensor(value) and value.dim() == 4]
        if len(maps) == 2:
            sides[name] = maps[0].shape[2], maps[1].shape[2]

    hooks = [backbone.get_submodule(name).register_forward_hook(functools.partial(record, name)) for name in names]
    size = max(size, 224)  # maps of smaller images shrink to single pixels before the end
    with torch.no_grad():
        backbone.eval()(torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device))
    for hook in hooks:
        hook.remove()
    layers = [name for name in sides if any(True for _ in backbone.get_submodule(name).parameters(recurse=False))]
    smallest = min(sides[name][1] for name in layers if sides[name][1] > 1)  # those of 1x1 are squeeze-and-excitation
    stage = (name for name in names if name in sides and sides[name][1] == smallest)
    return names[names.index(next(name for name in stage if sides[name][0] < 3 * smallest)) :]


class PixelStore:
    """The pixels of all splits, kept on the device at the resolution of the files; read in each pass if too large."""

    def __init__(self, splits: dict[str, Split], model: InferenceModel, workers: int | None) -> None:
        self.splits, self.model, self.workers = splits, model, workers
        if workers is None and model.device.type == "cpu":
            self.workers = max(1, (os.cpu_count() or 1) // 4)  # leave the other cores for the computation
        # Uint8 [N, 3, s, s] of each split; dropped if the memory of the device is used up.
        self.resident = model.expendable
        room = usable_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if model.device.type == "cuda":
            room = torch.cuda.mem_get_info(model.device)[0] / 2
        for name, split in splits.items():
            pixels = self.load(split, room)
            if pixels is not None:
                self.resident[name] = pixels
                room -= pixels.nbytes

    def load(self, split: Split, room: float, resized: bool = False) -> torch.Tensor | None:
        """Return the pixels of a split, uint8 [N, 3, s, s] on the device; None if they take more than `room` bytes."""
        chunks, pixels = torch.arange(len(split)).split(self.model.batch_size), None
        for rows, part in zip(chunks, self.read(split, chunks)):
            if resized:
                part = resize(part, self.model.preprocessing["size"], self.model.preprocessing["interpolation"])
            if pixels is None:
                if len(split) * part[0].nbytes > room:
                    return None
                pixels = torch.empty(len(split), *part.shape[1:], dtype=torch.uint8, device=self.model.device)
            if part.shape[1:] != pixels.shape[1:]:  # the sizes of the files differ: start again
                return self.load(split, room, resized=True)
            pixels[rows] = part
        return pixels

    def read(self, split: Split, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the pixels [B, 3, s, s] of each chunk of rows [B] of a split, read from their files."""
        rows = iter(torch.cat(list(chunks)).tolist())  # all at once, because each copy waits for a GPU
        images = ((split.paths[row], split.sha256[row]) for row in rows)
        batches = (list(islice(images, len(chunk))) for chunk in chunks)
        for batch in read_batches(batches, self.model.preprocessing, self.workers, read_known):
            yield batch.complete_pixels()

    def batches(self, name: str, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the pixels [B, 3, S, S] of each chunk of rows [B], on the device."""
        for number, rows in enumerate(chunks):
            if name not in self.resident:
                yield from map(self.model.load_pixels, self.read(self.splits[name], chunks[number:]))
                return
            yield self.model.load_pixels(self.resident[name][rows])


def augment_batch(
    pixels: torch.Tensor, targets: torch.Tensor, augmentation: Augmentation, normalize: Callable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment uint8 pixels [B, 3, S, S] with class indices [B]: normalized images, and indices or probabilities [B, C].

    Each image is turned into one of the views, drawn at random. Strong augmentation adds random crops of at least half
    of the area if `crop` is set, TrivialAugmentWide (Mueller and Hutter, ICCV 2021), random erasing (Zhong et al., AAAI
    2020) with probability 1/4, and, if `mix` is set, CutMix (Yun et al., ICCV 2019) or MixUp (Zhang et al., ICLR 2018)
    in half of the batches. The batch is cut into STRONG_PARTS parts, whose images share the random parameters of the
    transforms; CutMix and MixUp are drawn once for the whole batch. As batches are shuffled, the parts differ in each
    epoch. To add a transform, put it into one of the two lists below, and name it in AUGMENT_HELP.
    """
    views = torch.tensor(augmentation.views)
    turns, mirrored = views[torch.randint(len(views), (len(pixels),))].unbind(1)
    # Mirror first; then a quarter turn if their number is odd, then a half turn: three selections serve all views.
    selections: list[tuple[View, Callable]] = [
        ((0, True), lambda turns, mirrored: mirrored > 0),
        ((1, False), lambda turns, mirrored: turns % 2 > 0),
        ((2, False), lambda turns, mirrored: turns > 1),
    ]
    for view, is_selected in selections:
        if any(is_selected(*own) for own in augmentation.views):
            mask = to_device(is_selected(turns, mirrored), pixels.device)[:, None, None, None]
            pixels = torch.where(mask, apply_view(pixels, view), pixels)
    if not augmentation.strong:
        return normalize(pixels), targets
    side = pixels.shape[-1]
    crops = [v2.RandomResizedCrop(side, scale=(0.5, 1), antialias=True)] if augmentation.crop else []
    pixel_transforms = v2.Compose([*crops, trivial_augment(side)])
    image_transforms = v2.Compose([v2.RandomErasing(p=0.25)])  # of normalized images
    options = {"num_classes": augmentation.num_classes}
    mix = v2.RandomApply([v2.RandomChoice([v2.CutMix(**options), v2.MixUp(alpha=0.2, **options)])], p=0.5)
    size = math.ceil(len(pixels) / STRONG_PARTS)
    images = normalize(torch.cat([pixel_transforms(part) for part in pixels.split(size)]))
    images = torch.cat([image_transforms(part) for part in images.split(size)])
    return mix(images, targets) if augmentation.mix else (images, targets)


def trivial_augment(side: int) -> v2.Transform:
    """Return TrivialAugmentWide that moves images of this side by at most a seventh.

    torchvision's moves them by up to 32 pixels: a seventh of 224, but half of a tile of 64.
    """
    transform = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)

    # The attribute is private, but the same from torchvision 0.21 to 0.29; a test notices if it changes.
    bounded = dict.fromkeys(("TranslateX", "TranslateY"), (lambda bins, *_: torch.linspace(0, side / 7, bins), True))
    transform._AUGMENTATION_SPACE = {**transform._AUGMENTATION_SPACE, **bounded}
    return transform


# ---------------------------------------------------------------- results


@dataclass
class RunFiles:
    """The files in the output folder of a run: model.pt, history.csv and last.pt."""

    folder: Path
    settings: dict  # everything that affects the result, see `run_settings`
    unfinished: UnfinishedRun | None  # the run that is continued
    live_history: bool  # whether to write history.csv after each epoch; not with --only-if-better

    def record_epoch(self, completed: list[Run], run: Run, epoch: Epoch, optimizer: dict, weights: dict) -> None:
        """Log an epoch, and save the state of the run; `completed` are the runs of earlier seeds."""
        row, notes = epoch.row, ""
        if row["val_loss"] is not None:
            best = "  best so far" if run.best.row["epoch"] == row["epoch"] else ""
            notes = f"  calibrated val loss {epoch.calibrated_nll:.4f}{best}"
        log(f"epoch {row['epoch']}/{run.hparams.epochs}  {format_metrics(row)}{notes}")
        guessing = math.log(len(self.settings["classes"]))
        if row["epoch"] == 1 and row["train_loss"] > 10 * guessing:
            log(f"warning: the loss is far above that of guessing, {guessing:.2f}: lower --lr, or --backbone-lr")
        with defer_signals():
            if self.live_history:
                self.write_history(run)
            state = {"completed": [run.to_dict() for run in completed], "run": run.to_dict()}
            self.write_last({**state, "optimizer": optimizer, "weights": weights, "finished": False})

    def publish(self, checkpoint: dict, run: Run, args: argparse.Namespace) -> None:
        """Replace model.pt and history.csv by those of the finished model."""
        with defer_signals():
            write_torch_file(self.folder / "model.pt", checkpoint)
            self.write_history(run)
            stale = () if args.tune else ("tune.csv", "tune.png")  # left behind by an earlier model
            stale += () if args.audit else ("audit.csv", "audit.png", "duplicates.csv", "duplicates.png")
            for name in stale:
                (self.folder / name).unlink(missing_ok=True)
        if (self.folder / "report").is_dir():
            log(f"{self.folder / 'report'} is the report of an earlier model; evaluate.py makes that of the new one")

    def write_history(self, run: Run) -> None:
        rows = [[row[name] for name in HISTORY_FIELDS] for row in run.history]
        write_csv(self.folder / "history.csv", HISTORY_FIELDS, rows)

    def write_last(self, state: dict) -> None:
        header = {"format": RUN_FORMAT, "version": RUN_VERSION, "settings": self.settings}
        write_torch_file(self.folder / "last.pt", header | state)


def checkpoint_content(
    model: InferenceModel, dataset: Dataset, run: Run, result: TrainingResult, arguments: dict
) -> dict:
    """Return the content of model.pt: everything that evaluate.py and predict.py need."""
    network, best = model.network, run.best
    args = plain_values(arguments) | asdict(run.hparams) | {"seed": run.seed, "precision": model.precision}
    if args["tune"]:
        args["changed"] = args["changed"] | asdict(run.hparams)
    hashes = {"train_hashes": network.train_hashes, "val_hashes": network.val_hashes}  # of an earlier fine-tuning
    for name in ("train", "val"):
        if name in dataset.splits:
            hashes[f"{name}_hashes"] = torch.cat([hashes[f"{name}_hashes"], short_hashes(dataset.splits[name].sha256)])
    return {
        "format": CHECKPOINT_FORMAT,
        "version": FORMAT_VERSION,
        "arch": network.arch,
        "model_kwargs": network.model_kwargs,
        "classes": dataset.classes,
        "preprocessing": network.preprocessing,
        "native_size": native_size(dataset.splits["train"]),
        "temperature": best.temperature,
        "temperature_tta": result.temperature_tta,
        "views": VIEWS[arguments["augment"]],
        "metrics": best.row,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "familiarity": result.familiarity,
        **hashes,
        "state_dict": network.model.cpu().state_dict(),
        "args": args,
        "versions": {"python": platform.python_version(), **library_versions()},
    }


def native_size(train: Split) -> int | None:
    """Return the median of the shorter sides of the images in pixels, from the headers of an evenly spaced sample."""
    sides = []
    for path in sample_evenly(train).paths:
        with contextlib.suppress(Exception), open_image(path) as image:  # it may have been moved during the training
            sides.append(min(image.size))
    return statistics.median_low(sides) if sides else None


def format_metrics(row: dict) -> str:
    """Format the losses and accuracies of a row of the history as text."""
    measured = [split for split in SPLITS if row[f"{split}_loss"] is not None]
    return "  ".join(f"{split} loss {row[f'{split}_loss']:.4f} acc {row[f'{split}_acc']:.4f}" for split in measured)


def summarize_seeds(runs: Sequence[Run]) -> dict:
    """Return mean and standard deviation of the accuracies over several seeds, and log them."""
    if len(runs) < 2:
        return {}
    best = best_run(runs)
    summary = {"seeds": len(runs), "best_seed": best.seed}
    reason = "there is no val to choose on" if best.best.row["val_acc"] is None else "lowest calibrated loss on val"
    log(f"chosen: seed {best.seed} ({reason})")
    for split in ("val", "test"):
        values = [run.best.row[f"{split}_acc"] for run in runs]
        if None not in values:
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            summary |= {f"{split}_acc_mean": mean, f"{split}_acc_std": deviation}
            log(f"{split} accuracy over {len(values)} seeds: {mean:.4f} ± {deviation:.4f}")
    return summary


if __name__ == "__main__":
    sys.exit(main())
