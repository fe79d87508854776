"""`gkd export`: what a run has trained, as one model that others load.

export: the command: what is asked for, and what it says at the end
formats: files for other programs: llama.cpp's converter, and Ollama's Modelfile
merging: an adapter added to its base model, saved whole, and compared with what it came from
"""
