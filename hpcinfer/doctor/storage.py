"""The file system of the output: what trying it came to (`file_probe`)."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from hpcinfer.doctor.file_probe import APPEAR_S, LARGE_BYTES, NUM_NAMES, StorageFacts
from hpcinfer.doctor.finding import Finding, absent, green, places_of, red, who, yellow
from hpcinfer.units import format_bytes

SLOW_COMMIT_S = 1.0
SLOW_BYTES_PER_S = 20e6
"""A file system below it holds up replicas that commit, and merges for hours."""
_FIXES = {
    errno.EROFS: "it is mounted read-only there: choose another data.output, or have it mounted for writing",
    errno.ENOSPC: "make room, or choose another data.output",
    errno.EDQUOT: "the quota is used up: make room, have it raised, or choose another data.output",
    errno.EACCES: "choose a data.output that you may write to",
    errno.EPERM: "choose a data.output that you may write to",
}


def judge_storage(facts: Sequence[StorageFacts], *, is_output: bool = True) -> list[Finding]:
    """What all ranks found out. `is_output`: False where no job says where output goes, and the working folder was tried."""
    members = [each for each in facts if each.took_part]
    broken = [each for each in members if each.error]
    writing = [each for each in members if not each.error]
    findings = [_unwritable(broken, is_output) if broken else _writing(writing)]
    if writing:
        unseen = [each for each in writing if each.appeared_s is None]
        findings.append(_sharing(writing, unseen))
        if not unseen:
            findings += [_exclusive(writing), _reading(writing)]
    return findings


def _unwritable(broken: Sequence[StorageFacts], is_output: bool) -> Finding:
    places = places_of(broken)
    found = f"{broken[0].folder} cannot be used by {who(places)}: {broken[0].error}"
    if not is_output:
        return yellow("output: write", found, "name a job file, or start it in the folder that output will go to", places)
    fix = _FIXES.get(broken[0].error_number, "choose another data.output, or have the file system looked at")
    return red("output: write", found, fix, places)


def _writing(writing: Sequence[StorageFacts]) -> Finding:
    slowest = max(writing, key=lambda each: each.commit_s)
    rate = min(each.write_bytes_per_s for each in writing)
    found = (
        f"{slowest.folder}: a file is written, fsynced and renamed in {slowest.commit_s * 1e3:.1f} ms, "
        f"{format_bytes(LARGE_BYTES)} at {format_bytes(rate)}/s"
    )
    if slowest.commit_s > SLOW_COMMIT_S or rate < SLOW_BYTES_PER_S:
        fix = "if it stays so, choose a faster file system, or commit less often: run.segment_s, run.segment_rows"
        return yellow("output: write", f"{found}; slowest: {who([slowest.place])}", fix, [slowest.place])
    return green("output: write", found)


def _sharing(writing: Sequence[StorageFacts], unseen: Sequence[StorageFacts]) -> Finding:
    if unseen:
        places = places_of(unseen)
        return red(
            "output: shared",
            f"{who(places)} did not see in {writing[0].folder} what other ranks wrote there, for {APPEAR_S:g} s",
            "data.output must be one folder for all nodes, on a parallel file system or NFS; node-local disks and /tmp are "
            "not", places,
        )
    if len({each.place.node for each in writing}) == 1:
        return absent("output: shared", "one node" if len(writing) > 1 else "one rank")
    slowest = max(each.appeared_s for each in writing)
    return green("output: shared", f"all nodes see each other's files, after {slowest * 1e3:.0f} ms at most")


def _exclusive(writing: Sequence[StorageFacts]) -> Finding:
    check = "output: exclusive names"
    winners = {
        number: [each.place for each in writing for name in each.won if name == number] for number in range(NUM_NAMES)
    }
    twice = {number: places for number, places in winners.items() if len(places) > 1}
    lost = [number for number, places in winners.items() if not places]
    fix = (
        "use a file system that keeps both (Lustre, GPFS, BeeGFS, NFS from version 3 on); without them rows are generated "
        "twice, and files of writers may meet"
    )
    if twice:
        places = list(dict.fromkeys(next(iter(twice.values()))))
        calls = " and ".join(sorted({_call(number) for number in twice}))
        found = f"{calls}: {len(twice)} of {NUM_NAMES} names were given twice, one of them to {who(places)}"
        return red(check, found, fix, places)
    if lost:
        return red(check, f"{_call(lost[0])}: {len(lost)} of {NUM_NAMES} names could be made by no rank", fix)
    to = f" and went to one of {len(writing)} ranks" if len(writing) > 1 else ""
    return green(check, f"each of {NUM_NAMES} names could be made once{to}, by O_EXCL and by link()")


def _reading(writing: Sequence[StorageFacts]) -> Finding:
    slowest = min(writing, key=lambda each: each.read_bytes_per_s)
    found = f"{format_bytes(slowest.read_bytes_per_s)}/s or more of a file just written"
    if slowest.read_bytes_per_s < SLOW_BYTES_PER_S:
        place = slowest.place
        return yellow("output: read", f"{found}; slowest: {who([place])}", "look at that node's mount and network", [place])
    return green("output: read", found)


def _call(number: int) -> str:
    return "link()" if number % 2 else "O_EXCL"
