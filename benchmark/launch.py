"""Runs a list of commands for several seeds and keeps a small CSV of each. Used by the *.sh files beside it:

    benchmark/classic.sh                                            # what is not finished yet
    SEEDS=1-3 WORKERS=4 benchmark/classic.sh                        # three seeds, four runs at a time
    RESULTS=benchmark/results/mine OPTIONS="--q-lambda 0.8" benchmark/classic.sh        # the same with a change
    benchmark/classic.sh --list                                     # the commands, without running any
    sbatch --array=1-$(benchmark/classic.sh --list | wc -l) benchmark/classic.sh        # on a Slurm cluster

The commands come from standard input, one per line: `python script.py --env-id ... [options]`, with `name:` before it
where a table compares variants of one script. This adds --seed. A run works in runs/<set>/<run>__<hash of its
command and script>; its output is in log.txt there. A run that was stopped goes on from its checkpoint when the list
is launched again; one whose CSV is complete is skipped. Ctrl-C asks all runs to stop in order, a second one kills them.

    SEEDS     seeds, as in "1-5 8"
    WORKERS   runs at a time (1)
    CORES     cores that each of several workers is pinned to; 0 pins nothing (the cores there are, shared out evenly)
    OPTIONS   further options for every command
    RESULTS   folder of the CSVs (benchmark/results/<set>)
    EPISODES  greedy episodes to evaluate each agent in (100)

Several workers run with OMP_NUM_THREADS=1, unless it is set. Exit codes: 0 all is finished, 1 a run failed, 2 nothing
was run because the list is wrong, 130 interrupted.
"""

import argparse
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from results import ResultError, fail, read_run, summarise

HERE = Path(__file__).resolve().parent


@dataclass
class Job:
    name: str
    variant: str
    command: str
    result: Path
    folder: Path


def setting(name, default):
    """A whole number from the environment."""
    value = os.environ.get(name) or str(default)
    if not value.isdigit():
        fail(f"{name} must be a whole number, not {value!r}")
    return int(value)


def read_seeds(written):
    seeds = []
    for part in written.split():
        if not re.fullmatch(r"\d+(-\d+)?", part):
            fail(f'SEEDS must be numbers and ranges, as in "1-5 8", not {written!r}')
        first, last = (part.split("-") * 2)[:2]
        seeds += range(int(first), int(last) + 1)
    return seeds or fail("SEEDS is empty")


def read_jobs(name, lines, seeds, results):
    """All jobs of the list, one seed after the other, so that a list stopped halfway has whole seeds."""
    jobs = {}
    for seed in seeds:
        for line in lines:
            variant, command = re.fullmatch(r"(?:([\w.+-]+):\s+)?(.*)", line).groups()
            words = shlex.split(command) + shlex.split(os.environ.get("OPTIONS", "")) + ["--seed", str(seed)]
            if words[0] != "python" or words.count("--seed") > 1 or "--env-id" not in words:
                fail(f"not 'python script.py --env-id ...' without --seed: {line}")
            if not Path(words[1]).is_file():
                fail(f"there is no {words[1]}: {line}")
            variant = variant or Path(words[1]).stem
            env = words[words.index("--env-id") + 1].split(":")[-1]
            command, run = shlex.join(words), re.sub(r"[^\w.-]", "-", f"{env}__{variant}__{seed}")
            if run in jobs:
                fail(f"two commands for {run}: give them names, 'name: python ...'")
            # A changed script starts its runs anew. (Those in benchmark/ import pqn.py.)
            code = [Path(words[1]), *[Path("pqn.py")] * (Path(words[1]).parent.name == "benchmark")]
            made_by = hashlib.sha1(b"".join([command.encode(), *(file.read_bytes() for file in code)])).hexdigest()
            folder = Path("runs", results.name, f"{run}__{made_by[:6]}")
            jobs[run] = Job(run, variant, command, results / f"{run}.csv", folder)
    return list(jobs.values()) or fail(f"the list of {name} is empty")


def is_finished(job):
    """Whether its CSV is complete; one of another command is never overwritten."""
    if not job.result.exists():
        return False
    try:
        made_by = read_run(job.result).about["command"]
    except ResultError as error:
        print(f"{error}; it will be made again", flush=True)
        return False
    if made_by != job.command:
        fail(f"{job.result} was made by another command ({made_by}): delete it, or set RESULTS to another folder")
    return True


class Runner:
    """Runs jobs in worker threads, each with cores of its own, and stops them all on a signal."""

    def __init__(self, workers, episodes):
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.cores_each = setting("CORES", len(self.cores) // workers if workers > 1 else 0)
        if self.cores_each * workers > len(self.cores):
            fail(f"WORKERS={workers} × CORES={self.cores_each} are more than the {len(self.cores)} cores there are")
        self.episodes, self.environment = episodes, dict(os.environ)
        if workers > 1:
            self.environment.setdefault("OMP_NUM_THREADS", "1")
        self.signals, self.processes, self.lock = [], set(), threading.RLock()

    def pin(self):
        """Called by each worker thread: gives it the next of the cores, which the processes it starts inherit."""
        with self.lock:
            mine, self.cores = self.cores[: self.cores_each], self.cores[self.cores_each :]
        if mine:
            os.sched_setaffinity(0, mine)

    def stop(self, signum, _):
        """The first signal asks the runs to save and end; the second kills them. (SIGINT, whichever arrived: a cluster
        may send SIGTERM to them too, and twice the same signal ends a script at once.)"""
        with self.lock:
            self.signals.append(signum)
            for process in self.processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT if len(self.signals) == 1 else signal.SIGKILL)

    def execute(self, words, folder):
        """Runs a command of the project in a folder and appends its output to log.txt there; its exit code."""
        words = [sys.executable, str(Path(words[1]).resolve()), *words[2:]]
        with open(folder / "log.txt", "a") as log:
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            with self.lock:
                if self.signals:
                    return None
                process = subprocess.Popen(words, cwd=folder, env=self.environment, start_new_session=True, **streams)
                self.processes.add(process)
            process.wait()
            with self.lock:
                self.processes.remove(process)
            return process.returncode

    def run(self, job):
        """Trains, evaluates and writes the CSV: "ran", "failed" or "stopped", and what there is to say about it."""
        if self.signals:
            return "stopped", "not started"
        started, trained = time.time(), job.folder / "trained"
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            if not trained.exists():
                checkpoints = sorted(job.folder.glob("runs/*/checkpoint.pt"))
                resume = ["--resume", str(checkpoints[-1].parent.relative_to(job.folder))] if checkpoints else []
                code = self.execute(shlex.split(job.command) + resume, job.folder)
                if code == 0:
                    trained.touch()
            if trained.exists():
                run_folder = max(job.folder.glob("runs/*"), default=job.folder)
                words = ["python", str(HERE / "results.py"), str(run_folder.resolve()), str(job.result.resolve())]
                words += ["--variant", job.variant, "--episodes", str(self.episodes), "--command", job.command]
                code = self.execute(words, job.folder)
            if code == 0:
                about = read_run(job.result).about
                returns = f"training return {about['train_return']:.1f}, greedy {about['greedy_mean']:.1f}"
                return "ran", f"{time.time() - started:.0f} s, {returns}"
            if self.signals:
                return "stopped", "goes on when it is launched again"
            last = (job.folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1]
            return "failed", f"exit code {code}, {job.folder / 'log.txt'}: {last}"
        except (OSError, ResultError) as error:
            return "failed", str(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the set")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    args = parser.parse_args()
    lines = [line.strip() for line in sys.stdin if line.strip() and not line.strip().startswith("#")]
    seeds, workers, episodes = read_seeds(os.environ.get("SEEDS", "1")), setting("WORKERS", 1), setting("EPISODES", 100)
    if workers < 1 or episodes < 1:
        fail("WORKERS and EPISODES must be at least 1")
    results = Path(os.environ.get("RESULTS") or f"benchmark/results/{args.name}")
    jobs = read_jobs(args.name, lines, seeds, results)
    if args.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may be `head`
        print("\n".join(job.command for job in jobs))
        return
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task:
        if not 1 <= int(task) <= len(jobs):
            fail(f"there is no command {task}: the list of {args.name} has {len(jobs)}")
        jobs = [jobs[int(task) - 1]]
    todo = [job for job in jobs if not is_finished(job)]
    runner = Runner(workers, episodes)
    print(f"{args.name}: {len(todo)} to run, {len(jobs) - len(todo)} finished before, {workers} at a time", flush=True)
    outcomes = {}

    def run(job):
        outcomes[job.name] = outcome, message = runner.run(job)
        if message != "not started":
            print(f"[{len(outcomes)}/{len(todo)}] {job.name} {outcome}: {message}", flush=True)

    caught = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup the list goes on when the terminal is closed
        caught.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, runner.stop) for signum in caught}
    with ThreadPoolExecutor(workers, initializer=runner.pin) as pool:
        for future in [pool.submit(run, job) for job in todo]:
            future.result()
    for signum, handler in before.items():
        signal.signal(signum, handler)

    if any(outcome == "ran" for outcome, _ in outcomes.values()):
        try:
            summarise(results)
        except ResultError as error:
            print(f"no summary.csv: {error}")
    count = lambda wanted: sum(outcome == wanted for outcome, _ in outcomes.values())
    print(f"\n{args.name}: {count('ran')} ran, {count('failed')} failed, {count('stopped')} stopped, ", end="")
    print(f"{len(jobs) - len(todo)} skipped as finished; results in {results}")
    for name, (outcome, message) in outcomes.items():
        if outcome == "failed":
            print(f"  {name} failed: {message}")
    if runner.signals:
        raise SystemExit(130)
    if count("failed"):
        raise SystemExit(1)
    if not task:
        several = len({job.variant for job in jobs}) > 1  # the list's first is what the others are compared with
        baseline = ["--baseline", jobs[0].variant] if several else []
        raise SystemExit(subprocess.run([sys.executable, HERE / "report.py", results, *baseline]).returncode)


if __name__ == "__main__":
    main()
