"""Who writes: completions for prompts, sampled from a model.

adapter_upload: the student's adapter on a vLLM server: written, loaded under a name of its own each time,
    and taken away again
against_the_student: whether a server samples from the weights that are trained, and as it was asked to:
    looked at in every step
base: what every rollout backend shares: its interface, the sampling settings, the random numbers, and the
    backends by name
batch_size: how many rows are decoded at a time: a check of what is given, and a choice where nothing is
chat: completions from an OpenAI-compatible chat address, as bytes (`gkd.data.message_bytes`)
folding: fold a LoRA adapter into the weights for the time of a rollout
hf: rollouts in the training process, with the model that is being trained
hygiene: which completions are sound enough to train on: cut off without a stop token, or repeating themselves
kept: each prompt is answered once: completions of a model that does not change, kept on disk
kv_cache: A KV cache for rollouts: room to grow, and rows that leave
routed: several teachers write: each prompt is answered by the teacher of its row
sampling: pick a token for each row from its logits: by the row's own random number, or the most likely
    one
sleep: a vLLM server on the GPUs of the training: its engine sleeps while the step trains, and wakes for a
    rollout
store: completions on disk, found again by the hash of their prompt; several processes may write and read
    at once
vllm: rollouts on a vLLM server: token ids go there, token ids come back, over HTTP
weight_upload: all weights of a student without an adapter on a vLLM server: written to a folder, read from
    there into the engine
"""
