"""The script that gives a notice room on its node and takes it away again, under Node.js on a stand-in of the page."""
from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import playwright
import pytest
from mixology.host.notices import SIGN

NODE = Path(playwright.__file__).parent / "driver" / ("node.exe" if os.name == "nt" else "node")  # it brings its own

API = """
const listeners = {};
export const api = { addEventListener: (kind, told) => (listeners[kind] ??= []).push(told) };
export const tell = (kind, detail) => (listeners[kind] ?? []).forEach((told) => told({ detail }));
"""
APP = """
const make = () => ({
  size: [200, 100], widgets: [{ name: "seed", value: 1 }],
  setSize(size) { this.size = size; },
  computeSize() { return [200, 50 + this.widgets.reduce((sum, w) => sum + (w.options?.getMinHeight() ?? 20), 0)]; },
});
export const plain = make();
export const inner = make();
const graphs = { inside: { getNodeById: (id) => (id === 3 ? inner : null) } };
const known = { 6: plain, 12: { subgraph: graphs.inside } };
export const app = {
  graph: { getNodeById: (id) => known[id] ?? null }, registerExtension: (extension) => extension.setup() };
"""
STEPS = """
globalThis.window = {};
globalThis.requestAnimationFrame = (call) => call();
const { tell } = await import("./scripts/api.js");
const { plain, inner } = await import("./scripts/app.js");
const options = { getMinHeight: () => 58 };
function show(node, nodeId, text) { // what the page itself does
  const found = node.widgets.find((w) => w.name === "$$node-text-preview");
  if (found) found.value = text;
  else node.widgets.push({ name: "$$node-text-preview", value: text, options: { ...options } });
  tell("progress_text", { nodeId, text });
}
await import("./extensions/pack/notices.js");
const seen = [];
const look = (node) => seen.push([node.widgets.slice(1).map((w) => w.value), node.size[1]]);
"""


def play(folder: Path, steps: str) -> list[Any]:
    """What `look` saw while the page went through some steps."""
    script = Path(__file__).resolve().parent.parent / "web" / "notices.js"
    for name, text in {"scripts/api.js": API, "scripts/app.js": APP, "package.json": '{"type": "module"}',
                       "extensions/pack/notices.js": script.read_text(encoding="utf-8"),
                       "play.js": f"{STEPS}{steps}\nconsole.log(JSON.stringify(seen));"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    ran = subprocess.run([str(NODE), "play.js"], cwd=folder, capture_output=True, encoding="utf-8", timeout=60)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("node, name", [("plain", "6"), ("inner", "12:3")])
def test_a_notice_has_room_and_leaves_when_its_node_runs_again(tmp_path: Path, node: str, name: str) -> None:
    notice = SIGN + "word " * 40
    first, cached, fixed = play(tmp_path, f"""
        tell("execution_start", {{ prompt_id: "a" }});
        tell("executing", "{name}");
        show({node}, "{name}", {json.dumps(notice)});
        look({node});
        tell("execution_start", {{ prompt_id: "b" }});
        tell("executing", "99");
        look({node});
        tell("execution_start", {{ prompt_id: "c" }});
        tell("executing", "{name}");
        look({node});""")
    assert first[0] == cached[0] == [notice] and first[1] == cached[1] > 200
    assert fixed == [[], 100]


def test_a_notice_that_comes_before_its_node_runs_stays(tmp_path: Path) -> None:
    before, again = play(tmp_path, f"""
        for (const prompt_id of ["a", "b"]) {{
          tell("execution_start", {{ prompt_id }});
          show(plain, "6", {json.dumps(SIGN + "Look.")});
          tell("executing", "6");
          look(plain);
        }}""")
    assert before[0] == again[0] == [SIGN + "Look."] and before[1] == again[1]


def test_texts_of_other_nodes_and_sizes_of_their_users_are_left_alone(tmp_path: Path) -> None:
    foreign, resized = play(tmp_path, f"""
        tell("execution_start", {{ prompt_id: "a" }});
        show(inner, "12:3", "Status: Completed");
        show(plain, "6", {json.dumps(SIGN + "Look.")});
        plain.setSize([200, 500]);
        tell("execution_start", {{ prompt_id: "b" }});
        tell("executing", "12:3");
        tell("executing", "6");
        look(inner);
        look(plain);""")
    assert foreign == [["Status: Completed"], 100] and resized == [[], 500]
