"""One model: loaded, its head found, placed, split up, adapted, quantized, put into generation.

adapters: adapters of frozen teachers: loading them, and a second model over weights that are there
    already
facts: everything that is loaded by name: tokenizer and teacher (the student is loaded by SFTTrainer)
fingerprint: each prompt is answered once: completions of a model that does not change, kept on disk
generation_mode: put a model that is being trained into the state for generating, and back again exactly
head: what the teacher says about the N target tokens, and the output head that turns hidden states into
    logits
hidden: run a causal language model up to its output head and do something else there: no logits are ever
    built
loading: everything that is loaded by name: tokenizer and teacher (the student is loaded by SFTTrainer)
placement: where a frozen model's weights stand: whole on every rank's accelerator, in CPU memory while it
    does nothing, or split over the ranks by DeepSpeed ZeRO-3 (Rajbhandari et al., arXiv 1910.02054),
    whatever the student's stage
precision: the run's mixed precision, for models that nothing else brings into it
quantized: weights of 4 or 8 bits through bitsandbytes: from keyword arguments to its configuration
rounding: stochastic rounding: fp32 values on the coarse grid of bf16 or fp16, right on average
shared_weights: adapters of frozen teachers: loading them, and a second model over weights that are there
    already
zero: where a frozen model's weights stand: whole on every rank's accelerator, in CPU memory while it does
    nothing, or split over the ranks by DeepSpeed ZeRO-3 (Rajbhandari et al., arXiv 1910.02054), whatever
    the student's stage
"""
