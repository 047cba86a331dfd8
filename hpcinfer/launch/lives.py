"""The constant parts of a batch script: how a job ends, and when it goes on in another life. Text of bash, nothing else.

`sbatch.render` puts them around the ranks: `BEGIN`, `REQUEUE` or `SUCCESSOR`, later `BEFORE`, the ranks, `AFTER`. They use the variables
run (the run directory), markers (files of it that say that all is done), max_lives, scratch, pids (the process ids of srun) and the
function on_every_node.
The rule is that of `AFTER`: nobody but the marker file says that a run is complete; a failure (exit codes 1 and 2) is final; all
else may go on, within a number of lives and as long as two lives in a row do not end with nothing committed.

What "nothing" means is defined in `data.ledger.lives`, by which a start of the program refuses a third such life; `outcome` looks at
the same files in the same way (a test compares the two). Both are needed: the program's rule also counts lives whose batch shell was
lost with its node; this one also counts lives that came to their end before they could register, and those of a chain of successors,
and it spares the queue a job that would only be refused.
"""

BEGIN = """\
# An array task is known by its place in the array: the number of its last task also stands for the whole array.
me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
me=${me:-$SLURM_JOB_ID}
say() { echo "hpcinfer: job $me, life $life: $*"; }
ended_by() { # user, limit, Slurm, or nobody; Slurm knows before this shell is told
    case $(squeue --noheader --states=all --jobs="$me" --format="%T %r") in
        "COMPLETING None" | CANCELLED*) echo user ;;
        "COMPLETING TimeLimit" | TIMEOUT*) echo limit ;;
        COMPLETING* | PENDING* | PREEMPTED* | NODE_FAIL* | REQUEUE*) echo Slurm ;;
        *) echo nobody ;;
    esac
}
finish() { # with an exit code; nothing goes on, unless Slurm itself ends this job (a lost node) and another life can take its place
    trap '' USR1 TERM
    if (($1)) && [[ $(ended_by) == Slurm ]]; then
        say "ended by Slurm, which starts it again${successor:+ as job $successor}"
    elif [[ -n $successor ]]; then
        scancel "$successor"
    fi
    exit "$1"
}
# Until there are ranks to tell, a signal must not end this shell.
warned=
trap warned=yes USR1
trap : TERM
"""

REQUEUE = """\
# Slurm starts a requeued job again under its number, and counts.
life=$((${SLURM_RESTART_COUNT:-0} + 1))
chain=$SLURM_JOB_ID
unset successor
"""

SUCCESSOR = """\
# This site forbids requeue, so the next life is submitted now. It begins when the earlier jobs of this name have ended, also
# when this one is lost with its node; it is cancelled when there is nothing left to do.
life=${1:-1}
chain=${2:-$SLURM_JOB_ID}
successor=
if ((life < max_lives)); then
    job_name=$SLURM_JOB_NAME
    successor=$(
        # The next job would take this one's variables for its own.
        for name in "${!SLURM_@}"; do [[ $name == SLURM_CONF ]] || unset "$name"; done
        sbatch --parsable --dependency=singleton --job-name="$job_name" "$0" "$((life + 1))" "$chain"
    ) || say "no successor could be submitted: this life is the last"
    successor=${successor%%;*}
fi
"""

BEFORE = """\
# ---- what is there before this life
writers() { # of this job in the run directory: an id for each replica of each life
    grep -rlsZ --include='*.json' "\\"job\\": \\"$SLURM_JOB_ID\\"" "$run/writers" | while read -r -d '' writer; do
        writer=${writer##*/}
        echo "${writer%.json}"
    done
}
new_writers() { # of this life
    writers | grep -vxF -e "$writers_before"
}
outcome() { # of this life: rows are committed; it waited, because others had all that was left; or nothing
    local new writer found=waited
    new=$(new_writers)
    for writer in $new; do
        ls "$run/segments/" | grep -qF "seg-$writer-" && echo rows && return
        grep -qsE '"state": "(idle|merging)"|"reason": "(done|no rows)"' "$run/writers/$writer.beat" || found=nothing
    done
    [[ $new ]] && echo "$found" || echo nothing
}
marked() { (cd -- "$run" && cat -- "${markers[@]}") 2>/dev/null; }
marked_before=$(marked)
writers_before=$(writers)
"""

AFTER = """\
# ---- until the ranks end
# srun passes USR1 on to every rank, and would end those that still start: they are told when each step has a writer in the run
# directory. TERM comes to them from Slurm; from here srun would kill them with it.
tell() {
    until (($(new_writers | wc -l) >= ${#pids[@]})); do sleep 0.5; done
    kill -USR1 "${pids[@]}" 2>/dev/null
}
trap 'tell &' USR1
[[ -z $warned ]] || tell &
code=0
for pid in "${pids[@]}"; do
    # A signal interrupts wait. Bash remembers how the process ended.
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid"
    status=$?
    if ((status == 1 || status == 2)); then code=$status; elif ((status && !code)); then code=3; fi
done
# What is asked and done from here on must not die of the TERM that Slurm sends to all processes of a job that it ends.
trap '' USR1 TERM
on_every_node rm -rf -- "$scratch" 2>/dev/null || rm -rf -- "$scratch" # a job that is ended can start no steps

# ---- done, failed, or another life
# srun returns 0 after some forced ends, and kills ranks that are done when another one ends with a code: only the markers count. A
# done.json that was there before may be of an earlier round; it holds where the ranks saw it too, and left without a writer.
is_complete() {
    [[ $(marked) != "$marked_before" ]] ||
        [[ -e $run/done.json && $code == 0 && ! $(new_writers) && $(ended_by) == nobody ]]
}
if is_complete; then
    say "the run is complete"
    finish 0
fi
# What this life came to is noted before anything ends it.
mkdir -p -- "$run/logs"
echo "$(outcome): job $me, life $life, until $(date +%FT%T)" >>"$run/logs/lives-$chain"
case $(ended_by) in
    user)
        say "ended by its user; unless it is requeued, submit it again to go on from what is committed"
        finish 3
        ;;
    Slurm) finish 3 ;;
esac
if ((code == 1 || code == 2)); then
    say "failed with exit code $code; to run it again as it is would not help"
    finish "$code"
elif [[ $(tail -n 2 "$run/logs/lives-$chain" | cut -d : -f 1 | xargs) == "nothing nothing" ]]; then
    say "two lives in a row committed nothing: something is wrong that another life would not mend"
    finish 1
elif ((life >= max_lives)); then
    say "not complete, and this is the last of $max_lives lives (slurm.max_lives of the site): submit it again to go on"
    finish 3
elif [[ -v successor ]]; then
    say "not complete; it goes on as job ${successor:-of your own: submit it again}"
    exit 3
fi
say "not complete; it is requeued and goes on"
scontrol requeue "$me" || say "Slurm does not requeue it: submit it again to go on"
exit 3
"""
