"""`prm-search serve`: its start and its end, keys, and what it says of bad input."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from servers import command, serving

from prm_search.cli import main
from prm_search.serving.config import ServeConfig
from prm_search.serving.limits import Limits
from prm_search.serving.run import claim, listen
from prm_search.serving.vllm_command import vllm_command
from prm_search.steps import StepRule

DEMO = ["--policy", "demo", "--pair", "demo"]
PROMPT = "=5a*7b+3c*9d+8?"
GUIDED: dict[str, Any] = {"prm_guidance": {"width": 2, "expansions": 2}}


# With many searches under way it stands still, until it is told to end; its clients may take their time to read that.
STANDS_STILL = """
import threading
from prm_search.policies.hf import HFPolicy
from prm_search.serving import run, service
service.GRACE = run.GRACE = 600.0
ended, trees = threading.Event(), set()
submit, advance, drain = HFPolicy.submit, HFPolicy.advance, service.Service.drain
def watched(policy, requests):
    trees.update(id(request.node.tree) for request in requests)
    submit(policy, requests)
def stands_still(policy):
    if len(trees) > 40:
        ended.wait()
    return advance(policy)
async def ends(service):
    ended.set()
    await drain(service)
HFPolicy.submit, HFPolicy.advance, service.Service.drain = watched, stands_still, ends
"""


def test_killed_and_started_again_and_stopped_in_the_middle_of_a_stream() -> None:
    with command(*DEMO, "--port", "0", "--api-key", "opensesame") as (process, served):
        ask = {"model": "demo", "prompt": PROMPT, "max_tokens": 60, "seed": 1}
        client = served.client(api_key="opensesame")
        before = client.completions.create(**ask, extra_body=GUIDED)
        for headers in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "Basic opensesame"}):
            status, said, body = served.send("/v1/completions", ask, headers)
            assert (status, said["www-authenticate"]) == (401, "Bearer")
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert served.send("/health", method="GET")[0] == 200
        assert served.metric("prm_search_requests_total", outcome="unauthorized", route="text") == 3
        process.kill()
        process.wait()
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(**ask)
    with command(*DEMO, "--port", "0", code=STANDS_STILL) as (process, served):
        again = served.client().completions.create(**ask, extra_body=GUIDED)
        assert again.choices[0].text == before.choices[0].text
        connection = http.client.HTTPConnection(served.host, served.port)
        slow = {"prompt": [PROMPT] * 50, "max_tokens": 100, "stream": True, "temperature": 2, "n": 20}
        connection.request("POST", "/v1/completions", json.dumps(slow))
        answer = connection.getresponse()
        process.send_signal(signal.SIGINT)
        events = answer.read().decode().strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
        _, said = process.communicate()
        assert process.returncode == 0
        assert said == "prm-search: stopped\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "demo"], "--pair"),
        ([*DEMO, "--engine", "tgi"], "--engine 'tgi'"),
        ([*DEMO, "--port", "70000"], "--port 70000"),
        ([*DEMO, "--max-searches", "0"], "--max-searches 0"),
        ([*DEMO, "--timeout", "0"], "--timeout 0"),
        ([*DEMO, "--", "--enforce-eager"], "--enforce-eager"),
        ([*DEMO, "--host", "256.0.0.1"], "256.0.0.1"),
        ([*DEMO, "--api-key", ""], "--api-key"),
        ([*DEMO, "--api-key", "two words"], "--api-key"),
        ([*DEMO, "--api-key", "", "--engine", "vllm"], "--api-key"),
        (["--policy", "./none", "--pair", "demo", "--port", "0"], "none"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for engine in ("hf", "vllm"):
            assert main(["serve", *DEMO, "--port", str(port), "--engine", engine]) == 2
            error = capsys.readouterr().err
            assert f"127.0.0.1:{port}" in error
            assert error.count("\n") == 1


def test_an_empty_key_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRM_SEARCH_API_KEY", "")
    assert main(["serve", *DEMO, "--port", "0"]) == 2
    assert "$PRM_SEARCH_API_KEY: an empty API key would let everybody in" in capsys.readouterr().err


def test_of_two_servers_on_one_port_the_second_gives_up_before_it_loads(capsys: pytest.CaptureFixture[str]) -> None:
    """The first has not begun to accept: its models are still loaded."""
    first = listen("127.0.0.1", 0)
    try:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port} cannot be listened at"):
            listen("127.0.0.1", port)
        for engine in ("hf", "vllm"):
            assert main(["serve", "--policy", "./none", "--pair", "demo", "--port", str(port), "--engine", engine]) == 2
            assert f"127.0.0.1:{port} cannot be listened at" in capsys.readouterr().err
    finally:
        first.close()


def test_a_client_that_comes_while_models_load_waits_for_its_answer() -> None:
    app = FastAPI()

    @app.get("/health")
    async def health() -> str:
        return "well"

    sock = listen("127.0.0.1", 0)
    connection = http.client.HTTPConnection("127.0.0.1", sock.getsockname()[1])
    connection.request("GET", "/health")  # is taken, though nobody accepts it yet
    with serving(app, sock):
        assert connection.getresponse().read() == b'"well"'
    connection.close()


@pytest.mark.skipif(sys.platform != "linux", reason="claims are names in Linux's abstract namespace")
def test_a_claim_lasts_as_long_as_the_program_that_holds_it() -> None:
    """Behind vLLM the port is opened by vLLM, when its models are loaded."""
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    claimed = claim("127.0.0.1", port)
    assert claimed is not None
    hold = [sys.executable, "-c", "input()"]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, pass_fds=[claimed.fileno()]) as replaced:
        assert claimed.get_inheritable()
        claimed.close()
        with pytest.raises(OSError, match=f"127.0.0.1:{port} cannot be listened at: another server loads its models"):
            claim("127.0.0.1", port)
        replaced.communicate(b"\n")
    again = claim("127.0.0.1", port)
    assert again is not None
    again.close()


# -- what vLLM's server is started with -------------------------------------------------------------------------------


def test_the_configuration_goes_through_the_environment_as_it_is() -> None:
    config = ServeConfig(
        prm="p", reference="r", beta=0.1, dtype="float32", steps=StepRule(delimiter=("a", ";"), max_tokens=None),
        limits=Limits(searches=3, seconds=1.5),
    )  # fmt: skip
    assert ServeConfig.find({"PRM_SEARCH_SERVE": config.json()}, None) == config
    section = {"prm_search_serve": json.loads(config.json()), "prm_search": {"model": "other"}}
    assert ServeConfig.find({}, section) == config
    for given, said in (
        (None, "missing"), ({}, "missing"), ({"prm_search_serve": {}}, "one of pair and prm"),
        ({"prm_search_serve": {"pair": "a", "prm": "b"}}, "one of pair and prm"),
        ({"prm_search_serve": {"pair": "a", "limits": {"search": 1}}}, "limits.search is unknown"),
        ({"prm_search_serve": {"pair": "a", "limits": {"searches": 0}}}, "searches=0"),
        ({"prm_search_serve": {"pair": "a", "steps": {"max_tokens": 0}}}, "max_tokens=0"),
        ({"prm_search_serve": {"pair": "a", "bta": 1}}, "bta is unknown"),
        ({"prm_search_serve": {"pair": "a", "steps": 4}}, "steps. must be an object"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            ServeConfig.find({}, given)


def test_the_command_for_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prm_search.serving.vllm_command.find_spec", lambda name: name)
    config = ServeConfig(pair="demo", dtype="float32")
    options: dict[str, Any] = {"host": "127.0.0.1", "port": 5, "name": "m", "api_key": "secret"}
    words, environment = vllm_command(
        "model", config, **options, extra=["--max-model-len", "64"], environment={"A": "1"}
    )
    assert words[0] == sys.executable
    assert words[-2:] == ["--max-model-len", "64"]
    assert "secret" not in " ".join(words)
    assert environment["VLLM_API_KEY"] == "secret"
    assert environment["A"] == "1"
    assert environment["VLLM_PLUGINS"].split(",")[-1] == "prm_search"
    assert ServeConfig.find(environment, None) == config
    with pytest.raises(ValueError, match=r"--api-key: .*outside ASCII"):
        vllm_command("model", config, **options | {"api_key": "schlüssel"}, extra=[])
    _, environment = vllm_command("model", config, **options, extra=[], environment={"VLLM_PLUGINS": "x,prm_search"})
    assert environment["VLLM_PLUGINS"] == "x,prm_search"


@pytest.mark.parametrize("word", ["--api-server-count=2", "--headless"])
def test_several_api_servers_are_of_vllms_own_command(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """vLLM's server module would take the word, and start one server all the same."""
    options: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "name": "tiny", "api_key": None, "environment": {}}
    monkeypatch.setattr("prm_search.serving.vllm_command.find_spec", lambda name: name)
    monkeypatch.setattr("prm_search.serving.vllm_command.version", lambda name: "0.32.0")
    words, _ = vllm_command("model", ServeConfig(pair="demo"), **options, extra=[word])
    assert words[2:6] == ["-m", "vllm.entrypoints.cli.main", "serve", "model"]
    assert words[-1] == word

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("prm_search.serving.vllm_command.version", missing)
    with pytest.raises(ImportError, match=rf"^{word} needs the package vllm itself"):
        vllm_command("model", ServeConfig(pair="demo"), **options, extra=[word])


def test_the_plugin_is_an_entry_point() -> None:
    (point,) = entry_points(group="vllm.endpoint_plugins", name="prm_search")
    plugin = point.load()()
    assert plugin.name == "prm_search"
    assert plugin.required_tasks == ("generate",)
