"""/ui without a browser: its headers, its switch, and that its form has what requests take."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fakes import FakePolicy, FakeScorer, ToyLM
from servers import serving

from prm_search.serving.app import make_app
from prm_search.serving.backend import ThreadEngine
from prm_search.serving.config import ServeConfig
from prm_search.serving.limits import Limits
from prm_search.serving.request import make_ask
from prm_search.serving.schema import parse
from prm_search.serving.strategy_fields import strategy_options
from prm_search.steps import StepRule
from prm_search.strategies import STRATEGIES


class Letters:
    special = frozenset([256])

    @staticmethod
    def piece(token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


def get(**options: Any) -> tuple[int, dict[str, str], bytes]:
    app = make_app(lambda: ThreadEngine(FakePolicy(ToyLM("ab;")), FakeScorer(), Letters()), ["m"], **options)  # type: ignore[arg-type]
    with serving(app) as served:
        return served.send("/ui", method="GET")


def test_the_page_may_ask_its_own_server_alone_and_stands_in_no_frame() -> None:
    status, headers, body = get()
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert b'data-kind="live"' in body


def test_the_page_is_told_without_a_key_and_holds_no_models_name() -> None:
    status, _, body = get(api_keys=["k"])
    assert status == 200
    (data,) = re.findall(rb'id="data">(.*?)</script>', body, re.DOTALL)
    assert set(json.loads(data)) == {"version", "chat", "strategies", "values", "selects", "answers"}


def test_the_page_can_be_switched_off() -> None:
    assert get(ui=False)[0] == 404
    assert ServeConfig.of({"pair": "demo", "ui": False}).ui is False
    assert ServeConfig.of(json.loads(ServeConfig(pair="demo", ui=False).json())).ui is False
    with pytest.raises(ValueError, match="ui"):
        ServeConfig.of({"pair": "demo", "ui": "no"})


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_option_of_the_form_is_one_of_the_request(name: str) -> None:
    options = {option: default for option, _, default in strategy_options(name) if default is not None}
    guidance = {"strategy": name, **options}
    body = json.dumps({"prompt": "p", "max_tokens": 8, "prm_guidance": guidance}).encode()
    ask = make_ask(parse("text", body), Limits(), steps=StepRule())
    assert ask.guided
