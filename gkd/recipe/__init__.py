"""A recipe: its settings and rows, made into a trainer; its report; mistakes in one line.

build: everything that a run is told: the command line over YAML over a recipe's defaults, and data sets
    by name
capture: recipe files: executing one, or taking from it what it would run, and how a user's mistake ends
command_line: the parser of a run's flags and of its `--config` YAML: TRL's, with mistakes told by field,
    value and remedy
evaluator: A teacher on a server, as the evaluation needs it: it writes, it scores, and it tells a text's
    log-probabilities
mistakes: recipe files: executing one, or taking from it what it would run, and how a user's mistake ends
report: what a training log holds beside the Trainer's own loss and learning rate
rows: everything that a run is told: the command line over YAML over a recipe's defaults, and data sets by
    name
run_end: the end of a run: what was trained is kept even where the output folder cannot take it, and what
    cannot be written is told when everything else has been
set_aside: A recipe's values that only go with another one of its values go when that one is changed
settings: everything that a run is told: the command line over YAML over a recipe's defaults, and data
    sets by name
"""
