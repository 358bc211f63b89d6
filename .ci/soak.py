"""See that nothing grows: a million calls and a thousand init/stop cycles a mode:  python3 .ci/soak.py

    --calls N --cycles N    others than 1,000,000 and 1,000 (a tenth of the cycles for spawn)
    --serving SECONDS       instead: ten pools that share limits, whose workers are recycled, killed, given up and
                            resized all the time; every call has the verdict that it must have

A line for each: resident memory in MiB, descriptors and threads, after a tenth and at the end. Exits 1 when
descriptors or threads are more at the end, or memory is by more than 2 MiB (serving: 8 MiB, 30 descriptors and 10
threads between the medians of the second tenth and of the last: how many workers there are changes all the time).
"""

import argparse
import collections
import gc
import logging
import os
import pathlib
import random
import signal
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import concurry  # noqa: E402

BATCH = 1000
WAYS = [("sync", None), ("thread", None), ("asyncio", None),
        ("process", "forkserver"), ("process", "spawn"), ("process", "fork")]


def state():
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count()


def soak(what, step, steps):
    """Do the step so often; show the state after a tenth and at the end; tell whether it has grown."""
    for _ in range(max(1, steps // 10)):
        step()
    before = state()
    for _ in range(steps - max(1, steps // 10)):
        step()
    after = state()
    has_grown = after[0] > before[0] + 2 or after[1:] > before[1:]
    print(f"{what:38} {before[0]:7.1f} {after[0]:7.1f} MiB, {before[1]:3} {after[1]:3} descriptors, "
          f"{before[2]:2} {after[2]:2} threads{'  GROWN' * has_grown}", flush=True)
    return has_grown


def pool(mode, method, **options):
    if mode in ("thread", "process"):
        options["max_workers"] = 2
    return concurry.TaskWorker.options(mode=mode, mp_context=method or "spawn", **options).init()


class Shop(concurry.Worker):
    """What is served: calls of every kind."""

    def __init__(self):
        self.hoard = []

    def echo(self, n):
        with self.limits.acquire({"slots": 1}):
            return n

    async def echo_async(self, n):
        async with self.limits.async_acquire({"slots": 1}):
            return n

    def fetch(self, n):
        time.sleep(0.002)
        return n

    def hoard_some(self, n):
        self.hoard.append(b"x" * 1_000_000)
        if self.limits.config["pid"] == os.getpid():
            self.hoard.clear()          # of ours it is the memory that is looked at
        return n

    def fail(self, n):
        raise KeyError(n)

    def die(self, n):
        os.kill(os.getpid(), signal.SIGKILL)

    def block(self, n):
        time.sleep(0.3)
        return n


SERVING = [
    ("process", {"max_workers": 2, "max_tasks_per_worker": 50}),
    ("process", {"max_workers": 2, "max_worker_memory": 60 << 20, "max_queued_tasks": 20}),
    ("process", {"max_workers": 3, "max_tasks_per_worker": 7, "load_balancing": "least_active", "crash_retries": 1}),
    ("process", {"max_workers": 2, "on_demand": True}),
    ("thread", {"max_workers": 4, "max_tasks_per_worker": 7}),
    ("thread", {"max_workers": 2, "max_tasks_per_worker": 1000, "load_balancing": "least_total"}),
    ("thread", {"max_workers": 3, "load_balancing": "random", "num_retries": 1, "retry_wait": 0.001}),
    ("thread", {"max_workers": 3, "on_demand": True}),
    ("asyncio", {"max_tasks_per_worker": 100}),
    ("asyncio", {}),
]


def be_a_customer(number, limits, deadline, verdicts):
    """Call the shop in all ways until the deadline, and count what the calls came to."""
    mode, options = SERVING[number]
    dice, wrong = random.Random(number), collections.Counter()
    shop = Shop.options(mode=mode, limits=limits, name=f"shop{number}", **options).init()
    kinds = ["echo"] * 12 + ["fetch"] * 4 + ["hoard_some", "fail", "echo_async"]
    while time.monotonic() < deadline:
        calls = []
        time.sleep(0.03)                # there are other things to do on this machine
        for n in range(dice.randrange(1, 60)):
            kind = dice.choice(kinds)
            calls.append((kind, n, getattr(shop, kind)(n)))
        if mode == "process" and dice.random() < 0.2:
            calls.append(("die", 0, shop.die(0)))
        if dice.random() < 0.1:
            calls.append(("cancelled", 0, shop.echo(0)))
            calls[-1][2].cancel()
        if dice.random() < 0.02:
            blocked = shop.block(0)
            calls.append(("killed", 0, blocked))
            blocked.cancel(kill=True)
        if mode != "asyncio" and dice.random() < 0.05:
            shop.resize(dice.randrange(1, 5))
        for kind, n, call in calls:
            verdict = verdict_of(call)
            is_right = verdict == n or kind == "fail" and verdict == "KeyError" or verdict == "WorkerDiedError" and \
                kind == "die" or verdict == "CancelledError" and kind in ("cancelled", "killed")
            wrong[kind, verdict] += not is_right
            verdicts["calls"] += 1
            verdicts[mode] += 1
            if type(verdict) is str:
                verdicts[verdict] += 1
    told = shop.stats()
    for name in "retired", "deaths":
        verdicts[name] += told[name]
    shop.stop(5)
    verdicts["wrong"] += sum(wrong.values())
    if sum(wrong.values()):
        print(number, mode, {what: count for what, count in wrong.items() if count}, flush=True)


def verdict_of(call):
    try:
        return call.result(60)
    except BaseException as error:
        return type(error).__name__


def serve(seconds):
    """Have ten pools at work for so long; tell whether something grew or a call came to what it must not."""
    logging.getLogger("concurry").setLevel(logging.ERROR)
    limits = concurry.LimitSet([concurry.ResourceLimit("slots", 8)], config={"pid": os.getpid()})
    verdicts, samples = collections.Counter(), []
    began = time.monotonic()
    customers = [threading.Thread(target=be_a_customer, args=(n, limits, began + seconds, verdicts))
                 for n in range(len(SERVING))]
    for customer in customers:
        customer.start()
    while time.monotonic() < began + seconds:
        time.sleep(seconds / 200)
        samples.append(state())
        if len(samples) % 10 == 0:
            print(f"{time.monotonic() - began:6.0f} s {samples[-1][0]:7.1f} MiB {samples[-1][1]:4} descriptors "
                  f"{samples[-1][2]:3} threads {verdicts['calls']:9} calls", flush=True)
    for customer in customers:
        customer.join()
    tenth = len(samples) // 10
    before, after = samples[tenth:2 * tenth], samples[-tenth:]
    middle = [[sorted(column)[len(column) // 2] for column in zip(*part)] for part in (before, after)]
    in_use = limits.get_stats()["slots"]["in_use"]
    has_grown = middle[1][0] > middle[0][0] + 8 or middle[1][1] > middle[0][1] + 30 or middle[1][2] > middle[0][2] + 10
    print(f"{dict(verdicts)}, slots in use: {in_use}; medians {middle[0]} -> {middle[1]}{'  GROWN' * has_grown}")
    return has_grown or verdicts["wrong"] or in_use


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--cycles", type=int, default=1_000)
    parser.add_argument("--serving", type=float)
    given, has_grown = parser.parse_args(), 0
    if given.serving is not None:
        return 1 if serve(given.serving) else 0
    for mode, method in WAYS[:4]:
        with pool(mode, method, max_queued_tasks=None) as workers:
            has_grown += soak(f"{given.calls} calls, {mode}", lambda workers=workers: concurry.gather(
                [workers.submit(abs, -n) for n in range(BATCH)]), given.calls // BATCH)
    for mode, method in WAYS:
        def cycle(mode=mode, method=method):
            workers = pool(mode, method)
            workers.submit(abs, -1).result()
            workers.stop()
        cycles = given.cycles // (10 if method == "spawn" else 1)
        has_grown += soak(f"{cycles} init/stop cycles, {mode} {method or ''}", cycle, cycles)
    return 1 if has_grown else 0


if __name__ == "__main__":
    sys.exit(main())
