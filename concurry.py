"""Run the same few lines on threads, processes, an event loop or a Ray cluster.

    handle.method(*args)                            worker: thread, process, loop, actor
    ---------------------------------------         ------------------------------------
    futures among the arguments: wait, then         Runner: the user's object, its limits
    Pool: a place in the queue, a worker                    at hand; calls the method,
    Backend.submit(call)  ------- call ----------->         again if need be, drives a
                                                            coroutine to its end
                                                               |
    settle(future)  <------------ outcome ---------------------+
      the place in the queue is free again, then
      waiters wake, then done-callbacks run

A class whose instances live in workers:

    >>> class Counter(Worker):
    ...     def __init__(self, start):
    ...         self.count = start
    ...     def add(self, n):
    ...         self.count += n
    ...         return self.count
    >>> with Counter.options(mode="thread").init(10) as counter:
    ...     counter.add(5).result()
    15

Functions, on a pool of workers:

    >>> with Executor("thread", max_workers=4) as pool:
    ...     list(pool.map(lambda x: x * x, range(5)))
    [0, 1, 4, 9, 16]

Change "thread" to "process", "asyncio", "sync" or "ray" and nothing else. The file needs nothing but
Python (3.11 or newer; and Ray for that mode) and may be copied into a project, under any name.
"""
from __future__ import annotations

__all__ = [
    "ALL_COMPLETED", "BaseFuture", "CallLimit", "CallTimeoutError", "ExecutionMode", "Executor", "FIRST_COMPLETED",
    "FIRST_EXCEPTION", "Limit", "LimitPool", "LimitSet", "LoadBalancingAlgorithm", "ProgressBar", "RateLimit",
    "RateLimitAlgorithm", "RateWindow", "RemoteError", "ResourceLimit", "RetryAlgorithm", "RetryConfig",
    "RetryValidationError", "ReturnWhen", "TaskWorker", "Worker", "WorkerDiedError", "__version__",
    "as_completed", "async_gather", "async_wait", "gather", "global_config", "run_in_subprocess", "serve", "task",
    "temp_config", "wait", "worker", "wrap_future",
]
__version__ = "0.9.0"

import atexit
import bisect
import builtins
import collections.abc
import concurrent.futures
import contextvars
import copyreg
import enum
import functools
import heapq
import itertools
import logging
import math
import os
import queue
import struct
import sys
import threading
import time
import types
import weakref

# What only some users need (asyncio, pickle, socket, inspect, ...) is imported where it is used:
# `import concurry` has to be cheap.

TYPE_CHECKING = False       # type checkers take it for true: `import concurry` shall not import typing
if not TYPE_CHECKING:
    P = T = None

    class _Generic:
        __class_getitem__ = classmethod(lambda cls, parameters: cls)

    def _overload(fn):
        return fn
else:
    import argparse
    import asyncio
    import selectors
    import socket
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Container,
        Coroutine,
        Generator,
        Iterable,
        Iterator,
        Mapping,
        MutableMapping,
        Sequence,
    )
    from typing import Any, Literal, NoReturn, ParamSpec, Protocol, Self, TextIO, TypeAlias, TypeVar
    from typing import Generic as _Generic
    from typing import overload as _overload

    P = ParamSpec("P")
    T = TypeVar("T")

logger = logging.getLogger("concurry")


# === Choices ===

def _squeeze(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


class _Choice(enum.StrEnum):
    """A string from a fixed set, found by its value, its name or an alias, however it is spelt."""

    _value_: str
    _aliases: tuple[str, ...]

    def __new__(cls, value: str, *aliases: str) -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member._aliases = aliases
        return member

    @classmethod
    def _missing_(cls, value: object) -> Self:
        for member in cls:
            if _squeeze(str(value)) in map(_squeeze, (member.value, member.name, *member._aliases)):
                return member
        raise ValueError(f"unknown {cls.__name__} {value!r}: {cls._choices()}")

    @classmethod
    def _choices(cls) -> str:
        return "choose one of " + ", ".join(repr(member.value) for member in cls)


class ExecutionMode(_Choice):
    """Where a worker lives."""

    Sync = "sync", "synchronous"
    Threads = "thread", "threads", "threading"
    Processes = "process", "processes", "proc", "procs"
    Asyncio = "asyncio", "async", "asynchronous"
    Ray = ("ray",)


class LoadBalancingAlgorithm(_Choice):
    """How a pool picks the worker for a call."""

    RoundRobin = "round_robin", "rr"
    LeastActiveLoad = "least_active", "active", "least_active_load"
    LeastTotalLoad = "least_total", "total", "least_total_load"
    Random = "random", "rand"


class RateLimitAlgorithm(_Choice):
    """How a rate limit counts; what each promises stands in `RateLimit`."""

    SlidingWindow = "sliding_window", "sliding"
    FixedWindow = "fixed_window", "fixed"
    TokenBucket = "token_bucket", "token"
    LeakyBucket = "leaky_bucket", "leaky"
    GCRA = ("gcra",)


class RateWindow(_Choice):
    """A window by its name: "minute", "per_minute", `RateWindow.Minute`; `.seconds` is its length."""

    Second = "second", "per_second", "seconds"
    Minute = "minute", "per_minute", "minutes"
    Hour = "hour", "per_hour", "hours"
    Day = "day", "per_day", "days"
    Week = "week", "per_week", "weeks"

    @property
    def seconds(self) -> int:
        return {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}[self.value]


class RetryAlgorithm(_Choice):
    """How the waits between attempts grow; `RetryConfig` tells how."""

    Exponential = ("exponential",)
    Linear = ("linear",)
    Fibonacci = ("fibonacci",)
    Fixed = ("fixed",)


class ReturnWhen(_Choice):
    """When `wait` returns: the constants of concurrent.futures, and equal to them."""

    ALL_COMPLETED = "ALL_COMPLETED"
    FIRST_COMPLETED = "FIRST_COMPLETED"
    FIRST_EXCEPTION = "FIRST_EXCEPTION"


ALL_COMPLETED = ReturnWhen.ALL_COMPLETED
FIRST_COMPLETED = ReturnWhen.FIRST_COMPLETED
FIRST_EXCEPTION = ReturnWhen.FIRST_EXCEPTION


class _StartMethod(_Choice):
    Forkserver = ("forkserver",)
    Spawn = ("spawn",)
    Fork = ("fork",)


# === Exceptions ===

class WorkerDiedError(RuntimeError):
    """The worker ended while it carried out the call, or was given up before it could.

    `worker` names the worker, `method` the method of the call (None: there was none), `pid` its process and
    `exitcode` what the process returned, or minus the number of the signal that killed it; each is
    None where it is not known. `started` tells whether the call had begun, and may have done something:
    True, False (nothing of it has been done: it can safely be made again), or None where that is not
    known. `deaths` are those that the call has seen, with `crash_retries` perhaps more than one: tuples
    (worker, pid, exitcode), the last one last.
    """

    def __init__(self, message: str, worker: str | None = None, method: str | None = None, pid: int | None = None,
                 exitcode: int | None = None, started: bool | None = None,
                 deaths: tuple[tuple[str, int | None, int | None], ...] = ()) -> None:
        super().__init__(message)
        self.worker, self.method, self.pid, self.exitcode = worker, method, pid, exitcode
        self.started, self.deaths = started, deaths


class CallTimeoutError(TimeoutError):
    """A call ran for longer than its `call_timeout`.

    `method` names the method that ran too long, `worker` the worker that ran it, and `timeout` is its limit in seconds.
    It is a plain TimeoutError, so `except` catches it as asyncio.TimeoutError and concurrent.futures.TimeoutError, too.
    """

    def __init__(self, message: str, method: str | None = None, worker: str | None = None,
                 timeout: float | None = None) -> None:
        super().__init__(message)
        self.method, self.worker, self.timeout = method, worker, timeout


def _optional(name: str) -> Any:
    """Import a module that need not be there, and of which type checkers know nothing."""
    import importlib
    return importlib.import_module(name)


def _nearest(name: object, names: Iterable[object]) -> str:
    """Return ", did you mean 'x'?" where a known name is near, else nothing."""
    import difflib
    near = difflib.get_close_matches(str(name), [str(known) for known in names], 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else ""


# === Options and their defaults ===

if TYPE_CHECKING:
    _Option: TypeAlias = tuple[Callable[[Any], Any], str]       # how a value is read, and what is expected in words


def _flag(value: Any) -> bool:
    if isinstance(value, str):
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.strip().lower()]
    if value in (True, False):
        return bool(value)
    raise ValueError


def _whole(least: int, none: bool = True) -> _Option:
    def parse(value: Any) -> int | None:
        if value is None and none:
            return None
        number = int(value)  # pyright: ignore[reportArgumentType]
        if isinstance(value, bool) or number < least or (not isinstance(value, str) and number != value):
            raise ValueError
        return number
    return parse, f"a whole number from {least}" + (", or None" if none else "")


def _seconds(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not 0 <= number < float("inf"):
        raise ValueError
    return number


def _span(value: Any) -> float | None:
    number = None if value is None else _seconds(value)
    if number == 0:
        raise ValueError
    return number


def _amount(value: Any) -> float:
    number = _seconds(value)
    return int(number) if number == int(number) else number


def _choice(kind: type[_Choice]) -> _Option:
    return (lambda value: value if isinstance(value, kind) else kind(value)), kind._choices()


def _function(value: Any) -> Any:
    if value is not None and (not callable(value) or _is_async(value)):
        raise ValueError
    return value


def _line(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value.isprintable() and value):
        raise ValueError
    return value


def _positional(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)):
        raise ValueError
    return tuple(value)


def _share(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not 0 <= number <= 1:
        raise ValueError
    return number


def _by_method(read: Callable[[Any], Any], expected: str) -> _Option:
    """Read an option that may also be a dict by method name."""
    def parse(value: Any) -> Any:
        return {str(name): read(each) for name, each in value.items()} if isinstance(value, dict) else read(value)
    return parse, f"{expected}, or a dict of such by method name, '*' for the others"


# How a call is made again: each by method name, too, but for the cap.
_RETRY_OPTIONS: dict[str, _Option] = {
    "num_retries": _by_method(*_whole(0, none=False)),
    "retry_on": _by_method(lambda value: _read_filters(value), "exception classes or callables, one or a list"),
    "retry_algorithm": _by_method(*_choice(RetryAlgorithm)),
    "retry_wait": _by_method(_seconds, "a number of seconds from 0"),
    "retry_max_wait": (_seconds, "a number of seconds from 0"),
    "retry_jitter": _by_method(_share, "a number from 0 to 1"),
    "retry_until": _by_method(lambda value: _read_validators(value), "callables, one or a list, or None"),
}
# What may be given by method name.
_BY_METHOD: dict[str, _Option] = {
    **_RETRY_OPTIONS,
    "call_timeout": _by_method(_span, "a number of seconds above 0, or None"),
}
# Of Ray's actors; others go into actor_options.
_RAY_OPTIONS: dict[str, _Option] = {
    "num_cpus": (_amount, "a number from 0"),
    "num_gpus": (_amount, "a number from 0"),
    "resources": (lambda value: dict(value), "a dict of amounts by name"),
    "memory": (_amount, "a number of bytes from 0"),
}
# Every option: how its value is read, and what is expected in words.
_OPTIONS: dict[str, _Option] = {
    "mode": _choice(ExecutionMode),
    "blocking": (_flag, "true or false"),
    "max_workers": _whole(0),
    "load_balancing": _choice(LoadBalancingAlgorithm),
    "on_demand": (_flag, "true or false"),
    "max_queued_tasks": _whole(1),
    "unwrap_futures": (_flag, "true or false"),
    "limits": (lambda value: _read_limits(value), "a LimitSet, a LimitPool, or a list of limits or of LimitSets"),
    "mp_context": _choice(_StartMethod),
    "on_demand_linger": (_seconds, "a number of seconds from 0"),
    **_RAY_OPTIONS,
    "actor_options": (lambda value: dict(value or {}), "a dict of Ray's options for actors"),
    "crash_retries": _whole(0, none=False),
    "max_tasks_per_worker": _whole(1),
    "max_worker_memory": _whole(1),
    "initializer": (_function, "a function, no coroutine function, or None"),
    "initargs": (_positional, "a tuple of the initializer's arguments"),
    "initkwargs": (lambda value: {**value}, "a dict of the initializer's arguments by name"),
    "name": (_line, "a printable text, or None"),
    "thread_factory": (_function, "a function that returns a threading.Thread, or None"),
    **_BY_METHOD,
    "retry_config": (lambda value: _read_config(value), "a RetryConfig, or None"),
}
# Settings that only the configuration has.
_SETTINGS: dict[str, _Option] = {
    **_OPTIONS,
    "load_balancing_on_demand": _choice(LoadBalancingAlgorithm),
    "task_decorator_on_demand": (_flag, "true or false"),
    "stop_timeout": (_seconds, "a number of seconds from 0"),
}


class _Reason(Exception):
    """Why a value is not possible, where that takes more than to tell what is expected."""


def _parse(name: str, value: Any, known: dict[str, _Option] = _OPTIONS) -> Any:
    """Return the option's value in its own type, or raise a TypeError or ValueError that helps."""
    if name not in known:
        raise TypeError(f"unknown option {name!r}{_nearest(name, known)}")
    read, expected = known[name]
    try:
        return read(value)
    except _Reason as reason:
        raise ValueError(f"{name}={value!r} is not possible: {reason}") from None
    except (TypeError, ValueError, KeyError, OverflowError):
        raise ValueError(f"{name}={value!r} is not possible: {expected}") from None


def _parse_all(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of one place, in their own types."""
    return _spread({name: _parse(name, value) for name, value in given.items()})


def _spread(given: Mapping[str, Any]) -> dict[str, Any]:
    """Have the RetryConfig among the options of one place stand for what is in it, unless that is given beside it."""
    return {**vars(given.get("retry_config") or types.SimpleNamespace()), **given}


# What `temp_config` holds here: (values by (table, name), the same before it).
_temporary: contextvars.ContextVar[tuple[dict[tuple[str, str], Any], Any]] = \
    contextvars.ContextVar("concurry_temporary", default=({}, None))


class _Settings:
    """A table of settings: assigned as attributes, validated at once; `temp_config` is seen through it."""

    def __init__(self, table: str, **initial: Any) -> None:
        self.__dict__.update(_table=table, _initial=initial, _values={})

    def _current(self) -> dict[str, Any]:
        """Return all that is set, here and by `temp_config`, as a dict."""
        for_now: Any = _temporary.get()[0].items()
        for_now = {name: value for (table, name), value in for_now if table == self._table}
        return {**self._initial, **_spread(self._values), **_spread(for_now)}

    def __setattr__(self, name: str, value: Any) -> None:
        self._values[name] = _parse(name, value, _SETTINGS)

    def __repr__(self) -> str:
        told = (f"{name}={value!r}" for name, value in self._current().items())
        return f"<settings of {self._table}: {', '.join(told)}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._current()[name]
        except KeyError:
            raise AttributeError(f"{name!r} is not set here" if name in _SETTINGS
                                 else f"unknown setting {name!r}{_nearest(name, _SETTINGS)}") from None


class _Config:
    """The defaults of every option: `defaults` for all modes, `thread`, `process`, ... for one.

    `global_config.defaults.blocking = True` and `global_config.thread.max_workers = 50` assign; what
    a mode sets wins over `defaults`, an argument wins over both. It is read when a worker is made.
    An impossible value raises ValueError, an unknown setting TypeError, at the assignment.
    """

    def __init__(self) -> None:
        self.reset_to_defaults()

    def reset_to_defaults(self) -> None:
        """Set everything to what concurry comes with; what `temp_config` holds stays until its end."""
        self.defaults = _Settings(
            "global", mode=None, blocking=False, max_workers=1, load_balancing=LoadBalancingAlgorithm.RoundRobin,
            load_balancing_on_demand=LoadBalancingAlgorithm.Random, on_demand=False,
            task_decorator_on_demand=True, on_demand_linger=1.0, max_queued_tasks=None,
            unwrap_futures=True, limits=None, stop_timeout=30.0, crash_retries=0, max_tasks_per_worker=None,
            max_worker_memory=None, initializer=None, initargs=(), initkwargs={}, name=None, thread_factory=None,
            num_retries=0, retry_on=[Exception], retry_algorithm=RetryAlgorithm.Exponential, retry_wait=1.0,
            retry_max_wait=60.0, retry_jitter=1.0, retry_until=None, retry_config=None, call_timeout=None,
            num_cpus=None, num_gpus=None, resources=None, memory=None, actor_options={},
            mp_context=_StartMethod.Forkserver if hasattr(os, "fork") else _StartMethod.Spawn)
        self.sync = _Settings("sync")
        self.asyncio = _Settings("asyncio")
        self.thread = _Settings("thread", max_workers=24, max_queued_tasks=100)
        self.process = _Settings("process", max_workers=4, max_queued_tasks=5)
        self.ray = _Settings("ray", max_workers=0, max_queued_tasks=2)

    def __setattr__(self, name: str, value: _Settings) -> None:
        if not isinstance(value, _Settings):
            raise TypeError(f"{name!r} cannot be set: set options of {', '.join(vars(self))}, "
                            f"as in global_config.thread.max_workers = 50")
        self.__dict__[name] = value

    def get_defaults(self, mode: ExecutionMode | str) -> dict[str, Any]:
        """Return the settings that hold for a mode, here and now, as a dict."""
        return {**self.defaults._current(), **getattr(self, ExecutionMode(mode).value)._current()}

    def __repr__(self) -> str:
        return f"<global_config: {', '.join(vars(self))}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # What holds here and now travels, for good.
        return _config_of, ({name: settings._current() for name, settings in vars(self).items()},)

    def _copy(self) -> _Config:
        return _config_of(*self.__reduce__()[1])


def _config_of(tables: dict[str, dict[str, Any]]) -> _Config:
    config = _Config()
    for name, values in tables.items():
        config.__dict__[name] = _Settings(vars(config)[name]._table, **values)
    return config


global_config = _Config()
_INITIAL = dict(global_config.defaults._initial)


class temp_config:
    """Change settings within a `with` block: `with temp_config(global_num_retries=3, thread_max_workers=10):`.

    A name is a table, `global` or a mode, and a setting. It holds for this thread, or asyncio task, and for the tasks
    that are started in the block; others do not see it. It nests, and ends with the block, whatever that raises.
    A generator must not yield within the block: its caller would see it.

    Raises ValueError at once for a name that it does not know and for an impossible value.
    """

    def __init__(self, **settings: Any) -> None:
        self._changes: dict[tuple[str, str], Any] = {}
        tables = ("global", *(mode.value for mode in ExecutionMode))
        for full, value in settings.items():
            table, _, name = full.partition("_")
            if table not in tables or name not in _SETTINGS:
                hint = f", did you mean 'global_{full}'?" if full in _SETTINGS else \
                    _nearest(full, [f"{each}_{setting}" for each in tables for setting in _SETTINGS])
                raise ValueError(f"unknown setting {full!r}{hint}")
            self._changes[table, name] = _parse(name, value, _SETTINGS)

    def __repr__(self) -> str:
        told = (f"{table}_{name}={value!r}" for (table, name), value in self._changes.items())
        return f"temp_config({', '.join(told)})"

    def __enter__(self) -> _Config:
        before = _temporary.get()
        _temporary.set(({**before[0], **self._changes}, before))
        return global_config

    def __exit__(self, *exc_info: object) -> None:
        _temporary.set(_temporary.get()[1] or _temporary.get())


_ONE_WORKER = (ExecutionMode.Sync, ExecutionMode.Asyncio)


class _Options(types.SimpleNamespace):
    """The options of one handle, complete."""

    max_queued_tasks: int | None

    def __init__(self, given: dict[str, Any], sized: bool = False) -> None:
        """Fill up what was given. With `sized` a pool is meant even where no size is given."""
        mode = given.get("mode") or global_config.defaults.mode
        if mode is None:
            raise ValueError(f"mode is required: {ExecutionMode._choices()}")
        defaults = global_config.get_defaults(mode)
        given = {**given}
        for name in _BY_METHOD:
            if isinstance(given.get(name, defaults[name]), dict):       # by method: the rest has the default
                rest = defaults[name] if isinstance(defaults[name], dict) else {"*": defaults[name]}
                given[name] = {"*": _INITIAL[name], **rest, **given.get(name, {})}
        on_demand = given.get("on_demand", defaults["on_demand"])
        size = given.get("max_workers")
        if mode in _ONE_WORKER:
            if on_demand or size not in (None, 1):
                wanted = "on_demand=True" if on_demand else f"max_workers={size}"
                raise ValueError(f"{wanted} is not possible: mode {mode.value!r} has exactly one worker")
            size = 1
        elif size is None:
            size = defaults["max_workers"] if sized or on_demand else 1
        if size == 0 and mode is ExecutionMode.Ray and (on_demand or given.get("max_workers") is None):
            size = float("inf") if on_demand else None      # None: the CPUs of the cluster, once it is asked
        if size == 0:
            if not on_demand:
                raise ValueError("max_workers=0 is not possible: a whole number from 1 (0 is for on_demand=True)")
            size = max(1, (os.cpu_count() or 2) - 1)
        if on_demand:
            defaults["load_balancing"] = defaults["load_balancing_on_demand"]
        super().__init__(**{**defaults, **given, "mode": mode, "max_workers": size, "on_demand": on_demand})
        self._check_initializer()

    def _check_initializer(self) -> None:
        for name in "initargs", "initkwargs":
            if vars(self)[name] and self.initializer is None:
                raise ValueError(f"{name}={vars(self)[name]!r} is not possible without an initializer")

    @property
    def room(self) -> float:
        """How many unsettled calls a worker may have: infinity where nothing bounds it."""
        if self.on_demand:
            return 1
        if self.blocking or self.mode in _ONE_WORKER or self.max_queued_tasks is None:
            return float("inf")
        return self.max_queued_tasks


# === Futures ===

# What a call came to: (kind, value). A tuple made for the occasion, so that `is` tells whose it is.
_RESULT, _ERROR, _CANCELLED = "result", "error", "cancelled"


def _is_begun(claim: object) -> bool:
    """Tell a worker's claim from the strings above, with which others claim that a call never begins."""
    return claim is not None and type(claim) is not str


class _Here(threading.local):
    """What this thread is, and what it is doing."""

    is_ours = False             # a worker's thread, an event loop's, the reader
    callbacks = 0               # done-callbacks being run, one inside the other
    failing: Any = None         # (future, kind, value) to be settled by the one who settles now
    building: Any = None        # the recipe whose object the next `__new__` makes
    made: int | None = None     # the id of that object
    plain: Any = None           # the class of which a plain object is being made
    recipe: Any = None          # in the fork method: how a worker finds what its parent had in hand
    kept: Any = None            # by token: limit sets that have to live on because they were pickled
    passed: Any = None          # descriptors that go along with what this thread pickles
    is_loading = False          # a worker process loads what its parent sent
    refs: Any = None            # ObjectRefs and actors that travel beside what this thread pickles, or loads, ...
    dependencies: Any = ()      # ... and those that Ray replaces by what they stand for
    reader: Any = None          # on the reader's thread: the reader
    divert: Any = None          # has somebody else run done-callbacks: they may wait, and this thread may not


_here = _Here()
# The call this code is part of.
_calling: contextvars.ContextVar[Any] = contextvars.ContextVar("concurry_calling", default=None)


_Lock = type(threading.Lock())


def _held_lock() -> threading.Lock | _RingingLock:
    """Return a lock to sleep on, until whoever has what is waited for releases it."""
    lock = threading.Lock() if _here.reader is None else _RingingLock(_here.reader)
    lock.acquire()
    return lock


def _sleep_on(lock: threading.Lock | _RingingLock, timeout: float | None) -> bool:
    """Wait until a held lock is released, at most `timeout` seconds (None: for ever); tell whether it was.

    The one place where a thread waits for a worker. The thread that brings the processes' answers
    goes on bringing them while it waits: what it waits for may be among them.
    """
    if _here.failing:
        _settle_failing(_here.failing)
    if _here.reader is not None:
        return _here.reader.wait(lock, timeout)  # type: ignore[no-any-return]
    if timeout is None:
        return lock.acquire()
    return lock.acquire(True, min(max(timeout, 0), threading.TIMEOUT_MAX))


def _run_callback(callback: Callable[[Any], object], future: BaseFuture[Any]) -> None:
    """Run the user's callback; whatever it raises is logged and goes no further."""
    if _here.divert is not None:
        _here.divert(_run_callback, callback, future)
        return
    _here.callbacks += 1
    try:
        callback(future)
    except BaseException:
        logger.exception("exception calling callback for %r", future)
    finally:
        _here.callbacks -= 1


class _Gate(threading.Condition):
    """The condition the standard library's `wait` locks a future with, made when it first asks.

    From then on the outcome is set under it: `wait` counts the done futures first and installs its
    waiters afterwards, and would wait for ever for one that was settled in between.
    """

    def __init__(self) -> None:
        super().__init__(threading.RLock())
        self.outcome: tuple[str, Any] | None = None
        self.waiters: list[Any] = []


class BaseFuture(concurrent.futures.Future[T]):
    """The outcome of a call, in every mode: a concurrent.futures.Future that can also be awaited.

    It is settled once, by whoever's `dict.setdefault` of its outcome comes first, and needs neither
    lock nor condition until somebody waits: most futures are done by then.
    """

    # Entries of __dict__: "_gate" the outcome, or a _Gate that holds it; "_claim" who was first,
    # the worker that begins the call or cancel(); "_call"; "_wakers" and "_callbacks", lists.
    _call: Any
    if TYPE_CHECKING:
        def __init__(self) -> None: ...
    else:
        __init__ = object.__init__

    @property
    def _outcome(self) -> Any:
        gate = self.__dict__.get("_gate")
        return gate.outcome if type(gate) is _Gate else gate

    # What the standard library's wait() and as_completed() look at.

    @property
    def _condition(self) -> _Gate:  # type: ignore[override]
        gate = self.__dict__.setdefault("_gate", _Gate())
        return gate if type(gate) is _Gate else self.__dict__.setdefault("_late_gate", _Gate())

    @property
    def _waiters(self) -> list[Any]:  # type: ignore[override]
        return self._condition.waiters

    @property
    def _state(self) -> str:  # type: ignore[override]
        outcome = self._outcome
        if outcome is None:
            return "RUNNING" if _is_begun(self.__dict__.get("_claim")) else "PENDING"
        return "CANCELLED_AND_NOTIFIED" if outcome[0] is _CANCELLED else "FINISHED"

    # What everybody calls.

    def done(self) -> bool:
        """Tell whether the call has ended, in whatever way."""
        gate = self.__dict__.get("_gate")
        return gate is not None and (type(gate) is not _Gate or gate.outcome is not None)

    def cancelled(self) -> bool:
        """Tell whether the call was cancelled."""
        outcome = self._outcome
        return outcome is not None and outcome[0] is _CANCELLED

    def running(self) -> bool:
        """Tell whether the call has begun and not ended."""
        return self._state == "RUNNING"

    def cancel(self, kill: bool = False) -> bool:
        """Cancel the call if it has not begun, or is a coroutine on an event loop; tell whether it is.

        A cancelled call that had not begun never runs, and its place in the queue is free at once. With `kill`
        one that runs is cancelled too, and ended as by a `call_timeout`: its process or actor is killed and replaced
        (with an actor the calls are lost that were handed to it beside this one); a thread is left to itself, and
        another worker takes its place. What runs in sync mode cannot be ended.
        """
        if not _is_begun(self.__dict__.setdefault("_claim", _CANCELLED)):
            return _settle(self, _CANCELLED, None) or self.cancelled()
        call = self.__dict__.get("_call")
        interrupt = call and call.backend and call.backend.interruption(call, kill)
        # Settled before it is interrupted: what the coroutine ends with comes too late.
        if interrupt and _settle(self, _CANCELLED, None):
            interrupt()
        return self.cancelled()

    def result(self, timeout: float | None = None) -> T:
        """Return the call's result, waiting at most `timeout` seconds for it (None: for ever).

        Raises what the call raised; TimeoutError when the time is over; CancelledError; RuntimeError instead of
        waiting for ever where the call cannot begin before this very code has ended: it has the same worker.
        """
        kind, value = self._outcome or self._wait(timeout)
        if kind is _RESULT:
            return value  # type: ignore[no-any-return]
        if kind is _CANCELLED:
            value = concurrent.futures.CancelledError()
        else:
            _ask_for(self)
        try:
            raise value
        finally:
            del self, value         # the traceback would keep the future alive, and the future it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, or None; wait, time out and be cancelled as `result` does."""
        kind, value = self._outcome or self._wait(timeout)
        if kind is _CANCELLED:
            raise concurrent.futures.CancelledError()
        if kind is not _ERROR:
            return None
        _ask_for(self)
        return value        # type: ignore[no-any-return]

    def add_done_callback(self, fn: Callable[[BaseFuture[T]], object]) -> None:
        """Call `fn(future)` when the call has ended, in the thread that ends it, or now if it has.

        An exception in `fn` is logged and ignored. A callback that `asyncio.wait` adds runs on its event loop.
        """
        if getattr(fn, "__module__", None) == "asyncio.tasks":
            import asyncio
            fn = _OnLoop(asyncio.get_running_loop(), fn)
        _attend(self, "_callbacks", fn)

    def remove_done_callback(self, fn: Callable[[BaseFuture[T]], object]) -> int:
        """Remove all callbacks that equal `fn`; return how many there were. `asyncio.wait` needs it."""
        count, callbacks = 0, self.__dict__.get("_callbacks", [])
        for each in list(callbacks):
            if (each.fn if type(each) is _OnLoop else each) == fn:
                try:
                    callbacks.remove(each)
                    count += 1
                except ValueError:          # it is just being called
                    pass
        return count

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio
        if not self.done():
            # Not asyncio.wrap_future: that waits for ever for a StopIteration.
            loop = asyncio.get_running_loop()
            woken: asyncio.Future[None] = loop.create_future()

            def end(future: Any) -> None:
                if not woken.done():
                    woken.set_result(None)
            wake = _OnLoop(loop, end)
            _attend(self, "_wakers", wake)
            try:
                yield from woken
            except asyncio.CancelledError:
                _leave(self, wake)
                self.cancel()
                raise
        if self.cancelled():
            raise asyncio.CancelledError()
        try:
            return self.result()
        except StopIteration as error:      # to whoever awaits it would be the end of this coroutine, with a result
            raise RuntimeError(f"the call raised {error!r}") from error

    def _known(self) -> tuple[str, Any]:
        """Return the outcome that is there."""
        outcome = self.__dict__.get("_gate")
        return outcome if type(outcome) is tuple else self._outcome

    def _wait(self, timeout: float | None) -> tuple[str, Any]:
        """Sleep until the outcome is there, and return it."""
        if timeout is None and _here.is_ours:
            _refuse_to_wait_for_own([self])
        if timeout is None or _number_of_seconds(timeout) > 0:
            lock, is_awake = _held_lock(), False
            _attend(self, "_wakers", lock)
            try:
                is_awake = _sleep_on(lock, timeout)
            finally:
                if not is_awake:
                    _leave(self, lock)
        outcome: tuple[str, Any] | None = self._outcome
        if outcome is None:
            call = self.__dict__.get("_call")
            shown = f"{call} " if call else ""
            raise TimeoutError(f"the call {shown}has not ended within {timeout:g} seconds; it goes on")
        return outcome

    # What an executor calls, and a test that plays one.

    def set_running_or_notify_cancel(self) -> bool:
        """Mark the call as begun; return False if it was cancelled. InvalidStateError if it has begun or ended."""
        if self.cancelled():
            return False
        if self.done() or not self._begin():
            raise concurrent.futures.InvalidStateError(f"this future has begun or ended already: {self!r}")
        return True

    def set_result(self, result: T) -> None:
        """Settle the future with a result; InvalidStateError if it has an outcome."""
        self._set(_RESULT, result)

    def set_exception(self, exception: BaseException | None) -> None:
        """Settle the future with an exception, or with the result None if that is None.

        Raises InvalidStateError if the future has an outcome already.
        """
        self._set(_RESULT if exception is None else _ERROR, exception)

    def _set(self, kind: str, value: Any) -> None:
        if not _settle(self, kind, value):
            raise concurrent.futures.InvalidStateError(f"this future has its outcome already: {self!r}")

    def _begin(self, claim: object = None) -> bool:
        """Claim the call for a worker; True once, or each time for the same claim."""
        claim = claim or object()
        return self.__dict__.setdefault("_claim", claim) is claim

    def __repr__(self) -> str:
        outcome = self._outcome
        if outcome is None:
            state = self._state.lower()
        else:
            kind, value = outcome
            state = "cancelled" if kind is _CANCELLED else \
                f"{'returned' if kind is _RESULT else 'raised'} {type(value).__name__}"
        call = self.__dict__.get("_call")
        return f"<{type(self).__name__} at {id(self):#x} {state}{f' {call}' if call else ''}>"

    def __reduce__(self) -> NoReturn:
        import pickle
        raise pickle.PicklingError("a future cannot travel to another process: pass it as an argument "
                                   "with unwrap_futures, or its result")


def _refuse_to_wait_for_own(futures: Iterable[Any]) -> None:
    """Raise a RuntimeError for a call that cannot begin before the one that waits for it, on this thread, has ended."""
    for future in futures:
        call = future.__dict__.get("_call") if isinstance(future, BaseFuture) else None
        if call is not None and call.pool.is_stuck_here(call):
            raise _own_error(RuntimeError(
                f"to wait here for the call {call} would be for ever: its worker is the one that waits, and does one "
                f"call at a time; call the method itself, or have the other call made by another worker"))


def _settle(future: BaseFuture[Any], kind: str, value: Any) -> bool:
    """Give a future its outcome, unless it has one; return whether this call did."""
    state = future.__dict__
    # Places and counters first: a waiter that submits at once must not find the queue still full.
    call = state.pop("_call", None)
    if call is not None:
        if kind is _ERROR and not call.pool.is_stopped and "_is_asked" not in state:
            state["_unasked"] = _Unasked(call.pool.failures, value)
        call.pool.leave(call, kind)
    outcome = (kind, value)
    gate = state.setdefault("_gate", outcome)
    if gate is not outcome and not (type(gate) is _Gate and _settle_under(gate, future, outcome)):
        return False
    if "_wakers" in state:
        _notify(future, "_wakers")
    if "_callbacks" in state:
        _notify(future, "_callbacks")
    return True


class _Failures:
    """The calls of one pool that failed and that nobody has asked about: told once, at its end."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.is_over, self.is_told = name, 0, False, False
        self.numbers, self.first = itertools.count(), (math.inf, "")

    def add(self, number: int, error: BaseException) -> None:
        self.count += 1
        if number < self.first[0]:
            self.first = number, f"{type(error).__name__}: {_text(error)}"
        self.tell()

    def end(self) -> None:
        self.is_over = True
        self.tell()

    def tell(self) -> None:
        if self.is_over and self.count and not self.is_told:
            self.is_told = True
            # There may be more, which wait for the garbage collector.
            logger.warning("%s: at least %d calls failed, and nobody asked for their results; the first error: %s",
                           self.name, self.count, self.first[1])


class _Unasked:
    """Part of a failed future until somebody asks: if it goes with that, nobody ever will."""

    def __init__(self, failures: Any, error: BaseException) -> None:
        self.failures, self.number, self.error = failures, next(failures.numbers), error

    def __del__(self) -> None:
        if self.failures is not None:
            self.failures.add(self.number, self.error)


def _ask_for(future: Any) -> None:
    """Note that somebody cares for how a future ends, or knows it."""
    if isinstance(future, BaseFuture):
        state = future.__dict__
        state["_is_asked"] = True
        unasked = state.pop("_unasked", None)
        if unasked is not None:
            unasked.failures = None


def _withdraw(future: BaseFuture[Any]) -> bool:
    """Cancel a call that has not begun; tell whether this did."""
    return future.__dict__.setdefault("_claim", _CANCELLED) is _CANCELLED and _settle(future, _CANCELLED, None)


def _settle_unbegun(future: BaseFuture[Any], kind: str, value: Any) -> None:
    """Settle a call that will never begin."""
    future.__dict__.setdefault("_claim", kind)
    _settle(future, kind, value)


def _fail_call(call: Any, error: BaseException) -> None:
    """Fail a call because something of ours has raised while it was seen to, and log that; everybody else goes on."""
    logger.error("an error of concurry's own, in the call %s: it fails", call, exc_info=error)
    call.pool.calls.pop(call, None)
    if call.backend is not None:
        call.backend.calls.pop(call, None)
    try:
        _settle_unbegun(call.future, _ERROR, error)
    except BaseException:           # in the same place as before: now without giving its place back
        call.future.__dict__.pop("_call", None)
        _settle_unbegun(call.future, _ERROR, error)
    call.pool.go_on()


def _guard(see_to: Callable[..., object], call: Any, *args: Any) -> None:
    """See to one call; if that raises, this call fails."""
    try:
        see_to(call, *args)
    except BaseException as error:
        _fail_call(call, error)


def _fail_dependent(future: BaseFuture[Any], kind: str, value: Any) -> None:
    """Settle a call whose dependency has failed: in a loop, for such chains may be long."""
    if _here.failing is not None:
        _here.failing.append((future, kind, value))
        return
    _here.failing = collections.deque([(future, kind, value)])
    try:
        _settle_failing(_here.failing)
    finally:
        _here.failing = None


def _settle_failing(failing: collections.deque[tuple[BaseFuture[Any], str, Any]]) -> None:
    while failing:
        _settle_unbegun(*failing.popleft())


class _OnLoop:
    """A callback that runs on an event loop, whatever thread the future is settled in."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fn: Callable[[Any], object]) -> None:
        self.loop, self.fn = loop, fn

    def __call__(self, future: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.fn, future)
        except RuntimeError:            # the loop is closed: nobody waits there any more
            pass


def _settle_under(gate: _Gate, future: BaseFuture[Any], outcome: tuple[str, Any]) -> bool:
    with gate:
        if gate.outcome is not None:
            return False
        gate.outcome = outcome
        tell = {_RESULT: "add_result", _ERROR: "add_exception", _CANCELLED: "add_cancelled"}[outcome[0]]
        for waiter in gate.waiters:
            getattr(waiter, tell)(future)
        gate.notify_all()
    return True


def _attend(future: BaseFuture[Any], where: str, fn: Any) -> None:
    """Have `fn(future)` called when the future is done: among the wakers, or after them. A waker may be a lock."""
    future.__dict__.setdefault(where, []).append(fn)
    if future.done():
        _notify(future, where)


def _leave(future: BaseFuture[Any], waker: Any) -> None:
    try:
        future.__dict__["_wakers"].remove(waker)
    except (KeyError, ValueError):
        pass


def _notify(future: BaseFuture[Any], where: str) -> None:
    """Call everything in the list, each once, though the settler and a late comer may both be here."""
    waiting = future.__dict__[where]
    while waiting:
        try:
            fn = waiting.pop(0)
        except IndexError:
            break
        if where == "_callbacks":
            _run_callback(fn, future)
            continue
        try:
            if type(fn) is _Lock:
                fn.release()
            else:
                fn(future)
        except Exception:           # the others have to be told all the same
            logger.exception("exception while %r was settled", future)


def _is_foreign_future(x: object) -> bool:
    """Tell an asyncio future, without importing asyncio for it."""
    return getattr(type(x), "_asyncio_future_blocking", None) is not None


def _is_future(x: object) -> bool:
    return isinstance(x, concurrent.futures.Future) or _is_foreign_future(x)


def _is_ref(kind: type) -> bool:
    """Tell the type of Ray's ObjectRefs, without importing Ray for it."""
    return kind.__module__ == "ray" and kind.__name__ == "ObjectRef"


def _wrap_refs(values: Iterable[Any]) -> list[Any]:
    """Return the values as a list, with futures in the places of ObjectRefs."""
    if "ray" not in sys.modules:
        return list(values)
    return [wrap_future(x) if _is_ref(type(x)) else x for x in values]


def _in_own_loop(future: Any) -> bool:
    import asyncio
    return asyncio._get_running_loop() is future.get_loop()


def _when_done(future: Any, fn: Callable[[Any], object]) -> None:
    """Call `fn(future)` once a future of any kind is done; from any thread."""
    if isinstance(future, BaseFuture):
        _attend(future, "_wakers", fn)
    elif isinstance(future, concurrent.futures.Future) or _in_own_loop(future):
        future.add_done_callback(fn)
    else:
        future.get_loop().call_soon_threadsafe(future.add_done_callback, fn)


def _forget_when_done(future: Any, fn: Callable[[Any], object]) -> None:
    """Take back what `_when_done` did."""
    if isinstance(future, BaseFuture):
        _leave(future, fn)
    elif isinstance(future, concurrent.futures.Future):
        with future._condition:
            if fn in future._done_callbacks:  # type: ignore[attr-defined]
                future._done_callbacks.remove(fn)  # type: ignore[attr-defined]
    elif _in_own_loop(future):
        future.remove_done_callback(fn)
    elif not future.get_loop().is_closed():
        future.get_loop().call_soon_threadsafe(future.remove_done_callback, fn)


def _outcome_of(future: Any) -> tuple[str, Any]:
    """Return the (kind, value) of a done future of any kind."""
    if isinstance(future, BaseFuture):
        outcome = future._known()
        if outcome[0] is _ERROR:
            _ask_for(future)
        return outcome
    if future.cancelled():
        return _CANCELLED, None
    error = future.exception()
    return (_RESULT, future.result()) if error is None else (_ERROR, error)


def _kind_of(future: Any) -> str:
    """Return how a done future of any kind has ended; its result need not come here for that."""
    return (future._outcome if isinstance(future, BaseFuture) else _outcome_of(future))[0]


@_overload
def wrap_future(future: concurrent.futures.Future[T]) -> BaseFuture[T]: ...
@_overload
def wrap_future(future: Any) -> BaseFuture[Any]: ...
def wrap_future(future: Any) -> BaseFuture[Any]:
    """Return a BaseFuture that ends as the given concurrent or asyncio future does, or as Ray's ObjectRef.

    Cancelling it cancels the original. A BaseFuture is returned as it is; TypeError for anything else.
    Waiting for an ObjectRef brings its object to this machine.
    """
    if isinstance(future, BaseFuture):
        return future
    if _is_ref(type(future)):
        return _of_ref(future)
    if not _is_future(future):
        raise TypeError(f"a future is needed, not {type(future).__name__}")
    ours: BaseFuture[Any] = BaseFuture()

    def cancel_theirs(ours: BaseFuture[Any]) -> None:
        if ours.cancelled() and not future.done():
            if _is_foreign_future(future):
                future.get_loop().call_soon_threadsafe(future.cancel)
            else:
                future.cancel()

    _attend(ours, "_wakers", cancel_theirs)
    _when_done(future, lambda theirs: _settle(ours, *_outcome_of(theirs)))
    return ours


# === Progress ===
#
#   bar.update()  ->  a screen, ten times a second at most: a terminal, a stream of lines, a notebook, the
#                     parent of this process, a function of the user's
#
# What travels between them is a _State, numbers and words; nothing keeps a bar alive but its owner.

_REDRAW = 0.1           # seconds between two redraws
_PATIENCE = 1.0         # seconds to wait for somebody else who shows a bar, before an end is left to him
_SPARSE = 10            # seconds between two lines where nothing can be redrawn; later a tenth of the time taken
_COLORS = {"black": 30, "red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36, "white": 37}
_COLOR_OF = {"success": "green", "failure": "red", "stopped": "yellow"}
_BLOCKS = " ▏▎▍▌▋▊▉█"    # a cell of a bar, from empty to full

_State = collections.namedtuple("_State", "n total failed elapsed rate desc unit ncols color leave state text")


class _BarStyle(_Choice):
    Auto = ("auto",)
    Std = ("std",)
    Notebook = ("notebook",)
    Ray = ("ray",)


def _color(value: Any) -> Any:
    if value is None or value in _COLORS:
        return value
    if isinstance(value, str) and len(value) == 7 and value[0] == "#":
        int(value[1:], 16)
        return value
    raise ValueError


def _count(value: Any) -> Any:
    number = _number(value, "a count")
    if not -_LARGEST < number < _LARGEST:
        raise ValueError
    return number


_BAR_OPTIONS: dict[str, _Option] = {
    "total": (lambda value: None if value is None else _positive_or_zero(value), "a number from 0, or None"),
    "desc": (str, "a text"),
    "unit": (str, "a text"),
    "ncols": _whole(1),
    "color": (_color, f"one of {', '.join(_COLORS)}, or '#rrggbb', or None"),
    "disable": (_flag, "true or false"),
    "leave": (_flag, "true or false"),
    "style": _choice(_BarStyle),
}


def _positive_or_zero(value: Any) -> Any:
    number = _count(value)
    if number < 0:
        raise ValueError
    return number


def _clock(seconds: float) -> str:
    """Return a span in digits: 00:09, 12:30, 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


def _amount_shown(n: float) -> str:
    return f"{n}" if isinstance(n, int) else f"{n:.1f}"


def _rate_shown(rate: float, unit: str) -> str:
    if 0 < rate < 1:
        return f"{1 / rate:.3g} s/{unit}"
    factor, letter = next(((f, each) for f, each in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if rate >= 10 * f), (1, ""))
    return f"{rate / factor:.1f}{letter} {unit}/s"


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1
               for each in text)


def _clipped(text: str, columns: int) -> str:
    """Return a text on one line, cut where it is wider."""
    text = "".join(each if each.isprintable() else " " for each in text[:4 * columns + 4])
    if _columns(text) <= columns:
        return text
    while text and _columns(text) >= columns:
        text = text[:-1]
    return text + "…" * (columns > 0)


def _line_of(shown: _State, columns: int, blocks: str = _BLOCKS, paint: Callable[[str], str] = str) -> str:
    """Return what is shown as a line, no wider than so many columns: the less there is room for, the less it says.

    blocks: the cells of a bar, from empty to full. paint: a function that colours a part of the line.
    """
    columns = min(columns, shown.ncols or columns)
    desc = _clipped(shown.desc, columns // 2)
    desc += ": " if desc else ""
    share, left = "", None
    if shown.total is not None:
        share = f"{100 if shown.n >= shown.total else int(100 * max(shown.n, 0) / shown.total):3}%"
        if shown.state == "running" and shown.rate > 0:
            left = _clock(min(1e7, max(0, shown.total - shown.n) / shown.rate))
    count = _amount_shown(shown.n) + (f" {shown.unit}" if shown.total is None else f"/{_amount_shown(shown.total)}")
    span = _clock(shown.elapsed) + (f"<{left}" if left else "")
    notes = [f"{shown.failed} failed"] * bool(shown.failed) + [_clipped(shown.text, columns)] * bool(shown.text)
    ends = [f" {count} [{', '.join([span, _rate_shown(shown.rate, shown.unit), *notes])}]",
            f" {count} [{', '.join([span, *notes])}]", f" {count} {', '.join(notes) or left or span}", f" {count}", ""]
    room, end = -1, ""
    for end in ends:
        room = columns - sum(map(_columns, (desc, share, end)))
        if room >= 0:
            break
    if room < 0:                # not even a share
        return _clipped(desc + share, columns)
    if not share:
        return desc + paint(end[1:] or _clipped(count, columns - _columns(desc)))
    return f"{desc}{paint(share + _bar_of(shown, room, blocks))}{end}"


def _bar_of(shown: _State, room: int, blocks: str) -> str:
    """Return the bar itself, with its borders; nothing where there is hardly room."""
    cells = room - 2
    if cells < 4 or not blocks:
        return ""
    parts = len(blocks) - 1
    filled = int(cells * parts * min(1, max(shown.n, 0) / shown.total if shown.total else 1))
    full, rest = divmod(filled, parts)
    return "|" + (blocks[-1] * full + blocks[rest] * (full < cells)).ljust(cells) + "|"


class _Screen:
    """Where bars are shown. `show` is called by one thread at a time, with the latest that is known of a bar."""

    due = 0.0                       # when the next redraw may be
    is_busy = False

    def __init__(self) -> None:
        self.news: dict[Any, _State] = {}       # by the bar's key: what has not been shown yet
        self.lock = threading.RLock()

    def put(self, key: Any, shown: _State) -> None:
        """Show a bar; what cannot be shown now, for somebody else is at it, he will show; for ends that is waited for.

        Not for ever: a Ctrl-C may come just when the lock has been taken.
        """
        self.news[key] = shown
        if self.lock.acquire(True, _PATIENCE) if shown.state != "running" else self.lock.acquire(False):
            try:
                if not self.is_busy:            # else a signal handler has come in the middle
                    self._put_all()
            finally:
                self.lock.release()

    def _put_all(self) -> None:
        self.is_busy = True
        try:
            while self.news:
                try:
                    self.show(*self.news.popitem())
                except Exception:
                    logger.debug("a progress bar could not be shown", exc_info=True)
        finally:
            self.is_busy = False

    def show(self, key: Any, shown: _State) -> None:
        """Show one bar, or its end."""

    def aside(self, print_something: Callable[[], object]) -> None:
        """Have something printed where the bars may be in the way."""
        print_something()


class _Terminal(_Screen):
    """Lines at the end of a terminal, redrawn together; those that have ended stay above them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream
        self.bars: dict[Any, _State] = {}
        self.height = 0             # how many lines there are now
        try:
            _BLOCKS.encode(getattr(stream, "encoding", None) or "ascii")
            self.blocks = _BLOCKS
        except (UnicodeError, LookupError, TypeError):
            self.blocks = " #"

    def show(self, key: Any, shown: _State) -> None:
        if shown.state == "running":
            self.bars[key] = shown
            self.draw()
        elif self.bars.pop(key, None) is not None or shown.leave:
            self.draw([shown] if shown.leave else [])

    def aside(self, print_something: Callable[[], object]) -> None:
        with self.lock:
            self.draw(print_between=print_something)

    def draw(self, ended: Sequence[_State] = (), print_between: Callable[[], object] | None = None) -> None:
        """Draw all anew, below what has just ended, and what somebody else wants to print there."""
        columns, rows = self.size()
        up = f"\x1b[{self.height - 1}A" if self.height > 1 else ""
        if print_between is not None:
            self.stream.write(f"\r{up}\x1b[J")
            self.stream.flush()
            print_between()
            up = ""
        running = list(self.bars.values())[:max(1, rows - 1)]
        lines = [self.line(shown, columns) for shown in (*ended, *running)]
        self.height = len(running)
        self.stream.write("\r" + up + "\n".join(line + "\x1b[K" for line in lines)
                          + "\n" * bool(ended and not running) + "\x1b[J")
        self.stream.flush()

    def size(self) -> tuple[int, int]:
        try:
            columns, rows = os.get_terminal_size(self.stream.fileno())
        except (OSError, ValueError, AttributeError):
            columns, rows = 0, 0
        return (columns or 80) - 1, rows or 24         # in the last column a terminal may be about to wrap

    def line(self, shown: _State, columns: int) -> str:
        color = _COLOR_OF.get(shown.state, shown.color)
        if color is None or os.environ.get("NO_COLOR"):
            return _line_of(shown, columns, self.blocks)
        code = _COLORS.get(color) or "38;2;{};{};{}".format(*bytes.fromhex(color[1:]))
        return _line_of(shown, columns, self.blocks, lambda text: f"\x1b[{code}m{text}\x1b[0m")


class _Lines(_Screen):
    """A line now and then, and one at the end: in files, pipes, the logs of a cluster."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream
        self.next: dict[Any, float] = {}        # by the bar's key: the seconds after which it is told again

    def show(self, key: Any, shown: _State) -> None:
        if shown.state != "running":
            self.next.pop(key, None)
            if not shown.leave:
                return
        elif shown.elapsed < self.next.setdefault(key, _SPARSE):
            return
        else:
            self.next[key] = shown.elapsed + max(_SPARSE, shown.elapsed / 10)
        state = "" if shown.state == "running" else f" {shown.state}"
        line = _line_of(shown, shown.ncols or 10_000, "") + state
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")     # in one piece
        self.stream.flush()


class _Notebook(_Screen):
    """HTML in the output of a Jupyter cell."""

    def __init__(self) -> None:
        super().__init__()
        self.displays: dict[Any, Any] = {}      # by the bar's key

    def show(self, key: Any, shown: _State) -> None:
        page = _optional("IPython.display")
        html = page.HTML(self.html(shown))
        if key not in self.displays:
            self.displays[key] = page.display(html, display_id=True)
        else:
            self.displays[key].update(html if shown.leave or shown.state == "running" else page.HTML(""))
        if shown.state != "running":
            del self.displays[key]

    @staticmethod
    def html(shown: _State) -> str:
        import html
        color = _COLOR_OF.get(shown.state, shown.color)
        style, accent = (f' style="color: {color}"', f"; accent-color: {color}") if color else ("", "")
        most = shown.total or shown.n or 1
        extent = "" if shown.total is None and shown.state == "running" else f' value="{shown.n}" max="{most}"'
        text = _line_of(shown._replace(desc=""), 10_000, "").strip()
        return (f'<div class="concurry-progress" style="font-family: monospace; white-space: pre">'
                f'{html.escape(shown.desc)} <progress{extent} style="vertical-align: middle{accent}"></progress> '
                f'<span{style}>{html.escape(text)}</span></div>')


class _Told(_Screen):
    """A function of the user's: `fn(done, total, elapsed)`."""

    def __init__(self, fn: Callable[[float, float | None, float], object]) -> None:
        super().__init__()
        self.fn = fn

    def show(self, key: Any, shown: _State) -> None:
        _here.callbacks += 1        # it must not wait for a place in a queue
        try:
            self.fn(shown.n, shown.total, shown.elapsed)
        except BaseException as error:      # a SystemExit would end a worker's thread
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise
            logger.debug("the function that progress is told raised this", exc_info=True)
        finally:
            _here.callbacks -= 1


class _Above(_Screen):
    """The parent of this worker process."""

    def show(self, key: Any, shown: _State) -> None:
        _upstream.show(key, shown)


_NOWHERE = _Screen()
_NOWHERE.due = math.inf
# By the id of the stream, or the class where there is one in a process.
_screens: weakref.WeakValueDictionary[Any, _Screen] = weakref.WeakValueDictionary()
_screens_lock = threading.RLock()


def _is_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and getattr(get_shell(), "kernel", None) is not None


def _screen_for(style: _BarStyle) -> _Screen:
    """Return where a bar is shown."""
    key: Any
    make: Callable[[], _Screen]
    stream = sys.stderr
    if style is _BarStyle.Notebook or style is _BarStyle.Auto and _is_notebook():
        key, make = _Notebook, _Notebook
    elif style is _BarStyle.Auto and _upstream is not None:
        key, make = _Above, _Above
    elif stream is None:
        return _NOWHERE
    else:
        is_terminal = _is_terminal(stream) and style is not _BarStyle.Ray and not _lineage
        key, make = id(stream), functools.partial(_Terminal if is_terminal else _Lines, stream)
    with _screens_lock:
        screen = _screens.get(key)
        if screen is None:
            screen = _screens[key] = make()
        return screen


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, OSError, ValueError):
        return False


class ProgressBar:
    """Show how far something is: `for x in ProgressBar(items): ...`, or `bar.update()` for each step.

    >>> with ProgressBar(total=3, desc="steps", disable=True) as bar:
    ...     bar.update(2)
    >>> bar.n, bar.total
    (2, 3)

    Count, share, rate, time taken and left are shown on standard error: on a terminal as a line that is
    redrawn, several bars below each other; elsewhere as a line now and then; in a notebook as HTML. A bar in a
    worker process is shown by its parent, one in a Ray worker as lines. It may be moved from any thread; an update
    costs less than a microsecond. What goes wrong when it is shown is logged at DEBUG and goes no further.

    iterable: what is gone through; its length, where it has one, is the total.
    total: how many there will be; None: not known.
    desc, unit: texts: what is done, and what is counted.
    ncols: the width in columns; None: the terminal's.
    color: of the running bar: "black", "red", "green", "yellow", "blue", "magenta", "cyan", "white" or "#rrggbb";
        success is green, failure red, stopped yellow. None: no colour. With NO_COLOR in the environment there is none.
    disable: count, but show nothing.
    leave: whether it stays to be seen when it has ended.
    style: "auto"; "std": standard error, also in a worker process; "notebook"; "ray": whole lines, for workers.

    `n`, `total` and `desc` can be read. Raises TypeError for an unknown option, ValueError for an impossible value.
    """

    n: float
    total: float | None
    desc: str
    _iterable: Any
    _marks: collections.deque[tuple[float, float]]
    _screen = _NOWHERE

    def __init__(self, iterable: Iterable[Any] | None = None, *, total: float | None = None, desc: str = "",
                 unit: str = "it", ncols: int | None = None, color: str | None = None, disable: bool = False,
                 leave: bool = True, style: str = "auto") -> None:
        given = {name: _parse(name, value, _BAR_OPTIONS) for name, value in locals().items() if name in _BAR_OPTIONS}
        if iterable is not None and not isinstance(iterable, collections.abc.Iterable):
            raise TypeError(f"a ProgressBar goes through an iterable, not {iterable!r}; a number is its total=")
        if total is None and isinstance(iterable, collections.abc.Sized):
            given["total"] = len(iterable)
        self.n, self.total, self.desc = 0, given["total"], given["desc"]
        self._iterable, self._failed, self._state, self._text = iterable, 0, "running", ""
        self._unit, self._ncols = given["unit"], given["ncols"]
        self._color, self._leave = given["color"], given["leave"]
        self._lock, self._turn = threading.RLock(), threading.Lock()
        self._began = time.monotonic()
        self._marks = collections.deque([(self._began, 0)], 50)         # of the last seconds: for the rate
        if not given["disable"]:
            self._screen = _screen_for(given["style"])
            self._moved()

    def update(self, n: float = 1) -> None:
        """Move by n, a number; less than 0 moves back."""
        with self._lock:
            self.n += n
        self._moved()

    def set_n(self, n: float) -> None:
        """Move to n."""
        n = _parse("n", n, {"n": (_count, "a number")})
        with self._lock:
            self.n = n
        self._moved()

    def set_total(self, total: float | None) -> None:
        """Change how many there will be; None: not known."""
        self.total = _parse("total", total, _BAR_OPTIONS)
        self._moved()

    def set_description(self, desc: str) -> None:
        """Change the text that tells what is done."""
        self.desc = str(desc)
        self._moved()

    def set_unit(self, unit: str) -> None:
        """Change what is counted."""
        self._unit = str(unit)
        self._moved()

    def success(self, text: str = "") -> None:
        """End it, in green; with a text, perhaps. What comes after the end is counted, and not shown."""
        self._end("success", text)

    def failure(self, text: str = "") -> None:
        """End it, in red."""
        self._end("failure", text)

    def stop(self, text: str = "") -> None:
        """End it, in yellow: it was not finished."""
        self._end("stopped", text)

    def close(self) -> None:
        """End it as what it is: a failure if something in it has failed, a success if all is done, else stopped."""
        is_whole = self.total is None or self.n >= self.total
        self._end("failure" if self._failed else "success" if is_whole else "stopped", "")

    def __iter__(self) -> Iterator[Any]:
        if self._iterable is None:
            raise TypeError("this ProgressBar has nothing to go through: it was made without an iterable")
        return self._go_through()

    def _go_through(self) -> Iterator[Any]:
        with self:
            for item in self._iterable:
                yield item
                self.update()
            self.success()

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("the total of this ProgressBar is not known")
        return int(self.total)

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: types.TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, Exception):
            self.failure(kind.__name__)
        else:                               # Ctrl-C; a loop that was left early
            self.stop()

    def __del__(self) -> None:
        if self._screen is not _NOWHERE:
            self.close()

    def __repr__(self) -> str:
        return f"<ProgressBar {self.desc!r}: {self.n} of {self.total}, {self._state}>"

    def __reduce__(self) -> NoReturn:
        raise _pickle().PicklingError("a ProgressBar cannot travel to another process: make one there, and it is "
                                      "shown here")

    def _count(self, done: float, failed: int) -> None:
        with self._lock:
            self._failed += failed
        self.update(done)

    def _moved(self) -> None:
        if time.monotonic() >= self._screen.due:
            self._show()

    def _end(self, state: str, text: str) -> None:
        if self._state == "running":
            self._text, self._state = str(text), state
            self._show()

    def _show(self) -> None:
        """Show it as it is, once at a time: what is shown after its end would stay for ever.

        Whoever finds somebody else at it leaves it to him, who looks again.
        """
        while self._screen is not _NOWHERE and self._turn.acquire(False):
            state, screen = self._state, self._screen
            try:
                if screen is not _NOWHERE:
                    now = time.monotonic()
                    screen.due = now + _REDRAW
                    screen.put(id(self), _State(
                        self.n, self.total, self._failed, now - self._began, self._rate(now), self.desc, self._unit,
                        self._ncols, self._color, self._leave, state, self._text))
                    if state != "running":
                        self._screen = _NOWHERE
            finally:
                self._turn.release()
            if self._state == state:
                return

    def _rate(self, now: float) -> float:
        """Return how many come in a second: of late while it runs, in all when it has ended."""
        then, n = self._marks[0]
        self._marks.append((now, self.n))
        if self._state != "running":
            then, n = self._began, 0
        return (self.n - n) / (now - then) if now > then else 0.0


# === Waiting ===

def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + _number_of_seconds(timeout)


def _number_of_seconds(timeout: object) -> float:
    if isinstance(timeout, (int, float)):
        return timeout
    raise TypeError(f"timeout must be a number of seconds, or None, not {timeout!r}")


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _failed(future: Any) -> bool:
    return _kind_of(future) is _ERROR


def _has_no_result(future: Any) -> bool:
    return _kind_of(future) is not _RESULT


class _Bell:
    """Wake one sleeper, a thread or a coroutine; from any thread. A ring that nobody hears yet is not lost."""

    def __init__(self) -> None:
        self.lock = _held_lock()            # while there is nothing to wake for
        self.wake_loop: Callable[[], object] | None = None

    def wake(self) -> bool | None:
        """Ring; return False if it had been rung already."""
        if not self.lock.locked():          # it is awake
            return False
        try:
            self.lock.release()
        except RuntimeError:                # since just now
            return False
        wake_loop = self.wake_loop
        if wake_loop is not None:
            wake_loop()
        return True

    def sleep(self, timeout: float | None) -> None:
        """Wait until woken, at most `timeout` seconds."""
        _sleep_on(self.lock, timeout)

    async def sleep_async(self, timeout: float | None) -> None:
        """Wait until woken without blocking the running loop."""
        import asyncio
        loop = asyncio.get_running_loop()
        woken: Any = loop.create_future()
        self.wake_loop = lambda: loop.call_soon_threadsafe(lambda: woken.done() or woken.set_result(None))
        if not self.lock.acquire(False):
            await asyncio.wait([woken], timeout=timeout)
            self.lock.acquire(False)
        self.wake_loop = None


class _Watch(_Bell):
    """Wait for some of many futures.

    Each tells the watch once when it is done; nothing is looked at again and again, so n futures
    cost O(n). `finished` has them in the order in which they ended.
    """

    def __init__(self, futures: Collection[Any], enough: int = 1, until: Callable[[Any], bool] | None = None,
                 then: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.finished: collections.deque[Any] = collections.deque()
        self.until = until                  # a predicate: one such future is enough
        self.missing = itertools.count(enough - 1, -1)
        self.then = then                    # called once, by the future that is enough
        self.futures = futures
        tell = self.tell                    # one for all: each that is made anew is kept by its future
        for future in futures:
            _when_done(future, tell)

    def tell(self, future: Any) -> None:
        self.finished.append(future)
        # Counted and compared in one step: two threads may be here at once.
        if next(self.missing) <= 0 or (self.until is not None and self.until(future)):
            self.wake()

    def wake(self) -> None:
        if super().wake() and self.then is not None:
            self.then()

    def leave(self) -> None:
        """Be forgotten by the futures that are not done."""
        if len(self.finished) < len(self.futures):
            for future in self.futures:
                if not future.done():
                    _forget_when_done(future, self.tell)


class _Untracked:
    """What a wait tells of its futures where nobody wants to see how far it is."""

    def add(self, future: Any, count: int = 1) -> None:
        """Be told of one more future that is waited for, and how many calls it stands for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        return None


class _Tracked(_Untracked):
    """Move a bar as futures end; the end of the `with` ends the bar, if it is ours."""

    def __init__(self, progress: Any, total: int | None, futures: Iterable[Any]) -> None:
        self.futures = futures              # looked at when it ends: who has not ended then forgets us
        self.counts: dict[Any, int] = {}    # by future, where it stands for more than one call
        self.is_ours = True
        if progress is True:
            self.bar = ProgressBar(total=total)
        elif isinstance(progress, dict):
            for name, value in progress.items():
                _parse(name, value, _BAR_OPTIONS)
            self.bar = ProgressBar(**{"total": total, **progress})
        elif isinstance(progress, ProgressBar):
            self.bar, self.is_ours = progress, False
            if progress.total is None and total is not None:
                progress.set_total(total)
        elif callable(progress):
            self.bar = ProgressBar(total=total, disable=True)
            self.bar._screen = _Told(progress)
        else:
            raise TypeError(f"progress must be true or false, a dict of a ProgressBar's options, a ProgressBar or a "
                            f"function of (done, total, elapsed), not {progress!r}")

    def add(self, future: Any, count: int = 1) -> None:
        if count > 1:
            self.counts[future] = count
        _when_done(future, self.tell)

    def tell(self, future: Any) -> None:
        kind, value = future._outcome if isinstance(future, BaseFuture) else _outcome_of(future)
        count = self.counts.pop(future, 1)
        self.bar._count(count, len(value.errors) if isinstance(value, _Outcomes) else count * (kind is _ERROR))

    def __exit__(self, *exc_info: Any) -> None:
        for future in self.futures:
            if _is_future(future) and not future.done():
                _forget_when_done(future, self.tell)
        if self.is_ours:
            self.bar.__exit__(*exc_info)


_UNTRACKED = _Untracked()


def _is_untracked(progress: Any) -> bool:
    return progress is None or progress is False


def _tracked(progress: Any, total: int | None, futures: Iterable[Any]) -> _Untracked:
    return _UNTRACKED if _is_untracked(progress) else _Tracked(progress, total, futures)


def _tracking(steps: Generator[Any, None, Any], progress: Any, futures: Collection[Any]) -> Generator[Any, None, Any]:
    """Return the steps of waiting for the futures, with a bar that moves meanwhile if one is asked for."""
    tracked = _tracked(progress, len(futures), futures)
    return steps if tracked is _UNTRACKED else _tracked_steps(steps, tracked, futures)


def _tracked_steps(steps: Generator[Any, None, Any], tracked: _Untracked,
                   futures: Iterable[Any]) -> Generator[Any, None, Any]:
    with tracked:
        for future in futures:
            tracked.add(future)
        return (yield from steps)


# What is to be done while waiting is written once, as generators that yield a _Watch to sleep on;
# one driver blocks, the other awaits.

def _run(steps: Generator[_Watch, None, Any], timeout: float | None) -> Any:
    deadline = _deadline(timeout)
    try:
        while True:
            next(steps).sleep(_left(deadline))
    except StopIteration as end:
        return end.value
    finally:
        steps.close()


async def _run_async(steps: Generator[_Watch, None, Any], timeout: float | None) -> Any:
    deadline = _deadline(timeout)
    try:
        while True:
            await next(steps).sleep_async(_left(deadline))
    except StopIteration as end:
        return end.value
    finally:
        steps.close()


def _several(fs: Iterable[Any]) -> Iterable[Any]:
    if _is_collection(fs):
        return fs
    raise TypeError(f"a collection of futures is needed, not {fs!r}")


def _check_waitable(future: Any) -> None:
    if not _is_future(future):
        raise TypeError(f"a future is needed, not {type(future).__name__}")
    if _is_foreign_future(future) and not future.done() and _in_own_loop(future):
        raise RuntimeError("waiting here would stall the event loop that this future needs: "
                           "await it, or use async_wait or async_gather")


def _settled_of(futures: set[Any], return_when: str) -> Generator[_Watch, None, Any]:
    """Wait for enough of the futures; return (done, not done)."""
    done = {future for future in futures if future.done()}
    first, until = return_when == FIRST_COMPLETED, _failed if return_when == FIRST_EXCEPTION else None
    if len(done) < len(futures) and not (done and (first or until is not None and any(map(until, done)))):
        pending = futures - done
        watch = _Watch(pending, 1 if first else len(pending), until)
        try:
            yield watch
        finally:
            watch.leave()
        done = {future for future in futures if future.done()}
    return concurrent.futures._base.DoneAndNotDoneFutures(done, futures - done)


if TYPE_CHECKING:
    F = TypeVar("F", bound=concurrent.futures.Future[Any])
    # No future: a dict is no collection of its keys.
    K = TypeVar("K", bound=str | bytes | float | tuple[Any, ...] | enum.Enum)
    _Progress: TypeAlias = bool | dict[str, Any] | ProgressBar | Callable[[int, int | None, float], object] | None
    _Future: TypeAlias = concurrent.futures.Future[T]

    class _DoneAndNotDone(tuple[set[T], set[T]]):       # a named tuple
        done: set[T]
        not_done: set[T]


@_overload
def wait(fs: Iterable[F], timeout: float | None = ..., return_when: ReturnWhen | str = ..., *,
         progress: _Progress = ...) -> _DoneAndNotDone[F]: ...
@_overload
def wait(fs: Iterable[Any], timeout: float | None = ..., return_when: ReturnWhen | str = ..., *,
         progress: _Progress = ...) -> _DoneAndNotDone[Any]: ...
def wait(fs: Iterable[Any], timeout: float | None = None, return_when: ReturnWhen | str = ALL_COMPLETED, *,
         progress: _Progress = None) -> Any:
    """Wait until the futures are done, or the first of them, or the first that raised.

    `fs` holds futures of any kind; `timeout` is in seconds, None: for ever. Returns the named tuple
    (done, not_done) of sets, as concurrent.futures.wait does; a timeout is not an error. In them a Ray
    ObjectRef is the future of `wrap_future`. RuntimeError for an asyncio future of the loop that runs
    in this thread, and instead of waiting for ever: see BaseFuture.result.

    progress: True for a ProgressBar, or a dict of its options, or one of yours, which is moved and not ended; or a
        function that is called with (done, total, elapsed seconds), ten times a second at most and at the end,
        from any thread, one at a time; what it raises is logged at DEBUG. None: nothing is shown.
    """
    fs = set(_wrap_refs(_several(fs)))
    return_when = ReturnWhen(return_when)
    for future in fs:
        _check_waitable(future)
    if timeout is None and return_when == ALL_COMPLETED and _here.is_ours:
        _refuse_to_wait_for_own(fs)
    return _run(_tracking(_settled_of(fs, return_when), progress, fs), timeout)


@_overload
async def async_wait(fs: Iterable[F], timeout: float | None = ..., return_when: ReturnWhen | str = ..., *,
                     progress: _Progress = ...) -> _DoneAndNotDone[F]: ...
@_overload
async def async_wait(fs: Iterable[Any], timeout: float | None = ..., return_when: ReturnWhen | str = ..., *,
                     progress: _Progress = ...) -> _DoneAndNotDone[Any]: ...
async def async_wait(fs: Iterable[Any], timeout: float | None = None, return_when: ReturnWhen | str = ALL_COMPLETED, *,
                     progress: _Progress = None) -> Any:
    """Do what `wait` does without blocking the event loop; `fs` may hold coroutines too.

    A coroutine is run as a task, and the task is in the sets.
    """
    fs = set(map(_as_future, _wrap_refs(_several(fs))))
    for future in fs:
        if not _is_future(future):
            raise TypeError(f"a future or coroutine is needed, not {type(future).__name__}")
    return await _run_async(_tracking(_settled_of(fs, ReturnWhen(return_when)), progress, fs), timeout)


def _as_future(x: Any) -> Any:
    """Make a task of a coroutine; return anything else as it is."""
    if isinstance(x, collections.abc.Coroutine):
        import asyncio
        return asyncio.ensure_future(x)
    return x


def _as_they_finish(futures: Iterable[Any]) -> Iterator[Any]:
    """Yield the futures as they finish, and a _Watch whenever there is none to yield."""
    pending = []
    for future in futures:
        if future.done():
            yield future
        else:
            pending.append(future)
    watch = _Watch(pending)
    try:
        for _ in pending:
            while not watch.finished:
                yield watch
            yield watch.finished.popleft()
    finally:
        watch.leave()


def _left_of(timeout: float | None, deadline: float | None) -> float | None:
    """Return the seconds that are left to sleep; TimeoutError if there are none."""
    left = _left(deadline)
    if left == 0:
        raise TimeoutError(f"not everything has ended within {timeout:g} seconds")
    return left


def _finished(steps: Iterable[Any], timeout: float | None, deadline: float | None) -> Iterator[Any]:
    """Yield the steps that are no _Watch, and sleep on those that are one."""
    for step in steps:
        if isinstance(step, _Watch):
            step.sleep(_left_of(timeout, deadline))
        else:
            yield step


async def _finished_async(steps: Generator[Any, None, Any], timeout: float | None,
                          deadline: float | None) -> AsyncIterator[Any]:
    try:
        for step in steps:
            if isinstance(step, _Watch):
                await step.sleep_async(_left_of(timeout, deadline))
            else:
                yield step
    finally:
        steps.close()


@_overload
def as_completed(fs: Iterable[F], timeout: float | None = ...) -> Iterator[F]: ...
@_overload
def as_completed(fs: Iterable[Any], timeout: float | None = ...) -> Iterator[Any]: ...
def as_completed(fs: Iterable[Any], timeout: float | None = None) -> Iterator[Any]:
    """Yield the futures as they finish, each once, done ones first.

    TimeoutError when something is still missing `timeout` seconds after the call (None: never).
    """
    fs = dict.fromkeys(_wrap_refs(_several(fs)))
    for future in fs:
        _check_waitable(future)
    return _finished(_as_they_finish(fs), timeout, _deadline(timeout))


class _Gathering:
    """What was given to `gather`: a dict, a collection or several arguments, with futures in it."""

    nested: Any

    def __init__(self, given: Any, return_exceptions: bool, recurse: bool) -> None:
        if len(given) == 1 and _is_collection(given[0]):
            given = given[0]
        self.keys: list[Any] | None = list(given) if isinstance(given, dict) else None
        self.values = _wrap_refs(given.values() if isinstance(given, dict) else given)
        self.return_exceptions = return_exceptions
        self.recurse = recurse

    def find(self) -> Self:
        """Find the futures; to be called when coroutines have become tasks."""
        self.nested = _Nested(self.values) if self.recurse else None
        self.futures = self.nested.futures if self.recurse else list(dict.fromkeys(filter(_is_future, self.values)))
        for future in self.futures:
            _ask_for(future)
        return self

    def value_of(self, future: Any) -> Any:
        """Return the future's result, or raise (or return) what it ended with."""
        kind, value = _outcome_of(future)
        if kind is _RESULT:
            return value
        error = concurrent.futures.CancelledError() if kind is _CANCELLED else value
        if self.return_exceptions:
            return error
        try:
            raise error
        finally:
            del error, value, future        # no cycle through the traceback

    def collect(self, timeout: float | None) -> Generator[_Watch, None, Any]:
        """Wait for everything, or the first failure; return the results in the shape that was given."""
        pending = [future for future in self.futures if not future.done()]
        if pending:
            if not self.return_exceptions:
                self.raise_first(future for future in self.futures if future.done())
            watch = _Watch(pending, len(pending), None if self.return_exceptions else _has_no_result)
            try:
                yield watch
            finally:
                watch.leave()
            if not self.return_exceptions:
                self.raise_first(list(watch.finished))
            missing = sum(not future.done() for future in pending)
            if missing:
                raise TimeoutError(f"{missing} of {len(self.futures)} calls have not ended within {timeout:g} seconds")
        values = self.results_there()
        if values is None:
            values = self.nested.rebuilt(self.value_of) if self.recurse else \
                [self.value_of(x) if _is_future(x) else x for x in self.values]
        return self.shaped(values)

    def results_there(self) -> list[Any] | None:
        """Return the results if all are futures of ours that have one, else None: ten times quicker than one by one."""
        values = []
        for x in () if self.recurse else self.values:
            if type(x) is not BaseFuture:
                return None
            outcome = x.__dict__.get("_gate")
            if type(outcome) is not tuple or outcome[0] is not _RESULT:
                return None
            values.append(outcome[1])
        return values or None

    def shaped(self, values: list[Any]) -> list[Any] | dict[Any, Any]:
        return values if self.keys is None else dict(zip(self.keys, values))

    def raise_first(self, done: Iterable[Any]) -> None:
        for future in done:
            if _has_no_result(future):
                self.value_of(future)

    def pairs(self) -> Generator[Any, None, None]:
        """Yield (index or key, value) as the futures finish, plain values first, and what to wait for."""
        places: dict[Any, list[Any]] = {}
        for key, x in zip(itertools.count() if self.keys is None else self.keys, self.values):
            if _is_future(x):
                places.setdefault(x, []).append(key)
            else:
                yield key, x
        for step in _as_they_finish(list(places)):
            if isinstance(step, _Watch):
                yield step
            else:
                value = self.value_of(step)
                for key in places.pop(step):
                    yield key, value


def _is_collection(x: object) -> bool:
    is_text = isinstance(x, (str, bytes, bytearray))
    return isinstance(x, collections.abc.Iterable) and not is_text and not _is_future(x)


@_overload
def gather(fs: Mapping[K, _Future[T]], /, *, return_exceptions: Literal[False] = ..., iter: Literal[False] = ...,
           timeout: float | None = ..., progress: _Progress = ..., recurse: bool = ...) -> dict[K, T]: ...
@_overload
def gather(fs: Mapping[Any, Any], /, *, return_exceptions: bool = ..., iter: bool = ..., timeout: float | None = ...,
           progress: _Progress = ..., recurse: bool = ...) -> Any: ...
@_overload
def gather(fs: Iterable[_Future[T]], /, *, return_exceptions: Literal[False] = ..., iter: Literal[False] = ...,
           timeout: float | None = ..., progress: _Progress = ..., recurse: bool = ...) -> list[T]: ...
@_overload
def gather(fs: Iterable[_Future[T]], /, *, return_exceptions: bool, iter: Literal[False] = ...,
           timeout: float | None = ..., progress: _Progress = ..., recurse: bool = ...) -> list[T | BaseException]: ...
@_overload
def gather(fs: Iterable[_Future[T]], /, *, return_exceptions: Literal[False] = ..., iter: Literal[True],
           timeout: float | None = ..., progress: _Progress = ..., recurse: bool = ...) -> Iterator[tuple[int, T]]: ...
@_overload
def gather(*fs: _Future[T], return_exceptions: Literal[False] = ..., iter: Literal[False] = ...,
           timeout: float | None = ..., progress: _Progress = ..., recurse: bool = ...) -> list[T]: ...
@_overload
def gather(*fs: Any, return_exceptions: bool = ..., iter: bool = ..., timeout: float | None = ...,
           progress: _Progress = ..., recurse: bool = ...) -> Any: ...
def gather(*fs: Any, return_exceptions: bool = False, iter: bool = False, timeout: float | None = None,
           progress: _Progress = None, recurse: bool = False) -> Any:
    """Wait for the results: of several futures, or of one collection, dict or generator of them.

    Returns a list in the order given, for a dict a dict; what is no future is its own result. With
    `recurse` futures inside nested lists, tuples, sets and dicts count too, and the shape is kept. The
    first failure is raised as soon as it happens, unless `return_exceptions` puts exceptions in the
    results' places. `iter=True` returns an iterator of (index or key, result) in the order in which
    they finish, which raises at the item that failed. TimeoutError `timeout` seconds after the call
    (None: never); RuntimeError for an asyncio future of the loop that runs in this thread. `progress` is
    that of `wait`.
    """
    gathering = _Gathering(fs, return_exceptions, recurse)
    values = None if iter or not _is_untracked(progress) else gathering.results_there()
    if values is not None:
        return gathering.shaped(values)
    for future in gathering.find().futures:
        _check_waitable(future)
    if timeout is None and not iter and _here.is_ours:
        _refuse_to_wait_for_own(gathering.futures)
    steps = _tracking(gathering.pairs() if iter else gathering.collect(timeout), progress, gathering.futures)
    return _finished(steps, timeout, _deadline(timeout)) if iter else _run(steps, timeout)


@_overload
def async_gather(fs: Mapping[Any, Any], /, *, return_exceptions: bool = ..., iter: bool = ...,
                 timeout: float | None = ..., progress: _Progress = ..., recurse: bool = ...) -> Any: ...
@_overload
def async_gather(fs: Iterable[Awaitable[T]], /, *, return_exceptions: Literal[False] = ..., iter: Literal[False] = ...,
                 timeout: float | None = ..., progress: _Progress = ...,
                 recurse: bool = ...) -> Coroutine[Any, Any, list[T]]: ...
@_overload
def async_gather(fs: Iterable[Awaitable[T]], /, *, return_exceptions: bool, iter: Literal[False] = ...,
                 timeout: float | None = ..., progress: _Progress = ...,
                 recurse: bool = ...) -> Coroutine[Any, Any, list[T | BaseException]]: ...
@_overload
def async_gather(fs: Iterable[Awaitable[T]], /, *, return_exceptions: Literal[False] = ..., iter: Literal[True],
                 timeout: float | None = ..., progress: _Progress = ...,
                 recurse: bool = ...) -> AsyncIterator[tuple[int, T]]: ...
@_overload
def async_gather(*fs: Awaitable[T], return_exceptions: Literal[False] = ..., iter: Literal[False] = ...,
                 timeout: float | None = ..., progress: _Progress = ...,
                 recurse: bool = ...) -> Coroutine[Any, Any, list[T]]: ...
@_overload
def async_gather(*fs: Any, return_exceptions: bool = ..., iter: bool = ..., timeout: float | None = ...,
                 progress: _Progress = ..., recurse: bool = ...) -> Any: ...
def async_gather(*fs: Any, return_exceptions: bool = False, iter: bool = False, timeout: float | None = None,
                 progress: _Progress = None, recurse: bool = False) -> Any:
    """Do what `gather` does without blocking the event loop: to be awaited, or with `iter` for `async for`.

    Takes coroutines too, and runs them as tasks; when it is cancelled, or the iterator closed, so are these.
    """
    gathering = _Gathering(fs, return_exceptions, recurse)
    given, gathering.values = gathering.values, list(map(_as_future, gathering.values))
    tasks = [task for task, value in zip(gathering.values, given) if task is not value]
    gathering.find()
    steps = _tracking(gathering.pairs() if iter else gathering.collect(timeout), progress, gathering.futures)
    if tasks:
        steps = _cancelling(steps, tasks)
        next(steps)
    return _finished_async(steps, timeout, _deadline(timeout)) if iter else _run_async(steps, timeout)


def _cancelling(steps: Generator[Any, None, Any], tasks: Iterable[asyncio.Task[Any]]) -> Generator[Any, None, Any]:
    """Yield once, then the steps of waiting; if they are closed before their end, the tasks are cancelled."""
    try:
        yield
        return (yield from steps)
    except GeneratorExit:
        for task in tasks:
            task.cancel()
        raise


# === Futures inside containers ===

_PLAIN = frozenset([int, float, complex, bool, str, bytes, bytearray, type(None), type,
                    types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial])
_CONTAINERS = frozenset([list, tuple, set, frozenset, dict])


def _is_container_type(kind: type) -> bool:
    return kind in _CONTAINERS or (issubclass(kind, tuple) and hasattr(kind, "_fields"))


def _is_future_type(kind: type) -> bool:
    return issubclass(kind, concurrent.futures.Future) or _is_ref(kind) \
        or getattr(kind, "_asyncio_future_blocking", None) is not None


def _is_looked_into(kind: type) -> bool:
    return _is_container_type(kind) or _is_future_type(kind)


def _elements(container: Any) -> Iterable[Any]:
    return container.values() if type(container) is dict else container


def _may_hold_futures(args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Tell quickly that there is nothing to look into."""
    for x in args:
        if type(x) not in _PLAIN and _is_looked_into(type(x)):
            return True
    return bool(kwargs) and any(map(_is_looked_into, {*map(type, kwargs.values())} - _PLAIN))


class _Nested:
    """The futures in a container and the containers in it, to any depth, each looked at once.

    Exact lists, tuples, sets, frozensets, dicts (their values) and named tuples are looked into. Of
    what holds no future nothing is kept and nothing is copied.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        self.futures: list[Any] = []        # each once; an ObjectRef as a future of ours
        self._found: dict[int, Any] = {}    # by id: what was found where it stands
        self._holders: dict[int, Any] = {}  # id of what holds a future somewhere -> itself
        homes: dict[int, list[Any]] = {}    # id of a future or container -> the containers it stands in
        seen, todo = {id(root)}, [root]
        while todo:
            container = todo.pop()
            elements = _elements(container)
            kinds = {kind: _is_future_type(kind) for kind in set(map(type, elements)) - _PLAIN
                     if _is_looked_into(kind)}
            for x in elements if kinds else ():
                if type(x) in kinds:
                    homes.setdefault(id(x), []).append(container)
                    if id(x) not in seen:
                        seen.add(id(x))
                        if kinds[type(x)]:
                            self._found[id(x)] = x
                        else:
                            todo.append(x)
        self.futures = _wrap_refs(self._found.values())
        todo = list(self._found.values())
        while todo:
            for home in homes.get(id(todo.pop()), ()):
                if id(home) not in self._holders:
                    self._holders[id(home)] = home
                    todo.append(home)

    def rebuilt(self, value_of: Callable[[Any], Any]) -> Any:
        """Return the root with `value_of(future)` in each future's place; shared parts stay shared."""
        new = {number: value_of(future) for number, future in zip(self._found, self.futures)}
        growing = [x for x in self._holders.values() if type(x) in (list, dict)]
        for container in growing:           # empty first: a cycle always leads through one of these
            new[id(container)] = type(container)()
        todo = list(self._holders.values())
        while todo:
            container = todo[-1]
            missing = () if id(container) in new else \
                [x for x in container if id(x) in self._holders and id(x) not in new]
            if missing:
                todo.extend(missing)
                continue
            todo.pop()
            if id(container) not in new:
                make = getattr(type(container), "_make", type(container))
                new[id(container)] = make(new.get(id(x), x) for x in container)
        for container in growing:
            if type(container) is dict:
                new[id(container)].update((key, new.get(id(x), x)) for key, x in container.items())
            else:
                new[id(container)].extend(new.get(id(x), x) for x in container)
        return new.get(id(self.root), self.root)


# === Retries ===

_LEFT_OUT: Any = object()
_RUN = object()                 # what a retry loop yields to have the call made once


class RetryValidationError(RuntimeError):
    """No attempt had a result that satisfied `retry_until`.

    `attempts` is how many were made, `all_results` what those returned that did not raise, `validation_errors`
    what was wrong with each of these, in words, `method_name` the method.
    """

    def __init__(self, attempts: int, all_results: list[Any], validation_errors: list[str], method_name: str) -> None:
        super().__init__(f"none of {attempts} attempts of {method_name}() had a valid result: "
                         f"{', '.join(validation_errors[-1:])}")
        self.attempts, self.all_results = attempts, all_results
        self.validation_errors, self.method_name = validation_errors, method_name

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.attempts, self.all_results, self.validation_errors, self.method_name)


class RetryConfig:             # noqa: PLW1641
    """The options of retries in one object: `options(retry_config=RetryConfig(num_retries=3))`.

    num_retries: further attempts after the first.
    retry_on: what is tried again: exception classes, or callables, one or a list. A callable gets the exception
        first, and by name what it accepts of `attempt`, `elapsed_time` (seconds), `method_name`, `worker_class` (its
        name), `args`, `kwargs`. It returns whether to try again, or the least number of seconds to wait before
        that (0: at once). All callables are asked until one returns a number, even if a class matches already.
    retry_algorithm: how the wait grows with the attempts k = 1, 2, ...: "exponential" retry_wait * 2**(k-1), "linear"
        retry_wait * k, "fibonacci" retry_wait * (1, 1, 2, 3, 5, ...), "fixed" retry_wait.
    retry_wait: seconds.
    retry_max_wait: the longest wait in seconds, before jitter. It does not cap a wait that an exception or a callable
        asks for; that one is extended by a tenth at most. An exception asks by its `retry_after` (seconds, a timedelta,
        or text as in the header Retry-After), or by retry-after-ms or Retry-After in the `headers` of its `response`,
        or in its own `headers`.
    retry_jitter: the share of the wait that is left to chance, from 0 to 1: at 1 it is anything from 0 to the wait.
    retry_until: validators of the result, called likewise with the result; all have to return true.

    What is left out is configured (`global_config`); each but `retry_max_wait` may be a dict by method name, with
    "*" for the others. An option that is given beside the object wins. Raises ValueError for impossible values.
    """

    # It has those that were given.
    num_retries: int | dict[str, int]
    retry_on: list[Any] | dict[str, list[Any]]
    retry_algorithm: RetryAlgorithm | dict[str, RetryAlgorithm]
    retry_wait: float | dict[str, float]
    retry_max_wait: float
    retry_jitter: float | dict[str, float]
    retry_until: list[Any] | dict[str, list[Any] | None] | None

    def __init__(self, num_retries: int | dict[str, int] = _LEFT_OUT,
                 retry_on: type[BaseException] | Callable[..., Any]
                 | Sequence[type[BaseException] | Callable[..., Any]] | dict[str, Any] = _LEFT_OUT,
                 retry_algorithm: RetryAlgorithm | str | dict[str, Any] = _LEFT_OUT,
                 retry_wait: float | dict[str, float] | dict[str, int] = _LEFT_OUT,
                 retry_max_wait: float = _LEFT_OUT,
                 retry_jitter: float | dict[str, float] | dict[str, int] = _LEFT_OUT,
                 retry_until: Callable[..., Any] | Sequence[Callable[..., Any]] | dict[str, Any] | None = _LEFT_OUT,
                 ) -> None:
        given = {name: value for name, value in locals().items() if name in _RETRY_OPTIONS and value is not _LEFT_OUT}
        self.__dict__.update({name: _parse(name, value) for name, value in given.items()})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name!r} cannot be set: make another RetryConfig")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"RetryConfig({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def _read_config(value: object) -> RetryConfig | None:
    if value is not None and not isinstance(value, RetryConfig):
        raise ValueError
    return value


def _accepting(fn: Callable[..., Any], first: str, others: Collection[str]) -> Callable[[dict[str, Any]], Any]:
    """Return ask(values): `fn` called with `values[first]` first, and by name with what it accepts of the others."""
    import inspect
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):         # a builtin that does not tell
        return lambda values: fn(values[first])
    bound: Collection[str] = fn.keywords if isinstance(fn, functools.partial) else ()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = [parameter.name for parameter in parameters
             if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    in_front = next((parameter for parameter in parameters if parameter.name not in bound and parameter.kind in (
        parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.VAR_POSITIONAL)), None)
    by_name = in_front is None or first in names and in_front.name != first and (
        in_front.name in others and in_front.kind is not in_front.POSITIONAL_ONLY)
    wanted = {name for name in (first, *others) if takes_all or name in names} - set(bound)
    if by_name:
        return lambda values: fn(**{name: values[name] for name in wanted})
    wanted -= {first, in_front.name}  # type: ignore[union-attr]
    return lambda values: fn(values[first], **{name: values[name] for name in wanted})


def _several_of(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _read_filters(value: Any) -> list[Any]:
    """Read `retry_on`: exception classes and callables."""
    filters = _several_of(value)
    for each in filters:
        if not (issubclass(each, BaseException) if isinstance(each, type) else callable(each)):
            raise _Reason(f"{each!r} is neither a class of exceptions nor a callable")
        if _is_async(each):
            raise _Reason(f"{each!r} is a coroutine function, and would not be awaited")
    return filters


def _read_validators(value: Any) -> list[Any] | None:
    """Read `retry_until`: None, or callables."""
    if value is None:
        return None
    validators = _several_of(value)
    for each in validators:
        if not callable(each):
            raise _Reason(f"{each!r} is not callable")
        if _is_async(each):
            raise _Reason(f"{each!r} is a coroutine function, and would not be awaited")
    return validators


def _own_error(error: Any) -> Any:
    """Mark an error as misuse of this module: to try again would be of no use."""
    error._is_misuse = True
    return error


def _is_misuse(error: BaseException) -> bool:
    pickle = sys.modules.get("pickle")
    return getattr(error, "_is_misuse", False) or pickle is not None and isinstance(error, pickle.PicklingError)


def _seconds_in(value: Any) -> float | None:
    """Return the seconds of a wait that is asked for: a number, a timedelta, a text of either form of Retry-After.

    None for what cannot be read, is negative or lies in the past. The forms: RFC 9110, section 10.2.3.
    """
    try:
        if isinstance(value, bytes):
            value = value.decode("latin-1")
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                from email.utils import mktime_tz, parsedate_tz
                date: Any = parsedate_tz(value)
                value = mktime_tz((*date[:9], date[9] or 0)) - time.time()
        elif hasattr(value, "total_seconds"):
            value = value.total_seconds()
        return float(value) if _is_number(value) and 0 <= value <= 1e15 else None
    except Exception:               # a date that is none; what is no number and says that it is
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wait_asked_for(error: BaseException) -> float | None:
    """Return the seconds that an exception asks to wait, as those of HTTP clients do, or None.

    In its `retry_after`, else in the headers of its `response`, or its own. A response may be false in itself.
    """
    try:
        wait = _seconds_in(getattr(error, "retry_after", None))
        if wait is not None:
            return wait
        response = getattr(error, "response", None)
        headers = getattr(error if response is None else response, "headers", None)
        if headers is None:
            return None
        found = {str(name).lower(): value for name, value in headers.items()}
        milliseconds = _seconds_in(found.get("retry-after-ms"))
        return _seconds_in(found.get("retry-after")) if milliseconds is None else milliseconds / 1000
    except Exception:               # of the user's attributes
        return None


@functools.lru_cache(None)
def _dice() -> Any:
    # The system's: workers that are forked would all throw the same numbers, and come again together.
    import random
    return random.SystemRandom()


# The attempt that this code is part of. An exception that a call within it has given up on has it as a mark.
_attempt_here: contextvars.ContextVar[Any] = contextvars.ContextVar("concurry_attempt", default=None)


class _Retries:
    """How often, after what, and after how long the calls of a method are made again."""

    def __init__(self, num_retries: int, retry_on: list[Any], retry_algorithm: RetryAlgorithm, retry_wait: float,
                 retry_max_wait: float, retry_jitter: float, retry_until: list[Any] | None) -> None:
        self.most = num_retries + 1
        self.classes = tuple(each for each in retry_on if isinstance(each, type))
        names = "attempt", "elapsed_time", "method_name", "worker_class", "args", "kwargs"
        self.filters = [_accepting(each, "exception", names) for each in retry_on if not isinstance(each, type)]
        self.validators = [(each, _accepting(each, "result", names)) for each in retry_until or ()]
        self.factor, self.wait = _BACKOFFS[retry_algorithm], retry_wait
        self.max_wait, self.jitter = retry_max_wait, retry_jitter

    def attempts(self, method: str, worker_class: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None,
                 clock: Callable[[], float] = time.monotonic) -> Generator[Any, Any, tuple[str, Any]]:
        """Make a call until it is right: a loop that others drive.

        It yields _RUN, and is sent what the call came to, (kind, value); or seconds to wait, and is sent whether that
        was cut short. It returns what the call came to in the end.
        """
        results: list[Any]
        invalid: list[Any]
        began, results, invalid, earlier, around = clock(), [], [], None, _attempt_here.get()
        attempt = 0
        while True:
            attempt += 1
            here = object()
            _attempt_here.set(here)
            kind, value = yield _RUN
            _attempt_here.set(around)
            if kind is _RESULT and not self.validators:
                return kind, value
            values = {"attempt": attempt, "elapsed_time": clock() - began, "method_name": method,
                      "worker_class": worker_class, "args": args, "kwargs": kwargs or {}}
            again, least, reason = self._judge(kind, value, values, here)
            if kind is _RESULT:
                if not again:
                    return kind, value
                results.append(value)
                invalid.append(reason)
                kind, value = _ERROR, RetryValidationError(attempt, list(results), list(invalid), method)
            if earlier is not None:
                _remember(value, earlier)
            if not again or attempt >= self.most:
                break
            if type(value) is not RetryValidationError:     # else the next one says the same, and more
                earlier = value
            wait = self.delay(attempt, least)
            logger.debug("%s.%s() failed, attempt %d of %d, and is made again in %.3f s: %s",
                         worker_class, method, attempt, self.most, wait, reason)
            if (yield wait):
                break
        is_given_up = around is not None and (again and self.most > 1 or vars(value).get("_given_up_in") is here)
        if is_given_up:
            _set(value, "_given_up_in", around)
        else:
            vars(value).pop("_given_up_in", None)
        if attempt > 1:
            note = f"concurry made {attempt} attempts of {method}() in {clock() - began:.3g} s"
            _set(value, "__notes__", [*vars(value).get("__notes__", ()), note])
        return kind, value

    def _judge(self, kind: str, value: Any, values: dict[str, Any],
               here: object) -> tuple[bool, float | None, str | None]:
        """Tell whether an outcome calls for another attempt, how many seconds it asks for, or None, and why."""
        try:
            if kind is _RESULT:
                reason = self._what_is_wrong(value, values)
                return reason is not None, None, reason
            return (*self._wants_again(value, values, here), _shown(value))
        except KeyboardInterrupt:
            raise
        except BaseException:               # of the user's filters, or of the exception itself
            logger.exception("%s() is not tried again, for to find out whether to raised this", values["method_name"])
            return False, None, None

    def _wants_again(self, error: BaseException, values: dict[str, Any], here: object) -> tuple[bool, float | None]:
        asyncio = sys.modules.get("asyncio")
        never = (KeyboardInterrupt, SystemExit, GeneratorExit, concurrent.futures.CancelledError,
                 *((asyncio.CancelledError,) if asyncio else ()))
        if isinstance(error, never):
            named = tuple(each for each in self.classes if issubclass(each, never))
            call = _calling.get()
            is_cancelled = isinstance(call, _Call) and call.future.done()
            return isinstance(error, named) and not is_cancelled, None
        if _is_misuse(error) or vars(error).get("_given_up_in") is here:
            return False, None
        is_wanted = isinstance(error, self.classes)
        for ask in self.filters:
            answer = ask({"exception": error, **values})
            if _is_number(answer):
                return True, _seconds_in(answer)
            is_wanted = is_wanted or bool(answer)
        return is_wanted, _wait_asked_for(error) if is_wanted else None

    def _what_is_wrong(self, result: Any, values: dict[str, Any]) -> str | None:
        """Return what a validator has against a result, in words; None if nothing is wrong."""
        for validator, ask in self.validators:
            name = getattr(validator, "__name__", None) or _shown(validator)
            try:
                if not ask({"result": result, **values}):
                    return f"{name} says no to {_shown(result)}"
            except Exception as error:
                return f"{name} raised {type(error).__name__}: {error}"
        return None

    def delay(self, attempt: int, least: float | None = None) -> Any:
        """Return the seconds to wait after an attempt, the first is 1; `least` is what was asked for, if it was."""
        if least is not None:
            return least + _dice().uniform(0, least * 0.1)
        # Full Jitter: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
        wait = min(self.max_wait, self.wait * self.factor(attempt))
        return wait * (1 - self.jitter) + _dice().uniform(0, wait) * self.jitter


def _shown(value: object) -> str:
    """Return a short repr, whatever the value does."""
    import reprlib
    try:
        return reprlib.repr(value)
    except BaseException:
        return f"<{type(value).__name__} that cannot be shown>"


def _nothing() -> None:
    """Return nothing, as a weak reference does to what is gone."""


def _fibonacci(n: int) -> float:
    a, b = 1.0, 1.0
    for _ in range(min(n, 1000) - 1):
        a, b = b, a + b
    return a


_BACKOFFS: dict[RetryAlgorithm, Callable[[int], float]] = {
    RetryAlgorithm.Exponential: lambda attempt: 2.0 ** min(attempt - 1, 1000),
    RetryAlgorithm.Linear: float,
    RetryAlgorithm.Fibonacci: _fibonacci,
    RetryAlgorithm.Fixed: lambda attempt: 1.0,
}


def _remember(error: BaseException, earlier: BaseException) -> None:
    """Have the exception of an earlier attempt reachable from a later one, as its context."""
    later, before = _with_contexts(error), _with_contexts(earlier)
    if not set(map(id, later)) & set(map(id, before)):      # else the same exception was raised again
        _set(later[-1], "__context__", earlier)


def _set(error: Any, name: str, value: object) -> None:
    """Set an attribute of an exception, though it may be frozen."""
    BaseException.__setattr__(error, name, value)


def _with_contexts(error: BaseException | None) -> list[BaseException]:
    """Return an exception and those before it, each once though they may be a circle."""
    found: list[BaseException]
    seen: set[int]
    found, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        found.append(error)
        error = error.__context__
    return found


class _Halt:
    """What cuts the waits of a worker short: once set, nothing is tried again."""

    def __init__(self, before_waiting: Callable[[], object] | None = None) -> None:
        self.is_set = False
        self.retried = 0            # how often somebody has waited for his next attempt
        self.bells: set[_Bell] = set()
        self.before_waiting = before_waiting

    def set(self) -> None:
        self.is_set = True
        for bell in list(self.bells):
            bell.wake()

    def pause(self, seconds: float) -> bool:
        """Sleep; return whether that was cut short."""
        bell = self._bell()
        try:
            deadline = time.monotonic() + seconds
            while not self.is_set and time.monotonic() < deadline:
                bell.sleep(deadline - time.monotonic())
        finally:
            self.bells.discard(bell)
        return self.is_set

    async def pause_async(self, seconds: float) -> bool:
        """Do the same without blocking the running loop."""
        bell = self._bell()
        try:
            if not self.is_set:
                await bell.sleep_async(seconds)
        finally:
            self.bells.discard(bell)
        return self.is_set

    def _bell(self) -> _Bell:
        self.retried += 1
        if self.before_waiting is not None:
            self.before_waiting()
        bell = _Bell()
        self.bells.add(bell)
        return bell


def _resumed(steps: Generator[Any, Any, tuple[str, Any]],
             outcome: tuple[str, Any]) -> Generator[Any, Any, tuple[str, Any]]:
    """Go on with a retry loop that has been sent nothing yet for its last _RUN."""
    try:
        step = steps.send(outcome)
        while True:
            step = steps.send((yield step))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def _drive(steps: Generator[Any, Any, tuple[str, Any]], run: Callable[[], tuple[str, Any]],
           halt: _Halt) -> tuple[str, Any]:
    """Drive a retry loop in this thread; `run()` makes the call."""
    try:
        step = next(steps)
        while True:
            step = steps.send(run() if step is _RUN else halt.pause(step))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def _drive_async(steps: Generator[Any, Any, tuple[str, Any]], run: Callable[[], Awaitable[tuple[str, Any]]],
                       halt: _Halt) -> tuple[str, Any]:
    """Drive a retry loop on an event loop; `run()` is awaited."""
    try:
        step = next(steps)
        while True:
            step = steps.send(await run() if step is _RUN else await halt.pause_async(step))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


# === Rate arithmetic ===
#
# Pure functions of (amount, now): nothing here waits or reads a clock. Times are whole
# nanoseconds of a clock that never runs back, windows too; with whole amounts all sums are exact
# for ever. Fractions are floats: what exceeds a capacity by their rounding alone is let through.
#
# An amount counts from when it was granted. What is given back was never used: afterwards
# everything is as if less had been asked for, except for what has been granted meanwhile.

_NEVER = math.inf               # a delay: until something is given back


class _Rate:
    """An amount per window. One of these is the state of one limit."""

    granted: float = 0              # all that was ever taken

    def __init__(self, capacity: float, window: int) -> None:
        self.capacity = capacity
        self.window = window                # nanoseconds
        self.slack = capacity * 1e-12

    def is_rounding(self, excess: float) -> bool:
        """Tell whether an amount beyond the capacity comes from the rounding of fractions alone."""
        return type(excess) is float and excess <= self.slack

    def delay(self, n: float, now: int) -> float:  # type: ignore[empty-body]
        """Return 0 if n more may be used now, else after how many nanoseconds that may be."""

    def take(self, n: float, now: int) -> Any:
        """Count n as used, be there room or not; return what `give` and `close` know this grant by.

        To be called after `delay`, with the same `now`.
        """

    def give(self, grant: Any, n: float, now: int) -> None:
        """Take n of a grant back that were not used after all."""

    def close(self, grant: Any) -> None:
        """Be told that nothing of this grant will be given back any more."""

    def used(self, now: int) -> float:  # type: ignore[empty-body]
        """Return how much counts as used."""

    def recount(self) -> None:
        """Make the sums anew: an exception may have come between two of them."""

    def hold(self, n: float) -> None:
        """Count n that are held again after `recount`, where it is not known what is."""

    def room(self, now: int) -> float:
        """Return how much could be taken now."""
        return min(self.capacity, max(0, self.capacity - self.used(now)))


class _SlidingWindow(_Rate):
    """Remember every grant for one window; the sum of those never exceeds the capacity.

    Promise: at most the capacity in any window, wherever it begins; the burst is the capacity.
    Source: known as the sliding window log. Memory: one entry a grant of the last window.
    """

    def __init__(self, capacity: float, window: int) -> None:
        super().__init__(capacity, window)
        self.clear()

    def clear(self) -> None:
        self.log: list[list[float]] = []        # [sum of all amounts so far, time, amount], a grant each, in order
        self.first = 0                          # of those that still count
        self.total: float = 0                   # of those

    def forget(self, now: int) -> None:
        """Drop the grants that have left the window."""
        log, first, end = self.log, self.first, now - self.window
        if not log or log[first][1] > end:
            return
        total = self.total
        while first < len(log) and log[first][1] <= end:
            total -= log[first][2]
            first += 1
        self.first, self.total = first, total
        if first == len(log):
            self.clear()
        elif first > 64 and first * 2 > len(log):
            self.recount()

    def recount(self) -> None:
        """Give memory back, and sum up anew: what rounding has done to the sums does not pile up."""
        total: float
        self.log, self.first, total = self.log[self.first:], 0, 0
        for entry in self.log:
            total += entry[2]
            entry[0] = total
        self.total = math.fsum(entry[2] for entry in self.log) if type(total) is float else total

    def delay(self, n: float, now: int) -> float:
        self.forget(now)
        excess = self.total + n - self.capacity
        if excess <= 0 or self.is_rounding(excess):
            return 0
        log, first = self.log, self.first
        # The grant with whose end there is room. After a refund the sums are too large, and this
        # may be too early: then it is asked again.
        gone = log[first][0] - log[first][2]
        needed = gone + excess - (self.slack if type(excess) is float else 0)
        index = bisect.bisect_left(log, [needed], first, len(log) - 1)
        return log[index][1] + self.window - now

    def take(self, n: float, now: int) -> list[float]:
        log = self.log
        entry = [log[-1][0] + n if log else n, now, n]
        log.append(entry)
        self.total += n
        self.granted += n
        return entry

    def give(self, grant: list[float], n: float, now: int) -> None:
        self.forget(now)
        if grant[1] > now - self.window:
            grant[2] -= n
            self.total -= n

    def used(self, now: int) -> float:
        self.forget(now)
        return self.total


class _FixedWindow(_Rate):
    """Count in windows that follow each other from the first use on; each begins at zero.

    Promise: at most the capacity in each of these windows, so up to twice the capacity in a window
    that lies across the border of two. Source: folklore, as the fixed window counter.
    """

    def __init__(self, capacity: float, window: int) -> None:
        super().__init__(capacity, window)
        self.began: int | None              # None before the first use
        self.total: float
        self.began, self.total = None, 0

    def turn(self, now: int) -> None:
        if self.began is None:
            self.began = now
        elif now - self.began >= self.window:
            self.began += (now - self.began) // self.window * self.window
            self.total = 0

    def delay(self, n: float, now: int) -> float:
        self.turn(now)
        excess = self.total + n - self.capacity
        if excess <= 0 or self.is_rounding(excess):
            return 0
        return self.began + self.window - now  # type: ignore[operator]

    def take(self, n: float, now: int) -> int | None:
        self.total += n
        self.granted += n
        return self.began

    def give(self, grant: int | None, n: float, now: int) -> None:
        self.turn(now)
        if grant == self.began:
            self.total -= n

    def used(self, now: int) -> float:
        self.turn(now)
        return self.total


class _TokenBucket(_Rate):
    """Keep a debt that every grant adds to and that is paid off at the rate; it never exceeds the capacity.

    Promise: in a span of t windows at most (1 + t) times the capacity, so up to twice the capacity
    in one window; the burst is the capacity. Source: the token bucket of RFC 2215, section 3.6;
    the debt is what the bucket lacks of being full.

    The debt is a stack of parts, one a grant, and the newest is paid first: what lies above a part is the
    debt that there would be without this grant and all before it. So what is given back is taken
    off that grant's part and those below, as far as they go; the rest has been granted since. A grant whose
    part is used up joins the part below; when all grants of a part are closed it joins the one above.
    """

    def __init__(self, capacity: float, window: int) -> None:
        super().__init__(capacity, window)
        self.debt: float = 0            # in amounts times nanoseconds, for whole numbers to stay whole
        self.number = 0                 # of the latest grant
        # [its newest grant, debt, how many may give back]; below all an empty one
        self.parts: list[list[float]] = [[0, 0, 0]]
        self.paid_until = 0
        self.slack *= window

    def pay(self, now: int) -> None:
        paid = self.capacity * (now - self.paid_until)
        self.paid_until = now
        if paid >= self.debt:
            self.debt = 0
            self.parts = [[self.number, 0, 0]]
            return
        self.debt -= paid
        while len(self.parts) > 1:
            part = self.parts[-1]
            if part[1] > paid:
                part[1] -= paid
                return
            paid -= part[1]
            self.join_below(len(self.parts) - 1)

    def join_below(self, index: int) -> None:
        number, _, count = self.parts.pop(index)
        self.parts[index - 1][0] = number
        self.parts[index - 1][2] += count

    def excess(self, n: float) -> float:
        """Return how much of the debt is in the way of n more."""
        return self.debt + (n - self.capacity) * self.window

    def delay(self, n: float, now: int) -> float:
        self.pay(now)
        excess = self.excess(n)
        if excess <= 0 or self.is_rounding(excess):
            return 0
        return max(1, -int(-excess // self.capacity))

    def take(self, n: float, now: int) -> int:
        self.number += 1
        debt, top = n * self.window, self.parts[-1]
        if top[2] or len(self.parts) == 1:
            self.parts.append([self.number, debt, 1])
        else:                           # nobody will give back of what is on top
            top[:] = self.number, top[1] + debt, 1
        self.debt += debt
        self.granted += n
        return self.number

    def give(self, grant: int, n: float, now: int) -> None:
        self.pay(now)
        left, parts = n * self.window, self.parts
        index = bisect.bisect_left(parts, [grant])
        while left > 0 and index > 0:
            part = parts[index]
            back = min(left, part[1])
            part[1] -= back
            self.debt -= back
            left -= back
            if part[1] <= 0:
                self.join_below(index)
            index -= 1

    def recount(self) -> None:
        self.debt = sum(part[1] for part in self.parts)

    def close(self, grant: int) -> None:
        parts = self.parts
        index = bisect.bisect_left(parts, [grant])
        parts[index][2] -= 1
        if not parts[index][2] and 0 < index < len(parts) - 1:
            parts[index + 1][1] += parts.pop(index)[1]

    def used(self, now: int) -> float:
        self.pay(now)
        return self.debt / self.window


class _GCRA(_TokenBucket):
    """Do what the token bucket does, which is the same computed in time.

    The generic cell rate algorithm keeps when the debt will be paid off, its theoretical arrival
    time; with a tolerance of one window it grants exactly what the bucket grants. Promise and
    burst are the token bucket's. Source: ITU-T I.371; ATM Forum, Traffic Management 4.0.
    """


class _LeakyBucket(_TokenBucket):
    """Grant one after the other, at the rate: the next when the one before has been paid off.

    Promise: in a span of t windows at most t times the capacity, and one request more, and one
    hundredth of the capacity. There are no bursts; the hundredth makes up for waking late, by
    which a rate of 1,000 a second would lose some percent. Source: J. Turner, "New Directions in
    Communications", IEEE Communications Magazine, October 1986; used as a queue.
    """

    def __init__(self, capacity: float, window: int) -> None:
        super().__init__(capacity, window)
        whole = capacity * window
        self.tolerance = whole / 100 if type(whole) is float else whole // 100

    def excess(self, n: float) -> float:
        return self.debt - self.tolerance

    def room(self, now: int) -> float:
        return 0 if self.delay(0, now) else self.capacity


class _Endless(_Rate):
    """An infinite capacity."""

    def delay(self, n: float, now: int) -> float:
        return 0

    def take(self, n: float, now: int) -> None:
        self.granted += n

    def used(self, now: int) -> float:
        return 0


class _Slots(_Rate):
    """A number of things that are used and given back."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.total: float = 0

    def delay(self, n: float, now: int) -> float:
        return 0 if self.total + n <= self.capacity else _NEVER

    def take(self, n: float, now: int) -> float:
        self.total += n
        self.granted += n
        return n

    def close(self, grant: float) -> None:
        self.total -= grant

    def recount(self) -> None:
        self.total = 0

    def hold(self, n: float) -> None:
        self.total += n

    def used(self, now: int) -> float:
        return self.total


_RATES: dict[RateLimitAlgorithm, type[_Rate]] = {
    RateLimitAlgorithm.SlidingWindow: _SlidingWindow,
    RateLimitAlgorithm.FixedWindow: _FixedWindow,
    RateLimitAlgorithm.TokenBucket: _TokenBucket,
    RateLimitAlgorithm.LeakyBucket: _LeakyBucket,
    RateLimitAlgorithm.GCRA: _GCRA,
}


# === Limits ===

_LARGEST = 1e100                # of amounts, capacities and windows: their products are finite


def _number(value: Any, what: str, key: str = "") -> float:
    """Return the value as an int or a float, no subclass; `what` it is, of which limit, stands in the error."""
    if type(value) in (int, float):
        return value        # type: ignore[no-any-return]
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{what}{key and repr(key)} must be a number, not {value!r}")
    return int(value.__index__()) if hasattr(value, "__index__") else float(value)


def _positive(value: Any, what: str, expected: str = "a number above 0") -> float:
    number = _number(value, what)
    if not 0 < number <= _LARGEST and number != math.inf:   # NaN is neither
        raise ValueError(f"{what}={value!r} is not possible: {expected}")
    return number


class Limit:
    """The base of descriptions of what is limited: RateLimit, CallLimit, ResourceLimit.

    `key` names it in `acquire`, `capacity` is how much there is. A description has no state and
    cannot be changed; a LimitSet keeps the state.
    """

    key: str
    capacity: float
    _state: Callable[[], _Rate]

    is_automatic = True             # `acquire` takes 1 of it when it is not asked for
    is_whole = True
    free_of_update: float = math.inf       # of more than so many it has to be told how many were used

    def __init__(self, key: str, capacity: float) -> None:
        if type(self) is Limit:
            raise TypeError("a Limit is a RateLimit, a CallLimit or a ResourceLimit: make one of those")
        if not isinstance(key, str):
            raise TypeError(f"the key of a limit must be a string, not {key!r}")
        self.__dict__.update(key=key, capacity=_positive(capacity, "capacity"))

    def _amount(self, n: float) -> float:
        """Return an amount to acquire; raise ValueError or TypeError if it never can be."""
        if type(n) is int and 0 <= n <= self.capacity:
            return n
        n = _number(n, "the amount of ", self.key)
        if not 0 <= n <= _LARGEST or self.is_whole and n != int(n):
            kind = "whole" if self.is_whole else "finite"
            raise _own_error(ValueError(f"cannot acquire {n} of {self.key!r}: a {kind} number from 0 is needed"))
        if n > self.capacity:
            raise _own_error(ValueError(f"cannot acquire {n} of {self.key!r}: its capacity is {self.capacity}"))
        return n

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name!r} cannot be set: a limit is a description, and may be in use")

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **vars(self)), ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        told = (f"{name}={getattr(value, 'value', value)!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(told)})"


def _window_seconds(name: str) -> int:
    try:
        return RateWindow(name).seconds
    except ValueError:
        raise ValueError(f"unknown window {name!r}: {RateWindow._choices()}, or give a number of "
                         f"seconds{_nearest(name, [each.value for each in RateWindow])}") from None


class RateLimit(Limit):
    """So much of something in a window: tokens, bytes, calls.

    RateLimit("tokens", 10_000, per="minute")

    capacity: a number above 0, fractions and infinity included.
    window_seconds, window, per: one of them; seconds, or a RateWindow or its name ("minute", "per_hour").
    algorithm: what is promised, and the burst that it allows:
        "sliding_window": at most the capacity in any window, wherever it begins. The default.
        "fixed_window": at most the capacity in windows that follow each other; up to twice the capacity
            across a border.
        "token_bucket", "gcra": the capacity at once, then at the rate; up to twice the capacity in one window.
        "leaky_bucket": one after the other at the rate, without bursts; a request for the whole
            capacity is followed by a window of silence.

    It is acquired only when asked for, in any amount up to the capacity, and what was really used
    has to be told by `update`. Raises ValueError for an impossible number, none or two windows, an
    unknown name; TypeError for what is no number.
    """

    window_seconds: float
    algorithm: RateLimitAlgorithm

    is_automatic = False
    is_whole = False
    free_of_update = 0

    def __init__(self, key: str, capacity: float, window_seconds: float | RateWindow | str | None = None,
                 algorithm: RateLimitAlgorithm | str = RateLimitAlgorithm.SlidingWindow, *,
                 window: float | RateWindow | str | None = None, per: float | RateWindow | str | None = None) -> None:
        super().__init__(key, capacity)
        given = [span for span in (window_seconds, window, per) if span is not None]
        if len(given) != 1:
            raise ValueError("a rate needs one window, as in window_seconds=60 or per='minute'" if not given else
                             "window_seconds, window and per are one argument: give only one of them")
        span = _window_seconds(given[0]) if isinstance(given[0], str) else given[0]
        span = _positive(span, "window_seconds", "a number of seconds above 0")
        if span == math.inf:
            raise ValueError("window_seconds=inf is not possible: a number of seconds above 0")
        self.__dict__.update(window_seconds=span, algorithm=RateLimitAlgorithm(algorithm))

    def _state(self) -> _Rate:
        if self.capacity == math.inf:
            return _Endless(self.capacity, 0)
        return _RATES[self.algorithm](self.capacity, math.ceil(self.window_seconds * 1_000_000_000))


class CallLimit(RateLimit):
    """So many calls in a window: a RateLimit with the key "call_count", of which `acquire` takes 1 by itself.

    CallLimit(100, per="minute")

    Arguments and errors are those of RateLimit; the capacity is at least 1, amounts are whole. With
    another `key` several call limits may stand in one set. Only when more than 1 was acquired has
    `update` to tell what was used.
    """

    is_automatic = True
    is_whole = True
    free_of_update = 1

    def __init__(self, capacity: float, window_seconds: float | RateWindow | str | None = None,
                 algorithm: RateLimitAlgorithm | str = RateLimitAlgorithm.SlidingWindow, *,
                 window: float | RateWindow | str | None = None, per: float | RateWindow | str | None = None,
                 key: str = "call_count") -> None:
        super().__init__(key, capacity, window_seconds, algorithm, window=window, per=per)
        if self.capacity < 1:
            raise ValueError(f"capacity={capacity!r} is not possible for calls: a number from 1; "
                             "take a longer window instead")


class ResourceLimit(Limit):
    """So many of something at the same time, like a semaphore: connections, licences, slots.

    capacity: a whole number from 1. `acquire` takes 1 by itself, and the end of its block gives back.
    """

    def __init__(self, key: str, capacity: float) -> None:
        super().__init__(key, capacity)
        if self.capacity == math.inf or self.capacity != int(self.capacity):
            raise ValueError(f"capacity={capacity!r} is not possible for a resource: a whole number from 1")

    def _state(self) -> _Rate:
        return _Slots(self.capacity)


class _Ticket:
    """What somebody wants of a set's limits. Its home makes it so, whenever it is told to look at it."""

    bell: _Bell | _Guest | None = None      # rung when it is granted or refused, or `due` has changed
    may_wait = True
    is_granted = is_refused = False
    is_over = False             # to be given back, or not wanted any more
    grants: Any = None          # what it holds: [key, state, grant, amount], ...; None: nothing
    loop: asyncio.AbstractEventLoop | None = None   # the event loop that it waits on
    due = math.inf              # when the first in line may be granted, if this one has to look to it
    usage: Any = None           # amounts really used, by key, as far as they have been told
    counted: Any = None         # the `usage` that has been taken into account
    home: Any = None            # where it is away, ...
    number: Any = None          # ... and what it is known by on its way there
    answer: Any = None          # what came back beside the verdict: a reason, or statistics

    def __init__(self, wants: dict[str, float] | None) -> None:
        self.wants: Any = wants     # amounts, by key

    def withdraw(self) -> None:
        """Say that it is not wanted; what has been granted was not used."""
        self.usage = dict.fromkeys(self.wants, 0)
        self.is_over = True


class _Desk:
    """The home of a set's limits, where who asks is served in order of arrival.

    Whoever has something for it does the work that there is, under its lock; nobody waits there for
    anything else. A signal handler or a finalizer that comes in the middle leaves its ticket to the code
    that it interrupts. A signal handler may raise in the middle, too: what is `held` decides then, and
    the rest is made to agree with it.
    """

    is_far = False

    def __init__(self, limits: Iterable[Limit], clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.states = {limit.key: limit._state() for limit in limits}
        self.clock = clock
        self.line: collections.OrderedDict[_Ticket, None] = collections.OrderedDict()   # tickets that wait
        # the same, by the event loop that they wait on; None: on none
        self.keepers: dict[asyncio.AbstractEventLoop | None, collections.OrderedDict[_Ticket, None]] = {}
        self.held: dict[_Ticket, None] = {}     # tickets that were granted and are not over
        self.todo: collections.deque[_Ticket] = collections.deque()     # tickets that others have left here
        self.lock = threading.RLock()
        self.is_busy = False

    def attend(self, ticket: _Ticket) -> None:
        """Do what the ticket says: give, take back, correct, strike off. From any thread, at any time."""
        with self.lock:
            if self.is_busy:
                if self.is_far:         # it has moved while this thread waited for the lock
                    self.attend(ticket)
                    return
                if self._is_within():
                    self.todo.append(ticket)
                    return
            try:
                self.is_busy = True
                now = self.clock()
                if self._make_so(ticket, now) and self.line or self.todo:
                    self._work_off(now)
            except BaseException:
                self._recover(ticket)
                raise
            finally:
                self.is_busy = False
            if self.todo:               # left by a handler that came just before
                self.attend(self.todo.popleft())

    def move(self, token: bytes, way: _RayWay) -> None:
        """Go on elsewhere, with all that is held and waited for: who has to do with this desk knows it as an _Away."""
        with self.lock:
            if self.is_busy and self._is_within():
                raise RuntimeError(_INTERRUPTS)
            self.is_busy = True         # for ever: who waits for the lock sees that it has moved
            waiting, held = list(self.line), []
            for ticket in self.held:
                ticket.home, ticket.number = self, next(way.numbers)
                there = _Ticket(ticket.wants)
                there.grants, there.usage, there.counted = ticket.grants, ticket.usage, ticket.counted
                there.is_granted = True
                held.append((ticket.number, there))
            way.open(token, self.states, held, self.clock())
            for ticket in self.held:
                ticket.grants = ()
            self.__dict__.update(vars(_Away(token, way)))
            self.__class__ = _Away  # type: ignore[assignment]
        for ticket in (*waiting, *self.todo):
            ticket.due = math.inf
            self.attend(ticket)

    def _is_within(self) -> bool:
        """Tell whether the desk is at work further up this stack: that may have been left by an exception."""
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code in (_Desk.attend.__code__, _Desk.move.__code__) and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False

    def _make_so(self, ticket: _Ticket, now: int) -> bool:
        """Do what one ticket says; tell whether those in line have to be looked at because of it."""
        if ticket.is_granted:
            if ticket.usage is not ticket.counted and ticket.grants is not None:
                self._correct(ticket, now)
            if ticket.is_over and self.held.pop(ticket, self) is None:
                for _, state, grant, _ in ticket.grants:    # pyright: ignore[reportOptionalIterable]
                    state.close(grant)
                ticket.grants = None
            return True
        if ticket.is_over or ticket in self.line:
            if not ticket.is_over and ticket.may_wait:
                return True
            self._leave_line(ticket)
            if not ticket.is_over:
                self._refuse(ticket)
            return True
        wait = _NEVER if self.line else self._grant(ticket, now)
        if not wait:
            return False
        if not ticket.may_wait:
            self._refuse(ticket)
            return False
        self.line[ticket] = None
        waiting = self.keepers.setdefault(ticket.loop, collections.OrderedDict())
        waiting[ticket] = None
        if wait < _NEVER:
            ticket.due = now + wait
            self._ring(ticket)
        return len(waiting) == 1 and len(self.line) > 1

    def _grant(self, ticket: _Ticket, now: int) -> float:
        """Take all that the ticket wants, and return 0; or nothing, and return after how many nanoseconds to ask."""
        wait: float
        states, wait = self.states, 0
        for key, n in ticket.wants.items():
            delay = states[key].delay(n, now)
            if delay > wait:
                wait = delay
        if wait:
            return wait
        grants = []
        for key, n in ticket.wants.items():
            grants.append([key, states[key], states[key].take(n, now), n])
        ticket.grants = grants
        self.held[ticket] = None
        ticket.is_granted = True
        if ticket.bell is not None:
            self._ring(ticket)
        return 0

    def _ring(self, ticket: _Ticket) -> None:
        try:
            if ticket.bell is not None:
                ticket.bell.wake()
        except RuntimeError:            # its event loop is closed: nobody will come for it
            ticket.withdraw()
            self.todo.append(ticket)

    def _refuse(self, ticket: _Ticket) -> None:
        ticket.is_refused = True
        self._ring(ticket)

    def _leave_line(self, ticket: _Ticket) -> None:
        if self.line.pop(ticket, self) is None:
            waiting = self.keepers[ticket.loop]
            waiting.pop(ticket, None)
            if not waiting:
                del self.keepers[ticket.loop]

    def _work_off(self, now: int) -> None:
        """Do what others have left, then grant from the head of the line on.

        When that has to wait until some time, the first on each event loop, and the first on none, keep the time: one
        loop may be busy or stopped, and all would wait for it.
        """
        while self.todo or self.line:
            if self.todo:
                self._make_so(self.todo[0], now)
                self.todo.popleft()
                continue
            ticket = next(iter(self.line))
            wait: Any = self._ring(ticket) if ticket.is_granted else self._grant(ticket, now)   # type: ignore[func-returns-value]
            if wait:
                for waiting in list(self.keepers.values()):
                    keeper = next(iter(waiting))
                    if keeper.due != now + wait:
                        keeper.due = now + wait
                        self._ring(keeper)
                if not self.todo:
                    return
            else:
                self._leave_line(ticket)

    def _correct(self, ticket: _Ticket, now: int) -> None:
        """Count what was really used instead of what was acquired."""
        for key, n in ticket.usage.items():
            parts = [part for part in ticket.grants if part[0] == key]
            more = n
            for part in parts:
                more -= part[3]
            if more > 0:
                state = self.states[key]
                state.delay(0, now)
                ticket.grants.append([key, state, state.take(more, now), more])
            while more < 0:
                part = parts.pop()
                back = min(part[3], -more) if parts else -more
                part[3] -= back         # first: better lost than given back twice
                part[1].give(part[2], back, now)
                more += back
        ticket.counted = ticket.usage

    def _recover(self, ticket: _Ticket) -> None:
        """Go on after an exception of a signal handler, which may have come in the middle of anything."""
        for state in self.states.values():
            state.recount()
        for held in self.held:
            held.is_granted = True
            self._ring(held)
            for key, n in held.wants.items():
                self.states[key].hold(n)
        self.keepers = {}
        for waiting in self.line:
            self.keepers.setdefault(waiting.loop, collections.OrderedDict())[waiting] = None
        self.todo.append(ticket)
        try:
            self._work_off(self.clock())
        except Exception:
            if self.todo:
                self.todo.popleft()         # what raises twice would do so for everybody who comes
            raise

    def seconds_until(self, due: float) -> float:
        return (due - self.clock()) / 1_000_000_000

    def stats(self) -> dict[str, dict[str, Any]]:
        with self.lock:
            if self.is_busy and self.is_far:
                return self.stats()
            if self.is_busy and self._is_within():
                raise RuntimeError(_INTERRUPTS)
            now, waiting = self.clock(), collections.Counter(key for ticket in list(self.line) for key in ticket.wants)
            return {key: {"capacity": state.capacity, "in_use": state.used(now), "available": state.room(now),
                          "waiting": waiting[key], "granted": state.granted}
                    for key, state in self.states.items()}


def _would_stall() -> bool:
    """Tell whether waiting in this thread would stall an event loop that is not a worker's private one."""
    asyncio = sys.modules.get("asyncio")
    loop = asyncio and asyncio._get_running_loop()
    return loop is not None and loop not in _private_loops


def _do_nothing(*args: object) -> None:
    pass


def _drop(home: _Desk | _Away, ticket: _Ticket) -> None:
    """Have a request forgotten: nobody will use what it was granted."""
    ticket.withdraw()
    home.attend(ticket)


_STALLS = ("acquire() would have to wait here, and stall the event loop that it is called on: "
           "write `async with limits.async_acquire(...)`")
_INTERRUPTS = ("limits cannot be acquired or looked at here: this is a signal handler or a finalizer, and has "
               "interrupted its own thread just while that acquired or gave back; try_acquire() does not wait")
# By token: what processes know a set by.
_sets: weakref.WeakValueDictionary[bytes, LimitSet] = weakref.WeakValueDictionary()


class LimitSet:
    """Limits that are acquired together, all or nothing, shared by everyone the set is given to.

    >>> limits = LimitSet([CallLimit(100, per="minute"), RateLimit("tokens", 10_000, per="minute")])
    >>> with limits.acquire({"tokens": 500}) as acquired:       # and one call
    ...     acquired.update({"tokens": 312})                    # what was really used
    >>> limits.get_stats()["tokens"]["in_use"]
    312

    Threads, event loops, worker processes and Ray workers may use one set at the same time: it lives where it
    was made, and processes that it was given to ask there. Once it is given to a Ray worker it lives in an
    actor, and everybody asks there. Who has to wait is served in order of
    arrival, however much he wants; nothing polls. A worker process that dies gives back what it held.
    A set that went to a process with a call lives at least as long as that pool.

    limits: Limit objects with different keys; without any, everything is granted at once.
    config: a mapping for whoever acquires, as `.config`: which account this is, say.
    shared, mode: accepted, and without effect.

    `limits[key]` is the Limit. Raises TypeError for what is no Limit, ValueError for a key that is there twice.
    """

    def __init__(self, limits: Limit | Iterable[Limit] = (), shared: bool = False,
                 mode: ExecutionMode | str | None = None, config: Mapping[str, Any] | None = None) -> None:
        limits = (limits,) if isinstance(limits, Limit) else tuple(limits)
        for limit in limits:
            if not isinstance(limit, Limit):
                raise TypeError(f"a LimitSet is made of limits, not {limit!r}")
        keys = [limit.key for limit in limits]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"two limits have the key {twice!r}: give one of them another key")
        self.config: Mapping[str, Any] = types.MappingProxyType(dict(config or {}))
        self._limits = dict(zip(keys, limits))
        self._automatic: dict[str, float] = {limit.key: 1 for limit in limits if limit.is_automatic}
        self._free = _Free(self.config)
        self._warned: set[str] = set()
        self._token = os.urandom(12)
        self._home: Any = _Desk(limits)     # or an _Away
        _sets[self._token] = self

    def acquire(self, requested: Mapping[str, float] | None = None,
                timeout: float | None = None) -> _Acquisition | _Free:
        """Take some of each limit, all at once; wait until that is possible. Use it with `with`.

        requested: a dict of amounts by key. What it leaves out is acquired with 1 if it is a call or
            resource limit, and not at all if it is a rate limit. A key that the set does not know is
            ignored, with one warning.
        timeout: seconds to wait at most, then TimeoutError is raised and nothing was taken; None: no end.

        Raises ValueError at once for more than a capacity; RuntimeError where waiting would stall an
        event loop: there `async_acquire` waits. A thread that waits for a limit that it holds itself waits
        forever: give a timeout.
        """
        if not self._limits:
            return self._free
        wants, owed = self._plan(requested, timeout)
        home, ticket = self._home, _Ticket(wants)
        if home.is_far and _would_stall():
            acquired = self._try(home, ticket, owed)
            if not acquired.successful:
                raise _own_error(RuntimeError(_STALLS)) if timeout is None or timeout > 0 else \
                    self._timeout(ticket, timeout)
            return acquired
        try:
            home.attend(ticket)
            if not ticket.is_granted:
                self._wait(home, ticket, timeout)
            return _Held(self, home, ticket, owed)
        except BaseException:
            _drop(home, ticket)
            raise

    def try_acquire(self, requested: Mapping[str, float] | None = None) -> _Acquisition | _Free:
        """Do what `acquire` does without waiting: what it returns tells by `.successful` whether all was there."""
        if not self._limits:
            return self._free
        wants, owed = self._plan(requested)
        return self._try(self._home, _Ticket(wants), owed)

    def async_acquire(self, requested: Mapping[str, float] | None = None,
                      timeout: float | None = None) -> _AsyncAcquire | _Free:
        """Do what `acquire` does without blocking the event loop: use it with `async with`, or await it.

        A task that is cancelled while it waits has taken nothing.
        """
        if not self._limits:
            return self._free
        return _AsyncAcquire(functools.partial(self._acquire_async, *self._plan(requested, timeout), timeout))

    def get_stats(self) -> dict[str, dict[str, Any]]:
        """Return by key a dict of what the limit is, and `in_use`, `available`, `waiting` requests, amount `granted`.

        For a rate `in_use` is what counts against the window now.
        """
        stats = self._home.stats() if self._limits else {}
        return {key: {**vars(limit), **stats[key]} for key, limit in self._limits.items()}

    def _plan(self, requested: Mapping[str, float] | None,
              timeout: float | None = None) -> tuple[dict[str, float], Sequence[str]]:
        """Return the amounts to acquire, by key, and the keys of which the usage has to be told."""
        if timeout is not None:
            _number_of_seconds(timeout)
        if requested is None:
            return self._automatic, ()
        if type(requested) is not dict and not isinstance(requested, collections.abc.Mapping):
            raise TypeError(f"requested must be a dict such as {{'tokens': 100}}, not {requested!r}")
        owed: list[str]
        wants, owed = self._automatic.copy(), []
        for key, n in requested.items():
            limit = self._limits.get(key)
            if limit is None:
                self._warn_unknown(key)
                continue
            wants[key] = n = limit._amount(n)
            if n > limit.free_of_update:
                owed.append(key)
            if not n:
                del wants[key]
        return wants, owed

    def _check(self, wants: dict[str, float] | None, usage: dict[str, float] | None) -> None:
        """Raise a KeyError, TypeError or ValueError for what no LimitSet would ask: a worker may be out of its mind."""
        for key, n in (wants or {}).items():
            self._limits[key]._amount(n)
        for key, n in (usage or {}).items():
            if key not in self._limits or not 0 <= n <= _LARGEST:
                raise ValueError(f"usage {n!r} of {key!r}")

    def _warn_unknown(self, key: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            _warn(f"there is no limit {key!r} in {self!r}: it is ignored{_nearest(key, self._limits)}")

    def _try(self, home: Any, ticket: _Ticket, owed: Sequence[str]) -> _Acquisition:
        ticket.may_wait = False
        try:
            home.attend(ticket)
            if home.is_far and home.wait_for_verdict(ticket).answer:
                raise RuntimeError(ticket.answer)
            if ticket.is_granted:
                return _Held(self, home, ticket, owed)
            if not ticket.is_refused:   # not even looked at: a signal handler, in the middle of `attend`
                _drop(home, ticket)
            ticket.is_over = True
            return _Acquisition(self, home, ticket, owed)
        except BaseException:
            _drop(home, ticket)
            raise

    def _wait(self, home: Any, ticket: _Ticket, timeout: float | None) -> None:
        if not home.is_far and ticket in home.todo:
            raise RuntimeError(_INTERRUPTS)
        if _here.reader is not None:
            raise RuntimeError("acquire() would have to wait here, in a done-callback on the thread that brings the "
                               "answers of worker processes: acquire in the call itself, or submit one that does")
        if _would_stall() and (timeout is None or timeout > 0):
            raise _own_error(RuntimeError(_STALLS))
        ticket.bell = _Bell()
        for seconds in self._steps(home, ticket, timeout):
            ticket.bell.sleep(seconds)

    async def _acquire_async(self, wants: dict[str, float], owed: Sequence[str],
                             timeout: float | None) -> _Acquisition:
        import asyncio
        home, ticket = self._home, _Ticket(wants)
        ticket.bell, ticket.loop = _Bell(), asyncio.get_running_loop()
        try:
            home.attend(ticket)
            for seconds in self._steps(home, ticket, timeout):
                await ticket.bell.sleep_async(seconds)
            return _Held(self, home, ticket, owed)
        except BaseException:
            _drop(home, ticket)
            raise

    @staticmethod
    def _timeout(ticket: _Ticket, timeout: float | None) -> TimeoutError:
        return TimeoutError(f"{ticket.wants} could not be acquired within {timeout:g} seconds")

    def _steps(self, home: _Desk | _Away, ticket: _Ticket, timeout: float | None) -> Iterator[float | None]:
        """Yield the seconds to sleep on the bell, None: until it rings, while the ticket is not granted."""
        deadline = _deadline(timeout)
        while not ticket.is_granted:
            if ticket.is_refused:
                raise RuntimeError(ticket.answer) if ticket.answer else self._timeout(ticket, timeout)
            left, due = _left(deadline), home.seconds_until(ticket.due)
            if due <= 0:
                home.attend(ticket)
            elif left == 0 and ticket.may_wait:
                ticket.may_wait = False         # its home decides, now
                home.attend(ticket)
            else:
                wait = due if not left else min(left, due)
                yield None if wait == _NEVER else wait

    def __getitem__(self, key: str) -> Limit:
        return self._limits[key]

    def __contains__(self, key: object) -> bool:
        return key in self._limits

    def __iter__(self) -> Iterator[str]:
        return iter(self._limits)

    def __repr__(self) -> str:
        return f"LimitSet([{', '.join(map(repr, self._limits.values()))}])"

    def __reduce__(self) -> tuple[Any, ...]:
        if self is _UNLIMITED:
            return _limits_for_worker, (None,)
        if _here.kept is not None:
            _here.kept[self._token] = self
        keeper = () if _here.refs is None or not self._limits else (_keeper_of(self),)
        return _limit_set, (self._token, tuple(self._limits.values()), dict(self.config), *keeper)


class _Acquisition:
    """What was acquired, until the end of its `with` block; `successful` tells whether it was.

    `config` is the set's. `async with` does as well.
    """

    __slots__ = "_limits", "_home", "_ticket", "_owed"

    def __init__(self, limits: LimitSet, home: _Desk | _Away, ticket: _Ticket, owed: Sequence[str]) -> None:
        self._limits, self._home, self._ticket, self._owed = limits, home, ticket, owed
    @property
    def successful(self) -> bool:
        return self._ticket.is_granted

    @property
    def config(self) -> Mapping[str, Any]:
        return self._limits.config

    def update(self, usage: Mapping[str, float] | None = None) -> None:
        """Tell what was really used of rate and call limits, by key; None: what was acquired.

        Less is given back at once, more is charged, with a warning. A later call corrects an earlier one.
        Raises ValueError for a negative amount, RuntimeError after the end of the block.
        """
        ticket = self._ticket
        if ticket.is_over:
            raise RuntimeError("update() comes too late: this acquisition has ended" if ticket.is_granted else
                               "nothing was acquired: ask .successful before the limited thing is used")
        if usage is None:
            usage = {key: ticket.wants.get(key, 0) for key in self._owed}
        elif type(usage) is not dict and not isinstance(usage, collections.abc.Mapping):
            raise TypeError(f"usage must be a dict such as {{'tokens': 100}}, not {usage!r}")
        told, over = {**ticket.usage} if ticket.usage else {}, {}
        for key, n in usage.items():
            limit = self._limits._limits.get(key)
            if limit is None:
                self._limits._warn_unknown(key)
                continue
            n = _number(n, "the usage of ", key)
            if not 0 <= n <= _LARGEST:
                raise ValueError(f"usage {n!r} of {key!r} is not possible: a number from 0")
            if limit.free_of_update < math.inf:         # else there is nothing to correct: a resource
                told[key] = n
                if n > ticket.wants.get(key, 0):
                    over[key] = n
        ticket.usage = told
        self._home.attend(ticket)
        if over:
            import warnings
            warnings.warn(f"more was used than acquired, and is charged: {over}; acquired were {ticket.wants}",
                          stacklevel=2)

    def release(self) -> None:
        """Give back what is held; of rates, what was acquired counts as used unless `update` has told."""
        ticket = self._ticket
        if not ticket.is_over:
            ticket.is_over = True
            self._home.attend(ticket)
            self.__class__ = _Acquisition       # pyright: ignore[reportAttributeAccessIssue]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: types.TracebackType | None) -> None:
        ticket = self._ticket
        if not ticket.is_over:
            ticket.is_over = True
            self._home.attend(ticket)
            self.__class__ = _Acquisition       # pyright: ignore[reportAttributeAccessIssue]
            if self._owed and kind is None:
                self._check_told(ticket.usage or ())

    def _check_told(self, usage: Container[str]) -> None:
        missing = [key for key in self._owed if key not in usage]
        if missing:
            raise _own_error(RuntimeError(
                f"what was used of {', '.join(map(repr, missing))} was not told, and all that was acquired counts "
                f"as used: call update({{{missing[0]!r}: ...}}) within the block"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: types.TracebackType | None) -> None:
        self.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        state = "refused" if not self.successful else "ended" if self._ticket.is_over else "held"
        return f"<acquisition of {self._ticket.wants}: {state}>"

    def __reduce__(self) -> NoReturn:
        raise _pickle().PicklingError("an acquisition cannot travel to another process: acquire there")


class _Held(_Acquisition):
    """One that gives back when it is forgotten. Once it has ended it is that no more: a Ctrl-C that comes
    within a `__del__` is lost.
    """

    __slots__ = ()

    def __del__(self) -> None:
        ticket = getattr(self, "_ticket", None)
        if ticket is not None and ticket.grants is not None:
            ticket.is_over = True
            self._home.attend(ticket)


class _AsyncAcquire:
    """What `async_acquire` returns: to be awaited, or used with `async with`."""

    def __init__(self, acquire: Callable[[], Coroutine[Any, Any, _Acquisition | _Free]]) -> None:
        self._acquire = acquire

    def __await__(self) -> Generator[Any, None, _Acquisition | _Free]:
        return self._acquire().__await__()

    async def __aenter__(self) -> _Acquisition | _Free:
        self._acquired = await self._acquire()
        return self._acquired

    async def __aexit__(self, *exc_info: Any) -> None:
        self._acquired.__exit__(*exc_info)

    def __repr__(self) -> str:
        return "<async_acquire: to be awaited>"

    __reduce__ = _Acquisition.__reduce__


class _Free:
    """An acquisition of nothing, in all forms: what a set without limits gives."""

    successful = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def update(self, usage: Mapping[str, float] | None = None) -> None:
        pass

    def release(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        return None

    def __await__(self) -> Generator[Any, None, Self]:
        return self
        yield

    def __repr__(self) -> str:
        return "<acquisition of nothing: there are no limits>"


class LimitPool:
    """Several sets behind one `acquire`: accounts, endpoints, keys; `.config` tells which it is.

    They take turns, or chance decides; when the one whose turn it is would have to wait, another one that
    does not is taken, and when all would, the request waits in that one's line. `acquire`, `try_acquire` and
    `async_acquire` are those of LimitSet; a request goes only to sets that can ever grant it.

    load_balancing: "round_robin" or "random".
    worker_index: where the round begins. In a pool of worker processes each has a round of its own and
        begins at its own index, too; threads share one.

    `pool[n]` is the n-th set. Raises TypeError for what is no LimitSet; ValueError for none, and for other algorithms.
    """

    def __init__(self, limit_sets: Iterable[LimitSet],
                 load_balancing: LoadBalancingAlgorithm | str = LoadBalancingAlgorithm.RoundRobin,
                 worker_index: int = 0) -> None:
        self._sets = tuple(limit_sets)
        for each in self._sets:
            if not isinstance(each, LimitSet):
                raise TypeError(f"a LimitPool is made of LimitSets, not {each!r}")
        if not self._sets:
            raise ValueError("a LimitPool needs at least one LimitSet")
        self.load_balancing = LoadBalancingAlgorithm(load_balancing)
        if self.load_balancing not in (LoadBalancingAlgorithm.RoundRobin, LoadBalancingAlgorithm.Random):
            raise ValueError(f"load_balancing={load_balancing!r} is not possible for limits: 'round_robin' or 'random'")
        self.worker_index: int = _parse("worker_index", worker_index, {"worker_index": _whole(0, none=False)})
        self._turns = itertools.count(self.worker_index)

    def acquire(self, requested: Mapping[str, float] | None = None,
                timeout: float | None = None) -> _Acquisition | _Free:
        """Take it from the set whose turn it is, or from another that has it now; see LimitSet.acquire."""
        sets = self._in_turn(requested)
        return self._from_any(sets, requested) or sets[0].acquire(requested, timeout)

    def try_acquire(self, requested: Mapping[str, float] | None = None) -> _Acquisition | _Free:
        """Take it from any set that has it now; see LimitSet.try_acquire."""
        sets = self._in_turn(requested)
        return self._from_any(sets, requested) or sets[0].try_acquire(requested)

    def async_acquire(self, requested: Mapping[str, float] | None = None,
                      timeout: float | None = None) -> _AsyncAcquire:
        """Do what `acquire` does without blocking the event loop; see LimitSet.async_acquire."""
        return _AsyncAcquire(functools.partial(self._acquire_async, self._in_turn(requested), requested, timeout))

    async def _acquire_async(self, sets: list[LimitSet], requested: Mapping[str, float] | None,
                             timeout: float | None) -> _Acquisition | _Free:
        return self._from_any(sets, requested) or await sets[0].async_acquire(requested, timeout)

    def get_stats(self) -> list[dict[str, dict[str, Any]]]:
        """Return a list: the statistics of each set, see LimitSet.get_stats."""
        return [each.get_stats() for each in self._sets]

    def _in_turn(self, requested: Mapping[str, float] | None) -> list[LimitSet]:
        """Return the sets that can ever grant it, first the one whose turn it is."""
        if self.load_balancing is LoadBalancingAlgorithm.Random:
            import random
            first = random.randrange(len(self._sets))
        else:
            first = next(self._turns) % len(self._sets)
        able: list[LimitSet] = []
        refusal: Any = None
        for each in self._sets[first:] + self._sets[:first]:
            try:
                each._plan(requested)
                able.append(each)
            except ValueError as error:
                refusal = error
        if not able:
            raise refusal
        return able

    @staticmethod
    def _from_any(sets: list[LimitSet], requested: Mapping[str, float] | None) -> _Acquisition | _Free | None:
        for each in sets:
            acquired = each.try_acquire(requested)
            if acquired.successful:
                return acquired
        return None

    def __getitem__(self, index: int) -> LimitSet:
        return self._sets[index]

    def __len__(self) -> int:
        return len(self._sets)

    def __repr__(self) -> str:
        return f"LimitPool({list(self._sets)!r}, {self.load_balancing.value!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _limit_pool, (self._sets, self.load_balancing, self.worker_index)


def _limit_pool(limit_sets: tuple[LimitSet, ...], load_balancing: LoadBalancingAlgorithm,
                worker_index: int) -> LimitPool:
    """Load a LimitPool: in a worker process its round begins with the worker."""
    return LimitPool(limit_sets, load_balancing, worker_index + _worker_index)


def _read_limits(value: Any) -> LimitSet | LimitPool | tuple[Any, ...] | None:
    """Read the option: what is given stays a description until a worker is made."""
    if value is None or isinstance(value, (LimitSet, LimitPool)):
        return value
    if type(value).__name__ in ("LimitSet", "LimitPool"):
        raise _Reason(f"it belongs to {type(value).__module__}, another copy of this module")
    limits: tuple[Any, ...] = (value,) if isinstance(value, Limit) else tuple(value)
    try:
        if limits and isinstance(limits[0], LimitSet):
            LimitPool(limits)
        else:
            LimitSet(limits)
    except ValueError as error:
        raise _Reason(error) from None
    return limits


def _sets_in(limits: LimitSet | LimitPool) -> tuple[LimitSet, ...]:
    return (limits,) if isinstance(limits, LimitSet) else limits._sets


def _limits_for_worker(option: Any) -> LimitSet | LimitPool:
    """Return the limits that a worker or pool is given: a list makes a set of its own."""
    if option is None:
        return _UNLIMITED
    if isinstance(option, (LimitSet, LimitPool)):
        return option
    return LimitPool(option) if option and isinstance(option[0], LimitSet) else LimitSet(option)


_UNLIMITED = LimitSet()
_WITHOUT = _UNLIMITED, None, None
_worker_index = 0               # of the worker process that this is

# By id: a worker's object may be frozen, have slots, or replace its __dict__ in its constructor.
_limits_of: dict[Any, tuple[LimitSet | LimitPool, _Runner | None, weakref.ref[Any] | None]] = {}


def _give_limits(target: Any, limits: LimitSet | LimitPool, runner: _Runner | None = None) -> None:
    """Let `self.limits` of a worker's object be these, as long as it lives; `runner` retries what it calls itself."""
    number = id(target)
    follow = weakref.ref(target, lambda _: _limits_of.pop(number, None)) if type(target).__weakrefoffset__ else None
    _limits_of[number] = limits, runner, follow


def _runner_of(target: Any) -> _Runner | None:
    """Return the runner of an object that lives in a worker with retries, else None."""
    return _limits_of.get(id(target), _WITHOUT)[1]


# === Balancing ===

class _RoundRobin:
    """0, 1, 2, 0, ...: the next one that has room."""

    algorithm = "RoundRobin"

    def __init__(self) -> None:
        self.turn = 0

    def choose(self, backends: Sequence[_Backend], room: float) -> _Backend | None:
        for _ in backends:
            backend = backends[self.turn % len(backends)]
            self.turn = (self.turn + 1) % len(backends)
            if len(backend.calls) < room:
                return backend
        return None

    def stats(self, backends: Sequence[_Backend]) -> dict[str, Any]:
        return {}


class _LeastActive:
    """The one with the fewest calls in flight."""

    algorithm = "LeastActiveLoad"

    def choose(self, backends: Sequence[_Backend], room: float) -> _Backend | None:
        loads: list[float] = [len(backend.calls) for backend in backends]
        fewest = min(loads, default=room)
        return backends[loads.index(fewest)] if fewest < room else None

    def stats(self, backends: Sequence[_Backend]) -> dict[str, Any]:
        active = {backend.index: len(backend.calls) for backend in backends}
        return {"active_calls": active, "total_active": sum(active.values())}


class _LeastTotal:
    """The one with the fewest calls over its life."""

    algorithm = "LeastTotalLoad"

    def choose(self, backends: Sequence[_Backend], room: float) -> _Backend | None:
        free = [backend for backend in backends if len(backend.calls) < room]
        return min(free, key=lambda backend: backend.total, default=None)

    def stats(self, backends: Sequence[_Backend]) -> dict[str, Any]:
        return {"total_calls": {backend.index: backend.total for backend in backends}}


class _Random:
    """Any that has room."""

    algorithm = "Random"

    def __init__(self) -> None:
        import random
        self.pick = random.choice

    def choose(self, backends: Sequence[_Backend], room: float) -> _Backend | None:
        free = [backend for backend in backends if len(backend.calls) < room]
        return self.pick(free) if free else None

    def stats(self, backends: Sequence[_Backend]) -> dict[str, Any]:
        return {}


_BALANCERS: dict[LoadBalancingAlgorithm, type[_RoundRobin | _LeastActive | _LeastTotal | _Random]] = {
    LoadBalancingAlgorithm.RoundRobin: _RoundRobin,
    LoadBalancingAlgorithm.LeastActiveLoad: _LeastActive,
    LoadBalancingAlgorithm.LeastTotalLoad: _LeastTotal,
    LoadBalancingAlgorithm.Random: _Random,
}


# === Calls and runners ===

_now = time.monotonic   # each call asks three times
_NO_KWARGS: dict[str, Any] = {}     # one for all that wait: the garbage collector looks at each dict again and again


class _Call:
    """A method and its arguments on the way to a worker, and the future of what comes of it."""

    message: Any = None         # where it goes to a process: the parts of its message ...
    fn: Any = None              # ... the user's function, for whoever wants to know, ...
    shared: _Shared | None = None       # ... the function that has to be there first, ...
    dependencies: Sequence[Any] = ()    # ... to Ray: ObjectRefs of what it brings itself, ...
    link: _Link | None = None   # ... where it was sent, ...
    deaths: tuple[tuple[str, int | None, int | None], ...] = ()     # ... and the processes that died while they ran it
    task: asyncio.Task[None] | None = None      # the asyncio task that carries it out
    steps: Any = None           # the retry loop of a plain method in asyncio mode, ...
    is_again = False            # ... which has put it in line once more
    is_unwanted = False         # it is to be ended wherever it runs
    count = 1                   # how many calls of the user's it stands for
    alarm: list[Any] | None = None      # the timer of its `call_timeout`
    overran: float | None = None    # that it had, in seconds, and has exceeded

    def __init__(self, pool: _Pool, future: BaseFuture[Any], method: str, args: tuple[Any, ...],
                 kwargs: dict[str, Any]) -> None:
        self.pool = pool
        self.future = future
        self.method = method
        self.args: Any = args
        self.kwargs: Any = kwargs or _NO_KWARGS
        self.context: contextvars.Context | Any = contextvars.copy_context()
        self.since = _now()           # when it was submitted, or the last future among its arguments was done
        self.began: float | None = None     # when, as far as that is known here
        self.backend: _Backend | None = None        # where it was placed
        self.gate: threading.Lock | _RingingLock | None = None      # a lock that the thread which submits it sleeps on
        self.watch: _Watch | None = None        # while it waits for futures among its arguments

    def is_ready(self) -> bool:
        """Return whether it waits for no future among its arguments."""
        watch = self.watch
        return watch is None or all(future.done() for future in watch.futures)

    def reason(self, cause: BaseException) -> BaseException:
        """Return what the call fails with if nobody takes it any more: the cause, or what it has died of before."""
        if not self.deaths:
            return cause
        kind: Any = self.pool.kind
        error: BaseException = kind.death_in(self)
        error.__cause__ = cause
        return error

    def open_gate(self) -> None:
        gate, self.gate = self.gate, None
        if gate is not None:
            try:
                gate.release()
            except RuntimeError:        # the other one who found it was quicker
                pass

    def shown(self) -> str:
        """Return in words what is called: a method, or the user's function."""
        if not issubclass(self.pool.recipe.cls, TaskWorker) or self.method not in ("submit", "_chunk", "__call__"):
            return f"{self.method}()"
        fn = self.fn or (self.args[0] if self.args and self.method != "__call__" else None) or self.pool.bound
        name = getattr(fn, "__name__", type(fn).__name__)
        if self.count > 1:
            return f"{name}() for a chunk of {self.count} items"
        return f"submit({name})" if self.method == "submit" else f"{name}()"

    def __str__(self) -> str:
        return f"of {self.pool.name}.{self.shown().removesuffix('()')}"


def _is_async(fn: Any) -> bool:
    """Tell whether calling `fn` gives a coroutine, without importing inspect."""
    return bool(_code_flags(fn) & 0x180)        # CO_COROUTINE, CO_ITERABLE_COROUTINE


def _code_flags(fn: Any) -> int:
    code = getattr(fn, "__code__", None) or _code_of(fn)
    return code.co_flags if isinstance(code, types.CodeType) else 0


def _refuse_generator(fn: Any) -> None:
    """Raise a TypeError for a generator function, plain or async, whose body would run in the caller."""
    flags = _code_flags(fn)
    if flags & 0x220 and not flags & 0x100:     # CO_GENERATOR, CO_ASYNC_GENERATOR; CO_ITERABLE_COROUTINE
        name = getattr(fn, "__name__", fn)
        raise TypeError(f"{name}() is a generator function: its body would run in the caller that iterates over it, "
                        f"not in the worker; return a list instead")


def _definitions(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of what the user's class and its bases define."""
    for base in cls.__mro__:
        if base not in (object, Worker, TaskWorker):
            yield from vars(base).items()


def _async_names(cls: type) -> set[str]:
    """Return the names of the coroutine methods: a plain method that overrides one is none."""
    found: dict[str, Any] = {}
    for name, value in _definitions(cls):
        found.setdefault(name, value)
    return {name for name, value in found.items() if _is_async(getattr(value, "__func__", value))}


def _without_our_frame(error: BaseException) -> BaseException:
    """Take our own frame off the traceback: it says nothing, and makes a cycle with the call."""
    return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)


def _attempt(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
    """Call; return (kind, value)."""
    try:
        return _RESULT, fn(*args, **kwargs)
    except BaseException as error:
        return _ERROR, _without_our_frame(error)


class _Recipe:
    """How to build the user's object, again if need be."""

    def __init__(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any], bound: Callable[..., Any] | None,
                 options: _Options) -> None:
        self.cls, self.args, self.kwargs = cls, args, kwargs
        self.bound = bound          # the function that a TaskWorker always calls
        name = getattr(bound, "__name__", None) if cls is TaskWorker else None
        # of the worker, before its number
        self.name: str = options.name or (name if isinstance(name, str) and name.isidentifier() else cls.__name__)
        self.initializer, self.initargs, self.initkwargs = options.initializer, options.initargs, options.initkwargs
        self.most_tasks, self.most_memory = options.max_tasks_per_worker, options.max_worker_memory
        self.limits = _limits_for_worker(options.limits)
        self.retries = {name: getattr(options, name) for name in _RETRY_OPTIONS}
        self.config = global_config._copy()     # as it is here and now
        self.async_names = _async_names(cls)

    def let_go(self) -> None:
        """Keep nothing of the user's: nothing will be built any more."""
        self.args, self.kwargs, self.initargs, self.initkwargs = (), {}, (), {}

    def build(self) -> Any:
        if self.initializer is not None:
            self.initializer(*self.initargs, **self.initkwargs)
        around = _here.made
        _here.building, _here.made = self, None
        try:
            return self.cls(*self.args, **self.kwargs)
        except BaseException:
            _limits_of.pop(_here.made, None)
            raise
        finally:
            _here.building, _here.made = None, around


# On which nothing runs but the call that may block them.
_private_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


class _Runner:
    """The far side of a worker: holds the user's object and carries out calls on it.

    Made, used and closed in the worker's own thread, and so is the object.
    """

    def __init__(self, recipe: _Recipe, halt: _Halt, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop, self._owns_loop = loop, loop is None
        self._async_names = recipe.async_names
        if self._owns_loop and self._async_names:
            self._own_loop()
        self.halt = halt
        self.target: Any = None
        self.retries = _retries_by_method(recipe)
        self.wrappers: dict[str, Any] = {}
        self.class_name = recipe.cls.__name__
        try:
            self.target = recipe.build()
        except BaseException:
            self.close()
            raise
        _give_limits(self.target, recipe.limits, self if self.retries else None)
        if self.retries and not isinstance(self.target, TaskWorker):
            self.wrappers = {name: _retry_within(type(self.target), name) for name in self.retries}

    def attempt(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        """Call the method once; return (kind, value), where the value may be a coroutine still to be run."""
        bound = getattr(self.target, method)
        return _attempt(_bare(bound) if self.retries else bound, args, kwargs)

    def attempts(self, method: str, args: tuple[Any, ...],
                 kwargs: dict[str, Any]) -> Generator[Any, Any, tuple[str, Any]] | None:
        """Return the retry loop for a call, to be driven; None if it is made once."""
        retries = self.retries.get(method)
        if retries is None:
            return None
        if isinstance(self.target, TaskWorker):     # its user knows the function, not our method
            fn, args = (args[0], args[1:]) if method == "submit" and args else (getattr(self.target, "_fn", None), args)
            method = getattr(fn, "__name__", method)
        return retries.attempts(method, self.class_name, args, kwargs)

    def outcome(self, calling: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        """Carry out a call in this thread and context, a coroutine to its end; return (kind, value).

        What runs can tell by `calling` what it is part of.
        """
        _calling.set(calling)
        del calling                 # the traceback of what is raised keeps this frame
        try:
            if self.retries:
                _attempt_here.set(None)     # it is part of no attempt of whoever submitted it
                return self.again(method, args, kwargs, functools.partial(self._once, method, args, kwargs))
            return self._once(method, args, kwargs)
        except BaseException as error:      # of the event loop itself
            return _ERROR, error

    def _once(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        outcome = self.attempt(method, args, kwargs)
        return self._complete(outcome[1]) if isinstance(outcome[1], types.CoroutineType) else outcome

    async def outcome_async(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        """Do the same on the running loop, without blocking it."""
        if self.retries:
            once = functools.partial(self._once_async, method, args, kwargs)
            return await self.again_async(method, args, kwargs, once)
        return await self._once_async(method, args, kwargs)

    async def _once_async(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        outcome = self.attempt(method, args, kwargs)
        return await _captured(outcome[1]) if isinstance(outcome[1], types.CoroutineType) else outcome

    def again(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any],
              run: Callable[[], tuple[str, Any]]) -> tuple[str, Any]:
        """Return what `run()` comes to, which makes the call: once, or as often as the method is tried."""
        steps = self.attempts(method, args, kwargs)
        return run() if steps is None else _drive(steps, run, self.halt)

    async def again_async(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any],
                          run: Callable[[], Awaitable[tuple[str, Any]]]) -> tuple[str, Any]:
        steps = self.attempts(method, args, kwargs)
        return await run() if steps is None else await _drive_async(steps, run, self.halt)

    def call_within(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call by another method of the object: return its result, or a coroutine, or raise."""
        steps: Any = self.attempts(name, args, kwargs)
        next(steps)                         # that is: run it
        outcome = _attempt(method, args, kwargs)
        if isinstance(outcome[1], types.CoroutineType):
            return self._await_rest(steps, outcome[1], method, args, kwargs)
        return _result_of(*_drive(_resumed(steps, outcome), lambda: _attempt(method, args, kwargs), self.halt))

    async def _await_rest(self, steps: Generator[Any, Any, tuple[str, Any]], coroutine: Awaitable[Any],
                          method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _result_of(*await self.go_on(steps, coroutine, lambda: _captured(method(*args, **kwargs))))

    async def go_on(self, steps: Generator[Any, Any, tuple[str, Any]] | None, coroutine: Awaitable[Any],
                    run: Callable[[], Awaitable[tuple[str, Any]]]) -> tuple[str, Any]:
        """Go on with a retry loop, None: there is none, whose call has returned a coroutine."""
        outcome = await _captured(coroutine)
        return outcome if steps is None else await _drive_async(_resumed(steps, outcome), run, self.halt)

    def is_async(self, call: _Call) -> bool:
        """Tell whether the call belongs on the event loop."""
        return call.method in self._async_names or (
            isinstance(self.target, TaskWorker) and self.target._is_async(call))

    def close(self) -> None:
        """Drop the object, here, and end its loop."""
        number = id(self.target)
        try:
            has_finalizer = type(self.target).__weakrefoffset__
            self.target = None      # its __del__ runs now, if nobody else holds it
            if not has_finalizer:
                _limits_of.pop(number, None)
            if self._owns_loop and self._loop is not None:
                with _OtherLoop():
                    _close_loop(self._loop)
        except BaseException:
            logger.exception("exception while a worker was closed")

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            import asyncio
            self._loop = asyncio.new_event_loop()
            _private_loops.add(self._loop)
            if _here.is_ours:       # in sync mode the thread is the caller's, and so is its loop
                asyncio.set_event_loop(self._loop)
        return self._loop

    def tasks(self) -> Collection[asyncio.Task[Any]]:
        """Return the tasks of its own loop, if that runs; in any thread."""
        if self._loop is None or not self._loop.is_running():
            return ()
        import asyncio
        return asyncio.all_tasks(self._loop)

    def _complete(self, coroutine: Awaitable[Any]) -> tuple[str, Any]:
        """Run a coroutine to its end on this worker's loop, though another may run in this thread."""
        import asyncio
        loop = self._own_loop()
        if loop.is_running():       # sync mode: by another thread, or by a call around this one
            loop = asyncio.new_event_loop()
            _private_loops.add(loop)
        with _OtherLoop():
            try:
                return loop.run_until_complete(_captured(coroutine))
            finally:
                if loop is not self._loop:
                    _close_loop(loop)


def _retries_by_method(recipe: _Recipe) -> dict[str, _Retries]:
    """Return a _Retries for each method whose calls are ever made again, or validated."""
    made: dict[str, _Retries]
    cls, made = recipe.cls, {}
    if not (recipe.retries["num_retries"] or recipe.retries["retry_until"]):
        return made
    if issubclass(cls, TaskWorker):
        names = {"submit", "__call__", *(name for name, _ in _definitions(cls))}
    else:
        names = {name for base in cls.__mro__ if base.__module__.partition(".")[0] not in _MODELS
                 for name in vars(base) if not name.startswith("_") and base not in (object, Worker)}
    for name in names:
        chosen: Any = {option: value.get("submit" if name == "__call__" and name not in value else name, value["*"])
                  if isinstance(value, dict) else value for option, value in recipe.retries.items()}
        if (chosen["num_retries"] or chosen["retry_until"]) and callable(getattr(cls, name, None)):
            made[name] = _Retries(**chosen)
    return made


_MODELS = ("pydantic", "morphic")       # whose own methods are not the worker's


def _bare(method: Any) -> Any:
    """Return a bound method without the retries of `_retry_within`."""
    bare = _bare_of(getattr(method, "__func__", None))
    return method if bare is None else bare.__get__(method.__self__)


def _bare_of(fn: object) -> types.FunctionType | None:
    """Return the function that one of `_retry_within` wraps, else None: a decorator may have copied its attributes."""
    wrapper, bare = getattr(fn, "_retries", (None, None))
    return bare if wrapper is fn else None


def _retry_within(cls: type, name: str) -> Any:
    """Have `self.name()` in the methods of a worker's object retried by its own settings.

    The class is changed, for an object may be frozen, have slots or be a model. Objects that live in no
    worker, or in one without retries, are called as before.
    """
    with _naming:               # workers that are built side by side would wrap it once each
        return _retry_within_now(cls, name)


def _retry_within_now(cls: type, name: str) -> Any:
    bare = next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
    if not isinstance(bare, types.FunctionType):
        return None                         # a static or class method, or an object that has more to it than its call
    if name in vars(cls) and _bare_of(bare):
        return bare
    bare = _bare_of(bare) or bare

    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        runner = _runner_of(self)
        method = functools.partial(bare, self)
        if runner is None or runner.wrappers.get(name) is not wrapper:      # no worker's object, or by way of super()
            return method(*args, **kwargs)
        return runner.call_within(name, method, args, kwargs)

    async def call_async(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        runner = _runner_of(self)
        method = functools.partial(bare, self)
        if runner is None or runner.wrappers.get(name) is not wrapper:
            return await method(*args, **kwargs)
        return _result_of(*await runner.again_async(name, args, kwargs, lambda: _captured(method(*args, **kwargs))))

    wrapper: Any = functools.wraps(bare)(call_async if _is_async(bare) else call)
    wrapper._retries = wrapper, bare
    setattr(cls, name, wrapper)
    return wrapper


def _result_of(kind: str, value: Any) -> Any:
    """Return a result, or raise what was raised instead."""
    if kind is _RESULT:
        return value
    try:
        raise value
    finally:
        del value               # no cycle through the traceback


class _OtherLoop:
    """Within it this thread may run an event loop, though it is in the middle of another one."""

    def __enter__(self) -> None:
        import asyncio
        self.outer: Any = asyncio._get_running_loop()
        self.task = self.outer and asyncio.current_task(self.outer)
        if self.outer and self.task:
            asyncio.tasks._leave_task(self.outer, self.task)
        asyncio._set_running_loop(None)

    def __exit__(self, *exc_info: object) -> None:
        import asyncio
        asyncio._set_running_loop(self.outer)
        if self.task:
            asyncio.tasks._enter_task(self.outer, self.task)


async def _captured(coroutine: Awaitable[Any]) -> tuple[str, Any]:
    """Await and return (kind, value): SystemExit and its like would end the loop."""
    try:
        return _RESULT, await coroutine
    except BaseException as error:
        return _ERROR, _without_our_frame(error)


def _close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left on an event loop that no longer runs, and close it."""
    import asyncio
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _carry_out(runner: _Runner, call: _Call) -> bool:
    """Run the call in this thread and settle its future; return False if it was cancelled before."""
    context = call.context              # None if it has been settled
    if context is None or not call.future._begin():
        return False
    try:
        call.began = _now()
        if call.pool.keeper is not None:
            call.pool.keeper.watch(call)
        _settle(call.future, *context.run(runner.outcome, call, call.method, call.args, call.kwargs))
    except BaseException as error:
        _fail_call(call, error)
    finally:
        del call, context           # an exception's traceback keeps this frame, and they lead to the exception
    return True


class _Tally:
    """What has become of the calls of a worker. No lock: no thread comes into the middle of a +=."""

    def __init__(self) -> None:
        self.done = self.failed = self.cancelled = self.retried = self.deaths = self.retired = 0
        self.running = self.waiting = 0.0       # seconds

    def add(self, other: _Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


# === Backends: sync, thread, asyncio ===

_STARTS = 3             # in a row that failed, and the worker is given up


class _Backend:
    """Where one worker lives. The pool says start, submit, finish and, if it must, kill.

    None of them blocks, whoever calls. `started` is settled when the constructor has returned, with
    what it raised if it did; `ended` when nothing is left of the worker.
    """

    runs_inline = False             # `submit` runs the call: not to be called while placing
    prepares = False                # calls are pickled when they are submitted
    can_be_killed = True
    has_time_limits = True          # a call that takes too long can be ended
    is_spent = False                # it gets no more calls, and ends after those that it has
    is_replacement = False          # of one that was given up or retired, or an addition: `init` is over
    future: type[BaseFuture[Any]] = BaseFuture      # of a call to it

    @staticmethod
    def set_up(recipe: _Recipe, options: _Options) -> Any:
        """Return what each worker needs to be built, once for all."""

    @staticmethod
    def tear_down(pool: _Pool) -> None:
        """End what was set up: no worker is left."""

    @staticmethod
    def shared(fn: Callable[..., Any]) -> Any:
        """Return what stands for a function in many calls."""
        return fn

    @staticmethod
    def prepare(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the message of a call, where `prepares`, in the thread that submits it."""

    @staticmethod
    def complete(call: _Call, values: list[Any]) -> None:
        """Add the results that a prepared call has waited for to its message."""

    @staticmethod
    def value_of(future: BaseFuture[Any]) -> Any:
        """Return the result of a dependency, or raise what became of loading it."""
        return _result_of(*_outcome_of(future))

    def __init__(self, pool: _Pool, index: int) -> None:
        self.pool = pool
        self.index = index
        self.name = f"{pool.name}-{index}"
        self.calls: dict[_Call, None] = {}      # placed here and not settled, in order
        self.total: int = 0             # ever placed here
        self.tally: _Tally = _Tally()
        self.runner: Any = None
        self.halt = _Halt()
        self.started: Any = BaseFuture()
        self.ended: BaseFuture[None] = BaseFuture()

    def start(self) -> None:
        """Begin to build the user's object."""

    def make_thread(self, target: Callable[[], None], name: str) -> threading.Thread:
        """Make a thread of the worker's, not started. A daemon, or a call that never returns would hang the exit of
        the interpreter; what was submitted is finished by a hook that runs before daemons freeze.
        """
        make = self.pool.options.thread_factory or threading.Thread
        thread = make(target=target, name=name, daemon=True)
        if not isinstance(thread, threading.Thread):
            raise TypeError(f"thread_factory must return a threading.Thread, not {thread!r}")
        return thread

    def submit(self, call: _Call) -> None:
        """Take a call."""

    def interruption(self, call: _Call, kill: bool) -> Callable[[], Any] | None:
        """Return a function that ends this running call, at the cost of its worker with `kill`; None: there is none."""

    def finish(self) -> None:
        """End the worker once what was submitted is done."""

    def hurry(self) -> None:
        """Be told that the worker is stopped: nothing is tried again."""
        self.halt.set()

    def kill(self, why: str) -> None:
        """Fail what runs, telling why, and end the worker as soon as that can be done."""
        for call in list(self.calls):
            _settle(call.future, _ERROR, self.stopped(call, why, call.future.running()))
        self.finish()

    def stopped(self, call: _Call, why: str, started: bool | None) -> WorkerDiedError:
        """Return the error of a call whose worker is ended before its time."""
        when = {True: "in the middle of this call", False: "before it began this call", None: "before this call's end"}
        return WorkerDiedError(f"{self.name} {why}, {when[started]}", self.name, call.method, started=started,
                               deaths=call.deaths)

    def rest(self) -> None:
        """Be told that a worker which may be there for a while only has nothing to do."""
        if self.is_spent:
            self.pool.dismiss(self)

    def is_here(self) -> bool:
        """Tell whether this thread is the worker's, so that waiting for its end would be for ever."""
        return False

    def calls_here(self) -> Sequence[_Call]:
        """Return the calls that are being carried out because this thread has made them."""
        return ()

    def stalls_here(self) -> bool:
        """Tell whether waiting in this thread would stall the calls that run."""
        return False

    def overrun(self, call: _Call) -> None:
        """End a call that has run for too long, `call.overran` seconds; on the reader's thread."""

    def overrun_error(self, call: _Call, what: str) -> Any:
        return CallTimeoutError(f"{self.name} ran {call.shown()} for more than {call.overran:g} seconds, its "
                                f"call_timeout: {what}", call.method, self.name, call.overran)

    def is_stuck_here(self, call: _Call) -> bool:
        """Tell whether a call of this worker cannot begin, or go on, while this thread waits for it."""
        return False

    def beginning_of(self, call: _Call) -> float | None:
        """Return when a call began that runs, None where that is not known."""
        return call.began

    def where(self) -> str:
        """Return in words which worker this is."""
        return self.name

    def state(self) -> str:
        """Return in a word what it does if it runs no call."""
        return "idle"

    def endings(self) -> list[str]:
        """Return lines about what is left of its predecessors."""
        return []

    def stacks(self) -> Iterator[str]:
        """Yield texts that tell where its threads are."""
        yield from ()

    def _build(self, *args: Any) -> bool:
        """Make the runner and settle `started`; tell whether the constructor returned."""
        try:
            self.runner = self.pool.context.copy().run(_Runner, self.pool.recipe, self.halt, *args)
        except BaseException as error:
            self.failure = _start_error(_without_our_frame(error), self)
            _settle(self.started, _ERROR, self.failure)
            return False
        _settle(self.started, _RESULT, None)
        return True

    def _rebuild(self, *args: Any) -> bool:
        """Make the runner when `init` is over, in several tries if it was there before; tell whether it is there."""
        for _ in range(_STARTS if self.started.done() else 1):
            if self._build(*args):
                return True
            logger.warning("%s could not be built (%s)", self.name, self.failure)
        self.pool.lose(self, self.failure)
        return False


def _patched_by() -> str | None:
    """Return what has replaced this program's threads, "gevent" or "eventlet"; None if they are threads."""
    import _thread
    name = str(_thread.start_new_thread.__module__).partition(".")[0]
    return name if name in ("gevent", "eventlet") else None


def _show_name(name: str) -> None:
    """Have this thread carry the name of its worker: in logs, and in what `top` shows (Linux; 15 bytes)."""
    threading.current_thread().name = name
    head, _, index = name.rpartition("-")
    try:
        file = os.open("/proc/thread-self/comm", os.O_WRONLY)
    except OSError:
        return
    try:
        os.write(file, head.encode(errors="replace")[:14 - len(index)] + b"-" + index.encode())
    except OSError:
        pass
    finally:
        os.close(file)


def _stacks(threads: Iterable[Any]) -> Iterator[str]:
    """Yield the lines of the stacks of this process's threads of these numbers."""
    frames = sys._current_frames()
    for frame in map(frames.get, threads):
        stack: list[types.FrameType] = []
        while frame is not None:
            stack.insert(0, frame)
            frame = frame.f_back
        yield from _shown_stack(stack)


def _frames_of(coroutine: Any) -> Iterator[types.FrameType]:
    """Yield the frames of a coroutine that waits, and of what it waits for."""
    while coroutine is not None:
        for kind in ("cr", "gi", "ag"):
            if getattr(coroutine, f"{kind}_frame", None) is not None:
                yield getattr(coroutine, f"{kind}_frame")
                coroutine = getattr(coroutine, f"{kind}_await", None) or getattr(coroutine, "gi_yieldfrom", None)
                break
        else:
            return


def _shown_stack(frames: Iterable[types.FrameType]) -> Iterator[str]:
    """Yield the lines of a stack, without those of this module and of what carries it."""
    import traceback
    for frame in frames:
        name = frame.f_code.co_filename
        if name not in (__file__, threading.__file__) and "/asyncio/" not in name and "/selectors.py" not in name:
            yield from traceback.format_list(list(traceback.extract_stack(frame, 1)))


def _start_error(error: BaseException, backend: _Backend) -> BaseException:
    """Return what `init` raises when a constructor raised this: a SystemExit must not end the caller."""
    if isinstance(error, SystemExit) and backend.pool.options.mode is not ExecutionMode.Sync:
        died = WorkerDiedError(f"the constructor of {backend.name} raised SystemExit({error.code!r})", backend.name,
                               started=False)
        died.__cause__ = error
        return died
    return error


class _SyncBackend(_Backend):
    """Run each call at once, in the thread that makes it."""

    runs_inline = True
    has_time_limits = False

    def start(self) -> None:
        self.inside: dict[_Call, int] = {}      # the calls being carried out: by which thread
        self.is_over = False
        self.once = itertools.count()
        self._build()

    def submit(self, call: _Call) -> None:
        self._run(call)
        kind, value = call.future._outcome
        if kind is _ERROR and isinstance(value, (KeyboardInterrupt, SystemExit)):
            raise value

    def _run(self, call: _Call) -> None:
        self.inside[call] = threading.get_ident()
        try:
            _carry_out(self.runner, call)
        finally:
            del self.inside[call]
            if self.is_over:
                self._close()

    def finish(self) -> None:
        self.is_over = True
        self._close()

    def _close(self) -> None:
        """Close the runner, once, when no call is inside: it may be a call that ends its own worker."""
        if not self.inside and next(self.once) == 0:
            if self.runner is not None:
                self.runner.close()
            _settle(self.ended, _RESULT, None)

    def is_here(self) -> bool:
        return bool(self.calls_here())

    def calls_here(self) -> Sequence[_Call]:
        return [call for call in list(self.inside) if self.inside.get(call) == threading.get_ident()]

    def stacks(self) -> Iterator[str]:
        return _stacks(list(self.inside.values()))


class _ThreadBackend(_Backend):
    """One thread that takes calls from a queue. When it is retired, another one goes on with the same queue."""

    can_be_killed = False
    is_over = False                 # no call will come any more, or another worker has the next ones

    def start(self) -> None:
        self.inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self.submit = self.inbox.put    # type: ignore[assignment, method-assign]
        self._start_thread()

    def _start_thread(self) -> None:
        self.thread = self.make_thread(self._live, self.name)
        self.thread.start()

    def _live(self) -> None:
        try:
            self._main()
        except BaseException as error:      # of ours: the worker is given up
            logger.exception("an error of concurry's own, in the worker %s", self.name)
            begun = [call for call in list(self.calls) if _is_begun(call.future.__dict__.get("_claim"))]
            _in_any_case(
                *(functools.partial(_settle, call.future, _ERROR, error) for call in begun),
                functools.partial(_settle, self.started, _ERROR, error),
                functools.partial(self.pool.lose, self, error),
                functools.partial(_settle, self.ended, _RESULT, None))

    def finish(self) -> None:
        self.is_over = True
        self.inbox.put(None)

    def overrun(self, call: _Call) -> None:
        what = "a thread cannot be killed, it is left to itself, and a new worker takes its place"
        if _settle(call.future, _ERROR, self.overrun_error(call, what)):
            self.pool.replace(self)

    def interruption(self, call: _Call, kill: bool) -> Callable[[], Any] | None:
        return functools.partial(self.pool.replace, self) if kill else None

    def give_up(self) -> list[_Call]:
        """Return the calls that have not begun; the thread ends when it can, and nobody waits for that."""
        calls = _taken_from(self.inbox)
        self.halt.set()                 # the call that runs has failed: it is not made again
        self.finish()
        _settle(self.ended, _RESULT, None)
        return calls

    def is_here(self) -> bool:
        return self.thread is threading.current_thread()

    def is_stuck_here(self, call: _Call) -> bool:
        return self.is_here()

    def stacks(self) -> Iterator[str]:
        yield from _stacks([self.thread.ident])
        for task in self.runner.tasks() if self.runner is not None else ():
            lines = list(_shown_stack(_frames_of(task.get_coro())))
            yield from ["  in a coroutine:", *lines] if lines else ()

    def _main(self) -> None:
        _here.is_ours = True
        _show_name(self.name)
        while (self._rebuild() if self.is_replacement else self._build()) and self._work():
            self.tally.retired += 1
            self.is_replacement = True
            try:
                self._start_thread()
                return
            except Exception as error:          # at the interpreter's exit, or of a thread factory
                self.thread = threading.current_thread()
                logger.debug("%s: no new thread could be started, this one goes on with a new object (%s)",
                             self.name, error)
        _settle(self.ended, _RESULT, None)

    def _work(self) -> bool:
        """Carry out calls until no more will come; return True before that if the worker is to be retired."""
        left = self.pool.options.max_tasks_per_worker or math.inf
        while left:
            call = self.inbox.get()
            if call is None:
                self.runner.close()
                return False
            left -= _carry_out(self.runner, call)
            call = None         # an idle worker must not keep the last call's arguments and result
        self.runner.close()
        return not self.is_over


def _taken_from(inbox: queue.SimpleQueue[Any]) -> list[_Call]:
    """Return the calls that are in a queue, and take them out."""
    calls: list[_Call] = []
    while True:
        try:
            calls += filter(None, [inbox.get_nowait()])
        except queue.Empty:
            return calls


class _OnDemandThreadBackend(_ThreadBackend):
    """A thread that lives while there are calls; the object lives for one call.

    A TaskWorker has no state of the user's: it serves on, and the thread lingers for a moment.
    """

    def start(self) -> None:
        super().start()
        if self.pool.options.max_tasks_per_worker is not None:
            self.submit = self._count   # type: ignore[method-assign]

    def _count(self, call: _Call) -> None:
        self.is_spent = self.total >= self.pool.options.max_tasks_per_worker
        self.tally.retired += self.is_spent
        self.inbox.put(call)

    def _main(self) -> None:
        _here.is_ours = True
        _show_name(self.name)
        _settle(self.started, _RESULT, None)
        keeps = self._keeps()
        linger = self.pool.options.on_demand_linger if keeps else None
        runner = None
        while True:
            try:
                call = self.inbox.get(timeout=linger)
            except queue.Empty:
                self.pool.dismiss(self)
                call = self.inbox.get()         # None, unless a call was quicker
            if call is None:
                break
            runner = self._serve(call, runner, keeps)
            call = None
        if runner is not None:
            runner.close()
        _settle(self.ended, _RESULT, None)

    def _keeps(self) -> bool:
        return self.pool.recipe.cls is TaskWorker

    def rest(self) -> None:
        if self.is_spent or not self._keeps():
            self.pool.dismiss(self)

    def _serve(self, call: _Call, runner: _Runner | None, keeps: bool) -> _Runner | None:
        """Carry out a call, with the object made for it; return the runner if it may serve the next."""
        context = call.context
        if context is None or not call.future._begin():
            return runner
        try:
            runner = runner or self.pool.context.copy().run(_Runner, self.pool.recipe, self.halt)
        except BaseException as error:
            outcome: Any = (_ERROR, _start_error(_without_our_frame(error), self))
        else:
            outcome = self._outcome(runner, call, context)
            if not keeps:
                runner.close()
                runner = None
        _guard(lambda call: _settle(call.future, *outcome), call)
        return runner

    def _outcome(self, runner: _Runner, call: _Call, context: contextvars.Context) -> tuple[str, Any]:
        try:
            call.began = _now()
            if self.pool.keeper is not None:
                self.pool.keeper.watch(call)
            return context.run(runner.outcome, call, call.method, call.args, call.kwargs)
        except BaseException as error:
            logger.exception("an error of concurry's own, in the call %s: it fails", call)
            return _ERROR, error


class _AsyncioBackend(_Backend):
    """One event loop on one thread; plain methods run one at a time on a second thread beside it.

    To be retired is to get a new object, on a new loop, between two calls: so many are let in at a time, and the next
    ones are held back until all of those have ended.
    """

    def start(self) -> None:
        if _patched_by():
            raise RuntimeError(f"mode 'asyncio' needs threads, and {_patched_by()} has replaced them in this program: "
                               f"choose mode 'thread' or 'process'")
        self.inbox: collections.deque[_Call | None] = collections.deque()       # for the loop
        import asyncio
        self.is_over = False                    # the loop is stopped for good
        self.is_serving = False                 # it is neither being built nor being retired
        self.is_finishing = False               # no call will come any more
        self.is_woken = False                   # the loop knows that there is something in it
        self.waits: set[Any] = set()            # tasks that wait between attempts of plain methods
        self.plain: queue.SimpleQueue[Any] = queue.SimpleQueue()        # for the companion
        self.at_work: dict[_Call, None] = {}    # what runs on it; who takes it out decides: it goes on, or is given up
        self.given_up: set[threading.Thread] = set()
        # Where workers are retired: calls for the next object, those for this one that have not ended, ...
        self.held: collections.deque[_Call] = collections.deque()
        self.inside: dict[_Call, None] = {}
        self.left: int | Any = self.pool.options.max_tasks_per_worker       # ... and how many more it may have
        if self.left is not None:
            self.submit = self._hold    # type: ignore[method-assign]
        self.thread = self.make_thread(self._main, self.name)
        self.companion = self.make_thread(self._main_beside, self.name + "-plain")
        self.loop = asyncio.new_event_loop()
        try:
            self.companion.start()              # now: at exit no thread can be started any more
            self.thread.start()
        except BaseException as error:
            _settle(self.started, _ERROR, error)
            self.loop.close()
            raise

    def submit(self, call: _Call) -> None:
        if self.runner.is_async(call):
            self._to_loop(call)
        else:
            self.plain.put(call)

    def _hold(self, call: _Call) -> None:
        self.held.append(call)
        self._let_in()

    def _let_in(self, refused: object = None) -> None:
        """Send the calls on that this object may still have; for the one who places."""
        while self.held and self.left > 0:
            call = self.held[0]
            if call in self.calls:              # it is not settled yet
                self.inside[call] = None
                self.left -= 1
                _attend(call.future, "_wakers", functools.partial(self._let_out, call))
                type(self).submit(self, call)
            self.held.popleft()
        self._retire_if_due()

    def _let_out(self, call: _Call, future: BaseFuture[Any]) -> None:
        self.inside.pop(call, None)
        self._retire_if_due()

    def _retire_if_due(self) -> None:
        if self.left <= 0 and not self.inside and not self.is_over:
            try:
                self.loop.call_soon_threadsafe(self._retire)
            except RuntimeError:                # it is closed: somebody else was quicker
                pass

    def _retire(self) -> None:
        """Have the loop end for another one to take its place; on a loop, this one or the next, perhaps again."""
        if self.is_serving and self.left <= 0 and not self.inside:
            self.is_serving = False
            self.loop.stop()

    def finish(self) -> None:
        self.is_finishing = True
        self.plain.put(None)

    def kill(self, why: str) -> None:
        for call in list(self.calls):
            call.future.cancel()
        self._stop_loop()
        super().kill(why)

    def interruption(self, call: _Call, kill: bool) -> Callable[[], Any] | None:
        task = call.task
        if task:
            return functools.partial(self._interrupt, task)
        return functools.partial(self._replace_companion, call) if kill else None

    def _interrupt(self, task: asyncio.Task[Any]) -> None:
        try:
            task.get_loop().call_soon_threadsafe(task.cancel)
        except RuntimeError:        # it is closed, and the task cancelled by that
            pass

    def overrun(self, call: _Call) -> None:
        interrupt = self.interruption(call, True)
        what = ("it was cancelled" if call.task else "a thread cannot be killed, it is left to itself"
                if call in self.at_work else "it was waiting for its next attempt")
        if _settle(call.future, _ERROR, self.overrun_error(call, what)) and interrupt:
            interrupt()

    def _replace_companion(self, call: _Call) -> None:
        """Have the plain methods go on on another thread, with the same queue: what runs this call may never return."""
        if self.at_work.pop(call, self) is self:        # it has just ended, or waits for another attempt
            return
        logger.warning("%s: a plain method is given up, and its thread left to itself", self.name)
        self.tally.deaths += 1
        try:
            self.companion = self.make_thread(self._main_beside, self.name + "-plain")
            self.companion.start()
        except Exception as error:
            self.pool.lose(self, error)
            self.finish()
            self._stop_loop()

    def is_here(self) -> bool:
        return threading.current_thread() in (self.thread, self.companion)

    def stalls_here(self) -> bool:
        return threading.current_thread() is self.thread

    def is_stuck_here(self, call: _Call) -> bool:
        try:
            is_on_loop = call.task is not None or self.runner.is_async(call)
        except TypeError:               # it is settled, and its arguments are gone
            return False
        return threading.current_thread() is (self.thread if is_on_loop else self.companion)

    def stacks(self) -> Iterator[str]:
        yield from _stacks([self.thread.ident, self.companion.ident])
        for call in list(self.calls):
            if call.task is not None:
                yield f"  in the coroutine {call.method}:"
                yield from _shown_stack(_frames_of(call.task.get_coro()))

    def _to_loop(self, call: _Call | None) -> None:
        self.inbox.append(call)
        if not self.is_woken:
            self.is_woken = True
            self.loop.call_soon_threadsafe(self._begin_calls)

    def _begin_calls(self) -> None:
        self.is_woken = False           # first: who comes now wakes us again
        begun: list[Any] = []
        while self.inbox:
            call = self.inbox.popleft()
            if call is None:
                if not self.is_over:        # else the loop runs only to be closed
                    self._stop()
            else:
                _guard(self._begin_call, call, begun)
        if begun:
            self.loop.call_soon(self._look_after, begun)

    def _begin_call(self, call: _Call, begun: list[Any]) -> None:
        context = call.context
        if context is not None and call.future._begin():
            call.began = _now()
            if self.pool.keeper is not None:
                self.pool.keeper.watch(call)
            # In the context of the submitter; the task copies it.
            call.task = context.run(self.loop.create_task, self._drive(
                call, self.runner.outcome_async, call.method, call.args, call.kwargs))
            begun.append((call, call.task))

    def _start(self, call: _Call, context: contextvars.Context, run: Callable[..., Awaitable[tuple[str, Any]]],
               *args: Any) -> None:
        call.task = context.run(self.loop.create_task, self._drive(call, run, *args))
        self.loop.call_soon(self._look_after, [(call, call.task)])

    def _look_after(self, begun: list[tuple[_Call, Any]]) -> None:
        """Settle the calls whose tasks somebody has cancelled before their first step: nothing of `_drive` ran.

        Those steps are over by now. A done-callback of each task would take a fifth of a small call's time.
        """
        for call, task in begun:
            if task.cancelled():
                _guard(lambda call: _settle(call.future, _CANCELLED, None), call)

    async def _drive(self, call: _Call, run: Callable[..., Awaitable[tuple[str, Any]]], *args: Any) -> None:
        _calling.set(call)
        if call.steps is None:
            _attempt_here.set(None)
        try:
            outcome = await run(*args)
        except BaseException as error:      # of a retry filter, of looking for the method; cancelled between attempts
            import asyncio
            outcome = (_CANCELLED, None) if isinstance(error, asyncio.CancelledError) else (_ERROR, error)
        call.task = None
        _guard(lambda call: _settle(call.future, *outcome), call)

    def _main(self) -> None:
        import asyncio
        _here.is_ours = True
        _show_name(self.name)
        try:
            self._live()
            while not (self.is_over or self.is_finishing):
                self.tally.retired += 1
                self.is_replacement = True
                self.loop = asyncio.new_event_loop()
                self.loop.call_soon(self._begin_calls)      # of what has come since the other one was left
                self._live()
            self.companion.join()
        except BaseException as error:
            logger.exception("the event loop of %s failed", self.name)
            self.plain.put(None)
            self.pool.lose(self, error)
        finally:
            _settle(self.ended, _RESULT, None)

    def _live(self) -> None:
        """Serve on a loop until it is stopped, and close it."""
        import asyncio
        asyncio.set_event_loop(self.loop)
        self.loop.create_task(self._build_on_loop())
        is_left = False
        while not is_left:
            try:
                self.loop.run_forever()
                is_left = True
            except BaseException:       # a SystemExit in a task of the user's own
                logger.exception("exception on the event loop of %s; the loop goes on", self.name)
        if self.runner is not None:
            self.runner.close()
        try:
            _close_loop(self.loop)
        except BaseException:           # a task that is cancelled stops the loop, say
            logger.exception("exception while the event loop of %s was closed", self.name)

    async def _build_on_loop(self) -> None:
        try:
            self._build_here()
        except BaseException as error:      # of ours
            logger.exception("an error of concurry's own, in the worker %s", self.name)
            _settle(self.started, _ERROR, error)
            self.plain.put(None)
            self._stop()
            self.pool.lose(self, error)

    def _build_here(self) -> None:
        if not self.is_replacement:
            self.is_serving = self._build(self.loop)
            if not self.is_serving:
                self._stop()
        elif self._rebuild(self.loop):
            self.left = self.pool.options.max_tasks_per_worker
            self.is_serving = True
            self.pool.have(self._let_in)
        else:
            self.plain.put(None)

    def _stop(self) -> None:
        self.is_over = True
        self.loop.stop()

    def _main_beside(self) -> None:
        _here.is_ours = True
        me = threading.current_thread()
        _show_name(me.name)
        if self.started.exception() is None:
            while me not in self.given_up:
                call = self.plain.get()
                if call is None:
                    self._stop_loop()
                    break
                _guard(self._serve, call)
                call = None
            self.given_up.discard(me)

    def _stop_loop(self) -> None:
        try:
            self._to_loop(None)
        except RuntimeError:        # it is closed
            pass

    def _serve(self, call: _Call) -> None:
        """Carry out a plain method once; a coroutine that it returns goes on on the loop, as do waits."""
        context = call.context
        if context is None:
            return
        if call.steps is None:
            if not call.future._begin():
                return
            call.began = _now()
            if self.pool.keeper is not None:
                self.pool.keeper.watch(call)
            if self.runner.retries:
                call.steps = self.runner.attempts(call.method, call.args, call.kwargs)
            if call.steps is not None:
                context.run(_attempt_here.set, None)
                context.run(next, call.steps)       # that is: run it
        elif not call.is_again:         # a signal handler has raised while it was placed, and it came twice
            return
        call.is_again = False
        outcome = context.run(self._attempt, call)
        if isinstance(outcome[1], types.CoroutineType):
            once = functools.partial(self.runner._once_async, call.method, call.args, call.kwargs)
            self.loop.call_soon_threadsafe(
                _guard, self._start, call, context, self.runner.go_on, call.steps, outcome[1], once)
        elif call.steps is None:
            _settle(call.future, *outcome)
        else:
            self._step(call, context, outcome)

    def _step(self, call: _Call, context: contextvars.Context, answer: Any) -> None:
        """Go on with a retry loop: to a wait, another run, or its end."""
        if call.future.done():              # it took too long
            call.steps.close()
            return
        try:
            step = context.run(call.steps.send, answer)
        except StopIteration as end:
            _settle(call.future, *end.value)
            return
        except BaseException as error:      # a KeyboardInterrupt of a filter
            _settle(call.future, _ERROR, error)
            return
        if step is _RUN:
            call.is_again = True
            self.plain.put(call)
            return
        try:
            self.loop.call_soon_threadsafe(_guard, self._start_wait, call, context, step)
        except RuntimeError:            # it is closed: the worker is stopped
            self._step(call, context, True)

    def _start_wait(self, call: _Call, context: contextvars.Context, seconds: float) -> None:
        if self.halt.is_set:
            self._step(call, context, True)
            return

        async def wait() -> None:
            is_cut = await self.halt.pause_async(seconds)
            _guard(self._step, call, context, is_cut)
        self.waits.add(task := self.loop.create_task(wait()))
        task.add_done_callback(self.waits.discard)

    def _attempt(self, call: _Call) -> Any:
        _calling.set(call)
        self.at_work[call] = None
        try:
            if call.future.done():          # since it began: who did that may not have seen that it is at work
                return _CANCELLED, None
            return self.runner.attempt(call.method, call.args, call.kwargs)
        except BaseException as error:
            if self.runner.target is not None:
                return _ERROR, error
            # Its object is gone: the worker was killed between two attempts.
            return _ERROR, self.stopped(call, "was stopped between two attempts", True)
        finally:
            if self.at_work.pop(call, self) is self:
                self.given_up.add(threading.current_thread())


class _OnDemand:
    """A worker elsewhere that is made for one call; one for functions stays until it has been idle for a moment."""

    pool: Any
    total: int
    tally: _Tally
    is_finishing: bool
    reader: Any

    def submit(self, call: _Call) -> None:
        most = self.pool.options.max_tasks_per_worker
        is_retired = most is not None and self.total >= most
        self.tally.retired += is_retired
        self.is_spent: bool = is_retired or self.pool.recipe.cls is not TaskWorker
        super().submit(call)        # type: ignore[misc]

    def rest(self) -> None:
        self.reader.post(self._rest, self.total)

    def _rest(self, total: int) -> None:
        if self.is_spent or self.pool.closed is not None:
            self._leave(total)
        else:
            self.reader.later(self.pool.options.on_demand_linger, functools.partial(self._leave, total))

    def _leave(self, total: int) -> None:
        if total == self.total and not self.is_finishing:
            self.pool.dismiss(self)


# === What travels ===
#
# Pickle, protocol 5, and three things more. What the other side cannot import (defined in
# __main__, in a function, in a module made by hand, or hidden by a decorator) goes by value.
# Large buffers stay out of the stream. And an object that cannot travel is named by its path.
#
# By value, every object is first made empty and then filled, so that whatever it leads back to
# finds it already there: a function its own name, a method its class, a class its subclass.
#
# Globals: the functions of one module in one message share one new dict. A message thus brings
# the values of its submission and disturbs no other message's functions, which may be running;
# what was sent once (a worker class, a bound function) keeps its dict, and so its `global`
# state, for life. Functions of a module that can be imported get that module's own dict.
#
# Classes: a token names a class on both sides, so that it comes home as the original and is one
# class in its receiver. When it comes again its members are set anew, with the functions of the
# new message: attributes changed meanwhile are seen, methods and functions of a message share
# their globals. That is not for originals, nor for classes that were pinned, nor for what a
# process sends to itself; the members of an enum are never made twice.

_BUFFER_SIZE = 64 * 1024         # the size from which pickle writes bytes apart, uncopied
_MOST_CONTEXTS = 100             # exceptions before an exception that travel with it
_TRIES = 10_000                  # members looked at, at most, to find the one that fails

_classes: MutableMapping[bytes, Any] = weakref.WeakValueDictionary()   # token: class; type variables have tokens, too
_tokens: MutableMapping[Any, bytes] = weakref.WeakKeyDictionary()
_received: weakref.WeakSet[type] = weakref.WeakSet()    # classes which a further message may refresh
_naming = threading.RLock()                 # a finalizer may load something while it is held
_process = os.urandom(12)
_picklers: list[Any] = []                   # idle ones: making one costs twice a small call


class RemoteError(RuntimeError):
    """Stand for an exception that did not survive its trip.

    `type_name` is the qualified name of its class, `traceback` the text of its traceback.
    """
    def __init__(self, type_name: str, text: str, traceback: str = "") -> None:
        super().__init__(f"{type_name}: {text}" if text else type_name)
        self.type_name, self.text, self.traceback = type_name, text, traceback

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.type_name, self.text, self.traceback)


class _RemoteTraceback(Exception):
    """Show, as the cause of an exception, the traceback that stayed on the other side."""
    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def _dumps(obj: Any, roots: Callable[[], tuple[Any, ...]] | None = None) -> tuple[bytes, list[memoryview]]:
    """Return obj as (bytes, buffers): read-only or writable memoryviews of at least BUFFER_SIZE.

    Raises PicklingError that names the member which cannot travel. `roots` is called only then
    and returns the arguments of `explain`. It may be called from any thread, and from a
    `__reduce__` within itself.
    """
    try:
        pickler = _picklers.pop()
    except IndexError:
        pickler = _pickler_class()()
    try:
        pickler.dump(obj)
    except Exception as error:
        raise _explain(error, *(roots() if roots else ({"object": obj},))) from error
    buffers: list[memoryview]
    parts = pickler.parts
    if len(parts) == 1:
        data, buffers = parts.pop(), []
    else:
        data, buffers = _sorted_out(parts)
        parts.clear()
    # A large message has grown the memo, which is cleared at its full size each time.
    if len(data) < _BUFFER_SIZE:
        pickler.reset()
        _picklers.append(pickler)
    return data, buffers


_PLAINEST = frozenset([int, float, bool, str, type(None)])       # there is nothing in them to be asked about


def _dumps_plain(obj: Any) -> tuple[bytes, Sequence[memoryview]]:
    """Do as `_dumps` for what consists of nothing but the plainest."""
    return _pickle().dumps(obj, 5), ()


def _loads(data: bytes | bytearray, buffers: Iterable[Any] = ()) -> Any:
    """Return the object; buffers are `bytes` where the sender's were read-only, else bytearrays.

    Bytes and bytearrays of the sender become these very objects.
    """
    return _pickle().loads(data, buffers=buffers)


def _pin(cls: type) -> None:
    """Leave a class that was sent once, and its bases, as they are when they come again."""
    for each in cls.__mro__:
        _received.discard(each)


def _name_classes(obj: Any) -> None:
    """Give the classes of `__main__`, and those that obj leads to, their tokens before a fork."""
    for thing in list(vars(sys.modules["__main__"]).values()):
        if isinstance(thing, type) and thing.__module__ == "__main__":
            _token(thing)
    try:
        _dumps(obj)
    except Exception:               # what is inherited need not travel
        pass


def _be_forked() -> None:
    """Begin the life of a forked worker: its classes are copies of the parent's, and may change."""
    global _process, _naming
    _process, _naming = os.urandom(12), threading.RLock()
    _picklers.clear()
    for cls in list(_tokens):
        if isinstance(cls, type):
            _received.add(cls)


@functools.lru_cache(None)
def _pickle() -> Any:
    import pickle
    return pickle


@functools.lru_cache(None)
def _pickler_class() -> Any:
    class Pickler(_pickle().Pickler):    # type: ignore[misc]
        """Write to a list, apart from what is large; ask the reducers about what is special."""
        def __init__(self) -> None:
            self.parts: Any = []
            self.scopes: dict[int, Any] = {}    # id of a globals dict: its _Scope
            self.bare: set[int] = set()         # ids of what comes empty, for another fills it
            file = types.SimpleNamespace(write=self.parts.append)
            super().__init__(file, 5, buffer_callback=self.keep_apart)

        def reset(self) -> None:
            self.clear_memo()
            if self.scopes or self.bare:
                self.scopes, self.bare = {}, set()

        def keep_apart(self, buffer: Any) -> Any:
            try:
                raw = buffer.raw()
            except BufferError:         # not contiguous: pickle says so itself
                return True
            return raw.nbytes < _BUFFER_SIZE or self.parts.append(raw)

        def reducer_override(self, obj: Any) -> Any:
            kind = type(obj)
            reduce = _reducers.get(kind) or _reducers.get((kind.__module__, kind.__name__))
            if reduce is not None:
                return reduce(self, obj)
            if isinstance(obj, _families):
                return _reduce_relative(self, obj)
            return NotImplemented if _here.passed is None else _here.passed.reduce(obj)

    return Pickler


# --- Buffers

def _sorted_out(parts: list[Any]) -> tuple[bytes, list[memoryview]]:
    # The C pickler writes bytes and bytearrays from 64 KiB apart and uncopied, after a part that
    # ends in their opcode and size. Putting "next buffer" in place of these takes them out of
    # the stream: anywhere in the object, each once, in the order of the other buffers. Were they
    # written otherwise some day, they would simply stay in the stream.
    stream: list[bytes]
    stream, buffers = [], []
    for part in parts:
        if type(part) is memoryview:
            buffers.append(part)
            continue
        head = _without_header(stream[-1], part) if stream else None
        if head is None:
            stream.append(part)
        else:
            stream[-1] = head
            buffers.append(memoryview(part))
    return b"".join(stream), buffers


def _without_header(head: bytes, part: bytes | bytearray) -> bytes | None:    # type: ignore[return]
    size = len(part)
    if type(part) is bytearray:
        header, instead = b"\x96" + size.to_bytes(8, "little"), b"\x97"
    elif size >= 1 << 32:
        header, instead = b"\x8e" + size.to_bytes(8, "little"), b"\x97\x98"
    else:
        header, instead = b"B" + size.to_bytes(4, "little"), b"\x97\x98"
    is_frame = part[:9] == b"\x95" + (size - 9).to_bytes(8, "little", signed=True)
    if size >= _BUFFER_SIZE and head.endswith(header) and not is_frame:
        return head[:-len(header)] + instead


# --- By reference

def _is_importable(name: Any) -> bool:
    """Tell whether the other side can import the module: itself, as it is here."""
    if name == __name__:
        return True
    module = sys.modules.get(name)
    return name not in ("__main__", "__mp_main__") and getattr(module, "__spec__", None) is not None


def _is_found(obj: Any, qualname: str) -> bool:
    """Tell whether obj is what its module has under its name."""
    name = getattr(obj, "__module__", None)
    if not isinstance(name, str) or not _is_importable(name):
        return False
    found = sys.modules.get(name)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found is obj


def _import(name: str) -> types.ModuleType:
    __import__(name)
    return sys.modules[name]


def _reduce_module(pickler: Any, module: types.ModuleType) -> tuple[Any, ...]:
    name = module.__name__
    if sys.modules.get(name) is not module or not (name == "__main__" or _is_importable(name)):
        raise _pickle().PicklingError(
            f"cannot pickle module {name!r}: it cannot be imported by its name")
    return _import, (name,)


def _reduce_constant(pickler: Any, obj: Any) -> Any:
    """Send what dataclasses compares by identity, MISSING and the like, by its name."""
    module = sys.modules[type(obj).__module__]
    for name, value in vars(module).items():
        if value is obj:
            return getattr, (module, name)
    return NotImplemented


# --- Functions

class _Scope:
    """Stand for the globals of one module of the sender, within one message."""
    def __init__(self, variables: dict[str, Any]) -> None:
        names = ("__name__", "__file__", "__package__", "__doc__")
        self.variables = {name: variables[name] for name in names if name in variables}

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_scope, (self.variables,)


def _make_scope(variables: dict[str, Any]) -> dict[str, Any]:
    return {**variables, "__builtins__": builtins}


def _scope(pickler: Any, function: Any) -> Any:
    """Return a module's name or, for what cannot be imported, the message's _Scope."""
    variables = function.__globals__
    name = variables.get("__name__")
    if _is_importable(name) and getattr(sys.modules.get(name), "__dict__", None) is variables:
        return name
    # The dict is kept with it: one that is freed would lend its id to another.
    return pickler.scopes.setdefault(id(variables), (_Scope(variables), variables))[0]


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> tuple[list[str], list[str]]:
    """Return the names of globals that code uses, nested code included, and all its names."""
    import dis
    reads = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "DELETE_GLOBAL")
    used = {each.argval for each in dis.get_instructions(code) if each.opname in reads}
    names = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more = _names(inner)
            used.update(more[0])
            names.update(more[1])
    return sorted(used - {"__builtins__"}), sorted(names)


def _used_globals(function: types.FunctionType) -> dict[str, Any]:
    variables = function.__globals__
    return {name: variables[name] for name in _names(function.__code__)[0] if name in variables}


def _submodules(code: types.CodeType, values: Iterable[Any]) -> list[str]:
    """Return the names of submodules, such as `os.path`, that code reaches through modules."""
    found = [each.__name__ for each in values if isinstance(each, types.ModuleType)]
    for module in found:
        inner = (f"{module}.{name}" for name in _names(code)[1])
        found.extend(name for name in inner if name in sys.modules and name not in found)
    return [name for name in found if "." in name]


def _contents(function: types.FunctionType) -> list[tuple[Any, ...]]:
    """Return what the cells hold: one-tuples, empty ones for cells not yet filled."""
    contents: list[tuple[Any, ...]] = []
    for cell in function.__closure__ or ():
        try:
            contents.append((cell.cell_contents,))
        except ValueError:
            contents.append(())
    if function.__globals__.get("__name__") == "pydantic._internal._validate_call":
        contents = [each and (_unvalidated(*each),) for each in contents]
    return contents


def _attributes(function: types.FunctionType) -> dict[str, Any]:
    names = ("__defaults__", "__kwdefaults__", "__annotations__", "__type_params__")
    found: dict[str, Any] = {"__doc__": function.__doc__, "__module__": function.__module__,
                             "__qualname__": function.__qualname__}
    for name in names:
        try:
            value = getattr(function, name, None)
        except NameError:               # annotations that are evaluated late, and cannot be
            continue
        if value:
            found[name] = value
    return found


def _reduce_function(pickler: Any, function: types.FunctionType) -> Any:
    if _is_found(function, function.__qualname__):
        return NotImplemented
    if _is_task(function):
        return _function_of_task, (function.__module__, function.__qualname__)
    cells = function.__closure__
    pickler.bare.update(map(id, cells or ()))
    scope = _scope(pickler, function)
    made = _make_function, (function.__code__, scope, function.__name__, cells)
    if id(function) in pickler.bare:
        return made
    return made + (_function_state(function, scope), None, None, _fill_function)


def _is_task(function: types.FunctionType) -> bool:
    """Tell whether the function's name now means its handle: `@task` was there."""
    if not _is_importable(function.__module__):
        return False
    found: Any = sys.modules[function.__module__]
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return isinstance(found, _TaskFunction) and found.__wrapped__ is function


def _function_of_task(module: str, qualname: str) -> Any:
    return functools.reduce(getattr, qualname.split("."), _import(module)).__wrapped__


def _function_state(function: types.FunctionType, scope: str | _Scope) -> tuple[Any, ...]:
    contents = _contents(function)
    variables = {} if isinstance(scope, str) else _used_globals(function)
    values = [*variables.values(), *(each[0] for each in contents if each)]
    submodules = _submodules(function.__code__, values)
    return variables, submodules, contents, _attributes(function), vars(function)


def _make_function(code: types.CodeType, scope: str | dict[str, Any], name: str,
                   cells: tuple[types.CellType, ...] | None) -> types.FunctionType:
    variables = vars(_import(scope)) if isinstance(scope, str) else scope
    return types.FunctionType(code, variables, name, None, cells)


def _fill_function(function: types.FunctionType, state: tuple[Any, ...]) -> None:
    variables, submodules, contents, attributes, members = state
    function.__globals__.update(variables)
    for name in submodules:
        _import(name)
    for cell, content in zip(function.__closure__ or (), contents):
        if content:
            cell.cell_contents, = content
    for name, value in attributes.items():
        setattr(function, name, value)
    vars(function).update(members)


def _reduce_code(pickler: Any, code: types.CodeType) -> tuple[Any, ...]:
    return _load_code, (_dump_code(code),)


@functools.lru_cache(1024)
def _dump_code(code: types.CodeType) -> bytes:
    import marshal
    return marshal.dumps(code)


# One code object for all copies: the interpreter's specialisations then outlive a message.
@functools.lru_cache(1024)
def _load_code(data: bytes) -> Any:
    import marshal
    return marshal.loads(data)


def _reduce_cell(pickler: Any, cell: types.CellType) -> tuple[Any, ...]:
    if id(cell) in pickler.bare:        # its function fills it
        return types.CellType, ()
    try:
        return types.CellType, (), cell.cell_contents, None, None, _fill_cell
    except ValueError:
        return types.CellType, ()


def _fill_cell(cell: types.CellType, contents: Any) -> None:
    cell.cell_contents = contents


def _reduce_method(pickler: Any, method: types.MethodType) -> Any:
    """Send a method by its name, as pickle does, where that is sure to find it."""
    function, name = method.__func__, getattr(method, "__name__", "")
    if getattr(method.__self__, name, None) != method:
        return types.MethodType, (function, method.__self__)
    if type(function) is not types.FunctionType or _is_found(function, function.__qualname__):
        return NotImplemented
    return _make_method, (method.__self__, name, function)


def _make_method(owner: Any, name: str, function: types.FunctionType) -> Any:
    """Return the owner's own method, or a copy while the owner's class is still to be filled."""
    found = getattr(owner, name, None)
    if getattr(found, "__qualname__", None) == function.__qualname__:
        return found
    return types.MethodType(function, owner)


def _reduce_wrapper(pickler: Any, wrapper: Any) -> tuple[Any, ...]:
    return type(wrapper), (wrapper.__func__,)


def _reduce_property(pickler: Any, member: property) -> tuple[Any, ...]:
    return type(member), (member.fget, member.fset, member.fdel, member.__doc__)


def _reduce_cached_property(pickler: Any, member: Any) -> tuple[Any, ...]:       # up to 3.11 it holds a lock
    state = {name: value for name, value in vars(member).items() if name != "lock"}
    return type(member), (member.func,), state


def _reduce_cache(pickler: Any, cache: Any) -> Any:
    if _is_found(cache, getattr(cache, "__qualname__", "")):
        return NotImplemented
    # The function's state comes with the cache's, for it may use the cache by its global name.
    function = cache.__wrapped__
    state = None
    if type(function) is types.FunctionType and not _is_found(function, function.__qualname__):
        pickler.bare.add(id(function))
        state = _function_state(function, _scope(pickler, function))
    made = _make_cache, (function, cache.cache_parameters())
    return made + ((function, state, vars(cache)), None, None, _fill_cache)


def _make_cache(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _fill_cache(cache: Any, state: tuple[Any, ...]) -> None:
    function, function_state, members = state
    if function_state is not None:
        _fill_function(function, function_state)
    vars(cache).update(members)


def _reduce_proxy(pickler: Any, proxy: types.MappingProxyType[Any, Any]) -> tuple[Any, ...]:
    import gc
    return types.MappingProxyType, (gc.get_referents(proxy)[0],)


def _reduce_headers(pickler: Any, headers: Any) -> tuple[Any, ...]:
    """Send the read-only headers of aiohttp, which are part of its exceptions, as a copy."""
    return type(headers), (headers.copy(),)


def _reduce_weak_dict(pickler: Any, mapping: weakref.WeakKeyDictionary[Any, Any]) -> tuple[Any, ...]:
    return type(mapping), (dict(mapping),)


class _Validated:
    """Validate a call as pydantic's `validate_call` does, also when morphic asked for it.

    The validator is built at the first call: only then is all there that annotations mention.
    """
    def __init__(self, function: Any, hints: dict[str, Any] | None, options: dict[str, Any]) -> None:
        self.function, self.hints, self.options = function, hints, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._validator(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Validated, (self.function, self.hints, self.options)

    @functools.cached_property
    def _validator(self) -> Any:
        validate_call = _optional("pydantic").validate_call
        if self.hints:
            self.function.__annotations__ = self.hints
        return validate_call(**self.options)(self.function)


def _unvalidated(call: Any) -> Any:
    """Return what takes the place of pydantic's wrapper, which holds code of its own."""
    wrapper = getattr(call, "__self__", call)
    if type(wrapper).__name__ != "ValidateCallWrapper":
        return call
    config = getattr(getattr(wrapper, "config_wrapper", None), "config_dict", None)
    validate_return = getattr(wrapper, "validate_return", False)
    options = {"config": config or None, "validate_return": validate_return}
    return _Validated(wrapper.function, _hints(wrapper.function), options)


def _hints(function: Any) -> dict[str, Any] | None:
    """Evaluate annotations that are strings: their names mean something only at home."""
    if not any(isinstance(each, str) for each in getattr(function, "__annotations__", {}).values()):
        return None
    from typing import get_type_hints
    try:
        return get_type_hints(function, include_extras=True)
    except Exception:
        return None


# --- Classes

def _token(thing: Any) -> bytes:
    token = _tokens.get(thing)
    if token is None:
        token = _tokens.setdefault(thing, os.urandom(12))
        _classes[token] = thing
    return token


def _known(token: bytes, make: Callable[..., Any], *args: Any) -> Any:
    """Return what the token names here, else make it: the first to arrive keeps the name."""
    thing = _classes.get(token)
    if thing is not None:
        return thing
    made = make(*args)
    with _naming:
        thing = _classes.setdefault(token, made)
        if thing is made:
            _tokens[made] = token
            _received.add(made)
    return thing


def _reduce_class(pickler: Any, cls: type) -> Any:
    if _is_found(cls, cls.__qualname__):
        return NotImplemented
    if not cls.__flags__ & 1 << 9:      # not a heap type: made in C
        return _reduce_builtin(cls)
    enum = sys.modules.get("enum")
    make: Callable[..., Any]
    content: Any
    if enum and isinstance(cls, enum.EnumMeta):
        make, content = _make_enum, _enum_content(cls)
    else:
        make, content = _make_class, vars(cls).get("__slots__")
    args = make, type(cls), cls.__name__, cls.__bases__, cls.__module__, content
    registered: Sequence[Any] = ()
    if isinstance(cls, _abc().ABCMeta):
        registered = [each() for each in _abc()._get_dump(cls)[0] if each() is not None]
    state = _process, _members(cls), registered
    return _known, (_token(cls), *args), state, None, None, _fill_class


def _abc() -> Any:
    import abc
    return abc


def _reduce_builtin(cls: type) -> Any:
    for name, value in vars(types).items():
        if value is cls:
            return getattr, (types, name)
    return NotImplemented


# What making the class makes, and what pydantic keeps of the frame that a class was defined in.
_MADE = {"__dict__", "__weakref__", "__slots__", "_abc_impl", "__pydantic_parent_namespace__",
         "_member_names_", "_member_map_", "_value2member_map_", "_hashable_values_",
         "_unhashable_values_", "_unhashable_values_map_"}


def _members(cls: type) -> dict[str, Any]:
    descriptors = types.MemberDescriptorType, types.GetSetDescriptorType
    made = _MADE.union(vars(cls).get("_member_map_", ()))
    found = {name: value for name, value in vars(cls).items() if name not in made
             and not (type(value) in descriptors and value.__objclass__ is cls)}
    return {**found, "__qualname__": cls.__qualname__}


def _make_class(meta: type, name: str, bases: tuple[type, ...], module: str, slots: Any) -> Any:
    namespace = {"__module__": module}
    if slots is not None:
        namespace["__slots__"] = slots
    return _quiet_class(meta, name, bases, namespace)


def _quiet_class(meta: type, name: str, bases: tuple[Any, ...], namespace: dict[str, Any]) -> Any:
    """Make a class without running `__init_subclass__` of its bases.

    It has run at home, perhaps with arguments of which nothing is left; what it did to the class
    comes with the members. A first base of the same layout, taken away afterwards, hides it.
    """
    new = _abc().ABCMeta.__new__ if issubclass(meta, _abc().ABCMeta) else type.__new__
    if all("__init_subclass__" not in vars(each)
           for base in bases for each in base.__mro__[:-1]):
        return new(meta, name, bases, namespace)
    for base in bases:
        try:
            cls = new(meta, name, (_quiet_base(base), *bases), dict(namespace))
            type.__setattr__(cls, "__bases__", bases)
            return cls
        except TypeError:               # the layout is another base's
            continue
    return new(meta, name, bases, namespace)


def _quiet_base(base: Any) -> Any:
    layout = base
    while layout.__base__ is not None and _shape(layout) == _shape(layout.__base__):
        layout = layout.__base__
    slots = [slot for slot, had in zip(("__dict__", "__weakref__"), _shape(layout)[1:])
             if had and layout.__flags__ & 1 << 9]
    namespace = {"__slots__": slots, "__init_subclass__": classmethod(_ignore)}
    parent = layout.__base__ if slots else object
    return _quiet_class(type(parent), "Quiet", (parent,), namespace)


def _shape(cls: type) -> tuple[int, bool, bool]:
    return cls.__basicsize__, cls.__dictoffset__ != 0, cls.__weakrefoffset__ != 0


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _fill_class(cls: type, state: tuple[Any, ...]) -> None:
    process, members, registered = state
    if process == _process or cls not in _received:
        return
    for name, value in members.items():
        type.__setattr__(cls, name, value)
    for each in registered:
        _abc().ABCMeta.register(cls, each)


def _enum_content(cls: Any) -> tuple[Any, ...]:
    """Return the mixed-in type, the boundary, and of each member its name, plain value of that
    type, value and attributes.
    """
    kinds = (int, float, str, bytes, tuple)
    kind = next((each for each in kinds if issubclass(cls._member_type_, each)), None)
    ours = {"_value_", "_name_", "__objclass__", "_sort_order_", "_inverted_"}
    members = [(name, kind and _plain(kind, member), member._value_,
                {key: value for key, value in vars(member).items() if key not in ours})
               for name, member in cls._member_map_.items()]
    return kind, vars(cls).get("_boundary_"), members


def _plain(kind: Any, member: Any) -> Any:
    return kind.__pos__(member) if kind in (int, float) else kind.__getitem__(member, slice(None))


def _make_enum(meta: Any, name: str, bases: tuple[type, ...], module: str, content: Any) -> Any:
    """Let enum's own machinery make the class, with a `__new__` that knows what comes out."""
    kind, boundary, members = content

    def new(cls: Any, made: Any) -> Any:
        if kind is tuple:               # wrapped once more
            made, = made
        plain, value, attributes = made.content
        member = kind.__new__(cls, plain) if kind else object.__new__(cls)
        member._value_ = value
        vars(member).update(attributes)
        return member

    namespace = meta.__prepare__(name, bases)
    # Its own hooks, if it has any, come with the other members.
    hooks = {"__new__": new, "__init__": _ignore, "__reduce_ex__": object.__reduce_ex__}
    for key, value in {"__module__": module, **hooks}.items():
        namespace[key] = value
    for key, *content in members:
        namespace[key] = types.SimpleNamespace(content=content)
    options = {} if boundary is None else {"boundary": boundary}
    cls = sys.modules["enum"].EnumMeta.__new__(meta, name, bases, namespace, **options)
    for key in ("__init__", "__reduce_ex__", "__new_member__"):
        if key in vars(cls):
            type.__delattr__(cls, key)
    return cls


def _reduce_type_variable(pickler: Any, variable: Any) -> Any:
    name = variable.__name__
    if _is_found(variable, name):
        return NotImplemented
    options = {key: getattr(variable, f"__{key}__", None)
               for key in ("bound", "covariant", "contravariant")}
    options = {key: value for key, value in options.items() if value}
    constraints = getattr(variable, "__constraints__", ())
    return _known, (_token(variable), _make_type_variable, type(variable), variable.__module__,
                    (name, *constraints), options)


def _make_type_variable(kind: Any, module: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    variable = kind(*args, **options)
    variable.__module__ = module
    return variable


def _reduce_new_type(pickler: Any, new_type: Any) -> Any:
    if _is_found(new_type, new_type.__qualname__):
        return NotImplemented
    args = new_type.__qualname__, new_type.__supertype__
    return _make_type_variable, (type(new_type), new_type.__module__, args, {})


# Of these every subclass needs its reducer too.
_families = (type, property, staticmethod, classmethod)


def _reduce_relative(pickler: Any, obj: Any) -> Any:
    """Reduce a class with a metaclass, or an object of a subclass of property and its kind."""
    if isinstance(obj, type):
        return _reduce_class(pickler, obj)
    family = next(each for each in _families if isinstance(obj, each))
    return _reducers[family](pickler, obj) + (vars(obj),)


# By type; by name what not everybody has imported.
_reducers: dict[Any, Callable[[Any, Any], Any]] = {
    type: _reduce_class,
    types.FunctionType: _reduce_function,
    types.CodeType: _reduce_code,
    types.CellType: _reduce_cell,
    types.MethodType: _reduce_method,
    types.ModuleType: _reduce_module,
    types.MappingProxyType: _reduce_proxy,
    weakref.WeakKeyDictionary: _reduce_weak_dict,
    staticmethod: _reduce_wrapper,
    classmethod: _reduce_wrapper,
    property: _reduce_property,
    functools.cached_property: _reduce_cached_property,
    type(functools.lru_cache(_ignore)): _reduce_cache,
    ("multidict._multidict", "CIMultiDictProxy"): _reduce_headers,
    ("multidict._multidict", "MultiDictProxy"): _reduce_headers,
    ("ray", "ObjectRef"): lambda pickler, ref: _reduce_ref(ref),
    ("ray.actor", "ActorHandle"): lambda pickler, actor: _reduce_ref(actor),
    ("typing", "TypeVar"): _reduce_type_variable,
    ("typing", "ParamSpec"): _reduce_type_variable,
    ("typing", "TypeVarTuple"): _reduce_type_variable,
    ("typing", "NewType"): _reduce_new_type,
    ("dataclasses", "_FIELD_BASE"): _reduce_constant,
    ("dataclasses", "_MISSING_TYPE"): _reduce_constant,
    ("dataclasses", "_KW_ONLY_TYPE"): _reduce_constant,
    ("dataclasses", "_HAS_DEFAULT_FACTORY_CLASS"): _reduce_constant,
}


# --- What cannot travel

def _explain(error: Exception, roots: dict[str, Any], of: Any = "") -> Any:
    """Return the PicklingError that tells which member of the roots cannot travel, and why.

    `roots` are objects by their label, `of` follows the label in the message. Pickling is tried
    again, member by member, so this takes about as long as pickling for each step of the path.
    """
    for label, root in roots.items():
        failure = _failure(root)
        if failure is not None:
            try:
                path, culprit, error = _trace(root, failure)
            except Exception:           # of the user's objects, when they are looked into
                path, culprit, error = [], root, failure
            plain = next((n for n, step in enumerate(path) if step.startswith(",")), len(path))
            where = "".join([label, *path[:plain], of, *path[plain:]])
            return _pickle().PicklingError(f"{where}: {_reason(culprit, error)}")
    return _pickle().PicklingError(f"{', '.join(roots)}{of}: {type(error).__name__}: {error}")


def _reason(culprit: Any, error: Exception) -> str:
    text = str(error)
    if isinstance(error, _pickle().PicklingError) or text.startswith("cannot pickle"):
        return text
    if isinstance(error, RecursionError):
        return f"cannot pickle {type(culprit).__name__!r} object: it is nested too deeply"
    text = f"{type(error).__name__}: {text}"
    return f"cannot pickle {type(culprit).__name__!r} object: {text}"


def _failure(obj: Any) -> Exception | None:    # type: ignore[return]
    try:
        _pickler_class()().dump(obj)
    except Exception as error:
        return error


def _trace(obj: Any, failure: Exception) -> tuple[list[str], Any, Exception]:
    """Follow the members that fail; return the path, the innermost of them, and its error."""
    path: list[str]
    path, seen, tries = [], {id(obj)}, _TRIES
    simple = (int, str, float, bytes, bool, type(None))
    while len(path) < 50 and not isinstance(failure, RecursionError):
        for label, member in _parts(obj):
            if id(member) in seen or type(member) in simple or tries == 0:
                continue
            tries -= 1
            found = _failure(member)
            if found is not None:
                path.append(label)
                seen.add(id(member))
                obj, failure = member, found
                break
        else:
            break
    return path, obj, failure


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """Yield (label, member) of what pickle looks into; labels after a comma begin a new thing."""
    if type(obj) is dict:
        for key, value in obj.items():
            yield f" key {key!r}", key
            yield f"[{key!r}]", value
    elif type(obj) in (list, tuple):
        yield from ((f"[{n}]", member) for n, member in enumerate(obj))
    elif type(obj) in (set, frozenset):
        yield from ((" member", member) for member in obj)
    elif type(obj) is types.FunctionType:
        yield from _function_parts(obj)
    elif isinstance(obj, type):
        name = obj.__qualname__
        yield from ((f", {name}.{key}", value) for key, value in _members(obj).items())
        yield from ((f", base of {name}", base) for base in obj.__bases__)
    else:
        yield from _reduced_parts(obj)


def _function_parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    name = function.__qualname__
    cells = zip(function.__code__.co_freevars, _contents(function))
    for variable, content in cells:
        yield from ((f", closure variable {variable!r} of {name}", each) for each in content)
    for variable, value in _used_globals(function).items():
        yield f", global {variable!r} of {name}", value
    for attribute, value in {**_attributes(function), **vars(function)}.items():
        yield f", {name}.{attribute}", value


def _reduced_parts(obj: Any) -> Iterator[tuple[str, Any]]:
    try:
        reduced = _pickler_class()().reducer_override(obj)
        if reduced is NotImplemented:
            reduced = obj.__reduce_ex__(5)
    except Exception:
        return
    if not (isinstance(reduced, tuple) and len(reduced) > 1 and isinstance(reduced[1], tuple)):
        return                          # a name, or nonsense
    args: Any
    args, state, items, pairs = (*reduced, None, None, None)[1:5]
    states = state if type(state) is tuple else (state,)
    for each in states:                 # instance dict, slots
        if type(each) is dict:
            yield from ((f".{key}", value) for key, value in each.items())
        else:
            yield "", each
    yield from ((f"[{n}]", member) for n, member in enumerate(items or ()))
    yield from ((f"[{key!r}]", value) for key, value in pairs or ())
    names = {id(value): f".{key}" for key, value in getattr(obj, "__dict__", {}).items()}
    yield from ((names.get(id(member), ""), member) for member in args)


# --- Exceptions

def _dump_error(error: BaseException) -> tuple[bytes, list[memoryview]]:
    """Return an exception as (bytes, buffers), with its traceback's text; never raises.

    One that does not survive the trip, which is tried here, becomes a RemoteError at its end.
    """
    data, buffers = _surviving(error)
    return _pickle().dumps((data, _name_of(error), _text(error), _traceback(error), _contexts(error)), 5), buffers


def _name_of(error: BaseException) -> str:
    cls = type(error)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _contexts(error: BaseException) -> list[tuple[bytes, str, str]]:
    """Return the exceptions before this one, as they travel: those of earlier attempts are among them."""
    found = []
    for context in _with_contexts(error)[1:1 + _MOST_CONTEXTS]:
        data, buffers = _surviving(context)
        found.append((b"" if buffers else data, _name_of(context), _text(context)))
    return found


def _load_error(data: bytes | bytearray, buffers: Iterable[Any] = ()) -> BaseException:
    """Return the exception, with a RemoteTraceback as its cause; never raises."""
    data, name, text, traceback, contexts = _loads(data)
    error = last = _load_one(data, buffers, name, text, traceback)
    _set(error, "__cause__", _RemoteTraceback(traceback))
    for data, name, text in contexts:
        earlier = _load_one(data, (), name, text, "")
        _set(last, "__context__", earlier)
        last = earlier
    return error


def _load_one(data: bytes | bytearray, buffers: Iterable[Any], name: str, text: str, traceback: str) -> BaseException:
    try:
        error = _loads(data, buffers) if data else None
    except BaseException:               # loading runs code of the user's
        error = None
    return error if isinstance(error, BaseException) else RemoteError(name, text, traceback)


def _text(error: BaseException) -> str:
    try:
        return str.__str__(str(error))      # exactly str, whatever it returned
    except BaseException:
        return "<its text cannot be had>"


def _traceback(error: BaseException) -> str:
    from traceback import format_exception
    try:
        return "".join(format_exception(type(error), error, error.__traceback__))
    except BaseException:
        return f"{type(error).__name__}: {_text(error)}\n"


def _surviving(error: BaseException) -> tuple[bytes, list[memoryview]]:
    """Return the pickled exception, or what it can be rebuilt from, or no data if neither would come out as it was."""
    return _as_it_is(lambda error: error, error) or _as_it_is(_Rebuilt, error) or (b"", [])


class _Rebuilt:
    """An exception without its constructor, which may demand more than `args`; less the members that do not travel."""

    def __init__(self, error: BaseException) -> None:
        self.lost: list[str] = []
        self.cls = type(error)
        # As the class in C has it, from which the user's is derived: OSError's `args` are not all of it.
        reduced: Any = *_builtin_base(self.cls).__reduce__(error), None
        args, members = reduced[1:3]
        slots = [name for name in copyreg._slotnames(self.cls) if hasattr(error, name)]     # type: ignore[attr-defined]
        if isinstance(error, BaseExceptionGroup):
            self.args: Any = error.message, [_portable(each) for each in error.exceptions]
        else:
            self.args = tuple(self.kept(f"args[{n}]", arg, _shown(arg)) for n, arg in enumerate(args))
        members = {**(members or {}), **{name: getattr(error, name) for name in slots}}
        state = {name: self.kept(name, value, _LEFT_OUT) for name, value in members.items()}
        self.state = {name: value for name, value in state.items() if value is not _LEFT_OUT}

    def kept(self, name: str, value: Any, instead: Any) -> Any:
        try:
            data, buffers = _dumps(value)
            _loads(data, _copies(buffers))
            return value
        except Exception:               # loading runs code of the user's
            self.lost.append(name)
            return instead

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_error, (self.cls, self.args, self.state, self.lost)


def _rebuild_error(cls: Any, args: tuple[Any, ...], state: dict[str, Any], lost: list[str]) -> Any:
    error = cls.__new__(cls, *args)
    _builtin_base(cls).__init__(error, *args)
    for name, value in state.items():
        _set(error, name, value)
    if lost:
        error.add_note(f"these members could not travel from the worker: {', '.join(lost)}")
    return error


def _builtin_base(cls: type) -> Any:
    return next(base for base in cls.__mro__ if base.__module__ == "builtins")


def _portable(error: BaseException) -> Any:
    """Return what an exception within another one travels as."""
    if isinstance(error, BaseExceptionGroup):
        return _Rebuilt(error)
    forms = (lambda error: error), _Rebuilt
    return next((form(error) for form in forms if _as_it_is(form, error)), RemoteError(_name_of(error), _text(error)))


def _copies(buffers: Iterable[memoryview]) -> list[bytes | bytearray]:
    return [bytes(each) if each.readonly else bytearray(each) for each in buffers]


def _as_it_is(form: Callable[[Any], Any], error: BaseException) -> Any:
    """Return the exception pickled in this form; None if it would not come out as it was.

    Of one that has lost a member the text may differ.
    """
    try:
        portable = form(error)
        data, buffers = _dumps(portable)
        plain = (str, int, float, bool, type(None))
        if (type(error).__module__ == "builtins" and not vars(error)
                and all(type(arg) in plain for arg in error.args)):
            return data, buffers
        back = _loads(data, _copies(buffers))
        has_lost = getattr(portable, "lost", None) and type(back) is type(error) and str(back) is not None
        if has_lost or _is_same(back, error, data):
            return data, buffers
    except BaseException:               # loading runs code of the user's
        pass
    return None


def _is_same(back: Any, error: BaseException, data: bytes) -> bool:
    if type(back) is not type(error):
        return False
    return (_text(back) == _text(error) and len(back.args) == len(error.args)
            or _dumps(back)[0] == data)


# === Starting processes ===
#
#   parent                        fork server (a bare interpreter, one per parent)
#     launch ---- request ------->  fork ------------------> worker: main(connection)
#        |  <--- pid -------------                             |  watcher thread
#        |
#        |  link: a socket pair per worker; nothing is ever written to it
#        +-------------------------------------------------->  O_ASYNC: SIGKILL on hang-up
#        |  the parent's pidfd
#        +-------------------------------------------------->  watcher, and the server
#        |  the worker's pidfd: the sentinel
#        <---------------------------------------------------
#
# A process is watched by a descriptor of the process itself (pidfd), in both directions: an
# end of file may come late or never, for a descriptor lives on in whoever inherited it.
# spawn is the same bare interpreter without the server, fork the same worker without the
# interpreter: the three differ in who makes the process, and in who can reap it.

_FILE = os.path.abspath(globals().get("__file__", ""))   # now: the directory may change
_START_TIMEOUT = 60.0        # seconds for an answer of the fork server, which may be swapped out
_END_TIMEOUT = 5.0           # seconds for the fork server, and for a worker's exit functions, before they are killed

# What workers need, imported once in the fork server: their memory is shared, and each
# starts without it. What is missing here costs time, not correctness.
_PRELOAD = ("collections.abc fcntl gc importlib.machinery marshal multiprocessing.resource_tracker pickle select "
           "selectors signal socket struct traceback")

# A bare interpreter finds this very file: by its path, so that neither the packages around it
# nor the user's main module run; by sys.path and name where there is no such path (in a zip).
# -c puts the working directory in front of sys.path, where a logging.py may lie.
_BOOT = """
import sys
sys.path[:] = filter(None, sys.path)
name, where, function, *arguments = sys.argv[1:]
"""
_BOOT_FILE = _BOOT + """
from importlib import util
spec = util.spec_from_file_location(name, where)
sys.modules[name] = module = util.module_from_spec(spec)
spec.loader.exec_module(module)
module._begin_interpreter(function, arguments)
"""
_BOOT_NAME = _BOOT + """
from importlib import import_module
path, sys.path[:] = sys.path[:], where.split("\\n")
module = import_module(name)
sys.path[:] = path
module._begin_interpreter(function, arguments)
"""

try:
    os.close(os.pidfd_open(os.getpid()))
except (AttributeError, OSError):           # no Linux, or an old kernel or a strict sandbox
    def _own_pidfd() -> list[int]:
        return []

    def _open_sentinel(pid: int, link: Any) -> int:           # the worker holds the other end
        return os.dup(link.fileno())

    def _send_signal(process: _Process, number: int) -> None:
        os.kill(process.pid, number)
else:
    def _own_pidfd() -> list[int]:                        # opened by its own process: never another's
        return [os.pidfd_open(os.getpid())]

    def _open_sentinel(pid: int, link: Any) -> int:
        return os.pidfd_open(pid)

    def _send_signal(process: _Process, number: int) -> None:
        import signal
        signal.pidfd_send_signal(process.sentinel, number)

if sys.platform == "linux":
    def _kill_on_hangup(descriptor: int) -> None:
        """Have the kernel kill the group that this process leads when the other end of a socket is closed.

        The only way that works while C code holds the GIL. The setting belongs to the open
        file, not to the descriptor: each worker needs a socket of its own.
        """
        import fcntl
        import signal
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(descriptor, getattr(fcntl, "F_SETSIG", 10), signal.SIGKILL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
else:
    def _kill_on_hangup(descriptor: int) -> None:
        """Leave it to the watcher thread: no other system can send SIGKILL."""


def _readable(*descriptors: int, timeout: float | None = None) -> set[int]:
    """Wait until some of the descriptors can be read or are hung up; return those."""
    import selectors
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        return {key.fd for key, _ in selector.select(timeout)}


# --- What a forked child of the user must not keep

_owned: weakref.WeakSet[Any] = weakref.WeakSet()


def _own(resource: T) -> T:
    """Close the resource in children that the user forks; return it.

    It needs a `close()`, may be closed twice, and is not kept alive.
    """
    _owned.add(resource)
    return resource


def _blocking(connection: Any) -> Any:
    """Return a socket of ours that waits as long as needed, whatever `socket.setdefaulttimeout` or a patch has set."""
    connection.setblocking(True)
    return _own(connection)


def _socket_pair() -> tuple[Any, ...]:
    import socket
    return tuple(map(_blocking, socket.socketpair()))


def _socket_at(descriptor: int) -> Any:
    """Return the socket that this process was given as a descriptor."""
    import socket
    return _blocking(socket.socket(fileno=descriptor))


def _disown_all() -> None:
    """Forget, in a forked child, all that belongs to the parent."""
    for resource in list(_owned):
        resource.close()
    _owned.clear()
    _fork_servers.__init__()    # type: ignore[misc]     # another thread may have held the lock


class _Process:
    """A worker process, or the fork server, as its parent sees it.

    `sentinel` is a descriptor that becomes readable when the process is dead. `reap(pid)`
    returns the wait status of the dead process, or raises OSError where it is unknown.
    """

    def __init__(self, pid: int, link: Any, reap: Callable[[int], int]) -> None:
        self.pid = pid
        self.link = link
        self._reap = reap
        self._lock = threading.Lock()
        self._exitcode: int | None = None
        self._is_reaped = False
        try:
            self.sentinel: Any = _open_sentinel(pid, link)
        except OSError:
            os.kill(pid, 9)     # not reaped yet, so the number is still its own
            reap(pid)
            raise
        _own(self)

    def kill(self, number: int = 9) -> None:
        """Send a signal, KILL if not told otherwise; do nothing when the death has been seen already."""
        if not self._is_reaped and self.sentinel is not None:
            try:
                _send_signal(self, number)
            except (OSError, TypeError):        # it is gone; or was closed just now, by another thread
                pass

    def perish(self, error: BaseException) -> None:
        """Do what failed, in a timer say, once more."""
        self.kill()

    def halt(self) -> None:
        """Stop the process until it gets SIGCONT; return when it does nothing any more, where that can be seen."""
        import signal
        self.kill(signal.SIGSTOP)
        deadline = time.monotonic() + 1         # one that does not stop is asleep in the kernel: it does nothing
        # Looked at again and again: of a process that is no child of ours nothing tells it. It takes microseconds.
        try:
            while time.monotonic() < deadline:
                with open(f"/proc/{self.pid}/stat", "rb", 0) as file:
                    if file.read().rpartition(b") ")[2][:1] in b"TZX":
                        break
                time.sleep(0.0001)
        except OSError:
            pass

    def exitcode(self) -> int | None:
        """Return the exit status, or minus the signal's number, or None when unknown.

        Call it when the sentinel has fired. It kills the process, if that still runs, and the programs of its group. It
        does so before it reaps the process, because afterwards the system may give the group's number to another. The
        code is unknown if the user's own os.wait has reaped the process, or if the fork server is gone.
        """
        with self._lock:
            if not self._is_reaped:
                self.kill()
                _kill_group(self.pid)
                try:
                    self._exitcode = os.waitstatus_to_exitcode(self._reap(self.pid))
                except OSError:
                    pass
                self._is_reaped = True
        return self._exitcode

    def close(self) -> None:
        """Close our descriptors. A worker that still lives is killed by that."""
        self.link.close()
        sentinel, self.sentinel = self.sentinel, None
        if sentinel is not None:
            os.close(sentinel)


def _reap_child(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def _kill_group(pid: int) -> None:
    """Kill the process group that a worker leads: the programs that its calls have started."""
    try:
        os.killpg(pid, 9)
    except OSError:             # there is none: the worker has not come so far, or is the fork server
        pass


# --- Three ways to make the process

def _launch(method: str, connection: Any, main: Callable[[Any], None]) -> _Process:
    """Start a process that runs `main(connection)`; return a Process.

    `main` is a function of this module, taken by name. The caller keeps its own copy of the
    connection. OSError is raised, and nothing left behind, when the start fails; a process
    that fails later is seen by its sentinel. From any thread.
    """
    link, far = _socket_pair()
    copies = []
    try:
        # Copies, for the fork method's child closes what is owned, and from 3 on, for where
        # the standard streams are closed a socket may have got one of their numbers.
        for resource in connection, far:
            copies.append(_copy_descriptor(resource))
        copies += _own_pidfd()
        pid, reap = _START[method](main.__name__, *copies)
        return _Process(pid, link, reap)
    except BaseException:
        link.close()
        raise
    finally:
        far.close()
        for descriptor in copies:
            os.close(descriptor)


def _copy_descriptor(resource: Any) -> int:
    import fcntl
    return fcntl.fcntl(resource, fcntl.F_DUPFD_CLOEXEC, 3)


def _launch_by_server(main: str, *descriptors: int) -> tuple[int, Callable[[int], int]]:
    server = _fork_servers.get()
    try:
        return server.ask(main, *descriptors), server.reap
    except ConnectionError:
        _fork_servers.drop_dead(timeout=0.1)     # its end may come just after the end of file
        raise


def _launch_by_spawn(main: str, *descriptors: int) -> tuple[int, Callable[[int], int]]:
    return _start_interpreter("_run_worker", descriptors, main), _reap_child


def _launch_by_fork(main: str, *descriptors: int) -> tuple[int, Callable[[int], int]]:
    if _patched_by() == "eventlet":
        raise RuntimeError("mp_context='fork' does not work after eventlet's monkey patch, because other green threads "
                           "would keep running in the worker: choose 'forkserver' or 'spawn'")
    for module in ("fcntl", "multiprocessing.process", "selectors", "signal", "socket", "traceback"):
        __import__(module)      # now: the child finds import locks as they are
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()      # else the child writes it too
        except (AttributeError, OSError, RuntimeError, ValueError):
            pass
    return _unsignalled(_fork_worker, _forget_parent, main, *descriptors), _reap_child


_START = {"forkserver": _launch_by_server, "spawn": _launch_by_spawn, "fork": _launch_by_fork}


def _unsignalled(function: Callable[..., T], *arguments: Any) -> T:
    """Call the function with all signals blocked.

    A process that it starts begins with them blocked: a Ctrl-C before the process has its
    handlers would print a traceback, or run the handlers of the user's program.
    """
    import signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        return function(*arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _interpreter() -> str:
    """Return the path of the Python that worker processes run on; RuntimeError where this program has none.

    The program's own file would do no better: it would start itself again and again.
    """
    if getattr(sys, "frozen", False):
        reason = "this program is frozen (sys.frozen)"
    else:
        name = os.path.basename(os.path.realpath(sys.executable or "")).lower()
        if ("python" in name or "pypy" in name) and os.access(sys.executable, os.X_OK) \
                and os.path.isfile(sys.executable):
            return sys.executable
        reason = f"sys.executable is {sys.executable!r}"
    raise RuntimeError(f"worker processes need a Python interpreter, and none was found: {reason}; choose "
                       f"mp_context='fork', which does not need one")


def _start_interpreter(function: str, descriptors: Sequence[int], *arguments: str) -> int:
    """Execute a bare interpreter that calls a function of this module; return its pid."""
    import subprocess
    name = os.path.splitext(os.path.basename(_FILE))[0] if __name__ == "__main__" else __name__
    if os.path.isfile(_FILE):
        code, where = _BOOT_FILE, _FILE
    else:
        code, where = _BOOT_NAME, "\n".join(filter(None, sys.path))
    command = [_interpreter(), *subprocess._args_from_interpreter_flags(),      # type: ignore[attr-defined]
               "-c", code, name, where, function, *arguments, *map(str, descriptors)]
    popen = _unsignalled(functools.partial(
        subprocess.Popen, command, stdin=subprocess.DEVNULL, pass_fds=descriptors))
    popen.returncode = 0        # ours to reap: subprocess would warn, and wait for it too
    return popen.pid


def _fork_worker(prepare: Callable[[], object], main: str, *descriptors: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        _run_worker(main, *descriptors, prepare=prepare)
    finally:
        os._exit(1)             # never up the stack of the parent


# --- The fork server

class _ForkServer(_Process):
    """The parent's end of a fork server. Its link carries the requests.

    A request is a few bytes and some descriptors, the first for the answer. So there is no
    lock to hold while an answer is awaited, and callers cannot take each other's: not those
    in other threads, and not a `__del__` that the garbage collector runs in the middle.
    """

    def __init__(self) -> None:
        link, far = _socket_pair()
        link.settimeout(_START_TIMEOUT)
        descriptors = []
        try:
            descriptors.append(_copy_descriptor(far))
            descriptors += _own_pidfd()
            super().__init__(_start_interpreter("_serve_forks", descriptors), link, _reap_child)
        except BaseException:
            link.close()        # a server that has started ends by this
            raise
        finally:
            far.close()
            for descriptor in descriptors:
                os.close(descriptor)

    def ask(self, request: str, *descriptors: int) -> int:
        """Return the server's answer, a pid or a wait status; raise its OSError."""
        import errno
        import socket
        answer, far = _socket_pair()
        with answer, far:
            answer.settimeout(_START_TIMEOUT)
            socket.send_fds(self.link, [request.encode()], [far.fileno(), *descriptors])
            far.close()
            number = int(answer.recv(32) or -errno.ECONNRESET)
        if number < 0:
            raise OSError(-number, os.strerror(-number), "fork server")
        return number

    def reap(self, pid: int) -> int:
        return self.ask(str(pid))

    def stop(self) -> None:
        """End the server and the workers that it has started."""
        self.link.close()
        _readable(self.sentinel, timeout=_END_TIMEOUT)
        self.exitcode()
        self.close()


class _ForkServers:
    """The one fork server of this process, made when needed and again when it has died."""

    def __init__(self) -> None:
        # Reentrant, for the garbage collector may run a `__del__` that launches.
        self._lock = threading.RLock()
        self._server: _ForkServer | None = None

    def get(self) -> _ForkServer:
        with self._lock:
            self.drop_dead()
            if not self._server:
                server = _ForkServer()
                if self._server:
                    server.stop()       # a `__del__` was quicker
                else:
                    self._server = server
            return self._server

    def drop_dead(self, timeout: float = 0) -> None:
        with self._lock:
            if self._server and _readable(self._server.sentinel, timeout=timeout):
                self.close()

    def close(self) -> None:
        """End the server, if there is one, and wait for its end."""
        server, self._server = self._server, None
        if server:
            server.stop()


_fork_servers = _ForkServers()
_close_server = _fork_servers.close
atexit.register(_close_server)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


def _serve_forks(control: Any, *parent: int) -> NoReturn:
    """Fork and reap workers as asked, until the parent is gone; then kill those left."""
    import gc
    import socket
    control = _socket_at(control)
    # Closed in workers, which have their own.
    kept = [_own(open(pidfd, "rb", 0)) for pidfd in parent]     # noqa: F841
    children: set[int] = set()
    gc.collect()
    gc.freeze()                 # a collection in a worker would unshare the memory
    try:
        # No thread may ever run here: there would be locks that nobody lets go of.
        while _readable(control.fileno(), *parent).isdisjoint(parent):
            request, descriptors, flags, _ = socket.recv_fds(control, 256, 8)
            if not request:
                break
            is_whole = not flags & socket.MSG_CTRUNC    # else descriptors were lost on their way
            _answer_request(is_whole and request.decode(), children, descriptors)
    finally:
        # They see the parent's death themselves, but for one: in C code that holds the GIL
        # while some child that the user forked keeps the link open.
        for pid in children:
            os.kill(pid, 9)
            _kill_group(pid)
        os._exit(0)


def _answer_request(request: str | Literal[False], children: set[int], descriptors: list[int]) -> None:
    try:
        number = _fork_or_reap(request, children, *descriptors)
    except OSError as error:
        number = -error.errno    # type: ignore[operator]
    try:
        os.write(descriptors[0], b"%d" % number)
    except (IndexError, OSError):
        pass                    # no way to answer: the parent sees an end of file
    for descriptor in descriptors:
        os.close(descriptor)


def _fork_or_reap(request: str | Literal[False], children: set[int], answer: Any = None, *descriptors: int) -> int:
    import errno
    if not request:
        raise OSError(errno.EMFILE, "no descriptors")
    if request.isdigit():
        children.discard(int(request))
        return _reap_child(int(request))
    pid = _fork_worker(functools.partial(os.close, answer), request, *descriptors)
    children.add(pid)
    return pid


# --- In the new process

def _begin_interpreter(function: str, arguments: Iterable[str]) -> None:
    """Begin a bare interpreter's life: the first thing that it calls in this module."""
    for module in _PRELOAD.split():
        try:
            __import__(module)
        except ImportError:         # of multiprocessing's, in a Python without semaphores
            pass
    _fill_standard_streams()
    parent_name = __name__.rpartition(".")[0]
    if parent_name and parent_name not in sys.modules:
        sys.meta_path.insert(0, _LoadedModule(sys.modules.pop(__name__)))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = types.ModuleType("__main__")
    sys.argv[:] = [""]
    _reset_signals()
    globals()[function](*(int(word) if word.isdigit() else word for word in arguments))


def _fill_standard_streams() -> None:
    """Open those that are closed: no socket may become the standard output of programs."""
    spare = 0
    while spare < 3:
        spare = os.open(os.devnull, os.O_RDWR)
    os.close(spare)


class _LoadedModule:
    """An importer that hands out this module, loaded without the packages around it.

    As a mere entry in sys.modules, `import package.module` would find it, then import the
    package, and the package would lack its attribute.
    """

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module
        self.spec: Any = module.__spec__

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        from importlib.machinery import ModuleSpec
        if name == self.spec.name:
            return ModuleSpec(name, self, origin=self.spec.origin)    # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        return self.module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self.spec


def _reset_signals() -> None:
    """Give a process the signals of a fresh program; SIGINT is the parent's business."""
    import signal
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGCHLD):     # the parent may have ignored them
        signal.signal(number, signal.SIG_DFL)
    # Not SIG_IGN: the programs that a task starts would inherit it.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _know_oneself(name: str) -> None:
    """Have multiprocessing know this process by the name of its worker: log records and many tools look there."""
    from multiprocessing import process
    process.current_process().name = name


def _know_parent(tracker: int | None, name: str, pid: int, authkey: bytes) -> None:
    """Have multiprocessing know the parent, have its key and its resource tracker.

    A tracker of the worker's own would unlink, at the worker's end, shared memory that others still use.
    """
    from multiprocessing import process
    parent: Any = process._ParentProcess(name, pid, _lifeline)       # type: ignore[attr-defined]
    process._parent_process = parent        # type: ignore[attr-defined]
    process.current_process().authkey = authkey
    if tracker is not None:
        from multiprocessing import resource_tracker
        os.set_inheritable(tracker, False)
        resource_tracker._resource_tracker._fd = tracker        # type: ignore[attr-defined]


_lifeline = -1                  # in a worker: a descriptor that can be read when the parent is dead


def _forget_parent() -> None:
    """Drop, in a child of the fork method, what it has inherited beyond memory."""
    if _patched_by() == "gevent":       # else the parent's greenlets would go on here
        hub = sys.modules["gevent.hub"]
        hub.set_hub(hub.Hub(default=False))
    atexit._clear()
    atexit.register(_close_server)
    _reset_signals()
    _fill_standard_streams()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        # What programs do not inherit is no standard stream, but something of the parent's: its own was closed.
        if stream == 0 or not os.get_inheritable(stream):
            os.dup2(nowhere, stream)
    os.close(nowhere)
    sys.stdin = open(0, closefd=False)
    if "multiprocessing.util" in sys.modules:
        _forget_multiprocessing(sys.modules["multiprocessing.util"])


def _forget_multiprocessing(util: Any) -> None:
    """Do as multiprocessing does in a child that it forks: its queues would not work."""
    sys.modules["multiprocessing.process"]._children.clear()
    util._finalizer_registry.clear()
    util._run_after_forkers()
    atexit.register(util._exit_function)


def _run_worker(main: str, connection: int, link: int, *parent: int,
                prepare: Callable[[], object] | None = None) -> NoReturn:
    """Run a worker's whole life in this process, and end the process."""
    import traceback
    global _lifeline
    code = 1
    try:
        os.setpgid(0, 0)        # with whatever its calls start it is ended as a group
        if prepare:
            prepare()
        for descriptor in (connection, link, *parent):
            os.set_inheritable(descriptor, False)
        _lifeline = (*parent, link)[0]
        _watch_parent(_socket_at(link),
                     *(_own(open(pidfd, "rb", 0)) for pidfd in parent))
        with _socket_at(connection) as worker_end:
            globals()[main](worker_end)
        code = _exit_code
    except SystemExit:          # of a signal handler, between two calls
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        _end_process(code)


def _end_process(code: int) -> NoReturn:
    """End the process: exit functions, for some seconds at most, and output; no waiting for the user's threads."""
    finish: Any
    try:
        threading.Thread(target=_exit_late, args=(code,), name="end of the process", daemon=True).start()
    except RuntimeError:        # no more threads: the parent looks to the time, too
        pass
    for finish in (atexit._run_exitfuncs, lambda: sys.stdout.flush(), lambda: sys.stderr.flush()):
        try:
            finish()
        except BaseException:
            pass
    os._exit(code)


def _exit_late(code: int) -> None:
    time.sleep(_END_TIMEOUT)
    os._exit(code)


def _watch_parent(*resources: Any) -> None:
    """Kill this process, and its group, when the parent dies, or has died already."""
    _kill_on_hangup(resources[0].fileno())
    threading.Thread(target=_follow_parent, args=resources, name="parent watcher", daemon=True).start()


def _follow_parent(*resources: Any) -> None:
    try:
        _readable(*(resource.fileno() for resource in resources))
    finally:
        os.killpg(os.getpid(), 9)


# === The wire ===
#
# One socket pair per worker process. A message is a header, the sizes of its buffers, a pickle and
# the buffers, as they lie in memory. The caller's thread sends what the socket takes and leaves the
# rest to the reader; nobody waits. The worker takes one call at a time out of the socket, and its
# answer leaves before it takes the next: what it had not taken when it died had not begun. The
# parent keeps the worker's end open too, to look.

def _load_wire() -> None:
    """Import what only process mode needs."""
    global selectors, socket
    import selectors
    import socket


# Kind, number of buffers, bytes of pickle; of an answer the microseconds it took, of a call the number of its function.
_HEADER = struct.Struct("<B3xIIQ")
_MOST = 1 << 48         # bytes: whoever says there are more is mistaken
_TRUSTED = 1 << 26      # bytes: memory is taken for so many before they have come
_SIZE = struct.Struct("<Q")             # of a buffer, times two, plus one if it is read-only
_INDEX = struct.Struct("<I?")           # of the worker in its pool, and whether a tracker comes along: received first

# Kinds of message: to the worker ...
_PLACE, _RECIPE, _SHARED, _FORGET, _VALUES, _CALL = range(6)
# ... from it, ...
_BUILT, _NOT_BUILT, _TICKET, _PROGRESS, _RETRIED, _RETIRED, _ENDING, _RETURNED, _RAISED, _NOT_LOADED = range(6, 16)
# ... and to it on its second socket.
_VERDICT = 16


def _message(kind: int, portable: tuple[bytes, Sequence[memoryview]], number: int = 0) -> list[bytes | memoryview]:
    """Return the parts of a message, to be sent one after the other."""
    data, buffers = portable
    head = _HEADER.pack(kind, len(buffers), min(number, 0xFFFFFFFF), len(data))
    if buffers:
        head += b"".join(_SIZE.pack(buffer.nbytes * 2 + buffer.readonly) for buffer in buffers)
    return [head + data, *buffers] if len(data) < _BUFFER_SIZE else [head, data, *buffers]


def _receive(connection: Any) -> tuple[int, int, bytes, list[bytes | bytearray]]:
    """Wait for a message and return (kind, number, pickle, buffers); EOFError at the end."""
    kind, count, number, size = _HEADER.unpack(_read(connection, _HEADER.size))
    sizes = [_SIZE.unpack(_read(connection, _SIZE.size))[0] for _ in range(count)]
    data = _read(connection, size)
    return kind, number, data, [_read(connection, size >> 1) if size & 1
                                else _read_into(connection, bytearray(size >> 1)) for size in sizes]


def _read(connection: Any, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL) if size else b""
    if len(data) == size:
        return data
    if not data:
        raise EOFError
    whole = bytearray(size)             # a signal came in between
    whole[:len(data)] = data
    return bytes(_read_into(connection, whole, len(data)))


def _read_into(connection: Any, whole: bytearray, filled: int = 0) -> bytearray:
    view = memoryview(whole)
    while filled < len(whole):
        more = connection.recv_into(view[filled:], 0, socket.MSG_WAITALL)
        if not more:
            raise EOFError
        filled += more
    return whole


def _send_all(connection: Any, parts: Iterable[bytes | memoryview]) -> None:
    """Send everything, waiting as needed."""
    for part in parts:
        connection.sendall(part)


class _Inbox:
    """Put together the messages that arrive at the parent in pieces, without waiting for any.

    What is large is received in place: `_parts` asks for the number of bytes it needs next.
    """

    def __init__(self, connection: Any, kinds: Container[int]) -> None:
        self.connection = connection
        self.kinds = kinds
        self.is_at_end = False
        self._messages: list[tuple[Any, ...]] = []      # the one that has just become complete
        self._bytes, self._filled = bytearray(), 0      # what has come of the bytes needed, and perhaps more
        self._parts = self._take_apart()
        self._needed = next(self._parts)

    def receive(self) -> Iterator[tuple[int, int, bytearray, list[bytes | bytearray]]]:
        """Take what is there; yield the complete messages. What is none raises, after those before it."""
        while not self.is_at_end:
            try:
                count, wanted = self._receive_some()
            except BlockingIOError:
                break
            except OSError:                 # reset by a dead worker
                count = wanted = 0
            self.is_at_end = not count
            self._filled += count
            while self._filled >= self._needed:
                self._needed = self._parts.send(self._cut(self._needed))
                if self._messages:
                    yield self._messages.pop()
            if count < wanted:              # the socket is empty
                break

    def _receive_some(self) -> tuple[int, int]:
        if self._needed < _BUFFER_SIZE:
            chunk = self.connection.recv(_BUFFER_SIZE)
            self._bytes += chunk
            return len(chunk), _BUFFER_SIZE
        if len(self._bytes) == self._filled:        # no room: not at once for all that is announced, wrongly perhaps
            whole = bytearray(min(self._needed, max(2 * self._filled, _TRUSTED)))
            whole[:self._filled] = self._bytes
            self._bytes = whole
        wanted = len(self._bytes) - self._filled
        return self.connection.recv_into(memoryview(self._bytes)[self._filled:]), wanted

    def _cut(self, size: int) -> bytearray:
        self._filled -= size
        if not self._filled:
            piece, self._bytes = self._bytes, bytearray()
        else:
            piece = self._bytes[:size]
            del self._bytes[:size]
        return piece

    def _take_apart(self) -> Generator[int, bytearray, None]:
        while True:
            kind, count, number, size = _HEADER.unpack((yield _HEADER.size))
            if kind not in self.kinds or size > _MOST:
                raise ValueError(f"a message of kind {kind} and {size} bytes")
            sizes: list[int] = []
            for _ in range(count):
                sizes += _SIZE.unpack((yield _SIZE.size))
                if sizes[-1] > _MOST:
                    raise ValueError(f"a buffer of {sizes[-1]} bytes")
            data = yield size
            buffers: list[bytes | bytearray] = []
            for size in sizes:
                buffer = yield size >> 1
                buffers.append(bytes(buffer) if size & 1 else buffer)
            self._messages.append((kind, number, data, buffers))


# === Backend: process ===

_QUICK = 500            # microseconds: workers whose calls take less get calls sent ahead ...
_AHEAD = 16             # ... so many: they cannot be cancelled any more, but save waiting for each

_SIGCONT = 19 if sys.platform == "darwin" else 18
_MOST_ENDING = 4        # recycled processes of one worker that run their exit functions; then the oldest is killed
_LONGEST_DELAY = 10.0   # seconds between two tries to start a process that the system has refused
_DUMP_TIMEOUT = 1.0     # seconds: what has not begun to write them by then does not run
_DUMP_PAUSE = 0.1       # seconds without more of it: that was all, for nothing tells its end
_OUR_LINES = f'  File "{_FILE}"', f'  File "{threading.__file__}"'      # that tell nobody anything


def _dump_signal() -> int | Any:
    """Return the signal at which a worker process writes its stacks to the lane: one of the kernel's spare ones."""
    import signal
    return signal.SIGRTMAX - 1 if sys.platform == "linux" else None


# The worker's side

class _Place:
    """Stand, in a pickled call, for the result of a future that is not done yet."""

    values: Sequence[Any] = ()  # in the worker: the results for the call that comes next, pickled until that is loaded

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return _value_at, (self.index,)


def _value_at(index: int) -> Any:
    return _Place.values[index]


class _Shared:
    """A function that goes to each worker of a pool once, for many calls: before their first argument."""

    numbers = itertools.count(1)
    functions: dict[int, Any] = {}  # in the worker: by number

    def __init__(self, fn: Any) -> None:
        self.number = next(self.numbers)
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.kept: dict[bytes, LimitSet] = {}
        self.portable = _frozen(_dumps_keeping(self.kept, fn, lambda: ({"the function": fn},)))
        self.holders: weakref.WeakSet[_Link] = weakref.WeakSet()    # the links that have sent it

    def __del__(self) -> None:
        for link in _all_of(self.holders):
            link.forgotten.append(self.number)


_MOST_KNOWN = 100       # functions that a pool shares by itself


def _shared_by(pool: _Pool, fn: Any) -> _Shared | None:
    """Return what stands for the first argument of a call if it is a function that is shared, else None.

    One that the workers import by its name is, as long as it is what its module has under that name: to
    look for it costs, here and there, more than all else in a small call.
    """
    if type(fn) is _Shared:
        return fn
    if type(fn) is not types.FunctionType and type(fn) is not types.BuiltinFunctionType:
        return None
    shared, name = pool.known.get(fn), fn.__qualname__
    if shared is not None:
        return shared if getattr(sys.modules.get(fn.__module__), name, None) is fn else None
    if len(pool.known) < _MOST_KNOWN and "." not in name and _is_found(fn, name):
        shared = pool.known[fn] = _Shared(fn)
    return shared


def _shared_function(number: int) -> Any:
    fn = _Shared.functions[number]
    if type(fn) is tuple:               # at its first use, so that an error of it is a call's
        fn = _Shared.functions[number] = _loads(*fn)
    return fn


def _worker_main(connection: socket.socket) -> None:
    """Live as a worker process: the recipe comes first, then calls, until the parent hangs up."""
    global _upstream, _worker_index
    _load_wire()
    _here.__dict__.update(is_ours=True, reader=None, callbacks=0)
    recipe, _here.recipe = _here.recipe, None       # set by the parent before a fork, which inherits it
    if recipe is not None:
        _be_forked()
        _forget_half_imported()
    try:
        index, (lane, *passed), *_ = socket.recv_fds(connection, _INDEX.size, _Passed.MOST + 2)
        os.set_inheritable(lane, False)
        _worker_index, has_tracker = _INDEX.unpack(index)
        tracker = passed.pop(0) if has_tracker else None
        _Passed.received = passed
        _upstream = _Upstream(connection, _socket_at(lane))
        if _dump_signal():
            import faulthandler
            faulthandler.register(_dump_signal(), lane)
        *_, data, buffers = _receive(connection)
        surroundings, parent = _loads(data, buffers)
        _settle_in(*surroundings)
        _know_parent(tracker, *parent)
        kind, _, data, buffers = _receive(connection)
        try:
            if recipe is None:
                recipe = _load(_loads, data, buffers)
            elif isinstance(recipe.limits, LimitPool):
                recipe.limits = _limit_pool(*recipe.limits.__reduce__()[1])     # with a round of its own
            _show_name(f"{recipe.name}-{_worker_index}")
            _know_oneself(f"{recipe.name}-{_worker_index}")
            global_config.__dict__.update(recipe.config.__dict__)       # for pools of its own
            runner = _Runner(recipe, _upstream.halt)
        except BaseException as error:
            _upstream.send(_message(_NOT_BUILT, _dump_error(_without_our_frame(error))))
            return
        _pin(type(runner.target))
        _upstream.send(_message(_BUILT, (b"", [])))
        try:
            _serve_all(connection, runner, recipe.most_tasks, recipe.most_memory)
        finally:
            runner.close()
            _finish_all()               # the pools of its own
            _upstream.send(_message(_ENDING, (b"", [])))
    except (EOFError, ConnectionError):
        pass


def _settle_in(path: list[str], directory: str, environment: dict[str, str], arguments: list[str]) -> None:
    """Take over the parent's surroundings as they were at `init`."""
    sys.path[:] = path
    sys.argv[:] = arguments
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
    try:
        os.chdir(directory)
    except OSError:             # it is gone: the parent could not use it either
        pass


def _forget_half_imported() -> None:
    """Forget modules whose import was under way at the fork: no thread here would finish it, so import them again."""
    import importlib
    locks: Any = vars(importlib)["_bootstrap"]._module_locks
    for name, module in list(sys.modules.items()):
        if getattr(getattr(module, "__spec__", None), "_initializing", False):
            del sys.modules[name]
            locks.pop(name, None)


def _load(loads: Callable[..., T], *args: Any) -> T:
    """Load what the parent sent; a pool that an imported module makes meanwhile is refused."""
    _here.is_loading = True
    try:
        return loads(*args)
    finally:
        _here.is_loading = False


def _serve_all(connection: socket.socket, runner: _Runner, most_tasks: int | None, most_memory: int | None) -> None:
    """Serve until the parent hangs up, or the worker has had so many calls, or holds so many bytes after one.

    What it then leaves unread has not begun: the parent finds it, and gives it to the next.
    """
    served = memory = 0
    while served != most_tasks:
        if _serve(connection, runner):
            served += 1
            if most_memory is not None:
                memory = _memory_held()
                if memory > most_memory:
                    break
    _upstream.send(_message(_RETIRED, (b"", []), memory >> 10))


def _memory_held() -> int:
    """Return the bytes of memory that this process has resident; where that is not told, the most it ever had."""
    try:
        with open("/proc/self/statm", "rb", 0) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10


def _serve(connection: socket.socket, runner: _Runner) -> bool:
    """Take one message from the parent; carry it out, and answer, if it is a call: tell whether it was."""
    kind, shared, data, buffers = _receive(connection)
    if kind == _CALL:
        began = time.perf_counter()
        answer = _answer(runner, shared, data, buffers)
        if runner.halt.retried:
            retried, runner.halt.retried = runner.halt.retried, 0
            _upstream.send(_message(_RETRIED, (b"", []), retried))
        _upstream.send(_message(*answer, int((time.perf_counter() - began) * 1e6)))
        return True
    if kind == _VALUES:
        _Place.values = data, buffers       # loaded with the call, which has begun then
    elif kind == _SHARED:
        number, size = _loads(data)
        _Shared.functions[number] = size, buffers
    elif kind == _FORGET:
        for number in _loads(data):
            _Shared.functions.pop(number, None)
    return False


def _answer(runner: _Runner, shared: int, data: bytes, buffers: list[Any]) -> tuple[int, Any]:
    """Carry out a call; return the kind and the content of the answer."""
    try:
        method, args, kwargs = _load(_load_call, shared, data, buffers)
    except BaseException as error:
        return _not_loaded(error)
    return _answer_of(method, *contextvars.Context().run(runner.outcome, runner, method, args, kwargs))


def _load_call(shared: int, data: bytes, buffers: list[Any]) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    try:
        if _Place.values:
            _Place.values = _loads(*_Place.values)
        method, args, kwargs = _loads(data, buffers)
    finally:
        if _Place.values:
            _Place.values = ()
    return method, (_shared_function(shared), *args) if shared else args, kwargs


def _not_loaded(error: BaseException) -> tuple[int, Any]:
    return _RAISED if isinstance(error, _PoolWhileImporting) else _NOT_LOADED, _dump_error(error)


def _answer_of(method: str, kind: str, value: Any) -> tuple[int, Any]:
    """Return the kind and the content of the answer to a call."""
    pickle = _pickle()
    if kind is _ERROR:
        return _RAISED, _dump_error(value)
    if type(value) in _PLAINEST:
        return _RETURNED, _dumps_plain(value)
    try:
        try:
            return _RETURNED, _dumps(value, lambda: ({"result": value}, f" of {method}()"))
        except pickle.PicklingError:
            if not isinstance(value, _Outcomes):
                raise
            return _RETURNED, _dumps(value.each_apart())
    except BaseException as error:
        return _RAISED, _dump_error(_without_our_frame(error))


# The parent's side

_SENT = object()        # the claim on calls that were sent: it may be made twice, and again after a death


class _RingingLock:
    """A lock that the reader waits for: its release is heard by a thread that listens to sockets."""

    def __init__(self, reader: _Reader) -> None:
        self._lock = threading.Lock()
        self._reader = reader
        self.acquire, self.locked = self._lock.acquire, self._lock.locked

    def release(self, future: BaseFuture[Any] | None = None) -> None:
        self._lock.release()
        self._reader.post(int)

    __call__ = release              # as a waker of a future


class _Reader:
    """The thread that hears all worker processes: answers, deaths, sockets that take more again.

    It owns what happens to them: they are started here, buried here and started again; their
    calls are settled here. It ends with the last of them. What it does for one of them, or for a call, is done under
    one guard: if that raises, this worker or call fails with it, and everybody else goes on.
    """

    def __init__(self) -> None:
        _load_wire()
        self.backends: set[Any] = set()
        self.todo: collections.deque[Any] = collections.deque()     # (function, arguments), to be called here
        self.timers: list[list[Any]] = []   # a heap of [when, number, function]
        self.cancelled = 0                          # of these: their function is None
        self.numbers = itertools.count()
        self.bell, self.rope = _socket_pair()       # pulled to wake the thread
        self.selector = _own(selectors.DefaultSelector())
        self.bell.setblocking(False)
        self.rope.setblocking(False)
        self.is_rung = False
        self.watch(self.bell, selectors.EVENT_READ, self._answer_bell)
        self.tracker: int | None = None     # the end that multiprocessing's resource tracker is to read, see _tracker
        self.thread = threading.Thread(target=self._main, name="concurry reader", daemon=True)

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Have a function called on this thread; from any thread, at any time."""
        try:
            self.todo.append((function, args))
            if not self.is_rung and _here.reader is not self:
                self.is_rung = True
                self._ring()
        except BaseException:       # a signal handler's
            self._ring()
            raise

    def _ring(self) -> None:
        try:
            self.rope.send(b"!")
        except OSError:             # it rings already, or there is nobody left to hear it
            pass

    def later(self, seconds: float, function: Callable[[], object]) -> list[Any]:
        """Call a function after some time, and return the timer; on this thread only."""
        timer = [time.monotonic() + seconds, next(self.numbers), function]
        heapq.heappush(self.timers, timer)
        return timer

    def cancel(self, timer: list[Any]) -> None:
        """Have a timer do nothing; on this thread only."""
        if timer[2] is not None:
            timer[2] = None
            self.cancelled += 1
            if self.cancelled > 16 + len(self.timers) // 2:
                self.timers = [timer for timer in self.timers if timer[2] is not None]
                heapq.heapify(self.timers)
                self.cancelled = 0

    def watch(self, file: socket.socket | int, events: int, function: Callable[[int], object]) -> None:
        """Have `function(events)` called when there are some; on this thread only."""
        self.selector.register(file, events, function)

    def forget(self, file: socket.socket | int) -> None:
        self.selector.unregister(file)

    def wait(self, lock: threading.Lock | _RingingLock, timeout: float | None) -> bool:
        """Wait for a lock on this thread: go on with the work until it is free."""
        deadline = _deadline(timeout)
        while not lock.acquire(False):
            if self.todo:
                self._do_next()
            elif deadline is not None and _left(deadline) == 0:
                return False
            else:
                self._listen(_left(deadline))
        return True

    def _answer_bell(self, events: int) -> None:
        try:
            self.bell.recv(4096)
        except BlockingIOError:     # heard by a wait in the middle of this round
            pass
        self.is_rung = False        # before the work is looked at: what comes now rings again

    def _main(self) -> None:
        _here.is_ours = True
        _here.reader = self
        try:
            while not self._has_ended():
                if self.todo:
                    self._do_next()
                else:
                    self._listen(None)
        except BaseException as error:
            logger.exception("the reader of the worker processes failed; all their calls fail")
            _reader_failed(self, error)
        finally:
            _give_up_tracker(self)
            self.close()

    def close(self) -> None:
        self.selector.close()
        self.bell.close()
        self.rope.close()

    def _has_ended(self) -> bool:
        if self.backends:
            return False
        with _reader_lock:
            if self.backends or self.todo:
                return False
            _readers.pop(os.getpid(), None)
            return True

    def _do_next(self) -> None:
        function, args = self.todo.popleft()
        self._do(function, *args)

    def _do(self, function: Callable[..., object], *args: Any) -> None:
        try:
            function(*args)
        except BaseException as error:
            if function == self._answer_bell:       # then it hears nobody any more
                raise
            _contain(error, function, args)

    def _listen(self, timeout: float | None) -> None:
        """Wait for something to do, at most `timeout` seconds."""
        if self.timers:
            timeout = self._until_timer() if timeout is None else min(timeout, self._until_timer())
        # At most an hour: the kernel counts milliseconds in 32 bits.
        for key, events in self.selector.select(timeout and min(timeout, 3600)):
            self._do(key.data, events)
        while self.timers and self._until_timer() == 0:
            timer = heapq.heappop(self.timers)
            if timer[2] is None:
                self.cancelled -= 1
            else:
                self.todo.append((timer[2], ()))
                timer[2] = None

    def _until_timer(self) -> float | Any:
        return max(0.0, self.timers[0][0] - time.monotonic())


def _contain(error: BaseException, function: Any, args: tuple[Any, ...]) -> None:
    """Fail the worker, or the call, for which the reader has done something that raised, and log it."""
    while isinstance(function, functools.partial):
        function, args = function.func, (*function.args, *args)
    owner: Any = getattr(function, "__self__", None)
    call = next((each for each in args if isinstance(each, (_Call, BaseFuture))), None)
    if call is not None and not isinstance(owner, _Backend):
        owner = call
    logger.error("an error of concurry's own, in %s for %r", getattr(function, "__qualname__", function), owner,
                 exc_info=error)
    try:
        if isinstance(owner, _Call):
            _fail_call(owner, error)
        elif isinstance(owner, BaseFuture):
            _settle_unbegun(owner, _ERROR, error)
        else:
            getattr(owner, "perish", _do_nothing)(error)
    except BaseException:
        logger.exception("an error of concurry's own, while %r was given up", owner)


def _in_any_case(*steps: Callable[[], object]) -> None:
    """Take all steps, though some raise."""
    for step in steps:
        try:
            step()
        except BaseException:
            logger.exception("an error of concurry's own, while a worker was given up")


_readers: dict[int, _Reader] = {}   # by process id: a forked child needs its own
_reader_lock = threading.RLock()


def _reader_for(backend: Any) -> _Reader:
    """Return the reader, started if need be, with this backend among those it hears."""
    with _reader_lock:
        reader = _readers.get(os.getpid())
        if reader is None:
            reader = _Reader()
            try:
                reader.thread.start()
            except BaseException:       # no more threads
                reader.close()
                raise
            _readers[os.getpid()] = reader
        reader.backends.add(backend)
        return reader


def _reader_failed(reader: _Reader, error: BaseException) -> None:
    """Fail everything that the reader should have heard of, and what comes later."""
    with _reader_lock:
        _readers.pop(os.getpid(), None)
    for backend in list(reader.backends):
        _in_any_case(functools.partial(backend.perish, error))


def _tracker(reader: _Reader) -> int | None:
    """Return the descriptor by which multiprocessing's resource tracker is told things, as all workers share it.

    Where there is none yet, it is started when somebody, here or in a worker, has told it something.
    """
    try:
        from multiprocessing import resource_tracker
        _interpreter()
    except (ImportError, RuntimeError):     # a Python without, or nothing to start it with
        return None
    tracker: Any = resource_tracker._resource_tracker
    with tracker._lock:
        if tracker._fd is None and reader.tracker is None:
            reader.tracker, tracker._fd = os.pipe()
            reader.watch(reader.tracker, selectors.EVENT_READ, functools.partial(_start_tracker, reader))
        return tracker._fd      # type: ignore[no-any-return]


def _start_tracker(reader: _Reader, events: int) -> None:
    from multiprocessing import resource_tracker, util
    end, reader.tracker = reader.tracker, None
    if end is not None:
        reader.forget(end)
        try:
            code = f"from multiprocessing.resource_tracker import main;main({end})"
            # It ignores SIGINT and SIGTERM, once it has come so far.
            resource_tracker._resource_tracker._pid = _unsignalled(     # type: ignore[attr-defined]
                util.spawnv_passfds, os.fsencode(_interpreter()), [
                    _interpreter(), "-S", "-c", code], [end])
        finally:
            os.close(end)


def _give_up_tracker(reader: _Reader) -> None:
    """Leave it to multiprocessing to start its tracker; one that has been told something is started now."""
    if reader.tracker is None:
        return
    from multiprocessing import resource_tracker
    tracker: Any = resource_tracker._resource_tracker
    with tracker._lock:
        if not _readable(reader.tracker, timeout=0):
            os.close(tracker._fd)
            tracker._fd = None
            os.close(reader.tracker)
            reader.tracker = None
    _start_tracker(reader, 0)


class _Link:
    """One process of a worker and what is on its way to it. When it dies, a new link is made."""

    def __init__(self, connection: socket.socket, far: socket.socket, lane: _Lane, process: _Process) -> None:
        self.connection = connection        # our end, non-blocking
        self.is_ending = False              # it takes no more calls, and runs its exit functions
        self.limit: Any = None              # a timer: when it is killed for taking too long for them
        self.lane = lane                    # for verdicts about limits
        self.guests: dict[int, _Guest] = {}     # by number: its tickets at the homes of limits
        self.bars: dict[Any, Any] = {}      # by its key: where a progress bar of its is shown, and what was last
        self.far = far                      # a copy of the worker's end: to see what a dead one left unread
        self.process = process
        self.inbox = _Inbox(connection, range(_BUILT, _NOT_LOADED + 1))
        self.outbox: collections.deque[Any] = collections.deque()   # parts of messages that the socket has not taken
        self.sent: Any = collections.deque()    # (call, where its message ends), in order, without an answer
        self.since = 0.0                    # when the first of them began, as far as can be seen from here
        self.end = 0                        # where the last message ends, in bytes from the beginning
        self.taken: tuple[int, list[int]] = 0, []   # by the socket: bytes, and those of the latest send
        self.known: set[int] = set()        # numbers of the shared functions it has
        self.forgotten: collections.deque[int] = collections.deque()
        self.is_built = False
        self.is_blocked = False             # the socket is full; the reader watches for room
        self.has_begun = False              # a call, ever
        self.why = "died"                   # in words
        self.retirement: Any = None         # a timer: it takes no more calls, and is about to end
        self.is_broken = False              # by us: that is no failure of the worker

    def send(self, parts: Sequence[bytes | memoryview], call: _Call | None = None) -> None:
        """Queue the parts of messages, of a call or about the worker."""
        self.end += sum(map(len, parts))
        if call is not None:
            if not self.sent:
                self.since = _now()
            self.sent.append((call, self.end))
        self.outbox.extend(parts)

    def first(self) -> _Call | None:
        """Return the call that the worker carries out, or is about to; from any thread."""
        return next((call for call, _ in list(self.sent)[:1]), None)

    def flush(self) -> bool:
        """Send what the socket takes; tell whether that was all."""
        while self.outbox:
            parts = _first_of(self.outbox, 64)
            taken, latest = self.taken
            try:
                # In one step that no signal handler can come into: the number would be lost.
                latest.extend(map(self.connection.sendmsg, (parts,)))
            except BlockingIOError:
                return False
            except OSError:                 # the worker is dead: its sentinel tells
                self.is_blocked = True
                return True
            self.taken = taken + latest[0], []
            self._drop(latest[0])
        return True

    def _drop(self, count: int) -> None:
        while count:
            part = self.outbox.popleft()
            if count < len(part):
                self.outbox.appendleft(memoryview(part)[count:])
                break
            count -= len(part)

    def read_by_worker(self) -> int:
        """Return how many bytes a dead worker has read."""
        taken, latest = self.taken
        count = taken + sum(latest)
        self.far.setblocking(False)         # a socket of gevent's would wait whatever the flag says
        while True:
            try:
                data = self.far.recv(1 << 20, socket.MSG_DONTWAIT)
            except OSError:
                data = b""
            if not data:
                return count
            count -= len(data)

    def show(self, key: Any, words: Iterable[Any]) -> None:
        """Show a progress bar of the worker as one of ours."""
        screen, _ = self.bars.get(key) or (_screen_for(_BarStyle.Auto), None)
        shown = _State(*words)
        self.bars[key] = screen, shown
        if shown.state != "running":
            del self.bars[key]
        screen.put((id(self), key), shown)

    def give_back(self) -> None:
        """Have what the dead worker held of limits free, and nothing wait for it; its progress bars end."""
        for guest in list(self.guests.values()):
            guest.leave()
        for key, (_, shown) in list(self.bars.items()):
            self.show(key, shown._replace(state="stopped"))

    def bury(self) -> None:
        self.process.exitcode()

    def close(self) -> None:
        self.close_but_process()
        self.process.close()

    def close_but_process(self) -> None:
        self.lane.close()
        self.connection.close()
        self.far.close()


def _first_of(queue: collections.deque[Any], most: int) -> list[Any]:
    """Return the first few of a queue which a finalizer may change at any time, in this very thread."""
    while True:
        try:
            return list(itertools.islice(queue, most))
        except RuntimeError:            # mutated during iteration
            continue


def _dumps_keeping(kept: dict[bytes, LimitSet], obj: Any,
                   roots: Callable[[], tuple[Any, ...]]) -> tuple[bytes, list[memoryview]]:
    """Do as `_dumps`, and put the limit sets that went along into `kept`: others will ask for them."""
    around, _here.kept = _here.kept, kept
    try:
        return _dumps(obj, roots)
    finally:
        _here.kept = around


def _frozen(portable: tuple[bytes, Iterable[memoryview]]) -> tuple[bytes, list[memoryview]]:
    """Copy buffers that the caller could change, or that might not be sent when submit returns."""
    data, buffers = portable
    return data, [buffer if type(buffer.obj) is bytes else memoryview(
        buffer.tobytes() if buffer.readonly else bytearray(buffer)) for buffer in buffers]


class _ProcessBackend(_Backend):
    """One process, started again when it dies; calls wait here until it can take them.

    Calls are moved to the socket by one thread at a time, as in the pool: by whoever submits, so
    that an idle worker gets its call at once, or by the reader when an answer has come.
    """

    prepares = True

    @staticmethod
    def set_up(recipe: _Recipe, options: _Options) -> tuple[_Passed, list[Any]]:
        """Return the parts of the messages that a worker begins with."""
        if _here.is_loading:
            raise _PoolWhileImporting(
                f"module {_module_being_imported()!r} makes worker processes while a worker process imports it: "
                f"that would never end; make them in a function, or under `if __name__ == '__main__'`")
        passed = _Passed()
        portable = (b"", []) if options.mp_context == "fork" else passed.dumps(recipe)
        return passed, _message(_PLACE, _dumps(_parent_state())) + _message(_RECIPE, _frozen(portable))

    @staticmethod
    def shared(fn: Any) -> _Shared:
        return _Shared(fn)

    @staticmethod
    def prepare(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shared, rest = _shared_by(call.pool, args[0]) if args else None, args
        if shared is not None:
            call.shared, rest = shared, args[1:]
        if not kwargs and _PLAINEST.issuperset(map(type, rest)):
            portable: tuple[bytes, Sequence[memoryview]] = _dumps_plain((call.method, rest, kwargs))
        else:
            portable = _frozen(_dumps_keeping(call.pool.kept, (call.method, rest, kwargs),
                                              lambda: _call_parts(call.method, args, kwargs)))
        call.message = _message(_CALL, portable, shared.number if shared else 0)

    @staticmethod
    def complete(call: _Call, values: list[Any]) -> None:
        portable = _dumps_keeping(call.pool.kept, values, lambda: ({f"the result of dependency {n}": value
                                                                   for n, value in enumerate(values)},))
        call.message = _message(_VALUES, _frozen(portable)) + call.message

    def start(self) -> None:
        self.queue: collections.deque[_Call] = collections.deque()  # placed here and not yet sent
        self.turn: dict[str, object] = {}   # "is": whose it is to move calls to the socket
        self.link: _Link | Any = None
        self.dead: _Link | None = None      # a link that is to be buried
        self.failures = 0                       # starts in a row that came to nothing
        self.pace: float | None = None          # microseconds a call takes, about
        self.delay = 0.0                        # seconds before the next try of a start that was refused ...
        self.retry: Any = None                  # ... and its timer
        self.was_refused = False
        self.ending: dict[_Link, None] = {}     # links whose place another one has taken, and that have not ended yet
        self.is_over = False                    # only those are left
        self.is_finishing = False
        self.killed: str | None = None          # why, in words
        self.pid: int | None = None             # of the process that was started last ...
        self.exitcode: int | None = None        # ... and of the one that has ended last
        self.reader = _reader_for(self)
        self.reader.post(self._launch)

    # Sending

    def submit(self, call: _Call) -> None:
        self.queue.append(call)
        self.feed()

    def feed(self) -> None:
        """Send what the worker can take; from any thread."""
        mine, turn = object(), self.turn
        try:
            while self._is_hungry() and turn.setdefault("is", mine) is mine:
                self._feed(self.link)
                del turn["is"]
        except BaseException:
            # A signal handler's, in the middle of anything. The process goes, for what it would read may be
            # broken; which calls it has begun is known all the same.
            if turn.get("is") is mine:
                self.link.is_blocked = self.link.is_broken = True
                self.link.process.kill()
                del turn["is"]
            self.reader.post(self._bury)
            raise
        if self.dead is not None:
            self.reader.post(self._bury)

    def _is_hungry(self) -> object:
        link = self.link
        if link is None or link.is_blocked or self.dead is not None or link.retirement is not None:
            return False
        if not link.is_built:
            return link.outbox              # the recipe, perhaps
        # The first few apart, the others by the half: to send takes as long as all else in a small call.
        window, ahead = self._window(), len(link.sent)
        return link.outbox or self.queue and (ahead < max(1, window // 4) or ahead <= window // 2 <= len(self.queue))

    def _window(self) -> int:
        return _AHEAD if self.pace is not None and self.pace < _QUICK else 1

    def _feed(self, link: _Link) -> None:
        while self.queue and link.is_built and len(link.sent) < self._window():
            call = self.queue[0]
            message = call.message
            # None: settled meanwhile. On this link already: it is in the queue twice, for a signal handler has
            # raised while it was placed.
            if message is not None and call.link is not link and call.future._begin(_SENT):
                call.link = link
                link.send(self._news(link, call.shared) + message, call)
                self._watch_first(link)
            self.queue.popleft()
        if not link.flush():
            link.is_blocked = True
            self.reader.post(self._watch_for_room, link)

    def _watch_first(self, link: _Link) -> None:
        """Have the time looked at of the call that the worker carries out."""
        if self.pool.keeper is not None:
            call = link.first()
            if call is not None:
                self.pool.keeper.watch(call)

    def beginning_of(self, call: _Call) -> float | None:
        link = self.link
        return link.since if link is not None and link.first() is call else None

    def interruption(self, call: _Call, kill: bool) -> Callable[[], Any] | None:
        if not kill:
            return None
        if call.began is None:          # whoever cancels does not wait until the process has ended
            call.began = self.beginning_of(call)
        return functools.partial(self.reader.post, self._end_call, call)

    def overrun(self, call: _Call) -> None:
        self._end_call(call)

    def _end_call(self, call: _Call) -> None:
        """Kill the process that carries out this call; on the reader's thread.

        It is halted first, and its answers are heard: it might have begun the next call, which would be lost.
        """
        call.is_unwanted = True
        link = self.link
        if link is None or link.retirement is not None or all(sent is not call for sent, _ in list(link.sent)):
            self._have_begin_anew(call)         # it does not run, or not yet
            return
        link.process.halt()
        self._hear(link, selectors.EVENT_READ)
        if link.first() is call:
            link.why = "was killed, for a call ran too long or was cancelled"
            link.process.kill()
        else:
            link.process.kill(_SIGCONT)

    def _have_begin_anew(self, call: _Call) -> None:
        """Forget what was thought of a call's time."""
        if call.alarm is not None:
            self.reader.cancel(call.alarm)
        call.alarm, call.overran, call.is_unwanted = None, None, False

    def _news(self, link: _Link, shared: _Shared | None) -> list[Any]:
        """Return the messages that must be there before the call: a shared function, and the end of others."""
        parts: list[Any] = []
        if link.forgotten:
            numbers = [link.forgotten.popleft() for _ in range(len(link.forgotten))]
            link.known.difference_update(numbers)
            parts += _message(_FORGET, _dumps(numbers))
        if shared is not None and shared.number not in link.known:
            link.known.add(shared.number)
            shared.holders.add(link)
            data, buffers = shared.portable
            parts += _message(_SHARED, (_dumps((shared.number, data))[0], buffers))
        return parts

    def _watch_for_room(self, link: _Link) -> None:
        if link is self.link:
            self.reader.selector.modify(link.connection, selectors.EVENT_READ | selectors.EVENT_WRITE,
                                        functools.partial(self._hear, link))

    # Hearing: on the reader's thread

    def _hear(self, link: _Link, events: int) -> None:
        if link is not self.link:
            return
        if events & selectors.EVENT_WRITE:
            self.reader.selector.modify(link.connection, selectors.EVENT_READ,
                                        functools.partial(self._hear, link))
            link.is_blocked = False
        try:
            for message in link.inbox.receive():
                self._take(link, *message)
        except BaseException as error:      # whatever loading raises
            logger.error("%s sent an invalid message (%r) and is killed", self.name, error, exc_info=error)
            self.reader.forget(link.connection)
            link.process.kill()
            return
        if link.inbox.is_at_end and link.process is not None:
            # Without a death: the task has closed its descriptors. It cannot answer any more.
            self.reader.forget(link.connection)
            link.process.kill()
        self.feed()

    def _take(self, link: _Link, kind: int, took: int, data: bytearray, buffers: list[Any]) -> None:
        """Take one message: what has to be settled is settled after the worker has got more to do."""
        if kind == _TICKET:
            _Guest.take(link, self.reader, *_pickle().loads(data))
        elif kind == _PROGRESS:
            link.show(*_pickle().loads(data))
        elif kind == _RETRIED:
            self.halt.retried += took
        elif kind == _RETIRED:
            link.retirement = self.reader.later(self.pool.options.stop_timeout, functools.partial(self._end_late, link))
            logger.debug("%s (pid %d) is retired%s", self.name, link.process.pid,
                         f": it holds {took >> 10} MiB after a call" if took else "")
        elif kind == _ENDING:
            self._let_end(link)
        elif kind >= _RETURNED:
            self._take_answer(link, kind, took, data, buffers)
        elif kind == _BUILT:
            link.is_built, self.delay = True, 0.0
            if not self.started.done():
                self.reader.todo.append((_settle, (self.started, _RESULT, None)))
        elif kind == _NOT_BUILT:
            self.cause: BaseException | None = _start_error(_load_error(data, buffers), self)

    def _take_answer(self, link: _Link, kind: int, took: int, data: bytearray, buffers: list[Any]) -> None:
        if not link.sent:
            raise ValueError("an answer to no call")
        _guard(self._take_outcome, link.sent.popleft()[0], link, kind, took, data, buffers)

    def _take_outcome(self, call: _Call, link: _Link, kind: int, took: int, data: bytearray,
                      buffers: list[Any]) -> None:
        if link.sent and link.sent[0][0].is_unwanted:
            self.reader.todo.append((self._end_call, (link.sent[0][0],)))
        link.has_begun = True
        now = _now()
        call.began = link.since if took == 0xFFFFFFFF else now - took / 1e6     # that is as far as it counts
        link.since = now
        self._watch_first(link)
        self.failures = 0
        self.pace = took if self.pace is None or took > self.pace else 0.8 * self.pace + 0.2 * took
        if self.killed:
            link.process.kill()             # nothing else shall begin in the time that it had to clean up
        if self.killed and kind != _RETURNED:           # a handler of TERM has raised SystemExit, say
            self._fail(call, self.stopped(call, self.killed, True))
        else:
            self.reader.todo.append((_settle_answer, (call, kind, data, buffers)))

    # Starting and burying: on the reader's thread

    def _launch(self) -> None:
        """Start a process and send it the recipe."""
        self.retry = None
        if self.is_finishing and not self.calls:
            _settle(self.started, _RESULT, None)        # nobody will miss it
            self._end()
            return
        self.cause = process = None
        ends: list[socket.socket] = []
        try:
            if self.pool.setup is None:
                raise RuntimeError(f"{self.name} was stopped before it was started")
            passed, setup = self.pool.setup
            ends += _socket_pair()
            ends += _socket_pair()
            connection, far, lane, far_lane = ends
            method = self.pool.options.mp_context.value
            if method == "fork":
                _here.recipe = self.pool.recipe
                _name_classes(self.pool.recipe)
                passed.kept.update(_all_of(_sets.items()))      # it may ask for any of them
            tracker = _tracker(self.reader)
            trackers = [] if tracker is None else [tracker]
            process = _launch(method, far, _worker_main)
            socket.send_fds(connection, [_INDEX.pack(self.index, bool(trackers))],
                            [far_lane.fileno(), *trackers, *passed.descriptors])
            far_lane.close()
            connection.setblocking(False)
            self.pid = process.pid
            link = _Link(connection, far, _Lane(lane, self.reader, process), process)
            link.send(setup)
            self.reader.watch(connection, selectors.EVENT_READ, functools.partial(self._hear, link))
            self.reader.watch(process.sentinel, selectors.EVENT_READ, functools.partial(self._died, link))
        except BaseException as error:
            self._drop_start(process, ends)
            self._failed_to_start(error, not isinstance(error, OSError))
            return
        finally:
            _here.recipe = None
        self.link = link
        if self.was_refused:
            self.was_refused = False
            self.pool.have(functools.partial(self.pool._take_up, self))
        self.feed()
        if self.is_finishing:
            self._hang_up()

    def _drop_start(self, process: _Process | None, ends: Iterable[socket.socket]) -> None:
        """Leave nothing of a start that came to nothing in the middle."""
        if process is not None:
            process.exitcode()
            self._forget_files(process.sentinel)
            process.close()
        self._forget_files(*ends)
        for end in ends:
            end.close()

    def _died(self, link: _Link, events: int) -> None:
        if link is self.link and self.dead is None:
            self.dead = link
            self._bury()

    def _bury(self) -> None:
        """Settle what a dead process leaves behind, and start another one in its place."""
        if self.dead is None or self.turn.setdefault("is", self) is not self:
            return                      # whoever feeds will post this again
        is_alive = self.dead.is_ending and self.dead.process.sentinel is not None \
            and not _readable(self.dead.process.sentinel, timeout=0)
        try:
            link = self.link
            if link.connection.fileno() >= 0:
                self._hear_last(link)
            begun, unbegun = self._sort_out(link)
            again = [call for call in begun if self._may_run_again(call)]
            for call in unbegun:            # it can be cancelled again
                call.future.__dict__.pop("_claim", None)
            for call in again + unbegun:
                self._have_begin_anew(call)
            self.queue.extendleft(reversed(again + unbegun))
            self.link = self.dead = None
        finally:
            del self.turn["is"]
        link.give_back()
        pid, exitcode = link.process.pid, None
        if is_alive:
            self._leave_to_end(link)
        else:
            exitcode = self._see_end(link)
        for call in begun:
            call.deaths += (self.name, pid, exitcode),
            if call not in again:
                call.began = link.since
                self._fail(call, self._error_of(call, pid))
        while self.killed and self.queue:
            call = self.queue.popleft()
            self._fail(call, self.stopped(call, self.killed, bool(call.deaths)))
        if begun:
            self.failures = 0
        if link.retirement is not None:
            self.reader.cancel(link.retirement)
            self.tally.retired += 1
        elif (begun or not self.is_finishing) and not self.killed:
            self.tally.deaths += 1
        self.reader.todo.append((self._succeed, (link, pid, exitcode, bool(begun))))    # whoever waits is told first

    def _see_end(self, link: _Link) -> int | None:
        """Reap a dead process, and return its exit code."""
        if link.limit is not None:
            self.reader.cancel(link.limit)
        self.exitcode = link.process.exitcode()
        self._unwatch(link)
        link.close()
        return self.exitcode

    def _leave_to_end(self, link: _Link) -> None:
        """Have nothing more to do with a process that runs its exit functions, but for its end."""
        self._unwatch(link)
        link.close_but_process()
        self.ending[link] = None
        self.reader.watch(link.process.sentinel, selectors.EVENT_READ, functools.partial(self._ended_late, link))

    def _error_of(self, call: _Call, pid: int) -> Any:
        if self.killed:
            return self.stopped(call, self.killed, True)
        if call.overran:
            return self.overrun_error(call, f"its process (pid {pid}) was killed, and a new one takes its place")
        return self.death_in(call)

    def _let_end(self, link: _Link) -> None:
        """See to it that a worker which has ended its work ends within bounds; its successor does not wait for that."""
        link.is_ending = True
        if len(self.ending) >= _MOST_ENDING:
            next(iter(self.ending)).process.kill()
        link.limit = self.reader.later(_END_TIMEOUT + 1, link.process.kill)     # in case it does not end by itself
        if link.retirement is not None and not (self.is_finishing or self.killed):
            self.dead = link
            self.reader.todo.append((self._bury, ()))

    def _ended_late(self, link: _Link, events: int) -> None:
        """Bury a process whose place another one has taken."""
        self.ending.pop(link, None)
        self.reader.cancel(link.limit)
        self._forget_files(link.process.sentinel)
        link.process.exitcode()
        link.process.close()
        if self.is_over:
            self._end()

    def _end_late(self, link: _Link) -> None:
        logger.warning("%s (pid %d) was retired and has not ended within %g s: it is killed", self.name,
                       link.process.pid, self.pool.options.stop_timeout)
        link.process.kill()

    def _may_run_again(self, call: _Call) -> bool:
        return (not call.overran and len(call.deaths) < self.pool.options.crash_retries and call in self.calls
                and not self.killed and not self.pool.is_stopped)

    @staticmethod
    def death_in(call: _Call) -> WorkerDiedError:
        """Return the error of a call whose process has died, perhaps not for the first time."""
        *before, (name, pid, exitcode) = call.deaths
        text = f"{name} (pid {pid}) died {_ending(exitcode)}, while it ran {call.shown()}"
        if before:
            text += "; before, in the same call, died " + ", ".join(
                f"{name} (pid {pid}) {_ending(exitcode)}" for name, pid, exitcode in before)
        return WorkerDiedError(text, name, call.method, pid, exitcode, started=True, deaths=call.deaths)

    def _fail(self, call: _Call, error: BaseException) -> None:
        self.reader.todo.append((_settle, (call.future, _ERROR, error)))

    def _hear_last(self, link: _Link) -> None:
        try:
            for message in link.inbox.receive():
                self._take(link, *message)
        except BaseException:
            pass                        # cut off in the middle, or worse

    def _sort_out(self, link: _Link) -> tuple[list[_Call], list[_Call]]:
        """Part the calls that were sent into those that had begun, one at most, and the others."""
        read = link.read_by_worker()
        begun = [call for call, end in link.sent if end <= read]
        return begun, [call for call, end in link.sent
                       if end > read and call in self.calls and call not in self.queue]

    def _unwatch(self, link: _Link) -> None:
        self._forget_files(link.connection, link.lane.connection, link.process.sentinel)

    def _forget_files(self, *files: socket.socket | int | None) -> None:
        for file in files:
            try:
                self.reader.forget(file)        # type: ignore[arg-type]
            except (KeyError, ValueError):
                pass

    def _succeed(self, link: _Link, pid: int, exitcode: int | None, had_begun: bool) -> None:
        """Decide what comes after a process that has ended."""
        is_wanted = any(call in self.calls for call in self.queue)
        if self.is_finishing and not is_wanted:
            if not self.started.done():
                _settle(self.started, _ERROR, self.cause or _death_at_start(self.name, pid, exitcode))
            self._end()
            return
        if not (had_begun or link.has_begun or link.is_broken):
            self._failed_to_start(self.cause or _death_at_start(self.name, pid, exitcode, link.is_built))
            return
        if self.is_spent and not is_wanted:
            self._end()
            self.pool.dismiss(self)
            return
        if link.retirement is None:
            logger.warning("%s (pid %d) %s, exit code %s: %sa new process takes its place",
                           self.name, pid, link.why, exitcode, self.pool.loss)
            self.pool.restarts += 1
        self._launch()

    def _failed_to_start(self, error: BaseException, is_the_workers: bool = True) -> None:
        if not is_the_workers and self.started.done() and not self.is_finishing and not self.pool.on_demand:
            self._launch_later(error)
            return
        self.failures += 1
        if not self.started.done():
            _settle(self.started, _ERROR, error)
        elif self.failures < _STARTS and not self.is_finishing:
            logger.warning("%s failed before its first call (%s): it is started again", self.name, error)
            self.pool.restarts += 1
            self._launch()
            return
        self._end()
        self.pool.lose(self, error)

    def _launch_later(self, error: BaseException) -> None:
        """Try again when there may be descriptors, memory or processes again; others have its calls meanwhile."""
        self.was_refused, self.delay = True, min(_LONGEST_DELAY, 2 * self.delay or 0.1)
        logger.warning("cannot start %s now (%s): trying again in %g s", self.name, error, self.delay)
        self.retry = self.reader.later(self.delay, self._launch)
        self.pool.have(functools.partial(self.pool._put_down, self))

    # Ending

    def hurry(self) -> None:
        self.reader.post(self._hurry)

    def _hurry(self) -> None:
        if self.link is not None:
            self.link.lane.send(None, False, None)

    def finish(self) -> None:
        self.is_finishing = True
        self.reader.post(self._hang_up)

    def _hang_up(self) -> None:
        """Tell the worker that no more will come: it ends when it has read everything."""
        if self.link is not None:
            try:
                self.link.connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        elif self.retry is not None:
            self.reader.cancel(self.retry)
            self._end()

    def where(self) -> str:
        return f"{self.name} (pid {self.link.process.pid})" if self.link else f"{self.name} (no process)"

    def stacks(self) -> Iterator[str]:
        """Have the process tell where it is, and yield that."""
        link, text, timeout = self.link, "", _DUMP_TIMEOUT
        if link is None or not link.is_built or not _dump_signal():
            return
        try:
            while _readable(link.lane.connection.fileno(), timeout=0):      # what came too late for the last one
                if not link.lane.connection.recv(1 << 16):
                    return
            link.process.kill(_dump_signal())
            while _readable(link.lane.connection.fileno(), timeout=timeout):
                data = link.lane.connection.recv(1 << 16)
                if not data:
                    break
                text += data.decode(errors="replace")
                timeout = _DUMP_PAUSE
        except (OSError, ValueError):       # it is dead, or has been buried meanwhile
            pass
        for thread in text.split("\n\n"):
            head, *lines = thread.splitlines() or [""]
            lines = [line for line in lines if not line.startswith(_OUR_LINES)]
            if lines and lines[-1].startswith('  File "<string>"'):     # where the interpreter began
                del lines[-1]
            if lines:
                yield "\n".join([f"  {head}", *lines])
        if not text:
            yield "  it does not answer: it is stopped, or about to end"

    def kill(self, why: str) -> None:
        """Fail what has not been sent, now; the rest waits for the worker's death, which tells how far it was."""
        self.is_finishing = True
        self.killed = why
        for call in list(self.calls):
            if not _is_begun(call.future.__dict__.setdefault("_claim", _ERROR)):
                _settle(call.future, _ERROR, self.stopped(call, why, False))
        self.reader.post(self._terminate)

    def _terminate(self) -> None:
        link = self.link
        for each in self.ending:
            each.process.kill()
        if link is None:
            self._hang_up()
        elif not link.is_broken:
            link.is_broken = True
            link.process.kill(15)
            self.reader.later(_GRACE, link.process.kill)

    def _end(self) -> None:
        self.is_over = True
        if not self.ending:
            self.reader.backends.discard(self)
            self.reader.todo.append((_settle, (self.ended, _RESULT, None)))

    def state(self) -> str:
        if self.link is None and self.retry is not None:
            return "waiting until it can be started"
        return "ending" if self.link is not None and self.link.is_ending else "idle"

    def endings(self) -> list[str]:
        return [f"{self.name} (pid {link.process.pid}): ending" for link in list(self.ending)]

    def perish(self, error: BaseException) -> None:
        """Give the worker up: something of ours has failed. What was sent fails, the rest is for others."""
        links = [*([self.link] if self.link is not None else []), *self.ending]
        self.is_finishing, self.link, self.dead = True, None, None
        self.ending.clear()
        sent = [call for link in links for call, _ in link.sent]
        _in_any_case(
            *(functools.partial(_settle_unbegun, call.future, _ERROR, error) for call in sent),
            *(functools.partial(step, link) for link in links for step in (
                self._unwatch, _Link.bury, _Link.give_back, _Link.close)),
            functools.partial(_settle, self.started, _ERROR, error),
            functools.partial(self.pool.lose, self, error),
            functools.partial(self.reader.backends.discard, self),
            functools.partial(_settle, self.ended, _RESULT, None))


def _death_at_start(name: str, pid: int, exitcode: int | None, was_built: bool = False) -> WorkerDiedError:
    text = f"{name} (pid {pid}) died {_ending(exitcode)}, before it {'began a call' if was_built else 'was built'}"
    return WorkerDiedError(text, name, None, pid, exitcode, started=False)


def _ending(exitcode: int | None) -> str:
    """Tell in words how a process has ended."""
    if exitcode is None:
        return "in a way that is not known"
    if exitcode >= 0:
        return f"with exit code {exitcode}"
    import signal
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = "unknown"
    return f"by signal {-exitcode} ({name})"


def _call_parts(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], str]:
    names = {f"argument {n}": arg for n, arg in enumerate(args, 1) if type(arg) not in (_Shared, _SharedByRay)}
    names.update((f"argument {name!r}", arg) for name, arg in kwargs.items())
    return names, f" of {method}()"


class _Passed:
    """Descriptors that go along with a recipe: to multiprocessing, the process that is being started.

    Its locks, queues and connections can be pickled while a process is started, and only then.
    """

    MOST = 251                  # what the kernel passes at once, less the two that are always passed
    received: Sequence[int] = ()    # in the worker

    def __init__(self) -> None:
        self.descriptors: list[int] = []
        self.kept: dict[bytes, LimitSet] = {}

    def dumps(self, recipe: _Recipe) -> tuple[bytes, list[memoryview]]:
        context = sys.modules.get("multiprocessing.context")
        _here.passed = self if context else None
        if context:
            context.set_spawning_popen(self)
        try:
            return _dumps_keeping(self.kept, recipe, lambda: (_recipe_parts(recipe), f" of {recipe.cls.__name__}"))
        except Exception as error:
            if isinstance(error.__cause__, _WrongContext):
                raise TypeError(str(error.__cause__)) from None
            raise
        finally:
            _here.passed = None
            if context:
                context.set_spawning_popen(None)

    def reduce(self, obj: Any) -> Any:
        """Reduce what multiprocessing knows how to reduce; NotImplemented for the rest."""
        from multiprocessing import reduction
        synchronize = sys.modules.get("multiprocessing.synchronize")
        # A name is how another process finds a lock; those of the fork context have lost theirs.
        if synchronize and isinstance(obj, synchronize.SemLock) and obj._semlock.name is None:
            raise _WrongContext(f"a {type(obj).__name__} of multiprocessing's fork context cannot be given to this "
                                "worker: choose mp_context='fork', or make it with "
                                "multiprocessing.get_context('spawn')")
        reduce = reduction.ForkingPickler._extra_reducers.get(type(obj))    # type: ignore[attr-defined]
        return NotImplemented if reduce is None else reduce(obj)

    def duplicate_for_child(self, descriptor: int) -> int:
        if len(self.descriptors) == self.MOST:
            raise OSError(f"more than {self.MOST} descriptors cannot be given to a worker")
        self.descriptors.append(os.dup(descriptor))
        return len(self.descriptors) - 1

    def DupFd(self, index: int) -> _PassedDescriptor:
        return _PassedDescriptor(index)

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    __del__ = close


class _PassedDescriptor:
    def __init__(self, index: int) -> None:
        self.index = index

    def detach(self) -> int:
        return _Passed.received[self.index]


class _WrongContext(TypeError):
    pass


def _recipe_parts(recipe: _Recipe) -> dict[str, Any]:
    names: dict[str, Any] = {"the class": recipe.cls, "initializer": recipe.initializer}
    names.update((f"initargs[{n}]", arg) for n, arg in enumerate(recipe.initargs))
    names.update((f"initkwargs[{name!r}]", arg) for name, arg in recipe.initkwargs.items())
    names.update((f"argument {n}", arg) for n, arg in enumerate(recipe.args, 1))
    names.update((f"argument {name!r}", arg) for name, arg in recipe.kwargs.items())
    return names


def _settle_answer(call: _Call, kind: int, data: bytes | bytearray, buffers: list[Any]) -> None:
    """Settle a call with what its worker has answered."""
    if kind == _RETURNED:
        try:
            outcome = _RESULT, _loads(data, buffers)
        except BaseException as cause:
            outcome = _ERROR, _loading_error("result", call, cause)
    else:
        try:
            error = _load_error(data, buffers)
        except BaseException as cause:
            error, kind = _loading_error("exception", call, cause), _RAISED
        outcome = _ERROR, error if kind == _RAISED else _loading_error("arguments", call, error)
    _settle(call.future, *outcome)


def _loading_error(what: str, call: _Call | _Remote, cause: BaseException) -> Exception:
    error: Exception = _pickle().PicklingError(
        f"cannot load the {what} of {call.method}(): {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


class _OnDemandProcessBackend(_OnDemand, _ProcessBackend):
    """A process for one call; for a TaskWorker, which has no state, until it has been idle for a moment."""


def _parent_state() -> tuple[Any, Any]:
    """Return what a worker takes over from this process: its surroundings; and what it has to know of it."""
    from multiprocessing import process
    me = process.current_process()
    try:
        directory = os.getcwd()
    except OSError:             # it has been removed
        directory = ""
    return (sys.path[:], directory, dict(os.environ), sys.argv[:]), (me.name, os.getpid(), bytes(me.authkey))


def _module_being_imported() -> str | None:
    """Return the name of the module whose import calls us, or None."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            return frame.f_globals.get("__name__")
        frame = frame.f_back
    return None


class _PoolWhileImporting(RuntimeError):
    """A module makes worker processes when a worker process imports it: that would never end."""


# === Backend: ray ===

# One actor per worker. Ray carries the calls, their results and the news of deaths; between machines there
# is nothing of ours. What is said is said by pickles of ours all the same, so that the same things can
# travel as to a process. The actor's class holds no more than what loads this very module: that travels
# by value, so that no machine of the cluster needs to have it.
#
# A result stays in Ray's store until it is asked for: a call returns a small status and, apart from it, what
# is large. The status tells that the call has ended, and moves nothing else.

_SOON = 20_000          # microseconds: of quick calls as many are handed over as take so long together, ...
_MOST_AHEAD = 256       # ... so many at most: they are lost when the actor dies, but save waiting for each
_STATUS = struct.Struct("<BI")      # kind of answer, microseconds; a small result follows


def _ray() -> Any:
    """Return the package; raise ImportError if it is not there, RuntimeError if it is not started."""
    try:
        ray = _optional("ray")
    except ImportError as error:
        raise ImportError("mode 'ray' needs the package ray: pip install ray") from error
    if not ray.is_initialized():
        raise RuntimeError("mode 'ray' needs a running Ray: call ray.init() first; ray.init(address='auto') on a "
                           "machine of a cluster")
    return ray


# What Ray carries

def _packed(portable: tuple[bytes, Iterable[Any]], refs: Sequence[Any] = ()) -> Any:
    """Return what was pickled as Ray carries it fast: bytes, or a list with the buffers, and with ObjectRefs that Ray
    has to know of.
    """
    data, buffers = portable
    if not (buffers or refs):
        return data
    pickle = _pickle()
    return [data, bytes(buffer.readonly for buffer in buffers), refs, *map(pickle.PickleBuffer, buffers)]


def _unpacked(packed: Any) -> Any:
    """Load it. Buffers are copied out of Ray's store: there an array could not be written to, as it can elsewhere."""
    if type(packed) is bytes:
        return _loads(packed)
    data, are_readonly, refs, *buffers = packed
    around, _here.refs = _here.refs, refs
    try:
        return _loads(data, [(bytes if is_readonly else bytearray)(buffer)
                             for is_readonly, buffer in zip(are_readonly, buffers)])
    finally:
        _here.refs = around


def _reduce_ref(ref: Any) -> Any:
    """Have an ObjectRef or an actor travel beside the pickle, so that Ray knows who has it."""
    if _here.refs is None:
        return NotImplemented
    _here.refs.append(ref)
    return _ref_at, (len(_here.refs) - 1,)


def _ref_at(index: int) -> Any:
    return _here.refs[index]


class _Remote:
    """The result of a call, not loaded: pickled bytes, or an ObjectRef of what is large.

    In a call to another Ray worker it travels as that ObjectRef, and Ray brings the data from where it is.
    """

    def __init__(self, method: str, packed: Any, ref: Any = None, is_ours: bool = True) -> None:
        self.method = method
        self.packed = packed
        self.ref = ref
        self.is_ours = is_ours          # else the ref is the user's, and of what it is
        self.session = _ray_ends

    def _lost(self) -> Any:
        """Return an error if the ref is of a Ray that has ended: the next one knows nothing of it."""
        if self.session != _ray_ends or not sys.modules["ray"].is_initialized():
            return RuntimeError(f"the result of {self.method}() was in Ray's store when Ray was shut down")
        return None

    def load(self, timeout: float | None = None) -> tuple[str, Any]:
        """Return (kind, value); TimeoutError."""
        try:
            if self.ref is None:
                return _RESULT, _unpacked(self.packed)
            if self._lost():
                return _ERROR, self._lost()
            value = sys.modules["ray"].get(self.ref, timeout=timeout)
            return _RESULT, _unpacked(value) if self.is_ours else value
        except BaseException as cause:
            errors = sys.modules["ray"].exceptions
            if isinstance(cause, errors.GetTimeoutError):
                raise TimeoutError(f"the result has not come within {timeout:g} seconds") from None
            if isinstance(cause, errors.RayError):
                return _ERROR, _inner_error(cause)
            return _ERROR, _loading_error("result", self, cause)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.ref is None:
            return _unpacked, (self.packed,)
        if self._lost():
            raise self._lost()
        _here.dependencies.append(self.ref)
        return _dependency, (len(_here.dependencies) - 1, self.is_ours)


def _dependency(index: int, is_ours: bool) -> Any:
    value = _here.dependencies[index]
    return _unpacked(value) if is_ours else value


def _inner_error(error: BaseException) -> BaseException:
    """Return the exception of the user's own that Ray has wrapped, or Ray's."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


class _RayFuture(BaseFuture):  # type: ignore[type-arg]
    """A future whose result stays where it is until somebody asks for it."""

    def perish(self, error: BaseException) -> None:
        """Fail: the reader, which was to tell of its end, has failed."""
        _settle(self, _ERROR, error)

    def lose_ray(self) -> None:
        self.perish(sys.modules["ray"].exceptions.RayError("Ray was shut down"))

    def result(self, timeout: float | None = None) -> Any:
        """Do as in BaseFuture; the first time the result is loaded, and comes from another machine perhaps."""
        self._load(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._load(timeout)
        return super().exception(timeout)

    def _known(self) -> Any:
        self._load()
        return self._outcome

    def _load(self, timeout: float | None = None) -> None:
        deadline = _deadline(timeout)
        outcome = self._outcome or self._wait(timeout)
        if type(outcome[1]) is _Remote:
            # Who loads first has said what it is: everybody gets the same object.
            state = self.__dict__
            loaded = state.get("_loaded") or state.setdefault("_loaded", outcome[1].load(_left(deadline)))
            gate = state["_gate"]
            if type(gate) is _Gate:
                gate.outcome = loaded
            else:
                state["_gate"] = loaded


def _of_ref(ref: Any) -> BaseFuture[Any]:
    """Return a future that ends as the object does that an ObjectRef stands for."""
    future = _RayFuture()
    reader = _reader_for(future)            # whom it wakes may not keep Ray's thread waiting
    _watch_ray()

    def take(value: Any) -> None:
        if isinstance(value, sys.modules["ray"].exceptions.RayError):
            _settle(future, _ERROR, _inner_error(value))
        else:
            _settle(future, _RESULT, _Remote("the task of Ray", None, ref, is_ours=False))

    def leave(future: BaseFuture[Any]) -> None:
        reader.backends.discard(future)
        if future.cancelled():
            try:
                _ray().cancel(ref)
            except Exception:               # it cannot be cancelled
                pass
    _attend(future, "_wakers", leave)
    ref._on_completed(lambda value: reader.post(take, value))
    return future


class _SharedByRay:
    """A function for many calls: it travels with each of them, and is loaded by each worker once."""

    functions: dict[int, Any] = {}  # in the worker: the latest, by number
    numbers = itertools.count()

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.number = next(self.numbers)
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.kept: dict[bytes, LimitSet] = {}
        portable, refs = _with_refs(_dumps_keeping, self.kept, fn, lambda: ({"the function": fn},))
        packed = _packed(_frozen(portable), refs)
        is_small = type(packed) is bytes and len(packed) < _BUFFER_SIZE
        self.remote = _Remote("map", packed) if is_small else _Remote("map", None, _ray().put(packed))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.remote.ref is None:
            return _shared_by_ray, (self.number, self.remote.packed)
        return _shared_by_ray, (self.number, None, self.remote)


def _shared_by_ray(number: int, packed: Any, loaded: Any = None) -> Any:
    functions = _SharedByRay.functions
    if number not in functions:
        while len(functions) >= 8:
            functions.pop(next(iter(functions)), None)
        functions[number] = _unpacked(packed) if packed is not None else loaded
    return functions[number]


# The worker's side

def _actor_class(name: str, is_concurrent: bool) -> Any:
    """Return a class of actors. Nothing in it leads out of it: it has to travel alone."""

    class Plain:
        def __init__(self, name: str, path: str, code: bytes, what: str, *args: Any) -> None:
            import importlib
            import marshal
            import sys
            import types
            module: Any = sys.modules.get(name)
            if not hasattr(module, "_Actor"):
                sys.modules[name] = module = types.ModuleType(name)
                module.__file__ = path
                vars(module)["_code_here"] = code
                exec(marshal.loads(code), vars(module))
                parts = name.split(".")
                for package in (".".join(parts[:n]) for n in range(1, len(parts))):
                    try:
                        importlib.import_module(package)
                    except ImportError:         # it is not here: this one stands for it
                        sys.modules[package] = types.ModuleType(package)
                        sys.modules[package].__path__ = []
            self.actor = getattr(module, what)(*args)

        def call(self, *args: Any) -> Any:
            return self.actor.call(*args)

        def do(self, name: str, *args: Any) -> Any:
            return getattr(self.actor, name)(*args)

        def beside(self, name: str, *args: Any) -> Any:
            return getattr(self.actor, name)(*args)

    class Async(Plain):
        async def call(self, *args: Any) -> Any:
            return await self.actor.call_async(*args)

        async def do(self, name: str, *args: Any) -> Any:
            done = getattr(self.actor, name)(*args)
            return await done if hasattr(done, "__await__") else done

        beside = do

    ray = _optional("ray")
    cls: Any = Async if is_concurrent else Plain
    cls.__name__ = cls.__qualname__ = name      # as ps and the dashboard show it
    cls.__module__ = "a worker of concurry"     # else it would be looked for in this module
    cls.call = ray.method(num_returns=2)(cls.call)
    if is_concurrent:
        return ray.remote(max_concurrency=1_000_000)(cls)
    cls.beside = ray.method(concurrency_group="beside")(cls.beside)
    return ray.remote(concurrency_groups={"beside": 2})(cls)


if TYPE_CHECKING:
    # (actor, process) of each of the processes that a process comes from
    _Lineage: TypeAlias = tuple[tuple[str, str], ...]


class _Actor:
    """What the actor's methods come to."""

    def __init__(self, recipe: Any, lineage: _Lineage, index: int) -> None:
        global _lineage, _worker_index
        ray = _optional("ray")
        here = ray.get_runtime_context()
        _lineage, _worker_index = (*lineage, (here.get_actor_id(), here.get_worker_id())), index
        _let_term_end()
        self.recipe = recipe
        self.runner: Any = None
        self.halt = _Halt()
        self.beside: Any = None         # a thread for plain methods beside the loop

    def begin(self) -> bytes:
        """Make the object, in the thread of its methods; return the status."""
        if self.runner is None:         # else Ray has restarted the actor, and a call was first
            _here.is_ours = True
            _here.kept = {}             # sets that results bring to whoever asked for them
            try:
                recipe = _load(_unpacked, self.recipe)
                global_config.__dict__.update(recipe.config.__dict__)
                self.runner = _Runner(recipe, self.halt, _loop_here())
                _pin(type(self.runner.target))
            except BaseException as error:
                return _status(_NOT_BUILT, _dump_error(_without_our_frame(error)))[0]
        return _status(_BUILT, (_pickle().dumps((_lineage[-1][1], os.getpid())), ()))[0]

    def watch(self) -> Any:
        return _never_end()

    def hurry(self) -> None:
        self.halt.set()

    def call(self, packed: Any, values: Any = None, *dependencies: Any) -> tuple[bytes | None, Any]:
        """Carry out a call; return its status, and the result if it is large."""
        began = time.perf_counter()
        failure = self.begin() if self.runner is None else None
        if self.runner is None:
            return failure, None
        call, refusal = self._load(packed, values, dependencies)
        if call is None:
            return _status(*refusal)
        outcome = contextvars.Context().run(self.runner.outcome, self.runner, *call)
        (kind, portable), refs = _with_refs(_answer_of, call[0], *outcome)
        if _ways:
            _run(_unheard(), None)
        return _status(kind, (*portable, refs), time.perf_counter() - began)

    async def call_async(self, packed: Any, values: Any = None, *dependencies: Any) -> tuple[bytes, Any]:
        """Carry out a call beside others: a coroutine on the loop, anything else on the thread beside it."""
        began = time.perf_counter()
        loop, runner = _loop_here(), self.runner
        if runner is None:
            failure, runner = self.begin(), self.runner
            if runner is None:
                return failure, None
        call, refusal = self._load(packed, values, dependencies)
        if call is None:
            return _status(*refusal)
        context = contextvars.Context()
        context.run(_calling.set, runner)
        if runner.is_async(types.SimpleNamespace(method=call[0], args=call[1])):
            outcome = await context.run(loop.create_task, runner.outcome_async(*call))
        else:
            if self.beside is None:
                self.beside = concurrent.futures.ThreadPoolExecutor(1, f"{runner.class_name}-plain", _be_ours)
            outcome = await loop.run_in_executor(self.beside, context.run, runner.outcome, runner, *call)
        (kind, portable), refs = _with_refs(_answer_of, call[0], *outcome)
        if _ways:
            await _run_async(_unheard(), None)
        return _status(kind, (*portable, refs), time.perf_counter() - began)

    @staticmethod
    def _load(packed: Any, values: Any, dependencies: tuple[Any, ...]) -> tuple[Any, Any]:
        """Return the call, or None and the answer that it cannot be loaded."""
        _here.dependencies = dependencies
        try:
            if values is not None:
                _Place.values = _load(_unpacked, values)
            return _load(_unpacked, packed), None
        except BaseException as error:
            return None, _not_loaded(error)
        finally:
            _here.dependencies = _Place.values = ()

    def close(self) -> Any:
        """Drop the object; then end the pools of its own, beside the loop, where calls of theirs may end."""
        if self.beside is not None:
            self.beside.shutdown()
        if self.runner is not None:
            self.runner.close()
        loop = _loop_here()
        return loop.run_in_executor(None, _finish_all) if loop else _finish_all()


def _let_term_end() -> None:
    """Have SIGTERM end this process: Ray's own handler would let calls end first, and `watch` never does."""
    try:
        import ctypes
        ctypes.CDLL(None).signal(15, None)      # Python's `signal` is for the main thread only
    except Exception:               # no such library here: TERM ends it when the driver has ended
        pass


def _never_end() -> Any:
    """Be a call that is over when the actor is dead."""
    loop = _loop_here()
    return loop.create_future() if loop else threading.Event().wait()


def _loop_here() -> Any:
    """Return the event loop that runs in this thread, or None."""
    asyncio = sys.modules.get("asyncio")
    return asyncio and asyncio._get_running_loop()


def _be_ours() -> None:
    _here.is_ours = True


def _status(kind: int, portable: tuple[Any, ...] = (b"", ()), seconds: float = 0.0) -> tuple[bytes, Any]:
    """Return the two things that a call returns: its status, with a small result in it, and what is large."""
    head = _STATUS.pack(kind, min(int(seconds * 1e6), 0xffffffff))
    data, buffers = portable[:2]
    if kind != _RETURNED:
        copies = [(bytes if buffer.readonly else bytearray)(buffer) for buffer in buffers]
        return head + _pickle().dumps((data, copies)), None
    packed: Any = _packed((data, buffers), *portable[2:])
    is_small = type(packed) is bytes and len(packed) < _BUFFER_SIZE
    return (head + packed, None) if is_small else (head, packed)


# The driver's side

class _RayBackend(_Backend):
    """One actor, made again when it dies; calls wait here until it is there and can take them.

    All that is said to Ray is said on a thread of the backend's own. While plain calls are under way it waits
    for their statuses, in order; else for its inbox. So Ray's own threads are not kept waiting, nor are those of
    finalizers and signal handlers, which may have interrupted Ray.
    """

    prepares = True
    has_time_limits = False
    future = _RayFuture

    @staticmethod
    def set_up(recipe: _Recipe, options: _Options) -> tuple[Any, tuple[Any, ...], set[str]]:
        """Return the class of the actors, and what each is made with."""
        ray = _ray()
        if options.max_workers is None:
            options.max_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        for each in _sets_in(recipe.limits):
            if each._home.is_far and each._home.way is not None and each._home.way.over:
                raise RuntimeError(each._home.way.over)
        # Methods whose calls an actor runs beside one another; without any it is a plain actor.
        coroutines = recipe.async_names | ({"__call__", "_chunk"} if _is_async(recipe.bound) else set())
        cls = _actor_class(recipe.name, bool(coroutines)).options(**_actor_options(options))
        portable, refs = _with_refs(_dumps, recipe, lambda: (_recipe_parts(recipe), f" of {recipe.cls.__name__}"))
        return cls, (*_own_module(), "_Actor", _packed(_frozen(portable), refs), _lineage), coroutines

    @staticmethod
    def tear_down(pool: _Pool) -> None:
        if isinstance(pool.options.limits, (list, tuple)):
            for each in _sets_in(pool.recipe.limits):
                if each._home.is_far and each._home.way is not None:
                    each._home.way.forget(each._token)

    @staticmethod
    def shared(fn: Callable[..., Any]) -> _SharedByRay:
        return _SharedByRay(fn)

    @staticmethod
    def prepare(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.dependencies = _here.dependencies = []     # a shared function may lie in the store
        try:
            portable, refs = _with_refs(_dumps_keeping, call.pool.kept, (call.method, args, kwargs),
                                        lambda: _call_parts(call.method, args, kwargs))
        finally:
            _here.dependencies = ()
        # No more arguments than needed: each one costs Ray some microseconds.
        call.message = (_packed(_frozen(portable), refs), *((None,) if call.dependencies else ()))

    @staticmethod
    def value_of(future: BaseFuture[Any]) -> Any:
        return future._outcome[1] if isinstance(future, _RayFuture) else _result_of(*_outcome_of(future))

    @staticmethod
    def complete(call: _Call, values: list[Any]) -> None:
        # What lies in Ray's store stays there.
        _here.dependencies = call.dependencies
        try:
            portable, refs = _with_refs(_dumps_keeping, call.pool.kept, values, lambda: (
                {f"the result of dependency {n}": value for n, value in enumerate(values)},))
        finally:
            _here.dependencies = ()
        call.message = call.message[0], _packed(_frozen(portable), refs)

    def start(self) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()    # (function, arguments), to be called by the thread
        # placed here and not handed to the actor: plain methods ...
        self.queue: collections.deque[_Call] = collections.deque()
        self.side_by_side: collections.deque[_Call] = collections.deque()   # ... and coroutines
        self.handed: dict[_Call, Any] = {}      # calls: (refs of the status and of what is large, the actor, its pid)
        self.ahead = 0                          # of them: plain methods
        self.lost: list[_Call] = []             # by an actor that died: to be handed to the next one
        self.actor: Any = None
        self.is_built = False                   # this actor's object ...
        self.was_built = False                  # ... and ever one
        self.has_begun = False                  # a call, perhaps, on this actor
        self.failures = 0                       # starts in a row that came to nothing
        self.pace: float | None = None          # microseconds a call takes, about
        self.left = self.most = self.pool.options.max_tasks_per_worker or sys.maxsize       # calls for this actor
        self.is_retiring = False                # it has had all its calls, and is about to end
        self.is_finishing: bool = False
        self.is_over = False
        self.killed: str | None = None          # why, in words
        self.cls, self.arguments, self.coroutines = self.pool.setup
        self.reader: Any = _reader_for(self)
        self.post(self._launch)
        try:
            threading.Thread(target=self._main, name=self.name, daemon=True).start()
        except BaseException:
            self._end()
            raise
        _settle(self.started, _RESULT, None)    # nobody waits for the cluster

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Have a function called on the backend's thread; from any thread, at any time."""
        self.inbox.put((function, args))

    def _main(self) -> None:
        _here.is_ours, _here.divert = True, self.reader.post
        try:
            while not self.is_over:
                if self.ahead and not self.coroutines and self.inbox.empty():
                    self._hear_next()
                else:
                    function, args = self.inbox.get()
                    function(*args)
                    del function, args      # not to be kept while it waits
        except BaseException as error:
            logger.exception("the thread of %s failed; all its calls fail", self.name)
            self.perish(error)

    # Handing over

    def submit(self, call: _Call) -> None:
        self.post(self._take_in, call)

    def _take_in(self, call: _Call) -> None:
        (self.side_by_side if call.method in self.coroutines else self.queue).append(call)
        self._feed()

    def _window(self) -> int:
        """Return how many plain calls are handed over at once. Beside coroutines Ray does not keep their order."""
        return 1 if self.coroutines or self.pace is None else max(1, min(_MOST_AHEAD, int(_SOON / max(self.pace, 1))))

    def _feed(self) -> None:
        if not self.is_built:
            return
        for call in reversed(self.lost):
            (self.side_by_side if call.method in self.coroutines else self.queue).appendleft(call)
        self.lost.clear()
        while self.side_by_side and self.left:
            self._hand_over(self.side_by_side.popleft())
        while self.queue and self.ahead < self._window() and self.left:
            self._hand_over(self.queue.popleft())
        if not (self.left or self.handed or self.is_finishing):
            self.is_built, self.is_retiring = False, True
            self._close(self.actor)

    def _hand_over(self, call: _Call) -> None:
        message, dependencies = call.message, call.dependencies
        # None: settled meanwhile. Handed over: a signal handler has raised while it was placed, and it came twice.
        # It has begun already if it is run again.
        if message is None or call in self.handed or not (call.deaths or call.future._begin(call)):
            return
        try:
            _ray()                          # else Ray would start itself
            refs = self.call_actor(*message, *dependencies)
        except BaseException as error:
            _settle(call.future, _ERROR, error)
            return
        self.handed[call] = refs, self.actor, self.pid
        self.left -= 1
        self.ahead += call.method not in self.coroutines
        if self.coroutines:
            refs[0]._on_completed(functools.partial(self.post, self._hear, call))

    # Hearing

    def _hear_next(self) -> None:
        """Wait for the first of the statuses, and take what is there."""
        try:
            ray = _ray()                    # else Ray would start itself
        except RuntimeError:
            self.lose_ray()
            return
        calls = {refs[0]: call for call, (refs, _, _) in self.handed.items()}
        ready = list(calls)[:1]
        try:
            if len(calls) > 1:
                ready = ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)[0] or ready
            statuses = ray.get(ready)
        except BaseException:               # of one of them: each for itself
            statuses = map(_status_of, ready) if ray.is_initialized() else ()
        for ref, status in zip(ready, statuses):
            self._hear(calls[ref], status)

    def _hear(self, call: _Call, status: Any) -> None:
        """Take the status of a call, or the exception that Ray has instead."""
        if call not in self.handed:
            return
        (_, ref), actor, pid = self.handed.pop(call)
        self.ahead -= call.method not in self.coroutines
        errors = sys.modules["ray"].exceptions
        if isinstance(status, bytes):
            kind, took = _STATUS.unpack_from(status)
            self._take(call, kind, took, status[_STATUS.size:], ref)
        elif not isinstance(status, errors.RayActorError):
            _settle(call.future, _ERROR, _inner_error(status))
        else:
            if actor is self.actor:
                self.is_built = False       # it gets no more; the end will be told apart, if it is one
                if isinstance(status, errors.ActorUnavailableError):
                    self._begin(actor)
            self.has_begun = True           # the death is charged to the calls
            call.deaths += (self.name, pid, None),
            if len(call.deaths) <= self.pool.options.crash_retries and call in self.calls and not self.is_finishing:
                self.lost.append(call)
            else:
                _settle(call.future, _ERROR, self._death(call, status))
        self._feed()

    def _take(self, call: _Call, kind: int, took: int, packed: bytes, ref: Any) -> None:
        if kind == _NOT_BUILT:              # Ray has restarted the actor, and its constructor raised
            _settle(call.future, _ERROR, _start_error(_load_error(*_pickle().loads(packed)), self))
            return
        self.has_begun, self.failures = True, 0
        call.began = _now() - took / 1e6
        self.pace = took if self.pace is None or took > self.pace else 0.8 * self.pace + 0.2 * took
        if kind == _RETURNED:
            _settle(call.future, _RESULT, _Remote(call.method, packed) if packed else _Remote(call.method, None, ref))
        else:
            _settle_answer(call, kind, *_pickle().loads(packed))

    def _death(self, call: _Call, error: BaseException) -> WorkerDiedError:
        if self.killed:
            return self.stopped(call, self.killed, None)
        died = self.death_in(call, f": {_cause_of_death(error)}")
        died.__cause__ = error
        return died

    @staticmethod
    def death_in(call: _Call, why: str = "") -> WorkerDiedError:
        """Return the error of a call whose actor has died, perhaps not for the first time."""
        name, pid, _ = call.deaths[-1]
        text = f"the actor of {name} (pid {pid}) died before the end of {call.shown()}, which it may have begun{why}"
        if len(call.deaths) > 1:
            text += "; so did before those with pid " + ", ".join(str(pid) for _, pid, _ in call.deaths[:-1])
        return WorkerDiedError(text, name, call.method, pid, deaths=call.deaths)

    # Starting and burying

    def _launch(self) -> None:
        if self.is_finishing:
            self._end()
            return
        self.is_built = self.has_begun = self.is_retiring = False
        self.left = self.most
        try:
            _ray()                          # else Ray would start itself
            self.actor = self.cls.remote(*self.arguments, self.index)
            self.call_actor: Any = self.actor.call.remote
            self._look_after(self.actor)
        except BaseException as error:
            _kill_actor(self.actor)         # it may be there all the same
            self.actor = None
            self._failed_to_start(error)

    def _look_after(self, actor: Any) -> None:
        """Have the actor make its object, and its end be told."""
        self.process = self.pid = None
        self._begin(actor)
        _await_end(actor, functools.partial(self.post, self._bury, actor))

    def _begin(self, actor: Any) -> None:
        try:
            _ray()
            actor.do.remote("begin")._on_completed(functools.partial(self.post, self._begun, actor))
        except Exception:               # it is dead, or Ray is
            pass

    def _begun(self, actor: Any, status: Any) -> None:
        if actor is not self.actor or not isinstance(status, bytes):
            return                          # it is dead, which will be told
        if status[0] == _BUILT:
            self.is_built = self.was_built = True
            self.process, self.pid = _pickle().loads(_pickle().loads(status[_STATUS.size:])[0])
            self._feed()
            return
        self.actor = None
        _kill_actor(actor)
        self._failed_to_start(_start_error(_load_error(*_pickle().loads(status[_STATUS.size:])), self))

    def _bury(self, actor: Any, error: BaseException) -> None:
        """Go on after an actor has died. What its calls came to, Ray tells for each of them."""
        is_restarted = isinstance(error, sys.modules["ray"].exceptions.ActorUnavailableError)
        for way in list(_ways.values()):
            if self.process or not is_restarted:
                way.mourn(actor._actor_id.hex(), self.process if is_restarted else None)
        if actor is not self.actor:
            return
        if self.is_retiring:
            self.tally.retired += 1
        else:
            self.tally.deaths += not self.is_finishing
        if is_restarted and not self.is_finishing:
            logger.warning("the actor of %s (pid %s) died: %sRay restarts it", self.name, self.pid,
                           self.pool.loss)
            self.pool.restarts += 1
            self.is_built = False
            self._look_after(actor)
            return
        while self.handed and not self.coroutines and not self.is_over:
            self._hear_next()           # whoever waits is told first
        self.actor, self.is_built = None, False
        if self.is_finishing or self.is_over:
            _kill_actor(actor)              # else Ray might restart it
            self._end()
        elif not (self.has_begun or self.handed):
            died = WorkerDiedError(f"the actor of {self.name} died before it began a call: {_cause_of_death(error)}",
                                   self.name, started=False)
            died.__cause__ = error
            self._failed_to_start(died)
        elif self.is_spent and not self.calls:      # nobody would use another one
            self._end()
            self.pool.dismiss(self)
        elif self.is_retiring:
            self._launch_again()
        else:
            logger.warning("the actor of %s (pid %s) died: %sa new one takes its place (%s)",
                           self.name, self.pid, self.pool.loss, _cause_of_death(error))
            self.pool.restarts += 1
            self._launch_again()

    def lose_ray(self) -> None:
        """Fail everything: Ray was shut down. The thread may be waiting for ever."""
        if self.is_over:
            return
        self.is_over, self.actor = True, None
        error = sys.modules["ray"].exceptions.RayActorError(error_msg="Ray was shut down, and its actors with it")
        for call, (_, _, pid) in list(self.handed.items()):
            call.deaths += (self.name, pid, None),
            _settle(call.future, _ERROR, self._death(call, error))
        self._end()
        self.pool.lose(self, error)

    def _failed_to_start(self, error: BaseException) -> None:
        self.failures += 1
        if self.was_built and self.failures < _STARTS and not self.is_finishing:
            logger.warning("%s failed before its first call (%s): it is started again", self.name, error)
            self.pool.restarts += 1
            self._launch_again(0.2 * self.failures)
            return
        self._end()
        self.pool.lose(self, error)

    def _launch_again(self, seconds: float = 0) -> None:
        # Later: an actor's name is free a moment after nobody holds the dead one any more, and our callers do.
        self.call_actor = None
        if seconds:
            self.reader.post(self.reader.later, seconds, functools.partial(self.post, self._launch))
        else:
            self.post(self._launch)

    # Ending. What has to reach a worker in the middle of a call is said on the reader's thread.

    def interruption(self, call: _Call, kill: bool) -> Callable[[], Any] | None:
        return functools.partial(self.reader.post, self._end_call, call) if kill else None

    def _end_call(self, call: _Call) -> None:
        handed = self.handed.get(call)
        if handed is not None:
            _kill_actor(handed[1])

    def hurry(self) -> None:
        self.reader.post(self._hurry)

    def _hurry(self) -> None:
        try:
            if self.actor is not None and _ray():
                self.actor.beside.remote("hurry")
        except Exception:               # it is dead, or Ray is
            pass

    def finish(self) -> None:
        self.is_finishing = True
        self.post(self._end_actor)

    def _end_actor(self) -> None:
        if self.actor is None or not self.is_built:
            self._terminate()
        else:
            self._close(self.actor)

    def _close(self, actor: Any) -> None:
        """Have the actor drop its object, then end it."""
        try:
            _ray()
            actor.do.remote("close")._on_completed(lambda _: self.post(_kill_actor, actor))
        except Exception:
            _kill_actor(actor)

    def kill(self, why: str) -> None:
        self.is_finishing = True
        self.killed = why
        for call in list(self.calls):
            _settle(call.future, _ERROR, self.stopped(call, why, None if _is_begun(
                call.future.__dict__.setdefault("_claim", _ERROR)) else False))
        self.reader.post(lambda: _kill_actor(self.actor))
        self.post(self._terminate)

    def _terminate(self) -> None:
        if self.actor is not None:
            _kill_actor(self.actor)
        else:                           # it is to be started, or was given up
            self._end()

    def _end(self) -> None:
        self.is_over = True
        self.post(int)
        self.reader.post(self.reader.backends.discard, self)
        _settle(self.ended, _RESULT, None)

    def perish(self, error: BaseException) -> None:
        """Give the worker up: something of ours has failed. What was handed over fails, the rest is for others."""
        self.is_finishing = True
        for call in list(self.handed):
            _settle_unbegun(call.future, _ERROR, error)
        self.pool.lose(self, error)
        _kill_actor(self.actor)
        self._end()


def _status_of(ref: Any) -> Any:
    try:
        return sys.modules["ray"].get(ref)
    except BaseException as error:
        return error


def _await_end(actor: Any, then: Callable[[Any], object]) -> None:
    """Have `then(error)` called, on Ray's thread, when an actor has died."""
    _watch_ray()
    actor.beside.remote("watch")._on_completed(then)


def _kill_actor(actor: Any) -> None:
    try:
        _ray().kill(actor)
    except Exception:               # it is dead, or Ray is
        pass


_ray_watch: threading.Thread | None = None  # the thread that waits for the end of Ray
_ray_ends = 0                       # how often that has come


def _watch_ray() -> None:
    """Have it heard when Ray is shut down: what was asked before is never answered then."""
    global _ray_watch
    with _reader_lock:
        if not _lineage and (_ray_watch is None or not _ray_watch.is_alive()):
            try:
                is_over = _optional("ray._private.worker").global_worker.threads_stopped
            except (ImportError, AttributeError):       # another Ray: `ray.shutdown()` has to wait for `stop()`
                return
            _ray_watch = threading.Thread(target=_hear_of_ray, args=(is_over,), name="concurry ray watch", daemon=True)
            _ray_watch.start()


def _hear_of_ray(is_over: threading.Event) -> None:
    global _ray_ends
    is_over.wait()
    _ray_ends += 1
    with _reader_lock:
        reader = _readers.get(os.getpid())
        if reader is not None:
            for each in list(reader.backends):
                if hasattr(each, "lose_ray"):
                    reader.post(each.lose_ray)


def _cause_of_death(error: BaseException) -> str:
    """Return the words that matter of what Ray says about a death, which is long."""
    sentence = str(error).strip().rpartition("\n")[2].partition(". ")[0]
    return sentence.removeprefix("The actor is dead because ").rstrip(".")


def _actor_options(options: _Options) -> dict[str, Any]:
    """Return what Ray is told about the actors, as in `cls.options(...)`."""
    for name in "max_concurrency", "concurrency_groups":
        if name in options.actor_options:
            raise ValueError(f"actor_options={{{name!r}: ...}} is not possible: a worker runs one call at a time, and "
                             f"coroutines as many as come; max_queued_tasks bounds them")
    if options.actor_options.get("get_if_exists"):
        raise ValueError("actor_options={'get_if_exists': True} is not possible: a worker is an actor of its own")
    if options.actor_options.get("name") and options.max_workers != 1:
        raise ValueError(f"actor_options={{'name': ...}} is not possible with max_workers={options.max_workers}: a "
                         f"name is one actor's")
    given = {name: getattr(options, name) for name in _RAY_OPTIONS if getattr(options, name) is not None}
    return {**options.actor_options, **given}


def _own_module() -> tuple[str, str, Any]:
    """Return name, path and code of this module, to be run where it cannot be imported."""
    import marshal
    spec: Any = globals().get("__spec__")
    code = globals().get("_code_here")
    if code is None and spec is not None:
        code = marshal.dumps(spec.loader.get_code(spec.name))
    elif code is None:                  # run by its path
        with open(_FILE, "rb") as file:
            code = marshal.dumps(compile(file.read(), _FILE, "exec"))
    return __name__, __file__, _ray().put(code)


def _with_refs(dumps: Callable[..., T], *args: Any) -> tuple[T, list[Any]]:
    """Return what `dumps(*args)` does, and the ObjectRefs met on the way."""
    around, _here.refs = _here.refs, []
    try:
        return dumps(*args), _here.refs
    finally:
        _here.refs = around


class _OnDemandRayBackend(_OnDemand, _RayBackend):
    """An actor for one call; for a TaskWorker, which has no state, until it has been idle for a moment."""


# === Limits elsewhere ===
#
# A set lives in the process that made it. Elsewhere its home is _Away: tickets go up to the parent,
# which attends to them where it has the set, or sends them further up. They go between the answers, so
# that what a call has given back is free when its result is seen. Verdicts come down on a
# socket of their own, the lane: in the other one there may be calls before them.
#
# A set that is given to Ray workers moves, once and for all, into an actor: nobody can call the process
# that made it. There, too, its home is _Away from then on, with all that is held or waited for.

def _pickled(words: tuple[Any, ...]) -> tuple[bytes, tuple[()]]:
    """Return numbers and words in the form of what travels; nothing of the user's is among them."""
    return _pickle().dumps(words, 5), ()


class _Way:
    """What leads from here to where a set is at home."""

    def __init__(self) -> None:
        self.tickets: dict[Any, _Ticket] = {}   # by number: those that wait for a verdict
        self.numbers = itertools.count()

    def listen(self) -> None:
        """Have verdicts heard from now on."""

    def tell(self, words: tuple[Any, ...]) -> bool | None:
        """Send what a ticket says; return False if that was put off."""

    def _tell(self, ticket: _Ticket | None, is_granted: bool, answer: Any) -> None:
        if ticket is not None:
            ticket.answer = answer
            if is_granted:
                ticket.grants = ()              # at its home
            ticket.is_granted, ticket.is_refused = is_granted, not is_granted
            try:
                if ticket.bell is not None:
                    ticket.bell.wake()
            except RuntimeError:                # its event loop is closed: nobody will come for it
                _drop(ticket.home, ticket)

    def _refuse_all(self, answer: str) -> None:
        while self.tickets:
            self._tell(self.tickets.popitem()[1], False, answer)


class _Upstream(_Way):
    """A worker process's way to its parent, for the answers to calls and for its tickets."""

    def __init__(self, connection: socket.socket, lane: socket.socket) -> None:
        super().__init__()
        self.connection = connection
        self.lane = lane
        self.lock = threading.RLock()
        self.outbox: collections.deque[Sequence[bytes | memoryview]] = collections.deque()  # messages
        self.is_sending = False
        self.inbox = _Inbox(lane, (_VERDICT,))
        self.is_heard = False                   # the reader listens to the lane
        self.halt = _Halt(self.listen)          # set when the parent stops the worker
        lane.setblocking(False)

    def send(self, message: Sequence[bytes | memoryview]) -> bool:
        """Send the parts of a message, after those of others; return when it is sent, or False if it will be."""
        self.outbox.append(message)
        with self.lock:
            if self.is_sending:         # in this thread, which a finalizer interrupts: it goes on with this one
                return False
            self.is_sending = True
            try:
                while self.outbox:
                    _send_all(self.connection, self.outbox.popleft())
            finally:
                self.is_sending = False
        return True

    def tell(self, words: tuple[Any, ...]) -> bool:
        return self.send(_message(_TICKET, _pickled(words)))

    def show(self, key: Any, shown: Iterable[Any]) -> None:
        """Have a progress bar shown by the parent."""
        self.send(_message(_PROGRESS, _pickled((key, tuple(shown)))))

    def listen(self) -> None:
        with self.lock:
            if not self.is_heard:
                self.is_heard = True
                reader = self.reader = _reader_for(self)
                reader.post(reader.watch, self.lane, selectors.EVENT_READ, self._hear)

    def _hear(self, events: int) -> None:
        for _, _, data, _ in self.inbox.receive():
            number, is_granted, answer = _pickle().loads(data)
            if number is None:
                self.halt.set()
            self._tell(self.tickets.pop(number, None), is_granted, answer)

    def perish(self, error: BaseException) -> None:
        """Refuse everything: the reader has failed, for this at least."""
        self.is_heard = False
        try:
            self.reader.forget(self.lane)
        except (KeyError, ValueError):
            pass
        self._refuse_all(f"the reader of this worker process failed: {error!r}")


_upstream: Any = None           # in a worker process: its way to the parent
_OUT_OF_REACH = ("these limits live in a process that this one is no worker of: os.fork and pickle do not share them, "
                 "a worker's own are not shared with its parent, nor those of one copy of this module with another")


class _Away:
    """The home of a set that lives elsewhere: in the parent, or in a process above it, or in an actor."""

    is_far = True

    def __init__(self, token: bytes, way: _RayWay | None = None) -> None:
        self.token = token
        self.way = way              # None: to the parent

    def attend(self, ticket: _Ticket) -> None:
        """Send what the ticket says; a verdict comes later, and rings its bell."""
        way = self.way or _upstream
        if way is None:
            if ticket.is_over:
                return
            raise RuntimeError(_OUT_OF_REACH)
        if ticket.number is None:
            if ticket.is_over:
                return
            ticket.home, ticket.number = self, next(way.numbers)
            way.tickets[ticket.number] = ticket
            way.listen()
        is_over = ticket.is_over
        if is_over:
            way.tickets.pop(ticket.number, None)
        is_sent = way.tell((ticket.number, self.token, ticket.wants, ticket.usage, is_over, ticket.may_wait))
        if is_over:
            ticket.grants = None
        elif not is_sent and ticket.may_wait:
            raise RuntimeError(_INTERRUPTS)
        elif not is_sent:
            ticket.is_refused = True

    def wait_for_verdict(self, ticket: _Ticket) -> _Ticket:
        """Sleep until the ticket is granted or refused, and return it."""
        ticket.bell = _Bell()
        while not (ticket.is_granted or ticket.is_refused):
            ticket.bell.sleep(None)
        return ticket

    def seconds_until(self, due: float) -> float:
        return _NEVER               # the owner looks at the clock

    def stats(self) -> Any:
        ticket = _Ticket(None)      # wants nothing but an answer
        self.attend(ticket)
        self.wait_for_verdict(ticket)
        if isinstance(ticket.answer, str):
            raise RuntimeError(ticket.answer)
        return ticket.answer


class _Guest:
    """A worker's ticket in this process, and its bell: rung, it sends the verdict or sets an alarm."""

    def __init__(self, link: _Link | _Visitor, reader: Any, number: int, home: _Desk | _Away,
                 wants: dict[str, Any] | None) -> None:
        self.link, self.reader, self.number, self.home = link, reader, number, home
        self.alarm = math.inf           # when the one that is set will ring
        self.timer: Any = None
        self.ticket = _Ticket(wants)
        self.ticket.bell = self
        self.is_told = False

    @classmethod
    def take(cls, link: _Link | _Visitor, reader: Any, number: int, token: bytes, wants: dict[str, Any] | None,
             usage: dict[str, Any] | None, is_over: bool, may_wait: bool) -> None:
        """Do what a worker's ticket says; on the reader's thread."""
        guest, known = link.guests.get(number), _sets.get(token)
        if guest is None:
            home = _Away(token) if known is None else known._home
            guest = link.guests[number] = cls(link, reader, number, home, wants)
        try:
            if known is not None:
                known._check(wants, usage)
            guest.ticket.usage, guest.ticket.may_wait = usage, may_wait
            if is_over:
                guest.leave()
            elif wants is None and not guest.home.is_far:
                guest.refuse(guest.home.stats())
            else:
                guest.home.attend(guest.ticket)
        except Exception as error:          # of a set that is out of reach, or of what a worker makes up
            guest.refuse(str(error) or repr(error))

    def refuse(self, answer: Any) -> None:
        self.ticket.is_refused, self.ticket.answer = True, answer
        self._look()

    def leave(self) -> None:
        self.link.guests.pop(self.number, None)
        self.ticket.is_over = self.is_told = True
        self._unset_alarm()
        self.home.attend(self.ticket)

    def wake(self) -> None:
        if _here.reader is not self.reader:
            self.reader.post(self._look)
            return
        try:
            self._look()
        except Exception as error:          # not for whoever gives back just now
            _contain(error, self._look, ())

    def perish(self, error: BaseException) -> None:
        """Refuse the ticket: something of ours has failed."""
        _in_any_case(functools.partial(self.refuse, repr(error)), self.leave)

    def _look(self) -> None:
        ticket = self.ticket
        if self.is_told:
            return
        if ticket.is_granted or ticket.is_refused:
            self.is_told = True
            self._unset_alarm()
            if ticket.is_refused:
                self.link.guests.pop(self.number, None)
            self.link.lane.send(self.number, ticket.is_granted, ticket.answer)
        elif ticket.due < self.alarm:
            self._unset_alarm()
            self.alarm = ticket.due
            self.timer = self.reader.later(max(0.0, self.home.seconds_until(ticket.due)), self._ring_alarm)

    def _ring_alarm(self) -> None:
        self.alarm, self.timer = math.inf, None
        if not self.is_told:
            self.home.attend(self.ticket)
            self._look()

    def _unset_alarm(self) -> None:
        if self.timer is not None:
            self.reader.cancel(self.timer)
            self.timer = None


class _Lane:
    """The parent's end of a worker's second socket; used on the reader's thread."""

    def __init__(self, connection: socket.socket, reader: _Reader, process: _Process) -> None:
        self.connection = connection
        self.connection.setblocking(False)
        self.reader = reader
        self.process = process
        self.outbox: collections.deque[bytes | memoryview] = collections.deque()
        self.is_blocked = False

    def send(self, number: int | None, is_granted: bool, answer: Any) -> None:
        """Send a verdict, or an answer, to a ticket; what the socket does not take follows when it does."""
        self.outbox += _message(_VERDICT, _pickled((number, is_granted, answer)))
        if not self.is_blocked:
            self._flush()

    def _flush(self, events: int | None = None) -> None:
        try:
            while self.outbox:
                part = self.outbox[0]
                sent = self.connection.send(part)
                self.outbox.popleft()
                if sent < len(part):
                    self.outbox.appendleft(memoryview(part)[sent:])
        except BlockingIOError:
            if not self.is_blocked:
                self.is_blocked = True
                self.reader.watch(self.connection, selectors.EVENT_WRITE, self._flush)
            return
        except OSError:                 # the worker is dead: its sentinel tells
            self.outbox.clear()
        if self.is_blocked:
            self.is_blocked = False
            self.reader.forget(self.connection)

    def close(self) -> None:
        self.connection.close()

    def perish(self, error: BaseException) -> None:
        """Have the worker end: it would wait for verdicts for ever."""
        self.process.kill()


def _limit_set(token: bytes, limits: tuple[Limit, ...], config: dict[str, Any], keeper: Any = None) -> LimitSet:
    """Load a LimitSet: the one with this token, or one that asks where it came from, or the actor that keeps it."""
    known = _sets.get(token)
    if known is None:
        known = LimitSet(limits, config=config)
        known._token, known._home = token, _Away(token, keeper and _way_to(keeper))
        _sets[token] = known
    return known


# In an actor of Ray

_FORGOTTEN = "these limits have ended with the pool that they were made for, or with who made them"


class _RayWay(_Way):
    """The way to an actor that keeps sets; all is said on the reader's thread, and heard on Ray's."""

    def __init__(self, actor: Any) -> None:
        super().__init__()
        self.actor = actor
        self.ordinals = itertools.count()       # of messages: Ray may change their order
        self.unheard: dict[BaseFuture[None], None] = {}     # futures of messages that are not answered yet
        self.tokens: set[bytes] = set()         # of the sets that this process has moved there
        self.over: str | None = None            # why it leads nowhere any more, in words
        self.reader = _reader_for(self)

    def tell(self, words: tuple[Any, ...]) -> bool:
        heard: BaseFuture[Any] = BaseFuture()
        self.unheard[heard] = None
        if self.over or _here.reader is self.reader:        # over: there may be no reader any more
            self._send(words, heard)
        else:
            self.reader.post(self._send, words, heard)
        return True

    def _send(self, words: tuple[Any, ...], heard: BaseFuture[None]) -> None:
        number = words[0]
        try:
            if self.over:
                raise RuntimeError(self.over)
            answer = self._ask("attend", _lineage, next(self.ordinals), words)
            answer._on_completed(lambda answer: self._hear(number, heard, answer))
        except BaseException as error:
            self._hear(number, heard, error)

    def _ask(self, *args: Any) -> Any:
        _ray()                                  # else Ray would start itself
        return self.actor.do.remote(*args)

    def _do(self, *args: Any) -> None:
        try:
            self._ask(*args)
        except Exception:                       # it is dead, or Ray is
            pass

    def _hear(self, number: int, heard: BaseFuture[None], answer: Any) -> None:
        if isinstance(answer, BaseException):
            answer = False, self.over or f"the actor that keeps these limits does not answer: {_cause_of_death(answer)}"
        if answer is not None:
            self._tell(self.tickets.pop(number, None), *answer)
        self.unheard.pop(heard, None)
        _settle(heard, _RESULT, None)

    def take_over(self, limits: LimitSet) -> None:
        """Have the actor keep a set that is at home here."""
        self.tokens.add(limits._token)
        weakref.finalize(limits, self.forget, limits._token).atexit = False
        limits._home.move(limits._token, self)

    def open(self, token: bytes, *state: Any) -> None:
        described = tuple(_sets[token]._limits.values())
        self.reader.post(self._do, "open", _lineage, _pickle().dumps((token, described, *state), 5))

    def forget(self, token: bytes) -> None:
        """Be told that nobody needs a set any more; from any thread, at any time."""
        self.reader.post(self._forget, token)

    def _forget(self, token: bytes) -> None:
        with _way_lock:
            if token in self.tokens and not self.over:
                self.tokens.discard(token)
                self._do("forget", token)
                if not self.tokens:
                    self.end(_FORGOTTEN)

    def mourn(self, actor: str, process: str | None = None) -> None:
        """Have taken back what a worker held that has died; None: whatever process was its."""
        self.reader.post(self._do, "leave", actor, process)

    def lose(self, error: BaseException) -> None:
        self.reader.post(self.end, f"the actor that kept these limits has died: {_cause_of_death(error)}")

    def end(self, why: str) -> None:
        self.over = self.over or why
        _ways.pop(self.actor._actor_id, None)
        if self is _own_way:
            _kill_actor(self.actor)
        self._refuse_all(why)
        self.reader.backends.discard(self)

    def perish(self, error: BaseException) -> None:
        self.end(f"the actor that keeps these limits cannot be reached: {error!r}")

    def lose_ray(self) -> None:
        self.end("Ray was shut down, and these limits with it: make new ones")


_lineage: _Lineage = ()         # (actor, process) of whoever made the worker that this process is, and its own
_ways: dict[Any, _RayWay] = {}  # by the id of the actor
_own_way: _RayWay | None = None     # to the actor that keeps this process's sets
_way_lock = threading.RLock()


def _way_to(keeper: Any) -> _RayWay:
    with _way_lock:
        way = _ways.get(keeper._actor_id)
        if way is None:
            way = _ways[keeper._actor_id] = _RayWay(keeper)
        return way


def _keeper_of(limits: LimitSet) -> Any:
    """Return the actor that keeps a set, which moves there if it is at home here."""
    global _own_way
    with _way_lock:
        if not limits._home.is_far:
            if _own_way is None or _own_way.over:
                _own_way = _way_to(_start_keeper())
                _await_end(_own_way.actor, _own_way.lose)
            _own_way.take_over(limits)
        way = limits._home.way
    refusal = way.over if way else f"{_OUT_OF_REACH}; a Ray worker can be given those that were made in the process " \
                                   f"that makes the worker"
    if refusal:
        raise _pickle().PicklingError(refusal)
    return way.actor


def _start_keeper() -> Any:
    ray = _ray()
    strategies = _optional("ray.util.scheduling_strategies")
    here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return _actor_class("limits", True).options(num_cpus=0, scheduling_strategy=here).remote(*_own_module(), "_Keeper")


def _unheard() -> Generator[_Watch, None, None]:
    """Yield what to wait for until the actors know what was given back here: who sees a result relies on it."""
    heard = {heard for way in list(_ways.values()) for heard in list(way.unheard)}
    yield from _settled_of(heard, ALL_COMPLETED)


class _Visitor:
    """A process that has sent tickets to an actor: what a _Link and its lane are to a worker process."""

    def __init__(self) -> None:
        self.lane = self
        self.guests: dict[int, _Guest] = {}     # by number
        self.answers: dict[int, Any] = {}   # to the first message about each: futures of verdicts
        self.early: dict[int, tuple[tuple[Any, ...], Any]] = {}     # messages by ordinal that came before others
        self.next = 0                   # the ordinal whose turn it is

    def send(self, number: int, *verdict: Any) -> None:
        self.answer(number, verdict)

    def answer(self, number: int, verdict: tuple[Any, ...] | None) -> None:
        answer = self.answers.pop(number, None)
        if answer is not None and not answer.done():
            answer.set_result(verdict)

    def leave(self) -> None:
        for guest in list(self.guests.values()):
            guest.leave()
        for number in list(self.answers):
            self.answer(number, None)


class _Keeper:
    """The object of the actor: sets are at home here as in the process that made them, and their guests on its loop."""

    def __init__(self) -> None:
        _let_term_end()
        self.sets: dict[bytes, LimitSet | None] = {}    # by token; None: forgotten
        self.visitors: dict[_Lineage, _Visitor] = {}    # by lineage
        self.dead: dict[Any, None] = {}     # (actor, process), the latest; (actor, None): whatever process it had

    def open(self, client: _Lineage, moved: bytes) -> None:
        """Take over a set."""
        token, limits, states, held, now = _pickle().loads(moved)
        ahead = now - time.monotonic_ns()       # of this machine's clock; less than it is by the time of the way
        self.sets[token] = known = _limit_set(token, limits, {})
        known._home = home = _Desk(limits, lambda: time.monotonic_ns() + ahead)
        home.states = states
        visitor = self._visitor(client)
        for number, ticket in held:
            visitor.guests[number] = guest = _Guest(visitor, self, number, home, ticket.wants)
            guest.ticket, guest.is_told, ticket.bell = ticket, True, guest
            home.held[ticket] = None
        for visitor in self.visitors.values():
            self._go_on(visitor)

    def forget(self, token: bytes) -> None:
        self.sets[token] = None

    async def attend(self, client: _Lineage, ordinal: int, words: tuple[Any, ...]) -> Any:
        """Do what a ticket says; if it is new, return the verdict on it when there is one."""
        import asyncio
        visitor = self._visitor(client)
        if visitor is None:
            return None
        answer = asyncio.get_running_loop().create_future()
        visitor.early[ordinal] = words, answer
        self._go_on(visitor)
        return await answer

    def _go_on(self, visitor: _Visitor) -> None:
        """Take messages in their order, as far as they are there and the sets that they are about."""
        _here.reader = self
        while visitor.next in visitor.early:
            words, answer = visitor.early[visitor.next]
            number, token, _, _, is_over, _ = words
            if token not in self.sets:
                return
            del visitor.early[visitor.next]
            visitor.next += 1
            if is_over or number in visitor.guests:
                answer.set_result(None)
            else:
                visitor.answers[number] = answer
            if self.sets[token] is not None:
                _Guest.take(visitor, self, *words)
            elif not is_over:
                visitor.send(number, False, _FORGOTTEN)
            if is_over:
                visitor.answer(number, None)

    def _visitor(self, client: _Lineage) -> Any:
        """Return what is known of a process, None if that is that it is dead: as one is whose actor has a new one."""
        if self._is_dead(client):
            return None
        if client not in self.visitors:
            for other in [other for other in self.visitors if client and other and other[-1][0] == client[-1][0]]:
                self.leave(*other[-1])
            self.visitors[client] = _Visitor()
        return self.visitors[client]

    def _is_dead(self, client: _Lineage) -> bool:
        return any((actor, process) in self.dead or (actor, None) in self.dead for actor, process in client)

    def leave(self, actor: str, process: str | None = None) -> None:
        """Take back what a dead process held, and what those did that it had made."""
        self.dead[actor, process] = None
        if len(self.dead) > 10_000:     # messages that were on their way are long here
            del self.dead[next(iter(self.dead))]
        for client in [client for client in self.visitors if self._is_dead(client)]:
            self.visitors.pop(client).leave()

    def watch(self) -> Any:
        return _never_end()

    # What a guest needs of a reader

    def later(self, seconds: float, function: Callable[[], object]) -> Any:
        import asyncio
        return asyncio.get_running_loop().call_later(seconds, function)

    def cancel(self, timer: Any) -> None:
        timer.cancel()


# === Pools ===

_BACKENDS: dict[tuple[ExecutionMode, bool], type[_Backend]] = {
    (ExecutionMode.Sync, False): _SyncBackend,
    (ExecutionMode.Threads, False): _ThreadBackend,
    (ExecutionMode.Threads, True): _OnDemandThreadBackend,
    (ExecutionMode.Asyncio, False): _AsyncioBackend,
    (ExecutionMode.Processes, False): _ProcessBackend,
    (ExecutionMode.Processes, True): _OnDemandProcessBackend,
    (ExecutionMode.Ray, False): _RayBackend,
    (ExecutionMode.Ray, True): _OnDemandRayBackend,
}

_GRACE = 0.9            # seconds: between TERM and KILL, and what a stop may take beyond its timeout
_pools: weakref.WeakSet[_Pool] = weakref.WeakSet()          # those with workers
_is_exiting = False                 # the interpreter has begun to finish
_EXITING = "cannot submit: the interpreter is exiting (cannot schedule new futures after interpreter shutdown)"


def _must_not_block() -> bool:
    """Tell whether code that submits here has to go on: see 'The queue' in the README.

    In a call, a done-callback, a thread of ours or a running event loop waiting for a place could
    wait for itself. A signal handler and `__del__` interrupt code that may be what they wait for.
    """
    if _here.is_ours or _here.callbacks or _calling.get() is not None:
        return True
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        return True
    return _is_interruption(sys._getframe())


def _is_interruption(frame: types.FrameType | None) -> bool:
    """Tell whether a signal handler or a `__del__` is on the stack."""
    handlers = _signal_handlers()
    while frame is not None:
        if frame.f_code in handlers or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _all_of(live: Iterable[T]) -> list[T]:
    """Return what is in a weak set or dict that other threads change."""
    while True:
        try:
            return list(live)
        except RuntimeError:            # changed size during iteration
            continue


def _signal_handlers() -> Collection[Any]:
    """Return the code objects of this process's handlers; empty where signals cannot come."""
    if threading.current_thread() is not threading.main_thread():
        return ()
    # `signal` makes an enum of each answer: 80 microseconds instead of 3
    import _signal  # type: ignore
    handlers = filter(callable, map(_signal.getsignal, range(1, _signal.NSIG)))
    return {_code_of(handler) for handler in handlers} - {None}


def _code_of(fn: Any) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    fn = getattr(fn, "__func__", fn)
    return getattr(fn, "__code__", None) or getattr(getattr(type(fn), "__call__", None), "__code__", None)


class _TimeKeeper:
    """Looks to the time that a pool's calls run, and has those that take too long ended; on the reader's thread."""

    def __init__(self, limits: dict[str, float | None] | float) -> None:
        self.limits = limits if isinstance(limits, dict) else {"*": limits}
        self.reader = _reader_for(self)

    def limit_of(self, call: _Call) -> float | None:
        """Return the seconds that a call may run, None for no limit."""
        name = call.method
        if name not in self.limits:
            name = "submit" if name in ("__call__", "_chunk") and "submit" in self.limits else "*"
        seconds = self.limits[name]
        return seconds and seconds * call.count

    def watch(self, call: _Call) -> None:
        """Be told that a call begins; from any thread, perhaps not for the first time."""
        if call.alarm is None:
            seconds = self.limit_of(call)
            if seconds is not None:
                self.reader.post(self._set, call, seconds, _now())

    def forget(self, call: _Call) -> None:
        """Be told that a call has ended."""
        if call.alarm is not None:
            self.reader.post(self.reader.cancel, call.alarm)

    def _set(self, call: _Call, seconds: float, began: float) -> None:
        if call.alarm is None and not call.future.done():
            left = max(0.0, began + seconds - _now())
            call.alarm = self.reader.later(left, functools.partial(self._ring, call, seconds))
            if call.future.done():          # since: who ended it may not have seen the alarm
                self.reader.cancel(call.alarm)

    def _ring(self, call: _Call, seconds: float) -> None:
        backend = call.backend
        if backend is not None and not call.future.done():
            call.overran = seconds
            try:
                backend.overrun(call)
            except Exception:           # of a thread factory: it must not end the thread that hears everybody
                logger.exception("exception while %s was ended", call.future)

    def end(self) -> None:
        self.reader.post(self.reader.backends.discard, self)

    def perish(self, error: BaseException) -> None:
        """Leave the calls alone: nobody looks to their time any more, as has been logged."""


class _Pool:
    """The workers behind a handle: the line of calls before them, and who gets which.

    A call is in `calls` from its submission until it is settled; in `backlog` while it is ready and
    no worker has room for it; in its backend's `calls` from then on. These are dicts and deques whose
    single operations are atomic, so that giving a place back needs no lock and can happen anywhere,
    in a signal handler too. Only placing is done by one thread at a time: whoever finds another one
    at it leaves the work to that one, and nobody waits. It is done in steps that may be done twice:
    a signal handler may raise in the middle of any of them.
    """

    def __init__(self, recipe: _Recipe, options: _Options) -> None:
        self.recipe = recipe
        self.options = options
        self.name = recipe.name
        # in words, when a worker is replaced: of functions it has no state of the user's
        self.loss = "" if recipe.cls is TaskWorker else "its state is lost, "
        self.bound = recipe.bound
        self.room = options.room
        self.balancer: Any = _BALANCERS[options.load_balancing]()
        self.choose: Callable[[list[_Backend], float], _Backend | None] = \
            self._choose_or_grow if options.on_demand else self.balancer.choose
        self.rests = options.on_demand      # a worker is told when it has nothing to do: it may be about to go
        self.leaving: dict[_Backend, None] = {}     # workers that were told to end, and have not yet
        self.down: dict[_Backend, None] = {}        # workers that cannot be started now, and will be
        self.kind = kind = _BACKENDS[options.mode, options.on_demand]
        self.runs_inline, self.prepares, self.make_future = kind.runs_inline, kind.prepares, kind.future
        self.on_demand = options.on_demand
        self.backends: list[_Backend] = []
        self.calls: dict[_Call, None] = {}
        self.backlog: collections.deque[_Call] = collections.deque()
        # what else is for the one who places to do
        self.chores: collections.deque[Callable[[list[tuple[_Call, BaseException]]], None]] = collections.deque()
        self.turn: dict[str, list[int]] = {}    # "is": whose turn it is to place, a list of his thread
        self.is_started = False
        self.setup: Any = None          # what each worker needs to be built
        # rates of which only the user's code knows how much it takes
        self.rates = [key for each in _sets_in(recipe.limits) for key in each if key not in each._automatic]
        self.dispatched = 0
        self.tally = _Tally()           # of calls that no worker has had, and of workers that are gone
        self.restarts = 0
        self.is_stopped = False
        self.closed: str | None = None  # why no call is taken any more, in words
        self.is_finishing = False       # the workers end when the last call has
        self.once = itertools.count()   # who asks first gets 0: ending is done once
        self.stops = itertools.count()  # the same, of stop()
        self.stoppers: set[int] = set()         # the threads that are at it
        # when what still runs is ended, and why, in words: of each stop(), of which the earliest holds
        self.deadlines: list[tuple[float, str]] = []
        self.moved: BaseFuture[None] = BaseFuture()     # done when there is another one
        self.over: BaseFuture[None] = BaseFuture()      # `stop` has done all it could
        # why nobody takes the next call: what the last worker was given up for
        self.broken: BaseException | None = None
        self.keeper: _TimeKeeper | None = None  # of the time of its calls, if they have limits
        self.kept: dict[Any, Any] = {}  # limit sets that its calls have brought to processes
        # functions that its calls name again and again, and what stands for them
        self.known: dict[Any, Any] = {}
        self.context = contextvars.copy_context()       # for constructors: of whoever made the pool
        self.failures = _Failures(self.name)

    # Starting

    def start(self) -> None:
        """Build the workers side by side; return when all are built, or raise what one of them raised."""
        self.is_started = True
        self.setup = self.kind.set_up(self.recipe, self.options)
        if self.options.call_timeout is not None and self.kind.has_time_limits:
            self.keeper = _TimeKeeper(self.options.call_timeout)
        if self.on_demand:
            _pools.add(self)
            return
        starts = []
        try:
            for index in range(self.options.max_workers):
                backend = self.kind(self, index)
                self.backends.append(backend)
                try:
                    backend.start()
                except BaseException:
                    self._remove(backend)       # there is nothing of it to end
                    raise
                starts.append(backend.started)
            _pools.add(self)
            _run(_settled_of(set(starts), FIRST_EXCEPTION), None)
            for started in starts:
                if started.done():
                    started.result()
        except BaseException:
            self.stop(0)
            raise
        self.place()            # what a signal handler has submitted meanwhile

    # Submitting

    def submit(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None = None,
               count: int = 1) -> BaseFuture[Any]:
        """Send a call on its way, which stands for so many, and return its future; wait for a place if one may.

        Raises RuntimeError when no call is taken any more, TimeoutError at the deadline.
        """
        future: BaseFuture[Any] = self.make_future()
        call = future._call = _Call(self, future, method, args, kwargs)
        if count > 1:
            call.count = count
        self.calls[call] = None
        try:
            if self.closed is not None or _is_exiting:      # looked at second: stop() looks at `calls` second
                raise _own_error(RuntimeError(self.closed or _EXITING))
            if _may_hold_futures(args, kwargs) and self.options.unwrap_futures:
                nested = _Nested([args, kwargs])
                if nested.futures:
                    self._await_dependencies(call, nested)
                    return future
            if self.prepares and not self._prepare(call):
                return future
            self.enqueue(call)
            if call.backend is None:
                self._wait_for_place(call, deadline)
        except BaseException:
            _withdraw(future)           # the caller will never see it
            raise
        return future

    def _prepare(self, call: _Call) -> bool:
        """Have the call pickled, in the caller; settle its future and return False if that fails."""
        args, kwargs = call.args, call.kwargs
        if args is None or kwargs is None:      # stop() was quicker: it is settled
            return False
        if args and call.method in ("submit", "_chunk"):
            call.fn = args[0]
        try:
            self.kind.prepare(call, args, kwargs)
        except BaseException as error:
            _settle_unbegun(call.future, _ERROR, _without_our_frame(error))
            if not isinstance(error, Exception):
                raise
            return False
        call.args = call.kwargs = None
        return call in self.calls           # else stop() came first: start no worker for it

    def _await_dependencies(self, call: _Call, nested: _Nested) -> None:
        """Have the call enqueued when the futures among its arguments are done."""
        futures = list(dict.fromkeys(nested.futures))
        if self.prepares:
            places = {id(future): _Place(n) for n, future in enumerate(futures)}
            call.args, call.kwargs = nested.rebuilt(lambda future: places[id(future)])
            if not self._prepare(call):
                return
        pending = [future for future in futures if not future.done()]
        if pending and self.runs_inline:
            self.refuse_to_wait_here()
        then = functools.partial(self._resume, call, nested, futures)
        if pending and not self.runs_inline:
            call.watch = _Watch(pending, len(pending), _has_no_result, then)
            return
        if pending:                         # in sync mode: right here
            call.watch = watch = _Watch(pending, len(pending), _has_no_result)
            _attend(call.future, "_wakers", lambda future: watch.wake())       # of stop(), in another thread
            watch.sleep(None)
        if not call.future.done():
            then()

    def refuse_to_wait_here(self) -> None:
        """Raise RuntimeError where a call that waits for the futures among its arguments would stall others."""
        asyncio = sys.modules.get("asyncio")
        if _here.callbacks or _here.is_ours or asyncio is not None and asyncio._get_running_loop() is not None:
            how = "a blocking call" if self.options.blocking else "a call in mode 'sync'"
            raise _own_error(RuntimeError(
                f"{how} cannot wait for the futures among its arguments in a done-callback, in a worker or on an "
                f"event loop: wait for them first, or use another mode than that of {self.name}, without blocking"))

    def _resume(self, call: _Call, nested: _Nested, futures: list[Any]) -> None:
        try:
            for future in futures:
                if future.done() and _has_no_result(future):
                    _fail_dependent(call.future, *_outcome_of(future))
                    return
            call.watch, call.since = None, _now()
            if self.prepares:
                self.kind.complete(call, [self.kind.value_of(future) for future in futures])
            else:
                call.args, call.kwargs = nested.rebuilt(self.kind.value_of)
            if not self.runs_inline:
                self.place(call)
                return
        except BaseException as error:      # of loading a dependency, say; the call must not stay pending
            _settle_unbegun(call.future, _ERROR, error)
            return
        self.enqueue(call)

    def enqueue(self, call: _Call) -> None:
        """Have a call that is ready carried out in its turn."""
        if self.runs_inline:
            self._assign(call, self.backends[0])
        else:
            self.place(call)

    def _wait_for_place(self, call: _Call, deadline: float | None) -> None:
        """Sleep until the call has been placed or settled, where this thread may sleep."""
        if self.on_demand or self.room == math.inf or self.turn.get("is") == [threading.get_ident()] \
                or _must_not_block():
            return
        gate = call.gate = _held_lock()
        # Asked after the gate was made: who settles the call takes it out before he looks for a gate.
        if call.backend is None and call in self.calls and not _sleep_on(gate, _left(deadline)):
            raise TimeoutError("no place in the queue became free in time")

    def is_stuck_here(self, call: _Call) -> bool:
        """Tell whether a call cannot begin, or go on, while this thread waits for it."""
        if call.watch is not None:          # it may end without a worker
            return False
        backends = self.backends
        backend = call.backend or (backends[0] if len(backends) == 1 and not self.on_demand else None)
        return backend is not None and backend.is_stuck_here(call)

    # Placing

    def place(self, call: _Call | None = None) -> None:
        """Give this call, after what is in the backlog, to workers that have room."""
        mine, turn = [threading.get_ident()], self.turn
        try:
            if call is not None:
                if self.backlog or self.chores or turn.setdefault("is", mine) is not mine:
                    self.backlog.append(call)
                else:                   # what the loop below does, for the one that need not stand in line
                    backend = self.choose(self.backends, self.room)
                    if backend is None:
                        self.backlog.append(call)
                    else:
                        self._assign(call, backend)
                    del turn["is"]
            while (self.backlog or self.chores) and turn.setdefault("is", mine) is mine:
                refused = self._place_all()
                del turn["is"]
                for each, error in refused:
                    _settle_unbegun(each.future, _ERROR, each.reason(error))
                # Looked at again after the turn: who gave a place back meanwhile left it to us.
                if not (self.chores or self.backlog and self._has_room()):
                    return
        except BaseException:           # a signal handler's: the turn must not stay taken
            if turn.get("is") is mine:
                del turn["is"]
            if call is not None and call not in self.backlog:
                self.backlog.appendleft(call)
            self.place()                # also what others have left to this thread while it had its turn
            raise

    def _has_room(self) -> bool:
        return any(len(backend.calls) < self.room for backend in self._usable())

    def _place_all(self) -> list[tuple[_Call, BaseException]]:
        """Place calls while there is room; return those that nobody will ever take, with the reason."""
        refused: list[tuple[_Call, BaseException]]
        backlog, refused = self.backlog, []
        while self.chores:
            try:
                self.chores[0](refused)
            except Exception:           # of ours: it must not reach whoever places just now
                logger.exception("an error of concurry's own, in the pool %s", self.name)
            self.chores.popleft()
        while backlog:
            call = backlog[0]
            if call in self.calls:          # it is not settled yet
                # With a backend: the step is done a second time.
                backend = call.backend or self.choose(self.backends, self.room)
                if backend is not None:
                    try:
                        self._assign(call, backend)
                    except Exception as error:      # likewise
                        logger.exception("an error of concurry's own, in the call %s: it fails", call)
                        refused.append((call, error))
                elif self.broken is None:
                    break
                else:
                    refused.append((call, self.broken))
            backlog.popleft()
        return refused

    def _assign(self, call: _Call, backend: _Backend) -> None:
        call.backend = backend
        backend.calls[call] = None
        if call not in self.calls:      # settled since: who did that may not have seen the backend
            backend.calls.pop(call, None)
            if self.rests and not backend.calls:
                backend.rest()          # it may have been made for this call
            return
        backend.total += 1
        self.dispatched += 1
        backend.submit(call)
        if call.gate is not None:
            call.open_gate()

    def _choose_or_grow(self, backends: list[_Backend], room: float) -> _Backend | None:
        """Return the worker for the next call, a new one if need be; None if there may be no more."""
        self.broken = None
        backend: _Backend | None = self.balancer.choose(self._usable(), room)
        if backend is None and len(backends) < self.options.max_workers:
            try:
                backend = self._grow()
            except Exception as error:
                if not backends:            # else the call waits for one of those
                    self.broken = error
        return backend

    def _usable(self) -> list[_Backend]:
        """Return the workers that may get a call once they have room."""
        return [backend for backend in self.backends if not backend.is_spent]

    def _grow(self, is_replacement: bool = False) -> _Backend:
        taken = {backend.index for backend in [*self.backends, *self.down]}
        backend = self.kind(self, next(index for index in itertools.count() if index not in taken))
        backend.is_replacement = is_replacement
        backend.start()
        self._add(backend)
        return backend

    def _add(self, backend: _Backend) -> None:
        self.backends = sorted([*self.backends, backend], key=lambda backend: backend.index)
        # Looked at afterwards: who has ended all workers since may not have seen this one.
        if self.is_stopped:
            backend.kill("was stopped")
        elif self.is_finishing and not self.calls:
            backend.finish()

    def leave(self, call: _Call, kind: str) -> None:
        """Give back the place of a call that is settled, or about to be; from any thread, at any time."""
        self.calls.pop(call, None)
        call.args = call.kwargs = call.context = call.fn = None     # the context holds the call
        if self.prepares:
            call.message = None
            call.dependencies = ()      # what lies in Ray's store for it
        backend = call.backend
        tally = self.tally if backend is None else backend.tally
        if kind is _RESULT:
            tally.done += 1
        elif kind is _ERROR:
            tally.failed += 1
        else:
            tally.cancelled += 1
        began = call.began
        if began is not None:
            took = _now() - began
            tally.running += took
            tally.waiting += began - call.since
        if backend is not None:
            backend.calls.pop(call, None)
            if self.rests and not backend.calls:
                backend.rest()
        if call.gate is not None:
            call.open_gate()
        if call.watch is not None:
            call.watch.leave()
        if self.keeper is not None:
            self.keeper.forget(call)
        self.go_on()

    def go_on(self) -> None:
        """Do what is due when a place is free again."""
        if self.backlog:
            self.place()
        if self.is_finishing and not self.calls:
            self._finish()

    def dismiss(self, backend: _Backend) -> None:
        """Have a worker end, if it is idle when its turn comes."""
        self.have(functools.partial(self._dismiss, backend))

    def _dismiss(self, backend: _Backend, refused: list[tuple[_Call, BaseException]]) -> None:
        if not backend.calls and backend in self.backends:
            self._let_leave(backend)    # before it is forgotten: this may be done twice, and must not be left out
            self._remove(backend)
            if not (self.on_demand or any(other.is_spent for other in self.backends)):
                self.rests, self.choose = False, self.balancer.choose

    def _let_leave(self, backend: _Backend) -> None:
        self.leaving[backend] = None
        _attend(backend.ended, "_wakers", lambda ended: self.leaving.pop(backend, None))
        backend.finish()

    def resize(self, size: int) -> None:
        """Add workers, or have some go, so that there are so many; wait until the new ones are built."""
        if self.closed is not None:
            raise RuntimeError(f"cannot resize {self.name}: it is stopped or shut down")
        if self.options.mode in _ONE_WORKER:
            if size != 1:
                raise ValueError(f"n={size} is not possible: mode {self.options.mode.value!r} has exactly one worker")
            return
        if not self.is_started:             # a @task before its first call
            self.options.max_workers = size
            return
        added: BaseFuture[list[_Backend]] = BaseFuture()
        self.have(functools.partial(self._resize, size, [], added))
        if self.turn.get("is") == [threading.get_ident()]:      # we have interrupted that
            return
        try:
            _run(_settled_of({backend.started for backend in added.result()}, ALL_COMPLETED), None)
            for backend in added.result():
                backend.started.result()
        except BaseException:
            there = sum(not each.started.done() or each.started.exception() is None for each in self._usable())
            self.options.max_workers = max(1, there)
            raise

    def _resize(self, size: int, added: list[_Backend], outcome: BaseFuture[list[_Backend]], refused: Any) -> None:
        self.options.max_workers = size
        try:
            while len(self._usable()) + len(self.down) < size and not self.on_demand and self.closed is None:
                added.append(self._grow(is_replacement=True))
        except Exception as error:
            _settle(outcome, _ERROR, error)
        usable = self._usable()
        for backend in list(self.down)[:max(0, len(usable) + len(self.down) - size)]:
            del self.down[backend]
            self.tally.add(backend.tally)
            self._let_leave(backend)
        # The idle ones first, and of those the last.
        for backend in sorted(usable, key=lambda each: (len(each.calls), -each.index))[:max(0, len(usable) - size)]:
            backend.is_spent = self.rests = True
            if not self.on_demand:
                self.choose = self._choose_staying
            if not backend.calls:
                self._dismiss(backend, refused)
        _settle(outcome, _RESULT, added)

    def _choose_staying(self, backends: list[_Backend], room: float) -> Any:
        return self.balancer.choose(self._usable(), room)

    def _remove(self, backend: _Backend) -> None:
        # A new list: others may be reading the old one.
        if backend not in self.backends:
            return
        self.backends = [other for other in self.backends if other is not backend]
        backend.tally.retried = backend.halt.retried
        self.tally.add(backend.tally)

    def have(self, chore: Callable[[list[tuple[_Call, BaseException]]], None]) -> None:
        """Have something done by the one who places, perhaps twice; from any thread. It may add to the refused."""
        self.chores.append(chore)
        self.place()

    def replace(self, backend: _ThreadBackend) -> None:
        """Have a new worker take the place of one that is left to itself; from any thread."""
        self.have(functools.partial(self._replace, backend))

    def _replace(self, backend: _ThreadBackend, refused: list[tuple[_Call, BaseException]]) -> None:
        was_its_last = backend in self.leaving      # the call that has just failed: the worker was about to go
        if not (was_its_last or backend in self.backends):
            return
        calls = [call for call in backend.give_up() if call in self.calls]
        has_heir = not (self.on_demand or backend.is_spent or self.is_stopped or self.is_finishing and not self.calls)
        logger.warning("%s is given up with the call that it runs: its thread is left to itself%s", backend.name,
                       f", {self.loss}a new worker takes its place" if has_heir else "")
        (self.tally if was_its_last else backend.tally).deaths += 1
        for call in calls:
            backend.calls.pop(call, None)
            call.backend = None
        self.backlog.extendleft(reversed(calls))
        self.dispatched -= len(calls)
        if not has_heir:
            self._remove(backend)
            return
        self.restarts += 1
        new = self.kind(self, backend.index)
        new.is_replacement = True
        try:
            new.start()
        except Exception as error:
            self._remove(backend)
            new.calls = dict.fromkeys(calls)
            self.chores.append(functools.partial(self._lose, new, error))
            return
        # It has the statistics of the other one, whose calls may still end.
        new.tally, new.halt.retried, new.total = backend.tally, backend.halt.retried, backend.total - len(calls)
        self.backends = [other for other in self.backends if other is not backend]
        self._add(new)

    def _put_down(self, backend: _Backend, refused: list[tuple[_Call, BaseException]]) -> None:
        """Have others carry out the calls of a worker that cannot be started now."""
        if backend not in self.backends:
            return
        calls = [call for call in list(backend.calls) if call in self.calls]
        if backend.is_spent:
            self._let_leave(backend)
            self._remove(backend)
        else:
            self.down[backend] = None
            self.backends = [other for other in self.backends if other is not backend]
        for call in calls:
            call.backend = None
        backend.calls.clear()
        backend.queue.clear()       # type: ignore[attr-defined]
        self.backlog.extendleft(reversed(calls))
        self.dispatched -= len(calls)

    def _take_up(self, backend: _Backend, refused: list[tuple[_Call, BaseException]]) -> None:
        if backend in self.down:
            del self.down[backend]
            self._add(backend)

    def lose(self, backend: _Backend, error: BaseException) -> None:
        """Give up a worker that cannot be started: the others take over, or all fails with this error."""
        self.have(functools.partial(self._lose, backend, error))

    def _lose(self, backend: _Backend, error: BaseException,
              refused: list[tuple[_Call, BaseException]]) -> None:
        self._remove(backend)
        self.down.pop(backend, None)
        calls = [call for call in list(backend.calls) if call in self.calls]
        for call in calls:
            call.backend = None
        if self.on_demand:
            refused.extend((call, error) for call in calls)
            return
        self.backlog.extendleft(reversed(calls))
        backend.calls.clear()
        if not (self.backends or self.down):
            self.broken = error

    # Ending

    def close(self, reason: str) -> None:
        """Take no more calls."""
        if self.closed is None and _is_exiting:
            self.closed = _EXITING
        if self.closed is None:
            # the words in brackets are those of the standard library, by which clients know it
            self.closed = f"cannot submit to {self.name}: {reason} (cannot schedule new futures after shutdown)"

    def finish(self) -> None:
        """Let what was submitted be done, then end the workers; return at once."""
        self.close("it is shut down")
        self.is_finishing = True
        if not self.calls:
            self._finish()

    def _finish(self) -> None:
        if next(self.once) == 0:
            if self.keeper is not None:
                self.keeper.end()
            workers = self._everybody()
            for backend in [*self.backends, *self.down]:
                backend.finish()
            # When they have ended nothing of theirs holds a future any more.
            _Watch([worker.ended for worker in workers], len(workers), then=self.failures.end)
            if not workers:
                self.failures.end()

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """Finish, and wait until nothing is left of the workers, unless this is one of them."""
        self.close("it is shut down")
        if cancel_futures:
            for call in list(self.calls):
                _withdraw(call.future)
        self.finish()
        if wait and self._can_wait():
            _run(self.until_ended(), None)
            self._let_go()

    def _can_wait(self) -> bool:
        """Return whether this thread may wait for the end: else it would wait for itself."""
        return not self._is_here() and threading.get_ident() not in self.stoppers

    def _is_here(self) -> bool:
        call = _calling.get()
        return call is not None and getattr(call, "pool", None) is self \
            or any(backend.is_here() for backend in self.backends)

    def until_ended(self) -> Generator[Any, Any, None]:
        """Yield what to wait for until all calls and workers have ended; or a stop() has, where there is one."""
        while not self.over.done():
            pending = {future for future in (call.future for call in list(self.calls)) if not future.done()} \
                or {worker.ended for worker in self._everybody() if not worker.ended.done()}
            if not pending and not self.is_stopped:
                return
            watch = _Watch([*pending, self.over], len(pending) or 1, lambda future: future is self.over)
            try:
                yield watch
            finally:
                watch.leave()

    def _everybody(self) -> list[_Backend]:
        return [*self.backends, *self.leaving, *self.down]

    def stop(self, timeout: float | None = None, join: bool = True) -> None:
        """Drop what has not begun, let what runs finish within the timeout, then end it the hard way.

        Without `join` another thread does everything after the first step. If several stops overlap, the earliest
        deadline applies, and each returns when the pool has ended, unless it would wait for itself.
        """
        seconds: float = self.options.stop_timeout if timeout is None else timeout
        self.deadlines.append((time.monotonic() + seconds, f"was stopped after {seconds:g} s"))
        moved, self.moved = self.moved, BaseFuture()
        _settle(moved, _RESULT, None)
        if next(self.stops):
            if join and self._can_wait():
                _run(_settled_of({self.over}, ALL_COMPLETED), None)
            return
        self.is_stopped = True
        self.close("it is stopped")
        end = functools.partial(self._end, next(self.once) == 0)
        self.stoppers.add(threading.get_ident())        # in done-callbacks of what is dropped
        try:
            dropped = sum(_withdraw(call.future) for call in list(self.calls))
            if dropped:
                logger.warning("%s was stopped: %d calls that had not begun were cancelled", self.name, dropped)
            for backend in list(self.backends):
                backend.hurry()
        except BaseException:
            end(join=False)
            raise
        finally:
            self.stoppers.discard(threading.get_ident())
        if not join:
            try:
                threading.Thread(target=end, name=f"stop of {self.name}", daemon=True).start()
                return
            except RuntimeError:        # at the interpreter's exit
                pass
        end()

    def join(self, timeout: float | None) -> bool:
        """Wait until the end that has been begun is there; return whether it is."""
        if self.closed is None:
            raise RuntimeError(f"cannot join {self.name}: it is neither stopped nor shut down")
        if not self._can_wait():
            raise RuntimeError(f"cannot join {self.name}: this call of it would wait for itself")
        deadline = _deadline(timeout)
        for watch in self.until_ended():
            if _left(deadline) == 0:
                return False
            watch.sleep(_left(deadline))
        self._let_go()
        return True

    def _end(self, is_first: bool, join: bool = True) -> None:
        self.stoppers.add(threading.get_ident())
        try:
            if join:
                self._end_running(is_first)
            else:
                self._kill_all()
        except BaseException:           # Ctrl-C: as if the time were over, but without waiting
            self._kill_all()
            raise
        finally:
            self.stoppers.discard(threading.get_ident())
            _settle(self.over, _RESULT, None)

    def why(self) -> str:
        """Return why what still runs is ended."""
        return min(self.deadlines)[1]

    def _kill_all(self) -> None:
        for backend in [*self.backends, *self.down]:
            backend.kill(self.why())

    def _end_running(self, is_first: bool) -> None:
        mine = {_calling.get()}.union(*(backend.calls_here() for backend in self.backends))
        running = [call for call in list(self.calls) if call not in mine]       # whoever stops cannot wait for itself
        self._wait_until_deadline(
            {call.future for call in running if call.backend is None or not call.backend.stalls_here()})
        idle = []
        for backend in [*self.backends, *self.down]:
            if any(call in backend.calls for call in running):
                backend.kill(self.why())
                continue
            idle.append(backend)
            if is_first:
                backend.finish()
        # Threads: they end at once, but on a busy machine that is not now.
        self._wait_until_deadline(
            {each.ended for each in idle if not (each.can_be_killed or each.is_here())}, _GRACE)
        self._see_them_end()
        for call in running:            # of a process that even KILL does not end at once, or that could not be started
            if call in self.calls and call.backend is not None:
                _settle(call.future, _ERROR, call.backend.stopped(call, self.why(), True if call.deaths else None))
            elif call in self.calls:
                _settle_unbegun(call.future, _ERROR, call.reason(RuntimeError(self.closed)))

    def _wait_until_deadline(self, futures: Iterable[BaseFuture[Any]], least: float = 0.0) -> set[BaseFuture[Any]]:
        """Wait for the futures until the deadline, which may be moved, but `least` seconds; return those not done."""
        while True:
            moved = self.moved          # before the deadline is looked at
            pending = {future for future in futures if not future.done()}
            left, least = max(min(self.deadlines)[0] - time.monotonic(), least), 0.0
            if not pending or left <= 0:
                return pending
            watch = _Watch([*pending, moved], len(pending), lambda future, moved=moved: future is moved)   # type: ignore[misc]
            try:
                watch.sleep(left)
            finally:
                watch.leave()

    def _see_them_end(self) -> None:
        """Wait for the workers; kill those that are late; warn of what cannot be killed."""
        ended = {backend.ended: backend for backend in self._everybody() if not backend.is_here()}
        late = self._wait_until_deadline(ended, 0.05)
        for future in late:
            ended[future].kill(self.why())
        late = {future for future in late if ended[future].can_be_killed}
        _run(_settled_of(late, ALL_COMPLETED), _GRACE + 0.05)
        self._let_go()
        alive = sum(not future.done() for future in ended)
        if alive:
            _warn(f"{alive} workers of {self.name} go on although it was stopped: a thread cannot be killed",
                  ResourceWarning)

    def _let_go(self) -> None:
        if self.keeper is not None:
            self.keeper.end()
        self.setup = None               # and the descriptors that it holds
        self.recipe.let_go()
        self.kind.tear_down(self)
        self.failures.end()

    def abandon(self) -> None:
        """Be of no use in a forked child: its workers are the parent's. Nobody waits here, no lock is sure."""
        self.is_stopped = True
        next(self.stops)
        self.over.__dict__.setdefault("_gate", (_RESULT, None))
        self.closed = f"{self.name} belongs to the parent of this process: os.fork does not copy its workers"
        for call in list(self.calls):
            outcome = _ERROR, RuntimeError(self.closed)
            gate = call.future.__dict__.setdefault("_gate", outcome)
            if gate is not outcome and type(gate) is _Gate:
                gate.outcome = outcome

    # Looking inside

    def stats(self) -> dict[str, Any]:
        busy = sum(bool(backend.calls) for backend in self.backends)
        return {
            "total_workers": len(self.backends),
            "max_workers": self.options.max_workers,
            "on_demand": self.on_demand,
            "on_demand_active": busy if self.on_demand else 0,
            "restarts": self.restarts,
            "stopped": self.closed is not None,
            "max_queued_tasks": None if self.room == float("inf") or self.on_demand else self.room,
            "load_balancer": {"algorithm": self.balancer.algorithm, "total_dispatched": self.dispatched,
                              **self.balancer.stats(self.backends)},
        }

    def tallies(self) -> dict[str, Any]:
        """Return what has become of all calls, and by worker."""
        total, workers, calls = _Tally(), {}, list(self.calls)
        total.add(self.tally)
        for backend in [*self.backends, *self.down]:
            backend.tally.retried = backend.halt.retried
            total.add(backend.tally)
            workers[backend.name] = self._told(backend.tally, list(backend.calls))
        return {**self._told(total, calls), "workers": workers}

    def _told(self, tally: _Tally, calls: list[_Call]) -> dict[str, Any]:
        running = sum(call.future.running() for call in calls)
        is_told = self.options.mode is not ExecutionMode.Ray        # whose actors do not count their retries
        return {"done": tally.done, "failed": tally.failed, "cancelled": tally.cancelled, "running": running,
                "queued": len(calls) - running, "retried": tally.retried if is_told else None, "deaths": tally.deaths,
                "retired": tally.retired, "time_running": tally.running, "time_waiting": tally.waiting}

    def dump(self, file: TextIO) -> None:
        """Print where each worker is."""
        for backend in self._everybody():
            calls = [call for call in list(backend.calls) if call.future.running()]
            doing = ", ".join(call.shown() + _how_long(backend.beginning_of(call)) for call in calls)
            print(f"{backend.where()}: {doing or backend.state()}", *backend.endings(), sep="\n", file=file)
            for text in backend.stacks() if calls else ():
                print(text.rstrip("\n"), file=file)
        waiting = sum(call.backend is None for call in list(self.calls))
        if waiting:
            print(f"{self.name}: {waiting} calls wait for a worker, or for futures among their arguments", file=file)


def _how_long(began: float | None) -> str:
    return "" if began is None else f" for {_now() - began:.1f} s"


def _warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of whoever has called this module."""
    import warnings
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals is globals():
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _finish_all() -> None:
    """Finish what was submitted anywhere: the interpreter is about to exit, the daemons still run."""
    global _is_exiting
    _is_exiting = True
    pools = [pool for pool in _all_of(_pools) if not pool.is_stopped]
    calls: Any = True
    while calls:
        calls = [call for pool in pools for call in list(pool.calls)]
        ready = {call.future for call in calls if call.is_ready()}
        if ready:
            _run(_settled_of(ready, ALL_COMPLETED), None)
        else:                           # they wait for what nobody of ours will finish
            for call in calls:
                _withdraw(call.future)
    backends = [backend for pool in pools for backend in list(pool.backends)]
    for pool in pools:
        pool.finish()
    _run(_settled_of({backend.ended for backend in backends}, ALL_COMPLETED), _GRACE)
    _run(_settled_of({pool.over for pool in _all_of(_pools) if pool.is_stopped}, ALL_COMPLETED), None)


def _abandon_all() -> None:
    """Make the parent's handles and futures say, in a forked child, that they are the parent's."""
    global _pools, _reader_lock, _naming, _upstream, _own_way, _way_lock, _screens_lock
    _upstream = _own_way = None
    _way_lock = threading.RLock()
    _ways.clear()
    _screens.clear()
    _screens_lock = threading.RLock()
    for limits in list(_sets.values()):
        # Acquisitions know the desk: its lock may be held by a thread that is not here, and it is the parent's.
        limits._home.attend = _do_nothing
        limits._home = _Away(limits._token)
    pools, _pools = list(_pools), weakref.WeakSet()
    _reader_lock, _naming = threading.RLock(), threading.RLock()    # another thread may have held them
    for reader in list(_readers.values()):
        if reader.tracker is not None:      # what nobody would ever read is not told there
            os.close(reader.tracker)
            sys.modules["multiprocessing.resource_tracker"]._resource_tracker._fd = None
    _readers.clear()
    # The only thread there is now may have been the reader, or a worker's.
    _here.__dict__.update(is_ours=False, reader=None, callbacks=0, failing=None)
    _calling.set(None)
    for pool in pools:
        pool.abandon()


threading._register_atexit(_finish_all)     # type: ignore[attr-defined]
if _patched_by() == "eventlet":             # there, nobody calls what is registered with threading
    atexit.register(_finish_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)


# === Handles ===

_UNSET = object()


class _Handle:
    """What the caller holds of a worker or a pool: its methods become calls.

    Every public method of the user's class is one of the handle's class, made by `_handle_type`.
    """

    def __init__(self, pool: _Pool) -> None:
        self.__dict__["_pool"] = pool
        # No `atexit`: at exit everything is finished by _finish_all, in the right order.
        weakref.finalize(self, pool.finish).atexit = False

    if TYPE_CHECKING:                   # the options, which are set below
        mode: ExecutionMode
        blocking: bool
        max_workers: int                # infinity on demand in ray mode
        load_balancing: LoadBalancingAlgorithm
        on_demand: bool
        max_queued_tasks: int | None
        unwrap_futures: bool
        mp_context: _StartMethod
        on_demand_linger: float
        num_cpus: float | None
        num_gpus: float | None
        resources: dict[str, float] | None
        memory: float | None
        actor_options: dict[str, Any]
        crash_retries: int
        num_retries: int | dict[str, int]
        retry_on: Any
        retry_algorithm: RetryAlgorithm | dict[str, RetryAlgorithm]
        retry_wait: float | dict[str, float]
        retry_max_wait: float
        retry_jitter: float | dict[str, float]
        retry_until: Any
        call_timeout: float | dict[str, float | None] | None
        retry_config: RetryConfig | None

        @property
        def _pool(self) -> _Pool: ...

    @property
    def _seen(self) -> _Pool:
        """The pool, to be looked at only."""
        return self._pool

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        future = self._pool.submit(method, args, kwargs)
        if not self._pool.options.blocking:
            return future
        call = future.__dict__.get("_call")
        if call is not None and call.watch is not None:         # it waits for futures among its arguments
            try:
                self._pool.refuse_to_wait_here()
            except RuntimeError:
                _withdraw(future)
                raise
        return future.result()

    def stop(self, timeout: float | None = None, join: bool = True) -> None:
        """Drop: take no more calls, cancel what has not begun, end what does not end by itself.

        What runs may finish within `timeout` seconds (None: `global_config`'s `stop_timeout`, 30).
        Then coroutines are cancelled; processes are killed, TERM first and KILL a second later, and
        their calls fail with WorkerDiedError; threads are left to themselves with a ResourceWarning,
        and their calls fail likewise. No future stays unfinished, but that of a call which itself
        stops its worker. It may be called from any thread. A second call returns when the first has ended, or at once
        if it would wait for itself; the earlier deadline applies. It also ends a `with` block or a `shutdown` that is
        waiting. With join=False it returns as soon as it has cancelled the calls that have not begun; another thread
        does the rest, see `join()`.
        """
        if timeout is not None:
            timeout = _parse("timeout", timeout, {"timeout": (_seconds, "a number of seconds from 0")})
        self._pool.stop(timeout, join)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the end is there that `stop(join=False)` or `shutdown(wait=False)` has begun.

        At most `timeout` seconds (None: for ever); tells whether it is. Raises RuntimeError when none has been
        begun, and in a call of the worker itself.
        """
        return self._pool.join(timeout)

    def resize(self, n: int) -> None:
        """Make this a pool of `n` workers: add some, or retire some, the idle ones first; on demand: at most so many.

        Waits until the new ones are built, and raises what a constructor raised: then there are as many workers as
        could be built. Who is retired gets no more calls, and ends after those that it has: nothing is lost.
        Raises ValueError for what is no whole number from 1, and in sync and asyncio mode, which have
        one worker; RuntimeError when the pool is stopped or shut down.
        """
        self._pool.resize(_parse("n", n, {"n": _whole(1, none=False)}))

    def close(self) -> None:
        """Do what `stop()` does."""
        self.stop()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Finish: take no more calls, and end when everything submitted is done.

        Returns when that is so, or at once if `wait` is False or this is a call of the worker itself.
        With `cancel_futures` what has not begun is cancelled.
        """
        self._pool.shutdown(wait, cancel_futures)

    @property
    def limits(self) -> LimitSet | LimitPool:
        """What `self.limits` is in all its workers: a LimitSet or a LimitPool."""
        return self._seen.recipe.limits

    def get_pool_stats(self) -> dict[str, Any]:
        """Return a dict: workers, restarts, calls dispatched and how they are spread."""
        return self._seen.stats()

    def stats(self) -> dict[str, Any]:
        """Return what has become of the calls, as a dict; under "workers" the same by the name of each that is there.

        done, failed, cancelled: calls that have ended; running, queued: those that have not (a call that
            was sent to a quick process ahead of its turn counts as running).
        retried: further attempts (of a process that is killed not those of its last call); None in ray mode.
        deaths: of processes or actors, unless they were stopped, and threads that were given up.
        retired: workers whose place another one took after `max_tasks_per_worker` calls, or because of
            `max_worker_memory`.
        time_running, time_waiting: seconds, in all, of the calls that have ended: from their beginning to their end,
            and from their submission (the end of the last future among their arguments) to their beginning; in ray
            mode without those that ended with their actor.
        """
        return self._seen.tallies()

    def dump(self, file: TextIO | None = None) -> None:
        """Print what each worker does, for how long, and where it is, to a text file (None: standard error).

        The answer to "where does it hang?": of worker threads and event loops it shows the stack of what runs; of
        worker processes that of all their threads, by faulthandler, also while C code holds the interpreter (on
        Linux), but not their coroutines. In ray mode it does not know for how long, and actors are asked for their
        stacks by `ray stack`.
        """
        file = sys.stderr if file is None else file
        if file is not None:            # there may be no standard error
            self._seen.dump(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: types.TracebackType | None) -> None:
        try:
            if not _is_interrupt(kind):
                self._pool.shutdown()
                return
        except (KeyboardInterrupt, SystemExit):
            self._pool.stop(0)
            raise
        self._pool.stop(0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: types.TracebackType | None) -> None:
        if _is_interrupt(kind):
            self._pool.stop(0, join=False)
        self._pool.finish()
        await _run_async(self._pool.until_ended(), None)
        self._pool._let_go()

    def __getattr__(self, name: str) -> Callable[..., BaseFuture[Any]]:
        cls = self._seen.recipe.cls
        _check_method(cls, name, dir(type(self)))
        _refuse_generator(getattr(cls, name))
        return functools.partial(self._call, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name!r} cannot be set: the worker's state is its own, and its options are fixed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name!r} cannot be deleted")

    def __dir__(self) -> list[str]:
        names = {name for name, _ in _definitions(self._seen.recipe.cls) if not name.startswith("_")}
        return sorted(names.union(super().__dir__()))

    def __repr__(self) -> str:
        pool, options = self._seen, self._seen.options
        return (f"<{pool.name} handle: {options.mode.value}, {len(pool.backends)} of "
                f"{options.max_workers} workers, {len(pool.calls)} calls{', stopped' * bool(pool.closed)}>")

    def __reduce__(self) -> str | tuple[Any, ...]:
        import pickle
        raise pickle.PicklingError(f"a handle ({self!r}) cannot travel to another process: make the worker there")


def _is_interrupt(kind: type[BaseException] | None) -> bool:
    return kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit))


def _option_reader(name: str) -> Callable[[Any], Any]:
    return lambda self: getattr(self._seen.options, name)


for _name in _OPTIONS.keys() - {"limits"}:
    setattr(_Handle, _name, property(_option_reader(_name), doc=f"The option {_name}."))


def _check_method(cls: type, name: str, others: Iterable[str] = ()) -> None:
    """Raise an AttributeError that helps unless `name` is a public method of the class."""
    if name.startswith("_"):
        raise AttributeError(f"{name!r} is private: only public methods of {cls.__name__} can be called from outside")
    value = getattr(cls, name, _UNSET)
    if callable(value):
        return
    if value is not _UNSET or any(name in getattr(base, "__annotations__", ()) for base in cls.__mro__):
        raise AttributeError(f"{name!r} is data of {cls.__name__}: only methods can be called from outside")
    if name in ("submit", "map"):
        raise AttributeError(f"{cls.__name__} has no method {name!r}, which is for functions (Executor, TaskWorker, "
                             f"@task): call the methods of {cls.__name__} on the handle")
    known = [known for known in {*dict(_definitions(cls)), *others} if not known.startswith("_")]
    raise AttributeError(f"{cls.__name__} has no method {name!r}{_nearest(name, known)}")


def _proxy(name: str, method: Any) -> Any:
    def proxy(self: _Handle, /, *args: Any, **kwargs: Any) -> Any:
        if is_generator:
            _refuse_generator(method)
        return self._call(name, args, kwargs)
    is_generator = bool(_code_flags(method) & 0x220)
    try:
        return functools.wraps(method)(proxy)
    except (AttributeError, TypeError):
        return proxy


def _refusal(name: str) -> property:
    def refuse(self: _Handle) -> None:
        _check_method(self._pool.recipe.cls, name)
    return property(refuse)


def _handle_type(cls: type, is_bound: bool) -> type[_Handle]:
    """Make the class of the handles of a worker class: its public names first, but for `stop`."""
    base = _Handle if not issubclass(cls, TaskWorker) else _FunctionHandle if is_bound else _TaskHandle
    annotated = {name for parent in cls.__mro__ for name in getattr(parent, "__annotations__", ())}
    names = {name for name, _ in _definitions(cls)} | {name for name in annotated if hasattr(base, name)}
    proxies = {}
    for name in names - {"stop"} - _NOT_THE_USERS:
        if not name.startswith("_"):
            value = getattr(cls, name, None)
            proxies[name] = _proxy(name, value) if callable(value) else _refusal(name)
    return type(f"{cls.__name__}Handle", (base,), proxies)      # pyright: ignore[reportReturnType]


class _TaskHandle(_Handle, concurrent.futures.Executor):
    """The handle of a TaskWorker: a concurrent.futures.Executor."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_pool":
            super().__setattr__(name, value)
        object.__setattr__(self, name, value)       # as clients of executors do; options stay as they are

    def __delattr__(self, name: str) -> None:
        if name == "_pool":
            super().__delattr__(name)
        object.__delattr__(self, name)

    @property
    def _max_workers(self) -> int:
        """How many workers there are, as clients of the standard library's executors ask it."""
        return self._seen.options.max_workers       # type: ignore[no-any-return]

    def _check(self, fn: Any, kwargs: Mapping[str, Any] = types.MappingProxyType({})) -> None:
        """Raise TypeError for a generator function; ValueError for one that could not say what it uses of a rate."""
        if type(fn) is not types.FunctionType or fn.__code__.co_flags & 0x220:      # the usual one is a plain function
            _refuse_generator(fn)
        rates = self._pool.rates
        if rates and "limits" not in kwargs and _parameter_place(fn, "limits", True) is None:
            raise ValueError(f"{getattr(fn, '__name__', fn)}() needs a parameter `limits`: only the function knows how "
                             f"much of the rate limit {rates[0]!r} it uses, so it must acquire that itself")

    def submit(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call `fn(*args, **kwargs)` in a worker; return its future (its result when blocking).

        `submit(fn, ...)`, or `submit(...)` when a function is bound. If the function has a parameter named `limits`, it
        receives the worker's limits, unless you pass it yourself, or it has a default and the worker has no limits. For
        a function without one, each attempt runs inside `limits.acquire()`. Raises TypeError for a generator function,
        and ValueError if the worker has a RateLimit and the function has no parameter `limits`, because only the
        function knows the amount.
        """
        if self._pool.bound is not None:
            self._check(self._pool.bound, kwargs)
            return self._call("__call__", args, kwargs)
        if not args or not callable(args[0]):
            raise TypeError(f"submit() needs a function first{f', not {args[0]!r}' if args else ''}")
        self._check(args[0], kwargs)
        return self._call("submit", args, kwargs)

    def map(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, /, *args: Any, timeout: float | None = None, chunksize: int = 1, buffersize: int | None = None,
            progress: Any = False) -> Iterator[Any]:
        """Return an iterator of the function's results over the iterables, in their order.

        `map(fn, *iterables)`, or `map(*iterables)` when a function is bound; then each tuple of a
        single iterable is spread if the function cannot take one argument. What an item raised, or
        the input, is raised in its turn, and leaving early cancels the rest.

        timeout: seconds from this call after which waiting raises TimeoutError; None: never.
        chunksize: so many items travel together, in one place of the queue.
        buffersize: the most items in flight, counting those in chunks; a larger `chunksize` is reduced to it. The
            input is read as results are taken. None: all items are submitted now.
        progress: as that of `wait`.
        """
        fn = self._pool.bound
        if fn is None:
            if not args or not callable(args[0]):
                raise TypeError(f"map() needs a function first{f', not {args[0]!r}' if args else ''}")
            fn, *args = args        # type: ignore[assignment]
        self._check(fn)
        chunksize = _parse("chunksize", chunksize, {"chunksize": _whole(1, none=False)})
        buffersize = _parse("buffersize", buffersize, {"buffersize": _whole(1)})
        items: Iterator[Any] = zip(*args)
        is_spread = self._pool.bound is not None and len(args) == 1 and not _takes_one(
            fn, self._pool.recipe.limits is not _UNLIMITED)
        if is_spread:
            items = (item[0] if isinstance(item[0], tuple) else item for item in items)
        steps = _Map(self._pool, None if fn is self._pool.bound else self._pool.kind.shared(fn), items,
                     is_spread, timeout, chunksize, buffersize, progress, _total_of(args))
        steps.handle = self             # which lives as long as there is something to submit
        return steps.results()


class _FunctionHandle(_TaskHandle):
    """The handle of a TaskWorker to which a function is bound: it can be called."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        self._check(self._pool.bound, kwargs)
        return self._call("__call__", args, kwargs)


def _total_of(iterables: Iterable[Any]) -> int | None:
    """Return how many items there will be, None if an iterable does not tell."""
    if all(isinstance(each, collections.abc.Sized) for each in iterables):
        return min(map(len, iterables), default=0)
    return None


def _takes_one(fn: Callable[..., Any], has_limits: bool) -> bool:
    """Return whether the function can be called with one positional argument, and `limits` where it gets them."""
    import inspect
    place = _parameter_place(fn, "limits", has_limits)
    try:
        inspect.signature(fn).bind(None, **({"limits": None} if place is not None and place > 0 else {}))
    except TypeError:
        return False
    except ValueError:          # it has no signature
        return True
    return True


class _Map:
    """One `map`: what is in flight, in order, and where more comes from."""

    handle: _Handle

    def __init__(self, pool: _Pool, fn: Any, items: Iterator[Any], is_ragged: bool, timeout: float | None,
                 chunksize: int, buffersize: int | None, progress: Any, total: int | None) -> None:
        self.items: Iterator[Any] | None        # None after their end
        self.pool, self.fn, self.items, self.is_ragged = pool, fn, items, is_ragged
        self.timeout, self.deadline = timeout, _deadline(timeout)
        self.chunksize = 1 if pool.runs_inline else chunksize if buffersize is None else min(chunksize, buffersize)
        # futures; at the end what reading the input raised
        self.flying: collections.deque[Any] = collections.deque()
        self.tracked = _tracked(progress, total, self.flying)
        most = sys.maxsize if buffersize is None else max(1, buffersize // self.chunksize)
        try:
            while len(self.flying) < most and self.launch():
                pass
        except BaseException:
            self.cancel()
            raise

    def launch(self) -> bool:
        """Submit the next chunk; return False if there is none."""
        if self.items is None:
            return False
        try:
            chunk = list(itertools.islice(self.items, self.chunksize))
        except BaseException as error:
            if not isinstance(error, Exception):
                raise
            self.items = None
            self.flying.append(error)
            return False
        if not chunk:
            self.items = None
            return False
        future = self.submit(chunk)
        self.flying.append(future)
        self.tracked.add(future, len(chunk))
        return True

    def submit(self, chunk: list[Any]) -> BaseFuture[Any]:
        if self.chunksize > 1:
            items = chunk if self.is_ragged else tuple(zip(*chunk))
            return self.pool.submit("_chunk", (self.fn, items), {}, self.deadline, len(chunk))
        if self.fn is None:
            return self.pool.submit("__call__", chunk[0], {}, self.deadline)
        return self.pool.submit("submit", (self.fn, *chunk[0]), {}, self.deadline)

    def results(self) -> Iterator[Any]:
        try:
            with self.tracked:
                while self.flying:
                    values = self.take()
                    self.launch()
                    if self.chunksize == 1:
                        yield values.pop()          # kept by nobody here
                    else:
                        yield from values
        finally:
            self.cancel()

    def take(self) -> Any:
        """Return the next result in a list, or the outcomes of the next chunk; wait as needed."""
        future = self.flying[0]
        try:
            if not isinstance(future, concurrent.futures.Future):
                raise future
            if self.deadline is not None and not future.done():
                _run(_settled_of({future}, ALL_COMPLETED), _left(self.deadline))
                if not future.done():
                    raise TimeoutError(f"map() has not had all its results within {self.timeout:g} seconds")
            result = future.result()
            self.flying.popleft()
            return result if self.chunksize > 1 else [result]
        finally:
            del future                  # no cycle through the traceback

    def cancel(self) -> None:
        for future in self.flying:
            if isinstance(future, concurrent.futures.Future):
                _ask_for(future)
                future.cancel()
        self.flying.clear()


class _Outcomes:
    """What a chunk came to: the values, and by index the errors, which travel in a form of their own."""

    def __init__(self, values: list[Any], errors: dict[int, Any]) -> None:
        self.values, self.errors = values, errors

    def __iter__(self) -> Iterator[Any]:
        """Yield the values; raise the error where there is one. The chunk is used up by it."""
        self.values.reverse()
        for n in range(len(self.values)):
            if n in self.errors:
                raise self.errors.pop(n)
            yield self.values.pop()

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_outcomes, (self.values, {n: _dump_error(error) for n, error in self.errors.items()})

    def each_apart(self) -> Self:
        """Replace each value that does not travel by the error that says so."""
        for n, value in enumerate(self.values):
            try:
                _dumps(value, lambda value=value: ({"result": value},))     # type: ignore[misc]
            except Exception as error:
                self.errors[n], self.values[n] = error, None
        return self


def _load_outcomes(values: list[Any], errors: dict[int, Any]) -> _Outcomes:
    return _Outcomes(values, {n: _load_error(*error) for n, error in errors.items()})


# What type checkers see of handles: a call gives a future of what the function returns; that itself, when blocking.
if TYPE_CHECKING:
    class _BlockingHandle(_Handle):
        def __getattr__(self, name: str) -> Callable[..., Any]: ...

    class _MapsFunctions:
        @_overload
        def map(self, fn: Callable[..., Coroutine[Any, Any, T]], *iterables: Iterable[Any],
                timeout: float | None = None, chunksize: int = 1, buffersize: int | None = None,
                progress: Any = False) -> Generator[T, None, None]: ...

        @_overload
        def map(self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None,
                chunksize: int = 1, buffersize: int | None = None,
                progress: Any = False) -> Generator[T, None, None]: ...

        def map(self, *args: Any, **options: Any) -> Any: ...

    # Of `submit(fn, ...)` the arguments are not checked: futures may stand for them.

    class _ExecutorHandle(_MapsFunctions, _Handle, concurrent.futures.Executor):
        @_overload
        def submit(self, fn: Callable[..., Coroutine[Any, Any, T]], /, *args: Any, **kwargs: Any) -> BaseFuture[T]: ...

        @_overload
        def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> BaseFuture[T]: ...

        def submit(self, *args: Any, **kwargs: Any) -> Any: ...

    class _BlockingExecutor(_MapsFunctions, _BlockingHandle):       # no stdlib Executor: its `submit` gives no future
        @_overload
        def submit(self, fn: Callable[..., Coroutine[Any, Any, T]], /, *args: Any, **kwargs: Any) -> T: ...

        @_overload
        def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T: ...

        def submit(self, *args: Any, **kwargs: Any) -> Any: ...

    class _BoundHandle(_Handle, _Generic[P, T]):
        __name__: str                   # of a function under @task

        def submit(self, /, *args: P.args, **kwargs: P.kwargs) -> BaseFuture[T]: ...

        def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> BaseFuture[T]: ...

        def map(self, *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1,
                buffersize: int | None = None, progress: Any = False) -> Generator[T, None, None]: ...

    class _BlockingBoundHandle(_BlockingHandle, _Generic[P, T]):
        __name__: str

        def submit(self, /, *args: P.args, **kwargs: P.kwargs) -> T: ...

        def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> T: ...

        def map(self, *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1,
                buffersize: int | None = None, progress: Any = False) -> Generator[T, None, None]: ...


# === Workers ===

def _open(cls: type, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any],
          sized: bool = False) -> _Handle:
    """Build the worker or pool and return its handle."""
    fn = cls._bound_function(*args, **kwargs) if issubclass(cls, TaskWorker) else None
    options = _Options(given, sized)
    _check_method_names(cls, given)
    if _is_model(cls):
        _check_model(cls, options.mode)
    recipe = _Recipe(cls, args, kwargs, fn, options)
    if sized and fn is None and options.name is None:
        recipe.name = "Executor"
    pool = _Pool(recipe, options)
    pool.start()
    return _handle_type(cls, fn is not None)(pool)


def _is_model(cls: type) -> bool:
    """Tell a class of pydantic's or morphic's."""
    return any(base.__module__.partition(".")[0] in _MODELS for base in cls.__mro__)


def _check_model(cls: type, mode: ExecutionMode) -> None:
    """Raise ValueError in ray mode; in others say once that this is no class for Ray, if that is found here."""
    reason = (f"Cannot create Ray worker with Pydantic-based class {cls.__name__}: Ray makes a class of its own of it, "
              f"which models do not bear; hold the model in an attribute, or validate the methods' arguments")
    if mode is ExecutionMode.Ray:
        raise ValueError(reason)
    import importlib.util
    if cls not in _warned_models and ("ray" in sys.modules or importlib.util.find_spec("ray")):
        _warned_models.add(cls)
        _warn(f"in mode 'ray' this class would not do: {reason}")


_warned_models: weakref.WeakSet[type] = weakref.WeakSet()


def _check_method_names(cls: type, given: dict[str, Any]) -> None:
    """Raise a ValueError for an option by method name that names what the class does not have."""
    for option, value in given.items():
        for name in value if option in _BY_METHOD and isinstance(value, dict) else ():
            is_public = not name.startswith("_") and name not in _NOT_THE_USERS
            if name != "*" and not (is_public and callable(getattr(cls, name, None))):
                names = [known for known, _ in _definitions(cls) if not known.startswith("_")]
                raise ValueError(f"{option} names {name!r}: {cls.__name__} has no such method{_nearest(name, names)}")


class _Builder:
    """A worker class with its options chosen: `init` builds the worker."""

    def __init__(self, cls: type, given: dict[str, Any]) -> None:
        self._cls = cls
        self._given = given
        _check_method_names(cls, given)
        if given.get("mode") or global_config.defaults.mode:
            _Options(given)             # an impossible combination is told now

    def init(self, *args: Any, **kwargs: Any) -> _Handle:
        """Build the worker, or the pool of workers, with these arguments of the constructor.

        Returns the handle when all constructors have returned; raises what one of them raised, with
        nothing left running; ValueError for options that do not go together. In ray mode it does not wait:
        what a constructor raises is in the futures. There it raises ImportError without the package, RuntimeError
        without a running Ray, ValueError for a pydantic or morphic model, and what Ray says of options that it
        does not know.
        """
        return _open(self._cls, self._given, args, kwargs)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"options() has no attribute {name!r}, because it makes no worker yet: call .init(...) "
                             f"on what it returns to get a handle")

    def __repr__(self) -> str:
        return f"<builder of {self._cls.__name__}: {self._given}>"


if TYPE_CHECKING:
    class _BlockingBuilder(_Builder):
        def init(self, *args: Any, **kwargs: Any) -> _BlockingHandle: ...

    class _TaskBuilder(_Builder):
        @_overload
        def init(self, fn: None = None) -> _ExecutorHandle: ...

        @_overload
        def init(self, fn: Callable[P, Coroutine[Any, Any, T]]) -> _BoundHandle[P, T]: ...

        @_overload
        def init(self, fn: Callable[P, T]) -> _BoundHandle[P, T]: ...

        @_overload              # of a class with a constructor of its own
        def init(self, *args: object, **kwargs: object) -> Any: ...

        def init(self, *args: Any, **kwargs: Any) -> Any: ...

    class _BlockingTaskBuilder(_BlockingBuilder):
        @_overload
        def init(self, fn: None = None) -> _BlockingExecutor: ...

        @_overload
        def init(self, fn: Callable[P, Coroutine[Any, Any, T]]) -> _BlockingBoundHandle[P, T]: ...

        @_overload
        def init(self, fn: Callable[P, T]) -> _BlockingBoundHandle[P, T]: ...

        @_overload
        def init(self, *args: object, **kwargs: object) -> Any: ...

        def init(self, *args: Any, **kwargs: Any) -> Any: ...


def _options(cls: type, **given: Any) -> _Builder:
    """Choose how and where the worker lives; `.init(...)` on what this returns builds it.

    mode: "sync", "thread", "process", "asyncio" or "ray".
    blocking: a method call returns the result itself, not a future. Default False.
    max_workers: None or 1 for one worker, more for a pool; 0 with `on_demand`: the CPUs less one, in ray mode
        as many as there are calls.
    load_balancing: "round_robin", "least_active", "least_total" or "random".
    on_demand: make a worker for each call and destroy it afterwards. Default False.
    max_queued_tasks: unsettled calls per worker, beyond which submitting waits; None: unbounded.
    unwrap_futures: futures among the arguments become their results. Default True.
    limits: what `self.limits` is in all its workers: a LimitSet, shared with everyone who has it; a list
        of limits, for a set of its own; a LimitPool, or a list of LimitSets. Default: none. A function with a
        parameter `limits` gets them; another one is called within `limits.acquire()`.
    num_retries, retry_on, retry_algorithm, retry_wait, retry_max_wait, retry_jitter, retry_until: see RetryConfig.
    retry_config: a RetryConfig; what is given beside it wins.
    mp_context: in process mode "forkserver", "spawn" or "fork".
    crash_retries: how often a call that was running when its process died is run again, in a new one, from its
        beginning. Default 0: it is run at most once. No retry of `num_retries` is used up by it.
    call_timeout: seconds that a call may run, retries and waits for limits included; also a dict by method name. Then
        it fails with CallTimeoutError: a process is killed and replaced, a coroutine in asyncio mode is cancelled, a
        thread cannot be killed: it is left to itself, and another worker, made anew, takes its place. A chunk of `map`
        has so much time for each of its items. Default None: no limit. Without effect in sync and ray mode.
    max_tasks_per_worker: calls after which a worker makes place for a new one, between two calls: its object is
        dropped, and another one built from the same arguments, in a thread or process of its own (in asyncio mode on a
        loop of its own). A chunk of `map` is one call. Default None: never. Without effect in sync mode.
    max_worker_memory: bytes; a process whose resident memory is more after a call makes place likewise. Default None.
    initializer, initargs, initkwargs: a function, a tuple and a dict of its arguments: it is called first in every
        worker, those that take the place of others too, and `init` raises what it raises. Default: none.
    name: of the workers' threads and processes, in logs, errors and `top`: "name-0". Default: the class's name.
    thread_factory: makes the threads of the workers, called with target, name and daemon by name; what it returns has
        to be a threading.Thread that was not started. Default: that class.
    on_demand_linger: seconds that an idle on-demand TaskWorker is kept.
    num_cpus, num_gpus, resources, memory: what each actor of Ray needs: numbers, a dict by name, bytes.
    actor_options: a dict of Ray's other options for actors; not `max_concurrency` and `concurrency_groups`.

    Defaults are `global_config`'s. Raises TypeError for an unknown option, ValueError for an
    impossible value; both name what would do.
    """
    stored = getattr(cls, "_worker_options", {})
    return _Builder(cls, {**stored, **_parse_all(given)})


def _init(cls: type, *args: Any, **kwargs: Any) -> _Handle:
    """Build the worker with the options of its class; see `options`."""
    return _options(cls).init(*args, **kwargs)


def _make_object(cls: type, make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a plain object in a worker, a handle where the class says so: the `__new__` of worker classes."""
    recipe = _here.building
    if recipe is not None and recipe.cls is cls:
        _here.building = None
        made = _make_plain(cls, make, args, kwargs)
        _here.made = id(made)
        _give_limits(made, recipe.limits)
        return made
    if getattr(cls, "_auto_init", False) and _here.plain is not cls:
        return _init(cls, *args, **kwargs)
    return _make_plain(cls, make, args, kwargs)


def _make_plain(cls: Any, make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if make is not object.__new__:
        around, _here.plain = _here.plain, cls      # a base's `__new__` may be one of these, too
        try:
            return make(cls, *args, **kwargs)
        finally:
            _here.plain = around
    if (args or kwargs) and cls.__init__ is object.__init__:
        raise TypeError(f"{cls.__name__}() takes no arguments")
    return make(cls)


class Worker:
    """The base of classes whose objects live in a worker: a thread, a process, an event loop, an actor of Ray.

    `My.options(mode="thread").init(...)` builds one and returns its handle, whose methods return
    futures. `My(...)` is a plain object, for unit tests say. `class My(Worker, mode="thread")` stores
    options: then `My(...)` and `My.init(...)` return a handle, too.

    A worker runs its calls one at a time, in the order in which they become ready; in asyncio and ray mode
    coroutine methods interleave, and plain methods run one at a time on a thread beside the loop:
    state that both use needs a lock.

    `options`, `init` and `limits` are concurry's. A public method of yours wins over one of the handle's that has its
    name (`join`, `map`, `stats`, ...), but for `stop`.
    """

    if TYPE_CHECKING:
        @_overload
        @classmethod
        def options(cls, *, blocking: Literal[True], mode: ExecutionMode | str = ...,
                    **others: Any) -> _BlockingBuilder: ...

        @_overload
        @classmethod
        def options(cls, *, mode: ExecutionMode | str = ..., **others: Any) -> _Builder: ...

        @classmethod
        def options(cls, **given: Any) -> Any: ...

        @classmethod
        def init(cls, *args: Any, **kwargs: Any) -> _Handle: ...
    else:
        options = classmethod(_options)
        init = classmethod(_init)

        # Not for type checkers: calling a class takes what its __init__ takes, and gives an object of it.
        def __new__(cls, *args, **kwargs):
            return _make_object(cls, super().__new__, args, kwargs)

    def __init_subclass__(cls, auto_init: bool = True, **others: Any) -> None:
        ours = {name: others.pop(name) for name in list(others) if name in _OPTIONS}
        try:
            super().__init_subclass__(**others)
        except TypeError:
            if not others:
                raise
            name = next(iter(others))
            raise TypeError(f"unknown option {name!r}{_nearest(name, _OPTIONS)}") from None
        if ours:
            _store_options(cls, ours, auto_init)

    @property
    def limits(self) -> LimitSet | LimitPool:
        """The limits of the worker this object lives in; without any, everything is granted at once."""
        return _limits_of.get(id(self), _WITHOUT)[0]


_NOT_THE_USERS = frozenset(["options", "init", "limits"])


def _store_options(cls: Any, given: dict[str, Any], auto_init: bool) -> None:
    stored = getattr(cls, "_worker_options", {})
    cls._worker_options = {**stored, **_parse_all(given)}
    cls._auto_init = auto_init


@_overload
def worker(cls: type[T], /, *, auto_init: bool = True, **options: Any) -> type[T]: ...


@_overload
def worker(cls: None = None, /, *, auto_init: bool = True, **options: Any) -> Callable[[type[T]], type[T]]: ...


def worker(cls: Any = None, /, *, auto_init: bool = True, **options: Any) -> Any:
    """Store options with a class, so that calling it builds a worker: `@worker(mode="thread")`.

    Any class will do. `My(...)` and `My.init(...)` then return a handle, `My.options(...)` overrides;
    `auto_init=False` keeps `My(...)` a plain object. Raises as `Worker.options` does.
    """
    options = _parse_all(options)
    if cls is None:
        return lambda cls: worker(cls, auto_init=auto_init, **options)
    if not isinstance(cls, type):
        raise TypeError(f"@worker needs a class, not {cls!r}; for a function there is @task")
    if not issubclass(cls, Worker):
        make = cls.__new__
        make_ours: Any = staticmethod(lambda cls, *args, **kwargs: _make_object(cls, make, args, kwargs))
        cls.__new__ = make_ours     # type: ignore[method-assign]
        for name in _NOT_THE_USERS:
            if not hasattr(cls, name):
                setattr(cls, name, vars(Worker)[name])
    _store_options(cls, options, auto_init)
    return cls


class TaskWorker(Worker):
    """A worker for functions: `TaskWorker.options(mode="process").init()` is an executor.

    `init(fn=f)` binds a function: then `submit(*args)`, `map(*iterables)` and `handle(*args)` call it.
    """

    if TYPE_CHECKING:
        @_overload
        @classmethod
        def options(cls, *, blocking: Literal[True], mode: ExecutionMode | str = ...,
                    **others: Any) -> _BlockingTaskBuilder: ...

        @_overload
        @classmethod
        def options(cls, *, blocking: Literal[False] = False, mode: ExecutionMode | str = ...,
                    **others: Any) -> _TaskBuilder: ...

        @_overload
        @classmethod
        def options(cls, *, blocking: bool, **others: Any) -> Any: ...

        @classmethod
        def options(cls, **given: Any) -> Any: ...

        @_overload
        @classmethod
        def init(cls, fn: None = None) -> _ExecutorHandle: ...

        @_overload
        @classmethod
        def init(cls, fn: Callable[P, Coroutine[Any, Any, T]]) -> _BoundHandle[P, T]: ...

        @_overload
        @classmethod
        def init(cls, fn: Callable[P, T]) -> _BoundHandle[P, T]: ...

        @_overload
        @classmethod
        def init(cls, *args: object, **kwargs: object) -> Any: ...

        @classmethod
        def init(cls, *args: Any, **kwargs: Any) -> Any: ...

    _place: tuple[Any, int | None] = _nothing, None     # see _limits_place

    def __init__(self, fn: Callable[..., Any] | None = None) -> None:
        self._fn: Any = fn

    @classmethod
    def _bound_function(cls, *args: Any, **kwargs: Any) -> Callable[..., Any] | None:
        """Return the function that the arguments of `init` bind, or None."""
        fn = kwargs.get("fn", args[0] if args and cls.__init__ is TaskWorker.__init__ else None)
        if fn is not None and not callable(fn):
            raise TypeError(f"fn must be callable, not {fn!r}")
        return fn

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the function here."""
        return self._apply(fn, args, kwargs)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._apply(self._fn, args, kwargs)

    def _apply(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
               within: Callable[..., Any] | None = None) -> Any:
        """Call a function: one with a parameter `limits` gets them, any other is called within them."""
        limits = _limits_of.get(id(self), _WITHOUT)[0]
        if "limits" in kwargs:
            return fn(*args, **kwargs)
        place = self._limits_place(fn)
        if place is not None:
            return fn(*args, **kwargs, **({"limits": limits} if len(args) <= place else {}))
        return fn(*args, **kwargs) if limits is _UNLIMITED else (within or _within)(limits, fn, args, kwargs)

    def _limits_place(self, fn: Any) -> int | None:
        """Return what _parameter_place does for `limits`; what takes long is kept while the function is the same."""
        code = fn.__code__ if type(fn) is types.FunctionType else _code_of(fn)
        if code is not None and "limits" not in code.co_varnames and not hasattr(fn, "__wrapped__"):
            return None
        known, place = self._place
        if known() is not fn:
            place = _parameter_place(fn, "limits", self.limits is not _UNLIMITED)
            if type(fn).__weakrefoffset__:
                object.__setattr__(self, "_place", (weakref.ref(fn), place))
        return place

    def _chunk(self, fn: Any, items: Any) -> Any:
        """Call the function with each item; what one raises is that item's alone.

        items: a list of tuples of arguments, or a tuple of columns, which travel in less time.
        """
        if type(items) is tuple:
            items = list(zip(*items))
        fn = fn or self._fn
        is_async, is_plain = _is_async(fn), self.limits is _UNLIMITED and self._limits_place(fn) is None
        call = fn if is_plain else lambda *item: self._apply(fn, item, {})
        values: list[Any]
        errors: dict[int, Any]
        values, errors, runner = [], {}, _runner_of(self)
        if is_async:
            return self._chunk_async(fn, items, values, errors, [])
        first = [_attempt(call, items[0], {})]      # made already, for it may be a coroutine all the same
        if isinstance(first[0][1], types.CoroutineType):
            return self._chunk_async(fn, items, values, errors, [first[0][1]])
        for item in items:
            if not first and runner is None:        # a fast way for the most
                try:
                    values.append(call(*item))
                except BaseException as error:
                    errors[len(values)] = _without_our_frame(error)
                    values.append(None)
                continue

            def run(item: Any = item) -> tuple[str, Any]:
                return first.pop() if first else _attempt(call, item, {})
            kind, value = run() if runner is None else runner.again("submit", (fn, *item), {}, run)
            if kind is _ERROR:
                errors[len(values)] = value
            values.append(None if kind is _ERROR else value)
        return _Outcomes(values, errors)

    async def _chunk_async(self, fn: Any, items: list[Any], values: list[Any], errors: dict[int, Any],
                           first: list[Any]) -> _Outcomes:
        runner = _runner_of(self)
        for item in items:
            async def run(item: Any = item) -> tuple[str, Any]:
                try:
                    coroutine = first.pop() if first else self._apply(fn, item, {}, _within_async)
                except BaseException as error:
                    return _ERROR, _without_our_frame(error)
                return await _captured(coroutine)
            kind, value = await (run() if runner is None else runner.again_async("submit", (fn, *item), {}, run))
            if kind is _ERROR:
                errors[len(values)] = value
            values.append(None if kind is _ERROR else value)
        return _Outcomes(values, errors)

    def _is_async(self, call: _Call) -> bool:
        """Tell whether this call of a function gives a coroutine."""
        if call.method == "__call__":
            return _is_async(self._fn)
        return call.method in ("submit", "_chunk") and _is_async(call.args[0] or self._fn)


def _within(limits: LimitSet | LimitPool, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function within limits that it knows nothing of; a coroutine has them until its end."""
    if _is_async(fn):
        return _within_async(limits, fn, args, kwargs)
    acquired, result = limits.acquire(), None
    try:
        result = fn(*args, **kwargs)
    finally:
        if not isinstance(result, types.CoroutineType):
            acquired.release()
    return _released_after(acquired, result) if isinstance(result, types.CoroutineType) else result


async def _within_async(limits: LimitSet | LimitPool, fn: Callable[..., Any], args: tuple[Any, ...],
                        kwargs: dict[str, Any]) -> Any:
    async with limits.async_acquire():
        result = fn(*args, **kwargs)
        return await result if isinstance(result, types.CoroutineType) else result


async def _released_after(acquired: _Acquisition | _Free, coroutine: Awaitable[Any]) -> Any:
    try:
        return await coroutine
    finally:
        acquired.release()


def _parameter_place(fn: Any, name: str, optional: bool) -> int | None:
    """Return how many positional arguments come before a parameter, required or `optional`; None if there is none.

    -1 if a partial gives it already.
    """
    code = _code_of(getattr(fn, "__init__", None) if isinstance(fn, type) else fn)
    if code is None or name not in code.co_varnames and not hasattr(fn, "__wrapped__"):
        return None
    if isinstance(fn, functools.partial) and name in fn.keywords:
        return -1
    import inspect
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return None
    parameter = parameters.get(name)
    if parameter is None and isinstance(fn, functools.partial):
        return None if _parameter_place(fn.func, name, True) is None else -1
    if parameter is None or parameter.default is not parameter.empty and not optional:
        return None
    if parameter.kind is parameter.KEYWORD_ONLY:
        return sys.maxsize
    return list(parameters).index(name) if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else None


# === Conveniences ===

@_overload
def Executor(mode: ExecutionMode | str, max_workers: int | None = None, *, blocking: Literal[True],
             **options: Any) -> _BlockingExecutor: ...


@_overload
def Executor(mode: ExecutionMode | str, max_workers: int | None = None, *, blocking: Literal[False] = False,
             **options: Any) -> _ExecutorHandle: ...


@_overload
def Executor(mode: ExecutionMode | str, max_workers: int | None = None, *, blocking: bool, **options: Any) -> Any: ...


def Executor(mode: ExecutionMode | str, max_workers: int | None = None, **options: Any) -> Any:
    """Return a handle that is a concurrent.futures.Executor, in any mode.

    `max_workers` None: as many as `global_config` says, thread 24 and process 4; in ray mode as many as the
    cluster has CPUs now. The other options and what is raised are those of `Worker.options`.
    """
    given = {"mode": mode, "max_workers": max_workers, **options}
    return _open(TaskWorker, _parse_all(given), (), {}, sized=True)


class _TaskFunction(_FunctionHandle):
    """A function under `@task`: the handle of a TaskWorker bound to it, which starts at the first call."""

    if TYPE_CHECKING:
        _fn: Any
        _given: dict[str, Any]
        _making: Any
        _made: _Pool                    # None before it is needed
        _is_started: bool
        __name__: str

    def __init__(self, fn: Callable[..., Any], given: dict[str, Any]) -> None:
        if not callable(fn):
            raise TypeError(f"@task needs a function, not {fn!r}")
        cls, _, name = getattr(fn, "__qualname__", "").rpartition(".")
        first = getattr(_code_of(fn), "co_varnames", ())[:1]
        if cls and not cls.endswith("<locals>") and first in (("self",), ("cls",)):
            raise TypeError(f"@task is for functions, and {cls}.{name} is a method: make {cls} a worker, with "
                            f"@worker(mode=...), or the function a static method that is given what it needs")
        self.__dict__.update(_fn=fn, _given=given, _making=threading.RLock(), _made=None, _is_started=False)
        functools.update_wrapper(self, fn)

    @property
    def _pool(self) -> _Pool:
        if self._made is None:
            with self._making:
                if self._made is None:
                    pool = self._make_pool()
                    weakref.finalize(self, pool.finish).atexit = False
                    self.__dict__["_made"] = pool
        return self._made

    @property
    def _seen(self) -> _Pool:           # before the first call: one as it would be now
        return self._made or self._make_pool()

    @property
    def limits(self) -> LimitSet | LimitPool:
        """What a parameter `limits` of the function gets: a LimitSet or a LimitPool."""
        if self._made is None and isinstance(self._given.get("limits"), tuple):
            self._given["limits"] = _limits_for_worker(self._given["limits"])       # the set that there will be
        return self._seen.recipe.limits

    def _make_pool(self) -> _Pool:
        given = dict(self._given)
        mode = given.get("mode") or global_config.defaults.mode
        if mode is not None and mode not in _ONE_WORKER:
            given.setdefault("on_demand", global_config.get_defaults(mode)["task_decorator_on_demand"])
        options = _Options(given, sized=True)
        return _Pool(_Recipe(TaskWorker, (self._fn,), {}, self._fn, options), options)

    def _start(self) -> None:
        pool = self._pool
        with self._making:
            if self._is_started or pool.closed:
                return
            # First: a signal handler that calls the function meanwhile finds it started, and is put in line.
            self.__dict__["_is_started"] = True
            try:
                pool.start()
            except BaseException:
                self.__dict__.update(_made=None, _is_started=False)
                raise

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._is_started:
            self._start()
        return super()._call(method, args, kwargs)

    def map(self, /, *args: Any, timeout: float | None = None, chunksize: int = 1, buffersize: int | None = None,
            progress: Any = False) -> Iterator[Any]:
        self._start()
        return super().map(*args, timeout=timeout, chunksize=chunksize, buffersize=buffersize, progress=progress)

    map.__doc__ = _TaskHandle.map.__doc__

    def __repr__(self) -> str:
        return f"<task {self.__name__}: {self._given}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _TaskFunction, (self._fn, self._given)


if TYPE_CHECKING:
    class _TaskMaker(Protocol):
        @_overload
        def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> _BoundHandle[P, T]: ...

        @_overload
        def __call__(self, fn: Callable[P, T], /) -> _BoundHandle[P, T]: ...

    class _BlockingTaskMaker(Protocol):
        @_overload
        def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> _BlockingBoundHandle[P, T]: ...

        @_overload
        def __call__(self, fn: Callable[P, T], /) -> _BlockingBoundHandle[P, T]: ...


@_overload
def task(fn: None = None, /, *, blocking: Literal[True], **options: Any) -> _BlockingTaskMaker: ...


@_overload
def task(fn: None = None, /, *, blocking: Literal[False] = False, **options: Any) -> _TaskMaker: ...


@_overload
def task(fn: Callable[P, Coroutine[Any, Any, T]], /, *, blocking: Literal[True],
         **options: Any) -> _BlockingBoundHandle[P, T]: ...


@_overload
def task(fn: Callable[P, T], /, *, blocking: Literal[True], **options: Any) -> _BlockingBoundHandle[P, T]: ...


@_overload
def task(fn: Callable[P, Coroutine[Any, Any, T]], /, *, blocking: Literal[False] = False,
         **options: Any) -> _BoundHandle[P, T]: ...


@_overload
def task(fn: Callable[P, T], /, *, blocking: Literal[False] = False, **options: Any) -> _BoundHandle[P, T]: ...


@_overload
def task(fn: Any = None, /, *, blocking: bool, **options: Any) -> Any: ...


def task(fn: Any = None, /, **options: Any) -> Any:
    """Make a function run in workers: `@task(mode="process")`; calling it returns a future.

    The function becomes the handle of a TaskWorker that is bound to it: `f(...)`, `f.submit(...)`,
    `f.map(...)`, `f.stop()`. Nothing starts before its first use. On demand, with a pool's default
    size, is the default in thread, process and ray mode. A parameter named `limits` gets the worker's limits.
    Options and what is raised are those of `Worker.options`.
    """
    given = _parse_all(options)
    _check_method_names(TaskWorker, given)
    if given.get("mode"):
        _Options(given, sized=True)
    return (lambda fn: _TaskFunction(fn, given)) if fn is None else _TaskFunction(fn, given)


class _Subprocess(_Generic[T]):
    """A function in an interpreter of its own, as `run_in_subprocess` returns it: like multiprocessing.Process."""

    def __init__(self, backend: Any, future: BaseFuture[T]) -> None:
        self._backend, self._future = backend, future
        self.name, self.pid = backend.name, backend.pid

    @property
    def exitcode(self) -> Any:
        """What the process returned: 0, 1 if the function raised, the code of its SystemExit; minus the number of the
        signal that ended it; None while it runs (after `result()`, too, until `join()`), or where it is not known.
        """
        return self._backend.exitcode

    def is_alive(self) -> bool:
        """Tell whether the process is there."""
        return not self._backend.ended.done()

    def poll(self) -> Any:
        """Return the exit code, None while the process runs."""
        return self.exitcode

    def join(self, timeout: float | None = None) -> None:
        """Wait until the process has ended, at most `timeout` seconds (None: for ever); `is_alive()` tells then."""
        wait([self._backend.ended], timeout)

    def result(self, timeout: float | None = None) -> T:
        """Return what the function returned, or raise what it raised; wait as `BaseFuture.result` does.

        WorkerDiedError when the process ended before that, by a signal, say.
        """
        return self._future.result(timeout)

    def terminate(self) -> None:
        """End the process by SIGTERM, which the function may handle; nothing happens when it has ended."""
        self._signal(15)

    def kill(self) -> None:
        """End the process by SIGKILL."""
        self._signal(9)

    def _signal(self, number: int) -> None:
        link = self._backend.link
        if link is not None:
            link.process.kill(number)

    def __repr__(self) -> str:
        state = "running" if self.is_alive() else f"exit code {self.exitcode}"
        return f"<process {self.name} (pid {self.pid}): {state}>"


@_overload
def run_in_subprocess(fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args,
                      **kwargs: P.kwargs) -> _Subprocess[T]: ...
@_overload
def run_in_subprocess(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> _Subprocess[T]: ...
def run_in_subprocess(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> _Subprocess[Any]:
    """Call a function in a fresh interpreter, and return a handle of that process when it has begun.

    The function and its arguments travel as to workers in process mode, by value where they must, and no
    `if __name__ == "__main__"` is needed. The handle has `pid`, `is_alive()`, `join(timeout)`, `poll()`, `terminate()`,
    `kill()`, `exitcode` and `result(timeout)`. The process ends with this one, however that ends; the exit of this
    interpreter waits for it. It does not wait for threads that the function has left running. Settings of
    `global_config` do not hold for it.

    Raises TypeError if `fn` cannot be called, PicklingError for what cannot travel.
    """
    if not callable(fn):
        raise TypeError(f"run_in_subprocess() needs a function, not {fn!r}")
    name = getattr(fn, "__name__", type(fn).__name__)
    options = _Options({**_INITIAL, "mode": ExecutionMode.Processes, "mp_context": _StartMethod.Spawn, "name": name})
    pool = _Pool(_Recipe(TaskWorker, (), {}, None, options), options)
    pool.start()
    backend: Any = pool.backends[0]
    try:
        future = pool.submit("submit", (_AsProcess(fn), *args), kwargs)
        _ask_for(future)                # its exit code tells, too
    finally:
        backend.is_finishing = True     # no other process takes its place
        pool.finish()
    process = _Subprocess(backend, future)
    error: Any = future.exception() if future.done() else None
    if isinstance(error, _pickle().PicklingError):
        names, of = _call_parts(name, args, kwargs)         # as the user counts them
        _dumps((fn, args, kwargs), lambda: ({"the function": fn, **names}, of))
        raise error
    return process


_exit_code = 0                  # of this process, when it has served its last call


class _AsProcess:
    """Calls a function; how it ends tells with what code the process ends."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)      # in errors

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        with _Ending():
            result = self.fn(*args, **kwargs)
        return _as_process_async(result) if isinstance(result, types.CoroutineType) else result


async def _as_process_async(coroutine: Any) -> Any:
    with _Ending():
        return await coroutine


class _Ending:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        global _exit_code
        if kind is not None:
            code = error.code if isinstance(error, SystemExit) else 1
            if not isinstance(code, (int, type(None))):         # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
            _exit_code = (code or 0) & 255


def serve(*handles: _Handle, timeout: float | None = None) -> NoReturn:
    """Let workers serve until this process gets SIGTERM or SIGINT, then finish and exit; for the main thread.

    At the signal no new calls are taken, and what was submitted may finish, of all handles side by side, within
    `timeout` seconds (None: as long as it takes). Then, or at a second signal, the rest is stopped at once, as by
    `stop(0)`. At the end the signals have the handlers that they had before, and SystemExit is raised with
    the status that the shell expects, 128 plus the signal's number: 143 for SIGTERM, 130 for SIGINT.

    Raises TypeError for what is no handle, ValueError for an impossible timeout, RuntimeError in
    another thread than the main one.
    """
    import signal
    for handle in handles:
        if not isinstance(handle, _Handle):
            raise TypeError(f"serve() needs handles of workers, not {handle!r}")
    if not handles:
        raise TypeError("serve() needs a handle of a worker at least")
    if timeout is not None:
        timeout = _parse("timeout", timeout, {"timeout": (_seconds, "a number of seconds from 0, or None")})
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("serve() waits for signals, which only the main thread gets: call it there")
    first: BaseFuture[int] = BaseFuture()
    second: BaseFuture[int] = BaseFuture()

    def note(number: int, frame: object) -> None:
        if not _settle(first, _RESULT, number):
            _settle(second, _RESULT, number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        number = first.result()
        logger.info("%s: no more calls are taken, %d are to be finished", signal.Signals(number).name,
                    sum(len(handle._pool.calls) for handle in handles))
        _finish_together([handle._pool for handle in handles], timeout, second)
    finally:
        for number_before, handler in before.items():
            signal.signal(number_before, signal.SIG_DFL if handler is None else handler)
    sys.exit(128 + number)


def _finish_together(pools: list[_Pool], timeout: float | None, hurry: BaseFuture[int]) -> None:
    """Finish the pools, and stop them when the time is over or `hurry` is done."""
    ends: set[BaseFuture[Any]] = set()
    for pool in pools:
        end: BaseFuture[Any] = BaseFuture()
        ends.add(end)
        try:
            threading.Thread(target=_finish_for, args=(pool, end), name=f"end of {pool.name}", daemon=True).start()
        except RuntimeError:            # no more threads: the interpreter's exit waits for it
            pool.finish()
            _settle(end, _RESULT, None)
    deadline = _deadline(timeout)
    while ends and not hurry.done():
        done, ends = _run(_settled_of({*ends, hurry}, FIRST_COMPLETED), _left(deadline))
        ends.discard(hurry)
        if not done:
            break
    if ends:
        for pool in pools:
            pool.stop(0, join=False)
        for pool in pools:
            pool.join(None)


def _finish_for(pool: _Pool, end: BaseFuture[Any]) -> None:
    try:
        pool.shutdown()
    finally:
        _settle(end, _RESULT, None)


# === Command line ===

_HELP = """\
usage: concurry map [options] (CALLABLE | -e EXPRESSION) [FILE ...]

Apply a callable to every line of the files, or of standard input, on many
workers, and print a result a line, in order, as they come.

  CALLABLE          module:name
  -e EXPRESSION     instead of it: an expression over x; it finds its modules
  --mode MODE       process (the default), thread, asyncio, sync or ray
  --max-workers N   4, of threads 24
  --unordered       print each result as soon as it is there
  --null, --print0  records that end in NUL instead of lines: read (also -0),
                    or printed
  --json            lines are JSON, and so are results
  --keep-going      go on after a line that failed; with --json a line
                    {"error": ..., "line": ...} stands in its place
  --retries N       try again what has failed, after longer and longer waits
  --timeout SECONDS a line that takes longer, waits included, fails
  --limit N/WINDOW  so many at most in any window: 100/minute, 5/second, 9/2.5
  --progress        show how far it is; so it is at a terminal: --no-progress
Exit status: 0, 1 if a line failed, 2 for misuse, 130 on Ctrl-C.

  ls | concurry map -e "x + ' ' + hashlib.md5(open(x,'rb').read()).hexdigest()"
  concurry map --mode thread --retries 3 --limit 10/second shop:price ids.txt
  concurry map --json -e "{**x, 'year': x['date'][:4]}" <in.jsonl >out.jsonl
"""


def _arguments() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    import argparse
    parser = argparse.ArgumentParser(prog="concurry", description="Apply a callable to every line, on many workers.")
    parser.add_argument("--version", action="version", version=f"concurry {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="map")
    mapping: Any = commands.add_parser("map", help="print a result for every line: see map --help")
    mapping.format_help = lambda: _HELP
    mapping.usage = _HELP.partition("\n")[0].partition(" ")[2]
    mapping.add_argument("-e", dest="expression")
    for name in ("--mode", "--max-workers", "--retries", "--timeout", "--limit"):
        mapping.add_argument(name)
    for name in ("--unordered", "--json", "--keep-going", "--null", "--print0"):
        mapping.add_argument(name, action="store_true")
    mapping.add_argument("--progress", action="store_true", default=_is_terminal(sys.stderr))
    mapping.add_argument("--no-progress", action="store_false", dest="progress")
    mapping.add_argument("names", nargs="*")
    return parser, mapping


class _Expression:
    """A function of x from its source text, with the modules that it names: `hashlib.md5(x.encode()).hexdigest()`."""

    def __init__(self, source: str) -> None:
        import ast
        self._source, self.__name__ = source, "expression"
        if not source.strip():
            raise ValueError("-e needs an expression over x")
        tree = ast.parse(source.strip(), "<expression>", "eval")
        self._code = compile(tree, "<expression>", "eval")
        self._names: dict[str, types.ModuleType] = {}
        wanted = _global_names(source.strip()) - {"x", *dir(builtins)}
        for node in ast.walk(tree):
            parts: list[str] = []
            while isinstance(node, ast.Attribute):
                parts.insert(0, node.attr)
                node = node.value
            if isinstance(node, ast.Name) and node.id in wanted:
                self._names[node.id] = _import_along(node.id, parts)

    def __call__(self, x: Any) -> Any:
        return eval(self._code, {**self._names, "x": x})

    def __reduce__(self) -> tuple[Any, ...]:
        return _Expression, (self._source,)


def _global_names(source: str) -> set[str]:
    """Return the names that an expression uses and does not bind itself."""
    import symtable
    top = symtable.symtable(source, "<expression>", "eval")
    found, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        found |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return found - {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned()}


def _import_along(name: str, parts: list[str]) -> types.ModuleType:
    """Import a module, and those in it that a chain of attributes leads through; return it, or raise ValueError."""
    import importlib
    found: Any
    try:
        top = found = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name!r} is neither x, nor built in, nor a module that can be imported: {error}") from None
    for part in parts:
        if not isinstance(found, types.ModuleType):
            break
        name = f"{name}.{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(name)
            except ImportError:
                break                       # the call will say so
        found = getattr(found, part, None)
    return top


def _find_callable(name: str) -> Callable[..., Any]:
    """Return what `module:name` names, or raise ValueError."""
    module, _, path = name.partition(":")
    if not module or not path:
        raise ValueError(f"{name!r} is not of the form module:name; what is built in is best called by -e, as in "
                         f"-e 'len(x)'")
    import importlib
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find {name!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"{name!r} is not callable")
    return found


class _ForLines:
    """What is done with a line, in its worker: read it, call within the limit, write the result."""

    def __init__(self, fn: Callable[[Any], Any], is_json: bool) -> None:
        self.fn, self.is_json = fn, is_json
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)      # in errors

    def __call__(self, line: str, limits: LimitSet) -> Any:
        if self.is_json:
            import json
            line = json.loads(line)
        with limits.acquire():
            result = self.fn(line)
        return self.later(result) if isinstance(result, types.CoroutineType) else self.written(result)

    async def later(self, coroutine: Awaitable[Any]) -> str:
        return self.written(await coroutine)

    def written(self, result: Any) -> str:
        return _as_json(result) if self.is_json else str(result)


def _as_json(value: Any) -> str:
    import json
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if _can_be_written(text, "utf-8", "strict") else json.dumps(value)


def _can_be_written(text: str, encoding: str, errors: str) -> bool:
    try:
        return text.isascii() or bool(text.encode(encoding, errors))
    except UnicodeEncodeError:
        return False


def _call_limit(text: str) -> list[CallLimit]:
    """Return the limits that `100/minute` stands for, or raise ValueError."""
    number, _, window = text.partition("/")
    return [CallLimit(float(number), float(window) if window[:1].isdigit() else window)]


def _numbered_lines(chosen: Any) -> Iterator[tuple[str | None, int, str]]:
    """Yield (file or None, number, the line without its end) for the files, or standard input.

    A line ends at a line feed and nowhere else; a carriage return before that, and a byte order mark, are none of it.
    """
    with open(os.devnull) as file:
        encoding = file.encoding
    for name in chosen.names or [None]:
        is_stdin = name in (None, "-")
        with open(chosen.stdin if is_stdin else name, "rb", closefd=not is_stdin) as file:
            for number, line in enumerate(_records(file) if chosen.null else file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.endswith(b"\n") and not chosen.null:
                    line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
                yield name, number, line.decode(encoding, "surrogateescape")


def _records(file: Any) -> Iterator[bytes]:
    """Yield what ends in NUL, as it comes, without that."""
    rest = b""
    for chunk in iter(functools.partial(file.read1, 1 << 16), b""):
        *records, rest = (rest + chunk).split(b"\0")
        yield from records
    if rest:
        yield rest


def _count_lines(chosen: Any) -> int | None:
    """Return how many lines there are in the files; None for standard input, and for what is no plain file."""
    if not chosen.names or not all(map(os.path.isfile, chosen.names)):
        return None
    count, end = 0, b"\0" if chosen.null else b"\n"
    for name in chosen.names:
        with open(name, "rb") as file:
            last = end
            for chunk in iter(functools.partial(file.read, 1 << 20), b""):
                count += chunk.count(end)
                last = chunk
            count += not last.endswith(end)
    return count


_LINES_AHEAD = 16        # per worker: lines that were read and whose results are not printed


class _LineMap:
    """The lines on their way through the pool.

    Iterated it yields ((file, number), future) of each line, or (None, what reading the input raised).
    """

    def __init__(self, pool: Any, chosen: Any) -> None:
        self.pool, self.chosen = pool, chosen
        self.places = threading.Semaphore(_LINES_AHEAD * pool.max_workers)
        # what is to be yielded; at the end how many that are in all
        self.came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # On a thread of its own, for standard input may be slow.
        chosen.thread = threading.Thread(target=self._submit_all, name="concurry lines", daemon=True)
        chosen.thread.start()

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        seen, most = 0, math.inf
        while seen < most:
            item = self.came.get()
            if isinstance(item, int):
                most = item
            else:
                seen += 1
                yield item
                self.places.release()
        self.chosen.thread.join()

    def _submit_all(self) -> None:
        count = 0
        try:
            for *where, line in _numbered_lines(self.chosen):
                if self.chosen.json and not line.strip():
                    continue
                self.places.acquire()
                future = self._submit(line)
                count += 1
                if self.chosen.unordered:
                    future.add_done_callback(functools.partial(self._put, where))
                else:
                    self._put(where, future)
        except BaseException as error:
            count += 1
            self._put(None, error)
        self.came.put(count)

    def _submit(self, line: str) -> BaseFuture[Any]:
        try:
            return self.pool.submit(line)       # type: ignore[no-any-return]
        except (KeyboardInterrupt, SystemExit) as error:        # in sync mode the caller gets what the call raised, too
            future: BaseFuture[Any] = BaseFuture()
            future.set_exception(error)
            return future

    def _put(self, where: list[Any] | None, future: Any) -> None:
        self.came.put((where, future))


def _print_results(lines: _LineMap, chosen: Any) -> int:
    """Print what becomes of the lines; return the exit status."""
    status = 0
    beside = sys.stdout.isatty()                # then the bar has to make room for each result
    encoding = sys.stdout.encoding or "utf-8"
    total = _count_lines(chosen) if chosen.progress else None
    with ProgressBar(total=total, unit="lines", disable=not chosen.progress) as bar:
        aside = bar._screen.aside

        def write(text: str) -> None:
            show = functools.partial(print, text, flush=True, end="\0" if chosen.print0 else "\n")
            aside(show) if beside else show()
        for where, future in lines:
            error = future if where is None else future.exception()
            if error is None and not _can_be_written(future.result(), encoding, "surrogateescape"):
                error = ValueError(f"the result {future.result()!a} cannot be written as {encoding}")
            if error is None:
                write(future.result())
            else:
                status = 1
                name, number = where or (None, None)
                place = "input" if where is None else f"{name}:{number}" if name else f"line {number}"
                text = f"{type(error).__name__}: {error}"
                aside(functools.partial(_complain, f"{place}: {text}"))
                if where is None or not chosen.keep_going:
                    bar.failure()
                    break
                if chosen.json:
                    write(_as_json({"error": text, **({"file": name} if name else {}), "line": number}))
            bar._count(1, error is not None)
    return status


def _complain(text: str) -> None:
    if sys.stderr is not None:
        print(f"concurry: {text}", file=sys.stderr, flush=True)


class _OwnInput:
    """Within it the lines come from standard input, and whoever else reads there finds nothing."""

    def __init__(self, chosen: Any) -> None:
        self.chosen = chosen

    def __enter__(self) -> int | None:
        self.before = sys.stdin
        try:
            self.lines: int | None = os.dup(0)
            os.set_blocking(self.lines, True)
        except OSError:                     # it is closed
            self.lines = None
            return None
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        sys.stdin = open(0, closefd=False)
        return self.lines

    def __exit__(self, *exc_info: object) -> None:
        sys.stdin = self.before
        if self.lines is not None:
            os.dup2(self.lines, 0)
            thread = getattr(self.chosen, "thread", None)
            if thread is None or not thread.is_alive():         # else it may still be reading
                os.close(self.lines)


def _parsed(argv: Sequence[str]) -> tuple[Any, Any]:
    """Return what was chosen, and the parser of the command."""
    parser, mapping = _arguments()
    if argv[:1] != ["map"]:
        return parser.parse_args(argv), mapping
    # For argparse what begins with a minus is an option, and with -0 among those so were each negative number.
    given, words = list(argv[1:]), []
    while given and (word := given.pop(0)) != "--":
        if word == "-e" and given and given[0].startswith("-"):
            word += given.pop(0)
        words.append("--null" if word == "-0" else word)
    chosen = mapping.parse_intermixed_args(words)
    chosen.names += given                   # behind --
    return chosen, mapping


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    logger.addHandler(logging.NullHandler())        # what happens to a line is told line by line
    chosen, mapping = _parsed(sys.argv[1:] if argv is None else argv)
    if chosen.expression is None and not chosen.names:
        mapping.error("a CALLABLE or -e EXPRESSION is needed")
    sys.path.insert(0, os.getcwd())         # as `python3 -m` does, so that the user's modules are found
    with _OwnInput(chosen) as chosen.stdin:
        return _map_lines(chosen, mapping)


def _map_lines(chosen: Any, mapping: argparse.ArgumentParser) -> int:
    try:
        pool = _open_pool(chosen, mapping)
        stream: Any
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="surrogateescape")    # names of files are bytes, and need not be text
        try:
            return _print_results(_LineMap(pool, chosen), chosen)
        finally:
            pool.stop(0)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # The interpreter must not try to flush the rest. Whoever read our output through a pipe has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return 0
        _complain(f"the output cannot be written: {error}")
        return 1


# How what is given by flags is read, and which options it is.
_FLAGS = {
    "--mode": (lambda value: ExecutionMode(value or "process"), ExecutionMode._choices()),
    "--max-workers": _whole(1),
    "--retries": _whole(0),
    "--timeout": (_span, "a number of seconds above 0"),
    "--limit": (lambda value: value and _call_limit(value), "write it as 100/minute, or 100/2.5 for seconds"),
}
_FLAG_OPTIONS = {"--mode": "mode", "--max-workers": "max_workers", "--retries": "num_retries",
                 "--timeout": "call_timeout", "--limit": "limits"}


def _open_pool(chosen: Any, mapping: argparse.ArgumentParser) -> Any:
    """Return the pool that makes the calls; exit with status 2 for what cannot be."""
    try:
        fn = _Expression(chosen.expression) if chosen.expression is not None else _find_callable(chosen.names.pop(0))
        for name in chosen.names:
            if name != "-":
                open(name).close()
        if sys.stdout is None or chosen.stdin is None and (not chosen.names or "-" in chosen.names):
            raise ValueError(f"standard {'output' if sys.stdout is None else 'input'} is closed")
        given = {name: _parse(flag, getattr(chosen, flag.strip("-").replace("-", "_")), _FLAGS)
                 for flag, name in _FLAG_OPTIONS.items()}
        given = {"name": "map", **{name: value for name, value in given.items() if value is not None}}
        if chosen.timeout and given["mode"] in (ExecutionMode.Sync, ExecutionMode.Ray):
            raise ValueError(f"--timeout has no effect in mode {given['mode'].value}")
        if given["mode"] is ExecutionMode.Ray:
            _start_ray()
        return _open(TaskWorker, given, (_ForLines(fn, chosen.json),), {}, sized=True)
    except (ValueError, TypeError, OSError, SyntaxError, ImportError) as error:
        mapping.error(str(error))


def _start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, or make one of this machine: nobody else can have done it."""
    try:
        ray = _optional("ray")
    except ImportError:
        return                          # the pool will say so
    if not ray.is_initialized():
        ray.init(logging_level="ERROR", log_to_driver=False)


def _load_self() -> Any:
    """Return this module under its own name, though it runs as `__main__`."""
    name = os.path.splitext(os.path.basename(_FILE))[0]
    if name not in sys.modules:
        from importlib import util
        spec: Any = util.spec_from_file_location(name, _FILE)
        sys.modules[name] = module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


if __name__ == "__main__":
    # Under its own name, so that classes are the same here, in modules that import it, and in workers.
    sys.exit(_load_self().main())
