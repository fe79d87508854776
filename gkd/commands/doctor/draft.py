"""The doctor's look at the student as a draft model: whether decoding in its blocks gains anything."""

from __future__ import annotations

from gkd.commands.doctor.view import Diagnosis
from gkd.evaluation.draft import Costs
from gkd.evaluation.measures import Measures


def examine_draft(out: Diagnosis, student: Measures, costs: Costs) -> None:
    """Acceptance, costs and the speed-up that they make; a warning where decoding would be slower than without."""
    found = {way: student.values.get(f"acceptance{way}") for way in ("", "_greedy")}
    taken = [f"{one.value:.0%} {way[1:] or 'sampled'}" for way, one in found.items() if one is not None]
    acceptance = min(one.value for one in found.values() if one is not None)
    gain = min(one.value for key, one in student.values.items() if key.startswith("speedup"))
    message = (
        f"{' and '.join(taken)} of its proposed tokens are taken; one costs {costs.draft / costs.target:.2f} of the "
        f"teacher's, checking {costs.tokens + 1} costs {costs.in_words()}: with draft_tokens={costs.tokens} decoding "
        f"is {gain:.2f} times as fast as the teacher alone, one row at a time"
    )
    best, most = costs.best(acceptance)
    if gain >= 1:
        out.add("Speculation", "ok", message)
    elif most > 1:
        out.add("Speculation", "warning", message, f"draft_tokens={best} would make it {most:.2f}")
    else:
        remedy = "no number of tokens gains here: take a draft with fewer layers, or see what training makes of it"
        out.add("Speculation", "warning", f"{message}: slower", remedy)
