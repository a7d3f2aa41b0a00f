"""For the API pages, which are made from the source: signatures as callers see them.

A function made by `takes(Record)` has one argument in the source; whoever calls it passes the
fields of that dataclass (`rankpo_fast.ops.options`). A field of a settings class has
`flag(help, default)` as its value (`rankpo_fast.fields`); a reader wants the default in the
signature and the help below it.
"""

import ast
from typing import Any

import griffe

# {class: {field: its help}}. A subclass shares the parameters of its bases, whose defaults are
# plain once the base was explained.
HELPS: dict[str, dict[str, str]] = {}


class Signatures(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._visit(pkg)

    def _visit(self, scope: griffe.Object) -> None:
        for member in scope.members.values():
            if isinstance(member, griffe.Function):
                spread(member)
            elif isinstance(member, griffe.Class):
                explain(member)
            elif isinstance(member, griffe.Module):
                self._visit(member)


def spread(function: griffe.Function) -> None:
    """The fields of the record that a function made by `takes` has."""
    for decorator in function.decorators:
        call = decorator.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "takes":
            record = function.modules_collection[call.arguments[0].canonical_path]
            fields = [field for field in record.parameters if field.name != "self"]
            function.parameters = griffe.Parameters(*fields)


def explain(settings: griffe.Class) -> None:
    """The defaults of flags in the signature, their help as the docstring's arguments."""
    if "dataclass" not in settings.labels:
        return
    bases = [getattr(base, "canonical_path", str(base)) for base in settings.bases]
    helps = {name: text for base in bases for name, text in HELPS.get(base, {}).items()}
    for parameter in settings.parameters:
        call = parameter.default
        if isinstance(call, griffe.ExprCall) and str(call.function) == "flag":
            text, *rest = [x for x in call.arguments if not isinstance(x, griffe.ExprKeyword)]
            helps[parameter.name] = ast.literal_eval(str(text))
            parameter.default = str(rest[0]) if rest else None
    if helps:
        HELPS[settings.path] = helps
        lines = [f"    {name}: {text}" for name, text in helps.items()]
        own = settings.docstring.value if settings.docstring else ""
        settings.docstring = griffe.Docstring(
            "\n".join([own, "", "Args:", *lines]), parent=settings, parser="google"
        )
