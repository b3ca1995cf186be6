"""Start the ranks of a distributed job on the CPU (gloo), and read what each of them writes."""

import gc
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing import connection, forkserver

import pytest

RANKS = multiprocessing.get_context("forkserver")


def launch(directory, script, processes=2, arguments=(), timeout=300, environment=None):
    """Run a script on all ranks and return the contents of the `rank{i}.json` files that it writes.

    The first argument of the script is the directory.
    """
    codes, logs = run_ranks(directory, script, processes, [directory, *arguments], timeout, environment)
    assert not any(codes), "\n".join(f"rank {rank}:\n{log[-3000:]}" for rank, log in enumerate(logs) if codes[rank])
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(processes)]


def run_ranks(directory, script, processes=2, arguments=(), timeout=300, environment=None):
    """Run a script on all ranks, and return the exit code and the output of each.

    The ranks are forked from a process that has imported torch and Transformers, because these imports take most of the
    time of a short script.
    """
    path = directory / "script.py"
    path.write_text(script)
    RANKS.set_forkserver_preload(["tests.helpers.loop", "tests.helpers.models", "tests.helpers.digits"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ":".join(sys.path))  # for the imports of the process that forks
        forkserver.ensure_running()
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(environment or {})}
    logs = [directory / f"rank{rank}.log" for rank in range(processes)]
    ranks = [
        RANKS.Process(target=run_rank, args=([path, *arguments], log, {**common, **rank_variables(rank, processes)}))
        for rank, log in enumerate(logs)
    ]
    for rank in ranks:
        rank.start()
    wait(ranks, timeout)
    return [rank.exitcode for rank in ranks], [log.read_text() for log in logs]


def rank_variables(rank, processes):
    """Return the environment variables with which torchrun starts a rank on a single machine."""
    rank, processes = str(rank), str(processes)
    return {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}


def run_rank(script_and_arguments, log, environment):
    """Run a script in this process, with its output in a file."""
    multiprocessing.set_start_method("fork", force=True)  # of data loaders' workers, as outside of a fork server
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    gc.freeze()  # as in tests/conftest.py
    sys.argv = list(map(str, script_and_arguments))
    runpy.run_path(sys.argv[0], run_name="__main__")


def wait(ranks, timeout):
    """Wait until all ranks have ended. If one fails or the time is over, kill the others, which would wait for it."""
    deadline = time.monotonic() + timeout
    while running := [rank for rank in ranks if rank.is_alive()]:
        ended = connection.wait([rank.sentinel for rank in running], deadline - time.monotonic())
        if not ended or any(rank.exitcode for rank in ranks):
            for rank in running:
                rank.kill()
                rank.join()


def free_port():
    """Return a port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(script_and_arguments, processes=2, timeout=300):
    """Run a script by torchrun, to its end or its failure."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", *map(str, script_and_arguments)]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
