"""Job files: what is valid, and what a wrong one is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.config.job import JobConfig, RunSection
from hpcinfer.config.load import apply_override, job_from_tables, job_to_tables, load_job
from hpcinfer.errors import ConfigError, HpcinferError, UsageError
from hpcinfer.request import TaskParams

SMALLEST = {"model": {"path": "m"}, "data": {"prompts": "p.h5", "output": "runs/x"}}


def test_the_smallest_job_has_defaults_for_all_else():
    job = job_from_tables(SMALLEST)
    assert (job.parallel.tp, job.parallel.pp, job.parallel.dp) == (1, 1, 0)
    assert job.sampling.temperature == 0.0
    assert job_from_tables(job_to_tables(job)) == job


def test_overrides_reach_any_key(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('[model]\npath = "m"\n[data]\nprompts = "p"\noutput = "o"\n')
    job = load_job(path, ["parallel.tp=2", "model.path=other folder", "sampling.temperature=1", "sampling.stop_token_ids=[3, 4]"])
    assert (job.parallel.tp, job.model.path, job.sampling.temperature) == (2, "other folder", 1.0)
    assert job.sampling.stop_token_ids == (3, 4)
    assert load_job(path, ["data.output=1\nx = '2'"]).data.output == "1\nx = '2'"


def test_texts_and_biases_of_a_job(tmp_path):
    path = tmp_path / "job.toml"
    tables = '[sampling]\nstop = ["\\n\\n", "END"]\n[sampling.logit_bias]\n50 = -100\n"7" = -inf\n'
    path.write_text('[model]\npath = "m"\n[data]\nprompts = "p"\noutput = "o"\n' + tables)
    sampling = load_job(path, ['sampling.bad_words=["a b"]']).sampling
    assert (sampling.stop, sampling.bad_words, sampling.logit_bias) == (("\n\n", "END"), ("a b",), {7: -float("inf"), 50: -100.0})
    assert load_job(path, ["sampling.logit_bias={3 = 1.5}"]).sampling.logit_bias == {3: 1.5}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tpp=2"], "did you mean tp"),
        (["paralel.tp=2"], "did you mean parallel"),
        (["parallel.tp=two"], "a whole number"),
        (["parallel.tp=true"], "a whole number"),
        (["parallel.tp=0"], "give 1 or more"),
        (["sampling.top_p=1.5"], "at most 1"),
        (["sampling.ignore_eos=1"], "true or false"),
        (["sampling.stop_token_ids=3"], "a list of whole numbers"),
        (["sampling.stop=END"], "a list of texts"),
        (["sampling.stop=['']"], "not empty"),
        (["sampling.logit_bias={x = 1}"], "token ids of 0 or more"),
        (["sampling.logit_bias={3 = 'much'}"], "a number"),
        (["sampling.repetition_penalty=0"], "above 0"),
        (["model.dtype=int8"], "float32, bfloat16, float16, auto"),
        (["engine.kv_memory=lots"], "not a size"),
        (["run.max_failed=some"], "a share"),
        (["run.segment_s=nan"], "above 0"),
        (["run.linger_s=nan"], "0 or more"),
        (["run.margin_s=-1"], "0 or more"),
        (["run.drain_s=soon"], "seconds"),
        (["run.drain_s=-1"], "seconds"),
        (["run.max_lives=0"], "1 or more"),
        (["comm.deadline_s=nan"], "above 0"),
        (["data.output=''"], "is empty"),
        (["data.output=p"], "a path of its own"),
        (["sampling.top_k=99999999999999999999999"], "below 2**31"),
        (["parallel.pp=2", "parallel.layer_split=[4]"], "2 numbers"),
        (["parallel.sp_phase=decode"], "one token a sequence"),
        (["parallel.ep=2"], "one of 1"),
        (["parallel.tp=2", "parallel.sp=2", "parallel.ep=3"], "one of 1, 2, 4"),
        (["parallel.sequence_form=true"], "tp to 2 or more"),
        (["parallel.two_batch=some"], "the smallest number of tokens"),
        (["parallel.two_batch=" + "9" * 5000], "the smallest number of tokens"),
        (["parallel.microbatches=17"], "at most 16"),
        (["model.experts=some"], "unpacked, packed"),
        (["data.limit=-1"], "a number of rows"),
        (["data.rows='5'"], '"a:b"'),
        (["data.rows=-5:7"], '"a:b"'),
        (["data.truncate=middle"], "error, left, right"),
        (["data.max_prompt_tokens=-1"], "or more"),
    ],
)
def test_wrong_values_say_what_is_valid(tmp_path, overrides, words):
    path = tmp_path / "job.toml"
    path.write_text('[model]\npath = "m"\n[data]\nprompts = "p"\noutput = "o"\n')
    with pytest.raises(ConfigError) as caught:
        load_job(path, overrides)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_section_that_may_be_one_text_may_be_so_in_an_override():
    tables = {"model": {"path": "m"}, "data": {"prompts": "p", "output": "o"}, "task": {"kind": "embed", "pooling": "cls"}}
    apply_override(tables, "task=score")
    assert job_from_tables(tables).task == TaskParams(kind="score")


@pytest.mark.parametrize("override", ["tp=2", "parallel.tp", "=3", ".a=3", "a.=1"])
def test_an_override_of_the_wrong_form_is_a_usage_error(override):
    with pytest.raises(UsageError, match="section.key=value"):
        apply_override({}, override)


def test_numbers_without_end_are_refused(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(f'[model]\npath = "m"\n[data]\nprompts = "p"\noutput = "o"\n[parallel]\ntp = {"9" * 5000}\n')
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_job(path, [])


def test_missing_keys_and_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="data.output"):
        job_from_tables({"model": {"path": "m"}, "data": {"prompts": "p"}})
    with pytest.raises(ConfigError, match="absent.toml"):
        load_job(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_bytes(b"[model\n\xff")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_job(tmp_path / "bad.toml")


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "job.toml"
    path.write_bytes(b'\xef\xbb\xbf[model]\npath = "m"\n[data]\nprompts = "p"\noutput = "o"\n')
    assert load_job(path).model.path == "m"


def test_allowed_failures():
    assert RunSection(max_failed="20").allowed_failures(1000) == 20
    assert RunSection(max_failed="1%").allowed_failures(1000) == 10
    assert RunSection().allowed_failures(5) == 5


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3))
names = st.sampled_from(["model", "data", "sampling", "parallel", "engine", "comm", "run", "path", "tp", "x"])


@given(tables=st.dictionaries(names, values | st.dictionaries(names | st.text(max_size=5), values, max_size=4), max_size=5))
def test_nothing_but_our_errors_comes_out(tables):
    try:
        assert isinstance(job_from_tables({**SMALLEST, **tables}), JobConfig)
    except HpcinferError as error:
        assert str(error)


TOML_PIECES = st.sampled_from([
    "[model]\n", "[[model]]\n", "[sampling]\n", "[parallel]\n", "[data]\n", "path", "tp", "seed", "max_tokens", "stop_token_ids", " = ",
    "\n", "[", "]", "{", "}", '"', "'", '"""', "1", "-1", "1e400", "nan", "inf", "0x", "1979-05-27", "true", ",", ".", "\\u0000", "\\ud800",
    "\x00", "ü", "#", "9" * 5000,
])  # fmt: skip


@given(raw=st.lists(TOML_PIECES, max_size=25).map("".join).map(str.encode) | st.binary(max_size=60))
def test_no_file_breaks_the_reader(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("toml") / "job.toml"
    path.write_bytes(raw)
    try:
        load_job(path)
    except HpcinferError as error:
        assert str(error)


PARTS = st.sampled_from(
    ["model", "data", "sampling", "parallel", "run", "path", "tp", "seed", "temperature", "stop_token_ids", "drain_s", ""]
)
DOTS, EQUALS = st.sampled_from([".", "", "..", " "]), st.sampled_from(["=", "", "==", " = "])
OVERRIDES = st.tuples(PARTS, DOTS, PARTS, EQUALS, TOML_PIECES | st.text(max_size=9))


@given(override=st.text(max_size=30) | OVERRIDES.map("".join))
def test_no_override_breaks_the_reader(override):
    tables = {"model": {"path": "m"}, "data": {"prompts": "p", "output": "o"}, "flag": 3}
    try:
        apply_override(tables, override)
        job_from_tables(tables)
    except HpcinferError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("overrides", "output"),
    [
        ([], "runs/o/"), (["data.limit=5"], "runs/o-trial"), (["data.rows=1:"], "runs/o-trial"),
        (["data.limit=5", "data.output=runs/o"], "runs/o"), ([" data.output =there", "data.limit=5"], "there"),
        (["data.limit=0", "run.retry_failed=true"], "runs/o/"),
    ],
)  # fmt: skip
def test_a_trial_has_a_folder_of_its_own_unless_one_is_named(tmp_path, overrides, output):
    path = tmp_path / "job.toml"
    path.write_text('[model]\npath = "m"\n[data]\nprompts = "p"\noutput = "runs/o/"\n')
    assert load_job(path, overrides).data.output == output
