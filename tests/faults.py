"""Kill runs of train.py at random moments, resume them, and check that nothing is lost.

    python tests/faults.py --kills 20

A run that has finished is trained again in a copy of its folder: first the classifier alone, then with the last stage
of the network (--finetune last). The new run is killed again and again, three times of four by SIGKILL, otherwise by
SIGTERM, and continued with --resume until it has finished. After each kill it is checked that

- model.pt is the model of the old run or of an uninterrupted new run, to the bit,
- last.pt and history.csv are complete files, and no epoch is lost,
- the lock is free, and only SIGKILL leaves temporary files.

When the run has finished, model and history have to be those of an uninterrupted run. The last line on stdout is
`N kills, N resumed, 0 lost`; the exit code is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT, TINY, equal_tensors, load_pt, make_tree, read_csv


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    rng, total = random.Random(args.seed), Outcome()
    shares = {
        ("--epochs", "40"): args.kills // 2,
        ("--finetune", "last", "--epochs", "6"): args.kills - args.kills // 2,
    }
    with tempfile.TemporaryDirectory() as folder:
        tree = make_tree(Path(folder) / "tree", counts=(("train", 40), ("val", 20), ("test", 20)))
        for options, kills in shares.items():
            experiment = Experiment(Path(folder), tree, options, rng)
            while kills:
                outcome = experiment.kill_until_finished(kills)
                kills -= outcome.kills
                total.add(outcome)
    print(*total.problems, sep="\n", end="\n" if total.problems else "")
    print(f"{total.kills} kills, {total.resumed} resumed, {len(total.problems)} lost")
    return bool(total.problems)


@dataclass
class Outcome:
    """What happened to runs that were killed."""

    kills: int = 0
    resumed: int = 0  # runs that continued after a kill
    problems: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.kills += other.kills
        self.resumed += other.resumed
        self.problems += other.problems


class Training:
    """A process of train.py, started and past its first message."""

    def __init__(self, arguments: list[object]) -> None:
        line = [str(part) for part in (sys.executable, ROOT / "train.py", *arguments)]
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.messages = [self.process.stderr.readline()]
        self.started = time.monotonic()
        self.reader = threading.Thread(target=lambda: self.messages.extend(self.process.stderr))
        self.reader.start()

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and the last messages."""
        code = self.process.wait()
        self.reader.join()
        return code, "".join(self.messages[-12:])


class Experiment:
    """Three output folders: the finished run `old`, an uninterrupted new run, and the one that is killed."""

    def __init__(self, folder: Path, tree: Path, options: tuple[str, ...], rng: random.Random) -> None:
        self.old, self.uninterrupted, self.out = folder / "old", folder / "uninterrupted", folder / "out"
        # Without the cache, each run spends time on the feature pass, so that kills fall into it, too.
        self.arguments, self.rng = ["--data", tree, *TINY, *options, "--batch-size", 16, "--no-cache"], rng
        self.test_every = 2 if "--finetune" in options else 1  # of six epochs of fine-tuning
        if not self.old.exists():
            code, messages = Training([*self.arguments, "--epochs", 1, "--out", self.old]).wait()
            assert code == 0, messages
        self.copy_old(self.uninterrupted)
        training = Training([*self.arguments, "--out", self.uninterrupted])
        code, messages = training.wait()
        assert code == 0, messages
        self.seconds = time.monotonic() - training.started

    def copy_old(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.old, folder)

    def kill_until_finished(self, most: int) -> Outcome:
        """Kill and resume a new run until it has finished; after `most` kills, let it finish."""
        self.copy_old(self.out)
        outcome, epochs = Outcome(), 0
        while True:
            training = Training([*self.arguments, "--out", self.out, "--resume"])
            undisturbed = outcome.kills == most
            number = self.rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
            if not undisturbed:
                try:
                    training.process.wait(self.rng.uniform(0, 1.1) * self.seconds)
                except subprocess.TimeoutExpired:
                    training.process.send_signal(number)
            code, messages = training.wait()
            # 0: the signal came too late; -15: it came while Python was ending.
            if code not in ((0,) if undisturbed else (0, 143, -number)):
                outcome.problems.append(f"exit code {code}: {messages}")
            if code == 143 and "--resume" not in messages:
                outcome.problems.append(f"SIGTERM without a hint at --resume: {messages}")
            outcome.resumed += outcome.kills > 0 and not outcome.problems
            epochs, finished, problems = self.check(epochs, code)
            where = f"kill {outcome.kills + 1}, by {number.name}, exit code {code}"
            outcome.problems += [f"{where}: {problem}" for problem in problems]
            outcome.kills += not finished  # otherwise the signal came too late
            if finished or outcome.problems:
                return outcome

    def rows_during_training(self, rows: list[dict]) -> list[dict]:
        """Return the rows of a finished history as they were before the end, which adds the saved epoch's test."""

        def measured(epoch: float) -> bool:
            return epoch % self.test_every == 0 or epoch == len(rows)

        without_test = {"test_loss": None, "test_acc": None}
        return [row if measured(row["epoch"]) else row | without_test for row in rows]

    def check(self, before: int, code: int) -> tuple[int, bool, list[str]]:
        """Check the folder of the killed run, which had `before` epochs before, and ended with exit code `code`.

        Returns the number of epochs in last.pt, whether the run has finished, and all that is wrong.
        """
        from common import hold_lock

        problems, folders = [], (self.out, self.old, self.uninterrupted)
        try:
            names = {path.name for path in self.out.iterdir()}
            with hold_lock(self.out / ".lock"):
                last = load_pt(self.out / "last.pt")
            model, old_model, new_model = (load_pt(folder / "model.pt") for folder in folders)
            rows, old_rows, new_rows = (read_history(folder) for folder in folders)
        except Exception as error:
            return before, False, [f"{type(error).__name__}: {error}"]
        saved = [numbers(row) for row in last["run"]["history"]] if "run" in last else None
        expected = self.rows_during_training(new_rows)
        if saved is None:  # last.pt says only that the run has finished: the old run or the new one
            saved, expected = (new_rows, new_rows) if same_model(model, new_model) else ([], expected)
        finished = last["finished"] and len(saved) == len(new_rows)
        if len(saved) < before or (code == 0 and not finished):
            problems.append(f"last.pt has {len(saved)} epochs; before it had {before}")
        if saved != expected[: len(saved)]:
            problems.append("the history in last.pt is not that of an uninterrupted run")
        if not (same_model(model, new_model) or (not finished and same_model(model, old_model))):
            problems.append("model.pt is neither the old one nor that of an uninterrupted run")
        possible = [expected[: len(saved)]]
        if not finished:  # history.csv is written just before last.pt
            possible += [old_rows, expected[: len(saved) + 1], *([new_rows] if len(saved) == len(new_rows) else [])]
        if rows not in possible:
            problems.append(f"history.csv has {len(rows)} rows, which are not those of an uninterrupted run")
        strays = names - {"model.pt", "last.pt", "history.csv"}
        if any(code >= 0 or not name.endswith((".lock", ".tmp")) for name in strays):
            problems.append(f"left behind: {', '.join(strays)}")
        return len(saved), finished, problems


def read_history(folder: Path) -> list[dict]:
    return [numbers(row) for row in read_csv(folder / "history.csv")]


def numbers(row: dict) -> dict:
    """Return a row of the history, or the metrics of a model, as numbers; None for what was not measured."""
    compared = {key: value for key, value in row.items() if key not in ("seconds", "measured")}
    return {key: None if value in ("", None) else float(value) for key, value in compared.items()}


def same_model(a: dict, b: dict) -> bool:
    """Return whether two checkpoints are the same model, to the bit."""
    return (
        equal_tensors(a["state_dict"], b["state_dict"])
        and a["temperature"] == b["temperature"]
        and numbers(a["metrics"]) == numbers(b["metrics"])
    )


if __name__ == "__main__":
    sys.exit(main())
