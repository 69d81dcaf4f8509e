"""Every public name under the family that exports it: "lm.next_token_loss", "termwise.terms"."""

import inspect

import termwise
import termwise.testing

_PUBLIC = {name: value for name, value in vars(termwise).items() if not name.startswith("_")}
FAMILIES = {"termwise": termwise, **{n: v for n, v in _PUBLIC.items() if inspect.ismodule(v)}}
EXPORTS = {
    f"{family}.{name}": value
    for family, module in FAMILIES.items()
    for name, value in vars(module).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}
