"""For those who add to the pack: a technique's skeleton works, README's table is true, the workflows can be read."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import new_technique
import pytest
import yaml
from commands import Failure

NOT_COPIED = shutil.ignore_patterns(".git", ".mixology", ".venv", "venv", "__pycache__", "*.safetensors", "pictures",
                                    "references")
PLAIN, PATCHED = "soft_focus", "held_by_a_very_firm_hand"  # as long as a name may be
CHOSEN = " or ".join((PLAIN, PATCHED, "__init__", "every_", "schemas", "contract", "loader", "english", "registry",
                      "model_classes"))  # rules for single files on those that the command writes or extends
WRITTEN = ["samplers/{0}.py", "host/{0}.py", "nodes/{0}.py", "tests/test_{0}_math.py", "tests/test_{0}_host.py",
           "bench/{0}.py"]


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A copy of this one without what is large."""
    return Path(shutil.copytree(root, tmp_path / "comfyui-mixology", ignore=NOT_COPIED))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def start(checkout: Path, kind: str, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in a checkout, with this Python and the tools that this process has."""
    packages = Path(pytest.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-s", "-c", environment.LAUNCH, str(checkout / "tools"), str(packages), kind, name,
         *arguments], cwd=checkout, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_skeletons_work_and_keep_the_house_rules(checkout: Path) -> None:
    before = contents(checkout)
    for arguments in ([PLAIN], [PATCHED, "--attention"]):
        made = start(checkout, "script", str(checkout / "tools" / "new_technique.py"), *arguments)
        assert made.returncode == 0, made.stderr
        assert "What is left to do" in made.stderr and f"tests/test_{arguments[0]}_meaning.py" in made.stderr
    after = contents(checkout)
    new = {path.format(name) for path in WRITTEN for name in (PLAIN, PATCHED)}
    new |= {f"web/docs/Mixology{title}{page}" for title in ("SoftFocus", "HeldByAVeryFirmHand")
            for page in (".md", "/zh.md")}
    new |= {f"attention_patches/{PATCHED}.py"}
    assert set(after) - set(before) == new
    extended = {name for name in before if before[name] != after[name]}
    assert extended == {
        "README.md", "nodes/__init__.py", "tests/test_house.py", "locales/zh/nodeDefs.json"}
    row = [f"`{PATCHED}`", "Held By A Very Firm Hand", *[PATCHED] * 4]
    assert f"| {' | '.join(row)} |" in after["README.md"].decode()
    linted = start(checkout, "module", "ruff", "check", "--no-cache", ".")
    assert linted.returncode == 0, linted.stdout
    tests = [f"tests/test_{name}_{kind}.py" for name in (PLAIN, PATCHED) for kind in ("math", "host")]
    tested = start(checkout, "module", "pytest", "-q", "-p", "no:xdist", "-k", CHOSEN, "tests/test_house.py",
                   "tests/test_translations.py", *tests)
    assert tested.returncode == 0, tested.stdout[-4000:]
    passed = re.search(r"(\d+) passed", tested.stdout)
    assert passed and int(passed[1]) > 80


@pytest.mark.parametrize(("name", "reason"), [
    ("Soft", "lower case letters"), ("2d", "lower case letters"), ("soft__focus", "lower case letters"),
    ("../soft", "lower case letters"), ("", "lower case letters"), ("x" * 25, "up to 24"), ("soft\n", "lower case"),
    ("lambda", "Python's or the host's"), ("random", "Python's or the host's"), ("nodes", "Python's or the host's"),
    ("layout", "there is layout"), ("layout_deep", "there is layout"), ("attention", "there is attention_merge"),
    ("masks", "there is masks"), ("expert", "web/docs/MixologyExpert.md"),
    ("timing", "bench/timing.py is there")])
def test_a_name_that_is_none_or_taken_is_refused(checkout: Path, name: str, reason: str) -> None:
    before = contents(checkout)
    with pytest.raises(Failure) as told:
        new_technique.make(checkout, name, False)
    assert reason in str(told.value) and "\n" not in str(told.value)
    assert contents(checkout) == before


@pytest.mark.parametrize("path", [path.format(PLAIN) for path in WRITTEN] + [
    f"attention_patches/{PLAIN}.py", "web/docs/MixologySoftFocus.md"])
def test_nothing_is_overwritten(checkout: Path, path: str) -> None:
    (checkout / path).write_text("mine", encoding="utf-8")
    before = contents(checkout)
    with pytest.raises(Failure, match="taken"):
        new_technique.make(checkout, PLAIN, True)
    assert contents(checkout) == before


def test_a_list_that_is_gone_is_told_before_anything_is_written(checkout: Path) -> None:
    (checkout / "nodes" / "__init__.py").write_text("", encoding="utf-8")
    before = contents(checkout)
    with pytest.raises(Failure, match=r"^__init__\.py has no .* correct tools/new_technique\.py\.$"):
        new_technique.make(checkout, PLAIN, False)
    assert contents(checkout) == before


def test_the_help_page_and_the_translations_name_what_the_node_has() -> None:
    words = {"name": PLAIN, "title": "Soft Focus", "Class": "SoftFocus", "node": "MixologySoftFocus"}
    schema = new_technique.fill("nodes", words, False)
    sockets = re.findall(r'Input\("(\w+)"', schema)
    assert sockets == ["model", "strength"]
    for language in ("en", "zh"):
        entry = json.loads(new_technique.fill(f"locale_{language}", words, False))
        again = ["\u6a21\u578b"] if language == "zh" else []  # the second key of a socket, see test_translations.py
        assert list(entry["inputs"]) == [*sockets, *again] and list(entry["outputs"]) == ["0"]
    assert all(f"| {socket} |" in new_technique.fill("help", words, False) for socket in sockets)
    assert all(socket in new_technique.fill("help_zh", words, False) for socket in sockets)


def test_the_readme_s_table_of_files_is_true(root: Path) -> None:
    written = new_technique.find(new_technique.TABLE, root / "README.md").group()
    assert written == new_technique.draw_table(root), "python3 tools/new_technique.py --table writes it anew"


@pytest.fixture(scope="module")
def workflows() -> Callable[[str], dict[str, Any]]:
    folder = Path(__file__).resolve().parent.parent / ".github" / "workflows"
    return lambda name: yaml.safe_load((folder / name).read_text(encoding="utf-8"))


def test_the_forge_runs_the_quick_tests_on_every_supported_python(root: Path, workflows: Any) -> None:
    job = workflows("tests.yml")["jobs"]["quick"]
    pythons = job["strategy"]["matrix"]["python"]
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert pythons == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project) == [
        "3.10", "3.11", "3.12", "3.13"]
    assert f'requires-python = ">={pythons[0]}"' in project
    assert "python3 tools/test.py --quick" in [step.get("run") for step in job["steps"]]


def test_every_job_is_limited_and_every_action_pinned(workflows: Any) -> None:
    for name in ("tests.yml", "publish.yml"):
        read = workflows(name)
        assert read["permissions"] == {"contents": "read"}
        for job in read["jobs"].values():
            if job.get("uses") != "./.github/workflows/tests.yml":
                assert job["timeout-minutes"] <= 60
            for step in job.get("steps", []):
                assert re.fullmatch(r"actions/[\w-]+@v\d+|[\w-]+/[\w-]+@[0-9a-f]{40}", step.get("uses", "actions/x@v1"))


@pytest.mark.skipif(sys.platform == "win32", reason="the forge's shell is bash")
@pytest.mark.parametrize(("tag", "passes"), [("v1.2.3", True), ("v1.2.30", False), ("v1x2.3", False), ("v1.2", False),
                                             ("1.2.3", True), ("v9.9.9", False)])
def test_a_tag_is_published_only_as_the_version_that_it_names(
    tmp_path: Path, workflows: Any, tag: str, passes: bool,
) -> None:
    jobs = workflows("publish.yml")["jobs"]
    assert jobs["tests"]["needs"] == "version" and jobs["publish"]["needs"] == "tests"
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n', encoding="utf-8")
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n## [1.2.3] - 2027-01-01\n", encoding="utf-8")
    script = jobs["version"]["steps"][-1]["run"]

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
                              env={**os.environ, "GITHUB_REF_NAME": tag})

    assert (check().returncode == 0) == passes
    (tmp_path / "CHANGELOG.md").write_text("## [1.2.2] - 2026-01-01\n", encoding="utf-8")
    told = check()
    assert told.returncode == 1 and ("says nothing of 1.2.3" in told.stdout) == passes


def test_the_changelog_has_a_dated_section_for_each_version(root: Path) -> None:
    heads = re.findall(r"^## (.*)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - 20\d\d-\d\d-\d\d", head) for head in heads[1:])


def test_what_only_contributors_need_stays_out_of_the_archive(root: Path) -> None:
    left_out = set((root / ".comfyignore").read_text(encoding="utf-8").split())
    assert left_out >= {".ci/", ".github/", ".mixology/", "bench/", "tests/", "tools/", "demo/train*.py",
                        "CONTRIBUTING.md"}


def test_contributing_names_files_that_are_there(root: Path) -> None:
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = {path.name for path in root.iterdir() if path.is_dir()} - {".mixology"}
    paths = [path for path in re.findall(r"`([\w.-]+/[\w./-]*)`", text) if path.split("/")[0] in folders]
    named = [path for path in paths if not re.search("NAME|NODE", path)]
    missing = [path for path in named if not (root / path).exists()]
    assert len(named) > 20 and not missing, f"CONTRIBUTING.md names {missing}"
