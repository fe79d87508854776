"""Runs recipes in one process, so that imports are paid once: a JSON list of flags in, the outcome out, line by line.

The client of the Hub reads its address when it is imported, so this cannot be the test's own process.
"""

import contextlib
import io
import json
import logging
import sys

from gkd.run import run


def outcome(argv: list[str]) -> dict[str, object]:
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    logging.root.addHandler(handler)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(argv=argv)
            code: object = 0
        except SystemExit as stopped:
            code = stopped.code
    logging.root.removeHandler(handler)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(outcome(json.loads(line))), flush=True)
