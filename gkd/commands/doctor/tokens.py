"""The doctor's look at tokens, without weights: whether a teacher has the student's, and writes a chat as it does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from gkd.assembly.models import resolve_tokenizer
from gkd.commands.doctor.attempt import Named, attempt
from gkd.commands.doctor.view import Diagnosis
from gkd.config.fields import GKDConfig
from gkd.data.vocabulary import compare_chat_templates, same_token_maps, shared_vocabulary
from gkd.models.facts import vocabulary_rows
from gkd.models.loading import load_tokenizer
from gkd.recipe.build import student_name, student_tokenizer
from gkd.recipe.settings import Settings

Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]


def examine_tokens(out: Diagnosis, settings: Settings) -> Tokenizers | None:
    """The tokens and templates of every teacher beside the student's; the student's tokenizer and the last teacher's,
    None where one cannot be used."""
    found = []
    for name, args in settings.training.each_teacher.items():
        of = Named(out, "" if name is None else f", {name}")
        one = replace(settings, training=args)
        tokenizers = attempt(of, "Tokenizers", partial(_tokenizers, of, one))
        if tokenizers is not None:
            attempt(of, "Token maps", partial(_token_maps, of, one, tokenizers))
            aligned = args.teacher_tokenizer_alignment is not None
            apart = _writes_other_tokens(args, tokenizers) or (
                aligned and (args.teacher_server_url is not None or _other_tokens(tokenizers))
            )
            _chat_templates(of, *tokenizers, args.teacher_template == "own" or apart)
        found.append(tokenizers)
    return None if None in found else found[-1]


def _tokenizers(out: Diagnosis | Named, settings: Settings) -> Tokenizers:
    """The student's, and the teacher's where it has one of its own."""
    args = settings.training
    student = resolve_tokenizer(student_tokenizer(settings), student_name(settings), args)
    named = args.teacher_model_name_or_path
    if args.teacher_chat_url is not None:
        out.add("Tokenizers", "ok", f"student {len(student):,} tokens; the teacher's text is all that is read")
        return student, None
    if args.teacher_server_url is not None:
        out.add(
            "Tokenizers", "ok", f"student {len(student):,} tokens; the teacher's server is asked for its own below"
        )
        return student, None
    if args.shares_weights:
        out.add("Tokenizers", "ok", f"student {len(student):,} tokens; the teacher is the same base model")
        return student, None
    if named is None and not args.needs_teacher:
        out.add("Tokenizers", "ok", f"student {len(student):,} tokens; no teacher: the data's answers are trained on")
        return student, None
    if named is None:
        out.add("Tokenizers", "warning", "the teacher has no name: its tokens are not compared", "name the teacher")
        return student, None
    try:
        teacher = load_tokenizer(named, trust_remote_code=args.trust_remote_code)
    except ValueError as error:
        out.add(
            "Tokenizers",
            "warning",
            f"the teacher's token map cannot be compared: {error}",
            "save its tokenizer beside the teacher",
        )
        return student, None
    out.add("Tokenizers", "ok", f"student {len(student):,} tokens, teacher {len(teacher):,}")
    return student, teacher


def _token_maps(out: Diagnosis | Named, settings: Settings, tokenizers: Tokenizers) -> None:
    args = settings.training
    nobody = args.teacher_model_name_or_path is None and not args.needs_teacher
    if args.teacher_is_elsewhere or args.shares_weights or nobody:
        return
    if args.teacher_tokenizer_alignment is not None and _other_tokens(tokenizers):
        out.add("Token maps", "ok", "they differ: compared where tokens of both are the same bytes, see Alignment")
        return
    if _writes_other_tokens(args, tokenizers):
        out.add(
            "Token maps", "ok", "they differ: the teacher only writes, and its text is trained on (seq_kd_loss=nll)"
        )
        return
    names = {"student": student_name(settings), "teacher": args.teacher_model_name_or_path or student_name(settings)}
    fields = {"student": "model_name_or_path", "teacher": "teacher_model_name_or_path"}
    rows = {
        who: vocabulary_rows(name, field=fields[who], trust_remote_code=args.trust_remote_code)
        for who, name in names.items()
    }
    shared = shared_vocabulary(*tokenizers, rows["student"], rows["teacher"])
    sizes = f"heads of {rows['student']:,} (student) and {rows['teacher']:,} rows (teacher)"
    if tokenizers[1] is None:
        out.add("Token maps", "warning", f"not compared; {sizes}", "make sure that both read the same tokens")
    elif shared is None:
        out.add("Token maps", "ok", f"every id stands for the same token; {sizes}")
    else:
        out.add("Token maps", "ok", f"every common id stands for the same token; {sizes}: the first {shared:,} count")


def _writes_other_tokens(args: GKDConfig, tokenizers: Tokenizers) -> bool:
    """Whether the teacher has other tokens, and nothing is compared with it."""
    return args.trains_on_nll_alone and _other_tokens(tokenizers)


def _other_tokens(tokenizers: Tokenizers) -> bool:
    student, teacher = tokenizers
    return teacher is not None and not same_token_maps(student, teacher)


def _chat_templates(
    out: Diagnosis | Named, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None, own: bool
) -> None:
    if own:
        out.add("Chat templates", "ok", "the teacher reads chats in its own")
        return
    remark = compare_chat_templates(student, teacher) if teacher is not None else None
    if remark:
        out.add("Chat templates", "warning", remark)
    elif not student.chat_template:
        out.add("Chat templates", "ok", "the student has none: rows must be plain text")
    elif teacher is not None and teacher.chat_template:
        out.add("Chat templates", "ok", "student's and teacher's write a question alike")
    else:
        out.add("Chat templates", "ok", "only the student has one")
