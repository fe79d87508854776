"""One model: loaded, its head found, placed, split up, adapted, quantized, put into generation.

adapters: adapters of frozen teachers: loaded, checked against their base, and merged into it
eval_mode: a model in eval mode for a while, and back exactly
facts: facts of a loaded model: its name and revision, the sizes of its vocabulary and head, its longest
    sequence
fingerprint: a model's fingerprint: a hash of its weights and config, under which what it says is kept on disk
generation_mode: put a model that is being trained into the state for generating, and back again exactly
head: a model's output head: found by its config, and compared with the model's own logits before it is
    trusted
hidden: run a causal language model up to its output head and do something else there: no logits are ever
    built
loading: loading by name: tokenizer, configuration and teacher, with errors that name the fault
    (SFTTrainer loads the student)
narrow: a smaller model out of a large one: inner neurons of its MLPs left out, those that add least to the hidden
    state
placement: where a frozen model's weights stand: whole on every rank's accelerator, in CPU memory while it
    does nothing, or split over the ranks by DeepSpeed ZeRO-3 (Rajbhandari et al., arXiv 1910.02054),
    whatever the student's stage
precision: the run's mixed precision, for models that nothing else brings into it
quantized: weights of 4 or 8 bits through bitsandbytes: from keyword arguments to its configuration
rounding: stochastic rounding: fp32 values on the coarse grid of bf16 or fp16, right on average
shared_weights: a second model over weights that are there already
shrink: a smaller model out of a large one: some of its layers left out, those that change the hidden state least
zero: DeepSpeed ZeRO-3 as a model shows it: is it split up, its weights gathered for a while, its hooks taken
    off
"""
