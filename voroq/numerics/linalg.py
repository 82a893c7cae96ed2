"""The linear algebra of second-order rounding."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from voroq.shapes import Matrix, Square


def inverse_factor(h: Square) -> Square:
    """Upper-triangular `u` with `inv(h) == u.T @ u`; row j is what column j's error owes to the columns after it.

    With J the reversal of order, J h J = l l^T (Cholesky), so h = r r^T with r = J l J upper triangular, and
    inv(h) = inv(r)^T inv(r): u = inv(r), one factorisation and one triangular solve, no explicit inverse of h.

    Raises torch.linalg.LinAlgError where `h` is not positive definite.
    """
    reversed_factor = torch.linalg.cholesky(h.flip(0, 1))
    upper = reversed_factor.flip(0, 1)
    identity = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def damped(h: Square, damping: float) -> tuple[Square, tuple[str, ...]]:
    """`h` made safely positive definite, and notes on what it took.

    A dead column (zero diagonal: its input was never seen to move) gets the mean diagonal. Then `damping` times the mean
    diagonal is added; where Cholesky still fails, ten times more, and so on up to the mean diagonal itself.

    Raises ValueError where `h` holds NaN or Inf, or cannot be mended.
    """
    if not torch.isfinite(h).all():
        raise ValueError("the Hessian holds NaN or Inf; the calibration activations overflowed")
    notes = []
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if (~dead).any() else torch.ones((), dtype=h.dtype, device=h.device)
    if dead.any():
        notes.append(f"{int(dead.sum())} of {len(dead)} input columns never moved in the calibration data")
        h = h + torch.diag(dead.to(h.dtype) * mean)
    level = damping
    while True:
        out = h + torch.eye(h.shape[0], dtype=h.dtype, device=h.device) * (level * mean)
        if torch.linalg.cholesky_ex(out.flip(0, 1)).info == 0:
            break
        if level >= 1:
            raise ValueError("the Hessian is not positive definite even with damping equal to its mean diagonal")
        level = min(1.0, max(level * 10, 1e-4))
    if level != damping:
        notes.append(f"the Hessian was not positive definite at damping {damping:g}; used {level:g}")
    return out, tuple(notes)


def answering(w: Matrix, second: Square, shift: Square, damping: float) -> Matrix:
    """The matrix that gives on inputs x' what `w` gives on x, as nearly as least squares can: argmin |W x - W' x'|^2 + damping |W' - W|^2.

    With second = sum x' x'^T and shift = sum (x - x') x'^T it is W + W shift inv(second + damping mean(diag second) I).
    (Asymmetric calibration: GPTAQ, Li et al. 2025; Qronos, Zhang et al. 2025.)
    """
    mean = second.diagonal().mean().clamp_min(torch.finfo(second.dtype).tiny)
    ridge = second + torch.eye(second.shape[0], dtype=second.dtype, device=second.device) * (damping * mean)
    return w + torch.linalg.solve(ridge, (w @ shift).T).T


def kept_columns(w: Matrix, gone: Int[Tensor, "n"]) -> Bool[Tensor, "in"]:
    """Which columns of `w` stay without those in `gone`."""
    kept = torch.ones(w.shape[1], dtype=torch.bool, device=w.device)
    kept[gone] = False
    return kept


def without_columns(w: Matrix, h: Square, gone: Int[Tensor, "n"]) -> Float[Tensor, "out kept"]:
    """`w` without its columns `gone`, the others such that the outputs on inputs of second moment `h` are as near as can be:
    W_k + W_g H_gk inv(H_kk). `h` is positive definite; columns stay in order."""
    kept = kept_columns(w, gone)
    return w[:, kept] + torch.linalg.solve(h[kept][:, kept], h[kept][:, gone] @ w[:, gone].T).T


def padded_without(w: Matrix, h: Square, gone: Int[Tensor, "n"]) -> Matrix:
    """The same with zeros in the columns `gone`."""
    return torch.zeros_like(w).masked_scatter(kept_columns(w, gone).expand_as(w), without_columns(w, h, gone))


def proxy_loss(delta: Matrix, h: Square) -> Float[Tensor, "out"]:
    """delta H delta^T, its diagonal: the loss each output row adds to tr(E H E^T)."""
    return ((delta @ h) * delta).sum(1)


def relative_proxy_loss(w: Matrix, approximation: Matrix, h: Square) -> float:
    """tr(E H E^T) / tr(W H W^T)."""
    total = proxy_loss(w, h).double().sum()
    return float(proxy_loss(w - approximation, h).double().sum() / total) if total > 0 else 0.0
