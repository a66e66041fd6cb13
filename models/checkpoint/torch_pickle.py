"""The inert pickle interpreter: the bytes of a `data.pkl` -> plain dicts, lists and tensor references, never running anything in them.

It knows two things that a pickle may call, OrderedDict and the functions that rebuild a tensor, and it calls neither: they become a dict
and a `TensorRef`. Every other class, function or object becomes a `Dead`, which holds a name and nothing else. Only text keys are kept in
dicts: nothing needs another kind, and text is the one kind whose hash a hostile file cannot aim. Refuses most opcodes of protocols 0 and
1 (torch writes none), floods of opcodes, and damaged streams.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pickletools import opcodes
from typing import Any

import torch

from models.errors import CheckpointInvalid

LONGEST_TEXT = 1024  # bytes of a text that is kept; longer ones (pickled pixels, logs) can be no tensor name
LONGEST_NAME = 256  # bytes of a module or class
LONGEST_INTEGER = 16  # bytes
MOST_NAMES = 1000  # of those kept to be reported
MOST_ARGUMENTS = 10  # a longer tuple rebuilds no tensor, and unpacking one again and again would cost its length each time

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
# The kinds that have no storage class of their own are named by `_rebuild_tensor_v3`.
_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
}
_PLAIN = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SUBCLASS = ("torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2")


@dataclass(frozen=True, slots=True, eq=False)
class Dead:
    """Stands for whatever the pickle wanted to import, call or build. It can do nothing."""

    name: str


_ANY = Dead("?")  # for what has no name of its own


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of bytes in the archive, as the pickle claims it; nothing has been compared with the archive yet."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor as the pickle claims it. `size` and `stride` may hold anything, at any length: `torch_zip` checks them before it builds."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[object, ...]
    stride: tuple[object, ...]


@dataclass(frozen=True)
class Pickled:
    root: object  # dicts, lists, tuples, TensorRef, Dead, scalars; may be deep or contain itself, so it is never walked by recursion
    tensors: int  # how many tensors were named anywhere, in dead objects too
    names: frozenset[str]  # modules and functions that it asks for, the first MOST_NAMES of them


def interpret(data: memoryview, max_opcodes: int) -> Pickled:
    """Raises CheckpointInvalid; never anything else. Linear in `max_opcodes`: some microseconds and at most 150 bytes each."""
    machine = _Machine(data)
    try:
        root = machine.run(max_opcodes)
        return Pickled(root, machine.tensors, frozenset(machine.names))
    except (IndexError, KeyError, ValueError, TypeError, EOFError, struct.error) as error:
        raise CheckpointInvalid(f"The pickle inside the archive is damaged at byte {machine.at:,}; save the checkpoint again.") from error


class _Machine:
    """The pickle stack machine. MARK is kept as a position; popping below one leaves a position past the end, which yields no items."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at, self.tensors = data, 0, 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.names: set[str] = set()

    def run(self, max_opcodes: int) -> object:
        for _ in range(max_opcodes):
            code = self.data[self.at]
            self.at += 1
            if code == _STOP:
                return self.stack.pop()
            _ACTIONS[code](self)
        raise CheckpointInvalid(f"The pickle inside the archive has more than {max_opcodes:,} opcodes; save the state dict alone.")

    def take(self, count: int) -> memoryview:
        if count < 0 or count > len(self.data) - self.at:
            raise EOFError
        self.at += count
        return self.data[self.at - count : self.at]

    def line(self) -> str:
        """A name that ends with a newline; no module or class has one of LONGEST_NAME bytes."""
        text, newline, _ = bytes(self.data[self.at : self.at + LONGEST_NAME]).partition(b"\n")
        if not newline:
            raise EOFError
        self.at += len(text) + 1
        return text.decode()

    def items(self) -> list[object]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def find(self) -> None:
        module, name = self.line(), self.line()
        self.name(module, name)

    def find_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def name(self, module: object, name: object) -> None:
        dead = _dead(module, name)
        if len(self.names) < MOST_NAMES:
            self.names.add(dead.name)
        self.stack.append(dead)

    def instance(self) -> None:
        self.items()
        self.find()

    def pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)

    def set(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, str))

    def frozen_set(self) -> None:
        self.items()
        self.stack.append(_ANY)

    def set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set([key, value])

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, arguments))

    def new_with_keywords(self) -> None:
        self.stack.pop()
        self.reduce()

    def build(self) -> None:
        self.stack.pop()  # the state of an object that was never made
        self.stack[-1]

    def call(self, function: object, arguments: object) -> object:
        name = function.name if isinstance(function, Dead) else _ANY.name
        if not isinstance(arguments, tuple) or len(arguments) > MOST_ARGUMENTS:
            return Dead(name)
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name in _PLAIN:
            return self.tensor(name, arguments)
        if name in _PARAMETER and arguments and isinstance(arguments[0], TensorRef):
            return arguments[0]
        if name in _SUBCLASS and len(arguments) > 2 and isinstance(arguments[0], Dead) and arguments[0].name in (*_PLAIN, *_PARAMETER):
            # A tensor with Python attributes (nn.Buffer) or of a subclass: the data are rebuilt alike. One level only: nothing recurses.
            return self.call(arguments[0], arguments[2])
        return Dead(name)

    def tensor(self, name: str, arguments: tuple[object, ...]) -> object:
        match arguments:
            case (Storage() as storage, int(offset), tuple(size), tuple(stride), *rest):
                dtype: torch.dtype | None = storage.dtype
                if name.endswith("_v3"):  # rest: requires_grad, hooks, dtype, metadata
                    dtype = _DTYPES.get(rest[2].name) if len(rest) > 2 and isinstance(rest[2], Dead) else None
                # A lazily conjugated or negated tensor holds other numbers than its storage.
                if dtype is None or any(isinstance(extra, dict) and (extra.get("conj") or extra.get("neg")) for extra in rest[2:]):
                    return Dead(name)
                self.tensors += 1
                return TensorRef(storage, dtype, offset, size, stride)
        return Dead(name)

    def persistent(self) -> None:
        claim: object = _ANY
        match self.stack.pop():
            case ("storage", Dead(name=kind), str(key), _, int(count)):
                if (dtype := _STORAGES.get(kind.rpartition(".")[2])) is not None:
                    claim = Storage(key, dtype, count * dtype.itemsize)
        self.stack.append(claim)


def _dead(module: object, name: object) -> Dead:
    # Cut short, since one text in the memo can be named again by every third opcode.
    return Dead(f"{module[:80]}.{name[:80]}") if isinstance(module, str) and isinstance(name, str) else _ANY


def _text(block: memoryview) -> object:
    # Surrogates pass here since torch writes paths and notes that hold them; the unwrapping refuses them in the names of tensors.
    return str(block, "utf-8", "surrogatepass") if len(block) <= LONGEST_TEXT else _ANY


def _old_text(block: memoryview) -> object:
    return str(block, "latin-1") if len(block) <= LONGEST_TEXT else _ANY


def _integer(block: memoryview) -> object:
    return int.from_bytes(block, "little", signed=True) if len(block) <= LONGEST_INTEGER else _ANY


Action = Callable[[_Machine], None]


def _number(layout: str, then: Callable[[_Machine, Any], None]) -> Action:
    reader = struct.Struct(layout)
    return lambda m: then(m, reader.unpack(m.take(reader.size))[0])


def _counted(layout: str, decode: Callable[[memoryview], object]) -> Action:
    return _number(layout, lambda m, count: m.stack.append(decode(m.take(count))))


def _skip(layout: str) -> Action:
    return _number(layout, lambda m, _: None)


def _extension(layout: str) -> Action:
    return _number(layout, lambda m, _: m.stack.append(_ANY))


def _tuple(count: int) -> Action:
    def action(m: _Machine) -> None:
        if len(m.stack) < count:
            raise IndexError
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return action


def _push(m: _Machine, value: object) -> None:
    m.stack.append(value)


def _get(m: _Machine, index: int) -> None:
    m.stack.append(m.memo[index])


def _put(m: _Machine, index: int) -> None:
    m.memo[index] = m.stack[-1]


def _bytes(_: memoryview) -> object:
    return _ANY


_STOP = ord(".")
_BY_NAME: dict[str, Action] = {
    "PROTO": _skip("<B"),
    "FRAME": _skip("<Q"),
    "MARK": lambda m: m.marks.append(len(m.stack)),
    "POP": _Machine.pop,
    "POP_MARK": lambda m: m.items().clear(),
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "NONE": lambda m: m.stack.append(None),
    "NEWTRUE": lambda m: m.stack.append(True),
    "NEWFALSE": lambda m: m.stack.append(False),
    "BININT": _number("<i", _push),
    "BININT1": _number("<B", _push),
    "BININT2": _number("<H", _push),
    "BINFLOAT": _number(">d", _push),
    "LONG1": _counted("<B", _integer),
    "LONG4": _counted("<i", _integer),
    "SHORT_BINUNICODE": _counted("<B", _text),
    "BINUNICODE": _counted("<I", _text),
    "BINUNICODE8": _counted("<Q", _text),
    "SHORT_BINSTRING": _counted("<B", _old_text),
    "BINSTRING": _counted("<i", _old_text),
    "SHORT_BINBYTES": _counted("<B", _bytes),
    "BINBYTES": _counted("<I", _bytes),
    "BINBYTES8": _counted("<Q", _bytes),
    "BYTEARRAY8": _counted("<Q", _bytes),
    "EMPTY_TUPLE": lambda m: m.stack.append(()),
    "TUPLE": lambda m: m.stack.append(tuple(m.items())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "EMPTY_LIST": lambda m: m.stack.append([]),
    "APPEND": lambda m: m.append([m.stack.pop()]),
    "APPENDS": lambda m: m.append(m.items()),
    "EMPTY_DICT": lambda m: m.stack.append({}),
    "SETITEM": _Machine.set_one,
    "SETITEMS": lambda m: m.set(m.items()),
    "EMPTY_SET": lambda m: m.stack.append(_ANY),
    "ADDITEMS": lambda m: m.items().clear(),
    "FROZENSET": _Machine.frozen_set,
    "BINGET": _number("<B", _get),
    "LONG_BINGET": _number("<I", _get),
    "BINPUT": _number("<B", _put),
    "LONG_BINPUT": _number("<I", _put),
    "MEMOIZE": lambda m: _put(m, len(m.memo)),
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": _Machine.find_on_stack,
    "INST": _Machine.instance,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "EXT1": _extension("<B"),
    "EXT2": _extension("<H"),
    "EXT4": _extension("<i"),
}
_ACTIONS = {ord(opcode.code): _BY_NAME[opcode.name] for opcode in opcodes if opcode.name in _BY_NAME}
