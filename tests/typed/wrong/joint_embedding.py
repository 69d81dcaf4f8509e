"""Calls of `termwise.joint_embedding` that a type checker refuses. Never run."""

from torch import Tensor

from termwise import joint_embedding


def module_vicreg_loss(x: Tensor) -> None:
    joint_embedding.VICRegLoss(1.0)  # error: reportCallIssue: Expected 0 positional arguments
    joint_embedding.VICRegLoss(grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    joint_embedding.VICRegLoss(grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    joint_embedding.VICRegLoss()(x)  # error: reportCallIssue: Argument missing for parameter "z2"
    joint_embedding.VICRegLoss()(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    joint_embedding.VICRegLoss()(x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    joint_embedding.VICRegLoss()(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "z2" of type "Tensor" in function "__call__"


def record_vicreg_terms(terms: joint_embedding.VICRegTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "VICRegTerms"
    terms.std = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "std" for class "VICRegTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "VICRegTerms"
    joint_embedding.VICRegTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "sim", "var", "cov", "std"
    joint_embedding.VICRegTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_vicreg_loss(x: Tensor) -> None:
    joint_embedding.vicreg_loss(x)  # error: reportCallIssue: Argument missing for parameter "z2"
    joint_embedding.vicreg_loss(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    joint_embedding.vicreg_loss(x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    joint_embedding.vicreg_loss(x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    joint_embedding.vicreg_loss(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "z2" of type "Tensor"
