"""The methods: one module reads like one paper."""

import pkgutil
import re

_CLASS = re.compile(rb"^class ([A-Z]\w*)\((?!NamedTuple)\w+\):", re.MULTILINE)

MODULES = {
    name.decode(): module.name
    for module in pkgutil.iter_modules(__path__)
    for name in _CLASS.findall(pkgutil.get_data(__name__, f"{module.name}.py") or b"")
}
"""The module of each method, in the order of `list_methods`: the public classes of this folder.

The files are read as text, for a module is imported when it is needed.
"""
