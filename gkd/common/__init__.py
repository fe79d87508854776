"""What every package may need and what knows none of them.

devices: sums and counts by source, reduced over ranks once per logged step; and the ledger of what was
    trained on
disk: A full disk, said so that it can be mended: what was being written, where, and what to do
environment: what a run ran on: package versions and hardware, for the card and the doctor
errors: how a training ends that cannot or must not go on
keyed_folder: completions on disk, found again by the hash of their prompt; several processes may write
    and read at once
launcher: ranks do not outlive the launcher that started them: without one nobody would end them, and a
    job that is started again would meet them in its folder
random_state: keep the global random streams where they are: evaluation must not change what training
    draws
ranks: what depends on how the ranks are wired: gathering ZeRO-3 parameters, preparing a frozen model,
    summing over ranks
redact: keep secrets out of what is published: a command line and settings with access tokens and
    passwords replaced
text: text that cannot break out of its place: Markdown cells, code blocks and captions, lines of a
    terminal
"""
