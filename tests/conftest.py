"""The host on CPU, the pack under the name `mixology`, and a real server for the tests that ask for one."""
from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = os.environ.get("MIXOLOGY_HOST", "")
if not HOST:
    raise pytest.UsageError("MIXOLOGY_HOST is not set: run the tests with `python3 tools/test.py -- ARGUMENTS`.")

sys.path.insert(0, HOST)  # only the host: the checkout's root must never be on sys.path
sys.path.append(str(ROOT / "tests"))  # before the tools, which have a `families` as well
sys.path.append(str(ROOT / "tools"))

from comfy.cli_args import args  # noqa: E402  (it reads no command line unless main.py asks for it)

args.cpu = True  # before comfy.model_management looks for a device


def _load_pack() -> None:
    spec = importlib.util.spec_from_file_location("mixology", ROOT / "__init__.py",
                                                  submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mixology"] = module
    spec.loader.exec_module(module)


_load_pack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-references", action="store_true",
                     help="the server test writes its reference pictures anew instead of comparing with them")


LONGEST = ("server", "meaning", "slow")  # marks of files to begin with, so that workers end together


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests of families that the host lacks, and begins with the longest files: several workers take a file
    at a time."""
    import families  # imports the host

    absent = set(families.missing())
    left = [item for item in items if absent and read_name(item) in absent]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if read_name(item) not in absent]
    ranks: dict[Path, int] = {}
    for item in items:
        rank = next((i for i, mark in enumerate(LONGEST) if item.get_closest_marker(mark)), len(LONGEST))
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


def read_name(item: pytest.Item) -> str | None:
    """The family that a test is about, if any."""
    spec = getattr(item, "callspec", None)
    name = None if spec is None else spec.params.get("name")
    return name if isinstance(name, str) else None


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def host_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The host reads and writes in temporary folders."""
    import folder_paths

    for name in ("output", "input", "temp", "user"):
        getattr(folder_paths, f"set_{name}_directory")(str(tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """The host collects garbage whenever a clone has gone: among new objects only, else that is a second each time. It
    forgets the last module's models, of which frozen ones would count as leaks."""
    from comfy import model_management

    gc.unfreeze()
    # one by one from the end: the host's own unloading keeps places in a list that shrinks while a model goes
    while model_management.current_loaded_models:
        loaded = model_management.current_loaded_models.pop()
        if loaded.model is not None:
            loaded.model.detach()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def inference() -> Iterator[None]:
    """The host's executor runs every node in this mode."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def checkpoints() -> Callable[[str], tuple[Any, Any, Any]]:
    """MODEL, CLIP and VAE of a demo checkpoint by its name, each loaded once."""
    from mixology.host.demo import load_checkpoint

    return functools.cache(load_checkpoint)


@pytest.fixture(scope="module")
def usual_kernel() -> Iterator[None]:
    """Attention as most people's machines compute it; the host's choice for a CPU takes a third longer."""
    from comfy.ldm.modules import attention

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "optimized_attention", attention.attention_pytorch)
        yield


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Tiny UNets by what they predict: eps, v, flow."""
    import tiny

    return {kind: tiny.unet(kind) for kind in tiny.KINDS}


@pytest.fixture(scope="module")
def model(models: dict[str, Any]) -> Any:
    """The one that predicts eps."""
    return models["eps"]


@pytest.fixture(scope="session")
def pack() -> dict[str, Any]:
    """The pack's node classes by id, from its entry point."""
    async def load() -> list[Any]:
        extension = await sys.modules["mixology"].comfy_entrypoint()
        return list(await extension.get_node_list())

    return {node.define_schema().node_id: node for node in asyncio.run(load())}


@pytest.fixture(scope="session")
def loaded_pack() -> dict[str, Any]:
    """The pack's node classes by id, loaded by the host's own loader from the checkout's folder."""
    nodes: Any = importlib.import_module("nodes")  # the host's, not the room of the same name

    assert asyncio.run(nodes.load_custom_node(str(ROOT))), "the host's loader refused the pack"
    return {name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("Mixology")}


@pytest.fixture(scope="session")
def loaded(loaded_pack: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Every node class of the host and of the pack by id, and their names."""
    from graph import load_definitions

    return load_definitions()


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """A real ComfyUI server with the pack."""
    import environment
    from comfyui import Server

    host = environment.current()
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    with Server(host, paths_file=environment.paths_file(host), name=f"tests{worker}",
                arguments=["--preview-method", "auto", "--disable-api-nodes",
                           "--use-pytorch-cross-attention"]) as running:  # the kernel that most people have
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser; `tools/test.py` says at its end how many tests had none. Closed with its file, since Playwright
    holds this thread's event loop."""
    import gui

    missing = os.environ.get("MIXOLOGY_NO_BROWSER", "start the tests through tools/test.py.")
    program = os.environ.get("MIXOLOGY_BROWSER", "")
    if not program:
        pytest.skip(f"no browser: {missing}")
    yield from gui.start(program)
