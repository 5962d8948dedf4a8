"""The house: who may import whom, and how large a file may be."""

import ast
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[1] / "src"
FAMILIES = ("llamagen", "diffusion", "imagen", "unclip")
# What lies on top of the families: the public names, and the command.
ENTRIES = ("llamagen_hf", "llamagen_hf.conversion", "llamagen_cli", "llamagen_vllm")
LONGEST, SHORTEST = 400, 25
# Short for a reason: an import path that others use, a module that each process of vLLM runs, and one that only vLLM's
# newer model runner can import.
SHORT = ("llamagen_hf.conversion", "llamagen_vllm", "llamagen_hf.llamagen.vllm.model_state")


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def imported(name: str) -> set[str]:
    """The modules of this checkout that a module imports, at its top or within functions; not what only types need."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found, pending = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in MODULES else module for a in node.names}
    return (found & MODULES.keys()) - {name}


IMPORTS = {name: imported(name) for name in MODULES}


def room(name: str) -> str:
    """The folder of a module; one that lies loose at the top is a room of its own."""
    if name.count(".") < 2 or MODULES[name].name == "__init__.py":
        return name
    return name.rpartition(".")[0]


def find_circle(edges: dict[str, set[str]]) -> list[str]:
    """Some circle, from its first member back to it; empty if there is none."""
    done, path = set(), []

    def visit(node: str) -> list[str]:
        if node in path:
            return path[path.index(node) :] + [node]
        if node in done:
            return []
        path.append(node)
        for target in sorted(edges.get(node, ())):
            if circle := visit(target):
                return circle
        done.add(path.pop())
        return []

    return next((circle for node in sorted(edges) if (circle := visit(node))), [])


def test_no_shared_room_imports_a_family():
    families = tuple(f"llamagen_hf.{family}" for family in FAMILIES)
    above = [name for name in MODULES if name in ENTRIES or name.startswith(("llamagen_cli.", *families))]
    found = [
        f"{name} imports {target}"
        for name in MODULES.keys() - set(above)
        for target in IMPORTS[name]
        if target.startswith(families)
    ]
    assert sorted(found) == []


def test_no_files_import_each_other_in_a_circle():
    assert find_circle(IMPORTS) == []


def test_no_folders_import_each_other_in_a_circle():
    rooms: dict[str, set[str]] = {}
    for name, targets in IMPORTS.items():
        rooms.setdefault(room(name), set()).update(room(target) for target in targets if room(target) != room(name))
    assert find_circle(rooms) == []


def test_a_circle_is_found():
    assert find_circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_can_be_read_in_a_sitting_and_are_worth_opening(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST
    assert lines >= SHORTEST or name in SHORT or MODULES[name].name in ("__init__.py", "__main__.py")
