"""Tools as chat templates take them: `{"type": "function", "function": {"name", "description", "parameters"}}`, the
parameters a JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..config import ConfigError, nearest

Tools = list[dict[str, Any]] | None

_SHAPE = "a list of {'type': 'function', 'function': {'name': …, 'description': …, 'parameters': a JSON schema}}"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip
# Python's names of types, as the tools of xLAM have them
_OF_PYTHON = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "tuple": "array",
    "set": "array", "dict": "object",
}  # fmt: skip


def read_tools(value: Any, where: str = "tools") -> Tools:
    """Tools from a list of schemas, of functions, or of both, or from JSON; None where there are none.

    A schema may stand alone, without `{"type": "function"}` around it, or be xLAM's, whose parameters are named at once
    and have Python's types.

    Args:
        where: for errors.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value or "null")
        except (ValueError, RecursionError):
            raise ConfigError(f"{where} must be {_SHAPE}, and is text that is no JSON") from None
    value = [value] if isinstance(value, dict) else value
    if not value:
        return None
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be {_SHAPE}")
    return [schema_of(tool) if callable(tool) else _tool(tool, f"{where}: tool {i}") for i, tool in enumerate(value, 1)]


def schema_of(function: Callable) -> dict[str, Any]:
    """The schema of a Python function, by its signature and a docstring in Google's style, as transformers makes it.

    Raises:
        ConfigError: an argument has no type or no description, or transformers is not installed.
    """
    try:
        from transformers.utils import get_json_schema
    except ImportError:
        raise ConfigError(
            f"the schema of {function.__name__} needs transformers: pip install -e '.[hf]', or give a schema"
        ) from None
    try:
        return get_json_schema(function)
    except Exception as error:  # of several kinds
        raise ConfigError(f"{function.__name__} gives no schema: {' '.join(str(error).split())}") from None


def fault(name: str, arguments: Mapping[str, Any], tools: list[dict[str, Any]]) -> str | None:
    """What is wrong with a call; None: nothing.

    Of JSON schemas, `type`, `enum`, `required`, `properties`, `items` and `additionalProperties` are looked at. An
    argument beyond the tool's `properties` is wrong unless the last of these allows it.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if name not in schemas:
        return f"there is no tool {name!r}: {nearest(name, schemas)}"
    schema = schemas[name]
    return _fault(arguments, {"additionalProperties": "properties" not in schema, **schema}, f"{name}: ")


def _fault(value: Any, schema: Any, place: str) -> str | None:
    if not isinstance(schema, dict):
        return None
    types = schema.get("type", [])
    types = types if isinstance(types, list) else [types]
    if types and not any(_is_a(value, name) for name in types):
        return f"{place}must be of the type {' or '.join(map(str, types))}, not {_type_of(value)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{place}must be one of {json.dumps(schema['enum'], ensure_ascii=False)}"
    if isinstance(value, list):
        inner = [(item, schema.get("items"), f"{place}item {i}: ") for i, item in enumerate(value, 1)]
    elif isinstance(value, dict):
        properties, others = schema.get("properties") or {}, schema.get("additionalProperties", True)
        if missing := [key for key in schema.get("required") or () if key not in value]:
            return f"{place}{missing[0]!r} is missing"
        if others is False and (beyond := [key for key in value if key not in properties]):
            return f"{place}there is no {beyond[0]!r}" + (f": {nearest(beyond[0], properties)}" if properties else "")
        inner = [(item, properties.get(key, others), f"{place}{key!r} ") for key, item in value.items()]
    else:
        return None
    return next(filter(None, (_fault(*part) for part in inner)), None)


def _is_a(value: Any, name: Any) -> bool:
    if name not in _TYPES:
        return True  # a type that JSON does not have
    whole = name == "integer" and isinstance(value, float) and value.is_integer()
    return whole or (isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool)))


def _type_of(value: Any) -> str:
    return next(name for name in ("boolean", *_TYPES) if _is_a(value, name))


def _tool(tool: Any, place: str) -> dict[str, Any]:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ConfigError(f"{place} has no name: tools are {_SHAPE}")
    parameters = inner.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"{place}: its parameters must be a JSON schema, not {type(parameters).__name__}")
    if parameters and "properties" not in parameters and parameters.get("type") != "object":
        inner = {**inner, "parameters": _of_xlam(parameters)}
    return _without_none({"type": "function", "function": inner})


def _of_xlam(parameters: dict[str, Any]) -> dict[str, Any]:
    properties, required = {}, []
    for name, about in parameters.items():
        about = dict(about) if isinstance(about, dict) else {}
        word = str(about.get("type", ""))
        kind = (re.match(r"\w*", word) or [""])[0].lower()
        if "optional" not in word.lower() and about.get("default") is None:
            required.append(name)
        properties[name] = about | ({"type": _OF_PYTHON[kind]} if kind in _OF_PYTHON else {})
    return {"type": "object", "properties": properties, "required": required}


def _without_none(value: Any) -> Any:
    """A table has every column in every row."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
