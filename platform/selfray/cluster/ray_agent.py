"""Runs between Ray's raylet and one of its agents, so that the agent ends together with the raylet.

    python -S -E ray_agent.py                      waits, in place of an agent that is not needed
    python -S -E ray_agent.py COMMAND ARGUMENTS    runs that agent

Ray's own agents notice the end of their raylet late, and then wait a minute for open connections.
It runs as a file and imports nothing of selfray, so that it starts fast.
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
    if command and not command[0].startswith("-"):  # the raylet appends flags even without COMMAND
        agent = os.fork()
        if not agent:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.execv(command[0], command)
        ended.register(os.pidfd_open(agent), select.POLLIN)
    ended.poll()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
