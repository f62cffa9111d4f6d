"""Starts a real ComfyUI, posts prompts to it, follows them and brings back what they made.

Runs under the host's own Python (see `Host.start`): aiohttp comes with every ComfyUI.
"""
from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import environment
from commands import LOGS, WORK, Failure, diagnose

Prompt = Mapping[str, Mapping[str, Any]]
START_SECONDS = 900.0  # a crowded laptop's first start compiles every file of the host
STOP_SECONDS = 15.0
SPIN_COUNT = "1000"  # threads wait for one another briefly: as fast alone, ten times as fast beside other load


@dataclass(frozen=True)
class Event:
    """One message of the host's websocket: `data` is JSON's, or bytes for a preview picture."""

    kind: str
    data: Any


@dataclass
class Run:
    """What a prompt made: per node id, the pictures as files' bytes and the other outputs as the host lists them."""

    prompt_id: str
    status: str = "success"  # or "interrupted"
    seconds: float = 0.0
    images: dict[str, list[bytes]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)


class Server:
    """A running ComfyUI; a context manager that always ends it."""

    def __init__(self, host: environment.Host, port: int | None = None, paths_file: Path | None = None,
                 arguments: Sequence[str] = (), name: str = "server",
                 variables: Mapping[str, str] | None = None) -> None:
        self.host = host
        self.port = port or 0
        self.log = LOGS / f"{name}.log"
        self._fixed_port = port is not None
        self._name = name
        self._paths_file = paths_file
        self._arguments = list(arguments)
        self._variables = dict(variables or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> bytes:
        """The body that the server answers; a Failure where it answers with an error."""
        return self._request(path)

    def get_json(self, path: str) -> Any:
        return json.loads(self._request(path))

    def object_info(self) -> dict[str, Any]:
        """Every node's definition, as the GUI reads it."""
        return dict(self.get_json("/object_info"))

    def post(self, prompt: Prompt, on_event: Callable[[Event], None] | None = None, seconds: float = 3600.0) -> Run:
        """Runs an API-format prompt to its end; a node's error becomes a Failure with its words."""
        return asyncio.run(self._follow(prompt, on_event or (lambda event: None), seconds))

    def interrupt(self) -> None:
        """Asks the server to stop the prompt that runs."""
        self._request("/interrupt", b"{}")

    def stop(self) -> None:
        """Ends the server: politely, then firmly."""
        process, self._process = self._process, None
        if process is None:
            return
        politely = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)
        deaf = os.name != "nt" and signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a shell's background
        ends = [process.terminate, process.kill]
        for end in ends if deaf else [lambda: process.send_signal(politely), *ends]:
            if process.poll() is None:
                end()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    continue

    def wait(self) -> int:
        """Blocks until the server ends by itself."""
        return self._process.wait() if self._process else 0

    def last_line(self) -> str:
        """The log's last telling line."""
        try:
            return diagnose(self.log.read_text(encoding="utf-8", errors="replace")[-20000:])
        except OSError:
            return "it wrote no log"

    def _start(self) -> None:
        if self._fixed_port and not _is_free(self.port):
            raise Failure(f"Port {self.port} is taken by another program: choose another one with --port.")
        for _attempt in range(3):
            self.port = self.port if self._fixed_port else _free_port()
            self._launch()
            if self._wait_until_ready():
                return
            self._process = None
            if "address already in use" not in self.last_line().lower():
                break
        raise Failure(f"ComfyUI {self.host.version} did not start: {self.last_line()}. (Log: {self.log})")

    def _launch(self) -> None:
        data = WORK / "data" / self._name
        for folder in ("user", "input", "output", "temp"):
            (data / folder).mkdir(parents=True, exist_ok=True)
        LOGS.mkdir(parents=True, exist_ok=True)
        command = [self.host.python, "-s", self.host.path / "main.py", "--listen", "127.0.0.1", "--port", self.port,
                   "--disable-auto-launch", "--user-directory", data / "user", "--input-directory", data / "input",
                   "--output-directory", data / "output", "--temp-directory", data,
                   "--database-url", f"sqlite:///{(data / 'user' / 'comfyui.db').as_posix()}"]
        if not _has_gpu():
            command.append("--cpu")
        if self._paths_file is not None:
            command += ["--extra-model-paths-config", self._paths_file]
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MIXOLOGY_HOST")}
        if "OMP_WAIT_POLICY" not in env:
            env.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        env.update({"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **self._variables})
        if not self.host.ours:
            env["PYTHONDONTWRITEBYTECODE"] = "1"
        group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen([str(word) for word in [*command, *self._arguments]],
                                             cwd=self.host.path, env=env, stdin=subprocess.DEVNULL, stdout=log,
                                             stderr=subprocess.STDOUT, creationflags=group,
                                             start_new_session=os.name != "nt")  # Ctrl-C is ours to pass on

    def _wait_until_ready(self) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                return False
            try:
                self._request("/system_stats")
                return True
            except Failure:
                time.sleep(0.3)
        last = self.last_line()
        self.stop()
        raise Failure(f"ComfyUI {self.host.version} was not ready after {START_SECONDS:.0f} seconds: "
                      f"{last}. (Log: {self.log})")

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        try:
            with opener.open(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            detail = error.read().decode("utf-8", "replace")
            raise Failure(f"{path.partition('?')[0]} answered {error.code}: {_complaint(detail)}") from error
        except OSError as error:
            raise Failure(f"The server does not answer: {self.last_line()}. (Log: {self.log})") from error

    async def _follow(self, prompt: Prompt, on_event: Callable[[Event], None], seconds: float) -> Run:
        import aiohttp

        client = uuid.uuid4().hex
        socket_address = f"ws://127.0.0.1:{self.port}/ws?clientId={client}"
        started = time.monotonic()
        async with aiohttp.ClientSession() as session, \
                session.ws_connect(socket_address, max_msg_size=0, heartbeat=None) as feed:
            body = json.dumps({"prompt": prompt, "client_id": client}).encode()
            run = Run(str(json.loads(await asyncio.to_thread(self._request, "/prompt", body))["prompt_id"]))
            trouble: Mapping[str, Any] | None = None
            while True:
                left = seconds - (time.monotonic() - started)
                if left <= 0:
                    raise Failure(f"The prompt did not end within {seconds:.0f} seconds.")
                try:
                    message = await feed.receive(timeout=left)
                except asyncio.TimeoutError:
                    continue
                if message.type == aiohttp.WSMsgType.BINARY:
                    on_event(Event("preview", message.data))
                    continue
                if message.type != aiohttp.WSMsgType.TEXT:
                    raise Failure(f"The server went away: {self.last_line()}. (Log: {self.log})")
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id", run.prompt_id) != run.prompt_id:
                    continue
                if kind == "execution_error":
                    trouble = data
                elif kind == "execution_interrupted":
                    run.status = "interrupted"
                on_event(Event(kind, data))
                if kind == "executing" and data.get("node") is None and data.get("prompt_id") == run.prompt_id:
                    break  # sent after the history is written
        run.seconds = time.monotonic() - started
        if trouble is not None:
            raise Failure(f"{trouble.get('node_type')}: {str(trouble.get('exception_message')).strip()}")
        self._collect(run)
        return run

    def _collect(self, run: Run) -> None:
        history = self.get_json(f"/history/{run.prompt_id}").get(run.prompt_id, {})
        run.outputs = history.get("outputs", {})
        for node, output in run.outputs.items():
            for picture in output.get("images", ()):
                query = urllib.parse.urlencode({key: picture[key] for key in ("filename", "subfolder", "type")})
                run.images.setdefault(node, []).append(self.get(f"/view?{query}"))


def _complaint(detail: str) -> str:
    """The words of the host's answer to a prompt that it refuses."""
    try:
        answer = json.loads(detail)
        words = [str(answer["error"]["message"])]
        for node in answer.get("node_errors", {}).values():
            words += [f"{node['class_type']}: {error['message']} ({error['details']})" for error in node["errors"]]
        return "; ".join(words)
    except (ValueError, KeyError, TypeError):
        return re.sub(r"\s+", " ", detail)[:300] or "no reason given."


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available() or torch.backends.mps.is_available()
                or (hasattr(torch, "xpu") and torch.xpu.is_available()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
