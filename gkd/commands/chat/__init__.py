"""`gkd chat`: student before, after and teacher answer side by side.

chat: the command: what is asked, and of whom
columns: answers on the terminal as they are written, or as plain text
serve: the commands that serve a run
speakers: the models of a run, loaded, and how each one answers
"""
