"""Measure the bounds of FAULTS, in seconds, on a quiet machine:  python3 .ci/bounds.py

A line a fault: start method or mode, median and worst of some runs, the bound. Exits 1 when the worst
of one is over its bound. The unit tests wait for the events themselves and measure nothing. Ray's rows
are there where Ray is installed.
"""

import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec

TOP = str(pathlib.Path(__file__).resolve().parent.parent)
sys.path.insert(0, TOP)
import concurry  # noqa: E402

METHODS = "forkserver", "spawn", "fork"
RUNS = 5


class Stubborn(concurry.Worker):
    """Ignore TERM and never return."""

    def pid(self):
        return os.getpid()

    def sleep(self, seconds):
        time.sleep(seconds)

    def ignore(self, path):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.block(path)

    def block(self, path):
        with open(path, "w"):               # a FIFO: the other side is waiting
            pass
        while True:
            time.sleep(100)


def gone(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def seconds_until(condition):
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > 20:
            return float("inf")
        time.sleep(0.001)
    return time.perf_counter() - began


def program(code, *args):
    """Start a Python program; return it when it has printed its first line, and that line's words."""
    head = f"import sys; sys.path.insert(0, {TOP!r})\n"
    child = subprocess.Popen([sys.executable, "-c", head + code, *args], stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True)
    return child, child.stdout.readline().split()


PARENT = """
import concurry, time
pool = concurry.Executor("process", 3, mp_context=sys.argv[1])
if sys.argv[2] == "busy":
    for _ in range(3): pool.submit(time.sleep, 100)
print(*[backend.link.process.pid for backend in pool._pool.backends], flush=True)
time.sleep(100)
"""


def parent_ends(method, state, number):
    child, pids = program(PARENT, method, state)
    child.send_signal(number)
    try:
        return seconds_until(lambda: all(map(gone, pids)))
    finally:
        child.wait()
        child.stdout.close()


def exit_with_idle_worker(mode):
    size = 1 if mode in ("sync", "asyncio") else 3
    child, _ = program("import concurry\n"
                       f"pool = concurry.TaskWorker.options(mode={mode!r}, max_workers={size}).init()\n"
                       "pool.submit(abs, 1).result()\nprint(1, flush=True)")
    began = time.perf_counter()
    child.wait()
    child.stdout.close()
    return time.perf_counter() - began


def place(method):
    """Return the options of a worker in a process, or of one in an actor."""
    return {"mode": "ray"} if method == "ray" else {"mode": "process", "mp_context": method}


def death_in_a_task(method):
    with concurry.TaskWorker.options(**place(method)).init() as pool:
        pid = pool.submit(os.getpid).result()
        began = time.perf_counter()
        future = pool.submit(os.kill, pid, signal.SIGKILL)
        assert isinstance(future.exception(20), concurry.WorkerDiedError)
        return time.perf_counter() - began


def replacement_of_an_idle_one(method):
    with concurry.Executor("process", 1, mp_context=method) as pool:
        pid = pool.submit(os.getpid).result()
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        seconds_until(lambda: pool.get_pool_stats()["restarts"])
        assert pool.submit(os.getpid).result(20) != pid
        return time.perf_counter() - began


def slot_of_the_dead(method):
    """From the kill of a worker that holds the only slot until another thread has it."""
    limits = concurry.LimitSet([concurry.ResourceLimit("slots", 1)])

    def hold(limits):
        with limits.acquire():
            time.sleep(100)
    with concurry.TaskWorker.options(**place(method)).init() as pool:
        pid = pool.submit(os.getpid).result()
        future = pool.submit(hold, limits)
        seconds_until(lambda: limits.get_stats()["slots"]["in_use"])
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        limits.acquire(timeout=20).release()
        span = time.perf_counter() - began
        assert isinstance(future.exception(20), concurry.WorkerDiedError)
        return span


def stop_beyond_its_timeout(method, timeout=0.5):
    path = f"/tmp/concurry-bounds-{os.getpid()}"
    os.mkfifo(path)
    try:
        pool = Stubborn.options(max_workers=3, **place(method)).init()
        pids = [pool.pid().result() for _ in range(3)]
        for _ in range(3):
            pool.ignore(path) if method != "ray" else pool.block(path)
            open(path).close()
        began = time.perf_counter()
        pool.stop(timeout)
        assert method == "ray" or all(map(gone, pids))
        seconds_until(lambda: all(map(gone, pids)))         # Ray tells of the end a little before it
        return time.perf_counter() - began - timeout
    finally:
        os.unlink(path)


def main():
    rows = [(f"{row:>5} {name}, {method}", bound, lambda measure=measure, method=method: measure(method))
            for method in METHODS for row, name, bound, measure in (
                (1, "death in a task", 1, death_in_a_task),
                (2, "idle worker replaced", 1, replacement_of_an_idle_one),
                (14, "slot of a dead worker", 1, slot_of_the_dead),
                (18, "stop, beyond its timeout", 1, stop_beyond_its_timeout),
                (22, "TERM to the parent", 1, lambda m: parent_ends(m, "idle", signal.SIGTERM)),
                (23, "KILL to the parent, idle", 2, lambda m: parent_ends(m, "idle", signal.SIGKILL)),
                (23, "KILL to the parent, busy", 2, lambda m: parent_ends(m, "busy", signal.SIGKILL)))]
    rows += [(f"   19 exit with idle workers, {mode}", 1, lambda mode=mode: exit_with_idle_worker(mode))
             for mode in ("sync", "thread", "process", "asyncio")]
    if find_spec("ray"):
        import ray
        ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        rows += [(f"{row:>5} {name}, ray", 1, lambda measure=measure: measure("ray")) for row, name, measure in (
            (1, "death in a task", death_in_a_task), (14, "slot of a dead worker", slot_of_the_dead),
            (18, "stop, beyond its timeout", stop_beyond_its_timeout))]
    missed = 0
    print(f"{'row':>5} {'fault':40} {'median':>8} {'worst':>8} {'bound':>6}")
    for name, bound, measure in rows:
        spans = [measure() for _ in range(RUNS)]
        is_over = max(spans) > bound
        missed += is_over
        print(f"{name:46} {statistics.median(spans):8.3f} {max(spans):8.3f} {bound:6}{'  OVER' * is_over}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    import logging
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.exit(main())
