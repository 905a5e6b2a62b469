"""Problems against Python's arithmetic, and the checker on hostile replies."""

import ast
import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.problems import (
    LARGEST_VALUE,
    OPERATOR_COUNTS,
    Problem,
    Route,
    Split,
    check,
    extract_answer,
    problems,
    solve,
    split_of,
)

OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
SPLITS: tuple[Split, ...] = ("train", "held_out")
SEVEN = Problem("3+4", "3+4=7\n\\boxed{7}", 7)


def value_of(expression: str) -> int:
    """Return the chain's value by Python's parser, independent of `solve`."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        assert isinstance(node, ast.Constant) and isinstance(node.value, int)
        return node.value

    return walk(ast.parse(expression, mode="eval").body)


def digest(split: Split) -> str:
    text = "\n\n".join(f"{p.question}\n{p.solution}\n{p.answer}" for p in problems(split, 1000, seed=7))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("n", [800, pytest.param(8_000, marks=pytest.mark.slow)])
def test_splits_share_no_question_whatever_the_seeds(n: int) -> None:
    train = {p.question for seed in (1, 2) for p in problems("train", n, seed)}
    held_out = {p.question for seed in (1, 2, 3) for p in problems("held_out", n // 2, seed)}
    assert len(train) > n and len(held_out) > n // 2  # many different chains, not a few repeated ones
    assert not train & held_out


def test_spaces_do_not_change_the_split() -> None:
    for problem in problems("held_out", 200, seed=5):
        assert split_of(re.sub(r"([-+*])", r" \1 ", problem.question)) == "held_out"


@pytest.mark.parametrize(("split", "pinned"), [("train", "d363d865552b5173"), ("held_out", "799b148cdbfcab7b")])
def test_the_generator_is_pinned(split: Split, pinned: str) -> None:
    assert digest(split) == pinned


def test_more_problems_begin_with_the_same_ones_and_seeds_differ() -> None:
    assert problems("held_out", 50, seed=1) == problems("held_out", 500, seed=1)[:50]
    assert problems("held_out", 50, seed=1) != problems("held_out", 50, seed=2)


@pytest.mark.parametrize("route", ["left", "right"])
def test_worked_solutions_agree_with_python(route: Route) -> None:
    for problem in problems("train", 2000, seed=11) + problems("held_out", 2000, seed=11):
        worked = solve(problem.question, route)
        if worked is None:  # from the other end a step may exceed the range
            assert route == "right"
            continue
        *steps, box = worked.solution.split("\n")
        assert worked.answer == problem.answer == value_of(problem.question)
        assert box == f"\\boxed{{{worked.answer}}}"
        assert len(steps) == len(re.findall(r"[-+*]", problem.question))
        for step in steps:
            left, right = step.split("=")
            assert value_of(left) == int(right)
            assert abs(int(right)) <= LARGEST_VALUE
        assert int(steps[-1].split("=")[1]) == worked.answer


@pytest.mark.parametrize(
    ("question", "route", "solution"),
    [
        ("12+7*3-4", "left", "7*3=21\n12+21=33\n33-4=29\n\\boxed{29}"),
        ("12+7*3-4", "right", "7*3=21\n21-4=17\n12+17=29\n\\boxed{29}"),
        ("5-2*3*4+1-9", "left", "2*3=6\n6*4=24\n5-24=-19\n-19+1=-18\n-18-9=-27\n\\boxed{-27}"),
        ("5-2*3*4+1-9", "right", "3*4=12\n2*12=24\n1-9=-8\n-24-8=-32\n5-32=-27\n\\boxed{-27}"),
    ],
)
def test_products_are_worked_first_and_then_sums_from_one_end(question: str, route: Route, solution: str) -> None:
    worked = solve(question, route)
    assert worked is not None
    assert worked.solution == solution


def test_a_chain_whose_steps_exceed_the_range_has_no_solution() -> None:
    assert solve("99*99") is None
    assert solve("1-40*20-300") is None


def test_training_has_every_length_and_held_out_the_longest() -> None:
    train, held_out = (
        Counter(len(re.findall(r"[-+*]", p.question)) for p in problems(split, 1000, seed=9)) for split in SPLITS
    )
    assert set(train) == set(OPERATOR_COUNTS)
    assert set(held_out) == {max(OPERATOR_COUNTS)}
    assert min(*train.values(), *held_out.values()) >= 30


@pytest.mark.parametrize(
    "reply",
    [
        "\\boxed{7}",
        "3+4=7\n\\boxed{7}",
        "\\boxed{8} no, \\boxed{7}",
        "\\boxed{ 7 }",
        "\\boxed{007}",
        "\\boxed{+7}",
        "\\boxed{7}\nThat is my answer, not 8.",
        "\\boxed{7} and an open \\boxed{8",
        "$\\boxed{7}$.",
    ],
)
def test_right_replies_pass(reply: str) -> None:
    assert check(SEVEN, reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "7",
        "The answer is 7.",
        "boxed{7}",
        "\\boxed{}",
        "\\boxed{-7}",
        "\\boxed{77}",
        "\\boxed{7 7}",
        "\\boxed{7.0}",
        "\\boxed{3+4}",
        "\\boxed{7, 8}",
        "\\boxed{7} wait, \\boxed{8}",
        "\\boxed{7} wait, \\boxed{none}",
        "\\boxed{7",
        "\\boxed7",
        "\\boxed{\\boxed{8}} 7",
        "\\boxed{\u0667}",  # a digit to int(), but not one the model can write
        "\\boxed{1_0}",
        "\\boxed{" + "9" * 5000 + "}",  # int() raises ValueError for that many digits
    ],
)
def test_wrong_replies_fail(reply: str) -> None:
    assert not check(SEVEN, reply)


@pytest.mark.parametrize(("inside", "answer"), [("-7", -7), ("- 7", -7), ("-007", -7), ("0", 0), ("-0", 0)])
def test_signs_are_read(inside: str, answer: int) -> None:
    assert extract_answer(f"\\boxed{{{inside}}}") == answer


@given(st.text(), st.integers(-(10**17), 10**17))
def test_any_text_before_a_box_leaves_its_answer(text: str, answer: int) -> None:
    assert extract_answer(f"{text}\\boxed{{{answer}}}") == answer
