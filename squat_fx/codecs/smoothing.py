"""A factor for each channel, between what keys and what queries ask for.

A rotation spreads the rounding error of a token evenly over its channels, in proportion to the
energy of all of them. Where a few channels of the keys are large, the others drown, and where
queries are large in other channels than keys are, scores suffer for nothing. With keys divided by
``f`` and queries multiplied with it, the error of a score grows with

    sum(query**2 * f**2) * sum(key**2 / f**2)        least at  f**2 = rms(key) / rms(query)

where it is ``sum(rms(key) * rms(query))**2`` (Cauchy and Schwarz). This is SmoothQuant's migration
at one half (Xiao et al., 2023, section 4), between keys and queries, learned from the prompt;
tokens that come later have it too. Factors are powers of two, so that to scale rounds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-3  # of the mean over channels: a channel that is nearly zero has no say
LARGEST_EXPONENT = 12


def smoothing_factors(key_moment: Tensor, query_moment: Tensor) -> Tensor:
    """Powers of two whose geometric mean is about 1, fp16, the shape of both.

    Args:
        key_moment, query_moment: the mean (or the sum) of squares of each channel, ``[...,
            head_dim]``. What is not finite has no say either.
    """
    ratio = (_floored(key_moment) / _floored(query_moment)).log2() / 4
    ratio = ratio - ratio.mean(-1, keepdim=True)
    exponent = ratio.nan_to_num(0.0, 0.0, 0.0).round()
    return torch.exp2(exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)).half()


def _floored(moment: Tensor) -> Tensor:
    moment = moment.double()
    return moment + FLOOR * moment.mean(-1, keepdim=True) + torch.finfo(torch.float64).tiny
