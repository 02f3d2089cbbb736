"""What a function refers to, and whether two functions compute the same.

``program`` keys its cache by the ``identity`` of functions; ``watch`` looks at the modules that a function reaches.
"""

from __future__ import annotations

import functools
import inspect
import operator
import os
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PRIMITIVES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
CONTAINERS = (list, tuple, set, frozenset, deque)
# What has parts rather than attributes.
_TRANSPARENT = (types.FunctionType, types.MethodType, functools.partial, dict, *CONTAINERS)
_LIBRARIES = (os.path.dirname(torch.__file__), os.path.dirname(__file__), os.path.dirname(os.__file__))
MANY = 1000  # elements or objects that are looked at, at most: a closure over a data set must not cost seconds
_DEPTH = 5


def unwrap(fn: Callable) -> Callable:
    """The function or module behind DataParallel, DistributedDataParallel and ``torch.compile``."""
    while True:
        if isinstance(fn, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            fn = fn.module
        elif isinstance(fn, nn.Module) and "_orig_mod" in fn._modules:
            fn = fn._modules["_orig_mod"]  # type: ignore[assignment]
        elif hasattr(fn, "_torchdynamo_orig_callable"):
            fn = fn._torchdynamo_orig_callable
        else:
            return fn


# --- what a function refers to -------------------------------------------------------------------------------


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names that a function uses, functions defined inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def referents(value: Any) -> list[tuple[Any, Any]]:
    """The objects one step away, each with the name or position that it has there."""
    if isinstance(value, (*PRIMITIVES, Tensor, type, types.ModuleType, types.BuiltinFunctionType)):
        return []
    if isinstance(value, types.FunctionType):
        found: list[tuple[Any, Any]] = [
            (i, cell.cell_contents) for i, cell in enumerate(value.__closure__ or ()) if _is_set(cell)
        ]
        found += enumerate(value.__defaults__ or ())
        found += (value.__kwdefaults__ or {}).items()
        if _is_of_a_library(value.__code__.co_filename):
            return found  # a library's globals are its own affair
        scope = value.__globals__
        return found + [(name, scope[name]) for name in dict.fromkeys(_names(value.__code__)) if name in scope]
    if isinstance(value, types.MethodType):
        return [("self", value.__self__), ("function", value.__func__)]
    if isinstance(value, functools.partial):
        return [("function", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, dict):
        return list(value.items()) if len(value) <= MANY else []
    if isinstance(value, CONTAINERS):
        return list(enumerate(value)) if len(value) <= MANY else []
    return list(getattr(value, "__dict__", {}).items())


def _is_of_a_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or "site-packages" in file


def _is_users_file(value: Any) -> bool:
    """Is it a Python module, and no library's?"""
    return isinstance(value, types.ModuleType) and not _is_of_a_library(vars(value).get("__file__") or _LIBRARIES[0])


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def in_reach(fn: Any) -> list[Any]:
    """Everything that a function refers to, directly or through a few steps."""
    seen: dict[int, Any] = {}
    level = [fn]
    for _ in range(_DEPTH):
        level = [value for value in level if id(value) not in seen and not isinstance(value, PRIMITIVES)]
        seen.update((id(value), value) for value in level)
        if len(seen) > MANY:
            break
        level = [other for value in level for other in _neighbours(value)]
    return list(seen.values())


def _neighbours(value: Any) -> Iterable[Any]:
    if isinstance(value, nn.Module):  # however deep it is
        return [*value.modules(), *(other for other in value.__dict__.values() if not isinstance(other, dict))]
    return [other for _, other in referents(value)]


def modules_of(fn: Any) -> list[nn.Module]:
    """A module and all that it holds, or all modules that a function refers to."""
    if isinstance(fn, nn.Module):
        return list(fn.modules())
    found = (module for value in in_reach(fn) if isinstance(value, nn.Module) for module in value.modules())
    return list(dict.fromkeys(found))


def tensors_of(fn: Any) -> Iterator[Tensor]:
    """The parameters and buffers of all modules that a function refers to."""
    for value in in_reach(fn):
        if isinstance(value, nn.Module):
            yield from held_tensors(value)


def held_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


# --- is it the same function? --------------------------------------------------------------------------------


class Same:
    """Compares an object by identity, without keeping it alive where that can be."""

    __slots__ = ("_id", "_ref")

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._ref: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._ref = lambda: value

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._id == other._id and self._ref() is other._ref() is not None

    def is_dead(self) -> bool:
        return self._ref() is None


_names_in: weakref.WeakKeyDictionary[Any, dict[tuple, frozenset[str]]] = weakref.WeakKeyDictionary()


def _names_used(fn: Any) -> frozenset[str]:
    """Every name that the function's code mentions, or that of a function or method which it mentions.

    Of an object only attributes with such a name can matter: a trainer's step counter does not change its model.
    """
    code = getattr(getattr(fn, "__func__", fn), "__code__", type(fn))
    known = _names_in.setdefault(code, {})
    kinds = tuple(type(value) for _, value in referents(fn))  # one code may run on objects of several classes
    if kinds not in known:
        pending: list[types.CodeType] = []
        methods: dict[str, list[types.CodeType]] = {}
        for value in in_reach(fn):
            if isinstance(value, types.FunctionType):
                pending.append(value.__code__)
            elif not isinstance(value, (nn.Module, Tensor, type, types.ModuleType)):
                for kind in type(value).__mro__:
                    for name, member in vars(kind).items():
                        member = getattr(member, "fget", getattr(member, "__func__", member))
                        if isinstance(member, types.FunctionType):
                            methods.setdefault(name, []).append(member.__code__)
        names = {"__call__"}
        pending += methods.get("__call__", [])
        while pending:
            for name in set(_names(pending.pop())) - names:
                names.add(name)
                pending += methods.get(name, [])
        known[kinds] = frozenset(names)
    return known[kinds]


def token(
    value: Any, depth: int = _DEPTH, budget: list[None] | None = None, names: frozenset[str] | None = None
) -> Any:
    """Equal for what computes the same: identity of tensors, modules and objects, value of everything plain.

    Objects are followed for a few steps, so that an option changed in place, or a helper's global rebound, is noticed.
    ``budget`` is a list that loses one element for every object followed; when it is empty identity has to do. With
    ``names`` only attributes of these names count.
    """
    budget = [None] * MANY if budget is None else budget
    if isinstance(value, PRIMITIVES):
        return type(value), repr(value) if isinstance(value, (float, complex)) else value  # 0.0 is not -0.0
    if names and depth and budget and _is_users_file(value):
        budget.pop()  # of it only what the code mentions can matter
        found = [(name, v) for name, v in vars(value).items() if name in names]
        return Same(value), tuple((name, token(v, depth - 1, budget, names)) for name, v in found)
    if isinstance(value, slice):
        return slice, token((value.start, value.stop, value.step))
    if isinstance(value, Tensor):
        return Same(value), *layout_of(value)
    if isinstance(value, np.ndarray) and value.size <= MANY:
        return Same(value), value.dtype, value.shape, value.tobytes()
    if depth == 0 or not budget or isinstance(value, nn.Module):  # modules have their own watch
        return Same(value)
    budget.pop()
    found = referents(value)
    if names is not None and not isinstance(value, _TRANSPARENT):
        found = [(name, v) for name, v in found if name in names]
    parts = tuple((token(name, 1), token(v, depth - 1, budget, names)) for name, v in found)
    if isinstance(value, (dict, *CONTAINERS)) and len(value) <= MANY:
        return type(value), parts
    if isinstance(value, types.FunctionType):
        return Same(value.__code__), parts
    if isinstance(value, (types.MethodType, functools.partial)):
        return type(value), parts
    return Same(value), parts


def globals_of(kind: type) -> list[tuple[dict[str, Any], str, Any]]:
    """The global numbers, tensors and functions that a class of modules computes with: scope, name, token.

    Those of ``forward``, of the methods that it mentions, and of the user's functions that these mention.
    """
    found: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
    pending, seen = [getattr(kind, "forward", None)], set()
    while pending:
        function = pending.pop()
        function = getattr(function, "fget", getattr(function, "__func__", function))
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        seen.add(function)
        if _is_of_a_library(function.__code__.co_filename):
            continue
        names = dict.fromkeys(_names(function.__code__))
        pending += [inspect.getattr_static(kind, name, None) for name in names]
        files = [value for name in names if _is_users_file(value := function.__globals__.get(name))]
        for scope in (function.__globals__, *map(vars, files)):
            for name in names:
                if name in scope and isinstance(value := scope[name], (*PRIMITIVES, Tensor, types.FunctionType)):
                    found[id(scope), name] = scope, name, token_of_global(value)
                    pending.append(value)
    return list(found.values())


def token_of_global(value: Any) -> Any:
    """Equal for the same number, tensor or function; what a function refers to is looked at by itself."""
    return Same(value) if isinstance(value, types.FunctionType) else token(value, 1)


def layout_of(t: Tensor) -> tuple:
    return *_of_tensor(t), t.stride() if t.layout is torch.strided else None


_of_tensor = operator.attrgetter("dtype", "device", "shape", "requires_grad")


def is_dead(key: Any) -> bool:
    """Does a token hold an object that is gone?"""
    if isinstance(key, tuple):
        return any(is_dead(part) for part in key)
    return isinstance(key, Same) and key.is_dead()


def identity(fn: Any) -> tuple[Any, Any]:
    """An object that lives about as long as the function, and what tells the function from others that share it."""
    if hasattr(type(fn), "__bound_key__"):  # an explanation: its model and its options
        model, options = fn.__bound_key__()
        anchor, key = identity(model)
        return anchor, (key, options)
    if isinstance(fn, nn.Module):
        return fn, None
    key = token(fn, names=_names_used(fn))
    if isinstance(fn, types.FunctionType):
        return fn.__code__, key
    if isinstance(fn, types.MethodType):
        return fn.__self__, key
    return fn, key
