"""What people read, made from plain values: tables, plots, the card.

card: the model card: what a reader needs to reproduce a run and to judge it, with metadata that the Hub
    understands
comparison: the student before and after training, the teacher beside them: a table for the console,
    Markdown, and plain values
dataset_folder: A data set as a folder that `load_dataset` and the Hub read: Parquet, a README and a
    record of how it was made
markdown: Markdown whose text cannot break out of its place: cells, captions, code, tables
plots: pictures of a run, from the trainer's log history and from an evaluation: PNG files for the folder
    and the card
repo: names that may be repositories of the Hub, told from paths of this machine, which are never shown as
    such
"""
