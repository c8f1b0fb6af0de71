"""Dense float64 TWA, written straight from the paper (arXiv 2205.13104, eq. 3-6, sec. 4.3): the oracle of the tests."""

import torch
from torch.func import functional_call


class DenseTWA:
    """theta_g = m_g + sum_k c[g, k] e_k[g] as an ordinary autograd graph over N x D float64 numbers."""

    def __init__(self, module, states, groups, coordinates="normalized"):
        self.module = module.double()
        self.groups = groups
        self.centre, self.delta, self.scale = {}, {}, torch.ones(len(groups), len(states), dtype=torch.float64)
        for row, names in enumerate(groups.values()):
            for name in names:
                stacked = torch.stack([state[name].double() for state in states])
                self.centre[name] = stacked.mean(0)  # eq. 3
                self.delta[name] = stacked - self.centre[name]
            norm = sum(self.delta[name].flatten(1).square().sum(1) for name in names).sqrt()
            if coordinates == "normalized":
                self.scale[row] = torch.where(norm > 0, 1 / norm.clamp_min(1e-300), 0.0)  # eq. 4
        self.coefficients = torch.zeros(len(groups), len(states), dtype=torch.float64, requires_grad=True)

    def weights(self):
        merged = {}
        for row, names in enumerate(self.groups.values()):
            shares = self.coefficients[row] * self.scale[row]
            for name in names:
                merged[name] = self.centre[name] + torch.tensordot(shares, self.delta[name], dims=1)
        return merged

    def __call__(self, *args, **kwargs):
        return functional_call(self.module, self.weights(), args, kwargs, tie_weights=True)
