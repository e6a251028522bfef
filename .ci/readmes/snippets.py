"""Checks Python in READMEs without running it: it compiles, what it imports is there, calls fit the signatures."""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass
class Names:
    """What the names of a snippet stand for: objects that were imported, and the classes of what calls returned."""

    objects: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, type] = field(default_factory=dict)


def check_snippet(text: str, folder: Path, names: Names) -> Iterator[str]:
    """Problems of a snippet whose modules are in `folder`, which is on sys.path; `names` gets what it defines."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield f"not valid Python: {error.msg} (line {error.lineno} of the snippet)"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _check_import(node, folder, names)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            _remember_class(node, names)
    yield from _check_calls(tree, names)


def check_call(text: str, names: Names) -> Iterator[str]:
    """Problems of one expression, given the names of the README's snippets."""
    tree = ast.parse(text, mode="eval")
    known = names.objects.keys() | names.classes.keys()
    call = tree.body
    base = call.func.value if isinstance(call.func, ast.Attribute) else call.func
    if isinstance(base, ast.Name) and base.id not in known:
        yield f"{base.id}: no Python of this README imports or defines it"
    yield from _check_calls(tree, names)


def _check_import(node: ast.Import | ast.ImportFrom, folder: Path, names: Names) -> Iterator[str]:
    modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    for name in modules:
        top = name.partition(".")[0]
        is_ours = (folder / f"{top}.py").is_file() or (folder / top).is_dir()
        if not is_ours:
            if importlib.util.find_spec(top) is None:
                yield f"import {name}: no such module in {folder.name} or among the installed packages"
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            yield f"import {name}: {error}"
            continue
        names.objects.update(_public(module))
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if not hasattr(module, alias.name):
                yield f"from {name} import {alias.name}: it has no {alias.name}"


def _public(module: ModuleType) -> dict[str, Any]:
    return {name: getattr(module, name) for name in getattr(module, "__all__", dir(module)) if name[0] != "_"}


def _remember_class(node: ast.Assign, names: Names) -> None:
    """`x = C(...)` and `x = C.from_something(...)` are taken to give a C."""
    function = node.value.func
    base = function.value if isinstance(function, ast.Attribute) else function
    made = names.objects.get(base.id) if isinstance(base, ast.Name) else None
    if inspect.isclass(made) and isinstance(node.targets[0], ast.Name):
        names.classes[node.targets[0].id] = made


def _check_calls(tree: ast.AST, names: Names) -> Iterator[str]:
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        written = ast.unparse(call.func)
        if isinstance(call.func, ast.Name):
            function = names.objects.get(call.func.id)
        elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            owner = names.classes.get(call.func.value.id) or names.objects.get(call.func.value.id)
            if owner is None:
                continue
            function = getattr(owner, call.func.attr, None)
            if function is None:
                yield f"{written}: {owner.__name__} has no {call.func.attr}"
        else:
            continue
        if callable(function):
            is_method = call.func.value.id in names.classes if isinstance(call.func, ast.Attribute) else False
            yield from _check_signature(call, function, written, has_self=is_method and inspect.isfunction(function))


def _check_signature(call: ast.Call, function: Any, written: str, *, has_self: bool) -> Iterator[str]:
    is_open = any(isinstance(argument, ast.Starred) or _is_ellipsis(argument) for argument in call.args)
    if any(keyword.arg is None for keyword in call.keywords):
        return
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin, or a subclass of one, that does not tell
        return
    given = [None] * (len(call.args) + has_self)
    try:
        bind = signature.bind_partial if is_open else signature.bind
        bind(*given, **{keyword.arg: None for keyword in call.keywords})
    except TypeError as error:
        yield f"{written}{signature}: {error}"


def _is_ellipsis(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis
