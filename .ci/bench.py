"""Measure concurry against what the standard library offers for the same work.

    python3 .ci/bench.py [--quick] [--only PATTERN] [--runs N] [--json FILE] [--peers]

Prints, for each scenario, how many times the reference's time (or memory) ours takes, and
its target; exits with 1 when a target is missed. Every figure is the median of several
fresh interpreters, ours and theirs in turn, so that a slow minute of the machine hits both.

A scenario is a function of ROWS' fourth column. It is given `make`, which builds an executor
with that many workers, works with it through `submit` and `map` alone, checks the results,
and returns seconds or bytes: less is better. Work that processes do is made of builtins,
for nobody then has to import this file; only what uses limits there is imported from here.
For limits, `make` builds what is acquired, and what uses it. A rate has no reference: its
figure is the percentage that is missing, and more than it allows is an error. Ray's rows are
there where Ray is installed.
"""
import argparse
import asyncio
import concurrent.futures
import contextlib
import fnmatch
import gc
import itertools
import json
import multiprocessing.pool
import os
import pathlib
import pickle
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from time import perf_counter
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
QUICK = "BENCH_QUICK" in os.environ
MIB = 1 << 20
SECOND = 1_000_000_000              # in nanoseconds


def amount(n):
    """Return how often to do what is done n times, unless in a hurry."""
    return n // 5 if QUICK else n


# === Executors: ours ===

def ours(mode, workers=1, **options):
    """Build an executor of concurry's with unbounded queues, imported only now."""
    import concurry
    return concurry.Executor(mode, max_workers=workers,
                             **{"max_queued_tasks": None, **options})


def bounded(mode, workers=1):
    """Build one with the default bound of its queues."""
    import concurry
    return concurry.Executor(mode, max_workers=workers)


thread, process = partial(ours, "thread"), partial(ours, "process")


def single(mode, _workers=1):
    return ours(mode, None)


def on_demand(_workers=1):
    """Make a thread and an object for each call."""
    import concurry

    class OnDemand(concurry.Worker):
        def submit(self, function, *args):
            return function(*args)

    return OnDemand.options(mode="thread", on_demand=True).init()


# === Executors: theirs ===

def process_executor(workers=1):
    return concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("forkserver"))


class Pool(multiprocessing.pool.Pool):
    """`multiprocessing.Pool`, with the names of an executor."""
    multiprocessing.pool.ApplyResult.result = multiprocessing.pool.ApplyResult.get

    def submit(self, function, *args):
        return self.apply_async(function, args)


class LoopThread:
    """An event loop in a thread, fed by `run_coroutine_threadsafe`."""

    def __init__(self, _workers=1):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def submit(self, function, *args):
        return asyncio.run_coroutine_threadsafe(function(*args), self.loop)


class ThreadPerCall:
    """A bare thread, and a new object, for each call."""

    def __init__(self, _workers=1):
        pass

    def submit(self, function, *args):
        return BareThread(function, args)


class BareThread(threading.Thread):
    def __init__(self, function, args):
        super().__init__(target=self.work, args=(function, args))
        self.start()

    def work(self, function, args):
        self.value = function(*args)

    def result(self):
        self.join()
        return self.value


class SemaphoreExecutor(ThreadPoolExecutor):
    """At most a hundred calls submitted and not completed."""

    def __init__(self, workers=1):
        super().__init__(workers)
        self.slots = threading.Semaphore(100)

    def submit(self, function, *args):
        self.slots.acquire()
        future = super().submit(function, *args)
        future.add_done_callback(self.free)
        return future

    def free(self, _future):
        self.slots.release()


def loky(workers=1):
    try:
        from loky import get_reusable_executor
    except ImportError:
        from joblib.externals.loky import get_reusable_executor
    return get_reusable_executor(workers)


# === Ray: a worker of ours, and a bare actor ===

def ray_worker():
    """Return what calls it, and what gets the results of a list of calls."""
    import concurry

    class Negative(concurry.Worker):
        def of(self, n):
            return -n
    start_ray()
    return Negative.options(mode="ray", max_queued_tasks=None).init().of, concurry.gather


def bare_actor():
    import ray

    class Negative:
        def of(self, n):
            return -n
    start_ray()
    return ray.remote(Negative).remote().of.remote, ray.get


def start_ray():
    import ray
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)


# === Limits, ours and theirs ===

def slots(capacity=1):
    import concurry
    return concurry.LimitSet([concurry.ResourceLimit("slots", capacity)])


def use_slots(limits, times):
    for _ in range(times):
        with limits.acquire():
            pass


def use_rates(limits, times):
    for _ in range(times):
        with limits.acquire({"tokens": 5}) as acquired:
            acquired.update({"tokens": 3})


def use_semaphore(semaphore, times):
    for _ in range(times):
        with semaphore:
            pass


def one_slot():
    """Return what uses a limit so many times, and what checks that it was used so many times."""
    limits = slots()

    def check(times):
        stats = limits.get_stats()["slots"]
        assert (stats["granted"], stats["in_use"]) == (times, 0), stats

    return partial(use_slots, limits), check


def two_rates():
    """The windows are so short that grants leave them as fast as they come, as at length."""
    import concurry
    limits = concurry.LimitSet([concurry.CallLimit(10**9, window_seconds=0.05),
                                concurry.RateLimit("tokens", 10**10, window_seconds=0.05)])

    def check(times):
        stats = limits.get_stats()
        calls, tokens = stats["call_count"], stats["tokens"]
        assert (calls["granted"], tokens["granted"]) == (times, 5 * times), stats
        assert tokens["in_use"] == 3 * calls["in_use"], stats

    return partial(use_rates, limits), check


def one_semaphore():
    semaphore = threading.Semaphore()

    def check(_times):
        assert semaphore.acquire(blocking=False) and not semaphore.acquire(blocking=False)

    return partial(use_semaphore, semaphore), check


class Slot:
    """A set of one slot that is taken, with the methods of a semaphore of 0."""

    def __init__(self):
        self.limits = slots()
        self.acquire()

    def acquire(self):
        self.held = self.limits.acquire()

    def release(self):
        self.held.release()


def when_all_are_here(use, places, times, limits):
    """Use limits so many times, in a worker process; return its pid, the begin and the end."""
    use(limits, 100)
    pid, began = eval(MEET, places), perf_counter()
    use(limits, times)
    return pid, began, perf_counter()


def slots_of_processes(workers):
    import concurry
    pool = concurry.TaskWorker.options(mode="process", max_workers=workers, limits=slots(workers))
    return pool.init(partial(when_all_are_here, use_slots)).submit


def semaphore_of_processes(workers):
    semaphore = multiprocessing.Manager().Semaphore(workers)
    return partial(process_executor(workers).submit, when_all_are_here, use_semaphore,
                   limits=semaphore)


def hurry(until, limits):
    """Acquire as fast as possible; return when each was asked for, and when it was seen granted."""
    asked, granted = [], []
    with contextlib.suppress(TimeoutError):
        while (now := time.monotonic_ns()) < until:
            with limits.acquire(timeout=(until - now) / SECOND):
                granted.append(time.monotonic_ns())
            asked.append(now)
    return asked, granted


def hurrying(mode, workers):
    """Return a limit of 1,000 calls a second, and what has a worker hurry to use it."""
    import concurry
    limits = concurry.LimitSet([concurry.CallLimit(1000, per="second")])
    pool = concurry.TaskWorker.options(mode=mode, max_workers=workers, limits=limits).init(hurry)
    return limits, pool.submit


# === Instruments ===

def one_cpu(measure, make):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return measure(make)


@contextlib.contextmanager
def gate():
    """Give a function that returns once the gate is set, which it is at the end at the latest."""
    event = threading.Event()
    try:
        yield event
    finally:
        event.set()


# Tell that we are here, and wait until everybody is: opening a FIFO waits for its other end.
MEET = """(
    (os := __import__("os")).write(os.open(here, os.O_WRONLY), b"."),
    os.close(os.open(go, os.O_RDONLY)),
    os.getpid())[-1]"""


def together(submit, workers):
    """Submit so many calls that evaluate MEET with what they are given; return their results."""
    with tempfile.TemporaryDirectory() as folder:
        here, go = os.path.join(folder, "here"), os.path.join(folder, "go")
        os.mkfifo(here)
        os.mkfifo(go)
        futures = [submit({"here": here, "go": go}) for _ in range(workers)]
        arrivals, arrived = os.open(here, os.O_RDONLY), 0
        while arrived < workers:
            arrived += len(os.read(arrivals, workers))
        start = os.open(go, os.O_WRONLY)
        results = [future.result() for future in futures]
        os.close(arrivals)
        os.close(start)
    return results


def meet(executor, workers):
    """Have every worker process carry out one call; return their pids."""
    pids = set(together(partial(executor.submit, eval, MEET), workers))
    assert len(pids) == workers, pids
    return pids


def meet_threads(executor, workers):
    """Have every worker thread carry out one call."""
    barrier = threading.Barrier(workers)
    futures = [executor.submit(barrier.wait) for _ in range(workers)]
    assert sorted(future.result() for future in futures) == list(range(workers))


def descendants():
    """Return the pids of our children, their children, and so on."""
    children = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(os.getpid(), []))
    for pid in found:
        found.extend(children.get(pid, []))
    return set(found)


def memory(pid="self"):
    """Return the bytes of memory a process has, its share of what it shares."""
    gc.collect()
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has ended")


def cpu_time(pid):
    return time.clock_gettime(~pid << 3 | 2)    # Linux' clock of another process


# === Scenarios ===

def import_time(module):
    code = ("import sys, time; sys.path.insert(0, sys.argv[2]); began = time.perf_counter(); "
            "__import__(sys.argv[1]); print(time.perf_counter() - began)")
    command = [sys.executable, "-c", code, module(), str(HERE.parent)]
    return statistics.median(float(subprocess.check_output(command)) for _ in range(amount(10)))


def round_trip(make, calls=5000):
    executor = make(1)
    for i in range(100):
        assert executor.submit(abs, -i).result() == i
    calls = amount(calls)
    began = perf_counter()
    for i in range(calls):
        assert executor.submit(abs, -i).result() == i
    return (perf_counter() - began) / calls


def bulk(make, workers=1, calls=20_000, function=abs):
    executor = make(workers)
    assert executor.submit(function, 1).result() == 1
    calls = amount(calls)
    began = perf_counter()
    futures = [executor.submit(function, i) for i in range(calls)]
    total = sum(future.result() for future in futures)
    seconds = perf_counter() - began
    assert total == calls * (calls - 1) // 2
    return seconds / calls


def process_bulk(make, workers):
    executor = make(workers)
    meet(executor, workers)
    return bulk(lambda _: executor, calls=10_000)


def ray_round_trip(make, calls=2000):
    call, results = make()
    assert results([call(i) for i in range(100)]) == [-i for i in range(100)]
    calls = amount(calls)
    began = perf_counter()
    for i in range(calls):
        assert results([call(i)]) == [-i]
    return (perf_counter() - began) / calls


def ray_bulk(make, calls=2000):
    call, results = make()
    assert results([call(i) for i in range(100)]) == [-i for i in range(100)]
    began = perf_counter()
    found = results([call(i) for i in range(calls)])
    seconds = perf_counter() - began
    assert found == [-i for i in range(calls)]
    return seconds


async def echo(value):
    return value


def sleepers(make, calls=2000):
    executor = make(1)
    began = perf_counter()
    futures = [executor.submit(asyncio.sleep, 0.01, i) for i in range(calls)]
    assert [future.result() for future in futures] == list(range(calls))
    return perf_counter() - began


def transport(make, size, there, calls):
    """Send one large bytes object after the other, one way."""
    executor, load = make(1), bytes(size)
    function, argument, expected = (len, load, size) if there else (bytes, size, load)
    assert executor.submit(function, argument).result() == expected
    times = []
    for _ in range(amount(calls)):
        began = perf_counter()
        result = executor.submit(function, argument).result()
        times.append(perf_counter() - began)
        assert result == expected
        del result                  # its memory is given back outside the measured time
    return statistics.median(times)


def map_10k(make, chunksize):
    executor = make(2)
    meet(executor, 2)
    items = range(amount(10_000))
    began = perf_counter()
    results = list(executor.map(abs, items, chunksize=chunksize))
    seconds = perf_counter() - began
    assert results == list(items)
    return seconds


def process_start(make, workers):
    began = perf_counter()
    meet(make(workers), workers)
    return perf_counter() - began


def awaited(make, clock, calls=4000):
    """Await one call after the other in an event loop."""
    async def main():
        _executor, call = make(1)
        for i in range(100):
            assert await call(abs, -i) == i
        began = clock()
        for i in range(amount(calls)):
            assert await call(abs, -i) == i
        return (clock() - began) / amount(calls)
    return asyncio.run(main())


def await_ours(workers):
    executor = thread(workers)
    return executor, executor.submit


def await_theirs(workers):
    executor = ThreadPoolExecutor(workers)
    return executor, partial(asyncio.get_running_loop().run_in_executor, executor)


def uncontended(make, calls=10_000):
    use, check = make()
    use(calls)
    times = []
    for _ in range(amount(25)):
        began = perf_counter()
        use(calls)
        times.append((perf_counter() - began) / calls)
    check(calls * (1 + len(times)))
    return statistics.median(times)


def hand_over(make, rounds=10_000):
    """Two threads by turns release what the other one waits for, then wait for the other. On one
    CPU: with two it is a matter of luck whether a thread wakes up in 5 or in 50 microseconds.
    """
    mine, yours = make(), make()
    order = []

    def answer():
        for _ in range(rounds):
            yours.acquire()
            order.append("yours")
            mine.release()

    rounds = amount(rounds)
    other = threading.Thread(target=answer)
    other.start()
    time.sleep(0.01)                # it waits
    began = perf_counter()
    for _ in range(rounds):
        yours.release()
        mine.acquire()
        order.append("mine")
    seconds = perf_counter() - began
    other.join()
    assert order == ["yours", "mine"] * rounds
    return seconds / (2 * rounds)


def between_processes(make, workers=2, times=5000):
    """There is a slot for each process: they wait for answers, never for each other. On one CPU:
    with two the reference's time doubles when the machine has nothing else to do.
    """
    times = amount(times)
    pids, begins, ends = zip(*together(partial(make(workers), times=times), workers))
    assert len(set(pids)) == workers, pids
    assert max(begins) < min(ends)
    return (max(ends) - min(begins)) / (workers * times)


def rate_shortfall(make, workers):
    """The percentage of what a sliding window allows that was not granted, in a time that ends
    half a window after the last begins.
    """
    limits, submit = make(workers)
    began = time.monotonic_ns()
    until = began + (1 if QUICK else 3) * SECOND + SECOND // 2
    stamps = [future.result() for future in [submit(until) for _ in range(workers)]]
    windows = (time.monotonic_ns() - began) // SECOND + 1       # at most: it may be late
    granted = limits.get_stats()["call_count"]["granted"]
    counts = [len(seen) for _, seen in stamps]
    assert all(counts) and 0 <= granted - sum(counts) <= workers, (granted, counts)
    assert granted <= 1000 * windows, f"{granted} grants in {windows} windows"
    most = most_in_a_second(stamps)
    assert most <= 1000, f"{most} grants in a second"
    return 100 - 100 * sum(counts) / (1000 * ((until - began) // SECOND + 1))


def most_in_a_second(stamps):
    """Count what lies in one second for sure: asked for after its begin, seen before its end."""
    return max(sum(max(0, bisect_left(seen, begin + SECOND) - bisect_left(asked, begin))
                   for asked, seen in stamps)
               for begins, _ in stamps for begin in begins)


def pending(make, most=1_000_000):
    """Seconds a call takes, submitted behind a gate with all the others. Without Python's garbage collector: its
    rounds through all that there is double the time of a million.
    """
    gc.disable()
    return behind_a_gate(make(), most, gather=None)


def gathered(make, most=100_000):
    """Seconds a future takes to be gathered, which is not done when that begins."""
    import concurry
    return behind_a_gate(make(), most, concurry.gather)


def behind_a_gate(calls, most, gather):
    """Seconds a call takes, of so many that are pending at once; with `gather` only from when they may begin."""
    executor, rounds, seconds = thread(1), amount(most) // calls, 0
    for _ in range(rounds):
        with gate() as opened:
            executor.submit(opened.wait)
            submitted = perf_counter()
            futures = [executor.submit(abs, i) for i in range(calls)]
            began = perf_counter() if gather else submitted
            opened.set()
            total = sum(gather(futures) if gather else (future.result() for future in futures))
            seconds += perf_counter() - began
            assert total == calls * (calls - 1) // 2
            del futures
    return seconds / (rounds * calls)


def spread(make, calls=20_000):
    """Seconds a call takes in a pool of so many workers, all of them at work before."""
    workers, balancing = make()
    executor = thread(workers, load_balancing=balancing)
    meet_threads(executor, workers)
    return bulk(lambda _: executor, calls=calls)


def along_a_line(make, turns=10_000):
    """Pass a slot along a line of coroutines. Who has had it goes to the end: it stays as long."""
    waiters, limits, turns = make(), slots(), amount(turns)
    order, ends = [], []

    async def waiter(number):
        while len(order) < turns:
            async with limits.async_acquire():
                order.append(number)
                if len(order) == turns:
                    ends.append(perf_counter())

    async def main():
        held = limits.acquire()
        tasks = [asyncio.ensure_future(waiter(number)) for number in range(waiters)]
        while limits.get_stats()["slots"]["waiting"] < waiters:
            await asyncio.sleep(0)
        began = perf_counter()
        held.release()
        await asyncio.wait(tasks)
        return (ends[0] - began) / turns

    seconds = asyncio.run(main())
    assert len(order) == turns + waiters - 1
    assert order == [turn % waiters for turn in range(len(order))]
    return seconds


def ours_with(name, **options):
    """Return a factory of an executor and one of concurry's functions."""
    def make(workers):
        import concurry
        return thread(workers), partial(getattr(concurry, name), **options)
    return make


def theirs_with(name):
    return lambda workers: (ThreadPoolExecutor(workers), getattr(concurrent.futures, name))


def wait_finished(make, calls=10_000):
    executor, wait = make(1)
    futures = [executor.submit(abs, i) for i in range(calls)]
    assert [future.result() for future in futures] == list(range(calls))
    times = []
    for _ in range(5):
        began = perf_counter()
        done = wait(futures)
        times.append(perf_counter() - began)
        assert len(getattr(done, "done", done)) == calls
        del done
    return statistics.median(times)


def wait_last(make, calls=1000):
    """From the end of the last of a thousand calls until the waiting thread has returned."""
    executor, wait = make(1)

    def last(opened):
        opened.wait()
        return perf_counter()

    times = []
    for _ in range(amount(25)):
        with gate() as opened:
            futures = [executor.submit(abs, i) for i in range(calls)]
            futures.append(executor.submit(last, opened))
            threading.Timer(0.05, opened.set).start()
            wait(futures)
            times.append(perf_counter() - futures[-1].result())
    return statistics.median(times)


def as_they_finish(make, calls=10_000):
    executor, completed = make(1)
    with gate() as opened:
        executor.submit(opened.wait)
        futures = [executor.submit(abs, i) for i in range(calls)]
        began = perf_counter()
        opened.set()
        count = sum(1 for _ in completed(futures))
        seconds = perf_counter() - began
    assert count == calls
    return seconds


def idle_thread_memory(make, workers=100):
    meet_threads(make(1), 1)        # what the first one needs in common with all
    before = memory()
    executor = make(workers)
    meet_threads(executor, workers)
    return (memory() - before) / workers


def pending_call_memory(make, calls=50_000):
    executor = make(1)
    with gate() as opened:
        executor.submit(opened.wait)
        futures = [None] * amount(calls)
        before = memory()
        for i in range(amount(calls)):
            futures[i] = executor.submit(abs, i)
        after = memory()
    assert futures[-1].result() == len(futures) - 1
    return (after - before) / len(futures)


def idle_process_memory(make, workers=4):
    """All that our children have, fork servers and trackers with them, for each worker."""
    executor = make(workers)
    pids = meet(executor, workers) | descendants()
    return sum(map(memory, pids)) / workers


def idle_cpu(make, workers, gather):
    """Milliseconds of CPU in a second of idleness, here and in our children."""
    executor = make(workers)
    gather(executor, workers)
    time.sleep(0.2)
    pids = {os.getpid()} | descendants()
    before, began = sum(map(cpu_time, pids)), perf_counter()
    time.sleep(1 if QUICK else 3)
    return 1000 * (sum(map(cpu_time, pids)) - before) / (perf_counter() - began)


def through_queue(make, calls=100_000):
    """Submit more than the queue holds, and keep nothing."""
    executor, counter = make(1), itertools.count()
    calls = amount(calls)
    began = perf_counter()
    for _ in range(calls):
        executor.submit(counter.__next__)
    executor.shutdown()
    seconds = perf_counter() - began
    assert next(counter) == calls
    return seconds


def through_queue_peak(make):
    executor = make(1)
    executor.submit(abs, 1).result()
    tracemalloc.start()
    through_queue(lambda _: executor, calls=20_000)
    return tracemalloc.get_traced_memory()[1]


def burst(make, bursts=200):
    executor = make(10)
    assert executor.submit(abs, -1).result() == 1
    began = perf_counter()
    for _ in range(amount(bursts)):
        futures = [executor.submit(abs, -i) for i in range(10)]
        assert [future.result() for future in futures] == list(range(10))
    return (perf_counter() - began) / amount(bursts)


def stop(make, workers, gather):
    executor = make(workers)
    gather(executor, workers)
    end = getattr(executor, "stop", executor.shutdown)
    began = perf_counter()
    end()
    return perf_counter() - began


def update_cost(make, updates=1_000_000):
    """Of a bar that is shown, ten times a second, in a file."""
    import concurry
    updates = amount(updates)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        bar = concurry.ProgressBar(total=updates)
        began = perf_counter()
        for _ in range(updates):
            bar.update()
        return 1e6 * (perf_counter() - began) / updates


def told_of_death(make):
    executor = make(1)
    meet(executor, 1)
    began = perf_counter()
    error = executor.submit(os._exit, 3).exception()
    seconds = perf_counter() - began
    assert type(error).__name__ in ("WorkerDiedError", "BrokenProcessPool"), repr(error)
    return seconds


def told_of_unpicklable(make, calls=200):
    executor = make(1)
    meet(executor, 1)
    began = perf_counter()
    for _ in range(amount(calls)):
        error = executor.submit(threading.Lock).exception()
        assert isinstance(error, (TypeError, pickle.PicklingError)), repr(error)
    return (perf_counter() - began) / amount(calls)


# === The table ===

class Row(NamedTuple):
    name: str
    against: str                    # "": the figure itself is judged, not its ratio
    target: float | None            # None: only reported
    measure: Callable
    ours: Callable
    theirs: Callable | None = None
    peer: Callable | None = None


EXECUTOR, THREADS, APPLY = "ProcessPoolExecutor", "ThreadPoolExecutor", "Pool.apply_async"
TASK, SEMAPHORE = "run_coroutine_threadsafe", "threading.Semaphore"

ROWS = [
    Row("import", "concurrent.futures.thread", 1.5,
        import_time, lambda: "concurry", lambda: "concurrent.futures.thread"),
    Row("thread round trip, one CPU", THREADS, 0.8,
        partial(one_cpu, round_trip), thread, ThreadPoolExecutor),
    Row("thread in bulk, 1 worker", THREADS, 0.25, bulk, thread, ThreadPoolExecutor),
    Row("thread in bulk, 1 worker, default queue", THREADS, None,
        bulk, partial(bounded, "thread"), ThreadPoolExecutor),
    Row("thread in bulk, pool of 8", THREADS, 0.3,
        partial(bulk, workers=8), thread, ThreadPoolExecutor),
    Row("thread in bulk, pool of 8, default queue", THREADS, None,
        partial(bulk, workers=8), partial(bounded, "thread"), ThreadPoolExecutor),
    Row("sync call", f"{THREADS} round trip", 0.1,
        partial(one_cpu, round_trip), partial(single, "sync"), ThreadPoolExecutor),
    Row("process round trip, one CPU", "Pool.apply", 0.5,
        partial(one_cpu, round_trip), process, Pool, loky),
    Row("process in bulk, 1 worker", APPLY, 0.2,
        partial(process_bulk, workers=1), process, Pool, loky),
    Row("process in bulk, 1 worker, default queue", APPLY, None,
        partial(process_bulk, workers=1), partial(bounded, "process"), Pool),
    Row("process in bulk, 2 workers", APPLY, 0.2,
        partial(process_bulk, workers=2), process, Pool),
    Row("process in bulk, 2 workers, default queue", APPLY, None,
        partial(process_bulk, workers=2), partial(bounded, "process"), Pool),
    Row("1 MiB there", EXECUTOR, 0.4,
        partial(transport, size=MIB, there=True, calls=200), process, process_executor),
    Row("1 MiB back", EXECUTOR, 0.4,
        partial(transport, size=MIB, there=False, calls=200), process, process_executor),
    Row("32 MiB there", EXECUTOR, 0.4,
        partial(transport, size=32 * MIB, there=True, calls=10), process, process_executor, loky),
    Row("32 MiB back", EXECUTOR, 0.4,
        partial(transport, size=32 * MIB, there=False, calls=10), process, process_executor, loky),
    Row("map of 10k, chunksize 1", EXECUTOR, 0.1,
        partial(map_10k, chunksize=1), process, process_executor, loky),
    Row("map of 10k, chunksize 1000", EXECUTOR, 1.0,
        partial(map_10k, chunksize=1000), process, process_executor, loky),
    Row("process start, 1 worker", EXECUTOR, 0.6,
        partial(process_start, workers=1), process, process_executor, loky),
    Row("process start, 4 workers", EXECUTOR, 0.5,
        partial(process_start, workers=4), process, process_executor, loky),
    Row("asyncio in bulk", TASK, 0.25,
        partial(bulk, function=echo), partial(single, "asyncio"), LoopThread),
    Row("2,000 calls sleeping 10 ms", TASK, 0.5,
        sleepers, partial(single, "asyncio"), LoopThread),
    Row("await a call: round trip", "loop.run_in_executor", 1.0,
        partial(awaited, clock=perf_counter), await_ours, await_theirs),
    Row("await a call: CPU", "loop.run_in_executor", 1.2,
        partial(awaited, clock=time.process_time), await_ours, await_theirs),
    Row("one ResourceLimit, acquire and release", SEMAPHORE, 2.0,
        uncontended, one_slot, one_semaphore),
    Row("CallLimit + RateLimit with update", SEMAPHORE, 4.0,
        uncontended, two_rates, one_semaphore),
    Row("limiter wake-up", SEMAPHORE, 1.5,
        partial(one_cpu, hand_over), Slot, partial(threading.Semaphore, 0)),
    Row("limits between 2 processes", "Manager().Semaphore", 0.5,
        partial(one_cpu, between_processes), slots_of_processes, semaphore_of_processes),
    Row("rate accuracy, 4 threads", "", 0.5,
        partial(rate_shortfall, workers=4), partial(hurrying, "thread")),
    Row("rate accuracy, 2 processes", "", 0.5,
        partial(rate_shortfall, workers=2), partial(hurrying, "process")),
    Row("a limit with 10,000 waiters: wake-up", "with 10 waiters", 1.5,
        along_a_line, lambda: 10_000, lambda: 10),
    Row("a million calls pending: per call", "a thousand", 1.5,
        pending, lambda: amount(1_000_000), lambda: 1000),
    # Each of them is woken for its call, while one goes on with the next.
    Row("200 threads: per call", "one", 2.0,
        spread, lambda: (200, "round_robin"), lambda: (1, "round_robin")),
    Row("200 threads, least active: per call", "one", 2.0,
        spread, lambda: (200, "least_active"), lambda: (1, "least_active")),
    Row("gather of 100,000: per future", "of ten", 1.5,
        gathered, lambda: amount(100_000), lambda: 10),
    Row("retries, none needed", "without", 1.2,
        partial(one_cpu, round_trip), partial(thread, num_retries=3), thread),
    Row("gather of 10k finished futures", "wait", 0.3,
        wait_finished, ours_with("gather"), theirs_with("wait")),
    Row("gather: last finish to return", "wait", 1.0,
        wait_last, ours_with("gather"), theirs_with("wait")),
    Row("progress: microseconds an update", "", 1.0, update_cost, lambda: None),
    Row("as they finish, 10k", "as_completed", 0.7,
        as_they_finish, ours_with("gather", iter=True), theirs_with("as_completed")),
    Row("memory: idle thread", THREADS, 1.2, idle_thread_memory, thread, ThreadPoolExecutor),
    Row("memory: pending call", THREADS, 0.4, pending_call_memory, thread, ThreadPoolExecutor),
    Row("memory: idle process", EXECUTOR, 0.6, idle_process_memory, process, process_executor),
    Row("idle CPU in ms/s, 100 threads", "", 1.0,
        partial(idle_cpu, workers=100, gather=meet_threads), thread),
    Row("idle CPU in ms/s, 4 processes", "", 1.0,
        partial(idle_cpu, workers=4, gather=meet), process),
    Row("100k calls through a queue of 100: time", "with a semaphore", 0.5,
        through_queue, partial(thread, max_queued_tasks=100), SemaphoreExecutor),
    Row("100k calls through a queue of 100: peak", "with a semaphore", 0.5,
        through_queue_peak, partial(thread, max_queued_tasks=100), SemaphoreExecutor),
    Row("on demand: per call", "a bare thread", 2.0,
        partial(round_trip, calls=2000), on_demand, ThreadPerCall),
    Row("on demand: burst of 10", "bare threads", 2.0, burst, on_demand, ThreadPerCall),
    Row("stop: 100 threads", THREADS, 1.5,
        partial(stop, workers=100, gather=meet_threads), thread, ThreadPoolExecutor),
    Row("stop: 8 processes", EXECUTOR, 1.5,
        partial(stop, workers=8, gather=meet), process, process_executor),
    Row("told of a death", EXECUTOR, 1.0, told_of_death, process, process_executor),
    Row("told of a death, in ms", "", 20.0, lambda make: 1e3 * told_of_death(make), process),
    Row("told of an unpicklable result", EXECUTOR, 1.0,
        told_of_unpicklable, process, process_executor),
]
if find_spec("ray"):
    ROWS += [
        Row("ray: round trip", "a bare actor", 1.15, ray_round_trip, ray_worker, bare_actor),
        Row("ray: 2,000 calls in bulk", "a bare actor", 1.15, ray_bulk, ray_worker, bare_actor),
    ]


# === Running them ===

def sample(row, side):
    """Measure one side of a row in a fresh interpreter."""
    code = "import bench, sys; bench.child(int(sys.argv[1]), sys.argv[2])"
    done = subprocess.run([sys.executable, "-c", code, str(ROWS.index(row)), side],
                          cwd=HERE, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=120, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")
    return float(done.stdout.split()[-1])


def child(index, side):
    sys.path.insert(0, str(HERE.parent))
    row = ROWS[index]
    print(row.measure(getattr(row, side)))


def measure(row, runs, peers):
    """Return each side's samples."""
    sides = [side for side in ("ours", "theirs", "peer")[:2 + peers] if getattr(row, side)]
    samples = {side: [] for side in sides}
    for run in range(runs):
        for side in sides if run % 2 else reversed(sides):
            samples[side].append(sample(row, side))
    return samples


def judge(row, samples):
    """Return a line of the table as a dict."""
    middle = {side: statistics.median(values) for side, values in samples.items()}
    value = middle["ours"] / middle["theirs"] if row.against else middle["ours"]
    line = {"name": row.name, "against": row.against, "target": row.target, "value": value,
            "missed": row.target is not None and value > row.target, "samples": samples}
    if "peer" in middle:
        line["peer"] = middle["ours"] / middle["peer"]
    return line


def show(line):
    if "error" in line:
        print(f"{line['name']:42} FAILED {line['error']}", flush=True)
        return
    target = "" if line["target"] is None else f"{line['target']:g}"
    mark = "MISSED" if line["missed"] else ""
    peer = f"{line['peer']:.2f} of loky" if "peer" in line else ""
    columns = (f"{line['name']:42} {line['against']:26} {line['value']:7.3f} {target:>6}"
               f"  {mark:6} {peer}")
    print(columns.rstrip(), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, under 90 s in all")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="a glob within the name")
    parser.add_argument("--runs", type=int, help="how many samples of each side (5; quick: 3)")
    parser.add_argument("--json", metavar="FILE", help="write all samples to this file")
    parser.add_argument("--peers", action="store_true", help="compare with loky too")
    args = parser.parse_args()
    if args.peers and not (find_spec("loky") or find_spec("joblib")):
        parser.error("--peers needs loky or joblib")
    runs = args.runs or (3 if args.quick else 5)
    lines = []
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)     # else ours is compiled at every import
    if args.quick:
        os.environ["BENCH_QUICK"] = "1"
    print(f"{'scenario':42} {'against':26} {'ratio':>7} {'target':>6}")
    for row in ROWS:
        if not fnmatch.fnmatch(row.name.lower(), f"*{args.only.lower()}*"):
            continue
        try:
            line = judge(row, measure(row, runs, args.peers))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            line = {"name": row.name, "error": str(error), "missed": True}
        lines.append(line)
        show(line)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(lines, indent=1))
    missed = sum(line["missed"] for line in lines)
    print(f"{missed} of {len(lines)} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
