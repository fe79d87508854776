"""From the config to the objects that do the work; below it nobody sees a config.

checks: models, rows and settings checked against each other before the first step
evaluator: the evaluation of a run, made from what its trainer holds: its held-out prompts, its scores, its
    teacher
launch_checks: launches and options of a launch that this trainer cannot work under, refused before
    anything is loaded
materials: what a distillation is made of before there is a Trainer: checked fields, tokenizer, teacher,
    rows, collator
models: names become models and tokenizer: what the fields say of the config, the teacher and the tokenizer,
    resolved
own_servers: the vLLM servers that a run starts, for rollouts or for its teacher: what they serve, and on
    which GPUs
parts: the parts of a distillation, put together: who scores, who writes, what the loss is
reading: how teachers read the rows: a recipe's function, and the template of a teacher's own
    (`teacher_template`)
rollouts: who writes: the rollouts of student and teacher, and what of them is kept
rows: data sets prepared as the fields say: the one caller of `prepare_dataset` that has a config
scores: putting the store of hidden states between the training and its teacher (`teacher_scores_dir`)
servers: vLLM servers in the place of models: checked first, then made into a rollout
several: the models of `teachers`: each as a run's one teacher would be loaded, and what stands on one
    base loaded once
student: the student: looked at before its weights are loaded, made ready to be trained, saved as it came
teacher: which kind of teacher the fields ask for, made ready to score
token_ids: token ids of student and teachers: which are compared, which end a completion, which nobody
    writes
"""
