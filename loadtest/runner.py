"""A scenario against a server: stages in random order, votes, answers checked. Says what happened; judges nothing."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from answers.vote import Vote
from loadtest.calibrate import Calibration, find_temperature
from loadtest.client import Client
from loadtest.load import run_load
from loadtest.records import Call, Item, Stage
from loadtest.scenario import Arm, Closed, Open, Scenario, Sweep
from loadtest.tasks import LoadedTask

WARMUP_REPETITION = 999  # whose seeds no measured question has
GENERATED, PROMPTED = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"


class Progress(Protocol):
    """Who wants to know how far it is."""

    def stage_began(self, stage: Stage, questions: int) -> None:
        """Its questions are about to be asked."""

    def item_ended(self, stage: Stage, item: Item) -> None:
        """One was answered, or was not."""

    def stage_ended(self, stage: Stage) -> None:
        """All were."""


class Runner:
    """Runs all stages of a scenario."""

    def __init__(
        self,
        scenario: Scenario,
        model: str,
        task: LoadedTask,
        client: Client,
        progress: Progress,
        record: Callable[[Stage], None],
    ) -> None:
        """`record` is given each stage as it ends, answers checked."""
        self.scenario = scenario
        self.model = model
        self.task = task
        self.client = client
        self.progress = progress
        self.record = record
        self.calibration: dict[str, Calibration] = {}
        self._rng = random.Random(scenario.seed)

    async def run(self) -> list[Stage]:
        """Every arm under every load, each repetition of a load with its arms in an order of its own."""
        for arm in self.scenario.arms:
            if arm.match_entropy_of:
                await self._calibrate(arm)
        stages: list[Stage] = []
        for load in self.scenario.loads:
            if isinstance(load, Sweep):
                stages += await self._sweep(load)
            else:
                stages += await self._repeat(load, self.scenario.arms)
        return stages

    async def _repeat(self, load: Closed | Open, arms: Sequence[Arm]) -> list[Stage]:
        stages = []
        for repetition in range(self.scenario.repetitions):
            for arm in self._rng.sample(arms, len(arms)):
                stages.append(await self._stage(arm, load, repetition))
        return stages

    async def _sweep(self, sweep: Sweep) -> list[Stage]:
        """An arm leaves when more concurrency gives it no more answers."""
        stages: list[Stage] = []
        best = dict.fromkeys((arm.name for arm in self.scenario.arms), 0.0)
        arms = self.scenario.arms
        for level in sweep.levels():
            now = await self._repeat(level, arms)
            stages += now
            grown = []
            for arm in arms:
                rates = sorted(answers_per_second(stage) for stage in now if stage.arm == arm.name)
                rate = rates[len(rates) // 2]
                if rate > best[arm.name] * (1 + sweep.gain):
                    grown.append(arm)
                best[arm.name] = max(best[arm.name], rate)
            arms = tuple(grown)
            if not arms:
                break
        return stages

    async def _stage(self, arm: Arm, load: Closed | Open, repetition: int) -> Stage:
        offered = load.concurrency if isinstance(load, Closed) else load.rate
        stage = Stage(arm.name, load.label, offered, isinstance(load, Open), repetition)
        # The same order, and the same times in an open loop, for every arm.
        rng = random.Random(f"{self.scenario.seed}/{load.label}/{repetition}")
        order = [question.index for question in self.task.questions]
        rng.shuffle(order)
        await self._warm_up(arm, load, order)
        self.progress.stage_began(stage, len(order))
        before = await self._counters()
        began = time.monotonic()

        async def ask(index: int, due: float) -> Item:
            item = await self._ask(arm, index, due, began, repetition)
            stage.items.append(item)
            self.progress.item_ended(stage, item)
            return item

        stage.lags = await run_load(load, order, ask, began, rng.getrandbits(32))
        if stage.items:
            first = min(item.scheduled for item in stage.items)
            stage.seconds = max(item.ended for item in stage.items) - first
        after = await self._counters()
        if before and after:
            stage.counted_output_tokens = after[0] - before[0]
            stage.counted_prompt_tokens = after[1] - before[1]
        await asyncio.gather(*(self._check(item) for item in stage.items))  # not before: it would take the load's time
        self.record(stage)
        self.progress.stage_ended(stage)
        return stage

    async def _warm_up(self, arm: Arm, load: Closed | Open, order: Sequence[int]) -> None:
        """The same requests with other seeds, at most as many at a time as the stage has."""
        indices = [order[i % len(order)] for i in range(self.scenario.warmup)] if order else []
        at_a_time = load.concurrency if isinstance(load, Closed) else max(1, len(indices))

        async def ask(index: int, due: float) -> Item:
            return await self._ask(arm, index, due, began, WARMUP_REPETITION)

        began = time.monotonic()
        await run_load(Closed(type="closed", concurrency=at_a_time), indices, ask, began, 0)

    async def _ask(self, arm: Arm, index: int, due: float, began: float, repetition: int) -> Item:
        seeds = self.scenario.seeds(repetition, index)
        item = Item(index, scheduled=due)
        requests = [self.body(arm, index) | {"seed": next(seeds)} for _ in range(arm.vote.n if arm.vote else 1)]
        item.calls = list(await asyncio.gather(*(self.client.call(body, began) for body in requests)))
        find = arm.vote.answer.of if arm.vote and arm.vote.answer else self.task.find
        item.reply = voted(item.calls, find)
        item.answer = find(item.reply.text) if item.reply else None
        return item

    def body(self, arm: Arm, index: int) -> dict[str, Any]:
        """What one request of the arm says, all but its seed."""
        question = self.task.questions[index]
        system = [{"role": "system", "content": self.scenario.system}] if self.scenario.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": question.text}],
            "stream": self.scenario.stream,
        }
        if self.scenario.stream:
            body["stream_options"] = {"include_usage": True}
        if question.max_tokens is not None:
            body |= {"max_tokens": question.max_tokens, "ignore_eos": True}
        body |= self.scenario.request | arm.body
        if arm.name in self.calibration:
            body["temperature"] = self.calibration[arm.name].temperature
        return {name: value for name, value in body.items() if value is not None}

    async def _check(self, item: Item) -> None:
        question = self.task.questions[item.index]
        if question.answer is not None:
            text = item.reply.text if item.reply else None
            item.correct = text is not None and await self.task.check(question, text)

    async def _counters(self) -> tuple[int, int] | None:
        """Output and prompt tokens by the server's own count, of all its clients."""
        response = await self.client.get("/metrics")
        if response is None:
            return None
        sums = dict.fromkeys((GENERATED, PROMPTED), 0.0)
        found = False
        for line in response.text.splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name in sums:
                found = True
                sums[name] += float(line.rsplit(" ", 1)[1])
        return (round(sums[GENERATED]), round(sums[PROMPTED])) if found else None

    async def _calibrate(self, arm: Arm) -> None:
        target = next(other for other in self.scenario.arms if other.name == arm.match_entropy_of)

        async def ask(body: dict[str, Any]) -> Call:
            return await self.client.call(body, time.monotonic())

        bodies = [
            self.body(each, question.index) | {"seed": next(self.scenario.seeds(WARMUP_REPETITION, question.index))}
            for each in (target, arm)
            for question in self.task.questions
        ]
        half = len(bodies) // 2
        self.calibration[arm.name] = await find_temperature(ask, bodies[:half], bodies[half:], arm.name)


def voted(calls: Sequence[Call], find: Callable[[str], str | None]) -> Call | None:
    """The reply that the user has: the only one, or the first with the answer of most; of whole calls alone.

    Ties go to the answer that came up first: a client does not know what the model finds likelier.
    """
    whole = [call for call in calls if call.status == "ok"]
    vote, first = Vote(), dict[str, Call]()
    for call in whole:
        answer = find(call.text)
        if answer is not None:
            vote.add(answer, tie_break=0.0)
            first.setdefault(answer, call)
    ranking = vote.ranking()
    return first[ranking[0]] if ranking else next(iter(whole), None)


def answers_per_second(stage: Stage) -> float:
    """Questions answered."""
    return sum(item.status == "ok" for item in stage.items) / stage.seconds if stage.seconds else 0.0
