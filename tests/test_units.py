"""The functions of common.py and train.py that can be checked alone: arithmetic, files, signals, and validation."""

import argparse
import copy
import csv
import functools
import hashlib
import io
import math
import os
import signal
import time
import zipfile

import pytest
import torch
from conftest import command, names
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import common
import train
from common import UserError


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_epoch(number, nll, val_loss):
    """Return an epoch with its number, calibrated val loss and val loss; the val loss is None without val."""
    return train.Epoch({"epoch": number, "val_loss": val_loss}, nll, 1.0)


HPARAMS = train.HParams(lr=0.1, weight_decay=0.01, label_smoothing=0.0, epochs=4)


# ---------------------------------------------------------------- schedule and selection


def test_learning_rate_follows_a_cosine():
    factors = [train.lr_factor(epochs, 8, 0) for epochs in (0, 2, 4, 8, 9)]
    assert factors == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0])


def test_learning_rate_warms_up():
    factors = [train.lr_factor(epochs, 10, 2) for epochs in (0, 0.5, 1, 2, 6, 10)]
    assert factors == pytest.approx([0.01, 0.25, 0.5, 1, 0.5, 0])


def test_warmup_takes_at_most_half():
    for epochs in (0, 0.5, 1, 2, 3, 4):
        assert train.lr_factor(epochs, 4, 100) == train.lr_factor(epochs, 4, 2)


def test_selection_prefers_the_lowest_calibrated_loss():
    assert train.selection_key(make_epoch(1, 0.5, 0.6)) < train.selection_key(make_epoch(2, 0.4, 0.9))


def test_selection_takes_the_last_epoch_without_val():
    assert train.selection_key(make_epoch(1, 1.0, None)) < train.selection_key(make_epoch(2, 1.0, None))


def test_best_run_has_the_best_epoch():
    runs = [train.Run(HPARAMS, seed, [], make_epoch(1, nll, nll)) for seed, nll in enumerate((0.5, 0.3, 0.4))]
    assert train.best_run(runs).seed == 1


def test_patience():
    def continues(epochs, best, patience):
        run = train.Run(HPARAMS, 0, [{}] * epochs, make_epoch(best, 1.0, 1.0))
        return train.has_patience(run, train.TrainOptions(8, 0, torch.ones(2), patience=patience))

    assert continues(9, 1, None) and continues(4, 2, 3) and not continues(5, 2, 3)
    assert train.has_patience(train.Run(HPARAMS, 0), train.TrainOptions(8, 0, torch.ones(2), patience=1))


def test_epochs_until_a_deadline():
    runs = [train.Run(HPARAMS, 0, [{"seconds": seconds}]) for seconds in (0.5, 1.0)]
    assert train.epochs_until(math.inf, runs, 3) == math.inf
    assert train.epochs_until(time.monotonic(), [train.Run(HPARAMS, 0)], 0) == math.inf  # the first epoch always runs
    assert train.epochs_until(time.monotonic() + 10.9, runs, 3) == 3 + 10  # with a margin of 5 %
    assert train.epochs_until(time.monotonic() - 1, runs, 3) == 3


# ---------------------------------------------------------------- loss and optimizer


@pytest.mark.parametrize("weights", [torch.ones(4), torch.tensor([0.5, 2.0, 1.0, 3.0])])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_cross_entropies_agree_with_torch(weights, kind):
    """Each image counts by the weight of its own class, whatever the smoothing."""
    logits, smoothing = random_tensor(12, 3, 4), torch.tensor([0.0, 0.1, 0.3])
    targets = torch.arange(12) % 4 if kind == "indices" else random_tensor(12, 4, seed=1).softmax(1)
    losses = train.cross_entropies(logits, targets, smoothing, weights)
    image_weights = weights[targets] if kind == "indices" else (targets * weights).sum(1)
    for model, share in enumerate(smoothing.tolist()):
        plain = nn.functional.cross_entropy(logits[:, model], targets, reduction="none", label_smoothing=share)
        assert losses[model].item() == pytest.approx((image_weights * plain).mean().item(), abs=1e-6)


def test_class_weights_do_not_turn_smoothing_into_rare_classes():
    """Nine classes of 1,000 images, one of 20: a common image ends with 0.01 for the rare class, not with 0.34."""
    weights = train.class_weights(torch.arange(10).repeat_interleave(torch.tensor([1000] * 9 + [20])), "balanced")
    logits = torch.zeros(1, 1, 10, requires_grad=True)
    for _ in range(400):
        loss = train.cross_entropies(logits, torch.tensor([0]), torch.tensor([0.1]), weights)
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        logits = (logits - 2 * slope).detach().requires_grad_()
    assert logits.softmax(2)[0, 0].tolist() == pytest.approx([0.91] + [0.01] * 9, abs=1e-3)


def test_balanced_weights_give_classes_the_same_total():
    counts = torch.tensor([6, 3, 1])
    targets = torch.arange(3).repeat_interleave(counts)
    weights = train.class_weights(targets, "balanced")
    assert (weights * counts).tolist() == pytest.approx([10 / 3] * 3)
    assert weights[targets].mean().item() == pytest.approx(1)


@pytest.mark.parametrize(
    "arch, special", [("resnet18", "bn1.weight"), ("swin_t", "bias_table"), ("convnext_tiny", "scale")]
)
def test_weight_decay_leaves_out_biases_norms_and_scales(arch, special):
    model = common.build_model(arch, {}, "meta")
    names = {parameter: name for name, parameter in model.named_parameters()}
    with_decay, without = train.param_groups(model, 0.5, HPARAMS)
    for group, decay in ((with_decay, 0.01), (without, 0)):
        assert (group["weight_decay"], group["lr"], group["peak"], group["epochs"]) == (decay, 0.5, 0.5, 4)
    assert len(with_decay["params"]) + len(without["params"]) == len(names)
    assert all(names[p].endswith("weight") and p.dim() > 1 for p in with_decay["params"])
    assert any(special in names[p] for p in without["params"])
    matrices = [names[p] for p in without["params"] if p.dim() > 1]
    assert all("bias" in name or "scale" in name for name in matrices)


def test_param_groups_leave_out_frozen_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert [len(group["params"]) for group in train.param_groups(model, 0.1, HPARAMS)] == [1, 1]


def test_loss_that_is_not_finite_names_the_learning_rates():
    parameters = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [{"params": [parameter], "lr": lr} for parameter, lr in zip(parameters, (0.5, 0.002))]
    optimizer = torch.optim.AdamW(groups)
    train.check_finite([1.0, 0.0], 3, optimizer)
    for loss in (math.nan, math.inf):
        with pytest.raises(UserError, match=f"{loss} in epoch 3.* 0.002 and 0.5.*lower --lr"):
            train.check_finite([1.0, loss], 3, optimizer)


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("weighted", [False, True])
def test_calibrate_finds_the_best_temperature(weighted):
    """Compare with a search over a fine grid, with the prior of the temperature and the effective number of images."""
    targets = torch.arange(300) % 5
    weights = 1 + 9 * (targets == 0) if weighted else torch.ones(300)
    for scale, count in ((0.3, 300), (1, 300), (6, 300), (80, 300), (0.1, 300), (4, 20), (0.1, 20)):
        logits = scale * (random_tensor(300, 5) + 1.5 * nn.functional.one_hot(targets, 5))[:count]
        rows = torch.arange(count)
        temperature, loss = train.calibrate(logits, targets[:count], weights[:count])
        effective = weights[:count].sum() ** 2 / weights[:count].square().sum()
        grid = torch.logspace(-3, 3, 6001, dtype=torch.float64)
        shares = (logits / grid[:, None, None]).log_softmax(2)[:, rows, targets[:count]]
        losses = -(shares * weights[:count]).sum(1) / weights[:count].sum()
        best = (losses + grid.log().square() / (2 * 0.5**2 * effective)).argmin()
        assert temperature == pytest.approx(grid[best].item(), rel=0.01)
        assert loss == pytest.approx(losses[best].item(), rel=0.01)


def test_temperature_of_a_tiny_val():
    """Logits that are calibrated, so that the true temperature is 1: 30 images do not make the model too sure."""

    def temperatures(count, repeats):
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(repeats, count, 10, generator=generator)
        targets = torch.multinomial(logits.softmax(2).flatten(0, 1), 1, generator=generator).view(repeats, count)
        return torch.tensor([train.calibrate(*pair, torch.ones(count))[0] for pair in zip(logits, targets)])

    few = temperatures(30, 200)
    assert 0.4 < few.min() and 0.6 < few.quantile(0.05) and few.quantile(0.95) < 1.6
    assert temperatures(1000, 20).sub(1).abs().max() < 0.15


def test_calibrate_without_errors_and_without_numbers():
    targets = torch.arange(3)
    temperatures = [train.calibrate(scale * torch.eye(3), targets, torch.ones(3))[0] for scale in (1, 4, 16)]
    assert 0.3 < temperatures[0] < 1 and 0.3 < min(temperatures) and temperatures[2] == pytest.approx(1, abs=0.01)
    assert train.calibrate(torch.full((3, 3), math.nan), targets, torch.ones(3)) == (1.0, math.inf)
    # The bounds of `invalid_fields`: losses in the thousands, and many images without an error.
    many = torch.arange(30_000) % 3
    assert 99 < train.calibrate(1e6 * random_tensor(30_000, 3), many, torch.ones(30_000))[0] < 100
    assert 0.01 < train.calibrate(1e-4 * nn.functional.one_hot(many, 3), many, torch.ones(30_000))[0] < 0.011


def test_class_weights_apply_to_the_calibrated_loss():
    """The calibrated loss on val has the class weights of the training; the plain loss and the accuracy do not."""
    data = {"val": train.LabeledFeatures(features_of_many_scales(views=1), torch.arange(50) % 5 // 4)}
    data["train"] = data["val"]
    head = train.standardized_head(nn.Linear(6, 2), data["train"].features)
    weights = train.class_weights(data["train"].targets, "balanced")
    options, equal = (train.TrainOptions(8, 0, own) for own in (weights, torch.ones(2)))
    learners = (train.LinearProbes(head, data, own) for own in (options, equal))
    (measured,), (plain,) = (train.evaluate(learner, "val", [0]) for learner in learners)
    logits, targets = head(data["val"].features[0]).detach(), data["val"].targets
    assert measured.calibrated_nll == pytest.approx(train.calibrate(logits, targets, weights[targets])[1])
    assert measured.loss == plain.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert measured.n == 50 and measured.acc == plain.acc and measured.calibrated_nll != plain.calibrated_nll


def test_average_views_averages_probabilities():
    logits = [random_tensor(4, 3, seed=seed) for seed in range(8)]
    expected = sum(view.double().softmax(1) for view in logits) / 8
    assert torch.allclose(common.average_views(logits).exp(), expected, atol=1e-12)


# ---------------------------------------------------------------- the classifier on cached features


def features_of_many_scales(views=2, count=50, width=6):
    scales = torch.logspace(-3, 3, width)
    return random_tensor(views, count, width) * scales + 5 * scales


@pytest.mark.parametrize("bias", [True, False])
def test_folded_standardization_is_the_same_function(bias):
    features, classifier = features_of_many_scales(), nn.Linear(6, 3, bias=bias)
    head = train.standardized_head(classifier, features)
    folded = nn.Linear(6, 3, bias=bias)
    train.fold_standardization(head, folded)
    assert torch.allclose(folded(features[0]), head(features[0]), rtol=1e-4, atol=1e-4)


def test_standardized_features_have_unit_scale():
    features = features_of_many_scales()
    features[..., 1] = 7.0  # a constant is not amplified
    standardize, _ = train.standardized_head(nn.Linear(6, 3), features)
    rows = standardize(features.flatten(0, 1))
    deviations = rows.std(0, correction=0)
    assert torch.allclose(rows.mean(0), torch.zeros(6), atol=1e-2)
    assert deviations[-1].item() == pytest.approx(1, abs=1e-3) and deviations.max() < 1.01
    with pytest.raises(UserError, match="not finite"):
        train.standardized_head(nn.Linear(6, 3), features * math.inf)


@pytest.mark.parametrize("bias", [True, False])
def test_probes_side_by_side_learn_as_alone(bias):
    targets = torch.arange(40) % 3
    features = random_tensor(1, 40, 6) + nn.functional.one_hot(targets, 6)
    data = {
        "train": train.LabeledFeatures(features, targets),
        "val": train.LabeledFeatures(features[:, :20], targets[:20]),
    }
    head = train.standardized_head(nn.Linear(6, 3, bias=bias), features)
    configurations = [
        train.HParams(0.1, 0.0, 0.0, 3),
        train.HParams(0.01, 0.1, 0.1, 2),
        train.HParams(0.03, 0.0, 0.2, 3),
    ]
    options = train.TrainOptions(8, 0, torch.ones(3))
    together = train.fit(
        train.LinearProbes(head, data, options, count=3), [train.Run(hparams, 0) for hparams in configurations], ["val"]
    )
    for run in together:
        (alone,) = train.fit(train.LinearProbes(head, data, options), [train.Run(run.hparams, 0)], ["val"])
        assert len(alone.history) == len(run.history) == run.hparams.epochs
        assert alone.best.row["epoch"] == run.best.row["epoch"]
        assert all(
            torch.allclose(alone.best.weights[key], run.best.weights[key], atol=1e-5) for key in run.best.weights
        )


def test_run_survives_the_way_through_a_file():
    best = train.Epoch({"epoch": 1, "val_loss": 0.5}, 0.4, 1.2, {"weight": torch.ones(2)})
    run = train.Run(HPARAMS, 3, [{"epoch": 1}], best)
    buffer = io.BytesIO()
    torch.save(run.to_dict(), buffer)
    buffer.seek(0)
    again = train.Run.from_dict(torch.load(buffer, weights_only=True))
    assert (again.hparams, again.seed, again.history) == (run.hparams, 3, run.history)
    assert again.best.row == best.row and torch.equal(again.best.weights["weight"], torch.ones(2))


def test_random_numbers_depend_on_seed_epoch_and_purpose():
    assert train.epoch_seed(0, 1, "order") == 10004400026037871787  # in every version of Python
    arguments = [(0, 1, "order"), (0, 2, "order"), (1, 1, "order"), (0, 1, "process 0"), (0, 1, "process 1")]
    assert len({train.epoch_seed(*values) for values in arguments}) == 5


# ---------------------------------------------------------------- images


def test_views_are_the_eight_symmetries_of_a_square():
    image = torch.tensor([[1, 2], [3, 4]])
    expected = {
        (0, False): [[1, 2], [3, 4]],
        (1, False): [[2, 4], [1, 3]],  # a quarter turn counterclockwise
        (2, False): [[4, 3], [2, 1]],
        (3, False): [[3, 1], [4, 2]],
        (0, True): [[2, 1], [4, 3]],
        (1, True): [[1, 3], [2, 4]],
        (2, True): [[3, 4], [1, 2]],
        (3, True): [[4, 2], [3, 1]],
    }
    assert list(expected) == common.VIEWS["dihedral"]
    for view, pixels in expected.items():
        assert common.apply_view(image, view).tolist() == pixels
        assert torch.equal(common.apply_view(image.expand(5, 3, 2, 2), view)[4, 2], torch.tensor(pixels))


def test_augmentation_draws_one_of_the_views():
    pixels = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(64) % 4
    torch.manual_seed(0)
    for name, views in common.VIEWS.items():
        augmentation = train.Augmentation(views, 4)
        images, unchanged = train.augment_batch(pixels, targets, augmentation, lambda images: images)
        assert torch.equal(unchanged, targets)
        drawn = [
            [view for view in views if torch.equal(image, common.apply_view(original, view))]
            for image, original in zip(images, pixels)
        ]
        assert all(len(found) == 1 for found in drawn) and len({found[0] for found in drawn}) == len(views), name


def augment_strongly(pixels, seed=0, crop=True, mix=True):
    torch.manual_seed(seed)
    augmentation = train.Augmentation(common.VIEWS["none"], 4, strong=True, crop=crop, mix=mix)
    return train.augment_batch(pixels, torch.arange(len(pixels)) % 4, augmentation, lambda images: images / 255)


def test_strong_augmentation_mixes_half_of_the_batches():
    pixels, mixed = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8), 0
    for seed in range(40):
        images, targets = augment_strongly(pixels, seed)
        assert images.shape == pixels.shape and images.dtype == torch.float32
        if targets.dim() == 2:
            assert torch.allclose(targets.sum(1), torch.ones(32)) and targets.shape == (32, 4)
            mixed += bool((targets.amax(1) < 1).any())  # of two classes
    assert 10 < mixed < 30
    assert all(augment_strongly(pixels, seed, mix=False)[1].dim() == 1 for seed in range(10))


STRONG_TRANSFORMS = {"RandomResizedCrop", "TrivialAugmentWide", "RandomErasing"}


@pytest.mark.parametrize("name", sorted(STRONG_TRANSFORMS))
def test_each_strong_transform_changes_images(monkeypatch, name):
    """Mixing equal images leaves them as they are, so a change comes from the only transform that is left."""
    for other in STRONG_TRANSFORMS - {name}:
        monkeypatch.setattr(v2, other, UnchangedImages)
    pixels = torch.randint(1, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(32, 3, 16, 16)
    images, _ = augment_strongly(pixels)
    assert not torch.allclose(images, pixels / 255, atol=1e-3)
    unchanged = augment_strongly(pixels, crop=False)[0]
    assert torch.allclose(unchanged, pixels / 255, atol=1e-3) == (name == "RandomResizedCrop")
    monkeypatch.setattr(v2, name, UnchangedImages)
    assert torch.allclose(augment_strongly(pixels)[0], pixels / 255, atol=1e-3)


class UnchangedImages(nn.Identity):
    """In place of a transform, with any options."""

    _AUGMENTATION_SPACE = {}


@pytest.mark.parametrize("name, side", [("TranslateX", 64), ("TranslateY", 224)])
def test_trivial_augment_moves_images_by_a_seventh(name, side):
    """A white line across a black image is found again, at most a seventh away."""
    pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    pixels[..., side // 2] = 255
    pixels = pixels if name == "TranslateX" else pixels.mT
    transform, moved = train.trivial_augment(side), []
    assert transform._AUGMENTATION_SPACE.keys() > {"TranslateX", "TranslateY", "Rotate", "Color"}
    transform._AUGMENTATION_SPACE = {name: transform._AUGMENTATION_SPACE[name]}
    torch.manual_seed(0)
    for _ in range(100):
        image = transform(pixels)[0, 0]
        line = image[side // 2] if name == "TranslateX" else image[:, side // 2]
        moved.append(abs(line.argmax().item() - side // 2))
    assert 0.8 * side / 7 < max(moved) <= math.ceil(side / 7)


def test_chosen_images():
    split = common.Split(["a", "b", "c"], torch.tensor([0, 1, 2]), ["x", "y", "z"])
    part = split.select(range(0, 3, 2))
    assert (part.paths, part.sha256) == (["a", "c"], ["x", "z"])
    assert part.targets.tolist() == [0, 2] and len(part) == 2


# ---------------------------------------------------------------- networks


def test_folded_batchnorm_is_the_same_function():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    )
    for norm in (model[1], model[4]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.1, 3)
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    model.eval().requires_grad_(False)
    images = random_tensor(2, 3, 9, 9)
    folded = common.fold_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert torch.allclose(folded(images), model(images), atol=1e-5)


def test_network_that_cannot_be_traced_is_not_folded():
    class Branching(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    model = Branching().eval()
    assert common.fold_batchnorm(model) is model


def test_last_linear_layer_is_the_classifier():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Dropout())
    assert common.classifier_name(model, 5) == "2"
    layer = common.reset_classifier(model, "2", 3)
    assert model[2] is layer and (layer.in_features, layer.out_features) == (5, 3)
    with pytest.raises(UserError, match="7 outputs"):
        common.classifier_name(model, 7)


def test_first_weights_depend_on_shape_and_seed():
    layers = [nn.Linear(4, 3) for _ in range(3)]
    for layer, seed in zip(layers, (1, 1, 2)):
        common.initialize_classifier(layer, seed)
    assert torch.equal(layers[0].weight, layers[1].weight) and not torch.equal(layers[0].weight, layers[2].weight)
    assert not layers[0].bias.any()


@pytest.mark.parametrize(
    "arch, first, last",
    [
        ("resnet18", "layer4", "avgpool"),
        ("mobilenet_v3_small", "features.9", "classifier"),
        ("vgg11", "features.15", "classifier"),
        ("swin_t", "features.6", "head"),
        ("vit_b_32", "encoder.layers.encoder_layer_9", "encoder.ln"),
    ],
)
def test_last_stage(arch, first, last):
    model = common.build_model(arch, {}, "meta")
    model.set_submodule(common.classifier_name(model, 1000), nn.Identity())
    names = train.last_stage_modules(model, 224)
    assert names[0] == first and last in names
    assert not any(name.startswith(("features.0", "conv1", "layer1", "conv_proj")) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("arch", common.list_architectures())
def test_every_architecture(arch):
    """On the meta device, without values: the classifier can be replaced, and the last stage is found."""
    kwargs = {"aux_logits": False} if arch in ("googlenet", "inception_v3") else {}
    model = common.build_model(arch, kwargs, "meta").to("meta").eval()  # RegNets are built on the CPU
    entry = common.torchvision.models.get_model_weights(arch).DEFAULT
    size = 224 if arch.startswith("vit_") else common.entry_preprocessing(entry)["size"]
    with torch.device("meta"):
        layer = common.reset_classifier(model, common.classifier_name(model, 1000), 3)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 3)
    model.set_submodule(common.classifier_name(model, 3), nn.Identity())
    with torch.no_grad():
        assert model(torch.zeros(2, 3, size, size, device="meta")).shape == (2, layer.in_features)
    trained = {id(p) for name in train.last_stage_modules(model, size) for p in model.get_submodule(name).parameters()}
    assert 0 < len(trained) < len(list(model.parameters()))


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "parse, good, bad",
    [
        (common.positive_int, [1, (1 << 31) - 1], ["0", "-1", "1.5", "x", "", str(1 << 31)]),
        (common.positive_float, [0.5, 1e-9], ["0", "-1", "nan", "inf", "x"]),
        (common.non_negative_float, [0, 2.5], ["-0.1", "nan", "inf"]),
        (common.fraction, [0, 1, 0.5], ["-0.01", "1.01", "nan"]),
        (common.seed_number, [0, (1 << 63) - 1], ["-1", str(1 << 63), "0.5"]),
    ],
)
def test_numbers_on_the_command_line(parse, good, bad):
    for value in good:
        assert parse(str(value)) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
            parse(text)


def test_signals_are_deferred():
    """Inside defer_signals a first signal waits for the end of the block, and a second one ends it at once."""
    steps, previous = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, common.handle_signal)
    try:
        with pytest.raises(KeyboardInterrupt) as outside:
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as deferred, common.defer_signals(), common.defer_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("after the first")
        assert outside.value.args == deferred.value.args == (128 + signal.SIGTERM,)
        with pytest.raises(KeyboardInterrupt), common.defer_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            raise OSError  # an error does not make the signal forgotten
        with pytest.raises(KeyboardInterrupt), common.defer_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("after the second")
        assert steps == ["after the first"]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_hangup_ends_a_script_unless_it_is_ignored(capsys):
    @common.command
    def main(argv):
        os.kill(os.getpid(), signal.SIGHUP)

    previous = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert main() == 129 and "interrupted" in capsys.readouterr().err
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert main() == 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def test_an_interrupted_import_is_not_a_traceback(tmp_path):
    (tmp_path / "PIL.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    options = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}}
    options["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    done = command("evaluate", "--help", **options)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_error_messages_are_one_line():
    assert common.one_line("a\n b\t\tc ") == "a b c"
    assert str(common.ImageError("x.png", "broken\nheader")) == "cannot read image x.png: broken header"
    assert common.printable("a\nb") == "a\\nb" and common.printable("Fluß") == "Fluß"


def test_messages_do_not_control_the_terminal(capsys):
    common.log("a \x1b]0;title\x07\ud800\nFluß", stamp=False)
    assert capsys.readouterr().err == "a \\x1b]0;title\\x07\\ud800\nFluß\n"
    common.log("half", redraw=True)  # the bar of `Progress`
    assert capsys.readouterr().err == "\r\x1b[Khalf"


def test_json_has_no_infinite_numbers():
    assert common.to_json_text({"a": [1.5, None]}) == '{"a": [1.5, null]}'
    with pytest.raises(UserError, match="not finite"):
        common.to_json_text({"a": [math.inf]})


# ---------------------------------------------------------------- reading images


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("old, new", [(64, 224), (64, 65), (5, 224), (200, 224)])
def test_resize_on_a_gpu_is_exactly_that_of_the_cpu(monkeypatch, interpolation, old, new):
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import _geometry

    if not _geometry._do_native_uint8_resize_on_cpu(InterpolationMode(interpolation)):
        pytest.skip("this torchvision computes in float32 on this processor")
    pixels = torch.randint(256, (3, 3, old, old), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[0, :, :, ::2] = 255 * (pixels[0, :, :, ::2] > 127)  # edges, where bicubic results have to be clipped
    expected = common.resize(pixels, new, interpolation)
    assert expected.shape == (3, 3, new, new)
    assert torch.equal(common.resize_by_products(pixels, new, interpolation), expected)


def test_images_of_one_small_size_keep_it():
    """The result is the same, whatever other images are in the batch."""
    small = [Image.effect_noise((20, 20), 90).convert("RGB") for _ in range(3)]
    large = Image.effect_noise((90, 60), 90).convert("RGB")
    preprocessing = {"size": 32, "resize": "squish", "interpolation": "bilinear"}
    native = common.preprocess(small, preprocessing)
    mixed = common.preprocess([*small, large], preprocessing)
    assert native.shape == (3, 3, 20, 20) and mixed.shape == (4, 3, 32, 32)
    assert torch.equal(common.resize(native, 32, "bilinear"), mixed[:3])
    assert torch.equal(common.join_pixels([native, mixed[3:]], 32, "bilinear"), mixed)
    assert common.preprocess([large], preprocessing).shape == (1, 3, 32, 32)
    narrow = [image.crop((0, 0, 12, 20)) for image in small]
    assert common.preprocess(narrow, preprocessing).shape == (3, 3, 32, 32)


@pytest.mark.parametrize("size", [(90, 60), (20, 60), (24, 8)])
def test_whole_image_or_its_center_square(size):
    """Red, green and blue stripes along the longer side: without the outer ones, a crop is nearly all green."""
    image = Image.new("RGB", size, "green")
    horizontal = size[0] > size[1]
    third = max(size) // 3
    for color, start in (("red", 0), ("blue", 2 * third)):
        box = (start, 0, start + third, size[1]) if horizontal else (0, start, size[0], start + third)
        image.paste(color, box)
    shares = {}
    for resize in ("squish", "crop"):
        preprocessing = {"size": 48, "resize": resize, "interpolation": "bilinear"}
        pixels = common.preprocess([image], preprocessing).float()
        assert pixels.shape[2] == pixels.shape[3]
        shares[resize] = (pixels[0, 0].mean() / 255, pixels[0, 2].mean() / 255)
    assert shares["squish"] == pytest.approx((1 / 3, 1 / 3), abs=0.02)
    outside = 0.25 if size == (90, 60) else 0
    assert shares["crop"] == pytest.approx((outside, outside), abs=0.02)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_at_lower_resolution(tmp_path, mode, orientation):
    gradient = Image.merge(
        "RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.new("L", (256, 256), 90)]
    )
    photo = gradient.resize((1500, 1001)).rotate(20)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.convert(mode).save(tmp_path / "photo.jpg", quality=95, exif=exif)
    full, fast = common.read_image(tmp_path / "photo.jpg"), common.read_image(tmp_path / "photo.jpg", 100)
    assert full.size == ((1500, 1001) if orientation == 1 else (1001, 1500))
    assert 200 <= min(fast.size) < 400 and (fast.width > fast.height) == (full.width > full.height)
    for resize in ("squish", "crop"):
        preprocessing = {"size": 100, "resize": resize, "interpolation": "bilinear"}
        a, b = (common.preprocess([image], preprocessing).float() for image in (full, fast))
        assert (a - b).abs().mean() < 1


def test_hashes_of_images(tmp_path, monkeypatch):
    paths = []
    for number in range(150):
        (tmp_path / str(number)).write_bytes(bytes([number]) * number)
        paths.append(str(tmp_path / str(number)))
    expected = [common.hash_file(path) for path in paths]
    assert common.hash_images(paths) == expected
    clock = iter(range(1000))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))  # as on a slow disk: the rest goes to threads
    assert common.hash_images(paths) == expected and next(clock) == 2
    with pytest.raises(common.ImageError, match="no such file"):
        common.hash_images([*paths, str(tmp_path / "gone")])


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("mode, old, new", [("w", "old", "new"), ("wb", b"old", b"new")])
def test_atomic_write_replaces_the_file_in_the_end(tmp_path, mode, old, new):
    path = tmp_path / "file"
    with common.atomic_write(path, mode) as file:
        file.write(old)
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), common.atomic_write(path, mode) as file:
        file.write(new)
        raise ZeroDivisionError
    content = old if isinstance(old, bytes) else old.encode()
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    with common.atomic_write(path, mode) as file:
        file.write(new)
    assert path.read_bytes() != content and list(tmp_path.iterdir()) == [path]


def test_atomic_write_removes_what_a_killed_run_left(tmp_path):
    """But not the temporary file of a run that is still writing, nor files of other names."""
    for name, age in ((".[a].0123abcd.tmp", 90_000), (".[a].00000000.tmp", 60), (".a.0123abcd.tmp", 90_000)):
        (tmp_path / name).write_text("part")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with common.atomic_write(tmp_path / "[a]"):
        pass
    assert names(tmp_path) == [".[a].00000000.tmp", ".a.0123abcd.tmp", "[a]"]


def test_atomic_write_names_the_file_in_errors(tmp_path):
    with pytest.raises(OSError) as raised, common.atomic_write(tmp_path / "file"):
        raise OSError(28, "No space left on device")  # a full disk: the error has no file name
    assert raised.value.filename == str(tmp_path / "file") and raised.value.errno == 28


def test_temporary_files_of_killed_runs_are_removed(tmp_path):
    """Only those of the same file, and only if no other run may still be writing them."""
    stay = [tmp_path / name for name in (".p.png.x.0123abcd.tmp", ".q.0123abcd.tmp", ".[p].89abcdef.tmp")]
    old = [tmp_path / name for name in (".p.png.0123abcd.tmp", ".[p].0123abcd.tmp")]
    for file in stay + old:
        file.touch()
    for file in stay[:2] + old:
        os.utime(file, (0, 0))
    for name in ("p.png", "[p]"):
        with common.atomic_write(tmp_path / name) as file:
            file.write("new")
    assert sorted(tmp_path.iterdir()) == sorted([*stay, tmp_path / "p.png", tmp_path / "[p]"])


def test_csv_lines_end_in_line_feeds(tmp_path):
    rows = [["a", "b"], ["line\nbreak", "carriage\rreturn"], ['quo"te', "plain"]]
    common.write_csv(tmp_path / "file.csv", rows[0], rows[1:])
    assert (tmp_path / "file.csv").read_bytes() == b'a,b\n"line\nbreak","carriage\rreturn"\n"quo""te",plain\n'
    with open(tmp_path / "file.csv", newline="") as file:
        assert list(csv.reader(file)) == rows


def test_lock(tmp_path):
    lock = tmp_path / "new" / "out" / ".lock"
    with common.hold_lock(lock):
        assert lock.exists()
        with pytest.raises(common.LockedError, match=".lock"), common.hold_lock(lock):
            pass
        assert lock.exists()
    assert not (tmp_path / "new").exists()
    with common.hold_lock(lock):
        (lock.parent / "result").write_text("kept")
    assert [path.name for path in lock.parent.iterdir()] == ["result"]
    with pytest.raises(ZeroDivisionError), common.hold_lock(lock):
        raise ZeroDivisionError
    with common.hold_lock(lock):  # the error has released it
        pass
    assert lock.parent.exists()  # folders that were there before stay
    lock.write_text("of another program")
    with common.hold_lock(lock):
        pass
    assert lock.read_text() == "of another program"
    lock.rename(lock.with_name("target"))
    lock.symlink_to("target")
    with pytest.raises(OSError, match=".lock"), common.hold_lock(lock):
        pass
    assert lock.is_symlink() and lock.read_text() == "of another program"


def test_lock_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    number = common.errno.ENOLCK

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with common.hold_lock(tmp_path / ".lock"):
        assert "cannot be locked" in capsys.readouterr().err
    number = common.errno.EIO  # any other error is not ignored
    with pytest.raises(OSError, match=os.strerror(number)), common.hold_lock(tmp_path / ".lock"):
        pass


def test_hash_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert common.hash_file(tmp_path / "file").startswith("ba7816bf8f01cfea")
    assert common.hash_file(tmp_path / "file", "md5") == "900150983cd24fb0d6963f7d28e17f72"
    with pytest.raises(OSError, match="not a regular file"):
        common.hash_file(tmp_path)


def test_batches_of_large_images_are_small():
    """A checkpoint may ask for images of 4096 pixels, of which 16 take 50 GB."""
    network = common.load_pretrained("mobilenet_v3_small", "none", 2, 224, None, 0)
    sizes = {}
    for size in (32, 224, 512, 1024, 4096):
        network.preprocessing["size"] = size
        sizes[size] = common.InferenceModel(network, torch.device("cpu"), "fp32").batch_size
    assert sizes == {32: 16, 224: 16, 512: 16, 1024: 4, 4096: 1}


def test_hash_of_weights_leaves_out_the_classifier():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = common.hash_weights(model, "1")
    nn.init.zeros_(model[1].weight)
    assert common.hash_weights(model, "1") == before
    nn.init.zeros_(model[0].weight)
    assert common.hash_weights(model, "1") != before


def test_feature_cache_finds_rows_by_hash(tmp_path):
    cache, view = common.FeatureCache(tmp_path, {"arch": "x"}), (0, False)
    cache.add(view, ["a", "b"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    cache.flush()
    out = torch.zeros(4, 2)
    assert common.FeatureCache(tmp_path, {"arch": "x"}).read_into(view, ["b", "c", "a", "b"], out) == [1]
    assert out.tolist() == [[3, 4], [0, 0], [1, 2], [3, 4]]
    assert cache.read_into((1, False), ["a"], out[:1]) == [0]
    assert common.FeatureCache(tmp_path, {"arch": "y"}).read_into(view, ["a"], out[:1]) == [0]
    assert common.FeatureCache(None, {}).read_into(view, ["a"], out[:1]) == [0]


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("kind", ["list", "sparse", "complex", "hashes"])
def test_features_of_a_wrong_kind_are_ignored(tmp_path, kind):
    """The file is written as the cache writes its own, so that only the content is wrong."""
    rows = torch.ones(2, 3)
    wrong = {"list": rows.tolist(), "sparse": rows.to_sparse(), "complex": rows.cfloat(), "hashes": rows}[kind]
    cache, view, buffer = common.FeatureCache(tmp_path, {}), (0, False), io.BytesIO()
    torch.save({"hashes": [["a"], "b"] if kind == "hashes" else ["a", "b"], "features": wrong}, buffer)
    file = cache.view_folder(view) / f"{hashlib.sha256(buffer.getvalue()).hexdigest()}.pt"
    file.parent.mkdir()
    file.write_bytes(buffer.getvalue())
    assert cache.read_into(view, ["a", "b"], torch.zeros(2, 3)) == [0, 1]


# ---------------------------------------------------------------- checkpoints


def valid_checkpoint():
    return {
        "version": 1,
        "arch": "resnet18",
        "model_kwargs": {"num_classes": 2},
        "classes": ["a", "b"],
        "preprocessing": {"size": 32, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
        "state_dict": {},
        "temperature": 1.0,
        "temperature_tta": 1.0,
        "views": [(0, False)],
        "metrics": {"epoch": 1},
        "train_hashes": torch.zeros(3, 8, dtype=torch.uint8),
        "val_hashes": torch.zeros(0, 8, dtype=torch.uint8),
        "args": {},
        "versions": {},
    }


def test_weights_from_a_checkpoint_keep_their_input_scale(tmp_path):
    """ImageNet weights of GoogLeNet need another input scale, and a model trained from random weights does not."""
    network = common.load_pretrained("googlenet", "none", 2, None, None, 0)
    checkpoint = {"format": common.CHECKPOINT_FORMAT, "arch": "googlenet", "model_kwargs": network.model_kwargs}
    torch.save(valid_checkpoint() | checkpoint | {"state_dict": network.model.state_dict()}, tmp_path / "model.pt")
    torch.save(network.model.state_dict(), tmp_path / "imagenet.pth")
    for file, expected in (("model.pt", False), ("imagenet.pth", True)):
        loaded = common.load_pretrained("googlenet", str(tmp_path / file), 3, None, None, 0)
        assert loaded.model_kwargs == {"num_classes": 3, "aux_logits": False, "transform_input": expected}


@pytest.mark.parametrize(
    "path, value, field",
    [
        (["version"], torch.ones(2), "version"),
        (["model_kwargs", "num_classes"], torch.ones(2), "model_kwargs"),
        (["classes"], 5, "classes"),
        (["version"], 2, "version"),
        (["version"], None, "version"),
        (["arch"], 5, "arch"),
        (["classes"], ["a", "a"], "classes"),
        (["classes"], ["a"], "classes"),
        (["classes"], ["a", 2], "classes"),
        (["classes"], "ab", "classes"),
        (["model_kwargs"], [], "model_kwargs"),
        (["model_kwargs", "width_per_group"], 10**7, "model_kwargs"),
        (["model_kwargs", "image_size"], 10**7, "model_kwargs"),
        (["preprocessing", "size"], 0, "size"),
        (["preprocessing", "size"], 32.0, "size"),
        (["preprocessing", "interpolation"], "box", "interpolation"),
        (["preprocessing", "mean"], [0.5, 0.5], "mean"),
        (["preprocessing", "mean"], [math.nan] * 3, "mean"),
        (["preprocessing", "std"], [0.5, 0.0, 0.5], "std"),
        (["temperature"], 0.0, "temperature"),
        (["temperature"], 1e-320, "temperature"),
        (["temperature"], 1e5, "temperature"),
        (["classes"], ["a", "b" * 256], "classes"),
        (["temperature_tta"], math.nan, "temperature_tta"),
        (["views"], [], "views"),
        (["views"], [(4, False)], "views"),
        (["metrics"], None, "metrics"),
        (["metrics", "epoch"], "one", "metrics"),
        (["metrics", "measured"], {"val": "all"}, "metrics"),
        (["metrics", "alpha"], math.nan, "metrics"),
        (["train_hashes"], [1, 2], "train_hashes"),
        (["val_hashes"], torch.zeros(3, 8), "val_hashes"),
        (["args"], [], "args"),
    ],
)
def test_invalid_fields_of_a_checkpoint(path, value, field):
    content = valid_checkpoint()
    assert common.invalid_fields(content) == []
    *parents, name = path
    target = content[parents[0]] if parents else content
    target[name] = value
    assert common.invalid_fields(content) == [field]


def nested(depth, width=1):
    return [nested(depth - 1, width)] * width if depth else 0


@pytest.mark.parametrize(
    "value, words",
    [
        (nested(20), "nested too deeply"),
        (nested(8, 10), "are too many"),  # a hundred million items, although the file is small
        ({"key": ["a" * 5000]}, "a text of 5000 characters"),
        ({"\ud800": 1}, "not Unicode"),
        ([math.nan], "a number that is not finite"),
        (10**100, "a number that is not finite, or too large"),
        (torch.zeros(1).expand(10**12), "a tensor of 4000000000000 bytes, of which 4 are stored"),
    ],
)
def test_values_that_no_training_writes(tmp_path, monkeypatch, value, words):
    monkeypatch.setattr(common, "MAX_ITEMS", 10**5)
    torch.save({"value": value}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=words):
        common.read_torch_file(tmp_path / "file.pt")


def test_a_compressed_file_is_refused(tmp_path):
    """It would take far more memory than disk."""
    torch.save({"name": os.fsdecode(b"\xff"), "values": torch.zeros(1 << 20)}, tmp_path / "file.pt")
    assert common.read_torch_file(tmp_path / "file.pt")["name"] == "\udcff"
    with zipfile.ZipFile(tmp_path / "file.pt") as plain, zipfile.ZipFile(tmp_path / "small.pt", "w", 8) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(UserError, match="compressed"):
        common.read_torch_file(tmp_path / "small.pt")


def test_missing_fields_of_a_checkpoint():
    for name in valid_checkpoint():
        content = valid_checkpoint()
        del content[name]
        assert common.invalid_fields(content), name


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weight": None}, "1 wrong keys: weight (missing)"),
        ({"extra": torch.zeros(1)}, "1 wrong keys: extra (unknown)"),
        ({"weight": torch.zeros(3, 3)}, "1 wrong keys: weight (of the wrong shape)"),
        ({"weight": 5}, "1 wrong keys: weight (of the wrong type)"),
        ({"weight": torch.zeros(3, 2, dtype=torch.int64)}, "of the wrong type"),
        ({"weight": torch.zeros(3, 2).to_sparse()}, "of the wrong type"),
        ({"weight": torch.zeros(3, 2, device="meta")}, "of the wrong type"),
        ({"bias": torch.tensor([0, math.nan, 0])}, "1 wrong keys: bias (with values that are not finite)"),
        (
            dict.fromkeys("abcdef", 0),
            "6 wrong keys: a (unknown), b (unknown), c (unknown), d (unknown), e (unknown), ...",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, words):
    state = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)} | change
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(UserError) as raised:
        common.load_weights(nn.Linear(2, 3, device="meta"), state, "some_arch", "w.pth")
    assert "w.pth does not fit the architecture some_arch" in str(raised.value) and words in str(raised.value)


def test_load_weights_converts_floats():
    model = nn.Linear(2, 3, device="meta")
    common.load_weights(model, {"weight": torch.ones(3, 2).half(), "bias": torch.ones(3).double()}, "arch", "w.pth")
    assert model.weight.dtype == model.bias.dtype == torch.float32 and model.weight.sum() == 6


# ---------------------------------------------------------------- the audit


def test_classifiers_do_not_learn_from_their_own_fold():
    """Random labels can be learned by heart, but not guessed."""
    features, targets = random_tensor(1, 300, 400), torch.arange(300) % 3
    folds = torch.arange(300) // 3 % train.FOLDS
    head = train.standardized_head(nn.Linear(400, 3), features)
    options = train.TrainOptions(32, 0, torch.ones(3))
    labeled = train.LabeledFeatures(features, targets)
    probes = train.OutOfFoldProbes(head, labeled, folds, options)
    train.fit(probes, [train.Run(train.HParams(1e-2, 0.0, 0.0, 30), 0)] * train.FOLDS, [])
    accuracy = (probes.out_of_fold_logits().argmax(1) == targets).float().mean()
    probes.folds = (folds + 1) % train.FOLDS
    assert accuracy < 0.5 and (probes.out_of_fold_logits().argmax(1) == targets).float().mean() == 1


def test_suspects_are_ordered_by_the_margin():
    """The thresholds are the mean probabilities of the own class, here 0.6 and 0.8; classes of few images have none."""
    first = torch.tensor([0.9, 0.9, 0.1, 0.3, 0.8] + 5 * [0.2] + [0.9, 0.9])  # of the first class
    probabilities = torch.stack([first, 1 - first, torch.zeros(12)], 1).double()
    targets, learned = torch.tensor(5 * [0] + 5 * [1] + [1, 2]), torch.tensor(10 * [True] + [False, True])
    suspects, suspicious = train.find_suspects(probabilities, targets, learned)
    assert suspicious.nonzero()[:, 0].tolist() == [2, 10]  # 3 has only 0.7, and 11 is alone in its class
    assert suspects == [11, 2, 10, 3]


def test_near_duplicates_stand_out_from_nearest_neighbors():
    """Of random features there are at most one by chance; equal files are a finding only with different classes."""
    on_cpu = [argparse.Namespace(dtype=torch.float32, device=torch.device("cpu"))]
    features, targets, splits = random_tensor(200, 64), torch.arange(200) % 4, torch.arange(200) // 150
    files = [str(number) for number in range(200)]
    assert len(train.find_duplicates(features, targets, splits, files, *on_cpu)) <= 1
    features[160] = features[8] + 0.05  # of the same class, in another split
    features[161] = features[9]
    features[20] = features[21]
    files[161], files[20] = files[9], files[21]  # equal: 9 and 161 have one class, 20 and 21 have two
    pairs = {(pair.first, pair.second) for pair in train.find_duplicates(features, targets, splits, files, *on_cpu)}
    assert {(8, 160), (20, 21)} <= pairs and (9, 161) not in pairs and len(pairs) <= 3
    few = random_tensor(20, 64), torch.arange(20) % 10, torch.arange(20) // 10
    assert len(train.find_duplicates(*few, files[:20], *on_cpu)) <= 3


def test_familiarity_without_val_uses_images_held_out():
    """New images from the same distribution are rejected rarely, although a few images fill all components."""
    for count in (40, 200):
        familiarity = train.fit_familiarity(random_tensor(1, count, 512), None)
        scores = common.unfamiliarity(random_tensor(500, 512, seed=1), familiarity)
        assert (scores > 0.9).float().mean() < 0.35 and (scores > 0.5).float().mean() == pytest.approx(0.5, abs=0.3)


def test_a_text_gets_a_font_that_has_its_letters(tmp_path, monkeypatch):
    """Or else escapes; labels of axes, which matplotlib writes anew when it draws them, too."""
    builder, square = FontBuilder(1000, isTTF=True), TTGlyphPen(None)
    for point, draw in zip(((0, 0), (0, 700), (700, 700), (700, 0)), (square.moveTo, *[square.lineTo] * 3)):
        draw(point)
    square.closePath()
    glyphs = {".notdef": square.glyph(), "water": square.glyph()}
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({0x6C34: "water"})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Water", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "water.ttf")
    monkeypatch.setattr(common, "fit_text", common.fit_text.__wrapped__)
    _, default = common.fit_text("River")
    own = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own[:])
    font_manager.fontManager.addfont(tmp_path / "water.ttf")
    assert common.fit_text("\u6c34\n\u6c34") == ("\u6c34\n\u6c34", str(tmp_path / "water.ttf"))
    assert common.fit_text("Stra\xdfe") == ("Stra\xdfe", default)
    assert common.fit_text("\u6c34 a\n\U0001f525") == ("\\u6c34 a\n\\U0001f525", default)

    def draw(name):
        figure = common.new_figure(2, 2)
        figure.subplots().set_xticks([0, 1], [name, "a"], rotation=45)
        common.save_figure(tmp_path / "figure.png", figure)
        return (tmp_path / "figure.png").read_bytes()

    drawn = draw("\u6c34")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    assert draw("\u6c34") == draw(r"\u6c34") != drawn
