"""What must not happen: something lost by a killed run, a crash on a damaged file, a traceback where a line would do."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, command, make_tree, tile
from PIL import Image

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


def test_killed_runs_lose_nothing():
    done = subprocess.run([sys.executable, ROOT / "tests" / "faults.py", "--kills", "6"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip().endswith("6 kills, 6 resumed, 0 lost"), done.stdout + done.stderr


def test_damaged_images_crash_nothing(trained):
    done = subprocess.run([sys.executable, ROOT / "tests" / "fuzz.py", "--files", "400", "--checkpoint", trained.model], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip().endswith("unreadable, 0 failures"), done.stdout + done.stderr


def nan_weight(content):
    content["state_dict"]["fc.weight"] = torch.full((3, 512), float("nan"))


@pytest.mark.parametrize("change, words", [
    (nan_weight, "not finite"),
    (lambda c: c["state_dict"].update({"fc.weight": torch.full((3, 512), 3e38)}), "not finite"),
    (lambda c: c["state_dict"].update({"fc.weight": torch.ones(3, 512).to_sparse()}), "of another kind (fc.weight)"),
    (lambda c: c["state_dict"].update({"fc.weight": torch.ones(3, 512, device="meta")}), "of another kind (fc.weight)"),
    (lambda c: c["state_dict"].update({"fc.weight": torch.ones(3, 512, dtype=torch.complex64)}), "of another kind (fc.weight)"),
    (lambda c: c["state_dict"].update({"fc.weight": torch.ones(1).expand(10 ** 12)}), "of another shape (fc.weight)"),
    (lambda c: c["state_dict"].update({7: 7}), "unknown (7)"),
    (lambda c: c.update(classes=["a", "a", "b"]), "classes"),
    (lambda c: c.update(classes=["a", "b", 3]), "classes"),
    (lambda c: c.update(temperature=float("nan")), "temperature"),
    (lambda c: c.update(temperature=-1.0), "temperature"),
    (lambda c: c.update(views=[(5, True)]), "views"),
    (lambda c: c.update(args=[]), "args"),
    (lambda c: c.update(arch="fasterrcnn_resnet50_fpn"), "unknown classification model"),
    (lambda c: c["model_kwargs"].update(width_per_group=10 ** 7), "model_kwargs"),
    (lambda c: c["preprocessing"].update(size=10 ** 9), "size"),
    (lambda c: c["preprocessing"].update(size="32"), "size"),
    (lambda c: c["preprocessing"].update(interpolation="box"), "interpolation"),
    (lambda c: c["preprocessing"].update(mean=[0.5, 0.5]), "mean and std"),
    (lambda c: c["preprocessing"].update(std=[0.5, 0.0, 0.5]), "mean and std"),
    (lambda c: c["preprocessing"].update(mean=[10 ** 400] * 3), "mean and std"),
])
def test_checkpoints_that_make_no_sense(run, trained, tree, tmp_path, change, words):
    content = torch.load(trained.model, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "odd.pt")
    for script, rest in (("predict", [tree / "test" / "red"]), ("evaluate", ["--data", tree, "--out", tmp_path / "report"])):
        assert words in run(script, "--checkpoint", tmp_path / "odd.pt", *rest, code=2).error[0]
