"""The command line: exit codes, messages without tracebacks, and verbs that start at once and without torch."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import hpcinfer
from hpcinfer.cli import main as cli
from hpcinfer.cli.convert import parse_share
from hpcinfer.cli.run import _limit
from hpcinfer.data.convert.base import ConvertOptions
from hpcinfer.data.generations import encode_generations
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.errors import ExitCode, ResumableError, UsageError
from hpcinfer.request import Generation, Status

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "mpi4py", "transformers", "cupy")


def hpcinfer_command(*arguments, **settings):
    return subprocess.run(
        [sys.executable, "-m", "hpcinfer", *map(os.fspath, arguments)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120, **settings,
    )  # fmt: skip


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "one", "id": "a"}\nbad\n{"prompt": "two"}\n')
    return path


@pytest.fixture
def verb(monkeypatch):
    """Registers a verb that does what the test says."""

    def register(execute):
        module = types.ModuleType("fake_verb", "A fake verb.")
        module.configure = lambda parser: parser.add_argument("--number", type=int, default=3)
        module.execute = execute
        monkeypatch.setitem(sys.modules, "fake_verb", module)
        monkeypatch.setitem(cli.VERBS, "fake", cli.Verb("fake_verb", "for tests"))

    return register


def test_help_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, verb in cli.VERBS.items():
        assert name in shown and verb.help in shown


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hpcinfer {hpcinfer.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no verb"),
        (["exprot"], "did you mean export?"),
        (["--frobnicate"], "--frobnicate"),
        (["convert"], "required"),
        (["convert", "a", "b", "--prompt-col", "x"], "--prompt-col"),
        (["inspect", "x", "--rows", "many"], "invalid int"),
        (["inspect", "x", "--rows", "-1"], "--rows -1"),
        (["convert", "a", "b", "--max-rejected", "some"], "--max-rejected"),
        (["export", "a", "-", "--json"], "--json"),
    ],
)
def test_usage_errors(capsys, arguments, words):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert words in shown.err and "Traceback" not in shown.err and not shown.out


def test_exit_codes_of_errors(capsys, verb):
    def resumable(args):
        raise ResumableError("the disk is full", found="0 bytes", fix="make room")

    verb(resumable)
    assert cli.main(["fake"]) == 3
    assert capsys.readouterr().err == "hpcinfer: the disk is full\n  found: 0 bytes\n  fix:   make room\n"
    assert cli.main(["--traceback", "fake"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_values_arrive_and_codes_return(verb):
    verb(lambda args: args.number)
    assert cli.main(["fake"]) == 3
    assert cli.main(["fake", "--number", "1"]) == 1


def test_interrupts_and_system_errors(capsys, verb):
    def interrupted(args):
        raise KeyboardInterrupt

    def refused(args):
        raise PermissionError(13, "Permission denied", "/a/file")

    verb(interrupted)
    assert cli.main(["fake"]) == 130
    verb(refused)
    assert cli.main(["fake"]) == 1
    assert "Permission denied: '/a/file'" in capsys.readouterr().err


def test_a_bug_is_not_hidden(verb):
    verb(lambda args: {}["no such key"])
    with pytest.raises(KeyError):
        cli.main(["fake"])


def test_a_verb_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "later", cli.Verb("hpcinfer.cli.no_such_module", "one day"))
    assert cli.main(["later"]) == 2
    assert "not part of this version" in capsys.readouterr().err


def test_defaults_come_from_the_dataclass():
    from hpcinfer.cli import convert

    parser = argparse.ArgumentParser()
    convert.configure(parser)
    args = parser.parse_args(["a", "b"])
    for name in ("prompt_column", "id_column", "sampling_columns", "meta_columns", "dataset"):
        assert getattr(args, name) == getattr(ConvertOptions(), name)


def test_shares():
    assert parse_share("20", "--x")(100) == 20 and parse_share("1%", "--x")(250) == 2
    assert parse_share("100%", "--x")(7) == 7
    for text in ("", "-1", "1.5", "x%", "%"):
        with pytest.raises(UsageError):
            parse_share(text, "--x")


def test_convert_inspect_export(tmp_path, jsonl, capsys):
    assert cli.main(["convert", str(jsonl), str(tmp_path / "p.h5")]) == 0
    shown = capsys.readouterr()
    assert "p.h5: 2 rows of text" in shown.out and "1 rejected" in shown.out
    assert "in.jsonl:2: not valid JSON" in shown.err
    assert cli.main(["convert", str(jsonl), str(tmp_path / "p.h5"), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_rejected"] == 1
    assert cli.main(["inspect", str(tmp_path / "p.h5"), "--json", "--rows", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["first_rows"] == [{"row": 0, "id": "a", "prompt": "one"}]
    assert cli.main(["inspect", str(tmp_path / "p.h5")]) == 0
    assert "2 rows" in capsys.readouterr().out
    generations = [Generation(row=0, status=Status.OK, text="1"), Generation(row=1, status=Status.OK, text="2")]
    (tmp_path / "g.h5").write_bytes(encode_generations(generations, "u"))
    arguments = ["export", str(tmp_path / "g.h5"), str(tmp_path / "g.jsonl"), "--prompts", str(tmp_path / "p.h5")]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == 2
    assert [json.loads(line)["id"] for line in (tmp_path / "g.jsonl").read_text().splitlines()] == ["a", None]
    assert cli.main(arguments) == 1
    assert "exists" in capsys.readouterr().err


def test_too_many_rejects_fail(tmp_path, jsonl, capsys):
    assert cli.main(["convert", str(jsonl), str(tmp_path / "p.h5"), "--max-rejected", "0"]) == 1
    assert "1 line rejected, 0 allowed" in capsys.readouterr().err


def test_export_to_a_pipe_that_closes(tmp_path):
    generations = [Generation(row=n, status=Status.OK, text="x" * 1000) for n in range(2000)]
    (tmp_path / "g.h5").write_bytes(encode_generations(generations, "u"))
    command = f"{sys.executable} -m hpcinfer export g.h5 - | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == cli.BROKEN_PIPE and result.stderr == b""
    assert json.loads(result.stdout)["row"] == 0


def test_ctrl_c_stops_a_conversion_and_leaves_nothing(tmp_path):
    os.mkfifo(tmp_path / "in.jsonl")
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcinfer", "convert", "in.jsonl", "p.h5"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        # Started in the background of a shell, a test run ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process, open(tmp_path / "in.jsonl", "w") as source:  # opens once the conversion has opened its end
        source.write('{"prompt": "a"}\n')
        source.flush()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "hpcinfer: interrupted\n"
    assert os.listdir(tmp_path) == ["in.jsonl"]


_IMPORTS = """
import json, sys, time
begin = time.process_time()
from hpcinfer.cli.main import main
code = main(sys.argv[1:])
used = time.process_time() - begin
print(json.dumps({"code": code, "cpu_s": used, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def test_verbs_without_a_model_start_at_once_and_without_torch(tmp_path, jsonl):
    generation = Generation(row=0, status=Status.OK, token_ids=np.arange(3))
    (tmp_path / "g.h5").write_bytes(encode_generations([generation], "u"))
    commands = [["--help"], ["--version"], *([name, "--help"] for name in cli.VERBS)]
    commands += [["convert", jsonl, tmp_path / "p.h5"], ["inspect", tmp_path / "p.h5"], ["inspect", tmp_path / "g.h5"]]
    commands += [["export", tmp_path / "g.h5", tmp_path / "g.jsonl"]]
    for command in commands:
        if command[0] in cli.VERBS and not (ROOT / f"{cli.VERBS[command[0]].module.replace('.', '/')}.py").exists():
            continue
        result = subprocess.run(
            [sys.executable, "-c", _IMPORTS, *map(str, command)], capture_output=True, text=True, timeout=120,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        measured = json.loads(result.stdout.splitlines()[-1])
        assert measured["code"] == ExitCode.DONE, (command, result.stderr)
        assert not set(measured["modules"]) & set(HEAVY), command
        # Processor time: the machine may be busy with other things.
        assert measured["cpu_s"] < 1.0, command
        if command[-1] in ("--help", "--version"):
            assert not set(measured["modules"]) & {"numpy", "h5py", "tokenizers"}, command


def test_no_file_is_one_message(tmp_path):
    for arguments in (["inspect", "none"], ["export", "none", "out"], ["convert", "none.jsonl", "out.h5"]):
        result = hpcinfer_command(*arguments, cwd=tmp_path)
        assert result.returncode == 1
        assert "no such file" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_closed_streams(jsonl, tmp_path, closed):
    """No traceback, and no file is written into that took a stream's number."""
    out = tmp_path / "out.h5"
    code = f"import os, sys; [os.close(n) for n in {closed}]; os.execv(sys.executable, [sys.executable, '-m', 'hpcinfer', *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", jsonl, out], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr
    with open_prompts(out) as reader:
        assert [row.text for row in reader.rows()] == ["one", "two"]


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1.5"])
def test_a_trial_of_no_rows_is_not_a_run_of_all(limit, capsys):
    assert _limit("005") == "data.limit=5"  # TOML would take no zeros
    assert cli.main(["run", "nosuch.toml", "--limit", limit]) == ExitCode.USAGE
    assert "not a number of rows" in capsys.readouterr().err
    assert cli.main(["run", "nosuch.toml", "--limit", "5"]) == ExitCode.USAGE
    assert "cannot read the job file" in capsys.readouterr().err


def test_counts_of_one(jsonl, tmp_path, capsys):
    jsonl.write_text('{"prompt": "one"}\n')
    assert cli.main(["convert", str(jsonl), str(tmp_path / "out.h5")]) == 0
    assert cli.main(["inspect", str(tmp_path / "out.h5")]) == 0
    shown = capsys.readouterr().out
    assert "1 row of text" in shown and ", 1 row, " in shown


def test_what_is_no_hdf5_can_be_converted(jsonl, capsys):
    assert cli.main(["inspect", str(jsonl)]) == 1
    assert "hpcinfer convert" in capsys.readouterr().err
