"""The command line: `voroq quantize | eval | inspect | generate | chat | methods | demo`.

One file per group of commands. Nothing here imports torch or transformers before a command needs them, so that help is
instant; everything a command does is a call into the library that Python users can make too.
"""

from voroq.cli.app import main

__all__ = ["main"]
