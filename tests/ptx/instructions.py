"""What each PTX instruction does to the registers of a CTA's threads: one NumPy array a register, one lane a thread.

`decode` turns the text of an instruction into a function once; what it does not know it refuses by name. It knows what
Triton makes of our kernels.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.memory import UNSIGNED, KernelError, Lanes

if TYPE_CHECKING:
    from tests.ptx.emulator import Cta, Program

Mask = Lanes | None  # which threads take part; None: all
Step = Callable[["Cta", Mask], None]
Reader = Callable[["Cta"], Lanes]
Function = Callable[..., Lanes]

TYPES: dict[str, Any] = {
    "pred": np.bool_, "f32": np.float32,
    **{f"{kind}{8 * width}": unsigned for width, unsigned in UNSIGNED.items() for kind in "bu"},
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
}  # fmt: skip
LANES = np.arange(32)  # of a warp


def flush(x: Lanes) -> Lanes:
    """Return float32 `x` with zeros in place of its subnormal numbers."""
    return np.where(np.abs(x) < 2**-126, np.copysign(np.float32(0), x), x)


def largest(a: Lanes, b: Lanes) -> Lanes:
    """Return the larger number, +0 above -0, a number before NaN."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def smallest(a: Lanes, b: Lanes) -> Lanes:
    """Return the smaller number, -0 below +0, a number before NaN."""
    return -largest(-a, -b)


def fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Return a * b + c: float64 holds the product exactly, so that it is nearly always rounded as if once."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def shift_left(a: Lanes, by: Lanes) -> Lanes:
    """Shift bits out of a number: 0 is left once all have gone."""
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Lanes, by: Lanes) -> Lanes:
    """Shift bits out of a number: 0, or the sign, is left once all have gone."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def extract_bits(a: Lanes, start: Lanes, length: Lanes) -> Lanes:
    """Return a bit field of an unsigned number."""
    ones = shift_left(np.ones(1, a.dtype), length & 255) - a.dtype.type(1)
    field: Lanes = shift_right(a, start & 255) & ones
    return field


def permute_bytes(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """Return four bytes of a and b, each chosen by 4 bits of the selector: its number, or its sign alone."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    choices = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    chosen: Lanes = np.take_along_axis(np.stack([a, b], -1).view(np.uint8), choices & 7, 1)
    return np.where(choices & 8, (chosen >> 7) * np.uint8(255), chosen).view(np.uint32)[:, 0]


def count_ones(a: Lanes) -> Lanes:
    """Return the number of bits that are set."""
    ones: Lanes = np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(len(a), -1), axis=1).sum(1)
    return ones


def truncate(a: Lanes) -> Lanes:
    """Return float32 as int32: beyond the range its end, and 0 for NaN."""
    truncated: Lanes = np.nan_to_num(np.trunc(a.astype(np.float64)), nan=0.0)
    return truncated.clip(-(2**31), 2**31 - 1)


COMPARISONS: dict[str, Function] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}  # fmt: skip

SETS = {"T": r"([bsu](16|32|64)|f32|pred)", "I": r"[us](8|16|32|64)", "B": r"(b(16|32|64)|pred)"}
# By pattern, with these sets of types: the types of the result and the operands, and the function, or the name of an
# approximation. t is the instruction's last type, d the one before it, w one twice as wide as the last, n the last made
# so wide, u a 32-bit number, p a predicate.
FUNCTIONS: dict[str, tuple[str, Function | str]] = {
    r"(add|add\.rn)\.T": ("t=tt", np.add),
    r"(sub|sub\.rn)\.T": ("t=tt", np.subtract),
    r"(mul\.lo|mul\.rn|mul)\.T": ("t=tt", np.multiply),
    r"mul\.wide\.[us](16|32)": ("w=nn", np.multiply),
    r"mul\.hi\.s32": ("t=nn", lambda a, b: a * b >> 32),
    r"mad\.lo\.T": ("t=ttt", lambda a, b, c: a * b + c),
    r"mad\.wide\.[us](16|32)": ("w=nnw", lambda a, b, c: a * b + c),
    r"fma\.rn(\.ftz)?\.f32": ("t=ttt", fused),
    r"div\.rn\.f32": ("t=tt", np.divide),
    r"abs\.(f32|s32)": ("t=t", np.abs),
    r"neg\.(f32|s32|s64)": ("t=t", np.negative),
    r"copysign\.f32": ("t=tt", lambda sign, size: np.copysign(size, sign)),
    r"max\.f32": ("t=tt", largest),
    r"min\.f32": ("t=tt", smallest),
    r"max\.[us](32|64)": ("t=tt", np.maximum),
    r"min\.[us](32|64)": ("t=tt", np.minimum),
    r"and\.B": ("t=tt", np.bitwise_and),
    r"or\.B": ("t=tt", np.bitwise_or),
    r"xor\.B": ("t=tt", np.bitwise_xor),
    r"not\.B": ("t=t", np.invert),
    r"shl\.b(16|32|64)": ("t=tu", shift_left),
    r"shr\.[us](16|32|64)": ("t=tu", shift_right),
    r"bfe\.u(32|64)": ("t=tuu", extract_bits),
    r"prmt\.b32": ("t=ttt", permute_bytes),
    r"popc\.b(32|64)": ("u=t", count_ones),
    r"selp\.T": ("t=ttp", lambda a, b, choice: np.where(choice, a, b)),
    r"cvt\.I\.I": ("d=t", lambda a: a),
    r"cvt\.rn\.f32\.I": ("d=t", lambda a: a),
    r"cvt\.rzi\.s32\.f32": ("d=t", truncate),
    r"mov\.T": ("t=t", lambda a: a),
    **{rf"setp\.{name}\.T": ("p=tt", function) for name, function in COMPARISONS.items()},
    r"ex2\.approx(\.ftz)?\.f32": ("t=t", "ex2"),
    r"sqrt\.approx(\.ftz)?\.f32": ("t=t", "sqrt"),
    r"div\.(full|approx)\.f32": ("t=tt", "div"),
}
RULES = [
    (re.compile(re.sub("[TIB]", lambda letter: SETS[letter[0]], pattern)), types, function)
    for pattern, (types, function) in FUNCTIONS.items()
]
WIDER = {np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}


class Instruction:
    """One instruction, its operands apart."""

    def __init__(self, text: str, program: "Program") -> None:
        self.text, self.program = text, program
        self.name, _, rest = text.partition(" ")
        self.operands = [each.strip() for each in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        self.parts = self.name.replace("::", ".").split(".")

    def unknown(self) -> NotImplementedError:
        """Return the error that names the instruction."""
        return NotImplementedError(f"PTX instruction not emulated: {self.text}")

    def reader(self, operand: str, kind: Any) -> Reader:
        """Return how to read an operand as numbers of a kind."""
        width = np.dtype(kind).itemsize
        if operand in self.program.registers:
            own = self.program.registers[operand]
            if own is kind:
                return lambda cta: cta.registers[operand]
            if np.dtype(own).itemsize == width:
                return lambda cta: cta.registers[operand].view(kind)
            return lambda cta: cta.registers[operand].astype(UNSIGNED[width]).view(kind)
        if operand.startswith("%"):
            axis = re.fullmatch(r"%(tid|ctaid|nctaid)\.([xyz])", operand)
            if not axis:
                raise self.unknown()
            return lambda cta: cta.position(*axis.groups()).astype(kind)
        if operand == "global_smem":  # where a CTA's shared memory begins
            return lambda cta: np.zeros(1, kind)
        if re.fullmatch(r"0f[0-9A-F]{8}", operand):
            constant = np.array([int(operand[2:], 16)], np.uint32).view(kind)
        elif re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)U?", operand):
            number = int(operand.rstrip("U"), 0) & ((1 << 8 * width) - 1)
            constant = np.array([number != 0 if kind is np.bool_ else number], UNSIGNED[width]).view(kind)
        else:
            raise self.unknown()
        return lambda cta: constant

    def writer(self, operand: str) -> Callable[["Cta", Lanes, Mask], None]:
        """Return how to write a register; numbers narrower than it keep their sign."""
        if operand == "_":
            return lambda cta, value, mask: None
        if operand not in self.program.registers:
            raise self.unknown()
        own = self.program.registers[operand]

        def write(cta: "Cta", value: Lanes, mask: Mask) -> None:
            same_size = value.dtype.itemsize == np.dtype(own).itemsize
            value = np.ascontiguousarray(value).view(own) if same_size else value.astype(own)
            np.copyto(cta.registers[operand], value, where=True if mask is None else mask)

        return write

    def address(self, operand: str, kind: Any) -> Reader:
        """Return how to read a pointer."""
        match = re.fullmatch(r"\[ ?([^\s+]+) ?(?:\+ ?(-?\d+) ?)?\]", operand)
        if not match:
            raise self.unknown()
        base, offset = self.reader(match[1], kind), np.array([int(match[2] or 0)]).astype(kind)
        return lambda cta: np.broadcast_to(base(cta) + offset, cta.threads.shape)


def decode(text: str, program: "Program") -> Step:
    """Return what an instruction does. Branches, barriers and returns are the emulator's."""
    it = Instruction(text, program)
    try:
        if it.parts[0] in OPCODES:
            return OPCODES[it.parts[0]](it)
        if it.parts[0] == "mov" and "{" in text:
            return move_parts(it)
        for names, types, function in RULES:
            if names.fullmatch(it.name):
                if isinstance(function, str):
                    function = getattr(program.approximations, function)
                return computed(it, types, function)
    except (IndexError, KeyError, TypeError, ValueError) as error:  # a part that is missing, or unheard of
        raise it.unknown() from error
    raise it.unknown()


def computed(it: Instruction, types: str, function: Function) -> Step:
    """Return the step that writes a function of the operands; `types` as in `FUNCTIONS`."""
    last, before = TYPES[it.parts[-1]], TYPES.get(it.parts[-2])
    wide = WIDER.get(last)
    kinds = {"t": last, "d": before, "w": wide, "n": wide, "u": np.uint32, "p": np.bool_}
    result, flushes, write = kinds[types[0]], "ftz" in it.parts, it.writer(it.operands[0])
    readers = [
        (it.reader(operand, last if letter == "n" else kinds[letter]), kinds[letter])
        for operand, letter in zip(it.operands[1:], types[2:], strict=True)
    ]

    def step(cta: "Cta", mask: Mask) -> None:
        operands = [read(cta).astype(kind, copy=False) for read, kind in readers]
        if flushes:
            operands = [flush(each) for each in operands]
        value = np.asarray(function(*operands)).astype(result, copy=False)
        write(cta, flush(value) if flushes else value, mask)

    return step


def move_parts(it: Instruction) -> Step:
    """Pack registers into a wider one, or unpack it."""
    unpacks = it.operands[0].startswith("{")
    names = names_in(it.operands[0 if unpacks else 1])
    size = np.dtype(TYPES[it.parts[-1]]).itemsize
    whole, part = UNSIGNED[size], UNSIGNED[size // len(names)]
    if unpacks:
        read, writers = it.reader(it.operands[1], whole), [it.writer(name) for name in names]

        def unpack(cta: "Cta", mask: Mask) -> None:
            parts = read(cta)[:, None].copy().view(part)
            for at, write in enumerate(writers):
                write(cta, parts[:, at], mask)

        return unpack
    readers, write_whole = [it.reader(name, part) for name in names], it.writer(it.operands[0])

    def pack(cta: "Cta", mask: Mask) -> None:
        parts = np.stack(np.broadcast_arrays(*[read(cta) for read in readers]), -1)
        write_whole(cta, parts.view(whole)[:, 0], mask)

    return pack


def names_in(operand: str) -> list[str]:
    """Return the parts of an operand in braces."""
    return [each.strip() for each in operand.strip("{} ").split(",")]


def by_warps(it: Instruction, values: Lanes, cta: "Cta", mask: Mask) -> Lanes:
    """Return values [warp, lane]. A warp that has split up would wait for its lanes."""
    if mask is not None and (mask.reshape(-1, 32).any(1) != mask.reshape(-1, 32).all(1)).any():
        raise NotImplementedError(f"PTX instruction not emulated in a warp that has split up: {it.text}")
    return np.broadcast_to(values, cta.threads.shape).reshape(-1, 32)


def shuffle(it: Instruction) -> Step:
    """Give each lane another lane's number: segments and bounds as in the PTX manual's pseudocode."""
    sources: dict[str, Function] = {
        "bfly": lambda by, segment: LANES ^ by, "up": lambda by, segment: LANES - by,
        "down": lambda by, segment: LANES + by,
        "idx": lambda by, segment: LANES & segment | by & ~segment,
    }  # fmt: skip
    if it.parts[1] != "sync" or it.parts[2] not in sources or it.parts[3:] != ["b32"]:
        raise it.unknown()
    write, source_of, up = it.writer(it.operands[0]), sources[it.parts[2]], it.parts[2] == "up"
    value, distance, control = (it.reader(operand, np.int32) for operand in it.operands[1:4])

    def step(cta: "Cta", mask: Mask) -> None:
        numbers, by, c = (by_warps(it, read(cta), cta, mask) for read in (value, distance, control))
        segment = c >> 8 & 31
        bound = LANES & segment | c & 31 & ~segment
        source = source_of(by & 31, segment)
        source = np.where(source >= bound if up else source <= bound, source, LANES)
        write(cta, np.take_along_axis(numbers, source, 1).reshape(-1), mask)

    return step


def reduce_warp(it: Instruction) -> Step:
    """Give all lanes of a warp the sum, the smallest or the largest of their numbers."""
    functions: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum}
    if it.parts[1] != "sync" or it.parts[2] not in functions:
        raise it.unknown()
    kind, function = TYPES[it.parts[3]], functions[it.parts[2]]
    value, write = it.reader(it.operands[1], kind), it.writer(it.operands[0])

    def step(cta: "Cta", mask: Mask) -> None:
        results = function.reduce(by_warps(it, value(cta), cta, mask), axis=1)
        write(cta, np.repeat(results.astype(kind), 32), mask)

    return step


class Access:
    """What loads and stores have in common: the memory, its pointers, the type and the number of components."""

    def __init__(self, it: Instruction, pointer: str, *modifiers: str) -> None:
        *modifiers_here, kind = it.parts[1:]
        spaces = [part for part in modifiers_here if part in ("global", "shared")]
        vectors = [int(part[1]) for part in modifiers_here if part in ("v2", "v4")]
        others = [part for part in modifiers_here if part not in ("global", "shared", "v2", "v4", "cta")]
        self.kind = TYPES.get(kind)
        self.width = np.dtype(self.kind).itemsize
        if len(spaces) != 1 or others != list(modifiers) or kind not in TYPES:
            raise it.unknown()
        self.is_shared, self.count = spaces == ["shared"], (vectors or [1])[0]
        if not self.is_shared and self.width < 4:  # see `global_memory`
            raise it.unknown()
        self.address = it.address(pointer, np.uint32 if self.is_shared else np.uint64)

    def here(self, cta: "Cta", mask: Mask) -> tuple[Any, Lanes, Lanes]:
        """Return (the memory, the threads that take part, their addresses)."""
        threads = cta.threads if mask is None else np.flatnonzero(mask)
        return cta.shared if self.is_shared else cta.memory, threads, self.address(cta)[threads]


def load(it: Instruction) -> Step:
    """Load from memory, or a kernel's argument."""
    writers = [it.writer(name) for name in names_in(it.operands[0])]
    if it.parts[1] == "param":
        argument = re.fullmatch(r"\[\w+_param_(\d+)\]", it.operands[1])
        if not argument or len(it.parts) != 3:
            raise it.unknown()
        index, kind = int(argument[1]), TYPES[it.parts[2]]
        return lambda cta, mask: writers[0](cta, cta.argument(index, kind), mask)
    access = Access(it, it.operands[1])

    def step(cta: "Cta", mask: Mask) -> None:
        memory, threads, addresses = access.here(cta, mask)
        values = memory.load(addresses, access.width, access.count, threads, it.text)
        for column, write in enumerate(writers):
            whole = np.zeros(cta.threads.shape, access.kind)
            whole[threads] = values[:, column].view(access.kind)
            write(cta, whole, mask)

    return step


def read_lanes(readers: list[Reader], cta: "Cta", threads: Lanes) -> Lanes:
    """Return [lane, operand] of the threads that take part."""
    return np.stack([np.broadcast_to(read(cta), cta.threads.shape)[threads] for read in readers], -1)


def store(it: Instruction) -> Step:
    """Store into memory."""
    access = Access(it, it.operands[0])
    readers = [it.reader(name, UNSIGNED[access.width]) for name in names_in(it.operands[1])]

    def step(cta: "Cta", mask: Mask) -> None:
        memory, threads, addresses = access.here(cta, mask)
        memory.store(addresses, read_lanes(readers, cta, threads), threads, it.text)

    return step


def atomic_add(it: Instruction) -> Step:
    """Add to integers in memory, and return what was there before."""
    *result, pointer, operand = it.operands
    access = Access(it, pointer, "gpu", "relaxed", "add")
    if access.kind not in (np.uint32, np.uint64):
        raise it.unknown()
    write, readers = it.writer(result[0] if result else "_"), [it.reader(operand, access.kind)]

    def step(cta: "Cta", mask: Mask) -> None:
        memory, threads, addresses = access.here(cta, mask)
        whole = np.zeros(cta.threads.shape, access.kind)
        whole[threads] = memory.add(addresses, read_lanes(readers, cta, threads)[:, 0], threads, it.text)
        write(cta, whole, mask)

    return step


def load_matrix(it: Instruction) -> Step:
    """Load matrices of 8 rows of 16 bytes from shared memory: each lane gets 4 bytes of each, of row lane // 4."""
    if not re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x[124]\.shared\.b16", it.name):
        raise it.unknown()
    writers, address = [it.writer(name) for name in names_in(it.operands[0])], it.address(it.operands[1], np.uint32)

    def step(cta: "Cta", mask: Mask) -> None:
        starts = by_warps(it, address(cta), cta, mask)  # of row r of matrix m in lane 8 * m + r
        threads = cta.threads if mask is None else np.flatnonzero(mask)
        for matrix, write in enumerate(writers):
            rows = starts[:, 8 * matrix + LANES // 4].reshape(-1)[threads]
            if (rows % 16).any():
                raise KernelError(f"misaligned: {it.text}")
            whole = np.zeros(cta.threads.shape, np.uint32)
            whole[threads] = cta.shared.load(rows + threads % 4 * 4, 4, 1, threads, it.text)[:, 0]
            write(cta, whole, mask)

    return step


OPCODES: dict[str, Callable[[Instruction], Step]] = {
    "shfl": shuffle, "redux": reduce_warp, "ld": load, "st": store, "atom": atomic_add, "red": atomic_add,
    "ldmatrix": load_matrix,
}  # fmt: skip
