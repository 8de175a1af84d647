"""Python files as data: what a file's names are bound to, worked out from its syntax, without running any of it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import ConfigError

_ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_COMPARISONS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip


class _NotData(Exception):
    """A node that is more than data."""


def read_names(path: str) -> tuple[dict[str, Any], set[str]]:
    """The top-level names of a Python file and their values, and which of them the file itself uses.

    Values are literals, names bound above, `dict(...)`, arithmetic, comparisons, `x if y else z`, joined text and
    f-strings of these. `torch.NAME` is the text "torch.NAME". Imports are passed over, assertions have to hold.

    Raises:
        ConfigError: the file cannot be read, or a line of it is more than data: names both.
    """
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"xtuner_config={path}: {error.strerror}") from None
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{path}{line} is not Python: {str(error).splitlines()[0]}") from None
    names: dict[str, Any] = {}
    for statement in tree.body:
        try:
            _run(statement, names)
        except _NotData as error:
            node = error.args[0]
            code = ast.unparse(node).splitlines()[0]
            raise ConfigError(
                f"{path}:{node.lineno}: `{code:.60}` is not data: write literals, names bound above,"
                " dict(...) and arithmetic; the file is read and not run"
            ) from None
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise ConfigError(f"{path}:{statement.lineno}: {error}") from None
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return names, used


def _run(statement: ast.stmt, names: dict[str, Any]) -> None:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            names[name] = _value(value, names)
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            names[name] = _value(value, names)
        case ast.Assert(test=test):
            if not _value(test, names):
                raise ValueError(f"`{ast.unparse(test)}` does not hold")
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
            pass
        case _:
            raise _NotData(statement)


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return f"torch.{name}"
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, names) for item in items]
        case ast.Dict(keys=keys, values=values):
            if None in keys:  # {**other}
                raise _NotData(node)
            return {_value(k, names): _value(v, names) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=items) if all(item.arg for item in items):
            return {str(item.arg): _value(item.value, names) for item in items}
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            a, b = _value(left, names), _value(right, names)
            if not isinstance(op, ast.Add) and not all(isinstance(x, int | float) for x in (a, b)):
                raise _NotData(node)  # "a" * 10**9 and "%999999999d" % 1 are not worth their memory
            return _ARITHMETIC[type(op)](a, b)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
            return _COMPARISONS[type(op)](_value(left, names), _value(right, names))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.JoinedStr(values=parts):
            return "".join(str(_value(part, names)) for part in parts)
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return _value(value, names)
        case _:
            raise _NotData(node)
