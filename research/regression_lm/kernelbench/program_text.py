"""Python programs of PyTorch in a form that says what they compute.

Programs of KernelBench give sizes as constants of the module, and pass them by
`get_init_inputs`. In the canonical form constants stand where they are used,
docstrings, comments, annotations and imports are gone, and what `get_inputs`
makes stands first with the number of its elements. Nothing is run.
"""

import ast
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_OPERATIONS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
}
# Names that mean something to Python or PyTorch.
_KEPT = {"self", "super", "forward", "Model", "x"}
_MOST = 1 << 50


def canonical(code: str, renaming: int = 0) -> str:
  """The canonical form of a program; a program that is no Python as it is.

  Args:
    code: of the program.
    renaming: 0 keeps the program's own names; other numbers give it others,
      the same for the same number.
  """
  try:
    tree = ast.parse(code)
  except (SyntaxError, ValueError, RecursionError):
    return code
  known = _constants(tree.body)
  bodies = {
    node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)
  }
  inputs = _folded(_body(bodies.get("get_inputs")), known)
  lines = [f"inputs {_elements(inputs)}"]
  classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
  given = _returned(bodies.get("get_init_inputs"), known)
  parts = list(inputs)
  for node in classes:
    values = given if node.name == "Model" else []
    parts += _class_body(node, known, values)
  if renaming:
    parts = _renamed(parts, renaming)
  lines += [ast.unparse(ast.fix_missing_locations(part)) for part in parts]
  return "\n".join(lines)


def _class_body(node, known, given) -> list[ast.stmt]:
  found: list[ast.stmt] = []
  for method in node.body:
    if not isinstance(method, ast.FunctionDef):
      continue
    values = dict(known)
    names = [argument.arg for argument in method.args.args]
    for name in names:
      values.pop(name, None)
    if method.name == "__init__" and given:
      values |= _bound(method.args, given)
    body = _folded(_body(method), values)
    name = node.name if method.name == "__init__" else method.name
    unknown = [n for n in names if n not in values]
    title = f"{name} {' '.join(unknown[1:])}".strip()
    heading = ast.Expr(ast.Name(title, ast.Load()))
    found += [heading, *body]
  return found


def _bound(arguments: ast.arguments, given: Sequence[Any]) -> dict[str, Any]:
  """Values of the parameters of `__init__`, defaults among them."""
  names = [argument.arg for argument in arguments.args][1:]
  found = {}
  defaults = arguments.defaults
  for name, node in zip(names[len(names) - len(defaults) :], defaults):
    value = _value(node, {})
    if value is not None:
      found[name] = value
  found |= {n: v for n, v in zip(names, given) if v is not None}
  return found


def _body(function: ast.FunctionDef | None) -> list[ast.stmt]:
  """Statements, without docstring and the call of the parent's `__init__`."""
  statements = function.body if function else []
  return [
    node
    for node in statements
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    and not ast.unparse(node).startswith("super(")
  ]


def _constants(statements: Sequence[ast.stmt]) -> dict[str, Any]:
  """Names that are assigned a constant once."""
  found: dict[str, Any] = {}
  seen: set[str] = set()
  for node in statements:
    if not isinstance(node, ast.Assign):
      continue
    for target in node.targets:
      names, values = [target], [_value(node.value, found)]
      if isinstance(target, ast.Tuple):
        names = target.elts
        values = values[0] if isinstance(values[0], tuple) else []
        values = [*values, *[None] * (len(names) - len(values))]
      for name, value in zip(names, values):
        if not isinstance(name, ast.Name):
          continue
        if value is not None and name.id not in seen:
          found[name.id] = value
        else:
          found.pop(name.id, None)
        seen.add(name.id)
  return found


def _returned(function, known: Mapping[str, Any]) -> list[Any]:
  """Values of the list that a function returns; None for what is not known."""
  for node in _body(function):
    if isinstance(node, ast.Return) and isinstance(node.value, ast.List):
      return [_value(element, known) for element in node.value.elts]
  return []


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
  """A number, text or tuple of them; None for what is none."""
  if isinstance(node, ast.Name):
    return known.get(node.id)
  if isinstance(node, ast.List | ast.Tuple):
    values = [_value(element, known) for element in node.elts]
    if any(value is None for value in values):
      return None
    return values if isinstance(node, ast.List) else tuple(values)
  if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
    both = _value(node.left, known), _value(node.right, known)
    if not all(isinstance(value, int | float) for value in both):
      return None
    try:
      return _OPERATIONS[type(node.op)](*both)
    except (ArithmeticError, ValueError):
      return None
  try:
    return ast.literal_eval(node)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
    return None


class _Fold(ast.NodeTransformer):
  """Puts constants in the place of their names, and drops annotations."""

  def __init__(self, known: Mapping[str, Any]):
    self._known = known

  def visit_Name(self, node):  # noqa: N802 (of ast)
    if isinstance(node.ctx, ast.Load) and node.id in self._known:
      return _literal(self._known[node.id])
    return node

  def visit_BinOp(self, node):  # noqa: N802 (of ast)
    value = _value(node, self._known)
    return self.generic_visit(node) if value is None else _literal(value)

  def visit_Call(self, node):  # noqa: N802 (of ast)
    node = self.generic_visit(node)
    arguments = []
    for argument in node.args:
      inner = argument.value if isinstance(argument, ast.Starred) else None
      is_row = isinstance(inner, ast.Tuple | ast.List)
      arguments += inner.elts if is_row else [argument]
    node.args = arguments
    return node

  def visit_AnnAssign(self, node):  # noqa: N802 (of ast)
    if node.value is None:
      return None
    return self.visit(ast.Assign([node.target], node.value, lineno=0))


def _literal(value: Any) -> ast.expr:
  return ast.parse(repr(value), mode="eval").body


def _folded(statements, known: Mapping[str, Any]) -> list[ast.stmt]:
  fold = _Fold(known)
  found = [fold.visit(node) for node in statements]
  return [node for node in found if node is not None]


def _elements(statements: Sequence[ast.stmt]) -> str:
  """Elements of the tensors that calls with sizes make, as powers of two."""
  found = []
  for statement in statements:
    for node in ast.walk(statement):
      if not isinstance(node, ast.Call):
        continue
      sizes = [_value(argument, {}) for argument in node.args]
      rows = [size for size in sizes if isinstance(size, tuple)]
      flat = [n for row in rows for n in row] if rows else sizes
      if flat and all(isinstance(n, int) and 0 < n < _MOST for n in flat):
        found.append(round(sum(map(math.log2, flat))))
  return " ".join(f"2^{power}" for power in found)


def _renamed(statements: list[ast.stmt], seed: int) -> list[ast.stmt]:
  """The names that a program gives, in its statements, by others."""
  names: dict[str, str] = {}
  order = np.random.default_rng((seed, 37)).permutation(200)

  def other(name: str) -> str:
    if name in _KEPT or name.startswith("__"):
      return name
    return names.setdefault(name, f"v{order[len(names) % len(order)]}")

  for statement in statements:
    for node in ast.walk(statement):
      if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        other(node.id)
      elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        other(node.attr)
  for statement in statements:
    for node in ast.walk(statement):
      if isinstance(node, ast.Name) and node.id in names:
        node.id = names[node.id]
      elif isinstance(node, ast.Attribute) and node.attr in names:
        node.attr = names[node.attr]
  return statements
