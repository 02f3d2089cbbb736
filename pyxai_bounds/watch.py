"""The modules that a function calls: are they still what was captured, and how to undo what tracing did to them.

A captured graph holds as long as the function, the objects it refers to, the modules it calls, and the globals that
these compute with stay what they were. Only the *values* of tensors may change, because the graph reads them anew.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pyxai_bounds.identity import (
    CONTAINERS,
    MANY,
    PRIMITIVES,
    Behaviour,
    Global,
    Same,
    globals_of,
    held_tensors,
    in_reach,
    layout_of,
    may_change,
    modules_met,
    referents,
    token,
)
from pyxai_bounds.ops import native

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# --- are the modules what they were? ------------------------------------------------------------------------


class ModuleWatch:
    """What a function's modules looked like when it was captured."""

    def __init__(self) -> None:
        self._seen: dict[int, _Watched] = {}
        self._globals: dict[type, list[Global]] = {}
        self._global_hooks = _global_hooks()
        self._glance: _Glance | None = None

    def add(self, module: nn.Module, hooks: bool) -> None:
        """Watch a module from now on. ``hooks``: its hooks, too, which is possible before the function has begun."""
        if id(module) not in self._seen:
            self._seen[id(module)] = _Watched(module, hooks)
            if type(module) not in self._globals:
                self._globals[type(module)] = globals_of(type(module))

    def globals(self) -> list[Any]:
        return [one.value() for known in self._globals.values() for one in known]

    def others(self) -> list[nn.Module]:
        """Modules among the globals that are not watched yet."""
        parts = [part for value in self.globals() if isinstance(value, nn.Module) for part in value.modules()]
        return [part for part in parts if id(part) not in self._seen]

    def settle(self) -> None:
        """Stop watching what tracing itself changed: counters and caches, which the graph does not depend on."""
        for watched in self._seen.values():
            watched.settle()
        self._globals = {kind: [one for one in found if one.is_same()] for kind, found in self._globals.items()}

    def names(self) -> dict[int, str]:
        """By the id of each module its path in its model; where there are several models, after the class of that."""
        modules = [module for watched in self._seen.values() if (module := watched.reference()) is not None]
        inner = {id(child) for module in modules for child in module.children()}
        models = [module for module in modules if id(module) not in inner]
        found: dict[int, str] = {}
        for model in models:
            prefix = type(model).__name__ if len(models) > 1 else ""
            for path, part in model.named_modules(prefix=prefix):
                found.setdefault(id(part), path)
        return found

    def tensors(self) -> Iterator[Tensor]:
        for watched in self._seen.values():
            module = watched.reference()
            if module is not None:
                yield from held_tensors(module)

    def unchanged(self) -> bool:
        """Is every module what it was? Once a full comparison has agreed, one of identities, which is cheap, may do."""
        if _global_hooks() != self._global_hooks:
            return False
        if not all(one.is_same() for found in self._globals.values() for one in found):
            return False
        glance = self._glance
        if glance is not None and glance.holds():
            return True
        same = self._compare()
        glance = _Glance(list(self._seen.values())) if same and native.available() else None
        # Compare again: another thread may have changed a module between the comparison and the glance.
        self._glance = glance if glance is not None and self._compare() else None
        return same

    def _compare(self) -> bool:
        return all(watched.unchanged() for watched in self._seen.values())


class _Glance:
    """A quick test of modules that a full comparison has just found unchanged.

    It holds only if everything that was compared is still the same object, or has the same value if it has no identity.
    If it does not hold, nothing is known, and the full comparison must decide.
    """

    def __init__(self, watched: list[_Watched]) -> None:
        self._references = [one.reference for one in watched]
        modules = [reference() for reference in self._references]
        self._snapshot = native.snapshot(modules)
        self.held_tensors = [t for module in modules if module is not None for t in held_tensors(module)]
        self._layouts = [layout_of(t) for t in self.held_tensors]
        self._others = [other for one in watched for other in one.others()]
        self._containers = [
            (one.reference, name, before) for one in watched for name, before in one.containers_to_compare()
        ]
        self._callers = [one for one in watched if one.has_functions]

    def holds(self) -> bool:
        return (
            self._snapshot.holds([reference() for reference in self._references])
            and [layout_of(t) for t in self.held_tensors] == self._layouts
            and not any(other.is_dead() for other in self._others)
            and all(token(vars(reference()).get(name), 2) == before for reference, name, before in self._containers)
            and all(one.calls_the_same() for one in self._callers)
        )


class _Watched:
    """One module: its class, children, hooks, plain attributes, and its tensors' identity and layout."""

    def __init__(self, module: nn.Module, hooks: bool) -> None:
        self.reference = weakref.ref(module)
        attributes = module.__dict__
        self._class, self._size = type(module), len(attributes)
        self._names = list(attributes)
        self._ids = list(map(id, attributes.values()))
        # An id identifies an object only while that lives: plain values are kept alive, others have weak references.
        self._kept = [value for value in attributes.values() if isinstance(value, (*PRIMITIVES, dict, *CONTAINERS))]
        self._others = {
            name: Same(value)
            for name, value in attributes.items()
            if not isinstance(value, (*PRIMITIVES, dict, *CONTAINERS))
        }
        self._containers = {
            name: token(value, 2)
            for name, value in attributes.items()
            if (isinstance(value, (dict, *CONTAINERS)) and not _is_internal(name)) or isinstance(value, np.ndarray)
        }
        self._children = _children(module)
        self._layout = _layout(module)
        self._hooks = _hooks(module) if hooks else None
        self._called = {name: Behaviour(value) for name, value in attributes.items() if may_change(value)}
        watched = _hooks_of(module) if hooks else []
        self._hooked = [(place, Behaviour(hook)) for place, hook in enumerate(watched) if may_change(hook)]

    def calls_the_same(self) -> bool:
        """Do its hooks and the callables among its attributes compute what they did?"""
        module = self.reference()
        if module is None:
            return False
        hooks = _hooks_of(module) if self._hooked else []
        return all(known.is_of(vars(module).get(name)) for name, known in self._called.items()) and all(
            place < len(hooks) and known.is_of(hooks[place]) for place, known in self._hooked
        )

    def settle(self) -> None:
        """Stop watching what has changed since: tracing did that."""
        module = self.reference()
        if module is None:
            return
        attributes = module.__dict__
        same = [id(attributes.get(name)) == number for name, number in zip(self._names, self._ids, strict=True)]
        self._ids = [number for number, kept in zip(self._ids, same, strict=True) if kept]
        self._names = [name for name, kept in zip(self._names, same, strict=True) if kept]
        self._others = {name: other for name, other in self._others.items() if name in self._names}
        for name, before in list(self._containers.items()):
            if name not in attributes or token(attributes[name], 2) != before:
                del self._containers[name]
        self._called = {name: known for name, known in self._called.items() if known.is_of(attributes.get(name))}
        hooks = _hooks_of(module)  # some keep what they are shown, which changes them
        self._hooked = [(n, known) for n, known in self._hooked if n < len(hooks) and known.is_of(hooks[n])]

    def others(self) -> Iterable[Same]:
        """The attributes that are neither plain values nor containers."""
        return self._others.values()

    def containers_to_compare(self) -> list[tuple[str, Any]]:
        """Names and tokens of the containers that can change without any identity changing that a snapshot sees."""
        module = self.reference()
        return [(name, before) for name, before in self._containers.items() if not _is_flat(vars(module).get(name))]

    def unchanged(self) -> bool:
        module = self.reference()
        if module is None or type(module) is not self._class:
            return False
        attributes = module.__dict__
        return (
            len(attributes) == self._size
            and (
                # The first test is faster and holds unless some attributes are left out.
                (list(attributes) == self._names and list(map(id, attributes.values())) == self._ids)
                or list(map(id, map(attributes.get, self._names))) == self._ids
            )
            and not (self._others and any(other.is_dead() for other in self._others.values()))
            and _children(module) == self._children
            and _layout(module) == self._layout
            and (self._hooks is None or _hooks(module) == self._hooks)
            and not (
                self._containers
                and any(token(attributes.get(name), 2) != before for name, before in self._containers.items())
            )
            and (not self.has_functions or self.calls_the_same())
        )

    @property
    def has_functions(self) -> bool:
        return bool(self._called or self._hooked)


def _is_internal(name: str) -> bool:
    return "hooks" in name or name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def _is_flat(value: Any) -> bool:
    """Is it a container that ``native.snapshot`` sees, of nothing but plain values?"""
    if type(value) is dict:
        return all(type(v) in PRIMITIVES for entry in value.items() for v in entry)
    return type(value) in (tuple, list) and len(value) <= MANY and all(type(v) in PRIMITIVES for v in value)


def _children(module: nn.Module) -> list[tuple[str, int]]:
    if not module._modules:
        return []
    return [(name, id(child)) for name, child in module._modules.items()]  # each is watched itself


def _layout(module: nn.Module) -> list[tuple]:
    if not module._parameters and not module._buffers:
        return []
    return [(id(t), *layout_of(t)) for t in held_tensors(module)]


_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]


def _global_hooks() -> list[Same]:
    """The hooks that are registered for all modules, without the one that ``preserved`` sets."""
    if not any(_GLOBAL_HOOKS):
        return []
    hooks = [hook for known in _GLOBAL_HOOKS for hook in known.copy().values()]
    return [Same(hook) for hook in hooks if getattr(hook, "__module__", None) != __name__]


def _hooks(module: nn.Module) -> list[Same]:
    attributes = module.__dict__
    if not any(map(attributes.__getitem__, _HOOKS)):
        return []
    # Ids alone would not do: a hook that replaces another is often allocated at its address.
    return [Same(hook) for hook in _hooks_of(module)]


def _hooks_of(module: nn.Module) -> list[Any]:
    return [hook for name in _HOOKS for hook in module.__dict__[name].values()]


# --- put back what tracing changed ---------------------------------------------------------------------------


class Saved:
    """The attributes and gradients of modules and objects, and caches of functions, to be put back after tracing."""

    def __init__(self, clear_grads: bool) -> None:
        self._attributes: dict[int, tuple[Any, dict[str, tuple[Any, Any]]]] = {}
        self._grads: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._caches: dict[int, tuple[Any, Any]] = {}
        self._clear_grads = clear_grads

    def save(self, value: Any) -> None:
        """Remember a module, a plain object or a tensor as it is now."""
        if isinstance(value, Tensor):
            self._save_grad(value)
        elif isinstance(value, functools._lru_cache_wrapper):
            self._caches.setdefault(id(value), (value, value.cache_info().misses))
        elif isinstance(value, (dict, list, set, deque)):
            self._caches.setdefault(id(value), (value, _elements(value)))
        elif isinstance(value, nn.Module):
            for tensor in held_tensors(value):
                self._save_grad(tensor)
            self._save_attributes(value)
        elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, types.FunctionType)):
            self._save_attributes(value)

    def _save_grad(self, tensor: Tensor) -> None:
        if tensor.is_leaf and tensor.requires_grad and id(tensor) not in self._grads:
            self._grads[id(tensor)] = tensor, tensor.grad
            if self._clear_grads:
                tensor.grad = None

    def _save_attributes(self, value: Any) -> None:
        if id(value) not in self._attributes:
            saved = {name: (v, _elements(v)) for name, v in vars(value).items() if "hooks" not in name}
            self._attributes[id(value)] = value, saved

    def had_grads(self) -> bool:
        return any(grad is not None for _, grad in self._grads.values())

    def restore(self) -> None:
        for value, saved in self._attributes.values():
            attributes = vars(value)
            # A module is restored as a whole, with its counters. In other objects, which other threads may be using,
            # only what holds fake tensors is.
            whole = isinstance(value, nn.Module)
            for name in [name for name in attributes if name not in saved and "hooks" not in name]:
                if whole or _holds_fake(attributes[name]):
                    del attributes[name]
            for name, (attribute, elements) in saved.items():
                if whole or _holds_fake(attributes.get(name)):
                    _restore_elements(attribute, elements)
                    attributes[name] = attribute
        for cache, before in self._caches.values():
            if not isinstance(cache, functools._lru_cache_wrapper):
                if _holds_fake(cache):
                    _restore_elements(cache, before)
            elif cache.cache_info().misses != before:
                cache.cache_clear()  # it may hold fake tensors
        for tensor, grad in self._grads.values():
            # A gradient that another thread has computed meanwhile stays.
            if isinstance(tensor.grad, FakeTensor) or (tensor.grad is None and grad is not None):
                tensor.grad = grad


def _holds_fake(value: Any, depth: int = 2) -> bool:
    if isinstance(value, FakeTensor):
        return True
    return (
        depth > 0
        and isinstance(value, (dict, *CONTAINERS))
        and any(_holds_fake(v, depth - 1) for _, v in referents(value))
    )


def _elements(value: Any, depth: int = 2) -> Any:
    """A copy of a container that tracing may fill, and of the containers in it."""
    if not isinstance(value, (list, dict, set, deque)) or len(value) > MANY:
        return None
    inner = [(v, _elements(v, depth - 1)) for _, v in referents(value)] if depth else []
    return copy.copy(value), inner


def _restore_elements(value: Any, elements: Any) -> None:
    if elements is None:
        return
    before, inner = elements
    for child, child_elements in inner:
        _restore_elements(child, child_elements)
    value.clear()
    (value.update if isinstance(value, (dict, set)) else value.extend)(before)


@contextlib.contextmanager
def preserved(
    functions: list[Any], check_mode: Callable[[nn.Module, str], None], *, clear_grads: bool = False
) -> Iterator[tuple[ModuleWatch, Saved]]:
    """Watch every module that the functions and objects refer to or run, and undo what the block does to them.

    ``check_mode(module, name)`` is called before a module runs for the first time. With ``clear_grads`` the parameters
    have no gradients inside the block. The models must not train in another thread meanwhile.
    """
    watch, saved = ModuleWatch(), Saved(clear_grads)
    thread, checked = threading.get_ident(), set()

    def before_forward(module: nn.Module, _: Any) -> None:
        if threading.get_ident() != thread:
            return
        for name, part in module.named_modules():
            if id(part) not in checked:
                checked.add(id(part))
                check_mode(part, name)
                watch.add(part, hooks=False)
                saved.save(part)

    pending = in_reach(*functions, *(module for fn in functions for module in modules_met(fn)))
    while pending:
        for value in pending:
            if isinstance(value, nn.Module):
                watch.add(value, hooks=True)
            saved.save(value)
        pending = watch.others()
    for value in watch.globals():
        saved.save(value)
    hook = nn.modules.module.register_module_forward_pre_hook(before_forward)
    try:
        yield watch, saved
    finally:
        hook.remove()
        watch.settle()
        saved.restore()
