"""Vocabularies: may these two models be compared token by token, and which ids end an answer?

A divergence over the vocabulary means something only if id v stands for the same token in both models. Sizes do not
show that: Qwen2.5 has heads of 151,936 and 152,064 rows for one and the same token map (the rest is padding), and two
different tokenizers may well have heads of equal size. So the token -> id maps are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from transformers import GenerationConfig, PreTrainedTokenizerBase

from gkd.data.templates import STUMBLES, ChatTemplate, common_prefix

logger = logging.getLogger(__name__)

_REMEDY = (
    "Take a teacher of the student's family, whose tokenizer gives every token the same id; compare them by the bytes "
    "that their tokens stand for (teacher_tokenizer_alignment='bytes'); or let it only write (seq_kd=True, "
    "seq_kd_loss='nll', lmbda=0): its text is then trained on in the student's tokens"
)


def shared_vocabulary(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    student_rows: int,
    teacher_rows: int,
) -> int | None:
    """The number of leading ids on which student and teacher are compared.

    Ids that a tokenizer names and no text holds do not keep two models apart: Gemma-3-1B's tokenizer has a token for
    images behind the last row of its head, and many a student has got a [PAD] of its own. Ids that a head has no row
    for, and a pad token at the end of the vocabulary which the other side knows as something else, are left out here;
    `check_ids_in_use` then sees to it that no row holds one.

    Args:
        teacher_tokenizer: None says that the teacher uses the student's.
        student_rows, teacher_rows: rows of the two output heads, padding rows included.

    Returns:
        None when the heads have equally many rows (nothing to restrict), else the smaller number of rows: both
        distributions are then restricted to these ids and renormalised, which one log line says.

    Raises:
        ValueError: an id stands for different tokens.
    """
    student_ids = student_tokenizer.get_vocab()
    teacher_ids = student_ids if teacher_tokenizer is None else teacher_tokenizer.get_vocab()
    shared = min(student_rows, teacher_rows)
    if teacher_tokenizer is not None:
        pads = {_mere_pad(student_tokenizer), _mere_pad(teacher_tokenizer)} - {None}
        shared = min(shared, _first_foreign_pad(student_ids, teacher_ids, pads) or shared)
    if teacher_ids is not student_ids:
        _check_same_tokens({token: i for token, i in student_ids.items() if i < shared}, teacher_ids)
    left_out = sorted((token for token, i in student_ids.items() if i >= shared), key=student_ids.__getitem__)
    if left_out:
        logger.info(
            "The student's tokenizer names %s (%s) that not both heads have a row for (student %s rows, teacher "
            "%s) or that only pads rows: left out of the comparison, and refused in rows.",
            f"{len(left_out):,} ids" if len(left_out) > 1 else "an id",
            ", ".join(f"{student_ids[token]:,} {token!r}" for token in left_out[:3]),
            f"{student_rows:,}",
            f"{teacher_rows:,}",
        )
    if student_rows == teacher_rows == shared:
        return None
    logger.warning(
        "The heads differ in size (student %s rows, teacher %s) and the tokenizers agree: both distributions are "
        "restricted to the first %s ids and renormalised.",
        *(f"{rows:,}" for rows in (student_rows, teacher_rows, shared)),
    )
    return shared


def check_token_maps(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where an id stands for different tokens, whatever the models' heads have rows for."""
    ids = student.get_vocab(), teacher.get_vocab()
    pads = {_mere_pad(student), _mere_pad(teacher)} - {None}
    known = _first_foreign_pad(*ids, pads) or 1 + max(max(own.values()) for own in ids)
    _check_same_tokens({token: i for token, i in ids[0].items() if i < known}, ids[1])


def same_token_maps(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether ids stand for the same tokens; see `check_token_maps`."""
    try:
        check_token_maps(student, teacher)
    except ValueError:
        return False
    return True


def readable_pad_id(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """The pad token's id, or any other where a head of that many rows has none for it: padding is masked."""
    pad = int(tokenizer.pad_token_id)
    return pad if pad < rows else 0


def _mere_pad(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of a pad token that is nothing else, so that text does not hold it; None when it has another role."""
    roles = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    pad: int | None = tokenizer.pad_token_id
    return None if pad in roles else pad


def _first_foreign_pad(student_ids: dict[str, int], teacher_ids: dict[str, int], pads: set[Any]) -> int | None:
    """The first pad id that stands for something else on the other side, where no common token follows it."""
    student_tokens = {i: token for token, i in student_ids.items()}
    teacher_tokens = {i: token for token, i in teacher_ids.items()}
    common = [i for i, token in student_tokens.items() if teacher_tokens.get(i) == token]
    foreign = [i for i in pads if i > max(common, default=-1) and i in student_tokens]
    return min(foreign, default=None)


def _check_same_tokens(student_ids: dict[str, int], teacher_ids: dict[str, int]) -> None:
    student_tokens = {i: token for token, i in student_ids.items()}
    teacher_tokens = {i: token for token, i in teacher_ids.items()}
    common = student_tokens.keys() & teacher_tokens.keys()
    moved = (i for token, i in student_ids.items() if teacher_ids.get(token, i) != i)
    different = min([i for i in common if student_tokens[i] != teacher_tokens[i]] + list(moved), default=None)
    sizes = f"the student has {len(student_ids):,} tokens, the teacher {len(teacher_ids):,}"
    if different is not None:
        raise ValueError(
            f"student and teacher have different tokenizers: {sizes}, and the first id that differs is {different}: "
            f"{student_tokens.get(different)!r} for the student, {teacher_tokens.get(different)!r} for the teacher. "
            f"{_REMEDY}"
        )
    if not common:
        raise ValueError(f"student and teacher have different tokenizers: {sizes}, and they share no id. {_REMEDY}")
    for who, extra in (("student", len(student_ids) - len(common)), ("teacher", len(teacher_ids) - len(common))):
        if extra:
            logger.info("%s; only the %s's tokenizer names %d of the ids.", sizes, who, extra)


def check_ids_in_use(
    datasets: dict[str, Any],
    stop_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    heads: dict[str, int],
    shared: int | None,
) -> None:
    """Refuse rows, and stop tokens, with ids that student and teacher are not compared on.

    Args:
        datasets: prepared rows by name; what has no `input_ids` is passed over.
        stop_ids: the student's. tokenizer: its tokenizer.
        heads: rows of the output heads of "student" and "teacher". shared: what `shared_vocabulary` gave.

    Raises:
        ValueError: naming the row, the token and the side that does not know it.
    """
    limit = min(heads.values()) if shared is None else shared
    _check_ids_of_the_teacher(datasets, heads["teacher"])
    if max(tokenizer.get_vocab().values()) < limit:
        return
    used = [(f"the student's stop token is {{}} (of {sorted(stop_ids)})", i) for i in stop_ids if i >= limit]
    found = used[0] if used else _first_id_beyond(datasets, limit, ("input_ids", "prompt_ids"))
    if found is None:
        return
    place, unknown = found
    token = f"id {unknown:,} ({tokenizer.convert_ids_to_tokens(unknown)!r})"
    if unknown >= heads["student"]:
        why = f"the student's output head has {heads['student']:,} rows, so it can neither read nor write that"
        remedy = "call resize_token_embeddings on the student, or use the tokenizer that it was trained with"
    elif unknown >= heads["teacher"]:
        why = f"the teacher's output head has {heads['teacher']:,} rows, so it knows nothing of that"
        remedy = "use the student's tokenizer without the tokens that were added to it"
    else:
        why, remedy = "to student and teacher it is not the same token", "take it out of the rows"
    raise ValueError(f"{place.format(token)}, and {why}: {remedy}")


def _check_ids_of_the_teacher(datasets: dict[str, Any], rows_of_head: int) -> None:
    """What only the teacher reads need be no token of the student's."""
    found = _first_id_beyond(datasets, rows_of_head, ("teacher_context", "teacher_prompt_ids"))
    if found is not None:
        place, unknown = found
        raise ValueError(
            f"{place.format(f'id {unknown:,}')} in the teacher's prompt, and its output head has {rows_of_head:,} "
            "rows, so it cannot read that: write its prompts with the tokenizer that it was trained with"
        )


def _first_id_beyond(datasets: dict[str, Any], limit: int, columns: Sequence[str]) -> tuple[str, int] | None:
    for name, rows in datasets.items():
        known = getattr(rows, "column_names", None) or ()
        names = [column for column in columns if column in known]
        if not names:
            continue
        start = 0
        for batch in rows.select_columns(names).with_format("arrow").iter(batch_size=4096):
            for ids in (batch[column] for column in names):
                largest = pc.max(pc.list_flatten(ids)).as_py()
                if largest is not None and largest >= limit:
                    lists = enumerate(ids.to_pylist(), start)
                    row, unknown = next((r, i) for r, row_ids in lists for i in row_ids if i >= limit)
                    return f"row {row} of the prepared {name} data set holds {{}}", unknown
            start += len(batch)
    return None


_MARKER = "MarkOfTheAnswer"
_CONVERSATION = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _MARKER}]


@dataclass(frozen=True)
class EndOfTurn:
    """What a chat template writes after an assistant's content.

    `closing` is all of it at the end of a chat ("<|im_end|>\\n"), `kept` the part of it that ends with the end-of-turn
    token ("<|im_end|>"), `token_id` that token's id. Without a special token there, `kept` is "" and `token_id` None.

    `next_closing`, `next_kept` and `next_token_id` are the same of a turn that a user's follows, up to that one's
    content: some templates end the last turn otherwise, or not at all. "" and None where that cannot be rendered.
    """

    closing: str
    kept: str
    token_id: int | None
    next_closing: str = ""
    next_kept: str = ""
    next_token_id: int | None = None


def end_of_turn(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int] = ()) -> EndOfTurn | None:
    """Reads the end of an assistant's turn off the chat template, by rendering short conversations.

    The end is the first token there at which the model stops, else the first token if it is special.

    Args:
        tokenizer: with a chat template or without.
        stop_ids: at which the model stops beside the tokenizer's eos (its generation config's).

    Returns:
        None: there is no template, or it cannot render a plain question and answer.
    """
    if not tokenizer.chat_template:
        return None
    template = ChatTemplate(tokenizer)
    closing = _behind_the_answer(template, _CONVERSATION)
    if closing is None:
        return None
    following = _behind_the_answer(template, [*_CONVERSATION, {"role": "user", "content": _MARKER}]) or ""
    known = [tokenizer.eos_token_id, *stop_ids]
    stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in known if i is not None]
    shared = closing[: common_prefix(closing, following)] if following else closing
    # What ends a chat as a whole (a second token behind the first, in some templates) is not what ends a turn.
    kept = _to_first_stop(shared, stops) or _to_special_token(tokenizer, closing)
    next_kept = _to_first_stop(following, stops) or _to_special_token(tokenizer, following)
    return EndOfTurn(closing, kept, _last_id(tokenizer, kept), following, next_kept, _last_id(tokenizer, next_kept))


def _behind_the_answer(template: ChatTemplate, conversation: list[dict[str, str]]) -> str | None:
    """What stands behind the answer's content, up to the next content or the end; None: that cannot be told."""
    try:
        pieces = template.render(conversation).split(_MARKER)
    except STUMBLES:
        return None
    return pieces[1] if len(pieces) == sum(turn["content"] == _MARKER for turn in conversation) + 1 else None


def _to_first_stop(text: str, stops: list[str]) -> str:
    """The beginning of `text` that ends with the first stop token in it; "" when there is none."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else ""


def _to_special_token(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The special token that `text` begins with, with the spaces before it; "" when it begins otherwise."""
    ids: list[int] = tokenizer(text.lstrip(), add_special_tokens=False)["input_ids"]
    if not ids or not _is_special(tokenizer, ids[0]):
        return ""
    token = str(tokenizer.convert_ids_to_tokens(ids[0]))
    return text[: text.index(token) + len(token)] if token in text else ""


def _last_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return ids[-1] if ids else None


def _is_special(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return token_id in tokenizer.all_special_ids or (token_id in added and added[token_id].special)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> tuple[int, ...]:
    """The ids that end an answer, sorted: those of the generation config, the tokenizer's eos, the template's end of
    turn. All three, because a base model's eos (Qwen2.5: 151,643) is not its chat template's end of turn (151,645)."""
    configured = configured_stop_ids(generation_config)
    turn = end_of_turn(tokenizer, configured)
    ids = {*configured, tokenizer.eos_token_id, turn.token_id if turn else None}
    return tuple(sorted(int(i) for i in ids if i is not None))


def configured_stop_ids(generation_config: GenerationConfig | None) -> tuple[int, ...]:
    """The ids at which a model's generation config stops, sorted; () without one."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple(sorted({int(i) for i in ids if i is not None}))


def unreadable_ids(
    teacher_rows: int,
    shared: int | None,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
) -> range:
    """The rows at the end of a local teacher's head that it should not write: those that are not compared (`shared`),
    and the padding behind the last token of either tokenizer, which no text can hold."""
    known = 1 + max(max(tokenizer.get_vocab().values()) for tokenizer in (student, teacher or student))
    return range(min(known, teacher_rows if shared is None else shared), teacher_rows)


def compare_stop_ids(student: Sequence[int], teacher: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A warning when student and teacher end their answers with different tokens, else None.

    A student that waits for a token that its teacher never writes does not learn to stop: its answers grow to the cap
    within a few dozen steps.
    """
    if set(student) == set(teacher):
        return None
    named = [
        ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)})" for i in sorted(ids)) for ids in (student, teacher)
    ]
    return (
        f"student and teacher end their answers differently: stop ids of the student {named[0]}; of the teacher "
        f"{named[1]}. Watch the completion lengths; if they grow, give the student the teacher's chat template and "
        f"train it on data or on teacher-written answers (seq_kd) first"
    )


def compare_chat_templates(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """A warning when the teacher's own chat template writes a question otherwise than the student's, else None.

    Both models read chats in the form of the student's template: a teacher that was trained on another scores text of
    a form that it does not know. A template that either lacks, or that cannot render, is not compared.
    """
    texts = []
    for tokenizer in (student, teacher):
        if not tokenizer.chat_template:
            return None
        try:
            texts.append(ChatTemplate(tokenizer, "2024-01-01").render(_CONVERSATION[:1], generate=True))
        except STUMBLES:
            return None
    if texts[0] == texts[1]:
        return None
    return (
        f"student and teacher have different chat templates: the student's writes {texts[0]!r}, the teacher's "
        f"{texts[1]!r}. Both read chats in the student's form, which the teacher may not know: let it read its own "
        f"(teacher_template=own), or give the student's tokenizer the teacher's template (chat_template_path)"
    )
