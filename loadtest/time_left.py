"""How long the rest of a run takes, estimated from the questions that were asked so far. Reads no clock."""

from collections import Counter
from dataclasses import dataclass

from loadtest.calibrate import MAX_PASSES, MAX_QUESTIONS
from loadtest.scenario import Scenario, Sweep

MIN_SHARE = 0.1  # of a running stage's questions, before it counts: the first replies are those of a whole batch

Kind = tuple[str, str]  # a config and a load, which all repetitions have; or a config and CALIBRATION
CALIBRATION = "calibration"


@dataclass(frozen=True)
class Part:
    """A stage or a pass of a calibration, as far as it is."""

    kind: Kind
    questions: int  # that it has
    done: int
    asked: int  # fewer than done, if an earlier sitting did the others
    seconds: float  # that the asked ones took


class TimeLeft:
    """What is left of a run, by kind: a vote takes longer than one reply, and more in flight go faster.

    Attributes:
        stages: how many the run has; None if a sweep decides it.
    """

    def __init__(self, scenario: Scenario, questions: int) -> None:
        """`questions`: how many the task has."""
        loads = [load.label for load in scenario.loads if not isinstance(load, Sweep)]
        kinds = [(config.name, load) for load in loads for config in scenario.configs]
        is_known = len(loads) == len(scenario.loads)
        self.stages = len(kinds) * scenario.repetitions if is_known else None
        self._left = Counter[Kind]()  # questions
        for kind in kinds:
            self._left[kind] += scenario.repetitions * questions
        for config in scenario.configs:
            if config.match_entropy_of:
                self._left[config.name, CALIBRATION] = (1 + MAX_PASSES) * min(questions, MAX_QUESTIONS)
        self._asked = Counter[Kind]()
        self._seconds: dict[Kind, float] = {}

    def ended(self, part: Part) -> None:
        """Count a part that has ended."""
        self._left[part.kind] -= part.questions
        if part.asked:
            self._asked[part.kind] += part.asked
            self._seconds[part.kind] = self._seconds.get(part.kind, 0.0) + part.seconds

    def calibrated(self, config: str | None = None) -> None:
        """Drop the passes that a config's calibration did not need; without a config, those of all."""
        for kind in [kind for kind in self._left if kind[1] == CALIBRATION and config in (None, kind[0])]:
            del self._left[kind]

    def seconds(self, running: Part | None = None) -> float | None:
        """Return the seconds that are left; None if nothing tells, or if a sweep decides how much is left.

        A kind that was not asked yet is taken to be as fast as the others on average.
        """
        asked, seconds, left = self._asked.copy(), dict(self._seconds), self._left.copy()
        if running:
            left[running.kind] -= running.done
            if running.asked >= MIN_SHARE * running.questions and running.asked:
                asked[running.kind] += running.asked
                seconds[running.kind] = seconds.get(running.kind, 0.0) + running.seconds
        if self.stages is None or not asked:
            return None
        mean = sum(seconds.values()) / asked.total()
        rates = {kind: seconds[kind] / asked[kind] for kind in asked}
        return sum(rates.get(kind, mean) * max(count, 0) for kind, count in left.items())
