"""Checks replies with a checker, for its tests."""

import asyncio

from loadtest.tasks.text_checkers import TextChecker, Verdict


def check(checker: TextChecker, answer: str, *replies: str) -> list[bool]:
    """Return whether each reply has the answer."""
    return [verdict.correct for verdict in verdicts(checker, answer, *replies)]


def verdicts(checker: TextChecker, answer: str, *replies: str) -> list[Verdict]:
    """Return the verdict on each reply."""
    expected = checker.normalize(answer)
    assert expected is not None

    async def check_all() -> list[Verdict]:
        return list(await asyncio.gather(*(checker.check(expected, reply) for reply in replies)))

    return asyncio.run(check_all())
