"""Search for schedules in which a rate limit breaks its promise, and for messages that break the decoder.

    python3 .ci/fuzz.py [EXAMPLES]          (needs hypothesis)

The same models and rounds as in the unit tests, with what hypothesis chooses and shortens; then a
million steps of each rate algorithm, after which no capacity may be lost.
"""
import pathlib
import sys

from hypothesis import given, settings, strategies

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import concurry  # noqa: E402
from concurry import RateLimitAlgorithm  # noqa: E402
from test_concurry import WINDOWS, RateTests, decoder_round, rate_schedule  # noqa: E402

EXAMPLES = int(sys.argv[1]) if len(sys.argv) > 1 else 3000


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(strategies.data(), strategies.sampled_from(list(RateLimitAlgorithm)), strategies.sampled_from(WINDOWS),
       strategies.one_of(strategies.integers(1, 10 ** 12), strategies.floats(1e-9, 1e9)))
def any_schedule(data, algorithm, window, capacity):
    def choose(options):
        return options[data.draw(strategies.integers(0, len(options) - 1))]
    rate_schedule(choose, algorithm, capacity, window, data.draw(strategies.integers(1, 20)))


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(strategies.data(), strategies.sampled_from(["", "cut", "changed", "garbage"]))
def any_messages(data, damage):
    def number(most):
        return data.draw(strategies.integers(0, most))
    decoder_round(lambda options: options[number(len(options) - 1)], number, damage)


concurry._load_wire()
any_messages()
print(f"{EXAMPLES} streams of messages are decoded, or refused", flush=True)
any_schedule()
print(f"{EXAMPLES} schedules hold", flush=True)
RateTests.steps = 1_000_000
RateTests("test_no_capacity_is_lost_in_many_steps").debug()
print("no capacity was lost in a million steps")
