"""Checks replies with a checker, for its tests."""

import asyncio

from loadtest.tasks.text_checkers import TextChecker


def check(checker: TextChecker, answer: str, *replies: str) -> list[bool]:
    """Return whether each reply has the answer."""
    expected = checker.normalize(answer)
    assert expected is not None

    async def check_all() -> list[bool]:
        return list(await asyncio.gather(*(checker.check(expected, reply) for reply in replies)))

    return asyncio.run(check_all())
