"""From a row to a padded batch: formats, tokens, sources, sequences, targets.

aligned_view: a batch as a teacher with another tokenizer reads it: its own ids of the same completions, and
    where both meet
alignment: two tokenizers' ids of one completion, side by side: groups of tokens that stand for the same
    bytes
common_tokens: the tokens that two vocabularies spell alike: over these, two models can be
    compared in full
encode: token ids and labels of one row: where the answer begins and ends, found from texts and lengths,
    never from ids
encoded: one row in ids, which of its answers are trained on, and the lengths that it is held to
end_map: the tokens that end a turn where the student's template and the teacher's own do not end it alike:
    one pair
files: local data files as data sets: JSON, JSON Lines, CSV, Parquet, with the line number of what is
    broken
folders: folders of text files as data sets: `datasets` says which files are which split, and each is read
    exactly
formats: row formats
held_out: held-out rows whose prompts are not trained on, and a count of those that are
joined_tokens: tokens that only one of two vocabularies has, each counted with the common token that its text
    begins with
kinds: kinds of data set objects: which have rows that can be counted, and how their rows are read as they
    are stored
large_files: large local files as data sets that stay on disk, read by `datasets`, once for all ranks and
    runs
last_turn: the last question of a prompt, for tables: without the system turn and the signs that a chat
    template writes
left_out: what a row holds and its chat template does not write: counted, and named in the report
message_bytes: what a teacher behind a chat address reads and writes, in "ids" that are bytes: so it is
    kept as all others are
prepare: data sets: rows of any format become ids and labels, with a report of every row that could not be
    used as it is
prepared_row: one row of a data set: read, put into ids for student and teacher, and held to the limits
respelling: one completion in the ids of two tokenizers: rewritten from one's to the other's, and put side
    by side
rewritten: what a teacher with other tokens has written, in the student's: by way of its text
row_report: what became of a data set's rows: kept, dropped, cut, noted, and what in them nothing reads
row_values: values of a row: where they stand (for messages), what is JSON as text, and the nulls that
    Arrow puts in
sequences: token sequences: what a row has become, joined with a completion, cut, and padded to a batch
sources: where each sequence of an optimizer step comes from: the data set, the student, or the teacher
targets: target tokens: which positions of a padded batch are trained on, and the weight of each
teacher_rows: a row as its teacher reads it, where that is not as the student does: another prompt, system
    turn or template
teacher_view: a batch as the teacher reads it, where that is not as the student does
template_day: what a chat template takes for today, where it writes a date (`strftime_now`: Llama-3.2,
    gpt-oss and others)
templates: chat templates: rendering, whatever form a template wants a text in and whatever day it is
token_bytes: the bytes that each id of a vocabulary stands for in running text: what two tokenizers have
    in common
token_rows: rows that are token ids already: labels or masks, as `gkd precompute`, TRL and other trainers
    write them
tokenizer: `eos_token` and `chat_template_path`: options of `SFTConfig` about the tokenizer, applied
    before any row is read
turn_spans: where the earlier assistant turns of a chat stand in its rendering
turns: turns of a chat, in any spelling of data sets, as the `role`/`content` messages that chat templates
    read
unread: what a row holds and nothing reads: counted, column by column; images and sound refused
vocabulary: vocabularies: may these two models be compared token by token, and which ids end an answer?
"""
