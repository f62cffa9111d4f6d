"""The tools' own parts: what they say when something fails, templates to prompts, unpacking, the gallery page."""
from __future__ import annotations

import io
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commands
import environment
import packages
import pytest
import stage
import workflow
from comfyui import Server
from commands import Failure
from graph import Graph

SAMPLER_INPUTS = {"required": {"model": ["MODEL", {}], "seed": ["INT", {"default": 0, "control_after_generate": True}],
                               "steps": ["INT", {"default": 20}], "sampler_name": [["euler", "ddim"], {}],
                               "latent_image": ["LATENT", {}]},
                  "optional": {"mask": ["MASK", {}], "strength": ["FLOAT", {"default": 1.0}],
                               "count": ["INT", {"default": 1, "forceInput": True}]}}
DEFINITIONS: dict[str, Any] = {
    "Loader": {"input": {"required": {"ckpt_name": [["a", "b"]]}}, "display_name": "Loader"},
    "Other": {"input": {"required": {"name": ["COMBO", {"options": ["tiny", "big"]}]}}},
    "Sampler": {"input": SAMPLER_INPUTS, "display_name": "Sampler"},
    "Latent": {"input": {"required": {"width": ["INT", {}], "height": ["INT", {}]}}},
    "Resize": {"input": {"required": {
        "method": ["COMFY_DYNAMICCOMBO_V3", {"options": [
            {"key": "scale", "inputs": {"required": {"factor": ["FLOAT", {}]}}},
            {"key": "size", "inputs": {"required": {"width": ["INT", {}], "height": ["INT", {}]}}}]}],
        "latent": ["LATENT", {}], "smooth": ["BOOLEAN", {}]}}},
}


def node(number: int, kind: str, widgets: object = None, inputs: dict[str, int | None] | None = None,
         mode: int = 0, title: str = "", kinds: str = "LATENT") -> dict[str, Any]:
    return {"id": number, "type": kind, "mode": mode, "title": title, "widgets_values": widgets,
            "inputs": [{"name": name, "type": kinds, "link": link} for name, link in (inputs or {}).items()],
            "outputs": [{"type": kinds}]}


def graph(*nodes: dict[str, Any], links: list[list[Any]]) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": links}


def test_widgets_links_and_the_control_widget() -> None:
    prompt = workflow.convert(graph(
        node(1, "Loader", ["b"]), node(2, "Latent", [64, 32]),
        node(3, "Sampler", [7, "randomize", 30, "ddim", 0.5],
             {"model": 1, "latent_image": 2, "mask": None}, title="Go"),
        node(4, "MarkdownNote", ["hello"]),
        links=[[1, 1, 0, 3, 0, "MODEL"], [2, 2, 0, 3, 1, "LATENT"]]), DEFINITIONS)
    assert set(prompt) == {"1", "2", "3"}
    assert prompt["3"]["_meta"] == {"title": "Go"}
    assert prompt["3"]["inputs"] == {"seed": 7, "steps": 30, "sampler_name": "ddim", "strength": 0.5,
                                     "model": ["1", 0], "latent_image": ["2", 0]}


def test_a_seed_saved_without_its_control_widget() -> None:
    prompt = workflow.convert(graph(node(3, "Sampler", [7, 30, "ddim", 0.5]), links=[]), DEFINITIONS)
    assert prompt["3"]["inputs"] == {"seed": 7, "steps": 30, "sampler_name": "ddim", "strength": 0.5}


def test_widgets_saved_by_name() -> None:
    prompt = workflow.convert(graph(node(2, "Latent", {"height": 8, "width": 16, "preview": 1}), links=[]), DEFINITIONS)
    assert prompt["2"]["inputs"] == {"width": 16, "height": 8}


def test_dynamic_combo_brings_its_own_widgets() -> None:
    prompt = workflow.convert(graph(node(1, "Resize", ["size", 64, 32, True]), links=[]), DEFINITIONS)
    assert prompt["1"]["inputs"] == {"method": "size", "method.width": 64, "method.height": 32, "smooth": True}


def test_a_growing_input_is_wired_socket_by_socket() -> None:
    """As the GUI saves it: one socket a link under the input's name, and one that waits for the next."""
    template = {"input": {"required": {"prompt": ["LATENT", {}]}}, "prefix": "prompt_", "min": 2, "max": 3}
    inputs = {"required": {"cfg": ["FLOAT", {"default": 2.0}], "prompts": ["COMFY_AUTOGROW_V3", {"template": template}],
                           "mask": ["MASK", {}]}}
    merge = SimpleNamespace(RETURN_TYPES=("GUIDER",), INPUT_TYPES=lambda: inputs)
    latent = SimpleNamespace(RETURN_TYPES=("LATENT",), INPUT_TYPES=lambda: DEFINITIONS["Latent"]["input"])
    drawn = Graph({"Merge": merge, "Latent": latent}, {})
    with drawn.group("All"):
        sources = [(drawn.add("Latent"), 0) for _ in range(3)]
        for wired in (sources[:2], sources):
            drawn.add("Merge", prompts=wired)
    sockets = drawn.nodes[3]["inputs"]
    names = ["prompts.prompt_0", "prompts.prompt_1", "prompts.prompt_2", "mask"]
    assert [socket["name"] for socket in sockets] == names
    assert [socket["label"] for socket in sockets[:3]] == ["prompt_0", "prompt_1", "prompt_2"]
    assert [socket["link"] for socket in sockets] == [1, 2, None, None]
    assert [socket.get("shape") for socket in sockets] == [None, None, 7, None]
    assert len(drawn.nodes[4]["inputs"]) == 4 and drawn.links[4] == [5, 3, 0, 5, 2, "LATENT"]
    definitions = {**DEFINITIONS, "Merge": {"input": inputs}}
    prompt = workflow.convert({"nodes": drawn.nodes, "links": drawn.links}, definitions)
    assert prompt["4"]["inputs"] == {"cfg": 2.0, "prompts.prompt_0": ["1", 0], "prompts.prompt_1": ["2", 0]}
    assert prompt["5"]["inputs"]["prompts.prompt_2"] == ["3", 0]


def test_reroutes_bypassed_muted_and_primitive_nodes() -> None:
    prompt = workflow.convert(graph(
        node(1, "Latent", [64, 32]), node(2, "Reroute", None, {"": 1}),
        node(3, "Resize", ["scale", 2.0, False], {"latent": 2}, mode=workflow.BYPASSED),
        node(4, "Latent", [8, 8], mode=workflow.MUTED), node(5, "PrimitiveNode", [99, "fixed"]),
        node(6, "Sampler", [1, "fixed", 30, "ddim", 1.0], {"latent_image": 3, "mask": 4, "steps": 5}),
        links=[[1, 1, 0, 2, 0, "LATENT"], [2, 2, 0, 3, 0, "LATENT"], [3, 3, 0, 6, 0, "LATENT"],
               [4, 4, 0, 6, 1, "MASK"], [5, 5, 0, 6, 2, "INT"]]), DEFINITIONS)
    assert set(prompt) == {"1", "6"}
    assert prompt["6"]["inputs"]["latent_image"] == ["1", 0]
    assert "mask" not in prompt["6"]["inputs"]
    assert prompt["6"]["inputs"]["steps"] == 99


def test_links_saved_as_objects() -> None:
    link = {"id": 9, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "LATENT"}
    prompt = workflow.convert({"nodes": [node(1, "Latent", [8, 8]), node(2, "Resize", ["scale", 2.0, True],
                                                                         {"latent": 9})], "links": [link]}, DEFINITIONS)
    assert prompt["2"]["inputs"]["latent"] == ["1", 0]


def test_nodes_are_found_set_added_and_exchanged() -> None:
    flow = workflow.Workflow(workflow.convert(graph(
        node(1, "Loader", ["b"]), node(3, "Sampler", [7, "fixed", 30, "ddim", 0.5], {"model": 1}, title="Go"),
        links=[[1, 1, 2, 3, 0, "MODEL"]]), DEFINITIONS), DEFINITIONS)
    flow.set("Go", steps=5)
    flow.exchange("Loader", "Other", name="big")
    assert flow.prompt["1"] == {"class_type": "Other", "inputs": {"name": "big"}, "_meta": {"title": "Loader"}}
    assert flow.prompt["3"]["inputs"]["model"] == ["1", 2] and flow.prompt["3"]["inputs"]["steps"] == 5
    added = flow.add("Resize", latent=["3", 0])
    assert flow.prompt[added]["inputs"] == {"method": "scale", "smooth": "", "latent": ["3", 0]}
    with pytest.raises(Failure, match=r"one node titled 'Stop', it has 0"):
        flow.set("Stop", steps=5)
    with pytest.raises(Failure, match=r"Sampler has no input 'step', it has: model, seed"):
        flow.set("Go", step=5)


@pytest.mark.parametrize(("saved", "words"), [
    ({"prompt": {}}, "is not a saved workflow"),
    ({"nodes": [node(1, "Mystery")]}, "uses the node Mystery, which this server does not have"),
    ({"nodes": [node(1, "Latent", [8])]}, "saves no value for height of Latent"),
])
def test_a_workflow_that_cannot_be_posted(saved: dict[str, Any], words: str) -> None:
    with pytest.raises(Failure, match=words):
        workflow.convert(saved, DEFINITIONS)


@pytest.mark.parametrize(("output", "words"), [
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
    ("error: Failed to fetch x\n Caused by: dns error: failed to lookup", "check the network"),
    ("urlopen error [Errno -3] Temporary failure in name resolution", "check the network"),
    ("THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "another file than the pinned one"),
    ("ERROR: No matching distribution found for torch==2.11.0", "no fitting version for Python"),
    ("\x1b[31mfine\nValueError: the cat sat.\n  done\x1b[0m", "ValueError: the cat sat"),
    ("", "it said nothing"),
])
def test_a_failure_is_told_in_plain_words(output: str, words: str) -> None:
    assert words in commands.diagnose(output)


def test_a_program_that_fails_or_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "LOGS", tmp_path)
    with pytest.raises(Failure, match="Trying failed: KeyError: 3"):
        commands.run([sys.executable, "-c", "raise KeyError(3)"], "Trying")
    assert "KeyError" in (tmp_path / "setup.log").read_text()
    with pytest.raises(Failure, match="Trying failed: .* cannot be started"):
        commands.run([tmp_path / "nothing"], "Trying")


def test_a_link_replaces_what_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "WORK", tmp_path)
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "nodes" / "pack"
    for folder in (old, new):
        folder.mkdir()
        (folder / "who.txt").write_text(folder.name)
    commands.link_folder(old, link)
    commands.link_folder(new, link)
    assert (link / "who.txt").read_text() == "new" and (old / "who.txt").exists()
    link.unlink()
    link.mkdir()
    (link / "stale.txt").write_text("copied by an earlier start")
    commands.link_folder(new, link)
    assert [path.name for path in link.iterdir()] == ["who.txt"]
    with pytest.raises(ValueError, match="expected a link inside"):
        commands.link_folder(new, tmp_path.parent / "elsewhere")


def test_without_links_the_pack_is_copied_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise OSError("links are not allowed here")

    monkeypatch.setattr(commands, "WORK", tmp_path)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    pack, link = tmp_path / "pack", tmp_path / "nodes" / "pack"
    (pack / "tests").mkdir(parents=True)
    (pack / "a.py").write_text("1")
    commands.link_folder(pack, link)
    (pack / "a.py").write_text("2")
    commands.link_folder(pack, link)
    assert (link / "a.py").read_text() == "2" and not (link / "tests").exists()


def make_archive(path: Path, **files: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("top/vendor/ComfyUI/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    return path


def test_unpacking_takes_one_folder_and_nothing_that_leads_outside(tmp_path: Path) -> None:
    good = make_archive(tmp_path / "good.tar.gz", **{"top/vendor/ComfyUI/a/b.py": "1", "top/other.py": "2"})
    (tmp_path / "host.part").mkdir()  # left by an interrupted start
    (tmp_path / "host.part" / "half.py").write_text("")
    packages.unpack(good, "vendor/ComfyUI", tmp_path / "host")
    assert [path.name for path in (tmp_path / "host").rglob("*")] == ["a", "b.py"]
    bad = make_archive(tmp_path / "bad.tar.gz", **{"top/vendor/ComfyUI/../../../evil.py": "1"})
    with pytest.raises(Failure, match="leads outside"):
        packages.unpack(bad, "vendor/ComfyUI", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_pips_index_settings_reach_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(packages, "_quiet", lambda command: (
        "global.index-url='file:///a'\n:env:.extra-index-url='file:///b\\nfile:///c'\ninstall.find-links='/d /e'\n"))
    env = packages.uv_environment()
    assert env["UV_DEFAULT_INDEX"] == "file:///a" and env["UV_INDEX"] == "file:///b file:///c"
    assert env["UV_FIND_LINKS"] == "/d,/e"


@pytest.mark.parametrize(("version", "words"), [
    (None, "no ComfyUI is there"), ("0.16.2", "is 0.16.2, Mixology needs 0.16.3 or later"),
    ("", "too old to state its version")])
def test_an_install_that_cannot_be_used(version: str | None, words: str, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    if version is not None:
        (tmp_path / "comfy").mkdir()
        (tmp_path / "main.py").touch()
    if version:
        (tmp_path / "comfyui_version.py").write_text(f'# made\n__version__ = "{version}"\n')
    with pytest.raises(Failure, match=words):
        environment.prepare()


def test_an_install_without_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PYTHON", str(tmp_path / "python"))
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.30.0"\n')
    with pytest.raises(Failure, match="cannot be started .*COMFYUI_PYTHON"):
        environment.prepare()


def test_an_install_is_shown_the_pack_without_being_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "WORK", tmp_path / "work")
    monkeypatch.setattr(commands, "WORK", tmp_path / "work")
    nodes = tmp_path / "ComfyUI" / "custom_nodes"
    nodes.mkdir(parents=True)
    host = environment.Host(nodes.parent, Path(sys.executable), "0.30.0")
    paths = environment.paths_file(host, tmp_path / "models" / "x.safetensors")
    assert all(f"{kind}:" in paths.read_text() for kind in ("custom_nodes", "checkpoints", "loras"))
    assert not list(nodes.iterdir())
    (nodes / "mine").symlink_to(commands.ROOT)
    assert "custom_nodes:" not in environment.paths_file(host).read_text()


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_tool_stops_what_it_started(end: signal.Signals, tmp_path: Path) -> None:
    child, tool = tmp_path / "child.py", tmp_path / "tool.py"
    child.write_text("import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)")
    tool.write_text(f"""
import sys
sys.path.insert(0, {str(commands.ROOT / "tools")!r})
from pathlib import Path
import commands, environment
host = environment.Host(Path("/nowhere"), Path(sys.executable), "0.30.0")
sys.exit(commands.guarded(lambda: host.start("script", {str(child)!r}, [{str(tmp_path / "runs")!r}]) + 77))
""")
    process = subprocess.Popen(
        [sys.executable, tool], start_new_session=True, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # background jobs start with it ignored
    while not (tmp_path / "runs").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, end)  # as a terminal does
    assert process.wait(30) == 128 + end
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_versions_compare_as_numbers() -> None:
    assert environment.version_key("0.9.12") < environment.version_key("0.16.3") < environment.version_key("0.30.0")


def test_a_taken_port_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        host = environment.Host(Path("/nowhere"), Path(sys.executable), "0.30.0")
        with pytest.raises(Failure, match=f"Port {port} is taken"), Server(host, port):
            pass


def test_a_server_that_dies_is_told_with_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("raise RuntimeError('no such luck')")
    host = environment.Host(tmp_path, Path(sys.executable), "0.30.0")
    with pytest.raises(Failure, match="did not start: RuntimeError: no such luck"), Server(host, name="dead"):
        pass


def test_checkpoints_are_told_apart_by_their_header(tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    headers = {"sd1": {key: {"shape": [320, 768]}}, "sd2": {key: {"shape": [320, 1024]}},
               "sdxl": {"model.diffusion_model.label_emb.0.0.weight": {}, "conditioner.embedders.1.model.x": {}}}
    for name, header in headers.items():
        text = json.dumps(header).encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(text)) + text)
    assert stage.read_checkpoint(tmp_path / "sd1").side == 512
    assert stage.read_checkpoint(tmp_path / "sdxl").side == 1024
    (tmp_path / "junk").write_bytes(os.urandom(100))
    for name in ("sd2", "junk"):
        with pytest.raises(Failure, match="no SD1.x or SDXL checkpoint"):
            stage.read_checkpoint(tmp_path / name)
    with pytest.raises(Failure, match="cannot be read"):
        stage.read_checkpoint(tmp_path / "absent")


def test_counts_are_read_from_a_report(tmp_path: Path) -> None:
    test_command = runpy.run_path(str(commands.ROOT / "tools" / "test.py"))  # by path: Python has a module `test`
    report = tmp_path / "r.xml"
    assert not test_command["read_counts"](report)
    report.write_text('<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2"/></testsuites>')
    assert test_command["read_counts"](report) == {"tests": 5, "failures": 1, "errors": 0, "skipped": 2}


@pytest.mark.parametrize(("variables", "count"), [({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
                                                  ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_a_servers_threads_do_not_spin_beside_other_load(variables: dict[str, str], count: str | None, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "main.py").write_text("import json, os; print(json.dumps(dict(os.environ)))\n", encoding="utf-8")
    host = environment.Host(tmp_path, Path(sys.executable), "0.30.0")
    server = Server(host, name="spin")
    with pytest.raises(Failure):
        server.__enter__()
    assert json.loads(server.log.read_text(encoding="utf-8").splitlines()[-1]).get("GOMP_SPINCOUNT") == count
