"""Spaces: what is drawn, what depends on what, and what is refused."""

import pytest

from seqzoo.errors import ConfigError
from seqzoo.sweep.settings import split
from seqzoo.sweep.space import Space

LOG = "optimizer.lr=tag(log,interval(1e-4,1e-2))"


def test_a_grid_is_every_combination_in_typed_order():
    space = Space(["trainer.steps=5", "data.seed=range(0,4,2)", "optimizer.lr=1e-3,3e-3"])
    points = space.grid()
    assert [tuple(point.values()) for point in points] == [
        (0, "0.001"),
        (0, "0.003"),
        (2, "0.001"),
        (2, "0.003"),
    ]
    assert space.words(points[1]) == ["data.seed=0", "optimizer.lr=0.003", "trainer.steps=5"]


def test_a_mixer_is_the_pattern_and_its_settings_count_with_it_alone():
    space = Space(
        [
            "mixer=mamba,based",
            "model.mixers.mamba.d_state=8,16",
            "model.mixers.based.feature_dim=4",
        ]
    )
    words = [space.words(point) for point in space.grid()]
    assert words == [
        ["model.pattern=[mamba]", "model.mixers.mamba.d_state=8"],
        ["model.pattern=[mamba]", "model.mixers.mamba.d_state=16"],
        ["model.pattern=[based]", "model.mixers.based.feature_dim=4"],
    ]
    space.check()


def test_conditions():
    space = Space(
        [
            "optimizer=adamw,lion",
            "optimizer.lr=1e-3,1e-2 if optimizer=adamw",
            "optimizer.lr=tag(log,interval(1e-5,1e-4)) if optimizer=lion",
            "optimizer.weight_decay=0.3 if optimizer=lion",
        ]
    )
    for point in space.random(0, 12):
        words = space.words(point)
        if point["optimizer"] == "adamw":
            assert point["optimizer.lr if optimizer=adamw"] in ("0.001", "0.01")
            assert len(words) == 2
        else:
            assert 1e-5 <= point["optimizer.lr if optimizer=lion"] <= 1e-4
            assert words[-1] == "optimizer.weight_decay=0.3"
    space.check()


def test_random_points_are_a_function_of_seed_and_number_and_none_comes_twice():
    space = Space([LOG, "data.seed=int(interval(0,9))", "optimizer.b1=interval(0.8,0.9)"])
    long, short = space.random(3, 8), space.random(3, 5)
    assert long[:5] == short and space.random(4, 5) != short
    for point in long:
        assert 1e-4 <= point["optimizer.lr"] <= 1e-2
        assert isinstance(point["data.seed"], int) and 0 <= point["data.seed"] <= 9
        # What is written on the command line is the very number.
        told = space.words(point)[0].partition("=")[2]
        assert float(told) == point["optimizer.lr"]
    finite = Space(["optimizer.lr=1e-3,3e-3", "data.seed=0,1,2"])
    points = finite.random(0, 6)
    assert len({tuple(point.values()) for point in points}) == 6
    with pytest.raises(ConfigError, match="no more than 6 points"):
        finite.random(0, 7)


def test_more_parameters_leave_the_draws_of_others_alone():
    one = Space([LOG]).random(0, 3)
    two = Space([LOG, "data.seed=int(interval(0,99))"]).random(0, 3)
    assert [point["optimizer.lr"] for point in one] == [point["optimizer.lr"] for point in two]


def test_whole_numbers_in_log_space_reach_both_ends():
    space = Space(["model.d_model=tag(log,int(interval(1,4)))"])
    drawn = [space.parameters[0].draw(rng) for rng in map(_generator, range(200))]
    assert set(drawn) == {1, 2, 3, 4}


def _generator(seed):
    import numpy as np

    return np.random.default_rng(seed)


def test_glob_takes_the_files_of_a_group():
    space = Space(["schedule=glob(*)"])
    assert {"constant", "cosine", "wsd"} <= set(space.parameters[0].values)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["optimizer.lr=interval(1e-2,1e-4)"], "there is nothing"),
        (["optimizer.lr=tag(log,interval(0,1))"], "above 0"),
        (["optimizer.lr=tag(lgo,interval(0,1))"], "mean 'log'"),
        (["optimizer.lr=tag(log,choice(1,2))"], "tags belong to interval"),
        (["optimizer.lr=1e-3,0.001"], "twice"),
        (["optimizer.lr=shuffle(1,2)"], "shuffle"),
        (["optimizer.lr=range(3,1)"], "there is nothing"),
        (["optimizer.lr=1,2", "optimizer.lr=3,4"], "searched twice"),
        (["optimizer.b1=0.8,0.9 if mixer=mamba"], "no word of this sweep sets 'mixer'"),
        (["mixer=mamba,based", "optimizer.b1=0.8,0.9 if mixer=mambo"], "mean 'mamba'"),
        (["optimizer.b1=0.8,0.9 if data.seed=1", "data.seed=0,1"], "must be typed before"),
    ],
)
def test_what_a_space_refuses(words, why):
    with pytest.raises(ConfigError, match=why):
        Space(words)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["mixer=mamba,basd"], "mean 'based'"),
        (["optimizer.learning_rate=1,2"], "calls it 'optimizer.lr'"),
        (["mixer=mamba,based", "model.mixers.mom.n_heads=1,2"], "counts in no trial"),
        (["trainer.steps=10,many"], "must be int"),
        (["optimizer.lr=1e-3,-1"], r"optimizer.lr=-1.0; it must be above 0"),
        (["trainer.precision=high,hihg"], "trainer.precision=hihg; allowed: default, high"),
        (["data.seed=0,1", "trainer.grad_accum_steps=3"], "no multiple of trainer.grad_accum"),
        (
            ["optimizer=adamw,lion", "optimizer.b2=0.9,2 if optimizer=lion"],
            "optimizer.b2=2",
        ),
    ],
)
def test_what_no_run_could_take_is_found_before_anything_runs(words, why):
    with pytest.raises(ConfigError, match=why):
        Space(words).check()


def test_a_grid_refuses_what_cannot_be_counted():
    with pytest.raises(ConfigError, match="needs values that can be counted") as caught:
        Space([LOG]).grid()
    assert "^" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["sweep.sampler=tep"], "sweep.sampler=tep; did you mean 'tpe'"),
        (["sweep.pruner=halfing"], "mean 'halving'"),
        (["sweep.n_trial=3"], "mean 'sweep.n_trials'"),
        (["sweep=gird"], "mean 'grid'"),
        (["sweep.name='../../evil x'"], r"sweep.name=../../evil x; .*letters, digits, '\.', '_'"),
        (["sweep.name=-x"], "a letter or a digit first"),
        (["sweep.seeds=0"], "sweep.seeds=0; it must be at least 1"),
        (["launcher=slrm"], "mean 'slurm'"),
        (["launcher=slurm", "launcher.workers=2"], "would stand idle"),
    ],
)
def test_settings_that_do_not_exist(words, why):
    with pytest.raises(ConfigError, match=why):
        split(words)


def test_settings_are_parted_from_words():
    found = split(["sweep=halving", "sweep.seeds=3", "launcher.workers=2", LOG])
    assert found.sweep.pruner == "halving" and found.sweep.seeds == 3
    assert found.launcher.workers == 2 and found.words == [LOG]
