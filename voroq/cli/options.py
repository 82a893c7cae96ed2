"""Flags that several commands share, said once."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder in Hugging Face layout, or a hub id.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, and nothing else.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute; auto takes the GPU if there is one.")]
Dtype = Annotated[
    str,
    typer.Option(metavar="auto|float32|float16|bfloat16", help="Precision to run in; auto is float32 on the CPU, the stored one on a GPU."),
]
Revision = Annotated[str | None, typer.Option(metavar="COMMIT", help="Branch, tag or commit of a hub model.", show_default=False)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Only for authors you trust.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Decides every random choice: same seed, same result.")]
ActivationBits = Annotated[
    int | None,
    typer.Option(
        min=4, max=8, metavar="N", help="Round the inputs of quantized linears to N bits, 4 to 8. Default: as stored.", show_default=False
    ),
]
ActivationKind = Annotated[
    str, typer.Option(metavar="integers|pulses", help="With --activation-bits: plain integers, or integers of a given sum of magnitudes.")
]
CacheBits = Annotated[
    float | None,
    typer.Option(
        metavar="B", help="Keep keys and values of older tokens in B bits a number, 1 to 4. Default: as they are.", show_default=False
    ),
]
CacheRecent = Annotated[int, typer.Option(min=0, metavar="N", help="With --cache-bits: how many of the newest tokens stay as they are.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, max=10.0, metavar="T", help="0 takes the best token; 1 samples as the model says.")]
