"""The feed: rows read and tokenised in a thread come as they would without one, and what cannot run fails alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcinfer.data.ledger.claims import NoClaim
from hpcinfer.data.ledger.coverage import Coverage
from hpcinfer.data.ledger.run_directory import create_or_open
from hpcinfer.data.prompts.prompt_row import PromptsReader
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import ConfigError, DataError, RowError
from hpcinfer.request import Generation, Request, SamplingParams, Status, TaskParams
from hpcinfer.runner import feed as feed_module
from hpcinfer.runner.feed import RowFeed
from hpcinfer.runner.prompt_limit import PromptLimit
from tests.conftest import ROOT
from tests.faults.shim.harness import identity, stub_generation
from tests.unit.data.lives import Clock, Life

MODEL = str(ROOT / "datasets/demo-model")
NUM_ROWS = 700


def prompt(row: int) -> bytes:
    """Every fiftieth row is not valid UTF-8, every hundredth is empty."""
    return b"" if row % 100 == 99 else b"\xff" if row % 50 == 49 else f"reverse {'abc' * (row % 9)}{row}:".encode()


@pytest.fixture
def reader(tmp_path: Path):
    prompts = [prompt(row) for row in range(NUM_ROWS)]
    with h5py.File(tmp_path / "prompts.h5", "w") as file:
        file["prompts/data"] = np.frombuffer(b"".join(prompts), np.uint8)
        file["prompts/offsets"] = np.cumsum([0, *map(len, prompts)])
    with open_prompts(tmp_path / "prompts.h5") as opened:
        yield opened


def life(tmp_path: Path, num_samples: int = 1) -> Life:
    return Life(create_or_open(tmp_path / "run", identity(NUM_ROWS, num_samples)), Clock(), num_rows=NUM_ROWS)


def make_feed(writer: Life, reader: PromptsReader, **settings) -> RowFeed:
    arguments = {"refuse": lambda request: None, "vocab_size": 263, **settings}
    return RowFeed(writer.ledger, reader, Tokenizer(MODEL), SamplingParams(max_tokens=4), **arguments)


def take_all(feed: RowFeed, writer: Life, count: int = 30) -> list[Request | Generation]:
    """As the loop does: an answer for each request, and the next ones."""
    found, idle = [], True
    while True:
        requests, failed = feed.take(count, idle=idle)
        assert len(requests) <= count
        found += [*requests, *failed]
        writer.segments.add([stub_generation(r.row, r.sample) for r in requests] + failed)
        idle = not requests and not failed
        if idle:
            writer.segments.flush()
            if feed.state is NoClaim.DONE:
                return found


@pytest.mark.parametrize("num_samples", [1, 3])
def test_every_row_once_with_its_own_tokens(tmp_path, reader, num_samples):
    writer, tokenizer = life(tmp_path, num_samples), Tokenizer(MODEL)
    feed = make_feed(writer, reader)
    found = take_all(feed, writer)
    feed.close()
    assert sorted(item.key for item in found) == [(row, sample) for row in range(NUM_ROWS) for sample in range(num_samples)]
    for item in found:
        text = prompt(item.row)
        if item.row % 50 == 49:
            assert isinstance(item, Generation) and ("empty" if not text else "UTF-8") in item.error
        else:
            assert item.prompt_token_ids.tolist() == tokenizer.encode(text.decode()).tolist()
    assert writer.ledger.coverage.is_full
    by_claim = {}
    for item in found:
        if isinstance(item, Request):
            by_claim.setdefault(item.row // writer.run.claim_size, []).append(item.key)
    assert all(keys == sorted(keys) for keys in by_claim.values()), "in the order of the file"


def test_no_claim_is_taken_before_it_is_needed(tmp_path, reader):
    writer, taken = life(tmp_path), 0
    feed = make_feed(writer, reader)
    for _ in range(30):
        requests, failed = feed.take(10, idle=True)
        taken += len(requests) + len(failed)
        assert writer.ledger.num_claimed_keys < taken + 10 + writer.run.claim_size
    assert taken > 100
    feed.close()


def test_rows_prepared_and_not_taken_are_left_to_others(tmp_path, reader):
    first = life(tmp_path)
    feed = make_feed(first, reader)
    requests, failed = feed.take(100, idle=True)
    first.segments.add([stub_generation(r.row) for r in requests] + failed)
    first.segments.close()
    feed.close()
    first.writer.leave()
    second = life(tmp_path)
    feed = make_feed(second, reader)
    rows = [item.row for item in take_all(feed, second)]
    feed.close()
    assert sorted(rows + [item.row for item in (*requests, *failed)]) == list(range(NUM_ROWS))


def test_the_engine_is_not_kept_waiting(tmp_path, reader, monkeypatch):
    """With work in hand `take` returns at once, however slow the tokenizer is; without any it waits."""
    gate = threading.Event()
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: gate.wait(10) and encode(self, texts))
    writer = life(tmp_path)
    feed = make_feed(writer, reader)
    began = time.monotonic()
    assert feed.take(20, idle=False) == ([], []) and feed.state is None
    assert time.monotonic() - began < 5
    threading.Timer(0.05, gate.set).start()
    assert feed.take(20, idle=True)[0]
    feed.close()


def test_memory_is_bounded(tmp_path, reader, monkeypatch):
    """Claims of 600 rows are open; of these no more than the bound and a batch are ready, and none is made after the end."""
    monkeypatch.setattr(feed_module, "_MOST_AHEAD", 20)
    monkeypatch.setattr(feed_module, "_TOKENIZE_ROWS", 8)
    encoded = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: encoded.append(len(texts)) or encode(self, texts))
    writer = life(tmp_path)
    feed = make_feed(writer, reader)
    requests, failed = feed.take(600, idle=True)
    assert writer.ledger.num_claimed_keys >= 600 - len(failed)
    time.sleep(0.1)
    assert sum(encoded) <= len(requests) + 20 + 8 and max(encoded) <= 8
    feed.close()
    before = sum(encoded)
    time.sleep(0.05)
    assert sum(encoded) == before < 600


def test_long_rows_are_tokenised_in_smaller_batches(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(feed_module, "_TOKENIZE_LENGTH", 100)
    sizes = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: sizes.append(sum(map(len, texts))) or encode(self, texts))
    writer = life(tmp_path)
    feed = make_feed(writer, reader)
    assert len(take_all(feed, writer)) == NUM_ROWS
    feed.close()
    assert max(sizes) < 100 + 50


def test_too_long_prompts(tmp_path, reader):
    writer = life(tmp_path)
    feed = make_feed(writer, reader, limit=PromptLimit(100, 12, "left"))
    found = take_all(feed, writer)
    feed.close()
    tokenizer = Tokenizer(MODEL)
    cut = [item for item in found if isinstance(item, Request) and len(prompt(item.row)) > 12]
    assert cut and all(item.prompt_token_ids.tolist() == tokenizer.encode(prompt(item.row).decode()).tolist()[-12:] for item in cut)


def refuse_row(number: int, error: Exception):
    def refuse(request: Request) -> None:
        if request.row == number:
            raise error
    return refuse


def test_a_row_of_which_the_tokenizer_knows_nothing_fails_alone(tmp_path, reader):
    writer = life(tmp_path)
    feed = make_feed(writer, reader, refuse=refuse_row(17, RowError("never")))
    found = take_all(feed, writer)
    feed.close()
    failed = [item for item in found if isinstance(item, Generation)]
    assert {item.row for item in failed} == {17, *range(49, NUM_ROWS, 50)} and all(item.status is Status.FAILED for item in failed)


@pytest.mark.parametrize("error", [ConfigError("does not fit"), DataError("the file is damaged")])
def test_an_error_of_the_thread_is_raised_by_take_and_loses_no_row(tmp_path, reader, error):
    writer = life(tmp_path)
    feed = make_feed(writer, reader, refuse=refuse_row(333, error))
    with pytest.raises(type(error)):
        take_all(feed, writer)
    feed.close()
    writer.segments.close()
    coverage = Coverage(writer.run, NUM_ROWS)
    coverage.refresh()
    assert not coverage.is_done(333, 0)


def test_continuations_are_scored_from_their_first_token(tmp_path):
    path = tmp_path / "prompts.h5"
    with PromptsWriter(path, kind="text") as writer:
        for prompt, answer in (("1+1=", "2"), ("ab", "cdé"), ("x", None), ("y" * 40, "z")):
            writer.append(prompt, meta={} if answer is None else {"answer": answer})
    writer = Life(create_or_open(tmp_path / "run", identity(4)), Clock(), num_rows=4)
    with open_prompts(path) as reader:
        reader.read_continuations("answer")
        feed = make_feed(
            writer, reader, task=TaskParams(kind="score", continuation="answer"), limit=PromptLimit(21, 0, "left")
        )
        found = take_all(feed, writer)
        feed.close()
    requests = {item.row: item for item in found if isinstance(item, Request)}
    assert {row: (bytes(one.prompt_token_ids.tolist()), one.score_from) for row, one in requests.items()} == {
        0: (b"1+1=2", 4), 1: ("abcdé".encode(), 2), 3: (b"y" * 19 + b"z", 19),
    }
    assert all(one.task.kind == "score" and one.sampling.max_tokens == 1 for one in requests.values())
    (failed,) = [item for item in found if isinstance(item, Generation)]
    assert failed.row == 2 and "no continuation" in failed.error
