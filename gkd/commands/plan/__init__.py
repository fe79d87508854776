"""`gkd plan`: memory, before a machine is rented.

changes: what to set so that a run fits into a GPU's memory: the smallest and least intrusive changes
memory: how much memory a run needs on each GPU, from the models' configs alone
plan: `gkd plan`: will it fit? The memory of a recipe's run on each GPU, from the configs alone; no
    weights are loaded
"""
