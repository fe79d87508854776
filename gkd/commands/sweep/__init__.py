"""`gkd sweep`: a grid of runs over several seeds, as a table with errors.

board: the progress of a sweep on the screen or in a log: runs done, which ones are going on, and the time that is left
budget: what a run had reached at a step or a second, and the most that all runs have in common
comparison: every measure of every cell against the base cell, paired by seed
folder: the sweep's folder: taken for a new sweep, or for the same one with more values, arms or seeds
grid: `field=value,value` into axes, axes into cells
jobs: runs as processes of their own, some at a time; what a failed one said last
outcome: a finished run's numbers, kept so that it is read the next time, not run
plan: what will run: every cell's config built before the first starts
report: what a sweep leaves: JSON, Parquet, a plot with intervals, a page of Markdown
statistics: mean, standard error, paired difference, interval
sweep: the command
tuning: a cell's best value of a field, chosen on a seed of its own
"""
