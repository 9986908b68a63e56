"""Mutants of files: of their bytes, of numbers at known places, of JSON documents, and of headers made of JSON.

A mutator takes the content of a valid file, contents of the same kind to splice with, and a `random.Random`, which is
all that its result depends on.
"""

import copy
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutator = Callable[[bytes, Sequence[bytes], Random], bytes]

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 1000, 1024, 65535, 65536),
    *(2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64 - 1),
)
_TEXTS = ("", "a", "0", "\0", "a\nb", "\x1b[31m", "²", "٣", "é", "🙂", "\ud800", "..", "/", "../..", "a" * 300)
_TEXTS += ("a" * 5000, "9" * 5000, "layers." + "9" * 5000, "nan", "1e999", "true", "F32", "BF16")
_TEXTS += ("(", "(a+)+$", "a{99999999999}")
_DEEP = "@deep@"  # stands for lists in lists, which json could not write
_FLOATS = (0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), -float("inf"))
_LISTS = ([], {}, [0], [[]], [-1, 2], [0, 2**63], [2**32, 2**32], [1] * 65, [1, "a", None], {"": 0})
_HUGE = (10**30, 10**400, -(10**30))
_JUNK: tuple[Any, ...] = (None, True, False, *_FLOATS, *_HUGE, *NUMBERS, *_TEXTS, _DEEP, *_LISTS)


def mutate_bytes(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Flip bits, overwrite, cut off, insert, repeat or remove pieces, write numbers, splice two files; a few times."""
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        content = random.choice(_OF_BYTES)(content or b"\0", others, random)
    return content


def _flip(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    mutant = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        mutant[random.randrange(len(mutant))] ^= 1 << random.randrange(8)
    return bytes(mutant)


def _overwrite(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    mutant, (start, stop) = bytearray(content), _piece(content, random)
    for place in range(start, stop):
        mutant[place] = random.randrange(256)
    return bytes(mutant)


def _cut_off(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def _insert(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    place = random.randrange(len(content) + 1)
    piece = random.choice((random.randbytes(random.randrange(1, 40)), bytes(random.randrange(1, 200))))
    return content[:place] + piece + content[place:]


def _repeat(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    start, stop = _piece(content, random)
    return content[:stop] + content[start:stop] * random.choice((1, 1, 2, 20)) + content[stop:]


def _remove(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    start, stop = _piece(content, random)
    return content[:start] + content[stop:]


def _write_number(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    size = random.choice((1, 2, 4, 4, 8, 8, 8))
    place = random.randrange(len(content))
    if random.random() < 0.7:  # most formats align their numbers
        place -= place % min(size, 4)
    return _put(content, place, size, random)


def _splice(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    other = random.choice(others) if others else content
    if random.random() < 0.5:  # the start of one, the rest of the other
        place = random.randrange(len(content) + 1)
        return content[:place] + other[min(place, len(other)) :]
    start, stop = _piece(other, random)
    place = random.randrange(len(content) + 1)
    return content[:place] + other[start:stop] + content[place + stop - start :]


_OF_BYTES = (_flip, _flip, _overwrite, _cut_off, _insert, _repeat, _remove, *(_write_number,) * 3, _splice)


def _piece(content: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(content) or 1)
    return start, min(len(content), start + random.choice((1, 2, 4, 8, 16, 64, 256)))


def _put(content: bytes, place: int, size: int, random: Random) -> bytes:
    old = int.from_bytes(content[place : place + size], "little")
    near = (old + 1, old - 1, old * 2, old // 2, len(content), len(content) - place, ~old)
    number = random.choice((*NUMBERS, *near)) % (1 << 8 * size)
    return content[:place] + number.to_bytes(size, random.choice(("little", "little", "big"))) + content[place + size :]


def at_places(places: Callable[[bytes], Sequence[tuple[int, int]]]) -> Mutator:
    """Mutate numbers at the places (first byte, size) that a function finds in a valid file, or any bytes."""

    def mutate(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
        if random.random() < 0.4:
            return mutate_bytes(content, others, random)
        found = places(content)
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            content = _put(content, *random.choice(found), random)
        return content if random.random() < 0.8 else mutate_bytes(content, others, random)

    return mutate


def near_start(share: float) -> Mutator:
    """Mutate bytes of the first part of a file, where its structure is; sometimes all of it."""

    def mutate(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
        if random.random() < 0.3:
            return mutate_bytes(content, others, random)
        end = max(16, int(len(content) * share))
        return mutate_bytes(content[:end], [other[:end] for other in others], random) + content[end:]

    return mutate


def mutate_json(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Change places of a document: values of other kinds and sizes, missing, repeated, renamed and swapped ones."""
    if random.random() < 0.15:
        return mutate_bytes(content, others, random)
    document = json.loads(content)
    given = [json.loads(other) for other in others]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        document = _change(document, given, random)
    return _written(document, random)


def mutate_json_lines(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Mutate one line as JSON, or all as bytes."""
    if random.random() < 0.4:
        return mutate_bytes(content, others, random)
    lines = content.splitlines(keepends=True)
    number = random.randrange(len(lines))
    lines[number] = mutate_json(lines[number], lines, random) + random.choice((b"\n", b"\n", b"\r\n", b""))
    return b"".join(lines)


def _change(document: Any, others: Sequence[Any], random: Random) -> Any:
    """Change one place, or more of them deep inside."""
    path, node = [], document
    while isinstance(node, dict | list) and node and (not path or random.random() < 0.75):
        key = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
        path.append((node, key))
        node = node[key]
    if not path:
        return copy.deepcopy(random.choice(_JUNK))
    parent, key = path[-1]
    kind = random.randrange(9)  # of the change
    if kind < 4:
        parent[key] = copy.deepcopy(random.choice(_JUNK))
    elif kind == 4:
        del parent[key]
    elif kind == 5:
        parent[key] = _near(node, random)
    elif kind == 6:
        parent[key] = copy.deepcopy(_anywhere(random.choice((document, *others)), random))
    elif kind == 7 and isinstance(parent, dict):
        parent[random.choice((*_TEXTS, *parent))] = parent.pop(key)
    else:
        many = 3 if isinstance(node, dict | list) else 2000
        parent[key] = random.choice(([node], {"a": node}, [node] * 3, [node] * many))
    return document


def _near(value: Any, random: Random) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        numbers = value + 1, value - 1, -value, value * 2, value * 1000, 10**9 * value, float(value % 1000)
        return random.choice(numbers)
    if isinstance(value, str):
        longer = value + "a", value * 2, value + random.choice(_TEXTS), f" {value}"
        return random.choice((value[:-1], value.upper(), *longer))
    if isinstance(value, list):
        longer = value * 2, [*value, *value[:1]], value * (500 if len(value) < 20 else 2)
        return random.choice((value[:-1], value[::-1], *longer))
    return {**value, random.choice(_TEXTS): random.choice(_JUNK)} if isinstance(value, dict) else random.choice(_JUNK)


def _anywhere(node: Any, random: Random) -> Any:
    while isinstance(node, dict | list) and node and random.random() < 0.8:
        node = random.choice(list(node.values()) if isinstance(node, dict) else node)
    return node


def _written(document: Any, random: Random) -> bytes:
    text = json.dumps(document, ensure_ascii=random.random() < 0.5)
    depth = random.choice((10, 200, 900, 5000, 100_000))
    text = text.replace(f'"{_DEEP}"', "[" * depth + "]" * depth)
    names = re.findall(r'"\w+": ', text)
    if names and random.random() < 0.06:  # a key that is there twice
        name = random.choice(names)
        text = text.replace(name, f"{name}{json.dumps(random.choice(_TEXTS))}, {name}", 1)
    return text.encode("utf-8", "surrogatepass")


def mutate_safetensors(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Mutate the header as JSON, with a length that fits or not; or bytes anywhere."""
    if random.random() < 0.35:
        return near_start(0.5)(content, others, random)
    header, data = _halves(content)
    if random.random() < 0.3:
        header, data = _equal_shapes(header, data, random)
    else:
        header = mutate_json(header, [_halves(other)[0] for other in others], random)
    length = len(header) if random.random() < 0.9 else random.choice(NUMBERS) % 2**64
    return length.to_bytes(8, "little") + header + data


def _halves(content: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def _equal_shapes(header: bytes, data: bytes, random: Random) -> tuple[bytes, bytes]:
    """Shapes of the same number of bytes, of many axes and of none; empty tensors of enormous ones."""
    entries = json.loads(header)
    names = [name for name in entries if name != "__metadata__"]
    for _ in range(random.choice((1, 2))):
        name, extra = random.choice(names), random.choice(_TEXTS)
        if random.random() < 0.4:
            axes = random.choice((1, 5, 30, 31, 32, 33, 63, 64, 65, 200))
            entries[name]["shape"] = [1] * axes + entries[name]["shape"]
        elif random.random() < 0.5:
            shape = [random.choice(NUMBERS[1:]), *random.choices(NUMBERS, k=random.choice((1, 2, 3)))]
            entries[extra] = {"dtype": random.choice(("F32", "BF16", "F64")), "shape": [0, *map(abs, shape)]}
            entries[extra]["data_offsets"] = [len(data), len(data)]
        else:
            entries[f"{name}{extra}"] = entries.pop(name)
            names = [key for key in entries if key != "__metadata__" and key != extra]
    return json.dumps(entries).encode(), data


def mutate_archive(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Mutate the members of a zip archive, their headers above all, and pack them anew; or the archive's bytes."""
    if random.random() < 0.5:
        return mutate_bytes(content, others, random)
    members = dict(_members(content))
    for name in random.sample(sorted(members), k=min(len(members), random.choice((1, 1, 2)))):
        inside = [member for other in others for member in _members(other).values()]
        members[name] = mutate_npy(members[name], inside, random)
    if random.random() < 0.2:
        name = random.choice(sorted(members))
        new_name = random.choice(("a.npy", "b", "../c.npy", "²" + name, "\n.npy", "9" * 5000 + ".npy"))
        members[new_name] = members.pop(name)
    packed = io.BytesIO()
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(packed, "w", random.choice(kinds)) as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member, archive.compression)
    return packed.getvalue() if random.random() < 0.8 else mutate_bytes(packed.getvalue(), others, random)


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


_NPY = re.compile(rb"'descr': '[^']*'|'shape': \([^)]*\)|'fortran_order': \w+")
_DTYPES = ("'<f4'", "'|O'", "'<U1000000000'", "'|V0'", "'<M8[s]'", "'<c16'", "{}", "()", "'%%'")
_DTYPES += ("[('a', '<f4'), ('b', '<i8', (2,))]", "'(2,2)<f4'")
_SHAPES = ("()", "(-1,)", "(-4, -6)", "5", "[2]", "(True, 6, 4)", "(1.5,)", "(1,) * 10**9", f"({'1, ' * 70}6, 4)")
_SHAPES += ("(0, 9223372036854775808)", "(" * 300 + ")" * 300)
_SHAPES += (*(f"({n},)" for n in NUMBERS), *(f"(0, {n}, {n})" for n in NUMBERS))
_NPY_PARTS = (*(f"'descr': {dtype}" for dtype in _DTYPES), *(f"'shape': {shape}" for shape in _SHAPES))
_NPY_PARTS += ("'fortran_order': True", "'fortran_order': 7", "'extra': 1", "__import__('os')")


def mutate_npy(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Put another dtype, shape or order into the header of an .npy file, with a length that fits; or mutate bytes."""
    if random.random() < 0.3:
        return near_start(0.6)(content, others, random)
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length], content[10 + length :]
    found = _NPY.findall(header)
    if not found:
        return mutate_bytes(content, others, random)
    header = header.replace(random.choice(found), random.choice(_NPY_PARTS).encode(), 1)
    return content[:8] + len(header).to_bytes(2, "little") + header + data
