"""train.py in several processes: the result of a single one, and how they end when one of them fails. CPU and gloo."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, TINY, load_pt, names

resource = pytest.importorskip("resource")  # not on Windows
pytestmark = pytest.mark.slow
TWO = ["--standalone", "--nproc-per-node", 2]
SECONDS_TO_END = 30  # after a failure
FILES = ["history.csv", "last.pt", "model.pt"]


def torchrun(options, *argv, **kwargs):
    """Start train.py under torchrun."""
    line = [sys.executable, "-m", "torch.distributed.run", *options, ROOT / "train.py", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(part) for part in line], text=True, **pipes, **kwargs)


def end_of(process, seconds=300):
    """Return exit code, stdout and stderr of a process, which has to end in time."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still running after {seconds} s:\n{process.communicate()[1]}")
    return process.returncode, out, err


def wait_for(condition, seconds=120):
    """Wait until condition() is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def messages(err):
    """Return the errors that train.py has reported, and whether it has ended with a traceback (torchrun has one)."""
    return [line for line in err.splitlines() if line.startswith("train.py: error: ")], 'train.py", line' in err


def exit_codes(err):
    """Return the exit code of each process that had failed when torchrun ended the others: {rank: code}."""
    ranks = re.findall(r"rank +: (\d+)", err)
    return dict(zip(map(int, ranks), map(int, re.findall(r"exitcode +: (-?\d+)", err))))


@pytest.mark.parametrize("mode", ["head", "all"])
def test_two_processes_give_the_same_result_as_one(run, similar_tree, random_weights, tmp_path, mode):
    """Only the first process writes and logs, and each image is counted once."""
    views = {"head": "flip", "all": "none"}[mode]  # while the network is trained, each process draws views of its own
    # The weights come from a file, because BatchNorm of a random network learns statistics in each process.
    args = ["--data", similar_tree, "--epochs", 2, "--finetune", mode, "--augment", views, "--batch-size", 16]
    args += ["--no-cache", *SMALL, "--weights", random_weights]
    alone = run("train", *args, "--out", tmp_path / "alone").json
    code, out, err = end_of(torchrun(TWO, *args, "--out", tmp_path / "two"))
    assert code == 0, err
    (result,) = map(json.loads, out.splitlines())
    assert err.count("epoch 1/2") == 1
    assert result["test_acc"] == pytest.approx(alone["test_acc"], abs=2 / 90)
    one, two = (load_pt(tmp_path / name / "model.pt")["state_dict"] for name in ("alone", "two"))
    assert all(torch.allclose(one[key].float(), two[key].float(), rtol=1e-2, atol=1e-3) for key in one)
    assert names(tmp_path / "two") == FILES


def test_full_disk_at_the_first_process(tree, tmp_path):
    """The first process reports it; the second one, which waits for gradients, does not wait forever."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    args = ["--data", tree, "--out", tmp_path / "out", "--finetune", "all", "--epochs", 500, "--no-cache", *TINY]
    code, _, err = end_of(torchrun(TWO, *args, preexec_fn=limit), seconds=60 + SECONDS_TO_END)
    assert code and exit_codes(err)[0] == 2
    assert any("last.pt: File too large" in line for line in messages(err)[0]) and not messages(err)[1], err


def test_unreadable_image_at_the_second_process(tree, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tree, data)
    bad = sorted((data / "train" / "blue").iterdir())[17]  # of the second batch, which the second process reads
    bad.write_bytes(b"not an image")
    args = ["--data", data, "--out", tmp_path / "out", "--no-cache", *SMALL]
    code, _, err = end_of(torchrun(TWO, *args), seconds=60 + SECONDS_TO_END)
    assert code and exit_codes(err)[1] == 2
    assert any(bad.name in line for line in messages(err)[0]) and not messages(err)[1], err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(run, tree, tmp_path, number):
    """SIGTERM reaches both processes through torchrun, SIGKILL only the second one. The run can be resumed."""
    out = tmp_path / "out"
    args = ["--data", tree, "--out", out, "--finetune", "all", "--no-cache", *TINY]
    process = torchrun(TWO, *args, "--epochs", 5000)
    wait_for((out / "last.pt").exists)
    if number == signal.SIGTERM:
        process.terminate()
    else:
        pids = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        environments = {pid: open(f"/proc/{pid}/environ").read() for pid in pids}
        os.kill(next(int(pid) for pid, text in environments.items() if "\0RANK=1\0" in f"\0{text}"), number)
    code, _, err = end_of(process, SECONDS_TO_END)
    assert code and not messages(err)[1], err
    assert names(out) == ["history.csv", "last.pt"] and load_pt(out / "last.pt")["finished"] is False


def test_two_nodes_with_copies_of_the_data(run, tree, tmp_path, monkeypatch):
    """Each node has its own copy of the tree, with other modification times, and a cache of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for node in range(2):
        folder = tmp_path / f"node{node}"
        shutil.copytree(tree, folder / "data", copy_function=shutil.copy)
        for path in folder.rglob("*.png"):
            os.utime(path, (1e9 + node, 1e9 + node))
        options = ["--nnodes", 2, "--nproc-per-node", 1, "--node-rank", node]
        options += ["--master-addr", "127.0.0.1", "--master-port", port]
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        args = ["--data", "data", "--out", "out", "--finetune", "last", "--epochs", 2, *TINY]
        agents.append(torchrun(options, *args, cwd=folder, env=environment))
    ends = [end_of(agent) for agent in agents]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert json.loads(ends[0][1])["epochs"] == 2 and not ends[1][1]
    assert names(tmp_path / "node0" / "out") == FILES and not (tmp_path / "node1" / "out").exists()
    monkeypatch.chdir(tmp_path / "node0")
    run("evaluate", "--checkpoint", "out/model.pt", "--data", "data", "--out", "report")
