"""Started by a launcher, once per rank: runs the cases of a JSON file. See cases.py."""

import faulthandler
import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

faulthandler.dump_traceback_later(float(sys.argv[2]), exit=True)  # a hang shows where, and ends by itself
torch.set_num_threads(1)

from cases import Case, run  # noqa: E402 - the imports are slow, and under the watch too

if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    for values in plan["cases"]:
        print(f"== {values['name']}", flush=True)
        gc.collect()
        gc.freeze()  # every training collects garbage in full: what is imported is none
        run(Case(**values), Path(plan["models"]), Path(plan["folder"]))
    if dist.is_initialized():
        dist.destroy_process_group()
