"""Calls of `termwise.energy` that a type checker refuses. Never run."""

from torch import Tensor

from termwise import energy


def bowl(x: Tensor) -> Tensor:
    return x.square().sum(1)


def timed(x: Tensor, t: Tensor) -> Tensor:
    return t * x.square().sum(1)


def module_conditional_noise_contrastive_loss(x: Tensor) -> None:
    energy.ConditionalNoiseContrastiveLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.ConditionalNoiseContrastiveLoss(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.ConditionalNoiseContrastiveLoss(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.ConditionalNoiseContrastiveLoss(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.ConditionalNoiseContrastiveLoss(bowl)(x)  # error: reportCallIssue: Argument missing for parameter "noise"
    energy.ConditionalNoiseContrastiveLoss(bowl)(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.ConditionalNoiseContrastiveLoss(bowl)(x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.ConditionalNoiseContrastiveLoss(bowl)(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "noise" of type "Tensor" in function "__call__"


def record_conditional_noise_contrastive_terms(terms: energy.ConditionalNoiseContrastiveTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "ConditionalNoiseContrastiveTerms"
    terms.log_odds = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "log_odds" for class "ConditionalNoiseContrastiveTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "ConditionalNoiseContrastiveTerms"
    energy.ConditionalNoiseContrastiveTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "classification", "accuracy", "log_odds"
    energy.ConditionalNoiseContrastiveTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_conditional_noise_contrastive_loss(x: Tensor) -> None:
    energy.conditional_noise_contrastive_loss(bowl, x)  # error: reportCallIssue: Argument missing for parameter "noise"
    energy.conditional_noise_contrastive_loss(bowl, x, x, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    energy.conditional_noise_contrastive_loss(bowl, x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.conditional_noise_contrastive_loss(bowl, x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.conditional_noise_contrastive_loss(bowl, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "noise" of type "Tensor"


def module_contrastive_divergence_loss(x: Tensor) -> None:
    energy.ContrastiveDivergenceLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.ContrastiveDivergenceLoss(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.ContrastiveDivergenceLoss(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.ContrastiveDivergenceLoss(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.ContrastiveDivergenceLoss(bowl)()  # error: reportCallIssue: Argument missing for parameter "x"
    energy.ContrastiveDivergenceLoss(bowl)(x, 1.0, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.ContrastiveDivergenceLoss(bowl)(x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.ContrastiveDivergenceLoss(bowl)("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor" in function "__call__"


def record_contrastive_divergence_terms(terms: energy.ContrastiveDivergenceTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "ContrastiveDivergenceTerms"
    terms.negatives = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "negatives" for class "ContrastiveDivergenceTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "ContrastiveDivergenceTerms"
    energy.ContrastiveDivergenceTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "energy_data", "energy_model", "gap", "regularization", "energy_squares", "negatives"
    energy.ContrastiveDivergenceTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_contrastive_divergence_loss(x: Tensor) -> None:
    energy.contrastive_divergence_loss(bowl)  # error: reportCallIssue: Argument missing for parameter "x"
    energy.contrastive_divergence_loss(bowl, x, 1.0, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    energy.contrastive_divergence_loss(bowl, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.contrastive_divergence_loss(bowl, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.contrastive_divergence_loss(bowl, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def calls_of_create_loss() -> None:
    energy.create_loss('mle')  # error: reportCallIssue: No overloads for "create_loss" match the provided arguments
    energy.create_loss('mle', bowl, 1.0)  # error: reportCallIssue: No overloads for "create_loss" match the provided arguments


def module_denoising_score_matching_loss(x: Tensor) -> None:
    energy.DenoisingScoreMatchingLoss(sigma=1.0)  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.DenoisingScoreMatchingLoss(bowl, 1.0, sigma=1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.DenoisingScoreMatchingLoss(bowl, sigma=1.0, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.DenoisingScoreMatchingLoss(bowl, sigma=1.0, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.DenoisingScoreMatchingLoss(bowl, sigma=1.0)()  # error: reportCallIssue: Argument missing for parameter "x"
    energy.DenoisingScoreMatchingLoss(bowl, sigma=1.0)(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.DenoisingScoreMatchingLoss(bowl, sigma=1.0)(x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.DenoisingScoreMatchingLoss(bowl, sigma=1.0, differentiation="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "differentiation" of type "Differentiation" in function "__init__"
    energy.DenoisingScoreMatchingLoss(bowl, sigma=1.0)("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor" in function "__call__"


def record_denoising_score_matching_terms(terms: energy.DenoisingScoreMatchingTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "DenoisingScoreMatchingTerms"
    terms.per_sigma = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "per_sigma" for class "DenoisingScoreMatchingTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "DenoisingScoreMatchingTerms"
    energy.DenoisingScoreMatchingTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "score_square", "cross", "noise_square", "per_sigma"
    energy.DenoisingScoreMatchingTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_denoising_score_matching_loss(x: Tensor) -> None:
    energy.denoising_score_matching_loss(bowl, sigma=1.0)  # error: reportCallIssue: Argument missing for parameter "x"
    energy.denoising_score_matching_loss(bowl, x, 1.0, sigma=1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.denoising_score_matching_loss(bowl, x, sigma=1.0, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.denoising_score_matching_loss(bowl, x, sigma=1.0, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.denoising_score_matching_loss(bowl, "x", sigma=1.0)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def module_energy_discrepancy_loss(x: Tensor) -> None:
    energy.EnergyDiscrepancyLoss(t=1.0)  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.EnergyDiscrepancyLoss(bowl, 1.0, t=1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.EnergyDiscrepancyLoss(bowl, t=1.0, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.EnergyDiscrepancyLoss(bowl, t=1.0, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.EnergyDiscrepancyLoss(bowl, t=1.0)()  # error: reportCallIssue: Argument missing for parameter "x"
    energy.EnergyDiscrepancyLoss(bowl, t=1.0)(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.EnergyDiscrepancyLoss(bowl, t=1.0)(x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.EnergyDiscrepancyLoss(bowl, t=1.0)("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor" in function "__call__"


def record_energy_discrepancy_terms(terms: energy.EnergyDiscrepancyTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "EnergyDiscrepancyTerms"
    terms.effective_copies = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "effective_copies" for class "EnergyDiscrepancyTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "EnergyDiscrepancyTerms"
    energy.EnergyDiscrepancyTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "gap", "stabilization", "effective_copies"
    energy.EnergyDiscrepancyTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_energy_discrepancy_loss(x: Tensor) -> None:
    energy.energy_discrepancy_loss(bowl, t=1.0)  # error: reportCallIssue: Argument missing for parameter "x"
    energy.energy_discrepancy_loss(bowl, x, 1.0, t=1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.energy_discrepancy_loss(bowl, x, t=1.0, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.energy_discrepancy_loss(bowl, x, t=1.0, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.energy_discrepancy_loss(bowl, "x", t=1.0)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def module_energy_matching_loss(x: Tensor) -> None:
    energy.EnergyMatchingLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.EnergyMatchingLoss(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.EnergyMatchingLoss(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.EnergyMatchingLoss(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.EnergyMatchingLoss(bowl)(x, x)  # error: reportCallIssue: Argument missing for parameter "time"
    energy.EnergyMatchingLoss(bowl)(x, x, x, 1.0, 1.0)  # error: reportCallIssue: Expected 4 positional arguments
    energy.EnergyMatchingLoss(bowl)(x, x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.EnergyMatchingLoss(bowl, differentiation="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "differentiation" of type "Differentiation" in function "__init__"
    energy.EnergyMatchingLoss(bowl)(x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "time" of type "Tensor" in function "__call__"


def record_energy_matching_terms(terms: energy.EnergyMatchingTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "EnergyMatchingTerms"
    terms.contrast = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "contrast" for class "EnergyMatchingTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "EnergyMatchingTerms"
    energy.EnergyMatchingTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "flow", "contrast"
    energy.EnergyMatchingTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_energy_matching_loss(x: Tensor) -> None:
    energy.energy_matching_loss(bowl, x, x)  # error: reportCallIssue: Argument missing for parameter "time"
    energy.energy_matching_loss(bowl, x, x, x, 1.0, 1.0)  # error: reportCallIssue: Expected 5 positional arguments
    energy.energy_matching_loss(bowl, x, x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.energy_matching_loss(bowl, x, x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.energy_matching_loss(bowl, x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "time" of type "Tensor"


def module_equilibrium_matching_loss(x: Tensor) -> None:
    energy.EquilibriumMatchingLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.EquilibriumMatchingLoss(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.EquilibriumMatchingLoss(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.EquilibriumMatchingLoss(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.EquilibriumMatchingLoss(bowl)(x, x)  # error: reportCallIssue: Argument missing for parameter "time"
    energy.EquilibriumMatchingLoss(bowl)(x, x, x, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    energy.EquilibriumMatchingLoss(bowl)(x, x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.EquilibriumMatchingLoss(bowl, differentiation="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "differentiation" of type "Differentiation" in function "__init__"
    energy.EquilibriumMatchingLoss(bowl)(x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "time" of type "Tensor" in function "__call__"


def record_equilibrium_matching_terms(terms: energy.EquilibriumMatchingTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "EquilibriumMatchingTerms"
    terms.target_square = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "target_square" for class "EquilibriumMatchingTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "EquilibriumMatchingTerms"
    energy.EquilibriumMatchingTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "gradient_square", "cross", "target_square"
    energy.EquilibriumMatchingTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_equilibrium_matching_loss(x: Tensor) -> None:
    energy.equilibrium_matching_loss(bowl, x, x)  # error: reportCallIssue: Argument missing for parameter "time"
    energy.equilibrium_matching_loss(bowl, x, x, x, 1.0)  # error: reportCallIssue: Expected 4 positional arguments
    energy.equilibrium_matching_loss(bowl, x, x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.equilibrium_matching_loss(bowl, x, x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.equilibrium_matching_loss(bowl, x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "time" of type "Tensor"


def module_finite_difference_score_matching_loss(x: Tensor) -> None:
    energy.FiniteDifferenceScoreMatchingLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.FiniteDifferenceScoreMatchingLoss(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.FiniteDifferenceScoreMatchingLoss(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.FiniteDifferenceScoreMatchingLoss(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.FiniteDifferenceScoreMatchingLoss(bowl)()  # error: reportCallIssue: Argument missing for parameter "x"
    energy.FiniteDifferenceScoreMatchingLoss(bowl)(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.FiniteDifferenceScoreMatchingLoss(bowl)(x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.FiniteDifferenceScoreMatchingLoss(bowl)("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor" in function "__call__"


def record_finite_difference_score_matching_terms(terms: energy.FiniteDifferenceScoreMatchingTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "FiniteDifferenceScoreMatchingTerms"
    terms.curvature = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "curvature" for class "FiniteDifferenceScoreMatchingTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "FiniteDifferenceScoreMatchingTerms"
    energy.FiniteDifferenceScoreMatchingTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "score_square", "curvature"
    energy.FiniteDifferenceScoreMatchingTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_finite_difference_score_matching_loss(x: Tensor) -> None:
    energy.finite_difference_score_matching_loss(bowl)  # error: reportCallIssue: Argument missing for parameter "x"
    energy.finite_difference_score_matching_loss(bowl, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.finite_difference_score_matching_loss(bowl, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.finite_difference_score_matching_loss(bowl, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.finite_difference_score_matching_loss(bowl, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def module_flow_matching_loss(x: Tensor) -> None:
    energy.FlowMatchingLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.FlowMatchingLoss(timed, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.FlowMatchingLoss(timed, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.FlowMatchingLoss(timed, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.FlowMatchingLoss(timed)(x, x)  # error: reportCallIssue: Argument missing for parameter "time"
    energy.FlowMatchingLoss(timed)(x, x, x, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    energy.FlowMatchingLoss(timed)(x, x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.FlowMatchingLoss(timed, differentiation="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "differentiation" of type "Differentiation" in function "__init__"
    energy.FlowMatchingLoss(timed)(x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "time" of type "Tensor" in function "__call__"


def record_flow_matching_terms(terms: energy.FlowMatchingTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "FlowMatchingTerms"
    terms.target_square = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "target_square" for class "FlowMatchingTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "FlowMatchingTerms"
    energy.FlowMatchingTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "velocity_square", "cross", "target_square"
    energy.FlowMatchingTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_flow_matching_loss(x: Tensor) -> None:
    energy.flow_matching_loss(bowl, x, x)  # error: reportCallIssue: Argument missing for parameter "time"
    energy.flow_matching_loss(bowl, x, x, x, 1.0)  # error: reportCallIssue: Expected 4 positional arguments
    energy.flow_matching_loss(bowl, x, x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.flow_matching_loss(bowl, x, x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.flow_matching_loss(bowl, x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "time" of type "Tensor"


def module_contrastive_divergence_klterm(x: Tensor) -> None:
    energy.ContrastiveDivergenceKLTerm()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.ContrastiveDivergenceKLTerm(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.ContrastiveDivergenceKLTerm(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.ContrastiveDivergenceKLTerm(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.ContrastiveDivergenceKLTerm(bowl)()  # error: reportCallIssue: Argument missing for parameter "samples"
    energy.ContrastiveDivergenceKLTerm(bowl)(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.ContrastiveDivergenceKLTerm(bowl)(x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.ContrastiveDivergenceKLTerm(bowl, differentiation="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "differentiation" of type "Differentiation" in function "__init__"
    energy.ContrastiveDivergenceKLTerm(bowl)("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "samples" of type "Tensor" in function "__call__"


def record_contrastive_divergence_klterms(terms: energy.ContrastiveDivergenceKLTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "ContrastiveDivergenceKLTerms"
    terms.entropy = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "entropy" for class "ContrastiveDivergenceKLTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "ContrastiveDivergenceKLTerms"
    energy.ContrastiveDivergenceKLTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "energy", "entropy"
    energy.ContrastiveDivergenceKLTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_contrastive_divergence_kl_term(x: Tensor) -> None:
    energy.contrastive_divergence_kl_term(bowl)  # error: reportCallIssue: Argument missing for parameter "samples"
    energy.contrastive_divergence_kl_term(bowl, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.contrastive_divergence_kl_term(bowl, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.contrastive_divergence_kl_term(bowl, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.contrastive_divergence_kl_term(bowl, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "samples" of type "Tensor"


def calls_of_langevin(x: Tensor) -> None:
    energy.langevin(bowl, steps=2, step_size=1.0)  # error: reportCallIssue: Argument missing for parameter "x"
    energy.langevin(bowl, x, 1.0, steps=2, step_size=1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.langevin(bowl, x, steps=2, step_size=1.0, differentiable_stesp=None)  # error: reportCallIssue: No parameter named "differentiable_stesp"
    energy.langevin(bowl, x, steps=2, step_size=1.0, adjust="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "adjust" of type "Adjust"
    energy.langevin(bowl, "x", steps=2, step_size=1.0)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def module_maximum_likelihood_loss(x: Tensor) -> None:
    energy.MaximumLikelihoodLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.MaximumLikelihoodLoss(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.MaximumLikelihoodLoss(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.MaximumLikelihoodLoss(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.MaximumLikelihoodLoss(bowl)(x)  # error: reportCallIssue: Argument missing for parameter "negatives"
    energy.MaximumLikelihoodLoss(bowl)(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.MaximumLikelihoodLoss(bowl)(x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.MaximumLikelihoodLoss(bowl)(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "negatives" of type "Tensor" in function "__call__"


def record_maximum_likelihood_terms(terms: energy.MaximumLikelihoodTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "MaximumLikelihoodTerms"
    terms.regularization = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "regularization" for class "MaximumLikelihoodTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "MaximumLikelihoodTerms"
    energy.MaximumLikelihoodTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "energy_data", "energy_model", "gap", "regularization"
    energy.MaximumLikelihoodTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_maximum_likelihood_loss(x: Tensor) -> None:
    energy.maximum_likelihood_loss(bowl, x)  # error: reportCallIssue: Argument missing for parameter "negatives"
    energy.maximum_likelihood_loss(bowl, x, x, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    energy.maximum_likelihood_loss(bowl, x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.maximum_likelihood_loss(bowl, x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.maximum_likelihood_loss(bowl, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "negatives" of type "Tensor"


def module_noise_contrastive_loss(x: Tensor) -> None:
    energy.NoiseContrastiveLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.NoiseContrastiveLoss(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.NoiseContrastiveLoss(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.NoiseContrastiveLoss(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.NoiseContrastiveLoss(bowl)(x, log_noise_x=x, log_noise_noise=x)  # error: reportCallIssue: Argument missing for parameter "noise"
    energy.NoiseContrastiveLoss(bowl)(x, x, 1.0, log_noise_x=x, log_noise_noise=x)  # error: reportCallIssue: Expected 2 positional arguments
    energy.NoiseContrastiveLoss(bowl)(x, x, log_noise_x=x, log_noise_noise=x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.NoiseContrastiveLoss(bowl)(x, "x", log_noise_x=x, log_noise_noise=x)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "noise" of type "Tensor" in function "__call__"


def record_noise_contrastive_terms(terms: energy.NoiseContrastiveTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "NoiseContrastiveTerms"
    terms.log_z = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "log_z" for class "NoiseContrastiveTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "NoiseContrastiveTerms"
    energy.NoiseContrastiveTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "data", "noise", "accuracy", "log_z"
    energy.NoiseContrastiveTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_noise_contrastive_loss(x: Tensor) -> None:
    energy.noise_contrastive_loss(bowl, x, log_noise_x=x, log_noise_noise=x, log_z=x)  # error: reportCallIssue: Argument missing for parameter "noise"
    energy.noise_contrastive_loss(bowl, x, x, 1.0, log_noise_x=x, log_noise_noise=x, log_z=x)  # error: reportCallIssue: Expected 3 positional arguments
    energy.noise_contrastive_loss(bowl, x, x, log_noise_x=x, log_noise_noise=x, log_z=x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.noise_contrastive_loss(bowl, x, x, log_noise_x=x, log_noise_noise=x, log_z=x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.noise_contrastive_loss(bowl, x, "x", log_noise_x=x, log_noise_noise=x, log_z=x)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "noise" of type "Tensor"


def module_energy_square_penalty(x: Tensor) -> None:
    energy.EnergySquarePenalty()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.EnergySquarePenalty(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.EnergySquarePenalty(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.EnergySquarePenalty(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.EnergySquarePenalty(bowl)()  # error: reportCallIssue: Argument missing for parameter "x"
    energy.EnergySquarePenalty(bowl)(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.EnergySquarePenalty(bowl)(x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.EnergySquarePenalty(bowl)("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor" in function "__call__"


def record_energy_square_terms(terms: energy.EnergySquareTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "EnergySquareTerms"
    terms.energy = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "energy" for class "EnergySquareTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "EnergySquareTerms"
    energy.EnergySquareTerms(loss=x)  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.EnergySquareTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def module_gradient_penalty(x: Tensor) -> None:
    energy.GradientPenalty()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.GradientPenalty(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.GradientPenalty(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.GradientPenalty(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.GradientPenalty(bowl)()  # error: reportCallIssue: Argument missing for parameter "x"
    energy.GradientPenalty(bowl)(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.GradientPenalty(bowl)(x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.GradientPenalty(bowl, differentiation="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "differentiation" of type "Differentiation" in function "__init__"
    energy.GradientPenalty(bowl)("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor" in function "__call__"


def record_gradient_penalty_terms(terms: energy.GradientPenaltyTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "GradientPenaltyTerms"
    terms.gradient_norm = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "gradient_norm" for class "GradientPenaltyTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "GradientPenaltyTerms"
    energy.GradientPenaltyTerms(loss=x)  # error: reportCallIssue: Argument missing for parameter "gradient_norm"
    energy.GradientPenaltyTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_energy_square_penalty(x: Tensor) -> None:
    energy.energy_square_penalty(bowl)  # error: reportCallIssue: Argument missing for parameter "x"
    energy.energy_square_penalty(bowl, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.energy_square_penalty(bowl, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.energy_square_penalty(bowl, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.energy_square_penalty(bowl, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def calls_of_gradient_penalty(x: Tensor) -> None:
    energy.gradient_penalty(bowl)  # error: reportCallIssue: Argument missing for parameter "x"
    energy.gradient_penalty(bowl, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.gradient_penalty(bowl, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.gradient_penalty(bowl, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.gradient_penalty(bowl, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def module_ranking_noise_contrastive_loss(x: Tensor) -> None:
    energy.RankingNoiseContrastiveLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.RankingNoiseContrastiveLoss(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.RankingNoiseContrastiveLoss(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.RankingNoiseContrastiveLoss(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.RankingNoiseContrastiveLoss(bowl)(x, log_noise_x=x, log_noise_noise=x)  # error: reportCallIssue: Argument missing for parameter "noise"
    energy.RankingNoiseContrastiveLoss(bowl)(x, x, 1.0, log_noise_x=x, log_noise_noise=x)  # error: reportCallIssue: Expected 2 positional arguments
    energy.RankingNoiseContrastiveLoss(bowl)(x, x, log_noise_x=x, log_noise_noise=x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.RankingNoiseContrastiveLoss(bowl)(x, "x", log_noise_x=x, log_noise_noise=x)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "noise" of type "Tensor" in function "__call__"


def record_ranking_noise_contrastive_terms(terms: energy.RankingNoiseContrastiveTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "RankingNoiseContrastiveTerms"
    terms.effective_candidates = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "effective_candidates" for class "RankingNoiseContrastiveTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "RankingNoiseContrastiveTerms"
    energy.RankingNoiseContrastiveTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "data", "normalizer", "accuracy", "effective_candidates"
    energy.RankingNoiseContrastiveTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_ranking_noise_contrastive_loss(x: Tensor) -> None:
    energy.ranking_noise_contrastive_loss(bowl, x, log_noise_x=x, log_noise_noise=x)  # error: reportCallIssue: Argument missing for parameter "noise"
    energy.ranking_noise_contrastive_loss(bowl, x, x, 1.0, log_noise_x=x, log_noise_noise=x)  # error: reportCallIssue: Expected 3 positional arguments
    energy.ranking_noise_contrastive_loss(bowl, x, x, log_noise_x=x, log_noise_noise=x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.ranking_noise_contrastive_loss(bowl, x, x, log_noise_x=x, log_noise_noise=x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.ranking_noise_contrastive_loss(bowl, x, "x", log_noise_x=x, log_noise_noise=x)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "noise" of type "Tensor"


def holder_replay_buffer(one: energy.ReplayBuffer) -> None:
    print(one.samplse)  # error: reportAttributeAccessIssue: Cannot access attribute "samplse" for class "ReplayBuffer"
    energy.ReplayBuffer(samplse=1)  # error: reportCallIssue: Argument missing for parameter "samples"


def module_score_matching_loss(x: Tensor) -> None:
    energy.ScoreMatchingLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.ScoreMatchingLoss(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.ScoreMatchingLoss(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.ScoreMatchingLoss(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.ScoreMatchingLoss(bowl)()  # error: reportCallIssue: Argument missing for parameter "x"
    energy.ScoreMatchingLoss(bowl)(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.ScoreMatchingLoss(bowl)(x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.ScoreMatchingLoss(bowl)("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor" in function "__call__"


def record_score_matching_terms(terms: energy.ScoreMatchingTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "ScoreMatchingTerms"
    terms.laplacian = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "laplacian" for class "ScoreMatchingTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "ScoreMatchingTerms"
    energy.ScoreMatchingTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "score_square", "laplacian"
    energy.ScoreMatchingTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_hessian_trace(x: Tensor) -> None:
    energy.hessian_trace(bowl)  # error: reportCallIssue: Argument missing for parameter "x"
    energy.hessian_trace(bowl, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.hessian_trace(bowl, x, differentiatino=None)  # error: reportCallIssue: No parameter named "differentiatino"
    energy.hessian_trace(bowl, x, differentiation="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "differentiation" of type "Differentiation"
    energy.hessian_trace(bowl, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def calls_of_score_matching_loss(x: Tensor) -> None:
    energy.score_matching_loss(bowl)  # error: reportCallIssue: Argument missing for parameter "x"
    energy.score_matching_loss(bowl, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.score_matching_loss(bowl, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.score_matching_loss(bowl, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.score_matching_loss(bowl, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def module_sliced_score_matching_loss(x: Tensor) -> None:
    energy.SlicedScoreMatchingLoss()  # error: reportCallIssue: Argument missing for parameter "energy"
    energy.SlicedScoreMatchingLoss(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.SlicedScoreMatchingLoss(bowl, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.SlicedScoreMatchingLoss(bowl, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.SlicedScoreMatchingLoss(bowl)()  # error: reportCallIssue: Argument missing for parameter "x"
    energy.SlicedScoreMatchingLoss(bowl)(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    energy.SlicedScoreMatchingLoss(bowl)(x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    energy.SlicedScoreMatchingLoss(bowl)("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor" in function "__call__"


def record_sliced_score_matching_terms(terms: energy.SlicedScoreMatchingTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "SlicedScoreMatchingTerms"
    terms.curvature = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "curvature" for class "SlicedScoreMatchingTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "SlicedScoreMatchingTerms"
    energy.SlicedScoreMatchingTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "score_square", "curvature"
    energy.SlicedScoreMatchingTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_sliced_score_matching_loss(x: Tensor) -> None:
    energy.sliced_score_matching_loss(bowl)  # error: reportCallIssue: Argument missing for parameter "x"
    energy.sliced_score_matching_loss(bowl, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    energy.sliced_score_matching_loss(bowl, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    energy.sliced_score_matching_loss(bowl, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    energy.sliced_score_matching_loss(bowl, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"
