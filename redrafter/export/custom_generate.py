"""Every export can decode without this library: its `custom_generate/` is made here.

transformers runs `custom_generate/generate.py` of a folder or Hub repository, and copies the files
beside it that are imported relatively (dynamic_module_utils.py of transformers 5.23: flat siblings
only; an import of a package that is not installed is refused unless it stands in a `try`). So
`generate_template.py` is taken as it is, and of the library each definition that it needs, with all
that those need in turn: a file per module, `decode/tree.py` as `decode_tree.py`. Definitions are
copied, never rewritten, but for their imports of each other. Classes of the library that only
annotations name are left out, for no annotation is evaluated. The template's `Head` is the class of
the exported head's kind, so that no other kind travels along. Source: ours.
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from redrafter import __version__
from redrafter.contracts import InputError
from redrafter.files import new_folder, write_text
from redrafter.heads.load import head_class, own_class

FOLDER = "custom_generate"
_ROOT = Path(__file__).resolve().parent.parent
_ENTRY = "export.generate_template"
_HEAD = "Head"  # of the entry: stands for the class of the head's kind
_NAMES = {_ENTRY: "generate", "": "version"}  # "": the package's own __init__
_WIDTH = 100
_REQUIREMENTS = "torch>=2.6\ntransformers>=5.20\nsafetensors>=0.5\n"
_HEADER = """\
# Generated from redrafter/{path} of redrafter {version} by redrafter/export/custom_generate.py.
# Do not edit: change the library and export again. SPDX-License-Identifier: Apache-2.0
"""


def write_custom_generate(folder: str | Path) -> Path:
    """Write (or replace) `custom_generate/` in an exported head's folder. Returns its path.

    Raises InputError where the folder holds no head of this library.
    """
    place, cls = Path(folder) / FOLDER, own_class(folder)
    if cls is None:
        raise InputError(
            f"{folder}: its head is in another layout: convert it to `redrafter` first"
        )
    with new_folder(place) as part:
        for name, text in vendored_files(cls.kind).items():
            write_text(part / name, text)
    return place


@functools.cache  # the library is what this process has imported
def vendored_files(kind: str) -> dict[str, str]:
    """File name -> text of all of `custom_generate/`, for a head of that kind."""
    cls = head_class(kind)
    modules = _closure((cls.__module__.removeprefix("redrafter."), cls.__name__))
    files = {f"{_flat(name)}.py": _text(module) for name, module in sorted(modules.items())}
    return {**files, "requirements.txt": _REQUIREMENTS}


@dataclass
class _Module:
    """One of the library's modules, and what is needed of it.

    defined: name -> top-level statements that bind it
    ours: name -> (module, name there) of the library; foreign: name -> an import of it alone
    kept, links, used: what of these three is needed
    """

    name: str
    lines: list[str]
    tree: ast.Module
    defined: dict[str, list[ast.stmt]] = field(default_factory=lambda: defaultdict(list))
    ours: dict[str, tuple[str, str]] = field(default_factory=dict)
    foreign: dict[str, ast.stmt] = field(default_factory=dict)
    kept: set[ast.stmt] = field(default_factory=set)
    links: set[tuple[str, str, str]] = field(default_factory=set)  # module, name there, name here
    used: set[str] = field(default_factory=set)


def _flat(name: str) -> str:
    return _NAMES.get(name, name.replace(".", "_"))


def _path(name: str) -> Path:
    stem = _ROOT.joinpath(*name.split(".")) if name else _ROOT
    return stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")


def _closure(head: tuple[str, str]) -> dict[str, _Module]:
    """All modules with what `generate_template.py` needs of them marked. head: module and name of
    the class that it loads"""
    modules: dict[str, _Module] = {}

    def read(name: str) -> _Module:
        if name not in modules:
            modules[name] = _read(name)
        return modules[name]

    def resolve(name: str, what: str) -> tuple[str, str]:
        """Where a name is defined, past packages that only pass it on."""
        module = read(name)
        if what in module.defined:
            return name, what
        if what not in module.ours:
            raise ValueError(f"{_path(name)} does not define {what}: import the name itself")
        return resolve(*module.ours[what])

    def need(name: str, what: str) -> None:
        for statement in modules[name].defined[what]:
            keep(modules[name], statement)

    def keep(module: _Module, statement: ast.stmt) -> None:
        if statement in module.kept:
            return
        module.kept.add(statement)
        for inner in _inner_imports(statement):
            for alias in inner.names:
                place = resolve(_own(inner), alias.name)
                if place != (_own(inner), alias.name):
                    raise ValueError(f"{_path(module.name)}:{inner.lineno}: import from {place}")
                need(*place)
        for what in _names_at_runtime(statement):
            if what in module.ours:
                where, there = resolve(*module.ours[what])
                module.links.add((where, there, what))
                need(where, there)
            elif what in module.defined:
                need(module.name, what)
        named = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        module.used |= named & module.foreign.keys()

    entry = read(_ENTRY)
    entry.ours[_HEAD] = head
    for statements in entry.defined.values():
        for statement in statements:
            keep(entry, statement)
    return {name: module for name, module in modules.items() if module.kept}


def _read(name: str) -> _Module:
    """Raises ValueError where a module's top level holds what cannot be copied piece by piece."""
    text = _path(name).read_text(encoding="utf-8")
    module = _Module(name, text.splitlines(), ast.parse(text))
    for i, node in enumerate(module.tree.body):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            module.defined[node.name].append(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for part in (part for target in targets for part in ast.walk(target)):
                if isinstance(part, ast.Name):
                    module.defined[part.id].append(node)
        elif isinstance(node, ast.ImportFrom) and _own(node) is not None:
            for alias in node.names:
                module.ours[alias.asname or alias.name] = (_own(node), alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                one = ast.ImportFrom(node.module, [alias], node.level)
                module.foreign[alias.asname or alias.name] = one
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module.foreign[alias.asname or alias.name.split(".")[0]] = ast.Import([alias])
        elif not (i == 0 and isinstance(node, ast.Expr)) and not _is_nothing(node):
            raise ValueError(f"{_path(name)}:{node.lineno} cannot be copied by itself")
    return module


def _is_nothing(node: ast.stmt) -> bool:
    """`from __future__`, and imports for annotations."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.ImportFrom)


def _own(node: ast.ImportFrom) -> str | None:
    """The library's module that is imported from, without its first name; None of another's."""
    top, _, rest = (node.module or "").partition(".")
    return rest if top == "redrafter" and not node.level else None


def _inner_imports(statement: ast.stmt) -> list[ast.ImportFrom]:
    """Imports of ours inside of a definition."""
    inside = [node for node in ast.walk(statement) if isinstance(node, ast.ImportFrom)]
    return [node for node in inside if _own(node) is not None]


class _Names(ast.NodeVisitor):
    """Names read when a statement runs, or a function in it; not those of annotations."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        self.found.add(node.id)

    def visit_arg(self, node: ast.arg) -> None:
        pass

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        for part in filter(None, (node.target, node.value)):
            self.visit(part)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.decorator_list, node.args, *node.body):
            self.visit(part)


def _names_at_runtime(statement: ast.stmt) -> list[str]:
    visitor = _Names()
    visitor.visit(statement)
    return sorted(visitor.found)


# ------------------------------------------------------------------------------------ writing


def _text(module: _Module) -> str:
    path = _path(module.name).relative_to(_ROOT).as_posix()
    out = [_HEADER.format(path=path, version=__version__).rstrip("\n")]
    first = module.tree.body[0]
    if ast.get_docstring(module.tree):
        out += module.lines[first.lineno - 1 : first.end_lineno]
    out += ["", "from __future__ import annotations"]
    out += _imports(module)
    pieces = [_piece(module, node) for node in module.tree.body if node in module.kept]
    if pieces[0][0]:
        out.append("")
    for piece in pieces:
        out += piece
    return "\n".join(out) + "\n"


def _imports(module: _Module) -> list[str]:
    plain, grouped = [], defaultdict(list)
    for name in sorted(module.used):
        node = module.foreign[name]
        if isinstance(node, ast.Import):
            plain.append(ast.unparse(node))
        else:
            grouped[node.module].append(node.names[0])
    theirs = sorted(plain) + [
        line for source, names in sorted(grouped.items()) for line in _import(source, names)
    ]
    grouped = defaultdict(list)
    for where, there, here in sorted(module.links):
        grouped[f".{_flat(where)}"].append(ast.alias(there, here if here != there else None))
    own = [line for source, names in sorted(grouped.items()) for line in _import(source, names)]
    return [*([""] if theirs else []), *theirs, *([""] if own else []), *own]


def _import(source: str, names: list[ast.alias], indent: str = "") -> list[str]:
    shown = [ast.unparse(name) for name in names]
    line = f"{indent}from {source} import {', '.join(shown)}"
    if len(line) <= _WIDTH:
        return [line]
    inside = [f"{indent}    {name}," for name in shown]
    return [f"{indent}from {source} import (", *inside, f"{indent})"]


def _piece(module: _Module, node: ast.stmt) -> list[str]:
    """A definition's lines with the comment on top of it, and as many blank ones before."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while start and module.lines[start - 1].startswith("#"):
        start -= 1
    above = start
    while above and not module.lines[above - 1].strip():
        above -= 1
    lines = list(module.lines[: node.end_lineno])
    for inner in sorted(_inner_imports(node), key=lambda n: -n.lineno):
        names = defaultdict(list)
        for alias in inner.names:
            where = _flat(_own(inner))
            names[f".{where}"].append(alias)
        new = [
            line for source, group in names.items()
            for line in _import(source, group, " " * inner.col_offset)
        ]  # fmt: skip
        lines[inner.lineno - 1 : inner.end_lineno] = new
    return [""] * (start - above) + lines[start:]
