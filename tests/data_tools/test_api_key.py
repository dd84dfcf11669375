"""An API key from the environment: sent without what a file's line ends add to it, named in no message."""

import pytest

from fasttrain_data.annotations.judge import endpoint_from_environment
from fasttrain_data.calls.dispatch import CallLimits
from fasttrain_data.completions.samples import SampleSettings
from fasttrain_data.completions.server import ServerSampler
from fasttrain_data.errors import UserError


def gemini_key():
    return endpoint_from_environment(None, None, 1.0).api_key


def chat_key():
    return ServerSampler("http://127.0.0.1:1", SampleSettings(model="m"), CallLimits())._key


def answering_key():
    from fasttrain.answering.server import ServerModel

    model = ServerModel("http://127.0.0.1:1", "m", CallLimits())
    model.close()
    return model._key


def judging_key():
    from fasttrain.evaluate.judging.clients import OpenAIClient
    from fasttrain.evaluate.judging.options import JudgeOptions

    client = OpenAIClient(JudgeOptions(model="m", api="openai", base_url="http://127.0.0.1:1"))
    client.close()
    return client._key


READERS = [gemini_key, chat_key, answering_key, judging_key]


@pytest.fixture
def set_key(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path))

    def set_all(key):
        for variable in ("GEMINI_API_KEY", "OPENAI_API_KEY"):
            monkeypatch.setenv(variable, key)

    return set_all


@pytest.mark.parametrize("read", READERS)
def test_line_ends_around_a_key_are_no_part_of_it(read, set_key):
    set_key(" SECRET\r\n")
    assert read() == "SECRET"


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("key", ["SEC\rRET", "SEC\x7fRET", "SECR\u00c9T", "SEC\u200bRET"])
def test_a_key_that_no_header_takes_is_refused_without_being_named(read, key, set_key):
    set_key(key)
    with pytest.raises(UserError, match="_API_KEY") as told:
        read()
    assert "SEC" not in str(told.value)


def test_an_empty_variable_leaves_the_key_to_the_next(monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "\r\n")
    monkeypatch.setenv("GOOGLE_API_KEY", "OTHER")
    assert gemini_key() == "OTHER"
