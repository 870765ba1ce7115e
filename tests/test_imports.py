"""The rooms: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import celbo

SOURCE = Path(celbo.__file__).parent

# The floors of the house, from the top. A module imports from its own room and from floors below.
FLOORS = [
    ["__main__"],
    ["app"],
    ["runs"],
    ["__init__"],
    ["trials"],
    ["estimator"],
    ["ask"],
    ["trust"],
    ["fit"],
    ["model"],
    ["data", "kernels", "report", "simulate", "checkpoint"],
    ["minibatch"],
    ["errors", "version", "streams", "caches"],
]
RANK = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(SOURCE.rglob("*.py"))


def imported(path):
    """Every module a file imports, wherever in it, but for type checkers alone."""
    tree = ast.parse(path.read_text())
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.unparse(node.args[0]).strip("f'\"")
        elif isinstance(node, ast.ImportFrom):
            yield from ([f"celbo.{a.name}" for a in node.names] if node.module == "celbo" else [node.module])


def room(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    for name in imported(path):
        if name.split(".")[0] == "celbo" and room(path) != "__init__":
            _, _, target = name.partition(".")
            target = target.split(".")[0]
            floor = RANK.get(target, RANK["__init__"])  # "celbo" itself, or a public name of it
            assert floor > RANK[room(path)] or target == room(path), f"{path} imports {name}"


def test_an_import_from_a_floor_above_is_seen(tmp_path):
    """However it is written; each of these stands for a line in a room below."""
    for line in (
        "import celbo",
        "from celbo import ExpressionVAE",
        "from celbo.app import cli",
        "import celbo.app.cli",
        "from importlib import import_module; import_module('celbo.app.cli')",
    ):
        (tmp_path / "module.py").write_text(line)
        floors = [RANK.get((name + ".").split(".")[1], RANK["__init__"]) for name in imported(tmp_path / "module.py")]
        assert min(floors[-1:]) <= RANK["__init__"], line


def test_no_room_uses_a_private_name_of_another():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("celbo"):
                private = [
                    alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"
                ]
                assert not private, f"{path} imports {private} from {node.module}"


def code_lines(path):
    """Lines that are neither docstring, comment nor blank."""
    text = path.read_text()
    strings = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    documented = {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), start=1)
    return [line for line, words in lines if words.strip() and words.strip()[0] != "#" and line not in documented]


def test_files_and_functions_stay_short():
    """Kernels are exempt: a compiled loop is one piece. The estimator is mostly docstrings."""
    for path in MODULES:
        n_lines = len(path.read_text().splitlines())
        if path.name == "estimator.py":
            assert n_lines <= 950
            assert len(code_lines(path)) <= 260
        else:
            assert n_lines <= 550, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and room(path) != "kernels":
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert not body or body[-1].end_lineno - body[0].lineno < 60, f"{path}: {node.name}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py" and path.parent != SOURCE])
def test_packages_have_a_docstring_and_nothing_else(path):
    assert len(ast.parse(path.read_text()).body) == 1


def test_every_room_has_its_place():
    assert {room(path) for path in MODULES} == set(RANK)


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        (
            "anndata",
            {"data", "ask", "trials", "runs", "app", "estimator", "simulate", "trust"},
        ),
        (
            "pandas",
            {"data", "ask", "trials", "runs", "app", "estimator", "simulate", "fit"},
        ),
        ("typer", {"app"}),
        ("triton", {"kernels"}),
        ("matplotlib", {"report"}),
        ("h5py", {"data"}),
        ("zarr", {"data"}),
    ],
)
def test_a_library_stays_in_its_rooms(library, rooms):
    users = {room(path) for path in MODULES for name in imported(path) if name.split(".")[0] == library}
    assert users <= rooms


def test_the_report_loads_neither_torch_nor_anndata():
    code = "import sys, celbo.report.page; print([m for m in ('torch', 'anndata') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_importing_celbo_costs_no_torch():
    code = "import sys, celbo; celbo.__version__; print([m for m in ('torch', 'numpy', 'anndata') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_help_costs_no_torch():
    code = (
        "import sys, celbo.app.cli; sys.argv = ['celbo', '--help']\n"
        "try: celbo.app.cli.main()\n"
        "except SystemExit: print([m for m in ('torch', 'anndata', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("[]\n")


def test_every_public_name_is_there():
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    homes = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "_HOME")
    for_types = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("celbo.")
        for alias in node.names
    }
    assert set(celbo.__all__) == {key.value for key in homes.keys} | {"__version__"} == for_types
    for name in celbo.__all__:
        assert getattr(celbo, name) is not None


def test_an_unknown_name_lists_the_known():
    with pytest.raises(AttributeError, match="ExpressionVAE"):
        celbo.Expression  # noqa: B018
