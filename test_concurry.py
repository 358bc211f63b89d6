"""The tests of concurry: `python3 -m unittest`."""

import ast
import asyncio
import atexit
import builtins
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import dataclasses
import datetime
import faulthandler
import fractions
import functools
import gc
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import logging.handlers
import marshal
import math
import multiprocessing
import os
import pickle
import py_compile
import queue
import random
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import typing
import unittest
import unittest.mock
import warnings
import weakref
import zipfile

import concurry
from concurry import *

SAFETY = float(os.environ.get("CONCURRY_SAFETY", 30))      # seconds; only a deadlock reaches it
NO_SKIP = os.environ.get("CONCURRY_NO_SKIP") == "1"
CPUS = 4                        # of the Ray cluster
MODES = ("sync", "thread", "process", "asyncio")
ALL_MODES = (*MODES, "ray")
AWAY = ("process", "ray")       # the object lives in another process
TOKEN = os.environ.setdefault("CONCURRY_TESTS", f"tests-{os.getpid()}")     # our descendants are known by it


def setUpModule():
    """Have folders of our own for temporary files, to see whether some are left."""
    settings = unittest.mock.patch.dict(os.environ)
    settings.start()
    before = tempfile.tempdir
    folder = tempfile.TemporaryDirectory(prefix="concurry-tests-")
    of_ray = tempfile.mkdtemp(prefix="ray-", dir="/tmp")        # a short path: there are sockets in it
    # Workers import this file. What it imports waits for them in the fork server, else each took ten times as long to start.
    boot = unittest.mock.patch.object(concurry, "_BOOT_FILE", concurry._BOOT_FILE.replace("module._begin", (
        "if function == '_serve_forks':\n"
        "    import asyncio, dataclasses, fractions, json, logging.handlers, typing, unittest.mock, zipfile\n"
        "module._begin")))
    boot.start()
    tempfile.tempdir = os.environ["TMPDIR"] = folder.name
    os.environ["RAY_TMPDIR"] = of_ray

    if sys.dont_write_bytecode:         # then each process that imports them would compile these
        for path in (concurry.__file__, __file__):
            keep_compiled(path)

    def put_back():
        boot.stop()
        settings.stop()
        tempfile.tempdir = before
        folder.cleanup()
        shutil.rmtree(of_ray, ignore_errors=True)
    unittest.addModuleCleanup(put_back)
    unittest.addModuleCleanup(Cluster.end)


def keep_compiled(path):
    """Have a file compiled while the tests run."""
    compiled = importlib.util.cache_from_source(path)
    if not os.path.exists(compiled):
        with contextlib.suppress(OSError):      # the folder cannot be written to
            py_compile.compile(path)
            unittest.addModuleCleanup(os.unlink, compiled)


# === Scaffolding ===

def over_modes(namespace, bodies, modes=ALL_MODES):
    """Make a TestCase of each body for each mode: ThreadCallTests, ProcessCallTests, ..."""
    for mode in modes:
        for body in bodies:
            name = mode.title() + body.__name__
            assert name not in namespace, f"{name} is made twice"
            namespace[name] = type(name, (body, ModeMixin, RayTestCase if mode == "ray" else CleanTestCase),
                                   {"mode": mode, "__module__": namespace["__name__"]})


def descendants():
    """Return {pid: what it is} of living processes that we or our workers have started."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            stat = open_and_read(f"/proc/{pid}/stat").rpartition(")")[2].split()
            ours = int(stat[1]) == os.getpid() or TOKEN in open_and_read(f"/proc/{pid}/environ")
            if ours and pid != os.getpid() and stat[0] != "Z":
                found[pid] = open_and_read(f"/proc/{pid}/cmdline").replace("\0", " ")[:200]
    return {pid: what for pid, what in found.items() if "multiprocessing.resource_tracker" not in what}


def open_and_read(path):
    with open(path, errors="replace") as file:
        return file.read()


def descriptors():
    """Return {number: what it is} of our open descriptors."""
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):      # the listing's own
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def until_gone(pid):
    """Wait until a process, child or not, has ended; tell whether it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], SAFETY)[0])
    finally:
        os.close(descriptor)


def lives(pid):
    """Return whether a process, child or not, has not ended."""
    descriptor = os.pidfd_open(pid)
    try:
        return not select.select([descriptor], [], [], 0)[0]
    finally:
        os.close(descriptor)


def run_script(code, *args, flags=(), stdin=None, check=True, **environment):
    """Run Python code in a fresh interpreter, from a file; return the CompletedProcess (text)."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "script.py")
        with open(path, "w") as file:
            file.write(textwrap.dedent(code))
        here = os.path.dirname(os.path.abspath(concurry.__file__))
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", *flags, path, *args], text=True, stderr=subprocess.PIPE,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": here, **environment})
        with process:
            try:
                out, err = process.communicate(stdin, timeout=SAFETY)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)         # it tells where it hangs
                raise AssertionError("the script hangs:\n" + "".join(map(str, process.communicate()))) from None
    ended = subprocess.CompletedProcess(path, process.returncode, out, err)
    if check and ended.returncode:
        raise AssertionError(f"exit status {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return ended


class Flag:
    """An event that any thread or process of any mode can set, and wait for; it travels by its path."""

    def __init__(self, path=None):
        self.path = path or os.path.join(tempfile.mkdtemp(), "flag")
        if path is None:
            os.mkfifo(self.path)
            self.keeper = os.open(self.path, os.O_RDWR)     # what is written stays while this is open

    def __reduce__(self):
        return Flag, (self.path,)

    def set(self, byte=b"x"):
        descriptor = os.open(self.path, os.O_RDWR)
        os.write(descriptor, byte)
        os.close(descriptor)

    def wait(self):
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            if not select.select([descriptor], [], [], SAFETY)[0]:
                raise AssertionError("the flag was never set")
            os.write(descriptor, os.read(descriptor, 1))    # it stays set for others
        finally:
            os.close(descriptor)

    def is_set(self):
        return bool(select.select([self.keeper], [], [], 0)[0])

    def count(self):
        """Tell how often it was set."""
        return len(os.read(self.keeper, 4096)) if self.is_set() else 0

    def close(self):
        os.close(self.keeper)
        os.unlink(self.path)
        os.rmdir(os.path.dirname(self.path))


class Belongings:
    """The threads, processes, descriptors and temporary files that there are."""

    def __init__(self):
        self.threads = set(threading.enumerate())
        self.processes = set(descendants())
        self.descriptors = descriptors()
        self.files = set(os.listdir(tempfile.gettempdir()))

    def what_is_left(self):
        """Return what is there now and was not, after waiting for what is about to go."""
        gc.collect()
        left = set(threading.enumerate()) - self.threads
        deadline = time.monotonic() + SAFETY / 3
        for thread in left:
            thread.join(max(0, deadline - time.monotonic()))
        concurry._close_server()
        threads = [thread for thread in left if thread.is_alive()]
        if threads:
            faulthandler.dump_traceback(sys.__stderr__)
        processes = [what for pid, what in descendants().items() if pid not in self.processes and not until_gone(pid)]
        opened = [what for number, what in descriptors().items() if self.descriptors.get(number) != what]
        return threads + processes + opened + sorted(set(os.listdir(tempfile.gettempdir())) - self.files)


class CleanTestCase(unittest.TestCase):
    """Each test ends within the safety time; each class leaves no thread, process or descriptor."""

    belongings = Belongings

    @classmethod
    def setUpClass(cls):
        if not issubclass(cls, RayTestCase):
            Cluster.end()
        cls.before = cls.belongings()
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        faulthandler.dump_traceback_later(2 * SAFETY, exit=True)
        left = cls.before.what_is_left()
        faulthandler.cancel_dump_traceback_later()
        assert not left, left

    def run(self, result=None):
        faulthandler.dump_traceback_later(2 * SAFETY, exit=True, file=sys.__stderr__)
        try:
            return super().run(result)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def skipTest(self, reason):
        if NO_SKIP:
            self.fail(f"would skip: {reason}")
        super().skipTest(reason)

    def need(self, name):
        """Return an optional package, or skip."""
        try:
            return importlib.import_module(name)
        except ImportError:
            self.skipTest(f"needs {name}")

    def flag(self):
        flag = Flag()
        self.addCleanup(flag.close)
        return flag

    def folder(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return folder.name

    def start(self, cls, *args, init=None, **options):
        """Return the handle of a new worker or pool, stopped when the test ends."""
        handle = cls.options(**options).init(*args, **(init or {}))
        self.addCleanup(handle.stop, 5)
        return handle

    def log_of(self, logger="concurry", level="WARNING"):
        return self.assertLogs(logger, level)


class Cluster:
    """A Ray cluster on this machine; it lasts as long as classes that need it follow each other."""

    joining = None                  # what a script has to begin with, to be part of it

    @classmethod
    def start(cls):
        import ray
        if cls.joining is None:
            os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                context = ray.init(num_cpus=CPUS, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
                                   object_store_memory=200_000_000)
            cls.joining = (f"import ray; ray.init({context.address_info['address']!r}, logging_level='ERROR', "
                           f"log_to_driver=False)\n")

    @classmethod
    def end(cls):
        if cls.joining is not None:
            import ray
            watch = concurry._ray_watch
            ray.shutdown()
            if watch is not None:           # it lingers until then
                watch.join(SAFETY)
            cls.joining = None


class RayBelongings:
    """The threads and actors that there are: processes and descriptors are Ray's business."""

    def __init__(self):
        self.threads = set(threading.enumerate())
        self.actors = self.living_actors()

    @staticmethod
    def living_actors():
        import ray
        return {number: actor["ActorClassName"] for number, actor in ray._private.state.actors().items()
                if actor["State"] != "DEAD"}

    def what_is_left(self):
        with contextlib.suppress(AssertionError):       # a thread that is about to end may hold the last set of a keeper
            until(lambda: gc.collect() is None or not set(self.living_actors()) - set(self.actors))
        actors = [what for number, what in self.living_actors().items() if number not in self.actors]
        left = set(threading.enumerate()) - self.threads - {concurry._ray_watch}
        deadline = time.monotonic() + SAFETY / 3
        for thread in left:
            thread.join(max(0, deadline - time.monotonic()))
        return actors + [thread for thread in left if thread.is_alive()]


class RayTestCase(CleanTestCase):
    belongings = RayBelongings

    @classmethod
    def setUpClass(cls):
        try:
            Cluster.start()
        except ImportError:
            if NO_SKIP:
                raise
            raise unittest.SkipTest("needs ray") from None
        super().setUpClass()


class ModeMixin:
    """What the bodies that are run over all modes use: `self.mode`, and `self.make`."""

    def make(self, cls, *args, init=None, **options):
        return self.start(cls, *args, init=init, mode=self.mode, **options)

    def waiting(self, handle, submit, *args):
        """Return the future of a call that waits for futures among its arguments: in sync mode its caller waits, too."""
        if self.mode != "sync":
            return submit(*args)
        before = set(handle._pool.calls)
        in_thread(submit, *args)
        until(lambda: set(handle._pool.calls) - before)
        return (set(handle._pool.calls) - before).pop().future

    def build(self, cls, *args, **init):
        """Raise what a constructor raises: `init` does, and in ray mode, where it does not wait, a future."""
        handle = self.make(cls, *args, init=init)
        if self.mode == "ray":
            getattr(handle, next(name for name in dir(cls) if not name.startswith("_")))().result(SAFETY)


class Counter(Worker):
    """A bit of state, and methods of every kind."""

    kind = "counter"
    size: int

    def __init__(self, count=0, fail=None):
        if fail is not None:
            raise fail
        self.count = count

    def add(self, n=1, *, times=1):
        self.count += n * times
        return self.count

    async def add_async(self, n=1):
        await asyncio.sleep(0)
        self.count += n
        return self.count

    def echo(self, *args, **kwargs):
        return (args, kwargs) if kwargs else args[0] if len(args) == 1 else args

    async def echo_async(self, x):
        return x

    def fail(self, error):
        raise error

    async def fail_async(self, error):
        raise error

    def hold(self, started, go, result="held"):
        """Say that the call has begun, and go on when told."""
        started.set()
        go.wait()
        return result

    @staticmethod
    def plain(x):
        return x * 2

    @classmethod
    def name_of(cls):
        return cls.__name__

    @property
    def twice(self):
        return self.count * 2

    def _private(self):
        pass


def square(x):
    return x * x


def add(a, b=10):
    return a + b


def hold(started, go, result="held"):
    started.set()
    go.wait()
    return result


async def square_async(x):
    await asyncio.sleep(0)
    return x * x


def in_thread(fn, *args):
    """Start a thread; its outcome is a plain concurrent.futures.Future."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(fn(*args))
        except BaseException as error:
            future.set_exception(error)
    threading.Thread(target=run, daemon=True).start()
    return future


def until(condition):
    """Give way to other threads until this is so: for what is seen in statistics only."""
    deadline = time.monotonic() + SAFETY
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        threading.Event().wait(0.001)           # not at once: the others need the interpreter


def done_future(kind=BaseFuture, result=None, error=None, cancel=False):
    future = kind()
    if cancel:
        future.cancel()
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
    return future


@contextlib.contextmanager
def loop_in_thread():
    """An event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(SAFETY)
        loop.close()


# === The module ===

class ModuleTests(CleanTestCase):
    def test_all_names_exist_and_no_others_are_public(self):
        missing = [name for name in concurry.__all__ if not hasattr(concurry, name)]
        self.assertEqual(missing, [])
        public = {name for name, value in vars(concurry).items()
                  if not name.startswith("_") and getattr(value, "__module__", "") == "concurry"}
        self.assertEqual(public - set(concurry.__all__) - {"main"}, set())

    def test_messages(self):
        """Every message of ours: a clause in lower case, with the value, without a full stop; few types."""
        def text(node):
            if isinstance(node, ast.JoinedStr):
                return "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
            if isinstance(node, ast.IfExp):
                return text(node.body)
            return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
        seen = 0
        for call in ast.walk(ast.parse(open_and_read(concurry.__file__))):
            name = isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2]
            if name and re.search("(Error|^_Reason)$", name) and call.args and text(call.args[0]):
                seen += 1
                self.assertIn(name, (
                    "ValueError", "TypeError", "AttributeError", "RuntimeError", "TimeoutError", "_Reason", "PicklingError", "OSError",
                    "ImportError", "WorkerDiedError", "InvalidStateError", "RayError", "RayActorError",
                    "CallTimeoutError"))
                message = text(call.args[0])
                with self.subTest(message=message, line=call.lineno):
                    self.assertRegex(message, r"^([a-z'{@-]|Ray )(.|\n)*[^.\s]$")
                    self.assertTrue(len(message.split()) >= 3 or "x: x" in message)
        self.assertGreater(seen, 80)

    def test_examples_in_docstrings(self):
        import doctest
        self.assertEqual(doctest.testmod(concurry), (0, 8))

    def test_import_is_cheap(self):
        heavy = "asyncio", "multiprocessing", "sqlite3", "inspect", "subprocess", "ray"
        out = run_script(f"import concurry, sys; print([m for m in {heavy!r} if m in sys.modules])", flags=["-S"]).stdout
        self.assertEqual(out.strip(), "[]")


# === Choices and options ===

class ChoiceTests(CleanTestCase):
    def test_aliases(self):
        M, B = ExecutionMode, LoadBalancingAlgorithm
        for member, names in {
            M.Sync: ["sync", "synchronous"], M.Threads: ["thread", "threads", "threading"],
            M.Processes: ["process", "processes", "proc", "procs"],
            M.Asyncio: ["asyncio", "async", "asynchronous"],
            B.RoundRobin: ["round_robin", "rr"], B.LeastActiveLoad: ["least_active", "active", "least_active_load"],
            B.LeastTotalLoad: ["least_total", "total", "least_total_load"], B.Random: ["random", "rand"],
        }.items():
            for name in (*names, member):
                self.assertIs(type(member)(name), member)

    def test_spelling_is_loose(self):
        for name in ("Round Robin", "ROUND-ROBIN", "roundrobin", "RR", "RoundRobin"):
            self.assertIs(LoadBalancingAlgorithm(name), LoadBalancingAlgorithm.RoundRobin)

    def test_an_unknown_string_lists_the_choices(self):
        for option, value, choice in (("mode", "thraed", "'thread'"), ("mode", 3, "'thread'"),
                                      ("load_balancing", "fair", "'round_robin'"),
                                      ("mp_context", "vfork", "'forkserver'")):
            with self.assertRaisesRegex(ValueError, choice) as caught:
                Counter.options(**{"mode": "thread", option: value})
            self.assertIn(repr(value), str(caught.exception))

    def test_wait_constants_equal_the_standard_ones(self):
        for name in ("ALL_COMPLETED", "FIRST_COMPLETED", "FIRST_EXCEPTION"):
            self.assertEqual(getattr(concurry, name), getattr(concurrent.futures, name))
            self.assertIs(ReturnWhen(name.lower()), getattr(concurry, name))


class OptionTests(CleanTestCase):
    def test_an_unknown_option_names_the_nearest(self):
        for make in (lambda **o: Counter.options(mode="sync", **o), lambda **o: Executor("sync", **o),
                     lambda **o: task(mode="sync", **o)(square), lambda **o: worker(mode="sync", **o)(type("C", (), {})),
                     lambda **o: types.new_class("C", (Worker,), {"mode": "sync", **o})):
            with self.assertRaisesRegex(TypeError, "max_worker'.*'max_workers'"):
                make(max_worker=1)

    def test_values_are_coerced(self):
        for text, value in (("true", True), ("false", False), ("1", True), ("0", False), ("yes", True), ("No", False)):
            self.assertIs(self.start(Counter, mode="sync", blocking=text).blocking, value)
        handle = self.start(Counter, mode="Threading", max_workers="2", max_queued_tasks="3", on_demand_linger="0.5",
                            load_balancing="RR")
        self.assertEqual((handle.mode, handle.max_workers, handle.max_queued_tasks, handle.on_demand_linger),
                         (ExecutionMode.Threads, 2, 3, 0.5))
        self.assertIs(handle.load_balancing, LoadBalancingAlgorithm.RoundRobin)

    def test_an_impossible_value_is_named_with_its_range(self):
        for option, value, expected in (
                ("max_workers", -1, "from 0"), ("max_workers", 1.5, "whole number"), ("max_workers", "many", "whole number"),
                ("max_workers", True, "whole number"), ("max_workers", float("nan"), "whole number"),
                ("max_queued_tasks", 0, "from 1"), ("blocking", "maybe", "true or false"), ("blocking", 2, "true or false"),
                ("on_demand_linger", -1, "from 0"), ("on_demand_linger", float("nan"), "from 0")):
            with self.subTest(option=option, value=value), self.assertRaises(ValueError) as caught:
                Counter.options(mode="thread", **{option: value})
            for text in (option, repr(value), expected):
                self.assertIn(text, str(caught.exception))

    def test_the_mode_is_required(self):
        for make in (Counter.options().init, Counter.init, lambda: task(square)(2)):
            with self.assertRaisesRegex(ValueError, "mode is required"):
                make()

    def test_options_of_another_mode_have_no_effect(self):
        for mode in MODES:
            handle = self.start(Counter, mode=mode, mp_context="spawn" if mode != "process" else "forkserver",
                                on_demand_linger=3)
            self.assertEqual(handle.add(2).result(SAFETY), 2)

    def test_sync_and_asyncio_have_one_worker(self):
        for mode in ("sync", "asyncio"):
            for options in ({"max_workers": 2}, {"max_workers": 0}, {"on_demand": True}):
                with self.assertRaisesRegex(ValueError, next(iter(options))):
                    Counter.options(mode=mode, **options).init()
            self.assertEqual(self.start(Counter, mode=mode, max_workers=1).max_workers, 1)

    def test_no_workers_are_for_on_demand_pools(self):
        with self.assertRaisesRegex(ValueError, "max_workers=0"):
            Counter.options(mode="thread", max_workers=0).init()
        for mode in ("thread", "process"):
            handle = self.start(Counter, mode=mode, max_workers=0, on_demand=True)
            self.assertEqual(handle.max_workers, max(1, os.cpu_count() - 1))


class ConfigTests(CleanTestCase):
    def test_it_travels_with_the_worker(self):
        def inner():
            import concurry
            with concurry.Executor("thread", 1) as pool:
                return pool.submit(abs, -3)         # the result: blocking is the parent's default
        self.addCleanup(concurry.global_config.reset_to_defaults)
        concurry.global_config.defaults.blocking = True
        for method in ("forkserver", "spawn", "fork"):
            with self.subTest(method), Executor("process", 1, mp_context=method) as pool:
                self.assertEqual(pool.submit(inner), 3)

    def setUp(self):
        self.addCleanup(global_config.reset_to_defaults)

    def test_defaults(self):
        found = {mode: [global_config.get_defaults(mode)[name] for name in ("max_workers", "max_queued_tasks")]
                 for mode in MODES}
        self.assertEqual((found["thread"], found["process"]), ([24, 100], [4, 5]))
        self.assertEqual(found["sync"][1], None)
        self.assertEqual(global_config.get_defaults("thread")["stop_timeout"], 30)

    def test_argument_wins_over_mode_wins_over_defaults(self):
        global_config.defaults.max_queued_tasks = 7
        self.assertEqual(self.start(Counter, mode="thread").max_queued_tasks, 100)
        global_config.thread.blocking = "yes"
        self.assertIs(self.start(Counter, mode="thread").blocking, True)
        self.assertIs(self.start(Counter, mode="thread", blocking=False).blocking, False)
        self.assertIs(self.start(Counter, mode="sync").blocking, False)

    def test_it_is_read_at_init(self):
        builder = Counter.options(mode="sync")
        global_config.sync.blocking = True
        self.assertEqual(builder.init(3).add(), 4)
        handle = self.start(Counter, mode="sync")
        global_config.sync.blocking = False
        self.assertEqual(handle.add(), 1)

    def test_the_mode_may_be_configured(self):
        global_config.defaults.mode = "sync"
        self.assertIs(self.start(Counter).mode, ExecutionMode.Sync)
        self.assertEqual(Counter.init(1).add().result(), 2)

    def test_assignment_is_validated(self):
        with self.assertRaisesRegex(ValueError, "max_workers=-1"):
            global_config.thread.max_workers = -1
        with self.assertRaisesRegex(TypeError, "max_workers"):
            global_config.thread.max_worker = 1
        with self.assertRaises((AttributeError, TypeError)):
            global_config.treads.max_workers = 1

    def test_pools_without_a_size_take_the_configured_one(self):
        global_config.thread.max_workers = 3
        self.assertEqual(self.start(Counter, mode="thread").max_workers, 1)
        self.assertEqual(self.start(Counter, mode="thread", on_demand=True).max_workers, 3)
        with Executor("thread") as pool:
            self.assertEqual(pool.get_pool_stats()["total_workers"], 3)

    def test_reset(self):
        global_config.thread.max_workers = 3
        global_config.reset_to_defaults()
        self.assertEqual(global_config.get_defaults("thread")["max_workers"], 24)


# === Futures ===

class FutureTests(CleanTestCase):
    """Futures alone, settled by hand."""

    def test_life_of_a_future(self):
        future = BaseFuture()
        self.assertIsInstance(future, concurrent.futures.Future)
        self.assertEqual((future.done(), future.running(), future.cancelled()), (False, False, False))
        self.assertIn("pending", repr(future))
        self.assertTrue(future.set_running_or_notify_cancel())
        self.assertTrue(future.running())
        self.assertFalse(future.cancel())
        future.set_result(3)
        self.assertEqual((future.result(), future.exception(), future.done(), future.running()), (3, None, True, False))
        self.assertFalse(future.cancel())

    def test_it_is_settled_once(self):
        for settle in (done_future(), done_future(error=ValueError()), done_future(cancel=True)):
            for again in (lambda: settle.set_result(1), lambda: settle.set_exception(ValueError())):
                self.assertRaises(concurrent.futures.InvalidStateError, again)

    def test_it_is_begun_once(self):
        future = BaseFuture()
        self.assertTrue(future.set_running_or_notify_cancel())
        self.assertRaises(concurrent.futures.InvalidStateError, future.set_running_or_notify_cancel)
        future.set_result(1)
        self.assertRaises(concurrent.futures.InvalidStateError, future.set_running_or_notify_cancel)

    def test_no_exception_is_the_result_none(self):
        future = BaseFuture()
        future.set_exception(None)
        self.assertEqual((future.result(0), future.exception(0)), (None, None))

    def test_one_settler_of_many_wins(self):
        for _ in range(100):
            future, barrier, winners = BaseFuture(), threading.Barrier(3), []

            def settle(how):
                barrier.wait(SAFETY)
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    if how(future) is not False:
                        winners.append(how)
            runs = [in_thread(settle, how) for how in (
                lambda f: f.set_result(1), lambda f: f.set_exception(KeyError()), lambda f: f.cancel())]
            concurrent.futures.wait(runs, SAFETY)
            self.assertEqual(len(winners), 1)

    def test_timeouts_have_every_name(self):
        future = BaseFuture()
        for name in (TimeoutError, concurrent.futures.TimeoutError, asyncio.TimeoutError):
            for wait in (future.result, future.exception, lambda t: gather([future], timeout=t),
                         lambda t: list(as_completed([future], timeout=t)),
                         lambda t: list(gather([future], iter=True, timeout=t)),
                         lambda t: asyncio.run(async_gather([future], timeout=t))):
                with self.assertRaises(name):
                    wait(0)

    def test_cancelled(self):
        future = done_future(cancel=True)
        self.assertTrue(future.cancelled() and future.done() and future.cancel())
        self.assertFalse(future.set_running_or_notify_cancel())
        self.assertRaises(concurrent.futures.CancelledError, future.result)
        self.assertRaises(concurrent.futures.CancelledError, future.exception)

        async def main():
            with self.assertRaises(asyncio.CancelledError):
                await future
        asyncio.run(main())

    def test_a_waiter_is_woken_by_every_outcome(self):
        for settle, expected in ((lambda f: f.set_result(1), 1), (lambda f: f.set_exception(KeyError(1)), KeyError),
                                 (lambda f: f.cancel(), concurrent.futures.CancelledError)):
            future, ready = BaseFuture(), threading.Event()

            def wait():
                ready.set()
                return future.result(SAFETY)
            waiting = in_thread(wait)
            ready.wait(SAFETY)
            settle(future)
            if expected == 1:
                self.assertEqual(waiting.result(SAFETY), 1)
            else:
                self.assertIsInstance(waiting.exception(SAFETY), expected)

    def test_callbacks_run_in_order_once_and_late_ones_at_once(self):
        future, seen = BaseFuture(), []
        for n in (1, 2):
            future.add_done_callback(lambda f, n=n: seen.append((n, f.result())))
        future.set_result("x")
        future.add_done_callback(lambda f: seen.append((3, f.result())))
        self.assertEqual(seen, [(1, "x"), (2, "x"), (3, "x")])

    def test_a_callback_that_raises_is_logged_once_and_the_rest_run(self):
        for error in (ValueError, SystemExit, KeyboardInterrupt):
            future, seen = BaseFuture(), []

            def bad(_):
                raise error("bad callback")
            future.add_done_callback(bad)
            future.add_done_callback(seen.append)
            with self.log_of(level="ERROR") as log:
                future.set_result(1)
            self.assertEqual((len(log.output), seen), (1, [future]))
            self.assertIn("bad callback", log.output[0])

    def test_callbacks_are_removed(self):
        future, mine, others = BaseFuture(), [], []
        for callback in (mine.append, others.append, mine.append):
            future.add_done_callback(callback)
        self.assertEqual([future.remove_done_callback(mine.append) for _ in range(2)], [2, 0])
        future.set_result(1)
        self.assertEqual((mine, others, future.remove_done_callback(others.append)), ([], [future], 0))

    def test_an_exception_makes_no_cycle(self):
        class Tracked(Exception):
            pass
        future = done_future(error=Tracked())
        gone = weakref.ref(future)
        gc.disable()
        self.addCleanup(gc.enable)
        try:
            future.result()
        except Tracked:
            pass
        del future
        self.assertIsNone(gone())

    def test_the_standard_wait_takes_ours_mixed_with_theirs(self):
        ours, theirs = [BaseFuture(), BaseFuture()], concurrent.futures.Future()
        found = concurrent.futures.wait([*ours, theirs], timeout=0)
        self.assertEqual(found.not_done, {*ours, theirs})
        waiting = in_thread(concurrent.futures.wait, [*ours, theirs], SAFETY)
        ours[0].set_result(1)
        theirs.set_result(2)
        ours[1].set_exception(KeyError())
        self.assertEqual(waiting.result(SAFETY).done, {*ours, theirs})
        for when in (concurrent.futures.FIRST_EXCEPTION, concurrent.futures.FIRST_COMPLETED):
            pending = BaseFuture()
            self.assertEqual(concurrent.futures.wait([ours[1], pending], SAFETY, when), ({ours[1]}, {pending}))

    def test_the_standard_as_completed_takes_ours(self):
        futures = [BaseFuture(), concurrent.futures.Future(), BaseFuture()]
        finished = concurrent.futures.as_completed(futures, SAFETY)
        futures[2].cancel()
        first = next(finished)
        futures[0].set_result(0)
        second = next(finished)
        futures[1].set_result(1)
        self.assertEqual([first, second, *finished], [futures[2], futures[0], futures[1]])

    def test_asyncios_wait_takes_ours(self):
        async def main(when, settle):
            futures = [BaseFuture() for _ in settle] + [BaseFuture()] * (when != asyncio.ALL_COMPLETED)
            waiting = asyncio.ensure_future(asyncio.wait(futures, timeout=SAFETY, return_when=when))
            await asyncio.sleep(0)
            in_thread(lambda: [end(future) for end, future in zip(settle, futures)])
            self.assertEqual(await waiting, (set(futures[:len(settle)]), set(futures[len(settle):])))
        ends = [lambda f: f.set_result(1), lambda f: f.cancel(), lambda f: f.set_exception(KeyError())]
        for when, settle in ((asyncio.ALL_COMPLETED, ends), (asyncio.FIRST_EXCEPTION, ends[2:]),
                             *((asyncio.FIRST_COMPLETED, [end]) for end in ends)):
            with self.subTest(when=when):
                asyncio.run(main(when, settle))

    def test_asyncios_wait_leaves_no_callback_behind(self):
        future, seen = BaseFuture(), []

        async def main():
            future.add_done_callback(seen.append)
            self.assertEqual(await asyncio.wait([future, done_future()], timeout=0), (unittest.mock.ANY, {future}))
            waiting = asyncio.ensure_future(asyncio.wait([future]))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        asyncio.run(main())
        self.assertEqual(future.__dict__["_callbacks"], [seen.append])
        future.set_result(1)
        self.assertEqual(seen, [future])

    def test_the_standard_wait_is_woken_by_each_kind_of_end(self):
        for end in (lambda f: f.set_result(1), lambda f: f.set_exception(KeyError()), lambda f: f.cancel()):
            future = BaseFuture()
            future._condition               # as though a `wait` was under way
            waiting = in_thread(concurrent.futures.wait, [future], SAFETY)
            end(future)
            self.assertEqual(waiting.result(SAFETY).done, {future})

    def test_settled_between_the_reading_and_the_installing_of_the_standard_wait(self):
        install = concurrent.futures._base._create_and_install_waiters
        for wait in (lambda f: concurrent.futures.wait([f], SAFETY).done,
                     lambda f: set(concurrent.futures.as_completed([f], SAFETY))):
            future, settlers = BaseFuture(), []

            def settle_then_install(fs, when):
                settlers.append(threading.Thread(target=future.set_result, args=(1,)))
                settlers[0].start()
                settlers[0].join(0.05)      # it ends, or waits for the lock that we hold
                return install(fs, when)
            with unittest.mock.patch("concurrent.futures._base._create_and_install_waiters", settle_then_install):
                self.assertEqual(wait(future), {future})
            settlers[0].join(SAFETY)
            self.assertEqual(future.result(0), 1)

    def test_the_condition_made_while_the_outcome_is_set(self):
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        for _ in range(300):
            future, barrier = BaseFuture(), threading.Barrier(2)
            settling = in_thread(lambda: (barrier.wait(SAFETY), future.set_result(1)))
            barrier.wait(SAFETY)
            self.assertEqual(concurrent.futures.wait([future], SAFETY).not_done, set())
            settling.result(SAFETY)

    def test_awaited_from_two_loops_at_once(self):
        future = BaseFuture()

        async def main():
            return await future
        runs = [in_thread(asyncio.run, main()) for _ in range(2)]
        future.set_result(5)
        self.assertEqual([run.result(SAFETY) for run in runs], [5, 5])

        async def late():
            return await future, await asyncio.wrap_future(future)
        self.assertEqual(asyncio.run(late()), (5, 5))

    def test_an_awaited_error_is_raised_as_itself(self):
        future, error = BaseFuture(), KeyError(1)

        async def main():
            asyncio.get_running_loop().call_soon(future.set_exception, error)
            with self.assertRaises(KeyError) as caught:
                await future
            self.assertIs(caught.exception, error)
        asyncio.run(main())

    def test_cancelling_the_task_that_awaits_cancels_the_future(self):
        future = BaseFuture()

        async def main():
            async def wait_for_it():
                begun.set()
                await future
            begun = asyncio.Event()
            waiting = asyncio.ensure_future(wait_for_it())
            await begun.wait()
            waiting.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await waiting
        asyncio.run(main())
        self.assertTrue(future.cancelled())

    def test_wrap_future(self):
        ours = BaseFuture()
        self.assertIs(wrap_future(ours), ours)
        for theirs in (concurrent.futures.Future(), done_future(concurrent.futures.Future, 1)):
            wrapped = wrap_future(theirs)
            self.assertIsInstance(wrapped, BaseFuture)
            if not theirs.done():
                self.assertFalse(wrapped.done())
                theirs.set_result(1)
            self.assertEqual(wrapped.result(SAFETY), 1)
        self.assertIsInstance(wrap_future(done_future(concurrent.futures.Future, error=KeyError())).exception(0), KeyError)
        self.assertTrue(wrap_future(done_future(concurrent.futures.Future, cancel=True)).cancelled())
        for wrong in (None, 3, square):
            self.assertRaisesRegex(TypeError, type(wrong).__name__, wrap_future, wrong)

    def test_wrapped_futures_are_cancelled_both_ways(self):
        theirs = concurrent.futures.Future()
        self.assertTrue(wrap_future(theirs).cancel())
        self.assertTrue(theirs.cancelled())
        theirs = concurrent.futures.Future()
        wrapped = wrap_future(theirs)
        theirs.cancel()
        theirs.set_running_or_notify_cancel()
        self.assertTrue(wrapped.cancelled())

    def test_wrap_an_asyncio_future(self):
        with loop_in_thread() as loop:
            theirs = loop.create_future()
            wrapped = wrap_future(theirs)
            loop.call_soon_threadsafe(theirs.set_result, 4)
            self.assertEqual(wrapped.result(SAFETY), 4)
            theirs, ended = loop.create_future(), threading.Event()
            loop.call_soon_threadsafe(theirs.add_done_callback, lambda _: ended.set())
            self.assertTrue(wrap_future(theirs).cancel())
            self.assertTrue(ended.wait(SAFETY) and theirs.cancelled())

        async def main():
            theirs = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(theirs.set_result, 6)
            return await wrap_future(theirs)
        self.assertEqual(asyncio.run(main()), 6)

    def test_a_future_does_not_travel(self):
        self.assertRaisesRegex(pickle.PicklingError, "future", pickle.dumps, BaseFuture())

    def test_forgotten_waits_leave_nothing_behind(self):
        future = BaseFuture()
        sizes = []
        for _ in range(3):
            for _ in range(50):
                for poll in (lambda: future.result(0.0001), lambda: gather([future], timeout=0),
                             lambda: list(as_completed([future], timeout=0)), lambda: wait([future], timeout=0)):
                    with contextlib.suppress(TimeoutError):
                        poll()
            sizes.append(len(gc.get_referents(*future.__dict__.values())))
        self.assertEqual(sizes[0], sizes[2])


# === Progress ===

class Stream:
    """Standard error as a file has it, or, with a size, as a terminal: what it shows can be asked."""

    encoding = "utf-8"

    def __init__(self, columns=None, rows=24):
        self.text, self.pieces = "", []
        self.is_terminal = columns is not None
        if self.is_terminal:
            import fcntl
            import pty
            import struct
            import termios
            self.master, self.slave = pty.openpty()
            fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            self.columns = columns

    def write(self, text):
        self.text += text
        self.pieces.append(text)

    def flush(self):
        pass

    def isatty(self):
        return self.is_terminal

    def fileno(self):
        return self.slave

    def close(self):
        if self.is_terminal:
            os.close(self.master)
            os.close(self.slave)

    def screen(self):
        """Return the lines that a terminal shows after what was written to it."""
        lines, row, column = [""], 0, 0
        for up, erase, colour, char in re.findall(r"\x1b\[(\d+)A|\x1b\[([KJ])|\x1b\[([\d;]*)m|(.|\n)", self.text):
            if up:
                row -= int(up)
            elif erase:
                lines[row] = lines[row][:column]
                if erase == "J":
                    del lines[row + 1:]
            elif char == "\r":
                column = 0
            elif char == "\n":
                row, column = row + 1, 0
                lines += [""] * (row - len(lines) + 1)
            elif not colour:
                lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1:]
                column += 1
                assert column < self.columns, f"wider than the terminal: {lines[row]!r}"
        return lines


def state(n=450, total=1000, **changes):
    """Return what a bar shows."""
    return concurry._State(n, total, 0, 12.0, 37.5, "Work", "it", None, None, True, "running", "")._replace(**changes)


class BarTestCase(CleanTestCase):
    def setUp(self):
        patch = unittest.mock.patch.object(concurry, "_REDRAW", 0)     # each update is shown
        patch.start()
        self.addCleanup(patch.stop)
        settings = unittest.mock.patch.dict(os.environ, {"TERM": "xterm"})
        settings.start()
        self.addCleanup(settings.stop)
        os.environ.pop("NO_COLOR", None)

    def stream(self, columns=None, rows=24):
        """Return what standard error is from now on, in this test."""
        stream = Stream(columns, rows)
        patch = unittest.mock.patch.object(sys, "stderr", stream)
        patch.start()
        self.addCleanup(stream.close)
        self.addCleanup(patch.stop)
        return stream


class ProgressLineTests(CleanTestCase):
    def line(self, columns, **changes):
        line = concurry._line_of(state(**changes), columns)
        self.assertLessEqual(concurry._columns(line), columns, line)
        return line

    def test_the_less_room_the_less_it_says(self):
        self.assertEqual(self.line(70), "Work:  45%|██████████▊             | 450/1000 [00:12<00:14, 37.5 it/s]")
        self.assertEqual(self.line(47), "Work:  45% 450/1000 [00:12<00:14, 37.5 it/s]")
        self.assertEqual(self.line(34), "Work:  45% 450/1000 [00:12<00:14]")
        self.assertEqual(self.line(27), "Work:  45% 450/1000 00:14")
        self.assertEqual(self.line(20), "Work:  45% 450/1000")
        self.assertEqual(self.line(12), "Work:  45%")
        self.assertEqual(self.line(7), "Wo…:  …")
        for columns in range(200):
            self.line(columns, desc="a text with 宽 letters\nand lines" * 3, text="说" * 50, failed=7)
            self.line(columns, total=None, desc="x" * columns)

    def test_what_it_says(self):
        for expected, changes in (
                ("Work: 450 files [00:12, 37.5 files/s]", {"total": None, "unit": "files"}),
                ("450/1000 [00:12, 37.5 it/s, 3 failed, lost]", {"state": "failure", "failed": 3, "text": "lost"}),
                ("[1:02:03<3:03:20, 20 s/it]", {"elapsed": 3723.9, "rate": 0.05}),
                ("45.5/1000.5 [00:12, 12.3k it/s]", {"n": 45.5, "total": 1000.5, "rate": 12345, "state": "stopped"}),
                ("100%|", {"n": 1000}), (" 99%|", {"n": 999}), ("100%|", {"n": 2000}), ("  0%|", {"n": -5}),
                ("100%|", {"n": 0, "total": 0}), ("[00:12, 0.0 it/s]", {"rate": 0.0})):
            self.assertIn(expected, self.line(100, **changes))
        self.assertEqual(concurry._line_of(state(ncols=20), 100), "Work:  45% 450/1000")
        self.assertIn("45%|####      |", concurry._line_of(state(), 56, " #"))

    def test_the_bar_fills(self):
        for n in range(0, 1001, 7):
            bar = concurry._bar_of(state(n), 12, concurry._BLOCKS)
            self.assertEqual(len(bar), 12)
            eighths = bar.count("█") * 8 + sum(" ▏▎▍▌▋▊▉".index(each) for each in bar if each not in "█|")
            self.assertEqual(eighths, n * 80 // 1000)


class ProgressTests(BarTestCase):
    def test_counting(self):
        stream = self.stream()
        bar = ProgressBar(total=3, desc="steps")
        bar.update()
        bar.update(0.5)
        bar.set_n(2)
        bar.set_total(4)
        bar.set_description("more steps")
        bar.set_unit("m")
        self.assertEqual((bar.n, bar.total, bar.desc, len(bar), bool(bar)), (2, 4, "more steps", 4, True))
        self.assertRegex(repr(bar), "'more steps': 2 of 4, running")
        bar.success("enough")
        bar.failure("too late")
        bar.update()
        self.assertEqual(bar.n, 3)
        self.assertRegex(stream.text, r"^more steps:  50% 2/4 \[00:00, .* m/s, enough\] success\n$")

    def test_bad_input(self):
        self.stream()
        for wrong, error in (({"total": -1}, ValueError), ({"total": "x"}, ValueError), ({"ncols": 0}, ValueError),
                             ({"color": "gren"}, ValueError), ({"color": "#12345g"}, ValueError),
                             ({"style": "loud"}, ValueError), ({"disable": "perhaps"}, ValueError),
                             ({"total": math.inf}, ValueError), ({"colour": "red"}, TypeError)):
            with self.assertRaisesRegex(error, next(iter(wrong))):
                ProgressBar(**wrong)
        self.assertRaisesRegex(TypeError, "total=", ProgressBar, 10)
        self.assertRaisesRegex(TypeError, "without an iterable", iter, ProgressBar(total=1, disable=True))
        self.assertRaisesRegex(TypeError, "not known", len, ProgressBar(disable=True))
        bar = ProgressBar(disable=True)
        self.assertRaises(TypeError, bar.update, "1")
        self.assertRaisesRegex(ValueError, "n='x'", bar.set_n, "x")
        self.assertEqual(bar.n, 0)
        self.assertRaisesRegex(pickle.PicklingError, "make one there", pickle.dumps, bar)

    def test_how_it_ends(self):
        def left_early():
            for x in ProgressBar(range(3)):
                if x == 1:
                    break

        def broken():
            yield 1
            raise KeyError("x")

        def interrupted():
            with ProgressBar(total=3):
                raise KeyboardInterrupt

        def failing():
            with ProgressBar(total=3):
                raise OSError

        def forgotten():
            ProgressBar(total=3).update()

        def short():
            list(ProgressBar(iter([1, 2]), total=3))

        def half():
            with ProgressBar(total=3) as bar:
                bar.update()
        for body, ending in ((left_early, "stopped"), (lambda: list(ProgressBar(broken())), "KeyError] failure"),
                             (interrupted, "stopped"), (failing, "OSError] failure"), (forgotten, "stopped"),
                             (short, "success"), (half, "stopped"), (lambda: list(ProgressBar("abc")), "success")):
            stream = self.stream()
            with contextlib.suppress(KeyError, OSError, KeyboardInterrupt):
                body()
            gc.collect()
            self.assertRegex(stream.text, re.escape(ending) + r"\n$")
            self.assertEqual(stream.text.count("\n"), 1)

    def test_disabled_there_is_nothing(self):
        with unittest.mock.patch.object(concurry, "_screen_for", side_effect=AssertionError):
            for _ in ProgressBar(range(3), disable=True):
                pass
            with ProgressBar(total=3, disable=True) as bar:
                bar.update(3)
            with Executor("sync") as pool:
                for off in (None, False):
                    self.assertEqual(list(pool.map(abs, [-1], progress=off)), [1])
                    concurry.wait([pool.submit(abs, -1)], progress=off)
                    self.assertEqual(concurry.gather(pool.submit(abs, -1), progress=off), [1])
                    self.assertEqual(list(pool.map(abs, [-1], progress={"disable": True})), [1])
        self.assertEqual(bar.n, 3)

    def test_ten_redraws_a_second(self):
        now = [100.0]
        with unittest.mock.patch.multiple(concurry, _REDRAW=0.1, time=types.SimpleNamespace(monotonic=lambda: now[0])):
            stream = self.stream(80)
            bar, other = ProgressBar(total=1000), ProgressBar(total=1000)
            for _ in range(1000):
                now[0] += 0.001
                bar.update()
                other.update()
                bar.set_description("x")
            drawn = len(stream.pieces)
            bar.close()
            other.close()
        self.assertIn(drawn, (10, 11))
        self.assertEqual(len(stream.pieces), drawn + 2)         # the ends are always shown

    def test_lines_where_nothing_can_be_redrawn(self):
        now = [100.0]
        with unittest.mock.patch.object(concurry, "time", types.SimpleNamespace(monotonic=lambda: now[0])):
            stream = self.stream()
            bar = ProgressBar(total=10_000, desc="night")
            for _ in range(10_000):
                now[0] += 1
                bar.update()
            bar.success()
        lines = stream.text.splitlines()
        self.assertLess(len(lines), 70)
        self.assertEqual([re.search(r" (\d+)/", line)[1] for line in lines[:11]], [str(n) for n in range(10, 120, 10)])
        self.assertEqual(lines[-1], "night: 100% 10000/10000 [2:46:40, 1.0 it/s] success")
        self.assertTrue(all(piece.endswith("\n") for piece in stream.pieces))       # whole lines, for others write too

    def test_what_cannot_be_shown_is_no_matter(self):
        class Broken(Stream):
            def write(self, text):
                raise OSError("no space left on device")
        with unittest.mock.patch.object(sys, "stderr", Broken()):
            self.assertEqual(list(ProgressBar(range(3))), [0, 1, 2])
        with unittest.mock.patch.object(sys, "stderr", None):
            self.assertEqual(list(ProgressBar(range(3))), [0, 1, 2])
        narrow = self.stream()
        narrow.encoding = "ascii"
        list(ProgressBar(range(3), desc="é"))
        self.assertRegex(narrow.text, r"^\?: 100%")

    def test_a_signal_handler_in_the_middle(self):
        stream = self.stream(80)
        bar = ProgressBar(total=9)
        write = stream.write

        def interrupted(text):
            stream.write = write
            bar.update()
            with ProgressBar(total=1, desc="inner") as inner:
                inner.update()
            write(text)
        stream.write = interrupted
        bar.update()
        bar.update()
        bar.close()
        self.assertEqual(stream.screen()[0][:12], "inner: 100%|")
        self.assertIn("3/9", stream.screen()[1])

    def test_ended_while_it_is_shown(self):
        """By another thread, or a signal handler: it is shown once more, as ended, and no line of it is left."""
        for is_thread in (False, True):
            stream = self.stream(80)
            bar = ProgressBar(total=9, desc="x")
            show = bar._screen.show

            def ends_meanwhile(key, shown, bar=bar, show=show, is_thread=is_thread):
                bar._screen.show = show
                in_thread(bar.success).result(SAFETY) if is_thread else bar.success()
                show(key, shown)
            bar._screen.show = ends_meanwhile
            bar.update()
            self.assertRegex(stream.screen()[0], "^x: .*1/9")
            self.assertEqual((len(stream.screen()), concurry._screens[id(stream)].bars if id(stream) in concurry._screens else {}),
                             (2, {}))

    def test_a_long_text(self):
        stream = self.stream(80)
        ProgressBar(total=1, desc="宽" * 10**6).success("说" * 10**6)
        self.assertLess(len(stream.text), 1000)

    def test_from_many_threads(self):
        stream = self.stream(80)
        bar = ProgressBar(total=8000)
        threads = [in_thread(lambda: [bar.update() for _ in range(1000)]) for _ in range(8)]
        for thread in threads:
            thread.result(SAFETY)
        self.assertEqual(bar.n, 8000)
        bar.close()
        self.assertEqual(len(stream.screen()), 2)
        self.assertIn("8000/8000", stream.screen()[0])


class ProgressTerminalTests(BarTestCase):
    def test_a_stream_that_knows_no_encoding(self):
        stream = types.SimpleNamespace(write=len, flush=lambda: None, isatty=lambda: True)
        with unittest.mock.patch.object(sys, "stderr", stream):
            self.assertEqual(list(ProgressBar(range(3))), [0, 1, 2])

    def test_a_line_is_redrawn(self):
        stream = self.stream(80)
        bar = ProgressBar(total=4, desc="crunch", unit="files")
        for n in range(1, 5):
            bar.update()
            self.assertRegex(stream.screen()[0], rf"^crunch: +{25 * n}%\|.*\| {n}/4 \[00:00(<00:00)?, .*files/s\]$")
            self.assertEqual(len(stream.screen()), 1)
        bar.success("done")
        self.assertRegex(stream.screen()[0], r"^crunch: 100%\|█+\| 4/4 \[00:00, .*, done\]$")
        self.assertEqual(stream.screen()[1:], [""])

    def test_narrow(self):
        stream = self.stream(30)
        with ProgressBar(total=4, desc="a description that is much too long") as bar:
            bar.update()
            self.assertRegex(stream.screen()[0], r"^a description…:  25% 1/4")
        self.assertEqual(len(stream.screen()), 2)

    def test_several_and_nested(self):
        stream = self.stream(80, rows=5)
        outer = ProgressBar(total=2, desc="outer")
        for n in range(2):
            for _ in ProgressBar(range(2), desc=f"inner {n}", leave=False):
                self.assertEqual([line[:7] for line in stream.screen()], ["outer: ", f"inner {n}"])
            self.assertEqual([line[:5] for line in stream.screen()], ["outer"])
            outer.update()
        many = [ProgressBar(total=1, desc=f"bar {n}") for n in range(9)]        # more than there are lines
        self.assertEqual([line[:5] for line in stream.screen()], ["outer", "bar 0", "bar 1", "bar 2"])
        for bar in many:
            bar.success()
        outer.success()
        self.assertEqual([line[:5] for line in stream.screen()], [*(f"bar {n}" for n in range(9)), "outer", ""])

    def test_colours(self):
        def colours(**options):
            stream = self.stream(80)
            bars = [ProgressBar(total=1, **options) for _ in range(3)]
            for bar, end in zip(bars, ("success", "failure", "stop")):
                getattr(bar, end)()
            return list(dict.fromkeys(re.findall(r"\x1b\[([\d;]{2,})m", stream.text)))
        self.assertEqual(colours(), ["32", "31", "33"])
        self.assertEqual(colours(color="cyan"), ["36", "32", "31", "33"])
        self.assertEqual(colours(color="#ff8000")[0], "38;2;255;128;0")
        with unittest.mock.patch.dict(os.environ, NO_COLOR="1"):
            self.assertEqual(colours(color="cyan"), [])

    def test_a_dumb_terminal(self):
        with unittest.mock.patch.dict(os.environ, TERM="dumb"):
            stream = self.stream(80)
            list(ProgressBar(range(3)))
        self.assertNotIn("\x1b", stream.text)

    def test_printing_beside_it(self):
        stream = self.stream(80)
        bar = ProgressBar(total=2)
        bar._screen.aside(lambda: stream.write("a result\n"))
        self.assertEqual([line[:8] for line in stream.screen()], ["a result", "  0%|   "])
        bar.close()


class NotebookTests(CleanTestCase):
    def test_in_a_notebook(self):
        try:
            import ipykernel  # noqa: F401
            import nbclient  # noqa: F401
        except ImportError as error:
            self.skipTest(f"needs {error.name}")
        code = textwrap.dedent("""
            import sys, threading
            sys.path.insert(0, {here!r})
            import concurry
            bar = concurry.ProgressBar(total=3, desc="<cells>", color="cyan")
            bar.update(3)
            bar.success("all")
            with concurry.Executor("thread", 2) as pool:
                assert list(pool.map(abs, range(5), progress=dict(desc="calls"))) == [0, 1, 2, 3, 4]
            def inner(n):
                for _ in concurry.ProgressBar(range(n), desc="in a process"):
                    pass
            with concurry.Executor("process", 1) as pool:
                pool.submit(inner, 4).result()
            for _ in concurry.ProgressBar(range(2), leave=False):
                pass
        """).format(here=os.path.dirname(os.path.abspath(concurry.__file__)))
        result = run_script("""
            import json, sys, nbclient, nbformat
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(sys.argv[1])])
            nbclient.NotebookClient(notebook, timeout=30, kernel_name="python3").execute()
            print(json.dumps(notebook.cells[0].outputs))
        """, code)
        outputs = json.loads(result.stdout)
        shown = [output["data"]["text/html"] for output in outputs if output["output_type"] == "display_data"]
        self.assertEqual([output for output in outputs if output["output_type"] != "display_data"], [])
        self.assertRegex(shown[0], r'&lt;cells&gt; <progress value="3" max="3" style=".*accent-color: green"></progress>'
                                   r'.*100% 3/3 \[00:00, .*, all\]')
        self.assertRegex(shown[1], r'calls <progress value="5" max="5".*100% 5/5')
        self.assertRegex(shown[2], r'in a process <progress value="4" max="4".*100% 4/4')
        self.assertEqual(shown[3:], [""])


# === Waiting ===

class WaitTests(CleanTestCase):
    def test_wait_for_all_or_the_first_or_the_first_that_raised(self):
        done, failed, pending = done_future(), done_future(error=KeyError()), BaseFuture()
        self.assertEqual(concurry.wait([done, failed]), ({done, failed}, set()))
        found = concurry.wait([done, pending], return_when=FIRST_COMPLETED)
        self.assertEqual((found.done, found.not_done), ({done}, {pending}))
        self.assertEqual(concurry.wait(iter([pending, failed]), return_when="first_exception"), ({failed}, {pending}))
        self.assertEqual(concurry.wait([done, pending], 0, FIRST_EXCEPTION), ({done}, {pending}))
        self.assertEqual(concurry.wait([]), (set(), set()))
        self.assertRaisesRegex(ValueError, "ALL_COMPLETED", concurry.wait, [done], return_when="any")

    def test_wait_wakes_when_it_should(self):
        for when, settle, count in ((FIRST_COMPLETED, lambda f: f.set_result(1), 1),
                                    (FIRST_EXCEPTION, lambda f: f.set_exception(KeyError()), 1),
                                    (ALL_COMPLETED, lambda f: f.cancel(), 3)):
            futures = [BaseFuture(), concurrent.futures.Future(), BaseFuture()]
            ready = threading.Event()
            waiting = in_thread(lambda: (ready.set(), concurry.wait(futures, SAFETY, when))[1])
            ready.wait(SAFETY)
            for future in futures[:count]:
                settle(future)
                if count > 1 and type(future) is not BaseFuture:
                    future.set_running_or_notify_cancel()
            self.assertEqual(waiting.result(SAFETY).done, set(futures[:count]))
            for future in futures:
                future.cancel()

    def test_futures_of_every_kind(self):
        with loop_in_thread() as loop:
            foreign, theirs, ours = loop.create_future(), concurrent.futures.Future(), BaseFuture()
            mixed = [foreign, theirs, ours]
            waiting = [in_thread(gather, mixed), in_thread(lambda: list(as_completed(mixed, SAFETY))),
                       in_thread(concurry.wait, mixed, SAFETY)]
            loop.call_soon_threadsafe(foreign.set_result, 1)
            theirs.set_result(2)
            ours.set_result(3)
            self.assertEqual(waiting[0].result(SAFETY), [1, 2, 3])
            self.assertEqual(set(waiting[1].result(SAFETY)), set(mixed))
            self.assertEqual(waiting[2].result(SAFETY).done, set(mixed))

    def test_waiting_in_the_loop_that_would_settle_it_is_refused(self):
        async def main():
            future = asyncio.get_running_loop().create_future()
            for stall in (concurry.wait, gather, as_completed):
                with self.assertRaisesRegex(RuntimeError, "stall"):
                    stall([future])
            with self.assertRaisesRegex(RuntimeError, "stall"):
                gather([[future]], recurse=True)
            future.set_result(1)
            self.assertEqual(gather([future]), [1])
        asyncio.run(main())

    def test_what_is_no_future(self):
        for wait in (concurry.wait, as_completed):
            self.assertRaisesRegex(TypeError, "int", wait, [3])
        with self.assertRaisesRegex(TypeError, "int"):
            asyncio.run(async_wait([3]))

    def test_as_completed_yields_in_the_order_of_ending(self):
        futures = [BaseFuture() for _ in range(3)]
        futures[1].set_result(1)
        finished = as_completed(futures + futures, timeout=SAFETY)
        self.assertIs(next(finished), futures[1])
        futures[2].cancel()
        self.assertIs(next(finished), futures[2])
        futures[0].set_exception(KeyError())
        self.assertEqual(list(finished), [futures[0]])

    def test_gather_keeps_order_and_shape(self):
        a, b = done_future(result="a"), done_future(concurrent.futures.Future, "b")
        self.assertEqual(gather(a, b), ["a", "b"])
        self.assertEqual(gather([b, a, b]), ["b", "a", "b"])
        self.assertEqual(gather((a, 3, None, "text")), ["a", 3, None, "text"])
        self.assertEqual(gather(f for f in (a, b)), ["a", "b"])
        self.assertEqual(gather({"x": a, "y": b, "z": 1}), {"x": "a", "y": "b", "z": 1})
        self.assertEqual((gather(a), gather([]), gather(), gather({})), (["a"], [], [], {}))
        self.assertEqual(gather([a, [b]])[1], [b])

    def test_gather_looks_into_what_is_nested(self):
        Point = collections.namedtuple("Point", "x y")
        a, b = done_future(result="a"), done_future(result="b")
        self.assertEqual(gather([a, {"k": (b, [a])}, Point(b, 1)], recurse=True),
                         ["a", {"k": ("b", ["a"])}, Point("b", 1)])
        self.assertEqual(gather({"x": [a], "y": {"z": b}}, recurse=True), {"x": ["a"], "y": {"z": "b"}})

    def test_gather_raises_the_first_failure_as_soon_as_it_happens(self):
        pending, error = [BaseFuture() for _ in range(3)], KeyError(1)
        waiting = in_thread(gather, pending)
        pending[1].set_exception(error)
        self.assertIs(waiting.exception(SAFETY), error)
        self.assertIs(in_thread(gather, pending[0], done_future(error=error)).exception(SAFETY), error)
        pending[0].cancel()
        self.assertIsInstance(in_thread(gather, [pending[2], pending[0]]).exception(SAFETY),
                              concurrent.futures.CancelledError)

    def test_gather_returns_exceptions(self):
        error = KeyError(1)
        found = gather([done_future(error=error), done_future(cancel=True), done_future(result=1)], return_exceptions=True)
        self.assertIs(found[0], error)
        self.assertIsInstance(found[1], concurrent.futures.CancelledError)
        self.assertEqual(found[2], 1)

    def test_gather_iterates_as_they_finish(self):
        futures = {"a": BaseFuture(), "b": BaseFuture(), "c": 3}
        pairs = gather(futures, iter=True)
        self.assertEqual(next(pairs), ("c", 3))
        futures["b"].set_result(2)
        self.assertEqual(next(pairs), ("b", 2))
        futures["a"].set_exception(KeyError())
        self.assertRaises(KeyError, next, pairs)
        late = BaseFuture()
        pairs = gather(late, done_future(error=KeyError(5)), iter=True, return_exceptions=True)
        self.assertEqual(repr(next(pairs)), "(1, KeyError(5))")
        late.set_result("x")
        self.assertEqual(list(pairs), [(0, "x")])

    def test_gather_of_the_same_future_twice_iterates_both_places(self):
        future = done_future(result=1)
        self.assertEqual(list(gather([future, future], iter=True)), [(0, 1), (1, 1)])

    def test_ten_thousand_futures_settled_by_many_threads(self):
        futures = [BaseFuture() for _ in range(10_000)]
        waiting = in_thread(gather, futures)
        for part in range(4):
            in_thread(lambda part: [f.set_result(n) for n, f in enumerate(futures) if n % 4 == part], part)
        self.assertEqual(waiting.result(SAFETY), list(range(10_000)))


class TrackedTests(BarTestCase):
    """`progress=` of wait and gather, over futures that are settled by hand."""

    def told(self):
        calls = []
        return calls, lambda done, total, elapsed: calls.append((done, total, elapsed >= 0))

    def test_a_function_is_told(self):
        futures = [BaseFuture(), concurrent.futures.Future(), BaseFuture(), done_future()]
        calls, progress = self.told()
        waiting = in_thread(lambda: concurry.wait(futures, SAFETY, progress=progress))
        until(lambda: calls)
        for n, future in enumerate(futures[:3], 2):
            future.set_result(n)
            until(lambda n=n: calls[-1][0] == n)
        waiting.result(SAFETY)
        self.assertEqual(list(dict.fromkeys(calls)), [(n, 4, True) for n in range(1, 5)])

    def test_all_ways_to_wait(self):
        async def awaited(futures, **options):
            return await concurry.async_wait(futures, progress=options["progress"])

        async def gathered(futures, **options):
            return await concurry.async_gather(futures, **options)

        async def one_by_one(futures, **options):
            return [pair async for pair in concurry.async_gather(futures, iter=True, **options)]
        ways = {
            "wait": concurry.wait, "gather": concurry.gather,
            "gather, iter": lambda futures, **options: list(concurry.gather(futures, iter=True, **options)),
            "recurse": lambda futures, **options: concurry.gather({"x": [futures]}, recurse=True, **options),
            "async_wait": lambda *args, **options: asyncio.run(awaited(*args, **options)),
            "async_gather": lambda *args, **options: asyncio.run(gathered(*args, **options)),
            "async iter": lambda *args, **options: asyncio.run(one_by_one(*args, **options))}
        for name, way in ways.items():
            with self.subTest(name):
                futures = [BaseFuture() for _ in range(3)]
                calls, progress = self.told()
                waiting = in_thread(lambda way=way, futures=futures, progress=progress: way(futures, progress=progress))
                for future in futures:
                    future.set_result(None)
                waiting.result(SAFETY)
                self.assertEqual(calls[-1], (3, 3, True))
                for shown in (True, {}):
                    stream = self.stream()
                    way(futures, progress=shown)
                    self.assertRegex(stream.text, r"^100% 3/3 .* success\n$", shown)
                stream = self.stream()
                way(futures, progress={"desc": "mine", "total": 6, "unit": "calls"})
                self.assertRegex(stream.text, r"^mine:  50% 3/6 .*calls/s\] stopped\n$")

    def test_failures_and_early_ends(self):
        good, bad, pending = done_future(), done_future(error=KeyError("x")), BaseFuture()
        for body, ending in (
                (lambda: concurry.wait([good, bad], progress=True), r"100% 2/2 .*, 1 failed\] failure"),
                (lambda: concurry.gather([good, bad], progress=True), r"1 failed, KeyError\] failure"),
                (lambda: concurry.gather([good, bad], return_exceptions=True, progress=True), r"1 failed\] failure"),
                (lambda: concurry.wait([good, pending], 0, progress=True), r"50% 1/2 .*\] stopped"),
                (lambda: concurry.gather([good, pending], timeout=0, progress=True), r"50% 1/2 .*TimeoutError\] failure"),
                (lambda: next(concurry.gather([good, pending], iter=True, progress=True)), r"50% 1/2 .*\] stopped")):
            stream = self.stream()
            with contextlib.suppress(KeyError, TimeoutError):
                body()
            gc.collect()
            self.assertRegex(stream.text, ending + r"\n$")
        self.assertEqual(pending.__dict__.get("_wakers", []), [])       # nobody is left in it

    def test_a_bar_of_ones_own(self):
        stream = self.stream()
        bar = ProgressBar(desc="both")
        concurry.wait([done_future()], progress=bar)
        concurry.gather([done_future(), done_future()], progress=bar)
        self.assertEqual((bar.n, bar.total, stream.text), (3, 1, ""))
        bar.success()
        self.assertIn("both: 100% 3/1", stream.text)

    def test_what_the_function_raises_is_no_matter(self):
        for error in (KeyError("mine"), SystemExit("mine")):
            def broken(*args, error=error):
                raise error
            with self.assertLogs("concurry", "DEBUG") as logs:
                concurry.wait([done_future(), done_future()], progress=broken)
            self.assertIn("mine", logs.output[0])

    def test_bad_input(self):
        for wrong, error, text in ((3, TypeError, "progress must be"), ({"colour": 1}, TypeError, "'color'"),
                                   ({"total": -1}, ValueError, "total=-1")):
            for call in (lambda **o: concurry.wait([], **o), lambda **o: concurry.gather([], **o)):
                self.assertRaisesRegex(error, text, call, progress=wrong)


class AsyncWaitTests(CleanTestCase):
    def test_gather_and_wait_take_coroutines_and_everything_else(self):
        async def main():
            foreign = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(foreign.set_result, 1)
            self.assertEqual(await async_gather(foreign, square_async(3), done_future(result=2), 5), [1, 9, 2, 5])
            self.assertEqual(await async_gather({"a": square_async(2), "b": [foreign]}, recurse=True), {"a": 4, "b": [1]})
            done, not_done = await async_wait([square_async(4), foreign], timeout=SAFETY)
            self.assertEqual(({f.result() for f in done}, not_done), ({16, 1}, set()))
        asyncio.run(main())

    def test_the_loop_goes_on_meanwhile(self):
        async def main():
            future = BaseFuture()

            async def settle():
                future.set_result(7)
            ours = asyncio.ensure_future(async_gather([future]))
            await asyncio.sleep(0)
            await settle()
            self.assertEqual(await ours, [7])
            pending = BaseFuture()
            waiting = asyncio.ensure_future(async_wait([pending, future], return_when=ALL_COMPLETED))
            await asyncio.sleep(0)
            threading.Thread(target=pending.cancel).start()
            self.assertEqual((await waiting).done, {pending, future})
        asyncio.run(main())

    def test_errors_come_at_once(self):
        async def main():
            pending, error = BaseFuture(), KeyError(1)
            with self.assertRaises(KeyError):
                await async_gather(pending, done_future(error=error))

            async def fail():
                raise error
            self.assertEqual(await async_gather(fail(), return_exceptions=True), [error])
            self.assertEqual(await async_wait([pending], timeout=0), (set(), {pending}))
            done, not_done = await async_wait([pending, done_future(error=error)], return_when=FIRST_EXCEPTION)
            self.assertEqual((len(done), not_done), (1, {pending}))
        asyncio.run(main())

    def test_iterating(self):
        async def main():
            slow = BaseFuture()
            seen = []
            async for key, value in async_gather({"slow": slow, "quick": square_async(2)}, iter=True, timeout=SAFETY):
                seen.append((key, value))
                slow.done() or slow.set_result(0)
            return seen
        self.assertEqual(asyncio.run(main()), [("quick", 4), ("slow", 0)])

    def test_cancelling_the_wait_leaves_the_futures_alone(self):
        async def main():
            future = BaseFuture()
            waiting = asyncio.ensure_future(async_wait([future]))
            await asyncio.sleep(0)
            waiting.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await waiting
            self.assertFalse(future.done())
        asyncio.run(main())

    def test_coroutines_end_with_the_gather_that_made_tasks_of_them(self):
        """When it is cancelled, or its iterator closed; the futures that it was given go on."""
        async def cancelled(begun, things):
            waiting = asyncio.ensure_future(async_gather(things))
            await begun.wait()
            waiting.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await waiting

        async def closed(begun, things):
            pairs = async_gather(things, iter=True)
            self.assertEqual(await pairs.__anext__(), (0, True))
            await pairs.aclose()

        async def main(end):
            begun, tasks, ours, theirs = asyncio.Event(), [], BaseFuture(), asyncio.Future()

            async def stay():
                tasks.append(asyncio.current_task())
                begun.set()
                await asyncio.Event().wait()
            await end(begun, [begun.wait(), stay(), ours, theirs])
            self.assertEqual(tasks[0].cancelling(), 1)
            await asyncio.wait(tasks)
            self.assertFalse(ours.done() or theirs.done())
        for end in (cancelled, closed):
            with self.subTest(end.__name__):
                asyncio.run(main(end))


# === Futures inside containers ===

Point = collections.namedtuple("Point", "x y")


class MyList(list):
    pass


class Shapes(Worker):
    def echo(self, *args, **kwargs):
        return args[0] if args else kwargs

    def is_shared(self, x):
        return x[0] is x[1]

    def is_cyclic(self, x):
        return x[1] is x and x[0]

    def types_of(self, x):
        return [type(y).__name__ for y in x]

    def depth(self, x):
        n = 0
        while isinstance(x, list):
            n, x = n + 1, x[0]
        return n, x

    def inner_of_tuple(self, x):
        return x[1][0] is x and x[0]


class UnwrapTests:
    """Futures among the arguments become their results."""

    def setUp(self):
        self.worker = self.make(Shapes)
        self.a, self.b = done_future(result="a"), done_future(concurrent.futures.Future, "b")

    def test_in_containers_of_every_kind(self):
        a, b = self.a, self.b
        for given, seen in ((a, "a"), ([a, 1, b], ["a", 1, "b"]), ((a, (b,)), ("a", ("b",))), ({a}, {"a"}),
                            (frozenset([b]), frozenset("b")), ({"x": a, "y": [b]}, {"x": "a", "y": ["b"]}),
                            (Point(a, [b]), Point("a", ["b"])), ([[{"k": (a,)}]], [[{"k": ("a",)}]])):
            result = self.worker.echo(given).result(SAFETY)
            self.assertEqual((result, type(result)), (seen, type(seen)))
        self.assertEqual(self.worker.echo(x=a, y=[b]).result(SAFETY), {"x": "a", "y": ["b"]})
        self.assertEqual(self.worker.echo([self.worker.echo(1), self.worker.echo(2)]).result(SAFETY), [1, 2])

    def test_shared_parts_stay_shared_and_cycles_closed(self):
        inner = [self.a]
        self.assertIs(self.worker.is_shared([inner, inner]).result(SAFETY), True)
        cycle = [self.a]
        cycle.append(cycle)
        self.assertEqual(self.worker.is_cyclic(cycle).result(SAFETY), "a")
        inner = [None]
        outer = (self.a, inner)
        inner[0] = outer
        self.assertEqual(self.worker.inner_of_tuple(outer).result(SAFETY), "a")

    def test_the_result_is_not_looked_into(self):
        nested = done_future(result=[1, {"x": 2}])
        self.assertEqual(self.worker.echo([nested]).result(SAFETY), [[1, {"x": 2}]])

    def test_a_failed_dependency_fails_the_call(self):
        error = KeyError("lost")
        for given in (done_future(error=error), [self.a, done_future(concurrent.futures.Future, error=error)]):
            self.assertIs(self.worker.echo(given).exception(SAFETY), error)

    def test_a_cancelled_dependency_cancels_the_call(self):
        for kind in (BaseFuture, concurrent.futures.Future):
            future = self.worker.echo([done_future(kind, cancel=True)])
            self.assertRaises(concurrent.futures.CancelledError, future.result, SAFETY)
            self.assertTrue(future.cancelled())

    def test_the_caller_is_not_blocked_and_others_overtake(self):
        pending = BaseFuture(), BaseFuture()
        waiting = self.waiting(self.worker, self.worker.echo, [*pending])
        self.assertEqual(self.worker.echo("overtakes").result(SAFETY), "overtakes")
        pending[0].set_result(1)
        self.assertFalse(waiting.done())
        pending[1].set_result(2)
        self.assertEqual(waiting.result(SAFETY), [1, 2])

    def test_a_pending_dependency_that_fails(self):
        for settle, check in ((lambda f: f.set_exception(KeyError(1)), lambda c: repr(c.exception(SAFETY)) == "KeyError(1)"),
                              (lambda f: f.cancel(), lambda c: concurrent.futures.wait([c], SAFETY) and c.cancelled())):
            pending = BaseFuture()
            waiting = self.waiting(self.worker, self.worker.echo, {"x": (pending,)})
            settle(pending)
            self.assertTrue(check(waiting))

    def test_a_call_that_waits_can_be_cancelled(self):
        pending = BaseFuture()
        waiting = self.waiting(self.worker, self.worker.echo, pending)
        self.assertTrue(waiting.cancel() and waiting.cancelled())
        pending.set_result(1)
        self.assertEqual(self.worker.echo(2).result(SAFETY), 2)

    def test_an_asyncio_future(self):
        with loop_in_thread() as loop:
            theirs = loop.create_future()
            waiting = self.waiting(self.worker, self.worker.echo, [theirs, self.a])
            loop.call_soon_threadsafe(theirs.set_result, 5)
            self.assertEqual(waiting.result(SAFETY), [5, "a"])

    def test_chains(self):
        future = self.worker.echo(0)
        for _ in range(50):
            future = self.worker.echo([future])
        self.assertEqual(self.worker.depth(future).result(SAFETY), (50, 0))

    def test_a_long_chain_that_begins_with_a_pending_one(self):
        first = future = BaseFuture()
        for _ in range(20 if self.mode == "sync" else 500):
            future = self.waiting(self.worker, self.worker.echo, future)
        first.set_result("end")
        self.assertEqual(future.result(SAFETY), "end")


class UnwrapHereTests:
    """What can be seen only where the worker shares our memory."""

    setUp = UnwrapTests.setUp

    def test_without_a_future_the_same_object_is_passed_on(self):
        for given in ([1, [2]], {"x": (1, {2})}, MyList([self.a]), collections.OrderedDict(x=self.a), {self.a: 1}):
            self.assertIs(self.worker.echo(given).result(SAFETY), given)
        inner = [1]
        result = self.worker.echo([inner, self.a]).result(SAFETY)
        self.assertIs(result[0], inner)

    def test_any_depth(self):
        deep = self.a
        for _ in range(20_000):
            deep = [deep]
        self.assertEqual(self.worker.depth(deep).result(SAFETY), (20_000, "a"))

    def test_unwrapping_turned_off(self):
        worker = self.make(Shapes, unwrap_futures=False)
        pending = BaseFuture()
        self.assertIs(worker.echo(pending).result(SAFETY), pending)
        self.assertEqual(worker.types_of([self.b]).result(SAFETY), ["Future"])


over_modes(globals(), [UnwrapTests])
over_modes(globals(), [UnwrapHereTests], ["sync", "thread", "asyncio"])


# === Retries ===

class Throttled(Exception):
    def __init__(self, retry_after=None):
        super().__init__("too many")
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    n: int


class FixedDice:
    """Chance that always throws the share of the span that it is told to."""

    def __init__(self, share=1.0):
        self.share = share

    def uniform(self, low, high):
        return low + (high - low) * self.share


def retries_of(**options):
    return concurry._Retries(**{**{name: getattr(global_config.defaults, name) for name in concurry._RETRY_OPTIONS},
                                **{name: concurry._parse(name, value) for name, value in options.items()}})


class RetryLoopTests(CleanTestCase):
    """The loop alone: nothing waits, nothing runs."""

    def setUp(self):
        patch = unittest.mock.patch.object(concurry, "_dice", FixedDice)
        patch.start()
        self.addCleanup(patch.stop)
        self.now = 100.0

    def play(self, retries, outcomes, cut_at=None, context=None):
        """Let a call come to these outcomes; return (its end, the waits, attempts made)."""
        waits, outcomes, attempts = [], iter(outcomes), 0
        context = context or contextvars.copy_context()
        steps = retries.attempts("fetch", "Api", (1, 2), {"k": 3}, lambda: self.now)
        try:
            step = context.run(next, steps)
            while True:
                if step is concurry._RUN:
                    attempts += 1
                    self.now += 1
                    outcome = next(outcomes)
                    kind = "error" if isinstance(outcome, BaseException) else "result"
                    step = context.run(steps.send, (kind, outcome))
                else:
                    waits.append(step)
                    step = context.run(steps.send, len(waits) == cut_at)
        except StopIteration as end:
            return end.value, waits, attempts

    def errors(self, count, kind=KeyError):
        return [kind(n) for n in range(count)]

    def waits(self, count, **options):
        return self.play(retries_of(num_retries=count, **options), self.errors(count + 1))[1]

    def test_the_waits_to_the_letter(self):
        for algorithm, expected in (("exponential", [0.5, 1, 2, 4, 8, 16]), ("linear", [0.5, 1, 1.5, 2, 2.5, 3]),
                                    ("fibonacci", [0.5, 0.5, 1, 1.5, 2.5, 4]), ("fixed", [0.5] * 6)):
            self.assertEqual(self.waits(6, retry_algorithm=algorithm, retry_wait=0.5), expected, algorithm)
            for attempt in (40, 1500, 10 ** 6):
                self.assertEqual(retries_of(retry_algorithm=algorithm, retry_wait=1e300).delay(attempt), 60)
        self.assertEqual(self.waits(4, retry_wait=1, retry_max_wait=3), [1, 2, 3, 3])

    def test_jitter(self):
        concurry._dice = lambda: FixedDice(0.25)
        for jitter, expected in ((0, [1, 2]), (1, [0.25, 0.5]), (0.5, [0.625, 1.25])):
            self.assertEqual(self.waits(2, retry_jitter=jitter), expected)

    def test_full_jitter_is_uniform(self):
        concurry._dice = lambda: dice
        for seed in range(20):
            dice = random.Random(seed)
            thrown = sorted(retries_of(retry_wait=4).delay(2) / 8 for _ in range(2000))
            # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed by chance once in a thousand.
            self.assertLess(max(abs(x - n / 2000) for n, x in enumerate(thrown)), 1.95 / 2000 ** 0.5, seed)
            self.assertTrue(0 <= thrown[0] and thrown[-1] <= 1)

    def test_attempts(self):
        for fails, retries, attempts in ((0, 3, 1), (2, 3, 3), (3, 3, 4), (9, 3, 4), (9, 0, 1)):
            end, waits, made = self.play(retries_of(num_retries=retries), self.errors(fails) + ["fine"] * 9)
            self.assertEqual((made, len(waits)), (attempts, attempts - 1))
            self.assertEqual(end if fails < attempts else end[0], ("result", "fine") if fails < attempts else "error")

    def test_the_last_exception_leads_to_the_earlier_ones(self):
        errors = self.errors(4)
        (_, error), _, _ = self.play(retries_of(num_retries=3), errors)
        chain = [error]
        while chain[-1].__context__ is not None:
            chain.append(chain[-1].__context__)
        self.assertEqual(chain, errors[::-1])
        self.assertRegex(error.__notes__[0], r"4 attempts of fetch\(\) in 4 s")
        same = KeyError("same")
        (_, error), _, _ = self.play(retries_of(num_retries=3), [same] * 4)
        self.assertIs(error, same)
        self.assertIsNone(error.__context__)

    def test_what_is_tried_again(self):
        for retry_on, error, again in (
                (KeyError, KeyError(), True), ([KeyError, OSError], TimeoutError(), True), (KeyError, ValueError(), False),
                ((KeyError, lambda e: "x" in str(e)), ValueError("x"), True), (lambda e: False, ValueError(), False),
                (Exception, KeyboardInterrupt(), False), (Exception, SystemExit(), False),
                (BaseException, GeneratorExit(), False), (BaseException, asyncio.CancelledError(), False),
                (Exception, concurrent.futures.CancelledError(), False), (lambda e: True, KeyboardInterrupt(), False),
                (KeyboardInterrupt, KeyboardInterrupt(), True), ([SystemExit, OSError], SystemExit(), True),
                (asyncio.CancelledError, asyncio.CancelledError(), True), (Exception, pickle.PicklingError(), False)):
            made = self.play(retries_of(num_retries=1, retry_on=retry_on), [error] * 2)[2]
            self.assertEqual(made, 1 + again, (retry_on, error))

    def test_misuse_is_not_tried_again(self):
        limits = LimitSet([RateLimit("t", 5, 60), ResourceLimit("c", 1)])
        stopped = Counter.options(mode="sync").init()
        stopped.stop()

        def forget():
            with limits.acquire({"t": 1}):
                pass

        async def stall():
            with limits.acquire():
                limits.acquire()
        for misuse in (forget, lambda: limits.acquire({"t": 6}), lambda: limits.acquire({"t": -1}),
                       lambda: asyncio.run(stall()), stopped.add):
            with self.assertRaises((RuntimeError, ValueError)) as caught:
                misuse()
            self.assertEqual(self.play(retries_of(num_retries=3), [caught.exception] * 4)[2], 1, caught.exception)
            back = pickle.loads(pickle.dumps(caught.exception))
            self.assertEqual(self.play(retries_of(num_retries=3), [back] * 4)[2], 1)

    def test_what_filters_are_told(self):
        seen = []

        class Filter:
            def __call__(self, exception, attempt, **rest):
                seen.append((exception, attempt, rest))
                return True

            def method(self, e, /, elapsed_time, *, worker_class):
                seen.append((e, elapsed_time, worker_class))
                return True

        def by_name(*, exception, args, kwargs):
            seen.append((exception, args, kwargs))
            return True

        def other_order(attempt, exception):
            seen.append((exception, attempt))
            return True

        def bound(prefix, exception, method_name):
            seen.append((prefix, exception, method_name))
            return True
        error = KeyError("e")
        rest = {"method_name": "fetch", "worker_class": "Api", "args": (1, 2), "kwargs": {"k": 3}}
        for retry_on, expected in (
                (Filter(), [(error, n, {**rest, "elapsed_time": n}) for n in (1, 2)]),
                (Filter().method, [(error, n, "Api") for n in (1, 2)]),
                (by_name, [(error, (1, 2), {"k": 3})] * 2), (other_order, [(error, 1), (error, 2)]),
                (functools.partial(bound, "p"), [("p", error, "fetch")] * 2),
                (functools.partial(bound, prefix="p"), [("p", error, "fetch")] * 2),
                (lambda attempt, /, exception=None: seen.append((attempt, exception)) or True, [(error, None)] * 2),
                (functools.partial(lambda exception, attempt: seen.append(attempt) or True, attempt="mine"), ["mine"] * 2),
                (lambda *args: seen.append(args) or True, [(error,)] * 2)):
            seen.clear()
            self.play(retries_of(num_retries=2, retry_on=retry_on), [error] * 2 + ["fine"])
            self.assertEqual(seen, expected)

    def test_a_filter_that_interrupts(self):
        def interrupt(exception):
            raise KeyboardInterrupt
        self.assertRaises(KeyboardInterrupt, self.play, retries_of(num_retries=1, retry_on=interrupt), [KeyError()])
        worker = Flaky.options(mode="asyncio", num_retries=1, retry_on=interrupt).init()
        self.addCleanup(worker.stop)
        self.assertIsInstance(worker.fail(9).exception(SAFETY), KeyboardInterrupt)
        self.assertEqual(worker.count().result(SAFETY), 1)

    def test_a_filter_that_raises(self):
        error = KeyError("the original")
        with self.assertLogs("concurry", "ERROR"):
            end, _, made = self.play(retries_of(num_retries=2, retry_on=lambda e: 1 / 0), [error] * 3)
        self.assertEqual((end, made), (("error", error), 1))

    def test_validators(self):
        def is_long(result, attempt):
            return len(result) + attempt > 3
        end, waits, made = self.play(retries_of(num_retries=3, retry_until=is_long), ["a", "b", "c"])
        self.assertEqual((end, made, len(waits)), (("result", "c"), 3, 2))
        (kind, error), _, _ = self.play(retries_of(num_retries=2, retry_until=[str.isalpha, lambda result: result.missing]),
                                        ["1", "a", "b"])
        self.assertIs(type(error), RetryValidationError)
        self.assertIsInstance(error, RuntimeError)
        for each in (error, pickle.loads(pickle.dumps(error))):
            self.assertEqual((each.attempts, each.all_results, each.method_name), (3, ["1", "a", "b"], "fetch"))
            self.assertRegex("|".join(each.validation_errors), r"^isalpha says no to '1'\|<lambda> raised AttributeError.*\|")
            self.assertRegex(str(each), r"none of 3 attempts of fetch\(\) had a valid result: ")
        (_, error), _, made = self.play(retries_of(num_retries=0, retry_until=str.isalpha), ["1"])
        self.assertEqual((error.attempts, made), (1, 1))
        end, _, made = self.play(retries_of(num_retries=2, retry_until=str.isalpha), ["1", KeyError("x"), "2"])
        self.assertEqual((end[1].all_results, made), (["1", "2"], 3))
        self.assertIsInstance(end[1].__context__, KeyError)
        self.assertIsNone(end[1].__context__.__context__)       # no earlier RetryValidationError: the last says all
        self.assertEqual(str(RetryValidationError(1, [], [], "x")), "none of 1 attempts of x() had a valid result: ")

    def test_retry_after(self):
        for share, expected in ((0, 100), (1, 110)):
            concurry._dice = lambda share=share: FixedDice(share)
            self.assertEqual(self.play(retries_of(num_retries=1), [Throttled(100), "fine"])[1], [expected])
            self.assertEqual(self.play(retries_of(num_retries=1, retry_on=lambda e: 100.0), [KeyError(), "fine"])[1], [expected])
        for after in (None, "soon", True, -1, float("nan"), float("inf")):
            self.assertEqual(self.play(retries_of(num_retries=1), [Throttled(after), "fine"])[1], [1.0], after)
        for retry_on, expected in ((lambda e: 7, 7.0), (lambda e: 0, 0.0), (lambda e: True, 1.0), (lambda e: -3, 1.0),
                                   ([KeyError, lambda e: 7], 7.0), ([lambda e: True, lambda e: 7], 7.0)):
            with self.subTest(expected=expected):
                concurry._dice = lambda: FixedDice(0 if expected != 1.0 else 1)
                self.assertEqual(self.play(retries_of(num_retries=1, retry_on=retry_on), [KeyError(), "fine"])[1], [expected])

    def test_retry_after_in_all_its_forms(self):
        """Seconds, dates and milliseconds, on the exception, its response or in its own headers, in any case."""
        now = time.time()

        def error_with(**attributes):
            error = KeyError()
            vars(error).update(attributes)
            return error

        class Falsy(types.SimpleNamespace):
            """As a response of requests is, for a status of 400 and more."""
            def __bool__(self):
                return False

        def date_in(seconds, form="%a, %d %b %Y %H:%M:%S GMT"):
            return time.strftime(form, time.gmtime(now + seconds))
        seconds = datetime.timedelta(seconds=100)
        with unittest.mock.patch("time.time", lambda: math.floor(now)):
            for error, expected in (
                    (error_with(retry_after="100"), 100), (error_with(retry_after=b"0.5"), 0.5), (error_with(retry_after=seconds), 100),
                    (error_with(retry_after=date_in(100)), 100), (error_with(retry_after=date_in(100, "%A, %d-%b-%y %H:%M:%S GMT")), 100),
                    (error_with(retry_after=date_in(100, "%a %b %d %H:%M:%S %Y")), 100),
                    (error_with(response=Falsy(headers={"Retry-After": "100"})), 100),
                    (error_with(response=Falsy(headers={"RETRY-AFTER": date_in(100)})), 100),
                    (error_with(response=Falsy(headers={"retry-after": "1", "Retry-After-Ms": "2500"})), 2.5),
                    (error_with(response=None, headers={"Retry-After": 100}), 100), (error_with(headers={"retry-after-ms": "20"}), 0.02),
                    (error_with(retry_after="soon", headers={"retry-after": "100"}), 100),
                    # What cannot be read, or is over, counts as none.
                    (error_with(retry_after=date_in(-100)), None), (error_with(headers={"Retry-After": "-1"}), None),
                    (error_with(headers={"Retry-After": "Fri, 99 Nope"}), None), (error_with(headers=7), None),
                    (error_with(headers={"Retry-After": None}), None), (error_with(response=Falsy()), None)):
                with self.subTest(vars(error)):
                    self.assertEqual(concurry._wait_asked_for(error), expected)

    def test_cut_short(self):
        errors = self.errors(3)
        end, waits, made = self.play(retries_of(num_retries=5), errors, cut_at=2)
        self.assertEqual((end[1], len(waits), made), (errors[1], 2, 2))

    def test_what_an_inner_call_has_given_up_on(self):
        context, error, made = contextvars.copy_context(), KeyError("inner"), []
        outer = retries_of(num_retries=2).attempts("outer", "Api", (), {}, lambda: self.now)
        self.assertIs(context.run(next, outer), concurry._RUN)
        for _ in range(2):                      # the second one is tried as often, though it is the same exception
            made.append(self.play(retries_of(num_retries=2), [error] * 3, context=context)[2])
        with self.assertRaises(StopIteration) as end:
            context.run(outer.send, ("error", error))
        self.assertEqual((made, end.exception.value, vars(error).get("_given_up_in")), ([3, 3], ("error", error), None))
        self.assertEqual(self.play(retries_of(num_retries=2), [error] * 3)[2], 3)

    def test_whatever_the_users_code_does(self):
        """An exception that cannot be shown or asked, a filter that exits: no retry, the original exception."""
        class Rude(Exception):
            def __repr__(self):
                raise ZeroDivisionError
            add_note = __str__ = __repr__

        class Asked(Exception):
            @property
            def retry_after(self):
                raise KeyError

        class NoTruth:
            def __bool__(self):
                raise TypeError

        def leave(exception):
            raise SystemExit(3)
        self.assertEqual(self.play(retries_of(num_retries=1), [Rude(), Rude()])[2], 2)
        self.assertEqual(self.play(retries_of(num_retries=1), [Asked(), "fine"])[1:], ([1.0], 2))     # an answer that cannot be read
        for options, error in (({"retry_on": leave}, KeyError()), ({"retry_on": lambda e: NoTruth()}, KeyError())):
            with self.assertLogs("concurry", "ERROR"):
                end, _, made = self.play(retries_of(num_retries=1, **options), [error, "fine"])
            self.assertEqual((end, made), (("error", error), 1))

    def test_frozen_exceptions(self):
        errors = [Frozen(n) for n in range(3)]
        (_, error), _, made = self.play(retries_of(num_retries=2), errors)
        self.assertEqual((error, error.__context__, made), (errors[2], errors[1], 3))
        back = concurry._load_error(*concurry._dump_error(error))
        self.assertEqual((type(back), back.n, type(back.__context__), back.__context__.n), (Frozen, 2, Frozen, 1))

    def test_contexts_in_a_circle(self):
        error, other = KeyError(1), KeyError(2)
        error.__context__, other.__context__ = other, error
        (_, last), _, made = self.play(retries_of(num_retries=2), [error, ValueError(), error])
        self.assertEqual((last, made), (error, 3))


class RetryOptionTests(CleanTestCase):
    def test_by_method_in_the_configuration(self):
        with temp_config(global_num_retries={"add": 2}, thread_retry_wait={"*": 3}):
            self.assertEqual(self.start(Counter, mode="sync").num_retries, {"*": 0, "add": 2})
            handle = self.start(Counter, mode="thread", num_retries={"echo": 1}, retry_wait={"add": 1})
            self.assertEqual((handle.num_retries, handle.retry_wait), ({"*": 0, "add": 2, "echo": 1}, {"*": 3, "add": 1}))
            self.assertEqual(self.start(Counter, mode="sync", num_retries=5).num_retries, 5)

    def test_impossible_values(self):
        for option, value, text in (("num_retries", -1, "from 0"), ("num_retries", 1.5, "whole"), ("retry_wait", -1, "seconds"),
                                    ("retry_jitter", 1.5, "from 0 to 1"), ("retry_algorithm", "cubic", "'linear'"),
                                    ("retry_on", int, "neither"), ("retry_on", [KeyError, "x"], "'x' is neither"),
                                    ("retry_until", 3, "not callable"), ("retry_until", square_async, "coroutine function"),
                                    ("retry_on", square_async, "coroutine function"), ("num_retries", {"options": 1}, "no such"), ("retry_max_wait", "x", "seconds"),
                                    ("retry_config", {"num_retries": 3}, "RetryConfig"), ("num_retries", {"add": -1}, "from 0"),
                                    ("num_retries", {"fetch": 1}, "Counter has no such method"),
                                    ("retry_wait", {"ad": 1}, "did you mean 'add'"), ("retry_on", {"_private": KeyError}, "no such")):
            with self.subTest(option, value=value), self.assertRaisesRegex(ValueError, f"{option}.*{text}"):
                Counter.options(mode="sync", **{option: value})
        self.assertRaisesRegex(ValueError, "num_retries", RetryConfig, -1)
        self.assertRaisesRegex(TypeError, "retries", RetryConfig, retries=1)

    def test_config_object(self):
        config = RetryConfig(2, retry_on=KeyError, retry_wait={"add": 3})
        self.assertEqual((config.num_retries, config.retry_on), (2, [KeyError]))
        self.assertEqual(config, pickle.loads(pickle.dumps(config)))
        self.assertEqual(repr(RetryConfig(2, retry_jitter=0)), "RetryConfig(num_retries=2, retry_jitter=0.0)")
        self.assertRaisesRegex(AttributeError, "another RetryConfig", setattr, config, "num_retries", 3)
        handle = self.start(Counter, mode="sync", retry_config=config, retry_wait=5)
        self.assertEqual((handle.num_retries, handle.retry_wait, handle.retry_on, handle.retry_jitter), (2, 5, [KeyError], 1))
        self.assertEqual(self.start(Counter, mode="sync", retry_config=config).retry_wait, {"*": 1.0, "add": 3})
        with self.assertRaisesRegex(ValueError, "no such method"):
            Counter.options(mode="sync", retry_config=RetryConfig({"fetch": 1}))
        self.assertRaisesRegex(ValueError, "no such method", task, num_retries={"fetch": 1})

    def test_a_config_object_is_of_its_place(self):
        """What is nearer wins, be it in an object or by itself."""
        cls = worker(mode="sync", num_retries=3)(type("Decorated", (), {"go": lambda self: 1}))
        self.assertEqual(cls.options(retry_config=RetryConfig(num_retries=5)).init().num_retries, 5)
        with temp_config(global_retry_config=RetryConfig(num_retries=4, retry_wait=3)):
            self.assertEqual(self.start(Counter, mode="sync").num_retries, 4)
            with temp_config(global_num_retries=0):
                handle = self.start(Counter, mode="sync")
                self.assertEqual((handle.num_retries, handle.retry_wait), (0, 3))


# === Rate arithmetic ===

class RateModel:
    """The promise of an algorithm, looked up in the whole history each time; amounts times nanoseconds, exact."""

    def __init__(self, algorithm, capacity, window):
        self.capacity = capacity if type(capacity) is int else fractions.Fraction(capacity)
        self.excess = getattr(self, algorithm.value)        # (n, now): what n more would be beyond what is promised
        self.window = window
        self.history = []               # [time, amount]

    def sliding_window(self, n, now):
        return (sum(amount for when, amount in self.history if when > now - self.window) + n - self.capacity) * self.window

    def fixed_window(self, n, now):
        first = self.history[0][0] if self.history else now
        begin = first + (now - first) // self.window * self.window
        return (sum(amount for when, amount in self.history if when >= begin) + n - self.capacity) * self.window

    def debt(self, now):
        """In every span that ends now: what was granted, less what the rate has brought since it began."""
        debt = since = 0
        for when, amount in reversed(self.history):
            since += amount * self.window
            debt = max(debt, since - self.capacity * (now - when))
        return debt

    def token_bucket(self, n, now):
        return self.debt(now) + (n - self.capacity) * self.window

    gcra = token_bucket

    def leaky_bucket(self, n, now):
        whole = self.capacity * self.window
        return self.debt(now) - (whole // 100 if type(whole) is int else whole / 100)


def rate_schedule(choose, algorithm, capacity, window, steps):
    """Drive an algorithm and its model through a schedule; raise AssertionError where they differ.

    `choose(options)` picks one of a list; the same for random's generator and hypothesis' data.
    """
    state, model = concurry._RATES[algorithm](capacity, window), RateModel(algorithm, capacity, window)
    exact = type(capacity) is int
    slack = 0 if exact else capacity * window * 1e-9
    amounts = [1, capacity, max(1, capacity // 3)] if exact else [capacity, capacity / 3, capacity * 0.1]
    now, open_grants, refunded = choose([0, 10 ** 15 + 7]), [], False
    for _ in range(steps):
        now += choose([0, 0, 1, window // 7, window // 3, window - 1, window, 5 * window // 2])
        n = choose(amounts)
        delay = state.delay(n, now)
        assert type(delay) is int and delay >= 0
        assert model.excess(n, now) <= slack if delay == 0 else model.excess(n, now) > -slack, "too early, or too late"
        assert delay == 0 or model.excess(n, now + delay - 1) > -slack, "waits too long"
        while delay and choose([True, False]):
            now += delay
            delay = state.delay(n, now)
            # After a refund the sliding window may say too little, and is asked again.
            assert delay == 0 or not exact or refunded and algorithm.value == "sliding_window", "waits too little"
            assert delay == 0 or model.excess(n, now + delay - 1) > -slack, "waits too long"
        if delay == 0:
            model.history.append([now, n if exact else fractions.Fraction(n)])
            open_grants.append([state.take(n, now), model.history[-1], n])
        if open_grants and choose([True, False]):
            grant = choose(open_grants)
            back = choose([grant[2], grant[2] // 2 if exact else grant[2] / 2])
            state.give(grant[0], back, now)
            grant[1][1] -= back if exact else fractions.Fraction(back)
            grant[2] -= back
            refunded = True
            if choose([True, False]):
                state.close(grant[0])
                open_grants.remove(grant)
        if choose([True] + 9 * [False]):                # more was used than acquired
            n = choose([*amounts, 3 * capacity])
            state.delay(0, now)
            state.close(state.take(n, now))
            model.history.append([now, n if exact else fractions.Fraction(n)])
        assert -slack <= state.used(now) * window
        assert 0 <= state.room(now) <= capacity
    return state


WINDOWS = [10 ** 6, 10 ** 9, 60 * 10 ** 9, 7 * 86400 * 10 ** 9, 13]       # nanoseconds: a millisecond to a week, and 13


class RateTests(CleanTestCase):
    """The five algorithms, without waiting."""

    steps = 20_000              # a million in .ci/fuzz.py

    def check_schedules(self, algorithm, capacities, seeds):
        for seed in range(seeds):
            rng = random.Random(seed)
            capacity, window = rng.choice(capacities), rng.choice(WINDOWS)
            try:
                rate_schedule(rng.choice, algorithm, capacity, window, rng.randint(3, 14))
            except AssertionError as error:
                self.fail(f"{algorithm.value}, seed {seed}, {capacity} in {window} ns: {error}")

    def test_no_capacity_is_lost_in_many_steps(self):
        """Each request as soon as it may be: after so many steps the rate is what it should be, to a step."""
        for algorithm, kind in concurry._RATES.items():
            for capacity, n in ((1000, 1), (0.3, 0.1), (7.7, 1.1)):
                with self.subTest(algorithm, capacity=capacity):
                    state, now, steps = kind(capacity, 10 ** 9), 10 ** 15, self.steps
                    for _ in range(steps):
                        delay = state.delay(n, now)
                        now += delay
                        assert state.delay(n, now) == 0
                        state.close(state.take(n, now))
                    burst = 2 * capacity
                    self.assertLessEqual((now - 10 ** 15) / 1e9 * capacity, steps * n * (1 + 1e-9))
                    self.assertGreaterEqual((now - 10 ** 15) / 1e9 * capacity, (steps * n - burst) * (1 - 1e-9))

    def test_waking_late_costs_nothing(self):
        """A leaky bucket too makes up for it, within a hundredth of its window."""
        for algorithm, kind in concurry._RATES.items():
            with self.subTest(algorithm):
                state, now, granted, rng = kind(1000, 10 ** 9), 0, 0, random.Random(3)
                while now < 3 * 10 ** 9:
                    delay = state.delay(1, now)
                    if delay:
                        now += delay + rng.randrange(200_000)
                        continue
                    state.close(state.take(1, now))
                    granted += 1
                self.assertGreaterEqual(granted, 2985)

    def test_memory_is_bounded(self):
        for algorithm, kind in concurry._RATES.items():
            with self.subTest(algorithm):
                state, now, open_grants = kind(1000, 10 ** 9), 0, collections.deque()
                for step in range(20_000):
                    now += state.delay(1, now) + (step % 3) * 1000
                    if state.delay(1, now) == 0:
                        open_grants.append(state.take(1, now))
                    if len(open_grants) > 50:
                        grant = open_grants.popleft()
                        state.give(grant, step % 2, now)
                        state.close(grant)
                self.assertLessEqual(len(getattr(state, "log", ())), 2 * 2000 + 2)     # half of it is given back
                self.assertLessEqual(len(getattr(state, "parts", ())), 53)

    def test_bursts_are_as_told(self):
        """At most so many in any window: asked all the time, after a long rest."""
        for name, most in (("sliding", 100), ("fixed", 200), ("token", 200), ("gcra", 200), ("leaky", 102)):
            kind, times, now = concurry._RATES[RateLimitAlgorithm(name)], [], 0
            state = kind(100, 10 ** 9)
            state.delay(1, now)
            state.close(state.take(1, now))     # begins a fixed window, at the end of which it goes on
            now = 10 ** 9 - 1
            while now < 4 * 10 ** 9:
                now += state.delay(1, now)
                state.close(state.take(1, now))
                times.append(now)
            within = max(sum(1 for time in times if start <= time < start + 10 ** 9) for start in times)
            with self.subTest(name):
                self.assertLessEqual(within, most)
                self.assertGreaterEqual(within, most * 0.98)

    def test_amounts_beyond_the_capacity_by_rounding_alone(self):
        for algorithm, kind in concurry._RATES.items():
            if algorithm.value != "leaky_bucket":
                state = kind(0.3, 10 ** 9)
                for _ in range(3):
                    self.assertEqual(state.delay(0.1, 5), 0)
                    state.take(0.1, 5)
                self.assertGreater(state.delay(1e-9, 5), 0)

    def test_an_exception_in_the_middle_of_the_arithmetic(self):
        """After `recount` there is never more room than there should be."""
        class Interrupt(BaseException):
            pass

        for algorithm, kind in concurry._RATES.items():
            for at in itertools.count():
                state, grants = kind(10, 1000), []
                for now in range(0, 1000, 100):
                    state.delay(1, now)
                    grants.append(state.take(1, now))
                steps = itertools.count()

                def trace(frame, event, argument, steps=steps, at=at):
                    if frame.f_code.co_filename != concurry.__file__:
                        return None
                    if event == "line" and next(steps) == at:
                        sys.settrace(None)
                        raise Interrupt
                    return trace
                sys.settrace(trace)
                try:
                    state.give(grants[-1], 1, 1250)
                    sys.settrace(None)
                    break
                except Interrupt:
                    pass
                state.recount()
                fresh = kind(10, 1000)
                for now in range(0, 900, 100):          # as if the last one had never been
                    fresh.delay(1, now)
                    fresh.take(1, now)
                self.assertGreaterEqual(state.used(1250), fresh.used(1250), (algorithm, at))
                self.assertGreaterEqual(state.used(5000), 0)
            self.assertGreater(at, 3)

    def test_what_is_given_back_after_others_were_granted(self):
        """It is no capacity twice: a bucket that was full meanwhile has nothing to get back."""
        state = concurry._TokenBucket(100, 1000)
        first = state.take(100, 0)
        self.assertEqual(state.delay(100, 1000), 0)
        state.take(100, 1000)
        state.give(first, 60, 1000)
        self.assertEqual(state.room(1000), 0)


for _algorithm in RateLimitAlgorithm:
    for _kind, _capacities in (("whole", [1, 2, 3, 10, 1000, 10 ** 12]), ("fractional", [0.5, 2.5, 1e-6, 3.7, 1e9 + 0.1])):
        setattr(RateTests, f"test_{_algorithm.value}_against_a_model_{_kind}",
                lambda self, algorithm=_algorithm, capacities=_capacities: self.check_schedules(algorithm, capacities, 1000))


# === Limits ===

class HandClock:
    """A clock that is moved by hand, in seconds."""

    def __init__(self):
        self.now = 10 ** 15

    def __call__(self):
        return self.now

    def move(self, seconds):
        self.now += int(seconds * 1_000_000_000)


class CountingBell:
    def __init__(self):
        self.rings = 0

    def wake(self):
        self.rings += 1


class DescriptionTests(CleanTestCase):
    def test_windows(self):
        for window in (60, 60.0, "minute", "Per Minute", "per_minute", RateWindow.Minute):
            for name in ("window_seconds", "window", "per"):
                self.assertEqual(RateLimit("x", 5, **{name: window}), RateLimit("x", 5, 60))
        self.assertEqual([RateWindow(name).seconds for name in ("second", "minute", "hour", "day", "week")],
                         [1, 60, 3600, 86400, 604800])
        self.assertEqual(CallLimit(window_seconds=60, capacity=100), CallLimit(100, per="minute"))
        for options, pattern in (({}, "needs one window"), ({"window": 1, "per": 1}, "only one"), ({"per": "month"}, "'minute'"),
                                 ({"per": 0}, "above 0"), ({"per": -1}, "above 0"), ({"per": float("nan")}, "above 0"),
                                 ({"per": float("inf")}, "seconds")):
            with self.assertRaisesRegex(ValueError, pattern):
                RateLimit("x", 5, **options)
        self.assertRaises(TypeError, RateLimit, "x", 5, per=[1])
        self.assertRaises(TypeError, RateLimit, "x", 5, per=True)

    def test_capacities(self):
        for capacity in (0, -1, float("nan"), 10 ** 400):
            for make in (lambda c: RateLimit("x", c, 1), lambda c: CallLimit(c, 1), lambda c: ResourceLimit("x", c)):
                with self.assertRaisesRegex(ValueError, "capacity"):
                    make(capacity)
        self.assertRaisesRegex(ValueError, "capacity", RateLimit, "x", 1e300, 1)
        self.assertRaisesRegex(ValueError, "window_seconds", RateLimit, "x", 1, 1e300)
        for capacity in ("5", None, True, [1]):
            self.assertRaises(TypeError, RateLimit, "x", capacity, 1)
        self.assertRaisesRegex(TypeError, "RateLimit, a CallLimit or a ResourceLimit", Limit, "x", 1)
        for capacity in (0.5, float("inf"), 1e-9, 10 ** 15, fractions.Fraction(1, 3)):
            self.assertEqual(RateLimit("x", capacity, 1).capacity, float(capacity))
        self.assertEqual(CallLimit(2.5, 1).capacity, 2.5)
        self.assertRaisesRegex(ValueError, "from 1", CallLimit, 0.5, 1)
        self.assertRaisesRegex(ValueError, "whole", ResourceLimit, "x", 1.5)
        self.assertRaisesRegex(ValueError, "whole", ResourceLimit, "x", float("inf"))
        self.assertRaisesRegex(TypeError, "string", ResourceLimit, 3, 1)

    def test_algorithms(self):
        for member, names in {"SlidingWindow": ["sliding_window", "sliding"], "FixedWindow": ["fixed_window", "fixed"],
                              "TokenBucket": ["token_bucket", "token"], "LeakyBucket": ["leaky_bucket", "leaky"],
                              "GCRA": ["gcra"]}.items():
            for name in names:
                self.assertIs(RateLimit("x", 1, 1, algorithm=name).algorithm, getattr(RateLimitAlgorithm, member))
        self.assertIs(RateLimit("x", 1, 1).algorithm, RateLimitAlgorithm.SlidingWindow)
        self.assertRaisesRegex(ValueError, "'gcra'", RateLimit, "x", 1, 1, algorithm="best")

    def test_they_are_descriptions(self):
        limit = RateLimit("x", 5, 60)
        self.assertRaisesRegex(AttributeError, "description", setattr, limit, "capacity", 6)
        self.assertEqual(pickle.loads(pickle.dumps(limit)), limit)
        self.assertEqual(len({limit, RateLimit("x", 5, 60), CallLimit(5, 60, key="x")}), 2)
        for one in (limit, CallLimit(5, 60), ResourceLimit("y", 2)):
            self.assertEqual(eval(repr(one)), one)
            self.assertIsInstance(one, Limit)


class LimitCase(CleanTestCase):
    """A set on a clock that is moved by hand; requests are tickets, all in one thread."""

    def limits(self, *limits, **options):
        made = LimitSet(limits, **options)
        made._home.clock = self.clock = HandClock()
        return made

    def ask(self, limits, **wants):
        ticket = concurry._Ticket({**limits._automatic, **wants})
        ticket.bell = CountingBell()
        limits._home.attend(ticket)
        return ticket

    def end(self, limits, *tickets):
        for ticket in tickets:
            ticket.is_over = True
            limits._home.attend(ticket)

    def granted(self, *tickets):
        return [ticket.is_granted for ticket in tickets]

    def in_use(self, limits):
        return {key: stats["in_use"] for key, stats in limits.get_stats().items()}


class LineTests(LimitCase):
    """Who is served when."""

    def test_order_of_arrival_and_no_starving(self):
        limits = self.limits(ResourceLimit("c", 3))
        small = [self.ask(limits, c=1) for _ in range(3)]
        large = self.ask(limits, c=3)
        late = [self.ask(limits, c=1) for _ in range(3)]
        self.assertFalse(limits.try_acquire().successful)
        self.end(limits, *small[:2])
        self.assertEqual(self.granted(large, *late), [False] * 4)       # there would be room for the small ones
        self.assertFalse(limits.try_acquire().successful)
        self.end(limits, small[2])
        self.assertEqual(self.granted(large, *late), [True] + [False] * 3)
        self.end(limits, large)
        self.assertEqual(self.granted(*late), [True] * 3)

    def test_a_waiter_is_told_when_and_not_before(self):
        limits = self.limits(RateLimit("t", 10, 60), ResourceLimit("c", 5))
        first = self.ask(limits, t=10)
        self.clock.move(20)
        second, third = self.ask(limits, t=4), self.ask(limits, t=6)
        self.assertEqual((second.due - self.clock.now, second.bell.rings), (40 * 10 ** 9, 1))
        self.assertEqual((third.due, third.bell.rings), (float("inf"), 0))
        self.clock.move(39.999999999)
        limits._home.attend(second)
        self.assertEqual((second.is_granted, second.bell.rings), (False, 1))
        self.clock.move(0.000000001)
        limits._home.attend(second)
        self.assertEqual(self.granted(second, third), [True, True])
        self.assertEqual((second.bell.rings, third.bell.rings), (2, 1))
        self.end(limits, first, second, third)

    def test_a_release_frees_at_once(self):
        limits = self.limits(RateLimit("t", 10, 60))
        first = self.ask(limits, t=10)
        second = self.ask(limits, t=4)
        first.usage = {"t": 6}
        limits._home.attend(first)
        self.assertTrue(second.is_granted)
        self.assertEqual(self.in_use(limits), {"t": 10})

    def test_the_next_in_line_is_told_when_the_first_goes_away(self):
        limits = self.limits(RateLimit("t", 10, 60))
        self.ask(limits, t=8)
        first, second, third = self.ask(limits, t=10), self.ask(limits, t=1), self.ask(limits, t=1)
        first.withdraw()
        limits._home.attend(first)
        self.assertEqual(self.granted(first, second, third), [False, True, True])
        self.assertEqual(self.in_use(limits), {"t": 10})

    def test_all_or_nothing(self):
        kinds = [RateLimit(f"r{n}", 10, 60, algorithm=algorithm) for n, algorithm in enumerate(RateLimitAlgorithm)]
        limits = self.limits(*kinds, ResourceLimit("c", 1), CallLimit(100, 60))
        wants = {limit.key: 1 for limit in kinds}
        first = self.ask(limits, **wants)
        before = self.in_use(limits)
        self.assertEqual(set(before.values()), {1})
        second = self.ask(limits, **wants)                              # only the connection is missing
        self.assertFalse(limits.try_acquire(wants).successful)
        self.assertEqual((second.is_granted, self.in_use(limits)), (False, before))
        self.end(limits, first)
        self.assertFalse(second.is_granted)                             # of the leaky bucket not yet
        self.clock.move(6)
        limits._home.attend(second)
        self.assertTrue(second.is_granted)

    def test_random_schedules(self):
        """Never more than there is, in order; at the end nothing is held, and nothing waits."""
        for seed in range(200):
            rng = random.Random(seed)
            limits = self.limits(ResourceLimit("c", rng.randint(1, 4)), RateLimit("t", 20, 10, algorithm=rng.choice(list(RateLimitAlgorithm))))
            line, held, order = [], [], []
            for _ in range(60):
                action = rng.random()
                if action < 0.4:
                    line.append(self.ask(limits, c=rng.randint(0, limits["c"].capacity), t=rng.choice([0, 1, 5, 20])))
                elif action < 0.6 and held:
                    ticket = held.pop(rng.randrange(len(held)))
                    ticket.usage = {"t": rng.choice([0, 1, 30])}
                    self.end(limits, ticket)
                elif action < 0.7 and line:
                    ticket = line.pop(rng.randrange(len(line)))
                    ticket.withdraw()
                    limits._home.attend(ticket)
                elif line:
                    self.clock.now = max(self.clock.now, self.clock.now + 1 if line[0].due == float("inf") else line[0].due)
                    limits._home.attend(line[0])
                granted = [ticket for ticket in line if ticket.is_granted]
                self.assertEqual(granted, line[:len(granted)], f"seed {seed}: overtaken")
                held += granted
                order += granted
                del line[:len(granted)]
                in_use = sum(ticket.wants["c"] for ticket in held)
                self.assertLessEqual(in_use, limits["c"].capacity)
                self.assertEqual(self.in_use(limits)["c"], in_use, f"seed {seed}")
            self.end(limits, *held)
            while line:
                self.clock.now = max(self.clock.now + 1, line[0].due if line[0].due < float("inf") else 0)
                limits._home.attend(line[0])
                granted = [ticket for ticket in line if ticket.is_granted]
                self.end(limits, *granted)
                del line[:len(granted)]
            self.assertEqual((self.in_use(limits)["c"], limits._home.held, len(limits._home.line)), (0, {}, 0))

    def test_an_exception_in_the_middle_of_any_step(self):
        """A signal handler may raise anywhere: nothing is held for ever, and nobody is forgotten."""
        class Interrupt(BaseException):
            pass

        for at in itertools.count():
            limits = self.limits(ResourceLimit("c", 1), CallLimit(100, 60))
            home = limits._home
            first = self.ask(limits)
            others = [self.ask(limits) for _ in range(2)]
            steps = itertools.count()

            def trace(frame, event, argument, steps=steps, home=home, at=at):
                if frame.f_code.co_filename != concurry.__file__ or frame.f_code is home._recover.__func__.__code__:
                    return None
                if event == "line" and next(steps) == at:
                    sys.settrace(None)
                    raise Interrupt
                return trace
            sys.settrace(trace)
            try:
                try:
                    self.end(limits, first)
                finally:
                    sys.settrace(None)
                reached = False
            except Interrupt:
                reached = True
                self.end(limits, first)         # as `release` is called again by whoever clears up
            self.assertEqual(self.granted(*others), [True, False], at)
            self.assertGreaterEqual(others[0].bell.rings, 1, at)
            self.assertEqual(self.in_use(limits)["c"], 1, at)
            self.end(limits, *others)
            self.assertEqual((self.in_use(limits)["c"], home.held, len(home.line), home.is_busy), (0, {}, 0, False))
            if not reached:
                break
        self.assertGreater(at, 20)


class LimitSetTests(LimitCase):
    """What a user sees of a set, in one thread."""

    def test_what_is_acquired_when_it_is_not_asked_for(self):
        limits = self.limits(CallLimit(10, 60), ResourceLimit("c", 2), RateLimit("t", 100, 60))
        with limits.acquire():
            self.assertEqual(self.in_use(limits), {"call_count": 1, "c": 1, "t": 0})
        with limits.acquire({"c": 0}):
            self.assertEqual(self.in_use(limits), {"call_count": 2, "c": 0, "t": 0})
        with limits.acquire({"c": 2, "t": 7, "call_count": 3}) as acquired:
            self.assertEqual(self.in_use(limits), {"call_count": 5, "c": 2, "t": 7})
            acquired.update({"t": 7, "call_count": 1})
        self.assertEqual(self.in_use(limits), {"call_count": 3, "c": 0, "t": 7})

    def test_more_than_the_capacity(self):
        limits = self.limits(RateLimit("t", 100, 60), ResourceLimit("c", 2))
        for acquire in (limits.acquire, limits.try_acquire, limits.async_acquire):
            for wants, pattern in (({"t": 101}, "cannot acquire 101 of 't': its capacity is 100"), ({"t": -1}, "from 0"),
                                   ({"c": 3}, "capacity is 2"), ({"c": 0.5}, "whole"), ({"t": float("nan")}, "finite"),
                                   ({"t": float("inf")}, "finite")):
                with self.assertRaisesRegex(ValueError, pattern):
                    acquire(wants)
            for wants in ({"t": "5"}, {"t": None}, {"t": True}, 5, [("t", 5)], "t"):
                with self.assertRaises(TypeError):
                    acquire(wants)
        self.assertRaises(TypeError, limits.acquire, {"t": 1}, "soon")
        self.assertEqual(self.in_use(limits), {"t": 0, "c": 0})

    def test_an_unknown_key_is_ignored_with_one_warning(self):
        limits = self.limits(RateLimit("tokens", 100, 60))
        with self.assertWarnsRegex(UserWarning, "no limit 'token' in .* did you mean 'tokens'") as caught:
            limits.acquire({"token": 5})
        self.assertEqual(caught.filename, __file__)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            limits.acquire({"token": 5})
            with self.assertRaisesRegex(UserWarning, "no limit 'other'"):
                limits.acquire({"other": 5})

    def test_the_warning_is_of_the_line_that_names_an_unknown_key(self):
        for way in (lambda limits: limits.acquire({"x": 1}),
                    lambda limits: limits.try_acquire({"x": 1}),
                    lambda limits: limits.async_acquire({"x": 1}),
                    lambda limits: limits.acquire().update({"x": 1})):
            for limits in (self.limits(ResourceLimit("c", 5)), LimitPool([self.limits(ResourceLimit("c", 5))])):
                line = way.__code__.co_firstlineno
                with self.subTest(limits=limits, line=line):
                    with self.assertWarnsRegex(UserWarning, "no limit 'x'") as caught:
                        way(limits)
                    self.assertEqual((caught.filename, caught.lineno), (__file__, line))

    def test_update_gives_back_and_charges(self):
        for algorithm in RateLimitAlgorithm:
            with self.subTest(algorithm):
                limits = self.limits(RateLimit("t", 100, 60, algorithm=algorithm))
                with limits.acquire({"t": 80}) as acquired:
                    acquired.update(usage={"t": 30})
                    self.assertEqual(self.in_use(limits), {"t": 30})
                    acquired.update({"t": 50})                  # the answer goes on
                    self.assertEqual(self.in_use(limits), {"t": 50})
                    acquired.update({"t": 10})
                self.assertEqual(self.in_use(limits), {"t": 10})
                self.clock.move(60)
                with limits.acquire({"t": 50}) as acquired, \
                        self.assertWarnsRegex(UserWarning, "more was used.*'t': 150") as caught:
                    acquired.update({"t": 150})
                self.assertEqual(caught.filename, __file__)
                self.assertEqual(self.in_use(limits), {"t": 150})
                self.assertFalse(limits.try_acquire({"t": 1}).successful)
                self.clock.move(120)
                with limits.acquire({"t": 100}) as acquired:
                    acquired.update()
                self.assertEqual(self.in_use(limits), {"t": 100})

    def test_update_corrects_what_it_has_charged(self):
        limits = self.limits(RateLimit("t", 100, 60))
        with limits.acquire({"t": 50}) as acquired:
            with self.assertWarns(UserWarning):
                acquired.update({"t": 90})
            acquired.update({"t": 20})
        self.assertEqual(self.in_use(limits), {"t": 20})

    def test_what_was_used_without_having_been_acquired(self):
        limits = self.limits(RateLimit("t", 100, 60), CallLimit(10, 60))
        with limits.acquire() as acquired, self.assertWarns(UserWarning):
            acquired.update({"t": 40})
        self.assertEqual(self.in_use(limits), {"t": 40, "call_count": 1})

    def test_update_is_owed(self):
        limits = self.limits(RateLimit("t", 100, 60), CallLimit(10, 60), ResourceLimit("c", 1))
        with self.assertRaisesRegex(RuntimeError, r"'t' was not told.*update\(\{'t'"):
            with limits.acquire({"t": 30}):
                pass
        self.assertEqual(self.in_use(limits), {"t": 30, "call_count": 1, "c": 0})
        with self.assertRaisesRegex(RuntimeError, "'call_count'"):
            with limits.acquire({"call_count": 2}):
                pass
        with self.assertRaisesRegex(RuntimeError, "'call_count'"):
            with limits.acquire({"call_count": 2, "t": 1}) as acquired:
                acquired.update({"t": 1})
        with limits.acquire({"call_count": 1, "c": 1}):
            pass
        error = ValueError("the body's own")
        with self.assertRaises(ValueError) as caught:
            with limits.acquire({"t": 30}):
                raise error
        self.assertIs(caught.exception, error)
        self.assertIsNone(error.__context__)
        self.assertEqual(self.in_use(limits), {"t": 61, "call_count": 7, "c": 0})

    def test_bad_usage(self):
        limits = self.limits(RateLimit("t", 100, 60), ResourceLimit("c", 2))
        with limits.acquire({"t": 10}) as acquired:
            self.assertRaisesRegex(TypeError, "usage must be a dict", acquired.update, 5)
            for usage in (-1, float("nan"), float("inf"), 10 ** 400, 1e300):
                self.assertRaisesRegex(ValueError, "usage", acquired.update, {"t": usage})
            self.assertRaises(TypeError, acquired.update, {"t": "1"})
            with self.assertWarnsRegex(UserWarning, "'x'"):
                acquired.update({"t": 5, "x": 1, "c": 1})
            self.assertEqual(self.in_use(limits), {"t": 5, "c": 1})
        self.assertRaisesRegex(RuntimeError, "too late", acquired.update, {"t": 5})
        held = limits.acquire({"c": 2})
        refused = limits.try_acquire({"t": 1})
        self.assertFalse(refused.successful)
        self.assertRaisesRegex(RuntimeError, "nothing was acquired", refused.update, {"t": 1})
        with refused:
            pass
        held.release()

    def test_release_without_a_block(self):
        limits = self.limits(ResourceLimit("c", 1), RateLimit("t", 10, 60))
        acquired = limits.acquire({"t": 5})
        acquired.release()
        acquired.release()
        self.assertEqual(self.in_use(limits), {"c": 0, "t": 5})
        acquired = limits.acquire()
        self.assertEqual(self.in_use(limits)["c"], 1)
        del acquired                            # forgotten: nobody can give it back any more
        self.assertEqual(self.in_use(limits)["c"], 0)

    def test_statistics(self):
        limits = self.limits(ResourceLimit("c", 2), RateLimit("t", 100, 60, algorithm="token"), CallLimit(5, "hour"))
        with limits.acquire({"t": 40}) as acquired:
            waiting = self.ask(limits, c=2)
            stats = limits.get_stats()
            acquired.update({"t": 10})
        self.assertEqual(stats["c"], {"key": "c", "capacity": 2, "in_use": 1, "available": 1, "waiting": 1, "granted": 1})
        self.assertEqual({**stats["t"], "algorithm": 0}, {"key": "t", "capacity": 100, "window_seconds": 60, "algorithm": 0,
                                                          "in_use": 40, "available": 60, "waiting": 0, "granted": 40})
        self.assertEqual(stats["t"]["algorithm"], "token_bucket")
        self.assertEqual(limits.get_stats()["call_count"]["granted"], 2)
        self.end(limits, waiting)

    def test_numbers_of_other_kinds(self):
        class Single(float):
            """As numpy's are."""

        class Whole:
            def __index__(self):
                return 3

            def __float__(self):
                return 3.0
        limits = self.limits(RateLimit("t", 0.3, 60), ResourceLimit("c", Whole()))
        for _ in range(3):
            with limits.acquire({"t": Single(0.1), "c": Whole()}, timeout=0) as acquired:
                acquired.update({"t": Single(0.1)})
        self.assertAlmostEqual(self.in_use(limits)["t"], 0.3)
        self.assertIs(type(self.in_use(limits)["c"]), int)

    def test_infinite_capacity(self):
        limits = self.limits(RateLimit("t", float("inf"), 60), ResourceLimit("c", 1))
        for _ in range(3):
            with limits.acquire({"t": 1e99}) as acquired:
                acquired.update({"t": 1})
        self.assertEqual(self.in_use(limits)["c"], 0)

    def test_an_empty_set_is_free(self):
        limits = LimitSet([], config={"account": 1})
        with limits.acquire({"anything": 1}, timeout=1) as acquired:
            acquired.update({"anything": 5})
        self.assertTrue(limits.try_acquire().successful)
        self.assertEqual((acquired.config["account"], limits.get_stats()), (1, {}))

    def test_making_one(self):
        limits = LimitSet([ResourceLimit("c", 2)], shared=True, mode="thread", config={"a": 1})
        self.assertEqual((limits["c"], "c" in limits, list(limits), limits.config["a"]), (ResourceLimit("c", 2), True, ["c"], 1))
        with self.assertRaises(KeyError):
            limits["d"]
        with self.assertRaisesRegex(ValueError, "two limits have the key 'call_count'"):
            LimitSet([CallLimit(1, 1), CallLimit(2, 2)])
        LimitSet([CallLimit(10, "second"), CallLimit(1000, "day", key="daily")])
        self.assertRaises(TypeError, LimitSet, ["c"])
        self.assertRaises(TypeError, LimitSet, [limits])
        self.assertEqual(repr(LimitSet(ResourceLimit("c", 2))), "LimitSet([ResourceLimit(key='c', capacity=2)])")
        self.assertIs(pickle.loads(pickle.dumps(limits)), limits)


class WaitingForLimitsTests(CleanTestCase):
    """Threads and coroutines that wait."""

    def test_threads_are_served_in_order(self):
        limits, served = LimitSet([ResourceLimit("c", 1)]), []
        held, threads = limits.acquire(), []
        for n in range(5):
            def work(n=n):
                with limits.acquire():
                    served.append(n)
            threads.append(in_thread(work))
            until(lambda n=n: limits.get_stats()["c"]["waiting"] == n + 1)
        held.release()
        gather(threads, timeout=SAFETY)
        self.assertEqual(served, list(range(5)))

    def test_a_waiter_wakes_by_itself(self):
        for algorithm in RateLimitAlgorithm:
            limits = LimitSet([RateLimit("t", 1, 0.02, algorithm=algorithm)])
            for _ in range(3):
                with limits.acquire({"t": 1}, timeout=SAFETY) as acquired:
                    acquired.update()
            self.assertEqual(limits.get_stats()["t"]["granted"], 3)

    def test_a_timeout_takes_nothing(self):
        limits = LimitSet([ResourceLimit("c", 1), CallLimit(100, 60)])
        held = limits.acquire()
        for timeout in (0, 0.01, -1):
            for error in (TimeoutError, concurrent.futures.TimeoutError, asyncio.TimeoutError):
                with self.assertRaisesRegex(error, "could not be acquired"):
                    limits.acquire(timeout=timeout)
        stats = limits.get_stats()
        self.assertEqual((stats["c"]["waiting"], stats["call_count"]["in_use"]), (0, 1))
        held.release()
        limits.acquire(timeout=0).release()

    def test_a_timeout_lets_the_next_one_go(self):
        limits = LimitSet([ResourceLimit("c", 2)])
        held = limits.acquire()
        large = in_thread(lambda: limits.acquire({"c": 2}, timeout=0.05))
        until(lambda: limits.get_stats()["c"]["waiting"] == 1)
        small = in_thread(lambda: limits.acquire({"c": 1}).release())
        self.assertIsInstance(large.exception(SAFETY), TimeoutError)
        small.result(SAFETY)
        held.release()

    def test_many_threads(self):
        limits, inside, most = LimitSet([ResourceLimit("c", 3), CallLimit(10 ** 6, 60)]), [], []

        def work():
            for _ in range(200):
                with limits.acquire():
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
        gather([in_thread(work) for _ in range(8)], timeout=SAFETY)
        self.assertLessEqual(max(most), 3)
        stats = limits.get_stats()
        self.assertEqual((stats["c"]["in_use"], stats["c"]["waiting"], stats["call_count"]["in_use"]), (0, 0, 1600))

    def test_a_hundred_coroutines(self):
        limits, inside, most = LimitSet([ResourceLimit("c", 2)]), [], []

        async def work(n):
            async with limits.async_acquire(timeout=SAFETY) as acquired:
                inside.append(n)
                most.append(len(inside))
                await asyncio.sleep(0)
                inside.remove(n)
            return acquired.successful

        async def main():
            return await asyncio.gather(*(work(n) for n in range(100)))
        self.assertEqual(asyncio.run(main()), [True] * 100)
        self.assertEqual((max(most), limits.get_stats()["c"]["in_use"]), (2, 0))

    def test_forms_for_coroutines(self):
        limits = LimitSet([ResourceLimit("c", 1), RateLimit("t", 10, 60)])

        async def main():
            acquired = await limits.async_acquire({"t": 1})
            with acquired:
                acquired.update({"t": 0})
            async with await limits.async_acquire():
                pass
            async with limits.try_acquire() as acquired:
                self.assertTrue(acquired.successful)
                with self.assertRaises(TimeoutError):
                    await limits.async_acquire(timeout=0.01)
                with self.assertRaisesRegex(ValueError, "capacity"):
                    limits.async_acquire({"c": 2})
            with self.assertRaisesRegex(RuntimeError, "'t' was not told"):
                async with limits.async_acquire({"t": 1}):
                    pass
        asyncio.run(main())
        self.assertEqual(limits.get_stats()["c"]["in_use"], 0)

    def test_a_cancelled_coroutine_has_taken_nothing(self):
        limits = LimitSet([ResourceLimit("c", 1), RateLimit("t", 1, 3600)])

        async def main():
            with limits.acquire({"t": 1}) as held:
                tasks = [asyncio.ensure_future(self.hold_async(limits)) for _ in range(3)]
                await asyncio.sleep(0)
                tasks[0].cancel()
                await asyncio.wait(tasks[:1])
                held.update({"t": 0})
            await asyncio.sleep(0)
            tasks[1].cancel()               # it has been granted, and has not heard of it yet
            return await asyncio.gather(*tasks, return_exceptions=True)
        ended = asyncio.run(main())
        self.assertEqual([type(end) for end in ended], [asyncio.CancelledError, asyncio.CancelledError, str])
        self.assertEqual(limits.get_stats()["c"]["in_use"], 0)

    @staticmethod
    async def hold_async(limits):
        async with limits.async_acquire():
            return "held"

    def test_waiting_that_would_stall_the_loop(self):
        limits = LimitSet([ResourceLimit("c", 1)])

        async def main():
            with limits.acquire():          # need not wait
                with self.assertRaisesRegex(RuntimeError, "async with limits.async_acquire"):
                    limits.acquire()
                with self.assertRaises(TimeoutError):
                    limits.acquire(timeout=0)
                self.assertFalse(limits.try_acquire().successful)
        asyncio.run(main())
        self.assertEqual((limits.get_stats()["c"]["in_use"], limits.get_stats()["c"]["waiting"]), (0, 0))

    def test_a_loop_that_is_closed_while_somebody_waits(self):
        limits = LimitSet([ResourceLimit("c", 1)])
        held = limits.acquire()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self.hold_async(limits))
        loop.run_until_complete(asyncio.sleep(0))
        self.assertEqual(limits.get_stats()["c"]["waiting"], 1)
        loop.close()
        held.release()                      # is granted to the one that will never come
        limits.acquire(timeout=SAFETY).release()
        task._log_destroy_pending = False

    def test_a_stopped_loop_at_the_head_of_the_line(self):
        """Who waits elsewhere looks at the clock himself."""
        limits = LimitSet([CallLimit(1, 0.05)])
        limits.acquire().release()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self.hold_async(limits))
        loop.run_until_complete(asyncio.sleep(0))
        self.assertEqual(limits.get_stats()["call_count"]["waiting"], 1)
        limits.acquire(timeout=SAFETY).release()
        self.assertEqual(limits.get_stats()["call_count"]["granted"], 3)
        self.assertEqual(loop.run_until_complete(task), "held")
        loop.close()
        self.assertEqual(limits._home.keepers, {})

    def test_threads_and_coroutines_share_a_set(self):
        limits, done = LimitSet([ResourceLimit("c", 2), CallLimit(2000, 60)]), []

        def work():
            for _ in range(50):
                with limits.acquire(timeout=SAFETY):
                    done.append(1)

        async def main():
            async def one():
                for _ in range(10):
                    async with limits.async_acquire(timeout=SAFETY):
                        await asyncio.sleep(0)
                        done.append(1)
            await asyncio.gather(*(one() for _ in range(10)))
        threads = [in_thread(work) for _ in range(3)]
        asyncio.run(main())
        gather(threads, timeout=SAFETY)
        self.assertEqual((len(done), limits.get_stats()["c"]["in_use"]), (250, 0))

    def test_from_signal_handlers_that_come_at_any_time(self):
        """They may try, and release, and raise: the lock that they find held is this thread's own."""
        limits, caught = LimitSet([ResourceLimit("c", 1), CallLimit(10 ** 9, 60)]), []

        class Alarm(Exception):
            pass

        def handler(number, frame):
            with limits.try_acquire():
                pass
            if armed and random.random() < 0.5:
                raise Alarm
        rng, previous = random.Random(5), signal.signal(signal.SIGALRM, handler)
        other = in_thread(lambda: [limits.acquire(timeout=SAFETY).release() for _ in range(2000)])
        armed = []
        try:
            while len(caught) < 100:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 2e-4))
                try:
                    armed.append(1)
                    for _ in range(100):
                        with limits.acquire(timeout=SAFETY):
                            pass
                    armed.clear()
                except Alarm:
                    armed.clear()
                    caught.append(1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        other.result(SAFETY)
        gc.collect()
        self.assertEqual((limits.get_stats()["c"]["in_use"], limits.get_stats()["c"]["waiting"]), (0, 0))

    def test_the_main_job(self):
        """A hundred calls and ten thousand tokens, from twenty threads."""
        limits = LimitSet([CallLimit(100, per="minute"), RateLimit("tokens", 10_000, per="minute"), ResourceLimit("c", 5)])

        def call(n):
            with limits.acquire({"tokens": 500}) as acquired:
                acquired.update({"tokens": 100 + n % 2})
        with Executor("thread", 20) as pool:
            list(pool.map(call, range(90)))
        stats = limits.get_stats()
        self.assertEqual([stats[key]["in_use"] for key in ("call_count", "tokens", "c")], [90, 9045, 0])


class LimitPoolTests(CleanTestCase):
    def sets(self, count=3, capacity=2):
        return [LimitSet([ResourceLimit("c", capacity)], config={"account": n}) for n in range(count)]

    def test_turns(self):
        pool = LimitPool(self.sets(), worker_index=1)
        held = [pool.acquire() for _ in range(6)]
        self.assertEqual([acquired.config["account"] for acquired in held], [1, 2, 0, 1, 2, 0])
        self.assertFalse(pool.try_acquire().successful)
        with self.assertRaises(TimeoutError):
            pool.acquire(timeout=0)
        held[0].release()                       # it is the turn of 0, and only 1 has something
        last = pool.acquire(timeout=SAFETY)
        self.assertEqual(last.config["account"], 1)
        self.assertEqual([stats["c"]["in_use"] for stats in pool.get_stats()], [2, 2, 2])
        last.release()

        async def main():
            pool.try_acquire().release()        # now it is that of 2
            async with pool.async_acquire(timeout=SAFETY) as acquired:
                return acquired.config["account"]
        self.assertEqual(asyncio.run(main()), 1)
        self.assertIs(pool[1], pool._sets[1])

    def test_one_set_twice(self):
        small, large = LimitSet([ResourceLimit("c", 1)]), LimitSet([ResourceLimit("c", 5)])
        with LimitPool([small, large, small]).acquire({"c": 3}):
            self.assertEqual(large.get_stats()["c"]["in_use"], 3)

    def test_chance(self):
        pool = LimitPool(self.sets(), "random")
        self.assertEqual({pool.try_acquire().config["account"] for _ in range(100)}, {0, 1, 2})

    def test_fifty_threads_spread_evenly(self):
        pool = LimitPool([LimitSet([CallLimit(10 ** 6, 60)], config={"account": n}) for n in range(5)])
        gather([in_thread(lambda: [pool.acquire().release() for _ in range(20)]) for _ in range(50)], timeout=SAFETY)
        self.assertEqual([stats["call_count"]["granted"] for stats in pool.get_stats()], [200] * 5)

    def test_waiting(self):
        pool = LimitPool(self.sets(2, 1))
        held = [pool.acquire(), pool.acquire()]
        waiting = in_thread(lambda: pool.acquire().config["account"])
        until(lambda: sum(stats["c"]["waiting"] for stats in pool.get_stats()) == 1)
        for acquired in held:
            acquired.release()
        self.assertEqual(waiting.result(SAFETY), 0)

    def test_coroutines(self):
        pool = LimitPool(self.sets(2, 1))

        async def one():
            async with pool.async_acquire() as acquired:
                await asyncio.sleep(0)
                return acquired.config["account"]

        async def main():
            return await asyncio.gather(*(one() for _ in range(20)))
        self.assertEqual(set(asyncio.run(main())), {0, 1})
        self.assertEqual([stats["c"]["in_use"] for stats in pool.get_stats()], [0, 0])

    def test_a_request_goes_where_it_can_be_granted(self):
        pool = LimitPool([LimitSet([ResourceLimit("c", 1)], config={"n": 0}), LimitSet([ResourceLimit("c", 3)], config={"n": 1})])
        self.assertEqual([pool.acquire({"c": 3}).config["n"] for _ in range(4)], [1] * 4)
        self.assertRaisesRegex(ValueError, "capacity", pool.acquire, {"c": 4})

    def test_making_one(self):
        self.assertRaises(ValueError, LimitPool, [])
        self.assertRaises(TypeError, LimitPool, [ResourceLimit("c", 1)])
        self.assertRaisesRegex(ValueError, "round_robin", LimitPool, self.sets(), "least_active")
        self.assertRaises(ValueError, LimitPool, self.sets(), worker_index=-1)
        self.assertEqual(len(LimitPool(self.sets())), 3)


# === Balancing ===

class BalancerTests(CleanTestCase):
    """The balancers alone: what they choose among backends that are made up."""

    def choices(self, algorithm, loads, totals=None, room=10, n=1):
        backends = [types.SimpleNamespace(index=n, calls=[None] * load, total=total)
                    for n, (load, total) in enumerate(zip(loads, totals or loads))]
        balancer = concurry._BALANCERS[LoadBalancingAlgorithm(algorithm)]()
        found = [balancer.choose(backends, room) for _ in range(n)]
        return [backend and backend.index for backend in found]

    def test_round_robin(self):
        self.assertEqual(self.choices("rr", [0, 0, 0], n=7), [0, 1, 2, 0, 1, 2, 0])
        self.assertEqual(self.choices("rr", [0, 9, 0], room=9, n=4), [0, 2, 0, 2])

    def test_the_fewest_in_flight_and_over_its_life(self):
        self.assertEqual(self.choices("active", [3, 1, 2]), [1])
        self.assertEqual(self.choices("active", [1, 0, 0], n=3), [1, 1, 1])         # ties: the lowest index
        self.assertEqual(self.choices("active", [1, 0, 0]), [1])
        self.assertEqual(self.choices("total", [0, 0, 0], [5, 3, 3]), [1])
        self.assertEqual(self.choices("total", [9, 0, 0], [1, 3, 2], room=9), [2])

    def test_random(self):
        self.assertEqual(set(self.choices("random", [9, 0, 0], room=9, n=200)), {1, 2})

    def test_nobody_has_room(self):
        for algorithm in LoadBalancingAlgorithm:
            self.assertEqual(self.choices(algorithm, [2, 2], room=2), [None])


# === Calls, in every mode ===

class Diary(Worker):
    """Writes down where it lives and dies: a line of (event, process, thread)."""

    def __init__(self, path):
        self.path = path
        self.write("init")

    def write(self, event):
        with open(self.path, "a") as file:
            file.write(f"{event} {os.getpid()} {threading.get_ident()}\n")

    async def call(self):
        self.write("call")

    def __del__(self):
        self.write("del")


class Looped(Worker):
    def __init__(self):
        self.lock = asyncio.Lock()
        self.loop = asyncio.get_event_loop()
        self.opened = asyncio.Event()

    async def is_same_loop(self):
        async with self.lock:
            return asyncio.get_running_loop() is self.loop

    async def meet(self):
        await self.opened.wait()
        return "met"

    async def open(self):
        self.opened.set()

    async def forever(self, started):
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def was_cancelled(self):
        return self.cancelled

    async def hold_loop(self, started, go):
        started.set()
        go.wait()

    def plain_hold(self, started, go):
        started.set()
        go.wait()
        return threading.get_ident()

    async def ident(self):
        return threading.get_ident()

    def plain(self):
        return "plain"

    async def ask(self, handle):
        return await handle.plain(), handle.plain().result(SAFETY)


def whereabouts():
    return threading.get_ident(), asyncio._get_running_loop() is not None


class PlainIdent:
    def ident(self):
        return whereabouts()


class Overriding(PlainIdent, Looped):
    """A plain method in the place of a coroutine method, and the other way round."""

    async def plain(self):
        return whereabouts()


class Limited(Worker):
    def __init__(self):
        with self.limits.acquire():
            self.granted = self.limits.try_acquire({"x": 3}).successful

    def use(self):
        with self.limits.acquire({"x": 10}, timeout=1) as acquired:
            acquired.update(usage={"x": 3})
        return self.granted, dict(acquired.config)

    async def use_async(self):
        async with self.limits.async_acquire({"x": 1}) as acquired:
            acquired.update()
        await self.limits.async_acquire()
        return True


class Conflicts(Worker):
    """Names that the handle has too."""

    def submit(self, x):
        return "submit", x

    def shutdown(self, wait="mine"):
        return "shutdown", wait

    def close(self):
        return "close"

    def mode(self):
        return "mode"

    def map(self):
        return "map"

    def blocking(self):
        return "blocking"

    def get_pool_stats(self):
        return "stats"

    def stop(self):
        return "never called"


class CallTests:
    def test_state_order_and_arguments(self):
        worker = self.make(Counter, 10)
        self.assertEqual([f.result(SAFETY) for f in [worker.add(n) for n in range(5)]], [10, 11, 13, 16, 20])
        self.assertEqual(worker.add(2, times=3).result(SAFETY), 26)
        self.assertEqual(worker.echo(1, "x", y=None).result(SAFETY), ((1, "x"), {"y": None}))

    def test_methods_of_every_kind(self):
        worker = self.make(Counter)
        self.assertEqual(worker.add_async(3).result(SAFETY), 3)
        self.assertEqual(worker.plain(4).result(SAFETY), 8)
        self.assertEqual(worker.name_of().result(SAFETY), "Counter")

    def test_argument_names_are_the_users(self):
        names = dict.fromkeys(["method", "args", "kwargs", "fn", "future", "call", "timeout", "name"], 1)
        self.assertEqual(self.make(Counter).echo(**names).result(SAFETY), ((), names))

    def test_the_future(self):
        future = self.make(Counter).add(3)
        self.assertIsInstance(future, BaseFuture)
        self.assertEqual(concurrent.futures.wait([future], SAFETY).done, {future})
        self.assertEqual(list(concurrent.futures.as_completed([future], SAFETY)), [future])

        async def main():
            worker = self.make(Counter)
            self.assertEqual([await worker.add(1), await asyncio.wrap_future(worker.add(1)), await worker.add_async(1)], [1, 2, 3])
            future = worker.add(1)
            self.assertEqual(await asyncio.wait([future], timeout=SAFETY), ({future}, set()))
        asyncio.run(main())

    def test_errors_keep_type_and_place(self):
        worker = self.make(Counter)
        for method in (worker.fail, worker.fail_async):
            error = method(KeyError("x", 3)).exception(SAFETY)
            self.assertEqual((type(error), error.args), (KeyError, ("x", 3)))
            shown = "".join(traceback.format_exception(KeyError, error, error.__traceback__))
            self.assertIn("raise error", shown)

    def test_wrong_arguments_are_the_calls_error(self):
        future = self.make(Counter).add(1, 2, 3)
        self.assertRaisesRegex(TypeError, "add", future.result, SAFETY)

    def test_any_base_exception_stays_in_its_future(self):
        worker = self.make(Counter)
        for error in (SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), StopIteration(5),
                      concurrent.futures.CancelledError(), BaseException("x"), StopAsyncIteration()):
            # Python makes a RuntimeError of a StopIteration in a coroutine.
            for method in (worker.fail, worker.fail_async)[:1 if isinstance(error, StopIteration) else 2]:
                if self.mode == "sync" and isinstance(error, (SystemExit, KeyboardInterrupt)):
                    self.assertRaises(type(error), method, error)
                else:
                    future = method(error)
                    concurrent.futures.wait([future], SAFETY)
                    found = concurrent.futures.CancelledError() if future.cancelled() else future.exception(0)
                    self.assertIs(type(found), type(error))
        self.assertEqual(worker.add_async().result(SAFETY), 1)
        self.assertEqual(worker.add().result(SAFETY), 2)

    def test_an_awaited_stop_iteration_is_raised_by_a_runtime_error(self):
        """As itself it would be the end of the coroutine that awaits, with a result."""
        ways = {"await": lambda call: call, "gather": asyncio.gather, "async_gather": async_gather, "shield": asyncio.shield,
                "wait_for": lambda call: asyncio.wait_for(call, SAFETY),
                "as_completed": lambda call: next(iter(asyncio.as_completed([call])))}
        go = self.flag()
        if self.mode == "sync":             # it has raised before anybody awaits it
            go.set()

        async def main():
            call = self.make(FailsWhenTold).run(self.flag(), go, StopIteration(5))
            waiting = [asyncio.ensure_future(way(call)) for way in ways.values()]
            for _ in range(3):              # until the tasks of tasks wait
                await asyncio.sleep(0)
            go.set()
            await asyncio.wait(waiting, timeout=SAFETY)
            for name, task in zip(ways, waiting):
                with self.subTest(name):
                    self.assertIsInstance(task.exception(), RuntimeError)
                    self.assertEqual(repr(task.exception().__cause__), "StopIteration(5)")
        asyncio.run(main())

    def test_blocking(self):
        worker = self.make(Counter, blocking=True)
        self.assertEqual((worker.add(2), worker.add_async(2), worker.blocking), (2, 4, True))
        self.assertRaises(KeyError, worker.fail, KeyError())

    def test_names_that_cannot_be_called(self):
        worker = self.make(Counter)
        with self.assertRaisesRegex(AttributeError, "private"):
            worker._private
        for name in ("kind", "size", "twice"):
            with self.assertRaisesRegex(AttributeError, f"{name}.*only methods can be called from outside"):
                getattr(worker, name)
        with self.assertRaisesRegex(AttributeError, "ad_async.*'add_async'"):
            worker.ad_async
        self.assertFalse(hasattr(worker, "count"))
        self.assertTrue(hasattr(worker, "add"))

    def test_options_are_attributes_of_the_handle(self):
        worker = self.make(Counter, max_workers=1, unwrap_futures=False)
        self.assertEqual((worker.mode, worker.blocking, worker.max_workers, worker.unwrap_futures, worker.on_demand),
                         (ExecutionMode(self.mode), False, 1, False, False))
        for name in ("blocking", "mode", "anything"):
            with self.assertRaises(AttributeError):
                setattr(worker, name, True)
        with self.assertRaises(AttributeError):
            del worker.blocking
        self.assertEqual(worker.add().result(SAFETY), 1)

    def test_methods_of_the_users_class_win(self):
        worker = self.make(Conflicts)
        self.assertEqual(worker.submit(1).result(SAFETY), ("submit", 1))
        self.assertEqual(worker.shutdown().result(SAFETY), ("shutdown", "mine"))
        for name in ("close", "mode", "map", "blocking"):
            self.assertEqual(getattr(worker, name)().result(SAFETY), name)
        self.assertEqual(worker.get_pool_stats().result(SAFETY), "stats")
        self.assertIsNone(worker.stop())
        self.assertRaises(RuntimeError, worker.submit, 1)
        with self.make(Conflicts) as worker:
            future = worker.submit(2)
        self.assertEqual(future.result(0), ("submit", 2))

    def test_the_object_lives_and_dies_in_its_worker(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "diary")
            worker = self.make(Diary, path)
            worker.call().result(SAFETY)
            worker.stop()
            lines = [line.split() for line in open_and_read(path).splitlines()]
        self.assertEqual([line[0] for line in lines], ["init", "call", "del"])
        self.assertEqual(len({tuple(line[1:]) for line in lines}), 1)
        here = str(os.getpid()), str(threading.get_ident())
        self.assertEqual(tuple(lines[0][1:]) == here, self.mode == "sync")
        self.assertEqual(lines[0][1] == here[0], self.mode not in AWAY)

    def test_limits_are_always_there(self):
        worker = self.make(Limited)
        self.assertEqual(worker.use().result(SAFETY), (True, {}))
        self.assertIs(worker.use_async().result(SAFETY), True)
        self.assertEqual(Limited().use(), (True, {}))

    def test_one_loop_for_the_life_of_the_worker(self):
        if self.mode == "sync":
            return                  # the loop of the caller's thread is the caller's
        worker = self.make(Looped)
        self.assertEqual([worker.is_same_loop().result(SAFETY) for _ in range(2)], [True, True])

    def test_a_constructor_that_raises(self):
        error = KeyError("no", 1)
        with self.assertRaises(KeyError) as caught:
            self.build(Counter, fail=error)
        self.assertEqual(caught.exception.args, error.args)

    def test_a_constructor_that_exits(self):
        for error in (SystemExit(3), KeyboardInterrupt()):
            expected = WorkerDiedError if self.mode != "sync" and type(error) is SystemExit else type(error)
            with self.assertRaises(expected):
                self.build(Counter, fail=error)

    def test_wrong_constructor_arguments(self):
        with self.assertRaisesRegex(TypeError, "unknown"):
            self.build(Counter, unknown=1)

    def test_many_callers_at_once(self):
        worker = self.make(Counter)
        futures = [in_thread(lambda: gather([worker.add() for _ in range(20)])) for _ in range(4)]
        seen = sorted(itertools.chain(*gather(futures)))
        if self.mode != "sync":             # its calls run in the callers' threads
            self.assertEqual(seen, list(range(1, 81)))

    def test_coroutine_methods_from_inside_a_running_loop(self):
        async def main():
            return self.make(Counter).add_async(3).result(SAFETY)
        self.assertEqual(asyncio.run(main()), 3)


over_modes(globals(), [CallTests])


class InOneProcessTests:
    """Sync, thread and asyncio: the worker shares our memory."""

    def test_context_variables_of_the_submitter(self):
        variable.set("outside")
        worker = self.make(Contextual)
        variable.set("at submit")
        futures = [worker.read(), worker.read_async()]
        waiting = BaseFuture()
        if self.mode == "sync":
            in_thread(lambda: until(lambda: worker._pool.calls) or waiting.set_result(1))
        futures.append(worker.read(waiting))
        variable.set("later")
        waiting.done() or waiting.set_result(1)
        self.assertEqual(gather(futures), ["at submit"] * 3)
        worker.write("by the call").result(SAFETY)
        self.assertEqual(variable.get(), "later")

    def test_an_idle_worker_keeps_nothing_alive(self):
        worker = self.make(Counter)

        class Thing:
            pass
        for method in (worker.echo, worker.echo_async):
            thing, gone = Thing(), threading.Event()
            weakref.finalize(thing, gone.set)
            self.assertIs(method(thing).result(SAFETY), thing)
            del thing
            self.assertTrue(gone.wait(SAFETY))

    def test_a_constructor_that_raises_leaves_nothing(self):
        gc.disable()
        self.addCleanup(gc.enable)
        before = descriptors(), set(threading.enumerate())
        self.assertRaises(KeyError, Counter.options(mode=self.mode).init, fail=KeyError())
        for thread in set(threading.enumerate()) - before[1]:
            thread.join(SAFETY)
        self.assertEqual((descriptors(), set(threading.enumerate())), before)

    def test_results_and_errors_are_the_same_objects(self):
        worker, thing, error = self.make(Counter), object(), KeyError()
        self.assertIs(worker.echo(thing).result(SAFETY), thing)
        self.assertIs(worker.fail(error).exception(SAFETY), error)

    def test_a_handle_as_an_argument(self):
        worker = self.make(Counter)
        self.assertIs(worker.echo(worker).result(SAFETY), worker)

    def test_a_worker_inside_a_worker(self):
        outer = self.make(Nest, self.mode)
        self.assertEqual(outer.ask(4).result(SAFETY), 4)
        self.assertEqual(outer.ask_async(4).result(SAFETY), 8)


variable = contextvars.ContextVar("variable", default="unset")


class Contextual(Worker):
    def read(self, _=None):
        return variable.get()

    async def read_async(self):
        await asyncio.sleep(0)
        return variable.get()

    def write(self, value):
        variable.set(value)


class Nest(Worker):
    def __init__(self, mode):
        self.inner = Counter.options(mode=mode).init()

    def ask(self, n):
        return self.inner.add(n).result(SAFETY)

    async def ask_async(self, n):
        return await self.inner.add_async(n)


over_modes(globals(), [InOneProcessTests], ["sync", "thread", "asyncio"])


class TravelArgumentTests(CleanTestCase):
    def test_a_handle_does_not_travel(self):
        worker = self.start(Counter, mode="process")
        for given in (worker, self.start(Counter, mode="sync")):
            self.assertRaisesRegex(pickle.PicklingError, "handle|worker", worker.echo(given).result, SAFETY)
        worker = self.start(Counter, mode="process", unwrap_futures=False)
        self.assertRaisesRegex(pickle.PicklingError, "future", worker.echo(BaseFuture()).result, SAFETY)


class SyncTests(CleanTestCase):
    def test_calls_run_at_once_in_the_callers_thread(self):
        worker = self.start(Counter, mode="sync")
        self.assertTrue(worker.add().done())
        self.assertTrue(worker.add_async().done())
        where = self.start(TaskWorker, mode="sync").submit(threading.get_ident).result(0)
        self.assertEqual(where, threading.get_ident())

    def test_an_interrupt_is_stored_and_raised(self):
        for error in (KeyboardInterrupt, SystemExit):
            pool = self.start(TaskWorker, mode="sync")

            def interrupted(future):
                raise error("stored")
            with self.assertRaises(error):
                pool.submit(interrupted, 1)
            waiting = BaseFuture()
            in_thread(lambda: until(lambda: pool._pool.calls) or waiting.set_result(1))
            with self.assertRaises(error):
                pool.submit(interrupted, waiting)
            self.assertEqual(pool.submit(square, 3).result(0), 9)

    def test_a_call_waits_in_the_caller_for_what_is_among_its_arguments(self):
        """4.6, 3.8: so calls that wait for the same run one after the other, each in its own caller's thread."""
        pool, waiting, inside, most = self.start(TaskWorker, mode="sync"), BaseFuture(), [], []

        def work(x):
            inside.append(threading.get_ident())
            most.append(len(inside))
            inside.remove(threading.get_ident())
            return x, threading.get_ident()
        self.assertEqual(pool.submit(work, done_future(result=1)).result(0), (1, threading.get_ident()))
        in_thread(lambda: until(lambda: pool._pool.calls) or waiting.set_result(2))
        self.assertEqual(pool.submit(work, [waiting]).result(0), ([2], threading.get_ident()))
        failing = BaseFuture()
        in_thread(lambda: until(lambda: pool._pool.calls) or failing.set_exception(KeyError("there")))
        self.assertIsInstance(pool.submit(work, failing).exception(0), KeyError)

    def test_where_a_call_must_not_wait(self):
        """4.6: in a done-callback, a thread of ours, on an event loop; sync and blocking calls."""
        waiting, seen = BaseFuture(), {}
        sync = self.start(TaskWorker, mode="sync")
        blocking = self.start(TaskWorker, mode="thread", blocking=True)
        thread = self.start(TaskWorker, mode="thread")
        for pool in (sync, blocking):
            def submit(_=None, pool=pool):
                try:
                    return pool.submit(abs, waiting)
                except RuntimeError as error:
                    return str(error)

            async def on_a_loop():
                return submit()
            done = done_future()
            done.add_done_callback(lambda future: seen.update(callback=submit()))
            seen.update(thread=thread.submit(submit).result(SAFETY), loop=asyncio.run(on_a_loop()))
            for where, error in seen.items():
                with self.subTest(where=where, mode=pool.mode):
                    self.assertRegex(str(error), "cannot wait for the futures among its arguments")
            seen.clear()
            self.assertEqual(pool._pool.calls, {})
        waiting.set_result(-1)
        self.assertEqual((sync.submit(abs, waiting).result(0), blocking.submit(abs, waiting)), (1, 1))

    def test_a_call_within_a_call(self):
        pool = self.start(TaskWorker, mode="sync")
        self.assertEqual(pool.submit(lambda: pool.submit(square, 3).result() + 1).result(), 10)

        async def outer():
            return pool.submit(square_async, 3).result()
        self.assertEqual(pool.submit(outer).result(), 9)


class Reluctant(Worker):
    """Fails, and knows how many of its calls wait for another attempt."""

    async def fails(self):
        raise ValueError("not now")

    interrupted = fails

    def __getattribute__(self, name):
        if name == "hidden":
            raise ValueError("no method now")
        return super().__getattribute__(name)

    async def hidden(self):
        """Is never found."""

    async def waits(self):
        return len(asyncio.all_tasks()) > 1

    async def cancel_all_others(self):
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


class Plans(Worker):
    def __init__(self):
        self.counts = collections.Counter()

    def plain_hold(self, started, go):
        started.set()
        go.wait()

    def count_to(self, n):
        self.counts[n] += 1
        if self.counts[n] < n:
            raise ValueError(n)
        return self.counts[n]


class AsyncioTests(CleanTestCase):
    def setUp(self):
        self.worker = self.start(Looped, mode="asyncio")

    def test_coroutines_interleave(self):
        meeting = [self.worker.meet() for _ in range(3)]
        self.worker.open()
        self.assertEqual(gather(meeting), ["met"] * 3)

    def test_plain_methods_run_beside_the_loop(self):
        started, go = self.flag(), self.flag()
        beside = self.worker.plain_hold(started, go)
        started.wait()
        loops = self.worker.ident().result(SAFETY)
        go.set()
        self.assertNotEqual(beside.result(SAFETY), loops)

    def test_methods_that_override_those_of_the_other_kind(self):
        worker = self.start(Overriding, mode="asyncio")
        (beside, has_loop), (loops, is_loops) = worker.ident().result(SAFETY), worker.plain().result(SAFETY)
        self.assertEqual((has_loop, is_loops, beside == loops), (False, True, False))

    def test_a_coroutine_asks_its_own_worker(self):
        self.assertEqual(self.worker.ask(self.worker).result(SAFETY), ("plain", "plain"))

    def test_cancel_of_a_running_coroutine(self):
        started = self.flag()
        future = self.worker.forever(started)
        started.wait()
        self.assertTrue(future.cancel())
        self.assertRaises(concurrent.futures.CancelledError, future.result, SAFETY)
        self.assertIs(self.worker.was_cancelled().result(SAFETY), True)

    def test_cancel_of_a_coroutine_that_has_not_begun(self):
        started, go = self.flag(), self.flag()
        held = self.worker.hold_loop(started, go)
        started.wait()
        future = self.worker.meet()
        self.assertTrue(future.cancel() and future.cancelled())
        go.set()
        held.result(SAFETY)

    def test_whatever_ends_a_retry_loop_ends_the_call(self):
        def interrupt(exception):
            raise KeyboardInterrupt("filter")
        worker = self.start(Reluctant, mode="asyncio", num_retries=5, retry_wait=3600, retry_max_wait=3600, retry_jitter=0,
                            retry_on={"*": [ValueError], "interrupted": [interrupt]})
        future = worker.fails()
        until(lambda: worker.waits().result(SAFETY))
        worker.cancel_all_others().result(SAFETY)
        self.assertRaises(concurrent.futures.CancelledError, future.result, SAFETY)
        self.assertRaisesRegex(KeyboardInterrupt, "filter", worker.interrupted().result, SAFETY)
        self.assertRaisesRegex(ValueError, "no method now", worker.hidden().result, SAFETY)

    def test_a_call_that_is_placed_twice_runs_once(self):
        """A signal handler that raises while a call is placed has that done again."""
        worker, started, go = self.start(Plans, mode="asyncio", num_retries=2, retry_wait=0, max_queued_tasks=None), \
            self.flag(), self.flag()
        held = worker.plain_hold(started, go)
        started.wait()
        futures = [worker.count_to(2)]
        call, backend = next(reversed(worker._pool.calls)), worker._pool.backends[0]
        self.assertIs(call.future, futures[0])
        backend.submit(call)
        futures.append(worker.count_to(3))
        go.set()
        self.assertEqual(gather([held, *futures], timeout=SAFETY)[1:], [2, 3])

    def test_tasks_that_another_one_cancels_before_they_begin(self):
        async def cancel_all_others():
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        pool, started, go = self.start(TaskWorker, mode="asyncio", max_queued_tasks=None), self.flag(), self.flag()

        async def hold():
            started.set()
            go.wait()
        held = pool.submit(hold)
        started.wait()
        cancelling, after = pool.submit(cancel_all_others), pool.submit(square_async, 3)
        go.set()                            # the two become tasks together
        held.result(SAFETY)
        cancelling.result(SAFETY)
        self.assertRaises(concurrent.futures.CancelledError, after.result, SAFETY)

    def test_a_constructor_that_fails_before_the_second_thread_starts(self):
        start = threading.Thread.start

        def start_and_wait(thread):
            start(thread)
            thread.join(0.1)
        with unittest.mock.patch.object(threading.Thread, "start", start_and_wait), warnings.catch_warnings():
            warnings.simplefilter("error")
            self.assertRaises(KeyError, Counter.options(mode="asyncio").init, fail=KeyError())

    def test_a_task_left_by_a_call_that_exits_does_not_end_the_loop(self):
        pool, tasks = self.start(TaskWorker, mode="asyncio"), []

        async def leave():
            async def exits():
                raise SystemExit(3)
            tasks.append(asyncio.ensure_future(exits()))
        with self.log_of(level="ERROR"):
            pool.submit(leave).result(SAFETY)
            self.assertEqual(pool.submit(square_async, 3).result(SAFETY), 9)
            pool.stop()
        self.assertIsInstance(tasks[0].exception(), SystemExit)


# === Cancelling ===

class CallCancelTests:
    def test_a_call_that_has_not_begun_never_runs(self):
        worker = self.make(Counter, max_queued_tasks=None)
        started, go = self.flag(), self.flag()
        held = worker.hold(started, go)
        started.wait()
        waiting = [worker.add() for _ in range(3)]
        told = in_thread(gather, waiting[1])
        self.assertTrue(waiting[1].cancel() and waiting[1].cancelled() and waiting[1].done())
        self.assertIsInstance(told.exception(SAFETY), concurrent.futures.CancelledError)
        self.assertFalse(held.cancel())
        go.set()
        self.assertEqual(held.result(SAFETY), "held")
        self.assertEqual([waiting[0].result(SAFETY), waiting[2].result(SAFETY)], [1, 2])
        self.assertFalse(waiting[0].cancel())

    def test_cancel_races_with_the_result(self):
        worker = self.make(Counter, max_queued_tasks=None)
        cancelled, futures = 0, []
        for _ in range(200):
            futures.append(worker.add())
            cancelled += futures[-1].cancel()
        self.assertEqual(sum(f.cancelled() for f in futures), cancelled)
        results = [f.result(SAFETY) for f in futures if not f.cancelled()]
        self.assertEqual(results, list(range(1, 201 - cancelled)))
        self.assertEqual(worker.add().result(SAFETY), 201 - cancelled)

    def test_cancel_of_an_awaiting_task(self):
        worker = self.make(Counter)
        started, go = self.flag(), self.flag()
        held = worker.hold(started, go)
        started.wait()

        async def main():
            future = worker.add()
            waiting = asyncio.wrap_future(future)
            waiting.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await waiting
            await asyncio.sleep(0)
            return future
        future = asyncio.run(main())
        go.set()
        self.assertEqual(held.result(SAFETY), "held")
        self.assertTrue(future.cancelled())
        self.assertEqual(worker.add().result(SAFETY), 1)


over_modes(globals(), [CallCancelTests], ["thread", "process", "asyncio", "ray"])


# === The submission queue ===

class QueueTests:
    """`max_queued_tasks`: what fills the queue, who blocks, what wakes them."""

    def full(self, n=2, **options):
        """Return a worker whose queue is full: its one running call, which `self.go` ends, and n - 1 more."""
        self.worker = self.make(Counter, max_queued_tasks=n, **options)
        self.started, self.go = self.flag(), self.flag()
        self.addCleanup(self.go.set)
        self.held = self.worker.hold(self.started, self.go)
        # Not ended by its safety timeout: nobody blocked.
        self.addCleanup(lambda: self.assertEqual(self.held.result(SAFETY), "held"))
        self.started.wait()
        self.queued = [self.worker.add() for _ in range(n - 1)]
        return self.worker

    def blocked(self, fn, *args):
        """Call in a thread, where it is expected to block; return when it has come to that."""
        real, reached = concurry._Pool._wait_for_place, threading.Event()

        def seen(pool, call, deadline):
            reached.set()
            return real(pool, call, deadline)
        with unittest.mock.patch.object(concurry._Pool, "_wait_for_place", seen):
            submitting = in_thread(fn, *args)
            self.assertTrue(reached.wait(SAFETY))
        self.assertFalse(submitting.done())
        return submitting

    def test_a_full_queue_blocks_until_a_call_completes(self):
        worker = self.full()
        submitting = self.blocked(worker.add)
        self.assertEqual(concurry.wait([submitting], 0.05).not_done, {submitting})
        self.go.set()
        self.assertEqual(submitting.result(SAFETY).result(SAFETY), 2)

    def test_cancel_releases_the_blocked(self):
        submitting = self.blocked(self.full().add)
        self.assertTrue(self.queued[0].cancel())
        future = submitting.result(SAFETY)
        self.go.set()
        self.assertEqual(future.result(SAFETY), 1)

    def test_an_error_releases_the_blocked(self):
        worker = self.make(Counter, max_queued_tasks=1)
        started, go = self.flag(), self.flag()
        held = self.start(TaskWorker, mode=self.mode, max_queued_tasks=1)
        failing = held.submit(hold_and_fail, started, go)
        started.wait()
        submitting = self.blocked(held.submit, square, 3)
        go.set()
        self.assertEqual(submitting.result(SAFETY).result(SAFETY), 9)
        self.assertIsInstance(failing.exception(SAFETY), KeyError)
        self.assertEqual(worker.add().result(SAFETY), 1)

    def test_stop_releases_the_blocked(self):
        worker = self.full()
        submitting = self.blocked(worker.add)
        with self.log_of() as log:
            stopping = in_thread(worker.stop)
            future = submitting.result(SAFETY)
        self.assertTrue(future.cancelled())
        self.assertRegex("".join(log.output), "2 calls")
        self.go.set()
        stopping.result(SAFETY)
        self.assertEqual(self.held.result(0), "held")

    def test_the_blocked_wake_in_order(self):
        worker = self.full(n=1)
        submitting = [self.blocked(worker.add, n) for n in (1, 10, 100)]
        self.go.set()
        self.assertEqual(gather(gather(submitting)), [1, 11, 111])

    def test_the_place_is_free_before_a_waiter_wakes(self):
        worker = self.make(Counter, max_queued_tasks=1)
        with unittest.mock.patch.object(concurry._Pool, "_wait_for_place", lambda *_: self.fail("the queue is full")):
            for n in range(200):
                self.assertEqual(worker.add().result(SAFETY), n + 1)

    def test_a_done_callback_does_not_block(self):
        worker = self.full(n=1)
        results = []
        future = BaseFuture()
        future.add_done_callback(lambda _: results.append(worker.add()))
        future.set_result(None)
        self.go.set()
        self.assertEqual(results[0].result(SAFETY), 1)

    def test_a_callback_of_its_own_call_submits(self):
        worker, chained = self.full(n=1), BaseFuture()
        self.held.add_done_callback(lambda _: worker.add().add_done_callback(lambda f: chained.set_result(f.result())))
        self.go.set()
        self.assertEqual(chained.result(SAFETY), 1)

    def test_a_signal_handler_does_not_block(self):
        worker, results = self.full(n=1), []
        before = signal.signal(signal.SIGUSR1, lambda *_: results.append(worker.add()))
        self.addCleanup(signal.signal, signal.SIGUSR1, before)
        signal.raise_signal(signal.SIGUSR1)
        self.assertEqual(len(results), 1)
        self.go.set()
        self.assertEqual(results[0].result(SAFETY), 1)

    def test_a_finalizer_does_not_block(self):
        worker, results = self.full(n=1), []

        class Last:
            def __del__(self):
                results.append(worker.add())
        Last()
        gc.collect()
        self.go.set()
        self.assertEqual(results[0].result(SAFETY), 1)

    def test_a_running_loop_does_not_block(self):
        worker = self.full(n=1)

        async def main():
            future = worker.add()
            self.go.set()
            return await future
        self.assertEqual(asyncio.run(main()), 1)

    def test_a_call_that_waits_for_its_dependencies_holds_no_place(self):
        pending = BaseFuture()
        worker = self.make(Counter, max_queued_tasks=1)
        waiting = [worker.add(pending) for _ in range(5)]
        self.assertEqual(worker.add().result(SAFETY), 1)
        pending.set_result(10)
        self.assertEqual(gather(waiting), [11, 21, 31, 41, 51])

    def test_no_bound(self):
        worker = self.make(Counter, max_queued_tasks=None)
        started, go = self.flag(), self.flag()
        worker.hold(started, go)
        futures = [worker.add() for _ in range(300)]
        go.set()
        self.assertEqual(gather(futures), list(range(1, 301)))

    def test_the_bound_is_per_worker(self):
        pool = self.make(Counter, max_queued_tasks=2, max_workers=2)
        go = self.flag()
        started = [self.flag() for _ in range(2)]
        held = [pool.hold(flag, go) for flag in started]
        for flag in started:
            flag.wait()
        queued = [pool.add(), pool.add()]
        submitting = self.blocked(pool.add)
        go.set()
        self.assertEqual(submitting.result(SAFETY).result(SAFETY) + gather(queued)[0], 3)
        gather(held)


def hold_and_fail(started, go):
    hold(started, go)
    raise KeyError("held")


over_modes(globals(), [QueueTests], ["thread", "process", "ray"])


class UnboundedTests:
    """Those whom the bound passes by."""

    def test_sync_asyncio_and_blocking_handles(self):
        for options in ({"max_queued_tasks": 1}, {"max_queued_tasks": 1, "blocking": True}):
            worker = self.make(Counter, **options)
            found = [worker.add() for _ in range(20)]
            self.assertEqual(found[-1] if "blocking" in options else found[-1].result(SAFETY), 20)


over_modes(globals(), [UnboundedTests], ["sync", "asyncio"])


class ParkedTests(CleanTestCase):
    """A call or a callback that submits to a full queue (FAULTS 36)."""

    def test_a_call_submits_to_its_own_full_pool(self):
        for options in ({"max_workers": 1}, {"max_workers": 2}):
            pool = self.start(TaskWorker, mode="thread", max_queued_tasks=1, **options)

            def outer():
                return [pool.submit(square, n) for n in range(5)]
            self.assertEqual(gather(pool.submit(outer).result(SAFETY)), [0, 1, 4, 9, 16])

            async def outer_async():
                return [pool.submit(square, n) for n in range(5)]
            self.assertEqual(gather(pool.submit(outer_async).result(SAFETY)), [0, 1, 4, 9, 16])

    def test_callbacks_submit_to_each_others_full_pools(self):
        pools = [self.start(TaskWorker, mode=mode, max_queued_tasks=1) for mode in ("thread", "process")]
        ends = [BaseFuture(), BaseFuture()]
        for pool, other, end in zip(pools, reversed(pools), ends):
            def chain(future, other=other, end=end):
                other.submit(square, future.result()).add_done_callback(lambda f: end.set_result(f.result()))
            pool.submit(square, 3).add_done_callback(chain)
        self.assertEqual(gather(ends), [81, 81])

    def test_a_blocking_call_on_another_worker_from_a_call(self):
        outer, inner = (self.start(TaskWorker, mode="thread", blocking=True) for _ in range(2))
        self.assertEqual(outer.submit(lambda: inner.submit(square, 3)), 9)

    def test_many_submitters_and_a_small_queue(self):
        pool = self.start(TaskWorker, mode="thread", max_workers=3, max_queued_tasks=2)
        runs = [in_thread(lambda n: sum(pool.submit(square, n).result(SAFETY) for _ in range(100)), n) for n in range(6)]
        self.assertEqual(gather(runs), [100 * n * n for n in range(6)])
        self.assertEqual(pool.get_pool_stats()["load_balancer"]["total_dispatched"], 600)


# === Pools ===

class Place(Worker):
    """Knows which instance it is."""

    def __init__(self):
        self.calls = 0

    def where(self):
        self.calls += 1
        return f"{os.getpid()}-{threading.get_ident()}", self.calls

    def hold(self, started, go):
        started.set()
        go.wait()
        return self.where()[0]


class PoolTests:
    def test_every_worker_has_its_own_instance(self):
        pool = self.make(Place, max_workers=3)
        seen = gather([pool.where() for _ in range(6)])
        self.assertEqual(seen[:3], [(place, 1) for place, _ in seen[:3]])
        self.assertEqual(seen[3:], [(place, 2) for place, _ in seen[:3]])
        self.assertEqual(len(set(seen)), 6)

    def test_least_active_takes_the_idle_one(self):
        pool = self.make(Place, max_workers=2, load_balancing="active")
        started, go = self.flag(), self.flag()
        held = pool.hold(started, go)
        started.wait()
        seen = {pool.where().result(SAFETY)[0] for _ in range(3)}
        stats = pool.get_pool_stats()["load_balancer"]
        go.set()
        self.assertEqual(len(seen - {held.result(SAFETY)}), 1)
        self.assertEqual((stats["algorithm"], stats["total_dispatched"], stats["active_calls"], stats["total_active"]),
                         ("LeastActiveLoad", 4, {0: 1, 1: 0}, 1))

    def test_least_total(self):
        pool = self.make(Place, max_workers=2, load_balancing="total")
        seen = [pool.where().result(SAFETY)[0] for _ in range(4)]
        self.assertEqual((seen[0] == seen[2], seen[1] == seen[3], len(set(seen))), (True, True, 2))
        stats = pool.get_pool_stats()["load_balancer"]
        self.assertEqual((stats["algorithm"], stats["total_calls"]), ("LeastTotalLoad", {0: 2, 1: 2}))

    def test_stats(self):
        pool = self.make(Place, max_workers=2)
        gather([pool.where() for _ in range(3)])
        stats = pool.get_pool_stats()
        self.assertEqual(stats, {**stats, "total_workers": 2, "max_workers": 2, "on_demand": False, "on_demand_active": 0,
                                 "restarts": 0, "stopped": False,
                                 "max_queued_tasks": {"thread": 100, "process": 5, "ray": 2}[self.mode]})
        self.assertEqual(stats["load_balancer"], {"algorithm": "RoundRobin", "total_dispatched": 3})
        pool.stop()
        self.assertIs(pool.get_pool_stats()["stopped"], True)
        self.assertEqual(self.make(Place, load_balancing="random").get_pool_stats()["load_balancer"]["algorithm"], "Random")

    def test_one_constructor_of_many_that_raises(self):
        with tempfile.TemporaryDirectory() as folder:
            if self.mode == "ray":              # `init` does not wait: the others take over
                pool = self.make(Third, folder, max_workers=3)
                self.assertEqual(gather([pool.ok() for _ in range(6)], timeout=SAFETY), [True] * 6)
                until(lambda: pool.get_pool_stats()["total_workers"] == 2)
            else:
                self.assertRaisesRegex(KeyError, "third", Third.options(mode=self.mode, max_workers=3).init, folder)

    def test_on_demand_makes_an_object_for_each_call(self):
        pool = self.make(Place, on_demand=True, max_workers=2)
        self.assertEqual([calls for _, calls in gather([pool.where() for _ in range(6)])], [1] * 6)
        self.assertEqual((pool.on_demand, pool.load_balancing), (True, LoadBalancingAlgorithm.Random))

    def test_on_demand_calls_wait_in_line(self):
        pool = self.make(Place, on_demand=True, max_workers=2, max_queued_tasks=1)
        go, started = self.flag(), [self.flag() for _ in range(2)]
        held = [pool.hold(flag, go) for flag in started]
        for flag in started:
            flag.wait()
        waiting = [pool.where() for _ in range(10)]
        self.assertEqual(pool.get_pool_stats()["on_demand_active"], 2)
        self.assertTrue(waiting[-1].cancel())
        go.set()
        self.assertEqual(len(gather(held + waiting[:-1])), 11)

    def test_an_on_demand_constructor_that_raises(self):
        pool = Counter.options(mode=self.mode, on_demand=True).init(fail=KeyError("lazy"))
        self.addCleanup(pool.stop)
        for _ in range(2):
            self.assertIsInstance(pool.add().exception(SAFETY), KeyError)

    def test_idle_on_demand_task_workers_go(self):
        pool = self.make(TaskWorker, on_demand=True, max_workers=2, on_demand_linger=0)
        self.assertEqual(gather([pool.submit(square, n) for n in range(4)]), [0, 1, 4, 9])
        ended = [backend.ended for backend in pool._pool.backends]
        self.assertEqual(concurry.wait(ended, SAFETY).not_done, set())
        self.assertEqual(pool.get_pool_stats()["total_workers"], 0)
        self.assertEqual(pool.submit(square, 3).result(SAFETY), 9)

    def test_a_call_that_is_cancelled_while_its_worker_is_made(self):
        """It was made for nobody, and goes."""
        for cls, method, args in ((TaskWorker, "submit", (square, 3)), (Counter, "add", (1,))):
            pool = self.make(cls, on_demand=True, max_workers=1, on_demand_linger=0)
            start = pool._pool.kind.start

            def start_and_cancel(backend):
                start(backend)
                for call in list(backend.pool.calls):
                    self.assertTrue(call.future.cancel())
            with unittest.mock.patch.object(pool._pool.kind, "start", start_and_cancel):
                future = getattr(pool, method)(*args)
            self.assertTrue(future.cancelled())
            until(lambda: pool.get_pool_stats()["total_workers"] == 0)
            self.assertTrue(getattr(pool, method)(*args).result(SAFETY))

    def test_a_lingering_task_worker_serves_the_next_call(self):
        pool = self.make(TaskWorker, on_demand=True, max_workers=1, on_demand_linger=SAFETY)
        where = [pool.submit(identity).result(SAFETY) for _ in range(3)]
        self.assertEqual(len(set(where)), 1)


def identity():
    return os.getpid(), threading.get_ident()


class Third(Worker):
    """The third to be built fails."""

    def __init__(self, folder):
        for n in itertools.count():
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.join(folder, str(n)))
                break
        if n == 2:
            raise KeyError("third")

    def ok(self):
        return True


over_modes(globals(), [PoolTests], ["thread", "process", "ray"])


# === Ending ===

class EndTests:
    """`stop` drops, `with` and `shutdown` finish (SPEC 14.1, 14.2; FAULTS 17)."""

    def test_after_stop(self):
        for end in ("stop", "close"):
            worker = self.make(Counter)
            done = worker.add()
            done.result(SAFETY)
            self.assertIsNone(getattr(worker, end)())
            for call in (worker.add, worker.add_async, worker.stop and (lambda: worker.echo(BaseFuture()))):
                self.assertRaisesRegex(RuntimeError, "Counter.*stopped", call)
            self.assertIsNone(worker.stop())
            self.assertEqual(done.result(0), 1)

    def test_contextlib_closing(self):
        with contextlib.closing(self.make(Counter)) as worker:
            worker.add().result(SAFETY)
        self.assertRaises(RuntimeError, worker.add)

    def test_with_finishes(self):
        with self.make(Counter) as worker:
            futures = [worker.add() for _ in range(5)] + [worker.add_async()]
        self.assertTrue(all(future.done() and not future.cancelled() for future in futures))
        self.assertRaisesRegex(RuntimeError, "Counter", worker.add)

    def test_with_finishes_on_an_ordinary_error_too(self):
        with self.assertRaisesRegex(KeyError, "body"), self.make(Counter) as worker:
            future = worker.add()
            raise KeyError("body")
        self.assertEqual(future.result(0), 1)

    def test_async_with_finishes(self):
        async def main():
            async with self.make(Counter) as worker:
                futures = [worker.add(), worker.add_async()]
            return worker, [future.result(0) for future in futures]
        worker, results = asyncio.run(main())
        self.assertEqual(sorted(results), [1, 2])
        self.assertRaises(RuntimeError, worker.add)

    def test_shutdown_finishes_what_waits_for_a_dependency(self):
        worker, pending = self.make(Counter), BaseFuture()
        waiting = self.waiting(worker, worker.add, pending)
        self.assertIsNone(worker.shutdown(wait=False))
        self.assertRaises(RuntimeError, worker.add)
        ending = in_thread(worker.shutdown)
        pending.set_result(4)
        ending.result(SAFETY)
        self.assertEqual(waiting.result(0), 4)

    def test_stop_cancels_what_waits_for_a_dependency(self):
        worker, pending = self.make(Counter), BaseFuture()
        waiting = self.waiting(worker, worker.add, pending)
        with self.log_of() as log:
            worker.stop()
        self.assertTrue(waiting.cancelled())
        self.assertIn("1 call", log.output[0])
        pending.set_result(1)

    def test_stop_from_two_threads(self):
        worker = self.make(Counter)
        worker.add().result(SAFETY)
        barrier = threading.Barrier(2)
        self.assertEqual(gather([in_thread(lambda: (barrier.wait(SAFETY), worker.stop())[1]) for _ in range(2)]), [None] * 2)

    def test_stop_from_a_done_callback(self):
        worker, stopped = self.make(Counter), BaseFuture()

        def stop(future):
            worker.stop()
            stopped.set_result(future.result())
        worker.add(5).add_done_callback(stop)
        self.assertEqual(stopped.result(SAFETY), 5)
        self.assertRaises(RuntimeError, worker.add)

    def test_shutdown_twice_and_after_stop(self):
        worker = self.make(Counter)
        for end in (worker.shutdown, worker.shutdown, worker.stop, worker.shutdown, lambda: worker.__exit__(None, None, None)):
            self.assertIsNone(end())

    def test_an_interrupt_in_the_body_stops(self):
        for error in (KeyboardInterrupt, SystemExit):
            with self.assertRaises(error), self.make(Counter) as worker:
                raise error
            self.assertRaises(RuntimeError, worker.add)

    def test_a_dropped_handle_finishes_what_was_submitted(self):
        worker = Counter.options(mode=self.mode).init()
        futures = [worker.add() for _ in range(3)]
        ended = [backend.ended for backend in worker._pool.backends]
        gone = weakref.ref(worker)
        del worker
        gc.collect()
        self.assertIsNone(gone())
        self.assertEqual(gather(futures), [1, 2, 3])
        self.assertEqual(concurry.wait(ended, SAFETY).not_done, set())

    def test_a_cached_method_does_not_keep_the_handle_alive(self):
        worker = Counter.options(mode=self.mode).init()
        worker.add().result(SAFETY)
        worker.add.__name__
        ended = [backend.ended for backend in worker._pool.backends]
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        del worker              # no cycle: the count of references is enough
        self.assertEqual(concurry.wait(ended, SAFETY).not_done, set())

    def test_a_pool(self):
        with self.make(Counter, **({"max_workers": 3} if self.mode in ("thread", "process") else {})) as pool:
            futures = [pool.add() for _ in range(12)]
        self.assertTrue(all(future.result(0) for future in futures))


over_modes(globals(), [EndTests])


def ends_when_told(started, go):
    """Let the process end at TERM, but not before the flag is set."""
    def end(*args):
        go.wait()
        os._exit(0)
    signal.signal(signal.SIGTERM, end)
    started.set()
    signal.pause()


class AsyncWithTests(CleanTestCase):
    def test_descriptors_that_were_given_along_are_closed_at_its_end(self):
        async def main(worker):
            async with worker:
                await worker.add()
        for method in filter("fork".__ne__, multiprocessing.get_all_start_methods()):
            with self.subTest(method):
                self.start(Counter, mode="process", mp_context=method).add().result(SAFETY)     # what stays is there now
                before = descriptors()
                ours, theirs = multiprocessing.get_context("spawn").Pipe()
                with ours, theirs:
                    worker = self.start(Holding, theirs, mode="process", mp_context=method)
                    asyncio.run(main(worker))
                self.assertEqual(descriptors(), before)

    def test_arguments_of_the_constructor_are_let_go_at_its_end(self):
        async def main(worker):
            async with worker:
                await worker.add()
        for mode in MODES:
            with self.subTest(mode):
                argument = Sole(1)
                reference, worker = weakref.ref(argument), self.start(Holding, argument, mode=mode)
                del argument
                asyncio.run(main(worker))
                gc.collect()
                self.assertIsNone(reference())

    def test_an_interrupt_in_it_does_not_stall_the_loop(self):
        async def main(interrupt, order, started, go):
            async def beside():
                await raised.wait()
                order.append("beside")
                go.set()
            raised, pool = asyncio.Event(), self.start(TaskWorker, mode="process")
            task = asyncio.ensure_future(beside())
            with self.assertRaises(interrupt):
                async with pool:
                    held = pool.submit(ends_when_told, started, go)
                    started.wait()
                    raised.set()
                    raise interrupt
            order.append("after")
            await task
            return held.exception(SAFETY)
        for interrupt in (KeyboardInterrupt, SystemExit):
            order = []
            error = asyncio.run(main(interrupt, order, self.flag(), self.flag()))
            self.assertEqual((order, type(error)), (["beside", "after"], WorkerDiedError))


class Holding(Counter):
    """Has a connection, say."""

    def __init__(self, connection):
        super().__init__()
        self.connection = connection


class StopRunningTests:
    """Ending while a call runs that has to be waited for."""

    def setUp(self):
        self.worker = self.make(Counter, max_queued_tasks=None)
        self.started, self.go = self.flag(), self.flag()
        self.addCleanup(self.go.set)
        self.held = self.worker.hold(self.started, self.go)
        self.started.wait()

    def no_grace(self):
        """Wait no longer for an event loop that a call holds up: it will not end."""
        return unittest.mock.patch.object(concurry, "_GRACE", 0.0 if self.mode == "asyncio" else concurry._GRACE)

    def test_stop_waits_for_what_runs_and_cancels_the_rest(self):
        waiting = [self.worker.add() for _ in range(3)]
        with self.log_of() as log:
            stopping = in_thread(self.worker.stop)
            concurrent.futures.wait(waiting, SAFETY)
        self.assertEqual([future.cancelled() for future in waiting], [True] * 3)
        self.assertIn("3 calls", log.output[0])
        self.assertFalse(self.held.done() or stopping.done())
        self.go.set()
        stopping.result(SAFETY)
        self.assertEqual(self.held.result(0), "held")

    def test_shutdown_with_cancel_futures(self):
        waiting = self.worker.add()
        self.worker.shutdown(wait=False, cancel_futures=True)
        self.assertTrue(waiting.cancelled())
        self.go.set()
        self.assertEqual(self.held.result(SAFETY), "held")

    def test_a_timeout(self):
        waiting = self.worker.add()
        with warnings.catch_warnings(record=True) as caught, self.log_of(), self.no_grace():
            warnings.simplefilter("always")
            self.worker.stop(timeout=0.01)
        with self.assertRaisesRegex(WorkerDiedError, "stopped after 0.01 s"):
            self.held.result(0)
        self.assertTrue(waiting.cancelled())
        abandoned = [str(w.message) for w in caught if w.category is ResourceWarning and "stop" in str(w.message)]
        self.assertEqual(len(abandoned), 0 if self.mode in AWAY else 1)
        self.go.set()

    def test_an_interrupt_in_the_body_stops_at_once(self):
        with warnings.catch_warnings(), self.no_grace():
            warnings.simplefilter("ignore")
            with self.assertRaises(KeyboardInterrupt), self.worker:
                raise KeyboardInterrupt
        self.assertIsInstance(self.held.exception(0), WorkerDiedError)
        self.go.set()

    def test_a_dropped_handle_does_not_block(self):
        del self.worker
        self._cleanups = [c for c in self._cleanups if "stop" not in repr(c)]
        gc.collect()
        self.assertFalse(self.held.done())
        self.go.set()
        self.assertEqual(self.held.result(SAFETY), "held")

    def test_an_impossible_timeout(self):
        self.assertRaisesRegex(ValueError, "timeout=-1", self.worker.stop, -1)
        self.go.set()
        self.assertEqual(self.held.result(SAFETY), "held")


over_modes(globals(), [StopRunningTests], ["thread", "process", "asyncio", "ray"])


class StopFromWithinTests(CleanTestCase):
    def test_stop_and_shutdown_from_a_call(self):
        for mode in ("sync", "thread", "asyncio"):
            for end in ("stop", "shutdown", "close"):
                for kind in ("plain", "async"):
                    pool = self.start(TaskWorker, mode=mode)

                    def plain():
                        return getattr(pool, end)()

                    async def coroutine():
                        return getattr(pool, end)()
                    future = pool.submit(plain if kind == "plain" else coroutine)
                    with self.subTest(mode=mode, end=end, kind=kind):
                        concurry.wait([future], SAFETY)
                        self.assertTrue(future.cancelled() or future.result(0) is None)
                        self.assertRaises(RuntimeError, pool.submit, square, 1)

    def test_stop_from_a_call_while_another_thread_stops(self):
        """It returns at once; the other one waits for the call, and a third one for the end."""
        pool, started, go = self.start(TaskWorker, mode="thread"), self.flag(), self.flag()
        future = pool.submit(lambda: (hold(started, go), pool.stop(600), "went on")[-1])
        started.wait()
        first = in_thread_until_it_waits(pool.stop, 600)
        third = in_thread_until_it_waits(lambda: (pool.stop(600), future.done())[1])
        self.assertFalse(first.done() or third.done())
        go.set()
        self.assertEqual(future.result(SAFETY), "went on")
        self.assertEqual(gather([first, third], timeout=SAFETY), [None, True])

    def test_coroutines_are_cancelled_at_the_timeout(self):
        for _ in range(10):
            worker = self.start(Looped, mode="asyncio")
            started = self.flag()
            future = worker.forever(started)
            started.wait()
            with warnings.catch_warnings():
                warnings.simplefilter("error")          # nothing is abandoned
                worker.stop(0.001)
            self.assertRaises((concurrent.futures.CancelledError, WorkerDiedError), future.result, 0)

    def test_one_deadline_for_a_pool(self):
        pool = self.start(TaskWorker, mode="thread", max_workers=3)
        go, started = self.flag(), [self.flag() for _ in range(3)]
        held = [pool.submit(hold, flag, go) for flag in started]
        for flag in started:
            flag.wait()
        with self.assertWarnsRegex(ResourceWarning, "3 workers"):
            pool.stop(0.01)
        self.assertEqual({type(future.exception(0)) for future in held}, {WorkerDiedError})
        go.set()

    def test_idle_threads_have_the_time_to_end(self):
        """On a busy machine that takes a while; they are not said to go on."""
        ending, go = threading.Event(), threading.Event()

        class Late(Worker):
            def __del__(self):
                ending.set()
                go.wait(SAFETY)
        worker = self.start(Late, mode="thread")
        with unittest.mock.patch.object(concurry, "_GRACE", SAFETY), warnings.catch_warnings():
            warnings.simplefilter("error")
            timer = threading.Timer(0.2, go.set)
            timer.start()
            worker.stop(0)
        self.assertTrue(ending.is_set())
        timer.join(SAFETY)

    def test_the_result_of_an_abandoned_thread_is_dropped(self):
        pool = self.start(TaskWorker, mode="thread")
        started, go, ended = self.flag(), self.flag(), threading.Event()

        def last():
            hold(started, go)
            ended.set()
        future = pool.submit(last)
        started.wait()
        with self.assertWarns(ResourceWarning):
            pool.stop(0)
        go.set()
        self.assertTrue(ended.wait(SAFETY))
        self.assertIsInstance(future.exception(0), WorkerDiedError)

    def test_a_future_is_never_left_pending_whenever_stop_comes(self):
        for mode in ("thread", "asyncio", "process"):
            for _ in range(5):
                pool = self.start(TaskWorker, mode=mode, max_queued_tasks=None)
                barrier = threading.Barrier(2)

                def submit():
                    barrier.wait(SAFETY)
                    futures = []
                    with contextlib.suppress(RuntimeError):
                        for n in range(1000):
                            futures.append(pool.submit(square, n))
                    return futures
                submitting = in_thread(submit)
                barrier.wait(SAFETY)
                logging.disable()
                pool.stop()
                logging.disable(logging.NOTSET)
                self.assertEqual([f for f in submitting.result(SAFETY) if not f.done()], [])


def in_thread_until_it_waits(fn, *args):
    """Do as `in_thread`, and return when the thread sleeps until something of ours has happened, or has ended."""
    idents = queue.SimpleQueue()
    future = in_thread(lambda: (idents.put(threading.get_ident()), fn(*args))[1])
    ident = idents.get(timeout=SAFETY)

    def waits():
        frame = sys._current_frames().get(ident)
        return frame is not None and frame.f_code is concurry._sleep_on.__code__
    until(lambda: future.done() or waits())
    return future


class SeveralStopsTests:
    """A `stop` while another one, `with` or `shutdown` waits for a call that runs (SPEC 3.5, 14.1; FAULTS 17)."""

    def setUp(self):
        self.addCleanup(CallTimeoutTests.see_threads_end, self, threading.enumerate())
        self.pool = self.make(Counter, max_queued_tasks=None)
        self.started, self.go = self.flag(), self.flag()
        self.addCleanup(self.go.set)
        self.held = self.pool.hold(self.started, self.go)
        self.started.wait()
        quiet = warnings.catch_warnings()
        quiet.__enter__()
        self.addCleanup(quiet.__exit__, None, None, None)
        warnings.simplefilter("ignore", ResourceWarning)

    def check_stopped_at_once(self):
        self.assertIsInstance(self.held.exception(0), WorkerDiedError)
        self.assertIn("stopped after 0 s", str(self.held.exception()))
        if self.mode == "thread":           # nobody has waited for that one
            self.assertFalse(self.pool._pool.backends[0].ended.done())

    def test_the_second_returns_when_the_first_has_ended(self):
        """Or at once, if it would wait for itself."""
        waiting, returned, pending = [self.pool.add() for _ in range(3)], queue.SimpleQueue(), []
        waiting[1].add_done_callback(lambda _: returned.put(self.pool.stop()))

        def stop():
            self.pool.stop(600)
            pending.extend(future for future in (self.held, *waiting) if not future.done())
        with self.log_of():
            first = in_thread_until_it_waits(stop)
        self.assertIsNone(returned.get(timeout=SAFETY))
        self.assertTrue(all(future.cancelled() for future in waiting))
        others = [in_thread_until_it_waits(stop) for _ in range(2)]
        self.assertFalse(any(future.done() for future in (self.held, first, *others)))
        self.go.set()
        gather([first, *others], timeout=SAFETY)
        self.assertEqual((pending, self.held.result(0)), ([], "held"))

    def test_the_earlier_deadline_holds(self):
        first = in_thread_until_it_waits(self.pool.stop, 600)
        third = in_thread_until_it_waits(self.pool.stop, 1200)
        second = in_thread(self.pool.stop, 0)
        gather([first, second, third], timeout=SAFETY)
        self.check_stopped_at_once()

    def test_with_waits(self):
        def leave():
            with self.pool:
                pass

        async def leave_async():
            async with self.pool:
                pass
        waiting = [in_thread_until_it_waits(leave), in_thread_until_it_waits(self.pool.shutdown),
                   in_thread_until_it_waits(self.pool.join), in_thread(asyncio.run, leave_async())]
        self.assertFalse(any(future.done() for future in waiting))
        in_thread(self.pool.stop, 0).result(SAFETY)
        gather(waiting, timeout=SAFETY)
        self.check_stopped_at_once()


over_modes(globals(), [SeveralStopsTests], ["thread", "process"])


class StormTests:
    """Submissions, dependencies, cancels, callbacks and `map` from four threads, and an end in their midst."""

    def client(self, pool, seed, futures):
        chance = random.Random(seed)
        mine = [pool.submit(square, 0)]
        for n in range(40):
            kind = chance.choice(["call", "call", "depend", "cancel", "chain", "map"])
            if kind == "call":
                mine.append(pool.submit(chance.choice([square, square_async, boom]), n % 5))
            elif kind == "depend":
                mine.append(pool.submit(str, [chance.choice(mine)]))
            elif kind == "cancel":
                chance.choice(mine).cancel()
            elif kind == "chain":
                mine[-1].add_done_callback(functools.partial(self.chain, pool, futures))
            else:
                with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError):
                    list(pool.map(square, range(5), timeout=chance.choice([0.0005, SAFETY]), chunksize=chance.choice([1, 2])))
            futures.extend(mine)

    def chain(self, pool, futures, _):
        with contextlib.suppress(RuntimeError):
            futures.append(pool.submit(square, 1))

    def test_no_future_is_left_pending_and_no_place_is_lost(self):
        logging.disable()
        self.addCleanup(logging.disable, logging.NOTSET)
        sizes = [{}] if self.mode in ("sync", "asyncio") else [
            {"max_workers": 1}, {"max_workers": 3}, {"max_workers": 2, "on_demand": True, "on_demand_linger": 0}]
        for seed, (options, end) in enumerate(itertools.product(sizes, ["stop", "finish", "both"])):
            pool = self.make(TaskWorker, max_queued_tasks=2, **options)
            futures = []
            clients = [in_thread(self.client, pool, f"{seed} {n}", futures) for n in range(4)]
            concurry.wait(clients, SAFETY if end == "finish" else 0.01)
            ends = {"stop": [pool.stop], "finish": [pool.shutdown], "both": [pool.stop, pool.shutdown]}[end]
            gather([in_thread(end) for end in ends])
            self.assertEqual(concurry.wait(clients, SAFETY).not_done, set())
            for client in clients:
                self.assertIsInstance(client.exception(0), (RuntimeError, type(None)))
            self.assertEqual(concurrent.futures.wait(futures, SAFETY).not_done, set())
            self.assertEqual(pool._pool.calls, {})


over_modes(globals(), [StormTests])


class InterpreterExitTests:
    """The end of the interpreter (FAULTS 19, 20): in a script of its own."""

    def script(self, code, **options):
        head = """
            import threading, time
            from concurry import *

            class W(Worker):
                def echo(self, x=None): return x
                async def slow(self, path): open(path).read(); return path
                def hold(self, path): open(path).read(); print("finished", flush=True); return path
            """
        code = textwrap.dedent(head) + (Cluster.joining if self.mode == "ray" else "") + textwrap.dedent(code)
        return run_script(code, self.mode, flags=["-W", "error::ResourceWarning"], **options)

    def test_idle_workers(self):
        ended = self.script("""
            import sys
            workers = [W.options(mode=sys.argv[1]).init() for _ in range(2)]
            print(gather([w.echo(1) for w in workers]))
            """)
        self.assertEqual((ended.stdout, ended.stderr), ("[1, 1]\n", ""))

    def test_submitted_work_is_finished(self):
        ended = self.script("""
            import sys
            worker = W.options(mode=sys.argv[1], max_queued_tasks=None).init()
            def done(future): print("done", future.result(), flush=True)
            for n in range(3):
                worker.echo(n).add_done_callback(done)
            first = worker.echo(3)
            worker.echo([first]).add_done_callback(done)
            """)
        self.assertEqual((sorted(ended.stdout.splitlines()), ended.stderr), (["done 0", "done 1", "done 2", "done [3]"], ""))

    def test_a_call_that_waits_for_somebody_elses_future_is_cancelled(self):
        ended = self.script("""
            import sys
            import threading
            worker = W.options(mode=sys.argv[1]).init()
            def wait():
                waiting = worker.echo(BaseFuture())
                waiting.add_done_callback(lambda f: print("cancelled", f.cancelled(), flush=True))
            if sys.argv[1] == "sync":       # the caller waits
                threading.Thread(target=wait).start()
                while not worker._pool.calls: pass
            else:
                wait()
            """)
        self.assertEqual((ended.stdout, ended.stderr), ("cancelled True\n", ""))

    def test_submitting_once_exit_has_begun(self):
        ended = self.script("""
            import atexit, sys
            worker = W.options(mode=sys.argv[1]).init()
            def late():
                try:
                    worker.echo(1)
                except RuntimeError as error:
                    print("refused:", error, flush=True)
            atexit.register(late)
            """)
        self.assertIn("refused:", ended.stdout)
        self.assertEqual(ended.stderr, "")

    def test_an_abandoned_worker(self):
        if self.mode == "sync":
            return
        ended = self.script("""
            import os, sys, warnings
            warnings.simplefilter("ignore")
            os.mkfifo(sys.argv[2])
            worker = W.options(mode=sys.argv[1]).init()
            future = worker.hold(sys.argv[2])
            worker.stop(0.1)
            print(type(future.exception(0)).__name__ if not future.cancelled() else "CancelledError")
            """.replace("sys.argv[2]", "sys.argv[0] + '.fifo'"))
        self.assertIn(ended.stdout, ("WorkerDiedError\n", "CancelledError\n"))

    def test_an_unhandled_error_ends_the_same_way(self):
        ended = self.script("""
            import sys
            worker = W.options(mode=sys.argv[1]).init()
            worker.echo(1).result()
            raise KeyError("end of main")
            """, check=False)
        self.assertEqual(ended.returncode, 1)
        self.assertIn("end of main", ended.stderr)
        self.assertEqual(ended.stderr.count("Traceback"), 1)

    def test_stop_in_atexit_and_on_demand(self):
        ended = self.script("""
            import atexit, sys
            if sys.argv[1] in ("thread", "process", "ray"):
                pool = TaskWorker.options(mode=sys.argv[1], on_demand=True, max_workers=2).init()
                print(pool.submit(abs, -1).result())
            else:
                print(1)
            worker = W.options(mode=sys.argv[1]).init()
            atexit.register(worker.stop)
            """)
        self.assertEqual((ended.stdout, ended.stderr), ("1\n", ""))


over_modes(globals(), [InterpreterExitTests])


# === Workers: the forms of a class ===

@worker(mode="sync", blocking=True)
class Decorated:
    """A plain class."""

    def __init__(self, n=0, *, step=1):
        self.n, self.step = n, step

    def add(self):
        self.n += self.step
        return self.n


@worker(mode="sync", max_queued_tasks=7)
class DecoratedWorker(Worker, mode="thread", max_queued_tasks=3):
    def add(self):
        return 1


class Stated(Worker, mode="sync", blocking=True):
    def add(self):
        return 1


class Inheriting(Stated, blocking=False):
    pass


class PlainObjects(Worker, mode="sync", auto_init=False):
    def add(self):
        return 1


@worker
class Bare:
    def add(self):
        return 1


class Slotted(Worker, mode="sync"):
    __slots__ = ("n",)

    def __init__(self, n):
        self.n = n

    def get(self):
        return self.n, self.limits.try_acquire({"x": 1}).successful


@worker(mode="thread")
class Animal:
    def __init__(self, name):
        self.name = name

    def who(self):
        return type(self).__name__, self.name, getattr(self, "made_by", None)


@worker(mode="process")
class Dog(Animal):
    def __init__(self, name, breed):
        super().__init__(f"{breed} {name}")


class Puppy(Dog):
    pass


@worker(mode="thread", auto_init=False)
class StuffedDog(Dog):
    pass


@worker(mode="thread")
class Made:
    def __new__(cls, *args):
        self = super().__new__(cls)
        self.made_by = ["Made"]
        return self

    def __init__(self, name):
        self.name = name

    who = Animal.who


@worker(mode="process")
class MadeAgain(Made):
    def __new__(cls, *args):
        self = super().__new__(cls, *args)
        self.made_by.append("MadeAgain")
        return self


@worker(mode="thread")
class MadeAsBefore(Made):
    pass


@worker(mode="thread", auto_init=False)
class MadePlainly(MadeAgain):
    pass


@worker(mode="process")
class DogWorker(Worker, mode="thread"):
    who = Animal.who
    name = "none"


@worker(mode="thread")
class PuppyWorker(DogWorker):
    def __new__(cls):
        return super().__new__(cls)


class FormTests(CleanTestCase):
    def test_a_plain_object_without_stored_options(self):
        counter = Counter(3)
        self.assertIsInstance(counter, Counter)
        self.assertEqual((counter.add(2), counter.twice), (5, 10))
        self.assertTrue(counter.limits.try_acquire({"x": 1}).successful)

    def test_a_decorated_class(self):
        for handle in (Decorated(5, step=2), Decorated.init(5, step=2)):
            self.addCleanup(handle.stop)
            self.assertEqual((handle.add(), handle.mode), (7, ExecutionMode.Sync))
        thread = self.start(Decorated, 1, mode="thread", blocking=False)
        self.assertEqual((thread.add().result(SAFETY), thread.mode), (2, ExecutionMode.Threads))
        self.assertEqual((Decorated.__name__, Decorated.__doc__), ("Decorated", "A plain class."))

    def test_a_decorated_class_in_every_mode(self):
        for mode in MODES:
            self.assertEqual(self.start(Decorated, 4, mode=mode, blocking=False).add().result(SAFETY), 5)

    def test_the_class_statement(self):
        handle = Stated()
        self.addCleanup(handle.stop)
        self.assertEqual((handle.add(), handle.blocking), (1, True))
        inheriting = Inheriting()
        self.addCleanup(inheriting.stop)
        self.assertEqual((inheriting.mode, inheriting.blocking), (ExecutionMode.Sync, False))

    def test_precedence(self):
        handle = DecoratedWorker()
        self.addCleanup(handle.stop)
        self.assertEqual((handle.mode, handle.max_queued_tasks), (ExecutionMode.Sync, 7))
        handle = self.start(DecoratedWorker, mode="thread", max_queued_tasks=9)
        self.assertEqual((handle.mode, handle.max_queued_tasks), (ExecutionMode.Threads, 9))

    def test_auto_init_off(self):
        self.assertEqual(PlainObjects().add(), 1)
        handle = PlainObjects.init()
        self.addCleanup(handle.stop)
        self.assertEqual(handle.add().result(0), 1)
        plain = worker(mode="sync", auto_init=False)(type("C", (), {"add": lambda self: 3}))
        self.assertEqual(plain().add(), 3)

    def test_the_bare_decorator_needs_a_mode_later(self):
        self.assertEqual(self.start(Bare, mode="sync").add().result(0), 1)
        self.assertRaisesRegex(ValueError, "mode is required", Bare.init)
        self.assertRaisesRegex(TypeError, "@task", worker, square)

    def test_wrong_options_are_told_at_the_decorator(self):
        with self.assertRaisesRegex(ValueError, "max_workers='x'"):
            worker(mode="sync", max_workers="x")(type("C", (), {}))

    def test_class_statements_with_options_of_the_users_own(self):
        class Base(Worker):
            def __init_subclass__(cls, flavour=None, **others):
                super().__init_subclass__(**others)
                cls.flavour = flavour

        class Child(Base, mode="sync", flavour="sweet"):
            def taste(self):
                return self.flavour
        handle = Child()
        self.addCleanup(handle.stop)
        self.assertEqual(handle.taste().result(0), "sweet")

    def test_slots_abstract_and_generic_classes(self):
        handle = Slotted(3)
        self.addCleanup(handle.stop)
        self.assertEqual(handle.get().result(0), (3, True))
        T = typing.TypeVar("T")

        class Boxed(Worker, typing.Generic[T]):
            def get(self):
                return "box"
        self.assertEqual(self.start(Boxed, mode="sync").get().result(0), "box")

    def test_a_class_with_a_new_of_its_own(self):
        class Newed(Worker):
            def __new__(cls, n):
                self = super().__new__(cls)
                self.made_with = n
                return self

            def __init__(self, n):
                self.n = n

            def both(self):
                return self.made_with, self.n
        for mode in ("sync", "thread"):
            self.assertEqual(self.start(Newed, 4, mode=mode).both().result(SAFETY), (4, 4))

    def test_objects_of_the_class_made_inside_the_worker_are_plain(self):
        @worker(mode="thread")
        class Tree:
            def __init__(self, depth=0):
                self.depth = depth

            def kind(self, other):
                return isinstance(self, Tree), isinstance(other, Tree)
        tree = Tree()
        self.addCleanup(tree.stop)
        self.assertEqual(tree.kind(3).result(SAFETY), (True, False))

    def test_a_decorated_class_with_a_decorated_base(self):
        for cls, args, expected in (
                (Animal, ("Rex",), ("Rex", None)), (Dog, ("Rex", "big"), ("big Rex", None)), (Puppy, ("Rex", "big"), ("big Rex", None)),
                (StuffedDog, ("Rex", "big"), ("big Rex", None)), (Made, ("Rex",), ("Rex", ["Made"])),
                (MadeAgain, ("Rex",), ("Rex", ["Made", "MadeAgain"])), (MadeAsBefore, ("Rex",), ("Rex", ["Made"])),
                (MadePlainly, ("Rex",), ("Rex", ["Made", "MadeAgain"])), (DogWorker, (), ("none", None)),
                (PuppyWorker, (), ("none", None))):
            with self.subTest(cls.__name__):
                made = cls(*args)
                is_plain = cls in (StuffedDog, MadePlainly)
                self.assertIs(isinstance(made, cls), is_plain)
                if is_plain:
                    self.assertEqual(made.who(), (cls.__name__, *expected))
                else:
                    self.addCleanup(made.stop)
                    self.assertEqual(made.who().result(SAFETY), (cls.__name__, *expected))
                for mode in MODES:
                    self.assertEqual(self.start(cls, *args, mode=mode).who().result(SAFETY), (cls.__name__, *expected))

    def test_arguments_for_a_class_that_takes_none(self):
        with self.assertRaisesRegex(TypeError, "takes no arguments"):
            Contextual.options(mode="sync").init(3)

    def test_equality_and_truth_of_a_handle(self):
        handle = self.start(Counter, mode="sync")
        self.assertEqual((handle == handle, bool(handle), handle in {handle}), (True, True, True))
        self.assertIn("Counter", repr(handle))
        self.assertIn("add", dir(handle))
        self.assertEqual(list(inspect.signature(handle.add).parameters)[-2:], ["n", "times"])


@dataclasses.dataclass
class Data(Worker):
    n: int
    items: list = dataclasses.field(default_factory=list)

    def add(self, item):
        self.items.append(item)
        return self.n + len(self.items)


@dataclasses.dataclass(frozen=True)
class FrozenData(Worker):
    n: int = 5

    def use(self):
        with self.limits.acquire():
            return self.n


class ModelTests:
    """Dataclasses, and the models of attrs, pydantic and morphic where they are installed."""

    def test_dataclasses(self):
        worker = self.make(Data, 3)
        self.assertEqual(gather([worker.add(1), worker.add(2)]), [4, 5])
        self.assertEqual(self.make(FrozenData).use().result(SAFETY), 5)
        with self.assertRaisesRegex(AttributeError, "only methods"):
            worker.n
        self.assertRaises(TypeError, self.build, Data, wrong=1)

    def test_attrs(self):
        attrs = self.need("attrs")

        @attrs.define
        class Attrs(Worker):
            n: int = attrs.field(validator=attrs.validators.instance_of(int))

            def twice(self):
                return self.n * 2

        @attrs.frozen
        class FrozenAttrs(Worker):
            n: int

            def use(self):
                with self.limits.acquire():
                    return self.n
        self.assertEqual(self.make(Attrs, 3).twice().result(SAFETY), 6)
        self.assertEqual(self.make(FrozenAttrs, init={"n": 3}).use().result(SAFETY), 3)
        self.assertRaises(TypeError, self.build, Attrs, "x")

    def test_pydantic_validate_call(self):
        pydantic = self.need("pydantic")

        class Validating(Worker):
            @pydantic.validate_call
            def twice(self, n: int):
                return n * 2

            @pydantic.validate_call
            async def thrice(self, n: int):
                return n * 3
        worker = self.make(Validating)
        self.assertEqual((worker.twice("4").result(SAFETY), worker.thrice("4").result(SAFETY)), (8, 12))
        self.assertIsInstance(worker.twice("x").exception(SAFETY), ValueError)

    def test_morphic_validate(self):
        morphic = self.need("morphic")

        class Validating(Worker):
            @morphic.validate
            def twice(self, n: int):
                return n * 2
        self.assertEqual(self.make(Validating).twice("4").result(SAFETY), 8)

    def test_numpy(self):
        numpy = self.need("numpy")
        worker = self.make(Counter)
        array = numpy.arange(100_000.0)
        self.assertTrue((worker.echo(array).result(SAFETY) == array).all())
        self.assertEqual(worker.echo([done_future(result=array)]).result(SAFETY)[0].shape, (100_000,))


over_modes(globals(), [ModelTests])


class WholeModelTests:
    """Workers that are models themselves; in ray mode they are refused, and that is said where Ray is found."""

    def setUp(self):
        caught = warnings.catch_warnings()
        caught.__enter__()
        self.addCleanup(caught.__exit__)
        warnings.filterwarnings("ignore", "in mode 'ray'")

    def test_pydantic_models(self):
        pydantic = self.need("pydantic")

        class Model(Worker, pydantic.BaseModel):
            n: int
            name: str = "x"

            def use(self):
                with self.limits.acquire():
                    self.n += 1
                return self.n, self.name

        class FrozenModel(pydantic.BaseModel, Worker):
            model_config = pydantic.ConfigDict(frozen=True)
            n: int

            def use(self):
                with self.limits.acquire():
                    return self.n
        worker = self.make(Model, init={"n": "3"})
        self.assertEqual(worker.use().result(SAFETY), (4, "x"))
        self.assertEqual(worker.model_dump().result(SAFETY), {"n": 4, "name": "x"})
        self.assertEqual(self.make(FrozenModel, init={"n": 3}).use().result(SAFETY), 3)
        self.assertRaises(pydantic.ValidationError, Model.options(mode=self.mode).init, n="many")
        with self.assertRaises((AttributeError)):
            worker.n

    def test_pydantic_models_with_stored_options(self):
        pydantic = self.need("pydantic")

        @concurry.worker(mode=self.mode)
        class Model(pydantic.BaseModel):
            n: int

            def get(self):
                return self.n
        handle = Model(n="5")
        self.addCleanup(handle.stop, 5)
        self.assertEqual(handle.get().result(SAFETY), 5)

    def test_morphic_models(self):
        morphic = self.need("morphic")

        class Model(Worker, morphic.Typed):
            n: int

            def use(self):
                with self.limits.acquire():
                    return self.n

            @morphic.validate
            def twice(self, n: int):
                return n * 2
        worker = self.make(Model, init={"n": "3"})
        self.assertEqual((worker.use().result(SAFETY), worker.twice("4").result(SAFETY)), (3, 8))
        self.assertRaises(ValueError, Model.options(mode=self.mode).init, n="many")


over_modes(globals(), [WholeModelTests], MODES)


# === Functions ===

def boom(x):
    if x == 3:
        raise KeyError(x)
    return x


def endless(seen):
    for n in itertools.count():
        seen.append(n)
        yield n


class Awaited:
    async def __call__(self, x):
        return x * x


def returns_coroutine(x):
    return square_async(x)


def broken_input():
    yield 1
    raise KeyError("input")


class Sole:
    """What can be referred to weakly."""

    def __init__(self, n):
        self.n = n


def sole_unless_3(n):
    return Sole(boom(n))


def with_limits(x, limits):
    return x, limits.try_acquire({"x": 1}).successful


def with_default_limits(x, limits="mine"):
    return x, limits


class FunctionTests:
    """TaskWorker, in every mode."""

    def setUp(self):
        self.pool = self.make(TaskWorker)

    def test_submit(self):
        pool = self.pool
        self.assertIsInstance(pool, concurrent.futures.Executor)
        self.assertEqual(pool.submit(add, 1, b=2).result(SAFETY), 3)
        self.assertEqual(pool.submit(square_async, 3).result(SAFETY), 9)
        self.assertEqual(pool.submit(lambda x, fn=1, self=2: (x, fn, self), 5, fn=6, self=7).result(SAFETY), (5, 6, 7))
        self.assertEqual(pool.submit(functools.partial(add, 1), 2).result(SAFETY), 3)
        self.assertIsInstance(pool.submit(boom, 3).exception(SAFETY), KeyError)
        self.assertEqual(pool.submit(add, pool.submit(add, 1)).result(SAFETY), 21)

    def test_whatever_gives_a_coroutine_is_run_to_its_end(self):
        for fn in (Awaited(), returns_coroutine, functools.partial(square_async), lambda x: square_async(x)):
            self.assertEqual(self.pool.submit(fn, 3).result(SAFETY), 9)

    def test_submit_without_a_function(self):
        for wrong in ((), (3,), ("abs", 1)):
            self.assertRaisesRegex(TypeError, "function", self.pool.submit, *wrong)
            self.assertRaisesRegex(TypeError, "function", self.pool.map, *wrong)
        self.assertFalse(callable(self.pool))
        self.assertRaises(AttributeError, lambda: self.pool.sumbit)

    def test_map_of_a_handle_that_nobody_else_has(self):
        results = TaskWorker.options(mode=self.mode).init().map(square, range(5), buffersize=1)
        gc.collect()
        self.assertEqual(list(results), [0, 1, 4, 9, 16])

    def test_map(self):
        pool = self.pool
        self.assertEqual(list(pool.map(square, range(20))), [n * n for n in range(20)])
        self.assertEqual(list(pool.map(add, [1, 2, 3], (10, 20))), [11, 22])
        self.assertEqual(list(pool.map(square, [])), [])
        self.assertEqual(list(pool.map(square_async, [2, 3])), [4, 9])
        self.assertEqual(list(pool.map(square, (n for n in range(3)))), [0, 1, 4])

    def test_map_raises_an_items_error_in_its_turn(self):
        for options in ({}, {"chunksize": 2}, {"buffersize": 2}, {"chunksize": 3, "buffersize": 6}):
            results = self.pool.map(boom, range(6), **options)
            self.assertEqual([next(results) for _ in range(3)], [0, 1, 2])
            with self.assertRaises(KeyError):
                next(results)
            self.assertEqual(list(results), [])

    def test_map_raises_the_inputs_error_in_its_turn(self):
        for options in ({}, {"buffersize": 1}, {"chunksize": 1}):
            results = self.pool.map(square, broken_input(), **options)
            self.assertEqual(next(results), 1)
            self.assertRaisesRegex(KeyError, "input", next, results)

    def test_map_with_a_chunksize(self):
        for chunksize in (1, 2, 7, 100):
            self.assertEqual(list(self.pool.map(add, range(20), range(20), chunksize=chunksize)), list(range(0, 40, 2)))
        self.assertEqual(list(self.pool.map(square_async, range(5), chunksize=2)), [0, 1, 4, 9, 16])

    def test_map_of_an_endless_input(self):
        seen = []
        results = self.pool.map(square, endless(seen), buffersize=4)
        self.assertEqual(len(seen), 4)
        self.assertEqual([next(results) for _ in range(10)], [n * n for n in range(10)])
        self.assertLessEqual(len(seen), 14)
        results.close()
        self.assertEqual(self.pool.submit(square, 3).result(SAFETY), 9)
        results = self.pool.map(square, endless(seen := []), chunksize=3, buffersize=6)
        self.assertEqual([next(results) for _ in range(5)], [0, 1, 4, 9, 16])
        self.assertLessEqual(len(seen), 12)
        results.close()

    def test_map_reads_its_sizes(self):
        for options in ({"chunksize": "2"}, {"buffersize": "4"}, {"chunksize": "2", "buffersize": "4"}):
            self.assertEqual(list(self.pool.map(square, range(5), **options)), [0, 1, 4, 9, 16], options)
        self.assertRaisesRegex(ValueError, "chunksize='two'", self.pool.map, square, [1], chunksize="two")

    def test_map_has_at_most_buffersize_items_in_flight(self):
        """Those of chunks, too. A chunk that has come is in flight no more, though not all of it is yielded."""
        for chunksize, buffersize in ((1, 2), (10, 2), (2, 5), (3, 4), (4, 4), (2, 1)):
            with self.subTest(chunksize=chunksize, buffersize=buffersize):
                results = self.pool.map(square, endless(seen := []), chunksize=chunksize, buffersize=buffersize)
                self.assertIn(len(seen), range(1, buffersize + 1))
                chunk = min(chunksize, buffersize)
                for n in range(12):
                    self.assertEqual(next(results), n * n)
                    self.assertLessEqual(len(seen), (n // chunk + 1) * chunk + buffersize)
                results.close()

    def test_map_keeps_nothing_that_it_has_yielded(self):
        """Nor when a later item of the chunk fails."""
        for options in ({}, {"chunksize": 3}, {"buffersize": 2}, {"chunksize": 2, "buffersize": 4}, {"progress": True}):
            with self.subTest(options), contextlib.redirect_stderr(io.StringIO()):
                results, gone = self.pool.map(sole_unless_3, [0, 1, 2, 4, 5, 6, 7, 3], **options), []
                for result in itertools.islice(results, 6):         # its end would take all with it
                    reference = weakref.ref(result)
                    del result
                    if self.mode == "ray":      # where a future is part of a cycle, and a thread may still have it in hand
                        until(lambda: gc.collect() >= 0 and reference() is None)
                    gone.append(reference() is None)
                self.assertEqual(gone, [True] * 6)
                next(results)
                self.assertRaises(KeyError, next, results)

    def test_map_rejects_impossible_sizes(self):
        for options in ({"chunksize": 0}, {"chunksize": None}, {"buffersize": 0}, {"buffersize": 1.5}):
            name = next(iter(options))
            self.assertRaisesRegex(ValueError, name, self.pool.map, square, [1], **options)

    def test_blocking_changes_nothing_for_map(self):
        pool = self.make(TaskWorker, blocking=True)
        self.assertEqual(pool.submit(square, 3), 9)
        self.assertEqual(list(pool.map(square, range(5), chunksize=2)), [0, 1, 4, 9, 16])

    def test_unwrapping_in_map(self):
        futures = [self.pool.submit(square, n) for n in range(3)]
        self.assertEqual(list(self.pool.map(square, futures)), [0, 1, 16])

    def test_a_bound_function(self):
        for pool in (self.make(TaskWorker, init={"fn": add}), self.make(TaskWorker, add)):
            self.assertEqual((pool(1).result(SAFETY), pool.submit(1, b=5).result(SAFETY)), (11, 6))
            self.assertEqual(list(pool.map([1, 2], [3, 4])), [4, 6])
            self.assertEqual(list(pool.map([1, 2])), [11, 12])
        self.assertRaisesRegex(TypeError, "callable", TaskWorker.options(mode=self.mode).init, fn=3)

    def test_tuples_are_spread_where_one_argument_is_not_enough(self):
        pairs = [(1, 2), (3, 4)]
        self.assertEqual(list(self.make(TaskWorker, init={"fn": pow}).map(pairs)), [1, 81])
        self.assertEqual(list(self.make(TaskWorker, init={"fn": pow}).map(pairs, chunksize=2)), [1, 81])
        self.assertEqual(list(self.make(TaskWorker, init={"fn": len}).map(pairs)), [2, 2])
        for limits, expected in ((None, True), ([ResourceLimit("x", 1)], True)):        # which are no argument of the caller's
            pool = self.make(TaskWorker, limits=limits, init={"fn": with_limits})
            self.assertEqual(list(pool.map(pairs)), [(pair, expected) for pair in pairs])
        self.assertEqual(list(self.make(TaskWorker, init={"fn": lambda a, b=0: (a, b)}).map(pairs)), [(p, 0) for p in pairs])

    def test_run_in_executor(self):
        async def main():
            loop = asyncio.get_running_loop()
            return await asyncio.gather(*(loop.run_in_executor(self.pool, square, n) for n in range(5)))
        self.assertEqual(asyncio.run(main()), [0, 1, 4, 9, 16])

    def test_shutdown_as_an_executor(self):
        future = self.pool.submit(square, 3)
        self.pool.shutdown(wait=True, cancel_futures=False)
        self.assertEqual(future.result(0), 9)
        self.assertRaises(RuntimeError, self.pool.submit, square, 3)
        self.assertRaises(RuntimeError, lambda: list(self.pool.map(square, [1])))

    def test_a_limits_parameter(self):
        pool = self.make(TaskWorker, init={"fn": with_limits})
        self.assertEqual(pool(3).result(SAFETY), (3, True))
        self.assertEqual(list(pool.map([1, 2], chunksize=2)), [(1, True), (2, True)])
        self.assertEqual(self.make(TaskWorker, init={"fn": with_default_limits})(3).result(SAFETY), (3, "mine"))


over_modes(globals(), [FunctionTests])


def numbers(*args):
    yield 1


async def numbers_async(*args):
    yield 1


class Numbers:
    def __call__(self, *args):
        yield 1

    def each(self, *args):
        yield 1


@types.coroutine
def stepwise(x):
    yield from asyncio.sleep(0)
    return x * x


class Stepwise(Worker):
    @types.coroutine
    def square(self, x):
        return (yield from stepwise(x))


class Yields(Worker):
    """Methods whose bodies would run in whoever iterates over what they return, and one that does so itself."""

    def each(self):
        yield 1

    async def each_async(self):
        yield 1

    @staticmethod
    def static():
        yield 1

    @classmethod
    async def of_class(cls):
        yield 1

    def listed(self):
        return list(self.each())


class GeneratorTests:
    """4.8: the body of a generator function would run in the caller."""

    def refused(self, name, call, *args):
        with self.subTest(call=call), \
                self.assertRaisesRegex(TypeError, rf"{name}\(\) is a generator function: its body would run in the caller"):
            call(*args)

    def test_methods(self):
        worker = self.make(Yields)
        for name in ("each", "each_async", "static", "of_class"):
            self.refused(f"^{name}", lambda: getattr(worker, name)())
        self.assertEqual(worker.listed().result(SAFETY), [1])

    def test_functions(self):
        pool = self.make(TaskWorker)
        for fn in (numbers, numbers_async, Numbers(), Numbers().each, lambda *args: (yield),
                   functools.partial(numbers, 1), functools.partial(functools.partial(numbers_async, 1), 2)):
            self.refused("", pool.submit, fn)
            self.refused("", pool.map, fn, [1])
            self.refused("", functools.partial(pool.map, fn, [1, 2], chunksize=2))
        if self.mode not in AWAY:               # a generator may be an argument
            self.assertEqual(pool.submit(list, numbers()).result(SAFETY), [1])

    def test_bound_functions(self):
        for fn in (numbers, numbers_async, functools.partial(numbers, 1), Numbers()):
            for bound in (self.make(TaskWorker, init={"fn": fn}), task(mode=self.mode)(fn)):
                self.refused("", bound)
                self.refused("", bound.submit)
                self.refused("", bound.map, [1])



over_modes(globals(), [GeneratorTests])


class ClientTests:
    """6.1a: what clients of executors do with a handle of functions."""

    def test_the_number_of_workers(self):
        with Executor(self.mode) as pool:
            self.assertEqual(pool._max_workers, pool.max_workers)
        if self.mode in ("thread", "process"):
            pool = self.make(TaskWorker, max_workers=2)
            pool.resize(3)
            self.assertEqual((pool._max_workers, pool.max_workers), (3, 3))

    def test_attributes_are_set_and_deleted(self):
        for pool in (self.make(TaskWorker), self.make(TaskWorker, square)):
            pool.label = "mine"
            self.assertEqual(pool.label, "mine")
            del pool.label
            self.assertRaises(AttributeError, lambda: pool.label)
            kept = pool._pool
            for name in ("mode", "blocking", "limits", "_max_workers", "_pool"):
                self.assertRaises(AttributeError, setattr, pool, name, 1)
                self.assertRaises(AttributeError, delattr, pool, name)
            self.assertIs(pool._pool, kept)
            self.assertEqual((pool.mode, pool._max_workers), (ExecutionMode(self.mode), 1))
        self.assertRaises(AttributeError, setattr, self.make(Counter), "label", "mine")

    def test_what_can_be_called(self):
        self.assertFalse(callable(self.make(TaskWorker)))
        with Executor(self.mode) as pool:
            self.assertFalse(callable(pool))
        self.assertTrue(callable(self.make(TaskWorker, init={"fn": square})))
        self.assertTrue(callable(task(mode=self.mode)(square)))

    def test_what_a_closed_one_raises(self):
        async def in_executor(pool):
            return await asyncio.get_running_loop().run_in_executor(pool, square, 3)
        for end in (lambda pool: pool.shutdown(), lambda pool: pool.stop(), lambda pool: pool.shutdown(wait=False)):
            pool, bound = self.make(TaskWorker), self.make(TaskWorker, square)
            end(pool)
            end(bound)
            for refused in (lambda: pool.submit(square, 3), lambda: list(pool.map(square, [3])), lambda: bound(3),
                            lambda: asyncio.run(in_executor(pool)), lambda: list(bound.map([3, 4], chunksize=2))):
                self.assertRaisesRegex(RuntimeError, "cannot schedule new futures after shutdown", refused)

    def test_what_it_raises_when_exit_has_ended_it(self):
        code = textwrap.dedent("""
            import atexit, sys
            import concurry
            pool = concurry.TaskWorker.options(mode=sys.argv[1]).init()
            pool.submit(abs, 1).result()
            def late():
                try: pool.submit(abs, 1)
                except RuntimeError as error: print("cannot schedule new futures after interpreter shutdown" in str(error))
            atexit.register(late)
        """)
        self.assertEqual(run_script((Cluster.joining or "") + code, self.mode).stdout, "True\n")

    def test_what_it_raises_once_exit_has_begun(self):
        """In a done-callback of a call that exit cancels, for it waits for somebody else's future."""
        code = textwrap.dedent("""
            import sys, threading
            import concurry
            pool = concurry.TaskWorker.options(mode=sys.argv[1]).init()
            pool.submit(abs, 1).result()
            def late(future):
                for way in (lambda: pool.submit(abs, 1), lambda: list(pool.map(abs, [1]))):
                    try: way()
                    except RuntimeError as error:
                        print("cannot schedule new futures after interpreter shutdown" in str(error))
            # In sync mode the caller waits.
            threading.Thread(target=pool.submit, args=(abs, concurry.BaseFuture()), daemon=True).start()
            while not pool._pool.calls: pass
            next(iter(pool._pool.calls)).future.add_done_callback(late)
        """)
        ended = run_script((Cluster.joining or "") + code, self.mode)
        self.assertEqual(ended.stdout, "True\n" * 2)


over_modes(globals(), [ClientTests])


class WithPackagesTests(CleanTestCase):
    """6.1a: packages that are given an executor."""

    def test_dask(self):
        dask = self.need("dask")
        for mode, schedulers in (("thread", ["threads"]), ("process", ["threads", "processes"])):
            pool = self.start(TaskWorker, mode=mode, max_workers=2)
            values = [dask.delayed(square)(n) for n in range(10)]
            total = dask.delayed(sum)(values)
            self.assertEqual(dask.compute(*values, total, scheduler=pool), (*map(square, range(10)), 285))
            for scheduler in schedulers:
                with self.subTest(mode=mode, scheduler=scheduler):
                    self.assertEqual(dask.compute(*values, total, scheduler=scheduler, pool=pool), (*map(square, range(10)), 285))
                    with dask.config.set(pool=pool, scheduler=scheduler):
                        self.assertEqual(total.compute(), 285)
            self.assertGreater(pool.stats()["done"], 0)

    def test_more_executors(self):
        """A thread of theirs submits; where the handle is shut down it ends quietly, as with the standard library's."""
        more = self.need("more_executors")
        for mode, end in (("thread", "shutdown"), ("process", "stop")):
            raised, tries = [], os.path.join(self.folder(), "tries")
            pool = self.start(TaskWorker, mode=mode, max_workers=2)
            retrying = more.RetryExecutor(pool, max_attempts=3, sleep=0)
            timed = more.TimeoutExecutor(more.MapExecutor(retrying, lambda n: n * 10), timeout=SAFETY)
            self.assertEqual([timed.submit(square, n).result(SAFETY) for n in range(3)], [0, 10, 40])
            self.assertEqual(timed.submit(fail_twice, tries).result(SAFETY), 30)
            self.assertIsInstance(timed.submit(square, "x").exception(SAFETY), TypeError)
            with unittest.mock.patch.object(threading, "excepthook", raised.append):
                getattr(pool, end)()
                timed.submit(square, 3)
                retrying._submit_thread.join(SAFETY)
            self.assertEqual([hooked.exc_value for hooked in raised], [])
            timed.shutdown()
            self.assertEqual([thread for thread in threading.enumerate() if "Executor" in thread.name], [])


def fail_twice(path):
    with open(path, "a") as file:
        file.write("x")
    if os.path.getsize(path) < 3:
        raise OSError("again")
    return 3


def move_a_bar(desc, n, die=False):
    for x in ProgressBar(range(n), desc=desc):
        if die and x:
            os._exit(3)
    return n


def move_in_a_nested_process(desc):
    with Executor("process", 1) as pool:
        return pool.submit(move_a_bar, desc, 3).result()


class MapProgressTests:
    """`progress=` of map, and bars inside of calls."""

    def setUp(self):
        self.stream = Stream()
        patch = unittest.mock.patch.object(sys, "stderr", self.stream)
        patch.start()
        self.addCleanup(patch.stop)
        self.pool = self.make(TaskWorker)

    def test_of_all_kinds_of_input(self):
        for options, inputs, ending in (
                ({}, (range(5), [1] * 9), "100% 5/5"), ({}, (iter(range(5)), [1] * 9), "5 it"), ({}, ([], [1]), "100% 0/0"),
                ({"chunksize": 2}, (range(5), [1] * 9), "100% 5/5"),
                ({"buffersize": 2}, (itertools.count(), [1] * 5), "5 it")):
            self.stream.text = ""
            results = list(self.pool.map(pow, *inputs, progress={"desc": "powers"}, **options))
            self.assertEqual(results, list(range(5)) if inputs[0] else [])
            self.assertRegex(self.stream.text, rf"^powers: {ending} .* success\n$")

    def test_failures(self):
        calls = []
        results = self.pool.map(square, [1, 2, "x", 3], progress=lambda *told: calls.append(told))
        self.assertRaises(TypeError, list, results)
        results = self.pool.map(square, [1, 2, "x", 3], progress=True)
        self.assertRaises(TypeError, list, results)
        self.assertRegex(self.stream.text, r"1 failed, TypeError\] failure\n$")
        self.assertEqual(calls[-1][1], 4)

    def test_failures_in_chunks(self):
        results = self.pool.map(square, [1, 2, "x", 3, "y", "z"], chunksize=3, progress=True)
        self.assertRaises(TypeError, list, results)
        if self.mode != "ray":                  # whose results are not looked at before somebody asks
            self.assertRegex(self.stream.text, r"[1-3] failed, TypeError\] failure\n$")

    def test_leaving_early(self):
        results = self.pool.map(square, itertools.count(), buffersize=3, progress={"desc": "squares"})
        self.assertEqual([next(results) for _ in range(3)], [0, 1, 4])
        results.close()
        self.assertRegex(self.stream.text, r"^squares: \d+ it .* stopped\n$")

    def test_a_bar_in_a_call(self):
        self.assertEqual(self.pool.submit(move_a_bar, "inside", 3).result(SAFETY), 3)
        if self.mode != "ray":                  # which carries lines to its driver, some time
            self.assertRegex(self.stream.text, r"^inside: 100% 3/3 .* success\n$")


over_modes(globals(), [MapProgressTests])


class ProgressOfProcessesTests(BarTestCase):
    def test_on_the_parents_terminal(self):
        stream = self.stream(80)
        with Executor("process", 2) as pool:
            self.assertEqual(list(pool.map(move_a_bar, ["a", "b"], [3, 4], progress={"desc": "all"})), [3, 4])
        self.assertEqual([line[:7] for line in sorted(stream.screen())], ["", "a: 100%", "all: 10", "b: 100%"])

    def test_of_a_process_that_dies(self):
        stream = self.stream()
        with self.assertLogs("concurry", "WARNING"), Executor("process", 1) as pool:
            self.assertRaises(WorkerDiedError, pool.submit(move_a_bar, "fatal", 9, True).result, SAFETY)
        self.assertRegex(stream.text, r"^fatal: .* stopped\n$")

    def test_of_a_process_of_a_process(self):
        stream = self.stream()
        with Executor("process", 1) as pool:
            self.assertEqual(pool.submit(move_in_a_nested_process, "deep").result(SAFETY), 3)
        self.assertRegex(stream.text, r"^deep: 100% 3/3 .* success\n$")

    def test_on_its_own_standard_error(self):
        result = run_script("""
            import concurry
            def work():
                for _ in concurry.ProgressBar(range(3), style="ray", desc="here"):
                    pass
            with concurry.Executor("process", 1) as pool:
                pool.submit(work).result()
        """)
        self.assertRegex(result.stderr, r"^here: 100% 3/3 .* success\n$")


class ShownTests(CleanTestCase):
    """What a call is called, in errors, reprs and dumps: by the name that the user knows."""

    def test_of_functions(self):
        pool = self.start(TaskWorker, mode="process", max_queued_tasks=None)
        with self.assertLogs("concurry", "WARNING"):
            self.assertRegex(str(pool.submit(os._exit, 3).exception(SAFETY)), r"while it ran submit\(_exit\)$")
            error = in_thread(lambda: list(pool.map(os._exit, [3, 3], chunksize=2))).exception(SAFETY)
            self.assertRegex(str(error), r"while it ran _exit\(\) for a chunk of 2 items$")
            bound = self.start(TaskWorker, mode="process", init={"fn": os._exit})
            self.assertRegex(str(bound(3).exception(SAFETY)), r"while it ran _exit\(\)$")
        started, go = self.flag(), self.flag()
        held = pool.submit(hold, started, go)
        started.wait()
        self.assertIn("of TaskWorker.submit(hold)>", repr(held))
        out = io.StringIO()
        pool.dump(out)
        self.assertRegex(out.getvalue(), r"submit\(hold\)")
        go.set()


class MapPickleTests(CleanTestCase):
    def test_an_item_that_does_not_travel(self):
        """It is named, and not what concurry makes of the function."""
        with self.start(TaskWorker, mode="process") as pool:
            with self.assertRaisesRegex(pickle.PicklingError, r"^argument 2 of submit\(\): cannot pickle '_thread.lock'"):
                list(pool.map(str, [threading.Lock()]))


class MapRunningTests:
    """`map` where items can be held up."""

    def setUp(self):
        self.started, self.go = self.flag(), self.flag()
        self.pool = self.make(TaskWorker, max_queued_tasks=2)
        self.addCleanup(self.go.set)

    def test_a_timeout_counts_from_the_call_and_ends_a_wait_for_the_queue(self):
        held = self.pool.submit(hold, self.started, self.go)
        self.started.wait()
        for options in ({}, {"chunksize": 2}, {"buffersize": 1}):
            with self.assertRaises(TimeoutError):
                list(self.pool.map(square, range(10), timeout=0.01, **options))
        self.go.set()
        self.assertEqual(held.result(SAFETY), "held")
        self.assertEqual(self.pool.submit(square, 3).result(SAFETY), 9)

    def test_a_timeout_tells_the_seconds_that_were_given(self):
        pool = self.make(TaskWorker, max_queued_tasks=None)
        held = pool.submit(hold, self.started, self.go)
        for options in ({}, {"chunksize": 2}, {"buffersize": 1}, {"buffersize": 4, "chunksize": 2}):
            with self.assertRaisesRegex(TimeoutError, r"^map\(\) has not had all its results within 0\.05 seconds$"):
                list(pool.map(square, range(4), timeout=0.05, **options))
        self.go.set()
        self.assertEqual(held.result(SAFETY), "held")

    def test_leaving_early_cancels_the_rest(self):
        pool, ran = self.make(TaskWorker, max_queued_tasks=None), self.flag()
        what = ["pass", "hold", *["run"] * 50]
        results = pool.map(item, what, *([flag] * 52 for flag in (self.started, self.go, ran)))
        self.assertEqual(next(results), "pass")
        self.started.wait()
        results.close()
        self.go.set()
        self.assertEqual(pool.submit(square, 3).result(SAFETY), 9)
        # A process may have been sent a few ahead.
        self.assertLess(ran.count(), 1 if self.mode == "thread" else 40)

    def test_all_items_are_submitted_at_the_call(self):
        pool, seen = self.make(TaskWorker, max_queued_tasks=None), []
        results = pool.map(square, (seen.append(n) or n for n in range(50)))
        self.assertEqual(len(seen), 50)
        self.assertEqual(sum(results), sum(n * n for n in range(50)))

    def test_a_chunk_takes_one_place(self):
        submitted = in_thread(lambda: self.pool.map(square, range(100), chunksize=50)).result(SAFETY)
        self.assertEqual(len(list(submitted)), 100)
        self.assertEqual(self.pool.get_pool_stats()["load_balancer"]["total_dispatched"], 2)


def item(what, started, go, ran):
    if what == "hold":
        hold(started, go)
    elif what == "run":
        ran.set()
    return what


over_modes(globals(), [MapRunningTests], ["thread", "process", "ray"])


class UnaskedTests:
    """Calls that failed and that nobody has asked about: told once, at the end of their handle."""

    def told(self, body, *args):
        """Return what is logged while a body runs, and whatever it has left is collected."""
        with self.assertLogs("concurry", "WARNING") as logs:
            body(*args)
            gc.collect()
            logging.getLogger("concurry").warning("the end")
        self.assertEqual(logs.records.pop().getMessage(), "the end")
        return [record.getMessage() for record in logs.records]

    def test_at_the_end_of_the_handle(self):
        for end in ("shutdown", "stop"):
            pool = self.make(TaskWorker, max_queued_tasks=None)
            self.assertEqual(self.told(self.fail_and_forget, pool), [])
            self.assertEqual(self.told(getattr(pool, end)), [
                "TaskWorker: at least 3 calls failed, and nobody asked for their results; the first error: KeyError: 'one'"])
            self.assertEqual(self.told(getattr(pool, end)), [])

    def fail_and_forget(self, pool):
        for text in ("one", "two", "three"):
            pool.submit(raise_key_error, text)
        self.assertEqual(pool.submit(square, 3).result(SAFETY), 9)
        gc.collect()                        # an exception may be part of a cycle

    def test_all_are_counted(self):
        def use():
            with self.make(TaskWorker, max_queued_tasks=None) as pool:
                for n in range(10):
                    pool.submit(raise_key_error, n)
                until(lambda: not pool._pool.calls)
                gc.collect()            # of an exception its traceback may keep its future
        self.assertEqual(self.told(use), [
            "TaskWorker: at least 10 calls failed, and nobody asked for their results; the first error: KeyError: 0"])

    def test_of_a_handle_that_is_dropped(self):
        def use():
            pool = TaskWorker.options(mode=self.mode, max_queued_tasks=None).init()
            self.fail_and_forget(pool)
            backend = pool._pool.backends[0].ended
            del pool
            gc.collect()
            wait([backend], SAFETY)
        self.assertEqual(self.told(use), [
            "TaskWorker: at least 3 calls failed, and nobody asked for their results; the first error: KeyError: 'one'"])

    def test_of_methods(self):
        worker = self.make(Counter)
        worker.fail(ValueError("mine"))
        worker.fail_async(ValueError("mine"))
        worker.add().result(SAFETY)
        until(lambda: worker.stats()["failed"] == 2)
        gc.collect()
        self.assertEqual(self.told(worker.shutdown), [
            "Counter: at least 2 calls failed, and nobody asked for their results; the first error: ValueError: mine"])

    def test_but_those_that_somebody_has_asked_for(self):
        def awaited(pool):
            async def main():
                with self.assertRaises(KeyError):
                    await pool.submit(raise_key_error, "awaited")
                with self.assertRaises(KeyError):
                    await asyncio.get_running_loop().run_in_executor(pool, raise_key_error, "in executor")
            asyncio.run(main())

        def called_back(pool):
            came = queue.SimpleQueue()
            pool.submit(raise_key_error, "called back").add_done_callback(lambda future: came.put(future.exception()))
            came.get(timeout=SAFETY)

        for ask in (
                lambda pool: self.assertRaises(KeyError, pool.submit(raise_key_error, "result").result, SAFETY),
                lambda pool: pool.submit(raise_key_error, "exception").exception(SAFETY),
                lambda pool: self.assertRaises(KeyError, gather, [pool.submit(raise_key_error, n) for n in range(3)]),
                lambda pool: gather([pool.submit(raise_key_error, n) for n in range(3)], return_exceptions=True),
                lambda pool: pool.submit(square, pool.submit(raise_key_error, "dependency")).exception(SAFETY),
                lambda pool: self.assertRaises(KeyError, list, pool.map(raise_key_error, range(5))),
                lambda pool: self.assertRaises(KeyError, list, pool.map(raise_key_error, range(5), chunksize=2)),
                lambda pool: self.assertRaises(KeyError, next, pool.map(raise_key_error, range(5), buffersize=2)),
                lambda pool: [future.exception() for future in as_completed([pool.submit(raise_key_error, n) for n in range(3)])],
                awaited, called_back):
            pool = self.make(TaskWorker, max_queued_tasks=None)
            pool.submit(raise_key_error, "forgotten")
            with self.subTest(inspect.getsource(ask).strip()[:80]):
                self.assertEqual(self.told(ask, pool) + self.told(pool.shutdown), [
                    "TaskWorker: at least 1 calls failed, and nobody asked for their results; the first error: KeyError: 'forgotten'"])

    def test_of_futures_that_outlive_the_handle(self):
        pool = self.make(TaskWorker, max_queued_tasks=None)
        kept = [pool.submit(raise_key_error, n) for n in range(3)]
        self.assertEqual(self.told(pool.shutdown), [])
        self.assertIsInstance(kept.pop().exception(0), KeyError)
        told, = self.told(kept.clear)
        self.assertRegex(told, r"^TaskWorker: at least \d calls failed, and nobody asked for their results; the first error: KeyError: [01]$")



def raise_key_error(key):
    raise KeyError(key)


over_modes(globals(), [UnaskedTests], MODES)


@task(mode="sync")
def documented(x: int, y: int = 2) -> int:
    """Multiply."""
    return x * y


@task(mode="thread", max_workers=2)
def threaded(x):
    return x + 1


@task(mode="process", max_workers=1)
def processed(x):
    return x + 2


@task(mode="thread")
def limited(x, limits):
    return with_limits(x, limits)


class TaskTests(CleanTestCase):
    def test_it_looks_like_the_function(self):
        self.addCleanup(documented.stop)
        self.assertEqual((documented.__name__, documented.__doc__, str(inspect.signature(documented))),
                         ("documented", "Multiply.", "(x: int, y: int = 2) -> int"))
        self.assertEqual((documented.__wrapped__(3), documented(3, y=5).result(0)), (6, 15))
        self.assertIn("documented", repr(documented))

    def test_it_starts_nothing_until_called(self):
        before = threading.active_count()

        @task(mode="thread")
        def idle():
            return threading.current_thread().name
        self.assertEqual(threading.active_count(), before)
        self.assertNotEqual(idle().result(SAFETY), threading.current_thread().name)
        self.assertTrue(idle.on_demand)
        self.assertEqual(idle.max_workers, 24)
        idle.stop()

    def test_it_is_a_handle(self):
        for function, n in ((threaded, 1), (processed, 2)):
            self.assertEqual((function(3).result(SAFETY), function.submit(4).result(SAFETY)), (3 + n, 4 + n))
            self.assertEqual(list(function.map([1, 2, 3], chunksize=2)), [1 + n, 2 + n, 3 + n])
            self.assertTrue(function.on_demand)
            function.stop()
            self.assertRaises(RuntimeError, function, 1)

    def test_a_limits_parameter(self):
        self.addCleanup(limited.stop)
        self.assertEqual(limited(3).result(SAFETY), (3, True))

        class Mine:
            def try_acquire(self, wanted):
                return types.SimpleNamespace(successful="mine")
        self.assertEqual(limited(3, limits=Mine()).result(SAFETY), (3, "mine"))

    def looked_at(self, function):
        """Do with a task what looks harmless."""
        function.dump(io.StringIO())
        return (repr(function), dir(function), function.stats(), function.get_pool_stats(), function.max_workers,
                function._max_workers, function.limits, function.mode, function.retry_wait, callable(function),
                hasattr(function, "no_such"), inspect.signature(function))

    def test_to_look_at_it_decides_nothing(self):
        """3.3: its configuration is read at the first call."""
        before = threading.active_count()

        @task(mode="thread", on_demand=False)
        def configured():
            return 1

        @task(mode="thread", on_demand=False)
        def configured_for_a_while():
            return 2
        for function in (configured, configured_for_a_while):
            self.addCleanup(function.stop)
            self.looked_at(function)
        self.assertEqual(threading.active_count(), before)
        self.addCleanup(global_config.reset_to_defaults)
        global_config.thread.max_workers = 3
        self.assertEqual((configured.max_workers, configured().result(SAFETY)), (3, 1))
        with temp_config(thread_max_workers=2, global_retry_wait=7):
            self.looked_at(configured_for_a_while)
            self.assertEqual(configured_for_a_while().result(SAFETY), 2)
        for function, workers, wait in ((configured, 3, 1.0), (configured_for_a_while, 2, 7.0)):
            self.assertEqual((function.max_workers, function.get_pool_stats()["total_workers"], function.retry_wait),
                             (workers, workers, wait))

    def test_its_limits_before_the_first_call(self):
        for limits in ([ResourceLimit("slots", 1)], [LimitSet([ResourceLimit("slots", 1)])]):
            @task(mode="thread", limits=limits)
            def held(started, go, limits):
                with limits.acquire():
                    return hold(started, go)
            self.addCleanup(held.stop)
            seen, started, go = held.limits, self.flag(), self.flag()
            self.looked_at(held)
            future = held(started, go)
            started.wait()
            found = in_use(seen if isinstance(seen, LimitSet) else limits[0])
            go.set()
            self.assertEqual((found, future.result(SAFETY)), ({"slots": 1}, "held"))
            self.assertIs(held.limits, seen)

    def test_it_is_resized_before_the_first_call(self):
        @task(mode="thread", on_demand=False)
        def sized():
            return 1
        self.addCleanup(sized.stop)
        sized.resize(2)
        self.assertEqual(sized.max_workers, 2)
        sized().result(SAFETY)
        self.assertEqual((sized.max_workers, sized.get_pool_stats()["total_workers"]), (2, 2))

    def test_options(self):
        @task(mode="asyncio", blocking=True)
        async def answer(x):
            return x
        with answer:
            self.assertEqual(answer(5), 5)

        @task(mode="thread", on_demand=False)
        def kept():
            return threading.get_ident()
        with kept:
            kept().result(SAFETY)
            self.assertEqual(kept.get_pool_stats()["total_workers"], 24)
        self.assertRaisesRegex(ValueError, "max_workers=2", task, mode="sync", max_workers=2)

    def test_first_called_by_many_threads_at_once(self):
        @task(mode="thread", max_workers=2, on_demand=False)
        def where(x):
            return x
        barrier = threading.Barrier(4)
        runs = [in_thread(lambda n: (barrier.wait(SAFETY), where(n))[1].result(SAFETY), n) for n in range(4)]
        self.assertEqual(gather(runs), list(range(4)))
        self.assertEqual(where.get_pool_stats()["total_workers"], 2)
        where.stop()

    def test_resized_before_the_first_call(self):
        other = self.start(TaskWorker, mode="process", max_workers=1)
        processed_at_once = task(mode="process", on_demand=False, max_workers=1)(square)
        with processed_at_once:
            processed_at_once.resize(2)
            self.assertEqual(gather([processed_at_once(n) for n in range(4)], timeout=SAFETY), [0, 1, 4, 9])
            self.assertEqual(processed_at_once.get_pool_stats()["total_workers"], 2)
        self.assertEqual(other.submit(square, 3).result(SAFETY), 9)

    def test_a_task_of_a_method(self):
        with self.assertRaisesRegex(TypeError, "@task is for functions, and .*Owner.double is a method: make .*Owner a worker"):
            class Owner:
                @task(mode="sync")
                def double(self, x):
                    return x * 2

        class Namespace:
            @task(mode="sync")
            def double(x):
                return x * 2
        self.assertEqual((Namespace.double(3).result(0), Namespace().double(3).result(0)), (6, 6))


class ExecutorTests:
    def test_it_is_a_pool_of_functions(self):
        with Executor(self.mode) as pool:
            self.assertIsInstance(pool, concurrent.futures.Executor)
            self.assertEqual(list(pool.map(square, range(5))), [0, 1, 4, 9, 16])
            size = {"thread": 24, "process": 4, "ray": CPUS}.get(self.mode, 1)
            self.assertEqual((pool.max_workers, pool.get_pool_stats()["total_workers"]), (size, size))

    def test_with_a_size_and_options(self):
        with Executor(self.mode, 1, blocking=True) as pool:
            self.assertEqual((pool.submit(square, 3), pool.max_workers), (9, 1))


over_modes(globals(), [ExecutorTests])


# === Looking inside ===

class StatsTests:
    """What `stats` counts."""

    def counts(self, handle, *names):
        stats = handle.stats()
        return tuple(stats[name] for name in names or ("done", "failed", "cancelled", "running", "queued"))

    def test_what_becomes_of_calls(self):
        worker = self.make(Counter)
        gather([worker.add(1) for _ in range(4)])
        self.assertIsInstance(worker.fail(KeyError("x")).exception(SAFETY), KeyError)
        until(lambda: self.counts(worker) == (4, 1, 0, 0, 0))
        stats = worker.stats()
        self.assertEqual(list(stats["workers"]), ["Counter-0"])
        self.assertEqual(stats.pop("workers")["Counter-0"], stats)
        self.assertGreater(stats["time_running"], 0)
        self.assertGreaterEqual(stats["time_waiting"], 0)
        self.assertEqual((stats["retried"], stats["deaths"]), (None if self.mode == "ray" else 0, 0))

    def test_retries_are_counted(self):
        with self.make(TaskWorker, num_retries=3, retry_wait=0) as pool:
            self.assertIsInstance(pool.submit(square, "x").exception(SAFETY), TypeError)
            self.assertEqual(pool.submit(square, 3).result(SAFETY), 9)
            if self.mode != "ray":
                until(lambda: self.counts(pool, "done", "failed", "retried") == (1, 1, 3))
            self.assertEqual(pool.stats()["deaths"], 0)

    def test_a_name_of_the_users_class_wins(self):
        self.assertEqual(self.make(Inspected).stats().result(SAFETY), "my own")


class Inspected(Worker):
    def stats(self):
        return "my own"


over_modes(globals(), [StatsTests])


class PoolStatsTests:
    """Of calls that wait, of workers that are made and unmade."""

    def test_running_and_queued(self):
        started, go = self.flag(), self.flag()
        pool = self.make(Counter, max_workers=2, max_queued_tasks=None)
        held = [pool.hold(started, go) for _ in range(2)]
        until(lambda: started.count() or True)
        more = [pool.add() for _ in range(5)]
        until(lambda: pool.stats()["running"] >= 2)
        if self.mode != "ray":                      # where calls are handed over ahead of their turn
            self.assertEqual([pool.stats()[name] for name in ("running", "queued")], [2, 5])
            self.assertTrue(more[-1].cancel())
            self.assertEqual([pool.stats()[name] for name in ("cancelled", "queued")], [1, 4])
        else:
            more[-1].cancel()
        go.set()
        concurry.wait([*held, *more], SAFETY)
        until(lambda: pool.stats()["done"] + pool.stats()["cancelled"] == 7)
        self.assertEqual(sum(worker["done"] for worker in pool.stats()["workers"].values()), pool.stats()["done"])

    def test_of_workers_that_are_gone(self):
        pool = self.make(Counter, on_demand=True, max_workers=2)
        gather([pool.add() for _ in range(4)])
        pool.fail(KeyError()).exception(SAFETY)
        until(lambda: not pool.stats()["workers"])
        self.assertEqual((pool.stats()["done"], pool.stats()["failed"]), (4, 1))


over_modes(globals(), [PoolStatsTests], ["thread", "process", "ray"])


def hold_for(seconds, started, go):
    """Take so long for the clock by which a worker process measures its calls."""
    clock = time.perf_counter
    hold(started, go)
    time.perf_counter = lambda: clock() + seconds
    return "held"


class InsideTests(CleanTestCase):
    def test_times(self):
        now = itertools.count()                     # a second passes whenever somebody looks
        with unittest.mock.patch.object(concurry, "_now", lambda: float(next(now))):
            worker = self.start(Counter, mode="sync")
            worker.add()
            stats = worker.stats()
        self.assertEqual((stats["time_waiting"], stats["time_running"]), (1.0, 1.0))

    def test_the_time_of_a_long_call(self):
        """Of more than 71 minutes, as many microseconds as an answer can tell."""
        for seconds in (3600, 5000, 10 ** 6):
            clock, started, go = HandClock(), self.flag(), self.flag()
            with unittest.mock.patch.object(concurry, "_now", clock):
                pool = self.start(TaskWorker, mode="process")
                self.assertEqual(pool.submit(square, 3).result(SAFETY), 9)
                clock.now += 10
                long = pool.submit(hold_for, seconds, started, go)
                started.wait()
                clock.now += seconds
                go.set()
                self.assertEqual(long.result(SAFETY), "held")
                self.assertAlmostEqual(pool.stats()["time_running"], seconds, delta=100)
                self.assertAlmostEqual(pool.stats()["time_waiting"], 0, delta=100)

    def test_one_quick_call_makes_no_quick_worker(self):
        """What stands behind a call of a worker that was slow just now can be cancelled."""
        pool, started, go = self.start(TaskWorker, mode="process", max_queued_tasks=None), self.flag(), self.flag()
        go.set()
        self.assertEqual(pool.submit(hold_for, 1.1, started, go).result(SAFETY), "held")
        go.count(), started.count()
        self.assertEqual(pool.submit(square, 3).result(SAFETY), 9)
        held = pool.submit(hold, started, go)
        behind = [pool.submit(square, n) for n in range(3)]
        started.wait()
        self.assertEqual([future.cancel() for future in behind], [True] * 3)
        go.set()
        self.assertEqual(held.result(SAFETY), "held")

    def test_times_of_what_is_killed(self):
        for deaths, end in ((1, lambda call: os.kill(worker._pool.backends[0].link.process.pid, signal.SIGKILL)),
                            (1, lambda call: call.cancel(kill=True)), (0, lambda call: worker.stop(0))):
            started, go = self.flag(), self.flag()
            worker = self.start(Counter, mode="process")
            call = worker.hold(started, go)
            started.wait()
            self.assertEqual(worker.stats()["time_running"], 0)
            with self.assertLogs("concurry"):
                end(call)
                wait([call], timeout=SAFETY)
                until(lambda: worker.get_pool_stats()["restarts"] == 1 or worker._pool.is_stopped)
                concurry.logger.warning("of stop there is none")
            stats = worker.stats()
            self.assertEqual((stats["running"], stats["failed"] + stats["cancelled"], stats["deaths"]), (0, 1, deaths))
            self.assertGreater(stats["time_running"], 0)
            self.assertGreaterEqual(stats["time_waiting"], 0)

    def test_deaths(self):
        worker = self.start(Counter, mode="process")
        with self.assertLogs("concurry", "WARNING"):
            self.assertIsInstance(self.start(TaskWorker, mode="process").submit(os._exit, 3).exception(SAFETY),
                                  WorkerDiedError)
            pid = self.pid_of(worker)
            os.kill(pid, signal.SIGKILL)
            until(lambda: worker.stats()["deaths"] == 1)
            self.assertNotEqual(self.pid_of(worker), pid)
        worker.stop()
        self.assertEqual((worker.stats()["deaths"], worker.stats()["failed"]), (1, 0))

    def pid_of(self, worker):
        return worker._pool.backends[0].link.process.pid if worker.add().result(SAFETY) else None

    def dumped(self, handle):
        file = io.StringIO()
        handle.dump(file)
        return file.getvalue()

    def test_dump_of_threads(self):
        started, go = threading.Event(), threading.Event()
        pool = self.start(Counter, mode="thread", max_workers=2, max_queued_tasks=1)
        held = [pool.hold(started, go)]
        started.wait(SAFETY)
        text = self.dumped(pool)
        self.assertRegex(text, r"^Counter-0: hold\(\) for \d+\.\d s\n")
        self.assertRegex(text, r'File ".*test_concurry.py", line \d+, in hold\n +go.wait\(\)\n')
        self.assertRegex(text, r"\nCounter-1: idle\n$")
        self.assertNotIn("concurry.py\"", text.replace("test_concurry.py", ""))
        held += [pool.hold(started, go)]
        waiting = pool._pool.submit("add", (Counter,), {"n": BaseFuture()})
        self.assertIn("\nCounter: 1 calls wait for a worker, or for futures among their arguments\n", self.dumped(pool))
        waiting.cancel()
        go.set()
        gather(held)

    def test_dump_of_processes(self):
        started, go = self.flag(), self.flag()
        for method in ("forkserver", "spawn", "fork"):
            pool = self.start(Counter, mode="process", max_workers=2, mp_context=method)
            held = pool.hold(started, go)
            started.wait()
            for _ in range(2):
                text = self.dumped(pool)
                self.assertRegex(text, r"^Counter-0 \(pid \d+\): hold\(\) for \d+\.\d s\n  (Current t|T)hread .*\n")
                self.assertRegex(text, r'\n  File ".*test_concurry.py", line \d+ in hold\n')
                self.assertRegex(text, r"\nCounter-1 \(pid \d+\): idle\n$")
                self.assertNotIn("concurry.py\"", text.replace("test_concurry.py", ""))
            started.count()
            go.set()
            self.assertEqual(held.result(SAFETY), "held")
            self.assertEqual(pool.add().result(SAFETY), 1)       # the verdicts' socket is none the worse
            go.count()
            pool.stop()

    def test_dump_of_a_process_that_is_stopped(self):
        started, go = self.flag(), self.flag()
        worker = self.start(Counter, mode="process")
        held = worker.hold(started, go)
        started.wait()
        pid = worker._pool.backends[0].link.process.pid
        os.kill(pid, signal.SIGSTOP)
        with unittest.mock.patch.object(concurry, "_DUMP_TIMEOUT", 0.1):
            self.assertRegex(self.dumped(worker), r"hold\(\) for .* s\n  it does not answer: it is stopped")
        os.kill(pid, signal.SIGCONT)
        go.set()
        self.assertEqual(held.result(SAFETY), "held")

    def test_dump_of_an_event_loop(self):
        worker = self.start(Waiting, mode="asyncio")
        go = threading.Event()
        calls = [worker.outer(), worker.plain(go)]
        until(lambda: worker.stats()["running"] == 2)
        until(lambda: "in inner" in self.dumped(worker))
        text = self.dumped(worker)
        self.assertRegex(text, r"^Waiting-0: (outer\(\) for .* s, plain\(\)|plain\(\) for .* s, outer\(\)) for .* s\n")
        self.assertRegex(text, r"in plain\n +go.wait\(\)\n  in the coroutine outer:\n.*in outer\n.*\n.*in inner\n")
        go.set()
        calls[0].cancel()
        calls[1].result(SAFETY)

    def test_dump_of_a_coroutine_in_a_thread(self):
        worker = self.start(Waiting, mode="thread")
        call = worker.outer()
        until(lambda: re.search(r"^Waiting-0: outer\(\) for .* s\n  in a coroutine:\n.*in outer\n.*\n.*in inner\n",
                                self.dumped(worker)))
        worker._pool.backends[0].runner._loop.call_soon_threadsafe(
            lambda: [task.cancel() for task in asyncio.all_tasks()])
        self.assertRaises(asyncio.CancelledError, call.result, SAFETY)
        self.assertEqual(self.dumped(worker), "Waiting-0: idle\n")

    def test_dump_in_sync_mode(self):
        worker = self.start(Counter, mode="sync")
        started, go = threading.Event(), threading.Event()
        call = in_thread(worker.hold, started, go)
        started.wait(SAFETY)
        self.assertRegex(self.dumped(worker), r"^Counter-0: hold\(\) for .* s\n(.*\n)*.*in hold\n +go.wait\(\)\n")
        go.set()
        call.result(SAFETY)

    def test_reprs(self):
        """Of whatever a debugger meets: its own name, and what matters."""
        limits = LimitSet([ResourceLimit("slots", 2)], config={"account": "a"})
        handle = self.start(Counter, mode="thread", max_workers=2)
        started, go = threading.Event(), threading.Event()
        held = handle.hold(started, go)
        self.addCleanup(go.set)
        started.wait(SAFETY)
        for thing, texts in (
                (handle, ["Counter", "thread", "2 of 2 workers", " calls>"]), (held, ["Counter.hold", "running"]),
                (Counter.options(mode="sync"), ["Counter", "sync"]), (task(square, mode="sync"), ["square", "sync"]),
                (limits, ["slots", "2"]), (limits.acquire(), ["slots", "held"]), (LimitPool([limits]), ["slots", "round_robin"]),
                (limits.async_acquire(), ["async_acquire"]), (RetryConfig(num_retries=3), ["num_retries=3"]),
                (global_config, ["thread", "process"]), (global_config.thread, ["thread", "max_workers=24"]),
                (temp_config(global_num_retries=3), ["global_num_retries=3"]), (LimitSet().acquire(), ["nothing"]),
                (ProgressBar(total=3, disable=True), ["0 of 3"]), (CallLimit(3, "minute"), ["CallLimit", "60"])):
            for text in texts:
                self.assertIn(text, repr(thing))
            self.assertNotIn(" object at 0x", repr(thing))


class OwnWaitTests(CleanTestCase):
    """What would wait for ever is told, where it can be known."""

    def test_of_a_thread(self):
        pool = self.start(TaskWorker, mode="thread", max_queued_tasks=2)
        for wait in (lambda: pool.submit(int).result(), lambda: pool.submit(int).exception(),
                     lambda: concurry.wait([done_future(), pool.submit(int)]), lambda: gather(pool.submit(int), 1),
                     lambda: concurry.wait([pool.submit(int)], return_when="all-completed"),
                     lambda: list(pool.map(abs, range(9)))):
            with self.assertRaisesRegex(RuntimeError, r"call of TaskWorker.(submit\(\w+\)|abs) would be for ever"):
                pool.submit(wait).result(SAFETY)
        self.assertRaises(TimeoutError, pool.submit(lambda: pool.submit(int).result(0.001)).result, SAFETY)
        self.assertEqual(pool.submit(int).result(SAFETY), 0)

    def test_what_can_end_is_waited_for(self):
        pool, other = self.start(TaskWorker, mode="thread", max_workers=2), self.start(TaskWorker, mode="thread")
        self.assertEqual(other.submit(lambda: pool.submit(lambda: pool.submit(int).result()).result()).result(SAFETY), 0)
        growing = self.start(TaskWorker, mode="thread", on_demand=True, max_workers=2)
        self.assertEqual(growing.submit(lambda: growing.submit(int).result()).result(SAFETY), 0)
        inline = self.start(TaskWorker, mode="sync")
        self.assertEqual(inline.submit(lambda: inline.submit(int).result()).result(SAFETY), 0)

    def test_of_an_event_loop(self):
        worker = self.start(SelfWaiting, mode="asyncio")
        for name, is_possible in (("plain_for_coroutine", True), ("coroutine_for_plain", True),
                                  ("plain_for_plain", False), ("coroutine_for_coroutine", False)):
            call = getattr(worker, name)(worker._pool)
            if is_possible:
                self.assertIn(call.result(SAFETY), ("coroutine", "plain"))
            else:
                self.assertRaisesRegex(RuntimeError, "would be for ever", call.result, SAFETY)

    def test_what_others_give_back_is_waited_for(self):
        """A block that somebody else closes, though it is around this very code: an ExitStack's, a wrapper's."""
        limits, stack = LimitSet([ResourceLimit("slots", 1)]), contextlib.ExitStack()

        class Wrapper:
            def __enter__(self):
                self.acquired = limits.acquire()
                self.acquired.__enter__()
                return self

            def __exit__(self, *exc_info):
                self.acquired.release()
        for around in (stack, Wrapper()):
            with self.subTest(around=around), around as entered:
                if around is stack:
                    stack.enter_context(limits.acquire())
                close = stack.close if around is stack else entered.acquired.release
                closing = in_thread(lambda: until(lambda: limits.get_stats()["slots"]["waiting"] == 1) or close())
                with limits.acquire():
                    closing.result(SAFETY)

    def test_a_call_that_may_end_without_a_worker(self):
        pool, dependency = self.start(TaskWorker, mode="thread"), BaseFuture()

        def wait_for_a_failure():
            call = pool.submit(abs, dependency)
            in_thread(lambda: dependency.set_exception(KeyError()))
            return type(call.exception())
        self.assertIs(pool.submit(wait_for_a_failure).result(SAFETY), KeyError)


class SelfWaiting(Worker):
    async def coroutine(self):
        return "coroutine"

    def plain(self):
        return "plain"

    def plain_for_coroutine(self, pool):
        return pool.submit("coroutine", (), {}).result()

    def plain_for_plain(self, pool):
        return pool.submit("plain", (), {}).result()

    async def coroutine_for_coroutine(self, pool):
        return pool.submit("coroutine", (), {}).result()

    async def coroutine_for_plain(self, pool):
        return pool.submit("plain", (), {}).result()


class Waiting(Worker):
    async def outer(self):
        await self.inner()

    async def inner(self):
        await asyncio.get_running_loop().create_future()

    def plain(self, go):
        go.wait()


class CallTimeoutTests:
    """15.5, `call_timeout`: only `hold` has one, or a slow machine would break the others."""

    def setUp(self):
        self.started, self.go = self.flag(), self.flag()
        self.addCleanup(self.see_threads_end, threading.enumerate())
        self.addCleanup(self.go.set)
        self.logs = self.logged()

    def logged(self):
        logger = logging.getLogger("concurry")
        handler = logging.handlers.BufferingHandler(1000)
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)
        return handler.buffer

    def see_threads_end(self, before):
        """Those that are just being started, too: they cannot be joined."""
        until(lambda: not any(thread.name.startswith(("Counter", "TaskWorker"))
                              for thread in set(threading.enumerate()) - set(before)))

    def assert_overran(self, call, name="hold"):
        error = call.exception(SAFETY)
        self.assertIsInstance(error, concurry.CallTimeoutError)
        self.assertRegex(str(error), rf"^\w+-\d ran ({name}\(\)|submit\({name}\)) for more than 0.1 seconds, its call_timeout: ")
        self.assertIn(error.method, (name, "submit"))
        self.assertEqual(error.timeout, 0.1)
        for kind in (TimeoutError, concurrent.futures.TimeoutError, asyncio.TimeoutError):
            self.assertIsInstance(error, kind)

    def test_what_has_failed_is_not_made_again(self, **options):
        worker = self.make(FailsWhenTold, call_timeout=0.1, num_retries=5, retry_wait=0, **options)
        call = worker.run(self.started, self.go)
        error = call.exception(SAFETY)
        self.assertIsInstance(error, concurry.CallTimeoutError)
        self.assertEqual(self.started.count(), 1)
        until(lambda: worker.stats()["deaths"] == 1)
        self.go.set()
        worker.stop()
        if self.mode == "thread":
            self.see_threads_end([threading.main_thread()])
        self.assertEqual(self.started.count(), 0)

    def test_the_call_fails_and_the_others_go_on(self):
        worker = self.make(Counter, call_timeout={"hold": 0.1}, max_queued_tasks=None)
        calls = [worker.add(), worker.hold(self.started, self.go), *(worker.echo(n) for n in range(5))]
        self.assert_overran(calls[1])
        self.assertEqual(gather(calls[:1] + calls[2:], timeout=SAFETY), [1, 0, 1, 2, 3, 4])
        self.assertEqual((worker.stats()["deaths"], worker.stats()["failed"], worker.stats()["queued"]), (1, 1, 0))
        self.assertEqual(worker.get_pool_stats()["total_workers"], 1)
        # A loop and its object live on; a worker that was replaced begins anew.
        self.assertEqual(worker.add().result(SAFETY), 2 if self.mode == "asyncio" else 1)
        self.assertTrue(any("given up" in record.getMessage() or "was killed" in record.getMessage() for record in self.logs))
        self.assert_overran(worker.hold(self.started, self.go))
        with worker:
            last = worker.add()
        self.assertEqual(last.result(0), 3 if self.mode == "asyncio" else 1)

    def test_at_the_end(self):
        """A worker that is left to itself holds up neither shutdown nor stop."""
        for end in ("shutdown", "stop"):
            worker = self.make(Counter, call_timeout={"hold": 0.1})
            backend, = worker._pool.backends
            call = worker.hold(self.started, self.go)
            self.started.wait()
            self.started.count()
            getattr(worker, end)()
            self.assert_overran(call)
            until(backend.ended.done)           # who began to wait for that before it was given up

    def test_no_alarm_is_left(self):
        worker = self.make(Counter, call_timeout=3600, max_queued_tasks=None)
        gather([worker.add() for _ in range(200)])
        reader = concurry._readers[os.getpid()]
        until(lambda: sum(timer[2] is not None for timer in reader.timers) == 0)
        self.assertLess(len(reader.timers), 100)

    def test_bad_input(self):
        for value, text in ((0, "above 0"), (-1, "above 0"), ("soon", "above 0"), ({"hld": 1}, "did you mean 'hold'")):
            self.assertRaisesRegex(ValueError, text, Counter.options, mode=self.mode, call_timeout=value)


over_modes(globals(), [CallTimeoutTests], ["thread", "process", "asyncio"])


class FailsWhenTold(Worker):
    def run(self, started, go, error=None):
        started.set()
        go.wait()
        raise error or KeyError("told")


class CallTimeoutPoolTests(CallTimeoutTests):
    def test_in_a_pool(self):
        pool = self.make(Counter, call_timeout={"hold": 0.1}, max_workers=3, max_queued_tasks=None)
        calls = [pool.hold(self.started, self.go), *(pool.add() for _ in range(8))]
        self.assert_overran(calls[0])
        gather(calls[1:], timeout=SAFETY)
        until(lambda: sorted(pool.stats()["workers"]) == ["Counter-0", "Counter-1", "Counter-2"])
        self.assertEqual((pool.stats()["deaths"], pool.get_pool_stats()["restarts"]), (1, 1))
        self.assertEqual(sum(stats["deaths"] for stats in pool.stats()["workers"].values()), 1)
        self.assertEqual(pool.get_pool_stats()["load_balancer"]["total_dispatched"], 9)

    def test_on_demand(self):
        for cls in (Counter, TaskWorker):
            name = "hold" if cls is Counter else "submit"
            pool = self.make(cls, call_timeout={name: 0.1}, on_demand=True, max_workers=1)
            held = pool.hold(self.started, self.go) if cls is Counter else pool.submit(hold, self.started, self.go)
            self.assert_overran(held)
            if cls is Counter:
                self.assertEqual(pool.add().result(SAFETY), 1)
            until(lambda pool=pool: pool.stats()["deaths"] == 1)
            pool.shutdown()             # which does not wait for what was given up
            self.assertEqual(pool.stats()["failed"], 1)

    def test_on_demand_what_has_failed_is_not_made_again(self):
        self.test_what_has_failed_is_not_made_again(on_demand=True)

    def test_a_worker_that_a_resize_has_end(self):
        pool = self.make(Counter, call_timeout={"hold": 0.1}, max_workers=2)
        calls = [pool.hold(self.started, self.go), pool.hold(self.started, self.go)]
        self.started.wait()
        pool.resize(1)
        for call in calls:
            self.assert_overran(call)
        until(lambda: pool.stats()["deaths"] == 2 and pool.get_pool_stats()["restarts"] == 1)
        pool.shutdown()

    def test_a_coroutine(self):
        if self.mode == "thread":           # whose thread would wait for ever
            return
        worker = self.make(Endless, call_timeout={"for_ever": 0.1})
        self.assert_overran(worker.for_ever(), "for_ever")
        self.assertEqual(worker.soon().result(SAFETY), "soon")

    def test_a_replacement_that_cannot_be_built(self):
        worker = self.make(BuiltOnce, self.started.path + ".built", call_timeout={"hold": 0.1})
        self.addCleanup(os.unlink, self.started.path + ".built")
        calls = [worker.hold(self.started, self.go), worker.fine()]
        self.assert_overran(calls[0])
        self.assertIsInstance(calls[1].exception(SAFETY), ZeroDivisionError)
        self.assertIsInstance(worker.fine().exception(SAFETY), ZeroDivisionError)


over_modes(globals(), [CallTimeoutPoolTests], ["thread", "process"])
del ThreadCallTimeoutTests, ProcessCallTimeoutTests          # noqa: F821, made above: they are among these


class CallTimeoutAsyncioTests(CleanTestCase):
    def test_one_that_waits_for_its_next_attempt_costs_no_other(self):
        started, go = self.flag(), self.flag()
        worker = self.start(Counter, mode="asyncio", num_retries=1, retry_wait=3600, retry_jitter=0,
                            call_timeout={"fail": 0.1})
        failing, killed = worker.fail(KeyError()), worker.add("no number")
        held = worker.hold(started, go)
        started.wait()
        self.assertRegex(str(failing.exception(SAFETY)), "its call_timeout: it was waiting for its next attempt$")
        self.assertTrue(killed.cancel(kill=True))
        backend, = worker._pool.backends
        self.assertEqual((len(backend.at_work), worker.stats()["deaths"]), (1, 0))
        go.set()
        self.assertEqual(held.result(SAFETY), "held")

    def test_a_plain_method_that_is_cancelled_just_when_it_begins(self):
        worker = self.start(Counter, mode="asyncio")
        backend, = worker._pool.backends
        attempt = backend._attempt

        def cancelled_first(call):
            self.assertTrue(call.future.cancel(kill=True))
            return attempt(call)
        with unittest.mock.patch.object(backend, "_attempt", cancelled_first), \
                unittest.mock.patch.object(backend.runner, "attempt") as attempted:
            self.assertRaises(concurrent.futures.CancelledError, worker.add().result, SAFETY)
            until(lambda: not backend.at_work and backend.plain.empty())
        self.assertEqual((worker.add().result(SAFETY), worker.stats()["deaths"], attempted.called), (1, 0, False))

    def test_a_plain_method_that_ends_just_when_it_is_given_up(self):
        worker = self.start(Counter, mode="asyncio")
        backend, companion = worker._pool.backends[0], worker._pool.backends[0].companion
        started, go = self.flag(), self.flag()
        held = worker.hold(started, go)
        call, = worker._pool.calls
        go.set()
        self.assertEqual(held.result(SAFETY), "held")
        until(lambda: not backend.at_work)
        backend._replace_companion(call)
        self.assertEqual((backend.companion, worker.stats()["deaths"]), (companion, 0))


class CallTimeoutProcessTests(CleanTestCase):
    def test_a_call_that_is_run_again_has_its_time_again(self):
        started, go = self.flag(), self.flag()
        worker = self.start(DiesOnce, started.path + ".died", mode="process", crash_retries=1, call_timeout={"run": 0.3})
        self.addCleanup(os.unlink, started.path + ".died")
        with self.assertLogs("concurry", "WARNING"):
            call = worker.run(started, go)
            self.assertIsInstance(call.exception(SAFETY), CallTimeoutError)
        go.set()

    def test_one_that_ends_just_then_costs_no_other(self):
        """Its alarm rings, and its answer is there: the process goes on."""
        worker = self.start(Counter, mode="process", call_timeout=3600, max_queued_tasks=None)
        gather([worker.add() for _ in range(50)], timeout=SAFETY)       # quick: calls are sent ahead
        pool = worker._pool
        backend, = pool.backends
        for _ in range(20):
            calls = [worker.add() for _ in range(8)]
            first = next(iter(pool.calls), None)
            if first is not None:
                backend.reader.post(pool.keeper._ring, first, 3600.0)
            for call in calls:
                error = call.exception(SAFETY)
                if error is not None:           # that one, which was still running
                    self.assertIsInstance(error, CallTimeoutError)
                    self.assertIs(call, first.future)


class DiesOnce(Worker):
    def __init__(self, marker):
        self.marker = marker

    def run(self, started, go):
        if not os.path.exists(self.marker):
            open(self.marker, "w").close()
            os._exit(3)
        started.set()
        go.wait()


class TimeKeeperTests(CleanTestCase):
    def test_what_a_call_may_take(self):
        def limit(limits, method, count=1):
            return concurry._TimeKeeper.limit_of(types.SimpleNamespace(limits=limits),
                                                 types.SimpleNamespace(method=method, count=count))
        self.assertEqual(limit({"*": 2.0}, "anything"), 2.0)
        self.assertEqual(limit({"*": None, "ask": 2.0}, "ask"), 2.0)
        self.assertIsNone(limit({"*": None, "ask": 2.0}, "tell"))
        self.assertEqual(limit({"*": None, "submit": 2.0}, "__call__"), 2.0)
        self.assertEqual(limit({"*": 2.0}, "_chunk", 10), 20.0)         # a chunk has the time of its items

    def test_the_error_travels(self):
        error = concurry.CallTimeoutError("too long", "ask", "Api-0", 2.0)
        for copied in (pickle.loads(pickle.dumps(error)), Executor("process", 1, blocking=True).submit(copy.copy, error)):
            self.assertIs(type(copied), concurry.CallTimeoutError)
            self.assertEqual((str(copied), vars(copied)), (str(error), vars(error)))


class Endless(Worker):
    async def for_ever(self):
        await asyncio.get_running_loop().create_future()

    async def soon(self):
        return "soon"


class BuiltOnce(Worker):
    def __init__(self, marker):
        if os.path.exists(marker):
            raise ZeroDivisionError("only once")
        open(marker, "w").close()

    def hold(self, started, go):
        started.set()
        go.wait()

    def fine(self):
        return "fine"


# === Limits of workers ===

class Api(Worker):
    """Uses its limits: two calls at once, a hundred tokens."""

    def __init__(self):
        with self.limits.acquire({"tokens": 1}) as acquired:
            acquired.update()
        self.built_with = sorted(self.limits.get_stats()) if isinstance(self.limits, LimitSet) else None

    def ask(self, tokens=5, used=3, timeout=None):
        with self.limits.acquire({"tokens": tokens}, timeout) as acquired:
            acquired.update({"tokens": used})
        return dict(acquired.config)

    async def ask_async(self, tokens=5, used=3):
        async with self.limits.async_acquire({"tokens": tokens}) as acquired:
            await asyncio.sleep(0)
            acquired.update({"tokens": used})
        return dict(acquired.config)

    async def ask_on_loop(self, timeout=None):
        with self.limits.acquire(timeout=timeout):
            return "waited"

    def hold(self, started, go):
        with self.limits.acquire({"tokens": 1}) as acquired:
            acquired.update()
            started.set()
            go.wait()
        return "held"

    def forget_update(self):
        with self.limits.acquire({"tokens": 5}):
            return "answer"

    def look(self):
        return self.built_with, self.limits.get_stats()

    def own(self):
        return self.limits

    def use(self, limits, tokens=None):
        with limits.acquire(tokens):
            return limits.get_stats()

    def keep(self, limits=None):
        if limits is not None:
            self.kept = limits
        with self.kept.acquire():
            return self.kept.get_stats()


@dataclasses.dataclass(frozen=True)
class FrozenApi(Worker):
    n: int = 5

    def use(self):
        with self.limits.acquire() as acquired:
            return self.n, acquired.successful, sorted(self.limits)


class SlottedApi(Worker):
    __slots__ = ("n",)

    def use(self):
        return sorted(self.limits)


def api_limits():
    return [ResourceLimit("slots", 2), RateLimit("tokens", 100, per="hour"), CallLimit(1000, per="hour")]


def in_use(limits):
    return {key: stats["in_use"] for key, stats in limits.get_stats().items()}


async def limited_async(x, limits):
    async with limits.async_acquire() as acquired:
        return x, acquired.successful


class Departing(Worker):
    def __init__(self, ends):
        self.ends = ends

    def me(self):
        return self

    def __del__(self):
        self.ends.put(self.limits)


@worker(mode="thread")
class DepartingSlots:
    """Of an object that nothing can be tied to the limits go with the worker."""
    __slots__ = ("ends",)

    def __init__(self, ends):
        self.ends = ends

    def __del__(self):
        self.ends.put(self.ends)


@task(mode="thread", limits=[ResourceLimit("slots", 1)])
def limited_task(x, limits):
    with limits.acquire():
        return x, limits.get_stats()["slots"]["in_use"]


class WorkerLimitTests:
    def test_in_the_constructor_and_in_methods(self):
        limits = LimitSet(api_limits(), config={"account": "a"})
        api = self.make(Api, limits=limits)
        self.assertEqual(api.ask().result(SAFETY), {"account": "a"})
        self.assertEqual(api.ask_async().result(SAFETY), {"account": "a"})
        # As soon as a result is seen, what its call held is free.
        self.assertEqual(in_use(limits), {"slots": 0, "tokens": 7, "call_count": 3})
        built_with, stats = api.look().result(SAFETY)
        self.assertEqual(built_with, ["call_count", "slots", "tokens"])
        self.assertEqual(stats, limits.get_stats())
        self.assertIs(api.limits, limits)
        self.assertIs(api.own().result(SAFETY), limits)

    def test_a_list_makes_a_set_of_its_own(self):
        given = api_limits()
        one, other = self.make(Api, limits=given), self.make(Api, limits=given)
        gather([one.ask(), other.look()], timeout=SAFETY)
        self.assertEqual([in_use(handle.limits)["call_count"] for handle in (one, other)], [2, 1])
        single = self.make(Api, limits=api_limits()[1])
        single.look().result(SAFETY)            # in ray mode it may only now be built
        self.assertEqual(in_use(single.limits), {"tokens": 1})

    def test_a_set_is_shared_by_everyone_it_is_given_to(self):
        limits = LimitSet(api_limits())
        handles = [self.make(Api, limits=limits) for _ in range(2)]
        gather([handle.ask(5, 4) for handle in handles for _ in range(3)], timeout=SAFETY)
        with limits.acquire():
            self.assertEqual(in_use(limits), {"slots": 1, "tokens": 26, "call_count": 9})
        in_argument = self.make(Api)
        stats = in_argument.use(limits).result(SAFETY)
        self.assertEqual((stats["slots"]["in_use"], stats["call_count"]["in_use"]), (1, 10))

    def test_errors_are_the_calls(self):
        limits = LimitSet(api_limits())
        api = self.make(Api, limits=limits)
        self.assertRegex(str(api.forget_update().exception(SAFETY)), "'tokens' was not told")
        self.assertIsInstance(api.ask(101).exception(SAFETY), ValueError)
        held = limits.acquire({"slots": 2})
        error = api.ask(timeout=0.01).exception(SAFETY)
        for kind in (TimeoutError, concurrent.futures.TimeoutError, asyncio.TimeoutError):
            self.assertIsInstance(error, kind)
        stats = limits.get_stats()
        self.assertEqual((stats["slots"]["waiting"], stats["slots"]["in_use"], stats["tokens"]["in_use"]), (0, 2, 6))
        held.release()
        api.ask().result(SAFETY)

    def test_waiting_on_the_workers_loop(self):
        """10.8: a private loop waits; that of an asyncio worker would be stalled."""
        limits = LimitSet([ResourceLimit("slots", 1), RateLimit("tokens", 10, per="hour")])
        api = self.make(Api, limits=limits)
        api.look().result(SAFETY)               # in ray mode it may only now be built
        held = limits.acquire()
        if self.mode in ("asyncio", "ray"):
            self.assertRegex(str(api.ask_on_loop().exception(SAFETY)), "async with limits.async_acquire")
            self.assertEqual(limits.get_stats()["slots"]["waiting"], 0)
            held.release()
        elif self.mode == "sync":
            self.assertIsInstance(api.ask_on_loop(timeout=0.01).exception(SAFETY), TimeoutError)
            held.release()
        else:
            waiting = api.ask_on_loop()
            until(lambda: limits.get_stats()["slots"]["waiting"] == 1)
            held.release()
            self.assertEqual(waiting.result(SAFETY), "waited")
        self.assertEqual(api.ask_on_loop().result(SAFETY), "waited")
        self.assertEqual(in_use(limits)["slots"], 0)

    def test_a_pool_of_sets(self):
        sets = [LimitSet(api_limits(), config={"n": n}) for n in range(3)]
        for given in (sets, LimitPool(sets, "round_robin")):
            api = self.make(Api, limits=given)
            self.assertEqual(sorted(api.ask().result(SAFETY)["n"] for _ in range(6)), [0, 0, 1, 1, 2, 2])
            self.assertIsInstance(api.limits, LimitPool)
            self.assertIsInstance(api.own().result(SAFETY), LimitPool)

    def test_objects_of_any_kind(self):
        limits = LimitSet([ResourceLimit("slots", 1)])
        self.assertEqual(self.make(FrozenApi, limits=limits).use().result(SAFETY), (5, True, ["slots"]))
        self.assertEqual(self.make(SlottedApi, limits=limits).use().result(SAFETY), ["slots"])
        self.assertEqual(FrozenApi().use(), (5, True, []))

    def test_a_function_with_a_parameter_of_that_name(self):
        limits = LimitSet([ResourceLimit("x", 3)])
        for fn, options in ((with_limits, {}), (with_default_limits, {})):
            bound = self.make(TaskWorker, limits=limits, init={"fn": fn}, **options)
            x, got = bound(3).result(SAFETY)
            self.assertEqual((x, got), (3, True if fn is with_limits else limits))
        self.assertEqual(self.make(TaskWorker, limits=limits, init={"fn": with_default_limits})(1, "given").result(SAFETY),
                         (1, "given"))

    def test_options(self):
        for bad in (3, "slots", [1], [LimitSet([]), ResourceLimit("x", 1)]):
            with self.assertRaisesRegex(ValueError, "limits=.*a LimitSet, a LimitPool, or a list"):
                Api.options(mode=self.mode, limits=bad)
        for bad, reason in (([ResourceLimit("x", 1)] * 2, "two limits have the key 'x'"),
                            (type("LimitSet", (), {"__module__": "vendored"})(), "vendored, another copy")):
            with self.assertRaisesRegex(ValueError, f"limits=.*{reason}"):
                Api.options(mode=self.mode, limits=bad)
        self.assertIs(self.make(Api, limits=None).own().result(SAFETY), self.make(Api).limits)
        self.assertIs(self.make(Api, limits=[]).ask().exception(SAFETY), None)

    def test_acquisitions_do_not_travel(self):
        limits = LimitSet([ResourceLimit("slots", 1)])
        with limits.acquire() as acquired:
            self.assertRaisesRegex(pickle.PicklingError, "acquisition", pickle.dumps, acquired)
        self.assertRaisesRegex(pickle.PicklingError, "acquisition", pickle.dumps, limits.async_acquire())


over_modes(globals(), [WorkerLimitTests])


class LimitedPoolTests:
    """Pools of threads and processes, with one set."""

    def test_it_is_shared_by_the_whole_pool(self):
        pool = self.make(Api, limits=api_limits(), max_workers=3)
        gather([pool.look() for _ in range(3)], timeout=SAFETY)     # in ray mode they may only now be built
        self.assertEqual(in_use(pool.limits), {"slots": 0, "tokens": 3, "call_count": 3})
        started, go = self.flag(), self.flag()
        held = [pool.hold(started, go) for _ in range(3)]
        until(lambda: pool.limits.get_stats()["slots"]["waiting"] == 1)
        self.assertEqual(in_use(pool.limits)["slots"], 2)
        go.set()
        self.assertEqual(gather(held, timeout=SAFETY), ["held"] * 3)
        self.assertEqual(in_use(pool.limits)["slots"], 0)

    def test_on_demand(self):
        pool = self.make(Api, limits=api_limits(), on_demand=True, max_workers=3)
        gather([pool.ask() for _ in range(6)], timeout=SAFETY)
        self.assertEqual(in_use(pool.limits), {"slots": 0, "tokens": 24, "call_count": 12})

    def test_never_more_than_the_capacity(self):
        """Each holder writes a letter when it has acquired and one before it gives back: read in order, at most two are inside."""
        with tempfile.TemporaryDirectory() as folder:
            path, limits = os.path.join(folder, "log"), LimitSet([ResourceLimit("slots", 2)])
            pool = self.make(Logger, path, limits=limits, max_workers=3)
            futures = [pool.work(20) for _ in range(9)]

            async def beside():
                for _ in range(20):
                    async with limits.async_acquire():
                        log_inside(path)
            asyncio.run(beside())
            gather(futures, timeout=SAFETY)
            self.assertEqual((inside_at_most(path), os.path.getsize(path)), (2, 2 * 200))
            self.assertEqual(in_use(limits), {"slots": 0})


class Logger(Worker):
    def __init__(self, path):
        self.path = path

    def work(self, times):
        for _ in range(times):
            with self.limits.acquire():
                log_inside(self.path)

    def pid(self):
        return os.getpid()


def log_inside(path):
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, b"+")
        os.sched_yield()
        os.write(descriptor, b"-")
    finally:
        os.close(descriptor)


def inside_at_most(path):
    with open(path, "rb") as file:
        return max(itertools.accumulate({43: 1, 45: -1}[letter] for letter in file.read()))


over_modes(globals(), [LimitedPoolTests], ["thread", "process", "ray"])


class ReturnsHeld:
    """Called it gives a coroutine, which nobody can tell before."""

    def __call__(self, *args):
        return hold_async(*args)


async def hold_async(started, go, result="held"):
    started.set()
    await asyncio.to_thread(go.wait)
    return result


def logged(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)
    return wrapper


def within_limits(x, limits):
    with limits.acquire():
        return x, in_use(limits)


@logged
def within_limits_logged(x, limits):
    return within_limits(x, limits)


async def within_limits_async(x, limits):
    async with limits.async_acquire():
        return x, in_use(limits)


def any_keywords(x, **kwargs):
    return x, kwargs


def acquire_at_once(x, limits):
    with limits.try_acquire() as acquired:
        return x, acquired.successful


class FunctionLimitTests:
    """6.5a, for what calls one function at a time."""

    def ways(self, fn, limits, **options):
        """Yield (name, submit, map) for each kind of handle with these limits."""
        single = {"max_workers": 1} if self.mode in ("thread", "process", "ray") else {}
        executor = Executor(self.mode, limits=limits, **single, **options)
        self.addCleanup(executor.stop, 5)
        unbound = self.make(TaskWorker, limits=limits, **options)
        for name, pool in (("Executor", executor), ("TaskWorker", unbound)):
            yield name, functools.partial(pool.submit, fn), functools.partial(pool.map, fn)
        decorated = task(mode=self.mode, limits=limits, **single, **options)(fn)
        self.addCleanup(decorated.stop, 5)
        for name, pool in (("bound", self.make(TaskWorker, limits=limits, init={"fn": fn}, **options)), ("@task", decorated)):
            yield name, pool, pool.map
            yield name, pool.submit, pool.map

    def test_a_parameter_limits_gets_them(self):
        for fn in (within_limits, within_limits_logged, within_limits_async, functools.partial(within_limits)):
            limits = LimitSet([ResourceLimit("slots", 1)])
            for name, submit, map in self.ways(fn, limits):
                with self.subTest(name, fn=fn):
                    self.assertEqual(submit(1).result(SAFETY), (1, {"slots": 1}))
                    for chunksize in (1, 2):
                        self.assertEqual(list(map([1, 2, 3], chunksize=chunksize)), [(n, {"slots": 1}) for n in (1, 2, 3)])
            self.assertEqual(in_use(limits), {"slots": 0})

    def test_a_parameter_limits_that_is_given_or_has_a_default(self):
        limits = LimitSet([ResourceLimit("slots", 1)])
        for name, submit, map in self.ways(with_default_limits, limits):
            with self.subTest(name):
                self.assertEqual([submit(1, "given").result(SAFETY), submit(1, limits="given").result(SAFETY)], [(1, "given")] * 2)
                self.assertEqual(list(map([1, 2], ["given"] * 2, chunksize=2)), [(1, "given"), (2, "given")])
                self.assertEqual([type(got) for _, got in [submit(1).result(SAFETY), *map([1, 2])]], [LimitSet] * 3)
        for name, submit, map in self.ways(with_default_limits, None):
            with self.subTest(name, limits=None):
                self.assertEqual([submit(1).result(SAFETY), *map([1, 2], chunksize=2)], [(1, "mine"), (1, "mine"), (2, "mine")])
        for name, submit, map in self.ways(with_limits, None):      # one that has none gets those which are free
            with self.subTest(name, limits=None):
                self.assertEqual([submit(1).result(SAFETY), *map([1, 2], chunksize=2)], [(1, True), (1, True), (2, True)])

    def test_a_function_without_one_runs_within_them(self):
        """To its end, where it gives a coroutine, too."""
        for fn in (hold, hold_async, ReturnsHeld()):
            limits = LimitSet([ResourceLimit("slots", 1)])
            for name, submit, map in self.ways(fn, limits):
                for call in (lambda *args: submit(*args).result(), lambda *args: next(map(*zip(args), chunksize=1)),
                             lambda *args: list(map(*zip(args, args), chunksize=2))[0]):
                    with self.subTest(name, fn=fn):
                        started, go = self.flag(), self.flag()
                        held = in_thread(call, started, go)
                        started.wait()
                        within = in_use(limits)
                        go.set()
                        self.assertEqual((within, held.result(SAFETY)), ({"slots": 1}, "held"))
                        # As soon as a result is seen, what its call held is free.
                        self.assertEqual(in_use(limits), {"slots": 0})

    def test_a_parameter_limits_that_a_partial_gives(self):
        limits, rate = LimitSet([ResourceLimit("slots", 1)]), [RateLimit("tokens", 100, per="hour")]
        for fn in (functools.partial(acquire_at_once, limits=limits), functools.partial(acquire_at_once, "x", limits)):
            args = [()] if fn.args else [("x",)]
            for pool in (self.make(TaskWorker, limits=limits), self.make(TaskWorker, limits=rate)):
                with self.subTest(fn=fn, limits=pool.limits):
                    self.assertEqual(pool.submit(fn, *args[0]).result(SAFETY), ("x", True))

    def test_each_attempt_is_counted(self):
        for fn in (square, square_async):
            limits = LimitSet([CallLimit(1000, per="hour"), ResourceLimit("slots", 1)])
            for name, submit, map in self.ways(fn, limits, num_retries=2, retry_wait=0):
                with self.subTest(name, fn=fn):
                    before = limits.get_stats()["call_count"]["granted"]
                    self.assertEqual((submit(3).result(SAFETY), type(submit("x").exception(SAFETY))), (9, TypeError))
                    for chunksize in (1, 2):
                        self.assertRaises(TypeError, list, map([1, "x"], chunksize=chunksize))
                    self.assertEqual(limits.get_stats()["call_count"]["granted"] - before, 3 * (1 + 3))
                    self.assertEqual(in_use(limits)["slots"], 0)

    def test_a_pool_of_sets(self):
        sets = [LimitSet([ResourceLimit("slots", 1)]) for _ in range(2)]
        for name, submit, map in self.ways(hold, sets):
            with self.subTest(name):
                started, go = self.flag(), self.flag()
                held = in_thread(lambda *args: submit(*args).result(), started, go)
                started.wait()
                within = sorted(in_use(each)["slots"] for each in sets)
                go.set()
                self.assertEqual((within, held.result(SAFETY)), ([0, 1], "held"))
                self.assertEqual([in_use(each)["slots"] for each in sets], [0, 0])

    def test_rates_of_which_only_the_function_knows_how_much_it_takes(self):
        rate = RateLimit("tokens", 100, per="hour")
        for limits in ([rate, ResourceLimit("slots", 1)], [LimitSet([ResourceLimit("slots", 1)]), LimitSet([rate])]):
            for name, submit, map in self.ways(square, limits):
                for call in (lambda: submit(3), lambda: map([3]), lambda: map([3, 4], chunksize=2)):
                    with self.subTest(name), self.assertRaisesRegex(ValueError, (
                            r"^square\(\) needs a parameter `limits`: .* of the rate limit 'tokens' it uses")):
                        call()
        for name, submit, map in self.ways(any_keywords, [rate]):
            with self.subTest(name):
                self.assertRaisesRegex(ValueError, "any_keywords", submit, 1)
                self.assertEqual(submit(1, limits="given").result(SAFETY), (1, {"limits": "given"}))
        for fn in (with_default_limits, within_limits_logged):
            for name, submit, map in self.ways(fn, [rate]):
                with self.subTest(name, fn=fn):
                    self.assertEqual([submit(1).result(SAFETY)[0], *next(map([2]))[:1]], [1, 2])


over_modes(globals(), [FunctionLimitTests], MODES)


class FunctionLimitPoolTests:
    """6.5a, where two workers would be inside."""

    def test_never_more_than_the_capacity(self):
        path, limits = os.path.join(self.folder(), "log"), LimitSet([ResourceLimit("slots", 1)])
        pool = self.make(TaskWorker, max_workers=2, max_queued_tasks=None, limits=limits)
        started, go = self.flag(), self.flag()
        held = [pool.submit(fn, started, go) for fn in (hold, hold_async)]
        self.addCleanup(go.set)
        until(lambda: limits.get_stats()["slots"]["waiting"] == 1)
        started.wait()
        self.assertEqual((started.count(), in_use(limits)), (1, {"slots": 1}))
        go.set()
        self.assertEqual(gather(held, timeout=SAFETY), ["held", "held"])
        list(pool.map(log_inside, [path] * 20))
        list(pool.map(log_inside, [path] * 20, chunksize=5))
        self.assertEqual((inside_at_most(path), os.path.getsize(path), in_use(limits)), (1, 80, {"slots": 0}))


over_modes(globals(), [FunctionLimitPoolTests], ["thread", "process", "ray"])


class LimitedTaskTests(CleanTestCase):
    def test_task(self):
        self.addCleanup(limited_task.stop)
        self.assertEqual(sorted(limited_task.map(range(10))), [(x, 1) for x in range(10)])
        self.assertEqual(in_use(limited_task.limits), {"slots": 0})

    def test_coroutine_functions_in_chunks(self):
        pool = self.start(TaskWorker, mode="thread", limits=[ResourceLimit("slots", 1)], init={"fn": limited_async})
        self.assertEqual(list(pool.map(range(5), chunksize=2)), [(n, True) for n in range(5)])

    def test_a_bound_argument_is_passed_by_the_caller(self):
        pool = self.start(TaskWorker, mode="thread", limits=[ResourceLimit("slots", 1)],
                          init={"fn": functools.partial(with_default_limits, limits="mine too")})
        self.assertEqual(pool(1).result(SAFETY), (1, "mine too"))

    def test_to_the_end_of_the_object(self):
        """Also in `__del__`, and where somebody else still has it."""
        limits, ends = LimitSet([ResourceLimit("slots", 1)]), queue.SimpleQueue()
        for cls in (Departing, DepartingSlots):
            for mode in ("sync", "thread", "asyncio"):
                handle = self.start(cls, ends, mode=mode, limits=limits)
                handle.stop()
                self.assertIs(ends.get(timeout=SAFETY), limits if cls is Departing else ends)
        handle = self.start(Departing, ends, mode="thread", limits=limits)
        left_behind = handle.me().result(SAFETY)
        handle.stop()
        self.assertIs(left_behind.limits, limits)
        del left_behind
        gc.collect()
        self.assertEqual([kept for kept, *_ in concurry._limits_of.values() if kept is limits], [])

    def test_a_constructor_that_fails_leaves_no_trace(self):
        before = dict(concurry._limits_of)
        limits = LimitSet([ResourceLimit("slots", 1)])
        for mode in ("sync", "thread", "asyncio"):
            self.assertRaises(KeyError, Counter.options(mode=mode, limits=limits).init, fail=KeyError("x"))
        self.assertEqual(concurry._limits_of, before)

    def test_waiting_in_an_interruption_of_the_same_set(self):
        """A finalizer that comes in the middle of `attend`, of this very thread: it is not waited for."""
        limits = LimitSet([ResourceLimit("slots", 1)])
        home, seen = limits._home, []

        def clock():
            if not seen:
                seen.append(limits.try_acquire().successful)
                with self.assertRaisesRegex(RuntimeError, "interrupted its own thread"):
                    limits.acquire()
            return 5
        home.clock = clock
        with limits.acquire():
            self.assertEqual(seen, [False])
        self.assertEqual(in_use(limits), {"slots": 0})
        home.is_busy = True                     # as an exception may leave it
        with limits.acquire(timeout=SAFETY):
            pass


# === Programs of their own ===

START_METHODS = [method for method in ("forkserver", "spawn", "fork") if hasattr(os, "fork")]
FOLDER = os.path.dirname(os.path.abspath(concurry.__file__))

# What each program begins with: the module under test, and an end to whatever hangs.
HEAD = f"""
import faulthandler, os, sys
faulthandler.dump_traceback_later({SAFETY}, exit=True)
sys.path.insert(0, {FOLDER!r})
"""
# What scripts that send things to and fro have besides.
CALL = """
import concurry
handle = concurry.TaskWorker.options(mode="process", mp_context={method!r}).init()
def call(f, *args):
    return handle.submit(f, *args).result()
"""


class Program:
    """A Python program: `line()` reads what it prints, `say()` writes to it, `output()` waits for its end."""

    def __init__(self, test, code, *arguments, way="-c", flags=(), head=HEAD, cwd=None, command=None, **options):
        code = head + textwrap.dedent(code)
        if way == "file":
            path = os.path.join(test.folder(), "script.py")
            with open(path, "w") as file:
                file.write(code)
        chosen = {"-c": ["-c", code], "file": way == "file" and [path], "stdin": ["-"]}[way]
        options.setdefault("env", {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"})
        self.popen = subprocess.Popen(command or [sys.executable, *flags, *chosen, *arguments], text=True, cwd=cwd,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        test.addCleanup(self.finish)
        if way == "stdin":
            self.popen.stdin.write(code)
            self.popen.stdin.close()
            self.popen.stdin = None

    def finish(self):
        if self.popen.poll() is None:
            self.popen.kill()
        try:
            self.popen.communicate(timeout=1)
        except subprocess.TimeoutExpired:       # a child of it that does not end keeps the pipes: told by others
            self.popen.stdout.close()
            self.popen.stderr.close()

    def line(self):
        text = b""
        while not text.endswith(b"\n"):         # not with readline(): output() would not see what that has read ahead
            byte = os.read(self.popen.stdout.fileno(), 1)
            if not byte:
                raise AssertionError("no more output; on stderr: " + self.popen.stderr.read())
            text += byte
        return text[:-1].decode()

    def numbers(self):
        return [int(word) for word in self.line().split()]

    def say(self, text=""):
        self.popen.stdin.write(text + "\n")
        self.popen.stdin.flush()

    def output(self):
        return self.popen.communicate(timeout=SAFETY + 5)


class ProgramCase(CleanTestCase):
    def write(self, folder, **files):
        for name, text in files.items():
            with open(os.path.join(folder, name + ".py"), "w") as file:
                file.write(textwrap.dedent(text))

    def need_in_program(self, name):
        """Skip without an optional package, which only the program is to import."""
        if not importlib.util.find_spec(name):
            self.need(name)

    def run_script(self, body, *, method="forkserver", head="", **options):
        """Run code as a `__main__`; `call(f, *args)` calls f in its worker."""
        code = textwrap.dedent(CALL).format(method=method) + textwrap.dedent(body) + "\nhandle.stop()\nprint('passed')\n"
        program = Program(self, code, head=head + HEAD, **options)
        output, errors = program.output()
        self.assertEqual((output[-7:], errors, program.popen.returncode), ("passed\n", "", 0), output)

    def check_program(self, code, expected, *arguments, errors="", status=0, **options):
        """Run a program that has to print this; `errors` is a pattern."""
        program = Program(self, code, *arguments, **options)
        found = program.output()
        self.assertEqual(found[0], expected, found[1])
        self.assertRegex(found[1], f"^(?:{errors})$" if not errors else errors)
        self.assertEqual(program.popen.returncode, status)


# === Serving ===

class RecyclingTests:
    """15.1, `max_tasks_per_worker`: who has had so many calls is retired between two of them."""

    def test_no_object_has_more_calls(self):
        for n, count in ((3, 7),) if self.mode in AWAY else ((1, 50), (2, 51), (3, 200), (7, 200)):
            worker = self.make(Counter, max_tasks_per_worker=n, max_queued_tasks=None)
            calls = [worker.add() for _ in range(count)]
            self.assertEqual(gather(calls, timeout=SAFETY), [k % n + 1 for k in range(count)])
            until(lambda worker=worker, n=n, count=count: worker.stats()["retired"] == count // n)
            self.assertEqual((worker.stats()["deaths"], worker.get_pool_stats()["restarts"]), (0, 0))
            worker.stop()

    def test_coroutines_and_plain_methods(self):
        worker = self.make(Counter, max_tasks_per_worker=3)
        calls = [worker.add_async() if k % 2 else worker.add() for k in range(6 if self.mode in AWAY else 60)]
        counts = gather(calls, timeout=SAFETY)
        self.assertEqual(sorted(counts), sorted([1, 2, 3] * (len(calls) // 3)))
        self.assertEqual(worker.stats()["done"], len(calls))

    def test_what_fails_or_is_cancelled_is_lost_to_nobody(self):
        started, go = self.flag(), self.flag()
        worker = self.make(Counter, max_tasks_per_worker=2, max_queued_tasks=None)
        calls = [worker.hold(started, go), worker.fail(KeyError()), *(worker.add() for _ in range(4))]
        started.wait()
        if self.mode != "ray":          # where it was handed over
            self.assertTrue(calls[3].cancel())
            del calls[3]
        go.set()
        self.assertIsInstance(calls.pop(1).exception(SAFETY), KeyError)
        self.assertGreater(gather(calls[1:], timeout=SAFETY)[-1], 0)
        with worker:
            last = worker.echo("last")
        self.assertEqual(last.result(0), "last")

    def test_a_successor_that_cannot_be_built(self):
        marker = self.flag().path + ".built"
        worker = self.make(BuiltOnce, marker, max_tasks_per_worker=1, max_queued_tasks=None)
        self.addCleanup(os.unlink, marker)
        with self.log_of():
            calls = [worker.fine(), worker.fine(), worker.fine()]
            self.assertEqual(calls[0].result(SAFETY), "fine")
            for call in (*calls[1:], worker.fine()):
                self.assertIsInstance(call.exception(SAFETY), ZeroDivisionError)


over_modes(globals(), [RecyclingTests], ALL_MODES[1:])


class RecyclingPoolTests:
    def test_many_calls_through_a_full_queue(self):
        pool = self.make(Counter, max_workers=3, max_tasks_per_worker=2, max_queued_tasks=2)
        futures = []
        each = 8 if self.mode == "process" else 100
        threads = [threading.Thread(target=lambda: futures.extend(pool.add() for _ in range(each))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SAFETY)
        self.assertEqual(collections.Counter(gather(futures, timeout=SAFETY)).keys(), {1, 2})
        self.assertEqual(pool.stats()["done"], 2 * each)
        self.assertEqual(sorted(pool.stats()["workers"]), ["Counter-0", "Counter-1", "Counter-2"])

    def test_on_demand(self):
        with self.make(TaskWorker, on_demand=True, max_workers=2, max_tasks_per_worker=2) as pool:
            self.assertEqual(list(pool.map(square, range(9))), [x * x for x in range(9)])
            self.assertGreaterEqual(pool.stats()["retired"], 3)

    def test_a_map_in_chunks(self):
        with self.make(TaskWorker, max_workers=2, max_tasks_per_worker=1) as pool:
            self.assertEqual(list(pool.map(square, range(12), chunksize=4)), [x * x for x in range(12)])
            until(lambda: pool.stats()["retired"] == 3)         # a chunk is one call


over_modes(globals(), [RecyclingPoolTests], ["thread", "process"])


class Lives(Worker):
    """Tells of its beginning and its end, and in which thread they are."""

    def __init__(self, told):
        self.told = told
        told.append(("begins", threading.get_ident()))
        self.is_known = hasattr(known_here, "yes")
        known_here.yes = True

    def known(self):
        return self.is_known

    def __del__(self):
        self.told.append(("ends", threading.get_ident()))


known_here = threading.local()


class RecyclingOneModeTests(ProgramCase):
    def test_one_ends_before_the_next_begins(self):
        told = []
        with self.start(Lives, told, mode="thread", max_tasks_per_worker=1) as worker:
            self.assertEqual([worker.known().result(SAFETY) for _ in range(3)], [False] * 3)    # a thread of its own
            until(lambda: worker.stats()["retired"] == 3)
        self.assertEqual([what for what, _ in told], ["begins", "ends"] * 4)
        self.assertEqual([ident for _, ident in told[::2]], [ident for _, ident in told[1::2]])

    def test_what_was_cancelled_does_not_count(self):
        started, go = self.flag(), self.flag()
        with self.start(Counter, mode="thread", max_tasks_per_worker=3) as worker:
            worker.hold(started, go)
            started.wait()
            self.assertTrue(all(call.cancel() for call in [worker.add() for _ in range(10)]))
            go.set()
            self.assertEqual((worker.add().result(SAFETY), worker.stats()["retired"]), (1, 0))

    def test_none_is_built_at_the_end(self):
        for mode in ("thread", "asyncio", "process"):
            built = self.flag()
            with self.start(SaysItIsBuilt, built, mode=mode, max_tasks_per_worker=2) as worker:
                started, go = self.flag(), self.flag()
                calls = [worker.hold(started, go), worker.hold(started, go)]
                started.wait()
                worker.shutdown(wait=False)
                go.set()
            self.assertEqual(gather(calls, timeout=0), [None, None])
            self.assertEqual(built.count(), 1, mode)

    def test_a_new_loop(self):
        loops = []
        with self.start(SeesItsLoop, mode="asyncio", max_tasks_per_worker=2) as worker:
            calls = [worker.see(loops) for _ in range(4)]
            gather(calls, timeout=SAFETY)
        self.assertEqual((loops[0] is loops[1], loops[1] is loops[2], loops[2] is loops[3]), (True, False, True))
        self.assertTrue(all(loop.is_closed() for loop in loops))
        worker = self.start(SeesItsLoop, mode="asyncio", max_tasks_per_worker=2)
        held = [worker.hold_on() for _ in range(5)]
        until(held[1].running)
        worker.stop(0)                  # those that are held back have not begun
        self.assertEqual([call.cancelled() for call in held], [True] * 5)

    def test_calls_that_come_while_a_loop_is_closed(self):
        closing, go = self.flag(), self.flag()
        worker = self.start(ClosesSlowly, closing, go, mode="asyncio", max_tasks_per_worker=1)
        calls = [worker.leave_something()]
        closing.wait()
        calls += [worker.leave_something() for _ in range(3)]
        go.set()
        self.assertEqual(gather(calls, timeout=SAFETY), [1] * 4)

    def test_calls_that_come_before_a_loop_runs(self):
        """One that finds the last object gone must not have the next one retired."""
        real, submitted = asyncio.set_event_loop, threading.Event()
        worker = self.start(Counter, mode="asyncio", max_tasks_per_worker=1)
        calls = []

        def set_event_loop(loop):
            real(loop)
            if not submitted.is_set():
                calls.extend(in_thread(lambda: [worker.add_async() for _ in range(5)]).result(SAFETY))
                submitted.set()
        with unittest.mock.patch("asyncio.set_event_loop", set_event_loop):
            first = worker.add_async()
            self.assertTrue(submitted.wait(SAFETY))
            self.assertEqual(gather([first, *calls], timeout=SAFETY), [1] * 6)
            until(lambda: worker.stats()["retired"] == 6)

    def test_threads_that_cannot_be_made(self):
        made = itertools.count()

        def factory(**options):
            if next(made) == 1:
                raise ValueError("no thread today")
            return threading.Thread(**options)
        with self.start(TaskWorker, mode="thread", max_tasks_per_worker=2, thread_factory=factory) as pool:
            self.assertEqual(list(pool.map(square, range(5))), [0, 1, 4, 9, 16])

    def test_a_call_that_was_sent_to_a_process_that_is_about_to_end(self):
        """Its time has not begun, and the process that clears up is not killed for it."""
        cleared, started, go = self.flag(), self.flag(), self.flag()
        worker = self.start(ClearsUp, cleared, mode="process", max_tasks_per_worker=20, call_timeout={"hold": 0.2},
                            max_queued_tasks=None)
        gather([worker.quick() for _ in range(19)], timeout=SAFETY)
        calls = [worker.quick(), worker.hold(started, go), worker.quick()]
        self.assertIsInstance(calls[1].exception(SAFETY), CallTimeoutError)
        self.assertEqual(cleared.count(), 1)
        self.assertIsNone(calls[2].result(SAFETY))
        go.set()

    def test_at_the_interpreters_exit(self):
        for mode in ("thread", "process", "asyncio"):
            code = f"""
            from concurry import Executor
            pool = Executor({mode!r}, max_tasks_per_worker=1, max_queued_tasks=None, max_workers=1)
            for n in range(5):
                pool.submit(print, n, flush=True)
            """
            self.check_program(code, "0\n1\n2\n3\n4\n", way="file")

    def test_memory(self):
        with self.start(Hoarder, mode="process") as worker:
            base = worker.held().result(SAFETY)
        with self.start(Hoarder, mode="process", max_worker_memory=base + (60 << 20)) as worker:
            calls = [worker.hoard(40 << 20) for _ in range(5)]
            self.assertEqual(gather(calls, timeout=SAFETY), [1, 2, 1, 2, 1])
            self.assertEqual(worker.stats()["retired"], 2)
            self.assertEqual(worker.get_pool_stats()["restarts"], 0)
        with self.start(Hoarder, mode="thread", max_worker_memory=1) as worker:
            self.assertEqual([worker.hoard(1).result(SAFETY) for _ in range(2)], [1, 2])      # of processes only

    def test_one_that_does_not_end_is_killed(self):
        with temp_config(global_stop_timeout=0.1):
            worker = self.start(Lingering, mode="process", max_tasks_per_worker=1)
        self.assertEqual([worker.linger().result(SAFETY) for _ in range(2)], [None] * 2)

    def test_a_limit_is_given_back(self):
        limits = LimitSet([ResourceLimit("slots", 1)])
        with self.start(Counter, mode="process", max_tasks_per_worker=1, limits=limits) as worker:
            gather([worker.echo(1) for _ in range(3)], timeout=SAFETY)
        with limits.acquire(timeout=0):
            pass

    def test_bad_input(self):
        for option in "max_tasks_per_worker", "max_worker_memory":
            for value in (0, -1, 1.5, "many", True):
                with self.assertRaisesRegex(ValueError, f"{option}={value!r} is not possible: a whole number from 1"):
                    Counter.options(mode="process", **{option: value})


class ClosesSlowly(Worker):
    """What it leaves on its loop ends slowly when it is cancelled."""

    def __init__(self, closing, go):
        self.closing, self.go, self.count = closing, go, 0

    async def leave_something(self):
        self.count += 1
        self.task = asyncio.ensure_future(self.end_slowly())
        await asyncio.sleep(0)
        return self.count

    async def end_slowly(self):
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.closing.set()
            for _ in range(20):
                await asyncio.sleep(0)
            self.go.wait()


class ClearsUp(Worker):
    def __init__(self, cleared):
        self.cleared = cleared

    def quick(self):
        pass

    def hold(self, started, go):
        started.set()
        go.wait()

    def __del__(self):
        time.sleep(0.5)             # longer than the time limit
        self.cleared.set()


class SaysItIsBuilt(Worker):
    def __init__(self, built):
        built.set()

    def hold(self, started, go):
        started.set()
        go.wait()


class SeesItsLoop(Worker):
    async def see(self, loops):
        loops.append(asyncio.get_running_loop())

    async def hold_on(self):
        await asyncio.get_running_loop().create_future()


class Hoarder(Worker):
    def __init__(self):
        self.hoarded = []

    def held(self):
        return concurry._memory_held()

    def hoard(self, size):
        self.hoarded.append(b"x" * size)
        return len(self.hoarded)


class Lingering(Worker):
    def linger(self):
        pass

    def __del__(self):
        time.sleep(3600)


def prepare(told, *, word="prepared"):
    told.set()
    prepared.word = word


prepared = threading.local()


class Prepared(Worker):
    def __init__(self):
        self.word = prepared.word

    def said(self):
        return self.word


class SettingUpTests:
    """15.1: what runs before the object is built, and what the worker is called."""

    def test_before_the_object_and_in_its_worker(self):
        told = self.flag()
        worker = self.make(Prepared, initializer=prepare, initargs=[told], initkwargs={"word": "hello"})
        self.assertEqual(worker.said().result(SAFETY) if self.mode != "sync" else worker.said().result(), "hello")
        self.assertEqual(told.count(), 1)

    def test_what_it_raises(self):
        with self.assertRaisesRegex(ValueError, "no good"):
            worker = self.make(Counter, initializer=refuse, initargs=("no good",))
            worker.add().result(SAFETY)                 # in ray mode it is there

    def test_bad_input(self):
        for options, text in (
                ({"initializer": 3}, "initializer=3 is not possible: a function"),
                ({"initializer": coroutine_function}, "no coroutine function"),
                ({"initargs": (1,)}, r"initargs=\(1,\) is not possible without an initializer"),
                ({"initkwargs": {"a": 1}}, "without an initializer"),
                ({"initializer": prepare, "initargs": "text"}, "a tuple of the initializer's arguments"),
                ({"initializer": prepare, "initkwargs": 3}, "a dict of the initializer's arguments by name"),
                ({"name": ""}, "name='' is not possible: a printable text"),
                ({"name": "two\nlines"}, "a printable text"),
                ({"thread_factory": "Thread"}, "a function that returns a threading.Thread")):
            with self.assertRaisesRegex(ValueError, text):
                Counter.options(mode=self.mode, **options)


over_modes(globals(), [SettingUpTests])


def refuse(text):
    raise ValueError(text)


async def coroutine_function():
    pass


def who_am_i():
    comm = open_and_read("/proc/thread-self/comm").strip()
    return threading.current_thread().name, comm, multiprocessing.current_process().name


class OwnThread(threading.Thread):
    pass


def broken_factory(**options):
    raise OSError("no more threads")


class NameTests(CleanTestCase):
    def test_in_threads_and_processes(self):
        for mode in ("thread", "process", "asyncio"):
            end = "-plain" if mode == "asyncio" else ""
            for name, shown in (("shop", f"shop-0{end}"), ("a-very-long-name-of-a-shop", "a-very-long-n-0")):
                with self.start(TaskWorker, mode=mode, name=name) as pool:
                    thread, comm, _ = pool.submit(who_am_i).result(SAFETY)
                    self.assertEqual(thread, f"{name}-0{end}")
                    if not end:
                        self.assertEqual(comm, shown)
                    self.assertEqual((pool.name, list(pool.stats()["workers"])), (name, [f"{name}-0"]))
                    self.assertIn(name, repr(pool))

    def test_in_errors_and_logs(self):
        with self.log_of() as logs, self.start(TaskWorker, mode="process", name="shop") as worker:
            error = worker.submit(os._exit, 3).exception(SAFETY)
            self.assertRegex(str(error), r"^shop-0 \(pid \d+\) died")
            self.assertEqual(error.worker, "shop-0")
            until(lambda: any("shop-0" in line for line in logs.output))

    def test_without_one_it_is_the_bound_function(self):
        for mode in ("thread", "process", "asyncio"):
            decorated = task(mode=mode)(who_am_i)
            self.addCleanup(decorated.stop, 5)
            for bound in (self.start(TaskWorker, mode=mode, init={"fn": who_am_i}), self.start(TaskWorker, who_am_i, mode=mode), decorated):
                self.assertEqual(bound().result(SAFETY)[0], "who_am_i-0" + "-plain" * (mode == "asyncio"))
                bound.shutdown()
                self.assertRaisesRegex(RuntimeError, "^cannot submit to who_am_i: ", bound)
        with self.start(TaskWorker, mode="thread", init={"fn": lambda: threading.current_thread().name}) as nameless:
            self.assertEqual(nameless().result(SAFETY), "TaskWorker-0")

    def test_state_is_lost_where_there_is_some(self):
        for cls, lost in ((TaskWorker, False), (Patient, True)):
            with self.log_of() as logs, self.start(cls, mode="process", name="shop") as worker:
                error = (worker.submit(os._exit, 3) if cls is TaskWorker else worker.exit(3)).exception(SAFETY)
                self.assertIs(type(error), WorkerDiedError)
                until(lambda: any("takes its place" in line for line in logs.output))
            self.assertEqual(any("its state is lost" in line for line in logs.output), lost)

    def test_without_one_it_is_the_class(self):
        with self.start(Counter, mode="thread") as worker:
            self.assertEqual(list(worker.stats()["workers"]), ["Counter-0"])

    def test_threads_of_a_factory(self):
        for mode in ("thread", "asyncio"):
            with self.start(TaskWorker, mode=mode, thread_factory=OwnThread) as pool:
                self.assertIs(type(pool.submit(threading.current_thread).result(SAFETY)), OwnThread)
            for factory, error, text in ((lambda **options: 3, TypeError, "must return a threading.Thread, not 3"),
                                         (broken_factory, OSError, "no more threads")):
                with self.assertRaisesRegex(error, text):
                    self.start(TaskWorker, mode=mode, thread_factory=factory)


class ResizeTests:
    """`resize`: adds workers, retires the idle ones first, and loses nothing."""

    def setUp(self):
        self.started, self.go = self.flag(), self.flag()
        self.addCleanup(self.go.set)

    def test_more(self):
        pool = self.make(Counter, max_queued_tasks=1)
        held = [pool.hold(self.started, self.go)]
        self.started.wait()
        pool.resize(3)
        self.assertEqual((pool.get_pool_stats()["total_workers"], pool.max_workers), (3, 3))
        self.assertEqual([pool.add().result(SAFETY) for _ in range(2)], [1, 1])
        self.go.set()
        self.assertEqual(gather(held, timeout=SAFETY), ["held"])

    def test_fewer(self):
        for balancing in LoadBalancingAlgorithm if self.mode == "thread" else ["least_active"]:
            pool = self.make(Counter, max_workers=4, max_queued_tasks=None, load_balancing=balancing)
            calls = [pool.add() for _ in range(12)] + [pool.hold(self.started, self.go)]
            self.started.wait()
            self.started.count()
            gather(calls[:12], timeout=SAFETY) if balancing != "random" else None
            pool.resize(2)
            calls += [pool.add() for _ in range(6)]
            self.go.set()
            gather(calls, timeout=SAFETY)
            until(lambda pool=pool: pool.get_pool_stats()["total_workers"] == 2)
            self.assertEqual((pool.stats()["done"], pool.stats()["queued"]), (19, 0))
            pool.resize(3)
            self.assertEqual(gather([pool.echo(n) for n in range(9)], timeout=SAFETY), list(range(9)))
            pool.stop()
            self.go.count()

    def test_the_idle_go_first(self):
        pool = self.make(Counter, max_workers=3)
        held = pool.hold(self.started, self.go)
        self.started.wait()
        busy = [name for name, told in pool.stats()["workers"].items() if told["running"]]
        pool.resize(1)
        until(lambda: list(pool.stats()["workers"]) == busy)
        self.assertFalse(held.done())
        self.go.set()

    def test_the_busy_end_what_they_have(self):
        pool = self.make(Counter, max_workers=2, max_queued_tasks=None)
        held = [pool.hold(self.started, self.go) for _ in range(2)]
        queued = [pool.echo(n) for n in range(10)]
        until(lambda: all(call.running() for call in held))
        pool.resize(1)
        self.assertEqual(pool.get_pool_stats()["total_workers"], 2)
        late = pool.echo("late")
        self.go.set()
        self.assertEqual(gather([*held, *queued, late], timeout=SAFETY), ["held", "held", *range(10), "late"])
        until(lambda: pool.get_pool_stats()["total_workers"] == 1)

    def test_while_calls_come(self):
        pool = self.make(Counter, max_workers=2, max_queued_tasks=3)
        futures = []
        thread = in_thread(lambda: futures.extend(pool.echo(n) for n in range(200)))
        for size in (4, 1, 3, 2, 1, 2):
            pool.resize(size)
        thread.result(SAFETY)
        self.assertEqual(gather(futures, timeout=SAFETY), list(range(200)))
        until(lambda: pool.get_pool_stats()["total_workers"] == 2)

    def test_a_new_one_cannot_be_built(self):
        marker = self.started.path + ".built"
        pool = self.make(BuiltOnce, marker)
        self.addCleanup(os.unlink, marker)
        self.assertRaises(ZeroDivisionError, pool.resize, 2)
        until(lambda: pool.get_pool_stats()["total_workers"] == 1)
        self.assertEqual((pool.fine().result(SAFETY), pool.max_workers), ("fine", 1))

    def test_together_with_others(self):
        """Whoever comes last decides; nobody waits for a worker that was dismissed, or is left over."""
        for n in range(10 if self.mode == "thread" else 3):
            pool = self.make(Counter)
            sizes = [in_thread(pool.resize, size) for size in (3, 1, 2)]
            ends = [in_thread(pool.stop, 5)] if n % 2 else []
            for each in sizes:
                if each.exception(SAFETY) is not None:          # it was stopped before
                    self.assertIsInstance(each.exception(), (RuntimeError, WorkerDiedError))
                    self.assertTrue(ends)
            for each in ends:
                each.result(SAFETY)
            until(lambda pool=pool: pool._pool.is_stopped or
                  pool.get_pool_stats()["total_workers"] == pool.max_workers)
            pool.stop()
            until(lambda pool=pool: all(backend.ended.done() for backend in pool._pool.backends))

    def test_on_demand(self):
        pool = self.make(Counter, max_workers=1, on_demand=True)
        calls = [pool.hold(self.started, self.go), pool.echo(1)]
        self.started.wait()
        pool.resize(2)
        self.assertEqual(calls[1].result(SAFETY), 1)
        self.go.set()

    def test_bad_input(self):
        pool = self.make(Counter, max_workers=2)
        for n in (0, -1, 1.5, None, "many"):
            self.assertRaisesRegex(ValueError, f"n={n!r} is not possible: a whole number from 1", pool.resize, n)
        pool.stop()
        self.assertRaisesRegex(RuntimeError, "cannot resize Counter: it is stopped", pool.resize, 2)
        worker = self.start(Counter, mode="asyncio")
        self.assertRaisesRegex(ValueError, "mode 'asyncio' has exactly one worker", worker.resize, 2)
        worker.resize(1)


over_modes(globals(), [ResizeTests], ["thread", "process"])


class ResizeOneModeTests(CleanTestCase):
    def test_stopped_while_one_is_added(self):
        adding, go = threading.Event(), threading.Event()

        def factory(**options):
            if threading.current_thread() is not threading.main_thread():
                adding.set()
                go.wait(SAFETY)
            return threading.Thread(**options)
        pool = self.start(Counter, mode="thread", thread_factory=factory)
        resizing = in_thread(pool.resize, 2)
        adding.wait(SAFETY)
        stopping = in_thread(pool.stop, 5)
        until(lambda: pool._pool.is_stopped)
        go.set()
        for each in resizing, stopping:
            each.exception(SAFETY)
        until(lambda: all(backend.ended.done() for backend in pool._pool.backends))

    def test_only_one_try(self):
        tries = itertools.count()

        def initializer():
            if next(tries) == 1:
                raise ValueError("once")
        pool = self.start(Counter, mode="thread", initializer=initializer)
        self.assertRaisesRegex(ValueError, "once", pool.resize, 2)
        until(lambda: (pool.get_pool_stats()["total_workers"], pool.max_workers) == (1, 1))
        pool.resize(2)
        self.assertEqual((pool.get_pool_stats()["total_workers"], pool.max_workers), (2, 2))


class KillTests:
    """`cancel(kill=True)`: what runs is ended, at the cost of its worker."""

    def test_what_runs_is_ended(self):
        started, go = self.flag(), self.flag()
        before = threading.enumerate()
        self.addCleanup(CallTimeoutTests.see_threads_end, self, before)
        self.addCleanup(go.set)
        worker = self.make(Counter, max_queued_tasks=None)
        gather([worker.echo(0) for _ in range(50)], timeout=SAFETY)         # quick: calls are sent ahead
        held = worker.hold(started, go)
        others = [worker.echo(n) for n in range(10)]
        started.wait()
        self.assertFalse(held.cancel())
        with self.log_of():
            self.assertTrue(held.cancel(kill=True))
            self.assertTrue(held.cancelled())
            if self.mode == "ray":          # those that were handed over are lost
                others = [call for call in others if call.exception(SAFETY) is None]
            gather(others, timeout=SAFETY)
            self.assertEqual(worker.echo("next").result(SAFETY), "next")
        self.assertEqual(worker.stats()["deaths"], 1)
        self.assertTrue(held.cancel(kill=True))         # it is
        self.assertFalse(others[0].cancel(kill=True) if others else False)

    def test_one_that_waits_is_just_cancelled(self):
        started, go = self.flag(), self.flag()
        worker = self.make(Counter, max_queued_tasks=None)
        held, waits = worker.hold(started, go), worker.add(BaseFuture())
        started.wait()
        self.assertTrue(waits.cancel(kill=True))
        go.set()
        self.assertEqual((held.result(SAFETY), worker.stats()["deaths"]), ("held", 0))


over_modes(globals(), [KillTests], ALL_MODES[1:])


class KillOneModeTests(CleanTestCase):
    def test_when_no_thread_can_be_made(self):
        """That fails what the worker has, and nothing of others."""
        started, go = self.flag(), self.flag()
        self.addCleanup(CallTimeoutTests.see_threads_end, self, threading.enumerate())
        self.addCleanup(go.set)
        other = self.start(TaskWorker, mode="process")
        for mode in ("asyncio", "thread"):
            made = itertools.count()

            def factory(made=made, most=2 if mode == "asyncio" else 1, **options):
                if next(made) >= most:
                    raise ValueError("no thread today")
                return threading.Thread(**options)
            with self.assertLogs("concurry", "WARNING"):
                worker = self.start(Counter, mode=mode, thread_factory=factory, call_timeout={"hold": 0.1})
                calls = [worker.hold(started, go), worker.echo(1)]
                self.assertIsInstance(calls[0].exception(SAFETY), CallTimeoutError)
                self.assertRegex(str(calls[1].exception(SAFETY)), "no thread today")
                self.assertEqual(other.submit(square, 3).result(SAFETY), 9)

    def test_not_in_sync_mode(self):
        started, go = self.flag(), self.flag()
        worker = self.start(Counter, mode="sync")
        futures = []
        thread = threading.Thread(target=lambda: futures.append(worker.hold(started, go)))
        thread.start()
        started.wait()
        call = next(iter(worker._pool.calls)).future
        self.assertFalse(call.cancel(kill=True))
        go.set()
        thread.join(SAFETY)
        self.assertEqual(futures[0].result(), "held")

    def test_a_call_that_was_sent_ahead(self):
        """It is ended when its turn comes, and the calls around it are not."""
        started, go = self.flag(), self.flag()
        worker = self.start(Counter, mode="process", max_queued_tasks=None)
        gather([worker.echo(0) for _ in range(50)], timeout=SAFETY)
        first_started, first_go = self.flag(), self.flag()
        calls = [worker.hold(first_started, first_go), worker.hold(started, go), worker.echo(3), worker.echo(4)]
        first_started.wait()
        until(calls[1].running)         # that is: sent
        self.assertTrue(calls[1].cancel(kill=True))
        first_go.set()
        self.assertEqual(calls[0].result(SAFETY), "held")
        self.assertEqual(gather(calls[2:], timeout=SAFETY), [3, 4])

    def test_the_call_ends_meanwhile(self):
        """Whoever wins, no other call is lost."""
        worker = self.start(Counter, mode="process", max_queued_tasks=None)
        gather([worker.echo(0) for _ in range(50)], timeout=SAFETY)
        for _ in range(30):
            calls = [worker.echo(n) for n in range(6)]
            is_cancelled = calls[2].cancel(kill=True)
            for n, call in enumerate(calls):
                if n == 2 and is_cancelled:
                    self.assertTrue(call.cancelled())
                else:
                    self.assertEqual(call.result(SAFETY), n)


class JoinTests:
    """`stop(join=False)`, and `join`."""

    def test_stop_and_join(self):
        started, go = self.flag(), self.flag()
        pool = self.make(Counter, max_queued_tasks=None)
        held, waits = pool.hold(started, go), pool.add(BaseFuture())
        started.wait()
        with self.log_of():
            pool.stop(join=False)
        self.assertTrue(waits.cancelled())
        self.assertRaisesRegex(RuntimeError, "it is stopped", pool.add)
        self.assertFalse(pool.join(0))
        go.set()
        self.assertTrue(pool.join(SAFETY))
        self.assertEqual(held.result(0), "held")
        pool.stop()                     # does nothing
        self.assertTrue(pool.join())

    def test_shutdown_and_join(self):
        started, go = self.flag(), self.flag()
        pool = self.make(Counter, max_queued_tasks=None)
        calls = [pool.hold(started, go), pool.add()]
        pool.shutdown(wait=False)
        self.assertFalse(pool.join(0))
        go.set()
        self.assertTrue(pool.join())
        self.assertEqual(gather(calls, timeout=0), ["held", 1])

    def test_the_time_is_over(self):
        started, go = self.flag(), self.flag()
        self.addCleanup(CallTimeoutTests.see_threads_end, self, threading.enumerate())
        self.addCleanup(go.set)
        pool = self.make(Counter)
        held = pool.hold(started, go)
        started.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            pool.stop(0, join=False)
            self.assertTrue(pool.join(SAFETY))
        self.assertIsInstance(held.exception(0), WorkerDiedError)

    def test_bad_input(self):
        pool = self.make(Counter)
        self.assertRaisesRegex(RuntimeError, "cannot join Counter: it is neither stopped nor shut down", pool.join)
        pool.stop()
        self.assertRaises(TypeError, pool.join, "soon")


over_modes(globals(), [JoinTests], ["thread", "process"])


class JoinInAChildTests(ProgramCase):
    def test_nobody_waits_for_the_parents_workers(self):
        code = """
        import signal, warnings
        from concurry import Executor
        warnings.simplefilter("ignore")
        pool = Executor("thread", 1)
        pool.submit(int).result()
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(3 if pool.join() else 4)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        pool.stop()
        """
        self.check_program(code, "3\n", way="file")


class JoinFromWithinTests(CleanTestCase):
    def test_a_call_cannot_join_its_worker(self):
        pools = []
        pool = Executor("thread", max_workers=1)
        pools.append(pool)

        def stop_and_join():
            pools[0].stop(5, join=False)
            pools[0].join()
        self.assertRaisesRegex(RuntimeError, "this call of it would wait for itself",
                               pool.submit(stop_and_join).result, SAFETY)
        self.assertTrue(pool.join(SAFETY))


SERVING = """
import signal, sys, threading
from concurry import Executor, serve

def ready():
    "Say so when the signals have their handlers: the last thing before `serve` waits."
    import time
    while signal.getsignal(signal.SIGINT) is default or signal.getsignal(signal.SIGTERM) is term:
        time.sleep(0.001)
    print("ready", flush=True)

def sleep_for(seconds):
    import time
    time.sleep(seconds)
    return "slept"

default, term = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
mode, seconds, timeout = sys.argv[1], float(sys.argv[2]), eval(sys.argv[3])
pools = [Executor(mode, max_workers=1, max_queued_tasks=None), Executor("thread", max_workers=1)]
calls = [pools[0].submit(sleep_for, seconds), pools[0].submit(abs, -2), pools[1].submit(abs, -3)]
calls[2].result()
threading.Thread(target=ready).start()
try:
    serve(*pools, timeout=timeout)
finally:
    print([type(call.exception()).__name__ if not call.cancelled() and call.exception() else call.cancelled()
           for call in calls])
    print(signal.getsignal(signal.SIGINT) is default, signal.getsignal(signal.SIGTERM) is term)
"""


class ServeTests(ProgramCase):
    def serve(self, *arguments, signals, status, printed):
        program = Program(self, SERVING, *map(str, arguments), way="file")
        self.assertEqual(program.line(), "ready")
        for number in signals:
            program.popen.send_signal(number)
            if len(signals) > 1:
                until(lambda: not program_has_pending(program.popen.pid))
        output, errors = program.output()
        self.assertEqual(output.splitlines(), [printed, "True True"], errors)
        self.assertEqual(program.popen.returncode, status)
        return errors

    def test_what_was_submitted_is_finished(self):
        for mode in ("thread", "process"):
            for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
                errors = self.serve(mode, 0.2, None, signals=[number], status=status, printed="[False, False, False]")
                self.assertEqual(errors, "")

    def test_a_second_signal_stops_at_once(self):
        self.serve("process", 3600, None, signals=[signal.SIGTERM, signal.SIGINT], status=143,
                   printed="['WorkerDiedError', True, False]")

    def test_the_time_is_over(self):
        self.serve("process", 3600, 0.1, signals=[signal.SIGTERM], status=143,
                   printed="['WorkerDiedError', True, False]")

    def test_bad_input(self):
        self.assertRaisesRegex(TypeError, "a handle of a worker at least", serve)
        self.assertRaisesRegex(TypeError, "needs handles of workers, not 3", serve, 3)
        pool = self.start(Counter, mode="sync")
        self.assertRaisesRegex(ValueError, "timeout=-1 is not possible", serve, pool, timeout=-1)
        self.assertRaisesRegex(RuntimeError, "only the main thread gets", in_thread(lambda: serve(pool)).result, SAFETY)


def program_has_pending(pid):
    """Tell whether a signal that was sent to a process has not come there."""
    status = open_and_read(f"/proc/{pid}/status")
    return any(int(word, 16) for word in re.findall(r"(?:SigPnd|ShdPnd):\s*(\w+)", status))


def program_catches(pid, number):
    """Tell whether a process has a handler for a signal."""
    return int(re.search(r"SigCgt:\s*(\w+)", open_and_read(f"/proc/{pid}/status"))[1], 16) >> number - 1 & 1


def leave_with(code):
    sys.exit(code)


async def later(x):
    await asyncio.sleep(0)
    return x


class SubprocessTests(ProgramCase):
    """15.3."""

    def run_one(self, fn, *args, **kwargs):
        process = run_in_subprocess(fn, *args, **kwargs)
        self.addCleanup(process.join, SAFETY)
        self.addCleanup(process.kill)
        return process

    def test_a_function(self):
        process = self.run_one(add, 3, b=4)
        self.assertEqual(process.result(SAFETY), 7)
        process.join(SAFETY)
        self.assertEqual((process.exitcode, process.poll(), process.is_alive()), (0, 0, False))
        self.assertRegex(repr(process), r"^<process add-0 \(pid \d+\): exit code 0>$")
        self.assertEqual(self.run_one(os.getpid).result(SAFETY) == os.getpid(), False)
        self.assertEqual(self.run_one(later, 5).result(SAFETY), 5)
        self.assertEqual(self.run_one(lambda *, kill: kill, kill=2).result(SAFETY), 2)

    def test_how_it_ends(self):
        for fn, args, code, error in ((leave_with, (7,), 7, SystemExit), (leave_with, (None,), 0, SystemExit),
                                      (refuse, ("no",), 1, ValueError)):
            process = self.run_one(fn, *args)
            self.assertIsInstance(process._future.exception(SAFETY), error)
            process.join(SAFETY)
            self.assertEqual(process.exitcode, code)

    def test_signals(self):
        for end, code in (("terminate", -15), ("kill", -9)):
            started, go = self.flag(), self.flag()
            process = self.run_one(hold, started, go)
            started.wait()
            self.assertEqual((process.is_alive(), process.poll(), process.exitcode), (True, None, None))
            self.assertIn(f"(pid {process.pid}): running", repr(process))
            process.join(0)
            self.assertRaises(TimeoutError, process.result, 0)
            getattr(process, end)()
            error = process._future.exception(SAFETY)
            self.assertIsInstance(error, WorkerDiedError)
            self.assertIn("while it ran submit(hold)", str(error))
            self.assertEqual((error.pid, error.exitcode), (process.pid, code))
            process.join(SAFETY)
            self.assertEqual((process.is_alive(), process.exitcode), (False, code))
            getattr(process, end)()     # does nothing

    def test_ended_before_it_has_begun(self):
        """No other process takes its place."""
        for end in ("terminate", "kill"):
            ran = self.flag()
            process = run_in_subprocess(ran.set)
            getattr(process, end)()
            process.join(SAFETY)
            self.assertFalse(process.is_alive())
            self.assertIn(process.exitcode, (0, -15, -9))
            if process._future.exception(SAFETY) is not None:
                self.assertIsInstance(process._future.exception(), WorkerDiedError)
                self.assertEqual(process._future.exception().pid, process.pid)

    def test_exit_with_a_text(self):
        code = """
        import sys
        from concurry import run_in_subprocess
        process = run_in_subprocess(sys.exit, "a reason")
        process.join()
        print(process.exitcode)
        """
        self.check_program(code, "1\n", way="file", errors="^a reason\n$")

    def test_what_cannot_travel(self):
        self.assertRaisesRegex(TypeError, "needs a function, not 3", run_in_subprocess, 3)
        with self.assertRaisesRegex(pickle.PicklingError, r"argument 2 of add\(\)"):
            run_in_subprocess(add, 1, threading.Lock())

    def test_settings_do_not_hold_for_it(self):
        with temp_config(global_num_retries=3, process_max_workers=7, global_initializer=refuse, global_initargs=("x",)):
            self.assertEqual(self.run_one(add, 1).result(SAFETY), 11)

    def test_without_a_main_guard_and_at_the_parents_death(self):
        code = """
        import os, time
        from concurry import run_in_subprocess

        def work(x):
            return x + factor

        factor = 2
        assert run_in_subprocess(work, 1).result(30) == 3
        process = run_in_subprocess(time.sleep, 3600)
        print(process.pid, flush=True)
        os.kill(os.getpid(), 9)
        """
        program = Program(self, code, way="file")
        pid, = program.numbers()
        self.assertTrue(until_gone(pid))


# === Retries of workers ===

class Flaky(Worker):
    """Fails as often as it is told to, in every way; counts what is called."""

    def __init__(self):
        self.made = collections.Counter()

    def fail(self, times, error=KeyError):
        self.made["fail"] += 1
        if self.made["fail"] <= times:
            raise error(self.made["fail"])
        return self.made["fail"]

    async def fail_async(self, times):
        self.made["fail_async"] += 1
        await asyncio.sleep(0)
        if self.made["fail_async"] <= times:
            raise KeyError(self.made["fail_async"])
        return self.made["fail_async"]

    async def stay(self, started):
        self.made["stay"] += 1
        started.set()
        await asyncio.get_running_loop().create_future()

    def siblings(self):
        made = []
        for _ in range(3):
            before = self.made["same"]
            try:
                self.same()
            except KeyError:
                made.append(self.made["same"] - before)
        return made

    def same(self):
        self.made["same"] += 1
        raise self.__dict__.setdefault("error", KeyError("same"))

    def coroutine(self, times):
        return self.fail_later(times)

    async def fail_later(self, times):
        self.made["coroutine"] += 1
        if self.made["coroutine"] <= times:
            raise KeyError
        return self.made["coroutine"]

    def outer(self, times):
        self.made["outer"] += 1
        return self.fail(times)

    async def outer_async(self, times):
        self.made["outer"] += 1
        return await self.fail_async(times)

    def count(self):
        self.made["count"] += 1
        return self.made["count"]

    def counts(self):
        return dict(self.made)

    def holding(self):
        with self.limits.acquire():
            self.made["holding"] += 1
            if self.made["holding"] < 3:
                raise KeyError
            return self.limits.get_stats()["slots"]["in_use"]

    def fail_once_started(self, started):
        started.set()
        raise KeyError("again")

    async def fail_once_started_async(self, started):
        started.set()
        raise KeyError("again")


def decorating(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args)
    return wrapper


class Base(Worker):
    def fetch(self):
        return "base"


class Kinds(Base):
    """Class attributes that are no plain functions, and a coroutine method under an ordinary decorator."""

    size = len
    tried = 0

    @functools.lru_cache(None)
    def cached(self):
        return 7

    @decorating
    async def decorated(self):
        self.tried += 1
        if self.tried < 3:
            raise KeyError(self.tried)
        return self.tried

    def fetch(self):
        return super().fetch()

    async def within(self):
        return await self.decorated(), self.size([1, 2]), self.size([1]), self.cached(), self.fetch()


@dataclasses.dataclass
class FlakyData(Worker):
    times: int = 2
    made: int = 0

    def inner(self):
        self.made += 1
        if self.made <= self.times:
            raise KeyError(self.made)
        return self.made

    def outer(self):
        return self.inner(), self.inner()


tries = collections.Counter()


def flaky(x, times=1):
    tries[x] += 1
    if tries[x] <= times:
        raise KeyError(x)
    return x, tries[x]


async def flaky_async(x):
    return flaky(x)


class RetryTests:
    """Over all modes; where nothing is to be seen of it nobody waits."""

    def flaky(self, **options):
        return self.make(Flaky, **{"num_retries": 3, "retry_wait": 0, **options})

    def test_methods_of_every_kind(self):
        worker = self.flaky()
        self.assertEqual([worker.fail(3).result(SAFETY), worker.fail_async(3).result(SAFETY), worker.coroutine(3).result(SAFETY)],
                         [4, 4, 4])

    def test_the_last_exception(self):
        with self.assertLogs("concurry", "DEBUG") as logs:
            worker = self.flaky()
            error = worker.fail(9).exception(SAFETY)
            logging.getLogger("concurry").debug("for assertLogs, where it is logged elsewhere")
        chain = [error.args[0]]
        while error.__context__ is not None:
            error = error.__context__
            chain.append(error.args[0])
        self.assertEqual(chain, [4, 3, 2, 1])
        if self.mode not in AWAY:
            lines = [line for line in logs.output if "Flaky.fail() failed" in line]
            self.assertEqual(len(lines), 3)
            self.assertRegex(lines[1], r"^DEBUG:.*attempt 2 of 4.*KeyError\(2\)")

    def test_validators(self):
        worker = self.flaky(retry_until=lambda result: result > 4)
        error = worker.count().exception(SAFETY)
        self.assertEqual((type(error), error.attempts, error.all_results, error.method_name),
                         (RetryValidationError, 4, [1, 2, 3, 4], "count"))
        self.assertEqual(worker.count().result(SAFETY), 5)

    def test_by_method_name(self):
        worker = self.flaky(num_retries={"fail": 1, "*": 0}, retry_until={"count": lambda result: result == 2})
        self.assertEqual(worker.fail(9).exception(SAFETY).args, (2,))
        self.assertEqual(worker.fail_async(9).exception(SAFETY).args, (1,))
        self.assertIsInstance(worker.count().exception(SAFETY), RetryValidationError)
        self.assertEqual(worker.count().result(SAFETY), 2)
        worker = self.flaky(num_retries={"fail": 1})
        self.assertEqual(worker.fail_async(9).exception(SAFETY).args, (1,))

    def test_inner_calls(self):
        for outer, inner in (("outer", "fail"), ("outer_async", "fail_async")):
            worker = self.flaky()
            self.assertEqual(getattr(worker, outer)(2).result(SAFETY), 3)
            self.assertEqual(worker.counts().result(SAFETY), {"outer": 1, inner: 3})
            error = getattr(worker, outer)(99).exception(SAFETY)
            self.assertEqual(error.args, (7,))
            self.assertEqual(worker.counts().result(SAFETY), {"outer": 2, inner: 7})
            worker = self.flaky(num_retries={outer: 2, "*": 0})
            getattr(worker, outer)(99).exception(SAFETY)
            self.assertEqual(worker.counts().result(SAFETY), {"outer": 3, inner: 3})
        plain = Flaky()
        self.assertRaises(KeyError, plain.outer, 1)
        self.assertEqual(plain.made, {"outer": 1, "fail": 1})

    def test_inner_calls_of_other_kinds(self):
        worker = self.make(Kinds, num_retries={"decorated": 2, "*": 1}, retry_wait=0)
        self.assertEqual(worker.within().result(SAFETY), (3, 2, 1, 7, "base"))
        self.assertEqual((Kinds.size([1]), Kinds().size([1]), Kinds.cached.cache_info().misses), (1, 1, Kinds.cached.cache_info().misses))
        self.assertEqual(worker.size([1]).result(SAFETY), 1)

    def test_a_subclass_that_decorates_what_is_retried(self):
        self.flaky().counts().result(SAFETY)

        def doubled(fn):
            @functools.wraps(fn)
            def inner(self):
                return fn(self) * 2
            return inner

        class Sub(Flaky):
            count = doubled(Flaky.count)

            def fail(self, times):
                self.made["sub"] += 1
                return super().fail(times)
        worker = self.make(Sub, num_retries=2, retry_wait=0)
        self.assertEqual(worker.count().result(SAFETY), 2)
        worker.fail(99).exception(SAFETY)
        self.assertEqual(worker.counts().result(SAFETY), {"count": 1, "sub": 3, "fail": 3})

    def test_siblings_are_tried_alike(self):
        self.assertEqual(self.flaky(num_retries=2).siblings().result(SAFETY), [3, 3, 3])

    def test_a_worker_within_a_call_is_no_inner_call(self):
        with Flaky.options(mode="thread", num_retries=1, retry_wait=0).init() as inner:
            pool = self.make(TaskWorker, num_retries=2, retry_wait=0) if self.mode not in AWAY else None
            if pool is not None:
                pool.submit(lambda: inner.fail(99).result(SAFETY)).exception(SAFETY)
                self.assertEqual(inner.counts().result(SAFETY)["fail"], 6)

    def test_inner_calls_of_dataclasses(self):
        self.assertEqual(self.make(FlakyData, num_retries=2, retry_wait=0).outer().result(SAFETY), (3, 4))

    def test_inner_calls_of_models(self):
        pydantic = self.need("pydantic")

        class Model(Worker, pydantic.BaseModel):
            times: int = 2
            made: int = 0

            def inner(self):
                self.made += 1
                if self.made <= self.times:
                    raise KeyError(self.made)
                return self.made

            def outer(self):
                return self.inner(), self.model_dump()["made"], type(self.model_dump).__name__
        if self.mode != "ray":          # it refuses models
            self.assertEqual(self.make(Model, num_retries=2, retry_wait=0).outer().result(SAFETY), (3, 3, "method"))
        self.assertIsNone(concurry._bare_of(Model.model_dump))

    def test_limits_are_free_between_attempts(self):
        limits = LimitSet([ResourceLimit("slots", 1)])
        seen = []

        def look(exception):
            seen.append(in_use(limits)["slots"])
            return True
        worker = self.flaky(limits=limits, retry_on=KeyError if self.mode in AWAY else look)
        self.assertEqual(worker.holding().result(SAFETY), 1)
        self.assertEqual(seen, [] if self.mode in AWAY else [0, 0])
        self.assertEqual(limits.get_stats()["slots"]["granted"], 3)

    def test_functions(self):
        options = {"num_retries": 1, "retry_wait": 0}
        seen = self.flag().path, self.mode
        pool = self.make(TaskWorker, **options)
        self.assertEqual(pool.submit(flaky, ("one", *seen)).result(SAFETY)[1], 2)
        self.assertEqual(pool.submit(flaky_async, ("async", *seen)).result(SAFETY)[1], 2)
        items = [(n, *seen) for n in range(6)]
        self.assertEqual([x[1] for x in pool.map(flaky, items, chunksize=3)], [2] * 6)
        items = [(n, "async", *seen) for n in range(6)]
        self.assertEqual([x[1] for x in pool.map(flaky_async, items, chunksize=3)], [2] * 6)
        bound = self.make(TaskWorker, init={"fn": flaky}, **options)
        self.assertEqual(bound(("bound", *seen)).result(SAFETY)[1], 2)
        mapped = bound.map([(n, "bound", *seen) for n in range(4)], [1, 9, 1, 1], chunksize=2)
        self.assertEqual(next(mapped)[1], 2)
        self.assertRaises(KeyError, next, mapped)

    def test_tasks(self):
        if self.mode == "sync":
            make = task(mode="sync", num_retries=1, retry_wait=0)
        else:
            make = task(mode=self.mode, max_workers=1, num_retries=1, retry_wait=0)
        handle = make(flaky)
        self.addCleanup(handle.stop)
        self.assertEqual(handle(("task", self.mode)).result(SAFETY)[1], 2)

    def test_decorated_coroutine_functions_in_chunks(self):
        pool = self.make(TaskWorker)
        self.assertEqual(list(pool.map(decorating(square_async), range(4), chunksize=2)), [0, 1, 4, 9])
        seen = self.flag().path, self.mode
        pool = self.make(TaskWorker, num_retries=1, retry_wait=0)
        items = [(n, "decorated", *seen) for n in range(4)]
        self.assertEqual([x[1] for x in pool.map(decorating(flaky_async), items, chunksize=2)], [2] * 4)

    def test_names_that_filters_get_for_functions(self):
        def named(exception, method_name, args, worker_class):
            return (method_name, args, worker_class) == ("flaky", (("named",),), "TaskWorker")
        pool = self.make(TaskWorker, num_retries=1, retry_wait=0, retry_on=named)
        self.assertEqual(pool.submit(flaky, ("named",)).result(SAFETY)[0], ("named",))

    def test_stop_cuts_the_wait_short(self):
        for method in ("fail_once_started", "fail_once_started_async"):
            worker, started = self.flaky(retry_wait=10_000, retry_max_wait=10_000, retry_jitter=0), self.flag()
            future = in_thread(lambda: getattr(worker, method)(started).exception(SAFETY))
            started.wait()
            worker.stop(SAFETY)
            self.assertEqual(future.result(SAFETY).args, ("again",))

    def test_without_retries_nothing_is_changed(self):
        before = Counter.add
        self.make(Counter).add().result(SAFETY)
        self.assertIs(Counter.add, before)

    def test_a_class_that_is_retried_goes_to_others_as_it_was(self):
        class Local(Worker):
            def __init__(self):
                self.n = 0

            def fail(self, times):
                self.n += 1
                if self.n <= times:
                    raise KeyError(self.n)
                return self.n

            def outer(self, times):
                return self.fail(times)
        for options, expected in (({"num_retries": 2}, 3), ({}, KeyError)):
            for mode in (self.mode, "process", self.mode):
                worker = self.start(Local, mode=mode, retry_wait=0, **options)
                future = worker.outer(2)
                if expected is KeyError:
                    self.assertIsInstance(future.exception(SAFETY), KeyError)
                else:
                    self.assertEqual(future.result(SAFETY), expected)


over_modes(globals(), [RetryTests])


class ContendedLock:
    """An RLock that tells when somebody has to wait for it."""

    def __init__(self):
        self.lock, self.is_waited_for = threading.RLock(), threading.Event()

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.is_waited_for.set()
            self.lock.acquire()

    def __exit__(self, *exc_info):
        self.lock.release()


class RetryRaceTests(CleanTestCase):
    def test_workers_built_side_by_side_retry_inner_calls(self):
        class Fresh(Flaky):
            """Of which there was no worker yet."""
        wraps, lock, others = functools.wraps, ContendedLock(), []

        def build():
            return self.start(Fresh, mode="thread", num_retries={"fail": 2}, retry_wait=0)

        def wraps_while_another_is_built(fn):
            if not others:
                others.append(in_thread(build))
                others[0].add_done_callback(lambda _: lock.is_waited_for.set())
                lock.is_waited_for.wait(SAFETY)     # it is built, or waits for us
            return wraps(fn)
        with unittest.mock.patch("functools.wraps", wraps_while_another_is_built), \
                unittest.mock.patch.object(concurry, "_naming", lock):
            workers = [build(), others[0].result(SAFETY)]
        self.assertEqual([worker.outer(2).result(SAFETY) for worker in workers], [3, 3])


class RetryWaitTests(CleanTestCase):
    """What is done while a call waits for its next attempt."""

    def test_other_calls_of_an_event_loop_run(self):
        for method in ("fail_once_started", "fail_once_started_async"):
            worker, started = self.start(Flaky, mode="asyncio", num_retries={method: 1, "*": 0}, retry_wait=10_000,
                                         retry_max_wait=10_000, retry_jitter=0), self.flag()
            waiting = getattr(worker, method)(started)
            started.wait()
            self.assertEqual((worker.count().result(SAFETY), worker.fail_async(0).result(SAFETY)), (1, 1))
            self.assertFalse(waiting.done())
            worker.stop(SAFETY)
            self.assertEqual(waiting.exception(0).args, ("again",))

    def test_a_coroutine_that_waits_can_be_cancelled(self):
        worker, started = self.start(Flaky, mode="asyncio", num_retries=1, retry_wait=10_000, retry_max_wait=10_000), self.flag()
        waiting = worker.fail_once_started_async(started)
        started.wait()
        self.assertTrue(waiting.cancel())
        self.assertEqual(worker.count().result(SAFETY), 1)

    def test_what_is_cancelled_is_not_made_again(self):
        """Not even where cancellation is named."""
        worker, started = self.start(Flaky, mode="asyncio", num_retries=3, retry_wait=0,
                                     retry_on=asyncio.CancelledError), self.flag()
        future = worker.stay(started)
        started.wait()
        self.assertTrue(future.cancel())
        worker.fail_async(0).result(SAFETY)
        self.assertEqual(worker.counts().result(SAFETY)["stay"], 1)

    def test_a_waiting_call_keeps_its_place_in_the_queue(self):
        worker, started = self.start(Flaky, mode="thread", max_queued_tasks=1, num_retries=1, retry_wait=10_000,
                                     retry_max_wait=10_000, retry_jitter=0), self.flag()
        first = worker.fail_once_started(started)
        started.wait()
        second = in_thread(worker.count)
        self.assertEqual((first.done(), len(worker._pool.backends[0].calls)), (False, 1))
        with self.assertLogs("concurry", "WARNING") as logs:
            worker.stop(SAFETY)
            logging.getLogger("concurry").warning("the second call may not have come to that")
        self.assertLessEqual(len(logs.output), 2)
        self.assertEqual(first.exception(0).args, ("again",))
        second.exception(SAFETY)

    def test_pauses_are_those_of_the_plan(self):
        pauses = []
        with unittest.mock.patch.object(concurry._Halt, "pause", lambda self, seconds: pauses.append(seconds)):
            for mode in ("sync", "thread"):
                worker = self.start(Flaky, mode=mode, num_retries=3, retry_wait=2, retry_jitter=0)
                worker.fail(9).exception(SAFETY)
        self.assertEqual(pauses, [2, 4, 8] * 2)

    def test_chance_is_the_systems(self):
        """Forked workers throw different numbers."""
        self.assertIsInstance(concurry._dice(), random.SystemRandom)


# === Configuration for a while ===

class Builds(Worker):
    def __init__(self):
        self.then = global_config.get_defaults("sync")["num_retries"]

    def seen_then(self):
        return self.then


class TempConfigTests(CleanTestCase):
    def look(self, mode="thread"):
        found = global_config.get_defaults(mode)
        return found["num_retries"], found["max_workers"]

    def test_nested_and_reverted(self):
        self.assertEqual(self.look(), (0, 24))
        with temp_config(global_num_retries=3, thread_max_workers=10):
            self.assertEqual(self.look(), (3, 10))
            self.assertEqual((global_config.defaults.num_retries, global_config.thread.max_workers), (3, 10))
            with self.assertRaises(KeyError), temp_config(thread_num_retries="5"):
                self.assertEqual((self.look(), self.look("process")), ((5, 10), (3, 4)))
                raise KeyError
            self.assertEqual(self.look(), (3, 10))
            self.assertEqual(self.start(Counter, mode="thread", num_retries=1).num_retries, 1)
            self.assertEqual(self.start(Counter, mode="thread").num_retries, 3)
        self.assertEqual((self.look(), hasattr(global_config.thread, "num_retries")), ((0, 24), False))

    def test_again_with_the_same_object(self):
        config = temp_config(global_num_retries=1)
        with config, config:
            self.assertEqual(self.look()[0], 1)
        self.assertEqual(self.look()[0], 0)

    def test_wrong_names_and_values(self):
        for name, text in (("num_retries", "global_num_retries"), ("global_num_retrys", "global_num_retries"),
                           ("rays_max_workers", "unknown setting"), ("thread", "unknown setting")):
            with self.assertRaisesRegex(ValueError, text):
                temp_config(**{name: 1})
        self.assertRaisesRegex(ValueError, "from 0", temp_config, global_num_retries=-1)

    def test_threads_and_tasks_do_not_disturb_each_other(self):
        inside, go = threading.Event(), threading.Event()

        def other():
            with temp_config(global_num_retries=7):
                inside.set()
                go.wait(SAFETY)
                return self.look()[0]
        seen = in_thread(other)
        inside.wait(SAFETY)
        self.assertEqual(self.look()[0], 0)
        go.set()
        self.assertEqual(seen.result(SAFETY), 7)

        async def one(n):
            with temp_config(global_num_retries=n):
                await asyncio.sleep(0)
                return self.look()[0], await asyncio.ensure_future(self.look_async())

        async def main():
            return await asyncio.gather(*(one(n) for n in range(5)))
        self.assertEqual(asyncio.run(main()), [(n, n) for n in range(5)])

    async def look_async(self):
        return self.look()[0]

    def test_it_travels_with_the_worker(self):
        for mode, methods in (("thread", [None]), ("process", START_METHODS)):
            for method in methods:
                with temp_config(global_num_retries=4):
                    worker = self.start(TaskWorker, mode=mode, **({"mp_context": method} if method else {}))
                    seen = worker.submit(lambda: global_config.get_defaults("sync")["num_retries"]).result(SAFETY)
                self.assertEqual(seen, 4, (mode, method))
        self.assertEqual(worker.submit(lambda: global_config.get_defaults("sync")["num_retries"]).result(SAFETY), 4)

    def test_it_holds_in_constructors(self):
        """A pool that a worker makes when it is built is configured alike in every mode."""
        for mode in MODES:
            with temp_config(global_num_retries=4):
                worker = self.start(Builds, mode=mode)
            self.assertEqual(worker.seen_then().result(SAFETY), 4, mode)

    def test_one_object_in_two_threads(self):
        config, inside, go = temp_config(global_num_retries=7), threading.Event(), threading.Event()

        def other():
            with config:
                inside.set()
                go.wait(SAFETY)
            return self.look()[0]
        ended = in_thread(other)
        inside.wait(SAFETY)
        with config:
            go.set()
            self.assertEqual((ended.result(SAFETY), self.look()[0]), (0, 7))
        self.assertEqual(self.look()[0], 0)

    def test_reset(self):
        self.addCleanup(global_config.reset_to_defaults)
        global_config.defaults.num_retries = 2
        with temp_config(global_num_retries=5):
            global_config.reset_to_defaults()
            self.assertEqual(self.look()[0], 5)
        self.assertEqual(self.look()[0], 0)

    def test_every_option_has_its_default_here(self):
        self.assertEqual(set(concurry._SETTINGS), set(global_config.defaults._initial))


# === By value ===

class ByValueFunctionTests(ProgramCase):
    def test_functions(self):
        self.run_script('''
        import os
        FACTOR = 3
        def double(x, y=2, *, z: int = FACTOR) -> int:
            "Document."
            return x * y * z
        double.attribute = [1]
        def facts(f):
            return (f.__name__, f.__qualname__, f.__module__, f.__doc__, f.__defaults__,
                    f.__kwdefaults__, f.__annotations__, f.attribute, f.__globals__["__name__"])
        assert call(double, 5) == 30
        assert call(facts, double) == facts(double), call(facts, double)
        assert call(lambda x: x + FACTOR, 1) == 4
        FACTOR = 4
        assert call(lambda x: x + FACTOR, 1) == 5
        def even(n): return n == 0 or odd(n - 1)
        def odd(n): return n != 0 and even(n - 1)
        assert call(even, 10) and not call(odd, 10)
        def closures():
            def even(n): return n == 0 or odd(n - 1)
            def odd(n): return n != 0 and even(n - 1)
            return even
        assert call(closures(), 10)
        def counter():
            n = 0
            def up():
                nonlocal n
                n += 1
                return n
            def get():
                return n
            return up, get
        def use(up, get):
            up(); up()
            return get()
        assert call(use, *counter()) == 2
        def late():
            def f(): return x
            g = f
            if 0: x = 1
            return f
        try: call(late())
        except NameError: pass
        else: raise AssertionError
        f = call(lambda: (lambda a: a + FACTOR))
        assert f(1) == 5
        assert call(lambda: __name__) == "__main__"
        assert call(lambda: len([print])) == 1
        def comprehension(): return [FACTOR for _ in range(2)], {x: FACTOR for x in (1,)}
        assert call(comprehension) == ([4, 4], {1: 4})
        def attribute_is_no_global(x): return x.lock
        import threading
        lock = threading.Lock()
        class Box: lock = 1
        def body():
            class Inner: lock = 2
            return Inner.lock
        assert call(body) == 2
        assert call(attribute_is_no_global, Box) == 1
        ''')

    def test_files_and_line_numbers_stay(self):
        self.run_script('''
        def fails(): return 1 / 0
        try: call(fails)
        except ZeroDivisionError as error:
            assert "in fails" in str(error.__cause__) and __file__ in str(error.__cause__)
            assert 'Traceback (most recent call last)' in str(error.__cause__)
        assert call(lambda: __file__) == __file__
        ''', way="file")

    def test_kinds_of_functions(self):
        self.run_script('''
        import functools, asyncio
        K = 10
        def gen(n):
            for i in range(n): yield i * K
        assert call(lambda: list(gen(3))) == [0, 10, 20]
        async def co(x): return x + K
        async def agen():
            yield await co(1)
        async def collect(): return [x async for x in agen()]
        assert call(lambda: asyncio.run(co(1))) == 11
        assert call(lambda: asyncio.run(collect())) == [11]
        class Thing:
            def __init__(self): self.x = 1
            def method(self, y): return self.x + y + K
            @staticmethod
            def static(x): return x * K
            @classmethod
            def klass(cls, x): return cls.__name__ + str(x * K)
            @property
            def prop(self): return self.x * K
            @prop.setter
            def prop(self, value): self.x = value
            @functools.cached_property
            def cached(self): return [self.x]
            part = functools.partialmethod(method, 5)
            def __private(self): return 7
            def private(self): return self.__private
        assert call(Thing().method, 2) == 13
        assert call(Thing().part) == 16
        assert call(Thing.static, 2) == 20 and call(Thing.klass, 2) == "Thing20"
        assert call(Thing().private()) == 7
        def uses(t):
            t.prop = 3
            return t.prop, t.cached, t.cached is t.cached, t.part()
        assert call(uses, Thing()) == (30, [3], True, 18)
        assert call(functools.partial(Thing().method, y=1)) == 12
        @functools.lru_cache(maxsize=None)
        def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
        assert call(fib, 60) == fib(60)
        assert call(lambda: (fib(5), fib.cache_info().currsize))[1] == 6
        def same(f): return f.__wrapped__.__globals__["fib"] is f and f.__name__ == "fib"
        assert call(same, fib)
        @functools.singledispatch
        def show(x): return "object"
        @show.register(int)
        def _(x): return "int" + show([])
        @show.register(list)
        def _(x): return "list"
        assert call(show, 1) == "intlist"
        def register():
            show.register(str, lambda x: "str")
            return show(""), str in show.registry
        assert call(register) == ("str", True)
        class Multi:
            @functools.singledispatchmethod
            def go(self, x): return "object"
            @go.register(int)
            def _(self, x): return "int"
        assert call(lambda m: (m.go(1), m.go("")), Multi()) == ("int", "object")
        def deco(f):
            @functools.wraps(f)
            def wrapper(*args): return "w" + f(*args)
            return wrapper
        @deco
        def plain(x): return x
        assert call(plain, "x") == "wx"
        assert call(lambda f: f.__wrapped__("y"), plain) == "y"
        import contextlib
        @contextlib.contextmanager
        def managed(): yield K
        def within():
            with managed() as k: return k
        assert call(within) == 10
        ''')

    def test_modules_go_by_reference_with_their_submodules(self):
        self.run_script('''
        import os.path, xml.dom.minidom, types, logging
        from types import FunctionType
        assert call(lambda: os.path.join("a", "b")) == "a/b"
        assert call(lambda: xml.dom.minidom.parseString("<a/>").documentElement.tagName) == "a"
        def inside():
            import xml.sax.saxutils
            return lambda: xml.sax.saxutils.escape("<")
        assert call(inside()) == "&lt;"
        assert call(lambda: isinstance(inside, FunctionType))
        logger = logging.getLogger("x.y")
        assert call(lambda: logger.name) == "x.y"
        hand = types.ModuleType("hand")
        exec("Y = 5\\ndef f(): return Y\\nclass C: pass", hand.__dict__)
        assert call(hand.f) == 5
        assert call(lambda c: c.__module__, hand.C) == "hand"
        ''')

    def test_functions_of_an_importable_module_share_its_globals(self):
        # calendar stands for any module; its local functions and lambdas use what is there.
        self.run_script('''
        import calendar
        exec("def _hidden(): return [month_name, __name__]\\nhidden = _hidden\\ndel _hidden",
             calendar.__dict__)
        f = calendar.hidden
        def check(f):
            import calendar
            return f.__globals__ is calendar.__dict__
        assert call(check, f)
        assert call(lambda: f()[1]) == "calendar"
        ''')

    def test_globals_of_a_message(self):
        """What is submitted brings the globals of now; what is sent once keeps those it had."""
        self.run_script('''
        counter = 0
        class Thing:
            def bump(self):
                global counter
                counter += 1
        def run():
            Thing().bump()
            return counter
        assert call(run) == 1 and call(run) == 1
        counter = 5
        assert call(run) == 6
        def level(): return counter
        def keep(f): sys.kept = f
        call(keep, level)
        counter = 7
        assert call(run) == 8 and call(lambda: sys.kept()) == 5     # as it was sent
        class Once(concurry.Worker):
            def bump(self):
                global counter
                counter += 1
                return counter
            def is_mine(self, cls, obj): return cls is type(self) is type(obj)
        once = Once.options(mode="process").init()
        counter = 100
        assert once.bump().result() == 8
        assert once.bump().result() == 9
        assert once.is_mine(Once, Once()).result()
        assert once.bump().result() == 10       # it has not become the Once of that message
        bound = concurry.TaskWorker.options(mode="process").init(fn=run)
        def items():
            for n in range(3):
                yield n
                globals().update(counter=1000)
        assert list(handle.map(lambda n: counter, items(), buffersize=1)) == [100] * 3
        counter = 2000
        assert bound.submit().result() == 101
        ''')


    def test_forked_workers_see_changes(self):
        self.run_script("""
        class A: x = 1
        assert call(lambda a: (a, a.x), A) == (A, 1)
        A.x = 2
        assert call(lambda a: (a, a.x, a is A), A) == (A, 2, True)
        """, method="fork")

    def test_many_threads_load_one_class(self):
        self.run_script("""
        def load(data, n):
            import threading
            sys.setswitchinterval(1e-6)
            got, go = [], threading.Barrier(n)
            def one():
                go.wait()
                got.extend(concurry._loads(data))
            threads = [threading.Thread(target=one) for _ in range(n)]
            [t.start() for t in threads], [t.join() for t in threads]
            return len(got), len({type(a) for a in got}), all(a.x == [1] for a in got)
        for _ in range(20):
            A = type("A", (), {"x": [1]})
            data = concurry._dumps([A() for _ in range(3)])[0]
            assert call(load, data, 16) == (48, 1, True)
        """)


class ByValueClassTests(ProgramCase):
    def test_classes(self):
        self.run_script('''
        import weakref
        class Meta(type):
            def __new__(meta, name, bases, ns, **kw):
                return super().__new__(meta, name, bases, ns)
            def __init__(cls, *args, **kw):
                cls.made = getattr(cls, "made", 0) + 1
            def shout(cls): return cls.__name__.upper()
        class Base(metaclass=Meta, key=1):
            "Base doc."
            x: int = 1
            def who(self): return ["Base"]
        class Child(Base, key=2):
            def who(self): return super().who() + [__class__.__name__, Other().name()]
        class Other:
            def name(self): return "Other of " + Child.__name__
        made = Child.made
        def check(cls):
            c = cls()
            assert c.who() == ["Base", "Child", "Other of Child"], c.who()
            assert cls.shout() == "CHILD" and cls.made == made
            assert cls.__mro__[1].__doc__ == "Base doc." and cls.__mro__[1].__annotations__ == {"x": int}
            assert cls.__module__ == "__main__" and cls.__qualname__ == "Child"
            weakref.ref(c), weakref.ref(cls)
            return cls
        assert call(check, Child) is Child
        assert call(type, Child()) is Child
        Child.later = 3
        assert call(lambda c: c.later, Child) == 3
        Child.later = 4
        assert call(lambda c: (c.later, c is Child), Child) == (4, True)
        def local():
            class Local:
                def me(self): return Local, __class__
                class Inner: pass
            return Local
        Local = local()
        assert call(lambda o: o.me(), Local()) == (Local, Local)
        assert type(call(lambda: Local.Inner())) is Local.Inner
        class Stop:
            def __init__(self): self.closed = 0
            def __eq__(self, other): return True
            def __len__(self): return 3
            def __call__(self): return "called"
            def __iter__(self): return iter([1])
        s = Stop()
        assert call(lambda s: (len(s), s(), list(s), Stop.__hash__), s) == (3, "called", [1], None)
        ''')

    def test_identity_between_messages_and_home(self):
        self.run_script('''
        class A: pass
        def keep(a): sys.kept = [a]
        call(keep, A())
        assert call(lambda a: type(a) is type(sys.kept[0]) and isinstance(a, A), A())
        def make():
            class There:
                def f(self): return 1
            return There
        There = call(make)
        assert There().f() == 1 and There.__module__ == "__main__"
        # It was born there, and goes home as itself.
        def same():
            T = make()
            sys.kept = [T]
            return T
        T = call(same)
        assert call(lambda t: t is sys.kept[-1], T)
        # To a third process and back.
        def onward(a):
            with concurry.Executor("process", 1) as inner:
                result = inner.submit(lambda: (a, type(a))).result()
            return result, type(result[0]) is type(a)
        (a, cls), same_there = call(onward, A())
        assert type(a) is A and cls is A and same_there
        ''')

    def test_hooks_do_not_run_again(self):
        self.run_script('''
        import abc
        runs = []
        class Named:
            def __set_name__(self, owner, name):
                runs.append(name)
                self.name = name
        class Plugin:
            def __init_subclass__(cls, key, **kw):
                super().__init_subclass__(**kw)
                runs.append(key)
                cls.key = key
        class One(Plugin, key="one"):
            n = Named()
        class Two(One, key="two"): pass
        class Mixed(Plugin, dict, key="mixed"): pass
        class Error(Plugin, Exception, key="error"): pass
        class Abstract(Plugin, abc.ABC, key="abc"): pass
        class Concrete(Abstract, key="concrete"): pass
        class Slotted(Plugin, key="slots"):
            __slots__ = ("a",)
        class Bare:
            __slots__ = ()
            def __init_subclass__(cls, **kw): runs.append(cls)
        class Thin(Bare):
            __slots__ = ("q", "__weakref__")
        everything = [One, Two, Mixed, Error, Abstract, Concrete, Slotted, Thin]
        count = len(runs)
        def check(classes):
            assert len(runs) == count, runs
            bases = [cls.__bases__ for cls in classes]
            dicts = [hasattr(object.__new__(c) if not issubclass(c, (dict, Exception)) else c(), "__dict__")
                     for c in classes]
            return [c.key for c in classes[:-1]], One.n.name, bases, dicts
        here = check(everything)
        assert call(check, everything) == here, (here, call(check, everything))
        def more():
            class Three(One, key="three"): pass
            return Three.key, runs[-1]
        assert call(more) == ("three", "three")
        ''')

    def test_slots(self):
        self.run_script('''
        class S:
            __slots__ = ("a", "__b", "c")
            def __init__(self): self.a, self.__b = 1, 2
            def b(self): return self.__b
        class D(S):
            __slots__ = {"d": "doc"}
        class E(D): pass
        def check(s):
            assert not hasattr(s, "__dict__") and not hasattr(s, "c")
            return s.a, s.b(), type(s)
        assert call(check, S()) == (1, 2, S) and call(check, D()) == (1, 2, D)
        e = E(); e.x = 3
        assert call(lambda e: (e.x, e.b()), e) == (3, 2)
        ''')

    def test_dataclasses(self):
        self.run_script('''
        import dataclasses
        from typing import List, ClassVar
        from dataclasses import dataclass, field
        @dataclass
        class P:
            x: int
            y: List[int] = field(default_factory=list)
            k: ClassVar[int] = 4
            init: dataclasses.InitVar[int] = 0
            def __post_init__(self, init): self.x += init
        @dataclass(frozen=True, order=True)
        class F:
            a: int = 1
            b: "F" = None
        @dataclass
        class Sub(P):
            z: int = 9
        def check(P, F, Sub):
            assert [f.name for f in dataclasses.fields(P)] == ["x", "y"]
            p = P(1, init=2)
            assert p.x == 3 and p.y == [] and P(1).y is not P(1).y
            assert dataclasses.asdict(dataclasses.replace(p, x=5, init=0)) == {"x": 5, "y": []}
            try: F().a = 3
            except dataclasses.FrozenInstanceError: pass
            else: assert False
            assert F(1) < F(2) and hash(F(1)) == hash(F(1)) and repr(F(2)) == "F(a=2, b=None)"
            @dataclass
            class More(Sub):
                w: int = 1
            assert More(1).w == 1 and Sub(1).z == 9
            return p, F(3), Sub(2)
        p, f, s = call(check, P, F, Sub)
        assert p == P(3) and f == F(3) and s == Sub(2) and type(s) is Sub
        assert call(lambda f: f.a, F(7)) == 7
        @dataclass(slots=True, frozen=True)
        class L:
            a: int
            _: dataclasses.KW_ONLY
            b: int = 2
        def slotted(l, L):
            match l:
                case L(a): assert a == 1
            assert not hasattr(l, "__dict__")
            @dataclass(kw_only=True)
            class K(L.__base__):
                c: int
            return L(5, b=6), dataclasses.replace(l, b=8)
        assert call(slotted, L(1), L) == (L(5, b=6), L(1, b=8))
        ''')

    def test_enums(self):
        self.run_script('''
        import enum
        class Color(enum.Enum):
            RED = 1
            GREEN = "g"
            CRIMSON = 1
            LIST = [1]
            def shout(self): return self.name.upper() + str(K)
            @classmethod
            def first(cls): return cls.RED
            @property
            def low(self): return self.name.lower()
        K = 3
        class Number(enum.IntEnum):
            ONE = 1
            TWO = enum.auto()
        class Text(str, enum.Enum):
            A = "a"
            def _generate_next_value_(name, *args): return name.lower()
        class Perm(enum.Flag):
            R = 1
            W = 2
            RW = 3
        class IPerm(enum.IntFlag):
            R = 4
            W = 2
        class Planet(enum.Enum):
            EARTH = (1.5, 2)
            MARS = (2.5, 3)
            def __init__(self, mass, radius): self.mass, self.radius = mass, radius
            def ratio(self): return self.mass / self.radius
        class Coded(int, enum.Enum):
            def __new__(cls, value, label):
                self = int.__new__(cls, value)
                self._value_ = value
                self.label = label
                return self
            OK = 200, "fine"
            BAD = 400, "bad"
        class Pair(tuple, enum.Enum):
            X = (1, 2)
        class Missing(enum.Enum):
            A = 1
            @classmethod
            def _missing_(cls, value): return cls.A
        def check(red, Color, Number, Text, Perm, IPerm, Planet, Coded, Pair, Missing):
            assert red is Color.RED and Color(1) is red and Color["CRIMSON"] is red
            assert [c.name for c in Color] == ["RED", "GREEN", "LIST"] and Color([1]) is Color.LIST
            assert red.shout() == "RED3" and Color.first() is red and red.low == "red"
            assert Number.TWO == 2 and Number(2) is Number.TWO and isinstance(Number.ONE, int)
            assert Text.A == "a" and Text("a") is Text.A and Text.A.value == "a"
            assert Perm.R | Perm.W == Perm.RW and (Perm.R | Perm.W) is Perm.RW and Perm.R in Perm.RW
            assert (IPerm.R | IPerm.W) == 6 and IPerm.R & 4
            assert Planet.MARS.ratio() == 2.5 / 3 and Planet((1.5, 2)) is Planet.EARTH
            assert Coded.OK == 200 and Coded.OK.label == "fine" and Coded(400) is Coded.BAD
            assert Pair.X == (1, 2) and Pair.X[1] == 2
            assert Missing(77) is Missing.A and isinstance(red, enum.Enum)
            try: Color.RED = 3
            except AttributeError: pass
            else: assert False
            return (red, Number.TWO, Text.A, Perm.RW, ~Perm.R, IPerm.R | IPerm.W, Planet.MARS, Coded.BAD, Pair.X)
        back = call(check, Color.RED, Color, Number, Text, Perm, IPerm, Planet, Coded, Pair, Missing)
        here = check(Color.RED, Color, Number, Text, Perm, IPerm, Planet, Coded, Pair, Missing)
        for a, b in zip(back, here):
            assert a is b or isinstance(b, IPerm) and a == b and type(a) is IPerm, (a, b)
        assert call(lambda c: c is Color.RED, Color.RED)
        assert [repr(x) for x in call(lambda: list(Color))] == [repr(x) for x in Color]
        assert call(lambda: (repr(Color.RED), str(Number.ONE), format(Text.A), repr(Perm.RW), str(IPerm.R))) == \\
            (repr(Color.RED), str(Number.ONE), format(Text.A), repr(Perm.RW), str(IPerm.R))
        Color.later = 4
        assert call(lambda: Color.later) == 4
        class S(enum.StrEnum):
            A = enum.auto()
            B = enum.auto()
        class Strict(enum.Flag, boundary=enum.KEEP):
            A = 1
            B = 4
        def newer():
            assert S("b") is S.B and f"{S.A}" == "a"
            assert list(Strict(5)) == [Strict.A, Strict.B] and Strict(11).value == 11
            return S.B, Strict.B
        assert call(newer)[0] is S.B and call(newer)[1] is Strict.B
        import dataclasses
        @dataclasses.dataclass
        class Info:
            a: int
            b: int = 3
        class Infos(Info, enum.Enum):
            X = 1, 2
        assert call(lambda: (Infos.X.a, Infos.X.b)) == (1, 2)
        assert call(lambda: Infos.X) is Infos.X
        ''')

    def test_abc_typing_and_namedtuples(self):
        self.run_script('''
        import abc, collections, typing, sys
        from typing import Generic, TypeVar, NamedTuple, Protocol, runtime_checkable, NewType, List, Optional
        T = TypeVar("T", bound=int)
        U = TypeVar("U", int, str)
        class Shape(abc.ABC):
            @abc.abstractmethod
            def area(self): ...
            @property
            @abc.abstractmethod
            def p(self): ...
        class Square(Shape):
            def area(self): return 4
            p = 1
        @Shape.register
        class Virtual: pass
        def shapes(Shape, Square):
            try: Shape()
            except TypeError: pass
            else: assert False
            assert isinstance(Virtual(), Shape) and issubclass(Square, Shape) and Square().area() == 4
            return Square()
        assert type(call(shapes, Shape, Square)) is Square
        class Box(Generic[T]):
            def __init__(self, x): self.x = x
        class IntBox(Box[int]): pass
        def boxes():
            assert Box.__parameters__ == (T,) and IntBox.__orig_bases__ == (Box[int],)
            return Box[int](3), Box[int], T, U.__constraints__
        box, alias, t, c = call(boxes)
        assert type(box) is Box and alias == Box[int] and t is T and c == (int, str)
        class Point(NamedTuple):
            x: int
            y: int = 0
            def norm(self): return self.x + self.y
        Old = collections.namedtuple("Old", "a b")
        def points(p, o):
            assert p.norm() == 3 and p._replace(x=5).x == 5 and p._asdict() == {"x": 1, "y": 2}
            assert Point(4) == (4, 0) and Point._fields == ("x", "y") and o.b == 4
            assert repr(Old(1, 2)) == "Old(a=1, b=2)" and Old._make([1, 2]).a == 1
            return p, o
        p, o = call(points, Point(1, 2), Old(3, 4))
        assert type(p) is Point and type(o) is Old and o == (3, 4)
        class Movie(typing.TypedDict, total=False):
            name: str
        assert call(lambda: (Movie(name="x"), Movie.__total__, list(Movie.__annotations__))) == ({"name": "x"}, False, ["name"])
        @runtime_checkable
        class Sized(Protocol):
            def size(self) -> int: ...
        class Has:
            def size(self): return 1
        assert call(lambda: (isinstance(Has(), Sized), isinstance(3, Sized))) == (True, False)
        UserId = NewType("UserId", int)
        assert call(lambda: UserId(3)) == 3
        class Node:
            next: Optional["Node"] = None
            def f(self, x: List["Node"]) -> "Node": return self
        assert call(lambda: Node().f([]).next) is None
        if sys.version_info >= (3, 12):
            exec("""
        class Gen[X: int]:
            def f[Y](self, y: Y) -> X: return y
        assert call(lambda g: (g.f(2), Gen.__type_params__[0].__name__), Gen()) == (2, "X")
        """)
        class classproperty(property):
            def __get__(self, obj, cls): return self.fget(cls)
        class WithClassProperty:
            @classproperty
            def name(cls): return cls.__name__
        assert call(lambda: WithClassProperty.name) == "WithClassProperty"
        ''')

    def test_recursion_begun_anywhere(self):
        self.run_script('''
        class A:
            def __init_subclass__(cls, **kw): cls.made = True
            @property
            def me(self): return A, B
            @staticmethod
            def b(): return B()
        class B(A):
            def a(self): return super().b()
            instance = None
        B.instance = B()
        A.table = {"b": B, "f": B.a, "i": B.instance}
        for thing in (A, B, B.instance, A.__dict__["me"].fget, B.a, A.table, B().a):
            call(lambda x: x, thing)
        assert call(lambda: B.instance.me) == (A, B)
        assert type(call(B().a)) is B
        def f(): return g, C
        def g(): return f
        class C:
            f = f
            g = staticmethod(g)
        C.c = C
        assert call(lambda: f()[1].c.g()()[1] is C)
        class Table:
            @classmethod
            def make(cls): return cls
            def plain(self): return self
        Table.maker = Table.make
        Table.it = Table().plain
        assert call(lambda: Table.maker()) is Table and call(Table.it).__class__ is Table
        method = call(lambda: Table.make)
        assert method.__func__ is Table.make.__func__
        ''')


class ByValueErrorTests(ProgramCase):
    def test_kinds(self):
        self.run_script('''
        import sys, threading
        class MyError(Exception): pass
        class Needs(Exception):
            def __init__(self, code, *, text): super().__init__(text); self.code = code
        class Holds(Exception):
            def __init__(self): self.lock = threading.Lock()
        class Changes(Exception):
            def __init__(self, text): super().__init__("again: " + text)
        class Exits(Exception):
            def __reduce__(self): return sys.exit, (3,)
        class Unprintable(Exception):
            def __init__(self, a, b): super().__init__(a)
            def __str__(self): raise ValueError
        class Attributes(Exception):
            def __init__(self, a): self.a = a
        def throw(error):
            raise error() from ValueError("deeper")
        def caught(make):
            try: call(throw, make)
            except BaseException as error: return error
        error = caught(lambda: MyError(1, [2]))
        assert type(error) is MyError and error.args == (1, [2])
        text = str(error.__cause__)
        assert "deeper" in text and "direct cause" in text and "in throw" in text
        class Odd(Exception):
            def __new__(cls, *, number): return super().__new__(cls, number)
            def __init__(self, *, number): pass
        error = caught(lambda: Odd(number=7))       # what is left
        assert type(error) is concurry.RemoteError and error.type_name == "__main__.Odd" and "in throw" in error.traceback
        assert str(error) == "__main__.Odd: 7", error
        # What its constructor demands, or changes, or what it holds, is no reason for another type.
        for make in (lambda: Needs(1, text="abc"), Holds, lambda: Changes("x"), Exits, lambda: Unprintable(1, 2)):
            error = caught(make)
            assert type(error) is type(make()) and "in throw" in str(error.__cause__), error
        error = caught(lambda: Needs(1, text="abc"))
        assert (error.code, str(error), str(caught(lambda: Changes("x")))) == (1, "abc", "again: x")
        class System(OSError):
            def __init__(self, *, path): super().__init__(2, "no such"); self.path = path
        error = caught(lambda: System(path="here"))
        assert (type(error), error.errno, error.path) == (System, 2, "here")
        error = caught(Holds)
        assert not hasattr(error, "lock") and error.__notes__ == ["these members could not travel from the worker: lock"]
        error = caught(lambda: ExceptionGroup("several", [Holds(), ValueError(1), ExceptionGroup("inner", [Odd(number=1)])]))
        assert type(error) is ExceptionGroup and [type(each) for each in error.exceptions] == [Holds, ValueError, ExceptionGroup]
        assert type(error.exceptions[2].exceptions[0]) is concurry.RemoteError
        assert caught(lambda: Attributes([1])).a == [1]
        assert type(caught(lambda: SystemExit(3))) is SystemExit
        error = caught(lambda: ValueError("x" * 200_000, b"y" * 100_000))
        assert error.args[1] == b"y" * 100_000
        assert type(caught(lambda: KeyError("k"))) is KeyError
        def local():
            class Local(Exception): pass
            return Local
        Local = local()
        assert type(caught(lambda: Local(5))) is Local
        def noted():
            error = MyError("x")
            error.__notes__ = ["note"]
            return error
        assert caught(noted).__notes__ == ["note"]
        # The trial in the receiver leaves its classes as they are.
        state = 0
        class Stateful(Exception):
            def bump(self):
                global state
                state += 1
                return state
        def fails():
            Stateful().bump()
            sys.kept = [Stateful]
            raise Stateful(3)
        try: call(fails)
        except Stateful: pass
        assert call(lambda: sys.kept[-1]().bump()) == 2
        ''')

    def test_remote_error(self):
        error = RemoteError("a.B", "text", "trace")
        again = pickle.loads(pickle.dumps(error))
        self.assertEqual((again.type_name, again.traceback, str(again)), ("a.B", "trace", "a.B: text"))


# Functions that raise what HTTP clients do, in workers that have nothing but this file.

def raise_of_requests():
    import requests
    response = requests.Response()
    response.status_code, response._content = 429, b"slowly, please"
    response.headers["Retry-After"] = "3"
    response.request = requests.Request("GET", "http://here/").prepare()
    response.raise_for_status()


def raise_of_httpx():
    import httpx
    request = httpx.Request("GET", "http://here/")
    httpx.Response(429, request=request, headers={"retry-after": "7"}, content=b"slowly, please").raise_for_status()


def raise_connecting_of_httpx():
    import httpx
    raise httpx.ConnectError("refused", request=httpx.Request("GET", "http://here/"))


def raise_of_aiohttp():
    import aiohttp
    import multidict
    import yarl
    headers = multidict.CIMultiDictProxy(multidict.CIMultiDict({"Retry-After": "4"}))
    url = yarl.URL("http://here/")
    raise aiohttp.ClientResponseError(aiohttp.RequestInfo(url, "GET", headers, url), (), status=503, message="later", headers=headers)


def raise_connecting_of_aiohttp():
    import aiohttp
    key = aiohttp.client_reqrep.ConnectionKey("here", 80, False, True, None, None, None)
    raise aiohttp.ClientConnectorError(key, OSError(111, "refused"))


class StatusError(Exception):
    """As the clients of LLM services raise them."""

    def __init__(self, message, *, response, body):
        super().__init__(message)
        self.response, self.body, self.status_code, self.lock = response, body, response.status_code, threading.Lock()


def raise_status_error():
    response = types.SimpleNamespace(status_code=429, headers={"retry-after-ms": "1500"})
    raise StatusError("slowly, please", response=response, body={"type": "rate_limit"})


def raise_group():
    try:
        raise_status_error()
    except StatusError as error:
        raise ExceptionGroup("several", [error, ExceptionGroup("inner", [error, KeyError(1)])]) from error


class ErrorTravelTests(CleanTestCase):
    """4.5: exceptions of workers in other processes keep their type, and what they carry."""

    def raised(self, fn):
        """Return what a function has raised in a process; check that it is the same of a chunk."""
        pool = self.start(TaskWorker, mode="process")
        error = pool.submit(fn).exception(SAFETY)
        of_chunk = in_thread(lambda: list(pool.map(lambda _: fn(), [1, 2], chunksize=2))).exception(SAFETY)
        self.assertEqual((type(of_chunk), str(of_chunk)), (type(error), str(error)))
        self.assertIn(fn.__name__, str(error.__cause__))
        return error

    def test_of_requests(self):
        requests = self.need("requests")
        error = self.raised(raise_of_requests)
        self.assertIs(type(error), requests.HTTPError)
        self.assertEqual((error.response.status_code, error.response.text, error.request.url, concurry._wait_asked_for(error)),
                         (429, "slowly, please", "http://here/", 3.0))

    def test_of_httpx(self):
        httpx = self.need("httpx")
        error = self.raised(raise_of_httpx)
        self.assertIs(type(error), httpx.HTTPStatusError)
        self.assertEqual((error.response.status_code, error.response.text, str(error.request.url), concurry._wait_asked_for(error)),
                         (429, "slowly, please", "http://here/", 7.0))
        error = self.raised(raise_connecting_of_httpx)
        self.assertEqual((type(error), str(error), str(error.request.url)), (httpx.ConnectError, "refused", "http://here/"))

    def test_of_aiohttp(self):
        aiohttp = self.need("aiohttp")
        error = self.raised(raise_of_aiohttp)
        self.assertIs(type(error), aiohttp.ClientResponseError)
        self.assertEqual((error.status, error.message, error.headers["retry-after"], str(error.request_info.url),
                          concurry._wait_asked_for(error)), (503, "later", "4", "http://here/", 4.0))
        error = self.raised(raise_connecting_of_aiohttp)
        self.assertEqual((type(error), error.host, error.os_error.errno), (aiohttp.ClientConnectorError, "here", 111))

    def test_with_arguments_by_keyword_only(self):
        """Less the members that do not travel, which are named in a note."""
        error = self.raised(raise_status_error)
        self.assertIs(type(error), StatusError)
        self.assertEqual((str(error), error.status_code, error.body, concurry._wait_asked_for(error), error.__notes__),
                         ("slowly, please", 429, {"type": "rate_limit"}, 1.5, ["these members could not travel from the worker: lock"]))
        self.assertFalse(hasattr(error, "lock"))

    def test_within_others(self):
        error = self.raised(raise_group)
        self.assertIs(type(error), ExceptionGroup)
        first, inner = error.exceptions
        self.assertEqual([type(first), *map(type, inner.exceptions)], [StatusError, StatusError, KeyError])
        self.assertEqual((first.status_code, concurry._wait_asked_for(inner.exceptions[0])), (429, 1.5))


def call_me(*args):
    return "called"


class Nonsense:
    """Its `__reduce__` returns whatever it is told."""

    def __init__(self, reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class NonsenseByProtocol(Nonsense):
    def __reduce_ex__(self, protocol):
        return self.reduced


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def raise_nested(depth):
    raise ValueError(nested(depth))


class WithoutArgs(Exception):
    def __init__(self, *, lock):
        self.lock = lock

    @property
    def args(self):
        raise ValueError("there are none")


class OtherArgs(WithoutArgs):
    args = 5


def raise_without_args():
    raise WithoutArgs(lock=threading.Lock())


def raise_with_other_args():
    raise OtherArgs(lock=threading.Lock())


def raise_nested_groups():
    error = ValueError(threading.Lock())
    for _ in range(500):
        error = ExceptionGroup("one more", [error])
    raise error


class NonsenseTests(CleanTestCase):
    """4.5: what cannot travel fails its call alone."""

    def setUp(self):
        self.pool = self.start(TaskWorker, mode="process")
        self.pid = self.pool.submit(os.getpid).result(SAFETY)

    def check(self, place, future):
        error = future.exception(SAFETY)
        self.assertIsInstance(error, pickle.PicklingError)
        self.assertRegex(str(error), place)
        self.assertEqual(self.pool.submit(os.getpid).result(SAFETY), self.pid)

    def test_what_reduce_returns(self):
        for reduced in (5, None, (), ("x",), b"x", [call_me, ()], (call_me,), (call_me, 5), (call_me, [1]), (5, ()),
                        (call_me, (), None, 5), (call_me, (), None, None, 5), (call_me, (), None, None, None, 5),
                        (call_me, (), None, None, None, None, None), "no_such_name"):
            for cls in (Nonsense, NonsenseByProtocol):
                with self.subTest(reduced=reduced, cls=cls):
                    self.check(r"^argument 2(\[1\]\['x'\])? of submit\(\): ", self.pool.submit(len, [1, {"x": cls(reduced)}]))
                    self.check(r"^result(\[1\]\['x'\])? of submit\(\): ", self.pool.submit(nonsense, cls.__name__, pickle.dumps(reduced)))

    def test_exceptions_that_cannot_be_taken_apart(self):
        for fn in (raise_without_args, raise_with_other_args, raise_nested_groups):
            with self.subTest(fn.__name__):
                self.assertNotIsInstance(self.pool.submit(fn).exception(SAFETY), WorkerDiedError)
                self.assertEqual(self.pool.submit(os.getpid).result(SAFETY), self.pid)

    def test_what_is_nested_too_deeply(self):
        self.check(r"^argument 2 of submit\(\): cannot pickle 'list' object: it is nested too deeply$", self.pool.submit(len, nested(100_000)))
        self.check(r"^result of submit\(\): cannot pickle 'list' object: it is nested too deeply$", self.pool.submit(nested, 100_000))
        error = self.pool.submit(raise_nested, 100_000).exception(SAFETY)
        self.assertEqual((type(error), error.__notes__), (ValueError, ["these members could not travel from the worker: args[0]"]))
        self.assertEqual(self.pool.submit(os.getpid).result(SAFETY), self.pid)


def nonsense(name, reduced):
    return [1, {"x": globals()[name](pickle.loads(reduced))}]


class Buffered:
    """Its bytes go as a buffer of their own, if they are enough."""

    def __init__(self, data):
        self.data = data

    def __reduce_ex__(self, protocol):
        return Buffered, (pickle.PickleBuffer(self.data),)


def many_buffers(n):
    concurry._BUFFER_SIZE = 1           # of the worker
    return [Buffered(b"%d" % number) for number in range(n)]


def joined(each):
    return b" ".join(bytes(one.data) for one in each)


class ManyBuffersTests(CleanTestCase):
    def test_there_may_be_more_than_65535_buffers(self):
        pool, n = self.start(TaskWorker, mode="process"), 70_000
        expected = b" ".join(b"%d" % number for number in range(n))
        self.assertEqual(joined(pool.submit(many_buffers, n).result(SAFETY)), expected)
        with unittest.mock.patch.object(concurry, "_BUFFER_SIZE", 1):
            future = pool.submit(joined, [Buffered(b"%d" % number) for number in range(n)])
        self.assertEqual(future.result(SAFETY), expected)


class ByValueOptionalTests(ProgramCase):
    def test_attrs(self):
        self.need("attr")
        self.run_script('''
        import attr, attrs
        @attrs.define
        class A:
            x: int
            y: list = attrs.field(factory=list, validator=attrs.validators.instance_of(list), metadata={"m": 1})
        @attrs.frozen
        class B(A):
            z: int = attrs.field(default=3, converter=int)
        @attr.s(auto_attribs=True)
        class C:
            a: int = 1
        def check(a, A, B, C):
            assert [f.name for f in attrs.fields(B)] == ["x", "y", "z"] and attrs.fields(A).y.metadata["m"] == 1
            assert a == A(1) and attrs.evolve(a, x=2).x == 2 and attrs.asdict(a) == {"x": 1, "y": []}
            try: A(1, 2)
            except TypeError: pass
            else: assert False
            try: B(1).z = 2
            except attrs.exceptions.FrozenInstanceError: pass
            else: assert False
            return B(5, z="7"), C(4), A(1)
        assert call(check, A(1), A, B, C) == (B(5, z=7), C(4), A(1))
        ''')

    def test_validate_call(self):
        self.need("pydantic")
        for head in ("", "from __future__ import annotations\n"):
            self.run_script('''
            from pydantic import validate_call, ValidationError, BaseModel
            from typing import List
            class Conf(BaseModel):
                a: int
            @validate_call
            def f(x: int, conf: Conf = None) -> List[int]:
                return [x] if x < 2 else f(str(x - 1)) + [x]
            @validate_call(validate_return=True, config={"strict": True})
            def g(x: int) -> int: return x if x else "bad"
            assert call(f, "3") == [1, 2, 3]
            assert call(lambda: f(1, {"a": "3"})) == [1]
            assert call(lambda: f.__wrapped__ is f.raw_function and f.__name__) == "f"
            for args in (("1",), (0,)):
                try: call(g, *args)
                except (ValidationError, concurry.RemoteError) as error: pass
                else: assert False
            assert call(g, 1) == 1
            @validate_call
            async def co(x: int): return x
            import asyncio
            assert call(lambda: asyncio.run(co("3"))) == 3
            class W:
                @validate_call
                def method(self, x: int) -> int: return x + 1
            assert call(lambda w: w.method("2"), W()) == 3
            assert call(lambda: f)("2") == [1, 2]
            ''', head=head)

    def test_morphic(self):
        self.need("morphic")
        self.run_script('''
        from morphic import Typed, validate
        from typing import List
        @validate
        def f(x: int, items: List[int] = "[]"[:0] or [1]): return x, items
        assert call(f, "3", ["4"]) == (3, [4])
        class Conf(Typed):
            a: int
            b: List[int] = [1]
            def total(self): return self.a + sum(self.b) + K
        K = 100
        def check(c):
            assert Conf(a="2").a == 2 and c.total() == 106 and isinstance(c, Conf)
            try: Conf(a="x")
            except ValueError: pass
            else: assert False
            try: c.a = 4
            except Exception: pass
            else: assert False
            return Conf(a=1), Conf
        c, cls = call(check, Conf(a=5))
        assert type(c) is Conf and cls is Conf and c == Conf(a=1)
        class W:
            @validate
            def go(self, c: Conf) -> int: return c.a
        assert call(lambda: W().go({"a": "7"})) == 7
        ''')

    def test_models(self):
        self.need("pydantic")
        for head in ("", "from __future__ import annotations\n"):
            self.run_script('''
            import typing
            from typing import List, Optional, Generic, TypeVar
            from pydantic import (BaseModel, Field, PrivateAttr, ValidationError, computed_field,
                                  field_validator, model_validator, ConfigDict, field_serializer)
            LIMIT = 10
            class Inner(BaseModel):
                x: int = 1
            class Model(BaseModel):
                model_config = ConfigDict(frozen=True)
                n: int = Field(gt=0)
                inner: Inner = Inner()
                many: List[Inner] = []
                child: Optional["Model"] = None
                _secret: int = PrivateAttr(default=5)
                @field_validator("n")
                @classmethod
                def small(cls, v):
                    if v > LIMIT: raise ValueError("too big")
                    return v
                @model_validator(mode="after")
                def whole(self): return self
                @computed_field
                @property
                def twice(self) -> int: return self.n * 2
                @field_serializer("n")
                def text(self, n): return str(n)
                def method(self): return self._secret + self.n
            T = TypeVar("T")
            class Wrap(BaseModel, Generic[T]):
                it: T
            class Sub(Model):
                extra: int = 0
            def check(m, Model, Sub):
                assert m.method() == 6 and type(m.inner) is Inner and isinstance(m, Model)
                assert Model(n="3", inner={"x": "4"}).inner.x == 4
                for bad in (0, 11):
                    try: Model(n=bad)
                    except ValidationError: pass
                    else: assert False
                assert m.model_dump() == {"n": "1", "inner": {"x": 1}, "many": [], "child": None, "twice": 2}
                assert Model.model_validate_json(Sub(n=2, child=m).model_dump_json()).child.n == 1
                try: m.n = 4
                except ValidationError: pass
                else: assert False
                assert Model.model_json_schema()["$ref"] == "#/$defs/Model"
                assert Wrap[int](it="3").it == 3
                class Later(Model):
                    z: int = 3
                assert Later(n=1).z == 3
                return Model(n=2), Sub(n=3), Model
            m, s, M = call(check, Model(n=1), Model, Sub)
            assert type(m) is Model and m.n == 2 and type(s) is Sub and M is Model and m == Model(n=2)
            assert call(lambda m: m.n, Model(n=4)) == 4
            def local():
                import threading
                lock = threading.Lock()
                class Local(BaseModel):
                    q: int
                return Local
            Local = local()
            assert call(lambda: Local(q="1")) == Local(q=1)
            ''', head=head)

    def test_numpy_in_functions(self):
        self.need("numpy")
        self.run_script('''
        import numpy as np
        import numpy.linalg
        def f(a): return np.linalg.norm(a), np.sum(a), np.float64(3)
        assert call(f, np.ones(4)) == (2.0, 4.0, 3.0)
        big = np.arange(200_000)
        assert (call(lambda a: a[::2] * 2, big) == big[::2] * 2).all()
        ''')


class ByValueWaysTests(ProgramCase):
    """A script without a main guard, however it is run, under every start method."""

    BODY = '''
        import concurry
        print("once")
        class MyError(Exception): pass
        class Account(concurry.Worker):
            made = 0
            def __init__(self, start): self.money = start
            def spend(self, n):
                if n > self.money: raise MyError(n, self.money)
                self.money -= n
                return Receipt(n, self)
        class Receipt:
            def __init__(self, n, account): self.n, self.kind = n, type(account)
        K = 2
        @concurry.task(mode="process", mp_context=sys.argv[-1])
        def double(x): return [x * K, __name__]
        with Account.options(mode="process", mp_context=sys.argv[-1]).init(5) as account:
            receipt = account.spend(3).result()
            assert type(receipt) is Receipt and receipt.kind is Account and receipt.n == 3
            try: account.spend(3).result()
            except MyError as error: assert error.args == (3, 2)
            assert account.spend(2).result().n == 2         # the object kept its state
        assert double(4).result() == [8, "__main__"]
        double.stop()
        with concurry.Executor("process", 2, mp_context=sys.argv[-1]) as pool:
            assert list(pool.map(lambda x: x ** K, range(4))) == [0, 1, 4, 9]
            assert pool.submit(lambda r: r.kind is Account, receipt).result()       # on to the next worker
        print("passed")
    '''

    def check(self, way):
        programs = [Program(self, self.BODY, method, way=way) for method in START_METHODS]
        self.assertEqual([program.output() for program in programs], [("once\npassed\n", "")] * len(programs))

    def test_file(self):
        self.check("file")

    def test_standard_input(self):
        self.check("stdin")

    def test_command(self):
        self.check("-c")

    def test_interactive_main(self):
        """In a notebook each cell is compiled by itself, and `__main__` has no file."""
        self.check_program('''
            import types, concurry
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            def cell(text): exec(compile(text, "<cell>", "exec"), vars(main))
            cell("import concurry; K = 1")
            cell("""
            class Box(concurry.Worker):
                def get(self): return helper()
            """.replace("\\n            ", "\\n"))
            cell("def helper(): return K, __name__")
            cell("box = Box.options(mode='process').init(); first = box.get().result()")
            cell("K = 2")
            cell("def helper(): return K, 'new'")
            cell("second = concurry.Executor('process', 1).submit(lambda: helper()).result()")
            print(main.first, main.second)
        ''', "(1, '__main__') (2, 'new')\n")


class SurroundingsTests(ProgramCase):
    """What a worker takes over from its parent, as it is at `init`."""

    def test_path_directory_environment_and_arguments(self):
        code = '''
            import concurry
            concurry.Executor("process", 1).submit(int).result()        # the fork server runs already
            folder, method = sys.argv[1:]
            os.chdir(folder)
            sys.path.append(folder + "/more")
            os.environ["CONCURRY_NEW"] = "yes"
            os.environ.pop("CONCURRY_TESTS", None)
            sys.argv = ["other", "words"]
            with concurry.Executor("process", 1, mp_context=method) as pool:
                os.chdir("/")
                sys.path.pop()
                os.environ["CONCURRY_NEW"] = "no"
                sys.argv[:] = []
                seen = lambda: (os.getcwd(), sys.path[-1], os.environ["CONCURRY_NEW"], os.getenv("CONCURRY_TESTS"),
                                sys.argv, __import__("subprocess").check_output(["sh", "-c", "echo $CONCURRY_NEW"]))
                expected = folder, folder + "/more", "yes", None, ["other", "words"], b"yes\\n"
                assert pool.submit(seen).result() == expected, pool.submit(seen).result()
                from signal import SIGKILL
                try: pool.submit(lambda: os.kill(os.getpid(), SIGKILL)).result()
                except concurry.WorkerDiedError: pass
                assert pool.submit(seen).result() == expected           # and in its successor
            print("passed")
        '''
        for method in START_METHODS:
            with self.subTest(method):
                self.check_program(code, "passed\n", os.path.realpath(self.folder()), method, errors="a new process takes its place")

    def test_output_is_flushed_at_the_end(self):
        code = '''
            import atexit, concurry
            class Talks(concurry.Worker):
                def go(self): print("from", end=" "); print("err", end="", file=sys.stderr); atexit.register(print, "exit")
                def __del__(self): print("del", end=" ")
            print("parent", end=" ")
            worker = Talks.options(mode="process", mp_context=sys.argv[1]).init()
            worker.go().result()
            if sys.argv[2] == "stop": worker.stop()
            print("end")
        '''
        for method in START_METHODS:
            for how in ("stop", "leave"):
                with self.subTest(method, how=how):
                    program = Program(self, code, method, how)
                    output, errors = program.output()
                    self.assertEqual(sorted(output.split()), sorted("parent from del exit end".split()))
                    self.assertIn("err", errors)

    def test_standard_input_is_empty_and_descriptors_are_few(self):
        def look():
            kinds = {number: os.readlink(f"/proc/self/fd/{number}") for number in range(3, 200)
                     if os.path.islink(f"/proc/self/fd/{number}")}
            programs = subprocess.run("ls /proc/self/fd", shell=True, close_fds=False, stdout=-1, stdin=-3)
            return sys.stdin.read(), kinds, programs.stdout.split(), threading.current_thread() is threading.main_thread()

        others = set(descriptors().values())        # Ray leaves some, which a fork inherits
        for method in START_METHODS:
            with self.subTest(method), Executor("process", 2, mp_context=method) as pool:
                pool.submit(int).result()
                text, kinds, programs, is_main = pool.submit(look).result()
                sockets = [what for what in kinds.values() if "socket" in what and what not in others]
                self.assertEqual((text, len(sockets), is_main), ("", 3, True), kinds)
                self.assertFalse(set(programs) - {b"0", b"1", b"2", b"3"} if method != "fork" else 0, programs)

    def test_signals_and_interpreter_flags(self):
        """Neither the parent's handlers nor its mask reach a worker, nor the programs that it starts."""
        code = '''
            import signal, concurry
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGUSR1, lambda *args: print("handled", flush=True))
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            def look():
                import subprocess
                words = subprocess.run(["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"], stdout=-1).stdout.split()
                return int(words[1], 16), int(words[3], 16) & (1 << 1 | 1 << 14), tuple(sys.flags), sys._xoptions
            for method in sys.argv[1:]:
                with concurry.Executor("process", 1, mp_context=method) as pool:
                    assert pool.submit(look).result() == (0, 0, tuple(sys.flags), sys._xoptions), pool.submit(look).result()
            print(signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGTERM})
        '''
        self.check_program(code, "True\n", *START_METHODS, flags=["-I", "-S", "-O", "-X", "utf8"])

    def test_standard_streams_that_are_closed_or_none(self):
        """The program and its workers do without; what is closed is /dev/null in a worker, and no descriptor of ours."""
        code = '''
            import concurry, logging
            logging.disable()           # of deaths: with stderr closed that would go wherever
            os.dup2(1, 30)
            how, numbers, *methods = sys.argv[1:]
            for number in map(int, numbers):
                if how == "none": setattr(sys, ("stdin", "stdout", "stderr")[number], None)
                else: os.close(number)
            def look():
                print("lost, or into the test's pipe", end="")
                return [os.readlink(f"/proc/self/fd/{number}") for number in map(int, numbers)]
            for method in methods:
                with concurry.Executor("process", 1, mp_context=method) as pool:
                    seen = set(pool.submit(look).result())
                    if how == "closed" and seen != {"/dev/null"}: os.write(30, repr(seen).encode())
                    error = pool.submit(os._exit, 3).exception()
                    os.write(30, b"%d " % (isinstance(error, concurry.WorkerDiedError) and pool.submit(abs, -7).result()))
        '''
        for how in ("none", "closed"):
            for numbers in ("0", "1", "2", "012"):
                with self.subTest(how, numbers=numbers):
                    program = Program(self, code, how, numbers, *START_METHODS)
                    output, errors = program.output()
                    self.assertEqual((output.replace("lost, or into the test's pipe", ""), program.popen.returncode),
                                     ("7 " * len(START_METHODS), 0), errors)


class ProcessWideTests(ProgramCase):
    """5.4a: what a program has set for the whole of its process, or has inherited, does not reach its workers."""

    def test_default_timeout_of_sockets(self):
        """Whoever is idle, runs, or waits for a limit for longer than that, does so."""
        self.check_program('''
            import concurry, socket
            socket.setdefaulttimeout(0.1)
            folder, *methods = sys.argv[1:]
            fifo = folder + "/fifo"
            os.mkfifo(fifo)
            keeper = os.open(fifo, os.O_RDWR)
            def hold(): return os.read(os.open(fifo, os.O_RDONLY), 1)
            class Tally(concurry.Worker):
                count = 0
                def add(self):
                    self.count += 1
                    return self.count
                def hold(self): return hold()
                def hold_limit(self):
                    with self.limits.acquire(): return self.add()
            limits = concurry.LimitSet([concurry.ResourceLimit("slots", 1)])
            idle, busy, waiting = [[Tally.options(mode="process", mp_context=method, limits=limits).init()
                                    for method in methods] for _ in range(3)]
            assert {worker.add().result() for worker in idle + waiting} == {1}
            with limits.acquire():
                futures = [worker.hold() for worker in busy]
                asking = [worker.hold_limit() for worker in waiting]
                process = concurry.run_in_subprocess(hold)
                here, there = socket.socketpair()
                for _ in range(3):          # that time has passed for them too when it has passed for one of the program's
                    try: here.recv(1)
                    except TimeoutError: continue
                    raise AssertionError("it has no default timeout")
            os.write(keeper, b"x" * (len(futures) + 1))
            assert [future.result() for future in futures] + [process.result()] == [b"x"] * (len(futures) + 1)
            assert [future.result() for future in asking] == [2] * len(methods)
            assert {worker.add().result() for worker in idle} == {2}
            for method in methods:          # the fork server lives, too
                with concurry.Executor("process", 1, mp_context=method) as pool:
                    assert pool.submit(socket.getdefaulttimeout).result() == (0.1 if method == "fork" else None)
            for worker in idle + busy + waiting: worker.stop()
            print("passed")
        ''', "passed\n", self.folder(), *START_METHODS)

    def test_descriptors_that_do_not_block(self):
        """As an event loop or ssh leaves them; the flag is of the open pipe, so that workers have it too."""
        self.check_program('''
            import concurry
            for number in range(3): os.set_blocking(number, False)
            class Tally(concurry.Worker):
                count = 0
                def add(self):
                    self.count += 1
                    return self.count, sys.stdin.read(), [os.get_blocking(number) for number in range(3)]
                def exit(self): os._exit(3)
            for method in sys.argv[1:]:
                with Tally.options(mode="process", mp_context=method).init() as tally:
                    assert [tally.add().result() for _ in range(3)] == [(n, "", [True, False, False]) for n in (1, 2, 3)]
                    assert isinstance(tally.exit().exception(), concurry.WorkerDiedError)
                    assert tally.add().result()[0] == 1
                assert concurry.run_in_subprocess(os.get_blocking, 1).result() is False
            print("passed")
        ''', "passed\n", *START_METHODS, errors="(.*exit code 3: its state is lost, a new process takes its place\n){3}")


class GreenThreadTests(ProgramCase):
    """5.4a: programs that gevent or eventlet has patched."""

    PATCHES = {"gevent": "from gevent import monkey; monkey.patch_all()", "eventlet": "import eventlet; eventlet.monkey_patch()"}

    def check(self, package, code, expected, *arguments, errors=""):
        self.need_in_program(package)
        self.check_program(f"{self.PATCHES[package]}\n{textwrap.dedent(code)}", expected, *arguments, errors=errors,
                           flags=["-W", "ignore"])        # eventlet says that it is deprecated

    def check_threads(self, package):
        self.check(package, '''
            import concurry, queue, threading
            class Tally(concurry.Worker):
                count = 0
                def add(self):
                    self.count += 1
                    return self.count
                async def add_async(self): return self.add()
                def get(self, items): return items.get()
                def fail(self): raise LookupError("missing")
                def say(self, text): print(text)
            items = queue.Queue()
            with Tally.options(mode="thread").init() as tally:
                got = tally.get(items)
                added = tally.add()
                assert concurry.wait([got, added], timeout=0.01).not_done == {got, added}
                items.put("item")
                assert (got.result(), added.result(), tally.add_async().result()) == ("item", 1, 2)
                assert isinstance(tally.fail().exception(), LookupError)
            limits = concurry.LimitSet([concurry.ResourceLimit("slots", 2)])
            def use(n, limits):
                with limits.acquire(): return n
            with concurry.Executor("thread", 4, limits=limits) as pool: print(sum(pool.map(use, range(50))))
            left = Tally.options(mode="thread").init()      # the program ends with this one as it is
            got = left.get(items)
            threading.Timer(0, items.put, ["late"]).start()     # it runs while we wait
            assert got.result() == "late"
            left.say("pending")
            try: concurry.Executor("asyncio")
            except RuntimeError as error: print(error)
            try: Tally.options(mode="asyncio").init()
            except RuntimeError as error: print("again" if "threads" in str(error) else error)
        ''', f"1225\nmode 'asyncio' needs threads, and {package} has replaced them in this program: choose mode 'thread' or "
            "'process'\nagain\npending\n")

    def check_processes(self, package, methods):
        for method in methods:
            with self.subTest(method):
                self.check(package, '''
                    import concurry, threading
                    folder, method = sys.argv[1:]
                    fifo = folder + "/fifo"
                    os.mkfifo(fifo)
                    keeper = os.open(fifo, os.O_RDWR)
                    class Tally(concurry.Worker):
                        count = 0
                        def add(self):
                            self.count += 1
                            return self.count
                        async def add_async(self): return self.add()
                        def hold(self): return os.read(os.open(fifo, os.O_RDONLY), 1)
                        def exit(self): os._exit(3)
                        def kill(self): os.kill(os.getpid(), 9)
                        def say(self, text): print(text)
                    tally = Tally.options(mode="process", mp_context=method, call_timeout={"hold": 20}).init()
                    assert ([tally.add().result() for _ in range(3)], tally.add_async().result()) == ([1, 2, 3], 4)
                    held, added = tally.hold(), tally.add()
                    assert concurry.wait([held, added], timeout=0.01).not_done == {held, added}
                    threading.Thread(target=os.write, args=(keeper, b"x")).start()      # it runs while we wait
                    assert (held.result(), added.result()) == (b"x", 5)
                    for call in (tally.exit, tally.kill):
                        assert isinstance(call().exception(), concurry.WorkerDiedError)
                        assert tally.add().result() == 1
                    limits = concurry.LimitSet([concurry.ResourceLimit("slots", 1)])
                    def use(n, limits):
                        with limits.acquire(): return n
                    with concurry.Executor("process", 2, mp_context=method, limits=limits) as pool:
                        print(sum(pool.map(use, range(50))))
                    held, dropped = tally.hold(), tally.add()
                    while not held.running(): concurry.wait([held], timeout=0.01)
                    tally.stop(0)
                    print(type(held.exception()).__name__, dropped.cancelled(), flush=True)
                    left = Tally.options(mode="process", mp_context=method).init()
                    left.say("late")        # the program ends with this one as it is
                ''', "1225\nWorkerDiedError True\nlate\n", self.folder(), method,
                    errors="^(.*its state is lost, a new process takes its place\n){2}Tally was stopped: .* cancelled\n$")

    def test_gevent_and_threads(self):
        self.check_threads("gevent")

    def test_gevent_and_processes(self):
        self.check_processes("gevent", START_METHODS)

    def test_eventlet_and_threads(self):
        self.check_threads("eventlet")

    def test_eventlet_and_processes(self):
        self.check_processes("eventlet", ("forkserver", "spawn"))

    def test_eventlet_and_fork(self):
        self.check("eventlet", '''
            import concurry
            try: concurry.Executor("process", 1, mp_context="fork")
            except RuntimeError as error: print(error)
        ''', "mp_context='fork' does not work after eventlet's monkey patch, because other green threads would keep running in "
            "the worker: choose 'forkserver' or 'spawn'\n")


class IdentityTests(ProgramCase):
    """15.1a: a worker process knows itself and its parent, where multiprocessing and logging look."""

    @staticmethod
    def look():
        me, parent = multiprocessing.current_process(), multiprocessing.parent_process()
        return {"name": me.name, "log": logging.makeLogRecord({}).processName, "key": bytes(me.authkey),
                "parent": (parent.name, parent.pid, parent.is_alive()), "children": multiprocessing.active_children()}

    def test_of_each_worker(self):
        parent = multiprocessing.current_process().name, os.getpid(), True
        me = multiprocessing.current_process()
        self.addCleanup(setattr, me, "authkey", me.authkey)
        for method in START_METHODS:
            me.authkey = os.urandom(8)          # one that no worker can have inherited from the fork server
            with self.subTest(method), Executor("process", 2, mp_context=method, name="crunch") as pool:
                seen = gather([pool.submit(self.look) for _ in range(6)], timeout=SAFETY)
                self.assertEqual({each["name"] for each in seen}, {"crunch-0", "crunch-1"})
                for each in seen:
                    self.assertEqual(each, {"name": each["name"], "log": each["name"], "key": bytes(me.authkey),
                                            "parent": parent, "children": []})

    def test_of_the_next_one(self):
        """A worker's successor has its name, too."""
        with Executor("process", 1, name="crunch", max_tasks_per_worker=1) as pool:
            self.assertEqual([pool.submit(self.look).result(SAFETY)["log"] for _ in range(2)], ["crunch-0"] * 2)

    def test_of_a_nested_worker(self):
        def nest(method):
            with Executor("process", 1, mp_context=method, name="inner") as pool:
                return os.getpid(), pool.submit(IdentityTests.look).result()
        for method in START_METHODS:
            with self.subTest(method), Executor("process", 1, mp_context=method, name="crunch") as pool:
                outer, seen = pool.submit(nest, method).result(SAFETY)
                self.assertEqual((seen["name"], seen["log"], seen["key"], seen["parent"]),
                                 ("inner-0", "inner-0", bytes(multiprocessing.current_process().authkey), ("crunch-0", outer, True)))

    def test_of_a_function_in_a_process(self):
        process = run_in_subprocess(self.look)
        self.addCleanup(process.join, SAFETY)
        seen = process.result(SAFETY)
        self.assertEqual((seen["name"], seen["parent"][1:]), ("look-0", (os.getpid(), True)))


class SharedMemoryTests(ProgramCase):
    """5.4a: blocks of shared memory outlive the workers that attach or create them: all have one resource tracker."""

    CODE = '''
        import concurry, multiprocessing, select
        from multiprocessing.shared_memory import SharedMemory
        os.environ["MARK"] = mark = f"mark-{os.getpid()}"       # our programs are known by it
        def trackers():
            """Return the pids of the resource trackers that we or our workers have."""
            found = []
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    with open(f"/proc/{pid}/environ") as environ, open(f"/proc/{pid}/cmdline") as command:
                        if mark in environ.read() and "resource_tracker" in command.read(): found.append(int(pid))
                except OSError: pass
            return found
        def until_gone(pid):
            try: descriptor = os.pidfd_open(pid)
            except ProcessLookupError: return
            select.select([descriptor], [], [])
            os.close(descriptor)
        def attach(name):
            block = SharedMemory(name)
            block.buf[0] += 1
            block.close()
            return os.getpid()
        def create(value):
            block = SharedMemory(create=True, size=16)
            block.buf[0] = value
            block.close()
            return os.getpid(), block.name
        def nested(function, *args):
            with concurry.Executor("process", 1, max_tasks_per_worker=1) as pool:
                return pool.submit(function, *args).result()
        def read(name):
            block = SharedMemory(name)
            value = block.buf[0]
            block.close()
            block.unlink()
            return value
    '''

    def check(self, code, *arguments):
        self.check_program(textwrap.dedent(self.CODE) + textwrap.dedent(code), "passed\n", *arguments)

    def test_they_outlive_workers(self):
        """Nobody unlinks them but the program, and nobody warns of leaks."""
        for method in START_METHODS:
            with self.subTest(method):
                self.check('''
                    mine = SharedMemory(create=True, size=16)
                    with concurry.Executor("process", 1, mp_context=sys.argv[1], max_tasks_per_worker=1) as pool:
                        pids = [pool.submit(attach, mine.name).result() for _ in range(3)]
                        assert len(set(pids)) == 3, pids
                        pid, theirs = pool.submit(create, 9).result()
                        for each in pids + [pid]: until_gone(each)
                        assert pool.submit(attach, theirs).result() != pid
                        pids.append(pool.submit(nested, attach, mine.name).result())
                        pid, nested_one = pool.submit(nested, create, 7).result()
                    for each in pids + [pid]: until_gone(each)
                    assert [read(name) for name in (mine.name, theirs, nested_one)] == [4, 10, 7]
                    mine.close()
                    assert not [name for name in (mine.name, theirs, nested_one) if os.path.exists(f"/dev/shm/{name}")]
                    print("passed")
                ''', method)

    def test_one_tracker_when_it_is_used(self):
        """The worker's is the parent's, whoever is the first to use it; where nobody does there is none."""
        code = '''
            method, first = sys.argv[1:]
            with concurry.Executor("process", 2, mp_context=method) as pool:
                assert pool.submit(abs, -1).result() == 1
                assert trackers() == []
                names = []
                for who in (first, *{"worker", "parent", "nested"} - {first}):
                    for _ in range(2):
                        pid, name = (create(5) if who == "parent" else pool.submit(create, 5).result() if who == "worker"
                                     else pool.submit(nested, create, 5).result())
                        names.append(name)
                    while not trackers(): pass      # it is started beside
                    only, = trackers()
            assert trackers() == [only]
            assert [read(name) for name in names] == [5] * 6
            assert trackers() == [only]
            print("passed")
        '''
        for method, first in zip(START_METHODS, ("worker", "nested", "parent")):
            with self.subTest(method, first=first):
                self.check(code, method, first)


class MultiprocessingObjectTests(ProgramCase):
    """Queues, locks, events and values of multiprocessing, given to `init`."""

    CODE = '''
        import multiprocessing, concurry
        class Uses(concurry.Worker):
            def __init__(self, queue, event, value, lock=None, pipe=None):
                self.queue, self.event, self.value, self.lock, self.pipe = queue, event, value, lock, pipe
            def go(self):
                self.queue.put(self.event.wait(20))
                with self.lock, self.value.get_lock(): self.value.value += 1
                self.pipe.send("pipe")
        for kind, method in (pair.split(",") for pair in sys.argv[1:]):
            context = multiprocessing.get_context(kind)
            queue, event, value, (here, there) = context.Queue(), context.Event(), context.Value("i", 4), context.Pipe()
            with Uses.options(mode="process", mp_context=method).init(queue, event, value, lock=context.Lock(), pipe=there) as uses:
                future = uses.go()
                event.set()
                future.result()
                print(queue.get(timeout=20), value.value, here.recv())
            queue.close(); queue.join_thread()
    '''

    def test_spawn_and_forkserver_context(self):
        pairs = [f"{kind},{method}" for kind in ("spawn", "forkserver") for method in START_METHODS]
        self.check_program(self.CODE, "True 5 pipe\n" * len(pairs), *pairs)

    def test_fork_context(self):
        self.check_program(self.CODE, "True 5 pipe\n", "fork,fork")

    def test_fork_context_elsewhere(self):
        context = multiprocessing.get_context("fork")
        with contextlib.closing(context.Queue()) as elsewhere:
            for method in ("forkserver", "spawn"):
                for thing in (elsewhere, context.Lock(), [context.Event()]):
                    with self.assertRaisesRegex(TypeError, "fork"):
                        self.start(KeepsIt, thing, mode="process", mp_context=method)

    def test_connection_among_the_arguments(self):
        for method in START_METHODS:
            here, there = multiprocessing.Pipe()
            with here, there:
                keeps = self.start(KeepsIt, there, mode="process", mp_context=method)
                keeps.send("hello").result(SAFETY)
                self.assertEqual(here.recv(), "hello")
                keeps.stop()


# === Faults: those who suffer ===

class ExitsWhenLoaded:
    """An object that ends the process that loads it, unless it is its own."""

    def __init__(self, code=4):
        self.code, self.home = code, os.getpid()

    def __reduce__(self):
        return _exit_unless_in, (self.home, self.code)


def _exit_unless_in(home, code):
    if os.getpid() != home:
        os._exit(code)


class FailsWhenLoaded:
    def __init__(self, where=None):
        self.where = where              # None: everywhere, else in this process only

    def __reduce__(self):
        return _fail_in, (self.where,)


def _fail_in(where):
    if where in (None, os.getpid()):
        raise ZeroDivisionError("while loading")


class Picky(Exception):
    """An exception that cannot be made again from its `args` by its constructor."""

    def __init__(self, code, *, text):
        super().__init__(text)
        self.code = code


class Odd(Exception):
    """One that cannot be made again at all."""

    def __new__(cls, *, text):
        return super().__new__(cls, text)

    def __init__(self, *, text):
        pass


class Holder(Exception):
    def __init__(self):
        super().__init__("held")
        self.lock = threading.Lock()


class OwnInterrupt(BaseException):
    pass


class Moment(typing.NamedTuple):
    """When a worker dies: at the n-th coming call of a socket's method."""

    method: str
    times: int
    after: bool = False                 # once it has been carried out

    def arm(self):
        """Have this process die then. To be called in a call, whose own answer does not count."""
        count = itertools.count(1)

        def watch(frame, event, function):
            if event == ("c_return" if self.after else "c_call") and function.__name__ == self.method:
                # The end of sending the answer of this call is seen, its beginning too.
                if next(count) == self.times + (self.method == "sendall"):
                    os.kill(os.getpid(), 9)
        sys.setprofile(watch)


class Patient(Worker):
    """A worker that is made to suffer; it has a state, to tell when that is lost."""

    def __init__(self):
        self.count = 0

    def add(self, n=1):
        self.count += n
        return self.count

    def pid(self):
        return os.getpid()

    def who(self):
        return os.getpid(), threading.get_ident()

    def give(self, *args, config=None):
        return len(args)

    def note(self, path, n):
        """Write down that the call begins and ends."""
        for letter in "be":
            with open(path, "ab", 0) as file:
                file.write(f"{letter}{n} ".encode())
        return n

    def wait_for(self, flag, began=None):
        if began:
            began.set()
        flag.wait()
        return "waited"

    async def wait_for_ever(self, began):
        began.set()
        await asyncio.get_running_loop().create_future()

    def exit(self, code):
        os._exit(code)

    def exit_until(self, path, times):
        """End the process, unless that has been done so many times."""
        with open(path, "ab", 0) as file:
            file.write(b"x")
            if file.tell() <= times:
                os._exit(3)
        return "survived"

    def exit_until_then_wait(self, path, times, began):
        self.exit_until(path, times)
        began.set()
        signal.pause()

    def kill(self, number):
        os.kill(os.getpid(), number)
        signal.pause()

    def kill_when(self, flag, began):
        self.wait_for(flag, began)
        self.kill(9)

    def crash(self):
        faulthandler.disable()
        import ctypes
        ctypes.string_at(0)

    def die_at(self, moment, size=0):
        moment.arm()
        return bytearray(size)

    def close_descriptors(self):
        os.closerange(2, 1000)          # 2 too: there is a traceback that nobody wants
        return "closed"

    def send_garbage(self, garbage):
        """Send something to the parent, as if it were a message."""
        sys.modules["concurry"]._upstream.connection.sendall(garbage)
        os._exit(0)

    def throw(self, kind, *args):
        raise kind(*args)

    async def throw_async(self, kind, *args):
        raise kind(*args)

    def throw_picky(self):
        raise Picky(3, text="the original text")

    def throw_odd(self):
        raise Odd(text="the original text")

    def result_with(self, what):
        return {"fine": 1, "inner": [0, what()]}

    def ignore_and_wait(self, began):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        began.set()
        while True:
            signal.pause()

    def on_term(self, began, how, flag=None):
        """Wait for a TERM, and raise SystemExit, return, or end the process."""
        def handle(number, frame):
            if how == "tidy":
                flag.set()
                os._exit(0)
            sys.exit(3) if how == "exit" else received.append(number)
        received, (reader, writer) = [], os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)            # pause() would not notice a signal just before it
        signal.signal(signal.SIGTERM, handle)
        began.set()
        while not received:
            os.read(reader, 1)
            # Has Python look for signals: in a process that was forked by another thread than the main one 3.13 does
            # so only when a system call is interrupted.
            signal.pthread_kill(threading.get_ident(), 0)
        return "cleaned up"


STARTED = []                    # in a worker: what it must not warn of when it is collected


class Starter(Patient):
    """A worker whose calls leave behind what does not end by itself."""

    def program(self, path, began, then="return", **options):
        """Start a program and write down its pid; then wait for it, end, or return."""
        program = subprocess.Popen(["sleep", "1000"], **options)
        STARTED.append(program)
        with open(path, "a") as file:
            file.write(f"{program.pid} ")
        began.set()
        if then == "wait":
            program.wait()
        elif then == "exit":
            os._exit(3)
        elif then == "kill":
            os.kill(os.getpid(), 9)
        return os.getpid()

    def children(self, kind):
        """Leave children of multiprocessing behind, which it would wait for; return the pids of all."""
        concurry._END_TIMEOUT = 0.1             # for those that do not end by themselves
        warnings.simplefilter("ignore", DeprecationWarning)         # of fork() beside threads
        context = multiprocessing.get_context("fork")
        if kind == "idle":
            pool = context.Pool(2)
            STARTED.append(pool)
            return [os.getpid(), *pool.map(own_pid, range(2))]
        process = context.Process(target=signal.pause)
        process.start()
        return [os.getpid(), process.pid]

    def at_exit(self, what, *args, limit=0.1):
        """Leave an exit function behind; have it end after the limit."""
        concurry._END_TIMEOUT = limit
        atexit.register(what, *args)
        return [os.getpid()]


def own_pid(_):
    return os.getpid()


class Fragile(Worker):
    """A worker that cannot be built, at first or when it is built again."""

    def __init__(self, how, path=None, times=1):
        if path is not None:                    # it may be built so many times
            with open(path, "a+") as file:
                file.write("x")
                if file.tell() <= times:
                    return
        if isinstance(how, int):
            os._exit(how)
        if not isinstance(how, Moment):
            raise how
        how.arm()

    def exit(self, code=5):
        os._exit(code)

    def pid(self):
        return os.getpid()


class KeepsIt(Worker):
    def __init__(self, it):
        self.it = it

    def send(self, what):
        self.it.send(what)


class LaunchTests(ProgramCase):
    def test_no_interpreter(self):
        self.addCleanup(setattr, sys, "executable", sys.executable)
        concurry._close_server()
        folder = self.folder()
        app, plain, directory = (os.path.join(folder, name) for name in ("app", "python3", "python"))
        os.mkdir(directory)
        for path in (app, plain):
            with open(path, "w") as file:
                file.write(f"#!/bin/sh\nexec {sys.executable} \"$@\"\n")
        os.chmod(app, 0o755)
        for executable in ("/no/such", "/bin/false", "", None, "/no/such/python3", app, plain, directory):
            sys.executable = executable
            for method in ("forkserver", "spawn"):
                with self.subTest(method, executable=executable):
                    with self.assertRaisesRegex(RuntimeError, f"sys.executable is {executable!r}; choose mp_context='fork'"):
                        Patient.options(mode="process", mp_context=method).init()
            with self.start(Patient, mode="process", mp_context="fork") as worker:
                self.assertEqual(worker.add(1).result(SAFETY), 1)

    def test_frozen_program(self):
        """It is its own `sys.executable`: nothing starts it again, whose workers would start it again."""
        folder = self.folder()
        app, script = os.path.join(folder, "app"), os.path.join(folder, "script.py")
        with open(app, "w") as file:
            file.write(f"#!/bin/sh\nexec {sys.executable} {script} \"$@\"\n")
        os.chmod(app, 0o755)
        with open(script, "w") as file:
            file.write(HEAD + textwrap.dedent('''
                here = os.path.dirname(os.path.abspath(__file__))
                with open(here + "/runs", "a+") as runs:
                    runs.write("run")
                    if runs.tell() > 9: sys.exit("a chain of copies of the program, broken off here")
                sys.frozen, sys.executable = True, here + "/app"
                import concurry
                class Tally(concurry.Worker):
                    def double(self, n): return 2 * n
                for method in ("forkserver", "spawn", "fork"):
                    try:
                        with concurry.Executor("process", 2, mp_context=method) as pool: print(*pool.map(abs, [-1, -2]))
                        tally = Tally.options(mode="process", mp_context=method).init()
                        print(tally.double(3).result())
                    except RuntimeError as error: print(error)
                try: concurry.run_in_subprocess(abs, -1).result()
                except RuntimeError as error: print(error)
            '''))
        error = ("worker processes need a Python interpreter, and none was found: this program is frozen (sys.frozen); "
                 "choose mp_context='fork', which does not need one\n")
        self.check_program("", f"{error}{error}1 2\n6\n{error}", command=[app])
        self.assertEqual(open_and_read(os.path.join(folder, "runs")), "run")

    def test_fork_server_killed(self):
        """Its workers live on; a new one is made for what comes."""
        first = self.start(Patient, mode="process")
        first.add(5).result(SAFETY)
        server = concurry._fork_servers._server.pid
        os.kill(server, 9)
        self.assertTrue(until_gone(server))
        second = self.start(Patient, mode="process")
        self.assertEqual((first.add(1).result(SAFETY), second.add(1).result(SAFETY)), (6, 1))
        with self.log_of():
            self.assertIs(type(first.exit(3).exception(SAFETY)), WorkerDiedError)
            self.assertEqual(first.add(1).result(SAFETY), 1)


@contextlib.contextmanager
def starts_refused(times):
    """Have the system refuse so many processes."""
    launch, before = concurry._launch, itertools.count()

    def refuse(*args):
        if next(before) < times:
            raise OSError(24, "Too many open files")
        return launch(*args)
    with unittest.mock.patch.object(concurry, "_launch", refuse):
        yield


@contextlib.contextmanager
def tries_held():
    """Yield a queue of (seconds, go) for each start that is to be tried again after these seconds: it is when `go` is called."""
    later, tries = concurry._Reader.later, queue.SimpleQueue()

    def hold_back(reader, seconds, function):
        if getattr(function, "__name__", None) != "_launch":
            return later(reader, seconds, function)
        timer = later(reader, 3600, function)
        tries.put((seconds, lambda: reader.post(lambda: ring(reader, timer))))
        return timer

    def ring(reader, timer):
        function = timer[2]
        reader.cancel(timer)
        function()
    with unittest.mock.patch.object(concurry._Reader, "later", hold_back):
        yield tries


class RefusedStartTests(CleanTestCase):
    """A replacement that the system refuses is tried again, until the pool has its size (SPEC 14.5, FAULTS 30)."""

    def kill(self, pid):
        os.kill(pid, 9)
        self.assertTrue(until_gone(pid))

    def test_others_serve_meanwhile(self):
        pool = self.start(Patient, mode="process", max_workers=3)
        with tries_held() as tries, self.log_of() as logs:
            for delays in [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10], [0.1]:      # it begins anew
                killed, *others = [pool.pid().result(SAFETY) for _ in range(3)]
                with starts_refused(len(delays)):
                    self.kill(killed)
                    for delay in delays:
                        seconds, go = tries.get(timeout=SAFETY)
                        self.assertAlmostEqual(seconds, delay)
                        until(lambda: pool.get_pool_stats()["total_workers"] == 2)
                        self.assertEqual({pool.pid().result(SAFETY) for _ in range(4)}, {*others})
                        go()
                    until(lambda: pool.get_pool_stats()["total_workers"] == 3)
                    there = {pool.pid().result(SAFETY) for _ in range(6)}
                    self.assertEqual((len(there), there & {killed, *others}), (3, {*others}))
        refusals = [line for line in logs.output if "trying again in" in line]
        self.assertEqual(len(refusals), 10)
        self.assertRegex(refusals[1], "Patient-0.*Too many open files.*trying again in 0.2 s")

    def test_the_calls_of_the_only_worker_wait(self):
        for is_left in (False, True):
            with tries_held() as tries, self.log_of():
                pool = self.start(Patient, mode="process", max_queued_tasks=None)
                with starts_refused(2):
                    killed, *waiting = [pool.exit(3), *(pool.add() for _ in range(3))]
                    for go in (tries.get(timeout=SAFETY)[1] for _ in range(2)):
                        self.assertIsInstance(killed.exception(SAFETY), WorkerDiedError)
                        waiting.append(pool.add())
                        self.assertFalse(any(future.done() for future in waiting))
                        go()
                leaving = in_thread(pool.shutdown) if is_left else done_future()
                self.assertEqual(gather(waiting, timeout=SAFETY), [1, 2, 3, 4, 5])
                leaving.result(SAFETY)

    def test_stopped_meanwhile(self):
        """At once, and nothing is left."""
        for size in (1, 3):
            pool = self.start(Patient, mode="process", max_workers=size, max_queued_tasks=None)
            with self.subTest(size=size), tries_held() as tries, starts_refused(100), self.log_of():
                thread = pool._pool.backends[0].reader.thread
                pids = [pool.pid().result(SAFETY) for _ in range(size)]
                for pid in pids:
                    self.kill(pid)
                    tries.get(timeout=SAFETY)
                waiting = [pool.add() for _ in range(4)]
                in_thread(pool.stop, 600).result(SAFETY)
                self.assertEqual([future.cancelled() for future in waiting], [True] * 4)
                thread.join(SAFETY)
                self.assertFalse(thread.is_alive())

    def test_made_smaller_meanwhile(self):
        pool = self.start(Patient, mode="process", max_workers=3)
        with tries_held() as tries, starts_refused(1), self.log_of():
            self.kill(pool.pid().result(SAFETY))
            _, go = tries.get(timeout=SAFETY)
            until(lambda: pool.get_pool_stats()["total_workers"] == 2)
            pool.resize(2)
            go()
            done = threading.Event()
            concurry._readers[os.getpid()].post(done.set)       # it has been tried
            self.assertTrue(done.wait(SAFETY))
            until(lambda: len({pool.pid().result(SAFETY) for _ in range(6)}) == pool.get_pool_stats()["total_workers"])
            self.assertEqual(pool.get_pool_stats()["total_workers"], 2)

    def test_shut_down_meanwhile(self):
        pool = self.start(Patient, mode="process")
        with tries_held() as tries, starts_refused(100), self.log_of():
            self.kill(pool.pid().result(SAFETY))
            tries.get(timeout=SAFETY)
            in_thread(pool.shutdown).result(SAFETY)

    def test_an_error_of_the_constructor_is_the_workers(self):
        """Though it is an OSError: after three starts the worker is given up. Those that are refused do not count."""
        with tries_held() as tries, self.log_of():
            path = os.path.join(self.folder(), "starts")
            pool = self.start(Fragile, FileNotFoundError(2, "my own"), path, mode="process")
            with starts_refused(2):
                self.kill(pool.pid().result(SAFETY))
                for _ in range(2):
                    tries.get(timeout=SAFETY)[1]()
                error = pool.pid().exception(SAFETY)
            self.assertEqual((type(error), error.args), (FileNotFoundError, (2, "my own")))
            self.assertEqual(len(open_and_read(path)), 4)
            self.assertTrue(tries.empty())

    def test_a_process_that_cannot_be_told_what_it_needs(self):
        """It has been started, and is not left as a zombie."""
        send, launch, errors, pids = socket.send_fds, concurry._launch, [], []

        def send_fds(*args):
            if errors and sys._getframe(1).f_code is concurry._ProcessBackend._launch.__code__:
                raise errors.pop()
            return send(*args)

        def launch_and_note(*args):
            process = launch(*args)
            pids.append(process.pid)
            return process
        with unittest.mock.patch("socket.send_fds", send_fds), self.log_of(), \
                unittest.mock.patch.object(concurry, "_launch", launch_and_note):
            for method in START_METHODS:
                with self.subTest(method), self.start(Patient, mode="process", mp_context=method) as pool, tries_held() as tries:
                    pool.add().result(SAFETY)
                    before = set(descriptors().items())
                    errors.append(OSError(105, "No buffer space available"))
                    with self.assertRaisesRegex(OSError, "No buffer space"):
                        self.start(Patient, mode="process", mp_context=method)
                    self.assertEqual(set(descriptors().items()) - before, set())
                    errors.append(OSError(105, "No buffer space available"))
                    pool.exit(3).exception(SAFETY)
                    tries.get(timeout=SAFETY)[1]()
                    self.assertEqual(pool.add().result(SAFETY), 1)
                    until(lambda: {pid for pid in pids if os.path.exists(f"/proc/{pid}")} == {pids[-1]})


@contextlib.contextmanager
def threads_refused(name):
    """Have the system refuse threads whose name matches."""
    start = threading.Thread.start

    def refuse(thread):
        if re.fullmatch(name, thread.name):
            raise RuntimeError("can't start new thread")
        start(thread)
    with unittest.mock.patch("threading.Thread.start", refuse):
        yield


class RefusedThreadTests(ProgramCase):
    """The call fails with the cause, or `init` raises it; nothing is left pending (FAULTS 42)."""

    def test_a_late_call(self):
        """In sync mode it needs none; on demand it fails, unless there is another worker, which has it then."""
        here, dependency = self.start(TaskWorker, mode="sync"), BaseFuture()
        waiting = in_thread_until_it_waits(here.submit, square, dependency)
        with threads_refused(".*"):
            dependency.set_result(2)
            self.assertEqual(waiting.result(SAFETY).result(SAFETY), 4)
        pool = self.start(TaskWorker, mode="thread", max_workers=2, on_demand=True)
        started, go, dependency = self.flag(), self.flag(), BaseFuture()
        late = pool.submit(square, dependency)
        with threads_refused(".*"):
            dependency.set_result(3)
            for future in late, pool.submit(square, 4):
                self.assertRaisesRegex(RuntimeError, "can't start new thread", future.result, SAFETY)
        held, dependency = pool.submit(hold, started, go), BaseFuture()
        started.wait()
        with threads_refused(".*"):
            waiting = [pool.submit(square, 5), pool.submit(square, dependency)]
            dependency.set_result(6)
        go.set()
        self.assertEqual(gather([held, *waiting], timeout=SAFETY), ["held", 25, 36])
        self.assertEqual(pool._pool.calls, {})

    def test_those_that_init_needs(self):
        until(lambda: not concurry._readers)
        before = set(descriptors().items())
        for mode, name, options in (("thread", "TaskWorker-1", {"max_workers": 2}), ("asyncio", "TaskWorker-0", {}),
                                    ("asyncio", "TaskWorker-0-plain", {}), ("process", "concurry reader", {}),
                                    ("process", "concurry reader", {"call_timeout": 60})):
            with self.subTest(mode=mode, name=name, **options), threads_refused(name):
                self.assertRaisesRegex(RuntimeError, "can't start new thread", self.start, TaskWorker, mode=mode, **options)
                until(lambda: not set(descriptors().items()) - before)
        pool = self.start(TaskWorker, mode="process", max_workers=1, on_demand=True)
        with threads_refused("concurry reader"):
            for argument in 2, done_future(result=3):
                self.assertRaisesRegex(RuntimeError, "can't start new thread", pool.submit(square, argument).result, SAFETY)
        self.assertEqual(pool.submit(square, 4).result(SAFETY), 16)

    def test_serve(self):
        """It ends as ever: what was submitted is finished at the interpreter's exit, at the latest."""
        path = os.path.join(self.folder(), "fifo")
        os.mkfifo(path)
        program = Program(self, """
            import concurry, threading
            def wait(path):
                with open(path) as file: return file.read()
            def refuse(thread): raise RuntimeError("can't start new thread")
            pools = [concurry.Executor("process", 1, max_queued_tasks=None), concurry.Executor("thread", 1)]
            pools[0].submit(int).result()
            threading.Thread.start = refuse
            for call in pools[0].submit(wait, sys.argv[1]), pools[0].submit(abs, -2), pools[1].submit(abs, -3):
                call.add_done_callback(lambda call: print(call.result(), flush=True))
            concurry.serve(*pools)
        """, path, way="file")
        self.assertEqual(program.line(), "3")
        until(lambda: program_catches(program.popen.pid, signal.SIGTERM))
        wait_until_asleep(program.popen.pid)
        program.popen.send_signal(signal.SIGTERM)
        with open(path, "w") as file:
            file.write("1")
        self.assertEqual((*program.output(), program.popen.returncode), ("1\n2\n", "", 143))

    def test_a_thread_in_the_place_of_one_that_takes_too_long(self):
        self.addCleanup(CallTimeoutTests.see_threads_end, self, threading.enumerate())
        pool, started, go = self.start(TaskWorker, mode="thread", max_queued_tasks=None), self.flag(), self.flag()
        self.addCleanup(go.set)
        held, waiting = pool.submit(hold, started, go), pool.submit(square, 3)
        started.wait()
        with threads_refused("TaskWorker.*"), self.log_of():
            self.assertTrue(held.cancel(kill=True))
            for future in waiting, pool.submit(square, 3):
                self.assertRaisesRegex(RuntimeError, "can't start new thread", future.result, SAFETY)

    def test_at_the_interpreters_exit(self):
        """3.12 refuses them all then; neither who waits in sync mode nor who is late hangs, or is cancelled."""
        ended = run_script("""
            import concurry, threading
            dependency, looked = concurry.BaseFuture(), threading.Event()
            here, worker = concurry.Executor("sync"), concurry.Executor("thread", 1)
            on_demand = concurry.Executor("thread", 2, on_demand=True)
            def slow(n):
                while not concurry._is_exiting: pass
                try: on_demand.submit(abs, n)
                except RuntimeError as error: print("refused:", error)
                dependency.set_result(n)
                print("late:", late.exception() or late.result())
                return n
            late = on_demand.submit(abs, dependency)
            future = worker.submit(slow, -5)
            waiting = threading.Thread(target=lambda: print("waited:", here.submit(abs, future).result()))
            # Have the main thread look what is left between the end of that call and the beginning of the one that waits for it.
            sleep, run, withdraw = concurry._Watch.sleep, concurry._run, concurry._withdraw
            def sleep_on(*args):
                slept = sleep(*args)
                if threading.current_thread() is waiting: looked.wait(10)
                return slept
            def look(function, *args):
                if future.done() and threading.current_thread() is threading.main_thread(): looked.set()
                return function(*args)
            concurry._Watch.sleep = sleep_on
            concurry._run = lambda *args: look(run, *args)
            concurry._withdraw = lambda *args: look(withdraw, *args)
            waiting.start()
            while all(call.watch is None for call in list(here._pool.calls)): pass
        """)
        self.assertRegex(ended.stdout, r"refused: .*the interpreter is exiting.*\nlate: (5|can't \w+ new thread.*)\nwaited: 5\n")
        self.assertEqual(ended.stderr, "")


class ProcessGroupTests(ProgramCase):
    """15.6: what a worker's calls start belongs to its group; see row 40 of the table of faults for its end."""

    def test_a_worker_leads_a_group(self):
        def look():
            cat = subprocess.run(["cat"], stdout=subprocess.PIPE)           # its standard input is the worker's
            group = subprocess.run([sys.executable, "-c", "import os; print(os.getpgid(0))"], stdout=subprocess.PIPE)
            return os.getpid(), os.getpgid(0), int(group.stdout), os.getsid(0), cat.stdout
        for method in START_METHODS:
            with self.subTest(method), Executor("process", 2, mp_context=method) as pool:
                for pid, *others in gather([pool.submit(look) for _ in range(2)], timeout=SAFETY):
                    self.assertEqual(others, [pid, pid, os.getsid(0), b""])

    def test_one_with_a_session_of_its_own_lives_on(self):
        """Whatever ends its worker."""
        path, began = os.path.join(self.folder(), "pids"), self.flag()
        open(path, "w").close()
        self.addCleanup(self.kill_all, path)
        for method in START_METHODS:
            worker = self.start(Starter, mode="process", mp_context=method, max_tasks_per_worker=2)
            recycled = [worker.program(path, began, start_new_session=True).result(SAFETY) for _ in range(2)]
            with self.log_of():
                worker.program(path, began, "exit", start_new_session=True).exception(SAFETY)
                waits = self.flag()
                call = worker.program(path, waits, "wait", start_new_session=True)
                waits.wait()
                self.assertTrue(call.cancel(kill=True))
                worker.stop()
            check_gone(self, recycled)
        pids = list(map(int, open_and_read(path).split()))
        self.assertEqual(len(pids), 4 * len(START_METHODS))
        for pid in pids:
            self.assertTrue(lives(pid))
            os.kill(pid, signal.SIGKILL)
            self.assertTrue(until_gone(pid))

    @staticmethod
    def kill_all(path):
        for word in open_and_read(path).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(word), signal.SIGKILL)

    def test_of_a_function_in_a_process(self):
        """Its programs end with it, too."""
        def start(path):
            program = subprocess.Popen(["sleep", "1000"])
            with open(path, "w") as file:
                file.write(str(program.pid))
        path = os.path.join(self.folder(), "pid")
        process = run_in_subprocess(start, path)
        process.join(SAFETY)
        self.assertTrue(until_gone(int(open_and_read(path))))
        self.assertEqual(process.exitcode, 0)


class ExitFunctionTests(ProgramCase):
    """15.6: exit functions of a worker process have some seconds; nobody waits longer for them, and a successor not at all."""

    def dump(self, worker):
        file = io.StringIO()
        worker.dump(file)
        return file.getvalue()

    def test_one_that_never_returns(self):
        """Leaving `with` does."""
        for method in START_METHODS:
            began, never = self.flag(), self.flag()
            with self.subTest(method):
                with Starter.options(mode="process", mp_context=method).init() as worker:
                    pid, = worker.at_exit(hold, began, never).result(SAFETY)
                self.assertTrue(until_gone(pid))
                began.wait()

    def test_one_that_holds_up_the_whole_process(self):
        """Then it is the parent that ends it."""
        for what, *args in ((signal.raise_signal, signal.SIGSTOP), (exec, HOLD_GIL, {})):
            with self.subTest(what), unittest.mock.patch.object(concurry, "_END_TIMEOUT", -0.9):
                with Starter.options(mode="process").init() as worker:
                    pid, = worker.at_exit(what, *args, limit=5).result(SAFETY)
                self.assertTrue(until_gone(pid))

    def test_a_successor_does_not_wait(self):
        """It serves the next call while the exit functions still run, which `dump` tells."""
        for method in START_METHODS:
            began, go = self.flag(), self.flag()
            with self.subTest(method), Starter.options(mode="process", mp_context=method, max_tasks_per_worker=1).init() as worker:
                pid, = worker.at_exit(hold, began, go, limit=SAFETY).result(SAFETY)
                began.wait()
                other = worker.pid().result(SAFETY)
                self.assertNotEqual(other, pid)
                self.assertIn(f"Starter-0 (pid {pid}): ending\n", self.dump(worker))
                self.assertTrue(lives(pid))
                go.set()
                self.assertTrue(until_gone(pid))
                until(lambda: f"(pid {pid})" not in self.dump(worker))

    def test_a_smaller_pool(self):
        """`resize` does not wait for the worker that it ends, either."""
        flags = [(self.flag(), self.flag()) for _ in range(2)]
        pool = self.start(Starter, mode="process", max_workers=2)
        pids = [pool.at_exit(hold, *each, limit=SAFETY).result(SAFETY)[0] for each in flags]
        self.assertEqual(len(set(pids)), 2)
        pool.resize(1)
        until(lambda: any(began.is_set() for began, _ in flags))
        first = 0 if flags[0][0].is_set() else 1
        until(lambda: re.search(rf"(?m)^Starter-\d \(pid {pids[first]}\): ending$", self.dump(pool)))
        self.assertEqual(pool.pid().result(SAFETY), pids[1 - first])
        for _, go in flags:
            go.set()
        self.assertTrue(until_gone(pids[first]))

    def test_while_with_is_left(self):
        began, go = self.flag(), self.flag()
        worker = self.start(Starter, mode="process")
        pid, = worker.at_exit(hold, began, go, limit=SAFETY).result(SAFETY)
        left = in_thread(worker.shutdown)
        began.wait()
        until(lambda: self.dump(worker) == f"Starter-0 (pid {pid}): ending\n")
        self.assertFalse(left.done())
        go.set()
        left.result(SAFETY)
        self.assertTrue(until_gone(pid))

    def test_stop_kills_it(self):
        """When its time is over, which may be at once."""
        for options in ({}, {"max_tasks_per_worker": 1}):
            began, never = self.flag(), self.flag()
            worker = self.start(Starter, mode="process", **options)
            pid, = worker.at_exit(hold, began, never, limit=1000).result(SAFETY)
            if options:
                began.wait()
            worker.stop(0)
            self.assertTrue(until_gone(pid))

    # What a call of joblib's, or scikit-learn's, leaves in its worker.
    INSIDE = '''
        import concurry
        def group():
            """Return the pids of this process and of what it has started."""
            found = []
            for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
                try: found += [pid] * (os.getpgid(pid) == os.getpid())
                except OSError: pass
            return found
        def work():
            concurry._END_TIMEOUT = 0.5
            return inner(2), group()
        with concurry.Executor("process", 1) as pool:
            result, pids = pool.submit(work).result()
            assert len(pids) > 2, pids              # the workers of loky's, which are idle
            print(*pids)
        assert result == inner(1), result
        print("passed")
    '''

    def check_inside(self, package, code):
        self.need_in_program(package)
        program = Program(self, textwrap.dedent(code) + textwrap.dedent(self.INSIDE), flags=["-W", "ignore"])
        pids = program.numbers()
        output, errors = program.output()       # there may be words of loky's before
        self.assertEqual((output.splitlines()[-1:], program.popen.returncode), (["passed"], 0), errors)
        check_gone(self, pids)

    def test_joblib_in_a_call(self):
        self.check_inside("joblib", '''
            def inner(n_jobs):
                from joblib import Parallel, delayed
                return sum(Parallel(n_jobs)(delayed(abs)(n) for n in range(-10, 0)))
        ''')

    def test_scikit_learn_in_a_call(self):
        self.check_inside("sklearn", '''
            def inner(n_jobs):
                from sklearn.datasets import make_classification
                from sklearn.linear_model import LogisticRegression
                from sklearn.model_selection import cross_val_score
                data = make_classification(60, random_state=0)
                return cross_val_score(LogisticRegression(), *data, cv=3, n_jobs=n_jobs).tolist()
        ''')


class ArgumentTests(CleanTestCase):
    """What becomes of arguments on their way: rows 6 to 8, and 3.12."""

    def setUp(self):
        self.handle = self.start(Patient, mode="process", max_queued_tasks=None)

    def fails(self, text, *args, **kwargs):
        error = self.handle.give(*args, **kwargs).exception(SAFETY)
        self.assertIs(type(error), pickle.PicklingError, error)
        self.assertIn(text, str(error))

    def test_paths(self):
        lock = threading.Lock()
        box = types.SimpleNamespace(inner=[1, {2: lock}])
        self.fails("argument 2.inner[1][2] of give(): cannot pickle '_thread.lock' object", 0, box)

        class Slotted:
            __slots__ = ("a", "b")
        slotted = Slotted()
        slotted.b = lock
        self.fails("argument 1.b of give(): cannot pickle '_thread.lock'", slotted)

        class Careful:
            def __init__(self):
                self.lock, self.bad = lock, iter(x for x in ())

            def __getstate__(self):
                return {"bad": self.bad}
        self.fails("argument 'config'.bad of give(): cannot pickle 'generator' object", config=Careful())

        def outer():
            def inner():
                return lock
            return inner
        self.fails("argument 1[0] of give(), closure variable 'lock' of ", [outer()])
        namespace = {"__name__": "nowhere", "lock": lock}
        exec("def f():\n  return g()\ndef g():\n  return lock\n", namespace)
        self.fails("argument 1 of give(), global 'g' of f, global 'lock' of g: cannot pickle", namespace["f"])

        class My:
            member = {"x": lock}
        self.fails("My.member['x']: cannot pickle '_thread.lock'", My())

        def default(x=lock):
            pass
        self.fails("default.__defaults__[0]: cannot", default)

    def test_kinds(self):
        with open(__file__) as file, socket.socket() as sock:
            for thing, kind in ((file, "TextIOWrapper"), (sock, "socket"), (memoryview(b""), "memoryview"),
                                ((x for x in ()), "generator"), (types.ModuleType("by_hand"), "by_hand")):
                self.fails(kind, [thing])
        ring = [1]
        ring += [ring, {"x": threading.Lock()}]
        self.fails("argument 1[2]['x'] of give(): cannot pickle", ring)
        self.fails("argument 1[100000] of give()", list(range(100_000)) + [threading.Lock()])

        class Odd:
            def __reduce__(self):
                raise ValueError("boom")
        self.fails("argument 1[1] of give(): cannot pickle 'Odd' object: ValueError: boom", [1, Odd()])

    def test_handles_and_futures(self):
        """3.12: they stay; where futures are not unwrapped, one is told."""
        self.fails("handle", self.handle)
        self.fails("handle", {"method": self.handle.add})
        raw = self.start(Patient, mode="process", unwrap_futures=False)
        error = raw.give(self.handle.pid()).exception(SAFETY)
        self.assertIs(type(error), pickle.PicklingError)
        self.assertIn("a future cannot travel", str(error))
        with self.assertRaisesRegex(pickle.PicklingError, "argument 1 of KeepsIt.*handle"):
            KeepsIt.options(mode="process").init(self.handle)

    def test_frozen_at_submit(self):
        """Mutable arguments are what they were when they were submitted: sent, queued, waiting for others."""
        began, flag = self.flag(), self.flag()
        slow = self.handle.wait_for(flag, began)
        began.wait()
        small, large = ["before"], bytearray(b"b" * (1 << 22))
        dependency = BaseFuture()
        echo = self.start(TaskWorker, mode="process", max_queued_tasks=None)
        calls = [echo.submit(lambda *args: (args[0][0], bytes(args[1][:1]), bytes(args[1][-1:])), small, large, first)
                 for first in (0, slow, dependency)]
        small[0], large[:] = "after", b"a" * len(large)
        dependency.set_result(None)
        flag.set()
        self.assertEqual([call.result(SAFETY) for call in calls], [("before", b"b", b"b")] * 3)

    def test_bytes_of_all_sizes(self):
        echo = self.start(TaskWorker, mode="process")
        chance = random.Random(1)
        makers = [lambda n: bytes([chance.randrange(256)]) * n, bytearray, lambda n: "é" * n, lambda n: 2 ** n,
                  lambda n: list(map(str, range(n % 3000))), lambda n: b"\x95" + (n - 9).to_bytes(8, "little", signed=True) + bytes(n)]
        sent = [[chance.choice(makers)(chance.choice([1, 300, 65535, 65536, 65537, 70_000, 1 << 20]))
                 for _ in range(chance.randrange(1, 9))] for _ in range(30)]
        sent += [[end, ["x"] * 20_000, end] for end in (b"B" + (70_000).to_bytes(4, "little"), b"\x8e", b"\x96")]
        for each in sent:
            back = echo.submit(lambda each: (each, [type(part) for part in each]), each).result(SAFETY)
            self.assertEqual(back, (each, [type(part) for part in each]))
            self.assertEqual([type(part) for part in back[0]], [type(part) for part in each])
        big = bytes(range(256)) * 300
        self.assertTrue(echo.submit(lambda pair: pair[0] is pair[1], (big, big)).result(SAFETY))

    def test_numpy(self):
        numpy = self.need("numpy")
        echo = self.start(TaskWorker, mode="process")
        array = numpy.arange(100_000)
        one, flags = echo.submit(lambda array: (array * 2, array.flags.writeable), array).result(SAFETY)
        self.assertTrue((one == array * 2).all() and one.flags.writeable and flags)
        self.assertTrue((echo.submit(lambda array: array, array[::2]).result(SAFETY) == array[::2]).all())


class StoppedWhileItIsPickled:
    """An argument that stops the worker it is on its way to."""

    def __init__(self, handle):
        self.handle = handle

    def __reduce__(self):
        self.handle.stop()
        return int, ()


class Reducing:
    """An argument that has something done while it is pickled."""

    def __init__(self, do):
        self.do = do

    def __reduce__(self):
        self.do()
        return int, ()


class StopWhilePicklingTests(CleanTestCase):
    def test_the_call_is_cancelled(self):
        handle = self.start(Patient, mode="process")
        with self.log_of():
            future = handle.give(StoppedWhileItIsPickled(handle))
        self.assertTrue(future.cancelled())

    def test_on_demand_by_another_thread(self):
        """No worker is made for it, and other pools go on."""
        other = self.start(TaskWorker, mode="process", max_workers=1)
        pool = self.start(TaskWorker, mode="process", max_workers=2, on_demand=True)
        began, go = threading.Event(), threading.Event()
        submitting = in_thread(pool.submit, abs, Reducing(lambda: (began.set(), go.wait(SAFETY))))
        self.assertTrue(began.wait(SAFETY))
        with self.log_of():
            pool.stop()
        go.set()
        self.assertTrue(submitting.result(SAFETY).cancelled())
        self.assertEqual(other.submit(square, 3).result(SAFETY), 9)
        self.assertEqual(pool._pool.backends, [])


# === Limits across processes ===

class Mortal(Worker):
    def die_at(self, moment):
        moment.arm()

    def use(self):
        with self.limits.acquire({"tokens": 10}) as acquired:
            acquired.update({"tokens": 1})

    def hold(self, started, go, update=False):
        with self.limits.acquire({"tokens": 10}) as acquired:
            if update:
                acquired.update({"tokens": 1})
            started.set()
            go.wait()
            acquired.update({"tokens": 1})

    def pid(self):
        return os.getpid()

    def many_threads(self, threads, times):
        def work():
            for _ in range(times):
                with self.limits.acquire({"tokens": 0}, timeout=SAFETY):
                    pass
        gather([in_thread(work) for _ in range(threads)], timeout=SAFETY)

    def foreign_loop(self):
        """A loop of the user's own in a worker process."""
        async def main():
            self.limits.acquire().release()         # it need not wait
            async with self.limits.async_acquire({"slots": 2}, timeout=SAFETY):
                tried = self.limits.try_acquire().successful
                try:
                    self.limits.acquire()
                except RuntimeError as error:
                    return tried, str(error)
        return asyncio.run(main())

    def timeouts(self):
        errors = []
        for timeout in (0, 1e-9, 0.01):
            try:
                self.limits.acquire(timeout=timeout)
            except TimeoutError as error:
                errors.append(str(error))
        return len(errors), self.limits.try_acquire().successful

    def closed_loop(self):
        """Leave a coroutine waiting on a loop that is closed."""
        async def wait():
            await self.limits.async_acquire()
        loop = asyncio.new_event_loop()
        self.task = loop.create_task(wait())
        self.task._log_destroy_pending = False
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    def wait_for_limits(self, timeout=None):
        self.limits.acquire(timeout=timeout).release()

    def many_timeouts(self, times):
        errors = 0
        for _ in range(times):
            try:
                self.limits.acquire(timeout=1e-4)
            except TimeoutError:
                errors += 1
        return errors

    def no_time(self):
        for timeout in (0, -1, 1e-9):
            with self.limits.acquire(timeout=timeout):
                pass

    def fork_and_acquire(self):
        pid = os.fork()
        if not pid:
            try:
                self.limits.acquire()
            except RuntimeError as error:
                os._exit(7 if "os.fork" in str(error) else 8)
            finally:
                os._exit(9)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def inner(self, method):
        logging.getLogger("concurry").setLevel(logging.ERROR)       # they will be killed
        self.pool = Mortal.options(mode="process", mp_context=method, limits=self.limits, max_workers=2).init()
        return [self.pool.pid().result(SAFETY) for _ in range(2)]

    def use_inner(self, times):
        gather([self.pool.use() for _ in range(times)], timeout=SAFETY)
        return self.limits.get_stats()

    def hold_inner(self, started, go):
        future = self.pool.hold(started, go)
        try:
            return future.result(SAFETY)
        except WorkerDiedError:
            return "died"


class Through(Worker):
    """A process between the owner of a set and its own worker."""

    def __init__(self):
        self.inner = Asking.options(mode="process", max_queued_tasks=None).init()

    def go(self, limits):
        self.inner.keep(limits).result(SAFETY)
        return gather([self.inner.ask(n) for n in range(200)], timeout=SAFETY)


class Asking(Worker):
    def keep(self, limits):
        self.kept = limits

    def ask(self, n):
        threading.Thread(target=self.kept.get_stats, daemon=True).start()
        return n


def slots_and_tokens(slots=2):
    return LimitSet([ResourceLimit("slots", slots), RateLimit("tokens", 1000, per="hour")])


class FarLimitTests(ProgramCase):
    """What only processes can do wrong with limits; see the table of faults, too."""

    def test_threads_and_loops_in_a_worker(self):
        limits = slots_and_tokens()
        pool = self.start(Mortal, mode="process", max_workers=2, limits=limits)
        gather([pool.many_threads(6, 20) for _ in range(2)], timeout=SAFETY)
        tried, message = pool.foreign_loop().result(SAFETY)
        self.assertFalse(tried)
        self.assertIn("async with limits.async_acquire", message)
        with limits.acquire({"slots": 2}):
            self.assertEqual(pool.timeouts().result(SAFETY), (3, False))
        pool.no_time().result(SAFETY)           # what is there is granted all the same
        stats = limits.get_stats()["slots"]
        self.assertEqual((stats["in_use"], stats["waiting"], stats["granted"]), (0, 0, 248))

    def test_pools_inside_workers(self):
        for method in START_METHODS:
            with self.subTest(method):
                limits, started, go = slots_and_tokens(1), self.flag(), self.flag()
                outer = self.start(Mortal, mode="process", mp_context=method, limits=limits)
                middle = outer.pid().result(SAFETY)
                inner = outer.inner(method).result(SAFETY)
                stats = outer.use_inner(6).result(SAFETY)
                self.assertEqual((stats["slots"]["granted"], stats["tokens"]["in_use"]), (6, 6))
                self.assertEqual(in_use(limits), {"slots": 0, "tokens": 6})
                held = outer.hold_inner(started, go)
                started.wait()
                waiting = in_thread(lambda limits=limits: limits.acquire(timeout=SAFETY).release())
                until(lambda limits=limits: limits.get_stats()["slots"]["waiting"] == 1)
                if method == "spawn":                   # the one in the middle
                    with self.log_of():
                        os.kill(middle, 9)
                        self.assertIsInstance(held.exception(SAFETY), WorkerDiedError)
                        waiting.result(SAFETY)
                else:
                    for pid in inner:
                        os.kill(pid, 9)
                    self.assertEqual(held.result(SAFETY), "died")
                    waiting.result(SAFETY)
                    self.assertEqual(outer.use_inner(2).result(SAFETY)["slots"]["in_use"], 0)
                self.assertEqual(in_use(limits)["slots"], 0)
                outer.stop()

    def test_sets_in_arguments_results_and_functions(self):
        api = self.start(Api, mode="process")
        limits = slots_and_tokens()
        self.assertEqual(api.use(limits).result(SAFETY)["slots"]["in_use"], 1)
        api.keep(LimitSet([ResourceLimit("slots", 1)])).result(SAFETY)
        gc.collect()                    # nobody else has that one
        self.assertEqual(api.keep().result(SAFETY)["slots"]["granted"], 2)
        pool = self.start(TaskWorker, mode="process", max_workers=2)

        def use(n, limits=limits):
            with limits.acquire():
                return n
        self.assertEqual(list(pool.map(use, range(5))), list(range(5)))
        future = pool.submit(lambda: LimitSet([ResourceLimit("mine", 1)]))
        self.assertRegex(str(pool.submit(use, 1, future).exception(SAFETY)), "no worker of")
        self.assertRaisesRegex(RuntimeError, "no worker of", future.result(SAFETY).acquire)
        self.assertEqual(limits.get_stats()["slots"]["granted"], 6)

    def test_statistics_through_a_process_in_between(self):
        """They are asked for while answers to calls come in: each call gets its own."""
        outer = self.start(Through, mode="process")
        self.assertEqual(outer.go(slots_and_tokens()).result(SAFETY), list(range(200)))

    def test_a_loop_that_is_closed_in_a_worker(self):
        limits = slots_and_tokens(1)
        pool = self.start(Mortal, mode="process", limits=limits)
        with limits.acquire():
            pool.closed_loop().result(SAFETY)
            self.assertEqual(limits.get_stats()["slots"]["waiting"], 1)
        pool.use().result(SAFETY)
        self.assertEqual(in_use(limits)["slots"], 0)

    def test_a_window_of_months(self):
        limits = LimitSet([CallLimit(1, 40 * 86400)])
        pool = self.start(Mortal, mode="process", limits=limits)
        limits.acquire().release()
        error = pool.wait_for_limits(0.05).exception(SAFETY)
        self.assertIsInstance(error, TimeoutError)
        self.assertGreater(pool.pid().result(SAFETY), 0)

    def test_timeouts_leave_no_timers(self):
        limits = LimitSet([CallLimit(1, 3600)])
        pool = self.start(Mortal, mode="process", limits=limits)
        limits.acquire().release()
        self.assertEqual(pool.many_timeouts(100).result(SAFETY), 100)
        reader, = concurry._readers.values()
        self.assertLess(len(reader.timers), 50)

    def test_sets_that_are_out_of_reach(self):
        """The call says so; the worker is as it was."""
        pool = self.start(Api, mode="process")
        other = self.start(TaskWorker, mode="process")
        theirs = other.submit(lambda: LimitSet([ResourceLimit("slots", 1)])).result(SAFETY)
        self.assertRegex(str(pool.use(theirs).exception(SAFETY)), "no worker of")
        self.assertRaisesRegex(RuntimeError, "no worker of", theirs.get_stats)
        self.assertEqual(pool.get_pool_stats()["restarts"], 0)

    def test_what_a_worker_makes_up(self):
        """Tickets that no LimitSet would send are refused; everybody else goes on."""
        limits = slots_and_tokens()
        home, link = limits._home, types.SimpleNamespace(guests={}, lane=types.SimpleNamespace(send=lambda *sent: told.append(sent)))
        for wants, usage in (({"slots": "x"}, None), ({"nothing": 1}, None), ({"slots": -1}, None), ({"slots": 1e400}, None),
                             (5, None), ({"slots": 1}, {"tokens": float("nan")}), ({"slots": 1}, {"other": 1}), ({"slots": 1}, 7)):
            told = []
            concurry._Guest.take(link, None, 1, limits._token, wants, usage, False, True)
            self.assertEqual([(number, is_granted) for number, is_granted, _ in told], [(1, False)], (wants, usage))
            self.assertEqual((link.guests, home.held, len(home.line)), ({}, {}, 0))

    def test_names_that_change(self):
        """A global of `__main__` that means something else by now: the worker has what it was sent."""
        self.check_program('''
            import concurry, gc
            for method in sys.argv[1:]:
                limits = concurry.LimitSet([concurry.ResourceLimit("slots", 1)])
                def use():
                    with limits.acquire() as acquired: return acquired.successful
                with concurry.TaskWorker.options(mode="process", mp_context=method).init(fn=use) as pool:
                    print(pool().result(), end=" ")
                    limits = None
                    gc.collect()
                    print(pool().result())
        ''', "True True\n" * len(START_METHODS), *START_METHODS)

    def test_waiting_in_a_callback_on_the_readers_thread(self):
        limits, errors = slots_and_tokens(1), queue.SimpleQueue()
        pool = self.start(Mortal, mode="process", limits=limits)

        def callback(future):
            try:
                limits.acquire()
            except RuntimeError as error:
                errors.put(str(error))
        started, go = self.flag(), self.flag()
        with limits.acquire():
            future = pool.hold(started, go)
            until(lambda: limits.get_stats()["slots"]["waiting"] == 1)
        started.wait()
        with self.log_of():
            future.add_done_callback(lambda _: held.append(limits.acquire()))
            future.add_done_callback(callback)
            held = []
            go.set()
            future.result(SAFETY)
            self.assertIn("done-callback", errors.get(timeout=SAFETY))
            held.pop().release()
            logging.getLogger("concurry").warning("for assertLogs")

    def test_os_fork(self):
        """Row 37: the limits are the parent's; there they go on."""
        limits = slots_and_tokens()
        pool = self.start(Mortal, mode="process", limits=limits)
        self.assertEqual(pool.fork_and_acquire().result(SAFETY), 7)
        over = []
        busy = in_thread(lambda: [limits.try_acquire().release() for _ in iter(lambda: bool(over), True)])
        for _ in range(5):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)     # of fork() beside threads
                try:
                    with limits.acquire():
                        pid = os.fork()
                        if pid:
                            self.assertTrue(until_gone(pid))
                            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 7)
                            self.assertGreaterEqual(in_use(limits)["slots"], 1)
                        else:
                            signal.alarm(20)
                    if not pid:                 # it has left the block
                        limits.acquire()
                except RuntimeError as error:
                    if not pid:
                        os._exit(7 if "os.fork" in str(error) else 8)
                    raise
                finally:
                    if not pid:
                        os._exit(9)
        over.append(True)
        busy.result(SAFETY)
        pool.use().result(SAFETY)
        self.assertEqual(in_use(limits)["slots"], 0)

    def test_pickled_to_somewhere_else(self):
        self.check_program('''
            import concurry, pickle
            limits = pickle.loads(bytes.fromhex(sys.argv[1]))
            print(sorted(limits))
            try: limits.acquire()
            except RuntimeError as error: print(error)
        ''', f"['slots', 'tokens']\n{concurry._OUT_OF_REACH}\n", pickle.dumps(slots_and_tokens()).hex())

    def test_verdicts_that_the_socket_does_not_take(self):
        concurry._load_wire()
        near, far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        far.settimeout(SAFETY)
        watched = []
        reader = types.SimpleNamespace(watch=lambda *args: watched.append(args), forget=watched.remove)
        reader.forget = lambda connection: watched.clear()
        lane = concurry._Lane(near, reader, None)
        for number in range(1000):
            lane.send(number, True, "x" * 100)
        self.assertEqual(len(watched), 1)
        far.setblocking(False)
        inbox, numbers = concurry._Inbox(far, (concurry._VERDICT,)), []
        while len(numbers) < 1000:
            numbers += [concurry._loads(data)[0] for _, _, data, _ in inbox.receive()]
            for _, _, flush in list(watched):
                flush()
        self.assertEqual((numbers, watched), (list(range(1000)), []))
        lane.close()
        far.close()

    def test_turns_of_worker_processes_begin_with_each(self):
        sets = [LimitSet([CallLimit(1000, 3600)], config={"n": n}) for n in range(3)]

        def account(limits):
            with limits.acquire() as acquired:
                return acquired.config["n"]
        for method in START_METHODS:
            pool = self.start(TaskWorker, init={"fn": account}, mode="process", mp_context=method, max_workers=3, limits=sets)
            self.assertEqual([pool().result(SAFETY) for _ in range(6)], [0, 1, 2, 1, 2, 0], method)


# === Lifecycle ===

class StopProcessesTests(ProgramCase):
    """14.2 and 14.3 for processes."""

    def test_shutdown_finishes(self):
        """14.2."""
        for method in START_METHODS:
            for size in (1, 3):
                with self.subTest(method, size=size):
                    with Patient.options(mode="process", mp_context=method, max_workers=size,
                                         max_queued_tasks=None).init() as handle:
                        futures = [handle.add(0) for _ in range(50)] + [handle.pid()]
                    self.assertEqual([future.result(0) for future in futures[:-1]], [0] * 50)
                    self.assertTrue(until_gone(futures[-1].result(0)))
                    self.assertRaisesRegex(RuntimeError, "shut down", handle.add)
                    handle.shutdown()
                    handle.stop()

    def test_leaving_by_an_interrupt_stops(self):
        for error in (KeyboardInterrupt, SystemExit):
            for method in START_METHODS:
                with self.subTest(method, error=error):
                    began = self.flag()
                    with self.assertRaises(error):
                        with Patient.options(mode="process", mp_context=method).init() as handle:
                            future = handle.wait_for(self.flag(), began)
                            began.wait()
                            raise error
                    self.assertIs(type(future.exception(0)), WorkerDiedError)

    def test_forgotten_handle(self):
        """14.3: one that is collected finishes what was submitted; then its workers end. Its finalizer does not block."""
        for method in START_METHODS:
            with self.subTest(method):
                handle = Patient.options(mode="process", mp_context=method, max_workers=2).init()
                flag = self.flag()
                futures = [handle.wait_for(flag), handle.wait_for(flag), handle.pid(), handle.pid()]
                add = handle.add
                del handle, add
                gc.collect()
                flag.set()
                self.assertEqual([future.result(SAFETY) for future in futures[:2]], ["waited"] * 2)
                for future in futures[2:]:
                    self.assertTrue(until_gone(future.result(SAFETY)))


class NestedTests(ProgramCase):
    def test_killed_inner_workers(self):
        """3.10: what is in a worker ends with it; and all with the parent."""
        code = '''
            import concurry
            class Outer(concurry.Worker):
                def __init__(self, method):
                    self.pool = concurry.Executor("process", 2, mp_context=method)
                def pids(self):
                    return {os.getpid(), *self.pool.map(lambda _: os.getpid(), range(8)), concurry._fork_servers._server.pid} \\
                        if concurry._fork_servers._server else {os.getpid(), *self.pool.map(lambda _: os.getpid(), range(8))}
            outers = [Outer.options(mode="process", mp_context=outer).init(inner)
                      for outer in sys.argv[1:] for inner in sys.argv[1:]]
            for outer in outers: print(*outer.pids().result())
            print(flush=True)
            sys.stdin.readline()
            outers[0].stop()
            print("stopped", flush=True)
            sys.stdin.readline()
        '''
        program = Program(self, code, *START_METHODS)
        groups = [numbers for numbers in iter(program.numbers, [])]
        self.assertEqual(len(groups), len(START_METHODS) ** 2)
        program.say()
        program.line()
        check_gone(self, groups[0])
        for group in groups[1:]:
            self.assertLessEqual(set(map(str, group)), set(os.listdir("/proc")))
        program.popen.kill()
        check_gone(self, sum(groups, []))


# === Faults: what happens ===
#
# Each function brings about one fault in one cell, `case`, and looks at what becomes of it. A cell has a mode,
# a size (the number of workers), and a method, how processes are started.

def a_call(call, error, text="", cause="", deaths=0, check=None):
    """Return the fault of a call that goes wrong: what its future raises, and that nothing else has happened.

    `text` and `cause` are patterns (the cause is that of a process), `deaths` is the number of workers that are replaced,
    `check(error)` tells whether all else is right about the error.
    """
    def happens(case):
        records = case.records()
        handle = case.make(Patient)
        before = gather([handle.who() for _ in range(case.size)], timeout=SAFETY)
        if case.mode == "sync" and error in (KeyboardInterrupt, SystemExit):
            with case.assertRaises(error):      # in the caller, too, who therefore has no future
                call(handle)
        else:
            future = call(handle)
            after = [handle.who() for _ in range(case.size)]
            raised = future.exception(SAFETY)
            case.assertIs(type(raised), error, raised)
            case.assertRegex(str(raised), f"(?s){text}")
            if case.mode in AWAY:
                case.assertIn(cause, str(raised.__cause__))
            case.assertTrue(check is None or check(raised), (raised, raised.__cause__))
            case.assertEqual(len({*gather(after, timeout=SAFETY)} & {*before}), case.size - deaths)
        case.check_pool(handle, restarts=deaths)
        for _ in range(deaths):
            case.assertIn("state is lost", records.get(timeout=SAFETY).getMessage())
        case.assertTrue(records.empty())
    return happens


def an_idle_worker_is_killed(case):
    with case.log_of() as logs:
        handle = case.make(Patient)
        pids = [handle.pid().result(SAFETY) for _ in range(case.size)]
        os.kill(pids[0], 9)
        case.assertTrue(until_gone(pids[0]))
        if case.mode == "ray":              # what it is given before Ray has told fails
            until(lambda: handle.get_pool_stats()["restarts"] == 1)
        later = {handle.pid().result(SAFETY) for _ in range(2 * case.size)}
        case.assertEqual((len(later), len(later & set(pids))), (case.size, case.size - 1))
        case.check_pool(handle, restarts=1)
    case.assertRegex(logs.output[0], f"Patient-0.*{pids[0]}.*state is lost")


def killed_while_a_call_is_received(case):
    with case.log_of() as logs:
        handle = case.make(Patient)
        handle.die_at(Moment("recv_into", 1)).result(SAFETY)
        futures = [handle.give(bytearray(1 << 20)) for _ in range(case.size)]
        case.assertEqual([future.result(SAFETY) for future in futures], [1] * case.size)
        case.check_pool(handle, restarts=1)
    case.assertRegex(logs.output[0], "state is lost")


def killed_between_any_two_messages(case):
    """A worker has been sent five calls, and dies before or after it has received a part of one, or answered it."""
    parts = [("recv", 10), ("sendall", 5)]          # of each message the header is received, then the rest
    moments = [Moment(method, n + 1, after) for method, times in parts for n in range(times) for after in (False, True)]
    pool = {n: case.make(Patient, max_queued_tasks=None, crash_retries=n) for n in (0, 1)}
    case.records()
    for crash_retries, moment in itertools.product((0, 1), case.some(moments)):
        handle, path = pool[crash_retries], os.path.join(case.folder(), "log")
        pids = [handle.pid().result(SAFETY) for _ in range(2 * case.size)]
        handle.die_at(moment).result(SAFETY)                # the first one; it is known to be quick, as they all are
        gather([handle.pid() for _ in range(case.size - 1)])
        with contextlib.suppress(ProcessLookupError):       # at the first moment it is dead already
            os.kill(pids[0], signal.SIGSTOP)
        futures = [handle.note(path, n) for n in range(5 * case.size)]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[0], signal.SIGCONT)
        # A call that was received as a whole had begun.
        has_begun = moment.after and moment.times % 2 == 0 if moment.method == "recv" else not moment.after
        which = case.size * ((moment.times - 1) // 2 if moment.method == "recv" else moment.times - 1)
        log, fails = collections.Counter(), has_begun and not crash_retries
        for n, future in enumerate(futures):
            error = future.exception(SAFETY)
            case.assertEqual((type(error), getattr(error, "started", None)),
                             (WorkerDiedError, True) if fails and n == which else (type(None), None), (moment, n, error))
            log.update({f"b{n}": 1, f"e{n}": 1})
        if has_begun:
            times = (moment.method == "sendall") + crash_retries
            log.update({f"b{which}": times - 1, f"e{which}": times - 1})
        case.assertEqual(collections.Counter(open_and_read(path).split()), +log, moment)
    for handle in pool.values():
        case.check_pool(handle, restarts=len(case.some(moments)))


def run_again_after_a_crash(case):
    """`crash_retries`: on a new worker, from its beginning, so often at most; then the error lists every death."""
    with case.log_of():
        handle = case.make(Patient, crash_retries=2, num_retries=5, retry_on=[WorkerDiedError], max_queued_tasks=None)
        path = os.path.join(case.folder(), "deaths")
        behind = [handle.exit_until(path, 2), *(handle.add() for _ in range(case.size))]
        case.assertEqual(behind[0].result(SAFETY), "survived")
        case.assertEqual(sum(future.result(SAFETY) for future in behind[1:]), case.size)
        case.assertEqual(open_and_read(path), "xxx")
        error = handle.exit_until(path, 100).exception(SAFETY)
        case.assertEqual((type(error), error.started, error.exitcode, len(error.deaths)), (WorkerDiedError, True, 3, 3))
        for worker, pid, exitcode in error.deaths:
            case.assertIn(f"{worker} (pid {pid})", str(error))
            case.assertEqual(exitcode, 3)
        case.assertEqual((error.worker, error.pid, error.exitcode), error.deaths[-1])
        case.assertEqual(len(open_and_read(path)), 6)
        case.check_pool(handle, restarts=5)
        # Who cannot be run again, for no worker can be started any more, has begun all the same.
        error = case.make(Fragile, 6, path, 7, max_workers=1, crash_retries=2).exit().exception(SAFETY)
        case.assertEqual((error.started, [code for *_, code in error.deaths], error.__cause__.exitcode, error.__cause__.started),
                         (True, [5], 6, False))


def garbage_from_a_worker(case):
    """Messages that are too large, of a kind there is not, cut off, or of strange content end that worker, and no other."""
    pack, kinds = concurry._HEADER.pack, (concurry._RETURNED, concurry._RAISED, concurry._TICKET, concurry._NOT_BUILT)
    strange = [b"".join(concurry._message(kind, (data, []))) for kind in kinds for data in (
        b"", b"\x80\x05garbage", pickle.dumps(1), pickle.dumps((1, 2, 3)), pickle.dumps(FailsWhenLoaded(os.getpid())))]
    garbage = [b"", b"\x00", b"\x00" * 40, b"\xff" * 100, pack(concurry._RETURNED, 0, 0, 1 << 60), pack(99, 0, 0, 3) + b"abc",
               pack(concurry._RETURNED, 9, 0, 3) + b"abc", pack(concurry._RETURNED, 1, 0, 0) + b"\xff" * 8,
               pack(concurry._RETURNED, 0, 0, 1 << 40), *strange, *(message * 3 for message in strange)]
    handle, other = case.make(Patient, max_queued_tasks=None), case.make(Patient)
    case.records()
    for each in case.some(garbage):
        future = handle.send_garbage(each)
        others = [handle.add(0) for _ in range(case.size)]
        error = future.exception(SAFETY)            # some of it is an answer
        case.assertIsInstance(error, (type(None), WorkerDiedError, RemoteError, pickle.PicklingError), each)
        gather(others, return_exceptions=True, timeout=SAFETY)      # it may have answered those that it had, too
        case.assertEqual(other.add(0).result(SAFETY), 0)
    answered = handle.send_garbage(strange[2] + b"\xff" * 100)      # what came before it holds
    case.assertEqual(answered.result(SAFETY), 1)
    case.check_pool(handle)
    case.check_pool(other, restarts=0)


def a_constructor_raises(case):
    for error in (KeyError("k"), OwnInterrupt("own"), FileNotFoundError(2, "no", "file")):
        with case.assertRaises(type(error)) as caught:
            case.build(Fragile, error)
        case.assertEqual(caught.exception.args, error.args)
        if case.mode in AWAY:
            case.assertIn("in __init__", str(caught.exception.__cause__))
    if case.size > 1 and case.mode != "ray":        # there the others take over
        with case.assertRaisesRegex(ValueError, "the last"):
            case.make(Fragile, ValueError("the last"), os.path.join(case.folder(), "starts"), case.size - 1)


def a_constructor_exits(case):
    """It is told at once, and not tried again and again."""
    path = os.path.join(case.folder(), "starts")
    died = "before it began a call: its worker process has died" if case.mode == "ray" else "exit code 7.*before it was built"
    for how, text in ((7, died), (SystemExit(8), "constructor.*SystemExit.8"))[case.mode not in AWAY:]:
        with case.assertRaisesRegex(WorkerDiedError, text) as caught:
            case.build(Fragile, how, path, 0)
        case.assertIs(caught.exception.started, False)
    case.assertLessEqual(len(open_and_read(path)), 2 * case.size)


def no_replacement_starts(case):
    """After three starts in a row the worker is given up: all that is pending or comes fails, or goes to the others."""
    hows = ((KeyError("again"), KeyError, "again"), (6, WorkerDiedError, "(exit code 6.*before it was built|before it began a call)"),
            (Moment("recv", 1), WorkerDiedError, "SIGKILL.*before it began a call"))
    for how, kind, text in hows[:2] if case.mode == "ray" else hows:
        with case.log_of() as logs:
            path = os.path.join(case.folder(), "starts")
            handle = case.make(Fragile, how, path, case.size)
            killed, pending = handle.exit(), [handle.pid() for _ in range(3 * case.size)]
            case.assertEqual(killed.exception(SAFETY).exitcode, case.code(5))
            if case.size == 1:
                for future in pending + [handle.pid()]:
                    case.assertIsInstance(future.exception(SAFETY), kind)
                    case.assertRegex(str(future.exception()), text)
                    case.assertIn(getattr(future.exception(), "started", False), (False,))
            else:
                case.assertEqual(len({future.result(SAFETY) for future in pending}), case.size - 1)
            until(lambda: handle.get_pool_stats()["total_workers"] == case.size - 1)
            case.assertEqual(len(open_and_read(path)), case.size + 3)
        case.assertTrue(any("state is lost" in line for line in logs.output))


def a_call_kills_each_worker(case):
    """That is charged to the calls, and no worker is given up for it."""
    with case.log_of():
        handle = case.make(Patient, max_queued_tasks=None)
        futures = [handle.exit(n) for n in range(5 * case.size)]
        case.assertEqual([future.exception(SAFETY).exitcode for future in futures], list(map(case.code, range(5 * case.size))))
        case.check_pool(handle, restarts=5 * case.size)


def on_demand_workers_die(case):
    """Each was made for one call: another one is made only for a call that is run again."""
    with case.log_of() as logs:
        for crash_retries in (0, 1):
            path = os.path.join(case.folder(), "starts")
            with case.make(Fragile, 0, path, 100, on_demand=True, crash_retries=crash_retries) as handle:
                futures = [handle.exit(n) for n in range(3 * case.size)]
                case.assertEqual({len(future.exception(SAFETY).deaths) for future in futures}, {1 + crash_retries})
            case.assertEqual(len(open_and_read(path)), 3 * case.size * (1 + crash_retries))
            case.assertEqual(handle.get_pool_stats()["restarts"], 3 * case.size * crash_retries)
    case.assertEqual(len(logs.output), 3 * case.size)


def stopped_while_a_call_is_run_again(case):
    """It is not run a third time; the error tells both deaths."""
    with case.log_of():
        handle, path = case.make(Patient, crash_retries=5), os.path.join(case.folder(), "log")
        begun = [case.flag() for _ in range(case.size)]
        futures = [handle.exit_until_then_wait(path, case.size, began) for began in begun]
        for began in begun:
            began.wait()
        handle.stop(0)
        for future in futures:
            error = future.exception(0)
            case.assertEqual((type(error), error.started), (WorkerDiedError, True))
            case.assertIn("stopped after 0 s", str(error))
        # Which of them the first so many deaths hit is not said.
        case.assertEqual(sum(len(future.exception().deaths) for future in futures), 2 * case.size)
        case.assertEqual(len(open_and_read(path)), 2 * case.size)


def killed_while_it_holds_limits(case):
    """The slot is free, what the rate had granted counts as used; who waits for it gets it."""
    for update, used in ((False, 10), (True, 1)):
        with case.log_of():
            limits, started, go = slots_and_tokens(1), case.flag(), case.flag()
            pool = case.make(Mortal, limits=limits)
            pids = [pool.pid().result(SAFETY) for _ in range(case.size)]
            held = pool.hold(started, go, update)
            started.wait()
            until(lambda: in_use(limits) == {"slots": 1, "tokens": used})
            waiting = in_thread(lambda: limits.acquire(timeout=SAFETY).release())
            until(lambda: limits.get_stats()["slots"]["waiting"] == 1)
            os.kill(pids[0], 9)
            case.assertIsInstance(held.exception(SAFETY), WorkerDiedError)
            waiting.result(SAFETY)
            case.assertEqual(in_use(limits), {"slots": 0, "tokens": used})
            go.set()
            pool.use().result(SAFETY)
            case.check_pool(pool, restarts=1)


def killed_while_it_asks_for_limits(case):
    """While it asks, waits for the verdict, corrects, gives back. Nobody else is affected."""
    moments = [Moment("sendall", n, after) for n in (1, 2, 3, 4) for after in (False, True)] + [Moment("acquire", 2)]
    limits = slots_and_tokens(1)
    with case.log_of() as logs:
        pool, other = (case.make(Mortal, limits=limits, max_queued_tasks=None) for _ in range(2))
        for moment in case.some(moments):
            pool.die_at(moment).result(SAFETY)
            # It is a call of that worker's, but for the last moment not always its first.
            ended = [future.exception(SAFETY) for future in [pool.use() for _ in range(2 * case.size + 1)] + [other.use()]]
            deaths = [error for error in ended if error is not None]
            case.assertLessEqual(len(deaths), 1, deaths)
            case.assertEqual({type(error) for error in deaths} - {WorkerDiedError}, set())
            case.assertEqual((in_use(limits)["slots"], limits.get_stats()["slots"]["waiting"]), (0, 0))
            case.assertEqual(limits._home.held, {})
        case.check_pool(pool)
        case.check_pool(other, restarts=0)
    case.assertGreater(len(logs.output), 1)


def killed_while_it_waits_for_limits(case):
    limits, started, go = slots_and_tokens(1), case.flag(), case.flag()
    pool, other = (case.make(Mortal, limits=limits) for _ in range(2))
    pid = pool.pid().result(SAFETY)
    gather([pool.pid() for _ in range(case.size - 1)])
    with case.log_of(), limits.acquire():
        doomed = pool.hold(started, go)
        until(lambda: limits.get_stats()["slots"]["waiting"] == 1)
        behind = other.hold(started, go)
        until(lambda: limits.get_stats()["slots"]["waiting"] == 2)
        os.kill(pid, 9)
        case.assertIsInstance(doomed.exception(SAFETY), WorkerDiedError)
        until(lambda: limits.get_stats()["slots"]["waiting"] == 1)
    started.wait()
    go.set()
    behind.result(SAFETY)
    case.check_pool(pool, restarts=1)


def killed_again_and_again_while_limits_are_used(case):
    """Never more than the capacity inside; at the end nothing is in use."""
    path, limits = os.path.join(case.folder(), "log"), LimitSet([ResourceLimit("slots", 1), CallLimit(10 ** 6, 3600)])
    pool = case.make(Logger, path, max_workers=case.size + 1, max_queued_tasks=None, limits=limits)
    rng, deaths, size = random.Random(8), 0, case.size + 1
    with case.log_of():
        for _ in range(25 if case.is_whole else 8):
            pids = [pool.pid().result(SAFETY) for _ in range(size)]
            futures = [pool.work(100) for _ in range(size)]
            goal = limits.get_stats()["call_count"]["granted"] + rng.randint(1, 60)
            until(lambda: limits.get_stats()["call_count"]["granted"] >= goal or all(future.done() for future in futures))
            os.kill(rng.choice(pids), rng.choice([9, 15]))
            deaths += sum(isinstance(future.exception(SAFETY), WorkerDiedError) for future in futures)
    case.assertGreater(deaths, 1)
    pool.work(1).result(SAFETY)
    case.assertEqual(in_use(limits)["slots"], 0)
    # Who was killed inside wrote no end: the next one begins where it should have been.
    letters = open_and_read(path)
    case.assertNotIn("--", letters)
    case.assertLessEqual(letters.count("+") - letters.count("-"), deaths)


def a_pending_call_is_cancelled(case):
    """Behind a slow call everything can be, and its place is free at once."""
    handle = case.make(Patient, **({} if case.mode == "asyncio" else {"max_queued_tasks": 3}))
    flag, begun = case.flag(), [case.flag() for _ in range(case.size)]
    running = [handle.wait_for(flag, began) for began in begun]
    for began in begun:
        began.wait()
    told = queue.SimpleQueue()
    pending = [handle.add() for _ in range(2 * case.size)]
    for future in pending:
        future.add_done_callback(told.put)
    case.assertEqual([future.cancel() for future in pending], [True] * len(pending))
    case.assertEqual({told.get(timeout=SAFETY) for _ in pending}, set(pending))
    case.assertEqual([future.cancel() for future in running], [False] * case.size)
    case.assertTrue(all(future.running() for future in running))
    again = [handle.add(10) for _ in range(2 * case.size)]
    flag.set()
    case.assertEqual([future.result(SAFETY) for future in running], ["waited"] * case.size)
    case.assertEqual(sum(future.result(SAFETY) for future in again), 30 * case.size)        # none of them ran
    case.check_pool(handle, restarts=0)


def cancel_races_with_the_result(case):
    """One winner: what was cancelled never ran, the rest is done."""
    handle = case.make(Patient, max_queued_tasks=None)
    cancelled = 0
    for _ in range(20):
        futures = [handle.add() for _ in range(30)]
        now = [future.cancel() for future in reversed(futures)]
        done, pending = concurrent.futures.wait(futures, SAFETY)
        case.assertEqual((len(done), sum(future.cancelled() for future in futures)), (30, sum(now)))
        cancelled += sum(now)
    ran = sum(handle.add(0).result(SAFETY) for _ in range(case.size))
    case.assertEqual(ran, 600 - cancelled)
    case.check_pool(handle, restarts=0)


def stopped_with_calls_queued_and_running(case):
    """By three threads at once. What runs ends, what has not begun is cancelled, and told."""
    with case.log_of() as logs:
        handle = case.make(Patient, max_queued_tasks=None)
        flag, begun = case.flag(), [case.flag() for _ in range(case.size)]
        running = [handle.wait_for(flag, began) for began in begun]
        for began in begun:
            began.wait()
        pending = [handle.add() for _ in range(2 * case.size)]
        pending[-1].add_done_callback(lambda future: flag.set())        # stop() waits for those that run
        gather([in_thread(handle.stop) for _ in range(3)], timeout=SAFETY)
        case.assertEqual([future.result(0) for future in running], ["waited"] * case.size)
        case.assertTrue(all(future.cancelled() for future in pending))
        case.assertRaisesRegex(RuntimeError, "it is stopped", handle.add)
        case.assertEqual(handle.get_pool_stats()["stopped"], True)
        handle.stop()
    case.assertIn(f"{2 * case.size} calls that had not begun were cancelled", logs.output[0])


def stopped_by_a_done_callback(case):
    """In a thread of ours, which goes on with its work while it waits."""
    handle = case.make(Patient)
    stopped, flag, began = queue.SimpleQueue(), case.flag(), case.flag()
    if case.mode == "sync":
        flag.set()
    slow = handle.wait_for(flag, began)
    began.wait()
    slow.add_done_callback(lambda future: stopped.put(handle.stop(SAFETY)))
    others = [] if case.mode == "sync" else [handle.add() for _ in range(3)]
    flag.set()
    case.assertIsNone(stopped.get(timeout=SAFETY))
    case.assertTrue(all(future.done() for future in others))
    case.assertRaises(RuntimeError, handle.add)


def stopped_by_a_call_of_its_own(case):
    for end in ("stop", "shutdown", "close"):
        pool = case.make(TaskWorker)

        async def coroutine():
            return getattr(pool, end)()
        for task in (lambda: getattr(pool, end)(), coroutine):
            pool = case.make(TaskWorker)
            future = pool.submit(task)
            case.assertEqual(concurry.wait([future], SAFETY).not_done, set())
            case.assertTrue(future.cancelled() or future.result(0) is None)
            case.assertRaises(RuntimeError, pool.submit, square, 1)


def stopped_while_a_call_never_returns(case):
    """TERM is ignored, so KILL; a coroutine is cancelled; a thread is left to itself, and that is said."""
    handle = case.make(Patient)
    begun, never = [case.flag() for _ in range(case.size)], case.flag()
    pids = [handle.pid().result(SAFETY) for _ in range(case.size)] if case.mode == "process" else []
    call = {"process": handle.ignore_and_wait, "asyncio": handle.wait_for_ever}.get(
        case.mode, lambda began: handle.wait_for(never, began))
    running = [call(began) for began in begun]
    for began in begun:
        began.wait()
    pending = [handle.add() for _ in range(case.size)] if case.mode != "asyncio" else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case.records()
        handle.stop(0.05)
    case.assertEqual(len([1 for warning in caught if warning.category is ResourceWarning and "stopped" in str(warning.message)]),
                     case.mode == "thread")
    for future in running if case.mode != "asyncio" else []:
        case.assertRegex(str(future.exception(0)), rf"stopped after 0.05 s, {'before' if case.mode == 'ray' else 'in'} th")
        case.assertIs(future.exception(0).started, None if case.mode == "ray" else True)
    for future in pending:
        case.assertTrue(future.cancelled() or future.exception(0).started is False)     # it may have been sent ahead
    case.assertTrue(all(future.done() for future in running))
    case.assertFalse(set(pids) & set(descendants()))
    never.set()


def stopped_while_a_call_cleans_up(case):
    """A handler of TERM may end the process, raise SystemExit, or let the call return: then that is its result."""
    for how in ("tidy", "exit", "return"):
        handle, begun, tidied = case.make(Patient), [case.flag() for _ in range(case.size)], case.flag()
        futures = [handle.on_term(began, how, tidied) for began in begun]
        for began in begun:
            began.wait()
        with unittest.mock.patch.object(concurry, "_GRACE", SAFETY):        # a loaded machine may need more than 0.9 s
            handle.stop(0)
        for future in futures:
            if how == "return":
                case.assertEqual(future.result(0), "cleaned up")
            else:
                case.assertIs(type(future.exception(0)), WorkerDiedError)
                case.assertTrue(future.exception(0).started)
        if how == "tidy":
            tidied.wait()


def submitters_wait_behind_a_death(case):
    """The queue drains on the new worker, once; blocked submitters wake."""
    with case.log_of():
        handle = case.make(Patient, max_queued_tasks=2)
        flag, begun = case.flag(), [case.flag() for _ in range(case.size)]
        doomed = [handle.kill_when(flag, began) for began in begun]
        for began in begun:
            began.wait()
        queued = [handle.add(0) for _ in range(case.size)]
        submitting = [in_thread(handle.add, 0) for _ in range(4 * case.size)]
        flag.set()
        case.assertEqual({type(future.exception(SAFETY)) for future in doomed}, {WorkerDiedError})
        case.assertEqual({future.result(SAFETY) for future in queued + gather(submitting, timeout=SAFETY)}, {0})
        case.check_pool(handle, restarts=case.size)


# Programs with workers, which end in some way

PARENT = '''
    import concurry, signal, time
    class Sleeps(concurry.Worker):
        def pid(self): return os.getpid()
        def run(self, code): exec(code)
    mode, size, method, job = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    handle = Sleeps.options(mode=mode, mp_context=method, max_workers=size).init()
    pids = [handle.pid().result() for _ in range(size)] if mode == "process" else []
    server = concurry._fork_servers._server
    if "keep" in sys.argv:      # a child made behind Python's back, which keeps every descriptor
        import ctypes
        parent = os.getpid()
        if not ctypes.PyDLL(None).fork():        # with the lock: another thread may not have it in the child
            ctypes.CDLL(None).prctl(1, 9)
            if os.getppid() == parent:          # else it died before it could take this one along
                ctypes.CDLL(None).sleep(60)
            os._exit(0)
    calls = [handle.run(job) for _ in range(size)] if job else []
    print(*pids, *([server.pid] if server else []), flush=True)
'''
HOLD_GIL = "import ctypes; ctypes.PyDLL(None).sleep(60)"


def start_parent(case, more, job="", *words, **options):
    """Run a parent with the workers of a cell; return (program, the pids of its processes)."""
    code = textwrap.dedent(PARENT) + textwrap.dedent(more)
    program = Program(case, code, case.mode, str(case.size), case.method or "spawn", job, *words, **options)
    pids = program.numbers()
    case.assertEqual(len(pids), case.size + (case.method == "forkserver") if case.mode == "process" else 0)
    return program, pids


def check_gone(case, pids):
    for pid in pids:
        case.assertTrue(until_gone(pid), pid)


def exit_with_idle_workers(case):
    program, pids = start_parent(case, "")
    case.assertEqual((program.output(), program.popen.returncode), (("", ""), 0))
    check_gone(case, pids)


def exit_with_pending_calls(case):
    """They are finished; what is submitted once exit has begun is refused, what waits for a stranger's future is cancelled."""
    program, pids = start_parent(case, '''
        import atexit, threading
        def late():
            try: handle.pid()
            except RuntimeError as error: print(error)
        atexit.register(late)
        def work(n): return n * n
        options = {} if mode in ("sync", "asyncio") else {"max_workers": size, "max_queued_tasks": None}
        pool = concurry.TaskWorker.options(mode=mode, mp_context=method, **options).init()
        first = pool.submit(work, 1)
        for n in range(20):
            pool.submit(work, n).add_done_callback(lambda future: sys.stdout.write(f"{future.result()} "))
        pool.submit(work, first).add_done_callback(lambda future: sys.stdout.write(f"chained {future.result()} "))
        never = concurry.BaseFuture()
        def wait():
            waits = pool.submit(work, never)
            waits.add_done_callback(lambda future: sys.stdout.write(f"cancelled {future.cancelled()} "))
        waiter = threading.Thread(target=wait)      # in sync mode the caller waits
        waiter.start()
        while not pool._pool.calls: pass
    ''')
    output, errors = program.output()
    words, refusal, _ = output.partition("cannot submit")
    case.assertEqual(sorted(words.split()), sorted([str(n * n) for n in range(20)] + "chained 1 cancelled True".split()), errors)
    case.assertEqual((refusal, errors, program.popen.returncode), ("cannot submit", "", 0))
    check_gone(case, pids)


def interrupted(case):
    """The whole group or the parent alone; workers have other things to do than to print tracebacks."""
    code = '''
        if mode == "asyncio": concurry._GRACE = 0.1         # for a loop that will not end
        try:
            with handle:
                calls = [handle.run("import time; print('begun', flush=True); time.sleep(60)") for _ in range(size)]
                signal.pause() if sys.argv[5] == "pause" else calls[0].result()
        except KeyboardInterrupt:
            print("interrupted", {type(call.exception()).__name__ for call in calls}, flush=True)
    '''
    for send, place in ((os.killpg, "pause"), (os.killpg, "result"), (os.kill, "result")):
        program, pids = start_parent(case, code, "", place, start_new_session=True)
        for _ in range(case.size):
            case.assertEqual(program.line(), "begun")
        wait_until_asleep(program.popen.pid)    # a signal just before would not wake it: so it is in CPython
        send(program.popen.pid, signal.SIGINT)
        case.assertEqual((*program.output(), program.popen.returncode), ("interrupted {'WorkerDiedError'}\n", "", 0))
        check_gone(case, pids)


def interrupted_and_going_on(case):
    """Ctrl-C is the parent's business: the workers and the programs that they start do not even notice."""
    program, pids = start_parent(case, '''
        try:
            print("ready", flush=True)
            signal.pause()
        except KeyboardInterrupt: pass
        assert [handle.pid().result() for _ in pids] == pids
        print(concurry.Executor("process", 1, mp_context=method).submit(
            lambda: signal.getsignal(signal.SIGINT) is not signal.SIG_IGN).result())
    ''', start_new_session=True)
    program.line()
    wait_until_asleep(program.popen.pid)
    os.killpg(program.popen.pid, signal.SIGINT)
    case.assertEqual(program.output(), ("True\n", ""))
    check_gone(case, pids)


def the_parent_dies(number, job="", *words):
    """Return the fault of a parent that gets a signal while its workers do this."""
    def happens(case):
        if "keep" in words and job and case.method != "forkserver":
            return                      # nobody is left who could end the worker
        program, pids = start_parent(case, "sys.stdin.readline()", job, *words)
        for pid in pids[:case.size] if job == HOLD_GIL else ():
            wait_until_asleep(pid)
        program.popen.send_signal(number)
        case.assertEqual(program.popen.wait(SAFETY), -number)
        check_gone(case, pids)
    return happens


def wait_until_asleep(pid):
    """Wait until a process's main thread sleeps for good: nothing tells that but the kernel, so this looks again and again."""
    with open(f"/proc/{pid}/syscall") as file:
        looks = []
        while len(looks) < 20 or {*looks[-20:]} != {looks[-1]} or looks[-1] == "running":
            file.seek(0)
            looks.append(file.read().split()[0])
            threading.Event().wait(0.001)


# Awkward places to submit, to start, to fail

def a_program(code, expected="passed\n"):
    """Return the fault of a program that gets mode, size and method, and has to print this and nothing else."""
    def happens(case):
        case.check_program(code, expected, case.mode, str(case.size), case.method or "spawn", case.folder(),
                           head=HEAD + "mode, size, method, folder = sys.argv[1], int(sys.argv[2]), *sys.argv[3:5]\n")
    return happens


threads_hold_locks = a_program('''
    import concurry, importlib, io, logging, threading
    logging.basicConfig(stream=io.StringIO())
    go_on, held = threading.Event(), threading.Barrier(3)
    def hold(lock):
        with lock:
            held.wait()
            go_on.wait()
    locks = [logging._lock, logging.root.handlers[0].lock]
    threads = [threading.Thread(target=hold, args=(lock,)) for lock in locks]
    for thread in threads: thread.start()
    held.wait()
    def log():
        logging.getLogger("x").setLevel("ERROR")
        import json.tool
        return "passed"
    if method == "fork": go_on.set()                # it is no default, for the locks are held in the child
    with concurry.Executor("process", size, mp_context=method) as pool:
        print(pool.submit(log).result())
    go_on.set()
''')

pools_inside_workers = a_program('''
    import concurry, multiprocessing
    def square_all(mode):
        with concurry.Executor(mode, None if mode in ("sync", "asyncio") else 2) as pool:
            return list(pool.map(lambda n: n * n, range(4)))
    with concurry.Executor("process", size, mp_context=method) as outer:
        modes = ["sync", "thread", "asyncio", "process"]
        assert list(outer.map(square_all, modes)) == [[0, 1, 4, 9]] * 4
        nested = outer.submit(lambda: concurry.Executor("process", 1).submit(square_all, "process").result())
        assert nested.result() == [0, 1, 4, 9]
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=lambda: there.send(square_all("process")), daemon=True)
    process.start()
    assert here.recv() == [0, 1, 4, 9]
    process.join()
    print("passed")
''')


def no_main_guard(case):
    """However the program is run; its main module is not run again."""
    code = '''
        print("once")
        import concurry
        class Mine:
            def __init__(self, n): self.n = n
        class Tally(concurry.Worker):
            def add(self, mine): return Mine(mine.n + K)
        K = 5
        with Tally.options(mode="process", mp_context=sys.argv[-1], max_workers=int(sys.argv[-2])).init() as tally:
            assert type(tally.add(Mine(1)).result()) is Mine
        with concurry.Executor("process", 2, mp_context=sys.argv[-1]) as pool:
            print(list(pool.map(lambda x: x * K, range(3))))
    '''
    for way in ("-c", "file", "stdin"):
        case.check_program(code, "once\n[0, 5, 10]\n", str(case.size), case.method, way=way)


def the_clock_is_set(case):
    """To any time: only clocks that cannot be set are looked at."""
    source = open_and_read(concurry.__file__).replace("date[9] or 0)) - time.time()", "")     # a date that a server tells
    case.assertIsNone(re.search(r"\btime\.(time|localtime|gmtime)\b|datetime", source))
    with unittest.mock.patch("time.time", lambda: random.choice([0, 1e12])):
        handle = case.make(Patient)
        case.assertEqual(gather([handle.add() for _ in range(case.size)], timeout=SAFETY), [1] * case.size)
        limits = LimitSet([CallLimit(5, 3600)])
        case.assertEqual(sum(limits.try_acquire().successful for _ in range(20)), 5)


def callbacks_raise(case):
    """That is logged, once each; the thread that called them goes on."""
    with case.log_of(level="ERROR") as logs:
        handle, flag, began = case.make(Patient), case.flag(), case.flag()
        if case.mode == "sync":
            flag.set()
        future = handle.wait_for(flag, began)
        began.wait()
        reached = queue.SimpleQueue()
        for error in (ValueError, SystemExit, KeyboardInterrupt):
            future.add_done_callback(functools.partial(raise_it, error))
        future.add_done_callback(reached.put)
        flag.set()
        case.assertIs(reached.get(timeout=SAFETY), future)
        case.assertEqual(gather([handle.add(0) for _ in range(case.size)], timeout=SAFETY), [0] * case.size)
    case.assertEqual([record.exc_info[0] for record in logs.records], [ValueError, SystemExit, KeyboardInterrupt])


def raise_it(error, future):
    raise error("on purpose")


submitted_by_signal_handlers_and_finalizers = a_program('''
    import concurry, gc, signal
    class Count(concurry.Worker):
        n = 0
        def add(self): self.n += 1; return self.n
    options = {} if mode in ("sync", "asyncio") else {"max_workers": size, "max_queued_tasks": 2}
    count = Count.options(mode=mode, mp_context=method, **options).init()
    inside, rounds = [], 0
    class Dies:
        def __del__(self): inside.append(count.add())
    signal.signal(signal.SIGUSR1, lambda *_: inside.append(count.add()))
    def trace(frame, event, argument):      # at every 7th line of ours
        global rounds
        if frame.f_globals is vars(concurry) and event == "line":
            rounds += 1
            if rounds % 7 == 0 and len(inside) < 300:
                signal.raise_signal(signal.SIGUSR1)
            elif rounds % 11 == 0 and len(inside) < 300:
                Dies()
        return trace
    sys.settrace(trace)
    futures = [count.add() for _ in range(40)]
    results = [future.result() for future in futures]
    sys.settrace(None)
    results += [future.result() for future in inside]
    assert len(inside) >= 100, len(inside)
    if size == 1: assert sorted(results) == list(range(1, len(results) + 1)), results
    assert count.get_pool_stats()["load_balancer"]["total_dispatched"] == len(results)
    count.stop()
    print("passed")
''')

started_by_finalizers = a_program('''
    import concurry, gc
    made = []
    class Cycle:
        def __del__(self):
            if len(made) < 5: made.append(concurry.Executor("process", size, mp_context=method))
    def trace(frame, event, argument):
        global rounds
        if frame.f_globals is vars(concurry) and event == "line" and len(made) < 5:
            rounds += 1
            if rounds % 10 == 0:
                cycle = Cycle(); cycle.me = cycle; del cycle; gc.collect()
        return trace
    rounds = 0
    sys.settrace(trace)
    made.append(concurry.Executor("process", size, mp_context=method))
    sys.settrace(None)
    assert [pool.submit(int).result() for pool in made] == [0] * 6
    print("passed")
''')

no_descriptors_are_left = a_program('''
    import concurry, errno, resource, threading
    def descriptors():
        for thread in threading.enumerate():
            if thread is not threading.main_thread(): thread.join()
        return sorted(os.listdir("/proc/self/fd"))
    with concurry.Executor("process", size, mp_context=method) as pool:
        pool.submit(int).result()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    before, outcomes = descriptors(), set()
    for spare in range(1, 24 + 16 * size, 2 * size):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(max(before, key=int)) + 1 + spare, hard))
        try:
            with concurry.Executor("process", size, mp_context=method) as pool:
                outcomes.add(pool.submit(lambda: "worked").result())
                on_demand = concurry.Executor("process", size + 1, mp_context=method, on_demand=True)
                calls = [on_demand.submit(lambda n: n, n) for n in range(4)]
                for call in calls:
                    error = call.exception()
                    outcomes.add("on demand" if error is None else error.errno)
                on_demand.shutdown()
        except OSError as error:
            outcomes.add(error.errno)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        left = descriptors()
        assert left == before, (spare, left, before)
    assert outcomes == {errno.EMFILE, "worked", "on demand"}, outcomes
    print("passed")
''')

the_reader_fails = a_program('''
    import concurry, logging
    logging.disable(logging.CRITICAL)
    def work(n): return n
    def fail(): raise MemoryError("no more")
    pool = concurry.Executor("process", size, mp_context=method)
    concurry.wait([pool.submit(work, n) for n in range(size)])
    slow = [pool.submit(__import__("time").sleep, 60) for _ in range(size)]
    queued = [pool.submit(work, 1) for _ in range(4)]
    parked = pool.submit(work, concurry.BaseFuture())
    reader = concurry._readers[os.getpid()]
    reader.selector.select = lambda timeout: fail()
    reader.post(int)
    for future in slow + queued[:1]:
        error = future.exception()
        assert isinstance(error, (MemoryError, concurry.WorkerDiedError)) and "no more" in str(error), error
    reader.thread.join()
    assert all(future.done() for future in queued)
    error = None
    try: error = pool.submit(work, 1).exception()
    except Exception as raised: error = raised
    assert "no more" in str(error), error
    with concurry.Executor("process", 1, mp_context=method) as another: assert another.submit(work, 5).result() == 5
    pool.stop()
    assert parked.done()
    print("passed")
''')

no_semaphores_and_no_shared_memory = a_program('''
    sys.modules["_multiprocessing"] = sys.modules["_posixshmem"] = None
    import concurry
    limits = concurry.LimitSet([concurry.ResourceLimit("slots", 1), concurry.CallLimit(100, 60)])
    def has_shared_memory():            # a semaphore is in the same folder
        with open("/proc/self/maps") as file: return "/dev/shm/" in file.read()
    def use(n, limits):
        with limits.acquire(): return n, has_shared_memory()
    options = {} if mode in ("sync", "asyncio") else {"max_workers": size}
    with concurry.TaskWorker.options(mode=mode, mp_context=method, limits=limits, **options).init(fn=use) as pool:
        assert list(pool.map(range(20))) == [(n, False) for n in range(20)]
        assert not has_shared_memory()
    assert limits.get_stats()["call_count"]["in_use"] == 20
    print("passed")
''')


def a_module_makes_a_pool_when_it_is_imported(case):
    """Refused, and no storm; the module itself can be used by its importer."""
    folder = case.folder()
    case.write(folder, storm='''
        import os, concurry
        with open(os.environ["TRACE"], "a") as file: file.write("x")
        pool = concurry.Executor("process", 1, mp_context=os.environ["METHOD"])
        class W(concurry.Worker):
            def go(self): return 1
        def function(): return 1
    ''')
    code = '''
        sys.path.append(sys.argv[1])
        import concurry, storm
        method = os.environ["METHOD"]
        try:
            with storm.W.options(mode="process", mp_context=method).init() as worker: print(worker.go().result())
        except RuntimeError as error: print("storm" in str(error), type(error).__name__.count("Died"))
        with concurry.Executor("process", int(sys.argv[2]), mp_context=method) as pool:
            for fn in (storm.function, int):
                error = pool.submit(fn).exception()
                print(error and (isinstance(error, RuntimeError), "storm" in str(error)))
        storm.pool.stop()
    '''
    trace = os.path.join(folder, "trace")
    program = Program(case, code, folder, str(case.size), env={**os.environ, "METHOD": case.method, "TRACE": trace})
    output, errors = program.output()
    # A forked worker has the module already.
    expected = "1\nNone\nNone\n" if case.method == "fork" else "True 0\n(True, True)\nNone\n"
    case.assertEqual((output, program.popen.returncode), (expected, 0), errors)
    case.assertEqual(len(open_and_read(trace)), 1 if case.method == "fork" else 3)


def a_module_makes_a_pool_by_fork_when_it_is_imported(case):
    """Its worker is a copy of a process that imports the module: it cannot end that."""
    folder = case.folder()
    case.write(folder, storm='''
        import concurry, os
        pool = concurry.Executor("process", int(os.environ["SIZE"]), mp_context="fork")
        def function(): return 1
    ''')
    code = """
        sys.path.append(sys.argv[1])
        import concurry, storm
        with concurry.Executor("process", 1, mp_context=sys.argv[2]) as pool:
            for pool, fn in (pool, storm.function), (storm.pool, storm.function), (storm.pool, int):
                error = pool.submit(fn).exception()
                print(error and (isinstance(error, RuntimeError), "storm" in str(error)))
        storm.pool.stop()
    """
    # A worker that is forked later has the module already.
    first = "None" if case.method == "fork" else "(True, True)"
    with unittest.mock.patch.dict(os.environ, SIZE=str(case.size)):
        case.check_program(code, f"{first}\n(True, True)\nNone\n", folder, case.method)


def two_copies_under_other_names(case):
    """In a bare interpreter; each has workers, exceptions and a fork server of its own."""
    folder = case.folder()
    os.makedirs(os.path.join(folder, "pkg", "_vendor"))
    shutil.copy(SOURCE, os.path.join(folder, "pkg", "_vendor", "x.py"))
    shutil.copy(SOURCE, os.path.join(folder, "other.py"))
    case.write(folder, **{
        "pkg/__init__": "from . import later",
        "pkg/later": """
            from . import _vendor
            from ._vendor import x
            assert _vendor.x is x
            class Far(x.Worker):
                def go(self): return x, __name__
        """,
        "pkg/_vendor/__init__": ""})
    case.check_program('''
        import logging, other
        import pkg._vendor.x as x
        logging.disable(logging.WARNING)
        size, method = int(sys.argv[1]), sys.argv[2]
        def where(): return "concurry" in sys.modules, sys.modules.get("__mp_main__") is not sys.modules["__main__"]
        def b_of(n): return n * 10
        def die(module): os._exit(4)
        with x.Executor("process", size, mp_context=method) as a, other.Executor("process", size, mp_context=method) as b:
            assert [pool.submit(where).result() for pool in (a, b)] == [(False, False)] * 2
            errors = [pool.submit(die, pool and None).exception() for pool in (a, b)]
            assert [type(error) for error in errors] == [x.WorkerDiedError, other.WorkerDiedError]
            assert list(a.map(lambda n: b_of(n), b.map(lambda n: n + 1, range(3)))) == [10, 20, 30]
            future = b.submit(b_of, a.submit(b_of, 1))      # a future of the other copy counts as one
            assert future.result() == 100 and isinstance(future, other.BaseFuture)
            assert a.submit(lambda: (x, x.BaseFuture)).exception() is None
            assert a.submit(lambda: x.__name__).result() == "pkg._vendor.x"
        worker = sys.modules["pkg.later"].Far.options(mode="process", mp_context=method).init()
        assert worker.go().result() == (x, "pkg.later")
        worker.stop()
        if method == "forkserver":
            assert x._fork_servers._server.pid != other._fork_servers._server.pid
        print("passed")
    ''', "passed\n", str(case.size), case.method, head=HEAD.replace(FOLDER, folder), flags=["-I", "-S"])


def submitted_by_callbacks_to_full_pools(case):
    """It is parked, and nobody waits for ever."""
    first, second = case.make(Patient), case.make(Patient, max_queued_tasks=1)
    flag, hold, began, inner = case.flag(), case.flag(), [case.flag() for _ in range(case.size)], queue.SimpleQueue()
    busy = [second.wait_for(hold, each) for each in began]
    for each in began:
        each.wait()
    future = first.wait_for(flag)
    for _ in range(3):
        future.add_done_callback(lambda _: inner.put(second.add(0)))
        future.add_done_callback(lambda _: inner.put(first.add(0)))
    flag.set()
    futures = [inner.get(timeout=SAFETY) for _ in range(6)]
    case.assertFalse(any(each.done() for each in busy))
    hold.set()
    case.assertEqual([future.result(SAFETY) for future in futures], [0] * 6)


def submitted_by_a_call_to_its_own_full_pool(case):
    pool = case.make(TaskWorker, max_queued_tasks=1)

    async def outer_async():
        return [pool.submit(square, n) for n in range(5)]
    for outer in (lambda: [pool.submit(square, n) for n in range(5)], outer_async):
        case.assertEqual(gather(pool.submit(outer).result(SAFETY), timeout=SAFETY), [0, 1, 4, 9, 16])


forked_by_the_user = a_program('''
    import concurry, signal, warnings
    warnings.simplefilter('ignore', DeprecationWarning)         # of fork() beside threads
    class Slow(concurry.Worker):
        def go(self, fifo):
            return os.read(os.open(fifo, os.O_RDONLY), 1)
        def fast(self): return os.getpid()
    fifo = folder + "/fifo"
    os.mkfifo(fifo)
    keeper = os.open(fifo, os.O_RDWR)
    handle = Slow.options(mode=mode, mp_context=method, max_workers=size).init()
    handle.fast().result()
    server = concurry._fork_servers._server
    running = [handle.go(fifo) for _ in range(size)] if mode != "sync" else []
    # In sync mode the caller waits for what is among the arguments.
    queued, waiting = [handle.fast() for _ in range(size)], handle.fast(concurry.BaseFuture()) if mode != "sync" else None
    pid = os.fork()
    if not pid:
        signal.alarm(20)            # not faulthandler: it would wait for its thread, which is not here
        kinds = [os.readlink(f"/proc/self/fd/{n}") for n in range(3, 200) if os.path.islink(f"/proc/self/fd/{n}")]
        assert mode == "asyncio" or not [kind for kind in kinds if "socket" in kind or "pidfd" in kind], kinds
        try: handle.fast()
        except RuntimeError as error: assert "fork" in str(error), error
        else: raise AssertionError("a call in the child")
        for future in running + [waiting] * (mode != "sync"):
            error = future.exception(5)
            assert isinstance(error, RuntimeError) and "fork" in str(error), error
        handle.stop(), handle.shutdown()
        with concurry.Executor("process", 2) as pool:
            assert list(pool.map(abs, [-1, 2])) == [1, 2]
            assert server is None or concurry._fork_servers._server.pid != server.pid
        with concurry.Executor("thread", 2) as pool: assert list(pool.map(abs, [-1, 2])) == [1, 2]
        concurry._close_server()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.write(keeper, b"x" * size)
    assert [future.result() for future in running] == [b"x"] * len(running)
    assert len([future.result() for future in queued]) == size
    waiting and waiting.cancel()
    handle.stop()
    print("passed")
''')


# === Faults: errors of our own ===

class Reaching(Patient):
    """A worker whose calls have its parent do all that it ever does for one."""

    def use(self, began=None):
        if began:
            began.set()
        with self.limits.acquire():
            return "used"

    def end_when(self, flag):
        """Have the end of this process wait for a flag."""
        atexit.register(flag.wait)

    def linger(self):
        """Leave an object behind whose end takes for ever."""
        self.lingering = Lingering()

    def break_hearing(self):
        """Put an error into what this process does when it hears from its parent."""
        self.inner = Executor("process", 1)
        self.inner.submit(square, 2).result(SAFETY)
        self.log = io.StringIO()
        logging.getLogger("concurry").addHandler(logging.StreamHandler(self.log))
        PutIn(concurry._Upstream, "_hear").__enter__().arm()

    def use_inner(self):
        return self.inner.submit(square, 3).result(SAFETY)

    def logged(self):
        return self.log.getvalue()


class PutIn:
    """An error in our own code: the first call of a function raises it, once it is armed and the call is meant."""

    def __init__(self, owner, name, is_meant=lambda caller, *args: True):
        self.owner, self.name, self.is_meant = owner, name, is_meant
        self.error, self.is_armed, self.has_raised = RuntimeError("put in here"), False, False

    def __enter__(self):
        real = self.real = vars(self.owner)[self.name]

        @functools.wraps(real)
        def function(*args):
            if self.is_armed and self.is_meant(sys._getframe(1), *args):
                self.is_armed, self.has_raised = False, True
                raise self.error
            return real(*args)
        setattr(self.owner, self.name, function)
        return self

    def __exit__(self, *error):
        setattr(self.owner, self.name, self.real)

    def arm(self):
        self.is_armed = True

    def wait(self):
        until(lambda: self.has_raised)


def handed_to_the_reader():
    """Return "where: what" for each place in the module that gives the thread which hears all processes something to do."""
    def handed(node):
        """Return what is handed over by this call, and the arguments that it will have, as expressions."""
        way, args = node.func, node.args
        if ast.unparse(way) == "functools.partial":
            way, args = args[0], args[1:]
        if ast.unparse(way).endswith("todo.append"):
            given = args[0]
            args = [given.elts[0], *given.elts[1].elts] if isinstance(given, ast.Tuple) and isinstance(given.elts[1], ast.Tuple) \
                else given.elts if isinstance(given, ast.Tuple) else []
        else:
            args = args[{"post": 0, "later": 1, "watch": 2, "modify": 2}.get(getattr(way, "attr", None), len(args)):]
        while args and isinstance(args[0], ast.Call) and ast.unparse(args[0].func) == "functools.partial":
            args = [*args[0].args, *args[1:]]
        return args

    def look(node, where):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            where = (*where, node.name)
        args = [ast.unparse(arg) for arg in handed(node)] if isinstance(node, ast.Call) else []
        if args:
            what = args[3] if args[0] == "reader.watch" else " of ".join(args[:2]) if args[0] == "_settle" else args[0]
            found.add(f"{'.'.join(where[:2])}: {what.removeprefix('self.')}")
        for child in ast.iter_child_nodes(node):
            look(child, where)
    found = set()
    look(ast.parse(open_and_read(concurry.__file__)), ())
    return found


# What is not tried, and why. All of Ray's needs a cluster; if the reader itself fails, that is row 31.
NOT_TRIED = {
    "_RingingLock.release: int": "does nothing, but wakes the reader",
    "_Reader.__init__: _answer_bell": "the reader's own",
    "_Reader.post: function": "what others hand over",
    "_Reader._listen: timer[2]": "what others hand over",
    "_TimeKeeper.forget: reader.cancel": "the reader's own",
    "_TimeKeeper.end: reader.backends.discard": "of a set",
    "_tracker: _start_tracker": "once in a program: test_the_resource_tracker",
    "_Upstream.listen: _hear": "in a worker: test_a_worker_that_hears_a_verdict",
    "_of_ref: take": "Ray's",
    "_hear_of_ray: each.lose_ray": "Ray's",
}
REACHED_BY = {}             # place: a scenario


def reaches(*places):
    def keep(scenario):
        assert not set(places) & set(REACHED_BY), places
        REACHED_BY.update(dict.fromkeys(places, scenario))
        return scenario
    return keep


# Each scenario arms the error, does something that gets there, and returns the futures of the pool that is harmed.

@reaches("_ProcessBackend.start: _launch", "_ProcessBackend._take: _settle of self.started")
def a_worker_is_started(case, error):
    error.arm()
    return [in_thread(case.made)]


@reaches("_ProcessBackend._launch: _hear", "_ProcessBackend._hear: _hear", "_ProcessBackend._take_outcome: _settle_answer")
def calls_are_answered(case, error):
    pool = case.made()
    error.arm()
    return [pool.add() for _ in range(5)]


@reaches("_ProcessBackend._feed: _watch_for_room", "_ProcessBackend._watch_for_room: _hear")
def a_large_argument(case, error):
    pool = case.made()
    process = pool._pool.backends[0].link.process
    process.halt()                  # it might read as fast as we write
    error.arm()
    futures = [pool.give(bytes(1 << 22)), pool.add()]
    process.kill(signal.SIGCONT)
    return futures


@reaches("_ProcessBackend._launch: _died", "_ProcessBackend._bury: _succeed", "_ProcessBackend._fail: _settle of call.future")
def a_worker_dies(case, error):
    pool = case.made()
    error.arm()
    return [pool.exit(3), pool.add(), pool.add()]


@reaches("_ProcessBackend.feed: _bury")
def a_worker_dies_while_somebody_sends(case, error):
    pool = case.made()
    backend, = pool._pool.backends
    backend.turn["is"] = "somebody else's"
    backend.link.process.kill()
    until(lambda: backend.dead is not None)
    del backend.turn["is"]
    error.arm()
    return [pool.add()]


@reaches("_ProcessBackend._launch_later: _launch")
def a_start_is_refused(case, error):
    pool = case.made()
    with starts_refused(1):
        error.arm()
        futures = [pool.exit(3), pool.add()]
        error.wait()
    return futures


@reaches("_ProcessBackend._let_end: _bury")
def a_worker_is_retired(case, error):
    pool = case.made(max_tasks_per_worker=1)
    error.arm()
    return [pool.add() for _ in range(3)]


@reaches("_ProcessBackend._take: _end_late")
def a_worker_is_retired_and_does_not_end(case, error):
    with temp_config(global_stop_timeout=0.01):
        pool = case.made(max_tasks_per_worker=1)
    error.arm()
    return [pool.linger(), pool.add()]


@reaches("_ProcessBackend._leave_to_end: _ended_late")
def a_worker_ends_after_its_successor_has_begun(case, error):
    pool, flag = case.made(max_tasks_per_worker=2), case.flag()
    futures = [pool.end_when(flag), *(pool.add() for _ in range(2))]
    concurry.wait(futures, SAFETY)
    error.arm()
    flag.set()
    error.wait()
    return [*futures, pool.add()]


@reaches("_ProcessBackend._let_end: link.process.kill")
def a_worker_takes_too_long_for_its_end(case, error):
    flag = case.flag()
    with unittest.mock.patch.object(concurry, "_END_TIMEOUT", -1):
        pool = case.made(max_tasks_per_worker=1)
        error.arm()
        futures = [pool.end_when(flag)]
        error.wait()
    flag.set()
    return [*futures, pool.add()]


@reaches("_ProcessBackend.interruption: _end_call")
def a_call_is_killed(case, error):
    pool, began = case.made(), case.flag()
    futures = [pool.wait_for(case.flag(), began), pool.add()]
    began.wait()
    error.arm()
    futures[0].cancel(kill=True)
    return futures


@reaches("_ProcessBackend._take_outcome: _end_call")
def a_call_is_killed_before_its_turn(case, error):
    pool, began, go = case.made(), case.flag(), case.flag()
    gather([pool.add() for _ in range(20)], timeout=SAFETY)         # it is quick: it gets calls ahead
    futures = [pool.wait_for(go, began), pool.add()]
    began.wait()
    futures[1].cancel(kill=True)
    case.reader_has_done_all()
    error.arm()
    go.set()
    return [*futures, pool.add()]


@reaches("_ProcessBackend.hurry: _hurry", "_ProcessBackend.kill: _terminate")
def stopped_while_a_call_runs(case, error):
    pool, began = case.made(), case.flag()
    futures = [pool.wait_for(case.flag(), began), pool.add()]
    began.wait()
    error.arm()
    return [*futures, in_thread(pool.stop, 0)]


@reaches("_ProcessBackend._terminate: link.process.kill")
def stopped_while_a_call_ignores_that(case, error):
    pool, began = case.made(), case.flag()
    future = pool.ignore_and_wait(began)
    began.wait()
    error.arm()
    with unittest.mock.patch.object(concurry, "_GRACE", 0.01):
        pool.stop(0)
    error.wait()
    return [future]


@reaches("_ProcessBackend.finish: _hang_up", "_ProcessBackend._end: _settle of self.ended")
def stopped(case, error):
    pool = case.made()
    future = pool.add()
    error.arm()
    return [future, in_thread(pool.shutdown)]


@reaches("_OnDemand.rest: _rest", "_OnDemand._rest: _leave")
def a_worker_on_demand(case, error):
    pool = case.made(TaskWorker, on_demand=True, on_demand_linger=0)
    error.arm()
    futures = [pool.submit(square, 2)]
    error.wait()
    return [*futures, pool.submit(square, 3)]


@reaches("_TimeKeeper.watch: _set", "_TimeKeeper._set: _ring")
def a_call_takes_too_long(case, error):
    pool, go = case.made(call_timeout={"wait_for": 0.01}), case.flag()
    error.arm()
    futures = [pool.wait_for(go), pool.add()]
    error.wait()
    go.set()
    return futures


@reaches("_Guest.wake: _look")
def a_limit_becomes_free(case, error):
    limits = LimitSet([ResourceLimit("slots", 1)])
    pool = case.made(limits=limits)
    with limits.acquire():
        futures = [pool.use(), pool.use()]
        until(lambda: pool._pool.backends[0].link.guests)
        case.reader_has_done_all()
        error.arm()
    return futures


@reaches("_Guest._look: _ring_alarm")
def a_rate_allows_the_next(case, error):
    pool = case.made(limits=[CallLimit(1, 0.01)])
    error.arm()
    return [pool.use() for _ in range(3)]


@reaches("_Lane._flush: _flush")
def a_worker_that_takes_no_more_verdicts(case, error):
    pool = case.made(limits=[ResourceLimit("slots", 1)])
    future = pool.use()
    future.result(SAFETY)           # it listens
    backend, = pool._pool.backends
    error.arm()
    backend.reader.post(backend.link.lane.send, 10 ** 9, False, "x" * (1 << 22))
    error.wait()
    return [future, pool.add()]


def settling_a_call_raises(case):
    """That call fails with the cause, which is logged, and its place is free."""
    records = case.records()
    handle = case.make(Patient, max_queued_tasks=1)
    with PutIn(concurry, "_settle", is_of_a_call) as error:
        error.arm()
        case.assertIs(handle.add().exception(SAFETY), error.error)
    case.assertIn("Traceback", records.get(timeout=SAFETY).getMessage())
    case.check_pool(handle, restarts=0)


def is_of_a_call(caller, future, *args):
    return "_call" in vars(future)


def close_coroutines(caller, *args):
    """Nobody will await them."""
    for arg in args:
        if inspect.iscoroutine(arg):
            arg.close()
    return True


class OwnErrorTests(ProgramCase):
    """FAULTS 38: an error of our own fails the call or the worker it was made for, and is logged; nobody else notices."""

    def made(self, cls=Reaching, **options):
        return self.start(cls, mode="process", **{"max_workers": 1, "max_queued_tasks": None, "name": "harmed", **options})

    def reader_has_done_all(self):
        done = threading.Event()
        concurry._readers[os.getpid()].post(done.set)
        self.assertTrue(done.wait(SAFETY))

    def put_into(self, place, other):
        """Return the error to be put into what is handed over at a place; it does not hit the other pool."""
        where, what = place.split(": ")
        name = what.partition(" of ")[0].rpartition(".")[2]
        owner = vars(concurry)["_Process" if what == "link.process.kill" else where.partition(".")[0]]
        owner = owner if name in vars(owner) else concurry

        def is_meant(caller, first, *args):
            by_reader = type(caller.f_locals.get("self")) is concurry._Reader
            return by_reader and getattr(first, "pool", None) is not other._pool
        return PutIn(owner, name, is_meant)

    def test_each_place_has_its_scenario(self):
        places = {place for place in handed_to_the_reader() if not place.startswith(("_RayBackend.", "_RayWay."))}
        self.assertEqual(places, {*REACHED_BY, *NOT_TRIED})
        self.assertFalse(set(REACHED_BY) & set(NOT_TRIED))

    def test_what_the_reader_does_for_one_pool(self):
        with TaskWorker.options(mode="process", max_workers=2, max_queued_tasks=None).init() as other:
            for place, scenario in REACHED_BY.items():
                with self.subTest(place):
                    faulthandler.dump_traceback_later(2 * SAFETY, exit=True, file=sys.__stderr__)
                    before, reader = Belongings(), concurry._readers[os.getpid()]
                    try:
                        with self.put_into(place, other) as error:
                            self.check(scenario, error, other)
                    finally:
                        self.doCleanups()
                    self.assertIs(concurry._readers[os.getpid()], reader)
                    self.assertTrue(reader.thread.is_alive())
                    self.see_nothing_left(before)

    def check(self, scenario, error, other):
        started, go = self.flag(), self.flag()
        held = other.submit(hold, started, go)
        started.wait()
        with self.log_of(level="ERROR") as logs:
            futures = in_thread(scenario, self, error).result(SAFETY)
            others = [other.submit(square, n) for n in range(9)]
            gather(futures, return_exceptions=True, timeout=SAFETY)
            error.wait()
            until(lambda: any(record.exc_info and record.exc_info[1] is error.error for record in logs.records))
        go.set()
        self.assertEqual(gather([held, *others], timeout=SAFETY), ["held", *(n * n for n in range(9))])
        with self.made(TaskWorker, name="new") as new:
            self.assertEqual(new.submit(abs, -3).result(SAFETY), 3)

    def see_nothing_left(self, before):
        def left():
            return [*(set(threading.enumerate()) - before.threads), *(set(descendants()) - before.processes),
                    *(set(descriptors().items()) - set(before.descriptors.items()))]
        with contextlib.suppress(AssertionError):
            until(lambda: not left())
        self.assertEqual(left(), [])

    def test_a_worker_that_hears_a_verdict(self):
        """The same in a worker process: the call that waits fails, the worker's own pool and its next calls do not."""
        limits = LimitSet([ResourceLimit("slots", 1)])
        pool, other = self.made(limits=limits), self.made(limits=limits, name="other")
        pool.break_hearing().result(SAFETY)
        self.assertRaisesRegex(RuntimeError, "put in here", pool.use().result, SAFETY)
        futures = [pool.use(), pool.use(), pool.use_inner(), pool.use(), other.use()]
        self.assertEqual(gather(futures, timeout=SAFETY), ["used", "used", 9, "used", "used"])
        self.assertEqual(limits.get_stats()["slots"]["in_use"], 0)
        logged = pool.logged().result(SAFETY)
        self.assertRegex(logged, "(?s)Traceback.*put in here")
        self.assertEqual(logged.count("an error of concurry's own"), 1)

    def test_the_resource_tracker(self):
        self.check_program("""
            import concurry, multiprocessing
            real, errors = concurry._start_tracker, [RuntimeError("put in here")]
            def start_tracker(*args):
                if errors: raise errors.pop()
                real(*args)
            concurry._start_tracker = start_tracker
            def use_it():
                multiprocessing.get_context("spawn").Lock()
                return "worked"
            with concurry.Executor("process", 1) as pool, concurry.Executor("process", 1) as other:
                print(pool.submit(use_it).result(), other.submit(use_it).result(), errors)
        """, "worked worked []\n", errors="Traceback(?s:.*)put in here")

    def test_a_call_of_an_asyncio_worker(self):
        for name, fn in ("_begin_call", square_async), ("_serve", square), ("_start", returns_coroutine), ("_start_wait", boom):
            with self.subTest(name), PutIn(concurry._AsyncioBackend, name, close_coroutines) as error, \
                    self.log_of(level="ERROR") as logs:
                waiting = []

                async def wait():
                    waiting.append(asyncio.get_running_loop().create_future())
                    return await waiting[0]

                async def go_on():
                    waiting[0].set_result("went on")
                pool = self.start(TaskWorker, mode="asyncio", num_retries=1, retry_wait=1e-6)
                held = pool.submit(wait)
                until(lambda: waiting)
                error.arm()
                self.assertIs(pool.submit(fn, 3).exception(SAFETY), error.error)
                self.assertIs(logs.records[0].exc_info[1], error.error)
                pool.submit(go_on).result(SAFETY)
                self.assertEqual((held.result(SAFETY), pool.submit(square, 2).result(SAFETY)), ("went on", 4))
                self.assertEqual((pool._pool.calls, pool._pool.backends[0].calls), ({}, {}))

    def test_a_call_whose_place_is_given_back(self):
        """It is free all the same: there is one, and the next call gets it."""
        small = {"max_workers": 1, "max_queued_tasks": 1}
        for mode, options in (("sync", {}), ("asyncio", {}), ("thread", small), ("thread", {**small, "on_demand": True}),
                              ("process", small), ("process", {**small, "on_demand": True})):
            with self.subTest(mode=mode, **options):
                pool = self.start(TaskWorker, mode=mode, **options)
                with PutIn(concurry._Pool, "leave") as error, self.log_of(level="ERROR"):
                    error.arm()
                    self.assertIs(pool.submit(square, 2).exception(SAFETY), error.error)
                self.assertEqual([each.calls for each in (pool._pool, *pool._pool.backends) if each.calls], [])
                self.assertEqual(in_thread(pool.submit, square, 3).result(SAFETY).result(SAFETY), 9)

    def test_the_last_call_before_the_end(self):
        pool, started, go = self.start(TaskWorker, mode="thread", max_workers=2), self.flag(), self.flag()
        held = pool.submit(hold, started, go)
        started.wait()
        ending = in_thread_until_it_waits(pool.shutdown)
        with PutIn(concurry._Pool, "leave") as error, self.log_of(level="ERROR"):
            error.arm()
            go.set()
            self.assertIs(held.exception(SAFETY), error.error)
            ending.result(SAFETY)

    def test_a_worker_that_is_built(self):
        """`init` raises it; on demand, where that does not wait, the call does."""
        def is_of_a_worker(caller, *args):
            return caller.f_code.co_name in ("_build", "_main")
        for mode, options in ("thread", {"on_demand": True, "max_workers": 1}), ("thread", {}), ("asyncio", {}):
            with self.subTest(mode=mode, **options), PutIn(concurry, "_settle", is_of_a_worker) as error, \
                    unittest.mock.patch.object(threading, "excepthook", lambda args: None):
                faulthandler.dump_traceback_later(2 * SAFETY, exit=True, file=sys.__stderr__)
                error.arm()
                outcome = in_thread(lambda: self.start(TaskWorker, mode=mode, **options).submit(square, 2).result(SAFETY))
                self.assertIs(outcome.exception(SAFETY), error.error)

    def test_a_call_of_a_thread_on_demand(self):
        pool = self.start(TaskWorker, mode="thread", max_workers=1, on_demand=True)
        with PutIn(concurry, "_settle", is_of_a_call) as error, self.log_of(level="ERROR"):
            error.arm()
            self.assertIs(pool.submit(square, 2).exception(SAFETY), error.error)
        self.assertEqual(pool.submit(square, 3).result(SAFETY), 9)
        self.assertEqual(pool._pool.backends[0].calls, {})


the_default_timeout_of_sockets_is_short = a_program('''
    import concurry, logging, socket
    socket.setdefaulttimeout(0.0)
    class Tally(concurry.Worker):
        count = 0
        def add(self, n=1):
            self.count += n
            return self.count
        def size(self, data): return len(data)
        def exit(self): os._exit(3)
    handle = Tally.options(mode=mode, mp_context=method, max_workers=size, max_queued_tasks=None).init()
    for _ in range(3): assert {handle.add(0).result() for _ in range(size)} == {0}      # one at a time: they are idle between
    assert {future.result() for future in [handle.add(0) for _ in range(200)]} == {0}
    assert handle.size(b"x" * (1 << 22)).result() == 1 << 22        # it takes more than one step to send
    logging.disable()           # of deaths
    assert {type(handle.exit().exception()) for _ in range(size)} == {concurry.WorkerDiedError}
    assert {handle.add(0).result() for _ in range(3 * size)} == {0}
    handle.stop()
    print("passed")
''')


# What calls leave behind

def programs_end(then, end, **options):
    """Return the fault of workers that end, after or while a call has started a program: it is gone, too.

    `then` is what the call does after that, `end(handle, calls)` ends the workers.
    """
    def happens(case):
        case.records()
        handle = case.make(Starter, **options)
        path, began = os.path.join(case.folder(), "pids"), [case.flag() for _ in range(case.size)]
        calls = [handle.program(path, each, then) for each in began]
        for each in began:
            each.wait()
        pids = [int(word) for word in open_and_read(path).split()]
        case.assertEqual(len(pids), case.size)
        end(handle, calls)
        check_gone(case, pids)
        for call in calls:
            case.assertEqual(call.cancelled() or call.exception(SAFETY) is not None, then != "return")
    return happens


def their_time_is_over(handle, calls):
    """As if `call_timeout` were over, however slow the machine is."""
    pool = handle._pool
    for call in list(pool.calls):
        call.backend.reader.post(pool.keeper._ring, call, 3600.0)
    for future in calls:
        assert isinstance(future.exception(SAFETY), CallTimeoutError), future


def killed_when_idle(handle, calls):
    for pid in gather(calls, timeout=SAFETY):
        os.kill(pid, signal.SIGKILL)


def the_parent_of_programs_dies(number, job):
    def happens(case):
        program = Program(case, '''
            import concurry, subprocess
            mode, size, method, job = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
            class Starts(concurry.Worker):
                def start(self):
                    self.program = subprocess.Popen(["sleep", "1000"])
                    return os.getpid(), self.program.pid
                def run(self, code): exec(code)
            handle = Starts.options(mode=mode, mp_context=method, max_workers=size).init()
            pids = [pid for _ in range(size) for pid in handle.start().result()]
            calls = [handle.run(job) for _ in range(size)]
            print(*pids, flush=True)
            sys.stdin.readline()
        ''', case.mode, str(case.size), case.method, job)
        pids = program.numbers()
        if job == HOLD_GIL:
            for pid in pids[::2]:
                wait_until_asleep(pid)
        program.popen.send_signal(number)
        case.assertEqual(program.popen.wait(SAFETY), -number)
        check_gone(case, pids)
    return happens


def left_behind(leave):
    """Return the fault of calls that leave behind what does not end: it ends with their worker, for which nobody waits long.

    `leave(handle)` submits one, whose result are the pids.
    """
    def happens(case):
        for end in ("shutdown", "resize", "recycling"):
            handle = case.make(Starter, **({"max_tasks_per_worker": 1} if end == "recycling" else {}))
            pids = gather([leave(handle) for _ in range(case.size)], timeout=SAFETY)
            case.assertEqual(len({group[0] for group in pids}), case.size)
            if end == "resize":
                handle.resize(1)
            elif end == "recycling":
                others = gather([handle.pid() for _ in range(case.size)], timeout=SAFETY)
                case.assertFalse({*others} & {*sum(pids, [])})
            handle.shutdown()
            check_gone(case, sum(pids, []))
    return happens


# === Faults: the table ===

class Fault(typing.NamedTuple):
    row: int                    # of FAULTS
    name: str
    modes: tuple                # where it can happen
    happens: typing.Callable    # brings it about in a cell, and looks at what becomes of it

    def cells(self, is_whole):
        """Return the (mode, size, method) to be tried: all, or one for each mode, another one for each fault."""
        cells = []
        for mode in self.modes:
            all_of_it = [(mode, size, method) for size in ((1, 3) if mode in ("thread", "process", "ray") else (1,))
                         for method in (START_METHODS if mode == "process" else (None,))]
            number = (RAY_FAULTS if mode == "ray" else FAULTS).index(self)
            cells += all_of_it if is_whole else [all_of_it[number % len(all_of_it)]]
        return cells


PROCESS, BESIDE = ("process",), ("thread", "process", "asyncio")
FAULTS = [
    Fault(1, "os._exit", PROCESS, a_call(
        lambda h: h.exit(3), WorkerDiedError, r"exit code 3.*exit\(\)", deaths=1,
        check=lambda e: (e.exitcode, e.method, e.started, e.deaths) == (3, "exit", True, ((e.worker, e.pid, 3),)))),
    Fault(1, "kill -9", PROCESS, a_call(
        lambda h: h.kill(9), WorkerDiedError, r"signal 9 \(SIGKILL\).*kill\(\)", deaths=1,
        check=lambda e: e.exitcode == -9 and str(e.pid) in str(e) and e.worker in str(e))),
    Fault(1, "SIGTERM", PROCESS, a_call(lambda h: h.kill(15), WorkerDiedError, "SIGTERM", deaths=1)),
    Fault(1, "segfault", PROCESS, a_call(
        lambda h: h.crash(), WorkerDiedError, r"signal 11 \(SIGSEGV\).*crash\(\)", deaths=1)),
    Fault(1, "closes its descriptors", PROCESS, a_call(
        lambda h: h.close_descriptors(), WorkerDiedError, "close_descriptors", deaths=1)),
    Fault(1, "run again", PROCESS, run_again_after_a_crash),
    Fault(1, "garbage", PROCESS, garbage_from_a_worker),
    Fault(2, "idle", PROCESS, an_idle_worker_is_killed),
    Fault(3, "while it sends", PROCESS, a_call(
        lambda h: h.die_at(Moment("sendall", 1), 1 << 22), WorkerDiedError, "SIGKILL.*die_at", deaths=1)),
    Fault(4, "while it receives", PROCESS, killed_while_a_call_is_received),
    Fault(4, "between any two messages", PROCESS, killed_between_any_two_messages),
    Fault(5, "SystemExit", MODES, a_call(lambda h: h.throw(SystemExit, 3), SystemExit, "3", "in throw")),
    Fault(5, "sys.exit with a text", MODES, a_call(lambda h: h.throw(SystemExit, "bye"), SystemExit, "bye")),
    Fault(5, "SystemExit in a coroutine", MODES, a_call(lambda h: h.throw_async(SystemExit, 3), SystemExit, "3", "in throw_async")),
    Fault(5, "KeyboardInterrupt", MODES, a_call(lambda h: h.throw(KeyboardInterrupt), KeyboardInterrupt)),
    Fault(5, "CancelledError", MODES, a_call(lambda h: h.throw(asyncio.CancelledError), asyncio.CancelledError)),
    Fault(5, "the other CancelledError", MODES, a_call(
        lambda h: h.throw(concurrent.futures.CancelledError), concurrent.futures.CancelledError)),
    Fault(5, "GeneratorExit", MODES, a_call(lambda h: h.throw(GeneratorExit), GeneratorExit)),
    Fault(5, "BaseException", MODES, a_call(lambda h: h.throw(OwnInterrupt, "own"), OwnInterrupt, "own", "in throw")),
    Fault(5, "StopIteration", MODES, a_call(lambda h: h.throw(StopIteration, 5), StopIteration, "5")),
    Fault(6, "argument", PROCESS, a_call(
        lambda h: h.give(1, config={"lock": threading.Lock()}), pickle.PicklingError,
        r"argument 'config'\['lock'\] of give\(\): cannot pickle '_thread.lock' object")),
    Fault(6, "argument with a reason", PROCESS, a_call(
        lambda h: h.give(0, [h]), pickle.PicklingError, r"argument 2\[0\] of give\(\): a handle .* cannot travel")),
    Fault(6, "deep argument", PROCESS, a_call(
        lambda h: h.give(functools.reduce(lambda deep, _: [deep], range(100_000))), pickle.PicklingError,
        r"argument 1 of give\(\).*nested too deeply")),
    Fault(7, "result", PROCESS, a_call(
        lambda h: h.result_with(threading.Lock), pickle.PicklingError,
        r"result\['inner'\]\[1\] of result_with\(\): cannot pickle '_thread.lock' object")),
    Fault(8, "argument that does not load", PROCESS, a_call(
        lambda h: h.give(FailsWhenLoaded()), pickle.PicklingError, "ZeroDivisionError: while loading",
        check=lambda e: isinstance(e.__cause__, ZeroDivisionError))),
    Fault(8, "result that does not load", PROCESS, a_call(
        lambda h: h.result_with(functools.partial(FailsWhenLoaded, os.getpid())), pickle.PicklingError,
        r"result_with\(\).*ZeroDivisionError: while loading", check=lambda e: isinstance(e.__cause__, ZeroDivisionError))),
    Fault(9, "argument whose loading exits", PROCESS, a_call(
        lambda h: h.give(ExitsWhenLoaded()), WorkerDiedError, r"exit code 4.*give\(\)", deaths=1)),
    Fault(9, "dependency whose loading exits", PROCESS, a_call(
        lambda h: h.give(done_future(result=ExitsWhenLoaded())), WorkerDiedError, r"exit code 4.*give\(\)", deaths=1,
        check=lambda e: e.started)),
    Fault(10, "exception with needs", PROCESS, a_call(
        lambda h: h.throw_picky(), Picky, "^the original text$", "in throw_picky", check=lambda e: e.code)),
    Fault(10, "exception with a lock", PROCESS, a_call(
        lambda h: h.throw(Holder), Holder, "^held$", "in throw", check=lambda e: "lock" in e.__notes__[0])),
    Fault(10, "exception made oddly", PROCESS, a_call(
        lambda h: h.throw_odd(), RemoteError, "Odd: the original text", "in throw_odd",
        check=lambda e: e.type_name.endswith("Odd") and "in throw_odd" in e.traceback)),
    Fault(11, "constructor raises", MODES, a_constructor_raises),
    Fault(12, "constructor exits", BESIDE, a_constructor_exits),
    Fault(13, "no replacement starts", PROCESS, no_replacement_starts),
    Fault(13, "each call kills its worker", PROCESS, a_call_kills_each_worker),
    Fault(13, "on demand", PROCESS, on_demand_workers_die),
    Fault(14, "holding limits", PROCESS, killed_while_it_holds_limits),
    Fault(15, "asking for limits", PROCESS, killed_while_it_asks_for_limits),
    Fault(15, "waiting for limits", PROCESS, killed_while_it_waits_for_limits),
    Fault(16, "cancel", BESIDE, a_pending_call_is_cancelled),
    Fault(16, "cancel races", BESIDE, cancel_races_with_the_result),
    Fault(17, "stop", BESIDE, stopped_with_calls_queued_and_running),
    Fault(17, "stop in a callback", MODES, stopped_by_a_done_callback),
    Fault(17, "stop in a call", ("sync", "thread", "asyncio"), stopped_by_a_call_of_its_own),
    Fault(18, "never returns", BESIDE, stopped_while_a_call_never_returns),
    Fault(18, "cleans up", PROCESS, stopped_while_a_call_cleans_up),
    Fault(18, "run again", PROCESS, stopped_while_a_call_is_run_again),
    Fault(19, "exit, idle", MODES, exit_with_idle_workers),
    Fault(20, "exit, pending", MODES, exit_with_pending_calls),
    Fault(21, "Ctrl-C", BESIDE, interrupted),
    Fault(21, "Ctrl-C, and on", PROCESS, interrupted_and_going_on),
    Fault(22, "TERM to the parent", PROCESS, the_parent_dies(signal.SIGTERM, "while True: pass")),
    Fault(23, "KILL to the parent", PROCESS, the_parent_dies(signal.SIGKILL)),
    Fault(23, "KILL to the parent, busy", PROCESS, the_parent_dies(signal.SIGKILL, "while True: pass")),
    Fault(23, "KILL to the parent, in C", PROCESS, the_parent_dies(signal.SIGKILL, HOLD_GIL)),
    Fault(23, "KILL to the parent, descriptors kept", PROCESS, the_parent_dies(signal.SIGKILL, "", "keep")),
    Fault(23, "KILL to the parent, in C, descriptors kept", PROCESS, the_parent_dies(signal.SIGKILL, HOLD_GIL, "keep")),
    Fault(24, "submitters wait", PROCESS, submitters_wait_behind_a_death),
    Fault(25, "locks", PROCESS, threads_hold_locks),
    Fault(26, "pools in workers", PROCESS, pools_inside_workers),
    Fault(27, "no main guard", PROCESS, no_main_guard),
    Fault(28, "clock", MODES, the_clock_is_set),
    Fault(29, "callbacks raise", MODES, callbacks_raise),
    Fault(29, "submitted by handlers", MODES, submitted_by_signal_handlers_and_finalizers),
    Fault(29, "started by finalizers", PROCESS, started_by_finalizers),
    Fault(30, "no descriptors", PROCESS, no_descriptors_are_left),
    Fault(31, "reader", PROCESS, the_reader_fails),
    Fault(32, "kills and limits", PROCESS, killed_again_and_again_while_limits_are_used),
    Fault(33, "no semaphores", MODES, no_semaphores_and_no_shared_memory),
    Fault(34, "pool while importing", PROCESS, a_module_makes_a_pool_when_it_is_imported),
    Fault(34, "pool by fork while importing", PROCESS, a_module_makes_a_pool_by_fork_when_it_is_imported),
    Fault(35, "two copies", PROCESS, two_copies_under_other_names),
    Fault(36, "callbacks and full pools", BESIDE, submitted_by_callbacks_to_full_pools),
    Fault(36, "its own full pool", ("thread", "asyncio"), submitted_by_a_call_to_its_own_full_pool),
    Fault(37, "fork", MODES, forked_by_the_user),
    Fault(38, "settling a call raises", MODES, settling_a_call_raises),
    Fault(40, "program, shutdown", PROCESS, programs_end("return", lambda h, calls: h.shutdown())),
    Fault(40, "program, recycling", PROCESS, programs_end("return", lambda h, calls: None, max_tasks_per_worker=1)),
    Fault(40, "program, call_timeout", PROCESS, programs_end("wait", their_time_is_over, call_timeout=3600)),
    Fault(40, "program, cancel", PROCESS, programs_end("wait", lambda h, calls: [call.cancel(kill=True) for call in calls])),
    Fault(40, "program, stop", PROCESS, programs_end("wait", lambda h, calls: h.stop(0))),
    Fault(40, "program, os._exit", PROCESS, programs_end("exit", lambda h, calls: None)),
    Fault(40, "program, kill -9", PROCESS, programs_end("kill", lambda h, calls: None)),
    Fault(40, "program, idle", PROCESS, programs_end("return", killed_when_idle)),
    Fault(40, "program, KILL to the parent", PROCESS, the_parent_of_programs_dies(signal.SIGKILL, "import time; time.sleep(60)")),
    Fault(40, "program, KILL to the parent, in C", PROCESS, the_parent_of_programs_dies(signal.SIGKILL, HOLD_GIL)),
    Fault(40, "program, TERM to the parent", PROCESS, the_parent_of_programs_dies(signal.SIGTERM, "")),
    Fault(41, "default timeout", PROCESS, the_default_timeout_of_sockets_is_short),
    Fault(43, "exit function", PROCESS, left_behind(lambda h: h.at_exit(signal.pause))),
    Fault(43, "children, idle", PROCESS, left_behind(lambda h: h.children("idle"))),
    Fault(43, "children, busy", PROCESS, left_behind(lambda h: h.children("busy"))),
]

RAY = ("ray",)
RAY_FAULTS = [
    Fault(1, "os._exit", RAY, a_call(
        lambda h: h.exit(3), WorkerDiedError, r"\(pid \d+\) died before the end of exit\(\).*may have begun: its worker process", deaths=1,
        check=lambda e: (e.exitcode, e.method, e.started, e.deaths) == (None, "exit", None, ((e.worker, e.pid, None),)))),
    Fault(1, "kill -9", RAY, a_call(lambda h: h.kill(9), WorkerDiedError, r"kill\(\)", deaths=1)),
    Fault(1, "segfault", RAY, a_call(lambda h: h.crash(), WorkerDiedError, r"crash\(\)", deaths=1)),
    Fault(2, "idle", RAY, an_idle_worker_is_killed),
    *(fault._replace(modes=RAY) for fault in FAULTS if fault.row in (5, 6, 7, 8, 10, 11, 12, 16)
      or fault.name in ("callbacks raise", "callbacks and full pools")),
    Fault(9, "argument whose loading exits", RAY, a_call(
        lambda h: h.give(ExitsWhenLoaded()), WorkerDiedError, r"give\(\)", deaths=1)),
    Fault(13, "no replacement starts", RAY, no_replacement_starts),
    Fault(13, "each call kills its worker", RAY, a_call_kills_each_worker),
    Fault(14, "holding limits", RAY, killed_while_it_holds_limits),
    Fault(15, "waiting for limits", RAY, killed_while_it_waits_for_limits),
    Fault(17, "stop", RAY, stopped_with_calls_queued_and_running),
    Fault(17, "stop in a callback", RAY, stopped_by_a_done_callback),
    Fault(18, "never returns", RAY, stopped_while_a_call_never_returns),
    Fault(24, "submitters wait", RAY, submitters_wait_behind_a_death),
    Fault(32, "kills and limits", RAY, killed_again_and_again_while_limits_are_used),
]


class FaultMixin:
    """A test for each fault of a table. It shows one cell for each mode; all of them with CONCURRY_MATRIX=1."""

    is_whole = os.environ.get("CONCURRY_MATRIX") == "1"

    def check(self, fault):
        for self.mode, self.size, self.method in fault.cells(self.is_whole):
            with self.subTest(row=fault.row, mode=self.mode, size=self.size, method=self.method):
                before = self.belongings()
                try:
                    fault.happens(self)
                finally:
                    self.doCleanups()
                self.assertEqual(before.what_is_left(), [])

    def make(self, cls, *args, **options):
        method = {"mp_context": self.method} if self.method else {}
        return self.start(cls, *args, **{"mode": self.mode, "max_workers": self.size, **method, **options})

    def build(self, cls, *args):
        """Raise what the constructors raise: `init` does, and in ray mode, where it does not wait, a future."""
        handle = self.make(cls, *args)
        if self.mode == "ray":
            handle.pid().result(SAFETY)

    def code(self, number):
        """Return what a WorkerDiedError tells of an exit code: Ray does not know it."""
        return None if self.mode == "ray" else number

    def some(self, cases):
        """Return all of them, or every third: not the same for each cell."""
        return cases if self.is_whole and self.size == 1 else cases[len(self.method or self.mode) % 3::3]

    def records(self):
        """Return a queue of what is logged from now on; nothing of it is printed."""
        logger, records = logging.getLogger("concurry"), queue.SimpleQueue()
        handler = logging.handlers.QueueHandler(records)
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)
        return records

    def check_pool(self, handle, restarts=None):
        """See that a pool is as it was: its size, all its workers at work, no place taken."""
        backends = handle._pool.backends
        until(lambda: restarts in (None, handle.get_pool_stats()["restarts"]))      # a death may still be on its way to us
        if self.mode == "process":
            until(lambda: all(backend.link is not None and backend.link.is_built for backend in backends))
        elif self.mode == "ray":
            until(lambda: all(backend.is_built for backend in backends))
        self.assertEqual((len(backends), handle.get_pool_stats()["total_workers"]), (self.size, self.size))
        self.assertEqual((handle._pool.calls, [len(backend.calls) for backend in backends]), ({}, [0] * self.size))
        self.assertEqual(len({*gather([handle.pid() for _ in range(3 * self.size)], timeout=SAFETY)}),
                         self.size if self.mode in AWAY else 1)


class FaultTests(FaultMixin, ProgramCase):
    def test_each_row_has_its_faults(self):
        self.assertEqual({fault.row for fault in FAULTS}, {*range(1, 39), 40, 41, 43})


class RayFaultTests(FaultMixin, RayTestCase):
    pass


for _cases, _faults in ((FaultTests, FAULTS), (RayFaultTests, RAY_FAULTS)):
    for _fault in _faults:
        _name = "test_{:02}_{}".format(_fault.row, re.sub(r"\W+", "_", _fault.name))
        assert not hasattr(_cases, _name), _name
        setattr(_cases, _name, lambda self, fault=_fault: self.check(fault))


# === Ray ===

class Noted:
    """Something large that notes the process it is loaded in."""

    def __init__(self, path, data):
        self.path, self.data = path, data

    def __reduce__(self):
        return _load_noted, (self.path, pickle.PickleBuffer(self.data))


def _load_noted(path, data):
    with open(path, "a") as file:
        file.write(f"{os.getpid()} ")
    return Noted(path, bytes(data))


class Maker(Worker):
    def pid(self):
        return os.getpid()

    def make(self, path, size):
        return Noted(path, b"x" * size)

    def sizes(self, *things, inside=()):
        return [len(thing.data) for thing in (*things, *inside)]

    def size_of(self, thing):
        return len(thing)

    def fail(self):
        raise KeyError("made")

    def exit(self):
        os._exit(1)

    def hold(self, started, go):
        started.set()
        go.wait()
        return os.getpid()

    def note(self, path):
        with open(path, "a") as file:
            file.write("x")


class Coroutines(Worker):
    """Counts the calls that are inside at once."""

    def __init__(self):
        self.inside = 0

    async def meet(self, n):
        """Return when n calls are here."""
        self.inside += 1
        if self.inside == 1:
            self.all_here = asyncio.Event()
        if self.inside == n:
            self.all_here.set()
        await self.all_here.wait()
        return n

    def plain(self):
        return threading.current_thread().name

    async def where(self):
        return os.getpid(), self.limits.get_stats()


class Outer(Worker):
    """A Ray worker with workers of its own."""

    def start(self, mode, limits=None):
        self.inner = Mortal.options(mode=mode, limits=limits or self.limits, max_workers=2, max_queued_tasks=None).init()
        return sorted(self.inner.pid().result(SAFETY) for _ in range(2))

    def use(self, times):
        gather([self.inner.use() for _ in range(times)], timeout=SAFETY)
        return self.limits.get_stats()

    def hold(self, started, go):
        self.held = self.inner.hold(started, go)

    def pid(self):
        return os.getpid()


class RayTests(RayTestCase):
    """What is said of Ray alone; what holds in every mode is said with the others."""

    mode = "ray"
    make = ModeMixin.make

    def actors_beside(self, others):
        """The class of each living actor that is none of these: those of a test before may take a while to end."""
        return [kind for number, kind in RayBelongings.living_actors().items() if number not in others]

    def test_without_ray_init(self):
        code = """
            import concurry
            for make in (lambda: concurry.Executor("ray", 1), lambda: concurry.Executor("ray"),
                         lambda: concurry.task(mode="ray")(abs)(1), lambda: concurry.TaskWorker.options(mode="ray").init()):
                try: make()
                except RuntimeError as error: assert "call ray.init() first" in str(error), error
                else: raise AssertionError
        """
        self.assertEqual(run_script(code).stderr, "")

    def test_options_of_actors(self):
        import ray
        worker = self.make(Maker, num_cpus="1", resources={}, memory=50e6, actor_options={"name": "made here"})
        self.assertEqual((worker.num_cpus, worker.num_gpus, worker.memory), (1, None, 50_000_000))
        worker.pid().result(SAFETY)
        self.assertTrue(ray.get_actor("made here"))
        with self.assertRaisesRegex(ValueError, "num_gups|Invalid"):
            self.make(Maker, actor_options={"num_gups": 1})
        for name in ("max_concurrency", "concurrency_groups"):
            self.assertRaisesRegex(ValueError, f"{name}.*one call at a time", self.make, Maker, actor_options={name: 3})
        for name, value in (("num_cpus", -1), ("memory", "much"), ("resources", 3), ("actor_options", "x")):
            self.assertRaisesRegex((ValueError, TypeError), f"{name}=", Maker.options, mode="ray", **{name: value})
        for mode in MODES:
            handle = self.start(Counter, mode=mode, num_cpus=2, num_gpus=1, resources={"x": 1}, memory=1, actor_options={"x": 1})
            self.assertEqual(handle.add().result(SAFETY), 1)

    def test_a_named_actor(self):
        """The name is free again a moment after the actor has died."""
        worker = self.make(Maker, actor_options={"name": "only one"})
        with self.log_of():
            self.assertIsInstance(worker.exit().exception(SAFETY), WorkerDiedError)
            self.assertTrue(worker.pid().result(SAFETY))
        self.assertIn(worker.get_pool_stats()["restarts"], (1, 2, 3))
        self.assertRaisesRegex(ValueError, "a name is one actor's", self.make, Maker, max_workers=2, actor_options={"name": "x"})
        self.assertRaisesRegex(ValueError, "get_if_exists", self.make, Maker, actor_options={"name": "x", "get_if_exists": True})

    def test_a_done_call_holds_nothing_in_the_store(self):
        maker, other = self.make(Maker), self.make(Maker)
        made = maker.make(os.path.join(self.folder(), "loads"), 1_000_000)
        sizes = other.sizes(made)
        self.assertEqual(sizes.result(SAFETY), [1_000_000])
        held = weakref.ref(made)
        del made
        gc.collect()
        self.assertIsNone(held())
        self.assertEqual(sizes.__dict__["_claim"].dependencies, ())

    def test_what_cannot_be_placed_yet_is_waited_for(self):
        """`init` does not wait for the cluster; stop ends what was never placed."""
        worker = self.make(Maker, resources={"unobtainable": 1})
        future = worker.pid()
        self.assertFalse(future.done())
        worker.stop(0)
        self.assertTrue(future.cancelled())

    def test_coroutines_run_side_by_side(self):
        worker = self.make(Coroutines, max_queued_tasks=None)
        self.assertEqual(gather([worker.meet(300) for _ in range(300)], timeout=SAFETY), [300] * 300)
        self.assertIn("Coroutines-plain", worker.plain().result(SAFETY))

    def test_sizes(self):
        self.assertEqual(self.make(Maker).max_workers, 1)
        pool = Executor("ray")
        self.addCleanup(pool.stop)
        self.assertEqual((pool.max_workers, len(pool._pool.backends)), (CPUS, CPUS))
        on_demand = self.make(TaskWorker, on_demand=True)
        self.assertEqual(on_demand.max_workers, float("inf"))
        self.assertEqual(gather([on_demand.submit(square, n) for n in range(6)], timeout=SAFETY), [n * n for n in range(6)])
        self.assertRaisesRegex(ValueError, "max_workers=0", self.make, Maker, max_workers=0)

    # What travels

    def test_results_travel_from_worker_to_worker(self):
        """As ObjectRefs, at top level and inside containers: the driver loads none of it, and fetches nothing."""
        import ray
        path = os.path.join(self.folder(), "loads")
        maker, other = self.make(Maker), self.make(Maker)
        fetched, get = [], ray.get

        def watched(refs, **options):
            fetched.extend(refs if isinstance(refs, list) else [refs])
            return get(refs, **options)
        with unittest.mock.patch.object(ray, "get", watched):
            made = [maker.make(path, size) for size in (1_000_000, 2_000_000, 3_000_000)]
            sizes = other.sizes(made[0], inside=[made[1]])
            nested = other.sizes(inside=(made[2],))
            self.assertEqual((sizes.result(SAFETY), nested.result(SAFETY)), ([1_000_000, 2_000_000], [3_000_000]))
            large = {future._outcome[1].ref for future in made}
            self.assertEqual(len(large), 3)
            self.assertFalse(large & set(fetched))
        self.assertEqual(set(open_and_read(path).split()), {str(other.pid().result(SAFETY))})
        self.assertEqual(len(made[0].result(SAFETY).data), 1_000_000)       # now it is loaded here, once
        self.assertIs(made[0].result(), made[0].result())
        self.assertEqual(open_and_read(path).split().count(str(os.getpid())), 1)

    def test_results_that_other_modes_need(self):
        maker, path = self.make(Maker), os.path.join(self.folder(), "loads")
        for mode in MODES:
            there = self.start(Maker, mode=mode)
            self.assertEqual(there.sizes(maker.make(path, 200_000), inside=[maker.make(path, 10)]).result(SAFETY), [200_000, 10])
            self.assertIsInstance(there.sizes(maker.fail()).exception(SAFETY), KeyError)
            self.assertEqual(maker.sizes(there.make(path, 200_000)).result(SAFETY), [200_000])

    def test_a_dependency_that_does_not_load(self):
        bad = self.make(Patient).result_with(functools.partial(FailsWhenLoaded, os.getpid()))
        for mode in ("thread", "process"):
            self.assertIsInstance(self.start(Counter, mode=mode).echo(bad).exception(SAFETY), pickle.PicklingError)
        self.assertIsInstance(bad.exception(SAFETY), pickle.PicklingError)
        self.assertIsInstance(gather([bad], return_exceptions=True)[0], pickle.PicklingError)

    def test_arrays_can_be_written_to(self):
        numpy = self.need("numpy")
        worker = self.make(Counter)
        for size in (10, 1_000_000):
            array = worker.echo(numpy.arange(size)).result(SAFETY)
            array[0] = 7
            self.assertEqual(array.sum(), 7 + size * (size - 1) // 2)

    def test_object_refs(self):
        import ray
        ref, small = ray.put(b"x" * 500_000), ray.put(b"abc")
        future = wrap_future(ref)
        self.assertIsInstance(future, BaseFuture)
        self.assertEqual((len(future.result(SAFETY)), wrap_future(small).result(SAFETY)), (500_000, b"abc"))
        self.assertEqual(gather([small, 3, {"x": small}], recurse=True, timeout=SAFETY), [b"abc", 3, {"x": b"abc"}])
        self.assertEqual(gather({"a": small}), {"a": b"abc"})
        self.assertEqual([f.result() for f in as_completed([small], SAFETY)], [b"abc"])
        self.assertEqual({f.result() for f in concurry.wait([small, done_future(result=1)], SAFETY).done}, {b"abc", 1})
        for mode in ALL_MODES:
            worker = self.start(Maker, mode=mode)
            self.assertEqual(gather([worker.size_of(ref), worker.size_of(small), worker.size_of(future)], timeout=SAFETY),
                             [500_000, 3, 500_000])
            unopened = self.start(Maker, mode=mode, unwrap_futures=False)
            self.assertIsInstance(unopened.size_of(small).exception(SAFETY), TypeError)

        async def main():
            return await wrap_future(small), await async_gather([small]), len((await async_wait([small])).done)
        self.assertEqual(asyncio.run(main()), (b"abc", [b"abc"], 1))

    def test_an_object_ref_that_failed_or_is_cancelled(self):
        import ray

        @ray.remote(max_retries=0)
        def fail():
            raise KeyError("far away")

        @ray.remote
        def wait_for(flag):
            flag.wait()
        future = wrap_future(fail.remote())
        self.assertIsInstance(future.exception(SAFETY), KeyError)
        self.assertIsInstance(self.make(Counter).echo(future).exception(SAFETY), KeyError)
        go = self.flag()
        ref = wait_for.remote(go)
        waiting = wrap_future(ref)
        self.assertTrue(waiting.cancel())
        self.assertRaises(ray.exceptions.RayError, ray.get, ref, timeout=SAFETY)        # it was cancelled there, too
        self.assertRaises(concurrent.futures.CancelledError, waiting.result, SAFETY)

    def test_done_callbacks_may_wait(self):
        """They run on a thread of ours, not Ray's: that would bring nothing meanwhile."""
        import ray
        worker, results = self.make(Counter), queue.SimpleQueue()
        for future in (wrap_future(ray.put(1)), self.make(Counter).add()):
            future.add_done_callback(lambda _: results.put(ray.get(ray.put(2), timeout=SAFETY)))
            self.assertEqual(results.get(timeout=SAFETY), 2)
        self.assertEqual(worker.add().result(SAFETY), 1)

    # Deaths

    def test_killed_by_ray(self):
        """The running call fails, what was not handed over goes on with the next actor."""
        import ray
        worker = self.make(Maker, max_queued_tasks=None)
        first = worker.pid().result(SAFETY)
        started, go = self.flag(), self.flag()
        with self.log_of() as logs:
            running = worker.hold(started, go)
            started.wait()
            behind = [worker.pid() for _ in range(40)]
            ray.kill(worker._pool.backends[0].actor)
            error = running.exception(SAFETY)
            after = [future.exception(SAFETY) for future in behind]
        self.assertRegex(str(error), rf"Maker-0 \(pid {first}\) died before the end of hold\(\).*killed by `ray.kill`")
        self.assertEqual((error.pid, error.started, error.method), (first, None, "hold"))
        ahead = 16          # those that were handed over ahead are lost with it: how many, the window says
        lost = [error for error in after if error is not None]
        self.assertLess(len(lost), ahead)
        self.assertEqual({(type(error), error.started) for error in lost} - {(WorkerDiedError, None)}, set())
        self.assertEqual({error is None for error in after[ahead:]}, {True})
        self.assertNotEqual(behind[-1].result(), first)
        self.assertRegex(logs.output[0], "state is lost, a new one")
        self.assertEqual(worker.get_pool_stats()["restarts"], 1)

    def test_ray_restarts_it_itself(self):
        """`max_restarts`: its restart and ours do not fight; the object is made again."""
        before = RayBelongings.living_actors()
        worker = self.make(Maker, actor_options={"max_restarts": 1})
        with self.log_of() as logs:
            pids = [worker.pid().result(SAFETY)]
            for restarts in (1, 2):
                self.assertIsInstance(worker.exit().exception(SAFETY), WorkerDiedError)
                until(lambda: worker.get_pool_stats()["restarts"] == restarts and worker._pool.backends[0].is_built)
                pids.append(worker.pid().result(SAFETY))
        self.assertEqual(len(set(pids)), 3)
        self.assertEqual(["Ray restarts it" in line for line in logs.output], [True, False])
        until(lambda: self.actors_beside(before) == ["Maker"])

    def test_crash_retries(self):
        worker = self.make(Patient, crash_retries=2)
        path = os.path.join(self.folder(), "deaths")
        with self.log_of():
            self.assertEqual(worker.exit_until(path, 2).result(SAFETY), "survived")
            error = worker.exit_until(path, 100).exception(SAFETY)
            until(lambda: worker.get_pool_stats()["restarts"] == 5)
        self.assertEqual((type(error), len(error.deaths), len(open_and_read(path))), (WorkerDiedError, 3, 6))

    def test_a_call_that_is_placed_twice_runs_once(self):
        """A signal handler that raises while a call is placed has that done again."""
        worker, started, go = self.make(Maker, max_queued_tasks=None), self.flag(), self.flag()
        path = os.path.join(self.folder(), "log")
        worker.hold(started, go)
        started.wait()
        future = worker.note(path)
        call, backend = next(reversed(worker._pool.calls)), worker._pool.backends[0]
        self.assertIs(call.future, future)
        backend.submit(call)
        last = worker.note(path)
        go.set()
        gather([future, last], timeout=SAFETY)
        self.assertEqual(open_and_read(path), "xx")

    def test_stop_leaves_no_actor(self):
        before = RayBelongings.living_actors()
        limits = [ResourceLimit("slots", 1), RateLimit("tokens", 10, per="hour")]
        pool = self.make(Mortal, max_workers=2, limits=limits)
        busy = self.make(Maker)
        started, go = self.flag(), self.flag()
        busy.hold(started, go)
        pool.use().result(SAFETY)
        started.wait()
        busy.stop(0)
        pool.stop()
        until(lambda: not self.actors_beside(before))
        # And the limits that were the pool's alone are gone with it.
        for use in (pool.limits.acquire, pool.limits.get_stats):
            self.assertRaisesRegex(RuntimeError, "these limits have ended", use)

    def test_the_end_of_ray(self):
        """Every future fails, and what comes later; nothing hangs, and Ray is not started again."""
        code = """
            import pickle, ray, sys, threading, warnings
            warnings.simplefilter("ignore")
            import concurry
            class W(concurry.Worker):
                def one(self): return 1
                def wait(self): threading.Event().wait()
                def large(self): return bytes(1_000_000)
                def size(self, x): return len(x)
                def __init__(self): self.limits.acquire().release()
            def options(): return dict(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
            old = None
            for ends in range(2):
                ray.init(**options())
                if old:                     # of the Ray before
                    large, limits = old
                    worker = W.options(mode="ray").init()
                    assert "in Ray's store when" in str(worker.size(large).exception(20)), large
                    assert worker.one().result(20) == 1
                    worker.stop()
                    for use, kind in ((lambda: W.options(mode="ray", limits=limits).init(), RuntimeError),
                                      (lambda: concurry.Executor("ray", 1).submit(len, limits).result(20), pickle.PicklingError)):
                        try: use()
                        except kind as error: assert "make new ones" in str(error), error
                        else: raise AssertionError
                limits = concurry.LimitSet([concurry.ResourceLimit("slots", 1)])
                worker = W.options(mode="ray", max_queued_tasks=None, limits=limits).init()
                assert worker.one().result(20) == 1
                large, other = worker.large(), worker.large()
                concurry.wait([large, other])
                running, held = worker.wait(), limits.acquire()
                waiting = concurry.Executor("thread", 1).submit(limits.acquire)
                ray.shutdown()
                error = running.exception(20)
                assert isinstance(error, concurry.WorkerDiedError) and "Ray was shut down" in str(error), error
                assert isinstance(waiting.exception(20), RuntimeError)
                assert "in Ray's store when" in str(large.exception(20)), large
                later = worker.one().exception(20)
                assert later is not None and not ray.is_initialized(), later
                held.release()
                worker.stop()
                old = other, limits
            print("passed")
        """
        ended = run_script(code)
        self.assertEqual((ended.stdout, [line for line in ended.stderr.splitlines() if "state is lost" not in line]),
                         ("passed\n", []))

    # Limits

    def test_a_set_moves_with_what_is_held_and_waited_for(self):
        limits = LimitSet([ResourceLimit("slots", 2), RateLimit("tokens", 100, per="hour")])
        held, other = limits.acquire({"tokens": 10}), limits.acquire({"tokens": 5})
        other.update({"tokens": 1})
        waiting = in_thread(lambda: limits.acquire({"slots": 2}, timeout=SAFETY))
        behind = in_thread(lambda: limits.acquire({"slots": 1}, timeout=SAFETY))
        until(lambda: limits.get_stats()["slots"]["waiting"] == 2)
        pool = self.make(Mortal, limits=limits)
        self.assertEqual(in_use(limits), {"slots": 2, "tokens": 11})
        asking = pool.use()
        until(lambda: limits.get_stats()["slots"]["waiting"] == 3)
        held.update({"tokens": 2})
        held.release()
        other.release()
        self.assertFalse(behind.done() or asking.done())
        waiting.result(SAFETY).release()
        behind.result(SAFETY).release()
        asking.result(SAFETY)
        self.assertEqual(in_use(limits), {"slots": 0, "tokens": 4})
        self.assertRaises(TimeoutError, limits.acquire, {"tokens": 97}, timeout=0.01)
        with limits.acquire({"tokens": 1}) as acquired:
            self.assertWarnsRegex(UserWarning, "more was used", acquired.update, {"tokens": 2})
            del acquired            # its block gives it back all the same

    def test_parent_processes_and_actors_share_a_set(self):
        limits = LimitSet([ResourceLimit("slots", 2), CallLimit(10_000, per="hour")])
        path = os.path.join(self.folder(), "log")
        processes = self.start(Logger, path, mode="process", limits=limits, max_queued_tasks=None)
        processes.work(1).result(SAFETY)
        actors = self.make(Logger, path, limits=limits, max_workers=2, max_queued_tasks=None)
        threads = self.start(Logger, path, mode="thread", limits=limits, max_workers=2)
        futures = [pool.work(20) for pool in (processes, actors, actors, threads) for _ in range(2)]

        async def beside():
            for _ in range(20):
                async with limits.async_acquire():
                    log_inside(path)
        asyncio.run(beside())
        gather(futures, timeout=SAFETY)
        self.assertEqual((inside_at_most(path), os.path.getsize(path)), (2, 2 * (1 + 8 * 20 + 20)))
        self.assertEqual(in_use(limits), {"slots": 0, "call_count": 181})

    def test_workers_of_a_dead_worker_give_back(self):
        limits = slots_and_tokens(1)
        for mode in ("ray", "process", "thread"):
            outer = self.make(Outer, limits=limits)
            inner = outer.start(mode).result(SAFETY)
            self.assertEqual(outer.use(3).result(SAFETY)["slots"]["in_use"], 0)
            started, go = self.flag(), self.flag()
            outer.hold(started, go).result(SAFETY)
            started.wait()
            self.assertEqual(in_use(limits)["slots"], 1)
            pid = outer.pid().result(SAFETY)
            with self.log_of():
                os.kill(pid, 9)
                with limits.acquire({"slots": 1}, timeout=SAFETY):
                    pass
                until(lambda: outer.get_pool_stats()["restarts"] == 1)
            if mode != "thread":
                self.assertEqual([until_gone(pid) for pid in inner], [True, True])
            outer.stop()

    def test_a_set_that_is_an_argument_or_a_result(self):
        limits = LimitSet(api_limits())
        api = self.make(Api)
        self.assertEqual(api.keep(limits).result(SAFETY)["slots"]["in_use"], 1)
        self.assertIs(self.make(Api, limits=limits).own().result(SAFETY), limits)
        self.assertEqual(in_use(limits)["slots"], 0)
        pool = self.make(TaskWorker)
        self.assertEqual(pool.submit(lambda: in_use(limits)["slots"]).result(SAFETY), 0)
        made_there = pool.submit(lambda: LimitSet([ResourceLimit("slots", 3)])).result(SAFETY)      # by a worker
        with made_there.acquire({"slots": 2}):
            self.assertEqual(in_use(made_there), {"slots": 2})
        self.assertEqual(list(pool.map(lambda x: (x, in_use(limits)["slots"]), range(2))), [(0, 0), (1, 0)])

    def test_the_keeper_dies(self):
        """Whoever waits is told, and whoever comes; other sets are kept by another one."""
        import ray
        limits = LimitSet([ResourceLimit("slots", 1)])
        pool = self.make(Mortal, limits=limits)
        pool.pid().result(SAFETY)
        held = limits.acquire()
        waiting, asking = in_thread(limits.acquire), pool.wait_for_limits()
        until(lambda: limits.get_stats()["slots"]["waiting"] == 2)
        ray.kill(limits._home.way.actor)
        self.assertRegex(str(waiting.exception(SAFETY)), "actor that ke.*killed by `ray.kill`|has died")
        self.assertIsInstance(asking.exception(SAFETY), RuntimeError)
        self.assertRaisesRegex(RuntimeError, "has died", limits.get_stats)
        held.release()
        others = LimitSet([ResourceLimit("slots", 1)])
        self.make(Mortal, limits=others).wait_for_limits().result(SAFETY)

    def test_limits_out_of_reach(self):
        """A process worker cannot pass its parent's set on to Ray: the parent has to."""
        def inner(limits):
            import ray
            ray.init(address, logging_level="ERROR", log_to_driver=False)
            try:
                concurry.Executor("ray", 1, limits=limits)
            finally:
                ray.shutdown()
        import ray
        address = ray.get_runtime_context().gcs_address
        error = self.start(TaskWorker, mode="process").submit(inner, LimitSet([ResourceLimit("x", 1)])).exception(SAFETY)
        self.assertIsInstance(error, pickle.PicklingError)
        self.assertIn("a Ray worker can be given those", str(error))

    # Models

    def test_models_are_refused(self):
        pydantic, morphic = self.need("pydantic"), self.need("morphic")

        class Model(Worker, pydantic.BaseModel):
            n: int = 1

        class Typed(morphic.Typed, Worker):
            n: int = 1
        for cls in (Model, Typed):
            with self.assertRaisesRegex(ValueError, f"^Cannot create Ray worker with Pydantic-based class {cls.__name__}"):
                cls.options(mode="ray").init()
            with self.assertWarnsRegex(UserWarning, "in mode 'ray' this class would not do") as caught:
                self.start(cls, mode="sync")
            self.assertEqual(caught.filename, __file__)
            with warnings.catch_warnings():
                warnings.simplefilter("error")      # once only
                self.start(cls, mode="thread")

    # By value

    def test_where_this_module_cannot_be_imported(self):
        """Vendored under another name in a folder that is not on the workers' path, used from a script's own classes."""
        folder = self.folder()
        os.makedirs(os.path.join(folder, "lib", "pkg", "_vendor"))
        for path in ("pkg/__init__.py", "pkg/_vendor/__init__.py"):
            open(os.path.join(folder, "lib", path), "w").close()
        shutil.copy(concurry.__file__, os.path.join(folder, "lib", "pkg", "_vendor", "x.py"))
        code = Cluster.joining + textwrap.dedent("""
            import os, sys
            sys.path.insert(0, sys.argv[1])
            from pkg._vendor import x
            sys.path.pop(0)
            class W(x.Worker):
                def __init__(self, n): self.n = n
                def add(self, k): return self.n + k
                def use(self):
                    with self.limits.acquire(): return type(self.limits).__module__
                def importable(self):
                    from importlib.machinery import PathFinder
                    return [name for name in ("pkg", "concurry") if PathFinder.find_spec(name)]
            worker = W.options(mode="ray", limits=[x.ResourceLimit("slots", 1)]).init(5)
            print(worker.add(1).result(), worker.use().result(), worker.importable().result())
            print(x.Executor("ray", 1).submit(lambda a: a + 1, 1).result())
        """)
        with open(os.path.join(folder, "script.py"), "w") as file:
            file.write(code)
        ended = subprocess.run([sys.executable, "script.py", os.path.join(folder, "lib")], cwd=folder, text=True, timeout=SAFETY,
                               capture_output=True, env={**os.environ, "PYTHONPATH": ""})
        self.assertEqual(ended.stderr, "")
        self.assertEqual(ended.stdout, "6 pkg._vendor.x []\n2\n")


    def test_the_command_line(self):
        import ray
        ended = subprocess.run([sys.executable, SOURCE, "map", "-e", "len(x)", "--mode", "ray", "--max-workers", "1"],
                               input="a\nbcd\n", capture_output=True, text=True, timeout=SAFETY,
                               env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address})
        self.assertEqual((ended.stdout, ended.stderr, ended.returncode), ("1\n3\n", "", 0))

    def test_a_task_starts_nothing_before_its_first_call(self):
        """Nor does it look for Ray: a module may be imported before `ray.init()`."""
        for on_demand in (True, False):
            fn = task(mode="ray", on_demand=on_demand)(square)
            self.addCleanup(fn.stop)
            self.assertIsNone(fn._made)
            self.assertEqual((fn(3).result(SAFETY), list(fn.map(range(3)))), (9, [0, 1, 4]))
            self.assertEqual(fn.max_workers, float("inf") if on_demand else CPUS)

    def test_workers_in_calls_and_stop_in_a_call(self):
        """A Ray worker makes, uses and ends workers of its own, of Ray too."""
        def inner():
            sums = []
            for mode in ("ray", "thread", "process", "asyncio"):
                with TaskWorker.options(mode=mode).init() as pool:
                    sums.append(sum(pool.map(square, range(4))))
            return sums
        self.assertEqual(self.make(TaskWorker).submit(inner).result(2 * SAFETY), [14] * 4)
        thread = self.start(TaskWorker, mode="thread", max_workers=1)
        pool = self.make(TaskWorker)
        self.assertIsNone(thread.submit(lambda: pool.stop()).result(SAFETY))
        self.assertRaises(RuntimeError, pool.submit, square, 1)

    def test_the_first_call_does_not_load(self):
        """It takes no time: how quick the worker is is not known then."""
        worker = self.make(Counter)
        self.assertIsInstance(worker.echo(FailsWhenLoaded()).exception(SAFETY), pickle.PicklingError)
        self.assertEqual(worker.add().result(SAFETY), 1)

    def test_the_thread_of_a_worker_fails(self):
        worker, go, started = self.make(Maker), self.flag(), self.flag()
        worker.pid().result(SAFETY)
        with self.log_of(level="ERROR"):
            worker._pool.backends[0].post(lambda: 1 / 0)
            self.assertIsInstance(worker.hold(started, go).exception(SAFETY), ZeroDivisionError)
        self.assertIsInstance(worker.pid().exception(SAFETY), ZeroDivisionError)

    def test_the_reader_fails(self):
        """FAULTS 31: the thread that hears Ray, too."""
        worker, go, started = self.make(Maker), self.flag(), self.flag()
        running = worker.hold(started, go)
        started.wait()
        with self.log_of(level="ERROR"):
            reader = concurry._readers[os.getpid()]
            reader.selector.select = lambda timeout: 1 / 0
            reader.post(int)
            self.assertIsInstance(running.exception(SAFETY), ZeroDivisionError)
            self.assertIsInstance(worker.pid().exception(SAFETY), ZeroDivisionError)
        self.assertTrue(self.make(Maker).pid().result(SAFETY))


class WithoutRayTests(CleanTestCase):
    def test_task_does_not_look_for_ray_before_its_first_call(self):
        with unittest.mock.patch.dict(sys.modules, ray=None):
            for on_demand in (True, False):
                self.assertRaisesRegex(ImportError, "pip install ray", task(mode="ray", on_demand=on_demand)(square), 1)

    def test_the_package_is_missing(self):
        with unittest.mock.patch.dict(sys.modules, ray=None):
            for make in (lambda: Executor("ray", 1), lambda: Counter.options(mode="ray").init(), lambda: Executor("ray")):
                self.assertRaisesRegex(ImportError, "pip install ray", make)

    def test_names_and_defaults(self):
        self.assertIs(ExecutionMode("Ray"), ExecutionMode.Ray)
        self.assertEqual(global_config.get_defaults("ray")["max_queued_tasks"], 2)
        self.assertEqual(global_config.get_defaults("ray")["max_workers"], 0)


# === Found by fresh eyes ===

class SignalTests(CleanTestCase):
    """What a signal handler raises, at whatever moment of a submission, loses no call and no place."""

    SCRIPT = """
        import collections, concurry, os, random, signal, sys
        class Boom(KeyboardInterrupt): pass
        def ring(number, frame):
            global armed
            if armed:
                armed = False           # once: another one while this one is caught would be nobody's
                raise Boom
        signal.signal(signal.SIGALRM, ring)
        armed, futures, hits = False, {}, 0
        path = sys.argv[1]
        def note(n, path=path):
            descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.write(descriptor, b"%d\\n" % n)
            os.close(descriptor)
            return n
        pool = concurry.Executor(sys.argv[2], 2, on_demand=sys.argv[3] == "True")
        import logging
        logging.disable(logging.WARNING)
        random.seed(5)
        pool.submit(note, -1).result()          # what is imported at the first call is there
        for n in range(400):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 4e-4))
                for n in (3 * n, 3 * n + 1, 3 * n + 2):
                    futures[n] = pool.submit(note, n)
                armed = False
            except Boom:
                hits += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        concurry.wait(futures.values())
        wrong = [n for n, f in futures.items() if f.exception() is None and f.result() != n]
        pool.shutdown()
        lines = collections.Counter(open(path).read().split())
        print(hits > 0, wrong, [n for n, count in lines.items() if count > 1], len(pool._pool.calls))
    """

    def test_an_exception_in_the_middle_of_a_submission(self):
        with tempfile.TemporaryDirectory() as folder:
            for mode, on_demand in (("thread", False), ("thread", True), ("process", False)):
                with self.subTest(mode=mode, on_demand=on_demand):
                    log = os.path.join(folder, f"{mode}{on_demand}")
                    ended = run_script(self.SCRIPT, log, mode, str(on_demand))
                    self.assertEqual(ended.stdout, "True [] [] 0\n")

    def test_what_others_have_left_to_a_thread_that_is_interrupted(self):
        """It had given up its turn, and was about to look whether somebody came meanwhile."""
        class Boom(Exception):
            pass

        class Turn(dict):
            def __delitem__(self, key):
                super().__delitem__(key)
                if self.meanwhile and threading.current_thread() is threading.main_thread():
                    meanwhile, self.meanwhile = self.meanwhile, None
                    self["is"] = "mine"             # as it was until now
                    meanwhile()
                    super().__delitem__(key)
                    raise Boom

        for mode in ("thread", "process"):
            with self.subTest(mode):
                pool, others = self.start(TaskWorker, mode=mode, max_queued_tasks=None), []

                def meanwhile():
                    others.append(in_thread(pool.submit, square, 3))
                    until(lambda: pool._pool.backlog)               # it has left its call
                    until(lambda: len(pool._pool.calls) == 1)       # the interrupted one's is done
                pool._pool.turn = Turn()
                pool._pool.turn.meanwhile = meanwhile
                self.assertRaises(Boom, pool.submit, square, 2)
                self.assertEqual(others[0].result(SAFETY).result(SAFETY), 9)

    def test_a_handler_that_calls_the_task_that_is_being_started(self):
        run_script("""
            import concurry, os, signal
            def f(x): return x
            task = concurry.task(mode="process", on_demand=False, max_workers=1)(f)
            inner = []
            signal.signal(signal.SIGUSR1, lambda *_: inner.append(task(2)))
            launch = concurry._launch
            def launch_and_ring(*args):
                if not inner:
                    os.kill(os.getpid(), signal.SIGUSR1)
                return launch(*args)
            concurry._launch = launch_and_ring
            assert task(1).result() == 1
            assert [future.result() for future in inner] == [2], inner
            task.stop()
        """)

    def test_ctrl_c_while_with_waits_at_its_end(self):
        for mode in ("thread", "process"):
            with self.subTest(mode):
                ended = run_script("""
                    import concurry, os, signal, sys, threading
                    def never(): threading.Event().wait()
                    try:
                        with concurry.Executor(sys.argv[1], 1) as pool:
                            future = pool.submit(never)
                            waiting = pool._pool.until_ended
                            def until_ended():
                                os.kill(os.getpid(), signal.SIGINT)
                                yield from waiting()
                            pool._pool.until_ended = until_ended
                    except KeyboardInterrupt:
                        print(future.done())
                """, mode)
                self.assertEqual(ended.stdout, "True\n")

    def test_ctrl_c_in_the_middle_of_stop(self):
        ended = run_script("""
            import concurry, os, signal, threading
            def never(): threading.Event().wait()
            pool = concurry.Executor("process", 1)
            future = pool.submit(never)
            assert future.running()
            wait = concurry._Pool._wait_until_deadline
            def wait_and_ring(*args):
                concurry._Pool._wait_until_deadline = wait
                os.kill(os.getpid(), signal.SIGINT)
                return wait(*args)
            concurry._Pool._wait_until_deadline = wait_and_ring
            try:
                pool.stop(30)
            except KeyboardInterrupt:
                print(type(future.exception()).__name__, pool._pool.backends[0].ended.exception())
        """)
        self.assertEqual(ended.stdout, "WorkerDiedError None\n")


class ChainTests:
    def test_a_long_chain_of_failures(self):
        held, go = self.flag(), self.flag()
        pool = self.make(TaskWorker, **({} if self.mode in ("sync", "asyncio") else {"max_queued_tasks": None}))

        def fail():
            held.set()
            go.wait()
            raise KeyError("the first")

        if self.mode == "sync":             # where each call waits for the one before
            head = done_future(error=KeyError("the first"))
        else:
            head = pool.submit(fail)
            held.wait()
        chain = [head]
        for _ in range(2000):
            chain.append(pool.submit(len, chain[-1]))
        go.set()
        self.assertEqual(concurry.wait(chain, SAFETY).not_done, set())
        self.assertEqual({type(future.exception(0)) for future in chain}, {KeyError})

    def test_a_dependency_that_cannot_be_waited_for(self):
        loop = asyncio.new_event_loop()
        never = loop.create_future()
        loop.close()
        pool = self.make(TaskWorker)
        self.assertRaises(RuntimeError, pool.submit, abs, never)
        self.assertEqual(len(pool._pool.calls), 0)
        pool.shutdown()


over_modes(globals(), [ChainTests])


class RaceTests(CleanTestCase):
    def test_a_task_cancelled_before_it_begins(self):
        async def cancel_all():
            me = asyncio.current_task()
            loop = asyncio.get_running_loop()
            later = [pool.submit(asyncio.sleep, 0) for _ in range(3)]
            await asyncio.sleep(0)          # the loop makes their tasks now, and they begin in the next round
            for task in asyncio.all_tasks(loop) - {me}:
                task.cancel()
            return later
        pool = self.start(TaskWorker, mode="asyncio")
        later = pool.submit(cancel_all).result(SAFETY)
        self.assertEqual(concurry.wait(later, SAFETY).not_done, set())

    def test_a_submitter_whose_call_is_cancelled_as_it_lies_down(self):
        pool = self.start(TaskWorker, mode="thread", max_queued_tasks=1)
        started, go = threading.Event(), threading.Event()
        self.addCleanup(go.set)
        pool.submit(lambda: (started.set(), go.wait(SAFETY)))
        started.wait(SAFETY)
        inner, held_lock = pool._pool, concurry._held_lock

        def cancelled_here():               # as another thread would, after it has looked for a gate
            call = next(reversed(inner.calls))
            lock = held_lock()
            future = call.future
            future.__dict__.pop("_call")
            inner.leave(call, concurry._CANCELLED)
            return lock
        with unittest.mock.patch.object(concurry, "_held_lock", cancelled_here):
            future = pool.submit(abs, -1)
        self.assertIs(future.done(), False)         # it came back: that is what counts
        go.set()

    def test_callbacks_are_taken_back_from_foreign_futures(self):
        foreign = concurrent.futures.Future()
        pool = self.start(TaskWorker, mode="thread")
        for _ in range(10):
            concurry.wait([foreign], timeout=0)
            self.assertRaises(TimeoutError, gather, [foreign], timeout=0)
            pool.submit(abs, foreign).cancel()
        self.assertEqual(foreign._done_callbacks, [])

    def test_answers_to_no_call_end_that_worker_only(self):
        def answer_often():
            import gc
            import pickle
            import socket
            import sys
            message = sys.modules["concurry"]._message
            for each in gc.get_objects():
                if type(each) is socket.socket and each.fileno() >= 0:
                    try:
                        each.sendall(b"".join(message(8, (pickle.dumps(1), []))) * 9)
                    except OSError:
                        pass
        with self.log_of(level="ERROR") as logs:
            bad = self.start(TaskWorker, mode="process")
            good = self.start(TaskWorker, mode="process")
            bad.submit(answer_often).exception(SAFETY)
            bad.submit(abs, -2).exception(SAFETY)           # it may have got one of those answers
            self.assertEqual(good.submit(abs, -3).result(SAFETY), 3)
            bad.stop()
        self.assertIn("sent an invalid message", logs.output[0])

    def test_fork_in_a_callback_on_the_reader(self):
        ended = run_script("""
            import concurry, os, threading, warnings
            warnings.simplefilter("ignore")
            over = threading.Event()
            reader, writer = os.pipe()
            def fork(future):
                pid = os.fork()
                if not pid:
                    try:
                        with concurry.Executor("process", 1) as pool:
                            os.write(writer, b"%d" % pool.submit(abs, -6).result())
                    finally:
                        os._exit(0)
                os.waitpid(pid, 0)
                over.set()
            with concurry.Executor("process", 1) as pool:
                gate = pool.submit(abs, 1)
                gate.add_done_callback(fork)
                over.wait()
                os.close(writer)
                print(os.read(reader, 10))
        """)
        self.assertEqual(ended.stdout, "b'6'\n")


class Disturbed:
    """A collection that is changed in the middle of each of the first few iterations."""

    left = 3

    def __iter__(self):
        elements = super().__iter__()
        yield from itertools.islice(elements, 2)
        if self.left:
            self.left -= 1
            self.change()
        yield from elements


class DisturbedQueue(Disturbed, collections.deque):
    def change(self):
        self.popleft()
        self.append("new")


class DisturbedSet(Disturbed, weakref.WeakSet):
    def change(self):
        self.kept = [Counter() for _ in range(100)]
        self.update(self.kept)


class SharedContainerTests(CleanTestCase):
    def test_a_queue_that_is_changed_while_it_is_read(self):
        changed = DisturbedQueue(range(6))
        self.assertRaisesRegex(RuntimeError, "mutated", list, changed)
        self.assertEqual(concurry._first_of(changed, 4), [3, 4, 5, "new"])
        self.assertEqual(concurry._first_of(collections.deque(range(6)), 4), [0, 1, 2, 3])

    def test_a_weak_set_that_is_changed_while_it_is_read(self):
        elements = [Counter() for _ in range(4)]
        changed = DisturbedSet(elements)
        self.assertRaisesRegex(RuntimeError, "changed size", list, changed)
        found = concurry._all_of(changed)
        self.assertEqual((type(found), set(elements) - set(found), len(found)), (list, set(), len(changed)))


def decoder_round(choose, number, damage):
    """Send messages to the parent's decoder, in pieces, perhaps damaged, and see what comes out.

    `choose(options)` and `number(most)` choose. Undamaged ones come out as they went in. Of others, those before the
    damage do; then there is an error of a kind that ends the worker, or something of the size that the bytes had.
    """
    sent, stream = [], b""
    for _ in range(number(6)):
        data, buffers = bytes(number(choose([5, 300, 70_000]))), []
        for _ in range(number(3)):
            buffer = bytes([number(255)]) * number(choose([5, 70_000, 200_000]))
            buffers.append(buffer if choose([False, True]) else bytearray(buffer))
        kind, took = choose(range(concurry._BUILT, concurry._NOT_LOADED + 1)), number(10 ** 6)
        sent.append((kind, took, data, buffers))
        stream += b"".join(concurry._message(kind, (data, list(map(memoryview, buffers))), took))
    first = len(stream)
    if damage == "cut":
        first = number(len(stream))
        stream = stream[:first]
    elif damage == "changed" and stream:
        first, changed = number(len(stream) - 1), bytearray(stream)
        for at in range(first, min(len(stream), first + 1 + number(8))):
            changed[at] = number(255)
        stream = bytes(changed)
    elif damage == "garbage":
        stream += bytes(number(255) for _ in range(number(40)))
    here, there = socket.socketpair()
    inbox, received, whole = concurry._Inbox(here, range(concurry._BUILT, concurry._NOT_LOADED + 1)), [], 0
    with here, there:
        here.setblocking(False)
        try:
            while stream and not inbox.is_at_end:
                size = choose([1, 16, 17, 1000, 60_000])
                there.send(stream[:size])
                stream = stream[size:]
                received += inbox.receive()
            there.shutdown(socket.SHUT_WR)
            received += inbox.receive()
            assert inbox.is_at_end
        except (ValueError, MemoryError, OverflowError):
            assert damage in ("changed", "garbage")
    for message in sent:            # those that were whole before the damage
        whole += len(b"".join(concurry._message(message[0], (message[2], list(map(memoryview, message[3]))))))
        if whole > first:
            break
        assert received and received.pop(0) == message, [message[:2], len(message[2]), list(map(len, message[3]))]
    assert damage != "" or not received


class DecoderTests(CleanTestCase):
    """What workers send, as it arrives: in pieces, cut off, damaged, made up (`.ci/fuzz.py` goes on with this)."""

    def test_messages_that_are_damaged_or_not(self):
        concurry._load_wire()
        for seed in range(300):
            chance = random.Random(seed)
            with self.subTest(seed=seed):
                decoder_round(chance.choice, lambda most, chance=chance: chance.randint(0, most),
                              ["", "cut", "changed", "garbage"][seed % 4])

    def test_each_message_is_taken_once_though_one_raises(self):
        concurry._load_wire()
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            inbox, taken = concurry._Inbox(here, [concurry._RETURNED]), []
            for n in range(6):
                there.sendall(b"".join(concurry._message(concurry._RETURNED, (b"%d" % n, []))))
            there.shutdown(socket.SHUT_WR)
            for stop in (2, 9):
                for message in inbox.receive():
                    taken.append(bytes(message[2]))
                    if len(taken) == stop:
                        break
            self.assertEqual(taken, [b"%d" % n for n in range(6)])

    def test_memory_is_not_taken_for_what_is_only_announced(self):
        concurry._load_wire()
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            inbox = concurry._Inbox(here, [concurry._RETURNED])
            there.send(concurry._HEADER.pack(concurry._RETURNED, 0, 0, concurry._MOST) + b"x")
            self.assertEqual(list(inbox.receive()), [])
            there.send(b"y")
            self.assertEqual((list(inbox.receive()), len(inbox._bytes)), ([], concurry._TRUSTED))


class FastWayTests(CleanTestCase):
    """What is quick for the most comes to the same as what it is a short cut of."""

    VALUES = (0, -1, 10 ** 40, True, None, 0.5, math.nan, -0.0, math.inf, "", "a" * 100_000, "\ud800", "\0")

    def test_plain_arguments_and_results(self):
        pool = self.start(TaskWorker, mode="process")
        for value in self.VALUES:
            self.assertIn(type(value), concurry._PLAINEST)
            plainly, generally = concurry._dumps_plain(value), concurry._dumps(value)
            self.assertEqual(*(repr(concurry._loads(*each)) for each in (plainly, generally)))
            there = pool.submit(repr, value), pool.submit(lambda x: repr(*x), [value])
            self.assertEqual([future.result(SAFETY) for future in there], [repr(value)] * 2)
            back = pool.submit(returned, value), pool.submit(lambda x: [x], value)
            self.assertEqual(repr([back[0].result(SAFETY)]), repr(back[1].result(SAFETY)))

    def test_functions_that_are_imported(self):
        """They go to each worker once; those that change, or are found nowhere, each time."""
        outcomes = []
        for most in (concurry._MOST_KNOWN, 0):
            with unittest.mock.patch.object(concurry, "_MOST_KNOWN", most):
                pool = self.start(TaskWorker, mode="process", max_workers=2, max_queued_tasks=None)
                calls = [(abs, -3), (square, 3), (returned, "x"), (os.path.join, "a", "b"), ([5].count, 5), (int, "7"),
                         (divmod, 1, 0), (lambda x: x + 1, 3), (functools.partial(add, 1), 2), (square, "x"), (square,)] * 4
                futures = [pool.submit(*call) for call in calls]
                errors = [future.exception(SAFETY) for future in futures]
                outcomes.append([future.result() if error is None else (type(error), str(error))
                                 for future, error in zip(futures, errors)])
                self.assertEqual(len(pool._pool.known), 5 if most else 0)
                links = [backend.link for backend in pool._pool.backends]
                self.assertEqual([len(link.known) for link in links], [5, 5] if most else [0, 0])
                self.assertEqual("in square" in "".join(map(str, errors[9].__cause__.args)), True)
        self.assertEqual(*outcomes)

    def test_a_function_that_its_module_no_longer_has(self):
        for method in START_METHODS:
            pool = self.start(TaskWorker, mode="process", mp_context=method)
            fn = returned
            self.assertEqual(pool.submit(fn, 1).result(SAFETY), 1)
            with unittest.mock.patch(f"{__name__}.returned", square):
                with self.log_of():
                    pool.submit(os._exit, 3).exception(SAFETY)
                self.assertEqual([pool.submit(each, 3).result(SAFETY) for each in (fn, square)], [3, 9])
            self.assertEqual(pool.submit(fn, 1).result(SAFETY), 1)

    def test_a_function_that_cannot_be_looked_for(self):
        class Strange(types.ModuleType):
            def __getattr__(self, name):
                raise KeyError(name)
        with unittest.mock.patch.dict(sys.modules, {"strange": Strange("strange")}):
            sys.modules["strange"].__spec__ = importlib.util.spec_from_loader("strange", None)
            fn = types.FunctionType(returned.__code__, {}, "sought")
            fn.__module__ = "strange"
            pool = self.start(TaskWorker, mode="process")
            self.assertIsNotNone(pool.submit(fn, 1).exception(SAFETY))
            self.assertEqual(pool.submit(returned, 1).result(SAFETY), 1)

    def test_a_recipe_larger_than_the_socket(self):
        """It goes in pieces, at the start and at a restart."""
        for method in START_METHODS:
            worker = self.start(Large, mode="process", mp_context=method, init={"data": bytes(5_000_000), "text": "x" * 5_000_000})
            self.assertEqual(worker.sizes().result(SAFETY), [5_000_000] * 2)
            with self.log_of():
                worker.exit().exception(SAFETY)
                self.assertEqual(worker.sizes().result(SAFETY), [5_000_000] * 2)

    def test_a_function_that_cannot_be_imported_there(self):
        for most in (concurry._MOST_KNOWN, 0):
            with unittest.mock.patch.object(concurry, "_MOST_KNOWN", most), \
                    unittest.mock.patch.dict(sys.modules, {"only_here": types.ModuleType("only_here")}):
                only_here = sys.modules["only_here"]
                only_here.__spec__ = importlib.util.spec_from_loader("only_here", None)
                exec("def f(x): return x", vars(only_here))
                pool = self.start(TaskWorker, mode="process")
                for _ in range(2):
                    error = pool.submit(only_here.f, 1).exception(SAFETY)
                    self.assertEqual((type(error), type(error.__cause__)), (pickle.PicklingError, ModuleNotFoundError))
                self.assertEqual(pool.submit(square, 2).result(SAFETY), 4)

    def test_chunks(self):
        """With retries each item has a loop of its own."""
        items, expected = [1, 2, "x", 3, None, 4, 5], [1, 4, TypeError, 9, TypeError, 16, 25]
        for mode, retries in itertools.product(("thread", "process"), (0, 1)):
            pool = self.start(TaskWorker, mode=mode, num_retries=retries, retry_wait=0)
            for chunksize in (2, 3, 7):
                chunk = [items[n:n + chunksize] for n in range(0, 7, chunksize)]
                futures = [pool._pool.submit("_chunk", (square, (tuple(part),)), {}) for part in chunk]
                found = []
                for future in futures:
                    outcomes = future.result(SAFETY)
                    found += [type(outcomes.errors.get(n, value)) if n in outcomes.errors else value
                              for n, value in enumerate(outcomes.values)]
                self.assertEqual(found, expected, (mode, retries, chunksize))


def returned(x):
    return x


class Large(Worker):
    def __init__(self, data, text):
        self.data, self.text = data, text

    def sizes(self):
        return [len(self.data), len(self.text)]

    def exit(self):
        os._exit(1)


class MessageTests(CleanTestCase):
    def test_misuse_is_told(self):
        future = concurry.BaseFuture()
        pool = self.start(TaskWorker, mode="sync")
        for wrong, error, text in (
                (lambda: concurry.wait(future), TypeError, "a collection of futures is needed"),
                (lambda: as_completed(future), TypeError, "a collection of futures is needed"),
                (lambda: concurry.wait([future], timeout="x"), TypeError, "timeout must be a number of seconds"),
                (lambda: future.result("x"), TypeError, "timeout must be a number of seconds"),
                (lambda: pool.sbmit, AttributeError, "did you mean 'submit'"),
                (lambda: concurry.task(mode="thread")(3), TypeError, "@task needs a function, not 3"),
                (lambda: concurry.worker(mode="x"), ValueError, "choose one of 'sync'"),
                (lambda: setattr(concurry.global_config, "thraed", 1), TypeError, "'thraed' cannot be set"),
                (lambda: delattr(pool, "_pool"), AttributeError, "cannot be deleted")):
            with self.subTest(text):
                self.assertRaisesRegex(error, text, wrong)

    def test_what_to_do_is_told(self):
        worker, builder = self.start(Counter, mode="sync"), Counter.options(mode="sync")
        for wrong, error, text in (
                *((lambda name=name: getattr(builder, name), AttributeError,
                   rf"^options\(\) has no attribute '{name}', .* call \.init\(\.\.\.\)") for name in ("add", "stop", "submit")),
                *((lambda name=name: getattr(worker, name), AttributeError,
                   f"^Counter has no method '{name}', which is for functions .*: call the methods of Counter") for name in ("submit", "map")),
                (lambda: RateLimit("tokens", 1, per="min"), ValueError, "^unknown window 'min': .* did you mean 'minute'\\?$"),
                (lambda: RateLimit("tokens", 1, window="hr"), ValueError, "^unknown window 'hr': .*or give a number of seconds, did you mean 'hour'\\?$"),
                (lambda: CallLimit(1, "fortnight"), ValueError, "^unknown window 'fortnight': .*, or give a number of seconds$")):
            with self.subTest(text):
                self.assertRaisesRegex(error, text, wrong)
        self.assertEqual((hasattr(builder, "add"), hasattr(worker, "submit")), (False, False))


# === The file itself ===

SOURCE = os.path.join(FOLDER, "concurry.py")


class VendoringTests(ProgramCase):
    """1.1: a copy of the file is a complete installation, whatever it is called and wherever it is. Row 35."""

    def test_in_a_zip_and_beside_modules_with_names_of_the_library(self):
        folder = self.folder()
        with zipfile.ZipFile(os.path.join(folder, "all.zip"), "w") as archive:
            archive.write(SOURCE, "zipped.py")
        self.write(folder, logging="raise SystemExit('shadow')", socket="raise SystemExit('shadow')")
        self.check_program('''
            import logging, socket, concurrent.futures
            sys.path.insert(0, sys.argv[1] + "/all.zip")
            import zipped
            os.chdir(sys.argv[1])
            for method in sys.argv[2:]:
                with zipped.Executor("process", 1, mp_context=method) as pool:
                    print(pool.submit(lambda: zipped.__name__).result())
        ''', "zipped\n" * len(START_METHODS), folder, *START_METHODS)

    def test_run_as_a_script_whose_modules_import_it(self):
        """Row 35: the classes are the same here, in the modules that import it, and in the workers."""
        folder = self.folder()
        self.write(folder, mine='''
            import concurry, os
            class Error(concurry.WorkerDiedError): pass
            pool = None
            def use(x):
                global pool
                if pool is None: pool = concurry.Executor("process", 1)
                if x == "bad": raise Error("from " + __name__)
                future = pool.submit(str.upper, x)
                return future.result(), isinstance(future, concurry.BaseFuture), "__main__" in concurry.__name__
        ''')
        for command in ([SOURCE], ["-m", "concurry"]):
            ended = subprocess.run([sys.executable, *command, "map", "mine:use", "--max-workers=1"], input="a\nb\nbad\n",
                                   cwd=folder, env={**os.environ, "PYTHONPATH": FOLDER}, capture_output=True, text=True, timeout=SAFETY)
            self.assertEqual((ended.stdout, ended.stderr, ended.returncode),
                             ("('A', True, False)\n('B', True, False)\n", "concurry: line 3: Error: from mine\n", 1))


class RunByItsPathTests(CleanTestCase):
    """`runpy.run_path`: its module has no spec, and is in `sys.modules` no more when it is used."""

    def setUp(self):
        self.names = types.SimpleNamespace(**runpy.run_path(SOURCE))

    def test_functions_and_failures(self):
        for mode in ("sync", "thread", "asyncio"):
            with self.assertLogs(self.names.logger, "WARNING") as logs:
                pool = self.names.TaskWorker.options(mode=mode).init()
                self.addCleanup(pool.stop)
                pool.submit(raise_key_error, "forgotten")
                self.assertEqual((pool.submit(square, 3).result(SAFETY), list(pool.map(square, range(3)))), (9, [0, 1, 4]))
                gc.collect()
                pool.shutdown()
            self.assertEqual([record.getMessage() for record in logs.records], [
                "TaskWorker: at least 1 calls failed, and nobody asked for their results; the first error: KeyError: 'forgotten'"])

    def test_its_code_for_ray(self):
        code = []
        with unittest.mock.patch.dict(self.names._own_module.__globals__, _ray=lambda: types.SimpleNamespace(put=code.append)):
            name, path, _ = self.names._own_module()
        self.assertEqual(path, SOURCE)
        namespace = {"__name__": name, "__file__": path}
        exec(marshal.loads(code[0]), namespace)
        self.assertEqual(namespace["__version__"], concurry.__version__)


class ImportTests(ProgramCase):
    def test_import_is_cheap(self):
        """1.4"""
        self.check_program('''
            heavy = {"asyncio", "multiprocessing", "sqlite3", "inspect", "subprocess", "pickle", "socket", "selectors",
                     "typing", "dataclasses", "tempfile", "signal", "traceback", "ray"}
            import concurry
            print(sorted(heavy & set(sys.modules)))
            class W(concurry.Worker):
                def f(self): return 1
            with W.options(mode="thread", max_workers=2).init() as w, W.options(mode="sync").init() as s:
                w.f().result(), s.f().result()
            print(sorted({"asyncio", "multiprocessing", "sqlite3", "subprocess", "ray"} & set(sys.modules)))
            for method in ("fork", "forkserver"):
                with W.options(mode="process", mp_context=method).init() as w: w.f().result()
                print(sorted({"asyncio", "sqlite3", "ray"} & set(sys.modules)))
        '''.replace("import concurry", 'import concurrent.futures.thread; heavy -= set(sys.modules)\n            import concurry'),
            "[]\n" * 4, flags=["-I", "-S"])

    def test_foreign_packages_are_never_imported(self):
        """1.3: recognised when the user has imported them, but not imported."""
        folder = self.folder()
        names = "pydantic morphic attr attrs numpy IPython ray tqdm cloudpickle psutil".split()
        self.write(folder, **dict.fromkeys(names, "raise SystemExit('imported')"))
        self.check_program('''
            sys.path.insert(0, sys.argv[1])
            import concurry
            class W(concurry.Worker):
                def f(self, x): return [x]
            for mode in ("sync", "thread", "asyncio", "process"):
                with W.options(mode=mode).init() as w:
                    assert concurry.gather([w.f(n) for n in range(3)]) == [[0], [1], [2]]
                    assert not set(sys.argv[2:]) & set(sys.modules)
                with concurry.Executor(mode) as pool:
                    assert list(pool.map(lambda x: x + 1, [1])) == [2]
            with concurry.Executor("process", 1) as pool:
                assert not pool.submit(lambda names: set(names) & set(sys.modules), names := sys.argv[2:]).result()
            print("passed")
        ''', "passed\n", folder, *names)

    def test_everything_in_a_bare_interpreter(self):
        self.check_program('''
            import concurry
            assert all(hasattr(concurry, name) for name in concurry.__all__)
            for method in sys.argv[1:]:
                with concurry.Executor("process", 2, mp_context=method) as pool:
                    assert list(pool.map(pow, range(4), [2] * 4)) == [0, 1, 4, 9]
                    assert pool.submit(lambda: sys.flags.isolated and sys.flags.no_site).result() == (1 and 1)
            print("passed")
        ''', "passed\n", *START_METHODS, flags=["-I", "-S"])


class TaskFunctionTests(ProgramCase):
    """6.4 in process mode: the module's name for the function now means the handle."""

    def test_importable_and_main(self):
        folder = self.folder()
        self.write(folder, tasks='''
            import os, concurry
            @concurry.task(mode="process", mp_context="forkserver", max_workers=1)
            def forkserver(n): return n if n < 2 else n * forkserver.__wrapped__(n - 1)
            @concurry.task(mode="process", mp_context="spawn", max_workers=1)
            def spawn(n): return n if n < 2 else n * spawn.__wrapped__(n - 1)
            @concurry.task(mode="process", mp_context="fork", max_workers=1)
            def fork(n): return n if n < 2 else n * fork.__wrapped__(n - 1)
            class Thing:
                @concurry.task(mode="process")
                def static(n): return n, os.getpid()
            @concurry.task(mode="process", max_workers=1)
            def limited(n, limits):
                with limits.acquire({"a": 1}): return n
        ''')
        self.check_program('''
            sys.path.append(sys.argv[1])
            import tasks, concurry, threading
            for method in sys.argv[2:]:
                there = getattr(tasks, method)
                @concurry.task(mode="process", mp_context=method, max_workers=1)
                def here(n: int = 3) -> int:
                    "Document."
                    return n if n < 2 else n * here.__wrapped__(n - 1)
                assert not threading.active_count() > 2, threading.enumerate()      # nothing started yet
                for f in (here, there):
                    assert f(5).result() == 120 and list(f.map(range(4))) == [0, 1, 2, 6] and f.submit(3).result() == 6
                assert (here.__name__, here.__doc__, here.__annotations__) == ("here", "Document.", {"n": int, "return": int})
                with concurry.Executor("process", 1, mp_context=method) as pool:        # inside another worker, too
                    assert pool.submit(lambda: (there.__wrapped__(3), here(4).result())).result() == (6, 24)
                here.stop(), there.stop()
            value, pid = tasks.Thing.static(4).result()
            assert value == 4 and pid != os.getpid() and tasks.limited(7).result() == 7
            tasks.Thing.static.stop(), tasks.limited.stop()
            print("passed")
        ''', "passed\n", folder, *START_METHODS)


# === Command line ===

AS_MODULE = (sys.executable, "-m", "concurry")      # compiled once; a script is compiled each time


class CommandLineTests(ProgramCase):
    """16.1"""

    def setUp(self):
        settings = unittest.mock.patch.dict(os.environ, PYTHONPATH=FOLDER)
        settings.start()
        self.addCleanup(settings.stop)

    def map(self, *words, text="", status=0, folder=None, command=("-m", "concurry")):
        ended = subprocess.run([sys.executable, *command, "map", *words], input=text.encode(), capture_output=True,
                               cwd=folder, timeout=SAFETY)
        self.assertEqual(ended.returncode, status, ended.stderr.decode())
        return ended.stdout.decode(), ended.stderr.decode()

    def test_order_and_kinds_of_input(self):
        folder = self.folder()
        self.write(folder, mod='''
            import os
            class Deep:
                def length(x): return len(x)
            def parent(x): return os.getpid() != int(x)
            async def later(x): return x + "!"
        ''', a="1\n2\n3", b="")
        numbers = "".join(f"{n}\n" for n in range(300))
        squares = "".join(f"{n * n}\n" for n in range(300))
        self.assertEqual(self.map("-e", "int(x) ** 2", text=numbers), (squares, ""))
        self.assertEqual(self.map("--mode", "thread", "-e", "math.floor(float(x)) * int(x)", text=numbers), (squares, ""))
        self.assertEqual(self.map("mod:Deep.length", "a.py", "b.py", folder=folder), ("1\n1\n1\n", ""))
        self.assertEqual(self.map("-e", "x * 2", os.path.join(folder, "a.py"), "--max-workers", "1"), ("11\n22\n33\n", ""))
        self.assertEqual(self.map("mod:later", "--mode=asyncio", text="a\n\nb", folder=folder), ("a!\n!\nb!\n", ""))
        self.assertEqual(self.map("mod:parent", text=f"{os.getpid()}\n", folder=folder)[0], "True\n")
        self.assertEqual(self.map("-e", "repr(x)", text="tab\t é \n"), ("'tab\\t é '\n", ""))
        self.assertEqual(self.map("-e", "x"), ("", ""))

    def test_bytes_that_are_no_text(self):
        ended = subprocess.run([sys.executable, SOURCE, "map", "-e", "x"], input=b"ok\n\xff\xfe\n", capture_output=True, timeout=SAFETY)
        self.assertEqual((ended.stdout, ended.stderr, ended.returncode), (b"ok\n\xff\xfe\n", b"", 0))

    def test_errors(self):
        folder = self.folder()
        self.write(folder, mod='''
            import os
            def fails(x):
                if x == "die": os._exit(3)
                return 6 // int(x)
        ''', a="1\n0\n2\nx\n3", b="0\n6\n")
        text = "1\n0\n2\nx\n3\n"
        output, errors = self.map("mod:fails", text=text, folder=folder, status=1)
        self.assertEqual((output, errors), ("6\n", "concurry: line 2: ZeroDivisionError: integer division or modulo by zero\n"))
        output, errors = self.map("mod:fails", "--keep-going", text=text, folder=folder, status=1)
        self.assertEqual(output, "6\n3\n2\n")
        self.assertRegex(errors, r"^concurry: line 2: ZeroDivisionError.*\nconcurry: line 4: ValueError: invalid literal.*\n$")
        output, errors = self.map("mod:fails", "a.py", "b.py", "--keep-going", folder=folder, status=1)
        self.assertEqual(output, "6\n3\n2\n1\n")
        self.assertEqual([line.split(": ")[1] for line in errors.splitlines()], ["a.py:2", "a.py:4", "b.py:1"])
        output, errors = self.map("mod:fails", "--keep-going", "--max-workers=1", text="3\ndie\n2\n", folder=folder, status=1)
        self.assertEqual(output, "2\n3\n")
        self.assertRegex(errors, "line 2: WorkerDiedError: .*exit code 3")

    def misused(self, *words):
        """Return what is said of these words, here; the test is that the status would be 2."""
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()) as output, \
                unittest.mock.patch.object(sys, "path", sys.path[:]), self.assertRaises(SystemExit) as ended:
            concurry.main(["map", *words])
        self.assertEqual((ended.exception.code, output.getvalue()), (2, ""))
        return errors.getvalue()

    def test_misuse(self):
        for words, text in (([], "CALLABLE or -e"), (["nothing"], "module:name"), (["no_such_module:f"], "no_such_module"),
                            (["math:no_such"], "no_such"), (["math:pi"], "not callable"), (["-e", "1 +"], "<expression>"),
                            (["math:sqrt", "no such file"], "no such file"), (["math:sqrt", "--mode", "fast"], "choose one of"),
                            (["math:sqrt", "--max-workers", "none"], "--max-workers="), (["math:sqrt", "--no-such"], "no-such"),
                            (["math:sqrt", "--mode=sync", "--max-workers=2"], "exactly one worker")):
            with self.subTest(words=words):
                self.assertIn(text, self.misused(*words))
        ended = subprocess.run([sys.executable, SOURCE], capture_output=True, timeout=SAFETY)
        self.assertEqual(ended.returncode, 2)
        for limit in ("100", "0/minute", "5/fortnight", "x/second", "5/0"):
            self.assertIn("write it as 100/minute", self.misused("math:sqrt", "--limit", limit))
        self.assertIn("--retries='some'", self.misused("math:sqrt", "--retries", "some"))
        self.assertIn("'no_such_name' is neither", self.misused("-e", "no_such_name(x)"))

    def test_help(self):
        """A screen of 24 lines of 80, with each option and three commands."""
        ended = subprocess.run([sys.executable, SOURCE, "map", "--help"], capture_output=True, text=True, timeout=SAFETY)
        lines = ended.stdout.splitlines()
        self.assertLessEqual(len(lines), 24)
        self.assertLess(max(map(len, lines)), 80)
        _, mapping = concurry._arguments()
        options = {option for action in mapping._actions for option in action.option_strings} - {"-h", "--help"}
        self.assertEqual(options, set(re.findall(r"(?<![\w-])(-e|--[a-z0-9-]+)", ended.stdout.partition("Exit")[0])))
        self.assertEqual(len(re.findall(r"^  .*concurry map", ended.stdout, re.MULTILINE)), 3)
        version = subprocess.run([sys.executable, SOURCE, "--version"], capture_output=True, text=True, timeout=SAFETY)
        self.assertEqual(version.stdout, f"concurry {concurry.__version__}\n")

    def test_expressions_find_their_modules(self):
        folder = self.folder()
        self.write(folder, mine="factor = 3", factor="raise ImportError('an attribute is no module')")
        self.addCleanup(sys.modules.pop, "mine")
        for expression, result in (
                ("hashlib.sha256(x.encode()).hexdigest()[:4]", "ef2d"), ("mine.factor * int(x)", "15"),
                ("os.path.join(x, 'b')", "5/b"), ("xml.etree.ElementTree.Element(x).tag", "5"),
                ("urllib.parse.quote(x + '/')", "5/"), ("max([random for random in x])", "5"),
                ("(lambda copy: copy + x)('a')", "a5"), ("(y := int(x)) + y", "10"), (" len(x) ", "1"),
                ("[collections.Counter(x)[y] for y in x]", "[1]"), ("types.SimpleNamespace(factor=x).factor", "5")):
            with unittest.mock.patch.object(sys, "path", [folder, *sys.path]):
                self.assertEqual(str(pickle.loads(pickle.dumps(concurry._Expression(expression)))("5")), result, expression)
        self.assertEqual(self.map("-e", "xml.etree.ElementTree.Element(x).tag", text="5"), ("5\n", ""))
        self.assertIn("AttributeError", self.map("-e", "os.no_such(x)", text="5", status=1)[1])

    def test_json(self):
        text = '{"n": 1}\n?\n{"n": 0}\n\n{"n": "é"}\n'       # an empty line is no value
        output, errors = self.map("--json", "-e", "{**x, 'm': 6 / x['n'] if x['n'] in (0, 1) else x['n']}", "--keep-going",
                                  text=text, status=1)
        self.assertEqual(output.splitlines(), [
            '{"n": 1, "m": 6.0}', '{"error": "JSONDecodeError: Expecting value: line 1 column 1 (char 0)", "line": 2}',
            '{"error": "ZeroDivisionError: division by zero", "line": 3}', '{"n": "é", "m": "é"}'])
        self.assertEqual(len(errors.splitlines()), 2)
        folder = self.folder()
        self.write(folder, a="1\n{}\n")
        output, _ = self.map("--json", "-e", "{x} if x else x", "--keep-going", "a.py", folder=folder, status=1)
        self.assertEqual(output.splitlines(), [
            '{"error": "TypeError: Object of type set is not JSON serializable", "file": "a.py", "line": 1}', "{}"])

    def test_retries_and_limits(self):
        folder = self.folder()
        self.write(folder, mod='''
            seen, granted = {}, []
            def unsteady(x):
                seen[x] = seen.get(x, 0) + 1
                if seen[x] < 2: raise OSError("again")
                return f"{x} {seen[x]}"
        ''')
        one = ("mod:unsteady", "--max-workers=1")
        code = f"import sys; sys.path.append({FOLDER!r}); import concurry; concurry.global_config.defaults.retry_wait = 0; " \
               "sys.exit(concurry.main())"
        output, errors = self.map(*one, "--retries", "1", text="a\nb\n", folder=folder, command=("-c", code))
        self.assertEqual((output, errors), ("a 2\nb 2\n", ""))
        self.assertIn("OSError", self.map(*one, text="a\n", folder=folder, status=1)[1])
        # Of a window that does not end here there are two calls.
        for mode in ("process",):
            program = Program(self, "", command=[*AS_MODULE, "map", "-e", "x", "--mode", mode, "--limit", "2/day", "--max-workers=1"],
                              start_new_session=True)
            for text in "abc":
                program.say(text)
            self.assertEqual([program.line(), program.line()], ["a", "b"])
            os.killpg(program.popen.pid, signal.SIGINT)
            self.assertEqual((program.popen.wait(SAFETY), program.output()[0]), (130, ""))

    def test_timeout(self):
        output, errors = self.map("-e", "time.sleep(60) if x == 'b' else x", "--timeout", "1", "--keep-going", text="a\nb\nc\n", status=1)
        self.assertEqual(output, "a\nc\n")
        self.assertRegex(errors, r"^concurry: line 2: CallTimeoutError: map-\d ran expression\(\) for more than 1 seconds, .*killed.*\n$")

    def test_unordered(self):
        """Each as soon as it is there: the first line waits for the second to be printed."""
        flag = self.flag()
        for mode in ("process", "thread"):
            code = f"x == '2' or (os.read(os.open({flag.path!r}, os.O_RDONLY), 1), x)[1]"
            program = Program(self, "", command=[*AS_MODULE, "map", "-e", code, "--mode", mode, "--unordered"])
            program.say("1")
            program.say("2")
            self.assertEqual(program.line(), "True")
            os.write(flag.keeper, b"x")
            self.assertEqual(program.line(), "1")
            self.assertEqual((program.output(), program.popen.returncode), (("", ""), 0))

    def test_what_cannot_be_done(self):
        """There is an exit status and a line, and no traceback."""
        for words, text in ((("-e", ""), "-e needs an expression over x"),
                            (("--timeout", "3", "--mode", "sync", "-e", "x"), "--timeout has no effect in mode sync"),
                            (("--retries", "-1", "-e", "x"), "--retries='-1' is not possible: a whole number from 0"),
                            (("len",), "'len' is not of the form module:name; what is built in is best called by -e")):
            self.assertIn(text, self.misused(*words))

    def test_results_that_cannot_be_written(self):
        errors = self.map("--mode", "thread", "-e", "chr(0xd800)", text="1\n", status=1)[1]
        self.assertRegex(errors, r"^concurry: line 1: ValueError: the result '\\ud800' cannot be written as utf-8\n$")
        self.assertEqual(self.map("--mode", "thread", "--json", "-e", "chr(int(x, 16))", text='"0xd800"\n\n'),
                         ('"\\ud800"\n', ""))
        self.assertRaisesRegex(ValueError, "not JSON compliant", concurry._as_json, math.nan)

    def test_lines_that_exit(self):
        errors = self.map("--mode", "sync", "-e", "sys.exit(3)", "--keep-going", text="1\n2\n", status=1)[1]
        self.assertEqual(errors, "concurry: line 1: SystemExit: 3\nconcurry: line 2: SystemExit: 3\n")

    def test_standard_input_by_its_name(self):
        self.assertEqual(self.map("--mode", "thread", "-e", "(lambda json: json)(x) + json.dumps(1)", "-", text="a\n"),
                         ("a1\n", ""))

    def test_standard_input_is_empty_for_the_callable(self):
        """Also for the programs that it starts: no line is lost to them. Each is longer than what is read at once."""
        text, code = "".join(f"{n}" * 100_000 + "\n" for n in range(4)), \
            "(x[:1], len(x), sys.stdin.read(), os.read(0, 9), subprocess.run('cat', capture_output=True).stdout)"
        for mode in ("sync", "thread", "process", "asyncio"):
            with self.subTest(mode):
                self.assertEqual(self.map("--mode", mode, "-e", code, text=text),
                                 ("".join(f"('{n}', 100000, '', b'', b'')\n" for n in range(4)), ""))

    def bytes(self, *words, text):
        """Return what comes of bytes."""
        ended = subprocess.run([*AS_MODULE, "map", "--mode", "thread", *words], input=text, capture_output=True, timeout=SAFETY)
        self.assertEqual((ended.returncode, ended.stderr), (0, b""))
        return ended.stdout

    def test_ends_of_lines(self):
        folder = self.folder()
        for text, lines in ((b"a\r\nb\r\n", ["a", "b"]), (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"]), (b"a\rb\nc\r", ["a\rb", "c\r"]),
                            (b"a\r\r\n\n\r\n", ["a\r", "", ""]), (b"a\x0bb\x1cc\xe2\x80\xa8d\0e\n", ["a\vb\x1cc\u2028d\0e"]),
                            (b"\xef\xbb\xbf", [""]), (b"\r\n", [""])):
            expected = "".join(f"{line!r}\n" for line in lines).encode()
            with open(path := os.path.join(folder, "lines"), "wb") as file:
                file.write(text)
            with self.subTest(text=text):
                self.assertEqual([self.bytes("-e", "repr(x)", text=text), self.bytes("-e", "repr(x)", path, text=b"")], [expected] * 2)

    def test_records_that_end_in_nul(self):
        text = b"\xef\xbb\xbfa\nb\0c\r\n\0\0" + b"d" * 200_000
        for words in (["-0"], ["--null"]):
            self.assertEqual(self.bytes(*words, "-e", "repr(x)", text=text), b"'a\\nb'\n'c\\r\\n'\n''\n'" + b"d" * 200_000 + b"'\n")
            self.assertEqual(self.bytes(*words, "--print0", "-e", "x", text=text), text[3:] + b"\0")
            self.assertEqual(self.bytes("-e", "x", *words, text=b"a\0b\0"), b"a\nb\n")
        self.assertEqual(self.bytes("--print0", "-e", "x", text=b"a\nb\n"), b"a\0b\0")
        folder = self.folder()
        with open(os.path.join(folder, "records"), "wb") as file:
            file.write(b"1\0" b"2\0x")
        output, errors = self.map("-0", "--progress", "--keep-going", "-e", "int(x)", "records", folder=folder, status=1)
        self.assertEqual(output, "1\n2\n")
        self.assertRegex(errors, r"^concurry: records:3: ValueError.*\n100% 3/3 ")

    def test_options_between_and_after_names(self):
        folder = self.folder()
        self.write(folder, a="1\n", b="2\n", mod="def half(x): return x / 2")
        for words in (["mod:half", "--json", "a.py", "--mode", "thread", "b.py"], ["mod:half", "a.py", "b.py", "--json", "--mode=thread"],
                      ["a.py", "--json", "-e", "x / 2", "b.py", "--mode", "thread"], ["--json", "a.py", "b.py", "-e", "x / 2"]):
            with self.subTest(words):
                self.assertEqual(self.map(*words, folder=folder), ("0.5\n1.0\n", ""))

    def test_expressions_that_begin_with_a_minus(self):
        for expression, result in (("-int(x)", "-7"), ("-len(x)==-1", "True"), ("--int(x)", "7"), ("-1", "-1")):
            self.assertEqual(self.map("-e", expression, "--mode", "thread", text="7\n"), (result + "\n", ""))
        self.assertEqual(self.map("-e", "-0", "--mode", "thread", text="7\n"), ("0\n", ""))
        folder = self.folder()
        with open(os.path.join(folder, "-0"), "w") as file:
            file.write("7\n")
        self.assertEqual(self.map("-e", "x", "--mode=thread", "--", "-0", folder=folder), ("7\n", ""))
        self.assertIn("expected one argument", self.misused("-e"))

    def test_without_a_standard_error(self):
        """Results are printed, and the status tells."""
        for mode in ("process", "thread", "sync"):
            for words, output, status in (("--keep-going", "1\n2\n", 1), ("", "1\n", 1), ("--progress --keep-going", "1\n2\n", 1)):
                command = f"printf '1\\nx\\n2\\n' | {sys.executable} -m concurry map --mode {mode} {words} -e 'int(x)' 2>&-"
                ended = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, timeout=SAFETY)
                with self.subTest(mode, words=words):
                    self.assertEqual((ended.stdout, ended.returncode), (output, status))

    def test_it_is_called_in_a_program(self):
        """Whose streams are objects; its standard input is put back, as file and as object."""
        reads, writes = os.pipe()
        os.write(writes, b"1\n2\n")
        os.close(writes)
        before, stdin = os.dup(0), sys.stdin
        os.dup2(reads, 0)
        os.close(reads)
        try:
            for expected in ("(2, '')\n(4, '')\n", ""):       # the second time nothing is left
                with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors, \
                        unittest.mock.patch.object(sys, "path", sys.path[:]):
                    inside = os.fstat(0).st_ino
                    status = concurry.main(["map", "--mode", "thread", "-e", "(int(x) * 2, sys.stdin.read())"])
                self.assertEqual((status, errors.getvalue(), os.fstat(0).st_ino), (0, "", inside))
                self.assertIs(sys.stdin, stdin)
                self.assertEqual(output.getvalue(), expected)
        finally:
            os.dup2(before, 0)
            os.close(before)

    def test_streams_that_are_closed_or_full(self):
        for redirection, status, message in ((">/dev/full", 1, "the output cannot be written"),
                                             (">&-", 2, "standard output is closed"),
                                             ("<&-", 2, "standard input is closed")):
            command = f"echo 1 | {sys.executable} -m concurry map --mode sync -e x {redirection}"
            ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=SAFETY)
            self.assertEqual(ended.returncode, status, ended.stderr)
            self.assertRegex(ended.stderr, message)
            self.assertNotIn("Traceback", ended.stderr)

    def test_memory_is_flat(self):
        """Of an endless input only as many lines are read as there is room for."""
        read = itertools.count()
        lines = ((None, n, str(n)) for n in read)
        pool = self.start(TaskWorker, init={"fn": str}, mode="thread")
        with unittest.mock.patch.object(concurry, "_numbered_lines", lambda names: lines):
            came = concurry._LineMap(pool, types.SimpleNamespace(names=[], unordered=False, json=False))
            seen = [future.result(SAFETY) for _, (_, future) in zip(range(100), came)]
            self.assertEqual(seen, [f"{n}" for n in range(100)])
            self.assertLessEqual(next(read), 100 + concurry._LINES_AHEAD + 2)
            pool.stop()                     # the next submission raises, and ends the thread
            while not isinstance(came.came.get(timeout=SAFETY), int):
                came.places.release()

    def test_progress(self):
        folder = self.folder()
        self.write(folder, a="1\n2\nx\n3", b="4\n")
        output, errors = self.map("-e", "int(x)", "--progress", "--keep-going", "a.py", "b.py", folder=folder, status=1)
        self.assertEqual(output, "1\n2\n3\n4\n")
        self.assertRegex(errors, r"^concurry: a.py:3: .*\n100% 5/5 \[.* lines/s, 1 failed\] failure\n$")
        self.assertRegex(self.map("-e", "x", "--progress", text="a\nb\n")[1], r"^2 lines \[.*\] success\n$")
        import pty
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        terminal = Stream(80)
        self.addCleanup(terminal.close)
        for words, is_shown in ((), True), (("--no-progress",), False):
            ended = subprocess.run([*AS_MODULE, "map", "-e", "x * 2", *words, "a.py"], stdout=slave, stderr=slave,
                                   cwd=folder, timeout=SAFETY, env={**os.environ, "TERM": "xterm"})
            self.assertEqual(ended.returncode, 0)
            terminal.text = os.read(master, 1 << 16).decode()
            lines = terminal.screen()
            self.assertEqual(lines[:4], ["11", "22", "xx", "33"])
            self.assertEqual([re.sub(r"\|.*\|", "", line)[:8] for line in lines[4:]], ["100% 4/4", ""] if is_shown else [""])
        os.close(slave)

    def test_results_come_as_they_are(self):
        """With standard input still open; then Ctrl-C, which is quiet and leaves nothing behind."""
        for mode in ("process", "thread"):
            program = Program(self, "", command=[*AS_MODULE, "map", "-e", "int(x) * 2", "--mode", mode],
                              start_new_session=True)
            for n in range(3):
                program.say(str(n))
                self.assertEqual(program.line(), str(2 * n))
            inside = [int(pid) for pid in open_and_read(f"/proc/{program.popen.pid}/task/{program.popen.pid}/children").split()]
            os.killpg(program.popen.pid, signal.SIGINT)
            self.assertEqual((program.popen.wait(SAFETY), program.output()), (130, ("", "")))
            self.assertTrue(all(map(until_gone, inside)))

    def test_interrupted_while_it_works(self):
        began = self.flag()
        for mode in ("process", "thread"):
            code = f"open({began.path!r}, 'w').write('x') and __import__('time').sleep(60)"
            program = Program(self, "", command=[*AS_MODULE, "map", "-e", code, "--mode", mode], start_new_session=True)
            program.say("1")
            os.read(began.keeper, 1) if select.select([began.keeper], [], [], SAFETY)[0] else self.fail("it never began")
            wait_until_asleep(program.popen.pid)    # a signal just before would not wake it: so it is in CPython
            os.killpg(program.popen.pid, signal.SIGINT)
            output, errors = program.output()
            self.assertEqual((output, program.popen.returncode), ("", 130), mode)
            self.assertNotIn("Traceback", errors)

    def test_closed_pipe(self):
        """Whoever reads the output has enough: a quiet end, though the input is endless."""
        reads, writes = os.pipe()
        endless = subprocess.Popen(["yes", "1"], stdout=writes)
        self.addCleanup(endless.wait, SAFETY)
        self.addCleanup(endless.kill)
        self.addCleanup(os.close, reads)
        os.close(writes)
        for mode in ("process", "thread"):
            popen = subprocess.Popen([*AS_MODULE, "map", "-e", "x * 1000", "--mode", mode],
                                     stdin=reads, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual(popen.stdout.readline(), b"1" * 1000 + b"\n")
            popen.stdout.close()
            popen.stdout = None
            self.assertEqual((popen.communicate(timeout=SAFETY)[1], popen.returncode), (b"", 0))


class ReadmeTests(ProgramCase):
    """The examples of the README run, each by itself in a directory where the file has been copied."""

    def readme(self):
        path = os.path.join(FOLDER, "README.md")
        if not os.path.exists(path):
            self.skipTest("needs README.md")
        self.copy = self.folder()
        shutil.copy(SOURCE, self.copy)
        return open_and_read(path)

    def blocks(self, kind):
        return re.findall(rf"^```{kind}\n(.*?)^```", self.readme(), re.DOTALL | re.MULTILINE)

    def test_python(self):
        blocks = self.blocks("python")
        if not importlib.util.find_spec("ray"):
            blocks = [block for block in blocks if "import ray" not in block]
        self.assertTrue(blocks)
        programs = [Program(self, block, way="file", head=HEAD.replace(FOLDER, self.copy), cwd=self.copy) for block in blocks]
        for number, (block, program) in enumerate(zip(blocks, programs)):
            with self.subTest(number=number):
                output, errors = program.output()
                status = 143 if "serve(" in block else 0        # which ends by a signal
                self.assertEqual(program.popen.returncode, status, f"{block}\n{output}\n{errors}")
                # A comment behind a print tells what it prints.
                for told in re.findall(r"print\(.*\)\s+# ([\[{('\d].*)$", block, re.MULTILINE):
                    self.assertIn(told, output, block)

    def test_the_table_of_options(self):
        """Every option has its line, with the default that holds."""
        rows = {name: default for names, default in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]*) \|", self.readme(), re.MULTILINE)
                for name in re.findall(r"\w+", names)}
        self.assertEqual(set(concurry._OPTIONS) - set(rows), set())
        for name, default in global_config.defaults._initial.items():
            told = rows.get(name)
            if name in ("mode", "limits", "max_workers", "mp_context") or told is None:
                continue
            shown = "[Exception]" if name == "retry_on" else getattr(default, "value", default)
            self.assertIn(f"`{shown}`", told, name)

    def test_the_table_of_faults(self):
        """What it names is there: exceptions, methods, options."""
        table = self.readme().partition("| when | then |")[2].partition("\n\n")[0]
        names = set(re.findall(r"`([A-Za-z]\w+)[`(]", table))
        self.assertLessEqual({"WorkerDiedError", "RemoteError", "ResourceWarning", "OSError", "stop", "init"}, names)
        handle = self.start(Counter, mode="sync")
        homes = (concurry, concurry.Worker, handle, BaseFuture, builtins, concurrent.futures)
        self.assertEqual([name for name in names if not any(hasattr(home, name) for home in homes)
                          and name not in concurry._OPTIONS and name not in ("sync", "asyncio", "args", "with")], [])

    def test_shell(self):
        commands = [line for block in self.blocks("(?:sh|shell|console|bash)")
                    for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.lstrip().startswith("#")]
        commands = [command.lstrip("$ ") for command in commands[:2] if "unittest" not in command]     # that is this run
        self.assertTrue(commands)
        for command in commands:
            with self.subTest(command):
                # A folder of ours: who knows what is in theirs.
                command = re.sub(r"\bpython3\b", sys.executable, command.replace("/bin/", self.copy))
                ended = subprocess.run(command, shell=True, cwd=self.copy, capture_output=True, text=True, timeout=SAFETY)
                self.assertEqual((ended.returncode, ended.stderr), (0, ""), ended.stdout)
                self.assertIn("concurry.py", ended.stdout)


if __name__ == "__main__":
    unittest.main()
