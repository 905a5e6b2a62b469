"""Runs a scenario against a server: stages in random order, client votes, answers checked. Computes no figures."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from answers.vote import Vote
from loadtest.calibrate import Calibration, Pass, calibration_concurrency, find_temperature
from loadtest.client import Client
from loadtest.counters import counted_tokens
from loadtest.load import run_load
from loadtest.measurements import MeasuredQuestion, MeasuredRequest, Stage, seconds_of
from loadtest.records import Records
from loadtest.scenario import Closed, Config, Open, Scenario, ScenarioError, Sweep
from loadtest.tasks.base import LoadedTask


class Progress(Protocol):
    """An observer of a run."""

    def pass_began(self, asked: Pass) -> None:
        """Note that a pass of a calibration is about to be asked."""

    def calibration_ended(self, config: str, found: Calibration) -> None:
        """Note that a matched temperature is known."""

    def stage_began(self, stage: Stage, questions: int) -> None:
        """Note that the stage's questions are about to be asked."""

    def stage_ended(self, stage: Stage) -> None:
        """Note that all answers of the stage are checked."""


class Runner:
    """Runs all stages of a scenario."""

    def __init__(
        self,
        scenario: Scenario,
        model: str,
        task: LoadedTask,
        client: Client,
        progress: Progress,
        records: Records,
    ) -> None:
        """Check the seeds. `records` receives what is measured, and has what need not be measured again."""
        self.scenario = scenario
        self.model = model
        self.task = task
        self.client = client
        self.progress = progress
        self.records = records
        self.calibration: dict[str, Calibration] = dict(records.calibration)
        self._rng = random.Random(scenario.seed)
        self._warm_up_repetition = scenario.repetitions  # the one after the last: no measured request has its seeds
        scenario.check_seeds(len(task.questions))

    async def run(self) -> list[Stage]:
        """Run every config under every load; each repetition of a load has its configs in another random order."""
        for config in self.scenario.configs:
            if config.match_entropy_of and config.name not in self.calibration:
                await self._calibrate(config)
                self.records.calibrated(config.name, self.calibration[config.name])
        stages: list[Stage] = []
        for load in self.scenario.loads:
            if isinstance(load, Sweep):
                stages += await self._sweep(load)
            else:
                stages += await self._repeat(load, self.scenario.configs)
        return stages

    # ---- Stages

    async def _repeat(self, load: Closed | Open, configs: Sequence[Config]) -> list[Stage]:
        stages = []
        for repetition in range(self.scenario.repetitions):
            for config in self._rng.sample(configs, len(configs)):
                stages.append(await self._stage(config, load, repetition))
        return stages

    async def _sweep(self, sweep: Sweep) -> list[Stage]:
        """Raise the concurrency; a config drops out when it gives no more answers per second."""
        stages: list[Stage] = []
        best = dict.fromkeys((config.name for config in self.scenario.configs), 0.0)
        configs = self.scenario.configs
        for level in sweep.levels():
            new_stages = await self._repeat(level, configs)
            stages += new_stages
            faster = []
            for config in configs:
                rates = sorted(answers_per_second(stage) for stage in new_stages if stage.config == config.name)
                median = rates[len(rates) // 2]
                if median > best[config.name] * (1 + sweep.gain):
                    faster.append(config)
                best[config.name] = max(best[config.name], median)
            configs = tuple(faster)
            if not configs:
                break
        return stages

    async def _stage(self, config: Config, load: Closed | Open, repetition: int) -> Stage:
        target_load = load.concurrency if isinstance(load, Closed) else load.rate
        stage = Stage(config.name, load.label, target_load, isinstance(load, Open), repetition)
        # Every config has the same order of questions, and in an open loop the same times.
        rng = random.Random(f"{self.scenario.seed}/{load.label}/{repetition}")
        order = [question.index for question in self.task.questions]
        rng.shuffle(order)
        if self.records.recall(stage):
            self.progress.stage_began(stage, len(order))
        else:
            asked = {question.index for question in stage.questions}
            missing = [index for index in order if index not in asked]
            if missing:
                await self._warm_up(config, load, order)
            self.progress.stage_began(stage, len(order))
            await self._measure(stage, config, load, missing, arrival_seed=rng.getrandbits(32))
            # Checked only now: during the load, checks would compete with it for the processor.
            await asyncio.gather(*(self._check(question) for question in stage.questions))
            self.records.stage_ended(stage)
        self.progress.stage_ended(stage)
        return stage

    async def _measure(
        self, stage: Stage, config: Config, load: Closed | Open, order: Sequence[int], arrival_seed: int
    ) -> None:
        """Ask the questions of `order` under the load, as a part of the stage, and fill `stage`."""
        part = 1 + max((question.part for question in stage.questions), default=0)
        before = await self._server_counters()
        began = time.monotonic()

        async def ask(index: int, due: float) -> MeasuredQuestion:
            question = await self._ask(config, index, due, began, stage.repetition)
            question.part = part
            stage.questions.append(question)
            self.records.question_ended(stage, question)
            return question

        stage.scheduling_delays = await run_load(load, order, ask, began, arrival_seed)
        after = await self._server_counters()
        if before and after and part == 1:  # what the server counted in a part that broke off is not known
            stage.counted_output_tokens = after[0] - before[0]
            stage.counted_prompt_tokens = after[1] - before[1]
        stage.seconds = seconds_of(stage.questions)

    async def _warm_up(self, config: Config, load: Closed | Open, order: Sequence[int]) -> None:
        """Send the same requests with other seeds, at most as many at a time as in the stage."""
        indices = [order[i % len(order)] for i in range(self.scenario.warmup)] if order else []
        concurrency = load.concurrency if isinstance(load, Closed) else max(1, len(indices))

        async def ask(index: int, due: float) -> MeasuredQuestion:
            return await self._ask(config, index, due, began, self._warm_up_repetition)

        began = time.monotonic()
        await run_load(Closed(type="closed", concurrency=concurrency), indices, ask, began, 0)

    async def _server_counters(self) -> tuple[int, int] | None:
        """Return output and prompt tokens by the server's own counters, over all its clients."""
        try:
            metrics = await self.client.get(f"{self.client.server}/metrics")
        except ScenarioError:
            return None
        return counted_tokens(metrics.decode(errors="replace"))

    # ---- Questions

    async def _ask(self, config: Config, index: int, due: float, began: float, repetition: int) -> MeasuredQuestion:
        question = MeasuredQuestion(index, scheduled=due)
        count = config.vote.n if config.vote else 1
        bodies = self._seeded(config, index, repetition, count)
        question.requests = list(await asyncio.gather(*(self.client.send(body, began) for body in bodies)))
        find = config.vote.answer.extract if config.vote and config.vote.answer else self.task.find
        question.reply = vote_winner(question.requests, find)
        question.answer = find(question.reply.text) if question.reply else None
        return question

    def _seeded(self, config: Config, index: int, repetition: int, count: int) -> list[dict[str, Any]]:
        """Return the bodies of a question's requests, each with a seed unless the scenario's is null."""
        body = self.body(config, index)
        if self.scenario.sends_no_seed(config):
            return [body] * count
        seeds = self.scenario.seeds(repetition, index, len(self.task.questions))
        return [body | {"seed": next(seeds)} for _ in range(count)]

    def body(self, config: Config, index: int) -> dict[str, Any]:
        """Return the body of a config's request for one question, without its seed."""
        question = self.task.questions[index]
        system = [{"role": "system", "content": self.scenario.system}] if self.scenario.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": question.text}],
            "stream": self.scenario.stream,
            "stream_options": {"include_usage": True},
        }
        if question.max_tokens is not None:
            body |= {"max_tokens": question.max_tokens, "ignore_eos": True}
        body |= self.scenario.request | config.body
        if config.name in self.calibration:
            body["temperature"] = self.calibration[config.name].temperature
        if not body["stream"]:
            del body["stream_options"]
        return {name: value for name, value in body.items() if value is not None}

    async def _check(self, measured: MeasuredQuestion) -> None:
        question = self.task.questions[measured.index]
        if question.answer is not None:
            verdict = await self.task.check(question, measured.reply.text) if measured.reply else None
            measured.correct = verdict is not None and verdict.correct
            measured.problem = verdict.problem if verdict else None

    # ---- Matched temperatures

    async def _calibrate(self, config: Config) -> None:
        target = next(other for other in self.scenario.configs if other.name == config.match_entropy_of)

        async def send(body: dict[str, Any]) -> MeasuredRequest:
            return await self.client.send(body, time.monotonic())

        found = await find_temperature(
            send,
            self._warm_up_bodies(target),
            self._warm_up_bodies(config),
            config.name,
            calibration_concurrency(self.scenario),
            self.progress.pass_began,
        )
        self.calibration[config.name] = found
        self.progress.calibration_ended(config.name, found)

    def _warm_up_bodies(self, config: Config) -> list[dict[str, Any]]:
        indices = [question.index for question in self.task.questions]
        return [self._seeded(config, index, self._warm_up_repetition, 1)[0] for index in indices]


def vote_winner(requests: Sequence[MeasuredRequest], find: Callable[[str], str | None]) -> MeasuredRequest | None:
    """Return the request whose reply the user gets: the first complete one with the most frequent answer.

    Without any answer it is the first complete one. Ties go to the answer that came up first: a client does not know
    which answer the model finds more likely.
    """
    complete = [request for request in requests if request.status == "ok"]
    vote, first = Vote(), dict[str, MeasuredRequest]()
    for request in complete:
        answer = find(request.text)
        if answer is not None:
            vote.add(answer, tie_break=0.0)
            first.setdefault(answer, request)
    ranking = vote.ranking()
    return first[ranking[0]] if ranking else next(iter(complete), None)


def answers_per_second(stage: Stage) -> float:
    """Return the questions answered per second; 0 if the stage took no time."""
    answered = sum(question.status == "ok" for question in stage.questions)
    return answered / stage.seconds if stage.seconds else 0.0
