"""See that nothing grows: a million calls and a thousand init/stop cycles a mode:  python3 .ci/soak.py

    --calls N --cycles N    others than 1,000,000 and 1,000 (a tenth of the cycles for spawn)

A line for each: resident memory in MiB, descriptors and threads, after a tenth and at the end. Exits 1 when
descriptors or threads are more at the end, or memory is by more than 2 MiB.
"""

import argparse
import gc
import os
import pathlib
import sys
import threading

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--cycles", type=int, default=1_000)
    given, has_grown = parser.parse_args(), 0
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
