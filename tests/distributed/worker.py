"""The cases of a JSON file, one after the other: on one rank that a launcher started, or on two ranks forked here.

See cases.py. Forked, the slow imports are done once for both.
"""

import faulthandler
import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT_S = float(sys.argv[2])
faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # a hang shows where, and ends by itself
torch.set_num_threads(1)

from cases import RANKS, Case, run  # noqa: E402 - the imports are slow, and under the watch too
from forked import ranks  # noqa: E402


def work(plan, say=print):
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # of this process
    for values in plan["cases"]:
        say(f"== {values['name']}")
        gc.collect()
        gc.freeze()  # every training collects garbage in full: what is imported is none
        run(Case(**values), Path(plan["models"]), Path(plan["folder"]))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    if "RANK" in os.environ:
        work(plan)
    else:
        faulthandler.cancel_dump_traceback_later()  # its thread does not survive a fork, and is waited for
        children = ranks(lambda say: work(plan, say), Path(plan["folder"]), RANKS)
        codes = [child.join() for child in children]
        for child in children:
            print(*child.lines, child.said(), sep="\n")
        sys.exit(max(codes))
