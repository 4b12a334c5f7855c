"""Damage to files: bytes anywhere, and values in JSON, in a safetensors header and in its
metadata.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any

DEEP = 50_000
# What takes the place of a value, as it is written in JSON.
VALUES = [
    *("null", "true", "false", "0", "1", "-1", "2", "3", "7", "0.5", "-0.0", "1e-320", "1e400"),
    *("-1e400", "NaN", "Infinity", "1000000", "1000000000", str(2**31), str(2**63), str(-(2**63))),
    *(str(10**19), "1" + "0" * 400, "1" + "0" * 5000, '""', '"x"', '"1"', '"-1"', '"\\ud800"'),
    *('"\\u0000"', '"../../x"', '"' + "x" * 20_000 + '"', "[]", "[[]]", "[0]", "[null]", "{}"),
    *('{"a": 1}', "[1, 2, 3]", '["x"]', "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP),
]
# Keys that mean something where they are not expected.
ENTRIES: list[tuple[str, Any]] = [
    ("auto_map", {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}),
    ("tokenizer_class", "Evil"),
    ("quantization_config", {"quant_method": "bitsandbytes"}),
    ("rope_scaling", {"type": "yarn", "factor": 1e30}),
    ("partial_rotary_factor", 0.5),
    ("chat_template", "{{ raise_exception('no') }}"),
    ("chat_template", "{{ 1 / 0 }}"),
    ("chat_template", "{% for m in messages %}{{ m.absent.content }}{% endfor %}"),
    ("added_tokens", [{"id": 10**12, "content": "x"}]),
    ("max_length", -1),
    ("dtype", "float8_e4m3fn"),
    ("torch_dtype", "int8"),
    ("__class__", "x"),
]
# Stands for what JSON's writer would refuse, or would not survive.
_HERE = "⟦here⟧"


def damage(draw: Random, content: bytes) -> tuple[str, bytes]:
    """What was done, in a few words, and what it made of a file's content."""
    if draw.random() < 0.6:
        done = _damage_header(draw, content) or _damage_json(draw, content)
        if done is not None:
            return done
    name = draw.choice(list(_BYTES))
    return f"bytes: {name}", _BYTES[name](draw, content)


def _flip(draw: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 8, 100]) if content else 0):
        changed[_place(draw, content)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _overwrite(draw: Random, content: bytes) -> bytes:
    start = _place(draw, content)
    new = draw.randbytes(draw.choice([1, 2, 8, 100]))
    return content[:start] + new + content[start + len(new) :]


def _insert(draw: Random, content: bytes) -> bytes:
    start = _place(draw, content)
    return content[:start] + draw.randbytes(draw.choice([1, 2, 8, 100])) + content[start:]


def _remove(draw: Random, content: bytes) -> bytes:
    start = _place(draw, content)
    return content[:start] + content[start + draw.choice([1, 2, 8, 100, 5000]) :]


def _repeat(draw: Random, content: bytes) -> bytes:
    start, stop = sorted((_place(draw, content), _place(draw, content)))
    return content[:stop] + content[start:]


def _blank(draw: Random, content: bytes) -> bytes:
    start = _place(draw, content)
    size = min(draw.choice([1, 8, 512, 4096]), len(content) - start)
    return content[:start] + draw.choice([b"\0", b"\xff", b" "]) * size + content[start + size :]


_BYTES: dict[str, Callable[[Random, bytes], bytes]] = {
    "bits flipped": _flip,
    "bytes overwritten": _overwrite,
    "bytes inserted": _insert,
    "bytes removed": _remove,
    "a stretch repeated": _repeat,
    "a stretch blanked": _blank,
    "truncated": lambda draw, content: content[: _place(draw, content)],
    "something after the end": lambda draw, content: content + draw.randbytes(draw.choice([1, 9])),
    "other bytes": lambda draw, content: draw.randbytes(draw.choice([0, 1, 8, 9, 1000])),
}


def _place(draw: Random, content: bytes) -> int:
    """Anywhere in the content, often near its beginning or its end."""
    size = max(len(content), 1)
    near = draw.choice([size, size, 16, 600])
    place = draw.randrange(min(near, size))
    return place if draw.random() < 0.8 else size - 1 - place


def _damage_json(draw: Random, content: bytes) -> tuple[str, bytes] | None:
    """The content with a change to a JSON file, or to one line of JSON lines; None for others."""
    lines = content.splitlines(keepends=True)
    try:
        if content[:1] == b"{" and len(lines) > 1 and lines[0].rstrip().endswith(b"}"):
            number = draw.randrange(len(lines))
            name, line = _edit(draw, json.loads(lines[number]))
            lines[number] = line + b"\n"
            return f"JSON line: {name}", b"".join(lines)
        name, edited = _edit(draw, json.loads(content))
        return f"JSON: {name}", edited
    except ValueError:
        return None


def _damage_header(draw: Random, content: bytes) -> tuple[str, bytes] | None:
    """The content with a change to a safetensors file's header or to JSON within its metadata; None
    for other files.
    """
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
    except ValueError:
        return None
    inner = [name for name, value in header.get("__metadata__", {}).items() if value[:1] == "{"]
    if inner and draw.random() < 0.5:
        (name, *_) = inner
        what, edited = _edit(draw, json.loads(header["__metadata__"][name]))
        header["__metadata__"][name] = edited.decode()
        what, text = f"metadata: {what}", json.dumps(header).encode()
    else:
        what, text = _edit(draw, header)
        what = f"header: {what}"
    text += b" " * (-len(text) % 8)
    length = len(text)
    if draw.random() < 0.05:
        length = draw.choice([0, 1, 7, length - 1, length + 8, 2**31, 2**40, 2**63, 2**64 - 1])
        what = "header: a wrong length"
    return what, length.to_bytes(8, "little") + text + content[8 + size :]


def _edit(draw: Random, tree: Any) -> tuple[str, bytes]:
    """What was changed in a JSON value, and how it is written then."""
    whole = [tree]
    holder: Any = whole
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.85:
        holder = holder[key]
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    value, raw = holder[key], ""
    how = draw.choices(["number", "removed", "renamed", "added", "value"], [3, 1, 1, 1, 6])[0]
    if how == "number" and type(value) in (int, float):
        holder[key] = draw.choice([value + 1, value - 1, -value, 2 * value, 1000 * value])
    elif how == "removed" and holder is not whole:
        del holder[key]
    elif how == "renamed" and isinstance(holder, dict):
        holder[draw.choice(["", "x", "🙂", "keys", key * 2])] = holder.pop(key)
    elif how == "added" and isinstance(value, dict):
        name, new = draw.choice(ENTRIES)
        value[name] = new
    else:
        how, raw, holder[key] = "value", draw.choice(VALUES), _HERE
    return how, json.dumps(whole[0]).replace(json.dumps(_HERE), raw).encode()
