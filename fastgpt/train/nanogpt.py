"""nanoGPT's config files: Python files of plain assignments, read and never executed."""

import ast
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt.errors import RequestError

# What a config file may set to anything: it changes nothing here, or not what is learnt.
FREE = {"wandb_run_name"}

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_LARGEST = 1e18  # of a number: an expression cannot take all memory


def read(path: Path) -> dict[str, Any]:
    """The names that a config file assigns, with their values.

    A value is a number, a text, True, False or None, or arithmetic on numbers and on names assigned before.

    Raises:
        RequestError: the file cannot be read, or has something else in it.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RequestError(f"{path} is not a config file: {error}") from error
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_comment(node):
            continue
        where = f"{path}, line {node.lineno}"
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            raise RequestError(f"{where}: only lines like 'name = value' are read")
        name = node.targets[0].id
        try:
            values[name] = _value(node.value, values)
        except (ValueError, TypeError, ArithmeticError) as error:
            if name not in FREE:
                raise RequestError(f"{where}: {name} is not a plain value ({error})") from error
    return values


def _is_comment(node: ast.stmt) -> bool:
    """Whether a statement is a text that nothing is done with."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """What an expression comes to. ``ValueError`` if it is not plain."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _number(_value(node.operand, names))
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = (_number(_value(side, names)) for side in (node.left, node.right))
        return _number(_BINARY[type(node.op)](left, right))
    raise ValueError(f"'{ast.unparse(node)[:60]}' is neither a value nor arithmetic")


def _number(value: Any) -> int | float:
    if not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{str(value)[:60]!r} is not a number that a flag can have")
    return value
