"""Runs stages in new processes without importing anything anew: imports once, then forks what each
line of its input asks for, so that ten interruptions take seconds. The fixture `fork` talks to it.
"""
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import open_clip  # noqa: F401
import timm  # noqa: F401
import torch  # noqa: F401

import common


def run_stage(job, rank):
    """Run a stage as one of several processes, and leave."""
    os.chdir(job["folder"])
    output = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [job["stage"] + ".py", *job["flags"]]
    if job["world"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    code = 70
    try:
        stage = importlib.import_module(job["stage"])
        common.run_stage(stage.main, stage.parse_args(job["flags"]))
    except SystemExit as leaving:
        code = leaving.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def progress(path):
    """Return the number of lines of a file, or of files below a folder."""
    if path.is_dir():
        return sum(1 for _ in path.rglob("*"))
    return path.read_text().count("\n") if path.exists() else 0


def is_running(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


# the server may itself have been started by a shell's background job
signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", flush=True)
for line in sys.stdin:
    job, pids = json.loads(line), []
    for rank in range(job["world"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            run_stage(job, rank)
    if job["signal"]:
        while is_running(pids[-1]) and progress(Path(job["watched"])) < job["count"]:
            time.sleep(0.002)
        time.sleep(job["after"])
        os.kill(pids[-1], job["signal"])
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(codes), flush=True)
