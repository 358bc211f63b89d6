"""The tests of concurry: `python3 -m unittest`."""

import unittest

import concurry


class Counter(concurry.Worker):
    def __init__(self, start):
        self.count = start

    def add(self, n):
        self.count += n
        return self.count


class SmokeTests(unittest.TestCase):
    def test_a_stateful_worker_in_every_mode(self):
        for mode in concurry.ExecutionMode:
            with self.subTest(mode=mode), Counter.options(mode=mode).init(10) as counter:
                self.assertEqual([counter.add(n).result(30) for n in (1, 2)], [11, 13])


if __name__ == "__main__":
    unittest.main()
