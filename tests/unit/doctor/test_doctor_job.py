"""What a job needs: its files, its layout, its memory, and the limits of processes."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from hpcinfer.comm.host import LocalHostChannel
from hpcinfer.config.load import job_from_tables
from hpcinfer.doctor import limits
from hpcinfer.doctor.finding import Level, RankPlace
from hpcinfer.doctor.limits import (
    ClockFacts, LimitFacts, clock_facts, gather_clock, gather_limits, judge_clocks, judge_limits,
)
from hpcinfer.doctor.memory import MemoryFacts, gather_memory, judge_layout, judge_memory, spans_nodes
from hpcinfer.doctor.model import FileFacts, gather_files, gather_model, judge_model
from tests.conftest import ROOT
from tests.doctor_facts import GIB, MODEL, SIZES, change, healthy_facts, place
from tests.other_user import another_user, needs_root, secret_folder

DEMO = ROOT / "datasets/demo-model"
PROMPTS = ROOT / "datasets/demo/prompts.h5"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def make_job(model: Path | str, **sections):
    return job_from_tables({
        "model": {"path": str(model)}, "data": {"prompts": str(sections.pop("prompts", PROMPTS)), "output": "o"}, **sections,
    })


def judged(model: Path | str, **sections) -> dict[str, tuple[str, str, str]]:
    """Check -> level, what was found, fix."""
    job = make_job(model, **sections)
    files = [gather_files(place(0), Path(job.model.path), 1)]
    return {each.check: (str(each.level), each.found, each.fix) for each in judge_model(gather_model(job), files)}


def levels(found):
    return {check: level for check, (level, _, _) in found.items() if level in ("red", "yellow")}


def test_the_demo_model(folder):
    found = judged(folder)
    assert levels(found) == {}
    assert found["model files"][1] == "LlamaForCausalLM: all tensors are there, 1 file, 3.0 MiB"
    assert found["prompts"][1] == "1,000 rows of text" and found["model on all nodes"][0] == "not here"


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    found = judged(folder)
    assert levels(found) == {"tokenizer": "red"} and "copy tokenizer.json" in found["tokenizer"][2]


def test_no_tokenizer_and_prompts_of_token_ids(folder, tmp_path):
    from hpcinfer.data.prompts.prompts_writer import PromptsWriter

    with PromptsWriter(tmp_path / "ids.h5", kind="token_ids") as writer:
        writer.append([1, 2, 3])
    (folder / "tokenizer.json").unlink()
    assert levels(judged(folder, prompts=tmp_path / "ids.h5")) == {"tokenizer": "yellow"}


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert levels(judged(folder)) == {"tokenizer": "red"}


def test_a_missing_shard(folder):
    """The index names two files; one is there."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = judged(folder)
    assert levels(found) == {"model files": "red"}
    assert "1 of 2: model-2.safetensors" in found["model files"][1] and "copy them again" in found["model files"][2]


def test_a_file_that_ends_early(folder):
    os.truncate(folder / "model.safetensors", 2_000_000)
    found = judged(folder)
    assert levels(found) == {"model files": "red"} and "damaged or incomplete" in found["model files"][1]


def test_a_link_without_a_target(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").symlink_to("../blobs/gone")
    found = judged(folder)
    assert found["model on all nodes"][0] == "red" and "cannot read generation_config.json" in found["model on all nodes"][1]


@needs_root
@pytest.mark.parametrize(("name", "check"), [("model.safetensors", "model files"), ("tokenizer.json", "tokenizer")])
def test_a_link_to_where_one_may_not_look(name, check):
    """Files of a download that several users share are links into one folder."""
    with secret_folder() as secret:
        model, prompts = Path(shutil.copytree(DEMO, secret.parent / "model")), shutil.copy(PROMPTS, secret.parent)
        (model / name).rename(secret / name)
        (model / name).symlink_to(secret / name)
        assert levels(judged(model, prompts=prompts)) == {}
        with another_user():
            found = judged(model, prompts=prompts)
        assert levels(found)[check] == "red" and "Permission denied" in found[check][1]


@needs_root
def test_prompts_in_a_folder_that_may_not_be_listed():
    with secret_folder() as secret:
        shutil.copytree(DEMO, secret.parent / "model")
        shutil.copy(PROMPTS, secret)
        with another_user():
            found = judged(secret.parent / "model", prompts=secret)
        assert levels(found) == {"prompts": "red"} and "Permission denied" in found["prompts"][1]


def test_a_name_of_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = judged("meta-llama/Llama-3.1-8B")
    assert found["no network"][0] == "red" and "hf download meta-llama/Llama-3.1-8B" in found["no network"][2]
    assert found["model files"][0] == "red"


def test_no_prompts(folder, tmp_path):
    assert levels(judged(folder, prompts=tmp_path / "none.h5")) == {"prompts": "red"}


def test_nodes_that_see_other_files():
    files = [FileFacts(place=place(2 * node), sizes=dict(SIZES), read_bytes_per_s=1e9) for node in range(3)]
    model = healthy_facts().model
    files = change(files, 1, sizes={**SIZES, "model.safetensors": 5})
    finding = judge_model(model, files)[2]
    assert finding.level is Level.RED and finding.where == ("n1",) and "model.safetensors" in finding.found
    files = change(files, 1, sizes={})
    assert judge_model(model, files)[2].where == ("n1",)
    slow = [dataclasses.replace(each, sizes=dict(SIZES), read_bytes_per_s=1e6) for each in files]
    assert judge_model(model, slow)[5].level is Level.YELLOW


# -- layout and memory ------------------------------------------------------------------------------------------------

def layout_of(parallel: dict, places: list[RankPlace]):
    return judge_layout(make_job("m", parallel=parallel), MODEL, places)


def test_layouts():
    places = [place(rank) for rank in range(4)]
    mesh, findings = layout_of({"tp": 2}, places)
    assert findings[0].found == "4 ranks: dp 2 x pp 1 x sp 1 x tp 2" and not spans_nodes(mesh, places)
    mesh, findings = layout_of({"tp": 4}, places)
    assert findings[0].level is Level.YELLOW and "1 tp groups reach over nodes" in findings[0].found
    assert spans_nodes(mesh, places)
    mesh, findings = layout_of({"tp": 2, "pp": 2}, places)
    assert findings[0].level is Level.GREEN and spans_nodes(mesh, places)
    for parallel in ({"tp": 3}, {"pp": 3}, {"tp": 2, "dp": 1}):
        mesh, findings = layout_of(parallel, places)
        assert mesh is None and findings[0].level is Level.RED and findings[0].fix


def memory_of(free_bytes: int, engine: dict) -> tuple[Level, str]:
    places = [place(0), place(1)]
    job = make_job("m", parallel={"tp": 2}, engine=engine)
    mesh, _ = judge_layout(job, MODEL, places)
    finding = judge_memory(job, MODEL, mesh, [MemoryFacts(place=each, free_bytes=free_bytes) for each in places])[0]
    return finding.level, finding.found


def test_memory():
    assert memory_of(6 * GIB, {})[0] is Level.RED  # 6.3 GiB of weights
    level, found = memory_of(80 * GIB, {})
    assert level is Level.GREEN and "weights of 6.3 GiB (bfloat16)" in found
    # 0.5 GiB are 2048 tokens of 256 KiB; a sequence may have 4096.
    level, found = memory_of(80 * GIB, {"kv_memory": "0.5 GiB"})
    assert level is Level.YELLOW and "K/V of 2,048 tokens" in found
    level, found = memory_of(80 * GIB, {"kv_memory": "0.5 GiB", "max_context": 4096})
    assert level is Level.RED and "ranks 0-1 on n0" in found


def test_memory_of_this_machine():
    one, four = (gather_memory(place(0), num_local_ranks=number, gpu_free_bytes=None).free_bytes for number in (1, 4))
    assert 0 < four < one
    of_gpu = MemoryFacts(place=place(0), free_bytes=5, device_type="cuda")
    assert gather_memory(place(0), num_local_ranks=1, gpu_free_bytes=5) == of_gpu


# -- limits and clocks --------------------------------------------------------------------------------------------------

def test_limits_of_this_process(monkeypatch):
    facts = gather_limits(place(0))
    assert facts.files == resource.getrlimit(resource.RLIMIT_NOFILE)[0] and facts.shared_free_bytes > 0
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (limits.UNLIMITED, limits.UNLIMITED))
    unlimited = gather_limits(place(0))
    findings = judge_limits([unlimited], has_fabric=True, has_gpu=True)
    assert unlimited.files > 10**6 and {finding.level for finding in findings} == {Level.GREEN}


def test_file_handles():
    def level(files: int, num_ranks: int = 1) -> Level:
        facts = [LimitFacts(place=place(rank), files=files, most_files=4096) for rank in range(num_ranks)]
        return judge_limits(facts, has_fabric=False, has_gpu=False)[0].level

    assert [level(100), level(512), level(1024)] == [Level.RED, Level.YELLOW, Level.GREEN]
    assert level(1024, 500) is Level.RED, "connections to 500 ranks"


def test_shared_memory():
    facts = [LimitFacts(place=place(rank), files=9999, most_files=9999, shared_free_bytes=64 * 2**20) for rank in range(2)]
    finding = judge_limits(facts, has_fabric=False, has_gpu=False)[-1]
    assert finding.level is Level.YELLOW and "for 2 ranks" in finding.found and "--shm-size" in finding.fix
    assert judge_limits(facts[:1], has_fabric=False, has_gpu=False)[-1].level is Level.GREEN


def test_the_time_of_day():
    """This rank's perf_counter is 100 s behind rank 0's, and its time of day 3 s ahead."""
    facts = clock_facts(place(2), {"offset_s": -100.0, "error_s": 0.01}, difference_s=1103.0, rank0_difference_s=1000.0)
    assert facts == ClockFacts(place=place(2), ahead_s=3.0, error_s=0.01)


def test_this_clock():
    assert abs(gather_clock(LocalHostChannel(), place(0)).ahead_s) < 1e-3


def test_clocks():
    def of(*ahead: float):
        return judge_clocks([
            ClockFacts(place=place(2 * node), ahead_s=each, error_s=0.001) for node, each in enumerate(ahead)
        ])

    assert of(0.0).level is Level.ABSENT and of(0.0, 0.4, -0.3).level is Level.GREEN
    late = of(0.0, 0.1, -5.0)
    assert late.level is Level.YELLOW and late.where == ("n2",) and "-5.0 s" in late.found
    wrong = of(100.0, 0.0, 0.1)
    assert wrong.level is Level.RED and wrong.where == ("n0",), "rank 0's own may be the wrong one"
