"""Student before, student after and teacher on the same prompts: numbers with standard errors.

aligned: a teacher with another tokenizer under measurement: asked about text, in its own tokens
bits: bits per byte: what texts cost a model, whatever tokens it reads them in
draft: the student as a draft model for the teacher: how much of what it proposes is taken, and what
    that gains
harness: one harness for the student before training, the student after, and the teacher: fixed prompts,
    fixed seeds
measures: what an evaluation found of one model: numbers with standard errors
public_tasks: named public tasks through lm-eval (EleutherAI's lm-evaluation-harness), beside what the
    harness measures itself
several: several teachers under measurement as one: each prompt is answered, and each answer judged, by its
    row's own
subject: a model under measurement, in this process or on a server: it writes, it is compared with the
    teacher at the targets of (context, text) pairs, and it says -log p of their tokens
target_values: what is measured at a single target: how far a model is from its teacher there, and whether
    both would say the same
task_score: A recipe's own scores: of each completion by itself, and of all completions at once (corpus
    BLEU)
timing: what decoding steps cost: passes over a few tokens behind a prompt in the KV cache, of several models in turn
view: what models are measured on, as student and teacher read it: one completion, behind the prompt of each
"""
