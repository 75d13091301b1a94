"""Who may import whom, as functions over source text; test_rules.py applies them to the repository."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOMS = ("services", "trainer", "shared")
# A room may not import these (prefixes of dotted names).
FORBIDDEN = {
    "shared": (
        "services",
        "trainer",
        "world",
        "torch",
        "torchvision",
        "timm",
        "transformers",
        "diffusers",
        "fastapi",
    ),
    "services": ("trainer", "diffusers", "peft"),
    "services/rewards": ("fastapi", "starlette"),
    "services/app.py": ("torch",),
    "services/scheduler.py": ("torch", "fastapi", "starlette"),
    "trainer": ("services", "fastapi"),
}
CLIENT_USERS = ("trainer/scoring.py", "trainer/adversary.py")
BANNED = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "requests")


def imports(source: str, package: str = "") -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, `from a import b` as a.b; relative ones resolved against `package`.

    import_module and __import__ of a literal count too; imports under `if TYPE_CHECKING` count as well.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (relative, with slashes) imports against the rules, a line each."""
    banned: set[str] = set(BANNED)
    if path == "bench/peers/flask_pickle.py":  # how others do it, to be measured
        banned.discard("pickle")
    for place, names in FORBIDDEN.items():
        if path == place or path.startswith(place + "/"):
            banned.update(names)
    if path.startswith("trainer/") and path not in CLIENT_USERS:
        banned.add("shared.client")
    package = ".".join(Path(path).with_suffix("").parts[:-1])
    found = []
    for line, name in imports(source, package):
        found += [f"{path}:{line} imports {name}: {path} may not import {b}" for b in sorted(banned) if within(name, b)]
    return found


def unsafe_loads(path: str, source: str) -> list[str]:
    """Calls of torch.load that do not say weights_only=True, and numpy.load with allow_pickle=True."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        owner = getattr(node.func.value, "id", "")
        if node.func.attr == "load" and owner == "torch" and said.get("weights_only") is not True:
            found.append(f"{path}:{node.lineno} torch.load runs code from the file: pass weights_only=True")
        if node.func.attr == "load" and owner in ("np", "numpy") and said.get("allow_pickle", False) is not False:
            found.append(f"{path}:{node.lineno} numpy.load with allow_pickle runs code from the file")
    return found
