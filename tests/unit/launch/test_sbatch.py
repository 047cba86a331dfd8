"""The sbatch script: what it says, and that quoting survives everything, judged by a real bash."""

from __future__ import annotations

import dataclasses
import re
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpcinfer.config.load import from_tables
from hpcinfer.config.site import Site
from hpcinfer.errors import ConfigError
from hpcinfer.launch.sbatch import BatchJob, as_argument, comment, describe, directive, quote, quote_with_variables, render
from hpcinfer.launch.shape import Shape

ONE_NODE = Shape(nodes=1, ranks=2, ranks_per_node=2)
# What arguments of a process and names of files can hold: anything but NUL. Half of it is what a shell takes for its own.
letters = st.sampled_from(" '\"\\$`#!\n\t;&|<>(){}[]*?~%-=^@+,é漢") | st.characters(exclude_characters="\0", exclude_categories=("Cs",))
words = st.text(letters, max_size=20)
ODD = "a b'c\"d\ne$HOME`f`\\g%h#i;j&k 漢"


def batch(shape: Shape = ONE_NODE, **changes) -> BatchJob:
    site = from_tables(Site, changes.pop("site", {}), "the site")
    facts = {"name": "demo", "job_file": "jobs/demo.toml", "output": "runs/demo", "time": "01:00:00", "python": "/venv/bin/python"}
    return BatchJob(site=site, shape=shape, **{**facts, **changes})


def bash(script: str, **variables: str) -> str:
    """What a real bash writes; it must end with 0 and complain of nothing."""
    result = subprocess.run(
        ["bash", "-c", script], env={"PATH": "/usr/bin:/bin", **variables}, capture_output=True, timeout=60, check=False
    )
    assert result.returncode == 0 and result.stderr == b"", (script, result)
    return result.stdout.decode(errors="surrogateescape")


def section(script: str, name: str) -> str:
    """The lines of a script below "# ---- name", up to the next."""
    return re.search(rf"^# ---- {name}.*?\n(.*?)(?=^# ----|\Z)", script, re.MULTILINE | re.DOTALL).group(1)


def argv(script: str, **variables: str) -> list[str]:
    """What the script would start its ranks with: srun's arguments, the ranks' among them, as a real bash passes them on."""
    told = 'srun() { printf "%s\\0" srun "$@"; }\n'
    return bash(told + section(script, "ranks") + "wait", **variables).split("\0")[:-1]


def directives(script: str) -> dict[str, str]:
    """The #SBATCH lines, read by Slurm's rules: double quotes, and backslashes inside."""
    found = {}
    for line in re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE):
        name, _, value = line.partition("=")
        if value.startswith('"'):
            assert re.fullmatch(r'"(?:[^"\\]|\\["\\])*"', value), line
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        else:
            assert not re.search(r"[\s#'\\\"]", value), line
        found[name] = value
    return found


def test_the_facts_of_job_and_site():
    site = {
        "slurm": {
            "partition": "gpu", "account": "me", "qos": "high", "constraint": "h100&ib", "memory": "0", "cores_per_rank": 4,
            "gpu_type": "h100", "gpus_per_node": 8, "mpi": "pmix", "options": ["--exclusive", "--comment=a b"],
            "srun_options": ["--cpu-bind=cores"], "signal_s": 30, "max_lives": 7,
        },
        "environment": {"modules": ["cuda/13.0", "a b"], "venv": "$HOME/my env", "setup": ["umask 027"], "variables": {"UCX_TLS": "rc,sm"}},
    }  # fmt: skip
    script = render(batch(Shape(nodes=2, ranks=16, ranks_per_node=8, gpus_per_node=8), site=site, site_name="mine", overrides=("a.b=c d",)))
    assert directives(script) == {
        "--job-name": "demo", "--nodes": "2", "--ntasks": "16", "--ntasks-per-node": "8", "--cpus-per-task": "4",
        "--gpus-per-node": "h100:8", "--time": "01:00:00", "--partition": "gpu", "--account": "me", "--qos": "high",
        "--constraint": "h100&ib", "--mem": "0", "--exclusive": "", "--comment": "a b", "--signal": "B:USR1@30", "--requeue": "",
        "--open-mode": "append", "--output": "%x-%j.log",
    }  # fmt: skip
    assert argv(script) == [
        "srun", "--kill-on-bad-exit=1", "--mpi=pmix", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=4",
        "--gpus-per-node=h100:8", "--cpu-bind=cores", "python3", "-m", "hpcinfer", "run", "--set", "a.b=c d", "jobs/demo.toml",
    ]  # fmt: skip
    for line in (
        "umask 027", "module load cuda/13.0 'a b' || finish 1", 'source "$HOME/my env/bin/activate" || finish 1', "max_lives=7",
        "[[ -v UCX_TLS ]] || export UCX_TLS=rc,sm", "export HPCINFER_SITE=mine", "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}",
    ):  # fmt: skip
        assert line in script.splitlines()


def test_nodes_that_are_not_filled():
    """srun would spread the ranks by cores."""
    script = render(batch(Shape(nodes=2, ranks=12, ranks_per_node=8, gpus_per_node=8)))
    assert directives(script)["--ntasks"] == "16" and directives(script)["--ntasks-per-node"] == "8"
    options = argv(script)
    assert {"--nodes=2", "--ntasks=12", "--distribution=plane=8"} < set(options) and "--ntasks-per-node=8" not in options


def test_a_site_may_have_its_own_values_of_what_scripts_set():
    script = render(batch(site={"environment": {"variables": {"OMP_WAIT_POLICY": "active"}}}))
    assert [line for line in script.splitlines() if "OMP_WAIT_POLICY" in line] == [
        "[[ -v OMP_WAIT_POLICY ]] || export OMP_WAIT_POLICY=active"
    ]


def test_what_marks_the_end():
    assert "markers=(done.json)" in render(batch()).splitlines()
    assert "markers=(done.json trial.json)" in render(batch(is_trial=True)).splitlines()


def test_without_a_site():
    script = render(batch())
    assert argv(script)[-5:] == ["/venv/bin/python", "-m", "hpcinfer", "run", "jobs/demo.toml"]
    assert "HPCINFER_SITE" not in script and "module" not in script


def test_a_container_and_an_environment_of_the_node():
    container = {"environment": {"container": ["apptainer", "exec", "$HOME/a b.sif"], "python": "/opt/$WHICH/python"}}
    script = render(batch(site=container))
    command = ["apptainer", "exec", "/home/me/a b.sif", "/opt/x y/python", "-m", "hpcinfer", "run", "jobs/demo.toml"]
    assert argv(script, HOME="/home/me", WHICH="x y")[-8:] == command
    script = render(batch(site={"scratch": {"folder": "/local/$USER's", "environment_tar": "$HOME/a b.tar"}}))
    body = re.sub(r"^on_every_node\(\) \{.*?^\}", "", section(script, "node-local"), flags=re.MULTILINE | re.DOTALL)
    told = 'on_every_node() { printf "%s\\0" "$@"; }\n'
    words_of_nodes = bash(told + body + 'printf "%s" "$TMPDIR"', USER="me", HOME="/home/me", SLURM_JOB_ID="7").split("\0")
    mine = "/local/me's/hpcinfer-7"
    assert words_of_nodes == [
        "mkdir", "-p", "--", f"{mine}/tmp", f"{mine}/environment",
        "tar", "-xf", "/home/me/a b.tar", "-C", f"{mine}/environment", f"{mine}/tmp",
    ]  # fmt: skip
    assert argv(script, scratch=mine)[-5] == f"{mine}/environment/bin/python3"


def test_arrays_steps_and_sites_without_requeue():
    array = Shape(nodes=1, ranks=2, ranks_per_node=2, tasks=3)
    script = render(batch(array))
    assert directives(script)["--array"] == "1-3" and directives(script)["--output"] == "%x-%A_%a.log"
    assert describe(batch(array)) == "jobs/demo.toml as an array of 3 tasks, each on 1 node with 2 ranks"
    # Singletons of one name wait for each other: there tasks are jobs of their own.
    script = render(batch(array, site={"slurm": {"requeue": False}}))
    assert "--array" not in directives(script) and "--no-requeue" in directives(script)
    assert "--dependency=singleton" in script and "--dependency=singleton" not in render(batch(array))
    steps = Shape(nodes=2, ranks=8, ranks_per_node=4, gpus_per_node=4, steps=4)
    script = render(batch(steps, site={"slurm": {"gpus_per_node": 4}}))
    commands = " ".join(argv(script)).split("srun ")[1:]
    one = "--kill-on-bad-exit=1 --mpi=pmi2 --nodes=1 --ntasks=2 --ntasks-per-node=2 --gpus-per-node=2 --exact --mem=0"
    assert [command.strip() for command in commands] == [f"{one} /venv/bin/python -m hpcinfer run --set parallel.dp=1 jobs/demo.toml"] * 4


@example(text=ODD)
@given(text=words)
def test_a_word_of_bash_is_exactly_the_text(text):
    assert bash(f"printf %s {quote(text)}") == text


@example(text=ODD, value=ODD)
@given(text=words, value=words)
def test_variables_are_replaced_and_nothing_else(text, value):
    text = text.replace("$", "")
    assert bash(f"printf %s {quote_with_variables(f'{text}$A_1{{{text}')}", A_1=value) == f"{text}{value}{{{text}"
    assert bash(f"printf %s {quote_with_variables(f'{text}${{A_1}}x$')}", A_1=value) == f"{text}{value}x$"


@example(text=ODD)
@given(text=words)
def test_a_comment_is_one_line(text):
    assert bash(f"{comment(text)}\nprintf after") == "after"


@example(value=ODD.replace("\n", ""))
@example(value='"')
@example(value="\\")
@given(value=words)
def test_a_directive_carries_the_value_or_refuses_it(value):
    try:
        line = directive(f"--comment={value}")
    except ConfigError as error:
        assert re.search(r"[\x00-\x1f\x7f]", value) and error.fix
        return
    assert directives(line) == {"--comment": value}


@settings(max_examples=30)
@given(job_file=words.filter(bool), overrides=st.lists(words, max_size=3), output=words.filter(bool), python=words.filter(bool),
       site_name=words, value=words, command=st.lists(words, max_size=3))  # fmt: skip
def test_any_script_is_valid_and_starts_what_was_asked_for(job_file, overrides, output, python, site_name, value, command):
    job = batch(
        job_file=job_file, overrides=tuple(overrides), output=output, python=python, site_name=site_name, command=command,
        site={"environment": {"variables": {"X": value}}},
    )  # fmt: skip
    script = render(job)
    subprocess.run(["bash", "-n"], input=script.encode(), check=True, timeout=60)
    expected = [python, "-m", "hpcinfer", "run", *(word for override in overrides for word in ("--set", override))]
    assert argv(script)[6:] == [*expected, as_argument(job_file)]
    assert bash(re.search(r"^run=.*?(?=^markers=)", script, re.M | re.S).group(0) + 'printf %s "$run"') == as_argument(output)
    environment = section(script, "environment")
    assert bash(re.search(r"^\[\[ -v X .*?(?=^export OMP_NUM)", environment, re.M | re.S).group(0) + 'printf %s "$X"') == value


def test_what_slurm_cannot_carry_is_refused():
    for changes in ({"name": "a\nb"}, {"time": "1\n"}):
        with pytest.raises(ConfigError, match="Slurm cannot carry it"):
            render(dataclasses.replace(batch(), **changes))


def test_odd_names_stay_whole():
    script = render(batch(job_file=f"-{ODD}", output=ODD, overrides=(f"model.path={ODD}",), command=("hpcinfer", ODD)))
    assert argv(script)[-3:] == ["--set", f"model.path={ODD}", f"./-{ODD}"]
    assert script.splitlines()[1].startswith("# -a b'c") and "\\n" in script.splitlines()[1]
