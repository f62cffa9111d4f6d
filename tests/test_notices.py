"""Notices on nodes, the graph that they are found in, and runs that leave a patch without its prompt."""
from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import fusion_rig
import pytest
import tiny
import torch
from comfy_execution.utils import CurrentNodeContext
from families import raise_norms
from marks_rig import NEGATIVE, NODES, OTHER, TEXT, mark, run
from mixology.host.added_noise import find_noisers
from mixology.host.cycle import CycleSampler
from mixology.host.graph import running_graph
from mixology.host.mixer_files import PROMPTS
from mixology.host.mixer_graph import find_faults
from mixology.host.notices import SIGN, show_notice
from safetensors.torch import save_file

pytestmark = pytest.mark.seam
NOTHING = "did nothing in this run"
Graph = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> Any:
    return raise_norms(tiny.unet())


class Server:
    """What the host's server offers to a node, noted."""

    def __init__(self, prompt: Graph) -> None:
        self.shown: list[tuple[str, str]] = []
        self.prompt_queue, self.running = self, [(1, "other", {}, {}, []), (2, "run", prompt, {}, [])]

    def send_progress_text(self, text: str, node_id: str) -> None:
        self.shown.append((node_id, text))

    def get_current_queue_volatile(self) -> tuple[list[Any], list[Any]]:
        return self.running, []


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    host = Server({"7": {"class_type": "KSampler", "inputs": {}}})
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=host)))
    return host


# --------------------------------------------------------------------------------------------------- on a node

def test_a_notice_is_on_the_node_that_runs_and_in_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), CurrentNodeContext("run", "7"):
        show_notice("Look here.")
        show_notice("And there.", "12:3")
    assert server.shown == [("7", f"{SIGN}Look here."), ("12:3", f"{SIGN}And there.")]
    assert [record.getMessage() for record in caplog.records] == ["Look here.", "And there."]


def test_without_a_node_or_a_server_it_is_in_the_log(server: Server, caplog: pytest.LogCaptureFixture,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.WARNING):
        show_notice("Look here.")
        for absent in (SimpleNamespace(PromptServer=SimpleNamespace()), None):
            monkeypatch.setitem(sys.modules, "server", absent)
            with CurrentNodeContext("run", "7"):
                show_notice("Look here.")
                assert running_graph() == ({}, "")
    assert not server.shown and len(caplog.records) == 3


def test_the_running_graph_is_the_prompt_that_asks(server: Server) -> None:
    with CurrentNodeContext("run", "7"):
        assert running_graph() == (server.running[1][2], "7")
    for prompt, node in (("run", "8"), ("gone", "7")):  # a node that the run made itself; another server's prompt
        with CurrentNodeContext(prompt, node):
            assert running_graph() == ({}, "")
    assert running_graph() == ({}, "")


# --------------------------------------------------------------------------------------------------- marks

@pytest.mark.parametrize("technique", NODES)
def test_a_run_without_the_prompt_of_its_patch_is_told_of(model: Any, technique: str,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    patched, positive = mark(technique, model)
    with caplog.at_level(logging.WARNING):
        run(patched, positive)
        run(patched, TEXT, positive)
        run(model, TEXT)
        assert NOTHING not in caplog.text
        plain = run(patched, TEXT)
    assert [record.getMessage() for record in caplog.records] == [
        f"{NODES[technique]} did nothing in this run: the model is its MODEL output, but no prompt is its CONDITIONING "
        f"output; connect that to the sampler or guider (Conditioning Concat and Average keep it as conditioning_to "
        f"only), or take the model from before {NODES[technique]}."]
    assert torch.equal(plain, run(model, TEXT))


def test_a_scaled_style_is_read_with_the_merge(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    from attention_merge_rig import merge, soft_masks

    patched, scaled = mark("scale", model)
    merged, positive = merge(patched, soft_masks(2), OTHER, scaled)
    with caplog.at_level(logging.WARNING):
        run(merged, positive)
    assert not caplog.records


def test_a_prompt_that_a_sampler_brings_is_read(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Cycle Sampler's source, which is in no guider."""
    patched, source = mark("scale", model)
    latent = tiny.latent(1, 8, 8)["samples"]
    guider = tiny.cfg_guider(patched, TEXT, NEGATIVE)
    with caplog.at_level(logging.WARNING):
        guider.sample(torch.randn(latent.shape, generator=torch.Generator().manual_seed(5)), latent,
                      CycleSampler(source, 1.0, 0.1, 0), tiny.sigmas_of(model, steps=3), disable_pbar=True, seed=5)
    assert not caplog.records


@pytest.mark.parametrize("shared", [True, False])
def test_experts_of_one_model_wait_for_one_prompt(model: Any, shared: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What another expert on the same model reads is not this one's fault; on a model of its own it is."""
    patched, positive = mark("scale", model)
    own = patched if shared else mark("scale", model)[0]
    for first, second in ((positive, OTHER), (OTHER, positive)):
        caplog.clear()
        guider = fusion_rig.fuser([fusion_rig.spec(patched, first), fusion_rig.spec(own, second)])
        with caplog.at_level(logging.WARNING):
            fusion_rig.run(guider, tiny.latent(1, 8, 8), tiny.sigmas_of(model, steps=2))
        assert len([record for record in caplog.records if NOTHING in record.getMessage()]) == (not shared)


# --------------------------------------------------------------------------------------------------- graphs

def node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def mixed(**parts: Any) -> Graph:
    """A mix under a sampler, some nodes replaced."""
    return {
        "mix": node("MixologyMixerConditioning"), "text": node("CLIPTextEncode", clip=["loader", 1]),
        "loader": node("CheckpointLoaderSimple", ckpt_name="gone.safetensors"), "sampler": sampler(), **parts}


def sampler(kind: str = "KSampler", **inputs: Any) -> Graph:
    return node(kind, **{"model": ["loader", 0], "cfg": 3.0, "positive": ["mix", 0], "negative": ["mix", 1], **inputs})


CONTROLLED = node("ControlNetApplyAdvanced", positive=["mix", 0], negative=["text", 0])
WRONG = {
    "a text": sampler(negative=["text", 0]),
    "through nodes": [sampler(positive=["far", 0], negative=["near", 1]), CONTROLLED,
                      node("ConditioningSetArea", conditioning=["near", 0])],
    "of a control": [sampler(positive=["near", 0], negative=["near", 1]), CONTROLLED],
    "joined": [sampler(negative=["near", 0]), node("ConditioningCombine", conditioning_1=["mix", 1],
                                                  conditioning_2=["text", 0])],
    "a guider": sampler("CFGGuider", negative=["text", 0]), "ours": sampler("MixologyExpert", negative=["text", 0]),
    "styles": sampler("MixologyEpsilonMergeGuider", positive=["text", 0], negative=["text", 0], **{
        "positives.positive_0": ["mix", 0]})}
RIGHT = {
    "its own": sampler(), "cfg 1": sampler(negative=["text", 0], cfg=1.0),
    "of a control": [sampler(positive=["near", 0], negative=["mix", 1]), CONTROLLED],
    "zeroed": [sampler(negative=["near", 0]), node("ConditioningZeroOut", conditioning=["text", 0])],
    "its negative alone": sampler(positive=["text", 0], negative=["mix", 0]),
    "a stranger's": [sampler(negative=["near", 0]), node("NoSuchNode", conditioning=["near", 0])]}


def replace(parts: Any) -> Graph:
    listed = parts if isinstance(parts, list) else [parts]
    return mixed(**dict(zip(("sampler", "near", "far"), listed)))


@pytest.mark.parametrize("case", WRONG)
def test_a_text_is_found_beside_a_mix(case: str, loaded_pack: Any) -> None:
    assert "expected its own negative beside its positive" in find_faults(replace(WRONG[case]), "mix").certain


@pytest.mark.parametrize("case", RIGHT)
def test_nothing_is_found_where_nothing_is_wrong(case: str, loaded_pack: Any) -> None:
    faults = find_faults(replace(RIGHT[case]), "mix")
    assert not faults.certain and not faults.likely


@pytest.mark.parametrize("tower, likely", [("transformer", True), ("model.visual", False)])
def test_a_checkpoint_behind_patches_is_looked_into(tower: str, likely: bool, tmp_path: Path, loaded_pack: Any,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the node has the model itself to look at."""
    save_file({f"cond_stage_model.{tower}.proj": torch.ones(2)}, tmp_path / "found.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors"}))
    graph = mixed(loader=node("CheckpointLoaderSimple", ckpt_name="found.safetensors"),
                  lora=node("LoraLoader", model=["loader", 0], clip=["loader", 1]), sampler=sampler(model=["lora", 0]))
    assert find_faults(graph, "mix").likely == (PROMPTS if likely else "")
    graph["mix"]["inputs"]["model"] = ["lora", 0]
    assert not find_faults(graph, "mix").likely


@pytest.mark.parametrize("name, wrong", [("shapes", True), ("hearts", True), ("mixer", False),
                                         ("[checkpoints] my.safetensors", False)])
def test_shipped_checkpoints_are_known_by_name(name: str, wrong: bool, loaded_pack: Any) -> None:
    graph = mixed(loader=node("MixologyDemoCheckpoint", name=name))
    assert (f"got the demo checkpoint {name}, which" in find_faults(graph, "mix").certain) == wrong


def test_our_own_layouts_noise_an_inverted_latent_as_well(loaded_pack: Any) -> None:
    graph = {"inverted": node("MixologyInvert"), "layout": node("MixologyLayoutNoise", latent=["inverted", 1]),
             "decoded": node("VAEDecode", samples=["inverted", 1]), "other": node("KSampler", latent_image=["x", 0])}
    assert find_noisers(graph, "inverted", 1) == ["layout"]
    assert find_noisers(graph, "inverted", 0) == []
