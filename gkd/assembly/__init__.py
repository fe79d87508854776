"""From the config to the objects that do the work; below it nobody sees a config.

checks: what is checked or switched off before the first step, so that nothing is silently wrong later
launch_checks: launches and options of a launch that this trainer cannot work under, refused before
    anything is loaded
materials: what a distillation is made of before there is a Trainer: checked fields, tokenizer, teacher,
    rows, collator
models: what is checked or switched off before the first step, so that nothing is silently wrong later
parts: the parts of a distillation, put together: who scores, who writes, what the loss is
rollouts: from the configuration to the objects that do the work; past this point nobody sees a config
rows: from the configuration to the objects that do the work; past this point nobody sees a config
scores: putting the store of hidden states between the training and its teacher (`teacher_scores_dir`)
servers: vLLM servers in the place of models: checked first, then made into a rollout
student: the student: looked at before its weights are loaded, made ready to be trained, saved as it came
teacher: which kind of teacher the fields ask for, made ready to score
"""
