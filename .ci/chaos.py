"""Kill, cancel, stop and limit calls at random, and see that none is lost:  python3 .ci/chaos.py

    --calls N --kills N     go on until there have been so many (10,000 and 500)
    --hours H               or so long
    --seed S                one that was printed: the same choices, though not the same moments

Rounds of some thousand calls over pools of all kinds. Each call writes its begin and end to a log; afterwards the
log has to agree with the futures. Exits 1, and shows the log's place, when it does not.
"""

import argparse
import asyncio
import collections
import concurrent.futures
import faulthandler
import gc
import logging
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import concurry  # noqa: E402

SLOTS = 3                       # of the limit that half of the calls take
PATIENCE = 60                   # seconds: for the last calls of a round
KINDS = [(mode, method, size, crash_retries) for mode, method, size, crash_retries in (
    ("process", "forkserver", 3, 0), ("process", "forkserver", 1, 2), ("process", "spawn", 2, 0),
    ("process", "fork", 2, 1), ("thread", None, 3, 0), ("asyncio", None, 1, 0))]


class Failing(Exception):
    pass


class Busy(concurry.Worker):
    """Its calls write down what becomes of them: a letter, the call, the attempt, the process."""

    def __init__(self, path):
        self.log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.attempts = collections.Counter()

    def __del__(self):
        os.close(self.log)

    def _note(self, letter, number, attempt):
        os.write(self.log, f"{letter} {number} {attempt} {os.getpid()}\n".encode())

    def _begin(self, number):
        self.attempts[number] += 1
        self._note("b", number, self.attempts[number])
        return self.attempts[number]

    def _end(self, number, attempt, failures):
        if attempt <= failures:
            raise Failing(number)
        self._note("e", number, attempt)
        return number

    def work(self, number, seconds, failures, is_limited):
        attempt = self._begin(number)
        if is_limited:
            with self.limits.acquire():
                self._note("+", number, attempt)
                time.sleep(seconds)
                self._note("-", number, attempt)
        else:
            time.sleep(seconds)
        return self._end(number, attempt, failures)

    async def work_async(self, number, seconds, failures, is_limited):
        attempt = self._begin(number)
        if is_limited:
            async with self.limits.async_acquire():
                self._note("+", number, attempt)
                await asyncio.sleep(seconds)
                self._note("-", number, attempt)
        else:
            await asyncio.sleep(seconds)
        return self._end(number, attempt, failures)


class Call:
    """What is known here about a call: its future, and how often that told its end."""

    def __init__(self, number, kind, is_async, future):
        self.number, self.kind, self.is_async, self.future = number, kind, is_async, future
        self.verdicts = 0
        future.add_done_callback(self.count)

    def count(self, future):
        self.verdicts += 1


class Round:
    """Pools of all kinds, those who call, kill, cancel and stop, and the comparison at the end."""

    def __init__(self, seed, calls, kills, first):
        self.chance = random.Random(seed)
        self.path = tempfile.mktemp(prefix="concurry-chaos-")
        self.limits = concurry.LimitSet([concurry.ResourceLimit("slots", SLOTS), concurry.CallLimit(10 ** 9, "week")])
        self.goal, self.most_kills, self.first = calls, kills, first
        self.pools = {kind: self.pool(kind) for kind in KINDS}
        self.calls, self.kills, self.stops = [], 0, 0
        self.over = threading.Event()
        self.wrong = []

    def pool(self, kind):
        mode, method, size, crash_retries = kind
        options = {"mp_context": method} if method else {}
        return Busy.options(mode=mode, max_workers=size, max_queued_tasks=20, limits=self.limits, num_retries=3,
                            retry_on=Failing, retry_wait=0.001, crash_retries=crash_retries, **options).init(self.path)

    def submitter(self, chance, share):
        for number in share:
            self.over.wait(chance.uniform(0, 0.03))
            kind, is_async = chance.choice(KINDS), chance.random() < 0.3
            pool = self.pools[kind]
            call = pool.work_async if is_async else pool.work
            try:
                future = call(number, chance.choice([0, 0.001, 0.01, 0.05, 0.05]), chance.choice([0] * 9 + [1, 2, 9]),
                              chance.random() < 0.5)
            except RuntimeError as error:       # this pool has been stopped, or each start of its workers was killed
                if "stopped" not in str(error):
                    raise
                continue
            self.calls.append(Call(number, kind, is_async, future))

    def killer(self, chance):
        while not self.over.wait(chance.uniform(0.02, 0.2)):
            if self.kills >= self.most_kills:
                break
            pool = self.pools[chance.choice([kind for kind in KINDS if kind[0] == "process"])]
            links = [backend.link for backend in list(pool._pool.backends) if backend.link is not None]
            if not links:
                continue
            process, how = chance.choice(links).process, chance.choice(["KILL", "TERM", "STOP"])
            process.kill(getattr(signal, "SIG" + how))
            if how == "STOP":
                time.sleep(chance.uniform(0.005, 0.05))
                process.kill()
            self.kills += 1

    def canceller(self, chance):
        while not self.over.wait(chance.uniform(0.001, 0.02)):
            for call in self.calls[-chance.randint(1, 30):]:
                if chance.random() < 0.005:
                    call.future.cancel()

    def stopper(self, chance):
        while not self.over.wait(chance.uniform(0.5, 2)):
            kind = chance.choice(KINDS)
            pool = self.pools[kind]
            try:
                self.pools[kind] = self.pool(kind)
            except concurry.WorkerDiedError:        # killed before it was built
                continue
            mine = [call for call in list(self.calls) if call.future.__dict__.get("_call") in pool._pool.calls]
            pool.stop(chance.choice([0, 0.05, 5]))
            self.stops += 1
            self.wrong += [f"{call.number}: pending although its pool is stopped"
                           for call in mine if not call.future.done()]

    def run(self):
        numbers = range(self.first, self.first + self.goal)
        submitters = [self.submitter] * 4
        others = [self.killer, self.canceller, self.stopper]
        with concurrent.futures.ThreadPoolExecutor(len(submitters) + len(others)) as threads:
            rest = [threads.submit(each, random.Random(self.chance.random())) for each in others]
            calling = [threads.submit(each, random.Random(self.chance.random()), numbers[n::len(submitters)])
                       for n, each in enumerate(submitters)]
            if concurrent.futures.wait(calling, 3 * PATIENCE).not_done:
                self.wrong.append("submitters wait for ever")
                for pool in self.pools.values():
                    pool.stop(0)
            while self.kills < self.most_kills and not self.wrong and not rest[0].done():
                time.sleep(0.01)            # idle workers are killed, too
            pending = concurry.wait([call.future for call in self.calls], PATIENCE).not_done
            self.over.set()
            for each in calling + rest:
                each.result()
        self.wrong += [f"{call.number}: pending" for call in self.calls if call.future in pending]
        for pool in self.pools.values():
            (pool.stop if self.chance.random() < 0.5 else pool.shutdown)()
        self.compare()

    def compare(self):
        log = collections.defaultdict(list)
        with open(self.path) as file:
            lines = [line.split() for line in file]
        for letter, number, attempt, pid in lines:
            log[int(number)].append((letter, int(attempt), pid))
        for call in self.calls:
            for what in self.mistakes(call, log[call.number]):
                self.wrong.append(f"{call.number} ({call.kind}, {call.future}): {what}: {log[call.number]}")
        self.compare_limits(lines)
        os.unlink(self.path) if not self.wrong else None

    def mistakes(self, call, log):
        """Yield what is wrong with a call, its verdict and its log."""
        runs = collections.Counter(pid for letter, attempt, pid in log if (letter, attempt) == ("b", 1))
        ends = sum(letter == "e" for letter, *_ in log)
        most = 1 + call.kind[-1]
        if call.verdicts != 1 or not call.future.done():
            yield f"{call.verdicts} verdicts"
        if sum(runs.values()) > most or any(count > 1 for count in runs.values()):
            yield "it began too often"
        if ends > most:
            yield "it ended too often"
        if not call.future.done():
            return
        if call.future.cancelled():
            if log and not (call.kind[0] == "asyncio" and call.is_async):
                yield "it began although it was cancelled"
            return
        error = call.future.exception()
        if error is None and not (1 <= ends <= most and call.future.result() == call.number):
            yield "it is done without an end of its own"
        elif isinstance(error, concurry.WorkerDiedError) and error.started is False and log:
            yield "it began although the error says that it had not"
        elif error is not None and not isinstance(error, (Failing, concurry.WorkerDiedError)):
            yield f"it failed in a strange way: {error!r}"

    def compare_limits(self, lines):
        """See that no more than the capacity were inside at once, of those who came out."""
        came_out = {tuple(rest) for letter, *rest in lines if letter == "-"}
        inside = 0
        for letter, *rest in lines:
            if letter in "+-" and tuple(rest) in came_out:
                inside += 1 if letter == "+" else -1
                if inside > SLOTS:
                    self.wrong.append(f"{inside} inside at once, {SLOTS} allowed")
        stats = self.limits.get_stats()["slots"]
        if stats["in_use"] or stats["waiting"]:
            self.wrong.append(f"slots at the end: {stats}")


def descriptors():
    """Return {number: what it is} of our open descriptors."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:                 # the listing's own
            pass
    return found


def left_over(threads, opened):
    """Return what is there of threads, children and descriptors that was not."""
    deadline = time.monotonic() + 5
    concurry._close_server()
    while True:
        gc.collect()
        left = [thread for thread in threading.enumerate() if thread not in threads]
        left += pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        left += [what for number, what in descriptors().items() if opened.get(number) != what]
        if not left or time.monotonic() > deadline:
            return [f"left over: {each}" for each in left]
        time.sleep(0.01)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--hours", type=float, default=0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10 ** 6))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore", ResourceWarning)
    began, calls, kills, stops, verdicts, rounds = time.monotonic(), 0, 0, 0, collections.Counter(), 0
    while (time.monotonic() - began < 3600 * given.hours if given.hours else
           calls < given.calls or kills < given.kills):
        faulthandler.dump_traceback_later(600, exit=True)
        threads, before = threading.enumerate(), descriptors()
        one = Round(f"{given.seed}/{rounds}", 2000, 100, calls)
        one.run()
        calls, kills, stops, rounds = calls + len(one.calls), kills + one.kills, stops + one.stops, rounds + 1
        verdicts.update("cancelled" if call.future.cancelled() else type(call.future.exception()).__name__
                        for call in one.calls if call.future.done())
        one.calls.clear()               # what they have raised holds the objects of threads
        one.wrong += left_over(threads, before)
        if one.wrong:
            print(f"round {rounds}: {len(one.wrong)} mistakes; the log is {one.path}", *one.wrong[:20], sep="\n")
            return 1
        faulthandler.cancel_dump_traceback_later()
    print(f"{calls} calls, {kills} kills, {stops} pools stopped in {rounds} rounds, {time.monotonic() - began:.0f} s: "
          + ", ".join(f"{count} {'done' if name == 'NoneType' else name}" for name, count in sorted(verdicts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
