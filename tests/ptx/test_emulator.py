"""The emulator must refuse what is wrong, accept what is right, and compute as the PTX manual says."""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from harness.stub_driver import Launch
from tests.ptx.approximations import Approximations
from tests.ptx.emulator import Emulator
from tests.ptx.instructions import RULES
from tests.ptx.memory import KernelError

# Before each body: %r0 the thread, %r1 the CTA, %rd0 and %rd1 two tensors, %rd2 and %rd3 the thread's and the CTA's
# place in the first, 4 bytes each.
PTX = """
.visible .entry kernel(
    .param .u64 kernel_param_0,
    .param .u64 kernel_param_1
)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<20>;
    .loc 1 1 1 // a comment
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r19, %nctaid.x;
    ld.param.b64 %rd0, [kernel_param_0];
    ld.param.b64 %rd1, [kernel_param_1];
    mad.wide.u32 %rd2, %r0, 4, %rd0;
    mad.wide.u32 %rd3, %r1, 4, %rd0;
    BODY
    ret;
}
"""


def emulated(body: str, ctas: int = 1) -> npt.NDArray[np.int32]:
    """Run 64 threads of each CTA; return the first tensor."""
    first, second = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    Emulator()(Launch("kernel", PTX.replace("BODY", body), 64, 512, (ctas, 1, 1), [first, second]))
    return first.numpy()


NEIGHBOUR = "xor.b32 %r2, %r0, 32; mad.wide.u32 %rd4, %r2, 4, %rd0;"  # of the other warp
SHARED = "shl.b32 %r3, %r0, 2; xor.b32 %r4, %r3, 128; xor.b32 %r5, %r3, 4;"  # own place, other warp's, same warp's
FIRST_THREAD = "setp.eq.b32 %p1, %r0, 0;"
ADD = "red.global.gpu.relaxed.add.u32"
RACES = {
    "CTAs write to one place": ("st.global.b32 [%rd2], %r0;", 2),
    "a CTA reads what another has written": (
        f"{FIRST_THREAD} xor.b32 %r2, %r1, 1; mad.wide.u32 %rd4, %r2, 4, %rd0; @%p1 st.global.b32 [%rd3], %r0;"
        "bar.sync 0; ld.global.b32 %r5, [%rd4];", 2,
    ),
    "an atomic does not order CTAs": (f"ld.global.b32 %r5, [%rd3]; bar.sync 0; {ADD} [%rd0+4], 1;", 2),
    "threads write numbers to one place": ("st.global.b32 [%rd3], %r0;", 1),
    "a thread reads what another has written": (
        f"{NEIGHBOUR} st.global.b32 [%rd2], %r0; ld.global.b32 %r5, [%rd4];", 1,
    ),
    "a thread writes where another has read": (
        f"{NEIGHBOUR} ld.global.b32 %r5, [%rd4]; st.global.b32 [%rd2], %r0;", 1,
    ),
    "a thread writes where many have read": (
        f"ld.global.b32 %r5, [%rd0]; {FIRST_THREAD} @%p1 st.global.b32 [%rd3], %r0;", 1,
    ),
    "half of a wider number": (f"{FIRST_THREAD} @%p1 ld.global.b64 %rd5, [%rd0]; @!%p1 st.global.b32 [%rd2], %r0;", 1),
    "an atomic, then a read": (f"{ADD} [%rd0], 1; ld.global.b32 %r5, [%rd0];", 1),
    "a read, then an atomic": (f"ld.global.b32 %r5, [%rd0]; {ADD} [%rd0], 1;", 1),
    "shared memory, another warp's read": (f"{SHARED} st.shared.b32 [%r3], %r0; ld.shared.b32 %r5, [%r4];", 1),
    "shared memory, the same warp's read": (f"{SHARED} st.shared.b32 [%r3], %r0; ld.shared.b32 %r5, [%r5];", 1),
    "shared memory, a write": (f"{SHARED} ld.shared.b32 %r5, [%r4]; st.shared.b32 [%r3], %r0;", 1),
    "shared memory, one place": ("mov.b32 %r3, 0; st.shared.b32 [%r3], %r0;", 1),
    "shared memory, a byte": (f"{SHARED} st.shared.b8 [%r3+1], %rs0; ld.shared.b32 %r5, [%r4];", 1),
    "a matrix": (
        f"{SHARED} shl.b32 %r4, %r3, 2; and.b32 %r4, %r4, 511; st.shared.b32 [%r3], %r0;"
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r4];", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RACES)
def test_a_race_is_refused(case: str) -> None:
    with pytest.raises(KernelError, match=r"^kernel: race: "):
        emulated(*RACES[case])


ORDERED = {
    "own places": ("st.global.b32 [%rd2], %r0; ld.global.b32 %r5, [%rd2]; st.global.b32 [%rd2], %r5;", 1),
    "a barrier": (f"{NEIGHBOUR} st.global.b32 [%rd2], %r0; bar.sync 0; ld.global.b32 %r5, [%rd4];", 1),
    "reads": ("ld.global.b32 %r5, [%rd0];", 3),
    "threads write one number": ("st.global.b32 [%rd3], 7;", 1),
    "a barrier after many have read": (
        f"ld.global.b32 %r5, [%rd0]; bar.sync 0; {FIRST_THREAD} @%p1 st.global.b32 [%rd0], %r0;", 1,
    ),
    "atomics": (f"{ADD} [%rd0], 1;", 3),
    "an atomic, a barrier, a read": (f"{ADD} [%rd0], 1; bar.sync 0; ld.global.b32 %r5, [%rd0];", 1),
    "shared memory": (f"{SHARED} st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r5, [%r4];", 1),
    "shared memory of two CTAs": (f"{SHARED} st.shared.b32 [%r3], %r0;", 2),
}  # fmt: skip


@pytest.mark.parametrize("case", ORDERED)
def test_what_is_ordered_is_no_race(case: str) -> None:
    emulated(*ORDERED[case])


ILLEGAL = {
    "past the end": ("ld.global.b32 %r5, [%rd2+4];", "out of bounds"),
    "before the start": ("ld.global.b32 %r5, [%rd2+-4];", "out of bounds"),
    "a vector past the end": (
        "mad.wide.u32 %rd4, %r0, 8, %rd0; ld.global.v2.b32 {%r5, %r6}, [%rd4];", "out of bounds",
    ),
    "a write": ("st.global.b32 [%rd2+4], %r0;", "out of bounds"),
    "an atomic": (f"{ADD} [%rd2+4], 1;", "out of bounds"),
    "a misaligned number": ("ld.global.b32 %r5, [%rd0+2];", "misaligned"),
    "a misaligned vector": ("ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd0+8];", "misaligned"),
    "shared memory": ("mov.b32 %r3, 512; ld.shared.b32 %r5, [%r3];", "out of bounds"),
    "misaligned in shared memory": ("mov.b32 %r3, 4; st.shared.v2.b32 [%r3], {%r0, %r0};", "misaligned"),
    "a misaligned matrix": ("mov.b32 %r3, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r3];", "misaligned"),
    "a barrier that not all threads come to": (f"{FIRST_THREAD} @%p1 bra $END; bar.sync 0; $END:", "barrier"),
}  # fmt: skip


@pytest.mark.parametrize("case", ILLEGAL)
def test_what_a_gpu_would_not_do_is_refused(case: str) -> None:
    body, message = ILLEGAL[case]
    with pytest.raises(KernelError, match=message):
        emulated(body)


@pytest.mark.parametrize(
    "text",
    [
        "wgmma.fence.sync.aligned",
        "add.rz.f32 %r5, %r6, %r7",
        "max.NaN.f32 %r5, %r6, %r7",
        "mul.hi.u32 %r5, %r0, 3",
        "atom.global.gpu.acquire.add.u32 %r5, [%rd0], 1",
        "atom.global.gpu.relaxed.max.u32 %r5, [%rd0], 1",
        "ld.global.b16 %rs5, [%rd0]",
        "ld.volatile.global.b32 %r5, [%rd0]",
        "ld.b32 %r5, [%rd0]",
        "mov.u32 %r5, %clock",
        "mov.b32 %r5, somewhere",
        "bar.sync 1",
        "@%p1 bar.sync 0",
    ],
)
def test_what_is_not_emulated_is_named(text: str) -> None:
    with pytest.raises(NotImplementedError, match=text.rpartition("@%p1 ")[2].replace("[", r"\[")):
        emulated(f"{text};")


LANE = np.arange(64)
REAL = LANE.astype(np.float32)
QUARTERS = "cvt.rn.f32.u32 %r6, %r0; mul.rn.f32 %r6, %r6, 0f3E800000;"  # %r6: a quarter of the thread's number
NAN = "mov.b32 %r6, 0f7FC00000;"
# Whether it holds between 0 and 1, 1 and 1, 2 and 1, NaN and 1.
COMPARISONS = {
    "eq": "0100", "ne": "1010", "lt": "1000", "le": "1100", "gt": "0010", "ge": "0110",
    "equ": "0101", "neu": "1011", "ltu": "1001", "leu": "1101", "gtu": "0011", "geu": "0111",
}  # fmt: skip
# %r5 in the end, as int32 or float32.
RESULTS: dict[str, Any] = {
    "add.s32 %r5, %r0, -70;": LANE - 70,
    "sub.s32 %r5, 7, %r0;": 7 - LANE,
    "mul.lo.s32 %r5, %r0, -3;": -3 * LANE,
    "mul.wide.s32 %rd5, %r0, -3; cvt.u32.u64 %r5, %rd5;": -3 * LANE,
    "mul.hi.s32 %r5, %r0, 0x60000000;": LANE * 3 // 8,
    "mul.hi.s32 %r5, -9, %r0;": np.where(LANE == 0, 0, -1),
    "mov.u32 %r5, %r19;": 1,
    "mul.wide.u32 %rd5, %r0, -1; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r5, %rd5;": np.maximum(LANE - 1, 0),
    "mad.lo.s32 %r5, %r0, -3, 7;": 7 - 3 * LANE,
    "cvt.s64.s32 %rd5, -9; mad.wide.s32 %rd5, %r0, -3, %rd5; cvt.u32.u64 %r5, %rd5;": -3 * LANE - 9,
    "neg.s32 %r5, %r0;": -LANE,
    "shl.b32 %r5, 1, %r0;": np.where(LANE < 32, 1 << np.minimum(LANE, 31), 0).astype(np.uint32).view(np.int32),
    "sub.s32 %r6, %r0, 32; shr.s32 %r5, %r6, 2;": (LANE - 32) >> 2,
    "shr.s32 %r5, -1, %r0;": -1,
    "shr.u32 %r5, -1, %r0;": np.where(LANE < 32, (2**32 - 1) >> np.minimum(LANE, 31), 0).astype(np.uint32).view("i4"),
    "bfe.u32 %r5, %r0, 1, 3;": LANE >> 1 & 7,
    "bfe.u32 %r5, -1, 30, 5;": 3,
    "prmt.b32 %r5, %r0, 0x33221100, 0x6540U;": LANE | 0x22110000,
    "prmt.b32 %r5, 0x80, %r0, 0x1118;": 0x000000FF,
    "popc.b32 %r5, %r0;": [bin(lane).count("1") for lane in LANE],
    "min.u32 %r5, %r0, -1;": LANE,
    "max.s32 %r5, %r0, 9;": np.maximum(LANE, 9),
    "xor.b32 %r5, %r0, 5; and.b32 %r5, %r5, 12; or.b32 %r5, %r5, 1; not.b32 %r5, %r5;": ~(((LANE ^ 5) & 12) | 1),
    "setp.lt.u32 %p1, %r0, -1; setp.lt.s32 %p2, %r0, 9; xor.pred %p3, %p1, %p2; selp.b32 %r5, 3, 4, %p3;": np.where(
        LANE < 9, 4, 3
    ),
    f"{QUARTERS} add.rn.f32 %r5, %r6, 0f3F800000;": REAL / 4 + 1,
    f"{QUARTERS} sub.rn.f32 %r5, %r6, 0f3F800000;": REAL / 4 - 1,
    f"{QUARTERS} sub.rn.f32 %r6, %r6, 0f41000000; cvt.rzi.s32.f32 %r5, %r6;": np.trunc(LANE / 4 - 8).astype(int),
    f"{QUARTERS} div.rn.f32 %r5, %r6, 0f40400000;": REAL / 4 / np.float32(3),
    f"{QUARTERS} neg.f32 %r6, %r6; abs.f32 %r5, %r6;": REAL / 4,
    "copysign.f32 %r5, 0f80000000, 0f40000000;": np.float32(-2),
    f"{QUARTERS} min.f32 %r6, %r6, 0f41000000; max.f32 %r5, %r6, 0f40000000;": np.clip(REAL / 4, 2, 8),
    "fma.rn.f32 %r5, 0f3F800001, 0f3F800001, 0fBF800000;": np.float32((1 + 2**-23) ** 2 - 1),
    "fma.rn.ftz.f32 %r5, 0f00000001, 0f7F000000, 0f3F800000;": np.float32(1),
    "add.rn.f32 %r5, 0f00000001, 0f00000001;": np.float32(2**-148),
    "max.f32 %r5, 0f80000000, 0f00000000;": 0,
    "min.f32 %r5, 0f00000000, 0f80000000;": -(2**31),
    f"{NAN} max.f32 %r5, %r6, 0f40000000;": np.float32(2),
    f"{NAN} cvt.rzi.s32.f32 %r5, %r6;": 0,
    "cvt.rzi.s32.f32 %r5, 0fCF800000;": -(2**31),
    "cvt.rzi.s32.f32 %r5, 0f4F800000;": 2**31 - 1,
    **{
        f"cvt.rn.f32.u32 %r6, %r0; setp.gt.u32 %p1, %r0, 2; @%p1 mov.b32 %r6, 0f7FC00000;"
        f"setp.{comparison}.f32 %p2, %r6, 0f3F800000; selp.b32 %r5, 1, 0, %p2;": [int(holds[min(i, 3)]) for i in LANE]
        for comparison, holds in COMPARISONS.items()
    },
    "mov.pred %p1, -1; not.pred %p2, %p1; or.pred %p1, %p1, %p2; selp.b32 %r5, 3, 4, %p1;": 3,
    "ex2.approx.f32 %r5, 0f41000000;": np.float32(256),
    "sqrt.approx.ftz.f32 %r5, 0f00000001;": np.float32(0),
    "div.full.f32 %r5, 0f41000000, 0f40000000;": np.float32(4),
    "shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;": LANE ^ 1,
    "shfl.sync.up.b32 %r5, %r0, 1, 0, -1;": np.where(LANE % 32 == 0, LANE, LANE - 1),
    "shfl.sync.down.b32 %r5, %r0, 2, 31, -1;": np.where(LANE % 32 > 29, LANE, LANE + 2),
    "shfl.sync.idx.b32 %r5, %r0, 7, 31, -1;": LANE // 32 * 32 + 7,
    "shfl.sync.idx.b32 %r5, %r0, 1, 0x181f, -1;": LANE // 8 * 8 + 1,
    "redux.sync.max.s32 %r5, %r0, -1;": np.where(LANE < 32, 31, 63),
    "redux.sync.add.s32 %r5, %r0, -1;": np.where(LANE < 32, 496, 1520),
    "mov.b64 %rd5, {%r0, 7}; mov.b64 {_, %r5}, %rd5;": 7,
    "mov.b64 %rd5, {%r0, 7}; mov.b64 {%r5, %r6}, %rd5;": LANE,
    "cvt.u16.u32 %rs1, %r0; mov.b32 %r5, {%rs1, %rs1};": LANE * 0x10001,
    f"{SHARED} st.shared.b32 [%r3], -2; ld.shared.b8 %rs1, [%r3]; cvt.u32.u16 %r5, %rs1;": 254,
    f"{SHARED} st.shared.b32 [%r3], -2; ld.shared.s8 %rs1, [%r3]; cvt.s32.s16 %r5, %rs1;": -2,
    "shl.b32 %r3, %r0, 3; st.shared.v2.b32 [%r3], {%r0, 5}; ld.shared.v2.b32 {%r6, %r5}, [%r3];": 5,
    f"{SHARED} st.shared.b32 [%r3+256], %r0; bar.sync 0; and.b32 %r6, %r0, 7; shl.b32 %r6, %r6, 4;"
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r6+256];": LANE % 32,
    "setp.lt.u32 %p1, %r0, 9; @%p1 bra $A; mov.b32 %r5, 1; bra.uni $B;\n$A:\n mov.b32 %r5, 2;\n$B:\n"
    "add.s32 %r5, %r5, 1;": np.where(LANE < 9, 3, 2),
    "mov.b32 %r5, 0;\n$A:\n add.s32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, %r0; @%p1 bra $A;": np.maximum(LANE, 1),
    "setp.lt.u32 %p1, %r0, 9; mov.b32 %r5, 1; @!%p1 mov.b32 %r5, 2;": np.where(LANE < 9, 1, 2),
    "atom.global.gpu.relaxed.add.u32 %r6, [%rd1], 1; bar.sync 0; ld.global.b32 %r5, [%rd1];": 64,
    "atom.global.gpu.relaxed.add.u32 %r5, [%rd1], 2;": 2 * LANE,
}


@pytest.mark.parametrize("body", RESULTS)
def test_an_instruction_computes_what_the_manual_says(body: str) -> None:
    stored = emulated(f"{body}\n st.global.b32 [%rd2], %r5;")
    wanted = np.broadcast_to(RESULTS[body], 64)
    if wanted.dtype == np.float32:
        wanted = np.ascontiguousarray(wanted).view(np.int32)
    assert stored.tolist() == wanted.tolist()


def test_every_function_has_such_a_case() -> None:
    names = {text.split()[0] for body in [PTX, *RESULTS] for text in re.split(r"[;\n]", body) if text.split()}
    assert [rule.pattern for rule, _, _ in RULES if not any(map(rule.fullmatch, names))] == []


@pytest.mark.parametrize(
    ("function", "exact", "bound"),
    [("ex2", np.exp2, 2**-22), ("sqrt", np.sqrt, 2**-23), ("div", lambda x: 1 / x, 2**-22.5)],
)
def test_approximations_err_within_their_bounds(function: str, exact: Any, bound: float) -> None:
    x = np.linspace(2.01, 9.9, 10_001).astype(np.float32)
    operands = (np.ones_like(x), x) if function == "div" else (x,)
    right = exact(x.astype(np.float64))
    wrong = getattr(Approximations(), function)(*operands).astype(np.float32)
    assert bound / 4 < np.abs(wrong / right - 1).max() <= bound
    exact_again = getattr(Approximations(scale=0), function)(*operands).astype(np.float32)
    assert np.array_equal(exact_again, right.astype(np.float32))
    assert not np.array_equal(getattr(Approximations(seed=1), function)(*operands).astype(np.float32), wrong)
