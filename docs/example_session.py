# %% [markdown]
# # An interactive session
#
# One trainer, looked at step by step: who writes what, where student and teacher disagree, a short training, pictures.
# The same stands in `docs/example_session.ipynb`, a notebook, and in `docs/example_session.py`, a script with `# %%`
# marks. It takes less than two minutes on two CPU cores; the two small models come by pip, as in
# `recipes/gkd_glass.py`.

# %% What is needed
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback

from gkd import GKDConfig, GKDTrainer
from gkd.data.sources import choose_sources
from gkd.demo import glass_student, glass_teacher
from gkd.report.plots import write_plots
from gkd.training.progress import ProgressBar

# %% Models: any two of one family will do
STUDENT, TEACHER = glass_student(), glass_teacher()
tokenizer = AutoTokenizer.from_pretrained(STUDENT)
student = AutoModelForCausalLM.from_pretrained(STUDENT)
teacher = AutoModelForCausalLM.from_pretrained(TEACHER)

# %% Rows, and one trainer
STARTS = ["Alice was beginning to", "The Queen said that", "Once upon a time there", "He looked at the little"]
rows = Dataset.from_list([{"prompt": start, "completion": " see the white rabbit."} for start in STARTS * 8])
args = GKDConfig(
    "outputs/session",
    lmbda=0.5,  # half of the sequences are written by the student
    seq_kd=True,  # the others by the teacher, in place of the data's completions
    temperature=1.0,
    max_new_tokens=24,
    per_device_train_batch_size=8,
    learning_rate=5e-3,
    max_steps=20,
    logging_steps=1,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
)
trainer = GKDTrainer(
    student,
    teacher,
    args,
    train_dataset=rows,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)

# %% [markdown]
# ## Who writes what
#
# The sources of a step are a function of the seed and the step, so they can be asked for beforehand. `generate` gives
# the completions that training would train on, token by token.

# %% The first optimizer step: its sources, and what student and teacher would write
sources = choose_sources(args.seed, step=0, num_rows=len(STARTS), lmbda=args.lmbda, seq_kd=args.seq_kd)
for number, (source, row) in enumerate(zip(sources, trainer.train_dataset.select(range(len(STARTS))), strict=True)):
    prompt = row["input_ids"][: row["prompt_length"]]
    (completion,) = trainer.rollouts[source].generate([prompt], step=0, rows=[number])
    print(f"{source:8}{tokenizer.decode(prompt)} |{tokenizer.decode(completion)}")

# %% [markdown]
# ## Where they disagree
#
# Both models read the same sentence. Each line is a token, the divergence of the two predictions for it in nats, and
# what each model thought most likely. `trainer.loss_settings` holds the divergence that the configuration names.

# %% A table for one sentence


def divergences(sentence: str) -> list[tuple[str, float, str, str]]:
    """(token, divergence in nats, student's favourite, teacher's favourite) for every token after the first."""
    ids = torch.tensor([tokenizer(sentence)["input_ids"]])
    with torch.no_grad():
        log_p, log_q = (model(ids.to(model.device)).logits[0, :-1].log_softmax(-1) for model in (student, teacher))
    values = trainer.loss_settings.divergence(log_p, log_q)
    words = [tokenizer.decode(token) for token in ids[0, 1:]]
    favourites = [[tokenizer.decode(token) for token in log.argmax(-1)] for log in (log_p, log_q)]
    return list(zip(words, values.tolist(), *favourites, strict=True))


SENTENCE = "Alice was beginning to get very tired."
before = divergences(SENTENCE)

# %% Train, and look again: the student's adapter is trained in place
trainer.remove_callback(ProgressCallback)  # it prints every metric of every step
trainer.add_callback(ProgressBar())
trainer.train()
after = divergences(SENTENCE)
print(f"{'token':14}{'before':>8}{'after':>8}   student / teacher prefer")
for (word, old, *_), (_, new, mine, theirs) in zip(before, after, strict=True):
    print(f"{word!r:14}{old:8.3f}{new:8.3f}   {mine!r} / {theirs!r}")

# %% The log of the training: every metric by source
history = [entry for entry in trainer.state.log_history if "loss/student" in entry]
for name in ("loss/student", "loss/teacher", "student/agreement", "rollout/length_mean/student"):
    print(f"{name:30}{history[0][name]:8.3f} -> {history[-1][name]:.3f}")

# %% A picture: the loss by source, and lengths, entropies
for path, caption in write_plots(trainer.state.log_history, "outputs/session/plots"):
    print(path, "-", caption)

# %% The adapter alone; plain transformers and PEFT read it
trainer.save_model("outputs/session")
