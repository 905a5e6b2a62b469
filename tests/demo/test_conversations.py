"""Training conversations: from the training split alone, each reply right."""

import random
import re
from itertools import islice

from demo.conversations import BARE_SHARE, RIGHT_SHARE, Turn, _varied, training_stream
from demo.problems import check, solve, split_of, stream

CONVERSATIONS = list(islice(training_stream(seed=5), 4000))
CHAIN = re.compile(r"[0-9]+(?:[-+*][0-9]+)+")


def chains_in(text: str) -> list[str]:
    return CHAIN.findall(re.sub(r" ([-+*]) ", r"\1", text))


def test_no_held_out_question_is_asked() -> None:
    asked = [
        chain for turns in CONVERSATIONS for turn in turns if turn.role == "user" for chain in chains_in(turn.text)
    ]
    assert len(asked) >= len(CONVERSATIONS)
    assert all(split_of(chain) == "train" for chain in asked)


def test_each_reply_answers_the_last_question_asked() -> None:
    for turns in CONVERSATIONS:
        question = ""
        for role, text in turns:
            question = (chains_in(text) or [question])[-1] if role == "user" else question
            if role == "assistant":
                problem = solve(question)
                assert problem is not None
                assert check(problem, text)


def test_most_ask_the_bare_chain_and_the_others_vary() -> None:
    bare = [turns for turns in CONVERSATIONS if len(turns) == 2 and CHAIN.fullmatch(turns[0].text)]
    assert BARE_SHARE - 0.05 < len(bare) / len(CONVERSATIONS) < BARE_SHARE + 0.1
    assert any(turns[0].role == "system" for turns in CONVERSATIONS)
    assert any(sum(turn.role == "user" for turn in turns) == 2 for turns in CONVERSATIONS)


def test_sums_are_worked_from_both_ends() -> None:
    replies = [(chains_in(turns[0].text), turns[1].text) for turns in CONVERSATIONS if turns[0].role == "user"]
    distinct = [
        (text == left.solution, text == right.solution)
        for (question, *_), text in replies
        if (left := solve(question)) and (right := solve(question, "right")) and left.solution != right.solution
    ]
    assert len(distinct) > len(replies) / 2
    assert all(from_left or from_right for from_left, from_right in distinct)
    share = sum(from_right for _, from_right in distinct) / len(distinct)
    assert RIGHT_SHARE - 0.05 < share < RIGHT_SHARE + 0.05


def test_every_character_is_one_token() -> None:
    assert all(turn.text.isascii() for turns in CONVERSATIONS for turn in turns)


def test_the_stream_is_seeded() -> None:
    assert list(islice(training_stream(seed=5), 50)) == CONVERSATIONS[:50]
    assert list(islice(training_stream(seed=6), 50)) != CONVERSATIONS[:50]


def test_turns_alternate_after_the_system_message() -> None:
    problems = stream("train", seed=2)
    varied = [_varied(random.Random(seed), next(problems), problems) for seed in range(300)]
    for turns in varied:
        roles = [turn.role for turn in turns if turn != Turn("system", turns[0].text)]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
