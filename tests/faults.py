"""Kill real runs of train.py at random moments, and check that nothing is ever lost.

    python tests/faults.py --kills 20

A tree and a finished run are made, and the run is trained anew in a copy of its folder: a classifier alone, and with the last
stage of the network. That run is killed again and again (SIGKILL, one in four by SIGTERM) and goes on with --resume until it has
ended. After each kill: model.pt is the old or the new one, to the bit; last.pt and history.csv are whole and no epoch is lost;
the lock is free. In the end weights and history are those of a run that was never stopped, and no temporary file is left.
The last line is `N kills, N resumed, 0 lost`; the exit code is 1 if anything was lost.
"""
import argparse
import csv
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from conftest import ROOT, SMALL, make_tree


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, kills, resumed, lost = random.Random(args.seed), 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tree = make_tree(folder / "tree", counts=(("train", 40), ("val", 20), ("test", 20)))
        for share, mode in ((args.kills // 2, ["--epochs", "40"]), (args.kills - args.kills // 2, ["--finetune", "last", "--epochs", "6"])):
            faults = Faults(folder, tree, mode, rng)
            while share:
                killed, started_again, problems = faults.kill_until_finished(share)
                share, kills, resumed, lost = share - killed, kills + killed, resumed + started_again, lost + problems
    print(*lost, sep="\n", end="\n" if lost else "")
    print(f"{kills} kills, {resumed} resumed, {len(lost)} lost")
    return bool(lost)


class Faults:
    """A finished run in `folder`/old, and the one that is to replace it, never stopped, in `folder`/whole."""

    def __init__(self, folder: Path, tree: Path, mode: list[str], rng: random.Random):
        self.folder, self.rng = folder, rng
        # No cache, so that the feature pass is in reach of the kills, of the resumed runs too.
        self.options = ["--data", str(tree), *SMALL, *mode, "--batch-size", "16", "--no-cache"]
        if not (folder / "old").exists():
            assert self.start("old", "--epochs", "1")[0].wait() == 0
        shutil.rmtree(folder / "whole", ignore_errors=True)
        shutil.copytree(folder / "old", folder / "whole")
        process, begun = self.start("whole")
        assert process.wait() == 0
        self.seconds = time.monotonic() - begun

    def start(self, name: str, *options: str):
        """Start train.py in a folder: the process, once it has said its first word, and that moment."""
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *self.options, *options, "--out", str(self.folder / name)],
                                   stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        process.words = [process.stderr.readline()]
        process.listener = threading.Thread(target=lambda: process.words.extend(process.stderr))
        process.listener.start()
        return process, time.monotonic()

    def kill_until_finished(self, most: int):
        """Kill and resume, `most` times or until the run has ended: kills, resumed runs, and what was lost."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.folder / "old", out)
        kills = resumed = epochs = 0
        problems = []
        while True:
            process, begun = self.start("out", "--resume")
            finish = kills == most
            number = self.rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
            if not finish:
                try:
                    process.wait(self.rng.uniform(0, 1.1) * self.seconds)
                except subprocess.TimeoutExpired:
                    process.send_signal(number)
            code = process.wait()
            process.listener.join()
            told = "".join(process.words[-12:])
            if code not in ((0,) if finish else (0, 143, -number)):  # -15: it came when all was done and Python was ending
                problems.append(f"exit code {code}: {told}")
            if code == 143 and "--resume" not in told:
                problems.append(f"SIGTERM without a word on --resume: {told}")
            resumed += kills > 0 and not problems
            epochs, finished, found = self.check(out, epochs, code)
            problems += [f"kill {kills + 1}, by {number.name}, exit code {code}: {problem}" for problem in found]
            kills += not finished  # a kill that came too late is none
            if finished or problems:
                return kills, resumed, problems

    def check(self, out: Path, before: int, code: int) -> tuple[int, bool, list[str]]:
        """The number of epochs in last.pt, whether the run has finished, and all that is wrong in its folder.

        Before this run it had `before` epochs, and it ended with exit code `code`.
        """
        import torch
        from common import Locked, locked
        problems = []
        try:
            names = {path.name for path in out.iterdir()}
            with locked(out / ".lock"):
                last = torch.load(out / "last.pt", weights_only=True)
            model, old, new = (torch.load(folder / "model.pt", weights_only=True) for folder in (out, self.folder / "old", self.folder / "whole"))
            rows, old_rows, new_rows = (read_history(folder) for folder in (out, self.folder / "old", self.folder / "whole"))
        except (Exception, Locked) as error:
            return before, False, [f"{type(error).__name__}: {error}"]
        epochs = len(last.get("history", new_rows if same(model, new) else []))
        finished = epochs == len(new_rows) and last["finished"]
        if epochs < before or code == 0 and not finished:
            problems.append(f"last.pt has {epochs} epochs; before it had {before}")
        if "history" in last and [numbers(row) for row in last["history"]] != new_rows[:epochs]:
            problems.append("the history in last.pt is not that of a run never stopped")
        if not (same(model, new) or not finished and same(model, old)):
            problems.append("model.pt is neither the old one nor that of a run never stopped")
        if rows != new_rows if finished else rows not in (old_rows, new_rows[:epochs], new_rows[:epochs + 1]):
            problems.append(f"history.csv has other rows than the old one's or the first of a run never stopped: {len(rows)}")
        strays = names - {"model.pt", "last.pt", "history.csv"}
        if any(code >= 0 or not name.endswith((".lock", ".tmp")) for name in strays):
            problems.append(f"left behind: {', '.join(strays)}")
        return epochs, finished, problems


def read_history(folder: Path) -> list[dict]:
    with open(folder / "history.csv", newline="") as file:
        return [numbers(row) for row in csv.DictReader(file)]


def numbers(row: dict) -> dict:
    """A row of the history as numbers, without its seconds."""
    return {key: float(value) for key, value in row.items() if key != "seconds"}


def same(a: dict, b: dict) -> bool:
    """Whether two checkpoints are the same model, to the bit."""
    import torch
    return (all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in b["state_dict"])
            and a["temperature"] == b["temperature"] and numbers(a["metrics"]) == numbers(b["metrics"]))


if __name__ == "__main__":
    sys.exit(main())
