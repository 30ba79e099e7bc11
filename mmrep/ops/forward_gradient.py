"""Scalars whose gradient is made together with them: a backward pass has nothing left to do but to scale it.

Where a loss needs one direction only, a tile's part of the gradient is known as soon as the tile is: it is made there, and no
logit is computed twice (three matrix products instead of four).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef  # not exported; what `torch.library.custom_op` gives


def register_forward_gradient(
    operation: CustomOpDef, dense: Callable[..., Tensor], *, tensors: int, options: int
) -> None:
    """Give an operation its backward pass and its fake.

    Args:
        operation: Takes so many tensors, then so many options, then whether gradients are wanted; gives a scalar, and a
            gradient for each tensor (empty where they are not wanted).
        dense: The same scalar of tensors and options in plain formulas, for gradients of gradients.
        tensors, options: How many there are.
    """

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        inputs, wanted = arguments[:tensors], arguments[-1]
        loss = inputs[0].new_empty((), dtype=torch.promote_types(inputs[0].dtype, torch.float32))
        return loss, *(torch.empty_like(value) if wanted else value.new_empty(0) for value in inputs)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[tensors : tensors + options]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:tensors], *output[1:])

    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        inputs, gradients = ctx.saved_tensors[:tensors], ctx.saved_tensors[tensors:]
        nothing = (None,) * (options + 1)
        if not torch.is_grad_enabled():
            return *((grad * gradient).to(gradient.dtype) for gradient in gradients), *nothing
        return *differentiable_gradients(lambda *copies: dense(*copies, *ctx.options), inputs, grad), *nothing

    operation.register_fake(fake)
    operation.register_autograd(backward, setup_context=save)


def differentiable_gradients(
    dense: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Any
) -> Iterator[Tensor | None]:
    """Gradients of plain formulas that can be differentiated again, one an input, None where none is wanted.

    By copies of the inputs: where one was computed from another, or is the same, each has its own share of the gradient.
    """
    copies = [None if value is None else value.view_as(value) for value in inputs]
    wanted = [copy for copy in copies if copy is not None and copy.requires_grad]
    found = iter(torch.autograd.grad(dense(*copies), wanted, grads, create_graph=True))
    return (next(found) if copy is not None and copy.requires_grad else None for copy in copies)


def gradients_wanted(*tensors: Tensor) -> bool:
    """Whether anything will ask for them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
