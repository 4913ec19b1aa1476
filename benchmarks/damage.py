"""Damaged copies of files: bytes flipped, values replaced, headers changed, at random."""

import copy
import json
import random
import struct
from typing import Any

DEEP = 3000
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 1e308, -0.5, float("nan")),
    *("", "x", "..", "../x", "/etc/passwd", "a:b", "os:abort", "x" * 5000, "\x1b[31m", "\ud7ff{}"),
    *("{0:>2000000000}", "F64", "I32", "float16", [], {}, [[]], {"": 0}, [None], ["x"] * 50),
]


def nasty(draw: random.Random) -> Any:
    if draw.random() < 0.03:
        return json.loads("[" * 400 + "]" * 400)
    return copy.deepcopy(draw.choice(NASTY))


def change_value(data: Any, draw: random.Random) -> Any:
    """`data` with one value of it removed, doubled or replaced, at a random depth."""
    if isinstance(data, dict) and data and draw.random() < 0.9:
        key = draw.choice(sorted(data))
        made = dict(data)
        what = draw.random()
        if what < 0.1:
            del made[key]
        elif what < 0.2:
            made[str(nasty(draw))] = made[key]
        else:
            made[key] = change_value(data[key], draw)
        return made
    if isinstance(data, list) and data and draw.random() < 0.9:
        made_list = list(data)
        i = draw.randrange(len(data))
        made_list[i : i + 1] = draw.choice([[change_value(data[i], draw)], [], [data[i]] * 2])
        return made_list
    return nasty(draw)


def change_bytes(raw: bytes, draw: random.Random) -> bytes:
    """`raw` with some bytes flipped, cut, doubled or replaced."""
    made = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(made)) if made else 0
        end = min(len(made), at + draw.choice([1, 4, 40]))
        what = draw.randrange(5)
        if what == 0 and made:
            made[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            del made[at:]
        elif what == 2:
            made[at:at] = made[at:end]
        elif what == 3:
            made[at:end] = draw.randbytes(end - at)
        else:
            del made[at:end]
    return bytes(made)


def change_json(raw: bytes, draw: random.Random) -> bytes:
    """A JSON text with a value or some bytes changed, or far too deep."""
    what = draw.random()
    if what < 0.02:
        return b"[" * DEEP + b"]" * DEEP
    if what < 0.25:
        return change_bytes(raw, draw)
    return json.dumps(change_value(json.loads(raw), draw)).encode()


def change_header(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file with its header changed."""
    (size,) = struct.unpack("<Q", raw[:8])
    if draw.random() < 0.4:
        return change_bytes(raw, draw)
    header, rest = raw[8 : 8 + size], raw[8 + size :]
    data = json.loads(header)
    name = draw.choice([key for key in data if key != "__metadata__"])
    if draw.random() < 0.5:
        kinds = ["F64", "F16", "BF16", "I32", "I64", "U8", "U32", "BOOL", "C64", "F8_E4M3", "X"]
        data[name]["dtype"] = draw.choice(kinds)
    else:
        data = change_value(data, draw)
    made = json.dumps(data).encode() if draw.random() < 0.95 else change_json(header, draw)
    return struct.pack("<Q", len(made)) + made + rest


def change_text(raw: bytes, draw: random.Random) -> bytes:
    """A YAML or other text with a line changed."""
    lines = raw.decode().splitlines()
    i = draw.randrange(len(lines))
    key = lines[i].partition(":")[0]
    value = draw.choice(
        [json.dumps(nasty(draw)), "!!python/name:os.abort", "&a [*a]", "\t", "'", "{"]
    )
    lines[i] = draw.choice([f"{key}: {value}", value, "", f"{key}: {value}\n{lines[i]}", "-" + key])
    return change_bytes(raw, draw) if draw.random() < 0.3 else "\n".join(lines).encode()
