"""`GKDTrainer`: windows, steps, checkpoints, logs.

belongs: what a training belongs to: its settings, rows, models and how its ranks are wired, as plain
    facts
card: the trainer's model card: what it knows of itself, handed to `gkd.report.card`
card_settings: the settings that a model card shows: the core of the method, and everything that differs
    from its default
checkpoint_faults: what is wrong with a checkpoint folder, in words: what was cut off, damaged, or written
    by something else
checkpoint_files: checkpoint folders on disk: which are complete, which is the newest, which go
checkpoints: saving and resuming: a killed run loses nothing that was saved, and goes on as if it had not
    been killed
completions: sample completions during training: a table on the console, and the whole step's rows for the
    loggers
eval_loss: evaluation during training: `eval_loss` is the divergence on the data's own completions
faults: `FaultGuard`: a step that must not be made is left out: no target anywhere, or a loss or gradient not
    finite
going_on: going on from a checkpoint: which one, whether it is sound, and whether it belongs to what is
    trained now
group: `Group`: the windows of consecutive optimizer steps that one rollout writes for (`rollout_every`)
health: whether the student's rollouts are still sound: what they are like in a window of steps, beside
    what they should be
hub: pushing to the Hugging Face Hub: a push that fails loses nothing and says how to do it again
late_rows: rows that come to a trainer after its constructor: prepared where they are evaluated on,
    refused for training
log: what a training log holds beside the Trainer's own loss and learning rate
metrics: `Meter`: sums and counts by source, reduced over ranks once per logged step
micro_batches: a step's micro-batches: made tensors once their completions are written, scored by the teacher,
    and given a loss at the student's head
optimizer_settings: the optimizer's settings: after a checkpoint was loaded, those asked for hold, not those
    it was saved with
origin: what a run was made from, beside its weights, so that it can be compared with that later
output_folder: the output folder belongs to one run at a time: it is locked while one works there, and
    what other runs left in it is neither overwritten nor deleted unasked
position_profile: divergence along the position in the completion: sums by bucket of positions, source and
    third of the training
progress: one tidy progress bar: step, loss, realised lambda, tokens per second, time left
record: `Record`: what a checkpoint keeps of a training beside the Trainer's own files; `Ledger`: what was
    trained on
reward: the reward term of GKD (arXiv 2306.13649, Eq. 5): loss = (1 - alpha) D - alpha E[r(y)], y written
    by the student
safe_pickles: DeepSpeed unpickles what a checkpoint's folder holds, and a pickle runs any program
scheduled: `Scheduled`: the fields that follow a schedule, as each step has them
steering: `Steering`: what a run does about its own rollouts: the guard against collapse, and
    `lmbda="auto"`
stop_request: `StopRequest`: a signal asks for a stop, and the training ends where nothing is lost
stream: the windows of an epoch: taken from its iterator, opened, written for in groups, and asked for one
    step ahead where that is wanted
teacher_state: what a checkpoint keeps of a teacher that changes with the student
token_weights: what each target counts in the loss beside its share of the step: a rule or a function of the
    user's own, and the reward of its completion
trainer: `GKDTrainer`: TRL's `SFTTrainer` with sequences from three sources and a teacher's distribution
    as the target
trl_attributes: what scripts touch of `trl.experimental.gkd.GKDTrainer` beside its constructor: attributes
    and one static method
window: one optimizer step's rows on one rank: which source each has, and the completions that are written
    for it
"""
