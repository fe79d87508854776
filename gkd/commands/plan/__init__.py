"""`gkd plan`: memory, before a machine is rented.

memory: how much memory a run needs on each GPU, from the models' configs alone
plan: `gkd plan`: will it fit? The memory of a recipe's run on each GPU, from the configs alone; no
    weights are loaded
"""
