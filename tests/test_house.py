"""The house rules: who may import whom, what runtime files may hold, and that every node is fully described."""
from __future__ import annotations

import ast
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PURE = ("samplers", "attention_patches", "metrics")
ROOMS = (*PURE, "host", "nodes")
FILLED = ("samplers", "attention_patches", "metrics", "host", "nodes")  # rooms that must hold something by now
PURE_IMPORTS = {"torch", "einops", "math", "numbers", "sys", "typing", "__future__", "dataclasses", "collections",
                "contextlib", "functools"}
HOST_MODULES = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_extras", "comfy_execution", "folder_paths", "nodes",
                "node_helpers", "latent_preview", "server", "execution", "app"}
# demo files that only training and measuring need; train*.py as well
TRAINING = {"judge.py", "style_judge.py", "drawn_judge.py", "drawings.py"}
BANNED = re.compile(r"subprocess|urllib|requests|os\.environ|sqlite3|eval\(|exec\(|import_module"
                    r"|torch\.load|\.cuda\(|torch\.autocast|\bprint\(")
CONTRACT = {"MixologyLayoutNoise", "MixologyLayoutFromPrompt", "MixologyLayoutMixSampler",
            "MixologyLayoutMixKSampler", "MixologyTokenScale", "MixologyAttentionMerge", "MixologyGradientMask",
            "MixologyEpsilonMergeGuider", "MixologyCycleSampler", "MixologyBlendPrompts", "MixologyInvert",
            "MixologyFeatureInjection", "MixologyTrajectoryStart", "MixologyCocktailKSampler",
            "MixologySaveTrajectory", "MixologyLoadTrajectory", "MixologyExpert", "MixologySaliencyGuider",
            "MixologySaliencyMaps", "MixologyMixerImage", "MixologyMixerText", "MixologyMixerConditioning",
            "MixologyImageMetrics", "MixologyClipMetrics", "MixologySweep", "MixologyLabelledGrid",
            "MixologyDemoCheckpoint", "MixologyDemoPicture"}
TECHNIQUES = ("layout", "token_scale", "spatial", "attention_merge", "cycle", "inversion", "injection", "fusion",
              "mixer", "metrics", "sweep")
MOST_BRANCHES = 20
HIDDEN = {".git", ".mixology", "__pycache__", ".venv", "venv"}
REGISTRIES = re.compile("pypi" r"\.org|pythonhosted" r"\.org|npmjs" r"\.|deb" r"\.debian|https?://[a-z.-]+/simple\b")
TEXT = {".py", ".md", ".json", ".toml", ".yml", ".yaml", ".txt", ".html", ".css", ".js", ""}


def files(folder: Path) -> list[Path]:
    """All files below a folder that belong to the checkout."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in HIDDEN]
        found += [Path(place) / name for name in names]
    return sorted(found)


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in files(ROOT / folder) if path.suffix == ".py"]


def is_training(path: Path) -> bool:
    return path.name in TRAINING or path.name.startswith("train")


def runtime_files() -> list[Path]:
    demo = [path for path in python_files("demo") if not is_training(path)]
    return [ROOT / "__init__.py", *python_files(*ROOMS), *demo]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> set[str]:
    """Every module a file imports: "torch" from outside, ".samplers" for a room of the pack."""
    found = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(package) + 1, f"{path}:{node.lineno} imports from outside the pack"
            base = package[:len(package) + 1 - node.level]
            inside = [*base, *(node.module or "").split(".")]
            found |= {"." + next(part for part in [*inside, alias.name] if part) for alias in node.names}
    return found


@pytest.mark.parametrize("room", FILLED)
def test_room_is_there(room: str) -> None:
    assert (ROOT / "__init__.py").exists() and python_files(room)


@pytest.mark.parametrize("path", python_files(*PURE), ids=lambda path: str(path.relative_to(ROOT)))
def test_pure_rooms_import_only_tensors_and_each_other(path: Path) -> None:
    assert imports(path) <= PURE_IMPORTS | {f".{room}" for room in PURE}


@pytest.mark.parametrize("name", ["world.py", "judge.py"])
def test_demo_world_knows_no_host(name: str) -> None:
    assert not imports(ROOT / "demo" / name) & (HOST_MODULES | {".host", ".nodes"})


@pytest.mark.parametrize("path", python_files("host"), ids=lambda path: str(path.relative_to(ROOT)))
def test_host_room_does_not_know_nodes(path: Path) -> None:
    assert not {name for name in imports(path) if name.startswith(".")} - {f".{room}" for room in PURE} - {
        ".host", ".demo"}


@pytest.mark.parametrize("path", python_files("nodes"), ids=lambda path: str(path.relative_to(ROOT)))
def test_nodes_import_rooms_of_the_pack_only(path: Path) -> None:
    assert not {name for name in imports(path) if name.startswith(".")} - {f".{room}" for room in ROOMS} - {".demo"}


def technique_of(module: str) -> str | None:
    """The technique that a file is of, by its name; None of shared ones."""
    return next((name for name in TECHNIQUES if module == name or module.startswith(f"{name}_")), None)


def imported_files(path: Path) -> set[str]:
    """Files of the pack's rooms that a file imports, by the last part of their names."""
    return {name for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.level > 0
            for name in ((node.module or "").split(".")[-1], *(alias.name for alias in node.names))}


@pytest.mark.parametrize("path", python_files(*ROOMS), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_technique_imports_another(path: Path) -> None:
    """Nor does what all share import one; `nodes/__init__.py` lists them all."""
    if path == ROOT / "nodes" / "__init__.py":
        return
    own = technique_of(path.stem)
    found = {technique_of(name) for name in imported_files(path)} - {None, own}
    assert not found, f"{path.relative_to(ROOT)} imports {found}: what two share has a room of its own"


def test_model_classes_are_known_to_families_only() -> None:
    """A class that a host moves or lacks would take all nodes away, were it imported with a file."""
    for path in python_files("host", "nodes"):
        names = {node.module or "" for node in tree(path).body if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in tree(path).body if isinstance(node, ast.Import) for alias in node.names}
        found = [name for name in names if name.startswith(("comfy.ldm", "comfy.text_encoders", "comfy.model_base"))]
        assert not found, f"{path.relative_to(ROOT)} imports {found}: host/families knows them by name"


def count_branches(function: ast.AST) -> int:
    """Decisions of a function: if, loops, handlers, choices in expressions; of the functions in it as well."""
    kinds = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)
    steps = [node for node in ast.walk(function) if isinstance(node, kinds)]
    chained = [node for node in ast.walk(function) if isinstance(node, ast.BoolOp)]
    return len(steps) + sum(len(node.values) - 1 for node in chained)


@pytest.mark.parametrize("path", python_files("."), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_read_top_to_bottom(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = count_branches(node)
            assert count <= MOST_BRANCHES, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {count} branches"


THEIRS = ("executor", "super().", "comfy.", "sampler.sample")  # called as the host does: other nodes' wrappers count


@pytest.mark.parametrize("path", python_files(*ROOMS), ids=lambda path: str(path.relative_to(ROOT)))
def test_long_calls_name_their_arguments(path: Path) -> None:
    """At most four by position; in a node's `execute` none, so that no two inputs can be exchanged unseen."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and not ast.unparse(node.func).startswith(THEIRS):
            count = sum(not isinstance(argument, ast.Starred) for argument in node.args)
            assert count <= 4, f"{path.relative_to(ROOT)}:{node.lineno} passes {count} arguments by position"
        if isinstance(node, ast.FunctionDef) and node.name == "execute":
            for call in (call for call in ast.walk(node) if isinstance(call, ast.Call)):
                if ast.unparse(call.func) != "io.NodeOutput":
                    assert not call.args, f"{path.name}:{call.lineno} passes a node's inputs by position"


def test_entry_point_is_v3_only() -> None:
    text = (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert "comfy_entrypoint" in text
    assert "NODE_CLASS_MAPPINGS" not in text, "the host would ignore comfy_entrypoint"


@pytest.mark.parametrize("path", runtime_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_runtime_file_is_plain(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii(), [line for line in text.splitlines() if not line.isascii()][:3]
    assert not BANNED.findall(text)
    top_level = [node for node in tree(path).body if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert not [node.module for node in top_level if node.module and node.module.split(".")[0] in ROOMS]


@pytest.mark.parametrize("path", python_files("."), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, "a file this long does two things"


@pytest.mark.parametrize("path", python_files("nodes"), ids=lambda path: str(path.relative_to(ROOT)))
def test_nodes_hold_no_arithmetic(path: Path) -> None:
    arithmetic = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, arithmetic)), (
            f"{path.name}:{node.lineno} computes: that belongs in a pure room")
        if isinstance(node, ast.FunctionDef) and node.name == "execute":
            body = [statement for statement in node.body if not (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))]
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1
            assert length <= 15, f"{path.name}:{node.lineno} execute has {length} lines"


LEGIBLE = re.compile(r"legible\(|quote\(|type\([\w.]+\)\.__name__$")
OURS = {"example"}  # quoted words of the pack itself


def messages(path: Path) -> list[ast.JoinedStr]:
    """f-strings of a file that are raised or logged."""
    told = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Raise) or (
        isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("logging.", "ValueError")))]
    return [part for node in told for part in ast.walk(node) if isinstance(part, ast.JoinedStr)]


@pytest.mark.parametrize("path", runtime_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_message_quotes_can_be_logged(path: Path) -> None:
    """By the house's style a message sets users' words in quotation marks, and nothing else; and a log shows the text
    of a foreign exception wherever one is told or chained."""
    for message in messages(path):
        for before, part in zip(message.values, message.values[1:]):
            quoted = isinstance(before, ast.Constant) and str(before.value).endswith("'")
            if quoted and isinstance(part, ast.FormattedValue) and part.conversion != ord("a"):
                words = ast.unparse(part.value)
                assert LEGIBLE.match(words) or words in OURS, f"{path.name}:{message.lineno} quotes {words}: legible()"
    for handler in (node for node in ast.walk(tree(path)) if isinstance(node, ast.ExceptHandler)):
        told = [part for node in ast.walk(handler) if isinstance(node, ast.Raise) for part in ast.walk(node)
                if isinstance(part, ast.FormattedValue)]
        assert not [part for part in told if ast.unparse(part.value) == handler.name], (
            f"{path.name}:{handler.lineno} tells a foreign exception as it is: legible()")
        chained = [node for node in ast.walk(handler) if isinstance(node, ast.Raise) and node.exc is not None and not (
            isinstance(node.cause, ast.Constant) and node.cause.value is None)]
        assert not chained, f"{path.name}:{handler.lineno} raises within another exception that is logged: from None"


def test_contract_is_kept(pack: dict[str, Any]) -> None:
    assert set(pack) >= CONTRACT


def test_hosts_loader_takes_the_pack(pack: dict[str, Any], loaded_pack: dict[str, Any]) -> None:
    assert set(loaded_pack) == set(pack)


def test_schemas_are_complete(pack: dict[str, Any]) -> None:
    assert pack
    for name, node in pack.items():
        schema = node.define_schema()
        assert name.startswith("Mixology") and schema.category.startswith("mixology/"), name
        assert schema.display_name and schema.description, f"{name} has no name or description"
        parameters = inspect.signature(node.execute).parameters
        assert sorted(socket.id for socket in schema.inputs) == sorted(parameters), f"{name}: ids and parameters differ"
        for socket in schema.inputs:
            where = f"{name}.{socket.id}"
            assert socket.tooltip, f"{where} has no tooltip"
            has_default = parameters[socket.id].default is not inspect.Parameter.empty
            assert not socket.optional or has_default, f"{where} is optional but execute demands it"
            if socket.get_io_type() in ("INT", "FLOAT"):
                assert None not in (socket.min, socket.max, socket.default), f"{where} has no bounds"
                assert socket.min <= socket.default <= socket.max, f"{where}: its default is out of bounds"
            elif socket.get_io_type() in ("STRING", "BOOLEAN"):
                assert socket.default is not None, f"{where} has no default"
        for socket in schema.outputs:
            assert socket.tooltip, f"{name}: an output has no tooltip"


def test_every_node_has_a_help_page(pack: dict[str, Any]) -> None:
    assert pack
    for name in pack:
        page = ROOT / "web" / "docs" / f"{name}.md"
        assert page.exists(), f"{name} has no help page"
        text = page.read_text(encoding="utf-8")
        missing = [socket.id for socket in pack[name].define_schema().inputs if socket.id not in text]
        assert not missing, f"the help page of {name} does not speak of {missing}"


def test_no_file_names_a_package_registry() -> None:
    paths = [path for path in files(ROOT) if path.suffix in TEXT]
    assert len(paths) > 10
    for path in paths:
        found = REGISTRIES.search(path.read_text(encoding="utf-8", errors="ignore"))
        assert not found, f"{path.relative_to(ROOT)} names {found and found.group()}"
