"""Start several processes on the CPU (gloo) by torchrun, and get back what each has written."""

import json
import socket
import subprocess
import sys


def launch(directory, script, processes=2, arguments=(), timeout=300, environment=None):
    """Run a script that writes `rank{i}.json` into the directory that is its first argument."""
    (directory / "script.py").write_text(script)
    done = torchrun([directory / "script.py", directory, *arguments], processes, timeout, environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(processes)]


def torchrun(script_and_arguments, processes=2, timeout=300, environment=None):
    """Run a script by several processes, to its end or its failure."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command += ["--master_addr=127.0.0.1", f"--master_port={free.getsockname()[1]}"]
    environment = {
        **(environment or {}),
        "PYTHONPATH": ":".join(sys.path),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
    }
    command += map(str, script_and_arguments)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
