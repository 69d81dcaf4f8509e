"""Moments of a view, as formulas write them."""

import torch


def view_terms(z, gamma, eps):
    """Return var, cov, std and rank of one view, "batch dim"."""
    n, dim = z.shape
    centred = z - z.sum(0) / n
    covariance = centred.T @ centred / (n - 1)
    variance = torch.diagonal(covariance)
    held = covariance.detach()
    squares = (held**2).sum()
    return {
        "var": (gamma - (variance + eps).sqrt()).relu().sum() / dim,
        "cov": (covariance**2 * (1 - torch.eye(dim, dtype=z.dtype))).sum() / dim,
        "std": torch.diagonal(held).clamp(min=0).sqrt().sum() / dim,
        # (sum of eigenvalues)^2 / sum of their squares
        "rank": held.trace() ** 2 / squares if squares != 0 else squares,
    }


def summed(views, gamma, eps):
    """Return the sum of each term over views."""
    each = [view_terms(z, gamma, eps) for z in views]
    return {name: sum(one[name] for one in each) for name in each[0]}
