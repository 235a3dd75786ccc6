"""Words of a sweep: what they mean, and where the caret stands when they mean nothing."""

import pytest

from seqzoo.errors import ConfigError
from seqzoo.sweep import grammar


@pytest.mark.parametrize(
    ("word", "spot", "why"),
    [
        ("optimizer.lr=tag(log,interval(1e-4,1e-2)", "", "the word ends here"),
        ("optimizer.lr=tag(log,interval(1e-4 1e-2))", "interval(1e-4 1e-2))", "'end'"),
        ("optimizer.lr=interval(1,)", ")", "not understood"),
        ("optimizer.lr=chioce(1,2)", "chioce(1,2)", "Unknown function"),
        ("optimizer.lr=interval(a,b)", "interval(a,b)", "incompatible"),
        ("optimizer.lr", "", "KEY=VALUE"),
        ("optimizer.b1=0.8,0.9 if optimizer", "", "KEY=VALUE"),
        ("optimizer.b1=0.8,0.9 if optimizer=choice(adamw", "", "the word ends here"),
        ("optimizer.b1=0.8 if a=1 if b=2", "if b=2", "one condition"),
        ("optimizer.b1=0.8,0.9 if a=interval(0,1)", "a=interval(0,1)", "lists values"),
    ],
)
def test_a_caret_stands_under_the_spot(word, spot, why):
    with pytest.raises(ConfigError) as caught:
        grammar.read(word)
    _, shown, under, *_ = str(caught.value).splitlines()
    assert shown == f"  {word}"
    place = under.index("^") - 2
    assert word[place:] == spot
    assert why in under


def test_a_condition_is_cut_off_before_hydra_reads():
    word = grammar.read("optimizer.weight_decay=0,0.1  if  optimizer=adamw,lion")
    assert word.setting == "optimizer.weight_decay"
    assert str(word.when) == "optimizer=adamw,lion"
    assert grammar.element_texts(word.override) == ("0", "0.1")


def test_a_leading_plus_stays_with_the_key():
    word = grammar.read("+model.mixers.mine.x=1,2")
    assert word.key == "+model.mixers.mine.x" and word.setting == "model.mixers.mine.x"


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/me")
    assert grammar.read("data.path=~/books").override.value() == "/homes/me/books"
