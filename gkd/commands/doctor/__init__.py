"""`gkd doctor`: a recipe looked at before it costs anything.

alignment: the doctor's look at a teacher with another tokenizer that is compared: which tokens meet, and
    what both can say
attempt: a check of the doctor's that may fail, and one that is told of each of several teachers
cost: the doctor's estimate of a run: memory by the formulas of `gkd plan`, time from optimizer steps that
    are made
draft: the doctor's look at the student as a draft model: whether decoding in its blocks gains anything
examine: `gkd doctor`: what can be known about a run before it costs a GPU-day
models: the doctor's look at the models themselves: loaded as a run loads them, they answer prompts and
    make two steps
rows: the doctor's look at the rows: formats, what is dropped or cut, where an answer begins and whether
    it stops
template: the doctor's look at the chat template: how a teacher likes its own answers in its own form
    and in the student's
tokens: the doctor's look at tokens, without weights: whether a teacher has the student's, and writes a
    chat as it does
view: what the doctor shows: the checklist, and rows with their prompt, target and stop tokens in colour
"""
