"""PTX text to instructions.

The grammar that LLVM and NVVM print: one statement up to each semicolon, labels, nested scopes
with registers of their own, and directives, of which only those that declare something matter.
"""

from __future__ import annotations

import functools
import re
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass, field

Operand = str | tuple[str, ...]


class Fault(Exception):
    """What a GPU would not do, or what might go wrong on it."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        op: with all that follows its dots, such as `mad.wide.s32`.
        operands: names, numbers, `[addresses]`, or the parts of a vector.
        predicate: register that decides where it is executed, or None: everywhere.
        negated: whether it is executed where the predicate does not hold.
        source: line of the source, where the text says so.

    """

    op: str
    operands: tuple[Operand, ...]
    predicate: str | None = None
    negated: bool = False
    source: str = ""

    def __str__(self) -> str:
        words = ["{" + ", ".join(x) + "}" if isinstance(x, tuple) else x for x in self.operands]
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.op} {', '.join(words)}" + f" ({self.source})" * bool(self.source)


@dataclass
class Kernel:
    """An entry of a module.

    Attributes:
        name: of the entry.
        parameters: (type, bytes) of each, by name.
        instructions: in order.
        labels: indices of the instructions that they stand before.
        registers: bits of each, 1 for predicates.
        shared: (offset, bytes) of variables in shared memory; 0 bytes: what a launch gives.
        threads: of a block, if the text says so.

    """

    name: str
    parameters: dict[str, tuple[str, int]]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    threads: int | None = None

    @property
    def shared_bytes(self) -> int:
        """Of the variables whose size the text gives."""
        return max((at + n for at, n in self.shared.values()), default=0)


@functools.cache
def bits_of(kind: str) -> int:
    """Of a type such as `f16x2`: 32."""
    if kind == "pred":
        return 1
    bits, times = re.fullmatch(r"[a-z]+(\d+)(?:x(\d))?", kind).groups("1")  # type: ignore[union-attr]
    return int(bits) * int(times)


def parse(text: str) -> Kernel:
    """The only kernel of a module.

    Raises:
        Fault: there are several or none.

    """
    text = re.sub(r"^\s*\.loc\b.*", _marked, text, flags=re.MULTILINE)
    text = re.sub(r"^\s*\.(file|version|target|address_size)\b.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"//.*|/\*.*?\*/", "", text)
    entries = [*re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text)]
    if len(entries) != 1:
        raise Fault(f"{len(entries)} kernels in a module, not one")
    [entry] = entries
    parameters = dict(map(_parameter, filter(str.strip, entry[2].split(","))))
    kernel = Kernel(entry[1], parameters)
    if threads := re.search(
        r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry[3]
    ):
        kernel.threads = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
    for declaration in re.finditer(r"\.shared[^;]*;", text[: entry.start()]):
        _declare_shared(kernel, declaration[0])
    _body(kernel, text[entry.end() :])
    return kernel


def _marked(line: re.Match[str]) -> str:
    """What stays of `.loc 1 24 8  // file.py:24:8`: `#file.py#24`."""
    found = re.search(r"//\s*(\S+?):(\d+)", line[0])
    return f" #{found[1]}#{found[2]} " if found else ""


def _parameter(text: str) -> tuple[str, tuple[str, int]]:
    found = re.search(r"\.([a-z]+\d+)\b[^,]*?([\w$]+)(?:\[(\d+)\])?\s*$", text)
    assert found, text
    return found[2], (found[1], bits_of(found[1]) // 8 * int(found[3] or 1))


def _declare_shared(kernel: Kernel, text: str) -> None:
    align = re.search(r"\.align\s+(\d+)", text)
    found = re.search(r"\.([a-z]+\d+)\s+([\w$]+)((?:\[\d*\])*)", text)
    assert found, text
    counts = re.findall(r"\[(\d*)\]", found[3])
    size = bits_of(found[1]) // 8
    for count in counts:
        size *= int(count or 0)
    unit = int(align[1]) if align else max(1, bits_of(found[1]) // 8)
    kernel.shared[found[2]] = (-(-kernel.shared_bytes // unit) * unit, size)


def _statements(text: str) -> Iterator[str]:
    """Statements, `{` and `}` of scopes, and `label:`, up to the end of the body."""
    depth, start, inside = 1, 0, 0
    for found in re.finditer(r"[;{}]|[\w$]+:(?!:)", text):
        token, before = found[0], text[start : found.start()].strip()
        if inside or (token == "{" and _code(before)):  # a vector
            inside += (token == "{") - (token == "}")
            continue
        if token == ";":
            yield before
        elif token in "{}":
            yield token
            depth += (token == "{") - (token == "}")
            if not depth:
                return
        elif _code(before):  # within a statement, such as `L1::evict_first`
            continue
        else:
            yield f"{before} {token}"
        start = found.end()


def _code(text: str) -> str:
    """Without the sources that `_marked` has left."""
    return re.sub(r"#\S+", "", text).strip()


def _body(kernel: Kernel, text: str) -> None:
    scopes: list[ChainMap[str, str]] = [ChainMap()]
    source, where = "", []  # of each instruction, the names that it sees
    for statement in _statements(text):
        if lines := re.findall(r"#(\S+)#(\d+)", statement):
            source = ":".join(lines[-1])
        code = _code(statement)
        if code == "{":
            scopes.append(scopes[-1].new_child())
        elif code == "}":
            scopes.pop()
        elif code.endswith(":"):
            name = _own(kernel.labels, code[:-1])
            scopes[-1][code[:-1]] = name
            kernel.labels[name] = len(kernel.instructions)
        elif code.startswith(".reg"):
            _declare_registers(kernel, code, scopes[-1])
        elif re.match(r"(\.extern\s+)?\.shared", code):
            _declare_shared(kernel, code)
        elif code and not code.startswith("."):
            kernel.instructions.append(_instruction(code, source))
            where.append(scopes[-1])
    # Labels may come after the branches to them: names are known only now.
    if any(name.endswith("'") for name in (*kernel.labels, *kernel.registers)):
        pairs = zip(kernel.instructions, where, strict=True)
        kernel.instructions[:] = [_named(x, scope) for x, scope in pairs]


def _own(taken: dict[str, int], name: str) -> str:
    """The name, or, if another scope has it too, another."""
    while name in taken:
        name += "'"
    return name


def _declare_registers(kernel: Kernel, code: str, names: ChainMap[str, str]) -> None:
    found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", code, re.DOTALL)
    assert found, code
    for register in found[2].split(","):
        register = register.strip()
        family = re.fullmatch(r"(%\w+)<(\d+)>", register)
        each = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [register]
        for x in each:
            names[x] = _own(kernel.registers, x)
            kernel.registers[names[x]] = bits_of(found[1])


def _instruction(code: str, source: str) -> Instruction:
    found = re.match(r"(?:@(!?)([\w%$]+)\s+)?([a-z][\w.:]*)\s*(.*)", code, re.DOTALL)
    if not found:
        raise Fault(f"not an instruction: {code}")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]][^,{}\[\]]*", found[4])
    return Instruction(found[3], tuple(map(_operand, operands)), found[2], bool(found[1]), source)


def _operand(text: str) -> Operand:
    text = " ".join(text.split())
    if text.startswith("{"):
        return tuple(x.strip() for x in text[1:-1].split(","))
    return text


def _named(x: Instruction, names: ChainMap[str, str]) -> Instruction:
    def rename(operand: Operand) -> Operand:
        if isinstance(operand, tuple):
            return tuple(re.sub(r"[%$\w]+", lambda m: names.get(m[0], m[0]), y) for y in operand)
        return re.sub(r"[%$\w]+", lambda m: names.get(m[0], m[0]), operand)

    predicate = names.get(x.predicate, x.predicate) if x.predicate else None
    return Instruction(x.op, tuple(map(rename, x.operands)), predicate, x.negated, x.source)
