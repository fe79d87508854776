"""Who scores: what a teacher says about a batch's targets.

absent: A teacher that is not loaded, because what it has to say is on disk already (`teacher_scores_dir`)
average: a student's moving average as its teacher (`self_teacher="ema"`)
base: what every teacher owes, and what it may leave to the defaults
kept: A teacher that is asked about each sequence once: its last hidden states are kept on disk
live: the student as it is at present as its own teacher (`self_teacher="live"`)
local: A teacher in this process: any causal language model, frozen
none: No teacher: what is trained on is the data's own text, and nothing is compared
routed: several teachers in the place of one: each row is scored by its own
server: A teacher on a vLLM server: it scores token ids and answers with its K most likely tokens at every
    position
shared: a teacher over weights that stand there already: the student's base without its adapter, or with
    another one
store: the teacher's last hidden states on disk, found again by the hash of a sequence and of its targets
writer: A teacher that only writes: its tokens are not the student's, or it shows no probabilities
"""
