"""docs/keys.md is what the constructors say; names of other frameworks lead to keys that exist."""

import pathlib

import pytest

from seqzoo.config import foreign, keys, paths, schema
from seqzoo.config.compose import compose
from seqzoo.errors import ConfigError

PAGE = pathlib.Path(__file__).parents[2] / "docs/keys.md"


def test_the_page_is_up_to_date():
    """Run `python -m seqzoo.config.keys > docs/keys.md` after a docstring or a config changed."""
    assert PAGE.read_text(encoding="utf-8") == keys.document()


def test_every_file_and_every_key_is_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    for group in keys.GROUPS:
        for name in paths.options(group, [paths.shipped()]):
            assert f"`{group}={name}`" in page
    config = compose(["model.pattern=[mamba,attention]", "model.channel_mixer=swiglu"])
    for key in schema.valid_keys(config):
        if "." in key:
            assert f"`{key}`" in page, key


def test_every_key_says_what_it_means():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    table = [row for row in rows if row.replace("\\|", "").count("|") == 5]
    silent = [row.split("`")[1] for row in table if row.rstrip("| ").endswith("`")]
    assert len(table) > 100 and not silent


def test_foreign_names_lead_to_keys_that_exist():
    page = PAGE.read_text(encoding="utf-8")
    missing = [ours for ours in foreign.NAMES if f"| `{ours}` | " not in page.split("## Names")[0]]
    assert not missing


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("optimizer.learning_rate=1e-3", "optimizer.lr"),
        ("model.hidden_size=64", "model.d_model"),
        ("trainer.batch_size=8", "trainer.global_batch_size"),
        ("data.max_seq_len=8", "data.seq_len"),
        ("max_steps=10", "trainer.steps"),
    ],
)
def test_a_foreign_key_is_answered_with_ours(theirs, ours):
    with pytest.raises(ConfigError, match=f"seqzoo calls it '{ours}'"):
        compose([theirs])
