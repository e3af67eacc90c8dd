"""The structure that docs/ARCHITECTURE.md describes is the one that the imports make."""

import house


def test_no_module_imports_itself_by_way_of_others():
    assert house.circle(house.imports()) == []


def test_no_room_imports_itself_by_way_of_others():
    graph = house.rooms(house.imports())
    # Files of the root stand between rooms: `experiment` needs the read plan, and readers need
    # the experiment's data settings.
    folders = {room for room in graph if (house.PACKAGE / room.replace(".", "/")).is_dir()}
    between = {room: frozenset(graph[room] & folders) for room in folders}
    assert house.circle(between) == []


def test_a_circle_is_found():
    graph = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset({"b"})}
    assert house.circle(graph) == ["b", "c", "b"]
    assert house.floors({"a": frozenset({"b"}), "b": frozenset()}) == {"a": 1, "b": 0}


def test_the_architecture_page_has_a_line_for_every_file():
    page = house.ARCHITECTURE.read_text()
    tree = page.partition(house.BEGIN)[2].partition(house.END)[0]
    assert tree == house.tree(), "a file or its first line has changed: run `make map`"


LONGEST = 450
LONG_ON_PURPOSE = {"pixels.jpeg"}
"""A decoder is one thing."""


def test_no_file_is_too_long_to_be_read_in_one_sitting():
    sizes = {name: house.lines(name) for name in house.modules()}
    assert {n: s for n, s in sizes.items() if s > LONGEST and n not in LONG_ON_PURPOSE} == {}


def test_the_cluster_holds_only_what_needs_ray_or_mlflow():
    graph = house.imports()

    def needs_a_cluster(name: str, seen: frozenset[str] = frozenset()) -> bool:
        text = house.modules()[name].read_text()
        if any(f"{word} {package}" in text for word in ("import", "from") for package in CLUSTERS):
            return True
        deeper = {n for n in graph[name] if n.startswith("cluster.") and n not in seen}
        return any(needs_a_cluster(n, seen | {name}) for n in deeper)

    inside = {name for name in graph if name.startswith("cluster.")} - PLAIN
    assert [name for name in sorted(inside) if not needs_a_cluster(name)] == []


CLUSTERS = ("ray", "mlflow")
PLAIN = {"cluster.preflight", "cluster.ray_agent", "cluster.task"}
"""What is checked before a run is given to Ray, what each of its workers is told, and a file that
Ray runs by itself."""
