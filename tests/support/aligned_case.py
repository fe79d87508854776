"""One call of the fused pass with a teacher of another tokenizer, beside its definition in float64.

The definition goes group by group in plain Python, from probabilities; autograd gives its gradient.
"""

from dataclasses import replace

import oracle
import torch
from fused_case import Case

from gkd.loss.signals import AlignedSignal, DenseSignal, Head, TopKSignal

DS, DT = 6, 9
# (tokens of the student, tokens of the teacher); 0 = that side has no group.
PATTERNS = [(1, 1), (1, 3), (3, 1), (2, 2), (2, 0), (1, 1), (0, 2), (4, 3), (1, 2), (2, 1), (1, 1)]


def numbered(patterns):
    """border [N], group [N] and teacher_group [M] of groups that follow each other."""
    border, group, teacher_group, number = [], [], [], 0
    for n, m in patterns:
        both = bool(n and m)
        border += ([len(teacher_group)] + [-1] * (n - 1)) if both else [-1] * n
        group += [number if both else -1] * n
        teacher_group += [number if both else -1] * m
        number += both
    return tuple(torch.tensor(ids, dtype=torch.long) for ids in (border, group, teacher_group))


class AlignedCase(Case):
    """Random hidden states, heads and targets; `common` pairs of ids."""

    tolerance = (1e-8, 1e-10)

    def __init__(
        self, patterns=PATTERNS, vocab=23, teacher_vocab=19, common=11, dtype=torch.float64, seed=0, scale=1.0,
        softcap=None, bias=True,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, size=1.0):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(size).to(dtype)

        def order(count):
            return torch.randperm(count, generator=generator)

        border, group, teacher_group = numbered(patterns)
        n, m = group.numel(), teacher_group.numel()
        self.hidden = draw(n, DS).requires_grad_()
        self.weight = draw(vocab, DS).requires_grad_()
        self.bias = draw(vocab).requires_grad_() if bias else None
        self.head = Head(self.weight, self.bias, scale, softcap)
        teacher = DenseSignal(draw(m, DT), Head(draw(teacher_vocab, DT, size=0.7), draw(teacher_vocab), 0.9))
        targets, own = (
            torch.randint(0, size, (count,), generator=generator) for size, count in ((vocab, n), (teacher_vocab, m))
        )
        self.targets = targets
        self.signal = AlignedSignal(
            teacher, own, order(vocab)[:common], order(teacher_vocab)[:common], border, group, teacher_group
        )
        self.weights = torch.rand(n, generator=generator, dtype=torch.float64)
        self.ce_weights = torch.rand(n, generator=generator, dtype=torch.float64) * (torch.arange(n) % 3 > 0)

    full = None  # the teacher where the signal is of its most likely tokens alone

    def logits(self):
        teacher = self.full or self.signal.teacher
        zt = teacher.hidden.double() @ teacher.head.weight.double().t()
        return self.student_logits(), (zt + teacher.head.bias.double()) * teacher.head.logit_scale

    def as_a_server_tells(self, k):
        """The teacher's K most likely tokens, in any order, in the place of its hidden states."""
        self.full, log_q = self.signal.teacher, self.logits()[1].log_softmax(-1)
        top = log_q.topk(k, dim=-1)
        order = torch.rand(top.indices.shape, generator=torch.Generator().manual_seed(4)).argsort(-1)
        own = log_q.gather(1, self.signal.targets[:, None])[:, 0]
        told = TopKSignal(top.indices.gather(1, order), top.values.gather(1, order), own)
        self.signal = replace(self.signal, teacher=told, size=log_q.shape[1])
        return self

    def members(self, ids, joined):
        """The ids that count with each common token."""
        found = [[i] for i in ids.tolist()]
        for i, place in [] if joined is None else joined.t().tolist():
            found[place].append(i)
        return found

    def most_likely_outcomes(self, s, t, k, tail):
        """Probabilities of the outcomes that the teacher's K tokens count with, and of all else; None without any."""
        signal = self.signal
        ours = self.members(signal.student_ids, signal.student_joined)
        theirs = self.members(signal.teacher_ids, signal.teacher_joined)
        top = t.topk(k).indices.tolist()
        hit = [place for place, members in enumerate(theirs) if set(members) & set(top)]
        if not hit:
            return None
        p = torch.stack([s[ours[place]].sum() for place in hit])
        q = torch.stack([t[[i for i in theirs[place] if i in top]].sum() for place in hit])
        every = [sum(map(len, side)) for side in (ours, theirs)]
        of_student = every[0] < len(s) or k < len(ours)
        of_teacher = every[1] < len(t) or k < len(t)
        if tail == "renormalize_both" or not (of_student and of_teacher):
            return p / p.sum(), q / q.sum()
        if tail == "ignore":
            return p, q
        if tail == "renormalize":
            q = q / q.sum()
        return torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])

    def outcomes(self, s, t):
        """Probabilities of the compared outcomes, of one place."""
        signal = self.signal
        found, rest = [], []
        for p, ids, joined in (
            (s, signal.student_ids, signal.student_joined),
            (t, signal.teacher_ids, signal.teacher_joined),
        ):
            others = [] if joined is None else joined.t().tolist()
            mass = p[ids]
            if others:
                mass = torch.stack([m + sum(p[w] for w, at in others if at == c) for c, m in enumerate(mass)])
            found.append(mass)
            left = p.index_fill(0, ids, 0).index_fill(0, ids.new_tensor([w for w, _ in others]), 0)
            rest.append((left.sum()[None], len(p) - len(ids) - len(others)))
        if min(count for _, count in rest) == 0:
            return found[0] / found[0].sum(), found[1] / found[1].sum()
        return torch.cat([found[0], rest[0][0]]), torch.cat([found[1], rest[1][0]])

    def expected(
        self, name="jsd", parameters=None, ce=False, loss_temperature=1.0, teacher_loss_temperature=None,
        scale_by_temperature_squared=False, teacher_top_k=None, top_k_tail="bucket", **_,
    ):  # fmt: skip
        z, zt = self.logits()
        k = teacher_top_k if self.full is None else min(teacher_top_k or 10**9, self.signal.teacher.ids.shape[1])
        signal, loss, per_token = self.signal, z.sum() * 0, z.new_zeros(z.shape[0])
        square = loss_temperature**2 if scale_by_temperature_squared else 1
        for number in range(int(signal.group.max()) + 1 if signal.group.numel() else 0):
            mine = [i for i, g in enumerate(signal.group.tolist()) if g == number]
            theirs = [i for i, g in enumerate(signal.teacher_group.tolist()) if g == number]
            n = len(mine)
            s = (z[mine[0]] / loss_temperature).softmax(-1)
            t = (zt[theirs[0]] / (teacher_loss_temperature or loss_temperature)).softmax(-1)
            both = self.outcomes(s, t) if k is None else self.most_likely_outcomes(s, t, k, top_k_tail)
            value = s.sum() * 0 if both is None else square * oracle.divergence(name, *both, **(parameters or {}))
            if (n, len(theirs)) != (1, 1):
                p = torch.stack([z[i].softmax(-1)[self.targets[i]] for i in mine]).prod()
                q = torch.stack([zt[i].softmax(-1)[signal.targets[i]] for i in theirs]).prod()
                text = oracle.divergence(name, torch.stack([p, 1 - p]), torch.stack([q, 1 - q]), **(parameters or {}))
                value = (min(1, n / 2) * value + (n - min(1, n / 2)) * text) / n
            per_token[mine] = value.detach()
            loss = loss + self.weights[mine].sum() * value
        if ce:
            loss = loss - (self.ce_weights * z.log_softmax(-1).gather(1, self.targets[:, None])[:, 0]).sum()
        return loss, per_token
