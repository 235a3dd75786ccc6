"""A million tokens in bounded memory, by the script beside this file."""

import importlib.util
import pathlib

import pytest


@pytest.fixture(scope="module")
def streams():
    place = pathlib.Path(__file__).with_name("long_streams.py")
    spec = importlib.util.spec_from_file_location("long_streams", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["mamba", "gated_deltanet", "lssl", "titans_lmm"])
def test_a_million_tokens(streams, tmp_path, mixer):
    run = streams.train(mixer, tmp_path)
    whole, parts = streams.read(run, streams.WHOLE, None), streams.read(run, streams.WHOLE, 1000)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert streams.read(run, 2**20, 4096).peak_bytes < streams.MOST_BYTES
