"""`calculator`: arithmetic without errors, of bounded size."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from typing import ClassVar

from .tools import ToolEnvironment, schema

_LONGEST = 1000  # characters of an expression
_MOST_BITS = 10_000  # of a numerator or denominator, 3,010 digits
_DIGITS = Context(prec=12)  # of what is no decimal number
_AS_PYTHON = {"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"}
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # 1,234,567
_PADDED = re.compile(r"(?<![\d.])0+(?=\d)")  # 007
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d{1,4}))?")


class Calculator(ToolEnvironment):
    """A tool that evaluates an expression."""

    tools: ClassVar = [
        schema(
            "calculator",
            "Evaluates an arithmetic expression exactly.",
            expression=("string", "Numbers, + - * / // % ** and parentheses, such as (12 + 3) * 4.5"),
        )
    ]

    def calculator(self, expression: str) -> str:
        """Its value: a whole or decimal number exactly, any other to 12 digits.

        Raises:
            ValueError: it is none, or too large.
        """
        return shown(evaluate(str(expression)))


def shown(value: Fraction) -> str:
    """A number as text."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, digits = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        digits = max(digits, count)
    if rest != 1:
        return str(_DIGITS.divide(Decimal(value.numerator), Decimal(value.denominator)))
    text = str(abs(value.numerator) * 10**digits // value.denominator).zfill(digits + 1)
    return f"{'-' if value < 0 else ''}{text[:-digits]}.{text[-digits:]}"


def evaluate(expression: str) -> Fraction:
    """The value of an expression.

    Raises:
        ValueError: it is none, divides by zero, or is too large.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters, and {_LONGEST} are allowed")
    text = _PADDED.sub("", _GROUPED.sub("", expression.strip()))
    for sign, meant in _AS_PYTHON.items():
        text = text.replace(sign, meant)
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r:.60} is not an arithmetic expression") from None


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return _number(ast.get_source_segment(text, node) or "")
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, inner):
            value = _value(inner, text)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left, sign, right) if type(sign) in _OPERATIONS:
            return _fitting(_OPERATIONS[type(sign)](_value(left, text), _value(right, text)))
    raise ValueError(f"{ast.get_source_segment(text, node)!r:.60} is not arithmetic")


def _number(text: str) -> Fraction:
    """What is written, and not the nearest binary number."""
    match = _NUMBER.fullmatch(text.replace("_", ""))
    if match is None:
        raise ValueError(f"{text!r:.60} is not a number")
    return _fitting(Fraction(match[1]) * Fraction(10) ** int(match[2] or 0))


def _fitting(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        raise ValueError("the result is too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("exponents must be whole numbers")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size > 1 and (size - 1) * abs(exponent) > _MOST_BITS:
        raise ValueError("the result is too large")
    return base ** int(exponent)


_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b), ast.Mod: operator.mod, ast.Pow: _power,
}  # fmt: skip
