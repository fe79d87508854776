"""`gkd precompute`: the teacher's answers and scores, made beforehand.

answers: `gkd precompute`: the teacher answers a recipe's training prompts beforehand
rollouts: `gkd precompute --student`: the student answers a recipe's training prompts before its training
scores: `gkd precompute --scores`: the teacher scores a recipe's training rows beforehand
"""
