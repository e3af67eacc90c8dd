"""Stands between Ray's raylet and an agent of its: whoever that is, it ends with the raylet.

    python -S -E ray_agent.py                      waits, in place of an agent that nobody needs
    python -S -E ray_agent.py COMMAND ARGUMENTS    runs that agent

Ray's own agents notice the end of their raylet late, and then wait a minute for open connections.
Run as a file, so that it starts in no time: it imports nothing of selfray's.
"""

import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    raylet = os.pidfd_open(int(os.environ["RAY_RAYLET_PID"]))
    ended = select.poll()
    ended.register(raylet, select.POLLIN)
    if command and not command[0].startswith("-"):  # flags that the raylet adds are not for it
        agent = os.fork()
        if not agent:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.execv(command[0], command)
        ended.register(os.pidfd_open(agent), select.POLLIN)
    ended.poll()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
