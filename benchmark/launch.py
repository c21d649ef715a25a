"""Runs a list of commands for several seeds and gathers what came out in a set. Used by the *.sh files beside it:

    benchmark/classic.sh                                            # what is not finished yet
    SEEDS=1-3 WORKERS=4 benchmark/classic.sh                        # three seeds, four runs at a time
    RESULTS=benchmark/results/mine OPTIONS="--q-lambda 0.8" benchmark/classic.sh        # the same with a change
    benchmark/classic.sh --list                                     # the commands, without running any
    benchmark/atari5.sh --unfinished                                # adds what there is of runs that are not over
    sbatch --array=1-$(benchmark/classic.sh --list | wc -l) benchmark/classic.sh        # on a Slurm cluster

The commands come from standard input, one per line: `python script.py --env-id ... [options]`, with `name:` before it
where a table compares variants of one script. This adds --seed. A run works in runs/<set>/<run>__<hash of its
command and script>, with its output in log.txt; collect.py evaluates it there and adds it to the set. A run that was
stopped goes on from its checkpoint when the list is launched again. It is finished, and skipped, when the set has it
from the same command, script and number of evaluation episodes (from the same command alone, where the set does not
know the script). Ctrl-C asks all runs to stop in order, a second one kills them.

    SEEDS     seeds, as in "1-5 8"
    WORKERS   runs at a time (1)
    CORES     cores that each of several workers is pinned to; 0 pins nothing (the cores there are, shared out evenly)
    OPTIONS   further options for every command
    RESULTS   the set (benchmark/results/<name of the list>)
    EPISODES  greedy episodes to evaluate each agent in (100)

Several workers run with OMP_NUM_THREADS=1, unless it is set. Exit codes: 0 all is finished, 1 a run failed, 2 nothing
was run because the list is wrong, 130 interrupted.
"""

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from collect import UNFINISHED, ResultError, add_to_set, fail, read_set

HERE = Path(__file__).resolve().parent


@dataclass
class Job:
    name: str
    key: tuple  # environment, variant, seed
    command: str
    script: str  # hash of its code
    folder: Path

    def run_folder(self):
        """Of its last run that has a checkpoint, seen from `folder`; None before there is one."""
        return max(
            (file.parent.relative_to(self.folder) for file in self.folder.glob("runs/*/checkpoint.pt")), default=None
        )


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
    return list(dict.fromkeys(seeds)) or fail("SEEDS is empty")


def split(words):
    try:
        return shlex.split(words)
    except ValueError as error:
        fail(f"{error}: {words}")


def hash_code(script):
    """What a run depends on: its script, and pqn.py if it is one of benchmark/'s, which import that."""
    code = [Path(script), *[Path("pqn.py")] * (Path(script).parent.name == "benchmark")]
    return hashlib.sha1(b"".join(file.read_bytes() for file in code)).hexdigest()[:12]


def read_jobs(name, lines, seeds, runs):
    """All jobs of the list, one seed after the other, so that a list stopped halfway has whole seeds."""
    jobs = {}
    for seed in seeds:
        for line in lines:
            variant, command = re.fullmatch(r"(?:([\w.+-]+):\s+)?(.*)", line).groups()
            words = split(command) + split(os.environ.get("OPTIONS", "")) + ["--seed", str(seed)]
            if words[0] != "python" or words.count("--seed") > 1 or "--env-id" not in words:
                fail(f"not 'python script.py --env-id ...' without --seed: {line}")
            if not Path(words[1]).is_file():
                fail(f"there is no {words[1]}: {line}")
            key = words[words.index("--env-id") + 1].split(":")[-1], variant or Path(words[1]).stem, seed
            command, script = shlex.join(words), hash_code(words[1])
            run = re.sub(r"[^\w.-]", "-", "__".join(map(str, key)))
            if run in jobs:
                fail(f"two commands for {run}: give them names, 'name: python ...'")
            made_by = hashlib.sha1(f"{command} {script}".encode()).hexdigest()[:6]
            jobs[run] = Job(run, key, command, script, runs / f"{run}__{made_by}")
    return list(jobs.values()) or fail(f"the list of {name} is empty")


def is_finished(job, run, episodes):
    """Whether the set's run is the job's own; one of another command is never replaced."""
    if run is None:
        return False
    if run.about["command"] != job.command:
        fail(f"the set has {job.name} of another command ({run.about['command']}): set RESULTS to another folder")
    same = run.about["script_sha1"] == job.script and run.about["episodes"] == episodes
    return not run.unfinished and (same or not run.about["script_sha1"])


class Runner:
    """Runs jobs in worker threads, each with cores of its own, and stops them all on a signal."""

    def __init__(self, workers, episodes, results):
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.cores_each = setting("CORES", len(self.cores) // workers if workers > 1 else 0)
        if self.cores_each * workers > len(self.cores):
            fail(f"WORKERS={workers} × CORES={self.cores_each} are more than the {len(self.cores)} cores there are")
        self.episodes, self.results, self.environment = episodes, results, dict(os.environ)
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

    def execute(self, words, folder, claim):
        """Runs a command of the project in a folder and appends its output to log.txt there; its exit code. The process
        shares the claim to the folder, which so outlives a launcher that is killed."""
        words = [sys.executable, str(Path(words[1]).resolve()), *words[2:]]
        with open(folder / "log.txt", "a") as log:
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT, "cwd": folder}
            options |= {"env": self.environment, "start_new_session": True, "pass_fds": [claim.fileno()]}
            with self.lock:
                if self.signals:
                    return None
                process = subprocess.Popen(words, **options)
                self.processes.add(process)
            process.wait()
            with self.lock:
                self.processes.remove(process)
            return process.returncode

    def acquire(self, claim, job):
        """Waits until no other process works in the run's folder; False if a signal came first."""
        waited = False
        while not self.signals:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not waited:
                    print(f"{job.name}: waiting for the process that is at work in {job.folder}", flush=True)
                waited = True
                time.sleep(0.2)
        return False

    def evaluate(self, job, claim, *options):
        """Exit code of collect.py, which writes a set of this one run into the job's folder."""
        if not job.run_folder():
            return UNFINISHED
        words = ["python", str(HERE / "collect.py"), str(job.run_folder()), ".", "--variant", job.key[1], *options]
        words += ["--command", job.command, "--script-sha1", job.script, "--episodes", str(self.episodes)]
        return self.execute(words, job.folder, claim)

    def complete(self, job, claim):
        """Exit code of what is left to do: of training, unless it is over, and of the evaluation."""
        code = self.evaluate(job, claim)
        if code == UNFINISHED:
            resume = ["--resume", str(job.run_folder())] if job.run_folder() else []
            code = self.execute(split(job.command) + resume, job.folder, claim)
            code = self.evaluate(job, claim) if code == 0 else code
        return code

    def run(self, job, unfinished):
        """Brings a run to its end and adds it to the set, or adds it as it is: "ran", "failed" or "stopped", and what
        there is to say about it."""
        if self.signals:
            return "stopped", "not started"
        started = time.time()
        try:
            if hash_code(split(job.command)[1]) != job.script:
                return "failed", "its script has changed since the list was launched"
            job.folder.mkdir(parents=True, exist_ok=True)
            with open(job.folder / "claim", "a") as claim:
                if unfinished:
                    code = self.evaluate(job, claim, "--unfinished")
                else:
                    code = self.complete(job, claim) if self.acquire(claim, job) else None
            if code == 0:
                (run,) = read_set(job.folder)
                add_to_set(self.results, [run])
                returns = f"training return {run.about['train_return']:.1f}, greedy {run.about['greedy_mean']:.1f}"
                return "ran", f"{time.time() - started:.0f} s, {returns}"
            if self.signals:
                return "stopped", "goes on when it is launched again"
            last = (job.folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1]
            return "failed", f"exit code {code}, {job.folder / 'log.txt'}: {last}"
        except (OSError, ResultError) as error:
            return "failed", str(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the list")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    parser.add_argument("--unfinished", action="store_true", help="evaluate and add runs that are not over; train none")
    parser.add_argument("--measures", nargs="+", help="what the table compares: see report.py")
    args = parser.parse_args()
    lines = [line.strip() for line in sys.stdin if line.strip() and not line.strip().startswith("#")]
    seeds, workers, episodes = read_seeds(os.environ.get("SEEDS", "1")), setting("WORKERS", 1), setting("EPISODES", 100)
    if workers < 1 or episodes < 1:
        fail("WORKERS and EPISODES must be at least 1")
    results = Path(os.environ.get("RESULTS") or f"benchmark/results/{args.name}")
    jobs = read_jobs(args.name, lines, seeds, Path("runs", results.name))
    baseline = jobs[0].key[1] if len({job.key[1] for job in jobs}) > 1 else ""  # the list's first
    if args.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may be `head`
        print("\n".join(job.command for job in jobs))
        return
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task:
        if not 1 <= int(task) <= len(jobs):
            fail(f"there is no command {task}: the list of {args.name} has {len(jobs)}")
        jobs = [jobs[int(task) - 1]]
    runner = Runner(workers, episodes, results)
    try:
        there = {run.key: run for run in read_set(results)} if (results / "runs.csv").exists() else {}
        todo = [job for job in jobs if not is_finished(job, there.get(job.key), episodes)]
        results.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=results).close()  # better known now than after training
    except (OSError, ResultError) as error:
        fail(error)
    finished = len(jobs) - len(todo)
    if args.unfinished:
        todo = [job for job in todo if job.run_folder() and (job.key not in there or there[job.key].unfinished)]
    print(f"{args.name}: {len(todo)} to run, {finished} finished before, {workers} at a time", flush=True)
    outcomes = {}

    def run(job):
        outcomes[job.name] = outcome, message = runner.run(job, args.unfinished)
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

    count = lambda wanted: sum(outcome == wanted for outcome, _ in outcomes.values())
    print(f"\n{args.name}: {count('ran')} ran, {count('failed')} failed, {count('stopped')} stopped, ", end="")
    print(f"{finished} skipped as finished; results in {results}")
    for name, (outcome, message) in outcomes.items():
        if outcome == "failed":
            print(f"  {name} failed: {message}")
    if runner.signals:
        raise SystemExit(130)
    if count("failed"):
        raise SystemExit(1)
    if not task:
        import report  # not before: it takes a second, and a task of a job array needs no table

        report.main(report.Args((results,), baseline=baseline, **{"measures": args.measures} if args.measures else {}))


if __name__ == "__main__":
    main()
