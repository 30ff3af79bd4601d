"""`prm-search serve`: its start and its end, keys, and what it says of bad input."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sys
from importlib.metadata import entry_points
from typing import Any

import openai
import pytest
from servers import SECONDS, command

from prm_search.cli import main
from prm_search.serving.config import ServeConfig
from prm_search.serving.request import Limits
from prm_search.serving.vllm_command import vllm_command
from prm_search.steps import StepRule

DEMO = ["--policy", "demo", "--pair", "demo"]
PROMPT = "=5a*7b+3c*9d+8?"
GUIDED: dict[str, Any] = {"prm_guidance": {"width": 2, "expansions": 2}}


def test_killed_and_started_again_and_stopped_in_the_middle_of_a_stream() -> None:
    with command(*DEMO, "--port", "0", "--api-key", "opensesame") as (process, served):
        port, ask = str(served.port), {"model": "demo", "prompt": PROMPT, "max_tokens": 60, "seed": 1}
        client = served.client(api_key="opensesame")
        before = client.completions.create(**ask, extra_body=GUIDED)
        for headers in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "Basic opensesame"}):
            status, said, body = served.send("/v1/completions", ask, headers)
            assert (status, said["www-authenticate"]) == (401, "Bearer")
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert served.send("/health", method="GET")[0] == 200
        assert served.metric("prm_search_requests_total", outcome="unauthorized", route="text") == 3
        process.kill()
        process.wait(SECONDS)
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(**ask)
    with command(*DEMO, "--port", port) as (process, served):
        again = served.client().completions.create(**ask, extra_body=GUIDED)
        assert again.choices[0].text == before.choices[0].text
        connection = http.client.HTTPConnection(served.host, served.port, timeout=SECONDS)
        # A hundred independent answers of up to a hundred tokens, so that the signal comes in the middle of them.
        slow = {"prompt": [PROMPT] * 50, "max_tokens": 100, "stream": True, "temperature": 2, "n": 20}
        connection.request("POST", "/v1/completions", json.dumps(slow))
        answer = connection.getresponse()
        process.send_signal(signal.SIGINT)
        events = answer.read().decode().strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
        _, said = process.communicate(timeout=SECONDS)
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
    _, environment = vllm_command("model", config, **options, extra=[], environment={"VLLM_PLUGINS": "x,prm_search"})
    assert environment["VLLM_PLUGINS"] == "x,prm_search"


def test_the_plugin_is_an_entry_point() -> None:
    (point,) = entry_points(group="vllm.endpoint_plugins", name="prm_search")
    plugin = point.load()()
    assert plugin.name == "prm_search"
    assert plugin.required_tasks == ("generate",)
