"""Tables of tile sizes: who is served by which entry, and writing one (a dry run, interpreted)."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import OPERATORS
from pallas_kernels.core import dispatch, tune, tuned
from pallas_kernels.core.config import Config
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.selective_scan import arg_specs

KIND = "TPU v5 lite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    """Tiles of nothing."""

    chunk: int = 32
    rows: int = 1

    def __post_init__(self):
        if self.chunk > 64:
            raise ValueError("chunk is at most 64")


SIZES = dict(b=1, t=512, e=128)


def entry(chunk, **sizes):
    return {
        "form": tuned.form_of(ToyConfig),
        "sizes": {**SIZES, **sizes},
        "fields": {"chunk": chunk},
    }


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "own.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    return path


def test_without_a_table_the_heuristic_holds(table):
    assert ToyConfig.of(None, SIZES, KIND) == ToyConfig(device_kind=KIND)


def test_an_entry_serves_equal_sizes_of_its_device(table):
    tuned.write(table, KIND, [entry(8), entry(16, t=4096), entry(64, e=256)])
    chunk = lambda kind=KIND, **sizes: ToyConfig.of(None, {**SIZES, **sizes}, kind).chunk
    assert chunk() == 8
    assert chunk(t=700, b=3) == 8 and chunk(t=3000) == 16
    assert chunk(e=256) == 64
    assert chunk(e=512) == 32
    assert chunk("TPU7x") == 32 and chunk(None) == 32
    assert ToyConfig.of(None, SIZES, KIND).device_kind == KIND


def test_what_the_caller_says_goes_before_the_table(table):
    tuned.write(table, KIND, [entry(8)])
    mine = ToyConfig(chunk=4)
    assert ToyConfig.of(mine, SIZES, KIND) is mine


def test_a_folder_and_a_file_that_changes(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    path = tmp_path / tuned.file_name(KIND)
    assert path.name == "tpu-v5-lite.json"
    tuned.write(path, KIND, [entry(8)])
    assert ToyConfig.of(None, SIZES, KIND).chunk == 8
    tuned.write(path, KIND, [entry(16), entry(4, e=1)])
    assert ToyConfig.of(None, SIZES, KIND).chunk == 16
    assert len(json.loads(path.read_text())["entries"]) == 2
    with pytest.raises(ValueError, match="not of TPU7x"):
        tuned.write(path, "TPU7x", [])


@pytest.mark.parametrize("fields", [{"chunk": 128}, {"gone": 1}])
def test_an_entry_that_no_longer_fits_is_told_and_left(table, caplog, fields):
    tuned.write(table, KIND, [{**entry(8), "fields": fields}])
    assert ToyConfig.of(None, SIZES, KIND).chunk == 32
    assert "of no use" in caplog.text


def test_a_file_that_is_no_table(table, caplog):
    table.write_text("no json")
    assert ToyConfig.of(None, SIZES, KIND).chunk == 32
    assert "is no table" in caplog.text


def test_candidates_halve_and_double_each_size():
    found = [(c.chunk, c.rows) for c in ToyConfig.candidates(SIZES, KIND)]
    assert found == [(32, 1), (16, 1), (64, 1)]


def shapes(*of):
    return [jax.ShapeDtypeStruct(one, jnp.bfloat16) for one in of]


@pytest.mark.parametrize(
    "op, form, kind, arrays, options, sizes",
    [
        (
            *("monarch_matmul", "pallas_gpu", "NVIDIA H200"),
            *(shapes((1, 64, 128), (2, 64, 64), (2, 64, 64)), {}),
            dict(b=1, t=64, k=2, q=64, p=64, l=2, s=64, r=64, itemsize=2),
        ),
        (
            *("monarch_matmul", "pallas_gpu", "NVIDIA H200"),
            *(shapes((3, 64, 128), (2, 64, 64)), {}),
            dict(b=3, t=64, k=2, q=64, p=64, itemsize=2),
        ),
        (
            *("dilated_conv", "pallas_tpu", KIND),
            *(shapes((1, 64, 128), (2, 3, 128)), dict(dilations=(1, 4))),
            dict(b=1, t=64, e=128, w=3, d0=1, d1=4, itemsize=2),
        ),
        (
            *("long_conv", "pallas_tpu", KIND),
            *(shapes((1, 64, 128), (128, 64)), {}),
            dict(b=1, t=64, e=128, l=64, itemsize=2),
        ),
        (
            *("long_conv", "pallas_gpu", "NVIDIA H200"),
            *(shapes((1, 2048, 128), (128, 64)), {}),
            dict(b=1, t=2048, e=128, l=64, itemsize=2),
        ),
    ],
)
def test_forms_ask_for_all_that_their_tiles_hang_on(op, form, kind, arrays, options, sizes):
    """A table of the device reaches them, and one call's entry is not taken for another's."""
    call = functools.partial(OPERATORS[op], **options, implementation=form)
    with tuned.asked() as found, dispatch.compiling_for(kind):
        jax.eval_shape(call, *arrays)
    assert (found[0].device_kind, found[0].sizes) == (kind, sizes)


def test_a_dry_run_writes_what_is_read_again(table, monkeypatch):
    """The scan's kernel by interpretation: a real entry, whose figures mean nothing."""
    cls = tune.config_class(OPERATORS["selective_scan"], "pallas_tpu")
    some = cls.candidates
    monkeypatch.setattr(cls, "candidates", lambda *sizes: some(*sizes)[:2])
    small = arg_specs.named("whole")
    spec = ArgSpec(
        name="dry",
        sizes=dict(b=1, t=16, e=5, n=3),
        draw=small.draw,
        given=small.given,
        options=small.options,
    )
    said = []
    found, tried = tune.tune(
        OPERATORS["selective_scan"],
        spec,
        "pallas_tpu",
        dtype="float32",
        rounds=1,
        interpret=True,
        say=said.append,
    )
    assert found["form"] == "selective_scan.pallas_tpu" and found["call"] == "dry"
    times = [one.milliseconds for one in tried if one.milliseconds is not None]
    assert found["milliseconds"] == min(times) and len(said) == len(tried)
    tuned.write(table, KIND, [found])
    read = cls.of(None, found["sizes"], KIND)
    assert {k: getattr(read, k) for k in found["fields"]} == found["fields"]


def test_a_kernel_is_asked_for_only_where_its_device_is():
    assert tune.platform_kernel() is None
    with pytest.raises(NotImplementedError, match="needs a tpu device"):
        tune.tune(OPERATORS["selective_scan"], arg_specs.named("issue"), "pallas_tpu")
