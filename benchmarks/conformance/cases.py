"""All cases, in the order of the table."""

from conformance import loss_cases, run_cases, spelling_cases, step_cases

CASES = [*loss_cases.CASES, *step_cases.CASES, *run_cases.CASES, *spelling_cases.CASES]
