"""The structure of the package, read from its imports: `make map` prints it, a test guards it.

A room is a folder of the package, or a file of its root. A module lies one floor above the highest
module that it imports; imports inside functions count, those for type checkers alone do not.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "platform" / "selfray"
Graph = Mapping[str, frozenset[str]]


def modules() -> dict[str, Path]:
    """Every module of the package by its name inside it, such as `methods.mae`."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports() -> Graph:
    """For each module the modules of the package that it imports."""
    known = modules()
    return {name: frozenset(_imported(path, known)) - {name} for name, path in known.items()}


def _imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in _at_run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        inner = (name.removeprefix("selfray.") for name in names if name.startswith("selfray."))
        yield from (name for name in inner if name in known)


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        is_for_type_checkers = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(
            child.test
        )
        if not is_for_type_checkers:
            yield from _at_run_time(child)


def room_of(module: str) -> str:
    """The folder that a module lies in, or its own name where that is the root."""
    return module.rpartition(".")[0] or module


def rooms(graph: Graph) -> Graph:
    """For each room the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for module, imported in graph.items():
        others = {room_of(name) for name in imported} - {room_of(module)}
        found.setdefault(room_of(module), set()).update(others)
    return {room: frozenset(others) for room, others in found.items()}


def circle(graph: Graph) -> list[str]:
    """Names that import one another in a ring; empty where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for other in sorted(graph[name]):
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    return next(filter(None, map(visit, sorted(graph))), [])


def floors(graph: Graph) -> dict[str, int]:
    """How many floors each name lies above those that import nothing of the package."""
    height: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in height:
            height[name] = 1 + max(map(of, graph[name]), default=-1)
        return height[name]

    for name in graph:
        of(name)
    return height


def lines(module: str) -> int:
    return len(modules()[module].read_text().splitlines())


ARCHITECTURE = PACKAGE.parents[1] / "docs" / "ARCHITECTURE.md"
BEGIN, END = "<!-- the tree, from the docstrings: make map -->\n", "<!-- the tree ends -->\n"


def tree() -> str:
    """Every file of the package with the first line of its docstring, by rooms."""
    rows: dict[str, list[str]] = {}
    for name, path in modules().items():
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        room, _, file = name.rpartition(".")
        rows.setdefault(room, []).append(f"- `{file}.py`: {first}")
    parts = []
    for room in sorted(rows, key=lambda room: (room != "", room)):
        folder = PACKAGE / room.replace(".", "/") / "__init__.py"
        title = f"`selfray/{room.replace('.', '/')}/`" if room else "`selfray/`"
        about = ast.get_docstring(ast.parse(folder.read_text())) or ""
        about = about.partition("\n")[0]
        parts.append(f"### {title}\n\n{about}\n\n" + "\n".join(rows[room]) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def write_tree() -> None:
    """Put today's tree into docs/ARCHITECTURE.md."""
    text = ARCHITECTURE.read_text()
    before, rest = text.split(BEGIN)
    ARCHITECTURE.write_text(before + BEGIN + tree() + END + rest.split(END)[1])


def main() -> None:
    graph = imports()
    if ring := circle(graph):
        raise SystemExit("an import circle: " + " -> ".join(ring))
    height = floors(graph)
    for floor in range(max(height.values()), -1, -1):
        here: dict[str, list[str]] = {}
        for module in sorted(name for name in graph if height[name] == floor):
            room, _, file = module.rpartition(".")
            here.setdefault(room, []).append(file)
        parts = [
            f"{room}: {' '.join(files)}" if room else " ".join(files)
            for room, files in here.items()
        ]
        print(f"{floor:3}  " + "\n     ".join(parts))
    sizes = {name: lines(name) for name in graph}
    arrows = sum(map(len, graph.values()))
    largest = max(sizes, key=lambda name: sizes[name])
    print(
        f"\n{len(graph)} modules, {sum(sizes.values()):,} lines, {len(rooms(graph))} rooms, "
        f"{arrows} imports, no circle; the largest file is {largest} with {sizes[largest]} lines"
    )


if __name__ == "__main__":
    write_tree()
    main()
