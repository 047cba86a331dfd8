"""Trying a file system, and room on it."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest

from hpcinfer.comm.host import LocalHostChannel
from hpcinfer.config.load import job_from_tables
from hpcinfer.data.ledger.run_directory import RunIdentity, create_or_open
from hpcinfer.doctor.file_probe import NUM_NAMES, _partner, gather_storage, nearest_folder, read_rate
from hpcinfer.doctor.finding import Level
from hpcinfer.doctor.space import Quota, SpaceFacts, Writes, expected_writes, gather_space, judge_space, parse_quota
from hpcinfer.doctor.storage import judge_storage
from tests.doctor_facts import GIB, change, place, storage
from tests.other_user import another_user, needs_root, secret_folder

LUSTRE = "       /lustre/scratch  50560*  30720   51200 6d23h59m46s     101    100     200 6d23h59m50s\n"
LUSTRE_NO_LIMIT = (
    "Disk quotas for usr bob (uid 500):\n"
    "     Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace\n"
    "/lustre/scratch  134748       0       0       -    5027       0       0       -\n"
)
LOCAL = (
    "Disk quotas for user bob (uid 500): \n"
    "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
    "server:/home  1048576  0 2097152 0 12 0 0 0\n"
)


def try_folder(folder):
    return gather_storage(LocalHostChannel(), [place(0)], folder)


def test_a_folder_that_works(tmp_path):
    facts = try_folder(tmp_path / "not" / "yet")
    assert facts.folder == str(tmp_path) and not facts.error and facts.appeared_s is not None
    assert sorted(facts.won) == list(range(NUM_NAMES))
    assert 0 < facts.commit_s < 10 and facts.write_bytes_per_s > 1e6 and facts.read_bytes_per_s > 1e6
    assert os.listdir(tmp_path) == [], "nothing stays behind"
    # Yellow is a disk that is slow at the moment, as that of a shared machine may be.
    assert Level.RED not in {finding.level for finding in judge_storage([facts])}


def test_names_that_are_given_twice(tmp_path, monkeypatch):
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *rest, **named: real(path, flags & ~os.O_EXCL, *rest, **named))
    facts = try_folder(tmp_path)
    finding = next(finding for finding in judge_storage([facts]) if finding.check == "output: exclusive names")
    assert finding.level is Level.RED
    assert finding.found == f"O_EXCL: {NUM_NAMES // 2} of {NUM_NAMES} names were given twice, one of them to rank 0 on n0"


def test_links_that_take_what_exists(tmp_path, monkeypatch):
    """A file system whose link() replaces: claim_name then believes it."""
    facts = [storage(rank, won=tuple(range(1, NUM_NAMES, 2)) if rank == 3 else storage(rank).won) for rank in range(4)]
    finding = next(finding for finding in judge_storage(facts) if finding.check == "output: exclusive names")
    assert finding.level is Level.RED and finding.found.startswith("link(): 8 of 32")


def test_names_that_nobody_gets():
    facts = change([storage(rank) for rank in range(4)], 1, won=())
    finding = next(finding for finding in judge_storage(facts) if finding.check == "output: exclusive names")
    assert finding.level is Level.RED and "8 of 32 names could be made by no rank" in finding.found


def test_a_folder_that_is_not_shared():
    findings = judge_storage([storage(rank, appeared_s=None if rank > 1 else 0.0) for rank in range(4)])
    shared = next(finding for finding in findings if finding.check == "output: shared")
    assert shared.level is Level.RED and shared.where == ("n1",) and "/tmp are not" in shared.fix
    assert "output: exclusive names" not in [finding.check for finding in findings], "it follows from the other"


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.EROFS, "read-only"), (errno.ENOSPC, "make room"), (errno.EDQUOT, "quota"), (errno.EIO, "looked at")],
)
def test_why_it_cannot_be_written(number, fix):
    facts = [storage(0, error=os.strerror(number), error_number=number)]
    finding = judge_storage(facts)[0]
    assert finding.level is Level.RED and fix in finding.fix and os.strerror(number) in finding.found
    assert judge_storage(facts, is_output=False)[0].level is Level.YELLOW


def test_a_real_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refuse)
    facts = try_folder(tmp_path)
    assert facts.error_number == errno.EDQUOT and facts.won == () and os.listdir(tmp_path) == []


def test_slow_ones_are_yellow():
    findings = judge_storage([storage(0, 2, commit_s=3.0), storage(1, 2, read_bytes_per_s=1e6)])
    assert [finding.check for finding in findings if finding.level is Level.YELLOW] == ["output: write", "output: read"]


def test_partners_are_on_other_nodes():
    places = [place(rank) for rank in range(6)]
    everybody = [True] * 6
    assert [_partner(places, everybody, rank) for rank in range(6)] == [2, 2, 4, 4, 0, 0]
    assert _partner(places[:2], [True, True], 0) == 1 and _partner(places[:1], [True], 0) == 0
    assert _partner(places, [True, True, False, False, False, True], 0) == 5


def test_reading_a_part(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10_000))
    assert read_rate(tmp_path / "file", 100, offset=5_000) > 0
    assert nearest_folder(tmp_path / "file") == tmp_path


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        (LUSTRE, Quota(free_bytes=640 * 1024, free_files=99)), (LUSTRE_NO_LIMIT, Quota(free_bytes=None, free_files=None)),
        (LOCAL, Quota(free_bytes=GIB, free_files=None)), ("lfs: error: not a Lustre file system\n", None), ("", None),
    ],
)
def test_quotas(text, quota):
    assert parse_quota(text) == quota


SPACE = SpaceFacts(folder="/scratch", free_bytes=100 * GIB, free_files=10**6)
NEED = Writes(likely_bytes=10 * GIB, most_bytes=20 * GIB)


@pytest.mark.parametrize(
    ("changes", "levels"),
    [
        ({}, ["green", "green", "not here"]),
        ({"free_bytes": 15 * GIB}, ["yellow", "green", "not here"]),
        ({"free_bytes": 5 * GIB}, ["red", "green", "not here"]),
        ({"free_files": None}, ["green", "green", "not here"]),
        ({"free_files": 5000}, ["green", "yellow", "not here"]),
        ({"free_files": 10}, ["green", "red", "not here"]),
        ({"quota": Quota(free_bytes=None, free_files=None)}, ["green", "green", "green"]),
        ({"quota": Quota(free_bytes=GIB, free_files=None)}, ["green", "green", "red"]),
        ({"quota": Quota(free_bytes=15 * GIB, free_files=10**6)}, ["green", "green", "yellow"]),
        ({"quota": Quota(free_bytes=None, free_files=50)}, ["green", "green", "red"]),
    ],
)
def test_room(changes, levels):
    assert [str(finding.level) for finding in judge_space(dataclasses.replace(SPACE, **changes), NEED)] == levels


def test_room_without_a_job():
    assert judge_space(dataclasses.replace(SPACE, free_bytes=0), None)[0].level is Level.GREEN


def test_this_file_system_is_asked(tmp_path):
    facts = gather_space(tmp_path)
    assert facts.folder == str(tmp_path) and facts.free_bytes > 0


def test_a_quota_tool_is_asked(tmp_path, monkeypatch):
    tool = tmp_path / "lfs"
    tool.write_text(f"#!/bin/sh\n[ \"$1 $2\" = 'quota -q' ] && [ -d \"$5\" ] && printf '%s' '{LUSTRE}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gather_space(tmp_path).quota == Quota(free_bytes=640 * 1024, free_files=99)


def job(output, **sampling):
    return job_from_tables({
        "model": {"path": "m"}, "data": {"prompts": "p", "output": str(output)}, "sampling": {"max_tokens": 100, **sampling},
    })


def test_what_a_run_writes(tmp_path):
    new = expected_writes(job(tmp_path / "new", n=2), 1000)
    # Segments and the merged file: 2 x 2000 rows of 80 bytes and at most 100 tokens of 4 + 4.5 bytes.
    assert new.most_bytes == 4000 * (80 + 850) and new.likely_bytes == 4000 * (80 + 425)
    run = tmp_path / "begun"
    create_or_open(run, RunIdentity(input_fingerprint="x", num_rows=1000, num_samples=2, model={}, sampling={}))
    assert expected_writes(job(run, n=2), 1000) == new


@needs_root
def test_what_a_run_writes_where_one_may_not_look(tmp_path):
    """That it cannot be written is found by trying."""
    with secret_folder() as secret, another_user():
        assert expected_writes(job(secret / "run"), 10) == expected_writes(job(tmp_path / "new"), 10)
