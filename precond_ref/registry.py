"""Methods by name, and the one way from a text to a method.

A text is the name of a method or preset, in upper or lower case, or the place of a class outside this package. Fields
with other values than their defaults follow in brackets::

    ASGO      sshampoo.practical(size=32)      my_module:Fast      my_module:Fast(beta2=0.9, side="left")
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from precond_ref.methods import MODULES
from precond_ref.protocol import _CLASSES, Method, class_hint


def list_methods() -> Mapping[str, type[Method]]:
    """Return all methods of this package by name (read-only)."""
    return MappingProxyType({name: cls for name, cls in _classes().items() if not {".", ":"} & set(name)})


def _classes() -> dict[str, type[Method]]:
    """Return every class by name, those of this package first and always in the same order."""
    for module in dict.fromkeys(MODULES.values()):
        importlib.import_module(f"precond_ref.methods.{module}")
    order = {name: place for place, name in enumerate(MODULES)}
    return dict(sorted(_CLASSES.items(), key=lambda entry: order.get(entry[0].partition(".")[0], len(order))))


def constructors() -> dict[str, Callable[..., Method]]:
    """Return every method of this package by name, each followed by its presets, such as ``ASGO.theory``."""
    found: dict[str, Callable[..., Method]] = {}
    for name, method in list_methods().items():
        found[name] = method
        found.update({f"{name}.{preset}": getattr(method, preset) for preset in method.presets})
    return found


def arguments(make: Callable[..., Method]) -> list[str]:
    """Return the names of the arguments of ``make``."""
    return list(inspect.signature(make).parameters)


def required(make: Callable[..., Method]) -> list[str]:
    """Return the names of the arguments of ``make`` without a default."""
    return [p.name for p in inspect.signature(make).parameters.values() if p.default is p.empty]


class Named(NamedTuple):
    """A parsed text. The method is not made yet, because fields may be missing."""

    name: str
    """`Method.name`, or the name of a preset."""
    make: Callable[..., Method]
    """The class or preset."""
    fields: Mapping[str, Any]
    """The fields in the brackets."""

    @property
    def text(self) -> str:
        """The text in its normal form."""
        fields = ", ".join(f"{field}={value!r}" for field, value in self.fields.items())
        return f"{self.name}({fields})" if fields else self.name

    def made(self, **missing: Any) -> Method:
        """Return the method; ValueError if it refuses the fields.

        ``missing`` has values for fields that have no default and are not in the text.
        """
        fields = {**{name: missing[name] for name in required(self.make) if name in missing}, **self.fields}
        for name in required(self.make):
            if name not in fields:
                raise ValueError(f"{self.name} needs {name}: '{self.name}({name}=...)'")
        try:
            return self.make(**fields)
        except TypeError as error:
            raise ValueError(str(error)) from error


def split(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name or place and the fields in brackets; ValueError if these are not like ``(size=64, every=10)``."""
    place, bracket, rest = text.strip().partition("(")
    if not bracket:
        return place, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError("fields are given by name")
        return place.strip(), {str(k.arg): _value(str(k.arg), k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} must be like 'SShampoo(size=64, every=10)': {error}") from error


def _value(field: str, node: ast.expr) -> Any:
    """Return the value that is written for a field; the ValueError says how to write it."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        wanted = "a number, True, False, None or a text in quotes"
        raise ValueError(f"the value of {field} must be {wanted}, got {ast.unparse(node)}") from None


def parse(text: str) -> Named:
    """Parse ``text``, such as ``"asgo(eps=1e-8)"``; ValueError or ImportError if it names no method."""
    place, fields = split(text)
    name, make = _found(place)
    known = arguments(make)
    if unknown := fields.keys() - set(known):
        raise ValueError(f"{name} has no field {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    return Named(name, make, fields)


def parse_list(text: str) -> list[Named]:
    """Parse a list of methods with commas between them; commas within brackets separate fields."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    found = [parse(part) for part in parts if part.strip()]
    if not found:
        raise ValueError(f"no method is named; there are {', '.join(constructors())}")
    return found


def made_by(make: Any) -> type[Method] | None:
    """Return the class of the methods that ``make``, a class or a preset, makes; None for anything else."""
    if isinstance(make, type):
        return make if issubclass(make, Method) else None
    return next((c for c in _classes().values() if any(getattr(c, preset) == make for preset in c.presets)), None)


def class_of(name: str) -> type[Method]:
    """Return the class with this `Method.name`; ValueError or TypeError if there is none in this package or loaded.

    Older checkpoints have the names of Python classes, such as ``ASGOTheory``; these are found, too.
    """
    if not isinstance(name, str):
        raise TypeError(f"method must be a precond_ref.Method or the name of one, got {name!r}{class_hint(name)}")
    if name in _CLASSES:
        return _CLASSES[name]
    classes = _classes()
    if name in classes:
        return classes[name]
    for cls in classes.values():
        if cls.__name__ == name and ":" not in cls.name:
            return cls
    hint = f"; import {name.partition(':')[0]} first" if ":" in name else ""
    raise ValueError(f"no method is called {name}{hint}; there are {', '.join(constructors())}")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def load(target: str, said: Callable[[BaseException], str] = _said) -> Any:
    """Return the object at ``module:attribute``, searched in the current folder first.

    ValueError if the module or the attribute is missing. ImportError if the module raises an error, which ``said`` puts
    into words.
    """
    module_name, colon, path = target.partition(":")
    if not (colon and module_name and path):
        raise ValueError(f"TARGET must be module:attribute, such as my_package.optim:MyASGO, got {target!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not (module_name + ".").startswith(error.name + "."):
            raise ValueError(f"importing {module_name} failed: {error}") from error
        hint = " (without the .py)" if module_name.endswith(".py") else ""
        raise ValueError(f"there is no module {module_name!r}{hint} in this folder or among those installed") from None
    except (Exception, SystemExit) as error:
        raise ImportError(f"importing {module_name} failed: {said(error)}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            names = ", ".join(n for n in vars(found) if not n.startswith("_") and callable(getattr(found, n)))
            raise ValueError(f"{module_name} has no {path!r}; it has {names}")
        found = getattr(found, name)
    return found


def _found(name: str) -> tuple[str, Callable[..., Method]]:
    """Return the name of a method or preset in its normal spelling, and the class or function that makes it."""
    if name in _CLASSES:  # also classes of a function or a notebook, which no module has
        return name, _CLASSES[name]
    if ":" not in name:
        known = {each.lower(): (each, make) for each, make in constructors().items()}
        if name.lower() not in known:
            file = f"; for a class in {name}.py: {name}:Class" if Path(f"{name}.py").is_file() else ""
            raise ValueError(
                f"no method is called {name}; there are {', '.join(each for each, _ in known.values())}{file}"
            )
        return known[name.lower()]
    found = load(name)
    if isinstance(found, type) and issubclass(found, Method) and found.name:
        if found.__name__.startswith("_"):
            raise ValueError(f"{name} begins with an underscore: it is a base of other classes and cannot be named")
        return found.name, found
    owner, _, preset = name.rpartition(".")
    if ":" in owner and preset in getattr(load(owner), "presets", ()):
        return f"{load(owner).name}.{preset}", found
    raise ValueError(f"{name} must be a class made from precond_ref.Method, got {found!r}")
