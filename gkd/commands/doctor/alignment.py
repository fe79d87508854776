"""The doctor's look at a teacher with another tokenizer that is compared: which tokens meet, and what both can say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gkd.commands.doctor.view import Diagnosis, Pieces
from gkd.data.aligned_view import BORDER, Alignment, as_the_teacher_reads_it
from gkd.data.common_tokens import common_tokens
from gkd.data.end_map import end_pair
from gkd.data.respelling import Respelling
from gkd.data.sequences import TokenSequence, sequence_of
from gkd.data.teacher_rows import OwnTemplate
from gkd.evaluation.subject import Conditions, Subject
from gkd.loss.signals import AlignedSignal, TopKSignal

ROWS_ALIGNED, ROWS_SCORED = 256, 16
MASS, IN_FULL = 0.9, 0.5  # less is worth a warning
_REMEDY = "that is what the two tokenizers allow; with a teacher of the student's family nothing is lost"


def alignment_of(
    student: PreTrainedTokenizerBase, own: OwnTemplate, stop_ids: Sequence[int], said: str | None
) -> Alignment:
    """The alignment as far as the tokenizers decide it. `stop_ids` are the student's, `said` is
    `teacher_end_of_turn`."""
    teacher = own.tokenizer
    assert teacher is not None
    pair = end_pair(student, teacher, stop_ids, own.stop_ids, said)
    common = common_tokens(student, teacher, len(student), len(teacher), pair)
    return Alignment(Respelling(student, teacher, pair), common, pair)


def groups_in_pieces(sequence: TokenSequence, alignment: Alignment) -> list[Pieces]:
    """The groups of a completion: the student's pieces of each, and the teacher's; none where it is not compared."""
    ids = sequence.input_ids[sequence.prompt_length :]
    theirs = alignment.respelled(sequence)
    both = alignment.respelling
    ours = [_piece(both.student.tokenizer, both.student.table, i) for i in ids]
    of_teacher = [_piece(both.teacher.tokenizer, both.teacher.table, i) for i in theirs]
    return [
        (ours[one.student_first : one.student_last + 1], of_teacher[one.teacher_first : one.teacher_last + 1])
        for one in both.groups(ids, theirs)
    ]


def _piece(tokenizer: PreTrainedTokenizerBase, table: Sequence[bytes | None], i: int) -> str:
    """A token as a reader knows it; its bytes where it is no whole character."""
    piece = table[i] if i < len(table) else None
    if piece is None:
        return str(tokenizer.convert_ids_to_tokens(i))
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in piece)


def examine_groups(out: Diagnosis, prepared: Dataset, alignment: Alignment) -> None:
    """How many targets of the answers in the rows are compared in full, in text, not at all."""
    rows = [sequence_of(row) for row in prepared.select(range(min(ROWS_ALIGNED, len(prepared))))]
    answered = [row for row in rows if row.completion_length and row.num_targets]
    if not answered:
        out.add("Alignment", "ok", "not looked at: the rows have no answers")
        return
    full = text = targets = 0
    for sequence in answered:
        targets += sequence.num_targets
        for one in as_the_teacher_reads_it(sequence, alignment)[1]:
            if one.num_student == one.num_teacher == 1:
                full += 1
            else:
                text += one.num_student
    common, (student, teacher) = len(alignment.common.student), _sizes(alignment)
    shares = [count / targets for count in (full, text, targets - full - text)]
    message = (
        f"{common:,} tokens in common, of {student:,} (student) and {teacher:,} (teacher); of the targets in "
        f"{len(answered)} rows {shares[0]:.0%} are compared in full, {shares[1]:.0%} as part of a longer text, "
        f"{shares[2]:.0%} not at all"
    )
    few = shares[0] < IN_FULL
    remark = f"{message}: less than {IN_FULL:.0%} in full" if few else message
    out.add("Alignment", "warning" if few else "ok", remark, _REMEDY if few else "")


def _sizes(alignment: Alignment) -> tuple[int, int]:
    both = alignment.respelling
    return len(both.student.tokenizer), len(both.teacher.tokenizer)


def examine_mass(out: Diagnosis, teacher: Subject, sequences: Sequence[TokenSequence], how: Conditions) -> None:
    """What the tokens that both vocabularies have hold of the teacher's probability, where both stand at a border."""
    alone, joined = common_mass(teacher, sequences[:ROWS_SCORED], how)
    if not alone.numel():
        out.add("Common tokens", "ok", "not measured: no tokens of these rows are compared")
        return
    mass = float((alone + joined).mean())
    told = "" if teacher.top_k is None else f"of its {teacher.top_k} most likely tokens: "
    message = (
        f"{told}at {alone.numel():,} places they hold {float(alone.mean()):.1%} of the teacher's probability, and "
        f"{mass:.1%} with the tokens that are counted with the one they begin with"
    )
    small = mass < MASS
    remark = f"{message}: less than {MASS:.0%}, and the rest is compared as one" if small else message
    out.add("Common tokens", "warning" if small else "ok", remark, _REMEDY if small else "")


def common_mass(
    teacher: Subject, sequences: Sequence[TokenSequence], how: Conditions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's probability of the common tokens, and of those that are counted with one, at each border [N]; as
    far as its K most likely tokens tell it."""
    device = torch.device("cpu") if how.accelerator is None else how.accelerator.device
    masses: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), teacher.asked(how) as ask:
        for start in range(0, len(sequences), how.batch_size):
            batch = teacher.shared_batch(list(sequences[start : start + how.batch_size]), device)
            signal = ask(batch)
            assert isinstance(signal, AlignedSignal)
            border = batch[BORDER]
            masses.append(_masses(signal, border[border >= 0]))
    return torch.cat([alone for alone, _ in masses]), torch.cat([joined for _, joined in masses])


def _masses(signal: AlignedSignal, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    said = signal.teacher.at(rows)
    if isinstance(said, TopKSignal):
        ids, p = said.ids, said.log_probs.exp()
    else:
        p = said.head.logits(said.hidden).float().softmax(-1)
        ids = torch.arange(p.shape[1], device=p.device).expand_as(p)
    others = ids.new_zeros(0) if signal.teacher_joined is None else signal.teacher_joined[0]
    alone, joined = ((p * torch.isin(ids, known)).sum(dim=-1).cpu() for known in (signal.teacher_ids, others))
    return alone, joined
