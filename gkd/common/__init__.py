"""What every package may need and what knows none of them.

devices: the dtype in which a device takes sums: float64 where there is one
disk: files that are whole or not there, and the error of a full disk: what, where, what to
    do
distribution: how this package is installed: under which name, beside what, and with which files of its own
    beside the code
environment: what a run ran on: package versions and hardware, for the card and the doctor
errors: how a training ends that cannot or must not go on
keyed_folder: a folder that is named by the hash of what its files depend on (`digest`)
launcher: ranks do not outlive the launcher that started them: without one nobody would end them, and a
    job that is started again would meet them in its folder
random_state: keep the global random streams where they are: evaluation must not change what training
    draws
ranks: sums and maxima over ranks, the same on one process. Formulas never ask `if distributed`; they call
    these
ranges: ranges and choices of values: what is outside is refused by the name that the user knows it by
redact: keep secrets out of what is published: a command line and settings with access tokens and
    passwords replaced
sign_of_life: from what takes long: a bar on a terminal, elsewhere a plain line now and then
text: text made short, or harmless for a terminal; seconds as text
"""
