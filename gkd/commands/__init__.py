"""What the shell's commands do.

chat: `gkd chat`: student before, after and teacher answer side by side
doctor: `gkd doctor`: a recipe looked at before it costs anything
evaluate: `gkd evaluate`: what a run measures before and after training, for a recipe's models as they are
export: `gkd export`: what a run has trained, as one model that others load
flags: the command line of `gkd`: its commands, their flags and their help
new: `gkd new`: a recipe that runs, from a template, after a look at the data
new_look: A look at the rows that `gkd new` is given: their format, what a recipe renames, what it would
    leave unused
plan: `gkd plan`: memory, before a machine is rented
precompute: `gkd precompute`: the teacher's answers and scores, made beforehand
recipes: `gkd recipes`: those that come with the package, listed, and copied to be changed
serve: `gkd serve`: the vLLM server that a recipe's run needs, started by hand
shrink: `gkd shrink`: a student from a teacher, without the layers and inner neurons that change the hidden state
    least
sweep: `gkd sweep`: a grid of runs over several seeds, as a table with errors
"""
