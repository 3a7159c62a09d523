"""The shape of the package: who may import whom, and that nothing public is a stub."""

import ast
from collections.abc import Iterator
from pathlib import Path

import gossamer

ROOT = Path(next(iter(gossamer.__path__)))

BELOW = {
    "core": set(),
    "models": {"core"},
    "kernels": {"core"},
    "evaluate": {"core", "models"},
    "methods": {"core", "models", "kernels"},
}
BELOW["execute"] = {"methods", "evaluate", *BELOW["methods"]}
BELOW["claims"] = BELOW["recipes"] = BELOW["export"] = {"execute", *BELOW["execute"]}
BELOW["report"] = BELOW["cli"] = {"claims", "recipes", "export", *BELOW["claims"]}
# Control acts through dictionaries: the one family that builds on another.
BUILDS_ON = {"control": {"features"}}
# Each layer sees itself; on one level these also see one another.
LEVEL = {"claims": {"recipes", "export"}, "recipes": {"export"}, "cli": {"report"}}


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    """Dotted name, file and tree of every module of the package."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("gossamer", *(part for part in parts if part != "__init__")))
        yield name, path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layer(name: str) -> str:
    """``gossamer.methods.weights.wanda`` -> ``methods``; the root itself is ``""``."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / parts[1]).is_dir() else ""


def test_imports_go_one_way():
    wrong: list[str] = []
    for name, _, tree in modules():
        own = layer(name)
        if not own:
            continue
        allowed = {own, *BELOW[own], *LEVEL.get(own, ())}
        for line, target in imports(tree):
            if target.split(".")[0] == "gossamer" and (to := layer(target)) and to not in allowed:
                wrong.append(f"{name}:{line} imports {target}")
    assert wrong == []


def test_families_do_not_import_one_another():
    wrong: list[str] = []
    for name, _, tree in modules():
        parts = name.split(".")
        if parts[1:2] not in (["methods"], ["claims"]) or len(parts) < 3:
            continue
        families = {p.name for p in (ROOT / "methods").iterdir() if p.is_dir()} - {parts[2]}
        families -= BUILDS_ON.get(parts[2], set())
        for line, target in imports(tree):
            to = target.split(".")
            if to[:2] == ["gossamer", parts[1]] and len(to) > 2 and to[2] in families:
                wrong.append(f"{name}:{line} imports {target}")
    assert wrong == []


def test_core_and_kernels_know_no_transformers():
    wrong = [
        f"{name}:{line}"
        for name, _, tree in modules()
        if layer(name) in ("core", "kernels")
        for line, target in imports(tree)
        if target.split(".")[0] == "transformers"
    ]
    assert wrong == []


def empty(statement: ast.stmt) -> bool:
    """``pass``, ``...``, a docstring, or raising NotImplementedError."""
    if isinstance(statement, ast.Raise):
        raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass) or constant


def abstract(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("abstractmethod" in ast.unparse(mark) for mark in function.decorator_list)


def documented(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A hook whose whole body is a docstring does nothing on purpose and says so."""
    return len(function.body) == 1 and ast.get_docstring(function) is not None


def test_nothing_public_is_a_stub():
    stubs: list[str] = []
    for name, _, tree in modules():
        protocols = {
            id(member)
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
            for member in node.body
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and not node.name.startswith("_")
                and id(node) not in protocols
                and not abstract(node)
                and not documented(node)
                and all(empty(statement) for statement in node.body)
            ):
                stubs.append(f"{name}:{node.lineno} {node.name}")
    assert stubs == []


FORBIDDEN = {"ratio", "compression_ratio", "compression", "prune_rate", "density"}


def constructor_fields(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names a class takes: its annotated fields, and the parameters of ``__init__``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for member in node.body:
            if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                yield member.lineno, member.target.id
            elif isinstance(member, ast.FunctionDef) and member.name == "__init__":
                names = [*member.args.posonlyargs, *member.args.args, *member.args.kwonlyargs]
                yield from ((arg.lineno, arg.arg) for arg in names)


def test_the_amount_has_one_name():
    wrong = [
        f"{name}:{line} {field}"
        for name, _, tree in modules()
        if layer(name) in ("core", "methods")
        for line, field in constructor_fields(tree)
        if field in FORBIDDEN
    ]
    assert wrong == []


def test_modules_of_the_vocabulary_say_what_they_export():
    missing = [
        name
        for name, path, tree in modules()
        if layer(name) in ("core", "kernels")
        and path.name != "__init__.py"
        and not any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            for node in tree.body
        )
    ]
    assert missing == []


def test_no_file_grows_past_four_hundred_lines():
    lengths = {name: path.read_text(encoding="utf-8").count("\n") for name, path, _ in modules()}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}
