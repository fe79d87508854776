"""docs/fields.md, made from `GKDConfig`: run `python docs/fields.py` after a change to a field; a test holds it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trl import SFTConfig

from gkd import GKDConfig

PAGE = Path(__file__).with_name("fields.md")
HEAD = """# Fields of `GKDConfig`

Beside those of TRL's `SFTConfig`, which all work but for what would have no effect here (`packing`, `loss_type`;
refused). The first group has the names and defaults of `trl.experimental.gkd.GKDConfig`. Each field is an argument in
Python, a flag of every recipe (`--lmbda 0.5`) and a key of its YAML file.

<!-- Made by docs/fields.py from gkd/config/fields.py: change the help there. -->
"""


def page() -> str:
    """The page: a row for each field that is ours."""
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    rows = [
        f"| `{field.name}` | {field.default} | {str(field.metadata['help']).replace('|', chr(92) + '|')} |"
        for field in dataclasses.fields(GKDConfig)
        if field.name not in inherited
    ]
    return HEAD + "\n| field | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
