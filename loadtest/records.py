"""The records of a run, written while it runs, from which a killed run resumes.

requests.jsonl has the questions of the stages that ended, unfinished.jsonl those of the others, and run.jsonl the rest.
"""

import fcntl
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from loadtest.calibrate import Calibration
from loadtest.inputs import shortened
from loadtest.measurements import MeasuredQuestion, Stage, seconds_of
from loadtest.record_lines import append, damaged, json_line, line_of, question_of, read_lines
from loadtest.scenario import Scenario, ScenarioError, Sweep, first_problem
from loadtest.storage import write_text
from loadtest.tasks.base import Question

RUN, REQUESTS, UNFINISHED = "run.jsonl", "requests.jsonl", "unfinished.jsonl"
DELAY_QUANTILES = 101  # 0 % to 100 %: a closed load has 100 delays a second, and their p99 must stay exact
# Kinds of errors by which a server that ended, or a proxy before it, shows that it is gone. vLLM answers with 500 from
# when its engine has died until its process ends.
GONE = {"connection", "broke off", "error in the stream", "HTTP 500", "HTTP 502", "HTTP 503", "HTTP 504"}

StageKey = tuple[str, str, int]  # config, load, repetition
Existing = Literal["refuse", "resume", "restart"]  # what to do if there are records of an unfinished run
_CALIBRATION = TypeAdapter(Calibration)


class _EndedStage(BaseModel):
    """What run.jsonl has of a stage that ended, beside its questions in requests.jsonl."""

    model_config = ConfigDict(extra="forbid", strict=True)

    arm: str
    load: str
    repetition: int
    questions: int  # how many requests.jsonl has
    scheduling_delays: list[float]  # quantiles
    counted_output_tokens: int | None
    counted_prompt_tokens: int | None


def describe_run(scenario: Scenario, model: str, questions: Sequence[Question]) -> dict[str, Any]:
    """Describe what a run measures. Questions count by their content: a file may change, or move."""
    content = repr([(one.text, one.answer, one.max_tokens) for one in questions])
    return {
        "scenario": _dumped(scenario),
        "model": model,
        "questions_sha256": hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest(),
    }


def check_resumable(scenario: Scenario) -> None:
    """Raise a ScenarioError if two loads have the same label: their records could not be told apart."""
    levels = [load.levels() if isinstance(load, Sweep) else [load] for load in scenario.loads]
    label, count = Counter(load.label for load in chain.from_iterable(levels)).most_common(1)[0]
    if count > 1:
        raise ScenarioError(f"loads: {label} is there {count} times; --resume needs loads that differ")


def is_gone(question: MeasuredQuestion) -> bool:
    """Return whether a question has a request that the server did not answer because it was gone."""
    return any(request.error and request.error.split(": ")[0] in GONE for request in question.requests)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing records to a folder until the block ends, or this process.

    Raises:
        ScenarioError: if another process writes to it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ScenarioError(f"{folder}: another em-loadtest writes its records there; wait for it, or end it") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


class Records:
    """The records in a run's folder: those of earlier sittings, and those that are being written."""

    def __init__(self, folder: Path, about: dict[str, Any], existing: Existing) -> None:
        """Read what is there, and make the files ready to be appended to.

        Raises:
            ScenarioError: if there are records of an unfinished run and `existing` says to refuse, if they are of
                another run, or if they are damaged.
        """
        self.folder = folder
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.calibration: dict[str, Calibration] = {}
        self._about = about
        self._ended: dict[StageKey, tuple[_EndedStage, list[MeasuredQuestion]]] = {}
        self._begun: dict[StageKey, list[MeasuredQuestion]] = defaultdict(list)
        if existing == "resume":
            self._read()
        elif existing == "refuse" and _is_unfinished(folder):
            problem = "has the records of an unfinished run; --resume goes on with it, --restart begins anew"
            raise ScenarioError(f"{folder}: {problem}")
        self._rewrite()

    # ---- What the runner asks and tells

    def recall(self, stage: Stage) -> bool:
        """Fill a stage with what earlier sittings measured; return whether it has ended."""
        key = _key(stage)
        if key not in self._ended:
            stage.questions = list(self._begun.get(key, []))
            return False
        ended, stage.questions = self._ended[key]
        stage.seconds = seconds_of(stage.questions)
        stage.scheduling_delays = ended.scheduling_delays
        stage.counted_output_tokens = ended.counted_output_tokens
        stage.counted_prompt_tokens = ended.counted_prompt_tokens
        return True

    def calibrated(self, config: str, found: Calibration) -> None:
        """Record a matched temperature."""
        append(self.folder / RUN, [_calibration_row(config, found)])

    def question_ended(self, stage: Stage, question: MeasuredQuestion) -> None:
        """Record a question whose answer is not checked yet."""
        append(self.folder / UNFINISHED, [_row(_key(stage), question)], durable=False)

    def stage_ended(self, stage: Stage) -> None:
        """Record a stage with its checked answers. Its line in run.jsonl comes last: without it, it has not ended."""
        key = _key(stage)
        append(self.folder / REQUESTS, (_row(key, question) for question in stage.questions))
        append(self.folder / RUN, [{"stage": _ended(stage).model_dump()}])
        self._begun.pop(key, None)
        if not self._begun:  # otherwise the lines stay; those of stages that have ended are not read
            os.truncate(self.folder / UNFINISHED, 0)

    def run_ended(self) -> None:
        """Record that nothing is left to be asked again."""
        append(self.folder / RUN, [{"complete": True}])
        (self.folder / UNFINISHED).unlink()

    # ---- What earlier sittings left

    def _read(self) -> None:
        ended = self._read_run()
        requests, unfinished = (_questions(self.folder / name) for name in (REQUESTS, UNFINISHED))
        for key, stage in ended.items():
            questions = requests.get(key, [])
            if len(questions) != stage.questions:
                problem = f"has {len(questions)} questions of {' / '.join(map(str, key))}, {RUN} says {stage.questions}"
                raise ScenarioError(f"{self.folder / REQUESTS}: {problem} (--restart begins anew)")
            if any(map(is_gone, questions)):
                unfinished[key] = questions
            else:
                self._ended[key] = stage, questions
        for key in unfinished.keys() - self._ended.keys():
            self._begun[key] = [question for question in unfinished[key] if not is_gone(question)]

    def _read_run(self) -> dict[StageKey, _EndedStage]:
        """Read run.jsonl; return the stages that ended."""
        path, ended = self.folder / RUN, dict[StageKey, _EndedStage]()
        for number, row in read_lines(path):
            try:
                match row:
                    case {"about": dict(earlier), "started": str(started)}:
                        self._check_same(earlier)
                        self.started = started
                    case {"calibration": dict(found), "arm": str(config)}:
                        self.calibration[config] = _CALIBRATION.validate_python(found)
                    case {"stage": dict(fields)}:
                        stage = _EndedStage.model_validate(fields)
                        ended[stage.arm, stage.load, stage.repetition] = stage
                    case {"complete": True}:
                        pass
                    case _:
                        raise damaged(path, number, f"got {shortened(row)}; is no record of a run")
            except ValidationError as error:
                raise damaged(path, number, first_problem(error)) from None
        return ended

    def _check_same(self, earlier: dict[str, Any]) -> None:
        scenario = Scenario.model_validate(earlier.get("scenario"))  # fields that are newer have their defaults
        earlier = earlier | {"scenario": _dumped(scenario)}
        if (found := _first_difference(_measured(earlier, earlier), _measured(self._about, earlier), "")) is not None:
            place, before, now = found
            problem = f"{place}: got {shortened(now)}; the records have {shortened(before)}"
            raise ScenarioError(f"{self.folder}: has the records of another run: {problem} (--restart begins anew)")

    def _rewrite(self) -> None:
        """Write what is known, without torn lines and what is asked again.

        unfinished.jsonl comes first: as long as run.jsonl says that a stage has ended, its questions are read there.
        """
        unfinished = [_row(key, question) for key, questions in self._begun.items() for question in questions]
        run = [{"about": self._about, "started": self.started}]
        run += [_calibration_row(config, found) for config, found in self.calibration.items()]
        run += [{"stage": stage.model_dump()} for stage, _ in self._ended.values()]
        requests = [_row(key, question) for key, (_, questions) in self._ended.items() for question in questions]
        for name, rows in ((UNFINISHED, unfinished), (RUN, run), (REQUESTS, requests)):
            write_text(self.folder / name, "".join(map(json_line, rows)))


def _is_unfinished(folder: Path) -> bool:
    """Return whether something was measured, and the run did not end. A damaged line counts: it may be of use."""
    try:
        rows = [row for _, row in read_lines(folder / RUN)]
    except ScenarioError:
        return True
    if {"complete": True} in rows:
        return False
    unfinished = folder / UNFINISHED
    return len(rows) > 1 or (unfinished.exists() and unfinished.stat().st_size > 0)


# ---- Rows


def _key(stage: Stage) -> StageKey:
    return stage.config, stage.load, stage.repetition


def _dumped(scenario: Scenario) -> dict[str, Any]:
    return scenario.model_dump(mode="json", by_alias=True)


def _measured(about: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return what decides what earlier sittings measured: arms that are new and what is compared with what do not."""
    known = [arm["name"] for arm in earlier["scenario"]["arms"]]
    arms = {arm["name"]: arm for arm in about["scenario"]["arms"] if arm["name"] in known}
    return about | {"scenario": about["scenario"] | {"arms": arms, "references": None}}


def _row(key: StageKey, question: MeasuredQuestion) -> dict[str, Any]:
    return dict(zip(("arm", "load", "repetition"), key, strict=True)) | line_of(question)


def _calibration_row(config: str, found: Calibration) -> dict[str, Any]:
    return {"calibration": asdict(found), "arm": config}


def _ended(stage: Stage) -> _EndedStage:
    delays = stage.scheduling_delays
    quantiles = np.quantile(delays, np.linspace(0, 1, DELAY_QUANTILES)).tolist() if delays else []
    return _EndedStage(
        arm=stage.config,
        load=stage.load,
        repetition=stage.repetition,
        questions=len(stage.questions),
        scheduling_delays=quantiles,
        counted_output_tokens=stage.counted_output_tokens,
        counted_prompt_tokens=stage.counted_prompt_tokens,
    )


def _questions(path: Path) -> dict[StageKey, list[MeasuredQuestion]]:
    """Read the questions of a file, by stage."""
    found: dict[StageKey, list[MeasuredQuestion]] = defaultdict(list)
    for number, row in read_lines(path):
        try:
            match row:
                case {"arm": str(config), "load": str(load), "repetition": int(repetition)}:
                    found[config, load, repetition].append(question_of(row))
                case _:
                    raise ValueError("arm, load, repetition: must be of a stage")
        except ValidationError as error:
            raise damaged(path, number, first_problem(error)) from None
        except ValueError as error:
            raise damaged(path, number, error) from None
    return found


def _first_difference(before: Any, now: Any, place: str) -> tuple[str, Any, Any] | None:
    """Return the first field that differs, with both values; None if there is none. An absent field is as null."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for name in now | before:
            found = _first_difference(before.get(name), now.get(name), f"{place}.{name}" if place else str(name))
            if found is not None:
                return found
        return None
    return None if before == now else (place, before, now)
