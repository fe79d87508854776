"""A recipe: its settings and rows, made into a trainer; its report; mistakes in one line.

build: settings and data made into a trainer: to train with, or only to measure with
capture: recipe files: executing one, or taking from it what it would run
command_line: the parser of a run's flags and of its `--config` YAML: TRL's; an error names field, value
    and remedy
help: `--help` of a recipe: grouped, the project's own fields first
ineffective: flags about the student's adapter and its quantization that would have no effect, since
    neither is asked for
mistakes: a user's mistake ends in one line, anybody else's with its traceback
objective: `objective`: a word for fields that go together. "sft" trains on the data's answers, and asks no teacher
report: what a run shows of itself: student before and after, in the log, the table, the files and the card
mixture: a mixture of data sets (`datasets` in YAML): entries with a weight and a teacher each, made one data
    set
quiet: libraries that tell of themselves at every start are not heard
rows: a run's data: local files, data sets by name, or what a recipe's `load_data` gives; an error names what is wrong
run_end: the end of a run: what was trained is kept even where the output folder cannot take it, and what
    cannot be written is reported when everything else has been
set_aside: A recipe's values that only go with another one of its values go when that one is changed
settings: the settings of a run: the command line over YAML over a recipe's defaults
shipped: the recipes that come with the package: found by name, so that they run without a clone
"""
