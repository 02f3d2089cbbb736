"""What a function refers to, and whether two functions compute the same.

``program`` keys its cache by the ``identity`` of functions; ``watch`` compares the modules that a function reaches.
Everything here works on *tokens*: values that compare equal exactly where two objects compute the same.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

PRIMITIVES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
CONTAINERS = (list, tuple, set, frozenset, deque)
# Types whose contents are parts, all of which count, rather than attributes, of which only those that are named do.
_TRANSPARENT = (types.FunctionType, types.MethodType, functools.partial, dict, *CONTAINERS)
_LIBRARIES = (os.path.dirname(torch.__file__), os.path.dirname(__file__), os.path.dirname(os.__file__))
MANY = 1000  # the most elements or objects that are looked at: a closure over a data set must not cost seconds
_DEPTH = 5  # how many steps objects are followed


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
    """The global names that a function uses, and those of the functions defined inside it."""
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
            return found  # libraries' globals do not change between calls
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
    attributes = list(getattr(value, "__dict__", {}).items())
    return attributes + [(name, getattr(value, name)) for name in _slots_of(type(value)) if hasattr(value, name)]


_slots: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()


def _slots_of(kind: type) -> list[str]:
    """The names of the ``__slots__`` of a user's class."""
    if kind not in _slots:
        found = [vars(base).get("__slots__", ()) for base in kind.__mro__ if _is_users_class(base)]
        _slots[kind] = [name for names in found for name in ((names,) if isinstance(names, str) else names)]
    return _slots[kind]


def _is_of_a_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or "site-packages" in file


def _is_users_file(value: Any) -> bool:
    """Is it a Python module of the user, not of a library?"""
    return isinstance(value, types.ModuleType) and not _is_of_a_library(vars(value).get("__file__") or _LIBRARIES[0])


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def in_reach(*functions: Any) -> list[Any]:
    """Everything that functions refer to, directly or within a few steps."""
    seen: dict[int, Any] = {}
    level = list(functions)
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
    """The modules inside a module, itself included, or all modules that a function refers to."""
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
    """Compares an object by identity, by a weak reference where its type allows one."""

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

    def is_of(self, value: Any) -> bool:
        return self._ref() is value

    def is_dead(self) -> bool:
        return self._ref() is None


# Methods that run although no code names them: called by Python, or by a class of PyTorch.
_UNSAID = ("__call__", "__wrapped__")
_OF_FUNCTIONS = ("forward", "backward", "setup_context", "jvp", "vmap")  # of torch.autograd.Function
_MAKING = ("__init__", "__new__", "__post_init__")
# Methods that do not run when an object is only used.
_UNREAD = {*_MAKING, "__repr__", "__str__", "__del__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__"}
# Code that mentions one of these may read attributes whose names it does not mention.
_REFLECTING = frozenset({"getattr", "vars", "__dict__", "asdict", "astuple", "attrgetter", "fields", "getmembers"})


def functions_of(member: Any) -> list[types.FunctionType]:
    """The functions behind a member of a class: a property's getter, what a decorator wraps, a method's function."""
    found: list[types.FunctionType] = []
    pending, seen = [member], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            found.append(value)
            pending += [cell.cell_contents for cell in value.__closure__ or () if _is_set(cell)]
        elif isinstance(value, property):
            pending += [value.fget]
        elif isinstance(value, (functools.partial, functools.partialmethod, functools.cached_property)):
            pending += [value.func]
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            pending += [value.__func__]
        elif isinstance(value, functools._lru_cache_wrapper):
            pending += [value.__wrapped__]
    return found


_users_classes: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _is_users_class(kind: type) -> bool:
    if kind not in _users_classes:
        file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
        _users_classes[kind] = kind.__module__ != "builtins" and not _is_of_a_library(file)
    return _users_classes[kind]


class _Names:
    """Every name that the code of a function mentions, and that of the functions and methods it may call.

    Only attributes with such a name can change what the function computes: a trainer's step counter does not change its
    model. The set grows as a walk over objects meets further functions and classes.
    """

    def __init__(self) -> None:
        self.known = {*_UNSAID}
        self.are_all = False  # does every attribute count, because code reads some without mentioning their names?
        self._codes: weakref.WeakSet[types.CodeType] = weakref.WeakSet()
        self._classes: weakref.WeakKeyDictionary[type, set[str]] = weakref.WeakKeyDictionary()
        self._methods: dict[str, list[types.CodeType]] = {}  # of methods that no code has mentioned yet
        self._members: weakref.WeakKeyDictionary[type, tuple] = weakref.WeakKeyDictionary()

    def __contains__(self, name: Any) -> bool:
        return self.are_all or name in self.known

    @property
    def count(self) -> int:
        return len(self.known) + self.are_all

    def meet_code(self, code: types.CodeType) -> None:
        if code in self._codes:
            return
        self._codes.add(code)
        names = set(_names(code)) | _strings(code)
        if names & _REFLECTING and not _is_of_a_library(code.co_filename):
            self.are_all = True
        self.mention(*names)

    def mention(self, *names: str) -> None:
        for name in {*names} - self.known:
            self.known.add(name)
            for code in self._methods.pop(name, ()):
                self.meet_code(code)

    def meet_class(self, kind: type, is_made: bool) -> None:
        """Note the names that objects of a class use unasked; ``is_made``: such objects are created, too."""
        said = self._classes.setdefault(kind, set())
        if not said:
            for base in kind.__mro__:
                for name, member in vars(base).items():
                    codes = [function.__code__ for function in functions_of(member)]
                    if name in self.known:
                        for code in codes:
                            self.meet_code(code)
                    else:
                        self._methods.setdefault(name, []).extend(codes)
                    if name.startswith("__") and name not in _UNREAD and _is_written(member):
                        said.add(name)
            said.update(_OF_FUNCTIONS if issubclass(kind, torch.autograd.Function) else _UNSAID)
        self.mention(*said, *(_MAKING if is_made else ()))

    def members(self, kind: type) -> list[tuple[str, Any]]:
        """The members with one of these names, of the user's classes in the class's order of resolution."""
        bases, known = kind.__mro__, self._members.get(kind)
        now = self.count, [len(vars(base)) for base in bases]
        if known is None or known[0] != now:
            users = [(place, base) for place, base in enumerate(bases) if _is_users_class(base)]
            found = [(place, name) for place, base in users for name in vars(base) if name in self.known]
            known = self._members[kind] = now, found
        return [(name, vars(bases[place])[name]) for place, name in known[1]]


def _is_written(member: Any) -> bool:
    """Is it written in a file? The methods that ``dataclass`` generates mention all fields, which means nothing."""
    return any(not function.__code__.co_filename.startswith("<") for function in functions_of(member))


def _strings(code: types.CodeType) -> set[str]:
    """String constants that may be names: keys, or attributes in a ``match`` pattern."""
    found: set[str] = set()
    pending = list(code.co_consts)
    while pending:
        constant = pending.pop()
        if isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, tuple):
            pending += constant
        elif isinstance(constant, types.CodeType):
            pending += constant.co_consts
    return {name for name in found if name.isidentifier()}


_names_in: weakref.WeakKeyDictionary[Any, _Names] = weakref.WeakKeyDictionary()


class _Look:
    """The state of one walk over the objects that a function refers to."""

    def __init__(self, names: _Names | None = None) -> None:
        self.names = names
        self.left = MANY  # so many more objects are followed; after that they are compared by identity alone
        self.seen: dict[int, tuple[int, int]] = {}  # id of an object that was followed: its number, and how deep
        self.modules: list[nn.Module] = []

    def has_seen(self, value: Any, depth: int) -> int | None:
        """The number of an object that was followed this far before; None for any other, which now gets a number."""
        number, far = self.seen.get(id(value), (len(self.seen), -1))
        if far >= depth:
            return number
        self.seen[id(value)] = number, depth
        self.left -= 1
        return None


def token(value: Any, depth: int = _DEPTH, look: _Look | None = None) -> Any:
    """A token of a value: tensors, modules and objects count by identity, plain values by value.

    Objects are followed for ``depth`` steps, so that an option that was changed in place, or a global that a helper
    uses and that was rebound, is noticed. Where ``look`` has names, only attributes with these names count, and also
    members with these names of the user's classes.
    """
    if isinstance(value, PRIMITIVES):
        return type(value), repr(value) if isinstance(value, (float, complex)) else value  # 0.0 is not -0.0
    look = _Look() if look is None else look
    names = look.names
    if names is not None and depth and look.left > 0 and _is_users_file(value):
        look.left -= 1
        found = [(name, v) for name, v in vars(value).items() if name in names.known]
        return Same(value), tuple((name, token(v, depth - 1, look)) for name, v in found)
    if isinstance(value, slice):
        return slice, token((value.start, value.stop, value.step))
    if isinstance(value, Tensor):
        return Same(value), *layout_of(value)
    if isinstance(value, np.ndarray) and value.size <= MANY:
        return Same(value), value.dtype, value.shape, value.tobytes()
    if isinstance(value, nn.Module):  # ``watch`` compares what is inside
        look.modules.append(value)
        return Same(value)
    if depth == 0 or look.left <= 0:
        return Same(value)
    number = look.has_seen(value, depth)
    if number is not None:
        return _SEEN, number
    found = referents(value)
    if names is not None:
        found = _mentioned(value, found, names)
    parts = tuple((token(name, 1), token(v, depth - 1, look)) for name, v in found)
    if isinstance(value, (dict, *CONTAINERS)) and len(value) <= MANY:
        return type(value), parts
    if isinstance(value, types.FunctionType):
        return Same(value.__code__), parts
    if isinstance(value, (types.MethodType, functools.partial)):
        return type(value), parts
    return Same(value), parts


_SEEN: Any = object()


def _token_of_code(fn: Any, names: _Names) -> Any:
    return _walked(fn, names)[0]


def _walked(fn: Any, names: _Names) -> tuple[Any, _Look]:
    count = -1
    while count < names.count:  # until a walk meets no code that mentions a new name
        count, look = names.count, _Look(names)
        found = token(fn, look=look)
    return found, look


def token_of_argument(value: Any) -> Any:
    """The token of an argument that is no tensor: the function may read everything in the object and its class."""
    kind = type(value)
    if isinstance(value, (nn.Module, Tensor, type)) or not (callable(value) or _is_users_class(kind)):
        return token(value)
    if not _is_users_class(kind):
        return token(value), identity(value)[1]
    if kind not in _names_of_arguments:
        names = _names_of_arguments[kind] = _Names()
        names.are_all = True
        names.mention(*(name for base in kind.__mro__ if _is_users_class(base) for name in vars(base)))
    return _token_of_code(value, _names_of_arguments[kind])


_names_of_arguments: weakref.WeakKeyDictionary[type, _Names] = weakref.WeakKeyDictionary()


def modules_met(fn: Any) -> list[nn.Module]:
    """The modules that a function, or a method that it calls, may read."""
    return [] if isinstance(fn, nn.Module) else _walked(fn, _Names())[1].modules


class Behaviour:
    """Remembers what a callable computes, to tell later whether another one, or the same, still computes that."""

    def __init__(self, fn: Any) -> None:
        self._names = _Names()
        self._before = _token_of_code(fn, self._names)

    def is_of(self, fn: Any) -> bool:
        return _token_of_code(fn, self._names) == self._before


def may_change(fn: Any) -> bool:
    """Can what a callable computes change while it stays the same object?"""
    if isinstance(fn, (nn.Module, Tensor, type)) or not callable(fn):
        return False
    return _is_users_class(type(fn)) or any(
        function.__closure__ or not _is_of_a_library(function.__code__.co_filename) for function in functions_of(fn)
    )


def _mentioned(value: Any, found: list[tuple[Any, Any]], names: _Names) -> list[tuple[Any, Any]]:
    """What an object refers to, without what no code mentions; plus the members of its class that code mentions."""
    if isinstance(value, types.FunctionType):
        names.meet_code(value.__code__)
        return found
    if isinstance(value, (property, staticmethod, classmethod, functools.cached_property, functools.partialmethod)):
        return list(enumerate(functions_of(value)))
    if isinstance(value, operator.attrgetter):
        for path in value.__reduce__()[1]:
            names.mention(*path.split("."))
    if isinstance(value, _TRANSPARENT):
        return found
    kind = value if isinstance(value, type) else type(value)
    if isinstance(value, type) and not _is_users_class(kind):
        return found
    names.meet_class(kind, is_made=isinstance(value, type))
    return [(name, v) for name, v in found if name in names] + names.members(kind)


class Global(NamedTuple):
    """A name in a file or a class that modules compute with besides their own attributes, and its value at first."""

    scope: Callable[[], Mapping[str, Any]]
    name: str
    names: _Names
    before: Any

    @classmethod
    def of(cls, scope: Callable[[], Mapping[str, Any]], name: str, names: _Names) -> Global:
        value = scope()[name]
        plain = isinstance(value, (*PRIMITIVES, Tensor, dict, *CONTAINERS, functools.partial, np.ndarray))
        is_followed = plain or (_is_users_class(type(value)) and not isinstance(value, nn.Module))
        return cls(scope, name, names, token(value, 2, _Look(names)) if is_followed else Same(value))

    def value(self) -> Any:
        return self.scope().get(self.name)

    def is_same(self) -> bool:
        scope = self.scope()
        if self.name not in scope:
            return False
        value = scope[self.name]
        if type(self.before) is Same:
            return self.before.is_of(value)
        return token(value, 2, _Look(self.names)) == self.before


def _scope_of(owner: Any) -> Callable[[], Mapping[str, Any]]:
    """A function that returns what a class or a file holds at the time; it keeps no class alive."""
    if isinstance(owner, dict):
        return lambda: owner
    reference = weakref.ref(owner)
    return lambda: {} if (now := reference()) is None else vars(now)


def globals_of(kind: type) -> list[Global]:
    """The globals and the members of classes that modules of a class compute with: functions, numbers, tensors.

    That is what ``forward``, the methods that it mentions and the user's functions that these mention refer to.
    """
    found: dict[tuple[int, str], tuple[Any, str]] = {}
    names, seen = _Names(), set()
    pending: list[types.FunctionType] = []

    def note(owner: Any, name: str) -> None:
        value = (owner if isinstance(owner, dict) else vars(owner))[name]
        if isinstance(value, types.ModuleType) or (id(owner), name) in found:
            return
        found[id(owner), name] = owner, name
        members = vars(value).values() if isinstance(value, type) and _is_users_class(value) else [value]
        pending.extend(function for member in members for function in functions_of(member))

    def note_method(name: str) -> None:
        bases = [base for base in kind.__mro__ if name in vars(base)]  # all of them: there is ``super()``
        for place, base in enumerate(bases):
            if _is_users_class(base) or (name == "forward" and place == 0):
                note(base, name)

    note_method("forward")
    while pending:
        function = pending.pop()
        if function in seen or _is_of_a_library(function.__code__.co_filename):
            continue
        seen.add(function)
        names.meet_code(function.__code__)
        scope, mentioned = function.__globals__, dict.fromkeys(_names(function.__code__))
        files = [value for name in mentioned if _is_users_file(value := scope.get(name))]
        for name in mentioned:
            note_method(name)
            for owner in (scope, *map(vars, files)):
                if name in owner:
                    note(owner, name)
    return [Global.of(_scope_of(owner), name, names) for owner, name in found.values()]


def layout_of(t: Tensor) -> tuple:
    return *_of_tensor(t), t.stride() if t.layout is torch.strided else None


_of_tensor = operator.attrgetter("dtype", "device", "shape", "requires_grad")


def is_dead(key: Any) -> bool:
    """Does a token refer to an object that no longer exists?"""
    if isinstance(key, tuple):
        return any(is_dead(part) for part in key)
    return isinstance(key, Same) and key.is_dead()


def identity(fn: Any) -> tuple[Any, Any]:
    """An anchor and a token: two functions compute the same if both agree.

    The anchor is an object that lives about as long as the function: a cache can be dropped with it.
    """
    if hasattr(type(fn), "__bound_key__"):  # an explanation: its model and its options
        model, options = fn.__bound_key__()
        anchor, key = identity(model)
        return anchor, (key, options)
    if isinstance(fn, nn.Module):
        return fn, None
    core = fn
    while isinstance(core, (functools.partial, types.MethodType)):
        core = core.func if isinstance(core, functools.partial) else core.__func__
    key = _token_of_code(fn, _names_in.setdefault(getattr(core, "__code__", type(core)), _Names()))
    if isinstance(fn, types.FunctionType):
        return fn.__code__, key
    anchor = fn.__self__ if isinstance(fn, types.MethodType) else fn
    return (anchor if type(anchor).__weakrefoffset__ else type(anchor)), key
