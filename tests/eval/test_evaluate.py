"""What an evaluation may change of the configuration that was trained."""

import pytest
from omegaconf import OmegaConf

from seqzoo.config.compose import compose
from seqzoo.errors import ConfigError
from seqzoo.eval.evaluate import changed, file_name


@pytest.fixture(scope="module")
def trained():
    words = ["data=mqar", "task=masked_answers", "model=mega_small"]
    return OmegaConf.to_container(compose(words), resolve=True)


def test_chunks_of_a_mixer_may_reach_further(trained):
    found = changed(trained, ["model.mixers.mega.chunk_size=64", "data.seq_len=128"])
    assert found["model"]["mixers"]["mega"]["chunk_size"] == 64 and found["data"]["seq_len"] == 128
    assert trained["model"]["mixers"]["mega"]["chunk_size"] == 32


@pytest.mark.parametrize(
    "word", ["model.mixers.mega.z_dim=8", "model.d_model=8", "model.resample=2"]
)
def test_what_parameters_depend_on_may_not(trained, word):
    with pytest.raises(ConfigError, match="belongs to what was trained.*of mixers resample, chunk"):
        changed(trained, [word])


def test_long_evaluations_have_files_of_their_own():
    names = {file_name("test", [f"data.path={'x' * 300}", f"data.seed={i}"]) for i in range(3)}
    assert len(names) == 3 and max(map(len, names)) < 200
    assert file_name("test", ["data.seq_len=256"]) == "eval-test-data.seq_len_256.json"
