"""Trainings with a teacher of another tokenizer, and the definition of their loss from two dense passes in float64."""

import oracle
import torch
from datasets import Dataset
from other_tokens import other_model, other_tokenizer
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from training import config

from gkd.data.token_bytes import token_bytes
from gkd.training.trainer import GKDTrainer

OWN, OTHER = tiny_tokenizer(), other_tokenizer()
ENDS = {OWN: 258, OTHER: 1}
BYTES = {tokenizer: token_bytes(tokenizer) for tokenizer in (OWN, OTHER)}
SAID = {i for i, text in enumerate(BYTES[OWN]) if text and text < b"\x80"} | {258}
ASCII = {"suppress_tokens": [i for i in range(tiny_model().config.vocab_size) if i not in SAID]}


def rows_of(n=8):
    rows = tiny_rows(n)
    for row in rows:
        row["messages"][-1]["content"] = row["messages"][-1]["content"].replace("é", "e")
    return Dataset.from_list(rows)


ROWS = rows_of()


def trainer_of(folder, rows=ROWS, student=None, teacher=None, swapped=False, **values):
    """`swapped`: the student has the longer tokens."""
    served = values.get("teacher_server_url") is not None
    models = [tiny_model(seed=1) if student is None else student, teacher]
    if teacher is None and not served:
        models[1] = other_model()
    tokenizers = [tiny_tokenizer(), other_tokenizer()]
    if swapped:
        models.reverse()
        tokenizers.reverse()
    settings = {"lmbda": 0.0, "per_device_train_batch_size": 8, "teacher_tokenizer_alignment": "bytes"}
    extra = {name: values.pop(name) for name in ("eval_dataset", "data_collator") if name in values}
    if callable(values.get("token_weights")):
        extra["token_weights"] = values.pop("token_weights")
    return GKDTrainer(
        model=models[0],
        teacher_model=models[1],
        args=config(folder, **{**settings, **values}),
        train_dataset=rows,
        processing_class=tokenizers[0],
        teacher_processing_class=None if served else tokenizers[1],
        **extra,
    )


# ------------------------------------------------------------------------------------------------- the definition


def prompt_of(row, tokenizer):
    turns = row["messages"][:-1]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])


def outcomes(student, teacher):
    """Pairs of ids of one spelling, the ends of a turn among them; and each side's other ids with the place of the
    pair that their first letter makes."""
    theirs = {text: i for i, text in enumerate(BYTES[teacher]) if text}
    pairs = [(i, theirs[text]) for i, text in enumerate(BYTES[student]) if text in theirs and text]
    pairs.append((ENDS[student], ENDS[teacher]))
    joined = []
    for side, tokenizer in enumerate((student, teacher)):
        known = [pair[side] for pair in pairs]
        letters = {BYTES[tokenizer][i]: place for place, i in enumerate(known) if BYTES[tokenizer][i]}
        alone = [i for i, text in enumerate(BYTES[tokenizer]) if text and i not in known]
        places = [(i, letters[BYTES[tokenizer][i][:1]]) for i in alone]
        joined.append(torch.tensor(places, dtype=torch.long).view(-1, 2).T)
    return torch.tensor(pairs), joined


def groups(ours, theirs, student, teacher):
    """First and last token of both, as few as stand for the same bytes."""
    texts = [
        [b"\xff" if i == ENDS[who] else BYTES[who][i] for i in ids]
        for ids, who in ((ours, student), (theirs, teacher))
    ]
    assert b"".join(texts[0]) == b"".join(texts[1])
    found, i, j = [], 0, 0
    while i < len(ours):
        a, b, first = i + 1, j + 1, (i, j)
        while len(b"".join(texts[0][i:a])) != len(b"".join(texts[1][j:b])):
            if len(b"".join(texts[0][i:a])) < len(b"".join(texts[1][j:b])):
                a += 1
            else:
                b += 1
        found.append((*first, a - first[0], b - first[1]))
        i, j = a, b
    return found


def in_their_ids(answer, student, teacher):
    ended = answer[-1] == ENDS[student]
    text = student.decode(answer[:-1] if ended else answer)
    return [*teacher(text, split_special_tokens=True).input_ids, *([ENDS[teacher]] if ended else [])]


def most_likely(s, t, pairs, joined, k):
    """Probabilities of both of the outcomes that the teacher's K tokens count with, and of all else."""
    places = {i: place for place, i in enumerate(pairs[:, 1].tolist())} | dict(joined[1].T.tolist())
    q = {}
    for i in t.topk(k).indices.tolist():
        if i in places:
            q[places[i]] = q.get(places[i], 0) + t[i]
    members = {
        place: [i, *(other for other, at in joined[0].T.tolist() if at == place)]
        for place, (i, _) in enumerate(pairs.tolist())
    }
    p = torch.stack([s[members[place]].sum() for place in q])
    q = torch.stack(list(q.values()))
    return torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])


def expected(models, sequences, rows=ROWS, tokenizers=(OWN, OTHER), name="jsd", k=None, weigh=None):
    """The loss, and the share in full; over all common tokens, or those that the teacher's K tokens count with.

    `weigh(z, zt, answer, theirs, groups, values)` gives a factor for each group of a sequence.
    """
    (student, teacher), (pairs, joined) = tokenizers, outcomes(*tokenizers)
    total, number, in_full = torch.zeros((), dtype=torch.float64), 0, 0
    for sequence in sequences:
        start, row = sequence.prompt_length, rows[sequence.row]
        answer = sequence.input_ids[start:]
        theirs = sequence.teacher_ids or in_their_ids(answer, student, teacher)
        context = prompt_of(row, teacher)
        z = models[0](input_ids=torch.tensor([sequence.input_ids])).logits[0, start - 1 : -1].softmax(-1)
        with torch.no_grad():
            zt = models[1](input_ids=torch.tensor([[*context, *theirs]])).logits[0, len(context) - 1 : -1].softmax(-1)
        found, values = groups(answer, theirs, student, teacher), []
        for i, j, n, m in found:
            if k is not None:
                s, t = most_likely(z[i], zt[j], pairs, joined, k)
            else:
                s = z[i][pairs[:, 0]].index_add(0, joined[0][1], z[i][joined[0][0]])
                t = zt[j][pairs[:, 1]].index_add(0, joined[1][1], zt[j][joined[1][0]])
                s, t = torch.cat([s, 1 - s.sum()[None]]), torch.cat([t, 1 - t.sum()[None]])
            share = 1.0 if n == m == 1 else 1 / n * min(1, n / 2)
            value = n * share * oracle.divergence(name, s, t)
            if n > 1 or m > 1:
                p = torch.stack([z[i + k][answer[i + k]] for k in range(n)]).prod()
                q = torch.stack([zt[j + k][theirs[j + k]] for k in range(m)]).prod()
                both = (torch.stack([p, 1 - p]), torch.stack([q, 1 - q]))
                value = value + n * (1 - share) * oracle.divergence(name, *both)
            in_full += n == m == 1
            values.append(value)
        factors = [1.0] * len(found) if weigh is None else weigh(z, zt, answer, theirs, found, values)
        total = total + sum(factor * value for factor, value in zip(factors, values, strict=True))
        number += len(answer)
    return total / number, in_full / number


def check(moved, models, sequences, bound=1e-4, **how):
    loss, in_full = expected(models, sequences, **how)
    trained = [parameter for parameter in models[0].parameters() if parameter.requires_grad]
    wanted = -torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
    assert float((moved.double() - wanted).norm() / wanted.norm()) < bound
    return loss, in_full
