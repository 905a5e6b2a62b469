"""Finds the answer in a reply off the event loop: how long that takes is up to the client's pattern and the reply."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from answers.extract import Answer

logger = logging.getLogger(__name__)

THREADS = 4  # of their own, so that answers do not keep vLLM's default executor busy
TIMEOUT_S = 10.0  # then the reply counts as one without an answer

_executor = ThreadPoolExecutor(THREADS, thread_name_prefix="em-inf-answer")


async def find_answer(answer: Answer, reply: str) -> str | None:
    """Return the reply's answer; None if it has none, or if none is found in TIMEOUT_S.

    A thread cannot be stopped: what ends one that is late is the bound on the work of `Answer.extract`. Each request
    looks for one answer at a time, so that one with many branches leaves threads to the others.
    """
    found = asyncio.get_running_loop().run_in_executor(_executor, answer.extract, reply)
    try:
        return await asyncio.wait_for(found, TIMEOUT_S)
    except TimeoutError:
        logger.warning("em_inf: no answer found in %g s in a reply of %d characters", TIMEOUT_S, len(reply))
        return None
