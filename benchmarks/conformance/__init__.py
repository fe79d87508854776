"""What a distillation trainer must keep, asked of this package and its peers in the same words.

result: a verdict, and where in whose source a failure comes from
material: models, rows, a tokenizer and two spellings of one text that all adapters are given
watch: what a trainer trained on and how its weights moved, seen from outside
definition: the loss and the step, from their definitions in float64
loss_cases: cases about a loss by itself
step_cases: cases about optimizer steps
run_cases: cases about whole runs: resumed, evaluated along, on two ranks
spelling_cases: cases about teachers of another tokenizer
adapters: one file for each column
table: results/conformance.json as the table of docs/evidence.md
run.py runs it.
"""
