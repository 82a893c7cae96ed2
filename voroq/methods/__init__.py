"""One paper, one file. `METHODS` is the list of names the command line knows; any callable `Method` will do in Python."""

from voroq.methods.base import Method
from voroq.methods.gptq import GPTQ
from voroq.methods.pvq import PVQ
from voroq.methods.rtn import RTN
from voroq.methods.vptq import VPTQ

METHODS: dict[str, type] = {"vptq": VPTQ, "pvq": PVQ, "gptq": GPTQ, "rtn": RTN}
ONE_SIDED = (GPTQ, PVQ, RTN)
"""Methods that do not look at the gradients at a linear's outputs."""

__all__ = ["GPTQ", "METHODS", "ONE_SIDED", "PVQ", "RTN", "VPTQ", "Method"]
