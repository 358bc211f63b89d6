"""What a user writes, for type checkers: mypy --strict and pyright are content. It runs, too, and prints nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any, assert_type

from concurry import (
    BaseFuture,
    CallLimit,
    ExecutionMode,
    Executor,
    LimitSet,
    ProgressBar,
    RateLimit,
    ResourceLimit,
    RetryConfig,
    TaskWorker,
    Worker,
    WorkerDiedError,
    as_completed,
    async_gather,
    async_wait,
    gather,
    global_config,
    run_in_subprocess,
    serve,
    task,
    temp_config,
    wait,
    worker,
    wrap_future,
)


def square(n: int) -> int:
    return n * n


async def length(text: str) -> int:
    await asyncio.sleep(0)
    return len(text)


class Counter(Worker):
    def __init__(self, start: int) -> None:
        self.count = start

    def add(self, n: int = 1) -> int:
        with self.limits.acquire({"adding": 1}, timeout=5) as acquired:
            self.count += n if acquired.successful else 0
        return self.count

    async def later(self, n: int) -> int:
        async with self.limits.async_acquire():
            return self.count + n


class Stored(Worker, mode="thread", max_workers=2):
    def hello(self, name: str) -> str:
        return f"hello {name}"


@worker(mode="sync", auto_init=False)
class Plain:
    def __init__(self, x: int) -> None:
        self.x = x


@task(mode="thread", max_workers=2)
def scaled(n: int, factor: float = 2.0) -> float:
    return n * factor


@task(mode="asyncio")
async def fetched(address: str, *, tries: int = 1) -> bytes:
    return address.encode() * tries


@task(mode="thread", blocking=True)
def joined(first: str, second: str) -> str:
    return first + second


@task(mode="asyncio", blocking=True)
async def counted(text: str) -> int:
    return len(text)


def executors() -> None:
    with Executor("thread", max_workers=2) as pool:
        future = pool.submit(square, 3)
        assert_type(future, BaseFuture[int])
        assert_type(future.result(timeout=5), int)
        assert_type(pool.submit(length, "abc").result(), int)
        assert_type(pool.submit(square, future), BaseFuture[int])       # the future becomes its result
        assert_type(pool.map(square, range(3)), Generator[int, None, None])
        assert_type(pool.map(length, ["a", "b"], chunksize=2, progress=False), Generator[int, None, None])
        assert_type(pool.max_workers, int)
        assert_type(pool.mode, ExecutionMode)
        futures = [pool.submit(square, n) for n in range(4)]
        for each in as_completed(futures, timeout=5):
            assert_type(each, BaseFuture[int])
            assert each.exception() is None
        assert sum(gather(futures)) == 14
        done, pending = wait(futures, timeout=5, return_when="ALL_COMPLETED")
        assert len(done) == 4 and not pending
        foreign = wrap_future(future)
        foreign.add_done_callback(lambda ended: None)
        pool.submit(print, end="").cancel()
        assert list(map(str, pool.stats())) and not pool.get_pool_stats()["stopped"]
    with Executor(ExecutionMode.Sync, blocking=True) as direct:
        assert_type(direct.submit(square, 3), int)
        assert_type(direct.submit(length, "abc"), int)
        assert_type(direct.map(square, [1, 2]), Generator[int, None, None])


def workers() -> None:
    limits = LimitSet([CallLimit(100, "minute"), ResourceLimit("adding", 1), RateLimit("tokens", 1000, window=60)])
    retries = RetryConfig(num_retries=2, retry_on=[ValueError], retry_wait=0.01)
    with Counter.options(mode="thread", limits=limits, retry_config=retries).init(10) as counter:
        assert_type(counter.add(5), BaseFuture[Any])
        assert counter.add(5).result() == 20 and counter.later(1).result() == 21
        counter.shutdown(wait=True)
    quick = Counter.options(mode="sync", blocking=True).init(1)
    assert quick.add(2) == 3
    quick.stop(timeout=1)
    assert Counter(4).add() == 5            # a plain object
    stored = Stored.init()
    assert stored.hello("you").result() == "hello you"
    stored.close()
    assert_type(Plain(3).x, int)


def tasks() -> None:
    assert_type(scaled(3, factor=1.5), BaseFuture[float])
    assert_type(scaled.submit(3).result(), float)
    assert_type(scaled.map([1, 2]), Generator[float, None, None])
    assert_type(fetched("a", tries=2), BaseFuture[bytes])
    assert_type(joined("a", "b"), str)
    assert_type(counted("abc"), int)
    same = task(square, mode="sync")
    assert_type(same(3), BaseFuture[int])
    with TaskWorker.options(mode="thread").init(fn=square) as bound:
        assert_type(bound(3), BaseFuture[int])
        assert_type(bound.submit(3).result(), int)
        assert_type(bound.map([1, 2]), Generator[int, None, None])
    with TaskWorker.options(mode="thread", blocking=True).init(fn=length) as direct:
        assert_type(direct("abc"), int)
        assert_type(direct.submit("abc"), int)
    with TaskWorker.options(mode="thread").init() as free:
        assert_type(free.submit(square, 3), BaseFuture[int])
    for each in (scaled, fetched, joined, counted, same):
        each.stop()


def serving() -> None:
    pool = Executor("thread", max_workers=2, name="crunch", max_tasks_per_worker=10, initializer=square, initargs=(1,))
    pool.resize(3)
    pool.submit(square, 3).cancel(kill=True)
    pool.stop(timeout=1, join=False)
    assert_type(pool.join(timeout=5), bool)
    process = run_in_subprocess(square, 3)
    assert_type(process.result(), int)
    process.join(timeout=5)
    assert process.poll() == process.exitcode == 0 and not process.is_alive()
    if process.pid == 0:
        serve(pool, timeout=5)


async def awaiting() -> None:
    async with Executor("asyncio") as pool:
        future = pool.submit(length, "abc")
        assert_type(await future, int)
        results = await async_gather([pool.submit(length, "abc"), pool.submit(length, "d")])
        assert list(results) == [3, 1]
        done, pending = await async_wait([future], timeout=5)
        assert future in done and not pending
    limits = LimitSet([ResourceLimit("rooms", 2)])
    async with limits.async_acquire({"rooms": 1}) as acquired:
        assert acquired.successful
    with limits.try_acquire() as maybe:
        maybe.update({})


def settings() -> None:
    with temp_config(global_num_retries=1, thread_max_workers=3):
        assert global_config.thread.max_workers == 3
    with ProgressBar(total=2, desc="two", disable=True) as bar:
        bar.update(1)
    for n in ProgressBar([1, 2], disable=True):
        assert n in (1, 2)
    try:
        raise WorkerDiedError("gone", "Counter-0", "add", started=True)
    except WorkerDiedError as error:
        assert error.worker == "Counter-0" and error.started
        assert error.method == "add" and error.pid is None and error.exitcode is None and not error.deaths


if __name__ == "__main__":
    executors()
    workers()
    tasks()
    serving()
    asyncio.run(awaiting())
    settings()
