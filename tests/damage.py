"""Kinds of damage to a folder held as bytes; each draws what it does from a generator, so that a case can be made again.

A mutation is called with files that earlier ones may have damaged already, and does nothing where it finds nothing to damage.
"""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 7, 65535, 65536, 65537, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 10**30, 1.5, 1e308, float("nan"), float("inf")),
    *(None, True, False, "", "x", "bfloat16", "../../x", "vptq", "voroq", "a" * 5000, "\0", [], [1], [-1, -1], [[]], {}, {"a": {}}),
)


def _shard(files: Files, rng: random.Random) -> str:
    return rng.choice([name for name in files if name.endswith(".safetensors")])


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload; an empty header for what a former mutation made unreadable."""
    length = struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0]
    try:
        table = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError, OverflowError):
        return {}, data
    return (table, data[8 + length :]) if isinstance(table, dict) else ({}, data)


def joined(table: dict[str, Any], payload: bytes) -> bytes:
    header = json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + payload


def _entry(table: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]] | None:
    entries = [(name, entry) for name, entry in table.items() if name != "__metadata__" and isinstance(entry, dict)]
    return rng.choice(entries) if entries else None


def header_length(files: Files, rng: random.Random) -> None:
    name = _shard(files, rng)
    length = struct.unpack("<Q", files[name][:8].ljust(8, b"\0"))[0]
    other = rng.choice([0, 1, 2, length - 1, length + 1, length + 8, 2**31, 2**40, 2**63, 2**64 - 1, rng.getrandbits(64)])
    files[name] = struct.pack("<Q", other % 2**64) + files[name][8:]


def file_size(files: Files, rng: random.Random) -> None:
    name = _shard(files, rng)
    data = files[name]
    keep = rng.choice([0, 1, 7, 8, 9, len(data) - 1, len(data) // 2, rng.randrange(len(data) + 1)])
    files[name] = data[:keep] if rng.random() < 0.6 else data + bytes(rng.randrange(1, 64))


def header_bytes(files: Files, rng: random.Random) -> None:
    name = _shard(files, rng)
    data = bytearray(files[name])
    length = min(struct.unpack("<Q", bytes(data[:8]).ljust(8, b"\0"))[0], len(data) - 8)
    for _ in range(rng.randrange(1, 5)):
        if length > 0:
            data[8 + rng.randrange(length)] = rng.choice([rng.randrange(256), *b'0123456789[]{}",:-.eE'])
    files[name] = bytes(data)


def header_field(files: Files, rng: random.Random) -> None:
    """dtype, shape or offsets of one tensor, the payload left as it is."""
    name = _shard(files, rng)
    table, payload = split(files[name])
    chosen = _entry(table, rng)
    if chosen is None:
        return
    key = rng.choice(["dtype", "shape", "data_offsets", "data_offsets"])
    value = chosen[1].get(key)
    if key == "dtype" or not isinstance(value, list) or not value or rng.random() < 0.3:
        types = ["F32", "F16", "BF16", "I64", "I32", "I16", "U16", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32"]
        chosen[1][key] = rng.choice(types) if key == "dtype" and rng.random() < 0.8 else rng.choice(VALUES)
    else:
        value = list(value)
        at = rng.randrange(len(value))
        now = value[at] if isinstance(value[at], int) else 0
        value[at] = rng.choice([now + 1, now - 1, now * 2, -now, 2**31, 2**62, 0, *VALUES])
        chosen[1][key] = rng.choice([value, value[::-1], [*value, 1], value[1:]])
    if rng.random() < 0.1:
        chosen[1].pop(key)
    files[name] = joined(table, payload)


def header_names(files: Files, rng: random.Random) -> None:
    name = _shard(files, rng)
    table, payload = split(files[name])
    a, b = _entry(table, rng), _entry(table, rng)
    if a is None or b is None:
        return
    how = rng.randrange(5)
    if how == 0:
        table[a[0]], table[b[0]] = b[1], a[1]
    elif how == 1:
        names = ["", ".", "..", "a" * 3000, a[0] + ".weight", a[0].upper(), "x\0y", "x\ny", a[0] + ".", "weight"]
        table[rng.choice(names)] = table.pop(a[0])
    elif how == 2:
        table[a[0] + rng.choice(["", "2", ".extra"])] = b[1]
    elif how == 3:
        table["__metadata__"] = rng.choice(VALUES)
    else:
        table["__metadata__"] = {"format": rng.choice(["pt", "tf", "", "x"])}
    files[name] = joined(table, payload)


def payload_bits(files: Files, rng: random.Random) -> None:
    name = _shard(files, rng)
    table, payload = split(files[name])
    data = bytearray(payload)
    chosen = _entry(table, rng)
    span = chosen[1].get("data_offsets") if chosen else None
    plain = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) and 0 <= span[0] < span[1] <= len(data)
    low, high = span if plain else (0, len(data))
    for _ in range(rng.choice([1, 4, 64])):
        if high > low:
            data[rng.randrange(low, high)] = rng.choice([0, 0x7F, 0xFF, rng.randrange(256)])
    files[name] = joined(table, bytes(data)) if table else files[name]


def tensors(files: Files, rng: random.Random) -> None:
    """A well-formed file whose tensors are other ones: dropped, added, cut, cast, reshaped, filled."""
    name = _shard(files, rng)
    table, payload = split(files[name])
    kept = {n: e for n, e in table.items() if n != "__metadata__" and isinstance(e, dict) and isinstance(e.get("data_offsets"), list)}
    if not kept:
        return
    try:
        parts = {n: (e["dtype"], list(e["shape"]), payload[slice(*e["data_offsets"])]) for n, e in kept.items()}
    except (TypeError, KeyError, ValueError):
        return
    victim = rng.choice(list(parts))
    dtype, shape, data = parts[victim]
    how = rng.randrange(7)
    if how == 0:
        del parts[victim]
    elif how == 1:
        parts[victim + rng.choice([".weight", ".indices", "_1", "x"])] = parts[victim]
    elif how == 2:
        parts[victim] = ({"F32": "I32", "I32": "F32", "F16": "I16", "BF16": "F16", "I16": "BF16"}.get(dtype, "U8"), shape, data)
    elif how == 3:
        parts[victim] = (dtype, rng.choice([shape[::-1], [1, *shape], shape[:-1], [], [0], [len(data)]]), data)
    elif how == 4 and shape:
        parts[victim] = (dtype, [0, *shape[1:]], b"")
    elif how == 5:
        parts[victim] = (dtype, shape, bytes([rng.choice([0, 0x7F, 0x80, 0xFF])]) * len(data))
    else:
        parts[victim] = (dtype, shape, bytes(rng.randrange(256) for _ in data))
    made, body = {"__metadata__": {"format": "pt"}}, b""
    for n, (d, s, part) in parts.items():
        made[n] = {"dtype": d, "shape": s, "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    files[name] = joined(made, body)


def _slots(value: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A random place (container, key) in nested JSON, deep ones likelier."""
    if not isinstance(value, dict | list) or not value:
        return None
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    return (rng.random() < 0.9 and _slots(value[key], rng)) or (value, key)


def _change(container: Any, key: Any, rng: random.Random) -> None:
    value = container[key]
    how = rng.randrange(6)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[rng.choice(["extra", "norm_dim", "version", key + "x", "bias"])] = rng.choice(VALUES)
    elif how == 2 and isinstance(value, int) and not isinstance(value, bool):
        container[key] = rng.choice([value + 1, value - 1, value * 2, -value, value * 10**6, str(value), float(value)])
    elif how == 3:
        container[key] = [value]
    else:
        container[key] = rng.choice(VALUES)


def _config(files: Files) -> dict[str, Any]:
    try:
        config = json.loads(files[CONFIG])
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _quantization(config: dict[str, Any]) -> Any:
    """The quantization of a config, sharing its objects; the first releases' `quant_config` in the shape of today's."""
    first = config.get("quant_config")
    return {"config_for_layers": first} if isinstance(first, dict) else config.get("quantization_config")


def quantization_fields(files: Files, rng: random.Random) -> None:
    config = _config(files)
    place = _slots(config if "quant_config" in config and rng.random() < 0.1 else _quantization(config), rng)
    if place:
        _change(*place, rng)
        files[CONFIG] = json.dumps(config).encode()


def layer_fields(files: Files, rng: random.Random) -> None:
    """One field of one linear, changed to something near the truth."""
    config = _config(files)
    quantization = _quantization(config)
    layers = [e for key in ("config_for_layers", "shared_layer_config", "layers") for e in _entries(quantization, key)]
    if layers:
        layer = rng.choice(layers)
        key = rng.choice(list(layer) or [""])
        value = layer.get(key)
        if isinstance(value, list) and value and rng.random() < 0.7:
            value[rng.randrange(len(value))] = rng.choice([0, 1, -1, 2, 4, 8, 64, 65536, 2**17, *VALUES])
        elif isinstance(value, bool):
            layer[key] = not value
        else:
            layer[key] = rng.choice([1, 2, 4, 16, 32, 48, *VALUES])
        files[CONFIG] = json.dumps(config).encode()


def _entries(quantization: Any, key: str) -> list[dict[str, Any]]:
    layers = quantization.get(key) if isinstance(quantization, dict) else None
    return [entry for entry in layers.values() if isinstance(entry, dict)] if isinstance(layers, dict) else []


def config_names(files: Files, rng: random.Random) -> None:
    """Modules renamed, swapped, dropped or made up."""
    config = _config(files)
    quantization = _quantization(config)
    key = rng.choice(["config_for_layers", "layers", "shared_layer_config"])
    layers = quantization.get(key) if isinstance(quantization, dict) else None
    if not isinstance(layers, dict) or len(layers) < 2:
        return
    a, b = rng.sample(list(layers), 2)
    names = ["", ".", "model", "lm_head", "model.norm", a + ".x", a.replace("0", "7"), "a" * 3000, "q_proj", "..", "model..x", "é", "x\ny"]
    new = rng.choice(names)
    if rng.random() < 0.3:
        layers[a], layers[b] = layers[b], layers[a]
    elif rng.random() < 0.5:
        layers[new] = layers.pop(a)
    else:
        layers.pop(a)
    files[CONFIG] = json.dumps(config).encode()


def model_config(files: Files, rng: random.Random) -> None:
    config = _config(files)
    sizes = ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads"]
    others = ["dtype", "torch_dtype", "architectures", "model_type", "tie_word_embeddings", "text_config", "num_local_experts", "head_dim"]
    key = rng.choice([*sizes, *others])
    config[key] = rng.choice(VALUES)
    if rng.random() < 0.2:
        config.pop(key)
    files[CONFIG] = json.dumps(config).encode()


def json_text(files: Files, rng: random.Random) -> None:
    """The bytes of a JSON file."""
    name = rng.choice([name for name in (CONFIG, INDEX) if name in files])
    data = files[name]
    how = rng.randrange(5)
    if how == 0:
        data = data[: rng.randrange(len(data) + 1)]
    elif how == 1 and data:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    elif how == 2:
        data = b'{"quantization_config":' + b"[" * 100_000
    elif how == 3:
        data = rng.choice([b"", b"[]", b"null", b"\xff\xfe", b"1" * 5000, b'"x"', b"{}", b'{"quantization_config": {}}'])
    else:
        data = data.replace(b"{", b'{"quant_method": "vptq",', 3)
    files[name] = data


def index_file(files: Files, rng: random.Random) -> None:
    if INDEX not in files:
        return
    try:
        index = json.loads(files[INDEX])
        weights = index["weight_map"]
        name = rng.choice(list(weights))
        kept = weights[name]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return
    hostile = ["../x.safetensors", "/etc/passwd", "model.bin", ".safetensors", "", *sorted(set(map(str, weights.values()))), *VALUES]
    how = rng.randrange(4)
    if how == 0:
        weights[name] = rng.choice(hostile)
    elif how == 1:
        del weights[name]
    elif how == 2:
        weights[name + "x"] = kept
    else:
        index["weight_map"] = rng.choice(VALUES)
    files[INDEX] = json.dumps(index).encode()


MUTATIONS: list[tuple[str, Callable[[Files, random.Random], None]]] = [
    *(("header length", header_length), ("file size", file_size), ("header bytes", header_bytes), ("header names", header_names)),
    *[("header field", header_field), ("payload", payload_bits), ("tensors", tensors), ("layer fields", layer_fields)] * 2,
    *[("quantization fields", quantization_fields)] * 3,
    *(("config names", config_names), ("model config", model_config), ("json text", json_text), ("index", index_file)),
]
