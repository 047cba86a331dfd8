"""The recorder and its hooks: what an operation, a wait and a segment leave behind, and the file of it."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpcinfer.comm.communicator import Counters
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.comm.operation import Mark, MpiOperation, OperationQueue
from hpcinfer.comm.progress import ProgressEngine
from hpcinfer.errors import CommunicationError, DataError
from hpcinfer.observe.trace import COMPUTE, HOST, IDLE, NO_TICK, TRANSFER, WAIT, WHOLE_STEP, Record, Recorder, span
from hpcinfer.observe.trace_file import load_start, load_trace, on_common_clock, save_trace
from hpcinfer.pipeline.schedule import interleave
from hpcinfer.pipeline.watch import SegmentWatch
from tests.fake_streams import FakeStreams
from hpcinfer.runner.tracing import measure_clock
from tests.unit.observe.trace_makers import HEADER, make_trace, segment, transfer


class LateRequest:
    """Complete some time after it was made."""

    def __init__(self, delay_s: float) -> None:
        self._until_s = time.perf_counter() + delay_s

    def Test(self, status=None) -> bool:
        return time.perf_counter() >= self._until_s


@pytest.fixture
def engine():
    engine = ProgressEngine(rank=5, host="node7")
    yield engine
    engine.close()


def submit(engine: ProgressEngine, queue: OperationQueue, delay_s: float, verb: str = "all_reduce", **settings):
    operation = MpiOperation(queue, verb, 24, lambda: [LateRequest(delay_s)], **settings)
    engine.submit(queue, [operation])
    return operation


def records_of(engine: ProgressEngine) -> list[Record]:
    return engine.recorder.rows()


def test_an_operation_and_the_wait_for_it_are_recorded(engine):
    engine.recorder, queue = Recorder(), OperationQueue("pp 0>1", 1, 2, Counters())
    engine.mark.set(12, 1)
    operation = submit(
        engine, queue, 0.02, "recv", peer=0, label="activations", dtype=torch.float32, shape=torch.Size([3, 2])
    )
    engine.mark.set(13, 0)
    engine.wait(operation, 5)
    moved, waited = records_of(engine)
    assert moved[:3] == (TRANSFER, "pp 0>1", "activations") and waited[:3] == (WAIT, "pp 0>1", "activations")
    for record in (moved, waited):
        assert (record.tick, record.part, record.verb, record.bytes) == (12, 1, "recv", 24)
        assert (record.peer, record.number) == (0, 1)
    assert (moved.dtype, moved.shape) == ("float32", (3, 2))
    assert moved.issued_s <= moved.start_s <= waited.start_s < moved.end_s <= waited.end_s
    assert waited.end_s - waited.start_s > 0.015
    assert queue.counters.wait_s == pytest.approx(waited.end_s - waited.start_s)


def test_what_is_over_before_it_is_waited_for_leaves_no_wait(engine):
    engine.recorder, queue = Recorder(), OperationQueue("tp", 0, 2, Counters())
    operation = submit(engine, queue, 0.0)
    while not operation.finished:
        engine.poll()
    engine.wait(operation, 5)
    assert [record.kind for record in records_of(engine)] == [TRANSFER]


@pytest.mark.parametrize(
    ("name", "rank", "peer", "kind"),
    [
        ("control", 1, 0, IDLE), ("control", 0, 0, WAIT), ("world", 0, None, IDLE), ("tp", 1, 0, WAIT),
        ("control", 1, None, WAIT),
    ],
)
def test_waiting_to_be_told_what_to_do_is_idle(engine, name, rank, peer, kind):
    engine.recorder = Recorder()
    engine.wait(submit(engine, OperationQueue(name, rank, 2, Counters()), 0.005, "broadcast", peer=peer), 5)
    assert records_of(engine)[-1].kind == kind


def test_without_a_recorder_reports_still_name_the_microbatch(engine):
    queue = OperationQueue("tp", 1, 2, Counters())
    engine.mark.set(12, 1)
    stuck = submit(engine, queue, 60, label="layer 3 o")
    with pytest.raises(CommunicationError) as caught:
        engine.wait(stuck, 0.02)
    for part in (
        "all_reduce (layer 3 o) of 24 bytes", "'tp'", "world rank 5", "host node7", "all ranks", "microbatch tick 12 part 1"
    ):
        assert part in str(caught.value)
    other = OperationQueue("control", 1, 2, Counters())
    engine.mark.set(13)
    with pytest.raises(CommunicationError, match="peer 0, tick 13;"):
        engine.wait(submit(engine, other, 60, "broadcast", peer=0), 0.02)
    engine.mark.set()
    with pytest.raises(CommunicationError, match="all ranks;"):
        engine.wait(submit(engine, OperationQueue("world", 0, 2, Counters()), 60), 0.02)


def test_the_newest_records_are_kept(tmp_path):
    recorder = Recorder(max_records=3)
    for number in range(5):
        recorder.add(HOST, f"work {number}", float(number), tick=number)
    trace = load_trace(save_trace(tmp_path, recorder, HEADER))
    assert [record.name for record in trace.records()] == ["work 2", "work 3", "work 4"]
    assert trace.header["dropped"] and len(trace) == 3
    assert not make_trace(tmp_path, [segment(1.0, 2.0)]).header["dropped"]


def test_a_recorder_that_restarts_forgets():
    recorder = Recorder()
    recorder.add(HOST, "before", 1.0)
    began_s = time.perf_counter()
    recorder.restart()
    recorder.add(HOST, "after", recorder.start_s)
    assert [row.name for row in recorder.rows()] == ["after"] and recorder.start_s >= began_s


def test_a_span_records_its_block_even_where_it_fails():
    recorder = Recorder()
    with pytest.raises(ValueError), span(recorder, "read", tick=4):
        time.sleep(0.01)
        raise ValueError
    (record,) = recorder.rows()
    assert (record.kind, record.name, record.tick, record.part) == (HOST, "read", 4, WHOLE_STEP)
    assert record.end_s - record.start_s > 0.008
    with span(None, "read"):
        pass
    assert len(recorder.rows()) == 1


def test_a_file_gives_back_every_record(tmp_path):
    records = [
        transfer(3.0, 4.0, verb="send", peer=1, number=7, issued_s=2.5), segment(1.0, 2.0, tick=3, part=1),
        (HOST, "", "Zwölf", 0.5, 6.0),
    ]
    trace = make_trace(tmp_path, records, rank=4)
    back = trace.records()
    assert [record.start_s for record in back] == [0.5, 1.0, 3.0], "by start"
    assert back[2] == Record(*records[0]) and back[1] == Record(*records[1]) and back[0].name == "Zwölf"
    assert back[0].tick == NO_TICK and back[2].shape == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["20260101T000000-rank4.npz"], "nothing temporary is left"
    assert len(make_trace(tmp_path, [], rank=5)) == 0


def test_the_newest_start_is_read_unless_another_is_named(tmp_path):
    for start in ("20260101T000000", "20260102T000000-job7"):
        for rank in (10, 2):
            make_trace(tmp_path, [], started=start, rank=rank)
    newest = load_start(tmp_path)
    assert [(t.header["started"], t.rank) for t in newest] == [("20260102T000000-job7", 2), ("20260102T000000-job7", 10)]
    assert load_start(tmp_path, "20260101T000000")[0].header["started"] == "20260101T000000"
    with pytest.raises(DataError, match="20260102T000000-job7"):
        load_start(tmp_path, "2025")
    with pytest.raises(DataError, match="--trace"):
        load_start(tmp_path / "absent")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"", lambda data: b"text", lambda data: data[: len(data) // 2],
        lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
    ],
    ids=["empty", "text", "cut", "flipped"],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    make_trace(tmp_path, [segment(1.0, 2.0)] * 50)
    path = tmp_path / "20260101T000000-rank0.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="rank0.npz"):
        load_trace(path)


@pytest.mark.parametrize("header", ["[]", "null", '"text"', None], ids=["list", "null", "text", "facts missing"])
def test_a_header_that_is_none_is_named(tmp_path, header):
    make_trace(tmp_path, [segment(1.0, 2.0)])
    path = tmp_path / "20260101T000000-rank0.npz"
    with np.load(path) as file:
        arrays = dict(file)
    if header is None:
        facts = json.loads(arrays["header"].tobytes())
        del facts["clock"], facts["coordinates"]
        header = json.dumps(facts)
    np.savez(path, **{**arrays, "header": np.frombuffer(header.encode(), np.uint8)})
    with pytest.raises(DataError, match="rank0.npz"):
        load_trace(path)


def test_a_file_under_another_name_is_refused(tmp_path):
    make_trace(tmp_path, [segment(1.0, 2.0)])
    (tmp_path / "20260101T000000-rank0.npz").rename(tmp_path / "20270101T000000-rank0.npz")
    with pytest.raises(DataError, match="20260101T000000"):
        load_start(tmp_path)


def test_times_of_another_host_move_to_rank_0s_clock(tmp_path):
    clock = [{"at_s": 100.0, "offset_s": 10.0}, {"at_s": 200.0, "offset_s": 20.0}]
    trace = make_trace(tmp_path, [segment(150.0, 160.0), transfer(200.0, 200.0)], clock=clock, same_clock=False)
    moved = on_common_clock(trace)
    assert moved["start_s"].tolist() == [135.0, 180.0] and moved["end_s"].tolist() == [144.0, 180.0]
    assert (moved.header["start_s"], moved.header["end_s"]) == (90.0, 180.0)
    same = make_trace(tmp_path, [segment(150.0, 160.0)], clock=clock, same_clock=True)
    assert on_common_clock(same)["start_s"].tolist() == [150.0], "ranks of one boot share a clock"


class OneRankBehind:
    """A channel of two ranks as rank 0 sees it; rank 1's clock is ahead by 7 s."""

    rank = 0

    def broadcast(self, obj=None, root=0):
        self.told_s = time.perf_counter()
        return obj

    def gather(self, obj, root=0):
        return [obj, self.told_s + 7.0]


def test_the_clock_of_rank_0_is_the_reference():
    point = measure_clock(OneRankBehind())
    assert point["offset_s"] == 0.0 and point["error_s"] == 0.0

    class Told(OneRankBehind):
        """Rank 1's view: it is told what rank 0 found."""

        rank = 1

        def broadcast(self, obj=None, root=0):
            return (0.002, 50.0, [50.001, 57.0005], "boot")

        def gather(self, obj, root=0):
            return None

    point = measure_clock(Told())
    assert point == {"at_s": 57.0005, "offset_s": pytest.approx(7.0005), "error_s": 0.001, "boot_id": "boot"}


class FakeNvtx:
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def range_push(self, name):
        self.calls.append(("push", name))

    def range_pop(self):
        self.calls.append(("pop",))

    def mark(self, name):
        self.calls.append(("mark", name))


def test_segments_are_marked_recorded_and_shown_to_a_profiler():
    mark, recorder, nvtx, seen = Mark(), Recorder(), FakeNvtx(), []
    local = LocalCommunicator("tp")

    def forward(number: int):
        x = torch.ones(1)
        seen.append((number, mark.tick, mark.part))
        x = yield local.all_reduce(x, label="layer 0 o")
        seen.append((number, mark.tick, mark.part))
        return x

    parts = [SimpleNamespace(tick=9, part=0), SimpleNamespace(tick=9, part=1)]
    watch = SegmentWatch(mark, recorder, nvtx)
    interleave([forward(0), forward(1)], before_segment=watch.before_segment(parts), on_segment=watch.on_segment(parts))
    assert seen == [(0, 9, 0), (1, 9, 1), (0, 9, 0), (1, 9, 1)]
    records = recorder.rows()
    assert [(r.kind, r.name, r.tick, r.part) for r in records] == [
        (COMPUTE, "layer 0 o", 9, 0), (COMPUTE, "layer 0 o", 9, 1), (COMPUTE, "end", 9, 0), (COMPUTE, "end", 9, 1)
    ]
    ends = np.array([(r.start_s, r.end_s) for r in records]).ravel()
    assert (np.diff(ends) >= 0).all(), "one after the other"
    assert nvtx.calls[:3] == [("push", "tick 9 part 0: begin"), ("mark", "layer 0 o"), ("pop",)]
    assert nvtx.calls[6] == ("push", "tick 9 part 0: after layer 0 o")
    assert [call[0] for call in nvtx.calls].count("push") == [call[0] for call in nvtx.calls].count("pop") == 4
    assert SegmentWatch(mark).on_segment(parts) is None


def test_segments_of_a_device_have_the_times_of_the_device():
    class LaggingStreams(FakeStreams):
        def __init__(self) -> None:
            super().__init__()
            self.compute = self.create()

        def current(self):
            return self.compute

    streams, recorder = LaggingStreams(), Recorder()
    watch = SegmentWatch(Mark(), recorder, streams=streams)
    local = LocalCommunicator("tp")

    def forward():
        streams.compute.enqueue(lambda: time.sleep(0.1))
        x = yield local.all_reduce(torch.ones(1), label="layer 0 o")
        streams.compute.enqueue(lambda: time.sleep(0.05))
        return x

    parts = [SimpleNamespace(tick=9, part=0)]
    began = time.perf_counter()
    interleave([forward()], before_segment=watch.before_segment(parts), on_segment=watch.on_segment(parts))
    assert time.perf_counter() - began < 0.09 and not recorder.rows(), "the device is not done"
    streams.compute.record_event().block()
    watch.harvest()
    first, second = recorder.rows()
    assert (first.name, second.name) == ("layer 0 o", "end")
    assert first.end_s - first.start_s > 0.09 and second.end_s - second.start_s > 0.045
    assert second.start_s >= first.end_s


def test_what_is_left_to_do_after_a_wait_belongs_to_the_segment():
    recorder = Recorder()
    operation = MpiOperation(OperationQueue("tp", 0, 2, Counters()), "all_reduce", 8, lambda: [])
    recorder.segment("a", 1.0, 2.0, 0, 0)
    recorder.wait(operation, 2.0, 5.0)
    recorder.segment("b", 5.5, 6.0, 0, 0)
    recorder.segment("c", 6.5, 7.0, 0, 0)
    spans = [(row.start_s, row.end_s) for row in recorder.rows() if row.kind == COMPUTE]
    assert spans == [(1.0, 2.0), (5.0, 6.0), (6.5, 7.0)]


def test_the_header_is_json_that_anyone_can_read(tmp_path):
    make_trace(tmp_path, [segment(1.0, 2.0)])
    with np.load(tmp_path / "20260101T000000-rank0.npz", allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        assert set(file.files) == {"header", "texts", *Record._fields}
    assert header["format"] == "hpcinfer-trace" and header["coordinates"]["stage"] == 0
