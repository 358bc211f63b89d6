"""Search for schedules in which a rate limit breaks its promise, or wastes what it might grant.

    python3 .ci/fuzz.py [EXAMPLES]          (needs hypothesis)

The same models as in the unit tests, with schedules that hypothesis chooses and shortens; then a
million steps of each algorithm, after which no capacity may be lost.
"""
import pathlib
import sys

from hypothesis import given, settings, strategies

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from concurry import RateLimitAlgorithm  # noqa: E402
from test_concurry import WINDOWS, RateTests, rate_schedule  # noqa: E402

EXAMPLES = int(sys.argv[1]) if len(sys.argv) > 1 else 3000


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(strategies.data(), strategies.sampled_from(list(RateLimitAlgorithm)), strategies.sampled_from(WINDOWS),
       strategies.one_of(strategies.integers(1, 10 ** 12), strategies.floats(1e-9, 1e9)))
def any_schedule(data, algorithm, window, capacity):
    def choose(options):
        return options[data.draw(strategies.integers(0, len(options) - 1))]
    rate_schedule(choose, algorithm, capacity, window, data.draw(strategies.integers(1, 20)))


any_schedule()
print(f"{EXAMPLES} schedules hold", flush=True)
RateTests.steps = 1_000_000
RateTests("test_no_capacity_is_lost_in_many_steps").debug()
print("no capacity was lost in a million steps")
